"""Llama 4, its text model alone and inside the multimodal one."""

from tests.cases.case import Case
from tests.cases.llama import LLAMA3
from tests.convert import convert
from tests.tiny import common

TEXT = dict(
    head_dim=16,
    intermediate_size=48,
    intermediate_size_mlp=96,
    num_local_experts=4,
    attention_chunk_size=8,
    floor_scale=4,
    attn_scale=0.5,
    num_hidden_layers=4,
)
VISION = dict(
    hidden_size=16,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
    vision_output_dim=16,
    projector_input_dim=16,
    projector_output_dim=16,
)


def old_text(old: dict) -> dict:
    """rope_theta and rope_scaling at the top, and no list of layers."""
    r = dict(old["rope_parameters"])
    gone = ("rope_parameters", "layer_types", "moe_layers", "no_rope_layers", "dtype")
    kept = {k: v for k, v in old.items() if k not in gone}
    return kept | dict(rope_theta=r.pop("rope_theta"), rope_scaling=r, no_rope_layers=[], torch_dtype="bfloat16")


CASES = {
    "llama4_text": Case("llama4_text", common(**TEXT)),
    "llama4_text-mixed": Case(
        "llama4_text",
        common(
            **TEXT | dict(attn_temperature_tuning=False, num_local_experts=6),
            num_experts_per_tok=2,
            interleave_moe_layer_step=2,
            no_rope_layer_interval=3,
            use_qk_norm=False,
            attention_bias=True,
            rope_parameters=LLAMA3,
        ),
    ),
    "llama4_text-old": Case(
        "llama4_text",
        common(**TEXT, interleave_moe_layer_step=2, rope_parameters=LLAMA3, tie_word_embeddings=True),
        convert=convert(old_text),
    ),
    "llama4": Case(
        "llama4",
        dict(
            text_config=common(**TEXT | dict(num_hidden_layers=2), no_rope_layer_interval=2),
            vision_config=VISION,
            boi_token_index=91,
            eoi_token_index=92,
        ),
    ),
}
