from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from headwater.core.rng import (
    derive_seed,
    hash_bits,
    hash_integers,
    hash_normal,
    hash_uniform,
    numpy_generator,
    torch_generator,
)

ROWS = np.arange(2000)
MASK = (1 << 64) - 1


def splitmix64(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_equation_the_finaliser_gives_the_published_splitmix64_sequence():
    # First outputs of splitmix64 from state 1234567, as listed by Rosetta Code ("Pseudo-random numbers/Splitmix64").
    state, outputs = 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        outputs.append(splitmix64(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def unsplitmix64(z: int) -> int:
    z ^= (z >> 31) ^ (z >> 62)
    z = (z * pow(0x94D049BB133111EB, -1, 1 << 64)) & MASK
    z ^= (z >> 27) ^ (z >> 54)
    z = (z * pow(0xBF58476D1CE4E5B9, -1, 1 << 64)) & MASK
    return z ^ (z >> 30) ^ (z >> 60)


@pytest.mark.parametrize(("seed", "stream", "row", "column"), [(0, 0, 0, 0), (5, 2, 77, 3), (2**64 - 1, 9, -4, 1)])
def test_oracle_bits_match_plain_python_integers(seed, stream, row, column):
    increment = 0x9E3779B97F4A7C15
    key = splitmix64((seed + increment) & MASK)
    key = splitmix64(key ^ stream)
    key = splitmix64(key ^ (row & MASK))
    expected = splitmix64((key + (column + 1) * increment) & MASK)
    assert int(hash_bits(seed, [row], column + 1, stream)[0, column]) == expected


def test_property_values_are_frozen_across_versions():
    # A change here silently changes every collator's draws and breaks the resumption of existing runs.
    assert hash_bits(0, [0, 1], 2).tolist() == [
        [3235846975224723415, 8729291162158418770],
        [2765294355062310483, 16724932771396429036],
    ]
    assert derive_seed(0, "mask", 3) == 1707478565581207680


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=12), st.integers(0, 2**64 - 1), st.randoms())
def test_property_a_row_draws_the_same_in_any_batch_and_order(rows, seed, random):
    whole = hash_uniform(seed, rows, 5, stream=3)
    order = random.sample(range(len(rows)), len(rows))
    assert np.array_equal(hash_uniform(seed, [rows[i] for i in order], 5, stream=3), whole[order])
    assert np.array_equal(hash_uniform(seed, rows[-1:], 2, stream=3), whole[-1:, :2])


@pytest.mark.parametrize("axis", ["rows", "columns", "seeds", "streams"])
def test_property_uniform_along_every_axis(axis):
    draws = {
        "rows": lambda: hash_uniform(1, np.arange(100_000), 1),
        "columns": lambda: hash_uniform(1, [0], 100_000),
        "seeds": lambda: np.stack([hash_uniform(s, [0], 1) for s in range(5000)]),
        "streams": lambda: np.stack([hash_uniform(1, [0], 1, stream=s) for s in range(5000)]),
    }[axis]().ravel()
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    assert stats.kstest(draws, "uniform").pvalue > 1e-3
    # Neighbours are uncorrelated: four standard errors.
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4 / np.sqrt(draws.size)


def test_property_normal_is_standard_normal_and_always_finite():
    draws = hash_normal(2, np.arange(50_000), 4).ravel()
    assert np.isfinite(draws).all()
    assert stats.kstest(draws, "norm").pvalue > 1e-3
    assert abs(stats.skew(draws)) < 4 * np.sqrt(6 / draws.size)
    assert abs(stats.kurtosis(draws)) < 4 * np.sqrt(24 / draws.size)


@pytest.mark.parametrize("word", [0, MASK])
def test_degenerate_the_extreme_words_stay_inside_the_ranges(word):
    # The finaliser is invertible, so the row that draws a given word first can be computed.
    g = 0x9E3779B97F4A7C15
    chain = splitmix64(splitmix64((0 + g) & MASK) ^ 0)
    row = np.array([unsplitmix64((unsplitmix64(word) - g) & MASK) ^ chain], dtype=np.uint64)
    assert int(hash_bits(0, row, 1)[0, 0]) == word
    assert np.isfinite(hash_normal(0, row, 1)).all()
    assert 0.0 <= hash_uniform(0, row, 1)[0, 0] < 1.0
    assert hash_integers(0, row, 1, 0, 3)[0, 0] == (0 if word == 0 else 2)


def test_property_integers_are_uniform_over_their_range():
    draws = hash_integers(3, np.arange(30_000), 2, -3, 8).ravel()
    counts = np.bincount(draws + 3, minlength=11)
    assert counts.size == 11
    assert stats.chisquare(counts).pvalue > 1e-3
    wide = hash_integers(3, np.arange(1000), 5, 0, 2**53)
    assert wide.min() >= 0
    assert wide.max() < 2**53


def test_property_no_word_is_drawn_twice():
    words = np.concatenate([hash_bits(s, ROWS, 16, stream=t).ravel() for s in range(4) for t in range(4)])
    assert np.unique(words).size == words.size  # 512,000 words of 64 bits: a chance collision has probability 7e-9


def test_property_one_changed_input_bit_changes_half_of_the_output_bits():
    base = hash_bits(0, ROWS, 1)
    for changed in (
        hash_bits(1, ROWS, 1),
        hash_bits(0, ROWS, 1, stream=1),
        hash_bits(0, ROWS ^ 1, 1),
        hash_bits(0, ROWS, 2)[:, 1:],
    ):
        flipped = np.bitwise_count(base ^ changed).mean() / 64
        assert abs(flipped - 0.5) < 4 * 0.5 / np.sqrt(64 * ROWS.size)


def test_property_derived_seeds_depend_on_the_whole_path_and_do_not_collide():
    paths = [(), ("a",), ("b",), ("a", "b"), ("ab",), ("1",), (1,), (-1,), ("a", 1), (1, "a"), ('a", "b',)]
    seeds = {derive_seed(s, *path) for s in (0, 1, -1, 2**70) for path in paths}
    assert len(seeds) == 4 * len(paths)
    many = {derive_seed(0, "epoch", i) for i in range(20_000)}
    assert len(many) == 20_000
    assert all(0 <= s < 2**63 for s in seeds | many)
    assert derive_seed(np.int64(3), np.int32(4)) == derive_seed(3, 4)


def test_property_generators_are_named_and_leave_the_global_ones_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = torch.rand(4, generator=torch_generator(0, "dropout"))
    assert torch.equal(first, torch.rand(4, generator=torch_generator(0, "dropout")))
    assert not torch.equal(first, torch.rand(4, generator=torch_generator(0, "noise")))
    assert np.array_equal(numpy_generator(0, "x").random(3), numpy_generator(0, "x").random(3))
    assert not np.array_equal(numpy_generator(0, "x").random(3), numpy_generator(1, "x").random(3))
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])


def test_property_importing_the_module_does_not_import_torch():
    code = "import sys, headwater.core.rng; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_degenerate_no_rows_and_no_columns():
    assert hash_uniform(0, [], 3).shape == (0, 3)
    assert hash_normal(0, [1, 2], 0).shape == (2, 0)
    assert (hash_integers(0, ROWS, 2, 5, 6) == 5).all()


def test_rejects_what_would_wrap_round_silently():
    with pytest.raises(TypeError, match="rows must be integers; got dtype float64"):
        hash_uniform(0, [0.5], 1)
    with pytest.raises(ValueError, match=r"one-dimensional; got shape \(1, 1\)"):
        hash_uniform(0, [[1]], 1)
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*64\); got -1"):
        hash_uniform(-1, [1], 1)
    with pytest.raises(ValueError, match="stream must be in"):
        hash_uniform(0, [1], 1, stream=2**64)
    with pytest.raises(ValueError, match="n must be >= 0; got -2"):
        hash_uniform(0, [1], -2)
    with pytest.raises(ValueError, match="low=4, high=4"):
        hash_integers(0, [1], 1, 4, 4)
    with pytest.raises(TypeError):
        derive_seed(0, 1.5)
