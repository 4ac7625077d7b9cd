"""Labelled tasks of the family: the split, the unlabelled text, pseudo-labels on disk, the sealed test."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tests.conftest import sentences
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from headwater.core.fit import Phase, Trained
from headwater.core.leak import TestLeak
from headwater.core.recipe import DataRef, ModelRef, RecipeError, load_recipe
from headwater.core.run import Run, execute
from headwater.domain import pseudo_labels
from headwater.domain.adaptation import Adaptation
from headwater.domain.base import Adapted
from headwater.domain.labelling import FineTuned, LabelledPretraining, LabelTask, clean_unlabelled, read_labelled
from headwater.domain.pseudo_labels import PseudoLabelError, agreement, class_inputs, confident, pseudo_label
from headwater.modalities.text.classes import open_class_model
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.document_store import write_documents

Fields = dict[str, Any]
LABELS = ("a", "b", "c")


def write_labelled(path: Path, pairs: list[tuple[str, str]]) -> DataRef:
    path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in pairs) + "\n")
    return DataRef(name=str(path))


def pairs_of(count: int, seed: int = 0) -> list[tuple[str, str]]:
    return [(text, "xy"[i % 2]) for i, text in enumerate(sentences("domain", count, seed=seed, words=30))]


# -- the split


def test_property_the_split_is_whole_and_follows_the_words_alone(tmp_path: Path) -> None:
    pairs = pairs_of(300)
    split = read_labelled(write_labelled(tmp_path / "a.jsonl", pairs), None, held_out=0.2, validation=0.1)
    parts = [split.train, split.valid, split.test]
    assert sorted(text for part in parts for text in part.texts) == sorted(text for text, _ in pairs)
    assert [len(part) / 300 for part in parts] == pytest.approx([0.7, 0.1, 0.2], abs=0.06)
    truth = dict(pairs)
    assert all(truth[t] == split.labels[c] for part in parts for t, c in zip(part.texts, part.classes, strict=True))
    assert split.train.one_hot(2).argmax(1).tolist() == split.train.classes.tolist()
    shouted = [(text.upper(), label) for text, label in reversed(pairs)]
    again = read_labelled(write_labelled(tmp_path / "b.jsonl", shouted), None, held_out=0.2, validation=0.1)
    assert {text.lower() for text in again.test.texts} == {text.lower() for text in split.test.texts}


def test_property_training_texts_that_repeat_a_held_out_one_leave_and_are_counted(tmp_path: Path) -> None:
    pairs, held = pairs_of(60), pairs_of(30, seed=1)
    copies = [(text + " cut", label) for text, label in held[:3]]  # nearly alike: one word more of thirty
    split = read_labelled(
        write_labelled(tmp_path / "a.jsonl", pairs + copies),
        write_labelled(tmp_path / "b.jsonl", held),
        held_out=0.2,
        validation=0.0,
    )
    assert split.dropped == 3
    assert sorted(split.train.texts) == sorted(text for text, _ in pairs)
    assert split.test.texts == [text for text, _ in held]
    assert len(split.valid) == 0


def test_property_unlabelled_text_that_repeats_a_held_out_one_leaves(tmp_path: Path) -> None:
    texts = sentences("domain", 40, words=30)
    store = write_documents((Document(str(i), t) for i, t in enumerate(texts)), tmp_path / "u.arrow")
    clean, dropped = clean_unlabelled(store, [texts[7], texts[20].upper() + " node", "something else"])
    assert dropped == 2
    assert clean.ids() == [str(i) for i in range(40) if i not in (7, 20)]
    with pytest.raises(CorpusError, match="unlabelled: every training document repeats"):
        clean_unlabelled(store, texts)


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([(t, "x") for t, _ in pairs_of(60)], "two classes; found x"),
        ([*pairs_of(60), ("lonely words of a third class", "z")], "class 'z' has one text"),
        (pairs_of(60)[:59:2], "two classes; found x"),
    ],
)
def test_rejects_classes_that_cannot_be_learned(pairs, words, tmp_path: Path) -> None:
    test = write_labelled(tmp_path / "test.jsonl", pairs_of(30, seed=1))
    with pytest.raises(CorpusError, match=words):
        read_labelled(write_labelled(tmp_path / "a.jsonl", pairs), test, held_out=0.2, validation=0.0)


def test_rejects_a_label_that_only_the_test_has_and_a_test_too_small(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "a.jsonl", pairs_of(60))
    odd = write_labelled(tmp_path / "b.jsonl", [*pairs_of(30, seed=1), ("quite another thing", "w")])
    with pytest.raises(CorpusError, match=r"no training text has the label 'w'.*there are x, y"):
        read_labelled(data, odd, held_out=0.2, validation=0.0)
    small = write_labelled(tmp_path / "c.jsonl", pairs_of(19, seed=1))
    with pytest.raises(CorpusError, match="the test has 19 texts; at least 20"):
        read_labelled(data, small, held_out=0.2, validation=0.0)


# -- pseudo-labels


@pytest.fixture
def documents() -> list[Document]:
    rng = np.random.default_rng(0)
    texts = sentences("domain", 50, words=40)
    return [Document(f"d{i}", " ".join(text.split()[: rng.integers(1, 40)])) for i, text in enumerate(texts)]


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_oracle_pseudo_labels_are_those_of_one_text_at_a_time_in_order(
    kind: str, tiny_causal: Path, tiny_masked: Path, documents, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(pseudo_labels, "SHARD", 16)
    home = {"causal": tiny_causal, "masked": tiny_masked}[kind]
    opened = open_class_model(ModelRef(name=str(home)), LABELS, max_tokens=30)
    found = pseudo_label(opened, documents, tmp_path / "p", batch_tokens=100, soft=True)
    assert found["id"][:] == [d.id for d in documents]
    assert found["text"][:] == [d.text for d in documents]
    tokenizer = AutoTokenizer.from_pretrained(home)
    for document, row in zip(documents, found, strict=True):
        ids = tokenizer(document.text, return_tensors="pt", truncation=True, max_length=30)["input_ids"]
        with torch.no_grad():
            probs = opened.model(input_ids=ids).logits[0].softmax(-1)
        assert row["label"] == int(probs.argmax())
        np.testing.assert_allclose(row["probs"], probs, atol=1e-5)
        assert row["confidence"] == pytest.approx(max(row["probs"]), abs=1e-7)
    assert found.features["label"].names == list(LABELS)


def test_fault_labelling_goes_on_after_the_last_whole_shard(
    tiny_masked: Path, documents, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(pseudo_labels, "SHARD", 16)
    opened = open_class_model(ModelRef(name=str(tiny_masked)), LABELS, max_tokens=30)
    whole = pseudo_label(opened, documents, tmp_path / "whole").to_dict()
    passes = []

    def counted(model, inputs, *args, **kwargs):
        passes.append(len(inputs))
        if len(passes) == 3:
            raise KeyboardInterrupt
        return original(model, inputs, *args, **kwargs)

    original = pseudo_labels.class_probabilities
    monkeypatch.setattr(pseudo_labels, "class_probabilities", counted)
    with pytest.raises(KeyboardInterrupt):
        pseudo_label(opened, documents, tmp_path / "p")
    assert pseudo_label(opened, documents, tmp_path / "p").to_dict() == whole
    assert passes == [16, 16, 16, 16, 2]


def test_rejects_labels_of_another_classifier_or_other_texts(tiny_masked: Path, documents, tmp_path: Path) -> None:
    ref = ModelRef(name=str(tiny_masked))
    pseudo_label(open_class_model(ref, LABELS, seed=0), documents, tmp_path / "p")
    with pytest.raises(ValueError, match="holds pseudo-labels with other model"):
        pseudo_label(open_class_model(ref, LABELS, seed=1), documents, tmp_path / "p")
    with pytest.raises(ValueError, match="holds pseudo-labels with other documents"):
        pseudo_label(open_class_model(ref, LABELS, seed=0), documents[1:], tmp_path / "p")


def test_property_stored_inputs_are_what_the_classifier_encodes(tiny_masked: Path, documents) -> None:
    opened = open_class_model(ModelRef(name=str(tiny_masked)), LABELS, max_tokens=20)
    stored = class_inputs(documents, opened)
    assert [row.tolist() for row in stored] == opened.encode([d.text for d in documents])
    assert stored.lengths.tolist() == [len(row) for row in stored]
    assert [row.tolist() for row in stored[3:6]] == [stored[i].tolist() for i in (3, 4, 5)]


@pytest.mark.slow
def test_property_labelling_takes_the_memory_of_a_shard(tiny_masked: Path, tmp_path: Path) -> None:
    import psutil

    opened = open_class_model(ModelRef(name=str(tiny_masked)), LABELS, max_tokens=30)
    texts = sentences("domain", 100, words=12)
    count = 200_000
    rows = (Document(str(i), f"{texts[i % 100]} {i}") for i in range(count))
    store = write_documents(rows, tmp_path / "u.arrow")
    pseudo_label(opened, store.select(np.arange(20_000)), tmp_path / "warm")  # libraries and caches are loaded
    before = psutil.Process().memory_full_info().uss
    found = pseudo_label(opened, store, tmp_path / "p")
    assert len(found) == count
    assert psutil.Process().memory_full_info().uss - before < 300e6


def test_equation_confident_labels_by_hand() -> None:
    labels, sure = [0, 0, 1, 0, 2], [0.9, 0.5, 0.7, 0.6, 0.8]
    assert confident(labels, sure, LABELS).tolist() == [0, 1, 2, 3, 4]
    assert confident(labels, sure, LABELS, threshold=0.6).tolist() == [0, 2, 3, 4]
    # Five labels and three classes: ceil(5 / 3) = 2 of each at most, and of class 0 the surest two, 0.9 and 0.6.
    assert confident(labels, sure, LABELS, balance=True).tolist() == [0, 2, 3, 4]
    # At 0.65 three are left, ceil(3 / 3) = 1 of each.
    assert confident(labels, sure, LABELS, threshold=0.65, balance=True).tolist() == [0, 2, 4]


def test_rejects_pseudo_labels_from_which_nothing_is_learned() -> None:
    sure = np.linspace(0.3, 0.6, 1000)
    with pytest.raises(PseudoLabelError, match=r"threshold 0.599 leaves 4 of 1000.*quantiles 0.450, 0.570"):
        confident(np.arange(1000) % 3, sure, LABELS, threshold=0.599)
    with pytest.raises(PseudoLabelError, match="every pseudo-label is 'b'"):
        confident(np.ones(1000), sure, LABELS)
    with pytest.raises(PseudoLabelError, match="leaves 0 of 0"):
        confident([], [], LABELS)


def test_equation_agreement(tiny_masked: Path, documents) -> None:
    a, b = (open_class_model(ModelRef(name=str(tiny_masked)), LABELS, seed=seed) for seed in (0, 1))
    texts = [d.text for d in documents]
    same = sum(
        int(p.argmax() == q.argmax()) for p, q in zip(a.probabilities(texts), b.probabilities(texts), strict=True)
    )
    assert agreement(a, b, texts) == same / len(texts)
    assert agreement(a, a, texts) == 1
    with pytest.raises(ValueError, match="different labels"):
        agreement(a, open_class_model(ModelRef(name=str(tiny_masked)), ("a", "b")), texts)


# -- the family


def test_oracle_the_accuracy_is_that_of_the_classifier_that_was_saved(
    labelled_domain_fields: Fields, tmp_path: Path
) -> None:
    result = execute(load_recipe({"method": "fine_tuned", **labelled_domain_fields}), tmp_path / "a")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a" / "classifier").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "classifier")
    rows = [json.loads(line) for line in Path(labelled_domain_fields["labelled_test"]).read_text().splitlines()]
    right = []
    for row in rows:
        ids = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=32)["input_ids"]
        with torch.no_grad():
            answer = model.config.id2label[int(model(input_ids=ids).logits.argmax())]
        right.append(answer == row["label"])
    kept = json.loads((tmp_path / "a" / "labelled.json").read_text())
    assert kept["right"]["end"] == right
    assert result.metrics["downstream/labelled/accuracy"] == pytest.approx(np.mean(right))
    assert "downstream/labelled/accuracy_start" not in result.metrics
    assert result.cost["labels"] == result.metrics["data/labels"]


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_learns_the_labels_with_either_kind_of_model(
    kind: str, tiny_causal: Path, tiny_masked: Path, labelled_domain_fields: Fields, tmp_path: Path
) -> None:
    model = {"causal": tiny_causal, "masked": tiny_masked}[kind]
    longer = {**labelled_domain_fields, "model": str(model), "budget": {"steps": 120}, "optim": {"lr": 1e-2}}
    result = execute(load_recipe({"method": "fine_tuned", **longer, "batch_tokens": 640}), tmp_path / "a")
    # Six classes, of which the favourite word is a quarter of the text; chance is one in six.
    assert result.metrics["downstream/labelled/accuracy"] > 0.4
    assert result.metrics["domain/bpb"] != result.metrics["domain/bpb_start"]


class Curious(LabelledPretraining):
    """Reaches for the test."""

    id: ClassVar[str] = "fine_tuned"

    def learn(self, ctx: Adaptation, task: LabelTask) -> Generator[Phase, Trained, Adapted]:
        yield from ()
        return Adapted(ctx.start(), notes=(("texts", task.test[0]),))


def test_rejects_a_hook_that_reaches_for_the_labelled_test(labelled_domain_fields: Fields, tmp_path: Path) -> None:
    recipe = Curious.model_validate_json(json.dumps(labelled_domain_fields), strict=True)
    with pytest.raises(TestLeak, match="the labelled test set is out of reach"), Run(tmp_path / "a", recipe) as run:
        recipe.run(run)


def test_property_unlabelled_texts_may_be_a_corpus_of_their_own(labelled_domain_fields: Fields, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(labelled_domain_fields["labelled_test"]).read_text().splitlines()]
    texts = [*sentences("domain", 30, words=20), *(row["text"] for row in rows[:4])]
    (tmp_path / "u.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    fields = {**labelled_domain_fields, "unlabelled": str(tmp_path / "u.jsonl"), "labelled_valid": 0.0}
    result = execute(load_recipe({"method": "fine_tuned", **fields}), tmp_path / "a")
    assert result.metrics["data/unlabelled"] == 30
    assert result.metrics["data/dropped_unlabelled"] == 4
    assert "valid/labelled_accuracy" not in result.metrics


def test_rejects_a_probe_of_the_same_name(labelled_domain_fields: Fields) -> None:
    probe = {"name": "labelled", "data": "headwater:networkx-subpackages"}
    with pytest.raises(RecipeError, match="cannot be called 'labelled'"):
        load_recipe({"method": "fine_tuned", **labelled_domain_fields, "downstream": [probe]})
    assert FineTuned.id == "fine_tuned"
