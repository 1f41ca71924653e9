"""Training of what drafts: losses are what they say, an interruption changes nothing, files are as published."""

import dataclasses
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jaxllm
from jaxllm import cli, decode, heads, layers
from jaxllm.checkpoint.canonical import nest
from jaxllm.draft_medusa import load_medusa
from jaxllm.errors import JaxllmError, MissingExtraError
from jaxllm.heads import Settings, batch_at, continued, train, windows_of
from jaxllm.heads_draft import SmallModel
from jaxllm.heads_eagle import EagleHead, eagle_head
from jaxllm.heads_medusa import FADES, MedusaHeads
from jaxllm.model import Model
from tests import random_model
from tests.random_model import CONFIGS

TEXT = random_model.tokens(12, 16)  # windows
QUICK = Settings(steps=8, batch=2, length=16, rate=0.02, every=3)


@pytest.fixture(scope="module")
def target() -> Model:
    config = dataclasses.replace(CONFIGS["full"], blocks=CONFIGS["full"].blocks[:1])
    return Model(config, random_model.params(config), name="target")


look = jax.jit(heads.look, static_argnums=(0, 3))


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


# ---- what is learned ------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
def test_the_loss_of_untrained_medusa_heads(target, own):
    """They say at each token what the target says there, and are held against what it says k + 1 tokens on."""
    kind = MedusaHeads(heads=3, own=own)
    seen = look(target.config, target.params, TEXT[:2], kind.features)
    loss, hits = jax.jit(kind.loss, static_argnums=0)(target.config, target.params, kind.start(target, 0), seen)
    logits, _ = jax.jit(layers.forward, static_argnums=0)(target.config, target.params, TEXT[:2])
    said = log_softmax(np.asarray(logits, np.float64))
    want, right = 0.0, []
    for k in range(3):
        now, then = said[:, : 15 - k], said[:, 1 + k :]
        want += FADES**k * -(np.exp(then) * now).sum(-1).mean()
        right.append((now.argmax(-1) == then.argmax(-1)).mean())
    assert float(loss) == pytest.approx(want, rel=1e-5)
    np.testing.assert_allclose(hits, right, atol=1e-6)


def test_the_loss_of_a_draft_that_is_the_target():
    """Its cross-entropy is the target's entropy, and it guesses all tokens."""
    kind = SmallModel(1, 16, head_dim=8)
    config = kind.config(dataclasses.replace(CONFIGS["full"], vocab=48))
    leaves = kind.start(Model(CONFIGS["full"], {}), 3)
    model = Model(config, nest(leaves))
    seen = look(config, model.params, TEXT[:2], ())
    loss, hits = jax.jit(kind.loss, static_argnums=0)(CONFIGS["full"], {}, leaves, seen)
    p = np.asarray(seen.logprobs, np.float64)
    assert float(loss) == pytest.approx(-(np.exp(p) * p).sum(-1).mean(), rel=1e-5)
    assert hits.tolist() == [1.0]


def test_every_window_once_in_an_epoch():
    settings = dataclasses.replace(QUICK, batch=5)
    seen = np.concatenate([batch_at(TEXT, settings, step) for step in range(12)])
    for epoch in range(5):
        part = seen[12 * epoch : 12 * (epoch + 1)]
        assert sorted(map(tuple, part)) == sorted(map(tuple, TEXT))
    assert not np.array_equal(seen[:12], seen[12:24])
    assert not np.array_equal(seen[:5], batch_at(TEXT, dataclasses.replace(settings, seed=1), 0))


def test_the_target_s_own_words(target):
    """The first half of each window stays; what follows is the target's, greedy in every other row."""
    made = continued(target, TEXT[:4], (0, 3))
    np.testing.assert_array_equal(made[:, :8], TEXT[:4, :8])
    np.testing.assert_array_equal(made, continued(target, TEXT[:4], (0, 3)))
    plain = decode.generate(target, TEXT[:4, :8].tolist(), max_new_tokens=8, eos=())
    same = [made[i, 8:].tolist() == list(plain[i].tokens) for i in range(4)]
    assert same[::2] == [True, True]
    assert not all(same)


def test_text_in_windows():
    model = jaxllm.load(jaxllm.bundled("draft"))
    ids = model.tokenizer.encode("def f(x):\n    return x\n" * 9, add_special=False)
    assert windows_of(model, "def f(x):\n    return x\n" * 9, 20).tolist() == [
        ids[i * 20 : i * 20 + 20] for i in range(len(ids) // 20)
    ]
    with pytest.raises(JaxllmError, match="a window 20; give more text"):
        windows_of(model, "x", 20)


# ---- going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [MedusaHeads(heads=2, layers=2, own=True, nodes=5), SmallModel(1, 16, head_dim=8)]
)
def test_an_interruption_changes_nothing(target, tmp_path, kind):
    """The same losses and the same files; and it learns."""
    settings = dataclasses.replace(QUICK, own=0.25)
    whole = train(target, kind, TEXT, TEXT, tmp_path / "whole", settings, prompts=0)

    def interrupt(done, loss, hits):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(target, kind, TEXT, TEXT, tmp_path / "twice", settings, prompts=0, on_step=interrupt)
    assert not (tmp_path / "twice").exists()
    done = []
    told = lambda *now: done.append(now[0])
    again = train(target, kind, TEXT, TEXT, tmp_path / "twice", settings, prompts=0, on_step=told)
    assert done == [4, 5, 6, 7, 8]
    assert again.losses == whole.losses
    assert whole.losses[-1] < whole.losses[0]
    files = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "twice").iterdir())
    assert all((tmp_path / "whole" / f).read_bytes() == (tmp_path / "twice" / f).read_bytes() for f in files)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["twice", "whole"]


def test_what_is_refused(target, tmp_path, monkeypatch):
    kind, stop = MedusaHeads(heads=1), ValueError("enough")

    def enough(done, loss, hits):
        if done == 4:  # saved at 3
            raise stop

    with pytest.raises(ValueError, match="enough"):
        train(target, kind, TEXT, TEXT, tmp_path / "heads", QUICK, prompts=0, on_step=enough)
    with pytest.raises(JaxllmError, match=r"seed 0 and not 1; give the same, or remove .*heads\.training"):
        train(target, kind, TEXT, TEXT, tmp_path / "heads", dataclasses.replace(QUICK, seed=1), prompts=0)
    (tmp_path / "there").mkdir()
    with pytest.raises(JaxllmError, match="something at"):
        train(target, kind, TEXT, TEXT, tmp_path / "there", QUICK, prompts=0)
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(MissingExtraError, match=r"jaxllm\[train\]"):
        train(target, kind, TEXT, TEXT, tmp_path / "new", QUICK, prompts=0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Settings(steps=0), "steps should be whole"),
        (lambda: Settings(own=1.5), "own goes from 0 to 1"),
        (lambda: Settings(rate=0.0), "rate is above 0"),
        (lambda: MedusaHeads(heads=0), "at least 1"),
        (lambda: SmallModel(width=100), "multiple of 64"),
        (lambda: EagleHead(None, rounds=0), "at least one round"),
    ],
)
def test_what_cannot_be(make, says):
    with pytest.raises(JaxllmError, match=says):
        make()


# ---- files ----------------------------------------------------------------------------------------------


def test_medusa_heads_are_written_as_they_were_trained(target, tmp_path):
    """What is read again is what was written; the tree asks for as many drafts as it was told."""
    kind = MedusaHeads(heads=2, layers=2, nodes=5)
    leaves = {path: x + 0.1 for path, x in kind.start(target, 0).items()}
    kind.write(target, leaves, TEXT, tmp_path)
    drafter = load_medusa(tmp_path, target)
    assert len(drafter.choices) == 5
    for head, written in zip(kind.nested(leaves)["heads"], drafter.heads["heads"], strict=True):
        jax.tree.map(np.testing.assert_array_equal, head, written)
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["medusa_num_heads"], values["medusa_num_layers"], values["hidden_size"]) == (2, 2, 32)


def test_a_draft_model_is_a_llama(tmp_path):
    """transformers reads it, and says the same."""
    folder = shutil.copytree(jaxllm.bundled("draft"), tmp_path / "target")
    target = dataclasses.replace(jaxllm.load(folder), config=jaxllm.load_config(folder))
    target = dataclasses.replace(target, config=dataclasses.replace(target.config, dtype="float32"))
    kind, out = SmallModel(2, 32, head_dim=8), tmp_path / "out"
    out.mkdir()
    leaves = kind.start(target, 0)
    kind.write(target, leaves, TEXT, out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="float32")
    model = jaxllm.load(out)
    assert model.tokenizer.encode("def f") == target.tokenizer.encode("def f")
    got, _ = layers.forward(model.config, model.params, jnp.asarray(TEXT[:1]))
    with torch.no_grad():
        want = theirs(torch.from_numpy(TEXT[:1]).long()).logits
    np.testing.assert_allclose(got, want, atol=2e-4)


# ---- the command ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_the_command(tmp_path, capsys, kind):
    """Heads for the smaller bundled model, which draft for it."""
    (tmp_path / "text").write_text("def f(x):\n    return x + 1\n\n\n" * 200)
    model, out = str(jaxllm.bundled("draft")), str(tmp_path / "heads")
    argv = ["train-heads", model, out, "--kind", kind, "--data", str(tmp_path / "text"), "--steps", "2"]
    argv += ["--batch", "1", "--json"]
    assert cli.main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == 2
    assert report["drafts"]["new_tokens"] > 0
    assert (tmp_path / "heads" / "config.json").is_file()
    if kind == "medusa":
        said = []
        for more in ([], ["--medusa", out]):
            assert cli.main(["generate", "def g(", "--model", model, "--max-new-tokens", "12", *more]) == 0
            said.append(capsys.readouterr().out)
        assert said[0] == said[1]
    with pytest.raises(SystemExit):
        cli.main([*argv, "--width", "64"])
    assert "--width is not for --kind" in capsys.readouterr().err


def test_an_eagle_head_that_is_new_guesses_as_the_target():
    """Before training it hardly changes the feature, so that features of the target are next to its own."""
    target = jaxllm.load(jaxllm.bundled("draft"))
    kind = eagle_head(target, rounds=2)
    seen = look(target.config, target.params, TEXT[:1], kind.features)
    _, hits = jax.jit(kind.loss, static_argnums=0)(target.config, target.params, kind.start(target, 0), seen)
    assert hits.shape == (2,)
