"""The commands: mostly `main` in this process on a tiny random model, a few real processes."""

import functools
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

import jaxllm
from jaxllm import cli, decode
from jaxllm.commands import info

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> pathlib.Path:
    """A folder with a random two-layer model (float32, 512 positions) and the bundled tokenizer."""
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("tiny")
    values = json.loads((jaxllm.bundled() / "config.json").read_text())
    values |= SIZES | dict(num_key_value_heads=1, head_dim=16, max_position_embeddings=512, dtype="float32")
    (folder / "config.json").write_text(json.dumps(values))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(jaxllm.bundled() / name, folder / name)
    save_file(weights(values["vocab_size"]), folder / "model.safetensors")
    return folder


def weights(vocab: int) -> dict[str, np.ndarray]:
    rng, width, hidden = np.random.default_rng(0), 32, 48
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    for i in range(2):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (32 if n in "qo" else 16, width) for n in "qkvo"}
        shapes |= {f"{at}.mlp.{n}_proj.weight": (hidden, width) for n in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (width, hidden)}
        shapes |= {f"{at}.{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    return {
        n: (rng.normal(size=s) * s[-1] ** -0.5 if len(s) > 1 else np.ones(s)).astype(np.float32)
        for n, s in shapes.items()
    }


@pytest.fixture(scope="module")
def talker(tiny, tmp_path_factory) -> pathlib.Path:
    """The tiny model with a chat template."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("talker") / "talker")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def run(capsys):
    """Run a command -> (exit code, stdout, stderr)."""

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(a) for a in argv])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def typed(monkeypatch):
    """Put text on the standard input."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


@pytest.mark.parametrize("how", ["--ngram", "--lookahead"])
def test_drafts_change_nothing_but_the_speed(run, how):
    argv = (
        "generate",
        "x = 1\ny = 1\nx = 1\n",
        "--max-new-tokens",
        12,
        "--json",
        "--temperature",
        0.7,
        "--seed",
        3,
    )
    plain, guessed = (json.loads(run(*argv, *more)[1]) for more in ((), (how,)))
    assert guessed["tokens"] == plain["tokens"]
    assert guessed["speculation"]["new_tokens"] == 11


# ---- help, usage, errors --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [(), *[(name,) for name in cli.COMMANDS]])
def test_help_fits_a_screen(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert len(out.splitlines()) <= 24
    assert max(map(len, out.splitlines())) <= 79


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((), "COMMAND"),
        (("sing",), "invalid choice"),
        (("chat", "--json"), "--json"),
        (("generate",), "PROMPT"),
        (("generate", "x", "--max-new", "3"), "--max-new"),  # no abbreviations
        (("generate", "x", "--max-new-tokens", "0"), "whole number of at least 1"),
        (("generate", "x", "--seed", "-1", "--temperature", "1"), "from 0 to 4294967295"),
        (("generate", "x", "--seed", "1"), "--seed would change nothing"),
        (("generate", "x", "--top-k", "3", "--temperature", "0"), "--top-k would change nothing"),
        (("generate", "x", "--n", "2"), "all the same"),
        (("generate", "x", "--logprobs", "2"), "--json"),
        (("generate", "x", "--overflow", "ignore"), "evict-oldest"),
        (("generate", "x", "--ngram", "--draft"), "not allowed with argument"),
        (("generate", "x", "--ngram", "--lookahead"), "not allowed with argument"),
        (("generate", "x", "--self", "0"), "whole number of at least 1"),
        (("generate", "x", "--dtype", "int3"), "bfloat16"),
        (("score",), "nothing to score"),
        (("score", "-", "-"), "once only"),
        (("logits", "x"), "--out"),
        (("logits", "x", "--out", "y.npz", "--layers", "a"), "such as 0,3"),
        (("logits", "x", "--out", "y.npz", "--taps", ","), "such as out,mixer.out"),
    ],
)
def test_wrong_usage_exits_2_and_names_the_fault(run, argv, says):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert says in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("generate", "x", "--model", "/no/such/folder"), "there is no folder /no/such/folder"),
        (("generate", "x", "--temperature", "-1"), "temperature must be"),
        (("generate", "x", "--max-new-tokens", "5000"), "the context is 512"),
        (("generate", "x", "--max-len", "9000"), "512 positions"),
        (("score", "--file", "/no/such/file"), "/no/such/file cannot be read"),
        (("chat",), "has no chat template"),
        (("logits", "x", "--out", "/no/such/folder/y.npz"), "cannot be written"),
        (("logits", "x", "--out", "y.npz", "--layers", "0,2"), "layers 0 to 1"),
        (("logits", "x", "--out", "y.npz", "--taps", "middle"), "mixer.out"),
        (("info", "/no/such/folder"), "there is no folder"),
    ],
)
def test_bad_input_exits_1_with_a_sentence(run, tiny, tmp_path, monkeypatch, argv, says):
    monkeypatch.chdir(tmp_path)
    given = () if "--model" in argv or argv[0] == "info" else ("--model", tiny)
    code, out, err = run(*argv, *given)
    assert (code, out) == (1, "")
    assert err.startswith("jaxllm: error: ")
    assert says in err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_exits_130(run, tiny, monkeypatch):
    def interrupted(*args, **options):
        yield decode.Token(5, "begun", 0.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(decode, "stream", interrupted)
    code, out, err = run("generate", "x", "--model", tiny)
    assert (code, out, err) == (130, "begun", "\n")


# ---- generate -------------------------------------------------------------------------------------------


def test_generate_streams_the_text_of_the_json_object(run, tiny):
    argv = ("generate", "Once upon a time", "--model", tiny, "--max-new-tokens", 12)
    code, out, err = run(*argv, "--json")
    made = json.loads(out)
    tokenizer = jaxllm.load(tiny).tokenizer
    assert (code, err) == (0, "")
    assert tokenizer.decode(made["tokens"]) == made["text"]
    assert made["prompt_token_ids"] == tokenizer.encode("Once upon a time")
    assert made["prompt_tokens"] == len(made["prompt_token_ids"])
    assert made["finish_reason"] == "length"
    assert len(made["tokens"]) == 12
    assert made["seed"] is None
    assert made["model"] == tiny.name
    assert set(made["timings"]) == {"prefill_s", "decode_s", "tokens_per_second"}
    assert "completions" not in made
    assert "logprobs" not in made
    assert run(*argv) == (0, made["text"] + "\n", "")


def test_greedy_tokens_are_those_of_transformers(run, tiny):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    made = json.loads(run("generate", "def f(x):", "--model", tiny, "--max-new-tokens", 10, "--json")[1])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    ids = torch.tensor([made["prompt_token_ids"]])
    out = theirs.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :]
    assert made["tokens"] == out.tolist()


def test_a_seed_repeats_and_another_does_not(run, tiny):
    argv = ("generate", "x", "--model", tiny, "--temperature", "2", "--max-new-tokens", 10)
    first = run(*argv, "--seed", 7)
    assert run(*argv, "--seed", 7) == first
    assert run(*argv, "--seed", 8)[1] != first[1]
    assert first[2] == ""


@pytest.mark.parametrize("option", [("--top-p", "0.9"), ("--top-k", "50"), ("--min-p", "0.01")])
def test_a_drawn_seed_is_reported_and_repeats(run, tiny, option):
    argv = ("generate", "x", "--model", tiny, "--max-new-tokens", 6, *option)
    code, out, err = run(*argv)
    word, seed = err.split()
    assert (code, word) == (0, "seed")
    made = json.loads(run(*argv, "--seed", seed, "--json")[1])
    assert made["text"] + "\n" == out
    assert made["seed"] == int(seed)


def test_a_penalty_alone_stays_greedy(run, tiny):
    argv = ("generate", "x", "--model", tiny, "--max-new-tokens", 30, "--json")
    plain, penalized = (json.loads(run(*argv, *more)[1]) for more in ((), ("--repetition-penalty", "9")))
    assert penalized["seed"] is None
    assert len(set(penalized["tokens"])) > len(set(plain["tokens"]))


def test_several_completions_and_logprobs(run, tiny):
    argv = ("generate", "x", "--model", tiny, "--temperature", "1", "--seed", 3, "--n", 3, "--max-new-tokens", 5)
    made = json.loads(run(*argv, "--json", "--logprobs", 2)[1])
    texts = [c["text"] for c in made["completions"]]
    assert len(texts) == 3
    assert len({tuple(c["tokens"]) for c in made["completions"]}) > 1
    assert made["text"] == texts[0]
    for c in made["completions"]:
        assert [row["id"] for row in c["logprobs"]] == c["tokens"]
        assert all(len(row["top"]) == 2 for row in c["logprobs"])
        assert all(row["top"][0]["logprob"] >= row["logprob"] for row in c["logprobs"])
    assert run(*argv)[1] == "".join(f"[{i + 1}] {t}\n" for i, t in enumerate(texts))


def test_stop_ends_before_the_text(run, tiny):
    argv = ("generate", "x", "--model", tiny, "--max-new-tokens", 10)
    text = run(*argv)[1][:-1]
    at = text[4:6]
    assert run(*argv, "--stop", "never in there", "--stop", at)[1] == text[: text.find(at)] + "\n"


def test_prompt_from_stdin_and_overflow(run, tiny, typed):
    typed("x\n")
    argv = ("--model", tiny, "--max-new-tokens", 40, "--max-len", 20, "--json")
    refused, _, err = run("generate", "-", *argv)
    assert refused == 1
    assert "the context is 20" in err
    for policy in ("evict-oldest", "clear"):
        typed("x\n")
        made = json.loads(run("generate", "-", *argv, "--overflow", policy)[1])
        assert len(made["tokens"]) == 40
        assert made["prompt_token_ids"] == jaxllm.load(tiny).tokenizer.encode("x")


# ---- chat -----------------------------------------------------------------------------------------------


@pytest.fixture
def streamed(monkeypatch):
    """The (prompt, options) of every call of decode.stream, which still does its work."""
    calls, true = [], decode.stream

    @functools.wraps(true)
    def noted(model, prompt, **options):
        calls.append((prompt, options))
        return (yield from true(model, prompt, **options))

    monkeypatch.setattr(decode, "stream", noted)
    return calls


def test_chat_keeps_the_conversation_and_its_cache(run, talker, typed, streamed, monkeypatch):
    computed, true = [], decode.read
    monkeypatch.setattr(decode, "read", lambda m, rows, *to: computed.append(len(rows[0])) or true(m, rows, *to))
    typed("Hello there\n\nAnd then?\n/exit\nnever read\n")
    code, out, err = run("chat", "--model", talker, "--system", "Be brief.", "--max-new-tokens", 8)
    assert (code, err) == (0, "")
    tokenizer = jaxllm.load(talker).tokenizer
    (first, options), (second, later) = streamed
    assert tokenizer.decode(first) == "system: Be brief.\nuser: Hello there\nassistant:"
    answer = tokenizer.decode(second).removeprefix(tokenizer.decode(first)).split("\nuser: And then?")[0]
    assert out.startswith(answer.removeprefix(" "))  # the template puts a blank between
    assert options["prefix"] is None
    assert later["prefix"].tokens[: len(first)] == tuple(first)
    assert computed[0] == len(first)
    assert computed[1] <= len(second) - len(first)  # fewer where the answer is spelled as it was generated


def test_reset_forgets_all_but_the_system_message(run, talker, typed, streamed):
    typed("Hello\n/reset\n/sing\nHello\n")
    code, out, err = run("chat", "--model", talker, "--system", "Hm.", "--max-new-tokens", 4)
    (first, _), (second, options) = streamed
    assert code == 0
    assert first == second
    assert options["prefix"] is None
    lines = out[: len(out) // 2], out[len(out) // 2 :]
    assert lines[0] == lines[1]
    assert "/sing is no command" in err


def test_ctrl_c_ends_the_answer_and_keeps_the_conversation(run, talker, typed, monkeypatch):
    prompts, true = [], decode.stream

    def interrupted(model, prompt, **options):
        prompts.append(model.tokenizer.decode(prompt))
        tokens = true(model, prompt, **options)
        if len(prompts) > 1:
            return (yield from tokens)
        yield next(tokens)
        yield decode.Token(5, " BEGUN", 0.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(decode, "stream", interrupted)
    typed("Hello\nGo on\n")
    code, out, _ = run("chat", "--model", talker, "--max-new-tokens", 4)
    assert code == 0
    assert " BEGUN\n" in out
    assert prompts[1].startswith(prompts[0])
    assert prompts[1].endswith(" BEGUN\nuser: Go on\nassistant:")


def test_chat_that_fills_the_context_says_so(run, talker, typed):
    typed("word " * 600 + "\n")
    code, _, err = run("chat", "--model", talker)
    assert code == 1
    assert "/reset begins a new one" in err


def test_chat_samples_each_turn_anew_from_one_seed(run, talker, typed):
    argv = ("chat", "--model", talker, "--temperature", "3", "--seed", 5, "--max-new-tokens", 6)
    outs = []
    for _ in range(2):
        typed("Hello\n/reset\nHello\n")
        outs.append(run(*argv))
    assert outs[0] == outs[1]
    assert outs[0][1] != outs[0][1][len(outs[0][1]) // 2 :] * 2


# ---- score, logits --------------------------------------------------------------------------------------


def test_score_is_that_of_transformers(run, tiny, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    text = "The cat sat on the mat.\r\nIt was là.\n"
    (tmp_path / "text").write_bytes(text.encode())
    made = json.loads(run("score", "one", "--file", tmp_path / "text", "--model", tiny, "--json")[1])
    assert len(made["scores"]) == 2
    got = made["scores"][1]
    ids = torch.tensor([[row["id"] for row in got["logprobs"]]])
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")(ids, labels=ids)
    assert ids[0].tolist() == jaxllm.load(tiny).tokenizer.encode(text)
    assert got["tokens"] == ids.shape[1]
    assert got["perplexity"] == pytest.approx(float(torch.exp(theirs.loss)), rel=1e-4)
    bits = float(theirs.loss) * (ids.shape[1] - 1) / np.log(2)
    assert got["bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=1e-4)
    assert got["logprobs"][0]["logprob"] is None
    assert "".join(row["text"] for row in got["logprobs"][1:]).startswith(text[: text.index("à")])


def test_score_in_words(run, tiny, typed):
    typed("from\nstdin")
    code, out, _ = run("score", "-", "two words", "", "--model", tiny)
    head, *rows = out.splitlines()
    assert code == 0
    assert head.split() == ["tokens", "perplexity", "bits/byte", "text"]
    assert [row.split()[3:] for row in rows] == [["-"], ["two", "words"], []]
    assert json.loads(run("score", "", "--model", tiny, "--json")[1])["scores"][0]["perplexity"] is None


def test_score_of_a_long_text_needs_a_stride(run, tiny):
    long = "word " * 700
    code, _, err = run("score", long, "--model", tiny)
    assert code == 1
    assert "stride" in err
    code, out, _ = run("score", long, "--model", tiny, "--stride", 400)
    assert code == 0
    assert int(out.splitlines()[1].split()[0]) > 512


def test_logits_and_activations_are_those_of_transformers(run, tiny, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "kept.npz"
    code, listed, _ = run(
        "logits", "Hello you", "--out", out, "--model", tiny, "--layers", 0, "--taps", "out,embed"
    )
    arrays = np.load(out)
    assert code == 0
    assert [line.split()[0] for line in listed.splitlines()] == list(arrays)
    assert set(arrays) == {"tokens", "logits", "embed", "layers.0.out"}
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")(
            torch.tensor([arrays["tokens"].tolist()]), output_hidden_states=True
        )
    assert arrays["logits"].dtype == np.float32
    np.testing.assert_allclose(arrays["logits"], theirs.logits[0], atol=2e-5)
    np.testing.assert_allclose(arrays["embed"], theirs.hidden_states[0][0], atol=2e-5)
    np.testing.assert_allclose(arrays["layers.0.out"], theirs.hidden_states[1][0], atol=2e-5)


def test_kept_bfloat16_reads_as_float32(run, tiny, tmp_path):
    out = tmp_path / "kept.npz"
    run("logits", "Hello", "--out", out, "--model", tiny, "--dtype", "bfloat16", "--taps", "mixer.*")
    arrays = np.load(out)
    assert {"layers.0.mixer.out", "layers.1.mixer.q"} < set(arrays)
    assert arrays["layers.0.mixer.out"].dtype == np.float32
    assert np.abs(arrays["layers.0.mixer.out"]).max() > 0
    assert [p.name for p in tmp_path.iterdir()] == ["kept.npz"]


# ---- info -----------------------------------------------------------------------------------------------


def test_info_needs_no_weights_and_agrees_with_them(run, tiny, tmp_path):
    model = jaxllm.load(tiny, dtype="float16")
    shutil.copy(tiny / "config.json", tmp_path)
    code, out, _ = run("info", tmp_path, "--dtype", "float16", "--context", 200, "--batch", 2, "--json")
    made = json.loads(out)
    state = jaxllm.init_state(model.config, 2, 200, chunk=128)
    assert code == 0
    assert made["parameters"] == model.size
    assert made["memory"]["parameter_bytes"] == model.nbytes
    assert made["memory"]["state_bytes"] == jaxllm.state.nbytes(state)
    assert made["memory"]["total_bytes"] > model.nbytes + made["memory"]["state_bytes"]
    assert made["architecture"]["blocks"][0]["layers"] == [0, 1]
    assert made["architecture"]["blocks"][0]["mixer"] == "attention 2/1 heads of 16, rope of 16"
    assert run("info", tmp_path, "--context", 513)[0] == 1


def test_info_in_words_is_plain_in_a_pipe_and_a_table_on_a_terminal(run, tiny, monkeypatch):
    code, out, _ = run("info", tiny)
    assert code == 0
    assert "layers 0-1" in out
    assert "mlp 48 silu gated" in out
    assert out.isascii()
    plain = [line.split()[-1] for line in out.splitlines() if line.startswith("  total")]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, table, _ = run("info", tiny)
    assert code == 0
    assert plain[0] in table
    assert not table.isascii()


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([3], "3"), ([0, 1, 2, 5], "0-2, 5"), ([0, 2, 4, 6], "0, 2 .. 6"), ([1, 4], "1, 4"), ([0, 1], "0-1")],
)
def test_spans(numbers, text):
    assert info.spans(numbers) == text


def test_sizes():
    assert [info.size(n) for n in (999, 1000, 999_949, 999_950, 14_696_000, 5 * 10**15)] == [
        *("999 B", "1.0 kB", "999.9 kB", "1.0 MB", "14.7 MB", "5000.0 TB"),
    ]


# ---- real processes -------------------------------------------------------------------------------------


def process(*argv: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "jaxllm", *map(str, argv)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    return subprocess.Popen(command, **pipes, env=os.environ | {"JAXLLM_CACHE": "off"}, **options)


def test_the_bundled_model_is_the_default():
    with process("generate", "Once", "--max-new-tokens", 3, "--json") as running:
        out, err = running.communicate(timeout=600)
    assert (running.returncode, b"Traceback" in err) == (0, False)
    made = json.loads(out)
    assert made["model"] == "target"
    assert jaxllm.load().tokenizer.decode(made["tokens"]) == made["text"]


def test_a_closed_pipe_is_silent(tiny):
    with process("generate", "x", "--model", tiny, "--max-new-tokens", 200, bufsize=0) as running:
        assert running.stdout.read(1)
        running.stdout.close()
        err = running.stderr.read()
        assert running.wait(600) == 0
    assert not any(word in err for word in (b"Traceback", b"BrokenPipe", b"Exception"))


def test_an_interrupt_leaves_no_traceback(tiny):
    argv = ("generate", "x", "--model", tiny, "--max-new-tokens", 5000, "--overflow", "clear")
    # Where the tests run in the background of a shell, interrupts are ignored, and a child would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    running = process(*argv, bufsize=0)
    signal.signal(signal.SIGINT, before)
    with running:
        assert running.stdout.read(1)
        running.send_signal(signal.SIGINT)
        running.stdout.read()
        err = running.stderr.read()
        assert running.wait(600) == 130
    assert b"Traceback" not in err
