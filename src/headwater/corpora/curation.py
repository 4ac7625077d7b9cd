"""Curation as data: the steps of ``modalities/text/curate`` in YAML, for a recipe or by themselves.

steps:
- {kind: block, use: GopherQualityFilter, args: {min_doc_words: 20}}
- {kind: quality, positives: ./textbooks.jsonl}
- {kind: keep, when: "quality > 0.5"}
- {kind: dedup}
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from headwater.core.cache import atomic_write_text
from headwater.core.recipe import CorpusRef, ModelRef, Name, Spec
from headwater.core.rng import derive_seed
from headwater.core.yamlio import dump_yaml
from headwater.modalities.text.docs import CorpusError, Document, split_sides
from headwater.modalities.text.document_store import DocumentStore, stored_corpus
from headwater.modalities.text.prepared import held_out_sample

__all__ = [
    "ClassifierSpec",
    "Curation",
    "CurationSpec",
    "ExecutorSpec",
    "FieldName",
    "KeepSpec",
    "LexiconSpec",
    "StepSpec",
    "train_quality",
]

logger = logging.getLogger(__name__)

QUALITY_CHARS = 5_000_000
CLOSE_TO_NOISE = 0.6

Warn = Callable[[str, str], None]
Read = Callable[[CorpusRef, str], DocumentStore]
"""Opens a corpus that a step learns from, given its role; a recipe leaves out what repeats held-out text."""

SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
FieldName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class BlockSpec(Spec):
    """Any block of datatrove that works on one document after another, or one of your own."""

    kind: Literal["block"] = Field(description="which step this is")
    use: Name = Field(description="name of a filter or formatter of datatrove, or MODULE:CLASS")
    args: dict[str, Any] = Field(default={}, description="its arguments, as datatrove names them")  # Any: YAML

    def block(self) -> Any:  # Any: a block of datatrove
        """Build it.

        Raises:
            CorpusError: no such block, or arguments that it does not take.
        """
        module, colon, name = self.use.rpartition(":")
        places = [module] if colon else ["datatrove.pipeline.filters", "datatrove.pipeline.formatters"]
        for place in places:
            try:
                found = getattr(importlib.import_module(place), name, None)
            except ModuleNotFoundError as error:
                raise CorpusError(
                    f"block {self.use!r}: {error}. Curation needs `pip install 'headwater[curate]'`."
                ) from error
            if found is not None:
                try:
                    return found(**self.args)
                except TypeError as error:
                    raise CorpusError(f"block {self.use!r}: {error}") from error
        raise CorpusError(f"no block {name!r} in {' or '.join(places)}; a class of your own is MODULE:CLASS.")


class QualitySpec(Spec):
    """Scores each document: the probability that it is like the positives, under a fast linear classifier."""

    kind: Literal["quality"] = Field(description="which step this is")
    positives: CorpusRef = Field(description="texts of the kind that is wanted")
    negatives: CorpusRef | None = Field(
        default=None, description="texts to tell them from; null: the documents themselves"
    )
    field: FieldName = Field(default="quality", description="metadata to write to")


class ClassifierSpec(Spec):
    """Scores each document: the probability of a label under a sequence classifier."""

    kind: Literal["classifier"] = Field(description="which step this is")
    model: ModelRef = Field(description="a sequence classifier of Hugging Face, e.g. of toxicity")
    label: Name = Field(description="the label, as the model's id2label has it")
    field: FieldName = Field(description="metadata to write to")
    max_tokens: int = Field(default=512, gt=0, description="a longer text is cut")

    def scorer(self) -> Any:  # Any: a TextScorer, whose module is heavy
        """Open it."""
        from headwater.modalities.text.quality import HFScorer

        return HFScorer(self.model, self.label, max_tokens=self.max_tokens)


class LexiconSpec(Spec):
    """Scores each document: the share of its words that are in a list."""

    kind: Literal["lexicon"] = Field(description="which step this is")
    words: Path = Field(description="a text file, one word a line")
    field: FieldName = Field(default="toxicity", description="metadata to write to")

    def scorer(self) -> Any:  # Any: a TextScorer, whose module is heavy
        """Open it."""
        from headwater.modalities.text.quality import LexiconScorer

        return LexiconScorer(self.words.read_text(encoding="utf-8").splitlines())


class KeepSpec(Spec):
    """Keeps the documents of which a condition over their metadata is true."""

    kind: Literal["keep"] = Field(description="which step this is")
    when: Name = Field(description="such as: quality > 0.7 and genre in ['news', 'fiction']")

    @field_validator("when")
    @classmethod
    def _can_be_read(cls, value: str) -> str:
        from headwater.modalities.text.conditions import condition

        condition(value)
        return value


class BestSpec(Spec):
    """Keeps the best share of the documents."""

    kind: Literal["best"] = Field(description="which step this is")
    field: FieldName = Field(default="quality", description="the score")
    fraction: float = Field(gt=0, lt=1, description="to keep")


class ParetoSpec(Spec):
    """Keeps documents by chance, the likelier the better the score."""

    kind: Literal["pareto"] = Field(description="which step this is")
    field: FieldName = Field(default="quality", description="the score, in [0, 1]")
    alpha: float = Field(default=9.0, gt=0, description="of the Pareto distribution")


class SampleSpec(Spec):
    """Keeps a share of the documents, by chance."""

    kind: Literal["sample"] = Field(description="which step this is")
    rate: float = Field(ge=0, le=1, description="probability of each")


class DecontaminateSpec(Spec):
    """Drops documents that share a run of words with texts that must stay unseen."""

    kind: Literal["decontaminate"] = Field(description="which step this is")
    held_out: dict[str, CorpusRef] = Field(min_length=1, description="name -> texts that must stay unseen")
    ngram: int = Field(default=13, gt=0, description="words of a run")


class DedupSpec(Spec):
    """Drops near-duplicates, by MinHash."""

    kind: Literal["dedup"] = Field(description="which step this is")
    ngram: int = Field(default=5, gt=0, description="words of a shingle")
    buckets: int = Field(default=14, gt=0, description="bands")
    hashes: int = Field(default=8, gt=0, description="hashes in a band; pairs above (1/bands)^(1/hashes) meet")


class CheckpointSpec(Spec):
    """Ends a stage: what was done before is not done again when a later step changes."""

    kind: Literal["checkpoint"] = Field(description="which step this is")


StepSpec = Annotated[
    BlockSpec
    | QualitySpec
    | ClassifierSpec
    | LexiconSpec
    | KeepSpec
    | BestSpec
    | ParetoSpec
    | SampleSpec
    | DecontaminateSpec
    | DedupSpec
    | CheckpointSpec,
    Field(discriminator="kind"),
]


class ExecutorSpec(Spec):
    """Where shards are worked on; it changes no document."""

    kind: Literal["local", "ray"] = Field(default="local", description="on this machine, or on a Ray cluster")
    workers: int = Field(default=1, gt=0, description="shards at a time")
    address: Name | None = Field(default=None, description="of a Ray cluster; null starts one here")
    gigabytes: float = Field(default=2.0, gt=0, description="memory that Ray reserves for a shard")


class CurationSpec(Spec):
    """Steps, and how they are run."""

    steps: tuple[StepSpec, ...] = Field(min_length=1, description="what is done to each document, in order")
    executor: ExecutorSpec = Field(default=ExecutorSpec(), description="where shards are worked on")
    shard_documents: int = Field(default=50_000, gt=0, description="documents of a shard, the unit of resuming")
    max_errors: int = Field(default=100, ge=0, description="documents of a shard that may break a step")
    samples: int = Field(
        default=0, ge=0, description="texts of each step in the report; they are yours, so none by default"
    )

    def run(
        self,
        documents: DocumentStore,
        directory: Path,
        *,
        seed: int,
        warn: Warn,
        read: Read | None = None,
        overwrite: bool = False,
    ) -> Any:  # Any: Curated, whose module needs the extra
        """Curate documents; see ``modalities.text.curate.curate``.

        Args:
            documents: what there is.
            directory: written to.
            seed: of draws, and of what is learned.
            warn: is told what to look at.
            read: opens what steps learn from.
            overwrite: make stages again whose settings changed.
        """
        from headwater.modalities.text.curate import Executor, curate

        opened = read or (lambda ref, role: stored_corpus(ref, role=role))
        return curate(
            documents,
            [_block(step, documents, directory, seed, warn, opened) for step in self.steps],
            directory,
            executor=Executor(**self.executor.model_dump()),
            shard_documents=self.shard_documents,
            max_errors=self.max_errors,
            samples=self.samples,
            overwrite=overwrite,
        )


class Curation(CurationSpec):
    """A curation by itself: sources and steps, without training."""

    sources: dict[SourceName, CorpusRef] = Field(min_length=1, description="name -> texts to curate")
    samples: int = Field(default=5, ge=0, description="texts of each step to show in the report; 0 for none")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of draws, and of what is learned")

    def run_all(self, directory: Path, *, overwrite: bool = False) -> dict[str, Any]:  # Any: Curated
        """Curate every source into a folder of its name, and write ``curation.yaml`` and ``curated.json``."""
        done = {}
        directory.mkdir(parents=True, exist_ok=True)
        for name, ref in self.sources.items():
            documents = stored_corpus(ref, role=f"sources.{name}")
            done[name] = self.run(documents, directory / name, seed=self.seed, warn=_log, overwrite=overwrite)
        steps = {name: [asdict(step) for step in curated.steps] for name, curated in done.items()}
        atomic_write_text(directory / "curation.yaml", dump_yaml(self.model_dump(mode="json")))
        atomic_write_text(directory / "curated.json", json.dumps({"sources": steps}) + "\n")
        return done


def _log(topic: str, message: str) -> None:
    logger.warning(message)


def _block(step: Any, documents: DocumentStore, directory: Path, seed: int, warn: Warn, read: Read) -> Any:
    from headwater.modalities.text import curate, steps

    match step:
        case BlockSpec():
            return step.block()
        case QualitySpec():
            positives = read(step.positives, "positives")
            negatives = documents if step.negatives is None else read(step.negatives, "negatives")
            classifier = train_quality(positives, negatives, seed=derive_seed(seed, "quality", step.field), warn=warn)
            classifier.save(directory / step.field)
            return steps.Score(step.field, classifier)
        case ClassifierSpec() | LexiconSpec():
            return steps.Score(step.field, step.scorer())
        case KeepSpec():
            return steps.Keep(step.when)
        case BestSpec():
            return steps.KeepBest(step.field, step.fraction)
        case ParetoSpec():
            return steps.ParetoKeep(step.field, step.alpha, seed)
        case SampleSpec():
            return steps.Sample(step.rate, seed)
        case DecontaminateSpec():
            texts = {
                name: [d.text for d in stored_corpus(ref, role=f"held_out.{name}")]
                for name, ref in step.held_out.items()
            }
            return steps.Decontaminate(texts, step.ngram)
        case DedupSpec():
            return curate.Dedup(step.ngram, step.buckets, step.hashes)
        case _:
            return curate.Checkpoint()


def train_quality(
    positives: Sequence[Document], negatives: Sequence[Document], *, seed: int, warn: Warn
) -> Any:  # Any: QualityClassifier
    """Learn to tell positives from negatives; a fifth of both is kept to see whether it can.

    Args:
        positives: texts of the kind that is wanted; what they share with the negatives is left out of these.
        negatives: the others.
        seed: of the order of examples.
        warn: is told when the score is close to noise.

    Raises:
        CorpusError: fewer than ten texts on a side.
    """
    from sklearn.metrics import roc_auc_score

    from headwater.modalities.text.quality import QualityClassifier

    good = held_out_sample(positives, QUALITY_CHARS)
    known = {document.text for document in good}
    other = [document for document in held_out_sample(negatives, QUALITY_CHARS) if document.text not in known]
    if min(len(good), len(other)) < 10:
        raise CorpusError(f"quality is learned from ten texts a side at least; got {len(good)} and {len(other)}.")
    texts = [document.text for document in (*good, *other)]
    labels = np.array([1] * len(good) + [0] * len(other))
    ids = [f"{label} {document.id}" for label, document in zip(labels, (*good, *other), strict=True)]
    held = split_sides(ids, (0.8, 0.0, 0.2), salt="quality") == 2
    classifier = QualityClassifier(random_state=seed % 2**32)
    if 0 < labels[held].sum() < held.sum():
        classifier.fit([texts[i] for i in np.flatnonzero(~held)], labels[~held])
        auc = float(roc_auc_score(labels[held], classifier([texts[i] for i in np.flatnonzero(held)])))
        if auc < CLOSE_TO_NOISE:
            warn(
                "quality",
                f"the quality score is close to noise: AUC {auc:.2f} on texts it has not seen (0.5 is chance)",
            )
    return classifier.fit(texts, labels)
