"""A model for EleutherAI's lm-evaluation-harness: `lm_eval.simple_evaluate(model=harness(model), tasks=[...])`.

What is computed is what the harness's own models compute (its `api/model.py` and `models/huggingface.py`): how
contexts and continuations are cut into tokens, what an empty context stands for, and how long texts roll.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax

from jaxllm import decode, sampling
from jaxllm.errors import ContextError, JaxllmError, MissingExtraError, TokenizerError
from jaxllm.model import Model
from jaxllm.scoring import score_rows

SOME = 256  # requests scored at a time
# The harness's names for the most tokens to generate, in its order of precedence.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

Pair = tuple[list[int], list[int]]  # tokens of a context and of what follows it


class Instance(Protocol):
    """A request of the harness."""

    args: tuple


class Requests:
    """The three kinds of request, without the harness. `harness` makes its LM of this.

    batch_size: completions generated at a time. max_gen_toks: tokens of a completion whose request names no
    number. seed: of the requests that sample.
    """

    def __init__(self, model: Model, *, batch_size: int = 8, max_gen_toks: int = 256, seed: int = 0):
        super().__init__()
        if model.tokenizer is None:
            raise TokenizerError(f"{model.name} has no tokenizer; put its files beside config.json")
        self.model, self.tokenizer, self.batch_size = model, model.tokenizer, batch_size
        self.max_gen_toks, self.seed = max_gen_toks, seed
        self.max_length = model.config.max_len
        prefix = (self.tokenizer.bos_id, self.tokenizer.eos_id, *sorted(model.eos_ids))
        self.prefix_token_id = next((i for i in prefix if i is not None), None)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding would give it) of (context, continuation).

        Long contexts lose their beginning. Raises ContextError for a continuation beyond the model's context."""
        found = self._score([self._pair(*request.args) for request in requests])
        self._remember("loglikelihood", requests, found)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text (text,). Every token counts once; windows after the first predict
        what is new with a full context."""
        found = []
        for request in requests:
            (text,) = request.args
            tokens = self.tokenizer.encode(text, add_special=False)
            found.append(sum(value for value, _ in self._score(list(self._rolling(tokens)))))
        self._remember("loglikelihood_rolling", requests, found)
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completions of (context, options); they end before any of `until`.

        Raises JaxllmError for an option that generation does not know."""
        found: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for members in groups.values():
            contexts = [requests[i].args[0] for i in members]
            for i, text in zip(members, self._generate(contexts, requests[members[0]].args[1]), strict=True):
                found[i] = text
        self._remember("generate_until", requests, found)
        return found

    # ---- chat ---------------------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """What the harness names its cache of prompts by."""
        return self.model.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, for the harness's records; None where it is not to be applied."""
        source = self.tokenizer.chat_template
        if chat_template is False or source is None:
            return None
        return source if isinstance(source, str) else source.get(chat_template, source.get("default"))

    def apply_chat_template(
        self, chat_history: list[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as text."""
        return self.tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)

    # ---- tokens -------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> list[int]:
        """As the tokenizer does it; a text that already begins with <s> gets no second one."""
        bos = self.tokenizer.bos_id
        return self.tokenizer.encode(
            text, add_special=bos is None or not text.startswith(self.tokenizer.token(bos))
        )

    def _pair(self, context: str, continuation: str) -> Pair:
        if context == "":
            return self._after_prefix(self.tokenizer.encode(continuation, add_special=False))
        spaces = len(context) - len(context.rstrip())
        if spaces:  # they are part of the next word's tokens
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        whole, before = self._encode(context + continuation), self._encode(context)
        return before, whole[len(before) :]

    def _after_prefix(self, tokens: list[int]) -> Pair:
        if tokens[:1] == [self.prefix_token_id]:
            return tokens[:1], tokens[1:]
        return [self._prefix()], tokens

    def _prefix(self) -> int:
        if self.prefix_token_id is None:
            raise TokenizerError(
                f"{self.model.name} names neither a first nor a last token, which an empty context would stand for"
            )
        return self.prefix_token_id

    def _rolling(self, tokens: list[int]) -> Iterator[Pair]:
        """(context, predicted) windows of at most max_length tokens together."""
        size = self.max_length - 1
        if not tokens:
            return
        yield [self._prefix()], tokens[:size]
        for start in range(size, len(tokens), size):
            end = min(start + size, len(tokens))
            yield tokens[end - size - 1 : start], tokens[start:end]

    # ---- answers ------------------------------------------------------------------------------------------

    def _score(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        """Rows of like length go together, so that little is padded."""
        rows = [self._row(*pair) for pair in pairs]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)  # of an empty continuation
        for at in range(0, len(order), SOME):
            some = [i for i in order[at : at + SOME] if pairs[i][1]]
            for i, scored in zip(some, score_rows(self.model, [rows[i] for i in some], 1), strict=True):
                new = len(pairs[i][1])
                best = [top.ids[0] for top in scored.top[-new:]]
                found[i] = (sum(scored.logprobs[-new:]), best == pairs[i][1])
        return found

    def _row(self, context: list[int], continuation: list[int]) -> list[int]:
        if len(continuation) >= self.max_length:
            raise ContextError(
                f"a continuation of {len(continuation)} tokens was asked for, but the context is {self.max_length}"
            )
        return (context + continuation)[-self.max_length :]

    def _generate(self, contexts: list[str], options: Mapping[str, Any]) -> list[str]:
        until, count, sampler = self._options(options)
        room = self.max_length - count
        if room < 1:
            raise ContextError(f"{count} tokens were asked for, but the context is {self.max_length}")
        rows = [self._encode(text)[-room:] for text in contexts]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found = [""] * len(rows)
        for at in range(0, len(order), self.batch_size):
            some = order[at : at + self.batch_size]
            key = jax.random.fold_in(jax.random.key(self.seed), at)
            made = decode.generate(
                self.model,
                [rows[i] for i in some],
                max_new_tokens=count,
                stop=until or None,
                sampler=sampler,
                key=key,
            )
            for i, text in zip(some, made.texts, strict=True):
                found[i] = text
        return found

    def _options(self, options: Mapping[str, Any]) -> tuple[list[str], int, sampling.Sampler]:
        """(strings that end a completion, the most tokens, sampler)."""
        if unknown := sorted(options.keys() - {"until", "do_sample", *LENGTHS, *SAMPLING}):
            raise JaxllmError(
                f"generation knows no {', '.join(unknown)}; take it out of the task's generation_kwargs"
            )
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else [text for text in until if text]
        count = next((int(options[name]) for name in LENGTHS if options.get(name) is not None), self.max_gen_toks)
        warm = options.get("do_sample", float(options.get("temperature") or 0) > 0)
        given = {name: options[name] for name in SAMPLING if options.get(name) is not None}
        if not warm:
            given = {name: given[name] for name in ("repetition_penalty",) if name in given} | {"temperature": 0.0}
        return until, count, sampling.sampler(**given)

    def _remember(self, kind: str, requests: Sequence[Instance], found: Sequence[Any]) -> None:
        """Give the answers to the harness's cache, where there is one."""
        hook: Any = getattr(self, "cache_hook", None)
        add: Callable | None = getattr(hook, "add_partial", None)
        for request, answer in zip(requests, found, strict=True):
            if add:
                add(kind, request.args, answer)


def harness(model: Model, *, batch_size: int = 8, max_gen_toks: int = 256, seed: int = 0) -> Any:
    """The model as the harness's `lm_eval.api.model.LM`; arguments as `Requests` takes them.

    Raises MissingExtraError without lm_eval."""
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise MissingExtraError(
            "the evaluation harness is not installed: pip install 'jaxllm[lm_eval]'"
        ) from error

    class JaxLM(Requests, LM):
        """jaxllm in the evaluation harness."""

    return JaxLM(model, batch_size=batch_size, max_gen_toks=max_gen_toks, seed=seed)
