"""(b) How fast are corrupted rows made: span corruption against the same row by row, whole-word masks against a peer.

    python -m benchmarks.collators

The peer is what training scripts usually carry: for each row draw the lengths of kept and noise spans as random
segmentations, put a sentinel for each span, close with EOS; then pad the batch (the description of Raffel et al.,
arXiv:1910.10683, section 3.1.4 and figure 2), with numpy inside a row. For UL2 it draws a setting per row. Both sides
start from ``{"input_ids": array, "row": int}`` and end with padded tensors; tokens are those that come in.

For whole words the peer is ``transformers.DataCollatorForLanguageModeling(whole_word_mask=True)``, which gathers words
from offsets, row by row in Python, and replaces every target by the mask token; it is given lists, as a data set gives
them, with the mask of special tokens made beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from benchmarks.harness import Bound, alternate, report
from headwater.modalities.text.corruption import SpanCorruption, SuffixCorruption, span_counts, to_sentinels
from headwater.modalities.text.denoising import Denoiser, MixtureOfDenoisers
from headwater.modalities.text.tokenizers import train_bpe
from headwater.modalities.text.whole_words import WholeWordMasker
from headwater.pretrain.ul2 import MODE_TOKENS, UL2_DENOISERS, prepare_tokenizer, t5_denoisers

ROWS, LENGTH, BATCHES = 256, 512, 4
FAST = 60e6  # tokens per second
WORD_ROWS, WORD_LENGTH = 8192, 128
Ids = NDArray[np.int64]


class RowByRow:
    """Denoising examples, one row after the other."""

    def __init__(self, tokenizer: Any, denoisers: Sequence[Denoiser], modes: bool) -> None:
        self.denoisers, self.rng = denoisers, np.random.default_rng(0)
        self.sentinels = np.array(tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(128)]))
        self.modes = {m: tokenizer.convert_tokens_to_ids(token) for m, token in MODE_TOKENS.items()} if modes else {}
        self.eos, self.pad = tokenizer.eos_token_id, tokenizer.pad_token_id

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        inputs, labels = [], []
        for feature in features:
            denoiser = self.denoisers[self.rng.integers(len(self.denoisers))]
            source, target = self.example(np.asarray(feature["input_ids"]), denoiser.corruption)
            if self.modes:
                source = np.concatenate([[self.modes[denoiser.mode]], source])
            inputs.append(torch.from_numpy(source))
            labels.append(torch.from_numpy(target))
        input_ids = torch.nn.utils.rnn.pad_sequence(inputs, True, self.pad)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in inputs], True, 0)
        labels_ = torch.nn.utils.rnn.pad_sequence(labels, True, -100)
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels_}

    def example(self, ids: Ids, corruption: SpanCorruption | SuffixCorruption) -> tuple[Ids, Ids]:
        if isinstance(corruption, SuffixCorruption):
            cut = len(ids) - self.rng.integers(1, round(2 * corruption.rate * len(ids)) + 1)
            return np.append(ids[:cut], self.eos), np.append(ids[cut:], self.eos)
        mask = self.noise_mask(len(ids), corruption.mean_span, corruption.rate)
        return self.replaced(ids, mask), self.replaced(ids, ~mask)

    def noise_mask(self, length: int, mean_span: float, rate: float) -> NDArray[np.bool_]:
        noise = min(max(round(length * rate), 1), length - 1)
        spans = max(round(noise / mean_span), 1)
        lengths = np.stack([self.segments(length - noise, spans), self.segments(noise, spans)], axis=1).reshape(-1)
        return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)

    def segments(self, items: int, parts: int) -> Ids:
        starts = np.arange(items - 1) < parts - 1
        self.rng.shuffle(starts)
        return np.bincount(np.concatenate([[0], starts.cumsum()]))

    def replaced(self, ids: Ids, mask: NDArray[np.bool_]) -> Ids:
        """Each run under ``mask`` as one sentinel, and EOS."""
        starts = mask & ~np.concatenate([[False], mask[:-1]])
        marked = np.where(starts, self.sentinels[starts.cumsum() - 1], ids)
        return np.append(marked[~mask | starts], self.eos)


def restored(batch: dict[str, torch.Tensor], sentinels: set[int], others: set[int]) -> list[list[int]]:
    """The rows as they came in: what follows a sentinel in the target, in its place in the input."""
    rows = []
    for source, target in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        spans: dict[int, list[int]] = {-1: []}
        last = -1
        for token in (token for token in target if token >= 0 and token not in others):
            last = token if token in sentinels else last
            spans.setdefault(last, []).extend([token] * (token not in sentinels))
        row = [token for token in source if token not in others]
        rows.append([t for token in row for t in (spans[token] if token in sentinels else [token])] + spans[-1])
    return rows


def check(ours: MixtureOfDenoisers, peer: RowByRow, features: list[dict[str, Any]]) -> None:
    """Every example of both sides gives back its row; of equal spans both make equal examples."""
    sentinels = set(peer.sentinels.tolist())
    others = {peer.eos, peer.pad, *peer.modes.values()}
    expected = [feature["input_ids"].tolist() for feature in features]
    for side in (ours, peer):
        assert restored(side(features), sentinels, others) == expected, f"{side} loses tokens"
    ids = np.stack([feature["input_ids"] for feature in features])
    for corruption in (d.corruption for d in ours.denoisers if isinstance(d.corruption, SpanCorruption)):
        masks = np.stack([peer.noise_mask(LENGTH, corruption.mean_span, corruption.rate) for _ in features])
        assert set(masks.sum(1)) == {span_counts(LENGTH, corruption.mean_span, corruption.rate)[0]}
        inputs, _, targets, _ = to_sentinels(ids, masks, ours.sentinels, ours.eos, ours.pad)
        for row, mask, source, target in zip(ids, masks, inputs, targets, strict=True):
            assert np.array_equal(source, peer.replaced(row, mask))
            assert np.array_equal(target, peer.replaced(row, ~mask))


def word_sides() -> dict[str, tuple[Any, list[dict[str, Any]]]]:
    """Both collators of whole words and what each reads: the same tokens, of words of one to four of them."""
    special = ["[PAD]", "[UNK]", "[SEP]", "[MASK]"]
    vocabulary = [*special, *(f"w{i}" for i in range(500)), *(f"##w{i}" for i in range(500))]
    backend = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", sep_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]"
    )
    rng = np.random.default_rng(2)
    begins = rng.random((WORD_ROWS, WORD_LENGTH)) < 0.6
    begins[:, 0] = True
    ids = rng.integers(0, 500, begins.shape) + np.where(begins, 4, 504)
    places = np.arange(WORD_LENGTH) + begins.cumsum(1)  # a gap of one character before each word
    offsets = np.stack([places, places + 1], axis=2)
    ours = WholeWordMasker(tokenizer)
    peer = DataCollatorForLanguageModeling(
        tokenizer, whole_word_mask=True, mask_replace_prob=1.0, random_replace_prob=0.0, seed=0
    )
    read = {
        "ours": [{"input_ids": row, "row": i} for i, row in enumerate(ids)],
        "peer": [
            {"input_ids": row, "offset_mapping": spans, "special_tokens_mask": [0] * WORD_LENGTH}
            for row, spans in zip(ids.tolist(), offsets.tolist(), strict=True)
        ],
    }
    word = np.arange(WORD_ROWS)[:, None] * WORD_LENGTH + begins.cumsum(1) - 1
    for side, collator in (("ours", ours), ("peer", peer)):
        target = collator(read[side])["labels"].numpy() != -100
        sizes, hit = np.bincount(word.ravel()), np.bincount(word.ravel(), target.ravel())
        assert ((hit == 0) | (hit == sizes)).all(), f"{side} cuts words"
        assert abs(target.mean() - 0.15) < 0.005, f"{side} masks {target.mean():.3f} of the tokens"
    return {"ours": (ours, read["ours"]), "peer": (peer, read["peer"])}


def main() -> None:
    torch.set_num_threads(1)
    tokenizer = train_bpe(["some text to learn a few merges from"], 300)
    prepare_tokenizer(tokenizer, None, n_sentinels=128)
    ids = np.random.default_rng(1).integers(4, 260, (BATCHES, ROWS, LENGTH))
    batches = [[{"input_ids": ids[b, r], "row": b * ROWS + r} for r in range(ROWS)] for b in range(BATCHES)]
    sides: dict[str, Any] = {}
    for name, denoisers, modes in (("span", t5_denoisers(), None), ("ul2", UL2_DENOISERS, MODE_TOKENS)):
        ours = MixtureOfDenoisers(tokenizer, denoisers, input_length=LENGTH, mode_tokens=modes)
        peer = RowByRow(tokenizer, denoisers, modes is not None)
        check(ours, peer, batches[0])
        sides |= {f"{name}, ours": ours, f"{name}, row by row": peer}
    # Once a process has freed a large block, as every training step does, the allocator keeps memory instead of giving
    # it back and faulting it in again: without this, page faults double the time of whichever side makes arrays.
    block = np.ones(1 << 21)
    del block
    works = {name: lambda side=side: [side(batch) for batch in batches] for name, side in sides.items()}
    seconds = alternate(works, repeats=8)
    masking = {
        f"whole words, {side}": lambda collator=collator, read=read: collator(read)
        for side, (collator, read) in word_sides().items()
    }
    seconds |= alternate(masking)
    ratios, speeds = {}, {}
    for name in ("span", "ul2"):
        speeds[name] = ids.size / seconds[f"{name}, ours"]
        ratios[name] = (seconds[f"{name}, row by row"] / seconds[f"{name}, ours"], Bound("higher", floor=10))
        ratios[f"{name}, tokens/s over 60e6"] = (speeds[name] / FAST, Bound("higher", None, 1))
    ratios["whole words"] = (seconds["whole words, peer"] / seconds["whole words, ours"], Bound("higher", floor=20))
    report(
        "How much faster are corrupted rows made by the batch than row by row?",
        ratios,
        seconds=seconds,
        checked="every example of both sides gives back its row; of the same spans both make the same example; "
        "both mask words whole, and as many tokens",
        notes={
            "tokens_per_second": {name: round(speed) for name, speed in speeds.items()},
            "work": f"{BATCHES} batches of {ROWS} x {LENGTH} tokens; {WORD_ROWS} x {WORD_LENGTH} for whole words",
            "time": "processor seconds, one thread",
        },
    )


if __name__ == "__main__":
    main()
