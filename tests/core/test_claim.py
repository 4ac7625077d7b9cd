"""Verdicts: what holds, what does not, and what cannot be said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from headwater.core import claim as module
from headwater.core.claim import Claim, ClaimError, Measured, Part, judge, load_claim, reproduce


def claim(*parts: Part, measure: Any = None) -> Claim:
    return Claim(
        id="stability_gap",
        statement="A beats B.",
        source="nobody, arXiv:0000.00000",
        parts=parts or (part(),),
        rival="b",
        preconditions=("always",),
        seeds={"smoke": (1,), "small": (1, 2, 3, 4)},
        measure=measure,
    )


def part(**changes: Any) -> Part:
    fields = {
        "statement": "a > b",
        "metric": "m",
        "treatment": "a",
        "baseline": "b",
        "direction": "higher",
        "margin": 0.0,
    }
    return Part(**{**fields, **changes})  # type: ignore[arg-type]


def measured(differences: list[float], **more: Any) -> Mapping[int, Measured]:
    return {
        seed: Measured({"a": {"m": 1.0 + d}, "b": {"m": 1.0}}, **more) for seed, d in enumerate(differences, start=1)
    }


def test_equation_the_interval_is_the_paired_t_interval_for_few_seeds() -> None:
    differences = [0.1, 0.2, 0.3, 0.4]
    found = judge(claim(), "small", measured(differences))
    half = stats.t.ppf(0.975, 3) * np.std(differences, ddof=1) / 2  # sqrt(4)
    assert found["difference"] == pytest.approx(0.25)
    assert found["ci95"] == pytest.approx([0.25 - half, 0.25 + half])
    assert found["verdict"] == "holds"


@pytest.mark.parametrize(
    ("differences", "changes", "verdict"),
    [
        ([0.10, 0.11, 0.09], {}, "holds"),
        ([-0.10, -0.11, -0.09], {}, "does not hold"),
        ([0.10, -0.11, 0.05], {}, "inconclusive"),
        ([0.10, 0.11, 0.09], {"margin": 0.2}, "does not hold"),
        ([0.10, 0.11, 0.09], {"margin": 0.1}, "inconclusive"),
        ([-0.10, -0.11, -0.09], {"direction": "lower"}, "holds"),
        ([-0.001, 0.001, 0.0], {"margin": -0.01}, "holds"),
        ([-0.03, -0.031, -0.029], {"margin": -0.01}, "does not hold"),
    ],
)
def test_property_verdicts_follow_the_interval(differences: list[float], changes: dict[str, Any], verdict: str) -> None:
    assert judge(claim(part(**changes)), "small", measured(differences))["verdict"] == verdict


def test_property_every_deciding_part_counts_and_others_do_not() -> None:
    good, bad = part(), part(margin=5.0)
    seeds = measured([0.1, 0.11, 0.09])
    assert judge(claim(good, bad), "small", seeds)["verdict"] == "does not hold"
    assert judge(claim(good, part(margin=5.0, decides=False)), "small", seeds)["verdict"] == "holds"


def test_property_the_headline_is_the_part_that_the_verdict_rests_on() -> None:
    found = judge(claim(part(), part(margin=5.0, statement="too much")), "small", measured([0.1, 0.11, 0.09]))
    assert (found["verdict"], found["margin"]) == ("does not hold", 5.0)
    assert judge(claim(part(), part(margin=0.01)), "small", measured([0.1, 0.11, 0.09]))["margin"] == 0.0


def test_degenerate_too_few_seeds_smoke_and_unmet_preconditions_are_inconclusive() -> None:
    clear = [0.1, 0.11, 0.09]
    assert judge(claim(), "small", measured(clear[:2]))["verdict"] == "inconclusive"
    one = judge(claim(), "small", measured(clear[:1]))
    assert one["ci95"] is None
    assert json.loads(json.dumps(one, allow_nan=False))["verdict"] == "inconclusive"
    assert judge(claim(), "smoke", measured(clear))["verdict"] == "inconclusive"
    assert judge(claim(), "small", measured(clear, unmet=["base accuracy .2, wanted .8"]))["verdict"] == "inconclusive"


def test_property_items_widen_or_narrow_the_interval_of_few_seeds() -> None:
    rng = np.random.default_rng(0)
    items = rng.normal(0.2, 0.01, size=50)
    seeds = {
        s: Measured(
            {"a": {"m": float(items.mean())}, "b": {"m": 0.0}},
            items={"a": {"m": items.tolist()}, "b": {"m": [0.0] * 50}},
        )
        for s in (1, 2, 3)
    }
    found = judge(claim(), "small", seeds)
    assert found["difference"] == pytest.approx(items.mean())
    assert found["ci95"][0] > 0.19


def test_rejects_measurements_that_do_not_fit() -> None:
    with pytest.raises(ClaimError, match="did not measure 'other' for arm 'a'"):
        judge(claim(part(metric="other")), "small", measured([0.1, 0.2, 0.3]))


def test_property_reproduce_stores_each_seed_and_measures_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def measure(scale: str, seed: int, directory: Path) -> Measured:
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return Measured({"a": {"m": 1.0 + seed / 10}, "b": {"m": 1.0}}, data_fingerprint="f")

    monkeypatch.setattr(module, "load_claim", lambda id: claim(measure=measure))
    with pytest.raises(KeyboardInterrupt):
        reproduce("stability_gap", tmp_path)
    verdict = reproduce("stability_gap", tmp_path)
    assert calls == [1, 2, 3, 3, 4]
    assert json.loads((tmp_path / "verdict.json").read_text()) == verdict
    needed = "id statement metric direction margin treatment baseline per_seed difference ci95 verdict seconds"
    assert set(needed.split()) | {"data_fingerprint", "version"} <= set(verdict)
    assert [row["seed"] for row in verdict["per_seed"]] == [1, 2, 3, 4]
    assert reproduce("stability_gap", tmp_path, seeds=6)["seeds"] == [1, 2, 3, 4, 5, 6]


def test_rejects_unknown_scales_references_and_no_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClaimError, match="it has no claim of its own"):
        load_claim("plain")
    with pytest.raises(ClaimError, match="has no scale 'huge'"):
        reproduce("stability_gap", tmp_path, scale="huge")
    with pytest.raises(ClaimError, match="at least one seed"):
        reproduce("stability_gap", tmp_path, seeds=0)
