"""What ``curate`` puts around blocks of datatrove: the source, a guard for each step, the writer, the ledger."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

from headwater.core.cache import atomic_write_text
from headwater.modalities.text.document_store import DocumentStore

try:
    from datatrove.data import Document, DocumentsPipeline
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.filters.base_filter import BaseFilter
    from datatrove.pipeline.writers import JsonlWriter
except ImportError as error:
    raise ImportError("curation stands on datatrove: pip install 'headwater[curate]'.") from error

__all__ = ["Guard", "Kept", "Ledger", "StageDocuments", "StoredDocuments", "settings_of"]

SCORES = 2000  # of each shard, for histograms
SAMPLE_CHARS = 2000


class StoredDocuments(PipelineStep):  # type: ignore[misc]  # datatrove has no annotations
    """A shard of a ``DocumentStore``: neighbours stay together, so shards in order are the documents in order.

    Args:
        documents: what to read; its file must be reachable from every worker.
        shards: how many there are.
    """

    type = "headwater"
    name = "documents"

    def __init__(self, documents: DocumentStore, shards: int) -> None:
        super().__init__()
        self._path, self._positions = documents.path, documents.positions
        self._borders = np.linspace(0, len(documents), shards + 1).round().astype(np.int64)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents of shard ``rank``."""
        here = self._positions[self._borders[rank] : self._borders[rank + 1]]
        for document in DocumentStore(self._path, here):
            yield Document(text=document.text, id=document.id, metadata=dict(document.meta))


class StageDocuments(PipelineStep):  # type: ignore[misc]
    """A shard of what the stage before left, under the same number.

    datatrove's own reader gives shards to workers by their place among the files and notes a path in every document.

    Args:
        folder: that ``Kept`` wrote to.
    """

    type = "headwater"
    name = "documents"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents of shard ``rank``."""
        with gzip.open(self.folder / f"{rank:05d}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                yield Document(text=row.pop("text"), id=row.pop("id"), metadata=row)


class _Watched:
    """Documents on their way into a step: counts them, and remembers those that it has not given back, in order."""

    def __init__(self, documents: Iterator[Document]) -> None:
        self._documents = documents
        self.inside: dict[int, tuple[Document, str]] = {}
        self.count = self.bytes = 0
        self.seconds = 0.0
        self.ended = self.failed = False

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        begin = time.perf_counter()
        self.failed = True  # unless what stands before the step gives a document, or ends
        try:
            document = next(self._documents)
        except StopIteration:
            self.ended, self.failed = True, False
            raise
        finally:
            self.seconds += time.perf_counter() - begin
        self.failed = False
        self.inside[id(document)] = document, document.text
        self.count += 1
        self.bytes += size_of(document)
        return document

    def left(self, document: Document) -> tuple[str | None, list[Document]]:
        """A document has left the step: the text it came with (None for a new one), and those that stood before it."""
        if id(document) not in self.inside:
            return None, []
        before = []
        while (entry := self.inside.pop(next(iter(self.inside))))[0] is not document:
            before.append(entry[0])
        return entry[1], before


class _Removed:
    """The exclusion writer of a filter: one file over all restarts of the step, and a count by reason."""

    def __init__(self, guard: Guard, writer: JsonlWriter) -> None:
        self._guard, self._writer = guard, writer

    def __enter__(self) -> _Removed:
        return self

    def __exit__(self, *exception: object) -> None:
        """The guard closes the file."""

    def write(self, document: Document, rank: int = 0, **names: object) -> None:
        guard = self._guard
        reason = str(document.metadata.get("filter_reason", guard.name))
        guard.removed[reason] += 1
        _, document.text = guard.source.inside.pop(id(document), (document, document.text))  # as it came
        guard.sample("removed", document.text, reason)
        document.metadata["removed_by"] = guard.label
        self._writer.write(document, rank)


class Guard(PipelineStep):  # type: ignore[misc]
    """Runs a step: keeps what it drops, and goes on after a document that breaks it.

    Steps give documents back in the order in which they take them, as datatrove's do. Where one breaks with several in
    hand, each of these is given to it alone.

    Args:
        step: a block of datatrove.
        name: of the step, in the manifest and the reports.
        label: the step's folder below ``removed`` and ``errors``.
        directory: of the curation.
        max_errors: documents of a shard that may break the step; None: an error ends the shard, for a step that counts
            documents and so cannot begin again.
        samples: texts to show of what it dropped, changed and left as it was; that many of each.
    """

    type = "headwater"

    def __init__(
        self, step: Any, name: str, label: str, directory: Path, *, max_errors: int | None, samples: int
    ) -> None:
        super().__init__()
        self.step, self.name, self.label, self.directory = step, name, label, directory
        self.max_errors, self.samples = max_errors, samples
        self.removed: Counter[str] = Counter()
        self.shown: list[dict[str, str]] = []
        self.counts: dict[str, Any] = {}
        self.source = _Watched(iter(()))
        self._errors = 0

    def sample(self, fate: str, text: str, note: str = "") -> None:
        """Remember a text for the report, if there are not enough of its fate; ``note``: why, or what it became."""
        if sum(sample["fate"] == fate for sample in self.shown) < self.samples:
            self.shown.append({"fate": fate, "text": text[:SAMPLE_CHARS], "note": note[:SAMPLE_CHARS]})

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield what the step yields."""
        self.source = source = _Watched(iter(data))
        self.removed.clear()
        self.shown.clear()
        self._errors = 0
        counts = {"docs_out": 0, "bytes_out": 0, "changed": 0}
        scores: list[float] = []
        begin, elsewhere = time.perf_counter(), 0.0
        with self._writer("removed", rank) as writer, self._writer("errors", rank) as broken:
            removed = _Removed(self, writer)
            if hasattr(self.step, "exclusion_writer"):
                self.step.exclusion_writer = removed
            for document in self._survivors(broken, rank, world_size):
                text, before = source.left(document)
                self._drop(before, removed, rank)
                if text is not None and text != document.text:
                    counts["changed"] += 1
                    self.sample("changed", text, document.text)
                else:
                    self.sample("kept", document.text)
                counts["docs_out"] += 1
                counts["bytes_out"] += size_of(document)
                self._note_score(document, scores)
                left = time.perf_counter()
                yield document
                elsewhere += time.perf_counter() - left
            self._drop([document for document, _ in source.inside.values()], removed, rank)
        self.counts = {
            "name": self.name,
            "docs_in": source.count,
            "bytes_in": source.bytes,
            **counts,
            "errors": self._errors,
            "removed": dict(self.removed),
            "seconds": time.perf_counter() - begin - elsewhere - source.seconds,
            "scores": scores,
            "samples": list(self.shown),
        }

    def _survivors(self, broken: JsonlWriter, rank: int, world_size: int) -> Iterator[Document]:
        """What the step gives back, through as many beginnings as it takes."""
        source = self.source
        while not source.ended:
            try:
                yield from self.step.run(source, rank, world_size)
            except Exception as error:  # a step may raise anything; the document is kept in errors/
                if source.failed or self.max_errors is None or not source.inside:  # none of this step's documents
                    raise
                stuck = list(source.inside.values())
                source.inside.clear()
                if len(stuck) == 1 or not self.max_errors:  # where none may break, the step is not asked again
                    self._set_aside(*stuck[0], error, broken, rank)
                    continue
                for document, text in stuck:
                    document.text = text
                    source.inside[id(document)] = document, text
                    try:
                        yield from self.step.run(iter([document]), rank, world_size)
                    except Exception as own:  # noqa: BLE001  # as above
                        source.inside.pop(id(document), None)
                        self._set_aside(document, text, own, broken, rank)

    def _set_aside(self, document: Document, text: str, error: Exception, broken: JsonlWriter, rank: int) -> None:
        self._errors += 1
        document.text = text
        document.metadata |= {"error": repr(error), "traceback": "".join(traceback.format_exception(error))}
        broken.write(document, rank)
        if self.max_errors is not None and self._errors > self.max_errors:
            raise RuntimeError(
                f"step {self.name!r} broke on {self._errors} documents of shard {rank}, more than "
                f"max_errors={self.max_errors}; the last error: {error!r}. They are in "
                f"{self.directory / 'errors' / self.label}."
            ) from error

    def _drop(self, documents: Sequence[Document], removed: _Removed, rank: int) -> None:
        """Keep what a step that is no filter did not give back."""
        for document in documents:
            document.metadata["filter_reason"] = "not given back"
            removed.write(document, rank)

    def _writer(self, kind: str, rank: int) -> JsonlWriter:
        folder = self.directory / kind / self.label
        (folder / f"{rank:05d}.jsonl.gz").unlink(missing_ok=True)  # of an earlier, interrupted try
        return JsonlWriter(str(folder), adapter=flat)

    def _note_score(self, document: Document, scores: list[float]) -> None:
        field = getattr(self.step, "field", None)
        if field is not None and len(scores) < SCORES and not isinstance(self.step, BaseFilter):
            scores.append(float(document.metadata[field]))


def size_of(document: Document) -> int:
    """Bytes of a document's text in UTF-8."""
    return len(document.text.encode("utf-8", "surrogatepass"))


def flat(writer: Any, document: Document) -> dict[str, Any]:  # Any: datatrove passes its writer first
    """A document as one row: ``id``, ``text`` and its metadata as columns, which every reader of JSON lines takes.

    Metadata of those two names become ``meta_id`` and ``meta_text``.
    """
    meta = {f"meta_{key}" if key in ("id", "text") else key: value for key, value in document.metadata.items()}
    return {**meta, "id": document.id, "text": document.text}


class Kept(JsonlWriter):  # type: ignore[misc]
    """Writes what is left, a file for each shard.

    Args:
        folder: written to.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), adapter=flat)


class Ledger(PipelineStep):  # type: ignore[misc]
    """Ends a shard: makes sure that its file is there, and writes what every step did.

    Args:
        guards: of the steps.
        output: the folder that ``Kept`` writes to.
        folder: of the ledgers.
    """

    type = "headwater"
    name = "ledger"

    def __init__(self, guards: Sequence[Guard], output: Path, folder: Path) -> None:
        super().__init__()
        self.guards, self.output, self.folder = list(guards), output, folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Pass documents through; write when they end."""
        path = self.output / f"{rank:05d}.jsonl.gz"
        path.unlink(missing_ok=True)
        yield from data
        if not path.exists():  # so that a shard of which nothing is left keeps its number
            path.parent.mkdir(parents=True, exist_ok=True)
            with gzip.GzipFile(path, "wb", mtime=0):
                pass
        about = {"bytes": path.stat().st_size, "steps": [guard.counts for guard in self.guards]}
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self.folder / f"{rank:05d}.json", json.dumps(about))


def settings_of(step: Any) -> dict[str, Any]:  # Any: a block of datatrove or a marker of curate
    """What decides a step's outcome, as JSON data; two steps with equal settings do the same.

    Raises:
        ValueError: it holds an object of which that cannot be told.
    """
    name = f"{type(step).__module__}.{type(step).__qualname__}"
    if hasattr(step, "about"):
        return {"step": name, **step.about}
    held = asdict(step) if is_dataclass(step) and not isinstance(step, type) else dict(vars(step))
    left_out = ("stats", "exclusion_writer", "_test")
    return {"step": name} | {
        key: _plain(value, name, key) for key, value in sorted(held.items()) if key not in left_out
    }


def _plain(value: Any, step: str, key: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Enum):
        return _plain(value.value, step, key)
    if isinstance(value, Mapping):
        return {
            str(name): _plain(item, step, key) for name, item in sorted(value.items(), key=lambda pair: str(pair[0]))
        }
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item, step, key) for item in value)
    if isinstance(value, (list, tuple)):
        return [_plain(item, step, key) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, re.Pattern):
        return [value.pattern, value.flags]
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value), step, key)
    if isinstance(value, FunctionType) and value.__closure__ is None:
        code = value.__code__
        digest = hashlib.sha256(code.co_code + repr((code.co_consts, code.co_names)).encode()).hexdigest()[:16]
        return f"{value.__module__}.{value.__qualname__} {digest}"
    raise ValueError(
        f"step {step} holds {key}={value!r}, and whether two of those do the same cannot be told. Give the step an "
        "attribute `about`, a dictionary of what decides its outcome."
    )
