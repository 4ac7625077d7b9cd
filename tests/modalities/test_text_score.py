from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from headwater.modalities.text.docs import Document
from headwater.modalities.text.packing import mask_tokens
from headwater.modalities.text.score import Scored, bits_per_byte, linear_probe, masked_bits
from headwater.modalities.text.tiny import PRESETS, tiny_bert, tiny_llama, tiny_t5
from headwater.modalities.text.tokenizers import train_bpe

TEXTS = ["the cat sat on the mat", "naïve ☃", "", "a", "the dog and the cat and the bird met on a long road " * 3]
TOKENIZER = train_bpe(TEXTS, 280, extra_tokens=["<mask>"])


@pytest.fixture(scope="module")
def llama():
    return sharpen(tiny_llama(TOKENIZER, **PRESETS["nano"], context=200, generator_seed=0))


def sharpen(model):
    """Larger weights: predictions far from uniform, so that a wrong position shows."""
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    return model


def log_probability(model, ids, place):
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids[:place]])).logits[0, -1].double(), dim=-1)[ids[place]].item()


def test_oracle_bits_per_byte_equals_token_by_token(llama):
    scored = bits_per_byte(llama, TOKENIZER, TEXTS)
    for text, nats, count in zip(TEXTS, scored.nats, scored.counts, strict=True):
        ids = [TOKENIZER.eos_token_id, *TOKENIZER(text)["input_ids"]]
        expected = -sum(log_probability(llama, ids, place) for place in range(1, len(ids)))
        assert nats == pytest.approx(expected, abs=1e-4)  # float32 logits, up to 100 terms
        assert count == len(text.encode())
    total = scored.nats.sum() / math.log(2) / sum(len(t.encode()) for t in TEXTS)
    assert scored.bits_per_byte == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("window", [2, 7, 8, 16])
def test_oracle_windows_equal_the_rule_by_hand(llama, window):
    scored = bits_per_byte(llama, TOKENIZER, TEXTS, window=window, batch_size=5)
    stride = window // 2
    for text, nats in zip(TEXTS, scored.nats, strict=True):
        ids = [TOKENIZER.eos_token_id, *TOKENIZER(text)["input_ids"]]
        expected = 0.0
        for place in range(1, len(ids)):
            # The first window that holds the token: it begins at the smallest multiple of the stride that reaches it.
            begin = 0 if place < window else stride * math.ceil((place - window + 1) / stride)
            expected -= log_probability(llama, ids[begin:], place - begin)
        assert nats == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_property_sums_do_not_depend_on_the_batch_size_or_order(llama, batch_size):
    base = bits_per_byte(llama, TOKENIZER, TEXTS, window=16, batch_size=3)
    other = bits_per_byte(llama, TOKENIZER, TEXTS[::-1], window=16, batch_size=batch_size)
    np.testing.assert_allclose(other.nats[::-1], base.nats, atol=1e-4)


def test_property_model_is_given_back_as_it_was(llama):
    llama.train()
    bits_per_byte(llama, TOKENIZER, TEXTS[:1])
    assert llama.training
    llama.eval()
    assert all(p.grad is None and p.requires_grad for p in llama.parameters())


def test_property_documents_and_strings_score_alike(llama):
    docs = [Document(str(i), text) for i, text in enumerate(TEXTS)]
    assert (bits_per_byte(llama, TOKENIZER, docs).nats == bits_per_byte(llama, TOKENIZER, TEXTS).nats).all()


def test_degenerate_empty_and_none(llama):
    scored = bits_per_byte(llama, TOKENIZER, [""])
    assert (scored.nats.tolist(), scored.counts.tolist()) == ([0.0], [0])
    with pytest.raises(ValueError, match="nothing was scored: 1 documents with 0 bytes"):
        _ = scored.bits_per_byte
    assert bits_per_byte(llama, TOKENIZER, []).nats.shape == (0,)


def test_rejects_what_cannot_be_scored(llama):
    bare = train_bpe(TEXTS, 270)
    bare.eos_token = None
    with pytest.raises(ValueError, match="a bos or eos token is needed"):
        bits_per_byte(llama, bare, TEXTS)
    with pytest.raises(ValueError, match="window must be at least 2"):
        bits_per_byte(llama, TOKENIZER, TEXTS, window=1)
    with pytest.raises(ValueError, match="count masked tokens, not bytes"):
        _ = Scored(np.ones(1), np.ones(1, dtype=np.int64), "masked token").bits_per_byte


def test_equation_bits_per_unit():
    # 2 ln2 + 4 ln2 nats over 1 + 2 units: 6 bits by 3.
    scored = Scored(np.array([2, 4]) * math.log(2), np.array([1, 2]), "byte")
    assert scored.bits_per_byte == pytest.approx(2.0, rel=1e-12)


DOCS = [Document(f"doc{i}", "the cat and the dog met on a long road to the mat " * (1 + i % 4)) for i in range(6)]


def test_oracle_masked_bits_equal_a_plain_loop():
    model = sharpen(tiny_bert(TOKENIZER, **PRESETS["nano"], context=100, generator_seed=0))
    scored = masked_bits(model, TOKENIZER, DOCS, seed=3, window=20, batch_size=4)
    whole = masked_bits(model, TOKENIZER, DOCS, seed=3, batch_size=1)
    assert (scored.counts == whole.counts).all()
    import hashlib

    for doc, nats, count in zip(DOCS, scored.nats, scored.counts, strict=True):
        key = int.from_bytes(hashlib.blake2b(doc.id.encode(), digest_size=8).digest(), "little", signed=True)
        ids = np.array([TOKENIZER(doc.text)["input_ids"]])
        inputs, labels = mask_tokens(ids, [key], TOKENIZER, seed=3)
        expected = 0.0
        for begin in range(0, ids.shape[1], 20):
            with torch.no_grad():
                logits = model(torch.from_numpy(inputs[:, begin : begin + 20])).logits[0].double().log_softmax(-1)
            for place, label in enumerate(labels[0, begin : begin + 20]):
                expected -= logits[place, label].item() if label != -100 else 0.0
        assert nats == pytest.approx(expected, abs=1e-4)
        assert count == (labels != -100).sum()


def test_property_masks_are_fixed_by_document():
    model = tiny_bert(TOKENIZER, **PRESETS["nano"], context=100, generator_seed=0)
    base = masked_bits(model, TOKENIZER, DOCS)
    np.testing.assert_allclose(masked_bits(model, TOKENIZER, DOCS[::-1]).nats[::-1], base.nats, atol=1e-4)
    assert (masked_bits(model, TOKENIZER, DOCS, seed=1).counts != base.counts).any()
    assert base.bits_per_unit > 0


def test_property_special_tokens_frame_each_piece():
    framed = train_bpe(TEXTS, 280, extra_tokens=["<mask>", "<cls>", "<sep>"])
    framed.cls_token, framed.sep_token = "<cls>", "<sep>"
    model = tiny_bert(framed, **PRESETS["nano"], context=30, generator_seed=0)
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    masked_bits(model, framed, DOCS[3:4], batch_size=1)
    assert all(ids[0, 0] == framed.cls_token_id and ids[0, -1] == framed.sep_token_id for ids in seen)
    assert max(ids.shape[1] for ids in seen) == 30
    assert sum(ids.shape[1] - 2 for ids in seen) == len(framed(DOCS[3].text)["input_ids"])


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert, tiny_t5])
def test_learns_probe_reads_what_is_in_the_text_and_not_what_is_not(make):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 120)
    texts = [" ".join(rng.choice(["cat", "mat", "dog"] if y else ["road", "bird", "long"], 12)) for y in labels]
    model = make(TOKENIZER, **PRESETS["nano"], generator_seed=0)
    probe = linear_probe(model, TOKENIZER, texts, labels, n_train=40, seeds=[0, 1])
    assert probe.accuracy.min() > 0.9
    assert [len(c) for c in probe.correct] == [80, 80]
    assert probe.accuracy[1] == probe.correct[1].mean()
    assert (probe.test_items[0] != probe.test_items[1]).any()
    noise = linear_probe(model, TOKENIZER, texts, rng.permutation(labels), n_train=40, seeds=[0])
    assert noise.accuracy[0] < 0.75  # chance 0.5, standard deviation 0.06


def test_oracle_probe_features_ignore_padding_and_batching():
    from headwater.modalities.text.score import _mean_pooled

    model = tiny_llama(TOKENIZER, **PRESETS["nano"], generator_seed=0)
    texts = [t for t in TEXTS if t]
    pooled = _mean_pooled(model, TOKENIZER, texts, 128, 3, None)
    for text, row in zip(texts, pooled, strict=True):
        ids = torch.tensor([TOKENIZER(text)["input_ids"]])
        with torch.no_grad():
            expected = model.model(ids).last_hidden_state[0].mean(dim=0).numpy()
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_rejects_probe_without_enough_labels(llama):
    texts, labels = ["a", "b"] * 10, [0, 1] * 10
    with pytest.raises(ValueError, match="fewer than 3 texts"):
        linear_probe(llama, TOKENIZER, texts, labels, n_train=4, seeds=[0])
    with pytest.raises(ValueError, match=r"labels must have shape \(20,\)"):
        linear_probe(llama, TOKENIZER, texts, labels[:-1], n_train=4, seeds=[0])
    with pytest.raises(ValueError, match="text 1 has no token"):
        linear_probe(llama, TOKENIZER, ["a", "", "b"], [0, 1, 0], n_train=2, seeds=[0])
