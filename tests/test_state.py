"""The state as a value: what is cut, copied, moved, forgotten or saved equals having computed it so."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import decode
from jaxllm.errors import CheckpointError, ContextError
from jaxllm.model import Model
from jaxllm.state import (
    EVICTED,
    State,
    evict,
    init_state,
    insert,
    load_state,
    nbytes,
    rewind,
    room,
    save_state,
    select_rows,
)
from tests import random_model
from tests.random_model import CONFIGS, REWINDS, causal, reference

QUICK = {"xla_backend_optimization_level": 0}  # compiling is nearly all the time these tests take
forward = jax.jit(jaxllm.forward, static_argnums=0, compiler_options=QUICK)
ATOL = 2e-5  # f32 against f64, or against another order of summation


@functools.cache
def params(name: str):
    return random_model.params(CONFIGS[name])


def feed(name: str, tokens: np.ndarray, state: State, chunk: int | None = None, n_new=None):
    """Append tokens [B, T] in pieces of `chunk` -> (logits [B, T, V], state).

    Pieces are padded to what the state takes, so that one program serves all; n_new [B] as in `forward`.
    """
    (B, T), outs = tokens.shape, []
    for start in range(0, T, chunk or state.chunk):
        piece = tokens[:, start : start + (chunk or state.chunk)]
        real = np.full(B, piece.shape[1], np.int32) if n_new is None else n_new
        padded = np.pad(piece, ((0, 0), (0, state.chunk - piece.shape[1])))
        out, state = forward(CONFIGS[name], params(name), padded, state, n_new=real)
        outs.append(np.asarray(out)[:, : piece.shape[1]])
    return np.concatenate(outs, 1), state


def new(name: str, batch: int = 3, max_len: int = 48, chunk: int = 6, **options) -> State:
    return init_state(CONFIGS[name], batch, max_len, chunk=chunk, **options)


def same(a: State, b: State) -> bool:
    """Equal to the bit, structure and all."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    alike = all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)
    return alike and jax.tree.structure(a) == jax.tree.structure(b)


# ---- against a plain forward with an explicit mask --------------------------------------------------------

FLAT = {
    "full": [{}, {}],
    "window": [dict(window=5), {}, dict(chunk=6)],
}


def masks(name: str, T: int, **eviction) -> list[np.ndarray]:
    return [causal(T, **own) & causal(T, **eviction) for own in FLAT[name]]


@pytest.mark.parametrize("chunk", [1, 3, 7, 60])
def test_any_chunks_give_the_plain_forward(chunk):
    """60 tokens through full caches and rings of window + chunk slots."""
    name, tokens = "window", random_model.tokens(2, 60)
    got, state = feed(name, tokens, new(name, 2, max_len=60, chunk=chunk))
    for row in range(2):
        want = reference(CONFIGS[name], params(name), tokens[row], masks(name, 60))
        np.testing.assert_allclose(got[row], want, atol=ATOL)
    assert state.length.tolist() == [60, 60]


@pytest.mark.parametrize(
    ("name", "chunk", "sinks"),
    [("full", 1, 2), ("full", 3, 0), ("full", 7, 2), ("window", 3, 2), ("window", 7, 0)],
)
def test_an_eviction_window_hides_exactly_the_rest(name, chunk, sinks):
    """Length is unbounded: 60 tokens in a state that was given 24."""
    tokens = random_model.tokens(1, 60)
    got, state = feed(name, tokens, new(name, 1, 24, chunk, window=8, sinks=sinks))
    want = reference(CONFIGS[name], params(name), tokens[0], masks(name, 60, window=8, sinks=sinks))
    np.testing.assert_allclose(got[0], want, atol=ATOL)
    assert max(c.pos.shape[1] for c in state.layers) <= sinks + 8 + chunk
    assert room(state) == np.inf


@pytest.mark.parametrize("name", ["mla", "parallel"])
def test_an_eviction_window_equals_slots_hidden_by_hand(name):
    """A full cache whose positions outside of the window are struck out before every token."""
    tokens = random_model.tokens(1, 30)
    got, _ = feed(name, tokens, new(name, 1, 30, 1, window=7, sinks=2))
    state = new(name, 1, 30, 1)
    for i in range(30):
        hidden = [
            dataclasses.replace(c, pos=jnp.where((c.pos >= 2) & (c.pos <= i - 7), -1, c.pos)) for c in state.layers
        ]
        out, state = feed(name, tokens[:, i : i + 1], dataclasses.replace(state, layers=tuple(hidden)))
        np.testing.assert_allclose(got[:, i], out[:, 0], atol=ATOL)


@pytest.mark.parametrize("name", CONFIGS)
def test_ragged_rows_equal_rows_alone(name):
    """Rows of 4, 6 and 0 new tokens in one call; padding leaves no trace."""
    tokens = random_model.tokens(3, 12)
    n_new = np.array([4, 6, 0], np.int32)
    out, state = feed(name, tokens[:, :6], new(name, 3), n_new=n_new)
    following = np.stack([tokens[i, n : n + 6] for i, n in enumerate(n_new)])
    after, state = feed(name, following, state)
    assert state.length.tolist() == [10, 12, 6]
    for i, n in enumerate(n_new):
        row = np.concatenate([tokens[i : i + 1, :n], following[i : i + 1]], 1)
        alone, _ = feed(name, row, new(name, 1))
        np.testing.assert_allclose(out[i, :n], alone[0, :n], atol=ATOL)
        np.testing.assert_allclose(after[i], alone[0, n:], atol=ATOL)


# ---- rewind and fork --------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 4, 20])
@pytest.mark.parametrize("name", REWINDS)
def test_rewind_equals_replay(name, before):
    """To the bit: five wrong tokens, back, the right ones; before and after the rings have wrapped."""
    tokens = random_model.tokens(3, 32)
    start = new(name)
    if before:
        _, start = feed(name, tokens[:, :before], start, 4)
    _, astray = feed(name, random_model.tokens(3, 5, seed=1), start)
    back = rewind(astray, before)
    got, _ = feed(name, tokens[:, before : before + 12], back)
    want, _ = feed(name, tokens[:, before : before + 12], start)
    np.testing.assert_array_equal(got, want)
    assert not np.array_equal(feed(name, tokens[:, before : before + 5], astray)[0], want[:, :5])


def test_rewind_of_each_row_to_its_own_length():
    tokens, after = random_model.tokens(3, 14), random_model.tokens(3, 3, seed=2)
    _, state = feed("window", tokens, new("window"))
    got, state = feed("window", after, rewind(state, jnp.array([9, 13, 14])))
    assert state.length.tolist() == [12, 16, 17]
    for row, kept in enumerate((9, 13, 14)):
        line = np.concatenate([tokens[row, :kept], after[row]])
        want = reference(CONFIGS["window"], params("window"), line, masks("window", kept + 3))
        np.testing.assert_allclose(got[row], want[kept:], atol=ATOL)


@pytest.mark.parametrize("name", ["full", "window", "mla"])
def test_rewind_leaves_nothing_of_a_tree(name):
    """Two children share a position; back at their root, neither is seen by the token that comes instead."""
    config, p, tokens = CONFIGS[name], params(name), random_model.tokens(3, 12)
    tree = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)
    _, state = feed(name, tokens[:, :8], new(name))
    _, grown = forward(config, p, tokens[:, 8:11], state, depth=np.array([0, 1, 1], np.int32), tree=tree)
    got, _ = feed(name, tokens[:, 11:], rewind(grown, 9))
    want, _ = feed(name, tokens[:, [8, 11]], state, 1)
    np.testing.assert_allclose(got[:, 0], want[:, 1], atol=ATOL)


def test_rewind_inside_jit():
    tokens = random_model.tokens(3, 10)
    _, state = feed("mla", tokens, new("mla"))
    assert same(jax.jit(rewind)(state, 7), rewind(state, 7))


@pytest.mark.parametrize("length", [-1, 11])
def test_rewind_to_nowhere(length):
    _, state = feed("full", random_model.tokens(3, 10), new("full"))
    with pytest.raises(ContextError, match="between 0 and"):
        rewind(state, length)


def test_rewind_further_than_a_ring_remembers():
    """Six are certain with a chunk of six, at once or in steps; evicted tokens are no hindrance."""
    _, state = feed("window", random_model.tokens(3, 30), new("window"))
    assert rewind(state, 24).length.tolist() == [24] * 3
    with pytest.raises(ContextError, match="overwritten"):
        rewind(state, 20)
    with pytest.raises(ContextError, match="overwritten"):
        rewind(rewind(state, 25), 20)
    less = evict(state, "oldest", count=27)
    assert rewind(less, 24).length.tolist() == [24] * 3


def test_rewind_in_an_eviction_window():
    _, state = feed("full", random_model.tokens(1, 30), new("full", 1, 24, 7, window=8, sinks=2), 3)
    line = random_model.tokens(1, 30)[0, :26]
    following = random_model.tokens(1, 3, seed=3)
    got, _ = feed("full", following, rewind(state, 26))
    want = reference(
        CONFIGS["full"], params("full"), np.concatenate([line, following[0]]), masks("full", 29, window=8, sinks=2)
    )
    np.testing.assert_allclose(got[0], want[26:], atol=ATOL)
    with pytest.raises(ContextError, match="overwritten"):
        rewind(state, 20)


def test_a_recurrent_layer_is_not_rewound():
    _, state = feed("recurrent", random_model.tokens(3, 6), new("recurrent"))
    with pytest.raises(ContextError, match="recurrent"):
        rewind(state, 3)
    with pytest.raises(ContextError, match="recurrent"):
        evict(state, "oldest", count=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_fork(name):
    """Two continuations of one state do not meet, and the state is what it was."""
    tokens, left, right = (random_model.tokens(3, 6, seed=s) for s in range(3))
    _, state = feed(name, tokens, new(name))
    copy = jax.tree.map(lambda a: jnp.array(np.asarray(a)), state)
    outs = [feed(name, side, state)[0] for side in (left, right, left)]
    assert same(state, copy)
    np.testing.assert_array_equal(outs[0], outs[2])
    for side, out in zip((left, right), outs, strict=False):
        want, _ = feed(name, np.concatenate([tokens, side], 1), new(name))
        np.testing.assert_array_equal(out, want[:, 6:])


# ---- rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_insert(name):
    """A prompt prefilled alone and put into a running batch goes on as if it had always been there."""
    _, busy = feed(name, random_model.tokens(3, 9), new(name, 3), 5)
    prompt, after = random_model.tokens(1, 11, seed=1), random_model.tokens(3, 5, seed=2)
    _, one = feed(name, prompt, new(name, 1), 6)
    got, state = feed(name, after, insert(busy, one, 1))
    alone, _ = feed(name, after[1:2], one)
    kept, _ = feed(name, after, busy)
    np.testing.assert_allclose(got[1], alone[0], atol=ATOL)
    np.testing.assert_array_equal(got[[0, 2]], kept[[0, 2]])
    assert state.length.tolist() == [14, 16, 14]
    assert same(jax.jit(insert)(busy, one, jnp.int32(1)), insert(busy, one, 1))


def test_insert_refuses_what_does_not_fit():
    busy = new("full", 3)
    for other in (new("full", 1, chunk=5), new("full", 1, max_len=40), new("mla", 1)):
        with pytest.raises(ContextError, match="same config and options"):
            insert(busy, other, 0)
    with pytest.raises(ContextError, match="one row, got 2"):
        insert(busy, new("full", 2), 0)
    wider = dataclasses.replace(CONFIGS["full"].blocks[0].mixer, head_dim=16)
    wide = random_model.config(*[random_model.block(wider)] * 2)
    with pytest.raises(ContextError, match="equal shape"):
        insert(busy, init_state(wide, 1, 48, chunk=6), 0)
    for row in (3, -1):
        with pytest.raises(ContextError, match="from 0 to 2"):
            insert(busy, new("full", 1), row)


@pytest.mark.parametrize("name", CONFIGS)
def test_select_rows(name):
    tokens, after = random_model.tokens(3, 6), random_model.tokens(3, 3, seed=1)
    _, state = feed(name, tokens, new(name))
    rows = [2, 0, 2]
    got, _ = feed(name, after, select_rows(state, np.array(rows)))
    want, _ = feed(name, np.concatenate([tokens[rows], after], 1), new(name), 6)
    np.testing.assert_allclose(got, want[:, 6:], atol=ATOL)
    with pytest.raises(ContextError, match="from 0 to 2"):
        select_rows(state, jnp.array([0, 3]))


# ---- eviction ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("name", FLAT)
def test_evict_oldest(name, sinks):
    """Tokens of 16 struck out by hand in the mask of those that follow, in every layer the same ones."""
    tokens, after = random_model.tokens(1, 16)[0], random_model.tokens(1, 4, seed=1)
    _, state = feed(name, tokens[None], new(name, 1))
    state = evict(evict(state, "oldest", count=5, sinks=sinks), "oldest", count=6, sinks=sinks)
    got, _ = feed(name, after, state)
    gone = np.ones((20, 20), bool)
    gone[16:, sinks : sinks + 11] = False
    line = np.concatenate([tokens, after[0]])
    want = reference(CONFIGS[name], params(name), line, [m & gone for m in masks(name, 20)])
    np.testing.assert_allclose(got[0], want[16:], atol=ATOL)
    held = np.concatenate([np.asarray(c.pos[0]) for c in state.layers])
    assert set(range(sinks, sinks + 11)).isdisjoint(held.tolist())
    assert EVICTED in held


def test_evict_oldest_in_an_eviction_window():
    """Counts from the oldest token the window still shows, not from one that is out of sight anyway."""
    tokens, after = random_model.tokens(1, 20)[0], random_model.tokens(1, 1, seed=1)
    _, state = feed("full", tokens[None], new("full", 1, 24, 7, window=8, sinks=2))
    got, _ = feed("full", after, evict(state, "oldest", count=3, sinks=2))
    mask = causal(21, window=8, sinks=2)
    mask[20, 13:16] = False
    want = reference(CONFIGS["full"], params("full"), np.concatenate([tokens, after[0]]), [mask, mask])
    np.testing.assert_allclose(got[0, 0], want[20], atol=ATOL)


@pytest.mark.parametrize("name", CONFIGS)
def test_evict_all(name):
    """As new: to the bit, whatever was there before."""
    _, state = feed(name, random_model.tokens(3, 30), new(name))
    got, _ = feed(name, random_model.tokens(3, 9, seed=1), evict(state, "all"))
    want, _ = feed(name, random_model.tokens(3, 9, seed=1), new(name))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("policy", [dict(policy="all"), dict(policy="oldest", count=4)])
def test_evict_only_some_rows(policy):
    _, state = feed("window", random_model.tokens(3, 12), new("window", 3))
    some = evict(state, **policy, rows=jnp.array([False, True, False]))
    everywhere = evict(state, **policy)
    assert same(select_rows(some, jnp.array([0, 2])), select_rows(state, jnp.array([0, 2])))
    assert same(select_rows(some, jnp.array([1])), select_rows(everywhere, jnp.array([1])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(policy="newest", count=1), "'oldest' and 'all', got 'newest'"),
        (dict(policy="oldest"), "count >= 1"),
        (dict(policy="oldest", count=2, sinks=-1), "sinks >= 0"),
        (dict(policy="all", count=2), "takes no count"),
    ],
)
def test_evict_refuses(arguments, message):
    with pytest.raises(ContextError, match=message):
        evict(new("full"), **arguments)


# ---- limits -----------------------------------------------------------------------------------------------


def test_overflow_outside_jit_is_an_error():
    _, state = feed("full", random_model.tokens(2, 6), new("full", 2, max_len=8))
    with pytest.raises(ContextError, match="would hold 9 tokens and the state has room for 8"):
        jaxllm.forward(CONFIGS["full"], params("full"), random_model.tokens(2, 3), state)
    assert room(state) == 2


@pytest.mark.parametrize("name", ["full", "window", "mla", "recurrent"])
def test_overflow_inside_jit_is_nan_for_that_row(name):
    """Row 0 overflows; the other row is what it was, and going back makes row 0 right again."""
    tokens, after = random_model.tokens(2, 6), random_model.tokens(2, 3, seed=1)
    _, state = feed(name, tokens, new(name, 2, max_len=8), n_new=np.array([6, 2], np.int32))
    got, overflown = feed(name, after, state)
    assert np.isnan(got[0]).all()
    want, _ = feed(name, np.concatenate([tokens[1:, :2], after[1:]], 1), new(name, 1))
    np.testing.assert_allclose(got[1], want[0, 2:], atol=ATOL)
    if name != "recurrent":
        back, _ = feed(name, after[:, :2], rewind(overflown, jnp.array([6, 2])))
        np.testing.assert_array_equal(back, feed(name, after[:, :2], state)[0])


def test_more_tokens_than_the_chunk():
    with pytest.raises(ContextError, match="7 tokens in one call, but this state takes 6"):
        jaxllm.forward(CONFIGS["full"], params("full"), random_model.tokens(3, 7), new("full"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("learned", dict(window=8), "relative positions"),
        ("full", dict(sinks=2), "need window="),
        ("full", dict(window=4, sinks=4), "fewer than the window"),
        ("full", dict(window=4, sinks=-1), "not negative"),
        ("full", dict(window=0), "a window goes from 1"),
        ("full", dict(window=97), "a window goes from 1"),
        ("full", dict(max_len=97), "made for 96"),
        ("full", dict(max_len=0), "at least 1"),
        ("full", dict(batch=0), "at least 1"),
        ("full", dict(chunk=0), "at least 1"),
        ("full", dict(dtype="int8"), "floating-point"),
    ],
)
def test_init_state_refuses(name, options, message):
    with pytest.raises(ContextError, match=message):
        new(name, **options)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("full", dict(tokens=np.ones((2, 3), np.float32)), "must be integers"),
        ("full", dict(tokens=np.ones(3, np.int32)), "must be \\[B, T\\]"),
        ("full", dict(tokens=random_model.tokens(3, 3)), "for 2 rows"),
        ("full", dict(n_new=np.array([3])), "n_new should be"),
        ("full", dict(n_new=np.array([3, 4])), "from 0 to the 3"),
        ("full", dict(n_new=np.array([-1, 3])), "from 0 to the 3"),
        ("full", dict(depth=np.arange(4)), "depth should be"),
        ("full", dict(tree=np.ones((3, 4), bool)), "tree should be"),
        ("recurrent", dict(depth=np.arange(3)), "cannot verify a tree"),
    ],
)
def test_forward_refuses(name, arguments, message):
    call = dict(tokens=random_model.tokens(2, 3), state=new(name, 2)) | arguments
    with pytest.raises(ContextError, match=message):
        jaxllm.forward(CONFIGS[name], params(name), **call)


# ---- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["window", "mla", "recurrent"])
def test_save_and_load(name, dtype, tmp_path):
    _, state = feed(name, random_model.tokens(3, 20), new(name, dtype=dtype))
    save_state(state, tmp_path / "state.safetensors")
    again = load_state(tmp_path / "state.safetensors", new(name, dtype=dtype))
    assert same(again, state)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    after = random_model.tokens(3, 3, seed=1)
    np.testing.assert_array_equal(feed(name, after, again)[0], feed(name, after, state)[0])


@pytest.mark.parametrize(
    "like",
    [
        dict(chunk=5),
        dict(max_len=47),
        dict(batch=2),
        dict(dtype="bfloat16"),
        dict(name="mla"),
        dict(window=40),
        dict(window=40, sinks=1),
    ],
)
def test_load_with_other_options(like, tmp_path):
    save_state(new("full"), tmp_path / "state")
    with pytest.raises(CheckpointError, match="another shape or model"):
        load_state(tmp_path / "state", new(**(dict(name="full") | like)))


@pytest.mark.parametrize("cut", [0, 4, 300, -1])
def test_load_a_damaged_file(cut, tmp_path):
    path = tmp_path / "state"
    save_state(new("full"), path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="not a saved state"):
        load_state(path, new("full"))


def test_load_what_is_not_there_or_something_else(tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(CheckpointError, match="not a saved state"):
        load_state(tmp_path / "nothing", new("full"))
    save_file({"weight": np.zeros(3)}, tmp_path / "weights")
    with pytest.raises(CheckpointError, match="not a saved state"):
        load_state(tmp_path / "weights", new("full"))


# ---- as a pytree: donated, mapped, differentiated ---------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "window", "mla"])
def test_a_step_reuses_the_memory_of_its_state(name):
    """Donated, the state is updated in place: no second copy of it, no temporaries of its size."""
    config = dataclasses.replace(CONFIGS[name], max_len=8192)
    state = init_state(config, 4, 8192, chunk=1, window=4096)
    step = jax.jit(jaxllm.forward, static_argnums=0, donate_argnums=3)
    tokens = jax.ShapeDtypeStruct((4, 1), jnp.int32)
    memory = step.lower(config, params(name), tokens, state).compile().memory_analysis()
    assert nbytes(state) <= memory.alias_size_in_bytes <= nbytes(state) + 64 * len(jax.tree.leaves(state))
    largest = max(nbytes(dataclasses.replace(state, layers=(c,))) for c in state.layers)
    assert memory.temp_size_in_bytes < largest / 2


def test_nbytes_counts_every_array():
    state = new("full", 2, 48)
    a_layer = 2 * 48 * (2 * 8) * 4 * 2 + 2 * 48 * 4
    assert nbytes(state) == 2 * a_layer + 2 * 4
    assert nbytes(jax.eval_shape(lambda: new("full", 2, 48))) == nbytes(state)


@pytest.mark.parametrize("name", ["window", "mla", "recurrent"])
def test_vmap(name):
    """Over a leading axis of tokens and states: the same as one after the other."""
    tokens = random_model.tokens(2, 3, 6)
    states = [feed(name, random_model.tokens(3, 4, seed=s), new(name))[1] for s in range(2)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *states)
    run = lambda t, s: jaxllm.forward(CONFIGS[name], params(name), t, s)
    got, after = jax.jit(jax.vmap(run), compiler_options=QUICK)(tokens, stacked)
    for i in range(2):
        want, state = feed(name, tokens[i], states[i])
        np.testing.assert_allclose(got[i], want, atol=ATOL)
        assert np.array_equal(after.length[i], state.length)


@pytest.mark.parametrize(("name", "batch"), [("mla", 2), ("moe", 2), ("moe", 8), ("recurrent", 2)])
def test_gradients_match_finite_differences(name, batch):
    """Of the mean negative log-likelihood, leaf by leaf along the gradient; batch 8 sorts rows by expert."""
    config, p = CONFIGS[name], params(name)
    tokens = random_model.tokens(batch, 9)

    def loss(p):
        logits, _ = jaxllm.forward(config, p, tokens[:, :-1])
        own = jax.nn.log_softmax(logits, -1)
        return -jnp.take_along_axis(own, tokens[:, 1:, None], -1).mean()

    run = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
    _, gradient = run(p)
    leaves, tree = jax.tree.flatten(p)
    slopes = jax.tree.leaves(gradient)
    assert all(np.isfinite(g).all() for g in slopes)
    assert all(np.abs(g).max() > 0 for g in slopes)
    for i in range(0, len(leaves), 3):
        size = float(jnp.linalg.norm(slopes[i]))
        step = slopes[i] / size * 5e-3
        up, down = (run(tree.unflatten([*leaves[:i], leaves[i] + s * step, *leaves[i + 1 :]]))[0] for s in (1, -1))
        assert (float(up) - float(down)) / 1e-2 == pytest.approx(size, rel=0.03, abs=2e-4)


# ---- a prefix that cannot be cut back ---------------------------------------------------------------------


def test_a_prefix_past_a_ring_is_computed_again():
    """generate falls back to the whole prompt where a sliding window has forgotten too much of the prefix."""
    model = Model(CONFIGS["window"], params("window"))
    line = random_model.tokens(40)[:40].tolist()
    first = decode.generate(model, line, max_new_tokens=2, prefill_chunk_size=4)
    prompt = [*line[:20], 3]
    again = decode.generate(model, prompt, max_new_tokens=4, prefix=first.prefix, prefill_chunk_size=4)
    assert again[0].tokens == decode.generate(model, prompt, max_new_tokens=4)[0].tokens
