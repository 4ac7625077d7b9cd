"""The stability gap: how far, and for how long, continued pretraining first makes a model worse.

    excess(t) = max(metric(t) - metric(0), 0),   depth = max_t excess(t),   area = integral of excess d log(1 + t)

The area is taken over the logarithm of the tokens because the gap opens, and mostly closes, early in a run.

Source: the effect is that of Guo et al., "Efficient Continual Pre-training by Mitigating the Stability Gap",
    arXiv:2406.14833; these four numbers are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Gap", "gap"]


@dataclass(frozen=True)
class Gap:
    """What ``gap`` measures.

    Attributes:
        depth: the most that the metric ever exceeded its start, in its unit, >= 0.
        at: tokens at that point, the first of several; the start where depth is 0.
        recovery_at: tokens at the first later measurement that is not above the start; infinity if there is none, 0
            where depth is 0.
        area: integral of the excess over log(1 + tokens), in the metric's unit times nats, >= 0.
    """

    depth: float
    at: float
    recovery_at: float
    area: float


def gap(tokens: ArrayLike, values: ArrayLike) -> Gap:
    """Measure the stability gap of a trajectory.

    Args:
        tokens: trained on at each measurement, ``(num_points,)``, >= 0, strictly ascending; the first is the start.
        values: the metric there, lower is better, ``(num_points,)``, such as bits per byte of general text.

    Returns:
        The gap; all zeros but for ``at`` where the metric never rises above its start. The area is by the trapezoid
        rule between measurements, so it depends on where they lie: compare trajectories measured at the same points.

    Raises:
        ValueError: no points, shapes that differ or are not one-dimensional, a number that is not finite, or tokens out
            of order.

    Example:
        >>> gap([0, 10, 20, 40], [3.0, 3.5, 3.25, 2.75]).recovery_at
        40.0
    """
    t, metric = np.asarray(tokens, np.float64), np.asarray(values, np.float64)
    if t.ndim != 1 or t.shape != metric.shape:
        raise ValueError(
            f"tokens and values must be one-dimensional and of one length; got {t.shape} and {metric.shape}."
        )
    if not t.size:
        raise ValueError("the trajectory is empty; a gap needs the value at the start.")
    for name, array in (("tokens", t), ("values", metric)):
        if (bad := np.flatnonzero(~np.isfinite(array))).size:
            raise ValueError(f"{name} must be finite; got {array[bad[0]]} at point {bad[0]}.")
    if t[0] < 0 or (np.diff(t) <= 0).any():
        raise ValueError(f"tokens must be >= 0 and strictly ascending; got {t.tolist()}.")
    excess = np.maximum(metric - metric[0], 0.0)
    peak = int(excess.argmax())
    depth = float(excess[peak])
    back = peak + np.flatnonzero(excess[peak:] == 0)
    recovery_at = 0.0 if depth == 0 else float(t[back[0]]) if back.size else math.inf
    return Gap(depth, float(t[peak]), recovery_at, float(np.trapezoid(excess, np.log1p(t))))
