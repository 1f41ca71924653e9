"""Every config goes through JSON unchanged, and JSON that is no config is refused."""

import contextlib
import json
import math
import pathlib
import types
import typing
from dataclasses import fields, is_dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxllm.config import ModelConfig
from jaxllm.config_json import from_json, to_json
from jaxllm.errors import ConfigError
from jaxllm.families import family, model_config
from tests import random_model

FILES = sorted(pathlib.Path(__file__).parent.glob("published_configs*.json"))
PUBLISHED = {entry["name"]: entry["config"] for path in FILES for entry in json.loads(path.read_text())}


def through_text(config: ModelConfig) -> ModelConfig:
    return from_json(json.loads(json.dumps(to_json(config), allow_nan=False)))


def any_of(hint) -> st.SearchStrategy:
    """Values of a field's type: sizes are small and positive, floats anything but NaN."""
    plain = {int: st.integers(1, 9), float: st.floats(allow_nan=False), bool: st.booleans(), str: st.text()}
    if hint in plain:
        return plain[hint]
    if is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.builds(hint, **{f.name: st.deferred(lambda h=hints[f.name]: any_of(h)) for f in fields(hint)})
    inside = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(inside)
    if typing.get_origin(hint) is tuple and inside[-1] is Ellipsis:
        return st.lists(any_of(inside[0]), min_size=1, max_size=3).map(tuple)
    if typing.get_origin(hint) is tuple:
        return st.tuples(*map(any_of, inside))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return st.one_of(*(st.none() if kind is type(None) else any_of(kind) for kind in inside))
    raise AssertionError(hint)


@given(any_of(ModelConfig))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_config_comes_back(config):
    back = through_text(config)
    assert back == config
    assert hash(back) == hash(config)
    assert repr(back) == repr(config)  # the kinds of numbers, too


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_come_back(name):
    values = PUBLISHED[name]
    config = model_config(family(values["model_type"]), values)
    assert repr(through_text(config)) == repr(config)


def test_every_parity_case_comes_back(tmp_path):
    pytest.importorskip("torch")
    mapping = pytest.importorskip("transformers").CONFIG_MAPPING
    from tests.parity import all_cases

    kinds = set()
    for case in all_cases().values():
        if case.convert or case.max_len:
            continue  # these have published configs above
        mapping[case.model_type](**case.values).save_pretrained(tmp_path)
        values = json.loads((tmp_path / "config.json").read_text())
        config = model_config(family(values["model_type"]), values)
        assert repr(through_text(config)) == repr(config)
        kinds.add(values["model_type"])
    assert len(kinds) > 40


# ---- what is no config --------------------------------------------------------------------------------------


def changed(*path, to):
    """The JSON of a small config with one value replaced."""
    values = to_json(random_model.CONFIGS["full"])
    node = values
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = to
    return values


@pytest.mark.parametrize(
    ("values", "say"),
    [
        (None, "config should be ModelConfig"),
        ([], "config should be ModelConfig"),
        ({}, "config should be ModelConfig"),
        ({"type": "ModelConfig"}, "with the fields"),
        ({"type": "Attention"}, "config should be ModelConfig"),
        (changed("vocab", to="many"), "config.vocab should be int"),
        (changed("vocab", to=True), "config.vocab should be int"),
        (changed("vocab", to=1.5), "config.vocab should be int"),
        (changed("vocab", to=0), "not positive"),
        (changed("vocab", to=-3), "not positive"),
        (changed("vocab", to=2**60), "absurd"),
        (changed("tied", to=1), "config.tied should be bool"),
        (changed("norm", "kind", to="batch"), "config.norm.kind should be"),
        (changed("norm", "eps", to="nan"), "config.norm.eps should be float"),
        (changed("norm", "eps", to=math.nan), "config.norm.eps should be float"),
        (changed("norm", "type", to="MoE"), "config.norm should be Norm"),
        (changed("norm", "more", to=1), "with the fields"),
        (changed("blocks", to={}), "config.blocks should be"),
        (changed("blocks", 0, "mixer", "type", to="os.system"), "config.blocks[0].mixer should be"),
        (changed("blocks", 1, "mixer", "rope", "inv_freq", to=["x"]), "inv_freq[0] should be float"),
    ],
)
def test_what_is_no_config_is_refused(values, say):
    with pytest.raises(ConfigError) as caught:
        from_json(values)
    assert say in str(caught.value)
    assert len(str(caught.value)) < 1500


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(["vocab", "blocks", "norm", "dtype", "embed_norm", "type"]), json_values)
@settings(max_examples=200, deadline=None)
def test_nothing_but_the_own_error(name, value):
    with contextlib.suppress(ConfigError):
        from_json(changed(name, to=value))


def test_a_deep_nest_is_refused():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ConfigError):
        from_json(changed("blocks", to=deep))
