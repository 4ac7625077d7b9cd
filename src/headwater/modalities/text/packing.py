"""From documents to batches: tokenise once, cut into blocks, read in any order, mix in exact proportion, mask.

Every stream here offers ``batch(step, start, stop)``: rows [start, stop) of batch number ``step``, a pure function of
its arguments. There is no state to save, so a restart, another number of workers or another number of processes reads
the same rows.

Mixtures place rows by earliest deadline: the j-th row of a part with share w may come once w t > j - 1 and must have
come when w t >= j, where t counts rows. Among the parts that may come, the earliest deadline goes first. Then after any
number of rows t, each part's count differs from w t by less than 1.

Source: Steiner, Yeomans, "Level Schedules for Mixed-Model, Just-in-Time Processes", Management Science 39 (1993).
Masking as in Devlin et al., "BERT", arXiv:1810.04805, section 3.1.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike, NDArray
from torch import Tensor

from headwater.core.cache import atomic_path, atomic_write_text
from headwater.core.order import VirtualIndex
from headwater.core.rng import derive_seed, hash_uniform
from headwater.modalities.text.docs import CorpusError, Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from headwater.modalities.text.whole_words import WordBorders

__all__ = [
    "MaskedStream",
    "MixedStream",
    "PackedBlocks",
    "PackedStream",
    "Rows",
    "Sequences",
    "TokenStore",
    "mask_tokens",
    "tokenize_documents",
    "write_store",
]

IGNORED = -100  # the label that Hugging Face models leave out


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Tokenised documents, end to end, each closed by the end-of-sequence token.

    Attributes:
        tokens: ``(tokens,)`` int32, or another type of integer that was asked for, in memory or memory-mapped.
        offsets: ``(documents + 1,)`` int64; document d is ``tokens[offsets[d]:offsets[d + 1]]``, its EOS included.
        eos_token_id: the token that closes a document.
        fingerprint: changes with any token, border or target.
        trained: ``(tokens,)`` bool, which tokens are targets; None where all are.
        owners: ``(sequences,)`` int64, where a document may be several sequences: which one each is a piece of.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    eos_token_id: int
    fingerprint: str
    trained: NDArray[np.bool_] | None = None
    owners: NDArray[np.int64] | None = None

    @classmethod
    def open(cls, path: str | Path) -> TokenStore:
        """Map a store that ``tokenize_documents`` or ``write_store`` wrote.

        Raises:
            FileNotFoundError: there is no complete store at ``path``.
        """
        path = Path(path)
        manifest = path / "store.json"
        if not manifest.is_file():
            raise FileNotFoundError(f"no complete token store in {path} (store.json is missing); write it again.")
        about = json.loads(manifest.read_text(encoding="utf-8"))
        tokens = np.load(path / "tokens.npy", mmap_mode="r", allow_pickle=False)
        offsets = np.load(path / "offsets.npy", allow_pickle=False)
        trained, owners = (
            np.load(path / name, mmap_mode="r", allow_pickle=False) if (path / name).exists() else None
            for name in ("trained.npy", "owners.npy")
        )
        return cls(tokens, offsets, about["eos_token_id"], about["fingerprint"], trained, owners)


def tokenize_documents(
    docs: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    out: str | Path | None = None,
    batch_size: int = 1024,
    dtype: DTypeLike = np.int32,
) -> TokenStore:
    """Tokenise documents in batches; no special token is added but the EOS that closes each.

    Args:
        docs: read once, so they may be a stream.
        tokenizer: its EOS closes documents; where it has none (BERT), its SEP.
        out: a directory for ``tokens.npy`` and ``offsets.npy``; tokens then never stand in memory all at once, and the
            store that is returned is memory-mapped. None keeps them in memory.
        batch_size: documents per call of the tokenizer.
        dtype: of the tokens; large enough for every id.

    Raises:
        CorpusError: there is no document.
        ValueError: the tokenizer has neither EOS nor SEP.
    """
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if eos is None:
        raise ValueError(
            "the tokenizer has neither an eos nor a sep token to close documents; set tokenizer.eos_token."
        )

    def batches() -> Iterator[Sequences]:
        stream = iter(docs)
        while texts := [doc.text for doc in islice(stream, batch_size)]:
            encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
            flat = np.fromiter(chain.from_iterable((*ids, eos) for ids in encoded), dtype=dtype)
            yield Sequences([len(ids) + 1 for ids in encoded], flat)

    return write_store(batches(), eos, out)


class Sequences(NamedTuple):
    """Some token sequences, end to end.

    Attributes:
        lengths: of each.
        tokens: ``(tokens,)``.
        trained: ``(tokens,)``, which are targets; None for all.
        owners: which document each sequence is a piece of; None where each is one.
    """

    lengths: Sequence[int]
    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_] | None = None
    owners: Sequence[int] | None = None


def write_store(batches: Iterable[Sequences], eos_token_id: int, out: str | Path | None = None) -> TokenStore:
    """Put token sequences end to end, as they come.

    Args:
        batches: what is optional in one of them is there in all or in none.
        eos_token_id: the token that closes a document.
        out: see ``tokenize_documents``.

    Raises:
        CorpusError: there is no sequence.
    """
    digest = hashlib.blake2b(f"eos={eos_token_id};".encode(), digest_size=16)
    lengths: list[int] = []
    owners: list[int] = []
    chunks: list[NDArray[np.int32]] = []
    masks: list[NDArray[np.bool_]] = []
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        types: dict[str, str] = {}

        def append(name: str, values: NDArray[Any], kept: list[Any]) -> None:  # Any: int32 or bool
            digest.update(values.tobytes())
            if out is None:
                kept.append(values)
                return
            if name not in files:
                files[name] = stack.enter_context(stack.enter_context(atomic_path(Path(out) / name)).open("wb+"))
                types[name] = values.dtype.str
                _write_header(files[name], 0, types[name])
            files[name].write(values.tobytes())

        if out is not None:
            for name in ("store.json", "trained.npy", "owners.npy"):
                (Path(out) / name).unlink(missing_ok=True)  # from here on what was there is not complete
        for batch in batches:
            lengths.extend(batch.lengths)
            owners.extend(batch.owners or ())
            append("tokens.npy", batch.tokens, chunks)
            if batch.trained is not None:
                append("trained.npy", batch.trained, masks)
        if not lengths:
            raise CorpusError("corpus: 0 documents to tokenise.")
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        digest.update(offsets.tobytes())
        for name, file in files.items():
            file.seek(0)
            _write_header(file, int(offsets[-1]), types[name])
    owned = np.array(owners, dtype=np.int64) if owners else None
    if out is None:
        mask = np.concatenate(masks) if masks else None
        return TokenStore(np.concatenate(chunks), offsets, eos_token_id, digest.hexdigest(), mask, owned)
    for name, values in (("offsets.npy", offsets), ("owners.npy", owned)):
        if values is not None:
            with atomic_path(Path(out) / name) as path, path.open("wb") as small_file:
                np.save(small_file, values, allow_pickle=False)
    about = {"eos_token_id": eos_token_id, "fingerprint": digest.hexdigest(), "documents": len(lengths)}
    atomic_write_text(Path(out) / "store.json", json.dumps(about))
    return TokenStore.open(out)


def _write_header(file: BinaryIO, length: int, descr: str) -> None:
    # The format pads its header so that the first axis can grow in place: the same number of bytes for any length.
    header = {"descr": descr, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


class Rows(Protocol):
    """Rows of one length that are read by number: blocks cut anywhere, or packs of whole examples."""

    seq_len: int
    seed: int
    fingerprint: str

    def __len__(self) -> int: ...

    def columns(self, items: ArrayLike) -> dict[str, NDArray[np.int64]]:
        """``input_ids``, ``labels`` and what else a row has, by place in the store ``(B,)``; each ``(B, T)``."""
        ...


class PackedBlocks:
    """A store cut into blocks of ``seq_len`` tokens, read in a shuffled, endless order.

    Documents follow each other without padding and may cross a border; fewer than ``seq_len`` tokens at the end are
    left out. As a map-style data set, ``blocks[i]`` is position i of the endless order (epoch ``i // len(blocks)``),
    and iterating over it gives one epoch.

    Args:
        store: the tokens.
        seq_len: block length T, >= 2.
        seed: of the order.
        overlap: tokens at the beginning of a block that end the one before, in [0, T); their label is -100. With one,
            every token of the store but the first is predicted once, where blocks side by side never predict their
            first.

    Raises:
        ValueError: ``seq_len`` is below 2, ``overlap`` leaves nothing new, or the store holds less than one block.
    """

    def __init__(self, store: TokenStore, seq_len: int, seed: int = 0, *, overlap: int = 0) -> None:
        if seq_len < 2:
            raise ValueError(f"seq_len must be at least 2, to have something to predict; got {seq_len}.")
        if not 0 <= overlap < seq_len:
            raise ValueError(f"overlap must be in [0, {seq_len}), so that a block has something new; got {overlap}.")
        if len(store.tokens) < seq_len:
            raise ValueError(
                f"the corpus has {len(store.tokens)} tokens, less than one block of {seq_len}; lower seq_len."
            )
        self.store, self.seq_len, self.seed, self.overlap = store, seq_len, seed, overlap
        self.order = VirtualIndex((len(store.tokens) - overlap) // (seq_len - overlap), derive_seed(seed, "blocks"))
        self.fingerprint = _fingerprint("blocks", store.fingerprint, seq_len, seed, *([overlap] if overlap else []))

    def __len__(self) -> int:
        return self.order.n

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        if position < 0:
            raise IndexError(f"positions start at 0; got {position}.")
        columns = self.columns(self.order([position])[1])
        return {name: torch.from_numpy(values[0]) for name, values in columns.items()} | {"row": torch.tensor(position)}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[i] for i in range(len(self)))

    def tokens(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Return the blocks at ``positions`` ``(B,)`` of the endless order, ``(B, T)`` int64."""
        return self.blocks(self.order(positions)[1])

    def blocks(self, items: ArrayLike) -> NDArray[np.int64]:
        """Return blocks by their place in the store, ``(B,)`` in [0, len), as ``(B, T)`` int64."""
        tokens, new = self.store.tokens, self.seq_len - self.overlap
        strides = (new * tokens.itemsize, tokens.itemsize)
        # A view; numpy's sliding_window_view is the same and takes as long as gathering a batch.
        blocks = np.ndarray((len(self), self.seq_len), tokens.dtype, np.ascontiguousarray(tokens), 0, strides)
        found: NDArray[np.int64] = blocks[np.asarray(items, dtype=np.int64)].astype(np.int64)
        return found

    def columns(self, items: ArrayLike) -> dict[str, NDArray[np.int64]]:
        """Return ``input_ids`` and ``labels`` by place in the store, ``(B, T)``; labels are -100 off target."""
        ids = self.blocks(items)
        trained = self.store.trained
        labels = ids.copy() if trained is None else np.where(trained[self._places(items)], ids, IGNORED)
        labels[:, : self.overlap] = IGNORED
        return {"input_ids": ids, "labels": labels}

    def document_ids(self, items: ArrayLike) -> NDArray[np.int64]:
        """Return which document of the store each token of these blocks belongs to, ``(B, T)`` int64."""
        return np.searchsorted(self.store.offsets, self._places(items), side="right") - 1

    def _places(self, items: ArrayLike) -> NDArray[np.int64]:
        return np.asarray(items, dtype=np.int64)[:, None] * (self.seq_len - self.overlap) + np.arange(self.seq_len)


def _fingerprint(*parts: object) -> str:
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=16).hexdigest()


class _Stream(Protocol):
    fingerprint: str
    rows: int
    tokens_per_row: int

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]: ...


def _positions(step: int, rows: int, start: int, stop: int | None) -> NDArray[np.int64]:
    stop = rows if stop is None else stop
    if step < 0 or not 0 <= start <= stop <= rows:
        raise ValueError(
            f"need step >= 0 and 0 <= start <= stop <= {rows}; got step={step}, start={start}, stop={stop}."
        )
    return np.arange(step * rows + start, step * rows + stop, dtype=np.int64)


def _batch(columns: dict[str, NDArray[np.int64]], **more: NDArray[np.int64]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values) for name, values in {**columns, **more}.items()}


class PackedStream:
    """Batches of blocks for a causal model; ``labels`` are the inputs (Hugging Face models shift them).

    Args:
        store: the tokens.
        seq_len: block length T.
        rows: blocks per batch, >= 1.
        seed: of the order.
        document_ids: also give ``document_ids`` ``(B, T)``, for attention that stays inside documents.

    Attributes:
        fingerprint: changes with the data, the length, the batch or the order.
        rows: blocks per batch.
        tokens_per_row: T.
    """

    def __init__(
        self, store: TokenStore, seq_len: int, rows: int, seed: int = 0, *, document_ids: bool = False
    ) -> None:
        if rows < 1:
            raise ValueError(f"rows must be >= 1; got {rows}.")
        self.blocks = PackedBlocks(store, seq_len, seed)
        self.rows, self.tokens_per_row, self._with_documents = rows, seq_len, document_ids
        self.fingerprint = _fingerprint("packed", self.blocks.fingerprint, rows)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Return rows [start, stop) of batch ``step``.

        Returns:
            ``input_ids`` and ``labels`` ``(B, T)``, ``row`` ``(B,)``, int64.

        Raises:
            ValueError: ``step`` is negative or the range is not inside the batch.
        """
        positions = _positions(step, self.rows, start, stop)
        _, items = self.blocks.order(positions)
        batch = _batch(self.blocks.columns(items), row=positions)
        if self._with_documents:
            batch["document_ids"] = torch.from_numpy(self.blocks.document_ids(items))
        return batch

    def epochs(self, step: int) -> float:
        """Return how often the corpus has been read before batch ``step``."""
        return step * self.rows / len(self.blocks)


MAX_PERIOD = 1 << 16


class MixedStream:
    """Batches that draw from several corpora in exact proportion, each corpus in its own order and epochs.

    After any number of rows, a part's count differs from its share of them by less than one row. Shares are fractions
    with a common denominator of at most 65 536, which is also the period of the mixture: decimals such as 0.25 or 0.015
    are exact, others are off by less than 2e-5. ``weights`` holds the shares in use.

    Args:
        parts: (rows, weight) pairs with the same columns; weights are >= 0 and are normalised.
        rows: blocks per batch, >= 1.
        seed: of the order inside each part.
        walks: the order inside each part instead, so that one mixture goes on where another stopped.

    Raises:
        ValueError: no part, different block lengths, or a weight that is negative, infinite or too small to represent.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Rows, float]],
        rows: int,
        seed: int = 0,
        *,
        walks: Sequence[VirtualIndex] | None = None,
    ) -> None:
        if rows < 1 or not parts:
            raise ValueError(
                f"a mixture needs rows >= 1 and at least one part; got rows={rows} and {len(parts)} parts."
            )
        lengths = sorted({blocks.seq_len for blocks, _ in parts})
        if len(lengths) > 1:
            raise ValueError(f"the parts of a mixture must have one block length; got {lengths}.")
        self.parts = [blocks for blocks, _ in parts]
        self.rows, self.tokens_per_row = rows, lengths[0]
        self._units = _common_units([weight for _, weight in parts])
        self._period = sum(self._units)
        self.weights = [units / self._period for units in self._units]
        self._sequence = _level_schedule(self._units)
        # _before[p, t]: rows of part p among the first t of a period.
        self._before = np.zeros((len(parts), self._period + 1), dtype=np.int32)
        np.cumsum(self._sequence == np.arange(len(parts))[:, None], axis=1, out=self._before[:, 1:])
        self._orders = list(walks or ()) or [
            VirtualIndex(len(blocks), derive_seed(seed, "mixture", p, blocks.seed))
            for p, blocks in enumerate(self.parts)
        ]
        prints = [blocks.fingerprint for blocks in self.parts]
        order = seed if walks is None else [[walk.seed, walk.begin] for walk in walks]
        self.fingerprint = _fingerprint("mixed", prints, self._units, rows, order)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Return rows [start, stop) of batch ``step``.

        Returns:
            The parts' columns ``(B, T)``, ``row`` and ``part`` (which corpus) ``(B,)``, int64.

        Raises:
            ValueError: ``step`` is negative or the range is not inside the batch.
        """
        positions = _positions(step, self.rows, start, stop)
        periods, places = np.divmod(positions, self._period)
        part = self._sequence[places].astype(np.int64)
        within = periods * np.asarray(self._units)[part] + self._before[part, places]
        shape = (len(positions), self.tokens_per_row)
        columns = {name: np.empty(shape, np.int64) for name in self.parts[0].columns(np.empty(0, np.int64))}
        for p in np.unique(part):
            here = part == p
            for name, values in self.parts[p].columns(self._orders[p](within[here])[1]).items():
                columns[name][here] = values
        return _batch(columns, row=positions, part=part)

    def counts(self, step: int) -> NDArray[np.int64]:
        """Return the rows that each part has given before batch ``step``, ``(parts,)``."""
        return self.given(step * self.rows)

    def given(self, rows: int) -> NDArray[np.int64]:
        """Return how many of the first ``rows`` rows each part gives, ``(parts,)``."""
        periods, place = divmod(rows, self._period)
        return periods * np.asarray(self._units, dtype=np.int64) + self._before[:, place]

    def epochs(self, step: int) -> list[float]:
        """Return how often each part has been read before batch ``step``."""
        return [int(count) / len(blocks) for count, blocks in zip(self.counts(step), self.parts, strict=True)]


def _common_units(weights: Sequence[float]) -> list[int]:
    """Return whole numbers in the proportion of the weights, with a sum of at most ``MAX_PERIOD``."""
    if not all(math.isfinite(w) and w >= 0 for w in weights) or sum(weights) <= 0:
        raise ValueError(f"weights must be finite, >= 0 and not all zero; got {list(weights)}.")
    # 0.1 is not a tenth in binary; the nearest simple fraction is what was meant, if it is as near as floats get.
    simple = [Fraction(w).limit_denominator(10_000) for w in weights]
    if all(math.isclose(f, w, rel_tol=1e-12) for f, w in zip(simple, weights, strict=True)):
        common = math.lcm(*(f.denominator for f in simple))
        units = [int(f * common) for f in simple]
        units = [u // math.gcd(*units) for u in units]
        if sum(units) <= MAX_PERIOD:
            return units
    scaled = [w / math.fsum(weights) * MAX_PERIOD for w in weights]
    units = [int(s) for s in scaled]
    for p in sorted(range(len(units)), key=lambda p: units[p] - scaled[p])[: MAX_PERIOD - sum(units)]:
        units[p] += 1
    for w, u in zip(weights, units, strict=True):
        if w > 0 and u == 0:
            raise ValueError(f"weight {w} is below 1/{MAX_PERIOD} of the mixture; raise it or leave the part out.")
    return units


def _level_schedule(units: Sequence[int]) -> NDArray[np.int32]:
    """Return the part of every row of one period, ``(sum(units),)``, by earliest deadline."""
    period = sum(units)
    sequence = np.empty(period, dtype=np.int32)
    placed = [0] * len(units)
    active = [p for p, u in enumerate(units) if u]
    for t in range(1, period + 1):
        ready = (p for p in active if units[p] * t > placed[p] * period)
        # The deadline of the next row of p is ceil((placed + 1) / share), in whole numbers.
        chosen = min(ready, key=lambda p: -(-(placed[p] + 1) * period // units[p]))
        placed[chosen] += 1
        sequence[t - 1] = chosen
    return sequence


def mask_tokens(
    input_ids: NDArray[np.int64],
    rows: ArrayLike,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    probability: float = 0.15,
    words: WordBorders | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Mask tokens for a masked language model; what is drawn for a row depends on (seed, row) alone.

    Each token that is not special is a target with ``probability``. Of the targets 80 % become the mask token, 10 % a
    random token of the vocabulary, 10 % stay.

    Args:
        input_ids: ``(B, T)``.
        rows: ``(B,)`` integers, the names of the rows.
        tokenizer: gives the mask token and the special tokens, which are never targets.
        seed: any integer.
        probability: in (0, 1).
        words: draw once for each word and not for each token: what is a target, and what becomes of it.

    Returns:
        (inputs, labels), both ``(B, T)``; labels are -100 where nothing is to be predicted.

    Raises:
        ValueError: the tokenizer has no mask token, or ``probability`` is outside (0, 1).
    """
    if tokenizer.mask_token_id is None:
        raise ValueError("a masked objective needs a tokenizer with a mask token; this one has none.")
    if not 0 < probability < 1:
        raise ValueError(f"probability must be in (0, 1); got {probability}.")
    length = input_ids.shape[1]
    # One stream per purpose, so that a longer row keeps the draws of its first tokens.
    key = derive_seed(seed, "mask")
    chosen, kind, token = (hash_uniform(key, rows, length, stream=stream) for stream in range(3))
    if words is not None:
        heads = words.heads(input_ids)
        chosen, kind = (np.take_along_axis(drawn, heads, axis=1) for drawn in (chosen, kind))
    target = (chosen < probability) & ~np.isin(input_ids, tokenizer.all_special_ids)
    masked = np.where(target & (kind < 0.8), tokenizer.mask_token_id, input_ids)
    masked = np.where(target & (kind >= 0.9), (token * len(tokenizer)).astype(np.int64), masked)
    return masked, np.where(target, input_ids, IGNORED)


class MaskedStream:
    """Any stream, with its inputs masked for a masked language model; see ``mask_tokens``.

    Each row of the stream has its own draws, so a second epoch is masked differently.

    Args:
        stream: a stream whose batches have ``input_ids`` and ``row``.
        tokenizer: gives the mask token.
        seed: of the masks.
        probability: share of targets.
        words: mask whole words, which these are the borders of.
    """

    def __init__(
        self,
        stream: _Stream,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int = 0,
        probability: float = 0.15,
        words: WordBorders | None = None,
    ) -> None:
        self._stream, self._tokenizer, self._seed, self._probability = stream, tokenizer, seed, probability
        self._words = words
        self.rows, self.tokens_per_row = stream.rows, stream.tokens_per_row
        how = () if words is None else ("whole words",)
        self.fingerprint = _fingerprint("masked", stream.fingerprint, seed, probability, tokenizer.mask_token_id, *how)
        mask_tokens(np.zeros((0, 1), dtype=np.int64), np.zeros(0, dtype=np.int64), tokenizer, **self._settings())

    def _settings(self) -> dict[str, Any]:  # Any: the keyword arguments of mask_tokens
        return {"seed": self._seed, "probability": self._probability, "words": self._words}

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Return the stream's batch with masked ``input_ids`` and their ``labels``."""
        batch = self._stream.batch(step, start, stop)
        ids, labels = mask_tokens(batch["input_ids"].numpy(), batch["row"].numpy(), self._tokenizer, **self._settings())
        return {**batch, "input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
