"""transformers: its own generate(), or (--engine transformers-compile) a compiled step with a static cache."""

from __future__ import annotations

import time

from protocol import DECODE_PROMPT, Engine, main


class Transformers(Engine):
    """A folder that AutoModelForCausalLM reads."""

    names = ("transformers", "transformers-compile")

    def load(self, model, options):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(options.threads)
        self.torch, self.compiled = torch, options.engine == "transformers-compile"
        self.room = max(options.prompt, DECODE_PROMPT) + options.new + 8
        net = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, options.dtype)).eval()
        net.generation_config.eos_token_id = None
        self.net, self.dtype = net, options.dtype
        if self.compiled:
            import torch._inductor.config as inductor

            inductor.freezing = True  # weights laid out for the products: 1.2 times as fast
            self.step, self.cache = torch.compile(self._step, dynamic=False), None
        return net.config.vocab_size

    def version(self):
        import transformers

        how = "compiled step, static cache" if self.compiled else "eager, dynamic cache"
        return f"transformers {transformers.__version__}, torch {self.torch.__version__}, {self.dtype}, {how}"

    def generate(self, prompts, new):
        return self._by_hand(prompts, new) if self.compiled else self._generate(prompts, new)

    def _generate(self, prompts, new):
        from transformers import LogitsProcessor, LogitsProcessorList

        stamps = []

        class Stamp(LogitsProcessor):
            def __call__(self, ids, scores):
                stamps.append(time.perf_counter())
                return scores

        ids = self.torch.tensor(prompts)
        options = dict(do_sample=False, num_beams=1, eos_token_id=None, pad_token_id=0, max_new_tokens=new)
        with self.torch.inference_mode():
            began = time.perf_counter()
            mask = self.torch.ones_like(ids)
            processors = LogitsProcessorList([Stamp()])
            self.net.generate(ids, attention_mask=mask, logits_processor=processors, **options)
        return [began, *stamps]

    def _step(self, ids, positions, cache):
        places = positions[None].expand(ids.shape[0], -1)
        out = self.net(input_ids=ids, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def _by_hand(self, prompts, new):
        from transformers import StaticCache

        torch, ids = self.torch, self.torch.tensor(prompts)
        length = ids.shape[1]
        stamps = [time.perf_counter()]
        with torch.no_grad():
            if self.cache is None:
                self.cache = StaticCache(config=self.net.config, max_cache_len=self.room)
            self.cache.reset()
            token = self._step(ids, torch.arange(length), self.cache)  # prompts of any length: not compiled
            stamps.append(time.perf_counter())
            for at in range(length, length + new - 1):
                token = self.step(token, torch.arange(at, at + 1), self.cache)
                token[0].item()
                stamps.append(time.perf_counter())
        return stamps


if __name__ == "__main__":
    main(Transformers())
