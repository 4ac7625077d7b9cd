"""Robust fits of curves with few parameters to few, noisy, possibly bad measurements.

    objective(theta) = sum_i w_i huber(r_i(theta) / delta) + sum_j penalty_j(theta) / delta^2

Residuals r are usually differences of logarithms, parameters usually logarithms too. A fit is started from many places,
because these objectives have many poor optima, and each descent uses the exact gradient.

Sources: Huber, "Robust Estimation of a Location Parameter", Annals of Mathematical Statistics 35 (1964); the recipe of
Huber loss on log residuals, L-BFGS and a grid of starts: Hoffmann et al., "Training Compute-Optimal Large Language
Models", arXiv:2203.15556, section D.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

from headwater.core.rng import numpy_generator

__all__ = ["NormalPrior", "Penalty", "Residuals", "RobustFit", "bootstrap_fit", "draw_starts", "fit_robust", "huber"]

Floats = NDArray[np.float64]

Residuals = Callable[[Floats], tuple[Floats, Floats]]
"""``theta (p,) -> residuals (n,), their Jacobian (n, p)``."""

Penalty = Callable[[Floats], tuple[float, Floats]]
"""``theta (p,) -> value, its gradient (p,)``, in the unit of a squared residual."""

AGREEMENT = 0.01
"""Descents whose objective ends within this fraction of the best one are counted as agreeing with it."""

NEGLIGIBLE = 1e-3
"""Objectives this close are equal: their residuals differ by far less than ``delta``. It matters for exact data."""

_MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class NormalPrior:
    """Independent normals on the parameters, as a penalty: ``weight * sum ((theta - mean) / sd)^2 / 2``.

    Attributes:
        mean: ``(p,)``.
        sd: ``(p,)``, > 0.
        weight: in the unit of a squared residual: the variance of the noise would make it a Bayesian prior.
    """

    mean: Floats
    sd: Floats
    weight: float

    def __call__(self, theta: Floats) -> tuple[float, Floats]:
        """Value and gradient."""
        z = (theta - self.mean) / self.sd
        return 0.5 * self.weight * float(z @ z), self.weight * z / self.sd


@dataclass(frozen=True, eq=False)
class RobustFit:
    """The best of several descents.

    Attributes:
        parameters: ``(p,)``.
        objective: its value there.
        objectives: ``(starts,)``, where each descent ended, ascending.
    """

    parameters: Floats
    objective: float
    objectives: Floats

    @property
    def agreeing(self) -> int:
        """How many descents ended within 1 % of the best objective."""
        return int((self.objectives <= self.objective * (1 + AGREEMENT) + NEGLIGIBLE).sum())


def huber(residuals: ArrayLike, delta: float) -> Floats:
    """``r^2 / 2`` up to ``delta``, then ``delta (|r| - delta / 2)``; elementwise."""
    size = np.abs(np.asarray(residuals, dtype=np.float64))
    inside = np.minimum(size, delta)
    return inside * (size - 0.5 * inside)


def draw_starts(bounds: ArrayLike, count: int, seed: int) -> Floats:
    """Places to start from, ``(count, p)``, uniform between the bounds ``(p, 2)``; a larger count only adds some."""
    low, high = np.asarray(bounds, dtype=np.float64).T
    starts: Floats = low + (high - low) * numpy_generator(seed, "curve starts").random((count, len(low)))
    return starts


def fit_robust(
    residuals: Residuals,
    bounds: ArrayLike,
    starts: ArrayLike,
    *,
    delta: float = 1e-3,
    penalties: Sequence[Penalty] = (),
    weights: ArrayLike | None = None,
) -> RobustFit:
    """Minimise the objective above by L-BFGS-B from every start and keep the best.

    Args:
        residuals: the model's residuals and their Jacobian.
        bounds: ``(p, 2)``, lowest and highest value of each parameter.
        starts: ``(starts, p)``; moved into the bounds.
        delta: where Huber's loss turns from square to linear, in the residuals' unit, > 0.
        penalties: added, such as ``NormalPrior``.
        weights: ``(n,)`` of the residuals, >= 0; all 1 by default. The counts of a bootstrap draw are such weights.

    Raises:
        ValueError: bounds are not ``(p, 2)`` and ordered, there is no start, ``delta`` is not positive, or no descent
            reached a finite objective.
    """
    box, begin = np.asarray(bounds, dtype=np.float64), np.atleast_2d(np.asarray(starts, dtype=np.float64))
    if box.ndim != 2 or box.shape[1] != 2 or not (box[:, 0] <= box[:, 1]).all():
        raise ValueError(f"bounds must be (parameters, 2), each low <= high; got {box.tolist()}.")
    if begin.size == 0 or begin.shape[1] != len(box):
        raise ValueError(f"starts must be (at least 1, {len(box)}); got shape {begin.shape}.")
    if not delta > 0:
        raise ValueError(f"delta must be > 0; got {delta}.")
    weight = None if weights is None else np.asarray(weights, dtype=np.float64)

    # In units of delta: the optimizer's stopping rules are absolute, and residuals of 1e-3 would stop it at once.
    def objective(theta: Floats) -> tuple[float, Floats]:
        residual, jacobian = residuals(theta)
        clipped = np.clip(residual, -delta, delta)
        loss, pull = clipped * (residual - 0.5 * clipped), clipped
        if weight is not None:
            loss, pull = weight * loss, weight * pull
        value, gradient = float(loss.sum()), pull @ jacobian
        for penalty in penalties:
            more, slope = penalty(theta)
            value, gradient = value + more, gradient + slope
        return value / delta**2, gradient / delta**2

    options = {"maxiter": _MAX_ITERATIONS, "maxfun": 2 * _MAX_ITERATIONS, "ftol": 1e-9, "gtol": 1e-8, "maxcor": 20}
    ends = [
        optimize.minimize(objective, np.clip(start, *box.T), jac=True, method="L-BFGS-B", bounds=box, options=options)
        for start in begin
    ]
    finite = [end for end in ends if np.isfinite(end.fun)]
    if not finite:
        raise ValueError(f"none of {len(ends)} descents reached a finite objective; are the residuals finite?")
    best = min(finite, key=lambda end: end.fun)
    return RobustFit(np.asarray(best.x), float(best.fun), np.sort([end.fun for end in finite]))


def bootstrap_fit(refit: Callable[[Floats], Floats], groups: ArrayLike, draws: int, seed: int) -> Floats:
    """Refit to resampled groups of measurements, such as the points of one training run, which belong together.

    Args:
        refit: ``weights (n,) -> parameters (p,)``; a weight is how often the measurement's group was drawn.
        groups: ``(n,)``, the group of each measurement; at least two groups.
        draws: resamples, >= 1.
        seed: same seed and groups, same resamples, whatever is refitted: two curves of the same runs stay paired.

    Returns:
        ``(draws, p)``.

    Raises:
        ValueError: fewer than two groups, or no draw.
    """
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2 or draws < 1:
        raise ValueError(
            f"a bootstrap needs at least 2 groups and 1 draw; got {len(names)} group(s) and {draws} draw(s)."
        )
    rng = numpy_generator(seed, "curve bootstrap")
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return np.stack([refit(count[member].astype(np.float64)) for count in counts])
