"""Meta-training with demonstration retrieval: a small reader that looks labelled examples up instead of storing them.

    p(y | x) = sum_k p(z_k | x) p(y | x, z_k),   p(z_k | x) = softmax_k( score(x, z_k) ),   k = 1 .. K

For each question the K nearest labelled examples of a bank are found by a frozen retriever, and the reader is trained
to answer with them: first on the questions of many tasks, then on the few of the task at hand. It can be pointed to
another bank afterwards.

Source: Mueller et al., "Meta-training with Demonstration Retrieval for Efficient Few-shot Learning", arXiv:2307.00119.
Differs: the reader is any causal or encoder-decoder model, not BART-large alone; the retriever any sentence encoder, or
    BM25, the same for questions and demonstrations (DPR's two encoders: ``DenseRetriever``), not DPR; meta-training
    looks demonstrations up in the meta-training tasks. How the paper sums demonstrations out could not be checked: both
    ways of RAG and all demonstrations in one input are here, sums over whole answers by default. The share of
    meta-training in the budget is ours.
Needs: a small language model, a sentence encoder, labelled questions of the task; of other tasks for meta-training.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from headwater.adapt.demonstrations import DemonstrationBank, Shown, majority_answers
from headwater.adapt.marginalised import MarginalisedLM, Mode
from headwater.adapt.text_to_text import TextTask, TextToText, Written
from headwater.core.fit import Phase, Trained
from headwater.core.recipe import DataRef, ModelRef, Spec
from headwater.core.rng import derive_seed
from headwater.modalities.text.labelled import MINILM
from headwater.modalities.text.pairs import Pairs
from headwater.modalities.text.retrieval import DenseRetriever, LexicalRetriever, encoder_of

if TYPE_CHECKING:
    from headwater.modalities.text.pairs import PairModel

__all__ = ["DemonstratedReader", "DemonstrationRetrieval", "MetaTraining", "retrieval_metrics"]

Show = Callable[[Sequence[str]], Shown]
"""Finds the demonstrations of questions."""


def retrieval_metrics(shown: Shown, targets: Sequence[str]) -> dict[str, float]:
    """How much of the answer lies in what was found, without any reader.

    Args:
        shown: with each question.
        targets: the right answers.

    Returns:
        ``retrieval/same_label@k``, the share of demonstrations that have the question's answer, and
        ``retrieval/knn_accuracy``, how often their most frequent answer is right.
    """
    there = shown.log_weights > -np.inf
    same = np.array([[t == target for t in row] for row, target in zip(shown.targets, targets, strict=True)])
    right = [answer == target for answer, target in zip(majority_answers(shown), targets, strict=True)]
    return {
        "retrieval/same_label@k": float(same[there].mean()),
        "retrieval/knn_accuracy": float(np.mean(right)),
    }


@dataclass(frozen=True, eq=False)
class DemonstratedReader:
    """An ``Answerer`` that looks up demonstrations for what it is asked.

    Attributes:
        lm: reads and writes.
        show: looks up.
    """

    lm: MarginalisedLM
    show: Show

    def answers(self, sources: Sequence[str], *, num_beams: int = 1) -> list[str]:
        """One text for each source."""
        return self.lm.answers(sources, self.show(sources), num_beams=num_beams)

    def nats(self, pairs: Pairs) -> NDArray[np.float64]:
        """Negative log-likelihood of each target per token, ``(n,)``."""
        return self.lm.nats(pairs, self.show(pairs.sources))

    def examine(self, pairs: Pairs) -> Mapping[str, float]:
        """``retrieval_metrics`` of pairs."""
        return retrieval_metrics(self.show(pairs.sources), pairs.targets)


class MetaTraining(Spec):
    """Other tasks, on which the reader learns to read demonstrations."""

    tasks: tuple[DataRef, ...] = Field(min_length=1, description="their sources and targets, one data set each")
    share: float = Field(default=0.9, gt=0, lt=1, description="of the budget; the task itself has the rest")


class DemonstrationRetrieval(TextToText):
    """A reader that is shown retrieved demonstrations, in training and after."""

    id: ClassVar[str] = "demonstration_retrieval"

    bank: tuple[DataRef, ...] = Field(
        default=(), description="sources and targets to find demonstrations in; empty: those of `train`"
    )
    retrieval: Literal["dense", "lexical", "random", "none"] = Field(
        default="dense", description="how they are found: vectors, BM25, any of the bank, or no demonstration"
    )
    retriever: ModelRef = Field(
        default=ModelRef(name=MINILM), description="sentence encoder of `retrieval: dense`, frozen"
    )
    k: int = Field(default=5, gt=0, le=32, description="demonstrations for each question")
    mode: Mode = Field(
        default="sequence",
        description="sum over demonstrations of whole answers, or token by token, or all in one input",
    )
    temperature: float = Field(default=1.0, gt=0, description="divides retrieval scores before their softmax")
    meta_train: MetaTraining | None = Field(default=None, description="other tasks to train on first")

    def phases(self, task: TextTask) -> Generator[Phase, Trained, Written]:
        """Meta-training, if any, then the task, both with demonstrations; the bank is saved beside the model."""
        reader = task.open()
        lm, share = MarginalisedLM(reader, self.mode), 1.0
        kept = [task.read(ref, role=f"bank.{place}") for place, ref in enumerate(self.bank)]
        bank = self._bank(task, _together(kept) if kept else task.train)
        if self.meta_train is not None:
            share -= self.meta_train.share
            tasks = [task.read(ref, role=f"meta_train.{place}") for place, ref in enumerate(self.meta_train.tasks)]
            others = _together(tasks)
            yield self._phase("meta", task, lm, others, self._bank(task, others), self.meta_train.share)
        yield self._phase("finetune", task, lm, task.train, bank, share)
        answerer = DemonstratedReader(lm, self._shower(bank))
        if bank is None:
            return Written(reader, task=answerer)
        if task.run.is_main_process:
            bank.save(task.run.path("bank"))
        return Written(
            reader,
            task=answerer,
            files=("bank/entries.parquet",),
            opening=_opening(reader, self),
            examine=answerer.examine,
        )

    def _phase(
        self, name: str, task: TextTask, lm: MarginalisedLM, pairs: Pairs, bank: DemonstrationBank | None, share: float
    ) -> Phase:
        with task.meter.timed():
            shown = self._shower(bank)(pairs.sources)
        stream = lm.stream(pairs, shown, rows=self.batch_size, seed=self.seed)
        return Phase(name, lm.reader.model, stream, lm.objective, share)

    def _bank(self, task: TextTask, pairs: Pairs) -> DemonstrationBank | None:
        if self.retrieval == "none":
            return None
        # Random demonstrations are looked up by nothing; a store of words costs nothing either.
        dense = self.retrieval == "dense"
        bank = DemonstrationBank(DenseRetriever(encoder_of(self.retriever)) if dense else LexicalRetriever())
        with task.meter.timed():
            bank.add(pairs)
        return bank

    def _shower(self, bank: DemonstrationBank | None) -> Show:
        if bank is None:
            return lambda sources: Shown.nothing(len(sources))
        at_random = derive_seed(self.seed, "random demonstrations") if self.retrieval == "random" else None
        return partial(bank.show, k=self.k, temperature=self.temperature, at_random=at_random)


def _together(parts: Sequence[Pairs]) -> Pairs:
    return Pairs(
        [source for part in parts for source in part.sources], [target for part in parts for target in part.targets]
    )


def _opening(reader: PairModel, recipe: DemonstrationRetrieval) -> str:
    name = "CausalLM" if reader.kind == "causal" else "Seq2SeqLM"
    model = f"AutoModelFor{name}.from_pretrained({repr(recipe.model.name) if recipe.lora else 'DIR'})"
    return _OPENING.format(
        peft="from peft import PeftModel\n" if recipe.lora else "",
        name=name,
        model=f"PeftModel.from_pretrained({model}, DIR)" if recipe.lora else model,
        k=recipe.k,
        ways=_WAYS[recipe.mode].format(recipe.temperature),
    )


_WAYS: dict[Mode, str] = {
    "sequence": "Answer all; take the answer with the highest sum_k softmax(score / {})_k p(answer | prompt_k).",
    "token": "Write token by token for all, by the highest sum_k softmax(score / {})_k p(token | prompt_k).",
    "concat": "Put all demonstrations into one prompt instead, the best one last.",
}
_OPENING = """import json

import pandas
{peft}from transformers import AutoModelFor{name}, AutoTokenizer

model = {model}
tokenizer = AutoTokenizer.from_pretrained(DIR)

# A prompt is a demonstration and the question. Find the {k} that are nearest to it, by the retriever of recipe.yaml.
bank = [json.loads(meta) for meta in pandas.read_parquet(DIR + "/../bank/entries.parquet")["meta"]]
prompts = [bank[k]["source"] + " " + bank[k]["target"] + "\\n\\n" + question for k in nearest]
# {ways}"""
