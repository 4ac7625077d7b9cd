"""Labels that are distributions: checking them, and the loss against them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["SoftCrossEntropy", "TargetLoss", "check_distributions", "soft_cross_entropy"]


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``- sum_c targets_c log softmax(logits)_c``, one value per example, in float32.

    Args:
        logits: ``(batch, classes)``, any floating dtype.
        targets: distributions, same shape.

    Raises:
        ValueError: the shapes differ.
    """
    if logits.shape != targets.shape:
        raise ValueError(f"targets must have the logits' shape, {tuple(logits.shape)}; got {tuple(targets.shape)}.")
    return -(targets.float() * logits.float().log_softmax(-1)).sum(-1)


def check_distributions(name: str, values: NDArray[Any]) -> None:  # Any: a float dtype
    """Refuse what is not ``(n, classes)`` probabilities; rows may be off by 1e-3.

    Raises:
        ValueError: naming the first bad row.
    """
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(f"{name} must be (n, classes), with two classes or more; got shape {values.shape}.")
    bad = ~np.isfinite(values).all(1) | (values < 0).any(1) | (np.abs(values.sum(1) - 1) > 1e-3)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"{name} must be probabilities; row {row} is {values[row].tolist()}. Apply a softmax to logits."
        )


class TargetLoss(Protocol):
    """A loss against targets that are mixed from weak labels and the model's own answers."""

    @property
    def whole_batch(self) -> bool:
        """Whether targets depend on the other rows of the batch."""
        ...

    def boundary(self, logits: Tensor, weak_probs: Tensor) -> Tensor | None:
        """What the batch as a whole decides; ``None`` where nothing."""
        ...

    def targets(self, logits: Tensor, weak_probs: Tensor, step_frac: float, boundary: Tensor | None = None) -> Tensor:
        """Distributions ``(batch, classes)`` through which no gradient flows."""
        ...


@dataclass(frozen=True)
class SoftCrossEntropy:
    """The targets are the labels as they are."""

    whole_batch: bool = False

    def boundary(self, logits: Tensor, weak_probs: Tensor) -> None:
        """Nothing."""

    def targets(self, logits: Tensor, weak_probs: Tensor, step_frac: float, boundary: Tensor | None = None) -> Tensor:
        """``weak_probs``."""
        return weak_probs
