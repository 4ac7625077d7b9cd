"""What a speech model minimises, as sums and counts: the contrastive loss of wav2vec 2.0, and CTC.

    L = sum over hidden t of  -log [ exp(cos(c_t, q_t) / k) / sum over q of exp(cos(c_t, q) / k) ]  +  alpha L_d
    L_d = (G V - sum of the codebooks' perplexities) / (G V) * hidden frames

`transformers` computes both, as sums, given the mask and the negatives.

Sources: Baevski et al., "wav2vec 2.0", arXiv:2006.11477, equations 3 and 4; CTC: Graves et al., "Connectionist Temporal
Classification", ICML 2006.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.core.objective import Loss

__all__ = ["CTCObjective", "ContrastiveObjective", "gumbel_temperature"]


def gumbel_temperature(step: Tensor, start: float, end: float, decay: float) -> Tensor:
    """``max(start * decay ** step, end)``, of the shape of ``step``: a function of the step, so nothing to resume."""
    # In float64: the paper's decay differs from 1 by 5e-6, which 400 000 steps of float32 would blur.
    return (start * decay ** step.double()).clamp(min=end).float()


class ContrastiveObjective:
    """The loss of ``Wav2Vec2ForPreTraining``, over the frames that a batch hides.

    The second term is nonlinear in the rows of a micro-batch, as it is in `transformers`: it alone changes a little
    when a batch is cut.

    Args:
        start, end, decay: of the temperature of the Gumbel softmax that picks codes, by step.
        attention_mask: whether the model is told what is padding.
    """

    unit = "nats/masked frame"

    def __init__(self, start: float, end: float, decay: float, *, attention_mask: bool) -> None:
        self.start, self.end, self.decay, self.attention_mask = start, end, decay, attention_mask

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """Measure; batches are those of a ``SpeechStream`` with negatives, or of ``collate``."""
        if "step" in batch:
            temperature = gumbel_temperature(batch["step"][0], self.start, self.end, self.decay)
            model.set_gumbel_temperature(temperature)  # type: ignore[operator]  # a Wav2Vec2ForPreTraining
        mask, negatives = batch["mask_time_indices"], batch["sampled_negative_indices"]
        first = torch.arange(len(mask), device=mask.device) * mask.shape[1]
        found = model(
            batch["input_values"],
            attention_mask=batch["attention_mask"] if self.attention_mask else None,
            mask_time_indices=mask,
            sampled_negative_indices=negatives + first[:, None, None],
        )
        count = mask.sum()
        metrics = {
            "contrastive": found.contrastive_loss.detach() / count,
            "code_perplexity": found.codevector_perplexity.detach(),
        }
        return Loss(found.loss, count, metrics)


class CTCObjective:
    """Negative log-likelihood of the transcripts under CTC, per character.

    Args:
        kernels, strides: of the model's convolutions.
        blank: id of the blank.
        attention_mask: whether the model is told what is padding.
    """

    unit = "nats/character"

    def __init__(self, kernels: tuple[int, ...], strides: tuple[int, ...], *, blank: int, attention_mask: bool) -> None:
        self.kernels, self.strides, self.blank, self.attention_mask = kernels, strides, blank, attention_mask

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """Measure; batches are those of a ``SpeechStream`` with labels."""
        hidden: dict[str, Any] = {}
        if model.training:
            # Ours instead of the model's own, whose spans come from numpy's global generator.
            hidden["mask_time_indices"] = batch["mask_time_indices"]
        logits = model(
            batch["input_values"], attention_mask=batch["attention_mask"] if self.attention_mask else None, **hidden
        ).logits
        lengths = batch["attention_mask"].sum(dim=1)
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            lengths = (lengths - kernel) // stride + 1
        labels = batch["labels"]
        given = labels >= 0
        total = F.ctc_loss(
            F.log_softmax(logits.float(), dim=-1).transpose(0, 1),
            labels.clamp(min=0),
            lengths,
            given.sum(dim=1),
            blank=self.blank,
            reduction="sum",
        )
        return Loss(total, given.sum())
