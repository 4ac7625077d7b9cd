"""NMTune: a small residual network between a frozen encoder and its head, held to reshape the features gently.

With f the frozen features of a batch of B, z = f + s * MLP(f) what the head reads, D wide, sigma the singular values of
the B x D matrix z (not centred)::

    L     = CE + w_mse L_mse + w_cov L_cov + w_svd L_svd
    L_mse = mean over entries of (z / |z| - f / |f|)^2            keep what pretraining knows; no gradient into f
    L_cov = sum_{i != j} Cov(z)_ij^2 / D                          spread it over all directions
    L_svd = - (1 / m) sum_{i <= m} sigma_i / sum_j sigma_j        let the directions that transfer best dominate

    SVE   = - sum_i p_i log p_i,   p = sigma / sum sigma          singular value entropy: rises with pretraining noise
    LSVR  = - log p_1                                             of the largest singular value

Source: Chen et al., "Understanding and Mitigating the Label Noise in Pre-training on Downstream Tasks",
    arXiv:2309.17002; weights and sizes from the arguments of its official code.
Differs: features are stored, so both augmented views of the official code are f. The residual connection, an option
    there, is always present, s starts at 1. Features are standardised first: at a raw scale of 50 L_cov would drown all
    else. Spectra take each feature's mean away (there each row's, of unit-length rows). The head starts at zero, not
    Kaiming-uniform, which for few features is more than thirty epochs undo. ``prior="uniform"``, the recipe's default,
    weighs classes alike in CE; the paper's CE is ``"empirical"``.
Needs: labels, and features of a model that may be a black box.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field
from sklearn.base import OneToOneFeatureMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from headwater.adapt.arrays import namespace
from headwater.adapt.base import AdaptTask, HeadRecipe
from headwater.adapt.estimator import Array, ScoredClassifier, checked_labelled, checked_rows
from headwater.adapt.nmtune_block import USAGE, NMTuneBlock, Standardize, tune
from headwater.adapt.nmtune_loss import NMTuneLoss, Spectrum, covariance_loss, spectrum
from headwater.core.moments import ClassMoments
from headwater.core.order import permutation
from headwater.core.rng import derive_seed, torch_generator

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["NMTune", "NMTuneBlock", "NMTuneClassifier", "NMTuneLoss", "Spectrum", "spectrum", "tune"]

_ROWS = 4096  # read at a time where nothing is learned


class NMTuneClassifier(OneToOneFeatureMixin, TransformerMixin, ScoredClassifier):  # type: ignore[misc]  # scikit-learn has no annotations
    """A head on frozen features with NMTune's network before it; ``transform`` gives the reshaped features.

    Takes numpy arrays or torch tensors; tensors are answered with tensors on their device, string labels with numpy
    arrays. Trained in float64 on float64 features, else in float32; on a CPU the same seed gives the same bits.

    Args:
        w_mse: weight of the consistency term.
        w_cov: weight of the covariance term.
        w_svd: weight of the singular value term. With all three at 0 this is plain tuning of the same network.
        m: number of dominant singular values.
        ratio: hidden width in units of the features'.
        layers: hidden layers.
        epochs: passes of ``fit``.
        lr: highest learning rate of AdamW, falling to 0 along a half cosine in ``fit``; constant in ``partial_fit``.
        weight_decay: of AdamW.
        batch_size: >= 2. A last batch of one row is left out.
        standardize: scale features to mean 0 and deviation 1, as in the first data seen.
        prior: ``"uniform"`` weighs classes so that all count alike in the cross-entropy, ``"empirical"`` does not.
        device: where to train and predict; ``None`` is where a tensor is, and the CPU for numpy.
        random_state: of initial weights and order.

    Attributes:
        classes_: ``(C,)`` numpy array, sorted.
        module_: standardisation, block and head.
        history_: for each epoch the mean terms ``ce, mse, cov, svd``.
        n_features_in_: D.

    Example:
        >>> X, y = np.random.default_rng(0).normal(size=(60, 4)), np.repeat(["a", "b"], 30)
        >>> X[:30] += 3
        >>> NMTuneClassifier(lr=0.01, random_state=0).fit(X, y).predict(np.full((1, 4), 3.0))
        array(['a'], dtype='<U1')
    """

    _optimizer: torch.optim.Optimizer | None
    module_: Any  # Any: an nn.Sequential whose parts are called by name

    def __init__(
        self,
        w_mse: float = 1.0,
        w_cov: float = 0.04,
        w_svd: float = 0.001,
        m: int = 5,
        ratio: float = 4.0,
        layers: int = 1,
        epochs: int = 30,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        batch_size: int = 64,
        standardize: bool = True,
        prior: Literal["uniform", "empirical"] = "empirical",
        device: str | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.w_mse = w_mse
        self.w_cov = w_cov
        self.w_svd = w_svd
        self.m = m
        self.ratio = ratio
        self.layers = layers
        self.epochs = epochs
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.standardize = standardize
        self.prior = prior
        self.device = device
        self.random_state = random_state

    def fit(self, X: Array, y: Array) -> Self:
        """Train from scratch.

        Args:
            X: ``(N, D)``, N >= 2, may be memory-mapped.
            y: ``(N,)`` integers or strings.

        Raises:
            ValueError: see the arguments; one row; shapes that disagree, or rows that are not finite.
        """
        X, y = self._inputs(X, y)
        self._begin(X, y)
        optimizer = self._adamw()
        steps = sum(1 for _ in self._batches(np.arange(X.shape[0])))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * steps)
        for _ in range(self.epochs):
            self._epoch(X, y, optimizer, schedule)
        return self

    def partial_fit(self, X: Array, y: Array, classes: Array | None = None) -> Self:
        """Train for one epoch over these rows, from where ``fit`` or the call before left off.

        Args:
            X: ``(N, D)``, N >= 2. The first rows ever seen set the standardisation.
            y: ``(N,)``.
            classes: all labels that will occur; by default those of the first call.

        Raises:
            ValueError: as ``fit``; a label is not among the classes, or ``classes`` differ from those known.
        """
        first = not hasattr(self, "module_")
        X, y = self._inputs(X, y, reset=first)
        if first:
            self._begin(X, y if classes is None else classes)
        elif classes is not None and not np.array_equal(_unique(classes), self.classes_):
            raise ValueError(f"classes are {self.classes_.tolist()} since the first call; got {list(classes)}.")
        if self._optimizer is None:
            self._optimizer = self._adamw()
        self._epoch(X, y, self._optimizer)
        return self

    def transform(self, X: Array) -> Any:
        """Return the reshaped features z, ``(N, D)``."""
        return self._outputs(X, "block")

    def predict(self, X: Array) -> Any:
        """Return the likeliest label of each row, ``(N,)``."""
        best = self._scores(X).argmax(1)
        if isinstance(best, Tensor):
            if self.classes_.dtype.kind in "iufb":
                return torch.as_tensor(self.classes_, device=best.device)[best]
            best = best.numpy(force=True)
        return self.classes_[best]

    def to_module(self) -> nn.Sequential:
        """Return a copy of standardisation, block and head as one module from features to logits, ``(N, C)``.

        It can stand behind any encoder, and be trained on with it.
        """
        check_is_fitted(self, "module_")
        module: nn.Sequential = copy.deepcopy(self.module_)
        return module

    def arrays(self) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
        """What is learned, by the files that it is saved in: ``block`` and ``head``."""
        check_is_fitted(self, "module_")
        parts = self.module_
        named = {
            "block": {**parts.standardize.state_dict(), **parts.block.state_dict()},
            "head": parts.head.state_dict(),
        }
        return {
            file: {name: value.numpy(force=True) for name, value in of.items() if value.is_floating_point()}
            for file, of in named.items()
        }

    def usage(self) -> str:
        """How to predict by ``arrays`` with PyTorch alone, for a README."""
        return USAGE.format(last=3 * self.layers)

    def _begin(self, X: Any, labels: Any) -> None:
        self.classes_ = _unique(labels)
        seed = check_random_state(self.random_state).randint(2**31 - 1)
        generator = torch_generator(seed, "nmtune weights")
        block = NMTuneBlock(X.shape[1], self.ratio, self.layers, generator=generator)
        head = nn.utils.skip_init(nn.Linear, X.shape[1], len(self.classes_))  # type: ignore[no-untyped-call]  # torch's
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        parts = OrderedDict(standardize=Standardize(*self._moments(X)), block=block, head=head)
        device = self.device or (X.device if isinstance(X, Tensor) else "cpu")
        dtype = torch.float64 if X.dtype in (np.float64, torch.float64) else torch.float32
        self.module_ = nn.Sequential(parts).to(device, dtype).eval()
        self.history_: list[dict[str, float]] = []
        self._optimizer = None
        self._order_seed = derive_seed(seed, "nmtune order")
        self._counts = torch.zeros(len(self.classes_), dtype=dtype, device=device)
        self._warn_of_scale(X)

    def _moments(self, X: Any) -> tuple[Tensor, Tensor]:
        width = X.shape[1]
        if not self.standardize:
            return torch.zeros(width), torch.ones(width)
        moments = ClassMoments(width, scatter="diag")
        for start in range(0, X.shape[0], _ROWS):
            rows = X[start : start + _ROWS]
            moments.update(rows, namespace(X).zeros(len(rows), dtype=namespace(X).int64))
        mean, std = torch.as_tensor(moments.means[0]), torch.as_tensor(moments.scatter[0] / moments.total) ** 0.5
        # Of a constant feature nothing but rounding is left.
        return mean, torch.where(std > 1e-7 * mean.abs(), std, 1)

    def _warn_of_scale(self, X: Any) -> None:
        batch, width = min(self.batch_size, X.shape[0]), X.shape[1]
        if self.w_svd and self.m > min(batch, width):
            message = (
                f"batches of {batch} rows by {width} features have fewer than m={self.m} singular values; all count."
            )
            warnings.warn(message, UserWarning, stacklevel=4)
        # Before the first step the cross-entropy is about that of guessing, and z about as large as f.
        pull = self.w_cov * float(covariance_loss(self.module_.standardize(self._at_module(X[:batch]))))
        if pull > 100 * math.log(max(2, len(self.classes_))):
            message = f"the covariance term is {pull:.3g} at the start and drowns the labels; set standardize=True."
            warnings.warn(message, UserWarning, stacklevel=4)

    def _epoch(self, X: Any, y: Any, optimizer: torch.optim.Optimizer, schedule: Any = None) -> None:
        codes = self._codes(y)
        self._counts += torch.bincount(codes, minlength=len(self.classes_))
        weight = self._counts.sum() / self._counts.clamp(min=1) / len(self.classes_)
        order = permutation(self._order_seed, len(self.history_), X.shape[0])
        parts = self.module_
        terms = tune(
            parts.block,
            parts.head,
            NMTuneLoss(self.w_mse, self.w_cov, self.w_svd, self.m),
            ((parts.standardize(self._at_module(X[rows])), codes[rows]) for rows in self._batches(order)),
            optimizer,
            schedule,
            weight if self.prior == "uniform" else None,
        )
        self.history_.append(terms)

    def _batches(self, order: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
        for start in range(0, len(order), self.batch_size):
            if len(rows := order[start : start + self.batch_size]) > 1:  # one row has no covariance
                yield rows

    def _adamw(self) -> torch.optim.Optimizer:
        learned = [*self.module_.block.parameters(), *self.module_.head.parameters()]
        return torch.optim.AdamW(learned, lr=self.lr, weight_decay=self.weight_decay)

    def _codes(self, y: Any) -> Tensor:
        known = torch.as_tensor(self.classes_, device=y.device) if isinstance(y, Tensor) else self.classes_
        xp = namespace(y)
        codes = xp.clip(xp.searchsorted(known, y), 0, len(known) - 1)
        strange = known[codes] != y
        if bool(strange.any()):
            raise ValueError(f"label {y[strange][0]} is not one of {self.classes_.tolist()}; announce it in `classes`.")
        return torch.as_tensor(codes, device=self._counts.device)

    def _inputs(self, X: Array, y: Array, *, reset: bool = True) -> tuple[Any, Any]:
        self._check_parameters()
        X, y = checked_labelled(self, X, y, reset=reset, strings=True)
        _check_finite(X)
        if X.shape[0] < 2:
            raise ValueError("batch norm and covariances need at least 2 rows; got 1 sample.")
        return X, y

    def _scores(self, X: Array) -> Any:
        return self._outputs(X)

    def _outputs(self, X: Array, last: Literal["block", "head"] = "head") -> Any:
        check_is_fitted(self, "module_")
        X = checked_rows(self, X)
        _check_finite(X)
        module = self.module_ if last == "head" else self.module_[:2]
        with torch.no_grad():
            found = torch.cat([module(self._at_module(X[i : i + _ROWS])) for i in range(0, X.shape[0], _ROWS)])
        return found.to(X) if isinstance(X, Tensor) else found.numpy(force=True).astype(X.dtype)

    def _at_module(self, rows: Any) -> Tensor:
        # A copy of numpy rows, since a memory-mapped file may not be written to.
        tensor = rows if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows))
        return tensor.to(self._counts)

    def _check_parameters(self) -> None:
        for name, least in {"epochs": 1, "batch_size": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)!r}.")
        if not 0 < self.lr < math.inf or not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"lr must be > 0 and weight_decay >= 0; got {self.lr!r} and {self.weight_decay!r}.")
        if self.prior not in ("uniform", "empirical"):
            raise ValueError(f"prior must be 'uniform' or 'empirical'; got {self.prior!r}.")
        NMTuneLoss(self.w_mse, self.w_cov, self.w_svd, self.m)  # which checks its own


def _check_finite(X: Array) -> None:
    # Of NumPy rows scikit-learn has seen to it.
    if isinstance(X, Tensor) and bool((bad := ~torch.isfinite(X).all(1)).any()):
        raise ValueError(f"row {int(bad.nonzero()[0])} of X is not finite.")


def _unique(labels: Any) -> np.ndarray[Any, Any]:
    return torch.unique(labels).numpy(force=True) if isinstance(labels, Tensor) else np.unique(labels)


class NMTune(HeadRecipe):
    """Recipe: a head on features of the frozen model that NMTune's network reshapes.

    Leaves ``spectrum.json``: entropy, largest share and singular values of the training features before and after.
    """

    id: ClassVar[str] = "nmtune"

    w_mse: float = Field(default=1.0, ge=0, description="weight of staying close to the frozen features")
    w_cov: float = Field(default=0.04, ge=0, description="weight of the covariances between features")
    w_svd: float = Field(default=0.001, ge=0, description="weight of the dominance of the largest singular values")
    m: int = Field(default=5, ge=1, description="how many singular values are to dominate")
    ratio: float = Field(default=4.0, gt=0, description="hidden width of the network in units of the features'")
    epochs: int = Field(default=30, ge=1, description="passes over the training examples")
    lr: float = Field(default=1e-3, gt=0, description="highest learning rate of AdamW, falling along a half cosine")
    batch_size: int = Field(default=64, ge=2, description="examples of one step, whose covariances are taken")
    standardize: bool = Field(default=True, description="scale features to mean 0 and deviation 1 first")

    def head(self, task: AdaptTask, run: Run) -> NMTuneClassifier:
        """Train network and head; write the spectra."""
        X = task.train.inputs
        head = NMTuneClassifier(
            self.w_mse,
            self.w_cov,
            self.w_svd,
            self.m,
            self.ratio,
            epochs=self.epochs,
            lr=self.lr,
            batch_size=self.batch_size,
            standardize=self.standardize,
            prior=self.prior,
            random_state=derive_seed(self.seed, "nmtune") % 2**32,
        ).fit(X, task.train.labels)
        with torch.no_grad():
            before = head.to_module()[0](torch.as_tensor(X))
        run.write_json("spectrum.json", {"before": _said(before), "after": _said(head.transform(X))})
        return head


def _said(features: Array) -> dict[str, Any]:  # Any: JSON data
    found = spectrum(features)
    return {"sve": found.sve, "lsvr": found.lsvr, "sigmas": found.sigmas.tolist()}
