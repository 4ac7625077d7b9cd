"""Linear algebra on NumPy arrays and torch tensors alike: what comes in decides, on its device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import linalg
from sklearn.base import BaseEstimator
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d, validate_data
from torch import Tensor

__all__ = [
    "add_to_diagonal",
    "checked_labelled",
    "checked_rows",
    "like",
    "log_softmax",
    "namespace",
    "shrunk_solve",
    "solve",
    "unit",
]


def checked_rows(estimator: BaseEstimator, X: Any, *, reset: bool = False) -> Any:
    """``X`` as scikit-learn checks it for ``estimator``, in float32 or float64; a tensor stays one, where it is.

    Args:
        estimator: its ``n_features_in_`` (and ``feature_names_in_``) is set, or compared with.
        X: ``(N, D)``.
        reset: set rather than compare.

    Raises:
        ValueError: scikit-learn's, or the shape of a tensor is wrong. Whether a tensor is finite is not looked at.
    """
    if not isinstance(X, Tensor):
        return validate_data(estimator, X, dtype=[np.float64, np.float32], reset=reset)
    if X.ndim != 2 or 0 in X.shape:
        raise ValueError(f"X must be (samples, features), neither of them 0; got shape {tuple(X.shape)}.")
    if reset:
        estimator.n_features_in_ = X.shape[1]
    elif X.shape[1] != estimator.n_features_in_:
        raise ValueError(
            f"X has {X.shape[1]} features, but {type(estimator).__name__} is expecting "
            f"{estimator.n_features_in_} features as input."
        )
    return X if X.dtype in (torch.float32, torch.float64) else X.float()


def checked_labelled(estimator: BaseEstimator, X: Any, y: Any, *, reset: bool) -> tuple[Any, Any]:
    """``checked_rows`` with a label for each row, ``(N,)``: integers or strings (integers beside a tensor).

    Raises:
        ValueError: as there, or labels that are no classes.
    """
    if isinstance(X, Tensor):
        return checked_rows(estimator, X, reset=reset), torch.as_tensor(y, device=X.device)
    X, y = validate_data(estimator, X, y, dtype=[np.float64, np.float32], reset=reset)
    check_classification_targets(y)
    labels = column_or_1d(y)
    return X, labels.astype(str) if labels.dtype.kind == "O" else labels


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
