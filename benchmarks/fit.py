"""(a) What does ``fit`` cost over the loop one would write, and over ``transformers.Trainer``?

    python -m benchmarks.fit [SIZE | SIZE/PRECISION ...]

All sides read the same rows in the same order, clip, schedule and use fused AdamW. A side's seconds run from the
request of the first timed batch to the request of the one after the last, so set-up and the final checkpoint are left
out; ``fit`` has its metrics log, cost meter and guard against NaN on. ``fit`` in bf16 is left to choose by measurement,
as it is by default. Where the processor emulates bfloat16, fit stays in fp32 and the other two take ten times as long,
an hour for all sizes: name what you want, such as ``0.06M 1.3M/fp32 10M/fp32``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import SequentialSampler
from transformers import LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from benchmarks.harness import Bound, cpu_seconds, least_of, report
from benchmarks.models import SIZES, Rows, Size
from headwater.core.budget import Budget, Meter
from headwater.core.fit import FitSettings, Phase, fit
from headwater.core.optim import OptimSpec, build_optimizer, lr_factor, parameter_groups
from headwater.modalities.text.objectives import CausalObjective

Precision = Literal["fp32", "bf16"]
Side = Callable[[Size, Rows, Precision], LlamaForCausalLM]
OPTIM = OptimSpec(lr=1e-3, warmup=0, schedule="linear", final_lr=0.0)


def by_fit(size: Size, rows: Rows, precision: Precision) -> LlamaForCausalLM:
    """Ours."""
    model = size.model()
    settings = FitSettings(precision="fp32" if precision == "fp32" else "auto")
    with tempfile.TemporaryDirectory() as directory, (Path(directory) / "log.jsonl").open("w") as log:
        fit(
            Phase("train", model, rows, CausalObjective()),
            budget=Budget(steps=size.warmup + size.steps + 1),
            optim=OPTIM,
            seed=0,
            directory=Path(directory),
            settings=settings,
            meter=Meter(),
            on_metrics=lambda metrics: log.write(f"{metrics}\n"),
        )
    return model


def by_hand(size: Size, rows: Rows, precision: Precision) -> LlamaForCausalLM:
    """The loop one would write, with nothing in it that is not needed."""
    model = size.model()
    optimizer = build_optimizer(model, OPTIM)
    steps = size.warmup + size.steps + 1
    for step in range(steps):
        batch = rows.batch(step)
        for group in optimizer.param_groups:
            group["lr"] = OPTIM.lr * lr_factor(OPTIM, (step + 1) / steps)
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


class _InOrder(Trainer):
    """Reads the rows as they stand and moves weights as the others do; nothing of the Trainer's loop is changed."""

    def _get_train_sampler(self, *_: object) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def create_optimizer(self, *_: object) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, OPTIM), lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps, fused=True
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> object:
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: lr_factor(OPTIM, (step + 1) / num_training_steps)
        )
        return self.lr_scheduler


def by_trainer(size: Size, rows: Rows, precision: Precision) -> LlamaForCausalLM:
    """``transformers.Trainer``, logging every ten steps as ``fit`` does."""
    model = size.model()
    with tempfile.TemporaryDirectory() as directory:
        args = TrainingArguments(
            directory,
            per_device_train_batch_size=size.rows,
            max_steps=size.warmup + size.steps + 1,
            max_grad_norm=1.0,
            logging_steps=10,
            bf16=precision == "bf16",
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            dataloader_pin_memory=False,
        )
        trainer = _InOrder(model=model, args=args, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model


SIDES: dict[str, Side] = {"fit": by_fit, "loop": by_hand, "trainer": by_trainer}


def seconds_of(size: Size, precision: Precision, side: Side) -> float:
    """Run a side; the processor time between the two requests."""
    marks: dict[int, float] = {}

    def asked(step: int) -> None:
        # The last reading counts: fit asks for the first batch twice, once to see what it costs.
        marks[step] = cpu_seconds()

    side(size, Rows(size, asked), precision)
    return marks[size.warmup + size.steps] - marks[size.warmup]


def check(size: Size) -> float:
    """Largest difference of a weight between the sides after all steps in fp32.

    Raises:
        SystemExit: they did not do the same.
    """
    models = [side(size, Rows(size), "fp32") for side in SIDES.values()]
    worst = 0.0
    for other in models[1:]:
        for one, two in zip(models[0].parameters(), other.parameters(), strict=True):
            worst = max(worst, float((one - two).detach().abs().max()))
    if worst > 1e-4:
        raise SystemExit(f"the sides disagree: weights differ by up to {worst}")
    return worst


def main(names: list[str]) -> None:
    """Ask for each size and precision."""
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    ratios: dict[str, tuple[float, Bound]] = {}
    seconds: dict[str, float] = {}
    checked = {}
    for asked in names or list(SIZES):
        name, _, only = asked.partition("/")
        size = SIZES[name]
        checked[name] = check(size)
        chosen: tuple[Precision, ...] = ("fp32", "bf16")
        for precision in [kind for kind in chosen if only in ("", kind)]:
            least = least_of({key: partial(seconds_of, size, precision, side) for key, side in SIDES.items()})
            seconds |= {f"{name} {precision} {key}": value for key, value in least.items()}
            best = min(least["loop"], least["trainer"])
            ratios[f"{name} {precision} speed over the better"] = best / least["fit"], Bound("higher", 0.97)
            ratios[f"{name} {precision} speed over Trainer"] = (
                least["trainer"] / least["fit"],
                Bound("higher", 1.0, 1.15 if precision == "bf16" else None),
            )
    worst = max(checked.values())
    report(
        "(a) fit against a bare loop and Trainer",
        ratios,
        seconds=seconds,
        checked=f"after all steps in fp32, no weight differs by more than {worst:.1e} between the three sides",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
