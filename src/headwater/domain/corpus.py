"""The two corpora of a run: split by document, cleaned of overlap, tokenised once per machine."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from headwater.core.cache import cache_dir, cache_key, cached_json
from headwater.core.leak import Sealed
from headwater.core.recipe import CorpusRef
from headwater.modalities.text.docs import CorpusError, Document, drop_overlap, fingerprint, split_documents
from headwater.modalities.text.packing import TokenStore, tokenize_documents
from headwater.modalities.text.sources import open_corpus

__all__ = ["Corpus", "Prepared", "held_out_sample", "prepare", "tokenized"]

logger = logging.getLogger(__name__)

MIN_HELD_OUT_DOCUMENTS = 20
MIN_HELD_OUT_BYTES = 20_000
SHARED_LIMIT = 0.3
"""Domain and general text with more documents in common than this share are taken for one corpus given twice."""


@dataclass(frozen=True)
class Corpus:
    """What a method may read of a corpus. ``test`` is sealed: touching it raises ``TestLeak``."""

    name: str
    train: Sequence[Document]
    valid: Sequence[Document]
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
    read = {"domain": list(open_corpus(domain, role="domain"))}
    if general is not None:
        read["general"] = list(open_corpus(general, role="general"))
        _refuse_same(read["domain"], read["general"])
    fractions = (1 - 1.5 * held_out, 0.5 * held_out, held_out)
    splits = {role: split_documents(documents, fractions) for role, documents in read.items()}
    for role, split in splits.items():
        _check_held_out(role, split.test, len(read[role]), held_out)
    prints = {role: fingerprint(documents) for role, documents in read.items()}
    held = [document for split in splits.values() for document in (*split.valid, *split.test)]
    dropped: dict[str, list[str]] = cached_json(
        "overlap", {"prints": prints, "held_out": held_out, "version": 1}, lambda: _overlap(splits, held)
    )
    corpora = {}
    for role, split in splits.items():
        gone = set(dropped[role])
        corpora[role] = Corpus(role, [d for d in split.train if d.id not in gone], split.valid, prints[role])
        if not corpora[role].train:
            raise CorpusError(
                f"{role}: every training document repeats a held-out one; the corpus holds nothing to train on"
            )
    return Prepared(
        corpora["domain"],
        corpora.get("general"),
        splits["domain"].test,
        splits["general"].test if "general" in splits else [],
        sum(len(ids) for ids in dropped.values()),
    )


def _overlap(splits: dict[str, Any], held: list[Document]) -> dict[str, list[str]]:  # Any: a Split
    found = {}
    for role, split in splits.items():
        kept = {document.id for document in drop_overlap(split.train, held).kept}
        found[role] = [document.id for document in split.train if document.id not in kept]
    return found


def _refuse_same(domain: list[Document], general: list[Document]) -> None:
    texts = {hashlib.blake2b(d.text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for d in general}
    shared = sum(
        hashlib.blake2b(d.text.encode("utf-8", "surrogatepass"), digest_size=16).digest() in texts for d in domain
    )
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


def tokenized(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> TokenStore:
    """The documents' tokens, memory-mapped from the user cache, where they are written once per text and tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    about = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    key = cache_key({"documents": fingerprint(documents), "tokenizer": hashlib.sha256(about.encode()).hexdigest()})
    target = cache_dir("tokens") / key
    if not (target / "store.json").exists():
        working = cache_dir("tokens") / f"{key}.{os.getpid()}.partial"
        tokenize_documents(documents, tokenizer, out=working)
        try:
            working.rename(target)
        except OSError:  # another process was first; its tokens are the same
            shutil.rmtree(working)
    return TokenStore.open(target)
