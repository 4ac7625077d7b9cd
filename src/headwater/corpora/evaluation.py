"""What a corpus was worth: bits per byte of held-out text, measured the same way for every method of the stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from headwater.core.fit import Phase, Trained
from headwater.core.recipe import Metrics
from headwater.corpora.context import CorpusContext
from headwater.corpora.plan import Condition
from headwater.modalities.text.docs import Document
from headwater.modalities.text.examples import encoded
from headwater.modalities.text.prepared import held_out_sample
from headwater.modalities.text.score import Scored, bits_per_byte

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["Evaluation"]

MIDWAY_CHARS = 12_000
MIDWAY_DOCUMENT_CHARS = 1_000


class Evaluation:
    """Scores the model on its way, on excerpts of validation text, and at the end, on the held-out sets.

    Documents are scored alone, without anything before them but the start token; conditions put tokens there.

    Args:
        ctx: the run's.
        tests: held-out documents by set.
    """

    def __init__(self, ctx: CorpusContext, tests: Mapping[str, Sequence[Document]]) -> None:
        self.ctx, self.tests = ctx, tests
        self.valid = ctx.valid
        cut = [Document(d.id, d.text[:MIDWAY_DOCUMENT_CHARS], d.meta) for d in self.valid]
        self.sub = held_out_sample(cut, MIDWAY_CHARS)
        self.trajectory: list[tuple[float, float]] = []
        self._tokens_before = 0

    def _score(self, model: nn.Module, documents: Sequence[Document], heads: Any = None) -> Scored:  # Any: as below
        lm = cast(PreTrainedModel, model)
        return bits_per_byte(lm, self.ctx.tokenizer, documents, heads=heads, window=self.ctx.recipe.seq_len)

    def midway(self, model: nn.Module) -> dict[str, float]:
        """Bits per byte on the excerpts; what ``fit`` calls at ``eval_at``."""
        return {"valid/bpb": self._score(model, self.sub).bits_per_byte}

    def add_trajectory(self, phase: Phase, trained: Trained) -> None:
        """Append a phase's trajectory, its tokens counted from the beginning of the run."""
        for point in trained.trajectory:
            tokens = self._tokens_before + point["tokens"]
            if not self.trajectory or self.trajectory[-1][0] < tokens:  # two points may share a step
                self.trajectory.append((tokens, point["valid/bpb"]))
        self._tokens_before += trained.tokens

    def final(self, model: nn.Module, conditions: Mapping[str, Condition], run: Run) -> Metrics:
        """Score every set, as it is and under every condition; write the run's files and return the metrics."""
        model.eval()
        metrics: Metrics = {"valid/bpb": self._score(model, self.valid).bits_per_byte}
        items: dict[str, Any] = {}  # Any: JSON data
        for name, documents in self.tests.items():
            counts = np.array([len(ids) for ids in encoded(documents, self.ctx.tokenizer)])
            for label, heads in {"": None, **_heads(documents, conditions)}.items():
                scored = self._score(model, documents, heads)
                place = f"eval/{name}/{label}" if label else f"eval/{name}"
                metrics[f"{place}/bpb"] = scored.bits_per_byte
                metrics[f"{place}/nll"] = float(scored.nats.sum() / counts.sum())
                # Divided by the mean count, documents average to the figure of the whole set.
                values = scored.nats / math.log(2) / scored.counts.mean()
                items[f"{place}/bpb"] = {"ids": [d.id for d in documents], "values": values.tolist()}
        run.write_json("items.json", items)
        if self.trajectory:
            run.write_json("trajectory.json", {"x": "tokens", "series": {"valid/bpb": self.trajectory}})
        return metrics


def _heads(documents: Sequence[Document], conditions: Mapping[str, Condition]) -> dict[str, list[Sequence[int]]]:
    """The tokens before each document under each condition that knows all of them."""
    found: dict[str, list[Sequence[int]]] = {}
    for name, condition in conditions.items():
        heads = [condition(document) for document in documents]
        known = [head for head in heads if head is not None]
        if len(known) == len(documents):
            found[name] = known
    return found
