"""Denoising examples for encoder-decoders and decoders, made row by row from a mixture of corruptions.

    input = mode, row with each span replaced by a sentinel, EOS      target = sentinel, span, sentinel, span, ..., EOS

A suffix has no sentinel: the input ends where the target begins. An encoder-decoder gets input and target apart, a
decoder gets them in one sequence, with the loss on the target only.

Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
    arXiv:1910.10683, figures 2 and 4; the mixture: Tay et al., "UL2", arXiv:2205.05131, section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwater.core.recipe import Name, Spec
from headwater.core.rng import derive_seed, hash_uniform
from headwater.modalities.text.corruption import Corruption, SpanCorruption, SuffixCorruption, closed_rows, to_sentinels
from headwater.modalities.text.masks import attention_mask_for

__all__ = ["MODE_TOKENS", "Denoiser", "Layout", "MixtureOfDenoisers", "prefix_mask"]

Layout = Literal["encoder_decoder", "prefix_decoder", "causal_decoder"]
MODE_TOKENS: Mapping[str, str] = {"R": "[R]", "S": "[S]", "X": "[X]"}
"""Regular, sequential and extreme denoising; the released UL2 checkpoints call them [NLU], [S2S] and [NLG]."""
MIN_ROW = 8
IGNORED = -100


class Denoiser(Spec):
    """One way of corrupting a row, and the mode that announces it."""

    mode: Name = Field(description="name of the mode, a key of mode_tokens")
    corruption: Corruption = Field(description="what is taken out")


class MixtureOfDenoisers:
    """Collator: rows of tokens to denoising examples. What happens to a row depends on (seed, row) alone.

    Rows are padded to the widest that ``input_length`` allows, so every batch has one shape. Rows of one length are
    the fast case; rows of many lengths are grouped by length.

    Args:
        tokenizer: with EOS and pad token, sentinels and mode tokens (``prepare_tokenizer`` adds them).
        denoisers: what rows draw from.
        weights: probability of each, normalised; equal by default.
        layout: ``encoder_decoder``: inputs and labels apart. ``prefix_decoder``: one sequence whose input part is seen
            by all. ``causal_decoder``: one sequence, causal. The loss is on targets only in all three.
        input_length: tokens of the longest row that comes in, before corruption; >= 8.
        target_length: tokens of the longest target; by default what the denoisers need.
        sentinels: ids; by default ``<extra_id_0>``, ``<extra_id_1>``, ... of the tokenizer.
        mode_tokens: mode -> token; None leaves modes away.
        overflow: ``truncate`` cuts targets that exceed ``target_length`` (EOS stays) and counts them.
        model: a decoder, for ``prefix_decoder``: the batch then holds its four-dimensional ``attention_mask`` instead
            of ``prefix_lengths``.
        return_denoiser: add ``denoiser`` ``(B,)``, the index of each row's denoiser; plain models do not take it.
        seed: of all draws.

    Attributes:
        dropped: rows of fewer than 8 tokens, left out by this object so far.
        truncated: targets cut so far.
        shape: (positions of the inputs, of the labels); equal in a decoder.

    Raises:
        ValueError: at construction, whatever would fail or be cut later; see ``__call__`` for the rest.

    Example:
        >>> from headwater.modalities.text.tokenizers import train_bpe
        >>> tokenizer = train_bpe(["some text"], 300)
        >>> _ = tokenizer.add_tokens(["[R]", "<extra_id_0>"], special_tokens=True)
        >>> spans = Denoiser(mode="R", corruption=SpanCorruption(mean_span=3, rate=0.15))
        >>> collator = MixtureOfDenoisers(tokenizer, [spans], input_length=16)
        >>> batch = collator([{"input_ids": list(range(40, 56)), "row": 0}])
        >>> tokenizer.decode(next(iter(batch["input_ids"]))).startswith("[R]")
        True
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        denoisers: Sequence[Denoiser],
        weights: Sequence[float] | None = None,
        layout: Layout = "encoder_decoder",
        input_length: int = 512,
        target_length: int | None = None,
        sentinels: Sequence[int] | None = None,
        mode_tokens: Mapping[str, str] | None = MODE_TOKENS,
        *,
        overflow: Literal["raise", "truncate"] = "raise",
        model: PreTrainedModel | None = None,
        return_denoiser: bool = False,
        seed: int = 0,
    ) -> None:
        if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
            raise ValueError("denoising needs a pad and an EOS token; set tokenizer.pad_token and tokenizer.eos_token.")
        if input_length < MIN_ROW:
            raise ValueError(f"input_length must be at least {MIN_ROW}; got {input_length}.")
        if model is not None and layout != "prefix_decoder":
            raise ValueError(f"only the layout 'prefix_decoder' needs a model for its mask; got {layout!r}.")
        if layout not in ("encoder_decoder", "prefix_decoder", "causal_decoder"):
            raise ValueError(f"unknown layout {layout!r}.")
        self.denoisers, self.layout, self.input_length, self.model = tuple(denoisers), layout, input_length, model
        self._cumulative = _cumulative(weights, len(self.denoisers))
        # The place of each denoiser when rows are sorted by it, suffixes last: what is alike is then a slice.
        suffix = [isinstance(denoiser.corruption, SuffixCorruption) for denoiser in self.denoisers]
        self._place = np.argsort(np.argsort(suffix, kind="stable"))
        self._num_spans = suffix.count(False)
        self.eos, self.pad = int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)
        self.modes = _mode_ids(tokenizer, self.denoisers, mode_tokens)
        vocabulary = tokenizer.get_vocab()
        if sentinels is None:
            sentinels = [vocabulary[f"<extra_id_{i}>"] for i in range(_num_sentinels(vocabulary))]
        self.sentinels = np.asarray(sentinels, dtype=np.int32)
        used = [
            d.corruption.most(input_length) for d, share in zip(self.denoisers, self._shares(), strict=True) if share
        ]
        if (needed := max(spans for *_, spans in used)) > len(self.sentinels):
            raise ValueError(
                f"rows of {input_length} tokens need {needed} sentinels; there are {len(self.sentinels)}. "
                f"prepare_tokenizer(tokenizer, model, n_sentinels={needed}) adds them."
            )
        head = 0 if self.modes is None else 1
        longest = max(noise + spans + 1 for _, noise, spans in used)
        if target_length is not None and target_length < longest and overflow == "raise":
            raise ValueError(
                f"target_length {target_length} is too short: rows of {input_length} tokens have targets of up to "
                f"{longest}. Raise it, shorten the rows, or set overflow='truncate'."
            )
        self.target_length = min(longest, target_length or longest)
        self._widths = (head + max(kept + spans + 1 for kept, _, spans in used), self.target_length)
        both = head + input_length + 2 * needed + 2  # what is taken out of the input stands in the target
        self.shape = self._widths if layout == "encoder_decoder" else (min(both, sum(self._widths)),) * 2
        self.return_denoiser, self.seed = return_denoiser, seed
        self.dropped = self.truncated = 0

    def _shares(self) -> NDArray[np.float64]:
        return np.diff(self._cumulative, prepend=0.0)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:  # Any: lists, arrays or tensors
        """Make a batch.

        Args:
            features: each with ``input_ids``, up to ``input_length`` tokens, and ``row``, an integer that names it for
                good. Rows of fewer than 8 tokens are left out and counted in ``dropped``.

        Returns:
            ``input_ids``, ``labels`` (-100 where nothing is predicted; not shifted), both int64 of ``shape``, and
            ``attention_mask``; decoders get ``position_ids`` as well.

        Raises:
            ValueError: a feature has no ``row``, a row is longer than ``input_length``, or none is long enough.
        """
        ids, rows = self._read(features)
        lengths = np.array([len(row) for row in ids])
        kind = self.choose(rows)
        made = _Examples.empty(len(ids), self._widths, self.pad)
        for length in np.unique(lengths):
            here = np.flatnonzero(lengths == length)
            here = here[np.argsort(self._place[kind[here]], kind="stable")]
            starts = np.searchsorted(self._place[kind[here]], np.arange(len(self.denoisers) + 1))
            block = np.concatenate([ids[i] for i in here], dtype=np.int32, casting="same_kind").reshape(-1, length)
            u = hash_uniform(derive_seed(self.seed, "corruption"), rows[here], int(length))
            mask = np.empty(u.shape, dtype=np.bool_)
            for denoiser, place in zip(self.denoisers, self._place, strict=True):
                part = slice(starts[place], starts[place + 1])
                if part.start < part.stop:
                    mask[part] = denoiser.corruption.mask(u[part])
            spans = starts[self._num_spans]
            for suffix, part in ((False, slice(spans)), (True, slice(spans, None))):
                if len(here[part]):
                    self._write(made, here[part], block[part], mask[part], suffix=suffix)
        if self.modes is not None:
            made.inputs[:, 0] = np.array([self.modes[denoiser.mode] for denoiser in self.denoisers])[kind]
        batch = self._batch(made, made.labels(), self.shape[0])
        if self.return_denoiser:
            batch["denoiser"] = torch.from_numpy(kind)
        return batch

    def choose(self, rows: ArrayLike) -> NDArray[np.int64]:
        """Return the index of the denoiser that each row draws, ``(B,)``."""
        if len(self.denoisers) == 1:
            return np.zeros(len(np.asarray(rows)), dtype=np.int64)
        u = hash_uniform(derive_seed(self.seed, "denoiser"), rows, 1)[:, 0]
        return np.searchsorted(self._cumulative, u, side="right").astype(np.int64)

    def ask(
        self,
        ids: NDArray[np.int64],
        mask: NDArray[np.bool_],
        corruption: Corruption,
        *,
        decoder_start: int | None = None,
    ) -> dict[str, Tensor]:
        """Format a probe: predict exactly the tokens under ``mask``, in the mode nearest to ``corruption``.

        A suffix is asked as S if the mixture has such a denoiser, otherwise as one span. Sentinels and EOS carry no
        loss.

        Args:
            ids: windows of one length, ``(B, T)``, T up to ``input_length``.
            mask: what is taken out, same shape.
            corruption: what drew ``mask``.
            decoder_start: of an encoder-decoder; its pad token by default, as T5 has it.
        """
        near = min(self.denoisers, key=lambda denoiser: _distance(denoiser.corruption, corruption))
        if isinstance(near.corruption, SuffixCorruption) and not isinstance(corruption, SuffixCorruption):
            near = Denoiser(mode=near.mode, corruption=corruption)  # spans need sentinels, whatever was trained
        noise = int(mask.sum(axis=1).max(initial=0))
        made = _Examples.empty(len(ids), (ids.shape[1] + 2, 2 * noise + 1), self.pad)
        suffix = isinstance(near.corruption, SuffixCorruption)
        self._write(made, np.arange(len(ids)), ids, mask, suffix=suffix, limit=made.targets.shape[1])
        if self.modes is not None:
            made.inputs[:, 0] = self.modes[near.mode]
        made = made.trimmed()
        place = np.arange(made.targets.shape[1])
        content = (place < made.target_lengths[:, None] - 1) & ~np.isin(made.targets, self.sentinels)
        batch = self._batch(made, np.where(content, made.targets, IGNORED), int(made.total_lengths.max(initial=0)))
        if self.layout == "encoder_decoder":  # labels with gaps do not tell a model what its decoder read
            start = self.pad if decoder_start is None else decoder_start
            shifted = np.concatenate([np.full((len(ids), 1), start), made.targets[:, :-1]], axis=1)
            batch["decoder_input_ids"] = torch.from_numpy(shifted.astype(np.int64))
        return batch

    def _read(self, features: Sequence[Mapping[str, Any]]) -> tuple[list[NDArray[np.integer]], NDArray[np.int64]]:
        if features and any("row" not in feature for feature in features):
            raise ValueError(
                "a feature has no 'row', by which its corruption is drawn. Wrap the data set in "
                "headwater.pretrain.base.with_rows(dataset); in transformers.Trainer set remove_unused_columns=False."
            )
        kept = [(np.asarray(f["input_ids"]), int(f["row"])) for f in features]
        kept = [(ids, row) for ids, row in kept if len(ids) >= MIN_ROW]
        self.dropped += len(features) - len(kept)
        if features and not kept:
            raise ValueError(f"all {len(features)} rows are shorter than {MIN_ROW} tokens; pack documents into blocks.")
        longest = max((len(ids) for ids, _ in kept), default=0)
        if longest > self.input_length:
            raise ValueError(f"a row has {longest} tokens, more than input_length {self.input_length}; raise it.")
        return [ids for ids, _ in kept], np.array([row for _, row in kept], dtype=np.int64)

    def _write(
        self,
        made: _Examples,
        rows: NDArray[np.int64],
        ids: NDArray[np.integer],
        mask: NDArray[np.bool_],
        *,
        suffix: bool,
        limit: int | None = None,
    ) -> None:
        """Corrupt rows of one length, into their places among the examples, with room for the mode in front."""
        if suffix:
            inputs, input_lengths = closed_rows(ids, ~mask, self.eos, self.pad)
            targets, target_lengths = closed_rows(ids, mask, self.eos, self.pad)
        else:
            inputs, input_lengths, targets, target_lengths = to_sentinels(ids, mask, self.sentinels, self.eos, self.pad)
        head = 0 if self.modes is None else 1
        made.inputs[rows, head : head + inputs.shape[1]] = inputs
        made.input_lengths[rows] = head + input_lengths
        limit = limit or self.target_length
        over = target_lengths > limit
        if over.any():
            self.truncated += int(over.sum())
            targets, target_lengths = targets[:, :limit], np.minimum(target_lengths, limit)
            targets[over, -1] = self.eos
        made.targets[rows, : targets.shape[1]] = targets
        made.target_lengths[rows] = target_lengths

    def _batch(self, made: _Examples, labels: NDArray[np.integer], width: int) -> dict[str, Tensor]:
        """Lay examples out; ``width`` is that of a decoder's sequence."""
        if self.layout == "encoder_decoder":
            real = np.arange(made.inputs.shape[1]) < made.input_lengths[:, None]
            return _tensors(input_ids=made.inputs, attention_mask=real, labels=labels)
        place = np.arange(width)
        total = made.total_lengths[:, None]
        in_input = place < made.input_lengths[:, None]
        in_target = ~in_input & (place < total)
        ids = np.full(in_input.shape, self.pad)
        aligned = np.full(in_input.shape, IGNORED)
        ids[in_input], ids[in_target] = made.inputs[made.real_inputs()], made.targets[made.real_targets()]
        aligned[in_target] = labels[made.real_targets()]
        batch = _tensors(input_ids=ids, labels=aligned, position_ids=np.broadcast_to(place, ids.shape))
        if self.layout == "causal_decoder":
            return batch | _tensors(attention_mask=place < total)
        prefix = torch.from_numpy(made.input_lengths.astype(np.int64))
        if self.model is None:
            return batch | {"prefix_lengths": prefix}
        return batch | {"attention_mask": prefix_mask(self.model, prefix, batch["input_ids"])}


def prefix_mask(model: PreTrainedModel, prefix_lengths: Tensor, input_ids: Tensor) -> Tensor:
    """``attention_mask_for`` of sequences padded on the right, where causality alone hides the padding."""
    return attention_mask_for(model, "prefix", prefix_lengths=prefix_lengths, padding=torch.ones_like(input_ids))


@dataclass
class _Examples:
    """Corrupted rows before they are laid out; both matrices are padded."""

    inputs: NDArray[np.int64]
    input_lengths: NDArray[np.int64]
    targets: NDArray[np.int64]
    target_lengths: NDArray[np.int64]

    @classmethod
    def empty(cls, rows: int, widths: tuple[int, int], pad: int) -> _Examples:
        inputs, targets = (np.full((rows, width), pad, dtype=np.int64) for width in widths)
        return cls(inputs, np.zeros(rows, dtype=np.int64), targets, np.zeros(rows, dtype=np.int64))

    @property
    def total_lengths(self) -> NDArray[np.int64]:
        return self.input_lengths + self.target_lengths

    def real_inputs(self) -> NDArray[np.bool_]:
        return np.arange(self.inputs.shape[1]) < self.input_lengths[:, None]

    def real_targets(self) -> NDArray[np.bool_]:
        return np.arange(self.targets.shape[1]) < self.target_lengths[:, None]

    def labels(self) -> NDArray[np.int64]:
        return np.where(self.real_targets(), self.targets, IGNORED)

    def trimmed(self) -> _Examples:
        widths = int(self.input_lengths.max(initial=0)), int(self.target_lengths.max(initial=0))
        return _Examples(
            self.inputs[:, : widths[0]], self.input_lengths, self.targets[:, : widths[1]], self.target_lengths
        )


def _tensors(**arrays: NDArray[Any]) -> dict[str, Tensor]:  # Any: integers or booleans
    return {name: torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)) for name, array in arrays.items()}


def _cumulative(weights: Sequence[float] | None, count: int) -> NDArray[np.float64]:
    shares = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
    if shares.shape != (count,) or not count or not np.isfinite(shares).all() or shares.min() < 0 or shares.sum() == 0:
        raise ValueError(f"there must be one weight >= 0 per denoiser ({count}), not all 0; got {weights}.")
    cumulative: NDArray[np.float64] = shares.cumsum() / shares.cumsum()[-1]
    return cumulative


def _mode_ids(
    tokenizer: PreTrainedTokenizerBase, denoisers: Sequence[Denoiser], mode_tokens: Mapping[str, str] | None
) -> dict[str, int] | None:
    if mode_tokens is None:
        return None
    found = {}
    for mode in dict.fromkeys(denoiser.mode for denoiser in denoisers):
        if mode not in mode_tokens:
            raise ValueError(f"mode {mode!r} has no token; mode_tokens names {', '.join(mode_tokens)}.")
        ids = tokenizer(mode_tokens[mode], add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"the mode token {mode_tokens[mode]!r} must be one token; the tokenizer makes {ids} of it. "
                "Call prepare_tokenizer first."
            )
        found[mode] = int(ids[0])
    return found


def _num_sentinels(vocabulary: Mapping[str, int]) -> int:
    count = 0
    while f"<extra_id_{count}>" in vocabulary:
        count += 1
    return count


def _distance(have: Corruption, asked: Corruption) -> tuple[bool, float, float]:
    """How unlike two corruptions are: another kind first, then the length of spans, then the rate."""
    both_spans = isinstance(have, SpanCorruption) and isinstance(asked, SpanCorruption)
    lengths = abs(np.log(have.mean_span / asked.mean_span)) if both_spans else 0.0  # type: ignore[union-attr]
    return have.kind != asked.kind, float(lengths), abs(have.rate - asked.rate)
