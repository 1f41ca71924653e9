"""Vocabulary files to one kind of backend: every format becomes a `tokenizers.Tokenizer`.

Formats: tokenizer.json (the tokenizers library's own), vocab.json + merges.txt (byte-level BPE, Radford et
al. 2019), sentencepiece models (github.com/google/sentencepiece, sentencepiece_model.proto) and tiktoken
ranks (one base64 token and its rank a line, github.com/openai/tiktoken). The last two need neither library:
their merges follow from the vocabulary, because joining two pieces is allowed exactly where the result is a
piece, best score (or lowest rank) first.
"""

import base64
import binascii
import contextlib
import dataclasses
import json
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from jaxllm.errors import TokenizerError

ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_PATTERN = rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{TAIL}"
LLAMA3_PATTERN = rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{TAIL}"
LLAMA3_RANKS, QWEN_RANKS = 128_000, 151_643
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = (
    1,
    2,
    3,
    4,
    5,
    6,
)  # sentencepiece_model.proto, SentencePiece.Type
GPT2_CLASSES = ("GPT2Tokenizer", "CodeGenTokenizer")
END_OF_TEXT = "<|endoftext|>"
Piece = TypeVar("Piece", str, bytes)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A backend and what its file format says about special tokens when tokenizer_config.json is silent."""

    backend: Any  # tokenizers.Tokenizer
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)  # "bos_token" -> "<s>"
    adds_bos: bool = False
    brings_processor: bool = False  # tokenizer.json states itself what is added around a text


@contextlib.contextmanager
def refusing(what: str, remedy: str) -> Iterator[None]:
    """Turns whatever the block raises, a panic of the rust library included, into a TokenizerError."""
    try:
        yield
    except (TokenizerError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # pyo3's PanicException derives from BaseException alone
        raise TokenizerError(f"{what}: {error}. {remedy}") from error


def read_bytes(path: pathlib.Path) -> bytes:
    """The file's bytes. TokenizerError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error}. Check the file and its permissions.") from error


def read_text(path: pathlib.Path) -> str:
    """The file as UTF-8 text. TokenizerError where it cannot be read as such."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} should be UTF-8 text, but is not: {error}. Fetch the file again.") from error


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file. TokenizerError where it is broken or no object."""
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}. Fetch the file again.") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} should hold a JSON object, but holds a {type(value).__name__}.")
    return value


def check_ids(vocab: Mapping[str, Any], path: pathlib.Path) -> None:
    """TokenizerError unless every id is an integer that fits the int32 the model is fed with."""
    for token, index in vocab.items():
        if type(index) is not int or not 0 <= index < 2**31:
            raise TokenizerError(
                f"{path}: token {token!r} has the id {index!r}, but ids are integers in [0, 2^31)."
            )


def read_vocabulary(folder: pathlib.Path, config: Mapping[str, Any]) -> Vocabulary | None:
    """The vocabulary of a checkpoint folder, or None where it has none.

    Order: tokenizer.json, vocab.json + merges.txt, tokenizer.model (sentencepiece or tiktoken by content),
    *.tiktoken. config is tokenizer_config.json. Raises TokenizerError for a malformed file.
    """
    if (folder / "tokenizer.json").is_file():
        return read_tokenizer_json(folder / "tokenizer.json")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return read_merges(folder, config)
    if (path := folder / "tokenizer.model").is_file():
        data = read_bytes(path)
        return read_tiktoken(path, data) if is_tiktoken(data) else read_sentencepiece(path, data, config)
    ranks = sorted(folder.glob("*.tiktoken"))
    if len(ranks) > 1:
        raise TokenizerError(f"{folder} holds {len(ranks)} .tiktoken files; keep the one of this model.")
    if ranks:
        return read_tiktoken(ranks[0], read_bytes(ranks[0]))
    if half := [name for name in ("vocab.json", "merges.txt") if (folder / name).is_file()]:
        raise TokenizerError(f"{folder} has {half[0]} alone; vocab.json and merges.txt are read together.")
    return None


def read_tokenizer_json(path: pathlib.Path) -> Vocabulary:
    """The tokenizers library's own file; its padding and truncation, which are no part of a vocabulary, are
    dropped.
    """
    from tokenizers import Tokenizer

    with refusing(f"{path} is no tokenizer the tokenizers library can read", "Fetch the file again."):
        backend = Tokenizer.from_str(read_text(path))
        backend.no_padding()
        backend.no_truncation()
        check_ids(backend.get_vocab(with_added_tokens=True), path)
    return Vocabulary(backend, brings_processor=backend.post_processor is not None)


def read_merges(folder: pathlib.Path, config: Mapping[str, Any]) -> Vocabulary:
    """Byte-level BPE from vocab.json and merges.txt, split as GPT-2 or, where tokenizer_class says so, as
    Qwen2.
    """
    from tokenizers import pre_tokenizers

    name = str(config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if name != "Qwen2Tokenizer" and name not in GPT2_CLASSES:
        raise TokenizerError(
            f"{folder} has vocab.json and merges.txt of a {name}, but from these files only "
            f"{', '.join(GPT2_CLASSES)} and Qwen2Tokenizer can be built. Save it as tokenizer.json."
        )
    vocab, prefix = read_object(folder / "vocab.json"), config.get("add_prefix_space") is True
    check_ids(vocab, folder / "vocab.json")
    merges = parse_merges(folder / "merges.txt", vocab)
    if name == "Qwen2Tokenizer":
        backend = byte_level(vocab, merges, split(QWEN_PATTERN, prefix), composed=True)
        names = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    else:
        backend = byte_level(vocab, merges, pre_tokenizers.ByteLevel(add_prefix_space=prefix))
        names = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    return Vocabulary(backend, names)


def parse_merges(path: pathlib.Path, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """merges.txt: two tokens a line, best first, after an optional #version line."""
    merges = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line or line.startswith("#version"):
            continue
        left, _, right = line.rstrip("\r").partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise TokenizerError(
                f"{path}, line {number}: a merge should name two tokens of vocab.json whose joining is a "
                f"third, but found {line!r}. The two files do not belong together."
            )
        merges.append((left, right))
    return merges


def split(pattern: str, prefix: bool = False) -> Any:
    """A pre-tokenizer: words by the pattern, then their bytes in the byte-level alphabet."""
    from tokenizers import Regex, pre_tokenizers

    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)])


def byte_level(
    vocab: Mapping[str, int],
    merges: list[tuple[str, str]],
    pre_tokenizer: Any,
    *,
    composed: bool = False,
    whole_words: bool = False,
) -> Any:
    """A byte-level BPE backend. composed: NFC first; whole_words: a word in the vocabulary is never split."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    with refusing("the byte-level vocabulary and its merges do not fit together", "Fetch both files again."):
        backend = Tokenizer(models.BPE(vocab=dict(vocab), merges=merges, ignore_merges=whole_words))
    if composed:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    return backend


def byte_alphabet() -> list[str]:
    """The 256 letters of GPT-2's byte-level BPE: printable latin-1 as it is, the rest from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def is_tiktoken(data: bytes) -> bool:
    """Whether the first line is a base64 token and its rank; a sentencepiece model starts with a newline."""
    token, _, rank = data.partition(b"\n")[0].strip().partition(b" ")
    return rank.isdigit() and not token.strip(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=")


def parse_ranks(path: pathlib.Path, data: bytes) -> dict[bytes, int]:
    """token -> rank from tiktoken lines; every single byte must be a token, ranks are distinct."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(
                f"{path}, line {number}: expected a base64 token and its rank, but found {line[:80]!r}."
            ) from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        fault = f"no token for byte {missing[0]:#04x}" if missing else "ranks that are not 0 to n-1"
        raise TokenizerError(f"{path} has {fault}; it is truncated or damaged. Fetch the file again.")
    return ranks


def read_tiktoken(path: pathlib.Path, data: bytes) -> Vocabulary:
    """Tiktoken ranks as byte-level BPE, with the special tokens of Llama 3 or Qwen 1, told by the number.

    Source: meta-llama/llama-models models/llama3/tokenizer.py and Qwen/Qwen-7B tokenization_qwen.py.
    """
    from tokenizers import AddedToken

    ranks = parse_ranks(path, data)
    llama = len(ranks) == LLAMA3_RANKS
    if not llama and len(ranks) != QWEN_RANKS:
        raise TokenizerError(
            f"{path} holds {len(ranks)} tiktoken ranks, but such a file does not say how text is split, "
            f"which is known here for Llama 3 ({LLAMA3_RANKS}) and Qwen 1 ({QWEN_RANKS}) only. Fetch it "
            "again if it is one of them, or else save the tokenizer as tokenizer.json."
        )
    letters = byte_alphabet()
    spell = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocab = {spell[token]: rank for token, rank in ranks.items()}
    merges = [(spell[left], spell[right]) for left, right in joins(ranks, ranks, ranks)]
    pattern = LLAMA3_PATTERN if llama else QWEN_PATTERN
    backend = byte_level(vocab, merges, split(pattern), composed=not llama, whole_words=True)
    special = llama3_specials() if llama else qwen_specials()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if not llama:
        return Vocabulary(backend, {"eos_token": END_OF_TEXT})
    names = {"bos_token": special[0], "eos_token": special[1], "pad_token": special[4]}
    return Vocabulary(backend, names, adds_bos=True)


def llama3_specials() -> list[str]:
    """The 256 special tokens after Llama 3's ranks, in order."""
    words = "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1"
    words += " finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id python_tag image"
    names = words.split() + [f"reserved_special_token_{index}" for index in range(2, 246)]
    return [f"<|{name}|>" for name in names]


def qwen_specials() -> list[str]:
    """The 208 special tokens after the ranks of Qwen 1, in order."""
    return [END_OF_TEXT, "<|im_start|>", "<|im_end|>", *(f"<|extra_{index}|>" for index in range(205))]


def joins(
    results: Mapping[Piece, float], index: Mapping[Piece, int], order: Mapping[Piece, float]
) -> list[tuple[Piece, Piece]]:
    """Every (left, right) of tokens in index whose joining is in results, by the order of what they join to,
    lowest first.

    Ties (two ways to make one token) go by the parts' own ids, as in transformers' converters.
    """
    found = []
    for token in results:
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in index and right in index]
        pairs.sort(key=lambda pair: (index[pair[0]], index[pair[1]]))
        found += [(order[token], pair) for pair in pairs]
    found.sort(key=lambda item: item[0])
    return [pair for _, pair in found]


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message: varints as int, fixed and length-delimited ones as bytes.

    Source: protobuf.dev/programming-guides/encoding. Raises ValueError or IndexError where the message is cut
    short.
    """
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = varint(data, at)
            yield key >> 3, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"wire type {kind} at byte {at} is not one of this format")
        size, at = varint(data, at) if kind == 2 else (8 if kind == 1 else 4, at)
        if at + size > len(data):
            raise ValueError(f"a field of {size} bytes at byte {at} runs past the end")
        yield key >> 3, data[at : at + size]
        at += size


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The variable-length integer at a position, and the position after it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"an integer at byte {at} is longer than 64 bits")


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What a sentencepiece model file says, field names as in sentencepiece_model.proto."""

    pieces: list[tuple[str, float, int]]  # (text, score, type), the id is the place
    trainer: Mapping[int, int | bytes]
    normalizer: Mapping[int, int | bytes]

    @classmethod
    def parse(cls, path: pathlib.Path, data: bytes) -> "Pieces":
        """TokenizerError where the file is cut short, damaged or has no pieces."""
        pieces, parts = [], {}
        try:
            for number, value in fields(data):
                if number == 1:
                    entry = dict(fields(value))
                    pieces.append(
                        (
                            entry[1].decode(),
                            struct.unpack("<f", entry.get(2, bytes(4)))[0],
                            entry.get(3, NORMAL),
                        )
                    )
                elif number in (2, 3):
                    parts[number] = dict(fields(value))
        except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
            raise TokenizerError(
                f"{path} is neither a sentencepiece model nor tiktoken ranks ({error}). It is truncated or "
                "damaged: fetch it again."
            ) from error
        if not pieces or set(parts) != {2, 3} or len({piece for piece, _, _ in pieces}) != len(pieces):
            raise TokenizerError(
                f"{path} should be a sentencepiece model with distinct pieces, a trainer and a normalizer, "
                f"but has {len(pieces)} pieces and the parts {sorted(parts)}. Fetch the file again."
            )
        return cls(pieces, parts[2], parts[3])

    def of_type(self, *types: int) -> list[str]:
        return [piece for piece, _, kind in self.pieces if kind in types]

    def names(self) -> dict[str, str]:
        """The special tokens the trainer names, where they are pieces."""
        known, special = {}, {*self.of_type(CONTROL, UNKNOWN)}
        defaults = {"unk_token": (45, b"<unk>"), "bos_token": (46, b"<s>"), "eos_token": (47, b"</s>")}
        for name, (number, default) in {**defaults, "pad_token": (48, b"<pad>")}.items():
            piece = self.trainer.get(number, default)
            if isinstance(piece, bytes) and piece.decode(errors="replace") in special:
                known[name] = piece.decode(errors="replace")
        return known


def read_sentencepiece(path: pathlib.Path, data: bytes, config: Mapping[str, Any]) -> Vocabulary:
    """A sentencepiece model (BPE or unigram) as transformers' fast Llama tokenizer has it.

    Special tokens in a text are matched, and with "legacy" (the default, and what sentencepiece does) every
    stretch of text between them gets the dummy space in front; with "legacy": false only the very beginning
    does.
    """
    return sentencepiece(Pieces.parse(path, data), path, config)


def sentencepiece(model: Pieces, path: pathlib.Path, config: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of pieces already read from `path`. TokenizerError where they cannot be used."""
    from tokenizers import AddedToken, Tokenizer

    if model.trainer.get(24, 0):
        raise TokenizerError(f"{path} treats white space as a suffix, which is not supported.")
    with refusing(f"{path} is no sentencepiece model that can be used", "Fetch the file again."):
        bpe = model.trainer.get(3, 1) == 2
        backend = Tokenizer(piece_bpe(model) if bpe else piece_unigram(model))
        add_spaces(backend, model, config)
        special = model.of_type(CONTROL, UNKNOWN)
        backend.add_tokens([AddedToken(token, normalized=False) for token in model.of_type(USER_DEFINED)])
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return Vocabulary(backend, model.names(), adds_bos=bpe and "bos_token" in model.names())


def piece_bpe(model: Pieces) -> Any:
    """The BPE model: two pieces join where the joining is a piece that text may become, highest score
    first.
    """
    from tokenizers import models

    vocab = {piece: index for index, (piece, _, _) in enumerate(model.pieces)}
    order = {piece: -score for piece, score, kind in model.pieces if kind in (NORMAL, USER_DEFINED, UNUSED)}
    unknown = model.of_type(UNKNOWN)
    return models.BPE(
        vocab=vocab,
        merges=joins(order, vocab, order),
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=bool(model.trainer.get(35, 0)),
    )


def piece_unigram(model: Pieces) -> Any:
    """The unigram language model (Kudo 2018): the pieces and their log probabilities."""
    from tokenizers import models

    if model.trainer.get(3, 1) != 1:
        raise ValueError(f"its model type is {model.trainer.get(3)}, supported are unigram (1) and BPE (2)")
    unknown = [index for index, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN]
    scores = [(piece, score) for piece, score, _ in model.pieces]
    return models.Unigram(scores, unknown[0] if unknown else None, bool(model.trainer.get(35, 0)))


def add_spaces(backend: Any, model: Pieces, config: Mapping[str, Any]) -> None:
    """Gives the backend its normalizer and decoder: white space becomes ▁ and back, as the normalizer part
    says.
    """
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    charsmap, prefix = model.normalizer.get(2, b""), bool(model.normalizer.get(3, 1))
    if isinstance(config.get("add_prefix_space"), bool):
        prefix = config["add_prefix_space"]
    steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    if model.normalizer.get(4, 1):
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if config.get("legacy") is False:
        scheme = "first" if prefix else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    else:
        steps += [normalizers.Prepend("▁")] if prefix else []
        steps += [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(steps)
    parts = [decoders.Replace("▁", " "), *([decoders.ByteFallback()] if model.trainer.get(35, 0) else [])]
    parts += [decoders.Fuse(), *([decoders.Strip(content=" ", left=1)] if prefix else [])]
    backend.decoder = decoders.Sequence(parts)
