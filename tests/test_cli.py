"""The command line, as a user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from headwater.cli import app
from headwater.core.yamlio import dump_yaml, load_yaml

runner = CliRunner()


def headwater(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headwater", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_property_methods_json_lists_methods_and_no_reference() -> None:
    found = json.loads(runner.invoke(app, ["methods", "--json"]).stdout)
    ids = {entry["id"] for entry in found}
    assert {"stability_gap", "instruction_vector", "gda", "nmc"} <= ids
    assert not ids & {"plain", "frozen", "sequential"}
    assert all(entry["kind"] == "method" for entry in found)


def test_property_show_tells_source_fields_and_citation() -> None:
    shown = runner.invoke(app, ["methods", "show", "stability_gap"]).stdout
    for words in ("arXiv:2406.14833", "epochs = 4.0", "Needs: base model", "subset tokens = budget"):
        assert words in shown
    assert "@misc{guo2024stabilitygap" in runner.invoke(app, ["methods", "show", "stability_gap", "--bibtex"]).stdout


def test_property_init_gives_a_recipe_that_dry_run_resolves(tmp_path: Path) -> None:
    text = runner.invoke(app, ["init", "plain"]).stdout
    filled = load_yaml(text) | {"model": "org/model", "domain": "texts.jsonl", "budget": {"tokens": 1_000_000}}
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml(filled))
    shown = runner.invoke(app, ["run", str(path), "--out", str(tmp_path / "x"), "--set", "optim.lr=5e-4", "--dry"])
    assert load_yaml(shown.stdout)["optim"]["lr"] == 5e-4
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["methods", "show", "nothing_like_it"], "no method 'nothing_like_it'"),
        (["run", "missing.yaml", "--out", "x"], "no file missing.yaml"),
        (["reproduce"], "name one method, or give --all"),
        (["advise", "--have", "a yacht"], "no method asks for 'a yacht'"),
    ],
)
def test_rejects_in_one_line_with_exit_code_2(words: list[str], message: str, tmp_path: Path) -> None:
    done = headwater(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_property_run_resume_and_report(domain_fields: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml({"method": "plain", **domain_fields}))
    done = headwater("run", path, "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert "domain/gain" in done.stdout
    again = headwater("run", path, "--out", tmp_path / "a")
    assert again.returncode == 2
    assert "Add --resume" in again.stderr
    assert headwater("run", path, "--out", tmp_path / "a", "--resume").returncode == 0
    report = headwater("report", tmp_path / "a")
    assert report.returncode == 0, report.stderr
    assert Path(report.stdout.strip()).read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_fault_a_signal_checkpoints_and_the_rest_is_equal(
    domain_fields: dict[str, Any], tmp_path: Path, signum: int, code: int
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml({"method": "plain", **domain_fields, "budget": {"steps": 2_000}, "eval_at": [0.0]}))
    command = [sys.executable, "-m", "headwater", "run", str(path), "--out", str(tmp_path / "a")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "a" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "stopped:" in stderr
    assert list((tmp_path / "a" / "checkpoints" / "train").glob("step-*"))


def test_property_demo_writes_its_comparison_and_overwrites_nothing(tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    assert headwater("demo", "--write", target).returncode == 0
    assert load_yaml(target.read_text())["family"] == "domain"
    again = headwater("demo", "--write", target)
    assert again.returncode == 2
    assert "exists" in again.stderr
