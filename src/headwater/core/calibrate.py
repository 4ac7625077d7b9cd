"""What a training loop finds out before its first step: what fits, which precision is faster, what a row costs.

Everything here really runs the model. `untouched` sees to it that nothing of that remains.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import nn

from headwater.core.budget import UncountedFlops, count_flops

__all__ = ["Precision", "autocast", "faster_precision", "flops_of_rows", "rows_that_fit", "untouched"]

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]
_HOPELESS = 3.0  # bf16 at so many times the time of fp32 on two rows is not tried on more
_WORTH = 0.95  # bf16 must take less than this part of fp32's time: below that, rounding costs more than it gains


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Weights and reductions stay float32; under bf16, matrix products run in bfloat16."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


@contextmanager
def untouched(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put buffers back (running statistics, queues) and drop gradients when the block ends. Weights are not copied."""
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for module in modules:
            module.zero_grad(set_to_none=True)


def rows_that_fit(step: Callable[[int], object], rows: int) -> int:
    """Largest micro-batch among ``rows``, ``rows / 2``, ``rows / 4``... that does not exhaust the device's memory.

    Args:
        step: forward and backward on so many rows.
        rows: where to start.

    Raises:
        torch.OutOfMemoryError: one row does not fit.
    """
    while True:
        try:
            step(rows)
            return rows
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows = (rows + 1) // 2
        torch.cuda.empty_cache()
        logger.info("out of memory: micro-batches of %d rows", rows)


def faster_precision(
    step: Callable[[int, Precision], object], rows: int, device: torch.device
) -> dict[Precision, float]:
    """Seconds of one step in float32 and under bfloat16 autocast: the better of two after one to warm up.

    Measured because it is not predictable: bfloat16 products are several times faster on some CPUs and slower on
    others, and small models lose more by the casts than they gain. A processor that emulates bfloat16 takes ten times
    as long; two rows show that, and the whole batch is spared.

    Args:
        step: forward and backward on so many rows.
        rows: of a micro-batch.
        device: whose queue is waited for.
    """
    few = _timed(step, min(rows, 2), device)
    if few["bf16"] > _HOPELESS * few["fp32"]:
        return few
    seconds = _timed(step, rows, device)
    seconds["fp32"] *= _WORTH
    return seconds


def _timed(step: Callable[[int, Precision], object], rows: int, device: torch.device) -> dict[Precision, float]:
    seconds: dict[Precision, float] = {}
    for precision in ("fp32", "bf16"):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            step(rows, precision)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        seconds[precision] = min(times[1:])
    return seconds


def flops_of_rows(step: Callable[[int], object], rows: int) -> tuple[float, float]:
    """What a training step costs: ``(fixed, per row)``, so that n rows cost ``fixed + n * per_row`` FLOPs.

    Two small counts instead of a large one, since the math backend of attention holds every score in memory. Exact
    where the work is affine in the rows (products of weights alone are the fixed part); batch-by-batch terms of
    contrastive losses are missed.

    Args:
        step: forward and backward on so many rows.
        rows: of a batch; batches of fewer than four are counted as they are.

    Returns:
        ``(nan, nan)`` where an operation has no formula, with a warning that names it.
    """
    try:
        if rows < 4:
            return 0.0, count_flops(lambda: step(rows)) / rows
        two, four = count_flops(lambda: step(2)), count_flops(lambda: step(4))
    except UncountedFlops as error:
        logger.warning("FLOPs are not reported: %s", error)
        return float("nan"), float("nan")
    per_row = (four - two) / 2
    return two - 2 * per_row, per_row
