"""The answer of a comparison in plain words, with its uncertainty. "Nothing beats the baseline" is an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headwater.core.family import Axis, Family
from headwater.core.standing import Cell, Difference, Measured, difference

if TYPE_CHECKING:
    from headwater.core.leaderboard import Row

__all__ = ["LEVEL", "Recommendation", "recommend"]

LEVEL = 0.05
"""A row beats the baseline clearly when its p-value, adjusted for the number of rows, is below this."""


@dataclass(frozen=True)
class Recommendation:
    """What to do, if anything.

    Attributes:
        row: the recommended one, or None.
        beats_baseline: it is clearly better than the baseline.
        sentences: the answer; the first one alone is an answer too.
    """

    row: str | None
    beats_baseline: bool
    sentences: tuple[str, ...]


def recommend(
    rows: Mapping[str, Row],
    measured: Mapping[str, Measured],
    family: Family,
    baseline: str,
    limit: float | None,
    seeds: Sequence[int],
    others: Sequence[Row] = (),
) -> Recommendation:
    """Name the row to take, how sure that is, and what it cannot be told apart from.

    Args:
        rows: comparable ones, best gain first.
        measured: what each measured.
        family: names the axes.
        baseline: may be missing from ``rows`` if it failed.
        limit: the upper interval end of a recommended row's price lies below it.
        seeds: of the comparison.
        others: rows that failed or are measured in another unit.
    """
    asides = _asides(others)
    if not rows:
        return Recommendation(None, False, ("No contestant finished, so there is nothing to recommend.", *asides))
    if len(seeds) == 1:
        return _single(rows, family, baseline, limit, asides)
    within, words = _within_limit(rows, family.price, limit)
    if not within:
        return Recommendation(None, False, (*words, *asides))
    gain = family.gain
    if baseline not in rows:
        best = next(iter(within))
        sentence = f"{best} has the best mean {_lower(gain)}, {_interval(within[best].cells[gain.metric], gain)}."
        missing = f"The baseline {baseline} has no result, so nothing can be said about being better than it."
        return Recommendation(None, False, (sentence, missing, *words, *asides))
    clear = [name for name in within if _clearly_better(within[name].differences.get(gain.metric), gain)]
    if not clear:
        return _nothing_better(rows, within, family, baseline, (*words, *asides))
    best = clear[0]
    cell, ahead = within[best].cells[gain.metric], within[best].differences[gain.metric]
    sentences = [
        f"Take {best}: its {_lower(gain)} of {_interval(cell, gain)} is clearly better than that of the baseline "
        f"{baseline} (difference {_difference(ahead, gain)}, over {ahead.num_seeds} seeds)."
    ]
    sentences += _price(within[best], rows[baseline], family.price)
    alike = [name for name in within if name != best and _alike(measured[best], measured[name], gain)]
    if alike:
        sentences.append(f"In {_lower(gain)} it cannot be told apart from {_list(alike)} with {ahead.num_seeds} seeds.")
    return Recommendation(best, True, (*sentences, *words, *asides))


def _single(
    rows: Mapping[str, Row], family: Family, baseline: str, limit: float | None, asides: Sequence[str]
) -> Recommendation:
    gain, price = family.gain, family.price
    candidates = list(rows)
    words = []
    if limit is not None and price is not None:
        candidates = [
            name for name in rows if price.metric in rows[name].cells and rows[name].cells[price.metric].mean < limit
        ]
        words = [f"The limit on {_lower(price)} could only be held against that one observation."]
    if not candidates:
        return Recommendation(None, False, (_none_qualifies(rows, price, limit), *asides))
    best = candidates[0]
    value = _number(rows[best].cells[gain.metric].mean, gain)
    below = "" if price is None or len(candidates) == len(rows) else f", below the limit on {_lower(price)},"
    ahead = rows[best].differences.get(gain.metric)
    against = f", {ahead.mean:+{gain.format}} against the baseline {baseline}" if ahead else ""
    if best == baseline:
        against = ", and it is the baseline"
    return Recommendation(
        best,
        False,
        (
            f"On this one seed{below} {best} has the best {_lower(gain)}: {value}{against}.",
            "That is a single observation: there is no interval, and another seed may turn the order. "
            "Run at least three seeds before relying on it.",
            *words,
            *asides,
        ),
    )


def _nothing_better(
    rows: Mapping[str, Row], within: Mapping[str, Row], family: Family, baseline: str, words: Sequence[str]
) -> Recommendation:
    gain, best = family.gain, next(iter(within))
    cell = rows[baseline].cells[gain.metric]
    # A limit that left rows out may have left out one that does beat the baseline.
    below = "" if family.price is None or len(within) == len(rows) else f" below the limit on {_lower(family.price)}"
    sentences = [f"Nothing{below} clearly beats {baseline}, whose {_lower(gain)} is {_interval(cell, gain)}."]
    if best == baseline:
        sentences.append(f"It also has the best mean{below}.")
    elif gain.sign * within[best].differences[gain.metric].mean > 0:
        ahead = within[best].differences[gain.metric]
        sentences.append(f"The best mean{below} is that of {best}: {_difference(ahead, gain)} against {baseline}.")
        if ahead.smallest_detectable is not None:
            sentences.append(
                f"With {ahead.num_seeds} seeds a difference of {_number(ahead.smallest_detectable, gain)} would "
                "probably have been seen; a smaller one may have been missed."
            )
    if baseline in within:
        return Recommendation(baseline, False, (*sentences, *_price(rows[baseline], None, family.price), *words))
    price = family.price
    assert price is not None  # only a limit on the price excludes the baseline
    sentences.append(f"But {baseline} is not below the limit on {_lower(price)}; the best row that is, is {best}.")
    return Recommendation(best, False, (*sentences, *_price(within[best], rows[baseline], price), *words))


def _within_limit(
    rows: Mapping[str, Row], price: Axis | None, limit: float | None
) -> tuple[Mapping[str, Row], tuple[str, ...]]:
    if limit is None or price is None:
        return rows, ()
    within = {}
    for name, row in rows.items():
        cell = row.cells.get(price.metric)
        if cell is not None and cell.high is not None and cell.high < limit:
            within[name] = row
    if not within:
        return {}, (_none_qualifies(rows, price, limit),)
    out = [name for name in rows if name not in within]
    return within, (f"Not surely below the limit of {_number(limit, price)}: {_list(out)}.",) if out else ()


def _none_qualifies(rows: Mapping[str, Row], price: Axis | None, limit: float | None) -> str:
    assert price is not None
    assert limit is not None
    cells = {name: row.cells[price.metric] for name, row in rows.items() if price.metric in row.cells}
    ends = {name: cell.mean if cell.high is None else cell.high for name, cell in cells.items()}
    if not ends:
        return f"No row measured {_lower(price)}, so none can be held against the limit of {_number(limit, price)}."
    closest = min(ends, key=lambda name: ends[name])
    return (
        f"No row's {_lower(price)} is surely below the limit of {_number(limit, price)}; closest is {closest}, "
        f"which may reach {_number(ends[closest], price)}."
    )


def _clearly_better(found: Difference | None, axis: Axis) -> bool:
    return found is not None and found.p_holm is not None and found.p_holm < LEVEL and axis.sign * found.mean > 0


def _alike(a: Measured, b: Measured, axis: Axis) -> bool:
    found = difference(a, b, axis.metric)
    return found is None or found.low is None or found.high is None or found.low <= 0 <= found.high


def _price(row: Row, baseline: Row | None, price: Axis | None) -> list[str]:
    if price is None:
        return []
    cell = row.cells.get(price.metric)
    if cell is None:
        return [f"{price.label} was not measured."]
    against = ""
    if baseline is not None and price.metric in baseline.cells and baseline.name != row.name:
        against = f", where {baseline.name} has {_number(baseline.cells[price.metric].mean, price)}"
    return [f"The {_lower(price)} of {row.name} is {_interval(cell, price)}{against}."]


def _asides(others: Sequence[Row]) -> tuple[str, ...]:
    words = []
    failed = [row.name for row in others if row.status == "failed"]
    if failed:
        words.append(f"Failed, and not judged: {_list(failed)}.")
    units = [row for row in others if row.status != "failed"]
    if units:
        names = _list([row.name for row in units])
        words.append(f"{names}: measured in {_list(sorted({r.unit for r in units}))}, and so not ranked with the rest.")
    return tuple(words)


def _lower(axis: Axis) -> str:
    return axis.label[:1].lower() + axis.label[1:]


def _number(value: float, axis: Axis) -> str:
    return f"{value:{axis.format}} {axis.unit}".rstrip()


def _interval(cell: Cell, axis: Axis) -> str:
    if cell.low is None or cell.high is None:
        return f"{_number(cell.mean, axis)} (one seed)"
    return f"{_number(cell.mean, axis)} [{cell.low:{axis.format}}, {cell.high:{axis.format}}]"


def _difference(found: Difference, axis: Axis) -> str:
    if found.low is None or found.high is None:
        return f"{found.mean:+{axis.format}} (one seed)"
    return f"{found.mean:+{axis.format}} [{found.low:+{axis.format}}, {found.high:+{axis.format}}]"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
