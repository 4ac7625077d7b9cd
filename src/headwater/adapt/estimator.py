"""Classifiers of features, as scikit-learn has them, on NumPy arrays and torch tensors alike: what they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d, validate_data
from torch import Tensor

from headwater.adapt.arrays import log_softmax, namespace

__all__ = ["Array", "ScoredClassifier", "checked_labelled", "checked_rows"]

Array = np.ndarray[Any, Any] | Tensor


class ScoredClassifier(ClassifierMixin, BaseEstimator, ABC):  # type: ignore[misc]  # scikit-learn has no annotations
    """A classifier whose answers are those of its logits; a subclass fits, and fills in ``_scores``."""

    classes_: Any  # Any: labels ``(C,)``, an array or a tensor

    @abstractmethod
    def _scores(self, X: Array) -> Any:  # Any: of X's library
        """Logits, ``(N, C)``."""

    def decision_function(self, X: Array) -> Any:
        """Return logits, ``(N, C)``; for two classes the second minus the first, ``(N,)``, as scikit-learn has it."""
        scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict(self, X: Array) -> Any:
        """Return the likeliest label of each row, ``(N,)``."""
        scores = self._scores(X)
        return self.classes_[scores.argmax(1)]

    def predict_proba(self, X: Array) -> Any:
        """Return class probabilities, ``(N, C)``."""
        return namespace(X).exp(self.predict_log_proba(X))

    def predict_log_proba(self, X: Array) -> Any:
        """Return log-probabilities, ``(N, C)``."""
        return log_softmax(self._scores(X))


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


def checked_labelled(
    estimator: BaseEstimator, X: Any, y: Any, *, reset: bool, strings: bool = False
) -> tuple[Any, Any]:
    """``checked_rows`` with a label for each row, ``(N,)``: integers or strings.

    Args:
        estimator: see ``checked_rows``, as for X.
        X: ``(N, D)``.
        y: ``(N,)``.
        reset: see ``checked_rows``.
        strings: whether strings may stand beside a tensor; they stay a NumPy array.

    Raises:
        ValueError: as there, another number of labels, labels that are no classes, or strings that may not be.
    """
    if not isinstance(X, Tensor):
        X, y = validate_data(estimator, X, y, dtype=[np.float64, np.float32], reset=reset)
        check_classification_targets(y)
        labels = column_or_1d(y)
        return X, labels.astype(str) if labels.dtype.kind == "O" else labels
    X = checked_rows(estimator, X, reset=reset)
    if len(y) != len(X):
        raise ValueError(f"{len(X)} rows have {len(y)} labels.")
    named = not isinstance(y, Tensor) and np.asarray(y).dtype.kind in "OUS"
    if named and not strings:
        raise ValueError("labels beside a tensor must be integers; got strings. Number them, or give NumPy features.")
    y = np.asarray(y) if named else torch.as_tensor(y, device=X.device)
    check_classification_targets(y.numpy(force=True) if isinstance(y, Tensor) else y)
    return X, y
