"""The corpora of a run: read, split by document, cleaned of overlap, and refused where they measure nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headwater.core.recipe import CorpusRef
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.document_store import DocumentStore, stored_corpus, text_digest
from headwater.modalities.text.prepared import Readable, drop_repeats, split_corpus, split_shares

__all__ = ["Prepared", "prepare", "prepare_each"]

MIN_HELD_OUT_DOCUMENTS = 20
MIN_HELD_OUT_BYTES = 20_000
SHARED_LIMIT = 0.3
"""Domain and general text with more documents in common than this share are taken for one corpus given twice."""


@dataclass(frozen=True)
class Prepared:
    """Both corpora, with the test documents that only the evaluation gets.

    Attributes:
        name: of the domain's corpus, as the recipe gives it.
        domain, general: what a method may read.
        domain_test, general_test: what it may not.
        fingerprints: of the corpora as they were read, by role.
        dropped: training documents that repeated a held-out one, of all corpora.
        shared: share of the domain's documents that stand in each other domain too, by its role.
    """

    name: str
    domain: Readable
    general: Readable | None
    domain_test: Sequence[Document]
    general_test: Sequence[Document]
    fingerprints: dict[str, str]
    dropped: int
    shared: Mapping[str, float]


def prepare(domain: CorpusRef, general: CorpusRef | None, *, held_out: float) -> Prepared:
    """Read, split by a hash of the document's id, and drop from training what repeats held-out text.

    Args:
        domain: texts to adapt to.
        general: texts not to forget, or None.
        held_out: share of the documents in each test set; half of it again goes to validation.

    Raises:
        CorpusError: an empty corpus, one given twice, or held-out sets too small to score.
    """
    return prepare_each({"domain": domain}, general, held_out=held_out)["domain"]


def prepare_each(
    domains: Mapping[str, CorpusRef], general: CorpusRef | None, *, held_out: float
) -> dict[str, Prepared]:
    """As ``prepare``, for several domains: each one's training documents are cleaned of what any of them holds out.

    Args:
        domains: texts to adapt to, by what errors and fingerprints call them; none is called ``general``.
        general: texts not to forget, or None; one corpus for all.
        held_out: share of the documents in each test set.

    Raises:
        CorpusError: as ``prepare``.
    """
    read = {role: stored_corpus(ref, role=role) for role, ref in domains.items()}
    if general is not None:
        read["general"] = stored_corpus(general, role="general")
    shared = _shared(read) if len(read) > 1 else {role: {} for role in read}
    for role in domains:
        _refuse_same(role, shared[role].get("general", 0.0))
    splits = {role: split_corpus(documents, split_shares(held_out)) for role, documents in read.items()}
    for role, split in splits.items():
        _check_held_out(role, split.test, len(read[role]), held_out)
    clean, dropped = drop_repeats(splits)
    return {
        role: Prepared(
            ref.name,
            clean[role].readable,
            clean["general"].readable if "general" in clean else None,
            clean[role].test,
            clean["general"].test if "general" in clean else (),
            {part: clean[part].fingerprint for part in (role, "general") if part in clean},
            dropped,
            {other: share for other, share in shared[role].items() if other != "general"},
        )
        for role, ref in domains.items()
    }


def _shared(read: Mapping[str, DocumentStore]) -> dict[str, dict[str, float]]:
    """For every corpus, the share of its documents whose text each other one holds too."""
    texts = {role: [text_digest(document.text) for document in documents] for role, documents in read.items()}
    sets = {role: set(digests) for role, digests in texts.items()}
    return {
        role: {
            other: sum(digest in sets[other] for digest in digests) / len(digests) for other in read if other != role
        }
        for role, digests in texts.items()
    }


def _refuse_same(role: str, shared: float) -> None:
    if shared > SHARED_LIMIT:
        raise CorpusError(
            f"{role}: {shared:.0%} of the domain's documents stand in the general corpus too. They must be different "
            "texts, or forgetting cannot be told from learning."
        )


def _check_held_out(role: str, test: Sequence[Document], total: int, held_out: float) -> None:
    size = sum(len(document.text.encode("utf-8", "surrogatepass")) for document in test)
    if len(test) < MIN_HELD_OUT_DOCUMENTS or size < MIN_HELD_OUT_BYTES:
        raise CorpusError(
            f"{role}: the held-out test set has {len(test)} documents and {size} bytes; at least "
            f"{MIN_HELD_OUT_DOCUMENTS} documents and {MIN_HELD_OUT_BYTES} bytes are needed for a figure that means "
            f"something. The corpus has {total} documents: give more, or raise held_out (now {held_out})."
        )
