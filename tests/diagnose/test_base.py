"""The family: what a judgement leaves behind, and how judgements are held against outcomes."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from pydantic import Field
from scipy import stats

from headwater.core.recipe import RecipeError, validate
from headwater.core.run import Run, execute
from headwater.diagnose.base import Diagnose, Diagnosis, Question, predictive_validity


class Judge(Diagnose):
    """Says what it is told."""

    id: ClassVar[str] = "judge"
    question: ClassVar[Question] = "coverage"

    score: float | None = Field(default=0.5, ge=0, description="the score")
    interval: tuple[float, float] | None = Field(default=(0.4, 0.7), description="its interval")

    def diagnose(self, run: Run) -> Diagnosis:
        return Diagnosis(
            score=self.score,
            unit="points",
            better="higher",
            interval=self.interval,
            rows=[{"concept": 'a "b", c', "count": 3}, {"concept": "d", "count": 0}],
            curve={"x": (1.0, 2.0), "y": (3.0, 4.0)} if self.score is not None else None,
            advice=["Read more of d: it occurs 0 times."],
            warnings=["half of the concepts never occur"],
            metrics={"zero": 0.5},
            artefacts={"counts": {"d": 0}},
            usage="Each number is a count.",
        )


def judged(directory: Path, **fields: Any):
    return execute(validate(Judge, fields, where="test"), directory)


# -- the family


def test_property_a_run_leaves_its_judgement_rows_curve_and_artefacts(tmp_path: Path) -> None:
    result = judged(tmp_path / "run")
    assert result.metrics.keys() == {"score", "interval_width", "seconds", "items", "zero"}
    assert result.metrics["score"] == 0.5
    assert result.metrics["interval_width"] == pytest.approx(0.3)
    assert result.metrics["items"] == 2
    assert result.notes == {"warning/0": "half of the concepts never occur"}
    diagnosis = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    assert (diagnosis["question"], diagnosis["score"], diagnosis["interval"]) == ("coverage", 0.5, [0.4, 0.7])
    assert (tmp_path / "run" / "rows.csv").read_text() == 'concept,count\n"a ""b"", c",3\nd,0\n'
    assert json.loads((tmp_path / "run" / "curve.json").read_text()) == {"x": [1.0, 2.0], "y": [3.0, 4.0]}
    assert json.loads((tmp_path / "run" / "model" / "counts.json").read_text()) == {"d": 0}
    readme = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "Read more of d" in readme
    assert "Warning: half" in readme
    assert "Each number is a count." in readme


def test_degenerate_no_score_and_no_interval_are_left_out(tmp_path: Path) -> None:
    result = judged(tmp_path / "run", score=None, interval=None)
    assert result.metrics.keys() == {"seconds", "items", "zero"}
    assert not (tmp_path / "run" / "curve.json").exists()
    assert "Score: none." in (tmp_path / "run" / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"bootstrap": 99}, "at least 100 resamples"), ({"confidence": 0.5}, "confidence"), ({"confidence": 1}, "conf")],
)
def test_rejects_intervals_made_from_nothing(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        validate(Judge, fields, where="test")
    assert validate(Judge, {"bootstrap": 0}, where="test").bootstrap == 0


# -- validity


RNG = np.random.default_rng(0)
SCORES, OUTCOMES = RNG.standard_normal(12), RNG.integers(0, 5, 12).astype(float)


@pytest.mark.parametrize("method", ["spearman", "pearson", "kendall"])
def test_oracle_one_group_is_scipys_correlation(method: Any) -> None:
    scipys = {"spearman": stats.spearmanr, "pearson": stats.pearsonr, "kendall": stats.kendalltau}
    found = predictive_validity(SCORES, OUTCOMES, method=method)
    assert found.statistic == pytest.approx(float(scipys[method](SCORES, OUTCOMES).statistic), abs=1e-12)


@pytest.mark.parametrize("method", ["spearman", "pearson", "kendall"])
def test_oracle_permutation_p_is_that_of_all_permutations(method: Any) -> None:
    x, y = np.array([1.0, 2.0, 4.0, 3.0, 9.0]), np.array([0.1, 0.2, 0.3, 0.5, 0.4])
    exact = {"spearman": stats.spearmanr, "pearson": stats.pearsonr, "kendall": stats.kendalltau}[method]
    observed = abs(exact(x, y).statistic)
    every = [abs(exact(x[list(p)], y).statistic) for p in itertools.permutations(range(5))]
    share = np.mean(np.array(every) >= observed - 1e-12)
    # 10,000 draws: a standard error of at most 0.005.
    assert predictive_validity(x, y, method=method).p_permutation == pytest.approx(share, abs=0.02)


def test_equation_groups_are_averaged_and_regret_is_what_the_top_choice_costs() -> None:
    # Group a: order kept, correlation 1, regret 0. Group b: ranks (1 2 3) against (2 1 3): 1 - 6 * 2 / 24 = 0.5; the
    # best score has the best outcome. Group c: reversed, -1; its top choice has outcome 0, the best is 5: regret 5.
    scores = [1, 2, 3, 1, 2, 3, 1, 2, 3]
    outcomes = [10, 20, 30, 2, 1, 3, 5, 4, 0]
    found = predictive_validity(scores, outcomes, ["a"] * 3 + ["b"] * 3 + ["c"] * 3)
    assert found.per_group == pytest.approx({"a": 1.0, "b": 0.5, "c": -1.0})
    assert found.statistic == pytest.approx(0.5 / 3)
    assert found.top1_regret == pytest.approx(5 / 3)


def test_property_what_only_differs_between_groups_counts_for_nothing() -> None:
    groups = ["a"] * 6 + ["b"] * 6
    shift = np.array([0.0] * 6 + [100.0] * 6)
    plain, shifted = (predictive_validity(SCORES + s, OUTCOMES + 3 * s, groups, "pearson") for s in (0 * shift, shift))
    assert shifted.statistic == pytest.approx(plain.statistic, abs=1e-9)
    assert stats.pearsonr(SCORES + shift, OUTCOMES + 3 * shift).statistic > 0.99, "pooled, it would seem near perfect"


def test_property_unrelated_scores_reject_as_often_as_they_should() -> None:
    rng = np.random.default_rng(5)
    p = [predictive_validity(rng.random(6), rng.random(6), method="pearson").p_permutation for _ in range(60)]
    assert np.mean(np.array(p) < 0.05) <= 0.15  # 60 trials at 0.05: more than 9 have a chance of about 0.2 %


def test_property_the_interval_speaks_of_groups() -> None:
    perfect = np.tile([1.0, 2.0, 3.0, 4.0], 8)
    noisy = perfect + np.random.default_rng(2).standard_normal(32)
    groups = [f"g{i // 4}" for i in range(32)]
    found = predictive_validity(noisy, perfect, groups)
    assert -1 <= found.interval[0] < found.statistic < found.interval[1] <= 1
    assert predictive_validity(noisy, perfect).interval == (-1.0, 1.0), "one group says nothing of another"
    again = predictive_validity(noisy, perfect, groups)
    assert (again.interval, again.p_permutation) == (found.interval, found.p_permutation)


def test_degenerate_small_and_constant_groups_are_named_and_left_out() -> None:
    scores = [1, 2, 3, 1, 2, 7, 7, 7]
    outcomes = [1, 2, 3, 1, 2, 1, 2, 3]
    found = predictive_validity(scores, outcomes, ["a", "a", "a", "few", "few", "flat", "flat", "flat"])
    assert list(found.per_group) == ["a"]
    assert found.warnings == [
        "group 'few' has 2 items, fewer than 3; it is left out",
        "group 'flat' is constant; it is left out",
    ]


def test_rejects_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="one length"):
        predictive_validity([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="finite"):
        predictive_validity([1, 2, math.nan], [1, 2, 3])
    with pytest.raises(ValueError, match="spearman, pearson or kendall"):
        predictive_validity([1, 2, 3], [1, 2, 3], method="r2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no group is left"):
        predictive_validity([1, 2], [1, 2])
    with pytest.raises(ValueError, match="there are no items"):
        predictive_validity([], [])
