"""Llama 4: chunked attention with rotary, every fourth layer global without; experts whose input is weighed."""

from __future__ import annotations

from jaxllm.config import MLP, Attention, Block, ModelConfig, MoE, Norm, QKNorm, QueryScale
from jaxllm.families.base import Family, Rule, Sizes, attention, decoder, layer_types, sizes
from jaxllm.families.fields import Fields
from jaxllm.families.gemma import PROJECTORS
from jaxllm.families.layouts import stacked_down, turned_gate_up
from jaxllm.families.names import LLAMA, L
from jaxllm.families.rope import rope


def llama4_text(c: Fields) -> ModelConfig:
    s = sizes(c, head_dim=c.int("head_dim", 128))
    c.skip("router_jitter_noise|for_llm_compressor|cache_implementation")
    every = c.int("no_rope_layer_interval", 4)
    usual = [int((i + 1) % every != 0) for i in range(s.layers)]
    positions = c.raw("no_rope_layers") and c.items("no_rope_layers", s.layers)
    mixers = _mixers(c, s, positions or usual)
    expert = MoE(
        c.int("num_local_experts", 16),
        c.int("num_experts_per_tok", 1),
        s.hidden,
        s.act,
        score="sigmoid",
        shared=s.hidden,
        weigh="input",
    )
    mlp = MLP(c.int("intermediate_size_mlp", 16384), s.act)
    step = c.int("interleave_moe_layer_step", 1)
    sparse = set(c.items("moe_layers", default=list(range(step - 1, s.layers, step))))
    return decoder(c, s, lambda i: Block(mixers[i], expert if i in sparse else mlp, s.norm))


def _mixers(c: Fields, s: Sizes, positions: list[int]) -> list[Attention]:
    """Layers with positions are rotated, then normed; the others let queries grow with their position."""
    kinds = ["chunked_attention" if turned else "full_attention" for turned in positions]
    kinds = kinds if c.raw("layer_types") is None else layer_types(c, s)
    bias, chunk = c.flag("attention_bias", False), c.int("attention_chunk_size", None)
    table = rope(c, s.head_dim, theta=500000.0)
    # The norm has no weights: ones are supplied.
    qk_norm = QKNorm(Norm("rms", s.norm.eps), "head", after_rope=True) if c.flag("use_qk_norm", True) else None
    growth = QueryScale(c.number("floor_scale", 8192), c.number("attn_scale", 0.1))
    growth = growth if c.raw("attn_temperature_tuning", True) else None

    def mixer(i: int) -> Attention:
        place = dict(rope=table, qk_norm=qk_norm) if positions[i] else dict(query_scale=growth)
        see = chunk if kinds[i] == "chunked_attention" else None
        return attention(s, qkv_bias=bias, out_bias=bias, chunk=see, **place)

    return [mixer(i) for i in range(s.layers)]


def llama4(c: Fields) -> ModelConfig:
    """The text half of the multimodal Llama 4."""
    c.skip("vision_config|boi_token_index|eoi_token_index")
    return llama4_text(c.section("text_config", {"tie_word_embeddings": c.flag("tie_word_embeddings", False)}))


LLAMA4 = (
    Rule(L + r"feed_forward\.router", r"layers.\1.ffn.router"),
    Rule(L + r"feed_forward\.experts\.gate_up_proj", r"layers.\1.ffn", turned_gate_up),
    Rule(L + r"feed_forward\.experts\.down_proj", r"layers.\1.ffn", stacked_down),
    Rule(L + r"feed_forward\.shared_expert\.(gate|up|down)_proj", r"layers.\1.ffn.shared.\2"),
    Rule(L + r"feed_forward\.(gate|up|down)_proj", r"layers.\1.ffn.\2"),
    *LLAMA,
)
QK_NORMS = r".*\.[qk]_norm\.w"

FAMILIES = {
    "llama4_text": Family(llama4_text, LLAMA4, interleaved=True, unit_norm=QK_NORMS),
    "llama4": Family(
        llama4, LLAMA4, interleaved=True, unit_norm=QK_NORMS, inside="language_model.", skip=PROJECTORS
    ),
}
