"""A checkpoint's chat template as MLC-LLM's conversation: fixed texts around the messages, instead of a program.

MLC-LLM writes (mlc_llm/protocol/conversation_protocol.py): the system template with its message, then for each
message roles[role] + role_content_sep + text + separator, and at the end roles["assistant"] + role_empty_sep. The
texts are read off what the template makes of messages that are found again in it, and whatever they do not
reproduce is no conversation of this kind.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from jaxllm.errors import TokenizerError
from jaxllm.tokenizer import Tokenizer

SYSTEM = "{system_message}"
USUAL = "You are a helpful assistant."  # where a template has a place for a system message, but none by itself
THOUGHT = "<think>\nzyxthought\n</think>\n\n"
MARKS = ("zyxask1", "zyxsay1", "zyxask2", "zyxsay2", "zyxask3")
TEXTS = ("What is 2 + 2?", "It is 4.", "And what\nis that  in words?", "Four: one, two, ...", "Thanks!")
RULE = "zyxrule"
NAMES = {  # MLC-LLM's -> before a question, before an answer, between either and its text, separators
    "chatml": ("<|im_start|>user", "<|im_start|>assistant", "\n", "\n", "<|im_end|>\n"),
    "llama-3": (
        "<|start_header_id|>user",
        "<|start_header_id|>assistant",
        *2 * ("<|end_header_id|>\n\n",),
        "<|eot_id|>",
    ),
    "gemma_instruction": ("<start_of_turn>user", "<start_of_turn>model", "\n", "\n", "<end_of_turn>\n"),
    "phi-3": ("<|user|>", "<|assistant|>", "\n", "\n", "<|end|>\n"),
    "deepseek_v3": ("<｜User｜>", "<｜Assistant｜>", "", "", "", "<｜end▁of▁sentence｜>"),
}
PLAIN = {  # of every conversation
    "system_prefix_token_ids": None,
    "role_templates": {"user": "{user_message}", "assistant": "{assistant_message}", "tool": "{tool_message}"},
    "messages": [],
    "stop_str": [],
    "function_string": "",
    "use_function_calling": False,
}
Messages = list[dict[str, str]]
Conversation = dict[str, Any]


def turns(texts: Sequence[str], system: str | None = None) -> Messages:
    """Messages of a user and an assistant who take turns."""
    roles = ("user", "assistant")
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def conversation(tokenizer: Tokenizer, stops: Sequence[int]) -> tuple[Conversation, str] | None:
    """(what MLC-LLM's config has of a tokenizer's chat template, what is to be said of it), or None where no such
    conversation gives the template's ids.

    stops: ids that end an answer."""
    if (found := _around(tokenizer)) is None:
        return None
    made, systems, said = _with_system(*found)
    made |= {"name": _name(made), "stop_token_ids": sorted({*stops, *_last(tokenizer, made["seps"][-1])})}
    made |= {"strip_reasoning_in_history": True} if _forgets(tokenizer) else {}
    for one in (_begun(tokenizer, made), made):
        if one is not None and all(_same(tokenizer, one, system) for system in systems):
            return one, said
    return None


def prompt(made: Conversation, messages: Messages) -> str:
    """The text that MLC-LLM makes of messages that end with a user's. A system message comes first."""
    system = made["system_message"]
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    text, seps = made["system_template"].replace(SYSTEM, system), made["seps"]
    for message in messages:
        role = message["role"]
        if text and message is messages[0] and not made["add_role_after_system_message"]:
            text += message["content"] + seps[0]
        else:
            text += made["roles"][role] + made["role_content_sep"] + message["content"]
            text += seps[0 if role == "user" else -1]
    return text + made["roles"]["assistant"] + made["role_empty_sep"]


# ---- what is around the messages ------------------------------------------------------------------------


def _rendered(tokenizer: Tokenizer, messages: Messages, more: bool = True) -> str | None:
    try:
        return tokenizer.render_chat(messages, add_generation_prompt=more)
    except TokenizerError:  # the template refuses such messages
        return None


def _parts(text: str | None, marks: Sequence[str]) -> list[str] | None:
    """What is before, between and after the marks; None where they are not there once and in this order."""
    if text is None or any(text.count(mark) != 1 for mark in marks):
        return None
    parts = re.split("|".join(marks), text)
    return parts if re.findall("|".join(marks), text) == list(marks) else None


def _around(tokenizer: Tokenizer) -> tuple[Conversation, list[str] | None, list[str] | None] | None:
    """(roles and separators, the parts of a conversation without a system message, and of one with)."""
    bare = _parts(_rendered(tokenizer, turns(MARKS)), MARKS)
    full = _parts(_rendered(tokenizer, turns(MARKS, RULE)), (RULE, *MARKS))
    between = [parts[-6:][1:] for parts in (bare, full) if parts is not None]
    if not between or between[0] != between[-1] or between[0][:2] != between[0][2:4]:
        return None
    to_answer, to_ask, end = between[0][0], between[0][1], between[0][4]
    after_ask, after_answer = _separators(to_answer, to_ask, end, _after(tokenizer, 1), _after(tokenizer, 2))
    ask, answer, empty = to_ask[len(after_answer) :], to_answer[len(after_ask) :], end[len(after_ask) :]
    roles = _roles(ask, answer, empty)
    seps = [after_ask] if after_ask == after_answer else [after_ask, after_answer]
    return roles and (roles | {"seps": seps}, bare, full)


def _separators(to_answer: str, to_ask: str, end: str, *closing: str) -> tuple[str, str]:
    """What ends a question and an answer: a token that ends both, or what is there when nothing follows."""
    if token := re.match(r"<[^<>]*>\s*", _common(to_answer, to_ask, end, *closing)):
        return token[0], token[0]
    return _common(to_answer, end, closing[0]), _common(to_ask, closing[1])


def _after(tokenizer: Tokenizer, count: int) -> str:
    """What ends a conversation of `count` messages, which nothing follows."""
    text = _rendered(tokenizer, turns(MARKS[:count]), more=False) or ""
    return text.rpartition(MARKS[count - 1])[2]


def _begin(*texts: str) -> str:
    same = (len(set(letters)) == 1 for letters in zip(*texts, strict=False))
    return texts[0][: sum(itertools.takewhile(bool, same))]


def _common(*texts: str) -> str:
    """What all texts begin with, without a token that is only half there."""
    return re.sub(r"[<\[][^>\]]*$", "", _begin(*texts))


def _roles(ask: str, answer: str, empty: str) -> Conversation | None:
    """What is before a question, before an answer that was given, and before one that is to be given."""
    shared = _begin(ask[::-1], answer[::-1])[::-1]
    between = re.search(r"(<[^<>]*>)?\s*$", shared)[0]
    role = answer[: len(answer) - len(between)]
    if not empty.startswith(role):
        role = _begin(answer, empty)
        between = answer[len(role) :]
    if not ask.endswith(between):
        return None
    roles = {"user": ask[: len(ask) - len(between)], "assistant": role}
    return {"roles": roles, "role_content_sep": between, "role_empty_sep": empty[len(role) :]}


# ---- what is before them --------------------------------------------------------------------------------


def _with_system(
    made: Conversation, bare: list[str] | None, full: list[str] | None
) -> tuple[Conversation, tuple[str | None, ...], str]:
    """(with all that is before the messages, system messages that the template is compared with, what is said)."""
    ask = made["roles"]["user"] + made["role_content_sep"]
    if full is None:
        named, first, own = bare[0].endswith(ask), bare[0].removesuffix(ask) + SYSTEM, ""
        systems, said = (None,), "the template has no place for a system message of its own"
    else:
        named, first = full[1].endswith(ask), full[0] + SYSTEM + full[1].removesuffix(ask)
        own = None if bare is None else _between(bare[0], *full[:2])
        systems, said = (None, RULE), "with and without a system message"
    if own is None:
        own, systems = USUAL, (USUAL, RULE)
        said = f"with a system message; MLC-LLM always has one, {USUAL!r} where none is given"
    more = {"system_template": first, "system_message": own, "add_role_after_system_message": named}
    return made | PLAIN | more, systems, said


def _between(text: str, first: str, last: str) -> str | None:
    """What is between the two, where they begin and end a text."""
    found = re.fullmatch(f"{re.escape(first)}(.*){re.escape(last)}", text, re.DOTALL)
    return found and found[1]


def _name(made: Conversation) -> str:
    """MLC-LLM's own name for messages that look so."""
    looks = (*made["roles"].values(), made["role_content_sep"], made["role_empty_sep"], *made["seps"])
    return next((name for name, other in NAMES.items() if other == looks), "custom")


def _begun(tokenizer: Tokenizer, made: Conversation) -> Conversation | None:
    """With the token that begins every text as a number, as MLC-LLM's own conversations have it."""
    bos = None if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id)
    if not bos or not made["system_template"].startswith(bos):
        return None
    rest = made["system_template"].removeprefix(bos)
    return made | {"system_template": rest, "system_prefix_token_ids": [tokenizer.bos_id]}


def _last(tokenizer: Tokenizer, sep: str) -> list[int]:
    """The special token that ends an answer."""
    return [i for i in _ids(tokenizer, sep) or () if i in tokenizer.special_ids][:1]


def _ids(tokenizer: Tokenizer, text: str | None) -> list[int] | None:
    try:
        return None if text is None else tokenizer.encode(text, add_special=False)
    except TokenizerError:  # the vocabulary cannot spell it
        return None


def _forgets(tokenizer: Tokenizer) -> bool:
    """Whether the template leaves out what was thought before earlier answers."""
    thought = [THOUGHT + text if i % 2 else text for i, text in enumerate(MARKS)]
    plain, other = (_rendered(tokenizer, turns(texts)) for texts in (MARKS, thought))
    return plain is not None and plain == other


def _same(tokenizer: Tokenizer, made: Conversation, system: str | None) -> bool:
    """Whether the ids are those of the template, in conversations of some lengths."""
    begin = made["system_prefix_token_ids"] or []
    for count in (1, 3, 5):
        messages = turns(TEXTS[:count], system)
        theirs, own = (_ids(tokenizer, text) for text in (_rendered(tokenizer, messages), prompt(made, messages)))
        if theirs is None or own is None or theirs != begin + own:
            return False
    return True
