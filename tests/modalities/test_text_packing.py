from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.packing import (
    MaskedStream,
    MixedStream,
    PackedBlocks,
    PackedStream,
    TokenStore,
    mask_tokens,
    tokenize_documents,
)
from headwater.modalities.text.tokenizers import train_bpe

TEXTS = [
    " ".join(random.Random(i).choices(["the", "cat", "sat", "on", "a", "mat", "again"], k=3 + i % 17))
    for i in range(120)
]
DOCS = [Document(str(i), text) for i, text in enumerate(TEXTS)]
TOKENIZER = train_bpe(TEXTS, 280, extra_tokens=["<mask>"])


@pytest.fixture(scope="module")
def store():
    return tokenize_documents(DOCS, TOKENIZER, batch_size=7)


def numbered_store(tokens):
    return TokenStore(np.arange(tokens, dtype=np.int32), np.array([0, tokens]), 1, f"numbers {tokens}")


def test_oracle_tokens_equal_a_plain_loop(store):
    flat, offsets = [], [0]
    for text in TEXTS:
        flat += [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]
        offsets.append(len(flat))
    assert store.tokens.tolist() == flat
    assert store.offsets.tolist() == offsets


def test_oracle_on_disk_equals_in_memory(store, tmp_path):
    mapped = tokenize_documents(iter(DOCS), TOKENIZER, out=tmp_path / "store", batch_size=50)
    assert isinstance(mapped.tokens, np.memmap)
    again = TokenStore.open(tmp_path / "store")
    for other in (mapped, again):
        assert (other.tokens == store.tokens).all()
        assert (other.offsets == store.offsets).all()
        assert (other.fingerprint, other.eos_token_id) == (store.fingerprint, store.eos_token_id)
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == ["offsets.npy", "store.json", "tokens.npy"]


def test_fault_interrupted_store_does_not_open(tmp_path):
    tokenize_documents(DOCS, TOKENIZER, out=tmp_path)

    def broken():
        yield DOCS[0]
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        tokenize_documents(broken(), TOKENIZER, out=tmp_path)
    with pytest.raises(FileNotFoundError, match="no complete token store"):
        TokenStore.open(tmp_path)


def test_property_fingerprint_sees_borders():
    joined = tokenize_documents([Document("0", "a a")], TOKENIZER).fingerprint
    cut = tokenize_documents([Document("0", "a"), Document("1", " a")], TOKENIZER).fingerprint
    assert joined != cut


def test_rejects_no_documents_and_no_eos():
    with pytest.raises(CorpusError, match="0 documents"):
        tokenize_documents([], TOKENIZER)
    bare = train_bpe(TEXTS, 270)
    bare.eos_token = None
    with pytest.raises(ValueError, match="neither an eos nor a sep"):
        tokenize_documents(DOCS, bare)


def test_oracle_blocks_equal_naive_packing(store):
    flat = store.tokens.tolist()
    naive = [flat[i : i + 16] for i in range(0, len(flat) - 15, 16)]
    owners = [d for d in range(len(TEXTS)) for _ in range(store.offsets[d], store.offsets[d + 1])]
    blocks = PackedBlocks(store, 16, seed=4)
    assert len(blocks) == len(naive)
    assert blocks.blocks(range(len(naive))).tolist() == naive
    ids = blocks.document_ids(range(len(naive)))
    assert ids.ravel().tolist() == owners[: ids.size]
    read = sorted(item["input_ids"].tolist() for item in blocks)
    assert read == sorted(naive)


def test_property_map_style_equals_stream(store):
    blocks, stream = PackedBlocks(store, 16, seed=4), PackedStream(store, 16, rows=5, seed=4)
    position = 3 * len(blocks) + 2
    row = stream.batch(position // 5)
    assert blocks[position]["input_ids"].tolist() == row["input_ids"][position % 5].tolist()
    assert blocks[position]["row"] == row["row"][position % 5] == position


def test_property_packed_batch_is_the_same_in_any_slices(store):
    stream = PackedStream(store, 16, rows=6, seed=1, document_ids=True)
    for step in (0, 7, 1234):
        whole = stream.batch(step)
        parts = [stream.batch(step, 0, 2), stream.batch(step, 2, 2), stream.batch(step, 2, 6)]
        assert set(whole) == {"input_ids", "labels", "row", "document_ids"}
        for key, value in whole.items():
            assert torch.equal(torch.cat([p[key] for p in parts]), value)
            assert value.dtype == torch.int64
        assert torch.equal(whole["labels"], whole["input_ids"])
        assert whole["labels"].data_ptr() != whole["input_ids"].data_ptr()


def test_equation_packed_epochs():
    stream = PackedStream(numbered_store(100), 10, rows=4)
    assert stream.epochs(5) == 2.0  # 20 rows of 10 blocks


def test_rejects_bad_packing(store):
    with pytest.raises(ValueError, match="9 tokens, less than one block of 10"):
        PackedBlocks(numbered_store(9), 10)
    with pytest.raises(ValueError, match="seq_len must be at least 2"):
        PackedBlocks(store, 1)
    with pytest.raises(ValueError, match="rows must be >= 1"):
        PackedStream(store, 8, rows=0)
    for bad in [(-1, 0, 1), (0, 2, 1), (0, 0, 5)]:
        with pytest.raises(ValueError, match="0 <= start <= stop <= 4"):
            PackedStream(store, 8, rows=4).batch(*bad)


def mixture(weights, rows, seed=0):
    return MixedStream(
        [(PackedBlocks(numbered_store(40 + 8 * p), 4, seed=p), w) for p, w in enumerate(weights)], rows, seed
    )


@pytest.mark.parametrize(
    "weights", [[0.75, 0.25], [0.1, 0.2, 0.7], [1, 1, 1], [0.5, 0.3, 0.1, 0.05, 0.03, 0.02], [1.0]]
)
@pytest.mark.parametrize("rows", [1, 3, 32])
def test_equation_counts_stay_within_one_row_over_1000_batches(weights, rows):
    stream = mixture(weights, rows)
    exact = np.array(weights) / sum(weights)
    worst = max(np.abs(stream.counts(k) - k * rows * exact).max() for k in range(1001))
    assert worst < 1
    assert all(stream.counts(k).sum() == k * rows for k in range(1001))


def test_property_random_weights_stay_within_one_row_of_the_shares_in_use():
    rng = np.random.default_rng(0)
    for parts in (2, 3, 5, 8):
        weights = rng.dirichlet(np.full(parts, 0.5)) + 1e-4
        stream = mixture(weights, rows=1)
        assert np.abs(np.array(stream.weights) - weights / weights.sum()).max() < 2e-5
        steps = np.unique(np.concatenate([np.arange(2000), rng.integers(0, 10**7, 2000)]))
        gaps = [np.abs(stream.counts(int(k)) - k * np.array(stream.weights)).max() for k in steps]
        assert max(gaps) < 1


def test_oracle_counts_equal_iterating_and_seeking_equals_iterating():
    stream, seeker = mixture([0.55, 0.3, 0.15], rows=7, seed=3), mixture([0.55, 0.3, 0.15], rows=7, seed=3)
    totals = np.zeros(3, dtype=int)
    read = []
    for step in range(60):
        assert (stream.counts(step) == totals).all()
        read.append(stream.batch(step))
        totals += np.bincount(read[-1]["part"], minlength=3)
    for step in (59, 0, 31, 30):
        again = seeker.batch(step)
        assert all(torch.equal(again[key], read[step][key]) for key in again)


def test_property_each_part_reads_each_of_its_blocks_once_an_epoch():
    stream = mixture([0.6, 0.4], rows=5)
    seen = [[], []]
    for step in range(40):
        batch = stream.batch(step)
        for part, ids in zip(batch["part"].tolist(), batch["input_ids"][:, 0].tolist(), strict=True):
            seen[part].append(ids // 4)
    for part, blocks in enumerate((10, 12)):
        assert len(seen[part]) == stream.counts(40)[part]
        assert stream.epochs(40)[part] == len(seen[part]) / blocks
        for begin in range(0, len(seen[part]) - blocks + 1, blocks):
            assert sorted(seen[part][begin : begin + blocks]) == list(range(blocks))


def test_property_mixed_batch_is_the_same_in_any_slices():
    stream = mixture([0.6, 0.4], rows=6, seed=2)
    whole, parts = stream.batch(11), [stream.batch(11, 0, 1), stream.batch(11, 1, 6)]
    assert all(torch.equal(torch.cat([p[k] for p in parts]), whole[k]) for k in whole)


def test_property_fingerprints_name_what_changes_the_batches():
    prints = [
        mixture(w, r, s).fingerprint for w, r, s in [([1, 1], 4, 0), ([1, 2], 4, 0), ([1, 1], 5, 0), ([1, 1], 4, 1)]
    ]
    assert len(set(prints)) == 4
    assert mixture([1, 1], 4, 0).fingerprint == mixture([0.5, 0.5], 4, 0).fingerprint == prints[0]


def test_degenerate_zero_weight_is_never_read():
    stream = mixture([0.0, 1.0], rows=4)
    assert stream.counts(1000).tolist() == [0, 4000]
    assert set(stream.batch(3)["part"].tolist()) == {1}


def test_rejects_bad_mixtures():
    blocks = PackedBlocks(numbered_store(40), 4)
    with pytest.raises(ValueError, match="at least one part"):
        MixedStream([], 4)
    with pytest.raises(ValueError, match=r"one block length; got \[4, 8\]"):
        MixedStream([(blocks, 1), (PackedBlocks(numbered_store(40), 8), 1)], 4)
    for weights in ([-1, 2], [0, 0], [float("nan"), 1]):
        with pytest.raises(ValueError, match="weights must be finite"):
            mixture(weights, 4)
    with pytest.raises(ValueError, match="below 1/65536"):
        mixture([1e-7, 1], 4)


def test_equation_masking_rates():
    ids = np.full((400, 100), 200)
    inputs, labels = mask_tokens(ids, np.arange(400), TOKENIZER, seed=0)
    target = labels != -100
    # 40 000 draws: standard deviation of the rate 0.0018; of the shares of 6 000 targets 0.0052.
    assert abs(target.mean() - 0.15) < 0.009
    assert abs((inputs[target] == TOKENIZER.mask_token_id).mean() - 0.8) < 0.026
    assert abs((inputs[target] == 200).mean() - 0.1) < 0.026
    assert (labels[target] == 200).all()
    assert (inputs[~target] == 200).all()


def test_property_masks_depend_on_seed_and_row_only():
    ids = np.random.default_rng(0).integers(10, 270, (8, 30))
    rows = np.array([5, 9, 2, 7, 1, 0, 3, 12])
    inputs, labels = mask_tokens(ids, rows, TOKENIZER, seed=3)
    order = [4, 0, 6]
    small = mask_tokens(ids[order], rows[order], TOKENIZER, seed=3)
    assert (small[0] == inputs[order]).all()
    assert (small[1] == labels[order]).all()
    shorter = mask_tokens(ids[:, :11], rows, TOKENIZER, seed=3)
    assert (shorter[0] == inputs[:, :11]).all()
    assert (mask_tokens(ids, rows, TOKENIZER, seed=4)[1] != labels).any()


def test_property_special_tokens_are_never_targets():
    ids = np.full((50, 40), TOKENIZER.eos_token_id)
    inputs, labels = mask_tokens(ids, np.arange(50), TOKENIZER, seed=0)
    assert (inputs == ids).all()
    assert (labels == -100).all()


def test_property_masked_stream_masks_each_epoch_anew(store):
    stream = MaskedStream(PackedStream(store, 16, rows=4, seed=1), TOKENIZER, seed=2)
    batch, plain = stream.batch(2), PackedStream(store, 16, rows=4, seed=1).batch(2)
    target = batch["labels"] != -100
    assert torch.equal(batch["labels"][target], plain["input_ids"][target])
    assert torch.equal(batch["input_ids"][~target], plain["input_ids"][~target])
    assert torch.equal(torch.cat([stream.batch(2, 0, 1)["labels"], stream.batch(2, 1)["labels"]]), batch["labels"])
    first, second = stream.batch(0)["labels"] != -100, stream.batch(len(PackedBlocks(store, 16)))["labels"] != -100
    assert not torch.equal(first, second)


def test_rejects_masking_without_a_mask_token(store):
    plain = train_bpe(TEXTS, 270)
    with pytest.raises(ValueError, match="tokenizer with a mask token"):
        MaskedStream(PackedStream(store, 16, rows=4), plain)
    with pytest.raises(ValueError, match=r"probability must be in \(0, 1\)"):
        MaskedStream(PackedStream(store, 16, rows=4), TOKENIZER, probability=0)


def test_fault_store_manifest_is_plain_json(tmp_path):
    tokenize_documents(DOCS, TOKENIZER, out=tmp_path)
    about = json.loads((tmp_path / "store.json").read_text())
    assert about["documents"] == len(DOCS)
