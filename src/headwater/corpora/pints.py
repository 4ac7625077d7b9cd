"""1.5-Pints: a pretraining plan for a small budget, from sources to a model, with nothing decided by feeling.

    score    p(expository | text), a classifier of your textbook-like texts against the rest; the best share stays
    review   a person reads a sample of each source over its scores; sources that fail leave
    tokens   the tokenizer that compresses the corpus best, with padding, chat tokens and free places: a multiple of 64
    plan     tokens_s = min(cap_s size_s, lambda weight_s), lambda such that they sum to the budget
    read     documents end to end; a row's last token begins the next, so that every token is predicted once

Source: Tan and Wang, "1.5-Pints Technical Report: Pretraining in Days, Not Months", arXiv:2408.03506: weights toward
    textbooks and encyclopedias, samples of each source reviewed by hand, Mistral's tokenizer chosen by compression and
    extended to 32 064 entries, 1.56B parameters, batches of 512 rows of 2048, learning rate 4e-4 to 4e-5 by cosine
    after 2000 of 96 180 steps of warmup, decay 0.1, clipping at 1.
Differs: the score is a classifier's, since the paper's is not published; the share that stays (0.3) and the rule of
    the review are ours; a row of ``seq_len`` tokens holds one that is only predicted, where the authors cut disjoint
    rows of one token more; tokens stay in the user cache, as every method's do, and ``pack`` writes them where you say;
    the sizes of the layers were not checked against the authors' code. Instruction tuning and DPO are no fields: what
    comes after pretraining is a further step of a ``Pipeline``, such as ``text_finetuning`` on ``previous``.
Needs: texts from several sources, some that are as all should be, an architecture.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, StringConstraints, model_validator
from transformers import LlamaConfig, PreTrainedTokenizerBase

from headwater.core.cache import atomic_write_text
from headwater.core.optim import OptimSpec
from headwater.core.order import permutation
from headwater.core.recipe import CorpusRef, ModelRef, Spec
from headwater.core.rng import derive_seed
from headwater.corpora.base import CorpusRecipe, TableName
from headwater.corpora.context import CorpusContext
from headwater.corpora.curation import QUALITY_CHARS, ExecutorSpec, train_quality
from headwater.corpora.mixture import Planned, Source, mixture_plan
from headwater.corpora.plan import Corpus, Reading
from headwater.corpora.review import ReviewQueue
from headwater.corpora.vocabulary import (
    check_vocabulary,
    compare_tokenizers,
    extend_tokenizer,
    resize_model,
    vocabulary_size,
)
from headwater.modalities.models import load_tokenizer
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.document_store import DocumentStore
from headwater.modalities.text.examples import PlainFormatter, formatted
from headwater.modalities.text.packing import PackedBlocks, tokenize_documents
from headwater.modalities.text.prepared import held_out_sample

__all__ = [
    "Pints",
    "Planned",
    "ReviewQueue",
    "Source",
    "compare_tokenizers",
    "extend_tokenizer",
    "mixture_plan",
    "pack",
    "pints_config",
    "resize_model",
    "train_quality",
]

COMPARED_CHARS = 500_000
"""Characters of a source that tokenizers are compared on."""
SHARED_SEED = 0
"""Of the score and of the reviewed sample, so that one review serves every seed of a recipe."""


def pack(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    context: int = 2048,
    *,
    out: str | Path | None = None,
    seed: int = 0,
) -> PackedBlocks:
    """Documents end to end, each closed by EOS, in rows of ``context + 1`` tokens that share one with their neighbour.

    Row i holds the tokens ``[i context, (i + 1) context]``: ``context`` inputs and as many targets, so every token but
    the first is a target once, and ``floor((tokens - 1) / context)`` rows are whole. Position p of the data set is a
    function of (seed, epoch, place), so reading goes on from any; tokens are memory-mapped where ``out`` is given, and
    ``PackedBlocks(TokenStore.open(out), context + 1, overlap=1)`` opens them again.

    Args:
        documents: read once, a batch at a time; the tokenizer's own threads work on a batch.
        tokenizer: with an EOS. Ids up to 65 535 take two bytes, larger ones four.
        context: input tokens of a row.
        out: a directory; None keeps tokens in memory.
        seed: of the order in which rows are read.

    Raises:
        CorpusError: there is no document.
        ValueError: the tokenizer has no EOS, or there is less than one row.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token to close documents; set tokenizer.eos_token.")
    dtype = np.uint16 if vocabulary_size(tokenizer) <= 1 << 16 else np.uint32
    return PackedBlocks(tokenize_documents(documents, tokenizer, out=out, dtype=dtype), context + 1, seed, overlap=1)


def pints_config(tokenizer: PreTrainedTokenizerBase | None = None, context: int = 2048) -> LlamaConfig:
    """The paper's architecture: 1.56 billion parameters.

    Save it beside the tokenizer (``save_pretrained`` of both into one directory) and name the directory as ``model``.

    Args:
        tokenizer: gives the vocabulary and the special ids; None: 32 064 entries.
        context: positions, 2048 or 16 384 in the paper.
    """
    ids = {
        name: getattr(tokenizer, name) if tokenizer is not None else None
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    return LlamaConfig(
        vocab_size=32_064 if tokenizer is None else vocabulary_size(tokenizer),
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        **ids,
    )


class Share(Spec):
    """What a source is worth, and how often it may be read."""

    weight: float = Field(ge=0, description="share in the mixture, before normalisation")
    epochs_cap: float | None = Field(default=None, gt=0, description="read at most so often; null: as asked")


class BestShare(Spec):
    """The best documents of each source."""

    share: float = Field(gt=0, lt=1, description="of the documents to keep")


class AtLeast(Spec):
    """The documents that score well."""

    score: float = Field(
        gt=0, lt=1, description="least to keep; look at the scores first, their scale depends on how many positives are"
    )


Template = Annotated[str, StringConstraints(pattern="^(chatml|llama2|llama3|openchat|zephyr)$")]


class Pints(CorpusRecipe):
    """Score, review, choose a tokenizer, plan, read."""

    id: ClassVar[str] = "pints"

    positives: CorpusRef = Field(description="texts as all should be, such as textbook chapters; what the score knows")
    keep: BestShare | AtLeast = Field(
        default=BestShare(share=0.3), description="{share: 0.3}: the best of each source; {score: 0.5}: at least that"
    )
    executor: ExecutorSpec = Field(default=ExecutorSpec(), description="where documents are scored")
    review: Literal["require", "skip"] | Path = Field(
        default="require",
        description="require: stop after scoring, until review.csv in the run directory is filled in and the run "
        "resumed; skip: read without; or the path of a sheet filled in elsewhere",
    )
    review_documents: int = Field(default=50, gt=0, description="of each source, to be looked at")
    accept_rate: float = Field(
        default=0.5, gt=0, lt=1, description="share of reviewed documents that must be acceptable for a source to stay"
    )
    tokenizer_candidates: tuple[ModelRef, ...] = Field(
        default=(), description="tokenizers to choose from by compression; none: the model's own"
    )
    chat_templates: tuple[Template, ...] = Field(
        default=("chatml", "llama2", "llama3", "openchat", "zephyr"), description="whose tokens to add"
    )
    reserved: int = Field(default=0, ge=0, description="free places in the vocabulary, at least")
    multiple_of: int = Field(default=64, gt=0, description="of which the vocabulary's size becomes a multiple")
    mixture: dict[TableName, Share] = Field(
        default={}, description="source -> weight and cap on its epochs; empty: in proportion to their sizes, no cap"
    )
    seq_len: int = Field(default=2048, ge=8, le=131_072, description="tokens per row")
    batch_tokens: int = Field(
        default=1_048_576, gt=0, description="input tokens per optimizer step, padding included"
    )  # 512 rows of 2048
    packing: Literal["concat", "document", "document, running positions"] = Field(
        default="concat",
        description="concat: documents end to end, cut anywhere, all seen; document: whole documents in a row, each "
        "seen alone, positions from 0; running positions: the same, counted through the row",
    )
    optim: OptimSpec = Field(
        default=OptimSpec(lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, warmup=2000 / 96_180, final_lr=0.1, clip=1.0),
        description="how weights are moved",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.mixture and (other := sorted(set(self.mixture) ^ set(self.sources))):
            raise ValueError(f"mixture must name every source, and only these; {other[0]!r} is in one of them")
        if self.mixture and not any(share.weight for share in self.mixture.values()):
            raise ValueError("mixture: one of the weights must be above 0")
        if any(share.epochs_cap for share in self.mixture.values()) and self.budget.kind not in ("tokens", "steps"):
            raise ValueError(f"epochs_cap needs a budget in tokens or steps; got one in {self.budget.kind}")
        if self.tokenizer_candidates and not self.from_scratch:
            raise ValueError("a pretrained model reads with its own tokenizer; leave tokenizer_candidates empty")
        return self

    def build(self, ctx: CorpusContext) -> Corpus:
        """Score and keep, have it reviewed, choose and extend the tokenizer, plan the mixture."""
        tables = self._reviewed(ctx, self._kept(ctx))
        ctx.tokenizer = self._tokenizer(ctx, tables)
        resize_model(ctx.model, ctx.tokenizer, seed=derive_seed(self.seed, "vocabulary") if self.from_scratch else None)
        check_vocabulary(ctx.model, ctx.tokenizer)
        plan = self._planned(ctx, tables)
        _write_table(ctx.run.path("plan.csv"), [vars(part) for part in plan])
        read = [part for part in plan if part.tokens]
        names = tuple(part.name for part in read)
        files = ["curation", "expository", "review.html", "review.csv", "plan.csv"]
        return Corpus(
            (Reading("train", 1.0, names, tuple(part.tokens for part in read)),),
            {name: tables[name] for name in names},
            files=(*files, "tokenizers.csv") if self.tokenizer_candidates else tuple(files),
            overlap=1 if self.packing == "concat" else 0,
        )

    def _kept(self, ctx: CorpusContext) -> dict[str, DocumentStore]:
        """What of each source scores well enough, with its score and features."""
        from headwater.corpora.expository import Describe
        from headwater.modalities.text.curate import Executor, curate
        from headwater.modalities.text.steps import Keep, KeepBest, Score

        chars = QUALITY_CHARS // len(ctx.sources)
        others = [d for source in ctx.sources.values() for d in held_out_sample(_shuffled(source.train), chars)]
        positives = ctx.read(self.positives, "positives")
        classifier = train_quality(positives, others, seed=SHARED_SEED, warn=ctx.warn)
        classifier.save(ctx.run.path("expository"))
        keep = self.keep
        chosen = (
            KeepBest("expository", keep.share) if isinstance(keep, BestShare) else Keep(f"expository >= {keep.score}")
        )
        executor = Executor(**self.executor.model_dump())
        steps = [Score("expository", classifier), Describe(), chosen]
        return {
            name: curate(source.train, steps, ctx.run.path("curation") / name, executor=executor).documents
            for name, source in ctx.sources.items()
        }

    def _reviewed(self, ctx: CorpusContext, tables: dict[str, DocumentStore]) -> dict[str, DocumentStore]:
        """The sources that a person lets pass."""
        queue = ReviewQueue(tables, self.review_documents, seed=SHARED_SEED)
        own = ctx.run.directory / "review.csv"
        waiting = not own.exists()
        if waiting:
            queue.write(ctx.run.path("review.csv").parent)
        if self.review == "skip":
            return tables
        if self.review == "require" and waiting:
            raise CorpusError(
                f"the review waits for you: read {own.with_name('review.html')}, write accept, clean or reject into "
                f"every row of {own.name} beside it, and resume the run. To use the sheet in other runs, give its path "
                "as review; to go on without, review: skip."
            )
        sheet = own if self.review == "require" else Path(self.review).expanduser()
        if not sheet.is_file():
            raise CorpusError(f"review: no file {sheet}; for a sheet to fill in set review: require.")
        verdicts = queue.apply(sheet, self.accept_rate)
        ctx.run.write_json("review.json", {name: vars(verdict) for name, verdict in verdicts.items()})
        for name, found in verdicts.items():
            seen = f"{found.accepted} of {found.reviewed} reviewed documents of {name!r} were accepted "
            seen += f"({found.low:.0%} to {found.high:.0%})"
            if found.decision == "unsure":
                ctx.warn(f"review/{name}", f"{seen}, which may be less than {self.accept_rate:.0%}; review more")
            elif found.decision != "accept":
                cure = "; clean it (`headwater curate`) and review it again" if found.decision == "clean" else ""
                ctx.warn(f"review/{name}", f"{seen}, less than {self.accept_rate:.0%}: it is left out{cure}")
        passed = {name: table for name, table in tables.items() if verdicts[name].decision in ("accept", "unsure")}
        if not passed:
            raise CorpusError(f"the review let no source pass; see {ctx.run.path('review.json')}.")
        return passed

    def _tokenizer(self, ctx: CorpusContext, tables: Mapping[str, DocumentStore]) -> PreTrainedTokenizerBase:
        """The candidate that needs the fewest tokens for the mixture's text, extended."""
        chosen = ctx.tokenizer
        if self.tokenizer_candidates:
            candidates = {ref.name: load_tokenizer(ref) for ref in self.tokenizer_candidates}
            texts = {
                name: [document.text for document in held_out_sample(_shuffled(table), COMPARED_CHARS)]
                for name, table in tables.items()
            }
            compared = compare_tokenizers(candidates, texts)
            _write_table(ctx.run.path("tokenizers.csv"), compared.to_dict("records"))
            sizes = {name: len(table) * float(np.mean([*map(len, texts[name])])) for name, table in tables.items()}
            weights = {name: self.mixture[name].weight if self.mixture else sizes[name] for name in tables}
            cost = (compared["source"].map(weights) / compared["bytes_per_token"]).groupby(compared["tokenizer"]).sum()
            chosen = candidates[min(candidates, key=lambda name: float(cost[name]))]
        return extend_tokenizer(
            chosen, chat_templates=self.chat_templates, reserved=self.reserved, multiple_of=self.multiple_of
        )

    def _planned(self, ctx: CorpusContext, tables: Mapping[str, DocumentStore]) -> list[Planned]:
        form = PlainFormatter(ctx.tokenizer)
        sizes = {name: len(formatted(table, form, ctx.room).tokens) for name, table in tables.items()}
        sources = [
            Source(name, size, share.weight, share.epochs_cap or math.inf)
            for name, size in sizes.items()
            for share in (self.mixture.get(name, Share(weight=size)),)
        ]
        total: dict[str, float] = {
            "tokens": self.budget.amount,
            "steps": self.budget.amount * (self.batch_tokens // self.seq_len * self.seq_len),
        }
        # A budget in FLOPs or seconds is some number of tokens: the proportions are the same for any without caps.
        return mixture_plan(sources, total.get(self.budget.kind, float(sum(sizes.values()))))


def _shuffled(table: DocumentStore) -> DocumentStore:
    return table.select(permutation(SHARED_SEED, 0, len(table)))


def _write_table(path: Path, rows: Sequence[Mapping[Any, Any]]) -> None:  # Any: as they come from pandas
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_text(path, text.getvalue())
