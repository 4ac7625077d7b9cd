"""The stability gap: several epochs on a small, good subset, mixed with data like the model's own.

Continued pretraining on a large new corpus first makes a model worse, in the domain too, and then better: the gap.
Three strategies shorten it: (1) E epochs over a subset of N / E tokens instead of one pass over N; (2) the subset
holds the documents of highest quality; (3) a share of every batch follows the mixture that the model was pretrained on.

    subset tokens = budget * (1 - replay) / epochs

Source: Guo et al., "Efficient Continual Pre-training by Mitigating the Stability Gap", arXiv:2406.14833, section 4.
Differs: the paper ranks by a KenLM model trained on high-quality reference text; ``NgramQuality`` is the same
    model (interpolated, modified Kneser-Ney) over hashed n-grams. The replay share of about 0.18 and the ranking by
    entity density are unverified; the former is rounded to 0.2, the latter left out.
Needs: a base model, domain text, general text like what the model was pretrained on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from headwater.core.fit import Phase, Trained
from headwater.core.recipe import CorpusRef
from headwater.core.rng import numpy_generator
from headwater.domain.adaptation import Adaptation
from headwater.domain.base import Adapted, ContinuedPretraining
from headwater.domain.gap import Gap, gap
from headwater.domain.selection import SubsetPlan, select_subset, subset_plan
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.document_store import DocumentStore
from headwater.modalities.text.ngram import NgramQuality
from headwater.modalities.text.sources import open_corpus

__all__ = ["Gap", "NgramQuality", "StabilityGap", "SubsetPlan", "gap", "select_subset", "subset_plan"]

UNDISCRIMINATING_SPREAD = 0.01


class StabilityGap(ContinuedPretraining):
    """Continued pretraining on a subset, over several epochs, with replay."""

    id: ClassVar[str] = "stability_gap"

    replay: float = Field(default=0.2, ge=0, lt=1, description="fraction of every batch drawn from the general corpus")
    epochs: float = Field(default=4.0, ge=1, description="how often the budget reads the subset")  # section 4: 4 to 5
    quality: Literal["ngram", "model", "none"] | Path = Field(
        default="ngram",
        description="what ranks documents, lower being better: an n-gram model of the reference, the starting model, "
        "chance, or a JSON file with one score per training document id",
    )
    reference: CorpusRef | None = Field(
        default=None, description="text of the quality wanted, for `ngram`; the general training text by default"
    )
    mixture: dict[str, float] | None = Field(
        default=None,
        description="shares of named general sources (values of the documents' `source` column) in the replay",
    )
    keep_fraction: float | None = Field(
        default=None, gt=0, le=1, description="share of the domain's tokens to keep; overrides epochs"
    )

    @model_validator(mode="after")
    def _reference_given(self) -> StabilityGap:
        if self.quality == "ngram" and self.reference is None and self.general is None:
            raise ValueError(
                "quality 'ngram' needs text to compare with: give `reference` or `general`, or set quality: none"
            )
        if self.mixture is not None and (
            not self.mixture or min(self.mixture.values()) < 0 or sum(self.mixture.values()) <= 0
        ):
            raise ValueError(f"mixture shares must be >= 0 and not all 0; got {self.mixture}")
        return self

    def phases(self, ctx: Adaptation) -> Generator[Phase, Trained, Adapted]:
        """Select, then train one phase on the selection and the replayed mixture."""
        documents = ctx.domain.train
        subset = self._subset(ctx, documents)
        ctx.run.notes["data/epochs"] = f"{ctx.domain_epochs(subset, 1 - self.replay):.2f}"
        stream = ctx.mix([(subset, 1 - self.replay), *self._replayed(ctx)])
        trained = yield Phase("train", ctx.start(), stream, ctx.objective)
        return Adapted(trained.model, files=("selection.json",))

    def _replayed(self, ctx: Adaptation) -> list[tuple[Sequence[Document], float]]:
        if self.replay == 0:
            return []
        assert ctx.general is not None  # the family refuses replay without a general corpus
        if self.mixture is None:
            return [(ctx.general.train, self.replay)]
        total = sum(self.mixture.values())
        sources = np.array([str(d.meta.get("source", d.meta.get("package"))) for d in ctx.general.train])
        parts: list[tuple[Sequence[Document], float]] = []
        for source, share in self.mixture.items():
            documents = ctx.general.train.select(np.flatnonzero(sources == source))
            if not documents:
                known = ", ".join(np.unique(sources)[:10])
                raise CorpusError(f"mixture: no general document has source {source!r}; there are {known}")
            parts.append((documents, self.replay * share / total))
        return parts

    def _subset(self, ctx: Adaptation, documents: DocumentStore) -> DocumentStore:
        """The documents that are read, in the corpus' order; all of them where nothing is selected."""
        lengths = ctx.num_tokens(documents)
        wanted = self._subset_tokens(ctx, int(lengths.sum()))
        if wanted >= lengths.sum():
            ctx.run.write_json("selection.json", {"ids": documents.ids(), "scores": None, "tokens": int(lengths.sum())})
            return documents
        scores = self._scores(ctx, documents)
        chosen = select_subset(lengths.tolist(), scores, wanted)
        ctx.run.write_json(
            "selection.json",
            {
                "ids": documents.select(chosen).ids(),
                "scores": [float(scores[i]) for i in chosen],
                "tokens": int(lengths[chosen].sum()),
            },
        )
        return documents.select(sorted(chosen))

    def _subset_tokens(self, ctx: Adaptation, available: int) -> int:
        if self.keep_fraction is not None:
            return math.ceil(self.keep_fraction * available)
        if self.epochs == 1 and self.quality == "none":
            return available  # one pass in random order over everything is plain training, so nothing is selected
        tokens = ctx.budget_tokens()
        if tokens is None:
            raise ValueError(
                "with a budget in flops or seconds the number of tokens is not known beforehand; give keep_fraction"
            )
        return subset_plan(tokens, self.epochs, self.replay).subset_tokens

    def _scores(self, ctx: Adaptation, documents: DocumentStore) -> NDArray[np.float64]:
        if isinstance(self.quality, Path):
            return _read_scores(self.quality, documents)
        if self.quality == "none":
            return numpy_generator(self.seed, "subset").random(len(documents))
        if self.quality == "model":
            return ctx.score_documents(ctx.start(lora=False), documents)
        if self.reference is not None:
            reference: Iterable[Document] = open_corpus(self.reference, role="reference")
        else:
            assert ctx.general is not None  # the recipe asks for one or the other
            reference = ctx.general.train
        scores = NgramQuality().fit(d.text for d in reference).score(d.text for d in documents)
        if scores.std() < UNDISCRIMINATING_SPREAD * scores.mean():
            ctx.warn(
                "quality",
                "the quality score does not discriminate (its spread is under 1 % of its mean); is the reference in "
                "the domain's language?",
            )
        return scores


def _read_scores(path: Path, documents: DocumentStore) -> NDArray[np.float64]:
    """Scores by document id from a JSON object; a missing or NaN score is an error that names documents."""
    if not path.is_file():
        raise FileNotFoundError(f"quality: no file {path}. Give a JSON object with a score for each document id.")
    scores = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(scores, dict):
        raise CorpusError(
            f"quality: {path} holds a {type(scores).__name__}; expected an object from document id to score"
        )
    missing = [id for id in documents.ids() if id not in scores]
    if missing:
        raise CorpusError(
            f"quality: {path} has {len(scores)} scores for {len(documents)} training documents; "
            f"{len(missing)} have none, e.g. {', '.join(missing[:3])}"
        )
    return np.array([float(scores[id]) for id in documents.ids()])
