"""GPT-NeoX and those that share its grouped query, key and value matrix."""

from tests.cases.case import Case
from tests.tiny import common

MHA = common(num_key_value_heads=4)
FALCON = dict(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
BLOOM = dict(vocab_size=96, hidden_size=64, n_layer=2, n_head=4)

CASES = {
    "gpt_neox": Case("gpt_neox", MHA),
    "gpt_neox-sequential": Case(
        "gpt_neox", MHA | dict(use_parallel_residual=False, rotary_pct=0.5, attention_bias=False)
    ),
    "falcon-7b": Case("falcon", FALCON),
    "falcon-40b": Case("falcon", FALCON | dict(num_kv_heads=2, new_decoder_architecture=True)),
    "falcon-11b": Case(
        "falcon",
        FALCON
        | dict(num_kv_heads=2, new_decoder_architecture=True, num_ln_in_parallel_attn=1, ffn_hidden_size=96),
    ),
    # The eager attention of transformers adds ALiBi twice.
    "falcon-rw": Case(
        "falcon", FALCON | dict(multi_query=False, parallel_attn=False, bias=True, alibi=True), attn="sdpa"
    ),
    "bloom": Case("bloom", BLOOM),
    "bloom-6heads": Case("bloom", BLOOM | dict(hidden_size=60, n_head=6, tie_word_embeddings=False)),
    "persimmon": Case("persimmon", MHA),
    "persimmon-plain": Case("persimmon", MHA | dict(qk_layernorm=False, partial_rotary_factor=1.0)),
}
