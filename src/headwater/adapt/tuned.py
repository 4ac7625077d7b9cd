"""Adaptation by training: a classifier on top of a pretrained model, both moved by gradients on the task's texts.

    TunedRecipe       what such methods share: budget, optimizer, loop; one hook, ``phases``
    TunedClassifier   what they leave: a transformers sequence classifier, or a PEFT adapter on one
    FineTuning        the plain way, of all weights or of LoRA adapters: what every such method is held against

Source of ``FineTuning``: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", arXiv:1810.04805,
section 3.2.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from headwater.adapt.base import Adapted, AdaptRecipe, AdaptTask
from headwater.core.budget import GivenBudget, Meter
from headwater.core.cache import atomic_write_text
from headwater.core.fit import FitSettings, Phase, Trained, fit_phases
from headwater.core.lora import LoraSpec, add_lora
from headwater.core.optim import OptimSpec
from headwater.core.recipe import ModelRef
from headwater.core.rng import derive_seed
from headwater.modalities.text.class_inputs import ClassStream
from headwater.modalities.text.classes import ClassModel, ClassObjective, open_class_model
from headwater.modalities.text.soft_labels import SoftCrossEntropy

if TYPE_CHECKING:
    from torch import nn

    from headwater.core.run import Run

__all__ = ["FineTuning", "TunedClassifier", "TunedRecipe", "class_stream", "new_modules"]

_SMALLEST = np.finfo(np.float32).tiny


@dataclass(frozen=True, eq=False)
class TunedClassifier:
    """A trained classifier of texts.

    Attributes:
        classes: the model with its tokenizer and labels, adapters where there are any.
        start: the checkpoint that it was trained from.
        trainable_parameters: numbers that were trained.
    """

    classes: ClassModel
    start: str
    trainable_parameters: int

    def predict_scores(self, inputs: NDArray[Any]) -> NDArray[np.float64]:  # Any: texts
        """Log-probabilities, ``(n, classes)``."""
        probabilities = self.classes.probabilities(list(inputs)).astype(np.float64)
        logs: NDArray[np.float64] = np.log(np.maximum(probabilities, _SMALLEST))
        return logs

    def save_pretrained(self, directory: Path) -> None:
        """Write the classifier, or its adapter, and a ``README.md`` that says how to open it."""
        self.classes.save_pretrained(directory)
        labels = ", ".join(self.classes.labels)
        if hasattr(self.classes.model, "peft_config"):
            opening = _ADAPTER.format(self.start, dict(enumerate(self.classes.labels)))
        else:
            opening = self.classes.opening
        atomic_write_text(directory / "README.md", _README.format(self.start, labels, opening))


class TunedRecipe(AdaptRecipe):
    """Family within ``adapt``: methods that train weights; one hook, ``phases``."""

    batch_size: int = Field(default=32, gt=0, description="texts per optimizer step")
    optim: OptimSpec = Field(default=OptimSpec(), description="how weights are moved")
    budget: GivenBudget = Field(description="what the training may spend: steps, tokens, flops or seconds")
    fit: FitSettings = Field(
        default=FitSettings(), description="how the loop runs: precision, micro-batches, checkpoints"
    )

    @model_validator(mode="after")
    def _texts_only(self) -> Self:
        if self.modality != "text":
            raise ValueError(f"modality: {self.id} trains classifiers of texts; heads and adam_cil read images")
        return self

    @abstractmethod
    def phases(self, task: AdaptTask, run: Run) -> Generator[Phase, Trained, Adapted]:
        """Yield each training phase, receive what it trained, return the classifier.

        Must be a pure function of ``task``: a resumed run goes through it again, and finished phases come back from
        their checkpoints.
        """

    def adapt(self, task: AdaptTask, run: Run) -> Any:  # Any: an Adapted, of the method's own class
        """Train the phases."""
        meter = Meter()
        tuned = fit_phases(
            self.phases(task, run),
            budget=lambda: self.budget,
            optim=self.optim,
            seed=self.seed,
            directory=run.directory,
            settings=self.fit,
            evaluate=_nothing,
            eval_at=(),
            meter=meter,
            log=run.log,
        )
        run.cost |= meter.cost.to_dict()
        return tuned


def _nothing(model: nn.Module) -> dict[str, float]:
    """Nothing is measured on the way."""
    return {}


def class_stream(classes: ClassModel, task: AdaptTask, *, rows: int, seed: int) -> ClassStream:
    """The task's training texts and labels as batches; where they come in groups, with equally many of each."""
    inputs = classes.encode(list(task.train.inputs))
    targets = np.eye(len(task.label_names), dtype=np.float32)[task.train.labels]
    return ClassStream(inputs, targets, rows=rows, seed=seed, pad=classes.pad, groups=task.train.groups)


def new_modules(classes: ClassModel) -> Sequence[str]:
    """The modules whose weights were drawn afresh: a head, and a pooler where the checkpoint has none."""
    return sorted({name.rpartition(".")[0] for name in classes.new})


class FineTuning(TunedRecipe):
    """Reference: fine-tuning of all weights, or of LoRA adapters and a new head."""

    id: ClassVar[str] = "finetuning"

    lora: LoraSpec | None = Field(default=None, description="train LoRA adapters and the head; null: all weights")

    def open(self, labels: Sequence[str], ref: ModelRef) -> ClassModel:
        """The model with a new head, in adapters where the recipe says so."""
        classes = open_class_model(ref, labels, max_tokens=self.max_tokens or _MANY, seed=self.seed)
        if self.lora is not None:
            seed = derive_seed(self.seed, "lora")
            classes.model = add_lora(classes.model, self.lora, seed=seed, whole=new_modules(classes))
        return classes

    def phases(self, task: AdaptTask, run: Run) -> Generator[Phase, Trained, TunedClassifier]:
        """One phase."""
        classes = self.open(task.label_names, self.model)
        stream = class_stream(classes, task, rows=self.batch_size, seed=self.seed)
        trained = yield Phase("finetune", classes.model, stream, ClassObjective(SoftCrossEntropy()))
        return TunedClassifier(classes, self.model.name, trained.cost.trainable)


_MANY = 1 << 20  # the model's own number of positions then decides
_README = """# Fine-tuned from `{}`

Answers with one of {}.

```python
{}
```
"""
_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

base = AutoModelForSequenceClassification.from_pretrained({0!r}, id2label={1!r})
model = PeftModel.from_pretrained(base, DIR)
tokenizer = AutoTokenizer.from_pretrained(DIR)"""
