"""Texts as a classifier reads them: token ids in memory or on disk, batches of similar length, an endless stream."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from headwater.core.order import GroupedIndex, VirtualIndex
from headwater.core.rng import derive_seed
from headwater.modalities.text.packing import TokenStore
from headwater.modalities.text.soft_labels import check_distributions

__all__ = ["ClassStream", "Inputs", "StoredInputs", "input_lengths", "length_batches", "padded_inputs"]


class StoredInputs(Sequence[NDArray[np.int64]]):
    """Token ids of texts on disk, read as they are wanted.

    Args:
        store: one sequence per text.
        rows: which of them, in order; all by default.
    """

    def __init__(self, store: TokenStore, rows: ArrayLike | None = None) -> None:
        self.store = store
        self.rows = np.arange(len(store.offsets) - 1) if rows is None else np.asarray(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> NDArray[np.int64]: ...
    @overload
    def __getitem__(self, index: slice) -> StoredInputs: ...
    def __getitem__(self, index: int | slice) -> NDArray[np.int64] | StoredInputs:
        if isinstance(index, slice):
            return StoredInputs(self.store, self.rows[index])
        row = self.rows[index]
        found: NDArray[np.int64] = self.store.tokens[self.store.offsets[row] : self.store.offsets[row + 1]].astype(
            np.int64
        )
        return found

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each text, without reading them."""
        found: NDArray[np.int64] = np.diff(self.store.offsets)[self.rows]
        return found


Inputs = Sequence[Sequence[int]] | Sequence[NDArray[np.int64]] | Tensor
"""Token ids of each text, or features ``(n, D)``."""


def input_lengths(inputs: Inputs) -> NDArray[np.int64]:
    """Tokens of each input, ``(n,)``; 1 for features."""
    if isinstance(inputs, Tensor):
        return np.ones(len(inputs), dtype=np.int64)
    if isinstance(inputs, StoredInputs):
        return inputs.lengths
    return np.array([len(row) for row in inputs], dtype=np.int64)


def length_batches(
    lengths: ArrayLike, batch_size: int = 64, batch_tokens: int | None = None
) -> list[NDArray[np.int64]]:
    """Inputs of similar length together, the longest first, so that padding is small and memory runs out at once.

    Args:
        lengths: of each input, ``(n,)``.
        batch_size: inputs of a batch.
        batch_tokens: tokens of a batch, padding included, in place of ``batch_size``; a longer input is alone.

    Returns:
        The indices of each batch.

    Example:
        >>> [batch.tolist() for batch in length_batches([1, 9, 5, 4], batch_tokens=10)]
        [[1], [2, 3], [0]]
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    batches, begin = [], 0
    while begin < len(order):
        rows = batch_size if batch_tokens is None else max(1, batch_tokens // max(1, int(sizes[order[begin]])))
        batches.append(order[begin : begin + rows])
        begin += rows
    return batches


def padded_inputs(inputs: Inputs, rows: NDArray[np.int64], pad: int) -> dict[str, Tensor]:
    """Some inputs as a batch: ``features``, or ``input_ids`` padded on the right and their ``attention_mask``."""
    if isinstance(inputs, Tensor):
        return {"features": inputs[torch.from_numpy(rows)]}
    ids = [torch.tensor(inputs[row]) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(row) for row in ids])
    return {"input_ids": padded, "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long()}


class ClassStream:
    """Batches of inputs with a target distribution each, in an order that is shuffled anew in every epoch.

    Args:
        inputs: token ids of each text, or features ``(n, D)``.
        targets: ``(n, classes)``, rows that sum to 1.
        rows: per batch; fewer where there are fewer inputs.
        seed: of the order.
        pad: padding token.
        groups: of each input, ``(n,)``; the stream then has equally many rows of each group, taken in turn, and a small
            group comes round more often than a large one. ``None``: every input as often as any other.

    Raises:
        ValueError: no input, lengths that differ, or targets that are no distributions.
    """

    def __init__(
        self,
        inputs: Inputs,
        targets: ArrayLike,
        *,
        rows: int,
        seed: int = 0,
        pad: int = 0,
        groups: ArrayLike | None = None,
    ) -> None:
        values = np.asarray(targets, dtype=np.float32)
        check_distributions("targets", values)
        if len(values) != len(inputs) or not len(values):
            raise ValueError(f"every input needs a target; got {len(inputs)} inputs and {len(values)} targets.")
        if rows < 1:
            raise ValueError(f"rows must be at least 1; got {rows}.")
        self.inputs, self.targets, self.rows, self._pad = inputs, torch.from_numpy(values), min(rows, len(values)), pad
        self.order: VirtualIndex | GroupedIndex = VirtualIndex(len(values), derive_seed(seed, "order"))
        # Charged to a budget in tokens: the mean length, since padding differs from batch to batch.
        self.tokens_per_row = math.ceil(int(input_lengths(inputs).sum()) / len(values))
        digest = hashlib.blake2b(json.dumps([self.rows, seed]).encode(), digest_size=16)
        for part in _content(inputs):
            digest.update(part)
        digest.update(values.tobytes())
        if groups is not None:
            named = np.asarray(groups)
            if named.shape != (len(values),):
                raise ValueError(f"every input needs a group; got {len(values)} inputs and groups {named.shape}.")
            self.order = GroupedIndex(named, derive_seed(seed, "order"))
            digest.update(json.dumps(named.tolist()).encode())
        self.fingerprint = digest.hexdigest()

    def steps(self, epochs: float) -> int:
        """Whole batches in so many epochs, at least one."""
        return max(1, round(epochs * self.order.n / self.rows))

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Rows [start, stop) of batch ``step``: inputs, ``soft_label`` ``(batch, classes)`` and ``row`` ``(batch,)``.

        Raises:
            ValueError: ``step`` is negative or the range is not inside the batch.
        """
        stop = self.rows if stop is None else stop
        if step < 0 or not 0 <= start <= stop <= self.rows:
            raise ValueError(f"need step >= 0 and 0 <= start <= stop <= {self.rows}; got {step}, {start}, {stop}.")
        positions = step * self.rows + np.arange(start, stop, dtype=np.int64)
        _, items = self.order(positions)
        batch = padded_inputs(self.inputs, items, self._pad)
        return {**batch, "soft_label": self.targets[torch.from_numpy(items)], "row": torch.from_numpy(items)}


def _content(inputs: Inputs) -> Iterator[bytes]:
    """All that the inputs hold, a piece at a time."""
    if isinstance(inputs, Tensor):
        yield inputs.numpy().tobytes()
    elif isinstance(inputs, StoredInputs):
        yield inputs.store.fingerprint.encode()
        yield inputs.rows.tobytes()
    else:
        yield json.dumps(list(map(list, inputs))).encode()
