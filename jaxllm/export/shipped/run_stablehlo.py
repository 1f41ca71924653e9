#!/usr/bin/env python3
"""Generate text with the exported model in this folder. Needs jax, numpy, flatbuffers and, for text, tokenizers.

python run_stablehlo.py "def main("
python run_stablehlo.py --ids 12,7,99 --max-new-tokens 64 --temperature 0.8 --top-p 0.95 --seed 1
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import pathlib
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

PENALTIES = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}  # what does nothing
NO_PENALTIES = "these programs have no penalties: export the model with --sampler penalties"
KINDS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
KINDS |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
KINDS |= {f"{sign}{bits}": f"{name}{bits}" for sign, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32)}


def arrays(path):
    """(name, array) of every tensor in a safetensors file, mapped and not read."""
    data = np.memmap(path, np.uint8, "r")
    size = int.from_bytes(data[:8].tobytes(), "little")
    for name, entry in json.loads(data[8 : 8 + size].tobytes()).items():
        if name != "__metadata__":
            start, stop = (8 + size + offset for offset in entry["data_offsets"])
            yield name, data[start:stop].view(jnp.dtype(KINDS[entry["dtype"]])).reshape(entry["shape"])


class Artifact:
    """The programs of a folder, its parameters on their device, and an empty state to begin with.

    anywhere: run on this machine's usual device whatever platform the programs are for, to check them.
    """

    def __init__(self, folder, manifest="manifest.json", *, anywhere=False):
        self.folder = pathlib.Path(folder)
        if not (self.folder / manifest).is_file():
            sys.exit(f"{folder} has no {manifest}: it is no finished export; export it again")
        self.manifest = json.loads((self.folder / manifest).read_text(encoding="utf-8"))
        for name, entry in self.manifest["files"].items():
            self.check(self.folder / name, entry["sha256"])
        try:
            self.device = jax.devices(None if anywhere else self.manifest["target"]["platform"])[0]
        except RuntimeError as error:
            sys.exit(f"these programs are for another platform than this machine's: {error}")
        self.symbols = self.manifest.get("symbols", {})  # "B" rows, "T" tokens of a prefill: of any number
        self.params = {}
        for name in self.manifest["parameters"]:
            self.params |= {k: jax.device_put(x, self.device) for k, x in arrays(self.folder / name)}
        self.programs = {name: self.program(name, anywhere) for name in ("prefill", "decode")}

    def check(self, path, sha256):
        """End here unless the file is the one that was verified."""
        if not path.is_file():
            sys.exit(f"{path} is missing; export the model again")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                sys.exit(f"{path} is not the file that was exported; export the model again")

    def program(self, name, anywhere):
        """A function (parameters, state, inputs) -> (results, state); the state's memory is used again."""
        files = self.manifest["programs"][name]["files"]
        form = "interpreted" if anywhere and "interpreted" in files else "jax_export"
        data = (self.folder / files[form]).read_bytes()
        found = jax.export.deserialize(bytearray(data))
        found = dataclasses.replace(found, platforms=(self.device.platform,)) if anywhere else found
        return jax.jit(found.call, donate_argnums=1)

    def start(self, rows=1):
        """The state of rows that have seen nothing. rows: how many, where the manifest leaves that open."""
        ports = [p for p in self.manifest["programs"]["decode"]["inputs"] if p["role"] == "state"]
        shape = lambda port: [rows if size == "B" else size for size in port["shape"]]
        empty = {p["name"]: np.full(shape(p), p["initial"], jnp.dtype(p["dtype"])) for p in ports}
        return {name: jax.device_put(x, self.device) for name, x in empty.items()}

    def step(self, program, state, inputs):
        """(results, state) of "prefill" or "decode" for the manifest's inputs, by name; consumes the state."""
        return self.programs[program](self.params, state, inputs)

    def inputs(self, ids, width, step, temperature, top_p, seed, **penalties):
        """What a program takes besides: the ids in every row, and a sampler's numbers if it has one inside."""
        B = 1 if "B" in self.symbols else self.manifest["batch"]
        row = np.pad(np.array(ids, np.int32), (0, width - len(ids)))
        found = {"tokens": np.tile(row, (B, 1)), "n_new": np.full(B, len(ids), np.int32)}
        if self.manifest["sampler"]["place"] == "in-graph":
            floats = {"temperature": temperature, "top_p": top_p, "min_p": 0.0} | penalties
            found |= {k: np.full(B, v, np.float32) for k, v in floats.items()} | {"top_k": np.zeros(B, np.int32)}
            found |= {"seed": np.full(B, seed, np.uint32), "step": np.full(B, step, np.int32)}
        return found

    def penalties(self, asked):
        """All of the sampler's, by name; ends here where it has none and some are asked for."""
        if not self.manifest["sampler"].get("penalties"):
            return {} if all(value == PENALTIES[name] for name, value in asked.items()) else sys.exit(NO_PENALTIES)
        return PENALTIES | asked

    def generate(self, ids, *, temperature=0.0, top_p=1.0, seed=0, **penalties):
        """Token ids that follow the ids, while there is room. Rows of a batch are alike, the first is read.

        repetition_penalty (1: none), frequency_penalty and presence_penalty (0), where the sampler has them."""
        chunk, room, knobs = self.manifest["chunk"], self.manifest["context"], (temperature, top_p, seed)
        penalties = self.penalties(penalties)
        if not ids or (room and len(ids) > room):
            sys.exit(f"the prompt has {len(ids)} tokens; this export takes 1 to {room or 'any number'}")
        random, state = np.random.default_rng(seed), self.start()
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            inputs = self.inputs(part, len(part) if "T" in self.symbols else chunk, 0, *knobs, **penalties)
            results, state = self.step("prefill", state, inputs)
        for step in itertools.count(1):
            inside = "token" in results
            token = (
                int(results["token"][0]) if inside else sample(results["logits"][0], temperature, top_p, random)
            )
            yield token
            if room and len(ids) + step > room:
                return
            results, state = self.step("decode", state, self.inputs([token], 1, step, *knobs, **penalties))


def sample(logits, temperature, top_p, random):
    """A token by logits f32 [V]: the best at temperature 0, else drawn from those of probability top_p."""
    logits = np.asarray(logits)
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits)
    p = np.exp((logits[order].astype(np.float64) - logits.max()) / temperature)
    p = np.where(np.cumsum(p) - p < top_p * p.sum(), p, 0)
    return int(order[random.choice(p.size, p=p / p.sum())])


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="text to continue")
    parser.add_argument("--ids", help="token ids instead of text: 12,7,99; prints ids")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    penalties = {name.replace("_", "-"): value for name, value in PENALTIES.items()}
    for name, value in ({"temperature": 0.0, "top-p": 1.0, "seed": 0} | penalties).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    if (args.prompt is None) == (args.ids is None):
        parser.error("give a prompt, or --ids")
    folder = pathlib.Path(__file__).resolve().parent
    artifact, tokenizer = Artifact(folder), None
    if args.ids is None:
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(args.prompt).ids if tokenizer else [int(i) for i in args.ids.split(",")]
    ends, new = (artifact.manifest["tokenizer"] or {"eos_ids": []})["eos_ids"] if tokenizer else [], []
    knobs = {name: getattr(args, name) for name in ("temperature", "top_p", "seed", *PENALTIES)}
    for token in artifact.generate(ids, **knobs):
        if token in ends or len(new) == args.max_new_tokens:
            break
        new.append(token)
    print(tokenizer.decode(new) if tokenizer else ",".join(map(str, new)))


if __name__ == "__main__":
    main()
