"""Gemma: norm weights stored as w - 1, embeddings scaled by the square root of the width."""

from __future__ import annotations

from jaxllm.config import Block, ModelConfig, QKNorm, Rope
from jaxllm.families.base import ACTIVATIONS, NORMS, Family, Sizes, attention, decoder, dense, sizes, windows
from jaxllm.families.fields import Fields
from jaxllm.families.names import LLAMA, SANDWICH
from jaxllm.families.rope import rope, ropes

# What a text_config inside Gemma 3 leaves out where it is the usual.
GEMMA3 = dict(
    vocab_size=262208,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    max_position_embeddings=131072,
    rms_norm_eps=1e-6,
)
PROJECTORS = (r"(?:model\.)?(?:vision_tower|vision_model|multi_modal_projector)\..*",)


def _sizes(c: Fields) -> Sizes:
    """Old files say gelu and mean its tanh approximation."""
    c.expect("use_bidirectional_attention", False)
    act = c.choice("hidden_activation|hidden_act", ACTIVATIONS | {"gelu": "gelu_tanh"})
    return sizes(c, act=act, tied=True, head_dim=c.int("head_dim", 256))


def gemma(c: Fields) -> ModelConfig:
    s = _sizes(c)
    c.skip("hidden_act")
    bias = c.flag("attention_bias", False)
    mixer = attention(s, rope=rope(c, s.head_dim), qkv_bias=bias, out_bias=bias)
    return decoder(c, s, Block(mixer, dense(s), s.norm), embed_scale=s.width**0.5)


def gemma2(c: Fields) -> ModelConfig:
    """Every second layer slides; attention scores and logits are softly capped."""
    s = _sizes(c)
    table = rope(c, s.head_dim)
    caps = [_cap(c, "attn_logit_softcapping", 50.0), _cap(c, "final_logit_softcapping", 30.0)]
    return _sandwich(c, s, windows(c, s, every=2, width=4096), [table] * s.layers, caps)


def gemma3_text(c: Fields) -> ModelConfig:
    """Five of six layers slide, with their own rotary base; queries and keys are normed."""
    s = _sizes(c)
    c.skip("_sliding_window_pattern")
    window = windows(c, s, every=c.int("sliding_window_pattern", 6), width=4096)
    table = ropes(c, s.head_dim, theta=1e6, local="rope_local_base_freq", local_theta=10000.0)
    turned = [table["sliding_attention" if w else "full_attention"] for w in window]
    c.expect("attn_logit_softcapping")  # transformers reads the field and then leaves the scores alone
    caps = [None, c.number("final_logit_softcapping", None)]
    return _sandwich(c, s, window, turned, caps, QKNorm(s.norm, "head"))


def gemma3(c: Fields) -> ModelConfig:
    """The text half of the multimodal Gemma 3."""
    c.skip("vision_config|mm_tokens_per_image|boi_token_index|eoi_token_index")
    text = c.section("text_config", GEMMA3 | {"tie_word_embeddings": c.flag("tie_word_embeddings", True)})
    return gemma3_text(text)


def _sandwich(
    c: Fields,
    s: Sizes,
    window: list[int | None],
    turned: list[Rope],
    caps: list[float | None],
    qk_norm: QKNorm | None = None,
) -> ModelConfig:
    c.skip("hidden_act|sliding_window_pattern|cache_implementation")
    bias = c.flag("attention_bias", False)
    scale = c.number("query_pre_attn_scalar", 256) ** -0.5
    usual = dict(scale=scale, qk_norm=qk_norm, qkv_bias=bias, out_bias=bias, softcap=caps[0])
    mlp = dense(s)

    def layer(i: int) -> Block:
        mixer = attention(s, rope=turned[i], window=window[i], **usual)
        return Block(mixer, mlp, s.norm, post=True)

    return decoder(c, s, layer, embed_scale=s.width**0.5, logit_softcap=caps[1])


def _cap(c: Fields, name: str, usual: float) -> float | None:
    """null means none, an absent field the usual."""
    return c.number(name, None if name in c.values else usual)


FAMILIES = {
    "gemma": Family(gemma, LLAMA, one_plus=NORMS),
    "gemma2": Family(gemma2, (*SANDWICH, *LLAMA), one_plus=NORMS),
    "gemma3_text": Family(gemma3_text, (*SANDWICH, *LLAMA), one_plus=NORMS),
    "gemma3": Family(gemma3, (*SANDWICH, *LLAMA), one_plus=NORMS, inside="language_model.", skip=PROJECTORS),
}
