"""Long context: raise the base of the rotary positions, then continue on long sequences without losing the short.

    theta_i = b^(-2 i / d)        the angle by which pair i of a head of size d turns per position; b is raised

A curriculum reads short sequences first, which are cheaper, at the same number of tokens per step. What is gained is
read off the loss against the context c:

    L(c) = (alpha / c)^beta + gamma

Source: Xiong et al., "Effective Long-Context Scaling of Foundation Models", arXiv:2309.16039, sections 2.1, 3.1, 4.
    Memory of activations: Korthikanti et al., arXiv:2205.05198.
Differs: the base is raised before the first step, the short part of the curriculum included. Instruction tuning on
    long answers is left out.
Needs: a causal model with rotary positions; domain text with documents as long as the context; general text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator
from torch import nn
from transformers import PreTrainedModel

from headwater.core.budget import Budget
from headwater.core.cache import atomic_write_text
from headwater.core.curves import draw_starts, fit_robust
from headwater.core.fit import Phase, Trained
from headwater.core.objective import Objective
from headwater.core.phase import BatchStream
from headwater.core.recipe import CorpusRef, Spec
from headwater.domain.adaptation import Adaptation
from headwater.domain.base import Adapted, ContinuedPretraining
from headwater.domain.rope import RopeMethod, auto_base, extend_rope, window_words, windowed_layers
from headwater.modalities.models import ModelError
from headwater.modalities.text.context import context_loss
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.prepared import tokenized

__all__ = [
    "LongContext",
    "Stretch",
    "auto_base",
    "extend_rope",
    "fit_context_law",
    "length_phases",
    "long_share",
    "training_bytes",
    "windowed_layers",
]

MEMINFO = Path("/proc/meminfo")
Floats = NDArray[np.float64]


# -- data


class Stretch(Spec):
    """A part of the training at one sequence length."""

    until: float = Field(gt=0, le=1, description="fraction of the budget at which it ends")
    length: int = Field(gt=1, description="tokens per sequence")


def long_share(num_tokens: ArrayLike, length: int, weight: float) -> float:
    """Share of tokens to draw from documents of ``length`` and more, so that they are read ``weight`` times as often.

    Args:
        num_tokens: of each document, ``(documents,)``.
        length: where a long document begins.
        weight: 1 reads all alike; > 0.

    Returns:
        In [0, 1]; 0 without a long document.

    Raises:
        ValueError: ``weight`` is not positive.

    Example:
        >>> long_share([100, 100, 200], 200, 3.0)
        0.75
    """
    if not weight > 0:
        raise ValueError(f"weight must be > 0; got {weight}.")
    tokens = np.asarray(num_tokens, np.float64)
    long, short = weight * tokens[tokens >= length].sum(), tokens[tokens < length].sum()
    return float(long / (long + short)) if long else 0.0


def length_phases(
    model: nn.Module,
    objective: Objective,
    stream: Callable[[int], BatchStream],
    stretches: Sequence[Stretch],
) -> Generator[Phase, Trained, Trained]:
    """One phase for each stretch of a curriculum: one schedule over all, and the optimizer's moments go on.

    Args:
        model: trained in place.
        objective: the same for all.
        stream: gives the batches of a length, the same number of tokens in each.
        stretches: in order, the last one until 1.
    """
    before: Phase | None = None
    begin = 0.0
    for number, stretch in enumerate(stretches):
        span = stretch.until - begin
        before = Phase(
            f"{number}-length-{stretch.length}",
            model,
            stream(stretch.length),
            objective,
            share=span,
            schedule_span=span,
            schedule_start=begin,
            continues=before,
        )
        trained = yield before
        begin = stretch.until
    return trained


def _whole_steps(stretches: Sequence[Stretch], budget: Budget, batch_tokens: int) -> tuple[Stretch, ...]:
    """The stretches with borders moved to the nearest whole step, where the budget says how many there are.

    Raises:
        ValueError: a stretch is left without a step.
    """
    if budget.kind not in ("steps", "tokens"):
        return tuple(stretches)
    unit = 1 if budget.kind == "steps" else batch_tokens
    moved, before = [], 0.0
    for stretch in stretches:
        until = 1.0 if stretch.until == 1 else round(stretch.until * budget.amount / unit) * unit / budget.amount
        if until <= before or until > 1:
            raise ValueError(
                f"the stretch of length {stretch.length} gets less than one step of the budget; "
                "raise the budget or give a shorter curriculum."
            )
        moved.append(Stretch(until=until, length=stretch.length))
        before = until
    return tuple(moved)


# -- memory


def training_bytes(model: PreTrainedModel, length: int, *, checkpointing: bool) -> tuple[float, float]:
    """A rough estimate of what training on one sequence takes: weights with AdamW's states, and activations.

    Attention is taken to keep no matrix of scores (SDPA's fused kernels); 17 values per layer, position and unit of
    width are kept for the backward pass, or 1 and a single layer's 17 with checkpointing; logits stand three times.

    Returns:
        Bytes that do not depend on the length, and bytes for the sequence.
    """
    config: Any = model.config.get_text_config()  # Any: see extend_rope
    parameters = list(model.parameters())
    size = parameters[0].element_size()
    fixed = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in parameters)
    layers, width = config.num_hidden_layers, config.hidden_size
    kept = (layers + 17) * width * size if checkpointing else 17 * layers * width * size
    return float(fixed), float(length * (kept + config.vocab_size * (size + 8)))


def _refuse_too_long(model: PreTrainedModel, length: int, available: float, *, checkpointing: bool) -> None:
    fixed, sequence = training_bytes(model, length, checkpointing=checkpointing)
    if fixed + sequence <= available:
        return
    feasible = max(0, int((available - fixed) / sequence * length))
    hint = "Train LoRA adapters" if checkpointing else "Set fit.gradient_checkpointing"
    raise ModelError(
        f"one sequence of {length} tokens takes about {(fixed + sequence) / 2**30:.1f} GiB to train on and "
        f"{available / 2**30:.1f} GiB are there; about {feasible} tokens would fit. {hint}, or lower target_length."
    )


def _available_bytes() -> float:
    """Memory that is free on the device, or on the machine; infinite where the system does not say."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    if not MEMINFO.exists():
        return math.inf
    lines = MEMINFO.read_text(encoding="utf-8").splitlines()
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf)


# -- what was gained


def fit_context_law(context: ArrayLike, nats: ArrayLike, *, noise: float = 0.01, seed: int = 0) -> dict[str, float]:
    """Fit L(c) = (alpha / c)^beta + gamma, all three > 0, robustly and on log losses.

    Args:
        context: tokens seen, ``(points,)``, > 0; at least four of them different.
        nats: mean loss there, > 0.
        noise: relative size of an ordinary error; larger ones pull less.
        seed: of the places that the fit starts from.

    Returns:
        ``alpha`` (tokens), ``beta``, ``gamma`` (nats).

    Raises:
        ValueError: too few points, shapes that differ, or numbers that are not finite and positive.
    """
    c, loss = np.asarray(context, np.float64), np.asarray(nats, np.float64)
    if c.shape != loss.shape or len(np.unique(c)) < 4:
        raise ValueError(f"three parameters need at least four contexts with a loss each; got {c.shape}, {loss.shape}.")
    if not (np.isfinite(c) & np.isfinite(loss) & (c > 0) & (loss > 0)).all():
        raise ValueError("contexts and losses must be finite and above 0.")
    log_c, log_loss = np.log(c), np.log(loss)

    def residuals(theta: Floats) -> tuple[Floats, Floats]:
        log_alpha, log_beta, log_gamma = theta
        beta = np.exp(log_beta)
        power = np.exp(beta * (log_alpha - log_c))
        gamma = np.exp(log_gamma)
        fitted = power + gamma
        slope = np.stack([beta * power, beta * (log_alpha - log_c) * power, np.full_like(power, gamma)], axis=1)
        return np.log(fitted) - log_loss, slope / fitted[:, None]

    low, high = log_loss.min(), log_loss.max()
    bounds = [[log_c.min() - 20, log_c.max() + 5], [math.log(0.02), math.log(5.0)], [low - 10, low]]
    likely = [[log_c.min() - 5, log_c.max()], [math.log(0.1), math.log(2.0)], [low - min(2.0, 1 + high - low), low]]
    fit = fit_robust(residuals, bounds, draw_starts(likely, 32, seed), delta=2 * noise)
    alpha, beta, gamma = np.exp(fit.parameters)
    return {"alpha": float(alpha), "beta": float(beta), "gamma": float(gamma)}


class LongContext(ContinuedPretraining):
    """Continued pretraining at a longer context, on rotary positions of a raised base."""

    id: ClassVar[str] = "long_context"
    longest_block: ClassVar[int | None] = None

    general: CorpusRef = Field(description="texts that must not be forgotten, scored at the old length")
    target_length: int = Field(gt=1, description="positions that the model shall have")
    rope: RopeMethod = Field(
        default="abf", description="how positions reach further: a raised base, interpolated positions, or as they are"
    )
    base: float | Literal["auto"] = Field(
        default="auto", description="base for abf; auto is at least 50 times the model's"
    )
    curriculum: tuple[Stretch, ...] | None = Field(
        default=None,
        description="sequence lengths in order, each until a fraction of the budget; by default the old length until "
        "0.4, then target_length",
    )  # section 4.4: 20, 40 or 80 % at the short length end near the loss of the long one
    long_weight: float = Field(
        default=1.0, gt=0, description="how much more often documents of target_length and more are read than shorter"
    )
    probe_lengths: tuple[int, ...] = Field(
        default=(), description="contexts at which the loss is reported; by default powers of two up to target_length"
    )

    @model_validator(mode="after")
    def _lengths_fit(self) -> LongContext:
        if isinstance(self.base, float) and not self.base > 1:
            raise ValueError(f"base must be above 1; got {self.base}")
        if self.seq_len is not None and self.seq_len >= self.target_length:
            raise ValueError(
                f"target_length ({self.target_length}) must be above the old length, seq_len {self.seq_len}"
            )
        if list(self.probe_lengths) != sorted(set(self.probe_lengths)) or any(
            not 1 < length <= self.target_length for length in self.probe_lengths
        ):
            raise ValueError(f"probe_lengths must rise within 2 to target_length; got {self.probe_lengths}")
        if self.curriculum is not None:
            ends = [stretch.until for stretch in self.curriculum]
            if not ends or ends != sorted(set(ends)) or ends[-1] != 1:
                raise ValueError(f"the stretches of the curriculum must rise and end at 1; got {ends}")
            if max(stretch.length for stretch in self.curriculum) > self.target_length:
                raise ValueError("no stretch of the curriculum may be longer than target_length")
        return self

    def phases(self, ctx: Adaptation) -> Generator[Phase, Trained, Adapted]:
        """Raise the base, train one phase per length, measure the loss against the context."""
        if ctx.head != "causal":
            raise ModelError("long_context lengthens causal models; this one is masked")
        stretches = self._stretches(ctx)
        sequences = _sequences(ctx, self.target_length)
        model = cast(PreTrainedModel, ctx.start())
        extend_rope(model, max_length=self.target_length, method=self.rope, base=self.base)
        if windowed := windowed_layers(model.config.get_text_config(), self.target_length):
            ctx.warn("window", window_words(windowed, self.target_length))
        _refuse_too_long(model, self.target_length, _available_bytes(), checkpointing=self.fit.gradient_checkpointing)
        ctx.domain_epochs(ctx.domain.train, 1 - self.replay)
        parts = self._parts(ctx)
        trained = yield from length_phases(
            model, ctx.objective, lambda length: ctx.mix(parts, seq_len=length), stretches
        )
        # An adapter directory opens on its base, whose positions are the old ones: the whole model is saved instead.
        final = trained.model.merge_and_unload() if self.lora is not None else trained.model  # type: ignore[operator]  # a PEFT model
        ctx.tokenizer.model_max_length = max(self.target_length, ctx.tokenizer.model_max_length)
        return self._measured(ctx, final, sequences)

    def _stretches(self, ctx: Adaptation) -> tuple[Stretch, ...]:
        stretches = self.curriculum or (
            Stretch(until=0.4, length=ctx.seq_len),
            Stretch(until=1.0, length=self.target_length),
        )
        multiple = math.lcm(*(stretch.length for stretch in stretches))
        if self.batch_tokens % multiple:
            raise ModelError(
                f"batch_tokens ({self.batch_tokens}) must be a multiple of every sequence length of the curriculum, "
                f"{sorted({s.length for s in stretches})}, so that every step reads as many tokens; the next is "
                f"{math.ceil(self.batch_tokens / multiple) * multiple}"
            )
        return _whole_steps(stretches, self.budget, self.batch_tokens)

    def _parts(self, ctx: Adaptation) -> list[tuple[Sequence[Document], float]]:
        """Domain documents, long and short, and the replayed general ones, with their shares."""
        train, lengths = ctx.domain.train, ctx.num_tokens(ctx.domain.train)
        long = lengths >= self.target_length
        if not long.any():
            ctx.warn(
                "length",
                f"no domain document has {self.target_length} tokens (the longest has {lengths.max()}): packed long "
                "sequences have no long dependencies, so little can be learned from the longer context",
            )
        parts: list[tuple[Sequence[Document], float]] = [(train, 1 - self.replay)]
        if self.long_weight != 1 and long.any() and lengths[~long].sum() >= self.target_length:
            share = long_share(lengths, self.target_length, self.long_weight)
            parts = [
                (train.select(np.flatnonzero(long)), share * (1 - self.replay)),
                (train.select(np.flatnonzero(~long)), (1 - share) * (1 - self.replay)),
            ]
        return [*parts, (ctx.general.train, self.replay)] if ctx.general is not None else parts

    def _measured(self, ctx: Adaptation, model: nn.Module, sequences: NDArray[np.int64]) -> Adapted:
        lengths = self.probe_lengths or _powers(self.target_length, ctx.seq_len)
        before = context_loss(cast(PreTrainedModel, ctx.start(lora=False)), sequences, lengths)
        table = context_loss(cast(PreTrainedModel, model), sequences, lengths)
        table.insert(table.columns.get_loc("nats"), "nats_start", before["nats"])
        atomic_write_text(ctx.run.path("context_loss.csv"), table.to_csv(index=False))
        files: tuple[str, ...] = ("context_loss.csv",)
        if len(table) >= 4:
            ctx.run.write_json("context_law.json", fit_context_law(table["context"], table["nats"], seed=self.seed))
            files = (*files, "context_law.json")
        metrics: dict[str, float] = {}
        for length, start, end in zip(table["length"], before["nats"], table["nats"], strict=True):
            metrics |= {f"context/{length}_start": float(start), f"context/{length}": float(end)}
        return Adapted(model, files=files, metrics=metrics)


def _powers(target: int, old: int) -> tuple[int, ...]:
    """The target, the old length, and the target halved up to six times."""
    return tuple(sorted({old, *(target >> halved for halved in range(7) if target >> halved > 1)}))


def _sequences(ctx: Adaptation, length: int) -> NDArray[np.int64]:
    """Validation sequences of the target length: beginnings of documents, or packed where none is long enough."""
    store = tokenized(ctx.domain.valid, ctx.tokenizer)
    most = max(1, ctx.recipe.eval_chars // 4 // length)  # about four characters to a token
    long = np.flatnonzero(np.diff(store.offsets) >= length)[:most]
    if len(long):
        return np.stack([store.tokens[begin : begin + length] for begin in store.offsets[long]]).astype(np.int64)
    whole = len(store.tokens) // length
    if not whole:
        raise CorpusError(
            f"the domain's validation documents hold {len(store.tokens)} tokens together, less than one sequence of "
            f"target_length {length}; give more text, or raise held_out (now {ctx.recipe.held_out})"
        )
    return store.tokens[: whole * length].reshape(whole, length)[:most].astype(np.int64)
