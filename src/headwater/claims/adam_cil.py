"""Claim of ``adam_cil``: a frozen and an adapted encoder together beat either, more so on data that lie further off."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from headwater.continual.adam_cil import ADAM, FirstTask, LoraChoice
from headwater.continual.base import StreamInfo
from headwater.continual.data import StreamSpec, digits_data
from headwater.continual.nmc import NearestMeanClassifier
from headwater.core.cache import cache_key
from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.fit import FitSettings, NonFiniteLoss
from headwater.core.optim import SgdSpec
from headwater.core.recipe import Metrics, ModelRef
from headwater.core.run import Run
from headwater.modalities.features import ArrayEncoder
from headwater.modalities.vision.digits import SEEN, Digits, Gap, digits, digits_backbone

__all__ = ["CLAIM"]

# Trials of everything that adapts, chosen on the validation images of the first two tasks of its own stream.
LEARNING_RATES = (0.003, 0.01, 0.03, 0.1)
KNOWN_LEAST, GAP_LEAST = 0.8, 0.02


class _OnDigits(ADAM):
    """The recipe on the small backbone, one pretrained anew for every seed."""

    def encoder(self, info: StreamInfo) -> ArrayEncoder:
        return ArrayEncoder(copy.deepcopy(_backbone(self.seed)))


@cache
def _backbone(seed: int) -> nn.Module:
    return digits_backbone(seed)


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Every arm on one class order and one backbone: tuned on the first two tasks, then run on the whole stream."""
    arms: dict[str, Metrics] = {}
    items: dict[str, dict[str, list[float]]] = {}
    notes: dict[str, str] = {}

    def run(name: str, gap: Gap, **fields: Any) -> None:  # Any: recipe fields
        recipe = _recipe(scale, seed, **fields)
        if recipe.adapt_on == "first":
            recipe = _tuned(recipe, gap, directory / f"{name}-tuning")
            notes[f"{name}/lr/seed-{seed}"] = str(recipe.first_task.optim.lr)
        arms[name] = _follow(recipe, gap, directory / name)
        items[name] = {"acc/last": json.loads((directory / name / "items.json").read_text())["acc/last"]["values"]}

    run("simple-cil", "invert_noise", adapt_on="none")
    run("adam", "invert_noise")
    run("adapted-only", "invert_noise", branches="adapted")
    run("adam-l2", "invert_noise", branch_norm="l2")
    run("simple-cil-no-gap", "none", adapt_on="none")
    run("adam-no-gap", "none")
    for name, merged, alone in (("gap", "adam", "simple-cil"), ("no-gap", "adam-no-gap", "simple-cil-no-gap")):
        arms[name] = {"gain": arms[merged]["acc/average"] - arms[alone]["acc/average"]}
    fingerprint = cache_key([digits_data("none").fingerprint, digits_data("invert_noise").fingerprint])
    return Measured(arms, items, fingerprint, _unmet(seed, arms), notes)


def _recipe(scale: Scale, seed: int, **fields: Any) -> ADAM:  # Any: recipe fields
    smoke = scale == "smoke"
    return _OnDigits(
        model=ModelRef(name="digits_backbone"),
        stream=StreamSpec(increment=10 if smoke else 4, per_class=8 if smoke else None),
        peft=LoraChoice(),
        first_task=FirstTask(epochs=2 if smoke else 20),
        fit=FitSettings(precision="fp32"),
        seed=seed,
        **fields,
    )


def _tuned(recipe: ADAM, gap: Gap, directory: Path) -> ADAM:
    trials = [_with_rate(recipe, lr) for lr in LEARNING_RATES]
    figures = []
    for number, trial in enumerate(trials):
        short = trial.model_copy(update={"stream": trial.stream.model_copy(update={"tasks": 2})})
        try:
            figures.append(_follow(short, gap, directory / str(number))["validation/first_tasks"])
        except NonFiniteLoss:  # a rate at which training diverges is a trial spent for nothing
            figures.append(-math.inf)
    return trials[int(np.argmax(figures))]


def _with_rate(recipe: ADAM, lr: float) -> ADAM:
    first = recipe.first_task.model_copy(update={"optim": SgdSpec(lr=lr)})
    return recipe.model_copy(update={"first_task": first})


def _follow(recipe: ADAM, gap: Gap, directory: Path) -> Metrics:
    with Run(directory, recipe, resume=True) as run:
        return recipe.follow(recipe.stream.cut(digits_data(gap), seed=recipe.seed), run)


def _unmet(seed: int, arms: dict[str, Metrics]) -> Sequence[str]:
    known = _nearest_mean(_backbone(seed), digits("pretrain", SEEN), digits("validation", SEEN))
    cost = arms["simple-cil-no-gap"]["acc/average"] - arms["simple-cil"]["acc/average"]
    unmet = []
    if known < KNOWN_LEAST:
        unmet.append(f"the backbone knows only {known:.3f} of held-out images like those it was pretrained on")
    if cost < GAP_LEAST:
        unmet.append(f"the gap costs the frozen encoder only {cost:.3f}")
    return unmet


@torch.no_grad()
def _nearest_mean(backbone: nn.Module, train: Digits, test: Digits) -> float:
    features = [backbone(torch.from_numpy(part.images)).numpy() for part in (train, test)]
    head = NearestMeanClassifier("cosine").fit(features[0], train.labels)
    return float(head.score(features[1], test.labels))


CLAIM = Claim(
    id="adam_cil",
    statement=(
        "On a stream of 20 classes in 5 tasks whose images lie off those of pretraining, class means on the features "
        "of a frozen and of an adapted encoder together beat those on either; the gain over the frozen one is larger "
        "the further the images lie off."
    ),
    source=(
        "Zhou et al., arXiv:2303.07338: merging the pretrained model with one adapted to the first task beats "
        "SimpleCIL on CIFAR-100, and by more on data far from ImageNet (ImageNet-A, ObjectNet, VTAB)."
    ),
    parts=(
        Part(
            "With the gap, both encoders are more than 1 point above the frozen one, averaged over tasks.",
            metric="acc/average",
            treatment="adam",
            baseline="simple-cil",
            direction="higher",
            margin=0.01,
        ),
        Part(
            "With the gap, both encoders are more than 5 points above the adapted one alone: merging carries it.",
            metric="acc/average",
            treatment="adam",
            baseline="adapted-only",
            direction="higher",
            margin=0.05,
        ),
        Part(
            "The gain over the frozen encoder is larger with the gap than without.",
            metric="gain",
            treatment="gap",
            baseline="no-gap",
            direction="higher",
            margin=0.0,
        ),
        Part(
            "Scaling each encoder's features to unit length before merging does no better than leaving them.",
            metric="acc/average",
            treatment="adam",
            baseline="adam-l2",
            direction="higher",
            margin=0.0,
            decides=False,
        ),
        Part(
            "After the last task, both encoders are above the frozen one.",
            metric="acc/last",
            treatment="adam",
            baseline="simple-cil",
            direction="higher",
            margin=0.0,
            decides=False,
        ),
    ),
    rival="simple-cil",
    preconditions=(
        f"the backbone names {KNOWN_LEAST:.0%} of held-out images in the guises it was pretrained on",
        f"the gap costs class means of the frozen encoder at least {GAP_LEAST} in average accuracy",
    ),
    seeds={"smoke": (100,), "small": tuple(range(100, 108))},
    measure=measure,
)
