"""``torchrun -m headwater run``: several processes, one run directory, the result of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

import headwater
from headwater.core.recipe import load_recipe
from headwater.core.run import execute
from headwater.core.yamlio import dump_yaml

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(headwater.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "1",
}


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
        "--rdzv_endpoint", "127.0.0.1:0", "-m", "headwater", *arguments,
    ]  # fmt: skip
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=200)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory, domain_fields: dict[str, Any]) -> tuple[Path, Path, str]:
    """A pipeline of two steps, run by one process and by two; both directories, and what the two printed."""
    root = tmp_path_factory.mktemp("launched")
    first = {"method": "plain", **domain_fields, "replay": 0.25}
    recipe = {"method": "pipeline", "steps": [first, {**first, "model": "previous"}]}
    (root / "recipe.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
    done = launch("run", str(root / "recipe.yaml"), "--out", str(root / "two"))
    assert done.returncode == 0, done.stdout + done.stderr
    execute(load_recipe(recipe), root / "one")
    return root / "one", root / "two", done.stdout


def test_oracle_two_processes_leave_what_one_does(launched: tuple[Path, Path, str]) -> None:
    one, two, _ = launched
    results = [json.loads((run / "result.json").read_text(encoding="utf-8")) for run in (one, two)]
    clock = ("seconds", "_ms", "bytes")
    for name, value in results[0]["metrics"].items():
        if not any(word in name for word in clock):
            assert results[1]["metrics"][name] == pytest.approx(value, abs=1e-5), name
    for step in ("00-plain", "01-plain"):
        weights = [load_file(run / step / "model" / "model.safetensors") for run in (one, two)]
        assert_close(weights[0], weights[1], rtol=0, atol=1e-5)


def test_property_only_the_first_process_writes_and_speaks(launched: tuple[Path, Path, str]) -> None:
    one, two, printed = launched
    files = [sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()) for run in (one, two)]
    assert files[0] == files[1]
    lines = [(run / "00-plain" / "metrics.jsonl").read_text(encoding="utf-8").count("\n") for run in (one, two)]
    assert lines[0] == lines[1]
    assert printed.count("01-plain/domain/gain") == 1


def test_rejects_a_comparison_launched_in_several_processes(tmp_path: Path) -> None:
    done = launch("demo", "--out", str(tmp_path))
    assert done.returncode != 0
    assert "start it once, without torchrun" in done.stderr
