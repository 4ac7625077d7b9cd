"""Rows and results over several processes: who takes what, and putting it together again exactly once."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather_exact", "local_rows"]


def local_rows(start: int, stop: int, rank: int, world: int) -> tuple[int, int]:
    """The contiguous part of rows ``[start, stop)`` that one process takes; sizes differ by at most one, down to 0."""
    rows = stop - start
    return start + rows * rank // world, start + rows * (rank + 1) // world


def gather_exact(values: Tensor, index: Tensor, total: int) -> Tensor:
    """Results of all processes, in order, each item exactly once.

    Samplers that share items out evenly repeat some to fill the last batch. Each result therefore travels with the
    number of its item: repeats are dropped and a missing one is an error, so a mean over the result is the mean over
    the items.

    Args:
        values: ``(items here, ...)``; the trailing shape is the same in all processes.
        index: ``(items here,)``, integer, which item each row is, in ``[0, total)``.
        total: number of items over all processes.

    Returns:
        ``(total, ...)``, in every process, on the device of ``values``.

    Raises:
        ValueError: lengths differ, or an item was scored by no process.
    """
    if len(values) != len(index):
        raise ValueError(f"values and index must have one row per item; got {len(values)} and {len(index)}.")
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        values, index = _gather_ragged(values), _gather_ragged(index)
    result = values.new_zeros((total, *values.shape[1:]))
    scored = torch.zeros(total, dtype=torch.bool, device=values.device)
    result[index] = values
    scored[index] = True
    if not bool(scored.all()):
        missing = (~scored).nonzero().flatten().tolist()
        raise ValueError(f"{len(missing)} of {total} items were scored by no process, the first is item {missing[0]}.")
    return result


def _gather_ragged(tensor: Tensor) -> Tensor:
    """Rows of all processes one after another; a process may have any number of them."""
    lengths = [torch.zeros(1, dtype=torch.long, device=tensor.device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(tensor)], device=tensor.device))
    longest = max(int(n) for n in lengths)
    padded = tensor.new_zeros((longest, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.zeros_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)])
