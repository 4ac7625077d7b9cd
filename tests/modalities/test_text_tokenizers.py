from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from headwater.modalities.text.tokenizers import character_tokenizer, train_bpe, word_tokenizer

TEXTS = [
    "the quick brown fox, the lazy dog",
    "a graph has nodes\n\tand edges",
    "naïve café ☃",
    "the graph of the dog",
] * 5
NASTY = ["", " leading", "two  spaces \n\n tabs\t", "日本語 🙂", "don 't , stop .", "\x00\x7f"]


def test_property_bpe_is_lossless_on_any_text():
    tokenizer = train_bpe(TEXTS, 300)
    for text in TEXTS + NASTY:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_property_bpe_is_deterministic_and_does_not_depend_on_order(tmp_path):
    first, second, third = train_bpe(TEXTS, 300), train_bpe(TEXTS, 300), train_bpe(TEXTS[::-1], 300)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str() == third.backend_tokenizer.to_str()


def test_equation_bpe_merges_the_most_frequent_pair_first():
    tokenizer = train_bpe(["abab ab abab"], 259)
    assert len(tokenizer) == 259
    assert tokenizer.convert_ids_to_tokens(258) == "ab"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_property_saved_tokenizer_opens_in_transformers(tmp_path):
    tokenizer = train_bpe(TEXTS, 300, extra_tokens=["<mask>", "<extra_id_0>"])
    tokenizer.save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    text = "naïve <extra_id_0> graphs"
    assert opened(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert opened.mask_token_id == tokenizer.mask_token_id is not None
    assert opened.convert_tokens_to_ids("<extra_id_0>") in opened(text)["input_ids"]


def test_equation_characters():
    tokenizer = character_tokenizer(["ba\nc"])
    ids = tokenizer("a\nb?")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "\n", "b", "<unk>"]
    assert tokenizer.decode(tokenizer("cab\nb")["input_ids"]) == "cab\nb"


def test_equation_words_by_frequency():
    tokenizer = word_tokenizer(["the cat , the dog", "the cat"], vocab_size=5)
    assert tokenizer.convert_ids_to_tokens(tokenizer("the dog, the cat")["input_ids"]) == [
        "the",
        "<unk>",
        "<unk>",
        "the",
        "cat",
    ]
    assert len(tokenizer) == 5


def test_rejects_small_vocabularies_and_empty_texts():
    with pytest.raises(ValueError, match="at least 258"):
        train_bpe(TEXTS, 257)
    with pytest.raises(ValueError, match="hold no character"):
        character_tokenizer([""])
    with pytest.raises(ValueError, match="hold no word"):
        word_tokenizer([" "])
    with pytest.raises(ValueError, match="must exceed the 3 special tokens"):
        word_tokenizer(TEXTS, vocab_size=3)
