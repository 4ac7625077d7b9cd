"""Corpora made ready: split by document, clean of held-out text, tokenised once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.conftest import sentences

from headwater.core.leak import TestLeak
from headwater.core.recipe import CorpusRef
from headwater.modalities.text import prepared
from headwater.modalities.text.docs import CorpusError, Document, drop_overlap, split_documents
from headwater.modalities.text.document_store import DocumentStore, write_documents
from headwater.modalities.text.packing import tokenize_documents
from headwater.modalities.text.prepared import (
    drop_repeats,
    held_out_sample,
    split_corpus,
    split_shares,
    tokenized,
    tokenizer_fingerprint,
)
from headwater.modalities.text.sources import open_corpus
from headwater.modalities.text.tokenizers import train_bpe


def store(path: Path, kind: str = "domain", count: int = 200, copies: int = 40) -> DocumentStore:
    """Documents, and copies of the first ones in capitals under other ids."""
    texts = sentences(kind, count)
    docs = [Document(f"{kind}{i}", text) for i, text in enumerate(texts)]
    docs += [Document(f"{kind}-copy{i}", text.upper()) for i, text in enumerate(texts[:copies])]
    return write_documents(docs, path / f"{kind}.arrow")


def test_equation_shares_sum_to_one() -> None:
    assert split_shares(0.2) == pytest.approx((0.7, 0.1, 0.2))
    assert split_shares(0.2, test=False) == pytest.approx((0.9, 0.1, 0.0))


def test_oracle_split_and_cleaning_are_those_of_documents_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "OVERLAP_CHUNK", 7)  # borders of chunks must not show
    documents = store(tmp_path)
    shares = split_shares(0.2)
    clean, dropped = drop_repeats({"a": split_corpus(documents, shares)})
    plain = split_documents(documents, shares)
    kept = drop_overlap(plain.train, [*plain.valid, *plain.test]).kept
    assert list(clean["a"].train) == kept
    assert (list(clean["a"].valid), list(clean["a"].test)) == (plain.valid, plain.test)
    assert dropped == len(plain.train) - len(kept) > 0


def test_property_text_held_out_anywhere_leaves_training_everywhere(tmp_path: Path) -> None:
    first, second = store(tmp_path), store(tmp_path, "general", copies=0)
    shared = write_documents([Document("x", first[0].text), Document("y", "something else entirely")], tmp_path / "x")
    splits = {"a": split_corpus(first, (1.0, 0.0, 0.0)), "b": split_corpus(second, (1.0, 0.0, 0.0))}
    clean, dropped = drop_repeats(splits, {"eval": shared})
    gone = set(first.ids()) - set(clean["a"].train.ids())
    assert gone == {"domain0", "domain-copy0"}
    assert dropped == 2
    assert clean["b"].train.ids() == second.ids()


def test_degenerate_nothing_left_to_train_on(tmp_path: Path) -> None:
    documents = write_documents([Document(str(i), "the same text again") for i in range(60)], tmp_path / "same.arrow")
    with pytest.raises(CorpusError, match="a: every training document repeats a held-out one"):
        drop_repeats({"a": split_corpus(documents, split_shares(0.2))})


def test_rejects_reaching_for_the_test_part(tmp_path: Path) -> None:
    readable = split_corpus(store(tmp_path), split_shares(0.2)).readable
    assert len(readable.train) + len(readable.valid) < 240
    with pytest.raises(TestLeak, match="the test set"):
        len(readable.test)  # type: ignore[arg-type]


def test_equation_a_sample_stops_at_the_characters_or_the_documents() -> None:
    docs = [Document(str(i), "x" * 10) for i in range(10)]
    assert [len(held_out_sample(docs, chars)) for chars in (1, 10, 11, 1000)] == [1, 1, 2, 10]
    assert len(held_out_sample(docs, 1, at_least=4)) == 4
    assert held_out_sample([], 5) == []


def test_oracle_tokens_from_the_cache_are_the_documents_tokens(tmp_path: Path) -> None:
    documents = store(tmp_path)
    tokenizer, other = (train_bpe((d.text for d in documents), size) for size in (300, 310))
    direct = tokenize_documents(documents, tokenizer)
    for _ in range(2):
        found = tokenized(documents, tokenizer)
        assert np.array_equal(found.tokens, direct.tokens)
        assert found.fingerprint == direct.fingerprint
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(other)
    assert len(tokenized(documents, other).tokens) < len(direct.tokens)


def test_property_metadata_of_equal_texts_are_kept_apart(tmp_path: Path) -> None:
    from headwater.modalities.text.document_store import stored_corpus

    refs = []
    for source in ("left", "right"):
        path = tmp_path / f"{source}.jsonl"
        path.write_text(f'{{"id": "1", "text": "one text", "source": "{source}"}}\n')
        refs.append(CorpusRef(name=str(path)))
    for ref in (*refs, *refs):
        expected = next(iter(open_corpus(ref, role="x")))
        assert list(stored_corpus(ref, role="x")) == [expected]
