"""What configs of single families say: old spellings, refused options, and options that change the layers."""

import re

import numpy as np
import pytest

from jaxllm.checkpoint.canonical import destination, skipped
from jaxllm.errors import ConfigError
from jaxllm.families import family, model_config

BASE = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-6,
    hidden_act="silu",
)


def read(model_type: str, context: int | None = None, **values):
    return model_config(family(model_type), BASE | {"model_type": model_type} | values, context=context)


def windows(config) -> list[int | None]:
    return [b.mixer.window for b in config.blocks]


def test_sliding_layers_follow_the_pattern_where_none_are_listed():
    gemma = dict(hidden_activation="gelu_pytorch_tanh", sliding_window=8, query_pre_attn_scalar=16)
    assert windows(read("gemma2", **gemma)) == [8, None] * 3
    assert windows(read("gemma3_text", **gemma, sliding_window_pattern=3)) == [8, 8, None] * 2
    assert windows(read("cohere2", sliding_window=8, sliding_window_pattern=2)) == [8, None] * 3
    assert windows(read("olmo3", sliding_window=8)) == [8, 8, 8, None, 8, 8]
    assert windows(read("exaone4", sliding_window=8, sliding_window_pattern=3)) == [8, 8, None] * 2


def test_qwen_slides_from_max_window_layers_on_and_only_when_asked():
    slides = dict(sliding_window=8, max_window_layers=4)
    assert windows(read("qwen2", **slides, use_sliding_window=True)) == [None] * 4 + [8, 8]
    assert windows(read("qwen2", **slides, use_sliding_window=False)) == [None] * 6


def test_listed_layers_win_over_a_pattern():
    kinds = ["full_attention", "sliding_attention"] * 3
    config = read("exaone4", sliding_window=8, sliding_window_pattern="LLLG", layer_types=kinds)
    assert windows(config) == [None, 8] * 3
    assert [b.mixer.rope is None for b in config.blocks] == [True, False] * 3


def test_old_and_new_spelling_of_rotary_parameters_agree():
    new = dict(
        full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
        sliding_attention=dict(rope_type="default", rope_theta=10000.0),
    )
    gemma = dict(hidden_activation="gelu_pytorch_tanh", sliding_window=8, head_dim=16)
    old = dict(rope_theta=1e6, rope_local_base_freq=10000.0, rope_scaling=dict(rope_type="linear", factor=8.0))
    assert read("gemma3_text", **gemma, **old) == read("gemma3_text", **gemma, rope_parameters=new)


def test_longrope_takes_the_long_factors_only_for_a_long_context():
    table = dict(type="su", short_factor=[1.0] * 8, long_factor=[4.0] * 8)
    values = dict(rope_scaling=table, original_max_position_embeddings=32)
    near, far = (read("phi3", context=n, **values) for n in (None, 128))
    assert (near.max_len, far.max_len) == (32, 128)
    ratio = np.array(near.blocks[0].mixer.rope.inv_freq) / np.array(far.blocks[0].mixer.rope.inv_freq)
    assert np.allclose(ratio, 4)


def test_baichuan_is_what_its_config_says():
    rotary = read("baichuan", num_key_value_heads=4)
    assert rotary.blocks[0].mixer.alibi is None
    assert not rotary.unit_head
    values = {k: v for k, v in BASE.items() if k not in ("max_position_embeddings", "num_key_value_heads")}
    values |= dict(model_max_length=64, z_loss_weight=0)
    sloped = model_config(family("baichuan"), values)
    assert sloped.blocks[0].mixer.rope is None
    assert (sloped.max_len, sloped.unit_head) == (64, True)
    assert sloped.blocks[0].mixer.alibi == (0.25, 0.0625, 0.015625, 0.00390625)


REFUSED = [
    ("gemma2", dict(layer_types=["chunked_attention"] * 6, hidden_activation="gelu"), "chunked_attention"),
    ("gemma", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    ("gemma3_text", dict(attn_logit_softcapping=50.0, hidden_activation="gelu"), "attn_logit_softcapping"),
    ("phi3", dict(rope_scaling=dict(type="longrope", short_factor=[1.0])), "a list of 8 numbers"),
    ("cohere2", dict(use_parallel_block=False), "use_parallel_block"),
    ("hunyuan_v1_dense", dict(use_cla=True), "use_cla"),
    ("minimind", dict(inference_rope_scaling=True), "inference_rope_scaling"),
    ("minimind", dict(use_moe=True, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=2), "n_shared"),
    ("deepseek", dict(n_routed_experts=4, num_experts_per_tok=2, scoring_func="sigmoid"), "scoring_func"),
    ("internlm", dict(rotary=dict(type="spiral")), "dynamic, origin"),
    ("smollm3", dict(no_rope_layers=[1, 0]), "a list of 6 entries"),
    ("llama4_text", dict(moe_layers=7, intermediate_size_mlp=96), "moe_layers should be a list"),
    ("chatglm", dict(multi_query_attention=False, padded_vocab_size=96), "multi_query_attention"),
    ("qwen", dict(no_bias=False, kv_channels=16), "no_bias"),
    ("granite", dict(logits_scaling=0), "do not fit together"),
    ("mimo", dict(attention_bias=False), "attention_bias"),
]


@pytest.mark.parametrize(("model_type", "values", "said"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_not_implemented_is_refused_by_name(model_type, values, said):
    with pytest.raises(ConfigError, match=said):
        read(model_type, **values)


def test_problems_inside_a_text_config_are_reported():
    text = BASE | dict(hidden_activation="gelu_pytorch_tanh", mystery=3, query_pre_attn_scalar="much")
    with pytest.raises(ConfigError) as error:
        model_config(family("gemma3"), dict(text_config=text, vision_config={}))
    assert re.search(r"mystery=\S+ is not understood", str(error.value))
    assert "query_pre_attn_scalar should be a finite number" in str(error.value)


@pytest.mark.parametrize("kind", ["gemma3", "llama4"])
def test_names_of_the_text_half_in_either_spelling(kind):
    values = BASE | dict(hidden_activation="gelu_pytorch_tanh", intermediate_size_mlp=96)
    values = values if kind == "gemma3" else {k: v for k, v in values.items() if k != "hidden_activation"}
    values = values if kind == "llama4" else {k: v for k, v in values.items() if k != "intermediate_size_mlp"}
    config = model_config(family(kind), dict(text_config=values))
    for stem in ("language_model.model", "model.language_model"):
        found = destination(f"{stem}.layers.3.self_attn.q_proj.weight", family(kind))
        assert found[1:] == ("layers.3.mixer.q", "w")
    for name in ("model.vision_tower.x.weight", "vision_model.y.bias", "multi_modal_projector.linear_1.weight"):
        assert skipped(name, config, family(kind))
