"""Entities of documents, the pairs and triples of them, and texts that a generator writes about each.

n entities -> n (n - 1) / 2 pairs and n (n - 1) (n - 2) / 6 triples, each unordered and once
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from math import comb
from typing import Any, Literal, overload

import numpy as np

from headwater.core.order import permutation
from headwater.core.rng import derive_seed
from headwater.corpora.entigraph_prompts import Prompts, split_document
from headwater.modalities.text.docs import Document
from headwater.modalities.text.generate import Generator, Message, Reply, Request
from headwater.modalities.text.generate_json import Parsed, generate_json

__all__ = [
    "EntityList",
    "RelationPlan",
    "Style",
    "Written",
    "breadth_first",
    "extract_entities",
    "most_telling",
    "named",
    "pieces_of",
    "relate",
    "rephrase",
]

Style = Literal["easy", "medium", "hard"]

TOGETHER = 8
"""Relations of one document that are asked for in a row, once every document has had its first."""

REFUSAL_CHARS = 300
_REFUSAL = re.compile(
    r"\W*(i['’]?m sorry|i am sorry|sorry[,.]|i can(no|['’])t|i['’]?m unable|i am unable|as an ai)\b", re.I
)


# -- entities


@dataclass(frozen=True)
class EntityList:
    """What a generator found in a document.

    Attributes:
        source_id: the document's id.
        summary: in the generator's words; of a document in pieces, one paragraph for each.
        entities: names, no two alike but for case and white space.
        absent: those of them that do not occur in the document's text.
        error: why there are none, where the generator gave no usable answer.
    """

    source_id: str
    summary: str
    entities: tuple[str, ...]
    absent: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class _Found:
    """The answer that is asked for."""

    entities: list[str]
    summary: str = ""


def extract_entities(
    generator: Generator,
    documents: Iterable[Document],
    *,
    max_entities: int = 40,
    prompts: Prompts | None = None,
    document_tokens: int = 8000,
    reply_tokens: int = 2048,
    repair: int = 2,
) -> Iterator[EntityList]:
    """List the entities of documents, one ``EntityList`` each, in order; documents are read lazily.

    Args:
        generator: what reads.
        documents: of any length.
        max_entities: of a document; the first ones, of its pieces in turn.
        prompts: other words than ours.
        document_tokens: a longer document is shown in pieces, and their entities are merged.
        reply_tokens: at most so many for an answer.
        repair: how often an answer that is no such JSON is asked for again.

    Raises:
        ValueError: a count is not positive.
        GeneratorError: see ``Generator.generate``.
    """
    prompts = prompts or Prompts()
    if max_entities < 2:
        raise ValueError(f"max_entities must be >= 2; got {max_entities}.")
    waiting: deque[tuple[Document, int]] = deque()

    def requests() -> Iterator[Request]:
        for document in documents:
            pieces = pieces_of(generator, document, document_tokens)
            waiting.append((document, len(pieces)))
            for piece in pieces:
                yield Request(prompts.messages("extract", piece), reply_tokens, tag="extract")

    answers = generate_json(generator, requests(), _Found, repair)
    for first in answers:
        document, count = waiting.popleft()
        yield _merged(document, [first, *islice(answers, count - 1)], max_entities)


def _merged(document: Document, answers: Sequence[Parsed[_Found]], most: int) -> EntityList:
    found = [answer.value for answer in answers if answer.value is not None]
    if not found:
        return EntityList(document.id, "", (), error=answers[0].error)
    in_turn = chain.from_iterable(zip_longest(*(value.entities for value in found), fillvalue=""))
    summary = "\n\n".join(value.summary.strip() for value in found).strip()
    return named(document, in_turn, summary, most)


def named(document: Document, names: Iterable[str], summary: str = "", most: int | None = None) -> EntityList:
    """An ``EntityList`` of names from anywhere: blank and equal ones are left out, absent ones are marked."""
    first: dict[str, str] = {}
    for name in names:
        if key := _folded(name):
            first.setdefault(key, " ".join(name.split()))
    kept = list(islice(first.items(), most))
    text = _folded(f"{document.meta.get('title') or ''} {document.text}")
    absent = tuple(name for key, name in kept if key not in text)
    return EntityList(document.id, summary, tuple(name for _, name in kept), absent)


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def pieces_of(generator: Generator, document: Document, document_tokens: int) -> list[Document]:
    """A document as the generator is shown it: whole, or in pieces that the generator itself counts as short enough."""

    def count(text: str) -> int:
        return generator.count_prompt(Request((Message("user", text),)))[0]

    return split_document(document, document_tokens, count)


def most_telling(pieces: Sequence[Document], entities: Sequence[str]) -> Document:
    """The first of the pieces that name most of the entities."""
    keys = [_folded(name) for name in entities]
    return max(pieces, key=lambda piece: sum(key in _folded(piece.text) for key in keys)) if pieces[1:] else pieces[0]


# -- pairs and triples


class RelationPlan(Sequence[tuple[str, ...]]):
    """Pairs, then triples of a document's entities, each once; a sequence, so that it goes on from any index.

    Args:
        entities: names, no two equal.
        pairs: how many; ``all`` of them.
        triples: likewise.
        order: ``shuffled``: both in an order drawn from the seed, so that the first few are a fair sample;
            ``reference``: pairs in the order of the entities, triples shuffled, as in the authors' code.
        seed: of the order.

    Raises:
        ValueError: two entities are equal, or a count is negative.

    Example:
        >>> list(RelationPlan(["a", "b", "c"], order="reference"))
        [('a', 'b'), ('a', 'c'), ('b', 'c'), ('a', 'b', 'c')]
    """

    def __init__(
        self,
        entities: Sequence[str],
        *,
        pairs: int | Literal["all"] = "all",
        triples: int | Literal["all"] = "all",
        order: Literal["shuffled", "reference"] = "shuffled",
        seed: int = 0,
    ) -> None:
        if len(set(entities)) < len(entities):
            raise ValueError(f"entities must differ; got {list(entities)}.")
        self.entities, self.order, self.seed = tuple(entities), order, seed
        n = len(entities)
        self.pairs, self.triples = (
            comb(n, size) if wanted == "all" else min(wanted, comb(n, size))
            for size, wanted in ((2, pairs), (3, triples))
        )
        if self.pairs < 0 or self.triples < 0:
            raise ValueError(f"pairs and triples must be >= 0, or 'all'; got {pairs} and {triples}.")
        self._pair_order = None if order == "reference" else permutation(derive_seed(seed, "pairs"), 0, comb(n, 2))
        triples_drawn = permutation(derive_seed(seed, "triples"), 0, comb(n, 3) if self.triples else 0)
        self._triple_order = triples_drawn.astype(np.int32)  # kept for every document

    def __len__(self) -> int:
        return self.pairs + self.triples

    @overload
    def __getitem__(self, index: int) -> tuple[str, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, ...] | list[tuple[str, ...]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside a plan of {len(self)}.")
        index %= len(self)
        if index < self.pairs:
            rank, size = index if self._pair_order is None else int(self._pair_order[index]), 2
        else:
            rank, size = int(self._triple_order[index - self.pairs]), 3
        return tuple(self.entities[i] for i in _combination(rank, len(self.entities), size))

    @property
    def about(self) -> dict[str, Any]:  # Any: JSON data
        """Everything that decides the plan."""
        return {
            "entities": list(self.entities),
            "pairs": self.pairs,
            "triples": self.triples,
            "order": self.order,
            "seed": self.seed,
        }


def _combination(rank: int, n: int, size: int) -> list[int]:
    """The ``rank``-th of the ``size``-subsets of ``range(n)`` in lexicographic order."""
    chosen: list[int] = []
    for item in range(n):
        if len(chosen) == size:
            break
        following = comb(n - item - 1, size - len(chosen) - 1)
        if rank < following:
            chosen.append(item)
        else:
            rank -= following
    return chosen


def breadth_first(plans: Sequence[RelationPlan]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """All relations of all documents, so that wherever it is cut, every document had its share.

    Yields:
        (number of the document, entities): the first relation of every document, then ``TOGETHER`` of each in turn,
        which a server with a cache of prompts answers after reading the document once.
    """
    begin, end = 0, 1
    while any(begin < len(plan) for plan in plans):
        for number, plan in enumerate(plans):
            for entities in plan[begin:end]:
                yield number, entities
        begin, end = end, end + TOGETHER


# -- texts


@dataclass(frozen=True)
class Written:
    """A text that was written.

    Attributes:
        document: the text, with ``source_id`` and ``kind`` in its meta, and ``entities`` or ``style``.
        reply: as it came.
        error: why the text cannot be used: the request failed, or the reply is empty or a refusal.
    """

    document: Document
    reply: Reply
    error: str | None


def relate(
    generator: Generator,
    relations: Iterable[tuple[Document, Sequence[str]]],
    *,
    prompts: Prompts | None = None,
    reply_tokens: int = 1024,
    temperature: float = 1.0,
) -> Iterator[Written]:
    """Write about the documents' entities, a text for each relation, in order; relations are read lazily.

    Args:
        generator: what writes.
        relations: a document, and two or three names of what occurs in it.
        prompts: other words than ours.
        reply_tokens: of a text, at most.
        temperature: of drawing.

    Raises:
        ValueError: a relation of other than two or three entities.
        GeneratorError: see ``Generator.generate``.
    """
    words = prompts or Prompts()

    def drafts() -> Iterator[tuple[Request, Document]]:
        for document, entities in relations:
            if len(entities) not in (2, 3):
                raise ValueError(f"a relation has two or three entities; got {list(entities)}.")
            kind = "pair" if len(entities) == 2 else "triple"
            meta = {"source_id": document.id, "kind": kind, "entities": list(entities)}
            request = Request(words.messages("relate", document, entities), reply_tokens, temperature, tag="relate")
            yield request, Document(f"{document.id}: {', '.join(entities)}", "", meta)

    return _written(generator, drafts())


def rephrase(
    generator: Generator,
    documents: Iterable[Document],
    *,
    styles: Sequence[Style] = ("easy", "medium", "hard"),
    samples: int = 1,
    prompts: Prompts | None = None,
    reply_tokens: int = 1024,
    temperature: float = 1.0,
) -> Iterator[Written]:
    """Retell documents whole: what the paper compares with. ``samples`` draws of each style; see ``relate``."""
    words = prompts or Prompts()

    def drafts() -> Iterator[tuple[Request, Document]]:
        for document in documents:
            for style in styles:
                for sample in range(samples):
                    meta = {"source_id": document.id, "kind": "rephrase", "style": style}
                    messages = words.messages(style, document)
                    request = Request(messages, reply_tokens, temperature, sample=sample, tag=f"rephrase {style}")
                    yield request, Document(f"{document.id}: {style} {sample}", "", meta)

    return _written(generator, drafts())


def _written(generator: Generator, drafts: Iterator[tuple[Request, Document]]) -> Iterator[Written]:
    waiting: deque[Document] = deque()

    def requests() -> Iterator[Request]:
        for request, draft in drafts:
            waiting.append(draft)
            yield request

    for reply in generator.generate(requests()):
        draft = waiting.popleft()
        meta = {**draft.meta, "model": reply.model}
        yield Written(Document(draft.id, reply.text.strip(), meta), reply, _unusable(reply))


def _unusable(reply: Reply) -> str | None:
    if reply.finish == "error":
        return reply.error or "no reply"
    text = reply.text.strip()
    if not text:
        return "the reply is empty"
    return "the generator refused" if len(text) < REFUSAL_CHARS and _REFUSAL.match(text) else None
