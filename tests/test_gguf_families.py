"""Every architecture: a tiny Hugging Face checkpoint and the GGUF file made of it are the same model."""

import dataclasses
import pathlib
import re

import numpy as np
import pytest

import jaxllm
from jaxllm.checkpoint.canonical import flatten
from jaxllm.checkpoint.gguf_archs import ARCHS
from tests import tiny
from tests.cases.case import Case
from tests.parity import QUICK, all_cases
from tests.tiny import common

pytestmark = pytest.mark.slow

gguf = pytest.importorskip("gguf")
pytest.importorskip("torch")
pytest.importorskip("transformers")

# What GGUF does not store: the scale of Gemma's and MPT's scores, which is that of the head's size, the amplitude
# of longrope and which layers slide where it is another than the usual.
GEMMA = dict(head_dim=32, sliding_window=8, query_pre_attn_scalar=32)
MPT = dict(vocab_size=96, d_model=64, n_heads=4, n_layers=3, max_seq_len=128)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
LOCAL = dict(num_local_experts=4, num_experts_per_tok=2, attention_bias=True, lm_head_bias=True)
OWN = {
    "gemma2-scaled": Case("gemma2", common(**GEMMA)),
    "gemma3-scaled": Case("gemma3_text", common(**GEMMA, num_hidden_layers=7)),
    "qwen3_moe-all": Case("qwen3_moe", common(**EXPERTS, norm_topk_prob=True, attention_bias=True)),
    "phimoe-plain": Case("phimoe", common(**LOCAL)),
    "mpt-clipped": Case("mpt", MPT | dict(attn_config=dict(clip_qkv=0.5, alibi_bias_max=4))),
}
ROWS = [
    ("llama", "llama"),
    ("llama-bias", "llama"),
    ("mistral", "llama"),
    ("mistral", "mistral3"),
    ("mixtral", "llama"),
    ("qwen", "qwen"),
    ("qwen2", "qwen2"),
    ("qwen2-tied", "qwen2"),
    ("qwen2_moe", "qwen2moe"),
    ("qwen3", "qwen3"),
    ("qwen3_moe-all", "qwen3moe"),
    ("gemma", "gemma"),
    ("gemma2-scaled", "gemma2"),
    ("gemma3-scaled", "gemma3"),
    ("phi", "phi2"),
    ("phi3", "phi3"),
    ("phi3-slide", "phi3"),
    ("phi3-long", "phi3"),
    ("phimoe-plain", "phimoe"),
    ("gpt2", "gpt2"),
    ("gpt_bigcode", "starcoder"),
    ("gpt_neox", "gptneox"),
    ("gpt_neox-sequential", "gptneox"),
    ("starcoder2", "starcoder2"),
    ("stablelm", "stablelm"),
    ("stablelm-parallel", "stablelm"),
    ("falcon-7b", "falcon"),
    ("falcon-40b", "falcon"),
    ("falcon-11b", "falcon"),
    ("olmo", "olmo"),
    ("olmo2", "olmo2"),
    ("olmo3", "olmo2"),
    ("olmoe", "olmoe"),
    ("cohere", "command-r"),
    ("cohere2", "cohere2"),
    ("deepseek", "deepseek"),
    ("deepseek_v2", "deepseek2"),
    ("deepseek_v2-groups", "deepseek2"),
    ("deepseek_v3", "deepseek2"),
    ("gpt_oss", "gpt-oss"),
    ("smollm3", "smollm3"),
    ("granite", "granite"),
    ("granitemoe-scales", "granitemoe"),
    ("nemotron", "nemotron"),
    ("bloom", "bloom"),
    ("mpt", "mpt"),
    ("mpt-clipped", "mpt"),
    ("glm4", "glm4"),
    ("glm4_moe", "glm4moe"),
    ("glm4_moe-norm", "glm4moe"),
    ("chatglm", "chatglm"),
    ("arcee", "arcee"),
    ("arcee-yarn", "arcee"),
    ("ernie4_5", "ernie4_5"),
    ("seed_oss", "seed_oss"),
    ("hunyuan_v1_dense", "hunyuan-dense"),
    ("exaone", "exaone"),
    ("exaone4", "exaone4"),
    ("internlm2", "internlm2"),
    ("minicpm", "minicpm"),
    ("orion", "orion"),
    ("baichuan", "baichuan"),
]
LOGITS = ("llama", "mixtral", "gemma3-scaled", "gpt2", "deepseek_v3", "gpt_oss", "smollm3")  # besides parameters
REORDERED = {"smollm3": r"layers\.3\.mixer\.[qk]\.w"}  # a layer without positions, where the order does not matter


def test_every_architecture_is_compared():
    assert {architecture for _, architecture in ROWS} == ARCHS.keys()


@pytest.mark.parametrize(("name", "architecture"), ROWS)
def test_the_same_model(name, architecture, tmp_path):
    from tests.gguf_convert import convert

    case = (all_cases() | OWN)[name]
    folder = folder_of(case, tmp_path / "folder")
    file = convert(folder, tmp_path / "model.gguf", architecture)
    want = jaxllm.load(folder, max_len=case.max_len)
    got = jaxllm.load(file, max_len=case.max_len)
    assert differences(got.config, want.config) == []
    flat, wanted = flatten(got.params), flatten(want.params)
    assert flat.keys() == wanted.keys()
    # norms that were stored as w - 1 were rounded once more on their way
    far = [p for p in flat if not np.allclose(flat[p], wanted[p], rtol=1e-6, atol=1e-7)]
    assert [p for p in far if not re.fullmatch(REORDERED.get(name, ""), p)] == []
    if name in LOGITS:
        assert np.abs(logits(got) - logits(want)).max() < 1e-5


def folder_of(case: Case, folder: pathlib.Path) -> pathlib.Path:
    model = tiny.build(case.model_type, case.values)
    if case.prepare:
        case.prepare(model)
    tiny.save(model, folder)
    if case.convert:
        case.convert(folder)
    return folder


def logits(model: jaxllm.Model) -> np.ndarray:
    import jax

    tokens = np.random.default_rng(0).integers(3, model.config.vocab, (1, 20))
    run = jax.jit(jaxllm.forward, static_argnums=0, compiler_options=QUICK)
    return np.asarray(run(model.config, model.params, tokens)[0])


def differences(got, want, at: str = "config") -> list[str]:
    """Where two configs differ by more than f32 rounds: metadata has no other floats."""
    if dataclasses.is_dataclass(want) and type(got) is type(want):
        pairs = [(f".{f.name}", getattr(got, f.name), getattr(want, f.name)) for f in dataclasses.fields(want)]
    elif isinstance(want, tuple) and isinstance(got, tuple) and len(got) == len(want):
        pairs = [(f"[{i}]", a, b) for i, (a, b) in enumerate(zip(got, want, strict=True))]
    elif isinstance(want, float) and isinstance(got, int | float):
        return [] if abs(got - want) <= 1e-6 * abs(want) else [f"{at}: {got} for {want}"]
    else:
        return [] if got == want else [f"{at}: {got} for {want}"]
    return [line for name, a, b in pairs for line in differences(a, b, at + name)]
