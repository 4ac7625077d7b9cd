"""Documents as examples: tokens and which of them are targets, written to disk once and packed whole into rows.

A formatter decides what a document looks like to the model. With a ``room``, each example stands alone: it begins with
the start token (BOS, else EOS), holds at most ``room`` tokens, and is seen by nothing outside it. Without one, examples
are laid end to end and cut anywhere, as ``PackedBlocks`` does.

Packing is best fit, longest first: an example goes to the fullest row that still has room for it.

Source: Ding et al., "Fewer Truncations Improve Language Modeling", arXiv:2404.10830, section 3 (best-fit packing).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from headwater.core.cache import cache_dir, cache_key
from headwater.core.order import VirtualIndex
from headwater.core.rng import derive_seed
from headwater.modalities.text.docs import Document
from headwater.modalities.text.masks import position_ids_for
from headwater.modalities.text.packing import IGNORED, Sequences, TokenStore, write_store
from headwater.modalities.text.prepared import fingerprint_of, tokenizer_fingerprint

__all__ = [
    "NOTHING",
    "Example",
    "Formatter",
    "PackedExamples",
    "PackingCollator",
    "PlainFormatter",
    "best_fit",
    "encoded",
    "example_pieces",
    "formatted",
    "start_token_id",
    "target_counts",
]

BATCH = 1024


class Example(NamedTuple):
    """A sequence to learn from.

    Attributes:
        input_ids: ``(tokens,)`` int32.
        trained: ``(tokens,)`` bool, which tokens are targets.
    """

    input_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]

    def features(self) -> dict[str, list[int]]:
        """``input_ids`` and ``labels`` (-100 where nothing is to be predicted), as rows of a data set hold them."""
        return {
            "input_ids": self.input_ids.tolist(),
            "labels": np.where(self.trained, self.input_ids, IGNORED).tolist(),
        }


class Formatter(Protocol):
    """What a document looks like to the model: a pure function of the document."""

    @property
    def about(self) -> Mapping[str, Any]:  # Any: JSON data
        """Everything but the documents that decides the examples; tokens are cached under it."""
        ...

    @property
    def reads(self) -> tuple[str, ...]:
        """The names in ``Document.meta`` that decide the examples."""
        ...

    @property
    def eos_token_id(self) -> int:
        """The token that closes a document."""
        ...

    def __call__(self, documents: Sequence[Document], room: int | None = None) -> list[list[Example]]:
        """Format documents, in order; one becomes several examples where ``room`` is too small for it."""
        ...


def start_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands before a document where it is read alone: BOS, else EOS.

    Raises:
        ValueError: the tokenizer has no EOS.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token to close documents; set tokenizer.eos_token.")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return int(start)


def example_pieces(head: Example, body: Sequence[int], *, room: int | None, start: int, eos: int) -> list[Example]:
    """A document as examples: head, tokens, EOS.

    Args:
        head: what stands before the document, repeated before every piece of it.
        body: the document's tokens, all of them targets.
        room: tokens of an example; None: one example without a start token.
        start: the start token, never a target.
        eos: closes the last piece, and is a target.

    Raises:
        ValueError: ``room`` leaves no room for the document.
    """
    if room is not None:
        head = Example(
            np.concatenate([[start], head.input_ids], dtype=np.int32), np.concatenate([[False], head.trained])
        )
        if room <= len(head.input_ids):
            raise ValueError(f"{room} tokens leave no room for a document after a head of {len(head.input_ids)}.")
    whole = np.array([*body, eos], dtype=np.int32)
    size = len(whole) if room is None else room - len(head.input_ids)
    pieces = (whole[begin : begin + size] for begin in range(0, len(whole), size))
    return [
        Example(np.concatenate([head.input_ids, piece]), np.concatenate([head.trained, np.ones(len(piece), np.bool_)]))
        for piece in pieces
    ]


NOTHING = Example(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.bool_))
"""No tokens."""


class PlainFormatter:
    """The document and EOS, nothing else; every token is a target.

    Args:
        tokenizer: the model's.

    Raises:
        ValueError: the tokenizer has no EOS.
    """

    reads: tuple[str, ...] = ()

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.start = tokenizer, start_token_id(tokenizer)
        self.eos_token_id: int = tokenizer.eos_token_id

    @property
    def about(self) -> Mapping[str, Any]:  # Any: JSON data
        """The tokenizer."""
        return {"format": "plain", "tokenizer": tokenizer_fingerprint(self.tokenizer), "start": self.start}

    def __call__(self, documents: Sequence[Document], room: int | None = None) -> list[list[Example]]:
        """Format documents; see ``Formatter``."""
        return [
            example_pieces(NOTHING, ids, room=room, start=self.start, eos=self.eos_token_id)
            for ids in encoded(documents, self.tokenizer)
        ]


def encoded(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Each document's tokens, without special ones."""
    texts = [document.text for document in documents]
    if not texts:
        return []
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
    return found


def formatted(documents: Sequence[Document], formatter: Formatter, room: int | None = None) -> TokenStore:
    """The documents as examples, end to end, memory-mapped from the user cache; written once per text and format.

    Raises:
        CorpusError: there is no document.
    """
    about = {
        "documents": fingerprint_of(documents),
        "meta": _meta_fingerprint(documents, formatter.reads),
        "format": dict(formatter.about),
        "room": room,
        "version": 1,
    }
    target = cache_dir("tokens") / cache_key(about)
    if not (target / "store.json").exists():
        working = target.with_name(f"{target.name}.{os.getpid()}.partial")
        write_store(_batches(documents, formatter, room), formatter.eos_token_id, working)
        try:
            working.rename(target)
        except OSError:  # another process was first; its examples are the same
            shutil.rmtree(working)
    return TokenStore.open(target)


def _meta_fingerprint(documents: Iterable[Document], names: Sequence[str]) -> str:
    if not names:
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for document in documents:
        values = [document.meta.get(name) for name in names]
        digest.update(json.dumps(values, default=str).encode() + b"\n")
    return digest.hexdigest()


def _batches(documents: Iterable[Document], formatter: Formatter, room: int | None) -> Iterator[Sequences]:
    stream, first = iter(documents), 0
    while batch := list(islice(stream, BATCH)):
        pieces = formatter(batch, room)
        owners = [first + i for i, examples in enumerate(pieces) for _ in examples]
        ids, trained = zip(*(example for examples in pieces for example in examples), strict=True)
        yield Sequences([len(one) for one in ids], np.concatenate(ids), np.concatenate(trained), owners)
        first += len(batch)


def target_counts(store: TokenStore, documents: int) -> NDArray[np.int64]:
    """How many targets each document has in a store of ``formatted``, ``(documents,)``."""
    assert store.trained is not None
    assert store.owners is not None
    counts = np.add.reduceat(store.trained, store.offsets[:-1], dtype=np.int64)
    found: NDArray[np.int64] = np.bincount(store.owners, counts, documents).astype(np.int64)
    return found


def best_fit(lengths: ArrayLike, room: int) -> NDArray[np.int64]:
    """The row of each example, ``(examples,)`` int64: best fit, longest first; rows are numbered as they are opened.

    Args:
        lengths: ``(examples,)``, each from 1 to ``room``.
        room: tokens of a row.

    Raises:
        ValueError: a length is below 1 or above ``room``.

    Example:
        >>> best_fit([3, 6, 4, 5, 2], 10).tolist()
        [1, 0, 0, 1, 1]
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and not 1 <= sizes.min() <= sizes.max() <= room:
        raise ValueError(f"lengths must be from 1 to {room}, the row's; got {sizes.min()} to {sizes.max()}.")
    row_of = np.empty(len(sizes), dtype=np.int64)
    with_space: list[list[int]] = [[] for _ in range(room)]  # rows by the space that is left
    spaces = 0  # bit s is set where some row has space s, so the least space that suffices is one shift away
    rows = 0
    for i in np.argsort(-sizes, kind="stable").tolist():
        length = int(sizes[i])
        enough = spaces >> length
        if enough:
            space = length + (enough & -enough).bit_length() - 1
            row = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space, row = room, rows
            rows += 1
        row_of[i] = row
        if space > length:
            with_space[space - length].append(row)
            spaces |= 1 << (space - length)
    return row_of


class PackedExamples:
    """Whole examples of a store, packed into rows; what is left of a row is padding.

    Args:
        store: examples of at most ``seq_len`` tokens: what ``formatted`` gives with that room.
        seq_len: tokens of a row, T.
        seed: of ``order``, the endless walk over the rows.
        pad_token_id: fills rows; -100 is its label.

    Attributes:
        padding: share of positions that hold nothing.

    Raises:
        ValueError: an example is longer than a row.
    """

    def __init__(self, store: TokenStore, seq_len: int, seed: int = 0, *, pad_token_id: int) -> None:
        row_of = best_fit(np.diff(store.offsets), seq_len)
        self.store, self.seq_len, self.seed, self.pad_token_id = store, seq_len, seed, pad_token_id
        self._order = np.argsort(row_of, kind="stable")
        self._borders = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
        self.fingerprint = cache_key(["examples", store.fingerprint, seq_len, seed, pad_token_id])
        self.padding = 1 - len(store.tokens) / (len(self) * seq_len)
        self.order = VirtualIndex(len(self), derive_seed(seed, "examples"))

    def __len__(self) -> int:
        return len(self._borders) - 1

    def columns(self, items: ArrayLike) -> dict[str, NDArray[np.int64]]:
        """Return ``input_ids``, ``labels``, ``document_ids`` and ``position_ids`` of rows ``(B,)``, each ``(B, T)``.

        ``document_ids`` counts a row's examples from 1; padding has 0. ``position_ids`` start anew in each, and in the
        padding.
        """
        rows = np.asarray(items, dtype=np.int64)
        shape = (len(rows), self.seq_len)
        ids, labels = np.full(shape, self.pad_token_id, np.int64), np.full(shape, IGNORED, np.int64)
        documents, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        counting = np.arange(self.seq_len)
        tokens, offsets, trained = self.store.tokens, self.store.offsets, self.store.trained
        for place, row in enumerate(rows.tolist()):
            begin = 0
            members = self._order[self._borders[row] : self._borders[row + 1]].tolist()
            for number, example in enumerate(members, start=1):
                source = slice(int(offsets[example]), int(offsets[example + 1]))
                here = slice(begin, begin + source.stop - source.start)
                ids[place, here], documents[place, here] = tokens[source], number
                positions[place, here] = counting[: here.stop - begin]
                targets = tokens[source] if trained is None else np.where(trained[source], tokens[source], IGNORED)
                labels[place, here] = targets
                begin = here.stop
            positions[place, begin:] = counting[: self.seq_len - begin]
        return {"input_ids": ids, "labels": labels, "document_ids": documents, "position_ids": positions}

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        """Row ``position`` of an endless order: ``input_ids``, ``labels`` and ``position_ids`` ``(T,)``.

        By positions that start anew transformers keeps attention inside examples, where ``masks.keeps_documents_apart``
        says so of the model.
        """
        if position < 0:
            raise IndexError(f"positions start at 0; got {position}.")
        columns = self.columns(self.order([position])[1])
        return {name: torch.from_numpy(columns[name][0]) for name in ("input_ids", "labels", "position_ids")}


class PackingCollator:
    """Packs whatever examples a batch has into as few rows as best fit needs.

    For ``transformers.Trainer`` and loops of your own. Attention stays inside examples by ``position_ids`` alone, where
    ``masks.keeps_documents_apart`` says so of the model; by ``PackedObjective`` in any case.

    Args:
        seq_len: tokens of a row, T.
        pad_token_id: fills rows.

    Example:
        >>> batch = PackingCollator(6, pad_token_id=0)([{"input_ids": [5, 6], "labels": [-100, 6]}] * 4)
        >>> batch["input_ids"].tolist()
        [[5, 6, 5, 6, 5, 6], [5, 6, 0, 0, 0, 0]]
        >>> batch["position_ids"].tolist()
        [[0, 1, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3]]
    """

    def __init__(self, seq_len: int, *, pad_token_id: int) -> None:
        self.seq_len, self.pad_token_id = seq_len, pad_token_id

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:  # Any: lists, arrays or tensors
        """Pack features with ``input_ids`` and ``labels``.

        Returns:
            ``input_ids``, ``labels``, ``position_ids`` and ``document_ids`` ``(rows, T)`` int64.

        Raises:
            ValueError: no feature, or one that is empty or longer than a row.
        """
        if not features:
            raise ValueError("there is no example to pack.")
        row_of = best_fit([len(feature["input_ids"]) for feature in features], self.seq_len)
        shape = (int(row_of.max()) + 1, self.seq_len)
        ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        labels, documents = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        used, number = [0] * shape[0], [0] * shape[0]
        for feature, row in zip(features, row_of.tolist(), strict=True):
            here = slice(used[row], used[row] + len(feature["input_ids"]))
            used[row], number[row] = here.stop, number[row] + 1
            ids[row, here] = torch.as_tensor(feature["input_ids"])
            labels[row, here] = torch.as_tensor(feature["labels"])
            documents[row, here] = number[row]
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": position_ids_for(documents),
            "document_ids": documents,
        }
