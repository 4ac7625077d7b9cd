"""Direct preference optimisation: a language model learns which of two texts is better after a prompt.

    log pi(y)  =  sum_t log pi(y_t | prompt, y_<t)
    loss       =  - log sigmoid( beta [ (log pi(c) - log ref(c)) - (log pi(r) - log ref(r)) ] )

The reference is the model before training. Its log-probabilities are taken once, from the model itself or, where it has
adapters, with those switched off; so there is never a second copy of the weights.

Source: Rafailov et al., "Direct Preference Optimization", arXiv:2305.18290, equation 7.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from headwater.core.objective import Loss
from headwater.core.order import VirtualIndex
from headwater.core.rng import derive_seed
from headwater.modalities.text.class_inputs import length_batches
from headwater.modalities.text.objectives import IGNORED
from headwater.modalities.text.pairs import Encoded, pad_pairs
from headwater.modalities.text.score import scoring

__all__ = [
    "DPOObjective",
    "EncodedPreference",
    "Preference",
    "PreferenceStream",
    "dpo_loss",
    "reference_logps",
    "sequence_logps",
]


@dataclass(frozen=True)
class Preference:
    """Two texts of which one is better.

    Attributes:
        prompt: what both answer.
        chosen: the better one.
        rejected: the other.
        kind: what the texts are, to tell pairs of several sorts apart.
    """

    prompt: str
    chosen: str
    rejected: str
    kind: str = ""


@dataclass(frozen=True)
class EncodedPreference:
    """A preference in tokens.

    Attributes:
        prompt: up to where a text begins, special tokens included; at least one token.
        chosen, rejected: the texts, with EOS where they end; at least one token each.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def sides(self) -> tuple[Encoded, Encoded]:
        """The better text after the prompt, and the other."""
        return Encoded(self.prompt, self.chosen), Encoded(self.prompt, self.rejected)


def sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each row's labelled tokens, summed, in float32.

    Args:
        logits: ``(batch, time, vocabulary)``, any floating dtype.
        labels: ``(batch, time)``, each on its own token; -100 is left out, and so is the first column, which nothing
            predicts.

    Returns:
        ``(batch,)``, in nats, <= 0; 0 where nothing is labelled.

    Raises:
        ValueError: the shapes differ.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must be (batch, time) of the logits; got {tuple(labels.shape)} and logits {tuple(logits.shape)}."
        )
    following = labels[:, 1:]
    nats = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), following, ignore_index=IGNORED, reduction="none")
    return -nats.sum(1)


def dpo_loss(
    policy_chosen_logp: Tensor,
    policy_rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """The loss of each pair.

    Args:
        policy_chosen_logp: log-probability of the better texts under the trained model, ``(pairs,)``, in nats.
        policy_rejected_logp: of the other texts, same shape.
        ref_chosen_logp: of the better texts under the reference, same shape; no gradient is wanted.
        ref_rejected_logp: likewise.
        beta: how strongly the model is held to the reference; > 0.

    Returns:
        ``(pairs,)``, >= 0; ln 2 where the model is the reference.

    Raises:
        ValueError: the shapes differ, or ``beta`` is not positive.
    """
    shapes = [t.shape for t in (policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp)]
    if len(set(shapes)) > 1:
        raise ValueError(f"log-probabilities must have one shape; got {[tuple(shape) for shape in shapes]}.")
    if not beta > 0:
        raise ValueError(f"beta must be > 0; got {beta}.")
    margin = (policy_chosen_logp - ref_chosen_logp) - (policy_rejected_logp - ref_rejected_logp)
    return -F.logsigmoid(beta * margin)


def reference_logps(
    model: nn.Module, pairs: Sequence[EncodedPreference], pad: int, *, batch_size: int = 32
) -> NDArray[np.float32]:
    """Log-probabilities under the model as it is, or, in PEFT, without its adapters.

    Args:
        model: a causal language model.
        pairs: in tokens.
        pad: padding token.
        batch_size: texts per forward pass.

    Returns:
        ``(pairs, 2)``: of the better text and of the other, in nats.
    """
    texts = [side for pair in pairs for side in pair.sides]
    found = np.zeros(len(texts), dtype=np.float32)
    lengths = [len(text.source) + len(text.target) for text in texts]
    disabled = getattr(model, "disable_adapter", None)
    base: AbstractContextManager[Any] = nullcontext() if disabled is None else disabled()
    with base, scoring(model) as device:
        for rows in length_batches(lengths, batch_size) if texts else []:
            batch = pad_pairs([texts[row] for row in rows], "causal", pad)
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            logits = model(**inputs, use_cache=False).logits
            found[rows] = sequence_logps(logits, batch["labels"].to(device)).cpu().numpy()
    return found.reshape(-1, 2)


class PreferenceStream:
    """Batches of pairs in an order that is shuffled anew in every epoch; a ``BatchStream``.

    Args:
        pairs: in tokens.
        reference: ``(pairs, 2)``, as ``reference_logps`` gives them.
        rows: pairs per batch; fewer where there are fewer.
        seed: of the order.
        pad: padding token.

    Raises:
        ValueError: no pair, a side without a token, or ``reference`` of another shape.
    """

    def __init__(
        self, pairs: Sequence[EncodedPreference], reference: NDArray[np.float32], *, rows: int, seed: int, pad: int
    ) -> None:
        if not pairs:
            raise ValueError("there is no pair to learn from.")
        if empty := [row for row, pair in enumerate(pairs) if not (pair.prompt and pair.chosen and pair.rejected)]:
            raise ValueError(f"pair {empty[0]} has a prompt or a text without a token; leave it out.")
        if reference.shape != (len(pairs), 2):
            raise ValueError(f"reference must be ({len(pairs)}, 2); got {reference.shape}.")
        self.pairs, self.reference, self.rows, self._pad = pairs, reference, min(rows, len(pairs)), pad
        self.order = VirtualIndex(len(pairs), derive_seed(seed, "order"))
        sizes = [2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs]
        self.tokens_per_row = math.ceil(sum(sizes) / len(sizes))
        about = [self.rows, seed, [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]]
        self.fingerprint = hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Pairs [start, stop) of batch ``step``, the better text first.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels`` ``(pairs, 2, time)``, ``reference`` ``(pairs, 2)`` and
            ``row`` ``(pairs,)``.
        """
        _, items = self.order(step * self.rows + np.arange(start, self.rows if stop is None else stop))
        flat = pad_pairs([side for item in items for side in self.pairs[item].sides], "causal", self._pad)
        batch = {name: tensor.view(len(items), 2, -1) for name, tensor in flat.items()}
        return {**batch, "reference": torch.from_numpy(self.reference[items]), "row": torch.from_numpy(items)}


@dataclass(frozen=True)
class DPOObjective:
    """Preference optimisation on batches of a ``PreferenceStream``.

    Attributes:
        beta: see ``dpo_loss``.
    """

    beta: float = 0.1
    unit: str = "nats/pair"

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """The sum over pairs; metrics: how often the better text gained more, and by how much on average, in nats."""
        inputs = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
        logps = sequence_logps(model(**inputs, use_cache=False).logits, batch["labels"].flatten(0, 1)).view(-1, 2)
        reference = batch["reference"]
        losses = dpo_loss(logps[:, 0], logps[:, 1], reference[:, 0], reference[:, 1], self.beta)
        gained = (logps - reference).detach()
        margin = gained[:, 0] - gained[:, 1]
        metrics = {"preferred": (margin > 0).float().mean(), "margin": margin.mean()}
        return Loss(losses.sum(), len(losses), metrics)
