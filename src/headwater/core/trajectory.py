"""Curves measured on several seeds, drawn as one: their mean and their range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Curve", "mean_and_range"]


@dataclass(frozen=True)
class Curve:
    """Mean, lowest and highest value at each ``x``, all of one length."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def mean_and_range(seeds: Sequence[Sequence[Sequence[float]]]) -> Curve:
    """Summarise ``[[x, y], ...]`` of each seed, x rising, at every x that any seed has.

    Between its points a seed is linear. Only the stretch that all seeds cover is kept, of finite values.

    Raises:
        ValueError: there is no seed, or one without a finite point.
    """
    curves = [
        np.array([point for point in seed if np.isfinite(point).all()], dtype=np.float64).reshape(-1, 2)
        for seed in seeds
    ]
    if not curves or any(len(curve) == 0 for curve in curves):
        raise ValueError("a curve needs at least one finite point on every seed.")
    begin, end = max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves)
    x = np.unique(np.concatenate([c[:, 0] for c in curves]))
    x = x[(x >= begin) & (x <= end)] if begin <= end else x[:0]
    if len(x) == 0:
        curves, x = curves[:1], curves[0][:, 0]
    values = np.stack([np.interp(x, c[:, 0], c[:, 1]) for c in curves])
    return Curve(x.tolist(), values.mean(0).tolist(), values.min(0).tolist(), values.max(0).tolist())
