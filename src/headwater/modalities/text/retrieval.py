"""Stored texts that are found again by a query: by dense vectors, or by the words they share (BM25).

    dense     score(q, d) = e(q) . e(d)
    lexical   score(q, d) = sum over words w of q:  idf(w) tf / (tf + k1 (1 - b + b |d| / mean |d|)),
              idf(w) = ln(1 + (N - n_w + 1/2) / (n_w + 1/2)),   tf: of w in d;   n_w: texts with w, of N

The search is exact in both. Under ``exact_rows`` vectors it is a matrix product, from there on faiss (extra
``retrieval``). BM25 weighs words by all texts, so its index is built anew at the first search after texts were added.

Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009 (through bm25s, whose
default leaves the constant factor k1 + 1 out); Johnson, Douze, Jegou, "Billion-scale similarity search with GPUs",
arXiv:1702.08734 (faiss).
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from headwater.core.cache import atomic_path, atomic_write_text
from headwater.core.recipe import ModelRef
from headwater.modalities.text.labelled import encode_texts

__all__ = ["DenseRetriever", "Encode", "Entry", "Found", "LexicalRetriever", "Retriever", "encoder_of"]

logger = logging.getLogger(__name__)
EXACT_ROWS = 100_000
_BLOCK = 1 << 24  # scores held at a time, 64 MiB

Encode = Callable[[Sequence[str]], NDArray[np.float32]]
"""Texts to vectors, ``(n, D)`` float32."""


def encoder_of(model: ModelRef, *, max_tokens: int | None = 128) -> Encode:
    """Vectors of a frozen Hugging Face encoder, kept in the user cache; see ``encode_texts``."""

    def encode(texts: Sequence[str]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = np.asarray(encode_texts(texts, model, max_tokens=max_tokens).store.X, np.float32)
        return found

    return encode


class Entry(NamedTuple):
    """One stored text.

    Attributes:
        id: no other entry has it.
        text: what a query is compared with.
        group: what it belongs to, such as its document; an empty one is none.
        meta: whatever goes with it; JSON values.
    """

    id: str
    text: str
    group: str
    meta: Mapping[str, Any]  # Any: JSON data


class Found(NamedTuple):
    """What was found, the best first; rows of equal scores stand in the order in which they were added.

    Attributes:
        rows: positions in the store, ``(queries, k)`` int64; -1 where fewer than k entries may be returned.
        scores: ``(queries, k)`` float32; minus infinity there.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]


class Retriever(ABC):
    """Texts, and what is nearest to a query among them."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._row_of: dict[str, int] = {}
        self._rows_of_group: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def add(
        self,
        texts: Sequence[str],
        ids: Sequence[str] | None = None,
        *,
        groups: Sequence[str] | None = None,
        meta: Sequence[Mapping[str, Any]] | None = None,  # Any: JSON data
    ) -> None:
        """Store texts behind those that are there; in parts or at once makes no difference.

        Args:
            texts: none of them blank; no text at all is fine.
            ids: by default the position in the store.
            groups: what a query may leave out as a whole.
            meta: kept with each text.

        Raises:
            ValueError: lists of different lengths, a blank text, an id that is there already.
        """
        names = [str(len(self) + place) for place in range(len(texts))] if ids is None else list(ids)
        group = [""] * len(texts) if groups is None else list(groups)
        about = [{}] * len(texts) if meta is None else list(meta)
        if not len(texts) == len(names) == len(group) == len(about):
            raise ValueError(
                f"every text needs an id, a group and meta data; got {len(texts)} texts, {len(names)} ids, "
                f"{len(group)} groups and {len(about)} meta data."
            )
        if blank := [place for place, text in enumerate(texts) if not text.strip()]:
            raise ValueError(f"text {blank[0]} is blank; leave it out.")
        known = set(self._row_of)
        for name in names:
            if name in known:
                raise ValueError(f"there is an entry {name!r} already; ids must differ.")
            known.add(name)
        if not texts:
            return
        self._append(texts)
        for values in zip(names, texts, group, about, strict=True):
            self._register(Entry(*values))

    def _register(self, entry: Entry) -> None:
        row = len(self.entries)
        self.entries.append(entry)
        self._row_of[entry.id] = row
        if entry.group:
            self._rows_of_group.setdefault(entry.group, []).append(row)

    def search(
        self,
        queries: Sequence[str],
        k: int,
        *,
        exclude_ids: Sequence[Collection[str]] | None = None,
        exclude_groups: Sequence[Collection[str]] | None = None,
    ) -> Found:
        """The k entries with the highest scores for each query.

        Args:
            queries: none is fine.
            k: clipped, with a warning, to the number of entries.
            exclude_ids: for each query, entries that it must not find, itself for instance; unknown ids are no error.
            exclude_groups: for each query, groups of which it must find nothing.

        Raises:
            ValueError: nothing is stored, k < 1, or exclusions for another number of queries.
        """
        if not len(self):
            raise ValueError("nothing is stored; add texts before searching.")
        if k < 1:
            raise ValueError(f"k must be at least 1; got {k}.")
        for name, given in (("exclude_ids", exclude_ids), ("exclude_groups", exclude_groups)):
            if given is not None and len(given) != len(queries):
                raise ValueError(f"{name} needs one collection for each query; got {len(given)} for {len(queries)}.")
        if k > len(self):
            logger.warning("k = %d entries were asked for and %d are stored: all are returned.", k, len(self))
            k = len(self)
        excluded = [self._excluded(place, exclude_ids, exclude_groups) for place in range(len(queries))]
        if not queries:
            return Found(np.empty((0, k), np.int64), np.empty((0, k), np.float32))
        return self._search(queries, k, excluded)

    def _excluded(
        self, place: int, ids: Sequence[Collection[str]] | None, groups: Sequence[Collection[str]] | None
    ) -> NDArray[np.int64]:
        rows = {self._row_of[name] for name in (ids[place] if ids is not None else ()) if name in self._row_of}
        for group in groups[place] if groups is not None else ():
            rows.update(self._rows_of_group.get(group, ()))
        return np.array(sorted(rows), dtype=np.int64)

    def _search(self, queries: Sequence[str], k: int, excluded: Sequence[NDArray[np.int64]]) -> Found:
        size = max(1, _BLOCK // len(self))
        parts = []
        for begin in range(0, len(queries), size):
            scores = self._scores(queries[begin : begin + size])
            for row, gone in zip(scores, excluded[begin : begin + size], strict=True):
                row[gone] = -np.inf
            parts.append(_best(scores, k))
        return Found(*(np.concatenate(side) for side in zip(*parts, strict=True)))

    @abstractmethod
    def _append(self, texts: Sequence[str]) -> None:
        """Index texts that come behind those in ``entries``."""

    @abstractmethod
    def _scores(self, queries: Sequence[str]) -> NDArray[np.float32]:
        """Of every entry for each query, ``(queries, entries)``; the caller may write to it."""

    def save(self, directory: Path) -> None:
        """Write ``entries.parquet``, ``retriever.json`` and, of dense vectors, a safetensors or faiss file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {name: [getattr(entry, name) for entry in self.entries] for name in ("id", "text", "group")}
        columns["meta"] = [json.dumps(dict(entry.meta)) for entry in self.entries]
        with atomic_path(directory / "entries.parquet") as path:
            pq.write_table(pa.table(columns, schema=pa.schema([(name, pa.string()) for name in columns])), path)
        atomic_write_text(directory / "retriever.json", json.dumps(self._save_index(directory)) + "\n")

    @abstractmethod
    def _save_index(self, directory: Path) -> dict[str, Any]:  # Any: JSON data
        """Write what cannot be had from the texts in no time, and return what ``retriever.json`` says."""

    def _restore(self, directory: Path, kind: str) -> dict[str, Any]:  # Any: JSON data
        import pyarrow.parquet as pq

        about: dict[str, Any] = json.loads((directory / "retriever.json").read_text(encoding="utf-8"))
        if about["kind"] != kind:
            raise ValueError(f"{directory} holds a {about['kind']} store; open it with that class.")
        for values in pq.read_table(directory / "entries.parquet").to_pylist():
            self._register(Entry(values["id"], values["text"], values["group"], json.loads(values["meta"])))
        return about


def _best(scores: NDArray[np.float32], k: int) -> Found:
    """The k largest of each row, the first of equal ones first."""
    if k < scores.shape[1]:
        # Ties at the border go to the lower row as well, so the k-th score is looked up and its first holders taken.
        least = np.partition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k, None]
        above, tied = scores > least, scores == least
        tied &= np.cumsum(tied, axis=1, dtype=np.int32) <= k - above.sum(1, keepdims=True)
        rows = np.nonzero(above | tied)[1].reshape(len(scores), k)
    else:
        rows = np.broadcast_to(np.arange(k), scores.shape)
    found = np.take_along_axis(scores, rows, 1)
    order = np.argsort(-found, axis=1, kind="stable")
    rows, found = np.take_along_axis(rows, order, 1), np.take_along_axis(found, order, 1)
    return Found(np.where(np.isneginf(found), -1, rows).astype(np.int64), found.astype(np.float32))


class DenseRetriever(Retriever):
    """Inner products of vectors.

    Args:
        encode: of texts and queries alike; ``encoder_of`` makes one from a model.
        encode_query: of queries, where they have an encoder of their own (DPR).
        exact_rows: stored vectors from which on faiss searches.
    """

    def __init__(self, encode: Encode, encode_query: Encode | None = None, *, exact_rows: int = EXACT_ROWS) -> None:
        super().__init__()
        self.encode, self.encode_query, self.exact_rows = encode, encode_query or encode, exact_rows
        self._parts: list[NDArray[np.float32]] = []
        self._faiss: Any = None  # Any: faiss has no annotations; then the only home of the vectors

    @property
    def vectors(self) -> NDArray[np.float32]:
        """Of all entries, ``(n, D)``; under faiss a copy."""
        if self._faiss is not None:
            found: NDArray[np.float32] = self._faiss.reconstruct_n(0, self._faiss.ntotal)
            return found
        if len(self._parts) != 1:
            self._parts = [np.concatenate(self._parts)] if self._parts else [np.empty((0, 0), np.float32)]
        return self._parts[0]

    def _append(self, texts: Sequence[str]) -> None:
        new = _checked(self.encode(texts), len(texts), self._width)
        if self._faiss is None and len(self) + len(texts) >= self.exact_rows:
            self._faiss = _import_faiss(len(self) + len(texts)).IndexFlatIP(new.shape[1])
            for part in self._parts:
                self._faiss.add(part)
            self._parts = []
        if self._faiss is not None:
            self._faiss.add(new)
        else:
            self._parts.append(new)

    @property
    def _width(self) -> int | None:
        if self._faiss is not None:
            return int(self._faiss.d)
        return self._parts[0].shape[1] if self._parts else None

    def _scores(self, queries: Sequence[str]) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = self._encoded(queries) @ self.vectors.T
        return scores

    def _encoded(self, queries: Sequence[str]) -> NDArray[np.float32]:
        return _checked(self.encode_query(queries), len(queries), self._width)

    def _search(self, queries: Sequence[str], k: int, excluded: Sequence[NDArray[np.int64]]) -> Found:
        if self._faiss is None:
            return super()._search(queries, k, excluded)
        # As many more as may be left out: what remains is then exact.
        more = min(len(self), k + max(map(len, excluded)))
        scores, rows = self._faiss.search(self._encoded(queries), more)
        for place, gone in enumerate(excluded):
            scores[place, np.isin(rows[place], gone)] = -np.inf
        order = np.lexsort((rows, -scores), axis=1)[:, :k]
        rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
        return Found(np.where(np.isneginf(scores), -1, rows), scores)

    def _save_index(self, directory: Path) -> dict[str, Any]:  # Any: JSON data
        from safetensors.numpy import save_file

        if self._faiss is not None:
            with atomic_path(directory / "vectors.faiss") as path:
                _import_faiss(len(self)).write_index(self._faiss, str(path))
        elif len(self):
            with atomic_path(directory / "vectors.safetensors") as path:
                save_file({"vectors": np.ascontiguousarray(self.vectors)}, path)
        return {"kind": "dense", "exact_rows": self.exact_rows}

    @classmethod
    def load(cls, directory: Path, encode: Encode, encode_query: Encode | None = None) -> Self:
        """What ``save`` wrote; nothing is encoded anew.

        Raises:
            ValueError: the store is of another kind.
            ImportError: it holds a faiss index, and faiss is not installed.
        """
        from safetensors.numpy import load_file

        store = cls(encode, encode_query)
        store.exact_rows = store._restore(directory, "dense")["exact_rows"]
        if (directory / "vectors.faiss").exists():
            store._faiss = _import_faiss(len(store)).read_index(str(directory / "vectors.faiss"))
        elif len(store):
            store._parts = [load_file(directory / "vectors.safetensors")["vectors"]]
        return store


def _checked(vectors: NDArray[Any], rows: int, width: int | None) -> NDArray[np.float32]:  # Any: a float dtype
    if vectors.ndim != 2 or len(vectors) != rows or width not in (None, vectors.shape[1]):
        raise ValueError(f"the encoder must give ({rows}, {width or 'D'}) vectors; got shape {vectors.shape}.")
    return np.ascontiguousarray(vectors, dtype=np.float32)


def _import_faiss(rows: int) -> Any:  # Any: a module without annotations
    try:
        import faiss
    except ImportError:
        raise ImportError(f"{rows} vectors are searched by faiss: pip install 'headwater[retrieval]'.") from None
    return faiss


class LexicalRetriever(Retriever):
    """BM25 over lower-cased words of two characters and more.

    Args:
        k1: how soon a repeated word stops counting, >= 0.
        b: how much long texts are held back, 0 to 1.
    """

    def __init__(self, k1: float = 1.5, b: float = 0.75) -> None:
        if k1 < 0 or not 0 <= b <= 1:
            raise ValueError(f"k1 must be >= 0 and b in [0, 1]; got k1={k1} and b={b}.")
        super().__init__()
        self.k1, self.b = k1, b
        self._index: Any = None  # Any: bm25s is not annotated

    def _append(self, texts: Sequence[str]) -> None:
        self._index = None

    def _scores(self, queries: Sequence[str]) -> NDArray[np.float32]:
        import bm25s

        scores = np.zeros((len(queries), len(self)), np.float32)
        if self._index is None:
            stored = _words([entry.text for entry in self.entries])
            if not any(stored):
                return scores  # bm25s refuses texts that have no word at all
            self._index = bm25s.BM25(k1=self.k1, b=self.b)
            self._index.index(stored, show_progress=False)
        for row, words in enumerate(_words(queries)):
            if words:
                scores[row] = self._index.get_scores(words)
        return scores

    def _save_index(self, directory: Path) -> dict[str, Any]:  # Any: JSON data
        return {"kind": "lexical", "k1": self.k1, "b": self.b}

    @classmethod
    def load(cls, directory: Path) -> Self:
        """What ``save`` wrote.

        Raises:
            ValueError: the store is of another kind.
        """
        store = cls()
        about = store._restore(directory, "lexical")
        store.k1, store.b = about["k1"], about["b"]
        return store


def _words(texts: Sequence[str]) -> list[list[str]]:
    import bm25s

    found: list[list[str]] = bm25s.tokenize(list(texts), stopwords=None, return_ids=False, show_progress=False)
    return found
