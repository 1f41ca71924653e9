"""LFM2."""

from tests.cases.case import RECURRENT, Case
from tests.tiny import common

MIXED = ["conv", "full_attention", "conv"]

CASES = {
    "lfm2": Case("lfm2", common(layer_types=MIXED, num_hidden_layers=3, block_multiple_of=16), modes=RECURRENT),
    "lfm2-bias": Case(
        "lfm2",
        common(
            full_attn_idxs=[1], num_hidden_layers=3, conv_bias=True, conv_L_cache=4, block_auto_adjust_ff_dim=False
        )
        | dict(tie_word_embeddings=False),
        modes=RECURRENT,
    ),
}
