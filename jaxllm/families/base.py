"""What a family is: how to read its config, and how its tensors are named and laid out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jaxllm.config import MLP, Attention, Block, ModelConfig, Norm, params_shape
from jaxllm.families.fields import Fields
from jaxllm.families.layouts import Split
from jaxllm.families.rope import parameters

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "swiglu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu2",
}


MANY = 10_000  # more layers, and more heads in one, than any model has


class Rule(NamedTuple):
    """A checkpoint tensor's place: `path` may use the groups of `pattern`, and "path@n" is row n of a stack.

    The pattern matches the name without its ".weight" or ".bias", which become the leaves "w" and "b"; a name
    without either has its leaf in the path. A split turns one tensor into several below the path.
    """

    pattern: str
    path: str
    split: Split | None = None


class Predictor(NamedTuple):
    """A further layer of a checkpoint: from the decoder's hidden vector and the embedding of the token behind it,
    it says the token after that one.

    "{n}" in a pattern stands for the number of the decoder's layers. Tensors behind the prefix are named as those
    of layer 0 of a decoder, and the rules tell where the rest goes: embed_norm, feature_norm, join and norm.
    """

    pattern: str  # its tensors
    prefix: str  # of those of its layer
    rules: tuple[Rule, ...]
    shares: tuple[str, ...] = ()  # copies of the decoder's embedding and projection, which are not read
    carried: bool = False  # whether the feature it hands on has been through its last norm


@dataclasses.dataclass(frozen=True)
class Family:
    """A description of one model type; numpy and data only."""

    describe: Callable[[Fields], ModelConfig]
    rules: tuple[Rule, ...]
    interleaved: bool = False  # rotary pairs are (0, 1), (2, 3).. in the checkpoint
    one_plus: str | None = None  # paths of norm weights stored as w - 1
    conv1d: bool = False  # matrices are stored [in, out]
    unit_norm: str | None = None  # paths of norm weights that checkpoints lack: ones are supplied
    inside: str | None = None  # what the decoder's names are prefixed with in a larger model
    skip: tuple[str, ...] = ()  # tensors that are not part of the decoder
    past_last: str | None = None  # tensors of layer (\d+), not part of it from the last layer on
    predictor: Predictor | None = None  # the part among those that says a further token


NORMS = r".*\b(pre|post|norm|q_norm|k_norm)\.w"  # every norm weight of the canonical tree


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What nearly every config says, under one of its usual names."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    act: str
    norm: Norm
    tied: bool
    max_len: int


def sizes(c: Fields, *, act: str | None = None, tied: bool = False, norm: str = "rms", **given: Any) -> Sizes:
    """Read the sizes; `tied`, `act` and the values `given` by field name are the family's own defaults.

    tied is what a config without tie_word_embeddings means; act, where given, is not read from the config.
    """
    width = c.int("hidden_size|n_embd|d_model|n_embed")
    heads = given.get("heads") or c.int("num_attention_heads|n_head|n_heads", most=MANY)
    if width % heads and c.raw("head_dim") is None and "head_dim" not in given:
        c.problem(f"the width {width} is not a multiple of {heads} heads, and there is no head_dim")
    read = dict(
        width=width,
        layers=c.int("num_hidden_layers|n_layer|n_layers|num_layers", most=MANY),
        heads=heads,
        kv_heads=c.int("num_key_value_heads", heads),
        head_dim=c.int("head_dim", max(width // heads, 1)),
        hidden=given.get("hidden") or c.int("intermediate_size|n_inner|ffn_dim|ffn_hidden_size", 4 * width),
        act=act or c.choice("hidden_act|hidden_activation|activation_function|activation", ACTIVATIONS),
        norm=Norm(
            norm,
            c.number("rms_norm_eps|norm_eps|layer_norm_eps|layer_norm_epsilon|norm_epsilon", 1e-5),
            norm == "layer",
        ),
        tied=c.flag("tie_word_embeddings", tied),
        max_len=c.int("max_position_embeddings|n_positions|max_seq_len|seq_length", 2048),
    )
    s = Sizes(**(read | given))
    if s.heads % s.kv_heads:
        c.problem(f"{s.heads} heads cannot share {s.kv_heads} key-value heads evenly")
    return s


def attention(s: Sizes, **changes: Any) -> Attention:
    """The usual attention of these sizes, with the fields of Attention that differ."""
    usual = dict(heads=s.heads, kv_heads=s.kv_heads, head_dim=s.head_dim, scale=s.head_dim**-0.5)
    return Attention(**(usual | changes))


def dense(s: Sizes, *, gated: bool = True, bias: bool = False) -> MLP:
    """The usual feed-forward of these sizes."""
    return MLP(s.hidden, s.act, gated, bias)


def decoder(c: Fields, s: Sizes, layer: Block | Callable[[int], Block], **top: Any) -> ModelConfig:
    """The whole model: the same block everywhere, or layer(i); `top` are further fields of ModelConfig."""
    blocks = tuple(layer(i) if callable(layer) else layer for i in range(s.layers))
    vocab = c.int("vocab_size|padded_vocab_size")
    usual = dict(vocab=vocab, width=s.width, blocks=blocks, norm=s.norm, tied=s.tied, max_len=_max_len(c, s))
    return ModelConfig(**(usual | top))


def _max_len(c: Fields, s: Sizes) -> int:
    """The positions this model is good for: what was asked for, where its rotary scaling depends on it."""
    r = parameters(c)
    kind = r.get("rope_type", r.get("type"))
    if kind not in ("dynamic", "ntk", "longrope", "su"):
        if c.context and c.context > s.max_len:
            c.problem(f"max_len={c.context} was asked for; the model was made for {s.max_len} positions")
        return s.max_len
    original = c.raw("original_max_position_embeddings") or r.get("original_max_position_embeddings")
    return c.context or int(original if isinstance(original, int | float) else s.max_len)


def layer_types(c: Fields, s: Sizes, *, every: int | None = None) -> list[str]:
    """The kind of every layer ("full_attention", "sliding_attention", ...) as the config lists them.

    Where it does not: all sliding but for every `every`-th, which is full (0: every layer is).
    """
    if every is not None and c.raw("layer_types") is None:
        sliding = lambda i: bool(every and (i + 1) % every)
        return ["sliding_attention" if sliding(i) else "full_attention" for i in range(s.layers)]
    return [str(t) for t in c.items("layer_types", s.layers)]


def windows(c: Fields, s: Sizes, *, every: int | None = None, width: int | None = None) -> list[int | None]:
    """The sliding window of every layer, None where it sees everything; `width` where the config has none."""
    kinds = layer_types(c, s, every=every)
    for unknown in sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        c.problem(f"layer_types has {unknown!r}; jaxllm knows 'full_attention' and 'sliding_attention' here")
    width = c.int("sliding_window", width)
    return [width if kind == "sliding_attention" else None for kind in kinds]


def model_config(
    family: Family, values: Mapping[str, Any], *, context: int | None = None, ignore: Iterable[str] = ()
) -> ModelConfig:
    """config.json (parsed) -> ModelConfig.

    Raises ConfigError that lists every field that is missing, malformed, unsupported or not understood.
    """
    c = Fields(values, context=context)
    try:
        config = family.describe(c)
    except (ArithmeticError, TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # A problem already found (a missing size, say) is why the rest does not work out.
        c.problem(f"its values do not fit together ({type(error).__name__}: {error})")
        config = None
    if config and not c.problems:
        _check_shapes(c, config)
    c.finish(ignore)
    return config


def _check_shapes(c: Fields, config: ModelConfig) -> None:
    """A problem where a product or difference of the config's values is no size."""
    for path, shape in params_shape(config).items():
        if not all(isinstance(n, int) and n > 0 for n in shape):
            c.problem(f"its values give {path} the shape {list(shape)}; every size should be at least 1")
            return
