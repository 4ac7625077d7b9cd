"""Corrupted text for denoising: which tokens are taken out of a row, and how what is left and what is missing look.

    n_noise = clip(round(T r), 1, T - 1)        n_spans = clip(round(n_noise / mu), 1, min(n_noise, T - n_noise))

A row of T tokens loses exactly ``n_noise`` of them in exactly ``n_spans`` spans that never touch. Rounding is half to
even. numpy in, numpy out, no loop over tokens.

Placement of spans: ``"uniform"`` makes every placement of the spans equally likely. ``"t5"`` is that of the T5 code,
where kept text comes first and every row ends in noise, so that a single long span is always the end of the row.

Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
    arXiv:1910.10683, section 3.1.4 and figure 2.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from headwater.core.recipe import Spec

__all__ = [
    "Corruption",
    "SpanCorruption",
    "SuffixCorruption",
    "closed_rows",
    "solve_lengths",
    "span_counts",
    "span_mask",
    "suffix_counts",
    "suffix_mask",
    "to_sentinels",
]

Placement = Literal["uniform", "t5"]
Mask = NDArray[np.bool_]
Ids = NDArray[np.int32]


def span_counts(length: int, mean_span: float, rate: float) -> tuple[int, int]:
    """Return (n_noise, n_spans) of a row.

    Args:
        length: tokens of the row, >= 2.
        mean_span: wanted tokens per span, >= 1; one span where the row's noise is shorter.
        rate: wanted share of noise, in (0, 1).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> span_counts(512, 3, 0.15)
        (77, 26)
    """
    if length < 2:
        raise ValueError(f"a row needs at least 2 tokens, one to keep and one to take out; got {length}.")
    if not mean_span >= 1:
        raise ValueError(f"mean_span must be at least 1; got {mean_span}.")
    noise = _noise(length, rate)
    return noise, min(max(round(noise / mean_span), 1), noise, length - noise)


def _noise(length: int, rate: float) -> int:
    if not 0 < rate < 1:
        raise ValueError(f"rate must be in (0, 1); got {rate}.")
    return min(max(round(length * rate), 1), length - 1)


def span_mask(u: NDArray[np.floating], mean_span: float, rate: float, placement: Placement = "uniform") -> Mask:
    """Draw spans for a batch of rows of one length.

    Args:
        u: ``(B, T)`` uniforms in [0, 1), independent; they decide everything.
        mean_span: as in ``span_counts``.
        rate: as in ``span_counts``.
        placement: see the module.

    Returns:
        ``(B, T)``, True where a token is taken out; each row has exactly the counts of ``span_counts``.

    Raises:
        ValueError: an argument is out of range.
    """
    rows, length = u.shape
    noise, spans = span_counts(length, mean_span, rate)
    kept = length - noise
    spare = 2 if placement == "uniform" else 0
    segments = np.empty((rows, 2 * spans + (spare > 0)), dtype=np.int64)  # kept, noise, kept, ...
    segments[:, 1::2] = _composition(u[:, : noise - 1], spans)
    # Two tokens more than there are, taken off again at both ends, let the first and the last kept part be empty.
    segments[:, ::2] = _composition(u[:, noise - 1 : noise + kept + spare - 2], spans + (spare > 0))
    if spare:
        segments[:, [0, -1]] -= 1
    taken = np.broadcast_to(np.arange(segments.shape[1]) % 2 == 1, segments.shape)
    mask: Mask = np.repeat(taken.ravel(), segments.ravel()).reshape(rows, length)
    return mask


def _composition(u: NDArray[np.floating], parts: int) -> NDArray[np.int64]:
    """Write n into positive parts, every way equally likely: ``(B, n - 1)`` uniforms -> ``(B, parts)``, sum n."""
    rows, gaps = u.shape
    cuts = np.zeros((rows, parts + 1), dtype=np.int64)
    cuts[:, -1] = gaps + 1
    # The parts - 1 gaps with the smallest uniforms are a random subset of all gaps.
    cuts[:, 1:-1] = _smallest(u, parts - 1) + 1
    return np.diff(cuts, axis=1)


def _smallest(u: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """Columns of the ``count`` smallest values of each row, ascending, ``(B, count)``."""
    rows, columns = u.shape
    if count in (0, columns):
        return np.broadcast_to(np.arange(count), (rows, count))
    # Found by comparison with the largest of them: several times faster than argpartition and a sort.
    edge = np.partition(u, count - 1, axis=1)[:, count - 1 : count]
    places: NDArray[np.int64] = np.flatnonzero(u <= edge)
    if len(places) == rows * count:
        places = places.reshape(rows, count)
        places -= np.arange(rows)[:, None] * columns
        return places
    chosen: NDArray[np.int64] = u.argpartition(count - 1, axis=1)[:, :count]  # two values at the edge are equal
    chosen.sort(axis=1)
    return chosen


def suffix_counts(length: int, rate: float, jitter: bool) -> tuple[int, int]:
    """Return the fewest and the most tokens that ``suffix_mask`` takes out of a row of ``length`` tokens."""
    if length < 2:
        raise ValueError(f"a row needs at least 2 tokens, one to keep and one to take out; got {length}.")
    noise = _noise(length, rate)
    return (1, _noise(length, min(2 * rate, 1 - 1e-9))) if jitter else (noise, noise)


def suffix_mask(u: NDArray[np.floating], length: int, rate: float, jitter: bool) -> Mask:
    """Take out the end of each row: a prefix language model's target.

    Args:
        u: ``(B,)`` uniforms in [0, 1); without ``jitter`` only their number counts.
        length: tokens per row T, >= 2.
        rate: expected share of the target, in (0, 1).
        jitter: draw the number of target tokens uniformly from 1 to twice the expected number, instead of fixing it.

    Returns:
        ``(B, T)``, True where a token is taken out.

    Raises:
        ValueError: an argument is out of range.
    """
    fewest, most = suffix_counts(length, rate, jitter)
    noise = fewest + (u * (most - fewest + 1)).astype(np.int32)
    mask: Mask = np.arange(length) >= length - noise[:, None]
    return mask


def to_sentinels(
    ids: NDArray[np.integer], mask: Mask, sentinels: ArrayLike, eos: int, pad: int
) -> tuple[Ids, NDArray[np.int64], Ids, NDArray[np.int64]]:
    """Replace each span by one sentinel in the input; list sentinels and spans in the target; close both with EOS.

        a b c d e, mask 0 1 1 0 1   ->   a <0> d <1> eos   |   <0> b c <1> e eos

    Args:
        ids: ``(B, T)`` tokens.
        mask: ``(B, T)``, True where a token is taken out.
        sentinels: ``(K,)`` ids; the i-th span of a row takes the i-th.
        eos: id that closes both.
        pad: id that fills rows up to the longest.

    Returns:
        (inputs ``(B, Wi)``, their lengths ``(B,)``, targets ``(B, Wt)``, their lengths), EOS included.

    Raises:
        ValueError: shapes differ, or a row has more spans than there are sentinels.
    """
    if ids.shape != mask.shape or ids.ndim != 2:
        raise ValueError(f"ids and mask must both be (rows, tokens); got {ids.shape} and {mask.shape}.")
    markers = np.asarray(sentinels, dtype=np.int32)
    first = mask.copy()
    first[:, 1:] &= ~mask[:, :-1]
    spans, noise = _true(first), _true(mask)
    needed = int(spans.max(initial=0))
    if needed > len(markers):
        raise ValueError(f"a row has {needed} spans but there are only {len(markers)} sentinels; add more.")
    per_span = markers[_within(spans)]  # the sentinel of every span, rows end to end
    tokens: Ids = ids.astype(np.int32).ravel()

    # Places and `take` rather than boolean indexing, which is two to three times slower.
    taken = np.flatnonzero(mask)
    opens = first.ravel()[taken]
    place = np.arange(len(taken)) + opens.cumsum()  # each noise token, with room for the sentinels up to it
    opening = np.flatnonzero(opens)
    flat = np.empty(len(taken) + len(per_span), dtype=np.int32)
    flat[place] = tokens[taken]
    flat[place[opening] - 1] = per_span
    targets, target_lengths = _closed(flat, noise + spans, eos, pad)

    tokens[taken[opening]] = per_span
    left = tokens[np.flatnonzero(~mask | first)]
    inputs, input_lengths = _closed(left, ids.shape[1] - noise + spans, eos, pad)
    return inputs, input_lengths, targets, target_lengths


def closed_rows(ids: NDArray[np.integer], keep: Mask, eos: int, pad: int) -> tuple[Ids, NDArray[np.int64]]:
    """Return the tokens under ``keep`` of every row, closed by EOS.

    Args:
        ids: ``(B, T)`` tokens.
        keep: ``(B, T)``, True where a token stays.
        eos: id that closes each row.
        pad: id that fills rows up to the longest.

    Returns:
        (rows ``(B, W)``, their lengths ``(B,)``, EOS included).
    """
    tokens: Ids = ids.astype(np.int32, copy=False).ravel()[np.flatnonzero(keep)]
    return _closed(tokens, _true(keep), eos, pad)


def _true(mask: Mask) -> NDArray[np.int64]:
    """How many are True in each row."""
    counts: NDArray[np.int32] = mask.view(np.int8).sum(axis=1, dtype=np.int32)
    return counts.astype(np.int64)


def _within(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, ..., counts[0] - 1, 0, 1, ..., counts[1] - 1, ..."""
    return np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)


def _closed(flat: Ids, lengths: NDArray[np.int64], eos: int, pad: int) -> tuple[Ids, NDArray[np.int64]]:
    """Rows that stand end to end in ``flat``, as a matrix: each closed by ``eos``, then padded."""
    rows = np.full((len(lengths), int(lengths.max(initial=0)) + 1), pad, dtype=np.int32)
    read = 0
    for start, stop in pairwise(np.flatnonzero(np.diff(lengths, prepend=-1, append=-1)).tolist()):
        width = int(lengths[start])  # of these neighbours; exact counts make few such runs
        rows[start:stop, :width] = flat[read : read + (stop - start) * width].reshape(stop - start, width)
        read += (stop - start) * width
    rows[np.arange(len(lengths)), lengths] = eos
    return rows, lengths + 1


def solve_lengths(inputs_length: int, rate: float, mean_span: float) -> tuple[int, int, int]:
    """Find the longest row whose corrupted input, EOS included, fits ``inputs_length``.

    Args:
        inputs_length: tokens that the model reads, >= 3.
        rate: as in ``span_counts``.
        mean_span: as in ``span_counts``.

    Returns:
        (tokens of the row, of its input, of its target).

    Raises:
        ValueError: no row fits, or an argument is out of range.

    Example:
        >>> solve_lengths(512, 0.15, 3)
        (568, 512, 114)
    """

    def corrupted(length: int) -> tuple[int, int, int]:
        noise, spans = span_counts(length, mean_span, rate)
        return length, length - noise + spans + 1, noise + spans + 1

    if corrupted(2)[1] > inputs_length:
        raise ValueError(f"inputs_length must be at least {corrupted(2)[1]}; got {inputs_length}.")
    low, high = 2, 4
    while corrupted(high)[1] <= inputs_length:
        low, high = high, 2 * high
    while high - low > 1:  # the input never gets shorter when the row gets longer
        middle = (low + high) // 2
        low, high = (middle, high) if corrupted(middle)[1] <= inputs_length else (low, middle)
    return corrupted(low)


class SpanCorruption(Spec):
    """Spans anywhere in the row, each replaced by a sentinel."""

    kind: Literal["span"] = Field(default="span", description="spans anywhere in the row")
    mean_span: float = Field(ge=1, description="tokens per span; a row with less noise than that has one span")
    rate: float = Field(gt=0, lt=1, description="share of the row that is taken out")

    def mask(self, u: NDArray[np.floating]) -> Mask:
        """``span_mask`` from ``(B, T)`` uniforms."""
        return span_mask(u, self.mean_span, self.rate)

    def most(self, length: int) -> tuple[int, int, int]:
        """Of a row of ``length`` tokens: the most that are kept, the most that are taken out, the most sentinels."""
        noise, spans = span_counts(length, self.mean_span, self.rate)
        return length - noise, noise, spans


class SuffixCorruption(Spec):
    """The end of the row: what a prefix language model predicts. No sentinel."""

    kind: Literal["suffix"] = Field(default="suffix", description="the end of the row")
    rate: float = Field(gt=0, lt=1, description="expected share of the row that is taken out")
    jitter: bool = Field(default=False, description="draw the share uniformly up to twice its expectation")

    def mask(self, u: NDArray[np.floating]) -> Mask:
        """``suffix_mask`` from ``(B, T)`` uniforms, of which the first column is used."""
        return suffix_mask(u[:, 0], u.shape[1], self.rate, self.jitter)

    def most(self, length: int) -> tuple[int, int, int]:
        """Of a row of ``length`` tokens: the most that are kept, the most that are taken out, 0 sentinels."""
        fewest, most = suffix_counts(length, self.rate, self.jitter)
        return length - fewest, most, 0


Corruption = Annotated[SpanCorruption | SuffixCorruption, Field(discriminator="kind")]
