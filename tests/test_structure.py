"""The shape of the package: which way imports point, what the maths may know, what importing costs."""

import ast
import functools
import pathlib
import re
import subprocess
import sys

import jax
import pytest

import jaxllm
from jaxllm import decode, layers, sampling
from jaxllm.families import FAMILIES, REFUSED
from jaxllm.model import Model
from tests import random_model

PACKAGE = pathlib.Path(jaxllm.__file__).parent
FILES = sorted(p for p in PACKAGE.rglob("*.py") if "bundled" not in p.parts)
MATHS = ("basics", "layers", "ops", "recurrent", "slots", "softmax", "state")

# What each part may import of the others. A new part gets a row; a new arrow is a decision.
MAY_IMPORT = {
    "errors": "",
    "files": "",
    "arena": "",
    "progress": "",
    "programs": "",
    "peers": "errors",
    "config": "errors",
    "families": "config errors",
    "taps": "errors",
    "sampling": "errors",
    "tokenizer": "errors",
    "quant": "arena config errors files taps",
    "partition": "",
    "derivative": "",
    "native": "errors quant",
    "kernels": "errors files quant",
    "softmax": "quant",
    "calls": "",
    "slots": "",
    "ops": "calls config derivative errors kernels native partition quant slots softmax",
    "state": "config errors files ops quant",
    "basics": "config ops",
    "recurrent": "basics config ops state taps",
    "layers": "basics config errors ops recurrent softmax state taps",
    "checkpoint": "arena config errors families files progress quant",
    "lora": "checkpoint errors families quant taps",
    "model": "arena checkpoint config errors families files progress quant tokenizer",
    "generation": "state",
    "stopping": "errors generation tokenizer",
    "prompts": "config errors model native quant state",
    "scoring": "config errors generation layers model progress prompts sampling state",
    "reading": "config errors layers model prompts state",
    "decode": "config errors generation layers model prompts reading sampling scoring state stopping",
    "spec_verify": "sampling",
    "spec_length": "",
    "feature_head": "basics config layers state",
    "head_files": "checkpoint config errors families feature_head files model",
    "spec_decode": "config decode errors generation layers model reading sampling spec_length spec_mask"
    " spec_verify state",
    "draft_ngram": "decode errors model reading spec_decode spec_verify",
    "draft_grow": "config errors layers sampling spec_verify state",
    "spec_mask": "sampling spec_verify",
    "draft_lookahead": "decode errors model reading spec_decode spec_verify",
    "draft_model": "decode draft_grow errors model prompts reading sampling spec_decode spec_verify state"
    " tokenizer",
    "draft_medusa": "basics checkpoint config decode draft_grow errors layers model ops reading sampling "
    "spec_decode spec_verify",
    "heads": "config decode errors files generation layers model prompts sampling spec_decode state",
    "heads_medusa": "checkpoint config draft_medusa errors heads model quant",
    "heads_eagle": "config draft_head errors families feature_head head_files heads model quant",
    "heads_draft": "checkpoint config draft_model errors families files heads layers model",
    "draft_head": "decode draft_grow errors feature_head model prompts reading sampling spec_decode spec_verify"
    " state",
    "beam": "config decode errors generation layers model prompts sampling state",
    "comparison": "config errors layers model progress prompts state taps",
    "lm_eval": "decode errors model sampling scoring",
    "plan": "config decode errors model native ops quant state",
    "shapes": "config errors families",
    "random_weights": "arena checkpoint config model progress quant",
    "startup": "decode errors jaxllm programs",
    "bench": "checkpoint config decode errors model native ops prompts quant startup state",
    "export": "checkpoint config decode errors files jaxllm kernels layers model ops progress prompts quant"
    " sampling state tokenizer",
    "calibration": "arena checkpoint config errors layers model progress prompts quant state taps",
    "jaxllm": "config layers model quant state taps",
}
ANYTHING = {"commands", "cli", "__main__"}  # and nothing below imports them
SAME_PART = {"chat": "tokenizer", "detokenizer": "tokenizer", "tokenizer_files": "tokenizer"}
SAME_PART |= {"tokenizer_gguf": "tokenizer", "tokenizer_llama2c": "tokenizer", "config_json": "config"}
SAME_PART |= {"sampling_steps": "sampling", "sampling_penalties": "sampling", "__init__": "jaxllm"}


def name(path: pathlib.Path) -> str:
    return str(path.relative_to(PACKAGE))


@functools.cache
def tree(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def part(module: str) -> str:
    """The row of the table that jaxllm's module (without "jaxllm.") belongs to."""
    parts = (module or "jaxllm").split(".")
    if parts[-1] == "__main__":  # of a package, too: what `python -m` runs
        return parts[-1]
    return SAME_PART.get(parts[0], parts[0])


def part_of(path: pathlib.Path) -> str:
    return part(".".join(path.relative_to(PACKAGE).with_suffix("").parts))


def imported(nodes) -> set[str]:
    """Full names of what import statements among the nodes ask for."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def parts_imported(path: pathlib.Path) -> set[str]:
    """The parts of jaxllm that a file imports anywhere, functions included."""
    modules = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    found = set()
    for full in imported(ast.walk(tree(path))):
        package, _, rest = full.partition(".")
        if package == "jaxllm":
            found.add(part(rest) if rest.split(".")[0] in modules else "jaxllm")
    return found - {part_of(path)}


def at_import_time(node):
    """The nodes that run when the file is imported: all but the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from at_import_time(child)


# ---- imports ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_one_way(path):
    own = part_of(path)
    assert own in MAY_IMPORT or own in ANYTHING, f"{own} needs a row in MAY_IMPORT"
    found = parts_imported(path)
    if own in ANYTHING:
        assert own in ("cli", "__main__") or not found & {"cli", "__main__"}
    else:
        assert found <= set(MAY_IMPORT[own].split())


def test_the_table_has_no_circle():
    """Taking away parts that import nothing left, again and again, leaves none."""
    left = {k: set(v.split()) for k, v in MAY_IMPORT.items()}
    while ready := {k for k, v in left.items() if not v & left.keys()}:
        left = {k: v for k, v in left.items() if k not in ready}
    assert left == {}


@pytest.mark.parametrize("path", [p for p in FILES if part_of(p) in ("families", "config", "errors")], ids=name)
def test_descriptions_know_no_jax(path):
    assert not {m for m in imported(ast.walk(tree(path))) if m.split(".")[0] in ("jax", "jaxlib")}


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name != "shipped"], ids=name)
def test_only_jax_and_numpy_are_imported_up_front(path):
    tops = {m.split(".")[0] for m in imported(at_import_time(tree(path)))}
    assert tops - sys.stdlib_module_names <= {"jax", "numpy", "ml_dtypes", "jaxllm"}


def test_importing_is_light():
    heavy = (
        "torch transformers tokenizers jinja2 safetensors huggingface_hub rich sentencepiece tiktoken flax optax "
    )
    heavy += "orbax"
    code = f"import jaxllm, sys; print([m for m in {heavy.split()} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert run.stdout.strip() == "[]"
    assert run.stderr == ""


def test_a_command_imports_what_it_needs():
    later = "jaxllm.calibration jaxllm.checkpoint.mlc_writer jaxllm.comparison jaxllm.decode jaxllm.plan"
    code = f"import jaxllm.cli, sys; print([m for m in {later.split()} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert run.stdout.strip() == "[]"


# ---- the maths knows no family ----------------------------------------------------------------------------

MIXERS = {"mamba", "mamba2", "lfm2"}  # these names are those of a mixer, too


def words(text: str) -> str:
    """Lower case, with CamelCase taken apart, so that every part of an identifier is a word."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text).lower()


@pytest.mark.parametrize("module", MATHS)
def test_no_family_is_named_in_the_maths(module):
    text = words((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    families = {*FAMILIES, *REFUSED} - MIXERS
    assert len(families) > 20
    assert [f for f in families if re.search(rf"(?<![a-z0-9]){re.escape(f)}(?![a-z0-9])", text)] == []


@pytest.mark.parametrize("text", ["def llama_attention(x):", "class GemmaNorm:", "if kind == 'gpt_neox':"])
def test_a_family_would_be_noticed(text):
    found = [f for f in FAMILIES if re.search(rf"(?<![a-z0-9]){re.escape(f)}(?![a-z0-9])", words(text))]
    assert len(found) >= 1


# ---- readable files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_is_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 500


def described_elsewhere(path: pathlib.Path, node: ast.stmt) -> bool:
    """A family's description is its own text; `arguments` and `run` are what every command has."""
    if path.parent.name == "commands":
        return node.name in ("arguments", "run")
    first = node.args.args[:1] if isinstance(node, ast.FunctionDef) else []
    return path.parent.name == "families" and bool(first) and first[0].arg == "c"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_what_is_public_says_what_it_is(path):
    public = [
        node
        for node in tree(path).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    silent = [n.name for n in public if not ast.get_docstring(n) and not described_elsewhere(path, n)]
    assert silent == []
    assert ast.get_docstring(tree(path)) or path.stem == "__init__"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_text_is_evaluated(path):
    """No eval, exec or pickle: nothing in a checkpoint is ever run."""
    called = {n.func.id for n in ast.walk(tree(path)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not called & {"eval", "exec", "compile", "__import__"}
    assert not {m for m in imported(ast.walk(tree(path))) if m.split(".")[0] in ("pickle", "marshal", "shelve")}


# ---- one program for every prompt -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "window"])
def test_one_trace_of_prefill_and_one_of_the_step(name, monkeypatch):
    """Two prompts of other lengths, other sampler values, other keys: nothing is traced a second time."""
    config = random_model.CONFIGS[name]
    model = Model(config, random_model.params(config))
    traced = []
    original = layers.hidden

    def counted(config, params, tokens, state, **more):
        traced.append(tokens.shape)
        return original(config, params, tokens, state, **more)

    monkeypatch.setattr(layers, "hidden", counted)
    jax.clear_caches()
    for seed, (length, heat, share) in enumerate([(5, 0.7, 0.9), (37, 1.3, 0.5), (8, 0.2, 0.99)]):
        sampler = sampling.sampler(temperature=heat, top_p=share)
        prompt = random_model.tokens(length, seed=seed).tolist()
        decode.generate(
            model, prompt, max_new_tokens=6, sampler=sampler, key=jax.random.key(seed), prefill_chunk_size=8
        )
    assert traced == [(1, 8), (1, 1)]
    jax.clear_caches()
