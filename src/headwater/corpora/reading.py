"""From a plan to training: rows of tokens for every phase, and what was read of them."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from headwater.core.fit import Phase, Trained
from headwater.core.objective import Objective
from headwater.core.order import VirtualIndex
from headwater.core.recipe import Metrics
from headwater.core.rng import derive_seed
from headwater.corpora.context import CorpusContext
from headwater.corpora.plan import Corpus, Reading
from headwater.modalities.text.examples import Formatter, PackedExamples, PlainFormatter, formatted
from headwater.modalities.text.objectives import CausalObjective, PackedObjective
from headwater.modalities.text.packing import IGNORED, MixedStream, PackedBlocks, Rows

__all__ = ["Reader"]

COUNTED_ROWS = 4096
"""Rows that are looked at together when targets are counted; bounds memory."""


@dataclass
class _Table:
    """A table in one form, and how far it has been read."""

    rows: Rows
    walk: VirtualIndex
    read: int = 0


@dataclass
class Reader:
    """Reads a corpus as its plan says.

    Attributes:
        ctx: the run's.
        corpus: the plan.
    """

    ctx: CorpusContext
    corpus: Corpus
    _open: dict[str, _Table] = field(default_factory=dict)

    def phases(self) -> Generator[Phase, Trained, None]:
        """Yield the phases of the plan. A table that several phases read is read on, not again."""
        start, before = 0.0, None
        for reading in self.corpus.phases:
            tables = self._tables(reading)
            stream = self._stream(reading, tables)
            if reading.optim is None:
                phase = Phase(
                    reading.name,
                    self.ctx.model,
                    stream,
                    self._objective,
                    reading.share,
                    schedule_span=min(reading.share, 1 - start),
                    schedule_start=start,
                    continues=before,
                )
            else:
                phase = Phase(reading.name, self.ctx.model, stream, self._objective, reading.share, reading.optim)
            trained = yield phase
            for table, count in zip(tables, stream.given(trained.tokens // stream.tokens_per_row), strict=True):
                table.read += int(count)
            before = phase if reading.optim is None else None
            start = min(1.0, start + reading.share)

    @property
    def _objective(self) -> Objective:
        packing = self.ctx.recipe.packing
        if packing == "concat":
            return cast(Objective, CausalObjective())
        return cast(Objective, PackedObjective(restart_positions=packing == "document"))

    def _stream(self, reading: Reading, tables: list[_Table]) -> MixedStream:
        sizes = [float(len(table.rows)) for table in tables]
        weights = sizes if reading.weights is None else reading.weights
        parts = [(table.rows, weight) for table, weight in zip(tables, weights, strict=True)]
        walks = [VirtualIndex(table.walk.n, table.walk.seed, table.read) for table in tables]
        recipe = self.ctx.recipe
        return MixedStream(parts, recipe.batch_tokens // recipe.seq_len, walks=walks)

    def _tables(self, reading: Reading) -> list[_Table]:
        formatter = reading.format or PlainFormatter(self.ctx.tokenizer)
        found = []
        for name in reading.tables:
            rows = self._rows(name, formatter)
            key = f"{name} {rows.fingerprint}"
            if key not in self._open:
                seed = derive_seed(self.ctx.recipe.seed, "order", name)
                self._open[key] = _Table(rows, VirtualIndex(len(rows), seed))
            found.append(self._open[key])
        return found

    def _rows(self, table: str, formatter: Formatter) -> Rows:
        ctx = self.ctx
        store = formatted(self.corpus.tables[table], formatter, ctx.room)
        if ctx.room is None:
            return PackedBlocks(store, ctx.recipe.seq_len)
        return PackedExamples(store, ctx.recipe.seq_len, pad_token_id=ctx.pad_token_id)

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
