"""Counts, means and scatter of each class, from a stream, in one pass.

Two summaries (n, m, S) of the same class combine exactly (d = m_b - m_a):

    n = n_a + n_b        m = m_a + d n_b / n        S = S_a + S_b + d d^T n_a n_b / n

so any chunking gives the same moments, nothing cancels for means far from 0, and the same equation read backwards
removes samples again.

Source: Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    import torch

    Array = np.ndarray[Any, Any] | torch.Tensor

__all__ = ["ClassMoments"]

_CHUNK_BYTES = 1 << 24  # of one chunk in the accumulation dtype: fits caches, long enough for matrix products


class ClassMoments:
    """Running moments of each class, over numpy arrays or torch tensors: what goes in first decides, on its device.

    Memory is that of the moments plus one chunk, however long the stream: a memory-mapped ``X`` is read chunk by
    chunk.

    Args:
        n_features: D.
        scatter: sums of squared deviations from the class means to keep: ``"none"``; ``"diag"``, of each feature in
            each class; ``"pooled"``, one matrix summed over classes; ``"per_class"``, a matrix for each class.
        dtype: of accumulation. Features of less precision, float16 and bfloat16 too, are converted chunk by chunk.

    Attributes:
        classes: labels seen, sorted, ``(C,)``; ``None`` before the first update.
        counts: samples of each class, ``(C,)`` int64.
        means: ``(C, D)``.
        scatter: ``(C, D)`` for diag, ``(D, D)`` for pooled, ``(C, D, D)`` for per_class, else ``None``.

    Raises:
        ValueError: ``n_features`` is not positive.

    Example:
        >>> moments = ClassMoments(1, scatter="diag")
        >>> moments.update(np.array([[1.0], [3.0]]), np.array([0, 0])).update(np.array([[5.0]]), np.array([0])).means
        array([[3.]])
        >>> moments.scatter
        array([[8.]])
    """

    classes: Any = None  # Any: numpy or torch, decided by the first update
    counts: Any = None
    means: Any = None
    scatter: Any = None

    def __init__(
        self,
        n_features: int,
        *,
        scatter: Literal["none", "diag", "pooled", "per_class"] = "none",
        dtype: Literal["float64", "float32"] = "float64",
    ) -> None:
        if n_features < 1:
            raise ValueError(f"n_features must be at least 1; got {n_features}.")
        if scatter not in ("none", "diag", "pooled", "per_class"):
            raise ValueError(f"scatter must be 'none', 'diag', 'pooled' or 'per_class'; got {scatter!r}.")
        self.n_features = n_features
        self.kind = scatter
        self.dtype = dtype

    @property
    def total(self) -> int:
        """Samples of all classes."""
        return 0 if self.counts is None else int(self.counts.sum())

    def update(self, X: Array, y: Array) -> Self:
        """Add samples; labels not seen before become new classes. An error leaves everything as it was.

        Args:
            X: ``(N, D)``, finite, any float or integer dtype; ``N`` may be 0.
            y: ``(N,)`` integers or strings (strings for numpy only), in any order.

        Raises:
            ValueError: the shape of ``X`` or ``y`` is wrong, or a row (named by its index) is not finite.
            TypeError: labels of one sort are mixed with labels of another, or numpy arrays with tensors.
        """
        return self.merge(self._summary(X, y))

    def remove(self, X: Array, y: Array) -> Self:
        """Take samples out again, as if they had never been added; a class left with none disappears.

        Arguments and errors as ``update``, and:

        Raises:
            ValueError: a class holds fewer samples than are to be removed.
        """
        gone = self._summary(X, y)
        if gone.classes is not None:
            self._combine(gone, -1)
        return self

    def forget(self, label: int | str) -> Self:
        """Take out one class altogether.

        Raises:
            ValueError: there is no such class, or scatter is ``"pooled"``, in which a class's own share is not known.
        """
        if self.kind == "pooled":
            raise ValueError("forget needs the class's own scatter; use scatter='per_class', or remove its samples.")
        if self.classes is None or not bool((self.classes == label).any()):
            raise ValueError(f"no class {label!r} to forget.")
        self._keep(self.classes != label)
        return self

    def merge(self, other: ClassMoments) -> Self:
        """Add all that ``other``, which is left alone, has seen: moments of shards or of clients.

        Raises:
            ValueError: the number of features, the scatter or the dtype differ.
        """
        mine, theirs = (self.n_features, self.kind, self.dtype), (other.n_features, other.kind, other.dtype)
        if mine != theirs:
            raise ValueError(f"cannot merge moments of (n_features, scatter, dtype) {theirs} into {mine}.")
        if other.classes is not None:
            self._combine(other, 1)
        return self

    def _summary(self, X: Array, y: Array) -> ClassMoments:
        xp = _namespace(X)
        if X.ndim != 2 or X.shape[1] != self.n_features:
            raise ValueError(f"X must be (samples, {self.n_features}); got shape {tuple(X.shape)}.")
        labels: Any = np.asarray(y) if xp is np else xp.asarray(y, device=X.device)
        if tuple(labels.shape) != (X.shape[0],):
            raise ValueError(f"y must be ({X.shape[0]},), a label for each row of X; got shape {tuple(labels.shape)}.")
        summary = ClassMoments(self.n_features, scatter=self.kind, dtype=self.dtype)
        rows = max(1, _CHUNK_BYTES // (8 * self.n_features))
        for start in range(0, X.shape[0], rows):
            chunk = xp.asarray(X[start : start + rows], dtype=getattr(xp, self.dtype))
            present, code, counts = xp.unique(labels[start : start + rows], return_inverse=True, return_counts=True)
            means = _group_sums(chunk, code, len(present)) / xp.asarray(counts, dtype=chunk.dtype)[:, None]
            # A sum is finite only if all its terms are, which makes the check almost free.
            if not bool(xp.isfinite(means).all()):
                row = start + int(xp.argmax((~xp.isfinite(chunk)).any(1) * 1))
                raise ValueError(f"row {row} of X is not finite.")
            part = ClassMoments(self.n_features, scatter=self.kind, dtype=self.dtype)
            part.classes, part.counts, part.means = present, counts, means
            part.scatter = self._chunk_scatter(chunk, code, counts, means)
            summary = summary.merge(part) if start else part
        return summary

    def _chunk_scatter(self, chunk: Any, code: Any, counts: Any, means: Any) -> Any:
        if self.kind == "none":
            return None
        residual = means[code]
        residual -= chunk  # in place, and of the other sign, which no square sees
        if self.kind == "diag":
            residual *= residual
            return _group_sums(residual, code, len(counts))
        if self.kind == "pooled":
            return residual.T @ residual
        # Per class the work is n_c D^2, which hides the loop; the rows are sorted once, not masked for each class.
        xp = _namespace(chunk)
        residual = residual[xp.argsort(code)]
        ends = xp.cumsum(counts, 0).tolist()
        groups = [residual[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
        return xp.stack([group.T @ group for group in groups])

    def _combine(self, other: ClassMoments, sign: Literal[1, -1]) -> None:
        """Add (sign 1) or take out (sign -1) all samples of ``other``, which has seen some."""
        xp = _namespace(other.means)
        self._admit(other, sign)
        labels, counts = other.classes, other.counts
        at = xp.searchsorted(self.classes, labels)
        before = self.counts[at]
        after = before + sign * counts
        if sign < 0 and bool((after < 0).any()):
            first = int(xp.argmax((after < 0) * 1))
            have, asked = int(before[first]), int(counts[first])
            raise ValueError(f"class {labels[first]!s} holds {have} samples; cannot remove {asked} of them.")
        n_before, n_after, n_chunk = (xp.asarray(n, dtype=other.means.dtype)[:, None] for n in (before, after, counts))
        # With sign -1 the equation is read backwards, from n to n_a. What an emptied class then holds is dropped below.
        change = (other.means - self.means[at]) * (sign * n_chunk / xp.clip(n_after, 1, None))
        self.means[at] = self.means[at] + change
        self.counts[at] = after
        if self.kind != "none":
            # In terms of the step c = d n_b / n of the mean, d d^T n_a n_b / n is c c^T n n_a / n_b, both ways round.
            step = change * xp.sqrt(n_before * n_after / n_chunk)
            if self.kind == "pooled":
                self.scatter += sign * (other.scatter + step.T @ step)
            elif self.kind == "diag":
                self.scatter[at] = xp.clip(self.scatter[at] + sign * (other.scatter + step * step), 0.0, None)
            else:
                self.scatter[at] = self.scatter[at] + sign * (other.scatter + step[:, :, None] * step[:, None, :])
        if sign < 0 and bool((after == 0).any()):
            self._keep(self.counts > 0)

    def _admit(self, other: ClassMoments, sign: Literal[1, -1]) -> None:
        """Make room for the classes of ``other`` that have not been seen before."""
        xp, labels = _namespace(other.means), other.classes
        if self.classes is None:
            self.classes, self.counts, self.means = labels[:0], other.counts[:0], other.means[:0]
            if other.scatter is not None:
                self.scatter = xp.zeros_like(other.scatter) if self.kind == "pooled" else other.scatter[:0]
        if _namespace(self.means) is not xp:
            raise TypeError("these moments hold numpy arrays and cannot take tensors, or the other way round.")
        if xp is np and (self.classes.dtype.kind in "US") != (labels.dtype.kind in "US"):
            raise TypeError(f"labels of dtype {labels.dtype} cannot join classes of dtype {self.classes.dtype}.")
        new = labels[~xp.isin(labels, self.classes)]
        if len(new) == 0:
            return
        if sign < 0:
            raise ValueError(f"class {new[0]!s} holds 0 samples; cannot remove any of them.")
        classes = xp.concatenate([self.classes, new])
        order = xp.argsort(classes)
        self.classes = classes[order]
        self.counts = _grown(self.counts, len(new))[order]
        self.means = _grown(self.means, len(new))[order]
        if self.kind in ("diag", "per_class"):
            self.scatter = _grown(self.scatter, len(new))[order]

    def _keep(self, mask: Any) -> None:
        self.classes, self.counts, self.means = self.classes[mask], self.counts[mask], self.means[mask]
        if self.kind in ("diag", "per_class"):
            self.scatter = self.scatter[mask]


def _namespace(array: Any) -> Any:
    if isinstance(array, np.ndarray):
        return np
    import torch

    if isinstance(array, torch.Tensor):
        return torch
    raise TypeError(f"expected a numpy array or a torch tensor; got {type(array).__name__}.")


def _grown(array: Any, rows: int) -> Any:
    xp = _namespace(array)
    shape = (rows, *array.shape[1:])
    zeros = np.zeros(shape, array.dtype) if xp is np else array.new_zeros(shape)
    return xp.concatenate([array, zeros])


def _group_sums(values: Any, code: Any, groups: int) -> Any:
    """Sum the rows of ``values`` (N, D) that share a code, to (groups, D)."""
    if isinstance(values, np.ndarray):
        n = len(values)
        # Twice as fast as np.add.at and without a sort: a sparse one-hot matrix, one entry a column, times the rows.
        one_hot = sparse.csc_array((np.ones(n, values.dtype), code, np.arange(n + 1)), shape=(groups, n))
        return one_hot @ values
    return values.new_zeros(groups, values.shape[1]).index_add_(0, code, values)
