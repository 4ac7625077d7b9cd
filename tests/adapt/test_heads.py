"""Closed-form heads are ordinary scikit-learn citizens: one suite for all of them."""

import json
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from headwater.adapt.base import FAMILY
from headwater.adapt.data import Examples, TaskData
from headwater.adapt.gda import GDAClassifier
from headwater.adapt.naive_bayes import NaiveBayes, PooledGaussianNB
from headwater.adapt.references import SklearnHead
from headwater.continual.nmc import NearestMeanClassifier
from headwater.core.compare import Comparison
from headwater.core.recipe import DataRef, ModelRef, RecipeError
from headwater.core.run import Run

CLASSES, WIDTH, ROWS = 3, 6, 240


@dataclass(frozen=True)
class Head:
    """An estimator and what is known of it.

    Attributes:
        estimator: not fitted.
        grid: a parameter and two values of it, the better one first.
        tensors: whether it answers tensors with tensors.
        checked_at_home: whether its own tests run scikit-learn's checks.
    """

    estimator: Any
    grid: dict[str, list[Any]] = field(default_factory=dict)
    tensors: bool = True
    checked_at_home: bool = False


HEADS = {
    "gda": Head(GDAClassifier(), {"covariance": ["ks", "diagonal"]}, checked_at_home=True),
    "naive-bayes": Head(PooledGaussianNB(), {"prior": ["empirical", [0.998, 0.001, 0.001]]}),
    "naive-bayes-minmax": Head(PooledGaussianNB(prior="uniform", scale="minmax"), {"var_smoothing": [1e-9, 1e6]}),
    "nearest-mean": Head(
        NearestMeanClassifier(), {"metric": ["euclidean", "cosine"]}, tensors=False, checked_at_home=True
    ),
}
WITH_TENSORS = {name: head for name, head in HEADS.items() if head.tensors}
every_head = pytest.mark.parametrize("head", HEADS.values(), ids=list(HEADS))


@parametrize_with_checks([head.estimator for head in HEADS.values() if not head.checked_at_home])
def test_oracle_scikit_learn_finds_an_ordinary_estimator(estimator, check):
    check(estimator)


@pytest.fixture
def data():
    """Classes along one direction that differ by length, features of several sizes that depend on each other."""
    rng = np.random.default_rng(0)
    y = rng.permutation(np.arange(ROWS) % CLASSES)
    mixing = np.eye(WIDTH) + 0.5 * rng.normal(size=(WIDTH, WIDTH))
    X = (2 + 3 * y[:, None]) * np.linspace(0.2, 1, WIDTH) + rng.normal(size=(ROWS, WIDTH)) @ mixing
    return X, y


@every_head
def test_property_a_clone_has_the_parameters_and_nothing_learned(head, data):
    fitted = clone(head.estimator).fit(*data)
    copy = clone(fitted)
    assert str(copy.get_params()) == str(head.estimator.get_params())
    with pytest.raises(Exception, match="not fitted"):
        copy.predict(data[0])
    np.testing.assert_array_equal(copy.fit(*data).predict(data[0]), fitted.predict(data[0]))


@every_head
def test_property_works_in_a_pipeline_and_in_cross_validation(head, data):
    X, y = data
    pipeline = make_pipeline(StandardScaler(), clone(head.estimator))
    by_hand = clone(head.estimator).fit(StandardScaler().fit_transform(X), y)
    np.testing.assert_array_equal(pipeline.fit(X, y).predict(X), by_hand.predict(StandardScaler().fit_transform(X)))
    assert cross_val_score(pipeline, X, y, cv=4).mean() > 0.8


@every_head
def test_property_grid_search_finds_the_better_value(head, data):
    search = GridSearchCV(clone(head.estimator), head.grid, cv=4).fit(*data)
    assert search.best_params_ == {name: values[0] for name, values in head.grid.items()}
    assert np.ptp(search.cv_results_["mean_test_score"]) > 0, "the values differ"


@every_head
def test_property_reads_a_data_frame_and_keeps_its_names(head, data):
    X, y = data
    frame = pd.DataFrame(X, columns=[f"feature {i}" for i in range(WIDTH)])
    labels = pd.Series(y).map({0: "low", 1: "middle", 2: "high"})
    fitted = clone(head.estimator).fit(frame, labels)
    assert fitted.feature_names_in_.tolist() == frame.columns.tolist()
    plain = clone(head.estimator).fit(X, y)
    np.testing.assert_array_equal(fitted.predict(frame), np.array(["low", "middle", "high"])[plain.predict(X)])
    with pytest.raises(ValueError, match="feature names"):
        fitted.predict(frame[frame.columns[::-1]])


@every_head
def test_property_transforms_into_the_container_that_was_asked_for(head, data):
    X, y = data
    if not hasattr(head.estimator, "transform"):
        assert not hasattr(head.estimator, "set_output")
        return
    frame = pd.DataFrame(X, columns=[f"feature {i}" for i in range(WIDTH)])
    fitted = clone(head.estimator).set_output(transform="pandas").fit(frame, y)
    out = fitted.transform(frame)
    assert isinstance(out, pd.DataFrame)
    assert out.columns.tolist() == fitted.get_feature_names_out().tolist()
    np.testing.assert_array_equal(out.to_numpy(), clone(head.estimator).fit(X, y).transform(X))


@every_head
@pytest.mark.parametrize("kind", ["str", "object"])
def test_property_labels_may_be_strings_in_a_stream_too(head, data, kind):
    X, y = data
    names = np.array(["c", "a", "b"], dtype=object if kind == "object" else None)[y]
    whole, stream = clone(head.estimator).fit(X, names), clone(head.estimator)
    for rows in np.array_split(np.argsort(y), 5):  # classes arrive one after another
        stream.partial_fit(X[rows], names[rows], classes=np.array(["a", "b", "c"]))
    assert stream.classes_.tolist() == whole.classes_.tolist() == ["a", "b", "c"]
    assert (whole.predict(X) == names).mean() > 0.8
    np.testing.assert_array_equal(stream.predict(X), whole.predict(X))


@every_head
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_property_chunks_of_a_memory_mapped_file_equal_fit(head, data, dtype, tmp_path):
    X, y = data
    np.save(tmp_path / "features.npy", (X + 100).astype(dtype))
    stored = np.load(tmp_path / "features.npy", mmap_mode="r")
    stream = clone(head.estimator)
    for start in range(0, ROWS, 37):
        stream.partial_fit(stored[start : start + 37], y[start : start + 37])
    for whole in (clone(head.estimator).fit(stored, y), clone(head.estimator).fit(np.asarray(stored), y)):
        np.testing.assert_allclose(
            stream.decision_function(stored), whole.decision_function(stored), rtol=1e-5, atol=1e-3
        )
        np.testing.assert_allclose(
            stream.decision_function(np.asarray(stored, np.float64)),
            whole.decision_function(np.asarray(stored, np.float64)),
            rtol=1e-9,
            atol=1e-8,
        )
        np.testing.assert_array_equal(stream.predict(stored), whole.predict(stored))


@every_head
def test_property_rows_are_read_as_they_are_and_not_written_to(head, data):
    X, y = data
    before = X.copy()
    X.setflags(write=False)
    clone(head.estimator).fit(X, y).partial_fit(X, y).predict(X)
    np.testing.assert_array_equal(X, before)


@pytest.mark.parametrize("head", WITH_TENSORS.values(), ids=list(WITH_TENSORS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_property_tensors_in_tensors_out_of_the_same_dtype(head, data, dtype):
    X, y = torch.tensor(data[0], dtype=dtype), torch.tensor(data[1])
    fitted = clone(head.estimator).fit(X[:100], y[:100]).partial_fit(X[100:], y[100:])
    scores = fitted.decision_function(X)
    assert scores.dtype == fitted.predict_proba(X).dtype == dtype
    assert fitted.predict(X).dtype == torch.int64
    theirs = clone(head.estimator).fit(X.numpy(), y.numpy())
    np.testing.assert_allclose(scores.numpy(), theirs.decision_function(X.numpy()), rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(fitted.predict(X).numpy(), theirs.predict(X.numpy()))


# Their curves over shots.


def recipe(cls, **fields):
    unused = DataRef(name="unused")
    return cls(model=ModelRef(name="unused"), train=unused, test=unused, seed=3, **fields)


def run_on(recipe, data, directory):
    with Run(directory, recipe) as run:
        metrics = recipe.run_on(data, run)
    return metrics, run


@pytest.fixture
def task(data):
    X, y = data
    names = ("a", "b", "c")
    return TaskData(Examples(X[:120], y[:120]), Examples(X[120:], y[120:]), None, names, names, "data")


def test_oracle_curve_over_shots_is_that_of_runs_with_so_many(task, tmp_path):
    metrics, _ = run_on(recipe(NaiveBayes, shots=16, at_shots=(16, 2, 4)), task, tmp_path / "curve")
    curve = json.loads((tmp_path / "curve" / "trajectory.json").read_text())
    assert curve["x"] == "examples per class"
    assert set(curve["series"]) == {axis.metric for axis in FAMILY.trajectories}
    for metric in ("id/accuracy", "id/ece"):
        alone = [
            [shots, run_on(recipe(NaiveBayes, shots=shots), task, tmp_path / f"{metric[3:]}-{shots}")[0][metric]]
            for shots in (2, 4, 16)
        ]
        assert curve["series"][metric] == alone
        assert alone[-1][1] == metrics[metric]
    assert all(seconds > 0 for _, seconds in curve["series"]["cost/fit_seconds"])
    assert metrics["cost/labels"] == 16 * CLASSES


def test_property_curve_leaves_what_the_run_itself_says_alone(task, tmp_path):
    fields = {"estimator": "logistic_regression", "shots": 30}
    plain, one = run_on(recipe(SklearnHead, **fields), task, tmp_path / "plain")
    curved, other = run_on(recipe(SklearnHead, at_shots=(1, 2), **fields), task, tmp_path / "curved")
    assert one.notes["C"] == other.notes["C"]
    assert {k: v for k, v in plain.items() if "cost" not in k} == {k: v for k, v in curved.items() if "cost" not in k}
    assert not (tmp_path / "plain" / "trajectory.json").exists()


def test_rejects_a_curve_beyond_the_labels_that_are_paid_for():
    with pytest.raises(RecipeError, match="at_shots: 8 is more than shots, 4"):
        recipe(NaiveBayes, shots=4, at_shots=(2, 8))


def test_property_the_shipped_comparison_of_heads_can_be_run():
    text = resources.files("headwater").joinpath("comparisons", "heads.yaml").read_text(encoding="utf-8")
    comparison = Comparison.parse(text)
    rows = {entrant.name: entrant.recipe(0) for entrant in comparison.entrants()}
    assert set(rows) >= {"gda", "naive-bayes", "lda", "logistic-regression", "gaussian-nb", "nearest-centroid"}
    assert {max(row.at_shots) for row in rows.values()} == {row.shots for row in rows.values()} == {64}
