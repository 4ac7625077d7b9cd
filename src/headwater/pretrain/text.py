"""What a text method is given: tokenised, held-out-clean documents, a model, and the assembly of its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from headwater.core.cache import cache_key
from headwater.core.leak import Sealed
from headwater.core.objective import Objective
from headwater.core.rng import derive_seed
from headwater.modalities.models import ModelError
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.document_store import DocumentStore, stored_corpus
from headwater.modalities.text.fresh import open_fresh
from headwater.modalities.text.packing import PackedBlocks
from headwater.modalities.text.prepared import drop_repeats, split_corpus, split_shares, tokenized
from headwater.pretrain.base import CollatedStream, Collator, PretrainParts, Probe, TextPretraining
from headwater.pretrain.probes import Ask, TextProbes

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["Text", "open_text"]

MAX_HELD_OUT_ROWS = 128
"""Windows of each held-out set that are scored."""
COUNTED_BATCHES = 8
"""Batches from which positions and targets per row are counted."""
_OPENS: Mapping[str, str] = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}


@dataclass(frozen=True)
class Text:
    """The data and the model of one run.

    Attributes:
        recipe: the recipe that runs.
        tokenizer: the model's; a method may add special tokens, which the documents' text never becomes, since it is
            tokenised already.
        model: with new weights, or its own where the recipe continues.
        head: what kind of language model it is.
        train: blocks of training text in an endless order.
        valid: held-out windows to choose by, ``(N, seq_length)``.
        probes: makes the shared probes of an objective and a format; they hold the test windows.
        test: sealed; only the probes see it.
    """

    recipe: TextPretraining
    tokenizer: PreTrainedTokenizerBase
    model: nn.Module
    head: Literal["causal", "seq2seq"]
    train: PackedBlocks
    valid: NDArray[np.int64]
    probes: Callable[[Objective, Ask], TextProbes]
    test: Sealed = field(default_factory=lambda: Sealed("the test set"))

    @property
    def rows(self) -> int:
        """Rows per optimizer step."""
        return self.recipe.batch_tokens // self.recipe.seq_length

    def parts(
        self,
        objective: Objective,
        collator: Collator,
        ask: Ask,
        *,
        usage: Mapping[str, Any],  # Any: JSON data
        positions: Callable[[Mapping[str, torch.Tensor]], int],
        probes: tuple[Probe, ...] = (),
    ) -> PretrainParts:
        """Put a method's collator and objective together with the shared streams and probes.

        Args:
            objective: what is minimised.
            collator: makes a batch with ``labels`` from features ``input_ids`` ``(seq_length,)`` and ``row``.
            ask: the method's format for the shared probes.
            usage: all that shapes a batch, beside the text: it is saved, and its hash guards a resumed run.
            positions: how many positions of a batch pass through the network.
            probes: the method's own, measured at every evaluation.
        """
        recipe = self.recipe
        stream = CollatedStream(
            self.train,
            collator,
            rows=self.rows,
            tokens_per_row=recipe.seq_length,
            fingerprint=cache_key({"blocks": self.train.fingerprint, "usage": dict(usage), "seed": recipe.seed}),
        )
        sample = [stream.batch(step) for step in range(COUNTED_BATCHES)]
        rows = len(sample) * stream.rows
        return PretrainParts(
            self.model,
            objective,
            stream,
            self.held_out_batches(collator, stream.rows),
            self.tokenizer,
            usage,
            _OPENS[self.head],
            probes,
            (self.probes(objective, ask),),
            positions_per_row=sum(positions(batch) for batch in sample) / rows,
            targets_per_row=sum(float((batch["labels"] != -100).sum()) for batch in sample) / rows,
        )

    def held_out_batches(self, collator: Collator, rows: int) -> list[Mapping[str, torch.Tensor]]:
        """The validation windows through a collator; their row numbers are negative, so no training row shares one."""
        features = [{"input_ids": ids, "row": -1 - i} for i, ids in enumerate(self.valid)]
        return [collator(features[i : i + rows]) for i in range(0, len(features), rows)]


def open_text(recipe: TextPretraining, run: Run) -> Text:
    """Read, split by document, drop from training what repeats held-out text, tokenise, and make the model.

    The split does not depend on the seed: every method and seed of a comparison is scored on the same documents.

    Raises:
        CorpusError: no training text, or held-out sets of less than one window.
        ModelError: a masked language model, or a batch or budget of less than one row.
    """
    if recipe.batch_tokens < recipe.seq_length:
        raise ModelError(
            f"batch_tokens ({recipe.batch_tokens}) is less than one row of seq_length {recipe.seq_length}; raise it"
        )
    documents = stored_corpus(recipe.data, role="data")
    run.record_data("data", documents.fingerprint)
    split = drop_repeats({"data": split_corpus(documents, split_shares(recipe.held_out))})[0]["data"]
    tokenizer, model, head = open_fresh(
        recipe.model,
        (document.text for document in split.train),
        random=recipe.from_scratch,
        seed=derive_seed(recipe.seed, "initialisation"),
    )
    blocks = PackedBlocks(tokenized(split.train, tokenizer), recipe.seq_length, derive_seed(recipe.seed, "order"))
    valid, test = (
        _windows(documents, tokenizer, recipe, name)
        for name, documents in (("validation", split.valid), ("test", split.test))
    )
    probes = partial(
        TextProbes,
        probes=recipe.probes,
        train=blocks,
        test=test,
        valid=valid,
        tokenizer=tokenizer,
        steps=recipe.probe_steps,
        optim=recipe.optim,
        settings=recipe.fit,
        seed=recipe.seed,
        directory=run.directory,
    )
    return Text(recipe, tokenizer, model, head, blocks, valid, probes)


def _windows(
    documents: DocumentStore, tokenizer: PreTrainedTokenizerBase, recipe: TextPretraining, name: str
) -> NDArray[np.int64]:
    tokens = tokenized(documents, tokenizer).tokens if documents else np.empty(0, dtype=np.int32)
    length = recipe.seq_length
    count = min(len(tokens) // length, MAX_HELD_OUT_ROWS)
    if count == 0:
        raise CorpusError(
            f"data: the {len(documents)} {name} documents have {len(tokens)} tokens, less than one window of "
            f"seq_length {length}; give more documents, raise held_out (now {recipe.held_out}), or lower seq_length"
        )
    return tokens[: count * length].reshape(count, length).astype(np.int64)
