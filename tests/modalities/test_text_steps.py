"""Steps of curation in a pipeline of datatrove: what each one keeps, and that chance depends on nothing but the id."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datatrove.data import Document
from scipy import stats

from headwater.modalities.text.steps import Decontaminate, Keep, KeepBest, ParetoKeep, Sample, Score


class Length:
    fingerprint = "length"

    def __call__(self, texts: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return np.array([len(text) for text in texts], dtype=float)


def documents(count: int, **meta: Any) -> list[Document]:
    return [Document(text="x" * i, id=str(i), metadata=dict(meta)) for i in range(count)]


def kept(step: Any, given: list[Document]) -> list[str]:
    return [document.id for document in step.run(iter(given), 0, 1)]


def test_oracle_scores_are_the_scorers_and_asked_for_in_batches() -> None:
    scorer = Length()
    found = list(Score("size", scorer, batch_size=4).run(iter(documents(10)), 0, 1))
    assert [d.metadata["size"] for d in found] == list(range(10))
    assert scorer.calls == 3


def test_oracle_keep_and_its_opposite_share_out_the_documents() -> None:
    given = documents(10)
    for i, document in enumerate(given):
        document.metadata["q"] = i / 10
    both = [set(kept(Keep(when), given)) for when in ("q > 0.4", "not q > 0.4")]
    assert both[0] == {"5", "6", "7", "8", "9"}
    assert both[0] | both[1] == {d.id for d in given}
    assert not both[0] & both[1]


def test_equation_the_best_share_is_kept_and_equals_together() -> None:
    step = KeepBest("q", 0.3)
    given = documents(10)
    for document, score in zip(given, (5, 1, 9, 9, 9, 9, 2, 3, 0, 4), strict=True):
        document.metadata["q"] = score
    with pytest.raises(ValueError, match="has seen no scores"):
        kept(step, given)
    step.learn(d.metadata for d in given)
    assert kept(step, given) == ["2", "3", "4", "5"]


@pytest.mark.parametrize("score", [0.0, 0.5, 0.9])
def test_equation_pareto_keeps_as_often_as_it_says(score: float) -> None:
    given = [Document(text="", id=f"d{i}", metadata={"q": score}) for i in range(4000)]
    rate = len(kept(ParetoKeep("q", alpha=9), given)) / 4000
    expected = stats.lomax(9).sf(1 - score)
    assert expected == pytest.approx((2 - score) ** -9)
    assert abs(rate - expected) < 3 * np.sqrt(expected * (1 - expected) / 4000) + 1e-9


def test_property_chance_depends_on_the_id_and_the_seed_alone() -> None:
    given = documents(500)
    first = kept(Sample(0.3, seed=1), given)
    assert abs(len(first) - 150) < 3 * np.sqrt(500 * 0.3 * 0.7)
    assert sorted(kept(Sample(0.3, seed=1), given[::-1])) == sorted(first)
    assert kept(Sample(0.3, seed=1), given[100:]) == [i for i in first if int(i) >= 100]
    assert kept(Sample(0.3, seed=2), given) != first
    assert kept(Sample(1.0), given) == [d.id for d in given]
    assert kept(Sample(0.0), given) == []


def test_oracle_a_run_of_words_is_found_wherever_it_stands() -> None:
    words = [f"w{i}" for i in range(40)]
    step = Decontaminate({"exam": [" ".join(words[10:30]), "short one"], "other": [" ".join(words[30:])]}, ngram=5)
    cases = {
        "inside": ("so " + ", ".join(words[12:17]).upper() + "!", "repeats exam"),
        "one word short": (" ".join(words[12:16]), None),
        "short text whole": ("a Short one here", "repeats exam"),
        "not in a row": (" ".join([*words[12:14], "x", *words[14:17]]), None),
        "second set": (" ".join(words[33:39]), "repeats other"),
        "across the sets": (" ".join(words[27:33]), None),
        "nothing": ("", None),
    }
    for name, (text, reason) in cases.items():
        found = step.filter(Document(text=text, id=name))
        assert found == (True if reason is None else (False, reason)), name
    assert step.about != Decontaminate({"exam": ["short one"]}, ngram=5).about


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Keep("quality >"), "cannot read the condition"),
        (lambda: KeepBest("q", 1.0), "fraction to keep must be in"),
        (lambda: ParetoKeep("q", 0), "alpha must be positive"),
        (lambda: Sample(1.5), "rate must be in"),
        (lambda: Decontaminate({}, 0), "a run has at least one word"),
        (lambda: kept(ParetoKeep("q"), documents(1, q="high")), "reads 'q', which is 'high'"),
        (lambda: kept(Keep("q > 1"), documents(1, r=1)), r"names 'q'; a document has \['r'\]"),
    ],
)
def test_rejects_bad_settings_and_documents_without_the_field(build: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()
