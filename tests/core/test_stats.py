from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats as scipy_stats

from headwater.core.stats import (
    _crossed_draws,
    aurc,
    bootstrap_interval,
    calibration_error,
    correlation,
    expected_calibration_error,
    holm,
    paired_bootstrap,
    pareto_front,
    risk_coverage,
    smallest_detectable,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_oracle_bootstrap_interval_matches_scipy_percentile(rng):
    values = rng.exponential(size=60)
    ours = bootstrap_interval(values, np.median, draws=20_000)
    theirs = scipy_stats.bootstrap((values,), np.median, n_resamples=20_000, method="percentile", rng=1)
    # Two Monte Carlo runs; an end has a standard error of about 1 % of the width here.
    width = ours.high - ours.low
    assert ours.estimate == np.median(values)
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.08 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.08 * width)


def test_property_the_seed_decides_the_draws(rng):
    values = rng.normal(size=3000)  # 10,000 draws of 3,000 do not fit in one chunk
    first, again, other = (bootstrap_interval(values, seed=s) for s in (0, 0, 1))
    assert first == again != other
    assert first.high - first.low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(3000), rel=0.05)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_oracle_few_seeds_get_the_paired_t_interval(n, rng):
    a, b = rng.normal(0.3, 1, n), rng.normal(size=n)
    ours = paired_bootstrap(a, b, confidence=0.9)
    theirs = scipy_stats.ttest_rel(a, b)
    interval = theirs.confidence_interval(0.9)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-9)
    assert ours.mean == pytest.approx((a - b).mean())


def test_oracle_many_units_agree_with_the_t_test(rng):
    a, b = rng.normal(0.1, 1, 2000), rng.normal(size=2000)
    ours, theirs = paired_bootstrap(a, b), scipy_stats.ttest_rel(a, b)
    interval = theirs.confidence_interval()
    width = interval.high - interval.low
    assert ours.low == pytest.approx(interval.low, abs=0.05 * width)
    assert ours.high == pytest.approx(interval.high, abs=0.05 * width)
    assert ours.low <= interval.low + 1e-12
    assert ours.high >= interval.high - 1e-12


def test_oracle_crossed_draws_match_brute_force_enumeration():
    # 2 seeds x 3 items: all 2^2 x 3^3 equally likely draws can be listed; 2 seeds would be overruled by the t interval,
    # so the resampled part is looked at by itself.
    difference = np.array([[0.0, 1.0, 5.0], [2.0, -1.0, 3.0]])
    exact = [
        difference[np.ix_(seeds, items)].mean()
        for seeds in itertools.product(range(2), repeat=2)
        for items in itertools.product(range(3), repeat=3)
    ]
    drawn = _crossed_draws(difference, 100_000, seed=0)
    assert drawn.mean() == pytest.approx(np.mean(exact), abs=4 * np.std(exact) / math.sqrt(100_000))
    assert drawn.var() == pytest.approx(np.var(exact), rel=0.03)


def test_property_an_item_shared_by_all_seeds_is_not_averaged_away(rng):
    # Twenty identical seeds say no more about the items than one does.
    item = rng.normal(size=50)
    crossed = paired_bootstrap(np.tile(item, (20, 1)), np.zeros((20, 50)))
    assert crossed.high - crossed.low == pytest.approx(2 * 1.96 * item.std() / math.sqrt(50), rel=0.05)


def test_property_seed_noise_is_not_averaged_away_by_many_items(rng):
    by_seed = rng.normal(size=30)
    crossed = paired_bootstrap(np.tile(by_seed[:, None], (1, 500)), np.zeros((30, 500)))
    alone = paired_bootstrap(by_seed, np.zeros(30))
    assert crossed.high - crossed.low == pytest.approx(alone.high - alone.low, rel=0.05)


@pytest.mark.parametrize(
    ("seeds", "items", "sd"), [(3, 0, (1, 0, 0)), (8, 0, (1, 0, 0)), (3, 60, (0.2, 1, 1)), (10, 60, (0.3, 1, 1))]
)
def test_property_intervals_cover_the_truth_as_often_as_they_say(seeds, items, sd):
    hits, repeats = 0, 300
    for repeat in range(repeats):
        rng = np.random.default_rng(repeat)
        difference = sd[0] * rng.normal(size=(seeds, 1)) + sd[1] * rng.normal(size=(1, max(items, 1)))
        difference = difference + sd[2] * rng.normal(size=difference.shape)
        difference = difference[:, 0] if items == 0 else difference
        found = paired_bootstrap(difference, np.zeros_like(difference), draws=300, seed=repeat)
        hits += found.low <= 0.0 <= found.high
    # 0.95 nominal; 300 repeats have a standard error of 0.013. Plain resampling of 3 seeds covers 0.75.
    assert 0.91 <= hits / repeats <= 1.0


def test_property_swapping_the_methods_swaps_the_interval(rng):
    a, b = rng.normal(size=(4, 30)), rng.normal(size=(4, 30))
    forward, backward = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert (forward.low, forward.high) == pytest.approx((-backward.high, -backward.low), rel=1e-9)
    assert forward.p_value == backward.p_value
    assert forward.smallest_detectable == pytest.approx(backward.smallest_detectable)


@pytest.mark.parametrize("shape", [(1,), (1, 400)])
def test_degenerate_one_seed_supports_no_interval(shape):
    found = paired_bootstrap(np.ones(shape), np.zeros(shape))
    assert (found.mean, found.low, found.high, found.n) == (1.0, -math.inf, math.inf, 1)
    assert found.p_value == 1.0
    assert found.smallest_detectable == math.inf
    assert bootstrap_interval([3.0]).low == -math.inf


def test_degenerate_identical_methods_differ_by_exactly_nothing():
    for shape in ((3,), (8,), (3, 10)):
        found = paired_bootstrap(np.ones(shape), np.ones(shape))
        assert (found.mean, found.low, found.high, found.p_value, found.smallest_detectable) == (0, 0, 0, 1, 0)


def test_rejects_unpaired_empty_and_non_finite_input():
    with pytest.raises(ValueError, match=r"same seeds and items; got shapes \(3,\) and \(4,\)"):
        paired_bootstrap(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="a holds 1 values that are not finite"):
        paired_bootstrap([np.nan, 1.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="a is empty"):
        paired_bootstrap([], [])
    with pytest.raises(ValueError, match=r"a must have 1 or 2 dimension\(s\); got shape \(1, 1, 1\)"):
        paired_bootstrap([[[1.0]]], [[[1.0]]])
    with pytest.raises(ValueError, match="draws must be at least 100"):
        paired_bootstrap([1.0, 2.0], [0.0, 1.0], draws=10)
    with pytest.raises(ValueError, match="confidence must be in"):
        bootstrap_interval([1.0, 2.0], confidence=95)


@pytest.mark.parametrize(("n", "power", "alpha"), [(3, 0.8, 0.05), (10, 0.9, 0.01), (200, 0.8, 0.05)])
def test_oracle_smallest_detectable_matches_statsmodels(n, power, alpha):
    statsmodels_power = pytest.importorskip("statsmodels.stats.power")
    effect = statsmodels_power.TTestPower().solve_power(nobs=n, alpha=alpha, power=power)
    assert smallest_detectable(2.0, n, power, alpha) == pytest.approx(2.0 * effect, rel=1e-5)


def test_property_smallest_detectable_is_found_with_the_stated_power():
    n, shift = 6, smallest_detectable(1.0, 6)
    samples = np.random.default_rng(3).normal(shift, 1.0, size=(4000, n))
    found = (scipy_stats.ttest_1samp(samples, 0.0, axis=1).pvalue < 0.05).mean()
    assert found == pytest.approx(0.8, abs=4 * 0.4 / math.sqrt(4000))


def test_degenerate_and_rejects_smallest_detectable():
    assert smallest_detectable(1.0, 1) == math.inf
    assert smallest_detectable(0.0, 3) == 0.0
    with pytest.raises(ValueError, match="sd must be finite and >= 0; got -1"):
        smallest_detectable(-1.0, 3)
    with pytest.raises(ValueError, match="n must be at least 1; got 0"):
        smallest_detectable(1.0, 0)
    with pytest.raises(ValueError, match="0 < alpha < power < 1"):
        smallest_detectable(1.0, 3, power=0.01)


def test_equation_holm_by_hand():
    # Sorted .01, .02, .03, .04 times 4, 3, 2, 1 = .04, .06, .06, .04; made monotone: .04, .06, .06, .06.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


@settings(max_examples=50, deadline=None)
@given(arrays(float, st.integers(1, 12), elements=st.floats(0, 1)))
def test_oracle_holm_matches_statsmodels(p_values):
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    assert holm(p_values) == pytest.approx(multitest.multipletests(p_values, method="holm")[1], abs=1e-12)


def test_degenerate_and_rejects_holm():
    assert holm([]).shape == (0,)
    with pytest.raises(ValueError, match=r"in \[0, 1\]; got \[1.5\]"):
        holm([0.5, 1.5])
    with pytest.raises(ValueError, match="in \\[0, 1\\]; got \\[nan\\]"):
        holm([math.nan])


@settings(max_examples=50, deadline=None)
@given(arrays(float, st.tuples(st.integers(0, 15), st.just(2)), elements=st.integers(0, 5).map(float)))
def test_oracle_pareto_front_matches_the_definition(points):
    def beats(p, q):  # more of the first, less of the second
        return p[0] >= q[0] and p[1] <= q[1] and (p[0] > q[0] or p[1] < q[1])

    expected = [not any(beats(p, q) for p in points) for q in points]
    assert pareto_front(points, ("max", "min")).tolist() == expected


def test_rejects_pareto_axes_that_do_not_match():
    with pytest.raises(ValueError, match=r"points must be \(n, 1\)"):
        pareto_front([[1.0, 2.0]], ("max",))
    with pytest.raises(ValueError, match=r"'max' or 'min'; got \['up'\]"):
        pareto_front([[1.0]], ("up",))
    with pytest.raises(ValueError, match="NaN"):
        pareto_front([[math.nan]], ("max",))


@pytest.mark.parametrize("method", ["pearson", "spearman", "kendall"])
def test_oracle_correlations_match_scipy(method, rng):
    x = np.round(rng.normal(size=40), 1)  # rounded, so that there are ties
    y = x + rng.normal(size=40)
    reference = {"pearson": scipy_stats.pearsonr, "spearman": scipy_stats.spearmanr, "kendall": scipy_stats.kendalltau}
    ours = correlation(x, y, method, draws=200)
    assert ours.estimate == pytest.approx(reference[method](x, y).statistic, rel=1e-12)
    assert -1 <= ours.low < ours.estimate < ours.high <= 1


def test_oracle_pearson_interval_matches_fisher_on_normal_data(rng):
    x = rng.normal(size=400)
    y = x + rng.normal(size=400)
    ours, fisher = correlation(x, y, draws=5000), scipy_stats.pearsonr(x, y).confidence_interval()
    assert ours.low == pytest.approx(fisher.low, abs=0.02)
    assert ours.high == pytest.approx(fisher.high, abs=0.02)


def test_degenerate_correlation_of_too_little_is_anything():
    few = correlation([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (few.estimate, few.low, few.high) == (pytest.approx(1.0), -1.0, 1.0)
    constant = correlation(np.full(20, 0.1), np.arange(20.0))
    assert math.isnan(constant.estimate)
    assert (constant.low, constant.high) == (-1.0, 1.0)
    # Most resamples of a single outlier are constant; those left out must not turn the ends into NaN.
    spike = correlation(np.eye(1, 20)[0], np.arange(20.0))
    assert np.isfinite([spike.low, spike.high]).all()


def test_rejects_correlation_of_unpaired_input():
    with pytest.raises(ValueError, match="x and y must be paired; got 2 and 3"):
        correlation([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="method must be one of"):
        correlation([1.0, 2.0], [1.0, 2.0], "cosine")


def test_equation_risk_coverage_by_hand():
    # Surest first the losses are 0, 1, 0, 1: risks 0/1, 1/2, 1/3, 2/4.
    curve = risk_coverage([0.9, 0.1, 0.8, 0.5], [0.0, 1.0, 1.0, 0.0])
    assert curve.coverage == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert curve.risk == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert aurc([0.9, 0.1, 0.8, 0.5], [0.0, 1.0, 1.0, 0.0]) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)


def test_oracle_ties_are_the_mean_over_all_orders():
    confidence, loss = np.array([2.0, 1.0, 1.0, 1.0, 0.0]), np.array([0.0, 1.0, 0.0, 0.0, 1.0])
    orders = [[0, *middle, 4] for middle in itertools.permutations([1, 2, 3])]
    expected = np.mean([np.cumsum(loss[order]) / np.arange(1, 6) for order in orders], axis=0)
    assert risk_coverage(confidence, loss).risk == pytest.approx(expected)


def test_property_aurc_is_least_for_the_perfect_order_and_constant_confidence_gives_the_mean_loss(rng):
    loss = (rng.random(200) < 0.3).astype(float)
    assert aurc(-loss, loss) < aurc(rng.normal(size=200), loss) < aurc(loss, loss)
    assert aurc(np.zeros(200), loss) == pytest.approx(loss.mean())
    order = rng.permutation(200)
    score = rng.integers(0, 5, 200)
    assert aurc(score[order], loss[order]) == pytest.approx(aurc(score, loss), rel=1e-12)


def test_rejects_risk_of_unpaired_input():
    with pytest.raises(ValueError, match="confidence and loss must be paired; got 2 and 1"):
        risk_coverage([1.0, 2.0], [1.0])


def test_equation_calibration_error_by_hand():
    # Three bins. (0, 1/3]: 0.2 right; (1/3, 2/3]: 0.5 wrong and 0.6 right; (2/3, 1]: 0.9 right.
    # |1 - 0.2| 1/4 + |1/2 - 0.55| 2/4 + |1 - 0.9| 1/4 = 0.2 + 0.025 + 0.025
    error = calibration_error(np.array([0.2, 0.5, 0.6, 0.9]), np.array([True, False, True, True]), bins=3)
    assert error == pytest.approx(0.25)


@pytest.mark.parametrize("confidence", [0.0, 1.0])
def test_degenerate_confidence_at_the_ends_has_a_bin(confidence):
    assert calibration_error(np.array([confidence]), np.array([True])) == 1 - confidence


def test_rejects_calibration_of_nothing():
    with pytest.raises(ValueError, match="must be paired"):
        calibration_error(np.array([]), np.array([], dtype=bool))
    with pytest.raises(ValueError, match=r"confidence must be in \[0, 1\]; it goes from 0.5 to 1.5"):
        calibration_error([0.5, 1.5], [True, True])
    with pytest.raises(ValueError, match="bins must be at least 1"):
        calibration_error([0.5], [True], bins=0)


def test_equation_expected_calibration_error_is_of_the_likeliest_class():
    # Confidences .8 (right), .7 (wrong), .6 (right); two bins: all in the upper one. |2/3 - .7| = 1/30
    probs = [[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.3, 0.1, 0.6]]
    assert expected_calibration_error(probs, [0, 2, 2], bins=2) == pytest.approx(1 / 30)
    with pytest.raises(ValueError, match=r"shapes \(3, 3\) and \(2,\)"):
        expected_calibration_error(probs, [0, 2])
