from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.core.moments import ClassMoments

KINDS = ("none", "diag", "pooled", "per_class")


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(200, 4)) + 3.0, rng.integers(0, 5, 200)


def by_definition(X, y, kind):
    classes = np.unique(y)
    groups = [X[y == c] for c in classes]
    residuals = [g - g.mean(0) for g in groups]
    scatter = {
        "none": lambda: None,
        "diag": lambda: np.stack([(r**2).sum(0) for r in residuals]),
        "pooled": lambda: sum(r.T @ r for r in residuals),
        "per_class": lambda: np.stack([r.T @ r for r in residuals]),
    }[kind]()
    return classes, np.array([len(g) for g in groups]), np.stack([g.mean(0) for g in groups]), scatter


def assert_moments(moments, classes, counts, means, scatter, rtol=1e-10):
    assert np.asarray(moments.classes).tolist() == list(classes)
    assert np.asarray(moments.counts).tolist() == list(counts)
    np.testing.assert_allclose(np.asarray(moments.means), means, rtol=rtol)
    if scatter is None:
        assert moments.scatter is None
    else:
        np.testing.assert_allclose(np.asarray(moments.scatter), scatter, rtol=rtol, atol=rtol * np.abs(scatter).max())


def test_equation_two_chunks_by_hand():
    # 1, 3: mean 2, scatter 2. With 5: d = 3, mean 2 + 3/3 = 3, scatter 2 + 9 * 2 * 1 / 3 = 8.
    moments = ClassMoments(1, scatter="diag").update(np.array([[1.0], [3.0]]), np.array([0, 0]))
    assert (moments.means.item(), moments.scatter.item()) == (2.0, 2.0)
    moments.update(np.array([[5.0]]), np.array([0]))
    assert (moments.means.item(), moments.scatter.item()) == pytest.approx((3.0, 8.0), rel=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("chunks", [1, 7, 200])
def test_oracle_any_chunking_gives_the_moments_of_the_definition(data, kind, backend, chunks):
    X, y = data
    order = np.argsort(y, kind="stable") if chunks == 7 else np.arange(200)  # 7: classes arrive one after another
    moments = ClassMoments(4, scatter=kind)
    for part in np.array_split(order, chunks):
        moments.update(backend(X[part]), backend(y[part]))
    assert isinstance(moments.means, type(backend(X)))
    assert_moments(moments, *by_definition(X, y, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_property_merge_of_shards_is_the_whole_and_leaves_the_shards_alone(data, kind):
    X, y = data
    a = ClassMoments(4, scatter=kind).update(X[:30], y[:30])
    b = ClassMoments(4, scatter=kind).update(X[30:], y[30:])
    shard = by_definition(X[30:], y[30:], kind)
    assert_moments(a.merge(b), *by_definition(X, y, kind))
    twice = np.r_[X[30:], X], np.r_[y[30:], y]
    assert_moments(ClassMoments(4, scatter=kind).merge(b).update(X, y), *by_definition(*twice, kind))
    assert_moments(b, *shard)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(KINDS), st.lists(st.integers(0, 3), min_size=2, max_size=20), st.integers(0, 2**32 - 1), st.data()
)
def test_property_remove_undoes_update(kind, labels, seed, draw):
    X, y = np.random.default_rng(seed).normal(size=(len(labels), 2)), np.array(labels)
    gone = np.array(draw.draw(st.lists(st.booleans(), min_size=len(y), max_size=len(y)).filter(lambda g: not all(g))))
    moments = ClassMoments(2, scatter=kind).update(X, y).remove(X[gone], y[gone])
    classes, counts, means, scatter = by_definition(X[~gone], y[~gone], kind)
    assert moments.classes.tolist() == classes.tolist()
    assert moments.counts.tolist() == counts.tolist()
    np.testing.assert_allclose(moments.means, means, atol=1e-9)
    if scatter is not None:
        np.testing.assert_allclose(moments.scatter, scatter, atol=1e-9)


@pytest.mark.parametrize("kind", ["none", "diag", "per_class"])
def test_property_forget_is_never_having_seen_the_class(data, kind):
    X, y = data
    moments = ClassMoments(4, scatter=kind).update(X, y).forget(2)
    assert_moments(moments, *by_definition(X[y != 2], y[y != 2], kind))
    assert_moments(moments.update(X[y == 2], y[y == 2]), *by_definition(X, y, kind))


def test_property_nothing_cancels_for_a_mean_far_from_zero(data):
    X, y = data
    shifted = ClassMoments(4, scatter="pooled")
    for part in np.array_split(np.arange(200), 50):
        shifted.update(X[part] + 1e6, y[part])
    # E[x^2] - E[x]^2 would lose 12 of 16 digits here; the input itself keeps 10.
    np.testing.assert_allclose(shifted.scatter, by_definition(X, y, "pooled")[3], rtol=1e-7, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_property_low_precision_is_accumulated_in_float64(dtype):
    # In float16 the sum of 5000 ones stops at 2048.
    X = torch.ones(5000, 2, dtype=dtype)
    moments = ClassMoments(2, scatter="diag").update(X, torch.zeros(5000, dtype=torch.int64))
    assert moments.means.dtype == torch.float64
    assert moments.means.tolist() == [[1.0, 1.0]]
    assert moments.scatter.tolist() == [[0.0, 0.0]]


def test_property_float32_moments_stay_float32():
    moments = ClassMoments(2, scatter="pooled", dtype="float32").update(np.ones((3, 2)), np.arange(3))
    assert (moments.means.dtype, moments.scatter.dtype) == (np.float32, np.float32)


def test_property_a_memory_mapped_stream_is_read_in_bounded_memory(tmp_path):
    X = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(200_000, 64))
    X[:] = np.arange(64)
    tracemalloc.start()
    moments = ClassMoments(64, scatter="pooled").update(X, np.arange(200_000) % 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert moments.means[3].tolist() == list(range(64))
    # float64 of everything would be 98 MiB; a chunk is 16 MiB and has a residual and a float64 copy.
    assert peak < 60 * 2**20


def test_property_string_labels_grow_in_length_and_number():
    moments = ClassMoments(1).update(np.ones((2, 1)), np.array(["b", "d"]))
    moments.update(3 * np.ones((2, 1)), np.array(["a long one", "b"]))
    assert moments.classes.tolist() == ["a long one", "b", "d"]
    assert moments.counts.tolist() == [1, 2, 1]
    assert moments.means[:, 0].tolist() == [3.0, 2.0, 1.0]
    assert moments.total == 4


def test_degenerate_no_samples_change_nothing(data):
    X, y = data
    empty = ClassMoments(4, scatter="pooled").update(X[:0], y[:0]).remove(X[:0], y[:0])
    assert empty.total == 0
    assert empty.classes is None
    full = ClassMoments(4, scatter="diag").update(X, y)
    assert_moments(full.update(X[:0], y[:0]).merge(ClassMoments(4, scatter="diag")), *by_definition(X, y, "diag"))


def test_degenerate_removing_everything_leaves_no_class_and_no_scatter(data):
    X, y = data
    moments = ClassMoments(4, scatter="pooled").update(X, y).remove(X[::-1], y[::-1])
    assert moments.total == 0
    assert len(moments.classes) == 0
    np.testing.assert_allclose(moments.scatter, 0.0, atol=1e-9)


def test_rejects_bad_samples_and_stays_as_it_was(data):
    X, y = data
    moments = ClassMoments(4, scatter="diag").update(X, y)
    bad = np.tile(X, (3000, 1))  # more than one chunk, the fault in the last
    bad[-3, 1] = np.nan
    with pytest.raises(ValueError, match=f"row {len(bad) - 3} of X is not finite"):
        moments.update(bad, np.tile(y, 3000))
    with pytest.raises(ValueError, match=r"class 9 holds 0 samples; cannot remove"):
        moments.remove(X, np.full(200, 9))
    with pytest.raises(ValueError, match=r"class 1 holds \d+ samples; cannot remove 200 of them"):
        moments.remove(X, np.ones(200, int))
    with pytest.raises(TypeError, match="labels of dtype <U1 cannot join"):
        moments.update(X[:1], np.array(["a"]))
    with pytest.raises(TypeError, match="cannot take tensors"):
        moments.update(torch.as_tensor(X), torch.as_tensor(y))
    assert_moments(moments, *by_definition(X, y, "diag"))


def test_rejects_shapes_kinds_and_unknown_classes(data):
    X, y = data
    with pytest.raises(ValueError, match=r"X must be \(samples, 3\); got shape \(200, 4\)"):
        ClassMoments(3).update(X, y)
    with pytest.raises(ValueError, match=r"y must be \(200,\).*got shape \(10,\)"):
        ClassMoments(4).update(X, y[:10])
    with pytest.raises(TypeError, match="expected a numpy array or a torch tensor; got list"):
        ClassMoments(4).update(X.tolist(), y)
    with pytest.raises(ValueError, match="n_features must be at least 1"):
        ClassMoments(0)
    with pytest.raises(ValueError, match="scatter must be"):
        ClassMoments(4, scatter="full")
    with pytest.raises(ValueError, match="no class 9 to forget"):
        ClassMoments(4).update(X, y).forget(9)
    with pytest.raises(ValueError, match="use scatter='per_class'"):
        ClassMoments(4, scatter="pooled").update(X, y).forget(1)
    with pytest.raises(ValueError, match="cannot merge"):
        ClassMoments(4).merge(ClassMoments(4, scatter="diag"))
