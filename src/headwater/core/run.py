"""A run: one directory that says everything about one execution of a recipe.

recipe.yaml        the recipe, every field resolved
environment.json   versions, hardware, fingerprints of the data read; no environment variables
metrics.jsonl      what was logged on the way, one JSON object a line
checkpoints/       what resume needs
model/             what the run leaves behind, in formats others open
result.json        status, metrics and cost; written last, so that its presence means the run is over
log.txt            the log

Where several processes were launched for one run (``torchrun -m headwater run``), all of them go through the recipe and
train together; the first one alone writes here. The others have a scratch directory for what they would write.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from headwater import __version__
from headwater.core.cache import atomic_write_text
from headwater.core.launch import launched_rank, wait_for_launched
from headwater.core.recipe import Metrics, Recipe, load_recipe, recipe_data
from headwater.core.signals import Interrupted

__all__ = ["Result", "Run", "RunError", "check_name", "environment", "execute", "read_result"]

FORMAT = 1
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY")
PACKAGES = (
    "headwater", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors",
    "numpy", "scipy", "scikit-learn", "pandas", "networkx",
)  # fmt: skip


class RunError(RuntimeError):
    """A run directory that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Result:
    """What a finished run says of itself (``result.json``).

    Attributes:
        status: ``done`` or ``failed``.
        metrics: what was measured, flat names.
        cost: what it spent (steps, tokens, flops, seconds, peak_bytes, trainable, labels, trials).
        seconds: wall-clock time of this execution.
        error: of a failed run.
        data: fingerprints of the data read, by name.
        notes: short facts for the reader and for ``compare``: ``unit`` of the family's losses, ``warning/...``.
    """

    status: str
    metrics: Metrics
    cost: dict[str, float | int | None]
    seconds: float
    error: str | None = None
    data: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:  # Any: JSON data
        """Plain JSON data."""
        return {"format": FORMAT, **self.__dict__}


def check_name(name: str) -> str:
    """Return ``name`` if it is safe as one component of a path, else raise ``ValueError``."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,199}", name) or ".." in name:
        raise ValueError(
            f"{name!r} cannot name a file or run: use up to 200 letters, digits, '.', '_', '-', '+' or '=', "
            "beginning with a letter or digit, without '..'"
        )
    return name


class Run:
    """An open run directory: where a recipe writes, and the record of what it did.

    Use it as a context manager; it holds the directory's lock from start to end. Code of your own that
    calls a recipe does ``execute(recipe, directory)``, which opens one.

    Args:
        directory: created if missing.
        recipe: what is run here.
        resume: continue what an earlier process left here. Without it a directory that holds a run is refused.

    Raises:
        RunError: another process holds the directory, it holds another recipe, or a run and ``resume`` is off.
    """

    def __init__(self, directory: Path, recipe: Recipe, *, resume: bool = False) -> None:
        self.directory = directory
        self.recipe = recipe
        self.resume = resume
        self.data: dict[str, str] = {}
        self.cost: dict[str, float | int | None] = {}
        self.notes: dict[str, str] = {}
        self.logger = logging.getLogger(f"headwater.run.{directory.name}")
        self._lock: TextIO | None = None
        self._handler: logging.Handler | None = None
        self.is_main_process = launched_rank() == 0
        self._home = directory

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self.is_main_process:
            self._home = Path(tempfile.mkdtemp(prefix="headwater-process-"))
            return self
        self._lock = _acquire(self.directory / ".lock")
        try:
            self._check_recipe()
        except RunError:
            self._lock.close()
            raise
        atomic_write_text(self.directory / "recipe.yaml", self.recipe.to_yaml())
        stored = _read_json(self.directory / "environment.json")
        self.data = dict(stored.get("data", {})) if self.resume else {}
        self._write_environment()
        self._handler = logging.FileHandler(self.directory / "log.txt", encoding="utf-8")
        self._handler.setFormatter(_RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger("headwater").addHandler(self._handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handler is not None:
            logging.getLogger("headwater").removeHandler(self._handler)
            self._handler.close()
        if self._lock is not None:
            self._lock.close()
        if not self.is_main_process:
            shutil.rmtree(self._home, ignore_errors=True)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.directory / "checkpoints"

    @property
    def model(self) -> Path:
        """Where the model that the run leaves behind goes."""
        return self._home / "model"

    def path(self, name: str) -> Path:
        """Path of a file or folder that this run writes; ``name`` must be one safe component."""
        return self._home / check_name(name)

    def nested(self, name: str) -> Path:
        """Directory of a run inside this one, the same in every process."""
        return self.directory / check_name(name)

    def log(self, metrics: Mapping[str, float], **where: float | str) -> None:
        """Append one line to ``metrics.jsonl``: ``where`` (step, phase, ...) and the metrics."""
        line = json.dumps({**where, **metrics})
        with (self._home / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def warn(self, topic: str, message: str) -> None:
        """Keep a warning with the result, as the note ``warning/topic``, and log the first one of each topic."""
        if f"warning/{topic}" not in self.notes:
            self.logger.warning(message)
        self.notes[f"warning/{topic}"] = message

    def write_json(self, name: str, data: Any) -> Path:  # Any: JSON data
        """Write ``data`` atomically as pretty JSON under the run directory."""
        path = self.path(name)
        atomic_write_text(path, json.dumps(data, indent=2) + "\n")
        return path

    def record_data(self, name: str, fingerprint: str) -> None:
        """Remember what data were read; on resume, refuse data that changed.

        Raises:
            RunError: a run resumed here read other data under this name.
        """
        before = self.data.get(name)
        if before is not None and before != fingerprint:
            raise RunError(
                f"{self.directory}: the data {name!r} changed since this run began (fingerprint {before[:16]}, now "
                f"{fingerprint[:16]}). Restore the data to resume, or give another directory to start anew."
            )
        self.data[name] = fingerprint
        self._write_environment()

    def _write_environment(self) -> None:
        self.write_json("environment.json", {**environment(), "data": self.data})

    def _check_recipe(self) -> None:
        stored = self.directory / "recipe.yaml"
        if not stored.exists():
            others = [path.name for path in self.directory.iterdir() if path.name != ".lock"]
            if others:
                raise RunError(
                    f"{self.directory} is no run directory (it has {', '.join(sorted(others)[:5])}). Give a new one."
                )
            return
        if not self.resume:
            raise RunError(
                f"{self.directory} already holds a run. Add --resume to continue it, or give another directory."
            )
        before, now = recipe_data(load_recipe(stored)), recipe_data(self.recipe)
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if changed:
            raise RunError(
                f"{self.directory} holds another recipe (they differ in {', '.join(changed)}). "
                "Give another directory, or the recipe it was started with."
            )


def execute(recipe: Recipe, directory: Path, *, resume: bool = False) -> Result:
    """Run ``recipe`` in ``directory`` and return its result; a finished run is read, not run again.

    An error leaves ``result.json`` with status ``failed`` and its words, and is raised again; a failed or
    interrupted run can be resumed.

    Raises:
        RunError: see ``Run``.
    """
    with Run(directory, recipe, resume=resume) as run:
        stored = directory / "result.json"
        finished = read_result(directory) if resume and stored.exists() else None
        wait_for_launched()  # all have looked before one writes
        if finished is not None and finished.status == "done":
            return finished
        if run.is_main_process:
            stored.unlink(missing_ok=True)
        begin = time.monotonic()
        with _failure_recorded(run, begin):
            metrics = recipe.run(run)
        result = Result(
            "done", dict(sorted(metrics.items())), run.cost, time.monotonic() - begin, None, run.data, run.notes
        )
        run.write_json("result.json", result.to_dict())
        wait_for_launched()  # what was written is there when the next run wants to read it
        return result


@contextmanager
def _failure_recorded(run: Run, begin: float) -> Iterator[None]:
    try:
        yield
    except Interrupted as stopped:  # on request, with a checkpoint: the run is not over, so it has no result
        run.logger.warning("%s", stopped)
        raise
    except Exception as error:
        run.logger.exception("the run failed")
        words = _redact(f"{type(error).__name__}: {error}")
        run.write_json(
            "result.json",
            Result("failed", {}, run.cost, time.monotonic() - begin, words, run.data, run.notes).to_dict(),
        )
        raise


def read_result(directory: Path) -> Result:
    """Read ``result.json`` of a run directory.

    Raises:
        RunError: there is none (the run is not over), or a newer Headwater wrote it.
    """
    path = directory / "result.json"
    if not path.exists():
        raise RunError(f"{directory} has no result.json: the run there is not over, or it is no run directory.")
    data = _read_json(path)
    if data.pop("format", None) != FORMAT:
        raise RunError(f"{path} was written in another format than {FORMAT}; use the Headwater that wrote it.")
    return Result(**data)


def environment() -> dict[str, Any]:  # Any: JSON data
    """Versions and hardware, enough to say why two runs differ. Holds no environment variable."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    versions["headwater"] = __version__
    found: dict[str, Any] = {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": versions,
    }
    torch = sys.modules.get("torch")  # do not import it only to say that no device is there
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["accelerators"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _acquire(path: Path) -> TextIO:
    # flock is released by the kernel when its holder dies, so a killed run never blocks its own resume.
    stream = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        holder = stream.read().strip() or "unknown"
        stream.close()
        raise RunError(
            f"{path.parent} is in use by another process (pid {holder}). Wait for it, or give another directory."
        ) from None
    stream.truncate(0)
    stream.write(str(os.getpid()))
    stream.flush()
    return stream


def _read_json(path: Path) -> dict[str, Any]:  # Any: JSON data
    if not path.exists():
        return {}
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def _redact(text: str) -> str:
    """Blank the values of well-known secret variables, which third-party errors may quote."""
    for name in SECRETS:
        value = os.environ.get(name)
        if value:
            text = text.replace(value, f"<{name}>")
    return text


class _RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _redact(super().format(record))
