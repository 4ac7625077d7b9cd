"""Classifiers whose classes arrive over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headwater.continual.base import Batch
from headwater.continual.streams import TaskData

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["GrowingLinear", "HeadLearner", "StreamingHead"]


class StreamingHead(Protocol):
    """A scikit-learn classifier that ``HeadLearner`` can drive: new classes may appear at any ``partial_fit``."""

    classes_: NDArray[Any]  # Any: integer labels here

    def partial_fit(self, X: NDArray[Any], y: NDArray[Any]) -> Any:
        """Add samples."""

    def decision_function(self, X: NDArray[Any]) -> NDArray[Any]:
        """Scores as scikit-learn shapes them: ``(n, classes)``, or ``(n,)`` for two classes."""

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything learned, as arrays."""

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> Any:
        """Take up what ``state`` gave."""

    def save_pretrained(self, directory: Path, label_names: Sequence[str]) -> None:
        """Write what was learned, with a ``README.md``."""


class HeadLearner:
    """Any streaming head on features, as a learner.

    Args:
        head: the classifier; fresh.
    """

    def __init__(self, head: StreamingHead) -> None:
        self.head = head

    def observe(self, task: TaskData, run: Run) -> None:
        """Add the task's samples."""
        self.head.partial_fit(task.train.inputs, task.train.labels)

    def scores(self, batch: Batch) -> Tensor:
        """Decision values, ``(batch, n_seen)``."""
        values = np.asarray(self.head.decision_function(batch.inputs))
        if values.ndim == 1:  # scikit-learn gives two classes one column: how much more the second one is meant
            values = np.stack((np.zeros_like(values), values), axis=1)
        return torch.from_numpy(values)

    def state(self) -> dict[str, Tensor]:
        """The head's arrays."""
        return {name: torch.from_numpy(array) for name, array in self.head.state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the head."""
        self.head.load_state({name: tensor.numpy() for name, tensor in state.items()})

    def save(self, directory: Path, label_names: Sequence[str]) -> None:
        """Let the head write itself."""
        self.head.save_pretrained(directory, label_names)


class GrowingLinear(nn.Module):
    """A linear layer to which outputs are added; each addition is a block of parameters of its own.

    Blocks rather than one matrix that is copied: what stood before keeps its tensors, and so its bits and its place in
    any optimizer.

    Args:
        dim: input width.

    Shapes:
        input ``(batch, dim)``; output ``(batch, sizes added so far)``.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return sum(len(bias) for bias in self.biases)

    @property
    def weight(self) -> Tensor:
        """All blocks as one matrix, ``(outputs, dim)``."""
        return torch.cat(list(self.weights))

    @property
    def bias(self) -> Tensor:
        """All blocks as one vector, ``(outputs,)``."""
        return torch.cat(list(self.biases))

    def grow(self, size: int, generator: torch.Generator | None = None, std: float = 0.02) -> None:
        """Add ``size`` outputs: weights normal with deviation ``std``, cut at two deviations; biases zero."""
        if size < 1:
            raise ValueError(f"a linear head grows by at least one output; got {size}.")
        weight = torch.empty(size, self.dim)
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
        self.weights.append(nn.Parameter(weight))
        self.biases.append(nn.Parameter(torch.zeros(size)))

    def forward(self, features: Tensor) -> Tensor:
        """Logits of all outputs."""
        if not len(self.weights):
            raise RuntimeError("the head has no output yet; call grow first.")
        return nn.functional.linear(features, self.weight, self.bias)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Grow to the blocks of a ``state_dict`` and load it; the head must be fresh."""
        for block in range(len(state) // 2):
            self.grow(len(state[f"biases.{block}"]))
        self.load_state_dict(dict(state))
