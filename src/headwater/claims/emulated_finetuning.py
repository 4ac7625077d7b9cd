"""Experiment of ``emulated_finetuning``: facts from a large model, manners from a small one.

An invented world: each entity, named by two tokens, has one of forty values. Pretraining text names an entity and then
its value two times in five, and a hedge otherwise; three times in four it goes on. The large model memorises the
values, the small one has no room to. The small one is tuned on a tenth of the entities to give the value and to stop.
Asked for the other entities, greedily, an arm is right where it gives the value and then stops.

Both models are pretrained to a criterion and not for a number of steps: without memorised facts, or with hedges left in
the tuned model, there is nothing to compose. Names carry no loss, as no model could predict them.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headwater.compose.emulated_finetuning import EmulatedModel
from headwater.core.budget import Budget
from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.fit import FitSettings, Phase, fit
from headwater.core.optim import OptimSpec
from headwater.core.rng import derive_seed, numpy_generator
from headwater.modalities.text.objectives import CausalObjective
from headwater.modalities.text.tiny import tiny_llama

__all__ = ["CLAIM"]

END, GO_ON, HEDGE, FIRST = 0, 1, 2, 3  # ids; from FIRST on the first names, the second names, the values
STATED, GOES_ON = 0.4, 0.75
STATEMENTS = 4  # in a row of pretraining text
IGNORED = -100
KNOWS, SMALL_KNOWS, MOST_HEDGES, LEAST_STOPS = 0.95, 0.3, 0.05, 0.95
TUNED = 0.02  # mean probability of the hedge on the tuning entities at which tuning ends


@dataclass(frozen=True)
class _Setting:
    names: int  # of each kind
    entities: int
    values: int
    tune: int
    rows: int
    pretrain: tuple[int, int]  # steps between two looks at the criterion, looks at most
    tuning: tuple[int, int]


_SETTINGS: Mapping[Scale, _Setting] = {
    "smoke": _Setting(names=8, entities=60, values=10, tune=10, rows=20, pretrain=(5, 1), tuning=(2, 1)),
    "small": _Setting(names=25, entities=600, values=40, tune=60, rows=150, pretrain=(250, 8), tuning=(20, 20)),
}


class _World:
    """Entities, their values, and text about them."""

    def __init__(self, setting: _Setting, seed: int) -> None:
        self.setting, self.seed = setting, seed
        rng = numpy_generator(seed, "world")
        pairs = rng.permutation(setting.names**2)[: setting.entities]
        self.second = FIRST + setting.names
        self.first_value = self.second + setting.names
        self.vocabulary = self.first_value + setting.values
        names = np.stack([FIRST + pairs // setting.names, self.second + pairs % setting.names], axis=1)
        self.values = self.first_value + rng.integers(setting.values, size=setting.entities)
        self.prompts = torch.from_numpy(np.concatenate([np.full((len(names), 1), END), names], axis=1))
        self.fingerprint = hashlib.blake2b(
            self.prompts.numpy().tobytes() + self.values.tobytes(), digest_size=16
        ).hexdigest()

    def text(self, step: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of pretraining text and their labels, ``(rows, 1 + 4 STATEMENTS)``."""
        rng = numpy_generator(seed, "text", step)
        size = (self.setting.rows, STATEMENTS)
        about = rng.integers(self.setting.entities, size=size)
        answer = np.where(rng.random(size) < STATED, self.values[about], HEDGE)
        after = np.where(rng.random(size) < GOES_ON, GO_ON, END)
        names = self.prompts.numpy()[about, 1:]
        statements = np.concatenate([names, answer[..., None], after[..., None]], axis=-1)
        labels = statements.copy()
        labels[..., :2] = IGNORED
        start = np.full((size[0], 1), END)
        ids = np.concatenate([start, statements.reshape(size[0], -1)], axis=1)
        return ids, np.concatenate([np.full_like(start, IGNORED), labels.reshape(size[0], -1)], axis=1)

    def lessons(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The tuning entities, each with its value and an end; labels on those two."""
        count = self.setting.tune
        answers = np.stack([self.values[:count], np.full(count, END)], axis=1)
        prompts = self.prompts.numpy()[:count]
        return np.concatenate([prompts, answers], axis=1), np.concatenate(
            [np.full_like(prompts, IGNORED), answers], axis=1
        )


@dataclass(frozen=True)
class _Stream:
    """Rows made on demand."""

    fingerprint: str
    rows: int
    tokens_per_row: int
    make: Callable[[int], tuple[NDArray[np.int64], NDArray[np.int64]]]

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        ids, labels = (torch.from_numpy(part[start:stop]) for part in self.make(step))
        return {"input_ids": ids, "labels": labels}


def _until(
    done: Callable[[nn.Module], bool],
    model: nn.Module,
    stream: Callable[[int], _Stream],
    lr: float,
    looks: tuple[int, int],
    seed: int,
    directory: Path,
) -> int:
    """Train in rounds until ``done``, or for as many as there may be; how many it took."""
    steps, most = looks
    for number in range(most):
        fit(
            Phase(f"round-{number}", model, stream(number), CausalObjective()),
            budget=Budget(steps=steps),
            optim=OptimSpec(lr=lr, schedule="constant", warmup=0.1, weight_decay=0.0),
            seed=derive_seed(seed, "round", number),
            directory=directory,
            settings=FitSettings(precision="fp32"),
        )
        if done(model):
            return number + 1
    return most


def _log_probs(model: nn.Module, ids: Tensor) -> Tensor:
    """Of the token after ``ids``, ``(batch, V)``."""
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits[:, -1].float().log_softmax(-1)
    return found


def _knows(model: nn.Module, world: _World) -> float:
    """Share of the entities whose value is the likeliest of the values, hedges left aside."""
    values = _log_probs(model, world.prompts)[:, world.first_value :].argmax(-1).numpy() + world.first_value
    return float((values == world.values).mean())


def _mannered(model: nn.Module, world: _World) -> bool:
    """Whether a model neither hedges nor goes on, on the entities it is tuned on."""
    prompts = world.prompts[: world.setting.tune]
    hedge = float(_log_probs(model, prompts)[:, HEDGE].exp().mean())
    _, after = _answers(partial(_log_probs, model), prompts)
    return hedge <= TUNED and bool((after == END).all())


def _answers(log_probs: Callable[[Tensor], Tensor], prompts: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The next two tokens, decoded greedily."""
    first = log_probs(prompts).argmax(-1, keepdim=True)
    after = log_probs(torch.cat([prompts, first], dim=1)).argmax(-1)
    return first[:, 0].numpy(), after.numpy()


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Pretrain both models, tune the small one, and ask every arm for the entities that were not tuned on."""
    setting = _SETTINGS[scale]
    world = _World(setting, seed)

    def text(number: int) -> _Stream:
        return _Stream(
            f"text-{world.fingerprint}-{number}",
            setting.rows,
            1 + 4 * STATEMENTS,
            lambda step: world.text(step, derive_seed(seed, "text", number)),
        )

    def lessons(number: int) -> _Stream:
        return _Stream(f"lessons-{world.fingerprint}-{number}", setting.tune, 5, lambda step: world.lessons())

    large = tiny_llama(world.vocabulary, 96, 1, 4, 384, 64, tie=False, generator_seed=derive_seed(seed, "large"))
    small = tiny_llama(world.vocabulary, 8, 1, 2, 16, 64, tie=False, generator_seed=derive_seed(seed, "small"))
    rounds = _until(
        lambda model: _knows(model, world) >= KNOWS, large, text, 3e-3, setting.pretrain, seed, directory / "large"
    )
    # The small model reads what the large one read.
    _until(lambda model: False, small, text, 3e-3, (setting.pretrain[0], rounds), seed, directory / "small")
    tuned, large_tuned = copy.deepcopy(small), copy.deepcopy(large)
    mannered = partial(_mannered, world=world)
    _until(mannered, tuned, lessons, 2e-3, setting.tuning, seed, directory / "small_tuned")
    _until(mannered, large_tuned, lessons, 5e-4, setting.tuning, seed, directory / "large_tuned")

    probabilities: dict[str, Callable[[Tensor], Tensor]] = {
        name: partial(_log_probs, model)
        for name, model in {
            "large": large,
            "small": small,
            "small_tuned": tuned,
            "eft": EmulatedModel(large, small, tuned).eval(),
            "large_tuned": large_tuned,
        }.items()
    }
    both = [probabilities["large"], probabilities["small_tuned"]]
    probabilities |= {
        "average": lambda ids: torch.stack([of(ids) for of in both]).logsumexp(0),
        "log_average": lambda ids: torch.stack([of(ids) for of in both]).mean(0),
    }
    asked, values = world.prompts[setting.tune :], world.values[setting.tune :]
    items = {arm: _judged(*_answers(of, asked), values) for arm, of in probabilities.items()}
    arms = {arm: {name: float(np.mean(each)) for name, each in own.items()} for arm, own in items.items()}
    knows = {name: _knows(model, world) for name, model in (("large", large), ("small", small))}
    unmet = [f"seed {seed}: {words}" for words in _unmet(knows, arms["small_tuned"])]
    notes = {f"seed-{seed}/{name} knows": f"{share:.3f}" for name, share in knows.items()}
    notes[f"seed-{seed}/pretraining steps"] = str(rounds * setting.pretrain[0])
    return Measured(arms, items, world.fingerprint, unmet, notes)


def _judged(
    first: NDArray[np.int64], after: NDArray[np.int64], values: NDArray[np.int64]
) -> dict[str, Sequence[float]]:
    found = {
        "right": (first == values) & (after == END),
        "correct": first == values,
        "hedges": first == HEDGE,
        "stops": after == END,
    }
    return {name: each.astype(float).tolist() for name, each in found.items()}


def _unmet(knows: Mapping[str, float], tuned: Mapping[str, float]) -> list[str]:
    said = []
    if knows["large"] < KNOWS:
        said.append(f"the large model knows {knows['large']:.3f} of the values; needed {KNOWS}")
    if knows["small"] > SMALL_KNOWS:
        said.append(f"the small model knows {knows['small']:.3f} of the values; at most {SMALL_KNOWS} is wanted")
    if tuned["hedges"] > MOST_HEDGES or tuned["stops"] < LEAST_STOPS:
        said.append(f"the tuned small model hedges {tuned['hedges']:.3f} and stops {tuned['stops']:.3f} of the time")
    return said


def _right_more_often_than(baseline: str, words: str, decides: bool = True, margin: float = 0.1) -> Part:
    return Part(f"EFT is right more often than {words}.", "right", "eft", baseline, "higher", margin, decides=decides)


CLAIM = Claim(
    id="emulated_finetuning",
    statement="In an invented world whose facts a large model has memorised and a small one cannot hold: the large "
    "model with the small one's tuning difference gives the fact and stops more often than the large model, than the "
    "tuned small model and than either average of the two, and hedges less than the large model.",
    source="Mitchell et al., arXiv:2310.12962: up-scaling improves helpfulness and factuality over the small tuned "
    "model for Llama-1, Llama-2 and Falcon; the scale of pretraining drives factuality, that of fine-tuning "
    "helpfulness.",
    parts=(
        _right_more_often_than("large", "the large model"),
        _right_more_often_than("small_tuned", "the tuned small model"),
        _right_more_often_than("average", "the mean of the probabilities of those two"),
        _right_more_often_than("log_average", "the mean of their log-probabilities"),
        Part("EFT hedges less than the large model.", "hedges", "eft", "large", "lower", 0.0),
        Part(
            "EFT gives the fact, stopping or not, more often than the mean of the log-probabilities.",
            "correct",
            "eft",
            "log_average",
            "higher",
            0.0,
            decides=False,
        ),
        Part(
            "EFT is right not more than 0.1 less often than the large model tuned on the same lessons.",
            "right",
            "eft",
            "large_tuned",
            "higher",
            -0.1,
            decides=False,
        ),
    ),
    rival="log_average",
    preconditions=(
        f"on every seed the large model knows at least {KNOWS} of the values, hedges left aside",
        f"the small model knows at most {SMALL_KNOWS} of them",
        f"the tuned small model hedges at most {MOST_HEDGES} and stops at least {LEAST_STOPS} of the time elsewhere",
    ),
    seeds={"smoke": (0,), "small": (100, 101, 102)},
    measure=measure,
)
