"""Throw-away runs: what a model would lose on watched documents after reading some mixture for a while."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from headwater.core.budget import Budget, Cost
from headwater.core.cache import cache_key
from headwater.core.fit import fit
from headwater.core.rng import derive_seed
from headwater.corpora.context import CorpusContext
from headwater.corpora.plan import Corpus, Reading
from headwater.corpora.reading import Reader, watcher
from headwater.modalities.text.docs import Document
from headwater.modalities.text.examples import Formatter

__all__ = ["CorpusProbe"]

FILE = "probes.json"


class CorpusProbe:
    """Trains a copy of the run's model from its start, with the run's optimizer on a schedule of its own.

    Every run reads a table in the same order, so that runs differ in what they read and in nothing else. What a run
    found is kept in ``probes.json``, by which a resumed run does not train it again; what it cost is charged to the
    run either way.

    Args:
        ctx: the run's, whose model has not been trained yet.
        tables: documents by name.
        watched: documents by name, whose losses are found.
        formatter: of both.
    """

    def __init__(
        self,
        ctx: CorpusContext,
        tables: Mapping[str, Sequence[Document]],
        watched: Mapping[str, Sequence[Document]],
        formatter: Formatter,
    ) -> None:
        self.ctx, self.tables, self.formatter = ctx, tables, formatter
        self._losses = watcher(ctx, watched, formatter)
        self._model = copy.deepcopy(ctx.model)
        stored = ctx.run.nested(FILE)  # where every process reads
        self._known: dict[str, Any] = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}

    def __call__(self, shares: Mapping[str, float], steps: int) -> dict[str, float]:
        """Losses in nats per target, by name, after so many steps on tables in these shares; 0 steps: of the start."""
        if steps == 0:
            return self._losses(self.ctx.model)
        key = f"{steps} steps of {json.dumps(dict(shares))}"
        if key not in self._known:
            self._known[key] = self._train(key, shares, steps)
            self.ctx.run.write_json(FILE, self._known)
        self.ctx.meter.add(Cost.from_dict(self._known[key]["cost"]))
        return dict(self._known[key]["losses"])

    def _train(self, key: str, shares: Mapping[str, float], steps: int) -> dict[str, Any]:  # Any: JSON data
        ctx = self.ctx
        self._model.load_state_dict(ctx.model.state_dict())
        reading = Reading("probe", 1.0, tuple(shares), tuple(shares.values()), self.formatter)
        plan = Corpus((reading,), {name: self.tables[name] for name in shares})
        directory = ctx.run.nested(f"probe-{cache_key(key)}")
        trained = fit(
            next(Reader(replace(ctx, model=self._model), plan).phases()),
            budget=Budget(steps=steps),
            optim=ctx.recipe.optim,
            seed=derive_seed(ctx.recipe.seed, "probe"),
            directory=directory,
            settings=ctx.recipe.fit.model_copy(update={"checkpoint_every": None, "trackers": ()}),
        )
        found = {"losses": self._losses(self._model), "cost": trained.cost.to_dict()}
        if ctx.run.is_main_process:
            shutil.rmtree(directory)
        return found
