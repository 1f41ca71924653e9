"""Weights in few bits: the table of formats, the leaf type, and how to make it."""

from jaxllm.quant import products
from jaxllm.quant.encode import encode
from jaxllm.quant.formats import FORMATS, Format, named
from jaxllm.quant.qtensor import QTensor, dequantize
from jaxllm.quant.recipe import Recipe, quantize, quantize_model, read_recipe, recipe

__all__ = [
    "FORMATS",
    "Format",
    "QTensor",
    "Recipe",
    "dequantize",
    "encode",
    "named",
    "products",
    "quantize",
    "quantize_model",
    "read_recipe",
    "recipe",
]
