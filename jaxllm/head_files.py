"""Heads from files: EAGLE's as they are published, and the layers of checkpoints that predict a further token.

D width of the head, W of the target's features side by side, V vocabulary of the target, U of the head.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoint.canonical import Values, assemble, flatten, nest
from jaxllm.checkpoint.safetensors import PICKLES
from jaxllm.checkpoint.source import open_source
from jaxllm.config import MLA, Attention, Block, ModelConfig
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.families import model_config
from jaxllm.families.base import Family, Rule
from jaxllm.families.names import L
from jaxllm.feature_head import Head, HeadConfig, head_shape
from jaxllm.files import write_whole
from jaxllm.model import Model, find

Array = jax.Array
Readers = Mapping[str, Callable[[], Values]]
OWN = ("bias", "draft_vocab_size", "target_hidden_size")  # of a head's config.json; the rest is of its layer
MARK = "model.layers.0.hidden_norm.weight"  # what only a head has that reads the embedding beside the feature


# ---- EAGLE ----------------------------------------------------------------------------------------------


def load_eagle(
    path_or_hub_id: str | os.PathLike,
    target: Model,
    *,
    layers: tuple[int, ...] | None = None,
    revision: str | None = None,
) -> Head:
    """An EAGLE, EAGLE-2 (the same files) or EAGLE-3 head, as published, for a target: a folder or a hub id.

    What the files leave out, embedding or vocabulary's projection, is the target's. layers: of an EAGLE-3 head,
    the target's layers whose inputs it reads, where they are not 2, n/2 and n-3.

    Raises ConfigError for a config that is not of such a head or not for this target, CheckpointError for pickles
    and for tensors that are missing, unknown or of the wrong shape.
    """
    folder = find(path_or_hub_id, revision)
    _refuse_pickles(folder)
    source = open_source(folder)
    if source.family is None or source.path.is_file():
        raise ConfigError(
            f"{folder} is no head: it should hold config.json and safetensors, as they are published"
        )
    readers = {_eagle_name(name): read for name, read in source.readers().items()}
    tables = {name: np.asarray(readers.pop(name)()) for name in ("model.d2t", "model.t2d") if name in readers}
    try:
        config = describe_eagle(source.values, source.family, readers.keys(), target.config, layers=layers)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from None
    special = _BESIDE if config.join == "beside" else _PROJECT
    family = dataclasses.replace(source.family, rules=(*special, *source.family.rules))
    params = _filled(config, readers, family, target, str(folder))
    if config.model.vocab != config.vocab:
        params["vocabulary"] = jnp.asarray(_vocabulary(config, tables, folder))
    return Head(config, params, source.path.name)


_PROJECT = (Rule(r"model\.fc", "join"),)
_BESIDE = (
    Rule(r"model\.fc", "reduce"),
    Rule(L + "hidden_norm", r"layers.\1.mixer.pre"),
    Rule(L + "input_layernorm", "embed_norm"),
)


def _eagle_name(name: str) -> str:
    """A head's name as a decoder's: EAGLE-3's midlayer is layer 0, and all but lm_head is in the model."""
    name = name.removeprefix("model.").replace("midlayer.", "layers.0.")
    return name if name.startswith("lm_head") else f"model.{name}"


def _refuse_pickles(folder: pathlib.Path) -> None:
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds PyTorch pickles ({pickles[0]}), which can run code when read, so jaxllm never reads "
            f"them; convert once where you trust the file: safetensors.torch.save_file(torch.load({pickles[0]!r}, "
            "weights_only=True), 'model.safetensors')"
        )


def describe_eagle(
    values: Mapping[str, Any],
    family: Family,
    names: Container[str],
    target: ModelConfig,
    *,
    layers: tuple[int, ...] | None = None,
) -> HeadConfig:
    """What a head of this config.json is, with tensors of these names (see `load_eagle`), for a target.

    Which tensors there are tells what the config does not: EAGLE-3 from EAGLE, biases, and whose projection it is.
    Raises ConfigError where it is not a head for this target.
    """
    own = model_config(family, {name: value for name, value in values.items() if name not in OWN})
    own = dataclasses.replace(own, max_len=max(own.max_len, target.max_len), dtype=target.dtype)
    beside = MARK in names
    _check_eagle(own, values, target, beside)
    first = _biased(own.blocks[0], names)
    model, W = _ends(own, values, names, target), target.width
    if not beside:
        blocks = (dataclasses.replace(first, pre="ffn"), *own.blocks[1:])
        model = dataclasses.replace(model, blocks=blocks, embed_norm=None)
        return HeadConfig(model, target.vocab, ("norm",), W, bias="model.fc.bias" in names)
    model = dataclasses.replace(model, blocks=(first,), embed_norm=own.norm)
    reads = tuple(f"layers.{i}.in" for i in layers or _aux_layers(len(target.blocks)))
    join = dict(join="beside", reduced=True, final="said")
    return HeadConfig(model, target.vocab, reads, len(reads) * W, **join)


def _biased(block: Block, names: Container[str]) -> Block:
    """The layer, its attention with those biases that there are."""
    has = {name: f"model.layers.0.self_attn.{name}_proj.bias" in names for name in "qo"}
    return dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, qkv_bias=has["q"], out_bias=has["o"]))


def _ends(own: ModelConfig, values: Mapping[str, Any], names: Container[str], target: ModelConfig) -> ModelConfig:
    """The head's config with its own projection, or with the target's where the files have none."""
    vocab = values.get("draft_vocab_size") or target.vocab
    if "lm_head.weight" in names:
        return dataclasses.replace(_own_head(own), vocab=vocab)
    if vocab != target.vocab:
        raise ConfigError(f"a head of {vocab} tokens needs a projection of its own, and lm_head.weight is missing")
    return dataclasses.replace(_shared_head(own, target), vocab=vocab)


def _check_eagle(own: ModelConfig, values: Mapping[str, Any], target: ModelConfig, beside: bool) -> None:
    expects = values.get("target_hidden_size") or own.width
    if expects != target.width:
        raise ConfigError(
            f"this head reads hidden vectors of width {expects}, and the target's are {target.width} wide; "
            "get the head that was made for this target"
        )
    if own.vocab != target.vocab:
        raise ConfigError(
            f"this head was made for a vocabulary of {own.vocab} tokens, and the target has {target.vocab}; "
            "get the head that was made for this target"
        )
    if (beside and len(own.blocks) != 1) or not all(isinstance(b.mixer, Attention) for b in own.blocks):
        raise ConfigError("such a head has attention alone, and one layer where it reads the embedding beside it")
    draft = values.get("draft_vocab_size")
    if draft is not None and (type(draft) is not int or not 1 <= draft <= own.vocab):
        raise ConfigError(f"draft_vocab_size should be a whole number from 1 to {own.vocab}, got {draft!r}")


def _aux_layers(count: int) -> tuple[int, int, int]:
    """The layers whose inputs EAGLE-3 reads of a target of `count` layers."""
    if count < 6:
        raise ConfigError(
            f"a head of three features reads layers 2, n/2 and n-3 of a target with at least 6; this one has "
            f"{count}: say which it reads with layers="
        )
    return 2, count // 2, count - 3


def _own_head(own: ModelConfig) -> ModelConfig:
    """A projection of its own, as plain as its embedding."""
    plain = dict(embed_scale=1.0, head_bias=False, logit_scale=1.0, logit_softcap=None, unit_head=False)
    return dataclasses.replace(own, tied=False, positions=None, **plain)


def _shared_head(own: ModelConfig, target: ModelConfig) -> ModelConfig:
    """The target's projection, with whatever it does to logits."""
    names = ("head_bias", "logit_scale", "logit_softcap")
    return dataclasses.replace(_own_head(own), **{name: getattr(target, name) for name in names})


def _vocabulary(config: HeadConfig, tables: Mapping[str, np.ndarray], folder: pathlib.Path) -> np.ndarray:
    """i32 [V]: where each token of the target lies in the head's vocabulary, -1 where it does not."""
    U, V = config.model.vocab, config.vocab
    offset = tables.get("model.d2t")
    if offset is None or offset.shape != (U,) or offset.dtype.kind not in "iu":
        found = "none" if offset is None else f"{offset.dtype.name}{list(offset.shape)}"
        raise CheckpointError(
            f"{folder} should say in d2t, int64[{U}], which {U} of {V} tokens it knows; got {found}"
        )
    token = np.arange(U) + offset.astype(np.int64)
    if token.min() < 0 or token.max() >= V or len(np.unique(token)) < U:
        raise CheckpointError(f"{folder}: d2t names tokens twice or beyond 0 to {V - 1}; get the file again")
    knows = tables.get("model.t2d")
    if knows is not None and set(np.flatnonzero(knows)) != set(token.tolist()):
        raise CheckpointError(f"{folder}: d2t and t2d name other tokens; get the file again")
    place = np.full(V, -1, np.int32)
    place[token] = np.arange(U)
    return place


# ---- a checkpoint's own predictor -----------------------------------------------------------------------


def load_predictor(
    path_or_hub_id: str | os.PathLike | None, target: Model, *, revision: str | None = None
) -> Head:
    """The layer of a checkpoint that predicts the token after the next one, for the target loaded from it.

    Where a checkpoint has several, the first is read, which drafts further tokens from its own features.
    Raises CheckpointError for one that has none, or whose family's are not read; otherwise as `load`.
    """
    source = open_source(find(path_or_hub_id, revision))
    part = source.family.predictor if source.family else None
    if part is None:
        raise CheckpointError(
            f"{source.path} has no layer that predicts further tokens and is read by jaxllm; it should be a "
            "folder of deepseek_v3, kimi_k2, glm4_moe, mimo or qwen3_next, as it was published"
        )
    pattern, prefix = (text.replace("{n}", str(len(target.config.blocks))) for text in (part.pattern, part.prefix))
    readers = {
        re.sub(f"^{prefix}", "model.layers.0.", name): read
        for name, read in source.readers().items()
        if re.fullmatch(pattern, name)
    }
    if not readers:
        raise CheckpointError(f"{source.path} lacks the tensors that predict further tokens, {pattern}")
    config = describe_predictor(target.config, carried=part.carried)
    rules = (*part.rules, *source.family.rules)
    family = dataclasses.replace(source.family, rules=rules, past_last=None, skip=part.shares)
    return Head(config, _filled(config, readers, family, target, str(source.path)), f"{target.name}, predictor")


def describe_predictor(target: ModelConfig, *, carried: bool) -> HeadConfig:
    """The head that such a layer is: a block like the target's last with attention, between its own norms."""
    blocks = [b for b in target.blocks if isinstance(b.mixer, Attention | MLA)]
    model = dataclasses.replace(_shared_head(target, target), blocks=(blocks[-1],), embed_norm=target.norm)
    final = "carried" if carried else "said"
    return HeadConfig(model, target.vocab, ("norm",), target.width, feature_norm=target.norm, final=final)


# ---- parameters -----------------------------------------------------------------------------------------


def shared(config: HeadConfig, target: Model) -> dict[str, Any]:
    """Path -> leaf of the target that a head without its own takes over, where the shapes agree."""
    flat = flatten(target.params)
    leaves = {"embed.w": flat["embed.w"], "head.w": flat["embed.w" if target.config.tied else "head.w"]}
    if "head.b" in flat:
        leaves["head.b"] = flat["head.b"]
    wanted = head_shape(config)
    return {path: leaf for path, leaf in leaves.items() if wanted.get(path) == tuple(leaf.shape)}


def nested(config: HeadConfig, target: Model, flat: Mapping[str, Any]) -> dict:
    """A head's parameters as a nested dict: its own, and the target's for embedding and projection it lacks."""
    return nest(shared(config, target) | dict(flat))


def _filled(config: HeadConfig, readers: Readers, family: Family, target: Model, source: str) -> dict:
    """The head's parameters: those of its files, and the target's where they leave some out."""
    theirs = [p for p, name in _ENDS.items() if name not in readers and p in shared(config, target)]
    shapes = {path: shape for path, shape in head_shape(config).items() if path not in theirs}

    def place(path: str, x: Values) -> Any:
        return jax.device_put(x.astype(config.model.dtype) if x.ndim >= 2 else x)

    tree = assemble(dict(readers), config.model, family, place=place, source=source, shapes=shapes)
    return nested(config, target, flatten(tree))


_ENDS = {"embed.w": "model.embed_tokens.weight", "head.w": "lm_head.weight", "head.b": "lm_head.bias"}


# ---- a new head -----------------------------------------------------------------------------------------


def eagle_values(target: Model, **changes: Any) -> dict[str, Any]:
    """The config.json of a new EAGLE head for a target: one layer of its sizes, with the fields that differ."""
    kept = {name: value for name, value in target.values.items() if name != "quantization_config"}
    return {**kept, "num_hidden_layers": 1, "bias": False, **changes}


def save_eagle(head: Head, values: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Write a head without the target's parts, as EAGLE's are published; `load_eagle` reads it.

    values: its config.json, from `eagle_values`. Raises CheckpointError where `folder` exists or a tensor has no
    published name.
    """
    from safetensors.numpy import save

    folder = pathlib.Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} exists already; give a new folder, or delete this one first")
    tensors = {}
    for path, leaf in flatten(head.params).items():
        if path in ("embed.w", "head.w", "head.b", "vocabulary"):
            continue
        tensors[_published(path)] = np.asarray(leaf)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_whole(folder / "config.json", (json.dumps(dict(values), indent=2) + "\n").encode())


_PUBLISHED = (
    (r"join", "fc"),
    (r"layers\.(\d+)\.mixer\.([qkvo])", r"layers.\1.self_attn.\2_proj"),
    (r"layers\.(\d+)\.ffn\.(gate|up|down)", r"layers.\1.mlp.\2_proj"),
    (r"layers\.(\d+)\.mixer\.pre", r"layers.\1.input_layernorm"),
    (r"layers\.(\d+)\.ffn\.pre", r"layers.\1.post_attention_layernorm"),
)


def _published(path: str) -> str:
    stem, leaf = path.rsplit(".", 1)
    for pattern, name in _PUBLISHED:
        if match := re.fullmatch(pattern, stem):
            return match.expand(name) + {"w": ".weight", "b": ".bias"}[leaf]
    raise CheckpointError(
        f"{path} has no name in EAGLE's files; only heads with a matrix as their join are written"
    )
