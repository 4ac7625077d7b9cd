"""Randomness without state: every draw is a function of where it is used, not of what was drawn before.

    bits(seed, stream, row, column) = mix(key + (column + 1) * g),   key = mix(mix(mix(seed + g) ^ stream) ^ row)

``mix`` is the finaliser of splitmix64 and ``g`` its odd increment, so each row carries its own splitmix64 sequence. A
row gets the same numbers in any batch, in any order, in any worker and after any restart, which is what makes a resumed
run equal to an uninterrupted one. ``derive_seed`` turns one user-facing seed into independent named ones.

Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, section 5 (splitmix64).
"""

from __future__ import annotations

import hashlib
import json
import operator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

if TYPE_CHECKING:
    import torch

__all__ = [
    "derive_seed",
    "hash_bits",
    "hash_integers",
    "hash_normal",
    "hash_uniform",
    "numpy_generator",
    "torch_generator",
]

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of splitmix64, in place; a bijection of the 64-bit words."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def _word(name: str, value: int) -> NDArray[np.uint64]:
    value = operator.index(value)
    if not 0 <= value <= _MASK:
        raise ValueError(f"{name} must be in [0, 2**64); got {value}. derive_seed maps any integer into that range.")
    return np.array([value], dtype=np.uint64)


def hash_bits(seed: int, rows: ArrayLike, n: int, stream: int = 0) -> NDArray[np.uint64]:
    """Return ``n`` random 64-bit words for each row.

    Args:
        seed: in [0, 2**64).
        rows: integers, ``(B,)``: what identifies an item for good, such as its position in the data order. They may
            repeat and be negative.
        n: words per row, >= 0. Asking for more leaves the first ones as they were.
        stream: in [0, 2**64). Draws for different purposes need different streams (or seeds from ``derive_seed``): the
            same (seed, stream, row, column) gives the same bits in every function of this module.

    Returns:
        ``(B, n)`` uint64.

    Raises:
        TypeError: ``rows`` are not integers.
        ValueError: ``rows`` is not one-dimensional, or a number is out of range.
    """
    ids = np.asarray(rows)
    if ids.ndim != 1:
        raise ValueError(f"rows must be one-dimensional; got shape {ids.shape}.")
    if ids.size and ids.dtype.kind not in "iu":
        raise TypeError(f"rows must be integers; got dtype {ids.dtype}.")
    if n < 0:
        raise ValueError(f"n must be >= 0; got {n}.")
    key = _mix(_word("seed", seed) + _INCREMENT)
    key = _mix(key ^ _word("stream", stream))
    # Negative rows wrap round to the upper half of uint64, one to one.
    key = _mix(key ^ ids.astype(np.uint64))
    columns = np.arange(1, n + 1, dtype=np.uint64) * _INCREMENT
    return _mix(key[:, None] + columns)


def hash_uniform(seed: int, rows: ArrayLike, n: int, stream: int = 0) -> NDArray[np.float64]:
    """Return uniforms in [0, 1) with 53 random bits, ``(B, n)`` float64. Arguments and errors as ``hash_bits``.

    Example:
        >>> batch = hash_uniform(0, [7, 3, 9], 4)
        >>> bool((hash_uniform(0, [9], 4) == batch[2]).all())
        True
    """
    uniform = (hash_bits(seed, rows, n, stream) >> np.uint64(11)).astype(np.float64)
    uniform *= 2.0**-53
    return uniform


def hash_normal(seed: int, rows: ArrayLike, n: int, stream: int = 0) -> NDArray[np.float64]:
    """Return standard normals, ``(B, n)`` float64, by inversion, one word each. Arguments and errors: ``hash_bits``."""
    # 52 bits plus a half are exactly representable and strictly inside (0, 1): never infinite, symmetric about 0.
    uniform = ((hash_bits(seed, rows, n, stream) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    normal: NDArray[np.float64] = ndtri(uniform)
    return normal


def hash_integers(seed: int, rows: ArrayLike, n: int, low: int, high: int, stream: int = 0) -> NDArray[np.int64]:
    """Return integers in [low, high), ``(B, n)`` int64. Other arguments and errors as ``hash_bits``.

    No value's probability is off by more than 2**-53, the granularity of ``hash_uniform``.

    Raises:
        ValueError: ``[low, high)`` is empty or wider than 2**53.
    """
    if not 0 < high - low <= 1 << 53:
        raise ValueError(f"high - low must be in [1, 2**53]; got low={low}, high={high}.")
    # Largest uniform 1 - 2**-53 times the width always rounds below the width, so `high` is never reached.
    return (hash_uniform(seed, rows, n, stream) * (high - low)).astype(np.int64) + low


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a seed in [0, 2**63) for the stream called ``names``, e.g. ``derive_seed(seed, "mask", epoch)``.

    A function of its arguments alone, on every platform and in every version of Python: adding a stream leaves the
    others as they were. ``"1"`` and ``1`` are different names, and so are ``("ab",)`` and ``("a", "b")``.

    Args:
        seed: any integer.
        names: strings and integers, in order; none gives a seed that differs from ``seed`` itself.

    Raises:
        TypeError: a name is neither a string nor an integer.

    Example:
        >>> derive_seed(0, "data order") == derive_seed(0, "data order") != derive_seed(0, "initialisation")
        True
    """
    path = [operator.index(seed), *(name if isinstance(name, str) else operator.index(name) for name in names)]
    digest = hashlib.blake2b(json.dumps(path).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def torch_generator(seed: int, *names: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a ``torch.Generator`` on ``device`` seeded with ``derive_seed(seed, *names)``."""
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(seed, *names))


def numpy_generator(seed: int, *names: str | int) -> np.random.Generator:
    """Return a ``numpy.random.Generator`` (PCG64) seeded with ``derive_seed(seed, *names)``."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, *names)))
