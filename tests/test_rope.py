"""Rotary tables against published values and against transformers, in both spellings of a config."""

import json

import numpy as np
import pytest

from jaxllm.config import Rope
from jaxllm.errors import ConfigError
from jaxllm.families.fields import Fields
from jaxllm.families.rope import rope

HEAD_DIM, LONGEST = 64, 4096


def table(values: dict, *, head_dim: int = HEAD_DIM, context: int | None = None) -> Rope:
    """The table of a config with these fields, none of which may be a problem."""
    c = Fields(values, context=context)
    found = rope(c, head_dim)
    assert c.problems == []
    return found


# ---- published --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more", "context", "amplitude"),
    [
        ("dynamic", {}, 16384, 1.0),
        ("yarn", dict(beta_fast=32, beta_slow=1), None, 0.1 * np.log(10) + 1),
        ("llama3", dict(low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=2048), None, 1.0),
    ],
)
def test_published_frequencies(shared, kind, more, context, amplitude):
    """Five significant digits of transformers' own tests: factor 10 over 2048 positions, heads of 128."""
    cases = json.loads((shared / "ref_suites" / "rope_scaling_vectors.json").read_text())["cases"]
    case = cases[kind]
    assert all(case["params"].get(k) == v for k, v in more.items())
    scaling = dict(rope_type=kind, factor=10.0, **more)
    values = dict(rope_theta=10000.0, rope_scaling=scaling, max_position_embeddings=2048)
    got = table(values, head_dim=128, context=context)
    printed = [float(f"{f:.4e}") for f in got.inv_freq]
    np.testing.assert_allclose(printed, case["published_inv_freq"], rtol=1.01e-5)
    assert got.amplitude == pytest.approx(amplitude)
    assert got.dims == 128


# ---- against transformers ---------------------------------------------------------------------------------


def pick(rng, name: str) -> dict:
    """Random parameters of a scheme."""
    factor = float(rng.uniform(1.5, 16))
    original = int(rng.choice([256, 512, 1024]))
    factors = lambda: rng.uniform(1, 8, HEAD_DIM // 2).tolist()
    return {
        "default": dict(),
        "linear": dict(factor=factor),
        "dynamic": dict(factor=factor),
        "llama3": dict(
            factor=factor,
            low_freq_factor=float(rng.uniform(0.5, 2)),
            high_freq_factor=float(rng.uniform(3, 8)),
            original_max_position_embeddings=original,
        ),
        "yarn": dict(
            factor=factor,
            beta_fast=float(rng.uniform(16, 48)),
            beta_slow=float(rng.uniform(0.5, 2)),
            original_max_position_embeddings=original,
        ),
        "longrope": dict(
            short_factor=factors(), long_factor=factors(), original_max_position_embeddings=original, factor=factor
        ),
    }[name]


VARIANTS = [
    ("default", {}),
    ("linear", {}),
    ("dynamic", {}),
    ("llama3", {}),
    ("yarn", {}),
    ("yarn", dict(attention_factor=1.25)),
    ("yarn", dict(mscale=0.7, mscale_all_dim=1.3)),
    ("yarn", dict(mscale=0.7)),
    ("yarn", dict(truncate=False)),
    ("yarn", dict(factor=None)),
    ("yarn", dict(factor=1.0)),
    ("yarn", dict(beta_fast=None, beta_slow=None)),
    ("yarn", dict(original_max_position_embeddings=None)),
    ("llama3", dict(original_max_position_embeddings=None)),
    ("longrope", {}),
    ("longrope", dict(attention_factor=1.1)),
    ("longrope", dict(factor=None)),
    ("longrope", dict(factor=0.5)),
]


def theirs(name: str, parameters: dict, context: int | None) -> tuple[np.ndarray, float]:
    """transformers' table; `parameters` in its new spelling."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        head_dim=HEAD_DIM, max_position_embeddings=LONGEST, rope_parameters=dict(parameters)
    )
    if name == "default":
        freq, amplitude = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        freq, amplitude = ROPE_INIT_FUNCTIONS[name](config, "cpu", seq_len=context)
    return freq.numpy(), float(amplitude)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("partial", [None, 0.5])
@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=str)
def test_transformers(name, changes, partial, seed):
    if partial and name == "default":
        pytest.skip("transformers has no one function for it")
    rng = np.random.default_rng(seed)
    theta = float(10 ** rng.uniform(3.5, 6))
    own = {k: v for k, v in (pick(rng, name) | changes).items() if v is not None or k == "factor"}
    if partial and name == "longrope":
        own |= {k: own[k][: HEAD_DIM // 4] for k in ("short_factor", "long_factor")}
    turned = {} if partial is None else dict(partial_rotary_factor=partial)
    for context in {"dynamic": (None, 2 * LONGEST), "longrope": (None, 3000)}.get(name, (None,)):
        freq, amplitude = theirs(name, dict(rope_type=name, rope_theta=theta, **own, **turned), context)
        common = dict(max_position_embeddings=LONGEST)
        new = common | dict(rope_parameters=dict(rope_type=name, rope_theta=theta, **own, **turned))
        old = common | turned | dict(rope_theta=theta, rope_scaling=dict(type=name, **own))
        for spelling in (new, old):
            got = table(spelling, context=context)
            np.testing.assert_allclose(got.inv_freq, freq, rtol=1e-5, atol=1e-12)
            assert got.amplitude == pytest.approx(amplitude, rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_the_original_length_beside_the_parameters():
    """Where a config says it twice, the field beside rope_scaling counts, as with transformers."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    factors = dict(short_factor=[1.5] * 32, long_factor=[4.0] * 32)
    values = dict(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=LONGEST,
        original_max_position_embeddings=512,
        rope_theta=10000.0,
        rope_scaling=dict(type="longrope", original_max_position_embeddings=1024, **factors),
    )
    config = transformers.Phi3Config(**json.loads(json.dumps(values)), pad_token_id=0)
    for context in (None, 700):
        freq, amplitude = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=context)
        got = table(values, context=context)
        np.testing.assert_allclose(got.inv_freq, freq.numpy(), rtol=1e-5)
        assert got.amplitude == pytest.approx(float(amplitude), rel=1e-6)


# ---- what makes no sense ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (dict(rope_type="spiral"), "rope type 'spiral' is not known"),
        (dict(rope_type="linear"), "rope parameter factor should be a number, got None"),
        (dict(rope_type="linear", factor="4"), "rope parameter factor should be a number, got '4'"),
        (dict(rope_type="linear", factor=0.0), "not finite"),
        (dict(rope_type="longrope", short_factor=[1.0] * 3), "short_factor should be a list of 32 numbers"),
        (dict(rope_theta=-1.0), "make no sense"),
        (dict(rope_type="llama3", factor=8.0), "low_freq_factor should be a number"),
    ],
)
def test_refused(parameters, message):
    c = Fields(dict(rope_parameters=parameters, max_position_embeddings=LONGEST))
    rope(c, HEAD_DIM)
    with pytest.raises(ConfigError, match=message):
        c.finish(ignore=["rope_parameters"])
