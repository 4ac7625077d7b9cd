"""Clean text with planted web debris, and the program that takes it out again: annotations whose truth is known.

Half of the planted lines are navigation phrases of whole words with terminal punctuation, which filter rules let pass;
the others are addresses and character soup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headwater.core.rng import numpy_generator
from headwater.modalities.text.docs import Document
from headwater.modalities.text.docstrings import docstring_corpus

__all__ = ["ANNOTATED", "Dirty", "annotated_docstrings", "debris_line", "plant"]

ANNOTATED = ("networkx", "matplotlib")
DEBRIS, PURE = 0.4, 0.1

_BEGIN = "Click here to;Sign in to;Subscribe now to;Scroll down to;Tap the button to;Register today to;Follow us to"
_DO = (
    "read the full story;see more offers;leave a comment;share this page;get our newsletter;view your account;"
    "download the app;win great prizes;save your favourites;join the discussion;watch the video;compare all prices"
)
_WHERE = (
    "on our partner site;in your inbox;with your friends;before midnight;at no cost;from your phone;"
    "in the members area;this week only;without leaving home;as a registered reader"
)
_TOPIC = "sports;travel;fashion;gardening;celebrities;recipes;weather;politics;horoscopes;health;motoring;lifestyle"
_MONTH = "January;February;March;April;May;June;July;August;September;October;November;December"
_ONSETS, _VOWELS = "bcdfghklmnprstvwz", "aeiou"
_SOUP = "aeinorstEX0123456789#$%&*+/<=>@^_|~;:"


def debris_line(rng: np.random.Generator) -> str:
    """A line of debris: half of them phrases that rules let pass, a quarter addresses, a quarter soup."""
    kind = rng.random()
    return _phrase(rng) if kind < 0.5 else _address(rng) if kind < 0.75 else _soup(rng)


def _phrase(rng: np.random.Generator) -> str:
    def one(words: str) -> str:
        return str(rng.choice(words.split(";")))

    match int(rng.integers(5)):
        case 0:
            return f"Copyright by {_name(rng)} media and partners, all rights reserved."
        case 1:
            return f"Posted by {_name(rng)} in {one(_TOPIC)} on a sunny day of {one(_MONTH)}."
        case 2:
            return f"You may also like these stories about {one(_TOPIC)} and {one(_TOPIC)}."
        case _:
            return f"{one(_BEGIN)} {one(_DO)} {one(_WHERE)}{one('.;!')}"


def _name(rng: np.random.Generator) -> str:
    count = int(rng.integers(2, 4))
    return "".join(rng.choice(list(_ONSETS)) + rng.choice(list(_VOWELS)) for _ in range(count)).capitalize()


def _address(rng: np.random.Generator) -> str:
    path = "/".join(_name(rng).lower() for _ in range(int(rng.integers(1, 4))))
    return f"https://www.{_name(rng).lower()}.com/{path}?id={int(rng.integers(10**6))}"


def _soup(rng: np.random.Generator) -> str:
    words = ["".join(rng.choice(list(_SOUP), int(rng.integers(2, 9)))) for _ in range(int(rng.integers(3, 9)))]
    return " ".join(words)


@dataclass(frozen=True)
class Dirty:
    """A document with debris.

    Attributes:
        id: of the document.
        text: with debris.
        gone: which of its lines are debris, ``(lines,)``.
        clean: without; empty where it is debris alone.
    """

    id: str
    text: str
    gone: NDArray[np.bool_]
    clean: str

    @property
    def program(self) -> str:
        """What removes the debris and nothing else, in ProX's language."""
        if self.gone.all():
            return "drop_doc()"
        return "\n".join(f"remove_lines(line_start={i}, line_end={i})" for i in np.flatnonzero(self.gone))


def plant(documents: Sequence[Document], rng: np.random.Generator) -> list[Dirty]:
    """Two further lines in five between those of every document, and documents of debris alone, a tenth of all."""
    found = []
    for document in documents:
        lines = document.text.split("\n")
        count = max(1, round(DEBRIS * sum(bool(line.strip()) for line in lines)))
        gone = np.zeros(len(lines) + count, bool)
        gone[rng.choice(len(gone), count, replace=False)] = True
        mixed = iter(lines)
        dirty = [debris_line(rng) if bad else next(mixed) for bad in gone]
        found.append(Dirty(document.id, "\n".join(dirty), gone, document.text))
        if rng.random() < PURE / (1 - PURE):
            pure = [debris_line(rng) for _ in range(int(rng.integers(5, 25)))]
            found.append(Dirty(f"{document.id}/debris", "\n".join(pure), np.ones(len(pure), bool), ""))
    return found


def annotated_docstrings(limit: int = 300, seed: int = 0) -> list[Document]:
    """Docstrings of two packages with planted debris; ``meta["program"]`` is the program that removes it.

    Raises:
        CorpusError: the packages are not installed.
    """
    rng = numpy_generator(seed, "debris")
    documents = docstring_corpus(ANNOTATED)
    dirty = plant([documents[i] for i in rng.permutation(len(documents))[:limit]], rng)[:limit]
    return [Document(d.id, d.text, {"program": d.program}) for d in dirty]
