"""Is a model of one domain better trained on that domain alone, and over its own vocabulary, at equal total compute?

Small scale: the architecture of 96 x 2 over 1,024 tokens, 120 steps of 2,048 tokens for every arm. A scratch arm spends
them all on networkx docstrings; a two-step arm spends 90 on general docstrings and 30 on networkx. Each exists over the
general vocabulary and over one learned from the networkx docstrings, which both arms share: two factors, crossed. Every
arm chooses its learning rate from the same two on a seed of its own, by the validation loss of the domain. Initial
weights vary with the seed, in the general step too, so that no interval is conditional on one base.

A second table, which decides nothing, gives scratch arms only the domain steps of the two-step arms, once and twice: it
says what the general step is worth, and to whom this method must not be recommended.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.recipe import load_recipe
from headwater.core.run import Result, execute

__all__ = ["CLAIM"]

TUNING_SEED = 1000
LEARNING_RATES = (5e-3, 1e-2)
DOMAIN, GENERAL = "headwater:networkx", "headwater:general"
VOCABULARIES = ("general", "own")
WORTH_OF_THE_GENERAL_STEP = 0.05
SHAPE: dict[Scale, dict[str, Any]] = {  # Any: recipe fields
    "smoke": {"model": "headwater:smoke-base", "batch_tokens": 512, "eval_chars": 5_000},
    "small": {"model": "headwater:small-base", "batch_tokens": 2_048, "eval_chars": 60_000},
    "full": {"model": "headwater:demo-base", "batch_tokens": 4_096, "eval_chars": 400_000},
}
STEPS: dict[Scale, tuple[int, int]] = {"smoke": (6, 2), "small": (90, 30), "full": (162, 54)}
"""General and domain steps of the two-step arms; scratch arms have the sum."""


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Train the four arms on one seed, each at the learning rate that its own trials chose, and the short ones."""
    general, domain = STEPS[scale]
    rates = {
        (init, vocabulary): LEARNING_RATES[0] if scale == "smoke" else _tuned(init, vocabulary, scale, directory)
        for init in ("scratch", "two-step")
        for vocabulary in VOCABULARIES
    }
    results: dict[str, Result] = {}
    for (init, vocabulary), lr in rates.items():
        arm = f"{init}, {vocabulary} vocabulary"
        results[arm] = _arm(init, vocabulary, scale, lr, seed, directory / _folder(arm))
        if init == "scratch":
            for times in (1, 2):
                short = f"{arm}, {times} x the domain steps"
                results[short] = _scratch(vocabulary, scale, times * domain, lr, seed, directory / _folder(short))
    bpb = {arm: result.metrics["domain/bpb"] for arm, result in results.items()}
    bytes_per_token = {v: results[f"scratch, {v} vocabulary"].metrics["domain/bytes_per_token"] for v in VOCABULARIES}
    notes = {f"learning rate, {init}, {vocabulary} vocabulary": str(lr) for (init, vocabulary), lr in rates.items()}
    notes |= {f"bytes per token, {v} vocabulary": f"{bytes_per_token[v]:.3f}" for v in VOCABULARIES}
    notes |= {
        f"bits per byte of seed {seed}, {v} vocabulary": ", ".join(
            f"{name} {bpb[arm]:.3f}"
            for name, arm in (
                (f"scratch {domain} steps", f"scratch, {v} vocabulary, 1 x the domain steps"),
                (f"{2 * domain}", f"scratch, {v} vocabulary, 2 x the domain steps"),
                (f"{general + domain}", f"scratch, {v} vocabulary"),
                (f"two-step {general} + {domain}", f"two-step, {v} vocabulary"),
            )
        )
        for v in VOCABULARIES
    }
    worth = bpb["scratch, general vocabulary, 1 x the domain steps"] - bpb["two-step, general vocabulary"]
    unmet = []
    if worth < WORTH_OF_THE_GENERAL_STEP:
        unmet.append(f"the general step is worth {worth:.3f} bits per byte at equal domain steps: the rival is weak")
    if bytes_per_token["own"] <= bytes_per_token["general"]:
        unmet.append("the own vocabulary packs no more bytes into a token than the general one")
    return Measured(
        arms={arm: result.metrics for arm, result in results.items()},
        data_fingerprint=results["scratch, own vocabulary"].data["domain"],
        unmet=unmet,
        notes=notes,
    )


def _folder(arm: str) -> str:
    return arm.replace(",", "").replace(" ", "-")


def _arm(init: str, vocabulary: str, scale: Scale, lr: float, seed: int, directory: Path) -> Result:
    if init == "scratch":
        return _scratch(vocabulary, scale, sum(STEPS[scale]), lr, seed, directory)
    general, domain = STEPS[scale]
    start = SHAPE[scale]["model"]
    if vocabulary == "own":
        # A model over the domain's vocabulary: only its architecture and its tokenizer are taken.
        own = {"method": "from_scratch", "eval_chars": 1}
        _run(own, scale, 1, lr, seed, directory / "vocabulary")
        start = str(directory / "vocabulary" / "model")
    first = {"method": "scratch", "model": start, "domain": GENERAL, "eval_chars": 1}
    _run(first, scale, general, lr, seed, directory / "general")
    trained = str(directory / "general" / "model")
    return _run({"method": "plain", "model": trained}, scale, domain, lr, seed, directory / "domain")


def _scratch(vocabulary: str, scale: Scale, steps: int, lr: float, seed: int, directory: Path) -> Result:
    return _run(
        {"method": "from_scratch", "vocab": "domain" if vocabulary == "own" else "keep"},
        scale,
        steps,
        lr,
        seed,
        directory,
    )


def _run(fields: dict[str, Any], scale: Scale, steps: int, lr: float, seed: int, directory: Path) -> Result:
    fixed = {
        "budget": {"steps": steps},
        "optim": {"lr": lr, "warmup": 0.1},
        "fit": {"precision": "fp32"},
        "eval_at": [],
        "seed": seed,
    }
    return execute(load_recipe({"domain": DOMAIN, **SHAPE[scale], **fields, **fixed}), directory, resume=True)


def _tuned(init: str, vocabulary: str, scale: Scale, directory: Path) -> float:
    """The learning rate with the lowest validation loss of the domain on the tuning seed; trials run once per claim."""
    trials = directory.parents[1] / f"{scale}-tuning" / directory.name / f"{init}-{vocabulary}"
    losses = {}
    for lr in LEARNING_RATES:
        trial = _arm(init, vocabulary, scale, lr, TUNING_SEED, trials / f"lr-{lr:g}")
        losses[lr] = trial.metrics["valid/domain_bpb"]
    return min(losses, key=losses.__getitem__)


def _part(statement: str, treatment: str, baseline: str, margin: float, *, decides: bool = False) -> Part:
    return Part(statement, "domain/bpb", treatment, baseline, "lower", margin, decides=decides)


CLAIM = Claim(
    id="from_scratch",
    statement="At equal total compute, training on domain text alone from new weights models the domain better than "
    "training on general text first, and a vocabulary learned from the domain is better than the general one.",
    source="Gu et al., arXiv:2007.15779, abstract and section 4: PubMedBERT, from scratch over its own vocabulary, is "
    "ahead of models continued from general ones on BLURB, and of the same training over the general vocabulary.",
    parts=(
        _part(
            "From scratch is better than in two steps over the same, general vocabulary, by 0.02 bits per byte or more",
            "scratch, general vocabulary",
            "two-step, general vocabulary",
            0.02,
            decides=True,
        ),
        _part(
            "From scratch, the domain's own vocabulary is better than the general one",
            "scratch, own vocabulary",
            "scratch, general vocabulary",
            0.0,
            decides=True,
        ),
        _part(
            "From scratch is better than in two steps over the domain's own vocabulary",
            "scratch, own vocabulary",
            "two-step, own vocabulary",
            0.02,
        ),
        _part(
            "In two steps, the domain's own vocabulary is better than the general one",
            "two-step, own vocabulary",
            "two-step, general vocabulary",
            0.0,
        ),
        *(
            _part(
                f"From scratch with {times} x the two-step arm's domain steps is better than it, {v} vocabulary",
                f"scratch, {v} vocabulary, {times} x the domain steps",
                f"two-step, {v} vocabulary",
                0.0,
            )
            for v in VOCABULARIES
            for times in (1, 2)
        ),
    ),
    rival="two-step, general vocabulary",
    preconditions=(
        f"at equal domain steps the general step is worth at least {WORTH_OF_THE_GENERAL_STEP} bits per byte",
        "the domain's own vocabulary packs more bytes into a token than the general one",
    ),
    seeds={"smoke": (100,), "small": (100, 101, 102), "full": (100, 101, 102, 103, 104)},
    measure=measure,
)
