"""A phase that takes up the moments of the one before it: two phases that are one training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headwater.core.budget import Budget
from headwater.core.checkpoint import CheckpointError, CheckpointStore
from headwater.core.fit import FitSettings, Phase, Trained, fit
from headwater.core.optim import OptimSpec, lr_factor

sys.path.insert(0, str(Path(__file__).parent))
from toy import Toy, ToyObjective, ToyStream  # tests are imported by path

SETTINGS = FitSettings(precision="fp32", log_every=1, checkpoint_every=1, keep_checkpoints=100)
OPTIM = OptimSpec(lr=1e-2, warmup=0.1)
FIRST, SECOND = 9, 6


class Later(ToyStream):
    """The toy's batches from a later one on."""

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        return super().batch(step + FIRST, start, stop)


class Stop(Exception):
    """Raised by a test in the middle of training."""


def phases(model: Toy, *, continues: bool = True) -> tuple[Phase, Phase]:
    share = FIRST / (FIRST + SECOND)
    first = Phase("first", model, ToyStream(), ToyObjective(), share, schedule_span=share)
    rest = {"share": 1 - share, "schedule_span": 1 - share, "schedule_start": share}
    second = Phase("second", model, Later(), ToyObjective(), continues=first if continues else None, **rest)
    return first, second


def train(phase: Phase, directory: Path, **kwargs: Any) -> Trained:
    given = {"optim": OPTIM, "settings": SETTINGS, **kwargs}
    return fit(phase, budget=Budget(steps=FIRST + SECOND), seed=0, directory=directory, **given)


def train_both(directory: Path, *, continues: bool = True, **kwargs: Any) -> Toy:
    model = Toy(dropout=0)  # draws of the forward pass depend on the phase's name
    for phase in phases(model, continues=continues):
        train(phase, directory, **kwargs)
    return model


def equal(one: Toy, other: Toy) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_oracle_two_continued_phases_are_one(tmp_path: Path) -> None:
    whole = Toy(dropout=0)
    train(Phase("whole", whole, ToyStream(), ToyObjective()), tmp_path / "whole")
    assert equal(train_both(tmp_path / "two"), whole)
    assert not equal(train_both(tmp_path / "anew", continues=False), whole)


def test_equation_the_rate_moves_one_step_across_the_border(tmp_path: Path) -> None:
    rates: list[float] = []
    train_both(tmp_path, on_metrics=lambda metrics: rates.append(metrics["lr"]))
    total = FIRST + SECOND
    assert rates == pytest.approx([OPTIM.lr * lr_factor(OPTIM, (step + 1) / total) for step in range(total)])


def test_property_moments_cross_the_border_untouched(tmp_path: Path) -> None:
    train_both(tmp_path)
    first, second = phases(Toy(dropout=0))

    def moments(phase: Phase, step: int) -> dict[str, Tensor]:
        directory = tmp_path / "checkpoints" / phase.name
        store = CheckpointStore(directory, fingerprint=phase.stream.fingerprint)
        tensors = store._read(directory / f"step-{step:08d}").tensors
        return {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer/")}

    before, after = moments(first, FIRST), moments(second, 1)
    counters = [name for name in before if name.endswith("/step")]
    assert counters
    assert all(float(after[name]) == float(before[name]) + 1 == FIRST + 1 for name in counters)
    # One step with beta2 = 0.95 cannot take a second moment below 0.95 of what it was.
    seconds = [name for name in before if name.endswith("exp_avg_sq")]
    assert all(bool((after[name] >= 0.95 * before[name] * (1 - 1e-6)).all()) for name in seconds)


@pytest.mark.parametrize("stop", [3, FIRST, FIRST + 1, FIRST + 4])
def test_fault_a_run_stopped_in_either_phase_continues_bit_for_bit(tmp_path: Path, stop: int) -> None:
    whole = train_both(tmp_path / "whole")
    seen = 0

    def stopping(_: dict[str, float]) -> None:
        nonlocal seen
        seen += 1
        if seen > stop:
            raise Stop

    with pytest.raises(Stop):
        train_both(tmp_path / "stopped", on_metrics=stopping)
    assert equal(train_both(tmp_path / "stopped"), whole)


def _stop_at_the_third() -> Callable[[dict[str, float]], None]:
    def stop(metrics: dict[str, float]) -> None:
        if metrics["step"] == 3:
            raise Stop

    return stop


def test_rejects_what_cannot_be_continued(tmp_path: Path) -> None:
    first, second = phases(Toy(dropout=0))
    with pytest.raises(CheckpointError, match="continues 'first', which has not finished in"):
        train(second, tmp_path / "a")
    with pytest.raises(Stop):
        train(first, tmp_path / "c", on_metrics=_stop_at_the_third())
    with pytest.raises(CheckpointError, match="continues 'first', which has not finished in"):
        train(second, tmp_path / "c")
    train(first, tmp_path / "b")
    with pytest.raises(ValueError, match="keeps moments as adamw/8bit, and 'first', which it continues, as adamw/fp32"):
        train(second, tmp_path / "b", optim=OPTIM.model_copy(update={"states": "8bit"}))
    with pytest.raises(ValueError, match="continues 'first', which trains another model"):
        Phase("second", Toy(), Later(), ToyObjective(), continues=first)


def test_rejects_resuming_with_other_moments(tmp_path: Path) -> None:
    train_both(tmp_path)
    with pytest.raises(CheckpointError, match="of another run: continues was first, is None"):
        train_both(tmp_path, continues=False)
