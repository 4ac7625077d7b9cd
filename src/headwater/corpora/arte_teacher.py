"""Aligning a teacher with a student: preference optimisation of a local model on pairs of its own drafts.

    loss = -log sigmoid(beta [(log pi(c) - log ref(c)) - (log pi(r) - log ref(r))]),   ref = the teacher without adapter

Source: Liu et al., arXiv:2406.19227; the loss is ``modalities.text.preference``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwater.core.budget import Budget, Meter
from headwater.core.fit import FitSettings, fit
from headwater.core.lora import LoraSpec, add_lora
from headwater.core.optim import OptimSpec
from headwater.core.phase import Phase, Trained
from headwater.core.recipe import Spec
from headwater.core.rng import derive_seed
from headwater.modalities.text.generate import Message, Request
from headwater.modalities.text.generate_hf import HFGenerator
from headwater.modalities.text.preference import (
    DPOObjective,
    EncodedPreference,
    Preference,
    PreferenceStream,
    reference_logps,
)

__all__ = ["DPOSpec", "align_teacher", "encode_preferences"]


class DPOSpec(Spec):
    """How a teacher is aligned. What the paper used is not known to us."""

    beta: float = Field(
        default=0.1, gt=0, le=10, description="how strongly it is held to what it was"
    )  # as usual for DPO
    epochs: float = Field(default=1.0, gt=0, le=1000, description="how often each pair is read")
    rows: int = Field(default=32, gt=0, description="pairs per step")
    lora: LoraSpec | None = Field(
        default=LoraSpec(), description="adapters; null trains the whole teacher, for which 5e-7 is a usual rate"
    )
    optim: OptimSpec = Field(
        default=OptimSpec(lr=1e-5, weight_decay=0.0, warmup=0.1), description="how weights are moved"
    )
    fit: FitSettings = Field(default=FitSettings(), description="how the loop runs")

    def steps(self, pairs: int) -> int:
        """Steps on so many pairs."""
        return max(1, math.ceil(self.epochs * pairs / min(self.rows, pairs)))


def encode_preferences(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Preference]
) -> list[EncodedPreference]:
    """Pairs in tokens, each prompt as ``HFGenerator`` shows it to the model; a text that the context cuts has no EOS.

    Raises:
        ValueError: a prompt that leaves no room in the context.
    """
    writer = HFGenerator(model, tokenizer)
    join = "" if tokenizer.chat_template else " "  # a plain prompt ends in "assistant:"
    found = []
    for pair in pairs:
        prompt = writer.encode(Request((Message("user", pair.prompt),)))
        room = None if writer.context is None else writer.context - len(prompt)
        if room is not None and room < 1:
            raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room in a context of {writer.context}.")
        sides = tokenizer([join + pair.chosen, join + pair.rejected], add_special_tokens=False, verbose=False)
        chosen, rejected = ([*ids, tokenizer.eos_token_id][:room] for ids in sides["input_ids"])
        found.append(EncodedPreference(prompt, chosen, rejected))
    return found


def align_teacher(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Preference],
    spec: DPOSpec | None = None,
    *,
    seed: int = 0,
    directory: Path,
    meter: Meter | None = None,
) -> Trained:
    """Train a teacher to prefer what a student prefers.

    Args:
        model: the teacher; trained in place, or frozen in place under adapters.
        tokenizer: its own, with EOS and padding token.
        pairs: of its own texts; at least one.
        spec: how.
        seed: of the adapters and of the order of pairs.
        directory: where checkpoints go; a stopped alignment goes on from there.
        meter: is charged with the training.

    Returns:
        What was trained; its ``model`` is in PEFT where there are adapters, which ``disable_adapter`` switches off.

    Raises:
        ValueError: no pair, or see ``encode_preferences``.
    """
    how = spec or DPOSpec()
    encoded = encode_preferences(model, tokenizer, pairs)
    trained = model if how.lora is None else add_lora(model, how.lora, seed=derive_seed(seed, "lora"))
    pad = int(tokenizer.pad_token_id)
    stream = PreferenceStream(encoded, reference_logps(trained, encoded, pad), rows=how.rows, seed=seed, pad=pad)
    if how.lora is None:
        trained.requires_grad_(True)
    return fit(
        Phase("align", trained, stream, DPOObjective(how.beta)),
        budget=Budget(steps=how.steps(len(pairs))),
        optim=how.optim,
        seed=seed,
        directory=directory,
        settings=how.fit,
        meter=meter,
    )
