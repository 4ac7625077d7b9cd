from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import headwater
from headwater.core.distributed import gather_exact, local_rows

sys.path.insert(0, str(Path(__file__).parent))
from ddp_worker import run  # tests are imported by path

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("ddp")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(headwater.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
        "--rdzv_endpoint", "127.0.0.1:0", str(HERE / "ddp_worker.py"), str(directory),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


@pytest.mark.parametrize("name", ["plain", "micro", "headed", "aware"])
def test_oracle_two_processes_train_as_one_does(two_processes, tmp_path, name):
    """Ragged rows, a last batch of one row (one process has none), micro-batches, an objective with weights, and one
    whose rows depend on each other."""
    expected = run(name, tmp_path)
    trained = load_file(two_processes / f"{name}.safetensors")
    assert trained.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(trained[key], tensor, rtol=0, atol=1e-6, msg=key)


def test_oracle_resuming_in_two_processes_is_bit_equal(two_processes):
    whole, resumed = (load_file(two_processes / f"{name}.safetensors") for name in ("plain", "resumed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_property_both_processes_log_the_same_loss_and_only_the_first_writes(two_processes):
    assert (two_processes / "loss-0.txt").read_text() == (two_processes / "loss-1.txt").read_text()
    assert (two_processes / "calls-0.txt").read_text() != "0"
    assert (two_processes / "calls-1.txt").read_text() == "0"


def test_oracle_103_items_in_batches_of_10_on_two_ranks_count_once_each(two_processes):
    for rank in (0, 1):
        assert (two_processes / f"scores-{rank}.txt").read_text() == str(sum(i * i for i in range(103)))


def test_property_rows_are_shared_without_gap_or_overlap():
    for rows in range(12):
        for world in range(1, 6):
            parts = [local_rows(3, 3 + rows, rank, world) for rank in range(world)]
            assert [row for start, stop in parts for row in range(start, stop)] == list(range(3, 3 + rows))
            sizes = [stop - start for start, stop in parts]
            assert max(sizes) - min(sizes) <= 1


def test_degenerate_one_process_reorders_and_drops_repeats():
    values = torch.tensor([[2.0], [0.0], [1.0], [0.0]])
    assert torch.equal(gather_exact(values, torch.tensor([2, 0, 1, 0]), 3), torch.tensor([[0.0], [1.0], [2.0]]))
    assert gather_exact(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), 0).shape == (0, 4)


def test_rejects_items_that_nobody_scored():
    with pytest.raises(ValueError, match="1 of 3 items were scored by no process, the first is item 1"):
        gather_exact(torch.ones(2), torch.tensor([0, 2]), 3)


def test_rejects_values_without_an_index():
    with pytest.raises(ValueError, match="one row per item"):
        gather_exact(torch.ones(2), torch.tensor([0]), 3)
