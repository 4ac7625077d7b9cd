"""What a training loop minimises: a sum and a count, never a mean.

A mean hides what it is a mean of. With sums and counts, gradient accumulation, several processes and ragged batches
give exactly the gradient of one large batch:  (sum_i total_i) / (sum_i count_i).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

if TYPE_CHECKING:
    from headwater.core.trainer import ObjectiveTrainer

__all__ = ["Loss", "Objective", "ObjectiveTrainer"]


@dataclass(frozen=True)
class Loss:
    """What one micro-batch contributes.

    Attributes:
        total: scalar, the sum of the loss over what is counted, attached to the graph.
        count: scalar, how many tokens, pairs or nodes were summed; 0 is allowed.
        metrics: detached scalars to log, averages over this micro-batch; the loop averages them again, weighted by
            ``count``.
    """

    total: Tensor
    count: Tensor | int
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Objective(Protocol):
    """A callable that measures a model on a batch.

    One with weights of its own (a head, a teacher, a queue) is an ``nn.Module`` that owns those and not the user's
    model, so the model saves as itself. What it trains is trained and checkpointed with the model; a teacher in it is
    frozen and in ``eval()``.

    """

    @property
    def unit(self) -> str:
        """Of ``total / count``, e.g. ``"nats/token"``; a plain attribute will do. Different units are never ranked."""
        ...

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """Measure one micro-batch. Draws come from torch's global generator, which the loop seeds before each call."""
        ...


def __getattr__(name: str) -> Any:  # Any: a class, imported late because transformers.Trainer takes seconds to load
    if name == "ObjectiveTrainer":
        from headwater.core.trainer import ObjectiveTrainer

        return ObjectiveTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
