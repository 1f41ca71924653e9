"""Train the two models that ship with jaxllm: a small Llama-style target and a draft of about a tenth of it.

    python tools/train_bundled.py tokenizer WORK
    python tools/train_bundled.py train WORK --size target --steps 9000 --decay 2500
    python tools/train_bundled.py train WORK --size draft --steps 6000 --decay 1500
    python tools/train_bundled.py evaluate WORK
    python tools/train_bundled.py text WORK

The last writes train.txt and held.txt, which `python -m jaxllm train-heads` takes.

The corpus is the Python source of CPython's own standard library, as installed with the interpreter that
runs this script (PSF licence). One file in fifty, chosen by the hash of its path, is held out whole.
Needs torch and transformers; nothing at run time of the package does.
"""

import argparse
import hashlib
import json
import lzma
import math
import pathlib
import shutil
import signal
import sysconfig
import time

import numpy as np

SEED = 20
EOS = "<|endoftext|>"
VOCAB = 4096
HELD_OUT_ONE_IN = 50
# Tables of data written as Python, not code anyone would complete.
LEFT_OUT = ("site-packages", "encodings", "pydoc_data", "lib2to3/tests/data", "idlelib/Icons", "__pycache__")

SIZES = {
    "target": dict(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "draft": dict(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    ),
}
CONTEXT = 1024
# The model was never trained on conversations: turns are joined, and it goes on writing Python.
CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{{ message.content }}
{% endfor %}"""


def corpus():
    """Two lists of (path, source): training files and held-out files."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    train, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in name for part in LEFT_OUT):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if not text.strip():
            continue
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        (held_out if digest % HELD_OUT_ONE_IN == 0 else train).append((name, text))
    return train, held_out


def train_tokenizer(work):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    train, _ = corpus()
    tokenizer = Tokenizer(models.BPE())
    # Llama 3's split, so that runs of spaces (Python's indentation) become single tokens.
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in train), trainer)
    tokenizer.save(str(work / "tokenizer.json"))


def encode(work, files):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    eos = tokenizer.token_to_id(EOS)
    streams = [[eos, *encoding.ids] for encoding in tokenizer.encode_batch([text for _, text in files])]
    return [np.array(stream, np.int32) for stream in streams]


def build(size):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
        **SIZES[size],
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config).float()
    for name, p in model.named_parameters():
        if p.ndim == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = p.shape[1] ** -0.5 / (math.sqrt(2 * config.num_hidden_layers) if residual else 1.0)
            torch.nn.init.normal_(p, std=0.02 if "embed" in name else std)
    return model


def batches(streams, batch, length, seed):
    """Endless (batch, length + 1) windows over the shuffled, concatenated files; every epoch shuffles anew."""
    rng = np.random.default_rng(seed)
    while True:
        stream = np.concatenate([streams[i] for i in rng.permutation(len(streams))])
        stream = stream[rng.integers(length) :]
        n = (len(stream) - 1) // length
        windows = np.stack([stream[i * length : i * length + length + 1] for i in range(n)])
        windows = windows[rng.permutation(n)]
        for i in range(0, n - batch + 1, batch):
            yield windows[i : i + batch]


def optimizers(model, lr, matrix_lr):
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norms."""
    import torch

    inside = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(inside, lr=matrix_lr, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def nll(model, tokens):
    import torch
    import torch.nn.functional as F

    x = torch.as_tensor(tokens).long()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten())


def bits_per_byte(model, streams, files, length=CONTEXT, stride=512):
    """Total code length of the held-out files over their UTF-8 bytes; windows overlap by `stride` tokens."""
    import torch
    import torch.nn.functional as F

    total = 0.0
    with torch.no_grad():
        for stream in streams:
            done = 1
            for start in range(0, max(len(stream) - 1, 1), stride):
                window = torch.as_tensor(stream[start : start + length]).long()[None]
                if start + length <= done or window.shape[1] < 2:
                    continue
                logp = F.log_softmax(model(window[:, :-1], use_cache=False).logits.float(), -1)
                each = -logp.gather(-1, window[:, 1:, None])[0, :, 0]
                total += each[done - start - 1 :].sum().item()
                done = start + window.shape[1]
    return total / math.log(2) / sum(len(text.encode()) for _, text in files)


def train(work, size, steps, decay, batch, length, lr, matrix_lr, compile_model):
    import torch

    files, held_files = corpus()
    streams, held = encode(work, files), encode(work, held_files)
    model = build(size)
    print(f"{size}: {sum(p.numel() for p in model.parameters()):,} parameters,", end=" ")
    print(f"{sum(map(len, streams)):,} training tokens, {sum(map(len, held)):,} held out", flush=True)
    opts = optimizers(model, lr, matrix_lr)
    fast = torch.compile(model, dynamic=False) if compile_model else model
    state = {"step": 0, "end": steps}
    saved = work / f"{size}.pt"
    if saved.exists():
        ckpt = torch.load(saved, weights_only=True)
        model.load_state_dict(ckpt["model"])
        for opt, values in zip(opts, ckpt["opts"], strict=True):
            opt.load_state_dict(values)
        state = {"step": ckpt["state"]["step"], "end": steps}
    base = [
        [g["lr"] if not saved.exists() else rate for g in o.param_groups]
        for o, rate in zip(opts, (matrix_lr, lr), strict=True)
    ]
    # SIGUSR1: begin the decay now.
    signal.signal(signal.SIGUSR1, lambda *_: state.update(end=min(state["end"], state["step"] + decay)))
    # Long windows only in the decay: short ones are cheaper and the rest is position-independent.
    data = batches(streams, batch, length, SEED + state["step"])
    long_data = batches(streams, batch * length // CONTEXT, CONTEXT, SEED + 1)
    clock, losses = time.time(), []
    while state["step"] < state["end"]:
        step = state["step"]
        left = (state["end"] - step) / decay
        rate = min(1.0, (step + 1) / 200, max(left, 0.02))
        for opt, rates in zip(opts, base, strict=True):
            for group, value in zip(opt.param_groups, rates, strict=True):
                group["lr"] = value * rate
        loss = nll(fast, next(long_data if left < 1 else data))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        losses.append(loss.item())
        state["step"] += 1
        if state["step"] % 100 == 0:
            seconds, clock = time.time() - clock, time.time()
            print(
                f"{size} step {state['step']}/{state['end']} loss {np.mean(losses[-100:]):.4f} "
                f"lr x{rate:.3f} {100 * batch * length / seconds:.0f} tokens/s",
                flush=True,
            )
        if state["step"] % 500 == 0 or state["step"] == state["end"]:
            print(
                f"{size} held-out bits per byte {bits_per_byte(model, held[:12], held_files[:12]):.4f} (12 files)",
                flush=True,
            )
            part = saved.with_suffix(".part")
            torch.save(dict(model=model.state_dict(), opts=[o.state_dict() for o in opts], state=state), part)
            part.replace(saved)
    save(work, size, model)


def save(work, size, model):
    import torch

    out = work / size
    model.to(torch.bfloat16).save_pretrained(out)
    shutil.copy(work / "tokenizer.json", out)
    config = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=EOS,
        eos_token=EOS,
        add_bos_token=True,
        add_eos_token=False,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    # These end tokens are what a generation stops at.
    (out / "generation_config.json").write_text(
        json.dumps(dict(bos_token_id=0, eos_token_id=[0]), indent=2) + "\n"
    )


def evaluate(work):
    """Bits per byte of both saved models and of xz on the same held-out files."""
    from transformers import AutoModelForCausalLM

    _, files = corpus()
    held = encode(work, files)
    raw = [text.encode() for _, text in files]
    one = sum(len(lzma.compress(b, preset=9 | lzma.PRESET_EXTREME)) for b in raw)
    together = len(lzma.compress(b"".join(raw), preset=9 | lzma.PRESET_EXTREME))
    size = sum(map(len, raw))
    figures = dict(
        held_out_files=len(files),
        held_out_bytes=size,
        tokens=sum(len(s) - 1 for s in held),
        xz_each_file=8 * one / size,
        xz_all_together=8 * together / size,
    )
    for name in SIZES:
        if (work / name).exists():
            model = AutoModelForCausalLM.from_pretrained(work / name).float().eval()
            figures[name] = bits_per_byte(model, held, files)
    print(json.dumps(figures, indent=2))
    (work / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


def text(work):
    """The files as two texts, to train on and held out."""
    for name, files in zip(("train", "held"), corpus(), strict=True):
        (work / f"{name}.txt").write_text("\n".join(source for _, source in files), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["tokenizer", "train", "evaluate", "text"])
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--size", choices=list(SIZES), default="target")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--decay", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=3e-3, help="AdamW: embedding and norms")
    parser.add_argument("--matrix-lr", type=float, default=3e-3, help="Muon: matrices")
    parser.add_argument("--compile", action="store_true")
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    if a.action == "tokenizer":
        train_tokenizer(a.work)
    elif a.action == "text":
        text(a.work)
    elif a.action == "train":
        train(a.work, a.size, a.steps, a.decay, a.batch, a.length, a.lr, a.matrix_lr, a.compile)
    else:
        evaluate(a.work)


if __name__ == "__main__":
    main()
