"""Which problems of arithmetic are learned from and which are held out, and what a table of sums gives away.

Balanced pairs: the share of pairs whose longer operand has k digits is the share of numbers with k digits, so that of
10 000 pairs of up to three digits 100 have one, 900 two and 9000 three; of equal length, every number of carries is met
equally often.

Source: Lee et al., "Teaching Arithmetic to Small Transformers", arXiv:2307.03381: balanced sampling, and addition as
    the completion of a matrix of rank 2.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.corpora.arithmetic_formats import Operation

__all__ = ["balanced_pairs", "carries", "complement", "lengths", "num_pairs", "rank2_complete"]

ENUMERATED = 4_000_000
"""At most so many pairs are listed to choose from; else pairs are drawn until there are enough."""

DRAWN = 1_000_000
"""At most so many pairs are drawn."""

SPARSE = 50
"""Where there are so many times more pairs than are chosen, they are drawn, which is faster than listing them."""


def num_pairs(op: Operation, digits: int) -> int:
    """How many different problems there are: of operands with up to ``digits`` digits, or with so many decimals."""
    if op == "sin":
        return 2 * int(np.pi / 2 * 10**digits) + 1
    return int(9 * 10**digits if op == "sqrt" else 10 ** (2 * digits))


def _operands(op: Operation, codes: NDArray[np.int64], digits: int) -> NDArray[np.int64]:
    """Problems by their number in [0, num_pairs), ``(n, 2)``."""
    if op in ("sin", "sqrt"):
        first = codes + (10**digits if op == "sqrt" else -(num_pairs(op, digits) // 2))
        return np.stack([first, np.zeros_like(codes)], axis=1)
    return np.stack([codes // 10**digits, codes % 10**digits], axis=1)


def _codes(op: Operation, pairs: ArrayLike, digits: int) -> NDArray[np.int64]:
    """The inverse of ``_operands``."""
    x, y = np.asarray(pairs, dtype=np.int64).reshape(-1, 2).T
    if op in ("sin", "sqrt"):
        return np.asarray(x - (10**digits if op == "sqrt" else -(num_pairs(op, digits) // 2)))
    return np.asarray(x * 10**digits + y)


def carries(op: Operation, pairs: ArrayLike) -> NDArray[np.int64]:
    """Columns that carry in a sum, or borrow in a difference, ``(n,)``; 0 for other operations.

    Args:
        op: the operation.
        pairs: ``(n, 2)``, none negative.
    """
    x, y = np.asarray(pairs, dtype=np.int64).reshape(-1, 2).T
    count, carry, sign = np.zeros_like(x), np.zeros_like(x), 1 if op == "+" else -1
    longest = np.maximum(x, y)
    place = 1
    while op in ("+", "-") and (longest >= place).any():
        total = x // place % 10 + sign * (y // place % 10 + carry)
        carry = np.where(longest >= place, (total > 9) | (total < 0), 0).astype(np.int64)
        count += carry
        place *= 10
    return count


def lengths(op: Operation, pairs: ArrayLike) -> NDArray[np.int64]:
    """Digits of the longer operand, ``(n,)``; 0 for sin and sqrt, whose operands are all of one length."""
    longest = np.asarray(pairs, dtype=np.int64).reshape(-1, 2).max(axis=1)
    if op in ("sin", "sqrt"):
        return np.zeros_like(longest)
    powers = 10 ** np.arange(1, 19, dtype=np.int64)
    found: NDArray[np.int64] = np.searchsorted(powers, longest, side="right").astype(np.int64) + 1
    return found


def balanced_pairs(
    op: Operation,
    digits: int,
    n: int,
    rng: np.random.Generator,
    by: Collection[Literal["digits", "carries"]] = ("digits", "carries"),
) -> NDArray[np.int64]:
    """Distinct problems in exact quotas, in random order, ``(n, 2)``.

    A quota that is larger than its group takes the group whole, and the rest goes to longer operands or to other
    numbers of carries.

    Args:
        op: the operation. Only + and - are balanced by carries; sin and sqrt by neither.
        digits: of the longest operands, or decimals of sin and sqrt.
        n: how many.
        rng: draws them.
        by: what is balanced; nothing for uniform.

    Raises:
        ValueError: there are fewer than ``n`` distinct problems, or too many are asked for to draw them.
    """
    _check_room(op, digits, n)
    by_length = "digits" in by and op in ("+", "-", "*")
    quotas = _length_quotas(digits, n) if by_length else [n]
    chosen = []
    for length, quota in enumerate(quotas, start=1 if by_length else digits):
        groups = length + 1 if "carries" in by and op in ("+", "-") else 1
        shortest = 10 ** (length - 1) if by_length and length > 1 else 0
        found, labels = _candidates(op, length, shortest, quota, groups, rng)
        chosen.append(found[_evenly(labels, quota, rng)])
    pairs = np.concatenate(chosen)
    return pairs[rng.permutation(len(pairs))]


def _candidates(
    op: Operation, digits: int, shortest: int, n: int, groups: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Distinct pairs that hold an operand of ``shortest`` or more, and the group of each by its number of carries.

    All of them; or of many, so many that every group has its even share of ``n``.
    """
    there = num_pairs(op, digits)
    drawn = there > min(ENUMERATED, SPARSE * n)
    codes = np.empty(0, dtype=np.int64) if drawn else np.arange(there)
    while True:
        if drawn:
            codes = np.union1d(codes, rng.integers(there, size=max(2 * n + 1000, len(codes))))
        pairs = _operands(op, codes, digits)
        pairs = pairs[pairs.max(axis=1) >= shortest] if shortest else pairs
        labels = carries(op, pairs) if groups > 1 else np.zeros(len(pairs), dtype=np.int64)
        if not drawn or np.bincount(labels, minlength=groups).min() >= -(-n // groups):
            return pairs, labels


def _check_room(op: Operation, digits: int, n: int) -> None:
    there = num_pairs(op, digits)
    if not 0 < n <= there:
        raise ValueError(f"n is {n}, but {op} with digits={digits} has {there} distinct pairs; ask for 1 to {there}.")
    if there > ENUMERATED and n > DRAWN:
        raise ValueError(f"n is {n}; of so many pairs at most {DRAWN} are drawn. Ask for fewer.")


def _length_quotas(digits: int, n: int) -> list[int]:
    """How many pairs of each length: as numbers have it, what is too much for a length going to the longest."""
    room = [10 ** (2 * k) - (10 ** (2 * k - 2) if k > 1 else 0) for k in range(1, digits + 1)]
    quotas = [min(r, n * (10 if k == 0 else 9 * 10**k) // 10**digits) for k, r in enumerate(room)]
    for k in reversed(range(digits)):
        quotas[k] += min(room[k] - quotas[k], n - sum(quotas))
    return quotas


def _evenly(labels: NDArray[np.int64], n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """``n`` places, as nearly as many of each label as there are."""
    members = sorted((np.flatnonzero(labels == label) for label in np.unique(labels)), key=len)
    chosen, left = [], n
    for number, group in enumerate(members):
        count = min(len(group), left // (len(members) - number))
        chosen.append(rng.choice(group, count, replace=False))
        left -= count
    return np.concatenate(chosen)


def complement(
    pairs: ArrayLike, op: Operation, digits: int, n: int | None = None, rng: np.random.Generator | None = None
) -> NDArray[np.int64]:
    """Distinct problems that are not among ``pairs``, ``(n, 2)``.

    Args:
        pairs: ``(m, 2)``.
        op: as in ``balanced_pairs``.
        digits: the same.
        n: how many, drawn at random; None: all, in order.
        rng: draws them.

    Raises:
        ValueError: fewer than ``n`` are left, all of very many are asked for, or ``n`` comes without ``rng``.
    """
    there, taken = num_pairs(op, digits), np.unique(_codes(op, pairs, digits))
    if n is None:
        if there > ENUMERATED:
            raise ValueError(f"{op} with digits={digits} has {there} pairs, too many to list; give n and rng.")
        return _operands(op, np.setdiff1d(np.arange(there), taken), digits)
    if rng is None:
        raise ValueError("n pairs are drawn at random; give rng.")
    if n > there - len(taken):
        raise ValueError(
            f"{n} pairs are asked for beside {len(taken)}, but {op} with digits={digits} has {there}; ask for fewer."
        )
    if there <= ENUMERATED:
        return _operands(op, rng.choice(np.setdiff1d(np.arange(there), taken), n, replace=False), digits)
    _check_room(op, digits, max(n, 1))
    left = np.empty(0, dtype=np.int64)
    while len(left) < n:
        left = np.setdiff1d(np.concatenate([left, rng.integers(there, size=n + 1000)]), taken)
    return _operands(op, rng.permutation(left)[:n], digits)


def rank2_complete(mask: ArrayLike) -> tuple[NDArray[np.float64], bool]:
    """Complete the table ``M_ij = i + j``, of rank 2, from some of its entries.

    An entry follows from any three that form a rectangle with it: ``M_ij = M_ib + M_aj - M_ab``. In rounds, until none
    is new; that is all of the table exactly where the bipartite graph of rows and columns, with the observed entries
    for edges, is connected, so of the order of n log n random entries are needed.

    Args:
        mask: ``(n, n)``, which entries are observed.

    Returns:
        The table, NaN where nothing follows, and whether it is whole. An empty table is.

    Raises:
        ValueError: the mask is not square.
    """
    known = np.asarray(mask, dtype=bool)
    if known.ndim != 2 or known.shape[0] != known.shape[1]:
        raise ValueError(f"mask must be square; got shape {known.shape}.")
    size = np.arange(len(known), dtype=np.float64)
    values = np.where(known, size[:, None] + size, 0.0)
    while True:
        k = known.astype(np.float64)
        ways = k @ k.T @ k  # rectangles that give each entry
        new = (ways > 0) & ~known
        if not new.any():
            return np.where(known, values, np.nan), bool(known.all())
        sums = values @ k.T @ k + k @ k.T @ values - k @ values.T @ k
        values = np.where(new, np.round(sums / np.maximum(ways, 1)), values)
        known = known | new
