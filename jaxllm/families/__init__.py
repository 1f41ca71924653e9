"""Which families jaxllm knows: model type -> description. Descriptions are data; the maths is in layers.py."""

from jaxllm.families.base import Family, Fields, model_config
from jaxllm.families.registry import FAMILIES, REFUSED, family

__all__ = ["FAMILIES", "REFUSED", "Family", "Fields", "family", "model_config"]
