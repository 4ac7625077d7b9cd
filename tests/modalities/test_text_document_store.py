"""Documents on disk: the same documents, in bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import write_corpus

from headwater.core.recipe import CorpusRef
from headwater.modalities.text.docs import CorpusError, Document, fingerprint, split_documents, split_sides
from headwater.modalities.text.document_store import DocumentStore, stored_corpus, write_documents


def documents(count: int = 2_500) -> list[Document]:
    return [
        Document(f"d{i}", f"text {i} \u2028 \0 é" * (i % 5 + 1), {"i": i, "tags": ["a", None]}) for i in range(count)
    ]


def test_oracle_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    docs = documents()
    store = write_documents(iter(docs), tmp_path / "a.arrow")
    assert list(store) == docs
    assert store.ids() == [d.id for d in docs]
    assert store[7] == docs[7]
    assert store[-1] == docs[-1]
    assert list(store[10:13]) == docs[10:13]
    assert store.fingerprint == fingerprint(docs) == DocumentStore(tmp_path / "a.arrow").fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["a.arrow"]


def test_property_selections_compose_and_have_their_own_fingerprint(tmp_path: Path) -> None:
    docs = documents(100)
    store = write_documents(docs, tmp_path / "a.arrow")
    evens = store.select(range(0, 100, 2))
    assert list(evens.select([3, 1])) == [docs[6], docs[2]]
    assert evens.fingerprint == fingerprint(docs[::2]) != store.fingerprint
    assert len(store.select([])) == 0


def test_oracle_sides_by_id_are_the_split_of_documents() -> None:
    docs = documents(500)
    sides = split_sides([d.id for d in docs], (0.7, 0.1, 0.2))
    for side, expected in enumerate(split_documents(docs, (0.7, 0.1, 0.2))):
        assert [docs[i] for i in np.flatnonzero(sides == side)] == expected


def test_fault_a_source_that_breaks_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[Document]:
        yield from documents(3_000)
        raise CorpusError("line 3001 is not JSON")

    with pytest.raises(CorpusError, match="3001"):
        write_documents(broken(), tmp_path / "a.arrow")
    assert not list(tmp_path.iterdir())


def test_property_an_unchanged_file_is_read_once_and_a_changed_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
    path = write_corpus(tmp_path / "d.jsonl", "domain", 30)
    ref = CorpusRef(name=str(path))
    first = stored_corpus(ref, role="domain")
    assert stored_corpus(ref, role="domain").path == first.path
    assert len(stored_corpus(CorpusRef(name=str(path), limit_documents=4), role="domain")) == 4
    path.write_text(path.read_text().replace("graph", "grape"))
    os.utime(path, ns=(1, 1))
    assert stored_corpus(ref, role="domain").fingerprint != first.fingerprint


_GROWTH = """
import resource, sys
from pathlib import Path
from headwater.modalities.text.docs import Document
from headwater.modalities.text.document_store import write_documents
def docs():
    for i in range(int(sys.argv[2])):
        yield Document(str(i), f"{i} " * 2_000)
list(write_documents((Document(str(i), "x") for i in range(10)), Path(sys.argv[1]) / "warm.arrow"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store = write_documents(docs(), Path(sys.argv[1]) / "big.arrow")
print(store.path.stat().st_size, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_property_writing_takes_memory_for_one_batch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _GROWTH, str(tmp_path), "20000"], capture_output=True, text=True, check=True
    )
    size, growth = map(int, done.stdout.split())
    assert size > 150_000_000
    # A batch of 1,024 documents of 10 kB, in Python and in Arrow, and pages of the mapped file.
    assert growth < size, json.dumps({"size": size, "growth": growth})
