"""The models and the data that the questions about training share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from headwater.modalities.text.tiny import tiny_llama

__all__ = ["SIZES", "Rows", "Size"]


@dataclass(frozen=True)
class Size:
    """A Llama and how much of it is run: ``steps`` are timed, after ``warmup`` that are not."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    vocab: int
    rows: int
    length: int
    steps: int
    warmup: int = 3

    def model(self) -> LlamaForCausalLM:
        """The same fresh weights at every call."""
        return tiny_llama(
            self.vocab, self.hidden, self.layers, self.heads, self.mlp, self.length, generator_seed=0
        ).train()


SIZES = {
    "0.06M": Size(hidden=64, layers=1, heads=4, mlp=128, vocab=512, rows=16, length=64, steps=60),
    "1.3M": Size(hidden=128, layers=6, heads=4, mlp=344, vocab=1024, rows=16, length=128, steps=10),
    "10M": Size(hidden=256, layers=10, heads=8, mlp=688, vocab=8192, rows=8, length=128, steps=5),
}


class Rows:
    """Random tokens as a stream for ``fit`` and as a data set for anyone else, which tells when rows are asked for.

    Args:
        size: of the model that reads them.
        asked: called with the number of the batch when its first row is asked for: the one clock of all sides.
    """

    fingerprint = "random"

    def __init__(self, size: Size, asked: Callable[[int], None] = lambda step: None) -> None:
        self.size, self.rows, self.tokens_per_row, self.asked = size, size.rows, size.length, asked
        batches = size.warmup + size.steps + 1
        drawn = np.random.default_rng(0).integers(0, size.vocab, (batches * size.rows, size.length))
        self.ids = torch.from_numpy(drawn)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Rows of batch ``step``."""
        self.asked(step)
        rows = self.ids[step * self.rows :][start : self.rows if stop is None else stop]
        return {"input_ids": rows, "labels": rows}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if row % self.rows == 0:
            self.asked(row // self.rows)
        return {"input_ids": self.ids[row], "labels": self.ids[row]}
