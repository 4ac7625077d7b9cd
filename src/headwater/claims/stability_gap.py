"""Does a subset read four times, of high quality and with replay, close the stability gap, at what the domain costs?

Small scale: the base of 96 x 2 on general docstrings continues on networkx, 40 steps. Every arm chooses its learning
rate from the same three on a seed of its own, by the validation loss of the domain. The optimizer warms up over a tenth
of the steps: with the paper's few per cent of forty steps the first, cold Adam step would make a gap of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.recipe import Recipe, load_recipe
from headwater.core.run import Result, execute

__all__ = ["CLAIM"]

TUNING_SEED = 1000
LEARNING_RATES = (2.5e-3, 5e-3, 1e-2)
ARMS: dict[str, dict[str, Any]] = {  # Any: recipe fields
    "subset": {"method": "stability_gap", "epochs": 4.0, "quality": "ngram", "replay": 0.2},
    "random subset": {"method": "stability_gap", "epochs": 4.0, "quality": "none", "replay": 0.2},
    "plain": {"method": "plain"},
    "replay": {"method": "plain", "replay": 0.2},
}
GAP_TO_SPEAK_OF = 0.05
SHARED: dict[Scale, dict[str, Any]] = {  # Any: recipe fields
    "smoke": {"model": "headwater:smoke-base", "budget": {"steps": 4}, "batch_tokens": 1024, "eval_chars": 5_000},
    "small": {
        "model": "headwater:small-base",
        "budget": {"tokens": 81_920},
        "batch_tokens": 2_048,
        "eval_chars": 60_000,
    },
    "full": {"model": "headwater:demo-base", "budget": {"tokens": 786_432}, "batch_tokens": 4_096},
}


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Run the four arms on one seed, each at the learning rate that its own trials chose."""
    results: dict[str, Result] = {}
    notes = {}
    folders = {arm: directory / arm.replace(" ", "-") for arm in ARMS}
    for arm, fields in ARMS.items():
        lr = 5e-3 if scale == "smoke" else _tuned(arm, scale, directory)
        notes[f"learning rate, {arm}"] = str(lr)
        results[arm] = execute(_recipe(scale, fields, lr, seed), folders[arm], resume=True)
    gap = results["plain"].metrics["general/worst"]
    items = {arm: json.loads((folder / "items.json").read_text(encoding="utf-8")) for arm, folder in folders.items()}
    return Measured(
        arms={arm: result.metrics for arm, result in results.items()},
        items={arm: {"domain/gain": found["domain/gain"]["values"]} for arm, found in items.items()},
        data_fingerprint=results["plain"].data["domain"],
        unmet=[]
        if gap >= GAP_TO_SPEAK_OF
        else [f"plain training shows no gap: general text rises by {gap:.3f} at most"],
        notes=notes,
    )


def _recipe(scale: Scale, fields: dict[str, Any], lr: float, seed: int) -> Recipe:
    shared = {"domain": "headwater:networkx", "general": "headwater:general", **SHARED[scale]}
    fixed = {"optim": {"lr": lr, "warmup": 0.1}, "fit": {"precision": "fp32"}, "seed": seed}
    return load_recipe({**shared, **fields, **fixed})


def _tuned(arm: str, scale: Scale, directory: Path) -> float:
    """The learning rate with the lowest validation loss of the domain on the tuning seed; trials run once per claim."""
    trials = directory.parents[1] / f"{scale}-tuning" / directory.name / arm.replace(" ", "-")
    losses = {}
    for lr in LEARNING_RATES:
        trial = execute(_recipe(scale, ARMS[arm], lr, TUNING_SEED), trials / f"lr-{lr:g}", resume=True)
        losses[lr] = trial.metrics["valid/domain_bpb"]
    return min(losses, key=losses.__getitem__)


CLAIM = Claim(
    id="stability_gap",
    statement="Four epochs on a quality-ranked subset with replay forget less on the way than plain continued "
    "pretraining, and gain as much in the domain as plain continued pretraining with the same replay, at equal tokens.",
    source="Guo et al., arXiv:2406.14833, abstract: OpenLlama-3B, medical average 36.2 to 40.7 with 40 % of the budget "
    "and no general forgetting.",
    parts=(
        Part(
            "The highest rise of general bits per byte on the way is lower than with plain training by at least 0.05",
            "general/worst",
            "subset",
            "plain",
            "lower",
            0.05,
        ),
        Part(
            "The domain gain is no worse than plain training's with the same replay, by 0.01 bits per byte",
            "domain/gain",
            "subset",
            "replay",
            "higher",
            -0.01,
            units="seeds and documents",
        ),
        Part(
            "The rise is no higher than with plain training and the same replay",
            "general/worst",
            "subset",
            "replay",
            "lower",
            -0.01,
            decides=False,
        ),
        Part(
            "Ranking the subset by quality gains more than drawing it at random",
            "domain/gain",
            "subset",
            "random subset",
            "higher",
            0.0,
            units="seeds and documents",
            decides=False,
        ),
    ),
    rival="replay",
    preconditions=(f"plain training raises general bits per byte by at least {GAP_TO_SPEAK_OF} on the way",),
    seeds={"smoke": (100,), "small": (100, 101, 102), "full": (100, 101, 102, 103, 104)},
    measure=measure,
)
