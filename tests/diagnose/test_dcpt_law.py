"""The D-CPT law: its equation, its fit, its choices, and everything that is refused."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import optimize

from headwater.core.recipe import RecipeError, validate
from headwater.core.run import execute
from headwater.diagnose.dcpt_domains import CrossDomainLaw, probe
from headwater.diagnose.dcpt_law import (
    DCPTLaw,
    LawProblem,
    MixtureRatio,
    bootstrap_law,
    choose_compute,
    choose_ratio,
    choose_ratio_scarce,
    cross_validate,
    fit_law,
)
from headwater.diagnose.mixture_choice import copy_ratio, score_law
from headwater.diagnose.mixture_table import InterpolateGrid, RunPlan, TableError, check_table, from_runs

SIZES, RATIOS = (1e5, 4e5, 1.6e6), (0.0, 0.1, 0.33, 0.67, 0.9, 1.0)
LENGTHS = (1e5, 3e5, 7e5, 1.2e6, 2e6)
DOMAIN = DCPTLaw(E=1.2, A=40, alpha=0.4, B=5, eta=1.3, beta=0.4, C=0.3, gamma=0.8, eps=0.4)
GENERAL = DCPTLaw(E=1.4, A=30, alpha=0.35, B=4, eta=1.2, beta=0.35, C=0.25, gamma=0.9, eps=0.5)


def made(
    sizes: tuple[float, ...] = SIZES,
    lengths: tuple[float, ...] = LENGTHS,
    ratios: tuple[float, ...] = RATIOS,
    noise: float = 0.0,
    per_run: float = 0.0,
    domain: DCPTLaw = DOMAIN,
    general: DCPTLaw = GENERAL,
) -> pd.DataFrame:
    """A table that follows the two laws, times noise of each row and of each run."""
    grid = np.stack(np.meshgrid(sizes, ratios, lengths, indexing="ij"), -1).reshape(-1, 3)
    table = pd.DataFrame(grid, columns=["N", "r_d", "D"])
    rng = np.random.default_rng(0)
    for name, law in (("domain", domain), ("general", general)):
        r = table["r_d"] if name == "domain" else 1 - table["r_d"]
        runs = np.repeat(rng.standard_normal(len(table) // len(lengths)), len(lengths))
        factor = np.exp(noise * rng.standard_normal(len(table)) + per_run * runs)
        table[f"loss_{name}"] = law.predict(table["N"], table["D"], r) * factor
    return table


@pytest.fixture(scope="module")
def noisy() -> pd.DataFrame:
    return made(noise=0.003)


# -- the law


def test_equation_by_hand() -> None:
    # 1 + 8 / 4^0.5 + 6 * 0.25^2 / 9^0.5 + 0.5 / (0.25 + 0.25)^1 = 1 + 4 + 0.125 + 1
    law = DCPTLaw(E=1, A=8, alpha=0.5, B=6, eta=2, beta=0.5, C=0.5, gamma=1, eps=0.25)
    assert law.predict(4, 9, 0.25) == pytest.approx(6.125)
    # dL/dr = 6 * 2 * 0.25 / 3 - 0.5 / 0.5^2 = 1 - 2
    assert law.slope(9, 0.25) == pytest.approx(-1.0)


def test_equation_without_own_text_the_length_counts_for_nothing_and_nothing_is_nan() -> None:
    losses = DOMAIN.predict(1e5, [1e3, 1e9], 0.0)
    assert losses == pytest.approx([1.2 + 40 / 1e5**0.4 + 0.3 / 0.4**0.8] * 2, abs=1e-15)
    assert np.isfinite(DOMAIN.grad(1e5, 1e6, 0.0)).all()


def test_oracle_gradients_are_difference_quotients() -> None:
    problem = LawProblem.of(check_table(made()), "domain", "full", 1e-3, None, True)
    theta = np.log([0.5, 0.2, 0.3, 0.6, 1.4, 0.3, 0.1, 0.7, 0.3])  # with B this large the loss rises at r = 1
    h = 1e-6 * np.eye(9)
    numeric = np.stack([(problem.residuals(theta + e)[0] - problem.residuals(theta - e)[0]) / 2e-6 for e in h], axis=1)
    assert problem.residuals(theta)[1] == pytest.approx(numeric, abs=1e-8, rel=1e-6)
    penalty = [(problem.rising(theta + e)[0] - problem.rising(theta - e)[0]) / 2e-6 for e in h]
    assert problem.rising(theta)[0] > 0
    assert problem.rising(theta)[1] == pytest.approx(penalty, rel=1e-6, abs=1e-6)
    up, down = (replace(DOMAIN, gamma=0.8 * math.exp(d)) for d in (1e-6, -1e-6))
    by_gamma = (up.predict(1e5, 1e6, 0.3) - down.predict(1e5, 1e6, 0.3)) / 2e-6
    assert DOMAIN.grad(1e5, 1e6, 0.3)[7] == pytest.approx(float(by_gamma), rel=1e-6)
    by_r = (DOMAIN.predict(1e5, 1e6, 0.3 + 1e-6) - DOMAIN.predict(1e5, 1e6, 0.3 - 1e-6)) / 2e-6
    assert float(DOMAIN.slope(1e6, 0.3)) == pytest.approx(float(by_r), rel=1e-6)


def test_oracle_at_a_constant_mixture_it_is_chinchillas_law() -> None:
    N, D = (grid.ravel() for grid in np.meshgrid(SIZES, LENGTHS))
    loss = DOMAIN.predict(N, D, 0.6)

    def chinchilla(p: Any) -> Any:
        return np.exp(p[0]) + np.exp(p[1]) * (N / 4e5) ** -p[2] + np.exp(p[3]) * (D / 1e6) ** -p[4]

    fit = optimize.least_squares(lambda p: chinchilla(p) - loss, [0, -1, 0.3, -1, 0.3], xtol=1e-15, ftol=1e-15)
    assert np.exp(fit.x[0]) == pytest.approx(1.2 + 0.3 / 1.0**0.8, rel=1e-5)
    assert np.exp(fit.x[3]) == pytest.approx(5 * 0.6**1.3 / 1e6**0.4, rel=1e-4)
    assert fit.x[[2, 4]] == pytest.approx([0.4, 0.4], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "falls"),
    [({}, True), ({"B": 60}, False), ({"eta": 0.5}, False), ({"eta": 0.0, "B": 60}, True), ({"B": 0.0}, True)],
)
def test_oracle_monotone_is_what_a_dense_grid_shows(changes: dict[str, float], falls: bool) -> None:
    law = replace(DOMAIN, **changes)
    losses = law.predict(1e5, 1e5, np.concatenate([[0], np.geomspace(1e-12, 1, 20_000)]))
    assert law.monotone(1e5) is falls is bool((np.diff(losses) < 0).all())


def test_property_json_round_trip() -> None:
    assert DCPTLaw.from_json(DOMAIN.to_json()) == DOMAIN


def test_rejects_parameters_and_inputs_out_of_range() -> None:
    with pytest.raises(ValueError, match="eps > 0"):
        replace(DOMAIN, eps=0.0)
    with pytest.raises(ValueError, match="'beta': -1"):
        replace(DOMAIN, beta=-1)
    for N, D, r in ((0, 1, 0.5), (1, -1, 0.5), (1, 1, 1.5)):
        with pytest.raises(ValueError, match=r"N and D must be > 0 and r in \[0, 1\]"):
            DOMAIN.predict(N, D, r)


# -- the fit


def test_oracle_exact_data_of_a_monotone_law_are_predicted_inside_the_hull() -> None:
    assert DOMAIN.monotone(min(LENGTHS))
    rng = np.random.default_rng(1)
    N, D, r = (low + (high - low) * rng.random(200) for low, high in ((1e5, 1.6e6), (1e5, 2e6), (0, 1)))
    fit = fit_law(made(), starts=16, prior=None)
    assert fit.predict(N, D, r) == pytest.approx(DOMAIN.predict(N, D, r), rel=1e-6)
    assert fit.law.eta == pytest.approx(DOMAIN.eta, rel=1e-3)
    # The prior's weight is that of a misfit of 0.3 % in one row, spread over 90 rows.
    assert fit_law(made(), starts=16).predict(N, D, r) == pytest.approx(DOMAIN.predict(N, D, r), rel=5e-4)
    assert fit.monotone_on_hull
    assert fit.r2 > 0.99999


def test_property_the_prior_is_what_extrapolates_from_two_sizes() -> None:
    # The third size, 4 times the larger of the two fitted: the errors that the prior must not make.
    table = made(noise=0.003)
    fit = fit_law(table[table["N"] < 1e6], starts=16)
    largest = made(sizes=(1.6e6,))
    assert score_law(fit, largest, "domain").max_relative_error < 0.02
    assert any("rests on two sizes" in words for words in fit.beyond(1.6e6, 1e6))
    with pytest.raises(TableError, match="two model sizes"):
        fit_law(table[table["N"] < 1e6], prior=None)


def test_property_units_and_the_order_of_rows_do_not_matter(noisy: pd.DataFrame) -> None:
    fit = fit_law(noisy, starts=8)
    other = noisy.assign(N=noisy["N"] * 1e3, D=noisy["D"] / 1e3, loss_domain=noisy["loss_domain"] * 1.7)
    rescaled, shuffled = (fit_law(t, starts=8) for t in (other, noisy.sample(frac=1, random_state=0)))
    at = (8e5, 1.5e6, np.linspace(0, 1, 11))
    assert rescaled.predict(at[0] * 1e3, at[1] / 1e3, at[2]) / 1.7 == pytest.approx(fit.predict(*at), rel=1e-6)
    assert shuffled.predict(*at) == pytest.approx(fit.predict(*at), rel=1e-6)


def test_property_the_general_loss_is_fitted_to_the_general_share() -> None:
    fit = fit_law(made(), "general", starts=16)
    assert fit.predict(8e5, 1e6, 0.3) == pytest.approx(GENERAL.predict(8e5, 1e6, 0.3), rel=1e-4)


def test_oracle_the_additive_rival_is_the_law_without_interaction() -> None:
    flat = replace(DOMAIN, eta=0.0)
    fit = fit_law(made(domain=flat), form="additive", starts=16)
    assert fit.law.eta == 0
    # As the definition of additivity has it: what the length changes is the same at every share.
    change = fit.predict(4e5, 1e5, np.linspace(0, 1, 5)) - fit.predict(4e5, 2e6, np.linspace(0, 1, 5))
    assert np.ptp(change) < 1e-9
    assert fit.predict(8e5, 5e5, 0.4) == pytest.approx(flat.predict(8e5, 5e5, 0.4), rel=1e-4)
    full = fit_law(made(), starts=16)
    assert fit_law(made(), form="additive", starts=16).huber > 10 * full.huber


def test_property_monotone_is_checked_or_enforced() -> None:
    rising = made(domain=replace(DOMAIN, B=60), noise=0.001)
    free = fit_law(rising, starts=16)
    assert not free.monotone_on_hull
    assert any("rises with its own text's share" in words for words in free.warnings)
    assert not fit_law(rising, starts=16, monotone=False).warnings
    held = fit_law(rising, starts=16, monotone=True)
    assert held.law.monotone(min(LENGTHS))
    assert held.huber > free.huber, "enforcing costs fit"


def test_property_what_the_data_leave_open_is_said(noisy: pd.DataFrame) -> None:
    fit = fit_law(noisy, starts=8)
    assert fit.identifiability.keys() == asdict(DOMAIN).keys()
    loud = fit_law(made(noise=0.03), starts=8)
    assert loud.identifiability["alpha"] > 3 * fit.identifiability["alpha"] > 0, "ten times the noise"


def test_degenerate_one_size_leaves_the_size_out_and_refuses_others() -> None:
    fit = fit_law(made(sizes=(4e5,)), starts=8)
    assert fit.law.A == 0
    assert any("one model size" in words for words in fit.warnings)
    assert fit.predict(4e5, 1e6, 0.5) == pytest.approx(DOMAIN.predict(4e5, 1e6, 0.5), rel=1e-3)
    with pytest.raises(ValueError, match=r"fitted to one model size, N = 400000"):
        fit.predict(8e5, 1e6, 0.5)
    with pytest.raises(ValueError, match="cannot choose another"):
        choose_compute(fit, 0.5, 1e12)


def test_property_disagreeing_descents_and_far_extrapolation_are_flagged() -> None:
    # So few, so noisy rows that descents end in different places.
    table = made(sizes=(4e5,), lengths=LENGTHS[:3], ratios=(0.0, 0.1, 0.33, 1.0), noise=0.03)
    fit = fit_law(table, starts=8, prior=None)
    expected = fit.converged_starts < 8
    assert any("descents agree" in words for words in fit.warnings) is expected
    assert expected, "this table is chosen to be hard"
    far = fit_law(made(), starts=8)
    assert far.beyond(1.6e6, 7.9e6) == ()
    assert "4.1 times the largest D" in far.beyond(1.6e6, 8.2e6)[0]
    assert "5.0 times the largest N" in far.beyond(8e6, 1e6)[0]


# -- intervals and validation


def test_property_resampling_runs_is_wider_than_resampling_points() -> None:
    # All of the noise belongs to runs: points alone see each run five times and believe it five times.
    fit = fit_law(made(sizes=(4e5,), per_run=0.01), starts=8)
    widths = []
    for by in ("run", "point"):
        low, high = bootstrap_law(fit, 30, by=by, seed=1).interval(4e5, 1e6, np.array([0.2, 0.5, 0.8]))
        widths.append((high - low).mean())
    assert widths[0] > 1.3 * widths[1]


def test_oracle_cross_validation_by_length_is_a_fit_without_the_last_third() -> None:
    table = made(noise=0.002)
    found = cross_validate(table, by="D", starts=8)
    late = table["D"].isin(LENGTHS[-2:])
    by_hand = score_law(fit_law(table[~late], starts=8), table[late], "domain")
    assert found == by_hand
    assert found.rows == 2 * 18
    with pytest.raises(TableError, match="at least 3 sizes; the table has 2"):
        cross_validate(table[table["N"] < 1e6], by="N")


def test_learns_mixtures_and_sizes_that_were_not_run() -> None:
    table = made(noise=0.002, ratios=(0.0, 0.33, 0.67, 1.0), lengths=LENGTHS[:3])
    assert cross_validate(table, by="r", starts=8).r2 > 0.9
    assert cross_validate(table, by="N", starts=8).max_relative_error < 0.05


# -- choices


@pytest.mark.parametrize("tolerance", [0.005, 0.03, 0.5])
@pytest.mark.parametrize("domain", [DOMAIN, replace(DOMAIN, B=60)])
def test_oracle_choose_ratio_is_the_best_of_two_million(domain: DCPTLaw, tolerance: float) -> None:
    choice = choose_ratio(GENERAL, domain, 1.6e6, 1e6, tolerance)
    r = np.linspace(0, 1, 2_000_001)
    general = GENERAL.predict(1.6e6, 1e6, 1 - r)
    allowed = general <= (1 + tolerance) * general[0]
    best = r[allowed][domain.predict(1.6e6, 1e6, r[allowed]).argmin()]
    assert choice.r == pytest.approx(best, abs=1e-6)
    assert choice.feasible
    assert choice.loss_general is not None
    assert choice.loss_general <= (1 + tolerance) * float(GENERAL.predict(1.6e6, 1e6, 1.0)) * (1 + 1e-12)


def test_degenerate_a_limit_that_nothing_keeps_gives_no_domain_text() -> None:
    choice = choose_ratio(GENERAL, DOMAIN, 1.6e6, 1e6, -0.2)
    assert (choice.r, choice.feasible) == (0.0, False)
    assert "no mixture keeps the general loss" in choice.warnings[0]
    with pytest.raises(ValueError, match="tolerance must be > -1"):
        choose_ratio(GENERAL, DOMAIN, 1.6e6, 1e6, -1.5)


def test_oracle_scarce_text_is_mixed_as_brute_force_says() -> None:
    choice = choose_ratio_scarce(DOMAIN, 1.6e6, 3e5)
    r = np.linspace(0.01, 1, 1_000_001)
    best = r[DOMAIN.predict(1.6e6, 3e5 / r, r).argmin()]
    assert choice.r == pytest.approx(best, abs=1e-5)
    rich = choose_ratio_scarce(replace(DOMAIN, C=0.0), 1.6e6, 3e5)
    assert rich.r == pytest.approx(0.01), "if rarity costs nothing, ever longer runs are better"
    with pytest.raises(ValueError, match="D_domain must be > 0"):
        choose_ratio_scarce(DOMAIN, 1e6, 0)


def test_oracle_compute_is_split_as_brute_force_says() -> None:
    fit = fit_law(made(), starts=8)
    found = choose_compute(fit, 0.5, 6e12)
    N = np.geomspace(1e4, 1e9, 1_000_001)
    best = N[fit.law.predict(N, 1e12 / N, 0.5).argmin()]
    assert pytest.approx(best, rel=1e-4) == found.N
    assert pytest.approx(6e12) == 6 * found.N * found.D
    assert found.loss == pytest.approx(float(fit.law.predict(found.N, found.D, 0.5)))


def test_property_intervals_of_choices_hold_the_choice(noisy: pd.DataFrame) -> None:
    table = noisy[noisy["N"] == 4e5]
    domain, general = (fit_law(table, target, starts=8) for target in ("domain", "general"))
    draws = tuple(bootstrap_law(fit, 20, seed=3).laws for fit in (general, domain))
    choice = choose_ratio(general, domain, 4e5, 2e6, 0.02, draws=draws)  # type: ignore[arg-type]
    assert choice.interval is not None
    assert 0 <= choice.interval[0] < choice.interval[1] <= 1
    assert choice.interval[0] - 0.05 < choice.r < choice.interval[1] + 0.05
    scarce = choose_ratio_scarce(domain, 4e5, 1e6, draws=draws[1])
    assert scarce.interval is not None
    assert choose_ratio_scarce(domain, 4e5, 1e5).warnings == ()
    assert choose_ratio_scarce(domain, 4e5, 9e6).warnings, "more text than four times the longest run"


# -- rivals and tables


def test_oracle_interpolation_passes_through_its_runs_and_is_linear_between() -> None:
    table = made()
    for target, law in (("domain", DOMAIN), ("general", GENERAL)):
        grid = InterpolateGrid(table, target)
        r = table["r_d"] if target == "domain" else 1 - table["r_d"]
        assert grid.predict(table["N"], table["D"], r) == pytest.approx(table[f"loss_{target}"].to_numpy())
        ends = law.predict(4e5, 3e5, np.array([0.33, 0.67] if target == "domain" else [1 - 0.33, 1 - 0.67]))
        middle = grid.predict(4e5, 3e5, 0.5)
        assert float(middle) == pytest.approx(float(ends.mean()))
    assert np.isnan(InterpolateGrid(table[table["N"] == 4e5], "domain").predict(8e5, 3e5, 0.5))
    with pytest.raises(TableError, match=r"3 x 5 x 6 combinations of N, D and r_d once; the table has 89"):
        InterpolateGrid(table.iloc[1:], "domain")


def test_oracle_copying_takes_the_share_that_was_best_there() -> None:
    r = copy_ratio(made(ratios=tuple(np.linspace(0, 1, 41))), 4e5, 2e6, 0.02)
    assert r == pytest.approx(choose_ratio(GENERAL, DOMAIN, 4e5, 2e6, 0.02).r, abs=2e-3)  # interpolated, steps of 0.025


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.assign(r_d=t["r_d"] * 100), "in percent, divide by 100"),
        (lambda t: t.assign(r_d=1 - t["r_d"]), "domain loss rises with r_d. Is r_d the share of general text"),
        (lambda t: t.assign(r_d=t["r_d"] - 0.1), "r_d must be finite and >= 0; got -0.1"),
        (lambda t: t.iloc[:11], "11 rows; a law needs at least 12"),
        (lambda t: t[t["r_d"].isin([0.0, 1.0])], "2 ratios; a law needs at least 3"),
        (lambda t: t[t["D"] < 5e5], "2 values of D; a law needs at least 3"),
        (lambda t: t.assign(loss_domain=0.0), "loss_domain must be finite and > 0; got 0.0 in row 0"),
        (lambda t: t.assign(loss_general=math.nan), "loss_general must be finite"),
        (lambda t: t.assign(unit="bits/byte"), r"losses are in bits \(bits/byte\); give nats: multiply by ln 2"),
        (lambda t: t.rename(columns={"loss_domain": "domain_bpb"}), "losses are in bits"),
        (lambda t: t.drop(columns="N"), "the table has no column N"),
        (lambda t: t.assign(N=-1.0), "N must be finite and > 0"),
        (lambda t: t.assign(domain=["a", "b", "c"] * (len(t) // 3)), "3 domains; a law is of one"),
    ],
)
def test_rejects_tables(change: Any, words: str) -> None:
    with pytest.raises(TableError, match=words):
        fit_law(change(made()))


def test_rejects_no_start() -> None:
    with pytest.raises(ValueError, match="starts must be at least 1"):
        fit_law(made(), starts=0)


# -- runs


def write_run(path: Path, replay: float, swapped: bool = False, **changes: Any) -> Path:
    path.mkdir()
    corpora = {"domain": "law.jsonl", "general": {"name": "web.jsonl", "split": "train"}}
    if swapped:
        corpora = {"domain": corpora["general"], "general": corpora["domain"]}
    recipe = {"method": "plain", **corpora, "replay": replay, "lora": None, "optim": {"warmup": 0.25}, **changes}
    (path / "recipe.yaml").write_text(json.dumps(recipe))
    own, other = ([[x, y + x / 1e4] for x in (0, 100, 200, 400)] for y in (1.0, 3.0))
    (path / "trajectory.json").write_text(json.dumps({"series": {"domain/bpb": own, "general/bpb": other}}))
    result = {"format": 1, "status": "done", "metrics": {}, "cost": {"trainable": 1234}, "seconds": 1.0}
    (path / "result.json").write_text(json.dumps({**result, "notes": {"unit": "bits/byte"}}))
    return path


def test_equation_runs_become_rows_in_nats_after_warmup(tmp_path: Path) -> None:
    table = from_runs([write_run(tmp_path / "a", 0.25), write_run(tmp_path / "b", 0.0, swapped=True)])
    # Warmup ends at 0.25 * 400 = 100 tokens, and that evaluation is still left out.
    assert table["D"].tolist() == [200, 400, 200, 400]
    assert table["r_d"].tolist() == [0.75, 0.75, 0.0, 0.0]
    assert table["loss_domain"].to_numpy() == pytest.approx(np.log(2) * np.array([1.02, 1.04, 3.02, 3.04]))
    assert table["loss_general"].to_numpy() == pytest.approx(np.log(2) * np.array([3.02, 3.04, 1.02, 1.04]))
    assert set(table["unit"]) == {"nats/byte"}
    assert set(table["N"]) == {1234}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "stability_gap"}, "plain continued pretraining"),
        ({"lora": {"rank": 8}}, "LoRA adapters"),
        ({"general": None}, "no general corpus"),
    ],
)
def test_rejects_runs_that_the_law_is_not_of(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TableError, match=words):
        from_runs([write_run(tmp_path / "a", 0.5, **changes)])


def test_rejects_runs_of_another_domain_or_without_evaluations(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 0.5)
    with pytest.raises(TableError, match=r"neither corpus is 'code'; it has law.jsonl and web.jsonl"):
        from_runs([run], "code")
    (run / "trajectory.json").unlink()
    with pytest.raises(TableError, match="set eval_at"):
        from_runs([run])
    with pytest.raises(TableError, match="0 run"):
        from_runs([])


# -- several domains


def test_learns_a_new_domain_from_its_probe() -> None:
    probes = {f"d{i}": (2.0 + 0.25 * i, 0.5 + 0.1 * (i % 3)) for i in range(5)}
    truth = CrossDomainLaw(replace(DOMAIN, E=0.5), F=0.4, mu=1.2, w=0.5, r2=1.0)
    tables = [made(sizes=SIZES[:1], domain=truth.for_domain(*k)).assign(domain=name) for name, k in probes.items()]
    seen = pd.concat(tables[:4], ignore_index=True)
    law = CrossDomainLaw.fit(seen, probes, starts=8)
    new = tables[4]
    predicted = law.predict(new["N"], new["D"], new["r_d"], *probes["d4"])
    without = fit_law(seen.drop(columns="domain"), starts=8)
    error, blind = (
        float(np.abs(p / new["loss_domain"] - 1).mean())
        for p in (predicted, without.predict(1e5, new["D"], new["r_d"]))
    )
    assert error < 0.02
    assert error < 0.3 * blind
    with pytest.raises(TableError, match="no probe of domain d0"):
        CrossDomainLaw.fit(seen, {k: v for k, v in probes.items() if k != "d0"})
    with pytest.raises(TableError, match="at least 3 of them"):
        CrossDomainLaw.fit(made(), probes)


def test_equation_probe_is_the_first_loss_and_the_slope_of_a_line() -> None:
    # 3.0, 2.9, 2.8 nats after 0, 0.5 and 1 million tokens: 0.2 nats per million.
    table = pd.DataFrame({"D": [0, 5e5, 1e6], "loss_domain": [3.0, 2.9, 2.8]})
    assert probe(table) == pytest.approx((3.0, 0.2))
    with pytest.raises(TableError, match="does not fall"):
        probe(table.assign(loss_domain=[3.0, 3.1, 3.2]))
    with pytest.raises(TableError, match="2 or more values of D"):
        probe(table[:1])


# -- the recipe


def recipe_of(**fields: Any) -> MixtureRatio:
    return validate(MixtureRatio, fields, where="test")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "runs.csv"
    made(sizes=(4e5,), ratios=(0.0, 0.33, 0.67, 1.0), noise=0.002).to_csv(path, index=False)
    return path


def test_property_the_recipe_leaves_the_choice_both_laws_and_the_table(written: Path, tmp_path: Path) -> None:
    result = execute(recipe_of(runs=str(written), starts=8, bootstrap=100), tmp_path / "run")
    truth = choose_ratio(GENERAL, DOMAIN, 4e5, 2e6, 0.03)
    assert result.metrics["score"] == pytest.approx(truth.r, abs=0.1)
    assert 0 < result.metrics["interval_width"] < 0.5
    assert result.metrics["items"] == 20
    laws = {t: json.loads((tmp_path / "run" / "model" / f"law_{t}.json").read_text()) for t in ("domain", "general")}
    # The figure without Headwater, as the README says it.
    p, r = laws["domain"], result.metrics["score"]
    loss = p["E"] + p["B"] * r ** p["eta"] / 2e6 ** p["beta"] + p["C"] / (r + p["eps"]) ** p["gamma"]
    assert loss == pytest.approx(result.metrics["loss_domain"])
    assert p["A"] == 0
    rows = pd.read_csv(tmp_path / "run" / "rows.csv")
    assert np.abs(rows["predicted_domain"] / rows["loss_domain"] - 1).max() < 0.02
    curve = json.loads((tmp_path / "run" / "curve.json").read_text())
    assert {len(curve[name]) for name in ("x", "y", "lo", "hi")} == {101}
    diagnosis = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    assert diagnosis["question"] == "mixture"
    assert any("one model size" in words for words in diagnosis["warnings"])
    assert f"{result.metrics['loss_domain']:.4g}" in diagnosis["advice"][0]
    assert result.data.keys() == {"table"}


def test_property_the_recipe_answers_for_scarce_text(written: Path, tmp_path: Path) -> None:
    result = execute(recipe_of(runs=str(written), starts=8, bootstrap=0, goal={"D_domain": 3e5}), tmp_path / "run")
    assert "interval_width" not in result.metrics
    assert "loss_general" not in result.metrics
    assert 0.01 <= result.metrics["score"] <= 1


def test_rejects_recipes(written: Path, tmp_path: Path) -> None:
    for fields, words in (
        ({"runs": str(written), "goal": {"tolerance": -1}}, "goal"),
        ({"runs": str(written), "goal": {"D_domain": 0}}, "goal"),
        ({"runs": str(written), "starts": 7}, "starts"),
        ({"runs": str(written), "bootstrap": 50}, "at least 100 resamples"),
        ({"runs": {"models": ["m"], "domain": "d", "general": "g", "tokens": 10, "ratios": [0, 50, 100]}}, "percent"),
    ):
        with pytest.raises(RecipeError, match=words):
            recipe_of(**fields)
    with pytest.raises(FileNotFoundError, match="no table"):
        execute(recipe_of(runs=str(tmp_path / "none.csv")), tmp_path / "a")
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(TableError, match=r"\.csv or \.parquet file; got \.json"):
        execute(recipe_of(runs=str(tmp_path / "t.json")), tmp_path / "b")


def test_learns_the_plan_makes_its_own_runs(tiny_causal: Path, corpora: dict[str, Path], tmp_path: Path) -> None:
    plan = {
        "models": [str(tiny_causal)],
        "domain": str(corpora["domain"]),
        "general": str(corpora["general"]),
        "ratios": [0, 0.5, 1],
        "tokens": 256 * 16,
        "evaluations": 4,
        "lr": 1e-2,
        "batch_tokens": 256,
        "seq_len": 32,
    }
    result = execute(recipe_of(runs=plan, starts=8, bootstrap=0, goal={"tolerance": 0.05}), tmp_path / "run")
    assert result.metrics["items"] == 12
    assert result.cost["tokens"] == 3 * 256 * 16
    rows = pd.read_csv(tmp_path / "run" / "rows.csv")
    last = rows[rows["D"] == rows["D"].max()].set_index("r_d")
    assert last.loc[0.0, "loss_domain"] > last.loc[0.5, "loss_domain"] > last.loc[1.0, "loss_domain"]
    assert last.loc[0.0, "loss_general"] < last.loc[0.5, "loss_general"] < last.loc[1.0, "loss_general"]


def test_equation_a_plan_has_a_run_for_each_size_and_mixture() -> None:
    plan = RunPlan(models=["a", "b"], domain="d", general="g", ratios=[1, 0, 0.25], tokens=100)  # type: ignore[arg-type,list-item]
    recipes = plan.recipes(seed=3)
    assert list(recipes) == [f"model{i}-r{r}" for i in (0, 1) for r in ("0", "0.25", "1")]
    quarter, none = recipes["model1-r0.25"], recipes["model0-r0"]
    assert (quarter["domain"]["name"], quarter["replay"], quarter["seed"]) == ("d", 0.75, 3)
    assert (none["domain"]["name"], none["general"]["name"], none["replay"]) == ("g", "d", 0.0)
    assert quarter["optim"]["schedule"] == "constant"


def test_learns_claim_runs_at_smoke_scale(tmp_path: Path) -> None:
    from headwater.claims.dcpt_law import CLAIM
    from headwater.core.claim import judge

    measured = CLAIM.measure("smoke", 100, tmp_path / "claim")
    verdict = judge(CLAIM, "smoke", {100: measured})
    assert verdict["verdict"] == "inconclusive"
    assert len(verdict["parts"]) == 6
    assert all(math.isfinite(value) for arm in measured.arms.values() for value in arm.values())
    assert min(measured.arms[arm]["regret"] for arm in ("law", "additive", "copy")) >= -1e-9, "nothing beats the best"
