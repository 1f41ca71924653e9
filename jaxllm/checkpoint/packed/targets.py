"""Which group of settings a module belongs to, by the targets that compressed-tensors writes."""

from __future__ import annotations

import re

from jaxllm.families.fields import Fields

LONGEST = 500  # characters of a pattern
MANY = 4  # repetitions in one: time grows with the name's length to that power
OPTIONAL = 8  # question marks in one: time doubles with each
LONGEST_NAME = 160  # characters of a module's name that a pattern may look at
TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d*,?\d*\}|.", re.DOTALL)


def pattern(c: Fields, target: object) -> re.Pattern[str] | str | None:
    """A target as a pattern ("re:..."), or as the name it is; None where it is neither, which is a problem."""
    if not isinstance(target, str):
        c.problem(f"a target should be a string, got {target!r:.60}")
        return None
    if not target.startswith("re:"):
        return target
    try:
        if len(target) > LONGEST or _explosive(target[3:]):
            raise ValueError("it could take forever")
        return re.compile(target[3:])
    except (re.error, ValueError, RecursionError, OverflowError) as error:
        c.problem(f"the target {target!r:.80} is not a pattern that can be used ({error})")
        return None


def _explosive(text: str) -> bool:
    """Whether a pattern repeats a group that repeats, or has many repetitions, or refers back."""
    if re.search(r"\\[1-9]|\(\?P=", text):
        return True
    tokens = TOKEN.findall(text)
    repeats = sum(token in "*+" or token.startswith("{") for token in tokens)
    return repeats > MANY or tokens.count("?") > OPTIONAL or _nested(tokens)


def _nested(tokens: list[str]) -> bool:
    """Whether a group that holds a repetition or a choice is itself repeated without end."""
    inside, closed = [False], False
    for token in tokens:
        repeats = token in "*+" or token.startswith("{")
        if repeats and closed:
            return True
        closed = False
        if token == "(":
            inside.append(False)
        elif token == ")":
            closed = inside.pop() if len(inside) > 1 else False
            inside[-1] |= closed
        elif repeats or token == "|":
            inside[-1] = True
    return False


def matches(target: re.Pattern[str] | str, name: str) -> bool:
    """Whether a module of that name is meant: by its name, by a pattern, or by the class of all linear maps."""
    if isinstance(target, re.Pattern):
        return len(name) <= LONGEST_NAME and target.match(name) is not None
    return target in (name, "Linear")
