"""A model in a page: ONNX Runtime computes what the live model does, in Python and in a browser."""

import contextlib
import functools
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import decode, ops
from jaxllm.checkpoint.canonical import flatten
from jaxllm.config import MLP, Norm
from jaxllm.errors import ConfigError, MissingExtraError
from jaxllm.export import build, onnx_convert, target, web_assets, web_page
from jaxllm.export.onnx_graph import Graph, Unsupported, linear
from jaxllm.export.onnx_packed import blocks
from jaxllm.export.options import Options
from jaxllm.export.targets import web
from jaxllm.quant import dequantize, encode
from tests import chromium, random_model
from tests.test_export import KINDS, SMALL, here, model_of

PROMPT = "def read_lines(path):"
absent = [name for name in ("onnx", "onnxruntime") if not importlib.util.find_spec(name)]
engine = pytest.mark.skipif(bool(absent), reason=f"{' and '.join(absent)} is not installed: jaxllm[export-web]")
browser = pytest.mark.skipif(not chromium.found(), reason="there is no Chromium on the PATH")
EVICTING = Options(window=20, sinks=3, chunk=8)
CASES = {name: case for name, case in KINDS.items() if name != "rows"} | {
    "learned": ("learned", None, SMALL),
    "rings that evict": ("window", "q4f16_1", EVICTING),
    "experts in blocks": ("moe", None, replace(SMALL, chunk=32)),
    "experts in 8 bits": ("moe", "int8", SMALL),
    "packed latent": ("mla", "int8_g32", SMALL),
    "packed and tied": ("tied", "int4_g32", SMALL),
    "packed recurrent": ("recurrent", "q4f16_1", SMALL),
    "zeros": ("full", "uint4_g32", SMALL),
    "five bits": ("full", "int5_g32", SMALL),
    "bfloat16": ("full", "q0bf16", SMALL),
}


@functools.cache
def packages() -> str | None:
    """Why the packages of the page cannot be had, or None."""
    try:
        web_assets.files()
    except MissingExtraError as error:
        return str(error)
    return None


@contextlib.contextmanager
def without_page():
    """The model alone: no packages of npm's are asked for."""
    with pytest.MonkeyPatch.context() as patch, here():
        patch.setattr(web_page, "write", lambda *args: None)
        yield


# ---- the graph is the model -----------------------------------------------------------------------------


@engine
@pytest.mark.parametrize("case", CASES)
def test_onnx_runtime_computes_the_model(case, tmp_path):
    name, format, options = CASES[case]
    with without_page():
        export = build.export(model_of(name, format), "web", tmp_path / "out", options=options)
    said = export.manifest["verification"]
    assert said["verified"] == "executed"
    assert said["tokens_equal"] + said["near_ties"] == said["tokens"] == 38
    rounded = format in ("q4f16_1", "q0bf16")  # 16-bit activations: the live model's kernels round them
    assert said["max_difference"] < (0.03 if rounded else 2e-6) * said["largest_logit"]
    programs = export.manifest["programs"]
    assert {files["onnx"] for files in (p["files"] for p in programs.values())} == {"model.onnx"}


@engine
def test_layer_norms_without_a_bias(tmp_path):
    norm = Norm("layer", 1e-5)
    config = random_model.config(random_model.Block(random_model.attention(), MLP(40, "gelu"), norm), norm=norm)
    model = jaxllm.Model(config, random_model.params(config))
    with without_page():
        said = build.export(model, "web", tmp_path / "out", options=SMALL).manifest["verification"]
    assert said["tokens_equal"] == said["tokens"]
    assert said["max_difference"] < 2e-6 * said["largest_logit"]


@engine
def test_the_bundled_model_in_a_fresh_process(tmp_path):
    """64 greedy tokens, fed as a page feeds them: no padding, chunks and then token by token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web_page, "write", lambda *args: None)
        export = build.export(
            jaxllm.bundled(), "web", tmp_path / "out", dtype="float32", options=Options(context=256, chunk=16)
        )
    live = jaxllm.load(dtype="float32")
    ids = live.tokenizer.encode("import os\n\n\n" + PROMPT + "\n" + 8 * "    pass\n")
    assert len(ids) > 16
    runner, state, made = web.Runner(export.folder, export.manifest), None, []
    state = runner.start()
    for i in range(0, len(ids), 16):
        part = np.array([ids[i : i + 16]], np.int32)
        said, state = runner.step("prefill", state, {"tokens": part, "n_new": np.array([part.shape[1]])})
    for _ in range(64):
        made.append(int(said["logits"].argmax()))
        one = {"tokens": np.array([[made[-1]]], np.int32), "n_new": np.ones(1, np.int32)}
        said, state = runner.step("decode", state, one)
    assert made == list(decode.generate(live, [ids], max_new_tokens=64, eos=()).completions[0].tokens)


@engine
def test_positions_are_kept_once_and_packed_weights_stay_packed(tmp_path):
    model = model_of("window", "int4_g32")
    with without_page():
        export = build.export(model, "web", tmp_path / "out", options=SMALL)
    kept = [p["name"] for p in export.manifest["programs"]["decode"]["inputs"] if p["name"].endswith(".pos")]
    assert kept == ["layers.0.pos", "layers.1.pos", "layers.2.pos"]  # a ring, all slots, and a ring of chunks
    with without_page():
        export = build.export(model_of("full", "int4_g32"), "web", tmp_path / "same", options=SMALL)
    kept = [p["name"] for p in export.manifest["programs"]["decode"]["inputs"] if p["name"].endswith(".pos")]
    assert kept == ["layers.0.pos"]
    import onnx

    graph = onnx.load(export.folder / "model.onnx").graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 2 * 7 + 1
    held = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    for path, leaf in flatten(model_of("full", "int4_g32").params).items():
        if f"{path}.codes" in held:
            own = np.s_[:, : leaf.columns // 2]  # behind them is what fills up the last block
            codes = held[f"{path}.codes"].reshape(leaf.shape[0], -1)
            assert (codes[own] == np.asarray(leaf.codes)[own]).all(), path


@pytest.mark.parametrize(
    "format", ["int4_g32", "q4f16_1", "int8_g64", "int8", "int3_g32", "uint4_g64", "int6_g128"]
)
@pytest.mark.parametrize("columns", [128, 96, 80])
def test_blocks_stand_for_the_same_numbers(format, columns):
    """By ONNX Runtime's definition of the layout, written out here."""
    w = np.random.default_rng(0).standard_normal((6, columns)).astype(np.float32)
    q = jax.tree.map(np.asarray, encode(w, jaxllm.quant.named(format)))
    found = blocks(q, lambda part: getattr(q, part))
    codes = found.codes()
    assert codes.shape == (6, found.count, found.block * found.bits // 8)
    if found.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(6, found.count, found.block)
    zero = np.full((6, found.count), 2 ** (found.bits - 1))
    if found.zeros:
        zero = found.zeros()
        zero = zero if found.bits == 8 else np.stack([zero & 15, zero >> 4], -1).reshape(6, -1)[:, : found.count]
    codes, zero, scales = (np.asarray(x, np.float32) for x in (codes, zero, found.scales()))
    values = (codes - zero[..., None]) * scales[..., None]
    np.testing.assert_array_equal(values.reshape(6, -1)[:, :columns], dequantize(q, np.float32))


@engine
def test_the_program_of_many_layers_is_small(tmp_path):
    one = random_model.block(random_model.attention(), MLP(40, "silu"))
    config = random_model.config(*[one] * 16)
    with without_page():
        model = jaxllm.quantize(jaxllm.Model(config, random_model.params(config)), "q4f16_1")
        export = build.export(model, "web", tmp_path / "out", options=SMALL)
    assert (export.folder / "model.onnx").stat().st_size < 2**20


# ---- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "options", "says"),
    [
        ("nf4", SMALL, "embed.w is in nf4: codes that stand for nf4 have no operator there"),
        ("q3f16_1", SMALL, "groups of 40 columns have no operator there"),
        ("w8a8", SMALL, "activations rounded to int8 have no operator there"),
        (None, replace(SMALL, batch=2), "leave --batch out"),
        (None, replace(SMALL, sampler="in-graph"), "leave --sampler out"),
    ],
)
def test_what_has_no_operator_is_refused_before_any_work(format, options, says, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_loaded", lambda *a: pytest.fail("that is work"))
    with pytest.raises(ConfigError, match=f"the target web cannot take this model: .*{says}"):
        build.export(jaxllm.bundled(), "web", tmp_path / "out", format=format, options=options)
    assert list(tmp_path.iterdir()) == []


def test_a_primitive_without_an_operator_is_named(monkeypatch):
    monkeypatch.delitem(onnx_convert.RULES, "logistic")
    model = model_of()
    reason = target.find("web").refuses(model.config, {}, {}, SMALL)
    assert reason == "it has the primitive logistic, for which the converter to ONNX has no operator"


def test_named_operations_are_whole_and_nothing_else_changes():
    x, w = jnp.ones((2, 3)), jnp.ones((4, 3))
    with ops.named():
        inside = jax.make_jaxpr(lambda x, w: ops.matmul(x, w))(x, w)
    assert [eqn.params["name"] for eqn in inside.eqns] == ["matmul"]
    outside = jax.make_jaxpr(lambda x, w: ops.matmul(x, w))(x, w)
    assert "jaxllm_call" not in str(outside)


# ---- primitives by themselves ---------------------------------------------------------------------------

LINES = np.arange(24, dtype=np.float32).reshape(4, 6) / 7 - 1
PRIMITIVES = {  # functions of [t, 6] of which models use a part, or another form
    "gather rows": lambda x: x[jnp.array([3, 0, -1])],
    "gather two axes": lambda x: x[jnp.array([1, 2]), jnp.array([0, 5])],
    "take along": lambda x: jnp.take_along_axis(x, jnp.argsort(-x, -1), -1),
    "fill": lambda x: x.at[jnp.array([1, 9])].get(mode="fill", fill_value=7.0),
    "clip": lambda x: x.at[jnp.array([1, 9])].get(mode="clip"),
    "window": lambda x: jax.lax.dynamic_slice(x, (x[0, 0].astype(int) + 9, 2), (2, 3)),
    "set": lambda x: x.at[jnp.array([2, 0, 11])].set(jnp.ones((3, 6)), mode="drop"),
    "add": lambda x: x.at[jnp.array([2, 0, 2])].add(x[:3]),
    "sort": lambda x: jax.lax.sort((x, jnp.cos(x)), dimension=1, num_keys=1)[1],
    "top": lambda x: jax.lax.top_k(x, 3)[1],
    "scan": lambda x: jax.lax.scan(lambda c, row: (c * 0.5 + row, c.sum() + row[:2]), x[0], x)[1],
    "reverse scan": lambda x: jax.lax.scan(lambda c, row: (c + row, c), x[0], x, reverse=True)[1],
    "softplus": lambda x: jax.nn.softplus(x * 9),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "remainder": lambda x: jnp.stack([(x * 9).astype(int) % 4, jax.lax.rem((x * 9).astype(int), 4)]),
    "reductions": lambda x: jnp.stack([x.max(1), x.min(1), x.prod(1), x.argmax(1) + 0.0, (x > 0).all(1) + 0.0]),
    "cumulative": lambda x: jnp.cumsum(x, 1),
    "products": lambda x: jnp.einsum("ij,kj,k->ik", x, x, x[:, 0]),
    "shapes": lambda x: jnp.pad(x, ((0, 0), (1, 2)), constant_values=3.0)[:, ::-1].T.reshape(3, -1)[1:],
    "powers": lambda x: jnp.stack([jnp.abs(x) ** 1.5, x**3, jnp.expm1(x), jnp.sign(x), jnp.clip(x, -0.5, 1)]),
    "choice": lambda x: jnp.where((x > 0) ^ (x < 1) | ~(x != 0), x, jnp.inf).min(1),
}


@engine
@pytest.mark.parametrize("name", PRIMITIVES)
def test_a_primitive(name):
    """JAX's own results are the reference; the number of rows is known only when it runs."""
    import onnxruntime

    f = PRIMITIVES[name]
    (t,) = jax.export.symbolic_shape("t", constraints=["t >= 3", "t <= 64"])
    fixed = name in ("gather rows", "scan", "reverse scan", "products", "shapes", "window", "fill", "clip")
    shape = LINES.shape if fixed else (t, 6)
    closed = jax.make_jaxpr(f)(jax.ShapeDtypeStruct(shape, jnp.float32))
    g = Graph()
    x = g.input("x", (jax.export.symbolic_shape("t")[0], 6), np.float32)
    x = replace(x, shape=shape, actual=shape)
    consts = [np.asarray(c) for c in closed.consts]
    (y,) = onnx_convert.evaluated(g, closed.jaxpr, consts, [x])
    g.output("y", y)
    model = serialized(g)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": LINES})
    expected = np.asarray(f(jnp.asarray(LINES)))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def serialized(g: Graph) -> bytes:
    import tempfile

    from jaxllm.export import onnx_file

    with tempfile.TemporaryDirectory() as folder:
        onnx_file.write(pathlib.Path(folder), g, "x.onnx")
        return pathlib.Path(folder, "x.onnx").read_bytes()


def test_inputs_that_are_left_out_at_the_end_are_not_written():
    g = Graph()
    x, one = g.input("x", (3,), np.float32), np.ones((), np.float32)
    for given in ((x, x, None), (x, None, one)):
        g.op("Some", *given, None, shape=(3,), dtype=np.float32)
    assert [node.inputs for node in g.nodes] == [("x", "x"), ("x", "", g.constant(one).name)]


def test_types_that_browsers_lack_are_refused():
    with pytest.raises(Unsupported, match="numbers of type bfloat16"):
        Graph().cast(np.ones(3, np.float32), jnp.bfloat16)


def test_axes_of_another_form_are_refused():
    (t,) = jax.export.symbolic_shape("t")
    assert [linear(a) for a in (5, t, 3 * t, t + 2, 4 * t - 1)] == [(0, 5), (1, 0), (3, 0), (1, 2), (4, -1)]
    with pytest.raises(Unsupported, match="an axis of length"):
        linear(t * t)


# ---- packages of the page -------------------------------------------------------------------------------


def test_packages_are_the_pinned_ones_or_none(tmp_path, monkeypatch):
    monkeypatch.setenv(web_assets.FOLDER, str(tmp_path))
    with pytest.raises(MissingExtraError, match=r"has no onnxruntime-web-.*tgz; make it with npm pack"):
        web_assets.files()
    (tmp_path / web_assets.ORT.archive).write_bytes(b"something else")
    with pytest.raises(MissingExtraError, match="its checksum differs"):
        web_assets.files()
    monkeypatch.delenv(web_assets.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:1/")
    with pytest.raises(MissingExtraError, match=f"cannot be read .*set {web_assets.FOLDER} to a folder with"):
        web_assets.files()


# ---- a browser ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The bundled model in 4 bits as one file, and as a folder."""
    if absent or not chromium.found():
        pytest.skip("the page needs onnx, onnxruntime and a Chromium")
    if packages():
        pytest.skip(packages())
    made, options = {}, Options(context=128, chunk=16)
    for name, limit in (("file", web_page.WHOLE), ("folder", 0)):
        with pytest.MonkeyPatch.context() as patch, here():
            patch.setattr(web_page, "WHOLE", limit)
            out = tmp_path_factory.mktemp("pages") / name
            made[name] = build.export(
                jaxllm.bundled(), "web", out, format="int4_g32", dtype="float32", options=options
            ).folder
    return made


@functools.cache
def live_tokens(folder: str, count: int) -> tuple[list[int], list[int]]:
    """(the prompt's, the greedy ones after it) of the live model, chat template included."""
    model = jaxllm.quantize(jaxllm.load(dtype="float32"), "int4_g32")
    ids = model.tokenizer.encode_chat([{"role": "user", "content": PROMPT}])
    return ids, list(decode.generate(model, [ids], max_new_tokens=count).completions[0].tokens)


READY = "document.documentElement?.dataset.mode === 'ready'"
FAILED = "document.querySelector('#status.wrong')?.textContent"
ANSWER = "document.querySelector('article.assistant:last-child')"


def chat(page: chromium.Chromium, url: str, engine: str, count: int) -> tuple[list[int], list[int]]:
    """Type the prompt -> (its ids, those of the answer)."""
    page.open(f"{url}#engine={engine}&temperature=0&tokens={count}")
    page.wait(READY, FAILED)
    assert page.evaluate("document.documentElement.dataset.engine") == engine
    page.type(PROMPT)
    page.enter()
    page.wait(f"{ANSWER}?.dataset.ids", FAILED)
    numbers = lambda key: [int(x) for x in page.evaluate(f"{ANSWER}.dataset.{key}").split()]
    return numbers("prompt"), numbers("ids")


def elsewhere(page: chromium.Chromium, url: str) -> list[str]:
    """Addresses that were asked for and are not the page's own."""
    asked = [event["request"]["url"] for event in page.events("Network.requestWillBeSent")]
    assert asked
    return [a for a in asked if not a.startswith((url.rpartition("/")[0], "blob:", "data:", "about:"))]


@browser
def test_a_page_from_a_disk_in_webassembly(pages, tmp_path):
    """Opened as a file: the prompt's ids and 64 greedy tokens are the live model's; then it talks, and stops."""
    url = (pages["file"] / "index.html").as_uri()
    with chromium.Chromium() as page:
        prompt, made = chat(page, url, "wasm", 64)
        assert (prompt, made) == live_tokens(str(pages["file"]), 64)
        status = page.evaluate("document.getElementById('status').textContent")
        assert re.search(r"64 tokens · [\d.]+ tokens/s", status)
        page.type("x = 1")
        page.enter()
        page.wait("document.querySelectorAll('article.assistant').length === 2")
        page.evaluate("document.getElementById('stop').click()")
        page.wait(f"{READY} && {ANSWER}.dataset.ids !== undefined", FAILED)
        assert len(page.evaluate(f"{ANSWER}.dataset.ids").split()) < 64
        page.size(390, 844, phone=True)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert elsewhere(page, url) == []


@browser
def test_a_page_from_a_disk_on_webgpu(pages):
    """SwiftShader computes it: seconds a token, so there are few."""
    url = (pages["file"] / "index.html").as_uri()
    with chromium.Chromium() as page:
        prompt, made = chat(page, url, "webgpu", 6)
    ids, tokens = live_tokens(str(pages["file"]), 64)
    assert (prompt, made) == (ids, tokens[:6])


@browser
def test_a_folder_served_with_threads(pages):
    assert not {"page.json", "engine.js"} & {path.name for path in pages["file"].iterdir()}
    command = [sys.executable, str(pages["folder"] / "serve.py"), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().strip() + "index.html"
            with chromium.Chromium() as page:
                prompt, made = chat(page, url, "wasm", 8)
                assert page.evaluate("crossOriginIsolated")
                assert elsewhere(page, url) == []
        finally:
            server.kill()
    ids, tokens = live_tokens(str(pages["file"]), 64)
    assert (prompt, made) == (ids, tokens[:8])


@pytest.fixture(scope="module")
def numbers_page(tmp_path_factory):
    """Makes a page of a tiny model that has no tokenizer: it is talked to in numbers."""
    if absent or not chromium.found() or packages():
        pytest.skip("the page needs onnx, onnxruntime, a Chromium and packages of npm's")
    folder = tmp_path_factory.mktemp("numbers")

    def page(kind: str) -> pathlib.Path:
        name, format, options = CASES[kind]
        with here():
            return build.export(model_of(name, format), "web", folder / kind, options=options).folder

    return page


def check_numbers(page: chromium.Chromium, kind: str, folder: pathlib.Path, engine: str, count: int) -> None:
    """What the page answers to numbers is what the live model does."""
    asked = random_model.tokens(11, seed=3).tolist()
    name, format, options = CASES[kind]
    room = dict(max_len=options.context)
    if options.window:
        room = dict(max_len=options.window, overflow="evict-oldest", sinks=options.sinks)
    with ops.portable():
        model, sizes = model_of(name, format), dict(max_new_tokens=count, prefill_chunk_size=options.chunk)
        live = decode.generate(model, [asked], **sizes, **room)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "PROMPT", " ".join(map(str, asked)))
        prompt, made = chat(page, (folder / "index.html").as_uri(), engine, count)
    assert (prompt, made) == (asked, list(live.completions[0].tokens))


@browser
@pytest.mark.slow  # a software GPU compiles its programs for a minute
@pytest.mark.parametrize("kind", ["experts in 8 bits", "packed recurrent"])
def test_other_kinds_on_webgpu(kind, numbers_page):
    """What has no kernel on a GPU is left to the CPU by the runtime."""
    folder = numbers_page(kind)
    with chromium.Chromium() as page:
        check_numbers(page, kind, folder, "webgpu", 5)


@pytest.fixture(scope="module")
def tab():
    """A browser for several pages, one after the other."""
    with chromium.Chromium() as page:
        yield page


@browser
@pytest.mark.parametrize("kind", ["evicting", "latent", "bfloat16"])
def test_other_kinds_in_webassembly(kind, numbers_page, tab):
    """A window that is passed, shared keys and values, and numbers that the browser's runtime has no type for."""
    check_numbers(tab, kind, numbers_page(kind), "wasm", 24)


@engine
def test_what_the_page_is_told(tmp_path, monkeypatch):
    """Without packages: sizes, the state, the template and what it may name, and which files each engine reads."""
    assets = {name: name.encode() for name in web_assets.WANTED} | {"licenses.txt": b""}
    monkeypatch.setattr(web_assets, "files", lambda: assets)
    monkeypatch.setattr(web_page, "WHOLE", 0)
    with here():
        options = Options(context=64, chunk=8)
        out = build.export(jaxllm.bundled(), "web", tmp_path / "out", format="int4_g32", options=options).folder
    page, model = json.loads((out / "page.json").read_text()), jaxllm.load()
    assert page["weights"] == model.size
    assert (page["format"], page["context"], page["chunk"]) == ("int4_g32", 64, 8)
    assert page["eos"] == sorted(model.eos_ids)
    assert page["begin"] == [model.tokenizer.bos_id]
    assert page["template"] == model.tokenizer.chat_template
    assert page["special"]["bos_token"] == model.tokenizer.token(model.tokenizer.bos_id)
    assert len(page["state"]) == 2 * 8 + 2  # keys and values, positions and the length
    assert page["inline"] == []
    for engine, names in page["engines"].items():
        files = [names["model"], *names["weights"]]
        assert all((out / name).stat().st_size == page["files"][name] for name in files)
        assert (out / names["runtime"]).is_file()
        assert (out / names["wasm"]).is_file()
        assert ("int8" in names["model"]) == (engine == "wasm")
    whole = (out / "index.html").read_text()
    assert 'src="page.js"' in whole
    assert "<!--" not in whole
    assert "default-src 'none'" in whole
