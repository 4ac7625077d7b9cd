"""What a method of the stage ``domain`` works with: starting model, corpora without their test sets, streams."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from headwater.core.budget import Budget, Meter
from headwater.core.cache import atomic_write_text
from headwater.core.fit import BatchStream, Phase
from headwater.core.lora import add_lora
from headwater.core.objective import Objective
from headwater.core.recipe import ModelRef
from headwater.core.rng import derive_seed
from headwater.domain.corpus import Prepared, prepare
from headwater.modalities.models import (
    ModelError,
    head_of,
    is_quantised,
    load_model,
    load_tokenizer,
    parameter_fingerprint,
)
from headwater.modalities.text.docs import Document
from headwater.modalities.text.objectives import CausalObjective, TokenObjective
from headwater.modalities.text.packing import MaskedStream, MixedStream, PackedBlocks
from headwater.modalities.text.prepared import Readable, tokenized, tokenizer_fingerprint
from headwater.modalities.text.score import bits_per_byte
from headwater.modalities.text.whole_words import WordBorders

if TYPE_CHECKING:
    from headwater.core.run import Run
    from headwater.domain.base import Continuation, ContinuedPretraining

__all__ = ["Adaptation"]

logger = logging.getLogger(__name__)

MAX_EPOCHS_IN_SILENCE = 4
DEFAULT_SEQ_LEN = 1024


@dataclass
class Adaptation:
    """The context of one run. ``domain`` and ``general`` hold training and validation documents only.

    Attributes:
        recipe: the recipe that runs.
        prepared: corpora and test sets; the latter are for the evaluation alone.
        tokenizer: the starting model's, until a method adopts another.
        head: what kind of language model it is.
        seq_len: tokens per block.
        meter: everything that runs under it is charged to the budget.
    """

    recipe: Continuation
    prepared: Prepared
    tokenizer: PreTrainedTokenizerBase
    head: Literal["causal", "masked"]
    seq_len: int
    meter: Meter
    run: Run

    @classmethod
    def open(cls, recipe: ContinuedPretraining, run: Run) -> Adaptation:
        """Load what the recipe names and refuse what cannot work, before anything is trained.

        Raises:
            CorpusError: see ``prepare``.
            ModelError: the model and the objective do not fit, or the context is too short for ``seq_len``.
        """
        _head(recipe)  # refused before the corpora are read
        return cls.of(recipe, prepare(recipe.domain, recipe.general, held_out=recipe.held_out), run)

    @classmethod
    def of(cls, recipe: Continuation, prepared: Prepared, run: Run) -> Adaptation:
        """As ``open``, with corpora that are ready.

        Raises:
            ModelError: see ``open``.
        """
        head = _head(recipe)
        for role, found in prepared.fingerprints.items():
            run.record_data(role, found)
        ctx = cls(recipe, prepared, load_tokenizer(recipe.model), head, 0, Meter(), run)
        ctx.seq_len = _seq_len(recipe, ctx._start_once)
        if recipe.batch_tokens < ctx.seq_len:
            raise ModelError(
                f"batch_tokens ({recipe.batch_tokens}) is less than one block of seq_len {ctx.seq_len}; raise it"
            )
        if recipe.budget.tokens is not None and recipe.budget.tokens < recipe.batch_tokens:
            raise ModelError(
                f"a budget of {recipe.budget.tokens} tokens is less than one step of "
                f"batch_tokens {recipe.batch_tokens}; give at least {recipe.batch_tokens} tokens, or a smaller batch"
            )
        if is_quantised(ctx._start_once) and recipe.lora is None:
            raise ModelError(f"model {recipe.model.name!r} is quantised, so its weights cannot be trained; set `lora`")
        return ctx

    @property
    def domain(self) -> Readable:
        """The domain's training and validation documents."""
        return self.prepared.domain

    @property
    def general(self) -> Readable | None:
        """The general training and validation documents, if a general corpus was given."""
        return self.prepared.general

    @cached_property
    def _start_once(self) -> nn.Module:
        return load_model(self._model, self.head)

    @cached_property
    def _model(self) -> ModelRef:
        ref = self.recipe.model
        if ref.dtype != "float16":
            return ref
        self.warn("dtype", "float16 weights overflow when they are trained, so the model is loaded in bfloat16")
        return ref.model_copy(update={"dtype": "bfloat16"})

    @cached_property
    def start_fingerprint(self) -> str:
        """Hash of the starting weights."""
        return parameter_fingerprint(self._start_once)

    def start(self, *, lora: bool = True, random: bool = False) -> nn.Module:
        """A fresh copy of the starting model, never the same object twice.

        Args:
            lora: wrap it in adapters if the recipe asks for them.
            random: keep its architecture only and draw new weights from the recipe's seed.
        """
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self.recipe.seed, "initialisation"))
            model = load_model(self._model, self.head, random=random)
        if lora and self.recipe.lora is not None:
            return add_lora(model, self.recipe.lora, seed=derive_seed(self.recipe.seed, "lora"))
        return model

    @property
    def objective(self) -> Objective:
        """What the model is trained on: the next token, or the masked ones."""
        return cast(Objective, CausalObjective() if self.head == "causal" else TokenObjective())

    @property
    def rows(self) -> int:
        """Blocks per optimizer step."""
        return self.recipe.batch_tokens // self.seq_len

    def adopt(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Go over to another tokenizer: streams made, models scored and what is saved from here on are under it.

        The starting model was scored under its own by then. ``start`` still gives that model, over the old vocabulary.
        """
        if self._start_tokenizer is None:
            self._start_tokenizer = self.tokenizer
        self.tokenizer = tokenizer

    @property
    def same_tokens(self) -> bool:
        """Whether text becomes the same tokens as under the starting model."""
        old = self._start_tokenizer
        return old is None or tokenizer_fingerprint(old) == tokenizer_fingerprint(self.tokenizer)

    def mix(
        self,
        parts: Sequence[tuple[Sequence[Document], float]],
        *,
        seed: int | None = None,
        whole_words: bool = False,
        seq_len: int | None = None,
    ) -> BatchStream:
        """An endless, seekable stream that draws from several sets of documents in exact proportion.

        Args:
            parts: documents and their share; shares of 0 are left out.
            seed: of the order; the recipe's by default.
            whole_words: mask whole words for a masked model, and not single tokens.
            seq_len: tokens per block, at as many tokens per step; the context's by default.
        """
        length = self.seq_len if seq_len is None else seq_len
        seed = derive_seed(self.recipe.seed if seed is None else seed, "order")
        blocks = [
            (PackedBlocks(tokenized(docs, self.tokenizer), length, seed), share) for docs, share in parts if share > 0
        ]
        stream = MixedStream(blocks, self.recipe.batch_tokens // length, seed)
        if self.head == "masked":
            words = WordBorders(self.tokenizer) if whole_words else None
            return MaskedStream(stream, self.tokenizer, seed=seed, words=words)
        return stream

    def with_replay(self, documents: Sequence[Document], share: float, *, whole_words: bool = False) -> BatchStream:
        """``documents`` mixed with a ``share`` of the general corpus."""
        parts: list[tuple[Sequence[Document], float]] = [(documents, 1 - share)]
        if share > 0:
            assert self.general is not None  # the recipe refuses replay without a general corpus
            parts.append((self.general.train, share))
        return self.mix(parts, whole_words=whole_words)

    def charge(self, flops: float, what: str) -> None:
        """Take FLOPs that were spent beside training off what the phases to come have; ``what`` says on what."""
        to_come = 1 - self._begun
        if to_come > 1e-9:
            # Phases that are over had their share of the whole budget, so the others give up more than theirs.
            self._outside_flops += flops / to_come
        self._outside.append(what)
        self.meter.add(flops=flops)

    def training_budget(self) -> Budget:
        """What phases have their shares of: the budget, less the FLOPs that were charged beside it."""
        budget = self.recipe.budget
        if budget.flops is None or self._outside_flops == 0:
            return budget
        left = budget.flops - self._outside_flops
        if left <= 0:
            raise ModelError(
                f"{' and '.join(dict.fromkeys(self._outside))} took {self._outside_flops:.3g} FLOPs, more than the "
                f"budget of {budget.flops:.3g}"
            )
        return Budget(flops=left)

    def score_documents(self, model: nn.Module, documents: Sequence[Document]) -> NDArray[np.float64]:
        """Bits per byte of each document under ``model``, lower is likelier; its FLOPs are charged to the budget.

        Raises:
            ModelError: the model is not causal.
        """
        if self.head != "causal":
            raise ModelError(
                "documents are scored by their likelihood, which needs a causal model; use quality 'ngram'"
            )
        scored = bits_per_byte(model, self.tokenizer, documents, window=self.seq_len)
        self.charge_forward(model, len(tokenized(documents, self.tokenizer).tokens))
        return np.asarray(scored.nats / np.log(2) / scored.counts, dtype=np.float64)

    def charge_forward(self, model: nn.Module, tokens: int) -> None:
        """Charge one forward pass over so many tokens outside training."""
        parameters = sum(p.numel() for p in model.parameters())
        self.charge(2.0 * parameters * tokens, "scoring documents")  # Kaplan et al., arXiv:2001.08361, section 2.1

    _outside_flops: float = 0.0
    _outside: list[str] = field(default_factory=list)
    _start_tokenizer: PreTrainedTokenizerBase | None = None
    _begun: float = 0.0
    trainable: int = 0
    epochs: float | None = None

    def note_phase(self, phase: Phase) -> None:
        """Remember the largest number of trainable weights, and warn when a corpus is read many times over."""
        self._begun += phase.share
        modules = [m for m in (phase.model, phase.objective) if isinstance(m, nn.Module)]
        trained = sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)
        self.trainable = max(self.trainable, trained)

    def num_tokens(self, documents: Sequence[Document]) -> NDArray[np.int64]:
        """Tokens of each document, its EOS included, ``(documents,)``."""
        return np.diff(tokenized(documents, self.tokenizer).offsets)

    def budget_tokens(self) -> int | None:
        """How many tokens the budget is, where that is known before training."""
        budget = self.recipe.budget
        return budget.steps * self.rows * self.seq_len if budget.steps is not None else budget.tokens

    def domain_epochs(self, documents: Sequence[Document], share: float) -> float:
        """How often the budget reads ``documents`` when they fill ``share`` of every batch; NaN where not known."""
        tokens = self.budget_tokens()
        if tokens is None:
            return float("nan")
        self.epochs = epochs = tokens * share / len(tokenized(documents, self.tokenizer).tokens)
        if epochs > MAX_EPOCHS_IN_SILENCE:
            self.warn(
                "epochs", f"the budget reads the domain text {epochs:.1f} times; expect memorising, or lower the budget"
            )
        return epochs

    def warn(self, topic: str, message: str) -> None:
        """Log a warning and keep it with the result."""
        self.run.warn(topic, message)

    def data_metrics(self) -> dict[str, float]:
        """Facts about the data, under ``data/``."""
        store = tokenized(self.domain.train, self.tokenizer)
        size = sum(len(d.text.encode("utf-8", "surrogatepass")) for d in self.domain.train)
        facts = {
            "data/domain_documents": float(len(self.domain.train)),
            "data/dropped_overlap": float(self.prepared.dropped),
            "domain/bytes_per_token": size / len(store.tokens),
        }
        if self._start_tokenizer is not None:
            before = tokenized(self.domain.train, self._start_tokenizer)
            facts["domain/bytes_per_token_start"] = size / len(before.tokens)
        if self.epochs is not None:
            facts["data/epochs"] = self.epochs
        if self.general is not None:
            facts["data/general_documents"] = float(len(self.general.train))
        return facts

    def save(
        self, model: nn.Module, run: Run, *, files: Sequence[str] = (), read: str | None = None, to: Path | None = None
    ) -> None:
        """Write ``model/``: weights or adapters, tokenizer, and a README that says how to open them.

        Args:
            model: a Hugging Face or PEFT model.
            run: whose ``model/`` it is.
            files: further files of the run directory, named in the README.
            read: what the model was continued on, for the README; the domain's name by default.
            to: another directory.
        """
        target: Path = run.model if to is None else to
        model.save_pretrained(target)  # type: ignore[operator]  # every Hugging Face and PEFT model has it
        self.tokenizer.save_pretrained(target)
        adapters = (target / "adapter_config.json").exists()
        cls = "AutoModelForCausalLM" if self.head == "causal" else "AutoModelForMaskedLM"
        opening = (
            f"from peft import PeftModel\nfrom transformers import {cls}\n\n"
            f"base = {cls}.from_pretrained({self.recipe.model.name!r})\n"
            "model = PeftModel.from_pretrained(base, DIR)"
            if adapters
            else f"from transformers import {cls}\n\nmodel = {cls}.from_pretrained(DIR)"
        )
        lines = [
            f"# {self.recipe.id}",
            "",
            f"Made by `{self.recipe.id}` from `{self.recipe.model.name}` and {read or f'`{self.prepared.name}`'}.",
            "",
        ]
        lines += ["```python", opening, "```", ""]
        if files:
            lines += ["Beside this directory: " + ", ".join(f"`{name}`" for name in files) + ".", ""]
        atomic_write_text(target / "README.md", "\n".join(lines))


def _head(recipe: Continuation) -> Literal["causal", "masked"]:
    found = head_of(recipe.model)
    wanted = found if recipe.objective == "auto" else recipe.objective
    if found not in ("causal", "masked"):
        raise ModelError(
            f"model {recipe.model.name!r} is an encoder-decoder; this stage trains causal and masked models"
        )
    if wanted != found:
        raise ModelError(
            f"objective {wanted!r} was asked for, but model {recipe.model.name!r} is a {found} language model"
        )
    return found


def _seq_len(recipe: Continuation, model: nn.Module) -> int:
    config = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if recipe.seq_len is not None and limit is not None and recipe.seq_len > limit:
        raise ModelError(
            f"seq_len is {recipe.seq_len} but model {recipe.model.name!r} has {limit} positions. Lower seq_len, or "
            "lengthen the model's context first (domain/long_context)."
        )
    limit = limit or DEFAULT_SEQ_LEN
    return recipe.seq_len or min(limit, recipe.longest_block or limit)
