"""The tokenizer that a GGUF file carries in its metadata, on the same backend as every other.

Sources: github.com/ggml-org/ggml, docs/gguf.md (the keys); ggml-org/llama.cpp, src/llama-vocab.cpp (what
they mean where they are absent, and which name of a pre-tokenizer stands for which split).
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxllm.errors import TokenizerError
from jaxllm.tokenizer import Tokenizer, with_vocabulary
from jaxllm.tokenizer_files import (
    BYTE,
    CONTROL,
    ENGLISH,
    LLAMA3_PATTERN,
    NORMAL,
    QWEN_PATTERN,
    UNKNOWN,
    USER_DEFINED,
    Pieces,
    Vocabulary,
    byte_level,
    refusing,
    sentencepiece,
)

G = "tokenizer.ggml."
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
NAMED |= {"sep_token": "seperator", "mask_token": "mask"}  # so spelled
NONE = 2**32 - 1  # as an id: no such token
KINDS = range(NORMAL, BYTE + 1)
PLAIN = ("<unk>", "<s>", "<|endoftext|>")  # of Phi-3's special tokens, those that leave the space behind them

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|"
TEKKEN = _CASED % ("", "") + r"\p{N}|" + _SLASHED
GPT4O = _CASED % (ENGLISH + "?", ENGLISH + "?") + r"\p{N}{1,3}|" + _SLASHED
_CJK = "[一-龥\u0800-一가-\ud7ff]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED = rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN35 = (
    rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"


class Pre(NamedTuple):
    """How a text is cut before its bytes are joined: by each pattern in turn, matches and what is between them."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a word that is a token is never cut
    composed: bool = False  # Unicode's NFC first
    adds_bos: bool = False  # where the file does not say


_DIGITS = Pre((r"\p{N}", GPT2))
_LLAMA3 = Pre((LLAMA3_PATTERN,), whole_words=True, adds_bos=True)
_DEEPSEEK = Pre((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3))
PRE: dict[str, Pre] = {
    **dict.fromkeys(("default", ""), Pre((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2"), _LLAMA3),
    "midm-2.0": _LLAMA3,
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), Pre((LLAMA3_PATTERN,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), Pre((QWEN_PATTERN,), composed=True)),
    "qwen35": Pre((_QWEN35,), composed=True),
    **dict.fromkeys(("stablelm2", "hunyuan", "grok-2", "kormo"), Pre((QWEN_PATTERN,))),
    **dict.fromkeys(("gpt-2", "phi-2", "gigachat", "jais", "trillion", "granite-docling"), Pre((GPT2,))),
    **dict.fromkeys(("a.x-4.0", "mellum", "exaone4"), Pre((GPT2,))),
    **dict.fromkeys(("olmo", "mpt"), Pre((GPT2,), composed=True)),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK),
    "deepseek-coder": Pre(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    "deepseek-llm": Pre(
        ("[\r\n]", r"\s?[\p{Lu}\p{Ll}\p{Lt}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, r"\p{N}+")
    ),
    "falcon": Pre((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), Pre((_BLOOM,))),
    "viking": Pre((_BLOOM, r"\p{N}")),
    "tekken": Pre((TEKKEN,), whole_words=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "minimax-m2"), Pre((GPT4O,))),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), Pre((_BAILING,))),
    "seed-coder": Pre((_SEED,)),
}


def from_metadata(metadata: Mapping[str, Any], path: pathlib.Path) -> Tokenizer | None:
    """The tokenizer of a GGUF file's metadata, or None where it carries none; path: of the file, for messages.

    Raises TokenizerError for a kind that is not read (only "llama", sentencepiece's BPE, and "gpt2", byte-level
    BPE, are), for a pre-tokenizer that is not known, and for parts that are missing or do not fit together."""
    model = metadata.get(G + "model", "none")
    if not isinstance(model, str) or model in ("none", "no_vocab"):
        return None
    tokens, kinds = _tokens(metadata, path)
    if model == "llama":
        vocabulary = _pieces(metadata, path, tokens, kinds)
    elif model == "gpt2":
        vocabulary = _bytes(metadata, path, tokens, kinds)
    else:
        raise TokenizerError(f"{path}: its tokenizer is of the kind {model!r}; 'llama' and 'gpt2' are read.")
    return with_vocabulary(vocabulary, path, _config(metadata, path, tokens, kinds))


def _tokens(metadata: Mapping[str, Any], path: pathlib.Path) -> tuple[list[str], list[int]]:
    """Every token's text and kind."""
    tokens = metadata.get(G + "tokens")
    if not isinstance(tokens, list) or not tokens:
        raise TokenizerError(f"{path}: {G}tokens should be a list of texts. Fetch the file again.")
    return tokens, _numbers(metadata, path, "token_type", len(tokens), np.full(len(tokens), NORMAL)).tolist()


def _numbers(metadata: Mapping[str, Any], path, name: str, count: int, usual: np.ndarray | None) -> np.ndarray:
    found = metadata.get(G + name, usual)
    if not isinstance(found, np.ndarray) or len(found) != count:
        what = f"{len(found)} numbers" if isinstance(found, np.ndarray) else type(found).__name__
        raise TokenizerError(f"{path}: {G}{name} should be {count} numbers, one a token, but is {what}.")
    return found


def _flag(metadata: Mapping[str, Any], path: pathlib.Path, name: str, usual: bool) -> bool:
    value = metadata.get(G + name, usual)
    if not isinstance(value, bool):
        raise TokenizerError(f"{path}: {G}{name} should be true or false, but is {value!r}.")
    return value


def _pieces(metadata: Mapping[str, Any], path: pathlib.Path, tokens: list[str], kinds: list[int]) -> Vocabulary:
    """sentencepiece's BPE: texts and scores; what joins follows from them."""
    scores = _numbers(metadata, path, "scores", len(tokens), None).tolist()
    trainer = {3: 2, 35: int(BYTE in kinds)}
    flags = {3: ("add_space_prefix", True), 4: ("remove_extra_whitespaces", False)}
    normalizer = {number: int(_flag(metadata, path, *flag)) for number, flag in flags.items()}
    pieces = Pieces(list(zip(tokens, scores, kinds, strict=True)), trainer, normalizer)
    return sentencepiece(pieces, path, {})


def _bytes(metadata: Mapping[str, Any], path: pathlib.Path, tokens: list[str], kinds: list[int]) -> Vocabulary:
    """Byte-level BPE: texts in the byte alphabet and the merges."""
    from tokenizers import AddedToken

    pre = _pre(metadata, path)
    vocab = {token: index for index, token in enumerate(tokens)}
    with refusing(f"{path} has no byte-level vocabulary that can be used", "Fetch the file again."):
        merges = _merges(metadata.get(G + "merges"))
        split = _split(pre.patterns)
        backend = byte_level(vocab, merges, split, composed=pre.composed, whole_words=pre.whole_words)
        own, special = (_of_kind(tokens, kinds, *which) for which in ((USER_DEFINED,), (CONTROL, UNKNOWN)))
        backend.add_tokens([AddedToken(token, normalized=False) for token in own])
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return Vocabulary(backend, adds_bos=pre.adds_bos)


def _of_kind(tokens: list[str], kinds: list[int], *which: int) -> list[str]:
    return [token for token, kind in zip(tokens, kinds, strict=True) if kind in which and token]


def _pre(metadata: Mapping[str, Any], path: pathlib.Path) -> Pre:
    name = metadata.get(G + "pre", "")
    if not isinstance(name, str) or name not in PRE:
        known = ", ".join(sorted(PRE)[1:])
        raise TokenizerError(f"{path}: its pre-tokenizer is {name!r}; known are {known}.")
    return PRE[name]


def _merges(lines: Any) -> list[tuple[str, str]]:
    if not isinstance(lines, list):
        raise ValueError(f"{G}merges is missing")
    # A token may begin with a space, but for the one that parts the two.
    cuts = [line.find(" ", 1) for line in lines]
    if -1 in cuts:
        raise ValueError(f"the merge {lines[cuts.index(-1)]!r} does not name two tokens")
    return [(line[:cut], line[cut + 1 :]) for line, cut in zip(lines, cuts, strict=True)]


def _split(patterns: tuple[str, ...]) -> Any:
    from tokenizers import Regex, pre_tokenizers

    cuts = [pre_tokenizers.Split(Regex(p), behavior="isolated", invert=False) for p in patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _config(
    metadata: Mapping[str, Any], path: pathlib.Path, tokens: list[str], kinds: list[int]
) -> dict[str, Any]:
    """What tokenizer_config.json would say."""
    config: dict[str, Any] = {name: _named(metadata, path, key, tokens) for name, key in NAMED.items()}
    for name in ("add_bos_token", "add_eos_token"):
        if G + name in metadata:
            config[name] = _flag(metadata, path, name, False)
    if metadata.get("general.architecture") == "phi3" and metadata[G + "model"] == "llama":
        config["added_tokens_decoder"] = _greedy(tokens, kinds)
    return {name: value for name, value in config.items() if value is not None} | _templates(metadata)


def _named(metadata: Mapping[str, Any], path: pathlib.Path, key: str, tokens: list[str]) -> str | None:
    usual = {"bos": 1, "eos": 2, "unknown": 0}.get(key) if metadata[G + "model"] == "llama" else None
    index = metadata.get(f"{G}{key}_token_id", usual)
    if index is None or (type(index) is int and index in (NONE, -1)):
        return None
    if type(index) is not int or not 0 <= index < len(tokens):
        raise TokenizerError(f"{path}: {G}{key}_token_id is {index!r}, and there are {len(tokens)} tokens.")
    return tokens[index]


def _greedy(tokens: list[str], kinds: list[int]) -> dict[str, dict[str, Any]]:
    """Phi-3's special tokens swallow the space behind them, of which the metadata says nothing."""
    found = {str(i): kind for i, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)}
    flags = dict(lstrip=False, single_word=False, normalized=False)
    return {
        i: dict(content=tokens[int(i)], rstrip=tokens[int(i)] not in PLAIN, special=kind == CONTROL, **flags)
        for i, kind in found.items()
    }


def _templates(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The chat template, or several by name."""
    first = "tokenizer.chat_template"
    named = {k.removeprefix(first + "."): v for k, v in metadata.items() if k.startswith(first + ".")}
    found = ({"default": metadata[first]} if first in metadata else {}) | named
    return {"chat_template": [{"name": k, "template": v} for k, v in found.items()]} if found else {}
