"""GPT-2 and what followed it with LayerNorm."""

from tests.cases.case import Case
from tests.tiny import common

GPT2 = dict(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=128)
OPT = dict(
    vocab_size=96,
    hidden_size=64,
    ffn_dim=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
)
MPT = dict(vocab_size=96, d_model=64, n_heads=4, n_layers=2, max_seq_len=128)

CASES = {
    "gpt2": Case("gpt2", GPT2),
    "gpt2-relu": Case("gpt2", GPT2 | dict(activation_function="relu", n_inner=80)),
    "gpt2-scales": Case("gpt2", GPT2 | dict(scale_attn_by_inverse_layer_idx=True, n_layer=3)),
    "gpt2-unscaled": Case("gpt2", GPT2 | dict(scale_attn_weights=False, tie_word_embeddings=False)),
    "gpt_bigcode": Case("gpt_bigcode", GPT2),
    "gpt_bigcode-mha": Case("gpt_bigcode", GPT2 | dict(multi_query=False)),
    "gptj": Case("gptj", GPT2 | dict(rotary_dim=8)),
    "gptj-full": Case("gptj", GPT2 | dict(rotary_dim=16, n_inner=80)),
    "codegen": Case("codegen", GPT2 | dict(rotary_dim=8)),
    "codegen-heads": Case("codegen", GPT2 | dict(rotary_dim=4, n_head=8, activation_function="relu")),
    "opt": Case("opt", OPT),
    "opt-nobias": Case("opt", OPT | dict(enable_bias=False, activation_function="gelu")),
    "mpt": Case("mpt", MPT),
    "mpt-clip": Case(
        "mpt",
        MPT | dict(d_model=60, n_heads=6, attn_config=dict(clip_qkv=0.5, softmax_scale=0.2)),
    ),
    "starcoder2": Case("starcoder2", common(sliding_window=None)),
    "starcoder2-window": Case("starcoder2", common(sliding_window=8, use_bias=False, tie_word_embeddings=False)),
    "phi": Case("phi", common(num_key_value_heads=4, partial_rotary_factor=0.5)),
    "phi-qknorm": Case("phi", common(qk_layernorm=True, partial_rotary_factor=0.4)),
    "nemotron": Case("nemotron", common()),
    "nemotron-bias": Case("nemotron", common(attention_bias=True, mlp_bias=True, head_dim=32)),
    "stablelm": Case("stablelm", common(use_qkv_bias=True)),
    "stablelm-parallel": Case(
        "stablelm", common(use_parallel_residual=True, qk_layernorm=True, partial_rotary_factor=0.5)
    ),
}
