"""Safetensors one tensor at a time: read a checkpoint without loading it, write one without holding it.

A file is ``<8 bytes: header length, little endian> <header: JSON> <data>``. The header gives each tensor's dtype, shape
and byte range, so that shapes and dtypes alone decide it: it can be written before the first tensor is computed.
Reads go through ``read``, not ``mmap``: pages of a mapped file count as resident memory, and would for the whole model.

Source: the format's description in the safetensors repository, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "MANIFEST",
    "ShardWriter",
    "TensorMeta",
    "WeightSource",
    "open_files",
    "plan_shards",
    "weight_files",
    "write_json",
]

MANIFEST = "headwater_merge.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation


class TensorMeta(NamedTuple):
    """What a header says of a tensor. ``rows`` counts slices along the first dimension (1 for a scalar)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: torch.dtype) -> TensorMeta:
        """The meta of a dense tensor."""
        return cls(shape, dtype, math.prod(shape) * dtype.itemsize)

    @property
    def rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_elements(self) -> int:
        """Elements in one row."""
        return math.prod(self.shape[1:])


class WeightSource(ABC):
    """Named tensors that are read one at a time: nothing stays in memory but what the caller keeps.

    Attributes:
        label: where the tensors come from, for messages.
        directory: the model directory, if there is one; its configuration and tokenizer files can be copied.
        tied: names known to share another name's tensor, and so not listed (live models only).
        is_delta: the tensors are changes of weights; where there is none, nothing changes.
    """

    label: str
    directory: Path | None = None
    tied: frozenset[str] = frozenset()
    is_delta: bool = False

    @classmethod
    def open(cls, ref: str | Path | Mapping[str, Tensor]) -> WeightSource:
        """Open a directory with ``*.safetensors`` (sharded or not), one such file, or a live ``state_dict()``.

        Only headers are read.

        Raises:
            FileNotFoundError: nothing there, or a shard named by the index is missing.
            ValueError: pickled weights, an adapter, a saved delta, or a damaged file.
        """
        if isinstance(ref, Mapping):
            return _LiveSource(ref)
        path = Path(ref)
        if path.is_dir():
            if (path / "adapter_config.json").is_file():
                raise ValueError(f"{path} holds an adapter, not a model. Read it with adapter_deltas(directory, base).")
            manifest = path / MANIFEST
            if manifest.is_file() and "delta" in json.loads(manifest.read_text("utf-8"))["recipe"]:
                raise ValueError(f"{path} holds a weight difference. Read it with WeightDelta.open(directory).")
            return _FileSource(weight_files(path), str(path), path)
        if not path.is_file():
            raise FileNotFoundError(f"no weights at {path}: give a directory with *.safetensors, or one such file.")
        if path.suffix in _PICKLES:
            raise _pickled(path)
        return _FileSource([path], str(path))

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """All names, in the order in which reading is sequential (file, byte offset)."""

    @abstractmethod
    def meta(self, name: str) -> TensorMeta:
        """Shape, dtype and bytes of a tensor.

        Raises:
            KeyError: the source has no such tensor.
        """

    @abstractmethod
    def slice(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` along the first dimension, as a CPU tensor that the caller owns.

        A scalar has one row and keeps its shape.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Sha256 (hex) over names, shapes and dtypes: over the raw headers where there are files.

        It identifies a layout, not values: two models tuned from one base usually share it. ``stamp`` tells them apart.
        """

    @abstractmethod
    def stamp(self) -> list[list[str | int]] | None:
        """Path, size and modification time (ns) of every file behind this source; None for tensors in memory."""

    def get(self, name: str) -> Tensor:
        """One whole tensor, in its stored dtype, as a CPU tensor that the caller owns."""
        return self.slice(name, 0, self.meta(name).rows)

    @property
    def config(self) -> dict[str, Any]:  # Any: a model configuration is free-form JSON
        """The directory's ``config.json``; empty if there is none."""
        path = self.directory / "config.json" if self.directory else None
        return json.loads(path.read_text("utf-8")) if path and path.is_file() else {}

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __getitem__(self, name: str) -> Tensor:
        return self.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())


def open_files(files: list[Path], label: str, directory: Path | None = None) -> WeightSource:
    """Open safetensors files as one source, whatever they hold; ``label`` and ``directory`` as in ``WeightSource``."""
    return _FileSource(files, label, directory)


class _Entry(NamedTuple):
    path: Path
    offset: int  # bytes from the start of the file
    meta: TensorMeta


class _FileSource(WeightSource):
    def __init__(self, files: list[Path], label: str, directory: Path | None = None) -> None:
        self.label, self.directory, self._files = label, directory, files
        self._entries: dict[str, _Entry] = {}
        digest = hashlib.sha256()
        for path in files:
            header, entries = _read_header(path)
            digest.update(hashlib.sha256(header).digest())
            if twice := sorted(self._entries.keys() & entries.keys()):
                raise ValueError(f"{label}: {twice[0]!r} is stored in more than one file, {path.name} among them.")
            self._entries |= entries
        self._fingerprint = digest.hexdigest()

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def meta(self, name: str) -> TensorMeta:
        if name not in self._entries:
            raise KeyError(f"{self.label} has no tensor {name!r}.")
        return self._entries[name].meta

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        meta = self.meta(name)
        entry, row_bytes = self._entries[name], meta.row_elements * meta.dtype.itemsize
        data = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        # A handle per read: no open files between reads, and threads do not share a position.
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.offset + start * row_bytes)
            view = _bytes_of(data)
            while len(view):
                count = file.readinto(view)
                if not count:
                    raise ValueError(f"{entry.path} ends inside {name!r}: it was cut since it was opened.")
                view = view[count:]
        return data.view(meta.dtype).view((stop - start, *meta.shape[1:]) if meta.shape else ())

    def fingerprint(self) -> str:
        return self._fingerprint

    def stamp(self) -> list[list[str | int]]:
        stats = [(path.resolve(), path.stat()) for path in self._files]
        return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


class _LiveSource(WeightSource):
    label = "a state_dict in memory"

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors: dict[str, Tensor] = {}
        seen: set[tuple[object, ...]] = set()
        tied = set()
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"a state_dict maps names to tensors; {name!r} is a {type(tensor).__name__}.")
            if tensor.is_meta:
                raise ValueError(f"{name!r} is on the meta device: it has no values. Load the model first.")
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if tensor.numel() and place in seen:
                tied.add(name)
                continue
            seen.add(place)
            self._tensors[name] = tensor.detach()
        self.tied = frozenset(tied)

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def meta(self, name: str) -> TensorMeta:
        if name not in self._tensors:
            raise KeyError(f"{self.label} has no tensor {name!r}.")
        return TensorMeta.of(tuple(self._tensors[name].shape), self._tensors[name].dtype)

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        tensor = self._tensors[name]
        # A copy: what the caller does to it must not reach the live model.
        return (tensor[start:stop] if tensor.ndim else tensor).to("cpu", copy=True)

    def fingerprint(self) -> str:
        return hashlib.sha256(_header({name: self.meta(name) for name in self._tensors})).hexdigest()

    def stamp(self) -> None:
        return None


def _bytes_of(data: Tensor) -> memoryview:
    """The memory of a uint8 vector."""
    return memoryview(data.numpy())  # type: ignore[arg-type]  # numpy arrays are buffers; its stubs say so from 3.12 on


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a directory's weights, in the order of their names.

    Raises:
        FileNotFoundError: there are none, or a shard named by the index is missing.
        ValueError: there are only pickles.
    """
    if (directory / _INDEX).is_file():
        listed = sorted(set(json.loads((directory / _INDEX).read_text("utf-8"))["weight_map"].values()))
        if strange := [name for name in listed if Path(name).name != name]:
            raise ValueError(f"{directory / _INDEX} points outside its directory: {strange[0]!r}.")
        if absent := [name for name in listed if not (directory / name).is_file()]:
            raise FileNotFoundError(f"{directory} is incomplete: {len(absent)} shard(s) missing, first {absent[0]}.")
        return [directory / name for name in listed]
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    if files := sorted(directory.glob("*.safetensors")):
        return files
    if pickles := sorted(path for path in directory.iterdir() if path.suffix in _PICKLES):
        raise _pickled(pickles[0])
    raise FileNotFoundError(f"no *.safetensors in {directory}.")


def _pickled(path: Path) -> ValueError:
    if path.suffix == ".bin":
        new = f"{path.parent}-safetensors"
        code = (
            "from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained('{path.parent}').save_pretrained('{new}')"
        )
    else:
        new = str(path.with_suffix(".safetensors"))
        code = (
            "import torch; from safetensors.torch import save_file; "
            f"save_file(torch.load('{path}', weights_only=True), '{new}')"
        )
    return ValueError(f'{path} is a pickle, which can run code when it is read. Convert it once: python -c "{code}"')


def _read_header(path: Path) -> tuple[bytes, dict[str, _Entry]]:
    """The raw header and the tensors of a file in the order of their bytes; refuses what does not add up."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"{path} is not a safetensors file, or was cut: header of {length} bytes in {size}.")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{path} is not a safetensors file: its header is not JSON.") from error
    header.pop("__metadata__", None)
    entries, end = {}, 0
    for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
        if item["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: {name!r} has dtype {item['dtype']}, which cannot be read here.")
        meta = TensorMeta.of(tuple(item["shape"]), _DTYPES[item["dtype"]])
        start, stop = item["data_offsets"]
        if start != end or stop - start != meta.nbytes:
            raise ValueError(f"{path}: the header's byte range of {name!r} does not fit its shape {meta.shape}.")
        entries[name], end = _Entry(path, 8 + length + start, meta), stop
    if 8 + length + end != size:
        raise ValueError(f"{path} was cut: its header describes {8 + length + end} bytes, it has {size}.")
    return raw, entries


def _header(tensors: Mapping[str, TensorMeta]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, meta in tensors.items():
        offsets = [offset, offset + meta.nbytes]
        header[name] = {"dtype": _CODES[meta.dtype], "shape": list(meta.shape), "data_offsets": offsets}
        offset += meta.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)  # data starts at a multiple of 8 bytes


def plan_shards(tensors: Mapping[str, TensorMeta], max_bytes: int) -> dict[str, dict[str, TensorMeta]]:
    """Cut tensors into files of at most ``max_bytes`` of data, in order; a larger tensor has a file of its own.

    Within a file wide dtypes come first, so that every tensor starts aligned (as safetensors' own writer does).

    Returns:
        File name (the Hugging Face scheme) to its tensors. No tensors give one empty file.
    """
    shards: list[dict[str, TensorMeta]] = [{}]
    used = 0
    for name, meta in tensors.items():
        if shards[-1] and used + meta.nbytes > max_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = meta
        used += meta.nbytes
    shards = [dict(sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize)) for shard in shards]
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


class ShardWriter:
    """One file, header first; tensors may come in pieces, in any order, from any thread.

    A context manager: the file takes its name when the block ends well, and is gone when it does not.

    Args:
        path: the file to write.
        tensors: all tensors of the file, in the order of their bytes.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorMeta]) -> None:
        self.path, self._temporary = path, path.with_name(path.name + ".tmp")
        header = _header(tensors)
        self._prefix = len(header).to_bytes(8, "little") + header
        self._offsets, self._missing, self.nbytes = {}, 0, len(self._prefix)
        for name, meta in tensors.items():
            self._offsets[name] = self.nbytes
            self.nbytes += meta.nbytes
            self._missing += meta.nbytes
        self._lock = threading.Lock()
        self._file: BinaryIO

    def __enter__(self) -> ShardWriter:
        self._file = self._temporary.open("wb")
        self._file.write(self._prefix)
        return self

    def write(self, name: str, offset: int, values: Tensor) -> None:
        """Put ``values`` ``offset`` bytes after the start of tensor ``name``."""
        data = _bytes_of(values.contiguous().reshape(-1).view(torch.uint8))
        with self._lock:
            self._file.seek(self._offsets[name] + offset)
            self._file.write(data)
            self._missing -= len(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            assert self._missing == 0, f"{self._missing} bytes of {self.path} were never written"
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is None:
            self._temporary.replace(self.path)
        else:
            self._temporary.unlink()


def write_json(path: Path, value: object) -> None:
    """Write JSON so that the file is either the old one or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
