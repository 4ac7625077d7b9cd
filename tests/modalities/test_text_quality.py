"""Scores of texts: hashed n-grams against a loop, learning, files, word lists."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone

from headwater.core.recipe import ModelRef
from headwater.modalities.text import quality
from headwater.modalities.text.quality import HFScorer, LexiconScorer, QualityClassifier, hashed_ngrams

TEXTS = st.lists(st.text(alphabet="ab1 é.\n_", max_size=12), max_size=6)
GOOD = [f"the river number {i} ran slowly to the sea" for i in range(40)]
BAD = [f"0x{i} | tab | tab | 0x{i + 1}" for i in range(40)]


def ngrams(text: str) -> list[tuple[str, ...]]:
    words = [word for word in re.split(r"[^a-z0-9\u0080-\uffff]+", text.lower()) if word]
    return [(word,) for word in words] + list(pairwise(words))


@given(TEXTS)
def test_oracle_ngrams_are_those_of_a_loop(texts: list[str]) -> None:
    owner, hashed = hashed_ngrams(texts, bits=40)
    assert owner.shape == hashed.shape
    names: dict[tuple[str, ...], int] = {}
    for place, text in enumerate(texts):
        expected = Counter(ngrams(text))
        found = Counter(hashed[owner == place].tolist())
        assert sorted(expected.values()) == sorted(found.values())
        # The same n-gram has the same hash wherever it stands; others have others.
        for gram in expected:
            (alone,) = {int(h) for h in hashed_ngrams([" ".join(gram)], bits=40)[1][-1:]}
            assert names.setdefault(gram, alone) == alone
            assert found[alone] == expected[gram]
    assert len(set(names.values())) == len(names)


def test_property_a_text_is_hashed_whatever_its_company(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["The river", "", "ran é to", "the SEA 12"] * 5
    together = hashed_ngrams(texts)
    monkeypatch.setattr(quality, "_CHUNK", 9)
    apart = hashed_ngrams(texts)
    assert all(
        np.array_equal(np.sort(together[1][together[0] == i]), np.sort(apart[1][apart[0] == i])) for i in range(20)
    )


def test_equation_the_score_is_the_mean_weight_times_the_root() -> None:
    model = QualityClassifier().fit(GOOD + BAD, [1] * 40 + [0] * 40)
    hashed = hashed_ngrams(["river river sea"])[1]
    expected = model.coef_[hashed].sum() / np.sqrt(5) + model.intercept_
    assert model.decision_function(["river river sea"])[0] == pytest.approx(expected)
    assert model(["river river sea"])[0] == pytest.approx(1 / (1 + np.exp(-expected)))
    assert model.predict_proba(["river"])[0].sum() == pytest.approx(1)


def test_degenerate_a_text_without_words_has_the_intercept() -> None:
    model = QualityClassifier().fit(GOOD + BAD, [1] * 40 + [0] * 40)
    assert model.decision_function(["", "..."]).tolist() == [model.intercept_] * 2
    assert model([]).shape == (0,)


def test_learns_to_tell_prose_from_tables() -> None:
    model = QualityClassifier().fit(GOOD[:30] + BAD[:30], ["prose"] * 30 + ["table"] * 30)
    assert model.score(GOOD[30:] + BAD[30:], ["prose"] * 10 + ["table"] * 10) == 1.0
    assert clone(model).get_params() == model.get_params()
    stream = QualityClassifier()
    for _ in range(5):
        stream.partial_fit(GOOD[:20] + BAD[:20], [1] * 20 + [0] * 20, classes=[0, 1])
    assert stream.score(GOOD[20:] + BAD[20:], [1] * 20 + [0] * 20) == 1.0


def test_property_what_is_saved_scores_the_same(tmp_path: Path) -> None:
    model = QualityClassifier(bits=12).fit(GOOD + BAD, [1] * 40 + [0] * 40)
    model.save(tmp_path / "m")
    loaded = QualityClassifier.load(tmp_path / "m")
    assert np.array_equal(loaded(GOOD + BAD), model(GOOD + BAD))
    assert (
        loaded.fingerprint == model.fingerprint != QualityClassifier().fit(GOOD + BAD, [0] * 40 + [1] * 40).fingerprint
    )
    assert loaded.predict(GOOD[:1]).tolist() == [1]
    with pytest.raises(ValueError, match="does not learn on"):
        loaded.partial_fit(GOOD, [1] * 40)
    about = tmp_path / "m" / "quality.json"
    about.write_text(about.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(ValueError, match="written by a later version"):
        QualityClassifier.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("labels", "words"), [([1] * 80, "the labels are \\[1\\]"), ([1, 0], "every text needs a label; got 80 and 2")]
)
def test_rejects_labels_that_do_not_tell_two_kinds_apart(labels: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        QualityClassifier().fit(GOOD + BAD, labels)


def test_equation_a_lexicon_counts_its_words() -> None:
    scorer = LexiconScorer(["Damn", "fool", ""])
    assert scorer(["You damn FOOL!", "fine day", "", "damned"]).tolist() == [2 / 3, 0, 0, 0]
    with pytest.raises(ValueError, match="not one word: 'two words'"):
        LexiconScorer(["two words"])
    with pytest.raises(ValueError, match="the list of words is empty"):
        LexiconScorer([" "])


def test_oracle_a_classifier_of_hugging_face_is_asked_for_its_label(tiny_encoder: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_encoder, num_labels=3, id2label={0: "a", 1: "b", 2: "c"}
    )
    model.save_pretrained(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    tokenizer.save_pretrained(tmp_path / "m")
    texts = ["graph sum", "a much longer text about a graph and its path", "node"]
    found = HFScorer(ModelRef(name=str(tmp_path / "m")), "b", batch_size=2)(texts)
    for text, score in zip(texts, found, strict=True):
        with torch.no_grad():
            alone = model.eval()(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0, 1]
        assert score == pytest.approx(float(alone), abs=1e-5)
    with pytest.raises(ValueError, match=r"has no label 'z'; its labels are \['a', 'b', 'c'\]"):
        HFScorer(ModelRef(name=str(tmp_path / "m")), "z")(texts)
