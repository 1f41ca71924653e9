"""Llama and its near relatives."""

from tests.cases.case import Case
from tests.tiny import common

LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)

CASES = {
    "llama": Case("llama", common(rope_parameters=LLAMA3)),
    "llama-bias": Case("llama", common(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=32)),
    "mistral": Case("mistral", common(sliding_window=8, head_dim=32)),
    "mistral-full": Case("mistral", common(sliding_window=None, num_key_value_heads=4)),
    "qwen2": Case("qwen2", common()),
    "qwen2-tied": Case("qwen2", common(tie_word_embeddings=True, num_key_value_heads=1)),
    "qwen3": Case("qwen3", common(head_dim=32)),
    "qwen3-bias": Case("qwen3", common(attention_bias=True, tie_word_embeddings=True)),
}
