"""Qwen3-Next."""

from tests.cases.case import RECURRENT, Case
from tests.tiny import common

# With a small eps the norm of a memory that holds next to nothing magnifies rounding: in f64, one unit in the last
# place of an f32 embedding moved a logit by 7e-5.
NEXT = common(
    num_hidden_layers=4,
    rms_norm_eps=1e-3,
    head_dim=32,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=12,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    shared_expert_intermediate_size=40,
)


def predictor(folder) -> None:
    """Add to a saved folder a tensor of the part that predicts further tokens."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    (path,) = folder.glob("*.safetensors")
    extra = {"mtp.fc.weight": np.ones((64, 128), np.float32)}
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})


CASES = {
    "qwen3_next": Case("qwen3_next", NEXT, modes=RECURRENT, convert=predictor),
    "qwen3_next-dense": Case(
        "qwen3_next",
        NEXT
        | dict(layer_types=["full_attention", "linear_attention"] * 2, mlp_only_layers=[1], attention_bias=True)
        | dict(linear_num_value_heads=2, linear_conv_kernel_dim=3, norm_topk_prob=False),
        modes=RECURRENT,
    ),
}
