"""What the methods of the stage are held against: scikit-learn's classifiers on the same features, and plain training.

``FineTuning`` of texts to classes stands in ``adapt.tuned``; ``TextFineTuning`` here is its counterpart for answers
that are written.

The names of ``SklearnHead.estimator``::

    logistic_regression   L2-penalised; its strength chosen by cross-validation inside the training examples
    lda                   linear discriminant analysis by SVD: the shared covariance as it is, not shrunk
    gaussian_nb           naive Bayes with a variance for each class and feature
    nearest_centroid      the class mean at the smallest Euclidean distance
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import NearestCentroid

from headwater.adapt.arrays import log_softmax
from headwater.adapt.base import AdaptTask, Head, HeadRecipe
from headwater.adapt.text_to_text import TextTask, TextToText, Written
from headwater.core.fit import Phase, Trained

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["STRENGTHS", "NearestMean", "SklearnHead", "TextFineTuning", "cross_validated_logistic_regression"]

STRENGTHS = (0.1, 1.0, 10.0, 100.0)
"""Values of C, the inverse strength of the penalty, among which cross-validation chooses."""


def cross_validated_logistic_regression(
    X: NDArray[Any],  # Any: a float dtype
    y: NDArray[np.int64],
    prior: Literal["uniform", "empirical"] = "uniform",
    strengths: Sequence[float] = STRENGTHS,
) -> LogisticRegression:
    """Multinomial logistic regression with the C that is best in 5-fold cross-validation.

    Args:
        X: features, ``(n, D)``.
        y: class indices, ``(n,)``. With k < 5 examples of the rarest class there are k folds; with one, C is 1.
        prior: ``uniform`` weighs classes so that all count alike.
        strengths: values of C to choose among; of equally good ones the first.
    """
    model = LogisticRegression(max_iter=1000, class_weight="balanced" if prior == "uniform" else None)
    folds = min(5, int(np.unique(y, return_counts=True)[1].min()))
    if folds < 2:
        return model.fit(X, y)
    return GridSearchCV(model, {"C": list(strengths)}, cv=folds).fit(X, y).best_estimator_


class NearestMean(NearestCentroid):  # type: ignore[misc]  # scikit-learn has no annotations
    """``NearestCentroid`` as a linear head whose probabilities agree with its predictions.

    scikit-learn predicts by plain distances but gives probabilities of distances scaled by each feature's deviation.
    Here both are those of an isotropic Gaussian per class, with v the mean variance of a feature within classes::

        log p(k | x) = log pi_k - |x - mu_k|^2 / 2v + const

    Where there is no variance within classes, with one example of each, v is 1.
    """

    @property
    def coef_(self) -> NDArray[np.float64]:
        """``(classes, D)``."""
        weight: NDArray[np.float64] = self.centroids_ / self._variance
        return weight

    @property
    def intercept_(self) -> NDArray[np.float64]:
        """``(classes,)``."""
        bias: NDArray[np.float64] = np.log(self.class_prior_) - (self.centroids_**2).sum(1) / (2 * self._variance)
        return bias

    @property
    def _variance(self) -> float:
        variance = float((self.within_class_std_dev_**2).mean())
        return variance if np.isfinite(variance) and variance > 0 else 1.0

    def predict_log_proba(self, X: NDArray[Any]) -> NDArray[np.float64]:  # Any: a float dtype
        """Log-probabilities, ``(n, classes)``."""
        result: NDArray[np.float64] = log_softmax(X @ self.coef_.T + self.intercept_)
        return result


class SklearnHead(HeadRecipe):
    """Reference: one of scikit-learn's classifiers on features of the frozen model."""

    id: ClassVar[str] = "sklearn_head"

    estimator: Literal["logistic_regression", "lda", "gaussian_nb", "nearest_centroid"] = Field(
        default="logistic_regression", description="which classifier"
    )

    def head(self, task: AdaptTask, run: Run) -> Head:
        """Fit it with scikit-learn's defaults, and the prior that was asked for."""
        X, y, classes = task.train.inputs, task.train.labels, len(task.label_names)
        priors = np.full(classes, 1 / classes) if self.prior == "uniform" else None
        head: Head
        if self.estimator == "logistic_regression":
            fitted = cross_validated_logistic_regression(X, y, self.prior)
            run.notes["C"] = str(fitted.C)
            head = fitted
        elif self.estimator == "lda":
            head = LinearDiscriminantAnalysis(priors=priors).fit(X, y)
        elif self.estimator == "gaussian_nb":
            head = GaussianNB(priors=priors).fit(X, y)
        else:
            with np.errstate(divide="ignore", invalid="ignore"):  # one example a class: 0 / 0, see NearestMean
                head = NearestMean(priors=self.prior).fit(X, y)
        return head


class TextFineTuning(TextToText):
    """Reference: fine-tuning by maximum likelihood, of all weights or of LoRA adapters."""

    id: ClassVar[str] = "text_finetuning"

    def phases(self, task: TextTask) -> Generator[Phase, Trained, Written]:
        """One phase."""
        model = task.open()
        yield task.phase("finetune", model, share=1.0)
        return Written(model)
