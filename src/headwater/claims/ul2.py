"""Is one model trained on the mixture of denoisers never far from the best, where single denoisers are somewhere?

Small scale: a T5 of 2 + 2 layers and width 64 reads general docstrings. All arms spend the same FLOPs: what the mixture
needs for about a quarter of a million source tokens. The single denoisers make shorter examples and so read more text.
Each arm chooses its learning rate from the same two on a seed of its own, by the mean over the probes on validation
text. Each model is then trained 60 steps in each probe's format before it is measured, so that none loses for a format
alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.recipe import Recipe, load_recipe
from headwater.core.run import Result, execute

__all__ = ["CLAIM"]

TUNING_SEED = 1000
LEARNING_RATES = (3e-3, 1e-2)
NATS_ABOVE_CHANCE = 1.0
ARMS: dict[str, dict[str, Any]] = {  # Any: recipe fields
    "mixture": {},
    "span corruption": {
        "denoisers": [{"mode": "R", "corruption": {"kind": "span", "mean_span": 3.0, "rate": 0.15}}],
    },
    "prefix LM": {
        "denoisers": [{"mode": "S", "corruption": {"kind": "suffix", "rate": 0.25, "jitter": True}}],
    },
}
PROBES = {
    "continuation": {"kind": "suffix", "rate": 0.5},
    "infill": {"kind": "span", "mean_span": 3.0, "rate": 0.15},
    "infill_half": {"kind": "span", "mean_span": 16.0, "rate": 0.5},
}
SHARED: dict[Scale, dict[str, Any]] = {  # Any: recipe fields
    "smoke": {
        "model": {"kind": "t5", "hidden": 16, "layers": 1, "heads": 2, "mlp": 32, "vocab": 512},
        "data": {"name": "headwater:networkx", "limit_chars": 200_000},
        "held_out": 0.2,
        "seq_length": 64,
        "batch_tokens": 512,
        "budget": {"flops": 5e8},
        "probe_steps": 1,
    },
    "small": {
        "model": {"kind": "t5", "hidden": 64, "layers": 2, "heads": 4, "mlp": 172, "vocab": 2_000},
        "data": {"name": "headwater:general", "limit_chars": 2_000_000},
        "held_out": 0.05,
        "seq_length": 64,
        "batch_tokens": 2_048,
        "budget": {"flops": 5.05e11},
        "probe_steps": 60,
    },
    "full": {
        "model": {"kind": "t5", "hidden": 512, "layers": 12, "heads": 8, "mlp": 1376, "vocab": 32_000},
        "held_out": 0.02,
        "seq_length": 512,
        "batch_tokens": 65_536,
        "budget": {"flops": 1.2e18},
        "probe_steps": 60,
    },
}


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Train the three arms on one seed, each at the learning rate that its own trials chose, and ask the probes."""
    results: dict[str, Result] = {}
    notes = {}
    for arm in ARMS:
        lr = LEARNING_RATES[0] if scale == "smoke" else _tuned(arm, scale, directory)
        notes[f"learning rate, {arm}"] = str(lr)
        results[arm] = execute(_recipe(scale, arm, lr, seed), directory / _folder(arm), resume=True)
        notes[f"source tokens, {arm}"] = f"{results[arm].metrics['tokens_source']:.0f}"
    best = {probe: min(result.metrics[f"adapted/{probe}"] for result in results.values()) for probe in PROBES}
    arms = {}
    for arm, result in results.items():
        regret = {f"regret/{probe}": result.metrics[f"adapted/{probe}"] - best[probe] for probe in PROBES}
        arms[arm] = {**result.metrics, **regret, "worst_regret": max(regret.values())}
    limit = math.log(SHARED[scale]["model"]["vocab"]) - NATS_ABOVE_CHANCE
    return Measured(
        arms=arms,
        data_fingerprint=results["mixture"].data["data"],
        unmet=[
            f"probe {probe}: the best model loses {nats:.2f} nats per token, more than {limit:.2f}"
            for probe, nats in best.items()
            if nats > limit
        ],
        notes=notes,
    )


def _recipe(scale: Scale, arm: str, lr: float, seed: int) -> Recipe:
    probes = [{"name": name, "corruption": corruption} for name, corruption in PROBES.items()]
    fixed = {"optim": {"lr": lr, "warmup": 0.05}, "fit": {"precision": "fp32"}, "eval_at": [1.0], "seed": seed}
    return load_recipe({"method": "ul2", **SHARED[scale], **ARMS[arm], "probes": probes, **fixed})


def _folder(arm: str) -> str:
    return arm.replace(" ", "-")


def _tuned(arm: str, scale: Scale, directory: Path) -> float:
    """The learning rate with the lowest mean over the probes on validation text; trials run once per claim."""
    trials = directory.parents[1] / f"{scale}-tuning" / directory.name / _folder(arm)
    found = {}
    for lr in LEARNING_RATES:
        trial = execute(_recipe(scale, arm, lr, TUNING_SEED), trials / f"lr-{lr:g}", resume=True)
        found[lr] = sum(trial.metrics[f"valid/{probe}_bpb"] for probe in PROBES)
    return min(found, key=found.__getitem__)


CLAIM = Claim(
    id="ul2",
    statement="At equal FLOPs, a model trained on the mixture of denoisers is nearer to the best model on its worst "
    "probe than models trained on span corruption alone or on prefix language modelling alone.",
    source="Tay et al., arXiv:2205.05131, section 4: the mixture improves on T5-like and GPT-like baselines by 43.6 % "
    "and 76.1 % on the paper's aggregated suite.",
    parts=(
        Part(
            "The mixture's worst regret over the probes is lower than span corruption's by at least 0.05 nats",
            "worst_regret",
            "mixture",
            "span corruption",
            "lower",
            0.05,
        ),
        Part(
            "The mixture's worst regret over the probes is lower than the prefix language model's by at least 0.05",
            "worst_regret",
            "mixture",
            "prefix LM",
            "lower",
            0.05,
        ),
        *(
            Part(
                f"The mixture is no worse than {rival} on the probe {probe}",
                f"adapted/{probe}",
                "mixture",
                rival,
                "lower",
                0.0,
                decides=False,
            )
            for rival in ("span corruption", "prefix LM")
            for probe in PROBES
        ),
    ),
    rival="span corruption",
    preconditions=(
        f"on every probe the best model is at least {NATS_ABOVE_CHANCE} nat per token better than a uniform guess",
    ),
    seeds={"smoke": (100,), "small": (100, 101, 102), "full": (100, 101, 102)},
    measure=measure,
)
