"""Continual learning: a pretrained model and a stream of tasks -> one model that answers for all tasks so far.

What every method of the stage shares is here: the protocol, the evaluation, resume between tasks. A method adds its
fields and ``learner``. The learner is given one task's training data at a time; test sets stay with the evaluator, past
training data are out of reach, and the number of tasks or classes to come is never told.

After each task t the evaluator fills row t of R (``metrics``): the accuracy on the test set of every task. A task none
of whose classes has arrived counts as 0, since no answer exists for it.
"""

from __future__ import annotations

import csv
import io
import math
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from headwater.continual.data import StreamSpec, load_stream_data
from headwater.continual.metrics import Scenario, accuracy_curve, summarize
from headwater.continual.streams import ClassStream, TaskData
from headwater.core.cache import atomic_write_text
from headwater.core.checkpoint import CheckpointStore
from headwater.core.family import Axis, Family
from headwater.core.recipe import Metrics, ModelRef, Recipe
from headwater.modalities.features import ArrayEncoder, Encoder
from headwater.modalities.models import load_encoder
from headwater.modalities.text.labelled import ends_at_unit_length, open_encoder
from headwater.modalities.vision.labelled import open_image_encoder

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = [
    "FAMILY",
    "Batch",
    "ContinualLearner",
    "ContinualRecipe",
    "Evaluation",
    "Evaluator",
    "ManyVoiced",
    "Progress",
    "Scorer",
    "StreamInfo",
]


@dataclass(frozen=True)
class StreamInfo:
    """What a learner may know beforehand.

    Attributes:
        input_shape: of one input, e.g. ``(384,)`` for features, ``()`` for a text.
        scenario: see ``ClassStream``.
        seed: of the recipe.
    """

    input_shape: tuple[int, ...]
    scenario: Scenario
    seed: int


@dataclass(frozen=True)
class Batch:
    """Inputs to be scored.

    Attributes:
        inputs: ``(batch, ...)``, as in ``Samples``.
        task: the task they belong to in the scenario ``task``; ``None`` in all others.
    """

    inputs: NDArray[Any]  # Any: features, pixels, ids or texts
    task: int | None = None


class Scorer(Protocol):
    """What can be evaluated."""

    def scores(self, batch: Batch) -> Tensor:
        """Scores of all classes seen so far, ``(batch, n_seen)``, in order of arrival; the largest is the answer."""


@runtime_checkable
class ManyVoiced(Protocol):
    """A learner in which several models vote: each gets a matrix of its own, beside that of the whole."""

    @property
    def voices(self) -> Mapping[str, Scorer]:
        """The models by name; the same names after every task."""


class ContinualLearner(Scorer, Protocol):
    """What a method of this stage is."""

    def observe(self, task: TaskData, run: Run) -> None:
        """Learn from one task's training data, the only data there are now; called once per task, in order."""

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on after the task, exactly; its size is reported as the method's memory."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up a state; called on a fresh learner before its first ``observe`` or ``scores``."""

    def save(self, directory: Path, label_names: Sequence[str]) -> None:
        """Leave what was learned in formats that others open, with a ``README.md`` that says how."""


@dataclass(frozen=True)
class Evaluation:
    """One look at all test sets.

    Attributes:
        accuracy: row of R, ``(tasks,)``.
        local: the same when only classes of the sample's own task may be answered, ``(tasks,)``.
        correct: per test sample, in the order of ``stream.data.test``, whether the answer was right, ``(n,)``.
    """

    accuracy: NDArray[np.float64]
    local: NDArray[np.float64]
    correct: NDArray[np.bool_]


class Evaluator:
    """Holds the test sets and asks the learner.

    Args:
        stream: the stream.
        batch_size: samples per call of ``scores``.
    """

    def __init__(self, stream: ClassStream, batch_size: int = 256) -> None:
        self.stream = stream
        self.batch_size = batch_size

    def __call__(self, learner: Scorer, after: int) -> Evaluation:
        """Fill row ``after`` of R.

        Raises:
            ValueError: ``scores`` has another shape than ``(batch, n_seen)``, or holds NaN.
        """
        stream = self.stream
        seen = stream.num_seen(after)
        accuracy, local = np.zeros(len(stream)), np.zeros(len(stream))
        correct = np.zeros(len(stream.data.test), dtype=np.bool_)
        for task, classes in enumerate(stream.classes):
            known = [label for label in classes if label < seen]
            if not known:
                continue
            part = stream.test(task)
            scores = self.scores(learner, part.inputs, task, seen)
            own = torch.full_like(scores, -math.inf)
            own[:, known] = scores[:, known]
            near = own.argmax(1).numpy() == part.labels
            right = near if stream.scenario == "task" else scores.argmax(1).numpy() == part.labels
            accuracy[task], local[task] = right.mean(), near.mean()
            correct[stream.data.test.tasks == task] = right
        return Evaluation(accuracy, local, correct)

    def validation(self, learner: Scorer, after: int) -> float | None:
        """Accuracy on the validation samples of the tasks up to ``after``, pooled; ``None`` where there are none."""
        stream, right = self.stream, []
        for index in range(after + 1):
            part = stream.task(index).validation
            if part is None or not len(part):
                continue
            scores = self.scores(learner, part.inputs, index, stream.num_seen(after))
            if stream.scenario == "task":
                others = [label for label in range(scores.shape[1]) if label not in stream.classes[index]]
                scores[:, others] = -math.inf
            right.append(scores.argmax(1).numpy() == part.labels)
        return float(np.concatenate(right).mean()) if right else None

    def scores(self, learner: Scorer, inputs: NDArray[Any], task: int, seen: int) -> Tensor:  # Any: see Batch
        """Scores of ``inputs``, ``(n, seen)`` float32 or wider on the CPU; errors as ``__call__``."""
        told = task if self.stream.scenario == "task" else None
        parts = []
        for begin in range(0, len(inputs), self.batch_size):
            piece = inputs[begin : begin + self.batch_size]
            scores = learner.scores(Batch(piece, told)).detach().cpu()
            if tuple(scores.shape) != (len(piece), seen):
                raise ValueError(
                    f"scores must have shape ({len(piece)}, {seen}), one column per class seen; "
                    f"got {tuple(scores.shape)}."
                )
            if scores.isnan().any():
                raise ValueError(f"scores hold NaN after task {task}; an argmax over them would mean nothing.")
            parts.append(scores if scores.dtype in (torch.float32, torch.float64) else scores.float())
        return torch.cat(parts)


@dataclass
class Progress:
    """What is known after some tasks; goes into every checkpoint.

    Attributes:
        rows: R so far.
        local: its counterpart with answers restricted to the sample's own task.
        memory_bytes: size of the learner's state after each task.
        seconds: spent in ``observe``.
        validation: accuracy on the validation samples of the first tasks, taken when they were over.
        voices: R of each voice of a learner that has several.
    """

    rows: list[list[float]]
    local: list[list[float]]
    memory_bytes: list[int]
    seconds: float = 0.0
    validation: float | None = None
    voices: dict[str, list[list[float]]] = field(default_factory=dict)


class ContinualRecipe(Recipe):
    """Family of the stage ``continual``: one hook, ``learner``."""

    reads: ClassVar[Literal["features", "inputs"]] = "features"
    """Whether learners of this recipe are given features of the frozen ``model``, or the inputs as they are."""

    model: ModelRef = Field(description="the pretrained encoder: Hub name, local directory or builtin")
    max_tokens: int | None = Field(
        default=128, gt=0, description="tokens of each text that a frozen encoder reads; null for as many as it can"
    )
    stream: StreamSpec = Field(default=StreamSpec(), description="what arrives, in which order, in how many tasks")
    batch_size: int = Field(default=256, gt=0, description="samples per forward pass in the evaluation")
    tune_tasks: int = Field(
        default=2,
        gt=0,
        description="validation/first_tasks is measured after so many tasks; choose hyperparameters by nothing else",
    )

    @abstractmethod
    def learner(self, info: StreamInfo) -> ContinualLearner:
        """A fresh learner that has seen no task."""

    def encoder(self, info: StreamInfo) -> Encoder | ArrayEncoder:
        """The recipe's model and what prepares its inputs, for learners that read those; arrays are taken for its own
        tensors.
        """
        modality, processor = self.stream.modality, None
        if info.input_shape != ():
            model = load_encoder(self.model)
        elif modality == "image":
            model, processor = open_image_encoder(self.model)
        else:
            model, processor = open_encoder(self.model)
        # As ``encode_texts`` does for learners that read features: SimpleCIL here and there is one and the same.
        unit = modality == "text" and ends_at_unit_length(model)
        return Encoder(model, processor, modality, max_length=self.max_tokens, normalize=unit)

    def run(self, run: Run) -> Metrics:
        """Read the data, cut the stream, ``follow`` it."""
        encoder = self.model if self.reads == "features" else None
        data = load_stream_data(self.stream, encoder, max_tokens=self.max_tokens)
        return self.follow(self.stream.cut(data, seed=self.seed), run)

    def follow(self, stream: ClassStream, run: Run) -> Metrics:
        """Go through a stream task by task, evaluate after each, save; for streams of your own as well.

        The learner's state and R are stored after each task; a resumed run goes on after the last one stored.

        Raises:
            TestLeak: the learner reached for a test set, or for a task that is over.
            ValueError: its scores do not fit; see ``Evaluator``.
        """
        run.record_data("stream", stream.data.fingerprint)
        learner = self.learner(StreamInfo(stream.data.train.inputs.shape[1:], stream.scenario, self.seed))
        evaluator = Evaluator(stream, self.batch_size)
        progress, evaluation = Progress([], [], []), None
        store = CheckpointStore(run.checkpoints, fingerprint=stream.data.fingerprint)
        checkpoint = store.latest()
        if checkpoint is not None:
            learner.load_state({name.partition("/")[2]: tensor for name, tensor in checkpoint.tensors.items()})
            progress = Progress(**checkpoint.state)
        for index in range(len(progress.rows), len(stream)):
            evaluation = self._one_task(learner, index, evaluator, progress, run)
            state = {f"learner/{name}": tensor for name, tensor in learner.state().items()}
            progress.memory_bytes.append(sum(tensor.nbytes for tensor in state.values()))
            if run.is_main_process:
                store.save(index + 1, state, vars(progress))
        if evaluation is None:  # resumed after the last task
            evaluation = evaluator(learner, len(stream) - 1)
        learner.save(run.model, stream.data.label_names)
        labels = len(stream.data.train) + (len(stream.data.validation) if stream.data.validation is not None else 0)
        run.cost |= {"seconds": progress.seconds, "labels": float(labels)}
        return _report(stream, progress, evaluation, run)

    def _one_task(
        self, learner: ContinualLearner, index: int, evaluator: Evaluator, progress: Progress, run: Run
    ) -> Evaluation:
        stream = evaluator.stream
        task, begin = stream.task(index), time.monotonic()
        learner.observe(task, run)
        task.close()
        progress.seconds += time.monotonic() - begin
        evaluation = evaluator(learner, index)
        progress.rows.append(evaluation.accuracy.tolist())
        progress.local.append(evaluation.local.tolist())
        for name, voice in (learner.voices if isinstance(learner, ManyVoiced) else {}).items():
            progress.voices.setdefault(name, []).append(evaluator(voice, index).accuracy.tolist())
        if index + 1 == min(self.tune_tasks, len(stream)):
            progress.validation = evaluator.validation(learner, index)
        pooled = np.average(evaluation.accuracy[: index + 1], weights=stream.test_counts[: index + 1])
        run.log({"acc": float(pooled), "acc/this_task": progress.rows[-1][index]}, task=index)
        return evaluation


def _report(stream: ClassStream, progress: Progress, last: Evaluation, run: Run) -> Metrics:
    """Write matrix, curves and per-sample results beside ``result.json``, and return the metrics."""
    matrix, counts = np.array(progress.rows), stream.test_counts
    # A learner knows no class before its first task, so b_j is the chance level; see metrics.summarize for the others.
    initial = [1 / len(classes) for classes in stream.classes] if stream.scenario == "domain" else None
    metrics = summarize(matrix, counts, local=progress.local[-1], initial=initial)
    if progress.validation is not None:
        metrics["validation/first_tasks"] = progress.validation
    arrived = stream.num_seen(len(stream) - 1) - stream.num_seen(0)
    growth = (progress.memory_bytes[-1] - progress.memory_bytes[0]) / arrived if arrived else 0.0
    metrics |= {"memory/bytes": float(progress.memory_bytes[-1]), "memory/growth_per_class": growth}

    curves = {"acc/curve": accuracy_curve(matrix, counts).tolist()}
    for name, rows in progress.voices.items():
        of_voice = summarize(rows, counts)
        metrics |= {f"{name}/{key}": of_voice[key] for key in ("acc/last", "acc/average", "forgetting/max")}
        curves[f"{name}/acc/curve"] = accuracy_curve(rows, counts).tolist()
    table = io.StringIO()
    csv.writer(table).writerows(progress.rows)
    atomic_write_text(run.path("matrix.csv"), table.getvalue())
    run.write_json(
        "matrix.json",
        {
            "format": 1,
            "scenario": stream.scenario,
            "matrix": progress.rows,
            "local": progress.local,
            "test_counts": counts.tolist(),
            "curve": curves["acc/curve"],
            "classes": [list(classes) for classes in stream.classes],
            "label_names": list(stream.data.label_names),
            **({"voices": progress.voices} if progress.voices else {}),
        },
    )
    write_curves(run, curves)
    ids = [str(row) for row in stream.test_rows]
    run.write_json("items.json", {"acc/last": {"ids": ids, "values": last.correct.astype(float).tolist()}})
    return metrics


def write_curves(run: Run, curves: Mapping[str, Sequence[float]]) -> None:
    """Write accuracies after each task, by name, as the trajectory that leaderboards draw."""
    series = {name: [[float(t), value] for t, value in enumerate(curve, start=1)] for name, curve in curves.items()}
    run.write_json("trajectory.json", {"x": "tasks", "series": series})


FAMILY = Family(
    stage="continual",
    gain=Axis("acc/last", "Accuracy after the last task", "higher"),
    price=Axis("forgetting/max", "Forgetting", "lower"),
    columns=(
        Axis("acc/average", "Accuracy, mean over tasks", "higher"),
        Axis("local/mean", "Accuracy within the right task", "higher"),
        Axis("memory/bytes", "Memory", "lower", "bytes", ".0f"),
    ),
    selection=Axis("validation/first_tasks", "Validation, first tasks", "higher"),
    selection_price=None,
    references={
        "simple-cil": {"method": "nmc", "metric": "cosine"},
        "sequential-global": {"method": "sequential", "softmax": "global"},
        "sequential-local": {"method": "sequential", "softmax": "local"},
        "finetuning-global": {"method": "sequential_finetuning", "softmax": "global"},
        "finetuning-local": {"method": "sequential_finetuning", "softmax": "local"},
        "joint": {"method": "joint"},
    },
    baseline="simple-cil",
    trajectories=(Axis("acc/curve", "Accuracy on all classes so far", "higher"),),
)
