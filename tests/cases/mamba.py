"""State space models."""

from tests.cases.case import RECURRENT, Case

MAMBA = dict(vocab_size=96, hidden_size=64, num_hidden_layers=2, state_size=8)
MAMBA2 = MAMBA | dict(num_heads=8, head_dim=16, n_groups=2, chunk_size=8)

CASES = {
    "falcon_mamba": Case("falcon_mamba", MAMBA | dict(mixer_rms_eps=1e-3, expand=1), modes=RECURRENT),
    "falcon_mamba-bias": Case(
        "falcon_mamba", MAMBA | dict(use_bias=True, tie_word_embeddings=False), modes=RECURRENT
    ),
    "mamba": Case("mamba", MAMBA, modes=RECURRENT),
    "mamba-bias": Case(
        "mamba",
        MAMBA
        | dict(use_bias=True, use_conv_bias=False, expand=1, time_step_rank=7, conv_kernel=3)
        | dict(tie_word_embeddings=False),
        modes=RECURRENT,
    ),
    "mamba2": Case("mamba2", MAMBA2, modes=RECURRENT),
    "mamba2-limits": Case(
        "mamba2",
        MAMBA2
        | dict(n_groups=1, use_bias=True, use_conv_bias=False, tie_word_embeddings=True, conv_kernel=3)
        | dict(time_step_limit=(0.6, 0.9)),
        modes=RECURRENT,
    ),
}
