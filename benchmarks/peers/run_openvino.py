"""OpenVINO GenAI's LLMPipeline: a folder that optimum-cli exported."""

from __future__ import annotations

import json
import pathlib
import time

from protocol import Engine, main


class OpenVino(Engine):
    """Token ids in; a streamer tells when each token came (with several prompts, the first and the last)."""

    names = ("openvino",)

    def load(self, model, options):
        import numpy as np
        import openvino
        import openvino_genai

        self.np, self.ov, self.genai = np, openvino, openvino_genai
        settings = {"INFERENCE_NUM_THREADS": options.threads, "PERFORMANCE_HINT": "LATENCY"}
        self.pipeline = openvino_genai.LLMPipeline(model, "CPU", **settings)
        return json.loads((pathlib.Path(model) / "config.json").read_text())["vocab_size"]

    def version(self):
        return f"openvino-genai {self.genai.__version__}"

    def generate(self, prompts, new):
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        ids = self.np.array(prompts, dtype=self.np.int64)
        inputs = self.genai.TokenizedInputs(self.ov.Tensor(ids), self.ov.Tensor(self.np.ones_like(ids)))
        stamps = [time.perf_counter()]
        if len(prompts) == 1:
            self.pipeline.generate(inputs, config, self._streamer(stamps))
            return stamps
        metrics = self.pipeline.generate(inputs, config).perf_metrics
        end, first = time.perf_counter(), stamps[0] + metrics.get_ttft().mean / 1e3
        each = (end - first) / max(new - 1, 1)  # its own time per token is divided by the prompts
        return [*stamps, *(first + i * each for i in range(new))]

    def _streamer(self, stamps):
        genai = self.genai

        class Stamp(genai.StreamerBase):
            def write(self, tokens):
                count = len(tokens) if isinstance(tokens, list | tuple) else 1
                stamps.extend([time.perf_counter()] * count)
                return genai.StreamingStatus.RUNNING

            def end(self):
                pass

        return Stamp()


if __name__ == "__main__":
    main(OpenVino())
