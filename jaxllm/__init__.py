"""jaxllm: large language models as pure JAX functions."""

from jaxllm.config import ModelConfig
from jaxllm.layers import capture, forward, hidden, logits
from jaxllm.model import Model, bundled, load, load_config, save
from jaxllm.quant import quantize_model as quantize
from jaxllm.state import State, evict, init_state, insert, load_state, rewind, save_state, select_rows
from jaxllm.taps import Taps

__all__ = [
    "Model",
    "ModelConfig",
    "State",
    "Taps",
    "bundled",
    "capture",
    "evict",
    "forward",
    "hidden",
    "init_state",
    "insert",
    "load",
    "load_config",
    "load_state",
    "logits",
    "quantize",
    "rewind",
    "save",
    "save_state",
    "select_rows",
]

__version__ = "0.1.0"
