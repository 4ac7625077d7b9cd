"""Meta-tuning: data sets as questions, the loss, the classifier of questions, the recipe."""

import csv
import importlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from transformers import BertConfig, BertForSequenceClassification

from headwater.adapt.data import Examples, TaskData
from headwater.adapt.meta_data import LabelDescription, build_meta_dataset, check_groups, group_split
from headwater.adapt.meta_tuning import MetaTuned, MetaTuning, MetaTuningObjective, ZeroShotClassifier, description_auc
from headwater.core.recipe import ModelRef, RecipeError, load_recipe
from headwater.core.run import Run, execute
from headwater.modalities.text.labelled import text_array
from headwater.modalities.text.tiny import tiny_llama, tiny_t5
from headwater.modalities.text.tokenizers import word_tokenizer
from headwater.modalities.text.yes_no import YesNoScorer, open_yes_no

COLOURS = ["red", "blue", "green", "grey", "pink", "teal", "gold", "plum"]
WORDS = ["yes", "no", "?", "answer", ":", "and", "the", *COLOURS]
SIZE = {"hidden": 32, "layers": 1, "heads": 2, "mlp": 64, "generator_seed": 0}


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer([" ".join(WORDS)])


@pytest.fixture(scope="module")
def scorer(tokenizer):
    return YesNoScorer(tiny_llama(tokenizer, context=64, **SIZE), tokenizer)


def described(dataset, labels, group, per_label=1):
    return [LabelDescription(dataset, x, f"{x} {number} ?", group) for x in labels for number in range(per_label)]


def coloured(colours, count=24):
    return [f"the {colour} and the {colour} {number}" for colour in colours for number in range(count)], [
        colour for colour in colours for _ in range(count)
    ]


# -- the data set


def test_property_every_label_has_as_many_yes_as_no_up_to_the_cap():
    data = {"a": coloured(COLOURS[:3])}
    meta = build_meta_dataset(data, described("a", COLOURS[:2], "g", per_label=2), per_label=20, seed=0)
    assert Counter(zip(meta["label"], meta["answer"], strict=True)) == {
        (label, answer): 10 for label in COLOURS[:2] for answer in (0, 1)
    }
    assert set(Counter(meta["question"]).values()) == {10}, "texts are dealt out among a label's questions"


def test_oracle_an_answer_is_yes_exactly_where_the_text_has_the_label():
    texts, labels = coloured(COLOURS[:3])
    meta = build_meta_dataset({"a": (texts, labels)}, described("a", COLOURS[:3], "g"), seed=0)
    truth = dict(zip(texts, labels, strict=True))
    assert [row["answer"] for row in meta] == [int(truth[row["text"]] == row["label"]) for row in meta]
    assert len(set(zip(meta["text"], meta["label"], strict=True))) == len(meta), "no text is asked the same twice"


def test_property_a_text_with_two_labels_answers_no_to_neither():
    texts, labels = ["both", "Both", "one", "two"], ["x", "y", "x", "y"]
    meta = build_meta_dataset({"a": (texts, labels)}, described("a", ["x", "y"], "g"))
    assert {row["text"].lower() for row in meta if not row["answer"]} == {"one", "two"}


def test_property_another_seed_draws_other_texts():
    data, asked = {"a": coloured(COLOURS)}, described("a", COLOURS, "g")
    first, again, other = (build_meta_dataset(data, asked, per_label=4, seed=seed)["text"][:] for seed in (0, 0, 1))
    assert first == again != other


def test_rejects_descriptions_that_do_not_fit_the_data():
    data = {"a": (["one", "two"], ["x", "y"]), "same": (["one", "two"], ["x", "x"])}
    with pytest.raises(ValueError, match="no data set 'b'; there are a, same"):
        build_meta_dataset(data, described("b", ["x"], "g"))
    with pytest.raises(ValueError, match="no text labelled 'z'; labels: x, y"):
        build_meta_dataset(data, described("a", ["z"], "g"))
    with pytest.raises(ValueError, match="the answer about 'x' would be yes for every text"):
        build_meta_dataset(data, described("same", ["x"], "g"))
    with pytest.raises(ValueError, match="describes 'x' and 'y'; a question has one answer"):
        build_meta_dataset(data, [LabelDescription("a", label, "so ?", "g") for label in "xy"])
    with pytest.raises(ValueError, match="per_label must be at least 2"):
        build_meta_dataset(data, described("a", ["x"], "g"), per_label=1)
    with pytest.raises(ValueError, match="there is no description"):
        build_meta_dataset(data, [])


def test_property_whole_groups_are_held_out():
    asked = [*described("a", "xy", "mood"), *described("b", "z", "topic"), *described("c", "w", "mood")]
    train, held = group_split(asked, ["mood"])
    assert {d.dataset for d in held} == {"a", "c"}
    assert {d.dataset for d in train} == {"b"}


def test_rejects_groups_on_both_sides():
    with pytest.raises(ValueError, match="no description has the group 'none'; there are mood"):
        group_split(described("a", "x", "mood"), ["none"])
    with pytest.raises(ValueError, match="leaves nothing to train on"):
        group_split(described("a", "x", "mood"), ["mood"])
    with pytest.raises(ValueError, match="'a' has descriptions of groups mood, topic, which stand on both sides"):
        group_split([*described("a", "x", "mood"), *described("a", "y", "topic")], ["mood"])
    with pytest.raises(ValueError, match="group 'mood' is held out, and data sets of it are trained on: a, b"):
        check_groups({"b": "mood", "a": "mood", "c": "topic"}, ["mood"])


# -- the loss


def test_oracle_the_loss_is_binary_cross_entropy_on_the_difference_of_two_logits(scorer):
    rows = scorer.encode(["the red", "the blue and gold"], ["red ?", "pink ?"])
    width = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "soft_label": torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
    }
    loss = MetaTuningObjective(scorer)(scorer.model, batch)
    score = torch.tensor(scorer.score(["the red", "the blue and gold"], ["red ?", "pink ?"]))
    expected = F.binary_cross_entropy_with_logits(score, torch.tensor([1.0, 0.0]).double(), reduction="sum")
    assert loss.count == 2
    assert float(loss.total.detach()) == pytest.approx(float(expected), abs=1e-6)
    halves = [MetaTuningObjective(scorer)(scorer.model, {k: v[i : i + 1] for k, v in batch.items()}) for i in (0, 1)]
    assert float(sum(half.total for half in halves).detach()) == pytest.approx(float(loss.total.detach()), abs=1e-6)


# -- the classifier


def test_equation_a_class_is_judged_by_the_mean_probability_of_its_questions(scorer):
    questions = {"warm": ["red ?", "gold ?"], "cold": ["blue ?"]}
    texts = ["the red", "the blue and teal"]
    found = ZeroShotClassifier(scorer, questions)
    yes = {q: 1 / (1 + np.exp(-scorer.score(texts, [q, q]))) for q in ("red ?", "gold ?", "blue ?")}
    expected = np.stack([(yes["red ?"] + yes["gold ?"]) / 2, yes["blue ?"]], axis=1)
    np.testing.assert_allclose(found.predict_proba(texts), expected, atol=1e-12)
    assert found.predict(texts).tolist() == [["warm", "cold"][row] for row in expected.argmax(1)]


def test_oracle_auc_is_sklearns_and_undefined_where_one_answer_occurs():
    scores = np.random.default_rng(0).normal(size=(30, 2))
    answers = np.stack([np.arange(30) % 3 == 0, np.zeros(30, dtype=bool)], axis=1)
    first, second = description_auc(scores, answers)
    assert first == roc_auc_score(answers[:, 0], scores[:, 0])
    assert np.isnan(second)


def test_rejects_classes_without_a_question(scorer):
    with pytest.raises(ValueError, match="class 'cold' has no question"):
        ZeroShotClassifier(scorer, {"warm": ["red ?"], "cold": []})
    with pytest.raises(ValueError, match="there is no class"):
        ZeroShotClassifier(scorer, {})


# -- what is saved


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "classifier"])
def test_oracle_the_code_of_the_readme_gives_our_probability(tokenizer, tmp_path, kind):
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = {
        "causal": lambda: tiny_llama(tokenizer, context=64, **SIZE),
        "seq2seq": lambda: tiny_t5(tokenizer, **SIZE),
        "classifier": lambda: BertForSequenceClassification(config).eval(),
    }[kind]()
    classifier = ZeroShotClassifier(YesNoScorer(model, tokenizer), {"warm": ["red ?"]})
    MetaTuned(classifier, "start", 0, {}, {}).save_pretrained(tmp_path)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(encoding="utf-8"), re.S)[1]
    names = {"DIR": tmp_path, "question": "red ?", "text": "the red and gold"}
    exec(code, names)
    expected = classifier.predict_proba(["the red and gold"])[0, 0]
    assert float(names["p_yes"].detach()) == pytest.approx(expected, abs=1e-6)


# -- the recipe


@pytest.fixture
def fields(tokenizer, tmp_path):
    """Colours: what a text is about is the word that stands in it; two of eight are never asked in training."""
    tiny_llama(tokenizer, context=64, **SIZE).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")

    def write(name, colours):
        rng = np.random.default_rng(len(name))
        texts, labels = coloured(colours, 30)
        rows = [
            {"text": f"{t} {' '.join(rng.choice(['the', 'and'], 3))}", "label": x}
            for t, x in zip(texts, labels, strict=True)
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
        return str(path)

    return {
        "method": "meta_tuning",
        "model": str(tmp_path / "start"),
        "train": write("train", COLOURS[6:]),
        "test": write("test", COLOURS[6:]),
        "label_texts": {colour: f"{colour} ?" for colour in COLOURS[6:]},
        "datasets": {
            "one": {"data": write("one", COLOURS[:4]), "questions": {x: [f"{x} ?"] for x in COLOURS[:4]}, "group": "a"},
            "two": {
                "data": write("two", COLOURS[4:6]),
                "questions": {x: [f"{x} ?"] for x in COLOURS[4:6]},
                "group": "b",
            },
        },
        "holdout": ["b"],
        "batch_size": 32,
        "budget": {"steps": 60},
        "optim": {"lr": 1e-2},
        "fit": {"precision": "fp32"},
    }


def numbered(fields, colours, count, offset):
    labels = np.repeat(np.arange(len(colours)), count)
    texts = [f"the {colours[label]} and the and {offset + row}" for row, label in enumerate(labels)]
    return Examples(text_array(texts), labels)


def run_on(recipe, data, directory):
    with Run(directory, recipe) as run:
        return recipe.run_on(data, run)


def task(fields, train=20, test=20):
    names = tuple(COLOURS[6:])
    questions = tuple(f"{name} ?" for name in names)
    return TaskData(
        numbered(fields, names, train, 0), numbered(fields, names, test, 5000), None, names, questions, "colours"
    )


def test_learns_the_question_it_is_trained_on(fields, tmp_path):
    one = {**fields["datasets"]["one"], "questions": {"red": ["red ?"]}}
    recipe = load_recipe({**fields, "holdout": [], "datasets": {"one": one}, "budget": {"steps": 40}})
    run_on(recipe, task(fields), tmp_path / "run")
    texts, asked = ["the red and the red", "the blue and the blue", "the grey and the grey"], ["red ?"] * 3
    before = open_yes_no(ModelRef(name=fields["model"])).score(texts, asked)
    after = open_yes_no(ModelRef(name=str(tmp_path / "run" / "model"))).score(texts, asked)
    assert np.abs(before).max() < 1
    assert after[0] > 2
    assert after[1:].max() < -2


def test_property_labels_are_counted_where_they_were_looked_at(fields, tmp_path):
    small = {**fields, "budget": {"steps": 1}}
    few, many = (run_on(load_recipe(small), task(fields, train=n), tmp_path / str(n)) for n in (2, 40))
    assert few["cost/labels"] == many["cost/labels"] == 4 * 30, "of data set one; the task's own are not looked at"
    assert few["id/nll"] == many["id/nll"]
    assert few["data/meta_questions"] == 4 * 2 * 30


def test_property_texts_of_a_test_set_are_not_trained_on(fields, tmp_path):
    whole = task(fields)
    texts = list(whole.test.inputs)
    first = json.loads(Path(fields["datasets"]["one"]["data"]).read_text(encoding="utf-8").splitlines()[0])["text"]
    texts[0] = first.upper()
    leaking = TaskData(
        whole.train, Examples(text_array(texts), whole.test.labels), None, whole.label_names, whole.label_texts, "leak"
    )
    recipe = load_recipe({**fields, "budget": {"steps": 1}})
    assert run_on(recipe, whole, tmp_path / "whole")["data/meta_dropped_overlap"] == 0
    assert run_on(recipe, leaking, tmp_path / "leaking")["data/meta_dropped_overlap"] == 1


def test_property_held_out_groups_are_measured_and_undefined_questions_are_named(fields, tmp_path):
    recipe = load_recipe({**fields, "budget": {"steps": 1}})
    whole = task(fields)
    one = TaskData(
        whole.train, whole.test.take(whole.test.labels == 0), None, whole.label_names, whole.label_texts, "one"
    )
    metrics = run_on(recipe, one, tmp_path / "run")
    assert metrics["auc/undefined"] == 2
    assert metrics["auc/mean"] == metrics["auc/two/mean"]
    assert "auc/task/mean" not in metrics
    with (tmp_path / "run" / "auc_per_description.csv").open(encoding="utf-8") as stream:
        rows = {row["question"]: row for row in csv.DictReader(stream)}
    assert rows["gold ?"]["auc"] == ""
    assert rows["pink ?"]["group"] == "b"


def test_property_several_questions_stand_for_a_label(fields, tmp_path):
    asked = {"gold": ["gold ?", "the gold ?"]}
    recipe = load_recipe({**fields, "budget": {"steps": 1}, "questions": asked})
    run_on(recipe, task(fields), tmp_path / "run")
    with (tmp_path / "run" / "auc_per_description.csv").open(encoding="utf-8") as stream:
        rows = [row["question"] for row in csv.DictReader(stream) if row["set"] == "task"]
    assert rows == ["gold ?", "the gold ?", "plum ?"]
    wrong = load_recipe({**fields, "budget": {"steps": 1}, "questions": {"lilac": ["lilac ?", "so ?"]}})
    with pytest.raises(ValueError, match="the task has no label 'lilac'; there are gold, plum"):
        run_on(wrong, task(fields), tmp_path / "wrong")


def test_rejects_the_tasks_own_group_among_those_trained_on(fields):
    with pytest.raises(RecipeError, match="group 'a' is held out, and data sets of it are trained on: one"):
        load_recipe({**fields, "group": "a"})
    with pytest.raises(RecipeError, match="no description has the group 'c'"):
        load_recipe({**fields, "holdout": ["c"]})
    with pytest.raises(RecipeError, match="'task' means the task itself"):
        load_recipe({**fields, "datasets": {**fields["datasets"], "task": fields["datasets"]["one"]}})


def test_property_files_of_ones_own_are_read(fields, tmp_path):
    result = execute(load_recipe({**fields, "budget": {"steps": 2}}), tmp_path / "run")
    assert {"auc/mean", "auc/task/mean", "auc/two/mean", "auc/improved"} <= set(result.metrics)


def test_property_the_claim_measures_every_arm_it_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
    claim = importlib.import_module("headwater.claims.meta_tuning").CLAIM
    measured = claim.measure("smoke", 0, tmp_path)
    for part in claim.parts:
        assert {part.treatment, part.baseline} <= set(measured.arms)
    assert all(len(own["auc"]) == 18 for own in measured.items.values())
    assert measured.arms["counted"]["auc"] > 0.85
    assert MetaTuning.id == claim.id
