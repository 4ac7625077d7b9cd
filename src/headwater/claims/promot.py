"""Claim of ``promot``: a soft prompt that learns a task's form first keeps fine-tuning from taking it on everywhere.

A world in which all that a prompt says can be known. A Llama of two layers learns to answer from demonstrations; five
families share one alphabet of inputs, and each has words of its own for answers:

    copy   x3 > c3      next   x3 > s4      max    x3 x9 > m9      same   x3 > r7, for every input of the prompt
    less   x3 x9 > T    which is not asked again, but makes T and F words that mean something, as True and False do

Which family is asked, and in ``same`` the answer itself, stands in the demonstrations only. The model is then taught
without any whether most of five inputs are in the lower half of the alphabet: ``x3 x1 x8 x0 x7 ? > T``. Arms see the
same pairs in the same order, as many of them; ProMoT spends half on its prompt. Each takes, by accuracy on validation
pairs of the task, one of the same three learning rates, the lowest where several do equally well. The prompt's own rate
is not tuned.

Set up in pilots on seed 0, before any small run. The model is half as wide as planned, on a shared machine. ``same``
stands for a random map in every prompt, which so small a model did not learn within a minute, and the majority for
whether an input occurs among eight, which fine-tuning did not learn in 400 steps (58 % right). Without ``less``, no
prompt made T and F likely: stage 1 stood still at 1.7 nats per target, far above the 0.7 of knowing the two words. Its
rate and half of the steps bring it there. The grid of rates starts lower than at first, since 0.001 and 0.003 both
answered everything right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.adapt.promot import ProMoT
from headwater.adapt.references import TextFineTuning
from headwater.adapt.text_to_text import PairData, TextToText
from headwater.core.budget import Budget
from headwater.core.cache import cache_dir, cache_key
from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.fit import FitSettings, Phase, fit
from headwater.core.optim import OptimSpec
from headwater.core.recipe import DataRef, Metrics, ModelRef
from headwater.core.rng import numpy_generator
from headwater.core.run import Run
from headwater.modalities.text.objectives import IGNORED, CausalObjective
from headwater.modalities.text.pairs import Pairs
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.tokenizers import word_tokenizer

__all__ = ["CLAIM"]

FAMILIES = ("copy", "next", "max", "same")
PRETRAINED = (*FAMILIES, "less")
SYMBOLS, SHOTS, AMONG = 10, 4, 5
PROMPT: Mapping[str, float] = {"prompt_tokens": 8, "prompt_steps": 0.5, "prompt_lr": 1.0}
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
LEAST_PRETRAINED, LEAST_LEARNED = 0.9, 0.8
FLOAT32 = FitSettings(precision="fp32")


@dataclass(frozen=True)
class _Setting:
    hidden: int
    layers: int
    mlp: int
    pretraining_steps: int
    steps: int
    rows: int
    items: int  # of the test set; half of them for validation, and for each family
    learning_rates: tuple[float, ...] = LEARNING_RATES


_SETTINGS: Mapping[Scale, _Setting] = {
    "smoke": _Setting(16, 1, 32, pretraining_steps=3, steps=4, rows=8, items=20, learning_rates=(3e-3,)),
    "small": _Setting(64, 2, 172, pretraining_steps=150, steps=200, rows=32, items=600),
}
# The recipe, its fields, and the share of the steps that it takes.
ARMS: Mapping[str, tuple[type[TextToText], Mapping[str, Any], float]] = {  # Any: recipe fields
    "fine-tuning": (TextFineTuning, {}, 1.0),
    "fewer steps": (TextFineTuning, {}, 1 - PROMPT["prompt_steps"]),
    "random prompt": (ProMoT, {**PROMPT, "prompt_steps": 0.0}, 1.0),
    "promot": (ProMoT, PROMPT, 1.0),
}


# -- the world


def asked(family: str, rng: np.random.Generator, pairs: int) -> list[tuple[str, str]]:
    """Inputs and answers of one prompt."""
    first, second = rng.integers(SYMBOLS, size=(2, pairs))
    if family == "max":
        return [(f"x{a} x{b}", f"m{max(a, b)}") for a, b in zip(first, second, strict=True)]
    if family == "less":
        return [(f"x{a} x{b}", "T" if a < b else "F") for a, b in zip(first, second, strict=True)]
    if family == "copy":
        return [(f"x{a}", f"c{a}") for a in first]
    if family == "next":
        return [(f"x{a}", f"s{(a + 1) % SYMBOLS}") for a in first]
    return [(f"x{a}", f"r{second[0]}") for a in first]


def shown(family: str, seed: int, count: int) -> Pairs:
    """Prompts with ``SHOTS`` demonstrations and their answers."""
    rng = numpy_generator(seed, "shown", family)
    sources, targets = [], []
    for _ in range(count):
        *demonstrations, (given, answer) = asked(family, rng, SHOTS + 1)
        sources.append("".join(f"{a} > {b} ; " for a, b in demonstrations) + f"{given} >")
        targets.append(answer)
    return Pairs(sources, targets)


def majority(role: str, seed: int, count: int) -> Pairs:
    """The task: are most of ``AMONG`` inputs in the lower half of the alphabet?"""
    rng = numpy_generator(seed, "majority", role)
    drawn = rng.integers(SYMBOLS, size=(count, AMONG))
    sources = [" ".join(f"x{i}" for i in row) + " ? >" for row in drawn]
    targets = ["T" if low else "F" for low in (drawn < SYMBOLS // 2).sum(1) > AMONG // 2]
    return Pairs(sources, targets)


@dataclass(frozen=True)
class Demonstrations:
    """Prompts of all families to pretrain on, endlessly; their answers are what is learned."""

    ids: Mapping[str, int]
    start: int
    seed: int
    rows: int
    pairs: int = SHOTS + 2
    tokens_per_row: int = 1 + 4 * (SHOTS + 2)

    @property
    def fingerprint(self) -> str:
        """Of what the prompts follow from."""
        return cache_key([self.seed, self.rows, self.pairs, SYMBOLS, PRETRAINED])

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """``input_ids`` and ``labels`` ``(rows, time)``, -100 at all but the answers."""
        texts, answers = [], []
        for row in range(start, self.rows if stop is None else stop):
            text, answered = [self.start], [IGNORED]
            rng = numpy_generator(self.seed, "pretraining", step, row)
            for given, answer in asked(PRETRAINED[row % len(PRETRAINED)], rng, self.pairs):
                words = [*given.split(), ">", answer, ";"]
                text += [self.ids[word] for word in words]
                answered += [IGNORED] * (len(words) - 2) + [self.ids[answer], IGNORED]
            texts.append(torch.tensor(text))
            answers.append(torch.tensor(answered))
        pad = torch.nn.utils.rnn.pad_sequence
        labels = pad(answers, batch_first=True, padding_value=IGNORED)
        return {"input_ids": pad(texts, batch_first=True), "labels": labels}


def _pretrained(setting: _Setting, seed: int) -> Path:
    """Directory of the model that all arms of a seed start from; trained once and kept in the user cache."""
    about = [setting.hidden, setting.layers, setting.mlp, setting.pretraining_steps, setting.rows, seed]
    tokenizer = word_tokenizer([" ".join([*(f"{kind}{i}" for kind in "xcsmr" for i in range(SYMBOLS)), "> ; ? T F"])])
    stream = Demonstrations(tokenizer.get_vocab(), tokenizer.eos_token_id, seed, setting.rows)
    home = cache_dir("promot", cache_key([about, stream.fingerprint, stream.tokens_per_row]))
    model = tiny_llama(tokenizer, setting.hidden, setting.layers, 4, setting.mlp, 64, generator_seed=seed)
    trained = fit(
        Phase("demonstrations", model, stream, CausalObjective()),
        budget=Budget(steps=setting.pretraining_steps),
        optim=OptimSpec(lr=5e-3),
        seed=seed,
        directory=home,
        settings=FLOAT32,
    )
    trained.model.save_pretrained(home / "model")  # type: ignore[operator]  # a Hugging Face model
    tokenizer.save_pretrained(home / "model")
    return home / "model"


# -- the arms


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """All arms on one seed, each at the learning rate that its own validation accuracy chose."""
    setting = _SETTINGS[scale]
    start, half = _pretrained(setting, seed), setting.items // 2
    data = PairData(
        majority("train", seed, setting.steps * setting.rows),
        majority("test", seed, setting.items),
        majority("validation", seed, half),
        retained={family: shown(family, seed, half) for family in FAMILIES},
    )
    arms: dict[str, Metrics] = {}
    items: dict[str, dict[str, list[float]]] = {}
    notes: dict[str, str] = {}
    for arm in ARMS:
        found = {lr: _run(arm, lr, setting, seed, start, data, directory) for lr in setting.learning_rates}
        lr = max(found, key=lambda each: (found[each][0]["validation/accuracy"], -each))
        arms[arm], items[arm] = found[lr][0], {"id/accuracy": found[lr][1]}
        notes[f"learning rate/{arm}/seed-{seed}"] = f"{lr:g}"
        notes[f"format and accuracy in context by rate/{arm}/seed-{seed}"] = "; ".join(
            f"{each:g}: {metrics['in_context/format']:.3f}, {metrics['in_context/accuracy']:.3f}, "
            f"validation {metrics['validation/accuracy']:.3f}"
            for each, (metrics, _) in found.items()
        )
    return Measured(arms, items, data.fingerprint, _unmet(arms["fine-tuning"]), notes)


def _run(
    arm: str, lr: float, setting: _Setting, seed: int, start: Path, data: PairData, directory: Path
) -> tuple[Metrics, list[float]]:
    cls, fields, share = ARMS[arm]
    recipe = cls(
        model=ModelRef(name=str(start)),
        train=DataRef(name="majority"),
        test=DataRef(name="majority"),
        max_source=48,
        max_target=1,
        batch_size=setting.rows,
        budget=Budget(steps=round(share * setting.steps)),
        optim=OptimSpec(lr=lr),
        fit=FLOAT32,
        seed=seed,
        **fields,
    )
    home = directory / f"{arm.replace(' ', '-')}-{lr:g}"
    with Run(home, recipe, resume=home.exists()) as run:
        metrics = recipe.run_on(data, run)
    for name, side in (("accuracy", "after"), ("start", "before"), ("format", "format")):
        metrics[f"in_context/{name}"] = float(np.mean([metrics[f"retained/{family}/{side}"] for family in FAMILIES]))
    stored = json.loads((home / "items.json").read_text(encoding="utf-8"))
    return metrics, stored["id/accuracy"]["values"]


def _unmet(tuned: Metrics) -> list[str]:
    unmet = []
    if tuned["in_context/start"] < LEAST_PRETRAINED:
        unmet.append(f"the pretrained model answers {tuned['in_context/start']:.2f} from demonstrations")
    if tuned["id/accuracy"] < LEAST_LEARNED:
        unmet.append(f"fine-tuning reaches {tuned['id/accuracy']:.2f} on the task")
    return unmet


CLAIM = Claim(
    id="promot",
    statement="Taught one task after a soft prompt has taken on its form, a small language model learns it as well as "
    "by fine-tuning, and still answers other tasks from demonstrations, where fine-tuning answers with the new task's "
    "words.",
    source="Wang et al., arXiv:2211.00635: mT5-XXL fine-tuned on single tasks loses much less on 8 in-context tasks by "
    "ProMoT than by fine-tuning, at comparable results on the task.",
    parts=(
        Part(
            "In context, the model answers more than 10 points more prompts right than after fine-tuning.",
            "in_context/accuracy",
            "promot",
            "fine-tuning",
            "higher",
            0.10,
        ),
        Part(
            "On the task it loses less than 2 points to fine-tuning.",
            "id/accuracy",
            "promot",
            "fine-tuning",
            "higher",
            -0.02,
        ),
        Part(
            "In context, it answers fewer prompts with the task's words.",
            "in_context/format",
            "promot",
            "fine-tuning",
            "lower",
            0.0,
        ),
        *(
            Part(
                f"In context, it answers more prompts right than {words}.",
                "in_context/accuracy",
                "promot",
                rival,
                "higher",
                0.0,
                decides=False,
            )
            for rival, words in (
                ("random prompt", "behind a random prompt that is not trained"),
                ("fewer steps", "after fine-tuning for as many steps as its own second stage"),
            )
        ),
    ),
    rival="random prompt",
    preconditions=(
        f"the pretrained model answers {LEAST_PRETRAINED:.0%} of the prompts from {SHOTS} demonstrations",
        f"fine-tuning reaches {LEAST_LEARNED:.0%} on the task",
    ),
    seeds={"smoke": (100,), "small": (100, 101, 102)},
    measure=measure,
)
