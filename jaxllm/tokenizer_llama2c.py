"""The vocabulary that lies beside a llama2.c checkpoint: found by what it holds, because its name is anything.

Source of tokenizer.bin: github.com/karpathy/llama2.c, tokenizer.py (export). It is a sentencepiece BPE model of
which only texts and scores are left: the longest text (u32), then for each token its score (f32), length (u32)
and text.
"""

from __future__ import annotations

import pathlib
import struct

from jaxllm.errors import TokenizerError
from jaxllm.tokenizer import Tokenizer, load_tokenizer, with_vocabulary
from jaxllm.tokenizer_files import BYTE, CONTROL, NORMAL, UNKNOWN, Pieces, read_bytes, sentencepiece

LARGEST = 2**25  # bytes of a vocabulary file; larger ones hold weights
SPECIAL = {0: ("<unk>", UNKNOWN), 1: ("<s>", CONTROL), 2: ("</s>", CONTROL)}  # as run.c has it
FIRST_BYTE = 3
BPE = {3: 2, 35: 1}  # trainer: byte-pair encoding, with bytes for what has no token
PLAIN = {3: 1, 4: 0}  # normalizer: a space in front, spaces kept as they are


def load_beside(folder: pathlib.Path, tokens: int) -> Tokenizer | None:
    """The tokenizer of `tokens` tokens in the folder: its one sentencepiece file (*.model) of that many pieces,
    else its one llama2.c vocabulary (*.bin), else whatever files of Hugging Face lie there, else None.

    Two that fit and differ are not chosen between. Raises TokenizerError where Hugging Face's files are malformed.
    """
    for pattern, read in (("*.model", _sentencepiece), ("*.bin", _bin)):
        found = [m for path in sorted(folder.glob(pattern)) if (m := _of_size(path, read, tokens))]
        if found and all(m.pieces == found[0].pieces for m in found):
            return with_vocabulary(sentencepiece(found[0], folder, {}), folder, {})
        if found:
            return None
    tokenizer = load_tokenizer(folder)
    return tokenizer if tokenizer and tokenizer.vocab_size == tokens else None


def _of_size(path: pathlib.Path, read, tokens: int) -> Pieces | None:
    try:
        model = read(path, read_bytes(path)) if path.stat().st_size <= LARGEST else None
    except (OSError, TokenizerError):  # something else, whose name ends the same
        return None
    return model if model and len(model.pieces) == tokens else None


def _sentencepiece(path: pathlib.Path, data: bytes) -> Pieces:
    return Pieces.parse(path, data)


def _bin(path: pathlib.Path, data: bytes) -> Pieces:
    """The pieces in llama2.c's vocabulary file. TokenizerError where the file is anything else."""
    pieces, at = [], 4
    try:
        (longest,) = struct.unpack_from("<I", data)
        while at < len(data):
            score, size = struct.unpack_from("<fI", data, at)
            text = data[at + 8 : at + 8 + size]
            if size > longest or len(text) != size:
                raise ValueError(f"a token of {size} bytes where the longest has {longest}")
            pieces.append(_piece(len(pieces), text.decode("utf-8"), score))
            at += 8 + size
    except (struct.error, ValueError) as error:
        raise TokenizerError(f"{path} is not a vocabulary of llama2.c ({error}); export it again") from error
    if len({text for text, _, _ in pieces}) != len(pieces) or len(pieces) <= FIRST_BYTE + 256:
        raise TokenizerError(f"{path} should have three special tokens, 256 bytes, and tokens that all differ")
    return Pieces(pieces, BPE, PLAIN)


def _piece(i: int, text: str, score: float) -> tuple[str, float, int]:
    """(sentencepiece's text, score, type). Older files have a byte's token as that character itself."""
    if i in SPECIAL:
        return SPECIAL[i][0], score, SPECIAL[i][1]
    if i < FIRST_BYTE + 256:
        name = f"<0x{i - FIRST_BYTE:02X}>"
        if text not in (name, chr(i - FIRST_BYTE)):
            raise ValueError(f"token {i} should be {name}, and is {text!r}")
        return name, score, BYTE
    return text.replace(" ", "▁"), score, NORMAL
