"""Batches of clips of like length, padded together, with what each objective needs; reached by number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Wav2Vec2FeatureExtractor

from headwater.core.order import permutation
from headwater.core.rng import derive_seed
from headwater.modalities.speech.audio import Clip, fingerprint
from headwater.modalities.speech.masking import num_frames, sample_negatives, span_mask

__all__ = ["Frames", "Masking", "SpeechStream", "collate"]

WINDOW = 50
"""Batches that are sorted by length together: enough to pad little, few enough to stay shuffled."""


@dataclass(frozen=True)
class Frames:
    """A model's front end.

    Attributes:
        kernels, strides: of its convolutions.
        extractor: of the model; normalises each clip by itself, as the model is used to.
    """

    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    extractor: Wav2Vec2FeatureExtractor

    def count(self, samples: Any) -> NDArray[np.int64]:  # Any: an integer or an array of them
        """Frames of so many samples."""
        return num_frames(samples, self.kernels, self.strides)


@dataclass(frozen=True)
class Masking:
    """What is hidden in each row, and how many others each hidden frame is told apart from.

    Attributes:
        probability, length: see ``span_mask``; a probability of 0 hides nothing.
        negatives: 0 for an objective without them.
    """

    probability: float
    length: int
    negatives: int = 0


def collate(
    clips: Sequence[Clip],
    frames: Frames,
    *,
    rows: NDArray[np.int64],
    masking: Masking,
    seed: int,
    samples: int | None = None,
    labels: Sequence[Sequence[int]] | None = None,
    label_width: int | None = None,
) -> dict[str, Tensor]:
    """A batch of clips.

    Args:
        clips: at least one.
        frames: the model's front end.
        rows: ``(B,)``, names of the rows, from which masks and negatives are drawn.
        masking: what to hide.
        seed: of those draws.
        samples: pad to so many; the longest clip's by default.
        labels: ids of each clip's transcript, for CTC.
        label_width: pad them to so many.

    Returns:
        ``input_values`` ``(B, samples)`` float32; ``attention_mask`` ``(B, samples)`` int64, 1 where it is not padding;
        ``mask_time_indices`` ``(B, frames)`` bool; with negatives ``sampled_negative_indices`` ``(B, frames, K)``
        int64, within the row; with labels ``labels`` ``(B, label_width)``, padded by -100; and ``row`` ``(B,)``.
    """
    lengths = np.array([clip.samples for clip in clips])
    width = int(lengths.max()) if samples is None else samples
    values = np.full((len(clips), width), frames.extractor.padding_value, dtype=np.float32)
    for row, clip in enumerate(clips):
        done = frames.extractor(clip.waveform(), sampling_rate=frames.extractor.sampling_rate, return_tensors="np")
        values[row, : clip.samples] = done["input_values"][0]
    inside = (np.arange(width) < lengths[:, None]).astype(np.int64)
    count = int(frames.count(width))
    mask = span_mask(rows, frames.count(lengths), masking.probability, masking.length, width=count, seed=seed)
    batch: dict[str, NDArray[Any]] = {  # Any: dtypes differ
        "input_values": values,
        "attention_mask": inside,
        "mask_time_indices": mask,
        "row": rows,
    }
    if masking.negatives:
        batch["sampled_negative_indices"] = sample_negatives(mask, rows, masking.negatives, seed=seed)
    if labels is not None:
        padded = np.full((len(clips), label_width or max(map(len, labels))), -100, dtype=np.int64)
        for row, ids in enumerate(labels):
            padded[row, : len(ids)] = ids
        batch["labels"] = padded
    return {name: torch.from_numpy(column) for name, column in batch.items()}


class SpeechStream:
    """Endless batches of clips: shuffled anew in every epoch, sorted by length within windows of fifty batches.

    Batch, masks and negatives follow from the step alone. What does not fill a last batch is left out of an epoch,
    other clips each time. A ``step`` column says which step it is, for objectives that change on the way.

    Args:
        clips: at least one.
        frames: the model's front end.
        rows: clips per batch; at most all of them.
        masking: what to hide.
        seed: of order, masks and negatives.
        labels: ids of each clip's transcript, for CTC.

    Attributes:
        tokens_per_row: frames of a clip, on average: what a budget in tokens is charged for a row.
        padding: share of the first epoch's samples that is padding.

    Raises:
        ValueError: no clip, fewer than one row, or labels that are not one for each clip.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        frames: Frames,
        *,
        rows: int,
        masking: Masking,
        seed: int,
        labels: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if not clips or rows < 1:
            raise ValueError(f"a stream needs at least one clip and one row; got {len(clips)} and {rows}.")
        if labels is not None and len(labels) != len(clips):
            raise ValueError(f"got {len(labels)} transcripts for {len(clips)} clips.")
        self.clips, self.frames, self.masking, self.seed, self.labels = clips, frames, masking, seed, labels
        self.rows = min(rows, len(clips))
        self.batches = len(clips) // self.rows
        self._lengths = np.array([clip.samples for clip in clips])
        self.tokens_per_row = max(1, round(float(frames.count(self._lengths).mean())))
        self._epochs: dict[int, NDArray[np.int64]] = {}
        front = [frames.kernels, frames.strides, frames.extractor.to_dict()]
        about = [fingerprint(clips), self.rows, vars(masking), seed, labels, front]
        self.fingerprint = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]

    @property
    def padding(self) -> float:
        """See the class."""
        lengths = self._lengths[self._order(0)]
        return float(1 - lengths.sum() / (lengths.max(axis=1).sum() * self.rows))

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Clips of every batch of an epoch, ``(batches, rows)``."""
        order = self._epochs.get(epoch)
        if order is None:
            items = permutation(self.seed, epoch, len(self.clips))[: self.batches * self.rows]
            for begin in range(0, len(items), WINDOW * self.rows):
                window = items[begin : begin + WINDOW * self.rows]
                items[begin : begin + WINDOW * self.rows] = window[np.argsort(self._lengths[window], kind="stable")]
            shuffled = permutation(derive_seed(self.seed, "batches"), epoch, self.batches)
            order = items.reshape(self.batches, self.rows)[shuffled]
            self._epochs = {epoch: order}
        return order

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Rows [start, stop) of batch ``step``: see ``collate``, and ``step`` ``(B,)``.

        Raises:
            ValueError: ``step`` is negative or the range is empty or not inside the batch.
        """
        stop = self.rows if stop is None else stop
        if step < 0 or not 0 <= start < stop <= self.rows:
            raise ValueError(
                f"need step >= 0 and 0 <= start < stop <= {self.rows}; got step={step}, start={start}, stop={stop}."
            )
        epoch, within = divmod(step, self.batches)
        whole = self._order(epoch)[within]
        items = whole[start:stop]
        # Padded as the whole batch is: a model without an attention mask would otherwise see other padding in a part.
        width = None if self.labels is None else max(len(self.labels[item]) for item in whole)
        batch = collate(
            [self.clips[item] for item in items],
            self.frames,
            rows=step * self.rows + np.arange(start, stop),
            masking=self.masking,
            seed=self.seed,
            samples=int(self._lengths[whole].max()),
            labels=None if self.labels is None else [self.labels[item] for item in items],
            label_width=width,
        )
        return batch | {"step": torch.full((stop - start,), step)}
