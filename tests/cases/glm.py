"""GLM and GLM 4."""

from tests.cases.case import Case
from tests.convert import old_spelling
from tests.tiny import common

CASES = {
    "glm": Case("glm", common(head_dim=16)),
    "glm-old": Case(
        "glm",
        common(head_dim=32, attention_bias=False, tie_word_embeddings=True),
        convert=old_spelling(lambda old: dict(partial_rotary_factor=None)),
    ),
    "glm4": Case("glm4", common(head_dim=16)),
    "glm4-old": Case("glm4", common(head_dim=32, attention_bias=False), convert=old_spelling()),
}
