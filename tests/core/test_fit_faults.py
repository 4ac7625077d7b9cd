from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import headwater
from headwater.core import checkpoint
from headwater.core.budget import Budget
from headwater.core.checkpoint import CheckpointError
from headwater.core.fit import NonFiniteLoss, Phase, fit
from headwater.core.objective import Loss
from headwater.core.optim import OptimSpec

sys.path.insert(0, str(Path(__file__).parent))
from toy import Toy, ToyObjective, ToyStream, train  # tests are imported by path

KILLED = -9


def run_trials(trials: list[dict]) -> list[int]:
    source = str(Path(headwater.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).parent / "toy.py"), json.dumps(trials)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def final(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "final.safetensors")


def assert_bit_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def kill_and_resume(tmp_path: Path, times: int, seed: int) -> None:
    """Kill one run ``times`` times at random steps, each time further on, and compare it with the undisturbed run."""
    steps = 60
    kills = sorted(random.Random(seed).sample(range(1, steps), times))
    whole = {"directory": str(tmp_path / "whole"), "steps": steps, "every": 3}
    killed = {**whole, "directory": str(tmp_path / "killed")}
    statuses = run_trials([whole, *({**killed, "kill_at_step": step} for step in kills), killed])
    assert statuses == [0, *[KILLED] * times, 0]
    assert_bit_equal(final(tmp_path / "whole"), final(tmp_path / "killed"))


def test_fault_killed_at_random_steps_ends_bit_equal(tmp_path):
    kill_and_resume(tmp_path, times=4, seed=1)


def test_fault_killed_at_random_steps_twenty_times_ends_bit_equal(tmp_path):
    kill_and_resume(tmp_path, times=20, seed=0)


def test_fault_killed_at_every_write_of_a_checkpoint_then_resumed(tmp_path):
    # Three checkpoints and one deletion: every point is met with and without a predecessor.
    whole = {"directory": str(tmp_path / "whole"), "steps": 9, "every": 3}
    trials, points = [whole], range(1, 50)
    for point in points:
        killed = {**whole, "directory": str(tmp_path / f"killed{point}")}
        trials += [{**killed, "kill_at_write": point}, killed]
    statuses = run_trials(trials)
    kills = statuses[1::2]
    number = kills.count(KILLED)
    assert kills == [KILLED] * number + [0] * (len(kills) - number)  # the later points do not exist
    assert (
        number >= 3 * 11
    )  # per checkpoint: two directories made, three files and their seals, manifest, two flushes, a rename
    assert set(statuses[2::2]) == {0}
    for point in points:
        assert_bit_equal(final(tmp_path / "whole"), final(tmp_path / f"killed{point}"))


@pytest.mark.parametrize(("name", "status"), [("term_at_step", 143), ("int_at_step", 130)])
def test_fault_signal_ends_the_step_writes_a_checkpoint_and_exits_by_its_number(tmp_path, name, status):
    whole = {"directory": str(tmp_path / "whole"), "steps": 9}
    stopped = {**whole, "directory": str(tmp_path / "stopped")}
    assert run_trials([whole, {**stopped, name: 4}, stopped]) == [0, status, 0]
    assert (tmp_path / "stopped/checkpoints/toy/step-00000005").is_dir()
    assert_bit_equal(final(tmp_path / "whole"), final(tmp_path / "stopped"))


@pytest.mark.parametrize("call", ["save_file", "fsync", "mkdir"])
def test_fault_full_disk_leaves_the_previous_checkpoint_and_says_so(tmp_path, monkeypatch, call):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    original = checkpoint.CheckpointStore.save

    def save(self, step, tensors, state):
        with monkeypatch.context() as patch:
            if step == 6:
                target = {"save_file": checkpoint, "fsync": os, "mkdir": os}[call]
                patch.setattr(target, call, full)
            return original(self, step, tensors, state)

    monkeypatch.setattr(checkpoint.CheckpointStore, "save", save)
    with pytest.raises(
        OSError, match=r"checkpoint of step 6 not written \(No space left.*step 3 is intact. Free some"
    ) as raised:
        train(tmp_path, steps=9, every=3)
    assert raised.value.errno == errno.ENOSPC
    assert [path.name for path in (tmp_path / "checkpoints/toy").iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    resumed, whole = train(tmp_path, steps=9, every=3), train(tmp_path / "whole", steps=9, every=3)
    assert_bit_equal(resumed.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_fault_flipped_byte_in_any_file_is_refused_by_name(tmp_path, name):
    train(tmp_path, steps=4, every=2)
    file = tmp_path / "checkpoints/toy/step-00000004" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        train(tmp_path, steps=4, every=2)


def test_fault_data_edited_under_a_run_is_refused(tmp_path):
    train(tmp_path, steps=4)
    with pytest.raises(CheckpointError, match=r"the data changed .* 'toy-40-6', it is now 'toy-41-6'"):
        train(tmp_path, steps=4, stream=ToyStream(items=41))


class Poisoned(ToyObjective):
    """Infinite, or with an infinite gradient, on one row of the stream."""

    def __init__(self, row: int, where: str) -> None:
        self.row, self.where = row, where

    def __call__(self, model: nn.Module, batch):
        loss = super().__call__(model, batch)
        if not bool((batch["row"] == self.row).any()):
            return loss
        if self.where == "loss":
            return Loss(loss.total * float("nan"), loss.count)
        zero = model.out.bias.sum() * 0
        return Loss(loss.total + torch.sqrt(zero) * 1.0, loss.count)  # 0, with an infinite slope


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_fault_not_finite_stops_before_the_optimizer_moves(tmp_path, where):
    model = Toy(dropout=0.0)
    seen = []
    phase = Phase("toy", model, ToyStream(), Poisoned(row=27, where=where))
    options = {"optim": OptimSpec(lr=1e-2), "seed": 0, "directory": tmp_path}
    from headwater.core.fit import FitSettings

    def remember(_: dict[str, float]) -> None:
        seen.append([p.clone() for p in model.parameters()])

    with pytest.raises(
        NonFiniteLoss, match=r"phase 'toy', step 4: loss .* on rows 24, 25, 26, 27, 28, 29.*checkpoint of step 4 stands"
    ) as raised:
        fit(
            phase,
            budget=Budget(steps=9),
            settings=FitSettings(precision="fp32", checkpoint_every=2, log_every=1),
            on_metrics=remember,
            **options,
        )
    assert (raised.value.phase, raised.value.step, raised.value.rows) == ("toy", 4, [24, 25, 26, 27, 28, 29])
    assert all(torch.equal(before, now) for before, now in zip(seen[-1], model.parameters(), strict=True))
    saved = checkpoint.CheckpointStore(tmp_path / "checkpoints/toy", fingerprint="toy-40-6").latest()
    assert saved.step == 4
    assert torch.equal(saved.tensors["model/out.weight"], model.out.weight)
