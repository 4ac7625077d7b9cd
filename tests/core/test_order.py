from __future__ import annotations

import pickle

import numpy as np
import pytest

from headwater.core.order import GroupedIndex, VirtualIndex, permutation


def test_equation_virtual_position_is_epoch_and_permuted_item():
    index = VirtualIndex(n=5, seed=3)
    expected = [(i // 5, permutation(3, i // 5, 5)[i % 5]) for i in range(17)]
    epochs, items = index(np.arange(17))
    assert list(zip(epochs.tolist(), items.tolist(), strict=True)) == expected


def test_equation_permutation_is_pinned():
    # A changed order would silently change every stored run; these numbers may never change.
    assert permutation(0, 0, 8).tolist() == [6, 7, 0, 1, 5, 3, 2, 4]


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_property_each_epoch_reads_every_item_once(n):
    _, items = VirtualIndex(n, seed=1)(np.arange(3 * n))
    assert (np.sort(items.reshape(3, n), axis=1) == np.arange(n)).all()


def test_property_epochs_and_seeds_differ():
    orders = {tuple(permutation(seed, epoch, 50)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_property_every_item_is_equally_likely_everywhere():
    first = np.array([permutation(seed, 0, 4)[0] for seed in range(2000)])
    # Binomial(2000, 1/4) has standard deviation 19; 5 of them is 97.
    assert np.abs(np.bincount(first, minlength=4) - 500).max() < 97


def test_property_seeking_equals_reading_in_order():
    positions = np.random.default_rng(0).permutation(700)
    straight = VirtualIndex(31, 5)(np.arange(700))[1]
    jumping = VirtualIndex(31, 5)
    assert [int(jumping(np.array([p]))[1][0]) for p in positions] == straight[positions].tolist()


def test_property_keeps_two_orders_at_most():
    index = VirtualIndex(10, 0)
    index(np.arange(200))
    assert sorted(index._orders) == [18, 19]


def test_property_pickles_and_compares_by_value():
    index = VirtualIndex(10, 0)
    index([1, 2])
    copy = pickle.loads(pickle.dumps(index))
    assert copy == VirtualIndex(10, 0)
    assert (copy(np.arange(30))[1] == index(np.arange(30))[1]).all()


def test_degenerate_no_items_and_no_positions():
    assert permutation(0, 0, 0).shape == (0,)
    epochs, items = VirtualIndex(3, 0)(np.zeros((0,), dtype=np.int64))
    assert epochs.shape == items.shape == (0,)


def test_rejects_bad_arguments():
    with pytest.raises(ValueError, match="at least one item"):
        VirtualIndex(0, 0)
    with pytest.raises(ValueError, match="positions must be >= 0; got -2"):
        VirtualIndex(3, 0)([0, -2])
    with pytest.raises(ValueError, match="epoch and n must be >= 0"):
        permutation(0, -1, 3)


def test_property_groups_take_turns_and_each_is_read_evenly():
    groups = np.array(["b"] * 5 + ["a"] * 2 + ["c"] * 3)
    epochs, items = GroupedIndex(groups, seed=4)(np.arange(90))
    assert groups[items].tolist() == ["a", "b", "c"] * 30
    for name, size in (("a", 2), ("b", 5), ("c", 3)):
        own = items[groups[items] == name]
        assert (np.sort(own.reshape(-1, size), axis=1) == np.flatnonzero(groups == name)).all()
        assert epochs[groups[items] == name].tolist() == [turn // size for turn in range(30)]


def test_property_grouped_seeking_equals_reading_in_order_and_seeds_differ():
    groups = np.arange(40) % 3
    straight = GroupedIndex(groups, 1)(np.arange(200))[1]
    jumping = GroupedIndex(groups, 1)
    positions = np.random.default_rng(0).permutation(200)
    assert [int(jumping(np.array([p]))[1][0]) for p in positions] == straight[positions].tolist()
    assert (GroupedIndex(groups, 2)(np.arange(200))[1] != straight).any()


def test_degenerate_one_group_is_one_walk():
    epochs, items = GroupedIndex(["x"] * 4, 0)(np.arange(8))
    assert epochs.tolist() == [0] * 4 + [1] * 4
    assert sorted(items[:4].tolist()) == sorted(items[4:].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("groups", [[], [["a"]]])
def test_rejects_groups_of_no_item(groups):
    with pytest.raises(ValueError, match=r"groups must be \(n,\), with n > 0; got shape"):
        GroupedIndex(groups, 0)
