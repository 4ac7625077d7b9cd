"""Examples: what a formatter makes, how they are packed, and that packed documents do not see each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import sentences
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from headwater.core.order import VirtualIndex
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.examples import (
    PackedExamples,
    PackingCollator,
    PlainFormatter,
    best_fit,
    formatted,
    start_token_id,
    target_counts,
)
from headwater.modalities.text.masks import keeps_documents_apart, packed_inputs
from headwater.modalities.text.objectives import CausalObjective, PackedObjective
from headwater.modalities.text.packing import MixedStream, PackedBlocks, PackedStream, tokenize_documents
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.tokenizers import train_bpe

TEXTS = [*sentences("domain", 30, words=6), *sentences("general", 30, words=40)]
TOKENIZER = train_bpe(TEXTS, 320)
DOCS = [Document(str(i), text) for i, text in enumerate(TEXTS)]
EOS = TOKENIZER.eos_token_id
T = 32


def packed(seq_len: int = T, docs: Sequence[Document] = DOCS) -> PackedExamples:
    return PackedExamples(formatted(docs, PlainFormatter(TOKENIZER), seq_len), seq_len, pad_token_id=0)


def busiest(count: int) -> dict[str, torch.Tensor]:
    """The rows that hold the most documents."""
    columns = packed().columns(np.arange(len(packed())))
    most = np.argsort(-columns["document_ids"].max(axis=1), kind="stable")[:count]
    assert columns["document_ids"][most].max(axis=1).min() > 1
    return {name: torch.from_numpy(values[most]) for name, values in columns.items()}


# -- best fit


def test_equation_best_fit_by_hand() -> None:
    # Longest first: 7 opens row 0, 6 opens row 1, 4 fills row 1, 3 fills row 0, 2 opens row 2.
    assert best_fit([2, 7, 3, 6, 4], 10).tolist() == [2, 0, 0, 1, 1]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 20), max_size=60))
def test_property_rows_hold_what_fits_and_no_two_could_be_one(lengths: list[int]) -> None:
    rows = best_fit(lengths, 20)
    used = np.bincount(rows, lengths) if lengths else np.empty(0)
    assert (used <= 20).all()
    assert (used > 0).all()
    # First opened, best fit: any two rows together overfill one, or they would have been one.
    assert all(a + b > 20 for i, a in enumerate(used) for b in used[:i])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=30))
def test_oracle_best_fit_is_the_plain_search(lengths: list[int]) -> None:
    left: list[int] = []
    expected = [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = [(space, row) for row, space in enumerate(left) if space >= lengths[i]]
        row = min(room)[1] if room else len(left)
        left += [12] * (not room)
        left[row] -= lengths[i]
        expected[i] = row
    found = best_fit(lengths, 12)
    # Rows of equal space are interchangeable: the same fillings, not the same numbers.
    fillings = [sorted(np.bincount(rows, lengths)) for rows in (found, expected)]
    assert fillings[0] == fillings[1]


def test_rejects_lengths_that_fit_no_row() -> None:
    for wrong in ([11], [0, 3]):
        with pytest.raises(ValueError, match="lengths must be from 1 to 10"):
            best_fit(wrong, 10)
    assert best_fit([], 10).tolist() == []


# -- formatting


def test_oracle_plain_examples_end_to_end_are_the_plain_store() -> None:
    mine, theirs = formatted(DOCS, PlainFormatter(TOKENIZER)), tokenize_documents(DOCS, TOKENIZER)
    assert np.array_equal(mine.tokens, theirs.tokens)
    assert np.array_equal(mine.offsets, theirs.offsets)
    one = MixedStream([(PackedBlocks(mine, 16, 3), 1.0)], 4, 3).batch(5)
    other = MixedStream([(PackedBlocks(theirs, 16, 3), 1.0)], 4, 3).batch(5)
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_oracle_pieces_put_together_are_the_document() -> None:
    room = 9
    store = formatted(DOCS, PlainFormatter(TOKENIZER), room)
    assert store.owners is not None
    assert store.trained is not None
    start = start_token_id(TOKENIZER)
    for d in (0, 1, 40, 59):
        pieces = [store.tokens[store.offsets[i] : store.offsets[i + 1]] for i in np.flatnonzero(store.owners == d)]
        assert all(piece[0] == start and len(piece) <= room for piece in pieces)
        body = np.concatenate([piece[1:] for piece in pieces])
        assert body.tolist() == [*TOKENIZER(DOCS[d].text)["input_ids"], EOS]
    lengths = [len(TOKENIZER(d.text)["input_ids"]) + 1 for d in DOCS]
    assert target_counts(store, len(DOCS)).tolist() == lengths
    assert not store.trained[store.offsets[:-1]].any()


def test_rejects_a_room_without_room_and_nothing_to_format() -> None:
    with pytest.raises(ValueError, match="1 tokens leave no room for a document after a head of 1"):
        PlainFormatter(TOKENIZER)(DOCS[:1], 1)
    with pytest.raises(CorpusError, match="0 documents"):
        formatted([], PlainFormatter(TOKENIZER), T)
    bare = train_bpe(TEXTS, 300)
    bare.eos_token = None
    with pytest.raises(ValueError, match="no eos token"):
        PlainFormatter(bare)


def test_property_prefix_masks_survive_every_packing() -> None:
    store = formatted(DOCS, PlainFormatter(TOKENIZER))
    masked = type(store)(store.tokens, store.offsets, EOS, "x", np.arange(len(store.tokens)) % 3 == 0)
    rows = PackedBlocks(masked, 16)
    ids, labels = rows.columns([2]).values()
    assert ((labels == ids) == (np.arange(32, 48) % 3 == 0)).all()
    assert torch.equal(
        PackedStream(masked, 16, 2).batch(0)["labels"] == -100, PackedStream(masked, 16, 2).batch(0)["labels"] < 0
    )


# -- packing


def test_oracle_every_example_stands_once_and_whole() -> None:
    rows = packed()
    columns = rows.columns(np.arange(len(rows)))
    found = []
    for ids, labels, documents in zip(columns["input_ids"], columns["labels"], columns["document_ids"], strict=True):
        assert (labels[documents == 0] == -100).all()
        for number in range(1, documents.max() + 1):
            found.append((ids[documents == number].tolist(), labels[documents == number].tolist()))
    pieces = [example for examples in PlainFormatter(TOKENIZER)(DOCS, T) for example in examples]
    expected = [(list(e.features()["input_ids"]), list(e.features()["labels"])) for e in pieces]
    assert sorted(found) == sorted(expected)
    tokens = sum(len(ids) for ids, _ in expected)
    assert rows.padding == pytest.approx(1 - tokens / (len(rows) * T))
    assert rows.padding < 0.2


def test_equation_positions_start_anew() -> None:
    columns = packed().columns([0, 3])
    for documents, positions in zip(columns["document_ids"], columns["position_ids"], strict=True):
        for number in range(documents.max() + 1):
            here = positions[documents == number]
            assert here.tolist() == list(range(len(here)))


def test_property_the_collator_packs_as_the_store_does() -> None:
    pieces = [example.features() for examples in PlainFormatter(TOKENIZER)(DOCS, T) for example in examples]
    batch = PackingCollator(T, pad_token_id=0)(pieces)
    columns = packed().columns(np.arange(len(packed())))
    for name in ("input_ids", "labels", "document_ids", "position_ids"):
        assert np.array_equal(batch[name].numpy(), columns[name]), name
    with pytest.raises(ValueError, match="no example to pack"):
        PackingCollator(T, pad_token_id=0)([])


def test_property_a_walk_goes_on_where_it_stopped() -> None:
    rows = packed()
    whole = MixedStream([(rows, 1.0)], 2, walks=[VirtualIndex(len(rows), 5)])
    rest = MixedStream([(rows, 1.0)], 2, walks=[VirtualIndex(len(rows), 5, begin=6)])
    assert torch.equal(whole.batch(3)["input_ids"], rest.batch(0)["input_ids"])
    assert whole.fingerprint != rest.fingerprint
    assert whole.given(7).tolist() == [7]
    with pytest.raises(ValueError, match="begin >= 0"):
        VirtualIndex(3, 0, begin=-1)


# -- attention


def architecture(name: str, attention: str = "sdpa") -> PreTrainedModel:
    shapes: dict[str, dict[str, Any]] = {
        "llama": {"num_key_value_heads": 2, "intermediate_size": 32},
        "qwen2": {"num_key_value_heads": 2, "intermediate_size": 32},
        "gpt_neox": {"intermediate_size": 32},
        "gpt2": {},
    }
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320}
    ids = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": None}
    config = AutoConfig.for_model(name, **size, **shapes[name], **ids)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        for parameter in model.parameters():  # larger than at birth, so that what leaks would show
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_oracle_a_document_in_a_pack_has_the_logits_it_has_alone(name: str, attention: str) -> None:
    model = architecture(name, attention)
    batch = busiest(3)
    with torch.no_grad():
        inputs = packed_inputs(model, batch["input_ids"], batch["document_ids"], batch["position_ids"])
        together = model(**inputs).logits
        by_position = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    checked = 0
    for row, documents in enumerate(batch["document_ids"]):
        for number in range(1, int(documents.max()) + 1):
            here = documents == number
            with torch.no_grad():
                alone = model(input_ids=batch["input_ids"][row, here][None]).logits[0]
            # float32 sums in another order
            torch.testing.assert_close(together[row, here], alone, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(by_position[row, here], alone, atol=1e-5, rtol=1e-4)
            checked += 1
    assert checked > 4


def test_oracle_the_loss_of_a_pack_is_the_sum_of_its_documents() -> None:
    model = architecture("llama")
    batch = busiest(4)
    loss = PackedObjective()(model, batch)
    total, count = 0.0, 0
    for row, documents in enumerate(batch["document_ids"]):
        for number in range(1, int(documents.max()) + 1):
            here = documents == number
            one = CausalObjective()(model, {k: batch[k][row, here][None] for k in ("input_ids", "labels")})
            total, count = total + float(one.total), count + int(one.count)
    assert int(loss.count) == count
    assert float(loss.total) == pytest.approx(total, rel=1e-5)


def test_property_nothing_is_predicted_across_a_border() -> None:
    model = architecture("llama")
    batch = busiest(2)
    every = {**batch, "labels": batch["input_ids"].clone()}  # as if first tokens were targets too
    documents = int(batch["document_ids"].max(dim=1).values.sum()) + int((batch["document_ids"] == 0).any(dim=1).sum())
    assert int(PackedObjective()(model, every).count) == batch["input_ids"].numel() - documents


def test_oracle_the_layout_for_flash_attention_gives_the_same_loss() -> None:
    model = architecture("llama")
    batch = busiest(4)
    with torch.no_grad():
        masked = PackedObjective()(model, batch)
        # No flash kernel runs here; under sdpa transformers reads the same borders off the same positions.
        flat = {name: batch[name].reshape(1, -1) for name in ("input_ids", "labels", "position_ids")}
        opens = batch["position_ids"].reshape(1, -1) == 0
        flat["labels"] = flat["labels"].masked_fill(opens, -100)
        unmasked = CausalObjective()(model, flat)
        model.config._attn_implementation_internal = "flash_attention_2"
        inputs = packed_inputs(model, batch["input_ids"], batch["document_ids"], batch["position_ids"])
    assert float(unmasked.total) == pytest.approx(float(masked.total), rel=1e-5)
    assert inputs.keys() == {"input_ids", "position_ids"}
    assert all(torch.equal(inputs[name], flat[name]) for name in inputs)
    with pytest.raises(ValueError, match="flash attention tells documents apart by positions"):
        PackedObjective(restart_positions=False)(model, batch)


def test_property_running_positions_change_nothing_where_positions_are_relative() -> None:
    batch = busiest(2)
    relative, absolute = architecture("llama"), architecture("gpt2")
    with torch.no_grad():
        restart, running = (
            [float(PackedObjective(restart_positions=r)(m, batch).total) for m in (relative, absolute)]
            for r in (True, False)
        )
    assert restart[0] == pytest.approx(running[0], rel=1e-4)  # rotary angles of other positions round otherwise
    assert restart[1] != pytest.approx(running[1], rel=1e-4)


def test_property_models_that_ignore_the_borders_are_found() -> None:
    model = architecture("llama").train()
    model.config.use_cache = False
    assert keeps_documents_apart(model, 3)
    assert model.training
    model.config.use_cache = True  # transformers then takes positions that start anew for positions only
    assert not keeps_documents_apart(model, 3)


def test_degenerate_one_document_in_one_row() -> None:
    rows = packed(64, DOCS[:1])
    assert len(rows) == 1
    model = tiny_llama(TOKENIZER, 16, 1, 2, 32, 64, generator_seed=0)
    loss = PackedObjective()(model, {k: torch.from_numpy(v) for k, v in rows.columns([0]).items()})
    assert int(loss.count) == len(TOKENIZER(DOCS[0].text)["input_ids"]) + 1
