"""Which documents to read, and how often: a small good subset for several epochs instead of everything once.

    replay = r B,   domain = B - replay,   subset = domain / E

``B`` is the token budget, ``r`` the share of general text and ``E`` the number of epochs over the subset, which holds
the documents of the best score.

Source: Guo et al., "Efficient Continual Pre-training by Mitigating the Stability Gap", arXiv:2406.14833.
Differs: the shortest documents are left out, since a score per byte says little of them; strata keep a document each.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["SubsetPlan", "select_subset", "subset_plan"]


def select_subset(
    num_tokens: Sequence[int],
    scores: ArrayLike,
    tokens: int,
    *,
    stratify: Sequence[Hashable] | None = None,
    drop_shortest: float = 0.05,
) -> list[int]:
    """Choose documents of the lowest scores until their tokens reach a target.

    Deterministic; a larger target selects a superset. The document that reaches the target is included, so the subset
    may exceed it by less than that document; a target that cannot be reached selects everything that was not dropped.

    Args:
        num_tokens: length of each document, ``(num_documents,)``, >= 0.
        scores: lower is better, ``(num_documents,)``; infinities are allowed. Of equal scores the earlier one wins.
        tokens: the target, >= 0.
        stratify: a label per document; the best document of every label is selected, whatever the target, one of those
            dropped as short only where the label has no other. They count toward the target.
        drop_shortest: share of documents, rounded down, to leave out for being the shortest, in [0, 1).

    Returns:
        Indices in ascending order of score. Empty without documents.

    Raises:
        ValueError: lengths differ, a score is NaN, or a number is out of range.

    Example:
        >>> select_subset([10, 10, 10, 10], [0.4, 0.1, 0.3, 0.2], 20)
        [1, 3]
    """
    lengths, values = np.asarray(num_tokens, np.int64), np.asarray(scores, np.float64)
    for name, size in (("scores", values.shape), ("stratify", (len(lengths) if stratify is None else len(stratify),))):
        if size != lengths.shape:
            raise ValueError(f"{name} must have one entry per document: got shape {size} for {len(lengths)} documents.")
    if (nan := np.flatnonzero(np.isnan(values))).size:
        shown = ", ".join(map(str, nan[:10])) + (", ..." if nan.size > 10 else "")
        raise ValueError(f"{nan.size} scores are NaN, at documents {shown}. Leave those documents out or score them.")
    if (lengths < 0).any():
        raise ValueError(f"num_tokens must be >= 0; got {lengths.min()} at document {lengths.argmin()}.")
    if tokens < 0:
        raise ValueError(f"tokens must be >= 0; got {tokens}.")
    if not 0 <= drop_shortest < 1:
        raise ValueError(f"drop_shortest must be in [0, 1); got {drop_shortest}. Use 0 to keep every document.")

    dropped = np.zeros(len(lengths), bool)
    dropped[np.argsort(lengths, kind="stable")[: int(drop_shortest * len(lengths))]] = True
    # One fixed order, of which every target takes a beginning: the strata's best first, then the rest.
    ranked = np.lexsort((values, dropped)).tolist()
    best = {} if stratify is None else {stratify[i]: i for i in reversed(ranked)}
    first = set(best.values())
    rest = np.array([i for i in ranked if i not in first and not dropped[i]], np.int64)
    reached = lengths[list(first)].sum() + np.cumsum(lengths[rest]) - lengths[rest]  # before each of the rest
    chosen = [*first, *rest[reached < tokens].tolist()]
    return sorted(chosen, key=lambda i: (values[i], i))


@dataclass(frozen=True)
class SubsetPlan:
    """How a token budget is spent.

    Attributes:
        subset_tokens: distinct domain tokens to select.
        domain_tokens: domain tokens to train on, repeats included.
        replay_tokens: general tokens to train on; with ``domain_tokens`` they sum to the budget.
    """

    subset_tokens: int
    domain_tokens: int
    replay_tokens: int


def subset_plan(budget_tokens: int, epochs: float, replay: float) -> SubsetPlan:
    """Divide a token budget between general text and several epochs over a subset of the domain.

    Args:
        budget_tokens: tokens to train on, >= 1.
        epochs: times that the subset is read, >= 1. The subset is rounded up, so that no token is read more often.
        replay: share of general text, in [0, 1); rounded to whole tokens.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> subset_plan(1000, epochs=4, replay=0.2)
        SubsetPlan(subset_tokens=200, domain_tokens=800, replay_tokens=200)
    """
    if budget_tokens < 1:
        raise ValueError(f"budget_tokens must be >= 1; got {budget_tokens}.")
    if not 1 <= epochs < math.inf:
        raise ValueError(
            f"epochs must be finite and >= 1; got {epochs}. To read less than everything, lower the budget."
        )
    if not 0 <= replay < 1:
        raise ValueError(f"replay must be in [0, 1); got {replay}.")
    replay_tokens = round(budget_tokens * replay)
    domain_tokens = budget_tokens - replay_tokens
    return SubsetPlan(math.ceil(domain_tokens / epochs), domain_tokens, replay_tokens)
