"""Orbax folders: every kind of parameter comes back bit by bit, onto a mesh too, and a killed save harms none."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxllm
from jaxllm import decode, quant
from jaxllm.checkpoint import orbax
from jaxllm.checkpoint.orbax import POINTER, save_orbax
from jaxllm.errors import CheckpointError, ConfigError, JaxllmError, MissingExtraError
from jaxllm.model import Model, load_orbax
from jaxllm.quant import FORMATS
from jaxllm.quant.describe import abstract, describe
from tests import random_model

pytest.importorskip("orbax.checkpoint")
ROOT = pathlib.Path(__file__).resolve().parents[1]
FORMAT_NAMES = ("q4f16_1", "q3f16_1", "int6_g32", "uint5_g64", "int8", "fp8_e4m3", "mxfp4", "nvfp4", "nf4", "w8a8")


def random_of(name: str = "full", *, seed: int = 0, format: str | None = None) -> Model:
    config = random_model.CONFIGS[name]
    model = Model(config, random_model.params(config, seed=seed), eos_ids=frozenset({3, 5}), defaults={"top_k": 7})
    return model if format is None else quant.quantize_model(model, format)


def assert_same(a: Model, b: Model) -> None:
    assert a.config == b.config
    assert jax.tree.structure(a.params) == jax.tree.structure(
        b.params
    )  # formats, columns and dtypes of packed ones
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# ---- what goes in comes out --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", random_model.CONFIGS)
def test_every_kind_of_layer_comes_back(name, tmp_path):
    model = random_of(name)
    save_orbax(model, tmp_path / "x")
    back = jaxllm.load(tmp_path / "x")
    assert_same(back, model)
    assert back.eos_ids == {3, 5}
    assert back.defaults == {"top_k": 7}
    assert jaxllm.load_config(tmp_path / "x") == model.config


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_packed_weights_come_back(format, tmp_path):
    model = random_of("moe", format=format)
    save_orbax(model, tmp_path, recipe=quant.recipe(format, model.config))
    assert_same(jaxllm.load(tmp_path), model)
    assert orbax.open_folder(tmp_path).recipe == quant.recipe(format, model.config)


@pytest.mark.parametrize("dtype", ["int4", "float8_e4m3fn", "float8_e5m2", "bfloat16", "float16"])
def test_narrow_arrays_come_back(dtype, tmp_path):
    model = random_of()
    model.params["layers"][0]["ffn"]["up"]["w"] = (model.params["layers"][0]["ffn"]["up"]["w"] * 3).astype(dtype)
    save_orbax(model, tmp_path)
    assert_same(jaxllm.load(tmp_path), model)


def test_parts_on_the_host_are_saved_too(tmp_path):
    model = random_of(format="q4f16_1")
    save_orbax(replace(model, params=jax.tree.map(np.asarray, model.params)), tmp_path)
    assert_same(jaxllm.load(tmp_path), model)


def test_a_whole_model_generates_alike(tmp_path):
    model = jaxllm.load()
    save_orbax(model, tmp_path)
    back = jaxllm.load(tmp_path)
    assert_same(back, model)
    text = "The red fox"
    assert back.tokenizer.encode(text) == model.tokenizer.encode(text)
    assert back.tokenizer.chat_template == model.tokenizer.chat_template
    assert (back.eos_ids, back.defaults, back.values) == (model.eos_ids, model.defaults, model.values)
    one, two = (decode.generate(m, text, max_new_tokens=8).text for m in (model, back))
    assert one == two


def test_dtype_is_that_of_matrices(tmp_path):
    model = random_of(format="q4f16_1")
    save_orbax(model, tmp_path)
    back = jaxllm.load(tmp_path, dtype="bfloat16")
    assert back.config.dtype == "bfloat16"
    assert {str(x.dtype) for x in (back.params["embed"]["w"], back.params["layers"][0]["mixer"]["q"]["w"])} == {
        "bfloat16"
    }
    assert back.params["norm"]["w"].dtype == model.params["norm"]["w"].dtype
    with pytest.raises(ConfigError, match="saved for 96 positions"):
        jaxllm.load(tmp_path, max_len=200)


def test_in_the_background(tmp_path):
    save_orbax(random_of(seed=1), tmp_path)
    done = save_orbax(random_of(seed=2), tmp_path, wait=False)
    assert done.result() == tmp_path
    assert_same(jaxllm.load(tmp_path), random_of(seed=2))
    assert sorted(p.name for p in tmp_path.iterdir())[0] == POINTER
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failing_save_raises_and_leaves_the_former(tmp_path, monkeypatch):
    save_orbax(random_of(seed=1), tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(orbax, "write_whole", full)
    with pytest.raises(OSError, match="no space"):
        save_orbax(random_of(seed=2), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert_same(jaxllm.load(tmp_path), random_of(seed=1))


# ---- onto a mesh ------------------------------------------------------------------------------------------

ON_A_MESH = """
    import pathlib, sys
    import jax, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from jaxllm import quant
    from jaxllm.checkpoint.orbax import save_orbax
    from jaxllm.model import Model, load_orbax
    from tests import random_model

    folder = pathlib.Path(sys.argv[1])
    config = random_model.CONFIGS["full"]
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    assert mesh.size == 8

    def by_rows(path, struct):
        matrix = len(struct.shape) >= 2 and struct.shape[0] % 4 == 0
        return NamedSharding(mesh, P("model") if matrix else P())

    for format in (None, "q4f16_1", "fp8_e4m3"):
        model = Model(config, random_model.params(config))
        model = model if format is None else quant.quantize_model(model, format)
        save_orbax(model, folder / str(format))
        back = load_orbax(folder / str(format), sharding=by_rows)
        q = back.params["layers"][0]["mixer"]["q"]["w"]
        for part in jax.tree.leaves(q):
            assert part.sharding.spec == P("model"), part.sharding
            assert len(part.sharding.device_set) == 8
            assert part.addressable_shards[0].data.shape[0] == part.shape[0] // 4
        assert back.params["norm"]["w"].sharding.is_fully_replicated
        for x, y in zip(jax.tree.leaves(model.params), jax.tree.leaves(back.params), strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
        # And what lies on a mesh is saved from there.
        save_orbax(back, folder / f"{format}-again")
        alone = load_orbax(folder / f"{format}-again")
        for x, y in zip(jax.tree.leaves(model.params), jax.tree.leaves(alone.params), strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes() and len(y.devices()) == 1
        everywhere = load_orbax(folder / str(format), sharding=NamedSharding(mesh, P()))
        assert len(everywhere.params["embed"]["w"].devices() if format is None else mesh.devices.flat) == 8
    print("sharded")
"""


def python(code: str, *arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_onto_a_mesh_of_eight(tmp_path):
    run = python(ON_A_MESH, str(tmp_path), XLA_FLAGS="--xla_force_host_platform_device_count=8")
    out, err = run.communicate(timeout=300)
    assert out.strip() == "sharded", err[-3000:]


# ---- killed ------------------------------------------------------------------------------------------------

# Saves a second model over the first, and says so and stands still at the place of the test's choice.
STANDS_STILL = """
    import pathlib, sys, time
    from jaxllm.checkpoint import orbax
    from jaxllm.model import Model
    from tests import random_model
    import orbax.checkpoint as library

    def stop(*_, **__):
        print("there", flush=True)
        time.sleep(600)

    folder, place = sys.argv[1:]
    if place == "before the arrays are whole":
        begin = library.AsyncCheckpointer.save

        def save(self, *given, **more):
            begin(self, *given, **more)
            library.AsyncCheckpointer.wait_until_finished = stop

        library.AsyncCheckpointer.save = save
    elif place == "before the pointer":
        orbax.write_whole = stop
    else:
        orbax.shutil.rmtree = stop
    config = random_model.CONFIGS["full"]
    orbax.save_orbax(Model(config, random_model.params(config, seed=2)), folder)
"""


@pytest.mark.parametrize(
    ("place", "left"), [("before the arrays are whole", 1), ("before the pointer", 1), ("before cleaning up", 2)]
)
def test_killed_over_an_earlier_save(place, left, tmp_path):
    save_orbax(random_of(seed=1), tmp_path)
    run = python(STANDS_STILL, str(tmp_path), place)
    assert run.stdout.readline() == "there\n", run.stderr.read()[-3000:]
    assert len(list(tmp_path.glob("save-*"))) == 2
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert_same(jaxllm.load(tmp_path), random_of(seed=left))
    save_orbax(random_of(seed=4), tmp_path)
    assert_same(jaxllm.load(tmp_path), random_of(seed=4))
    assert len(list(tmp_path.glob("save-*"))) == 1  # what the killed one left is gone


def test_killed_wherever_it_is(tmp_path):
    """The same without standing still: killed as soon as a file of the new save shows."""
    save_orbax(random_of(seed=1), tmp_path)
    run = python(STANDS_STILL, str(tmp_path), "before cleaning up")
    until = time.monotonic() + 120
    while len(list(tmp_path.glob("save-*/*"))) < 2 and time.monotonic() < until and run.poll() is None:
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    left = jaxllm.load(tmp_path)
    first = np.asarray(left.params["embed"]["w"]) == np.asarray(random_of(seed=1).params["embed"]["w"])
    assert_same(left, random_of(seed=1) if first.all() else random_of(seed=2))


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    save_orbax(random_of(format="q4f16_1"), folder)
    return folder


@pytest.fixture
def copy(good, tmp_path):
    return pathlib.Path(shutil.copytree(good, tmp_path / "copy"))


def refusal(folder: pathlib.Path) -> str:
    with pytest.raises(JaxllmError) as caught:
        jaxllm.load(folder)
    assert len(str(caught.value)) < 4000
    return str(caught.value)


def rewrite(folder: pathlib.Path, *path, to) -> None:
    about = node = json.loads((folder / POINTER).read_text())
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = to
    (folder / POINTER).write_text(json.dumps(about))


Q = ("leaves", "layers.0.mixer.q.w")
HOSTILE = [
    (("format",), "jaxllm orbax 9", "should be of the form"),
    (("arrays",), "../elsewhere", "in a folder beside it"),
    (("arrays",), "/etc", "in a folder beside it"),
    (("arrays",), "save-0123456789abcdef", "in a folder beside it"),
    (("arrays",), None, "in a folder beside it"),
    (("config",), {"type": "ModelConfig"}, "with the fields"),
    (("config", "vocab"), 2**47, "embed.w should have shape"),
    (("config", "vocab"), -1, "not positive"),
    (("leaves",), {}, "is missing"),
    (("leaves",), [], "should be objects"),
    (("leaves", "extra.w"), {"shape": [1], "dtype": "float32"}, "extra.w has no place"),
    (("leaves", "norm.w"), {"shape": [32], "dtype": "object"}, "describes no parameter"),
    (("leaves", "norm.w"), {"shape": [32], "dtype": "float16"}, "should hold norm.w"),
    (("leaves", "norm.w"), {"shape": [-32], "dtype": "float32"}, "describes no parameter"),
    (("leaves", "norm.w"), 5, "describes no parameter"),
    ((*Q, "columns"), 10**9, "do not fit together"),
    ((*Q, "columns"), "32", "describes no parameter"),
    ((*Q, "format", "levels"), "e9m9", "no known format"),
    ((*Q, "dtype"), "int32", "describes no parameter"),
    ((*Q, "format"), {"base": "no such"}, "no known format"),
    ((*Q, "format", "bits"), 10**9, "no known format"),
    ((*Q, "parts"), {}, "describes no parameter"),
    ((*Q, "parts", "codes", "shape"), [2**40, 2**40], "do not fit"),
    ((*Q, "parts", "scale", "shape"), [], "do not fit"),
    ((*Q, "parts", "order"), {"shape": [32], "dtype": "int32"}, "should hold layers.0.mixer.q.w.order"),
    ((*Q, "parts", "order"), {"shape": [31], "dtype": "int32"}, "order of shape [31] instead of [32]"),
    (("eos_ids",), "2", "eos_ids should be"),
    (("defaults",), [], "should be objects"),
    (("recipe",), {"rules": [5], "dtype": None}, "a rule of a recipe"),
    (("recipe",), [], "recipe should have"),
]


@pytest.mark.parametrize(("path", "to", "say"), HOSTILE)
def test_a_hostile_description(copy, path, to, say):
    rewrite(copy, *path, to=to)
    assert say in refusal(copy)


def test_absurd_sizes_take_no_memory(copy):
    """A description, a config and Orbax's own metadata that agree on terabytes which are not there."""
    saved = orbax.open_folder(copy)
    wide = jax.ShapeDtypeStruct((2**40,), jnp.float32)
    stored = orbax._flat(saved.leaves) | {"norm.w": wide}
    with pytest.raises(CheckpointError, match="cannot be the"):
        orbax._check_stored(
            stored, replace(saved, leaves=saved.leaves | {"norm.w": wide}), saved.folder / "params"
        )


def test_damaged_arrays(copy):
    files = sorted((copy / orbax.open_folder(copy).folder.name).rglob("d/*"), key=lambda p: -p.stat().st_size)
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "cannot be read" in refusal(copy)


def test_missing_arrays(copy):
    shutil.rmtree(orbax.open_folder(copy).folder / "params")
    assert "in a folder beside it" in refusal(copy)


@given(st.binary(max_size=200))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_noise_in_place_of_the_description(copy, noise):
    (copy / POINTER).write_bytes(noise)
    refusal(copy)


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(CheckpointError, match="holds other files"):
        save_orbax(random_of(), tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        save_orbax(random_of(), tmp_path / "thesis.tex")
    with pytest.raises(CheckpointError, match="was not written by save_orbax"):
        load_orbax(jaxllm.bundled())


def test_parameters_that_are_not_the_config_s(tmp_path):
    model = random_of()
    with pytest.raises(CheckpointError, match=r"head\.w is missing"):
        save_orbax(replace(model, params={k: v for k, v in model.params.items() if k != "head"}), tmp_path / "x")
    with pytest.raises(CheckpointError, match="should be an array or a QTensor"):
        save_orbax(replace(model, params=model.params | {"norm": {"w": "ones"}}), tmp_path / "x")
    with pytest.raises(CheckpointError, match="as JSON"):
        save_orbax(replace(model, defaults={"x": {1, 2}}), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_without_the_library(tmp_path, good, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    for call in (lambda: save_orbax(random_of(), tmp_path), lambda: jaxllm.load(good)):
        with pytest.raises(MissingExtraError, match=r"jaxllm\[orbax\]"):
            call()


# ---- descriptions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.bits <= 8])
def test_a_description_is_the_parameter_without_values(name):
    x = np.random.default_rng(0).normal(size=(8, 128)).astype(np.float32)
    q = quant.encode(x, FORMATS[name])
    back = abstract(json.loads(json.dumps(describe(q))))
    assert back.format == q.format
    assert (back.columns, back.dtype_name, back.shape) == (q.columns, q.dtype_name, q.shape)
    want = {part: (a.shape, a.dtype) for part, a in q.parts().items()}
    assert {part: (a.shape, a.dtype) for part, a in back.parts().items()} == want
