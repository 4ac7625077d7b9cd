"""Comparisons: what is refused before anything runs, what continues, and what the figures are made to say."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

sys.path.insert(0, str(Path(__file__).parent))
import toy_family  # tests are imported by path

from headwater.core.compare import Axis, Comparison, ComparisonFailed, compare
from headwater.core.leaderboard import Leaderboard, Trials
from headwater.core.recipe import RecipeError
from headwater.core.run import Result
from headwater.core.standing import Items, Measured, difference, estimate, pareto
from headwater.core.yamlio import dump_yaml

GAIN, PRICE = Axis("gain", "Gain", "higher"), Axis("price", "Price", "lower")


@pytest.fixture(scope="module", autouse=True)
def _toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with toy_family.installed(tmp_path_factory.mktemp("site")):
        yield


def parse(contestants: dict[str, Any], **fields: Any) -> Comparison:
    data = {"family": "toyfamily.domain", "seeds": [0, 1, 2], "contestants": contestants, "workers": 2, **fields}
    return Comparison.parse(dump_yaml(data))


def good(gain: float = 0.3, price: float = 0.02, **fields: Any) -> dict[str, Any]:
    steps = (0.0, 0.004, -0.004, 0.001)
    return {"method": "tuned", "gain": [gain + s for s in steps], "price": [price + s / 10 for s in steps], **fields}


def measured(gain: list[float], price: list[float] | None = None) -> Measured:
    price = price or [0.0] * len(gain)
    return Measured({seed: {"gain": g, "price": p} for seed, (g, p) in enumerate(zip(gain, price, strict=True))})


# What a comparison does


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Leaderboard, list[str]]:
    """A comparison in which one contestant wins, one fails always, one fails on a seed, one's process is killed."""
    out = tmp_path_factory.mktemp("finished")
    lines: list[str] = []
    comparison = parse(
        {
            "winner": good(),
            "broken": {"method": "fails"},
            "shaky": {"method": "fails", "on": [1], "gain": [0.2, 0.2, 0.21], "price": [0.01]},
            "killed": {"method": "dies"},
            "masked": good(unit="bits/mask"),
        },
        shared={"tally": str(out / "tally")},
    )
    return out, compare(comparison, out, progress=lines.append), lines


def test_property_failures_are_reported_and_the_rest_finishes(finished: tuple[Path, Leaderboard, list[str]]) -> None:
    _, board, lines = finished
    status = {row.name: row.status for row in board.rows}
    assert status == {
        "winner": "done", "usual": "done", "floor": "done", "masked": "done",
        "shaky": "partial", "broken": "failed", "killed": "failed",
    }  # fmt: skip
    assert "ArithmeticError: broken <script>" in board.row("broken").reason
    assert "worker died, signal 9 (SIGKILL" in board.row("killed").reason
    assert board.row("shaky").reason.startswith("seed 1: ArithmeticError")
    assert len(board.row("shaky").cells["toy/gain"].values) == 2
    assert len(lines) == 21
    assert "Failed, and not judged: broken and killed." in board.recommendation


def test_property_other_unit_stands_in_a_table_of_its_own(finished: tuple[Path, Leaderboard, list[str]]) -> None:
    _, board, _ = finished
    assert [(table.unit, set(table.rows)) for table in board.tables] == [
        ("bits", {"winner", "usual", "floor", "shaky"}),
        ("bits/mask", {"masked"}),
    ]
    assert board.row("masked").differences == {}
    assert "masked: measured in bits/mask, and so not ranked with the rest." in board.recommendation
    assert "masked" not in {name for row in board.rows if row.standing for name in row.standing.by}


def test_learns_the_clear_winner_is_recommended(finished: tuple[Path, Leaderboard, list[str]]) -> None:
    _, board, _ = finished
    assert board.recommended.row == "winner"
    assert board.recommended.beats_baseline
    # Differences 0.200, 0.194, 0.176 on three seeds.
    assert board.recommendation.startswith(
        "Take winner: its gain of 0.300 bits [0.290, 0.310] is clearly better than that of the baseline usual "
        "(difference +0.190 [+0.159, +0.221], over 3 seeds)."
    )
    assert str(board.row("usual").standing) == "front"  # it forgets nothing, and the winner pays 0.02
    assert board.row("winner").standing.label == "front"


def test_property_outputs_agree_and_paths_are_relative(finished: tuple[Path, Leaderboard, list[str]]) -> None:
    out, board, _ = finished
    stored = json.loads((out / "leaderboard.json").read_text())
    table = {row["name"]: row for row in csv.DictReader(io.StringIO((out / "leaderboard.csv").read_text()))}
    assert [row["name"] for row in stored["rows"]] == [row.name for row in board.rows] == list(table)
    assert float(table["winner"]["toy/gain"]) == board.row("winner").cells["toy/gain"].mean
    assert table["broken"]["toy/gain"] == ""
    assert all((out / run["directory"] / "result.json").exists() for run in stored["rows"][0]["runs"])
    assert (out / "report.html").exists()
    assert Comparison.load(out / "comparison.yaml").contestants.keys() == {
        "winner",
        "broken",
        "shaky",
        "killed",
        "masked",
    }
    assert "winner" in board.to_text()


def test_property_second_call_runs_only_what_failed(finished: tuple[Path, Leaderboard, list[str]]) -> None:
    out, board, _ = finished
    before = Counter((out / "tally").read_text().split())
    again = compare(Comparison.load(out / "comparison.yaml"), out)
    after = Counter((out / "tally").read_text().split())
    assert {name.split("/")[0] for name in after - before} == {"broken", "shaky"}
    assert json.dumps(again.to_dict()["rows"][0]) == json.dumps(board.to_dict()["rows"][0])


def test_property_changed_field_runs_in_a_new_directory(tmp_path: Path) -> None:
    tally = tmp_path / "tally"
    shared = {"tally": str(tally)}
    compare(parse({"a": good(), "b": good()}, shared=shared, seeds=[0]), tmp_path)
    compare(parse({"a": good(), "b": good(gain=0.4)}, shared=shared, seeds=[0, 1]), tmp_path)
    counts = Counter(line.split("/")[0] for line in tally.read_text().split())
    assert counts == {"a": 2, "b": 3, "usual": 2, "floor": 2}


STOPPED = """
import sys, pathlib
from headwater.core.compare import Comparison, compare
compare(Comparison.load(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2]), grace_seconds=20)
"""


def test_fault_stopped_comparison_continues(tmp_path: Path) -> None:
    out, tally, release = tmp_path / "out", tmp_path / "tally", tmp_path / "release"
    slow = {"method": "slow", "release": str(release), "gain": [0.2]}
    comparison = parse({"slow": slow, "late": good()}, shared={"tally": str(tally)}, seeds=[0], workers=1)
    (tmp_path / "comparison.yaml").write_text(comparison.to_yaml())
    command = [sys.executable, "-c", STOPPED, str(tmp_path / "comparison.yaml"), str(out)]
    caller = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 20
    while not list(out.glob("runs/slow/*/began")):
        assert time.monotonic() < end
        time.sleep(0.02)
    caller.send_signal(signal.SIGINT)
    assert caller.wait(20) != 0
    assert list(out.glob("runs/slow/*/checkpointed"))
    assert Counter(line.split("/")[0] for line in tally.read_text().split()) == {"floor": 1, "usual": 1}

    release.touch()
    board = compare(comparison, out)
    assert {row.status for row in board.rows} == {"done"}
    assert Counter(line.split("/")[0] for line in tally.read_text().split()) == {
        "floor": 1,
        "usual": 1,
        "slow": 1,
        "late": 1,
    }


def test_fault_all_failing_is_an_error_with_reasons(tmp_path: Path) -> None:
    comparison = parse({"a": {"method": "fails"}}, without=["floor", "usual"], baseline="a", seeds=[0])
    with pytest.raises(ComparisonFailed, match="a: seed 0: ArithmeticError: broken"):
        compare(comparison, tmp_path)


# Tuning


def test_property_tuning_picks_on_validation_and_counts_its_trials(tmp_path: Path) -> None:
    tally = tmp_path / "tally"
    comparison = parse(
        {"a": good(), "own": good(tune={"optim.lr": [0.31, 0.9, 0.2]})},
        shared={"tally": str(tally)},
        tune={"optim.lr": [0.1, 0.25, 0.6]},
        seeds=[0],
    )
    board = compare(comparison, tmp_path)
    assert {row.name: (row.trials.count, row.trials.chosen) for row in board.rows} == {
        "a": (3, {"optim.lr": 0.25}),
        "own": (3, {"optim.lr": 0.31}),
        "usual": (3, {"optim.lr": 0.25}),
        "floor": (0, {}),
    }
    assert board.row("floor").trials.untuned == "'bare' has no field 'optim.lr'"
    assert board.row("a").trials.cost["steps"] == 30
    counts = Counter(line.split("-")[0] for line in tally.read_text().split())
    assert counts["a/tune"] == 3
    assert counts["a/seed"] == 1
    (recipe,) = tmp_path.glob("runs/a/seed-0-*/recipe.yaml")
    assert "lr: 0.25" in recipe.read_text()


def choose(points: list[tuple[float, float]], limit: float | None) -> Trials:
    from toyfamily.domain.base import FAMILY

    results = [Result("done", {"valid/gain": g, "valid/price": p}, {}, 1.0) for g, p in points]
    return Trials.choose([{"x": i} for i in range(len(points))], results, FAMILY, limit, "")


def test_equation_tuning_takes_the_best_score_within_the_limit_else_the_cheapest() -> None:
    points = [(0.1, 0.0), (0.3, 0.2), (0.5, 0.4), (0.3, 0.1)]
    assert choose(points, None).chosen == {"x": 2}
    assert choose(points, 0.25).chosen == {"x": 1}  # the first of two equals within the limit
    assert choose(points[1:], 0.05).chosen == {"x": 2}  # none is within; 0.1 is the cheapest


def test_fault_failed_trials_are_passed_over_and_all_failing_fails_the_row() -> None:
    from toyfamily.domain.base import FAMILY

    bad, fine = Result("failed", {}, {}, 1.0, "boom"), Result("done", {"valid/gain": 0.1}, {}, 1.0)
    assert Trials.choose([{"x": 0}, {"x": 1}], [bad, fine], FAMILY, None, "").chosen == {"x": 1}
    assert (
        Trials.choose([{"x": 0}, {"x": 1}], [bad, bad], FAMILY, None, "").error == "every trial failed; the first: boom"
    )


# What is refused before anything runs


@pytest.mark.parametrize(
    ("contestants", "fields", "words"),
    [
        ({"a": {"method": "tuned"}}, {"without": ["flor"]}, "without: no reference 'flor'. Did you mean 'floor'"),
        ({"a": {"method": "tuned"}}, {"baseline": "usul"}, "baseline: no row 'usul'. Did you mean 'usual'"),
        ({"a": {"method": "tuned"}}, {"without": ["usual"]}, "baseline: no row 'usual'"),
        ({"a": {"method": "tuned"}}, {"family": "toyfamily.domian"}, "there is no stage 'toyfamily.domian'"),
        ({"a": {"method": "tuned"}}, {"family": "domian"}, "Did you mean 'domain'"),
        ({"a": {"method": "tuned"}}, {"family": "../x"}, "is no stage"),
        ({"floor": {"method": "tuned"}}, {}, "contestants.floor: a reference has this name"),
        ({"../a": {"method": "tuned"}}, {}, "cannot name a file or run"),
        ({"a": {"method": "tund"}}, {}, "Did you mean 'tuned'"),
        ({"a": {"method": "tuned", "gian": [1.0]}}, {}, "contestants.a: unknown field 'gian'. Did you mean 'gain'"),
        ({"a": {"method": "tuned", "seed": 3}}, {}, "`seed` is set by the comparison"),
        ({"a": {"method": "tuned"}}, {"seeds": []}, "seeds"),
        ({"a": {"method": "tuned"}}, {"seeds": [1, 1]}, "seeds must be different"),
        ({"a": {"method": "tuned"}}, {"tune": {"optim.lr": [1.0]}, "tune_seed": 2}, "tune_seed 2 is one of the seeds"),
        ({"a": {"method": "tuned"}}, {"tune": {"optim.lr": []}}, "'optim.lr' has no values"),
        ({"a": {"method": "tuned"}}, {"tune": {"budget.steps": [1, 2]}}, "'budget.steps' is the same for all"),
        (
            {"a": {"method": "tuned"}},
            {"tune": {"optim.rl": [1.0, 2.0]}},
            "no field 'optim.rl'; did you mean 'optim.lr'",
        ),
        ({"a": {"method": "tuned"}}, {"tune": {"optim.lr": [1.0, "x"]}}, "field 'optim.lr'"),
        (
            {"a": {"method": "tuned", "tune": {"optim.lr": [1.0]}}},
            {"tune": {"optim.lr": [1.0, 2.0]}},
            "contestants.a.tune: 1 points, where the shared grid has 2",
        ),
        (
            {"a": {"method": "tuned", "tune": {}}},
            {"tune": {"optim.lr": [1.0, 2.0]}},
            "0 points, where the shared grid has 2",
        ),
        ({"a": {"method": "tuned", "tune": {"optim.lr": [1.0, 2.0]}}}, {}, "2 points, where the shared grid has 0"),
        (
            {"a": {"method": "tuned", "tune": {"lr": [1.0]}}},
            {"tune": {"optim.lr": [1.0]}},
            "contestants.a.tune: 'tuned' has no",
        ),
        ({"a": {"method": "tuned", "tune": 3}}, {}, "expected dotted fields with lists of values; got 3"),
        ({"a": {"method": "tuned", "budget": {"steps": 99}}}, {}, "Give one budget to all"),
    ],
)
def test_rejects_what_could_not_be_compared(contestants: dict[str, Any], fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(contestants, **fields)
    assert words in str(caught.value)


def test_rejects_method_of_another_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    import toyfamily.domain.base as base

    monkeypatch.setattr(base, "FAMILY", dataclasses.replace(base.FAMILY, stage="adapt"))
    with pytest.raises(RecipeError, match="'bare' is of stage domain; this comparison is of adapt"):
        parse({"a": good()})


def test_property_contestants_fields_win_and_mappings_merge() -> None:
    comparison = parse(
        {"a": {"method": "tuned", "optim": {"lr": 0.7}, "note": "mine"}}, shared={"note": "ours", "unit": "x"}
    )
    recipe = next(e for e in comparison.entrants() if e.name == "a").recipe(0)
    assert (recipe.optim.lr, recipe.note, recipe.unit) == (0.7, "mine", "x")  # type: ignore[attr-defined]


def test_property_a_reference_may_be_replaced_under_its_name() -> None:
    comparison = parse({"usual": good()}, without=["usual"])
    assert [(e.name, e.reference) for e in comparison.entrants()] == [("floor", True), ("usual", False)]


# What the figures say


def test_equation_interval_of_three_seeds_is_the_t_interval() -> None:
    cell = estimate(measured([0.1, 0.2, 0.3]), "gain")
    assert cell is not None
    half = scipy_stats.t.ppf(0.975, 2) * 0.1 / np.sqrt(3)  # sd of 0.1, 0.2, 0.3 is 0.1
    assert (cell.mean, cell.low, cell.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert cell.units == "seeds"


def test_property_items_widen_the_interval_only_if_they_are_the_same_in_all_runs() -> None:
    values = tuple(np.linspace(-1, 1, 20))
    seeds = {s: {"gain": 0.1 + s / 1000} for s in range(3)}

    def side(ids: str, shift: float = 0.0) -> Measured:
        kept = {
            s: {"gain": Items(tuple(f"{ids}{i}" for i in range(20)), tuple(v + m["gain"] + shift for v in values))}
            for s, m in seeds.items()
        }
        return Measured(seeds, kept)

    with_items, bare = estimate(side("a"), "gain"), estimate(Measured(seeds), "gain")
    assert with_items is not None
    assert bare is not None
    assert with_items.units == "seeds and items"
    assert with_items.high - with_items.low > 10 * (bare.high - bare.low)  # type: ignore[operator]
    assert estimate(side("a", shift=0.5), "gain").units == "seeds"  # items that do not average to the metric
    assert difference(side("a"), side("b"), "gain").units == "seeds"
    assert difference(side("a"), side("a"), "gain").units == "seeds and items"


def test_property_items_that_runs_keep_are_paired(tmp_path: Path) -> None:
    items = [[-0.1, 0.1, -0.05, 0.05]]  # around the run's gain
    board = compare(parse({"a": good()}, shared={"items": items}), tmp_path)
    assert board.row("a").cells["toy/gain"].units == "seeds and items"
    assert board.row("a").cells["toy/price"].units == "seeds"
    found = board.row("a").differences["toy/gain"]
    assert found.units == "seeds and items"
    # The items differ by 0.1 within a row but not between the rows, so pairing removes them.
    assert found.high - found.low < board.row("a").cells["toy/gain"].high - board.row("a").cells["toy/gain"].low


def test_degenerate_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    board = compare(parse({"a": good()}, seeds=[0]), tmp_path)
    cell = board.row("a").cells["toy/gain"]
    assert (cell.low, cell.high) == (None, None)
    assert board.row("a").differences["toy/gain"].p_holm is None
    assert {str(row.standing) for row in board.rows} == {"undecided (one seed)"}
    assert "single observation" in board.recommendation
    assert not board.recommended.beats_baseline
    assert "[" not in board.to_text()


def test_degenerate_measurement_that_is_missing_or_not_finite_is_left_out() -> None:
    row = Measured({0: {"gain": 0.1}, 1: {"gain": float("nan")}, 2: {}})
    assert estimate(row, "gain").values == (0.1,)
    assert estimate(row, "price") is None
    assert difference(row, measured([0.0, 0.0, 0.0]), "gain").num_seeds == 1


def brute_standings(rows: dict[str, Measured], tie: float) -> dict[str, tuple[str, set[str]]]:
    """The definition, pair by pair, with the paired t interval written out."""

    def ends(a: Measured, b: Measured, axis: Axis) -> tuple[float, float]:
        d = np.array([axis.sign * (a.metrics[s][axis.metric] - b.metrics[s][axis.metric]) for s in a.metrics])
        half = scipy_stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d))
        return d.mean() - half, d.mean() + half

    def wins(a: str, b: str) -> bool:
        (g, _), (p, _) = ends(rows[a], rows[b], GAIN), ends(rows[a], rows[b], PRICE)
        return (g > 0 and p > -tie) or (p > 0 and g > -tie)

    found = {}
    for name in rows:
        others = [o for o in rows if o != name]
        by = {o for o in others if wins(o, name) and not wins(name, o)}
        open_ = set()
        for other in others:
            pairs = [ends(rows[name], rows[other], axis) for axis in (GAIN, PRICE)]
            if not (any(low > 0 for low, _ in pairs) or all(low > -tie and high < tie for low, high in pairs)):
                open_.add(other)
        found[name] = ("dominated", by) if by else ("undecided", open_) if open_ else ("front", set())
    return found


def test_oracle_dominance_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    labels: Counter[str] = Counter()
    for _ in range(40):
        rows = {
            name: measured(
                list(rng.choice([0.0, 0.1, 0.2]) + rng.normal(0, scale, 4)),
                list(rng.choice([0.0, 0.05]) + rng.normal(0, scale, 4)),
            )
            for name, scale in zip("abcde", rng.choice([0.001, 0.01, 0.05], 5), strict=True)
        }
        expected = brute_standings(rows, 0.005)
        got = pareto(rows, [GAIN, PRICE], [0, 1, 2, 3])
        assert {name: (s.label, set(s.by)) for name, s in got.items()} == expected
        labels.update(s.label for s in got.values())
    assert all(labels[label] > 20 for label in ("front", "dominated", "undecided"))  # the cases did occur


def test_equation_dominance_on_hand_made_rows() -> None:
    rows = {
        "best": measured([0.30, 0.31, 0.30], [0.020, 0.021, 0.020]),
        "worse": measured([0.20, 0.21, 0.20], [0.022, 0.023, 0.022]),  # clearly less gain, price 0.002 worse
        "cheap": measured([0.10, 0.11, 0.10], [0.0, 0.0, 0.0]),  # less gain, but no price
        "noisy": measured([0.10, 0.50, 0.30], [0.02, 0.02, 0.02]),
        "between": measured([0.20, 0.21, 0.20], [0.010, 0.011, 0.010]),  # pays less than best by twice the tie
    }
    found = {name: str(standing) for name, standing in pareto(rows, [GAIN, PRICE], [0, 1, 2]).items()}
    assert found == {
        "best": "undecided (too few seeds)",  # noisy may be better
        "worse": "dominated by best",
        "cheap": "front",
        "noisy": "undecided (too few seeds)",
        "between": "front",
    }


def test_degenerate_equal_rows_share_the_front_and_do_not_dominate_each_other() -> None:
    same = [0.1, 0.2, 0.3]
    rows = {"a": measured(same), "b": measured(same), "c": measured([g + 0.001 for g in same], [0.001] * 3)}
    assert {str(s) for s in pareto(rows, [GAIN, PRICE], [0, 1, 2]).values()} == {"front"}


# What the recommendation says


def board_of(tmp_path: Path, contestants: dict[str, Any], **fields: Any) -> Leaderboard:
    return compare(parse(contestants, **fields), tmp_path)


def test_property_nothing_clearly_beats_the_baseline_is_an_answer(tmp_path: Path) -> None:
    board = board_of(tmp_path, {"noisy": {"method": "tuned", "gain": [0.05, 0.2, 0.15]}})
    assert board.recommended.row == "usual"
    assert not board.recommended.beats_baseline
    assert board.recommendation.startswith("Nothing clearly beats usual, whose gain is 0.110 bits")
    assert "The best mean is that of noisy: +0.023" in board.recommendation
    assert "probably have been seen" in board.recommendation


def test_property_many_rows_need_stronger_evidence(tmp_path: Path) -> None:
    # One row alone is clear (p = 0.015); among seven whose p-values are adjusted it is not.
    lucky = {"method": "tuned", "gain": [0.16, 0.15, 0.18]}
    one = board_of(tmp_path / "one", {"lucky": lucky}, without=["floor"])
    assert one.row("lucky").differences["toy/gain"].p_holm == pytest.approx(0.0153, abs=1e-4)
    noise = itertools.cycle([[0.0, 0.3, 0.1], [0.3, 0.0, 0.0], [0.1, 0.1, 0.2]])
    many = {f"n{i}": {"method": "tuned", "gain": next(noise)} for i in range(6)}
    seven = board_of(tmp_path / "seven", {"lucky": lucky, **many}, without=["floor"])
    assert one.recommended.row == "lucky"
    assert seven.recommended.row == "usual"


def test_property_limit_excludes_rows_by_the_upper_end_of_their_interval(tmp_path: Path) -> None:
    # Mean price 0.09 is below the limit of 0.1, its upper end is not.
    unsure = {"method": "tuned", "gain": [0.5, 0.51, 0.5], "price": [0.08, 0.10, 0.09]}
    board = board_of(tmp_path, {"unsure": unsure, "sure": good(price=0.05)}, forgetting_limit=0.1)
    assert board.recommended.row == "sure"
    assert "Not surely below the limit of 0.100 bits: unsure." in board.recommendation


def test_property_row_over_the_limit_is_not_denied_its_lead(tmp_path: Path) -> None:
    dear = {"method": "tuned", "gain": [0.5, 0.51, 0.5], "price": [0.5]}
    board = board_of(tmp_path / "three", {"dear": dear}, forgetting_limit=0.1)
    assert board.recommendation.startswith("Nothing below the limit on loss of ability clearly beats usual")
    one = board_of(tmp_path / "one", {"dear": dear}, forgetting_limit=0.1, seeds=[0])
    assert one.recommendation.startswith(
        "On this one seed, below the limit on loss of ability, usual has the best gain"
    )


def test_property_limit_that_no_row_meets_names_the_closest(tmp_path: Path) -> None:
    board = board_of(tmp_path, {"a": good(price=0.05)}, forgetting_limit=-0.1)
    assert board.recommended.row is None
    assert "No row's loss of ability is surely below the limit of -0.100 bits; closest is" in board.recommendation


def test_property_rows_that_cannot_be_told_apart_are_named(tmp_path: Path) -> None:
    twin = good()
    twin["gain"] = [0.299, 0.302, 0.297]
    board = board_of(tmp_path, {"a": good(), "b": twin})
    assert "In gain it cannot be told apart from b with 3 seeds." in board.recommendation


@pytest.mark.parametrize(
    "path", sorted(resources.files("headwater").joinpath("comparisons").iterdir()), ids=lambda path: path.name
)
def test_property_every_comparison_that_comes_with_the_package_has_entrants(path):
    comparison = Comparison.parse(path.read_text(encoding="utf-8"))
    entrants = {entrant.name: entrant for entrant in comparison.entrants()}
    assert set(comparison.contestants) < set(entrants)
    trials = {name: len(entrant.grid) for name, entrant in entrants.items() if not entrant.untuned}
    assert len(set(trials.values())) <= 1, "every contestant gets the same number of trials"
    for entrant in entrants.values():
        assert entrant.recipe(comparison.seeds[0]).seed == comparison.seeds[0]
