"""What a method of the stage ``align`` works with, and how what it leaves is measured."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray
from torch import nn

from headwater.align.data import content_key
from headwater.align.pgr import UndefinedGap, agreement, pgr
from headwater.core.budget import Budget, Meter
from headwater.core.cache import atomic_path, atomic_write_text
from headwater.core.fit import Phase, Trained, fit
from headwater.core.leak import Sealed
from headwater.core.recipe import Metrics, ModelRef
from headwater.core.rng import derive_seed
from headwater.modalities.text.class_inputs import ClassStream
from headwater.modalities.text.classes import ClassModel, ClassObjective, open_class_model
from headwater.modalities.text.ledger import ledger, ledger_metrics
from headwater.modalities.text.soft_labels import SoftCrossEntropy, TargetLoss
from headwater.modalities.text.verifiable import Item

if TYPE_CHECKING:
    from headwater.align.base import Alignment, ClassAlignment
    from headwater.core.run import Run

__all__ = ["Aligned", "ClassTask", "Judged", "Training"]

logger = logging.getLogger(__name__)

MIDWAY_ITEMS = 256
PROBE_SHARE = 0.1


class Training:
    """Trains phases for a recipe: its optimizer, seed and settings, one meter, one trajectory.

    Attributes:
        meter: what all phases cost.
        trajectory: metric -> points ``(tokens, value)``, of the phases that were measured on the way.
    """

    def __init__(self, recipe: Alignment, run: Run) -> None:
        self.recipe, self.run = recipe, run
        self.meter = Meter()
        self.trajectory: dict[str, list[tuple[float, float]]] = {}
        self._tokens = 0.0

    def fit(self, phase: Phase, budget: Budget, *, evaluate: Callable[[nn.Module], Metrics] | None = None) -> Trained:
        """Train one phase on a budget of its own; of a resumed run, a finished one comes back from its checkpoint.

        Args:
            phase: with a name that the run has once.
            budget: what it spends.
            evaluate: measures the model at the recipe's ``eval_at``; its points join the trajectory.
        """
        recipe = self.recipe
        trained = fit(
            phase,
            budget=budget,
            optim=recipe.optim,
            seed=recipe.seed,
            directory=self.run.directory,
            settings=recipe.fit,
            evaluate=evaluate,
            eval_at=recipe.eval_at if evaluate is not None else (),
            meter=self.meter,
            on_metrics=partial(self.run.log, phase=phase.name),
        )
        for point in trained.trajectory:
            for name in point.keys() - {"at", "step", "tokens", "seconds"}:
                points = self.trajectory.setdefault(name, [])
                tokens = self._tokens + point["tokens"]
                if not points or points[-1][0] < tokens:  # two points may share a step
                    points.append((tokens, point[name]))
        if evaluate is not None:
            self._tokens += trained.tokens
        return trained


@dataclass(frozen=True)
class Aligned:
    """What a method leaves behind.

    Attributes:
        model: saved to ``model/``.
        others: further models by name, measured on the same test and saved under it; ``weak`` is the supervisor.
        files: further files of the run directory, named in the README.
    """

    model: ClassModel
    others: Mapping[str, ClassModel] = field(default_factory=dict)
    files: tuple[str, ...] = ()


class ClassTask:
    """What a method of the family ``ClassAlignment`` works with.

    Attributes:
        recipe, run: what runs, and where.
        training: trains phases.
        labels: the classes by name, sorted.
        unlabelled: texts whose true labels are out of reach.
        validation: examples to choose by.
        test: sealed; touching it raises ``TestLeak``.

    Raises:
        ValueError: the halves share a prompt, fewer than two classes, or a class that one half lacks.
    """

    def __init__(
        self,
        recipe: ClassAlignment,
        supervised: Sequence[Item],
        unlabelled: Sequence[Item],
        validation: Sequence[Item],
        run: Run,
    ) -> None:
        shared = {content_key(i.prompt) for i in supervised} & {content_key(i.prompt) for i in unlabelled}
        if shared:
            raise ValueError(f"the halves overlap: {len(shared)} prompts are in both, among them {min(shared)[:60]!r}.")
        self.labels = tuple(sorted({str(item.answer) for item in (*supervised, *unlabelled)}))
        if len(self.labels) < 2:
            raise ValueError(f"a classifier needs two classes; found {', '.join(self.labels) or 'none'}.")
        for role, items in (("supervised", supervised), ("unlabelled", unlabelled)):
            if absent := set(self.labels) - {str(item.answer) for item in items}:
                raise ValueError(f"the {role} half has no example of {min(absent)!r}; give more data.")
        self.recipe, self.run, self.training = recipe, run, Training(recipe, run)
        self.unlabelled = [item.prompt for item in unlabelled]
        self.test = Sealed("the test set")
        self._supervised, self._hidden, self.validation = supervised, unlabelled, validation
        self._ceiling: ClassModel | None = None
        self.labels_seen = 0
        self.weak_label_accuracy: float | None = None

    def codes(self, items: Sequence[Item]) -> NDArray[np.int64]:
        """Class indices ``(n,)``.

        Raises:
            ValueError: a label that no training example has.
        """
        code = {label: index for index, label in enumerate(self.labels)}
        for item in items:
            if str(item.answer) not in code:
                raise ValueError(f"no training example has the label {str(item.answer)!r}; labels: {self.labels}.")
        return np.array([code[str(item.answer)] for item in items], dtype=np.int64)

    def one_hot(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """True labels as distributions, ``(n, classes)``."""
        targets: NDArray[np.float32] = np.eye(len(self.labels), dtype=np.float32)[self.codes(items)]
        return targets

    def supervisor(self, *, watch: bool = False) -> ClassModel:
        """The weak model, fine-tuned on the true labels of the supervised half, which are counted."""
        self.labels_seen += len(self._supervised)
        texts, targets = [item.prompt for item in self._supervised], self.one_hot(self._supervised)
        return self.train("weak", self.recipe.weak_model, texts, targets, SoftCrossEntropy(), watch=watch)

    def ceiling(self, *, watch: bool = False) -> ClassModel:
        """The strong model, fine-tuned on the true labels of the unlabelled half; trained once."""
        if self._ceiling is None:
            targets, loss = self.one_hot(self._hidden), SoftCrossEntropy()
            self._ceiling = self.train("ceiling", self.recipe.model, self.unlabelled, targets, loss, watch=watch)
        return self._ceiling

    def reveal(self) -> None:
        """Count the true labels of the unlabelled half as looked at by the method."""
        self.labels_seen += len(self._hidden)

    def open(self, ref: ModelRef) -> ClassModel:
        """A fresh copy of a model that answers with one of ``labels``."""
        recipe = self.recipe
        return open_class_model(
            ref,
            self.labels,
            verbaliser=recipe.verbaliser,
            max_tokens=recipe.max_tokens,
            lora=recipe.lora,
            seed=recipe.seed,
        )

    def train(
        self,
        name: str,
        ref: ModelRef,
        texts: Sequence[str],
        targets: NDArray[np.float32],
        loss: TargetLoss,
        *,
        watch: bool = False,
    ) -> ClassModel:
        """A fresh copy of a model, fine-tuned for the recipe's epochs.

        Args:
            name: of the phase.
            ref: the model.
            texts: what it reads.
            targets: distributions, ``(texts, classes)``.
            loss: what it minimises.
            watch: measure it on validation examples on the way, for the trajectory.
        """
        recipe, opened = self.recipe, self.open(ref)
        # One order for all, so that models of the same texts are compared on the same batches.
        stream = ClassStream(
            opened.encode(texts),
            targets,
            rows=recipe.batch_size,
            seed=derive_seed(recipe.seed, "texts"),
            pad=opened.pad,
        )
        steps = stream.steps(recipe.epochs)
        if recipe.linear_probe_first and opened.new and steps > 1:
            # A head of random weights hardens into noise, and tears at the body while it learns.
            first = max(1, round(steps * PROBE_SHARE))
            frozen = [p for n, p in opened.model.named_parameters() if n not in opened.new and p.requires_grad]
            _requires_grad(frozen, False)
            self.training.fit(
                Phase(f"{name}-probe", opened.model, stream, ClassObjective(SoftCrossEntropy(), opened.label_ids)),
                Budget(steps=first),
            )
            _requires_grad(frozen, True)
            steps -= first
        watched = self.validation[:MIDWAY_ITEMS]
        self.training.fit(
            Phase(name, opened.model, stream, ClassObjective(loss, opened.label_ids)),
            Budget(steps=steps),
            evaluate=(lambda model: {"validation/accuracy": self.accuracy(opened, watched)}) if watch else None,
        )
        return opened

    def accuracy(self, model: ClassModel, items: Sequence[Item]) -> float:
        """Share of right answers."""
        answers = model.probabilities([item.prompt for item in items]).argmax(1)
        return float((answers == self.codes(items)).mean())

    def warn(self, topic: str, message: str) -> None:
        """Log a warning and keep it with the result."""
        self.run.warn(topic, message)

    def keep_labels(self, labels: NDArray[np.float32]) -> None:
        """Write weak labels of the unlabelled texts to ``labels.parquet``: text, label, confidence, soft_label."""
        import pandas as pd

        best = labels.argmax(1)
        self.weak_label_accuracy = float((best == self.codes(self._hidden)).mean())
        table = pd.DataFrame(
            {
                "text": self.unlabelled,
                "label": [self.labels[index] for index in best],
                "confidence": labels.max(1),
                "soft_label": list(labels),
            }
        )
        with atomic_path(self.run.path("labels.parquet")) as path:
            table.to_parquet(path, index=False)


def _requires_grad(parameters: Sequence[nn.Parameter], value: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(value)


class Judged:
    """Measures models on the test set, saves each, and sets their figures side by side."""

    def __init__(self, task: ClassTask, test: Sequence[Item]) -> None:
        self.task, self.test, self.truth = task, test, task.codes(test)
        self.answers: dict[str, NDArray[np.float32]] = {}
        self.validation = 0.0
        self.before = 0.0
        self.ledger: list[dict[str, float]] = []  # of a language model: before and after

    def start(self) -> None:
        """The strong model as it comes, with a new head at chance."""
        opened = self.task.open(self.task.recipe.model)
        opened.model.to(PartialState().device)
        self.before = self.task.accuracy(opened, self.test)
        self._note_ledger(opened)

    def _note_ledger(self, model: ClassModel) -> None:
        if model.verbaliser is not None and model.tokenizer is not None:
            self.ledger.append(ledger(cast(Any, model.model), model.tokenizer))  # Any: a causal language model

    def add(self, name: str, model: ClassModel, files: Sequence[str]) -> None:
        """Measure a model and save it under its name; it is moved off the device."""
        self.answers[name] = model.probabilities([item.prompt for item in self.test])
        if name == "model":
            self.validation = self.task.accuracy(model, self.task.validation)
            self._note_ledger(model)
        home = self.task.run.path(name)
        model.save_pretrained(home)
        if model.verbaliser is not None:
            atomic_write_text(home / "verbaliser.json", json.dumps(dict(model.verbaliser), indent=2) + "\n")
        atomic_write_text(home / "README.md", _readme(self.task.recipe, model, name, files))
        model.model.to("cpu")  # makes room for the next one

    def accuracy(self, name: str) -> float:
        """Of one model on the test."""
        return float(self._right(name).mean())

    def _right(self, name: str) -> NDArray[np.bool_]:
        right: NDArray[np.bool_] = self.answers[name].argmax(1) == self.truth
        return right

    def metrics(self) -> Metrics:
        """Accuracies, PGR and agreement; ``pgr.json`` and ``items.json`` beside them."""
        run = self.task.run
        likely = np.clip(self.answers["model"][np.arange(len(self.truth)), self.truth], 1e-12, None)
        metrics: Metrics = {
            "start/accuracy": self.before,
            "test/accuracy": self.accuracy("model"),
            "test/nll": float(-np.log(likely.astype(np.float64)).mean()),
            "validation/accuracy": self.validation,
        }
        metrics |= {f"{name}/accuracy": self.accuracy(name) for name in self.answers if name != "model"}
        if len(self.ledger) == 2:
            metrics |= ledger_metrics(*self.ledger)
        if "weak" in self.answers:
            same = agreement(self.answers["model"].argmax(1), self.answers["weak"].argmax(1), self.truth)
            parts = {"overall": same.overall, "weak_right": same.weak_right, "weak_wrong": same.weak_wrong}
            metrics |= {f"agreement/{name}": value for name, value in parts.items() if np.isfinite(value)}
        if {"weak", "ceiling"} <= self.answers.keys():
            figures: dict[str, Any] = {n: self.accuracy(n) for n in ("weak", "ceiling")}  # Any: JSON data
            figures["student"] = self.accuracy("model")
            try:
                metrics["pgr"] = figures["pgr"] = pgr(figures["weak"], figures["student"], figures["ceiling"])
            except UndefinedGap as error:
                figures |= {"pgr": None, "undefined": str(error)}
                run.notes["warning/pgr"] = str(error)
            run.write_json("pgr.json", figures)
        ids = [str(place) for place in range(len(self.truth))]
        values = self._right("model").astype(float).tolist()
        run.write_json("items.json", {"test/accuracy": {"ids": ids, "values": values}})
        return metrics


def _readme(recipe: ClassAlignment, model: ClassModel, name: str, files: Sequence[str]) -> str:
    kind = "AutoModelForSequenceClassification" if model.label_ids is None else "AutoModelForCausalLM"
    opening = f"from transformers import {kind}\n\nmodel = {kind}.from_pretrained(DIR)"
    if recipe.lora is not None:
        opening = (
            f"from peft import PeftModel\nfrom transformers import {kind}\n\n"
            f"base = {kind}.from_pretrained({str(getattr(model.model, 'name_or_path', recipe.model.name))!r})\n"
            "model = PeftModel.from_pretrained(base, DIR)"
        )
    asks = (
        "Classes are in its `config.json`."
        if model.label_ids is None
        else "The class is the text of `verbaliser.json` whose token is the likeliest one after the prompt."
    )
    lines = [f"# {recipe.id}: {name}", "", f"Answers with one of {', '.join(model.labels)}. {asks}", ""]
    lines += ["```python", opening, "```", ""]
    if files:
        lines += ["Beside this directory: " + ", ".join(f"`{file}`" for file in files) + ".", ""]
    return "\n".join(lines)
