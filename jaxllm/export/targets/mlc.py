"""A folder for MLC-LLM's runtime, which compiles its own programs; read here again and run by jaxllm."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from jaxllm.checkpoint import mlc
from jaxllm.checkpoint.mlc_files import TEMPLATE, chat_sizes
from jaxllm.checkpoint.mlc_names import ARCHITECTURES
from jaxllm.checkpoint.mlc_writer import SCHEMES, write_mlc
from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.export.live import Live
from jaxllm.export.manifest import formats_of
from jaxllm.export.mlc_conversation import conversation
from jaxllm.export.options import SIZES, Options
from jaxllm.export.program import without_arrays
from jaxllm.export.target import Built, Formats, Job, Target, Values
from jaxllm.model import Model, load

FOLDER = "model"  # what MLC-LLM is given
INDEX = f"{FOLDER}/tensor-cache.json"


def refuses(config: ModelConfig, values: Values, formats: Formats, options: Options) -> str | None:
    """An architecture, a format or an option that MLC-LLM has no such thing of."""
    if options.window:
        return "which models may have another window MLC-LLM decides when it compiles; leave --window out"
    if options.sampler != "logits":
        return "MLC-LLM draws tokens itself; leave --sampler out"
    kind = values.get("model_type")
    if kind not in ARCHITECTURES or ARCHITECTURES[kind].fused is None:
        known = ", ".join(name for name, a in ARCHITECTURES.items() if a.fused is not None)
        return f"MLC-LLM's files are written for the model types {known}, not for {str(kind)[:60]!r}"
    odd = sorted({f.name for f in formats.values()} - set(mlc.GROUP))
    return f"its weights are {odd[0]}, and MLC-LLM's are {', '.join(SCHEMES)}" if odd else None


def build(job: Job) -> Built:
    """Shards, index and mlc-chat-config.json with the sizes asked for and the conversation of the chat template.

    Raises ConfigError for a Model."""
    if job.source is None:
        raise ConfigError("the target mlc converts a checkpoint's own tensors; give its path instead of a Model")
    made = write_mlc(job.source, job.folder / FOLDER, scheme(job.model))
    chat_sizes(made, context=job.options.context, chunk=job.options.chunk)
    shards = sorted(f"{FOLDER}/{path.name}" for path in made.glob("params_shard_*.bin"))
    pair = tuple(map(without_arrays, job.programs))
    limits = {"conversation": _converse(job.model, made / "mlc-chat-config.json")}
    return Built(pair, {p.name: {"mlc": INDEX} for p in pair}, tuple(shards), {}, limits)


def _converse(model: Model, path: pathlib.Path) -> str:
    """Write what MLC-LLM puts around messages -> how far that is the chat template."""
    chat = json.loads(path.read_text(encoding="utf-8"))
    own = chat.get("conv_template")
    if not isinstance(own, dict) or own.get("name") != TEMPLATE["name"]:
        return "as the source has it"
    if model.tokenizer is None or model.tokenizer.chat_template is None:
        return "LM: text as it is; there is no chat template"
    if (found := conversation(model.tokenizer, model.eos_ids)) is None:
        return "LM: text as it is; MLC-LLM's form, fixed texts around messages, does not make the chat template's"
    chat["conv_template"], said = found
    path.write_text(json.dumps(chat, indent=2, ensure_ascii=False), encoding="utf-8")
    return f"{found[0]['name']}: the ids of the chat template, {said}"


def scheme(model: Model) -> str:
    """MLC-LLM's name for how the weights are kept."""
    packed = {f.name for f in formats_of(model).values()}
    plain = {"float32": "q0f32", "float16": "q0f16", "bfloat16": "q0bf16"}
    return packed.pop() if packed else plain[model.config.dtype]


class Runner(Live):
    """The folder as `jaxllm.load` reads it."""

    how = "simulated"  # MLC-LLM itself would compile a library first

    def __init__(self, folder: pathlib.Path, manifest: Mapping[str, Any]):
        model = load(folder / FOLDER, dtype=manifest["model"]["config"]["dtype"])
        super().__init__(model, Options(**{name: manifest[name] for name in SIZES}))
        self.where = f"jaxllm's reader of MLC-LLM's files, jax {jax.__version__}"


TARGET = Target(
    name="mlc",
    summary="weights, config and tokenizer for MLC-LLM, which compiles them for its devices",
    platforms=(),
    needs=(),
    extra=None,
    refuses=refuses,
    build=build,
    run=Runner,
)
