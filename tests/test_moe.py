"""Routed experts: the grouped product against every expert computed and masked, in f64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import layers, ops
from jaxllm.config import MoE

IN, OUT, EXPERTS = 12, 10, 6
FEW, MANY = ops.FEW_ROWS, 5 * ops.BLOCK_ROWS + 7
LOADS = {
    "even": lambda rows: np.arange(rows) * EXPERTS // rows,
    "uneven": lambda rows: np.sort(np.random.default_rng(1).geometric(0.5, rows) % EXPERTS),
    "gaps": lambda rows: np.sort(np.random.default_rng(2).choice([1, 4], rows)),
    "all on the first": lambda rows: np.zeros(rows, int),
    "all on the last": lambda rows: np.full(rows, EXPERTS - 1),
}


def operands(rows, *, experts=EXPERTS, lead=()):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*lead, rows, IN)).astype(np.float32)
    w = rng.normal(size=(*lead, experts, OUT, IN)).astype(np.float32)
    return x, w


def masked(x, w, expert):
    """Every expert on every row, then the one that counts."""
    every = np.einsum("ri,eoi->reo", x.astype(np.float64), w.astype(np.float64))
    return (every * (expert[:, None] == np.arange(len(w)))[..., None]).sum(1)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1, MANY])
def test_grouped_product_is_the_masked_one(rows, load):
    x, w = operands(rows)
    expert = LOADS[load](rows)
    got = ops.grouped_matmul(x, jnp.asarray(w), jnp.asarray(expert))
    np.testing.assert_allclose(got, masked(x, w, expert), atol=1e-5)


def test_the_portable_form_is_the_masked_one():
    """What other platforms than the CPU run."""
    x, w = operands(MANY)
    expert = LOADS["gaps"](MANY)
    got = ops._ragged(jnp.asarray(x), jnp.asarray(w), jnp.asarray(expert))
    np.testing.assert_allclose(got, masked(x, w, expert), atol=1e-5)


@pytest.mark.parametrize("load", ["uneven", "gaps", "all on the last"])
@pytest.mark.parametrize("rows", [FEW, MANY])
def test_gradients_are_those_of_the_masked_product(rows, load):
    x, w = operands(rows)
    expert = LOADS[load](rows)
    chosen = jax.nn.one_hot(expert, EXPERTS)

    def loss(product):
        return lambda x, w: jnp.sin(product(x, w)).sum()

    ours = loss(lambda x, w: ops.grouped_matmul(x, w, jnp.asarray(expert)))
    plain = loss(lambda x, w: jnp.einsum("ri,eoi,re->ro", x, w, chosen))
    for got, want in zip(jax.grad(ours, (0, 1))(x, w), jax.grad(plain, (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
    along = (np.ones_like(x), np.ones_like(w))
    second = [jax.jvp(jax.grad(f, (0, 1)), (x, w), along)[1] for f in (ours, plain)]
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-3), *second)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rows", [FEW, MANY])
def test_vmap_over_a_leading_axis(rows, shared):
    x, w = operands(rows, lead=(3,))
    expert = np.stack([LOADS[load](rows) for load in ("even", "gaps", "all on the first")])
    weights = w[0] if shared else w
    product = jax.vmap(ops.grouped_matmul, in_axes=(0, None if shared else 0, 0))
    got = product(jnp.asarray(x), jnp.asarray(weights), jnp.asarray(expert))
    want = [masked(x[i], w[0 if shared else i], expert[i]) for i in range(3)]
    np.testing.assert_allclose(got, np.stack(want), atol=1e-5)


def blocks(monkeypatch, x, w, expert) -> int:
    """How many blocks the CPU form multiplies."""
    done, plain = [], ops._dot

    def counted(a, b):
        jax.debug.callback(lambda: done.append(1))
        return plain(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(ops, "_dot", counted)
        jax.block_until_ready(ops.grouped_matmul(x, jnp.asarray(w), jnp.asarray(expert)))
        jax.effects_barrier()
    return len(done)


def test_work_grows_with_rows_and_not_with_experts(monkeypatch):
    x, few = operands(MANY)
    _, many = operands(MANY, experts=16 * EXPERTS)
    expert = LOADS["gaps"](MANY)
    full = [-(-n // ops.BLOCK_ROWS) for n in np.bincount(expert)]
    assert blocks(monkeypatch, x, few, expert) == sum(full)
    assert blocks(monkeypatch, x, many, expert) == sum(full)
    assert blocks(monkeypatch, x[: MANY // 2], few, expert[: MANY // 2]) <= sum(full) // 2 + 2


def flops(rows, experts) -> float:
    x, w = operands(rows, experts=experts)
    product = jax.jit(ops.grouped_matmul).lower(x, w, np.zeros(rows, np.int32))
    return product.compile().cost_analysis()["flops"]


def test_a_few_rows_cost_what_they_multiply():
    assert flops(8, 64) < 1.2 * flops(8, 4)
    assert flops(16, 64) > 1.8 * flops(8, 64)


# ---- the whole feed-forward ------------------------------------------------------------------------------


def feed_forward(m: MoE, width: int):
    rng = np.random.default_rng(3)
    shapes = {"gate": (m.hidden, width), "up": (m.hidden, width), "down": (width, m.hidden)}
    p = {k: {"w": rng.normal(size=(m.experts, *s)).astype(np.float32) * 0.3} for k, s in shapes.items()}
    if m.bias:
        for k, s in shapes.items():
            p[k]["b"] = rng.normal(size=(m.experts, s[0])).astype(np.float32)
    return p


def every_expert(m: MoE, p, x, expert, weight):
    """Each expert on each row; row n of expert e counts weight[n, i] where expert[n, i] = e."""
    share = np.zeros((len(x), m.experts))
    np.put_along_axis(share, expert, weight, 1)
    out = np.zeros(x.shape)
    for e in range(m.experts):
        of = {k: (v["w"][e].astype(np.float64), v["b"][e] if m.bias else 0.0) for k, v in p.items()}
        rows = x * share[:, e : e + 1] if m.weigh == "input" else x
        gate, up = (rows @ of[k][0].T + of[k][1] for k in ("gate", "up"))
        y = (gate / (1 + np.exp(-gate)) * up) @ of["down"][0].T + of["down"][1]
        out += np.where(share[:, e : e + 1] > 0, y, 0) * (1 if m.weigh == "input" else share[:, e : e + 1])
    return out


@pytest.mark.parametrize("rows", [3, 90])
@pytest.mark.parametrize(("bias", "weigh"), [(False, "output"), (True, "output"), (False, "input")])
def test_routed_experts_are_every_expert_weighed(rows, bias, weigh):
    m = MoE(experts=8, top_k=3, hidden=20, act="silu", bias=bias, weigh=weigh)
    p, rng = feed_forward(m, 16), np.random.default_rng(4)
    x = rng.normal(size=(rows, 16)).astype(np.float32)
    expert = np.argsort(rng.random((rows, 7)), 1)[:, :3].astype(np.int32)  # expert 7 is never chosen
    weight = rng.uniform(0.1, 1, (rows, 3)).astype(np.float32)
    got = layers.routed(m, p, jnp.asarray(x), jnp.asarray(expert), jnp.asarray(weight))
    np.testing.assert_allclose(got, every_expert(m, p, x, expert, weight), atol=2e-5)


def test_gradients_reach_experts_router_and_input():
    m = MoE(experts=5, top_k=2, hidden=20, act="silu", renorm=True)
    p = feed_forward(m, 16)
    p["router"] = {"w": np.random.default_rng(5).normal(size=(5, 16)).astype(np.float32)}
    x = np.random.default_rng(6).normal(size=(90, 16)).astype(np.float32)

    def ours(p, x):
        expert, weight = layers.route(m, p["router"], x)
        return jnp.sin(layers.routed(m, p, x, expert, weight)).sum()

    def plain(p, x):
        share = jax.nn.softmax(x @ p["router"]["w"].T, -1)
        kept = share >= jnp.sort(share, -1)[:, -2:-1]
        share = jnp.where(kept, share, 0)
        share = share / share.sum(-1, keepdims=True)
        gate, up = (jnp.einsum("nd,efd->nef", x, p[k]["w"]) for k in ("gate", "up"))
        every = jnp.einsum("nef,edf->ned", jax.nn.silu(gate) * up, p["down"]["w"])
        return jnp.sin(jnp.einsum("ned,ne->nd", every, share)).sum()

    got, want = (jax.grad(f, (0, 1))(p, jnp.asarray(x)) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)
