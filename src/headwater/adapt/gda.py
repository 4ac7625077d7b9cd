"""Gaussian discriminant analysis on frozen features: a linear classifier in closed form, added to zero-shot logits.

With mu_k the class means, Z the rows minus their class mean, S = Z^T Z / (N - 1), T zero-shot weights::

    P = D [(N - 1) S + tr(S) I]^-1                  the Kubokawa-Srivastava estimate of the precision
    w_k = P mu_k     b_k = log pi_k - mu_k^T P mu_k / 2
    logits(f) = 100 f T^T + alpha (f W + b)

Source: Wang et al., "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation", arXiv:2402.04087.
Differs: alpha is chosen by cross-validation inside the training examples, so that no further label is looked at
    (``alpha="validation"`` is the paper's way); without within-class spread (one example per class) the precision is
    the identity, where the paper's pseudo-inverse gives a head of zeros.
Needs: features, unit-norm ones when zero-shot weights are added.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from sklearn.covariance import ledoit_wolf, oas
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from headwater.adapt.arrays import like, log_softmax, namespace, shrunk_solve, solve, unit
from headwater.adapt.base import AdaptTask, HeadRecipe
from headwater.adapt.estimator import Array, ScoredClassifier, checked_labelled, checked_rows
from headwater.core.cache import atomic_path, atomic_write_text
from headwater.core.moments import ClassMoments
from headwater.core.recipe import Name, Spec
from headwater.modalities.features import zero_shot_weights

__all__ = ["ALPHAS", "GDA", "GDAClassifier", "ZeroShot"]

if TYPE_CHECKING:
    from headwater.core.run import Run

ALPHAS = tuple(10.0**power for power in range(-4, 3))
"""Weights of the Gaussian logits that are tried when alpha is chosen."""

_VARIANCE_FLOOR = 1e-9  # of the diagonal covariance: keeps constant features finite
_ROWS = 1 << 16  # normalised at a time
_FORMAT = 1


class GDAClassifier(ScoredClassifier):
    """Linear classifier from class means and one shared covariance; optionally on top of zero-shot weights.

    Takes numpy arrays or torch tensors; tensors are answered with tensors on their device. Moments are accumulated in
    float64 (float16 features too); nothing is random.

    Args:
        covariance: ``"ks"``, the paper's; ``"empirical"``, the maximum-likelihood one, which is linear discriminant
            analysis; ``"diagonal"``, which is naive Bayes with shared variances; ``"ledoit_wolf"`` or ``"oas"``,
            shrunk as in scikit-learn (``fit`` only).
        prior: of the classes: ``"uniform"`` (the paper's) or ``"empirical"``.
        zero_shot: unit-norm weights ``(C, D)``, rows in the order of ``classes_``, or ``None``.
        alpha: weight of the Gaussian logits beside zero-shot weights: a number >= 0; ``"auto"``, by 5-fold
            cross-validation of the accuracy (with n < 5 examples of the rarest class n-fold, each fold leaving out one
            of every class); ``"validation"``, on the validation set given to ``fit``. Ties go to the lower log loss.
        logit_scale: of the zero-shot logits.
        normalize: scale rows to unit length, in ``fit`` and in prediction.
        solver: for ``"ks"``: ``"cholesky"`` of the ``D x D`` matrix, ``"woodbury"`` through an ``N x N`` one (``fit``
            only), or ``"auto"``: the second where ``N < D / 2``.

    Attributes:
        classes_: ``(C,)``, sorted.
        coef_: ``(C, D)``, with the zero-shot part where there is one.
        intercept_: ``(C,)``.
        means_: ``(C, D)`` float64.
        precision_: ``(D, D)``, computed when read.
        alpha_: the weight used; 1 without zero-shot weights.
        alpha_curve_: accuracy at each alpha tried; empty where none was chosen.
        n_features_in_: D.

    Example:
        >>> X, y = np.array([[0.0, 1], [1, 1], [4, 5], [5, 5]]), np.array(["a", "a", "b", "b"])
        >>> GDAClassifier().fit(X, y).predict(np.array([[5.0, 4]]))
        array(['b'], dtype='<U1')
    """

    _residuals: Any  # rows minus their class means, or None

    def __init__(
        self,
        covariance: Literal["ks", "empirical", "diagonal", "ledoit_wolf", "oas"] = "ks",
        prior: Literal["uniform", "empirical"] = "uniform",
        zero_shot: Array | None = None,
        alpha: float | Literal["auto", "validation"] = "auto",
        logit_scale: float = 100.0,
        normalize: bool = False,
        solver: Literal["auto", "cholesky", "woodbury"] = "auto",
    ) -> None:
        self.covariance = covariance
        self.prior = prior
        self.zero_shot = zero_shot
        self.alpha = alpha
        self.logit_scale = logit_scale
        self.normalize = normalize
        self.solver = solver

    def fit(self, X: Array, y: Array, X_validation: Array | None = None, y_validation: Array | None = None) -> Self:
        """Fit from scratch.

        Args:
            X: ``(N, D)``, may be memory-mapped.
            y: ``(N,)`` integers or strings.
            X_validation: features to choose alpha on; required by ``alpha="validation"`` and by nothing else.
            y_validation: their labels.

        Raises:
            ValueError: see the class; shapes that disagree, rows that are not finite, features without unit norm
                beside zero-shot weights, or zero-shot weights of other shape.
        """
        self._check_parameters()
        X, y = self._inputs(X, y)
        needs_rows = self.covariance in ("ledoit_wolf", "oas") or self._woodbury(X)
        moments = self._begin(X.shape[1], without_scatter=needs_rows)
        self._absorb(X, y)
        if needs_rows:  # kept instead of the scatter matrix when N << D
            rows = unit(X) if self.normalize else X
            at = namespace(X).searchsorted(moments.classes, y)
            self._residuals = rows - like(moments.means, rows)[at]
        if self.zero_shot is not None:
            self._choose_alpha(X, y, X_validation, y_validation)
        self._solved()
        return self

    def partial_fit(self, X: Array, y: Array, classes: Array | None = None) -> Self:
        """Add rows to those seen so far, in any chunking; the head is solved for when it is next needed.

        Args:
            X: ``(N, D)``.
            y: ``(N,)``. Labels not announced before become new classes.
            classes: labels to expect; predicting fails until each of them has been seen.

        Raises:
            ValueError: alpha would have to be chosen, which takes all rows at once; the covariance needs them too; or
                the moments were not saved with this head.
        """
        self._check_parameters()
        if self.zero_shot is not None and isinstance(self.alpha, str):
            raise ValueError(
                f"partial_fit cannot choose alpha={self.alpha!r} from a stream; give a number, or use fit."
            )
        if self.covariance in ("ledoit_wolf", "oas") or self.solver == "woodbury":
            name = self.covariance if self.covariance != "ks" else "woodbury"
            raise ValueError(f"{name} needs all rows at once; use fit, or covariance='ks' with solver='cholesky'.")
        first = not hasattr(self, "classes_")
        X, y = self._inputs(X, y, reset=first)
        if first:
            self._begin(X.shape[1])
        if self._moments is None:
            raise ValueError("this head was loaded without its moments and cannot be updated; fit it anew.")
        if self._residuals is not None:
            rows = like(self._residuals, self._moments.means)
            self._moments.kind, self._moments.scatter, self._residuals = "pooled", rows.T @ rows, None
        self._absorb(X, y, classes)
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
    def means_(self) -> Any:
        """Class means, ``(C, D)``."""
        return self._fitted_moments().means

    @property
    def precision_(self) -> Any:
        """The shared precision matrix, ``(D, D)``."""
        means = self._fitted_moments().means
        eye = np.eye(means.shape[1]) if isinstance(means, np.ndarray) else torch.eye(means.shape[1]).to(means)
        return self._apply_precision(eye)

    def to_linear(self) -> torch.nn.Linear:
        """Return the head as a float32 ``torch.nn.Linear(D, C)``, which does not normalise its input."""
        weight, bias = (torch.as_tensor(part) for part in self._solved())
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        return linear

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``head.safetensors`` (``weight``, ``bias``, ``zero_shot`` if there is one) and ``head.json``."""
        from safetensors.torch import save_file

        weight, bias = self._solved()
        parts = {"weight": weight, "bias": bias} | ({} if self.zero_shot is None else {"zero_shot": self.zero_shot})
        home = Path(directory)
        home.mkdir(parents=True, exist_ok=True)
        with atomic_path(home / "head.safetensors") as path:
            save_file({name: torch.as_tensor(part).contiguous().cpu() for name, part in parts.items()}, path)
        parameters = {name: value for name, value in self.get_params().items() if name != "zero_shot"}
        classes = self.classes_.tolist()
        said = {"format": _FORMAT, "parameters": parameters, "classes": classes, "alpha": self.alpha_}
        atomic_write_text(home / "head.json", json.dumps(said, indent=1))

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Open what ``save_pretrained`` wrote, for numpy input; it predicts, but holds no moments to update.

        Raises:
            ValueError: written in a format that this version does not know.
        """
        from safetensors.numpy import load_file

        said = json.loads((Path(directory) / "head.json").read_text(encoding="utf-8"))
        if said["format"] != _FORMAT:
            raise ValueError(f"{directory} is a head of format {said['format']}; this version reads format {_FORMAT}.")
        parts = load_file(Path(directory) / "head.safetensors")
        head = cls(**said["parameters"], zero_shot=parts.get("zero_shot"))
        head.n_features_in_ = parts["weight"].shape[1]
        head._begin(head.n_features_in_)
        head._moments = None
        head.classes_, head.alpha_ = np.array(said["classes"]), said["alpha"]
        head._head = (parts["weight"], parts["bias"])
        return head

    def _begin(self, features: int, *, without_scatter: bool = False) -> ClassMoments:
        self.alpha_ = 1.0 if self.zero_shot is None or isinstance(self.alpha, str) else float(self.alpha)
        self.alpha_curve_: dict[float, float] = {}
        kind: Literal["none", "diag", "pooled"] = "diag" if self.covariance == "diagonal" else "pooled"
        moments = ClassMoments(features, scatter="none" if without_scatter else kind)
        self._moments: ClassMoments | None = moments
        self._residuals = None
        self._head: tuple[Any, Any] | None = None
        self.__dict__.pop("classes_", None)
        return moments

    def _check_parameters(self) -> None:
        choices = {
            "covariance": ("ks", "empirical", "diagonal", "ledoit_wolf", "oas"),
            "prior": ("uniform", "empirical"),
            "solver": ("auto", "cholesky", "woodbury"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}; got {getattr(self, name)!r}.")
        if self.solver == "woodbury" and self.covariance != "ks":
            raise ValueError(f"solver='woodbury' solves covariance='ks' only; got covariance={self.covariance!r}.")
        known = self.alpha in ("auto", "validation") if isinstance(self.alpha, str) else 0 <= self.alpha < math.inf
        if not known:
            raise ValueError(f"alpha must be 'auto', 'validation' or a number >= 0; got {self.alpha!r}.")

    def _inputs(self, X: Array, y: Array, *, reset: bool = True) -> tuple[Any, Any]:
        X, y = checked_labelled(self, X, y, reset=reset)
        self._check_norm(X)
        return X, y

    def _check_norm(self, X: Array) -> None:
        if self.zero_shot is None or self.normalize:
            return
        # float16 features have a norm within 1e-3 of 1.
        norms = (X[:_ROWS] * X[:_ROWS]).sum(1) ** 0.5
        if bool((abs(norms - 1) > 5e-3).any()):
            worst = float(norms[abs(norms - 1).argmax()])
            raise ValueError(
                f"zero-shot weights need unit-norm features; got a row of norm {worst:.3g}. Use normalize=True."
            )

    def _woodbury(self, X: Array) -> bool:
        small = self.solver == "auto" and 2 * X.shape[0] < X.shape[1]
        return self.covariance == "ks" and (self.solver == "woodbury" or small)

    def _absorb(self, X: Array, y: Array, classes: Array | None = None) -> None:
        assert self._moments is not None
        for rows, labels in self._chunks(X, y):
            self._moments.update(rows, labels)
        xp = namespace(X)
        known = [self._moments.classes, *([self.classes_] if hasattr(self, "classes_") else [])]
        if classes is not None:
            known.append(np.asarray(classes) if xp is np else torch.as_tensor(classes, device=X.device))
        self.classes_: Any = xp.unique(xp.concatenate(known))
        self._head = None

    def _chunks(self, X: Array, y: Array) -> Iterator[tuple[Any, Any]]:
        if not self.normalize:
            yield X, y
            return
        for start in range(0, X.shape[0], _ROWS):
            yield unit(X[start : start + _ROWS]), y[start : start + _ROWS]

    def _choose_alpha(self, X: Array, y: Array, X_validation: Array | None, y_validation: Array | None) -> None:
        self._zero_shot_like(self._fitted_moments().means)
        if not isinstance(self.alpha, str):
            return
        if self.alpha == "validation":
            if X_validation is None or y_validation is None:
                raise ValueError("alpha='validation' needs X_validation and y_validation in fit.")
            held_out = [(*self._gaussian(), *self._inputs(X_validation, y_validation, reset=False))]
        else:
            held_out = self._folds(X, y)
        if not held_out:
            message = "a class has one example, so alpha cannot be cross-validated and is 1; give alpha a number."
            warnings.warn(message, UserWarning, stacklevel=3)
            return
        right, log_loss = dict.fromkeys(ALPHAS, 0.0), dict.fromkeys(ALPHAS, 0.0)
        count = 0
        for weight, bias, rows, labels in held_out:
            rows = unit(rows) if self.normalize else rows
            zero_shot = self.logit_scale * rows @ like(self._zero_shot_like(weight), rows).T
            gaussian = rows @ like(weight, rows).T + like(bias, rows)
            at = namespace(rows).searchsorted(self.classes_, labels)
            count += len(at)
            for alpha in ALPHAS:
                logits = zero_shot + alpha * gaussian
                right[alpha] += float((logits.argmax(1) == at).sum())
                log_loss[alpha] -= float(log_softmax(logits)[range(len(at)), at].sum())
        self.alpha_curve_ = {alpha: right[alpha] / count for alpha in ALPHAS}
        self.alpha_ = max(ALPHAS, key=lambda alpha: (right[alpha], -log_loss[alpha]))

    def _folds(self, X: Array, y: Array) -> list[tuple[Any, Any, Any, Any]]:
        """Gaussian heads without each fold, with the fold's rows and labels; none if a class has one example."""
        xp = namespace(X)
        counts = self._fitted_moments().counts
        folds = min(5, int(counts.min()))
        if folds < 2:
            return []
        # Examples of a class are dealt out in turn, so that every fold holds every class.
        order = xp.argsort(y, stable=True)
        deal = xp.empty_like(order)
        first = xp.cumsum(counts, 0) - counts
        at = xp.searchsorted(self.classes_, y[order])
        deal[order] = (xp.arange(len(order)) if xp is np else xp.arange(len(order), device=order.device)) - first[at]
        heads = []
        for fold in range(folds):
            out = deal % folds == fold
            part = GDAClassifier(self.covariance, self.prior, normalize=self.normalize, solver=self.solver)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # two shots leave one: the nearest mean is what is meant
                part.fit(X[~out], y[~out])
            heads.append((*part._solved(), X[out], y[out]))
        return heads

    def _fitted_moments(self) -> ClassMoments:
        check_is_fitted(self, "classes_")
        if self._moments is None:
            raise AttributeError("this head was loaded without its moments.")
        if len(self._moments.classes) < len(self.classes_):
            seen = set(self._moments.classes.tolist())
            raise ValueError(f"no sample of class(es) {[c for c in self.classes_.tolist() if c not in seen]} yet.")
        return self._moments

    def _solved(self) -> tuple[Any, Any]:
        check_is_fitted(self, "classes_")
        if self._head is None:
            weight, bias = self._gaussian()
            if self.zero_shot is not None:
                weight = self.alpha_ * weight + self.logit_scale * self._zero_shot_like(weight)
                bias = self.alpha_ * bias
            self._head = weight, bias
        return self._head

    def _gaussian(self) -> tuple[Any, Any]:
        moments = self._fitted_moments()
        xp = namespace(moments.means)
        weight = self._apply_precision(moments.means.T).T
        prior = xp.asarray(moments.counts, dtype=xp.float64) / moments.total
        if self.prior == "uniform":
            prior = xp.ones_like(prior) / len(prior)
        return weight, xp.log(prior) - 0.5 * (weight * moments.means).sum(1)

    def _apply_precision(self, columns: Any) -> Any:
        """``P @ columns`` for ``(D, n)`` columns, by a solve."""
        moments = self._fitted_moments()
        total, features = moments.total, moments.n_features
        if self.covariance in ("ledoit_wolf", "oas"):
            rows = self._residuals
            if isinstance(rows, Tensor) and rows.device.type != "cpu":
                raise ValueError(
                    f"covariance={self.covariance!r} is scikit-learn's and takes no tensor on {rows.device}."
                )
            estimate = ledoit_wolf if self.covariance == "ledoit_wolf" else oas
            shrunk, _ = estimate(np.asarray(rows, dtype=np.float64), assume_centered=True)
            return solve(like(shrunk, columns), columns)
        if self.covariance == "diagonal":
            return columns / (moments.scatter.sum(0) / total + _VARIANCE_FLOOR)[:, None]
        if self.covariance == "empirical":
            return solve(moments.scatter / total, columns)
        rows = None if self._residuals is None else like(self._residuals, columns)
        trace = float((rows * rows).sum()) if rows is not None else float(moments.scatter.trace())
        # Rounding in the means leaves residuals of about eps times their size.
        if trace <= total * float((moments.means**2).sum()) * 1e-28:
            message = (
                "no spread within any class (one example each?): the precision is the identity, the nearest mean wins."
            )
            warnings.warn(message, UserWarning, stacklevel=4)
            return columns
        return features * shrunk_solve(moments.scatter, rows, trace / (total - 1), columns)

    def _zero_shot_like(self, weight: Any) -> Any:
        zero_shot = like(self.zero_shot, weight)
        if tuple(zero_shot.shape) != tuple(weight.shape):
            got, needed = tuple(zero_shot.shape), tuple(weight.shape)
            raise ValueError(f"zero_shot must be (classes, features) = {needed}; got {got}.")
        return zero_shot

    def _scores(self, X: Array) -> Any:
        check_is_fitted(self, "classes_")
        X = checked_rows(self, X)
        self._check_norm(X)
        X = unit(X) if self.normalize else X
        weight, bias = (like(part, X) for part in self._solved())
        return X @ weight.T + bias


class ZeroShot(Spec):
    """Zero-shot weights from the classes' descriptions, which the Gaussian logits are added to."""

    templates: tuple[Name, ...] = Field(
        default=("{}",), min_length=1, description="sentences with {} for a class's description; their vectors' mean"
    )
    alpha: Annotated[float, Field(ge=0)] | Literal["auto", "validation"] = Field(
        default="auto",
        description="weight of the Gaussian logits: a number; by cross-validation in the training examples; or on the "
        "validation examples, whose labels are counted",
    )
    logit_scale: float = Field(default=100.0, gt=0, description="of the zero-shot logits")  # of CLIP

    @field_validator("templates")
    @classmethod
    def _templates_have_a_place(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any("{}" not in template for template in value):
            raise ValueError(f"every template needs a {{}} for the description; got {list(value)}")
        return value


class GDA(HeadRecipe):
    """Recipe: Gaussian discriminant analysis on features of the frozen model.

    Leaves ``scores.json`` with the accuracy at each alpha tried, where zero-shot weights are used.
    """

    id: ClassVar[str] = "gda"

    covariance: Literal["ks", "empirical", "diagonal", "ledoit_wolf", "oas"] = Field(
        default="ks", description="estimate of the shared covariance; ks is the paper's shrinkage"
    )
    zero_shot: ZeroShot | None = Field(
        default=None,
        description="add the Gaussian logits to zero-shot logits of the classes' descriptions; null: alone",
    )

    @model_validator(mode="after")
    def _zero_shot_needs_unit_length(self) -> Self:
        if self.zero_shot is not None and not self.normalize:
            raise ValueError("zero_shot compares directions and needs features of unit length; set normalize: true")
        return self

    def head(self, task: AdaptTask, run: Run) -> GDAClassifier:
        """Solve for the head; choose alpha if there is one."""
        X, y = task.train.inputs, task.train.labels
        if self.zero_shot is None:
            return GDAClassifier(self.covariance, self.prior).fit(X, y)
        model, tokenizer = task.encoder()
        weights = zero_shot_weights(
            model, tokenizer, self.zero_shot.templates, task.label_texts, max_length=self.max_tokens
        )
        head = GDAClassifier(
            self.covariance, self.prior, weights, self.zero_shot.alpha, logit_scale=self.zero_shot.logit_scale
        )
        if self.zero_shot.alpha == "validation":
            head.fit(X, y, task.validation.inputs, task.validation.labels)
        else:
            head.fit(X, y)
        curve = {str(alpha): accuracy for alpha, accuracy in head.alpha_curve_.items()}
        run.write_json("scores.json", {"alpha": head.alpha_, "accuracy": curve})
        return head
