"""Core ML packages: what a saved one computes is the live model, read by what did not write it."""

import functools
import importlib.util
import pathlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import cli, decode, layers, ops
from jaxllm.checkpoint.canonical import flatten
from jaxllm.config import DeltaNet, Mamba2, ShortConv
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.export import build, mil_convert, mil_file, mil_interp, mil_ops, mil_weights, target
from jaxllm.export.options import Options
from jaxllm.export.targets import coreml
from jaxllm.model import Model
from jaxllm.quant import QTensor, dequantize
from jaxllm.state import EMPTY, appended, init_state
from tests import random_model
from tests.test_export import KINDS, SMALL, here, model_of

tools = pytest.mark.skipif(not importlib.util.find_spec("coremltools"), reason="coremltools is not installed")
RECURRENT = {
    "mamba2": Mamba2(heads=4, head_dim=8, groups=2, states=4, kernel=3, norm=random_model.RMS),
    "delta-net": DeltaNet(k_heads=2, v_heads=4, k_dim=6, v_dim=5, kernel=3, norm=random_model.RMS),
    "short-conv": ShortConv(width=32, kernel=3),
}
MOST_OF_A_KIND = {"moe": replace(SMALL, chunk=40)}  # rows enough for experts to take blocks of them


def made(model: Model, folder: pathlib.Path, options: Options = SMALL):
    with here():
        return build.export(model, "coreml", folder, options=options)


def check(export: build.Exported, within: float) -> None:
    said = export.manifest["verification"]
    assert said["verified"] == "compiled"
    assert said["tokens_equal"] + said["near_ties"] == said["tokens"]
    assert said["max_difference"] < within * said["largest_logit"]


# ---- the package is the model ---------------------------------------------------------------------------


@tools
@pytest.mark.parametrize("kind", [name for name in KINDS if name not in ("q4f16_1", "int8")])
def test_a_package_computes_every_kind_of_model_in_float32(kind, tmp_path):
    name, _, options = KINDS[kind]
    export = made(model_of(name), tmp_path / kind, MOST_OF_A_KIND.get(kind, options))
    check(export, 3e-6)
    assert export.manifest["verification"]["near_ties"] == 0


@tools
@pytest.mark.parametrize("name", RECURRENT)
def test_every_recurrent_layer_goes_through(name, tmp_path):
    config = random_model.config(random_model.block(RECURRENT[name]), random_model.block())
    check(made(Model(config, random_model.params(config), name=name), tmp_path / name), 3e-6)


@tools
@pytest.mark.parametrize(("config", "format"), [("moe", "q4f16_1"), ("full", "int8"), ("full", "uint4_g32")])
def test_packed_weights_lie_in_the_package_as_they_are(config, format, tmp_path):
    """Against the forward without kernels, which round activations. Codes are read by Apple's reader, too."""
    model = model_of(config, format)
    with ops.portable():
        export = made(model, tmp_path / format)
    check(export, 5e-3 if model.config.dtype == "float16" else 3e-6)
    package = export.folder / coreml.PACKAGE
    packed = {path: leaf for path, leaf in flatten(model.params).items() if isinstance(leaf, QTensor)}
    ours, theirs = held(package), held_by_apple(package)
    assert len(packed) > 8
    assert len(ours) == len(theirs) == 2 * len(packed)  # in both functions
    for data, _ in theirs:
        assert any(same(data, mine) for mine in ours)
    for leaf in packed.values():
        codes, value = mil_weights.codes(leaf)[0], dequantize(jax.tree.map(np.asarray, leaf))
        found = [dense for data, dense in theirs if same(data, codes)]
        assert len(found) >= 2
        assert any(np.array_equal(dense[..., : leaf.columns], value) for dense in found)
    stored = export.manifest["files"][f"{coreml.PACKAGE}/Data/com.apple.CoreML/weights/weight.bin"]["bytes"]
    assert (
        stored < sum(leaf.nbytes for leaf in packed.values()) + 40_000
    )  # each once, and 64 bytes and more for it


def held(package: pathlib.Path) -> list[np.ndarray]:
    functions = mil_file.read(package)
    found = [op for f in functions.values() for op in mil_interp.operations(f.block)]
    return [op.inputs["data"] for op in found if op.type == "constexpr_blockwise_shift_scale"]


def held_by_apple(package: pathlib.Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """(codes, values) by coremltools' loader and its own expansion."""
    with mil_file.quiet():
        import coremltools as ct
        from coremltools.converters.mil.frontend.milproto.load import load

        model = ct.models.MLModel(str(package), skip_model_load=True)
        program = load(model.get_spec(), model.get_spec().specificationVersion, model.weights_dir)
    found = [op for f in program.functions.values() for op in f.operations]
    found = [op for op in found if op.op_type == "constexpr_blockwise_shift_scale"]
    return [(np.asarray(op.data.val), op.materialized_val_inference()) for op in found]


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a.astype(np.int16), b.astype(np.int16))


@tools
def test_float16_activations_and_a_step_that_scatters_nothing(tmp_path):
    config = replace(random_model.CONFIGS["full"], dtype="float16")
    model = Model(config, random_model.params(config, dtype="float16"), name="half")
    export = made(model, tmp_path / "half")
    check(export, 5e-3)
    functions = mil_file.read(export.folder / coreml.PACKAGE)
    kinds = {name: {op.type for op in mil_interp.operations(f.block)} for name, f in functions.items()}
    assert "scatter" not in kinds["decode"]
    assert set(functions["decode"].states) == {f"layers_{i}_{x}" for i in (0, 1) for x in "kv"}
    assert functions["decode"].states == functions["prefill"].states
    assert functions["decode"].described["input"] == ("length", "n_new", "tokens")


@tools
def test_the_bundled_model_by_the_command(tmp_path):
    """In a fresh process; then 64 greedy tokens from the package alone are the live model's."""
    out = tmp_path / "out"
    argv = ["export", str(jaxllm.bundled()), "--target", "coreml", "--dtype", "float32", "--context", "128"]
    assert cli.main([*argv, "--chunk", "32", "--out", str(out)]) == 0
    live, prompt = jaxllm.load(dtype="float32"), "def read_lines(path):\n"
    expected = decode.generate(live, prompt, max_new_tokens=64, eos=()).completions[0].tokens
    package, ids = mil_interp.Package(out / coreml.PACKAGE), live.tokenizer.encode(prompt)
    states, length, found = package.empty("decode"), 0, []
    for name, tokens in [("prefill", ids), *(("decode", None) for _ in range(63))]:
        tokens = [found[-1]] if tokens is None else tokens
        padded = np.pad(np.array([tokens], np.int32), ((0, 0), (0, 32 - len(tokens) if name == "prefill" else 0)))
        one = lambda n: np.array([n], np.int32)
        given = {"tokens": padded, "n_new": one(len(tokens)), "length": one(length)}
        results, states = package.run(name, given, states)
        length += len(tokens)
        found.append(int(results["logits"].argmax()))
    assert found == list(expected)
    model = out / coreml.PACKAGE / "Data/com.apple.CoreML/model.mlmodel"
    assert model.stat().st_size < 1_000_000  # 8 layers
    assert model.stat().st_mode & 0o044 == out.stat().st_mode & 0o044
    assert "makeState()" in (out / coreml.EXAMPLE).read_text()


# ---- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "format", "options", "says"),
    [
        (dict(dtype="bfloat16"), None, SMALL, "computes in bfloat16, and Core ML has float32 and float16"),
        ({}, "q4bf16_1", SMALL, "computes in bfloat16"),
        ({}, "w8a8", SMALL, "activations are rounded to int8"),
        ({}, "nf4", SMALL, "in nf4, and Core ML holds groups of codes of 4 or 8 bits"),
        ({}, "q3f16_1", SMALL, "in q3f16_1, and Core ML holds"),
        ({}, None, replace(SMALL, sampler="in-graph"), "leave --sampler out"),
    ],
)
def test_what_core_ml_has_not_is_refused_before_any_work(changes, format, options, says, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_loaded", lambda *a: pytest.fail("that is work"))
    model = model_of("full")
    model = replace(model, config=replace(model.config, **changes))
    with pytest.raises(ConfigError, match=f"coreml cannot take this model: .*{says}"):
        build.export(model, "coreml", tmp_path / "out", format=format, options=options)
    assert list(tmp_path.iterdir()) == []


def test_a_program_is_refused_for_what_it_computes(monkeypatch):
    """Found by tracing: an operation without a rule, and arrays of more axes than there are."""
    monkeypatch.delitem(mil_convert.RULES, "cos")
    config = random_model.CONFIGS["full"]
    assert "computes cos, for which" in target.find("coreml").refuses(config, {}, {}, SMALL)
    wide = jax.make_jaxpr(lambda x: jnp.sin(x))(jnp.zeros((1,) * 6))
    assert "sin with 6 axes, and Core ML takes 5" in mil_convert.refusal(wide.jaxpr)
    for f, says in [
        (lambda x: jnp.sort(x), "computes sort by several keys, along rows, or of numbers"),
        (lambda x: jax.lax.pad(x, 0.0, [(0, 0, 1), (0, 0, 0)]), "computes pad between elements"),
        (lambda x: jax.lax.select_n(jnp.int32(x > 0), x, x, x), "computes select_n among more than two"),
        (lambda x: jnp.int32(x) & 3, "computes and of bits"),
        (lambda x: x.at[jnp.int32(x[0, 0])].set(0, mode="clip"), "computes scatter at clamped indices"),
        (lambda x: jax.random.uniform(jax.random.key(jnp.int32(x[0, 0]))), "it computes "),
    ]:
        assert says in mil_convert.refusal(jax.make_jaxpr(f)(X[0]).jaxpr)


def test_parts_that_have_no_place_are_refused():
    leaf = flatten(model_of("full", "int4_g32").params)["layers.0.mixer.q.w"]
    assert mil_weights.odd("w", leaf) is None
    assert "has order beside" in mil_weights.odd("w", replace(leaf, order=np.arange(32)))
    assert "zero points that are no codes" in mil_weights.odd("w", replace(leaf, zero=leaf.scale * 0 + 0.5))


@tools
def test_a_damaged_package_is_no_model(tmp_path):
    export = made(model_of("full"), tmp_path / "out")
    package = export.folder / coreml.PACKAGE / "Data" / "com.apple.CoreML"
    with mil_file.quiet():
        from coremltools.proto import Model_pb2
    whole = (package / "model.mlmodel").read_bytes()
    model = Model_pb2.Model.FromString(whole)
    (block,) = model.mlProgram.functions["decode"].block_specializations.values()
    next(op for op in block.operations if op.type == "linear").type = "linear_of_tomorrow"
    (package / "model.mlmodel").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match="operators that are not known here: linear_of_tomorrow"):
        mil_interp.Package(package.parent.parent)
    (package / "model.mlmodel").write_bytes(whole)
    runs = mil_interp.Package(package.parent.parent)
    with pytest.raises(CheckpointError, match="decode takes n_new as int32"):
        runs.run("decode", {"length": np.zeros(1, np.int32)}, runs.empty("decode"))
    (package / "weights" / "weight.bin").write_bytes(b"\0" * 4096)
    with pytest.raises(CheckpointError, match="holds no such array"):
        mil_interp.Package(package.parent.parent)
    (package / "model.mlmodel").write_bytes(b"no protocol buffer")
    with pytest.raises(CheckpointError, match="is no Core ML package"):
        mil_interp.Package(package.parent.parent)


# ---- positions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "window", "sinks"), [("full", None, 0), ("window", None, 0), ("full", 10, 3)])
def test_positions_follow_from_lengths(config, window, sinks):
    """As the forward wrote them, for rows of different lengths, before and after rings have turned."""
    config = random_model.CONFIGS[config]
    params = random_model.params(config)
    state = init_state(config, 3, window or 32, chunk=8, window=window, sinks=sinks)
    rng = np.random.default_rng(0)
    for _ in range(4 if window is None else 8):
        n_new = jnp.asarray(rng.integers(0, 9, 3), jnp.int32)
        state = layers.hidden(config, params, rng.integers(0, 48, (3, 8)), state, n_new=n_new)[1]
        for cache in state.layers:
            found = appended(cache.pos.shape[1], state.length, sinks)
            assert np.array_equal(found, cache.pos)
    assert (np.asarray(cache.pos) != EMPTY).any()


# ---- rules: what JAX computes, by way of a saved package ------------------------------------------------

X = np.random.default_rng(1).standard_normal((4, 6, 8)).astype(np.float32)
AT = np.array([[1, -2, 0, 7, 99, -99], [3, 3, 2, 1, 0, -1]], np.int32)
SIGNED = np.array([[-7, -6, -1, 0, 5, 6], [7, 3, -3, 2, -2, 1]], np.int32)


def _counted(x, i):
    return jax.lax.fori_loop(0, i[0, 0] + 3, lambda n, y: y * 0.5 + n, x)


def _scanned(x, i, **how):
    return jax.lax.scan(lambda c, row: (c * 0.9 + row, jnp.tanh(c)), x[0], x, **how)


RULES = {
    "take-fill": lambda x, i: jnp.take(x, i, axis=1, mode="fill"),
    "take-clip": lambda x, i: jnp.take(x, i, axis=2, mode="clip"),
    "take-along": lambda x, i: jnp.take_along_axis(x[:2, :, 0], i, 1, mode="clip"),
    "rows-of-rows": lambda x, i: x[jnp.arange(2)[:, None], jnp.clip(i, 0, 5)],
    "slices": lambda x, i: jax.vmap(lambda row, n: jax.lax.dynamic_slice_in_dim(row, n, 3))(x[:2], i[:, 0]),
    "set-drop": lambda x, i: x.at[:, i[0]].set(x * 2, mode="drop"),
    "set-beyond": lambda x, i: x.at[i[0], 2].set(1.0, mode="drop"),
    "set-one": lambda x, i: x.at[jnp.arange(4)[:, None], i[0, 3:5, None].sum() % 9].set(x[:, :1], mode="drop"),
    "add": lambda x, i: x.at[:, i[1]].add(x, mode="drop"),
    "slice": lambda x, i: jax.lax.dynamic_slice(x, (i[0, 0], i[0, 4], -5), (2, 3, 4)),
    "update-slice": lambda x, i: jax.lax.dynamic_update_slice(x, x[:2, :3] * 2, (i[0, 0], i[0, 4], i[0, 5])),
    "argsort": lambda x, i: jnp.argsort(i[1], stable=True),
    "top-k": lambda x, i: jax.lax.top_k(x, 3),
    "remainders": lambda x, i: (i % 5, i // 5, jax.lax.rem(i, -4), jax.lax.div(i, jnp.int32(-4))),
    "argmax": lambda x, i: jnp.argmax(x, 1),
    "log1p": lambda x, i: jnp.log1p(jnp.exp(x * 4 - 12)),
    "activations": lambda x, i: (jax.nn.silu(x), jax.nn.gelu(x, approximate=False), jax.nn.softplus(x * 9)),
    "powers": lambda x, i: (x**3, jnp.abs(x) ** 1.5, jax.lax.rsqrt(jnp.abs(x)), jnp.exp2(x)),
    "branches": lambda x, i: jax.lax.switch(i[0, 0], [jnp.sin, jnp.cos, jnp.tanh, lambda y: y], x),
    "loop": _counted,
    "scan": _scanned,
    "scan-reverse": lambda x, i: _scanned(x, i, reverse=True),
    "sums": lambda x, i: (jnp.cumsum(i, 1), jnp.cumsum(x, 0), x.sum((0, 2)), (i > 0).sum()),
    "reductions": lambda x, i: (x.max(1), x.min((1, 2)), (i > 0).any(1), (i > -3).all(1)),
    "products": lambda x, i: (
        jnp.einsum("abc,dbc->ad", x, x),
        jnp.einsum("abc,abd->acd", x, x),
        jnp.einsum("abc,bcd->bad", x, jnp.asarray(X.transpose(1, 2, 0))),
        jnp.einsum("abc,dc->abd", x, jnp.asarray(X[0])),
    ),
    "choices": lambda x, i: (jnp.where(i > 0, i, -1), jnp.where(x[:1] > 0, 1.0, x), jnp.clip(x, -0.5, 0.25)),
    "logic": lambda x, i: ((i > 0) & ~(i < 3) | (i == 7), i != jnp.int32(3), jnp.where(i[0] > 0, i[1] > 1, False)),
    "search": lambda x, i: jnp.searchsorted(jnp.cumsum(jnp.abs(i[1])), jnp.arange(12), side="right"),
    "shapes": lambda x, i: (jnp.pad(x, ((0, 0), (1, 2), (0, 1))), x[:, ::2, 1:7:3], *jnp.split(x, [2, 5], 1)),
}


@pytest.fixture(scope="module")
def ruled(tmp_path_factory):
    """Name -> what the interpreter gets from a saved package of all RULES."""
    return computed(RULES, (X, AT), tmp_path_factory.mktemp("rules"))


def computed(functions: dict, args: tuple[np.ndarray, ...], folder: pathlib.Path) -> dict:
    with mil_file.quiet():
        import coremltools as ct
        from coremltools.converters.mil import Builder as mb
        from coremltools.converters.mil.mil import Function, Program

        kinds = {"x": args[0], "i": args[1]}
        module, names = Program(), {}
        given = {k: mb.placeholder(shape=x.shape, dtype=coreml._type(x)) for k, x in kinds.items()}
        with Function(given, opset_version=ct.target.iOS18) as function:
            outputs, converter = [], mil_convert.Converter(mb)
            for name, f in functions.items():
                closed = jax.make_jaxpr(f)(*args)
                assert mil_convert.refusal(closed.jaxpr) is None, name
                found = converter.run(closed.jaxpr, closed.consts, [function.inputs[k] for k in kinds])
                shapes = [x.aval.shape for x in closed.jaxpr.outvars]
                found = [converter.number(converter.full(x, s)) for x, s in zip(found, shapes, strict=True)]
                names[name] = [f"{name.replace('-', '_')}_{n}" for n in range(len(found))]
                outputs += [mb.identity(x=x, name=n) for x, n in zip(found, names[name], strict=True)]
            function.set_outputs(outputs)
        module.add_function("main", function)
        coreml._convert(module).save(str(folder / "alone.mlpackage"))
        plan = ct.utils.MultiFunctionDescriptor()
        plan.add_function(str(folder / "alone.mlpackage"), "main", "main")
        plan.default_function_name = "main"
        ct.utils.save_multifunction(plan, str(folder / "rules.mlpackage"))
    package = mil_interp.Package(folder / "rules.mlpackage")
    found, _ = package.run("main", kinds, {})
    return {name: [found[n] for n in of] for name, of in names.items()} | {"functions": package.functions}


@tools
def test_a_package_of_all_rules_holds_what_coremltools_has_no_values_of(ruled):
    types = {op.type for op in mil_interp.operations(ruled["functions"]["main"].block)}
    assert types >= BY_RULES


@tools
@pytest.mark.parametrize("name", RULES)
def test_a_rule_computes_what_jax_does(name, ruled):
    expected = jax.tree.leaves(jax.jit(RULES[name])(X, AT))
    assert len(expected) == len(ruled[name])
    for x, y in zip(expected, ruled[name], strict=True):
        np.testing.assert_allclose(y, np.asarray(x), rtol=3e-6, atol=1e-6)


# ---- operators: what coremltools itself works out of constants ------------------------------------------

H = X[0].astype(np.float16)
OPERATORS = {
    **{name: dict(x=X) for name in ("abs", "sign", "floor", "ceil", "exp", "exp2", "sin", "cos", "tanh", "erf")},
    **{f"{name} half": dict(x=H) for name in ("exp", "sin", "sigmoid", "tanh")},
    **{name: dict(x=X) for name in ("sigmoid", "silu", "square", "identity")},
    **{name: dict(x=np.abs(X)) for name in ("sqrt",)},
    **{name: dict(x=np.abs(X), epsilon=np.float32(0.01)) for name in ("log", "rsqrt")},
    **{name: dict(x=X, y=X[:1] + 3) for name in ("add", "sub", "mul", "real_div", "maximum", "minimum")},
    **{f"{name} half": dict(x=H, y=H[:1] + H[0, 0]) for name in ("add", "mul", "real_div")},
    **{name: dict(x=SIGNED, y=np.int32(3)) for name in ("floor_div", "mod", "equal", "not_equal", "less")},
    **{name: dict(x=SIGNED, y=np.int32(3)) for name in ("less_equal", "greater", "greater_equal")},
    **{name: dict(x=SIGNED > 0, y=SIGNED > 3) for name in ("logical_and", "logical_or")},
    "pow": dict(x=np.abs(X), y=np.float32(1.5)),
    "logical_not": dict(x=SIGNED > 0),
    "select": dict(cond=X > 0, a=X, b=X * 2),
    "cast": dict(x=X * 9, dtype="int32"),
    "tile": dict(x=X, reps=[1, 2, 3]),
    "fill": dict(shape=[2, 3], value=np.float32(4)),
    "reshape": dict(x=X, shape=[6, 32]),
    "expand_dims": dict(x=X, axes=[0, 2]),
    "squeeze": dict(x=X[:1], axes=[0]),
    "transpose": dict(x=X, perm=[2, 0, 1]),
    "concat": dict(values=[X, X[:, :2]], axis=1),
    "split": dict(x=X, split_sizes=[2, 1, 3], axis=1),
    "slice_by_index": dict(x=X, begin=[1, 0, 1], end=[3, 5, 8], stride=[1, 2, 3]),
    "slice_by_size": dict(x=X, begin=[1, 2, 0], size=[2, 3, 8]),
    "pad": dict(x=X, pad=[0, 0, 1, 2, 3, 0], mode="constant", constant_val=np.float32(7)),
    "linear": dict(x=X[0], weight=X[1], bias=X[2, 0, :6]),
    "matmul": dict(x=X, y=X, transpose_y=True),
    "reduce_sum": dict(x=X, axes=[0, 2], keep_dims=False),
    "reduce_max": dict(x=X, axes=[1], keep_dims=True),
    "reduce_min": dict(x=X, axes=[1], keep_dims=False),
    "reduce_argmax": dict(x=X, axis=1, keep_dims=False),
    "cumsum": dict(x=X, axis=1, exclusive=False, reverse=True),
    "topk": dict(x=X, k=3, axis=2, ascending=False, sort=True),
    "argsort": dict(x=X, axis=2, ascending=True),
    "gather": dict(x=X, indices=np.array([[2, 0], [5, 1]], np.int32), axis=1),
    "constexpr_blockwise_shift_scale": dict(
        data=SIGNED.astype(np.int8), scale=np.abs(X[0, :2, :3]), offset=SIGNED[:, :3].astype(np.int8)
    ),
}
# Operators that coremltools does not fold
NO_VALUES = {"silu", "linear", "matmul", "topk", "argsort", "split", "slice_by_size", "reduce_argmax"}
BY_RULES = NO_VALUES | {"scatter", "slice_update"}  # operators that packages of RULES hold


@functools.cache
def worked_out(name: str):
    """What coremltools folds an operator of constants to, or None."""
    with mil_file.quiet():
        import coremltools as ct
        from coremltools.converters.mil import Builder as mb
        from coremltools.converters.mil.mil import Function, types

        unused = mb.placeholder(shape=(1,), dtype=types.fp32)
        with Function({"unused": unused}, opset_version=ct.target.iOS18) as f:
            found = getattr(mb, name.split()[0])(**OPERATORS[name])
            found = list(found) if isinstance(found, list | tuple) else [found]
            f.set_outputs(found)
    return [x.op.materialized_val_inference() if x.op.op_type.startswith("constexpr") else x.val for x in found]


@tools
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_gives_what_coremltools_folds_it_to(name):
    given = {k: np.asarray(x) if isinstance(x, list) and k != "values" else x for k, x in OPERATORS[name].items()}
    found = mil_ops.OPERATORS[name.split()[0]](given)
    found = found if isinstance(found, list) else [found]
    expected = worked_out(name)
    if expected[0] is None:
        assert name in NO_VALUES
        return
    for x, y in zip(expected, found, strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        np.testing.assert_allclose(y, x, rtol=2e-3 if np.asarray(x).dtype == np.float16 else 3e-6, atol=1e-6)


def test_every_operator_is_held_against_something():
    assert mil_ops.OPERATORS.keys() <= {name.split()[0] for name in OPERATORS} | BY_RULES | {"const"}


def test_what_is_undefined_is_an_error():
    for name, given in [
        ("gather", dict(x=X, indices=np.array([8]), axis=2)),
        ("scatter", dict(data=X, indices=np.array([-1]), updates=X[:1], axis=0, mode="update")),
        ("slice_by_size", dict(x=X, begin=np.array([3, 0, 0]), size=np.array([2, 6, 8]))),
        ("add", dict(x=X, y=H[0])),
    ]:
        with pytest.raises(CheckpointError):
            mil_ops.OPERATORS[name](given)
