"""Choosing what a model reads: sources + a plan + a model + budget -> a model, and what the plan was worth.

A method says in one hook, ``build``, which documents are read, in which proportion, form and order: a ``Corpus``. What
every method of the stage shares is here: the sources with their hygiene, the training, and the figures.
"""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, StringConstraints, field_validator, model_validator

from headwater.core.budget import GivenBudget
from headwater.core.cache import atomic_write_text
from headwater.core.family import Axis, Family
from headwater.core.fit import FitSettings, fit_phases
from headwater.core.optim import OptimSpec
from headwater.core.phase import EvalAt
from headwater.core.recipe import CorpusRef, DataRef, Metrics, Recipe
from headwater.corpora.context import CorpusContext
from headwater.corpora.evaluation import Evaluation
from headwater.corpora.plan import Corpus
from headwater.corpora.reading import Reader
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.fresh import Model
from headwater.modalities.text.pairs import Pairs, source_digest
from headwater.modalities.text.sources import open_labelled

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["FAMILY", "CorpusRecipe", "check_no_question_is_read"]

T = TypeVar("T")

MAX_EPOCHS_IN_SILENCE = 4

TableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class CorpusRecipe(Recipe):
    """Family of the stage ``corpora``: one hook, ``build``."""

    sources: dict[TableName, CorpusRef] = Field(min_length=1, description="name -> texts that there are to read")
    model: Model = Field(
        description="causal model and tokenizer: Hub name, local directory, or a small one made here, "
        "e.g. {kind: llama, hidden: 64}"
    )
    from_scratch: bool = Field(default=True, description="draw new weights; false continues from the model's own")
    seq_len: int = Field(default=1024, ge=8, le=131_072, description="tokens per row")
    batch_tokens: int = Field(default=32_768, gt=0, description="input tokens per optimizer step, padding included")
    packing: Literal["concat", "document", "document, running positions"] = Field(
        default="document",
        description="concat: documents end to end, cut anywhere, all seen; document: whole documents in a row, each "
        "seen alone, positions from 0; running positions: the same, counted through the row",
    )
    optim: OptimSpec = Field(
        default=OptimSpec(lr=1e-3, weight_decay=0.1, warmup=0.02), description="how weights are moved"
    )
    budget: GivenBudget = Field(
        description="what the training may spend: tokens (all that the model is given), steps, flops or seconds"
    )
    eval_at: EvalAt = Field(
        default=(0.0, 0.25, 0.5, 0.75, 1.0), description="fractions of each phase at which validation text is scored"
    )
    evals: dict[TableName, CorpusRef] = Field(
        default={},
        description="name -> further held-out texts: what the corpus is for, and general text, so that a gain which "
        "costs everything else shows",
    )
    questions: dict[TableName, DataRef] = Field(
        default={},
        description="name -> questions (`input_field`) and answers (`label_field`), asked at the end and never read: "
        "eval/NAME/exact, eval/NAME/rouge_l",
    )
    join: str = Field(default=" ", max_length=20, description="stands between a question and its answer")
    max_answer: int = Field(default=32, gt=0, description="tokens of an answer, and of what is written for one")
    held_out: float = Field(
        default=0.02,
        gt=0,
        lt=0.5,
        description="share of the sources' documents kept for eval/held_out; half of it again goes to validation",
    )
    eval_chars: int = Field(default=400_000, gt=0, description="characters of each held-out set that are scored")
    fit: FitSettings = Field(
        default=FitSettings(), description="how the loop runs: precision, micro-batches, checkpoints"
    )

    @field_validator("evals", "questions")
    @classmethod
    def _name_is_free(cls, value: dict[str, T]) -> dict[str, T]:
        if taken := {"held_out", "valid"} & set(value):
            raise ValueError(f"{min(taken)!r} names held-out parts of the sources; choose another name")
        return value

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if both := sorted(set(self.evals) & set(self.questions)):
            raise ValueError(f"{both[0]!r} names a text and a set of questions; choose another name for one")
        return self

    @abstractmethod
    def build(self, ctx: CorpusContext) -> Corpus:
        """The plan of what is read: a pure function of ``ctx``, called again when a run is resumed."""

    def asked(self) -> dict[str, Pairs]:
        """Questions with answers by name, which ``build`` does not see: what ``questions`` names.

        A method that makes its own adds them, ``held_out`` for its figure and ``valid`` for choosing.
        """
        return {name: Pairs(*open_labelled(ref, role=f"questions.{name}")) for name, ref in self.questions.items()}

    def run(self, run: Run) -> Metrics:
        """Split and clean the sources, build the corpus, read it, measure, save."""
        ctx, tests = CorpusContext.open(self, run)
        begin = time.monotonic()
        corpus = self.build(ctx)
        seconds = time.monotonic() - begin
        asked = self.asked()
        check_no_question_is_read(corpus.tables, asked)
        evaluation, reader = Evaluation(ctx, tests, asked, corpus.midway), Reader(ctx, corpus)
        fit_phases(
            reader.phases(),
            budget=lambda: self.budget,
            optim=self.optim,
            seed=self.seed,
            directory=run.directory,
            settings=self.fit,
            evaluate=evaluation.midway,
            eval_at=self.eval_at,
            meter=ctx.meter,
            log=run.log,
            ended=evaluation.add_trajectory,
        )
        metrics = reader.metrics() | _sizes(ctx, corpus) | {"data_seconds": seconds}
        if metrics["epochs"] > MAX_EPOCHS_IN_SILENCE:
            ctx.warn("epochs", f"a table was read {metrics['epochs']:.1f} times; expect memorising, or give more text")
        metrics |= evaluation.final(ctx.model, corpus.conditions, run)
        if corpus.examine is not None:
            metrics |= corpus.examine(ctx.model)
        if corpus.compare is not None:
            metrics |= corpus.compare(evaluation.score)
        _save(self, ctx, corpus, reader)
        run.cost = ctx.meter.cost.to_dict()
        return metrics


def _sizes(ctx: CorpusContext, corpus: Corpus) -> Metrics:
    """Documents and bytes that went in and came out, and what left because it repeats held-out text."""
    read = [source.train for source in ctx.sources.values()]
    return {
        "docs_in": float(sum(map(len, read))),
        "docs_out": float(sum(map(len, corpus.tables.values()))),
        "bytes_in": float(sum(map(_bytes, read))),
        "bytes_out": float(sum(map(_bytes, corpus.tables.values()))),
        "data/dropped_overlap": float(ctx.dropped),
    }


def _bytes(documents: Sequence[Document]) -> int:
    return sum(len(document.text.encode("utf-8", "surrogatepass")) for document in documents)


def check_no_question_is_read(tables: Mapping[str, Sequence[Document]], asked: Mapping[str, Pairs]) -> None:
    """Refuse a table that holds a question as a prompt; text that quotes one is for ``Decontaminate`` to find.

    Raises:
        CorpusError: names table, question and set.
    """
    known = {source_digest(source): name for name, pairs in asked.items() for source in pairs.sources}
    for table, documents in tables.items() if known else ():
        for document in documents:
            if "prompt" in document.meta and (name := known.get(source_digest(str(document.meta["prompt"])))):
                raise CorpusError(
                    f"table {table!r} holds a question of {name!r} as the prompt of document {document.id!r}: "
                    f"{str(document.meta['prompt'])[:80]!r}. What is asked must not be read."
                )


def _save(recipe: CorpusRecipe, ctx: CorpusContext, corpus: Corpus, reader: Reader) -> None:
    """Write ``corpus.json``, the plan, and ``model/`` with a README that says how to call it."""
    weighed = {weighing.phase: weighing for weighing in reader.weighings}
    phases = []
    for reading in corpus.phases:
        about: dict[str, Any] = {"name": reading.name, "share": reading.share, "tables": list(reading.tables)}
        if reading.name in weighed:
            about |= {"weights": weighed[reading.name].shares, "losses": weighed[reading.name].losses}
        else:
            about |= {"weights": None if not isinstance(reading.weights, tuple) else list(reading.weights)}
        about |= {"format": None if reading.format is None else dict(reading.format.about)}
        phases.append(about)
    documents = {name: len(table) for name, table in corpus.tables.items()}
    ctx.run.write_json("corpus.json", {"phases": phases, "documents": documents})
    ctx.model.save_pretrained(ctx.run.model)
    ctx.tokenizer.save_pretrained(ctx.run.model)
    named = [f"`{ref.name}`" for ref in recipe.sources.values()] or ["documents that the method made"]
    lines = [f"# {recipe.id}", "", f"Trained on {', '.join(named)}.", ""]
    lines += ["```python", "from transformers import AutoModelForCausalLM", ""]
    lines += ["model = AutoModelForCausalLM.from_pretrained(DIR)", "```", ""]
    if corpus.usage:
        atomic_write_text(ctx.run.model / "corpus.json", json.dumps(dict(corpus.usage), indent=2) + "\n")
        lines += [corpus.readme, "", "`corpus.json` says the same to a program.", ""]
    files = ", ".join(f"`{name}`" for name in ("corpus.json", *corpus.files))
    lines += [f"Beside this directory: {files}.", ""]
    atomic_write_text(ctx.run.model / "README.md", "\n".join(lines))


FAMILY = Family(
    stage="corpora",
    gain=Axis("eval/held_out/bpb", "Held-out text", "lower", "bits/byte"),
    price=None,
    columns=(
        Axis("tokens_loss", "Tokens learned from", "higher", "tokens", ".3g"),
        Axis("tokens_unique", "Different tokens", "higher", "tokens", ".3g"),
        Axis("epochs", "Epochs", "lower", "", ".2f"),
        Axis("docs_out", "Documents", "higher", "", ",.0f"),
    ),
    selection=Axis("valid/bpb", "Validation text", "lower", "bits/byte"),
    selection_price=None,
    references={"raw": {"method": "raw"}},
    baseline="raw",
    trajectories=(Axis("valid/bpb", "Validation text", "lower", "bits/byte"),),
)
