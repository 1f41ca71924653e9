"""Chat templates: messages to the text a model was trained on, by the checkpoint's own Jinja template.

A template comes with the checkpoint and is not trusted: it runs in Jinja's immutable sandbox, sees plain JSON
values only, and renders exactly as in transformers (utils/chat_template_utils.py): trim_blocks, lstrip_blocks,
break and continue, the generation tag, tojson without escapes, raise_exception, strftime_now. The format:
huggingface.co/docs/transformers/chat_templating.
"""

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxllm.errors import TokenizerError

REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # names of one field; templates read the first or the second


def choose_template(
    own: str | Mapping[str, str] | None, *, asked: str | None = None, with_tools: bool = False
) -> str:
    """The template's source: `asked` (one of the checkpoint's own by name, or a source), else the default."""
    if isinstance(own, Mapping):
        preferred = ("tool_use", "default") if with_tools else ("default",)
        names = [name for name in preferred if name in own]
        if asked is None and not names:
            raise TokenizerError(f"The tokenizer has the chat templates {sorted(own)}; say which one as template.")
        asked = own[names[0]] if asked is None else own.get(asked, asked)
    elif asked is None and own is None:
        raise TokenizerError(
            "The tokenizer has no chat template (the model may not be a chat model); give a Jinja source as "
            "template, or a plain prompt instead of messages."
        )
    source = own if asked is None else asked
    if not isinstance(source, str):
        raise TokenizerError(f"A chat template should be a Jinja source, but got a {type(source).__name__}.")
    return source


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation.

    messages: dicts with at least "role"; values of None are dropped, as APIs give them where nothing is
    meant. tools: JSON schema dicts. documents: dicts with "title" and "text". variables: further names the
    template reads; `strftime_now` among them replaces the clock: a datetime, the text to give, or a function
    of the format. Raises TokenizerError when an argument is of another form, the template is broken, refuses
    the messages, or tries what the sandbox forbids.
    """
    given = dict(variables or {})
    clock = clock_of(given.pop("strftime_now", None))
    try:
        names = plain(given, "A template variable")
        names |= {"messages": read_messages(messages), "add_generation_prompt": add_generation_prompt}
        names |= {"tools": read_dicts(tools, "tools"), "documents": read_dicts(documents, "documents")}
    except RecursionError:
        raise TokenizerError("The messages or variables are nested too deep; do they hold themselves?") from None
    return run(compiled(source), {**names, "strftime_now": clock})


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Fresh plain copies without None values, the reasoning under each name that templates read."""
    chat = []
    for message in read_dicts(messages, "messages") or []:
        kept = {key: value for key, value in message.items() if value is not None}
        thought = next((kept[key] for key in REASONING if key in kept), None)
        chat.append(kept if thought is None else {"thinking": thought, **kept, "reasoning_content": thought})
    if not chat:
        raise TokenizerError("A chat needs at least one message, but there is none.")
    return chat


def read_dicts(values: Sequence[Mapping[str, Any]] | None, what: str) -> list[dict[str, Any]] | None:
    """Plain copies of a list of dicts; TokenizerError for anything else, such as functions as tools."""
    if values is None:
        return None
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__iter__"):
        raise TokenizerError(f"{what} should be a list of dicts, but got a {type(values).__name__}.")
    for value in (values := list(values)):
        if not isinstance(value, Mapping):
            advice = "; describe the function by its JSON schema" if callable(value) else ""
            raise TokenizerError(f"{what} should be a list of dicts, but holds a {type(value).__name__}{advice}.")
    return plain(values, what)


def plain(value: Any, what: str) -> Any:
    """The value rebuilt from JSON's own types, so that no method of a richer type is in reach."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {plain(key, what): plain(item, what) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, what) for item in value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    if hasattr(value, "dtype") and getattr(value, "ndim", None) == 0:
        return plain(value.item(), what)
    raise TokenizerError(
        f"{what} should hold JSON values only (text, numbers, lists, dicts), not a {type(value).__name__}."
    )


def clock_of(now: Any) -> Callable[[str], str]:
    """strftime_now for a template: the real clock, a fixed time, a fixed text, the caller's function."""
    if now is None:
        return lambda form: datetime.datetime.now().strftime(form)
    if isinstance(now, datetime.date):
        return now.strftime
    if isinstance(now, str):
        return lambda form: now
    if callable(now):
        return now
    raise TokenizerError(
        f"strftime_now should be a datetime, a text or a function, but got a {type(now).__name__}."
    )


def run(template: Any, names: Mapping[str, Any]) -> str:
    """The rendered template; whatever goes wrong in it becomes a sentence."""
    from jinja2.exceptions import SecurityError, TemplateRuntimeError, UndefinedError

    try:
        return template.render(**names)
    except SecurityError as error:
        raise TokenizerError(f"The chat template tried what the sandbox forbids: {error}") from error
    except UndefinedError as error:
        raise TokenizerError(f"The chat template reads a name it was not given: {error}") from error
    except TemplateRuntimeError as error:
        raise TokenizerError(f"The chat template failed: {error}") from error
    except Refusal as error:
        raise TokenizerError(f"The chat template refused these messages: {error}") from error
    except Exception as error:  # the template's code is not ours: any Python error may come out of it
        raise TokenizerError(f"The chat template failed: {type(error).__name__}: {error}") from error


class Refusal(Exception):
    """raise_exception was called in a template; the message is the template's."""


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> Any:
    """The template, compiled once per source."""
    from jinja2.exceptions import TemplateSyntaxError

    try:
        return environment().from_string(source)
    except TemplateSyntaxError as error:
        raise TokenizerError(
            f"The chat template has a syntax error in line {error.lineno}: {error.message}"
        ) from error
    except Exception as error:  # Python's own compiler refuses some templates that Jinja's grammar allows
        raise TokenizerError(f"The chat template cannot be compiled: {type(error).__name__}: {error}") from error


def environment() -> Any:
    """Jinja's immutable sandbox with the filters, globals and tag that chat templates are written for."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    extensions = [generation_tag(), jinja2.ext.loopcontrols]
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    env.filters["tojson"] = to_json
    env.globals |= {"raise_exception": refuse, "dict": Dicts(), "namespace": namespace_type()}
    return env


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The tojson filter: JSON as it is, where Jinja's own would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def refuse(message: Any) -> None:
    """raise_exception of a template."""
    raise Refusal(message)


class Dicts:
    """`dict` in a template: makes dicts, and is no type whose attributes lead out of the sandbox."""

    def __call__(self, *pairs: Any, **named: Any) -> dict[Any, Any]:
        return dict(*pairs, **named)

    def fromkeys(self, *keys: Any) -> dict[Any, Any]:
        return dict.fromkeys(*keys)


def namespace_type() -> type:
    """`namespace` in a template: Jinja's, without names that begin with an underscore."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold the underscore name {name!r}")

    class PlainNamespace(Namespace):
        def __init__(*args: Any, **named: Any) -> None:  # no `self` in front: a template may name an attribute so
            attributes = dict(*args[1:], **named)
            for name in attributes:
                check(name)
            Namespace.__init__(args[0], attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            Namespace.__setitem__(self, name, value)

    return PlainNamespace


def generation_tag() -> type:
    """{% generation %}...{% endgeneration %}, around what the assistant wrote: its body, in a scope."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

        def body(self, caller: Callable[[], str]) -> str:
            return caller()

    return Generation
