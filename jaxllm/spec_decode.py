"""Speculative decoding: a drafter proposes a tree, one forward of the target verifies it, the state keeps a path.

What comes out has the distribution of plain decoding (see `spec_verify`); the drafter decides only how fast.
B rows, N nodes of a tree, D drafts on its longest path, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import decode, layers, sampling
from jaxllm.config import ModelConfig
from jaxllm.decode import Carry, Emitted, Plan
from jaxllm.errors import JaxllmError
from jaxllm.generation import SKIPPED, Speculation
from jaxllm.model import Model
from jaxllm.reading import Read
from jaxllm.sampling import Sampler
from jaxllm.spec_length import Pace
from jaxllm.spec_mask import allowed_behind
from jaxllm.spec_verify import (
    Draft,
    Rule,
    Tree,
    along,
    chain_of,
    follow,
    offered,
    path_to,
    processed,
    reject,
    relations,
    typical,
)
from jaxllm.state import Recurrent, State, keep_path

Array = jax.Array
_ACCEPT = 1 << 30  # what a step's key is folded with for the uniforms; `sampling` uses small numbers
_AS_IT_IS = Sampler(())


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a drafter may look at."""

    rows: list[list[int]]  # prompt and tokens so far; the newest is not in the target's state yet
    carry: Carry  # of the target: contexts, keys and steps
    length: int  # the most drafts on a path
    live: np.ndarray  # bool [B]  rows whose drafts matter


class Drafter(Protocol):
    """Something that guesses what the target will say. It holds no state: what it remembers goes in and out."""

    nodes: int  # most nodes of a tree it proposes, node 0 included
    lengths: tuple[int, ...]  # how many drafts on a path it can be asked for, ascending
    features: tuple[str, ...]  # the target's activations that it reads, by name as in `layers.featured`
    whole_prompt: bool  # whether it reads those of every prompt token; `Read.last` is there for all

    def init(self, target: Model, plan: Plan, found: Read) -> Any:
        """What it remembers of the prompts. Raises JaxllmError where it cannot draft for this target."""

    def propose(self, memory: Any, asked: Asked) -> tuple[Draft | None, Any]:
        """A tree behind the newest tokens (None: nothing to propose), and what it remembers now."""

    def accept(self, memory: Any, seen: Verified) -> Any:
        """After verification. One that reads features is told of plain steps as well, as of drafts all kept."""


# ---- one verification -----------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verified:
    """What one verification tells."""

    emitted: Emitted  # leading axis [D + 1]; SKIPPED behind a row's last token
    tokens: Array  # i32 [B, N]  of the tree, the newest token first
    path: Array  # i32 [B, D + 1]  nodes kept, node 0 first, -1 behind the last
    kept: Array  # i32 [B]  drafts kept, so 1 + kept tokens entered the state; -1 in rows that stand still
    said: Array  # i32 [B, N]  what the target says behind each node, kept or not; -1 where nothing can follow
    offered: Array  # bool [B]  whether there was a draft to look at behind the last one kept
    before: tuple[Recurrent, ...]  # recurrent layers as they were, for `replay`
    features: Array | None  # [B, D + 1, width]  along `path`, what the drafter reads; anything behind the last


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nodes:
    """What the target says behind each node of a tree."""

    tree: Tree
    fed: Array  # i32 [B]  nodes that were appended
    state: State  # all of them appended
    logits: Array  # f32 [B, N, V]
    contexts: sampling.Context | None  # leaves [B, N, ...]
    keys: Array | None  # typed [B, N]  the key plain decoding would draw with there
    features: Array | None  # [B, N, width]


@partial(jax.jit, static_argnames=("config", "top", "rule", "features"), donate_argnames="carry")
def verify(
    config: ModelConfig,
    params: dict,
    sampler: Sampler,
    top: int,
    rule: Rule,
    carry: Carry,
    draft: Draft,
    live: Array,
    *,
    features: tuple[str, ...] = (),
) -> tuple[Carry, Verified]:
    """One forward over a drafted tree: what is kept of it and one token more, in rows where live bool [B]."""
    nodes = examine(config, params, carry, draft.tree, live, features)
    may = nodes if draft.allowed is None else masked(nodes, draft.allowed)
    at, token, said = judge(sampler, rule, may, draft.probs, _uniforms(carry, nodes.tree))
    return settle(top, carry, nodes, at, token, said, live)


def examine(
    config: ModelConfig, params: dict, carry: Carry, tree: Tree, live: Array, features: tuple[str, ...] = ()
) -> Nodes:
    """Append a tree to the target's state; node 0 becomes the newest token."""
    tree = dataclasses.replace(tree, tokens=tree.tokens.at[:, 0].set(carry.token))
    N = tree.tokens.shape[1]
    last = jnp.where(tree.tokens >= 0, jnp.arange(N), 0).max(-1)
    fed = jnp.where(live, last + 1, 0)  # what lies behind the last draft is padding, which costs little
    depth, sees = relations(tree)
    shape = {} if tree.chain else dict(depth=depth, tree=sees)
    tokens = jnp.maximum(tree.tokens, 0)
    x, state, kept = layers.featured(config, params, tokens, carry.state, features, n_new=fed, **shape)
    logits = layers.logits(config, params, x)
    return Nodes(tree, fed, state, logits, along(carry.context, tree), keys_at(carry, depth), kept)


def masked(nodes: Nodes, allowed: Array) -> Nodes:
    """The nodes with what a mask allows bool [B, N, V], as its step at the head of a sampler does it."""
    return dataclasses.replace(nodes, logits=jax.vmap(lambda m, x: sampling.Mask(m)(x))(allowed, nodes.logits))


def keys_at(carry: Carry, depth: Array) -> Array | None:
    """The keys of the tokens behind nodes at `depth` i32 [B, n]: typed [B, n]; None for a greedy sampler."""
    if carry.keys is None:
        return None
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
    return fold(carry.keys, carry.step[:, None] + depth)


def _uniforms(carry: Carry, tree: Tree) -> Array | None:
    if carry.keys is None:
        return None
    drafts = tree.tokens.shape[1] - 1
    keys = jax.vmap(jax.random.fold_in)(carry.keys, carry.step)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, _ACCEPT)
    return jax.vmap(lambda key: jax.random.uniform(key, (drafts,)))(keys)


def judge(
    sampler: Sampler, rule: Rule, nodes: Nodes, probs: Array | None, uniform: Array | None
) -> tuple[Array, Array, Array]:
    """(the last node kept i32 [B], the token behind it i32 [B], what the target says behind each node i32 [B, N]).

    It says what it draws there, or the most probable token; -1 where nothing can follow."""
    row = jnp.arange(len(nodes.fed))
    if rule == "exact" and probs is None:
        draw = lambda *node: sampling.sample(sampler, *node)[0]
        drawn = jax.vmap(draw, in_axes=1, out_axes=1)(nodes.logits, nodes.keys, nodes.contexts)
        at = follow(nodes.tree, drawn)
        return at, drawn[row, at], drawn
    logprobs = processed(sampler, nodes.logits, nodes.contexts, nodes.keys)
    said = jnp.argmax(logprobs, -1).astype(jnp.int32)
    if rule == "typical":
        at = typical(nodes.tree, jnp.exp(logprobs))
        rest = logprobs[row, at]
    else:
        at, rest, _ = reject(nodes.tree, jnp.exp(logprobs), probs, uniform)
        rest = jnp.log(rest)
    if sampler.greedy:
        return at, sampling.sample(sampler, rest, None)[0], said
    return at, sampling.sample(_AS_IT_IS, rest, nodes.keys[row, at])[0], said


def settle(
    top: int, carry: Carry, nodes: Nodes, at: Array, token: Array, said: Array, live: Array
) -> tuple[Carry, Verified]:
    """Keep the path to node `at` i32 [B] and emit it, with `token` i32 [B] behind it."""
    tree, path = nodes.tree, path_to(nodes.tree, at)
    kept = jnp.where(live, (path >= 0).sum(-1) - 1, -1)
    state = keep_path(nodes.state, carry.state.length, None if tree.chain else path, kept + 1)
    out = _emitted(nodes, path, kept, token, top)
    context = carry.context
    for tokens in out.token:
        context = sampling.observe(context, tokens, tokens >= 0)
    token = jnp.where(live, token, carry.token)
    after = dataclasses.replace(carry, state=state, token=token, context=context, step=carry.step + kept + 1)
    before = tuple(c for c in carry.state.layers if isinstance(c, Recurrent))
    features = nodes.features
    if features is not None:
        features = jnp.take_along_axis(features, jnp.maximum(path, 0)[..., None], 1)
    return after, Verified(out, tree.tokens, path, kept, said, offered(tree, at), before, features)


def as_verified(newest: Array, out: Emitted, features: Array) -> Verified:
    """Plain steps as a chain of which every token was kept: newest i32 [B] before them, features [steps, B, W]."""
    steps, B = out.token.shape
    path = np.broadcast_to(np.arange(steps, dtype=np.int32), (B, steps))
    kept, no = np.full(B, steps - 1, np.int32), np.zeros(B, bool)
    tokens, said, features = _by_row(newest, out.token, features)
    return Verified(out, tokens, path, kept, said, no, (), features)


@jax.jit
def _by_row(newest: Array, said: Array, features: Array) -> tuple[Array, Array, Array]:
    """(tokens i32 [B, steps] that were fed, what was said behind each, their features [B, steps, W])."""
    fed = jnp.concatenate([newest[None], said[:-1]])
    return fed.T, said.T, features.swapaxes(0, 1)


def _emitted(nodes: Nodes, path: Array, kept: Array, last: Array, top: int) -> Emitted:
    """The drafts kept and the token behind them, under the model's own distribution."""
    taken = jnp.maximum(path, 0)
    following = jnp.take_along_axis(nodes.tree.tokens, jnp.roll(taken, -1, 1), 1)
    place = jnp.arange(path.shape[1])
    token = jnp.where(place < kept[:, None], following, SKIPPED)
    token = jnp.where(place == kept[:, None], last[:, None], token)
    own = jax.nn.log_softmax(jnp.take_along_axis(nodes.logits, taken[..., None], 1), -1)
    logprob = jnp.take_along_axis(own, jnp.maximum(token, 0)[..., None], 2)[..., 0]
    out = Emitted(token, logprob, *sampling.top_logprobs(own, top))
    return jax.tree.map(lambda a: a.swapaxes(0, 1), out)


@partial(jax.jit, static_argnames="config", donate_argnames="carry")
def replay(
    config: ModelConfig, params: dict, carry: Carry, before: tuple[Recurrent, ...], tokens: Array, kept: Array
) -> Carry:
    """The carry whose recurrent layers have read the newest token and the drafts kept, and none of the others.

    tokens i32 [B, N] as they were verified; before: those layers from before them. The caches of other layers are
    written once more with what they hold.
    """
    old = iter(before)
    caches = tuple(next(old) if isinstance(c, Recurrent) else c for c in carry.state.layers)
    state = dataclasses.replace(carry.state, layers=caches)
    state = keep_path(state, carry.state.length - kept - 1, None, jnp.zeros_like(kept))
    _, state, _ = layers.hidden(config, params, jnp.maximum(tokens, 0), state, n_new=kept + 1)
    return dataclasses.replace(carry, state=state)


# ---- the loop -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Speculative:
    """How to decode speculatively; what `generate` and `stream` take as `speculative`.

    length: drafts on a path, or "auto": as many as give the most tokens per second by the acceptance and the times
    measured so far, none where drafting does not pay. What is measured is remembered from one generation with the
    same Speculative to the next. rule: "exact" keeps the target's distribution; "typical"
    (Medusa's) does not, and keeps more.

    With drafts that are drawn (see `Draft`) tokens depend on the length too, so with "auto" the same key may give
    other tokens, of the same distribution. Greedy tokens never change, and neither do those of drafts not drawn.
    """

    drafter: Drafter
    length: int | Literal["auto"] = "auto"
    rule: Rule = "exact"
    _paces: dict[tuple, Pace] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        lengths = self.drafter.lengths
        if self.length != "auto" and self.length not in lengths:
            raise JaxllmError(f"this drafter drafts {_span(lengths)} tokens ahead or 'auto', got {self.length!r}")
        if self.rule not in ("exact", "typical"):
            raise JaxllmError(f"rule is 'exact' or 'typical', got {self.rule!r}")

    @property
    def nodes(self) -> int:
        """Slots that one verification needs in a state."""
        return self.drafter.nodes

    @property
    def features(self) -> tuple[str, ...]:
        """Activations to keep of every prompt token."""
        return self.drafter.features if self.drafter.whole_prompt else ()

    def run(self, model: Model, plan: Plan, state: State, found: Read) -> Run:
        """The loop, from what reading the prompts left."""
        return Run(self, model, plan, state, found)

    def pace(self, model: Model, plan: Plan) -> Pace:
        """What was learnt in generations of so many rows with this model, greedy or not."""
        like = model.name, model.config, len(plan.rows), plan.sampler.greedy
        return self._paces.setdefault(like, Pace(self.drafter.lengths, self.length))


def _span(lengths: tuple[int, ...]) -> str:
    return f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"


class Run:
    """One generation: iterate over (what was emitted, state) as of `decode`, then ask for the `report`."""

    def __init__(self, speculative: Speculative, model: Model, plan: Plan, state: State, found: Read):
        self.drafter, self.rule = speculative.drafter, speculative.rule
        self.model, self.plan = model, plan
        began = time.perf_counter()
        self.memory = self.drafter.init(model, plan, found)
        self.draft_seconds, self.verify_seconds = time.perf_counter() - began, 0.0
        self.carry, self.first = decode.first_token(model, plan, state, found.last)
        self.rows = [list(row) for row in plan.rows]
        self.ends = np.array([len(row) + plan.new_tokens for row in plan.rows])
        self.pace = speculative.pace(model, plan)
        self.verified = self.plain = 0
        self.looked_at, self.kept = np.zeros((2, self.drafter.lengths[-1]), int)  # drafts, at each place

    def __iter__(self) -> Iterator[tuple[Emitted, State]]:
        yield from self._emit(self.first)
        while (live := self._live()).any():
            began = time.perf_counter()
            length = self.pace.choose() if self._roomy(live) else 0
            draft = self._draft(length, live) if length else None
            if draft is None:
                yield from self._without(live, began)
                continue
            seen = self._verify(draft, live)
            self.memory = self.drafter.accept(self.memory, seen)
            self.verified += 1
            looked_at, kept = self.pace.verified(seen.kept[live], seen.offered[live])
            self.looked_at, self.kept = self.looked_at + looked_at, self.kept + kept
            yield from self._emit(seen.emitted)
            self.pace.took(length, time.perf_counter() - began)

    def _live(self) -> np.ndarray:
        """bool [B]: rows that want more tokens."""
        return np.fromiter(map(len, self.rows), int) < self.ends

    def _roomy(self, live: np.ndarray) -> bool:
        """Whether the state has room for a whole tree in every live row."""
        room = self.carry.state.capacity
        held = max(len(row) - 1 for row, wants in zip(self.rows, live, strict=True) if wants)
        return room is None or held + self.drafter.nodes <= room

    def _draft(self, length: int, live: np.ndarray) -> Draft | None:
        began = time.perf_counter()
        draft, self.memory = self.drafter.propose(self.memory, Asked(self.rows, self.carry, length, live))
        jax.block_until_ready(draft)  # to know the times of both
        self.draft_seconds += time.perf_counter() - began
        return draft

    def _verify(self, draft: Draft, live: np.ndarray) -> Verified:
        """The draft verified; on the host what the host reads."""
        began, model, plan = time.perf_counter(), self.model, self.plan
        if plan.mask is not None:
            said = [row[len(prompt) :] for row, prompt in zip(self.rows, plan.rows, strict=True)]
            draft = dataclasses.replace(draft, allowed=allowed_behind(plan.mask, said, draft.tree))
        args = (model.config, model.params, plan.sampler, plan.top, self.rule)
        self.carry, seen = verify(*args, self.carry, draft, live, features=self.drafter.features)
        emitted, kept, more = jax.device_get((seen.emitted, seen.kept, seen.offered))
        if seen.before and np.any(kept + 1 < seen.tokens.shape[1]):
            self.carry = replay(model.config, model.params, self.carry, seen.before, seen.tokens, seen.kept)
        self.verify_seconds += time.perf_counter() - began
        return dataclasses.replace(seen, emitted=emitted, kept=kept, offered=more)

    def _without(self, live: np.ndarray, began: float) -> Iterator[tuple[Emitted, State]]:
        """Plain decoding for a while: as long as the drafter rests, or one step."""
        before = self.plain
        try:
            if self.plan.mask is not None or not live.all():
                yield from self._emit(self._alone(live).emitted)
            else:
                wanted = int((self.ends - np.fromiter(map(len, self.rows), int)).min())
                yield from self._advance(min(max(self.pace.resting, 1), wanted))
        finally:  # whoever has all tokens asks for no more
            self.pace.plain(self.plain - before, time.perf_counter() - began)

    def _alone(self, live: np.ndarray) -> Verified:
        """The tree of the newest token alone: a step with a mask, or in which a row stands still."""
        seen = self._verify(Draft(chain_of(np.zeros((len(live), 1), np.int32)), None), live)
        self.plain += 1
        if self.drafter.features:
            self.memory = self.drafter.accept(self.memory, seen)
        return seen

    def _advance(self, steps: int) -> Iterator[tuple[Emitted, State]]:
        """Plain steps, the device one program ahead of the host where it may be."""
        free, together = self.plan.free, self.plan.steps if self.plan.free else 1
        programs = [together] * (steps // together) + [1] * (steps % together)
        many = self._plainly(programs[0])
        for size in [*programs[1:], 0]:
            now = many
            if size and free:
                many = self._plainly(size)
            yield from self._emit(now)
            if size and not free:
                many = self._plainly(size)

    def _plainly(self, steps: int) -> Emitted:
        """So many plain steps in one program."""
        model, plan, features = self.model, self.plan, self.drafter.features
        newest = jnp.copy(self.carry.token) if features else None  # the carry is donated
        args = (model.config, model.params, plan.sampler, plan.top, self.carry)
        self.carry, (many, kept) = decode.advance(*args, steps=steps, features=features)
        if features:
            self.memory = self.drafter.accept(self.memory, as_verified(newest, many, kept))
        self.plain += steps
        return many

    def _emit(self, many: Emitted) -> Iterator[tuple[Emitted, State]]:
        for out in decode.unstacked(jax.device_get(many)):
            if np.any(out.token == -1):
                raise JaxllmError("no token can follow: the logits are not numbers, or nothing is allowed")
            for row, token in zip(self.rows, out.token.tolist(), strict=True):
                if token != SKIPPED:
                    row.append(token)
            if np.any(out.token != SKIPPED):
                yield out, self.carry.state

    def report(self) -> Speculation:
        """What was measured."""
        new = sum(map(len, self.rows)) - sum(map(len, self.plan.rows)) - len(self.rows)
        looked_at, kept = (tuple(a.tolist()) for a in (self.looked_at, self.kept))
        return Speculation(
            new, self.verified, self.plain, looked_at, kept, self.draft_seconds, self.verify_seconds
        )
