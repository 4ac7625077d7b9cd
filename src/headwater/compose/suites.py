"""Suites: what a composed model must still be able to do, each a data set with one figure and its direction."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwater.core.leak import Sealed
from headwater.core.recipe import CorpusRef, DataRef, Spec
from headwater.modalities.text.docs import CorpusError, Document, fingerprint, split_documents
from headwater.modalities.text.score import bits_per_byte, choice_scores
from headwater.modalities.text.sources import open_corpus, open_labelled

__all__ = ["BitsSuite", "ChoiceSuite", "Score", "Scorer", "Suite", "SuiteRef", "retention"]

MIN_ITEMS = 20


@dataclass(frozen=True, eq=False)
class Score:
    """A model on one side (validation or test) of a suite.

    Attributes:
        value: the suite's figure.
        items: ``(items,)``, whose mean is ``value``.
        details: further figures on the same items.
    """

    value: float
    items: NDArray[np.float64]
    details: dict[str, float]

    def to_dict(self) -> dict[str, Any]:  # Any: JSON data
        """Plain JSON data."""
        return {"value": self.value, "items": self.items.tolist(), "details": self.details}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Score:  # Any: JSON data
        """The inverse of ``to_dict``."""
        return cls(data["value"], np.array(data["items"]), data["details"])


Scorer = Callable[[PreTrainedModel, PreTrainedTokenizerBase], Score]


@dataclass(frozen=True, eq=False)
class Suite:
    """An opened suite.

    Attributes:
        direction: which way its figure is better. ``higher``: a score; ``lower``: a loss.
        fingerprint: of everything that its figures depend on but the model.
        ids: of the test items.
        valid: scores a causal model on the items that may be chosen by.
        test: scores it on the items of the final figure.
        texts: the test items of a suite of plain text.
    """

    direction: Literal["higher", "lower"]
    fingerprint: str
    ids: list[str]
    valid: Scorer
    test: Scorer | Sealed
    texts: Sequence[Document] | Sealed = ()

    def sealed(self, name: str) -> Suite:
        """The same suite without its test side, as a method's hook gets it."""
        shut = Sealed(f"the test side of suite {name!r}")
        return replace(self, test=shut, texts=shut)


class BitsSuite(Spec):
    """How well held-out text is predicted."""

    kind: Literal["bits_per_byte"] = Field(
        default="bits_per_byte", description="figure: bits per byte, lower is better"
    )
    corpus: CorpusRef = Field(
        description="texts; split by document as in continued pretraining, only held-out ones are read"
    )
    held_out: float = Field(
        default=0.1, gt=0, lt=0.5, description="share of documents in the test set, half of it in validation"
    )
    eval_chars: int = Field(
        default=100_000, gt=0, description="characters of each side that are scored, at least 20 documents"
    )

    def open(self, name: str) -> Suite:
        """Read and split the corpus.

        Raises:
            CorpusError: too few documents to score.
        """
        fractions = (1 - 1.5 * self.held_out, 0.5 * self.held_out, self.held_out)
        split = split_documents(open_corpus(self.corpus, role=f"suite {name}"), fractions)
        valid, test = _first(split.valid, self.eval_chars), _first(split.test, self.eval_chars)
        _check_size(name, valid, test)
        mark = _digest("bits", fingerprint(valid), fingerprint(test))
        return Suite("lower", mark, [d.id for d in test], partial(_bits, valid), partial(_bits, test), test)


class ChoiceSuite(Spec):
    """Prompts with one right answer out of the labels that occur."""

    kind: Literal["choice"] = Field(default="choice", description="figure: see `metric`")
    data: DataRef = Field(
        description="`input_field` holds prompts, `label_field` answers; a space between them is the answer's"
    )
    metric: Literal["exact", "accuracy", "cross_entropy"] = Field(
        default="accuracy",
        description="`accuracy`: the right label is the likeliest one; `exact`: greedy decoding gives it and stops; "
        "`cross_entropy`: nats per token of the right label, lower is better",
    )
    valid_share: float = Field(
        default=0.3, gt=0, lt=1, description="share of the prompts that hyperparameters may be chosen by"
    )

    def open(self, name: str) -> Suite:
        """Read the prompts and split them by a hash of their text.

        Raises:
            CorpusError: too few prompts to score, or one label only.
        """
        prompts, answers = open_labelled(self.data, role=f"suite {name}")
        labels = sorted(set(answers))
        if len(labels) < 2:
            raise CorpusError(f"suite {name}: the answers must differ; there is only {', '.join(labels) or 'none'}.")
        rows = [Document(_digest(prompt), prompt, {"answer": a}) for prompt, a in zip(prompts, answers, strict=True)]
        split = split_documents(rows, (0.0, self.valid_share, 1 - self.valid_share))
        valid, test = split.valid, split.test
        _check_size(name, valid, test)
        mark = _digest("choice", self.metric, fingerprint(valid), fingerprint(test), *(r.meta["answer"] for r in rows))
        direction: Literal["higher", "lower"] = "lower" if self.metric == "cross_entropy" else "higher"
        choose, judge = (partial(_choice, side, labels, self.metric) for side in (valid, test))
        return Suite(direction, mark, [row.id for row in test], choose, judge)


SuiteRef = Annotated[BitsSuite | ChoiceSuite, Field(discriminator="kind")]
"""A suite in a recipe, told apart by ``kind``."""


def _bits(documents: Sequence[Document], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Score:
    scored = bits_per_byte(model, tokenizer, documents)
    return Score(scored.bits_per_byte, scored.nats / np.log(2) / scored.counts.mean(), {})


def _choice(
    rows: Sequence[Document],
    labels: Sequence[str],
    metric: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Score:
    answers = [labels.index(row.meta["answer"]) for row in rows]
    scored = choice_scores(model, tokenizer, [row.text for row in rows], answers, labels)
    found = {"exact": scored.exact, "accuracy": scored.accuracy, "cross_entropy": scored.cross_entropy}
    details = {name: float(values.mean()) for name, values in {**found, "form": scored.form}.items()}
    return Score(details[metric], found[metric], details)


def retention(composed: float, best: float, direction: Literal["higher", "lower"]) -> float:
    """What a composed model keeps of the best part, 1 where it is as good: a ratio in which more is better.

        composed / best (scores)        best / composed (losses)

    Args:
        composed: the composed model's figure, >= 0.
        best: that of the part that does best on the suite, >= 0.
        direction: of the figure.

    Raises:
        ValueError: the best score, or the composed loss, is 0, so that the ratio has no meaning.
    """
    over, under = (composed, best) if direction == "higher" else (best, composed)
    if under <= 0:
        raise ValueError(f"retention is a ratio of positive figures; got {composed} against the best part's {best}.")
    return over / under


def _first(documents: Sequence[Document], chars: int) -> list[Document]:
    chosen: list[Document] = []
    total = 0
    for document in documents:
        if total >= chars and len(chosen) >= MIN_ITEMS:
            break
        chosen.append(document)
        total += len(document.text)
    return chosen


def _check_size(name: str, *sides: Sequence[Document]) -> None:
    valid, test = map(len, sides)
    if valid < MIN_ITEMS // 2 or test < MIN_ITEMS:
        raise CorpusError(
            f"suite {name}: {valid} items to choose by and {test} to test on; at least {MIN_ITEMS // 2} and "
            f"{MIN_ITEMS} are needed for a figure that means something. Give more data, or split it otherwise."
        )


def _digest(*parts: str) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
