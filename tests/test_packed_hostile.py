"""Malformed packed checkpoints: one error that says what is wrong, before weights are read."""

import copy
import json
import time
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxllm
from jaxllm.checkpoint.packed import METHODS, check, packed
from jaxllm.checkpoint.packed import targets as patterns
from jaxllm.checkpoint.safetensors import open_file
from jaxllm.errors import CheckpointError, ConfigError, JaxllmError
from jaxllm.families.fields import Fields
from jaxllm.quant import QTensor, dequantize
from tests import folders, packers
from tests.test_packed_models import CONFIG, FORMATS, FOUR, GPTQ, TORCHAO, save

N, K = 32, 64
QUIET = pytest.mark.filterwarnings("ignore:packed weights")


def module(name: str) -> tuple[dict, dict, dict]:
    """(settings, tensors of one module "m", metadata) of a format."""
    method, packer, options, _ = FORMATS[name]
    tensors, _ = packer(np.random.default_rng(0), N, K, **options)
    metadata = {"m.weight": json.dumps({"_type": TORCHAO.get(name), "_data": {}})}
    return copy.deepcopy(method), {leaf: np.ascontiguousarray(x) for leaf, x in tensors.items()}, metadata


def read(folder, method, tensors, metadata):
    """Whatever the readers of such a file give, the weights themselves read."""
    from safetensors.numpy import save_file

    save_file({f"m.{leaf}": x for leaf, x in tensors.items()}, folder / "model.safetensors")
    values = CONFIG | {"quantization_config": method}
    check(values)
    found = packed(values, open_file(folder / "model.safetensors"), metadata=lambda: metadata)
    return {name: reader() for name, reader in found.items()}


def refused(folder, method, tensors, metadata) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as error:
        read(folder, method, tensors, metadata)
    return str(error.value)


@pytest.mark.parametrize("name", FORMATS)
@QUIET
def test_the_whole_module_is_read(tmp_path, name):
    """What the tests below break is whole."""
    (x,) = read(tmp_path, *module(name)).values()
    assert x.shape == (N, K)


OPTIONAL = {
    "g_idx",
    "weight_g_idx",
    "input_scale",
    "weight_format",
    "nbits",
    "group_size",
    "axis",
    "view_as_float",
}
OPTIONAL |= {"unpack_view_dtype", "encoded_state_dict"}
NEEDED = [(name, leaf) for name in FORMATS for leaf in module(name)[1] if leaf not in OPTIONAL or "static" in name]


@pytest.mark.parametrize(("name", "leaf"), NEEDED)
@QUIET
def test_a_missing_tensor(tmp_path, name, leaf):
    method, tensors, metadata = module(name)
    del tensors[leaf]
    if leaf == "weight_scale_inv" or (leaf == "weight_scale" and set(tensors) == {"weight"}) or leaf == "SCB":
        assert isinstance(read_or_error(tmp_path, method, tensors, metadata), np.ndarray | JaxllmError)
        return  # without its scales it is a plain tensor, of a dtype that no weight has
    assert "m: " in refused(tmp_path, method, tensors, metadata)


def read_or_error(*arguments):
    try:
        return read(*arguments)["m.weight"]
    except JaxllmError as error:
        return error


SHAPED = [
    (name, leaf, change)
    for name in FORMATS
    for leaf, x in module(name)[1].items()
    for change in ("longer", "shorter", "axis", "empty")
    if leaf not in OPTIONAL - {"g_idx", "weight_g_idx"} and x.size > 1
]


def reshaped(x: np.ndarray, change: str) -> np.ndarray:
    if change == "longer":
        return np.concatenate([x, x[:1]])
    if change == "shorter":
        return x[:-1]
    return x[..., None, None] if change == "axis" else x[:0]


@pytest.mark.parametrize(("name", "leaf", "change"), SHAPED)
@QUIET
def test_a_tensor_of_another_shape(tmp_path, name, leaf, change):
    method, tensors, metadata = module(name)
    tensors[leaf] = reshaped(tensors[leaf], change)
    got = read_or_error(tmp_path, method, tensors, metadata)
    if isinstance(got, JaxllmError):
        assert isinstance(got, CheckpointError)
        return
    # Bytes in another shape, or as many rows in all of the module: what it then says is of another size.
    assert change in ("axis", "longer", "shorter")
    assert got.shape != (N, K) or change == "axis"


@pytest.mark.parametrize("name", [n for n in FORMATS if "loose" not in n])
@QUIET
def test_tensors_of_other_dtypes(tmp_path, name):
    method, tensors, metadata = module(name)
    for leaf in set(tensors) - OPTIONAL:
        wrong = tensors | {leaf: np.zeros(tensors[leaf].shape, np.int16)}
        assert "it is int16" in refused(tmp_path, method, wrong, metadata)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", FORMATS)
@QUIET
def test_scales_that_are_no_numbers(tmp_path, name, value):
    method, tensors, metadata = module(name)
    for leaf, x in tensors.items():
        wrong = x.copy()
        if leaf == "weight" or not any(word in leaf for word in ("scale", "absmax", "SCB", "_map")):
            continue
        if wrong.dtype == np.uint8 and "absmax" in leaf:
            continue  # codes
        wrong.reshape(-1)[-1:] = 255 if wrong.dtype == np.uint8 else value
        said = refused(tmp_path, method, tensors | {leaf: wrong}, metadata)
        assert "infinite or not a number" in said or "is not the table" in said


@pytest.mark.parametrize("change", ["beyond", "negative", "uneven", "huge"])
@pytest.mark.parametrize("name", ["gptq", "gptq-order", "ct-4-order"])
def test_columns_of_groups_that_are_not_there(tmp_path, name, change):
    method, tensors, metadata = module(name)
    leaf = next(n for n in tensors if n.endswith("g_idx"))
    g_idx = tensors[leaf].astype(np.int64)
    at = {"beyond": 2, "negative": -1, "uneven": 1 - g_idx[0], "huge": 2**62}[change]
    tensors[leaf] = np.concatenate([[at], g_idx[1:]])
    assert "g_idx should put 32 columns in each of 2 groups" in refused(tmp_path, method, tensors, metadata)


BROKEN = {
    "gptq": [
        ({"bits": 5}, "bits is 5; read are 2, 3, 4, 8"),
        ({"bits": 0}, "bits should be"),
        ({"bits": "4"}, "bits should be"),
        ({"bits": None}, "bits is missing"),
        ({"group_size": 0}, "group_size should be -1 or"),
        ({"group_size": -2}, "group_size should be -1 or"),
        ({"group_size": 2.5}, "group_size should be -1 or"),
        ({"group_size": 10**30}, "group_size should be -1 or"),
        ({"group_size": 64}, "64 columns in groups of 64 need 1 rows of scales, there are 2"),
        ({"bits": 8}, "scales"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"is_marlin_format": True}, "is_marlin_format"),
        ({"bits": 9, "group_size": 0, "checkpoint_format": 3}, "group_size"),
    ],
    "awq": [
        ({"bits": 8}, "bits is 8; read are 4"),
        ({"group_size": -7}, "group_size should be"),
        ({"version": "marlin"}, "version is 'marlin'; read are gemm"),
        ({"version": ["gemm"]}, "version is"),
        ({"group_size": 16}, "qzeros should have shape [4, 4]"),
    ],
    "fp8": [
        ({"weight_block_size": [0, 32]}, "weight_block_size should be two sizes"),
        ({"weight_block_size": [16]}, "weight_block_size should be two sizes"),
        ({"weight_block_size": "16x32"}, "weight_block_size should be two sizes"),
        ({"weight_block_size": [10**10, 1]}, "weight_block_size should be two sizes"),
        ({"weight_block_size": [8, 32]}, "weight_scale_inv should have shape [4, 2]"),
        ({"activation_scheme": "static"}, "activation_scale is missing"),
        ({"activation_scheme": "sometimes"}, "activation_scheme is 'sometimes'"),
        ({"fmt": "e5m2"}, "fmt"),
    ],
    "ct-4": [
        ({"config_groups": {}}, "config_groups is empty"),
        ({"config_groups": None}, "config_groups is missing"),
        ({"config_groups": {"a": None}}, "targets is missing"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": FOUR | {"num_bits": 7}}}}, "num_bits is 7"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": FOUR | {"group_size": 0}}}}, "group_size"),
        ({"config_groups": {"a": {"targets": ["re:(a+)+$"], "weights": FOUR}}}, "could take forever"),
        ({"config_groups": {"a": {"targets": ["re:("], "weights": FOUR}}}, "not a pattern"),
        ({"config_groups": {"a": {"targets": [7], "weights": FOUR}}}, "a target should be a string"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": dict(strategy="block")}}}, "block_structure"),
        ({"format": "marlin-24"}, "format"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights are not read"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "rotated weights are not read"),
    ],
    "bitnet": [
        ({"use_rms_norm": True}, "use_rms_norm"),
        ({"linear_class": "linear"}, "linear_class is 'linear'"),
    ],
    "modelopt": [({"quant_algo": "W4A8_AWQ"}, "quant_algo is 'W4A8_AWQ'"), ({"quant_algo": None}, "quant_algo")],
}


@pytest.mark.parametrize(
    ("name", "change", "part"), [(name, *row) for name, rows in BROKEN.items() for row in rows]
)
@QUIET
def test_settings_that_cannot_be(tmp_path, name, change, part):
    method, tensors, metadata = module(name)
    assert part in refused(tmp_path, method | change, tensors, metadata)


@pytest.mark.parametrize("method", ["aqlm", "quanto", "vptq", "higgs", "", None, 3, ["gptq"], {"gptq": 1}])
def test_methods_that_are_not_read(method):
    with pytest.raises(ConfigError, match="are not read; read are gptq, awq, fp8") as error:
        check({"quantization_config": {"quant_method": method, "bits": 4}})
    assert all(name in str(error.value) for name in METHODS)


def test_all_problems_are_listed_at_once(tmp_path):
    """Of every module, with the folder's name, from `load`."""
    tensors = {n: x for n, x in folders.tensors(CONFIG).items() if "_proj" not in n}
    for i in range(60):
        tensors[f"model.layers.{i}.mlp.up_proj.qweight"] = np.zeros((8, 32), np.int32)
    with pytest.raises(CheckpointError) as error:
        jaxllm.load(save(tmp_path, tensors, CONFIG | {"quantization_config": GPTQ}))
    lines = str(error.value).splitlines()
    assert str(tmp_path) in lines[0]
    assert lines[1] == "  model.layers.0.mlp.up_proj: scales is missing beside qweight"
    assert len(lines) == 42
    assert lines[-1] == "  ... and 20 more"


def test_a_weight_both_packed_and_plain(tmp_path):
    method, tensors, metadata = module("gptq")
    tensors["weight"] = np.zeros((N, K), np.float32)
    assert "weight" in refused_or_shapes(tmp_path, method, tensors, metadata)


def refused_or_shapes(*arguments) -> str:
    got = read_or_error(*arguments)
    return str(got) if isinstance(got, JaxllmError) else f"weight {got!r}"


# ---- sizes that lie ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        [N, 2**40],
        [2**31, 2**31],
        [0, K],
        [-1, -2048],
        [N],
        [N, K, 1],
        "wide",
        [N, K + 2],
        None,
        [N, True],
        [2.5, 4],
    ],
)
def test_sizes_in_the_state_of_bitsandbytes(tmp_path, shape):
    method, tensors, metadata = module("nf4")
    leaf = "weight.quant_state.bitsandbytes__nf4"
    state = json.loads(tensors[leaf].tobytes()) | {"shape": shape}
    tensors[leaf] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    assert "m: " in refused(tmp_path, method, tensors, metadata)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a":' * 9000, b"7", b" " * 70000])
def test_a_state_that_is_no_object(tmp_path, text):
    method, tensors, metadata = module("nf4")
    tensors["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(text, np.uint8)
    assert "quant_state" in refused(tmp_path, method, tensors, metadata)


@pytest.mark.parametrize(
    "change", [{"blocksize": 0}, {"blocksize": -64}, {"quant_type": "af4"}, {"nested_blocksize": 0}]
)
def test_a_state_with_other_values(tmp_path, change):
    method, tensors, metadata = module("nf4")
    leaf = "weight.quant_state.bitsandbytes__nf4"
    state = json.loads(tensors[leaf].tobytes()) | change
    tensors[leaf] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    assert next(iter(change)) in refused(tmp_path, method, tensors, metadata)


@pytest.mark.parametrize("shape", [[N, 2**50], [N + 1, K], [-N, -K], [N, 0], [K], [N, K + 8]])
def test_sizes_of_compressed_tensors(tmp_path, shape):
    method, tensors, metadata = module("ct-4")
    tensors["weight_shape"] = np.array(shape, np.int64)
    assert "weight_shape" in refused(tmp_path, method, tensors, metadata) or shape == [N, K + 8]


@pytest.mark.parametrize(
    ("leaf", "value"),
    [
        ("shape", np.array([2**40, 2**40])),
        ("shape", np.array([-N, -K])),
        ("shape", np.array([N, K, 1])),
        ("group_size", np.int32(0)),
        ("group_size", np.int32(-32)),
        ("group_size", np.int32(7)),
        ("axis", np.int32(2)),
        ("packing", packers.text("5bit_u8")),
        ("packing", packers.text("\x00" * 300)),
        ("quant_zero", np.uint8(1)),
        ("shape", np.zeros(2**15, np.int64)),
    ],
)
def test_settings_of_hqq(tmp_path, leaf, value):
    method, tensors, metadata = module("hqq")
    assert "m: " in refused(tmp_path, method, tensors | {leaf: np.asarray(value)}, metadata)


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", '{"_type": "MXTensor"}', '{"_type": 3}', '{"_type": "Int4TilePackedTo4dTensor"}']
)
def test_types_of_torchao(tmp_path, text):
    method, tensors, _ = module("torchao-int4")
    assert "m: " in refused(tmp_path, method, tensors, {} if text is None else {"m.weight": text})


def test_codes_that_stand_for_nothing(tmp_path):
    method, tensors, metadata = module("bitnet")
    tensors["weight"] = np.full_like(tensors["weight"], 0xFF)
    assert "codes of 3" in refused(tmp_path, method, tensors, metadata)


# ---- patterns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*$",
        "((a*)b?)*c",
        "(.*)*x",
        "(?:x+x+)+y",
        "(a{1,}){2,}b",
        r"(a)\1*",
        ".*" * 20 + "x",
        "[a-z]+" * 12 + "!",
        "a?" * 40 + "a" * 40,
        "a{0,90}" * 30 + "b",
        "a" * 2000,
        "(" * 300,
        r"(\w+\s?)*$",
    ],
)
def test_patterns_that_could_take_forever(pattern):
    c = Fields({})
    assert patterns.pattern(c, f"re:{pattern}") is None
    assert c.problems


@pytest.mark.parametrize(
    "pattern",
    [
        ".*lm_head",
        r"model\.layers\.\d+\.mlp\.(gate|up)_proj$",
        r".*\.mlp\.experts\.\d+\.(gate|up|down)_proj",
        "^(?!.*lm_head).*proj$",
        r"model\.layers\.(0|1|2)\..*",
        "[(*+]x",
    ],
)
def test_patterns_that_files_have(pattern):
    c = Fields({})
    compiled = patterns.pattern(c, f"re:{pattern}")
    assert not c.problems
    start = time.perf_counter()
    for name in ("model.layers." * 100, "model.layers." * 12):
        patterns.matches(compiled, name)
    assert time.perf_counter() - start < 1


# ---- anything ---------------------------------------------------------------------------------------------------

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NUMBERS = st.sampled_from(
    [-1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 32, 33, 64, 128, 2**31, 2**63, -5, 1.5, "4", None, True]
)


def paths(tree, path=()):
    """Every place in nested objects and lists."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, inner in items:
        yield from paths(inner, (*path, key))


def put(tree, path, value):
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_settings_are_read_or_refused(tmp_path, name, data):
    method, tensors, metadata = module(name)
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from([p for p in paths(method) if p]))
        put(method, place, data.draw(ANYTHING | NUMBERS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = read_or_error(tmp_path, method, tensors, metadata) if method.get("quant_method") else None
    if isinstance(got, QTensor):
        assert dequantize(got, np.float32).shape == got.shape


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tensors_are_read_or_refused(tmp_path, name, data):
    method, tensors, metadata = module(name)
    leaf = data.draw(st.sampled_from(sorted(tensors)))
    x = tensors[leaf]
    shape = data.draw(st.lists(st.integers(0, 5) | st.sampled_from([16, 32, 64]), max_size=3))
    dtype = data.draw(st.sampled_from([x.dtype, np.int32, np.uint8, np.float16, np.int64]))
    size = int(np.prod(shape, dtype=np.int64))
    values = (
        np.resize(x.reshape(-1).view(np.uint8), size * np.dtype(dtype).itemsize)
        if x.size
        else np.zeros(0, np.uint8)
    )
    tensors[leaf] = values.view(dtype).reshape(shape) if values.size else np.zeros(shape, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = read_or_error(tmp_path, method, tensors, metadata)
    if isinstance(got, QTensor):
        assert dequantize(got, np.float32).shape == got.shape
