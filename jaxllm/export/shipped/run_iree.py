#!/usr/bin/env python3
"""Generate text with the exported model in this folder. Needs iree-base-runtime, numpy and, for text, tokenizers.

python run_iree.py "def main("
python run_iree.py --ids 12,7,99 --max-new-tokens 64 --temperature 0.8 --top-p 0.95 --seed 1
"""

import argparse
import hashlib
import itertools
import json
import os
import pathlib
import sys

import iree.runtime as rt
import numpy as np

DRIVERS = {"vulkan": "vulkan", "cuda": "cuda", "rocm": "hip", "metal": "metal"}  # others are for CPUs


def device_of(platform):
    """The device that runs a platform's programs, or None where there is none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    driver = DRIVERS.get(platform, "local-task" if cores > 1 else "local-sync")
    try:
        found = rt.get_driver(driver)
        return found.create_default_device() if found.query_available_devices() else None
    except (RuntimeError, ValueError):  # no such driver in this runtime, or not on this machine
        return None


class Artifact:
    """The program of a folder with its parameters on a device. The state is inside: `reset` empties it.

    program: a file to run in place of the folder's, made of the same module.
    """

    def __init__(self, folder, manifest="manifest.json", *, device=None, program=None):
        self.folder = pathlib.Path(folder)
        if not (self.folder / manifest).is_file():
            sys.exit(f"{folder} has no {manifest}: it is no finished export; export it again")
        self.manifest = json.loads((self.folder / manifest).read_text(encoding="utf-8"))
        for name, entry in self.manifest["files"].items():
            self.check(self.folder / name, entry["sha256"])
        platform = self.manifest["target"]["platform"]
        self.device = device or device_of(platform)
        if self.device is None:
            sys.exit(f"this program is for {platform}, and IREE's runtime finds no such device on this machine")
        self.local = platform not in DRIVERS or program is not None
        self.where = str(self.device)
        self.functions = self.loaded(program or self.folder / self.manifest["programs"]["decode"]["files"]["vmfb"])

    def check(self, path, sha256):
        """End here unless the file is the one that was verified."""
        if not path.is_file():
            sys.exit(f"{path} is missing; export the model again")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                sys.exit(f"{path} is not the file that was exported; export the model again")

    def loaded(self, program):
        """The module's functions, by name."""
        index, config = rt.ParameterIndex(), rt.Config(device=self.device)
        for name in self.manifest["parameters"]:
            index.load(str(self.folder / name))
        parameters = rt.create_io_parameters_module(config.vm_instance, index.create_provider(scope="model"))
        module = rt.VmModule.mmap(config.vm_instance, str(program))
        self.context = rt.SystemContext(config=config)
        self.context.add_vm_modules((parameters, module))
        return {name: self.context.modules.model[name] for name in ("reset", "prefill", "decode")}

    def reset(self):
        """Forget every token."""
        self.functions["reset"]()

    def step(self, program, inputs):
        """Results of "prefill" or "decode" for the manifest's inputs, all by name; the state goes on."""
        ports = self.manifest["programs"][program]
        taken = [inputs[p["name"]] for p in ports["inputs"] if p["role"] == "input"]
        taken = [x.view(np.int32) if x.dtype == np.uint32 else np.ascontiguousarray(x) for x in taken]
        given = self.functions[program](*taken)
        given = given if isinstance(given, tuple) else (given,)
        names = [p["name"] for p in ports["outputs"] if p["role"] == "result"]
        return {name: self.fetched(x) for name, x in zip(names, given, strict=True)}

    def fetched(self, x):
        """A device's array as numpy's."""
        if self.local:
            return x.to_host()
        # By a buffer of the driver's own: numpy's memory is not aligned as some of them ask.
        view = x._buffer_view
        source, kind = view.get_buffer(), int(rt.MemoryType.HOST_LOCAL | rt.MemoryType.DEVICE_VISIBLE)
        usage = int(rt.BufferUsage.TRANSFER_TARGET | rt.BufferUsage.MAPPING_SCOPED)
        size = source.byte_length()
        staged = self.device.allocator.allocate_buffer(kind, usage, allocation_size=size)
        done = self.device.create_semaphore(0)
        self.device.queue_copy(source, staged, rt.HalFence.create_at(done, 0), rt.HalFence.create_at(done, 1))
        rt.HalFence.create_at(done, 1).wait()
        return staged.map().asarray(view.shape, rt.HalElementType.map_to_dtype(view.element_type)).copy()

    def inputs(self, ids, width, step, temperature, top_p, seed):
        """What a program takes: the ids in every row, and a sampler's numbers if it has one inside."""
        B = self.manifest["batch"]
        row = np.pad(np.array(ids, np.int32), (0, width - len(ids)))
        found = {"tokens": np.tile(row, (B, 1)), "n_new": np.full(B, len(ids), np.int32)}
        if self.manifest["sampler"]["place"] == "in-graph":
            floats = {"temperature": temperature, "top_p": top_p, "min_p": 0.0}
            found |= {k: np.full(B, v, np.float32) for k, v in floats.items()} | {"top_k": np.zeros(B, np.int32)}
            found |= {"seed": np.full(B, seed, np.uint32), "step": np.full(B, step, np.int32)}
        return found

    def generate(self, ids, *, temperature=0.0, top_p=1.0, seed=0):
        """Token ids that follow the ids, while there is room. Rows of a batch are alike, the first is read."""
        chunk, room, knobs = self.manifest["chunk"], self.manifest["context"], (temperature, top_p, seed)
        if not ids or (room and len(ids) > room):
            sys.exit(f"the prompt has {len(ids)} tokens; this export takes 1 to {room or 'any number'}")
        random = np.random.default_rng(seed)
        self.reset()
        for start in range(0, len(ids), chunk):
            results = self.step("prefill", self.inputs(ids[start : start + chunk], chunk, 0, *knobs))
        for step in itertools.count(1):
            inside = "token" in results
            token = (
                int(results["token"][0]) if inside else sample(results["logits"][0], temperature, top_p, random)
            )
            yield token
            if room and len(ids) + step > room:
                return
            results = self.step("decode", self.inputs([token], 1, step, *knobs))


def sample(logits, temperature, top_p, random):
    """A token by logits f32 [V]: the best at temperature 0, else drawn from those of probability top_p."""
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
    for name, value in (("temperature", 0.0), ("top-p", 1.0), ("seed", 0)):
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
    for token in artifact.generate(ids, temperature=args.temperature, top_p=args.top_p, seed=args.seed):
        if token in ends or len(new) == args.max_new_tokens:
            break
        new.append(token)
    print(tokenizer.decode(new) if tokenizer else ",".join(map(str, new)))


if __name__ == "__main__":
    main()
