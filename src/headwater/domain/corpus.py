"""The two corpora of a run: read, split by document, cleaned of overlap, and refused where they measure nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headwater.core.recipe import CorpusRef
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.document_store import DocumentStore, stored_corpus, text_digest
from headwater.modalities.text.prepared import Readable, drop_repeats, split_corpus, split_shares

__all__ = ["Prepared", "prepare"]

MIN_HELD_OUT_DOCUMENTS = 20
MIN_HELD_OUT_BYTES = 20_000
SHARED_LIMIT = 0.3
"""Domain and general text with more documents in common than this share are taken for one corpus given twice."""


@dataclass(frozen=True)
class Prepared:
    """Both corpora, with the test documents that only the evaluation gets.

    ``fingerprints`` are of the corpora as they were read, ``dropped`` counts training documents that repeat a held-out
    one.
    """

    domain: Readable
    general: Readable | None
    domain_test: Sequence[Document]
    general_test: Sequence[Document]
    fingerprints: dict[str, str]
    dropped: int


def prepare(domain: CorpusRef, general: CorpusRef | None, *, held_out: float) -> Prepared:
    """Read, split by a hash of the document's id, and drop from training what repeats held-out text.

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
    splits = {role: split_corpus(documents, split_shares(held_out)) for role, documents in read.items()}
    for role, split in splits.items():
        _check_held_out(role, split.test, len(read[role]), held_out)
    clean, dropped = drop_repeats(splits)
    return Prepared(
        clean["domain"].readable,
        clean["general"].readable if "general" in clean else None,
        clean["domain"].test,
        clean["general"].test if "general" in clean else (),
        {role: split.fingerprint for role, split in clean.items()},
        dropped,
    )


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
