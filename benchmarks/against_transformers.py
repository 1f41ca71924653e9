"""Prefill of 512 tokens and decode of 128, jaxllm and transformers side by side in one run, A B A B.

    python benchmarks/against_transformers.py [--rounds 5] [--models bundled,smollm2] [--json FILE]

Models: the bundled one, and random bf16 weights in the shape of SmolLM2-135M. transformers runs eager, and with
torch.compile and a static cache. All use every core, batch 1, greedy; compilation is outside the times.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import tempfile
import time

import numpy as np

PROMPT, NEW = 512, 128
SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)


def random_smollm2(folder: pathlib.Path) -> pathlib.Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMOLLM2)).to(torch.bfloat16).save_pretrained(folder)
    return folder


class Jaxllm:
    """One prompt through the functions `generate` uses."""

    name = "jaxllm"

    def __init__(self, folder: pathlib.Path):
        import jaxllm

        self.model = jaxllm.load(folder)

    def __call__(self, ids: list[int]) -> tuple[float, float, list[int]]:
        from jaxllm import decode

        out = decode.generate(
            self.model, ids, max_new_tokens=NEW, eos=(), max_len=PROMPT + NEW, prefill_chunk_size=PROMPT
        )
        return out.timings.prefill, out.timings.decode, list(out[0].tokens)


class Transformers:
    """transformers' own generate-like loop: prefill, then one token at a time with its cache."""

    def __init__(self, folder: pathlib.Path, compiled: bool):
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.name = "transformers, torch.compile" if compiled else "transformers, eager"
        self.compiled = compiled
        self.step = torch.compile(self.net, dynamic=False) if compiled else self.net

    def _cache(self):
        from transformers import DynamicCache, StaticCache

        if not self.compiled:
            return DynamicCache(config=self.net.config)
        return StaticCache(config=self.net.config, max_cache_len=PROMPT + NEW)

    def __call__(self, ids: list[int]) -> tuple[float, float, list[int]]:
        torch = self.torch
        with torch.inference_mode():
            cache = self._cache()
            began = time.perf_counter()
            out = self.step(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            middle = time.perf_counter()
            tokens = [token]
            for _ in range(NEW - 1):
                out = self.step(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                tokens.append(token)
            return middle - began, time.perf_counter() - middle, torch.cat(tokens, 1)[0].tolist()


def measure(folder: pathlib.Path, rounds: int) -> list[dict]:
    """Medians over `rounds` of every engine, in turn."""
    engines = [Jaxllm(folder), Transformers(folder, False), Transformers(folder, True)]
    ids = np.random.default_rng(0).integers(1, 4000, PROMPT).tolist()
    times = {e.name: [] for e in engines}
    tokens = {}
    for engine in engines:  # compile
        engine(ids)
        tokens[engine.name] = engine(ids)[2]
    for _ in range(rounds):
        for engine in engines:
            times[engine.name].append(engine(ids)[:2])
    rows = []
    for name, pairs in times.items():
        prefill, decode = (statistics.median(p) for p in zip(*pairs, strict=True))
        same = int(np.argmin(np.append(np.array(tokens[name]) == tokens["jaxllm"], False)))
        rows.append(
            {
                "engine": name,
                "prefill_ms": 1e3 * prefill,
                "prefill_tokens_per_s": PROMPT / prefill,
                "decode_tokens_per_s": (NEW - 1) / decode,
                "first_tokens_equal_to_jaxllm": same,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default="bundled,smollm2")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.models.split(","):
            import jaxllm

            folder = jaxllm.bundled() if name == "bundled" else random_smollm2(pathlib.Path(temporary) / name)
            found[name] = measure(folder, args.rounds)
            print(f"\n{name}: prefill {PROMPT}, decode {NEW}, median of {args.rounds}")
            for row in found[name]:
                print(
                    f"  {row['engine']:28s} prefill {row['prefill_ms']:8.1f} ms "
                    f"({row['prefill_tokens_per_s']:7.0f} tokens/s)   "
                    f"decode {row['decode_tokens_per_s']:7.1f} tokens/s   "
                    f"first {row['first_tokens_equal_to_jaxllm']} tokens as jaxllm",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
