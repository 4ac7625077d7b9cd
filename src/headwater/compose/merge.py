"""Merging checkpoints that share a base, streamed: no model is ever held in memory.

    task_arithmetic   base + lambda sum_i w_i v_i                       v_i = theta_i - base
    linear            sum_i w_i theta_i / sum_i w_i
    slerp             (sin((1 - t) omega) theta_a + sin(t omega) theta_b) / sin omega,  omega the angle between them
    ties              base + lambda mean of those trimmed w_i v_i that have the sign of their sum, element by element
    dare              base + lambda sum_i w_i m_i v_i / density,        m_i ~ Bernoulli(density), element by element

Sources: Ilharco et al., "Editing Models with Task Arithmetic", arXiv:2212.04089; Wortsman et al., "Model soups",
arXiv:2203.05482; Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985; Yadav et al., "TIES-Merging",
arXiv:2306.01708, section 4.2; Yu et al., "Language Models are Super Mario" (DARE), arXiv:2311.03099, equations 1 to 3.
Differs: TIES trims tensor by tensor (the paper: all tensors of a model together), and keeps every element that equals
the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from headwater.core.rng import derive_seed, hash_uniform
from headwater.core.safetensors_stream import TensorMeta
from headwater.core.stream_map import MapFn
from headwater.core.weights import MergeReport, WeightSource, adapter_deltas, delta, stream_map

__all__ = ["MergeMethod", "MergeReport", "blocks", "merge", "open_part"]

MergeMethod = Literal["task_arithmetic", "linear", "slerp", "ties", "dare"]
Ref = str | Path | Mapping[str, Tensor] | WeightSource

PARALLEL = 1e-6
"""Below this sine of the angle, slerp is its limit, the straight line; float64 loses half its digits there."""
_BLOCK = 1 << 20


def open_part(ref: Ref, base: WeightSource) -> WeightSource:
    """Open a part of a merge: a model, a saved ``WeightDelta``, or a LoRA adapter, which is a change of ``base``.

    Raises:
        FileNotFoundError, ValueError: as ``WeightSource.open`` and ``adapter_deltas``.
    """
    if isinstance(ref, WeightSource):
        return ref
    if isinstance(ref, (str, Path)) and (Path(ref) / "adapter_config.json").is_file():
        return adapter_deltas(ref, base)
    return WeightSource.open(ref)


def merge(
    base: Ref,
    parts: Mapping[str, tuple[Ref, float]],
    out: Path,
    *,
    method: MergeMethod = "task_arithmetic",
    density: float | Mapping[str, float] = 1.0,
    scale: float = 1.0,
    normalize: bool | None = None,
    seed: int = 0,
    **streaming: Any,  # Any: the keyword arguments of stream_map, typed there
) -> MergeReport:
    """Write the merged model to a new directory, in formats that transformers opens.

    Arithmetic is in float32 and rounded once; in float64 where a model is stored in float32, so that weights
    ``(1, 0)`` give the first part back bit for bit.

    Args:
        base: the model that all parts come from; its configuration and tokenizer are copied.
        parts: name to (model, LoRA adapter directory or saved difference, weight). ``linear`` and ``slerp`` may have
            a part called ``base``, which is the base itself; slerp takes exactly two, and t is the second's share.
        out: the new directory.
        method: see above.
        density: share of each difference that is kept, in (0, 1], one for all or by part; ``ties`` and ``dare`` only.
        scale: lambda.
        normalize: divide by the sum of the weights. None: as published, which is so for ``linear`` and ``ties``.
        seed: of ``dare``'s draws, which depend on (seed, part, tensor, element) alone.
        streaming: further arguments of ``stream_map``: ``out_dtype``, ``max_memory``, ``max_shard_size``, ``vocab``...

    Raises:
        ValueError: no parts, weights or densities that mean nothing, or as ``stream_map``.
        FileExistsError, OSError: as ``stream_map``.
    """
    first = base if isinstance(base, WeightSource) else WeightSource.open(base)
    weights = {name: float(weight) for name, (_, weight) in parts.items()}
    densities = dict(density) if isinstance(density, Mapping) else dict.fromkeys(parts, float(density))
    normalize = method in ("linear", "ties") if normalize is None else normalize
    _check(method, weights, densities, normalize)
    opened = {name: open_part(ref, first) for name, (ref, _) in parts.items() if name != "base"}
    wide = any(_widest(source) == torch.float64 for source in (first, *opened.values()) if not source.is_delta)
    fn: MapFn
    if method in ("ties", "dare"):
        opened = {
            name: _sparse(method, name, _difference(source, first), densities[name], seed)
            for name, source in opened.items()
        }
    is_delta = {name: source.is_delta for name, source in opened.items()}
    if method == "slerp":
        fn = _slerp(first, opened, weights)
    elif method == "linear":
        fn = _linear(weights, is_delta, normalize)
    elif method == "ties":
        fn = _ties(weights, scale, normalize)
    else:
        fn = _add(weights, is_delta, scale / math.fsum(weights.values()) if normalize else scale)
    fn.elementwise = True  # type: ignore[attr-defined]  # functions take attributes; mypy has no type for that
    recipe = {
        "merge": method,
        "weights": weights,
        "density": densities,
        "scale": scale,
        "normalize": normalize,
        "seed": seed,
    }
    accumulate = torch.float64 if wide else torch.float32
    return stream_map({"base": first, **opened}, fn, out, accumulate=accumulate, recipe=recipe, **streaming)


def _check(method: str, weights: Mapping[str, float], densities: Mapping[str, float], normalize: bool) -> None:
    if not weights:
        raise ValueError("there is nothing to merge: give at least one part.")
    if "base" in weights and method not in ("linear", "slerp"):
        raise ValueError(f"a part called 'base' has a difference of zero under {method!r}; leave it out.")
    if method == "slerp" and (len(weights) != 2 or min(weights.values()) < 0 or sum(weights.values()) <= 0):
        raise ValueError(f"slerp goes between two models, with weights >= 0; got {dict(weights)}.")
    if not all(math.isfinite(weight) for weight in weights.values()):
        raise ValueError(f"weights must be finite; got {dict(weights)}.")
    if normalize and abs(math.fsum(weights.values())) < 1e-12:
        raise ValueError(f"the weights {dict(weights)} sum to 0, so they cannot be normalised; set normalize=False.")
    if missing := sorted(set(weights) - set(densities)):
        raise ValueError(f"density gives no value for {', '.join(missing)}.")
    for name, value in densities.items():
        if not 0 < value <= 1:
            raise ValueError(f"density must be in (0, 1]; got {value} for {name!r}. Use 1.0 to keep every weight.")
        if value < 1 and method not in ("ties", "dare"):
            raise ValueError(
                f"{method!r} keeps every weight, so density must be 1.0; got {value}. Use 'ties' or 'dare'."
            )


def _widest(source: WeightSource) -> torch.dtype:
    """The dtype in which a sum of differences gives a source's own values back."""
    stored = {meta.dtype for meta in map(source.meta, source.names()) if meta.dtype.is_floating_point}
    return torch.float64 if stored & {torch.float32, torch.float64} else torch.float32


def _add(weights: Mapping[str, float], is_delta: Mapping[str, bool], scale: float) -> MapFn:
    def fn(_: str, values: dict[str, Tensor]) -> Tensor:
        base = values["base"]
        total = torch.zeros_like(base)
        for name, weight in weights.items():
            value = values[name] if is_delta[name] else values[name] - base
            total.add_(value, alpha=weight)
        return base + scale * total

    return fn


def _linear(weights: Mapping[str, float], is_delta: Mapping[str, bool], normalize: bool) -> MapFn:
    norm = math.fsum(weights.values()) if normalize else 1.0

    def fn(_: str, values: dict[str, Tensor]) -> Tensor:
        total = torch.zeros_like(values["base"])
        for name, weight in weights.items():
            total.add_(values[name], alpha=weight)
            if is_delta.get(name):
                total.add_(values["base"], alpha=weight)
        return total / norm

    return fn


def _ties(weights: Mapping[str, float], scale: float, normalize: bool) -> MapFn:
    def fn(_: str, values: dict[str, Tensor]) -> Tensor:
        weighted = torch.stack([weight * values[name] for name, weight in weights.items()])
        elected = torch.sign(weighted.sum(dim=0))
        agrees = (torch.sign(weighted) == elected) & (weighted != 0)
        total = (weighted * agrees).sum(dim=0)
        if normalize:
            shares = torch.tensor(list(weights.values()), dtype=weighted.dtype)
            mass = torch.einsum("p,p...->...", shares.abs(), agrees.to(weighted.dtype))
            total = torch.where(mass > 0, total / mass, total)
        return values["base"] + scale * total

    return fn


def _slerp(base: WeightSource, opened: Mapping[str, WeightSource], weights: Mapping[str, float]) -> MapFn:
    """Angles first, in one pass over both models; then the merge is elementwise and streams in blocks."""
    (a, first), (b, second) = weights.items()
    t = second / (first + second)
    coefficients: dict[str, tuple[float, float]] = {}

    def value(name: str, values: Mapping[str, Tensor]) -> Tensor:
        source = opened.get(name)
        return values["base"] + values[name] if source is not None and source.is_delta else values[name]

    for tensor in base.names():
        if base.meta(tensor).dtype.is_floating_point:
            sums = np.zeros(3)
            for start, stop in blocks(base.meta(tensor)):
                values = {
                    role: _rows(source, base, tensor, start, stop).double()
                    for role, source in {"base": base, **opened}.items()
                }
                x, y = value(a, values).flatten(), value(b, values).flatten()
                sums += [float(x @ y), float(x @ x), float(y @ y)]
            coefficients[tensor] = _arc(sums, t)

    def fn(name: str, values: dict[str, Tensor]) -> Tensor:
        left, right = coefficients[name]
        return left * value(a, values) + right * value(b, values)

    return fn


def _arc(sums: np.ndarray, t: float) -> tuple[float, float]:
    dot, aa, bb = sums
    if aa == 0 or bb == 0:
        return 1 - t, t
    omega = math.acos(max(-1.0, min(1.0, dot / math.sqrt(aa * bb))))
    if math.sin(omega) < PARALLEL:
        return 1 - t, t
    return math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)


def _rows(source: WeightSource, base: WeightSource, name: str, start: int, stop: int) -> Tensor:
    """Rows of a source; where a part lacks them, what ``stream_map`` puts there: no change."""
    rows = source.meta(name).rows if name in source else 0
    found = source.slice(name, start, min(stop, rows)) if start < rows else None
    if found is not None and rows >= stop:
        return found
    rest = base.slice(name, start if found is None else rows, stop)
    rest = torch.zeros_like(rest) if source.is_delta else rest
    return rest if found is None else torch.cat([found.to(rest.dtype), rest])


def blocks(meta: TensorMeta) -> Iterator[tuple[int, int]]:
    """Row ranges of about a million elements that cover a tensor."""
    step = max(1, _BLOCK // max(meta.row_elements, 1))
    for start in range(0, meta.rows if meta.nbytes else 0, step):
        yield start, min(start + step, meta.rows)


def _difference(part: WeightSource, base: WeightSource) -> WeightSource:
    return part if part.is_delta else delta(part, base)


def _sparse(method: str, part: str, values: WeightSource, density: float, seed: int) -> WeightSource:
    if density == 1:
        return values
    if method == "ties":
        thresholds: dict[str, float] = {}

        def trim(name: str, rows: Tensor, start: int) -> Tensor:
            if name not in thresholds:  # two threads may both compute it, to the same value
                thresholds[name] = _threshold(values, name, density)
            return rows * (rows.abs() >= thresholds[name])

        return _Sparse(values, trim)

    def drop(name: str, rows: Tensor, start: int) -> Tensor:
        key = derive_seed(seed, "dare", part, name)
        shape = (len(rows), rows[0].numel()) if rows.dim() else (1, 1)
        uniform = hash_uniform(key, np.arange(start, start + shape[0]), shape[1])
        kept = torch.from_numpy(uniform < density).reshape(rows.shape)
        return rows * kept / density

    return _Sparse(values, drop)


class _Sparse(WeightSource):
    """Changes of weights with some elements set to zero, computed when read."""

    is_delta = True

    def __init__(self, values: WeightSource, change: Callable[[str, Tensor, int], Tensor]) -> None:
        self._values, self._change, self.label = values, change, values.label

    def names(self) -> tuple[str, ...]:
        return self._values.names()

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def meta(self, name: str) -> TensorMeta:
        return self._values.meta(name)

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        return self._change(name, self._values.slice(name, start, stop), start)

    def fingerprint(self) -> str:
        return self._values.fingerprint()

    def stamp(self) -> list[list[str | int]] | None:
        return self._values.stamp()


def _threshold(values: WeightSource, name: str, density: float) -> float:
    """The magnitude that ``ceil(density * elements)`` elements reach, exactly, in two passes of bounded memory.

    Bits of non-negative floats order as the floats do: the first pass counts their upper halves, the second the lower
    halves within the one that holds the threshold.
    """
    meta = values.meta(name)
    wanted = math.ceil(density * meta.rows * meta.row_elements)
    prefix, below = 0, 0
    for upper in (True, False):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for start, stop in blocks(meta):
            bits = values.slice(name, start, stop).float().abs().flatten().view(torch.int32)
            halves = bits >> 16 if upper else (bits & 0xFFFF)[bits >> 16 == prefix]
            counts += torch.bincount(halves, minlength=1 << 16)
        reached = counts.flip(0).cumsum(0)  # elements whose half is at least this, from the top
        place = int(torch.searchsorted(reached, wanted))
        half = (1 << 16) - 1 - place
        if upper:
            prefix, wanted = half, wanted - (int(reached[place - 1]) if place else 0)
        else:
            below = half
    return float(torch.tensor((prefix << 16) | below, dtype=torch.int32).view(torch.float32))
