"""Exported directories: what runs from them is the live model, and what is not whole does not look it."""

import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import replace

import jax
import jsonschema
import numpy as np
import pytest
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo as dialect
from jax.interpreters import mlir
from safetensors.numpy import load_file

import jaxllm
from jaxllm import cli, decode, ops, sampling
from jaxllm.config import params_shape
from jaxllm.errors import CheckpointError, ConfigError, ContextError, JaxllmError, MissingExtraError
from jaxllm.export import build, manifest, parameters, replay, schema, target, verification
from jaxllm.export.options import Options
from jaxllm.export.targets import stablehlo
from jaxllm.model import Model
from tests import random_model

SMALL = Options(context=64, chunk=8)
SHIPPED = pathlib.Path(stablehlo.shipped.__file__).with_name(stablehlo.RUNNER)
LARGEST_CONSTANT = 2048  # bytes of a program's own numbers: rotary frequencies, slopes, levels of a code

# name -> (config, format, options): every kind of model, and every option of a program
KINDS = {
    "dense": ("full", None, SMALL),
    "rings": ("window", None, SMALL),
    "evicting": ("full", None, Options(window=20, sinks=3, chunk=8)),
    "moe": ("moe", None, SMALL),
    "latent": ("mla", None, SMALL),
    "recurrent": ("recurrent", None, SMALL),
    "tied": ("tied", None, SMALL),
    "biased": ("parallel", None, SMALL),
    "rows": ("full", None, replace(SMALL, batch=3)),
    "q4f16_1": ("moe", "q4f16_1", SMALL),
    "int8": ("full", "int8", SMALL),
}
CONFIGS = random_model.CONFIGS | {"tied": random_model.config(random_model.block(), tied=True)}


def model_of(config: str = "full", format: str | None = None) -> Model:
    made = Model(CONFIGS[config], random_model.params(CONFIGS[config]), name=config)
    return jaxllm.quantize(made, format) if format else made


@contextlib.contextmanager
def here():
    """Verification in this process instead of a fresh one, which takes seconds to begin -> what it ran."""
    ran = []

    class Kept(loader().Artifact):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            ran.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "_fresh", lambda module, *args: replay.main(*args))
        patch.setattr(stablehlo, "_imported", lambda path: types.SimpleNamespace(Artifact=Kept))
        yield ran


def made(model: Model, folder: pathlib.Path, options: Options = SMALL):
    """(what was exported, the artifact that verification compiled)."""
    with here() as ran:
        return build.export(model, "stablehlo", folder, options=options), ran[-1]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The dense model: its folder, and the artifact in memory."""
    export, artifact = made(model_of(), tmp_path_factory.mktemp("tiny") / "dense")
    return export.folder, artifact


@pytest.fixture
def tiny(exported) -> pathlib.Path:
    return exported[0]


@pytest.fixture
def copied(tiny, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(tiny, tmp_path / "copied"))


@functools.cache
def loader():
    spec = importlib.util.spec_from_file_location("run_stablehlo", SHIPPED)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def first(tokens, count: int) -> list[int]:
    return [token for token, _ in zip(tokens, range(count), strict=False)]


# ---- the programs are the model -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_generates_what_the_live_model_does(kind, tmp_path):
    name, format, options = KINDS[kind]
    model = model_of(name, format)
    export, artifact = made(model, tmp_path / kind, options)
    record = export.manifest["verification"]
    assert record["verified"] == "executed"
    rounded = format == "q4f16_1"  # activations to 8 bits, by the live model's kernels
    assert record["tokens_equal"] + record["near_ties"] == record["tokens"] == options.batch * (33 + 5)
    assert record["near_ties"] <= 2 * rounded
    assert record["max_difference"] <= record["allowed"] < (0.06 if rounded else 0.02) * record["largest_logit"]
    prompt = random_model.tokens(19, seed=5).tolist()
    room = dict(max_len=options.context)
    if options.window:
        room = dict(max_len=options.window, overflow="evict-oldest", sinks=options.sinks)
    with ops.portable():
        live = decode.generate(model, prompt, max_new_tokens=30, prefill_chunk_size=options.chunk, **room)
    assert first(artifact.generate(prompt), 30) == list(live.completions[0].tokens)
    check_programs(export, model)


def check_programs(export: build.Exported, model: Model) -> None:
    """Arguments are the manifest's, the state is donated, and no parameter is part of a program."""
    for program in export.manifest["programs"].values():
        data = dialect.deserialize_portable_artifact_str(
            (export.folder / program["files"]["stablehlo"]).read_bytes()
        )
        with mlir.make_ir_context():
            module = ir.Module.parse(data)
            main = next(op for op in module.body if op.attributes["sym_name"].value == "main")
            taken = [str(t) for t in main.attributes["function_type"].value.inputs]
            ports = program["inputs"]
            assert taken == [tensor(port) for port in ports]
            given = [str(t) for t in main.attributes["function_type"].value.results]
            assert sorted(given) == sorted(tensor(port) for port in program["outputs"])
            donated = [i for i, a in enumerate(main.attributes["arg_attrs"]) if "tf.aliasing_output" in str(a)]
            assert donated == [i for i, port in enumerate(ports) if port.get("donated")]
            assert max(constants(module.operation), default=0) <= LARGEST_CONSTANT
    names = {port["name"] for port in program["inputs"] if port["role"] == "parameter"}
    assert names == set(parameters.named(parameters.abstract(model.params)))
    assert {n for n in names if n in params_shape(model.config)} <= set(params_shape(model.config))


def tensor(port: dict) -> str:
    kinds = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int32": "i32", "uint8": "ui8", "int8": "i8"}
    return f"tensor<{'x'.join([*map(str, port['shape']), kinds[port['dtype']]])}>"


def constants(op) -> list[int]:
    """Bytes of the numbers that operations hold; one repeated number counts as one."""
    found = []
    for region in op.regions:
        for inner in (op for block in region for op in block):
            found += constants(inner)
            if inner.operation.name == "stablehlo.constant":
                value = inner.attributes["value"]
                found.append(0 if value.is_splat else len(memoryview(value).tobytes()))
    return found


def test_a_parameter_inside_a_program_would_be_noticed():
    table = np.arange(4096, dtype=np.float32)
    module = jax.jit(lambda x: x + table).lower(jax.ShapeDtypeStruct((4096,), np.float32)).compiler_ir("stablehlo")
    assert max(constants(module.operation)) == 4 * 4096 > LARGEST_CONSTANT


def test_results_and_state_are_those_of_the_portable_model(exported):
    model, artifact = model_of(), exported[1]
    inputs = {"tokens": random_model.tokens(1, 8), "n_new": np.array([7], np.int32)}
    results, state = artifact.step("prefill", artifact.start(), inputs)
    results, state = artifact.step(
        "decode", state, {"tokens": inputs["tokens"][:, :1], "n_new": np.ones(1, np.int32)}
    )
    with ops.portable():
        live, _ = decode.prefill(model, [inputs["tokens"][0, :7].tolist()], SMALL.state(model.config))
        tokens = inputs["tokens"][:, :1]
        logits, live = jax.jit(jaxllm.forward, static_argnums=0)(model.config, model.params, tokens, live)
    np.testing.assert_allclose(results["logits"], logits[:, 0], rtol=0, atol=2e-6)
    np.testing.assert_allclose(state["layers.1.k"], live.layers[1].k, rtol=0, atol=2e-6)
    assert (state["layers.0.pos"] == live.layers[0].pos).all()


def test_the_state_is_consumed(exported):
    artifact = exported[1]
    before = artifact.start()
    inputs = {"tokens": np.ones((1, 1), np.int32), "n_new": np.ones(1, np.int32)}
    artifact.step("decode", before, inputs)
    assert all(x.is_deleted() for name, x in before.items() if not name.endswith("length"))


def test_a_prompt_fills_the_room_and_no_more(exported):
    artifact = exported[1]
    prompt = random_model.tokens(62).tolist()
    assert len(list(artifact.generate(prompt))) == 3  # two enter the state, the third is read from it
    with pytest.raises(SystemExit, match="65 tokens; this export takes 1 to 64"):
        list(artifact.generate([1] * 65))


def test_a_sampler_inside_draws_what_generate_draws(tmp_path):
    model = model_of()
    export, artifact = made(model, tmp_path / "drawn", replace(SMALL, sampler="in-graph", batch=2))
    assert export.manifest["verification"]["compared"] == "logprob"
    prompt = random_model.tokens(11).tolist()
    for heat, share, seed in ((1.2, 0.9, 3), (0.7, 1.0, 4)):
        mixed = sampling.sampler(temperature=heat, top_p=share)
        live = decode.generate(model, prompt, max_new_tokens=20, sampler=mixed, key=jax.random.key(seed), eos=())
        drawn = first(artifact.generate(prompt, temperature=heat, top_p=share, seed=seed), 20)
        assert drawn == list(live.completions[0].tokens)
    greedy = decode.generate(model, prompt, max_new_tokens=20, eos=())
    assert first(artifact.generate(prompt), 20) == list(greedy.completions[0].tokens)


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_programs_for_what_is_not_here_are_simulated(platform, tmp_path):
    export, _ = made(model_of("moe"), tmp_path / platform, replace(SMALL, platform=platform))
    assert export.manifest["verification"]["verified"] == "simulated"
    with pytest.raises(SystemExit, match="for another platform"):
        loader().Artifact(export.folder)


# ---- the bundled model, as a user has it ----------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """(folder, what the command printed) of the bundled model in float32."""
    folder = tmp_path_factory.mktemp("bundled") / "out"
    command = [sys.executable, "-m", "jaxllm.export", str(jaxllm.bundled()), "--target", "stablehlo", "--json"]
    more = [
        "--out",
        str(folder),
        "--dtype",
        "float32",
        "--context-window-size",
        "256",
        "--prefill-chunk-size",
        "32",
    ]
    run = subprocess.run(command + more, capture_output=True, text=True, check=True)
    return folder, json.loads(run.stdout)


def test_the_bundled_model_speaks_without_jaxllm(bundled):
    folder, report = bundled
    assert report["verified"] == "executed"
    assert report["tokens_equal"] == report["tokens"]
    prompt = "def read_lines(path):\n"
    live = decode.generate(jaxllm.load(dtype="float32"), prompt, max_new_tokens=64, max_len=256)
    assert len(live.completions[0].tokens) == 64
    code = f"import sys, runpy; sys.modules['jaxllm'] = None; sys.argv[1:] = [{prompt!r}]; "
    code += f"runpy.run_path({str(folder / stablehlo.RUNNER)!r}, run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert run.stdout == live.text + "\n"


def test_ids_go_in_and_come_out(exported, monkeypatch, capsys):
    folder, artifact = exported
    monkeypatch.setattr(sys, "argv", ["run", "--ids", "3,1,40", "--max-new-tokens", "12"])
    monkeypatch.setattr(loader(), "__file__", str(folder / stablehlo.RUNNER))
    loader().main()
    assert [int(i) for i in capsys.readouterr().out.split(",")] == first(artifact.generate([3, 1, 40]), 12)


def test_the_manifest_says_what_there_is(bundled):
    folder, _ = bundled
    found = manifest.opened(folder)
    assert (found["context"], found["chunk"], found["batch"]) == (256, 32, 1)
    assert found["tokenizer"]["eos_ids"] == [0]
    assert (folder / found["tokenizer"]["template"]).read_bytes() == (
        jaxllm.bundled() / "chat_template.jinja"
    ).read_bytes()
    tokens = next(p for p in found["programs"]["prefill"]["inputs"] if p["name"] == "tokens")
    assert (tokens["shape"], tokens["dtype"], tokens["layout"]) == ([1, 32], "int32", "B T")
    assert found["model"]["values"] == json.loads((jaxllm.bundled() / "config.json").read_text())
    assert (
        max(
            found["files"][f"{p}.{kind}"]["bytes"]
            for p in ("prefill", "decode")
            for kind in ("stablehlo", "jax_export")
        )
        < 1e5
    )


def test_four_bits_on_the_way(tmp_path, capsys):
    """The command quantizes files to files; what is written are its codes, at 4.5 bits a weight."""
    out = tmp_path / "q4"
    with here():
        sizes = ["--format", "q4f16_1", "--chunk", "16", "--context", "128"]
        where = ["--target", "stablehlo", "--out", str(out)]
        code = cli.main(["export", str(jaxllm.bundled("draft")), *where, *sizes])
    assert code == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "38 of 38 greedy tokens" in said
    found = manifest.opened(out)
    assert found["recipe"]["dtype"] == "float16"
    bits = 8 * found["files"]["params.safetensors"]["bytes"] / found["model"]["weights"]
    assert bits < 4.51 + 8 * 2**16 / found["model"]["weights"]  # and the file's header
    stored = load_file(out / "params.safetensors")
    quantized = jaxllm.quantize(jaxllm.load(jaxllm.bundled("draft")), "q4f16_1")
    expected = parameters.named(parameters.flatten(quantized.params))
    assert stored.keys() == expected.keys()
    assert all((np.asarray(expected[name]) == x).all() for name, x in stored.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q4"]


# ---- only what is whole -----------------------------------------------------------------------------------


def test_verify_runs_it_again_in_a_fresh_process(copied):
    said = build.verify(copied)
    before = manifest.opened(copied)["verification"]
    for measured in ("date", "max_difference"):
        said.pop(measured), before.pop(measured)
    assert said == before


def test_verify_notices_other_weights_under_the_right_sums(copied, capsys):
    """A directory that agrees with itself, and computes something else."""
    path = copied / "params.safetensors"
    data = bytearray(path.read_bytes())
    data[-400:] = np.full(100, 0.1, np.float32).tobytes()
    path.write_bytes(data)
    described = json.loads((copied / "manifest.json").read_text())
    described["files"]["params.safetensors"] = manifest._entry(path)
    manifest.write(copied, described)
    with here():
        assert cli.main(["export", "verify", str(copied)]) == 1
    assert "not the model it was made from" in capsys.readouterr().err


FILES = (
    "decode.jax_export",
    "params.safetensors",
    "prefill.stablehlo",
    "reference.safetensors",
    "run_stablehlo.py",
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["changed", "cut", "deleted"])
def test_a_file_that_is_not_the_one_is_refused(copied, name, harm):
    path = copied / name
    data = path.read_bytes()
    if harm == "deleted":
        path.unlink()
    else:
        path.write_bytes(data[:-1] + (b"" if harm == "cut" else bytes([data[-1] ^ 1])))
    with pytest.raises(CheckpointError, match=rf"export it again:\n  {name} (is missing|has \d+ bytes|has other)"):
        build.verify(copied)
    with pytest.raises(SystemExit, match=r"export the model again"):
        loader().Artifact(copied)


def test_a_directory_without_a_manifest_is_refused(copied):
    (copied / "manifest.json").rename(copied / "manifest.unverified.json")
    with pytest.raises(CheckpointError, match="no finished export"):
        build.verify(copied)
    with pytest.raises(SystemExit, match="no finished export"):
        loader().Artifact(copied)


def changes():
    """Name -> a change that makes a manifest wrong."""
    return {
        "no verification": lambda m: m.pop("verification"),
        "another version": lambda m: m.update(version=2),
        "an unknown field": lambda m: m.update(more=1),
        "a path upwards": lambda m: (
            m["files"].update({"../x": m["files"]["decode.stablehlo"]}) or m.update(parameters=["../x"])
        ),
        "a wrong type": lambda m: m.update(chunk="8"),
        "a boolean": lambda m: m.update(batch=True),
        "zero": lambda m: m.update(batch=0),
        "an unknown role": lambda m: m["programs"]["decode"]["inputs"][0].update(role="weight"),
        "no decode": lambda m: m["programs"].pop("decode"),
        "a short sum": lambda m: m["files"]["decode.stablehlo"].update(sha256="00"),
        "a claim": lambda m: m["verification"].update(verified="yes"),
        "a shape": lambda m: m["programs"]["decode"]["inputs"][0].update(shape=[1, -1]),
        "no port's name": lambda m: m["programs"]["prefill"]["outputs"][0].pop("name"),
    }


@pytest.mark.parametrize("change", changes())
def test_a_malformed_manifest_is_refused(copied, change):
    described = json.loads((copied / "manifest.json").read_text())
    changes()[change](described)
    (copied / "manifest.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"is not what was exported; export it again:\n  manifest"):
        manifest.opened(copied)
    assert not jsonschema.Draft202012Validator(schema.schema()).is_valid(described)


def test_the_schema_is_one_and_takes_what_is_written(bundled, tiny):
    jsonschema.Draft202012Validator.check_schema(schema.schema())
    known = {"$ref", "type", "const", "enum", "pattern", "minimum", "required", "properties", "items", "$schema"}
    known |= {"additionalProperties", "title", "description", "$defs"}
    assert keywords(schema.schema()) <= known  # our reader knows each
    for folder in (bundled[0], tiny):
        found = json.loads((folder / "manifest.json").read_text())
        jsonschema.validate(found, schema.schema())
        assert list(schema.problems(found, schema.schema())) == []


def keywords(rule: dict) -> set[str]:
    found = set(rule)
    for name in ("properties", "$defs"):
        found |= {word for inner in rule.get(name, {}).values() for word in keywords(inner)}
    inner = [rule[name] for name in ("items", "additionalProperties") if isinstance(rule.get(name), dict)]
    return found | {word for rule in inner for word in keywords(rule)}


STAGES = {
    "parameters": (parameters, "_append"),
    "a program": (stablehlo, "portable"),
    "the live model": (verification, "_greedy"),
    "the first manifest": (manifest, "write"),
    "the artifact": (verification, "_fresh"),
    "the comparison": (verification, "compared"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_export_leaves_nothing(stage, tmp_path, monkeypatch):
    def stop(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(*STAGES[stage], stop)
    with pytest.raises(KeyboardInterrupt):
        build.export(model_of("tied"), "stablehlo", tmp_path / "out", options=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_nothing_that_looks_complete(tmp_path):
    """No handler runs: what lies there is hidden, and refused."""
    code = (
        "import os, signal\nfrom jaxllm.export import build, verification\nfrom tests import test_export as t\n"
        "verification.compared = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"t.made(t.model_of('tied'), t.pathlib.Path({str(tmp_path)!r}) / 'out')\n"
    )
    root = pathlib.Path(jaxllm.__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True)
    assert run.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.part-")
    assert (left / "decode.jax_export").is_file()  # it had come far
    with pytest.raises(CheckpointError, match="no finished export"):
        manifest.opened(left)


def test_weights_that_were_written_wrong_are_noticed(tmp_path, monkeypatch):
    write = parameters.write

    def wrong(folder, params, **more):
        worse = {**params, "norm": {"w": params["norm"]["w"] * 1.01}}
        return write(folder, worse, **more)

    monkeypatch.setattr(stablehlo, "write", wrong)
    with here(), pytest.raises(JaxllmError, match="not the model it was made from: scores differ by up to"):
        build.export(model_of("tied"), "stablehlo", tmp_path / "out", options=SMALL)
    assert list(tmp_path.iterdir()) == []


def answer(asked: verification.Reference) -> list[dict]:
    return [{"logits": r.scores.copy()} for r in asked.rounds]


@pytest.fixture(scope="module")
def asked() -> verification.Reference:
    return verification.reference(model_of(), SMALL, 1e-4)


def test_a_comparison_sees_each_mistake(asked):
    compare = lambda found: verification.compared(asked, found, "executed", "a test")
    assert compare(answer(asked))["max_difference"] == 0
    for wrong in (np.nan, 1e3, -1e3):
        found = answer(asked)
        found[1]["logits"][-1, 0, 7] = wrong
        with pytest.raises(JaxllmError, match="not the model"):
            compare(found)
    late = answer(asked)  # a state that was not emptied: the second prompts go on from the first
    late[1]["logits"] = asked.rounds[0].scores[: len(late[1]["logits"])]
    with pytest.raises(JaxllmError, match="not the model"):
        compare(late)


def test_another_token_passes_only_where_two_were_near(asked):
    rounds = [replace(r, scores=r.scores.copy(), margin=r.margin.copy()) for r in asked.rounds]
    best = rounds[0].scores[3, 0].argsort()[-2:]
    rounds[0].scores[3, 0, best] = rounds[0].scores[3, 0, best].mean()
    rounds[0].margin[3, 0] = 0
    near = replace(asked, rounds=tuple(rounds))
    found = answer(near)
    found[0]["logits"][3, 0, best[0]] += asked.allowed / 2
    said = verification.compared(near, found, "executed", "a test")
    assert (said["tokens_equal"], said["near_ties"], said["tokens"]) == (37, 1, 38)
    rounds[0].margin[3, 0] = 3 * asked.allowed
    with pytest.raises(JaxllmError, match="37 of 38 greedy tokens"):
        verification.compared(near, found, "executed", "a test")


def test_few_logits_are_kept_and_come_back(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "COLUMNS", 5)
    thin = verification.thinned(asked)
    verification.write(tmp_path / "r", thin)
    back = verification.read(tmp_path / "r")
    assert back.columns.tolist() == [0, 11, 23, 35, 47]
    assert (back.rounds[0].scores == asked.rounds[0].scores[..., back.columns]).all()
    assert (back.rounds[1].prompts == asked.rounds[1].prompts).all()
    full = [{"logits": r.scores} for r in asked.rounds]
    assert verification.compared(back, full, "executed", "a test")["max_difference"] == 0
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="holds no reference"):
        verification.read(tmp_path / "bad")


# ---- refused before any work ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (Options(context=64, window=8), ContextError, "leave one of them out"),
        (Options(context=128), ContextError, "made for 96"),
        (Options(context=32), ContextError, "verified with 32 tokens"),
        (Options(sinks=2), ContextError, "they need window="),
        (Options(window=8, sinks=8), ContextError, "sinks must be fewer"),
        (Options(batch=0), ContextError, "at least 1"),
        (
            Options(platform="metal"),
            ConfigError,
            "knows no platform 'metal'; its platforms are cpu, cuda, rocm, tpu",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(options, error, says, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_loaded", lambda *a: pytest.fail("that is work"))
    with pytest.raises(error, match=says):
        build.export(model_of(), "stablehlo", tmp_path / "out", options=options)
    assert list(tmp_path.iterdir()) == []


def test_other_refusals(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"no target 'tpu'; there are .*stablehlo"):
        build.export(model_of(), "tpu", tmp_path / "out")
    with pytest.raises(ConfigError, match="there is no weight format 'q5'"):
        build.export(model_of(), "stablehlo", tmp_path / "out", format="q5")
    with pytest.raises(ConfigError, match="a Model has its dtype already"):
        build.export(model_of(), "stablehlo", tmp_path / "out", dtype="float16")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        build.export(model_of(), "stablehlo", tmp_path / "full")
    with pytest.raises(CheckpointError, match="Not a directory"):
        build.export(model_of(), "stablehlo", tmp_path / "full" / "file" / "out", options=SMALL)
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs flatbuffers: pip install 'jaxllm\[export-stablehlo\]'"):
        build.export(model_of(), "stablehlo", tmp_path / "out", options=SMALL)


NEW = """
from jaxllm.export.target import Target

def refuses(config, values, formats, options):
    return f"{sorted(formats)[0]} is packed" if formats else None

TARGET = Target("paper", "printed", ("a4",), ("json",), None, refuses, lambda job: 1 / 0, None)
"""


def test_a_new_target_is_one_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "paper.py").write_text(NEW)
    monkeypatch.setattr(target.targets, "__path__", [*target.targets.__path__, str(tmp_path / "targets")])
    assert cli.main(["export", "--target", "list"]) == 0
    assert "paper       printed\n            platforms: a4\n            ready\n" in capsys.readouterr().out
    monkeypatch.setattr(build, "_loaded", lambda *a: pytest.fail("that is work"))
    says = "the target paper cannot take this model: embed.w is packed"
    with pytest.raises(ConfigError, match=says):  # by the format that was asked for
        build.export(jaxllm.bundled(), "paper", tmp_path / "out", format="q4f16_1")
    with pytest.raises(ConfigError, match=says):  # by those that the model has
        build.export(model_of("full", "q4f16_1"), "paper", tmp_path / "out")
    sys.modules.pop("jaxllm.export.targets.paper")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["m", "--target", "stablehlo"],
        ["m", "--out", "x"],
        ["verify"],
        ["m", "n", "--target", "stablehlo", "--out", "x"],
        ["m", "--target", "stablehlo", "--out", "x", "--chunk", "0"],
    ],
)
def test_wrong_usage(argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", *argv])
    assert stop.value.code == 2


def test_the_list_as_json(capsys):
    assert cli.main(["export", "--target", "list", "--json"]) == 0
    found = {t["name"]: t for t in json.loads(capsys.readouterr().out)}
    assert found["stablehlo"]["platforms"] == ["cpu", "cuda", "rocm", "tpu"]
    assert found["stablehlo"]["missing"] is None
    assert os.path.isfile(stablehlo.shipped.__file__)
