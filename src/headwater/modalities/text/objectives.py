"""Token losses for any Hugging Face language model, as a sum and a count.

    loss(x) = - sum_t  log p(x_t | context of t)        over the positions whose label is not -100

They stand beside the losses inside the models because those return means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from headwater.core.objective import Loss
from headwater.modalities.text.masks import packed_inputs

__all__ = ["CausalObjective", "PackedObjective", "TokenObjective", "token_loss"]

IGNORED = -100  # the label that Hugging Face models leave out


def token_loss(logits: Tensor, labels: Tensor) -> Loss:
    """Summed cross-entropy in float32.

    Args:
        logits: ``(batch, time, vocabulary)``, any floating dtype.
        labels: ``(batch, time)``, aligned with the logits; -100 is left out.

    Returns:
        ``total`` in nats; 0 with count 0 where every label is -100.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must be (batch, time) of the logits; got {tuple(labels.shape)} and logits {tuple(logits.shape)}."
        )
    total = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return Loss(total, (labels != IGNORED).sum())


@dataclass(frozen=True)
class CausalObjective:
    """Next-token prediction. ``labels`` stand on their own token, not shifted, as in Hugging Face collators."""

    unit: str = "nats/token"

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """Batch: ``input_ids``, ``labels`` ``(batch, time)``; ``attention_mask`` and ``position_ids`` where given."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        logits = model(**inputs, use_cache=False).logits
        # Shifting the labels instead of the logits spares a copy of the largest tensor.
        following = F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
        return token_loss(logits, following)


@dataclass(frozen=True)
class PackedObjective:
    """Next-token prediction inside the documents of packed rows: nothing is seen or predicted across their borders.

    Attributes:
        restart_positions: positions are the batch's, from 0 in every document; False counts through the row.
    """

    unit: str = "nats/token"
    restart_positions: bool = True

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """Batch: ``input_ids``, ``labels``, ``document_ids`` and ``position_ids`` ``(batch, time)``.

        Raises:
            ValueError: positions through the row under flash attention, which tells documents apart by positions.
        """
        inner = cast(PreTrainedModel, getattr(model, "module", model))  # module: under DDP
        positions, documents = batch["position_ids"], batch["document_ids"]
        if not self.restart_positions:
            if "flash" in str(inner.config._attn_implementation):
                raise ValueError(
                    "flash attention tells documents apart by positions that start anew; restart them, or load the "
                    "model with attn_implementation='sdpa'."
                )
            positions = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
        opens = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
        inputs = packed_inputs(inner, batch["input_ids"], documents, positions)
        labels = batch["labels"].masked_fill(opens, IGNORED).view_as(inputs["input_ids"])
        return CausalObjective()(model, {**inputs, "labels": labels})


@dataclass(frozen=True)
class TokenObjective:
    """Prediction of the labels where they stand: masked language models, token taggers, encoder-decoders."""

    unit: str = "nats/token"

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """Batch: the model's inputs, and ``labels`` ``(batch, time)``, which also give a decoder its inputs."""
        names = (
            "input_ids",
            "attention_mask",
            "token_type_ids",
            "position_ids",
            "decoder_input_ids",
            "decoder_attention_mask",
        )
        inputs = {name: batch[name] for name in names if name in batch}
        shift = getattr(
            getattr(model, "module", model), "prepare_decoder_input_ids_from_labels", None
        )  # module: under DDP
        if shift is not None and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = shift(labels=batch["labels"])
        return token_loss(model(**inputs).logits, batch["labels"])
