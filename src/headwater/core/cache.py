"""Where derived files live, and how a file is written so that a reader sees all of it or none."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["atomic_path", "atomic_write_bytes", "atomic_write_text", "cache_dir", "cache_key", "cached_json"]


def cache_dir(*parts: str) -> Path:
    """Return a directory of the user cache, created if need be.

    The root is the environment variable ``HEADWATER_CACHE``, else ``~/.cache/headwater``. Whatever lies there can be
    deleted at any time; it is made again.

    Args:
        parts: sub-directories, one name each.

    Raises:
        ValueError: a part is empty, ``.`` or ``..``, or holds a separator.
    """
    for part in parts:
        if part in {"", ".", ".."} or "/" in part or os.sep in part:
            raise ValueError(f"a part of a cache path must be one plain name; got {part!r}.")
    root = os.environ.get("HEADWATER_CACHE")
    path = (Path(root).expanduser() if root else Path.home() / ".cache" / "headwater").joinpath(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary neighbour of ``path`` to write to; on leaving, flush it to disk and rename it to ``path``.

    If the body raises, the neighbour is removed and ``path`` stays as it was. Parent directories are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        # The rename itself survives a power cut only once the directory is on disk too.
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` whole or not at all; see ``atomic_path``."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | Path, data: str) -> None:
    """Write ``data`` to ``path`` as UTF-8, whole or not at all; see ``atomic_path``."""
    atomic_write_bytes(path, data.encode())


def cache_key(about: Any) -> str:  # Any: JSON data
    """Twenty-four hex digits that differ where ``about`` does."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]


def cached_json(kind: str, about: Any, compute: Callable[[], Any]) -> Any:  # Any: JSON data
    """``compute()``, or what it gave for the same ``about`` before.

    Args:
        kind: directory of the user cache to keep it in.
        about: JSON data that says everything the result depends on.
        compute: gives JSON data.
    """
    path = cache_dir(kind) / f"{cache_key(about)}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    value = compute()
    atomic_write_text(path, json.dumps(value))
    return value
