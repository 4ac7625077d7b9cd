"""A slow copy of parameters, and the objective that moves it along while a task is learned.

    theta' <- a theta' + (1 - a) theta        after each step

Source: Gao et al., "A Unified Continual Learning Framework with General Parameter-Efficient Tuning", arXiv:2303.10070.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from headwater.continual.heads import GrowingLinear
from headwater.continual.training import TaskCrossEntropy
from headwater.core.objective import OverBatch

__all__ = ["CurrentClasses", "OfflineCopy", "decay_per_step"]


def decay_per_step(decay: float | str, steps: int) -> float:
    """What the copy keeps of itself in one step.

    Args:
        decay: that fraction, in [0, 1]; or ``task:h``: half of it is left after h tasks, a = .5^(1 / (h steps)).
        steps: of one task, at least 1.

    Example:
        >>> round(decay_per_step("task:2", 10) ** 20, 12)  # two tasks later
        0.5
    """
    if isinstance(decay, str):
        return float(0.5 ** (1 / (float(decay.removeprefix("task:")) * steps)))
    return decay


class OfflineCopy(nn.Module):
    """An exponential moving average of parameters; only of these, and in one call for all.

    Args:
        online: the parameters, or the module that has them; those that require no gradient are followed, too.
        decay: a, in [0, 1].

    Attributes:
        values: the averages, in the order of the parameters; buffers, so that a checkpoint of training holds them.
    """

    def __init__(self, online: nn.Module | Iterable[nn.Parameter], decay: float) -> None:
        super().__init__()
        parameters = online.parameters() if isinstance(online, nn.Module) else online
        self._online = (tuple(parameters),)  # in a tuple of tuples: not registered, not trained with this module
        self.decay = decay
        for index, parameter in enumerate(self._online[0]):
            self.register_buffer(f"value_{index}", parameter.detach().clone())

    @property
    def values(self) -> list[Tensor]:
        """The averages."""
        return list(self.buffers())

    @torch.no_grad()
    def update(self) -> None:
        """Theta' <- a theta' + (1 - a) theta."""
        torch._foreach_lerp_(self.values, [parameter.detach() for parameter in self._online[0]], 1 - self.decay)


class CurrentClasses(TaskCrossEntropy):
    """Cross-entropy of a head over some of its classes, moving an offline copy along; an ``Objective``.

    Args:
        head: from features to logits.
        classes: those that compete; the gradient of the others is zero.
        offline: is updated between steps. The update after the last one is the caller's.
    """

    def __init__(self, head: GrowingLinear, classes: Sequence[int], offline: OfflineCopy | None = None) -> None:
        competing = torch.zeros(head.out_features, dtype=torch.bool)
        competing[list(classes)] = True
        super().__init__(head, competing)
        self.offline = offline

    def begin_step(self, progress: float, over_batch: OverBatch | None) -> None:
        """Take in what the step before did."""
        if self.offline is not None and progress > 0:
            self.offline.update()
