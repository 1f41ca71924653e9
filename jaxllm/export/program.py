"""The two programs of an export, prefill and decode: functions of named arrays, and what each array is.

A program takes three dicts, parameters, state and inputs, and gives two, results and state. Flattened they are in
the order of the dicts' sorted names, which is that of `Program.inputs` and `Program.outputs`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jaxllm import layers, ops, sampling
from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.export.options import SYMBOLS, Options
from jaxllm.export.parameters import Leaf, assembled, named
from jaxllm.quant import QTensor
from jaxllm.state import State

Array = jax.Array
Named = dict[str, Array]

PARTS = {  # of a packed weight
    "codes": "codes of {format}, fields of {bits} bits from the lowest of each byte on",
    "scale": "scales of {format}",
    "high": "the codes' higher bits",
    "zero": "the code that stands for zero",
    "offset": "added after scaling",
    "super_scale": "scales of the scales",
    "super_offset": "scales of the offsets",
    "order": "column c of the codes is column order[c] of the weight",
    "input_scale": "what activations are divided by before they are rounded",
}
STATE = {  # last part of the name -> (layout, meaning)
    "k": ("B K S h", "keys of each kv head and slot"),
    "v": ("B K S h", "values of each kv head and slot"),
    "c": ("B 1 S r", "latent and rotary key of each slot"),
    "pos": ("B S", "position that each slot holds; -1 where it is empty"),
    "conv": ("B t C", "the convolution's last inputs"),
    "memory": ("B ...", "the recurrent layer's memory"),
    "length": ("B", "tokens that each row has seen"),
    "prompt": ("B V", "whether prefill was given the token, for the sampler's penalties"),
    "counts": ("B V", "how often decode was given the token"),
}
INPUTS = {  # name -> (dtype, layout, meaning)
    "tokens": ("int32", "B T", "the next tokens of each row; padding on the right"),
    "n_new": ("int32", "B", "how many of a row's tokens are real, 0 to T"),
}
SAMPLING = {
    "temperature": ("float32", "B", "0 takes the most probable token"),
    "top_k": ("int32", "B", "keep the k most probable tokens; 0 keeps all"),
    "top_p": ("float32", "B", "keep the fewest tokens of this probability together; 1 keeps all"),
    "min_p": ("float32", "B", "keep tokens this many times as probable as the best; 0 keeps all"),
    "seed": ("uint32", "B", "of the row's draws"),
    "step": ("int32", "B", "tokens drawn for the row before this one"),
}
PENALTIES = {
    "repetition_penalty": (
        "float32",
        "B",
        "divides positive logits of tokens of prompt and answer, multiplies others; 1: off",
    ),
    "frequency_penalty": ("float32", "B", "is subtracted as often as a token was drawn; 0: off"),
    "presence_penalty": ("float32", "B", "is subtracted from tokens that were drawn at all; 0: off"),
}
NEUTRAL = {"top_p": 1, "repetition_penalty": 1}  # what does nothing; 0 of all others
RESULTS = {
    "logits": ("B V", "of the token after each row's newest; what a row without new tokens has is no result"),
    "token": ("B", "the token drawn after each row's newest; -1 where none can follow"),
    "logprob": ("B", "its log-probability by the model's own distribution"),
}


@dataclass(frozen=True)
class Port:
    """One array that goes into a program or comes out."""

    name: str
    role: str  # "parameter", "state", "input" or "result"
    shape: tuple[int | str, ...]  # a symbolic size is its letter
    dtype: str
    layout: str  # what the axes are: B rows, T tokens, S slots, K kv heads, h head dim, V vocabulary, ...
    meaning: str
    initial: int | None = None  # what fills an empty state
    donated: bool | None = None  # the program may use its memory for the output of the same name

    def as_json(self) -> dict[str, Any]:
        """What the manifest has of it: fields that say nothing are left out."""
        return {k: list(v) if k == "shape" else v for k, v in asdict(self).items() if v is not None}


@dataclass(frozen=True)
class Program:
    """A function (parameters, state, inputs) -> (results, state) of dicts of arrays; what it takes and gives."""

    name: str
    call: Callable[[Named, Named, Named], tuple[Named, Named]]
    specs: tuple[Named, Named, Named]  # abstract arguments of `call`
    inputs: tuple[Port, ...]  # every array of the arguments, in flat order
    outputs: tuple[Port, ...]


def programs(config: ModelConfig, leaves: Mapping[str, Leaf], options: Options) -> tuple[Program, Program]:
    """(prefill, decode) of a model whose parameters are `leaves`, as `parameters.abstract` gives them.

    options: as `settled` gives them. Nothing is traced for a device yet but the shapes of results. Raises
    ConfigError for a model that asks how large a symbolic size is."""
    state = options.state(config)
    initial = {name: _filled(name, x) for name, x in (_named_state(state) | _said(config, options)).items()}
    like = jax.eval_shape(lambda: state)
    try:
        return tuple(
            _program(name, config, leaves, like, options, initial, sizes)
            for name, sizes in _sizes(options).items()
        )
    except jax.errors.InconclusiveDimensionOperation as error:
        raise ConfigError(
            f"this model cannot leave its {' and '.join(options.symbolic)} open ({str(error).splitlines()[0]}); "
            "export it with sizes that are said"
        ) from error


def _sizes(options: Options) -> dict[str, dict[str, Any]]:
    """Program -> letter -> size, a number or a symbol. A program's symbols are those of its arguments alone."""
    fixed = {"prefill": {"B": options.batch, "T": options.chunk}, "decode": {"B": options.batch, "T": 1}}
    return {name: sizes | _symbols(name, options) for name, sizes in fixed.items()}


def _symbols(program: str, options: Options) -> dict[str, Any]:
    letters = [SYMBOLS[name] for name in options.symbolic if (program, name) != ("decode", "length")]
    bounds = [
        f"{letter} <= {limits['maximum']}" for letter, limits in symbols(options).items() if "maximum" in limits
    ]
    scope = export.SymbolicScope([bound for bound in bounds if bound[0] in letters])
    return {letter: export.symbolic_shape(letter, scope=scope)[0] for letter in letters}


def symbols(options: Options) -> dict[str, dict[str, int]]:
    """Letter -> what its size may be, of those that are said when a program is called."""
    limits = {"B": {"minimum": 1}, "T": {"minimum": 1, "maximum": options.chunk}}
    return {letter: limits[letter] for name, letter in SYMBOLS.items() if name in options.symbolic}


def _filled(name: str, x: Array) -> int:
    values = np.unique(np.asarray(x))
    assert values.size == 1, f"{name} of an empty state is not of one value"
    return int(values[0])


def _program(name: str, config, leaves, like: State, options: Options, initial: dict[str, int], sizes) -> Program:
    in_graph = options.sampler == "in-graph"

    def call(params: Named, state: Named, inputs: Named) -> tuple[Named, Named]:
        tree = assembled(leaves, params)
        x, new, _ = layers.hidden(config, tree, inputs["tokens"], _with(like, state), n_new=inputs["n_new"])
        newest = jnp.take_along_axis(x, jnp.maximum(inputs["n_new"] - 1, 0)[:, None, None], 1)[:, 0]
        logits = layers.logits(config, tree, newest)
        said = _more_said(name, state, inputs) if options.penalties else {}
        return drawn(logits, inputs, said) if in_graph else {"logits": logits}, _named_state(new) | said

    table = INPUTS | sampling_inputs(options)
    shaped = {
        k: jax.ShapeDtypeStruct([sizes[axis] for axis in layout.split()], dtype)
        for k, (dtype, layout, _) in table.items()
    }
    specs = (named(leaves), _rows(_named_state(like) | _said(config, options), sizes["B"]), shaped)
    with ops.portable():  # no kernel is asked whether it takes a symbolic size
        results, _ = jax.eval_shape(call, *specs)
    state_ports = [_state_port(k, x, initial[k]) for k, x in _flat(specs[1])]
    inputs = [_parameter(k, x, leaves) for k, x in _flat(specs[0])] + state_ports
    inputs += [_port(k, x, "input", *table[k][1:]) for k, x in _flat(shaped)]
    outputs = [_port(k, x, "result", *RESULTS[k]) for k, x in _flat(results)] + [
        _port(p.name, specs[1][p.name], "state", p.layout, p.meaning) for p in state_ports
    ]
    return Program(name, call, specs, tuple(inputs), tuple(outputs))


def _rows(state: Named, B: Any) -> Named:
    """Abstract arrays of a state, each of B rows."""
    return {name: jax.ShapeDtypeStruct((B, *x.shape[1:]), x.dtype) for name, x in state.items()}


def sampling_inputs(options: Options) -> dict[str, tuple[str, str, str]]:
    """Inputs of a sampler inside the programs: name -> (dtype, layout, meaning)."""
    if options.sampler != "in-graph":
        return {}
    return SAMPLING | PENALTIES if options.penalties else SAMPLING


def _said(config: ModelConfig, options: Options) -> Named:
    """What a sampler's penalties remember, of rows that have seen nothing."""
    if not options.penalties:
        return {}
    shape = (options.batch, config.vocab)
    return {"sampler.prompt": np.zeros(shape, bool), "sampler.counts": np.zeros(shape, np.int32)}


def _more_said(program: str, state: Named, inputs: Named) -> Named:
    """`_said` with a program's tokens: prefill's belong to the prompt, and decode's were drawn."""
    tokens, vocab = inputs["tokens"], state["sampler.counts"].shape[1]
    real = (jnp.arange(tokens.shape[1]) < inputs["n_new"][:, None]) & (tokens >= 0)
    at = jnp.arange(tokens.shape[0])[:, None], jnp.where(real, tokens, vocab)
    prompt, counts = state["sampler.prompt"], state["sampler.counts"]
    if program == "prefill":
        return {"sampler.prompt": prompt.at[at].set(True, mode="drop"), "sampler.counts": counts}
    return {"sampler.prompt": prompt, "sampler.counts": counts.at[at].add(1, mode="drop")}


def drawn(logits: Array, inputs: Named, said: Named) -> Named:
    """{"token" i32 [B], "logprob" f32 [B]} of logits [B, V]: the draws of `jaxllm.decode.generate` with the key of
    the same seed, for inputs as in SAMPLING; and PENALTIES, where the state has what was said."""
    fold = jax.vmap(jax.random.fold_in)
    keys = fold(jax.vmap(jax.random.key)(inputs["seed"]), inputs["step"])
    context = sampling.Context(said["sampler.prompt"], said["sampler.counts"], None) if said else None
    penalties = (
        ("repetition_penalty", sampling.RepetitionPenalty),
        ("frequency_penalty", sampling.FrequencyPenalty),
        ("presence_penalty", sampling.PresencePenalty),
    )
    steps = (
        *(step(inputs[name]) for name, step in penalties if said),
        sampling.Temperature(inputs["temperature"]),
        sampling.TopK(inputs["top_k"]),
        sampling.TopP(inputs["top_p"]),
        sampling.MinP(inputs["min_p"]),
    )
    token, _ = sampling.sample(sampling.Sampler(steps), logits, keys, context)
    own = jax.nn.log_softmax(logits, -1)
    return {"token": token, "logprob": jnp.take_along_axis(own, jnp.maximum(token, 0)[:, None], 1)[:, 0]}


def without_arrays(program: Program) -> Program:
    """What goes in and comes out where a runtime keeps parameters and state inside."""
    inputs = tuple(port for port in program.inputs if port.role == "input")
    return replace(program, inputs=inputs, outputs=tuple(p for p in program.outputs if p.role == "result"))


# ---- names ----------------------------------------------------------------------------------------------


def _named_state(state: State) -> Named:
    """Name -> array of a state: "layers.0.k", "length"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {_dotted(path): leaf for path, leaf in leaves}


def _with(like: State, arrays: Named) -> State:
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(structure, [arrays[_dotted(path)] for path, _ in leaves])


def _dotted(path: tuple) -> str:
    return ".".join(str(getattr(key, "name", getattr(key, "idx", None))) for key in path)


def _flat(arrays: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """As JAX flattens a dict."""
    return sorted(arrays.items())


def _port(name: str, x, role: str, layout: str, meaning: str, **more) -> Port:
    shape = tuple(size if isinstance(size, int) else str(size) for size in x.shape)
    return Port(name, role, shape, x.dtype.name, layout, meaning, **more)


def _state_port(name: str, x, initial: int) -> Port:
    return _port(name, x, "state", *STATE[name.split(".")[-1]], initial=initial, donated=True)


def _parameter(name: str, x, leaves: Mapping[str, Leaf]) -> Port:
    path, _, part = name.rpartition(".")
    if isinstance(leaf := leaves.get(path), QTensor):
        meaning = PARTS[part].format(format=leaf.format.name, bits=leaf.format.bits)
        meaning = f"{path} {list(leaf.shape)}: {meaning}"
        layout = "in" if part == "order" else _layout(len(x.shape)) if x.shape else ""
        return _port(name, x, "parameter", layout, meaning)
    kind = {"w": "weight", "b": "bias"}.get(part, part)
    return _port(name, x, "parameter", _layout(len(x.shape)), f"{kind} of {re.sub(r'[.]', ' ', path) or name}")


def _layout(axes: int) -> str:
    return {1: "out", 2: "out in", 3: "expert out in"}.get(axes, " ".join(["axis"] * axes))
