"""How every benchmark here measures: both sides in turn, the least of several runs, ratios only.

Machines are shared and their speed drifts, so a time means nothing by itself. A B A B ... puts both sides through the
same weather; interference only ever adds time, so the least run is the best estimate; and what is reported is a ratio
of the two. Each script first checks that both sides give the same result.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

__all__ = ["Bound", "alternate", "child_usage", "cpu_seconds", "least_of", "own_peak_bytes", "peak_of", "report"]

Clock = Callable[[], float]
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Bound:
    """What a ratio is held against: ``floor`` must be met, ``world`` would be first class; either may be left out."""

    better: Literal["higher", "lower"]
    floor: float | None
    world: float | None = None

    def judge(self, ratio: float) -> dict[str, Any]:
        """The bounds and whether ``ratio`` meets them."""

        def met(limit: float) -> bool:
            return ratio >= limit if self.better == "higher" else ratio <= limit

        sign = ">=" if self.better == "higher" else "<="
        said: dict[str, Any] = {}
        if self.floor is not None:
            said |= {"floor": f"{sign} {self.floor}", "meets_floor": met(self.floor)}
        if self.world is not None:
            said |= {"world": f"{sign} {self.world}", "meets_world": met(self.world)}
        return said


def cpu_seconds() -> float:
    """Processor time of this process, all threads: what a question about one process is timed by."""
    return time.process_time()


def least_of(sides: Mapping[str, Callable[[], float]], *, repeats: int = 4, warmup: int = 1) -> dict[str, float]:
    """Run sides that time themselves in turn; the least seconds of each.

    Args:
        sides: name -> does its work and returns the seconds it took.
        repeats: counted rounds, at least 4.
        warmup: rounds that are not counted.
    """
    if repeats < 4:
        raise ValueError(f"fewer than 4 rounds say little on a shared machine; got {repeats}.")
    least = dict.fromkeys(sides, float("inf"))
    for number in range(warmup + repeats):
        for name, side in sides.items():
            seconds = side()
            if number >= warmup:
                least[name] = min(least[name], seconds)
    return least


def alternate(
    sides: Mapping[str, Callable[[], object]], *, repeats: int = 4, warmup: int = 1, clock: Clock = cpu_seconds
) -> dict[str, float]:
    """Run the sides in turn and return the least seconds of each.

    Args:
        sides: name -> one unit of work, the same for all.
        repeats: counted rounds, at least 4.
        warmup: rounds that are not counted.
        clock: ``time.perf_counter`` where several processes work.
    """

    def timed(work: Callable[[], object]) -> float:
        begin = clock()
        work()
        return clock() - begin

    return least_of({name: partial(timed, work) for name, work in sides.items()}, repeats=repeats, warmup=warmup)


def child_usage(command: Sequence[str]) -> tuple[float, float]:
    """Run a command; its processor seconds and its wall seconds.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def peak_of(module: str, *arguments: str) -> tuple[int, str]:
    """Run ``python -m module arguments`` alone in a process; its peak resident bytes, and the last line it printed.

    The process reports ``own_peak_bytes()``, as ``peak_bytes`` of the JSON object on that line.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], check=True, capture_output=True, text=True, cwd=ROOT
    )
    last = done.stdout.strip().splitlines()[-1]
    return int(json.loads(last)["peak_bytes"]), last


def own_peak_bytes() -> int:
    """Highest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        # ru_maxrss would start from the size of the process that started this one.
        sizes = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return int(sizes["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def report(
    question: str,
    ratios: Mapping[str, tuple[float, Bound]],
    *,
    seconds: Mapping[str, float] | None = None,
    checked: str,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Print the answer as one JSON line.

    Args:
        question: what was asked.
        ratios: name -> the ratio and its bounds.
        seconds: the least of each side, by which the ratios can be checked; not comparable between machines.
        checked: in words, that both sides did the same.
        notes: further facts.
    """
    import torch

    from headwater.core.run import environment

    line = {
        "question": question,
        "ratios": {name: {"ratio": round(ratio, 4), **bound.judge(ratio)} for name, (ratio, bound) in ratios.items()},
        "seconds": {name: float(f"{value:.4g}") for name, value in (seconds or {}).items()},
        "checked": checked,
        "notes": dict(notes or {}),
        "machine": {
            "processor": environment()["processor"],
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "load_average": [round(value, 2) for value in os.getloadavg()],
        },
    }
    print(json.dumps(line))
