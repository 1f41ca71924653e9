"""`jaxllm info`: what a model is and what memory it needs, from its config alone."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from typing import TYPE_CHECKING, Any

from jaxllm import native
from jaxllm.checkpoint.source import open_source
from jaxllm.commands import common
from jaxllm.config import MLA, MLP, Attention, Block, ModelConfig, MoE, Norm, Rope
from jaxllm.model import CONFIG_FILES, DTYPES, config_of, find
from jaxllm.quant import FORMATS

if TYPE_CHECKING:
    from jaxllm.plan import Plan

USAGE = "[MODEL] [options]"
SUMMARY = "architecture, parameters and memory of a model"
DESCRIPTION = "What a model is and what memory it needs, from its config; no weights are read."

Sections = list[tuple[str, list[tuple[str, str]]]]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="checkpoint folder or hub id (default: bundled)")
    parser.add_argument("--context", metavar="N", type=common.whole, help="tokens a row holds (default: the most)")
    parser.add_argument("--batch", metavar="B", type=common.whole, default=1, help="rows (default: 1)")
    parser.add_argument("--chunk", metavar="C", type=common.whole, help="tokens per prefill step (default: 128)")
    parser.add_argument(
        "--dtype", metavar="TYPE", choices=DTYPES, help=f"{', '.join(DTYPES)} (default: as stored)"
    )
    parser.add_argument("--format", metavar="F", help="of the weights, as `jaxllm quantize` makes it")
    parser.add_argument("--formats", action="store_true", help="a table of every weight format instead")
    parser.add_argument("--json", action="store_true", help="one JSON object, bytes as numbers")


def run(args: argparse.Namespace) -> None:
    from jaxllm.plan import plan

    source = open_source(find(args.model, files=CONFIG_FILES))
    config = config_of(source, args.context)
    room = dict(batch=args.batch, context=args.context, chunk=args.chunk, dtype=args.dtype)
    if args.formats:
        if args.format:
            args.fail("--formats shows them all; leave out --format")
        _every_format(args, every_plan(config, **room))
        return
    needs = plan(config, **room, format=args.format)
    if not args.format and (stored := source.packed_bytes):
        needs = dataclasses.replace(needs, parameter_bytes=stored, format="their own format")
    name, kind = args.model or source.path.name, source.values.get("model_type")
    if args.json:
        common.write_json(as_json(name, kind, config, needs))
        return
    machine = ("this machine", [("native CPU kernels", native.describe())])
    show([_architecture(name, kind, config), _parameters(needs), _memory(needs), machine])


def as_json(name: str, kind: str, config: ModelConfig, needs: Plan) -> dict[str, Any]:
    """The object `--json` prints; memory in bytes."""
    whole = dataclasses.asdict(needs) | {
        "total_bytes": needs.total_bytes,
        "bits_per_weight": needs.bits_per_weight,
    }
    counts = ("parameters", "active_parameters", "parts")
    return {
        "model": name,
        "model_type": kind,
        "native_kernels": native.describe(),
        "architecture": {
            **{f: getattr(config, f) for f in ("width", "vocab", "max_len", "dtype", "tied")},
            "layers": len(config.blocks),
            "blocks": [{"layers": at, **describe(b)} for b, at in groups(config)],
        },
        **{name: whole[name] for name in counts},
        "memory": {name: value for name, value in whole.items() if name not in counts},
    }


def every_plan(
    config: ModelConfig,
    *,
    batch: int = 1,
    context: int | None = None,
    chunk: int | None = None,
    dtype: str | None = None,
) -> dict[str, Plan]:
    """The plan of every weight format by name, and that of no format as "as stored". Arguments as in `plan`;
    dtype is of formats that bring none."""
    from jaxllm.plan import plan

    def one(name: str | None) -> Plan:
        own = name and FORMATS[name].dtype
        return plan(config, batch=batch, context=context, chunk=chunk, dtype=own or dtype, format=name)

    return {"as stored": one(None)} | {name: one(name) for name in FORMATS}


def _every_format(args: argparse.Namespace, plans: dict[str, Plan]) -> None:
    if args.json:
        columns = ("bits_per_weight", "parameter_bytes", "state_bytes", "total_bytes", "dtype")
        common.write_json({name: {c: getattr(p, c) for c in columns} for name, p in plans.items()})
        return
    first = next(iter(plans.values()))
    title = f"memory: batch {first.batch}, context {first.context:,}, chunk {first.chunk}"
    head = (
        "format",
        f"{'bits/weight':>11}  {'parameters':>10}  {'state':>9}  {'at most, about':>14}  computes in",
    )
    rows = sorted(plans.items(), key=lambda item: item[1].parameter_bytes)
    show([(title, [head, *((name, _format_row(p)) for name, p in rows)])])


def _format_row(p: Plan) -> str:
    sizes = f"{size(p.parameter_bytes):>10}  {size(p.state_bytes):>9}  {size(p.total_bytes):>14}"
    return f"{p.bits_per_weight:11.3f}  {sizes}  {p.dtype}"


# ---- blocks in words ------------------------------------------------------------------------------------


def groups(config: ModelConfig) -> list[tuple[Block, list[int]]]:
    """Each different block and the layers that are such."""
    found: dict[Block, list[int]] = {}
    for i, block in enumerate(config.blocks):
        found.setdefault(block, []).append(i)
    return list(found.items())


def spans(numbers: list[int]) -> str:
    """Sorted numbers, shortened: "0-4, 6", or "0, 2 .. 24" where the step is another than 1."""
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    if len(steps) == 1 and len(numbers) > 3 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]} .. {numbers[-1]}"
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def describe(block: Block) -> dict[str, str]:
    """A block's parts in words."""
    place = {(True, False): "before", (False, True): "after", (True, True): "before and after"}
    where = place.get((block.pre, block.post), "none")
    parts = {"mixer": _mixer(block.mixer), "ffn": _ffn(block.ffn), "norm": f"{block.norm.kind} norm {where}"}
    return parts | {"wiring": ", ".join(_extras(block, "mixer ffn norm pre post"))}


def _mixer(m: Any) -> str:
    match m:
        case Attention():
            head = f"attention {m.heads}/{m.kv_heads} heads of {m.head_dim}"
            return ", ".join([head, *_extras(m, "heads kv_heads head_dim scale")])
        case MLA():
            return ", ".join([f"latent attention {m.heads} heads", *_extras(m, "heads scale norm")])
    return ", ".join([type(m).__name__.lower(), *_extras(m, "norm")])


def _ffn(m: MLP | MoE | None) -> str:
    match m:
        case None:
            return "none"
        case MLP():
            head = f"mlp {m.hidden} {m.act}{' gated' if m.gated else ''}"
            return ", ".join([head, *_extras(m, "hidden act gated")])
    head = f"{m.top_k} of {m.experts} experts of {m.hidden} {m.act}"
    return ", ".join([head, *_extras(m, "experts top_k hidden act")])


def _extras(part: Any, known: str) -> list[str]:
    """The other fields of a part that differ from their defaults, in words."""
    fields = [f for f in dataclasses.fields(part) if f.name not in known.split()]
    return [_word(f.name.replace("_", " "), v) for f in fields if (v := getattr(part, f.name)) != f.default]


def _word(name: str, value: Any) -> str:
    match value:
        case Rope():
            return f"rope of {value.dims}"
        case Norm():
            return f"{value.kind} {name}"
        case bool() | None:
            return name if value else f"no {name}"
        case str() | int() | float():
            return f"{name} {value}"
    return name


# ---- the table ------------------------------------------------------------------------------------------


def _architecture(name: str, kind: str, config: ModelConfig) -> tuple[str, list[tuple[str, str]]]:
    rows = [
        ("type", str(kind)),
        ("width", f"{config.width:,}"),
        ("vocabulary", f"{config.vocab:,}{', head tied to the embedding' if config.tied else ''}"),
        ("context", f"{config.max_len:,} tokens"),
        ("stored as", config.dtype),
    ]
    for block, at in groups(config):
        label = f"layer{'s' if len(at) > 1 else ''} {spans(at)}"
        rows.append((label, "; ".join(text for text in describe(block).values() if text)))
    return name, rows


def _parameters(needs: Plan) -> tuple[str, list[tuple[str, str]]]:
    rows = [(part, f"{n:>16,}  {n / needs.parameters:6.1%}") for part, n in needs.parts.items()]
    rows.append(("total", f"{needs.parameters:>16,}"))
    if needs.active_parameters != needs.parameters:
        rows.append(("used per token", f"{needs.active_parameters:>16,}"))
    return "parameters", rows


def _memory(needs: Plan) -> tuple[str, list[tuple[str, str]]]:
    title = f"memory: batch {needs.batch}, context {needs.context:,}, chunk {needs.chunk}, {needs.dtype}"
    if needs.format:
        title += f", weights in {needs.format} ({needs.bits_per_weight:.3f} bits each)"
    sizes = {
        "parameters": needs.parameter_bytes,
        "state (cache)": needs.state_bytes,
        "activations, about": needs.activation_bytes,
        "logits": needs.logits_bytes,
        "at most, about": needs.total_bytes,
    }
    return title, [(name, f"{size(n):>16}") for name, n in sizes.items()]


def size(n: int) -> str:
    """Bytes in decimal units."""
    value, units = float(n), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{n} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def show(sections: Sections) -> None:
    """Titled tables on a terminal, lines elsewhere."""
    _show_rich(sections) if sys.stdout.isatty() else _show_plain(sections)


def _show_plain(sections: Sections) -> None:
    blocks = []
    for title, rows in sections:
        width = max(len(name) for name, _ in rows)
        blocks.append("\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)]))
    common.write("\n\n".join(blocks) + "\n")


def _show_rich(sections: Sections) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for title, rows in sections:
        table = Table(title=Text(title), title_justify="left", show_header=False)
        for name, value in rows:
            table.add_row(Text(name, style="bold"), Text(value))
        console.print(table)
