"""What is decided before the first step of a phase by running the model on its first batch.

A continued run keeps what was decided.
"""

from __future__ import annotations

import hashlib
import logging
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from headwater.core.budget import Budget, UncountedFlops
from headwater.core.cache import cached_json
from headwater.core.calibrate import Precision, autocast, faster_precision, flops_of_rows, rows_that_fit, untouched
from headwater.core.distributed import local_rows
from headwater.core.objective import Loss
from headwater.core.phase import FitSettings, Phase

__all__ = ["Plan", "make_plan", "seed_forward"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How much to do and how.

    Attributes:
        rows: of every batch but the last.
        total_rows: of the phase; ``None`` for a budget in seconds.
        seconds: of the budget, else infinite.
        micro_rows: per forward pass and process.
        flops_fixed, flops_per_row: of one forward and backward pass; NaN where they cannot be counted.
        processes: that share a batch.
    """

    rows: int
    total_rows: int | None
    seconds: float
    micro_rows: int
    precision: Precision
    flops_fixed: float
    flops_per_row: float
    processes: int = 1

    def step_flops(self, rows: int) -> float:
        """What a step on ``rows`` rows costs all processes; each of its passes has the fixed cost anew."""
        shares = (local_rows(0, rows, rank, self.processes) for rank in range(self.processes))
        passes = sum(math.ceil(max(1, stop - start) / self.micro_rows) for start, stop in shares)
        return passes * self.flops_fixed + rows * self.flops_per_row

    def flops(self, rows: int) -> float:
        """What the steps on the first ``rows`` rows cost."""
        whole, last = divmod(rows, self.rows)
        return whole * self.step_flops(self.rows) + (self.step_flops(last) if last else 0.0)

    def rows_of(self, step: int) -> int:
        """Rows of one batch; the last one takes what the budget leaves, nothing after it."""
        return self.rows if self.total_rows is None else max(0, min(self.rows, self.total_rows - step * self.rows))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: infinite and unknown amounts are ``None``."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`."""
        absent = {"seconds": math.inf, "flops_fixed": math.nan, "flops_per_row": math.nan}
        fields: dict[str, Any] = {k: absent.get(k) if v is None else v for k, v in values.items()}
        return cls(**fields)


def make_plan(
    phase: Phase, modules: Sequence[nn.Module], budget: Budget, settings: FitSettings, accelerator: Accelerator
) -> Plan:
    """Measure and decide; the model is as before afterwards.

    Args:
        phase: on its device.
        modules: what of it holds weights and buffers.
        budget: of this phase.
        settings: what the user has decided already.
        accelerator: all of its processes come to the same plan.
    """
    stream, device, world = phase.stream, accelerator.device, accelerator.num_processes
    local = max(1, math.ceil(stream.rows / world))
    sample = {name: tensor.to(device) for name, tensor in stream.batch(0, 0, local).items()}

    def step(rows: int, precision: Precision) -> None:
        with autocast(precision, device):
            loss = phase.objective(phase.model, {name: tensor[:rows] for name, tensor in sample.items()})
        _check(loss)
        loss.total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def agree(value: float, least: bool = False) -> float:
        """One number for all processes: the sum, or the least."""
        values: Tensor = accelerator.gather(torch.tensor([value], device=device))
        return float(values.min() if least else values.sum())

    phase.model.train()
    seed_forward(device, 0)
    with untouched(modules):
        flops_fixed, flops_per_row = flops_of_rows(lambda rows: step(rows, "fp32"), local)
        micro = settings.micro_rows or local
        precision: Precision = "bf16" if settings.precision == "bf16" else "fp32"
        if device.type != "cpu" and settings.micro_rows is None:  # a CPU out of memory kills, it does not raise
            micro = rows_that_fit(lambda rows: step(rows, precision), micro)
        micro = int(agree(micro, least=True))
        if settings.precision == "auto":
            rows = min(micro, local)
            seconds = cached_json(
                "precision",
                _shape_of_work(modules, sample, rows, device),
                lambda: dict(faster_precision(step, rows, device)),
            )
            precision = "bf16" if agree(seconds["bf16"]) < agree(seconds["fp32"]) else "fp32"
            logger.info("phase %s: precision %s (seconds per step: %s)", phase.name, precision, seconds)
    plan = Plan(
        stream.rows, None, budget.seconds or math.inf, micro, precision, flops_fixed, flops_per_row, processes=world
    )
    return replace(plan, total_rows=_total_rows(phase, budget, plan))


def _shape_of_work(
    modules: Sequence[nn.Module], sample: Mapping[str, Tensor], rows: int, device: torch.device
) -> dict[str, Any]:  # Any: JSON data
    """What the faster precision depends on; timings are kept under it, so a recipe gives the same numbers again."""
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "weights": [
            [name, list(p.shape), str(p.dtype), p.requires_grad] for m in modules for name, p in m.named_parameters()
        ],
        "batch": [[name, str(tensor.dtype), rows, *tensor.shape[1:]] for name, tensor in sorted(sample.items())],
    }


def _total_rows(phase: Phase, budget: Budget, plan: Plan) -> int | None:
    if budget.kind == "seconds":
        return None
    if budget.steps is not None:
        return budget.steps * plan.rows
    if budget.tokens is not None:
        total = budget.tokens // phase.stream.tokens_per_row
    else:
        if not plan.flops_per_row > 0:  # NaN, or nothing that counts
            raise UncountedFlops(
                "a budget in FLOPs needs every heavy operation counted. Give it in tokens, steps or seconds."
            )
        whole, left = divmod(budget.amount, plan.step_flops(plan.rows))
        last = next((rows for rows in range(plan.rows - 1, 0, -1) if plan.step_flops(rows) <= left), 0)
        total = int(whole) * plan.rows + last
    if total < 1:
        raise ValueError(f"a budget of {budget.amount:g} {budget.kind} is less than one row of phase {phase.name!r}.")
    return total


def _check(loss: Loss) -> None:
    if loss.total.ndim or not loss.total.requires_grad:
        raise ValueError(
            f"an objective returns a scalar sum that is attached to the graph; got shape {tuple(loss.total.shape)}, "
            f"requires_grad={loss.total.requires_grad}."
        )


def seed_forward(device: torch.device, *key: str | int) -> None:
    """Seed torch's generator from a key: every forward pass has its own, so that none depends on what ran before it."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    generator.manual_seed(int.from_bytes(digest, "little", signed=True))
