from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.domain.selection import SubsetPlan, select_subset, subset_plan


def test_equation_lowest_scores_until_the_target_is_reached():
    # By score: 2 (30 tokens), 0 (10), 3 (20), 1 (40). After two 40 tokens, after three 60.
    lengths, scores = [10, 40, 30, 20], [2.0, 4.0, 1.0, 3.0]
    assert select_subset(lengths, scores, 30) == [2]
    assert select_subset(lengths, scores, 31) == [2, 0]
    assert select_subset(lengths, scores, 41) == [2, 0, 3]
    assert select_subset(lengths, scores, 0) == []


def test_equation_shortest_documents_go_first():
    # 5 % of 40 documents is 2: the lengths 1 and 2, which have the best scores.
    lengths = [2, 1, *[10] * 38]
    scores = np.arange(40.0)
    assert select_subset(lengths, scores, 20) == [2, 3]
    assert select_subset(lengths, scores, 20, drop_shortest=0) == [0, 1, 2, 3]
    assert select_subset(lengths[:39], scores[:39], 10) == [0, 2]  # 1.95 documents: rounded down, only the length 1


def test_equation_every_stratum_keeps_its_best():
    lengths, scores = [10] * 5, [1.0, 2.0, 9.0, 8.0, 3.0]
    # b's best is 3, ahead of better documents of a, and it counts toward the target.
    assert select_subset(lengths, scores, 20, stratify=list("aabba")) == [0, 3]
    assert select_subset(lengths, scores, 0, stratify=list("aabba")) == [0, 3]
    assert select_subset(lengths, scores, 30, stratify=list("aabba")) == [0, 1, 3]


def test_equation_a_stratum_of_short_documents_is_not_lost():
    # 2 of 4 are dropped, 0 and 1. b has only them, and keeps the better; a has 2.
    assert select_subset([1, 2, 10, 10], [5.0, 4.0, 7.0, 8.0], 0, stratify="bbaa", drop_shortest=0.5) == [1, 2]
    # 0 is short and best of a, but a has 1, which is not short.
    assert select_subset([1, 10], [1.0, 2.0], 0, stratify="aa", drop_shortest=0.5) == [1]


def test_property_ties_go_to_the_earlier_document():
    assert select_subset([10] * 4, [1.0, 0.0, 0.0, 0.0], 20) == [1, 2]


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_property_monotone_deterministic_and_ranked(data):
    n = data.draw(st.integers(0, 30))
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=n, max_size=n))
    scores = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, -2.0, np.inf]), min_size=n, max_size=n))
    strata = data.draw(st.none() | st.lists(st.sampled_from("abc"), min_size=n, max_size=n))
    small, large = sorted(data.draw(st.tuples(st.integers(0, 300), st.integers(0, 300))))
    chosen, more = (select_subset(lengths, scores, t, stratify=strata, drop_shortest=0.2) for t in (small, large))
    assert set(chosen) <= set(more)
    assert chosen == sorted(set(chosen), key=lambda i: (scores[i], i))
    assert chosen == select_subset(lengths, scores, small, stratify=strata, drop_shortest=0.2)
    if strata is not None:
        assert {strata[i] for i in chosen} == set(strata)
    if len(chosen) < n - int(0.2 * n):
        assert sum(lengths[i] for i in chosen) >= small


def test_degenerate_no_documents_and_a_target_out_of_reach():
    assert select_subset([], [], 100) == []
    assert select_subset([5, 5], [2.0, 1.0], 10**12) == [1, 0]


def test_rejects_bad_input():
    with pytest.raises(ValueError, match=r"scores .* got shape \(3,\) for 2 documents"):
        select_subset([1, 1], [1.0, 2.0, 3.0], 1)
    with pytest.raises(ValueError, match=r"stratify .* got shape \(1,\) for 2 documents"):
        select_subset([1, 1], [1.0, 2.0], 1, stratify=["a"])
    with pytest.raises(ValueError, match="2 scores are NaN, at documents 0, 2"):
        select_subset([1, 1, 1], [np.nan, 2.0, np.nan], 1)
    with pytest.raises(ValueError, match=r"12 scores are NaN, at documents 0, .*, 9, \.\.\.\. Leave"):
        select_subset([1] * 12, [np.nan] * 12, 1)
    with pytest.raises(ValueError, match="num_tokens must be >= 0; got -3 at document 1"):
        select_subset([1, -3], [1.0, 2.0], 1)
    with pytest.raises(ValueError, match="tokens must be >= 0; got -1"):
        select_subset([1], [1.0], -1)
    with pytest.raises(ValueError, match=r"drop_shortest must be in \[0, 1\); got 1"):
        select_subset([1], [1.0], 1, drop_shortest=1)


def test_equation_plan():
    # 1000 tokens, a fifth replay: 800 of the domain, read 4 times: 200 distinct.
    assert subset_plan(1000, 4, 0.2) == SubsetPlan(subset_tokens=200, domain_tokens=800, replay_tokens=200)
    assert subset_plan(1000, 1, 0.0) == SubsetPlan(1000, 1000, 0)
    assert subset_plan(10, 3, 0.0) == SubsetPlan(4, 10, 0)  # 3.33 rounded up


@given(st.integers(10, 10**12), st.floats(1, 50), st.floats(0, 0.9))
def test_property_plan_spends_the_budget(budget, epochs, replay):
    plan = subset_plan(budget, epochs, replay)
    assert plan.domain_tokens + plan.replay_tokens == budget
    assert abs(plan.replay_tokens - replay * budget) <= 0.5 + 1e-6 * budget
    assert plan.domain_tokens <= plan.subset_tokens * epochs * (1 + 1e-12)
    assert plan.domain_tokens > (plan.subset_tokens - 1) * epochs * (1 - 1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 0.0), "budget_tokens must be >= 1; got 0"),
        ((10, 0.5, 0.0), "epochs must be finite and >= 1; got 0.5"),
        ((10, float("nan"), 0.0), "epochs must be finite and >= 1; got nan"),
        ((10, float("inf"), 0.0), "epochs must be finite"),
        ((10, 1, 1.0), r"replay must be in \[0, 1\); got 1.0"),
        ((10, 1, -0.1), "replay must be"),
    ],
)
def test_rejects_bad_plans(arguments, message):
    with pytest.raises(ValueError, match=message):
        subset_plan(*arguments)
