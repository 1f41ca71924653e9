"""Full-size configs in the spelling of the hub: every field is understood, and the number of parameters is right.

The configs are written out by hand after the published ones; sizes are those the makers state where they state one
exactly, and otherwise the sum of the matrices.
"""

import json
import math
import pathlib

import pytest

from jaxllm.config import params_shape
from jaxllm.families import family, model_config

# Billions of parameters, of the text half only.
FILES = sorted(pathlib.Path(__file__).parent.glob("published_configs*.json"))
PUBLISHED = [entry for path in FILES for entry in json.loads(path.read_text())]


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry["name"])
def test_a_full_size_config_gives_the_right_number_of_parameters(entry):
    values = entry["config"]
    config = model_config(family(values["model_type"]), values)
    size = sum(math.prod(shape) for shape in params_shape(config).values())
    assert size / 1e9 == pytest.approx(entry["billions"], rel=0.002)
