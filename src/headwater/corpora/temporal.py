"""Temporal degradation: what a model loses for every year between what it has read and what it is asked.

    D[p, e] = S[e*, e] - S[p, e]            e*: the pretraining year nearest to e, or the earlier of two
    D[p, e] ~ intercept + TD |p - e|        least squares over all pairs with p != e*

S[p, e] is the score on evaluation year e after pretraining on year p, higher is better. TD is in points of the score
per year; ``slope_old`` is of the pairs in which the model has read older text than it is asked (p < e), ``slope_new``
of those in which it has read newer text.

Source: Longpre et al., "A Pretrainer's Guide to Training Data: Measuring the Effects of Data Age, Domain Coverage,
    Quality & Toxicity", arXiv:2305.13169, section 4, after Luu et al., arXiv:2111.07408.
Differs: the normalisation of the paper was not checked; this one is as above. The interval resamples the items of every
    evaluation year, the same ones for all pretraining years.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.core.rng import numpy_generator

__all__ = ["TDResult", "temporal_degradation"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TDResult:
    """Temporal degradation, in points of the score per year; positive where distance costs.

    Attributes:
        slope: over all pairs.
        slope_old: over pairs with an older pretraining year; None where they have fewer than two distances.
        slope_new: likewise with a newer one.
        ci: 95 % interval of ``slope`` over the evaluation items; None where none were given.
        n: pairs.
    """

    slope: float
    slope_old: float | None
    slope_new: float | None
    ci: tuple[float, float] | None
    n: int


def temporal_degradation(
    S: ArrayLike,
    pre_years: Sequence[float],
    eval_years: Sequence[float],
    n_boot: int = 2000,
    items: Sequence[ArrayLike] | None = None,
    *,
    seed: int = 0,
) -> TDResult:
    """Fit how much of the score is lost per year of distance.

    Args:
        S: ``(P, E)``, scores, higher is better.
        pre_years: ``(P,)``, of the texts that a model was pretrained on; all different.
        eval_years: ``(E,)``, of the evaluation sets; a year may have several.
        n_boot: resamples for the interval, >= 100.
        items: for each evaluation set ``(P, its items)``, the scores of single items, whose means are ``S``.
        seed: of the resamples.

    Raises:
        ValueError: shapes that do not fit, scores that are not finite, items whose means are not ``S``, or pairs of one
            distance only, which have no slope.

    Example:
        >>> years = [2013, 2016, 2019]
        >>> S = [[50 - 2 * abs(p - e) for e in years] for p in years]
        >>> round(temporal_degradation(S, years, years).slope, 9)
        2.0
    """
    scores = np.asarray(S, dtype=np.float64)
    before, asked = np.asarray(pre_years, dtype=np.float64), np.asarray(eval_years, dtype=np.float64)
    if scores.shape != (before.size, asked.size):
        raise ValueError(f"S must be ({before.size}, {asked.size}), pretraining by evaluation; got {scores.shape}.")
    if len(np.unique(before)) < before.size:
        raise ValueError(f"pre_years must be all different; got {before.tolist()}.")
    if not np.isfinite(scores).all():
        raise ValueError(f"S holds {int((~np.isfinite(scores)).sum())} scores that are not finite.")
    if n_boot < 100:
        raise ValueError(f"n_boot must be at least 100 for an interval; got {n_boot}.")
    distance = np.abs(before[:, None] - asked[None, :])
    # argmin takes the first of equals, so the earlier year stands first.
    order = np.argsort(before)
    nearest = order[np.argmin(distance[order], axis=0)]
    others = np.arange(before.size)[:, None] != nearest
    sides = (others, others & (before[:, None] < asked), others & (before[:, None] > asked))
    if len(np.unique(distance[others])) < 2:
        raise ValueError(
            f"a slope needs pairs of at least two distances; got {np.unique(distance[others]).tolist()} years. "
            "Add pretraining or evaluation years."
        )
    slope, old, new = (_slope(scores[None], nearest, distance, side) for side in sides)
    assert slope is not None
    ci = None
    if items is not None:
        drawn = _slope(_resampled(scores, items, n_boot, seed), nearest, distance, others)
        assert drawn is not None
        low, high = np.quantile(drawn, [0.025, 0.975])
        ci = float(low), float(high)
    return TDResult(
        float(slope[0]),
        None if old is None else float(old[0]),
        None if new is None else float(new[0]),
        ci,
        int(others.sum()),
    )


def _slope(scores: Floats, nearest: NDArray[np.int64], distance: Floats, pairs: NDArray[np.bool_]) -> Floats | None:
    """Least-squares slopes of many score matrices, ``(draws, P, E)`` -> ``(draws,)``."""
    x = distance[pairs]
    if len(np.unique(x)) < 2:
        return None
    best = np.take_along_axis(scores, nearest[None, None, :], axis=1)
    y = (best - scores)[:, pairs]
    centred = x - x.mean()
    found: Floats = y @ centred / (centred @ centred)
    return found


def _resampled(scores: Floats, items: Sequence[ArrayLike], n_boot: int, seed: int) -> Floats:
    """Score matrices of resampled items, ``(n_boot, P, E)``."""
    if len(items) != scores.shape[1]:
        raise ValueError(f"items must hold one array for each of {scores.shape[1]} evaluation sets; got {len(items)}.")
    rng = numpy_generator(seed, "temporal_degradation")
    drawn = np.empty((n_boot, *scores.shape))
    for column, given in enumerate(items):
        own = np.asarray(given, dtype=np.float64)
        if own.ndim != 2 or len(own) != len(scores) or not own.size:
            raise ValueError(f"items[{column}] must be ({len(scores)}, items); got shape {own.shape}.")
        if not np.allclose(own.mean(axis=1), scores[:, column]):
            raise ValueError(f"the means of items[{column}] are {own.mean(axis=1)}, and S has {scores[:, column]}.")
        count = own.shape[1]
        counts = rng.multinomial(count, np.full(count, 1 / count), size=n_boot)
        drawn[:, :, column] = counts @ own.T / count
    return drawn
