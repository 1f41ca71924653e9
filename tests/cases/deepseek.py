"""DeepSeek's latent attention and router, and GLM's use of the router."""

from tests.cases.case import Case
from tests.tiny import common

ROUTER = dict(
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    first_k_dense_replace=1,
    num_hidden_layers=3,
    routed_scaling_factor=1.5,
)
LATENT = ROUTER | dict(
    num_key_value_heads=4,
    q_lora_rank=32,
    kv_lora_rank=24,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=20,
)
GROUPS = dict(n_group=4, topk_group=2)
YARN = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=8.0,
    beta_fast=32,
    beta_slow=1,
    original_max_position_embeddings=16,
)


def extra_layer(folder) -> None:
    """Add to a saved folder the layer that predicts a further token, as the hub's files have it."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    copied = {n.replace(".layers.2.", ".layers.3."): x for n, x in tensors.items() if ".layers.2." in n}
    for name in ("enorm", "hnorm", "eh_proj", "shared_head.head"):
        copied[f"model.layers.3.{name}.weight"] = np.ones((64, 128), np.float32)
    save_file(tensors | copied, path, metadata={"format": "pt"})


CASES = {
    "deepseek_v2": Case("deepseek_v2", common(**LATENT, topk_method="greedy")),
    "deepseek_v2-groups": Case(
        "deepseek_v2",
        common(
            **(LATENT | GROUPS | dict(q_lora_rank=None)),
            topk_method="group_limited_greedy",
            rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=0.7),
        ),
    ),
    "deepseek_v3": Case("deepseek_v3", common(**LATENT, **GROUPS)),
    "deepseek_v3-yarn": Case(
        "deepseek_v3",
        common(
            **(LATENT | GROUPS | dict(q_lora_rank=None, attention_bias=True, norm_topk_prob=False)),
            rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.8),
        ),
    ),
    "deepseek_v3-further": Case("deepseek_v3", common(**LATENT, n_group=1, topk_group=1), convert=extra_layer),
    "glm4_moe": Case("glm4_moe", common(**ROUTER, n_group=1, topk_group=1)),
    "glm4_moe-norm": Case(
        "glm4_moe", common(**ROUTER, **GROUPS, use_qk_norm=True, attention_bias=True, head_dim=32)
    ),
}
