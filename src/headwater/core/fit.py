"""The one training loop: phases, exact budgets, exact accumulation, exact resumption.

The order of data is a pure function of the step (`BatchStream`), and random draws in the forward pass are seeded by
(seed, phase, step, micro-batch, rank). A continued run therefore does bit for bit what the uninterrupted one would have
done.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import nn

from headwater.core.budget import Budget, Meter
from headwater.core.loop import Loop
from headwater.core.optim import AnyOptim
from headwater.core.phase import BatchStream, FitSettings, NonFiniteLoss, Phase, Trained
from headwater.core.signals import Interrupted, StopSignals

__all__ = [
    "BatchStream",
    "FitSettings",
    "Interrupted",
    "NonFiniteLoss",
    "Phase",
    "Trained",
    "fit",
    "fit_phases",
]

Left = TypeVar("Left")


def fit(
    phase: Phase,
    *,
    budget: Budget,
    optim: AnyOptim,
    seed: int,
    directory: Path,
    settings: FitSettings | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    eval_at: Sequence[float] = (),
    meter: Meter | None = None,
    on_metrics: Callable[[dict[str, float]], None] | None = None,
    resume: bool = True,
) -> Trained:
    """Train one phase, in place.

    Steps, tokens and FLOPs become a number of rows up front and are met to one row: the last batch takes fewer. Seconds
    run by the clock, over reading data, forward, backward and update; measuring, evaluation and checkpoints are not
    charged.

    Args:
        phase: what is trained on what.
        budget: of the whole run; this phase spends ``phase.share`` of it.
        optim: used unless the phase brings its own.
        seed: of dropout and other draws in the forward pass. Data order is the stream's.
        directory: of the run; checkpoints go to ``checkpoints/<phase>`` in it.
        settings: how it is executed.
        evaluate: called with the model in ``eval()``, in every process; its metrics make the trajectory. Autograd is
            left on.
        eval_at: fractions of the phase's budget at which to evaluate; 0 is before the first step.
        meter: is charged with what the phase cost, once, when it ends; a continued phase charges all of it.
        on_metrics: receives ``step, tokens, seconds, loss, lr, grad_norm`` and the objective's metrics, and rows of the
            trajectory, in the main process only.
        resume: continue from the newest complete checkpoint in ``directory``; a finished phase returns at once.

    Raises:
        NonFiniteLoss: before the optimizer moves.
        Interrupted: SIGTERM or SIGINT, after a checkpoint.
        CheckpointError: the checkpoint is damaged, or was written with other data, seed, budget or settings.
        FileExistsError: ``resume`` is false and there is a checkpoint.
        UncountedFlops: a budget in FLOPs, and an operation without a formula.
        ValueError: no budget, nothing to train, a budget of less than one row.
    """
    loop = Loop(phase, budget.scaled(phase.share), optim, seed, directory, settings or FitSettings())
    with torch.random.fork_rng(devices=loop.cuda_devices), StopSignals() as stop:
        finished = loop.restore(resume)
        if not finished:
            loop.train(stop, evaluate, sorted(eval_at), on_metrics)
    loop.close()
    if meter is not None:
        meter.add(loop.cost())
    if stop.signum:
        raise Interrupted(stop.signum, loop.progress.step)
    return loop.trained()


class Log(Protocol):
    """Where metrics go: ``Run.log``."""

    def __call__(self, metrics: dict[str, float], *, phase: str) -> None:
        """Keep what phase ``phase`` measured."""
        ...


def fit_phases(
    phases: Generator[Phase, Trained, Left],
    *,
    budget: Callable[[], Budget],
    optim: AnyOptim,
    seed: int,
    directory: Path,
    settings: FitSettings,
    evaluate: Callable[[nn.Module], dict[str, float]],
    eval_at: Sequence[float],
    meter: Meter,
    log: Log,
    began: Callable[[Phase], None] = lambda phase: None,
    ended: Callable[[Phase, Trained], None] = lambda phase, trained: None,
) -> Left:
    """Train phases as a method yields them, sending it what each one trained; return what it returns.

    A resumed run goes through the generator again, and finished phases come back from their checkpoints: it must be a
    pure function of what it was given.

    Args:
        phases: the method.
        budget: of the whole run, asked before each phase, which spends its share of it.
        optim: see ``fit``, as for all that follow up to ``meter``.
        seed: of draws in the forward pass.
        directory: of the run.
        settings: how phases are executed.
        evaluate: measures the model on its way.
        eval_at: fractions of each phase's budget.
        meter: is charged with every phase.
        log: receives each phase's metrics.
        began: called before a phase is trained.
        ended: called after it.

    Raises:
        ValueError: the phases' shares sum to more than 1.
    """
    share, trained = 0.0, None
    while True:
        try:
            phase = next(phases) if trained is None else phases.send(trained)
        except StopIteration as stop:
            left: Left = stop.value
            return left
        share += phase.share
        if share > 1 + 1e-9:
            raise ValueError(f"the phases up to {phase.name!r} take {share:.3f} of the budget; at most 1 is there")
        began(phase)
        trained = fit(
            phase,
            budget=budget(),
            optim=optim,
            seed=seed,
            directory=directory,
            settings=settings,
            evaluate=evaluate,
            eval_at=eval_at,
            meter=meter,
            on_metrics=partial(log, phase=phase.name),
        )
        ended(phase, trained)
