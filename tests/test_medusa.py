"""Medusa heads: read as they are published, the same as PyTorch's, and no change to what the target says."""

import functools
import hashlib
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from jaxllm import decode, layers, sampling
from jaxllm.checkpoint.medusa import read_heads, write_heads
from jaxllm.draft_grow import Chooser
from jaxllm.draft_medusa import (
    MC_SIM_7B_63,
    Medusa,
    arranged,
    best_choices,
    head_logits,
    load_medusa,
    paths,
    trees_fit,
)
from jaxllm.draft_medusa import drawn as grow_drawn
from jaxllm.draft_medusa import ranked as grow_ranked
from jaxllm.errors import CheckpointError, JaxllmError
from jaxllm.model import Model
from jaxllm.spec_decode import Speculative
from jaxllm.spec_verify import Draft, along, chain_of, processed
from jaxllm.state import init_state
from tests import random_model
from tests import test_spec_exact as exact
from tests.random_model import CONFIGS, VOCAB, WIDTH

WARM = sampling.sampler(temperature=0.9, top_p=0.95, repetition_penalty=1.2)
ROWS = [random_model.tokens(n, seed=n).tolist() for n in (5, 3, 9)]


# ---- files ----------------------------------------------------------------------------------------------


class ResBlock(torch.nn.Module):
    """As the paper has it."""

    def __init__(self, bias: bool):
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH, bias=bias)

    def forward(self, x):
        return x + torch.nn.functional.silu(self.linear(x))


def torch_heads(heads: int, blocks: int, bias: bool = True, rows: int = VOCAB) -> torch.nn.ModuleList:
    torch.manual_seed(0)
    out = lambda: torch.nn.Linear(WIDTH, rows, bias=False)
    return torch.nn.ModuleList(
        torch.nn.Sequential(*(ResBlock(bias) for _ in range(blocks)), out()) for _ in range(heads)
    )


def written(folder, tensors: dict[str, torch.Tensor], **values):
    folder.mkdir(exist_ok=True)
    save_file(
        {name: x.detach().contiguous() for name, x in tensors.items()}, folder / "medusa_lm_head.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(dict(medusa_num_heads=2, medusa_num_layers=1) | values))
    return folder


def in_shards(folder, tensors: dict[str, torch.Tensor]):
    """As MLC-LLM writes unquantized weights."""
    data = [x.detach().numpy().astype(np.float32).tobytes() for x in tensors.values()]
    offsets = np.cumsum([0, *map(len, data)]).tolist()
    records = [
        dict(name=name, shape=list(x.shape), dtype="float32", format="raw", nbytes=len(d), byteOffset=at)
        for (name, x), d, at in zip(tensors.items(), data, offsets, strict=False)
    ]
    whole = b"".join(data)
    shard = dict(dataPath="params_shard_0.bin", format="raw-shard", nbytes=len(whole), records=records)
    shard["md5Sum"] = hashlib.md5(whole).hexdigest()
    folder.mkdir()
    (folder / "params_shard_0.bin").write_bytes(whole)
    (folder / "ndarray-cache.json").write_text(json.dumps(dict(metadata={}, records=[shard])))
    (folder / "mlc-chat-config.json").write_text(json.dumps(dict(model_type="medusa", medusa_num_heads=3)))
    return folder


def renamed(tensors, *pairs):
    """With the names that other engines have for the same."""
    out = {}
    for name, x in tensors.items():
        i, j, *rest = name.split(".")
        out[pairs[0 if rest[0] == "linear" else 1].format(i=i, j=j, rest=rest[-1])] = x
    return out


def agrees(folder, modules, config, params, tokens=None) -> None:
    heads, _ = read_heads(folder)
    x = np.random.default_rng(1).standard_normal((2, WIDTH)).astype(np.float32)
    got = np.asarray(head_logits(config, params, jax.tree.map(jnp.asarray, heads), x))
    want = torch.stack([m(torch.from_numpy(x)) for m in modules], 1).detach().numpy()
    if tokens is not None:
        assert np.all(np.isneginf(np.delete(got, tokens, -1)))
        got = got[..., tokens]
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("layout", ["published", "prefixed", "vllm", "mlc"])
def test_layouts(tmp_path, layout):
    """Three heads of two blocks, though config.json speaks of two heads of one, as a published one does."""
    modules = torch_heads(3, 2, bias=layout != "vllm")
    tensors = modules.state_dict()
    if layout == "prefixed":  # beside the target itself
        tensors = {f"medusa_head.{name}": x for name, x in tensors.items()}
        tensors |= {"model.norm.weight": torch.ones(WIDTH), "lm_head.weight": torch.ones(VOCAB, WIDTH)}
    if layout == "vllm":
        tensors = renamed(tensors, "blocks.{i}.layers.{j}.{rest}", "lm_heads.{i}.weight")
    if layout == "mlc":
        folder = in_shards(tmp_path / "heads", {f"medusa_head.{name}": x for name, x in tensors.items()})
    else:
        folder = written(tmp_path / "heads", tensors)
    agrees(folder, modules, CONFIGS["full"], {})


def test_a_token_map(tmp_path):
    """Projections with rows for a few tokens; no other is guessed."""
    modules, few = torch_heads(2, 1, rows=5), torch.tensor([7, 3, 40, 0, 11])
    names = "medusa_heads.blocks.{i}.layers.{j}.{rest}", "medusa_heads.lm_heads.{i}.weight"
    folder = written(tmp_path / "heads", renamed(modules.state_dict(), *names) | {"token_map": few})
    agrees(folder, modules, CONFIGS["full"], {}, few.numpy())
    target = model_of("full")
    made = speculated(target, load_medusa(folder, target, choices=paths("0 1 2 3 4 00")))
    assert made.speculation.verifications > 0


@pytest.mark.parametrize("saved", [False, True], ids=["left out", "named as the original"])
def test_the_target_s_projection(tmp_path, saved):
    modules = torch_heads(2, 1)
    target = model_of("full")
    for m in modules:
        m[-1].weight.data = torch.from_numpy(np.array(target.params["head"]["w"]))
    tensors = {name: x for name, x in modules.state_dict().items() if saved or "linear" in name}
    folder = written(tmp_path / "heads", tensors, original_lm_head=saved)
    assert "out" not in read_heads(folder)[0]["heads"][0]
    agrees(folder, modules, target.config, target.params)


def test_what_is_written_is_read(tmp_path):
    source = written(tmp_path / "one", torch_heads(3, 2).state_dict())
    heads, _ = read_heads(source)
    write_heads(tmp_path / "two", heads, dict(medusa_choices=[[0], [0, 0]], hidden_size=WIDTH))
    again, values = read_heads(tmp_path / "two")
    jax.tree.map(np.testing.assert_array_equal, heads, again)
    assert (values["medusa_num_heads"], values["medusa_num_layers"]) == (3, 2)
    drafter = load_medusa(tmp_path / "two", model_of("full"))
    assert drafter.choices == ((0,), (0, 0))
    assert load_medusa(source, model_of("full")).choices == tuple(p for p in MC_SIM_7B_63 if len(p) <= 3)


def without(name):
    return lambda tensors: {k: x for k, x in tensors.items() if k != name}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("1.1.weight"), "of 2 shapes"),
        (without("0.0.linear.weight"), r"blocks are \[D, D\]"),
        (lambda t: {k: x for k, x in t.items() if not k.startswith("0.")}, r"heads \[1\]"),
        (
            lambda t: {k.replace(".1.weight", ".2.weight"): x for k, x in t.items()},
            "one projection after 1 blocks",
        ),
        (lambda t: {k.replace(".0.linear", ".3.linear"): x for k, x in t.items()}, r"got \[3\]"),
        (lambda t: t | {"0.0.linear.weight": torch.ones(WIDTH, 8)}, r"blocks are \[D, D\]"),
        (lambda t: {k: x.to(torch.int32) for k, x in t.items()}, "of floats, got int32"),
        (lambda t: t | {"fc.weight": torch.ones(2, 2)}, "'fc.weight', which is no part"),
        (lambda t: {k: torch.ones(50, WIDTH) if "linear" not in k else x for k, x in t.items()}, "50 tokens"),
        (lambda t: {k: x[..., :8][: 8 if "linear" in k else None].clone() for k, x in t.items()}, "width of 8"),
    ],
)
def test_heads_that_are_none(tmp_path, change, says):
    folder = written(tmp_path / "heads", change(torch_heads(2, 1).state_dict()))
    with pytest.raises(CheckpointError, match=says):
        load_medusa(folder, model_of("full"))


def test_folders_that_hold_none(tmp_path):
    (tmp_path / "medusa_lm_head.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_medusa(tmp_path, model_of("full"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is a pickle.*safetensors\.torch\.save_file"):
        load_medusa(tmp_path, model_of("full"))
    folder = written(tmp_path / "heads", torch_heads(2, 1).state_dict(), medusa_choices=[[0], "1"])
    with pytest.raises(CheckpointError, match="list of lists of ranks"):
        load_medusa(folder, model_of("full"))


# ---- trees ----------------------------------------------------------------------------------------------


def test_the_published_tree():
    """63 nodes of 4 depths: parents before children, siblings in the order of their ranks."""
    tree = arranged(MC_SIM_7B_63)
    assert len(tree.parent) == 64
    assert np.bincount(tree.depth).tolist() == [1, 10, 28, 23, 2]
    assert np.all(tree.parent[1:] < np.arange(1, 64))
    assert np.all(tree.depth[1:] == tree.depth[tree.parent[1:]] + 1)
    for node in range(64):
        below = np.flatnonzero(tree.parent == node)
        assert np.all(np.diff(tree.rank[below]) > 0)
        assert tree.turn[below].tolist() == list(range(len(below)))


def test_the_tree_that_keeps_most():
    """Against all trees of four nodes."""
    hits = np.array([[0.5, 0.3, 0.1], [0.6, 0.1, 0.05]])
    worth = {p: np.prod([hits[d, r] for d, r in enumerate(p)]) for n in (1, 2) for p in every_path(n)}
    whole = [t for t in itertools.combinations(worth, 4) if all(p[:-1] in t or len(p) == 1 for p in t)]
    best = max(whole, key=lambda t: sum(worth[p] for p in t))
    assert set(best_choices(hits, 4)) == set(best)
    assert len(best_choices(hits, 100)) == len(worth)


def every_path(length):
    return itertools.product(range(3), repeat=length)


@pytest.mark.parametrize(
    ("choices", "choice", "says"),
    [
        (((0, 0),), "top", "beginnings"),
        (((0,), (0,)), "top", "different paths"),
        (((0,), (-1,)), "top", "ranks from 0"),
        (paths("0 00 000"), "top", "2 heads"),
        ((), "top", "1 to 2 ranks"),
        (paths("0"), "best", "'draw', 'couple' or 'top'"),
    ],
)
def test_what_cannot_be_asked(choices, choice, says):
    with pytest.raises(JaxllmError, match=says):
        Medusa({"heads": [{"blocks": []}] * 2}, choices, choice)


# ---- the same distribution, all outcomes summed ---------------------------------------------------------


def random_heads(config, count: int = 2, blocks: int = 1, seed: int = 3) -> dict:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) * 0.3, jnp.float32)
    D = config.width
    return {"heads": [{"blocks": [{"w": draw(D, D), "b": draw(D)} for _ in range(blocks)]} for _ in range(count)]}


def chooser(knobs, vocab: int, noise) -> Chooser:
    """What the drafter's programs choose by, with noise [R, nodes, V] in place of what keys give."""
    given = lambda nodes, depth: None if noise is None else noise[:, nodes]
    return Chooser(knobs, vocab, noise is not None, lambda depth: None, given)


@functools.partial(exact.compiled, static_argnums=(0, 1))
def _guesses(config, shape, params, heads, lines, lengths):
    _, state, _ = layers.hidden(config, params, lines, init_state(config, len(lines), 16), n_new=lengths - 2)
    before = jnp.take_along_axis(lines, lengths[:, None] - 2, 1)
    x, _, _ = layers.hidden(config, params, before, state)
    return head_logits(config, params, heads, x[:, 0])


def guesses(target, heads, prefixes):
    """What the heads say behind each prefix: f32 [P, K, V] of the token before its last."""
    return _guesses(target.config, None, target.params, heads, *exact.lines_of(prefixes))


TREES = {"chain": (3, "0 00"), "tree": (3, "0 1 00 10"), "uneven": (4, "0 2 3 01 20")}


@pytest.mark.parametrize("name", exact.SAMPLERS)
@pytest.mark.parametrize("tree", ["tree", "uneven"])
def test_ranked_drafts(tree, name):
    """The most probable tokens of each head, held against the target's own draws."""
    vocab, choices = TREES[tree]
    target, _ = exact.pair(vocab)
    knobs, prefixes = exact.knobs_of(name), exact.prefixes_of(vocab)
    logits = guesses(target, random_heads(target.config), prefixes)
    context = exact.said(knobs, vocab, prefixes)
    made = grow_ranked(chooser(knobs, vocab, None), logits, context, arranged(paths(choices)))
    blocks = exact.Blocks(prefixes, vocab, made.tree.deepest)
    exact.followed(blocks, made.tree, np.asarray(exact.behind(target, knobs, prefixes, made.tree)))
    assert exact.distance(blocks, target, knobs) < 1e-6


def by_rejection(target, knobs, choices, tamper=lambda made: made):
    """Steps with every draft that the heads may draw, each as probable as it is."""
    vocab, prefixes, shape = target.config.vocab, exact.prefixes_of(target.config.vocab), arranged(paths(choices))
    inner = sorted({*shape.parent[1:].tolist()})
    widths = [int((shape.parent == node).sum()) for node in inner]
    each = [list(itertools.permutations(range(vocab), w)) for w in widths]
    chosen = list(itertools.product(*each))  # [R] of one draw for each node with children
    noise = np.zeros((len(chosen), len(shape.parent), vocab), np.float32)
    for r, draws in enumerate(chosen):
        for node, tokens in zip(inner, draws, strict=True):
            noise[r, node, list(tokens)] = 1e4 * (9.0 - np.arange(len(tokens)))
    logits = jnp.repeat(guesses(target, random_heads(target.config), prefixes), len(chosen), 0)
    context = jax.tree.map(lambda a: jnp.repeat(a, len(chosen), 0), exact.said(knobs, vocab, prefixes))
    choose = chooser(knobs, vocab, jnp.tile(noise, (len(prefixes), 1, 1)))
    made = exact.compiled(lambda logits, context: grow_drawn(choose, logits, context, shape))(logits, context)
    # How probable each draw was, by the heads' own distributions with the drafts before it known.
    own = logits[:, np.minimum(shape.depth, logits.shape[1] - 1)]
    laws = np.exp(np.asarray(processed(knobs, own, along(context, made.tree), None), np.float64))
    weight = np.ones(len(laws))
    for at, node in enumerate(inner):
        tokens = np.tile(np.array([draws[at] for draws in chosen]), (len(prefixes), 1))
        weight *= exact.law_of(laws[:, node], tokens)
    np.testing.assert_allclose(weight.reshape(len(prefixes), -1).sum(1), 1, atol=1e-5)
    made = tamper(made)
    blocks = exact.Blocks(prefixes, vocab, made.tree.deepest)
    exact.judged(blocks, made, exact.behind(target, knobs, prefixes, made.tree), weight)
    return exact.distance(blocks, target, knobs)


@pytest.mark.parametrize("name", exact.SAMPLERS)
@pytest.mark.parametrize("tree", ["chain", "tree"])
def test_drawn_drafts(tree, name):
    vocab, choices = TREES[tree]
    assert by_rejection(exact.pair(vocab)[0], exact.knobs_of(name), choices) < 1e-6


def test_an_uneven_tree_that_is_drawn():
    """Ranks that are left out do not matter: siblings are drawn one after the other."""
    assert by_rejection(exact.pair(3)[0], exact.knobs_of("top-p 0.9"), "0 2 20") < 1e-6


def test_a_wrong_head_s_probabilities_are_seen():
    """Drafts of one head weighed by another's distribution."""
    swapped = lambda made: Draft(made.tree, made.probs[:, ::-1])
    assert by_rejection(exact.pair(3)[0], exact.knobs_of("plain"), "0 00", swapped) > 1e-3


# ---- generation -----------------------------------------------------------------------------------------


def model_of(name: str) -> Model:
    return Model(CONFIGS[name], random_model.params(CONFIGS[name]))


def speculated(target, drafter, length=None, rows=ROWS, **options):
    options = dict(max_new_tokens=14, eos=()) | options
    speculative = Speculative(drafter, length or drafter.lengths[-1])
    return decode.generate(target, rows, **options, speculative=speculative)


def tokens(made):
    return [c.tokens for c in made]


@pytest.mark.parametrize("choice", ["top", "couple", "draw"])
def test_tokens_are_the_target_s(choice):
    """Greedy rows always, and warm ones unless drafts are drawn on their own; short trees as well."""
    target = model_of("full")
    mixed = sampling.merge([sampling.GREEDY, WARM, sampling.sampler(temperature=0.6, top_k=5)])
    options = dict(sampler=mixed, key=jax.random.key(2))
    drafter = Medusa(random_heads(target.config), paths("0 1 3 00 02 10"), choice)
    want = tokens(decode.generate(target, ROWS, max_new_tokens=14, eos=(), **options))
    same = 1 if choice == "draw" else 3
    for length in (2, 1) if choice == "couple" else (2,):
        got = speculated(target, drafter, length, **options)
        assert tokens(got)[:same] == want[:same]
        assert [len(t) for t in tokens(got)] == [14] * 3
        assert sum(got.speculation.kept) > 0


@pytest.mark.parametrize("name", ["window", "recurrent"])
def test_other_caches(name):
    """A ring; a recurrent target, which verifies chains."""
    target = model_of(name)
    drafter = Medusa(random_heads(target.config), paths("0 00" if name == "recurrent" else "0 1 00"))
    assert trees_fit(target.config) == (name != "recurrent")
    want = decode.generate(target, ROWS, max_new_tokens=14, eos=(), prefill_chunk_size=4)
    assert tokens(speculated(target, drafter, prefill_chunk_size=4)) == tokens(want)


def test_samples_and_what_follows():
    """Several of one prompt; and the state that is left goes on as any other."""
    target = model_of("full")
    drafter = Medusa(random_heads(target.config), paths("0 1 00"))
    options = dict(max_new_tokens=9, sampler=WARM, key=jax.random.key(3), n=3)
    want = decode.generate(target, ROWS[0], eos=(), **options)
    assert tokens(speculated(target, drafter, rows=ROWS[0], **options)) == tokens(want)
    made = speculated(target, drafter, rows=ROWS[0])
    row = [*made.prefix.tokens, 7]
    again = decode.generate(target, row, max_new_tokens=6, eos=(), prefix=made.prefix)
    assert tokens(again) == tokens(decode.generate(target, row, max_new_tokens=6, eos=()))


def test_a_head_that_knows(monkeypatch):
    """Heads whose guess is the target's own next tokens are believed: three tokens a step."""
    target = model_of("full")
    whole = decode.generate(target, ROWS[0], max_new_tokens=16, eos=())[0].tokens
    drafter = Medusa(random_heads(target.config), paths("0 00"))

    def told(self, memory, asked):
        behind = whole[len(asked.rows[0]) - len(ROWS[0]) :][:2]
        tree = np.array([[0, *behind, *[-1] * (2 - len(behind))]], np.int32)
        return Draft(chain_of(jnp.asarray(tree)), None), memory

    monkeypatch.setattr(Medusa, "propose", told)
    report = speculated(target, drafter, rows=ROWS[0], max_new_tokens=16).speculation
    assert report.tokens_per_step == 3
