from __future__ import annotations

from math import e, inf, nan

import numpy as np
import pytest

from headwater.domain.gap import Gap, gap


def test_equation_rise_and_recovery():
    # On the axis log(1 + t) the points lie at 0, 1, 2, 3. Excess 0, .4, .2, 0 (clipped from -.1).
    # Trapezoids: (0 + .4)/2 + (.4 + .2)/2 + (.2 + 0)/2 = .2 + .3 + .1 = .6.
    tokens = np.array([0, e - 1, e**2 - 1, e**3 - 1])
    result = gap(tokens, [3.0, 3.4, 3.2, 2.9])
    assert result.depth == pytest.approx(0.4, abs=1e-12)
    assert result.at == tokens[1]
    assert result.recovery_at == tokens[3]
    assert result.area == pytest.approx(0.6, abs=1e-12)


def test_equation_start_that_is_not_zero_tokens():
    # log(1 + t): 1, 3. Excess 0, 1: area 2 * (0 + 1)/2 = 1.
    result = gap([e - 1, e**3 - 1], [2.0, 3.0])
    assert result == Gap(1.0, e**3 - 1, inf, pytest.approx(1.0, abs=1e-12))


def test_equation_recovery_counts_from_the_peak():
    # Back at the start at 2, but the peak comes later, at 3; then exactly the start at 5.
    result = gap([0, 1, 2, 3, 4, 5, 6], [1.0, 1.5, 1.0, 2.0, 1.5, 1.0, 1.5])
    assert (result.depth, result.at, result.recovery_at) == (1.0, 3.0, 5.0)


def test_equation_first_of_two_equal_peaks():
    assert gap([0, 1, 2, 3], [1.0, 2.0, 1.0, 2.0]).at == 1.0


def test_property_shift_and_scale():
    rng = np.random.default_rng(0)
    tokens, values = np.cumsum(rng.integers(1, 9, 20)), rng.normal(size=20)
    values[0] = 0.0
    base, scaled = gap(tokens, values), gap(tokens, 2 * values + 5)
    assert (scaled.at, scaled.recovery_at) == (base.at, base.recovery_at)
    # Adding 5 rounds at 1e-15; 20 trapezoids.
    assert (scaled.depth, scaled.area) == pytest.approx((2 * base.depth, 2 * base.area), abs=1e-12)


@pytest.mark.parametrize(("tokens", "values"), [([7], [2.0]), ([7, 8, 9], [2.0] * 3), ([7, 8, 9], [2.0, 1.0, 1.5])])
def test_degenerate_one_point_all_equal_and_only_better(tokens, values):
    assert gap(tokens, values) == Gap(depth=0.0, at=7.0, recovery_at=0.0, area=0.0)


@pytest.mark.parametrize(
    ("tokens", "values", "message"),
    [
        ([], [], "trajectory is empty"),
        ([0, 1], [1.0], r"of one length; got \(2,\) and \(1,\)"),
        ([[0, 1]], [[1.0, 2.0]], "one-dimensional"),
        ([0, 1], [1.0, nan], "values must be finite; got nan at point 1"),
        ([0, inf], [1.0, 2.0], "tokens must be finite; got inf at point 1"),
        ([0, 2, 2], [1.0, 2.0, 3.0], "strictly ascending"),
        ([-1, 2], [1.0, 2.0], "must be >= 0"),
    ],
)
def test_rejects_bad_trajectories(tokens, values, message):
    with pytest.raises(ValueError, match=message):
        gap(tokens, values)
