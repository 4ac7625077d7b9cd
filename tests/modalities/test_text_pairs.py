"""Sources and targets: tokens, batches, likelihoods and answers against what transformers does with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, BartConfig, PreTrainedTokenizerBase, T5Config

from headwater.core.lora import LoraSpec
from headwater.core.recipe import ModelRef
from headwater.modalities.models import ModelError
from headwater.modalities.text.pairs import Encoded, PairModel, Pairs, PairStream, open_pair_model, pad_pairs
from headwater.modalities.text.tokenizers import train_bpe

WORDS = "sum mean row axis sort fill cast graph node edge path tree flow cut"
PAIRS = Pairs(["sum row axis", "mean", "graph node edge path"], ["sort", "fill cast", "tree"])


@pytest.fixture(scope="module")
def causal(tiny_causal: Path) -> PairModel:
    return open_pair_model(ModelRef(name=str(tiny_causal)), max_source=40, max_target=8)


@pytest.fixture(scope="module", params=["t5", "bart"])
def seq2seq(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PairModel:
    tokenizer = train_bpe([WORDS] * 20, 300)
    home = tmp_path_factory.mktemp(request.param)
    common = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    if request.param == "t5":
        config = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0, **common)
    else:
        config = BartConfig(
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=48,
            forced_eos_token_id=None,
            bos_token_id=tokenizer.bos_token_id,
            **common,
        )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSeq2SeqLM.from_config(config)
    model.save_pretrained(home)
    tokenizer.save_pretrained(home)
    return open_pair_model(ModelRef(name=str(home)), max_source=40, max_target=8)


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_equation_a_causal_pair_is_bos_source_target_eos(causal: PairModel) -> None:
    tokenizer = causal.tokenizer
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    first = causal.encode(PAIRS)[0]
    assert first.source == [start, *ids(tokenizer, "sum row axis")]
    assert first.target == [*ids(tokenizer, " sort"), tokenizer.eos_token_id]


def test_equation_padding_is_never_predicted() -> None:
    pairs = [Encoded([1, 2, 3], [4, 5]), Encoded([6], [7])]
    causal = pad_pairs(pairs, "causal", pad=0)
    assert causal["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]
    assert causal["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert causal["labels"].tolist() == [[-100, -100, -100, 4, 5], [-100, 7, -100, -100, -100]]
    both = pad_pairs(pairs, "seq2seq", pad=0)
    assert both["input_ids"].tolist() == [[1, 2, 3], [6, 0, 0]]
    assert both["labels"].tolist() == [[4, 5], [7, -100]]


def test_property_a_long_source_loses_its_beginning_before_a_causal_target(tiny_causal: Path) -> None:
    short = open_pair_model(ModelRef(name=str(tiny_causal)), max_source=4, max_target=2)
    whole = ids(short.tokenizer, WORDS)
    encoded = short.encode(Pairs([WORDS], [WORDS]))[0]
    assert encoded.source[1:] == whole[-3:]
    assert encoded.target == ids(short.tokenizer, " " + WORDS)[:2]


def test_property_source_and_target_share_the_positions(tiny_causal: Path) -> None:
    model = open_pair_model(ModelRef(name=str(tiny_causal)), max_source=1000, max_target=24)
    assert model.max_source == 64 - 24


def test_oracle_nats_are_the_models_own_loss(causal: PairModel, seq2seq: PairModel) -> None:
    for model in (causal, seq2seq):
        found = model.nats(PAIRS, batch_size=2)
        for row, encoded in enumerate(model.encode(PAIRS)):
            with torch.no_grad():
                loss = model.model(**pad_pairs([encoded], model.kind, model.pad)).loss
            assert found[row] == pytest.approx(float(loss), rel=1e-5)


def test_oracle_the_objective_is_the_models_own_loss(causal: PairModel, seq2seq: PairModel) -> None:
    for model in (causal, seq2seq):
        batch = model.stream(PAIRS, rows=3, seed=0).batch(0)
        loss = model.objective(model.model, batch)
        own = model.model(**{name: value for name, value in batch.items() if name != "row"}).loss
        assert (loss.total / loss.count).item() == pytest.approx(own.item(), rel=1e-5)


def test_oracle_answers_do_not_depend_on_what_shares_a_batch(causal: PairModel, seq2seq: PairModel) -> None:
    sources = ["sum row", "graph node edge", "sum row", "mean axis", "cut"]
    for model in (causal, seq2seq):
        together = model.answers(sources)
        assert together == [model.answers([source])[0] for source in sources]
        assert together[0] == together[2]


def test_property_order_is_a_function_of_the_step() -> None:
    pairs = [Encoded([n], [n]) for n in range(1, 8)]
    stream = PairStream(pairs, "causal", rows=3, seed=5, pad=0)
    epoch = torch.cat([stream.batch(step)["row"] for step in range(7)])  # three epochs of seven
    for begin in range(0, 21, 7):
        assert sorted(epoch[begin : begin + 7].tolist()) == list(range(7))
    assert torch.equal(stream.batch(4, 1, 3)["row"], stream.batch(4)["row"][1:3])
    assert stream.fingerprint != PairStream(pairs, "causal", rows=3, seed=6, pad=0).fingerprint


def test_property_adapters_start_as_the_model(tiny_causal: Path, causal: PairModel) -> None:
    adapted = open_pair_model(ModelRef(name=str(tiny_causal)), max_source=40, max_target=8, lora=LoraSpec(r=2))
    np.testing.assert_allclose(adapted.nats(PAIRS), causal.nats(PAIRS), rtol=1e-6)
    trained = [name for name, p in adapted.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_degenerate_no_source(causal: PairModel) -> None:
    assert causal.answers([]) == []
    assert causal.nats(Pairs([], [])).shape == (0,)


def test_rejects_what_cannot_answer(tiny_masked: Path, tiny_causal: Path) -> None:
    with pytest.raises(ModelError, match="is a masked model; targets are written by"):
        open_pair_model(ModelRef(name=str(tiny_masked)))
    with pytest.raises(ModelError, match="has 64 positions, which targets of 63 tokens leave no room in"):
        open_pair_model(ModelRef(name=str(tiny_causal)), max_target=63)
    with pytest.raises(ValueError, match="every source needs a target; got 2 and 1"):
        Pairs(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="no pair to learn from"):
        PairStream([], "causal", rows=1, seed=0, pad=0)
    with pytest.raises(ValueError, match="pair 1 has a target without a token"):
        PairStream([Encoded([1], [2]), Encoded([1], [])], "causal", rows=1, seed=0, pad=0)
