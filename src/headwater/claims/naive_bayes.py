"""Claim of ``naive_bayes``: with few examples for the width, shared variances beat a tuned logistic regression.

Two classes of Gaussian features that are independent given the class, so that every error is computed, not counted.

    fixed     means -a and a, variance 4 in half of the features and 1 in the rest, a such that the Bayes error is .1
    growing   the paper's: means -1 and 1, variance n in half of the features and 1 in the rest; the Bayes error
              vanishes as the n features become more

Sizes of training sets are 2 round(2^(k/2)), and an error is the mean over ``DRAWS`` training sets of a seed, the
smaller ones parts of the larger. The smallest size that reaches an error is found by bisection.

Logistic regression has its C chosen by cross-validation. A pilot on seed 0 set the range of values, so that the best
lie inside it (.001 to .1 with ``fixed``, 1 and less with ``growing``), and nothing else. The paper's C of 1 is measured
beside it.

On features of real texts the paper's finding is not claimed: there, naive Bayes is reported beside its rivals.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from sklearn.linear_model import LogisticRegression

from headwater.adapt.base import HeadRecipe
from headwater.adapt.data import TaskData, docstring_task, encode_task
from headwater.adapt.naive_bayes import NaiveBayes, PooledGaussianNB
from headwater.adapt.references import SklearnHead, cross_validated_logistic_regression
from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.recipe import ModelRef
from headwater.core.rng import numpy_generator
from headwater.core.run import Run
from headwater.modalities.text.labelled import MINILM

__all__ = ["CLAIM"]

Floats = NDArray[np.float64]
Fit = Callable[[Floats, NDArray[np.int64]], Any]  # Any: a fitted linear classifier

DRAWS = 2
STRENGTHS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
FIXED: Mapping[Scale, tuple[int, ...]] = {"small": (100, 200, 400), "smoke": (100, 200, 400)}
GROWING: Mapping[Scale, tuple[int, ...]] = {"small": (40, 100, 200, 400, 800), "smoke": (10, 20)}
MOST: Mapping[Scale, int] = {"small": 4096, "smoke": 16}
SHOTS: Mapping[Scale, Mapping[int, int]] = {"small": {4: 4, 16: 16}, "smoke": {4: 2, 16: 3}}
SMOKE_PACKAGES = ("click", "jinja2", "pygments", "rich")
ARMS: Mapping[str, Fit] = {
    "naive-bayes": lambda X, y: PooledGaussianNB().fit(X, y),
    "logistic-regression": lambda X, y: cross_validated_logistic_regression(X, y, "empirical", STRENGTHS),
    "logistic-regression-c1": lambda X, y: LogisticRegression(C=1.0, max_iter=1000).fit(X, y),
}
HEADS: Mapping[str, tuple[type[HeadRecipe], Mapping[str, Any]]] = {  # Any: recipe fields
    "naive-bayes": (NaiveBayes, {}),
    "logistic-regression": (SklearnHead, {"estimator": "logistic_regression"}),
    "gaussian-nb": (SklearnHead, {"estimator": "gaussian_nb"}),
}


@dataclass(frozen=True)
class Problem:
    """Two classes, equally frequent, whose features are independent Gaussians around ``-mean`` and ``mean``."""

    mean: Floats
    deviation: Floats

    @classmethod
    def fixed(cls, features: int) -> Problem:
        """Bayes error .1 whatever the number of features."""
        deviation = np.where(np.arange(features) < features // 2, 2.0, 1.0)
        return cls(np.full(features, -ndtri(0.1) / np.sqrt((deviation**-2).sum())), deviation)

    @classmethod
    def growing(cls, features: int) -> Problem:
        """The paper's: every feature keeps its strength."""
        return cls(np.ones(features), np.where(np.arange(features) < features // 2, features**0.5, 1.0))

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Floats, NDArray[np.int64]]:
        """``count`` examples, the classes in turn."""
        y = np.arange(count) % 2
        return (2 * y[:, None] - 1) * self.mean + self.deviation * rng.normal(size=(count, len(self.mean))), y

    def error(self, head: Any) -> float:  # Any: a fitted linear classifier
        """The exact error of a linear head on new examples."""
        weight, bias = np.asarray(head.coef_), np.asarray(head.intercept_)
        w, b = (weight[0], bias[0]) if len(weight) == 1 else (weight[1] - weight[0], bias[1] - bias[0])
        spread = np.sqrt(((w * self.deviation) ** 2).sum())
        return float(0.5 * (ndtr(-(w @ self.mean + b) / spread) + ndtr((b - w @ self.mean) / spread)))


def sizes_up_to(most: int) -> list[int]:
    """Sizes of training sets from 4 on, a factor of about the square root of two apart."""
    sizes = [2 * round(2 ** (k / 2)) for k in range(2, 40)]
    return [size for size in sizes if size <= most]


def smallest_size(problem: Problem, fit: Fit, target: float, most: int, seed: int) -> tuple[int, bool]:
    """The first size whose mean error is at most ``target``, and whether there is one; the largest if not."""
    sizes = sizes_up_to(most)
    drawn = [problem.draw(sizes[-1], numpy_generator(seed, "naive bayes", draw)) for draw in range(DRAWS)]

    def reached(size: int) -> bool:
        return float(np.mean([problem.error(fit(X[:size], y[:size])) for X, y in drawn])) <= target

    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(sizes[middle]) else (middle + 1, high)
    return sizes[min(low, len(sizes) - 1)], low < len(sizes)


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Sizes in both simulations, then every head on the nested shots of the seed."""
    arms: dict[str, dict[str, float]] = {arm: {} for arm in ARMS}
    notes: dict[str, str] = {}
    unmet: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few examples: folds without spread are what is meant
        for arm, fit in ARMS.items():
            for features in FIXED[scale]:
                size, reached = smallest_size(Problem.fixed(features), fit, 0.15, MOST[scale], seed)
                arms[arm][f"log2_m@{features}"] = float(np.log2(size))
                notes[f"{arm}/fixed/{features}/seed-{seed}"] = f"{'' if reached else 'more than '}{size}"
                if not reached and arm == "naive-bayes":
                    unmet.append(f"naive Bayes does not reach an error of .15 with {features} features")
            found = [smallest_size(Problem.growing(n), fit, 0.01, MOST[scale], seed) for n in GROWING[scale]]
            logs = np.log(GROWING[scale]), np.log([size for size, _ in found])
            arms[arm]["slope"] = float(np.polyfit(*logs, 1)[0])
            notes[f"{arm}/growing/seed-{seed}"] = ", ".join(f"{'' if ok else '>'}{size}" for size, ok in found)
    arms["no-growth"] = {"slope": 0.0}
    data = _data(scale)
    items = _on_texts(scale, seed, directory, data, arms)
    return Measured(arms, items, data.fingerprint, unmet, notes)


def _on_texts(
    scale: Scale, seed: int, directory: Path, data: TaskData, arms: dict[str, dict[str, float]]
) -> dict[str, dict[str, list[float]]]:
    items: dict[str, dict[str, list[float]]] = {arm: {} for arm in HEADS}
    for arm, (recipe_class, fields) in HEADS.items():
        for nominal, shots in SHOTS[scale].items():
            recipe = recipe_class(model=ModelRef(name=MINILM), shots=shots, seed=seed, **fields)
            home = directory / f"{arm}-{nominal}"
            with Run(home, recipe, resume=home.exists()) as run:
                metrics = recipe.run_on(data, run)
            stored = json.loads((home / "items.json").read_text(encoding="utf-8"))
            items.setdefault(arm, {})[f"accuracy@{nominal}"] = stored["id/accuracy"]["values"]
            of_arm = arms.setdefault(arm, {})
            of_arm[f"accuracy@{nominal}"] = metrics["id/accuracy"]
            of_arm[f"log10_seconds@{nominal}"] = float(np.log10(metrics["cost/fit_seconds"]))
    return items


@cache
def _data(scale: Scale) -> TaskData:
    texts = docstring_task(SMOKE_PACKAGES, per_class=30) if scale == "smoke" else docstring_task()
    return encode_task(texts, ModelRef(name=MINILM), max_tokens=16 if scale == "smoke" else 128)


def _sizes(features: int) -> Part:
    return Part(
        f"With {features} features and a Bayes error of .10, it reaches an error of .15 with less than a third of the "
        "examples that tuned logistic regression takes.",
        metric=f"log2_m@{features}",
        treatment="naive-bayes",
        baseline="logistic-regression",
        direction="lower",
        margin=float(np.log2(3)),
    )


def _accuracy(statement: str, shots: int, baseline: str, margin: float) -> Part:
    return Part(statement, f"accuracy@{shots}", "naive-bayes", baseline, "higher", margin, decides=False)


CLAIM = Claim(
    id="naive_bayes",
    statement=(
        "Where features are independent given the class, naive Bayes with shared variances reaches a low error with a "
        "fraction of the examples of tuned logistic regression; its need hardly grows with the number of features "
        "while that of logistic regression grows nearly in proportion. On features of real texts that is not claimed."
    ),
    source=(
        "Zheng et al., arXiv:2302.02334: naive Bayes approaches its own asymptotic error after O(log n) examples in n "
        "features, logistic regression after O(n); simulation, and features of pretrained vision models."
    ),
    parts=(
        *(_sizes(features) for features in FIXED["small"]),
        Part(
            "With features that keep their strength, its examples grow by less than the power .3 of their number.",
            metric="slope",
            treatment="naive-bayes",
            baseline="no-growth",
            direction="lower",
            margin=-0.3,
        ),
        Part(
            "There, those of tuned logistic regression grow by more than the power .7.",
            metric="slope",
            treatment="logistic-regression",
            baseline="no-growth",
            direction="higher",
            margin=0.7,
        ),
        Part(
            "Those of logistic regression with the paper's C of 1 do as well.",
            metric="slope",
            treatment="logistic-regression-c1",
            baseline="no-growth",
            direction="higher",
            margin=0.7,
            decides=False,
        ),
        *(
            _accuracy(
                f"On features of real texts, with {shots} shots, it is above tuned logistic regression.",
                shots,
                "logistic-regression",
                0.0,
            )
            for shots in (4, 16)
        ),
        _accuracy(
            "On features of real texts, with 4 shots, it is more than 10 points above scikit-learn's naive Bayes, "
            "which has variances for each class.",
            4,
            "gaussian-nb",
            0.1,
        ),
        Part(
            "With 16 shots it is fitted in less than a tenth of the time of logistic regression, its tuning included.",
            metric="log10_seconds@16",
            treatment="naive-bayes",
            baseline="logistic-regression",
            direction="lower",
            margin=1.0,
            decides=False,
        ),
    ),
    rival="logistic-regression",
    preconditions=("naive Bayes reaches an error of .15 in every simulation",),
    seeds={"smoke": (100,), "small": (100, 101, 102, 103, 104)},
    measure=measure,
)
