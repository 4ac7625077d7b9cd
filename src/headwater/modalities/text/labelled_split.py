"""Labelled texts in three parts, so that no text, nor one nearly like it, stands in two."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headwater.core.recipe import DataRef
from headwater.modalities.text.docs import CorpusError, Document, drop_overlap, split_sides
from headwater.modalities.text.sources import open_labelled

__all__ = ["LabelledSplit", "LabelledTexts", "read_labelled"]

MIN_TEST_TEXTS = 20
SALT = "labelled"


@dataclass(frozen=True, eq=False)
class LabelledTexts:
    """Texts and the index of each one's class, ``(n,)`` int64."""

    texts: Sequence[str]
    classes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.texts)

    def one_hot(self, classes: int) -> NDArray[np.float32]:
        """The labels as distributions, ``(n, classes)``."""
        found: NDArray[np.float32] = np.eye(classes, dtype=np.float32)[self.classes]
        return found


@dataclass(frozen=True, eq=False)
class LabelledSplit:
    """Labelled texts in three parts; no text, nor one nearly like it, stands in two.

    Attributes:
        labels: the classes by name, sorted.
        train, valid, test: ``valid`` may be empty where labels are few.
        fingerprint: of all texts and labels, before the split.
        dropped: texts that left because they repeat a held-out one.
    """

    labels: tuple[str, ...]
    train: LabelledTexts
    valid: LabelledTexts
    test: LabelledTexts
    fingerprint: str
    dropped: int


def read_labelled(
    data: DataRef, test: DataRef | None, *, held_out: float, validation: float, role: str = "labelled"
) -> LabelledSplit:
    """Read labelled texts and split them by a hash of their words.

    Args:
        data: texts and labels.
        test: texts and labels for the figures; without it, ``held_out`` of ``data``.
        held_out: share of ``data`` for the test.
        validation: share of ``data`` to choose by.
        role: what errors call the texts.

    Raises:
        CorpusError: nothing there, no such column, fewer than two classes, a class with one text to learn from, a label
            of held-out texts that is new, or a test too small to say anything.
    """
    texts, names = open_labelled(data, role=role)
    pairs = list(zip(texts, names, strict=True))
    tested = 0.0 if test else held_out
    keys = [" ".join(text.casefold().split()) for text in texts]
    sides = split_sides(keys, (1 - validation - tested, validation, tested), SALT)
    train, valid, held = ([pair for pair, at in zip(pairs, sides, strict=True) if at == side] for side in range(3))
    if test is not None:
        held = list(zip(*open_labelled(test, role=f"{role}_test"), strict=True))
    digest = hashlib.blake2b(json.dumps([train, valid, held]).encode(), digest_size=16).hexdigest()
    apart_valid = _apart(valid, held)
    apart_train = _apart(train, [*apart_valid, *held])
    labels = tuple(sorted({label for _, label in apart_train}))
    _check_classes(role, labels, apart_train, [*apart_valid, *held])
    if len(held) < MIN_TEST_TEXTS:
        raise CorpusError(
            f"{role}: the test has {len(held)} texts; at least {MIN_TEST_TEXTS} are needed for a figure that means "
            "something. Give texts to test on, more labelled texts, or hold out a larger share."
        )
    dropped = len(train) + len(valid) - len(apart_train) - len(apart_valid)
    code = {label: index for index, label in enumerate(labels)}

    def coded(part: Sequence[tuple[str, str]]) -> LabelledTexts:
        return LabelledTexts([text for text, _ in part], np.array([code[label] for _, label in part], dtype=np.int64))

    return LabelledSplit(labels, coded(apart_train), coded(apart_valid), coded(held), digest, dropped)


def _apart(pairs: Sequence[tuple[str, str]], held: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    documents = [Document(str(place), text) for place, (text, _) in enumerate(pairs)]
    kept = drop_overlap(documents, [Document(str(place), text) for place, (text, _) in enumerate(held)]).kept
    return [pairs[int(document.id)] for document in kept]


def _check_classes(
    role: str, labels: Sequence[str], train: Sequence[tuple[str, str]], held: Sequence[tuple[str, str]]
) -> None:
    if len(labels) < 2:
        raise CorpusError(f"{role}: a classifier needs two classes; found {', '.join(labels) or 'none'}.")
    counts = {label: sum(label == other for _, other in train) for label in labels}
    if min(counts.values()) < 2:
        alone = min(counts, key=counts.__getitem__)
        raise CorpusError(
            f"{role}: class {alone!r} has one text to learn from; give it another, or leave the class out."
        )
    if new := sorted({label for _, label in held} - set(labels)):
        raise CorpusError(
            f"{role}: no training text has the label {new[0]!r}, which a held-out one has; there are "
            f"{', '.join(labels)}."
        )
