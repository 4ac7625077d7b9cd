"""(h) How much more memory does ``fit`` take than the loop one would write?

    python -m benchmarks.memory

Each side trains the 10 M model for a few steps in a process of its own and reports its highest resident size. The
common part (interpreter, torch, transformers) is in both.
"""

from __future__ import annotations

import json
import sys

import torch

from benchmarks.fit import SIDES
from benchmarks.harness import Bound, own_peak_bytes, peak_of, report
from benchmarks.models import SIZES, Rows

REPEATS = 4


def main() -> None:
    """Without an argument ask; with the name of a side, be that side."""
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        size = SIZES["10M"]
        model = SIDES[sys.argv[1]](size, Rows(size), "fp32")
        total = float(sum(p.detach().double().abs().sum() for p in model.parameters()))
        print(json.dumps({"peak_bytes": own_peak_bytes(), "weights": total}))
        return
    peaks: dict[str, int] = {}
    weights: dict[str, float] = {}
    for _ in range(REPEATS):
        for side in ("fit", "loop"):
            peak, line = peak_of("benchmarks.memory", side)
            peaks[side] = min(peaks.get(side, peak), peak)
            weights[side] = json.loads(line)["weights"]
    if abs(weights["fit"] / weights["loop"] - 1) > 1e-6:
        raise SystemExit(f"the sides trained different weights: {weights}")
    report(
        "(h) peak resident memory of fit against a bare loop, 10 M parameters",
        {"peak over the loop's": (peaks["fit"] / peaks["loop"], Bound("lower", 1.05))},
        checked="both sides end with the same sum of absolute weights to six digits",
        notes={"peak_bytes": peaks},
    )


if __name__ == "__main__":
    main()
