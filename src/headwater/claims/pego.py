"""Experiment of ``pego``: what a docstring documents, learned in six packages and asked of six others.

Three classes: a class, a function, a method; the package's name is masked. MiniLM is trained with adapters on its query
and value projections, the same batches in every arm, balanced over packages. The group has three trials of its
regulariser's weight, at the middle learning rate; a plain LoRA with as many weights has three of its learning rate;
with weight decay it keeps the rate that was chosen without. What is chosen is chosen once, on a draw of training texts
that no seed uses, by the accuracy on held-out texts of the training packages.

Set up with the plain LoRA on seed 0: at rates of 5e-4 to 2e-3, the first choice, 32 steps left it near chance on other
packages (0.46 at 1e-3), so the rates are around 3e-3, where it was best (0.53). Texts are cut to 32 tokens and batches
to 24 so that all fits a quarter of an hour. The group was run at weights 0 and 1e-3 on seed 0, to see that its figures
can be measured; at 1e-3 its updates were small and its fit was low, and nothing was changed for that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import nn

from headwater.adapt.base import AdaptTask
from headwater.adapt.data import Examples, TaskData
from headwater.adapt.pego import Pego
from headwater.adapt.tuned import FineTuning, TunedClassifier, TunedRecipe
from headwater.core.budget import GivenBudget
from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.fit import FitSettings
from headwater.core.lora import LoraSpec
from headwater.core.optim import OptimSpec
from headwater.core.recipe import DataRef, ModelRef
from headwater.core.run import Run
from headwater.core.sampling import sample_shots
from headwater.modalities.features import extract_features
from headwater.modalities.text.classes import unwrapped
from headwater.modalities.text.docstrings import docstring_dataset
from headwater.modalities.text.labelled import MINILM, open_encoder, text_array

__all__ = ["CLAIM"]

KINDS = ("class", "function", "method")
RANK, GROUP = 4, 4
LAMBDAS, RATES, DECAY = (1e-4, 1e-3, 1e-2), (1e-3, 3e-3, 1e-2), 0.1
RATE, NAMED = RATES[1], LAMBDAS[1]  # the rate of the group; the weight of the statements about overlap and fit
TUNING_SEED = 99  # of the draw on which settings are chosen
LEAST, MOST = 0.45, 0.97  # plain LoRA's accuracy on other packages: above chance, below a ceiling
HALF, CLOSE = 0.5, 0.01


@dataclass(frozen=True)
class _Setting:
    train: tuple[str, ...]
    test: tuple[str, ...]
    unrelated: tuple[str, ...]
    steps: int
    rows: int
    tokens: int
    per_kind: int  # training texts of a package and kind
    held: int  # held-out texts, likewise
    tested: int  # texts of another package and kind
    agreed: int  # unrelated texts of a package and kind
    settings: int = 3  # tried of the group and of the plain LoRA


_SETTINGS: Mapping[Scale, _Setting] = {
    "smoke": _Setting(("rich", "click"), ("jinja2",), ("joblib",), 2, 4, 12, 4, 2, 4, 3, settings=1),
    "small": _Setting(
        train=("numpy", "scipy", "sklearn", "pandas", "statsmodels", "matplotlib"),
        test=("stdlib", "torch", "transformers", "pydantic", "huggingface_hub", "hypothesis"),
        unrelated=("rich", "fontTools", "pip"),
        steps=32,
        rows=24,
        tokens=32,
        per_kind=21,
        held=10,
        tested=30,
        agreed=12,
    ),
}


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Every arm with its chosen setting, on one draw of training texts; the test texts are the same for all seeds."""
    experiment = _experiment(scale, directory.parent.parent / f"{scale}-tuning" / directory.name)
    runs: dict[tuple[str, float], _Outcome] = {}
    wanted = [*experiment.chosen.items(), ("pego", NAMED), ("pego", 0.0)]
    for arm, setting in dict.fromkeys(wanted):
        runs[arm, setting] = experiment.run(arm, setting, seed, directory / f"{arm}-{setting:g}")
    outcomes = {arm: runs[arm, setting] for arm, setting in experiment.chosen.items()}
    named, plain = runs["pego", NAMED], runs["pego", 0.0]
    arms: dict[str, dict[str, float]] = {}
    items: dict[str, dict[str, list[float]]] = {}
    for arm, outcome in outcomes.items():
        arms[arm] = {"ood": float(outcome.right.mean()), "retained": outcome.retained()}
        items[arm] = {"ood": outcome.right.tolist()}
    for arm, outcome in {"pego-named": named, "pego-0": plain}.items():
        figures = outcome.figures
        arms[arm] = {
            "overlap": figures["ortho/preserve"] / plain.figures["ortho/preserve"],
            "between": figures["ortho/diversify"] / plain.figures["ortho/diversify"],
            "size": figures["ortho/size"],
            "fits": outcome.fits(),
        }
    notes = {f"{arm}/setting": f"{setting:g}" for arm, setting in experiment.chosen.items()}
    unmet = []
    if scale != "smoke" and not LEAST <= arms["lora"]["ood"] <= MOST:
        unmet.append(
            f"seed {seed}: plain LoRA is right {arms['lora']['ood']:.3f} of the time; needed {LEAST} to {MOST}"
        )
    return Measured(arms, items, experiment.fingerprint, unmet, notes)


@dataclass(frozen=True)
class _Outcome:
    tuned: TunedClassifier
    figures: Mapping[str, float]
    right: NDArray[np.float64]  # on the texts of other packages
    train: Examples
    experiment: _Experiment

    def fits(self) -> float:
        """Accuracy on the training texts."""
        return float((self.tuned.predict_scores(self.train.inputs).argmax(1) == self.train.labels).mean())

    def retained(self) -> float:
        """Rank correlation of cosine similarities of unrelated texts with those of the encoder before training."""
        encoder = unwrapped(self.tuned.classes.model).base_model
        return float(spearmanr(self.experiment.similarities(encoder), self.experiment.before).statistic)


class _Experiment:
    def __init__(self, scale: Scale, directory: Path) -> None:
        self.setting = own = _SETTINGS[scale]
        pools = {name: _pool(name) for name in (*own.train, *own.test, *own.unrelated)}
        self.pools = {name: pools[name] for name in own.train}
        self.test = _joined([_drawn(_joined(list(pools[name])), own.tested, 0) for name in own.test])
        self.unrelated = _joined([_drawn(_joined(list(pools[name])), own.agreed, 0) for name in own.unrelated])
        said = [side.inputs.tolist() for pool in pools.values() for side in pool]
        self.fingerprint = hashlib.sha256(repr(said).encode()).hexdigest()
        encoder, self.tokenizer = open_encoder(ModelRef(name=MINILM))
        self.before = self.similarities(encoder)
        grids = {"pego": LAMBDAS, "lora": RATES}
        self.chosen = {arm: self._choose(arm, grid[: own.settings], directory) for arm, grid in grids.items()}
        self.chosen["lora-decay"] = self.chosen["lora"]

    def _choose(self, arm: str, grid: tuple[float, ...], directory: Path) -> float:
        """The setting that is right most often on held-out texts of the training packages; the first of equals."""
        held = self._data(TUNING_SEED).validation
        assert held is not None

        def right(setting: float) -> float:
            tuned, _ = self._trained(arm, setting, TUNING_SEED, directory / f"{arm}-{setting:g}")
            return float((tuned.predict_scores(held.inputs).argmax(1) == held.labels).mean())

        return max(grid, key=right) if len(grid) > 1 else grid[0]

    def similarities(self, encoder: nn.Module) -> NDArray[np.float64]:
        """Cosine similarities of all pairs of unrelated texts."""
        store = extract_features(
            encoder,
            list(self.unrelated.inputs),
            processor=self.tokenizer,
            modality="text",
            pooling="mean",
            max_length=self.setting.tokens,
            normalize=True,
        )
        rows = np.asarray(store.X, dtype=np.float64)
        found: NDArray[np.float64] = (rows @ rows.T)[np.triu_indices(len(rows), 1)]
        return found

    def _data(self, seed: int) -> TaskData:
        own = self.setting
        train = _joined([_drawn(train, own.per_kind, seed) for train, _ in self.pools.values()])
        held = _joined([_drawn(held, own.held, seed) for _, held in self.pools.values()])
        return TaskData(train, self.test, held, KINDS, KINDS, self.fingerprint)

    def _trained(self, arm: str, setting: float, seed: int, directory: Path) -> tuple[TunedClassifier, AdaptTask]:
        data, recipe = self._data(seed), self._recipe(arm, setting, seed)
        task = AdaptTask(data, data.train, recipe)
        with Run(directory, recipe, resume=directory.exists()) as run:
            return recipe.adapt(task, run), task

    def _recipe(self, arm: str, setting: float, seed: int) -> TunedRecipe:
        optim = OptimSpec(
            lr=RATE if arm == "pego" else setting,
            betas=(0.9, 0.999),
            weight_decay=DECAY if arm == "lora-decay" else 0.0,
            warmup=0.0,
            schedule="constant",
            clip=None,
        )
        shared: dict[str, Any] = {  # Any: fields of several types
            "model": ModelRef(name=MINILM),
            "train": DataRef(name="unused"),
            "test": DataRef(name="unused"),
            "max_tokens": self.setting.tokens,
            "batch_size": self.setting.rows,
            "budget": GivenBudget(steps=self.setting.steps),
            "fit": FitSettings(precision="fp32", log_every=1000),
            "seed": seed,
            "optim": optim,
        }
        if arm == "pego":
            return Pego(r=RANK, n=GROUP, lam=setting, **shared)
        width = RANK * GROUP
        return FineTuning(lora=LoraSpec(r=width, alpha=width, target_modules=("query", "value")), **shared)

    def run(self, arm: str, setting: float, seed: int, directory: Path) -> _Outcome:
        """Train one arm and ask it about other packages."""
        tuned, task = self._trained(arm, setting, seed, directory)
        right = (tuned.predict_scores(self.test.inputs).argmax(1) == self.test.labels).astype(np.float64)
        return _Outcome(tuned, dict(task.figures), right, task.train, self)


@cache
def _experiment(scale: Scale, directory: Path) -> _Experiment:
    return _Experiment(scale, directory)


def _pool(package: str) -> tuple[Examples, Examples]:
    """A package's docstrings of the three kinds: those of its training files, and those of its other files."""
    data = docstring_dataset("kind", [package], per_class=10**6)
    sides = []
    for documents in (data.train.documents, [*data.validation.documents, *data.test.documents]):
        kinds = [
            "method" if doc.meta["kind"] == "function" and "." in doc.meta["object"] else doc.meta["kind"]
            for doc in documents
        ]
        rows = [row for row, kind in enumerate(kinds) if kind in KINDS]
        labels = np.array([KINDS.index(kinds[row]) for row in rows])
        texts = text_array([documents[row].text for row in rows])
        sides.append(Examples(texts, labels, np.full(len(rows), package)))
    return sides[0], sides[1]


def _drawn(examples: Examples, per_kind: int, seed: int) -> Examples:
    return examples.take(sample_shots(examples.labels, per_kind, seed))


def _joined(parts: list[Examples]) -> Examples:
    groups = [part.groups for part in parts if part.groups is not None]
    return Examples(
        np.concatenate([part.inputs for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate(groups),
    )


CLAIM = Claim(
    id="pego",
    statement=(
        "Telling whether a docstring is of a class, a function or a method, learned in six packages: on six others a "
        "group of adapters that is held orthogonal to the weights and to itself is right more often than a plain LoRA "
        "of the same size; its updates overlap half as much with the weights at the same fit; and the encoder keeps "
        "more of the similarities that it saw between unrelated texts."
    ),
    source=(
        "Hu et al., arXiv:2407.15085: with CLIP ViT-B/16, above LoRA, adapters and full fine-tuning in the mean over "
        "five image sets, each domain left out in turn."
    ),
    parts=(
        Part(
            "On other packages the group is right more often than a plain LoRA of rank 16.",
            metric="ood",
            treatment="pego",
            baseline="lora",
            direction="higher",
            margin=0.0,
        ),
        Part(
            "At lambda 1e-3 the normalised overlap of updates and weights is at most half of what it is at 0.",
            metric="overlap",
            treatment="pego-named",
            baseline="pego-0",
            direction="lower",
            margin=HALF,
        ),
        Part(
            "At lambda 1e-3 the training texts are fitted at most 0.01 less well than at 0.",
            metric="fits",
            treatment="pego-named",
            baseline="pego-0",
            direction="higher",
            margin=-CLOSE,
        ),
        Part(
            "The similarities of unrelated texts keep more of their order than under the plain LoRA.",
            metric="retained",
            treatment="pego",
            baseline="lora",
            direction="higher",
            margin=0.0,
        ),
        Part(
            "On other packages the group is right more often than a plain LoRA with weight decay.",
            metric="ood",
            treatment="pego",
            baseline="lora-decay",
            direction="higher",
            margin=0.0,
            decides=False,
        ),
        Part(
            "At lambda 1e-3 the updates of a group overlap less with each other than at 0.",
            metric="between",
            treatment="pego-named",
            baseline="pego-0",
            direction="lower",
            margin=0.0,
            decides=False,
        ),
    ),
    rival="lora",
    preconditions=(f"on other packages the plain LoRA is right between {LEAST} and {MOST} of the time",),
    seeds={"smoke": (100,), "small": (100, 101, 102)},
    measure=measure,
)
