"""Streams of tasks: labelled samples cut into tasks that arrive one after another.

    ClassStream           classes in some order, so many at a time; or tasks that the samples name themselves
    export_stream         the stream as files that any other code can read
    PilotDataManager      the stream behind the interface of LAMDA-PILOT's DataManager
    read_matrix           an accuracy matrix measured elsewhere

Train and test are split before the stream is cut. Labels are renumbered in order of arrival, so that the classes seen
so far are always 0, 1, ..., n_seen - 1.

Source: class order and task sizes of ``from_pilot`` as in Sun et al., "PILOT: A Pre-Trained Model-Based Continual
Learning Toolbox", arXiv:2309.07117.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset

from headwater.continual.metrics import Scenario
from headwater.core.cache import atomic_path, atomic_write_text
from headwater.core.leak import Sealed
from headwater.core.order import permutation
from headwater.core.rng import derive_seed

__all__ = [
    "ClassStream",
    "PilotDataManager",
    "Samples",
    "StreamData",
    "StreamError",
    "TaskData",
    "export_stream",
    "read_matrix",
]


class StreamError(ValueError):
    """Samples that cannot be cut into the stream asked for."""


@dataclass(frozen=True)
class Samples:
    """Labelled inputs.

    Attributes:
        inputs: ``(n, ...)``: features, pixels, token ids; or texts or encoded images, as an object array.
        labels: ``(n,)`` int64.
        tasks: ``(n,)`` int64: the task a sample arrives in, where the data decide that; else ``None``.
    """

    inputs: NDArray[Any]  # Any: features, pixels, ids or texts
    labels: NDArray[np.int64]
    tasks: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        for name, values in (("labels", self.labels), ("tasks", self.tasks)):
            if values is not None and values.shape != self.inputs.shape[:1]:
                raise StreamError(f"{name} must have shape ({len(self.inputs)},), one per input; got {values.shape}.")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: NDArray[Any]) -> Self:  # Any: positions or a mask
        """The samples at ``index``, copied."""
        return replace(
            self,
            inputs=self.inputs[index],
            labels=self.labels[index],
            tasks=None if self.tasks is None else self.tasks[index],
        )


@dataclass(frozen=True)
class StreamData:
    """Everything a stream is cut from.

    Attributes:
        train: what the learner may see, task by task.
        test: what only the evaluator sees.
        validation: for choosing hyperparameters; ``None`` where there is none.
        label_names: what label i was called in the source.
        fingerprint: of the inputs and labels.
    """

    train: Samples
    test: Samples
    validation: Samples | None = None
    label_names: tuple[str, ...] = ()
    fingerprint: str = ""

    @classmethod
    def from_labels(
        cls,
        train: tuple[ArrayLike, Sequence[Any]],
        test: tuple[ArrayLike, Sequence[Any]],
        validation: tuple[ArrayLike, Sequence[Any]] | None = None,
        *,
        fingerprint: str = "",
    ) -> Self:
        """Build from inputs and labels of any kind; labels are numbered in sorted order and their names kept.

        Raises:
            StreamError: a test or validation label that no training sample has.
        """
        names = sorted(set(train[1]))
        number = {name: i for i, name in enumerate(names)}

        def samples(part: tuple[ArrayLike, Sequence[Any]], role: str) -> Samples:  # Any: labels of any kind
            unknown = sorted({str(label) for label in part[1] if label not in number})
            if unknown:
                raise StreamError(f"no training sample of the {role} class {', '.join(unknown[:5])}.")
            return Samples(np.asarray(part[0]), np.array([number[label] for label in part[1]], dtype=np.int64))

        return cls(
            samples(train, "training"),
            samples(test, "test"),
            samples(validation, "validation") if validation is not None else None,
            tuple(str(name) for name in names),
            fingerprint,
        )


@dataclass
class TaskData:
    """What a learner is given of one task. ``test`` and, once the task is over, ``train`` raise ``TestLeak``.

    Attributes:
        train: the task's training samples; labels in order of arrival.
        validation: its validation samples, or ``None``.
        classes: the labels of this task.
        index: its place in the stream, from 0.
        test: out of reach.
    """

    train: Samples
    validation: Samples | None
    classes: tuple[int, ...]
    index: int
    test: Any = field(default_factory=lambda: Sealed("the test set of a stream"))  # Any: stands for samples

    def close(self) -> None:
        """End the task: its samples are out of reach from now on."""
        self.train = cast(Samples, Sealed(f"the training set of task {self.index}, which is over,"))
        self.validation = cast(Samples, Sealed(f"the validation set of task {self.index}, which is over,"))


class ClassStream:
    """Labelled samples in tasks.

    Args:
        data: the samples; labels must be 0, ..., classes - 1.
        increments: classes per task: one number (the last task takes what remains) or one per task. Leave it out when
            the samples carry ``tasks``.
        init: classes of the first task; ``increments`` by default. Only with one number.
        class_order: all labels in the order in which they arrive; drawn from ``seed`` by default.
        tasks: keep only the first so many tasks.
        scenario: ``class``: all classes seen so far compete and no task id is given; ``task``: the id is given, and
            only its classes compete; ``domain``: the same classes in every task; ``class_blurry``: a class may return.
        seed: draws the class order.

    Attributes:
        data: the samples kept, labels in order of arrival, every part with ``tasks``.
        class_order: original label of each class in order of arrival.
        classes: per task, its labels in order of arrival.
        test_rows: place of each test sample in the test set that was given.

    Raises:
        StreamError: labels are no such numbers, sizes do not add up, a task has no training or no test sample, or in
            the scenarios ``class`` and ``task`` a class is in two tasks.
    """

    data: StreamData
    class_order: tuple[int, ...]
    classes: tuple[tuple[int, ...], ...]
    scenario: Scenario
    test_rows: NDArray[np.int64]

    def __init__(
        self,
        data: StreamData,
        *,
        increments: int | Sequence[int] | None = None,
        init: int | None = None,
        class_order: Sequence[int] | None = None,
        tasks: int | None = None,
        scenario: Scenario = "class",
        seed: int = 0,
    ) -> None:
        count = _class_count(data)
        if increments is None:
            order, assigned = _assigned(data, scenario)
        else:
            if data.train.tasks is not None or scenario in ("domain", "class_blurry"):
                raise StreamError(
                    "increments cut a stream by class; samples that carry tasks, and the scenarios domain and "
                    "class_blurry, bring their own cut. Leave increments out there."
                )
            order = _checked_order(class_order, count, seed)
            assigned = _by_class(data, order, _sizes(count, increments, init))
        parts = [part if part is None else _arrived(part, order, task) for part, task in assigned]
        self._finish(data, parts, order, scenario, tasks)

    @classmethod
    def from_pilot(cls, data: StreamData, init_cls: int, increment: int, *, seed: int = 1993) -> Self:
        """Cut as LAMDA-PILOT does: its class order for ``seed`` and its task sizes (``init_cls=0``: equal tasks)."""
        # RandomState(seed) gives the numbers of np.random.seed(seed) and leaves the global generator alone.
        order = np.random.RandomState(seed).permutation(_class_count(data))
        return cls(data, increments=increment, init=init_cls or None, class_order=order.tolist())

    def _finish(
        self, data: StreamData, parts: list[Samples | None], order: Sequence[int], scenario: Scenario, limit: int | None
    ) -> None:
        train, test, validation = parts
        assert train is not None
        assert test is not None
        total = int(_tasks(train).max()) + 1
        kept = total if limit is None else limit
        if kept > total:
            raise StreamError(f"the stream has {total} tasks; it cannot be cut to the first {limit}.")
        for role, part in (("training", train), ("test", test)):
            sizes = np.bincount(_tasks(part), minlength=kept)[:kept]
            if not sizes.all():
                raise StreamError(f"task {int(np.argmin(sizes))} has no {role} sample.")
        self.test_rows = np.flatnonzero(_tasks(test) < kept)
        train, test = train.take(_tasks(train) < kept), test.take(self.test_rows)
        if validation is not None:
            validation = validation.take(_tasks(validation) < kept)
        self.classes = tuple(tuple(np.unique(train.labels[_tasks(train) == t]).tolist()) for t in range(kept))
        if scenario in ("class", "task"):
            self._refuse_returning(data.label_names, order)
        self.class_order = tuple(order[: self.num_seen(kept - 1)])
        names = tuple(data.label_names[label] if data.label_names else str(label) for label in self.class_order)
        self.data = StreamData(train, test, validation, names, data.fingerprint)
        self.scenario = scenario

    def _refuse_returning(self, names: tuple[str, ...], order: Sequence[int]) -> None:
        first: dict[int, int] = {}
        for task, classes in enumerate(self.classes):
            for label in classes:
                if label in first:
                    name = names[order[label]] if names else str(order[label])
                    raise StreamError(
                        f"class {name!r} is in task {first[label]} and in task {task}. In the scenarios class and task "
                        "a class comes once; use class_blurry if it may come back."
                    )
                first[label] = task

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def test_counts(self) -> NDArray[np.int64]:
        """Test samples per task, ``(tasks,)``."""
        return np.bincount(_tasks(self.data.test), minlength=len(self))

    def num_seen(self, task: int) -> int:
        """Number of classes that have arrived once ``task`` is over."""
        return max(max(classes) for classes in self.classes[: task + 1]) + 1

    def task(self, index: int) -> TaskData:
        """What a learner gets of one task: copies of its training and validation samples."""
        return TaskData(
            self._part(self.data.train, index),
            None if self.data.validation is None else self._part(self.data.validation, index),
            self.classes[index],
            index,
        )

    def test(self, index: int) -> Samples:
        """Test samples of one task; for the evaluator."""
        return self._part(self.data.test, index)

    def _part(self, samples: Samples, index: int) -> Samples:
        return samples.take(_tasks(samples) == index)


def _tasks(samples: Samples) -> NDArray[np.int64]:
    assert samples.tasks is not None  # every part of a stream has them
    return samples.tasks


def _class_count(data: StreamData) -> int:
    labels = np.unique(data.train.labels)
    if not labels.size or not np.array_equal(labels, np.arange(labels.size)):
        raise StreamError(
            f"training labels must be 0, ..., classes - 1; got {labels[:5].tolist()} and so on. "
            "StreamData.from_labels numbers labels of any kind."
        )
    for role, part in (("test", data.test), ("validation", data.validation)):
        if part is not None and len(part) and not 0 <= part.labels.min() <= part.labels.max() < labels.size:
            raise StreamError(
                f"a {role} label has no training sample; training has the classes 0 to {labels.size - 1}."
            )
    return labels.size


def _checked_order(class_order: Sequence[int] | None, count: int, seed: int) -> Sequence[int]:
    if class_order is None:
        drawn: list[int] = permutation(derive_seed(seed, "class order"), 0, count).tolist()
        return drawn
    if sorted(class_order) != list(range(count)):
        raise StreamError(f"class_order must hold each of the {count} labels once; got {list(class_order)}.")
    return list(class_order)


def _sizes(count: int, increments: int | Sequence[int], init: int | None) -> list[int]:
    """Classes per task; a remainder becomes a last, smaller task."""
    if isinstance(increments, Sequence):
        if init is not None or sum(increments) != count or min(increments, default=0) < 1:
            raise StreamError(
                f"increments {list(increments)} must be positive and add up to the {count} classes, without init."
            )
        return list(increments)
    first = increments if init is None else init
    if increments < 1 or not 1 <= first <= count:
        raise StreamError(
            f"increments and init must be at least 1 and init at most {count} classes; got {increments}, {first}."
        )
    full, rest = divmod(count - first, increments)
    return [first, *[increments] * full, *([rest] if rest else [])]


_Assigned = list[tuple[Samples | None, NDArray[np.int64]]]


def _by_class(data: StreamData, order: Sequence[int], sizes: Sequence[int]) -> _Assigned:
    task_of_class = np.empty(len(order), dtype=np.int64)
    task_of_class[list(order)] = np.repeat(np.arange(len(sizes)), sizes)
    return [(p, task_of_class[p.labels if p is not None else []]) for p in (data.train, data.test, data.validation)]


def _assigned(data: StreamData, scenario: Scenario) -> tuple[Sequence[int], _Assigned]:
    """Class order and tasks as the samples say them; classes of one task arrive in order of their labels."""
    parts = (data.train, data.test, data.validation)
    if any(part is not None and part.tasks is None for part in parts):
        raise StreamError(f"scenario {scenario!r} without increments needs samples that all carry their task.")
    assigned: _Assigned = [(p, np.empty(0, np.int64) if p is None or p.tasks is None else p.tasks) for p in parts]
    tasks = assigned[0][1]
    if tasks.min() != 0:
        raise StreamError(f"tasks are numbered from 0; the training samples begin at {int(tasks.min())}.")
    arrival = np.lexsort((data.train.labels, tasks))
    order = list(dict.fromkeys(data.train.labels[arrival].tolist()))
    return order, assigned


def _arrived(part: Samples, order: Sequence[int], tasks: NDArray[np.int64]) -> Samples:
    place = np.empty(len(order), dtype=np.int64)
    place[list(order)] = np.arange(len(order))
    return Samples(part.inputs, place[part.labels], tasks)


def export_stream(stream: ClassStream, directory: Path) -> None:
    """Write the stream as files: ``order.json``, and for each task and part its inputs and labels.

    ``task-000/train.parquet`` with columns ``input`` and ``label`` for texts; ``train.npy`` and ``train-labels.npy``
    for arrays. Labels are in order of arrival; ``order.json`` holds their names and original numbers.
    """
    for index in range(len(stream)):
        task = stream.task(index)
        for name, part in (("train", task.train), ("validation", task.validation), ("test", stream.test(index))):
            if part is not None:
                _write_part(directory / f"task-{index:03d}", name, part)
    order = {
        "format": 1,
        "scenario": stream.scenario,
        "classes": [list(classes) for classes in stream.classes],
        "class_order": list(stream.class_order),
        "label_names": list(stream.data.label_names),
        "fingerprint": stream.data.fingerprint,
    }
    atomic_write_text(directory / "order.json", json.dumps(order, indent=2) + "\n")


def _write_part(directory: Path, name: str, part: Samples) -> None:
    if part.inputs.dtype.kind in "OU":
        import pandas as pd

        with atomic_path(directory / f"{name}.parquet") as path:
            pd.DataFrame({"input": part.inputs, "label": part.labels}).to_parquet(path)
        return
    for suffix, values in (("", part.inputs), ("-labels", part.labels)):
        with atomic_path(directory / f"{name}{suffix}.npy") as path, path.open("wb") as stream:
            np.save(stream, values, allow_pickle=False)


class PilotDataManager:
    """A stream behind the methods that LAMDA-PILOT's learners call on their ``DataManager``.

    Images, features or any other array are handed out as they are: PILOT's transforms are not applied.

    Attributes:
        nb_tasks: number of tasks.
        nb_classes: number of classes.
    """

    def __init__(self, stream: ClassStream) -> None:
        self._stream = stream
        self.nb_tasks = len(stream)
        self.nb_classes = stream.num_seen(len(stream) - 1)

    def get_task_size(self, task: int) -> int:
        """Number of classes of a task."""
        return len(self._stream.classes[task])

    def get_dataset(
        self,
        indices: ArrayLike,
        source: str,
        mode: str,
        appendent: tuple[NDArray[Any], NDArray[Any]] | None = None,  # Any: inputs, labels
        ret_data: bool = False,
    ) -> Any:  # Any: a data set, or (inputs, labels, data set) with ret_data, as PILOT has it
        """The samples of some classes.

        Args:
            indices: labels in order of arrival.
            source: ``train`` or ``test``.
            mode: accepted for PILOT's sake; both of its modes read the same arrays here.
            appendent: inputs and labels to add behind, PILOT's exemplars.
            ret_data: return inputs and labels as well.

        Raises:
            ValueError: another ``source``.
        """
        if source not in ("train", "test"):
            raise ValueError(f"source must be 'train' or 'test'; got {source!r}.")
        samples = self._stream.data.train if source == "train" else self._stream.data.test
        chosen = samples.take(np.isin(samples.labels, np.asarray(indices)))
        inputs, labels = chosen.inputs, chosen.labels
        if appendent is not None and len(appendent):
            inputs, labels = np.concatenate((inputs, appendent[0])), np.concatenate((labels, appendent[1]))
        dataset = _Indexed(inputs, labels)
        return (inputs, labels, dataset) if ret_data else dataset


class _Indexed(Dataset[tuple[int, Any, int]]):
    """Items (index, input, label), as PILOT's ``DummyDataset`` gives them."""

    def __init__(self, inputs: NDArray[Any], labels: NDArray[Any]) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[int, Any, int]:
        return index, self.inputs[index], int(self.labels[index])


def read_matrix(path: Path) -> NDArray[np.float64]:
    """Read R from a CSV of numbers, one row per task learned; empty cells above the diagonal become NaN.

    ``metrics.summarize`` turns it and the test counts into our figures.

    Raises:
        ValueError: no square table, a cell that is no number, or nothing but percentages (a value above 1).
    """
    with path.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.reader(stream) if any(cell.strip() for cell in row)]
    if not rows or any(len(row) > len(rows) for row in rows):
        raise ValueError(f"{path}: expected as many columns as rows ({len(rows)}), without a header.")
    matrix = np.full((len(rows), len(rows)), np.nan)
    for t, row in enumerate(rows):
        for j, cell in enumerate(row):
            if cell.strip():
                try:
                    matrix[t, j] = float(cell)
                except ValueError:
                    raise ValueError(f"{path}: row {t + 1}, column {j + 1} is no number: {cell!r}.") from None
    if np.nanmax(matrix) > 1:
        raise ValueError(
            f"{path}: accuracies are fractions in [0, 1]; got {np.nanmax(matrix)}. Divide percentages by 100."
        )
    return matrix
