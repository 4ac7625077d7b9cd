"""(g) What does a checkpoint cost, how much training time do checkpoints take, and does resuming read data again?

    python -m benchmarks.checkpoints

At 10 M parameters, wall time, against the checkpoint of ``transformers.Trainer``. The two are not alike: ours is
flushed to the disk and hashed before it counts as written, so that a power cut cannot leave half of one; the Trainer's
is handed to the operating system. The share of time lost is measured inside ``fit``, at a checkpoint every hundred
steps.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from benchmarks.harness import Bound, alternate, report
from benchmarks.models import SIZES, Rows, Size
from headwater.core.budget import Budget
from headwater.core.checkpoint import CheckpointStore
from headwater.core.fit import FitSettings, Phase, fit
from headwater.core.optim import OptimSpec, build_optimizer
from headwater.core.training_state import training_tensors
from headwater.modalities.text.objectives import CausalObjective

EVERY = 100
SIZE = SIZES["10M"]


def against_trainer(directory: Path) -> tuple[dict[str, float], str]:
    """Least seconds of one checkpoint of each, two kept; and what was checked."""
    model, spec, number = SIZE.model(), OptimSpec(), iter(range(1, 10_000))
    optimizer = build_optimizer(model, spec)
    model(**Rows(SIZE).batch(0)).loss.backward()
    optimizer.step()  # so that there are moments
    args = TrainingArguments(
        str(directory / "trainer"), use_cpu=True, report_to="none", save_total_limit=2, disable_tqdm=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = Trainer(model=model, args=args, optimizers=(optimizer, scheduler))
    store = CheckpointStore(directory / "ours", keep=2)

    def ours() -> None:
        store.save(next(number), training_tensors([model], optimizer), {"progress": {}})

    def theirs() -> None:
        trainer.state.global_step = next(number)
        trainer._save_checkpoint(model, None)

    seconds = alternate({"fit": ours, "trainer": theirs}, repeats=8, warmup=2, clock=time.perf_counter)
    saved = store.latest()
    newest = directory / "trainer" / f"checkpoint-{trainer.state.global_step}"
    assert saved is not None
    for name, tensor in load_file(newest / "model.safetensors").items():
        if not any(torch.equal(tensor, other) for key, other in saved.tensors.items() if key.endswith(name)):
            raise SystemExit(f"{name} differs between the two checkpoints")
    return seconds, "both checkpoints hold the same weights, and 8 bytes of moments for each"


def lost_share(directory: Path) -> tuple[float, float]:
    """Share of ``fit``'s time that a checkpoint every hundred steps takes, and seconds per step without."""
    marks: dict[int, float] = {}
    size = _longer(24)
    settings = FitSettings(precision="fp32", checkpoint_every=20)

    def asked(step: int) -> None:
        marks[step] = time.perf_counter()

    _fit(size, Rows(size, asked), directory, settings, steps=24)
    # Batch 20 is asked for after the checkpoint at step 20; the steps around it tell what a step takes.
    steps = sorted(marks[i + 1] - marks[i] for i in range(5, 18))
    usual = steps[len(steps) // 2]
    saving = marks[20] - marks[19] - usual
    return saving / (saving + EVERY * usual), usual


def asked_on_resume(directory: Path) -> list[int]:
    """Which batches a run asks for that resumes after 20 of 24 steps."""
    size = _longer(24)
    settings = FitSettings(precision="fp32", checkpoint_every=20)
    asked: list[int] = []

    def stop_at_the_end(step: int) -> None:
        if step == 22:
            raise KeyboardInterrupt

    try:
        _fit(size, Rows(size, stop_at_the_end), directory, settings, steps=24)
    except KeyboardInterrupt:
        _fit(size, Rows(size, asked.append), directory, settings, steps=24)
    return asked


def _longer(steps: int) -> Size:
    return Size(hidden=256, layers=10, heads=8, mlp=688, vocab=8192, rows=4, length=128, steps=steps)


def _fit(size: Size, rows: Rows, directory: Path, settings: FitSettings, steps: int) -> None:
    phase = Phase("train", size.model(), rows, CausalObjective())
    fit(phase, budget=Budget(steps=steps), optim=OptimSpec(), seed=0, directory=directory, settings=settings)


def main() -> None:
    """Ask."""
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        seconds, checked = against_trainer(directory)
        lost, step = lost_share(directory / "lost")
        asked = asked_on_resume(directory / "resumed")
    report(
        "(g) checkpoints at 10 M parameters",
        {
            "time over Trainer's checkpoint": (seconds["fit"] / seconds["trainer"], Bound("lower", 1.0)),
            "training time lost, one per hundred steps": (lost, Bound("lower", 0.01)),
            "batches read on resume over batches left": (len(asked) / 4, Bound("lower", 1.0)),
        },
        seconds={**seconds, "fit, one step": step},
        checked=checked,
        notes={"clock": "wall", "asked for on resume at step 20 of 24": asked},
    )


if __name__ == "__main__":
    main()
