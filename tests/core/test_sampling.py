from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from headwater.core.sampling import sample_shots

Y = np.random.default_rng(0).choice(["a", "b", "c"], 300)


@pytest.mark.parametrize("nested", [True, False])
def test_property_every_class_gets_its_shots_once(nested):
    drawn = sample_shots(Y, 8, seed=3, nested=nested)
    assert np.unique(drawn).size == 24
    assert Y[drawn].reshape(8, 3).tolist() == [["a", "b", "c"]] * 8


def test_property_nested_shots_are_prefixes_and_fresh_ones_are_not():
    assert np.array_equal(sample_shots(Y, 8, 3)[: 2 * 3], sample_shots(Y, 2, 3))
    assert not set(sample_shots(Y, 2, 3, nested=False)) <= set(sample_shots(Y, 8, 3, nested=False))


def test_property_every_example_is_drawn_equally_often():
    y = np.repeat([0, 1], [20, 30])
    drawn = np.concatenate([sample_shots(y, 5, seed) for seed in range(800)])
    counts = np.bincount(drawn, minlength=50)
    assert stats.chisquare(counts[:20]).pvalue > 1e-3
    assert stats.chisquare(counts[20:]).pvalue > 1e-3


def test_property_the_seed_decides():
    assert np.array_equal(sample_shots(Y, 4, 0), sample_shots(Y, 4, 0))
    assert not np.array_equal(sample_shots(Y, 4, 0), sample_shots(Y, 4, 1))


def test_degenerate_all_examples():
    y = np.array([1, 0, 1, 0])
    assert sorted(sample_shots(y, 2, 0).tolist()) == [0, 1, 2, 3]


def test_rejects_a_class_that_has_too_few():
    with pytest.raises(ValueError, match=r"3 shots need .* too few in \{'b': 1\}"):
        sample_shots(["a", "a", "a", "b"], 3, 0)
    with pytest.raises(ValueError, match="shots must be at least 1; got 0"):
        sample_shots(Y, 0, 0)
    with pytest.raises(ValueError, match=r"y must be one-dimensional; got shape \(1, 2\)"):
        sample_shots([[0, 1]], 1, 0)
