"""Robust fits: the loss by hand, known minima, penalties, weights, resampling of groups."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import optimize

from headwater.core.curves import NormalPrior, bootstrap_fit, draw_starts, fit_robust, huber

Floats = NDArray[np.float64]
BOX = [(-5.0, 5.0), (-5.0, 5.0)]


def line(x: Floats, y: Floats):
    """Residuals of ``a + b x``."""
    design = np.stack([np.ones_like(x), x], axis=1)
    return lambda theta: (design @ theta - y, design)


def points(noise: float = 0.0, n: int = 40) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(0)
    x = np.linspace(-1, 1, n)
    return x, 0.5 - 1.5 * x + noise * rng.standard_normal(n)


def test_equation_huber_is_square_inside_and_linear_outside() -> None:
    # delta 0.5: 0.3^2 / 2 = 0.045; 0.5 (2 - 0.25) = 0.875, and the same for -2.
    assert huber([0.3, 2.0, -2.0, 0.0], 0.5) == pytest.approx([0.045, 0.875, 0.875, 0.0])


def test_equation_objective_counts_weights_and_penalties_in_units_of_delta() -> None:
    # One residual, theta - 3, held at theta = 1 by its bounds: r = -2, delta = 0.5 -> huber 0.875, weighted 2: 1.75.
    # Prior at 0, sd 2, weight 8: 8 * (1 / 2)^2 / 2 = 1. Sum 2.75, over delta^2 = 0.25: 11.
    prior = NormalPrior(np.zeros(1), np.array([2.0]), 8.0)
    fit = fit_robust(
        lambda theta: (theta - 3, np.ones((1, 1))), [(1, 1)], [[1.0]], delta=0.5, penalties=[prior], weights=[2.0]
    )
    assert fit.objective == pytest.approx(11.0)


def test_oracle_small_residuals_give_least_squares() -> None:
    x, y = points(noise=0.1)
    fit = fit_robust(line(x, y), BOX, [[0, 0]], delta=10.0)
    assert fit.parameters == pytest.approx(np.polyfit(x, y, 1)[::-1], abs=1e-6)


def test_oracle_large_residuals_match_scipys_huber() -> None:
    x, y = points(noise=0.1)
    y[::7] += 3.0
    design = np.stack([np.ones_like(x), x], axis=1)
    other = optimize.least_squares(lambda t: design @ t - y, [0, 0], loss="huber", f_scale=0.05, xtol=1e-12, ftol=1e-12)
    assert fit_robust(line(x, y), BOX, [[0, 0]], delta=0.05).parameters == pytest.approx(other.x, abs=1e-4)


def test_property_outliers_do_not_move_an_exact_line() -> None:
    x, y = points()
    y[::5] += 2.0
    fit = fit_robust(line(x, y), BOX, draw_starts(BOX, 4, 0), delta=1e-3)
    assert fit.parameters == pytest.approx([0.5, -1.5], abs=1e-3)  # a bad fifth pulls by about delta, not by 2


def test_property_weights_are_repetitions() -> None:
    x, y = points(noise=0.2, n=12)
    counts = np.array([0, 3, 1, 2] * 3)
    repeated = fit_robust(line(np.repeat(x, counts), np.repeat(y, counts)), BOX, [[0, 0]], delta=0.1)
    weighted = fit_robust(line(x, y), BOX, [[0, 0]], delta=0.1, weights=counts)
    assert weighted.parameters == pytest.approx(repeated.parameters, abs=1e-6)


def test_property_the_best_of_many_valleys_is_kept_and_more_starts_never_worsen() -> None:
    def wavy(theta: Floats) -> tuple[Floats, Floats]:
        # Zero at theta = 2 only; local minima about every 1.2.
        return np.array([0.3 * (theta[0] - 2), math.sin(2.6 * (theta[0] - 2))]), np.array(
            [[0.3], [2.6 * math.cos(2.6 * (theta[0] - 2))]]
        )

    box = [(-10.0, 10.0)]
    objectives = [fit_robust(wavy, box, draw_starts(box, count, 3), delta=1).objective for count in (1, 4, 128)]
    assert objectives[0] >= objectives[1] >= objectives[2]
    assert objectives[2] == pytest.approx(0, abs=1e-10)
    fit = fit_robust(wavy, box, draw_starts(box, 128, 3), delta=1)
    assert fit.parameters == pytest.approx([2.0], abs=1e-5)
    assert 1 <= fit.agreeing < 128, "descents into other valleys do not agree"


def test_property_a_larger_count_only_adds_starts_and_all_lie_in_the_box() -> None:
    few, many = draw_starts(BOX, 3, 1), draw_starts(BOX, 9, 1)
    assert np.array_equal(few, many[:3])
    assert (np.abs(many) <= 5).all()
    assert not np.array_equal(few, draw_starts(BOX, 3, 2))


def test_property_a_prior_decides_only_what_data_leave_open() -> None:
    # Only a + b is measured.
    def residuals(theta: Floats) -> tuple[Floats, Floats]:
        return np.array([theta.sum() - 3.0]), np.ones((1, 2))

    prior = NormalPrior(np.array([1.0, 1.0]), np.array([1.0, 0.1]), 1e-6)
    a, b = fit_robust(residuals, BOX, [[0, 0]], delta=1.0, penalties=[prior]).parameters
    assert a + b == pytest.approx(3.0, abs=1e-4)
    assert b - 1 == pytest.approx(0.01 * (a - 1), abs=1e-3)  # the misfit is shared as the variances are, 100 : 1


def test_oracle_prior_gradient_is_its_difference_quotient() -> None:
    prior = NormalPrior(np.array([0.3, -1.0]), np.array([0.5, 2.0]), 0.7)
    theta, h = np.array([1.1, 0.4]), 1e-6
    numeric = [(prior(theta + h * e)[0] - prior(theta - h * e)[0]) / (2 * h) for e in np.eye(2)]
    assert prior(theta)[1] == pytest.approx(numeric, rel=1e-6)


def test_property_bootstrap_draws_whole_groups_and_the_same_ones_for_every_curve() -> None:
    groups = np.repeat(["a", "b", "c"], 4)
    drawn = bootstrap_fit(lambda weights: weights, groups, 50, seed=4)
    assert drawn.shape == (50, 12)
    assert (drawn.reshape(50, 3, 4) == drawn.reshape(50, 3, 4)[:, :, :1]).all(), "a group's points stay together"
    assert (drawn[:, ::4].sum(axis=1) == 3).all()
    assert np.array_equal(drawn, bootstrap_fit(lambda weights: weights, groups, 50, seed=4))
    assert not np.array_equal(drawn, bootstrap_fit(lambda weights: weights, groups, 50, seed=5))


def test_oracle_bootstrap_of_a_mean_has_its_standard_error() -> None:
    y = np.random.default_rng(1).standard_normal(50)

    def refit(weights: Floats) -> Floats:
        return np.array([weights @ y / weights.sum()])

    drawn = bootstrap_fit(refit, np.arange(50), 4000, seed=0)
    assert drawn.std() == pytest.approx(y.std() / math.sqrt(50), rel=0.06)  # 4,000 draws: about 1.1 % of noise


def test_rejects_bad_arguments() -> None:
    x, y = points()
    with pytest.raises(ValueError, match="each low <= high"):
        fit_robust(line(x, y), [(1, 0), (0, 1)], [[0, 0]])
    with pytest.raises(ValueError, match=r"starts must be \(at least 1, 2\)"):
        fit_robust(line(x, y), BOX, [[0, 0, 0]])
    with pytest.raises(ValueError, match="delta must be > 0"):
        fit_robust(line(x, y), BOX, [[0, 0]], delta=0)
    with pytest.raises(ValueError, match="finite objective"):
        fit_robust(line(x, np.full_like(y, np.nan)), BOX, [[0, 0]])
    with pytest.raises(ValueError, match="at least 2 groups and 1 draw; got 1 group"):
        bootstrap_fit(lambda weights: weights, np.zeros(4), 10, seed=0)
