"""From a plan to training: rows of tokens for every phase, and what was read of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import nn

from headwater.core.fit import Phase, Trained
from headwater.core.objective import Objective
from headwater.core.order import VirtualIndex
from headwater.core.recipe import Metrics
from headwater.core.rng import derive_seed
from headwater.corpora.context import CorpusContext
from headwater.corpora.plan import Corpus, Reading
from headwater.modalities.text.docs import Document
from headwater.modalities.text.examples import Formatter, PackedExamples, PlainFormatter, formatted
from headwater.modalities.text.objectives import CausalObjective, PackedObjective
from headwater.modalities.text.packing import IGNORED, MixedStream, PackedBlocks, Rows

__all__ = ["Reader", "Weighing", "target_losses", "watcher"]

COUNTED_ROWS = 4096
"""Rows that are looked at together when targets are counted; bounds memory."""

WATCHED_ROWS = 64
"""Rows of watched documents per forward pass."""


@dataclass
class _Table:
    """A table in one form, and how far it has been read."""

    rows: Rows
    walk: VirtualIndex
    read: int = 0


class Weighing(NamedTuple):
    """What a controller decided.

    Attributes:
        phase: the name of the phase.
        losses: what it was told of that moment, by watched documents, in nats per target.
        shares: of each table.
    """

    phase: str
    losses: dict[str, float]
    shares: dict[str, float]


@dataclass
class Reader:
    """Reads a corpus as its plan says.

    Attributes:
        ctx: the run's.
        corpus: the plan.
        weighings: what controllers decided so far.
    """

    ctx: CorpusContext
    corpus: Corpus
    weighings: list[Weighing] = field(default_factory=list)
    _open: dict[str, _Table] = field(default_factory=dict)

    def phases(self) -> Generator[Phase, Trained, None]:
        """Yield the phases of the plan. A table that several phases read is read on, not again."""
        start, before = 0.0, None
        for reading in self.corpus.phases:
            tables = self._tables(reading)
            stream = self._stream(self._weights(reading, tables), tables)
            if reading.optim is None:
                phase = Phase(
                    reading.name,
                    self.ctx.model,
                    stream,
                    _objective(self.ctx),
                    reading.share,
                    schedule_span=min(reading.share, 1 - start),
                    schedule_start=start,
                    continues=before,
                )
            else:
                phase = Phase(reading.name, self.ctx.model, stream, _objective(self.ctx), reading.share, reading.optim)
            trained = yield phase
            for table, count in zip(tables, stream.given(trained.tokens // stream.tokens_per_row), strict=True):
                table.read += int(count)
            before = phase if reading.optim is None else None
            start = min(1.0, start + reading.share)

    def _weights(self, reading: Reading, tables: list[_Table]) -> Sequence[float]:
        if reading.weights is None:
            return [float(len(table.rows)) for table in tables]
        if not callable(reading.weights):
            return reading.weights
        losses = self._losses(reading)
        if wrong := [name for name, loss in losses.items() if not math.isfinite(loss)]:
            raise ArithmeticError(
                f"the loss of {wrong[0]!r} is {losses[wrong[0]]} before phase {reading.name!r}; lower the rate."
            )
        shares = list(reading.weights([*(weighing.losses for weighing in self.weighings), losses]))
        self.weighings.append(Weighing(reading.name, losses, dict(zip(reading.tables, shares, strict=True))))
        return shares

    def _losses(self, reading: Reading) -> dict[str, float]:
        """Nats per target of the watched documents, in the form in which this phase reads."""
        formatter = reading.format or PlainFormatter(self.ctx.tokenizer)
        return watcher(self.ctx, self.corpus.watched, formatter)(self.ctx.model)

    def _stream(self, weights: Sequence[float], tables: list[_Table]) -> MixedStream:
        parts = [(table.rows, weight) for table, weight in zip(tables, weights, strict=True)]
        walks = [VirtualIndex(table.walk.n, table.walk.seed, table.read) for table in tables]
        recipe = self.ctx.recipe
        return MixedStream(parts, recipe.batch_tokens // recipe.seq_len, walks=walks)

    def _tables(self, reading: Reading) -> list[_Table]:
        formatter = reading.format or PlainFormatter(self.ctx.tokenizer)
        found = []
        for name in reading.tables:
            rows = _packed(self.ctx, self.corpus.tables[name], formatter, self.corpus.overlap)
            key = f"{name} {rows.fingerprint}"
            if key not in self._open:
                seed = derive_seed(self.ctx.recipe.seed, "order", name)
                self._open[key] = _Table(rows, VirtualIndex(len(rows), seed))
            found.append(self._open[key])
        return found

    def metrics(self) -> Metrics:
        """What was read, in tokens: inputs, targets, padding, different ones, and the most epochs of any table."""
        length = self.ctx.recipe.seq_len
        counts = {"tokens_trained": 0, "tokens_loss": 0, "tokens_padding": 0, "tokens_unique": 0}
        for table in self._open.values():
            counts["tokens_trained"] += table.read * length
            counts["tokens_unique"] += min(table.read, len(table.rows)) * length
            for name, value in _read(table).items():
                counts[name] += value
        epochs = max(table.read / len(table.rows) for table in self._open.values())
        return {name: float(value) for name, value in counts.items()} | {"epochs": epochs}


def _objective(ctx: CorpusContext) -> Objective:
    packing = ctx.recipe.packing
    if packing == "concat":
        return cast(Objective, CausalObjective())
    return cast(Objective, PackedObjective(restart_positions=packing == "document"))


def _packed(ctx: CorpusContext, documents: Sequence[Document], formatter: Formatter, overlap: int = 0) -> Rows:
    store = formatted(documents, formatter, ctx.room)
    if ctx.room is None:
        return PackedBlocks(store, ctx.recipe.seq_len, overlap=overlap)
    return PackedExamples(store, ctx.recipe.seq_len, pad_token_id=ctx.pad_token_id)


def watcher(
    ctx: CorpusContext, documents: Mapping[str, Sequence[Document]], formatter: Formatter
) -> Callable[[nn.Module], dict[str, float]]:
    """What gives a model's loss on documents by name, in nats per target, packed as the run packs."""
    rows = {name: _packed(ctx, own, formatter) for name, own in documents.items()}
    return partial(target_losses, rows=rows, objective=_objective(ctx))


@torch.no_grad()
def target_losses(model: nn.Module, rows: Mapping[str, Rows], objective: Objective) -> dict[str, float]:
    """Mean loss per target of rows by name, with the model in ``eval`` mode; it is left in the mode it had."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    found = {}
    for name, own in rows.items():
        total = count = 0.0
        for begin in range(0, len(own), WATCHED_ROWS):
            columns = own.columns(np.arange(begin, min(begin + WATCHED_ROWS, len(own))))
            loss = objective(model, {key: torch.from_numpy(values).to(device) for key, values in columns.items()})
            total, count = total + float(loss.total), count + float(loss.count)
        found[name] = total / count
    model.train(was_training)
    return found


def _read(table: _Table) -> Mapping[str, int]:
    """Targets and padding in what was read."""
    full, rest = divmod(table.read, len(table.rows))
    times = np.full(len(table.rows), full)
    times[table.walk(full * len(table.rows) + np.arange(rest))[1]] += 1
    seen = np.flatnonzero(times)
    found = {"tokens_loss": 0, "tokens_padding": 0}
    for begin in range(0, len(seen), COUNTED_ROWS):
        items = seen[begin : begin + COUNTED_ROWS]
        columns = table.rows.columns(items)
        found["tokens_loss"] += int(times[items] @ (columns["labels"] != IGNORED).sum(axis=1))
        if "document_ids" in columns:
            found["tokens_padding"] += int(times[items] @ (columns["document_ids"] == 0).sum(axis=1))
    return found
