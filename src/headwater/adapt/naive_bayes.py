"""Naive Bayes with shared variances: a linear head from one pass over the features, and where it beats regression.

With mu_k the class means, pi_k the classes' shares and Var_k the variance of a feature within class k::

    v_d = sum_k pi_k Var_k[x_d] + 1e-9
    log p(k | x) = log pi_k - 1/2 sum_d (x_d - mu_kd)^2 / v_d + const
    w_k = mu_k / v        b_k = log pi_k - 1/2 sum_d mu_kd^2 / v_d

Its error is as low as it will get after O(log D) examples, where logistic regression, whose error ends lower, takes
O(D): with few examples the one is better, with many the other, and ``crossing`` says where on your data.

Source: Zheng et al., "Revisiting Discriminative vs. Generative Classifiers: Theory and Implications",
arXiv:2302.02334.
Differs: the middle of the class means is taken off them first, which changes no probability and keeps digits. Features
    scaled to [0, 1] (``scale="minmax"``) change nothing but what 1e-9 is measured in, so the range goes there and no
    feature is scaled. Logistic regression, in the learning curve, has its C chosen by cross-validation; the paper's is
    1. Of a training set's first examples there is one of each class, so that both heads can be fitted at any size.
Needs: features and labels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.validation import check_is_fitted

from headwater.adapt.arrays import like, namespace
from headwater.adapt.base import AdaptTask, HeadRecipe
from headwater.adapt.estimator import Array, ScoredClassifier, checked_labelled, checked_rows
from headwater.adapt.references import cross_validated_logistic_regression
from headwater.core.cache import atomic_write_text
from headwater.core.moments import ClassMoments
from headwater.core.recipe import Spec
from headwater.core.rng import numpy_generator
from headwater.core.stats import paired_bootstrap

__all__ = [
    "Crossing",
    "LearningCurve",
    "NaiveBayes",
    "PairedCurve",
    "PooledGaussianNB",
    "crossing",
    "learning_curve_pair",
]

if TYPE_CHECKING:
    from headwater.core.run import Run


class PooledGaussianNB(ScoredClassifier):
    """Gaussian naive Bayes whose classes share the variances, which makes it linear.

    scikit-learn's ``GaussianNB`` has variances for each class, which few examples do not give. Takes numpy arrays or
    torch tensors; tensors are answered with tensors on their device. Moments are accumulated in float64; nothing is
    random.

    Args:
        var_smoothing: added to every variance; >= 0. In the unit of ``scale``.
        prior: of the classes: ``"empirical"`` (the paper's), ``"uniform"``, or probabilities ``(C,)`` in the order of
            ``classes_``.
        scale: ``"minmax"`` smooths as if features were scaled to [0, 1] by the training data, whatever their unit.

    Attributes:
        classes_: ``(C,)``, sorted.
        coef_: ``(C, D)``.
        intercept_: ``(C,)``.
        theta_: class means, ``(C, D)`` float64.
        var_: shared variances, smoothed, ``(D,)`` float64.
        class_count_: rows of each class, ``(C,)`` int64.
        n_features_in_: D.

    Example:
        >>> X, y = np.array([[0.0, 1], [1, 2], [4, 5], [5, 6]]), np.array(["a", "a", "b", "b"])
        >>> PooledGaussianNB().fit(X, y).predict(np.array([[5.0, 4]]))
        array(['b'], dtype='<U1')
    """

    _moments: ClassMoments
    _ends: list[Any]  # lowest and highest value of each feature, where scale needs them

    def __init__(
        self,
        var_smoothing: float = 1e-9,
        prior: Literal["empirical", "uniform"] | Sequence[float] | Array = "empirical",
        scale: Literal["minmax"] | None = None,
    ) -> None:
        self.var_smoothing = var_smoothing
        self.prior = prior
        self.scale = scale

    def fit(self, X: Array, y: Array) -> Self:
        """Fit from scratch.

        Args:
            X: ``(N, D)``, may be memory-mapped.
            y: ``(N,)`` integers or strings; integers for a tensor.

        Raises:
            ValueError: see the class; shapes that disagree, rows that are not finite, a single class, a prior that is
                no distribution over the classes, or no variance within classes and no smoothing.
        """
        self.__dict__.pop("classes_", None)
        self.partial_fit(X, y)
        self._solved()
        return self

    def partial_fit(self, X: Array, y: Array, classes: Array | None = None) -> Self:
        """Add rows to those seen so far, in any chunking; the head is solved for when it is next needed.

        Args:
            X: ``(N, D)``.
            y: ``(N,)``. Labels not announced before become new classes.
            classes: labels to expect; predicting fails until each of them has been seen.

        Raises:
            ValueError: as ``fit``, the last three when the head is solved for.
        """
        self._check_parameters()
        first = not hasattr(self, "classes_")
        X, y = checked_labelled(self, X, y, reset=first)
        xp = namespace(X)
        moments = ClassMoments(X.shape[1], scatter="diag") if first else self._moments
        moments.update(X, y)
        known = [moments.classes] if first else [moments.classes, self.classes_]
        if classes is not None:
            known.append(np.asarray(classes) if xp is np else torch.as_tensor(classes, device=X.device))
        if self.scale == "minmax":
            ends = [xp.amin(X, 0), xp.amax(X, 0)]
            self._ends = ends if first else [xp.minimum(self._ends[0], ends[0]), xp.maximum(self._ends[1], ends[1])]
        self._moments = moments
        self.classes_: Any = xp.unique(xp.concatenate(known))
        self._head: tuple[Any, Any] | None = None
        return self

    @property
    def coef_(self) -> Any:
        """Weights, ``(C, D)``."""
        return self._solved()[0]

    @property
    def intercept_(self) -> Any:
        """Biases, ``(C,)``."""
        return self._solved()[1]

    @property
    def theta_(self) -> Any:
        """Class means, ``(C, D)``."""
        return self._fitted_moments().means

    @property
    def var_(self) -> Any:
        """Shared variances, smoothed, ``(D,)``."""
        moments = self._fitted_moments()
        smoothing = self.var_smoothing
        if self.scale == "minmax":
            low, high = (like(end, moments.means) for end in self._ends)
            width = high - low
            smoothing = smoothing * namespace(width).where(width == 0, namespace(width).ones_like(width), width) ** 2
        return moments.scatter.sum(0) / moments.total + smoothing

    @property
    def class_count_(self) -> Any:
        """Rows of each class, ``(C,)``."""
        return self._fitted_moments().counts

    def _check_parameters(self) -> None:
        if not 0 <= self.var_smoothing < math.inf:
            raise ValueError(f"var_smoothing must be a number >= 0; got {self.var_smoothing!r}.")
        if isinstance(self.prior, str) and self.prior not in ("empirical", "uniform"):
            raise ValueError(f"prior must be 'empirical', 'uniform' or probabilities; got {self.prior!r}.")
        if self.scale not in (None, "minmax"):
            raise ValueError(f"scale must be None or 'minmax'; got {self.scale!r}.")

    def _fitted_moments(self) -> ClassMoments:
        check_is_fitted(self, "classes_")
        if len(self._moments.classes) < len(self.classes_):
            seen = set(self._moments.classes.tolist())
            raise ValueError(f"no sample of class(es) {[c for c in self.classes_.tolist() if c not in seen]} yet.")
        return self._moments

    def _solved(self) -> tuple[Any, Any]:
        check_is_fitted(self, "classes_")
        if self._head is None:
            moments = self._fitted_moments()
            if len(self.classes_) < 2:
                raise ValueError("a classifier needs examples of two classes; got 1 class.")
            centre = moments.means.mean(0)
            weight = (moments.means - centre) / self._divisor()
            prior = self._prior()
            self._head = weight, namespace(prior).log(prior) - 0.5 * (weight * (moments.means + centre)).sum(1)
        return self._head

    def _divisor(self) -> Any:
        """The variances that means are divided by: ``var_``, infinite for a feature that is constant altogether."""
        moments, variance = self._fitted_moments(), self.var_
        xp, means = namespace(variance), moments.means
        rounding = 1e-12 * xp.amax(abs(means), 0)  # of a mean of thousands of equal numbers
        flat = moments.scatter.sum(0) <= moments.total * rounding**2
        apart = xp.amax(means, 0) - xp.amin(means, 0) > rounding
        sharp = [feature for feature, found in enumerate((flat & apart).tolist()) if found]
        if sharp:
            named = f"feature(s) {sharp[:5]}{' and more' if len(sharp) > 5 else ''}"
            what = f"{named} of {len(flat)} do not vary within any class (one example each?), but between classes"
            if self.var_smoothing == 0:
                raise ValueError(f"{what}: their variance is 0. Raise var_smoothing.")
            message = f"{what}: var_smoothing alone is their variance and they outweigh all others. Raise it."
            warnings.warn(message, UserWarning, stacklevel=4)
        return xp.where(flat & ~apart, xp.full_like(variance, math.inf), variance)

    def _prior(self) -> Any:
        moments = self._fitted_moments()
        shares = like(moments.counts, moments.means) / moments.total
        if isinstance(self.prior, str):
            return shares if self.prior == "empirical" else namespace(shares).ones_like(shares) / len(shares)
        prior = like(self.prior, shares)
        if tuple(prior.shape) != tuple(shares.shape) or bool((prior <= 0).any()) or abs(float(prior.sum()) - 1) > 1e-6:
            raise ValueError(f"prior must be {len(shares)} probabilities above 0 whose sum is 1; got {self.prior!r}.")
        return prior

    def _scores(self, X: Array) -> Any:
        check_is_fitted(self, "classes_")
        X = checked_rows(self, X)
        weight, bias = (like(part, X) for part in self._solved())
        return X @ weight.T + bias


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """Errors of both heads on held-out examples, against the size of the training set.

    Attributes:
        ms: sizes, rising.
        naive_bayes: errors, ``(repeats, sizes)``.
        logistic_regression: errors on the same examples after the same training sets, ``(repeats, sizes)``.
    """

    ms: tuple[int, ...]
    naive_bayes: NDArray[np.float64]
    logistic_regression: NDArray[np.float64]

    def to_csv(self) -> str:
        """A table with a line for each size and repeat."""
        lines = ["m,repeat,naive_bayes,logistic_regression"]
        for at, m in enumerate(self.ms):
            pairs = zip(self.naive_bayes[:, at], self.logistic_regression[:, at], strict=True)
            lines += [f"{m},{repeat},{nb:.6g},{lr:.6g}" for repeat, (nb, lr) in enumerate(pairs)]
        return "\n".join(lines) + "\n"


def learning_curve_pair(
    X: NDArray[Any],  # Any: a float dtype
    y: NDArray[np.int64],
    ms: Sequence[int] | Literal["auto"] = "auto",
    repeats: int = 5,
    seed: int = 0,
    *,
    held_out: float = 0.3,
) -> LearningCurve:
    """Errors of naive Bayes and of tuned logistic regression on the same growing training sets.

    Each repeat holds other examples out and draws the rest in another order; more examples include the fewer. Features
    are scaled to [0, 1] on each training set, for both heads, as in the paper. Takes 21 logistic regressions for each
    repeat and size.

    Args:
        X: ``(N, D)``.
        y: class indices, ``(N,)``.
        ms: sizes, from the number of classes to what is not held out; ``"auto"`` doubles from two a class.
        repeats: for the intervals of ``crossing``, at least 3.
        seed: same seed, same subsets.
        held_out: share of the examples that errors are measured on.

    Raises:
        ValueError: sizes that are out of range, or too few examples.
    """
    if repeats < 1 or not 0 < held_out < 1:
        raise ValueError(f"repeats must be at least 1 and held_out between 0 and 1; got {repeats} and {held_out}.")
    classes = np.unique(y)
    most = len(y) - max(1, round(held_out * len(y)))
    auto = [len(classes) << power for power in range(1, 40) if len(classes) << power < most]
    sizes = tuple(sorted({*auto, most} if isinstance(ms, str) else set(ms)))
    if not sizes or sizes[0] < len(classes) or sizes[-1] > most:
        raise ValueError(
            f"sizes must be from {len(classes)}, one example a class, to the {most} examples that are not held out; "
            f"got {list(sizes)}."
        )
    errors = np.empty((2, repeats, len(sizes)))
    for repeat in range(repeats):
        order = numpy_generator(seed, "learning curve", repeat).permutation(len(y))
        rows = np.unique(y[order], return_index=True)[1]  # the first of each class goes first
        order = np.concatenate((order[rows], np.delete(order, rows)))
        test = order[most:]
        for at, size in enumerate(sizes):
            train = order[:size]
            scaler = MinMaxScaler().fit(X[train])
            seen, new = scaler.transform(X[train]), scaler.transform(X[test])
            with warnings.catch_warnings():
                # One example a class: nearest mean is what is meant, and C cannot be cross-validated.
                warnings.simplefilter("ignore", UserWarning)
                heads = (
                    PooledGaussianNB().fit(seen, y[train]),
                    cross_validated_logistic_regression(seen, y[train], "empirical"),
                )
            errors[:, repeat, at] = [1 - head.score(new, y[test]) for head in heads]
    return LearningCurve(sizes, errors[0], errors[1])


@dataclass(frozen=True)
class Crossing:
    """Which head to take for how many examples.

    Attributes:
        m_naive_bayes: fewest examples after which naive Bayes is within the tolerance of its own last error.
        m_logistic_regression: the same of logistic regression.
        m_cross: from here on logistic regression has the lower mean error; None unless there are two regimes.
        between: the largest size at which naive Bayes is surely better and the smallest at which it is surely worse;
            None likewise.
        regime: ``"two"``: naive Bayes surely better at small sizes, surely worse at larger ones; ``"naive_bayes"`` or
            ``"logistic_regression"``: surely better somewhere, surely worse nowhere; ``"undecided"``: none of these.
    """

    m_naive_bayes: int
    m_logistic_regression: int
    m_cross: float | None
    between: tuple[int, int] | None
    regime: Literal["two", "naive_bayes", "logistic_regression", "undecided"]


def crossing(curve: LearningCurve, tolerance: float = 0.01) -> Crossing:
    """Read a learning curve; "surely" means a 95 % interval over its repeats that leaves out 0.

    The repeats share their examples, so the intervals speak of other draws from these, not of other data.

    Args:
        curve: of both heads.
        tolerance: of an error that counts as the last one.
    """
    settled = [
        next(m for at, m in enumerate(curve.ms) if (means[at:] <= means[-1] + tolerance).all())
        for means in (curve.naive_bayes.mean(0), curve.logistic_regression.mean(0))
    ]
    gain = curve.logistic_regression - curve.naive_bayes  # above 0 where naive Bayes is better
    found = [paired_bootstrap(column, np.zeros(len(column))) for column in gain.T]
    better = [m for m, difference in zip(curve.ms, found, strict=True) if difference.low > 0]
    worse = [m for m, difference in zip(curve.ms, found, strict=True) if difference.high < 0]
    if better and worse and better[-1] < worse[0]:
        at = max(i for i, difference in enumerate(gain.mean(0)) if difference > 0 and curve.ms[i] < worse[0])
        left, right = gain.mean(0)[at : at + 2]
        low, high = np.log(curve.ms[at : at + 2])
        cross = float(np.exp(low + (high - low) * left / (left - right)))
        return Crossing(settled[0], settled[1], cross, (better[-1], worse[0]), "two")
    regime: Literal["naive_bayes", "logistic_regression", "undecided"] = "undecided"
    if bool(better) != bool(worse):
        regime = "naive_bayes" if better else "logistic_regression"
    return Crossing(settled[0], settled[1], None, None, regime)


class PairedCurve(Spec):
    """Both heads at several sizes of the training set, measured on a part of the training examples."""

    ms: tuple[int, ...] | Literal["auto"] = Field(
        default="auto", description="sizes, in examples of all classes; auto doubles them from two a class"
    )
    repeats: int = Field(default=5, gt=0, description="draws of the training set; three give intervals")


class NaiveBayes(HeadRecipe):
    """Recipe: naive Bayes with shared variances on features of the frozen model.

    With ``curve``, leaves ``curve.csv`` and says in its notes from how many examples on logistic regression is better.
    """

    id: ClassVar[str] = "naive_bayes"

    var_smoothing: float = Field(default=1e-9, ge=0, description="added to every variance")
    curve: PairedCurve | None = Field(
        default=None,
        description="compare with logistic regression at several sizes first, which takes many fits; null: do not",
    )

    def head(self, task: AdaptTask, run: Run) -> PooledGaussianNB:
        """Fit it in one pass."""
        X, y = task.train.inputs, task.train.labels
        if self.curve is not None:
            curve = learning_curve_pair(X, y, self.curve.ms, self.curve.repeats, self.seed)
            atomic_write_text(run.path("curve.csv"), curve.to_csv())
            found = crossing(curve)
            run.notes["regime"] = found.regime
            if found.m_cross is not None and found.between is not None:
                run.notes["crossing"] = f"{found.m_cross:.0f} examples, from {found.between[0]} to {found.between[1]}"
        return PooledGaussianNB(self.var_smoothing, self.prior).fit(X, y)
