"""Drafts of heads: tokens stay those of plain decoding, and a head's cache that of the tokens alone."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import cli, decode, layers, sampling
from jaxllm.checkpoint.canonical import nest
from jaxllm.draft_grow import Candidates, Grown
from jaxllm.draft_head import DraftHead
from jaxllm.draft_model import DraftModel
from jaxllm.errors import JaxllmError
from jaxllm.families import family
from jaxllm.feature_head import Head, HeadConfig, empty, head_shape
from jaxllm.head_files import describe_eagle, eagle_values, load_eagle, nested, save_eagle
from jaxllm.model import Model
from jaxllm.spec_decode import Speculative
from jaxllm.spec_length import Pace
from tests import random_model
from tests.random_model import CONFIGS

WARM = sampling.sampler(temperature=0.9, top_p=0.95, repetition_penalty=1.2)
ROWS = [random_model.tokens(n, seed=n).tolist() for n in (5, 3, 9)]
GROWN = Grown(depth=3, breadth=3, drafts=8)
LOW = Grown(depth=2, breadth=3, drafts=6)
SHAPES = {"chain": (1, 1, 1), "tree": (2, 2), "grown": GROWN}


def model_of(name: str) -> Model:
    return Model(CONFIGS[name], random_model.params(CONFIGS[name]))


def head_of(target: Model, **changes) -> Head:
    """A random head: EAGLE's, or with the fields that differ."""
    block = random_model.block(pre="ffn")
    model = dataclasses.replace(target.config, blocks=(block,), tied=False, positions=None)
    usual = dict(model=model, vocab=48, features=("norm",), feature_width=32, bias=True)
    config = HeadConfig(**(usual | changes))
    rng = np.random.default_rng(3)
    draw = lambda shape: rng.standard_normal(shape).astype(np.float32) * shape[-1] ** -0.5
    params = nest({path: jnp.asarray(draw(shape)) for path, shape in head_shape(config).items()})
    params["embed"] = target.params["embed"]
    if config.model.vocab == config.vocab:
        params["head"] = {"w": target.params["embed"]["w"] if target.config.tied else target.params["head"]["w"]}
    else:
        params["vocabulary"] = jnp.where(jnp.arange(48) % 2 == 0, jnp.arange(48) // 2, -1)
    return Head(config, params, "a head")


def eagle_3(target: Model) -> Head:
    """Three features, the embedding beside, half of the vocabulary."""
    model = dataclasses.replace(
        target.config, blocks=(random_model.block(),), vocab=24, tied=False, embed_norm=random_model.RMS
    )
    names = ("layers.0.in", "layers.1.in", "layers.1.mid")
    join = dict(join="beside", reduced=True, bias=False, final="said")
    return head_of(target, model=model, features=names, feature_width=96, **join)


def predictor(target: Model) -> Head:
    """A checkpoint's own."""
    model = dataclasses.replace(
        target.config, blocks=(random_model.block(),), tied=False, embed_norm=random_model.RMS
    )
    return head_of(target, model=model, bias=False, feature_norm=random_model.RMS, final="carried")


HEADS = {"eagle": head_of, "eagle 3": eagle_3, "predictor": predictor}


@pytest.fixture(scope="module")
def target() -> Model:
    return model_of("full")


def tokens(made) -> list[tuple[int, ...]]:
    return [c.tokens for c in made]


def agree(target: Model, drafter, rows=ROWS, same=None, **options):
    """`generate` with the drafter says what it says without, in the first `same` rows; the report of it."""
    options = dict(max_new_tokens=14, eos=()) | options
    want = decode.generate(target, rows, **options)
    got = decode.generate(target, rows, **options, speculative=Speculative(drafter, drafter.lengths[-1]))
    assert tokens(got)[:same] == tokens(want)[:same]
    assert got.speculation.verifications > 0
    return got.speculation


# ---- token for token ------------------------------------------------------------------------------------


def test_sampled(target):
    """The most probable nodes, a sampler for each row: tokens are those of plain decoding with the same keys."""
    mixed = sampling.merge([sampling.GREEDY, WARM, sampling.sampler(temperature=0.6, top_k=5)])
    agree(target, DraftHead(head_of(target), LOW), sampler=mixed, key=jax.random.key(2))


def test_samples_of_one_prompt(target):
    """Drafts with the target's own noise; three rows share what was read of a prompt."""
    drafter = DraftHead(eagle_3(target), (1, 1), "couple")
    agree(target, drafter, ROWS[:2], n=3, sampler=WARM, key=jax.random.key(3))


def test_a_model_grows_a_tree_by_confidence(target):
    """The same trees for a draft model: a draft that agrees is kept to the last depth."""
    report = agree(target, DraftModel(target, LOW, "top"), ROWS[:1], max_new_tokens=13)
    assert report.acceptance == (1, 1)


@pytest.mark.parametrize(
    ("name", "shape", "more"),
    [
        ("window", LOW, dict(kv_format="int8")),
        ("mla", (1, 1), dict(overflow="evict-oldest", max_len=16, sinks=2, max_new_tokens=24)),
        ("recurrent", (1, 1), {}),
    ],
)
def test_other_targets(name, shape, more):
    """Rings and packed caches; eviction; before a recurrent target a chain."""
    target = model_of(name)
    agree(target, DraftHead(head_of(target), shape), prefill_chunk_size=4, **more)


def test_up_to_the_end_of_the_context(target):
    drafter = DraftHead(head_of(target), (1, 1, 1))
    report = agree(target, drafter, [random_model.tokens(80).tolist()], max_new_tokens=17)
    assert report.plain_steps > 0


def test_refusals(target):
    with pytest.raises(JaxllmError, match="a tree grown by confidence has the most probable drafts: choice='top'"):
        DraftHead(head_of(target), GROWN, "draw")
    with pytest.raises(JaxllmError, match="from its depth to"):
        Grown(3, 2, 11)
    other = Model(random_model.config(random_model.block(), vocab=50), {})
    other = dataclasses.replace(other, params=random_model.params(other.config))
    with pytest.raises(JaxllmError, match="the target has 32 and 50: load the head for this target"):
        agree(other, DraftHead(head_of(target)))


# ---- its cache ------------------------------------------------------------------------------------------


class Watched(DraftHead):
    """A drafter that shows what it held when it began to draft."""

    def propose(self, memory, asked):
        """What is drafted, after a look at the cache without drafts."""
        state, tokens, features, n_new = self._catch_up(memory, asked.rows)
        kept = self.head.config.take(self.head.params, jnp.asarray(features))
        _, grown = self.head.config.read(self.head.params, tokens, kept, state, n_new=n_new)
        self.seen.append(([list(row) for row in asked.rows], grown))
        return super().propose(dataclasses.replace(memory, state=state), asked)


@pytest.mark.parametrize(("kind", "shape"), [("eagle", "chain"), ("predictor", "tree"), ("eagle 3", "grown")])
def test_its_cache_is_that_of_the_tokens_alone(target, monkeypatch, kind, shape):
    """After any step, kept or not, plain ones too: as if the head had read the text in one go."""
    most = len(SHAPES[shape]) if isinstance(SHAPES[shape], tuple) else GROWN.depth
    lengths = iter([most, most, 0, most, 0, 0, 0, 0, 0, 0, most])
    monkeypatch.setattr(Pace, "choose", lambda self: next(lengths, most))
    drafter = Watched(HEADS[kind](target), SHAPES[shape])
    object.__setattr__(drafter, "seen", [])
    options = dict(max_new_tokens=22, eos=(), prefill_chunk_size=4)
    got = decode.generate(target, ROWS, **options, speculative=Speculative(drafter))
    assert tokens(got) == tokens(decode.generate(target, ROWS, **options))
    assert len(drafter.seen) > 4
    longest = max(len(row) for row in drafter.seen[-1][0])
    alone = text_of(target, drafter, np.array([(row * 9)[:longest] for row in drafter.seen[-1][0]]))
    for rows, state in drafter.seen:
        for b, row in enumerate(rows):
            n, cache = len(row) - 1, state.layers[0]
            order = np.argsort(np.where(np.asarray(cache.pos[b]) < 0, 999, np.asarray(cache.pos[b])))[:n]
            assert np.asarray(cache.pos[b])[order].tolist() == list(range(n))
            assert int((np.asarray(cache.pos[b]) >= 0).sum()) == n == int(state.length[b])
            if row == drafter.seen[-1][0][b][: len(row)]:
                np.testing.assert_allclose(cache.k[b][:, order], alone.k[b][:, :n], atol=2e-5)
                np.testing.assert_allclose(cache.v[b][:, order], alone.v[b][:, :n], atol=2e-5)


def text_of(target: Model, drafter: DraftHead, lines: np.ndarray):
    """The head's cache after whole texts i32 [B, L], of which the last token has no feature."""
    head = drafter.head
    _, _, kept = layers.featured(
        target.config, target.params, lines, layers.init_state(target.config, *lines.shape), drafter.features
    )
    before = head.config.take(head.params, kept[:, :-1])
    B, T = before.shape[:2]
    return head.config.read(head.params, lines[:, 1:], before, empty(head.config, B, T))[1].layers[0]


# ---- the bundled target ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_head(tmp_path_factory) -> tuple[Model, pathlib.Path]:
    """The bundled target and the folder of a head that has learned nothing."""
    target, folder = jaxllm.load(), tmp_path_factory.mktemp("heads") / "eagle"
    values = eagle_values(target)
    config = describe_eagle(values, family("llama"), ("model.fc.weight",), target.config)
    rng, leaves = np.random.default_rng(0), {}
    for path, shape in head_shape(config).items():
        if path not in ("embed.w", "head.w"):
            x = rng.standard_normal(shape) * shape[-1] ** -0.5 if len(shape) > 1 else np.ones(shape)
            leaves[path] = jnp.asarray(x, target.config.dtype)
    save_eagle(Head(config, nested(config, target, leaves)), values, folder)
    return target, folder


@pytest.mark.parametrize(("batch", "shape"), [(1, Grown()), (8, (1, 1, 1))], ids=str)
def test_greedy_on_the_bundled_target(built, random_head, batch, shape):
    target, folder = random_head
    ids = target.tokenizer.encode(pathlib.Path(json.decoder.__file__).read_text())
    rows = [ids[40 * i : 40 * i + 9 + 3 * i] for i in range(batch)]
    drafter = DraftHead(load_eagle(folder, target), shape)
    agree(target, drafter, rows, max_new_tokens=24, max_len=96)


def test_the_command(random_head, capsys):
    """--eagle FOLDER says what is said without, for the same seed; --mtp needs a checkpoint with a predictor."""
    words = ["generate", "def add(", "--max-new-tokens", "12", "--json", "--temperature", "0.7", "--seed", "3"]
    said = []
    for more in ([], ["--eagle", str(random_head[1])]):
        assert cli.main([*words, *more]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0]["tokens"] == said[1]["tokens"]
    assert said[1]["speculation"]["verifications"] > 0
    assert cli.main([*words, "--mtp"]) != 0
    assert "has no layer that predicts further tokens" in capsys.readouterr().err


# ---- trees grown by confidence --------------------------------------------------------------------------


def test_the_most_probable_nodes_form_a_tree():
    """Against a plain search: the best N of all nodes, each with its parent, in order of their depth."""
    rng = np.random.default_rng(0)
    parent = np.array([[0, 0, 0, 1, 1, 2, 2, 4, 4, 6, 6]])
    step = np.minimum(rng.standard_normal((1, 11)), 0)  # ties where a node is certain
    score = step.copy()
    for i, p in enumerate(parent[0]):
        score[0, i] += score[0, p - 1] if p else 0
    found = Candidates(jnp.arange(10, 21)[None], jnp.asarray(parent), jnp.asarray(score)).most_probable(6, 3)
    best = sorted(np.argsort(-score[0], kind="stable")[:6].tolist())
    assert found.tokens.tolist() == [[0, *(10 + i for i in best)]]
    number = {0: 0} | {i + 1: n + 1 for n, i in enumerate(best)}
    assert found.parent.tolist() == [[-1, *(number[int(parent[0, i])] for i in best)]]
