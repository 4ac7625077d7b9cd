"""Choosing a mixture from any predictor of its losses, and how well a predictor predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

from headwater.core.curves import huber
from headwater.diagnose.mixture_table import InterpolateGrid, Target

__all__ = [
    "Choice",
    "Predictor",
    "Validation",
    "choose_ratio",
    "choose_ratio_scarce",
    "copy_ratio",
    "predict_table",
    "r_squared",
    "score_law",
    "validation",
]

Floats = NDArray[np.float64]

GRID = 2001


class Predictor(Protocol):
    """A law, a fit or an interpolation of one of the two losses."""

    def predict(self, N: ArrayLike, D: ArrayLike, r: ArrayLike) -> Floats:
        """Loss; ``r`` is the share of the target's own text."""
        ...


@runtime_checkable
class Doubtful(Protocol):
    """A predictor that knows how far it may be trusted."""

    def beyond(self, N: float, D: float) -> tuple[str, ...]:
        """What is doubtful about a prediction at N and D, in words."""
        ...


@dataclass(frozen=True)
class Validation:
    """Predictions of losses that the fit had not seen.

    Attributes:
        r2: share of their variance that is explained; the mean of the measured losses scores 0.
        huber: mean Huber loss of the log residuals, at delta = 1e-3.
        max_relative_error: largest ``|predicted / measured - 1|``.
        rows: how many losses.
    """

    r2: float
    huber: float
    max_relative_error: float
    rows: int


def score_law(law: Predictor, table: pd.DataFrame, target: Target) -> Validation:
    """Compare predictions with the losses of a table that was not fitted."""
    return validation(*predict_table(law, table, target))


def r_squared(predicted: Floats, measured: Floats) -> float:
    """Share of the variance of ``measured`` that is explained; its mean explains 0."""
    return 1 - float(((predicted - measured) ** 2).sum() / ((measured - measured.mean()) ** 2).sum())


def predict_table(law: Predictor, table: pd.DataFrame, target: Target) -> tuple[Floats, Floats]:
    """Predicted and measured losses, each ``(rows,)``."""
    N, D, r, loss = (table[name].to_numpy(np.float64) for name in ("N", "D", "r_d", f"loss_{target}"))
    return law.predict(N, D, r if target == "domain" else 1 - r), loss


def validation(predicted: Floats, measured: Floats) -> Validation:
    """Compare predicted with measured losses, each ``(rows,)``."""
    ratio = predicted / measured
    return Validation(
        r_squared(predicted, measured),
        float(huber(np.log(ratio), 1e-3).mean()),
        float(np.abs(ratio - 1).max()),
        len(measured),
    )


@dataclass(frozen=True)
class Choice:
    """A mixture.

    Attributes:
        r: share of domain tokens.
        loss_domain: predicted there.
        loss_general: predicted there; None where it was not asked for.
        limit: of the general loss; None where there is none.
        feasible: False if no mixture keeps the limit; r is then 0.
        interval: of r over the bootstrap's laws; None without them.
        warnings: in words.
    """

    r: float
    loss_domain: float
    loss_general: float | None
    limit: float | None
    feasible: bool
    interval: tuple[float, float] | None
    warnings: tuple[str, ...]


def choose_ratio(
    general: Predictor,
    domain: Predictor,
    N: float,
    D: float,
    tolerance: float,
    *,
    draws: tuple[Sequence[Predictor], Sequence[Predictor]] | None = None,
    confidence: float = 0.95,
) -> Choice:
    """The share with the lowest domain loss whose general loss is at most ``(1 + tolerance)`` times that at r_d = 0.

    Args:
        general: predicts the general loss from the general share.
        domain: predicts the domain loss from the domain share.
        N: parameters.
        D: tokens.
        tolerance: > -1; below 0 it asks that general text improves over training on it alone.
        draws: bootstrap laws of ``general`` and ``domain`` in this order, for the interval.
        confidence: of the interval.

    Raises:
        ValueError: ``tolerance`` is not above -1.
    """
    if not tolerance > -1:
        raise ValueError(f"tolerance must be > -1, a fraction such as 0.03; got {tolerance}.")
    found = _best_share(general, domain, N, D, tolerance)
    chosen = 0.0 if found is None else found
    limit = (1 + tolerance) * float(general.predict(N, D, 1.0))
    warnings = _doubts(N, D, general, domain)
    if found is None:
        warnings += (f"no mixture keeps the general loss at or below {limit:.4g}; r = 0 is returned",)
    interval = None
    if draws is not None:
        shares = [_best_share(g, d, N, D, tolerance) or 0.0 for g, d in zip(*draws, strict=True)]
        interval = _percentiles(shares, confidence)
    return Choice(
        chosen,
        float(domain.predict(N, D, chosen)),
        float(general.predict(N, D, 1 - chosen)),
        limit,
        found is not None,
        interval,
        warnings,
    )


def _best_share(general: Predictor, domain: Predictor, N: float, D: float, tolerance: float) -> float | None:
    limit = (1 + tolerance) * float(general.predict(N, D, 1.0))

    def excess(r: float) -> float:
        return float(general.predict(N, D, 1 - r)) - limit

    grid = np.linspace(0, 1, GRID)
    losses, allowed = domain.predict(N, D, grid), general.predict(N, D, 1 - grid) <= limit
    if not allowed.any():
        return None
    best = int(np.flatnonzero(allowed)[losses[allowed].argmin()])
    candidates = [float(grid[best])]
    for i in (best - 1, best):  # the cells beside the best grid point: the border of what is allowed may lie in one
        if 0 <= i < GRID - 1 and allowed[i] != allowed[i + 1]:
            border = float(optimize.brentq(excess, grid[i], grid[i + 1], xtol=1e-12))
            candidates.append(border if excess(border) <= 0 else border + (1e-11 if allowed[i + 1] else -1e-11))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]
    inside = optimize.minimize_scalar(
        lambda r: float(domain.predict(N, D, r)), bounds=(low, high), method="bounded", options={"xatol": 1e-10}
    )
    candidates += [float(inside.x)] if excess(inside.x) <= 0 else []
    return min(candidates, key=lambda r: float(domain.predict(N, D, r)))


def choose_ratio_scarce(
    domain: Predictor, N: float, D_domain: float, *, draws: Sequence[Predictor] | None = None, confidence: float = 0.95
) -> Choice:
    """The share with the lowest domain loss when ``D_domain`` domain tokens are all there is: ``D = D_domain / r``.

    More general text makes the run longer but the domain rarer. Shares from 1 % on are looked at.

    Args:
        domain: predicts the domain loss.
        N: parameters.
        D_domain: tokens of domain text, read once.
        draws: bootstrap laws of ``domain``, for the interval.
        confidence: of the interval.

    Raises:
        ValueError: ``D_domain`` is not positive.
    """
    if not D_domain > 0:
        raise ValueError(f"D_domain must be > 0; got {D_domain}.")
    r = _scarce_share(domain, N, D_domain)
    interval = None
    if draws is not None:
        interval = _percentiles([_scarce_share(law, N, D_domain) for law in draws], confidence)
    loss = float(domain.predict(N, D_domain / r, r))
    return Choice(r, loss, None, None, True, interval, _doubts(N, D_domain / r, domain))


def _scarce_share(domain: Predictor, N: float, D_domain: float) -> float:
    def loss(r: float) -> float:
        return float(domain.predict(N, D_domain / r, r))

    grid = np.geomspace(0.01, 1, GRID)
    best = int(domain.predict(N, D_domain / grid, grid).argmin())
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]
    inside = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-10})
    return min(float(grid[best]), float(inside.x), key=loss)


def copy_ratio(table: pd.DataFrame, N: float, D: float, tolerance: float) -> float:
    """The rival of ``choose_ratio``: the share that was best at a size and length that were run, between its runs.

    Args:
        table: a full grid of runs.
        N: a size in it, or between.
        D: a length in it, or between.
        tolerance: as in ``choose_ratio``.
    """
    return choose_ratio(InterpolateGrid(table, "general"), InterpolateGrid(table, "domain"), N, D, tolerance).r


def _doubts(N: float, D: float, *predictors: Predictor) -> tuple[str, ...]:
    return tuple(dict.fromkeys(words for p in predictors if isinstance(p, Doubtful) for words in p.beyond(N, D)))


def _percentiles(values: Sequence[float], confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
