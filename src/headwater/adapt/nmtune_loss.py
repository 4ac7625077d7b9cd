"""What NMTune asks of features: the regularisers of a batch, their loss, and the spectrum as a diagnosis.

The equations stand in ``headwater.adapt.nmtune``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "NMTuneLoss",
    "Spectrum",
    "consistency_loss",
    "covariance_loss",
    "dominance_loss",
    "singular_values",
    "spectrum",
]

Array = np.ndarray[Any, Any] | Tensor


def consistency_loss(z: Tensor, f: Tensor) -> Tensor:
    """Mean squared difference of the directions of ``z`` and ``f``, both ``(B, D)``; no gradient reaches ``f``.

    A scalar in [0, 4 / D]; the scale of either does not matter, and a row of zeros has no direction.
    """
    return functional.mse_loss(functional.normalize(_precise(z)), functional.normalize(_precise(f.detach())))


def covariance_loss(z: Tensor) -> Tensor:
    """Sum of squared covariances between different columns of ``z``, ``(B, D)`` with B >= 2, divided by D: a scalar."""
    z = _precise(z)
    batch, width = z.shape
    z = z - z.mean(0)
    if width >= 4 * batch:  # the same, over B x B: |Z^T Z|_F = |Z Z^T|_F
        off = (z @ z.T).square().sum() - z.square().sum(0).square().sum()
        return off / (batch - 1) ** 2 / width
    cov = z.T @ z / (batch - 1)
    return (cov - torch.diag(cov.diagonal())).square().sum() / width


def dominance_loss(z: Tensor, m: int = 5) -> Tensor:
    """Minus the mean share that the ``m`` largest singular values of ``z``, ``(B, D)``, have in their sum.

    A scalar in [-1 / m, -1 / min(B, D)]; 0 if ``z`` is zero. ``m`` is at most min(B, D).
    """
    sigma = singular_values(z)
    return -(sigma[:m].mean() / sigma.sum().clamp(min=1e-12)).to(_precise(z).dtype)


def singular_values(z: Tensor) -> Tensor:
    """Singular values of ``z``, ``(B, D)``, from the eigenvalues of the smaller Gram matrix, in float64.

    Returns:
        ``(min(B, D),)`` float64, descending. What rounding cannot tell from 0, below about 1e-7 of the largest, is 0
        and passes no gradient on.
    """
    z = z.double()
    gram = z @ z.T if z.shape[0] <= z.shape[1] else z.T @ z
    squares = torch.linalg.eigvalsh(gram).flip(0)
    kept = squares > squares[:1] * max(z.shape) * torch.finfo(squares.dtype).eps
    return torch.where(kept, torch.where(kept, squares, 1).sqrt(), 0)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True, eq=False)
class Spectrum:
    """How evenly features spread over directions.

    Attributes:
        sve: entropy of the singular values, nats, from 0 (one direction) to log of their number (all alike).
        lsvr: minus the log of the largest one's share, nats, from 0.
        sigmas: singular values, descending, ``(min(N, D),)`` float64.
    """

    sve: float
    lsvr: float
    sigmas: Any  # Any: NumPy or torch as the features were


def spectrum(X: Array, *, center: bool = True) -> Spectrum:
    """Diagnose features: noise in pretraining labels shows as a higher ``sve`` and a higher ``lsvr``.

    Args:
        X: ``(N, D)``; a float64 copy is made.
        center: take each feature's mean away first.

    Raises:
        ValueError: ``X`` is not a matrix with rows, or, centred, is constant.
    """
    if X.ndim != 2 or 0 in X.shape:
        raise ValueError(f"X must be (samples, features), neither of them 0; got shape {tuple(X.shape)}.")
    rows = torch.as_tensor(X).double()
    sigmas = singular_values(rows - rows.mean(0) if center else rows)
    if not sigmas[0] > 0:
        raise ValueError("all rows are the same: there is no direction to speak of. Give features of several inputs.")
    share = sigmas / sigmas.sum()
    found = sigmas if isinstance(X, Tensor) else sigmas.numpy()
    return Spectrum(float(torch.special.entr(share).sum()), -math.log(float(share[0])), found)


class NMTuneLoss(nn.Module):
    """Cross-entropy with the three regularisers; a term of weight 0 is not computed.

    Covariances and singular values belong to a batch, not to its rows: the loss of two batches is not that of their
    union, and accumulating gradients over small batches is not training on a large one.

    Args:
        w_mse: weight of the consistency with the frozen features.
        w_cov: weight of the covariances.
        w_svd: weight of the dominance of the largest singular values.
        m: how many of those; of a batch or width smaller than that, all.

    Shapes:
        z, f ``(B, D)``, B >= 2; logits ``(B, C)``; y ``(B,)`` int64.

    Raises:
        ValueError: a weight is negative, ``m`` is not positive, or a batch has one row.
    """

    def __init__(self, w_mse: float = 1.0, w_cov: float = 0.04, w_svd: float = 0.001, m: int = 5) -> None:
        super().__init__()
        for name, value in {"w_mse": w_mse, "w_cov": w_cov, "w_svd": w_svd}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number >= 0; got {value!r}. 0 leaves the term out.")
        if m < 1:
            raise ValueError(f"m must be at least 1; got {m!r}.")
        self.w_mse, self.w_cov, self.w_svd, self.m = w_mse, w_cov, w_svd, m

    def forward(
        self, z: Tensor, f: Tensor, logits: Tensor, y: Tensor, class_weight: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its terms ``ce, mse, cov, svd``, detached and without their weights.

        Args:
            z: what the head read.
            f: frozen features of the same rows, or of another view of them.
            logits: the head's.
            y: class indices.
            class_weight: of each class in the cross-entropy, ``(C,)``.
        """
        if len(z) < 2:
            raise ValueError(f"covariances need a batch of at least 2 rows; got {len(z)}.")
        ce = functional.cross_entropy(_precise(logits), y, weight=class_weight)
        none = ce.new_zeros(())
        mse = consistency_loss(z, f) if self.w_mse else none
        cov = covariance_loss(z) if self.w_cov else none
        svd = dominance_loss(z, self.m) if self.w_svd else none
        terms = {"ce": ce, "mse": mse, "cov": cov, "svd": svd}
        loss = ce + self.w_mse * mse + self.w_cov * cov + self.w_svd * svd
        return loss, {name: term.detach() for name, term in terms.items()}
