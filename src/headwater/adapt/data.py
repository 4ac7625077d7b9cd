"""What an adaptation recipe reads: labelled texts or images, as they are or as features of a frozen encoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from headwater.core.cache import atomic_write_text, cache_dir
from headwater.core.recipe import DataRef, ModelRef
from headwater.modalities.text import labelled
from headwater.modalities.text.docs import CorpusError, Document, drop_overlap
from headwater.modalities.text.docstrings import docstring_dataset
from headwater.modalities.text.labelled import text_array
from headwater.modalities.text.pairs import source_digest as text_key
from headwater.modalities.text.sources import open_grouped, open_labelled
from headwater.modalities.vision.labelled import encode_images, open_labelled_images, pixel_digest

__all__ = [
    "Examples",
    "InputKind",
    "TaskData",
    "docstring_task",
    "encode_task",
    "read_task",
    "rows_apart",
    "text_key",
]

InputKind = Literal["text", "image"]


@dataclass(frozen=True, eq=False)
class Examples:
    """Labelled inputs.

    Attributes:
        inputs: texts, or images as encoded files, ``(n,)``, dtype object; or features ``(n, D)``.
        labels: class indices, ``(n,)`` int64.
        groups: where each comes from, such as its domain, ``(n,)`` strings; ``None`` where nobody said.
    """

    inputs: NDArray[Any]  # Any: texts, encoded files or floats
    labels: NDArray[np.int64]
    groups: NDArray[np.str_] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[Any]) -> Examples:  # Any: positions or a mask
        """Some of them, by position or boolean mask."""
        return Examples(self.inputs[rows], self.labels[rows], None if self.groups is None else self.groups[rows])


@dataclass(frozen=True, eq=False)
class TaskData:
    """Everything a task has, test sets included; methods are given an ``AdaptTask`` instead.

    Attributes:
        train: what may be learned from; every class occurs in it.
        test: what the figures are taken on.
        validation: for choosing hyperparameters.
        ood: shifted test sets by name, with the same classes.
        label_names: of the class indices.
        label_texts: a description of each class; the names where nobody gave one.
        fingerprint: of all inputs and labels, and of the encoder.
        dropped_overlap: training examples left out because they repeat a held-out one.
        features_seconds: that a frozen encoder took.

    Raises:
        ValueError: inputs, labels and groups of different lengths, an empty training or test set, labels that are no
            class indices, or a class without a training example.
    """

    train: Examples
    test: Examples
    validation: Examples | None
    label_names: tuple[str, ...]
    label_texts: tuple[str, ...]
    fingerprint: str
    ood: Mapping[str, Examples] = field(default_factory=dict)
    dropped_overlap: int = 0
    features_seconds: float = 0.0

    def __post_init__(self) -> None:
        for role, part in self.parts():
            if len(part.inputs) != len(part.labels):
                raise ValueError(f"{role}: {len(part.inputs)} inputs have {len(part.labels)} labels.")
            if part.groups is not None and len(part.groups) != len(part.labels):
                raise ValueError(f"{role}: {len(part.labels)} examples have {len(part.groups)} groups.")
            if not len(part):
                raise ValueError(f"{role}: no examples.")
            if part.labels.min() < 0 or part.labels.max() >= len(self.label_names):
                raise ValueError(
                    f"{role}: labels must be 0, ..., {len(self.label_names) - 1}, indices into label_names."
                )
        absent = sorted(set(range(len(self.label_names))) - set(self.train.labels.tolist()))
        if absent:
            raise ValueError(f"no training example of {', '.join(self.label_names[label] for label in absent)}.")
        if len(self.label_texts) != len(self.label_names):
            raise ValueError(f"{len(self.label_names)} classes have {len(self.label_texts)} descriptions.")

    def parts(self) -> Iterator[tuple[str, Examples]]:
        """Every set with its name."""
        yield "train", self.train
        yield "test", self.test
        if self.validation is not None:
            yield "validation", self.validation
        for name, part in self.ood.items():
            yield f"ood.{name}", part

    def mapped(self, inputs: Mapping[str, NDArray[Any]], **changes: Any) -> TaskData:  # Any: inputs as in Examples
        """The same examples with other inputs, given by the names of ``parts``."""
        parts = {role: replace(part, inputs=inputs[role]) for role, part in self.parts()}
        ood = {name: parts[f"ood.{name}"] for name in self.ood}
        changed: TaskData = replace(
            self, train=parts["train"], test=parts["test"], validation=parts.get("validation"), ood=ood, **changes
        )
        return changed


def docstring_task(packages: Sequence[str] | None = None, *, per_class: int = 200) -> TaskData:
    """Docstrings labelled with their package, its name masked; one split for every seed, so features are cached once.

    Args:
        packages: the classes; ``None`` takes those of a fixed list that are installed, about 30.
        per_class: docstrings of each: 60 % for training, 10 % for validation, 30 % for the test.

    Raises:
        CorpusError: see ``docstring_dataset``.
    """
    dataset = docstring_dataset("package", packages, per_class=per_class)
    train, validation, test = (
        Examples(text_array(side.texts), side.labels) for side in (dataset.train, dataset.validation, dataset.test)
    )
    names, texts = tuple(dataset.label_names), tuple(dataset.label_texts)
    return TaskData(train, test, validation, names, texts, _fingerprint([train, test, validation]))


def read_task(
    train: DataRef,
    test: DataRef,
    validation: DataRef | None = None,
    ood: Mapping[str, DataRef] | None = None,
    label_texts: Mapping[str, str] | None = None,
    *,
    modality: InputKind = "text",
    group_field: str | None = None,
    holdout: str | None = None,
) -> TaskData:
    """Read labelled texts or images; classes are the labels of the training set, sorted.

    Training examples that repeat a held-out one are left out and counted: a text that does so exactly or nearly, an
    image whose pixels do so exactly.

    Args:
        train: examples to learn from.
        test: examples for the figures.
        validation: examples for choosing hyperparameters.
        ood: shifted test sets by name.
        label_texts: descriptions by label; the label itself where there is none.
        modality: what the examples are; ``open_labelled`` and ``open_labelled_images`` say from where.
        group_field: column of the training texts that says where each comes from.
        holdout: such a group, which is then no training text but a shifted test set of that name.

    Raises:
        CorpusError: nothing there, no such column or group, fewer than two classes, a label or description that no
            training example has, or a class of which every training example repeats a held-out one.
    """
    refs = {"train": train, "test": test} | ({"validation": validation} if validation else {})
    refs |= {f"ood.{name}": ref for name, ref in (ood or {}).items()}
    opened = open_labelled_images if modality == "image" else open_labelled
    read: dict[str, _Labelled] = {
        role: opened(ref, role=role) for role, ref in refs.items() if role != "train" or not group_field
    }
    shifted, groups = list(ood or {}), None
    if group_field is not None:
        read["train"], groups = _grouped(train, group_field, holdout, read)
        shifted += [] if holdout is None else [holdout]
    names = sorted(set(read["train"][1]))
    if len(names) < 2:
        raise CorpusError(f"train: a classifier needs two classes; found {', '.join(map(repr, names)) or 'none'}.")
    code = {name: index for index, name in enumerate(names)}
    for role, (_, labels) in read.items():
        if unknown := sorted(set(labels) - set(code)):
            raise CorpusError(
                f"{role}: no training {modality} has the label {unknown[0]!r}; labels: {', '.join(names)[:200]}."
            )
    if unknown := sorted(set(label_texts or {}) - set(code)):
        raise CorpusError(f"label_texts: no training {modality} has the label {unknown[0]!r}.")
    parts = {role: Examples(text_array(texts), np.array([code[x] for x in y])) for role, (texts, y) in read.items()}
    if groups is not None:
        parts["train"] = replace(parts["train"], groups=np.array(groups))
    fingerprint = _fingerprint([parts[role] for role in sorted(parts)])
    kept = _without_overlap(parts, fingerprint, modality)
    clean = parts["train"].take(kept)
    if emptied := sorted(set(range(len(names))) - set(clean.labels.tolist())):
        label = names[emptied[0]]
        raise CorpusError(f"train: every {modality} labelled {label!r} repeats one of a test or validation set.")
    return TaskData(
        train=clean,
        test=parts["test"],
        validation=parts.get("validation"),
        label_names=tuple(names),
        label_texts=tuple((label_texts or {}).get(name, name) for name in names),
        fingerprint=fingerprint,
        ood={name: parts[f"ood.{name}"] for name in shifted},
        dropped_overlap=len(parts["train"]) - len(kept),
    )


_Labelled = tuple[list[Any], list[str]]  # Any: texts or encoded images


def _grouped(
    train: DataRef, group_field: str, holdout: str | None, read: dict[str, _Labelled]
) -> tuple[_Labelled, NDArray[np.str_]]:
    """The training texts with the groups that they come from; those of ``holdout`` are put into ``read`` instead."""
    texts, labels, groups = open_grouped(train, group_field, role="train")
    rows = list(range(len(texts)))
    if holdout is not None:
        held = [row for row in rows if groups[row] == holdout]
        if not 0 < len(held) < len(rows) or f"ood.{holdout}" in read:
            known = ", ".join(sorted(set(groups)))[:200]
            raise CorpusError(
                f"train: cannot hold out {holdout!r}; it must be one of several groups, {known}, and no name in `ood`."
            )
        read[f"ood.{holdout}"] = [texts[row] for row in held], [labels[row] for row in held]
        rows = [row for row in rows if groups[row] != holdout]
    return ([texts[row] for row in rows], [labels[row] for row in rows]), np.array([groups[row] for row in rows])


def encode_task(
    data: TaskData,
    encoder: ModelRef,
    *,
    modality: InputKind = "text",
    max_tokens: int | None = 128,
    normalize: bool = True,
) -> TaskData:
    """The same task with features of a frozen encoder as inputs, computed once and kept in the user cache.

    Args:
        data: inputs are texts or encoded images.
        encoder: a model that reads those, without its head; of a dual encoder, the tower that does.
        modality: what the inputs are.
        max_tokens: tokens of each text that it reads; ``None`` for as many as it can.
        normalize: scale each feature vector to unit length.

    Raises:
        ValueError: see ``extract_features``.
    """
    roles, parts = zip(*data.parts(), strict=True)
    inputs = [item for part in parts for item in part.inputs]
    if modality == "image":
        store, seconds = encode_images(inputs, encoder, normalize=normalize)
    else:
        encoded = labelled.encode_texts(inputs, encoder, max_tokens=max_tokens, normalize=normalize)
        store, seconds = encoded.store, encoded.seconds
    borders = np.cumsum([len(part) for part in parts])[:-1]
    pieces = dict(zip(roles, map(np.asarray, np.split(store.X, borders)), strict=True))
    fingerprint = hashlib.sha256(f"{data.fingerprint} {store.fingerprint}".encode()).hexdigest()
    return data.mapped(pieces, fingerprint=fingerprint, features_seconds=seconds)


def _without_overlap(parts: Mapping[str, Examples], fingerprint: str, modality: InputKind) -> NDArray[np.int64]:
    """Rows of the training set that repeat no held-out example; looked for once per data set and machine."""
    path = cache_dir("overlap") / f"labelled-{fingerprint[:24]}.json"
    if not path.exists():
        held = [item for role, part in parts.items() if role != "train" for item in part.inputs]
        atomic_write_text(path, json.dumps(rows_apart(parts["train"].inputs.tolist(), held, modality)))
    return np.array(json.loads(path.read_text(encoding="utf-8")), dtype=np.int64)


def rows_apart(inputs: Sequence[Any], held: Sequence[Any], modality: InputKind) -> list[int]:  # Any: texts or images
    """Rows of ``inputs`` that repeat nothing held out: of texts exactly or nearly, of images pixel by pixel."""
    if modality == "image":
        seen = {pixel_digest(image) for image in held}
        return [row for row, image in enumerate(inputs) if pixel_digest(image) not in seen]
    own = [Document(str(row), text, {}) for row, text in enumerate(inputs)]
    return [int(document.id) for document in drop_overlap(own, [Document("", text, {}) for text in held]).kept]


def _fingerprint(parts: Sequence[Examples]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        inputs = [hashlib.sha256(i).hexdigest() if isinstance(i, bytes) else i for i in part.inputs.tolist()]
        digest.update(json.dumps([inputs, part.labels.tolist()]).encode())
        if part.groups is not None:
            digest.update(json.dumps(part.groups.tolist()).encode())
    return digest.hexdigest()
