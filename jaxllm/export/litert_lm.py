"""Programs and a bundle by the conventions of LiteRT-LM's engine (github.com/google-ai-edge/LiteRT-LM).

`prefill` takes tokens [1, T], their positions input_pos [T], zeros behind the last, and kv_cache_{k,v}_I
[1, K, S, h], and gives the caches; `decode` takes one token and gives its logits [1, 1, V], too. How many tokens
there are and what each slot holds follow from the first position, so that both are the one forward of `program`.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.config import Attention, ModelConfig
from jaxllm.errors import CheckpointError
from jaxllm.export.options import Options
from jaxllm.export.program import Named, Port, Program, programs
from jaxllm.model import Model

FILE = "model.litertlm"
POSITIONS = "position of each token, one after the other; 0 behind the last"

# The engine hands a message's content to templates as a list of parts, and puts the first token before all itself.
TEXTS = """\
{%- set texts = namespace(found=[]) -%}
{%- for message in messages -%}
{%- if message.content is string -%}
{%- set texts.found = texts.found + [message] -%}
{%- else -%}
{%- set said = namespace(text="") -%}
{%- for part in message.content -%}{%- set said.text = said.text + part.text -%}{%- endfor -%}
{%- set texts.found = texts.found + [{"role": message.role, "content": said.text}] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = texts.found -%}
"""


def refuses(config: ModelConfig, options: Options) -> str | None:
    """What the engine has no convention for."""
    if not all(isinstance(block.mixer, Attention) for block in config.blocks):
        return "LiteRT-LM keeps keys and values of attention, and no other state; the platform tflite does"
    if options.batch != 1:
        return "LiteRT-LM runs one row; leave --batch out"
    if options.window:
        return "LiteRT-LM has no eviction; leave --window out"
    return None


def conventional(config: ModelConfig, leaves: Mapping[str, Any], options: Options) -> tuple[Program, Program]:
    """`program.programs` with the engine's inputs and outputs.

    No cache is a ring: every one has a slot for each position, so that a slot's number is its position."""
    ours = programs(config, leaves, replace(options, chunk=options.context))[1]
    return _program("prefill", ours, options.chunk), _program("decode", ours, 1)


def _program(name: str, ours: Program, T: int) -> Program:
    caches = {_theirs(k): x for k, x in ours.specs[1].items() if k.endswith((".k", ".v"))}

    def call(params: Named, state: Named, inputs: Named) -> tuple[Named, Named]:
        start = inputs["input_pos"][:1]
        n_new = (inputs["input_pos"] == start + jnp.arange(T, dtype=jnp.int32)).sum(dtype=jnp.int32)[None]
        full = {
            k: state[_theirs(k)] if _theirs(k) in state else _held(k, x, start) for k, x in ours.specs[1].items()
        }
        results, new = ours.call(params, full, {"tokens": inputs["tokens"], "n_new": n_new})
        logits = {} if name == "prefill" else {"logits": results["logits"][:, None]}
        return logits, {_theirs(k): x for k, x in new.items() if _theirs(k) in state}

    ids = jax.ShapeDtypeStruct((1, T), jnp.int32), jax.ShapeDtypeStruct((T,), jnp.int32)
    specs = (ours.specs[0], caches, {"tokens": ids[0], "input_pos": ids[1]})
    return Program(name, call, specs, *_ports(name, ours, caches, T))


def _theirs(name: str) -> str:
    """kv_cache_k_3 of layers.3.k; other names as they are."""
    parts = name.split(".")
    return f"kv_cache_{parts[2]}_{parts[1]}" if parts[-1] in ("k", "v") else name


def _held(name: str, x, length: jax.Array) -> jax.Array:
    """The length of the row, or what its slots hold when they are filled in order."""
    if not name.endswith(".pos"):
        return length
    slot = jnp.arange(x.shape[1], dtype=jnp.int32)
    return jnp.where(slot < length, slot, -1)[None]


def _ports(name: str, ours: Program, caches: Named, T: int) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    kept = {_theirs(port.name): port for port in ours.inputs if port.role == "state"}
    state = [replace(kept[cache], name=cache) for cache in sorted(caches)]
    tokens = next(port for port in ours.inputs if port.name == "tokens")
    positions = Port("input_pos", "input", (T,), "int32", "T", POSITIONS)
    given = [positions, replace(tokens, shape=(1, T))]
    logits = next(port for port in ours.outputs if port.name == "logits")
    wide = replace(logits, shape=(1, 1, logits.shape[1]), layout="B T V", meaning="of the token after this one")
    outputs = [replace(port, initial=None, donated=None) for port in state]
    return (*state, *given), ((wide,) if name == "decode" else ()) + tuple(outputs)


# ---- the bundle ---------------------------------------------------------------------------------------------


def bundle(model: Model, tflite: pathlib.Path, folder: pathlib.Path, options: Options) -> None:
    """model.litertlm of a .tflite, the folder's tokenizer.json and the model's template."""
    import litert_lm_builder as lm

    builder = lm.LitertLmFileBuilder()
    builder.add_system_metadata(lm.Metadata(key="Authors", value="jaxllm", dtype=lm.DType.STRING))
    with tempfile.TemporaryDirectory() as between:
        described = pathlib.Path(between, "llm_metadata.pb")
        described.write_bytes(metadata(model, options).SerializeToString())
        builder.add_llm_metadata(str(described))
        builder.add_hf_tokenizer(str(folder / "tokenizer.json"))
        builder.add_tflite_model(str(tflite), lm.TfLiteModelType.PREFILL_DECODE, backend_constraint="cpu")
        with (folder / FILE).open("wb") as file:
            builder.build(file)


def metadata(model: Model, options: Options) -> Any:
    """LlmMetadata: tokens that begin and end, the template, how to draw, and how many tokens there is room for."""
    from litert_lm_builder.runtime.proto import llm_metadata_pb2, sampler_params_pb2

    made = llm_metadata_pb2.LlmMetadata()
    tokenizer = model.tokenizer
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if template is not None:
        made.jinja_prompt_template = TEXTS + template
    first = tokenizer.bos_id
    written = first is not None and tokenizer.token(first) in (template or "")
    if first is not None and not written and tokenizer.encode("a")[:1] == [first]:
        made.start_token.token_ids.ids.append(first)
    for token in sorted(model.eos_ids):
        made.stop_tokens.add().token_ids.ids.append(token)
    made.max_num_tokens = options.context
    drawn = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | dict(model.defaults)
    greedy = not drawn["temperature"]
    made.sampler_params.type = sampler_params_pb2.SamplerParameters.TOP_P  # GREEDY is not implemented on CPU
    made.sampler_params.k = 1 if greedy else drawn["top_k"] or model.config.vocab
    made.sampler_params.p, made.sampler_params.temperature = drawn["top_p"], drawn["temperature"] or 1.0
    made.llm_model_type.generic_model.SetInParent()
    made.supports_thinking = made.supports_function_calling = False
    return made


def section(path: pathlib.Path) -> bytes:
    """The .tflite inside a bundle. Raises CheckpointError where there is none."""
    import io

    from litert_lm_builder import litertlm_header_schema_py_generated as schema
    from litert_lm_builder import litertlm_peek

    try:
        described = litertlm_peek.read_litertlm_header(str(path), io.StringIO()).SectionMetadata()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no bundle of LiteRT-LM ({error}); export it again") from error
    parts = [described.Objects(i) for i in range(described.ObjectsLength())]
    found = [part for part in parts if part.DataType() == schema.AnySectionDataType.TFLiteModel]
    if len(found) != 1:
        raise CheckpointError(f"{path} holds {len(found)} models instead of one; export it again")
    with path.open("rb") as file:
        file.seek(found[0].BeginOffset())
        return file.read(found[0].EndOffset() - found[0].BeginOffset())


def speak(path: pathlib.Path, prompt: str, tokens: int) -> str:
    """What the engine says behind a prompt as it is, greedily."""
    import litert_lm

    litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
    greedy = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0)
    with litert_lm.Engine(str(path), cache_dir=":nocache") as engine:
        asked = dict(apply_prompt_template=False, sampler_config=greedy, max_output_tokens=tokens)
        with engine.create_session(**asked) as session:
            session.run_prefill([prompt])
            return session.run_decode().texts[0]
