"""Throw-away models, one for each variant of a corpus: trained alike, resumed, scored by the family, and forgotten."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from headwater.core.budget import Budget, Cost
from headwater.core.cache import atomic_write_text
from headwater.core.fit import fit
from headwater.core.optim import OptimSpec
from headwater.corpora.context import CorpusContext
from headwater.corpora.plan import Corpus, Reading
from headwater.corpora.reading import Reader
from headwater.modalities.text.docs import Document
from headwater.modalities.text.examples import Formatter
from headwater.modalities.text.score import bits_per_byte

__all__ = ["VariantRuns"]


class VariantRuns:
    """Trains the run's model from its start on each of several tables, with everything but the table the same.

    What was found of a variant is kept in ``variants/NAME/result.json``, by which a resumed run does not find it again;
    its weights stay in checkpoints until ``forget``. One model is held beside the run's own.

    Args:
        ctx: the run's, whose model has not been trained yet.
        tables: documents by variant.
        budget: of each.
        as_run: the variant that the run itself trains in the same way, so that its model is the run's; None: none.
    """

    def __init__(
        self, ctx: CorpusContext, tables: Mapping[str, Sequence[Document]], budget: Budget, as_run: str | None = None
    ) -> None:
        self.ctx, self.tables, self.budget, self.as_run = ctx, tables, budget, as_run
        self.directory = ctx.run.nested("variants")
        self._model = cast(PreTrainedModel, copy.deepcopy(ctx.model))
        self.results: dict[str, dict[str, Any]] = {}  # Any: JSON data
        for name in tables:
            stored = self.directory / name / "result.json"
            self.results[name] = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}

    def train(self, name: str) -> None:
        """Train a variant and keep what it costs and its bits per byte of validation text, unless that is known."""
        if name == self.as_run:
            return
        if "cost" not in self.results[name]:
            self._model.load_state_dict(self.ctx.model.state_dict())
            cost = self._fit(name, "train", self.tables[name], self.budget, self.ctx.recipe.optim)
            self.keep(name, cost=cost.to_dict(), valid=self.valid(self._model))
        self.ctx.meter.add(Cost.from_dict(self.results[name]["cost"]))

    def restored(self, name: str) -> PreTrainedModel:
        """The variant's trained model, until the next call; it may be changed.

        Raises:
            FileNotFoundError: its checkpoint was removed by hand.
        """
        if name == self.as_run:
            self._model.load_state_dict(self.ctx.model.state_dict())
        else:
            place = self.directory / name
            if not (place / "checkpoints" / "train").exists():
                raise FileNotFoundError(f"{place} has no weights any more; remove its result.json and run again.")
            self._fit(name, "train", self.tables[name], self.budget, self.ctx.recipe.optim)
        return self._model

    def tuned(
        self, name: str, what: str, documents: Sequence[Document], formatter: Formatter, budget: Budget, lr: float
    ) -> tuple[PreTrainedModel, Cost]:
        """The variant's model after a further training, until the next call, and what that cost."""
        self.restored(name)
        optim = self.ctx.recipe.optim.model_copy(update={"lr": lr})
        cost = self._fit(name, f"tune-{what}", documents, budget, optim, formatter)
        return self._model, cost

    def _fit(
        self,
        name: str,
        phase: str,
        documents: Sequence[Document],
        budget: Budget,
        optim: OptimSpec,
        formatter: Formatter | None = None,
    ) -> Cost:
        """Train the model that is held; what is finished is read from its checkpoint."""
        ctx = self.ctx
        # The table and the phase are called as the run's are, so that a variant reads in the order in which it does.
        plan = Corpus((Reading(phase, 1.0, ("train",), format=formatter),), {"train": documents})
        trained = fit(
            next(Reader(replace(ctx, model=self._model), plan).phases()),
            budget=budget,
            optim=optim,
            seed=ctx.recipe.seed,
            directory=self.directory / name,
            settings=ctx.recipe.fit.model_copy(update={"trackers": ()}),
        )
        return trained.cost

    def valid(self, model: PreTrainedModel) -> float:
        """Bits per byte of the run's validation documents."""
        ctx = self.ctx
        return bits_per_byte(model, ctx.tokenizer, ctx.valid, window=ctx.recipe.seq_len).bits_per_byte

    def keep(self, name: str, **found: Any) -> None:  # Any: JSON data
        """Add to what is known of a variant."""
        self.results[name] |= found
        if self.ctx.run.is_main_process:
            place = self.directory / name
            place.mkdir(parents=True, exist_ok=True)
            atomic_write_text(place / "result.json", json.dumps(self.results[name]) + "\n")

    def save(self, name: str) -> None:
        """Write the variant's model, as transformers opens it, to ``variants/NAME/model``, once."""
        place: Path = self.directory / name / "model"
        if self.ctx.run.is_main_process and not (place / "README.md").exists():
            self.restored(name).save_pretrained(place)
            self.ctx.tokenizer.save_pretrained(place)
            atomic_write_text(place / "README.md", _README.format(name))  # last: it says that the rest is whole

    def forget(self) -> None:
        """Remove the weights."""
        if self.ctx.run.is_main_process:
            for name in self.tables:
                shutil.rmtree(self.directory / name / "checkpoints", ignore_errors=True)


_README = """# Variant {0}

A throw-away model of an ablation, before any finetuning: `AutoModelForCausalLM.from_pretrained(DIR)`.
"""
