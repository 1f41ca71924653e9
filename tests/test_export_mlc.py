"""Folders for MLC-LLM: what our reader reads there again, and what cannot be written."""

import functools
import json

import pytest
import tokenizers

import jaxllm
from jaxllm import decode
from jaxllm.checkpoint import mlc_files
from jaxllm.errors import ConfigError, JaxllmError
from jaxllm.export import build, mlc_conversation, replay, verification
from jaxllm.export.options import Options
from jaxllm.model import bundled
from jaxllm.tokenizer import Tokenizer

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
    conversation = chat["conv_template"]
    assert conversation["system_prefix_token_ids"] == [jaxllm.load().tokenizer.bos_id]
    assert conversation["seps"] == ["\n"]
    assert made.manifest["target"]["limits"]["conversation"].startswith("custom: the ids of the chat template")
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


# ---- conversations --------------------------------------------------------------------------------------

# Chat templates, and what MLC-LLM's own conversations of these names have (mlc_llm/conversation_template): before
# a question and an answer, between either and its text, what separates messages, and what begins.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{% for m in messages %}{{ bos_token if loop.first }}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
NAMED = {
    "chatml": (CHATML, ("<|im_start|>user", "<|im_start|>assistant"), ("\n", "\n"), ["<|im_end|>\n"], None),
    "llama-3": (
        LLAMA,
        ("<|start_header_id|>user", "<|start_header_id|>assistant"),
        ("<|end_header_id|>\n\n", "<|end_header_id|>\n\n"),
        ["<|eot_id|>"],
        ["<s>"],
    ),
    "gemma_instruction": (
        GEMMA,
        ("<start_of_turn>user", "<start_of_turn>model"),
        ("\n", "\n"),
        ["<end_of_turn>\n"],
        ["<s>"],
    ),
    "phi-3": (PHI, ("<|user|>", "<|assistant|>"), ("\n", "\n"), ["<|end|>\n"], None),
}
INSTRUCT = (  # the system message inside of the first question, and no token of its own behind one
    "{% if messages[0].role == 'system' %}{% set rule = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set rule = '' %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ rule if loop.first }}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
THINKING = CHATML.replace("m.content", "m.content.split('</think>')[-1].lstrip()")
NUMBERED = CHATML.replace("{{ m.role }}", "{{ m.role }} {{ loop.index }}")
REVERSED = CHATML.replace("in messages", "in messages[::-1]")
ENDS = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"]


@functools.cache
def text_of(template: str, bos: str = "<s>", eos: str = "</s>") -> Tokenizer:
    """The bundled vocabulary with special tokens of several models, and a chat template."""
    files = jaxllm.load().tokenizer.files()
    backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", *ENDS])
    names = {"bos_token": bos, "eos_token": eos}
    return Tokenizer(backend, names=names, chat_template=template)


@pytest.mark.parametrize("name", NAMED)
def test_a_chat_template_becomes_the_conversation_that_mlc_has_of_it(name):
    template, roles, seps, between, begin = NAMED[name]
    tokenizer = text_of(template)
    made, _ = mlc_conversation.conversation(tokenizer, (7,))
    assert made["name"] == name
    assert made["roles"] == dict(zip(("user", "assistant"), roles, strict=True))
    assert ((made["role_content_sep"], made["role_empty_sep"]), made["seps"]) == (seps, between)
    assert made["system_prefix_token_ids"] == (begin and [tokenizer.id_of("<s>")])
    end = next(token for token in ENDS if between[0].startswith(token))
    assert made["stop_token_ids"] == sorted([7, tokenizer.id_of(end)])
    assert made.keys() == mlc_files.TEMPLATE.keys()


def test_where_the_system_message_is():
    """A template's own message; MLC-LLM's usual one; inside of the first question; none."""
    system = {
        template: mlc_conversation.conversation(text_of(template), ())
        for template in (DEFAULT, CHATML, INSTRUCT, GEMMA)
    }
    (own, said), (usual, always), (inside, _), (none, never) = system.values()
    assert (own["system_template"], own["system_message"]) == (
        "<|im_start|>system\n{system_message}<|im_end|>\n",
        "Be kind.",
    )
    assert said == "with and without a system message"
    assert usual["system_template"] == own["system_template"]
    assert usual["system_message"] == "You are a helpful assistant."
    assert "always has one" in always
    assert inside["system_template"] == "[INST] <<SYS>>\n{system_message}\n<</SYS>>\n\n"
    assert (inside["add_role_after_system_message"], own["add_role_after_system_message"]) == (False, True)
    assert (none["system_template"], none["system_message"]) == ("{system_message}", "")
    assert never == "the template has no place for a system message of its own"


def test_the_text_of_a_conversation():
    """By MLC-LLM's description of it, written out."""
    made, _ = mlc_conversation.conversation(text_of(INSTRUCT), ())
    messages = mlc_conversation.turns(["One?", "Two.", "Three?"], "Count.")
    assert mlc_conversation.prompt(made, messages) == (
        "[INST] <<SYS>>\nCount.\n<</SYS>>\n\nOne? [/INST] Two. </s><s>[INST] Three? [/INST]"
    )
    assert made["seps"] == [" [/INST]", " </s>"]


def test_thoughts_are_left_out_of_the_past():
    assert mlc_conversation.conversation(text_of(THINKING), ())[0]["strip_reasoning_in_history"] is True
    assert "strip_reasoning_in_history" not in mlc_conversation.conversation(text_of(CHATML), ())[0]


@pytest.mark.parametrize("template", [NUMBERED, REVERSED, "{{ raise_exception('no') }}", "{% broken"])
def test_what_fixed_texts_cannot_say_is_no_conversation(template):
    assert mlc_conversation.conversation(text_of(template), ()) is None


def test_published_templates(shared):
    """Most of them; those for tools, and those that number or sort what was said, are left."""
    folder = shared / "chat_templates"
    golden = json.loads((folder / "golden_chat_templates.json").read_text("utf-8"))
    sources = {case["name"]: case["template_str"] for case in golden["cases"]}
    sources |= {path.stem: path.read_text("utf-8") for path in folder.glob("*.jinja")}
    found = {name: mlc_conversation.conversation(text_of(source), ()) for name, source in sources.items()}
    assert len(found) == 63
    left = sorted(name for name, made in found.items() if made is None)
    assert len(left) == 8, left
    names = {made[0]["name"] for made in found.values() if made}
    assert names == {"custom", *NAMED}
