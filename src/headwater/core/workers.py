"""Runs in processes of their own: long-lived, bounded in threads, replaced when they die.

A worker is a fresh interpreter that is sent one recipe at a time and answers when it is over; what it measured is in
the run directory. A run that fails ends its worker too, so that nothing it broke (a poisoned CUDA context, memory it
never gave back) reaches the next run.
"""

from __future__ import annotations

import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from headwater.core.recipe import load_recipe
from headwater.core.run import Result, execute, read_result

__all__ = ["Task", "run_tasks", "serve"]

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
)  # fmt: skip

# The search path goes along as an argument: it may hold more than the environment says.
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from headwater.core.workers import serve; serve()"


@dataclass(frozen=True)
class Task:
    """A recipe to execute in a directory.

    Attributes:
        name: what to call it.
        recipe: as plain data, ``method`` included.
        directory: of the run; what an earlier process left there is continued.
    """

    name: str
    recipe: dict[str, Any]  # Any: recipe fields
    directory: Path


def run_tasks(
    tasks: Sequence[Task],
    *,
    workers: int,
    log: Path,
    done: Callable[[Task, Result], None],
    grace_seconds: float = 60.0,
) -> None:
    """Execute tasks in worker processes and hand over each result as it comes; failures are results too.

    A worker that dies fails its task alone and is replaced. When this call is interrupted (Ctrl-C, or ``done``
    raises) the workers are asked to stop, which lets training write a checkpoint, and after ``grace_seconds`` or at
    a second Ctrl-C they are killed. Workers whose parent vanishes stop by themselves.

    Args:
        tasks: in the order in which they are started.
        workers: how many processes; each computes with an equal share of this process' cores.
        log: file that what workers print is appended to.
        done: called in this process with the task and its result.
        grace_seconds: how long an interrupted run may take to write its checkpoint.
    """
    pending, crew = deque(tasks), set[_Worker]()
    count = max(1, min(workers, len(tasks)))
    threads = max(1, _cores() // workers)
    with log.open("ab") as output, selectors.DefaultSelector() as replies:
        try:
            while pending or crew:
                while pending and len(crew) < count:
                    _hire(crew, replies, threads, output).send(pending.popleft())
                for key, _ in replies.select():
                    worker = cast("_Worker", key.data)
                    task, result = worker.receive()
                    if worker.alive and pending:
                        worker.send(pending.popleft())
                    else:
                        replies.unregister(key.fileobj)
                        crew.remove(worker)
                        worker.dismiss()
                    done(task, result)
        finally:
            _stop(crew, grace_seconds)


def _hire(crew: set[_Worker], replies: selectors.BaseSelector, threads: int, output: IO[bytes]) -> _Worker:
    worker = _Worker(threads, output)
    crew.add(worker)
    replies.register(worker.replies, selectors.EVENT_READ, worker)
    return worker


def _stop(crew: set[_Worker], grace_seconds: float) -> None:
    deadline = time.monotonic() + grace_seconds
    try:
        for worker in crew:
            worker.process.terminate()
            # A run that ends of itself right now has taken no notice; its worker then finds that nobody is there.
            with suppress(BrokenPipeError):
                worker.requests.close()
        for worker in crew:
            worker.process.wait(max(0.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for worker in crew:
            worker.process.kill()
    finally:
        for worker in crew:
            worker.dismiss()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, threads: int, output: IO[bytes]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps([path or str(Path.cwd()) for path in sys.path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            # Threads are counted when a library is loaded, so they are set before there is a process to load one.
            env={**os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(threads))},
            process_group=0,  # Ctrl-C reaches the parent alone, which then stops its workers in order
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout
        self.alive = True
        self.task: Task | None = None

    def send(self, task: Task) -> None:
        self.task = task
        request = {"recipe": task.recipe, "directory": str(task.directory), "name": task.name}
        with suppress(BrokenPipeError):  # it died before it was asked; ``receive`` reads the end of its replies
            self.requests.write(json.dumps(request).encode() + b"\n")
            self.requests.flush()

    def receive(self) -> tuple[Task, Result]:
        assert self.task is not None
        reply = self.replies.readline()
        answer = json.loads(reply) if reply.endswith(b"\n") else {"error": self._cause_of_death()}
        self.alive = "error" not in answer
        if (self.task.directory / "result.json").exists():
            return self.task, read_result(self.task.directory)
        return self.task, Result("failed", {}, {}, 0.0, answer.get("error", "the run left no result"))

    def _cause_of_death(self) -> str:
        code = self.process.wait()
        if code >= 0:
            return f"worker ended with exit code {code}"
        hint = "; the machine may have run out of memory" if -code == signal.SIGKILL else ""
        return f"worker died, signal {-code} ({signal.Signals(-code).name}{hint})"

    def dismiss(self) -> None:
        """Close the pipes, at which an idle worker ends, and wait for that."""
        with suppress(BrokenPipeError):  # an unsent request to a dead worker
            self.requests.close()
        self.process.wait()
        self.replies.close()


def serve() -> None:
    """Be a worker: execute the recipes that standard input names, one a line, and answer each with one line.

    A failing run is answered and then ends the process. When standard input closes during a run, its sender is gone:
    the run is asked to stop as by SIGTERM.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    busy = threading.Event()
    threading.Thread(target=_listen, args=(requests, busy), daemon=True).start()
    for line in iter(requests.get, None):
        busy.set()
        request = json.loads(line)
        try:
            recipe = load_recipe(request["recipe"], where=request["name"])
            _bound_threads()
            execute(recipe, Path(request["directory"]), resume=True)
            answer = {"status": "done"}
        except Exception as error:
            _say(answers, {"error": f"{type(error).__name__}: {error}"})
            raise
        busy.clear()
        _say(answers, answer)


def _say(answers: IO[str], answer: dict[str, str]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _listen(requests: queue.SimpleQueue[bytes | None], busy: threading.Event) -> None:
    # os.read instead of sys.stdin: a thread that waits inside a buffered file blocks the end of the interpreter.
    rest = b""
    while chunk := os.read(0, 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            requests.put(line)
    requests.put(None)
    if busy.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


def _bound_threads() -> None:
    torch = sys.modules.get("torch")  # only where the method needs it
    if torch is not None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
