"""Statistics of comparisons: what differs, how sure that is, and what would have gone unseen.

Every interval here answers for the units that it resamples, and each function says which ones those are. Where the
data cannot support an interval (one seed, two points) the answer is the widest one, never a narrow one made from
nothing.

Sources: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993 (percentile intervals); Owen, "The pigeonhole
bootstrap", arXiv:0712.1111 (crossed seeds and items); Holm, "A Simple Sequentially Rejective Multiple Test Procedure",
1979; Geifman et al., "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers", arXiv:1805.08206
(risk-coverage curve); Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599, eq. 3 (expected
calibration error).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize
from scipy import stats as scipy_stats

from headwater.core.rng import numpy_generator

__all__ = [
    "FEW",
    "Interval",
    "PairedDifference",
    "RiskCoverage",
    "aurc",
    "bootstrap_interval",
    "calibration_error",
    "correlation",
    "expected_calibration_error",
    "holm",
    "paired_bootstrap",
    "pareto_front",
    "risk_coverage",
    "smallest_detectable",
]

Floats = NDArray[np.float64]

FEW = 5
"""With this many units or fewer, resampling them understates their spread and is not trusted on its own."""

_CHUNK = 1 << 22  # numbers resampled at a time: 32 MiB of float64


class _Statistic(Protocol):
    def __call__(self, values: Floats, *, axis: int) -> Floats: ...


@dataclass(frozen=True)
class Interval:
    """An estimate from ``n`` units with the ends of its confidence interval."""

    estimate: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class PairedDifference:
    """How much larger ``a`` was than ``b``.

    Attributes:
        mean: mean of ``a - b``.
        low: lower end of the interval; ``-inf`` when one seed is all there is.
        high: upper end; ``inf`` when one seed is all there is.
        n: seeds (or units, for one-dimensional input).
        p_value: two-sided, of the hypothesis that the true mean difference is 0; 1 when one seed is all there is.
        smallest_detectable: true difference that so many units with this spread show with probability 0.8.
    """

    mean: float
    low: float
    high: float
    n: int
    p_value: float
    smallest_detectable: float


def _array(name: str, values: ArrayLike, dims: tuple[int, ...] = (1,)) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in dims:
        raise ValueError(f"{name} must have {' or '.join(map(str, dims))} dimension(s); got shape {array.shape}.")
    if array.size == 0:
        raise ValueError(f"{name} is empty; got shape {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds {int((~np.isfinite(array)).sum())} values that are not finite.")
    return array


def _check_draws(draws: int, confidence: float) -> None:
    if draws < 100:
        raise ValueError(f"draws must be at least 100 for an interval; got {draws}.")
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence must be in (0.5, 1); got {confidence}.")


def _resample(draws: int, width: int, one_chunk: Callable[[int], Floats]) -> Floats:
    """``draws`` statistics, computed so many at a time that ``(chunk, width)`` numbers stay within bounds."""
    chunk = max(1, _CHUNK // width)
    return np.concatenate([one_chunk(min(chunk, draws - start)) for start in range(0, draws, chunk)])


def _percentiles(drawn: Floats, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap_interval(
    values: ArrayLike,
    statistic: _Statistic = np.mean,  # type: ignore[assignment]  # numpy's overloads are wider than the protocol
    *,
    draws: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of a statistic of independent units.

    Args:
        values: ``(n,)``, one number for each unit; the units are resampled. Below about 20 of them the interval is too
            narrow, by a factor of about ``sqrt((n - 1) / n)`` and the difference between normal and t quantiles.
        statistic: ``statistic(array, axis=-1)``, such as ``np.median``.
        draws: resamples, >= 100.
        seed: same seed, same interval.
        confidence: in (0.5, 1).

    Returns:
        The statistic and its interval, which is infinite for ``n == 1``.

    Raises:
        ValueError: ``values`` is empty, not one-dimensional or not finite, or an argument is out of range.
    """
    array = _array("values", values)
    _check_draws(draws, confidence)
    n = array.size
    estimate = float(statistic(array, axis=-1))
    if n == 1:
        return Interval(estimate, -math.inf, math.inf, 1)
    rng = numpy_generator(seed, "bootstrap_interval")
    drawn = _resample(draws, n, lambda k: statistic(array[rng.integers(n, size=(k, n))], axis=-1))
    return Interval(estimate, *_percentiles(drawn, confidence), n)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, *, draws: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> PairedDifference:
    """Interval of the mean difference of two methods measured on the same seeds, and on the same items in each seed.

    Two-dimensional input, ``(seeds, items)``: seeds and items are crossed, because every seed is evaluated on the same
    items. A draw therefore resamples the seeds once and the items once, and applies that one set of items to all of
    its seeds. (Fresh items for each seed would treat what an item contributes to every seed as independent noise, and
    shrink it away.) The interval speaks of new seeds and of new items.

    One-dimensional input, ``(seeds,)`` or any other independent units: these are resampled.

    Resampling alone understates the spread of few units: intervals from 3, 10 and 20 seeds cover the truth about 75,
    88 and 93 % of the time, not 95 %. The paired t interval over the seeds' means (n - 1 degrees of freedom) is
    therefore computed too, and each side takes the wider one, the p-value the larger one. One-dimensional input of
    ``FEW`` units or fewer gets the t interval alone. One seed supports no statement about other seeds, however many
    items it was evaluated on: its interval is infinite. To speak of items alone, give the items as one-dimensional
    input.

    Zero spread over the seeds is taken at its word: contestants without randomness give an interval of no width.

    Args:
        a: ``(seeds,)`` or ``(seeds, items)``.
        b: same shape, same seeds and items in the same places.
        draws: resamples, >= 100.
        seed: same seed, same interval.
        confidence: in (0.5, 1); one minus it is the level of ``smallest_detectable``.

    Raises:
        ValueError: shapes differ, something is empty or not finite, or an argument is out of range.
    """
    first, second = _array("a", a, (1, 2)), _array("b", b, (1, 2))
    if first.shape != second.shape:
        raise ValueError(f"a and b must hold the same seeds and items; got shapes {first.shape} and {second.shape}.")
    _check_draws(draws, confidence)
    difference = first - second
    n = len(difference)
    mean = float(difference.mean())
    if n == 1:
        return PairedDifference(mean, -math.inf, math.inf, 1, 1.0, math.inf)

    by_seed = difference.reshape(n, -1).mean(axis=1)
    standard_error = float(by_seed.std(ddof=1)) / math.sqrt(n)
    half = float(scipy_stats.t.ppf((1 + confidence) / 2, n - 1)) * standard_error
    low, high, p_value = mean - half, mean + half, _two_sided_t(mean, standard_error, n)
    if n > FEW or difference.ndim == 2:
        drawn = _crossed_draws(difference.reshape(n, -1), draws, seed)
        resampled_low, resampled_high = _percentiles(drawn, confidence)
        low, high = min(low, resampled_low), max(high, resampled_high)
        beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
        p_value = max(p_value, min(1.0, 2 * (1 + beyond) / (1 + draws)))
        standard_error = max(standard_error, float(drawn.std()))
    detectable = smallest_detectable(standard_error * math.sqrt(n), n, alpha=1 - confidence)
    return PairedDifference(mean, low, high, n, p_value, detectable)


def _two_sided_t(mean: float, standard_error: float, n: int) -> float:
    if standard_error == 0:
        return 1.0 if mean == 0 else 0.0
    return 2 * float(scipy_stats.t.sf(abs(mean) / standard_error, n - 1))


def _crossed_draws(difference: Floats, draws: int, seed: int) -> Floats:
    """Means of ``difference[seeds][:, items]`` for resampled rows and columns, ``(draws,)``."""
    rows, columns = difference.shape
    rng = numpy_generator(seed, "paired_bootstrap")

    def one_chunk(k: int) -> Floats:
        if columns == 1:
            single: Floats = difference[rng.integers(rows, size=(k, rows)), 0].mean(axis=1)
            return single
        counts = rng.multinomial(rows, np.full(rows, 1 / rows), size=k).astype(np.float64)
        item_means = counts @ difference / rows
        crossed: Floats = np.take_along_axis(item_means, rng.integers(columns, size=(k, columns)), axis=1).mean(axis=1)
        return crossed

    return _resample(draws, rows + columns, one_chunk)


def smallest_detectable(sd: float, n: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """Return the true mean difference that a two-sided paired t test finds with probability ``power``.

    Stands beside every "no difference": what the budget could not have seen. Exact, from the noncentral t
    distribution; a significant difference of the wrong sign does not count as found.

    Args:
        sd: standard deviation of the ``n`` paired differences, >= 0, in the metric's unit.
        n: pairs.
        power: in (alpha, 1).
        alpha: level of the test, in (0, 1).

    Returns:
        In the unit of ``sd``; ``inf`` for ``n == 1``, which detects nothing.

    Raises:
        ValueError: an argument is out of range.
    """
    if not (sd >= 0 and math.isfinite(sd)):
        raise ValueError(f"sd must be finite and >= 0; got {sd}.")
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}.")
    if not 0 < alpha < power < 1:
        raise ValueError(f"alpha and power must satisfy 0 < alpha < power < 1; got alpha={alpha}, power={power}.")
    if n == 1:
        return math.inf
    critical = float(scipy_stats.t.ppf(1 - alpha / 2, n - 1))

    def shortfall(shift: float) -> float:
        """Power at a noncentrality of ``shift`` minus the wanted power."""
        return float(scipy_stats.nct.sf(critical, n - 1, shift)) - power

    upper = critical + 1.0
    while shortfall(upper) < 0:
        upper *= 2
    return float(optimize.brentq(shortfall, 0.0, upper)) * sd / math.sqrt(n)


def holm(p_values: ArrayLike) -> Floats:
    """Return Holm's adjusted p-values in the order given; rejecting below a level keeps the family-wise error.

    Args:
        p_values: ``(m,)``, in [0, 1]; none gives none.

    Raises:
        ValueError: not one-dimensional, or outside [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1:
        raise ValueError(f"p_values must be one-dimensional; got shape {p.shape}.")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p_values must be in [0, 1]; got {p[~((p >= 0) & (p <= 1))].tolist()}.")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    return adjusted


def pareto_front(points: ArrayLike, directions: Sequence[Literal["max", "min"]]) -> NDArray[np.bool_]:
    """Mark the points that no other point matches on every axis and beats on one.

    Args:
        points: ``(n, axes)``. Equal points are kept or dropped together.
        directions: for each axis, whether more (``"max"``) or less (``"min"``) is better.

    Returns:
        ``(n,)`` bool.

    Raises:
        ValueError: shapes disagree, a direction is unknown, or a value is NaN.
    """
    values = np.asarray(points, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != len(directions):
        raise ValueError(
            f"points must be (n, {len(directions)}), an axis for each direction; got shape {values.shape}."
        )
    if unknown := [d for d in directions if d not in ("max", "min")]:
        raise ValueError(f"directions must be 'max' or 'min'; got {unknown}.")
    if np.isnan(values).any():
        raise ValueError("points holds NaN, which is neither better nor worse than anything.")
    gain = values * np.array([1.0 if d == "max" else -1.0 for d in directions])
    # A loop over points holds (n, axes) at a time where broadcasting would hold (n, n, axes).
    return np.array([not ((gain >= p).all(axis=1) & (gain > p).any(axis=1)).any() for p in gain], dtype=np.bool_)


def correlation(
    x: ArrayLike,
    y: ArrayLike,
    method: Literal["pearson", "spearman", "kendall"] = "pearson",
    *,
    draws: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Correlation with the percentile bootstrap interval over pairs.

    Args:
        x: ``(n,)``.
        y: ``(n,)``, paired with ``x``; the pairs are resampled.
        method: ``"kendall"`` is tau-b, which allows for ties.
        draws: resamples, >= 100. Resamples in which ``x`` or ``y`` is constant are left out.
        seed: same seed, same interval.
        confidence: in (0.5, 1).

    Returns:
        The interval is all of [-1, 1] with ``FEW`` pairs or fewer; the estimate is NaN where ``x`` or ``y`` is
        constant.

    Raises:
        ValueError: lengths differ, values are not finite, or an argument is out of range.
    """
    first, second = _array("x", x), _array("y", y)
    if first.shape != second.shape:
        raise ValueError(f"x and y must be paired; got {first.size} and {second.size} values.")
    if method not in _CORRELATIONS:
        raise ValueError(f"method must be one of {sorted(_CORRELATIONS)}; got {method!r}.")
    _check_draws(draws, confidence)
    n = first.size
    estimate = float(_CORRELATIONS[method](first[None], second[None])[0])
    if n <= FEW or math.isnan(estimate):
        return Interval(estimate, -1.0, 1.0, n)
    rng = numpy_generator(seed, "correlation")

    def one_chunk(k: int) -> Floats:
        rows = rng.integers(n, size=(k, n))
        return _CORRELATIONS[method](first[rows], second[rows])

    drawn = _resample(draws, n, one_chunk)
    return Interval(estimate, *_percentiles(drawn[~np.isnan(drawn)], confidence), n)


def _pearson(x: Floats, y: Floats) -> Floats:
    """Row-wise, ``(rows, n) -> (rows,)``; NaN where a row is constant."""
    # Compared by extremes: after subtracting the mean, rounding would make a constant row look like a varying one.
    constant = (np.ptp(x, axis=1) == 0) | (np.ptp(y, axis=1) == 0)
    x = x - x.mean(axis=1, keepdims=True)
    y = y - y.mean(axis=1, keepdims=True)
    scale = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    return np.where(constant, np.nan, np.clip((x * y).sum(axis=1) / np.where(constant, 1.0, scale), -1.0, 1.0))


def _spearman(x: Floats, y: Floats) -> Floats:
    return _pearson(scipy_stats.rankdata(x, axis=1), scipy_stats.rankdata(y, axis=1))


def _kendall(x: Floats, y: Floats) -> Floats:
    return np.array([scipy_stats.kendalltau(u, v).statistic for u, v in zip(x, y, strict=True)], dtype=np.float64)


_CORRELATIONS: dict[str, Callable[[Floats, Floats], Floats]] = {
    "pearson": _pearson,
    "spearman": _spearman,
    "kendall": _kendall,
}


@dataclass(frozen=True)
class RiskCoverage:
    """Mean loss (``risk``) on the most confident fraction (``coverage``) of the items, both ``(n,)``."""

    coverage: Floats
    risk: Floats


def risk_coverage(confidence: ArrayLike, loss: ArrayLike) -> RiskCoverage:
    """Risk of a predictor that answers only where it is most confident, at every coverage 1/n, 2/n, ... 1.

    Items of equal confidence are in no order; the curve through them is its mean over all their orders.

    Args:
        confidence: ``(n,)``; larger is surer, only the order matters.
        loss: ``(n,)``; for example 1 where the answer is wrong and 0 where it is right.

    Raises:
        ValueError: empty, of different lengths, or not finite.
    """
    sureness, losses = _array("confidence", confidence), _array("loss", loss)
    if sureness.shape != losses.shape:
        raise ValueError(f"confidence and loss must be paired; got {sureness.size} and {losses.size} values.")
    _, group, size = np.unique(-sureness, return_inverse=True, return_counts=True)
    mean_loss = np.bincount(group, weights=losses) / size
    answered = np.arange(1, losses.size + 1)
    return RiskCoverage(answered / losses.size, np.cumsum(np.repeat(mean_loss, size)) / answered)


def aurc(confidence: ArrayLike, loss: ArrayLike) -> float:
    """Area under the risk-coverage curve: the mean risk over its n coverages. Arguments as ``risk_coverage``."""
    return float(risk_coverage(confidence, loss).risk.mean())


def calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error: sum over bins of ``n_b / n |accuracy_b - confidence_b|``.

    Args:
        confidence: probability of the answer, ``(n,)``, in [0, 1]; a value on a border belongs to the bin below.
        correct: whether the answer was right, ``(n,)``.
        bins: of equal width.

    Raises:
        ValueError: empty, of different lengths, outside [0, 1], or less than one bin.
    """
    sureness, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if sureness.shape != right.shape or sureness.ndim != 1 or not sureness.size:
        raise ValueError(f"confidence and correct must be paired; got shapes {sureness.shape} and {right.shape}.")
    if bins < 1:
        raise ValueError(f"bins must be at least 1; got {bins}.")
    # Probabilities summed in float32 may pass 1 by a rounding error.
    if not ((sureness >= 0) & (sureness <= 1 + 1e-6)).all():
        raise ValueError(f"confidence must be in [0, 1]; it goes from {sureness.min()} to {sureness.max()}.")
    # Bins are (b - 1, b] / bins; a confidence of 0 joins the first.
    at = np.clip(np.ceil(sureness * bins).astype(np.int64) - 1, 0, bins - 1)
    gap = np.bincount(at, weights=right - sureness, minlength=bins)
    return float(np.abs(gap).sum() / sureness.size)


def expected_calibration_error(probs: ArrayLike, labels: ArrayLike, bins: int = 10) -> float:
    """``calibration_error`` of the likeliest class.

    Args:
        probs: ``(n, classes)``, rows summing to 1.
        labels: class indices, ``(n,)``.
        bins: of equal width.

    Raises:
        ValueError: as ``calibration_error``, or shapes that do not fit.
    """
    table, classes = np.asarray(probs, dtype=np.float64), np.asarray(labels)
    if table.ndim != 2 or table.shape[:1] != classes.shape:
        raise ValueError(f"probs must be (n, classes) and labels (n,); got shapes {table.shape} and {classes.shape}.")
    return calibration_error(table.max(axis=1), table.argmax(axis=1) == classes, bins)
