"""What a method of the stage ``corpora`` works with: sources without their test documents, the model, the tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwater.core.recipe import CorpusRef
from headwater.core.rng import derive_seed
from headwater.modalities.models import ModelError, is_quantised
from headwater.modalities.text.docs import CorpusError, Document, drop_overlap
from headwater.modalities.text.document_store import DocumentStore, stored_corpus
from headwater.modalities.text.fresh import open_fresh
from headwater.modalities.text.prepared import Readable, drop_repeats, held_out_sample, split_corpus, split_shares

if TYPE_CHECKING:
    from headwater.core.run import Run
    from headwater.corpora.base import CorpusRecipe

__all__ = ["CorpusContext"]

logger = logging.getLogger(__name__)

MIN_HELD_OUT_DOCUMENTS = 20
VALID_CHARS = 100_000


@dataclass
class CorpusContext:
    """The context of one run.

    Attributes:
        recipe: the recipe that runs.
        sources: training and validation documents, by the sources' names; what repeats a held-out document is gone.
        tokenizer: the model's.
        model: to be trained.
        run: the open run directory.
        dropped: training documents that repeated a held-out one.
        apart: positions of those documents that repeat no held-out one.
    """

    recipe: CorpusRecipe
    sources: Mapping[str, Readable]
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    run: Run
    dropped: int
    apart: Callable[[Sequence[Document]], list[int]]

    @classmethod
    def open(cls, recipe: CorpusRecipe, run: Run) -> tuple[CorpusContext, dict[str, list[Document]]]:
        """Read what the recipe names and refuse what cannot work, before anything is trained.

        Returns:
            The context, and the held-out documents by set, which are for the evaluation alone.

        Raises:
            CorpusError: an empty corpus, one that is source and evaluation at once, or fewer than twenty held-out
                documents.
            ModelError: not a causal model, a quantised one, or a context or batch that is too short.
        """
        if recipe.batch_tokens < recipe.seq_len:
            raise ModelError(
                f"batch_tokens ({recipe.batch_tokens}) is less than one row of seq_len {recipe.seq_len}; raise it"
            )
        splits = {}
        for name, ref in recipe.sources.items():
            role = f"sources.{name}"
            documents = stored_corpus(ref, role=role)
            run.record_data(role, documents.fingerprint)
            splits[role] = split_corpus(documents, split_shares(recipe.held_out))
        evals = {name: stored_corpus(ref, role=f"evals.{name}") for name, ref in recipe.evals.items()}
        for name, held in evals.items():
            run.record_data(f"evals.{name}", held.fingerprint)
            if same := [source for source, split in splits.items() if split.fingerprint == held.fingerprint]:
                raise CorpusError(
                    f"evals.{name} and {same[0]} hold the same documents; give other texts to evaluate on"
                )
        clean, dropped = drop_repeats(splits, evals)
        splits = {name: clean[f"sources.{name}"] for name in recipe.sources}
        tests = _tests({name: split.test for name, split in splits.items()}, evals, recipe)
        tokenizer, model, head = open_fresh(
            recipe.model,
            (document.text for split in splits.values() for document in split.train),
            random=recipe.from_scratch,
            seed=derive_seed(recipe.seed, "initialisation"),
        )
        if head != "causal":
            raise ModelError("this stage trains causal language models; the model is an encoder-decoder")
        if is_quantised(model):
            raise ModelError("the model is quantised, so its weights cannot be trained")
        limit = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
        if limit is not None and recipe.seq_len > limit:
            raise ModelError(f"seq_len is {recipe.seq_len} but the model has {limit} positions; lower it")
        sources = {name: split.readable for name, split in splits.items()}
        unseen = [*chain(*(split.test for split in splits.values()), *evals.values())]

        def apart(documents: Sequence[Document]) -> list[int]:
            numbered = [Document(str(place), document.text) for place, document in enumerate(documents)]
            return [int(document.id) for document in drop_overlap(numbered, unseen).kept]

        return cls(recipe, sources, tokenizer, model, run, dropped, apart), tests

    def read(self, ref: CorpusRef, role: str) -> DocumentStore:
        """Further texts that a method learns from; those that repeat a held-out document are left out.

        Raises:
            CorpusError: nothing there, or nothing but repeats.
        """
        documents = stored_corpus(ref, role=role)
        self.run.record_data(role, documents.fingerprint)
        kept = self.apart(documents)
        if not kept:
            raise CorpusError(f"{role}: all {len(documents)} documents repeat held-out ones; give others.")
        if len(kept) < len(documents):
            self.warn(
                role, f"{len(documents) - len(kept)} of {len(documents)} documents of {role} repeat held-out text"
            )
        return documents.select(kept)

    @property
    def room(self) -> int | None:
        """Tokens that one example may have; None where examples are cut anywhere."""
        return None if self.recipe.packing == "concat" else self.recipe.seq_len

    @property
    def pad_token_id(self) -> int:
        """Fills rows; its label is -100 there, so it may be EOS."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    @property
    def valid(self) -> list[Document]:
        """Validation documents, an equal part of each source; training documents where there are none."""
        chars = VALID_CHARS // max(1, len(self.sources))
        return [d for s in self.sources.values() for d in held_out_sample(s.valid or s.train, chars)]

    def warn(self, topic: str, message: str) -> None:
        """Log a warning and keep it with the result."""
        self.run.warn(topic, message)


def _tests(
    held: Mapping[str, DocumentStore], evals: Mapping[str, DocumentStore], recipe: CorpusRecipe
) -> dict[str, list[Document]]:
    """``held_out``, an equal part of each source's test documents, and the recipe's own sets."""
    own = {name: held_out_sample(docs, recipe.eval_chars) for name, docs in evals.items()}
    if not held:
        return own
    count = sum(len(documents) for documents in held.values())
    if count < MIN_HELD_OUT_DOCUMENTS:
        raise CorpusError(
            f"sources: {count} held-out documents; at least {MIN_HELD_OUT_DOCUMENTS} are needed for a figure that "
            f"means something. Give more text, or raise held_out (now {recipe.held_out})."
        )
    chars = recipe.eval_chars // len(held)
    pooled = [d for documents in held.values() if documents for d in held_out_sample(documents, chars)]
    return {"held_out": pooled} | own
