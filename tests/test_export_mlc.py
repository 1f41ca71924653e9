"""Folders for MLC-LLM: what our reader reads there again, and what cannot be written."""

import json

import pytest

import jaxllm
from jaxllm import decode
from jaxllm.errors import ConfigError, JaxllmError
from jaxllm.export import build, replay, verification
from jaxllm.export.options import Options
from jaxllm.model import bundled

SMALL = Options(context=96, chunk=16)


@pytest.fixture(autouse=True)
def _inside(monkeypatch):
    """In this process, where a fresh one would only start more slowly."""
    monkeypatch.setattr(verification, "_fresh", lambda module, *args: replay.main(*args))


def test_the_bundled_model_says_the_same(tmp_path):
    """64 greedy tokens, and the sizes that were asked for."""
    made = build.export(bundled("target"), "mlc", tmp_path / "out", dtype="float32", options=SMALL)
    assert made.manifest["verification"]["max_difference"] == 0
    chat = json.loads((made.folder / "model" / "mlc-chat-config.json").read_text())
    assert (chat["context_window_size"], chat["prefill_chunk_size"], chat["quantization"]) == (96, 16, "q0f32")
    assert chat["model_config"]["context_window_size"] == 96
    prompt = "def main(argv):\n"
    read, live = (jaxllm.load(x, dtype="float32") for x in (made.folder / "model", bundled("target")))
    said = [decode.generate(m, prompt, max_new_tokens=64, eos=()).completions[0].tokens for m in (read, live)]
    assert said[0] == said[1]


def test_four_bits(tmp_path):
    """Codes and scales are MLC-LLM's own scheme, at 4.5 bits a weight, and a changed file is noticed."""
    made = build.export(bundled("target"), "mlc", tmp_path / "out", format="q4f16_1", options=SMALL)
    assert made.manifest["verification"]["tokens_equal"] + made.manifest["verification"]["near_ties"] == 38
    shards = sum((made.folder / name).stat().st_size for name in made.manifest["parameters"])
    assert 8 * shards / made.manifest["model"]["weights"] < 4.6
    shard = made.folder / made.manifest["parameters"][0]
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(JaxllmError, match="params_shard_0"):
        build.verify(made.folder)


@pytest.mark.parametrize(
    ("options", "format", "reason"),
    [
        (Options(window=64), "q4f16_1", "leave --window out"),
        (Options(context=96, sampler="in-graph"), "q4f16_1", "leave --sampler out"),
        (SMALL, "int8_g32", "int8_g32, and MLC-LLM's are"),
    ],
)
def test_what_it_refuses(tmp_path, options, format, reason):
    with pytest.raises(ConfigError, match=reason):
        build.export(bundled("target"), "mlc", tmp_path / "out", format=format, options=options)
    assert not any(tmp_path.iterdir())
