"""Claim of ``nmc``: on a frozen sentence encoder, class means keep what a head trained task by task forgets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from headwater.continual.base import ContinualRecipe
from headwater.continual.data import MINILM, StreamSpec, docstring_data, encode_texts
from headwater.continual.nmc import NMC
from headwater.continual.references import Joint, Sequential
from headwater.continual.streams import StreamData
from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.recipe import Metrics, ModelRef
from headwater.core.run import Run

__all__ = ["CLAIM"]

CLASSES, PER_TASK, TRAIN_TEXTS = 28, 4, 64
SMOKE_PACKAGES = ("click", "jinja2", "pygments", "rich")

# Seven trials for everything that has something to tune, chosen on the validation texts of the first two tasks.
LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10_000.0)


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Every arm on one class order: tuned on the first two tasks, then run on the whole stream."""
    data, spec = _data(scale)
    shared: dict[str, Any] = {"model": ModelRef(name=MINILM), "stream": spec, "seed": seed}  # Any: recipe fields
    trials: Mapping[str, Sequence[ContinualRecipe]] = {
        "nmc": [NMC(**shared)],
        "sequential-global": [Sequential(softmax="global", lr=lr, **shared) for lr in LEARNING_RATES],
        "sequential-local": [Sequential(softmax="local", lr=lr, **shared) for lr in LEARNING_RATES],
        "joint": [Joint(C=C, **shared) for C in STRENGTHS],
    }
    arms, items, notes = {}, {}, {}
    for arm, recipes in trials.items():
        chosen = _tuned(recipes, data, directory / f"{arm}-tuning")
        arms[arm] = _follow(chosen, spec, data, directory / arm)
        items[arm] = {"acc/last": json.loads((directory / arm / "items.json").read_text())["acc/last"]["values"]}
        if len(recipes) > 1:
            field = "C" if arm == "joint" else "lr"
            notes[f"{arm}/{field}/seed-{seed}"] = str(getattr(chosen, field))
    return Measured(arms, items, data.fingerprint, _unmet(data, arms["joint"]["acc/last"]), notes)


@cache  # reading and masking all docstrings takes longer than a seed's experiment, and is the same for every seed
def _data(scale: Scale) -> tuple[StreamData, StreamSpec]:
    if scale == "smoke":
        few = docstring_data(SMOKE_PACKAGES, per_class=30)
        return encode_texts(few, ModelRef(name=MINILM), max_tokens=16), StreamSpec(increment=1, init=2, per_class=8)
    # The same packages in every order, so that every seed is judged on the same test texts.
    data = _first_classes(encode_texts(docstring_data(), ModelRef(name=MINILM)), CLASSES)
    return data, StreamSpec(increment=PER_TASK, per_class=TRAIN_TEXTS)


def _first_classes(data: StreamData, count: int) -> StreamData:
    train, test, validation = (
        None if part is None else part.take(part.labels < count) for part in (data.train, data.test, data.validation)
    )
    assert train is not None
    assert test is not None
    return StreamData(train, test, validation, data.label_names[:count], data.fingerprint)


def _tuned(recipes: Sequence[ContinualRecipe], data: StreamData, directory: Path) -> ContinualRecipe:
    if len(recipes) == 1:
        return recipes[0]
    figures = []
    for trial, recipe in enumerate(recipes):
        spec = recipe.stream.model_copy(update={"tasks": 2})
        short = recipe.model_copy(update={"stream": spec})
        figures.append(_follow(short, spec, data, directory / str(trial))["validation/first_tasks"])
    return recipes[int(np.argmax(figures))]


def _follow(recipe: ContinualRecipe, spec: StreamSpec, data: StreamData, directory: Path) -> Metrics:
    with Run(directory, recipe, resume=True) as run:
        return recipe.follow(spec.cut(data, seed=recipe.seed), run)


def _unmet(data: StreamData, joint: float) -> list[str]:
    classes = len(data.label_names)
    fewest = int(np.bincount(data.train.labels).min())
    unmet = []
    if classes < CLASSES:
        unmet.append(f"only {classes} of {CLASSES} packages with enough docstrings are installed")
    if fewest < TRAIN_TEXTS:
        unmet.append(f"a package has only {fewest} training texts; {TRAIN_TEXTS} are wanted")
    if joint < 5 / classes:
        unmet.append(f"the features carry little: all data at once give {joint:.3f}, below five times chance")
    return unmet


CLAIM = Claim(
    id="nmc",
    statement=(
        "On a stream of 28 classes in 7 tasks, class means of a frozen encoder end far above a softmax head trained on "
        "the same features task by task, and close to logistic regression on all data at once."
    ),
    source=(
        "Janson et al., arXiv:2210.04428: nearest class means on a frozen ViT-B/16 reach 88.53 % on "
        "10-Split-CIFAR-100, at or above methods that train."
    ),
    parts=(
        Part(
            "Class means end more than 30 points above the head trained by SGD over all classes seen.",
            metric="acc/last",
            treatment="nmc",
            baseline="sequential-global",
            direction="higher",
            margin=0.30,
        ),
        Part(
            "Class means lose less than 8 points to logistic regression on all data at once.",
            metric="acc/last",
            treatment="nmc",
            baseline="joint",
            direction="higher",
            margin=-0.08,
        ),
        Part(
            "Class means end above the head trained by SGD over the current task's classes only.",
            metric="acc/last",
            treatment="nmc",
            baseline="sequential-local",
            direction="higher",
            margin=0.0,
            decides=False,
        ),
        Part(
            "Class means forget less than the head trained by SGD over all classes seen.",
            metric="forgetting/max",
            treatment="nmc",
            baseline="sequential-global",
            direction="lower",
            margin=0.0,
            decides=False,
        ),
    ),
    rival="sequential-local",
    preconditions=(
        f"{CLASSES} installed packages with at least {TRAIN_TEXTS} training docstrings each",
        "logistic regression on all data at once reaches five times chance",
    ),
    seeds={"smoke": (100,), "small": (100, 101, 102, 103, 104)},
    measure=measure,
)
