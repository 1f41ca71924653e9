"""Options of the GPT, expert and recurrent families: defaults, old spellings, slopes and refusals."""

import math

import numpy as np
import pytest

from jaxllm.checkpoint.canonical import skipped
from jaxllm.config import DeltaNet, Mamba
from jaxllm.errors import ConfigError
from jaxllm.families import family, model_config
from jaxllm.families.rope import slopes

GPT2 = dict(vocab_size=96, n_embd=64, n_layer=4, n_head=4, n_positions=128, activation_function="gelu_new")
BASE = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=128,
    hidden_act="silu",
)
OPT = BASE | dict(activation_function="relu", ffn_dim=96)
MPT = dict(vocab_size=96, d_model=64, n_heads=4, n_layers=3, max_seq_len=128)
MOE = BASE | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
LATENT = BASE | dict(
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    kv_lora_rank=24,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=20,
)
MAMBA = dict(vocab_size=96, hidden_size=64, num_hidden_layers=3, state_size=8)


def read(model_type: str, values: dict, **changes):
    return model_config(family(model_type), {"model_type": model_type} | values | changes)


def rotated(config) -> int:
    return config.blocks[-1].mixer.rope.dims


@pytest.mark.parametrize("heads", [4, 6, 12])
@pytest.mark.parametrize("most", [8, 16])
def test_slopes_are_those_of_mpt(heads, most):
    pytest.importorskip("torch")
    mpt = pytest.importorskip("transformers.models.mpt.modeling_mpt")
    want = mpt.build_mpt_alibi_tensor(heads, 2, most)[:, 0].numpy()  # at distances -1 and 0
    np.testing.assert_allclose(slopes(heads, exponent=most), -want[:, 0], rtol=1e-6)
    config = read("mpt", MPT, d_model=8 * heads, n_heads=heads, attn_config=dict(alibi_bias_max=most))
    assert config.blocks[0].mixer.alibi == slopes(heads, exponent=most)


def test_gpt2_scales_fall_with_the_layer_where_asked():
    config = read("gpt2", GPT2, scale_attn_by_inverse_layer_idx=True)
    assert [b.mixer.scale for b in config.blocks] == [0.25, 0.125, 0.25 / 3, 0.0625]


@pytest.mark.parametrize(
    ("model_type", "share"),
    [("phi", 0.5), ("nemotron", 0.5), ("persimmon", 0.5), ("gpt_neox", 0.25), ("stablelm", 0.25)],
)
def test_part_of_a_head_is_rotated_where_the_config_does_not_say(model_type, share):
    assert rotated(read(model_type, BASE)) == 16 * share
    assert rotated(read(model_type, BASE, partial_rotary_factor=0.75)) == 12
    new = dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.75)
    assert rotated(read(model_type, BASE, rope_parameters=new)) == 12


def test_neox_in_old_and_new_spelling():
    new = dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.5)
    old = read("gpt_neox", BASE, rotary_pct=0.5, rotary_emb_base=500)
    assert old == read("gpt_neox", BASE, rope_parameters=new)


def test_falcon_wirings():
    falcon = dict(vocab_size=96, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
    new = dict(new_decoder_architecture=True, num_kv_heads=2)
    for changes, kv_heads, wiring in (
        ({}, 1, "shared"),
        (dict(multi_query=False, parallel_attn=False), 4, None),
        (new, 2, "split"),
        (new | dict(num_ln_in_parallel_attn=1), 2, "shared"),
    ):
        block = read("falcon", falcon, **changes).blocks[0]
        assert (block.mixer.kv_heads, block.parallel) == (kv_heads, wiring)


def test_gpt_oss_without_rotary_parameters_is_yarn():
    values = {k: v for k, v in MOE.items() if k != "moe_intermediate_size"}
    yarn = dict(rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False)
    yarn |= dict(original_max_position_embeddings=4096, rope_theta=150000.0)
    config = read("gpt_oss", values)
    assert config == read("gpt_oss", values, rope_parameters=yarn)
    assert [b.mixer.window for b in config.blocks] == [128, None, 128, None]


def test_qwen2_moe_slides_on_every_second_early_layer_and_only_when_asked():
    slides = dict(sliding_window=8, max_window_layers=3)
    windows = lambda c: [b.mixer.window for b in c.blocks]
    assert windows(read("qwen2_moe", MOE, **slides, use_sliding_window=True)) == [8, None, 8, None]
    assert windows(read("qwen2_moe", MOE, **slides)) == [None] * 4


def test_deepseek_scale_grows_by_the_square_of_mscale():
    yarn = dict(type="yarn", factor=40, mscale=1.0, mscale_all_dim=1.0, original_max_position_embeddings=16)
    plain, grown = read("deepseek_v3", LATENT), read("deepseek_v3", LATENT, rope_scaling=yarn)
    ratio = grown.blocks[0].mixer.scale / plain.blocks[0].mixer.scale
    assert ratio == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    assert grown.blocks[0].mixer.rope.amplitude == 1.0


def test_layers_past_the_last_are_left_out_only_where_a_family_predicts_further():
    name = "model.layers.4.self_attn.o_proj.weight"
    deepseek, mixtral = read("deepseek_v3", LATENT), read("mixtral", MOE)
    assert skipped(name, deepseek, family("deepseek_v3"))
    assert not skipped(name.replace("4", "3"), deepseek, family("deepseek_v3"))
    assert not skipped(name, mixtral, family("mixtral"))


def test_every_fourth_layer_of_qwen3_next_attends():
    config = read("qwen3_next", MOE, num_key_value_heads=2)
    assert [isinstance(b.mixer, DeltaNet) for b in config.blocks] == [True, True, True, False]
    config = read("qwen3_next", MOE, num_key_value_heads=2, full_attention_interval=2)
    assert [isinstance(b.mixer, DeltaNet) for b in config.blocks] == [True, False] * 2


@pytest.mark.parametrize("limit", [[0.0, math.inf], [0.0, "Infinity"], [0.0, None], {}])
def test_spellings_of_no_limit(limit):
    values = MAMBA | dict(num_heads=8, head_dim=16, n_groups=2)
    given = dict(time_step_limit=limit) if limit else {}
    assert read("mamba2", values, **given).blocks[0].mixer.dt_limit == (0.0, math.inf)


def test_rank_of_the_time_step():
    ranks = [
        read("mamba", MAMBA, **r).blocks[0].mixer
        for r in ({}, dict(time_step_rank="auto"), dict(time_step_rank=9))
    ]
    assert all(isinstance(m, Mamba) for m in ranks)
    assert [m.dt_rank for m in ranks] == [4, 4, 9]


REFUSED = [
    ("opt", OPT | dict(do_layer_norm_before=False), "do_layer_norm_before"),
    ("opt", OPT | dict(word_embed_proj_dim=32), "projected embeddings are not implemented"),
    ("opt", OPT | dict(_remove_final_layer_norm=True), "_remove_final_layer_norm"),
    ("mpt", MPT | dict(attn_config=dict(qk_ln=True)), "qk_ln"),
    ("mpt", MPT | dict(attn_config=dict(alibi=False)), "alibi"),
    ("mpt", MPT | dict(attn_config=dict(mystery=1)), "mystery=1 is not understood"),
    ("mpt", MPT | dict(no_bias=False), "no_bias"),
    ("gptj", GPT2 | dict(rotary=False), "rotary"),
    ("bloom", BASE | dict(apply_residual_connection_post_layernorm=True), "apply_residual_connection"),
    ("mixtral", MOE | dict(num_experts_per_tok=5), "5 of 4 experts cannot be chosen"),
    ("phimoe", MOE | dict(num_experts_per_tok=3), "num_experts_per_tok"),
    ("gpt_oss", MOE | dict(swiglu_limit=5.0), "swiglu_limit"),
    ("deepseek_v2", LATENT | dict(norm_topk_prob=True), "norm_topk_prob"),
    ("deepseek_v2", LATENT | dict(topk_method="noaux_tc"), "group_limited_greedy"),
    ("deepseek_v3", LATENT | dict(n_group=3, topk_group=2), "n_group=3"),
    ("deepseek_v3", LATENT | dict(rope_interleave=False), "rope_interleave"),
    ("mamba", MAMBA | dict(hidden_act="gelu"), "hidden_act"),
    ("mamba2", MAMBA | dict(num_heads=7, n_groups=1), "7 heads of 64"),
    ("mamba2", MAMBA | dict(num_heads=2, n_groups=1, time_step_limit=["much", 1]), "time_step_limit"),
    ("qwen3_next", MOE | dict(layer_types=["other"] * 4), "'other'"),
    ("qwen3_next", MOE | dict(linear_num_value_heads=5, linear_num_key_heads=2), "evenly"),
]


@pytest.mark.parametrize(("model_type", "values", "said"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_not_implemented_is_refused_by_name(model_type, values, said):
    with pytest.raises(ConfigError, match=said):
        read(model_type, values)
