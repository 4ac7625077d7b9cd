"""(i) How much sooner is a comparison over with two worker processes than with one?

    python -m benchmarks.workers

Wall time of ``compare`` on a small comparison of continued pretraining, four runs, at least two cores. With one worker
a run may use all cores; with two, each has half of them.
"""

from __future__ import annotations

import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import Bound, alternate, report
from headwater.core.compare import Comparison, compare

FIELDS: dict[str, Any] = {
    "family": "domain",
    "shared": {
        "model": "headwater:demo-base",
        "domain": "headwater:networkx",
        "general": "headwater:general",
        "budget": {"tokens": 32_768},
        "batch_tokens": 4_096,
        "eval_chars": 20_000,
        "eval_at": [1.0],
        "optim": {"lr": 3e-3},
        "fit": {"precision": "fp32"},
    },
    "seeds": [0],
    "without": ["frozen", "scratch"],
    "contestants": {f"replay-{share}": {"method": "plain", "replay": share / 100} for share in (50, 75)},
}


def run(directory: Path, counter: list[int], workers: int) -> None:
    """One comparison in a fresh directory."""
    counter[0] += 1
    compare(Comparison(**FIELDS, workers=workers), directory / f"{workers}-{counter[0]}")


def main() -> None:
    """Ask."""
    with tempfile.TemporaryDirectory() as name:
        directory, counter = Path(name), [0]
        seconds = alternate(
            {f"{n} worker{'s' * (n > 1)}": partial(run, directory, counter, n) for n in (1, 2)},
            clock=time.perf_counter,
        )
        boards = [
            json.loads((path / "leaderboard.json").read_text(encoding="utf-8")) for path in sorted(directory.iterdir())
        ]
    figures = [_figures(board) for board in boards]
    if any(figure != figures[0] for figure in figures):
        raise SystemExit("one and two workers measured different figures")
    report(
        "(i) two worker processes of compare against one",
        {"speed of two over one": (seconds["1 worker"] / seconds["2 workers"], Bound("higher", 1.8))},
        seconds=seconds,
        checked="every comparison measured the same figures",
        notes={"clock": "wall", "runs": 2 * 4},
    )


def _figures(board: dict[str, Any]) -> str:
    return json.dumps({row["name"]: row["cells"].get("domain/gain") for row in board["rows"]}, sort_keys=True)


if __name__ == "__main__":
    main()
