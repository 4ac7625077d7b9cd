"""The run directory: whole or refused, locked, without secrets."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from headwater.core.recipe import Metrics, load_recipe
from headwater.core.run import Run, RunError, check_name, execute, read_result
from headwater.domain.references import Frozen

RECIPE = {"method": "frozen", "model": "a/b", "domain": "c", "budget": {"tokens": 10}}


def frozen(**changes: Any) -> Any:
    return load_recipe({**RECIPE, **changes})


class Quick(Frozen):
    """A recipe that only reports, to test the directory without a model."""

    id: ClassVar[str] = "frozen"
    calls: ClassVar[list[int]] = []

    def run(self, run: Run) -> Metrics:
        self.calls.append(self.seed)
        run.record_data("domain", "abc")
        run.log({"loss": 1.0}, step=1)
        logging.getLogger("headwater.test").warning("working")
        return {"x": 1.0}


def quick(**changes: Any) -> Quick:
    return Quick(**dict(frozen(**changes)))


def test_property_a_finished_run_is_read_not_run_again(tmp_path: Path) -> None:
    Quick.calls.clear()
    first = execute(quick(), tmp_path / "a")
    again = execute(quick(), tmp_path / "a", resume=True)
    assert Quick.calls == [0]
    assert again == first
    assert first.metrics == {"x": 1.0}
    assert json.loads((tmp_path / "a" / "metrics.jsonl").read_text()) == {"loss": 1.0, "step": 1}
    assert "working" in (tmp_path / "a" / "log.txt").read_text()


@pytest.mark.parametrize("name", ["../up", "..", "a/b", "", ".hidden", "a..b", "a\0b", "x" * 201, "-x"])
def test_rejects_names_that_are_no_single_safe_component(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a file or run"):
        check_name(name)


def test_rejects_a_directory_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"is no run directory \(it has notes.txt\)"):
        execute(quick(), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_rejects_a_second_run_without_resume_and_another_recipe_with_it(tmp_path: Path) -> None:
    execute(quick(), tmp_path / "a")
    with pytest.raises(RunError, match=r"already holds a run. Add --resume"):
        execute(quick(), tmp_path / "a")
    with pytest.raises(RunError, match=r"another recipe .they differ in held_out, seed."):
        execute(quick(seed=1, held_out=0.2), tmp_path / "a", resume=True)


def test_rejects_a_directory_without_a_result(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has no result.json"):
        read_result(tmp_path)


def test_fault_two_processes_on_one_run_directory(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path / "a" / ".lock")],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline().strip() == "locked"
    with pytest.raises(RunError, match=rf"in use by another process \(pid {holder.pid}\)"):
        execute(quick(), tmp_path / "a")
    holder.kill()
    holder.wait()
    assert execute(quick(), tmp_path / "a").status == "done", "the lock dies with its holder"


_HOLD = """
import fcntl, os, sys
stream = open(sys.argv[1], "a+")
fcntl.flock(stream, fcntl.LOCK_EX)
stream.write(str(os.getpid())); stream.flush()
print("locked", flush=True)
sys.stdin.read()
"""


def test_fault_a_failed_run_says_why_and_can_be_resumed(tmp_path: Path) -> None:
    class Failing(Quick):
        def run(self, run: Run) -> Metrics:
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        execute(Failing(**dict(frozen())), tmp_path / "a")
    assert read_result(tmp_path / "a").status == "failed"
    assert read_result(tmp_path / "a").error == "RuntimeError: disk on fire"
    assert execute(quick(), tmp_path / "a", resume=True).status == "done"


def test_property_no_secret_reaches_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_" + "s3cr3t" * 5
    monkeypatch.setenv("HF_TOKEN", secret)

    class Leaky(Quick):
        def run(self, run: Run) -> Metrics:
            logging.getLogger("headwater.test").warning("401 for token %s", secret)
            raise RuntimeError(f"401 for https://user:{secret}@hub")

    with pytest.raises(RuntimeError):
        execute(Leaky(**dict(frozen())), tmp_path / "a")
    for path in (tmp_path / "a").rglob("*"):
        assert path.is_dir() or secret not in path.read_text(), f"{path.name} holds the token"
    assert "<HF_TOKEN>" in (tmp_path / "a" / "log.txt").read_text()


def test_fault_changed_data_are_refused(tmp_path: Path) -> None:
    class Stopped(Quick):
        def run(self, run: Run) -> Metrics:
            run.record_data("domain", "before")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        execute(Stopped(**dict(frozen())), tmp_path / "a")
    with pytest.raises(RunError, match=r"'domain' changed since this run began .fingerprint before, now abc."):
        execute(quick(), tmp_path / "a", resume=True)


def test_property_a_warning_is_said_once_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Run(tmp_path / "run", load_recipe(RECIPE)) as run:
        run.warn("x", "first words")
        run.warn("x", "second words")
    assert run.notes == {"warning/x": "second words"}
    assert [record.message for record in caplog.records].count("first words") == 1
    assert "second words" not in caplog.text
