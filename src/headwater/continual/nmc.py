"""Nearest class mean on a frozen encoder: the baseline that every continual method has to beat.

    mu_c <- mu_c + (f - mu_c) / n_c          for every sample, in any order
    predict argmin_c ||f - mu_c||_2

No training, no memory of samples, no task boundaries; f is the encoder's final representation. With
``metric="cosine"`` the prediction is argmax_c cos(f, mu_c): SimpleCIL (Zhou et al., arXiv:2303.07338).

Source: Janson et al., "A Simple Baseline that Questions the Use of Pretrained-Models in Continual Learning",
arXiv:2210.04428.
Differs: nothing known. Whether the paper scales f to unit length could not be checked; ``normalize`` is off by default.
Needs: features of a frozen encoder, and labels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from safetensors.numpy import load_file, save_file
from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from headwater.continual.base import ContinualRecipe, StreamInfo
from headwater.continual.heads import HeadLearner
from headwater.core.cache import atomic_path, atomic_write_text
from headwater.core.moments import ClassMoments

__all__ = ["NMC", "NearestMeanClassifier"]

Metric = Literal["euclidean", "cosine"]
Array = NDArray[Any]  # Any: float features, or labels of any sort


class NearestMeanClassifier(
    ClassNamePrefixFeaturesOutMixin,  # type: ignore[misc]  # scikit-learn ships no types
    TransformerMixin,  # type: ignore[misc]
    ClassifierMixin,  # type: ignore[misc]
    BaseEstimator,  # type: ignore[misc]
):
    """Predict the class whose mean is nearest; learn one sample, one class or one shard at a time.

    Unlike other scikit-learn classifiers, ``partial_fit`` takes new classes at any call. The result does not depend on
    the order or the chunks of the samples; it can be merged with what others learned, and taken back exactly.

    Args:
        metric: ``euclidean``, or ``cosine``: the angle between a sample and a mean.
        normalize: scale every sample to unit length before it is averaged or compared.

    Attributes:
        classes_: labels seen, sorted, ``(classes,)``.
        centroids_: class means, ``(classes, features)`` float64.
        counts_: samples of each class, ``(classes,)`` int64.
        moments_: the running moments behind them.
        n_features_in_: number of features.

    Example:
        >>> head = NearestMeanClassifier().partial_fit([[0.0], [2.0]], ["a", "a"]).partial_fit([[5.0]], ["b"])
        >>> head.predict([[2.9], [3.1]]).tolist()
        ['a', 'b']
    """

    n_features_in_: int

    def __init__(self, metric: Metric = "euclidean", normalize: bool = False) -> None:
        self.metric = metric
        self.normalize = normalize

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Learn from scratch.

        Args:
            X: ``(samples, features)``, finite; float16 is averaged in float64 like the others.
            y: ``(samples,)``, class labels.

        Raises:
            ValueError: no sample, lengths that differ, a row (named) that is not finite or, with ``normalize``, zero.
        """
        rows, labels = self._checked(X, y, reset=True)
        self.moments_ = ClassMoments(rows.shape[1]).update(rows, labels)
        return self

    def partial_fit(self, X: ArrayLike, y: ArrayLike, classes: ArrayLike | None = None) -> Self:
        """Add samples; an empty chunk changes nothing.

        Args:
            X: ``(samples, features)``.
            y: ``(samples,)``; labels not seen before become new classes.
            classes: all labels that may occur, as scikit-learn passes them. Only checked: a class exists from its first
                sample on.

        Raises:
            ValueError: as ``fit``, another number of features than before, or a label that is not in ``classes``.
        """
        rows, labels = self._checked(X, y, reset=not hasattr(self, "moments_"), least=0)
        if classes is not None and not np.isin(labels, classes).all():
            raise ValueError(f"y holds labels that are not in classes: {np.setdiff1d(labels, classes)[:5].tolist()}.")
        if not hasattr(self, "moments_"):
            self.moments_ = ClassMoments(rows.shape[1])
        self.moments_.update(rows, labels)
        return self

    def remove(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Unlearn samples exactly, as if they had never been added; a class left without any disappears.

        Raises:
            ValueError: as ``partial_fit``, or a class holds fewer samples than are to be removed.
        """
        check_is_fitted(self)
        self.moments_.remove(*self._checked(X, y, reset=False, least=0))
        return self

    def forget(self, label: int | str) -> Self:
        """Unlearn a class.

        Raises:
            ValueError: no such class.
        """
        check_is_fitted(self)
        self.moments_.forget(label)
        return self

    def merge(self, other: NearestMeanClassifier) -> Self:
        """Add what another classifier has learned, from other data, in another process or at another place.

        Raises:
            ValueError: its metric, normalisation or number of features differ.
        """
        mine, theirs = (self.metric, self.normalize), (other.metric, other.normalize)
        if mine != theirs:
            raise ValueError(f"cannot merge a classifier with (metric, normalize) {theirs} into one with {mine}.")
        check_is_fitted(other)
        if not hasattr(self, "moments_"):
            self.n_features_in_ = other.n_features_in_
            self.moments_ = ClassMoments(other.n_features_in_)
        self.moments_.merge(other.moments_)
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "moments_") and self.moments_.total > 0

    @property
    def classes_(self) -> Array:
        """Labels seen, sorted."""
        check_is_fitted(self)
        classes: Array = self.moments_.classes
        return classes

    @property
    def centroids_(self) -> NDArray[np.float64]:
        """Class means."""
        check_is_fitted(self)
        means: NDArray[np.float64] = self.moments_.means
        return means

    @property
    def counts_(self) -> NDArray[np.int64]:
        """Samples per class."""
        check_is_fitted(self)
        counts: NDArray[np.int64] = self.moments_.counts
        return counts

    @property
    def _n_features_out(self) -> int:
        return len(self.classes_)

    def decision_function(self, X: ArrayLike) -> Array:
        """Scores whose largest is the prediction: -d^2 plus a number that is the same for all classes; or the cosine.

        Args:
            X: ``(samples, features)``.

        Returns:
            ``(samples, classes)``; with two classes ``(samples,)``, the second score minus the first.

        Raises:
            ValueError: rows that are not finite, another number of features, or a zero row or mean under ``cosine``.
        """
        scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict(self, X: ArrayLike) -> Array:
        """Label of the nearest mean, ``(samples,)``; errors as ``decision_function``."""
        nearest: Array = self.classes_[self._scores(X).argmax(1)]
        return nearest

    def transform(self, X: ArrayLike) -> Array:
        """Distance to every mean, ``(samples, classes)``: Euclidean, or one minus the cosine."""
        check_is_fitted(self)
        rows = self._rows(X)
        if self.metric == "cosine":
            distances: Array = 1 - self._similarities(rows)
            return distances
        rows = rows.astype(np.float64, copy=False)
        weight, offset, centre = self._affine()
        squared = ((rows - centre) ** 2).sum(1, keepdims=True) - (rows @ weight.T + offset)
        distances = np.sqrt(np.maximum(squared, 0.0))
        return distances

    def novelty_score(self, X: ArrayLike) -> Array:
        """Distance to the nearest mean, ``(samples,)``; large where no class fits."""
        nearest: Array = self.transform(X).min(1)
        return nearest

    def _scores(self, X: ArrayLike) -> Array:
        check_is_fitted(self)
        rows = self._rows(X)
        if self.metric == "cosine":
            return self._similarities(rows)
        weight, offset, _ = self._affine()
        scores: Array = rows @ weight.T.astype(rows.dtype) + offset.astype(rows.dtype)
        return scores

    def _affine(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """W, b and c with f W^T + b = -||f - mu||^2 + ||f - c||^2.

        c is the middle of the means: without it a large offset that all features share would cost float32 its digits.
        """
        means = self.centroids_
        centre = means.mean(0)
        apart = means - centre
        return 2 * apart, -((means + centre) * apart).sum(1), centre

    def _similarities(self, rows: Array) -> Array:
        means = _unit(self.centroids_, "the mean of class {}", self.classes_)
        cosines: Array = _unit(rows, "row {} of X") @ means.T.astype(rows.dtype)
        return cosines

    def _rows(self, X: ArrayLike) -> Array:
        rows = _finite(validate_data(self, X, reset=False, dtype=_FLOATS, ensure_all_finite=False))
        rows = rows.astype(np.result_type(rows, np.float32), copy=False)
        return _unit(rows, "row {} of X") if self.normalize else rows

    def _checked(self, X: ArrayLike, y: ArrayLike, *, reset: bool, least: int = 1) -> tuple[Array, Array]:
        if self.metric not in ("euclidean", "cosine"):
            raise ValueError(f"metric must be 'euclidean' or 'cosine'; got {self.metric!r}.")
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None.")
        rows = validate_data(self, X, reset=reset, dtype=_FLOATS, ensure_all_finite=False, ensure_min_samples=least)
        labels: Array = column_or_1d(y, warn=True)
        if len(labels) != len(rows):
            raise ValueError(f"X and y must have the same length; got {len(rows)} and {len(labels)}.")
        if len(labels):
            check_classification_targets(labels)
        if labels.dtype.kind == "O":
            labels = labels.astype(str)
        rows = _finite(rows)
        if self.normalize:
            rows = _unit(rows.astype(np.result_type(rows, np.float32), copy=False), "row {} of X")
        return rows, labels

    def state(self) -> dict[str, Array]:
        """All that was learned, as arrays: ``centroids``, ``counts``, ``classes``; empty before the first sample."""
        if not self.__sklearn_is_fitted__():
            return {}
        return {"centroids": self.centroids_, "counts": self.counts_, "classes": self.classes_}

    def load_state(self, state: Mapping[str, Array]) -> Self:
        """Take up what ``state`` gave."""
        if state:
            self.n_features_in_ = state["centroids"].shape[1]
            self.moments_ = ClassMoments(self.n_features_in_)
            self.moments_.classes, self.moments_.counts = state["classes"].copy(), state["counts"].copy()
            self.moments_.means = state["centroids"].astype(np.float64)
        return self

    def save_pretrained(self, directory: Path, label_names: Sequence[str] = ()) -> None:
        """Write ``centroids.safetensors`` (float32), ``classes.json`` and a ``README.md`` that says how to use them.

        Args:
            directory: made if need be.
            label_names: what each class is called, in the order of ``classes_``; the labels themselves by default.
        """
        names = list(label_names) or [str(label) for label in self.classes_]
        config = {
            "format": 1,
            "metric": self.metric,
            "normalize": self.normalize,
            "classes": self.classes_.tolist(),
            "label_names": names,
        }
        with atomic_path(directory / "centroids.safetensors") as path:
            save_file({"centroids": self.centroids_.astype(np.float32), "counts": self.counts_}, path)
        atomic_write_text(directory / "classes.json", json.dumps(config, indent=2) + "\n")
        atomic_write_text(
            directory / "README.md", _README.format(*self.centroids_.shape, _RULES[self.metric], config["normalize"])
        )

    @classmethod
    def from_pretrained(cls, directory: Path) -> Self:
        """Read what ``save_pretrained`` wrote; it can go on learning."""
        config = json.loads((directory / "classes.json").read_text(encoding="utf-8"))
        head = cls(metric=config["metric"], normalize=config["normalize"])
        return head.load_state(
            {**load_file(directory / "centroids.safetensors"), "classes": np.array(config["classes"])}
        )


_FLOATS = (np.float64, np.float32, np.float16)
_RULES = {
    "euclidean": "the row of `centroids` at the smallest Euclidean distance from `x`",
    "cosine": "the row of `centroids` at the largest cosine with `x`",
}
_README = """# Class means of a frozen encoder

`centroids.safetensors` holds `centroids` ({}, {}), one mean per class, and `counts`, the samples behind each.
`classes.json` holds the label and name of each row. The prediction for a feature vector `x` of the same encoder is
{}; `x` and every training sample scaled to unit length first: {}.

    from headwater.continual.nmc import NearestMeanClassifier
    head = NearestMeanClassifier.from_pretrained("this directory")
    head.predict(features)            # and head.partial_fit(features, labels) to go on learning
"""


def _finite(X: Array) -> Array:
    # The sum is finite unless a term is not, or it overflows: the exact test runs only then.
    if not np.isfinite(X.sum(dtype=np.result_type(X, np.float32))):
        bad = ~np.isfinite(X).all(1)
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(f"Input X contains {'NaN' if np.isnan(X[row]).any() else 'infinity'} in row {row}.")
    return X


def _unit(X: Array, what: str, names: Sequence[Any] | Array | None = None) -> Array:
    norms = np.linalg.norm(X, axis=1, keepdims=True)
    if not norms.all():
        row = int((norms[:, 0] == 0).argmax())
        raise ValueError(f"{what.format(row if names is None else names[row])} is zero and has no direction.")
    unit: Array = X / norms
    return unit


class NMC(ContinualRecipe):
    """Recipe: the nearest class mean on features of the frozen model."""

    id: ClassVar[str] = "nmc"

    metric: Metric = Field(default="euclidean", description="distance to a class mean; `cosine` is SimpleCIL")
    normalize: bool = Field(default=False, description="scale features to unit length before they are averaged")

    def learner(self, info: StreamInfo) -> HeadLearner:
        """No class seen yet."""
        return HeadLearner(NearestMeanClassifier(self.metric, self.normalize))
