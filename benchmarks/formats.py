"""What every weight format costs: bits, nats per token, divergence and top-1 agreement, as a table in Markdown.

    python benchmarks/formats.py [--windows 24] [--stories FOLDER WINDOWS.npz] [--only q4f16_1,...] [--out FILE]

Text: the first window of 512 tokens of held-out files of the standard library of the running Python (see
jaxllm/bundled/README.md). --stories adds a second model with its windows of tokens [n, 256] ("windows" in the
.npz), the 260,000 parameters of karpathy/tinyllamas, for which other programs' figures are known.

Weights are quantized by plain rounding, expanded again and run in float32, all formats in one compiled program: so
a row shows what its weights lose and nothing else. Formats that round activations run packed, as they always do.
Q4_0, Q4_1 and Q8_0 are llama.cpp's, its rounding written out here (ggml-quants.c), on the same matrices as ours.
"""

from __future__ import annotations

import argparse
import hashlib
import pathlib
import sys
import sysconfig
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

import jaxllm
from jaxllm.comparison import Comparison, compare
from jaxllm.model import Model
from jaxllm.quant import FORMATS, QTensor, dequantize
from jaxllm.quant.recipe import quantize_model

CONTEXT = 512
LEFT_OUT = ("encodings", "pydoc_data", "site-packages", "lib2to3/tests/data", "idlelib/Icons", "__pycache__")


def held_out() -> list[str]:
    """Texts of the files that the bundled models never saw: one in fifty, by the hash of the path."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        if digest % 50 == 0 and not any(part in name for part in LEFT_OUT):
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return [text for text in texts if text.strip()]


def expanded(model: Model) -> Model:
    """Every packed weight as the float32 values it stands for, so that one program serves all formats."""

    def leaf(x):
        return dequantize(x, jnp.float32) if isinstance(x, QTensor) else x.astype("float32")

    params = jax.tree.map(leaf, model.params, is_leaf=lambda x: isinstance(x, QTensor))
    return replace(model, params=params, config=replace(model.config, dtype="float32"))


def ggml(x: np.ndarray, name: str) -> np.ndarray:
    """Groups x f32 [.., 32] as llama.cpp's `quantize_row_*_ref` rounds them; scales in float16."""
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    extreme = np.where(high > -low, high, low)
    d, least = {
        "Q4_0": (extreme / -8, None),
        "Q4_1": ((high - low) / 15, low),
        "Q8_0": (np.maximum(high, -low) / 127, None),
    }[name]
    over = np.divide(1, d, out=np.zeros_like(d), where=d != 0)
    stored = d.astype(np.float16).astype(np.float32)
    if name == "Q4_0":
        return (np.minimum(15, np.trunc(x * over + 8.5)) - 8) * stored
    if name == "Q4_1":
        codes = np.minimum(15, np.trunc((x - least) * over + 0.5))
        return codes * stored + least.astype(np.float16).astype(np.float32)
    return np.rint(x * over) * stored


GGML_BITS = {"Q4_0": 4.5, "Q4_1": 5.0, "Q8_0": 8.5}


def llama_cpp(model: Model, name: str) -> tuple[float, Model]:
    """(bits per weight, model) with every matrix that our formats take in one of llama.cpp's."""
    packed = quantize_model(model, "int4_g32").params
    bits = []

    def leaf(q, x):
        if not isinstance(q, QTensor):
            bits.append(8 * x.nbytes)
            return x
        bits.append(GGML_BITS[name] * x.shape[0] * -(-x.shape[1] // 32) * 32)
        x = np.pad(np.asarray(x, np.float32), ((0, 0), (0, -x.shape[1] % 32)))
        return jnp.asarray(ggml(x.reshape(len(x), -1, 32), name).reshape(x.shape)[:, : q.columns])

    params = jax.tree.map(leaf, packed, model.params, is_leaf=lambda q: isinstance(q, QTensor))
    return sum(bits) / model.size, replace(model, params=params)


def one(model: Model, name: str, rows: list[list[int]], context: int) -> tuple[float, Comparison]:
    """(bits per weight, comparison with the float32 model) of a format."""
    if name in GGML_BITS:
        bits, runs = llama_cpp(model, name)
        return bits, compare(model, runs, rows, context=context, by_layer=False)
    packed = quantize_model(model, name)
    runs = packed if FORMATS[name].activations else expanded(packed)
    return 8 * packed.nbytes / packed.size, compare(model, runs, rows, context=context, by_layer=False)


def table(model: Model, rows: list[list[int]], context: int, names: list[str]) -> list[str]:
    """Rows of Markdown, best first of each number of bits."""
    head = ["| format | bits per weight | nats per token | loss, % | ± | KL, mean | KL, 99.9 % | same top token |"]
    lines, head = [], [*head, "|---|---|---|---|---|---|---|---|"]
    for name in names:
        bits, c = one(model, name, rows, context)
        base = c.a.nll.mean
        error = 100 * c.difference.window_error / base
        figures = f"{bits:.3f} | {c.b.nll.mean:.5f} | {100 * c.difference.mean / base:+.3f} | {error:.3f}"
        tail = f"{c.kl_mean:.2e} | {c.kl_quantile(0.999):.2e} | {c.agreement:.2%}"
        lines.append((bits, f"| {name} | {figures} | {tail} |".replace("%", " %")))
        print(lines[-1][1], file=sys.stderr, flush=True)
    count = sum(len(row) - 1 for row in rows)
    said = f"{count:,} tokens in {len(rows)} windows; float32: {base:.5f} nats per token."
    return [said, "", *head, *(line for _, line in sorted(lines, key=lambda x: x[0]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=24, help="files to read the beginning of")
    parser.add_argument("--stories", nargs=2, metavar=("FOLDER", "NPZ"), type=pathlib.Path)
    parser.add_argument("--only", help="formats, with commas between (default: all)")
    parser.add_argument("--out", type=pathlib.Path, help="where to write (default: the standard output)")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else [*GGML_BITS, *FORMATS]
    model = jaxllm.load(dtype="float32")
    ids = [model.tokenizer.encode(text)[:CONTEXT] for text in held_out()]
    rows = [row for row in ids if len(row) == CONTEXT][: options.windows]
    text = ["## The bundled model", "", *table(model, rows, CONTEXT, names)]
    if options.stories:
        folder, windows = options.stories
        rows = np.load(windows)["windows"].tolist()
        text += ["", "## stories260K", "", *table(jaxllm.load(folder), rows, len(rows[0]), names)]
    if options.out:
        options.out.write_text("\n".join(text) + "\n")
    else:
        print("\n".join(text))


if __name__ == "__main__":
    main()
