"""The leaderboard: what every contestant of a comparison measured, spent and is worth, with its uncertainty."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from headwater.core.catalogue import Catalogue
from headwater.core.family import Axis, Family
from headwater.core.recommend import Recommendation, recommend
from headwater.core.run import Result
from headwater.core.standing import Cell, Difference, Items, Measured, Standing, difference, estimate, pareto
from headwater.core.stats import holm

__all__ = ["Finished", "Leaderboard", "Row", "Table", "Trials", "build_leaderboard"]

FORMAT = 1
Fields = dict[str, Any]  # Any: recipe fields, JSON data


@dataclass(frozen=True)
class Trials:
    """What tuning one contestant tried and chose.

    Attributes:
        count: trials run.
        chosen: dotted field -> value.
        points: of each trial: its values, validation score and price, or its error.
        cost: summed over the trials.
        error: why nothing could be chosen; the contestant has failed then.
        untuned: why this contestant was not tuned where others were.
    """

    count: int = 0
    chosen: Fields = field(default_factory=dict)
    points: tuple[Fields, ...] = ()
    cost: dict[str, float | None] = field(default_factory=dict)
    error: str = ""
    untuned: str = ""

    @classmethod
    def choose(
        cls, grid: Sequence[Fields], results: Sequence[Result], family: Family, limit: float | None, untuned: str
    ) -> Trials:
        """Pick the best validation score among trials whose validation price is within the limit.

        Where none is within it, the cheapest. The first of equals.
        """
        if not results:
            return cls(chosen=dict(grid[0]) if grid else {}, untuned=untuned)
        axis, price = family.selection, family.selection_price
        points: list[Fields] = []
        for point, result in zip(grid, results, strict=True):
            score = result.metrics.get(axis.metric, math.nan)
            error = result.error or ("" if math.isfinite(score) else f"the trial measured no {axis.metric}")
            points.append(
                {
                    "values": point,
                    "score": score if math.isfinite(score) else None,
                    "price": result.metrics.get(price) if price else None,
                    "error": error,
                }
            )
        cost = _total_cost(results, np.sum)
        usable = [p for p in points if not p["error"]]
        if not usable:
            return cls(len(points), {}, tuple(points), cost, f"every trial failed; the first: {points[0]['error']}")
        if limit is not None and all(p["price"] is not None for p in usable):
            cheapest = min(p["price"] for p in usable)
            usable = [p for p in usable if p["price"] <= max(limit, cheapest)]
        best = max(usable, key=lambda p: axis.sign * p["score"])
        return cls(len(points), best["values"], tuple(points), cost)


@dataclass(frozen=True)
class Finished:
    """A contestant after its runs: per seed the directory and the result."""

    name: str
    method: str
    reference: bool
    trials: Trials
    runs: Mapping[int, tuple[Path, Result]]


@dataclass(frozen=True)
class Row:
    """One contestant on the leaderboard.

    Attributes:
        name: what the comparison calls it.
        method: its id in the catalogue.
        short: the method's name in the catalogue.
        reference: whether it stands in every comparison.
        status: ``done``; ``partial``: some seeds failed; ``failed``: all did.
        reason: why seeds failed.
        unit: of its losses; rows of different units are never ranked on one axis.
        cells: metric -> mean and interval.
        differences: metric -> this row minus the baseline.
        standing: with respect to the front of gain and price; None where it measured no gain.
        cost: mean per run; None for an amount that could not be counted.
        trials: what tuning did.
        runs: per seed: directory below the comparison's, status, seconds, error.
        notes: facts and warnings its runs left.
    """

    name: str
    method: str
    short: str
    reference: bool
    status: Literal["done", "partial", "failed"]
    reason: str
    unit: str
    cells: dict[str, Cell]
    cost: dict[str, float | None]
    trials: Trials
    runs: tuple[Fields, ...]
    notes: dict[str, str]
    differences: dict[str, Difference] = field(default_factory=dict)
    standing: Standing | None = None


@dataclass(frozen=True)
class Table:
    """Rows that may be ranked on one axis, best gain first."""

    unit: str
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Leaderboard:
    """A finished comparison."""

    title: str
    family: Fields
    columns: tuple[Axis, ...]
    baseline: str
    seeds: tuple[int, ...]
    limit: float | None
    budget: Fields | None
    rows: tuple[Row, ...]
    tables: tuple[Table, ...]
    recommended: Recommendation
    environment: Fields

    @property
    def recommendation(self) -> str:
        """The answer in plain words."""
        return " ".join(self.recommended.sentences)

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> Fields:
        """Plain JSON data."""
        data: Fields = {"format": FORMAT, **asdict(self)}
        for row, mine in zip(data["rows"], self.rows, strict=True):
            row["standing"] = mine.standing and {**row["standing"], "text": str(mine.standing)}
        return data

    def to_csv(self) -> str:
        """One line per row: means, intervals, differences from the baseline, standing and cost."""
        metrics = [axis.metric for axis in self.columns]
        costs = sorted({name for row in self.rows for name in row.cost})
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        parts = ("", "/low", "/high", "/minus_baseline", "/minus_baseline_low", "/minus_baseline_high", "/p_holm")
        head = ["name", "method", "reference", "status", "seeds", "unit", "standing"]
        head += [f"{metric}{part}" for metric in metrics for part in parts]
        writer.writerow([*head, *(f"cost/{name}" for name in costs), "cost/trials", "reason"])
        for row in self.rows:
            done = sum(run["status"] == "done" for run in row.runs)
            line: list[Any] = [row.name, row.method, row.reference, row.status, done, row.unit, row.standing or ""]
            for metric in metrics:
                cell, found = row.cells.get(metric), row.differences.get(metric)
                line += [cell.mean, cell.low, cell.high] if cell else [""] * 3
                line += [found.mean, found.low, found.high, found.p_holm] if found else [""] * 4
            line += [*(row.cost.get(name, "") for name in costs), row.trials.count, row.reason]
            writer.writerow(["" if value is None else value for value in line])
        return out.getvalue()

    def to_text(self) -> str:
        """The tables for a terminal."""
        shown = [axis for axis in self.columns if any(axis.metric in row.cells for row in self.rows)][:3]
        lines = []
        for table in self.tables:
            head = ["", *(f"{axis.label}{f' ({axis.unit})' if axis.unit else ''}" for axis in shown), "standing"]
            body = [head]
            for row in map(self.row, table.rows):
                cells = [_cell_text(row.cells.get(axis.metric), axis) for axis in shown]
                mark = " (baseline)" if row.name == self.baseline else ""
                body.append([row.name + mark, *cells, str(row.standing or "")])
            widths = [max(len(line[i]) for line in body) for i in range(len(head))]
            title = [f"Measured in {table.unit}:"] if len(self.tables) > 1 else []
            lines += [*title, *("  ".join(map(str.ljust, line, widths)).rstrip() for line in body), ""]
        for row in self.rows:
            if row.status != "done":
                reason = "".join(
                    c if c.isprintable() else " " for c in row.reason
                )  # no escape codes reach the terminal
                lines.append(f"{row.name}: {row.status}: {reason}")
        return "\n".join(lines).rstrip()


def _cell_text(cell: Cell | None, axis: Axis) -> str:
    if cell is None:
        return "not measured"
    if cell.low is None or cell.high is None:
        return f"{cell.mean:{axis.format}}"
    return f"{cell.mean:{axis.format}} [{cell.low:{axis.format}}, {cell.high:{axis.format}}]"


def build_leaderboard(
    family: Family,
    finished: Sequence[Finished],
    out: Path,
    *,
    title: str,
    baseline: str,
    seeds: Sequence[int],
    limit: float | None,
    budget: Fields | None,
) -> Leaderboard:
    """Judge what the runs measured.

    Args:
        family: says which metrics matter.
        finished: in the order of the comparison.
        out: the comparison's directory; paths on the leaderboard are relative to it.
        title: of the report.
        baseline: row that the others are tested against.
        seeds: of the comparison.
        limit: highest price that a recommended row may have.
        budget: of every run.
    """
    measured = {one.name: _measured(one, family) for one in finished}
    rows = {one.name: _row(one, measured[one.name], family, out) for one in finished}
    units = list(dict.fromkeys(rows[name].unit for name in (baseline, *rows) if rows[name].status != "failed"))
    tables = []
    for unit in units:
        names = [name for name, row in rows.items() if row.unit == unit and row.status != "failed"]
        names.sort(key=lambda name: -family.gain.sign * rows[name].cells[family.gain.metric].mean)
        tables.append(Table(unit, tuple(names)))
        _compare_rows(rows, measured, names, baseline, family, seeds)
    first = {name: rows[name] for name in (tables[0].rows if tables else ())}
    others = [row for row in rows.values() if row.name not in first]
    ranked = [name for table in tables for name in table.rows]
    return Leaderboard(
        title=title,
        family=asdict(family),
        columns=(*family.axes, *family.columns, *_downstream(rows.values())),
        baseline=baseline,
        seeds=tuple(seeds),
        limit=limit,
        budget=budget,
        rows=tuple(rows[name] for name in [*ranked, *(name for name in rows if name not in ranked)]),
        tables=tuple(tables),
        recommended=recommend(first, measured, family, baseline, limit, seeds, others),
        environment=_environment(finished),
    )


def _measured(one: Finished, family: Family) -> Measured:
    done = {seed: (directory, result) for seed, (directory, result) in one.runs.items() if result.status == "done"}
    items: dict[int, dict[str, Items]] = {}
    for seed, (directory, _) in done.items():
        path = directory / "items.json"
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            metrics = {axis.metric for axis in (*family.axes, *family.columns)}
            items[seed] = {
                m: Items(tuple(stored[m]["ids"]), tuple(stored[m]["values"])) for m in metrics & stored.keys()
            }
    return Measured({seed: result.metrics for seed, (_, result) in done.items()}, items)


def _row(one: Finished, measured: Measured, family: Family, out: Path) -> Row:
    runs, reasons = [], [one.trials.error] if one.trials.error else []
    gained = set(measured.seeds(family.gain.metric))
    for seed, (directory, result) in one.runs.items():
        missing = "" if seed in gained else result.error or f"the run measured no {family.gain.metric}"
        if missing:
            reasons.append(f"seed {seed}: {missing}")
        runs.append(
            {
                "seed": seed,
                "directory": directory.relative_to(out).as_posix(),
                "status": result.status,
                "seconds": result.seconds,
                "error": missing or None,
            }
        )
    done = [result for _, result in one.runs.values() if result.status == "done"]
    metrics = sorted({metric for result in done for metric in result.metrics})
    entry = Catalogue.load()[one.method]
    return Row(
        name=one.name,
        method=one.method,
        short=entry.short,
        reference=one.reference,
        status="failed" if not gained else "partial" if reasons else "done",
        reason="; ".join(reasons),
        unit=next((result.notes["unit"] for result in done if result.notes.get("unit")), ""),
        cells={metric: cell for metric in metrics if (cell := estimate(measured, metric)) is not None},
        cost=_total_cost(done, np.mean),
        trials=one.trials,
        runs=tuple(runs),
        notes={key: value for result in done for key, value in result.notes.items()},
    )


def _compare_rows(
    rows: dict[str, Row],
    measured: Mapping[str, Measured],
    names: Sequence[str],
    baseline: str,
    family: Family,
    seeds: Sequence[int],
) -> None:
    """Fill in, for the rows of one unit, differences from the baseline and standings."""
    axes = [axis for axis in family.axes if all(axis.metric in rows[name].cells for name in names)]
    standings = pareto({name: measured[name] for name in names}, axes, seeds, tie=family.tie)
    tested = [name for name in names if name != baseline] if baseline in names else []
    found: dict[str, dict[str, Difference]] = {name: {} for name in names}
    for axis in family.axes:
        of = {name: d for name in tested if (d := difference(measured[name], measured[baseline], axis.metric))}
        adjusted = holm([d.p_value for d in of.values()])
        for (name, d), p in zip(of.items(), adjusted, strict=True):
            found[name][axis.metric] = replace(d, p_holm=None if d.low is None else float(p))
    for name in names:
        rows[name] = replace(rows[name], differences=found[name], standing=standings[name])


_LOSSES = frozenset({"cross_entropy", "cer", "wer"})
"""Figures of a downstream task of which less is better."""


def _downstream(rows: Any) -> tuple[Axis, ...]:  # Any: an iterable of rows, as dict.values() gives it
    """The user's tasks, in whatever unit the losses are: higher is better by declaration."""
    names = {metric for row in rows for metric in row.cells if metric.startswith("downstream/")}
    kept = sorted(name for name in names if not name.endswith(("_start", "/gain")))
    return tuple(
        Axis(
            name,
            name.removeprefix("downstream/").replace("/", ": "),
            "lower" if name.rpartition("/")[2] in _LOSSES else "higher",
        )
        for name in kept
    )


def _total_cost(results: Sequence[Result], reduce: Any) -> dict[str, float | None]:  # Any: np.sum or np.mean
    names = list(dict.fromkeys(name for result in results for name in result.cost))
    cost: dict[str, float | None] = {"elapsed_seconds": float(reduce([r.seconds for r in results]))} if results else {}
    for name in names:
        amounts = [result.cost.get(name) for result in results]
        # One unknown amount makes the sum unknown; it is not taken as zero.
        cost[name] = float(reduce(amounts)) if all(amount is not None for amount in amounts) else None
    return cost


def _environment(finished: Sequence[Finished]) -> Fields:
    for one in finished:
        for directory, result in one.runs.values():
            path = directory / "environment.json"
            if result.status == "done" and path.exists():
                found: Fields = json.loads(path.read_text(encoding="utf-8"))
                return found
    return {}
