"""Compiled programs kept between starts: where, when, and that a second start compiles nothing."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

import jaxllm
from jaxllm import cli, programs
from jaxllm.programs import keep_programs
from tests import folders

ROOT = pathlib.Path(jaxllm.__file__).parents[1]
NAMES = ("dir", "min_compile_time_secs", "min_entry_size_bytes")
SETTINGS = ("jax_compilation_cache_dir", *(f"jax_persistent_cache_{n}" for n in NAMES[1:]))


def settings() -> dict:
    return {name: getattr(jax.config, name) for name in SETTINGS}


@pytest.fixture(autouse=True)
def jax_settings(monkeypatch):
    """jax's own settings, with no folder, and restored afterwards."""
    before = settings()
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("JAXLLM_CACHE", raising=False)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


# ---- where ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["", "off", "OFF", "0", "no"])
def test_off(monkeypatch, word):
    monkeypatch.setenv("JAXLLM_CACHE", word)
    before = settings()
    assert keep_programs() is None
    assert settings() == before


def test_a_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "programs"))
    assert keep_programs() == tmp_path / "programs"
    assert (tmp_path / "programs").is_dir()
    assert settings() == dict(zip(SETTINGS, (str(tmp_path / "programs"), 0, -1), strict=True))


def test_the_usual_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert keep_programs() == tmp_path / "jaxllm" / "xla"


def test_the_usual_folder_without_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert keep_programs() == tmp_path / ".cache" / "jaxllm" / "xla"


def test_what_the_user_has_set_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "ours"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    before = settings()
    assert keep_programs() == tmp_path / "theirs"
    assert settings() == before
    assert not (tmp_path / "ours").exists()


def test_a_folder_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "file" / "below"))
    before = settings()
    assert keep_programs() is None
    assert settings() == before


def test_the_library_changes_no_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "programs"))
    before = settings()
    jaxllm.load(folders.write(tmp_path / "model"))
    assert settings() == before
    assert not (tmp_path / "programs").exists()


def test_a_command_does(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "programs"))
    assert cli.main(["info"]) == 0
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "programs")


def test_size_counts_entries_alone(tmp_path):
    (tmp_path / "jit_f-0a-cache").write_bytes(b"1234")
    (tmp_path / "jit_f-0a-atime").write_bytes(b"12345678")
    assert programs.size(tmp_path) == (1, 4)


# ---- warm -------------------------------------------------------------------------------------------------

# Runs commands in this new process and prints what JAX compiled and what it found.
COUNTED = """
import io, json, sys, jax, jaxllm.decode, jaxllm.programs
from jaxllm.cli import main
heard = []
jax.monitoring.register_event_listener(lambda name, **more: heard.append(name.rsplit("/", 1)[1]))
for argv, typed in json.loads(sys.argv[1]):
    sys.stdin = io.StringIO(typed)
    assert main(argv) == 0
print(json.dumps([heard.count("cache_misses"), heard.count("cache_hits")]))
"""
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def counted(cache: pathlib.Path, *commands: tuple[list, str]) -> tuple[int, int]:
    """(programs compiled, programs found) by commands in a new process with this cache folder."""
    argv = json.dumps([([str(a) for a in command], typed) for command, typed in commands])
    env = os.environ | {"JAXLLM_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", COUNTED, argv], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture
def talker(tmp_path) -> pathlib.Path:
    """A tiny model that can chat, with the bundled tokenizer."""
    sizes = dict(vocab_size=4096, max_position_embeddings=512)
    folder = folders.write(tmp_path / "talker", config=folders.CONFIG | sizes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(jaxllm.bundled() / name, folder / name)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_after_warm_nothing_is_compiled(talker, tmp_path):
    cache = tmp_path / "programs"
    misses, _ = counted(cache, (["warm", talker], ""))
    assert misses > 0
    text = ["generate", "def f(", "--model", talker]
    commands = [
        (text, ""),
        ([*text, "--json", "--max-new-tokens", 300], ""),
        (["chat", "--model", talker, "--max-new-tokens", 4], "one\ntwo\n"),
    ]
    missed, found = counted(cache, *commands)
    assert missed == 0
    assert 0 < found <= misses


def test_warm_for_a_format_needs_no_weights(tmp_path, capsys):
    cache, folder = tmp_path / "programs", folders.write(tmp_path / "model")
    assert cli.main(["quantize", str(folder), str(tmp_path / "small"), "--format", "int8_g32"]) == 0
    (folder / "model.safetensors").unlink()
    assert counted(cache, (["warm", folder, "--format", "int8_g32", "--max-len", 64], ""))[0] > 0
    load = f"model = jaxllm.load({str(tmp_path / 'small')!r})"
    make = "jaxllm.decode.generate(model, [1, 2, 3], max_new_tokens=8, eos=())"
    script = COUNTED.replace("assert main(argv) == 0", f"jaxllm.programs.keep_programs(); {load}; {make}")
    env = os.environ | {"JAXLLM_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", script, '[[[], ""]]'], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])[0] == 0


def test_warm_says_where_and_how_large(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "programs"))
    folder = folders.write(tmp_path / "model")
    assert cli.main(["warm", str(folder), "--max-len", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"folder", "added", "programs", "bytes", "slots", "seconds"}
    assert (found["folder"], found["slots"]) == (str(tmp_path / "programs"), [16, 64])
    assert cli.main(["warm", str(folder), "--max-len", "16"]) == 0
    assert str(tmp_path / "programs") in capsys.readouterr().out


def test_warm_refuses_where_nothing_is_kept(monkeypatch, capsys):
    monkeypatch.setenv("JAXLLM_CACHE", "")
    assert cli.main(["warm"]) == 1
    assert "set JAXLLM_CACHE to a folder" in capsys.readouterr().err


def test_warm_refuses_an_unknown_format(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    assert cli.main(["warm", "--format", "q9"]) == 1
    assert "no weight format 'q9'" in capsys.readouterr().err
