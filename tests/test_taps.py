"""Activations by name: what the table of taps.py promises, and that nothing is paid where nothing is asked."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import Taps, layers, taps
from jaxllm.errors import JaxllmError
from jaxllm.state import init_state
from tests import random_model
from tests.random_model import CONFIGS, attention, block, config, mla, moe

QUICK = {"xla_backend_optimization_level": 0}
B, T, S = 2, 7, 12
SIZES = dict(B=B, T=T, S=S, D=32, H=4, K=2, h=8, F=40, k=3, N=B * T, J=32, f=24)
MODELS = {
    "attention": config(block(attention(sinks=False)), block()),
    "moe": config(block(ffn=moe(top_k=3, shared=0))),
    "moe-shared": config(block(ffn=moe(top_k=3, shared=20))),
    "mla": config(block(mla())),
    "parallel": config(block(parallel="shared"), block(parallel="split", post=True)),
}
ALWAYS = {"in", "mixer.in", "mixer.heads", "mixer.out", "mixer.scores", "ffn.in", "ffn.out", "out"}
ATTENTION = {"mixer.q", "mixer.k", "mixer.v", "mixer.joined"}
ROUTED = {"ffn.experts", "ffn.weights", "ffn.routed"}
POINTS = {
    "attention": ALWAYS | ATTENTION | {"mid", "ffn.hidden"},
    "moe": ALWAYS | ATTENTION | ROUTED | {"mid"},
    "moe-shared": ALWAYS | ATTENTION | ROUTED | {"mid", "ffn.hidden"},
    "mla": ALWAYS | {"mid", "ffn.hidden"},
    "parallel": ALWAYS | ATTENTION | {"ffn.hidden"},
}
OWN_SIZES = {"mla": dict(h=mla().v_dim), "moe-shared": dict(F=20)}
TOKENS = random_model.tokens(B, T)


@functools.cache
def params(name: str):
    return random_model.params(MODELS[name])


def capture(name: str, what: Taps | None, given=None):
    """(logits, kept) of two rows in a state of twelve slots."""

    state = init_state(MODELS[name], B, S, chunk=T)
    return call(MODELS[name], params(name) if given is None else given, TOKENS, what, state)[:2]


def call(c, p, tokens, what: Taps | None, state=None, **more):
    """`jaxllm.capture` in a program of its own."""
    run = lambda p, tokens, state: jaxllm.capture(c, p, tokens, what, state, **more)
    return jax.jit(run, compiler_options=QUICK)(p, tokens, state)


def documented() -> dict[str, str]:
    """Point -> shape, from the table in the module's docstring."""
    rows = re.findall(r"^\| ([a-z.]+) +\| ([^|]*?) +\|", taps.__doc__, re.MULTILINE)
    return {name: shape for name, shape in rows if name != "point"}


def shape(text: str, **own: int) -> tuple[int, ...]:
    sizes = SIZES | own
    return tuple(sizes[letter] for letter in re.search(r"\[(.*)\]", text)[1].split(", "))


# ---- names and shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_documented_point(name):
    """Each model has exactly its points, each of the documented shape and type."""
    table = documented()
    _, kept = capture(name, Taps(keep=("**",)))
    blocks = len(MODELS[name].blocks)
    assert set(kept) == {"embed", "norm"} | {f"layers.{i}.{p}" for i in range(blocks) for p in POINTS[name]}
    for full, x in kept.items():
        point = full.split(".", 2)[-1]
        want = table.get(point, "[B, T, D]")
        assert x.shape == shape(want, **OWN_SIZES.get(name, {})), full
        assert x.dtype == (jnp.int32 if "i32" in want else jnp.float32), full


def test_the_table_is_complete():
    assert set(documented()) == set.union(*POINTS.values())


def test_patterns():
    """A star stays between two dots, so the layers' "out" are not also those of mixer and feed-forward."""
    _, kept = capture("attention", Taps(keep=("layers.*.out", "layers.1.mixer.[qk]", "emb??", "**.mid")))
    layers = {f"layers.{i}.{point}" for i in range(2) for point in ("out", "mid")}
    assert set(kept) == layers | {"layers.1.mixer.q", "layers.1.mixer.k", "embed"}


@pytest.mark.parametrize(
    ("name", "pattern", "fits"),
    [
        ("layers.0.out", "layers.*.out", True),
        ("layers.0.ffn.out", "layers.*.out", False),
        ("layers.0.ffn.out", "layers.**.out", True),
        ("layers.0.out", "layers.**.out", True),
        ("layers.0.out", "**", True),
        ("layers.0.out", "**.0.*", True),
        ("layers.0.out", "*", False),
        ("layers.0.out", "layers.0", False),
        ("layers.0.out", "layers.0.out.**", True),
        ("layers.10.out", "layers.[01].out", False),
        ("layers.0.out", "", False),
    ],
)
def test_matches(name, pattern, fits):
    assert taps.fits(name, pattern) is fits


def test_the_residual_stream_adds_up():
    for name in ("attention", "moe", "mla"):
        logits, kept = capture(name, Taps(keep=("**",)))
        first = {k.removeprefix("layers.0."): v for k, v in kept.items()}
        np.testing.assert_array_equal(kept["embed"], first["in"])
        np.testing.assert_allclose(first["mid"], first["in"] + first["mixer.out"], atol=1e-6)
        np.testing.assert_allclose(first["out"], first["mid"] + first["ffn.out"], atol=1e-6)
        head = np.asarray(params(name)["head"]["w"])
        np.testing.assert_allclose(logits, np.asarray(kept["norm"]) @ head.T, atol=1e-5)


# ---- nothing asked, nothing paid --------------------------------------------------------------------------


def program(name: str, call) -> str:
    state = jax.eval_shape(lambda: init_state(CONFIGS[name], B, S, chunk=T))
    shapes = jax.eval_shape(lambda: random_model.params(CONFIGS[name]))

    def run(params, state):
        return call(CONFIGS[name], params, jnp.asarray(TOKENS), state)

    return jax.jit(run).lower(shapes, state).as_text()


class NoRecorder:
    """What the maths would look like had nobody thought of taps."""

    def __init__(self, taps):
        assert taps is None

    def at(self, prefix):
        return self

    def wants(self, name):
        return False

    def __call__(self, name, x):
        return x

    def finish(self):
        return {}


@pytest.mark.parametrize("name", CONFIGS)
def test_off_is_the_same_program_to_the_byte(name, monkeypatch):
    off = program(name, lambda c, p, t, s: layers.hidden(c, p, t, s, taps=None)[:2])
    unsaid = program(name, lambda c, p, t, s: layers.hidden(c, p, t, s)[:2])
    unasked = program(name, lambda c, p, t, s: layers.hidden(c, p, t, s, taps=Taps())[:2])
    asked = program(name, lambda c, p, t, s: layers.hidden(c, p, t, s, taps=Taps(keep=("embed",))))
    monkeypatch.setattr(layers, "Recorder", NoRecorder)
    without = program(name, lambda c, p, t, s: layers.hidden(c, p, t, s)[:2])
    assert off == unsaid == unasked == without
    assert asked != off
    assert "callback" not in off


def test_keeping_changes_no_logits():
    plain, nothing = capture("attention", None)
    logits, _ = capture("attention", Taps(keep=("layers.*.mixer.q", "layers.*.ffn.*", "norm")))
    assert nothing == {}
    np.testing.assert_array_equal(plain, logits)
    scored, _ = capture("attention", Taps(keep=("layers.*.mixer.scores",)))
    np.testing.assert_allclose(plain, scored, atol=1e-5)


# ---- edits ------------------------------------------------------------------------------------------------


def test_ablating_a_head_equals_zeroing_its_columns():
    got, kept = capture(
        "attention",
        Taps(keep=("layers.1.mixer.heads",), edit={"layers.1.mixer.heads": lambda x: x.at[:, :, 2].set(0.0)}),
    )
    p = params("attention")
    w = p["layers"][1]["mixer"]["o"]["w"].at[:, 16:24].set(0.0)
    mixer = p["layers"][1]["mixer"] | {"o": {"w": w}}
    cut = p | {"layers": [p["layers"][0], p["layers"][1] | {"mixer": mixer}]}
    want, _ = capture("attention", None, cut)
    plain, _ = capture("attention", None)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(np.asarray(got) - plain).max() > 0.01
    assert np.all(kept["layers.1.mixer.heads"][:, :, 2] == 0)


@pytest.mark.parametrize("name", MODELS)
def test_an_edit_of_any_point_reaches_the_logits(name):
    """Each is shrunk and shifted in turn; where none is, the logits are the usual ones."""
    points = sorted(POINTS[name] - {"ffn.experts"})
    shrink = lambda size: lambda x: x * (1 - size) + 0.1 * size

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, sizes):
        edit = {f"layers.0.{point}": shrink(size) for point, size in zip(points, sizes, strict=True)}
        return jaxllm.capture(MODELS[name], params, TOKENS, Taps(edit=edit))[0]

    plain = np.asarray(run(params(name), jnp.zeros(len(points))))
    np.testing.assert_allclose(plain, capture(name, None)[0], atol=1e-5)
    for i, point in enumerate(points):
        got = run(params(name), jnp.zeros(len(points)).at[i].set(0.5))
        assert np.abs(np.asarray(got) - plain).max() > 1e-3, point


def test_an_edit_of_the_chosen_experts():
    """All three weights on expert 4: as if it had been the only one, with the sum of the weights."""
    edit = {"layers.0.ffn.experts": lambda e: jnp.full_like(e, 4)}
    got, kept = capture("moe", Taps(keep=("layers.0.ffn.*",), edit=edit))
    p = jax.tree.map(np.asarray, params("moe")["layers"][0]["ffn"])
    x = np.asarray(kept["layers.0.ffn.in"])
    gate = x @ p["gate"]["w"][4].T
    alone = (gate / (1 + np.exp(-gate)) * (x @ p["up"]["w"][4].T)) @ p["down"]["w"][4].T
    np.testing.assert_allclose(kept["layers.0.ffn.weights"].sum(-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(kept["layers.0.ffn.out"], alone, atol=1e-5)
    assert np.isfinite(got).all()


def test_edits_come_before_keeping_and_keep_the_dtype():
    edit = {"embed": lambda x: (x * 0 + 1).astype(jnp.bfloat16), "em*": lambda x: x + 2}
    _, kept = capture("attention", Taps(keep=("embed",), edit=edit))
    assert kept["embed"].dtype == jnp.float32
    np.testing.assert_array_equal(kept["embed"], 3.0)


def test_an_edited_key_is_what_later_tokens_see():
    """Edits of keys and values go into the cache, so a second call without them still feels them."""
    c, p = MODELS["attention"], params("attention")
    edit = Taps(edit={"layers.0.mixer.v": jnp.zeros_like})
    outs = []
    for what in (None, edit):
        _, _, state = call(c, p, TOKENS[:, :4], what, init_state(c, B, S))
        outs.append(call(c, p, TOKENS[:, 4:], None, state)[0])
    assert np.abs(np.asarray(outs[0]) - outs[1]).max() > 1e-3


# ---- attention probabilities ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["window", "mla", "full"])
def test_probabilities_lie_on_visible_slots_only(name):
    """After five tokens of which row 1 has three real ones, in rings and full caches."""
    c, p = CONFIGS[name], random_model.params(CONFIGS[name])
    lengths = np.array([5, 3], np.int32)
    _, _, state = call(c, p, TOKENS[:, :5], None, init_state(c, B, S, chunk=5), n_new=lengths)
    _, kept, after = call(c, p, TOKENS[:, 5:], Taps(keep=("layers.*.mixer.scores",)), state)
    for i, b in enumerate(c.blocks):
        probabilities = np.asarray(kept[f"layers.{i}.mixer.scores"])
        held = np.asarray(after.layers[i].pos)  # [B, S]
        query = lengths[:, None] + np.arange(2)  # [B, 2]
        visible = (held[:, None] >= 0) & (held[:, None] <= query[..., None])
        if window := getattr(b.mixer, "window", None):
            visible &= held[:, None] > query[..., None] - window
        if chunk := getattr(b.mixer, "chunk", None):
            visible &= held[:, None] // chunk == query[..., None] // chunk
        visible = np.broadcast_to(visible[:, None], probabilities.shape)
        np.testing.assert_allclose(probabilities.sum(-1), 1.0, atol=1e-6)
        assert np.all(probabilities[~visible] == 0)
        assert np.all(probabilities[visible] > 0)
        assert visible.any()
        assert not visible.all()


def test_a_sink_takes_probability_from_the_slots():
    c = config(block(attention(sinks=True)))
    _, kept, _ = call(c, random_model.params(c), TOKENS, Taps(keep=("**.scores",)))
    total = np.asarray(kept["layers.0.mixer.scores"]).sum(-1)
    assert np.all((total > 0) & (total < 1))


# ---- errors, and gradients through edits ------------------------------------------------------------------


@pytest.mark.parametrize("how", [dict(keep=("layers.0.mixer.qq",)), dict(edit={"layers.9.out": lambda x: x})])
def test_a_pattern_that_meets_nothing(how):
    with pytest.raises(JaxllmError, match=r"no activation matches .*(qq|9\.out).*points .*mixer\.q,"):
        capture("attention", Taps(**how))


def test_a_pattern_of_another_architecture():
    with pytest.raises(JaxllmError, match="no activation matches"):
        capture("attention", Taps(keep=("layers.0.ffn.experts", "embed")))


def test_an_edit_that_changes_the_shape():
    with pytest.raises(
        JaxllmError, match=r"'layers\.0\.mid' returned shape \(2, 7, 1\); it must keep \(2, 7, 32\)"
    ):
        capture("attention", Taps(edit={"layers.0.mid": lambda x: x[..., :1]}))


def test_a_bare_string_is_not_a_list_of_patterns():
    with pytest.raises(JaxllmError, match=r"write keep=\('embed',\)"):
        Taps(keep="embed")


def test_gradients_with_respect_to_an_edit():
    """Steering: how the logits change with the size of a vector added to the stream."""
    direction = jnp.asarray(np.random.default_rng(0).standard_normal(32), jnp.float32)

    def loss(size):
        steer = Taps(edit={"layers.0.out": lambda x: x + size * direction})
        logits, _, _ = jaxllm.capture(MODELS["attention"], params("attention"), TOKENS, steer)
        return jnp.square(logits).mean()

    both = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
    slope = float(both(0.3)[1])
    assert abs(slope) > 1e-3
    assert (both(0.31)[0] - both(0.29)[0]) / 0.02 == pytest.approx(slope, rel=0.02)


def test_kept_values_are_differentiable():
    """The gradient of a captured neuron with respect to the embedding table."""

    def neuron(p):
        _, kept, _ = jaxllm.capture(MODELS["attention"], p, TOKENS, Taps(keep=("layers.1.ffn.hidden",)))
        return kept["layers.1.ffn.hidden"][0, -1, 3]

    slope = jax.jit(jax.grad(neuron), compiler_options=QUICK)(params("attention"))["embed"]["w"]
    used = np.isin(np.arange(slope.shape[0]), TOKENS[0])
    assert np.isfinite(slope).all()
    assert np.abs(slope[used]).max() > 1e-3
    assert np.all(slope[~used] == 0)
