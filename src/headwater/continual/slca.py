"""SLCA: the encoder learns a hundred times more slowly than the head, and the head is re-balanced after each task.

    slow learner     encoder: lr / 100,  head: lr        cross-entropy over the current task's classes only
    after the task   mu_c, S_c of the features of each new class c
    alignment        a copy of the head, trained on samples of all classes (see ``alignment``), answers from now on;
                     the next task goes on with the head as it was before

The rates keep the encoder near what was pretrained, so that what was learned of features lasts. Heads that were trained
apart are not comparable; samples of the Gaussians make them so, without any stored data.

Source: Zhang et al., "SLCA: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained Model",
arXiv:2303.05118.
Differs: the learning rate falls along a cosine, not to a tenth near the end; weight decay spares biases and norms; no
augmentation; a class with one sample takes the mean covariance of its task.
Needs: a pretrained encoder of texts or images, or any module over arrays; labelled inputs, two classes or more a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from headwater.continual.alignment import ClassGaussians, align_classifier
from headwater.continual.base import Batch, StreamInfo
from headwater.continual.cards import save_classifier
from headwater.continual.finetuning import FinetuningLearner, FinetuningRecipe, part_of
from headwater.continual.heads import GrowingLinear
from headwater.continual.streams import TaskData
from headwater.core.moments import ClassMoments
from headwater.core.recipe import Spec
from headwater.core.rng import derive_seed

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["SLCA", "Alignment", "SLCALearner"]


class Alignment(Spec):
    """How the head is re-balanced after each task but the first; the defaults are the authors'."""

    epochs: int = Field(default=5, ge=0, description="rounds over samples of all classes; 0 leaves alignment out")
    per_class: int = Field(default=256, gt=0, description="samples of each class in a round")
    lr: float = Field(default=0.01, gt=0, description="learning rate of SGD with momentum .9, falling by cosine")
    temperature: float | None = Field(
        default=0.1, gt=0, description="of logits over their mean length; null takes them as they are"
    )
    mean_decay: bool = Field(default=True, description="sample older classes up to a tenth nearer to the origin")
    rank: int | None = Field(
        default=None,
        ge=0,
        description="directions of each covariance that are kept beside the variances; null keeps it whole: "
        "4 D^2 bytes a class, 2.4 MB at width 768",
    )


class SLCALearner:
    """A learner whose head is aligned after each task.

    Args:
        slow: trains on the task.
        alignment: how the head is aligned afterwards.
        seed: of samples.

    Attributes:
        gaussians: of the classes so far.
        aligned: the head that answers; ``None`` while the slow learner's own does.
    """

    def __init__(self, slow: FinetuningLearner, alignment: Alignment | None = None, seed: int = 0) -> None:
        self.slow, self.alignment, self.seed = slow, alignment or Alignment(), seed
        self.gaussians = ClassGaussians(rank=self.alignment.rank)
        self.task_of_class: dict[int, int] = {}
        self.aligned: GrowingLinear | None = None

    def observe(self, task: TaskData, run: Run) -> None:
        """Learn slowly, take the moments of the new classes, align."""
        self.slow.observe(task, run)
        self.aligned = None
        if not self.alignment.epochs:
            return
        features = self.slow.features(task.train.inputs).cpu()  # where there is float64 on every machine
        moments = ClassMoments(features.shape[1], scatter="diag" if self.alignment.rank == 0 else "per_class")
        self.gaussians.add(moments.update(features, torch.from_numpy(task.train.labels)))
        self.task_of_class |= dict.fromkeys(task.classes, task.index)
        if len(set(self.task_of_class.values())) > 1:
            self.aligned = self._align(task.index)

    def _align(self, task: int) -> GrowingLinear:
        head, how = self.slow.head, self.alignment
        assert head is not None, "it has seen a task"
        return align_classifier(
            head,
            self.gaussians.to(next(head.parameters()).device),
            self._tasks(),
            epochs=how.epochs,
            per_class=how.per_class,
            temperature=how.temperature,
            mean_decay=how.mean_decay,
            lr=how.lr,
            seed=derive_seed(self.seed, "task", task),
        )

    def _tasks(self) -> Tensor:
        return torch.tensor([self.task_of_class[label] for label in range(len(self.task_of_class))])

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """Logits, ``(batch, n_seen)``."""
        if self.aligned is None:
            return self.slow.scores(batch)
        logits: Tensor = self.aligned(self.slow.features(batch.inputs))
        return logits

    def state(self) -> dict[str, Tensor]:
        """What the slow learner holds, the Gaussians, and the aligned head."""
        state = {f"slow/{name}": tensor for name, tensor in self.slow.state().items()}
        if self.alignment.epochs:
            state |= {f"gaussians/{name}": tensor for name, tensor in self.gaussians.state().items()}
            state["tasks"] = self._tasks()
        if self.aligned is not None:
            state |= {f"aligned/{name}": tensor for name, tensor in self.aligned.state_dict().items()}
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what ``state`` gave; errors as ``FinetuningLearner``."""
        self.slow.load_state(part_of(state, "slow"))
        if gaussians := part_of(state, "gaussians"):
            self.gaussians.load_state(gaussians)
            self.task_of_class = dict(enumerate(state["tasks"].tolist()))
        if aligned := part_of(state, "aligned"):
            assert self.slow.head is not None, "it has just been restored"
            self.aligned = GrowingLinear(self.slow.head.dim)
            self.aligned.restore(aligned)
            self.aligned.requires_grad_(False).to(next(self.slow.head.parameters()).device)

    def save(self, directory: Path, label_names: Sequence[str]) -> None:
        """Write encoder, the head that answers, and a ``README.md`` whose code predicts without Headwater."""
        if self.aligned is None:
            self.slow.save(directory, label_names)
        else:
            save_classifier(directory, self.slow.encoder, self.aligned.weight, self.aligned.bias, label_names)


class SLCA(FinetuningRecipe):
    """Recipe: fine-tune slowly, task after task, and align the head on samples of class Gaussians after each."""

    id: ClassVar[str] = "slca"

    backbone_scale: float = Field(
        default=0.01, ge=0, le=1, description="the encoder's learning rate over the head's; 0 freezes the encoder"
    )
    alignment: Alignment = Field(default=Alignment(), description="how the head is re-balanced after each task")

    def learner(self, info: StreamInfo) -> SLCALearner:
        """The pretrained encoder, no class seen yet."""
        slow = self.finetuning(info, backbone_scale=self.backbone_scale, softmax="local")
        return SLCALearner(slow, self.alignment, self.seed)
