"""A corpus as a plan: which documents a model reads, in which proportion, in which form, in which order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedModel

from headwater.core.optim import OptimSpec
from headwater.core.recipe import Metrics
from headwater.modalities.text.docs import Document
from headwater.modalities.text.examples import Formatter

__all__ = ["Condition", "Controller", "Corpus", "Reading", "Scoring"]

Condition = Callable[[Document], Sequence[int] | None]
"""Tokens that stand before a held-out document when it is scored; None where there are none for it."""

Controller = Callable[[Sequence[Mapping[str, float]]], Sequence[float]]
"""From the losses of all ``watched`` documents at the beginning of this phase and of every phase before that was
weighed like it, in nats per target, the latest last, to the share of each table. A pure function."""


class Scoring(Protocol):
    """The family's figures of a model on what is held out, which the caller does not see."""

    def __call__(self, model: nn.Module, *, only: Collection[str] | None = None) -> tuple[Metrics, dict[str, Any]]:
        """Metrics of all sets, or ``only`` some, and ``ids`` and ``values`` of the items of each that is a mean."""
        ...


@dataclass(frozen=True)
class Reading:
    """One phase of the plan.

    Attributes:
        name: of the phase.
        share: of the budget, in (0, 1].
        tables: what is read.
        weights: share of each table in every batch, >= 0; None: in proportion to their sizes; a controller is asked
            when the phase begins.
        format: what documents look like; None: the document and EOS.
        optim: None goes on from the phase before, with its moments, on one schedule over the whole budget. Otherwise
            this phase starts afresh, on a schedule of its own.
    """

    name: str
    share: float
    tables: tuple[str, ...]
    weights: tuple[float, ...] | Controller | None = None
    format: Formatter | None = None
    optim: OptimSpec | None = None

    def __post_init__(self) -> None:
        if not self.tables or len(set(self.tables)) < len(self.tables):
            raise ValueError(f"phase {self.name!r} must read tables, each once; got {list(self.tables)}.")
        if isinstance(self.weights, tuple) and len(self.weights) != len(self.tables):
            raise ValueError(
                f"phase {self.name!r} has {len(self.weights)} weights for {len(self.tables)} tables; give one for each."
            )


@dataclass(frozen=True)
class Corpus:
    """What a method decides: an ordered plan of what the model reads.

    Attributes:
        phases: in order; their shares sum to 1.
        tables: documents by name.
        conditions: by name, further ways to score held-out text: ``eval/SET/NAME/bpb``.
        watched: validation documents by name, whose losses controllers are told.
        midway: further figures of the model on its way, taken at ``eval_at`` into the trajectory; named ``valid/...``.
        examine: further figures of the trained model, which the base takes before it saves it.
        compare: scores further models as the trained one was, after it; the figures it returns join the run's.
        usage: how the model must be called, as JSON data, saved as ``model/corpus.json``; none where it is called as
            any other.
        readme: the same in words.
        files: further files of the run directory.
        overlap: tokens that a row repeats of the one before it, where documents are packed end to end.
    """

    phases: tuple[Reading, ...]
    tables: Mapping[str, Sequence[Document]]
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    watched: Mapping[str, Sequence[Document]] = field(default_factory=dict)
    midway: Callable[[PreTrainedModel], Mapping[str, float]] | None = None
    examine: Callable[[PreTrainedModel], Mapping[str, float]] | None = None
    compare: Callable[[Scoring], Mapping[str, float]] | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)  # Any: JSON data
    readme: str = ""
    files: tuple[str, ...] = ()
    overlap: int = 0

    def __post_init__(self) -> None:
        total = sum(phase.share for phase in self.phases)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the phases of a corpus share the whole budget; their shares sum to {total:g}.")
        if len({phase.name for phase in self.phases}) < len(self.phases):
            raise ValueError("two phases of a corpus have one name.")
        read = {table for phase in self.phases for table in phase.tables}
        if unknown := sorted(read ^ set(self.tables)):
            raise ValueError(
                f"the phases read the tables {sorted(read)} and the corpus has {sorted(self.tables)}; "
                f"{unknown[0]!r} is not in both."
            )
        if not self.watched and any(callable(phase.weights) for phase in self.phases):
            raise ValueError("a controller is told the losses of watched documents, and the corpus watches none.")
        if empty := [name for name, documents in self.tables.items() if not len(documents)]:
            raise ValueError(f"table {empty[0]!r} of the corpus holds no document.")
