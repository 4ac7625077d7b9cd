"""Which frames are hidden, and which others a hidden frame is told apart from: functions of (seed, row) alone.

    starts: floor(p T + u) of the T - M + 1 places, without replacement;   a frame is hidden in [start, start + M)

Spans may overlap, so the hidden share approaches 1 - (1 - p)^M. A negative is another hidden frame of the same row.

Source: Baevski et al., "wav2vec 2.0", arXiv:2006.11477, sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.core.rng import derive_seed, hash_bits, hash_uniform

__all__ = ["num_frames", "receptive_field", "sample_negatives", "span_mask"]


def num_frames(samples: ArrayLike, kernels: Sequence[int], strides: Sequence[int]) -> NDArray[np.int64]:
    """Frames that a stack of convolutions without padding makes of so many samples, of the same shape; at least 0."""
    lengths = np.asarray(samples, dtype=np.int64)
    for kernel, stride in zip(kernels, strides, strict=True):
        lengths = np.maximum((lengths - kernel) // stride + 1, 0)
    return lengths


def receptive_field(kernels: Sequence[int], strides: Sequence[int], frames: int = 1) -> tuple[int, int]:
    """Samples that ``frames`` frames in a row see, and samples from frame to frame.

    Example:
        >>> receptive_field((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2))
        (400, 320)
    """
    seen = frames
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        seen = (seen - 1) * stride + kernel
    return seen, int(np.prod(strides))


def span_mask(
    rows: ArrayLike, lengths: ArrayLike, probability: float, length: int, *, width: int, seed: int
) -> NDArray[np.bool_]:
    """Hide spans of frames.

    Args:
        rows: ``(B,)`` integers, the names of the rows.
        lengths: frames of each that are not padding, ``(B,)``, each >= ``length``.
        probability: share of a row's frames at which a span starts, in [0, 1]; above 0 each row has one at least.
        length: of a span, in frames, >= 1.
        width: frames of the batch, padding included.
        seed: any integer.

    Returns:
        ``(B, width)``, True where hidden; padding never is.

    Raises:
        ValueError: a row that is shorter than a span or longer than the batch, or a number out of range.
    """
    ids, frames = np.asarray(rows), np.asarray(lengths, dtype=np.int64)
    if not 0 <= probability <= 1 or length < 1:
        raise ValueError(f"probability must be in [0, 1] and length >= 1; got {probability} and {length}.")
    if frames.size and (frames.min() < length or frames.max() > width):
        raise ValueError(
            f"rows must have between {length} (one span) and {width} frames; got {frames.min()} to {frames.max()}."
        )
    mask = np.zeros((len(frames), width), dtype=bool)
    if probability == 0 or not frames.size:
        return mask
    rounding = hash_uniform(derive_seed(seed, "span count"), ids, 1)[:, 0]
    places = frames - length + 1
    counts = np.clip((probability * frames + rounding).astype(np.int64), 1, places)
    # The places with the smallest keys are a draw without replacement; keys do not depend on the padding.
    keys = hash_bits(derive_seed(seed, "span starts"), ids, width - length + 1) >> np.uint64(1)
    keys[np.arange(keys.shape[1]) >= places[:, None]] = np.uint64(2**64 - 1)
    chosen = np.argsort(np.argsort(keys, axis=1, kind="stable"), axis=1, kind="stable") < counts[:, None]
    for shift in range(length):
        mask[:, shift : shift + chosen.shape[1]] |= chosen
    return mask


def sample_negatives(mask: NDArray[np.bool_], rows: ArrayLike, count: int, *, seed: int) -> NDArray[np.int64]:
    """Draw, for every hidden frame, other hidden frames of its row, with replacement.

    Args:
        mask: ``(B, T)``, True where hidden.
        rows: ``(B,)`` integers, the names of the rows.
        count: negatives for each frame, >= 1.
        seed: any integer.

    Returns:
        ``(B, T, count)`` int64: positions within the row; 0 where nothing is hidden. Draws go by a frame's rank among
        the hidden ones, so padding does not change them. (`transformers` counts through the whole batch: add
        ``row * T``.)

    Raises:
        ValueError: a row with exactly one hidden frame, or ``count`` below 1.
    """
    if count < 1:
        raise ValueError(f"count must be >= 1; got {count}.")
    hidden = mask.sum(axis=1)
    if (hidden == 1).any():
        raise ValueError(f"row {int(np.flatnonzero(hidden == 1)[0])} has one hidden frame, so nothing to tell it from.")
    found = np.zeros((*mask.shape, count), dtype=np.int64)
    most = int(hidden.max(initial=0))
    if not most:
        return found
    where = np.argsort(~mask, axis=1, kind="stable")[:, :most]  # place of each rank
    uniform = hash_uniform(derive_seed(seed, "negatives"), rows, most * count).reshape(len(mask), most, count)
    others = (uniform * (hidden[:, None, None] - 1)).astype(np.int64)
    others += others >= np.arange(most)[:, None]
    picked = np.take_along_axis(where[:, :, None], np.clip(others, 0, most - 1), axis=1)
    found[mask] = picked[np.arange(most) < hidden[:, None]]
    return found
