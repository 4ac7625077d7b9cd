"""Documents on disk: written once as an Arrow file, read back memory-mapped, so that a corpus may exceed memory.

A ``DocumentStore`` is a sequence of documents. ``select`` gives another one that shares the file and holds indices.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from headwater.core.cache import atomic_path, cache_dir, cache_key, cached_json
from headwater.core.recipe import CorpusRef
from headwater.modalities.text.docs import Document, fingerprint
from headwater.modalities.text.sources import open_corpus

__all__ = ["DocumentStore", "stored_corpus", "text_digest", "write_documents"]

BATCH = 1024
SCHEMA = pa.schema([("id", pa.string()), ("text", pa.large_string()), ("meta", pa.large_string())])


class DocumentStore(Sequence[Document]):
    """Documents of an Arrow file, or some of them, in order.

    Args:
        path: a file that ``write_documents`` wrote.
        indices: which of its documents; all by default.
    """

    def __init__(self, path: Path, indices: ArrayLike | None = None) -> None:
        self.path = path
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        every = np.arange(self._table.num_rows, dtype=np.int64)
        self._indices: NDArray[np.int64] = every if indices is None else np.asarray(indices, dtype=np.int64)
        self._fingerprint = self._table.schema.metadata[b"fingerprint"].decode() if indices is None else ""

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> DocumentStore: ...
    def __getitem__(self, index: int | slice) -> Document | DocumentStore:
        if isinstance(index, slice):
            return DocumentStore(self.path, self._indices[index])
        return next(self._rows(self._indices[[index]]))

    def __iter__(self) -> Iterator[Document]:
        for begin in range(0, len(self._indices), BATCH):
            yield from self._rows(self._indices[begin : begin + BATCH])

    def _rows(self, indices: NDArray[np.int64]) -> Iterator[Document]:
        for row in self._table.take(pa.array(indices)).to_pylist():
            yield Document(row["id"], row["text"], json.loads(row["meta"]))

    def select(self, positions: ArrayLike) -> DocumentStore:
        """The documents at these positions of this sequence, without reading them."""
        return DocumentStore(self.path, self._indices[np.asarray(positions, dtype=np.int64)])

    @property
    def positions(self) -> NDArray[np.int64]:
        """Which documents of the file these are, ``(documents,)``."""
        return self._indices

    def ids(self) -> list[str]:
        """The documents' ids, without their texts."""
        found: list[str] = self._table.column("id").take(pa.array(self._indices)).to_pylist()
        return found

    @property
    def fingerprint(self) -> str:
        """As ``docs.fingerprint`` of the documents, computed once."""
        if not self._fingerprint:
            self._fingerprint = fingerprint(self)
        return self._fingerprint

    @property
    def metadata_fingerprint(self) -> str:
        """Thirty-two hexadecimal digits over the documents' metadata, which ``fingerprint`` leaves out."""
        digest = hashlib.blake2b(digest_size=16)
        column = self._table.column("meta")
        for begin in range(0, len(self._indices), BATCH):
            for meta in column.take(pa.array(self._indices[begin : begin + BATCH])).to_pylist():
                digest.update(meta.encode() + b"\0")
        return digest.hexdigest()


def write_documents(documents: Iterable[Document], path: Path) -> DocumentStore:
    """Write documents to an Arrow file as they come, whole or not at all, and open it.

    Args:
        documents: read once.
        path: of the file.
    """
    working = path.with_name(f"{path.name}.rows")
    # The fingerprint stands in the schema, which an Arrow file begins with, so rows go to a neighbour first.
    try:
        with pa.OSFile(str(working), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            found = fingerprint(_tee(iter(documents), writer))
        schema = SCHEMA.with_metadata({"fingerprint": found})
        with (
            atomic_path(path) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, schema) as final,
            pa.memory_map(str(working)) as source,
        ):
            for batch in pa.ipc.open_stream(source):
                final.write_batch(batch.replace_schema_metadata(schema.metadata))
    finally:
        working.unlink(missing_ok=True)
    return DocumentStore(path)


def _tee(documents: Iterator[Document], writer: Any) -> Iterator[Document]:  # Any: pyarrow has no annotations
    while rows := list(islice(documents, BATCH)):
        columns = [[d.id for d in rows], [d.text for d in rows], [json.dumps(dict(d.meta), default=str) for d in rows]]
        writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        yield from rows


def stored_corpus(ref: CorpusRef, *, role: str) -> DocumentStore:
    """The corpus that ``ref`` names, as a file in the user cache.

    Local files that have not changed (by size and time) and Hub data sets of a fixed revision are read once per
    machine; other sources are read again each time.

    Raises:
        CorpusError: see ``open_corpus``.
    """
    stamp = _stamp(ref)
    if stamp is not None:
        about = {"ref": ref.model_dump(mode="json"), "stamp": stamp, "version": 2}
        path = cache_dir("documents") / f"{cached_json('sources', about, lambda: _write(ref, role))}.arrow"
        if path.exists():
            return DocumentStore(path)
    return DocumentStore(cache_dir("documents") / f"{_write(ref, role)}.arrow")


def _write(ref: CorpusRef, role: str) -> str:
    """Write the corpus and return the file's name: fingerprint and source, since the former leaves ``meta`` out."""
    about = ref.model_dump(mode="json")
    working = cache_dir("documents") / f"{cache_key([about, os.getpid()])}.partial"
    store = write_documents(open_corpus(ref, role=role), working)
    name = f"{store.fingerprint}.{cache_key(about)}"
    store.path.rename(cache_dir("documents") / f"{name}.arrow")
    return name


def _stamp(ref: CorpusRef) -> list[list[Any]] | None:  # Any: JSON data
    if ref.kind == "hub":
        return [[ref.revision]] if ref.revision is not None else None
    if ref.kind != "local":
        return None
    path = ref.path
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def text_digest(text: str) -> bytes:
    """Sixteen bytes that stand for a text when texts are compared for equality."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
