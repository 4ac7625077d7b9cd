"""Corpora made ready for training: split by document, clean of held-out text, tokenised once per machine.

Documents stay on disk (``DocumentStore``), and so do their tokens, so a corpus may exceed memory. The split follows a
hash of each document's id and never a seed: every contestant and every seed is scored on the same documents.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from headwater.core.cache import cache_dir, cache_key, cached_json
from headwater.core.leak import Sealed
from headwater.modalities.text.docs import CorpusError, Document, drop_overlap, fingerprint, split_sides
from headwater.modalities.text.document_store import DocumentStore
from headwater.modalities.text.packing import TokenStore, tokenize_documents

__all__ = [
    "Readable",
    "SplitCorpus",
    "drop_repeats",
    "fingerprint_of",
    "held_out_sample",
    "split_corpus",
    "split_shares",
    "tokenized",
    "tokenizer_fingerprint",
]

OVERLAP_CHUNK = 20_000
"""Training documents that are compared with the held-out ones at a time; bounds memory."""


@dataclass(frozen=True)
class Readable:
    """What a method may read of a corpus. ``test`` is sealed: touching it raises ``TestLeak``."""

    train: DocumentStore
    valid: DocumentStore
    test: Sealed = field(default_factory=lambda: Sealed("the test set"))


@dataclass(frozen=True)
class SplitCorpus:
    """A corpus in three parts.

    Attributes:
        train, valid, test: its documents; each has one place.
        fingerprint: of the whole corpus, before the split.
        shares: of train, valid and test.
    """

    train: DocumentStore
    valid: DocumentStore
    test: DocumentStore
    fingerprint: str
    shares: tuple[float, float, float]

    @property
    def readable(self) -> Readable:
        """Its training and validation documents, without the test."""
        return Readable(self.train, self.valid)


def split_shares(held_out: float, *, test: bool = True) -> tuple[float, float, float]:
    """Shares of train, valid and test: ``held_out`` for the test, half of it again for validation.

    Args:
        held_out: in [0, 0.5).
        test: whether there is a test part; without one, other documents are the test.

    Example:
        >>> split_shares(0.125)
        (0.8125, 0.0625, 0.125)
    """
    tested = held_out if test else 0.0
    return 1 - 0.5 * held_out - tested, 0.5 * held_out, tested


def split_corpus(documents: DocumentStore, shares: tuple[float, float, float]) -> SplitCorpus:
    """Split by a hash of the document's id, without reading texts.

    Raises:
        ValueError: the shares are negative or do not sum to 1.
    """
    sides = split_sides(documents.ids(), shares)
    train, valid, test = (documents.select(np.flatnonzero(sides == side)) for side in range(3))
    return SplitCorpus(train, valid, test, documents.fingerprint, shares)


def drop_repeats(
    splits: Mapping[str, SplitCorpus], others: Mapping[str, DocumentStore] | None = None
) -> tuple[dict[str, SplitCorpus], int]:
    """Drop training documents that repeat, exactly or nearly, a held-out document of any corpus.

    Found once per machine for the same corpora; see ``drop_overlap`` for what a repetition is.

    Args:
        splits: corpora by name.
        others: further held-out documents, by name.

    Returns:
        The corpora, and how many training documents left.

    Raises:
        CorpusError: a corpus has no training document left.
    """
    others = others or {}
    about = {
        "corpora": {name: [split.fingerprint, split.shares] for name, split in splits.items()},
        "others": {name: store.fingerprint for name, store in others.items()},
        "version": 3,
    }
    repeats: dict[str, list[int]] = cached_json("overlap", about, lambda: _repeats(splits, others))
    clean = {}
    for name, split in splits.items():
        train = split.train.select(np.setdiff1d(np.arange(len(split.train)), repeats[name]))
        if not train:
            raise CorpusError(f"{name}: every training document repeats a held-out one; there is nothing to train on")
        clean[name] = SplitCorpus(train, split.valid, split.test, split.fingerprint, split.shares)
    return clean, sum(map(len, repeats.values()))


def _repeats(splits: Mapping[str, SplitCorpus], others: Mapping[str, DocumentStore]) -> dict[str, list[int]]:
    """Positions of the training documents that repeat a held-out one."""
    held = [document for split in splits.values() for side in (split.valid, split.test) for document in side]
    held += [document for store in others.values() for document in store]
    found: dict[str, list[int]] = {}
    for name, split in splits.items():
        found[name] = []
        for begin in range(0, len(split.train), OVERLAP_CHUNK):
            chunk = list(split.train[begin : begin + OVERLAP_CHUNK])
            kept = {id(document) for document in drop_overlap(chunk, held).kept}
            found[name] += [begin + i for i, document in enumerate(chunk) if id(document) not in kept]
    return found


def held_out_sample(documents: Sequence[Document], chars: int, *, at_least: int = 1) -> list[Document]:
    """The first documents until ``chars`` characters are reached, and ``at_least`` so many in any case."""
    chosen: list[Document] = []
    total = 0
    for document in documents:
        if total >= chars and len(chosen) >= at_least:
            break
        chosen.append(document)
        total += len(document.text)
    return chosen


def fingerprint_of(documents: Sequence[Document]) -> str:
    """``docs.fingerprint``, which a store knows already."""
    return documents.fingerprint if isinstance(documents, DocumentStore) else fingerprint(documents)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that decides how text becomes tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    about = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(about.encode()).hexdigest()


def tokenized(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> TokenStore:
    """The documents' tokens, memory-mapped from the user cache, where they are written once per text and tokenizer."""
    key = cache_key({"documents": fingerprint_of(documents), "tokenizer": tokenizer_fingerprint(tokenizer)})
    target = cache_dir("tokens") / key
    if not (target / "store.json").exists():
        working = cache_dir("tokens") / f"{key}.{os.getpid()}.partial"
        tokenize_documents(documents, tokenizer, out=working)
        try:
            working.rename(target)
        except OSError:  # another process was first; its tokens are the same
            shutil.rmtree(working)
    return TokenStore.open(target)
