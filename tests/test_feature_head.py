"""Heads that read a target's hidden vectors, against their published layers written down again in torch."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import jaxllm
from jaxllm import decode, layers
from jaxllm.draft_head import DraftHead
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.feature_head import empty, forward, head_shape
from jaxllm.head_files import (
    describe_eagle,
    eagle_values,
    load_eagle,
    load_predictor,
    nested,
    save_eagle,
)
from jaxllm.model import Model
from jaxllm.spec_decode import Speculative
from jaxllm.taps import Taps
from tests import random_model
from tests.tiny import build, common, save

D, F, V, U, H, K, T = 32, 40, 48, 20, 4, 2, 7
VALUES = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=D,
    intermediate_size=F,
    num_attention_heads=H,
    num_key_value_heads=K,
    num_hidden_layers=1,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=16,
    hidden_act="silu",
    vocab_size=V,
    tie_word_embeddings=False,
    bias=True,
)
LAYER = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
)
SHAPES = dict(zip(LAYER.split(), [(D, D), (D // 2, D), (D // 2, D), (D, D), (F, D), (F, D), (D, F)], strict=True))
TOKENS = random_model.tokens(2, T + 1)


def weights(shapes: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    near = lambda name: 1.0 if "norm" in name else 0.0
    draw = lambda shape: torch.randn(shape, generator=g)
    return {n: near(n) + draw(s) * (0.2 if len(s) == 1 else s[-1] ** -0.5) for n, s in shapes.items()}


def layer_shapes(prefix: str, *norms: str, wide: int = D) -> dict[str, tuple[int, ...]]:
    shapes = {f"{prefix}{n}.weight": s for n, s in SHAPES.items()}
    for name in "qkv":
        at = f"{prefix}self_attn.{name}_proj.weight"
        shapes[at] = (shapes[at][0], wide)
    return shapes | {f"{prefix}{n}.weight": (D,) for n in norms}


EAGLE = layer_shapes("layers.0.", "post_attention_layernorm") | {"fc.weight": (D, 2 * D), "fc.bias": (D,)}
EAGLE_3 = layer_shapes("midlayer.", "hidden_norm", "input_layernorm", "post_attention_layernorm", wide=2 * D) | {
    "fc.weight": (D, 3 * D),
    "norm.weight": (D,),
    "lm_head.weight": (U, D),
}


@pytest.fixture(scope="module")
def target() -> Model:
    config = random_model.config(*[random_model.block()] * 6)
    return Model(config, random_model.params(config), name="six layers")


def published(folder, tensors: dict, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(VALUES | changes))
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors")
    return folder


# ---- the layers again -----------------------------------------------------------------------------------


def rms(x, w, eps=1e-5):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


def turned(x, theta=10000.0):
    """x [B, T, heads, h], the halves of each head rotated by its position."""
    n = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None, None] * theta ** -(torch.arange(n) / n)
    a, b = x[..., :n], x[..., n:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def attended(w, prefix, x):
    B, T, _ = x.shape
    part = lambda name, heads: (x @ w[f"{prefix}self_attn.{name}_proj.weight"].T + bias(w, prefix, name)).view(
        B, T, heads, -1
    )
    q, k, v = turned(part("q", H)), turned(part("k", K)), part("v", K)
    k, v = (a.repeat_interleave(H // K, 2) for a in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    y = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).reshape(B, T, -1)
    return y @ w[f"{prefix}self_attn.o_proj.weight"].T


def bias(w, prefix, name):
    return w.get(f"{prefix}self_attn.{name}_proj.bias", torch.zeros(()))


def fed(w, prefix, x):
    y = rms(x, w[f"{prefix}post_attention_layernorm.weight"])
    gate = torch.nn.functional.silu(y @ w[f"{prefix}mlp.gate_proj.weight"].T)
    return x + (gate * (y @ w[f"{prefix}mlp.up_proj.weight"].T)) @ w[f"{prefix}mlp.down_proj.weight"].T


def eagle(w, e, h):
    """Without a norm before attention, and without one at the end."""
    x = torch.cat([e, h], -1) @ w["fc.weight"].T + w["fc.bias"]
    return fed(w, "layers.0.", x + attended(w, "layers.0.", x))


def eagle_3(w, e, h):
    p = "midlayer."
    both = torch.cat([rms(e, w[p + "input_layernorm.weight"]), rms(h, w[p + "hidden_norm.weight"])], -1)
    return fed(w, p, h + attended(w, p, both))


def read(target: Model, names) -> tuple[torch.Tensor, torch.Tensor]:
    """(embeddings of the tokens after each, features side by side) of the target for TOKENS."""
    keep = Taps(keep=tuple(names))
    _, kept, _ = layers.capture(target.config, target.params, TOKENS[:, :-1], keep)
    features = np.concatenate([kept[name] for name in names], -1)
    return torch.tensor(np.asarray(target.params["embed"]["w"]))[TOKENS[:, 1:]], torch.tensor(features)


def close(ours, theirs) -> None:
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5, rtol=1e-5)


# ---- EAGLE ----------------------------------------------------------------------------------------------


def test_eagle(target, tmp_path):
    """Features, logits under the target's projection, and a second round over its own features."""
    w = weights(EAGLE)
    head = load_eagle(published(tmp_path, w), target)
    e, h = read(target, ["norm"])
    x, logits = forward(head.config, head.params, TOKENS, h.numpy())
    project = torch.tensor(np.asarray(target.params["head"]["w"])).T
    once = eagle(w, e, h)
    close(x, once)
    close(logits, once @ project)
    again, _ = forward(head.config, head.params, TOKENS, x)
    close(again, eagle(w, e, once))


def test_eagle_3(target, tmp_path):
    """Three features, a vocabulary of its own; the second round passes its own features by the matrix."""
    w, known = weights(EAGLE_3), torch.arange(U) * 2 + 1
    offset = {"d2t": known - torch.arange(U), "t2d": torch.isin(torch.arange(V), known)}
    head = load_eagle(published(tmp_path, w | offset, draft_vocab_size=U), target)
    assert head.config.features == ("layers.2.in", "layers.3.in", "layers.3.in")
    e, h = read(target, head.config.features)
    x, logits = forward(head.config, head.params, TOKENS, h.numpy())
    once = eagle_3(w, e, h @ w["fc.weight"].T)
    close(x, once)
    said = torch.full((2, T, V), -torch.inf)
    said[..., known] = rms(once, w["norm.weight"]) @ w["lm_head.weight"].T
    close(logits, said)
    again, _ = head.config.read(head.params, TOKENS[:, 1:], x, empty(head.config, 2, T))
    close(again, eagle_3(w, e, once))


def test_layers_are_said_where_the_target_has_few(tmp_path):
    config = random_model.config(*[random_model.block()] * 2)
    small = Model(config, random_model.params(config))
    folder = published(tmp_path, weights(EAGLE_3 | {"lm_head.weight": (V, D)}))
    with pytest.raises(ConfigError, match="this one has 2: say which it reads with layers="):
        load_eagle(folder, small)
    assert load_eagle(folder, small, layers=(0, 1, 1)).config.features == (
        "layers.0.in",
        "layers.1.in",
        "layers.1.in",
    )


def test_an_embedding_of_its_own(target, tmp_path):
    w = weights(EAGLE | {"embed_tokens.weight": (V, D)})
    head = load_eagle(published(tmp_path, w), target)
    _, h = read(target, ["norm"])
    x, _ = forward(head.config, head.params, TOKENS, h.numpy())
    close(x, eagle(w, w["embed_tokens.weight"][TOKENS[:, 1:]], h))


def test_what_is_saved_is_read(target, tmp_path):
    """A new head for a target, written as published ones are."""
    target = dataclasses.replace(target, values={k: v for k, v in VALUES.items() if k != "bias"})
    values = eagle_values(target)
    config = describe_eagle(values, jaxllm.families.family("llama"), (), target.config)
    flat = {p: jnp.full(s, 0.5) for p, s in head_shape(config).items() if p not in ("embed.w", "head.w")}
    head = jaxllm.feature_head.Head(config, nested(config, target, flat))
    save_eagle(head, values, tmp_path / "head")
    again = load_eagle(tmp_path / "head", target)
    assert again.config == config
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, head.params))
    assert again.params["head"]["w"] is target.params["head"]["w"]
    with pytest.raises(CheckpointError, match="exists already"):
        save_eagle(head, values, tmp_path / "head")


# ---- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "changes", "says"),
    [
        (EAGLE, dict(hidden_size=64), "width 64, and the target's are 32"),
        (EAGLE, dict(vocab_size=50), "vocabulary of 50 tokens, and the target has 48"),
        (EAGLE, dict(residual_trick=True), "residual_trick=True is not understood"),
        (EAGLE, dict(model_type="mamba"), "."),
        (EAGLE_3, dict(num_hidden_layers=2), "one layer where"),
        (EAGLE, dict(draft_vocab_size=20), "a head of 20 tokens needs a projection of its own"),
        (EAGLE_3, dict(draft_vocab_size=99), "draft_vocab_size should be a whole number from 1 to 48"),
    ],
)
def test_configs_of_other_heads(target, tmp_path, tensors, changes, says):
    with pytest.raises(ConfigError, match=says):
        load_eagle(published(tmp_path, weights(tensors), **changes), target)


def test_tensors_that_are_not_a_heads(target, tmp_path):
    w = weights(EAGLE)
    del w["fc.weight"], w["layers.0.mlp.up_proj.weight"]
    w |= {"layers.0.input_layernorm.weight": torch.ones(D), "fc.bias": torch.ones(3)}
    with pytest.raises(CheckpointError) as error:
        load_eagle(published(tmp_path, w), target)
    text = str(error.value)
    assert "join.w [32, 64] is missing" in text
    assert "layers.0.ffn.up.w [40, 32] is missing" in text
    assert "no place layers.0.mixer.pre.w" in text
    assert "join.b should have shape [32], got [3]" in text


@pytest.mark.parametrize(
    ("offset", "says"),
    [
        (None, r"d2t, int64\[20\], which 20 of 48 tokens it knows; got none"),
        (torch.zeros(3, dtype=torch.long), r"got int64\[3\]"),
        (-torch.arange(U), "names tokens twice"),
        (torch.full((U,), 40), "beyond 0 to 47"),
    ],
)
def test_vocabularies_that_cannot_be(target, tmp_path, offset, says):
    tables = {} if offset is None else {"d2t": offset}
    with pytest.raises(CheckpointError, match=says):
        load_eagle(published(tmp_path, weights(EAGLE_3) | tables, draft_vocab_size=U), target)


def test_vocabularies_that_differ(target, tmp_path):
    tables = {"d2t": torch.zeros(U, dtype=torch.long), "t2d": torch.arange(V) < U - 1}
    with pytest.raises(CheckpointError, match="d2t and t2d name other tokens"):
        load_eagle(published(tmp_path, weights(EAGLE_3) | tables, draft_vocab_size=U), target)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "head.pt"])
def test_pickles(target, tmp_path, file):
    (tmp_path / "config.json").write_text(json.dumps(VALUES))
    (tmp_path / file).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"holds PyTorch pickles .*save_file\(torch.load"):
        load_eagle(tmp_path, target)


# ---- a checkpoint's own predictor -----------------------------------------------------------------------


def with_predictor(folder, tensors: dict, prefix: str, names: dict[str, str]):
    """Put a predictor's tensors into a saved folder."""
    from safetensors.torch import load_file

    (path,) = folder.glob("*.safetensors")
    save_file(load_file(path) | {names.get(n, prefix + n): x.contiguous() for n, x in tensors.items()}, path)
    return folder


def another_layer(model_type: str, values: dict, at: int, folder):
    """(a layer of other weights, as transformers has it; its tensors, as transformers saves them)."""
    from safetensors.torch import load_file

    other, prefix = build(model_type, values, seed=1), f"model.layers.{at}."
    (path,) = save(other, folder).glob("*.safetensors")
    tensors = {n.removeprefix(prefix): x for n, x in load_file(path).items() if n.startswith(prefix)}
    return other.model.layers[at], tensors


def test_a_predictor_like_deepseeks(tmp_path):
    """Norms of both, their join, a layer as transformers has it, a norm before the projection alone."""
    values = common(
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=48, n_group=1,
        topk_group=1, first_k_dense_replace=1, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=24,
        qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=20, num_nextn_predict_layers=1,
    )  # fmt: skip
    theirs = build("deepseek_v3", values)
    other, layer = another_layer("deepseek_v3", values, 1, tmp_path / "other")
    width = 64
    own = weights(
        {"enorm": (width,), "hnorm": (width,), "shared_head.norm": (width,), "eh_proj": (width, 2 * width)}
    )
    folder = save(theirs, tmp_path / "model")
    tensors = {f"{n}.weight": x for n, x in own.items()} | layer
    tensors |= {"embed_tokens.weight": torch.zeros(96, width), "shared_head.head.weight": torch.zeros(96, width)}
    with_predictor(folder, tensors, "model.layers.2.", {})
    target = jaxllm.load(folder)
    head = load_predictor(folder, target)
    e, h = read(target, ["norm"])
    joined = torch.cat([rms(e, own["enorm"], 1e-6), rms(h, own["hnorm"], 1e-6)], -1) @ own["eh_proj"].T
    with torch.no_grad():
        pos = torch.arange(T)[None]
        mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
        args = dict(
            position_embeddings=theirs.model.rotary_emb(joined, pos), attention_mask=mask, position_ids=pos
        )
        want = other(joined, **args)
        want = want[0] if isinstance(want, tuple) else want
        logits = rms(want, own["shared_head.norm"], 1e-6) @ theirs.lm_head.weight.T
    got, said = forward(head.config, head.params, TOKENS, h.numpy())
    close(got, want)
    close(said, logits)


def test_a_predictor_like_mimos(tmp_path):
    """The hidden vector comes before the embedding, and the feature carried on has been normed."""
    values = common(hidden_size=D, intermediate_size=F, vocab_size=V, rms_norm_eps=1e-5)
    theirs = build("qwen2", values)
    folder = save(theirs, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= dict(model_type="mimo", num_nextn_predict_layers=1, attention_bias=True, use_sliding_window=False)
    (folder / "config.json").write_text(json.dumps(config))
    norms = (
        "token_layernorm",
        "hidden_layernorm",
        "final_layernorm",
        "input_layernorm",
        "post_attention_layernorm",
    )
    shapes = layer_shapes("", *norms) | {"input_proj.weight": (D, 2 * D)}
    w = weights(shapes | {f"self_attn.{n}_proj.bias": (shapes[f"self_attn.{n}_proj.weight"][0],) for n in "qkv"})
    target = jaxllm.load(with_predictor(folder, w, "model.mtp_layers.0.", {}))
    head = load_predictor(folder, target)
    e, h = read(target, ["norm"])
    both = [rms(h, w["hidden_layernorm.weight"]), rms(e, w["token_layernorm.weight"])]
    x = torch.cat(both, -1) @ w["input_proj.weight"].T
    x = fed(w, "", x + attended(w, "", rms(x, w["input_layernorm.weight"])))
    x = rms(x, w["final_layernorm.weight"])
    got, said = forward(head.config, head.params, TOKENS, h.numpy())
    close(got, x)
    close(said, (x @ theirs.lm_head.weight.T).detach())
    options = dict(max_new_tokens=9, eos=())
    drafter = DraftHead(head, (1, 1), "couple")
    guessed = decode.generate(target, TOKENS.tolist(), **options, speculative=Speculative(drafter, 2))
    assert [c.tokens for c in guessed] == [c.tokens for c in decode.generate(target, TOKENS.tolist(), **options)]


def test_a_predictor_like_qwens(tmp_path):
    """Its names, its norms as w - 1, and full attention among recurrent layers."""
    from tests.cases.qwen_next import NEXT

    theirs = build("qwen3_next", NEXT)
    other, layer = another_layer("qwen3_next", NEXT, 3, tmp_path / "other")
    own = weights({"norm": (64,), "pre_fc_norm_hidden": (64,), "pre_fc_norm_embedding": (64,), "fc": (64, 128)})
    less = {n: x - 1 if "norm" in n else x for n, x in own.items()}
    folder = save(theirs, tmp_path / "model")
    tensors = {f"{n}.weight": x for n, x in less.items()}
    with_predictor(folder, tensors | layer, "mtp.layers.0.", {n: f"mtp.{n}" for n in tensors})
    target = jaxllm.load(folder)
    head = load_predictor(folder, target)
    e, h = read(target, ["norm"])
    both = [rms(e, own["pre_fc_norm_embedding"], 1e-3), rms(h, own["pre_fc_norm_hidden"], 1e-3)]
    joined = torch.cat(both, -1) @ own["fc"].T
    with torch.no_grad():
        pos = torch.arange(T)[None]
        mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
        want = other(joined, position_embeddings=theirs.model.rotary_emb(joined, pos), attention_mask=mask)
        want = rms(want[0] if isinstance(want, tuple) else want, own["norm"], 1e-3)
    got, said = forward(head.config, head.params, TOKENS, h.numpy())
    close(got, want)
    close(said, (want @ theirs.lm_head.weight.T).detach())


def test_no_predictor(tmp_path, target):
    with pytest.raises(CheckpointError, match="has no layer that predicts further tokens"):
        load_predictor(None, target)
    folder = save(build("glm4_moe", common(
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=48,
        first_k_dense_replace=1, n_group=1, topk_group=1,
    )), tmp_path / "model")  # fmt: skip
    with pytest.raises(
        CheckpointError, match=r"lacks the tensors that predict further tokens, model\\.layers\\.2"
    ):
        load_predictor(folder, jaxllm.load(folder))
