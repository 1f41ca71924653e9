"""Calibrated quantization against its definitions: least squares, finite differences, products of real rows."""

import importlib.util
import itertools
import json
import pathlib
import sysconfig
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import Taps, layers, quant
from jaxllm.calibration import METHODS, awq, blockwise, calibrate, fisher, mix, smooth, unobserved, windows
from jaxllm.calibration.clip import RATIOS, clipped
from jaxllm.calibration.fold import fold, get
from jaxllm.calibration.gptq import gptq, inverse_factor
from jaxllm.calibration.grid import of_columns, recoded
from jaxllm.calibration.mixed import choose
from jaxllm.calibration.moments import block_config, embedded, observe, through
from jaxllm.calibration.reads import Read, last, reads
from jaxllm.calibration.text import held_out, standard_library
from jaxllm.checkpoint.canonical import flatten
from jaxllm.cli import main
from jaxllm.commands.quantize import HOW
from jaxllm.config import Norm, QKNorm, params_shape
from jaxllm.errors import ConfigError, JaxllmError
from jaxllm.quant import FORMATS, dequantize, encode, named
from tests import random_model
from tests.random_model import attention, block, config, mla, mlp, moe

pytestmark = pytest.mark.slow

LAYER = Norm("layer", 1e-5, bias=True)
MODELS = {
    "attention": config(block(), block(attention(qkv_bias=True, sinks=True))),
    "layernorm": config(replace(block(), norm=LAYER), norm=LAYER),
    "one head each": config(block(attention(kv_heads=4))),
    "gate": config(block(attention(gate=True)), block(attention(qk_norm=QKNorm(random_model.RMS, "head")))),
    "clip": config(block(attention(clip=0.3))),
    "normed": config(block(attention(out_norm=random_model.RMS), replace(mlp(), norm=random_model.RMS))),
    "relu": config(block(ffn=replace(mlp(), act="relu", gated=False, bias=True))),
    "gelu": config(block(ffn=replace(mlp(), act="gelu", gated=False))),
    "shared norm": config(block(parallel="shared")),
    "two norms": config(block(parallel="split", post=True)),
    "post only": config(block(pre=False, post=True)),
    "shared moe": config(block(ffn=moe(), parallel="shared")),
    "moe": config(block(ffn=moe())),
    "mla": config(block(mla())),
    "mamba": config(block(random_model.mamba())),
    "tied": config(block(), tied=True),
}


def problem(rows: int = 24, columns: int = 64, seed: int = 0):
    """(w f32 [rows, K], inputs f64 [512, K] of unequal, dependent channels, their second moments)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((512, columns)) @ rng.standard_normal((columns, columns)) / columns**0.5
    x = x * np.exp(rng.standard_normal(columns))
    return rng.standard_normal((rows, columns)).astype(np.float32), x, x.T @ x / len(x)


def lost(w, values, x) -> float:
    """Mean squared error of the outputs of rows x."""
    return float(np.square(x @ (values - w).T).mean())


def words(*shape: int) -> np.ndarray:
    return random_model.tokens(*shape)


# ---- GPTQ -------------------------------------------------------------------------------------------------


def by_least_squares(w, hessian, grid, order):
    """Column after column rounded, the others each time the exact minimum of |(w - values) X|^2 given them."""
    done, rounded = [], {}
    for i in order:
        rest = [c for c in range(w.shape[1]) if c not in done]
        change = np.zeros((len(w), len(rest)))
        if done:
            moved = np.stack([rounded[c] for c in done], 1) - w[:, done]
            change = -moved @ hessian[np.ix_(done, rest)] @ np.linalg.inv(hessian[np.ix_(rest, rest)])
        best = (w[:, i] + change[:, rest.index(i)]).astype(np.float32)
        rounded[i] = grid.take(slice(i, i + 1)).near(best[:, None])[:, 0]
        done.append(i)
    return np.stack([rounded[c] for c in range(w.shape[1])], 1)


@pytest.mark.parametrize("format", ["int4_g32", "uint3_g32", "nf4"])
@pytest.mark.parametrize("by_size", [False, True])
def test_gptq_is_greedy_least_squares(format, by_size):
    """Also across the boundary of blocks: 160 columns are more than one."""
    w, _, hessian = problem(6, 160)
    grid = of_columns(encode(w, named(format)))
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(160)
    order = np.argsort(-np.diag(hessian)) if by_size else np.arange(160)
    want = by_least_squares(w, damped, grid, order)
    got = gptq(w, hessian, grid, by_size=by_size)
    assert (np.abs(got - want) > 1e-5).mean() < 0.01  # a tie may fall to either side in f32
    plain = dequantize(encode(w, named(format)), np.float32)
    assert (np.abs(plain - want) > 1e-5).mean() > 0.2


def test_the_factor_is_that_of_the_inverse():
    _, _, hessian = problem()
    upper = inverse_factor(hessian, 0.01)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(64)
    inverse = np.linalg.inv(damped)
    np.testing.assert_allclose(upper.T @ upper, inverse, atol=1e-5 * np.abs(inverse).max())
    np.testing.assert_array_equal(np.tril(upper, -1), 0)


def test_channels_that_are_never_used_do_no_harm():
    w, _, hessian = problem()
    hessian[:, 5] = hessian[5] = 0
    assert np.isfinite(gptq(w, hessian, of_columns(encode(w, named("int4_g32"))))).all()
    assert np.isfinite(gptq(w, 0 * hessian, of_columns(encode(w, named("int4_g32"))))).all()


def test_moments_with_nan_are_refused():
    w, _, hessian = problem()
    hessian[3, 3] = np.nan
    with pytest.raises(JaxllmError, match="give more text"):
        gptq(w, hessian, of_columns(encode(w, named("int4_g32"))))


# ---- grids and clipping -----------------------------------------------------------------------------------

MADE = [name for name, f in FORMATS.items() if f.levels not in ("float32", "float16", "bfloat16")]


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("columns", [128, 72])
def test_values_on_the_grid_have_their_own_codes(name, columns):
    w, _, _ = problem(130, columns)
    try:
        q = encode(w, FORMATS[name])
    except ConfigError as error:
        pytest.skip(str(error))
    values = dequantize(q, np.float32)
    again = recoded(values, q)
    np.testing.assert_array_equal(dequantize(again, np.float32), values)
    for part, want in q.parts().items():
        np.testing.assert_array_equal(getattr(again, part), want)
    np.testing.assert_allclose(of_columns(q).near(w), dequantize(recoded(w, q), np.float32), atol=1e-6)


@pytest.mark.parametrize(
    "format", ["int4_g32", "q4f16_1", "q3f16_1", "uint4_g64", "nf4", "mxfp4", "nvfp4", "int8"]
)
def test_gptq_and_clipping_lose_less(format):
    w, x, hessian = problem(40, 96)
    f = named(format)
    plain, clip = encode(w, f), clipped(w, hessian, f)
    better = recoded(gptq(w, hessian, of_columns(clip)), clip)
    losses = [lost(w, dequantize(q, np.float32), x) for q in (plain, clip, better)]
    assert losses[1] < losses[0]
    assert losses[2] < 0.8 * losses[1]


def test_clipping_takes_the_best_multiple_of_each_group():
    w, x, hessian = problem(5, 64)
    f = named("uint4_g32")
    plain, got = encode(w, f), clipped(w, hessian, f)
    for n, g in itertools.product(range(5), range(2)):
        at = slice(32 * g, 32 * g + 32)

        def error(ratio, n=n, g=g, at=at):
            scale = (plain.scale.astype(np.float32) * np.float32(ratio)).astype(np.float16)
            d = dequantize(recoded(w, replace(plain, scale=scale)), np.float32)[n, at] - w[n, at]
            return np.square(x[:, at] @ d).mean()

        best = min((1.0, *RATIOS), key=error)
        assert got.scale[n, g] == np.float16(np.float32(plain.scale[n, g]) * np.float32(best))


def test_rows_that_share_a_scale_keep_it():
    w, _, hessian = problem(256, 128)
    f = named("fp8_e4m3_block")
    np.testing.assert_array_equal(clipped(w, hessian, f).scale, encode(w, f).scale)


# ---- what is observed -------------------------------------------------------------------------------------


def moments_of(c, p, tokens):
    """(moments of the first block's reads, taps of the whole model on the same tokens)."""
    batches = embedded(c, p, tokens)
    wanted = reads(c.blocks[0])
    points = {f"layers.0.{r.point}" for r in wanted}
    chosen = {"layers.0.ffn.experts"} if any(r.routed for r in wanted) else set()
    _, kept, _ = jaxllm.capture(c, p, tokens, Taps(keep=tuple(points | chosen)))
    return observe(block_config(c, 0), p["layers"][0], batches, wanted), kept


@pytest.mark.parametrize("name", ["attention", "gate", "normed", "mla", "mamba", "two norms"])
def test_moments_are_those_of_the_whole_model(name):
    c = MODELS[name]
    got, kept = moments_of(c, random_model.params(c), words(3, 16))
    assert len(got) >= 2
    for read, m in got.items():
        x = np.asarray(kept[f"layers.0.{read.point}"], np.float64).reshape(48, -1)
        np.testing.assert_allclose(m.hessian, x.T @ x / 48, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(m.mean_abs, np.abs(x).mean(0), rtol=1e-4)
        np.testing.assert_allclose(m.max_abs, np.abs(x).max(0), rtol=1e-5)
        assert m.rows.shape[1] == x.shape[1]
        assert m.count == 48


def test_moments_of_each_expert():
    c = MODELS["moe"]
    got, kept = moments_of(c, random_model.params(c), words(3, 16))
    expert = np.asarray(kept["layers.0.ffn.experts"]).reshape(48, 2)
    routed = [r for r in got if r.routed]
    assert [r.linears for r in routed] == [("ffn.gate", "ffn.up"), ("ffn.down",)]
    for read in routed:
        x = np.asarray(kept[f"layers.0.{read.point}"], np.float64)
        x = x.reshape(48, 2, -1) if read.point == "ffn.routed" else np.repeat(x.reshape(48, 1, -1), 2, 1)
        for e in range(6):
            mine, m = x[expert == e], got[read].expert(e)
            assert m.count == len(mine)
            np.testing.assert_allclose(m.hessian * max(1, len(mine)), mine.T @ mine, rtol=1e-4, atol=1e-4)


def test_routed_activations_are_those_the_experts_multiply():
    """`ffn.routed` by its own definition: act(gate x) * (up x) of each chosen expert."""
    c = MODELS["moe"]
    p = random_model.params(c)
    _, kept, _ = jaxllm.capture(c, p, words(2, 9), Taps(keep=("**",)))
    ffn, x = p["layers"][0]["ffn"], np.asarray(kept["layers.0.ffn.in"]).reshape(18, -1)
    expert = np.asarray(kept["layers.0.ffn.experts"]).reshape(18, -1)
    gate, up = (np.einsum("nd,nkfd->nkf", x, np.asarray(ffn[name]["w"])[expert]) for name in ("gate", "up"))
    np.testing.assert_allclose(kept["layers.0.ffn.routed"], gate / (1 + np.exp(-gate)) * up, atol=1e-5)


def test_blocks_one_by_one_are_the_model():
    c = MODELS["gate"]
    p, tokens = random_model.params(c), words(3, 16)
    batches = embedded(c, p, tokens)
    for i in range(len(c.blocks)):
        batches = through(block_config(c, i), p["layers"][i], batches)
    _, kept, _ = jaxllm.capture(c, p, tokens, Taps(keep=("layers.1.out",)))
    np.testing.assert_allclose(np.concatenate(batches), kept["layers.1.out"], atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_reads_name_weights_that_are_there(name):
    c = MODELS[name]
    shapes = params_shape(c)
    for i, b in enumerate(c.blocks):
        for read in reads(b):
            assert {f"layers.{i}.{path}.w" for path in read.linears} <= shapes.keys()
            assert read.maker is None or f"layers.{i}.{read.maker}.w" in shapes


def test_what_is_not_observed_is_said():
    formats = quant.recipe("int4_g32", MODELS["mamba"]).assign(params_shape(MODELS["mamba"]))
    assert unobserved(MODELS["mamba"], formats) == [f"layers.0.mixer.{n}.w" for n in ("x", "dt", "out")]
    formats = quant.recipe("int4_g32", MODELS["moe"]).assign(params_shape(MODELS["moe"]))
    assert unobserved(MODELS["moe"], formats) == []


# ---- scales -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_folding_scales_changes_nothing(name):
    """Every read that can take scales takes random ones."""
    c = MODELS[name]
    p, tokens = random_model.params(c), words(2, 12)
    rng, changed, blocks = np.random.default_rng(0), 0, []
    for b, own in zip(c.blocks, p["layers"], strict=True):
        for read in (r for r in reads(b) if r.maker):
            K = get(own, f"{read.linears[0]}.w").shape[-1]
            own = fold(own, read, awq.shared(np.exp(rng.standard_normal(K)), read, np.mean))
            changed += 1
        blocks.append(own)
    ends = fold(p, last(c), np.exp(rng.standard_normal(c.width))) if last(c).maker else p
    want = layers.forward(c, p, tokens)[0]
    got = layers.forward(c, ends | {"layers": blocks}, tokens)[0]
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))
    assert changed >= {"mamba": 1, "shared moe": 1, "post only": 2, "clip": 2}.get(name, 1)


def test_folding_into_the_wrong_place_would_be_seen():
    c = MODELS["clip"]
    p, tokens = random_model.params(c), words(2, 12)
    wrong = Read("mixer.joined", ("mixer.o",), "mixer.v", 2, 8)
    s = awq.shared(np.exp(np.random.default_rng(0).standard_normal(32)), wrong, np.mean)
    blocks = [fold(p["layers"][0], wrong, s)]
    want = layers.forward(c, p, tokens)[0]
    assert float(jnp.abs(layers.forward(c, p | {"layers": blocks}, tokens)[0] - want).max()) > 1e-2


def outliers(format: str):
    """A read with a few large channels: ([(w, format)], moments)."""
    w, x, _ = problem(64, 64)
    x[:, :3] *= 30
    x = x.astype(np.float32)
    batches = [x.reshape(16, 32, 64)]
    bare = replace(MODELS["attention"], blocks=(), width=64)
    norm = {"w": np.ones(64, np.float32)}
    read = last(bare)
    return [(w, named(format))], observe(bare, norm, batches, (read,))[read], read


def test_awq_finds_scales_that_lose_less():
    weights, m, read = outliers("int3_g32")
    s = awq.search(weights, m, read)
    assert s.shape == (64,)
    assert s[:3].min() > np.median(s)
    (w, f), x = weights[0], m.rows
    scaled = dequantize(encode(w * s, f), np.float32) / s
    assert lost(w, scaled, x) < 0.7 * lost(w, dequantize(encode(w, f), np.float32), x)


def test_smoothing_loses_less_where_activations_are_rounded():
    weights, m, read = outliers("w8a8")
    s = smooth.search(weights, m, read)
    ones = np.ones(64, np.float32)
    assert smooth.loss(weights, m.rows, s) < 0.5 * smooth.loss(weights, m.rows, ones)
    assert s[:3].min() > np.median(s)


# ---- Fisher information and mixes -------------------------------------------------------------------------


def test_fisher_is_the_curvature_of_the_divergence():
    """The sum of the diagonal over a weight: half of it times e^2 is the divergence that e in every value alone
    makes, summed."""
    c = config(block(attention(heads=2, kv_heads=1, head_dim=4, rope=None), replace(mlp(), hidden=4)), width=6)
    p = random_model.params(c)
    model = jaxllm.Model(c, p)
    tokens = words(400, 4)
    path, step = "layers.0.ffn.down.w", 0.05
    got = fisher(model, [path], tokens)[path]

    @jax.jit
    def divergence(d):
        w = p["layers"][0]["ffn"]["down"]["w"] + d
        moved = p | {"layers": [fold_in(p["layers"][0], w)]}
        a, b = (jax.nn.log_softmax(layers.forward(c, q, tokens)[0], -1) for q in (p, moved))
        return (jnp.exp(a) * (a - b)).sum(-1).mean()

    want = np.zeros((6, 4))
    for i, j in itertools.product(range(6), range(4)):
        d = jnp.zeros((6, 4)).at[i, j]
        want[i, j] = (divergence(d.set(step)) + divergence(d.set(-step))) / step**2
    assert got.shape == (6, 4)
    np.testing.assert_allclose(got.sum(), want.sum(), rtol=0.1)
    np.testing.assert_allclose(got, want, atol=0.25 * want.max())


def fold_in(block, w):
    return block | {"ffn": block["ffn"] | {"down": {"w": w}}}


def test_the_mix_is_nearly_the_best_one():
    """Against all combinations; greedy steps may leave less than the largest weight's step unused."""
    rng = np.random.default_rng(3)
    formats = [named(f"int{b}_g32") for b in (2, 3, 4, 6)]
    sizes = {f"w{i}": int(rng.integers(100, 200)) for i in range(6)}
    losses = {p: {f: float(np.exp(rng.normal())) * 4.0**-f.bits for f in formats} for p in sizes}
    losses = {p: dict(zip(formats, sorted(of.values(), reverse=True), strict=True)) for p, of in losses.items()}
    made = choose(losses, sizes, 4.5)

    def total(fs):
        bits = sum(f.bits_per_weight * n for f, n in zip(fs, sizes.values(), strict=True))
        loss = sum(of[f] for f, of in zip(fs, losses.values(), strict=True))
        return loss if bits <= 4.5 * sum(sizes.values()) else np.inf

    best = min(map(total, itertools.product(formats, repeat=6)))
    assert made.bits <= 4.5
    assert best <= made.loss <= 1.35 * best
    assert made.loss < sum(of[formats[2]] for of in losses.values())  # the uniform recipe of that size


def test_a_mix_that_cannot_be():
    model = jaxllm.Model(MODELS["tied"], random_model.params(MODELS["tied"]))
    with pytest.raises(ConfigError, match=r"smallest candidate takes 2.5 bits"):
        mix(model, 2.0, words(2, 12))


# ---- the bundled models -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def draft():
    return jaxllm.load(jaxllm.model.bundled("draft"), dtype="float32")


@pytest.fixture(scope="module")
def calibration(draft):
    return windows(draft, tokens=8192)


@pytest.fixture(scope="module")
def unseen(draft):
    """Windows of files that neither training nor calibration saw."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in sorted(root.glob("*.py")) if held_out(p.name)]
    text = "".join(p.read_text(encoding="utf-8")[:12000] for p in paths)
    return windows(draft, text, tokens=8192)


def nll(model, tokens) -> float:
    @jax.jit
    def mean(params, tokens):
        out = jax.nn.log_softmax(layers.forward(model.config, params, tokens)[0][:, :-1], -1)
        return -jnp.take_along_axis(out, tokens[:, 1:, None], -1).mean()

    whole = jax.tree.map(
        lambda x: x.astype(np.float32) if not isinstance(x, quant.QTensor) else x,
        model.params,
        is_leaf=lambda x: isinstance(x, quant.QTensor),
    )
    return float(np.mean([mean(whole, tokens[i : i + 4]) for i in range(0, len(tokens), 4)]))


@pytest.fixture(scope="module")
def before(draft, unseen):
    return nll(draft, unseen)


@pytest.mark.parametrize(
    ("format", "method", "share"),
    [
        ("int4_g32", "gptq", 0.4),
        ("int4_g32", "awq+gptq", 0.4),
        ("int3_g32", "clip", 0.15),
        ("int3_g32", "awq", 0.2),
    ],
)
def test_a_share_of_what_rounding_loses_is_won_back(draft, calibration, unseen, before, format, method, share):
    recipe = quant.recipe(format, draft.config)
    plain = nll(quant.quantize_model(draft, format), unseen) - before
    made = calibrate(draft, recipe, calibration, method=method)
    after = nll(made, unseen) - before
    assert plain > 0
    assert after < (1 - share) * plain
    packed = {p: x.format for p, x in flatten(made.params).items() if isinstance(x, quant.QTensor)}
    assert packed == {p: f for p, f in recipe.assign(params_shape(draft.config)).items() if f}
    usual = flatten(quant.quantize_model(draft, format).params)
    other = {p for p, x in flatten(made.params).items() if x.dtype != usual[p].dtype}
    assert all(p.endswith("pre.w") for p in other)  # norms that took scales are f32
    assert bool(other) == (METHODS[method].search is not None)


def divergence(a, b, tokens) -> float:
    """Mean KL divergence of b's predictions from a's, in nats per token."""

    @jax.jit
    def mean(p, q, tokens):
        x, y = (jax.nn.log_softmax(layers.forward(a.config, own, tokens)[0], -1) for own in (p, q))
        return (jnp.exp(x) * (x - y)).sum(-1).mean()

    return float(np.mean([mean(a.params, b.params, tokens[i : i + 4]) for i in range(0, len(tokens), 4)]))


def test_smoothing_comes_nearer_to_the_model(draft, calibration, unseen):
    """With 8 bits both losses drown in the noise of the text; the divergence does not. A tied head takes no
    scales, so that only layers are rounded."""
    recipe = quant.Recipe((("layers.**", "w8a8"),))
    plain = quant.quantize_model(draft, recipe)
    made = calibrate(draft, recipe, calibration, method="smooth")
    assert divergence(draft, made, unseen) < 0.95 * divergence(draft, plain, unseen)


def test_a_mix_beats_the_uniform_recipe(draft, calibration, unseen, before):
    mixed = mix(draft, 3.5, calibration)
    assert 3.4 < mixed.bits <= 3.5
    uniform = nll(quant.quantize_model(draft, "int3_g32"), unseen) - before
    made = quant.quantize_model(draft, mixed.recipe())
    packed = [x for x in flatten(made.params).values() if isinstance(x, quant.QTensor)]
    assert sum(x.nbytes for x in packed) * 8 <= 3.5 * sum(x.size for x in packed)
    after = nll(made, unseen) - before
    assert after < 0.8 * uniform
    assert 0.5 * mixed.loss < after < 2 * mixed.loss
    assert len(mixed.table().splitlines()) == len(mixed.choices) + 2


def test_rows_do_not_depend_on_one_another(monkeypatch):
    c = MODELS["moe"]
    model, tokens = jaxllm.Model(c, random_model.params(c)), words(2, 32)
    recipe = quant.recipe(replace(named("int4_g32"), group=16), c)
    whole = calibrate(model, recipe, tokens, method="gptq")
    monkeypatch.setattr(blockwise, "AT_ONCE", 300)
    parts = calibrate(model, recipe, tokens, method="gptq")
    for path, x in flatten(whole.params).items():
        if isinstance(x, quant.QTensor):
            other = flatten(parts.params)[path]
            assert (np.asarray(x.codes) != np.asarray(other.codes)).mean() < 0.01
            np.testing.assert_array_equal(x.scale, other.scale)


def test_folded_vectors_and_plain_matrices_keep_their_place(draft, calibration):
    """A recipe for some weights: the others stay bit for bit, apart from norms that took scales."""
    recipe = quant.Recipe((("layers.0.ffn.*.w", "int4_g32"),))
    made = flatten(calibrate(draft, recipe, calibration[:4], method="awq").params)
    for path, x in flatten(draft.params).items():
        if path.startswith("layers.0.ffn."):
            continue
        np.testing.assert_array_equal(made[path], x)
    assert not np.array_equal(made["layers.0.ffn.pre.w"], flatten(draft.params)["layers.0.ffn.pre.w"])


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("one head each", "awq+gptq"),
        ("moe", "awq+gptq"),
        ("mla", "smooth"),
        ("mamba", "gptq"),
        ("shared moe", "awq"),
        ("normed", "smooth+gptq"),
        ("tied", "gptq"),
    ],
)
def test_every_kind_of_block(name, method):
    """Finite, of the right formats, and near the model."""
    c = MODELS[name]
    model = jaxllm.Model(c, random_model.params(c))
    recipe = quant.recipe(replace(named("int8_g32"), group=16), c)
    made = calibrate(model, recipe, words(2, 32), method=method)
    want = layers.forward(c, model.params, words(2, 12))[0]
    got = layers.forward(c, made.params, words(2, 12))[0]
    assert float(jnp.abs(got - want).max()) < 0.1 * float(jnp.abs(want).max())
    formats = recipe.assign(params_shape(c))
    assert {p for p, x in flatten(made.params).items() if isinstance(x, quant.QTensor)} == {
        p for p, f in formats.items() if f
    }


# ---- text and refusals ------------------------------------------------------------------------------------


def test_text_never_holds_held_out_files(draft):
    spec = importlib.util.spec_from_file_location(
        "train_bundled", pathlib.Path(__file__).parents[1] / "tools" / "train_bundled.py"
    )
    trainer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trainer)
    kept = {text[:8000] for _, text in trainer.corpus()[1]}
    assert len(kept) > 10
    assert not kept & set(itertools.islice(standard_library(), 400))
    assert all(held_out(name) for name, _ in trainer.corpus()[1])


def test_windows(draft):
    assert windows(draft, tokens=3000).shape == (5, 512)
    assert windows(draft, "def f(x):\n    return x\n" * 400, tokens=600).shape == (1, 512)
    with pytest.raises(JaxllmError, match="at least 512 tokens"):
        windows(draft, "short")


def test_refusals(draft, calibration):
    recipe = quant.recipe("int4_g32", draft.config)
    with pytest.raises(ConfigError, match="methods are clip, gptq"):
        calibrate(draft, recipe, calibration, method="magic")
    with pytest.raises(JaxllmError, match=r"\[windows, tokens of each\]"):
        calibrate(draft, recipe, calibration[0])
    with pytest.raises(ConfigError, match="quantized already"):
        calibrate(quant.quantize_model(draft, "int4_g32"), recipe, calibration)
    with pytest.raises(ConfigError, match="quantized already"):
        mix(quant.quantize_model(draft, "int4_g32"), 4.5, calibration)
    assert set(METHODS) == {"clip", "gptq", "awq", "awq+gptq", "smooth", "smooth+gptq"}
    assert tuple(METHODS) == HOW  # which the command says without importing them


def test_the_command(tmp_path, capsys):
    text = tmp_path / "text.py"
    text.write_text("\n".join(itertools.islice(standard_library(), 4)), encoding="utf-8")
    source, out = str(jaxllm.model.bundled("draft")), tmp_path / "mixed"
    main(["quantize", source, str(out), "--bits", "4.5", "--calibrate", "clip", "--text", str(text), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert len(report["formats"]) > 2
    model = jaxllm.load(out)
    bits = [x for x in flatten(model.params).values() if isinstance(x, quant.QTensor)]
    assert sum(x.nbytes for x in bits) * 8 <= 4.5 * sum(x.size for x in bits)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--bits", "4", "--format", "nf4"], "leave out --format"),
        (["--format", "nf4", "--text", "x"], "--text is for"),
        ([], "or --bits"),
    ],
)
def test_the_command_refuses(more, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["quantize", str(jaxllm.model.bundled("draft")), str(tmp_path / "out"), *more])
    assert message in capsys.readouterr().err
