"""Linear algebra on NumPy arrays and torch tensors alike: what comes in decides, on its device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import linalg
from torch import Tensor

__all__ = [
    "add_to_diagonal",
    "like",
    "log_softmax",
    "namespace",
    "shrunk_solve",
    "solve",
    "unit",
]


def shrunk_solve(scatter: Any, rows: Any, ridge: float, columns: Any) -> Any:
    """Solve ``(scatter + ridge I) out = columns``; given ``rows``, ``scatter = rows^T rows``, by the smaller matrix."""
    if rows is None:
        return solve(add_to_diagonal(scatter, ridge), columns)
    inner = solve(add_to_diagonal(rows @ rows.T, ridge), rows @ columns)
    return (columns - rows.T @ inner) / ridge


def solve(matrix: Any, columns: Any) -> Any:
    """Solve a symmetric positive system by Cholesky; of a singular one, give the solution of least norm."""
    if isinstance(matrix, np.ndarray):
        try:
            return linalg.cho_solve(
                linalg.cho_factor(matrix, lower=True, check_finite=False), columns, check_finite=False
            )
        except linalg.LinAlgError:
            pass
    else:
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0:
            return torch.cholesky_solve(columns, factor)
    values, vectors = namespace(matrix).linalg.eigh(matrix)
    kept = values > values[-1] * len(values) * 2.2e-16
    return (vectors[:, kept] / values[kept]) @ (vectors[:, kept].T @ columns)


def add_to_diagonal(matrix: Any, ridge: float) -> Any:
    """A copy of a square matrix with ``ridge`` added to its diagonal."""
    matrix = matrix + 0
    at = range(len(matrix))
    matrix[at, at] += ridge
    return matrix


def namespace(array: Any) -> Any:
    """``torch`` for a tensor, else ``numpy``."""
    return torch if isinstance(array, Tensor) else np


def like(array: Any, other: Any) -> Any:
    """``array`` in the library, dtype and device of ``other``."""
    if isinstance(other, Tensor):
        return torch.as_tensor(array, dtype=other.dtype, device=other.device)
    return np.asarray(array, dtype=other.dtype)


def unit(X: Any) -> Any:
    """Rows scaled to unit length; a row of zeros stays."""
    norms = (X * X).sum(1)[:, None] ** 0.5
    return X / namespace(X).clip(norms, 1e-12, None)


def log_softmax(scores: Any) -> Any:
    """Log-probabilities over the second axis; of log-probabilities, themselves."""
    if isinstance(scores, Tensor):
        return torch.log_softmax(scores, dim=1)
    shifted = scores - scores.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
