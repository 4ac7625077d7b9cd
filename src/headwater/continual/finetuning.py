"""Fine-tuning a whole encoder on one task after another, with a head that grows; the encoder may learn more slowly."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from accelerate import PartialState
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from headwater.continual.base import Batch, ContinualRecipe, StreamInfo
from headwater.continual.cards import save_classifier
from headwater.continual.heads import GrowingLinear
from headwater.continual.streams import StreamError, TaskData
from headwater.continual.training import (
    TaskBatches,
    TaskCrossEntropy,
    Trainee,
    batch_norms,
    features_of,
)
from headwater.core.budget import Budget
from headwater.core.fit import FitSettings, Phase, fit
from headwater.core.optim import AnyOptim, OptimChoice, SgdSpec
from headwater.core.order import VirtualIndex
from headwater.core.rng import derive_seed, torch_generator
from headwater.modalities.features import ArrayEncoder, Encoder

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["FinetuningLearner", "FinetuningRecipe", "Softmax"]

Softmax = Literal["global", "local"]


class FinetuningLearner:
    """An encoder and a linear head, trained on each task in turn; outputs of earlier tasks stay as they are.

    Args:
        encoder: from raw inputs to features; trained in place.
        backbone_scale: the encoder's learning rate, as a multiple of the head's; 0 freezes it.
        softmax: classes that compete in the loss: the current task's only, or all seen so far, whose outputs then go on
            being trained.
        epochs: passes over each task.
        train_batch_size: samples per step.
        optim: how weights are moved; its ``lr`` is the head's.
        batch_size: inputs per forward pass when nothing is trained.
        fit: how the training loop runs.
        seed: of the head's weights, and of order and dropout.
    """

    def __init__(
        self,
        encoder: Encoder | ArrayEncoder,
        *,
        backbone_scale: float = 1.0,
        softmax: Softmax = "local",
        epochs: int = 20,
        train_batch_size: int = 128,
        optim: AnyOptim | None = None,
        batch_size: int = 256,
        fit: FitSettings | None = None,
        seed: int = 0,
    ) -> None:
        self.encoder = encoder.requires_grad_(backbone_scale > 0)
        self.backbone_scale, self.softmax = backbone_scale, softmax
        self.epochs, self.train_batch_size, self.optim = epochs, train_batch_size, optim or SgdSpec()
        self.batch_size, self.fit, self.seed = batch_size, fit or FitSettings(), seed
        self.head: GrowingLinear | None = None

    def observe(self, task: TaskData, run: Run) -> None:
        """Add outputs for the new classes; train."""
        if norms := batch_norms(self.encoder):
            run.warn(
                "batch_norm",
                f"{len(norms)} batch normalisations (first: {norms[0]}) keep their running statistics while the "
                "encoder is trained; statistics of one task would not suit the others.",
            )
        head = self._grown(task)
        competing = self._competing(task, head)
        trained = [p for p in (*self.encoder.parameters(), *head.parameters()) if p.requires_grad]
        run.cost["trainable"] = sum(parameter.numel() for parameter in trained)
        _drop_checkpoints(run, task.index - 1)
        if competing.sum() < 2:
            run.warn(
                "one_class",
                f"only one class competes in the loss on task {task.index}, which leaves cross-entropy nothing to "
                "learn; the task is passed over. Give each task two or more (`increment`).",
            )
        elif self.epochs:
            self._train(task, head, competing, run)

    def _grown(self, task: TaskData) -> GrowingLinear:
        if self.head is None:
            self.head = GrowingLinear(self.features(task.train.inputs[:1]).shape[1])
        arrived = max(task.classes) + 1 - self.head.out_features
        if arrived > 0:
            self.head.grow(arrived, torch_generator(self.seed, "head", task.index))
        return self.head.to(next(self.encoder.parameters()).device)

    def _competing(self, task: TaskData, head: GrowingLinear) -> Tensor:
        competing = torch.zeros(head.out_features, dtype=torch.bool)
        competing[list(task.classes) if self.softmax == "local" else slice(None)] = True
        begin = 0
        for weight, bias in zip(head.weights, head.biases, strict=True):
            # Frozen and not only left without gradient: weight decay would move them.
            moves = bool(competing[begin : begin + len(bias)].any())
            weight.requires_grad_(moves)
            bias.requires_grad_(moves)
            begin += len(bias)
        return competing

    def _train(self, task: TaskData, head: GrowingLinear, competing: Tensor, run: Run) -> None:
        samples = task.train
        order = VirtualIndex(len(samples), derive_seed(self.seed, "task", task.index))
        phase = Phase(
            _phase_name(task.index),
            Trainee(self.encoder),
            TaskBatches(samples, self.encoder, order, self.train_batch_size),
            TaskCrossEntropy(head, competing),
            model_rate=self.backbone_scale or 1.0,  # a frozen encoder has no rate
        )
        fit(
            phase,
            budget=Budget(tokens=self.epochs * len(samples)),  # a sample counts as one token: see TaskBatches
            optim=self.optim,
            seed=derive_seed(self.seed, "forward", task.index),
            directory=run.directory,
            settings=self.fit,
            on_metrics=partial(run.log, phase=phase.name),
        )

    def features(self, inputs: NDArray[Any]) -> Tensor:  # Any: raw inputs
        """Features of raw inputs by the encoder as it is now, ``(n, D)``."""
        return features_of(self.encoder, inputs, self.batch_size)

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """Logits, ``(batch, n_seen)``."""
        assert self.head is not None, "scores are asked for after a task"
        logits: Tensor = self.head(self.features(batch.inputs))
        return logits

    def state(self) -> dict[str, Tensor]:
        """The head's blocks, and the encoder's weights where they are trained."""
        assert self.head is not None, "there is a state after a task"
        encoder = {f"encoder/{name}": p.detach() for name, p in self._trained().items()}
        return {**encoder, **{f"head/{name}": tensor.detach() for name, tensor in self.head.state_dict().items()}}

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.encoder.model.named_parameters() if p.requires_grad}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what ``state`` gave.

        Raises:
            StreamError: the state is of another encoder.
        """
        given, ours = part_of(state, "encoder"), self._trained()
        if {n: t.shape for n, t in given.items()} != {n: p.shape for n, p in ours.items()}:
            raise StreamError(
                f"the state holds {len(given)} trained tensors that do not fit the {len(ours)} of this encoder."
            )
        with torch.no_grad():
            for name, parameter in ours.items():
                parameter.copy_(given[name])
        blocks = part_of(state, "head")
        self.head = GrowingLinear(blocks["weights.0"].shape[1])
        self.head.restore(blocks)
        # Training may have moved them to a device; a run that is continued after it has moved none.
        device = PartialState().device
        self.encoder.to(device)
        self.head.to(device)

    def save(self, directory: Path, label_names: Sequence[str]) -> None:
        """Write encoder, head, and a ``README.md`` whose code predicts without Headwater."""
        assert self.head is not None, "there is something to save after a task"
        save_classifier(directory, self.encoder, self.head.weight, self.head.bias, label_names)


def part_of(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``name/``, without it."""
    return {key.removeprefix(f"{name}/"): tensor for key, tensor in state.items() if key.startswith(f"{name}/")}


def _phase_name(task: int) -> str:
    return f"task_{task}"


def _drop_checkpoints(run: Run, task: int) -> None:
    """Those of a task that is over: each would hold the whole model, and what is needed of it stands in the state."""
    stale = run.checkpoints / _phase_name(task)
    if run.is_main_process and stale.exists():
        shutil.rmtree(stale)


class FinetuningRecipe(ContinualRecipe):
    """A continual recipe that trains the encoder itself; a method adds its fields and ``learner``."""

    reads: ClassVar[Literal["features", "inputs"]] = "inputs"

    epochs: int = Field(default=20, ge=0, description="passes over each task's training data")
    train_batch_size: int = Field(default=128, gt=0, description="samples per step")
    optim: OptimChoice = Field(
        default=SgdSpec(lr=0.01, weight_decay=5e-4),
        description="how weights are moved: {lr: ..} for SGD with momentum .9 and cosine decay, or {kind: adamw, ..}",
    )
    fit: FitSettings = Field(
        default=FitSettings(), description="how the training loop runs: precision, micro-batches, checkpoints"
    )

    def finetuning(self, info: StreamInfo, *, backbone_scale: float, softmax: Softmax) -> FinetuningLearner:
        """What trains, with the settings of this recipe."""
        return FinetuningLearner(
            self.encoder(info),
            backbone_scale=backbone_scale,
            softmax=softmax,
            epochs=self.epochs,
            train_batch_size=self.train_batch_size,
            optim=self.optim,
            batch_size=self.batch_size,
            fit=self.fit,
            seed=self.seed,
        )
