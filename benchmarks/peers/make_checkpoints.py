"""Random weights in the shapes of `jaxllm bench --shape`, as a folder that every peer's converter reads.

    python benchmarks/peers/make_checkpoints.py llama-3.2-1b OUT

Needs torch and transformers (and room for the model twice). The tokenizer is made up: it has as many tokens as the
shape's vocabulary, for converters ask for one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the shapes are jaxllm's

from jaxllm.errors import ConfigError
from jaxllm.shapes import shape

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def tokenizer_json(vocab: int) -> dict:
    """A byte-level BPE vocabulary of `vocab` tokens: bytes, then pairs, triples and quadruples of letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens, merges = [BEGIN, END, *alphabet], []
    longer = itertools.chain.from_iterable(itertools.product(LETTERS, repeat=n) for n in (2, 3, 4))
    for letters in itertools.islice(longer, max(0, vocab - len(tokens))):
        tokens.append("".join(letters))
        merges.append(("".join(letters[:-1]), letters[-1]))
    if len(tokens) != vocab:
        raise SystemExit(f"a vocabulary needs at least {len(tokens)} tokens, this one has {vocab}")
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([BEGIN, END])
    return json.loads(made.to_str())


def make(values: dict, out: pathlib.Path, seed: int = 0) -> None:
    """Write config.json, bf16 weights and a tokenizer to the folder `out`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    values = {"initializer_range": values["hidden_size"] ** -0.5, "bos_token_id": 0, "eos_token_id": 1} | values
    kind = values["model_type"]
    config = AutoConfig.for_model(**values)
    net = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    net.save_pretrained(out)
    # The spelling of published checkpoints, which every converter knows.
    published = json.loads((out / "config.json").read_text())
    kept = {k: v for k, v in published.items() if k not in ("rope_parameters", "dtype")}
    kept |= {k: values[k] for k in ("rope_theta", "rope_scaling") if k in values}
    (out / "config.json").write_text(json.dumps(kept | {"model_type": kind, "torch_dtype": "bfloat16"}, indent=2))
    (out / "tokenizer.json").write_text(json.dumps(tokenizer_json(values["vocab_size"])))
    about = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=BEGIN, eos_token=END)
    (out / "tokenizer_config.json").write_text(json.dumps(about | {"clean_up_tokenization_spaces": False}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help="a name of jaxllm.shapes")
    parser.add_argument("out", type=pathlib.Path, help="the folder to write")
    options = parser.parse_args()
    try:
        values = dict(shape(options.shape))
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    make(values, options.out)


if __name__ == "__main__":
    main()
