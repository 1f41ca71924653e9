"""Reading config.json: typed, with every problem collected, and no field that matters left unread."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from jaxllm.errors import ConfigError

REQUIRED: Any = object()
MOST = 2**31  # no size in a config is larger; keeps a hostile file from taking memory

# Fields that describe training, the file or the tokenizer, not the function the model computes.
HARMLESS = re.compile(
    r"_.*|architectures|model_type|auto_map|(quantization|compression)_config"
    r"|torch_dtype|dtype|transformers(_js)?_(version|config)|name_or_path"
    r"|.*dropout.*|.*pdrop|initializer_.*|init_.*|.*_init(_.*)?|use_cache|cache_implementation|gradient_checkpointing"
    r"|(bos|eos|pad|sep|unk|cls|mask|decoder_start|image|boi|eoi|video|vision_.*|audio.*)_token_(id|index)|.*_token_ids?"
    r"|forced_.*|suppress_tokens|begin_suppress_tokens|output_(attentions|hidden_states|scores|router_logits)"
    r"|return_dict.*|is_(encoder_)?decoder|add_cross_attention|cross_attention_.*|tie_encoder_decoder|torchscript"
    r"|pruned_heads|chunk_size_feed_forward|id2label|label2id|num_labels|problem_type|finetuning_task|task_.*"
    r"|temperature|top_[kp]|typical_p|min_p|do_sample|num_beams|num_beam_groups|num_return_sequences|diversity_penalty"
    r"|early_stopping|length_penalty|repetition_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size|max_length"
    r"|min_length|max_new_tokens|bad_words_ids|remove_invalid_values|exponential_decay_length_penalty|prefix"
    r"|tokenizer_class|pretraining_tp|router_(aux|z)_.*|.*aux_loss.*|aux_loss_alpha|seq_aux|.*z_loss.*|ep_size"
    r"|attn_implementation|use_flash_attn|.*flash.*|use_kernel.*|fused_.*|onnx_.*|problem_type|summary_.*"
    r"|sep_token_id|base_model_.*|scoring_func_.*|unsloth_.*|max_window_layers|model_max_length|training_.*"
)


class Fields:
    """A config.json being read. Every getter takes alternatives "a|b": the first present and not null wins.

    Problems are collected, not raised, so that one error can list them all; a getter that found one returns
    its default, or a harmless value of its type.
    """

    def __init__(self, values: Mapping[str, Any], *, context: int | None = None):
        self.values = dict(values)
        self.context = context  # positions the user asked for, where the rotary table depends on it
        self.read: set[str] = set()
        self.problems: list[str] = []
        self.sections: list[Fields] = []

    def raw(self, names: str, default: Any = None) -> Any:
        found = [n for n in names.split("|") if self.values.get(n) is not None]
        self.read.update(names.split("|"))
        return self.values[found[0]] if found else default

    def _typed(self, names: str, default: Any, kind: str, accept, blank: Any) -> Any:
        value = self.raw(names)
        if value is None:
            if default is not REQUIRED:
                return default
            self.problem(f"{' or '.join(names.split('|'))} is missing; it should be {kind}")
            return blank
        if accept(value):
            return value
        self.problem(f"{names.split('|')[0]} should be {kind}, got {shown(value)}")
        return blank if default is REQUIRED else default

    def int(self, names: str, default: Any = REQUIRED, *, most: int = MOST) -> int:
        """A size or count from 1 to `most`: what becomes Python tuples (layers, heads, rotary dims) is small."""
        kind = f"a whole number from 1 to {most}"
        value = self._typed(names, default, kind, lambda v: _is_count(v) and v <= most, 1)
        return int(value) if isinstance(value, float) else value

    def number(self, names: str, default: Any = REQUIRED) -> float:
        return self._typed(names, default, "a finite number", _is_number, 1.0)

    def flag(self, names: str, default: Any = REQUIRED) -> bool:
        return self._typed(names, default, "true or false", lambda v: isinstance(v, bool), False)

    def text(self, names: str, default: Any = REQUIRED) -> str:
        return self._typed(names, default, "a string", lambda v: isinstance(v, str), "")

    def items(self, names: str, length: int | None = None, default: Any = REQUIRED) -> list:
        """A list, of at least `length` entries where given."""
        kind = "a list" if length is None else f"a list of {length} entries"
        blank = [None] * (length or 0)
        ok = lambda v: isinstance(v, list) and (length is None or len(v) >= length)
        return self._typed(names, default, kind, ok, blank)

    def table(self, names: str, default: Any = REQUIRED) -> dict:
        return self._typed(names, default, "an object", lambda v: isinstance(v, dict), {})

    def section(self, name: str, defaults: Mapping[str, Any] | None = None) -> Fields:
        """The fields of an object in this config, over `defaults`; what is wrong or unread there counts here."""
        inner = Fields(dict(defaults or {}) | self.table(name, {}), context=self.context)
        inner.problems = self.problems
        self.sections.append(inner)
        return inner

    def choice(self, names: str, options: Mapping[str, Any], default: Any = REQUIRED) -> Any:
        """The value an option stands for; anything else is a problem that lists the options."""
        first = next(iter(options.values()))
        value = self._typed(names, default, "a string", lambda v: isinstance(v, str), None)
        if value is None:
            return first
        if value in options:
            return options[value]
        self.problem(f"{names.split('|')[0]} is {shown(value)}; jaxllm knows {', '.join(options)}")
        return first

    def expect(self, name: str, *allowed: Any) -> None:
        """A field only some values of which are implemented (null always is)."""
        value = self.raw(name)
        if value is not None and value not in allowed:
            self.problem(f"{name}={shown(value)} is not implemented; jaxllm knows {list(allowed)}")

    def skip(self, names: str) -> None:
        """Fields that another field already decides."""
        self.read.update(names.split("|"))

    def problem(self, sentence: str) -> None:
        if sentence not in self.problems:
            self.problems.append(sentence)

    def unread(self, ignore: Iterable[str] = ()) -> list[str]:
        """Fields nobody asked for that carry a value and are not known to be harmless."""
        skip = self.read | set(ignore)
        names = [n for n in self.values if n not in skip and not HARMLESS.fullmatch(n)]
        return [n for n in names if self.values[n] not in (None, False, 0, "", [], {}, 0.0)]

    def finish(self, ignore: Iterable[str] = ()) -> None:
        """Raise ConfigError with every problem, unread fields included."""
        for section in self.sections:
            section.note_unread(ignore)
        self.note_unread(ignore)
        if self.problems:
            raise ConfigError("this config cannot be used:\n  " + "\n  ".join(self.problems))

    def note_unread(self, ignore: Iterable[str] = ()) -> None:
        """Make a problem of every field nobody asked for."""
        for name in self.unread(ignore):
            value = shown(self.values[name])
            self.problem(f"{name}={value} is not understood; if it does not matter, pass ignore=[{name!r}]")


def shown(value: Any) -> str:
    """A value as it is written, in at most 60 characters and whatever its depth."""
    text = reprlib.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_count(value: Any) -> bool:
    return _is_number(value) and value == int(value) and 1 <= value <= MOST
