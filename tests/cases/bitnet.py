"""BitNet b1.58, unquantized: its packed weights are tested beside those of other files."""

from tests.cases.case import Case
from tests.tiny import common

CASES = {
    "bitnet": Case("bitnet", common(hidden_act="relu2")),
    "bitnet-tied": Case("bitnet", common(hidden_act="relu2", tie_word_embeddings=True, num_key_value_heads=4)),
}
