"""What programs over a mesh compute and what they send around. tests/test_sharding.py runs this file in a process
of four CPU devices; alone: XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m pytest tests/mesh_cases.py
"""

import functools
import math
import pathlib
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxllm
from jaxllm import decode, native, ops, partition, quant
from jaxllm.config import MLP, Attention, Block, ModelConfig, MoE, Norm, Rope
from jaxllm.kernels import dense
from jaxllm.model import Model
from jaxllm.native import packed as native_packed
from jaxllm.quant import QTensor, encode, named
from jaxllm.quant.cache import empty, quantized
from jaxllm.state import init_state, nbytes
from tests import random_model

BF16, F32 = jnp.bfloat16, jnp.float32
RMS = Norm("rms", 1e-5)
MIXER = Attention(
    heads=8, kv_heads=4, head_dim=32, scale=32**-0.5, rope=Rope(tuple(10000.0 ** -(i / 16) for i in range(16)))
)
FFN = {"dense": MLP(512, "silu"), "moe": MoE(experts=8, top_k=2, hidden=128, act="silu", renorm=True, shared=128)}
# Columns of what reads a hidden layer, rows of everything else, and the embedding by words.
TABLE = (
    (r"(q|k|v|gate|up|head)\.w", ("model", None)),
    (r"(o|down)\.w", (None, "model")),
    (r"embed\.w", ("model", None)),
)
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def mesh(data: int, model: int) -> Mesh:
    return Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))


def put(x, over: Mesh, *axes):
    return jax.device_put(x, NamedSharding(over, P(*axes)))


def placed(params: dict, over: Mesh) -> dict:
    """Every array of every matrix by TABLE; an axis of one element, as that of a row's one scale, is not cut."""

    def place(path, a):
        name = ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", None)))) for key in path)
        axes = next((axes for pattern, axes in TABLE if re.search(pattern, name)), ())
        axes = (None,) * (a.ndim - len(axes)) + axes
        return put(a, over, *(axis if a.shape[i] > 1 else None for i, axis in enumerate(axes)))

    return jax.tree_util.tree_map_with_path(place, params)


def sent(compiled) -> list[tuple[str, int]]:
    """What each collective of a program gives to a device: its name and its bytes."""
    found = re.findall(r"= (.*?) (all-\w+|collective-permute|reduce-scatter)(?:-start)?\(", compiled.as_text())
    shapes = [(name, re.findall(r"(\w+)\[([\d,]*)\]", shape)) for shape, name in found]
    size = lambda kind, dims: BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n)
    return [(name, sum(size(*one) for one in shape)) for name, shape in shapes]


def moved(compiled) -> int:
    """The most bytes of one array that is put together from its pieces; sums are none."""
    return max([size for name, size in sent(compiled) if name not in ("all-reduce", "reduce-scatter")], default=0)


def near(got, want, most=2e-2):
    got, want = (np.asarray(a, np.float32) for a in (got, want))
    assert np.abs(got - want).max() <= most * np.abs(want).max()


def same(got, want):
    """Bit for bit where our kernels multiply; XLA's sums differ with the number of rows."""
    near(got, want, 0 if native.unavailable() is None else 2e-2)


def normal(*shape, dtype=F32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def packed(name, *shape, seed=0):
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jax.tree.map(jnp.asarray, encode(w, named(name)))


# ---- models -----------------------------------------------------------------------------------------------

step = jax.jit(jaxllm.forward, static_argnums=0, donate_argnums=3)


@functools.cache
def model(kind: str, form: str | None) -> tuple[ModelConfig, dict]:
    blocks = (Block(MIXER, FFN[kind], RMS),) * 2
    config = ModelConfig(256, 256, blocks, norm=RMS, tied=False, max_len=64, dtype="bfloat16")
    made = Model(config, random_model.params(config, dtype="bfloat16"))
    return config, (quant.quantize_model(made, form) if form else made).params


def smallest(params: dict) -> int:
    """The bytes of the smallest matrix, by its codes where it is packed."""
    leaves = jax.tree.leaves(params, is_leaf=lambda a: isinstance(a, QTensor))
    return min((a.codes if isinstance(a, QTensor) else a).nbytes for a in leaves if a.ndim > 1 and a.shape[0] > 8)


TOKENS = np.random.default_rng(0).integers(0, 256, (4, 9)).astype(np.int32)


@functools.cache
def alone(kind: str, form: str | None) -> list[np.ndarray]:
    """Logits of a chunk of 8 tokens and of one more, on one device."""
    config, params = model(kind, form)
    first, state = step(config, params, TOKENS[:, :8], init_state(config, 4, 64, chunk=8))
    return [np.asarray(first), np.asarray(step(config, params, TOKENS[:, 8:], state)[0])]


def over_mesh(kind: str, form: str | None, over: Mesh):
    """(logits, program, state) of the same two calls on a mesh."""
    config, params = model(kind, form)
    params = placed(params, over)
    state = jax.tree.map(
        lambda a: put(a, over, *("data", "model")[: 2 if a.ndim == 4 else min(a.ndim, 1)]),
        init_state(config, 4, 64, chunk=8),
    )
    for part in (TOKENS[:, :8], TOKENS[:, 8:]):
        tokens = put(part, over, "data")
        program = step.lower(config, params, tokens, state).compile()
        logits, state = program(params, tokens, state)
        yield np.asarray(logits), program, state


CASES = [("dense", None, shape) for shape in ((1, 2), (1, 4), (2, 1), (2, 2))]
CASES += [("dense", "q4f16_1", (1, 4)), ("dense", "q4f16_1", (2, 1)), ("dense", "int8", (2, 2))]
CASES += [("moe", None, (2, 2)), ("moe", "q4f16_1", (1, 4)), ("moe", "int8", (1, 2))]


@pytest.mark.parametrize(("kind", "form", "shape"), CASES, ids=str)
def test_a_model_over_a_mesh(kind, form, shape):
    _, params = model(kind, form)
    for (got, program, state), want in zip(over_mesh(kind, form, mesh(*shape)), alone(kind, form), strict=True):
        near(got, want)
        if shape[1] == 1:  # rows alone are cut
            same(got, want)
        assert moved(program) < smallest(params) / 4
        if kind == "dense":  # two sums of activations a layer, and one of the embeddings
            least = got.shape[1] * 4 // shape[0] * 256 * 4
            sums = sum(name == "all-reduce" and size >= least for name, size in sent(program))
            assert sums == (0 if shape[1] == 1 else 5 if form is None else 4)
        assert program.memory_analysis().alias_size_in_bytes >= nbytes(state) // math.prod(shape)
        assert state.layers[0].k.sharding.shard_shape((4, 4, 64, 32)) == (4 // shape[0], 4 // shape[1], 64, 32)


@pytest.mark.parametrize("form", [None, "q4f16_1"])
def test_without_rules_weights_are_gathered(form, monkeypatch):
    if form is None and native.unavailable():
        pytest.skip("XLA splits its own products")
    monkeypatch.setattr(partition, "on_mesh", lambda: False)
    jax.clear_caches()
    for (got, program, _), want in zip(over_mesh("dense", form, mesh(1, 4)), alone("dense", form), strict=True):
        near(got, want)
        assert moved(program) >= smallest(model("dense", form)[1])
    jax.clear_caches()


def test_generating():
    config, params = model("dense", "q4f16_1")
    prompts = [TOKENS[0].tolist(), TOKENS[1, :3].tolist()]
    run = lambda params: decode.generate(Model(config, params), prompts, max_new_tokens=6)
    want, got = run(params), run(placed(params, mesh(1, 4)))
    assert [g.tokens for g in got] == [g.tokens for g in want]


def test_the_example(capsys):
    """That of docs/sharding.md: the text of one device."""
    text = (pathlib.Path(__file__).parents[1] / "docs" / "sharding.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(compile(block, "sharding.md", "exec"), names)
    assert names["sharded"].params["layers"][0]["mixer"]["q"]["w"].sharding.spec == P("model")
    alone = decode.generate(jaxllm.load(), "def read_lines(path):\n", stop="\n\n").text
    assert capsys.readouterr().out.strip() == alone.strip()


def test_gradients_of_a_model():
    config, params = model("dense", None)
    loss = lambda params, tokens: jaxllm.forward(config, params, tokens)[0].std()
    slopes = jax.jit(jax.grad(loss))
    over = mesh(2, 2)
    args = placed(params, over), put(TOKENS[:, :4], over, "data")
    program = slopes.lower(*args).compile()
    jax.tree.map(partial(near, most=5e-2), program(*args), slopes(params, TOKENS[:, :4]))
    assert moved(program) < smallest(params)


# ---- products ---------------------------------------------------------------------------------------------

FORMATS = ["q4f16_1", "int8", "int4", "int3_g32", "int6_g32", "uint5_g32", "nf4", "mxfp4", "nvfp4", "fp8_e4m3"]
FORMATS += ["fp8_e4m3_block", "w8a8"]


def pieces(q, over, axis):
    """A weight with rows (0) or columns (1) over "model"."""
    axes = [None, None]
    axes[axis] = "model"
    cut = lambda a: a.ndim == 2 and a.shape[axis] % over.shape["model"] == 0
    return jax.tree.map(lambda a: put(a, over, *(axes if cut(a) else ())), q)


@pytest.mark.parametrize("name", FORMATS)
def test_packed_weights(name):
    x, q = normal(8, 512, dtype=BF16), packed(name, 64, 512)
    f = jax.jit(lambda x, q: ops.matmul(x, q, out=F32))
    want, over = f(x, q), mesh(2, 2)
    rows = put(x, over, "data"), pieces(q, over, 0)
    near(f(*rows), want, 0 if native_packed.refuses(x, q) is None else 1e-6)  # XLA's sums differ with the rows
    assert f(*rows).sharding.spec == P("data", "model")
    assert sent(f.lower(*rows).compile()) == []
    columns = put(x, over, "data", "model"), pieces(q, over, 1)
    near(f(*columns), want, 1e-5)
    gathers = moved(f.lower(*columns).compile()) >= q.codes.nbytes
    assert gathers == (name == "w8a8")  # whose activations are rounded by what a whole row has


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_plain_weights(dtype):
    x, w, over = normal(8, 64, dtype=dtype), normal(32, 64, dtype=dtype, seed=1), mesh(2, 2)
    f = jax.jit(ops.matmul)
    want = f(x, w)
    cut = put(x, over, "data"), put(w, over, "model")
    same(f(*cut), want)
    assert sent(f.lower(*cut).compile()) == []
    summed = put(x, over, "data", "model"), put(w, over, None, "model")
    near(f(*summed), want, 1e-2 if dtype == BF16 else 1e-6)
    # Partial sums are added in f32, whatever the result is.
    assert sent(f.lower(*summed).compile()) == [("all-reduce", 4 * 32 * 4)]
    # What two would have along one axis of the mesh, the larger keeps.
    both = put(x, over, "model"), put(w, over, "model")
    same(f(*both), want)
    ((name, size),) = sent(f.lower(*both).compile())
    assert name == "all-gather"
    assert size <= 4 * x.size < 4 * w.size


@pytest.mark.parametrize(("name", "columns"), [("q4f16_1", 96), ("q4f16_1", 80), ("int5_g32", 72), ("int8", 50)])
def test_columns_that_do_not_divide(name, columns):
    """Three groups, or codes that fill up a group: gathered, and right."""
    x, q, over = normal(4, columns), packed(name, 16, columns), mesh(1, 2)
    f = jax.jit(ops.matmul)
    near(f(put(x, over, None, "model"), pieces(q, over, 1)), f(x, q), 1e-6)


@pytest.mark.parametrize("shape", [(2, 2), (1, 4)])
def test_more_devices_than_kv_heads(shape):
    """8 heads over 4 devices are 2 kv heads in 2 halves; half an axis of the mesh cuts one, half the other."""
    over, q, k = mesh(*shape), normal(2, 3, 8 * 16), normal(2, 2, 32, 16, seed=1)
    mask = jnp.ones((2, 3, 32), bool)
    f = jax.jit(lambda q, k: ops.attend(q.reshape(2, 3, 2, 4, 16), k, k, mask, scale=0.3).reshape(2, 3, 128))
    cut = put(q, over, None, None, ("data", "model")), put(k, over, None, "data")
    same(f(*cut), f(q, k))
    assert moved(f.lower(*cut).compile()) <= (0 if shape == (2, 2) else q.nbytes)


@pytest.mark.parametrize("form", [None, "int8", "int4"])
def test_attention(form):
    over, q = mesh(2, 2), normal(2, 3, 4, 2, 32, dtype=BF16)
    k, mask = normal(2, 4, 64, 32, dtype=BF16, seed=1), jnp.tril(jnp.ones((2, 3, 64), bool), 20)
    if form:
        k = quantized(k, empty(form, k.shape, BF16))
    sinks = normal(4, 2, seed=2)
    f = jax.jit(lambda q, k, mask, sinks: ops.attend(q, k, k, mask, sinks=sinks, scale=0.3))
    want = f(q, k, mask, sinks)
    here = jax.tree.map(lambda a: put(a, over, "data", "model"), k)
    cut = put(q, over, "data", None, "model"), here, put(mask, over, "data"), put(sinks, over, "model")
    same(f(*cut), want)
    assert sent(f.lower(*cut).compile()) == []


def test_gated():
    x, over = normal(8, 64, dtype=BF16), mesh(2, 2)
    f = jax.jit(lambda x, gate, up: ops.gated(x, gate, up, "silu", lambda act, a, b: jax.nn.silu(a) * b))
    for weight in (partial(packed, "q4f16_1", 32, 64), partial(normal, 32, 64, dtype=BF16)):
        gate, up = weight(seed=1), weight(seed=2)
        cut = put(x, over, "data"), pieces(gate, over, 0), pieces(up, over, 0)
        same(f(*cut), f(x, gate, up))
        assert sent(f.lower(*cut).compile()) == []


@pytest.mark.parametrize("axes", [("model",), (None, "model"), (("data", "model"),), ("data", "model")])
def test_rows_of_an_embedding(axes):
    over, w, tokens = mesh(2, 2), normal(64, 32, dtype=BF16), jnp.asarray([[3, 63, 0], [16, 64, -1]])
    f = jax.jit(ops.embed)
    want = np.asarray(f(w, tokens), np.float32)
    assert np.isnan(want).any(-1).tolist() == [[False] * 3, [False, True, True]]
    for cut in ((put(w, over, *axes), tokens), (put(w, over, *axes), put(tokens, over, "data"))):
        np.testing.assert_array_equal(np.asarray(f(*cut), np.float32), want)
        assert moved(f.lower(*cut).compile()) < w.nbytes / 4


@pytest.mark.parametrize("form", [None, "q4f16_1", "nf4"])
@pytest.mark.parametrize("rows", [5, 70])
def test_experts(form, rows):
    over, expert = mesh(1, 4), jnp.sort(jnp.asarray(np.random.default_rng(0).integers(0, 8, rows), jnp.int32))
    x, w = normal(rows, 256), packed(form, 8, 32, 256) if form else normal(8, 32, 256, seed=1)
    size = w.codes.nbytes if form else w.nbytes
    f = jax.jit(ops.grouped_matmul)
    want = f(x, w, expert)
    for axis in range(3):
        axes = tuple("model" if i == axis else None for i in range(3))
        cut = jax.tree.map(lambda a, axes=axes: put(a, over, *axes), w)
        near(f(x, cut, expert), want, 1e-6 if axis else 0)
        assert moved(f.lower(x, cut, expert).compile()) < size / 8


# ---- transformations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [None, "q4f16_1", "nf4"])
@pytest.mark.parametrize("axis", [0, 1])
def test_gradients(form, axis):
    over, x = mesh(2, 2), normal(8, 128)
    w = packed(form, 64, 128) if form else normal(64, 128, seed=1)
    parts = lambda w: w.scale.astype(F32) if form else w
    loss = lambda x, part, w: (ops.matmul(x, replace(w, scale=part) if form else part) ** 2).sum()
    slopes = jax.jit(jax.grad(loss, (0, 1)))
    cut = pieces(w, over, axis)
    got, want = slopes(put(x, over, "data"), parts(cut), cut), slopes(x, parts(w), w)
    jax.tree.map(partial(near, most=1e-5), got, want)


def test_loops_and_vmap():
    over, w = mesh(2, 2), normal(64, 64) / 8
    x, many = normal(4, 64, seed=1), normal(6, 4, 64, seed=2)
    loop = jax.jit(lambda x, w: jax.lax.fori_loop(0, 3, lambda _, x: ops.matmul(x, w), x))
    cut = put(x, over, "data"), put(w, over, "model")
    same(loop(*cut), loop(x, w))
    assert moved(loop.lower(*cut).compile()) < w.nbytes / 4
    each = jax.jit(jax.vmap(jax.vmap(ops.matmul, (0, None)), (None, 0)))
    both = jnp.stack([w, -w])
    cut = put(many, over, "data"), put(both, over, None, "model")
    same(each(*cut), each(many, both))
    assert sent(each.lower(*cut).compile()) == []
    assert each(*cut).sharding.shard_shape((2, 6, 4, 64)) == (2, 3, 4, 32)


def test_outside_jit_and_inside_shard_map():
    over, x, w = mesh(1, 4), normal(4, 64), normal(32, 64, seed=1)
    want = ops.matmul(x, w)
    cut = put(w, over, "model")
    same(ops.matmul(x, cut), want)
    specs = dict(in_specs=(P(), P("model")), out_specs=P(None, "model"))
    mapped = jax.shard_map(ops.matmul, mesh=over, **specs, check_vma=False)
    same(jax.jit(mapped)(x, cut), want)
    partly = dict(axis_names={"data"}, check_vma=False)
    some = jax.shard_map(ops.matmul, mesh=mesh(2, 2), in_specs=(P("data"), P()), out_specs=P("data"), **partly)
    same(jax.jit(some)(x, put(w, mesh(2, 2), "model")), want)


def test_where_shardy_is_off():
    over, x, w = mesh(2, 2), normal(8, 64), normal(32, 64, seed=1)
    cut = put(x, over, "data"), put(w, over, "model")
    shardy = jax.config.jax_use_shardy_partitioner
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        f = jax.jit(ops.matmul)
        same(f(*cut), ops.matmul(x, w))
        assert sent(f.lower(*cut).compile()) == []
    finally:
        jax.config.update("jax_use_shardy_partitioner", shardy)


# ---- kernels of other platforms ---------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_rules_hold_for_the_kernels_in_pallas(platform):
    """Interpreted. The rule sees the shapes; a kernel runs with those of its pieces."""
    over, x, q = mesh(2, 2), normal(8, 128), packed("q4f16_1", 64, 128)
    kernel = partial(dense.matmul, platform=platform, interpret=True)
    f = jax.jit(partition.split(kernel_of_pieces(kernel), "m k, n k -> m n"))
    for cut in ((put(x, over, "data"), pieces(q, over, 0)), (put(x, over, "data", "model"), pieces(q, over, 1))):
        near(f(*cut), kernel(x, q), 1e-6)
        assert moved(f.lower(*cut).compile()) == 0


def kernel_of_pieces(kernel):
    return lambda x, q: kernel(x, replace(q, columns=x.shape[1]))
