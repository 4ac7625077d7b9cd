"""From weights of sources to tokens and epochs, where no source may be read more often than its cap.

tokens_s = min(cap_s size_s, lambda weight_s),    lambda such that the tokens sum to the budget
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Planned", "Source", "mixture_plan"]


@dataclass(frozen=True)
class Source:
    """A source of a mixture.

    Attributes:
        name: of the source.
        tokens: that it has.
        weight: its share in the mixture, >= 0, before normalisation.
        epochs_cap: how often it may be read, > 0.
    """

    name: str
    tokens: int
    weight: float
    epochs_cap: float = math.inf


@dataclass(frozen=True)
class Planned:
    """What a plan takes from a source.

    Attributes:
        name: of the source.
        weight: normalised.
        available: tokens that it has.
        wanted: tokens that its weight asks for.
        tokens: that are read of it.
        epochs: how often it is read.
        shortfall: tokens that its cap keeps it from giving.
        taken_over: tokens that it gives for others that fall short.
    """

    name: str
    weight: float
    available: int
    wanted: float
    tokens: float
    epochs: float
    shortfall: float
    taken_over: float


def mixture_plan(sources: Sequence[Source], total_tokens: float) -> list[Planned]:
    """From weights to tokens and epochs: what a cap holds back goes to the other sources, by their weights.

    Args:
        sources: each once; their weights need not sum to 1.
        total_tokens: of the plan, > 0.

    Raises:
        ValueError: no source or one twice, a negative or infinite weight, none above 0, an empty source with a weight,
            a cap that is not positive, or caps that leave less than ``total_tokens``.

    Example:
        >>> plan = mixture_plan([Source("web", 100, 0.5), Source("books", 10, 0.5, epochs_cap=2)], 100)
        >>> [(part.name, part.tokens, part.epochs) for part in plan]
        [('web', 80.0, 0.8), ('books', 20.0, 2.0)]
    """
    _check_sources(sources, total_tokens)
    whole = math.fsum(source.weight for source in sources)
    weights = {source.name: source.weight / whole for source in sources}
    room = {source.name: source.tokens * source.epochs_cap for source in sources if source.weight}
    if (most := math.fsum(room.values())) < total_tokens:
        raise ValueError(
            f"at their caps the sources give {most:,.0f} tokens, less than the {total_tokens:,.0f} asked for; raise "
            "epochs_cap, add text, or lower the budget."
        )
    given: dict[str, float] = dict.fromkeys(weights, 0.0)
    free = set(room)
    while True:
        rest = total_tokens - math.fsum(given[name] for name in weights if name not in free)
        share = math.fsum(weights[name] for name in free)
        full = {name for name in free if room[name] < rest * weights[name] / share}
        for name in full or free:
            given[name] = float(room[name]) if full else rest * weights[name] / share
        free -= full
        if not full or not free:
            break
    plan = []
    for source in sources:
        wanted, tokens = weights[source.name] * total_tokens, given[source.name]
        epochs = tokens / source.tokens if source.tokens else 0.0
        gap = wanted - tokens
        plan.append(
            Planned(
                source.name, weights[source.name], source.tokens, wanted, tokens, epochs, max(0.0, gap), max(0.0, -gap)
            )
        )
    return plan


def _check_sources(sources: Sequence[Source], total_tokens: float) -> None:
    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"a plan needs sources, each once; got {names}.")
    if not 0 < total_tokens < math.inf:
        raise ValueError(f"total_tokens must be positive; got {total_tokens}.")
    for source in sources:
        if not 0 <= source.weight < math.inf:
            raise ValueError(f"the weight of {source.name!r} must be >= 0; got {source.weight}.")
        if not source.epochs_cap > 0:
            raise ValueError(f"epochs_cap of {source.name!r} must be positive; got {source.epochs_cap}.")
        if source.weight and source.tokens < 1:
            raise ValueError(f"source {source.name!r} has a weight of {source.weight} and no tokens.")
    if not any(source.weight for source in sources):
        raise ValueError("one of the weights must be above 0.")
