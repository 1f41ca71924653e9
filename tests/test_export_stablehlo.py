"""What the stablehlo target has beside its usual programs: C++, symbolic sizes, and kernels inside."""

import functools
import importlib.util
import pathlib
import shutil
import subprocess
from dataclasses import replace

import jax
import jax.export
import numpy as np
import pytest

from jaxllm import cli, decode, kernels, ops, sampling
from jaxllm.errors import ConfigError, JaxllmError
from jaxllm.export import ahead, build, manifest, parameters, shipped, target
from jaxllm.export.options import Options, settled
from jaxllm.export.program import programs
from jaxllm.export.targets import stablehlo
from jaxllm.kernels import dense
from tests import random_model
from tests.test_export import SMALL, first, loader, made, model_of

EXAMPLE = pathlib.Path(shipped.__file__).with_name(stablehlo.EXAMPLE)
PACKAGE = "xla_plugins.xla_cpu_pjrt"  # of xla-cpu-pjrt: the header, and a plugin for CPUs


@functools.cache
def package() -> pathlib.Path:
    """Where the header and the plugin are; skips where they are not installed, or no compiler is."""
    if not importlib.util.find_spec(PACKAGE.split(".")[0]) or not importlib.util.find_spec(PACKAGE):
        pytest.skip("xla-cpu-pjrt, which has the header of PJRT's C API and a plugin for CPUs, is not installed")
    if not shutil.which("c++"):
        pytest.skip("there is no C++ compiler")
    return pathlib.Path(importlib.util.find_spec(PACKAGE).origin).parent


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A function (folder, count, ids) -> the finished process of the compiled example."""
    program = tmp_path_factory.mktemp("example") / "run_pjrt"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{package() / 'include'}"]
    subprocess.run(["c++", *flags, str(EXAMPLE), "-o", str(program), "-ldl"], check=True)

    def run(folder, count, ids, plugin=None):
        command = [program, plugin or package() / "xla_cpu_pjrt.so", folder, str(count), *map(str, ids)]
        return subprocess.run(command, capture_output=True, text=True, timeout=600)

    return run


DRAWN = Options(window=20, sinks=3, chunk=8, batch=2, sampler="in-graph")
KINDS = {  # every kind of input, result and parameter
    "dense": ("full", None, SMALL),
    "moe, packed": ("moe", "q4f16_1", SMALL),
    "evicting, drawn, rows": ("full", None, replace(DRAWN, penalties=True)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_example_in_cpp_says_what_the_loader_does(example, kind, tmp_path):
    name, format, options = KINDS[kind]
    export, artifact = made(model_of(name, format), tmp_path / "out", options)
    prompt = random_model.tokens(19, seed=5).tolist()
    run = example(export.folder, 30, prompt)
    assert run.returncode == 0, run.stderr
    assert [int(i) for i in run.stdout.split()] == first(artifact.generate(prompt), 30)


def test_the_example_ends_where_the_room_does_and_says_what_is_wrong(example, tmp_path):
    export, artifact = made(model_of(), tmp_path / "out", replace(SMALL, context=40))
    prompt = random_model.tokens(38).tolist()
    run = example(export.folder, 30, prompt)
    assert [int(i) for i in run.stdout.split()] == list(artifact.generate(prompt))
    assert "the prompt has 41 tokens; this export takes 1 to 40" in example(export.folder, 1, [1] * 41).stderr
    assert "cannot be read: give a folder" in example(tmp_path, 1, [1]).stderr
    assert "exports no GetPjrtApi" in example(export.folder, 1, [1], "libm.so.6").stderr
    for file, words in {
        "params.safetensors": "has another size than the manifest says",
        "decode.stablehlo": f"StableHLO {stablehlo.versions()['stablehlo']}, and the plugin reads up to 1.13.3",
    }.items():
        (export.folder / file).write_bytes((export.folder / file).read_bytes()[:-4])
        refused = example(export.folder, 1, [1])
        assert refused.returncode == 1
        assert words in refused.stderr


# ---- sizes that are said when a program is called ----------------------------------------------------------

BOTH = ("batch", "length")
OPEN = {
    "batch": ("moe", None, replace(SMALL, symbolic=("batch",), batch=2)),
    "length": ("window", "int8", replace(SMALL, symbolic=("length",))),
    "both": ("recurrent", None, replace(SMALL, symbolic=BOTH, sampler="in-graph", penalties=True, platform="tpu")),
}


@pytest.mark.parametrize("kind", OPEN)
def test_sizes_may_be_said_later(kind, tmp_path):
    name, format, options = OPEN[kind]
    export, _ = made(model_of(name, format), tmp_path / "out", options)
    record = export.manifest["verification"]
    rows = options.batch + ("batch" in options.symbolic)
    assert record["tokens_equal"] == record["tokens"] == options.batch * 33 + rows * 5
    assert set(export.manifest["symbols"]) == {{"batch": "B", "length": "T"}[name] for name in options.symbolic}
    ports = export.manifest["programs"]["prefill"]["inputs"]
    tokens = next(port for port in ports if port["name"] == "tokens")
    assert tokens["shape"] == ["B" if rows > options.batch else 1, "T" if "length" in options.symbolic else 8]
    assert manifest.opened(export.folder) == export.manifest
    assert {p.suffix for p in export.folder.iterdir()} == {".jax_export", ".json", ".py", ".safetensors"}


@pytest.mark.parametrize(("name", "format"), [("mla", None), ("moe", "q4f16_1"), ("learned", None)])
def test_other_kinds_of_models_leave_their_sizes_open(name, format):
    model = model_of(name, format)
    options = settled(replace(SMALL, symbolic=BOTH), model.config)
    for program in programs(model.config, parameters.abstract(model.params), options):
        inputs = stablehlo.exported(program, "cuda").in_avals
        assert {str(x.shape[0]) for x in inputs if x.ndim and x.dtype == np.int32} == {"B"}


def test_rows_are_as_many_as_there_are(tmp_path):
    """Three rows and one by one program: each row is as if it were alone, and only what is open is."""
    model = model_of()
    _, artifact = made(model, tmp_path / "out", replace(SMALL, symbolic=BOTH))
    tokens = random_model.tokens(3, 5)
    step = lambda tokens: artifact.step(
        "prefill", artifact.start(len(tokens)), {"tokens": tokens, "n_new": np.full(*tokens.shape, np.int32)}
    )[0]["logits"]
    alone = [step(tokens[i : i + 1])[0] for i in range(3)]
    np.testing.assert_allclose(step(tokens), alone, rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="refining shapes"):  # more than the chunk
        step(random_model.tokens(1, 9))
    prompt = random_model.tokens(13, seed=5).tolist()
    with ops.portable():
        live = decode.generate(model, prompt, max_new_tokens=12, prefill_chunk_size=8, max_len=SMALL.context)
    assert first(artifact.generate(prompt), 12) == list(live.completions[0].tokens)


def test_symbols_are_refused_where_they_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="the target gguf wants its batch said"):
        target.check(target.find("gguf"), model_of().config, {}, {}, Options(symbolic=("batch",)))
    with pytest.raises(ConfigError, match="what may be symbolic is batch and length, not 'rows'"):
        build.export(model_of(), "stablehlo", tmp_path / "out", options=replace(SMALL, symbolic=("rows",)))

    embed = ops.embed

    def asking(w, tokens):
        return embed(w, tokens) * (2 if tokens.shape[0] > 3 else 1)

    monkeypatch.setattr(ops, "embed", asking)
    with pytest.raises(ConfigError, match=r"cannot leave its batch open .*; export it with sizes that are said"):
        build.export(model_of(), "stablehlo", tmp_path / "out", options=replace(SMALL, symbolic=("batch",)))


def test_the_command_takes_symbols(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(build, "export", lambda *args, options, **more: asked.append(options) or exit())
    more = ["--symbolic", "batch,length", "--sampler", "penalties"]
    with pytest.raises(SystemExit):
        cli.main(["export", "x", "--target", "stablehlo", "--out", str(tmp_path), *more])
    assert asked[0].symbolic == ("batch", "length")
    assert (asked[0].sampler, asked[0].penalties) == ("in-graph", True)


# ---- kernels of Pallas inside -------------------------------------------------------------------------------

PALLAS = replace(SMALL, platform="tpu", kernels="pallas")


@pytest.fixture
def compiler(monkeypatch):
    """As if libtpu had compiled -> the directories it was given. tests/test_aot.py has the real one."""
    given = []
    monkeypatch.setattr(ahead, "unavailable", lambda: None)
    monkeypatch.setattr(ahead, "compiled", lambda folder, manifest: given.append(folder) or "a TPU")
    return given


def test_kernels_are_inside_and_are_interpreted(tmp_path, compiler):
    """In float32: what the kernels round, int8 activations not among it, is as little as XLA does."""
    export, artifact = made(model_of("full", "int8"), tmp_path / "out", PALLAS)
    record = export.manifest["verification"]
    assert (record["verified"], len(compiler)) == ("compiled", 1)
    assert record["where"].startswith("a TPU's compiler; its kernels interpreted by XLA on cpu")
    assert record["tokens_equal"] == record["tokens"]
    assert record["allowed"] <= 1e-4 * record["largest_logit"]
    assert export.manifest["target"]["limits"] == {"kernels": stablehlo.KERNEL}
    for name, program in export.manifest["programs"].items():
        assert program["files"]["interpreted"] == f"{name}.interpreted"
        inside = jax.export.deserialize(bytearray((export.folder / f"{name}.jax_export").read_bytes()))
        assert (
            inside.mlir_module().count(stablehlo.KERNEL) == 9
        )  # seven products and attention of a layer, the head
    assert len(first(artifact.generate([1, 2, 3]), 3)) == 3


def test_a_kernel_that_computes_something_else_is_noticed(tmp_path, compiler, monkeypatch):
    real = dense.matmul
    monkeypatch.setattr(dense, "matmul", lambda x, w, **how: real(x, w, **how) * 1.001)
    with pytest.raises(JaxllmError, match="not the model it was made from"):
        made(model_of("tied", "int8"), tmp_path / "out", PALLAS)


def test_kernels_are_refused_where_nothing_can_be_said_of_them(tmp_path, monkeypatch):
    def asked(**more):
        build.export(model_of("parallel"), "stablehlo", tmp_path / "out", options=replace(PALLAS, **more))

    with pytest.raises(ConfigError, match="the target stablehlo has kernels of Pallas on tpu alone"):
        asked(platform="cuda")
    with pytest.raises(ConfigError, match="the target gguf has kernels of Pallas on no platform"):
        target.check(target.find("gguf"), model_of().config, {}, {}, Options(kernels="pallas"))
    with pytest.raises(ConfigError, match="made for sizes that are said"):
        asked(symbolic=BOTH)
    monkeypatch.setattr(ahead, "unavailable", lambda: "there is no compiler")
    with pytest.raises(ConfigError, match="verified where they are compiled, and there is no compiler"):
        asked()
    monkeypatch.setattr(ahead, "unavailable", lambda: None)
    monkeypatch.setattr(kernels, "_setting", lambda: "off")
    with pytest.raises(ConfigError, match="no kernel takes anything of this model's prefill"):
        asked()
    assert list(tmp_path.iterdir()) == []


# ---- penalties in the sampler ---------------------------------------------------------------------------------


def test_a_sampler_inside_penalises_what_was_said(tmp_path):
    model = model_of()
    options = replace(SMALL, sampler="in-graph", penalties=True, batch=2)
    export, artifact = made(model, tmp_path / "out", options)
    assert export.manifest["sampler"]["penalties"]
    prompt = random_model.tokens(11).tolist()
    usual = decode.generate(model, prompt, max_new_tokens=20, eos=()).completions[0].tokens
    assert first(artifact.generate(prompt), 20) == list(usual)
    for knobs in (
        {"temperature": 0.0, "repetition_penalty": 1.4},
        {"temperature": 0.9, "frequency_penalty": 0.7, "presence_penalty": -0.4},
        {"temperature": 1.1, "repetition_penalty": 0.8, "presence_penalty": 1.5},
    ):
        live = decode.generate(
            model, prompt, max_new_tokens=20, sampler=sampling.sampler(**knobs), key=jax.random.key(7), eos=()
        )
        assert first(artifact.generate(prompt, seed=7, **knobs), 20) == list(live.completions[0].tokens)
        assert list(live.completions[0].tokens) != list(usual)


def test_penalties_are_refused_where_they_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="want the sampler in them"):
        build.export(model_of(), "stablehlo", tmp_path / "out", options=replace(SMALL, penalties=True))
    with pytest.raises(ConfigError, match="the target iree has no penalties in its sampler"):
        target.check(target.find("iree"), model_of().config, {}, {}, Options(platform="host", penalties=True))
    without = object.__new__(loader().Artifact)
    without.manifest = {"sampler": {"place": "logits"}}
    assert without.penalties({"repetition_penalty": 1.0}) == {}
    with pytest.raises(SystemExit, match="have no penalties"):
        without.penalties({"presence_penalty": 0.5})
