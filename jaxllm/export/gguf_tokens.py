"""A tokenizer as GGUF's metadata, such that reading them back gives the same ids."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from jaxllm.errors import ConfigError, TokenizerError
from jaxllm.tokenizer import Tokenizer
from jaxllm.tokenizer_files import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from jaxllm.tokenizer_gguf import PRE, G, from_metadata

UNUSED = 5
LIKELY = ("llama-bpe", "smaug-bpe", "qwen2", "gpt-2", "tekken")  # pre-tokenizers that many models have
# What pre-tokenizers cut differently: digits, contractions, cases, spaces, lines, marks, other alphabets.
PROBES = (
    "Hello world, it's 12345 o'CLOCK; I'LL pay $3.50 (or 1/2)!\n\n  x_1 += foo(bar)\t# ok\r\n",
    "  two  spaces   end  ",
    "naïve café ÀÉÎ Straße Ünïcode x\u0301 日本語のテキスト 한국어 русский العربية हिन्दी 🙂👍🏽 ①½²",
    "camelCase HTTPServer snake_case ... --- ''' \"\"\" <|x|> [y] {z} a\u00a0b\u3000c\n \n\t\n",
)


def metadata_of(tokenizer: Tokenizer | None, vocab: int) -> dict[str, Any]:
    """Keys under "tokenizer."; `vocab` is the model's, which may be padded beyond the tokenizer's.

    Raises ConfigError for a tokenizer that GGUF cannot describe."""
    if tokenizer is None:
        return {G + "model": "no_vocab"}
    if tokenizer.vocab_size > vocab:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} tokens, and the model's vocabulary {vocab}")
    files = json.loads(tokenizer.files()["tokenizer.json"])
    if files["model"]["type"] != "BPE":
        raise ConfigError(f"its tokenizer is a {files['model']['type']}, and GGUF files are written of BPE")
    keys = _shared(tokenizer, files, vocab)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in files["model"]["merges"]]
    if files["model"].get("byte_fallback"):
        candidates = [{G + "model": "llama", G + "scores": _scores(keys[G + "tokens"], merges)}]
        candidates = [c | {G + "add_space_prefix": on} for c in candidates for on in (True, False)]
    else:
        names = (*LIKELY, *(name for name in PRE if name and name not in LIKELY))
        candidates = [{G + "model": "gpt2", G + "merges": merges, G + "pre": name} for name in names]
    return _same(tokenizer, [keys | c for c in candidates])


def _same(tokenizer: Tokenizer, candidates: list[dict[str, Any]]) -> dict[str, Any]:
    """The first of the candidates that gives the tokenizer's ids."""
    wanted = [tokenizer.encode(text, add_special=False) for text in PROBES]
    for keys in candidates:
        try:
            found = from_metadata(_as_read(keys), pathlib.Path("the model"))
            if [found.encode(text, add_special=False) for text in PROBES] == wanted:
                return keys
        except TokenizerError:
            continue
    raise ConfigError("none of the ways in which GGUF describes a tokenizer gives the ids of this one")


def _as_read(keys: dict[str, Any]) -> dict[str, Any]:
    """Lists of numbers as the reader has them."""
    import numpy as np

    return {k: np.array(v) if isinstance(v, list) and not isinstance(v[0], str) else v for k, v in keys.items()}


def _shared(tokenizer: Tokenizer, files: dict[str, Any], vocab: int) -> dict[str, Any]:
    spelled = {index: text for text, index in tokenizer.vocabulary().items()}
    tokens = [spelled.get(i, f"[PAD{i}]") for i in range(vocab)]
    added = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in files["added_tokens"]}
    unknown = files["model"].get("unk_token")
    kinds = [added.get(i, NORMAL if i in spelled else UNUSED) for i in range(vocab)]
    if files["model"].get("byte_fallback"):
        kinds = [BYTE if _is_byte(text) else kind for text, kind in zip(tokens, kinds, strict=True)]
    kinds = [UNKNOWN if text == unknown else kind for text, kind in zip(tokens, kinds, strict=True)]
    begins = tokenizer.encode("a")[:1] == [tokenizer.bos_id]
    keys = {G + "tokens": tokens, G + "token_type": kinds, G + "add_bos_token": begins, G + "add_eos_token": False}
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    keys |= {f"{G}{name}_token_id": i for name, i in ids.items() if i is not None}
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    return keys | ({"tokenizer.chat_template": template} if template else {})


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """The earlier a token is made, the higher; what no merge makes is never joined."""
    rank = {}
    for i, pair in enumerate(merges):
        rank.setdefault(pair.replace(" ", "", 1), -float(i))
    return [rank.get(text, -1e9) for text in tokens]
