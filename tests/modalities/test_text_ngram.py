from __future__ import annotations

import argparse
import inspect
import json
from collections import Counter, defaultdict
from math import log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from headwater.modalities.text import ngram
from headwater.modalities.text.ngram import NgramQuality, kneser_ney_discounts, split_words

SENTENCES = ["the cat sat", "the cat sat", "the cat ran", "the dog ran", "a dog sat"]
DOCSTRINGS = {
    module.__name__: [
        doc
        for _, item in sorted(vars(module).items())
        for part in [item, *(vars(item).values() if inspect.isclass(item) else [])]
        if (doc := getattr(part, "__doc__", None)) and inspect.getmodule(part) is not None and len(doc.split()) > 15
    ]
    for module in (json, argparse, inspect)
}


def random_texts(seed, number=40, alphabet="abcd  é", longest=30):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(alphabet), rng.integers(1, longest))) for _ in range(number)]


# --- equations


def test_equation_order_1_without_smoothing_is_the_relative_frequency():
    quality = NgramQuality(order=1, smoothing="none", unit="byte").fit(["aab", "b"])
    # 6 events: a a b end, b end. Each of a, b, end 2 times.
    log2_probs = quality.log2_probs(np.empty((1, 0)))[0]
    assert log2_probs[[ord("a"), ord("b"), quality.end_id_]] == pytest.approx(log2(2 / 6), abs=1e-12)
    assert np.isneginf(np.delete(log2_probs, [97, 98, quality.end_id_])).all()
    # "ab": a, b and the end cost log2 3 each; 2 bytes.
    assert quality.score(["ab", "ax"]) == pytest.approx([3 * log2(3) / 2, np.inf])


def test_equation_order_1_without_smoothing_on_words():
    quality = NgramQuality(order=1, smoothing="none", unit="word").fit(SENTENCES)
    # 20 events: the 4, cat 3, sat 3, dog 2, ran 2, unknown ("a") 1, end 5.
    assert list(quality.vocabulary_) == ["the", " cat", " sat", " dog", " ran"]
    expected = [4, 3, 3, 2, 2, 1, 5]
    assert quality.log2_probs(np.empty((1, 0)))[0] == pytest.approx(np.log2(np.array(expected) / 20), abs=1e-12)


def test_equation_discounts():
    # n1..n4 = 6, 2, 2, 1 and one 7: Y = 6/(6+4) = .6; D1 = 1 - 1.2*2/6, D2 = 2 - 1.8*2/2, D3+ = 3 - 2.4*1/2.
    counts = [1] * 6 + [2] * 2 + [3] * 2 + [4] + [7] + [0]
    assert kneser_ney_discounts(counts) == pytest.approx([0.6, 0.2, 1.8], abs=1e-12)


@pytest.mark.parametrize("counts", [[], [1, 2, 3], [1] * 2 + [2] + [3] * 9 + [4] * 9])
def test_degenerate_discounts_fall_back(counts):
    # The last: Y = 2/4, D2 = 2 - 1.5 * 9/1 < 0.
    assert kneser_ney_discounts(counts).tolist() == [0.5, 1.0, 1.5]


def test_equation_order_2_by_hand():
    quality = NgramQuality(order=2, unit="word").fit(SENTENCES)
    # "a" occurs once: unknown. Ids: the 0, cat 1, sat 2, dog 3, ran 4, unknown 5, end 6, start 7; V = 7.
    # Bigrams: start the 4, start unknown 1, the cat 3, the dog 1, unknown dog 1, cat sat 2, cat ran 1, dog ran 1,
    # dog sat 1, sat end 3, ran end 2. So n1..n4 = 6, 2, 2, 1, and D = .6, .2, 1.8 as above.
    # Left neighbours: the 1, cat 1, unknown 1; sat 2, dog 2, ran 2, end 2; of 11. n3 = 0, so D = .5, 1, 1.5;
    # what is removed, 3 * .5 + 4 * 1 = 5.5 of 11, goes to the uniform: gamma = .5.
    once, twice = 0.5 / 11 + 0.5 / 7, 1 / 11 + 0.5 / 7
    assert quality.discounts_ == pytest.approx(np.array([[0.5, 1.0, 1.5], [0.6, 0.2, 1.8]]))
    probs = 2 ** quality.log2_probs([[7], [0], [1], [2], [3], [5], [6]])
    start, the, cat, sat, dog, unknown, end = probs
    assert start[0] == pytest.approx((4 - 1.8) / 5 + (1.8 + 0.6) / 5 * once, abs=1e-12)
    assert the[1] == pytest.approx((3 - 1.8) / 4 + (1.8 + 0.6) / 4 * once, abs=1e-12)
    assert the[4] == pytest.approx((1.8 + 0.6) / 4 * twice, abs=1e-12)  # never seen after "the"
    assert cat[2] == pytest.approx((2 - 0.2) / 3 + (0.2 + 0.6) / 3 * twice, abs=1e-12)
    assert sat[6] == pytest.approx((3 - 1.8) / 3 + 1.8 / 3 * twice, abs=1e-12)
    assert end == pytest.approx([once, once, twice, twice, twice, once, twice], abs=1e-12)  # nothing follows the end

    near = -log2(start[0] * the[1] * cat[2] * sat[6]) / 11
    # " flew" is unknown and spelt: 5 bytes and a stop, of 257 symbols.
    far = (6 * log2(257) - log2(start[0] * the[3] * dog[5] * unknown[6])) / 12
    assert dog[5] == pytest.approx((0.6 + 0.6) / 2 * once, abs=1e-12)
    assert quality.score(["the cat sat", "the dog flew"]) == pytest.approx([near, far], abs=1e-12)


# --- oracles


def kneser_ney_by_dict(documents, order, size):
    """The same equations over tuples and dictionaries; ``size`` is V and the id of the start."""
    counts = [Counter() for _ in range(order + 1)]
    for document in documents:
        tokens = [size, *document]
        for last in range(1, len(tokens)):
            for k in range(1, min(order, last + 1) + 1):
                counts[k][tuple(tokens[last - k + 1 : last + 1])] += 1
    adjusted = {order: counts[order]}
    for k in range(1, order):
        left = defaultdict(set)
        for gram in counts[k + 1]:
            left[gram[1:]].add(gram[0])
        adjusted[k] = {gram: c if gram[0] == size else len(left[gram]) for gram, c in counts[k].items()}
    discounts = {k: [0.0, *kneser_ney_discounts(list(adjusted[k].values()))] for k in adjusted}
    following = {k: defaultdict(list) for k in adjusted}
    for k in adjusted:
        for gram, a in adjusted[k].items():
            following[k][gram[:-1]].append(a)

    def probability(context, token):
        if context is None:
            return 1 / size
        k = len(context) + 1
        lower = probability(context[1:] if context else None, token)
        after = following[k].get(context)
        if not after:
            return lower
        a = adjusted[k].get((*context, token), 0)
        gamma = sum(discounts[k][min(c, 3)] for c in after) / sum(after)
        return (a - discounts[k][min(a, 3)]) / sum(after) + gamma * lower

    return probability


@pytest.mark.parametrize("unit", ["byte", "word"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_oracle_plain_python_dictionaries(order, unit):
    texts = random_texts(order)
    quality = NgramQuality(order=order, unit=unit).fit(texts)
    size, start, end = quality.vocabulary_size_, quality.start_id_, quality.end_id_
    probability = kneser_ney_by_dict([[*quality.encode(t).tolist(), end] for t in texts], order, size)

    rng = np.random.default_rng(order)
    padded = [[start] * (order - 1) + quality.encode(text).tolist() for text in texts[:10]]
    contexts = [tokens[i : i + order - 1] for tokens in padded for i in range(len(tokens) - order + 2)][:40]
    contexts += rng.integers(0, size + 1, (5, order - 1)).tolist()
    expected = [[log2(probability(tuple(context), w)) for w in range(size)] for context in contexts]
    assert quality.log2_probs(np.reshape(contexts, (len(contexts), order - 1))) == pytest.approx(
        np.array(expected), abs=1e-9
    )

    unseen = random_texts(order + 100, number=10, alphabet="abcdef  é")
    bits = []
    for text in unseen:
        tokens = [start, *quality.encode(text).tolist(), end]
        total = -sum(
            log2(probability(tuple(tokens[max(0, t - order + 1) : t]), tokens[t])) for t in range(1, len(tokens))
        )
        if unit == "word":
            unknown = [word for word in split_words(text) if word not in quality.vocabulary_]
            total += log2(257) * sum(len(word.encode()) + 1 for word in unknown)
        bits.append(total / len(text.encode()))
    assert quality.score(unseen) == pytest.approx(bits, abs=1e-9)


@pytest.mark.parametrize("step", [1, 257, 1 << 20, 1 << 40])
def test_oracle_index_against_a_dictionary(step):
    # Steps of a power of two are the hard case for a multiplicative hash that keeps too few bits.
    keys = np.arange(0, 3000 * step, step)
    places = {key: place for place, key in enumerate(keys.tolist())}
    queries = np.concatenate([keys[::-1], keys + 1, keys * 2])
    assert ngram._Index(keys).find(queries).tolist() == [places.get(q, 3000) for q in queries.tolist()]


# --- properties


@pytest.mark.parametrize("smoothing", ["kneser_ney", "none"])
@pytest.mark.parametrize(("unit", "order"), [("byte", 1), ("byte", 3), ("word", 2), ("word", 5)])
def test_property_probabilities_sum_to_one(unit, order, smoothing):
    quality = NgramQuality(order=order, smoothing=smoothing, unit=unit).fit(random_texts(7))
    rng = np.random.default_rng(0)
    seen = np.concatenate([quality.encode(text) for text in random_texts(7)])
    windows = np.lib.stride_tricks.sliding_window_view(seen, max(order - 1, 1))[:50, : order - 1]
    contexts = np.concatenate([rng.integers(0, quality.start_id_ + 1, (50, order - 1)), windows])
    assert np.exp2(quality.log2_probs(contexts)).sum(axis=1) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("unit", ["byte", "word"])
def test_property_chunking_changes_nothing(monkeypatch, unit):
    texts = random_texts(3, number=60)
    whole = NgramQuality(order=4, unit=unit).fit(texts)
    expected = whole.score(texts)
    monkeypatch.setattr(ngram, "_BATCH_CHARS", 40)
    monkeypatch.setattr(ngram, "_BLOCK_TOKENS", 5)
    chunked = NgramQuality(order=4, unit=unit).fit(iter(texts))
    assert chunked.vocabulary_ == whole.vocabulary_
    for ours, theirs in zip(chunked._levels, whole._levels, strict=True):
        np.testing.assert_array_equal(ours.index.keys, theirs.index.keys)
        np.testing.assert_array_equal(ours.log2_prob, theirs.log2_prob)
        np.testing.assert_array_equal(ours.backoff, theirs.backoff)
    # The same probabilities, but a text's sum may round differently beside other texts.
    assert chunked.score(iter(texts)) == pytest.approx(expected, rel=1e-12)


def test_property_texts_do_not_see_each_other():
    texts = random_texts(5)
    quality = NgramQuality(order=3).fit(texts)
    assert quality.score(texts) == pytest.approx([quality.score([text])[0] for text in texts], rel=1e-12)
    assert NgramQuality(order=3).fit(texts[::-1]).score(texts).tolist() == quality.score(texts).tolist()


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_property_words_join_to_the_text(text):
    assert "".join(split_words(text)) == text


@pytest.mark.parametrize("unit", ["byte", "word"])
def test_learns_that_shuffled_docstrings_are_worse(unit):
    quality = NgramQuality(unit=unit).fit(DOCSTRINGS["argparse"] + DOCSTRINGS["inspect"])
    rng = np.random.default_rng(0)
    words = [doc.split() for doc in DOCSTRINGS["json"]]
    original = quality.score(" ".join(w) for w in words)
    shuffled = quality.score(" ".join(rng.permutation(w)) for w in words)
    assert len(words) >= 8
    assert np.mean(shuffled > original) >= 0.9  # the shortest are almost the same
    assert np.mean(shuffled - original) > 0.1
    assert original.mean() < 8.0  # below one byte per byte, though json is another module


def test_learns_only_frequent_words():
    quality = NgramQuality(order=2, unit="word", max_vocabulary=2).fit(SENTENCES)
    assert quality.vocabulary_ == {"the": 0, " cat": 1}
    assert quality.encode("the dog").tolist() == [0, quality.unknown_id_]


def test_property_parameters_are_those_of_an_estimator():
    quality = NgramQuality(order=3, unit="word")
    assert clone(quality).get_params() == quality.get_params()
    assert quality.fit(SENTENCES) is quality


@pytest.mark.parametrize("unit", ["byte", "word"])
def test_oracle_a_saved_model_scores_the_same(tmp_path, unit):
    texts = random_texts(2)
    quality = NgramQuality(order=3, unit=unit).fit(texts)
    quality.save(tmp_path / "model")
    loaded = NgramQuality.load(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["ngram.json", "ngram.safetensors"]
    assert loaded.get_params() == quality.get_params()
    assert loaded.score(texts).tolist() == quality.score(texts).tolist()
    contexts = np.full((1, 2), quality.start_id_)
    assert loaded.log2_probs(contexts).tolist() == quality.log2_probs(contexts).tolist()


# --- degenerate


def test_degenerate_no_texts_to_score():
    scores = NgramQuality(order=2).fit(["a"]).score([])
    assert scores.shape == (0,)
    assert scores.dtype == np.float64


def test_degenerate_reference_of_one_byte_and_no_contexts():
    quality = NgramQuality().fit(["a"])
    assert np.isfinite(quality.score(["a", "zzz", "é" * 50])).all()
    assert quality.log2_probs(np.empty((0, 4))).shape == (0, 257)


def test_degenerate_every_word_of_the_reference_is_unique():
    quality = NgramQuality(unit="word").fit(["all of these are new"])
    assert quality.vocabulary_ == {}
    assert quality.score(["words"])[0] > 8  # nothing known: spelt at log2 257 bits a byte, and more


# --- errors


def test_rejects_bad_texts():
    quality = NgramQuality(order=2).fit(["a"])
    for method in (quality.score, quality.fit):
        with pytest.raises(ValueError, match="text 1 is empty"):
            method(["a", "", "b"])
        with pytest.raises(TypeError, match="text 2 must be a string; got bytes"):
            method(["a", "b", b"c"])
        with pytest.raises(TypeError, match="got one string"):
            method("abc")
        with pytest.raises(ValueError, match="text 1 cannot be written as UTF-8"):
            method(["a", "\ud800"])
    with pytest.raises(ValueError, match="at least one reference text"):
        quality.fit([])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"order": 0}, "order must be >= 1; got 0"),
        ({"max_vocabulary": 0}, "max_vocabulary must be >= 1"),
        ({"smoothing": "laplace"}, "smoothing must be one of kneser_ney, none; got 'laplace'"),
        ({"unit": "char"}, "unit must be one of word, byte; got 'char'"),
    ],
)
def test_rejects_parameters(parameters, message):
    with pytest.raises(ValueError, match=message):
        NgramQuality(**parameters).fit(["a"])


def test_rejects_contexts_and_use_before_fit():
    for use in (
        lambda q: q.score(["a"]),
        lambda q: q.encode("a"),
        lambda q: q.save("x"),
        lambda q: q.log2_probs([[0]]),
    ):
        with pytest.raises(NotFittedError):
            use(NgramQuality())
    quality = NgramQuality(order=3).fit(["a"])
    with pytest.raises(ValueError, match=r"shape \(batch, 2\); got \(1, 3\)"):
        quality.log2_probs([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"ids in \[0, 257\]; got 1 to 258"):
        quality.log2_probs([[1, 258]])


def test_rejects_a_saved_model_that_was_tampered_with(tmp_path):
    NgramQuality(order=2).fit(["a"]).save(tmp_path)
    settings_path = tmp_path / "ngram.json"
    settings = json.loads(settings_path.read_text())
    settings_path.write_text(json.dumps(settings | {"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        NgramQuality.load(tmp_path)
    settings_path.write_text(json.dumps(settings))
    with (tmp_path / "ngram.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="is not the file"):
        NgramQuality.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        NgramQuality.load(tmp_path / "elsewhere")
