"""Command R and Command R7B."""

from tests.cases.case import Case
from tests.convert import old_spelling
from tests.tiny import common

HUB = dict(
    order_of_interleaved_layers="local_attn_first",
    position_embedding_type="rope_gptj",
    rotary_pct=1.0,
    use_embedding_sharing=True,
    use_gated_activation=True,
    use_parallel_block=True,
    sliding_window_pattern=3,
    layer_switch=3,
)

CASES = {
    "cohere": Case("cohere", common(use_qk_norm=True)),
    "cohere-bias": Case("cohere", common(attention_bias=True, logit_scale=0.5, tie_word_embeddings=False)),
    "cohere2": Case("cohere2", common(sliding_window=8, num_hidden_layers=4)),
    "cohere2-old": Case(
        "cohere2",
        common(sliding_window=8, attention_bias=True, sliding_window_pattern=3, num_hidden_layers=4),
        convert=old_spelling(lambda old: HUB),
    ),
}
