"""Sources and the targets that answer them: tokens, an endless stream of batches, and greedy or beam answers.

    seq2seq   the encoder reads the source, the decoder writes target EOS
    causal    BOS source target EOS, of which target EOS is predicted

A target begins where the source ends: under a causal model, a space between them is put before the target. Either side
that is too long for its share of the positions is cut: a source at the end, or before a causal target at its beginning,
since the answer follows the end; a target at the end, and it then has no EOS.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from headwater.core.lora import LoraSpec, add_lora
from headwater.core.order import VirtualIndex
from headwater.core.recipe import ModelRef
from headwater.core.rng import derive_seed
from headwater.modalities.models import ModelError, head_of, load_model, load_tokenizer
from headwater.modalities.text.class_inputs import length_batches
from headwater.modalities.text.document_store import text_digest
from headwater.modalities.text.objectives import IGNORED, CausalObjective, TokenObjective
from headwater.modalities.text.score import scoring, start_token

__all__ = ["Encoded", "PairModel", "PairStream", "Pairs", "open_pair_model", "pad_pairs", "source_digest"]

Kind = Literal["causal", "seq2seq"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Texts and the one right answer to each.

    Attributes:
        sources: ``(n,)``.
        targets: ``(n,)``.
    """

    sources: Sequence[str]
    targets: Sequence[str]

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.targets):
            raise ValueError(f"every source needs a target; got {len(self.sources)} and {len(self.targets)}.")

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def fingerprint(self) -> str:
        """Of all texts, in order."""
        return hashlib.sha256(json.dumps([list(self.sources), list(self.targets)]).encode()).hexdigest()


def source_digest(source: str) -> str:
    """Hex digits that two sources share where they are the same text, case and white space aside."""
    return text_digest(" ".join(source.split()).casefold()).hex()


@dataclass(frozen=True)
class Encoded:
    """One pair in tokens.

    Attributes:
        source: what is read; under a causal model with its BOS.
        target: what is to be written, with its EOS where it was not cut.
    """

    source: list[int]
    target: list[int]


def pad_pairs(pairs: Sequence[Encoded], kind: Kind, pad: int) -> dict[str, Tensor]:
    """Pairs as a batch, padded on the right.

    Returns:
        ``input_ids`` and ``attention_mask`` ``(batch, time)``, and ``labels``, -100 where nothing is predicted: of the
        same shape under a causal model, ``(batch, target time)`` for an encoder-decoder.
    """
    whole = kind == "causal"
    rows = [[*pair.source, *pair.target] if whole else pair.source for pair in pairs]
    labels = [[IGNORED] * len(pair.source) + pair.target if whole else pair.target for pair in pairs]
    return {
        "input_ids": _padded(rows, pad),
        "attention_mask": _padded([[1] * len(row) for row in rows], 0),
        "labels": _padded(labels, IGNORED),
    }


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value
    )


class PairStream:
    """Batches of pairs in an order that is shuffled anew in every epoch; a ``BatchStream``.

    Args:
        pairs: in tokens.
        kind: of the model that reads them.
        rows: per batch; fewer where there are fewer pairs.
        seed: of the order.
        pad: padding token.

    Raises:
        ValueError: no pair, or a pair without a target token.
    """

    def __init__(self, pairs: Sequence[Encoded], kind: Kind, *, rows: int, seed: int, pad: int) -> None:
        if not pairs:
            raise ValueError("there is no pair to learn from.")
        if empty := [row for row, pair in enumerate(pairs) if not pair.target]:
            raise ValueError(f"pair {empty[0]} has a target without a token; leave it out.")
        self.pairs, self.kind, self.rows, self._pad = pairs, kind, min(rows, len(pairs)), pad
        self.order = VirtualIndex(len(pairs), derive_seed(seed, "order"))
        self.tokens_per_row = math.ceil(sum(len(p.source) + len(p.target) for p in pairs) / len(pairs))
        about = [kind, self.rows, seed, [(pair.source, pair.target) for pair in pairs]]
        self.fingerprint = hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Rows [start, stop) of batch ``step``: as ``pad_pairs`` gives them, and ``row`` ``(batch,)``."""
        _, items = self.order(step * self.rows + np.arange(start, self.rows if stop is None else stop))
        batch = pad_pairs([self.pairs[item] for item in items], self.kind, self._pad)
        return {**batch, "row": torch.from_numpy(items)}


@dataclass(eq=False)
class PairModel:
    """A language model that is asked for targets.

    Attributes:
        model: a causal or encoder-decoder model of Hugging Face, in PEFT where there are adapters.
        tokenizer: its own, padding on the right.
        kind: which of the two.
        max_source, max_target: tokens of each side, special ones included.
        join: stands between source and target under a causal model, and belongs to the target.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    kind: Kind
    max_source: int
    max_target: int
    join: str = " "

    @property
    def pad(self) -> int:
        """The padding token."""
        return int(self.tokenizer.pad_token_id)

    @property
    def objective(self) -> CausalObjective | TokenObjective:
        """Cross-entropy of the target's tokens."""
        return CausalObjective() if self.kind == "causal" else TokenObjective()

    def encode(self, pairs: Pairs) -> list[Encoded]:
        """Tokens of pairs; see the module for what is cut."""
        sides = zip(self.encode_sources(pairs.sources), self.encode_targets(pairs.targets), strict=True)
        return [Encoded(source, target) for source, target in sides]

    def encode_targets(self, targets: Sequence[str]) -> list[list[int]]:
        """Tokens of targets alone, as they follow a source."""
        if not targets:
            return []
        if self.kind == "seq2seq":
            found: list[list[int]] = self.tokenizer(
                text_target=list(targets), truncation=True, max_length=self.max_target
            )["input_ids"]
            return found
        joined = [self.join + target for target in targets]
        rows = self.tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]
        return [[*row, self.tokenizer.eos_token_id][: self.max_target] for row in rows]

    def encode_sources(self, sources: Sequence[str]) -> list[list[int]]:
        """Tokens of sources alone."""
        if not sources:  # which a tokenizer refuses
            return []
        if self.kind == "seq2seq":
            found: list[list[int]] = self.tokenizer(list(sources), truncation=True, max_length=self.max_source)[
                "input_ids"
            ]
            return found
        start = start_token(self.tokenizer)
        rows = self.tokenizer(list(sources), add_special_tokens=False, verbose=False)["input_ids"]
        return [[start, *row[max(0, len(row) + 1 - self.max_source) :]] for row in rows]

    def stream(self, pairs: Pairs, *, rows: int, seed: int) -> PairStream:
        """Batches of pairs to learn from."""
        return PairStream(self.encode(pairs), self.kind, rows=rows, seed=seed, pad=self.pad)

    def answers(self, sources: Sequence[str], *, num_beams: int = 1, batch_size: int = 64) -> list[str]:
        """What the model writes after each source, special tokens and surrounding space left out.

        Args:
            sources: none is fine.
            num_beams: 1 is greedy.
            batch_size: sources per call; only sources of one length share a batch, so padding is never read.
        """
        return self.written(self.encode_sources(sources), num_beams=num_beams, batch_size=batch_size)

    def written(self, encoded: Sequence[Sequence[int]], *, num_beams: int = 1, batch_size: int = 64) -> list[str]:
        """``answers`` to sources in tokens."""
        written: list[str] = [""] * len(encoded)
        model: Any = self.model  # Any: generate is not declared on nn.Module
        with scoring(model) as device:
            for rows in _equal_lengths([len(ids) for ids in encoded], batch_size):
                ids = torch.tensor([list(encoded[row]) for row in rows], device=device)
                output = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=self.max_target,
                    num_beams=num_beams,
                    do_sample=False,
                    pad_token_id=self.pad,
                    eos_token_id=self.tokenizer.eos_token_id,
                )
                begin = ids.shape[1] if self.kind == "causal" else 0
                texts = self.tokenizer.batch_decode(output[:, begin:], skip_special_tokens=True)
                for row, text in zip(rows, texts, strict=True):
                    written[row] = text.strip()
        return written

    def nats(self, pairs: Pairs, *, batch_size: int = 64) -> NDArray[np.float64]:
        """Negative log-likelihood of each target per token of it, EOS included, ``(n,)``."""
        encoded = self.encode(pairs)
        found = np.zeros(len(encoded))
        with scoring(self.model) as device:
            for rows in length_batches([len(pair.source) for pair in encoded], batch_size) if encoded else []:
                batch = pad_pairs([encoded[row] for row in rows], self.kind, self.pad)
                found[rows] = self._nats({name: tensor.to(device) for name, tensor in batch.items()})
        return found

    def _nats(self, batch: dict[str, Tensor]) -> NDArray[np.float64]:
        labels = batch["labels"]
        if self.kind == "causal":
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            logits, labels = logits[:, : -1 or None], labels[:, 1:]
            logits = logits[:, -labels.shape[1] :]  # soft prompts stand before the tokens
        else:
            logits = self.model(**batch).logits
        nats = nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        ).sum(1)
        found: NDArray[np.float64] = (nats / (labels != IGNORED).sum(1)).double().cpu().numpy()
        return found

    def save_pretrained(self, directory: Path) -> None:
        """Weights, or adapters, and tokenizer as transformers and PEFT open them."""
        self.model.save_pretrained(directory)  # type: ignore[operator]  # every Hugging Face and PEFT model has it
        self.tokenizer.save_pretrained(directory)


def _equal_lengths(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows of one length together, the longest first."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(length, []).append(row)
    return [
        group[begin : begin + batch_size]
        for _, group in sorted(groups.items(), reverse=True)
        for begin in range(0, len(group), batch_size)
    ]


def open_pair_model(
    ref: ModelRef,
    *,
    max_source: int = 512,
    max_target: int = 64,
    join: str = " ",
    lora: LoraSpec | None = None,
    seed: int = 0,
) -> PairModel:
    """A fresh copy of a causal or encoder-decoder language model.

    Args:
        ref: the model.
        max_source: tokens of a source; fewer where the model has fewer positions.
        max_target: tokens of a target.
        join: see ``PairModel``.
        lora: adapters; the model's own weights are then frozen.
        seed: of the adapters.

    Raises:
        ModelError: the model is of another kind, has no EOS token, or positions for less than a target and one token.
    """
    kind = head_of(ref)
    if kind not in ("causal", "seq2seq"):
        raise ModelError(
            f"model {ref.name!r} is a {kind} model; targets are written by AutoModelForCausalLM or "
            "AutoModelForSeq2SeqLM."
        )
    model, tokenizer = load_model(ref, kind), load_tokenizer(ref)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {ref.name!r} has no EOS token, which ends a target.")
    config: Any = model.config  # Any: each model has its own
    # T5 and its like have no limit.
    room = getattr(config.get_text_config(), "max_position_embeddings", None) or max_source + max_target
    longest = room - max_target if kind == "causal" else room
    if longest < 2 or max_target > room:
        raise ModelError(
            f"model {ref.name!r} has {room} positions, which targets of {max_target} tokens leave no room in; lower "
            "max_target."
        )
    if lora is not None:
        model = add_lora(model, lora, seed=derive_seed(seed, "lora"))
    return PairModel(model, tokenizer, kind, min(max_source, longest), max_target, join)
