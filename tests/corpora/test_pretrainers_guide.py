"""A pretrainer's guide, its parts: variants, temporal degradation, the table of differences, the profile, writing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import TypeAdapter
from tests.conftest import sentences
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater.claims.pretrainers_guide import CLAIM, AgeSize, degraded, doctests_of, make_dated_world, prose_of
from headwater.core.claim import judge
from headwater.core.recipe import RecipeError
from headwater.corpora.ablation import AblationAxis, ablation_table, make_variants, year_of
from headwater.corpora.continuations import continuation_scores
from headwater.corpora.curation import StepSpec
from headwater.corpora.profile import PERSONAL, corpus_profile
from headwater.corpora.temporal import temporal_degradation
from headwater.modalities.text.conditions import condition
from headwater.modalities.text.docs import Document

YEARS = [2013, 2016, 2019, 2022]


def axis(kind: str, *values: Any, **fields: Any) -> AblationAxis:
    return AblationAxis(kind=kind, values=values, **fields)


def keeps(steps: Sequence[Any], meta: dict[str, Any]) -> bool:
    return all(bool(condition(step.when)(meta)) for step in steps)


# -- temporal degradation


def test_equation_the_slope_by_hand() -> None:
    # Asked of year 6: D is 1 - 0.4 at distance 6, 1 - 0.6 at 3, and 1 - 0.7 at 3 on the other side.
    # Mean distance 4, mean D 13/30: slope = (2 * (0.6 - 13/30) - (0.4 - 13/30) - (0.3 - 13/30)) / (4 + 1 + 1) = 0.5/6.
    found = temporal_degradation([[0.4], [0.6], [1.0], [0.7]], [0, 3, 6, 9], [6])
    assert found.slope == pytest.approx(0.5 / 6)
    assert found.slope_old == pytest.approx((0.6 - 0.4) / 3)
    assert found.slope_new is None, "one distance on that side"
    assert (found.n, found.ci) == (3, None)


def test_oracle_two_points_a_year_on_either_side_and_nothing_on_a_constant() -> None:
    falling = [[50 - 2 * abs(p - e) for e in YEARS] for p in YEARS]
    found = temporal_degradation(falling, YEARS, YEARS)
    assert [found.slope, found.slope_old, found.slope_new] == pytest.approx([2, 2, 2], abs=1e-9)
    assert found.n == 12
    flat = temporal_degradation(np.full((4, 4), 50.0), YEARS, YEARS)
    assert [flat.slope, flat.slope_old, flat.slope_new] == [0, 0, 0]


def test_oracle_the_slope_is_polyfits_with_the_earlier_of_two_nearest_years() -> None:
    rng = np.random.default_rng(0)
    pre, asked = [2019, 2013, 2016], [2012, 2014.5, 2017, 2030]
    S = rng.normal(size=(3, 4))
    best = {2012: 2013, 2014.5: 2013, 2017: 2016, 2030: 2019}  # 2014.5 lies between 2013 and 2016
    x, y, old = [], [], []
    for i, p in enumerate(pre):
        for j, e in enumerate(asked):
            if p != best[e]:
                x.append(abs(p - e))
                y.append(S[pre.index(best[e]), j] - S[i, j])
                old.append(p < e)
    found = temporal_degradation(S, pre, asked)
    assert found.slope == pytest.approx(np.polyfit(x, y, 1)[0])
    side = np.array(old)
    assert found.slope_old == pytest.approx(np.polyfit(np.array(x)[side], np.array(y)[side], 1)[0])
    assert found.slope_new == pytest.approx(np.polyfit(np.array(x)[~side], np.array(y)[~side], 1)[0])


def test_property_the_interval_is_paired_over_items() -> None:
    rng = np.random.default_rng(1)
    means = np.array([[50.0 - 2 * abs(p - e) for e in YEARS] for p in YEARS])
    shared = [rng.normal(size=60) * 20 for _ in YEARS]
    shared = [noise - noise.mean() for noise in shared]
    same = [means[:, [j]] + noise for j, noise in enumerate(shared)]
    found = temporal_degradation(means, YEARS, YEARS, items=same)
    assert found.ci == pytest.approx((2, 2), abs=1e-9), "what all models share of an item cancels"
    apart = [m + (n := rng.normal(size=(4, 60)) * 5) - n.mean(axis=1, keepdims=True) for m in means.T[:, :, None]]
    wide = temporal_degradation(means, YEARS, YEARS, items=apart)
    assert wide.ci is not None
    assert wide.ci[0] < 2 < wide.ci[1]
    assert 0.1 < wide.ci[1] - wide.ci[0] < 2
    assert temporal_degradation(means, YEARS, YEARS, items=apart).ci == wide.ci
    assert temporal_degradation(means, YEARS, YEARS, items=apart, seed=1).ci != wide.ci


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([[1.0]], [1, 2], [1]), r"must be \(2, 1\), pretraining by evaluation; got \(1, 1\)"),
        (([[1.0], [2.0]], [1, 1], [1]), "all different"),
        (([[math.nan], [2.0]], [1, 2], [1]), "1 scores that are not finite"),
        (([[1.0], [2.0]], [1, 2], [1]), r"at least two distances; got \[1.0\] years"),
        (([[1.0], [2.0], [3.0]], [1, 2, 4], [1], 50), "n_boot must be at least 100"),
        (([[1.0], [2.0], [3.0]], [1, 2, 4], [1], 100, []), "one array for each of 1 evaluation sets; got 0"),
        (([[1.0], [2.0], [3.0]], [1, 2, 4], [1], 100, [[1.0, 2.0]]), r"items\[0\] must be \(3, items\)"),
        (([[1.0], [2.0], [3.0]], [1, 2, 4], [1], 100, [[[1.0], [2.0], [4.0]]]), r"the means of items\[0\]"),
    ],
)
def test_rejects_scores_that_have_no_slope(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        temporal_degradation(*arguments)


# -- variants


def test_equation_each_variant_moves_one_decision() -> None:
    steps = TypeAdapter(list[StepSpec]).validate_python([{"kind": "sample", "rate": 0.5}])
    axes = [
        axis("age", 2013, [2016, 2018]),
        axis("quality", 0.975, 1.0),
        axis("toxicity", 0.3, inverse=True, field="rude"),
        axis("domain", "books", ["web a", "web b"]),
        axis("steps", [{"kind": "dedup"}]),
    ]
    variants = make_variants(steps, axes)
    assert all(variant[0] == steps[0] for variant in variants.values())
    assert {name: [getattr(s, "when", s.kind) for s in of[1:]] for name, of in variants.items()} == {
        "base": [],
        "age-2013": ["year in [2013]"],
        "age-2016-2018": ["year in [2016, 2017, 2018]"],
        "quality-0.975": ["quality >= 0.025"],
        "quality-1": ["quality >= 0.0"],
        "toxicity-0.3-inverse": ["not (rude <= 0.3)"],
        "without-books": ["domain not in ['books']"],
        "without-web_a-web_b": ["domain not in ['web a', 'web b']"],
        "steps-dedup": ["dedup"],
    }


def test_property_crossing_holds_every_combination_of_axes_once() -> None:
    axes = [axis("age", 1, 2), axis("quality", 0.9, 0.8, 0.7)]
    crossed = make_variants((), axes, cross=True)
    assert len(crossed) == 3 * 4
    assert set(make_variants((), axes)) < set(crossed)
    assert [step.when for step in crossed["age-2+quality-0.8"]] == ["year in [2]", "quality >= 0.2"]  # type: ignore[union-attr]


META = st.fixed_dictionaries(
    {
        "year": st.sampled_from([None, 2012, 2013, 2014]),
        "quality": st.floats(0, 1),
        "toxicity": st.floats(0, 1),
        "domain": st.sampled_from(["books", "web"]),
    }
)


@settings(max_examples=200, deadline=None)
@given(META, st.sampled_from([("age", 2013), ("quality", 0.7), ("toxicity", 0.3), ("domain", "web")]))
def test_property_a_variant_and_its_inverse_part_the_base(meta: dict[str, Any], what: tuple[str, Any]) -> None:
    (_, direct), (_, inverse) = (
        list(make_variants((), [axis(*what, inverse=side)]).items())[1] for side in (False, True)
    )
    assert keeps(direct, meta) != keeps(inverse, meta)


@settings(max_examples=200, deadline=None)
@given(META, st.floats(0.01, 1), st.floats(0.01, 1))
def test_property_a_higher_threshold_keeps_more_and_one_keeps_all(meta: dict[str, Any], a: float, b: float) -> None:
    for kind in ("quality", "toxicity"):
        low, high, every = (next(iter(axis(kind, t).named().values())) for t in (*sorted((a, b)), 1.0))
        assert keeps(low, meta) <= keeps(high, meta) <= keeps(every, meta)
        assert keeps(every, meta)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "age", "values": ["old"]}, r"a year, or \[first, last\]; got 'old'"),
        ({"kind": "age", "values": [2013.5]}, "got 2013.5"),
        ({"kind": "age", "values": [[2016, 2013]]}, r"got \[2016.0, 2013.0\]"),
        ({"kind": "quality", "values": [0]}, r"threshold must be in \(0, 1\]; got 0.0"),
        ({"kind": "toxicity", "values": ["high"]}, "threshold must be"),
        ({"kind": "quality", "values": [1.0], "inverse": True}, "its inverse keeps nothing"),
        ({"kind": "domain", "values": [3]}, "a domain's name, or a list of such; got 3.0"),
        ({"kind": "domain", "values": [[]]}, r"got \[\]"),
        ({"kind": "steps", "values": ["dedup"]}, "a list of steps such as"),
        ({"kind": "steps", "values": [[{"kind": "dedup"}]], "inverse": True}, "neither an inverse nor a field"),
        ({"kind": "quality", "values": []}, "values"),
    ],
)
def test_rejects_axes_that_decide_nothing(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        AblationAxis(**fields)


def test_rejects_two_variants_of_one_name() -> None:
    with pytest.raises(ValueError, match=r"two variants are called 'quality-0\.9'"):
        make_variants((), [axis("quality", 0.9), axis("quality", 0.9, field="other")])
    with pytest.raises(ValueError, match="two variants are called 'age-3'"):
        make_variants((), [axis("age", 3, 3)])


@pytest.mark.parametrize(
    ("value", "year"),
    [
        (2019, 2019),
        (0, 0),
        (2019.0, 2019),
        ("2019", 2019),
        (" 2019-05 ", 2019),
        ("2019-05-01", 2019),
        ("2019-05-01T10:00:00Z", 2019),
        ("13-Jun-2000", 2000),
        ("June 13, 2000", 2000),
        ("Tue, 15 Nov 1994 08:12:31 GMT", 1994),
        (2019.5, None),
        (True, None),
        ("May 2019", None),
        ("20190", None),
        ("", None),
        (None, None),
        (math.nan, None),
        ([2019], None),
    ],
)
def test_degenerate_dates_that_are_none_have_no_year(value: Any, year: int | None) -> None:
    assert year_of(value) == year


# -- tables


def test_equation_differences_to_base_are_paired() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=40) * 10
    base, better = noise, noise - 0.5
    table = ablation_table({"base": {"bpb": base}, "age-3": {"bpb": better}})
    row = table.iloc[0]
    assert len(table) == 1
    assert (row["variant"], row["metric"], row["items"]) == ("age-3", "bpb", 40)
    assert row["difference"] == pytest.approx(-0.5)
    assert row["value"] - row["base"] == pytest.approx(-0.5)
    assert (row["low"], row["high"]) == pytest.approx((-0.5, -0.5))
    unpaired = ablation_table({"base": {"bpb": base}, "age-3": {"bpb": rng.permutation(better)}}).iloc[0]
    assert unpaired["low"] < -1.5 < 0.5 < unpaired["high"]


def test_rejects_results_without_a_base_or_with_other_figures() -> None:
    with pytest.raises(ValueError, match=r"need 'base' to compare with; got \['a'\]"):
        ablation_table({"a": {"bpb": [1.0, 2.0]}})
    with pytest.raises(ValueError, match="variant 'a' has 'exact' and the base has"):
        ablation_table({"base": {"bpb": [1.0, 2.0]}, "a": {"exact": [1.0, 2.0]}})
    with pytest.raises(ValueError, match="same"):
        ablation_table({"base": {"bpb": [1.0, 2.0]}, "a": {"bpb": [1.0]}})


def test_equation_the_profile_of_three_documents() -> None:
    documents = [
        Document("1", "one two two é", {"domain": "b", "quality": 0.0}),
        Document("2", "mail me@there.org", {"domain": "b", "quality": 1.0}),
        Document("3", "two", {}),
    ]
    found = corpus_profile(iter(documents), quantiles=(0.5,))
    assert list(found.index) == ["", "b"]
    own = found.loc["b"]
    # 13 and 17 characters, one of which takes two bytes; words: one two two é mail me there org, of which 7 differ.
    assert dict(own[["documents", "bytes", "mean_length"]]) == {"documents": 2, "bytes": 31, "mean_length": 15}
    assert own["type_token_ratio"] == pytest.approx(7 / 8)
    assert own["non_ascii"] == pytest.approx(1 / 30)
    assert own["personal"] == 0.5
    assert own["quality_q0.5"] == 0.5
    assert np.isnan(found.loc["", "quality_q0.5"])
    assert found["toxicity_q0.5"].isna().all()


def test_degenerate_an_empty_corpus_has_an_empty_profile() -> None:
    assert isinstance(corpus_profile([]), pd.DataFrame)
    assert not len(corpus_profile([]))
    assert corpus_profile([Document("1", "")]).loc["", "type_token_ratio"] == 0


@pytest.mark.parametrize(
    ("text", "personal"),
    [
        ("write to a.b+c@some-host.co.uk!", True),
        ("ping 192.168.0.254 now", True),
        ("call (555) 123-4567", True),
        ("call +1 555-123-4567.", True),
        ("version 1.2.3.4.5", False),
        ("at 300.1.1.1", False),
        ("a @decorator and x@ y", False),
        ("the number 5551234567890", False),
        ("1 2 3 4567", False),
    ],
)
def test_equation_what_counts_as_personal(text: str, personal: bool) -> None:
    assert (PERSONAL.search(text) is not None) is personal


# -- writing


class _Seen:
    """A scorer that remembers what it was given."""

    fingerprint = "length"

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        self.texts += texts
        return np.array([len(text) for text in texts], dtype=np.float64)


def test_oracle_continuations_are_the_models_own(tiny_causal: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_causal)
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(10)  # so that what stands before decides
    prompts = [text[:20] for text in sentences("general", 3)]
    seen = _Seen()
    scores = continuation_scores(model, tokenizer, prompts, seen, n=2, max_tokens=6, top_p=1e-9)
    for i, prompt in enumerate(prompts):  # so small a nucleus is greedy
        ids = [tokenizer.eos_token_id, *tokenizer(prompt)["input_ids"]]
        begin = len(ids)
        while len(ids) < begin + 6 and (len(ids) == begin or ids[-1] != tokenizer.eos_token_id):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        written = tokenizer.decode(ids[begin:], skip_special_tokens=True)
        assert seen.texts[2 * i : 2 * i + 2] == [written] * 2
        assert scores[i].tolist() == [len(written)] * 2
    wide = _Seen()
    drawn, again = (
        continuation_scores(model, tokenizer, prompts, scorer, n=4, max_tokens=6) for scorer in (wide, _Seen())
    )
    assert np.array_equal(drawn, again)
    assert len(set(wide.texts[:4])) > 1


# -- the claim's worlds


def test_property_a_value_survives_as_often_as_said(tmp_path: Path) -> None:
    world = make_dated_world(AgeSize(300, 40, 16, 1, 2, 1, 1), 3, tmp_path)
    for distance in (1, 3, 6):
        same = np.mean([world.facts[y] == world.facts[y + distance] for y in range(9 - distance + 1)])
        # A value that changed may have come back, by 1/39 of the changes at most.
        assert 0.85**distance - 0.025 < same < 0.85**distance + 0.045


def test_equation_the_parts_of_a_docstring() -> None:
    text = (
        "Return the sum of all that is given, one after another, until the end of it.\n\nParameters\n----------\n"
        "x : int\n    What to add up, of which there may be any number, in any order, as long as it ends.\n\n"
        ">>> add(1, 2)\n3\n>>> add(2, 3)\n5"
    )
    assert prose_of(text) == text.split("\n\n")[0]
    assert doctests_of(text) == text.split("\n\n")[-1]
    kinds = {degraded(text, np.random.default_rng(seed)) for seed in range(20)}
    assert any(kind.startswith("00000000  52 65 74") for kind in kinds)
    assert any(sorted(kind.splitlines()) == sorted(text.splitlines()) and kind != text for kind in kinds)


def test_property_the_experiment_runs_and_measures_every_part(tmp_path: Path) -> None:
    measured = CLAIM.measure("smoke", 100, tmp_path / "claim" / "seed" / "hash")
    verdict = judge(CLAIM, "smoke", {100: measured})
    assert len(verdict["parts"]) == 4
    assert verdict["verdict"] == "inconclusive"
    assert measured.arms["filtered"]["documents"] < measured.arms["unfiltered"]["documents"]
    right = np.mean([measured.arms[f"year {year}"]["right answers"] for year in (3, 9)])
    assert measured.arms["year beside"]["right answers"] == pytest.approx(right)
