"""Training an encoder on the samples of one task, with ``core.fit``: what methods that move the encoder share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from headwater.continual.streams import Samples
from headwater.core.objective import Loss
from headwater.core.order import VirtualIndex

__all__ = [
    "InputEncoder",
    "TaskBatches",
    "TaskCrossEntropy",
    "Trainee",
    "batch_norms",
    "digest_of_inputs",
    "features_of",
]


class InputEncoder(Protocol):
    """An ``nn.Module`` between raw inputs and features: ``Encoder`` or ``ArrayEncoder`` of ``modalities.features``."""

    model: Any  # Any: the user's module, whatever it is called with

    def prepare(self, items: Sequence[Any] | NDArray[Any]) -> dict[str, Tensor]:  # Any: raw inputs
        """Tensors of some inputs, ``(batch, ...)`` on the CPU."""

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Features ``(batch, D)``, attached to the graph."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """As in ``nn.Module``."""

    def eval(self) -> Any:  # Any: itself
        """As in ``nn.Module``."""


@dataclass(frozen=True)
class TaskBatches:
    """Batches of one task's samples, in an order of their own in every epoch; a ``BatchStream``.

    Attributes:
        samples: what is trained on.
        encoder: makes tensors of the inputs.
        order: which sample stands where.
        rows: samples in a batch; one may begin in one epoch and end in the next.
    """

    samples: Samples
    encoder: InputEncoder
    order: VirtualIndex
    rows: int
    tokens_per_row: int = 1  # so that a budget in tokens counts samples

    @property
    def fingerprint(self) -> str:
        """Of inputs, labels, order and batch size."""
        about = f"{digest_of_inputs(self.samples.inputs)} {self.order.seed} {self.rows}".encode()
        return hashlib.sha256(about + self.samples.labels.tobytes()).hexdigest()

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """What the encoder reads, and ``labels`` and ``row``, both ``(stop - start,)``."""
        positions = step * self.rows + np.arange(start, self.rows if stop is None else stop)
        _, items = self.order(positions)
        prepared = self.encoder.prepare(self.samples.inputs[items])
        return {**prepared, "labels": torch.from_numpy(self.samples.labels[items]), "row": torch.from_numpy(items)}


class TaskCrossEntropy(nn.Module):
    """Cross-entropy of a head on an encoder's features, over the classes that the head has; an ``Objective``.

    Args:
        head: from features to logits; trained with the encoder, and no part of it.
        competing: the classes that take part, ``(classes,)`` bool; the others' logits count as minus infinity, which
            leaves them no gradient. All of them by default.
    """

    unit = "nats/sample"
    competing: Tensor | None

    def __init__(self, head: nn.Module, competing: Tensor | None = None) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("competing", competing, persistent=False)

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """Measure one micro-batch."""
        labels = batch["labels"]
        logits = self.head(model({name: value for name, value in batch.items() if name not in ("labels", "row")}))
        if self.competing is not None:
            logits = logits.masked_fill(~self.competing, float("-inf"))
        right = (logits.argmax(1) == labels).float().mean()
        return Loss(nn.functional.cross_entropy(logits, labels, reduction="sum"), len(labels), {"acc/train": right})


class Trainee(nn.Module):
    """An encoder while it is trained: running statistics of batch normalisation stay as they are.

    They would drift towards the task's, and the features of all other tasks with them.

    Args:
        encoder: the module that is trained; only what requires a gradient moves.
        adapter: what else is trained: modules that hooks of the encoder run, which it does not list as its own.
    """

    def __init__(self, encoder: nn.Module, adapter: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.adapter = adapter

    def train(self, mode: bool = True) -> Trainee:
        """Switch dropout as usual, and batch normalisation off training always."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Features ``(batch, D)``."""
        features: Tensor = self.encoder(batch)
        return features


def batch_norms(encoder: InputEncoder) -> list[str]:
    """Names of the modules that keep running statistics."""
    return [name for name, module in encoder.named_modules() if isinstance(module, _BatchNorm)]


def digest_of_inputs(inputs: NDArray[Any]) -> str:  # Any: numbers, texts or encoded files
    """Hash of raw inputs: arrays of numbers, or object arrays of texts, encoded files or arrays."""
    digest = hashlib.blake2b(f"{inputs.dtype.str} {inputs.shape}".encode(), digest_size=16)
    if inputs.dtype.kind != "O":
        digest.update(np.ascontiguousarray(inputs).tobytes())
        return digest.hexdigest()
    for item in inputs:
        raw = item.encode() if isinstance(item, str) else item if isinstance(item, bytes) else item.tobytes()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


@torch.no_grad()
def features_of(
    encoder: InputEncoder,
    inputs: NDArray[Any],  # Any: raw inputs
    batch_size: int,
) -> Tensor:
    """Features of raw inputs, ``(n, D)`` where the encoder is, in evaluation mode and without gradient."""
    encoder.eval()  # at every call: dropout that someone switched on would make features random
    pieces = range(0, len(inputs), batch_size)
    return torch.cat([encoder(encoder.prepare(inputs[begin : begin + batch_size])) for begin in pieces])
