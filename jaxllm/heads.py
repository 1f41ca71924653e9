"""Train what drafts for a target, by what the target says: its own distribution behind every token of a text.

What is trained is a flat dict of arrays and a pure loss of it (a `Kind`); around it are flax.nnx and optax, and
Orbax, so that training that was interrupted goes on where it was. B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import decode, layers, sampling
from jaxllm.config import ModelConfig
from jaxllm.errors import JaxllmError, MissingExtraError
from jaxllm.files import read_object, write_whole
from jaxllm.generation import Speculation
from jaxllm.model import Model
from jaxllm.prompts import as_prompts
from jaxllm.spec_decode import Drafter, Speculative
from jaxllm.state import init_state

Array = jax.Array
Leaves = dict[str, Array]
PIECE = 100_000  # characters that are tokenized at once
PROGRESS = "progress.json"


class Seen(NamedTuple):
    """What the target says of windows of text."""

    tokens: Array  # i32 [B, T]
    features: Array | None  # [B, T, width]  of `Kind.features`
    logprobs: Array  # f32 [B, T, V]


class Kind(Protocol):
    """What can be trained; hashable, for it is part of programs."""

    features: tuple[str, ...]  # of the target, as a drafter names them

    def start(self, target: Model, seed: int) -> Leaves:
        """Its parameters before training, f32. Raises JaxllmError where it does not go with the target."""

    def loss(self, config: ModelConfig, params: dict, leaves: Leaves, seen: Seen) -> tuple[Array, Array]:
        """(what to make small f32 [], at each place the share of tokens it would guess right f32 [places]).

        config, params: the target's."""

    def write(self, target: Model, leaves: Leaves, held: np.ndarray, folder: pathlib.Path) -> None:
        """The files of what was trained, as published; held i32 [W, T] is text that was not trained on."""

    def drafter(self, target: Model, folder: pathlib.Path) -> Drafter:
        """What drafts with them."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train."""

    steps: int = 1000
    batch: int = 8  # windows of a step
    length: int = 256  # tokens of a window
    rate: float = 1e-3  # learning rate at its highest, after the first twentieth of the steps; then a cosine to 0
    own: float = 0.0  # share of the steps whose windows are, in their second half, what the target itself said
    seed: int = 0
    every: int = 100  # steps between two saves

    def __post_init__(self) -> None:
        whole = ("steps", "batch", "length", "every")
        if wrong := [name for name in whole if type(v := getattr(self, name)) is not int or v < 1]:
            raise JaxllmError(f"{', '.join(wrong)} should be whole numbers of at least 1")
        if self.length < 8 or not 0 <= self.own <= 1 or not self.rate > 0:
            raise JaxllmError("a window has at least 8 tokens, own goes from 0 to 1, and the rate is above 0")


@dataclasses.dataclass(frozen=True)
class Trained:
    """What became of it."""

    folder: pathlib.Path
    losses: tuple[float, ...]  # of every step
    hits: tuple[float, ...]  # at each place, share of the target's most probable tokens guessed, last tenth
    speculation: Speculation | None  # greedy decoding behind pieces of held-out text


# ---- text -----------------------------------------------------------------------------------------------


def windows_of(model: Model, text: str, length: int) -> np.ndarray:
    """A text as windows of token ids: i32 [W, length].

    Raises JaxllmError for a text shorter than one window, TokenizerError without a tokenizer."""
    ids: list[int] = []
    for i in range(0, len(text), PIECE):
        ids += as_prompts(model, text[i : i + PIECE], add_special=False)[0]
    count = len(ids) // length
    if not count:
        raise JaxllmError(f"the text has {len(ids)} tokens, and a window {length}; give more text")
    return np.array(ids[: count * length], np.int32).reshape(count, length)


def batch_at(tokens: np.ndarray, settings: Settings, step: int) -> np.ndarray:
    """The windows i32 [B, T] of a step: every epoch in an order of its own, which the seed decides."""
    first, places = step * settings.batch, []
    for i in range(first, first + settings.batch):
        epoch, at = divmod(i, len(tokens))
        places.append(_order(len(tokens), settings.seed, epoch)[at])
    return tokens[places]


def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def continued(target: Model, tokens: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    """The windows i32 [B, T] whose second halves are what the target said behind the first, cool half of the rows
    greedily."""
    B, T = tokens.shape
    keep = T // 2
    knobs = [sampling.sampler(temperature=0.8 if i % 2 else 0.0) for i in range(B)]
    keys = jax.random.split(jax.random.key(int(np.random.default_rng(seed).integers(2**31))), B)
    options = dict(max_new_tokens=T - keep, sampler=sampling.merge(knobs), key=keys, eos=())
    made = decode.generate(target, tokens[:, :keep].tolist(), **options)
    return np.concatenate([tokens[:, :keep], np.array([c.tokens for c in made], np.int32)], 1)


# ---- one step -------------------------------------------------------------------------------------------


def look(config: ModelConfig, params: dict, tokens: Array, features: tuple[str, ...]) -> Seen:
    """What the target says of windows i32 [B, T]."""
    state = init_state(config, *tokens.shape)
    x, _, found = layers.featured(config, params, tokens, state, features)
    logits = layers.logits(config, params, x)
    return Seen(tokens, found, jax.nn.log_softmax(logits, -1))


def guess(logits: Array, want: Array) -> tuple[Array, Array]:
    """(cross-entropy f32 [] of what the target says, share of its first tokens that are first here too f32 []).

    logits, want (log-probabilities) f32 [..., V]."""
    cost = -jnp.sum(jnp.exp(want) * jax.nn.log_softmax(logits, -1), -1)
    return cost.mean(), (logits.argmax(-1) == want.argmax(-1)).mean()


@partial(jax.jit, static_argnames=("kind", "config", "graph"), donate_argnames="state")
def step(kind: Kind, config: ModelConfig, params: dict, graph: Any, state: Any, tokens: Array):
    """One step of training -> (state, loss, hits). graph and state: of (module, optimizer), as nnx splits them."""
    from flax import nnx

    module, optimizer = nnx.merge(graph, state)
    seen = look(config, params, tokens, kind.features)
    loss = lambda m: kind.loss(config, params, {path: p[...] for path, p in m.leaves.items()}, seen)
    (value, hits), grads = nnx.value_and_grad(loss, has_aux=True)(module)
    optimizer.update(module, grads)
    return nnx.state((module, optimizer)), value, hits


def begin(kind: Kind, target: Model, settings: Settings) -> tuple[Any, Any]:
    """(graph, state) before the first step."""
    libraries()
    import optax
    from flax import nnx

    class Module(nnx.Module):
        def __init__(self, leaves: Leaves):
            # Copies, for they are donated: a start may be the target's own array.
            self.leaves = nnx.Dict({path: nnx.Param(jnp.array(x)) for path, x in leaves.items()})

    warm = max(1, settings.steps // 20)
    rate = optax.warmup_cosine_decay_schedule(0.0, settings.rate, warm, max(settings.steps, warm + 1))
    change = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.0))
    module = Module(kind.start(target, settings.seed))
    return nnx.split((module, nnx.Optimizer(module, change, wrt=nnx.Param)))


def libraries() -> None:
    """Raise MissingExtraError unless everything that training needs is installed."""
    try:
        import flax.nnx  # noqa: F401
        import optax  # noqa: F401
        import orbax.checkpoint  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"training needs flax, optax and Orbax ({error}): pip install 'jaxllm[train]'"
        ) from error


# ---- the whole of it ------------------------------------------------------------------------------------


def train(
    target: Model,
    kind: Kind,
    tokens: np.ndarray,
    held: np.ndarray,
    folder: pathlib.Path,
    settings: Settings,
    *,
    prompts: int = 16,
    on_step: Callable[[int, float, Sequence[float]], None] = lambda done, loss, hits: None,
) -> Trained:
    """Train on windows i32 [W, T], write to a new folder, and measure on windows that were held out.

    Until it is done, what is needed to go on lies in a folder of the same name with ".training" behind it; called
    again with the same settings, it goes on there, and losses are those it would have had. on_step is told of
    every step. prompts: pieces of held-out text to measure on, 0 for none.

    Raises JaxllmError where there is something at `folder`, or training of other settings beside it;
    MissingExtraError without jaxllm[train].
    """
    folder = pathlib.Path(folder)
    libraries()
    if folder.exists():
        raise JaxllmError(f"there is something at {folder} already; give another name, or remove it")
    graph, state = begin(kind, target, settings)
    saves = Saves(folder.with_name(f"{folder.name}.training"), kind, settings)
    state, losses = saves.latest(state)
    hits = []
    for done in range(len(losses), settings.steps):
        batch = batch_at(tokens, settings, done)
        if _own(settings, done):
            batch = continued(target, batch, (settings.seed, done))
        state, loss, right = step(kind, target.config, target.params, graph, state, batch)
        losses.append(float(loss))
        hits.append(np.asarray(right, np.float64))
        on_step(done + 1, losses[-1], hits[-1].tolist())
        if (done + 1) % settings.every == 0 or done + 1 == settings.steps:
            saves.put(state, losses)
    _write(kind, target, leaves_of(state), held, folder)
    shutil.rmtree(saves.folder, ignore_errors=True)
    last = np.mean(hits[-max(1, settings.steps // 10) :], 0).tolist() if hits else []
    measured = measure(target, kind.drafter(target, folder), held, prompts) if prompts else None
    return Trained(folder, tuple(losses), tuple(last), measured)


def _own(settings: Settings, step: int) -> bool:
    """Whether the target's own words are trained on now: in a fixed share of the steps, spread evenly."""
    return int((step + 1) * settings.own) > int(step * settings.own)


def leaves_of(state: Any) -> Leaves:
    """The trained arrays in an nnx state of (module, optimizer)."""
    from flax import nnx

    return dict(nnx.to_pure_dict(state)[0]["leaves"])


def _write(kind: Kind, target: Model, leaves: Leaves, held: np.ndarray, folder: pathlib.Path) -> None:
    """Into a folder beside it first, so that a folder of that name is whole."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        kind.write(target, leaves, held, part)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def measure(target: Model, drafter: Drafter, held: np.ndarray, prompts: int, new_tokens: int = 64) -> Speculation:
    """How greedy decoding goes behind the first half of `prompts` held-out windows, one after the other."""
    length = held.shape[1]
    speculative, found = Speculative(drafter, drafter.lengths[-1]), []
    for row in held[np.linspace(0, len(held) - 1, min(prompts, len(held))).astype(int)]:
        prompt = row[: max(1, length // 2)].tolist()
        made = decode.generate(target, prompt, max_new_tokens=new_tokens, eos=(), speculative=speculative)
        found.append(made.speculation)
    return together(found)


def together(reports: Sequence[Speculation]) -> Speculation:
    """Several generations as one."""
    add = lambda *values: (
        tuple(map(sum, zip(*values, strict=True))) if isinstance(values[0], tuple) else sum(values)
    )
    names = [field.name for field in dataclasses.fields(Speculation)]
    return Speculation(**{name: add(*(getattr(r, name) for r in reports)) for name in names})


# ---- going on -------------------------------------------------------------------------------------------


class Saves:
    """What training needs to go on, in a folder: arrays by Orbax, and a small file that names the newest."""

    def __init__(self, folder: pathlib.Path, kind: Kind, settings: Settings):
        self.folder = folder
        # A later save may come more or less often.
        about = {"kind": repr(kind), **dataclasses.asdict(settings)}
        self.about = {name: value for name, value in about.items() if name != "every"}

    def put(self, state: Any, losses: list[float]) -> None:
        """Save; the one before is removed after."""
        import orbax.checkpoint as ocp

        name = f"step-{len(losses)}"
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as saver:
            saver.save((self.folder / name).absolute(), args=ocp.args.PyTreeSave(_numbered(state)), force=True)
        write_whole(self.folder / PROGRESS, json.dumps({**self.about, "losses": losses, "at": name}).encode())
        for other in self.folder.iterdir():
            if other.is_dir() and other.name != name:
                shutil.rmtree(other, ignore_errors=True)

    def latest(self, state: Any) -> tuple[Any, list[float]]:
        """The state that was saved last, and the losses until then; the one given, where there is none."""
        if not (self.folder / PROGRESS).is_file():
            return state, []
        import orbax.checkpoint as ocp

        then = f"remove {self.folder} to begin anew"
        found = read_object(self.folder / PROGRESS, JaxllmError, then)
        if differ := [name for name, value in self.about.items() if found.get(name) != value]:
            was = ", ".join(f"{name} {found.get(name)!r} and not {self.about[name]!r}" for name in differ)
            raise JaxllmError(f"{self.folder} is of training with {was}; give the same, or {then}")
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as saver:
            arrays = _numbered(state)
            how = ocp.args.PyTreeRestore(arrays, restore_args=ocp.checkpoint_utils.construct_restore_args(arrays))
            arrays = saver.restore((self.folder / found["at"]).absolute(), args=how)
        return jax.tree.unflatten(jax.tree.structure(state), [arrays[name] for name in sorted(arrays)]), found[
            "losses"
        ]


def _numbered(state: Any) -> dict[str, Array]:
    return {f"{i:06}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}
