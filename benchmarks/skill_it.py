"""What does weighing skills round by round cost beside equal shares, at the same steps?

    python -m benchmarks.skill_it

Eight skills of real text, one for each of eight installed packages, a Llama of 64 x 2, rows of 64 tokens, 240 steps of
2 048 tokens, float32 on one thread. Ours reads them in six rounds with the graph given, and so pays for the losses of
eight skills (up to 200 documents each) before every round and for a checkpoint after it; the peer reads them in equal
shares in one phase. Both are whole runs, from reading the sources to saving the model. Learning a graph is not in it:
that is k (k + 1) / 2 short runs, whose steps are in the run's cost.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.harness import Bound, alternate, report
from headwater.core.recipe import load_recipe
from headwater.core.run import Result, execute

PACKAGES = ("networkx", "scipy", "numpy", "sklearn", "pandas", "torch", "transformers", "matplotlib")
ROUNDS, STEPS, TOKENS = 6, 240, 2048
SIDES: dict[str, dict[str, Any]] = {
    "weighed": {"method": "skill_it", "graph": "identity", "rounds": ROUNDS},
    "equal": {"method": "stratified"},
}


def trained(side: str, directory: Path) -> Result:
    """One whole run."""
    recipe = load_recipe(
        {
            **SIDES[side],
            "sources": {name: {"name": f"headwater:{name}", "limit_chars": 300_000} for name in PACKAGES},
            "model": {"kind": "llama", "hidden": 64, "layers": 2, "heads": 4, "mlp": 172, "vocab": 1024},
            "held_out": 0.1,
            "seq_len": 64,
            "batch_tokens": TOKENS,
            "budget": {"tokens": STEPS * TOKENS},
            "eval_at": [],
            "eval_chars": 2_000,
            "fit": {"precision": "fp32", "micro_rows": TOKENS // 64},
        }
    )
    return execute(recipe, directory)


def check(root: Path) -> str:
    """Stop unless both sides took as many steps on as many tokens, and ours with other shares in every round."""
    results = {side: trained(side, root / f"check-{side}") for side in SIDES}
    steps, tokens = ({result.cost[name] for result in results.values()} for name in ("steps", "tokens"))
    if steps != {STEPS} or tokens != {STEPS * TOKENS}:
        raise SystemExit(f"the sides differ: {steps} steps, {tokens} tokens")
    phases = json.loads((root / "check-weighed" / "corpus.json").read_text(encoding="utf-8"))["phases"]
    if len({json.dumps(phase["weights"]) for phase in phases}) < ROUNDS:
        raise SystemExit("shares did not change from round to round")
    return f"both take {STEPS} steps on {STEPS * TOKENS:,} tokens; shares change in each of {ROUNDS} rounds"


def main() -> None:
    """Ask."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        root, number = Path(folder), count()
        checked = check(root)

        def run(side: str) -> None:
            trained(side, root / f"run-{next(number)}")

        seconds = alternate({side: partial(run, side) for side in SIDES}, repeats=4, warmup=0)  # the check warmed up
    report(
        "What does weighing eight skills in six rounds cost beside equal shares, at the same steps?",
        {"weighed over equal": (seconds["weighed"] / seconds["equal"], Bound("lower", floor=1.1))},
        seconds=seconds,
        checked=checked,
        notes={"time": "processor seconds, one thread", "steps of a round": STEPS // ROUNDS},
    )


if __name__ == "__main__":
    main()
