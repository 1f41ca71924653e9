"""Gemma 1 to 3, and Gemma 3 with its vision half."""

from tests.cases.case import Case
from tests.convert import convert, old_spelling
from tests.tiny import common

TEXT = dict(head_dim=32, sliding_window=8, query_pre_attn_scalar=24, num_hidden_layers=6)
SHORT = dict(num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
LINEAR = dict(
    full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
    sliding_attention=dict(rope_type="default", rope_theta=10000.0),
)
VISION = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
    vision_use_head=False,
)


def old_gemma3(old: dict) -> dict:
    """The spelling of the first files: two bases, one scaling, and a pattern for the layers."""
    gone = ("rope_parameters", "layer_types", "dtype", "_sliding_window_pattern")
    return {k: v for k, v in old.items() if k not in gone} | dict(
        rope_theta=1e6,
        rope_local_base_freq=10000.0,
        rope_scaling=dict(factor=8.0, rope_type="linear"),
        sliding_window_pattern=6,
    )


def old_names(tensors: dict) -> dict:
    """language_model.model.layers.. where transformers now writes model.language_model.layers.."""
    moved = {k.replace("model.language_model.", "language_model.model.", 1): v for k, v in tensors.items()}
    return {k.removeprefix("model.") if "vision" in k or "projector" in k else k: v for k, v in moved.items()}


def wrapped(**text) -> dict:
    return dict(
        text_config=common(**(TEXT | dict(rope_parameters=LINEAR) | text)),
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    )


CASES = {
    "gemma": Case("gemma", common(head_dim=32)),
    "gemma-old": Case(
        "gemma",
        common(head_dim=16, attention_bias=True, tie_word_embeddings=False),
        convert=old_spelling(lambda old: dict(hidden_act="gelu")),
    ),
    "gemma2": Case("gemma2", common(**TEXT | dict(num_hidden_layers=3))),
    "gemma2-plain": Case(
        "gemma2",
        common(head_dim=16, sliding_window=64, attn_logit_softcapping=None, final_logit_softcapping=None),
    ),
    "gemma2-old": Case("gemma2", common(**TEXT | dict(num_hidden_layers=3)), convert=old_spelling()),
    "gemma3_text": Case("gemma3_text", common(**TEXT | dict(num_hidden_layers=7))),
    "gemma3_text-capped": Case(
        "gemma3_text",
        common(**TEXT | SHORT, rope_parameters=LINEAR, final_logit_softcapping=3.0),
    ),
    "gemma3_text-old": Case("gemma3_text", common(**TEXT, rope_parameters=LINEAR), convert=convert(old_gemma3)),
    "gemma3": Case("gemma3", wrapped(**SHORT)),
    "gemma3-old": Case(
        "gemma3",
        wrapped(num_attention_heads=8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256),
        convert=convert(
            lambda old: (
                old
                | dict(
                    text_config={
                        k: v
                        for k, v in old_gemma3(old["text_config"]).items()
                        if k in ("hidden_size", "intermediate_size", "num_hidden_layers", "rope_scaling")
                        or k in ("sliding_window", "vocab_size", "model_type")
                    }
                )
            ),
            tensors=old_names,
        ),
    ),
}
