"""Worker processes: results, failures, deaths, interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import toy_family  # tests are imported by path

from headwater.core.run import Result
from headwater.core.workers import Task, run_tasks


@pytest.fixture(scope="module", autouse=True)
def _toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with toy_family.installed(tmp_path_factory.mktemp("site")):
        yield


def run(tmp_path: Path, recipes: dict[str, dict], workers: int = 1) -> dict[str, Result]:
    results = {}
    tasks = [Task(name, recipe, tmp_path / name) for name, recipe in recipes.items()]

    def done(task: Task, result: Result) -> None:
        results[task.name] = result

    run_tasks(tasks, workers=workers, log=tmp_path / "workers.log", done=done, grace_seconds=20)
    return results


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    # An orphan that has ended may stay as a zombie where nothing reaps it.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_property_one_worker_runs_many_tasks_with_its_share_of_threads(tmp_path: Path) -> None:
    results = run(tmp_path, {name: {"method": "bare"} for name in "abc"}, workers=1)
    assert len({result.notes["process"] for result in results.values()}) == 1
    assert results["a"].notes["threads"] == str(len(os.sched_getaffinity(0)))
    two = run(tmp_path, {name: {"method": "bare"} for name in "de"}, workers=2)
    assert two["d"].notes["threads"] == str(max(1, len(os.sched_getaffinity(0)) // 2))


def test_fault_killed_worker_fails_its_run_alone(tmp_path: Path) -> None:
    results = run(tmp_path, {"a": {"method": "bare"}, "b": {"method": "dies"}, "c": {"method": "bare"}})
    assert [results[name].status for name in "abc"] == ["done", "failed", "done"]
    assert "worker died, signal 9 (SIGKILL" in (results["b"].error or "")


def test_fault_failing_run_is_answered_in_its_own_words_and_its_process_is_replaced(tmp_path: Path) -> None:
    results = run(tmp_path, {"a": {"method": "bare"}, "b": {"method": "fails"}, "c": {"method": "bare"}})
    assert results["b"].error == "ArithmeticError: broken <script>alert(1)</script> on purpose"
    assert results["a"].notes["process"] != results["c"].notes["process"]


def test_fault_run_refused_before_it_begins_says_why(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").touch()
    results = run(tmp_path, {"a": {"method": "bare"}})
    assert results["a"].status == "failed"
    assert "mine.txt" in (results["a"].error or "")


def test_property_what_a_run_prints_is_not_taken_for_its_answer(tmp_path: Path) -> None:
    (tmp_path / "release").touch()
    results = run(tmp_path, {"a": {"method": "slow", "release": str(tmp_path / "release")}})
    assert results["a"].status == "done"
    assert "must not be taken" in (tmp_path / "workers.log").read_text()


CALLER = """
import sys, pathlib
from headwater.core.workers import Task, run_tasks
out = pathlib.Path(sys.argv[1])
run_tasks([Task("a", {"method": "slow"}, out / "a")], workers=1, log=out / "workers.log", done=lambda *_: None)
"""


def start_caller(tmp_path: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER, str(tmp_path)], env=environment, stderr=subprocess.DEVNULL, process_group=0
    )
    wait_for((tmp_path / "a" / "began").exists)
    return caller


def test_fault_ctrl_c_lets_the_run_write_its_checkpoint(tmp_path: Path) -> None:
    caller = start_caller(tmp_path)
    worker = int((tmp_path / "a" / ".lock").read_text())
    os.killpg(caller.pid, signal.SIGINT)  # as a terminal does: to all in the foreground
    assert caller.wait(20) == -signal.SIGINT
    assert "SIGTERM" in (tmp_path / "a" / "log.txt").read_text()  # the worker heard it from its parent only
    assert not (tmp_path / "a" / "result.json").exists(), "the run is not over"
    assert (tmp_path / "a" / "checkpointed").exists()
    assert gone(worker)


def test_fault_workers_stop_when_their_parent_is_killed(tmp_path: Path) -> None:
    caller = start_caller(tmp_path)
    worker = int((tmp_path / "a" / ".lock").read_text())
    caller.kill()
    caller.wait(20)
    wait_for(lambda: gone(worker))
    assert (tmp_path / "a" / "checkpointed").exists()


def test_fault_error_in_the_callback_stops_the_workers(tmp_path: Path) -> None:
    tasks = [Task("a", {"method": "bare"}, tmp_path / "a"), Task("b", {"method": "slow"}, tmp_path / "b")]

    def done(task: Task, result: Result) -> None:
        wait_for((tmp_path / "b" / "began").exists)
        raise KeyError(task.name)

    with pytest.raises(KeyError, match="a"):
        run_tasks(tasks, workers=2, log=tmp_path / "workers.log", done=done, grace_seconds=20)
    assert (tmp_path / "b" / "checkpointed").exists()
    assert gone(int((tmp_path / "b" / ".lock").read_text()))


def test_degenerate_no_tasks_start_no_process(tmp_path: Path) -> None:
    assert run(tmp_path, {}) == {}
