"""`jaxllm generate`: continue a prompt."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from jaxllm.commands import common, speculation
from jaxllm.model import Model

if TYPE_CHECKING:
    from jaxllm.generation import Completion, Generation

USAGE = "PROMPT [options]"
SUMMARY = "continue a prompt"
DESCRIPTION = "Continue PROMPT (- is the standard input): text as it comes, or JSON."


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help=argparse.SUPPRESS)
    common.model_arguments(parser)
    parser.add_argument("--max-new-tokens", metavar="N", type=common.whole, default=128, help="default: 128")
    common.decoding_arguments(parser)
    parser.add_argument(
        "--n", metavar="N", type=common.whole, default=1, help="completions to sample (default: 1)"
    )
    parser.add_argument(
        "--stop", metavar="S", action="append", default=[], help="end before this text; repeatable"
    )
    parser.add_argument("--logprobs", metavar="K", type=common.count, help="top K of each token; needs --json")
    parser.add_argument(
        "--overflow",
        metavar="POLICY",
        choices=("error", "evict-oldest", "clear"),
        default="error",
        help="of the context: error, evict-oldest or clear",
    )
    speculation.arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object: text, tokens, timings, ...")


def run(args: argparse.Namespace) -> None:
    if args.logprobs is not None and not args.json:
        args.fail("--logprobs appear in the JSON object only; give --json too")
    sampler, seed = common.make_sampler(args)
    if args.n > 1 and seed is None:
        args.fail("--n completions of greedy decoding are all the same; give --temperature")
    model = common.load_model(args)
    options = dict(
        max_new_tokens=args.max_new_tokens,
        sampler=sampler,
        key=common.key_of(seed),
        stop=args.stop or None,
        max_len=args.max_len,
        overflow=args.overflow,
        speculative=speculation.make(args, model),
    )
    prompt = common.prompt_text(args.prompt)
    if args.json or args.n > 1:
        _at_once(args, model, prompt, seed, options)
    else:
        _stream(args, model, prompt, seed, options)


def _stream(args: argparse.Namespace, model: Model, prompt: str, seed: int | None, options: dict) -> None:
    from jaxllm import decode

    common.report_seed(args, seed)
    for token in decode.stream(model, prompt, **options):
        common.write(token.text)
    common.write("\n")


def _at_once(args: argparse.Namespace, model: Model, prompt: str, seed: int | None, options: dict) -> None:
    from jaxllm import decode

    made = decode.generate(model, prompt, n=args.n, logprobs=args.logprobs or 0, **options)
    if args.json:
        common.write_json(as_json(model, made, seed=seed, logprobs=args.logprobs is not None))
        return
    common.report_seed(args, seed)
    for i, text in enumerate(made.texts):
        common.write(f"[{i + 1}] {text}\n")


def as_json(model: Model, made: Generation, *, seed: int | None, logprobs: bool) -> dict[str, Any]:
    """The object `--json` prints: the first completion, what all share, and with n > 1 all `completions`."""
    each = [_completion(model, c, logprobs) for c in made]
    shared = {
        "model": model.name,
        "seed": seed,
        "prompt_tokens": len(made[0].prompt_tokens),
        "prompt_token_ids": made[0].prompt_tokens,
        "timings": {
            "prefill_s": made.timings.prefill,
            "decode_s": made.timings.decode,
            "tokens_per_second": made.timings.tokens_per_second,
        },
    }
    if made.speculation is not None:
        shared["speculation"] = speculation.as_json(made.speculation)
    return each[0] | shared | ({"completions": each} if len(each) > 1 else {})


def _completion(model: Model, c: Completion, logprobs: bool) -> dict[str, Any]:
    out: dict[str, Any] = {"text": c.text, "tokens": c.tokens, "finish_reason": c.finish_reason}
    if not logprobs:
        return out
    tops = c.top or [None] * len(c.tokens)
    rows = zip(c.tokens, c.pieces, c.logprobs, tops, strict=True)
    return out | {"logprobs": [{"id": i, "text": t, "logprob": p, "top": _top(c, top)} for i, t, p, top in rows]}


def _top(c: Completion, top: Any) -> list[dict[str, Any]]:
    if top is None:
        return []
    rows = zip(top.ids, top.logprobs, strict=True)
    return [{"id": i, "text": c.names.get(i), "logprob": p} for i, p in rows]
