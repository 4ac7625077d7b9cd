"""Checkpoints that are either whole or absent.

A checkpoint is a directory ``step-00000040``: one safetensors file per group of tensors, ``state.json``, and
``manifest.json`` with the name, size and SHA-256 of each. Everything is written into a temporary neighbour and flushed
to the disk, the manifest last; then the directory is renamed. A process that is killed at any instant leaves the
earlier checkpoints as they were. Nothing is pickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["Checkpoint", "CheckpointError", "CheckpointStore"]

logger = logging.getLogger(__name__)

_FORMAT = 1
_MANIFEST = "manifest.json"
_STATE = "state.json"


class CheckpointError(ValueError):
    """A checkpoint that must not be used: damaged, or of other data or other settings than those of now."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: ``tensors`` by full name (``group/name``), on the CPU, and ``state`` as it went through JSON."""

    step: int
    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]  # Any: JSON


class CheckpointStore:
    """The checkpoints of one training phase, newest ``keep`` of them.

    Only one process may write; others may read what is complete.

    Args:
        directory: holds the checkpoints; made by the first save.
        fingerprint: of the data; a checkpoint of other data is refused.
        keep: how many complete ones stay; at least 1.
    """

    def __init__(self, directory: Path, *, fingerprint: str = "", keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1; got {keep}.")
        self.directory = directory
        self.fingerprint = fingerprint
        self.keep = keep

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write one checkpoint and drop those that are older than the newest ``keep``.

        Args:
            step: names the checkpoint; one of the same step is replaced.
            tensors: by ``group/name``; each group becomes ``group.safetensors``.
            state: JSON, without NaN.

        Raises:
            OSError: the disk is full or fails; the earlier checkpoints are untouched.
            ValueError: a name without a group.
        """
        files = _grouped(tensors)
        target = self.directory / f"step-{step:08d}"
        temporary = self.directory / f".writing-{target.name}"
        self.directory.mkdir(parents=True, exist_ok=True)
        self._sweep()
        try:
            temporary.mkdir()
            for name, group in files.items():
                save_file(group, temporary / name)
            (temporary / _STATE).write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
            manifest = {
                "data": self.fingerprint,
                "files": {name: _seal(temporary / name) for name in (*files, _STATE)},
                "format": _FORMAT,
                "step": step,
            }
            (temporary / _MANIFEST).write_bytes(_canonical(manifest))
            _seal(temporary / _MANIFEST)
            _flush_directory(temporary)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise self._unwritten(step, error) from error
        if target.exists():
            target.rename(self.directory / f".old-{target.name}")
        temporary.rename(target)
        _flush_directory(self.directory)
        for old in self._steps()[: -self.keep]:
            # Renamed first: a deletion that is interrupted must not look like a damaged checkpoint.
            old.rename(self.directory / f".old-{old.name}")
        self._sweep()
        return target

    def latest(self) -> Checkpoint | None:
        """Read the newest complete checkpoint, checked byte by byte against its manifest.

        Returns:
            ``None`` where no checkpoint was ever finished: nothing is lost by starting at step 0.

        Raises:
            FileNotFoundError: there are checkpoints, and files are missing from each.
            CheckpointError: the newest complete one has a changed byte, or belongs to other data.
        """
        steps = self._steps()
        partial = [path for path in steps if not (path / _MANIFEST).is_file()]
        complete = [path for path in steps if path not in partial]
        if not complete:
            if not partial:
                return None
            names = ", ".join(f"step {_step(path)}" for path in partial)
            raise FileNotFoundError(
                f"no complete checkpoint in {self.directory} ({len(partial)} partial: {names}). "
                "Give another directory to start anew."
            )
        if partial:
            logger.warning(
                "%s: ignored without a manifest: %s", self.directory, ", ".join(path.name for path in partial)
            )
        return self._read(complete[-1])

    def newest_step(self) -> int | None:
        """Of the checkpoints that have a manifest, without reading them."""
        return max((_step(path) for path in self._steps() if (path / _MANIFEST).is_file()), default=None)

    def _read(self, path: Path) -> Checkpoint:
        manifest = _checked_manifest(path)
        if manifest["format"] != _FORMAT:
            raise CheckpointError(f"{path} has format {manifest['format']}; this version reads {_FORMAT}.")
        for name, (size, digest) in manifest["files"].items():
            file = path / name
            if not file.is_file() or file.stat().st_size != size or _sha256(file) != digest:
                raise CheckpointError(
                    f"{file} is not what was written: its size or SHA-256 differs from the manifest. "
                    f"Delete {path} to go back to the checkpoint before it."
                )
        if manifest["data"] != self.fingerprint:
            raise CheckpointError(
                f"the data changed under {path}: it was {manifest['data']!r}, it is now {self.fingerprint!r}. "
                "Restore the data, or give another directory to start anew."
            )
        tensors = {
            f"{name.removesuffix('.safetensors')}/{key}": tensor
            for name in manifest["files"]
            if name != _STATE
            for key, tensor in load_file(path / name).items()
        }
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        return Checkpoint(manifest["step"], path, tensors, state)

    def _steps(self) -> list[Path]:
        return sorted(path for path in self.directory.glob("step-*") if re.fullmatch(r"step-\d+", path.name))

    def _sweep(self) -> None:
        for pattern in (".writing-*", ".old-*"):
            for path in self.directory.glob(pattern):
                shutil.rmtree(path)

    def _unwritten(self, step: int, error: OSError) -> OSError:
        kept = self._steps()
        standing = f"the checkpoint of step {_step(kept[-1])} is intact" if kept else "there is no earlier one"
        remedy = "Free some space, then resume." if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Then resume."
        return OSError(
            error.errno,
            f"checkpoint of step {step} not written ({error.strerror or error}); {standing}. {remedy}",
            str(self.directory),
        )


def _grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    files: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        group, slash, name = full_name.partition("/")
        if not slash or not group.isidentifier():
            raise ValueError(f"a tensor of a checkpoint is named 'group/name'; got {full_name!r}.")
        files.setdefault(f"{group}.safetensors", {})[name] = tensor.detach().cpu().contiguous()
    return files


def _canonical(manifest: Mapping[str, Any]) -> bytes:
    body = json.dumps(manifest, sort_keys=True)
    return json.dumps(
        {"manifest": manifest, "sha256": hashlib.sha256(body.encode()).hexdigest()}, sort_keys=True, indent=1
    ).encode()


def _checked_manifest(path: Path) -> dict[str, Any]:
    """The manifest carries its own hash and is compared as bytes, so that no flipped byte in it passes either."""
    content = (path / _MANIFEST).read_bytes()
    try:
        manifest = json.loads(content)["manifest"]
        intact = _canonical(manifest) == content
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path / _MANIFEST} is damaged. Delete {path} to go back to the checkpoint before it.")
    return dict(manifest)


def _seal(path: Path) -> tuple[int, str]:
    """Flush a file to the disk; its size and SHA-256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size, _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
