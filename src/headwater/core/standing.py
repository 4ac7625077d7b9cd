"""What the figures of several contestants say about each other: intervals, paired differences, dominance.

Knows no method: a contestant here is what it measured on its seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from headwater.core.family import Axis
from headwater.core.stats import paired_bootstrap

__all__ = ["Cell", "Difference", "Items", "Measured", "Standing", "difference", "estimate", "pareto"]

Floats = NDArray[np.float64]

DRAWS = 4000
"""Resamples of each interval: its ends are known to about a twentieth of its width; smallest p-value 5e-4."""


@dataclass(frozen=True)
class Items:
    """One value per evaluated item; their mean is the metric."""

    ids: tuple[str, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """What one contestant measured.

    Attributes:
        metrics: seed -> metric -> value.
        items: seed -> metric -> one value per item, where the run kept them.
    """

    metrics: Mapping[int, Mapping[str, float]]
    items: Mapping[int, Mapping[str, Items]] = field(default_factory=dict)

    def seeds(self, metric: str) -> list[int]:
        """The seeds on which ``metric`` was measured and is finite, in order."""
        return sorted(seed for seed, of in self.metrics.items() if math.isfinite(of.get(metric, math.nan)))


@dataclass(frozen=True)
class Cell:
    """A mean over seeds with its 95 % interval, which one seed does not have.

    Attributes:
        mean: over the seeds.
        low: lower end, or None.
        high: upper end, or None.
        values: one per seed.
        units: what the interval was resampled over.
    """

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]
    units: str


@dataclass(frozen=True)
class Difference:
    """A contestant minus another on the same seeds, and on the same items where both kept them.

    Attributes:
        mean: of the difference.
        low: lower end of its 95 % interval; None with one seed.
        high: upper end; None with one seed.
        p_value: two-sided.
        smallest_detectable: difference that this many seeds with this spread show with probability 0.8; None: any size
            would have gone unseen.
        num_seeds: paired.
        units: what was resampled.
        p_holm: ``p_value`` adjusted for the number of rows tested; filled in by the leaderboard.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float
    smallest_detectable: float | None
    num_seeds: int
    units: str
    p_holm: float | None = None


@dataclass(frozen=True)
class Standing:
    """Where a row stands with respect to the front.

    Attributes:
        label: ``front``: clearly dominated by none, and clearly ahead of (or equal to) each other row on some axis;
            ``dominated``: another row is clearly better; ``undecided``: these seeds cannot tell.
        by: the rows that dominate it, the best one first, or those it could not be told apart from.
        num_seeds: that stood behind it.
    """

    label: Literal["front", "dominated", "undecided"]
    by: tuple[str, ...] = ()
    num_seeds: int = 0

    def __str__(self) -> str:
        if self.label == "dominated":
            return f"dominated by {self.by[0]}"
        if self.label == "undecided":
            return "undecided (one seed)" if self.num_seeds <= 1 else "undecided (too few seeds)"
        return "front"


def estimate(measured: Measured, metric: str) -> Cell | None:
    """The mean of a metric over seeds with its interval; None where it was not measured."""
    seeds = measured.seeds(metric)
    if not seeds:
        return None
    values = np.array([measured.metrics[seed][metric] for seed in seeds])
    items = _items([measured], metric, seeds)
    sample = values if items is None else items[0]
    found = paired_bootstrap(sample, np.zeros_like(sample), draws=DRAWS)
    low, high = _finite(found.low), _finite(found.high)
    return Cell(float(values.mean()), low, high, tuple(values.tolist()), _units(items))


def difference(a: Measured, b: Measured, metric: str) -> Difference | None:
    """How much larger ``a`` is than ``b``, over the seeds that both have; None where there is no such seed."""
    seeds = sorted(set(a.seeds(metric)) & set(b.seeds(metric)))
    if not seeds:
        return None
    items = _items([a, b], metric, seeds)
    samples = items or [np.array([side.metrics[seed][metric] for seed in seeds]) for side in (a, b)]
    found = paired_bootstrap(samples[0], samples[1], draws=DRAWS)
    low, high, detectable = map(_finite, (found.low, found.high, found.smallest_detectable))
    return Difference(found.mean, low, high, found.p_value, detectable, len(seeds), _units(items))


def _items(sides: Sequence[Measured], metric: str, seeds: Sequence[int]) -> list[Floats] | None:
    """``(seeds, items)`` of each side if the same items stand in all of them and average to the metric."""
    kept = [[side.items.get(seed, {}).get(metric) for seed in seeds] for side in sides]
    first = kept[0][0]
    if first is None or len(first.ids) < 2:
        return None
    for side, row in zip(sides, kept, strict=True):
        for seed, items in zip(seeds, row, strict=True):
            if items is None or items.ids != first.ids or len(items.values) != len(items.ids):
                return None
            if not math.isclose(float(np.mean(items.values)), side.metrics[seed][metric], rel_tol=1e-4, abs_tol=1e-6):
                return None
    return [np.array([items.values for items in row if items is not None]) for row in kept]


def _units(items: list[Floats] | None) -> str:
    return "seeds" if items is None else "seeds and items"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def pareto(
    rows: Mapping[str, Measured], axes: Sequence[Axis], seeds: Sequence[int], *, tie: float = 0.005
) -> dict[str, Standing]:
    """Say of each row whether it is on the front, clearly dominated, or not to be decided.

    *a* clearly dominates *b* when the 95 % interval of their paired difference lies in *a*'s favour on one axis, and
    on every other axis *a* is, with the same confidence, not worse by more than ``tie``. Two rows that would dominate
    each other differ by less than the tie everywhere: neither does.

    Args:
        rows: those to be judged; each has measured every axis.
        axes: gain, price.
        seeds: only these are looked at.
        tie: in the axes' unit.
    """
    kept = {
        name: Measured(
            {s: m for s, m in row.metrics.items() if s in seeds}, {s: i for s, i in row.items.items() if s in seeds}
        )
        for name, row in rows.items()
    }
    ahead: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for a, b in combinations(kept, 2):
        found = [_improvement(kept[a], kept[b], axis) for axis in axes]
        ahead[a, b] = found
        ahead[b, a] = [(-high, -low) for low, high in found]

    def better(a: str, b: str) -> bool:
        ends = ahead[a, b]
        return any(low > 0 for low, _ in ends) and all(low > -tie for low, _ in ends)

    def dominates(a: str, b: str) -> bool:
        return better(a, b) and not better(b, a)

    def safe(a: str, b: str) -> bool:
        """It is settled that ``b`` does not dominate ``a``: ``a`` leads somewhere, or they are equal within the tie."""
        ends = ahead[a, b]
        return any(low > 0 for low, _ in ends) or all(-tie < low and high < tie for low, high in ends)

    standings = {}
    by_gain = sorted(kept, key=lambda name: -axes[0].sign * _mean(kept[name], axes[0].metric))
    for name, row in kept.items():
        others = [other for other in by_gain if other != name]
        num_seeds = len(row.seeds(axes[0].metric))
        above = [other for other in others if dominates(other, name)]
        unclear = tuple(other for other in others if not safe(name, other))
        if above:
            # Best to be told of a row that nothing dominates in turn.
            above.sort(key=lambda other: any(dominates(third, other) for third in kept if third not in (other, name)))
            standings[name] = Standing("dominated", tuple(above), num_seeds)
        elif unclear:
            standings[name] = Standing("undecided", unclear, num_seeds)
        else:
            standings[name] = Standing("front", (), num_seeds)
    return standings


def _improvement(a: Measured, b: Measured, axis: Axis) -> tuple[float, float]:
    """Interval of how much better ``a`` is than ``b``; without one, everything is possible."""
    found = difference(a, b, axis.metric)
    if found is None or found.low is None or found.high is None:
        return -math.inf, math.inf
    ends = sorted((axis.sign * found.low, axis.sign * found.high))
    return ends[0], ends[1]


def _mean(row: Measured, metric: str) -> float:
    return float(np.mean([row.metrics[seed][metric] for seed in row.seeds(metric)]))
