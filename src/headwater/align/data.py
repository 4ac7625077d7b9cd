"""Prompts with checked answers: reading them, and splitting them by what they say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from headwater.core.recipe import DataRef
from headwater.modalities.text.docs import CorpusError, Document, drop_overlap, split_sides
from headwater.modalities.text.sources import open_labelled
from headwater.modalities.text.verifiable import Item, read_builtin

__all__ = ["AlignData", "content_key", "read_data"]


def content_key(prompt: str) -> str:
    """What decides the side on which a prompt stands: its words, case aside."""
    return " ".join(prompt.casefold().split())


@dataclass(frozen=True, eq=False)
class AlignData:
    """Prompts with checked answers.

    Attributes:
        train: what may be learned from.
        validation: what hyperparameters may be chosen by.
        test: what the figures are taken on; methods never see it.
        fingerprint: of all prompts and answers.
        dropped: training and validation prompts left out because they repeat a held-out one.

    Raises:
        ValueError: a set is empty, or a prompt stands in two of them.
    """

    train: tuple[Item, ...]
    validation: tuple[Item, ...]
    test: tuple[Item, ...]
    fingerprint: str
    dropped: int = 0

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for role in ("train", "validation", "test"):
            items: tuple[Item, ...] = getattr(self, role)
            if not items:
                raise ValueError(f"{role}: no examples; give more data or other shares.")
            for item in items:
                if seen.setdefault(content_key(item.prompt), role) != role:
                    raise ValueError(f"the prompt {item.prompt[:60]!r} stands in two sets, {role} among them.")


def read_data(data: DataRef, test: DataRef | None, *, held_out: float, validation: float) -> AlignData:
    """Read prompts and split them by a hash of their words.

    Training prompts that repeat a held-out one are left out, nearly alike ones too, unless the prompts are generated
    (there, another number is another problem).

    Args:
        data: prompts and answers, or a builtin task, ``headwater:verifiable/NAME``.
        test: prompts for the figures; without it, ``held_out`` of ``data``.
        held_out: share for the test.
        validation: share for choosing.

    Raises:
        CorpusError: nothing there, or no such column.
        ValueError: a set is empty.
    """
    items = _read(data, "data")
    sides = split_sides(
        [content_key(item.prompt) for item in items],
        (1 - validation - (0 if test else held_out), validation, 0 if test else held_out),
        "align",
    )
    train, valid, tested = ([item for item, at in zip(items, sides, strict=True) if at == side] for side in range(3))
    if test is not None:
        tested = _read(test, "test")
    digest = hashlib.blake2b(digest_size=16)
    for part in (train, valid, tested):
        digest.update(json.dumps([[item.prompt, item.gold, str(item.answer)] for item in part]).encode())
    near = data.kind != "builtin"
    kept_valid = _without(valid, tested, near=near)
    kept_train = _without(train, [*kept_valid, *tested], near=near)
    dropped = len(train) + len(valid) - len(kept_train) - len(kept_valid)
    return AlignData(tuple(kept_train), tuple(kept_valid), tuple(tested), digest.hexdigest(), dropped)


def _read(ref: DataRef, role: str) -> list[Item]:
    if ref.kind == "builtin":
        try:
            return read_builtin(ref.name.removeprefix("headwater:"), ref.limit)
        except ValueError as error:
            raise CorpusError(f"{role}: {error}") from None
    texts, answers = open_labelled(ref, role=role)
    return [Item(text, answer, answer, {}) for text, answer in zip(texts, answers, strict=True)]


def _without(items: Sequence[Item], held: Sequence[Item], *, near: bool) -> list[Item]:
    keys = {content_key(item.prompt) for item in held}
    kept = [item for item in items if content_key(item.prompt) not in keys]
    if not near:
        return kept
    documents = [Document(str(place), item.prompt) for place, item in enumerate(kept)]
    apart = drop_overlap(documents, [Document(str(place), item.prompt) for place, item in enumerate(held)]).kept
    return [kept[int(document.id)] for document in apart]
