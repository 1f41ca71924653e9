"""Every family against transformers, in five modes; the table is printed at the end of the test run."""

import pytest

from tests.parity import TOLERANCE, all_cases, compare

pytest.importorskip("torch")
pytest.importorskip("transformers")

# Of our mean bf16 error over transformers' own. Both are one draw of rounding noise, hence not 1.
BF16 = 1.5


@pytest.mark.parametrize("name", all_cases())
def test_logits_equal_transformers(name, tmp_path, record_property):
    case = all_cases()[name]
    errors = compare(case, tmp_path)
    record_property("parity", {mode: float(error) for mode, error in errors.items()})  # plain, to cross processes
    assert {m: e for m, e in errors.items() if m != "bf16" and not e <= TOLERANCE} == {}
    assert errors["bf16"] <= BF16
