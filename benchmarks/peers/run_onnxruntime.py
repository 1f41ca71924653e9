"""ONNX Runtime GenAI: a folder that its model builder made."""

from __future__ import annotations

import json
import pathlib
import time

from protocol import Engine, main


class OnnxRuntime(Engine):
    """A new generator for each call: its length is fixed."""

    names = ("onnxruntime",)

    def load(self, model, options):
        import numpy as np
        import onnxruntime_genai

        self.np, self.genai = np, onnxruntime_genai
        config = onnxruntime_genai.Config(model)
        threads = {"intra_op_num_threads": options.threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self.model = onnxruntime_genai.Model(config)
        return json.loads((pathlib.Path(model) / "genai_config.json").read_text())["model"]["vocab_size"]

    def version(self):
        return f"onnxruntime-genai {self.genai.__version__}"

    def generate(self, prompts, new):
        settings = self.genai.GeneratorParams(self.model)
        length = len(prompts[0]) + new
        settings.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=len(prompts))
        stamps = [time.perf_counter()]
        generator = self.genai.Generator(self.model, settings)
        generator.append_tokens(self.np.array(prompts, dtype=self.np.int32))
        for _ in range(new):
            generator.generate_next_token()
            stamps.append(time.perf_counter())
        return stamps


if __name__ == "__main__":
    main(OnnxRuntime())
