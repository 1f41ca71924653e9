"""Draw tokens/s against the roofline, from JSON lines of `jaxllm bench --json`.

    python -m jaxllm bench --shape llama-3.2-1b --format int4_g32 --json >> results.jsonl
    python benchmarks/roofline.py results.jsonl decode.png

Each line becomes a bar up to its median, with the smallest and largest as a whisker, below what memory (decode) or
arithmetic (--prefill) would have allowed in the same rounds; peers measured beside it are points. Needs matplotlib
(pip install 'jaxllm[notebook]').
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

KINDS = {
    "decode": ("decode_tok_s", "decode_roofline_tok_s", "memory reads {bandwidth_gb_s:.1f} GB/s"),
    "prefill": ("prefill_tok_s", "prefill_roofline_tok_s", "bf16 products {matmul_tflop_s:.2f} TFLOP/s"),
}
MARKS = "osD^vP*X"


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a file, each what `jaxllm bench --json` printed."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    wrong = [i + 1 for i, line in enumerate(lines) if "decode_roofline_tok_s" not in line]
    if wrong or not lines:
        where = f"line {wrong[0]}" if wrong else "it"
        raise SystemExit(f"{path}: {where} holds nothing that `jaxllm bench --json` printed")
    return lines


def draw(lines: list[dict[str, Any]], kind: str) -> Any:
    """The figure of one kind: "decode" or "prefill"."""
    from matplotlib.figure import Figure

    rate, most, limit = KINDS[kind]
    figure = Figure(figsize=(max(4.5, 1.1 * len(lines) + 2), 4.2), layout="constrained")
    axes = figure.add_subplot()
    for i, line in enumerate(lines):
        axes.bar(i, line[most], width=0.8, color="#e4e4e4", label="what the machine allows" if i == 0 else None)
        span = line["spread"][rate]
        whisker = [[line[rate] - span["min"]], [span["max"] - line[rate]]]
        axes.bar(i, line[rate], width=0.5, color="#3b6fb6", yerr=whisker, label="jaxllm" if i == 0 else None)
        share = f"{line[rate]:.3g}\n{line[rate] / line[most]:.0%}".replace("%", " %")
        axes.text(i, 0.9 * line[rate], share, ha="center", va="top", color="white", fontsize=9)
    _peers(axes, lines, rate)
    axes.set_xticks(range(len(lines)), list(map(_name, lines)), fontsize=8)
    axes.set(ylabel=f"{kind}, tokens/s", yscale="log", ylim=(min(line[rate] for line in lines) / 4, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(limit.format(**lines[0]) + f", {lines[0]['processor']}", fontsize=9)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=6)
    return figure


def _name(line: dict[str, Any]) -> str:
    rows = f"\n{line['batch']} rows" if line["batch"] > 1 else ""
    return f"{line['shape'] or line['model']}\n{line['format']}{rows}"


def _peers(axes: Any, lines: list[dict[str, Any]], rate: str) -> None:
    names = list(dict.fromkeys(name for line in lines for name in line.get("peers", {})))
    for name, mark in zip(names, MARKS, strict=False):
        found = [(i, line["peers"][name][rate]) for i, line in enumerate(lines) if name in line.get("peers", {})]
        beside = [(i + 0.32, y) for i, y in found]
        axes.scatter(*zip(*beside, strict=True), marker=mark, color="black", s=22, zorder=3, label=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path, help="a file of JSON lines")
    parser.add_argument("picture", type=pathlib.Path, help="the file to write, .png or .svg")
    parser.add_argument("--prefill", action="store_true", help="prefill instead of decode")
    options = parser.parse_args()
    draw(read(options.results), "prefill" if options.prefill else "decode").savefig(options.picture, dpi=150)


if __name__ == "__main__":
    main()
