"""Better codes for the same bits, from what a model does on real text: clipping, GPTQ, AWQ, SmoothQuant, mixes."""

from jaxllm.calibration.blockwise import METHODS, calibrate, unobserved
from jaxllm.calibration.mixed import Mix, fisher, mix
from jaxllm.calibration.text import windows

__all__ = ["METHODS", "Mix", "calibrate", "fisher", "mix", "unobserved", "windows"]
