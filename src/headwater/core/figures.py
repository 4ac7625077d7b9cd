"""Figures of a report, as SVG that stands inside the page: its text is text, its colours are the page's own."""

from __future__ import annotations

import io
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup

from headwater.core.family import Axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

__all__ = [
    "SERIES",
    "Point",
    "front_svg",
    "heat_map_svg",
    "histogram_svg",
    "in_view",
    "printable",
    "short_count",
    "standalone",
    "trajectory_svg",
]

SERIES = 8
"""Colours that the page defines for lines, ``--s0`` to ``--s7``; a ninth line is dashed in the first again."""

# Written by matplotlib, then replaced by the page's variables, so that one figure serves light and dark.
_INK, _SOFT, _RULE, _PAPER, _ACCENT = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {_INK: "--ink", _SOFT: "--soft", _RULE: "--rule", _PAPER: "--paper", _ACCENT: "--accent"}
_LINES = [f"#0601{index:02d}" for index in range(SERIES)]

# For a figure outside of a page: the page's light colours.
_LIGHT = {"--ink": "#1b1f24", "--soft": "#69717c", "--rule": "#e3e6ea", "--paper": "#ffffff", "--accent": "#1f6f8b"}
_LIGHT |= {"--s0": "#1f6f8b", "--s1": "#c4572c", "--s2": "#4d8a3c", "--s3": "#8a4fa3"}
_LIGHT |= {"--s4": "#a67c00", "--s5": "#c2407a", "--s6": "#4b62b8", "--s7": "#6b6f76"}

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "headwater",  # otherwise ids, and so the bytes, would differ from one time to the next
    "text.parse_math": False,  # a `$` in a name is a `$`
    "font.size": 9.0,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
}


@dataclass(frozen=True)
class Point:
    """A row in the plane of price and gain.

    Attributes:
        name: beside the marker.
        x: low end, mean, high end; the ends None with one seed.
        y: as ``x``.
        size: share of the dearest row's cost, in [0, 1]; None where the cost is unknown.
        standing: decides the marker's look.
    """

    name: str
    x: tuple[float | None, float, float | None]
    y: tuple[float | None, float, float | None]
    size: float | None
    standing: Literal["front", "dominated", "undecided"]


def printable(text: str) -> str:
    """``text`` without control or direction-changing characters; line breaks stay."""
    hidden = (c for c in set(text) if unicodedata.category(c).startswith("C") and c not in "\n\t")
    return text.translate(dict.fromkeys(map(ord, hidden), "\N{REPLACEMENT CHARACTER}"))


def short_count(value: float) -> str:
    """A count that fits a tick or a table cell: 197 k, 1.06 T."""
    for limit, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= (1e4 if letter == "k" else limit):
            return f"{value / limit:.3g}\N{NO-BREAK SPACE}{letter}"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


def in_view(ranges: Mapping[str, tuple[float, float]]) -> set[str]:
    """Names whose ranges can share an axis: at most two are left out that would squeeze the rest into a third of it."""
    kept = dict(ranges)
    for _ in range(2):
        if len(kept) < 4:
            break
        spans = {name: _span([r for other, r in kept.items() if other != name]) for name in kept}
        smallest = min(spans, key=lambda name: spans[name])
        if spans[smallest] * 3 > _span(list(kept.values())):
            break
        del kept[smallest]
    return set(kept)


def _span(ranges: Sequence[tuple[float, float]]) -> float:
    return max(high for _, high in ranges) - min(low for low, _ in ranges)


def front_svg(points: Sequence[Point], x: Axis, y: Axis, limit: float | None, name: str = "front") -> Markup:
    """Gain against price, a cross of 95 % intervals at each row, marker area by cost.

    Args:
        points: at least one.
        x: the price.
        y: the gain.
        limit: of the price, drawn as a line.
        name: short, unique in the page.
    """
    with _style():
        figure, axes = _canvas(7.2, 4.6)
        for point in points:
            _mark(axes, point)
        axes.margins(0.14, 0.12)
        if limit is not None:
            axes.axvline(limit, color=_SOFT, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                " limit", (limit, 1.0), xycoords=("data", "axes fraction"), va="top", color=_SOFT, fontsize=8.5
            )
        axes.set_xlabel(f"{_title(x)}  ({x.better} is better)")
        axes.set_ylabel(f"{_title(y)}  ({y.better} is better)")
        _place_labels(figure, axes, points)
        return _svg(figure, name, f"{x.label} and {y.label} of {len(points)} rows, with intervals")


def _mark(axes: Axes, point: Point) -> None:
    colour = {"front": _ACCENT, "undecided": _ACCENT, "dominated": _SOFT}[point.standing]
    fill = _PAPER if point.standing == "undecided" else colour
    for ends, across in ((point.x, False), (point.y, True)):
        if ends[0] is not None and ends[2] is not None:
            line = ([point.x[1]] * 2, ends[::2]) if across else (ends[::2], [point.y[1]] * 2)
            axes.plot(*line, color=colour, linewidth=1.1, alpha=0.55, solid_capstyle="round", zorder=2)
    area = 36.0 if point.size is None else 24.0 + 130.0 * point.size
    axes.scatter([point.x[1]], [point.y[1]], s=area, facecolor=fill, edgecolor=colour, linewidth=1.5, zorder=3)


def _place_labels(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Put each name beside its marker where it covers the least of the others."""
    from matplotlib.transforms import Bbox

    figure.canvas.draw()
    frame = axes.get_window_extent()
    taken = [Bbox.from_extents(px - 7, py - 7, px + 7, py + 7) for px, py in _pixels(axes, points)]
    for point in sorted(points, key=lambda point: -point.y[1]):
        label = axes.annotate(
            printable(point.name), (point.x[1], point.y[1]), xytext=(0, 0), textcoords="offset points",
            fontsize=8.5, zorder=4,
            color=_SOFT if point.standing == "dominated" else _INK,
        )  # fmt: skip
        best: tuple[float, tuple[Any, ...]] | None = None  # Any: offset and two alignments
        for place in _PLACES:
            _align(label, *place)
            box = label.get_window_extent()
            covered = sum(_overlap(box, other) for other in taken)
            outside = box.width * box.height - _overlap(box, frame)
            if best is None or covered + 3 * outside < best[0] - 1:
                best = (covered + 3 * outside, place)
        assert best is not None
        _align(label, *best[1])
        taken.append(label.get_window_extent())


_PLACES: tuple[tuple[tuple[float, float], str, str], ...] = (
    ((9, 6), "left", "bottom"),
    ((9, -6), "left", "top"),
    ((-9, 6), "right", "bottom"),
    ((-9, -6), "right", "top"),
    ((0, 13), "center", "bottom"),
    ((0, -13), "center", "top"),
    ((14, 17), "left", "bottom"),
    ((14, -17), "left", "top"),
    ((-14, 17), "right", "bottom"),
    ((-14, -17), "right", "top"),
)


def _align(label: Text, offset: tuple[float, float], horizontal: str, vertical: str) -> None:
    label.set(position=offset, horizontalalignment=horizontal, verticalalignment=vertical)


def _pixels(axes: Axes, points: Sequence[Point]) -> list[tuple[float, float]]:
    return [tuple(axes.transData.transform((point.x[1], point.y[1]))) for point in points]


def _overlap(a: Any, b: Any) -> float:  # Any: matplotlib's boxes
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(max(0.0, width) * max(0.0, height))


def trajectory_svg(
    series: Mapping[str, tuple[int, Sequence[Sequence[Sequence[float]]]]], x: str, y: Axis, name: str
) -> Markup:
    """A metric against what the run consumed: the mean over seeds, and their range as a band.

    Args:
        series: row -> its colour's number, and for each seed ``[[x, y], ...]``, x rising.
        x: what is consumed; its axis is logarithmic where it spans more than a factor of 20, with 0 at the left end.
        y: the metric.
        name: short, unique in the page.
    """
    from headwater.core.trajectory import mean_and_range

    with _style():
        figure, axes = _canvas(7.2, 3.4)
        curves = {row: (number, mean_and_range(seeds)) for row, (number, seeds) in series.items()}
        for number, curve in curves.values():
            colour, dash = _LINES[number % SERIES], "-" if number < SERIES else (0, (4, 2))
            axes.plot(
                curve.x, curve.mean, color=colour, linewidth=1.6, linestyle=dash, solid_joinstyle="round", zorder=3
            )
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.14, linewidth=0)
        positive = [value for _, curve in curves.values() for value in curve.x if value > 0]
        if positive and max(positive) > 20 * min(positive):
            axes.set_xscale("symlog", linthresh=min(positive), linscale=0.4)
            powers = range(math.ceil(math.log10(min(positive))), math.floor(math.log10(max(positive))) + 1)
            ticks = [0.0] * (min(c.x[0] for _, c in curves.values()) <= 0) + [10.0**power for power in powers]
            axes.set_xticks(ticks, [short_count(tick) for tick in ticks])
            axes.set_xticks([], minor=True)
        seen = in_view({row: (min(curve.low), max(curve.high)) for row, (_, curve) in curves.items()})
        low = min(min(curves[row][1].low) for row in seen)
        high = max(max(curves[row][1].high) for row in seen)
        margin = 0.06 * (high - low) or 0.01
        axes.set_ylim(low - margin, high + margin)
        axes.set_xlabel(printable(x))
        axes.set_ylabel(_title(y))
        ends = {row: curves[row][1] for row in curves if low - margin <= curves[row][1].mean[-1] <= high + margin}
        _label_ends(
            axes, {row: (c.x[-1], c.mean[-1]) for row, c in ends.items()}, {r: n for r, (n, _) in curves.items()}
        )
        return _svg(figure, name, f"{y.label} against {x}")


def heat_map_svg(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], axis: Axis, name: str
) -> Markup:
    """A table of numbers with both signs: one colour above 0, another below, the deeper the larger.

    Args:
        values: ``(rows, columns)``, finite; written into the cells where there are at most 20 columns.
        rows: their names, at least one.
        columns: their names, at least one.
        axis: what the values are.
        name: short, unique in the page.
    """
    from matplotlib.patches import Rectangle

    with _style():
        figure, axes = _canvas(2.4 + 0.62 * min(len(columns), 20), 1.4 + 0.32 * min(len(rows), 40))
        largest = max(abs(value) for row in values for value in row) or 1.0
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                colour = _LINES[0] if value >= 0 else _LINES[1]
                shade = 0.8 * abs(value) / largest
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, alpha=shade, linewidth=0))
                if len(columns) <= 20:
                    axes.text(x, y, format(value, axis.format), ha="center", va="center", fontsize=8)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False)
        axes.set_xticks(range(len(columns)), [printable(c) for c in columns], rotation=45, ha="right")
        axes.set_yticks(range(len(rows)), [printable(r) for r in rows])
        axes.set_title(f"{_title(axis)}  ({axis.better} is better)", fontsize=9, color=_INK)
        return _svg(figure, name, f"{axis.label}: {len(rows)} rows, {len(columns)} columns")


def histogram_svg(values: Sequence[float], title: str, name: str) -> Markup:
    """How often a score takes which value.

    Args:
        values: at least one, finite.
        title: what they are.
        name: short, unique in the page.
    """
    with _style():
        figure, axes = _canvas(5.4, 1.9)
        axes.hist(values, bins=50, color=_LINES[0], alpha=0.8)
        axes.set_title(printable(title), fontsize=9, color=_INK)
        axes.set_ylabel("documents")
        ordered = sorted(values)
        middle = ordered[len(ordered) // 2]
        return _svg(
            figure,
            name,
            f"{title}: {len(values)} documents, from {ordered[0]:.3g} to {ordered[-1]:.3g}, half below {middle:.3g}",
        )


def standalone(figure: Markup) -> str:
    """A figure as the text of an SVG file: what the page gives it, colours in their light form, written out."""
    text = re.sub(r"var\((--\w+)\)", lambda found: _LIGHT[found[1]], str(figure))
    return text.replace("<svg ", '<svg style="background: #ffffff; font-family: sans-serif" ', 1) + "\n"


def _label_ends(axes: Axes, ends: Mapping[str, tuple[float, float]], numbers: Mapping[str, int]) -> None:
    """Name each line at its end, the names moved apart vertically and tied to their lines."""
    low, high = axes.get_ylim()
    step = 0.068 * (high - low)
    names = sorted(ends, key=lambda row: ends[row][1])
    heights: list[float] = []
    for row in names:
        heights.append(max(ends[row][1], heights[-1] + step) if heights else max(ends[row][1], low))
    overflow = max(0.0, heights[-1] - high) if heights else 0.0
    for index in range(len(heights) - 1, -1, -1):  # pushed back down from the top where they ran out of room
        heights[index] -= overflow
        if index and heights[index] - heights[index - 1] > step:
            overflow = max(0.0, overflow - (heights[index] - heights[index - 1] - step))
    for row, height in zip(names, heights, strict=True):
        colour = _LINES[numbers[row] % SERIES]
        axes.annotate(
            printable(row), xy=ends[row], xycoords="data", xytext=(1.03, (height - low) / (high - low)),
            textcoords="axes fraction", va="center", fontsize=8.5, color=colour, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 2,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def _title(axis: Axis) -> str:
    return printable(f"{axis.label}, {axis.unit}" if axis.unit else axis.label)


def _style() -> Any:  # Any: matplotlib leaves its context untyped
    import matplotlib as mpl

    return mpl.rc_context(_STYLE)


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of its own, in inches: nothing global is opened that somebody would have to close."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.tick_params(length=0, labelsize=8.5)
    return figure, axes


def _svg(figure: Figure, name: str, description: str) -> Markup:
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)  # it would hold for the whole page
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)  # the page's own typeface
    text = re.sub(r"font: (\d+) ([\d.]+px) [^;\"]*", r"font-weight: \1; font-size: \2", text)
    for number, colour in enumerate(_LINES):
        text = text.replace(colour, f"var(--s{number})")
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    # Several figures share the page, and ids are the page's.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    label = Markup.escape(printable(description))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box.group()} class="figure" role="img" aria-label="{label}">'
    return Markup(head + text[text.index(">") + 1 :])  # matplotlib has escaped every text in it
