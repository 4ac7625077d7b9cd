"""(c) How fast do tokenised documents become batches of blocks, and texts tokens on disk?

    python -m benchmarks.packing

The peer is the function that training scripts carry (``group_texts``): concatenate the lists of a thousand documents,
cut them into blocks, copy the labels; then read the result as tensors. Both sides start from one buffer of tokens and
one of borders, in memory (an Arrow list column is just that), and end when every block was given out once as int64
``input_ids`` and ``labels``. The second yardstick is what no packing can do without: one ``numpy.concatenate`` of the
documents and a reshape, without labels, order or conversion.

The second question is what ``pack`` adds to tokenising. The peer is the fast tokenizer's own ``encode_batch``, called
with as many documents at a time, its result dropped; ours ends with tokens, borders and fingerprint on disk.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from benchmarks.harness import Bound, alternate, report
from headwater.corpora.pints import pack
from headwater.modalities.text.docs import Document
from headwater.modalities.text.docstrings import docstring_corpus
from headwater.modalities.text.packing import PackedStream, TokenStore
from headwater.modalities.text.tokenizers import train_bpe

THOUSANDS, LENGTH, ROWS = 8, 512, 64
EOS = 1


def documents() -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Tokens and borders; every thousand documents fill whole blocks, as the peer drops the rest of each thousand."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 1.0, (THOUSANDS, 1000)), 8, 16_384).astype(np.int64)  # about 400 tokens
    lengths[:, -1] += -lengths.sum(1) % LENGTH
    offsets = np.concatenate([[0], lengths.ravel().cumsum()])
    tokens = rng.integers(2, 50_000, offsets[-1]).astype(np.int32)
    tokens[offsets[1:] - 1] = EOS
    return tokens, offsets


def grouped(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    flat = list(chain(*examples["input_ids"]))
    total = len(flat) // LENGTH * LENGTH
    blocks = [flat[i : i + LENGTH] for i in range(0, total, LENGTH)]
    return {"input_ids": blocks, "labels": blocks.copy()}


def by_map(dataset: datasets.Dataset) -> Iterator[dict[str, torch.Tensor]]:
    blocks = dataset.map(grouped, batched=True, keep_in_memory=True, load_from_cache_file=False)
    yield from blocks.with_format("torch").iter(ROWS)


def by_stream(tokens: NDArray[np.int32], offsets: NDArray[np.int64]) -> Iterator[dict[str, torch.Tensor]]:
    stream = PackedStream(TokenStore(tokens, offsets, EOS, "benchmark"), LENGTH, ROWS)
    steps, rest = divmod(len(stream.blocks), ROWS)
    for step in range(steps):
        yield stream.batch(step)
    if rest:
        yield stream.batch(steps, 0, rest)


def check(tokens: NDArray[np.int32], offsets: NDArray[np.int64], dataset: datasets.Dataset) -> str:
    """The same blocks, each once: ours in its shuffled order, put back by the order's own numbers."""
    theirs = torch.cat([batch["input_ids"] for batch in by_map(dataset)])
    batches = list(by_stream(tokens, offsets))
    ours = torch.cat([batch["input_ids"] for batch in batches])
    stream = PackedStream(TokenStore(tokens, offsets, EOS, "benchmark"), LENGTH, ROWS)
    _, items = stream.blocks.order(torch.cat([batch["row"] for batch in batches]).numpy())
    assert sorted(items.tolist()) == list(range(len(theirs)))
    assert torch.equal(ours, theirs[torch.from_numpy(items)])
    assert torch.equal(theirs.ravel(), torch.from_numpy(tokens))
    assert all(torch.equal(batch["input_ids"], batch["labels"]) for batch in batches)
    return f"both give the same {len(theirs):,} blocks of {LENGTH}, each once"


def tokenising() -> None:
    """Texts to tokens on disk against ``encode_batch`` alone."""
    texts = [document.text for document in docstring_corpus(limit_chars=2_000_000)]
    tokenizer = train_bpe(texts[::4], 8_000)
    backend = tokenizer.backend_tokenizer
    batches = [texts[i : i + 1024] for i in range(0, len(texts), 1024)]
    with tempfile.TemporaryDirectory() as directory:

        def ours() -> TokenStore:
            return pack((Document("", text) for text in texts), tokenizer, LENGTH, out=Path(directory) / "store").store

        theirs = [ids for batch in batches for one in backend.encode_batch(batch) for ids in (*one.ids, EOS)]
        assert ours().tokens.tolist() == theirs
        seconds = alternate(
            {
                "encode_batch": lambda: deque(map(backend.encode_batch, batches), maxlen=0),
                "ours": ours,
            },
            repeats=8,
        )
    report(
        "How much of a fast tokenizer's own speed is left when its tokens are packed on disk?",
        {"ours' speed over encode_batch's": (seconds["encode_batch"] / seconds["ours"], Bound("higher", 0.8))},
        seconds=seconds,
        checked=f"both give the same {len(theirs):,} tokens",
        notes={
            "tokens": len(theirs),
            "documents": len(texts),
            "tokens_per_second": round(len(theirs) / seconds["ours"]),
            "time": "processor seconds, one thread",
        },
    )


def main() -> None:
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    datasets.disable_progress_bars()
    tokens, offsets = documents()
    column = pa.LargeListArray.from_arrays(offsets, pa.array(tokens))
    dataset = datasets.Dataset(pa.table({"input_ids": column}))
    checked = check(tokens, offsets, dataset)
    separate = [tokens[a:b] for a, b in pairwise(offsets)]
    seconds = alternate(
        {
            "datasets.map": lambda: deque(by_map(dataset), maxlen=0),
            "ours": lambda: deque(by_stream(tokens, offsets), maxlen=0),
            "numpy": lambda: np.concatenate(separate).reshape(-1, LENGTH),
        },
        repeats=12,
    )
    report(
        "How much faster do tokenised documents become batches of blocks than by datasets.map?",
        {
            "datasets.map over ours": (seconds["datasets.map"] / seconds["ours"], Bound("higher", floor=50)),
            "ours' speed over numpy's": (seconds["numpy"] / seconds["ours"], Bound("higher", None, 0.5)),
        },
        seconds=seconds,
        checked=checked,
        notes={
            "tokens": len(tokens),
            "documents": len(offsets) - 1,
            "tokens_per_second": round(len(tokens) / seconds["ours"]),
            "time": "processor seconds, one thread",
        },
    )
    tokenising()


if __name__ == "__main__":
    main()
