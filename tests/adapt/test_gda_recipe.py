import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from headwater.adapt.base import AdaptTask
from headwater.adapt.data import Examples, TaskData, encode_task, read_task
from headwater.adapt.gda import ALPHAS, GDA, GDAClassifier, ZeroShot
from headwater.adapt.references import SklearnHead
from headwater.core.recipe import DataRef, ModelRef, RecipeError
from headwater.core.run import Run, execute
from headwater.modalities.features import zero_shot_weights
from headwater.modalities.text.labelled import open_encoder
from headwater.modalities.text.tiny import tiny_bert
from headwater.modalities.text.tokenizers import train_bpe

CLASSES, DIM = 5, 24
WORDS = {
    "fruit": ["apple", "pear", "plum", "fig", "grape", "melon", "peach", "lemon", "cherry", "quince", "berry"],
    "metal": ["iron", "zinc", "lead", "gold", "silver", "copper", "tin", "nickel", "cobalt", "chrome", "steel"],
    "river": ["rhine", "nile", "volga", "loire", "ebro", "tiber", "indus", "amur", "elbe", "danube", "thames"],
}


def make_data(seed=0, per_class=40):
    """Gaussian classes whose shared covariance is far from round: a few directions hold most of the noise."""
    rng = np.random.default_rng(seed)
    means = 0.6 * rng.normal(size=(CLASSES, DIM))
    mixing = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0] * np.geomspace(4, 0.2, DIM)

    def examples(count):
        labels = rng.permutation(np.repeat(np.arange(CLASSES), count))
        return Examples(means[labels] + rng.normal(size=(len(labels), DIM)) @ mixing.T, labels)

    names = tuple("abcde")
    return TaskData(examples(per_class), examples(60), examples(2), names, names, f"data {seed}")


def gda(**fields):
    return GDA(model=ModelRef(name="unused"), train=DataRef(name="unused"), test=DataRef(name="unused"), **fields)


def run_on(recipe, data, directory):
    with Run(directory, recipe) as run:
        return recipe.run_on(data, run)


def test_oracle_recipe_equals_the_estimator(tmp_path):
    data = make_data()
    metrics = run_on(gda(), data, tmp_path)
    head = GDAClassifier().fit(data.train.inputs, data.train.labels)
    assert metrics["id/accuracy"] == head.score(data.test.inputs, data.test.labels)
    saved = load_file(tmp_path / "model" / "head.safetensors")
    np.testing.assert_allclose(saved["weight"].numpy(), head.coef_, rtol=1e-6)
    np.testing.assert_allclose(saved["bias"].numpy(), head.intercept_, rtol=1e-6)
    assert metrics["cost/labels"] == 40 * CLASSES
    assert not (tmp_path / "scores.json").exists()


def test_oracle_estimator_in_plain_scikit_learn():
    data = make_data()
    pipeline = make_pipeline(Normalizer(), GDAClassifier())
    search = GridSearchCV(pipeline, {"gdaclassifier__covariance": ["ks", "diagonal"]}, cv=3)
    search.fit(data.train.inputs, data.train.labels)
    assert search.best_params_ == {"gdaclassifier__covariance": "ks"}
    assert search.score(data.test.inputs, data.test.labels) > 0.6


def test_learns_a_shared_covariance_that_the_nearest_mean_ignores(tmp_path):
    data = make_data()
    ours = run_on(gda(), data, tmp_path / "gda")["id/accuracy"]
    fields = {"train": DataRef(name="unused"), "test": DataRef(name="unused")}
    nearest = SklearnHead(model=ModelRef(name="unused"), estimator="nearest_centroid", **fields)
    assert ours > run_on(nearest, data, tmp_path / "nearest")["id/accuracy"] + 0.1


def test_property_same_seed_same_head_and_other_seed_other_shots(tmp_path):
    data = make_data()
    heads = []
    for i, seed in enumerate([1, 1, 2]):
        run_on(gda(shots=4, seed=seed), data, tmp_path / str(i))
        heads.append(load_file(tmp_path / str(i) / "model" / "head.safetensors")["weight"])
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_property_covariance_and_prior_reach_the_estimator(tmp_path):
    data = make_data()
    rare = data.train.take(np.r_[np.flatnonzero(data.train.labels), np.flatnonzero(data.train.labels == 0)[:10]])
    task = AdaptTask(data, rare, gda())
    with Run(tmp_path, gda()) as run:
        head = gda(covariance="oas", prior="empirical").head(task, run)
    np.testing.assert_allclose(head.coef_, GDAClassifier("oas", "empirical").fit(rare.inputs, rare.labels).coef_)
    assert (head.covariance, head.prior) == ("oas", "empirical")


# With zero-shot weights, on texts and a tiny encoder.


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    home = tmp_path_factory.mktemp("bert")
    tokenizer = train_bpe([" ".join(words) for words in WORDS.values()] * 5, 320)
    tiny_bert(tokenizer, hidden=32, layers=1, heads=2, mlp=32, context=64, generator_seed=0).save_pretrained(home)
    tokenizer.save_pretrained(home)
    return ModelRef(name=str(home))


@pytest.fixture
def fields(tmp_path, monkeypatch, encoder):
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
    refs = {}
    for seed, (name, count) in enumerate({"train": 10, "test": 15, "validation": 3}.items()):
        rng = np.random.default_rng(seed)
        rows = [
            {"text": " ".join(rng.choice(words, 9)), "label": label}
            for _ in range(count)
            for label, words in WORDS.items()
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        refs[name] = DataRef(name=str(path))
    descriptions = {label: " ".join(words[:4]) for label, words in WORDS.items()}
    return {"model": encoder, "shots": 5, "label_texts": descriptions, **refs}


def test_oracle_alpha_zero_answers_as_the_descriptions_alone(tmp_path, fields, encoder):
    recipe = GDA(zero_shot=ZeroShot(alpha=0.0, templates=("{}", "about {}")), **fields)
    result = execute(recipe, tmp_path / "run")
    data = encode_task(read_task(fields["train"], fields["test"], fields["validation"]), encoder)
    texts = [fields["label_texts"][name] for name in data.label_names]
    weights = zero_shot_weights(*open_encoder(encoder), ["{}", "about {}"], texts)
    answers = (data.test.inputs @ weights.T).argmax(1)
    assert result.metrics["id/accuracy"] == (answers == data.test.labels).mean()
    assert json.loads((tmp_path / "run" / "scores.json").read_text())["alpha"] == 0


@pytest.mark.parametrize(("alpha", "labels"), [("auto", 15), ("validation", 15 + 9), (1.0, 15)])
def test_property_choosing_alpha_on_validation_is_paid_for_in_labels(tmp_path, fields, alpha, labels):
    result = execute(GDA(zero_shot=ZeroShot(alpha=alpha), **fields), tmp_path / "run")
    assert result.metrics["cost/labels"] == result.cost["labels"] == labels
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    tried = {float(a): accuracy for a, accuracy in scores["accuracy"].items()}
    assert set(tried) == (set(ALPHAS) if isinstance(alpha, str) else set())
    assert scores["alpha"] == 1.0 or tried[scores["alpha"]] == max(tried.values())


def test_rejects_alpha_on_validation_without_one(tmp_path, fields):
    del fields["validation"]
    with pytest.raises(ValueError, match="name some in `validation`"):
        execute(GDA(zero_shot=ZeroShot(alpha="validation"), **fields), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero_shot": {"alpha": -1.0}}, "alpha"),
        ({"zero_shot": {"templates": ["a photo"]}}, "needs a {} for the description"),
        ({"zero_shot": {}, "normalize": False}, "set normalize: true"),
        ({"covariance": "full"}, "covariance"),
    ],
)
def test_rejects_fields_that_cannot_be_honoured(changes, words):
    with pytest.raises(RecipeError, match=words):
        gda(**changes)


def test_degenerate_one_shot_is_the_nearest_mean(tmp_path):
    data = make_data()
    with pytest.warns(UserWarning, match="nearest mean"):
        ours = run_on(gda(shots=1), data, tmp_path)["id/accuracy"]
    rows = [np.flatnonzero(data.train.labels == label) for label in range(CLASSES)]
    with Run(tmp_path / "spy", gda()) as run, pytest.warns(UserWarning, match="nearest mean"):
        head = gda().head(AdaptTask(data, data.train.take(np.array([r[0] for r in rows])), gda()), run)
    distances = ((data.test.inputs[:, None] - head.means_) ** 2).sum(2)
    np.testing.assert_array_equal(head.predict(data.test.inputs), distances.argmin(1))
    assert ours > 1 / CLASSES
