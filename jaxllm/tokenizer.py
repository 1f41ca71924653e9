"""Text to token ids and back, and chats to prompts, as a checkpoint's tokenizer files say.

Every format is run by the tokenizers library (see tokenizer_files.py), so that ids and texts are those of
transformers' fast tokenizers. This file adds what generation needs: exact bytes per token, and a detokenizer
that streams.
"""

import json
import operator
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxllm import chat
from jaxllm.detokenizer import BYTE_TOKEN, Detokenizer, decoder_parts
from jaxllm.errors import TokenizerError
from jaxllm.tokenizer_files import (
    Vocabulary,
    byte_alphabet,
    check_ids,
    read_object,
    read_text,
    read_vocabulary,
    refusing,
)

CLASS_NAMES = {  # transformers' own for each class, where tokenizer_config.json does not say
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


class Tokenizer:
    """A checkpoint's tokenizer. Immutable; safe to share between threads.

    vocab_size: one more than the highest id that decodes, added tokens included (a model's own vocabulary may
    be padded beyond it). bos_id, eos_id, pad_id: None where the files name no such token. chat_template: the
    Jinja source, or sources by name, or None. special_ids: what decode skips.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    chat_template: str | dict[str, str] | None
    special_ids: frozenset[int]

    def __init__(
        self,
        backend: Any,
        *,
        names: Mapping[str, str] | None = None,
        extra_names: Sequence[str] = (),
        chat_template: str | Mapping[str, str] | None = None,
    ):
        """backend: a tokenizers.Tokenizer. names: {"bos_token": "<s>", ...}; extra_names: more of them."""
        self._backend, self._extra_names = backend, list(extra_names)
        self._names = {name: token for name, token in (names or {}).items() if self.id_of(token) is not None}
        self._added = backend.get_added_tokens_decoder()
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.bos_id, self.eos_id, self.pad_id = map(self._named_id, ("bos_token", "eos_token", "pad_token"))
        self.chat_template = dict(chat_template) if isinstance(chat_template, Mapping) else chat_template
        self.special_ids = frozenset(index for index, token in self._added.items() if token.special)
        self._decoders = decoder_parts(backend)
        kinds = {part["type"] for part in self._decoders}
        letters = byte_alphabet() if "ByteLevel" in kinds else []
        self._byte_of = {letter: byte for byte, letter in enumerate(letters)}
        self._has_byte_tokens = "ByteFallback" in kinds
        self._has_blanks = any(
            "▁" in (part.get("replacement"), part.get("pattern", {}).get("String")) for part in self._decoders
        )

    def _named_id(self, name: str) -> int | None:
        return self.id_of(self._names[name]) if name in self._names else None

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """The ids of a text; special tokens written in it become their ids.

        add_special: also what the checkpoint puts around a text (<s>, ...), as transformers' tokenizer(text)
        does. Raises TokenizerError when text is no str or not Unicode (a lone surrogate), or the vocabulary
        cannot spell it.
        """
        if not isinstance(text, str):
            raise TokenizerError(f"encode takes a text, but got a {type(text).__name__}; decode it to str first.")
        with refusing("The text cannot be encoded", "Give Unicode text that this vocabulary can spell."):
            text.encode()
            return self._backend.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD.

        ids: integers, in a list or a one-axis array. Raises TokenizerError for what is no integer, or an id
        that names no token.
        """
        values = ids.tolist() if hasattr(ids, "tolist") else ids
        if not hasattr(values, "__iter__"):
            raise TokenizerError(f"decode takes a sequence of ids, but got {ids!r}; put a single id in a list.")
        values = [self._known(index) for index in values]
        with refusing("The ids cannot be decoded", "Check that they come from this tokenizer."):
            return self._backend.decode(values, skip_special_tokens=skip_special)

    def _known(self, index: Any) -> int:
        """The id as an int that names a token."""
        try:
            value = operator.index(None if isinstance(index, bool) else index)
        except TypeError:
            kind = type(index).__name__
            raise TokenizerError(f"A token id is an integer, but got {index!r}, a {kind}.") from None
        if not 0 <= value < self.vocab_size or self._backend.id_to_token(value) is None:
            raise TokenizerError(
                f"Token id {value} names no token of this tokenizer, whose ids are 0 to "
                f"{self.vocab_size - 1}. Check that the ids come from a model of this tokenizer."
            )
        return value

    def _spelling(self, index: Any) -> str:
        """How the vocabulary spells a token."""
        return self._backend.id_to_token(self._known(index))

    def token(self, id: int) -> str:
        r"""The text of one token for display; bytes that are no character by themselves come as \xNN."""
        return self.token_bytes(id).decode("utf-8", errors="backslashreplace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes one token stands for inside a text; an added or special token stands for its own name."""
        spelling = self._spelling(id)
        if operator.index(id) in self._added:
            return spelling.encode()
        if self._byte_of and all(letter in self._byte_of for letter in spelling):
            return bytes(self._byte_of[letter] for letter in spelling)
        if self._has_byte_tokens and (match := BYTE_TOKEN.fullmatch(spelling)):
            return bytes([int(match[1], 16)])
        return (spelling.replace("▁", " ") if self._has_blanks else spelling).encode()

    def vocabulary(self) -> dict[str, int]:
        """Every token's spelling and id, added tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def files(self) -> dict[str, bytes]:
        """Name -> contents of the files that `load_tokenizer` makes this tokenizer of, in any folder."""
        config = {**self._names, "additional_special_tokens": self._extra_names}
        config |= {"chat_template": _listed(self.chat_template)} if self.chat_template else {}
        text = json.dumps(config, ensure_ascii=False, indent=2)
        return {"tokenizer.json": self._backend.to_str().encode(), "tokenizer_config.json": text.encode()}

    def id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it ("<|im_end|>", "Ġthe", "▁the"), or None."""
        return self._backend.token_to_id(token)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation, by the chat template.

        template: one of the checkpoint's by its name, or a Jinja source. variables (enable_thinking=False, ...)
        go to the template. See chat.render for the other arguments, the clock and the errors.
        """
        source = chat.choose_template(self.chat_template, asked=template, with_tools=tools is not None)
        extra = {"additional_special_tokens": self._extra_names} if self._extra_names else {}
        return chat.render(
            source,
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            variables={**self._names, **extra, **variables},
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template: str | None = None,
        **variables: Any,
    ) -> list[int]:
        """The ids of render_chat's text, with nothing added: a template writes its own <s>."""
        text = self.render_chat(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            template=template,
            **variables,
        )
        return self.encode(text, add_special=False)

    def detokenizer(self, *, skip_special: bool = True) -> Detokenizer:
        """A new stream of ids to text. TokenizerError where the checkpoint's decoder cannot be streamed."""
        skipped = self.special_ids if skip_special else frozenset()
        return Detokenizer(self._spelling, self._decoders, skipped)


def load_tokenizer(folder: str | pathlib.Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder, or None where it has no vocabulary file.

    Reads tokenizer.json, or vocab.json + merges.txt, or tokenizer.model (sentencepiece or Llama 3's
    tiktoken), or a *.tiktoken of Qwen 1; with them tokenizer_config.json, special_tokens_map.json,
    added_tokens.json and the chat templates. Where tokenizer.json states what goes around a text, that holds;
    add_bos_token and add_eos_token speak for the other formats, as in transformers 5. Raises TokenizerError,
    naming the file, for one that is malformed.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise TokenizerError(f"{folder} is not a folder; give the checkpoint's folder.")
    config = _config(folder)
    vocabulary = read_vocabulary(folder, config)
    return None if vocabulary is None else with_vocabulary(vocabulary, folder, config)


def with_vocabulary(vocabulary: Vocabulary, folder: pathlib.Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a vocabulary already read; config is tokenizer_config.json ({} where there is none).

    The folder's added_tokens.json and chat templates are read. Raises TokenizerError where they do not fit.
    """
    names, extra = _names(vocabulary, config)
    with refusing(f"The special tokens of {folder} do not fit its vocabulary", "Fetch its files again."):
        _add_tokens(vocabulary.backend, folder, config, names)
        _add_special(vocabulary.backend, [*names.values(), *extra])
        if not vocabulary.brings_processor:
            _surround(vocabulary, config, {name: entry["content"] for name, entry in names.items()})
        vocabulary.backend.encode_special_tokens = config.get("split_special_tokens") is True
        return Tokenizer(
            vocabulary.backend,
            names={name: entry["content"] for name, entry in names.items()},
            extra_names=[entry["content"] for entry in extra],
            chat_template=_read_templates(folder, config),
        )


def _config(folder: pathlib.Path) -> dict[str, Any]:
    """tokenizer_config.json and special_tokens_map.json; the latter wins where the former lists no tokens."""
    found = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        found[name] = read_object(folder / name) if (folder / name).is_file() else {}
    config, special = found.values()
    merged = {**special, **config} if "added_tokens_decoder" in config else {**config, **special}
    for key in ("add_bos_token", "add_eos_token", "legacy", "split_special_tokens", "add_prefix_space"):
        if not isinstance(merged.get(key), bool | None):
            raise TokenizerError(f"{folder}: {key} should be true or false, but is {merged[key]!r}.")
    if not isinstance(merged.get("tokenizer_class"), str | None):
        raise TokenizerError(f"{folder}: tokenizer_class should be a name, but is {merged['tokenizer_class']!r}.")
    return merged


def _entry(value: Any, where: str) -> dict[str, Any]:
    """A token given as its text or as a dict of text and flags, always as the latter."""
    entry = {"content": value} if isinstance(value, str) else value
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not entry["content"]:
        raise TokenizerError(f"{where} should be a token (its text, or a dict with content), but is {value!r}.")
    flags = {flag: entry[flag] for flag in FLAGS if flag in entry}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise TokenizerError(f"{where} has flags that are not true or false: {flags}.")
    return {"content": entry["content"], **flags}


def _names(
    vocabulary: Vocabulary, config: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The named special tokens (each *_token of the config, or the format's own) and the additional ones."""
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    defaults = {**vocabulary.names, **CLASS_NAMES.get(kind, {})}
    names = {
        name: {"content": token}
        for name, token in defaults.items()
        if vocabulary.backend.token_to_id(token) is not None
    }
    for name, value in config.items():
        if name in NAMES or (name.endswith("_token") and isinstance(value, str)):
            names.pop(name, None)
            if value is not None:
                names[name] = _entry(value, f"{name} of the tokenizer's config")
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        return names | {name: _entry(value, name) for name, value in extra.items()}, []
    if not isinstance(extra, list):
        raise TokenizerError(f"additional_special_tokens should be a list of tokens, but is {extra!r}.")
    return names, [_entry(value, "additional_special_tokens of the tokenizer's config") for value in extra]


def _add_tokens(
    backend: Any, folder: pathlib.Path, config: Mapping[str, Any], names: Mapping[str, dict[str, Any]]
) -> None:
    """Adds the tokens of added_tokens_decoder, or of added_tokens.json, and checks what ids they get."""
    wanted = _added_of_config(config) if "added_tokens_decoder" in config else _added_of_file(folder, names)
    present = backend.get_added_tokens_decoder()
    tokens = [_token(wanted[index]) for index in sorted(wanted)]
    known = {repr(token) for token in present.values()}
    backend.add_tokens([token for token in tokens if repr(token) not in known])
    for index, entry in sorted(wanted.items()):
        if (found := backend.token_to_id(entry["content"])) != index:
            raise TokenizerError(
                f"{folder}: the added token {entry['content']!r} should have the id {index}, but comes out "
                f"as {found}. The vocabulary file and the list of added tokens do not belong together."
            )


def _token(entry: Mapping[str, Any]) -> Any:
    from tokenizers import AddedToken

    return AddedToken(**entry)


def _added_of_config(config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """id -> token from tokenizer_config.json's added_tokens_decoder."""
    listed = config["added_tokens_decoder"]
    if not isinstance(listed, dict) or not all(key.isdecimal() and len(key) < 10 for key in listed):
        raise TokenizerError("added_tokens_decoder of tokenizer_config.json should map ids to tokens.")
    return {int(index): _entry(token, f"added token {index}") for index, token in listed.items()}


def _added_of_file(folder: pathlib.Path, names: Mapping[str, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """id -> token from added_tokens.json; those with a name are special and matched before normalizing."""
    path = folder / "added_tokens.json"
    if not path.is_file():
        return {}
    listed = read_object(path)
    check_ids(listed, path)
    special = {entry["content"] for entry in names.values()}
    return {
        index: {"content": token, "special": token in special, "normalized": token not in special}
        for token, index in listed.items()
    }


def _add_special(backend: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    """Makes each named token special; one that is an added token already keeps how it is matched."""
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    tokens = []
    for entry in entries:
        old = known.get(entry["content"])
        kept = {flag: getattr(old, flag) for flag in FLAGS} if old else {"normalized": False}
        tokens.append(_token({**kept, **({} if old else entry), "content": entry["content"], "special": True}))
    backend.add_special_tokens(tokens)


def _surround(vocabulary: Vocabulary, config: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """The post-processor: bos in front and eos behind, where the config, or else the format, wants them."""
    from tokenizers.processors import TemplateProcessing

    before = config.get("add_bos_token")
    wanted = {
        "bos_token": vocabulary.adds_bos if before is None else before,
        "eos_token": config.get("add_eos_token"),
    }
    bos, eos = (names.get(name) if wanted[name] else None for name in ("bos_token", "eos_token"))
    single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    special = [(token, vocabulary.backend.token_to_id(token)) for token in {bos, eos} - {None}]
    vocabulary.backend.post_processor = TemplateProcessing(single=single, special_tokens=special)


def _read_templates(folder: pathlib.Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat templates: files of their own first, then tokenizer_config.json, then chat_template.json."""
    found = {}
    if (path := folder / "chat_template.jinja").is_file():
        found["default"] = read_text(path)
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = read_text(path)
    if not found:
        found = _templates_of(config.get("chat_template"), "tokenizer_config.json")
    if not found and (path := folder / "chat_template.json").is_file():
        found = _templates_of(read_object(path).get("chat_template"), "chat_template.json")
    return found["default"] if set(found) == {"default"} else found or None


def _templates_of(value: Any, where: str) -> dict[str, str]:
    """name -> source, from one source, a dict, or a list of {"name", "template"}."""
    if value is None:
        return {}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {item.get("name"): item.get("template") for item in value}
    found = {"default": value} if isinstance(value, str) else value
    if not isinstance(found, dict) or not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise TokenizerError(f"chat_template of {where} should be a Jinja source, or sources by name.")
    return found


def _listed(template: str | dict[str, str]) -> str | list[dict[str, str]]:
    """A chat template, or several by name, as tokenizer_config.json has them."""
    if isinstance(template, str):
        return template
    return [{"name": name, "template": source} for name, source in template.items()]
