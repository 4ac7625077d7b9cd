from __future__ import annotations

import json
import math
import re
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch.nn import functional

from headwater.adapt.data import Examples, TaskData
from headwater.adapt.nmtune import NMTune, NMTuneBlock, NMTuneClassifier, NMTuneLoss, spectrum, tune
from headwater.adapt.nmtune_loss import consistency_loss, covariance_loss, dominance_loss, singular_values
from headwater.core.recipe import DataRef, ModelRef
from headwater.core.run import Run

CLASSES, DIM = 3, 6


@parametrize_with_checks([NMTuneClassifier(epochs=2, lr=0.1)])
@pytest.mark.filterwarnings("ignore:batches of:UserWarning")
def test_oracle_scikit_learn_finds_an_ordinary_estimator(estimator, check):
    check(estimator)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_data(seed=0, per_class=20, dim=DIM):
    rng = np.random.default_rng(seed)
    y = np.arange(CLASSES * per_class) % CLASSES
    means = 2.5 * np.random.default_rng(99).normal(size=(CLASSES, dim))
    return (means[y] + rng.normal(size=(len(y), dim))).astype(np.float32), y


def quick(**changes):
    return NMTuneClassifier(**({"epochs": 3, "lr": 0.03, "batch_size": 16, "random_state": 0} | changes))


# The terms of the loss.


def test_equation_the_loss_of_two_rows_by_hand():
    # z / |z| = (1, 0), (0, 1); f / |f| = (1, 0), (1, 0): squared differences 0, 0, 1, 1, mean 1/2.
    # Columns (2, 0) and (0, 3): centred (1, -1), (-1.5, 1.5), covariance -3, twice 9 over D = 2: 9.
    # Singular values 3 and 2: -(3 / 5 + 2 / 5) / 2 for m = 2 and -3/5 for m = 1. CE of equal logits: log 2.
    z, f = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[5.0, 0.0], [1.0, 0.0]])
    loss, terms = NMTuneLoss(1.0, 0.04, 0.001, m=1)(z, f, torch.zeros(2, 2), torch.tensor([0, 1]))
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(
        {"ce": math.log(2), "mse": 0.5, "cov": 9.0, "svd": -0.6}
    )
    assert loss.item() == pytest.approx(math.log(2) + 0.5 + 0.04 * 9 - 0.001 * 0.6)
    assert dominance_loss(z, 2).item() == pytest.approx(-0.5)


def test_equation_class_weights_enter_the_cross_entropy_alone():
    z, logits, y = normal(8, 4).float(), normal(8, 2, seed=1).float(), torch.arange(8) % 2
    weight = torch.tensor([3.0, 1.0])
    plain, weighted = (NMTuneLoss()(z, z, logits, y, w)[1] for w in (None, weight))
    assert weighted["ce"] == functional.cross_entropy(logits, y, weight=weight) != plain["ce"]
    assert (weighted["cov"], weighted["svd"]) == (plain["cov"], plain["svd"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_degenerate_precision_of_the_input_does_not_decide_the_loss(dtype):
    z, f, logits = normal(16, 8).to(dtype), normal(16, 8, seed=1).to(dtype), normal(16, 2, seed=2).to(dtype)
    y = torch.arange(16) % 2
    loss = NMTuneLoss()(z, f, logits, y)[0]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(NMTuneLoss()(z.double(), f.double(), logits.double(), y)[0].item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(12, 5), (4, 20), (8, 8), (3, 12)])
def test_oracle_singular_values_and_covariances_are_those_of_the_plain_formulas(shape):
    z = normal(*shape)
    np.testing.assert_allclose(singular_values(z), torch.linalg.svdvals(z), rtol=1e-7)
    cov = torch.cov(z.T)
    off = cov - torch.diag(cov.diagonal())
    assert covariance_loss(z).item() == pytest.approx((off**2).sum().item() / shape[1], rel=1e-10)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (2, 9)])
def test_oracle_gradients_are_those_of_finite_differences(shape):
    z, f = normal(*shape).requires_grad_(), normal(*shape, seed=1)
    for term in (lambda x: dominance_loss(x, 2), covariance_loss, lambda x: consistency_loss(x, f)):
        assert torch.autograd.gradcheck(term, (z,))


def test_property_gradient_at_rank_one_is_finite_and_small():
    z = (normal(6, 1) @ normal(1, 4, seed=1)).requires_grad_()
    dominance_loss(z, 2).backward()
    assert torch.isfinite(z.grad).all()
    assert z.grad.abs().max() < 1e-6  # only kept directions pass a gradient, and the share is 1 whatever their length


def test_property_dominance_lies_between_one_direction_and_all_alike():
    one = normal(8, 1) @ normal(1, 6, seed=1)
    assert dominance_loss(one, 5).item() == pytest.approx(-1 / 5, abs=1e-12)
    alike = torch.linalg.qr(normal(8, 6))[0]
    for z in (alike, alike.T):
        assert dominance_loss(z, 5).item() == pytest.approx(-1 / 6, abs=1e-12)
    for seed in range(5):
        assert -1 / 5 < dominance_loss(normal(8, 6, seed=seed), 5).item() < -1 / 6


def test_property_covariance_of_whitened_and_of_twin_columns():
    whitened = torch.linalg.qr(normal(50, 8) - normal(50, 8).mean(0))[0]
    assert covariance_loss(whitened).item() == pytest.approx(0, abs=1e-6)
    twins = torch.cat((whitened[:, :1], whitened), 1) * 3  # v = 9 / 49 each
    assert covariance_loss(twins).item() == pytest.approx(2 * (9 / 49) ** 2 / 9, abs=1e-9)


def test_property_consistency_knows_directions_only_and_spares_the_features():
    z, f = normal(5, 4).requires_grad_(), normal(5, 4, seed=1).requires_grad_()
    loss = consistency_loss(z, f)
    assert loss.item() == pytest.approx(consistency_loss(7 * z, 0.1 * f).item(), rel=1e-6)
    NMTuneLoss()(z, f, normal(5, 2), torch.tensor([0, 1, 0, 1, 0]))[0].backward()
    assert f.grad is None
    assert z.grad.abs().sum() > 0


def test_degenerate_zero_rows_and_zero_batches_give_numbers():
    z, f = normal(4, 3), normal(4, 3, seed=1)
    z[0], f[1] = 0, 0
    z.requires_grad_()
    loss, _ = NMTuneLoss()(z, f, normal(4, 2), torch.tensor([0, 1, 0, 1]))
    loss.backward()
    assert torch.isfinite(z.grad).all()
    nothing = torch.zeros(4, 3, requires_grad=True)
    value = dominance_loss(nothing)
    value.backward()
    assert value.item() == 0
    assert torch.isfinite(nothing.grad).all()


def test_degenerate_weight_zero_leaves_the_term_out():
    z, f, logits, y = normal(6, 4), normal(6, 4, seed=1), normal(6, 2, seed=2), torch.arange(6) % 2
    loss, terms = NMTuneLoss(0, 0, 0)(z, f, logits, y)
    assert loss == functional.cross_entropy(logits.double(), y)
    assert terms["mse"] == terms["cov"] == terms["svd"] == 0


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: NMTuneLoss(w_cov=-0.1), "w_cov must be a number >= 0; got -0.1"),
        (lambda: NMTuneLoss(m=0), "m must be at least 1; got 0"),
        (lambda: NMTuneLoss()(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1).long()), "got 1"),
        (lambda: NMTuneBlock(4, ratio=0), "must be positive; got 4, 0 and 1"),
        (lambda: spectrum(np.ones((3, 2))), "all rows are the same"),
        (lambda: spectrum(np.ones(3)), r"neither of them 0; got shape \(3,\)"),
    ],
)
def test_rejects_what_has_no_meaning(act, words):
    with pytest.raises(ValueError, match=words):
        act()


# The spectrum.


def test_equation_spectrum_of_known_singular_values():
    # p = 3/4, 1/4: entropy (3/4) log(4/3) + (1/4) log 4; minus log of the largest share log(4/3).
    left, right = torch.linalg.qr(normal(9, 2))[0], torch.linalg.qr(normal(2, 2, seed=1))[0]
    X = left @ torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)) @ right
    found = spectrum(X.numpy(), center=False)
    np.testing.assert_allclose(found.sigmas, [3, 1])
    assert found.sve == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert found.lsvr == pytest.approx(math.log(4 / 3))
    assert isinstance(spectrum(X).sigmas, torch.Tensor)


def test_property_centred_spectrum_ignores_a_shift_and_any_ignores_scale_and_rotation():
    X, turn = normal(30, 5), torch.linalg.qr(normal(5, 5, seed=1))[0]
    assert spectrum(7 * X @ turn + 100).sve == pytest.approx(spectrum(X).sve, rel=1e-9)
    assert spectrum(X + 100, center=False).sve < spectrum(X).sve - 0.5


# The block and the training.


def test_property_block_starts_from_its_generator_and_leaves_the_global_one():
    before = torch.random.get_rng_state()
    first, again, other = (NMTuneBlock(4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.mlp[0].weight, again.mlp[0].weight)
    assert not torch.equal(first.mlp[0].weight, other.mlp[0].weight)
    assert [tuple(p.shape) for p in NMTuneBlock(4, 0.5, 2).mlp.parameters() if p.ndim == 2] == [(2, 4), (2, 2), (4, 2)]


def test_oracle_without_weights_and_with_a_frozen_scale_of_zero_it_is_a_linear_probe():
    X, y = (torch.from_numpy(array) for array in make_data())
    heads = []
    for block in (NMTuneBlock(DIM), torch.nn.Identity()):
        if isinstance(block, NMTuneBlock):
            block.scale.requires_grad_(False).zero_()
        head = torch.nn.Linear(DIM, CLASSES)
        for parameter in head.parameters():
            torch.nn.init.zeros_(parameter)
        optimizer = torch.optim.AdamW([*block.parameters(), *head.parameters()], lr=0.01)
        terms = tune(block, head, NMTuneLoss(0, 0, 0), [(X[:30], y[:30]), (X[30:], y[30:])], optimizer)
        heads.append((head.weight.detach(), terms["ce"]))
    assert heads[0][0].abs().sum() > 0
    torch.testing.assert_close(heads[0][0], heads[1][0], rtol=0, atol=0)
    assert heads[0][1] == heads[1][1]


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor])
def test_property_same_seed_same_bits_and_other_seed_other_head(convert):
    X, y = make_data()
    scores = [quick(random_state=seed).fit(convert(X), convert(y)).decision_function(convert(X)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(scores[0], scores[1])
    assert not np.allclose(scores[0], scores[2])
    np.testing.assert_array_equal(scores[0], quick().fit(X, y).decision_function(X))


def test_property_torch_is_answered_with_torch():
    X, y = (torch.from_numpy(array) for array in make_data())
    head = quick().fit(X, y)
    for answer, dtype in ((head.predict(X), y.dtype), (head.predict_proba(X), X.dtype), (head.transform(X), X.dtype)):
        assert isinstance(answer, torch.Tensor)
        assert answer.dtype == dtype
    assert not head.transform(X).requires_grad
    assert head.predict_proba(X.half()).dtype == torch.float32
    names = np.array(["a", "b", "c"])[y]
    np.testing.assert_array_equal(quick().fit(X, names).predict(X), np.array(["a", "b", "c"])[head.predict(X)])


def test_property_set_output_names_the_features_as_they_came():
    pandas = pytest.importorskip("pandas")
    X, y = make_data()
    frame = pandas.DataFrame(X, columns=[f"f{i}" for i in range(DIM)])
    head = quick().set_output(transform="pandas").fit(frame, y)
    assert list(head.transform(frame).columns) == list(frame.columns)
    np.testing.assert_array_equal(head.transform(frame), quick().fit(X, y).transform(X))


def test_property_a_pipeline_and_a_clone_train_alike():
    X, y = make_data()
    pipe = make_pipeline(StandardScaler(), quick(standardize=False))
    scores = [one.fit(X, y).predict_proba(X) for one in (pipe, clone(pipe))]
    np.testing.assert_array_equal(*scores)
    # standardize does what StandardScaler does.
    np.testing.assert_allclose(scores[0], quick().fit(X, y).predict_proba(X), atol=1e-4)


def test_oracle_the_module_gives_the_estimators_scores_and_is_a_copy():
    X, y = make_data()
    head = quick(layers=2).fit(X, y)
    module = head.to_module()
    with torch.no_grad():
        np.testing.assert_allclose(module(torch.from_numpy(X)), head.decision_function(X), rtol=1e-6)
        np.testing.assert_allclose(module[:2](torch.from_numpy(X)), head.transform(X), rtol=1e-6)
        module[-1].weight.zero_()
    assert head.decision_function(X).std() > 0.1


def test_oracle_transform_then_head_is_predict():
    X, y = make_data()
    head = quick().fit(X, y)
    last = head.arrays()["head"]
    np.testing.assert_allclose(
        head.transform(X) @ last["weight"].T + last["bias"], head.decision_function(X), rtol=1e-4, atol=1e-5
    )


def test_oracle_partial_fit_is_fit_at_a_constant_rate():
    X, y = make_data()
    streamed = quick()
    for _ in range(3):
        streamed.partial_fit(X, y)
    flat = quick()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.optim.lr_scheduler,
            "CosineAnnealingLR",
            lambda optimizer, steps: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        )
        flat.fit(X, y)
    np.testing.assert_array_equal(streamed.decision_function(X), flat.decision_function(X))
    assert len(streamed.history_) == 3
    assert not np.allclose(quick().fit(X, y).decision_function(X), streamed.decision_function(X))


def test_property_partial_fit_goes_on_after_fit_and_keeps_the_standardisation():
    X, y = make_data()
    head = quick().fit(X, y)
    mean = head.arrays()["block"]["mean"]
    before = head.decision_function(X)
    head.partial_fit(X + 5, y)
    np.testing.assert_array_equal(head.arrays()["block"]["mean"], mean)
    assert not np.allclose(head.decision_function(X), before)
    np.testing.assert_allclose(mean, X.mean(0), rtol=1e-5)


def test_property_a_uniform_prior_lifts_the_rare_class():
    X, y = make_data(per_class=60)
    kept = (y != 0) | (np.cumsum(y == 0) <= 4)
    rare = [
        quick(prior=p, epochs=5).fit(X[kept], y[kept]).predict_proba(X)[:, 0].mean() for p in ("empirical", "uniform")
    ]
    assert rare[1] > rare[0] + 0.03


def test_degenerate_last_batch_of_one_row_is_left_out():
    X, y = make_data(per_class=11)  # 33 rows, batches of 16, 16 and 1
    head = quick(epochs=1).fit(X, y)
    assert int(head.module_.block.mlp[1].num_batches_tracked) == 2
    assert np.isfinite(head.predict_proba(X[:1])).all()


def test_degenerate_constant_feature_and_memory_map(tmp_path):
    X, y = make_data()
    X[:, 2] = 7.7
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head = quick().fit(mapped, y)
    np.testing.assert_array_equal(head.predict_proba(mapped), quick().fit(X, y).predict_proba(X))
    assert head.arrays()["block"]["std"][2] == 1


def test_rejects_data_that_cannot_be_learned_from():
    X, y = make_data()
    with pytest.raises(ValueError, match="at least 2 rows; got 1 sample"):
        quick().fit(X[:1], y[:1])
    with pytest.raises(ValueError, match="row 3 of X is not finite"):
        quick().fit(torch.from_numpy(np.where(X[3, 4] == X, np.nan, X)), torch.from_numpy(y))
    with pytest.raises(ValueError, match="Unknown label type: continuous"):
        quick().fit(torch.from_numpy(X), torch.linspace(0, 1, len(y)))
    with pytest.raises(ValueError, match="60 rows have 59 labels"):
        quick().fit(torch.from_numpy(X), torch.from_numpy(y[1:]))
    with pytest.raises(ValueError, match="X has 5 features, but NMTuneClassifier is expecting 6"):
        quick().fit(torch.from_numpy(X), torch.from_numpy(y)).predict(torch.zeros(2, 5))
    stream = quick().partial_fit(X[y < 2], y[y < 2])
    with pytest.raises(ValueError, match=r"label 2 is not one of \[0, 1\]; announce it"):
        stream.partial_fit(X, y)
    with pytest.raises(ValueError, match=r"classes are \[0, 1\] since the first call; got \[0, 1, 2\]"):
        stream.partial_fit(X, y, classes=[0, 1, 2])
    assert quick().partial_fit(X[y < 2], y[y < 2], classes=[2, 1, 0]).partial_fit(X, y).predict_proba(X).shape == (
        60,
        3,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"epochs": 0}, "epochs must be at least 1; got 0"),
        ({"batch_size": 1}, "batch_size must be at least 2; got 1"),
        ({"lr": 0.0}, "lr must be > 0 and weight_decay >= 0; got 0.0"),
        ({"prior": "flat"}, "prior must be 'uniform' or 'empirical'; got 'flat'"),
        ({"w_mse": math.nan}, "w_mse must be a number >= 0"),
    ],
)
def test_rejects_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        quick(**arguments).fit(*make_data())


def test_property_warnings_say_what_to_change():
    X, y = make_data()
    mixed = X @ np.ones((DIM, DIM), np.float32)
    with pytest.warns(UserWarning, match="drowns the labels; set standardize=True"):
        quick(standardize=False, epochs=1).fit(50 * mixed, y)
    with pytest.warns(UserWarning, match="batches of 16 rows by 6 features have fewer than m=9"):
        quick(m=9, epochs=1).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick(epochs=1).fit(50 * mixed, y)


def test_learns_and_the_terms_do_what_they_are_for():
    X, y = make_data(per_class=40)
    X_test, y_test = make_data(seed=1, per_class=100)
    plain = {"w_mse": 0.0, "w_cov": 0.0, "w_svd": 0.0}
    held = {name: {**plain, name: weight} for name, weight in (("w_mse", 30.0), ("w_cov", 1.0), ("w_svd", 3.0))}
    last = {name: quick(epochs=20, m=1, **weights).fit(X, y) for name, weights in {"plain": plain, **held}.items()}
    assert all(head.score(X_test, y_test) > 0.9 for head in last.values())
    z = {name: torch.from_numpy(head.transform(X)) for name, head in last.items()}
    with torch.no_grad():
        f = last["plain"].to_module()[0](torch.from_numpy(X))
    assert consistency_loss(z["w_mse"], f) < 0.5 * consistency_loss(z["plain"], f)
    assert covariance_loss(z["w_cov"]) < 0.5 * covariance_loss(z["plain"])
    assert spectrum(z["w_svd"], center=False).lsvr < spectrum(z["plain"], center=False).lsvr - 0.1


# The recipe.


def recipe(**fields):
    unused = {"model": ModelRef(name="unused"), "train": DataRef(name="unused"), "test": DataRef(name="unused")}
    return NMTune(**unused, **({"epochs": 3, "lr": 0.03, "batch_size": 16} | fields))


def run_on(recipe, directory, seed=0):
    (X, y), (X_test, y_test) = make_data(), make_data(seed=1, per_class=30)
    names = ("a", "b", "c")
    data = TaskData(Examples(X, y), Examples(X_test, y_test), None, names, names, "made")
    with Run(directory, recipe) as run:
        return recipe.run_on(data, run), data


def test_oracle_recipe_saves_what_its_readme_opens_with_torch_alone(tmp_path):
    metrics, data = run_on(recipe(), tmp_path)
    model = tmp_path / "model"
    text = (model / "README.md").read_text()
    code = "\n".join(line[4:] for line in re.search(r"(?m)(^ {4}.*\n)+", text)[0].splitlines())
    assert "headwater" not in code
    *lines, answer = code.splitlines()
    place = {"features": torch.from_numpy(data.test.inputs)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(model)
        exec("\n".join(lines), place)
        probabilities = eval(answer, place)
    labels = torch.from_numpy(data.test.labels)
    assert (probabilities.argmax(1) == labels).double().mean().item() == metrics["id/accuracy"] > 0.8
    assert functional.nll_loss(probabilities.log(), labels).item() == pytest.approx(metrics["id/nll"], rel=1e-5)
    assert json.loads((model / "head.json").read_text())["labels"] == ["a", "b", "c"]
    block, head = load_file(model / "block.safetensors"), load_file(model / "head.safetensors")
    assert metrics["cost/trainable"] == sum(t.numel() for t in (*block.values(), *head.values()))
    assert "`block.safetensors` holds `mean` (6,)" in text
    assert "`head.safetensors` holds `weight` (3, 6), `bias` (3,)." in text


def test_property_recipe_writes_the_spectrum_before_and_after(tmp_path):
    _, data = run_on(recipe(), tmp_path)
    said = json.loads((tmp_path / "spectrum.json").read_text())
    standard = StandardScaler().fit_transform(data.train.inputs)
    assert said["before"]["sve"] == pytest.approx(spectrum(standard).sve, rel=1e-5)
    assert said["after"]["sve"] != said["before"]["sve"]
    assert len(said["after"]["sigmas"]) == DIM


def test_property_every_field_reaches_the_estimator(tmp_path):
    fields = {"w_mse": 0.5, "w_cov": 0.1, "w_svd": 0.2, "m": 2, "ratio": 2.0, "epochs": 4, "lr": 0.01}
    fields |= {"batch_size": 8, "standardize": False, "prior": "empirical"}
    X, y = make_data()
    names = ("a", "b", "c")
    data = TaskData(Examples(X, y), Examples(X, y), None, names, names, "made")
    with Run(tmp_path, recipe(**fields)) as run:
        head = recipe(**fields).adapt(type("Task", (), {"train": data.train, "label_names": names})(), run).head
    assert {name: head.get_params()[name] for name in fields} == fields
    assert len(head.history_) == 4
