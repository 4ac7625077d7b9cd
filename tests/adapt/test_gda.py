from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.covariance import LedoitWolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.utils.estimator_checks import parametrize_with_checks

from headwater.adapt.gda import GDAClassifier
from headwater.adapt.gda_unlabelled import GDAEM, synthesize_new_classes

CLASSES, WIDTH = 4, 12


@parametrize_with_checks([GDAClassifier()])
def test_oracle_scikit_learn_finds_an_ordinary_estimator(estimator, check):
    check(estimator)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(CLASSES), [30, 40, 25, 35])
    mixing = rng.normal(size=(WIDTH, WIDTH))
    return (rng.normal(size=(CLASSES, WIDTH)) * 2)[y] + rng.normal(size=(y.size, WIDTH)) @ mixing / 3, y


@pytest.fixture
def wide():
    rng = np.random.default_rng(1)
    y = np.arange(20) % CLASSES
    return rng.normal(size=(CLASSES, 64))[y] + rng.normal(size=(20, 64)), y


def unit(X):
    return X / np.linalg.norm(X, axis=1, keepdims=True)


def centred(scores):
    return scores - scores.mean(axis=1, keepdims=True)


def logits(gda, X):
    return X @ gda.coef_.T + gda.intercept_


def by_the_paper(X, y, counts=None):
    """Official route: covariance, explicit pseudo-inverse, one class at a time."""
    means = np.stack([X[y == c].mean(0) for c in np.unique(y)])
    Z = X - means[np.unique(y, return_inverse=True)[1]]
    S = Z.T @ Z / (len(X) - 1)
    P = X.shape[1] * np.linalg.pinv((len(X) - 1) * S + np.trace(S) * np.eye(X.shape[1]))
    W = means @ P
    return W, -np.log(len(means)) - 0.5 * (W * means).sum(1)


def test_equation_one_feature_by_hand():
    # Means 1 and 5, residuals -1, 1, -1, 1: S = 4/3, P = 1 / (4 + 4/3) = 3/16, W = mu P, b = log(1/2) - mu W / 2.
    gda = GDAClassifier().fit(np.array([[0.0], [2.0], [4.0], [6.0]]), [0, 0, 1, 1])
    np.testing.assert_allclose(gda.precision_, [[3 / 16]])
    np.testing.assert_allclose(gda.coef_, [[3 / 16], [15 / 16]])
    np.testing.assert_allclose(gda.intercept_, np.log(0.5) - np.array([3 / 32, 75 / 32]))


@pytest.mark.parametrize("which", ["data", "wide"])
def test_oracle_ks_is_the_explicit_formula(which, request):
    X, y = request.getfixturevalue(which)
    gda = GDAClassifier().fit(X, y)
    W, b = by_the_paper(X, y)
    np.testing.assert_allclose(gda.coef_, W, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(gda.intercept_, b, rtol=1e-8)
    np.testing.assert_allclose(gda.means_ @ gda.precision_, gda.coef_, rtol=1e-8, atol=1e-10)


def test_oracle_empirical_is_scikit_learns_linear_discriminant_analysis(data):
    X, y = data
    ours = GDAClassifier("empirical", prior="empirical").fit(X, y).decision_function(X)
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(X, y).decision_function(X)
    np.testing.assert_allclose(centred(ours), centred(theirs), atol=1e-6)


def test_oracle_empirical_without_full_rank_is_the_least_norm_solution(wide):
    X, y = wide
    ours = GDAClassifier("empirical", prior="empirical").fit(X, y).decision_function(X)
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(X, y).decision_function(X)
    np.testing.assert_allclose(centred(ours), centred(theirs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prior", ["uniform", "empirical"])
def test_oracle_diagonal_is_naive_bayes_with_shared_variances(data, prior):
    X, y = data
    share = np.bincount(y) / len(y)
    means = np.stack([X[y == c].mean(0) for c in range(CLASSES)])
    variance = sum(share[c] * X[y == c].var(axis=0) for c in range(CLASSES)) + 1e-9
    log_prior = np.log(share if prior == "empirical" else np.full(CLASSES, 1 / CLASSES))
    joint = log_prior - 0.5 * ((X[:, None] - means) ** 2 / variance).sum(2)
    ours = GDAClassifier("diagonal", prior=prior).fit(X, y)
    np.testing.assert_allclose(centred(ours.decision_function(X)), centred(joint), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ours.predict_proba(X), np.exp(joint) / np.exp(joint).sum(1, keepdims=True), atol=1e-10)


def test_oracle_ledoit_wolf_is_scikit_learns_estimate_of_the_residuals(data):
    X, y = data
    means = np.stack([X[y == c].mean(0) for c in range(CLASSES)])
    precision = LedoitWolf(assume_centered=True).fit(X - means[y]).precision_
    np.testing.assert_allclose(GDAClassifier("ledoit_wolf").fit(X, y).coef_, means @ precision, rtol=1e-8, atol=1e-10)
    assert not np.allclose(GDAClassifier("oas").fit(X, y).coef_, means @ precision)


def test_oracle_cholesky_and_woodbury_agree(wide):
    X, y = wide
    one, other = (GDAClassifier(solver=s).fit(X, y) for s in ("cholesky", "woodbury"))
    np.testing.assert_allclose(one.coef_, other.coef_, rtol=1e-8, atol=1e-9 * abs(one.coef_).max())
    np.testing.assert_allclose(one.intercept_, other.intercept_, rtol=1e-8)
    np.testing.assert_allclose(one.precision_, other.precision_, atol=1e-9 * abs(one.precision_).max())


@pytest.mark.parametrize("covariance", ["ks", "empirical", "diagonal"])
@pytest.mark.parametrize("chunks", [1, 3, 130])
def test_property_partial_fit_in_any_chunking_is_fit(data, covariance, chunks):
    X, y = data
    whole = GDAClassifier(covariance, normalize=True).fit(X, y)
    stream = GDAClassifier(covariance, normalize=True)
    for rows in np.array_split(np.arange(len(y)), chunks):  # sorted by class: classes arrive one after another
        stream.partial_fit(X[rows], y[rows])
    np.testing.assert_allclose(stream.coef_, whole.coef_, rtol=1e-9, atol=1e-9 * abs(whole.coef_).max())
    np.testing.assert_allclose(stream.intercept_, whole.intercept_, rtol=1e-9)


def test_property_partial_fit_goes_on_after_a_fit_through_woodbury(wide):
    X, y = wide
    gda = GDAClassifier().fit(X[:12], y[:12]).partial_fit(X[12:], y[12:])
    np.testing.assert_allclose(gda.coef_, by_the_paper(X, y)[0], rtol=1e-8, atol=1e-9)


def test_property_order_of_rows_changes_nothing(data):
    X, y = data
    order = np.random.default_rng(5).permutation(len(y))
    one, other = GDAClassifier().fit(X, y), GDAClassifier().fit(X[order], y[order])
    np.testing.assert_allclose(one.coef_, other.coef_, rtol=1e-10, atol=1e-10 * abs(one.coef_).max())


def test_property_shifting_rotating_and_scaling_features(data):
    X, y = data
    base = GDAClassifier().fit(X, y)
    shift = np.linspace(-2, 2, WIDTH)
    moved = GDAClassifier().fit(X + shift, y)
    np.testing.assert_allclose(moved.predict_proba(X + shift), base.predict_proba(X), atol=1e-9)
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(WIDTH, WIDTH)))[0]
    turned = GDAClassifier().fit(X @ rotation, y)
    np.testing.assert_allclose(turned.decision_function(X @ rotation), base.decision_function(X), atol=1e-8)
    scaled = GDAClassifier().fit(7.0 * X, y)
    np.testing.assert_allclose(7.0 * X @ scaled.coef_.T, X @ base.coef_.T, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("which", ["data", "wide"])
def test_property_normalize_is_scaling_rows_beforehand(which, request):
    X, y = request.getfixturevalue(which)
    inside, before = GDAClassifier(normalize=True).fit(X, y), GDAClassifier().fit(unit(X), y)
    np.testing.assert_allclose(inside.decision_function(X), before.decision_function(unit(X)), rtol=1e-9, atol=1e-9)


def zero_shot_data(wide):
    X, y = wide
    return unit(X), y, unit(np.random.default_rng(3).normal(size=(CLASSES, 64)))


def test_oracle_alpha_zero_is_zero_shot_exactly(wide):
    X, y, T = zero_shot_data(wide)
    np.testing.assert_array_equal(
        GDAClassifier(zero_shot=T, alpha=0.0).fit(X, y).decision_function(X), X @ (100.0 * T).T
    )


def test_oracle_the_ensemble_is_the_sum_of_its_parts(wide):
    X, y, T = zero_shot_data(wide)
    ensemble = GDAClassifier(zero_shot=T, alpha=0.3).fit(X, y).decision_function(X)
    np.testing.assert_allclose(
        ensemble, 100 * X @ T.T + 0.3 * GDAClassifier().fit(X, y).decision_function(X), atol=1e-9
    )


@pytest.mark.parametrize(("useful", "expected"), [(True, "small"), (False, "large")])
def test_learns_alpha_from_how_good_the_zero_shot_weights_are(useful, expected):
    rng = np.random.default_rng(4)
    y = np.arange(120) % CLASSES
    means = unit(rng.normal(size=(CLASSES, 64)))
    X = unit(means[y] + 0.1 * rng.normal(size=(120, 64)))
    T = means if useful else means[::-1].copy()
    gda = GDAClassifier(zero_shot=T).fit(X, y)
    assert gda.score(X, y) > 0.9
    assert set(gda.alpha_curve_) == {10.0**p for p in range(-4, 3)}
    assert gda.alpha_curve_[gda.alpha_] == max(gda.alpha_curve_.values())
    assert (gda.alpha_ >= 10) is (expected == "large")
    paper = GDAClassifier(zero_shot=T, alpha="validation").fit(X[:80], y[:80], X[80:], y[80:])
    accuracies = {
        a: GDAClassifier(zero_shot=T, alpha=a).fit(X[:80], y[:80]).score(X[80:], y[80:]) for a in paper.alpha_curve_
    }
    assert paper.alpha_curve_ == pytest.approx(accuracies)


def test_property_alpha_is_cross_validated_without_the_fold_that_it_scores(wide):
    # Labels are noise: scored on its own training rows the Gaussian head would look perfect, and alpha would be large.
    X, _, T = zero_shot_data(wide)
    y = np.random.default_rng(8).permutation(np.arange(20) % CLASSES)
    gda = GDAClassifier(zero_shot=T).fit(X, y)
    assert GDAClassifier().fit(X, y).score(X, y) == 1.0
    assert gda.alpha_curve_[100.0] < 0.8


@pytest.mark.parametrize("solver", ["cholesky", "woodbury"])
@pytest.mark.parametrize("zero_shot", [False, True])
def test_oracle_torch_and_numpy_agree(wide, solver, zero_shot):
    X, y, T = zero_shot_data(wide)
    T = T if zero_shot else None
    X = X.astype(np.float32)
    ours = GDAClassifier(solver=solver, zero_shot=T).fit(X, y)
    tensors = GDAClassifier(solver=solver, zero_shot=T).fit(torch.from_numpy(X), torch.from_numpy(y))
    scores = tensors.decision_function(torch.from_numpy(X))
    assert isinstance(scores, torch.Tensor)
    assert isinstance(tensors.predict(torch.from_numpy(X)), torch.Tensor)
    assert tensors.alpha_ == ours.alpha_
    np.testing.assert_allclose(scores.numpy(), ours.decision_function(X), atol=1e-5 * abs(scores).max().item())
    np.testing.assert_allclose(tensors.predict_proba(torch.from_numpy(X)).numpy(), ours.predict_proba(X), atol=1e-4)


def test_property_half_precision_features_give_float64_moments(data):
    X, y = data
    half = GDAClassifier().fit(torch.from_numpy(X).half(), torch.from_numpy(y))
    assert half.means_.dtype == torch.float64
    full = GDAClassifier().fit(X.astype(np.float16).astype(np.float64), y)
    np.testing.assert_allclose(half.coef_.numpy(), full.coef_, rtol=1e-8, atol=1e-9)


def test_property_the_linear_layer_and_the_saved_head_say_the_same(wide, tmp_path):
    X, y, T = zero_shot_data(wide)
    names = np.array(["ant", "bee", "cat", "dog"])[y]
    gda = GDAClassifier(zero_shot=T, alpha=1.0).fit(X, names)
    linear = gda.to_linear()
    np.testing.assert_allclose(linear(torch.from_numpy(X).float()).detach().numpy(), logits(gda, X), atol=1e-3)
    gda.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "head.safetensors")) == {"weight", "bias", "zero_shot"}
    assert json.loads((tmp_path / "head.json").read_text())["classes"] == ["ant", "bee", "cat", "dog"]
    opened = GDAClassifier.load(tmp_path)
    np.testing.assert_array_equal(opened.predict(X), gda.predict(X))
    np.testing.assert_allclose(opened.decision_function(X), gda.decision_function(X), rtol=1e-12)
    assert opened.get_params()["alpha"] == 1.0
    with pytest.raises(ValueError, match="loaded without its moments"):
        opened.partial_fit(X, names)


def test_learns_em_from_poor_posteriors_on_separated_gaussians():
    rng = np.random.default_rng(0)
    y = np.arange(600) % 2
    X = np.where(y[:, None] == 1, 2.0, -2.0) + rng.normal(size=(600, 8))
    said = np.where(rng.random(600) < 0.6, y, 1 - y)  # right six times in ten
    for convert in (np.asarray, torch.as_tensor):
        em = GDAEM().fit(convert(X), posteriors=convert(np.where(np.eye(2)[said] == 1, 0.9, 0.1)))
        assert (np.asarray(em.predict(convert(X))) == y).mean() > 0.99
        assert em.n_iter_ <= 50


def test_learns_em_from_zero_shot_weights():
    rng = np.random.default_rng(1)
    y = np.arange(900) % 3
    means = unit(rng.normal(size=(3, 32)))
    X = unit(means[y] + 0.2 * rng.normal(size=(900, 32)))
    T = unit(means + 0.4 * rng.normal(size=(3, 32)))
    zero_shot = (X @ T.T).argmax(1) == y
    assert zero_shot.mean() < 0.95
    em = GDAEM(T).fit(X)
    assert (em.predict(X) == y).mean() > zero_shot.mean() + 0.03
    np.testing.assert_allclose(em.predict_proba(X).sum(1), 1.0)


def test_property_em_started_from_the_labels_takes_one_gda_step(data):
    X, y = data
    em = GDAEM(max_iter=1).fit(X, posteriors=np.eye(CLASSES)[y])
    np.testing.assert_allclose(em.predict_proba(X), GDAClassifier().fit(X, y).predict_proba(X), atol=1e-9)


def test_oracle_new_classes_match_the_formula_class_by_class(wide):
    X, y, T = zero_shot_data(wide)
    base, new = y < 2, T[2:]
    gda = GDAClassifier().fit(X[base], y[base])
    weight, bias = synthesize_new_classes(gda, new, X[base], k=5, text_copies=3)
    precisions, means = [], []
    for t in new:
        rows = np.vstack([X[base][np.argsort(-(X[base] @ t))[:5]], np.tile(t, (3, 1))])
        S = (rows - t).T @ (rows - t) / 7
        precisions.append(64 * np.linalg.inv(7 * S + np.trace(S) * np.eye(64)))
        means.append(rows.mean(0))
    P, means = np.mean(precisions, axis=0), np.stack(means)
    np.testing.assert_allclose(weight, means @ P, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(bias, np.log(1 / 2) - 0.5 * np.einsum("cd,de,ce->c", means, P, means), rtol=1e-8)
    ensemble = GDAClassifier(zero_shot=T[:2], alpha=0.5).fit(X[base], y[base])
    np.testing.assert_allclose(
        synthesize_new_classes(ensemble, new, X[base], k=5, text_copies=3)[0],
        0.5 * weight + 100 * new,
        rtol=1e-8,
        atol=1e-9,
    )
    with pytest.raises(ValueError, match="k must be from 1 to the 10 rows"):
        synthesize_new_classes(gda, new, X[base])
    with pytest.raises(ValueError, match="must have 64 columns"):
        synthesize_new_classes(gda, new[:, :3], X[base])


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor])
def test_degenerate_one_shot_is_the_nearest_mean_and_says_so(wide, convert):
    X, y = wide
    with pytest.warns(UserWarning, match="no spread within any class"):
        gda = GDAClassifier().fit(convert(X[:CLASSES]), convert(y[:CLASSES]))
    distances = ((X[:, None] - X[:CLASSES]) ** 2).sum(2)
    np.testing.assert_array_equal(np.asarray(gda.predict(convert(X))), distances.argmin(1))


def test_degenerate_one_shot_cannot_choose_alpha(wide):
    X, y, T = zero_shot_data(wide)
    with pytest.warns(UserWarning, match="no spread within"), pytest.warns(UserWarning, match="alpha cannot be cross"):
        gda = GDAClassifier(zero_shot=T).fit(X[:CLASSES], y[:CLASSES])
    assert (gda.alpha_, gda.alpha_curve_) == (1.0, {})


def test_degenerate_two_shots_choose_alpha_without_warning(wide):
    X, y, T = zero_shot_data(wide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert GDAClassifier(zero_shot=T).fit(X[: 2 * CLASSES], y[: 2 * CLASSES]).alpha_curve_


def test_rejects_features_and_weights_that_do_not_fit(wide):
    X, y, T = zero_shot_data(wide)
    with pytest.raises(ValueError, match=r"zero_shot must be \(classes, features\) = \(4, 64\); got \(3, 64\)"):
        GDAClassifier(zero_shot=T[:3]).fit(X, y)
    with pytest.raises(ValueError, match="need unit-norm features; got a row of norm 2"):
        GDAClassifier(zero_shot=T).fit(2.0 * X, y)
    with pytest.raises(ValueError, match="need unit-norm features"):
        GDAClassifier(zero_shot=T, alpha=1.0).fit(X, y).predict(2.0 * X)
    assert GDAClassifier(zero_shot=T, alpha=1.0, normalize=True).fit(2.0 * X, y).score(3.0 * X, y) > 0
    with pytest.raises(ValueError, match="Input X contains NaN"):
        GDAClassifier().fit(np.where(X[3, 4] == X, np.nan, X), y)
    with pytest.raises(ValueError, match="row 3 of X is not finite"):
        GDAClassifier().fit(torch.from_numpy(np.where(X[3, 4] == X, np.nan, X)), torch.from_numpy(y))
    with pytest.raises(ValueError, match="X has 5 features, but GDAClassifier is expecting 64"):
        GDAClassifier().fit(torch.from_numpy(X), torch.from_numpy(y)).predict(torch.zeros(2, 5))


def test_rejects_streams_that_it_cannot_honour(wide):
    X, y, T = zero_shot_data(wide)
    with pytest.raises(ValueError, match="partial_fit cannot choose alpha='auto'"):
        GDAClassifier(zero_shot=T).partial_fit(X, y)
    with pytest.raises(ValueError, match="oas needs all rows at once"):
        GDAClassifier("oas").partial_fit(X, y)
    early = GDAClassifier().partial_fit(X[y != 2], y[y != 2], classes=[0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"no sample of class\(es\) \[2\] yet"):
        early.predict(X)
    assert early.partial_fit(X[y == 2], y[y == 2]).predict(X).shape == (20,)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"covariance": "full"}, "covariance must be one of"),
        ({"prior": "flat"}, "prior must be one of"),
        ({"solver": "qr"}, "solver must be one of"),
        ({"solver": "woodbury", "covariance": "diagonal"}, "solves covariance='ks' only"),
        ({"alpha": -1.0}, "alpha must be 'auto', 'validation' or a number >= 0; got -1"),
    ],
)
def test_rejects_arguments(data, arguments, words):
    with pytest.raises(ValueError, match=words):
        GDAClassifier(**arguments).fit(*data)


def test_rejects_em_without_a_start(data):
    with pytest.raises(ValueError, match="give posteriors to start from"):
        GDAEM().fit(data[0])
    with pytest.raises(ValueError, match=r"posteriors must be \(130, classes\); got shape \(3, 2\)"):
        GDAEM().fit(data[0], posteriors=np.ones((3, 2)))
