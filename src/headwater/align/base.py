"""Alignment: a pretrained model and examples whose answers are checked -> a model that answers better.

What all methods of the stage share is here: prompts with checked answers, split by content so that no prompt stands on
two sides, a sealed test set, training, saving. ``Alignment`` holds the fields; ``ClassAlignment`` is the family of
methods whose models choose among classes, with the figures that go with it and one hook, ``align``.

Weak supervision needs two halves of the training examples: one whose true labels the weak model learns from, and one
whose true labels nobody sees but the ceiling, which is trained to say how high the student could have come. Every label
that a method looked at is in ``cost/labels``; those behind the ceiling and the validation figure stand apart.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from headwater.align.data import AlignData, content_key, read_data
from headwater.align.tasks import Aligned, ClassTask, Judged, Training
from headwater.core.family import Axis, Family
from headwater.core.fit import FitSettings
from headwater.core.lora import LoraSpec
from headwater.core.optim import OptimSpec
from headwater.core.phase import EvalAt
from headwater.core.recipe import DataRef, Metrics, ModelRef, Name, Recipe
from headwater.modalities.text.docs import split_sides

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["FAMILY", "AlignData", "Aligned", "Alignment", "ClassAlignment", "ClassTask", "Training", "read_data"]


class Alignment(Recipe):
    """Family of the stage ``align``: what all of its methods read and how they train.

    A narrower family says how models are measured, in ``run_on``, and what its methods fill in.
    """

    model: ModelRef = Field(description="the pretrained model that is aligned: Hub name, local directory or builtin")
    data: DataRef = Field(
        description="prompts and their checked answers (`input_field`, `label_field`); or headwater:verifiable/TASK"
    )
    test: DataRef | None = Field(default=None, description="prompts for the figures; by default a share of `data`")
    held_out: float = Field(default=0.2, gt=0, lt=0.5, description="share of `data` kept for the test, without `test`")
    validation: float = Field(default=0.1, gt=0, lt=0.5, description="share of `data` kept for choosing by")
    max_tokens: int = Field(default=256, gt=1, description="tokens of each prompt that are read")
    batch_size: int = Field(default=32, gt=0, description="examples per optimizer step")
    optim: OptimSpec = Field(
        default=OptimSpec(lr=1e-5, betas=(0.9, 0.999), weight_decay=0.0, warmup=0.0, final_lr=0.0),
        description="how weights are moved: AdamW, a schedule, clipping",
    )
    lora: LoraSpec | None = Field(default=None, description="train LoRA adapters instead of all weights")
    eval_at: EvalAt = Field(
        default=(0.0, 0.5, 1.0), description="fractions of each training at which validation examples are measured"
    )
    fit: FitSettings = Field(
        default=FitSettings(), description="how the loop runs: precision, micro-batches, checkpoints"
    )

    def run(self, run: Run) -> Metrics:
        """Read and split the data, and ``run_on`` them."""
        return self.run_on(read_data(self.data, self.test, held_out=self.held_out, validation=self.validation), run)

    @abstractmethod
    def run_on(self, data: AlignData, run: Run) -> Metrics:
        """Measure, align, measure again, save; for data of your own as well."""


class ClassAlignment(Alignment):
    """Family within ``align``: models that choose among classes, under weak supervision; one hook, ``align``."""

    weak_model: ModelRef = Field(description="the weak supervisor before it is fine-tuned; smaller or less trained")
    verbaliser: dict[Name, str] | None = Field(
        default=None,
        description="label -> text of one token that says it, for causal models; null gives each model a head",
    )
    unlabelled: float = Field(
        default=0.5, gt=0, lt=1, description="share of the training examples whose true labels are hidden"
    )
    epochs: float = Field(default=2.0, gt=0, description="passes over its examples in every training")  # paper: 2
    linear_probe_first: bool = Field(
        default=False, description="train a new head alone for the first tenth, before the whole model"
    )
    ceiling: bool = Field(
        default=True, description="train the strong model on the hidden labels as well; without it there is no PGR"
    )

    @model_validator(mode="after")
    def _heads_are_trained_whole(self) -> Self:
        if self.verbaliser is None and self.lora is not None:
            raise ValueError("lora would freeze a new classification head; give a verbaliser, or leave lora out")
        if self.verbaliser is not None and self.linear_probe_first:
            raise ValueError("linear_probe_first trains a new head, and a verbaliser has none; switch it off")
        return self

    @abstractmethod
    def align(self, task: ClassTask) -> Aligned:
        """Train models with ``task``; called once, and again when a run is resumed: a pure function of it."""

    def run_on(self, data: AlignData, run: Run) -> Metrics:
        """Cut the halves, align, measure every model on the test, save; for data of your own as well.

        Raises:
            TestLeak: the method reached for the test set.
            ValueError: see ``ClassTask``.
        """
        run.record_data("prompts", data.fingerprint)
        sides = split_sides(
            [content_key(item.prompt) for item in data.train],
            (1 - self.unlabelled, self.unlabelled, 0.0),
            f"halves {self.seed}",
        )
        halves = [[item for item, at in zip(data.train, sides, strict=True) if at == side] for side in (0, 1)]
        task = ClassTask(self, halves[0], halves[1], data.validation, run)
        judged = Judged(task, data.test)
        judged.start()
        aligned = self.align(task)
        for name, model in {**aligned.others, "model": aligned.model}.items():
            judged.add(name, model, aligned.files)
        labels, cost = task.labels_seen, task.training.meter.cost  # the ceiling measures; its price is not the method's
        if self.ceiling and "ceiling" not in judged.answers:
            judged.add("ceiling", task.ceiling(), ())
        metrics = judged.metrics()
        if task.weak_label_accuracy is not None:
            metrics["weak/label_accuracy"] = task.weak_label_accuracy
        metrics |= {
            "data/supervised": float(len(halves[0])),
            "data/unlabelled": float(len(halves[1])),
            "data/test": float(len(data.test)),
            "data/dropped_overlap": float(data.dropped),
            "cost/labels": float(labels),
            "cost/ceiling_labels": float(len(halves[1]) if "ceiling" in judged.answers else 0),
            "cost/validation_labels": float(len(data.validation)),
        }
        if task.training.trajectory:
            run.write_json("trajectory.json", {"x": "tokens", "series": task.training.trajectory})
        run.cost = {**cost.to_dict(), "labels": labels}
        return metrics


FAMILY = Family(
    stage="align",
    gain=Axis("test/accuracy", "Accuracy", "higher"),
    price=None,
    columns=(
        Axis("pgr", "Gap recovered", "higher"),
        Axis("agreement/weak_wrong", "Agreement where the weak model is wrong", "lower"),
        Axis("test/nll", "Log loss", "lower", "nats"),
        Axis("cost/labels", "True labels", "lower", "", ".0f"),
    ),
    selection=Axis("validation/accuracy", "Validation accuracy", "higher"),
    selection_price=None,
    references={
        "weak": {"method": "weak_supervisor", "ceiling": False},
        "naive": {"method": "weak_to_strong", "loss": "xent", "ceiling": False},
        "ceiling": {"method": "strong_ceiling", "ceiling": False},
    },
    baseline="naive",
    trajectories=(Axis("validation/accuracy", "Validation accuracy", "higher"),),
)
