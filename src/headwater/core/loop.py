"""How `fit` trains one phase, step by step.

Accelerate places the model and talks to other processes and to trackers. Data order and checkpoints are ours, because
its own lose the position within an epoch; autocast is ours, because its own is set once per process and patches the
model's forward.
"""

from __future__ import annotations

import itertools
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from headwater.core.budget import Budget, Cost, analytic_flops
from headwater.core.calibrate import autocast, untouched
from headwater.core.checkpoint import CheckpointError, CheckpointStore
from headwater.core.distributed import gather_exact, local_rows
from headwater.core.objective import Loss, Objective, StepAware
from headwater.core.optim import AnyOptim, build_optimizer, lr_factor
from headwater.core.phase import BatchStream, FitSettings, NonFiniteLoss, Phase, Trained
from headwater.core.plan import Plan, make_plan, seed_forward
from headwater.core.progress import progress_bar
from headwater.core.signals import StopSignals
from headwater.core.training_state import load_moments, load_tensors, training_tensors

__all__ = ["Loop"]

logger = logging.getLogger(__name__)

_CURVE_POINTS = 400

Evaluate = Callable[[nn.Module], dict[str, float]]
OnMetrics = Callable[[dict[str, float]], None]


@dataclass
class _Progress:
    """What a checkpoint brings back besides tensors."""

    step: int = 0
    rows: int = 0
    seconds: float = 0.0
    evaluated: int = 0  # how many of eval_at are done
    trajectory: list[dict[str, float]] = field(default_factory=list)
    loss_curve: list[dict[str, float]] = field(default_factory=list)
    curve_stride: int = 1  # every how many logs one enters the curve


class _Forward(nn.Module):
    """Model and objective as one module, so that one DDP wrapper sees the weights of both."""

    def __init__(self, model: nn.Module, called: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self._called = (called,)  # in a tuple: a compiled copy must not register the same weights twice
        self.objective = objective

    def forward(self, batch: Mapping[str, Tensor]) -> Loss:
        return self.objective(self._called[0], batch)


class _Batches(Dataset[dict[str, Tensor]]):
    """This process's part of each batch, by step. A process without a row gets the first one, to be multiplied by 0."""

    def __init__(self, stream: BatchStream, plan: Plan, rank: int, world: int) -> None:
        self.stream, self.plan, self.rank, self.world = stream, plan, rank, world

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        start, stop = local_rows(0, self.plan.rows_of(step), self.rank, self.world)
        return self.stream.batch(step, start, stop) if stop > start else self.stream.batch(step, 0, 1)

    def from_step(self, first: int, workers: int) -> Iterator[dict[str, Tensor]]:
        steps: Any = itertools.count(first)  # Any: DataLoader's sampler type does not admit endless ones
        if self.plan.total_rows is not None:
            steps = range(first, math.ceil(self.plan.total_rows / self.plan.rows))
        if not workers:
            return map(self.__getitem__, steps)
        # A generator of its own: the loader draws a base seed, which would otherwise move the global one.
        return iter(DataLoader(self, batch_size=None, sampler=steps, num_workers=workers, generator=torch.Generator()))


class Loop:
    """One phase being trained: what `fit` would otherwise pass from function to function."""

    def __init__(
        self, phase: Phase, budget: Budget, optim: AnyOptim, seed: int, directory: Path, settings: FitSettings
    ) -> None:
        if budget.kind == "none":
            raise ValueError(f"phase {phase.name!r} needs a budget: one of steps, tokens, flops, seconds.")
        self.phase, self.budget, self.settings, self.seed = phase, budget, settings, seed
        self.optim = phase.optim or optim
        self.accelerator = _accelerator(settings, directory)
        if settings.trackers:
            self.accelerator.init_trackers(phase.name)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.cuda_devices = [self.device] if self.device.type == "cuda" else []
        self.model = phase.model.to(self.device)
        self.called = self.model  # or a compiled copy of it
        self.modules, rates = [self.model], [phase.model_rate]
        if isinstance(phase.objective, nn.Module):
            self.modules.append(phase.objective.to(self.device))
            rates.append(1.0)
        self.optimizer = build_optimizer(self.modules, self.optim, rates)
        self.optimizer.zero_grad()  # loads torch._dynamo: a second that must not be charged to a budget in seconds
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if any(p.dtype == torch.float16 for p in self.parameters):
            raise ValueError("trainable float16 weights overflow; load the model in float32 or bfloat16.")
        self.store = CheckpointStore(
            directory / "checkpoints" / phase.name, fingerprint=phase.stream.fingerprint, keep=settings.keep_checkpoints
        )
        self.progress = _Progress()
        self.plan: Plan
        self.mark = 0.0  # of the clock that runs while training
        self.wide = torch.float32 if self.device.type == "mps" else torch.float64  # counts beyond 2**24 are exact
        self.identity: dict[str, Any] = {
            "phase": phase.name,
            "seed": seed,
            "budget": budget.model_dump(exclude_none=True),
            "optim": self.optim.model_dump(mode="json"),
            "schedule": [phase.schedule_start, phase.schedule_span],
            "continues": None if phase.continues is None else phase.continues.name,
            # Nothing where it is 1: checkpoints from before there was such a rate stay valid.
            "model_rate": None if phase.model_rate == 1 else phase.model_rate,
            "precision": settings.precision,
            "rows": phase.stream.rows,
            "tokens_per_row": phase.stream.tokens_per_row,
        }

    # -- before the first step ---------------------------------------------------------------------------------------

    def restore(self, resume: bool) -> bool:
        """Take up the newest checkpoint, or make a plan; whether the phase is finished already."""
        saved = self.store.latest()
        if saved is None:
            self.plan = make_plan(self.phase, self.modules, self.budget, self.settings, self.accelerator)
            if self.phase.continues is not None:
                self._take_up(self.phase.continues)
            return False
        if not resume:
            raise FileExistsError(
                f"{self.store.directory} has a checkpoint of step {saved.step}. Resume, or give another directory."
            )
        before = saved.state["identity"]
        changed = [name for name, value in self.identity.items() if before.get(name) != value]
        if changed:
            was = ", ".join(f"{name} was {before.get(name)}, is {self.identity[name]}" for name in changed)
            raise CheckpointError(f"{saved.path} is of another run: {was}. Give another directory to start anew.")
        load_tensors(self.modules, self.optimizer, saved.tensors)
        self.plan = Plan.from_dict(saved.state["plan"])
        if self.settings.micro_rows is not None:
            self.plan = replace(self.plan, micro_rows=self.settings.micro_rows)
        self.progress = _Progress(**saved.state["progress"])
        if saved.state["finished"]:
            self.model.eval()
        return bool(saved.state["finished"])

    def _take_up(self, before: Phase) -> None:
        """Start with the optimizer's moments as ``before`` left them, read from its last checkpoint."""
        store = CheckpointStore(self.store.directory.parent / before.name, fingerprint=before.stream.fingerprint)
        saved = store.latest()
        if saved is None or not saved.state["finished"]:
            raise CheckpointError(
                f"phase {self.phase.name!r} continues {before.name!r}, which has not finished in {store.directory}. "
                "Train that one first, in the same directory."
            )
        kept, asked = (_moments(optim) for optim in (saved.state["identity"]["optim"], self.identity["optim"]))
        if kept != asked:
            raise ValueError(
                f"phase {self.phase.name!r} keeps moments as {asked}, and {before.name!r}, which it continues, as "
                f"{kept}; give both the same optimizer and `states`."
            )
        load_moments(self.modules, self.optimizer, saved.tensors)

    # -- training ------------------------------------------------------------------------------------------------------

    def train(
        self,
        stop: StopSignals,
        evaluate: Evaluate | None,
        eval_at: list[float],
        on_metrics: OnMetrics | None,
    ) -> None:
        """Step until the budget is spent or a signal comes; the checkpoint at the end is always written."""
        settings, progress = self.settings, self.progress
        if not self.accelerator.is_main_process:
            on_metrics = None
        self.model.train()
        if settings.gradient_checkpointing:
            _checkpoint_activations(self.model)
        self.called = torch.compile(self.model) if settings.compile else self.model  # type: ignore[assignment]
        forward: nn.Module = _Forward(self.model, self.called, self.phase.objective)
        if self.world > 1:
            forward = self.accelerator.prepare(forward)
        batches = _Batches(self.phase.stream, self.plan, self.rank, self.world).from_step(
            progress.step, settings.workers
        )
        window = _Window()
        self._evaluate_due(evaluate, eval_at, on_metrics)
        self.mark = time.perf_counter()
        with progress_bar(self.phase.name, self.accelerator.is_main_process) as show:
            while not self._spent() and not stop.signum:
                rows = self.plan.rows_of(progress.step)
                own = local_rows(0, rows, self.rank, self.world)
                lr = self._learning_rate(rows)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr * group["rate"]
                loss, norm, seconds = self._step(forward, self._to_device(next(batches)), own, window, stop)
                progress.step += 1
                progress.rows += rows
                progress.seconds += seconds
                if progress.step % settings.log_every == 0 or self._spent():
                    self._log({"loss": loss, "lr": lr, "grad_norm": norm}, window, on_metrics)
                    show(self._fraction())
                self._evaluate_due(evaluate, eval_at, on_metrics)
                if settings.checkpoint_every and progress.step % settings.checkpoint_every == 0 and not self._spent():
                    self._save(finished=False)
        self._save(finished=self._spent())
        self.model.eval()
        if settings.gradient_checkpointing:
            self.model.gradient_checkpointing_disable()  # type: ignore[operator]  # checked by _checkpoint_activations

    def _step(
        self, forward: nn.Module, batch: dict[str, Tensor], own: tuple[int, int], window: _Window, stop: StopSignals
    ) -> tuple[float, float, float]:
        """Gradient of the mean over all rows of all processes, clipped; one host read; one move of the optimizer.

        Returns:
            Mean loss, gradient norm before clipping, seconds; the same in all processes.
        """
        step, micro, here = self.progress.step, self.plan.micro_rows, own[1] - own[0]
        parts = (
            [batch]
            if here <= micro
            else [{k: v[i : i + micro] for k, v in batch.items()} for i in range(0, here, micro)]
        )
        self._begin_step(parts, own)
        total: Tensor | float = 0.0
        count: Tensor | float = 0.0
        for number, part in enumerate(parts):
            seed_forward(self.device, self.seed, self.phase.name, step, number, self.rank)
            with nullcontext() if self.world == 1 or number == len(parts) - 1 else self.accelerator.no_sync(forward):
                with autocast(self.plan.precision, self.device):
                    loss = forward(part)
                if not here:  # DDP waits for every process, also for one that the last batch leaves without a row
                    loss = Loss(loss.total * 0, 0, loss.metrics)
                loss.total.backward()
            window.add(loss)
            total = total + loss.total.detach()
            count = count + loss.count
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        sums = [total, count, torch.nn.utils.get_total_norm(gradients)]
        if self.world > 1:
            sums = [*self._over_processes(total, count, stop.signum), sums[-1]]
        host = torch.stack(
            [torch.as_tensor(v, device=self.device).to(self.wide) for v in sums]
        ).tolist()  # the one read
        counted = host[1] or 1.0
        # Gradients of a sum were accumulated, and DDP averaged them over processes: one factor turns them into the
        # mean's.
        factor = self.world / counted
        mean, norm = host[0] / counted, host[-1] * factor
        if not (math.isfinite(mean) and math.isfinite(norm)):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteLoss(self.phase.name, step, _row_names(batch, own), mean, norm, self._standing())
        clip = self.optim.clip
        if clip is not None and norm > clip:
            factor *= clip / norm
        torch._foreach_mul_(gradients, factor)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.world == 1:
            return mean, norm, self._lap()
        stop.signum = signal.SIGTERM if host[2] else signal.SIGINT if host[3] else 0
        return mean, norm, host[4] / self.world

    def _begin_step(self, parts: Sequence[Mapping[str, Tensor]], own: tuple[int, int]) -> None:
        objective = self.phase.objective
        if isinstance(objective, StepAware):
            whole = self.world == 1 and len(parts) == 1
            objective.begin_step(self._fraction(), None if whole else partial(self._over_batch, parts, own))

    def _over_batch(
        self,
        parts: Sequence[Mapping[str, Tensor]],
        own: tuple[int, int],
        measure: Callable[[nn.Module, Mapping[str, Tensor]], Tensor],
    ) -> Tensor:
        """What ``measure`` gives for the rows of all processes, in order."""
        step, found = self.progress.step, []
        with torch.no_grad(), untouched(self.modules):
            for number, part in enumerate(parts):
                seed_forward(self.device, self.seed, self.phase.name, step, number, self.rank)
                with autocast(self.plan.precision, self.device):
                    found.append(measure(self.called, part))
        # A process without a row holds the first one, which is then counted once.
        rows = torch.arange(*own, device=self.device) if own[1] > own[0] else torch.zeros(1, device=self.device).long()
        return gather_exact(torch.cat(found), rows, self.plan.rows_of(step))

    def _over_processes(self, total: Tensor | float, count: Tensor | float, signum: int) -> list[Tensor]:
        """Sums over processes of loss, count, both signals and seconds, so that all of them decide alike."""
        flags = (float(signum == signal.SIGTERM), float(signum == signal.SIGINT), self._lap())
        values = [torch.as_tensor(v, device=self.device).to(self.wide) for v in (total, count, *flags)]
        summed: Tensor = self.accelerator.reduce(torch.stack(values))
        return list(summed)

    def _lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        lap, self.mark = now - self.mark, now
        return lap

    def _fraction(self) -> float:
        """Of the budget that is spent."""
        if self.plan.total_rows is None:
            return min(1.0, self.progress.seconds / self.plan.seconds)
        return self.progress.rows / self.plan.total_rows

    def _spent(self) -> bool:
        progress = self.progress
        if self.plan.total_rows is not None:
            return progress.rows >= self.plan.total_rows
        # Stops where one more step would overrun by more than stopping falls short.
        return progress.step > 0 and progress.seconds + 0.5 * progress.seconds / progress.step >= self.plan.seconds

    def _learning_rate(self, rows: int) -> float:
        """At the end of the step to come: the first one moves, the last one has the final rate."""
        fraction = self._fraction()
        if self.plan.total_rows is not None:
            fraction = (self.progress.rows + rows) / self.plan.total_rows
        span = self.phase.schedule_span
        return self.optim.lr * lr_factor(
            self.optim, fraction if span is None else self.phase.schedule_start + span * fraction
        )

    # -- what is said, measured and saved ------------------------------------------------------------------------------

    def _where(self) -> dict[str, float]:
        return {"step": self.progress.step, "tokens": self._tokens(), "seconds": self.progress.seconds}

    def _log(self, values: dict[str, float], window: _Window, on_metrics: OnMetrics | None) -> None:
        metrics = {**self._where(), **values, **window.means(self.accelerator if self.world > 1 else None)}
        progress = self.progress
        if progress.step // self.settings.log_every % progress.curve_stride == 0 or self._spent():
            progress.loss_curve.append({"step": progress.step, "loss": metrics["loss"]})
        if len(progress.loss_curve) >= _CURVE_POINTS:
            progress.loss_curve, progress.curve_stride = progress.loss_curve[1::2], progress.curve_stride * 2
        self._report(metrics, on_metrics)

    def _report(self, metrics: dict[str, float], on_metrics: OnMetrics | None) -> None:
        if on_metrics is not None:
            on_metrics(metrics)
        if self.settings.trackers:
            self.accelerator.log({f"{self.phase.name}/{k}": v for k, v in metrics.items()}, step=self.progress.step)

    def _evaluate_due(self, evaluate: Evaluate | None, eval_at: Sequence[float], on_metrics: OnMetrics | None) -> None:
        """Points that fall on one step share one evaluation. The clock stands still."""
        reached = 1.0 if self._spent() else self._fraction()
        due = [at for at in eval_at[self.progress.evaluated :] if at <= reached + 1e-12]
        if evaluate is None or not due:
            return
        self.model.eval()
        metrics = evaluate(self.model)
        self.model.train()
        for at in due:
            self.progress.trajectory.append({"at": at, **self._where(), **metrics})
        self.progress.evaluated += len(due)
        self._report(self.progress.trajectory[-1], on_metrics)
        self.mark = time.perf_counter()

    def _save(self, finished: bool) -> None:
        if self.accelerator.is_main_process:
            state = {
                "identity": self.identity,
                "plan": self.plan.to_dict(),
                "progress": asdict(self.progress),
                "finished": finished,
            }
            self.store.save(self.progress.step, training_tensors(self.modules, self.optimizer), state)
        self.accelerator.wait_for_everyone()
        self.mark = time.perf_counter()

    def _standing(self) -> str:
        step = self.store.newest_step()
        return "there is no checkpoint yet" if step is None else f"the checkpoint of step {step} stands"

    def close(self) -> None:
        """Let trackers finish."""
        if self.settings.trackers:
            self.accelerator.end_training()

    # -- what is left --------------------------------------------------------------------------------------------------

    def _tokens(self) -> int:
        return self.progress.rows * self.phase.stream.tokens_per_row

    def cost(self) -> Cost:
        """Of this phase, over all processes and restarts."""
        progress, plan = self.progress, self.plan
        config = getattr(self.model, "config", None)
        embedding = _embedding(self.model) if config is not None else None
        tied = getattr(config, "tie_word_embeddings", False)
        # The patch embedding of an image model is no table: its weights multiply.
        looked_up = embedding.weight.numel() if isinstance(embedding, nn.Embedding) and not tied else 0
        return Cost(
            steps=progress.step,
            tokens=self._tokens(),
            flops=plan.flops(progress.rows),
            flops_analytic=analytic_flops(
                sum(p.numel() for p in self.model.parameters()) - looked_up,
                self._tokens(),
                getattr(config, "num_hidden_layers", 0),
                getattr(config, "hidden_size", 0),
                self.phase.stream.tokens_per_row,
            ),
            seconds=progress.seconds,
            trainable=sum(p.numel() for p in self.parameters),
        )

    def trained(self) -> Trained:
        """The result, whether trained now or found finished."""
        return Trained(
            model=self.phase.model,
            steps=self.progress.step,
            tokens=self._tokens(),
            seconds=self.progress.seconds,
            trajectory=self.progress.trajectory,
            loss_curve=self.progress.loss_curve,
            cost=self.cost(),
            settings={"precision": self.plan.precision, "micro_rows": self.plan.micro_rows},
        )

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.device.type == "cpu":
            return batch
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}


class _Window:
    """Averages of the objective's metrics since the last log, weighted by count; on the device until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count: Tensor | float = 0.0

    def add(self, loss: Loss) -> None:
        if not loss.metrics:
            return
        for name, value in loss.metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().float() * loss.count
        self.count = self.count + loss.count

    def means(self, accelerator: Accelerator | None) -> dict[str, float]:
        if not self.sums:
            return {}
        names = sorted(self.sums)
        first = self.sums[names[0]]
        values = torch.stack(
            [*(self.sums[name] for name in names), torch.as_tensor(self.count, device=first.device).float()]
        )
        if accelerator is not None:
            values = accelerator.reduce(values)
        *sums, count = values.tolist()
        self.sums, self.count = {}, 0.0
        return {name: total / (count or 1.0) for name, total in zip(names, sums, strict=True)}


def _accelerator(settings: FitSettings, directory: Path) -> Accelerator:
    from accelerate.tracking import filter_trackers

    usable = filter_trackers(list(settings.trackers), logging_dir=directory)
    if len(usable) < len(set(settings.trackers)):
        have = ", ".join(map(str, usable)) or "none"
        raise ValueError(
            f"trackers {', '.join(settings.trackers)}: not all are installed (usable: {have}). Install or leave out."
        )
    accelerator = Accelerator(
        log_with=list(settings.trackers) or None, project_dir=directory if settings.trackers else None
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(f"fit runs on one device or under DDP; got {accelerator.distributed_type.value}.")
    return accelerator


def _embedding(model: nn.Module) -> nn.Module | None:
    """The table in which tokens are looked up; None for a model that reads no tokens."""
    find: Callable[[], nn.Module | None] = getattr(model, "get_input_embeddings", lambda: None)
    try:
        return find()
    except NotImplementedError:  # what transformers raises for speech models
        return None


def _row_names(batch: Mapping[str, Tensor], own: tuple[int, int]) -> list[int]:
    return [int(row) for row in batch["row"].flatten().tolist()] if "row" in batch else list(range(*own))


def _moments(optim: Mapping[str, Any]) -> str:
    """What an optimizer, as JSON data, remembers of earlier steps, and how."""
    return f"{optim.get('kind', 'adamw')}/{optim.get('states', 'fp32')}"


def _checkpoint_activations(model: nn.Module) -> None:
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise ValueError(f"{type(model).__name__} cannot checkpoint activations; switch gradient_checkpointing off.")
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})
