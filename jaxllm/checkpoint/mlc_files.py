"""The files of an MLC-LLM weight folder being written: shards, index files, config, tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.errors import CheckpointError
from jaxllm.files import read_object

CAP = 32 * 2**20  # bytes of a shard
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
)
# Text goes in and comes out as it is; MLC-LLM's name for that.
TEMPLATE = {
    "name": "LM",
    "system_template": "{system_message}",
    "system_message": "",
    "system_prefix_token_ids": None,
    "add_role_after_system_message": True,
    "roles": {"user": "", "assistant": ""},
    "role_templates": {"user": "{user_message}", "assistant": "{assistant_message}", "tool": "{tool_message}"},
    "messages": [],
    "seps": [""],
    "role_content_sep": "",
    "role_empty_sep": "",
    "stop_str": [],
    "stop_token_ids": [],
    "function_string": "",
    "use_function_calling": False,
}
USUAL = dict(temperature=1.0, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0, top_p=1.0)


@contextlib.contextmanager
def in_place(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder beside `out` whose files move there at the end; where that is not reached, nothing is left."""
    part = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        out.mkdir(exist_ok=True)
        for file in sorted(part.iterdir(), key=lambda f: "-cache" in f.name):  # the index last
            file.replace(out / file.name)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written ({error}); give a folder that can") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


class Written:
    """Shards on their way to a folder; a tensor goes out as soon as its shard is full."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.shards: list[dict[str, Any]] = []
        self.records: list[dict[str, Any]] = []  # of the shard being filled
        self.pending: list[bytes] = []
        self.size = 0
        self.count, self.nbytes, self.values = 0, 0.0, 0

    def add(self, name: str, x: np.ndarray) -> None:
        """Append a tensor; float32 is stored as bfloat16."""
        data = x.astype(ml_dtypes.bfloat16) if x.dtype == np.float32 else x
        data = np.ascontiguousarray(data).tobytes()
        record = dict(name=name, shape=list(x.shape), dtype=x.dtype.name, format="f32-to-bf16", nbytes=len(data))
        self.count, self.nbytes, self.values = self.count + 1, self.nbytes + x.nbytes, self.values + x.size
        if self.size + len(data) >= CAP:
            if 2 * len(data) >= CAP:
                self._commit([record | {"byteOffset": 0}], [data])
                return
            self._flush()
        self.records.append(record | {"byteOffset": self.size})
        self.pending.append(data)
        self.size += len(data)

    def _flush(self) -> None:
        records, pending = self.records, self.pending
        self.records, self.pending, self.size = [], [], 0
        self._commit(records, pending)

    def _commit(self, records: list[dict[str, Any]], data: list[bytes]) -> None:
        name, md5 = f"params_shard_{len(self.shards)}.bin", hashlib.md5(usedforsecurity=False)
        with (self.folder / name).open("wb") as file:
            for piece in data:
                file.write(piece)
                md5.update(piece)
        shard = dict(dataPath=name, format="raw-shard", nbytes=sum(map(len, data)), records=records)
        self.shards.append(shard | {"md5sum": md5.hexdigest()})

    def close(self, parameters: int) -> None:
        """The last shard and the index files; `parameters` is what the bits per parameter are told of."""
        if self.records:
            self._flush()
        bits = self.nbytes * 8.0 / max(1, parameters)
        metadata = {"ParamSize": self.count, "ParamBytes": self.nbytes, "BitsPerParam": bits}
        self._index("tensor-cache.json", metadata, self.shards)
        narrow = [s | {"records": [_narrow(r) for r in s["records"]]} for s in self.shards]
        if narrow != self.shards:
            self._index("tensor-cache-b16.json", metadata, narrow)

    def _index(self, name: str, metadata: dict, shards: list[dict]) -> None:
        text = json.dumps({"metadata": metadata, "records": shards}, indent=4)
        (self.folder / name).write_text(text, encoding="utf-8")


def _narrow(record: dict[str, Any]) -> dict[str, Any]:
    """A record as the "-b16" index has it."""
    return record | {"dtype": "bfloat16", "format": "raw"} if record["dtype"] == "float32" else record


def tokenizer_files(source: pathlib.Path, out: pathlib.Path) -> None:
    """Copy the tokenizer's files that MLC-LLM knows."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def chat_config(
    source: pathlib.Path, out: pathlib.Path, model_type: str, values: dict[str, Any], quantization: str
) -> None:
    """mlc-chat-config.json: that of `source` with its quantization changed, or one made from the config `values`.

    Raises CheckpointError where the source's is no JSON object."""
    chat = _read(source / "mlc-chat-config.json")
    chat = chat | {"quantization": quantization} if chat else _chat(source, out, model_type, values, quantization)
    text = json.dumps(chat, indent=2)
    (out / "mlc-chat-config.json").write_text(text, encoding="utf-8")


def chat_sizes(folder: pathlib.Path, *, context: int, chunk: int) -> None:
    """Set the sizes in tokens that mlc-chat-config.json recommends."""
    path = folder / "mlc-chat-config.json"
    chat, sizes = _read(path), dict(context_window_size=context, prefill_chunk_size=chunk)
    chat |= sizes | {"model_config": chat["model_config"] | sizes}
    path.write_text(json.dumps(chat, indent=2), encoding="utf-8")


def _chat(
    source: pathlib.Path, out: pathlib.Path, model_type: str, values: dict, quantization: str
) -> dict[str, Any]:
    given = values | _read(source / "generation_config.json")
    eos = given.get("eos_token_id")
    stops = eos if isinstance(eos, list) else [] if eos is None else [eos]
    lengths = [values[k] for k in ("max_position_embeddings", "n_positions", "seq_length") if values.get(k)]
    longest = lengths[0] if lengths else 2048
    sizes = dict(context_window_size=longest, prefill_chunk_size=min(longest, 8192), tensor_parallel_shards=1)
    model = {k: v for k, v in values.items() if k not in ("architectures", "torch_dtype", "dtype", "auto_map")}
    vocab = values.get("vocab_size") or values.get("padded_vocab_size")
    tokenizer = _read(out / "tokenizer.json")
    return {
        "version": "0.1.0",
        "model_type": model_type,
        "quantization": quantization,
        "model_config": model | sizes | {"max_batch_size": 128},
        "vocab_size": vocab,
        "context_window_size": longest,
        "sliding_window_size": -1,
        "prefill_chunk_size": sizes["prefill_chunk_size"],
        "attention_sink_size": -1,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "active_vocab_size": _active(tokenizer, vocab),
        **{k: given[k] if _is_number(given.get(k)) else usual for k, usual in USUAL.items()},
        "tokenizer_files": [name for name in TOKENIZER_FILES if (out / name).is_file()],
        "tokenizer_info": _info(tokenizer),
        "conv_template": TEMPLATE | {"stop_token_ids": stops},
        **{f"{k}_token_id": given[f"{k}_token_id"] for k in ("pad", "bos", "eos") if f"{k}_token_id" in given},
    }


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _read(path: pathlib.Path) -> dict[str, Any]:
    return read_object(path, CheckpointError, "get it again") if path.is_file() else {}


def _active(tokenizer: dict[str, Any], vocab: Any) -> Any:
    """How many ids the tokenizer has, or all where it does not tell."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    words = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(words, dict):
        return vocab
    more = {t.get("content") for t in added if isinstance(t, dict)} if isinstance(added, list) else set()
    return len(words.keys() | more)


def _info(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """What MLC-LLM asks of a tokenizer.json: how its tokens become text."""
    decoder, normalizer = _steps(tokenizer, "decoder"), _steps(tokenizer, "normalizer")
    level = any(step.get("type") == "ByteLevel" for step in decoder)
    return {
        "token_postproc_method": "byte_level" if level else "byte_fallback",
        "prepend_space_in_encode": any(step.get("type") == "Prepend" for step in normalizer),
        "strip_space_in_decode": any(step.get("type") == "Strip" for step in decoder),
    }


def _steps(tokenizer: dict[str, Any], name: str) -> list[dict[str, Any]]:
    part = tokenizer.get(name)
    part = part if isinstance(part, dict) else {}
    steps = part.get(f"{name}s") if part.get("type") == "Sequence" else [part]
    return [s for s in steps if isinstance(s, dict)] if isinstance(steps, list) else []
