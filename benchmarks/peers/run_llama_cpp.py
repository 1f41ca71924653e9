"""llama.cpp through the C functions of llama-cpp-python: a GGUF file, whatever its types."""

from __future__ import annotations

import ctypes
import time

from protocol import DECODE_PROMPT, Engine, main


class LlamaCpp(Engine):
    """One context, used again; its memory is cleared before each call."""

    names = ("llama.cpp",)

    def load(self, model, options):
        import llama_cpp
        import numpy as np

        self.lib, self.np = llama_cpp, np
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), settings)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot read {model}")
        self.context = llama_cpp.llama_init_from_model(self.model, self._settings(options))
        self.batch = llama_cpp.llama_batch_init(self.tokens, 0, 1)
        return llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def _settings(self, options):
        longest = max(options.prompt, DECODE_PROMPT)
        self.tokens = max(512, options.batch * longest)
        settings = self.lib.llama_context_default_params()
        settings.n_ctx = (longest + options.new + 8 + 255) // 256 * 256 * options.batch
        settings.n_batch, settings.n_ubatch = self.tokens, 512
        settings.n_threads = settings.n_threads_batch = options.threads
        settings.n_seq_max = options.batch
        if options.batch > 1 and hasattr(settings, "kv_unified"):
            settings.kv_unified = True
        return settings

    def version(self):
        system = self.lib.llama_print_system_info().decode()
        return f"llama-cpp-python {self.lib.__version__} ({system})"

    def generate(self, prompts, new):
        lib, count = self.lib, len(prompts)
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        entries = [(t, i, row, i == len(p) - 1) for row, p in enumerate(prompts) for i, t in enumerate(p)]
        ends = [i for i, entry in enumerate(entries) if entry[3]]
        stamps = [time.perf_counter()]
        for step in range(new):
            self._decode(entries)
            tokens = [self._best(end) for end in ends]
            stamps.append(time.perf_counter())
            entries = [(tokens[row], len(prompts[row]) + step, row, True) for row in range(count)]
            ends = list(range(count))
        return stamps

    def _decode(self, entries):
        batch = self.batch
        for k, (token, position, row, wanted) in enumerate(entries):
            batch.token[k], batch.pos[k], batch.logits[k] = token, position, wanted
            batch.n_seq_id[k], batch.seq_id[k][0] = 1, row
        batch.n_tokens = len(entries)
        if code := self.lib.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode failed with code {code}")

    def _best(self, index):
        vocab = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        found = self.lib.llama_get_logits_ith(self.context, index)
        return int(self.np.ctypeslib.as_array(found, shape=(vocab,)).argmax())


if __name__ == "__main__":
    main(LlamaCpp())
