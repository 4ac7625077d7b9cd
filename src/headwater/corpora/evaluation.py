"""What a corpus was worth: bits per byte of held-out text and answers to questions, the same for every method.

eval/SET/bpb      bits per byte of a set's documents; of the answers, after their questions, where it has questions
eval/SET/exact    share of questions whose greedy answer is the right one
eval/SET/rouge_l  mean ROUGE-L of the answers
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from headwater.core.fit import Phase, Trained
from headwater.core.recipe import Metrics
from headwater.corpora.context import CorpusContext
from headwater.corpora.plan import Condition
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.examples import encoded
from headwater.modalities.text.instruct import exact_match, rouge_l
from headwater.modalities.text.pairs import PairModel, Pairs
from headwater.modalities.text.prepared import held_out_sample
from headwater.modalities.text.score import Scored, bits_per_byte

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["Evaluation", "pair_reader"]

MIDWAY_CHARS = 12_000
MIDWAY_DOCUMENT_CHARS = 1_000


def pair_reader(ctx: CorpusContext, model: nn.Module) -> PairModel:
    """The model as it is asked the recipe's questions.

    Raises:
        CorpusError: ``max_answer`` leaves no room for a question.
    """
    recipe, tokenizer = ctx.recipe, ctx.tokenizer
    if tokenizer.pad_token_id is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    room = recipe.seq_len - recipe.max_answer
    if room < 2:
        raise CorpusError(
            f"max_answer ({recipe.max_answer}) leaves no room for a question in seq_len {recipe.seq_len}; lower it."
        )
    return PairModel(model, tokenizer, "causal", room, recipe.max_answer, recipe.join)


class Evaluation:
    """Scores the model on its way, on excerpts of validation text, and at the end, on the held-out sets.

    Documents are scored alone, without anything before them but the start token; conditions put tokens there.

    Args:
        ctx: the run's.
        tests: held-out documents by set.
        asked: questions with answers by set; those of ``valid`` are looked at on the way.
        further: the plan's own figures of the model on its way.

    Raises:
        CorpusError: neither documents nor questions to choose by.
    """

    def __init__(
        self,
        ctx: CorpusContext,
        tests: Mapping[str, Sequence[Document]],
        asked: Mapping[str, Pairs],
        further: Callable[[PreTrainedModel], Mapping[str, float]] | None = None,
    ) -> None:
        self.ctx, self.tests, self.asked, self.further = ctx, tests, asked, further
        if both := sorted(set(tests) & set(asked)):
            raise CorpusError(f"{both[0]!r} names held-out documents and questions; rename one of them.")
        if not ctx.sources and "valid" not in asked:
            raise CorpusError("there is nothing to choose by: name a source, or hold questions out as 'valid'.")
        self.valid = ctx.valid
        cut = [Document(d.id, d.text[:MIDWAY_DOCUMENT_CHARS], d.meta) for d in self.valid]
        self.sub = held_out_sample(cut, MIDWAY_CHARS)
        self.trajectory: dict[str, list[tuple[float, float]]] = {}
        self._tokens_before = 0

    def _score(self, model: nn.Module, documents: Sequence[Document], heads: Any = None) -> Scored:  # Any: as below
        lm = cast(PreTrainedModel, model)
        return bits_per_byte(lm, self.ctx.tokenizer, documents, heads=heads, window=self.ctx.recipe.seq_len)

    def midway(self, model: nn.Module) -> dict[str, float]:
        """Bits per byte on the excerpts, or of the answers where there is no text; ``fit`` calls it at ``eval_at``."""
        further = self.further(cast(PreTrainedModel, model)) if self.further else {}
        if self.sub:
            return {"valid/bpb": self._score(model, self.sub).bits_per_byte, **further}
        return {"valid/bpb": float(np.sum(self._answer_bits(model, self.asked["valid"])[0])), **further}

    def _answer_bits(self, model: nn.Module, pairs: Pairs) -> tuple[NDArray[np.float64], float]:
        """Bits of each answer over the bytes of all, so that they sum to bits per byte, ``(n,)``; nats per token."""
        reader = pair_reader(self.ctx, model)
        counts = np.array([len(ids) for ids in reader.encode_targets(pairs.targets)])
        nats = reader.nats(pairs) * counts
        size = sum(len(target.encode("utf-8", "surrogatepass")) for target in pairs.targets)
        return nats / math.log(2) / max(1, size), float(nats.sum() / counts.sum())

    def _ask(self, model: nn.Module, name: str, pairs: Pairs, items: dict[str, Any]) -> Metrics:  # Any: JSON data
        place = "valid" if name == "valid" else f"eval/{name}"
        answers = pair_reader(self.ctx, model).answers(pairs.sources)
        bits, nll = self._answer_bits(model, pairs)
        judged = list(zip(answers, pairs.targets, strict=True))
        scores = {
            "exact": [exact_match(*pair) for pair in judged],
            "rouge_l": [rouge_l(*pair) for pair in judged],
            "bpb": (bits * len(bits)).tolist(),  # which averages to the figure of the whole set
        }
        for metric, values in scores.items():
            items[f"{place}/{metric}"] = {"ids": list(map(str, range(len(values)))), "values": values}
        return {f"{place}/{metric}": float(np.mean(values)) for metric, values in scores.items()} | {
            f"{place}/nll": nll
        }

    def add_trajectory(self, phase: Phase, trained: Trained) -> None:
        """Append a phase's trajectory, its tokens counted from the beginning of the run."""
        for point in trained.trajectory:
            tokens = self._tokens_before + point["tokens"]
            for name in (name for name in point if name.startswith("valid/")):
                series = self.trajectory.setdefault(name, [])
                if not series or series[-1][0] < tokens:  # two points may share a step
                    series.append((tokens, point[name]))
        self._tokens_before += trained.tokens

    def score(
        self,
        model: nn.Module,
        conditions: Mapping[str, Condition] | None = None,
        *,
        only: Collection[str] | None = None,
    ) -> tuple[Metrics, dict[str, Any]]:  # Any: JSON data
        """Score every set, or ``only`` some, as it is and under every condition; metrics, and items of each mean."""
        model.eval()
        metrics: Metrics = {}
        items: dict[str, Any] = {}
        for name, pairs in self.asked.items():
            if only is None or name in only:
                metrics |= self._ask(model, name, pairs, items)
        if self.valid and (only is None or "valid" in only):
            metrics["valid/bpb"] = self._score(model, self.valid).bits_per_byte
        for name, documents in self.tests.items():
            if only is not None and name not in only:
                continue
            counts = np.array([len(ids) for ids in encoded(documents, self.ctx.tokenizer)])
            for label, heads in {"": None, **_heads(documents, conditions or {})}.items():
                scored = self._score(model, documents, heads)
                place = f"eval/{name}/{label}" if label else f"eval/{name}"
                metrics[f"{place}/bpb"] = scored.bits_per_byte
                metrics[f"{place}/nll"] = float(scored.nats.sum() / counts.sum())
                # Divided by the mean count, documents average to the figure of the whole set.
                values = scored.nats / math.log(2) / scored.counts.mean()
                items[f"{place}/bpb"] = {"ids": [d.id for d in documents], "values": values.tolist()}
        return metrics, items

    def final(self, model: nn.Module, conditions: Mapping[str, Condition], run: Run) -> Metrics:
        """Score every set; write the run's files and return the metrics."""
        metrics, items = self.score(model, conditions)
        run.write_json("items.json", items)
        if self.trajectory:
            run.write_json("trajectory.json", {"x": "tokens", "series": self.trajectory})
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
