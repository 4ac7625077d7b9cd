"""Self-distillation: further pretraining from the start once more, close to what a first further pretraining learned.

    round 0     phi_0 = theta, trained on L_task                                                     the teacher
    round t     phi_t = theta again, trained on L_task(phi) + weight * (1/B) sum_x ||h_phi(x) - h_phi_{t-1}(x)||^2

x is the unmasked input and h(x) the encoder's output after its last norm at one position, CLS; the square is summed
over the hidden dimension. Where the target set is small and long further pretraining overfits, the second student keeps
what the first one learned with less of a move away from theta: in a linearised model its distance from theta, and with
it the bound on generalisation, shrinks with every round. `distance.json` holds that distance.

Source: Lee et al., "Self-Distillation for Further Pre-training of Transformers", arXiv:2210.02871, algorithm 1.
Differs: blocks of text are packed, so position 0 of a masked model's block is whichever token stands there, and the
last token stands for the CLS that a causal model has not. Every round reads the same batches. In the recipe the teacher
runs in every step: a step of packed, replayed blocks seldom sees a row twice; `cache_teacher` is for loops over a fixed
set of inputs. One backward pass over the summed loss where the released code makes two, with the same gradient. Images
by the parts, in a loop of one's own; the recipe reads text.
Needs: a pretrained model; a small unlabelled set of the domain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from headwater.core.fit import Phase, Trained
from headwater.core.objective import Loss, Objective, OverBatch, StepAware
from headwater.domain.adaptation import Adaptation
from headwater.domain.base import Adapted, ContinuedPretraining
from headwater.domain.references import plain_phase

__all__ = [
    "ImageReconstruction",
    "SelfDistillation",
    "SelfDistilled",
    "cache_teacher",
    "distance_from",
    "encoder_features",
    "labels_per_row",
    "squared_distance",
    "unmasked",
]

Tokens = Literal["cls", "last", "all"]
Batch = Mapping[str, Tensor]
Features = Callable[[nn.Module, Batch, Tokens], Tensor]

IGNORED = -100  # the label that Hugging Face models leave out
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "pixel_values")


def squared_distance(student: Tensor, teacher: Tensor, real: Tensor | None = None) -> Tensor:
    """||student - teacher||^2 of each row, summed over the hidden dimension, in float32.

    Args:
        student: ``(batch, hidden)``; or ``(batch, time, hidden)``, whose positions are averaged.
        teacher: same shape; no gradient flows into it.
        real: ``(batch, time)``, 1 at positions that count and 0 at padding; all count by default.

    Returns:
        ``(batch,)``; 0 for a row without a real position.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have features of one shape; got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}. Take a teacher of the student's hidden size."
        )
    apart = (student.float() - teacher.detach().float()).square().sum(-1)
    if apart.ndim == 1:
        return apart
    counted = torch.ones_like(apart) if real is None else real.to(apart)
    return (apart * counted).sum(1) / counted.sum(1).clamp(min=1)


def unmasked(batch: Batch) -> dict[str, Tensor]:
    """The batch as it was before tokens were masked for a masked language model.

    Exact, because every target keeps its token as its label, the ones that were replaced or left included. A causal
    batch and one of images come back as they are.

    Args:
        batch: ``input_ids`` and ``labels`` ``(batch, time)``, -100 off target; or without labels.
    """
    if "input_ids" not in batch or "labels" not in batch:
        return dict(batch)
    ids, labels = batch["input_ids"], batch["labels"]
    return {**batch, "input_ids": torch.where(labels == IGNORED, ids, labels)}


def labels_per_row(batch: Batch) -> Tensor:
    """How many targets each row of a masked batch has, ``(batch,)``."""
    return (batch["labels"] != IGNORED).sum(1)


def encoder_features(model: nn.Module, batch: Batch, tokens: Tokens = "cls") -> Tensor:
    """What a model makes of its unmasked input, after the last norm and without its head; differentiable.

    Args:
        model: any Hugging Face model, with or without a head or PEFT adapters. A ViT-MAE sees every patch, in order,
            whatever its mask ratio.
        batch: unmasked; ``input_ids`` ``(batch, time)`` with ``attention_mask`` where there is padding, or
            ``pixel_values`` ``(batch, channels, height, width)``.
        tokens: ``cls``: position 0. ``last``: the last real token, of causal models. ``all``: every position.

    Returns:
        ``(batch, hidden)``; with ``all`` ``(batch, time, hidden)``.

    Raises:
        ValueError: ``cls`` of a causal model, whose first position has seen nothing but itself.
    """
    inner: Any = getattr(model, "module", model)  # Any: the signature differs from model to model; module: under DDP
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # PEFT
    if tokens == "cls" and _is_causal(inner.config):
        raise ValueError(
            f"tokens 'cls' is position 0, which in a causal model ({inner.config.model_type}) has seen nothing but "
            "itself; use tokens 'last'."
        )
    encoder, inputs = inner.base_model, {name: batch[name] for name in _INPUTS if name in batch}
    if encoder.config.model_type == "vit_mae":
        with _nothing_masked(encoder.config):
            # Patches are shuffled by the order of their noise: rising noise leaves them where they are.
            patches = encoder.embeddings.patch_embeddings.num_patches
            noise = torch.arange(patches, device=batch["pixel_values"].device).expand(len(batch["pixel_values"]), -1)
            hidden: Tensor = encoder(**inputs, noise=noise).last_hidden_state
    else:
        hidden = encoder(**inputs).last_hidden_state
    if tokens == "all":
        return hidden
    return hidden[:, 0] if tokens == "cls" else hidden[_rows(hidden), _last_real(hidden, batch.get("attention_mask"))]


def _is_causal(config: Any) -> bool:  # Any: a transformers config
    kind = type(config)
    only = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    return only or bool(getattr(config, "is_decoder", False))


@contextmanager
def _nothing_masked(config: Any) -> Iterator[None]:  # Any: a transformers config
    # The ratio is read in the forward pass and has no argument there.
    ratio, config.mask_ratio = config.mask_ratio, 0.0
    try:
        yield
    finally:
        config.mask_ratio = ratio


def _rows(hidden: Tensor) -> Tensor:
    return torch.arange(len(hidden), device=hidden.device)


def _last_real(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return torch.full((len(hidden),), hidden.shape[1] - 1, device=hidden.device)
    place = torch.arange(hidden.shape[1], device=hidden.device)
    return (place * attention_mask.to(hidden.device)).argmax(1)


@torch.no_grad()
def cache_teacher(
    teacher: nn.Module,
    inputs: Batch,
    tokens: Tokens = "cls",
    *,
    features: Features = encoder_features,
    batch_size: int = 256,
) -> Tensor:
    """The teacher's features of a fixed set of inputs, once, to be handed over as the column ``teacher_features``.

    Right only where an input is the same whenever it comes: not under augmentation, whose views differ.

    Args:
        teacher: put into ``eval()`` meanwhile.
        inputs: unmasked columns of the whole set, each ``(rows, ...)``, on the teacher's device.
        tokens: as the student's.
        features: as the student's.
        batch_size: rows per forward pass.

    Returns:
        ``(rows, hidden)`` or ``(rows, time, hidden)``, on the CPU.
    """
    training = teacher.training
    teacher.eval()
    rows = len(next(iter(inputs.values())))
    found = [
        features(teacher, {name: column[i : i + batch_size] for name, column in inputs.items()}, tokens).cpu()
        for i in range(0, rows, batch_size)
    ]
    teacher.train(training)
    return torch.cat(found)


def distance_from(start: nn.Module, model: nn.Module) -> float:
    """Euclidean distance ||phi - theta|| over all weights, in float64.

    Args:
        start: theta; a second copy of what the model started from, its adapters included.
        model: phi.

    Raises:
        ValueError: a weight that ``start`` does not have in that shape.
    """
    before, total = dict(start.named_parameters()), 0.0
    for name, weight in model.named_parameters():
        if name not in before or before[name].shape != weight.shape:
            raise ValueError(
                f"weight {name!r} of shape {tuple(weight.shape)} is not in the start; give a copy of what the model "
                "started from."
            )
        moved = weight.detach().double().cpu() - before[name].detach().double().cpu()
        total += float(moved.square().sum())
    return math.sqrt(total)


class ImageReconstruction:
    """A ViT-MAE's own loss as an ``Objective``: squared error of masked patches, masks drawn anew in every step."""

    unit = "mse/patch"

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Batch: ``pixel_values`` ``(batch, channels, height, width)``."""
        output = model(pixel_values=batch["pixel_values"])
        count = output.mask.sum()
        return Loss(output.loss * count, count)


class SelfDistillation(nn.Module):
    """Any objective, with the distance of the student's features from a frozen teacher's added: an ``Objective``.

        total / count = task + weight * (mean over the rows of the batch of ||h_student - h_teacher||^2)

    That holds for the whole batch as well where it is cut into micro-batches or spread over processes. The teacher is
    frozen in place, in ``eval()``, follows the student to its device, and is neither among the parameters nor saved.

    Args:
        teacher: of the student's hidden size. ``None`` where every batch brings ``teacher_features``, ``(batch, ...)``
            as ``cache_teacher`` gives them; a batch that does is not read by the teacher.
        task: what is minimised beside it.
        weight: of the distance, >= 0; at 0 this is ``task``.
        tokens: which positions are compared, see ``encoder_features``; of ``all`` the mean over those that
            ``attention_mask`` lets through.
        features: of a model and an unmasked batch.
        targets: how many targets of ``task`` each row of a batch has, ``(batch,)``, where rows differ in it:
            ``labels_per_row`` for a masked language model. By default rows are taken to have the same number.

    Raises:
        ValueError: a negative ``weight``; when called, features of different shapes or no teacher to ask.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        task: Objective,
        *,
        weight: float = 1.0,
        tokens: Tokens = "cls",
        features: Features = encoder_features,
        targets: Callable[[Batch], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"weight must be >= 0; got {weight}. Use 0 to train on the task alone.")
        # In a tuple, so that it is no submodule: not saved, not trained, not put into train() with this one.
        self._teacher = () if teacher is None else (teacher.requires_grad_(False).eval(),)
        self.task, self.weight, self.tokens = task, weight, tokens
        self.unit = f"{task.unit} + distance"
        self._features, self._targets = features, targets
        self._targets_per_row: Tensor | None = None

    def begin_step(self, progress: float, over_batch: OverBatch | None) -> None:
        """Count the targets of the whole batch, where a call sees a part of it; the model is not run for that."""
        if isinstance(self.task, StepAware):
            self.task.begin_step(progress, over_batch)
        targets = self._targets
        self._targets_per_row = None
        if targets is not None and over_batch is not None:
            self._targets_per_row = over_batch(lambda _, part: targets(part)).float().mean()

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Batch: what the task reads, masked or not, and ``teacher_features`` where they are cached."""
        loss = self.task(model, batch)
        if self.weight == 0:
            return loss
        whole = unmasked(batch)
        student = self._features(model, whole, self.tokens)
        apart = squared_distance(student, self._of_teacher(whole, student.device), whole.get("attention_mask"))
        # A sum over targets and one over rows share one count: the second is brought to the scale of the first.
        per_row = loss.count / max(1, len(apart)) if self._targets_per_row is None else self._targets_per_row
        total = loss.total + self.weight * per_row * apart.sum()
        return Loss(total, loss.count, {**loss.metrics, "distance": apart.detach().mean()})

    @torch.no_grad()
    def _of_teacher(self, batch: Batch, device: torch.device) -> Tensor:
        if "teacher_features" in batch:
            return batch["teacher_features"]
        if not self._teacher:
            raise ValueError("there is no teacher and the batch has no teacher_features; give one of them.")
        (teacher,) = self._teacher
        if next(teacher.parameters()).device != device:
            teacher.to(device)
        return self._features(teacher, batch, self.tokens)


class SelfDistilled(ContinuedPretraining):
    """Plain continued pretraining makes a teacher; the start, trained again, keeps its features near the teacher's."""

    id: ClassVar[str] = "self_distillation"

    weight: float = Field(default=1.0, ge=0, description="of the distance from the teacher's features")  # released code
    tokens: Literal["cls", "all"] = Field(
        default="cls",
        description="which features are compared: at CLS (position 0 of a masked model's block, the last token of a "
        "causal one's), or the mean over all positions",
    )
    rounds: int = Field(
        default=1, ge=0, description="how often the start is trained again, each time by the model before; 0 is plain"
    )  # section 4: more than one brought nothing
    teacher_share: float = Field(
        default=0.5, gt=0, lt=1, description="of the budget, for the first teacher; the rounds share the rest evenly"
    )  # published: as many steps for the teacher as for the student

    def phases(self, ctx: Adaptation) -> Generator[Phase, Trained, Adapted]:
        """One phase for every model: teachers, then the one that is kept."""
        distances: dict[str, float] = {}
        teacher: nn.Module | None = None
        for number in range(self.rounds + 1):
            name = "train" if number == self.rounds else f"teacher-{number}"
            phase = plain_phase(ctx)
            objective = phase.objective if teacher is None else self._objective(ctx, teacher, phase.objective)
            trained = yield replace(phase, name=name, share=self._share(number), objective=objective)
            teacher = trained.model
            distances[name] = distance_from(ctx.start(), teacher)
        ctx.run.write_json("distance.json", distances)
        notes = () if self.tokens == "all" else (("features", _WHERE[ctx.head]),)
        return Adapted(trained.model, files=("distance.json",), notes=notes)

    def _share(self, number: int) -> float:
        if self.rounds == 0:
            return 1.0
        return self.teacher_share if number == 0 else (1 - self.teacher_share) / self.rounds

    def _objective(self, ctx: Adaptation, teacher: nn.Module, task: Objective) -> Objective:
        masked = ctx.head == "masked"
        return SelfDistillation(
            teacher,
            task,
            weight=self.weight,
            tokens="last" if self.tokens == "cls" and not masked else self.tokens,
            targets=labels_per_row if masked else None,
        )


_WHERE = {
    "causal": "compared at the last token of each block, because a causal model has no CLS",
    "masked": "compared at position 0 of each packed block",
}
