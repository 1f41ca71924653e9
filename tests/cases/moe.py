"""Routed experts around a Llama-like attention."""

from tests.cases.case import Case
from tests.tiny import common

LOCAL = dict(num_local_experts=4, num_experts_per_tok=2)
OWN = dict(num_experts=4, num_experts_per_tok=2)
SMALL = OWN | dict(moe_intermediate_size=48)
ALTERNATE = ["sliding_attention", "full_attention", "sliding_attention"]
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0 + 0.1 * i for i in range(8)],
    long_factor=[2.0 + 0.1 * i for i in range(8)],
    short_mscale=1.1,
    long_mscale=1.3,
    original_max_position_embeddings=64,
)

CASES = {
    "mixtral": Case("mixtral", common(**LOCAL)),
    "mixtral-window": Case("mixtral", common(**LOCAL, sliding_window=8, head_dim=32, tie_word_embeddings=True)),
    "olmoe": Case("olmoe", common(**OWN)),
    # Every expert chosen: a choice that flips in bf16 would hide what clipping does.
    "olmoe-clip": Case("olmoe", common(num_experts=4, num_experts_per_tok=4, clip_qkv=0.5, norm_topk_prob=True)),
    "qwen2_moe": Case("qwen2_moe", common(**SMALL, shared_expert_intermediate_size=80)),
    "qwen2_moe-window": Case(
        "qwen2_moe",
        common(
            **SMALL,
            shared_expert_intermediate_size=80,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=2,
            mlp_only_layers=[1],
            num_hidden_layers=3,
            norm_topk_prob=True,
            qkv_bias=False,
        ),
    ),
    "qwen3_moe": Case("qwen3_moe", common(**SMALL, head_dim=32, decoder_sparse_step=2, num_hidden_layers=3)),
    "qwen3_moe-renorm": Case(
        "qwen3_moe",
        common(**SMALL, norm_topk_prob=True, use_sliding_window=True, sliding_window=8, attention_bias=True),
    ),
    "granitemoe": Case("granitemoe", common(**LOCAL)),
    "granitemoe-scales": Case(
        "granitemoe",
        common(
            **LOCAL,
            embedding_multiplier=3.0,
            residual_multiplier=0.5,
            attention_multiplier=0.2,
            logits_scaling=2.0,
            attention_bias=True,
            tie_word_embeddings=True,
        ),
    ),
    "phimoe": Case("phimoe", common(**LOCAL, router_jitter_noise=0.2)),
    "phimoe-bias": Case(  # with the default threshold of 0.01, a rounding in bf16 changes which experts count
        "phimoe",
        common(**LOCAL, router_jitter_noise=0.1, attention_bias=True, lm_head_bias=True, rope_parameters=LONGROPE),
    ),
    "gpt_oss": Case(
        "gpt_oss", common(**LOCAL, head_dim=16, sliding_window=8, layer_types=ALTERNATE, num_hidden_layers=3)
    ),
    "gpt_oss-many": Case(
        "gpt_oss", common(num_local_experts=8, num_experts_per_tok=3, head_dim=32, sliding_window=4)
    ),
}
