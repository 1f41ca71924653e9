"""OLMo 1 to 3."""

from tests.cases.case import Case
from tests.cases.relatives import YARN
from tests.convert import old_spelling
from tests.tiny import common

BY_TYPE = dict(full_attention=YARN, sliding_attention=dict(rope_type="default", rope_theta=10000.0))

CASES = {
    "olmo": Case("olmo", common(clip_qkv=0.3)),
    "olmo-old": Case("olmo", common(attention_bias=True, tie_word_embeddings=True), convert=old_spelling()),
    "olmo2": Case("olmo2", common()),
    "olmo2-bias": Case("olmo2", common(attention_bias=True, num_key_value_heads=4, rope_parameters=YARN)),
    "olmo3": Case("olmo3", common(sliding_window=8, num_hidden_layers=4)),
    "olmo3-yarn": Case(
        "olmo3", common(sliding_window=8, rope_parameters=BY_TYPE, attention_bias=True, num_hidden_layers=4)
    ),
}
