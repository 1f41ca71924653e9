"""Arbitrary files and prompts: a result, or an error that is a sentence of ours; nothing else."""

import json
import pathlib
import tempfile

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import jaxllm
from jaxllm import decode
from jaxllm.checkpoint.safetensors import open_file
from jaxllm.config import params_shape
from jaxllm.errors import CheckpointError, JaxllmError
from jaxllm.families.registry import FAMILIES
from tests import folders
from tests.folders import CONFIG


def examples(count: int):
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=slow)


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    monkeypatch.setenv("JAXLLM_CACHE", "off")


def refused_or(call, *args, **options):
    """The result, or None where it was refused with a sentence."""
    try:
        return call(*args, **options)
    except JaxllmError as error:
        said = str(error)
    assert len(said) > 20
    return None


WORDS = st.text(st.characters(codec="utf-8"), max_size=8)
SIZES = st.sampled_from([0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**63, 10**18, 10**300, 1e18, 1e308, 1.5, 0.0])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    SIZES,
    st.integers(-100, 100),
    st.floats(),
    WORDS,
    st.just("\ud800"),
    st.just("x" * 999),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=8,
)


# ---- weights ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> pathlib.Path:
    return folders.write(tmp_path_factory.mktemp("good"), files=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """A file of three tensors; its header is the first thing to go wrong."""
    weights = folders.tensors(dtype="bfloat16")
    names = ("model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight")
    folder = folders.write(tmp_path_factory.mktemp("whole"), {n: weights[n] for n in names})
    return (folder / "model.safetensors").read_bytes()


def read_all(data: bytes) -> dict[str, np.ndarray]:
    """Every tensor of a file with these bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "a.safetensors"
        path.write_bytes(data)
        return {name: read() for name, read in open_file(path).items()}


def check_file(data: bytes) -> None:
    found = refused_or(read_all, data)
    if found is not None:  # what was read came out of the file, all of it
        assert sum(x.nbytes for x in found.values()) < len(data)


@examples(150)
@given(data=st.data())
def test_changed_bytes(whole, data):
    at = data.draw(st.lists(st.integers(0, 420), min_size=1, max_size=4))
    changed = bytearray(whole)
    for i in at:
        changed[i] = data.draw(st.integers(0, 255))
    check_file(bytes(changed))


@examples(60)
@given(keep=st.integers(0, 4000), more=st.binary(max_size=20))
def test_cut_and_lengthened_files(whole, keep, more):
    data = whole[:keep] + more
    if data == whole[: len(data)] and len(data) == len(whole):
        return
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_all(data)


@examples(60)
@given(data=st.binary(max_size=200))
def test_files_of_nothing_in_particular(data):
    check_file(data)


@pytest.mark.parametrize("length", [0, 1, 2, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 100_000_001])
def test_hostile_header_lengths(whole, length):
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_all(length.to_bytes(8, "little") + whole[8:])


def file_of(header, values: bytes = b"\0" * 64) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + values


def entry(dtype="F32", shape=(16,), offsets=(0, 64)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_a_file_made_by_hand_is_read():
    """Otherwise the refusals below would prove nothing."""
    assert read_all(file_of({"a": entry()}))["a"].shape == (16,)
    two = {"a": entry(shape=(8,), offsets=(0, 32)), "b": entry("BF16", (4, 4), (32, 64))}
    assert {k: v.shape for k, v in read_all(file_of(two)).items()} == {"a": (8,), "b": (4, 4)}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(), "b": entry()},  # one place, two tensors
        {"a": entry(shape=(8,), offsets=(0, 32)), "b": entry(shape=(10,), offsets=(24, 64))},  # overlap
        {"a": entry(shape=(4,), offsets=(0, 16)), "b": entry(shape=(4,), offsets=(48, 64))},  # gap
        {"a": entry(shape=(8,), offsets=(0, 32))},  # bytes left over
        {"a": entry(shape=(32,), offsets=(0, 128))},  # beyond the end
        {"a": entry("F64")},
        {"a": entry("F16")},
        {"a": entry("F4")},
        {"a": entry("float32")},
        {"a": entry(["F32"])},
        {"a": entry(shape=(-16,))},
        {"a": entry(shape=(-4, -4))},
        {"a": entry(shape=(2**62, 2**62))},
        {"a": entry(shape=(0, 2**63), offsets=(0, 0)), "b": entry()},
        {"a": entry(shape=(1,) * 100 + (16,))},
        {"a": entry(shape=(16.0,))},
        {"a": entry(shape=(True, 16))},
        {"a": entry(shape=("16",))},
        {"a": entry(offsets=(64, 0))},
        {"a": entry(offsets=(-64, 0))},
        {"a": entry(offsets=(0, 64, 128))},
        {"a": entry(offsets=(0, 2**63))},
        {"a": {"dtype": "F32", "shape": [16]}},
        {"a": [1]},
        {"a": None},
        [entry()],
        b'{"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}, '
        b'"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}',
        b"\xff" * 40,
        b'{"a":' * 5000,
        b"[" * 50_000,
    ],
)
def test_headers_that_lie(header):
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_all(file_of(header))


@examples(100)
@given(header=st.dictionaries(WORDS, st.fixed_dictionaries({}, optional=dict.fromkeys(entry(), JSON)) | JSON))
def test_arbitrary_headers(header):
    check_file(file_of(header))


@examples(60)
@given(changes=st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), JSON, min_size=1))
def test_one_entry_with_arbitrary_values(changes):
    check_file(file_of({"a": entry() | changes}))


@examples(60)
@given(index=st.fixed_dictionaries({"weight_map": st.dictionaries(WORDS, WORDS | SCALARS) | JSON}) | JSON)
@example({"weight_map": {"model.norm.weight": "config.json"}})
@example({"weight_map": {}})
def test_arbitrary_indexes(good, index):
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        folders.write_json(folder / "config.json", CONFIG)
        folders.write_json(folder / "model.safetensors.index.json", index)
        assert refused_or(jaxllm.load, folder) is None


@examples(40)
@given(at=st.integers(0, 1500), byte=st.integers(0, 255))
def test_a_changed_byte_in_an_index(good, at, byte):
    data = bytearray((good / "model.safetensors.index.json").read_bytes())
    data[at % len(data)] = byte
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for path in good.iterdir():
            (folder / path.name).symlink_to(path)
        (folder / "model.safetensors.index.json").unlink()
        (folder / "model.safetensors.index.json").write_bytes(data)
        model = refused_or(jaxllm.load, folder)
        assert model is None or model.size == sum(x.size for x in folders.tensors().values())


# ---- config.json --------------------------------------------------------------------------------------------

FIELDS = sorted({*CONFIG, "head_dim", "rope_scaling", "rope_parameters", "sliding_window", "attention_bias"})
ROPE = ("rope_type", "type", "factor", "rope_theta", "partial_rotary_factor", "alpha", "mscale", "mscale_all_dim",
        "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast", "attention_factor",
        "short_factor", "long_factor", "full_attention", "sliding_attention")  # fmt: skip
KINDS = ("default", "linear", "dynamic", "ntk", "llama3", "yarn", "longrope", "su", "spiral")


def described(values) -> None:
    """A config is refused, or it gives sizes that are sizes; either way without taking memory."""
    with tempfile.TemporaryDirectory() as name:
        (pathlib.Path(name) / "config.json").write_text(json.dumps(values))
        config = refused_or(jaxllm.load_config, name)
    if config is None:
        return
    shapes = params_shape(config)
    assert all(isinstance(n, int) and n > 0 for shape in shapes.values() for n in shape), shapes
    tables = [block.mixer.rope for block in config.blocks if getattr(block.mixer, "rope", None)]
    assert all(np.isfinite(rope.inv_freq).all() for rope in tables[:2])


@examples(60)
@given(values=JSON)
def test_arbitrary_values_as_a_config(values):
    described(values)


@examples(300)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
@example({"head_dim": 2**31})
@example({"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 2**31})
@example({"num_hidden_layers": 10**18})
@example({"vocab_size": 10**18})
@example({"max_position_embeddings": 2**31})
@example({"rope_theta": 0})
def test_arbitrary_fields(changes):
    described(CONFIG | changes)


@examples(150)
@given(
    rope=st.dictionaries(st.sampled_from(ROPE), JSON, max_size=5),
    kind=st.sampled_from(KINDS),
    where=st.sampled_from(["rope_scaling", "rope_parameters"]),
)
def test_arbitrary_rotary_parameters(rope, kind, where):
    described(CONFIG | {where: {"rope_type": kind} | rope})


NAMES = sorted(
    {*FIELDS, "n_embd", "n_head", "n_layer", "layer_types", "num_experts", "num_local_experts", "n_routed_experts"}
    | {
        "num_experts_per_tok",
        "moe_intermediate_size",
        "kv_lora_rank",
        "q_lora_rank",
        "qk_rope_head_dim",
        "state_size",
    }
    | {"qk_nope_head_dim", "v_head_dim", "first_k_dense_replace", "n_group", "topk_group", "n_shared_experts"}
    | {
        "num_heads",
        "expand",
        "conv_kernel",
        "time_step_rank",
        "rotary_dim",
        "d_model",
        "attn_config",
        "expansion_ratio",
    }
    | {
        "query_pre_attn_scalar",
        "final_logit_softcapping",
        "sliding_window_pattern",
        "text_config",
        "mlp_only_layers",
    }
)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_arbitrary_fields_of_every_model_type(kind):
    @examples(12)
    @given(changes=st.dictionaries(st.sampled_from(NAMES), JSON | SIZES, min_size=1, max_size=4))
    @example({"head_dim": 2**31, "rotary_dim": 2**31, "qk_rope_head_dim": 2**31})
    @example({"num_attention_heads": 2**31, "n_head": 2**31, "n_heads": 2**31, "num_heads": 2**31})
    @example({"num_hidden_layers": 2**31, "n_layer": 2**31, "n_layers": 2**31, "num_layers": 2**31})
    @example({"hidden_size": 2**31, "n_embd": 2**31, "num_attention_heads": 1, "n_head": 1})
    def check(changes):
        described(CONFIG | {"model_type": kind} | changes)

    check()


PUBLISHED = [
    entry["config"]
    for path in sorted(pathlib.Path(__file__).parent.glob("published_configs*.json"))
    for entry in json.loads(path.read_text())
]


@pytest.mark.parametrize("base", PUBLISHED, ids=lambda base: base["model_type"])
def test_arbitrary_fields_of_published_configs(base):
    described(base)

    @examples(30)
    @given(changes=st.dictionaries(st.sampled_from(sorted(base)), JSON | SIZES, min_size=1, max_size=2))
    def check(changes):
        described(base | changes)

    check()
    for name in base:
        for value in (2**31, 0, -1, 1.5, True, "x", [], {}, float("nan")):
            described(base | {name: value})


def test_a_config_of_huge_sizes_takes_no_memory():
    described(
        CONFIG | dict(hidden_size=2**31, intermediate_size=2**31, vocab_size=2**31, num_attention_heads=2**13)
    )
    with tempfile.TemporaryDirectory() as name:
        huge = CONFIG | {"vocab_size": 2**31, "hidden_size": 2**20, "head_dim": 4}
        folder = folders.write(pathlib.Path(name), folders.tensors(), config=huge)
        with pytest.raises(CheckpointError, match=r"should have shape \[2147483648, 1048576\]"):
            jaxllm.load(folder)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("depth", [100, 500, 900, 980, 990, 5000])
@pytest.mark.parametrize("name", ["model_type", "hidden_size", "hidden_act", "swirl_factor", "rope_scaling"])
def test_a_deeply_nested_field(tmp_path, depth, name):
    text = json.dumps(CONFIG | {name: "HERE"}).replace('"HERE"', nested(depth))
    (tmp_path / "config.json").write_text(text)
    assert refused_or(jaxllm.load_config, tmp_path) is None


# ---- the files beside it ------------------------------------------------------------------------------------


@examples(60)
@given(
    generation=JSON | st.fixed_dictionaries({"eos_token_id": JSON}),
    config=st.dictionaries(
        st.sampled_from(
            ["eos_token", "chat_template", "add_bos_token", "tokenizer_class", "added_tokens_decoder"]
        ),
        JSON,
    )
    | JSON,
)
def test_garbage_beside_the_weights(generation, config):
    with tempfile.TemporaryDirectory() as name:
        folder = folders.write(pathlib.Path(name), WEIGHTS, generation=generation)
        folders.write_json(folder / "tokenizer_config.json", config)
        (folder / "tokenizer.json").symlink_to(jaxllm.bundled() / "tokenizer.json")
        model = refused_or(jaxllm.load, folder)
    assert model is None or all(type(i) is int for i in model.eos_ids)


WEIGHTS = folders.tensors()


# ---- prompts ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return jaxllm.load()


TEXTS = st.text(st.characters(exclude_categories=[]), max_size=30) | st.sampled_from(
    ["", "\0", "\ud800", "a\udfffb", "<|endoftext|>", "\u200d\ufe0f", "\N{ZERO WIDTH SPACE}" * 20]
)
IDS = st.lists(st.integers(0, 4095) | SIZES | st.integers(-5, 5000), max_size=10)
MESSAGES = st.lists(st.dictionaries(st.sampled_from(["role", "content", "name"]), TEXTS | JSON) | JSON, max_size=3)


def continued(model, prompt) -> None:
    out = refused_or(decode.generate, model, prompt, max_new_tokens=1)
    if out is not None:
        assert all(len(c.tokens) == 1 and 0 <= c.tokens[0] < model.config.vocab for c in out)


@examples(60)
@given(prompt=TEXTS)
def test_arbitrary_text(model, prompt):
    continued(model, prompt)


@examples(40)
@given(prompt=IDS)
@example([10**30])
@example([True, False])
@example([1, None])
@example([1, [2]])
@example([1.0])
def test_arbitrary_ids(model, prompt):
    continued(model, prompt)


@examples(60)
@given(prompt=MESSAGES | JSON)
@example([{"role": "user", "content": "hello"}])
@example([{}])
@example([{"role": "user"}, 3])
def test_arbitrary_messages_and_rubbish(model, prompt):
    continued(model, prompt)


@pytest.mark.parametrize(
    "prompt",
    [None, 3, 1.5, True, object(), {1, 2}, b"bytes", {"role": "user"}, iter([1, 2]), (), [[]], [[1], []], [None],
     np.array(3), np.zeros((2, 2)), np.zeros(0, int), np.array([1.5]), np.zeros((1, 1, 1), int), ["a", None],
     ["a", [2**40]], [1, "a"], range(0), json.loads(nested(900))],
)  # fmt: skip
def test_what_is_no_prompt(model, prompt):
    with pytest.raises(JaxllmError):
        decode.generate(model, prompt, max_new_tokens=1)


@pytest.mark.parametrize("prompt", [np.array([1, 2]), (1, 2), range(1, 3), [np.int32(1), np.int64(2)], [[1, 2]]])
def test_what_is_one(model, prompt):
    want = decode.generate(model, [1, 2], max_new_tokens=1)[0].tokens
    assert decode.generate(model, prompt, max_new_tokens=1)[0].tokens == want


@pytest.mark.parametrize("prompt", ["\ud800", "def f():\udc80", ["fine", "a\udfffb"]])
def test_a_lone_surrogate_is_refused_in_a_sentence(model, prompt):
    with pytest.raises(JaxllmError, match=r"text cannot be encoded.*Unicode text"):
        decode.generate(model, prompt, max_new_tokens=1)
