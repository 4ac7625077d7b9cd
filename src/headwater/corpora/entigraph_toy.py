"""The paper's model of why rewriting helps: deduction along paths, and the curve of accuracy that it gives.

    D_0   known relations: each ordered pair of V entities with probability p
    step  draw (x, y); where D_0 leads from x to y, along a shortest path, all (x, z) with z on it become known
    M_t = |D_t| / (V (V - 1))  ~  C (1 - sum_k mu_k exp(-r_k t)),  mu_k >= 0

A linear rise, then one in the logarithm of t, then a plateau at the share of pairs that D_0 connects.

Source: Yang et al., arXiv:2409.07431, section 6. The fit leaves room for what is known at step 0, so its shares may sum
    to less than 1.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order

__all__ = ["MixtureOfExponentials", "entigraph_toy", "fit_mixture_of_exponentials", "source_relations"]

STARTS = 8


def source_relations(num_entities: int, p: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which ordered pairs the documents state, ``(V, V)``; nothing is related to itself.

    Raises:
        ValueError: fewer than two entities, or ``p`` outside [0, 1].
    """
    if num_entities < 2:
        raise ValueError(f"num_entities must be >= 2; got {num_entities}.")
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1]; got {p}.")
    known: NDArray[np.bool_] = rng.random((num_entities, num_entities)) < p
    np.fill_diagonal(known, False)
    return known


def entigraph_toy(num_entities: int, p: float, steps: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Accuracy after each step, ``(steps + 1,)``, in [0, 1].

    Of several shortest paths the one in a fixed breadth-first tree of x is written.

    Args:
        num_entities: V, >= 2.
        p: share of the pairs that the documents state, in [0, 1].
        steps: >= 0.
        rng: of the documents, then of the steps.

    Raises:
        ValueError: an argument is out of range.
    """
    if steps < 0:
        raise ValueError(f"steps must be >= 0; got {steps}.")
    known = source_relations(num_entities, p, rng)
    graph = csr_array(known.astype(np.float64))  # what scipy would convert it to at every search
    first = rng.integers(num_entities, size=steps)
    other = (first + rng.integers(1, num_entities, size=steps)) % num_entities
    gained = np.zeros(steps + 1, dtype=np.int64)
    gained[0] = known.sum()
    # Steps from one entity change nothing for another, so they are taken together, on one tree.
    by_entity = np.argsort(first, kind="stable")
    borders = np.searchsorted(first[by_entity], np.arange(num_entities + 1))
    for x, (begin, end) in enumerate(itertools.pairwise(borders.tolist())):
        if begin < end:
            places = by_entity[begin:end]
            gained[places + 1] = _gained(graph, known[x].tolist(), x, other[places].tolist())
    accuracy: NDArray[np.float64] = gained.cumsum() / (num_entities * (num_entities - 1))
    return accuracy


def _gained(graph: csr_array, row: list[bool], x: int, goals: list[int]) -> list[int]:
    """How many relations of ``x`` each path to a goal adds to those known, ``row``."""
    parents, counts = breadth_first_order(graph, x)[1].tolist(), []
    for goal in goals:
        z, new = goal, 0
        # What leads to a known entity is known, so the walk back to x ends at the first one.
        while not row[z] and parents[z] >= 0:
            row[z], new, z = True, new + 1, parents[z]
        counts.append(new)
    return counts


@dataclass(frozen=True)
class MixtureOfExponentials:
    """A fitted curve; call it with steps.

    Attributes:
        limit: C, where it ends.
        shares: mu, ``(k,)``, >= 0, of what is learned at each rate; what is missing to 1 is known at step 0.
        rates: r, ``(k,)``, per step, the fastest first.
        error: root mean square of the residuals.
    """

    limit: float
    shares: NDArray[np.float64]
    rates: NDArray[np.float64]
    error: float

    def __call__(self, t: ArrayLike) -> NDArray[np.float64]:
        """Accuracy at steps ``t``, same shape."""
        steps = np.asarray(t, dtype=np.float64)[..., None]
        value: NDArray[np.float64] = self.limit * (1 - (self.shares * np.exp(-self.rates * steps)).sum(-1))
        return value


def fit_mixture_of_exponentials(t: ArrayLike, accuracy: ArrayLike, k: int = 3) -> MixtureOfExponentials:
    """Least squares over limit, shares and rates, from several starts.

    Args:
        t: ``(n,)`` steps or tokens, >= 0, not all equal; any unit, which the rates are in.
        accuracy: ``(n,)``.
        k: exponentials.

    Raises:
        ValueError: shapes differ, too few points for ``2 k + 1`` parameters, or steps that are negative or all equal.
    """
    steps, goal = np.asarray(t, dtype=np.float64), np.asarray(accuracy, dtype=np.float64)
    if steps.ndim != 1 or steps.shape != goal.shape:
        raise ValueError(f"t and accuracy must be (n,) alike; got {steps.shape} and {goal.shape}.")
    if k < 1 or len(steps) < 2 * k + 1:
        raise ValueError(f"{2 * k + 1} parameters need k >= 1 and as many points; got k={k}, {len(steps)} points.")
    if steps.min() < 0 or np.ptp(steps) == 0:
        raise ValueError("t must be >= 0 and differ.")
    longest, shortest = steps.max(), np.diff(np.unique(steps)).min()

    def curve(theta: NDArray[np.float64]) -> MixtureOfExponentials:
        parts = np.concatenate([[1.0], np.exp(theta[1 : k + 1])])  # the first stands for what is known at once
        return MixtureOfExponentials(float(theta[0]), parts[1:] / parts.sum(), np.exp(theta[k + 1 :]), 0.0)

    def residuals(theta: NDArray[np.float64]) -> NDArray[np.float64]:
        return curve(theta)(steps) - goal

    # Rates from slower than the whole to faster than a step; shares from nearly all known at once to nearly nothing.
    low = np.concatenate([[0.0], np.full(k, -20.0), np.full(k, np.log(1e-2 / longest))])
    high = np.concatenate([[np.inf], np.full(k, 20.0), np.full(k, np.log(1e2 / shortest))])
    fits = []
    for start in range(1, STARTS + 1):
        fastest = np.log(1 / longest) + (np.log(1 / shortest) - np.log(1 / longest)) * start / STARTS
        rates = np.linspace(np.log(1 / longest), fastest, k)
        begin = np.concatenate([[max(goal.max(), 1e-6)], np.full(k, 2.0), rates])
        fits.append(least_squares(residuals, np.clip(begin, low, high), bounds=(low, high), x_scale="jac"))
    best = curve(min(fits, key=lambda fit: fit.cost).x)
    order = np.argsort(-best.rates)
    error = float(np.sqrt(np.mean((best(steps) - goal) ** 2)))
    return MixtureOfExponentials(best.limit, best.shares[order], best.rates[order], error)
