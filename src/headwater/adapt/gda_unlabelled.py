"""The Gaussian head where examples are missing: none with labels at all, or none of some classes.

    GDAEM                    unlabelled rows, started from zero-shot posteriors
    synthesize_new_classes   classes that have a description but no example

Source: Wang et al., "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation", arXiv:2402.04087, section 3.3.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from headwater.adapt.arrays import like, log_softmax, namespace, shrunk_solve
from headwater.adapt.gda import GDAClassifier

__all__ = ["GDAEM", "synthesize_new_classes"]

Array = np.ndarray[Any, Any] | Tensor


class GDAEM(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no annotations
    """The same classifier without labels: expectation-maximisation from zero-shot posteriors.

    Stops when responsibilities change by less than ``tol`` in the mean, or after ``max_iter`` steps.

    Args:
        zero_shot: unit-norm weights ``(C, D)``; their posteriors start the iteration.
        logit_scale: of the zero-shot logits.
        prior: ``"uniform"`` or ``"empirical"``, then re-estimated in every step.
        tol: mean absolute change of the responsibilities.
        max_iter: at most so many steps, >= 1.

    Attributes:
        classes_: ``0 .. C - 1``.
        coef_: ``(C, D)``.
        intercept_: ``(C,)``.
        n_iter_: steps taken.
    """

    def __init__(
        self,
        zero_shot: Array | None = None,
        logit_scale: float = 100.0,
        prior: Literal["uniform", "empirical"] = "uniform",
        tol: float = 1e-4,
        max_iter: int = 50,
    ) -> None:
        self.zero_shot = zero_shot
        self.logit_scale = logit_scale
        self.prior = prior
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Array, y: None = None, posteriors: Array | None = None) -> Self:
        """Fit to unlabelled rows.

        Args:
            X: ``(N, D)``.
            y: ignored.
            posteriors: ``(N, C)`` to start from, instead of the zero-shot ones; rows sum to 1.

        Raises:
            ValueError: nothing to start from, or shapes that disagree.
        """
        xp = namespace(X)
        if X.ndim != 2 or not bool(xp.isfinite(X).all()):
            raise ValueError(f"X must be (samples, features) and finite; got shape {tuple(X.shape)}.")
        if self.max_iter < 1:
            raise ValueError(f"max_iter must be at least 1; got {self.max_iter}.")
        X = xp.asarray(X, dtype=xp.float64)
        if posteriors is None:
            if self.zero_shot is None:
                raise ValueError("without zero_shot weights, give posteriors to start from.")
            posteriors = xp.exp(log_softmax(self.logit_scale * X @ like(self.zero_shot, X).T))
        R = like(posteriors, X)
        if R.ndim != 2 or R.shape[0] != X.shape[0]:
            raise ValueError(f"posteriors must be ({X.shape[0]}, classes); got shape {tuple(R.shape)}.")
        # Centred once: a shift moves all means and changes no posterior, and second moments then do not cancel.
        centre = X.mean(0)
        X = X - centre
        second = X.T @ X
        for step in range(1, self.max_iter + 1):
            self.n_iter_ = step
            weight, bias = self._maximise(X, second, R)
            previous, R = R, xp.exp(log_softmax(X @ weight.T + bias))
            if float(abs(R - previous).mean()) < self.tol:
                break
        self.coef_, self.intercept_ = weight, bias - weight @ centre
        self.classes_ = xp.arange(R.shape[1])
        self.n_features_in_ = X.shape[1]
        return self

    def _maximise(self, X: Any, second: Any, R: Any) -> tuple[Any, Any]:
        xp = namespace(X)
        # A class that no row belongs to any more keeps a mean of 0, the centre of the data, and a finite prior.
        size = xp.clip(R.sum(0), 1e-12, None)
        means = (R.T @ X) / size[:, None]
        scatter = second - means.T @ (size[:, None] * means)
        columns = shrunk_solve(scatter, None, float(scatter.trace()) / (len(X) - 1), means.T)
        weight = X.shape[1] * columns.T
        prior = size / size.sum() if self.prior == "empirical" else xp.ones_like(size) / len(size)
        return weight, xp.log(prior) - 0.5 * (weight * means).sum(1)

    def predict_proba(self, X: Array) -> Any:
        """Return posteriors, ``(N, C)``."""
        check_is_fitted(self)
        scores = X @ like(self.coef_, X).T + like(self.intercept_, X)
        return namespace(scores).exp(log_softmax(scores))

    def predict(self, X: Array) -> Any:
        """Return class indices, ``(N,)``."""
        return self.classes_[self.predict_proba(X).argmax(1)]


def synthesize_new_classes(
    gda: GDAClassifier, text_weights: Array, X_base: Array, k: int = 64, text_copies: int = 16
) -> tuple[Any, Any]:
    """Make a head for classes that have a description but no example.

    A new class is given the ``k`` rows of other classes nearest to its text vector, and copies of that vector, as its
    examples. Its covariance is centred at the text vector; the precisions of the new classes are averaged.

    Args:
        gda: fitted on the base classes; its ``alpha_`` and ``logit_scale`` are used if it has zero-shot weights.
        text_weights: unit-norm, ``(C_new, D)``.
        X_base: unit-norm training features of the base classes, ``(N, D)``.
        k: neighbours, at most N.
        text_copies: copies of the text vector.

    Returns:
        Weights ``(C_new, D)`` and biases ``(C_new,)``, to be appended to ``gda.coef_`` and ``gda.intercept_``.

    Raises:
        ValueError: widths differ, or there are fewer rows than neighbours.

    Source: section 3.3 of the paper named above, "base-to-new generalization".
    """
    xp = namespace(X_base)
    X = xp.asarray(X_base, dtype=xp.float64)
    texts = like(text_weights, X)
    features = gda.n_features_in_
    if X.ndim != 2 or texts.ndim != 2 or {X.shape[1], texts.shape[1]} != {features}:
        got = f"{tuple(X.shape)} and {tuple(texts.shape)}"
        raise ValueError(f"X_base and text_weights must have {features} columns like the head; got {got}.")
    if not 1 <= k <= X.shape[0]:
        raise ValueError(f"k must be from 1 to the {X.shape[0]} rows of X_base; got {k}.")
    nearest = xp.argsort(-(texts @ X.T), stable=True)[:, :k]
    total = k + text_copies
    means = (X[nearest].sum(1) + text_copies * texts) / total
    weight = xp.zeros_like(means)
    for text, rows in zip(texts, nearest, strict=True):
        residuals = X[rows] - text  # the copies of the text lie at the centre and add nothing
        ridge = max(float((residuals**2).sum()) / (total - 1), 1e-12)
        weight += features * shrunk_solve(None, residuals, ridge, means.T).T / len(texts)
    bias = -math.log(len(texts)) - 0.5 * (weight * means).sum(1)
    if gda.zero_shot is None:
        return weight, bias
    return gda.alpha_ * weight + gda.logit_scale * texts, gda.alpha_ * bias
