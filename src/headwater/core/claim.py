"""Claims: what a paper found, restated as an experiment whose verdict can come out either way.

A claim file ``claims/<id>.py`` exports ``CLAIM``. ``reproduce`` measures it seed by seed (each seed's figures are
stored, so a stopped reproduction continues), then judges every part by the 95 % interval of the paired difference.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from headwater import __version__
from headwater.core.cache import atomic_write_text
from headwater.core.catalogue import Catalogue
from headwater.core.run import environment
from headwater.core.stats import PairedDifference, paired_bootstrap

__all__ = ["Claim", "ClaimError", "Measured", "Part", "Scale", "judge", "load_claim", "reproduce"]

Scale = Literal["smoke", "small", "full"]
Verdict = Literal["holds", "does not hold", "inconclusive"]


class ClaimError(ValueError):
    """A claim that cannot be run as asked, or whose measurements do not fit its parts."""


@dataclass(frozen=True)
class Part:
    """One paired statement of a claim.

    The improvement is treatment minus baseline, its sign turned so that more is better. The part *holds* when
    the 95 % interval of the improvement lies above ``margin``, *does not hold* when it lies below, and is
    *inconclusive* otherwise. A negative margin makes it a claim of non-inferiority.

    Attributes:
        statement: what is claimed, as a sentence.
        metric: name of the measurement that both arms report.
        treatment: arm that is claimed to do better (or no worse).
        baseline: arm it is compared with.
        direction: which way the metric is better.
        margin: in the metric's unit.
        units: what is paired.
        decides: whether the claim's verdict rests on it; other parts are reported only.
    """

    statement: str
    metric: str
    treatment: str
    baseline: str
    direction: Literal["higher", "lower"]
    margin: float
    units: str = "seeds"
    decides: bool = True


@dataclass(frozen=True)
class Measured:
    """What one seed gave.

    Attributes:
        arms: arm -> metric -> value.
        items: arm -> metric -> one value per item, the same items in every arm; their mean is the metric.
        data_fingerprint: of the data that were read.
        unmet: preconditions that this seed did not meet, in words with their figures.
        notes: facts for the reader.
    """

    arms: Mapping[str, Mapping[str, float]]
    items: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    data_fingerprint: str = ""
    unmet: Sequence[str] = ()
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A method's claim.

    Attributes:
        id: the method's id.
        statement: the finding, restated for this experiment.
        source: the paper, and the finding in its own setting.
        parts: the paired statements; the first deciding one whose verdict is the claim's is the headline.
        rival: the arm that is the strongest rival at equal budget.
        preconditions: what must be so for the experiment to test anything.
        seeds: per scale, the seeds it runs by default.
        measure: ``measure(scale, seed, directory)``; runs every arm for one seed.
    """

    id: str
    statement: str
    source: str
    parts: tuple[Part, ...]
    rival: str
    preconditions: tuple[str, ...]
    seeds: Mapping[Scale, tuple[int, ...]]
    measure: Callable[[Scale, int, Path], Measured]


def load_claim(id: str) -> Claim:
    """The claim of a method.

    Raises:
        CatalogueError: no such method.
        ClaimError: the method is a reference, which claims nothing.
    """
    entry = Catalogue.load()[id]
    if entry.kind == "reference":
        raise ClaimError(f"{id!r} is a reference that others are compared with; it has no claim of its own")
    claim: Claim = importlib.import_module(entry.claim_module).CLAIM
    return claim


def reproduce(
    id: str,
    directory: Path,
    *,
    scale: str = "small",
    seeds: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # Any: JSON data
    """Measure a claim and judge it; write ``verdict.json`` under ``directory`` and return it.

    Args:
        id: the method.
        directory: where arms run and the verdict goes; seeds measured there before are not measured again.
        scale: ``smoke`` checks that the experiment runs, ``small`` fits a laptop, ``full`` wants a GPU.
        seeds: how many of the claim's seeds to run, continuing its list beyond the end; all by default.
        progress: is told one line per seed.

    Raises:
        ClaimError: unknown scale, or fewer than one seed.
    """
    claim, entry = load_claim(id), Catalogue.load()[id]
    if scale not in claim.seeds:
        raise ClaimError(f"claim {id!r} has no scale {scale!r}; it has {', '.join(claim.seeds)}")
    scale = cast(Scale, scale)
    chosen = _seeds(claim.seeds[scale], seeds)
    directory.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    measured = []
    for position, seed in enumerate(chosen):
        progress(f"{id}: seed {seed} ({position + 1} of {len(chosen)})")
        measured.append(_measure_once(claim, scale, seed, directory / f"{scale}-seed-{seed}", entry.code_hash()))
    verdict = judge(claim, scale, dict(zip(chosen, measured, strict=True)))
    verdict |= {
        "seconds": round(sum(m.seconds for m in measured), 1),
        "elapsed_seconds": round(time.monotonic() - begin, 1),
        "version": __version__,
        "code_hash": entry.code_hash(),
        "environment": environment(),
    }
    atomic_write_text(directory / "verdict.json", json.dumps(verdict, indent=2) + "\n")
    return verdict


@dataclass(frozen=True)
class _Timed(Measured):
    seconds: float = 0.0


def _measure_once(claim: Claim, scale: Scale, seed: int, directory: Path, code_hash: str) -> _Timed:
    stored = directory / "measured.json"
    if stored.exists():
        data = json.loads(stored.read_text(encoding="utf-8"))
        if data.pop("code_hash") == code_hash:
            return _Timed(**data)
    begin = time.monotonic()
    # Figures measured by other code are never mixed in: the directory is named by the code's hash as well.
    result = claim.measure(scale, seed, directory / code_hash)
    timed = _Timed(**_plain(result), seconds=time.monotonic() - begin)
    directory.mkdir(parents=True, exist_ok=True)
    atomic_write_text(stored, json.dumps({**asdict(timed), "code_hash": code_hash}) + "\n")
    return timed


def _plain(measured: Measured) -> dict[str, Any]:  # Any: JSON data
    return {
        "arms": {arm: {k: float(v) for k, v in values.items()} for arm, values in measured.arms.items()},
        "items": {arm: {k: [float(x) for x in v] for k, v in of.items()} for arm, of in measured.items.items()},
        "data_fingerprint": measured.data_fingerprint,
        "unmet": list(measured.unmet),
        "notes": dict(measured.notes),
    }


def _seeds(listed: Sequence[int], count: int | None) -> list[int]:
    if count is None:
        return list(listed)
    if count < 1:
        raise ClaimError(f"at least one seed is needed; got {count}")
    return [*listed, *range(max(listed) + 1, max(listed) + 1 + count)][:count]


def judge(claim: Claim, scale: Scale, measured: Mapping[int, Measured]) -> dict[str, Any]:  # Any: JSON data
    """The verdict on what was measured, as the data of ``verdict.json`` without timing.

    The claim holds when every deciding part holds, does not hold when one does not, and is inconclusive
    otherwise, at fewer than three seeds, or when a precondition was not met.
    """
    seeds = sorted(measured)
    parts = [_judge_part(part, [measured[seed] for seed in seeds], seeds) for part in claim.parts]
    unmet = sorted({words for m in measured.values() for words in m.unmet})
    fingerprints = sorted({m.data_fingerprint for m in measured.values()})
    deciding = [part["verdict"] for part in parts if part["decides"]]
    verdict: Verdict = "inconclusive"
    if not unmet and len(seeds) >= 3 and scale != "smoke":
        if all(v == "holds" for v in deciding):
            verdict = "holds"
        elif "does not hold" in deciding:
            verdict = "does not hold"
    # The part that the verdict rests on speaks for the claim; where several do, the first.
    head = next((part for part in parts if part["decides"] and part["verdict"] == verdict), parts[0])
    return {
        "id": claim.id,
        "statement": claim.statement,
        "source": claim.source,
        "scale": scale,
        "seeds": seeds,
        **{key: head[key] for key in ("metric", "direction", "margin", "treatment", "baseline", "units")},
        "rival": claim.rival,
        "preconditions": list(claim.preconditions),
        "unmet": unmet,
        **{key: head[key] for key in ("per_seed", "difference", "ci95")},
        "verdict": verdict,
        "parts": parts,
        "notes": {key: value for m in measured.values() for key, value in m.notes.items()},
        "data_fingerprint": fingerprints[0] if len(fingerprints) == 1 else fingerprints,
    }


def _judge_part(part: Part, measured: Sequence[Measured], seeds: Sequence[int]) -> dict[str, Any]:  # Any: JSON data
    sign = 1.0 if part.direction == "higher" else -1.0
    treatment, baseline = (
        np.array([_value(m, arm, part) for m in measured]) for arm in (part.treatment, part.baseline)
    )
    difference = _difference(part, measured, sign * treatment, sign * baseline, sign)
    # One seed says nothing about another: its interval is infinite, and JSON has no infinity.
    known = math.isfinite(difference.low) and math.isfinite(difference.high)
    verdict: Verdict = "inconclusive"
    if known and difference.low > part.margin:
        verdict = "holds"
    elif known and difference.high < part.margin:
        verdict = "does not hold"
    return {
        **asdict(part),
        "per_seed": [
            {"seed": seed, "treatment": float(t), "baseline": float(b)}
            for seed, t, b in zip(seeds, treatment, baseline, strict=True)
        ],
        "difference": difference.mean,
        "ci95": [difference.low, difference.high] if known else None,
        "smallest_detectable": difference.smallest_detectable if known else None,
        "verdict": verdict,
    }


def _difference(
    part: Part, measured: Sequence[Measured], a: np.ndarray, b: np.ndarray, sign: float
) -> PairedDifference:
    try:
        items = [np.array([m.items[arm][part.metric] for m in measured]) for arm in (part.treatment, part.baseline)]
    except KeyError:
        return paired_bootstrap(a, b)
    if items[0].shape != items[1].shape:
        raise ClaimError(
            f"{part.metric}: the arms have {items[0].shape} and {items[1].shape} items; they must be the same items"
        )
    return paired_bootstrap(sign * items[0], sign * items[1])


def _value(measured: Measured, arm: str, part: Part) -> float:
    try:
        return measured.arms[arm][part.metric]
    except KeyError:
        raise ClaimError(f"the experiment did not measure {part.metric!r} for arm {arm!r}") from None
