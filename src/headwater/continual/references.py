"""What every continual method is held against, beside the nearest class mean: forgetting in full, and the ceiling.

    sequential              a softmax head trained by SGD on each task in turn, on frozen features
    sequential_finetuning   head and encoder trained on each task in turn, both at one learning rate
    joint                   logistic regression on all data so far, kept and fitted anew: what no memory limit would
                            allow

The softmax of the first two is over all classes seen ("global") or over the current task's only ("local", as in Zhang
et al., "SLCA: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained Model",
arXiv:2303.05118); the two differ so much that a comparison needs both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from headwater.continual.base import Batch, ContinualRecipe, StreamInfo
from headwater.continual.finetuning import FinetuningLearner, FinetuningRecipe, Softmax
from headwater.continual.heads import GrowingLinear
from headwater.continual.streams import StreamError, TaskData
from headwater.core.cache import atomic_path, atomic_write_text
from headwater.core.order import permutation
from headwater.core.rng import derive_seed, torch_generator

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["Joint", "JointLearner", "Sequential", "SequentialFinetuning", "SequentialLearner"]


class SequentialLearner:
    """A linear softmax head on features, trained by SGD on each task in turn.

    Args:
        recipe: its fields are the settings.
        dim: width of the features.
    """

    def __init__(self, recipe: Sequential, dim: int) -> None:
        self.recipe = recipe
        self.head = GrowingLinear(dim)

    def observe(self, task: TaskData, run: Run) -> None:
        """Add outputs for the new classes and train."""
        recipe, known = self.recipe, self.head.out_features
        arrived = max(task.classes) + 1 - known
        if arrived > 0:
            self.head.grow(arrived, torch_generator(recipe.seed, "head", task.index))
        inputs = torch.from_numpy(np.asarray(task.train.inputs, dtype=np.float32))
        labels = torch.from_numpy(task.train.labels)
        allowed = torch.zeros(self.head.out_features, dtype=torch.bool)
        allowed[list(task.classes) if recipe.softmax == "local" else slice(None)] = True
        self._freeze_others(allowed)
        optimizer = torch.optim.SGD(
            [p for p in self.head.parameters() if p.requires_grad],
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        order_seed = derive_seed(recipe.seed, "sequential", task.index)
        for epoch in range(recipe.epochs):
            shuffled = permutation(order_seed, epoch, len(labels))
            for begin in range(0, len(shuffled), recipe.train_batch_size):
                rows = torch.from_numpy(shuffled[begin : begin + recipe.train_batch_size])
                # Outputs that do not compete get -inf: softmax weight 0 and gradient 0.
                logits = self.head(inputs[rows]).masked_fill(~allowed, float("-inf"))
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(logits, labels[rows])
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                optimizer.step()

    def _freeze_others(self, allowed: Tensor) -> None:
        # Weight decay would move a block whose gradient is zero.
        begin = 0
        for weight, bias in zip(self.head.weights, self.head.biases, strict=True):
            competes = bool(allowed[begin : begin + len(bias)].any())
            weight.requires_grad_(competes)
            bias.requires_grad_(competes)
            begin += len(bias)

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """Logits, ``(batch, n_seen)``."""
        logits: Tensor = self.head(torch.from_numpy(np.asarray(batch.inputs, dtype=np.float32)))
        return logits

    def state(self) -> dict[str, Tensor]:
        """The head's blocks."""
        return {name: tensor.detach() for name, tensor in self.head.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the head."""
        self.head.restore(state)

    def save(self, directory: Path, label_names: Sequence[str]) -> None:
        """Write the head as one linear layer."""
        _save_linear(directory, self.head.weight.detach(), self.head.bias.detach(), label_names)


class Sequential(ContinualRecipe):
    """Reference: a softmax head trained on each task in turn, with nothing against forgetting."""

    id: ClassVar[str] = "sequential"

    softmax: Softmax = Field(
        default="global", description="classes that compete in the loss: all seen so far, or the current task's only"
    )
    epochs: int = Field(default=10, ge=0, description="passes over each task's training data")
    train_batch_size: int = Field(default=32, gt=0, description="samples per step")
    lr: float = Field(
        default=1.0, gt=0, description="learning rate of SGD; tune it, unit-length features want a large one"
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of SGD")
    weight_decay: float = Field(default=0.0, ge=0, description="L2 penalty of SGD")

    def learner(self, info: StreamInfo) -> SequentialLearner:
        """A head without outputs."""
        return SequentialLearner(self, _width(info))


class SequentialFinetuning(FinetuningRecipe):
    """Reference: the whole encoder and a softmax head trained on each task in turn, with nothing against forgetting."""

    id: ClassVar[str] = "sequential_finetuning"

    softmax: Softmax = Field(
        default="local", description="classes that compete in the loss: all seen so far, or the current task's only"
    )

    def learner(self, info: StreamInfo) -> FinetuningLearner:
        """The pretrained encoder, a head without outputs."""
        return self.finetuning(info, backbone_scale=1.0, softmax=self.softmax)


class JointLearner:
    """Multinomial logistic regression, fitted anew on all samples seen so far after each task; keeps them all.

    Args:
        C: inverse strength of the L2 penalty.
        max_iterations: of L-BFGS.
    """

    def __init__(self, C: float = 1.0, max_iterations: int = 1000) -> None:
        self.estimator = LogisticRegression(C=C, max_iter=max_iterations)
        self._inputs: list[NDArray[Any]] = []  # Any: float features
        self._labels: list[NDArray[np.int64]] = []

    def observe(self, task: TaskData, run: Run) -> None:
        """Keep the samples and fit on everything kept."""
        self._inputs.append(np.asarray(task.train.inputs, dtype=np.float32))
        self._labels.append(task.train.labels)
        self._fit()

    def _fit(self) -> None:
        labels = np.concatenate(self._labels)
        if labels.min() == labels.max():
            raise StreamError(
                "logistic regression needs two classes; give the first task more than one class (init, increment)."
            )
        self.estimator.fit(np.concatenate(self._inputs), labels)

    def scores(self, batch: Batch) -> Tensor:
        """Logits, ``(batch, n_seen)``."""
        values = self.estimator.decision_function(np.asarray(batch.inputs, dtype=np.float32))
        return torch.from_numpy(np.stack((np.zeros_like(values), values), 1) if values.ndim == 1 else values)

    def state(self) -> dict[str, Tensor]:
        """All samples seen: that is this reference's memory."""
        return {
            "inputs": torch.from_numpy(np.concatenate(self._inputs)),
            "labels": torch.from_numpy(np.concatenate(self._labels)),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up the samples and fit on them."""
        self._inputs, self._labels = [state["inputs"].numpy()], [state["labels"].numpy()]
        self._fit()

    def save(self, directory: Path, label_names: Sequence[str]) -> None:
        """Write the coefficients as one linear layer."""
        weight, bias = self.estimator.coef_, self.estimator.intercept_
        if len(weight) == 1:  # two classes: one row that speaks for the second
            weight, bias = np.concatenate((0 * weight, weight)), np.concatenate((0 * bias, bias))
        _save_linear(directory, torch.from_numpy(weight).float(), torch.from_numpy(bias).float(), label_names)


class Joint(ContinualRecipe):
    """Reference: the ceiling. Logistic regression on the data of all tasks so far, which it keeps."""

    id: ClassVar[str] = "joint"

    C: float = Field(default=1.0, gt=0, description="inverse strength of the L2 penalty; tune it")
    max_iterations: int = Field(default=1000, gt=0, description="iterations of L-BFGS")

    def learner(self, info: StreamInfo) -> JointLearner:
        """Nothing kept, nothing fitted."""
        _width(info)
        return JointLearner(self.C, self.max_iterations)


def _width(info: StreamInfo) -> int:
    if len(info.input_shape) != 1:
        raise StreamError(f"a linear head needs feature vectors; the inputs have shape {info.input_shape}.")
    return info.input_shape[0]


def _save_linear(directory: Path, weight: Tensor, bias: Tensor, label_names: Sequence[str]) -> None:
    classes, width = weight.shape
    with atomic_path(directory / "head.safetensors") as path:
        save_file({"weight": weight.contiguous(), "bias": bias.contiguous()}, path)
    names = "\n".join(f"{i}. {name}" for i, name in enumerate(label_names))
    atomic_write_text(
        directory / "README.md",
        "# A linear head on frozen features\n\n"
        f"`head.safetensors` holds `weight` ({classes}, {width}) and `bias` ({classes},). The logits of features `x` "
        f"are `x @ weight.T + bias`; column i stands for class i:\n\n{names}\n",
    )
