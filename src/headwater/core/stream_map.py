"""``stream_map``: a new checkpoint as a function of existing ones, one tensor at a time.

    out[name] = round( fn(name, {source: its values of that tensor, in float32}) )      for every name of the base

Arithmetic is done in float32 and rounded once: the difference of two nearby bfloat16 values is exact, but scaling,
summing and adding in bfloat16 round at every step. Memory depends on the largest tensor (for elementwise functions: on
a block of one), never on the size of the model: a safetensors header can be written before the values are known.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headwater.core.merge_plan import TensorTask, plan_merge
from headwater.core.safetensors_stream import MANIFEST, ShardWriter, WeightSource, plan_shards, write_json

__all__ = ["MapFn", "MergeReport", "OutDtype", "require_finite", "stream_map"]

MapFn = Callable[[str, dict[str, Tensor]], Tensor | None]
OutDtype = Literal["auto", "float32", "bfloat16", "float16"]

_FORMAT = 1
# Elements per block of an elementwise function: large enough that handing blocks from thread to thread costs little,
# small enough that the float32 copies of a few sources stay in the processor's last cache.
_BLOCK = 1 << 20
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    "*processor_config.json",
)
_MODEL_SUFFIXES = frozenset({".json", ".txt", ".model", ".tiktoken", ".jinja"})


@dataclass(frozen=True)
class MergeReport:
    """What ``stream_map`` did.

    Attributes:
        out: the new directory.
        tensors: tensors written.
        files: weight files written, resumed ones included.
        resumed: how many of them an earlier, interrupted call had written.
        bytes_read: bytes of input read by this call.
        bytes_written: bytes of the weight files written by this call.
        seconds: wall time of this call.
        zero_share: per source but the base, the share of elements in [0, 1] that do not differ from the base (for a
            ``WeightDelta``: that are zero). Large values say that the published dtype has lost most of the change.
        copied: tensors copied from the base because a source lacks them (``missing="copy"``).
        skipped: tensors left out for that reason (``missing="skip"``), and heads that are tied to the embedding.
        ignored: tensors that some source has and the base has not.
        vocabulary_rows: rows written of each tensor whose number of rows differed between sources.
    """

    out: Path
    tensors: int
    files: int
    resumed: int
    bytes_read: int
    bytes_written: int
    seconds: float
    zero_share: dict[str, float]
    copied: tuple[str, ...]
    skipped: tuple[str, ...]
    ignored: tuple[str, ...]
    vocabulary_rows: dict[str, int]


def stream_map(
    sources: Mapping[str, WeightSource],
    fn: MapFn,
    out: Path,
    *,
    base: str = "base",
    files_from: str | None = None,
    out_dtype: OutDtype = "auto",
    accumulate: torch.dtype = torch.float32,
    max_memory: int = 4 << 30,
    max_shard_size: int = 5_000_000_000,
    missing: Literal["error", "copy", "skip"] = "error",
    vocab: Literal["error", "base", "union"] = "error",
    workers: int = 1,
    recipe: Mapping[str, object] | None = None,
) -> MergeReport:
    """Write the model whose tensors are ``fn`` of the sources' tensors; never holds a model, or a file, in memory.

    The directory appears, complete, by one rename. An interrupted call leaves ``OUT.partial``; the same call goes on
    after the last complete file, to identical bytes. Integer and boolean tensors must be equal in
    all sources and are copied.

    Args:
        sources: role to source. A ``WeightDelta`` gives zeros for the tensors that it does not hold.
        fn: ``fn(name, values)`` with one tensor of ``accumulate`` dtype per role, its to change in place; returns the
            new tensor in the same shape, or None to keep the base's. If ``fn.elementwise`` is true it is called on
            blocks of rows instead of whole tensors: faster, and with bounded memory. ``workers > 1`` call it from
            several threads.
        out: the new directory; must not exist (or be empty), nor lie within a source's.
        base: the role whose names, order, shapes and dtypes are followed.
        files_from: the role whose configuration, tokenizer and chat template are copied; default: the base's, if it is
            a directory.
        out_dtype: of floating-point tensors; "auto" keeps the base's, tensor by tensor.
        accumulate: dtype of the arithmetic, float32 or float64; raised to float64 for tensors stored so.
        max_memory: bytes that the work in flight may take, estimated as four times the inputs of a call of ``fn``.
        max_shard_size: bytes of tensors per file.
        missing: when names differ: stop, copy the base's tensor, or leave it out. Names that the base lacks are never
            written. A ``lm_head.weight`` that is absent because it is tied to the embedding is no difference.
        vocab: when embedding and head differ in rows: stop, keep the base's rows, or keep all ("union": rows
            beyond the base's are copied from the first source that has them).
        workers: blocks (tensors, if not elementwise) computed at a time. One more thread reads ahead.
        recipe: what ``fn`` does, as JSON: goes to ``headwater_merge.json``. A partial result is only resumed by a call
            with an equal recipe, and never without one, as a function cannot be compared.

    Raises:
        FileExistsError: ``out`` is there, or an ``OUT.partial`` that this call cannot continue.
        ValueError: names, shapes, integer tensors or vocabularies differ; a source or the result holds NaN or infinity;
            a source is quantised; a tensor needs more than ``max_memory``; the output lies in a source's directory.
        OSError: not enough free disk space; checked before anything is read.
    """
    started = time.perf_counter()
    out = Path(out)
    _check_arguments(sources, base, files_from, accumulate, workers)
    _check_place(sources, out)
    plan = plan_merge(sources, base, out_dtype, missing, vocab)
    tasks = {task.name: task for task in plan.tasks}
    shards = plan_shards({task.name: task.out for task in plan.tasks}, max_shard_size)
    engine = _Engine(sources, base, fn, accumulate, max_memory // workers)
    for task in plan.tasks:
        engine.block_rows(task)

    nbytes = {file: sum(meta.nbytes for meta in shard.values()) for file, shard in shards.items()}
    settings = {
        "base": base,
        "files_from": files_from,
        "out_dtype": out_dtype,
        "accumulate": str(accumulate).removeprefix("torch."),
        "missing": missing,
        "vocab": vocab,
        "bytes": nbytes,
    }
    origin = {role: {"path": source.label, "sha256": source.fingerprint()} for role, source in sources.items()}
    manifest = {"format": _FORMAT, "sources": origin, "settings": settings, "recipe": dict(recipe or {})}
    stamps = {role: source.stamp() for role, source in sources.items()}
    progress = _Progress(out, manifest, stamps, resumable=recipe is not None and None not in stamps.values())
    try:
        resumed = len(progress.tallies)
        writers = [ShardWriter(progress.directory / f, s) for f, s in shards.items() if f not in progress.tallies]
        _check_disk(sum(writer.nbytes for writer in writers), progress.directory)
        for writer in writers:
            with writer:
                tally = engine.run([tasks[name] for name in shards[writer.path.name]], writer, workers)
            progress.complete(writer.path.name, tally)
        shares = _zero_shares(engine.compared, progress.tallies.values(), plan.tasks)
        if len(shards) > 1:
            places = {name: file for file, shard in shards.items() for name in shard}
            content = {"metadata": {"total_size": sum(nbytes.values())}, "weight_map": places}
            write_json(progress.directory / "model.safetensors.index.json", content)
        _copy_model_files(sources[files_from or base], progress.directory, out_dtype, plan.vocabulary_rows)
        progress.publish(
            {"zero_share": shares, "copied": plan.copied, "skipped": plan.skipped, "ignored": plan.ignored}
        )
    finally:
        progress.discard_if_empty()
    return MergeReport(
        out=out,
        tensors=len(plan.tasks),
        files=len(shards),
        resumed=resumed,
        bytes_read=engine.bytes_read,
        bytes_written=sum(writer.nbytes for writer in writers),
        seconds=time.perf_counter() - started,
        zero_share=shares,
        copied=plan.copied,
        skipped=plan.skipped,
        ignored=plan.ignored,
        vocabulary_rows=plan.vocabulary_rows,
    )


def _check_arguments(
    sources: Mapping[str, WeightSource], base: str, files_from: str | None, accumulate: torch.dtype, workers: int
) -> None:
    for role in (base, files_from or base):
        if role not in sources:
            raise ValueError(f"there is no source {role!r}; sources are {', '.join(sources) or 'none'}.")
    if files_from and sources[files_from].directory is None:
        raise ValueError(f"files_from={files_from!r} is not a directory: there is no configuration to copy.")
    if accumulate not in (torch.float32, torch.float64):
        raise ValueError(
            f"accumulate must be torch.float32 or torch.float64; got {accumulate}, which rounds every step."
        )
    if workers < 1:
        raise ValueError(f"workers must be at least 1; got {workers}.")
    for role, source in sources.items():
        if source.config.get("quantization_config"):
            raise ValueError(f"{role!r} ({source.label}) is quantised; give the unquantised model.")


def _check_place(sources: Mapping[str, WeightSource], out: Path) -> None:
    # A single file is not a model directory: results may lie next to it.
    whole = [source for source in sources.values() if source.directory or source.is_delta]
    inputs = {Path(str(path)).parent for source in whole for path, *_ in source.stamp() or []}
    for directory in sorted(inputs):
        if out.resolve() == directory or directory in out.resolve().parents:
            raise ValueError(
                f"the output {out} lies in an input's directory, {directory}; choose a path outside of it."
            )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists; delete it or choose another output.")


def _check_disk(need: int, place: Path) -> None:
    free = shutil.disk_usage(place).free
    if need > free:
        raise OSError(errno.ENOSPC, f"the result needs {need / 1e9:.3f} GB; {free / 1e9:.3f} GB are free at {place}.")


class _Piece(NamedTuple):
    task: TensorTask
    start: int
    stop: int
    donor: str | None  # for rows beyond the base's: the role that they are copied from


class _Engine:
    """Reads, computes and writes the pieces of tensors."""

    def __init__(
        self, sources: Mapping[str, WeightSource], base: str, fn: MapFn, accumulate: torch.dtype, max_memory: int
    ) -> None:
        self._sources, self._base, self._fn, self._accumulate = sources, base, fn, accumulate
        self._elementwise = bool(getattr(fn, "elementwise", False))
        self._max_memory = max_memory
        self.compared = [role for role, source in sources.items() if role != base or source.is_delta]
        self.bytes_read = 0

    def block_rows(self, task: TensorTask) -> int:
        """Rows per piece.

        Raises:
            ValueError: even that is too much for ``max_memory``.
        """
        rows = max(task.inner.rows, 1)
        if self._elementwise or not task.mapped:
            rows = max(
                1, min(rows, _BLOCK // max(task.inner.row_elements, 1), self._max_memory // max(task.row_bytes, 1))
            )
        if rows * task.row_bytes > self._max_memory:
            raise ValueError(
                f"{task.name!r} needs about {rows * task.row_bytes:,} bytes of memory, and max_memory allows "
                f"{self._max_memory:,} per worker. Raise it, or set fn.elementwise = True if fn can work on blocks."
            )
        return rows

    def run(self, tasks: list[TensorTask], writer: ShardWriter, workers: int) -> Counter[str]:
        """Write all pieces of one file; one thread reads the next piece while ``workers`` threads compute.

        Returns:
            For each compared role, how many elements do not differ from the base.
        """
        tally = Counter[str]()
        pending: deque[Future[Counter[str]]] = deque()
        pieces = (piece for task in tasks for piece in self._pieces(task))
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(workers) as pool:
            ahead: Future[tuple[_Piece, dict[str, Tensor]]] | None = None
            for piece in chain(pieces, (None,)):
                loaded = ahead.result() if ahead else None
                if len(pending) == workers:
                    tally.update(pending.popleft().result())
                if loaded:
                    pending.append(pool.submit(self._compute, *loaded, writer))
                ahead = reader.submit(self._read, piece) if piece else None
            for future in pending:
                tally.update(future.result())
        return tally

    def _pieces(self, task: TensorTask) -> Iterator[_Piece]:
        step = self.block_rows(task)
        if task.inner.nbytes:
            for start in range(0, task.inner.rows, step):
                yield _Piece(task, start, min(start + step, task.inner.rows), None)
        start = task.inner.rows
        while start < task.out.rows:
            full = (role for role in task.holders if not self._sources[role].is_delta)
            donor = next(role for role in full if self._sources[role].meta(task.name).rows > start)
            stop = min(start + step, self._sources[donor].meta(task.name).rows)
            yield _Piece(task, start, stop, donor)
            start = stop

    def _read(self, piece: _Piece) -> tuple[_Piece, dict[str, Tensor]]:
        loaded = {}
        for role in (piece.donor,) if piece.donor else piece.task.holders:
            rows = self._sources[role].meta(piece.task.name).rows
            if piece.start < rows:
                loaded[role] = self._sources[role].slice(piece.task.name, piece.start, min(piece.stop, rows))
                self.bytes_read += loaded[role].nbytes
        return piece, loaded

    def _compute(self, piece: _Piece, loaded: dict[str, Tensor], writer: ShardWriter) -> Counter[str]:
        task, tally = piece.task, Counter[str]()
        if piece.donor is None and task.mapped:
            values = self._values(piece, loaded)
            loaded.clear()
            reference = values[self._base]
            for role in self.compared:
                # numpy counts what is equal four times as fast as torch.
                other = 0 if self._sources[role].is_delta else reference.numpy()
                tally[role] = int(np.count_nonzero(values[role].numpy() == other))
            shape = reference.shape
            result = self._fn(task.name, values)
            result = reference if result is None else result
            if result.shape != shape:
                raise ValueError(f"fn gave shape {list(result.shape)} for {task.name!r}; expected {list(shape)}.")
        else:
            result = loaded[piece.donor or self._base]
            self._check_copy(task, loaded)
        result = result.to(task.out.dtype)
        if task.out.dtype.is_floating_point:
            require_finite(result, f"the result for {task.name!r} is NaN or too large for {task.out.dtype}.")
        writer.write(task.name, piece.start * task.out.row_elements * task.out.dtype.itemsize, result)
        return tally

    def _values(self, piece: _Piece, loaded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What ``fn`` is given: one tensor of the same shape per role, in the dtype of the arithmetic."""
        task = piece.task
        dtype = torch.promote_types(self._accumulate, task.inner.dtype)
        shape = (piece.stop - piece.start, *task.inner.shape[1:]) if task.inner.shape else ()
        values: dict[str, Tensor] = {}
        for role in (self._base, *(role for role in self._sources if role != self._base)):
            source = self._sources[role]
            value = (
                loaded[role].to(dtype) if role in loaded else torch.zeros((0, *shape[1:]) if shape else (), dtype=dtype)
            )
            self._require_finite_source(role, task.name, value)
            if value.shape != shape:
                # Rows that this source lacks do not change: no difference, or the base's own rows.
                rest = torch.zeros(shape, dtype=dtype) if source.is_delta else values[self._base]
                value = torch.cat([value, rest[len(value) :]])
            values[role] = value
        return values

    def _check_copy(self, task: TensorTask, loaded: Mapping[str, Tensor]) -> None:
        for role, value in loaded.items():
            if task.out.dtype.is_floating_point:
                self._require_finite_source(role, task.name, value)
            elif not torch.equal(value, loaded[self._base]):
                raise ValueError(f"{task.name!r} ({value.dtype}) differs between {self._base!r} and {role!r}.")

    def _require_finite_source(self, role: str, name: str, values: Tensor) -> None:
        require_finite(values, f"source {role!r} ({self._sources[role].label}) holds NaN or infinity in {name!r}.")


def require_finite(values: Tensor, message: str) -> None:
    """Raise ``ValueError(message)`` if ``values`` holds NaN or infinity."""
    # A finite sum proves that all terms are finite, and costs no temporary; a sum can overflow without that.
    if not math.isfinite(values.sum(dtype=torch.float32)) and not bool(torch.isfinite(values).all()):
        raise ValueError(message)


def _zero_shares(
    roles: Iterable[str], tallies: Iterable[Counter[str]], tasks: Iterable[TensorTask]
) -> dict[str, float]:
    elements = sum(math.prod(task.inner.shape) for task in tasks if task.mapped)
    counts = sum(tallies, Counter[str]())
    return {role: counts[role] / max(elements, 1) for role in roles}


class _Progress:
    """The directory ``OUT.partial``: its complete files, and what they are made from."""

    def __init__(
        self, out: Path, manifest: dict[str, Any], stamps: dict[str, list[list[str | int]] | None], resumable: bool
    ) -> None:
        self._out, self._manifest, self._started = out, manifest, manifest | {"stamps": stamps}
        self.directory = out.with_name(out.name + ".partial")
        self.tallies: dict[str, Counter[str]] = {}
        if self.directory.exists():
            self._resume(resumable)
        else:
            self.directory.mkdir(parents=True)
            self._save()

    def _resume(self, resumable: bool) -> None:
        path = self.directory / MANIFEST
        saved = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        changed = [key for key, value in json.loads(json.dumps(self._started)).items() if saved.get(key) != value]
        reason = "it was started with other " + ", ".join(changed)
        if not resumable:
            reason = "without a recipe, and with weights in memory, it is not known to be the same merge"
        if changed or not resumable:
            raise FileExistsError(
                f"{self.directory} is left from an interrupted merge and cannot be continued: {reason}. "
                "Delete it to start anew, or choose another output."
            )
        self.tallies = {file: Counter(counts) for file, counts in saved.get("done", {}).items()}

    def _save(self) -> None:
        write_json(self.directory / MANIFEST, self._started | {"complete": False, "done": self.tallies})

    def complete(self, file: str, tally: Counter[str]) -> None:
        """Record that a file is there, under its name."""
        self.tallies[file] = tally
        self._save()

    def publish(self, notes: Mapping[str, object]) -> None:
        """Finish the manifest and give the directory its name."""
        write_json(self.directory / MANIFEST, self._manifest | {"complete": True} | dict(notes))
        if self._out.is_dir():
            self._out.rmdir()  # empty, as checked at the start; not every system renames over it
        self.directory.rename(self._out)

    def discard_if_empty(self) -> None:
        """After a failure: keep nothing if there is nothing to go on from."""
        if not self.tallies:
            shutil.rmtree(self.directory, ignore_errors=True)


def _copy_model_files(source: WeightSource, target: Path, out_dtype: str, vocabulary_rows: Mapping[str, int]) -> None:
    """Copy configuration, tokenizer and chat template; the configuration follows the written dtype and vocabulary."""
    if source.directory is None:
        return
    found = {path for pattern in _MODEL_FILES for path in source.directory.glob(pattern)}
    for path in sorted(path for path in found if path.is_file() and path.suffix in _MODEL_SUFFIXES):
        place = target / path.relative_to(source.directory)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
    if config := source.config:
        for section in [config, *(value for value in config.values() if isinstance(value, dict))]:
            if vocabulary_rows and "vocab_size" in section:
                section["vocab_size"] = max(vocabulary_rows.values())
            for key in ("dtype", "torch_dtype"):
                if out_dtype != "auto" and isinstance(section.get(key), str):
                    section[key] = out_dtype
        write_json(target / "config.json", config)
