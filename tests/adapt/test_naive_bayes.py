import csv
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.preprocessing import MinMaxScaler

from headwater.adapt.data import Examples, TaskData
from headwater.adapt.gda import GDAClassifier
from headwater.adapt.naive_bayes import (
    LearningCurve,
    NaiveBayes,
    PairedCurve,
    PooledGaussianNB,
    crossing,
    learning_curve_pair,
)
from headwater.adapt.references import SklearnHead
from headwater.claims.naive_bayes import Problem, sizes_up_to, smallest_size
from headwater.core.recipe import DataRef, ModelRef, RecipeError
from headwater.core.rng import numpy_generator
from headwater.core.run import Run

CLASSES, WIDTH = 4, 12


def make(seed=0, counts=(30, 40, 25, 35)):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.repeat(np.arange(CLASSES), counts))
    return rng.normal(size=(CLASSES, WIDTH))[y] + rng.normal(size=(y.size, WIDTH)) * np.geomspace(0.2, 3, WIDTH), y


def two_classes(features, count, seed):
    """Independent Gaussian features, Bayes error .1."""
    return Problem.fixed(features).draw(count, np.random.default_rng(seed))


def recipe(**fields):
    unused = DataRef(name="unused")
    return NaiveBayes(model=ModelRef(name="unused"), train=unused, test=unused, **fields)


def run_on(recipe, directory, seed=0, per_class=20):
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(CLASSES, WIDTH))

    def examples(count):
        labels = rng.permutation(np.repeat(np.arange(CLASSES), count))
        return Examples(means[labels] + np.geomspace(0.3, 5, WIDTH) * rng.normal(size=(len(labels), WIDTH)), labels)

    data = TaskData(examples(per_class), examples(50), None, tuple("abcd"), tuple("abcd"), f"data {seed}")
    with Run(directory, recipe) as run:
        return recipe.run_on(data, run), data


def test_equation_two_features_by_hand():
    # Class a: (0, 0), (2, 2): means 1, 1, variances 1, 1. Class b: (4, 0), (4, 6): means 4, 3, variances 0, 9.
    # v = (1 + 0) / 2, (1 + 9) / 2 = 0.5, 5. b minus a: w = (3 / 0.5, 2 / 5) = (6, 0.4);
    # bias = -(16 - 1) / (2 x 0.5) - (9 - 1) / (2 x 5) = -15.8.
    X, y = np.array([[0.0, 0], [2, 2], [4, 0], [4, 6]]), ["a", "a", "b", "b"]
    nb = PooledGaussianNB(var_smoothing=0).fit(X, y)
    np.testing.assert_allclose(nb.var_, [0.5, 5.0])
    np.testing.assert_allclose(nb.theta_, [[1, 1], [4, 3]])
    np.testing.assert_allclose(nb.coef_[1] - nb.coef_[0], [6, 0.4])
    np.testing.assert_allclose(nb.intercept_[1] - nb.intercept_[0], -15.8)
    assert nb.class_count_.tolist() == [2, 2]


@pytest.mark.parametrize("prior", ["empirical", "uniform"])
def test_oracle_equals_gaussian_discriminant_analysis_with_a_diagonal(prior):
    X, y = make()
    theirs = GDAClassifier("diagonal", prior).fit(X, y).predict_log_proba(X)
    np.testing.assert_allclose(PooledGaussianNB(prior=prior).fit(X, y).predict_log_proba(X), theirs, atol=1e-10)


@pytest.mark.parametrize("prior", ["empirical", [0.1, 0.2, 0.3, 0.4]])
def test_oracle_equals_scikit_learns_when_its_variances_are_pooled(prior):
    X, y = make()
    theirs = GaussianNB(priors=None if prior == "empirical" else prior).fit(X, y)
    share = np.bincount(y) / len(y)
    theirs.var_ = np.tile(sum(share[c] * X[y == c].var(0) for c in range(CLASSES)) + 1e-9, (CLASSES, 1))
    ours = PooledGaussianNB(prior=prior).fit(X, y)
    np.testing.assert_allclose(ours.predict_log_proba(X), theirs.predict_log_proba(X), atol=1e-8)


def test_oracle_minmax_is_scaling_the_features_first():
    X, y = make()
    X = X * np.geomspace(1e-4, 1e4, WIDTH)
    X[:, 3] = 7.0
    scaler = MinMaxScaler().fit(X)
    ours = PooledGaussianNB(var_smoothing=0.1, scale="minmax")
    for rows in np.array_split(np.arange(len(y)), 7):
        ours.partial_fit(X[rows], y[rows])
    theirs = PooledGaussianNB(var_smoothing=0.1).fit(scaler.transform(X), y)
    new = make(1)[0] * np.geomspace(1e-4, 1e4, WIDTH)
    np.testing.assert_allclose(ours.predict_log_proba(new), theirs.predict_log_proba(scaler.transform(new)), atol=1e-8)
    unscaled = PooledGaussianNB(var_smoothing=0.1).fit(X, y).predict_log_proba(new)
    assert abs(unscaled - ours.predict_log_proba(new)).max() > 0.1


def test_oracle_reaches_the_bayes_error_of_the_simulation():
    X, y = two_classes(20, 40_000, 0)
    new, truth = two_classes(20, 40_000, 1)
    error = (PooledGaussianNB().fit(X, y).predict(new) != truth).mean()
    assert abs(error - 0.1) < 3 * np.sqrt(0.1 * 0.9 / 40_000)


@pytest.mark.parametrize("shift", [0.0, 1e6])
@pytest.mark.parametrize("chunks", [1, 3, 130])
def test_property_partial_fit_in_any_chunking_is_fit_however_far_from_zero(chunks, shift):
    X, y = make()
    X = X + shift
    X = X[np.argsort(y)]  # classes arrive one after another
    y = np.sort(y)
    whole, stream = PooledGaussianNB().fit(X, y), PooledGaussianNB()
    for rows in np.array_split(np.arange(len(y)), chunks):
        stream.partial_fit(X[rows], y[rows])
    np.testing.assert_allclose(stream.var_, whole.var_, rtol=1e-10)
    exact = X - shift  # what is subtracted here was rounded to 1e-10 above
    variance = sum(exact[y == c].var(0) * (y == c).mean() for c in range(CLASSES))
    np.testing.assert_allclose(whole.var_, variance + 1e-9, rtol=1e-9)
    np.testing.assert_allclose(
        stream.predict_log_proba(X), whole.predict_log_proba(X), atol=1e-10 if not shift else 1e-6
    )


def test_property_shifting_or_rescaling_features_changes_no_prediction():
    X, y = make()
    new = make(1)[0]
    scale, shift = np.geomspace(1e-2, 1e2, WIDTH), np.linspace(-50, 50, WIDTH)
    plain = PooledGaussianNB(var_smoothing=0).fit(X, y).predict_log_proba(new)
    moved = PooledGaussianNB(var_smoothing=0).fit(X * scale + shift, y).predict_log_proba(new * scale + shift)
    np.testing.assert_allclose(moved, plain, atol=1e-8)
    nearest = ((new[:, None] - np.stack([X[y == c].mean(0) for c in range(CLASSES)])) ** 2).sum(2).argmin(1)
    assert (nearest != plain.argmax(1)).mean() > 0.1, "the nearest mean, which depends on the scale, would differ"


def test_property_tensors_are_answered_with_tensors():
    X, y = make()
    ours = PooledGaussianNB(scale="minmax").fit(X, y)
    there = PooledGaussianNB(scale="minmax").fit(torch.tensor(X), torch.tensor(y))
    np.testing.assert_allclose(there.predict_proba(torch.tensor(X)).numpy(), ours.predict_proba(X), atol=1e-12)
    assert there.coef_.dtype == torch.float64
    single = there.decision_function(torch.tensor(X, dtype=torch.float32))
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), ours.decision_function(X), rtol=1e-4, atol=1e-4)


def test_degenerate_one_example_a_class_is_the_nearest_mean_and_says_so():
    X, y = make()
    rows = np.unique(y, return_index=True)[1]
    with pytest.warns(UserWarning, match=r"feature\(s\) \[0, 1, 2, 3, 4\] and more of 12 do not vary within any class"):
        nb = PooledGaussianNB().fit(X[rows], y[rows])
    np.testing.assert_array_equal(nb.predict(X), ((X[:, None] - X[rows]) ** 2).sum(2).argmin(1))
    with pytest.raises(ValueError, match="their variance is 0"):
        PooledGaussianNB(var_smoothing=0).fit(X[rows], y[rows])


def test_degenerate_constant_feature_changes_nothing():
    X, y = make()
    plain = PooledGaussianNB().fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for smoothing in (0.0, 1e-9):
            padded = PooledGaussianNB(var_smoothing=smoothing).fit(np.insert(X, 3, 0.1e6, axis=1), y)
            new = np.insert(X, 3, 5.0, axis=1)
            np.testing.assert_allclose(padded.predict_log_proba(new), plain.predict_log_proba(X), atol=1e-6)


def test_degenerate_feature_constant_within_classes_is_named():
    X, y = make()
    X[:, 5] = y
    with pytest.warns(UserWarning, match=r"feature\(s\) \[5\] of 12 do not vary within any class"):
        nb = PooledGaussianNB().fit(X, y)
    assert nb.score(X, y) == 1.0


def test_rejects_what_cannot_be_fitted():
    X, y = make()
    with pytest.raises(ValueError, match="needs examples of two classes; got 1 class"):
        PooledGaussianNB().fit(X, np.zeros(len(y), int))
    with pytest.raises(ValueError, match="row 2 of X is not finite"):
        PooledGaussianNB().fit(torch.tensor(np.where(X[2, 1] == X, np.nan, X)), torch.tensor(y))
    with pytest.raises(ValueError, match="X has 5 features, but PooledGaussianNB is expecting 12"):
        PooledGaussianNB().fit(torch.tensor(X), torch.tensor(y)).predict(torch.zeros(2, 5))
    early = PooledGaussianNB().partial_fit(X[y < 2], y[y < 2], classes=[0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"no sample of class\(es\) \[2, 3\] yet"):
        early.predict(X)
    assert early.partial_fit(X[y > 1], y[y > 1]).score(X, y) == PooledGaussianNB().fit(X, y).score(X, y)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"var_smoothing": -1.0}, "var_smoothing must be a number >= 0; got -1"),
        ({"prior": "flat"}, "prior must be 'empirical', 'uniform' or probabilities; got 'flat'"),
        ({"prior": [0.5, 0.5]}, "prior must be 4 probabilities above 0 whose sum is 1"),
        ({"prior": [0.5, 0.5, 0.5, 0.5]}, "prior must be 4 probabilities above 0 whose sum is 1"),
        ({"scale": "standard"}, "scale must be None or 'minmax'; got 'standard'"),
    ],
)
def test_rejects_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        PooledGaussianNB(**arguments).fit(*make())


# The learning curve of both heads.


def curve_of(naive_bayes, logistic_regression, ms=(10, 20, 40, 80)):
    noise = np.array([-0.001, 0.0, 0.001])[:, None] * np.array([1, -1, 1, -1])
    return LearningCurve(ms, np.array(naive_bayes) + noise, np.array(logistic_regression) - noise)


def test_equation_crossing_is_where_the_mean_errors_meet():
    # Differences .1, .04, -.02, -.05: zero two thirds of the way from 20 to 40 in log m.
    found = crossing(curve_of([0.3, 0.26, 0.25, 0.25], [0.4, 0.3, 0.23, 0.2]))
    assert found.regime == "two"
    assert found.between == (20, 40)
    assert found.m_cross == pytest.approx(20 * 2 ** (2 / 3))
    assert (found.m_naive_bayes, found.m_logistic_regression) == (20, 80)


@pytest.mark.parametrize(
    ("naive_bayes", "logistic_regression", "regime"),
    [
        ([0.3, 0.25, 0.25, 0.25], [0.4, 0.3, 0.25, 0.25], "naive_bayes"),
        ([0.4, 0.3, 0.25, 0.25], [0.3, 0.25, 0.2, 0.2], "logistic_regression"),
        ([0.3, 0.25, 0.25, 0.25], [0.3, 0.25, 0.25, 0.25], "undecided"),
        ([0.4, 0.3, 0.25, 0.2], [0.3, 0.3, 0.25, 0.25], "undecided"),  # the other way round than the theory has it
    ],
)
def test_property_one_regime_or_none_has_no_crossing(naive_bayes, logistic_regression, regime):
    found = crossing(curve_of(naive_bayes, logistic_regression))
    assert (found.regime, found.m_cross, found.between) == (regime, None, None)


def test_degenerate_one_repeat_decides_nothing():
    curve = LearningCurve((10, 20), np.array([[0.3, 0.2]]), np.array([[0.4, 0.1]]))
    assert crossing(curve).regime == "undecided"


def test_oracle_curve_measures_the_heads_on_the_rows_it_says():
    X, y = two_classes(6, 200, 3)
    curve = learning_curve_pair(X, y, ms=[20, 140], repeats=2, seed=5)
    alone = learning_curve_pair(X, y, ms=[20], repeats=2, seed=5)  # a size does not depend on the others
    np.testing.assert_array_equal(alone.naive_bayes, curve.naive_bayes[:, :1])
    np.testing.assert_array_equal(alone.logistic_regression, curve.logistic_regression[:, :1])
    # 60 rows are held out, so that errors are multiples of 1/60.
    np.testing.assert_allclose(curve.naive_bayes * 60, np.round(curve.naive_bayes * 60), atol=1e-9)
    other = learning_curve_pair(X, y, ms=[20], repeats=2, seed=6)
    assert (other.naive_bayes != alone.naive_bayes).any()


def test_learns_two_regimes_where_features_depend_on_each_other():
    # Few examples: naive Bayes has fewer numbers to learn. Many: regression subtracts the noise that features share.
    rng = np.random.default_rng(0)
    y = np.arange(3000) % 2
    X = 0.5 * (2 * y[:, None] - 1) + rng.normal(size=(3000, 30))
    X[:, 15:] = rng.normal(size=(3000, 15))
    shared = 3.0 * rng.normal(size=(3000, 1))
    X[:, 10:20] += shared
    found = crossing(learning_curve_pair(X, y, ms=[8, 2000], repeats=4))
    assert found.regime == "two"
    assert found.between == (8, 2000)


def test_property_automatic_sizes_double_up_to_all_that_is_not_held_out():
    X, y = two_classes(4, 100, 0)
    assert learning_curve_pair(X, y, repeats=1).ms == (4, 8, 16, 32, 64, 70)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ms": [1, 8]}, r"from 2, one example a class, to the 70 examples that are not held out; got \[1, 8\]"),
        ({"ms": [8, 71]}, r"got \[8, 71\]"),
        ({"ms": []}, r"got \[\]"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"held_out": 1.0}, "held_out between 0 and 1"),
    ],
)
def test_rejects_sizes_that_cannot_be_drawn(arguments, words):
    with pytest.raises(ValueError, match=words):
        learning_curve_pair(*two_classes(4, 100, 0), **arguments)


# The recipe.


def test_oracle_recipe_equals_the_estimator_and_opens_without_us(tmp_path):
    metrics, data = run_on(recipe(), tmp_path)
    head = PooledGaussianNB(prior="uniform").fit(data.train.inputs, data.train.labels)
    assert metrics["id/accuracy"] == head.score(data.test.inputs, data.test.labels)
    saved = load_file(tmp_path / "model" / "head.safetensors")
    linear = torch.nn.Linear(WIDTH, CLASSES)
    linear.load_state_dict(saved)
    answers = linear(torch.tensor(data.test.inputs, dtype=torch.float32)).argmax(1)
    np.testing.assert_array_equal(answers.numpy(), head.predict(data.test.inputs))
    assert not (tmp_path / "curve.csv").exists()


def test_property_recipe_leaves_the_curve_and_looks_at_no_other_label(tmp_path):
    metrics, data = run_on(recipe(curve=PairedCurve(ms=(4, 20), repeats=2), seed=2), tmp_path)
    rows = list(csv.DictReader((tmp_path / "curve.csv").open()))
    assert [(row["m"], row["repeat"]) for row in rows] == [(m, r) for m in ("4", "20") for r in "01"]
    curve = learning_curve_pair(data.train.inputs, data.train.labels, (4, 20), 2, 2)
    np.testing.assert_allclose([float(row["naive_bayes"]) for row in rows], curve.naive_bayes.T.ravel(), rtol=1e-5)
    assert metrics["cost/labels"] == len(data.train)


def test_property_smoothing_and_prior_reach_the_estimator(tmp_path):
    metrics, data = run_on(recipe(var_smoothing=10.0, prior="empirical"), tmp_path)
    X, y, new, truth = data.train.inputs, data.train.labels, data.test.inputs, data.test.labels
    assert metrics["id/accuracy"] == PooledGaussianNB(10.0).fit(X, y).score(new, truth)
    assert metrics["id/accuracy"] != PooledGaussianNB().fit(X, y).score(new, truth)


def test_learns_more_from_two_shots_than_variances_for_each_class(tmp_path):
    fields = {"model": ModelRef(name="unused"), "train": DataRef(name="unused"), "test": DataRef(name="unused")}
    ours, _ = run_on(recipe(shots=2), tmp_path / "nb")
    theirs, _ = run_on(SklearnHead(estimator="gaussian_nb", shots=2, **fields), tmp_path / "gaussian")
    assert ours["id/accuracy"] > theirs["id/accuracy"] + 0.05


def test_rejects_fields_that_cannot_be_honoured():
    for changes, words in (({"var_smoothing": -1.0}, "var_smoothing"), ({"curve": {"repeats": 0}}, "repeats")):
        with pytest.raises(RecipeError, match=words):
            recipe(**changes)


# The simulation behind the claim.


def test_oracle_errors_of_the_simulation_are_exact():
    for problem in (Problem.fixed(25), Problem.growing(10)):
        X, y = problem.draw(60_000, np.random.default_rng(0))
        head = PooledGaussianNB().fit(X[:40], y[:40])
        error = problem.error(head)
        assert abs((head.predict(X[40:]) != y[40:]).mean() - error) < 4 * np.sqrt(error * (1 - error) / 60_000)
        regression = LogisticRegression().fit(X[:40], y[:40])
        error = problem.error(regression)
        assert abs((regression.predict(X[40:]) != y[40:]).mean() - error) < 4 * np.sqrt(error * (1 - error) / 60_000)
    X, y = Problem.fixed(40).draw(40_000, np.random.default_rng(1))
    assert Problem.fixed(40).error(PooledGaussianNB().fit(X, y)) == pytest.approx(0.1, abs=1e-3)


def test_oracle_smallest_size_is_that_of_trying_them_all():
    problem, sizes = Problem.growing(40), sizes_up_to(64)
    assert sizes == [4, 6, 8, 12, 16, 22, 32, 46, 64]

    def fit(X, y):
        return PooledGaussianNB(var_smoothing=3.0).fit(X, y)

    for target in (0.3, 0.12, 0.0):
        found, reached = smallest_size(problem, fit, target, 64, 0)
        means = {}
        for size in sizes:
            draws = [problem.draw(64, numpy_generator(0, "naive bayes", draw)) for draw in range(2)]
            means[size] = np.mean([problem.error(fit(X[:size], y[:size])) for X, y in draws])
        enough = [size for size in sizes if means[size] <= target]
        assert (found, reached) == ((enough[0], True) if enough else (64, False))
