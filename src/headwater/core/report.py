"""Reports: one HTML file of a comparison, a run, a claim or a curation that anyone can open.

Nothing in it is fetched and nothing in it runs: a Content-Security-Policy forbids both. All text is escaped; text from
the user's data appears only where a run was asked for samples.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from headwater.core.cache import atomic_write_text
from headwater.core.family import Axis
from headwater.core.figures import Point, front_svg, histogram_svg, in_view, printable, short_count, trajectory_svg

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["write_report"]

Data = Mapping[str, Any]  # Any: JSON data

_COSTS = {
    "steps": ("Steps", "count"),
    "tokens": ("Tokens", "count"),
    "labels": ("Labels", "count"),
    "flops": ("FLOPs", "count"),
    "seconds": ("Training", "duration"),
    "elapsed_seconds": ("Wall time", "duration"),
    "peak_bytes": ("Peak memory", "bytes"),
    "trainable": ("Trainable", "count"),
}


def write_report(directory: Path) -> Path:
    """Write ``report.html`` into the directory of a comparison, a claim, a run or a curation, and return its path.

    The same files give the same bytes.

    Raises:
        FileNotFoundError: the directory holds none of ``leaderboard.json``, ``verdict.json``, ``result.json`` and
            ``curated.json``.
    """
    pages = {"leaderboard.json": _comparison, "verdict.json": _claim, "result.json": _run, "curated.json": _curation}
    for name, build in pages.items():
        if (directory / name).exists():
            html = build(directory, _read(directory / name))
            path = directory / "report.html"
            atomic_write_text(path, html)
            return path
    raise FileNotFoundError(
        f"{directory} holds no {', '.join(pages)}: nothing there has finished, or no command that makes "
        "reports wrote to it."
    )


def _comparison(directory: Path, board: Data) -> str:
    columns = {axis["metric"]: Axis(**axis) for axis in board["columns"]}
    rows = {row["name"]: row for row in board["rows"]}
    family = board["family"]
    gain, price = Axis(**family["gain"]), Axis(**family["price"]) if family["price"] else None
    tables = []
    for number, table in enumerate(board["tables"]):
        of = [rows[name] for name in table["rows"]]
        front = _front(of, gain, price, board["limit"], number)
        tables.append(
            {"unit": table["unit"], "rows": of, "strips": _strips(of, [a for a in (gain, price) if a]), "front": front}
        )
    where = shlex.quote(directory.resolve().name)
    return _render(
        "comparison.html.j2",
        title=board["title"] or f"Comparison of {len(rows)} ways, stage {family['stage']}",
        board=board,
        gain=gain,
        price=price,
        extra=[axis for axis in list(columns.values())[1 if price is None else 2 :] if _measured(axis, board["rows"])],
        tables=tables,
        across=_across(board, columns),
        trajectories=_trajectories(directory, board),
        costs=_costs([row["cost"] for row in board["rows"]]),
        trial_costs=_costs([row["trials"]["cost"] for row in board["rows"]]),
        failures=[row for row in board["rows"] if row["status"] != "done"],
        warnings={
            r["name"]: w
            for r in board["rows"]
            if (w := {k: v for k, v in r["notes"].items() if k.startswith("warning/")})
        },
        samples={row["name"]: s for row in board["rows"] if (s := _samples(directory, row))},
        recipe=_text(directory / "comparison.yaml"),
        commands=[f"headwater compare {where}/comparison.yaml --out {where}", f"headwater report {where}"],
        environment=board["environment"],
    )


def _claim(directory: Path, verdict: Data) -> str:
    return _render(
        "claim.html.j2", title=f"Claim: {verdict['id']}", verdict=verdict, environment=verdict.get("environment", {})
    )


def _run(directory: Path, result: Data) -> str:
    stored = directory / "trajectory.json"
    curves = []
    if stored.exists():
        trajectory = _read(stored)
        for number, (metric, points) in enumerate(sorted(trajectory["series"].items())):
            if len(points) > 1:
                axis = Axis(metric, metric, "higher")
                curves.append(
                    (metric, trajectory_svg({metric: (number, [points])}, trajectory["x"], axis, f"t{number}"))
                )
    where = shlex.quote(directory.resolve().name)
    recipe = _text(directory / "recipe.yaml")
    return _render(
        "run.html.j2",
        title=f"Run {directory.resolve().name}",
        result=result,
        sides=_before_and_after(result["metrics"]),
        curves=curves,
        costs=_costs([result["cost"]]),
        samples=_read(directory / "samples.json") if (directory / "samples.json").exists() else [],
        recipe=recipe,
        commands=[f"headwater run {where}/recipe.yaml --out {where}-again"],
        environment=_read(directory / "environment.json") if (directory / "environment.json").exists() else {},
    )


def _curation(directory: Path, curated: Data) -> str:
    sources = []
    for number, (name, steps) in enumerate(curated["sources"].items()):
        scored = [(place, step) for place, step in enumerate(steps) if step["scores"]]
        histograms = [(s["name"], histogram_svg(s["scores"], s["name"], f"h{number}-{place}")) for place, s in scored]
        sources.append({"name": name, "steps": steps, "histograms": histograms})
    where = shlex.quote(directory.resolve().name)
    # A recipe's curation is run again with its run.
    again = [f"headwater curate {where}/curation.yaml --out {where}"] if (directory / "curation.yaml").exists() else []
    return _render(
        "curation.html.j2",
        title=f"Curation of {', '.join(curated['sources'])}",
        sources=sources,
        recipe=_text(directory / "curation.yaml"),
        commands=[*again, f"headwater report {where}"],
        environment={},
    )


def _before_and_after(metrics: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Name, before, after of every metric that has a ``_start`` beside it."""
    starts = {name: metrics.get(f"{name}_start") for name in metrics}
    return [(name, start, metrics[name]) for name, start in starts.items() if start is not None]


def _front(rows: Sequence[Data], gain: Axis, price: Axis | None, limit: float | None, number: int) -> Data | None:
    if price is None:
        return None
    both = [row for row in rows if gain.metric in row["cells"] and price.metric in row["cells"]]
    if len(both) < 2:
        return None
    currency = next(
        (c for c in ("flops", "tokens", "seconds") if all(row["cost"].get(c) for row in both if _trained(row))), None
    )
    dearest = max((row["cost"].get(currency) or 0.0 for row in both), default=0.0) if currency else 0.0
    seen = set.intersection(
        *(in_view({row["name"]: _ends(row["cells"][axis.metric]) for row in both}) for axis in (gain, price))
    )
    points = [
        Point(
            row["name"],
            _triple(row["cells"][price.metric]),
            _triple(row["cells"][gain.metric]),
            (row["cost"].get(currency) or 0.0) / dearest if currency and dearest else None,
            row["standing"]["label"],
        )
        for row in both
        if row["name"] in seen
    ]
    return {
        "svg": front_svg(points, price, gain, limit, f"front{number}"),
        "size": _COSTS[currency][0] if currency and dearest else None,
        "outside": [row for row in both if row["name"] not in seen],
    }


def _trained(row: Data) -> bool:
    return bool(row["cost"].get("steps") or row["cost"].get("tokens") or row["cost"].get("flops"))


def _ends(cell: Data) -> tuple[float, float]:
    return (cell["mean"], cell["mean"]) if cell["low"] is None else (cell["low"], cell["high"])


def _triple(cell: Data) -> tuple[float | None, float, float | None]:
    return cell["low"], cell["mean"], cell["high"]


def _strips(rows: Sequence[Data], axes: Sequence[Axis]) -> dict[str, dict[str, Data]]:
    """Metric -> row -> where its dot and interval lie on a strip of width 100 that all rows share."""
    strips: dict[str, dict[str, Data]] = {}
    for axis in axes:
        cells = {row["name"]: row["cells"][axis.metric] for row in rows if axis.metric in row["cells"]}
        if not cells:
            continue
        seen = in_view({name: _ends(cell) for name, cell in cells.items()})
        ends = [end for name in seen for end in _ends(cells[name])]
        low, width = min(ends), (max(ends) - min(ends)) or 1.0

        def at(value: float, low: float = low, width: float = width) -> float:
            return round(min(100.0, max(0.0, 4 + 92 * (value - low) / width)), 2)

        strips[axis.metric] = {
            name: {
                "dot": at(cell["mean"]),
                "low": at(_ends(cell)[0]),
                "high": at(_ends(cell)[1]),
                "outside": 0 if name in seen else (1 if cell["mean"] > low else -1),
                "zero": at(0.0) if low <= 0 <= low + width else None,
            }
            for name, cell in cells.items()
        }
    return strips


def _across(board: Data, columns: Mapping[str, Axis]) -> list[Axis]:
    """Axes on which rows of different units may be ranked: the user's own tasks."""
    return (
        [axis for metric, axis in columns.items() if metric.startswith("downstream/")]
        if len(board["tables"]) > 1
        else []
    )


def _measured(axis: Axis, rows: Sequence[Data]) -> bool:
    return any(axis.metric in row["cells"] for row in rows)


def _trajectories(directory: Path, board: Data) -> list[tuple[Axis, Markup]]:
    found: list[tuple[Axis, Markup]] = []
    units = {name: table["unit"] for table in board["tables"] for name in table["rows"]}
    consumed = ""
    stored: dict[str, list[Data]] = {}
    for row in board["rows"]:
        paths = [directory / run["directory"] / "trajectory.json" for run in row["runs"] if run["status"] == "done"]
        kept = [_read(path) for path in paths if path.exists()]
        if kept and row["name"] in units:
            stored[row["name"]], consumed = kept, kept[0]["x"]
    several = len(board["tables"]) > 1
    for number, spec in enumerate(board["family"]["trajectories"]):
        axis = Axis(**spec)
        for unit in dict.fromkeys(units[name] for name in stored):
            series = {
                name: (colour, curves)
                for colour, (name, kept) in enumerate(stored.items())
                if units[name] == unit
                and (curves := [c for t in kept if len(_finite(c := t["series"].get(axis.metric, []))) > 1])
            }
            if series:
                shown = Axis(axis.metric, axis.label, axis.better, unit) if several and unit else axis
                found.append((shown, trajectory_svg(series, consumed, shown, f"t{number}{len(found)}")))
    return found


def _finite(curve: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    return [point for point in curve if all(map(math.isfinite, point))]


def _samples(directory: Path, row: Data) -> Any:  # Any: JSON data
    for run in row["runs"]:
        path = directory / run["directory"] / "samples.json"
        if run["status"] == "done" and path.exists():
            return _read(path)
    return []


def _costs(costs: Sequence[Data]) -> list[tuple[str, str, str]]:
    """Currencies that were spent at all: key, heading, kind of amount."""
    spent = [key for key in _COSTS if any(cost.get(key) != 0 for cost in costs if key in cost)]
    return [(key, *_COSTS[key]) for key in spent]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _read(path: Path) -> Any:  # Any: JSON data
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("headwater.core", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Only plain text: markup of ours has been cleaned where it was made.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters |= {
        "number": _number,
        "signed": _signed,
        "count": _count,
        "bytes": _bytes,
        "duration": _duration,
    }
    environment.filters["amount"] = lambda value, kind: {"count": _count, "bytes": _bytes, "duration": _duration}[kind](
        value
    )
    return environment


def _render(template: str, **values: Any) -> str:  # Any: whatever the template shows
    return _environment().get_template(template).render(**values)


def _number(value: float | None, format: str = ".3f") -> str:
    """A number with a true minus sign; a dash where there is none."""
    return "–" if value is None else f"{value:{format}}".replace("-", "\N{MINUS SIGN}")


def _signed(value: float | None, format: str = ".3f") -> str:
    return _number(value, f"+{format}")


def _count(value: float | None) -> str:
    return "not countable" if value is None else short_count(value)


def _bytes(value: float | None) -> str:
    if value is None:
        return "unknown"
    unit = next(
        unit
        for unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B"))
        if value >= unit[0] or unit[0] == 1
    )
    return f"{value / unit[0]:.3g}\N{NO-BREAK SPACE}{unit[1]}"


def _duration(value: float | None) -> str:
    if value is None:
        return "unknown"
    if value < 90:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    if value < 5400:
        return f"{value / 60:.0f} min"
    return f"{value / 3600:.1f} h"
