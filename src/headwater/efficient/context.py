"""What a method of the stage ``efficient`` works with: the model to make lean, text without its test part, phases."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwater.core.budget import Meter
from headwater.core.fit import BatchStream, Phase
from headwater.core.objective import Objective
from headwater.core.optim import OptimSpec
from headwater.core.recipe import CorpusRef
from headwater.core.rng import derive_seed
from headwater.modalities.models import ModelError, head_of, is_quantised, load_model, load_tokenizer
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.document_store import DocumentStore, stored_corpus
from headwater.modalities.text.objectives import CausalObjective, TokenObjective
from headwater.modalities.text.packing import MaskedStream, PackedStream
from headwater.modalities.text.prepared import Readable, drop_repeats, split_corpus, split_shares, tokenized

if TYPE_CHECKING:
    from headwater.core.run import Run
    from headwater.efficient.base import EfficientRecipe

__all__ = ["BuildContext", "read_texts"]

logger = logging.getLogger(__name__)

MIN_HELD_OUT_DOCUMENTS = 20
DEFAULT_SEQ_LEN = 1024


def read_texts(data: CorpusRef, eval_data: CorpusRef | None, held_out: float) -> tuple[Readable, DocumentStore, int]:
    """Read and split by a hash of the document's id; what repeats a held-out document leaves training.

    Args:
        data: texts to train on.
        eval_data: texts to test on; without them a share of ``data`` is kept apart.
        held_out: that share; half of it again goes to validation.

    Returns:
        What a method may read, the test documents, and how many training documents were dropped.

    Raises:
        CorpusError: an empty corpus, the same text given twice, or fewer than twenty test documents.
    """
    documents = stored_corpus(data, role="data")
    split = split_corpus(documents, split_shares(held_out, test=eval_data is None))
    others = {}
    if eval_data is not None:
        others["eval_data"] = stored_corpus(eval_data, role="eval_data")
        if others["eval_data"].fingerprint == documents.fingerprint:
            raise CorpusError("data and eval_data hold the same documents; give other texts to evaluate on.")
    test = others.get("eval_data", split.test)
    if len(test) < MIN_HELD_OUT_DOCUMENTS or not split.train:
        raise CorpusError(
            f"{len(test)} documents to test on and {len(split.train)} to train on; at least {MIN_HELD_OUT_DOCUMENTS} "
            "and one are needed. Give more text, or raise held_out."
        )
    clean, dropped = drop_repeats({"data": split}, others)
    return clean["data"].readable, test, dropped


@dataclass
class BuildContext:
    """The context of one run.

    Attributes:
        recipe: the recipe that runs; its ``seed`` and ``budget`` are the method's too.
        texts: training and validation documents.
        tokenizer: the model's.
        head: what kind of language model it is.
        seq_len: tokens per block.
        run: the open run directory.
        meter: everything that runs under it is charged.
    """

    recipe: EfficientRecipe
    texts: Readable
    tokenizer: PreTrainedTokenizerBase
    head: Literal["causal", "masked"]
    seq_len: int
    run: Run
    meter: Meter = field(default_factory=Meter)

    @classmethod
    def open(cls, recipe: EfficientRecipe, run: Run) -> tuple[BuildContext, DocumentStore]:
        """Read what the recipe names and refuse what cannot work, before anything is trained.

        Returns:
            The context, and the test documents, which are for the evaluation alone.

        Raises:
            CorpusError: see ``read_texts``.
            ModelError: an encoder-decoder or quantised model, or a budget or context that is too short.
        """
        head = head_of(recipe.model)
        if head not in ("causal", "masked"):
            raise ModelError(f"model {recipe.model.name!r} is neither a causal nor a masked language model")
        texts, test, dropped = read_texts(recipe.data, recipe.eval_data, recipe.held_out)
        run.record_data("train", texts.train.fingerprint)
        run.record_data("test", test.fingerprint)
        run.notes["data/dropped_overlap"] = str(dropped)
        ctx = cls(recipe, texts, load_tokenizer(recipe.model), head, 0, run)
        model = ctx.start()
        if is_quantised(model):
            raise ModelError(f"model {recipe.model.name!r} is quantised, so its weights cannot be trained")
        limit = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
        ctx.seq_len = recipe.seq_len or min(limit or DEFAULT_SEQ_LEN, DEFAULT_SEQ_LEN)
        if limit is not None and ctx.seq_len > limit:
            raise ModelError(
                f"seq_len is {ctx.seq_len} but model {recipe.model.name!r} has {limit} positions; lower it"
            )
        if ctx.rows < 1:
            raise ModelError(f"batch_tokens ({recipe.batch_tokens}) is less than one block of {ctx.seq_len}; raise it")
        return ctx, test

    def start(self) -> PreTrainedModel:
        """A fresh copy of the model, never the same object twice: new weights from the seed, or its own."""
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(derive_seed(self.recipe.seed, "initialisation"))
            model = load_model(self.recipe.model, self.head, random=self.recipe.from_config)
        return cast(PreTrainedModel, model)

    @property
    def rows(self) -> int:
        """Blocks per optimizer step."""
        return self.recipe.batch_tokens // self.seq_len

    @property
    def objective(self) -> Objective:
        """What is predicted: the next token, or the masked ones."""
        return cast(Objective, CausalObjective() if self.head == "causal" else TokenObjective())

    @cached_property
    def stream(self) -> BatchStream:
        """Batches of the training documents, in an order of the recipe's seed."""
        seed = derive_seed(self.recipe.seed, "order")
        stream = PackedStream(tokenized(self.texts.train, self.tokenizer), self.seq_len, self.rows, seed)
        return stream if self.head == "causal" else MaskedStream(stream, self.tokenizer, seed=seed)

    def phase(
        self,
        model: nn.Module,
        *,
        name: str = "train",
        objective: Objective | None = None,
        share: float = 1.0,
        optim: OptimSpec | None = None,
    ) -> Phase:
        """A phase on the training text; the language-model objective unless another is given."""
        return Phase(name, model, self.stream, objective or self.objective, share, optim)

    def warn(self, topic: str, message: str) -> None:
        """Log a warning and keep it with the result."""
        self.run.warn(topic, message)
