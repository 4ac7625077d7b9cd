"""The order of data, as a function: which item stands at position i of an endless stream.

    epoch(i) = i // n,    item(i) = permutation(seed, epoch(i), n)[i mod n]

Nothing is drawn in sequence, so seeking to a position costs what reading it costs, and any number of workers,
processes or restarts sees the same stream.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.core.rng import derive_seed, hash_bits

__all__ = ["GroupedIndex", "VirtualIndex", "permutation"]


def permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """Return the order of ``n`` items in one epoch, ``(n,)`` int64.

    Items are sorted by a hash of (seed, epoch, item) instead of being shuffled by a generator, whose stream may change
    from one version of a library to the next.

    Args:
        seed: any integer.
        epoch: >= 0.
        n: number of items, >= 0.

    Raises:
        ValueError: ``epoch`` or ``n`` is negative.

    Example:
        >>> sorted(permutation(0, 3, 5).tolist())
        [0, 1, 2, 3, 4]
    """
    if epoch < 0 or n < 0:
        raise ValueError(f"epoch and n must be >= 0; got epoch={epoch}, n={n}.")
    keys = hash_bits(derive_seed(seed, "order"), np.arange(n, dtype=np.int64), 1, stream=epoch)[:, 0]
    return np.argsort(keys, kind="stable")


@dataclass(frozen=True)
class VirtualIndex:
    """An endless, seekable walk over ``n`` items, shuffled anew in every epoch.

    The two latest epochs' permutations are kept, enough for a batch that straddles a border; they are a cache and never
    change an answer.

    Args:
        n: number of items, >= 1.
        seed: any integer.
        begin: which position of the walk is called 0, so that a later reader goes on where another stopped.

    Raises:
        ValueError: ``n`` is not positive, or ``begin`` is negative.
    """

    n: int
    seed: int
    begin: int = 0
    _orders: dict[int, NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.n < 1 or self.begin < 0:
            raise ValueError(
                f"a virtual index needs at least one item and begin >= 0; got n={self.n} and begin={self.begin}."
            )

    def __call__(self, positions: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (epoch, item) of each position; all three have the same shape, int64.

        Raises:
            ValueError: a position is negative.
        """
        places = np.asarray(positions, dtype=np.int64)
        if places.size and places.min() < 0:
            raise ValueError(f"positions must be >= 0; got {int(places.min())}.")
        epochs, offsets = np.divmod(places + self.begin, self.n)
        if epochs.size and epochs.min() == epochs.max():  # as nearly every batch has it
            return epochs, self._order(int(epochs.flat[0]))[offsets]
        items = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            items[here] = self._order(int(epoch))[offsets[here]]
        return epochs, items

    def _order(self, epoch: int) -> NDArray[np.int64]:
        order = self._orders.get(epoch)
        if order is None:
            order = permutation(self.seed, epoch, self.n)
            for stale in list(self._orders)[:-1]:
                self._orders.pop(stale, None)
            self._orders[epoch] = order
        return order


class GroupedIndex:
    """An endless, seekable walk that takes one item of each group in turn, each group shuffled anew when it is through.

    Position i belongs to group i mod g, whatever the groups' sizes: of any g positions in a row each group has one.

    Args:
        groups: the group of each item, ``(n,)``, integers or strings.
        seed: any integer.

    Raises:
        ValueError: there is no item, or ``groups`` is not one-dimensional.

    Example:
        >>> groups = np.array(["a", "a", "a", "b"])
        >>> groups[GroupedIndex(groups, seed=0)(np.arange(6))[1]].tolist()
        ['a', 'b', 'a', 'b', 'a', 'b']
    """

    def __init__(self, groups: ArrayLike, seed: int) -> None:
        values = np.asarray(groups)
        if values.ndim != 1 or not values.size:
            raise ValueError(f"groups must be (n,), with n > 0; got shape {values.shape}.")
        self.n = len(values)
        names, code = np.unique(values, return_inverse=True)
        self._members = [np.flatnonzero(code == group) for group in range(len(names))]
        self._walks = [VirtualIndex(len(own), derive_seed(seed, "group", g)) for g, own in enumerate(self._members)]

    def __call__(self, positions: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (epoch of its group, item) of each position; all three have the same shape, int64.

        Raises:
            ValueError: a position is negative.
        """
        turns, group = np.divmod(np.asarray(positions, dtype=np.int64), len(self._members))
        epochs, items = np.empty_like(turns), np.empty_like(turns)
        for number, (members, walk) in enumerate(zip(self._members, self._walks, strict=True)):
            here = group == number
            epochs[here], own = walk(turns[here])
            items[here] = members[own]
        return epochs, items
