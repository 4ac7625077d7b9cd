"""Many labelled data sets as one: is this description of a label true of this text?

A label is described by one question or several; a text with the label answers yes, one with another label of the same
data set no. Data sets on alike tasks share a group, and a group is trained on or held out as a whole: a question is
unseen only if no data set like its own was seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from headwater.adapt.data import text_key
from headwater.core.rng import numpy_generator

__all__ = ["LabelDescription", "build_meta_dataset", "check_groups", "group_split"]

Labelled = tuple[Sequence[str], Sequence[str]]
"""Texts and their labels."""


@dataclass(frozen=True)
class LabelDescription:
    """A question whose answer is yes for the texts of one label.

    Attributes:
        dataset: name of the data set.
        label: the label, as the data set writes it.
        question: such as "Is this review positive?".
        group: of alike data sets.
    """

    dataset: str
    label: str
    question: str
    group: str


def check_groups(trained: Mapping[str, str], held_out: Sequence[str]) -> None:
    """Refuse a group that is trained on and held out.

    Args:
        trained: data set -> group, of those trained on.
        held_out: groups that must stay unseen.

    Raises:
        ValueError: naming the group and the data sets.
    """
    for group in held_out:
        if both := sorted(name for name, own in trained.items() if own == group):
            raise ValueError(
                f"group {group!r} is held out, and data sets of it are trained on: {', '.join(both)}. Hold out the "
                "whole group, or give those data sets another."
            )


def group_split(
    descriptions: Sequence[LabelDescription], holdout_groups: Sequence[str]
) -> tuple[list[LabelDescription], list[LabelDescription]]:
    """Descriptions to train on, and those of whole groups that are held out.

    Raises:
        ValueError: a group that no description has, a data set in a group on either side, or nothing left to train on.
    """
    groups = {description.group for description in descriptions}
    if unknown := sorted(set(holdout_groups) - groups):
        raise ValueError(f"no description has the group {unknown[0]!r}; there are {', '.join(sorted(groups))}.")
    train = [description for description in descriptions if description.group not in holdout_groups]
    held = [description for description in descriptions if description.group in holdout_groups]
    if torn := sorted({d.dataset for d in train} & {d.dataset for d in held}):
        own = sorted({d.group for d in descriptions if d.dataset == torn[0]})
        raise ValueError(
            f"data set {torn[0]!r} has descriptions of groups {', '.join(own)}, which stand on both sides; give it one."
        )
    if not train:
        raise ValueError(f"holding out {', '.join(sorted(groups))} leaves nothing to train on.")
    return train, held


def build_meta_dataset(
    datasets: Mapping[str, Labelled],
    descriptions: Sequence[LabelDescription],
    *,
    per_label: int = 1000,
    seed: int = 0,
) -> Dataset:
    """Texts with a question each and its answer: of every described label as many yes as no.

    Args:
        datasets: texts and labels by name. A text may stand there more than once, with other labels.
        descriptions: of their labels; the texts of a label with several are dealt out among them in turn. A label
            without one gives texts to which the answer is no.
        per_label: at most so many texts of each label, so that large data sets do not dominate.
        seed: of the draw.

    Returns:
        Columns ``text``, ``question``, ``answer`` (1 for yes), ``dataset``, ``label`` and ``group``.

    Raises:
        ValueError: a data set or label that is not there, ``per_label`` below 2, one question for two labels of a data
            set, or a label for which every answer would be the same.
    """
    if per_label < 2:
        raise ValueError(f"per_label must be at least 2, one yes and one no; got {per_label}.")
    by_label: dict[tuple[str, str], list[LabelDescription]] = {}
    asked: dict[tuple[str, str], str] = {}
    for description in descriptions:
        if description.dataset not in datasets:
            raise ValueError(
                f"description {description.question!r}: no data set {description.dataset!r}; there are "
                f"{', '.join(datasets)}."
            )
        first = asked.setdefault((description.dataset, description.question), description.label)
        if first != description.label:
            raise ValueError(
                f"data set {description.dataset!r}: {description.question!r} describes {first!r} and "
                f"{description.label!r}; a question has one answer."
            )
        by_label.setdefault((description.dataset, description.label), []).append(description)
    rows: list[dict[str, str | int]] = []
    for (name, label), own in by_label.items():
        texts, labels = datasets[name]
        positive, negative = _sides(name, label, texts, labels)
        rng = numpy_generator(seed, "meta", name, label)
        count = min(len(positive), len(negative), per_label // 2)
        for answer, side in ((1, positive), (0, negative)):
            for place, row in enumerate(rng.permutation(side)[:count]):
                rows.append({"text": texts[row], "answer": answer, **asdict(own[place % len(own)])})
    if not rows:
        raise ValueError("there is no description to build questions from.")
    columns = ("text", "question", "answer", "dataset", "label", "group")
    return Dataset.from_dict({column: [row[column] for row in rows] for column in columns})


def _sides(
    name: str, label: str, texts: Sequence[str], labels: Sequence[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the texts of a label, each text once, and of those that never have it."""
    first: dict[str, int] = {}
    others: dict[str, int] = {}
    for row, (text, own) in enumerate(zip(texts, labels, strict=True)):
        (first if own == label else others).setdefault(text_key(text), row)
    if not first:
        raise ValueError(
            f"data set {name!r} has no text labelled {label!r}; labels: {', '.join(sorted(set(labels)))[:200]}."
        )
    negative = [row for key, row in others.items() if key not in first]
    if not negative:
        raise ValueError(
            f"data set {name!r}: the answer about {label!r} would be yes for every text; add texts of other labels."
        )
    return np.array(list(first.values())), np.array(negative)
