"""Judgements: data or runs that exist already -> a score, its interval, advice, and a way to check the judgement later.

Every other stage spends a budget and returns a model; this one returns a `Diagnosis`. The family writes it down; a
method adds its fields and ``diagnose``.

There is no ``FAMILY`` for comparisons: two methods of the stage answer different questions in different units, and no
leaderboard ranks a mixture ratio against an alignment score. Judgements on one question are compared by what they
foretold: `predictive_validity`.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, field_validator
from scipy import stats as scipy_stats

from headwater.core.budget import Cost
from headwater.core.cache import atomic_write_text
from headwater.core.recipe import Metrics, Recipe
from headwater.core.rng import numpy_generator
from headwater.core.run import check_name
from headwater.core.stats import paired_bootstrap

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["Diagnose", "Diagnosis", "Question", "Validity", "predictive_validity"]

Floats = NDArray[np.float64]
Question = Literal["transfer", "coverage", "alignment", "mixture", "composition", "catalogue"]

PERMUTATIONS = 10_000
FEWEST_ITEMS = 3
_CHUNK = 1 << 21  # numbers permuted at a time


@dataclass(frozen=True)
class Diagnosis:
    """A judgement.

    Attributes:
        score: the figure, or None where the input supports none.
        unit: of the score.
        better: which way the score is good; ``none`` where it is a choice and not a quality.
        interval: of the score, at the recipe's confidence; None where none was asked for or none can be given.
        rows: one per item judged, JSON data with the same keys in each.
        curve: ``x``, ``y`` and, with an interval, ``lo`` and ``hi``, all of one length.
        advice: sentences, each with the figure that it rests on.
        warnings: assumptions that fail on this input.
        metrics: further figures by name, finite.
        artefacts: what else is left, JSON data by name; each becomes ``model/<name>.json``.
        usage: how to use the artefacts without Headwater, for their README, in Markdown.
        cost: what it took.
    """

    score: float | None
    unit: str
    better: Literal["higher", "lower", "none"]
    interval: tuple[float, float] | None
    rows: Sequence[Mapping[str, Any]]  # Any: JSON data
    curve: Mapping[str, Sequence[float]] | None
    advice: Sequence[str]
    warnings: Sequence[str]
    metrics: Mapping[str, float] = field(default_factory=dict)
    artefacts: Mapping[str, Any] = field(default_factory=dict)  # Any: JSON data
    usage: str = ""
    cost: Cost = field(default_factory=Cost)


class Diagnose(Recipe):
    """Family of the stage ``diagnose``: one hook, ``diagnose``."""

    question: ClassVar[Question]
    """What is judged; judgements are comparable only where it is equal."""

    bootstrap: int = Field(default=1000, ge=0, description="resamples behind an interval, at least 100; 0: no interval")
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="of the intervals")

    @field_validator("bootstrap")
    @classmethod
    def _enough(cls, value: int) -> int:
        if 0 < value < 100:
            raise ValueError(f"an interval needs at least 100 resamples; got {value}. 0 gives no interval")
        return value

    @abstractmethod
    def diagnose(self, run: Run) -> Diagnosis:
        """Read, compute, judge. Trains nothing unless the method's paper does."""

    def run(self, run: Run) -> Metrics:
        """Judge, and write ``diagnosis.json``, ``rows.csv``, ``curve.json`` and ``model/`` with the artefacts."""
        begin = time.perf_counter()
        found = self.diagnose(run)
        judged: dict[str, Any] = {"question": self.question, **asdict(found)}  # Any: JSON data
        for kept_elsewhere in ("rows", "curve", "artefacts", "usage", "cost"):
            del judged[kept_elsewhere]
        run.write_json("diagnosis.json", judged)
        atomic_write_text(run.path("rows.csv"), _csv(found.rows))
        if found.curve is not None:
            run.write_json("curve.json", {name: list(values) for name, values in found.curve.items()})
        self._write_artefacts(found, run)
        run.notes.update({f"warning/{number}": words for number, words in enumerate(found.warnings)})
        run.cost = found.cost.to_dict()
        metrics: Metrics = {**found.metrics, "items": float(len(found.rows)), "seconds": time.perf_counter() - begin}
        if found.score is not None:
            metrics["score"] = found.score
        if found.interval is not None:
            metrics["interval_width"] = found.interval[1] - found.interval[0]
        return metrics

    def _write_artefacts(self, found: Diagnosis, run: Run) -> None:
        for name, data in found.artefacts.items():
            atomic_write_text(run.model / f"{check_name(name)}.json", json.dumps(data, indent=2) + "\n")
        score = "none" if found.score is None else f"{found.score:.6g} {found.unit}".rstrip()
        lines = [f"# {self.id}", "", f"Question: {self.question}. Score: {score}.", ""]
        lines += [f"- {sentence}" for sentence in (*found.advice, *(f"Warning: {words}" for words in found.warnings))]
        lines += ["", "Beside this directory: `diagnosis.json`, `rows.csv`.", "", found.usage]
        atomic_write_text(run.model / "README.md", "\n".join(lines).rstrip() + "\n")


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:  # Any: JSON data
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


@dataclass(frozen=True)
class Validity:
    """How well scores foretold outcomes.

    Attributes:
        statistic: mean over the groups of the correlation within each.
        interval: 95 % interval over new groups, within [-1, 1]; all of it for a single group.
        p_permutation: two-sided, of the hypothesis that scores are unrelated to outcomes within groups.
        top1_regret: mean over the groups of the best outcome minus that of the item with the best score.
        per_group: the correlation within each group.
        warnings: groups that were left out, and why.
    """

    statistic: float
    interval: tuple[float, float]
    p_permutation: float
    top1_regret: float
    per_group: Mapping[str, float]
    warnings: Sequence[str]


def predictive_validity(
    scores: ArrayLike,
    outcomes: ArrayLike,
    groups: Sequence[str] | None = None,
    method: Literal["spearman", "pearson", "kendall"] = "spearman",
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Validity:
    """Compare judgements with what happened, within groups that share a scale (a downstream target, a seed).

    Args:
        scores: ``(n,)``, higher foretells better. Turn the sign of a score that is better when lower.
        outcomes: ``(n,)``, higher is better.
        groups: ``(n,)`` names; one group by default. Groups of fewer than 3 items, or with constant scores or outcomes,
            are left out and named.
        method: of correlation; Kendall's is tau-b.
        bootstrap: resamples of the groups, >= 100.
        seed: of the resamples and of the 10,000 permutations; ``p = (1 + k) / (1 + 10,000)``.

    Raises:
        ValueError: lengths differ, a value is not finite, an unknown method, or no group is left.
    """
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    names = np.asarray(["all"] * x.size if groups is None else list(groups), dtype=str)
    if x.ndim != 1 or x.shape != y.shape or x.shape != names.shape:
        raise ValueError(
            f"scores, outcomes and groups must have one length; got {x.shape}, {y.shape} and {names.shape}."
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("scores and outcomes must be finite.")
    if method not in ("spearman", "pearson", "kendall"):
        raise ValueError(f"method must be spearman, pearson or kendall; got {method!r}.")
    per_group: dict[str, float] = {}
    warnings: list[str] = []
    regrets: list[float] = []
    permuted = np.zeros(PERMUTATIONS)
    for name in sorted(set(names.tolist())):
        s, o = x[names == name], y[names == name]
        if len(s) < FEWEST_ITEMS or np.ptp(s) == 0 or np.ptp(o) == 0:
            why = f"has {len(s)} items, fewer than {FEWEST_ITEMS}" if len(s) < FEWEST_ITEMS else "is constant"
            warnings.append(f"group {name!r} {why}; it is left out")
            continue
        target = _centred(o[None], method)[0]
        per_group[name] = float(_cosines(_centred(s[None], method), target)[0])
        permuted += _permuted(s, target, method, numpy_generator(seed, "permutation", name))
        regrets.append(float(o.max() - o[s == s.max()].mean()))
    if not per_group:
        raise ValueError(f"no group is left to correlate in: {'; '.join(warnings) or 'there are no items'}.")
    values = np.array(list(per_group.values()))
    spread = paired_bootstrap(values, np.zeros_like(values), draws=bootstrap, seed=seed)
    beyond = int((np.abs(permuted / len(values)) >= abs(values.mean()) - 1e-12).sum())
    return Validity(
        float(values.mean()),
        (max(-1.0, spread.low), min(1.0, spread.high)),
        (1 + beyond) / (1 + PERMUTATIONS),
        math.fsum(regrets) / len(regrets),
        per_group,
        warnings,
    )


def _centred(rows: Floats, method: str) -> Floats:
    """Vectors ``(rows, m)`` whose cosine is the correlation: centred values, centred ranks, or signs of all pairs."""
    if method == "kendall":
        i, j = np.triu_indices(rows.shape[1], 1)
        signs: Floats = np.sign(rows[:, i] - rows[:, j])
        return signs
    values = scipy_stats.rankdata(rows, axis=1) if method == "spearman" else rows
    centred: Floats = values - values.mean(axis=1, keepdims=True)
    return centred


def _cosines(rows: Floats, target: Floats) -> Floats:
    cosines: Floats = rows @ target / np.sqrt((rows**2).sum(axis=1) * (target @ target))
    return cosines


def _permuted(scores: Floats, target: Floats, method: str, rng: np.random.Generator) -> Floats:
    """The correlation under each of the permutations, ``(PERMUTATIONS,)``."""
    size = max(1, _CHUNK // target.size)
    chunks = [min(size, PERMUTATIONS - start) for start in range(0, PERMUTATIONS, size)]
    shuffled = (rng.permuted(np.tile(scores, (count, 1)), axis=1) for count in chunks)
    return np.concatenate([_cosines(_centred(rows, method), target) for rows in shuffled])
