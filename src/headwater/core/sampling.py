"""Few-shot subsets: the same number of examples of each class, the same for every method under one seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.core.rng import derive_seed, hash_bits

__all__ = ["sample_shots"]


def sample_shots(y: ArrayLike, shots: int, seed: int, *, nested: bool = True) -> NDArray[np.int64]:
    """Draw ``shots`` examples of each class, without replacement.

    Whether an example is drawn depends on its position, its class-mates and the seed alone.

    Args:
        y: labels, ``(N,)``, integers or strings.
        shots: per class, >= 1.
        seed: any integer.
        nested: fewer shots are then a subset of more shots under the same seed, so that a learning curve adds examples
            instead of exchanging them. Otherwise each number of shots draws afresh.

    Returns:
        Indices into ``y``, ``(shots * classes,)``: the first example of every class in the order of the sorted labels,
        then the second of every class, and so on. When nested, fewer shots are a prefix.

    Raises:
        ValueError: ``y`` is not one-dimensional, ``shots`` is not positive, or a class has fewer examples than that.
    """
    labels = np.asarray(y)
    if labels.ndim != 1:
        raise ValueError(f"y must be one-dimensional; got shape {labels.shape}.")
    if shots < 1:
        raise ValueError(f"shots must be at least 1; got {shots}.")
    classes, code, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if (counts < shots).any():
        short = {str(c): int(n) for c, n in zip(classes, counts, strict=True) if n < shots}
        raise ValueError(f"{shots} shots need that many examples of each class; too few in {short}.")
    names = ("shots",) if nested else ("shots", shots)
    key = hash_bits(derive_seed(seed, *names), np.arange(labels.size), 1)[:, 0]
    by_class = np.lexsort((key, code))
    first = np.cumsum(counts) - counts
    drawn: NDArray[np.int64] = by_class[(first + np.arange(shots)[:, None]).ravel()].astype(np.int64)
    return drawn
