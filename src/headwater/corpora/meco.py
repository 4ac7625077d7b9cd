"""MeCo: pretrain with each document's source before it, then cool down on plain documents.

    first 1 - c of the tokens    start, "URL: en.wikipedia.org", blank line, document, EOS    loss on document and EOS
    last c of the tokens         start, document, EOS                                        loss on document and EOS

The learning-rate schedule and the optimizer's moments run on across the border; the documents after it were not read
before. The source separates what contradicting documents say; the cooldown lets the model be used without it.

Source: Gao et al., "Metadata Conditioning Accelerates Language Model Pre-training", arXiv:2501.01956, section 2; what
    the text leaves open follows the authors' configuration: 1.6B at learning rate 3e-3, cosine to a tenth, warmup 5 %,
    weight decay 0.033, rows of 8192, BOS before the source, the loss masked up to the document.
Differs: a document longer than a row has its source before every piece, where the authors' packing gives it to the
    first; ``suffix`` is the host's last label ("uk"), since the list of public suffixes ("co.uk") is not shipped.
Needs: documents with a URL, path, topic or author; an architecture.
"""

from __future__ import annotations

import csv
import io
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from headwater.core.cache import atomic_write_text
from headwater.core.rng import derive_seed
from headwater.corpora.base import CorpusRecipe
from headwater.corpora.context import CorpusContext
from headwater.corpora.plan import Condition, Corpus, Reading
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.document_store import DocumentStore, text_digest
from headwater.modalities.text.examples import (
    PackedExamples,
    PlainFormatter,
    formatted,
    target_counts,
)
from headwater.modalities.text.masks import keeps_documents_apart
from headwater.modalities.text.metadata import (
    TEMPLATE,
    MetadataFormatter,
    Missing,
    Transform,
    condition,
    transform_url,
)

__all__ = [
    "MeCo",
    "MeCoCallback",
    "MetadataFormatter",
    "TwoPhases",
    "condition",
    "cooldown_plan",
    "transform_url",
]

logger = logging.getLogger(__name__)

NEARLY_UNIQUE = 0.5


def cooldown_plan(texts: Iterable[str], fraction: float = 0.1) -> NDArray[np.bool_]:
    """Which documents are kept for the cooldown, ``(documents,)``; by a hash of the text, so equal texts go together.

    Args:
        texts: one each.
        fraction: expected share, in [0, 1].
    """
    places = [int.from_bytes(text_digest("cooldown\0" + text)[:8], "little") / 2**64 for text in texts]
    return np.array(places, dtype=np.float64) < fraction


class TwoPhases:
    """Rows with sources, then rows without, as one data set in order: how ``transformers.Trainer`` changes phase.

    Optimizer and schedule go on, since nothing but the data changes, and a resumed Trainer skips to the same row. Pass
    ``MeCoCallback`` too: it refuses what would break the order. Rows have ``input_ids``, ``labels`` and
    ``position_ids`` ``(seq_len,)``; see ``PackedExamples`` for how they keep documents apart.

    Args:
        first: documents that are read with their source.
        cooldown: documents that are read without.
        formatter: of the first phase.
        seq_len: tokens of a row.
        steps: of training.
        rows: per step, over all devices and accumulated batches.
        fraction: of the steps that the cooldown takes, at least one step.
        seed: of the order.

    Raises:
        CorpusError: a document is in both phases.
        ValueError: no step is left for the first phase.
    """

    def __init__(
        self,
        first: Sequence[Document],
        cooldown: Sequence[Document],
        formatter: MetadataFormatter,
        *,
        seq_len: int,
        steps: int,
        rows: int,
        fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        texts = {text_digest(document.text) for document in first}
        both = [document.id for document in cooldown if text_digest(document.text) in texts]
        if both:
            raise CorpusError(
                f"{len(both)} documents of the cooldown are in the first phase too, e.g. {both[0]!r}; split them by "
                "cooldown_plan"
            )
        self.rows, self.steps = rows, steps
        self.border = steps - max(1, round(steps * fraction))
        if self.border < 1:
            raise ValueError(f"{steps} steps with a cooldown of {fraction} leave no step for the first phase.")
        tokenizer = formatter.tokenizer
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        plain = PlainFormatter(tokenizer)
        self._phases = [
            PackedExamples(formatted(documents, form, seq_len), seq_len, derive_seed(seed, name), pad_token_id=pad)
            for name, documents, form in (("conditioned", first, formatter), ("cooldown", cooldown, plain))
        ]

    def __len__(self) -> int:
        return self.steps * self.rows

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} is outside [0, {len(self)}).")
        border = self.border * self.rows
        return self._phases[0][position] if position < border else self._phases[1][position - border]


class MeCoCallback(TrainerCallback):  # type: ignore[misc]  # transformers ships no types that mypy follows
    """Keeps ``TwoPhases`` in its order inside ``transformers.Trainer``, and says when the cooldown begins.

    Args:
        dataset: the Trainer's.
    """

    def __init__(self, dataset: TwoPhases) -> None:
        self.dataset = dataset

    def on_train_begin(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        """Refuse what would break the order or let documents see each other; Any: transformers' own classes.

        Raises:
            ValueError: says which argument to change.
        """
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if args.train_sampling_strategy != "sequential":
            raise ValueError("the Trainer would shuffle the two phases; set train_sampling_strategy='sequential'.")
        if rows != self.dataset.rows or state.max_steps != self.dataset.steps:
            raise ValueError(
                f"the Trainer takes {state.max_steps} steps of {rows} rows and the data set is made for "
                f"{self.dataset.steps} of {self.dataset.rows}; give both the same."
            )
        if not keeps_documents_apart(model, args.per_device_train_batch_size):
            raise ValueError(
                "this model's attention ignores position_ids that start anew, so documents of a row would see each "
                "other. Under flash attention set per_device_train_batch_size=1; else load the model with "
                "attn_implementation='sdpa'."
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the change of phase."""
        if state.global_step == self.dataset.border:
            logger.info("step %d: the cooldown begins, documents come without their source", state.global_step)


class MeCo(CorpusRecipe):
    """Metadata conditioning, then cooldown."""

    id: ClassVar[str] = "meco"

    metadata_field: str = Field(
        default="url", min_length=1, description="column of the documents that holds the source"
    )
    template: str = Field(
        default=TEMPLATE, description="what goes before a document; holds {value} once, or is empty for nothing"
    )
    transform: Transform = Field(
        default="domain",
        description="what of the source is shown: host, whole URL, last label of the host, a hash of the host, or the "
        "value as it is",
    )
    cooldown: float = Field(
        default=0.1, ge=0, le=0.5, description="share of the budget, and of the documents, read without sources"
    )  # section 2; 10 to 20 % are best
    mask_metadata: bool = Field(default=True, description="leave the source out of the loss")
    metadata_dropout: float = Field(
        default=0.0, ge=0, le=1, description="share of the first phase's documents that go without their source"
    )
    missing: Missing = Field(
        default="error", description="documents without the column: refused, read plain, or from the source 'unknown'"
    )
    conditional_evals: tuple[str, ...] = Field(
        default=(), description="sources to put before every held-out document, scored beside the plain documents"
    )

    @field_validator("template")
    @classmethod
    def _has_a_place(cls, value: str) -> str:
        if value and value.count("{value}") != 1:
            raise ValueError(f"template must hold {{value}} once, or be empty; got {value!r}")
        return value

    def build(self, ctx: CorpusContext) -> Corpus:
        """Split off the cooldown's documents; two phases, with and without sources."""
        formatter = self._formatter(ctx.tokenizer)
        if self.template:
            self._check_sources(ctx, formatter)
        if self.cooldown == 0:
            ctx.warn("cooldown", "without a cooldown the model is damaged where it is used without a source")
        first, last = {}, {}
        for name, source in ctx.sources.items():
            kept = cooldown_plan((document.text for document in source.train), self.cooldown)
            first[f"{name}/conditioned"] = source.train.select(np.flatnonzero(~kept))
            last[f"{name}/cooldown"] = source.train.select(np.flatnonzero(kept))
        first, last = ({name: table for name, table in side.items() if table} for side in (first, last))
        if not first or (self.cooldown and not last):
            raise CorpusError(f"sources: too few documents to keep {self.cooldown:.0%} of them for the cooldown")
        phases = [Reading("conditioned", 1 - self.cooldown, tuple(first), format=formatter)]
        if self.cooldown:
            phases.append(Reading("cooldown", self.cooldown, tuple(last)))
        if not self.template:
            return Corpus(tuple(phases), first | last)
        self._write_sources(ctx, formatter, first.values())
        start = ctx.tokenizer.convert_ids_to_tokens(formatter.start)
        return Corpus(
            tuple(phases),
            first | last,
            conditions=self._conditions(formatter),
            usage={"template": self.template, "transform": self.transform, "start_token": start},
            readme=_README.format(self.template.replace("\n", "\\n"), self.metadata_field, self.transform, start),
            files=("sources.csv",),
        )

    def _formatter(self, tokenizer: PreTrainedTokenizerBase) -> MetadataFormatter:
        return MetadataFormatter(
            tokenizer,
            self.metadata_field,
            self.template,
            self.transform,
            missing=self.missing,
            mask_metadata=self.mask_metadata,
            dropout=self.metadata_dropout,
            max_tokens=self.seq_len // 4,
            seed=self.seed,
        )

    def _check_sources(self, ctx: CorpusContext, formatter: MetadataFormatter) -> None:
        """What only the whole corpus shows: sources that are missing, all the same, nearly unique, or too long."""
        documents = [source.train for source in ctx.sources.values()]
        total, lacking, values = sum(map(len, documents)), 0, Counter[str]()
        examples: list[str] = []
        for document in chain.from_iterable(documents):
            if formatter.lacks(document):
                lacking += 1
                examples = [*examples, document.id][:3]
            if self.missing != "error" or not formatter.lacks(document):
                values[formatter.value(document) or ""] += 1
        if lacking and self.missing == "error":
            raise CorpusError(
                f"{lacking} of {total} documents ({lacking / total:.1%}) have no {self.metadata_field!r}, e.g. "
                f"{', '.join(examples)}; set missing to 'plain' or 'unknown' to go on without"
            )
        if len(values) < 2:
            raise CorpusError(
                f"every document has the source {next(iter(values))!r}, so there is nothing to tell apart; choose "
                "another metadata_field or transform"
            )
        single = sum(count == 1 for count in values.values())
        if single > NEARLY_UNIQUE * len(values):
            ctx.warn(
                "sources",
                f"metadata is nearly unique: {single} of {len(values)} sources have one document; use transform=domain",
            )
        long = {value for value in values if value and formatter.is_cut(value)}
        if long:
            count = sum(values[value] for value in long)
            ctx.warn("cut", f"the source of {count} documents is longer than {formatter.max_tokens} tokens and is cut")

    def _write_sources(self, ctx: CorpusContext, formatter: MetadataFormatter, tables: Iterable[DocumentStore]) -> None:
        """``sources.csv``: documents and targets of the first phase by source, the largest first."""
        documents, tokens = Counter[str](), Counter[str]()
        for table in tables:
            counts = target_counts(formatted(table, formatter, ctx.room), len(table))
            for document, count in zip(table, counts.tolist(), strict=True):
                value = formatter.value(document) or ""
                documents[value] += 1
                tokens[value] += count
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("value", "documents", "tokens"))
        writer.writerows((value, count, tokens[value]) for value, count in documents.most_common())
        atomic_write_text(ctx.run.path("sources.csv"), text.getvalue())

    def _conditions(self, formatter: MetadataFormatter) -> dict[str, Condition]:
        """``own``: each document after its own source, where it has one; ``given/VALUE``: all after the same."""

        def own(document: Document) -> list[int] | None:
            return None if formatter.lacks(document) else formatter.head(formatter.value(document) or "")

        def given(value: str) -> Condition:
            return lambda document: formatter.head(value)

        return {"own": own} | {f"given/{value}": given(value) for value in self.conditional_evals}


_README = """Documents were read with their source before them, `{}` with the column `{}` shown as `{}`, and in the end
without. Use the model as any other, or put a source, real or invented, before the prompt. Every document began with
`{}`, so begin with it where your tokenizer does not add it."""
