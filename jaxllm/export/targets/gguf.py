"""A GGUF file, for llama.cpp and what is built on it; run here by llama-cpp-python."""

from __future__ import annotations

import ctypes
import functools
import pathlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np

from jaxllm.checkpoint import gguf_writer
from jaxllm.checkpoint.canonical import flatten
from jaxllm.config import ModelConfig
from jaxllm.errors import CheckpointError
from jaxllm.export import gguf_tokens
from jaxllm.export.options import Options
from jaxllm.export.program import without_arrays
from jaxllm.export.target import ALLOWED, PACKED, Built, Formats, Job, Target, Values

FILE = "model.gguf"
TABLE = 1e-3  # of the largest logit: llama.cpp tabulates gelu in float16


def refuses(config: ModelConfig, values: Values, formats: Formats, options: Options) -> str | None:
    """What llama.cpp has no such thing of."""
    if options.window:
        return "llama.cpp decides by itself what to evict; leave --window out"
    if options.sampler != "logits":
        return "llama.cpp draws tokens itself; leave --sampler out"
    return gguf_writer.refuses(config, values, formats)


def allowed(config: ModelConfig, formats: Formats) -> float:
    """By what llama.cpp rounds: activations to 8 bits beside packed weights, whatever they are here."""
    looked_up = any("gelu" in b.ffn.act for b in config.blocks if b.ffn)
    return PACKED if formats else max(ALLOWED[config.dtype], TABLE * looked_up)


def build(job: Job) -> Built:
    """model.gguf: config, tokenizer and parameters."""
    import llama_cpp

    model = job.model
    more = {"general.name": model.name or "model"} | gguf_tokens.metadata_of(model.tokenizer, model.config.vocab)
    gguf_writer.write_gguf(job.folder / FILE, model.config, model.values, flatten(model.params), more)
    programs = tuple(map(without_arrays, job.programs))
    files = {program.name: {"gguf": FILE} for program in programs}
    versions = {"gguf": version("gguf"), "llama-cpp-python": llama_cpp.__version__}
    return Built(programs, files, (FILE,), versions)


class Runner:
    """llama.cpp on this machine's CPU, its cache in float32, a sequence for each row."""

    def __init__(self, folder: pathlib.Path, manifest: Mapping[str, Any]):
        import llama_cpp

        self._lib, self._rows = llama_cpp, manifest["batch"]
        llama_cpp.llama_log_set(_silent(), ctypes.c_void_p())
        self._model = _made(llama_cpp.llama_model_load_from_file(*self._file(folder)), "load the file")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        size = manifest["chunk"] * manifest["batch"]
        self._context = _made(
            llama_cpp.llama_init_from_model(self._model, self._sizes(manifest)), "make a context"
        )
        self._batch = llama_cpp.llama_batch_init(size, 0, 1)
        self.how = "executed"
        self.where = f"llama.cpp on cpu, llama-cpp-python {llama_cpp.__version__}"

    def _file(self, folder: pathlib.Path) -> tuple[bytes, Any]:
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0
        return str(folder / FILE).encode(), params

    def _sizes(self, manifest: Mapping[str, Any]) -> Any:
        params = self._lib.llama_context_default_params()
        params.n_ctx = manifest["context"] * self._rows
        params.n_batch = params.n_ubatch = manifest["chunk"] * self._rows
        params.n_seq_max = self._rows
        params.type_k = params.type_v = 0  # f32
        params.flash_attn_type = 0
        return params

    def start(self) -> list[int]:
        """How many tokens each row has; the cache is the context's."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        return [0] * self._rows

    def step(
        self, program: str, state: list[int], inputs: dict[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], list[int]]:
        """See `jaxllm.export.target.Runner`."""
        last = self._fill(state, inputs["tokens"], inputs["n_new"])
        if self._lib.llama_decode(self._context, self._batch):
            raise CheckpointError("llama.cpp could not decode; its context may be too small")
        logits = np.zeros((self._rows, self._vocab), np.float32)
        for row, i in last.items():
            logits[row] = np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, i), (self._vocab,))
        return {"logits": logits}, [n + int(new) for n, new in zip(state, inputs["n_new"], strict=True)]

    def _fill(self, state: list[int], tokens: np.ndarray, n_new: np.ndarray) -> dict[int, int]:
        """Put every row's new tokens into the batch -> the place of each row's newest."""
        batch, i, last = self._batch, 0, {}
        for row, count in enumerate(n_new):
            for t in range(count):
                batch.token[i], batch.pos[i] = int(tokens[row, t]), state[row] + t
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
                batch.logits[i] = int(t == count - 1)
                i += 1
            if count:
                last[row] = i - 1
        batch.n_tokens = i
        return last


@functools.cache
def _silent() -> Any:
    """A log that says nothing; kept, because llama.cpp goes on calling it."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


def _made(pointer: Any, what: str) -> Any:
    if not pointer:
        raise CheckpointError(f"llama.cpp cannot {what}; run it with its own log for the reason")
    return pointer


TARGET = Target(
    name="gguf",
    summary="one file for llama.cpp and what is built on it",
    platforms=(),
    needs=("gguf", "llama_cpp"),
    extra="export-gguf",
    refuses=refuses,
    build=build,
    run=Runner,
    allowed=allowed,
)
