"""A pretrainer's guide: what a decision of curation buys and what it costs, one decision at a time.

    base      the sources after ``curation``, each document with its date, domain and scores
    variants  base + {}, base + one decision of one axis, ...          scored once, then a condition over metadata each
    train     a copy of the model for each, with the same start, order, schedule and number of tokens
    score     all on the same held-out text and questions, after the same finetuning where one is asked for
    report    score(variant) - score(base) on every set, paired over its items; loss per year of distance

Source: Longpre et al., "A Pretrainer's Guide to Training Data: Measuring the Effects of Data Age, Domain Coverage,
    Quality & Toxicity", arXiv:2305.13169: 28 decoder models of 1.5B parameters on variants of C4 and the Pile.
Differs: the score of quality is a classifier's between your curated texts and the rest, as the paper's, but ours (see
    ``QualityClassifier``), and text that repeats held-out documents is left out of its positives with a warning; age is
    a date of the document, where the paper has crawls of four years; temporal degradation as ``temporal`` defines it;
    thresholds as ``ablation`` does. Toxicity of what is written is of any scorer, the paper's being a service. The
    report is tables and the curation page, without the picture of toxic generation against score.
Needs: text with dates, domains or something to score it by; held-out text or questions that matter.

Carried over from the paper, as what to look for: what was pretrained on older or newer text than it is asked loses
score, finetuning does not repair it, and the more so the larger the model; filters of quality help although they remove
data, and raise toxic generation; filters of toxicity lower toxic generation, and the detection of toxicity and the
general score with it, while the inverse filter is best for detection; neither effect can be told from statistics of the
text; of domains, removing the varied ones (web, books) hurts most.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from headwater.core.budget import Budget, Cost
from headwater.core.cache import atomic_write_text
from headwater.core.recipe import DataRef, Spec
from headwater.corpora.ablation import BASE, AblationAxis, Steps, ablation_table, make_variants, year_of
from headwater.corpora.ablation_runs import VariantRuns
from headwater.corpora.base import CorpusRecipe, TableName, check_no_question_is_read
from headwater.corpora.context import CorpusContext
from headwater.corpora.continuations import GenerationEval, continuation_scores
from headwater.corpora.curation import CurationSpec, FieldName, KeepSpec, StepSpec
from headwater.corpora.plan import Corpus, Reading, Scoring
from headwater.corpora.profile import corpus_profile
from headwater.corpora.temporal import TDResult, temporal_degradation
from headwater.modalities.text.conditions import condition
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.document_store import DocumentStore, write_documents
from headwater.modalities.text.examples import PlainFormatter, formatted, target_counts
from headwater.modalities.text.instruct import AnswerFormatter, answered
from headwater.modalities.text.sources import open_labelled

__all__ = [
    "AblationAxis",
    "FinetuneSpec",
    "GenerationEval",
    "PretrainersGuide",
    "TDResult",
    "ablation_table",
    "corpus_profile",
    "make_variants",
    "temporal_degradation",
]

BEST = "best"
UNDATED = 0.01
"""Share of documents without a date up to which those are left out of every age; above, the column is refused."""


class FinetuneSpec(Spec):
    """A finetuning of every variant before it is asked, the same for all."""

    data: dict[TableName, DataRef] = Field(
        min_length=1, description="set of `questions` -> questions and answers to learn from before it is asked"
    )
    tokens: int = Field(gt=0, description="of each finetuning")
    lr: float = Field(gt=0, description="its learning rate")


class PretrainersGuide(CorpusRecipe):
    """Variants of a corpus, a model for each, and what each decision changed; then the model of the one you name."""

    id: ClassVar[str] = "pretrainers_guide"

    curation: CurationSpec | None = Field(
        default=None, description="steps of the base, scores that axes look at included; null: the sources as they are"
    )
    axes: tuple[AblationAxis, ...] = Field(min_length=1, description="decisions, each tried by itself")
    cross: bool = Field(default=False, description="also combine a value of each of several axes")
    read: str = Field(
        default=BASE,
        description="the variant whose model is kept: base, a variant's name, or best, by bits per byte of the "
        "sources' validation documents",
    )
    variant_tokens: int | None = Field(
        default=None, gt=0, description="what each variant is trained on; null: as much as the budget says"
    )
    max_epochs: float = Field(default=4.0, gt=0, description="a variant that were read more often is refused")
    date_field: FieldName = Field(
        default="year", description="for age: column with a document's year or date, of which `year` is made"
    )
    eval_years: dict[TableName, int] = Field(
        default={}, description="set of `evals` or `questions` -> its year, for the loss per year of distance"
    )
    finetune: FinetuneSpec | None = Field(default=None, description="of every variant before it is asked")
    generation: GenerationEval | None = Field(default=None, description="what every variant writes, scored")
    keep_models: bool = Field(default=False, description="keep every variant's model, in variants/NAME/model")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = list(make_variants((), self.axes, self.cross))
        if self.read not in (*names, BEST):
            raise ValueError(f"read: there is no variant {self.read!r}; there are {', '.join((BEST, *names))}")
        if self.variant_tokens is None and self.budget.kind not in ("tokens", "steps"):
            raise ValueError(
                f"variants read equally many tokens, and a budget in {self.budget.kind} may give each another number; "
                "give the budget in tokens or steps, or variant_tokens"
            )
        if unknown := sorted(set(self.eval_years) - {*self.evals, *self.questions}):
            raise ValueError(f"eval_years: {unknown[0]!r} is neither among evals nor questions")
        if self.finetune and (unknown := sorted(set(self.finetune.data) - set(self.questions))):
            raise ValueError(f"finetune.data: {unknown[0]!r} is no set of questions, so nothing is asked after it")
        return self

    def build(self, ctx: CorpusContext) -> Corpus:
        """Make the base and its variants, train a model for each, and plan to read the one that was named."""
        base = self._base(ctx)
        atomic_write_text(ctx.run.path("profile.csv"), corpus_profile(base).to_csv())
        tables = self._variants(ctx, base)
        as_run = self.read if self.read != BEST and self.variant_tokens is None else None
        runs = VariantRuns(ctx, tables, self._variant_budget, as_run)
        tuning = self._tuning(ctx)
        for name in tables:
            runs.train(name)
        read = self.read
        if read == BEST:
            read = min(tables, key=lambda name: float(runs.results[name]["valid"]))
            ctx.run.notes["variant read"] = read
        return Corpus(
            (Reading("train", 1.0, ("train",)),),
            {"train": tables[read]},
            compare=partial(self._compare, ctx, runs, tuning),
            files=("variants", "ablation.csv", "profile.csv", *(("curation",) if self.curation else ())),
        )

    @property
    def _variant_budget(self) -> Budget:
        return self.budget if self.variant_tokens is None else Budget(tokens=self.variant_tokens)

    def _base(self, ctx: CorpusContext) -> DocumentStore:
        """All sources in one table, each document with its domain and year, after the steps of the base."""
        path = ctx.run.path("base.arrow")
        base = DocumentStore(path) if path.exists() else write_documents(self._described(ctx), path)
        if self.curation is not None:
            directory = ctx.run.path("curation")
            done = self.curation.run(base, directory, seed=self.seed, warn=ctx.warn, read=ctx.read)
            steps = {BASE: [asdict(step) for step in done.steps]}
            atomic_write_text(directory / "curated.json", json.dumps({"sources": steps}) + "\n")
            base = done.documents
        return base

    def _described(self, ctx: CorpusContext) -> Iterator[Document]:
        """Every training document with ``domain``, its source where it names none, and the ``year`` of its date.

        Raises:
            CorpusError: more than 1 % have no date, or a document of another source has the same id.
        """
        aged = any(axis.kind == "age" and axis.field is None for axis in self.axes)
        undated: list[str] = []
        total = 0
        for name, source in ctx.sources.items():
            for document in source.train:
                total += 1
                meta: dict[str, Any] = {"domain": name, **document.meta}  # Any: JSON data
                if aged:
                    meta["year"] = year_of(meta.get(self.date_field))
                    if meta["year"] is None:
                        undated.append(document.id)
                identity = document.id if len(ctx.sources) == 1 else f"{name}/{document.id}"
                yield Document(identity, document.text, meta)
        if len(undated) > UNDATED * total:
            raise CorpusError(
                f"{len(undated)} of {total} documents ({len(undated) / total:.1%}) have no date in "
                f"{self.date_field!r}, e.g. {', '.join(undated[:3])}; a date is a year or ISO 8601. Leave them out, or "
                "name another date_field."
            )
        if undated:
            ctx.warn("dates", f"{len(undated)} of {total} documents have no date and are of no age")

    def _variants(self, ctx: CorpusContext, base: DocumentStore) -> dict[str, DocumentStore]:
        """The documents of every variant; the base's stand in every store once."""
        metadata = [document.meta for document in base]
        self._check_metadata(metadata)
        counts = target_counts(formatted(base, PlainFormatter(ctx.tokenizer), ctx.room), len(base))
        tables: dict[str, DocumentStore] = {}
        for name, steps in make_variants((), self.axes, self.cross).items():
            keeps = [condition(step.when) for step in takewhile(_is_keep, steps) if isinstance(step, KeepSpec)]
            kept = np.flatnonzero([all(keep(meta) for keep in keeps) for meta in metadata])
            self._check_size(name, counts, kept, metadata)
            tables[name] = self._further(ctx, name, steps, base.select(kept) if name != BASE else base)
            atomic_write_text(_made(ctx, name) / "ids.txt", "".join(f"{i}\n" for i in tables[name].ids()))
        return tables

    def _further(self, ctx: CorpusContext, name: str, steps: Steps, kept: DocumentStore) -> DocumentStore:
        """What is left after the steps of a variant from the first on that is more than a condition."""
        further = tuple(dropwhile(_is_keep, steps))
        if not further:
            return kept
        spec = self.curation or CurationSpec(steps=further)
        spec = spec.model_copy(update={"steps": further})
        done = spec.run(kept, _made(ctx, name) / "curation", seed=self.seed, warn=ctx.warn, read=ctx.read)
        table: DocumentStore = done.documents
        counts = target_counts(formatted(table, PlainFormatter(ctx.tokenizer), ctx.room), len(table))
        self._check_size(name, counts, np.arange(len(table)), [])
        return table

    def _check_metadata(self, metadata: Sequence[Mapping[str, Any]]) -> None:  # Any: what documents' metadata hold
        for axis in self.axes:
            lacking = [] if axis.kind == "steps" else [meta for meta in metadata if axis.looked_at not in meta]
            if lacking:
                cure = {
                    "quality": "add {kind: quality, positives: ...} to curation.steps",
                    "toxicity": "add {kind: lexicon, words: ...} or {kind: classifier, ...} to curation.steps",
                }.get(axis.kind, "name another field")
                raise CorpusError(
                    f"axis {axis.kind!r} looks at {axis.looked_at!r}, which {len(lacking)} of {len(metadata)} "
                    f"documents have not; {cure}. There are {', '.join(sorted(lacking[0]))}."
                )
            there = {str(meta[axis.looked_at]) for meta in metadata} if axis.kind == "domain" else set()
            if absent := sorted(axis.domains() - there):
                raise CorpusError(f"there is no domain {absent[0]!r}; there are {', '.join(sorted(there))}")

    def _check_size(
        self, name: str, counts: NDArray[np.int64], kept: NDArray[np.int64], metadata: Sequence[Mapping[str, Any]]
    ) -> None:
        """Refuse a variant that would be read more often than ``max_epochs`` times."""
        rows = self.batch_tokens // self.seq_len * self.seq_len
        budget = self._variant_budget
        tokens = budget.amount * (rows if budget.kind == "steps" else 1)
        needed, found = tokens / self.max_epochs, int(counts[kept].sum())
        if found >= needed:
            return
        enough = ""
        for axis in self.axes if metadata else ():
            if axis.kind in ("quality", "toxicity") and name in axis.named():
                scores = np.array([axis.score(meta) for meta in metadata])
                order = np.argsort(-scores if axis.inverse else scores, kind="stable")
                place = int(np.searchsorted(np.cumsum(counts[order]), needed))
                if place < len(order):
                    round_up, word = (math.floor, "largest") if axis.inverse else (math.ceil, "smallest")
                    threshold = round_up(float(scores[order[place]]) * 1e4) / 1e4
                    enough = f"; the {word} threshold that would do is {threshold:g}"
        raise CorpusError(
            f"variant {name!r} keeps {found:,} tokens, which {tokens:,.0f} tokens of training read "
            f"{tokens / max(1, found):.1f} times, more than max_epochs {self.max_epochs:g}{enough}. Train on less, or "
            "raise max_epochs."
        )

    def _tuning(self, ctx: CorpusContext) -> dict[str, list[Document]]:
        """What variants are finetuned on, by the set of questions that follows."""
        found: dict[str, list[Document]] = {}
        for name, ref in self.finetune.data.items() if self.finetune else ():
            questions, answers = open_labelled(ref, role=f"finetune.data.{name}")
            found[name] = [
                answered(str(i), question, answer, join=self.join)
                for i, (question, answer) in enumerate(zip(questions, answers, strict=True))
            ]
        check_no_question_is_read({f"finetune.data.{name}": rows for name, rows in found.items()}, self.asked())
        return found

    def _compare(
        self, ctx: CorpusContext, runs: VariantRuns, tuning: Mapping[str, Sequence[Document]], score: Scoring
    ) -> dict[str, float]:
        """Score every variant and write ``ablation.csv``."""
        for name in runs.tables:
            if "items" not in runs.results[name]:
                self._score(ctx, runs, name, tuning, score)
            if self.keep_models:
                runs.save(name)
            for cost in runs.results[name]["tuning"]:
                ctx.meter.add(Cost.from_dict(cost))
        results = runs.results
        values = {name: {m: own["values"] for m, own in found["items"].items()} for name, found in results.items()}
        atomic_write_text(ctx.run.path("ablation.csv"), ablation_table(values).to_csv(index=False))
        metrics = {
            f"variants/{name}/{m}": value for name, own in results.items() for m, value in own["metrics"].items()
        }
        metrics |= self._degradation(ctx, values)
        runs.forget()
        return metrics

    def _score(
        self,
        ctx: CorpusContext,
        runs: VariantRuns,
        name: str,
        tuning: Mapping[str, Sequence[Document]],
        score: Scoring,
    ) -> None:
        model = runs.restored(name)
        metrics, items = score(model)
        if self.generation is not None:
            prompts = ctx.read(self.generation.prompts, "generation.prompts")
            settings = self.generation.model_dump(include={"n", "max_tokens", "top_p"})
            texts = [document.text for document in prompts]
            toxic = continuation_scores(model, ctx.tokenizer, texts, self.generation.scorer.scorer(), **settings)
            items["generation/worst"] = {"ids": prompts.ids(), "values": toxic.max(axis=1).tolist()}
            items["generation/mean"] = {"ids": prompts.ids(), "values": toxic.mean(axis=1).tolist()}
            metrics |= {
                f"generation/{of}": float(np.mean(items[f"generation/{of}"]["values"])) for of in ("worst", "mean")
            }
        costs = []
        for what, documents in tuning.items():
            assert self.finetune is not None
            budget, formatter = Budget(tokens=self.finetune.tokens), AnswerFormatter(ctx.tokenizer)
            model, cost = runs.tuned(name, what, documents, formatter, budget, self.finetune.lr)
            costs.append(cost.to_dict())
            asked, answers = score(model, only={what})
            metrics, items = metrics | asked, items | answers
        metrics |= {"documents": float(len(runs.tables[name]))}
        runs.keep(name, metrics=metrics, items=items, tuning=costs)

    def _degradation(self, ctx: CorpusContext, values: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, float]:
        """Loss per year of distance, over questions (exact answers) and over texts (bits per byte, negated)."""
        ages = {
            name: (first + last) / 2
            for axis in self.axes
            if axis.kind == "age" and not axis.inverse
            for name, (first, last) in axis.ages().items()
        }
        found: dict[str, Any] = {}  # Any: JSON data
        for metric, sets, sign in (("exact", self.questions, 1.0), ("bpb", self.evals, -1.0)):
            dated = {name: year for name, year in self.eval_years.items() if name in sets}
            if not dated or not ages:
                continue
            items = [sign * np.array([values[name][f"eval/{of}/{metric}"] for name in ages]) for of in dated]
            scores = np.stack([own.mean(axis=1) for own in items], axis=1)
            try:
                fitted = temporal_degradation(scores, list(ages.values()), list(dated.values()), items=items)
            except ValueError as error:
                ctx.warn("temporal", f"no temporal degradation of {metric}: {error}")
                continue
            found[metric] = asdict(fitted)
        if found:
            ctx.run.write_json("temporal.json", found)
        return {
            f"temporal/{metric}/{name}": float(value)
            for metric, own in found.items()
            for name, value in own.items()
            if name != "ci" and value is not None
        }


def _is_keep(step: StepSpec) -> bool:
    return isinstance(step, KeepSpec)


def _made(ctx: CorpusContext, name: str) -> Path:
    place = ctx.run.path("variants") / name
    place.mkdir(parents=True, exist_ok=True)
    return place
