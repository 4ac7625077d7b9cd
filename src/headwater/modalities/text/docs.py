"""Documents: reading them from anywhere, splitting them, and keeping held-out text out of training text.

Near-duplicates are pairs whose sets of word 5-grams have a Jaccard similarity above a threshold. Candidates come from
MinHash signatures cut into bands; every candidate is then checked with the exact Jaccard similarity, so nothing is
dropped on a guess. With 16 bands of 4 hashes a pair at similarity s becomes a candidate with probability
1 - (1 - s^4)^16: 0.9998 at s = 0.8.

Source: Broder, "On the resemblance and containment of documents", SEQUENCES 1997; banding as in Leskovec, Rajaraman,
Ullman, "Mining of Massive Datasets", section 3.4.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headwater.core.rng import hash_bits

__all__ = [
    "CorpusError",
    "Document",
    "Overlap",
    "Split",
    "drop_overlap",
    "fingerprint",
    "near_duplicates",
    "read_documents",
    "split_documents",
    "split_sides",
]

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt", ".md", ".rst")


class CorpusError(ValueError):
    """A corpus that cannot be read, or that holds too little to use."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text, whole: the unit that is split, scored and kept out.

    Attributes:
        id: stable from run to run; splits depend on it and on nothing else.
        text: the document.
        meta: whatever the source said about it; JSON values.
    """

    id: str
    text: str
    meta: Mapping[str, Any] = field(default_factory=dict)  # Any: the columns of a source are its own


def read_documents(
    source: str | Path | Iterable[Mapping[str, Any]],
    *,
    text_field: str = "text",
    config: str | None = None,
    split: str = "train",
    limit_documents: int | None = None,
    limit_chars: int | None = None,
    role: str = "corpus",
) -> Iterator[Document]:
    """Read documents lazily from a file, a folder, a data set in memory, or the Hugging Face Hub.

    Args:
        source: a file or a folder (searched recursively, in sorted order, hidden names skipped) of ``.jsonl``,
            ``.jsonl.gz`` or ``.parquet`` (one document per row), ``.txt``, ``.md`` or ``.rst`` (one per file); a
            ``datasets.Dataset``, in memory or streaming, or any iterable of rows; else the name of a Hub data set,
            which is streamed.
        text_field: the column with the text. The other columns become ``meta``; a string column ``id`` becomes the id.
            Without one, a file that is one document has its relative path as id, and a row has a hash of its text.
        config: the Hub data set's configuration.
        split: the Hub data set's split.
        limit_documents: stop after so many.
        limit_chars: stop after the document that reaches so many characters.
        role: the word that errors begin with, such as ``"domain"``.

    Yields:
        Documents. Blank ones are left out and counted in the log.

    Raises:
        CorpusError: nothing there, no such column, a text that is not a string, a broken line, not UTF-8. Reading is
            lazy, so this comes at the first ``next`` or where the reading meets it.
    """
    meta: dict[str, Any]
    where, rows = _open(source, config, split, role)
    count = chars = blank = 0
    for place, content in rows:
        if isinstance(content, str):
            identity, text, meta = place, content, {}
        else:
            identity, text, meta = _fields(content, text_field, place, role)
        if not text.strip():
            blank += 1
            continue
        yield Document(identity or _digest(text), text, meta)
        count, chars = count + 1, chars + len(text)
        if count == limit_documents or (limit_chars is not None and chars >= limit_chars):
            break
    if blank:
        logger.info("%s: left out %d blank documents of %s", role, blank, where)
    if not count:
        raise CorpusError(f"{role}: 0 documents under {where} (looked for {', '.join('*' + s for s in SUFFIXES)}).")


# A place to name in errors, and the columns that stand there; or a file's relative path, and the file whole.
_Rows = Iterator[tuple[str, Mapping[str, Any] | str]]


def _fields(row: Mapping[str, Any], text_field: str, place: str, role: str) -> tuple[str, str, dict[str, Any]]:
    if text_field not in row:
        raise CorpusError(
            f"{role}: no column {text_field!r} in {place}; available: {', '.join(map(str, row)) or 'none'}."
        )
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        raise CorpusError(f"{role}: column {text_field!r} of {place} holds {type(text).__name__}; expected text.")
    identity = row.get("id")
    meta = {name: value for name, value in row.items() if name not in (text_field, "id")}
    return identity if isinstance(identity, str) else "", text or "", meta


def _open(
    source: str | Path | Iterable[Mapping[str, Any]], config: str | None, split: str, role: str
) -> tuple[str, _Rows]:
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if path.exists():
            return str(path), _local_rows(path, role)
        if isinstance(source, Path) or source.startswith((".", "/", "~")) or source.endswith(SUFFIXES):
            raise CorpusError(f"{role}: no such file or folder: {source}.")
        from datasets import load_dataset

        return source, _memory_rows(load_dataset(source, config, split=split, streaming=True), source)
    if isinstance(source, Mapping):  # a DatasetDict
        raise CorpusError(f"{role}: choose one split of the data set; it has {', '.join(map(str, source))}.")
    name = f"the given {type(source).__name__}"
    return name, _memory_rows(source, name)


def _memory_rows(rows: Iterable[Mapping[str, Any]], name: str) -> _Rows:
    for number, row in enumerate(rows):
        yield f"row {number} of {name}", row


def _local_rows(path: Path, role: str) -> _Rows:
    if path.is_file():
        files = [path]
    else:
        inside = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        files = sorted(p for p in inside if p.is_file() and p.name.endswith(SUFFIXES))
    for file in files:
        try:
            if file.name.endswith((".jsonl", ".jsonl.gz")):
                yield from _jsonl_rows(file, role)
            elif file.suffix == ".parquet":
                yield from _parquet_rows(file)
            else:
                yield file.relative_to(path).as_posix() if file != path else file.name, file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CorpusError(f"{role}: {file} is not UTF-8 (byte {error.start}); convert it first.") from error


def _jsonl_rows(file: Path, role: str) -> _Rows:
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CorpusError(f"{role}: {file}:{number} is not JSON ({error.msg}).") from error
            if not isinstance(row, dict):
                raise CorpusError(f"{role}: {file}:{number} holds {type(row).__name__}; expected an object.")
            yield f"{file}:{number}", row


def _parquet_rows(file: Path) -> _Rows:
    import pyarrow.parquet as pq

    number = 0
    for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            yield f"row {number} of {file}", row
            number += 1


def _digest(text: str, size: int = 16) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).hexdigest()


class Split(NamedTuple):
    """Documents for training, for choosing, and for the final figure."""

    train: list[Document]
    valid: list[Document]
    test: list[Document]


def split_documents(
    docs: Iterable[Document], fractions: tuple[float, float, float] = (0.9, 0.05, 0.05), salt: str = ""
) -> Split:
    """Split by a hash of the document's id, so that a document's side depends on neither order nor company.

    Args:
        docs: documents; those with equal ids go together.
        fractions: expected shares of train, valid and test; >= 0, sum 1.
        salt: another salt gives an independent split.

    Raises:
        ValueError: the fractions are negative or do not sum to 1.
    """
    documents = list(docs)
    split = Split([], [], [])
    for doc, side in zip(documents, split_sides([doc.id for doc in documents], fractions, salt), strict=True):
        split[side].append(doc)
    return split


def split_sides(ids: Iterable[str], fractions: tuple[float, float, float], salt: str = "") -> NDArray[np.int8]:
    """The side of each document by its id alone: 0 train, 1 valid, 2 test; ``(ids,)``.

    Raises:
        ValueError: the fractions are negative or do not sum to 1.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions must be >= 0 and sum to 1; got {fractions}.")
    places = np.array([int(_digest(f"{salt}\0{id}", 8), 16) / 2**64 for id in ids])
    # Test first: changing the share of valid never moves a document into or out of test.
    sides = np.where(places < fractions[2], 2, np.where(places < fractions[1] + fractions[2], 1, 0))
    return sides.astype(np.int8)


def fingerprint(docs: Iterable[Document]) -> str:
    """Return 32 hexadecimal digits that change with any id, any text, or the order."""
    digest = hashlib.blake2b(digest_size=16)
    for doc in docs:
        for part in (doc.id, doc.text):
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


_NGRAM, _BANDS, _ROWS = 5, 16, 4  # 64 permutations in all


class _Shingles:
    """The sets of word 5-grams of some texts, as sorted 64-bit hashes, with band keys for candidate search."""

    def __init__(self, texts: Sequence[str]) -> None:
        vocabulary: dict[str, int] = {}
        words = [[vocabulary.setdefault(w, len(vocabulary)) for w in re.findall(r"\w+", t.lower())] for t in texts]
        # Equal where the words are, whatever the case and punctuation; a text without words is itself.
        self.exact = [tuple(ids) or text.strip() for ids, text in zip(words, texts, strict=True)]
        self._hashes = np.array([int(_digest(word, 8), 16) for word in vocabulary], dtype=np.uint64)
        self.sets = [self._set(np.array(ids, dtype=np.int64)) for ids in words]
        self.keys = self._band_keys()

    def _set(self, ids: NDArray[np.int64]) -> NDArray[np.uint64]:
        hashed = self._hashes[ids]
        n = min(_NGRAM, len(hashed))  # a shorter text is one shingle, itself
        if n == 0:
            return hashed
        code = np.zeros(len(hashed) - n + 1, dtype=np.uint64)
        for i in range(n):
            code = code * np.uint64(0x9E3779B97F4A7C15) + hashed[i : len(hashed) - n + 1 + i]
        return np.unique(code)

    def _band_keys(self) -> NDArray[np.uint64]:
        """One key per text and band, ``(texts, 16)``; texts without a word get keys that are never looked up."""
        keys = np.zeros((len(self.sets), _BANDS), dtype=np.uint64)
        # Multiply-add-shift: random odd multipliers, and the high bits, since the low ones of a product are weak.
        a = hash_bits(0, np.arange(_BANDS * _ROWS), 1, stream=1)[:, 0] | np.uint64(1)
        b = hash_bits(0, np.arange(_BANDS * _ROWS), 1, stream=2)[:, 0]
        for i, shingles in enumerate(self.sets):
            if len(shingles):
                mixed = shingles ^ (shingles >> np.uint64(32))
                # A piece at a time, so that a book does not need 64 times its size.
                pieces = (mixed[at : at + 65536, None] for at in range(0, len(mixed), 65536))
                signature = np.min([((piece * a + b) >> np.uint64(16)).min(axis=0) for piece in pieces], axis=0)
                signature = signature.reshape(_BANDS, _ROWS)
                for row in range(_ROWS):
                    keys[i] = keys[i] * np.uint64(0xBF58476D1CE4E5B9) + signature[:, row]
        return keys

    def jaccard(self, i: int, j: int) -> float:
        a, b = self.sets[i], self.sets[j]
        shared = len(np.intersect1d(a, b, assume_unique=True))
        union = len(a) + len(b) - shared
        return shared / union if union else 0.0


class _Index:
    """The texts kept so far; answers which of them a text duplicates."""

    def __init__(self, shingles: _Shingles, threshold: float) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be in (0, 1); got {threshold}.")
        self._shingles, self._threshold = shingles, threshold
        self._exact: dict[tuple[int, ...] | str, int] = {}
        self._bands: dict[tuple[int, int], list[int]] = defaultdict(list)

    def add(self, i: int) -> None:
        self._exact.setdefault(self._shingles.exact[i], i)
        if len(self._shingles.sets[i]):
            for band in enumerate(self._shingles.keys[i].tolist()):
                self._bands[band].append(i)

    def exact(self, i: int) -> int | None:
        return self._exact.get(self._shingles.exact[i])

    def near(self, i: int) -> int | None:
        if not len(self._shingles.sets[i]):
            return None
        keys = enumerate(self._shingles.keys[i].tolist())
        candidates = sorted({j for key in keys for j in self._bands.get(key, ())})
        return next((j for j in candidates if self._shingles.jaccard(i, j) > self._threshold), None)


def near_duplicates(docs: Sequence[Document], threshold: float = 0.8) -> NDArray[np.int64]:
    """Find what each document repeats, keeping the first of a kind.

    Args:
        docs: documents, in order of preference.
        threshold: a Jaccard similarity of word 5-grams above this is a near-duplicate; in (0, 1).

    Returns:
        ``(docs,)`` int64: the index of the earliest kept document that this one repeats (case and punctuation aside, or
        nearly), or -1 where it is kept itself.
    """
    index = _Index(_Shingles([doc.text for doc in docs]), threshold)
    repeats = np.full(len(docs), -1, dtype=np.int64)
    for i in range(len(docs)):
        found = index.exact(i)
        found = index.near(i) if found is None else found
        if found is None:
            index.add(i)
        else:
            repeats[i] = found
    return repeats


class Overlap(NamedTuple):
    """What ``drop_overlap`` kept, and how many it dropped for which reason."""

    kept: list[Document]
    exact: int
    near: int


def drop_overlap(train: Sequence[Document], held_out: Sequence[Document], threshold: float = 0.8) -> Overlap:
    """Drop training documents that repeat a held-out one, exactly (case and punctuation aside) or nearly.

    Args:
        train: what may be dropped.
        held_out: what must stay unseen.
        threshold: as in ``near_duplicates``.
    """
    index = _Index(_Shingles([doc.text for doc in (*held_out, *train)]), threshold)
    for i in range(len(held_out)):
        index.add(i)
    kept: list[Document] = []
    exact = near = 0
    for i, doc in enumerate(train, start=len(held_out)):
        if index.exact(i) is not None:
            exact += 1
        elif index.near(i) is not None:
            near += 1
        else:
            kept.append(doc)
    return Overlap(kept, exact, near)
