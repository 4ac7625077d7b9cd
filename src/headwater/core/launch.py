"""Whether several processes were launched for one run, as ``torchrun`` and ``accelerate launch`` do; without torch."""

from __future__ import annotations

import os

__all__ = ["launched_processes", "launched_rank", "leave_launched", "wait_for_launched"]


def launched_processes() -> int:
    """How many processes share this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """Which of them this is; 0 writes and speaks."""
    return int(os.environ.get("RANK", "0")) if launched_processes() > 1 else 0


def wait_for_launched() -> None:
    """Wait until every process is here; returns at once where there is one."""
    if launched_processes() > 1:
        from accelerate import Accelerator  # joins the process group as `fit` does; late, since it imports torch

        Accelerator().wait_for_everyone()


def leave_launched() -> None:
    """Leave the process group, which torch otherwise complains about, or aborts on, when the interpreter ends."""
    if launched_processes() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()
