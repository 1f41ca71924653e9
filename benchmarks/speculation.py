"""What speculative decoding is worth, beside plain decoding in the same run (A B A B, medians), batch 1.

    python benchmarks/speculation.py drafters [--only ngram,draft] [--warm]   the bundled target on held-out Python
    python benchmarks/speculation.py repetition                               n-grams on text that repeats itself
    python benchmarks/speculation.py rows                                     what a verification of N rows costs
    python benchmarks/speculation.py real [--only draft,medusa,eagle]         shapes of Llama-3.2-1B in 4 bits

`real` has no trained weights, so the text of its target is noise that nothing could guess. Its drafters work at
their real cost, but their tokens are exchanged: for the target's own where a recorded run of the bundled ones
kept a draft, for others where it kept none. The target verifies them as always, and says what it says alone. What
comes out is held against what tokens for each step, and the costs of a draft and of a verification, predict.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from formats import held_out

import jaxllm
from jaxllm import decode, ops, sampling
from jaxllm.draft_grow import parents_of
from jaxllm.draft_head import DraftHead
from jaxllm.draft_lookahead import Lookahead
from jaxllm.draft_medusa import load_medusa
from jaxllm.draft_model import DraftModel, early_exit
from jaxllm.draft_ngram import NGram
from jaxllm.generation import Generation
from jaxllm.head_files import load_eagle
from jaxllm.model import Model, bundled
from jaxllm.programs import keep_programs
from jaxllm.quant import quantize_model
from jaxllm.random_weights import random_model
from jaxllm.sampling import GREEDY
from jaxllm.shapes import described, shape
from jaxllm.spec_decode import Asked, Speculative, Verified
from jaxllm.spec_verify import Draft, Tree, chain_of

WARM = sampling.sampler(temperature=0.8, top_p=0.95)
REPEATS = "".join(
    f"    def test_{w}(self):\n        self.assertEqual(self.{w}(1), {w})\n        self.assertTrue({w})\n\n"
    for w in ("add", "sub", "mul", "div", "mod", "pow")
)


# ---- the bundled models ---------------------------------------------------------------------------------


def pieces(model: Model, count: int, length: int) -> list[list[int]]:
    """Prompts of `length` tokens out of as many files that the models never saw."""
    ids = (model.tokenizer.encode(text) for text in held_out())
    long = [row for row in ids if len(row) > 2 * length][:count]
    return [row[len(row) // 2 : len(row) // 2 + length] for row in long]


def drafters(target: Model, draft: Model) -> dict[str, Any]:
    """Everything that drafts for the bundled target, heads where they ship."""
    found = {
        "draft model, chain of 4": DraftModel(draft, (1,) * 4),
        "draft model, tree 3, 2, 1": DraftModel(draft, (3, 2, 1)),
        "4-bit copy, chain of 3": DraftModel(quantize_model(target, "q4bf16_1"), (1,) * 3),
        "first 4 layers, chain of 2": DraftModel(early_exit(target, 4), (1,) * 2),
        "n-gram, 8": NGram(),
        "lookahead": Lookahead(),
    }
    return found | heads(target)


def heads(target: Model, widths: Sequence[int] = (3, 2, 1)) -> dict[str, Any]:
    """Drafters of the heads that ship with the bundled target."""
    eagle = eagle_like(target, widths)
    return {
        "Medusa, its tree": load_medusa(bundled("medusa"), target),
        f"Medusa, tree {widths}": medusa_like(target, widths),
        "EAGLE, grown tree": DraftHead(eagle.head),
        f"EAGLE, tree {widths}": eagle,
    }


def medusa_like(target: Model, widths: Sequence[int]) -> Any:
    """The bundled Medusa heads with a tree of these widths."""
    return load_medusa(bundled("medusa"), target, choices=choices_of(widths))


def eagle_like(target: Model, widths: Sequence[int]) -> DraftHead:
    """The bundled EAGLE head with a tree of these widths."""
    return DraftHead(load_eagle(bundled("eagle"), target), tuple(widths))


def choices_of(widths: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The paths of ranks that a tree of these widths has."""
    level: list[tuple[int, ...]] = [()]
    paths = []
    for width in widths:
        level = [(*path, rank) for path in level for rank in range(width)]
        paths += level
    return tuple(paths)


@dataclasses.dataclass
class Measured:
    """One way of decoding, over all prompts."""

    rates: list[float] = dataclasses.field(default_factory=list)  # tokens a second, of each round
    made: list[Generation] = dataclasses.field(default_factory=list)  # of the last round

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def in_turn(model: Model, rows, ways: Mapping[str, Any], rounds: int, **options: Any) -> dict[str, Measured]:
    """Each way once, to compile it, then in turn. A way is what `generate` takes as `speculative`."""
    found = {name: Measured() for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            made = [decode.generate(model, row, eos=(), speculative=way, **options) for row in rows]
            seconds = sum(m.timings.decode for m in made)
            found[name].made = made
            if turn:
                found[name].rates.append(sum(m.timings.new_tokens for m in made) / seconds)
    return found


def summed(made: Sequence[Generation]) -> tuple[float, list[float]]:
    """(tokens for each step of the target, acceptance at each place)."""
    reports = [m.speculation for m in made]
    steps = sum(r.verifications + r.plain_steps for r in reports)
    looked_at, kept = (np.sum([getattr(r, name) for r in reports], 0) for name in ("looked_at", "kept"))
    return sum(r.new_tokens for r in reports) / steps, (kept / np.maximum(looked_at, 1)).tolist()


def table_of_drafters(args: argparse.Namespace) -> None:
    target, draft = jaxllm.load(), jaxllm.load(bundled("draft"))
    rows = pieces(target, args.prompts, 200)
    sampler = WARM if args.warm else GREEDY
    options = dict(max_new_tokens=args.new, sampler=sampler, key=jax.random.key(0), max_len=1024)
    print("| drafter | kept at each place | tokens a step | tokens/s | times plain | automatic |\n|" + "---|" * 6)
    for name, drafter in drafters(target, draft).items():
        if args.only and not any(part in name.lower() for part in args.only):
            continue
        fixed, auto = Speculative(drafter, drafter.lengths[-1]), Speculative(drafter)
        found = in_turn(target, rows, {"plain": None, "fixed": fixed, "auto": auto}, args.rounds, **options)
        print(line(name, found), flush=True)


def line(name: str, found: Mapping[str, Measured]) -> str:
    plain, fixed, auto = (found[way].rate for way in ("plain", "fixed", "auto"))
    steps, kept = summed(found["fixed"].made)
    share = " ".join(f"{a:.2f}" for a in kept)
    rates = f"{fixed:.0f} ({plain:.0f}) | {fixed / plain:.2f} | {auto / plain:.2f}"
    return f"| {name} | {share} | {steps:.2f} | {rates} |"


def repetition(args: argparse.Namespace) -> None:
    target = jaxllm.load()
    rows = [target.tokenizer.encode(REPEATS)]
    print("| drafter | kept at each place | tokens a step | tokens/s | times plain | automatic |\n|" + "---|" * 6)
    for name, drafter in {"n-gram, 8": NGram(), "lookahead": Lookahead()}.items():
        fixed, auto = Speculative(drafter, drafter.lengths[-1]), Speculative(drafter)
        ways = {"plain": None, "fixed": fixed, "auto": auto}
        print(line(name, in_turn(target, rows, ways, args.rounds, max_new_tokens=args.new)), flush=True)


# ---- acceptance, recorded and replayed ------------------------------------------------------------------


class Wrapped:
    """A drafter around another."""

    def __init__(self, inner: Any):
        self.inner, self.nodes, self.lengths = inner, inner.nodes, inner.lengths
        self.features, self.whole_prompt = inner.features, inner.whole_prompt

    def init(self, target: Model, plan: decode.Plan, found: Any) -> Any:
        return self.inner.init(target, plan, found)

    def propose(self, memory: Any, asked: Asked) -> tuple[Draft | None, Any]:
        return self.inner.propose(memory, asked)

    def accept(self, memory: Any, seen: Verified) -> Any:
        return self.inner.accept(memory, seen)


class Recording(Wrapped):
    """Keeps which nodes were kept in each step."""

    def __init__(self, inner: Any):
        super().__init__(inner)
        self.paths: list[list[int]] = []

    def accept(self, memory: Any, seen: Verified) -> Any:
        self.paths.append([n for n in np.asarray(seen.path)[0].tolist() if n > 0])
        return super().accept(memory, seen)


def recorded(drafter: Any, target: Model, rows, new: int) -> list[list[int]]:
    """The nodes kept in each step of the bundled target, greedy, over all rows."""
    recording = Recording(drafter)
    for row in rows:
        speculative = Speculative(recording, drafter.lengths[-1])
        decode.generate(target, row, max_new_tokens=new, eos=(), speculative=speculative)
    return recording.paths


class Replayed(Wrapped):
    """Works as the drafter does, then exchanges its tokens, so that the target keeps the recorded paths.

    script: what the target says after the prompt of `start` tokens."""

    def __init__(self, inner: Any, script: Sequence[int], start: int, paths: Sequence[Sequence[int]]):
        super().__init__(inner)
        self.script, self.start, self.paths = [*script], start, paths
        self.turn, self.seconds = 0, []

    def init(self, target: Model, plan: decode.Plan, found: Any) -> Any:
        model = getattr(self.inner, "model", target)  # a drafter of another vocabulary: its tokens are exchanged
        config = dataclasses.replace(target.config, vocab=model.config.vocab)
        return super().init(dataclasses.replace(target, config=config), plan, found)

    def propose(self, memory: Any, asked: Asked) -> tuple[Draft | None, Any]:
        began = time.perf_counter()
        draft, memory = super().propose(memory, asked)
        tree = jax.block_until_ready(draft).tree
        self.seconds.append(time.perf_counter() - began)
        said = len(asked.rows[0]) - self.start
        path = self.paths[self.turn % len(self.paths)]
        self.turn += 1
        depth = depths(np.asarray(tree.parents)[0])
        coming = np.array([0, *self.script[said : said + tree.deepest]] + [0] * (tree.deepest + 1))
        tokens = (coming[depth] + 1) % 1000  # wrong everywhere
        tokens[path] = coming[depth[path]]
        return Draft(dataclasses.replace(tree, tokens=tokens[None].astype(np.int32)), None), memory


def depths(parent: np.ndarray) -> np.ndarray:
    """The depth of each node, i32 [N], of parents i32 [N] before their children."""
    found = np.zeros(len(parent), np.int32)
    for node in range(1, len(parent)):
        found[node] = found[parent[node]] + 1
    return found


# ---- real size ------------------------------------------------------------------------------------------


class Free:
    """Drafts that cost nothing: a chain of zeros."""

    features, whole_prompt = (), False

    def __init__(self, nodes: int):
        self.nodes, self.lengths = nodes, (nodes - 1,)

    def init(self, target: Model, plan: decode.Plan, found: Any) -> None:
        return None

    def propose(self, memory: None, asked: Asked) -> tuple[Draft, None]:
        return Draft(chain_of(np.zeros((1, self.nodes), np.int32)), None), None

    def accept(self, memory: None, seen: Verified) -> None:
        return None


class Medusa(Free):
    """The cost of Medusa heads: one for each depth, a ResBlock [D, D] and a projection [V, D] of its own size.

    All read the same two matrices, which are far larger than any cache."""

    def __init__(self, target: Model, widths: Sequence[int]):
        self.tree = parents_of(widths)
        super().__init__(len(self.tree))
        self.widths, self.lengths = tuple(widths), (len(widths),)
        self.block = target.params["layers"][0]["mixer"]["o"]["w"]
        self.out = target.params["embed" if target.config.tied else "head"]["w"]
        self.x = jnp.ones((1, target.config.width), target.config.dtype)

    def propose(self, memory: None, asked: Asked) -> tuple[Draft, None]:
        best = guesses(self.block, self.out, self.x + asked.rows[0][-1], len(self.widths), max(self.widths))
        tokens = np.zeros((1, self.nodes), np.int32) + np.asarray(best)[0, 0]
        return Draft(Tree(tokens, self.tree, len(self.widths)), None), None


@partial(jax.jit, static_argnums=(3, 4))
def guesses(block: Any, out: Any, x: jax.Array, count: int, width: int) -> jax.Array:
    """The `width` most probable tokens of `count` heads: i32 [count, width]; each has its own product."""
    found = []
    for k in range(count):
        y = x + jax.nn.silu(ops.matmul(x * (1 + k), block, out=jnp.float32)).astype(x.dtype)
        found.append(jax.lax.top_k(ops.matmul(y, out, out=jnp.float32)[0], width)[1])
    return jnp.stack(found)


def eagle(target: Model, vocab: int, widths: Sequence[int], format: str) -> DraftModel:
    """The cost of an EAGLE head: one layer of the target, and a projection to `vocab` tokens."""
    config = dataclasses.replace(target.config, blocks=target.config.blocks[:1], vocab=vocab)
    return DraftModel(random_model(config, format=format), tuple(widths), "top")


def step_costs(target: Model, row: list[int], drafter: Any, new: int = 10) -> tuple[float, float]:
    """(seconds of a draft, of its verification) when nothing is kept: the second of two runs."""
    for _ in range(2):
        replayed = Replayed(drafter, [0] * 999, len(row), [[]])
        made = decode.generate(
            target, row, max_new_tokens=new, eos=(), speculative=Speculative(replayed, drafter.lengths[-1])
        )
    report = made.speculation
    return statistics.median(replayed.seconds), report.verify_seconds / report.verifications


def plain_cost(target: Model, row: list[int], new: int = 16) -> float:
    """Seconds of a plain step: the second of two runs."""
    seconds = [decode.generate(target, row, max_new_tokens=new, eos=()).timings.decode for _ in range(2)]
    return seconds[1] / (new - 1)


def rows_cost(args: argparse.Namespace) -> None:
    target, row = real_target(args)
    plain = plain_cost(target, row)
    print(f"a plain step: {1e3 * plain:.1f} ms\n\n| rows | ms | plain steps |\n|---|---|---|")
    for nodes in args.nodes:
        seconds = step_costs(target, row, Free(nodes))[1]
        print(f"| {nodes} | {1e3 * seconds:.1f} | {seconds / plain:.2f} |", flush=True)


def real_target(args: argparse.Namespace) -> tuple[Model, list[int]]:
    target = random_model(described(shape(args.shape)), format=args.format)
    return target, np.random.default_rng(0).integers(0, 999, 32).tolist()


def real(args: argparse.Namespace) -> None:
    """Records of the bundled models, replayed on a target of real size."""
    target, row = real_target(args)
    small, own = jaxllm.load(bundled("draft")), jaxllm.load()
    texts = pieces(own, args.prompts, 200)
    said = decode.generate(target, row, max_new_tokens=args.new + 16, eos=())[0].tokens
    plain = plain_cost(target, row)
    print(f"a plain step: {1e3 * plain:.1f} ms")
    print(
        "| drafter | nodes | draft, ms | verify, ms | tokens a step | predicted | measured | of it |\n|"
        + "---|" * 8
    )
    for name, drafter, like in candidates(target, own, small, args):
        paths = recorded(like, own, texts, args.new)
        draft, verify = step_costs(target, row, drafter)
        ratio, steps = replay(target, row, drafter, said, paths, args)
        predicted = steps * plain / (draft + verify)
        costs = f"{drafter.nodes} | {1e3 * draft:.1f} | {1e3 * verify:.1f}"
        print(
            f"| {name} | {costs} | {steps:.2f} | {predicted:.2f} | {ratio:.2f} | {ratio / predicted:.2f} |",
            flush=True,
        )


def replay(target: Model, row, drafter: Any, said, paths, args: argparse.Namespace) -> tuple[float, float]:
    """(how many times as fast as plain decoding, tokens for each step) with these paths kept."""
    rates: dict[bool, list[float]] = {False: [], True: []}
    tokens = steps = 0
    for turn in range(args.rounds):
        for guessed in (False, True):
            replayed = Replayed(drafter, said, len(row), paths[turn :: args.rounds])
            way = Speculative(replayed, drafter.lengths[-1]) if guessed else None
            made = decode.generate(target, row, max_new_tokens=args.new, eos=(), speculative=way)
            if made[0].tokens != said[: args.new]:
                raise SystemExit("the replay said something else than plain decoding")
            rates[guessed].append(made.timings.new_tokens / made.timings.decode)
        tokens += made.speculation.new_tokens
        steps += made.speculation.verifications + made.speculation.plain_steps
    return statistics.median(rates[True]) / statistics.median(rates[False]), tokens / steps


def candidates(
    target: Model, own: Model, small: Model, args: argparse.Namespace
) -> Iterable[tuple[str, Any, Any]]:
    """(name, the drafter whose cost counts, the drafter of the bundled target whose record counts)."""
    if wanted(args, "draft"):
        config = described(shape(args.draft_shape))
        model = random_model(config, format=args.format)
        for length in args.lengths:
            yield (
                f"{args.draft_shape}, chain of {length}",
                DraftModel(model, (1,) * length),
                DraftModel(small, (1,) * length),
            )
    for widths in args.trees:
        if wanted(args, "medusa"):
            yield f"Medusa, {len(widths)} heads", Medusa(target, widths), medusa_like(own, widths)
        if wanted(args, "eagle"):
            like = eagle_like(own, widths)
            for vocab in args.vocabularies or (target.config.vocab, 32000):
                yield f"EAGLE, {vocab} tokens, tree {widths}", eagle(target, vocab, widths, args.format), like


def wanted(args: argparse.Namespace, name: str) -> bool:
    return not args.only or name in args.only


def main() -> None:
    numbers = lambda text: tuple(map(int, text.split(",")))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--only", type=lambda text: text.lower().split(","), help="parts of drafters' names")
    parser.add_argument("--warm", action="store_true", help="temperature 0.8 and top-p 0.95 in place of greedy")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new", type=int, default=160, help="tokens of each generation")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--draft-shape", default="smollm2-135m")
    parser.add_argument("--format", default="q4f16_1")
    parser.add_argument("--nodes", type=numbers, default=(2, 4, 8, 16, 32, 64))
    parser.add_argument("--lengths", type=numbers, default=(3,))
    parser.add_argument("--vocabularies", type=numbers, help="of EAGLE heads (default: the target's, and 32000)")
    parser.add_argument("--trees", type=lambda text: [numbers(t) for t in text.split("/")], default=[(2, 1, 1)])
    args = parser.parse_args()
    keep_programs()  # compiled once, for all runs
    PARTS[args.part](args)


PARTS = {"drafters": table_of_drafters, "repetition": repetition, "rows": rows_cost, "real": real}

if __name__ == "__main__":
    main()
