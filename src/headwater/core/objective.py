"""What a training loop minimises: a sum and a count, never a mean.

A mean hides what it is a mean of. With sums and counts, gradient accumulation, several processes and ragged batches
give exactly the gradient of one large batch:  (sum_i total_i) / (sum_i count_i).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

if TYPE_CHECKING:
    from headwater.core.trainer import ObjectiveTrainer

__all__ = ["Loss", "Objective", "ObjectiveTrainer", "OverBatch", "StepAware"]


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


OverBatch = Callable[[Callable[[nn.Module, Mapping[str, Tensor]], Tensor]], Tensor]
"""Called with ``measure(model, part)``, gives what that returns for each row of the whole batch, ``(rows, ...)``."""


@runtime_checkable
class StepAware(Protocol):
    """An objective that changes on the way, or whose rows depend on each other.

    The loop hands an objective one micro-batch at a time, which must add up. What depends on the batch as a whole, such
    as a quantile of its scores, is taken before: the whole batch of all processes passes through the model without a
    gradient, with the draws of the pass to come. That is a forward pass more where a batch is cut; ``seconds`` hold it,
    the count of FLOPs does not.
    """

    def begin_step(self, progress: float, over_batch: OverBatch | None) -> None:
        """Prepare for the calls of one step.

        Args:
            progress: fraction of the budget that is spent, 0 at the first step and below 1 at the last.
            over_batch: measures the whole batch; ``None`` where the one call to come sees all of it.
        """
        ...


def __getattr__(name: str) -> Any:  # Any: a class, imported late because transformers.Trainer takes seconds to load
    if name == "ObjectiveTrainer":
        from headwater.core.trainer import ObjectiveTrainer

        return ObjectiveTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
