"""Masks along drafts: what a constraint lets follow each node of a tree. B rows, N nodes, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxllm.sampling import MaskCallback
from jaxllm.spec_verify import Tree


def allowed_behind(mask: MaskCallback, said: Sequence[Sequence[int]], tree: Tree) -> np.ndarray:
    """bool [B, N, V]: what `mask` lets follow the tokens `said` and each node's drafts behind them.

    It is asked about texts alone that it allowed: a draft that it forbids is never kept, so whatever stands behind
    one makes no difference.
    """
    tokens, parents = np.asarray(tree.tokens), np.asarray(tree.parents)
    texts: list[list[list[int] | None]] = [[list(row) for row in said]]  # of each node; None: forbidden
    allowed = [np.asarray(mask(texts[0]), bool)]
    for n in range(1, tokens.shape[1]):
        texts.append([_text(texts, allowed, b, parents[b, n], tokens[b, n]) for b in range(len(said))])
        if any(text is not None for text in texts[-1]):
            asked = [before if text is None else text for before, text in zip(texts[0], texts[-1], strict=True)]
            allowed.append(np.asarray(mask(asked), bool))
        else:
            allowed.append(allowed[0])
    return np.stack(allowed, 1)


def _text(texts: list, allowed: list[np.ndarray], row: int, parent: int, token: int) -> list[int] | None:
    """A row's tokens down to a draft; None where the draft, or one before it, is forbidden or no draft."""
    before = texts[parent][row]
    if before is None or token < 0 or not allowed[parent][row, token]:
        return None
    return [*before, int(token)]
