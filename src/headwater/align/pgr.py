"""How much of a gap was recovered, and how much of what was taught was imitation.

    PGR = (student - weak) / (ceiling - weak)

Source: Burns et al., "Weak-to-Strong Generalization: Eliciting Strong Capabilities With Weak Supervision",
arXiv:2312.09390.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.core.stats import Interval, bootstrap_interval, paired_bootstrap

__all__ = ["Agreement", "UndefinedGap", "agreement", "pgr", "pgr_ci"]


class UndefinedGap(ValueError):
    """The ceiling is not above the weak supervisor, so there is no gap of which a share could be recovered."""


def pgr(weak: float, student: float, ceiling: float) -> float:
    """Performance gap recovered: 0 where the student is as good as its supervisor, 1 where it reaches the ceiling.

    Args:
        weak: the supervisor's accuracy, or any other figure of which more is better.
        student: of the strong model trained on the supervisor's labels.
        ceiling: of the strong model trained on true labels.

    Returns:
        Below 0 where the student is worse than its supervisor; above 1 where it is better than the ceiling.

    Raises:
        UndefinedGap: ``ceiling`` is not above ``weak``; both are named.

    Example:
        >>> round(pgr(0.6, 0.8, 0.9), 3)
        0.667
    """
    if not ceiling > weak:
        raise UndefinedGap(f"PGR is undefined: the ceiling, {ceiling:.4f}, is not above the supervisor, {weak:.4f}.")
    return (student - weak) / (ceiling - weak)


def pgr_ci(weak: ArrayLike, student: ArrayLike, ceiling: ArrayLike, n_boot: int = 10_000, *, seed: int = 0) -> Interval:
    """PGR over several seeds: the ratio of the means, with its bootstrap interval over seeds.

    A mean of ratios would be ruled by the seed with the smallest gap. With five seeds or fewer the interval is too
    narrow, as all that resample so few units are.

    Args:
        weak: ``(seeds,)``.
        student: ``(seeds,)``, the same seeds in the same places, as is ``ceiling``.
        ceiling: ``(seeds,)``.
        n_boot: resamples, >= 100.
        seed: same seed, same interval.

    Raises:
        UndefinedGap: the 95 % interval of ``ceiling - weak`` touches 0: the ratio could be anything.
        ValueError: shapes differ, or something is empty or not finite.
    """
    low, middle, high = (np.asarray(values, dtype=np.float64) for values in (weak, student, ceiling))
    gap = paired_bootstrap(high, low, seed=seed)
    if middle.shape != low.shape or low.ndim != 1:
        raise ValueError(f"the arms must hold one figure for each seed; got {low.shape}, {middle.shape}, {high.shape}.")
    if not gap.low > 0:
        raise UndefinedGap(
            f"PGR is undefined: the ceiling, {high.mean():.4f} in the mean, is not clearly above the supervisor, "
            f"{low.mean():.4f} (interval of the difference [{gap.low:.4f}, {gap.high:.4f}])."
        )

    def ratio(values: NDArray[np.float64], *, axis: int) -> NDArray[np.float64]:
        drawn = values.astype(np.int64)  # positions of seeds
        recovered: NDArray[np.float64] = (middle - low)[drawn].mean(axis) / (high - low)[drawn].mean(axis)
        return recovered

    return bootstrap_interval(np.arange(len(low)), ratio, draws=n_boot, seed=seed)


@dataclass(frozen=True)
class Agreement:
    """How often two models give the same answer; a part is NaN where there is no such example.

    Attributes:
        overall: on all examples.
        weak_right: where the weak one is right: high is good.
        weak_wrong: where it is wrong: high is imitation of its errors.
    """

    overall: float
    weak_right: float
    weak_wrong: float


def agreement(student: ArrayLike, weak: ArrayLike, truth: ArrayLike) -> Agreement:
    """Split how often the student agrees with its supervisor by whether the supervisor is right.

    Args:
        student: answers, class indices ``(n,)``.
        weak: the supervisor's answers, ``(n,)``.
        truth: true labels, ``(n,)``.

    Raises:
        ValueError: shapes differ, or nothing is there.
    """
    answers, taught, right = np.asarray(student), np.asarray(weak), np.asarray(truth)
    if not answers.shape == taught.shape == right.shape or answers.ndim != 1 or not len(answers):
        raise ValueError(f"answers must be paired, (n,); got {answers.shape}, {taught.shape} and {right.shape}.")
    same, correct = answers == taught, taught == right
    parts = [float(same[rows].mean()) if rows.any() else float("nan") for rows in (correct, ~correct)]
    return Agreement(float(same.mean()), *parts)
