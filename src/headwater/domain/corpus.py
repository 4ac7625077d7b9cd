"""The two corpora of a run: split by document, cleaned of overlap, tokenised once per machine."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from headwater.core.cache import cache_dir, cache_key, cached_json
from headwater.core.leak import Sealed
from headwater.core.recipe import CorpusRef
from headwater.modalities.text.docs import CorpusError, Document, drop_overlap, fingerprint, split_sides
from headwater.modalities.text.document_store import DocumentStore, stored_corpus, text_digest
from headwater.modalities.text.packing import TokenStore, tokenize_documents

__all__ = ["Corpus", "Prepared", "held_out_sample", "prepare", "tokenized"]

logger = logging.getLogger(__name__)

MIN_HELD_OUT_DOCUMENTS = 20
MIN_HELD_OUT_BYTES = 20_000
OVERLAP_CHUNK = 20_000
"""Training documents that are compared with the held-out ones at a time; bounds memory."""
SHARED_LIMIT = 0.3
"""Domain and general text with more documents in common than this share are taken for one corpus given twice."""


@dataclass(frozen=True)
class Corpus:
    """What a method may read of a corpus. ``test`` is sealed: touching it raises ``TestLeak``."""

    name: str
    train: DocumentStore
    valid: DocumentStore
    fingerprint: str
    test: Sealed = field(default_factory=lambda: Sealed("the test set"))


@dataclass(frozen=True)
class Prepared:
    """Both corpora, with the test documents that only the evaluation gets.

    ``dropped`` counts training documents that repeat a held-out one, ``documents`` what is left, per corpus.
    """

    domain: Corpus
    general: Corpus | None
    domain_test: Sequence[Document]
    general_test: Sequence[Document]
    dropped: int


def prepare(domain: CorpusRef, general: CorpusRef | None, *, held_out: float) -> Prepared:
    """Read, split by a hash of the document's id, and drop from training what repeats held-out text.

    The split does not depend on the recipe's seed: every contestant and every seed is scored on the same documents.

    Args:
        domain: texts to adapt to.
        general: texts not to forget, or None.
        held_out: share of the documents in each test set; half of it again goes to validation.

    Raises:
        CorpusError: an empty corpus, one given twice, or held-out sets too small to score.
    """
    read = {"domain": stored_corpus(domain, role="domain")}
    if general is not None:
        read["general"] = stored_corpus(general, role="general")
        _refuse_same(read["domain"], read["general"])
    fractions = (1 - 1.5 * held_out, 0.5 * held_out, held_out)
    splits = {role: _split(documents, fractions) for role, documents in read.items()}
    for role, split in splits.items():
        _check_held_out(role, split.test, len(read[role]), held_out)
    prints = {role: documents.fingerprint for role, documents in read.items()}
    about = {"prints": prints, "held_out": held_out, "version": 2}
    repeats: dict[str, list[int]] = cached_json("overlap", about, lambda: _repeats(splits))
    corpora = {}
    for role, split in splits.items():
        train = split.train.select(np.setdiff1d(np.arange(len(split.train)), repeats[role]))
        if not train:
            raise CorpusError(
                f"{role}: every training document repeats a held-out one; the corpus holds nothing to train on"
            )
        corpora[role] = Corpus(role, train, split.valid, prints[role])
    return Prepared(
        corpora["domain"],
        corpora.get("general"),
        splits["domain"].test,
        splits["general"].test if "general" in splits else (),
        sum(len(positions) for positions in repeats.values()),
    )


class _Split(NamedTuple):
    train: DocumentStore
    valid: DocumentStore
    test: DocumentStore


def _split(documents: DocumentStore, fractions: tuple[float, float, float]) -> _Split:
    sides = split_sides(documents.ids(), fractions)
    train, valid, test = (documents.select(np.flatnonzero(sides == side)) for side in range(3))
    return _Split(train, valid, test)


def _repeats(splits: Mapping[str, _Split]) -> dict[str, list[int]]:
    """Positions of the training documents that repeat a held-out document of either corpus."""
    held = [document for split in splits.values() for side in (split.valid, split.test) for document in side]
    found: dict[str, list[int]] = {}
    for role, split in splits.items():
        found[role] = []
        for begin in range(0, len(split.train), OVERLAP_CHUNK):
            chunk = list(split.train[begin : begin + OVERLAP_CHUNK])
            kept = {id(document) for document in drop_overlap(chunk, held).kept}
            found[role] += [begin + i for i, document in enumerate(chunk) if id(document) not in kept]
    return found


def _refuse_same(domain: DocumentStore, general: DocumentStore) -> None:
    texts = {text_digest(document.text) for document in general}
    shared = sum(text_digest(document.text) in texts for document in domain)
    if shared > SHARED_LIMIT * len(domain):
        raise CorpusError(
            f"{shared / len(domain):.0%} of the domain's documents stand in the general corpus too. They must be "
            "different texts, or forgetting cannot be told from learning."
        )


def _check_held_out(role: str, test: Sequence[Document], total: int, held_out: float) -> None:
    size = sum(len(document.text.encode("utf-8", "surrogatepass")) for document in test)
    if len(test) < MIN_HELD_OUT_DOCUMENTS or size < MIN_HELD_OUT_BYTES:
        raise CorpusError(
            f"{role}: the held-out test set has {len(test)} documents and {size} bytes; at least "
            f"{MIN_HELD_OUT_DOCUMENTS} documents and {MIN_HELD_OUT_BYTES} bytes are needed for a figure that means "
            f"something. The corpus has {total} documents: give more, or raise held_out (now {held_out})."
        )


def held_out_sample(
    documents: Sequence[Document], chars: int, *, at_least: int = MIN_HELD_OUT_DOCUMENTS
) -> list[Document]:
    """The first documents until ``chars`` characters are reached, and ``at_least`` so many in any case."""
    chosen: list[Document] = []
    total = 0
    for document in documents:
        if total >= chars and len(chosen) >= at_least:
            break
        chosen.append(document)
        total += len(document.text)
    return chosen


def _fingerprint(documents: Sequence[Document]) -> str:
    return documents.fingerprint if isinstance(documents, DocumentStore) else fingerprint(documents)


def tokenized(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> TokenStore:
    """The documents' tokens, memory-mapped from the user cache, where they are written once per text and tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    about = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    key = cache_key({"documents": _fingerprint(documents), "tokenizer": hashlib.sha256(about.encode()).hexdigest()})
    target = cache_dir("tokens") / key
    if not (target / "store.json").exists():
        working = cache_dir("tokens") / f"{key}.{os.getpid()}.partial"
        tokenize_documents(documents, tokenizer, out=working)
        try:
            working.rename(target)
        except OSError:  # another process was first; its tokens are the same
            shutil.rmtree(working)
    return TokenStore.open(target)
