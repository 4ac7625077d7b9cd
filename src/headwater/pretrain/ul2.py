"""UL2: one model trained on a mixture of denoisers, with a token in front that says which.

    R, regular      spans of mean (3, 8) over 15 % of the row
    S, sequential   the last 25 % of the row: a prefix language model
    X, extreme      spans of mean (3, 8, 64) over 50 %, or of mean 64 over 15 %

    input = mode, row with each span replaced by a sentinel, EOS      target = sentinel, span, sentinel, span, ..., EOS

Each row of a batch draws its denoiser. ``MixtureOfDenoisers`` is a collator: it is all that a stock
``transformers.Trainer`` needs to train a T5 or a decoder this way.

Source: Tay et al., "UL2: Unifying Language Learning Paradigms", arXiv:2205.05131, section 3.1.2 and table 2.
Differs: spans lie anywhere with equal probability, where T5's placement makes every long span the end of the row. The
    denoisers are drawn with equal weights, and S splits the row at a place uniform over its second half: the paper
    leaves both open.
Needs: text; an encoder-decoder, or a decoder that takes a mask of who sees whom.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwater.core.objective import Loss, Objective
from headwater.core.recipe import Metrics, Name
from headwater.core.rng import torch_generator
from headwater.modalities.models import ModelError
from headwater.modalities.text.corruption import Corruption, SpanCorruption, SuffixCorruption
from headwater.modalities.text.denoising import MODE_TOKENS, Denoiser, Layout, MixtureOfDenoisers, prefix_mask
from headwater.modalities.text.objectives import CausalObjective, TokenObjective
from headwater.pretrain.base import PretrainParts, TextPretraining
from headwater.pretrain.probes import measured_loss
from headwater.pretrain.text import open_text

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = [
    "MODE_TOKENS",
    "UL2",
    "UL2_DENOISERS",
    "Denoiser",
    "MixtureOfDenoisers",
    "PrefixObjective",
    "generate",
    "prefix_lm_denoisers",
    "prepare_tokenizer",
    "t5_denoisers",
    "with_mode",
]


def _spans(mode: str, *settings: tuple[float, float]) -> tuple[Denoiser, ...]:
    return tuple(Denoiser(mode=mode, corruption=SpanCorruption(mean_span=mu, rate=r)) for mu, r in settings)


def t5_denoisers() -> tuple[Denoiser, ...]:
    """Span corruption alone, as T5 has it: mean 3, 15 %."""
    return _spans("R", (3, 0.15))


def prefix_lm_denoisers() -> tuple[Denoiser, ...]:
    """The prefix language model alone: the last quarter of the row on average."""
    return (Denoiser(mode="S", corruption=SuffixCorruption(rate=0.25, jitter=True)),)


UL2_DENOISERS: tuple[Denoiser, ...] = (
    *_spans("R", (3, 0.15), (8, 0.15)),
    *prefix_lm_denoisers(),
    *_spans("X", (3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5)),
)
"""The seven of table 2."""


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None,
    n_sentinels: int = 100,
    mode_tokens: Mapping[str, str] | None = MODE_TOKENS,
    *,
    seed: int = 0,
) -> list[int]:
    """Add the sentinels ``<extra_id_0>``, ... and mode tokens that the tokenizer lacks, in place.

    Tokenise the training text before: text that happens to hold ``[S]`` is then not taken for a mode.

    Args:
        tokenizer: T5's has 100 sentinels already.
        model: gets an embedding for each new token, the mean of the others plus noise of deviation 0.01; None leaves
            that to the caller.
        n_sentinels: how many there must be, >= 0.
        mode_tokens: mode -> token; None for none.
        seed: of the noise.

    Returns:
        The ids that were added.
    """
    vocabulary = tokenizer.get_vocab()
    wanted = [f"<extra_id_{i}>" for i in range(n_sentinels)] + list((mode_tokens or {}).values())
    fresh = [token for token in wanted if token not in vocabulary]
    if not fresh:
        return []
    tokenizer.add_special_tokens({"additional_special_tokens": fresh}, replace_extra_special_tokens=False)
    ids: list[int] = tokenizer.convert_tokens_to_ids(fresh)
    if model is not None:
        known = sorted(set(vocabulary.values()))
        if max(ids) >= model.get_input_embeddings().num_embeddings:
            with torch.random.fork_rng(devices=[]):  # the rows that it draws are overwritten below
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        generator = torch_generator(seed, "new tokens")
        tables = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m}
        with torch.no_grad():
            for weight in tables.values():
                noise = 0.01 * torch.randn((len(ids), weight.shape[1]), generator=generator)
                weight[ids] = weight[known].mean(dim=0) + noise.to(weight)
    return ids


def with_mode(text: str, mode: str, mode_tokens: Mapping[str, str] = MODE_TOKENS) -> str:
    """Put a mode's token before a text, as the model saw it in training.

    Raises:
        ValueError: there is no such mode.

    Example:
        >>> with_mode("summarize: ...", "S")
        '[S]summarize: ...'
    """
    if mode not in mode_tokens:
        raise ValueError(f"there is no mode {mode!r}; there are {', '.join(mode_tokens)}.")
    return mode_tokens[mode] + text


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    mode: str | None,
    layout: Layout = "encoder_decoder",
    mode_tokens: Mapping[str, str] = MODE_TOKENS,
    max_new_tokens: int = 64,
) -> str:
    """Continue or fill in a text greedily, called as the model was trained: mode, text, EOS.

    Args:
        model: trained with ``MixtureOfDenoisers``.
        tokenizer: its tokenizer.
        text: may hold sentinels.
        mode: fits the task: S for continuation, R and X for filling in. None leaves it away, with a warning.
        layout: as it was trained. Decoders are called anew for every token, since a prefix mask has no cache.
        mode_tokens: mode -> token.
        max_new_tokens: at most so many.

    Returns:
        The answer up to EOS, without special tokens other than sentinels.
    """
    if mode is None:
        warnings.warn("no mode token: a model trained with modes answers worse without; give mode.", stacklevel=2)
    else:
        text = with_mode(text, mode, mode_tokens)
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    sequence = torch.tensor([ids], device=model.device)
    prefix = sequence.new_tensor([len(ids)])
    with torch.inference_mode():
        if layout == "encoder_decoder":
            answer = model.generate(
                input_ids=sequence, attention_mask=torch.ones_like(sequence), max_new_tokens=max_new_tokens,
                do_sample=False,
            )[0, 1:]  # fmt: skip
        else:
            for _ in range(max_new_tokens):
                mask = torch.ones_like(sequence)
                if layout == "prefix_decoder":
                    mask = prefix_mask(model, prefix, sequence)
                place = torch.arange(sequence.shape[1], device=model.device)[None]
                logits = model(input_ids=sequence, attention_mask=mask, position_ids=place, use_cache=False).logits
                sequence = torch.cat([sequence, logits[:, -1:].argmax(dim=-1)], dim=1)
                if int(sequence[0, -1]) == tokenizer.eos_token_id:
                    break
            answer = sequence[0, len(ids) :]
    drop = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    return str(tokenizer.decode([token for token in answer.tolist() if token not in drop]))


@dataclass(frozen=True)
class PrefixObjective:
    """Next-token prediction where the first ``prefix_lengths`` positions of each row are seen by all of it."""

    unit: str = "nats/token"

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """Batch: ``input_ids``, ``labels``, ``position_ids`` ``(batch, time)``, ``prefix_lengths`` ``(batch,)``."""
        inner = cast(PreTrainedModel, getattr(model, "module", model))  # module: under DDP
        mask = prefix_mask(inner, batch["prefix_lengths"], batch["input_ids"])
        return CausalObjective()(model, {**batch, "attention_mask": mask})


@dataclass(frozen=True)
class _ModeLosses:
    """``val/loss/MODE``: the objective on the held-out rows of one mode."""

    objective: Objective
    batches: Mapping[str, Sequence[Mapping[str, Tensor]]]

    def __call__(self, model: nn.Module) -> Metrics:
        found = {mode: measured_loss(model, self.objective, batches) for mode, batches in self.batches.items()}
        return {f"val/loss/{mode}": total / count for mode, (total, count) in found.items()}


def _by_mode(
    batches: Sequence[Mapping[str, Tensor]], denoisers: Sequence[Denoiser]
) -> dict[str, list[Mapping[str, Tensor]]]:
    found: dict[str, list[Mapping[str, Tensor]]] = {}
    for batch in batches:
        modes = np.array([denoisers[k].mode for k in batch["denoiser"].tolist()])
        for mode in np.unique(modes):
            here = torch.from_numpy(np.flatnonzero(modes == mode))
            found.setdefault(str(mode), []).append({name: tensor[here] for name, tensor in batch.items()})
    return found


class UL2(TextPretraining):
    """Pretraining on a mixture of denoisers with modes."""

    id: ClassVar[str] = "ul2"

    denoisers: tuple[Denoiser, ...] = Field(
        default=UL2_DENOISERS, min_length=1, description="what every row draws from"
    )
    weights: tuple[float, ...] | None = Field(
        default=None, description="probability of each denoiser, normalised; equal by default"
    )
    mode_tokens: dict[str, Name] | None = Field(
        default=dict(MODE_TOKENS), description="token that announces each mode; null trains without modes"
    )
    layout: Literal["auto", "encoder_decoder", "prefix_decoder", "causal_decoder"] = Field(
        default="auto", description="how input and target are laid out; `auto` reads it off the model"
    )

    @model_validator(mode="after")
    def _consistent(self) -> UL2:
        if self.weights is not None and (
            len(self.weights) != len(self.denoisers) or min(self.weights) < 0 or not sum(self.weights)
        ):
            raise ValueError(f"weights must be {len(self.denoisers)} numbers >= 0, one per denoiser, not all 0")
        if self.mode_tokens is not None:
            for mode in {denoiser.mode for denoiser in self.denoisers} - set(self.mode_tokens):
                raise ValueError(f"mode {mode!r} has no token; name one in mode_tokens, or mode_tokens: null")
        return self

    def parts(self, run: Run) -> PretrainParts:
        """Sentinels and modes for the tokenizer, the collator as data, cross-entropy on targets as objective."""
        text = open_text(self, run)
        layout = self._layout(text.head)
        sentinels = max(c.most(self.seq_length)[2] for c in self._corruptions())
        model = cast(PreTrainedModel, text.model)
        prepare_tokenizer(text.tokenizer, model, sentinels, self.mode_tokens, seed=self.seed)
        collator = MixtureOfDenoisers(
            text.tokenizer,
            self.denoisers,
            self.weights,
            layout,
            self.seq_length,
            mode_tokens=self.mode_tokens,
            return_denoiser=True,
            seed=self.seed,
        )
        objective: Objective = cast(Objective, _OBJECTIVES[layout])
        if layout != "encoder_decoder":
            _check_decoder(model, layout, self.seq_length + 2 * sentinels + 3)
        start = getattr(model.config, "decoder_start_token_id", None)
        modes = _by_mode(text.held_out_batches(collator, text.rows), self.denoisers)
        return text.parts(
            objective,
            collator,
            lambda ids, mask, corruption: collator.ask(ids, mask, corruption, decoder_start=start),
            usage={
                "objective": "mixture of denoisers",
                "layout": layout,
                "denoisers": [denoiser.model_dump(mode="json") for denoiser in self.denoisers],
                "weights": self.weights,
                "mode_tokens": self.mode_tokens,
                "mode_for": {use: mode for use, mode in _MODE_FOR.items() if mode in (self.mode_tokens or {})},
                "sentinels": [f"<extra_id_{i}>" for i in range(sentinels)],
                "input": "mode token, tokens, EOS",
                "target": "sentinel and span in turn, EOS; a suffix (S) has no sentinel",
            },
            positions=_positions,
            probes=(_ModeLosses(objective, modes),),
        )

    def _corruptions(self) -> list[Corruption]:
        return [d.corruption for d in self.denoisers] + [probe.corruption for probe in self.probes]

    def _layout(self, head: str) -> Layout:
        natural: Layout = "encoder_decoder" if head == "seq2seq" else "prefix_decoder"
        layout = natural if self.layout == "auto" else self.layout
        if (layout == "encoder_decoder") != (head == "seq2seq"):
            kind = "an encoder-decoder" if head == "seq2seq" else "a decoder"
            raise ModelError(f"layout {layout!r} was asked for, but the model is {kind}; use 'auto'")
        return layout


_MODE_FOR = {"classify, answer briefly": "R", "continue, prompt with examples": "S", "fill in much": "X"}
_OBJECTIVES: Mapping[str, object] = {
    "encoder_decoder": TokenObjective(),
    "prefix_decoder": PrefixObjective(),
    "causal_decoder": CausalObjective(),
}


def _check_decoder(model: PreTrainedModel, layout: Layout, longest: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ModelError(
            f"input and target together take {longest} positions, and the model has {limit}; lower seq_length"
        )
    if layout == "prefix_decoder":
        one = torch.ones((1, 2), dtype=torch.long)
        prefix_mask(model, one[:, 0], one)  # refuses attention that cannot honour the mask, before anything is trained


def _positions(batch: Mapping[str, Tensor]) -> int:
    decoder = 0 if "position_ids" in batch else batch["labels"].numel()
    return batch["input_ids"].numel() + decoder
