"""Advice from the catalogue: what can be tried with what the user has, and what it gained where it was checked."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from headwater.core.catalogue import Catalogue, Entry

__all__ = ["Advice", "advise"]

_COST = {"closed form": 0, "minutes": 1, "hours": 2, "days": 3}
_VERDICT = {"holds": 0, "inconclusive": 1, "": 1, "does not hold": 2}


@dataclass(frozen=True)
class Advice:
    """One thing to try.

    Attributes:
        id: the method.
        summary: what it does.
        cost: its cost class.
        needs: what it needs, all of which the user has.
        verdict: of its claim at the largest scale published and not stale; "" if there is none.
        effect: the headline's difference with its interval and metric, in words; "" without a verdict.
    """

    id: str
    summary: str
    cost: str
    needs: tuple[str, ...]
    verdict: str
    effect: str

    def to_dict(self) -> dict[str, Any]:  # Any: JSON data
        """Plain JSON data."""
        return asdict(self)

    def to_text(self) -> str:
        """Two or three lines for a terminal."""
        checked = f"checked: {self.verdict}; {self.effect}" if self.verdict else "not checked yet"
        return f"{self.id} ({self.cost})\n    {self.summary}\n    needs {', '.join(self.needs)}; {checked}"


def advise(catalogue: Catalogue, have: Sequence[str]) -> list[Advice]:
    """Methods whose needs are all in ``have``: those whose claim held first, then cheaper ones first.

    Raises:
        ValueError: something in ``have`` is no need of any method; the nearest name is given.
    """
    known = sorted({need for entry in catalogue.methods for need in entry.needs})
    for thing in have:
        if thing not in known:
            close = difflib.get_close_matches(thing, known, n=1)
            raise ValueError(
                f"no method asks for {thing!r}."
                + (f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}.")
            )
    fitting = [_advice(entry) for entry in catalogue.methods if set(entry.needs) <= set(have)]
    return sorted(fitting, key=lambda item: (_VERDICT[item.verdict], _COST[item.cost], item.id))


def _advice(entry: Entry) -> Advice:
    current = [evidence for evidence in entry.evidence() if not evidence.stale]
    if not current:
        return Advice(entry.id, entry.summary, entry.cost, entry.needs, "", "")
    data = current[-1].data
    interval = "no interval" if data["ci95"] is None else "[{:+.3f}, {:+.3f}]".format(*data["ci95"])
    effect = f"{data['metric']} {data['difference']:+.3f} {interval}, {data['treatment']} against {data['baseline']}"
    return Advice(entry.id, entry.summary, entry.cost, entry.needs, current[-1].verdict, effect)
