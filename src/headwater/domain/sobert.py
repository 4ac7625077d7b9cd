"""SOBERT: a single-purpose encoder for one rich domain, trained properly: whole threads, long context, enough tokens.

    1  posts and the replies to them become one document, code kept
    2  a vocabulary and weights of its own, as in `from_scratch`, over a longer context
    3  masked language modelling; an example never crosses from one thread into another
    4  a plan says what the budget buys before it is spent: FLOPs = tokens (6 parameters + 12 layers width context)

Source: Mukherjee and Hellendoorn, "Stack Over-Flowing with Results: The Case for Domain-Specific Pre-Training Over One
Large Language Model", arXiv:2306.03268.
Differs: threads are packed whole into rows in which they do not see each other; the vocabulary of about 50 000 tokens
is unverified. Fine-tuning on the paper's four tasks is that of the stage ``adapt``.
Needs: domain text with its replies, such as questions, answers and comments; a model for its architecture.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwater.core.cache import atomic_write_text
from headwater.core.fit import BatchStream, Phase, Trained
from headwater.core.objective import Loss
from headwater.core.recipe import CorpusRef, Metrics, Name, Spec
from headwater.core.rng import derive_seed
from headwater.domain.adaptation import Adaptation
from headwater.domain.base import Adapted
from headwater.domain.from_scratch import FromScratch, fresh_like
from headwater.domain.training_plan import Gpu, PlanSpec, Shape, TrainingPlan
from headwater.modalities.models import ModelError, load_tokenizer
from headwater.modalities.text.docs import Document
from headwater.modalities.text.examples import PackedExamples, PlainFormatter, formatted
from headwater.modalities.text.masks import attention_mask_for
from headwater.modalities.text.objectives import TokenObjective
from headwater.modalities.text.packing import MaskedStream, MixedStream
from headwater.modalities.text.prepared import held_out_sample
from headwater.modalities.text.score import masked_bits
from headwater.modalities.text.sources import open_corpus
from headwater.modalities.text.threads import Threads, strip_code, thread_documents
from headwater.modalities.text.whole_words import WordBorders

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = [
    "AlignedObjective",
    "Gpu",
    "Shape",
    "Sobert",
    "ThreadSpec",
    "Threads",
    "TrainingPlan",
    "aligned_stream",
    "lengthen_positions",
    "thread_documents",
]

_TAG = re.compile(r"</?(?:p|pre|code|a|ul|li|blockquote|div|br|strong|em|h[1-6])\b[^>]*>", re.IGNORECASE)
_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet")
TAGGED = 0.01
DROPPED = 0.2
MEASURED_CHARS = 40_000


class ThreadSpec(Spec):
    """How posts name what they reply to."""

    parent: Name = Field(default="parent", description="column with the id of the post that is replied to")
    score: Name | None = Field(
        default="score", description="column that ranks replies, the highest first; null: in the order of the text"
    )
    separator: str = Field(default="\n\n", max_length=20, description="between posts")


def _first_position(config: Any) -> int:  # Any: a configuration of transformers
    """The position of a row's first token: RoBERTa and its like count from the padding id on."""
    text = config.get_text_config()
    return int(text.pad_token_id) + 1 if text.model_type in _FROM_PADDING else 0


def lengthen_positions(config: Any, seq_len: int) -> Any:  # Any: a configuration of transformers
    """A copy of a model's configuration for at least ``seq_len`` tokens; its position embeddings are then new."""
    longer = copy.deepcopy(config)
    text = longer.get_text_config()
    if getattr(text, "max_position_embeddings", None) is not None:
        text.max_position_embeddings = max(text.max_position_embeddings, seq_len + _first_position(config))
    return longer


@dataclass(frozen=True)
class AlignedObjective:
    """Masked language modelling inside the documents of packed rows: nothing is seen across their borders."""

    unit: str = "nats/token"

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """Batch: ``input_ids``, ``labels``, ``document_ids`` and ``position_ids`` ``(batch, time)``."""
        inner = cast(PreTrainedModel, getattr(model, "module", model))  # module: under DDP
        mask = attention_mask_for(inner, "bidirectional", document_ids=batch["document_ids"])
        positions = batch["position_ids"] + _first_position(inner.config)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": mask, "position_ids": positions}
        return TokenObjective()(model, {**inputs, "labels": batch["labels"]})


def aligned_stream(
    parts: Sequence[tuple[Sequence[Document], float]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    rows: int,
    seed: int,
    mask_rate: float = 0.15,
    words: WordBorders | None = None,
) -> BatchStream:
    """Batches of whole documents, packed into rows; one that is longer than a row becomes several.

    Args:
        parts: documents and their share; shares of 0 are left out.
        tokenizer: with a mask token, and an EOS or SEP that closes documents.
        seq_len: tokens of a row.
        rows: of a batch.
        seed: of order and masks.
        mask_rate: share of tokens that are predicted.
        words: mask whole words, which these are the borders of.
    """
    closing = copy.copy(tokenizer)
    if closing.eos_token is None:
        closing.eos_token = closing.sep_token
    formatter = PlainFormatter(closing)
    pad = int(tokenizer.pad_token_id)
    blocks = [
        (PackedExamples(formatted(documents, formatter, seq_len), seq_len, seed, pad_token_id=pad), share)
        for documents, share in parts
        if share > 0
    ]
    return MaskedStream(MixedStream(blocks, rows, seed), tokenizer, seed=seed, probability=mask_rate, words=words)


class Sobert(FromScratch):
    """`from_scratch` over whole threads at a long context, with a plan of what it takes."""

    id: ClassVar[str] = "sobert"

    threads: ThreadSpec | None = Field(
        default=None, description="join posts of `domain` with the replies to them; null: they are whole already"
    )
    code: Literal["keep", "strip"] = Field(
        default="keep", description="code in the posts; the paper keeps it: text and code explain each other"
    )
    context: int = Field(  # section 3
        default=2048, gt=1, description="tokens that the encoder sees at once; positions are added where it has fewer"
    )
    masking: Literal["whole_word", "token"] = Field(default="token", description="what is masked together")
    mask_rate: float = Field(default=0.15, gt=0, lt=1, description="share of tokens that are predicted")
    plan: PlanSpec | None = Field(
        default=None, description="price the run beforehand on an accelerator, and refuse one that starves the model"
    )

    @model_validator(mode="after")
    def _new_positions(self) -> Sobert:
        if self.init == "keep":
            raise ValueError("init 'keep' would keep the start's positions too; use 'random', or the method plain")
        return self

    def run(self, run: Run) -> Metrics:
        """Make threads, where posts are given, and go on as the family does."""
        if self.threads is None and self.code == "keep":
            return super().run(run)
        changes: dict[str, Any] = {"domain": CorpusRef(name=str(self._write_threads(run))), "threads": None}
        return super(Sobert, self.model_copy(update={**changes, "code": "keep"})).run(run)

    def _write_threads(self, run: Run) -> Any:  # Any: a path
        """``threads.jsonl`` and ``threads.json``, what was dropped; written once."""
        target = run.path("threads.jsonl")
        if target.exists():
            return target
        posts = list(open_corpus(self.domain, role="domain"))
        tagged = sum(bool(_TAG.search(post.text)) for post in posts) / max(1, len(posts))
        if tagged > TAGGED:
            message = f"{tagged:.0%} of the posts hold HTML tags, which the model would learn; strip them first"
            run.logger.warning(message)
            run.notes["warning/html"] = message
        if self.threads is None:
            documents = [Document(post.id, strip_code(post.text), post.meta) for post in posts]
            found = Threads(documents, [], 0, 0)
        else:
            tokenizer = load_tokenizer(self.model)
            found = thread_documents(
                [{**post.meta, "id": post.id, "text": post.text} for post in posts],
                max_tokens=self.context - 2,  # a start and an end token
                count_tokens=lambda texts: [
                    len(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
                ],
                parent=self.threads.parent,
                score=self.threads.score,
                separator=self.threads.separator,
                code=self.code,
            )
        if len(found.dropped) > DROPPED * len(posts):
            message = (
                f"{len(found.dropped)} of {len(posts)} posts did not fit beside better ones in {self.context} tokens "
                "and were dropped; raise context to read them"
            )
            run.logger.warning(message)
            run.notes["warning/dropped"] = message
        about = {
            "threads": len(found.documents),
            "posts": len(posts),
            "orphans": found.orphans,
            "longer_than_the_context": found.long,
            "dropped": found.dropped,
        }
        run.write_json("threads.json", about)
        run.notes["threads"] = f"{len(found.documents)} of {len(posts)} posts, {len(found.dropped)} dropped"
        lines = (json.dumps({"id": d.id, "text": d.text, **d.meta}, default=str) for d in found.documents)
        atomic_write_text(target, "".join(f"{line}\n" for line in lines))
        return target

    def phases(self, ctx: Adaptation) -> Generator[Phase, Trained, Adapted]:
        """A vocabulary, a model with positions enough, one phase of aligned rows."""
        if ctx.head != "masked":
            raise ModelError(f"model {self.model.name!r} is a {ctx.head} model; this method trains encoders")
        if self.batch_tokens < self.context:
            raise ModelError(f"batch_tokens ({self.batch_tokens}) is less than one row of {self.context}; raise it")
        old = ctx.tokenizer
        if self.vocab == "domain":
            ctx.adopt(self._domain_tokenizer(ctx))
        model, copied = self._model(ctx, old)
        self._report(ctx, old, copied)
        plan = self._plan(ctx, model)
        if self.init != "random" and self.start_flops:
            ctx.charge(self.start_flops, "training the starting model")
        ctx.domain_epochs(ctx.domain.train, 1 - self.replay)
        parts: list[tuple[Sequence[Document], float]] = [(ctx.domain.train, 1 - self.replay)]
        if self.replay and ctx.general is not None:
            parts.append((ctx.general.train, self.replay))
        stream = aligned_stream(
            parts,
            ctx.tokenizer,
            seq_len=self.context,
            rows=self.batch_tokens // self.context,
            seed=derive_seed(self.seed, "order"),
            mask_rate=self.mask_rate,
            words=WordBorders(ctx.tokenizer) if self.masking == "whole_word" else None,
        )
        trained = yield Phase("train", model, stream, AlignedObjective())
        files = ["vocabulary.json"]
        if plan is not None:
            spent = {"flops": ctx.meter.cost.flops, "tokens": ctx.meter.cost.tokens, "seconds": ctx.meter.cost.seconds}
            ctx.run.write_json("plan.json", {"plan": asdict(plan), "spent": spent})
            files.append("plan.json")
        sample = held_out_sample(ctx.domain.valid or ctx.domain.train, MEASURED_CHARS)
        bits = masked_bits(cast(Any, trained.model), ctx.tokenizer, sample, window=self.context)  # Any: see Evaluation
        metrics = {f"context/{self.context}": bits.bits_per_unit}
        return Adapted(trained.model, files=tuple(files), metrics=metrics)

    def _model(self, ctx: Adaptation, old: PreTrainedTokenizerBase) -> tuple[nn.Module, float | None]:
        """As `from_scratch`, over ``context`` positions: new ones where the start has too few."""
        model, copied = super()._model(ctx, old)
        made = cast(PreTrainedModel, model)
        longer = lengthen_positions(made.config, self.context)
        if longer.max_position_embeddings == made.config.max_position_embeddings:
            return model, copied
        made.config = longer
        fresh = fresh_like(made, ctx.tokenizer, derive_seed(self.seed, "initialisation"))
        if self.init != "random":
            shapes = {name: tensor.shape for name, tensor in fresh.state_dict().items()}
            kept = {name: tensor for name, tensor in made.state_dict().items() if shapes.get(name) == tensor.shape}
            fresh.load_state_dict(kept, strict=False)
        return fresh, copied

    def _plan(self, ctx: Adaptation, model: nn.Module) -> TrainingPlan | None:
        """What this run is expected to take; ``None`` without a plan, or where the budget says no tokens."""
        tokens = ctx.budget_tokens()
        if self.plan is None or tokens is None:
            return None
        config: Any = cast(PreTrainedModel, model).config.get_text_config()  # Any: transformers ships no types
        # Tables are looked up and not multiplied; that of tokens is, as the head, where the two are tied.
        looked_up = sum(p.numel() for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters())
        tied = cast(PreTrainedModel, model).get_input_embeddings().weight.numel() if config.tie_word_embeddings else 0
        params = sum(p.numel() for p in model.parameters()) - looked_up + tied
        return TrainingPlan.from_budget(
            gpu=self.plan.gpu,
            params=params,
            tokens=tokens,
            shape=Shape(config.num_hidden_layers, config.hidden_size, self.context),
            mfu=self.plan.mfu,
            batch_tokens=self.batch_tokens,
        )
