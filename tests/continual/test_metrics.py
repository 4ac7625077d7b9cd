import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from headwater.continual.metrics import accuracy_curve, forgetting, forward_transfer, summarize

# Three tasks of 10, 30 and 20 test samples.
MATRIX = np.array(
    [
        [0.9, 0.0, 0.0],
        [0.6, 0.8, 0.0],
        [0.7, 0.4, 0.5],
    ]
)
COUNTS = [10, 30, 20]


def test_equation_accuracy_curve_weighs_tasks_by_their_size():
    # a_1 = .9;  a_2 = (10*.6 + 30*.8) / 40 = 30/40;  a_3 = (10*.7 + 30*.4 + 20*.5) / 60 = 29/60
    np.testing.assert_allclose(accuracy_curve(MATRIX, COUNTS), [0.9, 0.75, 29 / 60], rtol=1e-15)


def test_equation_summary_by_hand():
    metrics = summarize(MATRIX, COUNTS, local=[0.9, 0.7, 0.8])
    expected = {
        "acc/last": 29 / 60,
        "acc/average": (0.9 + 0.75 + 29 / 60) / 3,
        "acc/last_task_mean": (0.7 + 0.4 + 0.5) / 3,
        "forgetting/max": ((0.9 - 0.7) + (0.8 - 0.4)) / 2,
        "forgetting/first": ((0.9 - 0.7) + (0.8 - 0.4)) / 2,
        "bwt": -0.3,
        "local/mean": 0.8,
    }
    assert metrics == pytest.approx(expected, rel=1e-12)


def test_equation_max_and_first_forgetting_differ_when_a_task_improves_later():
    # Task 1 rises from .5 to .9 after task 2, then falls to .6: max forgets .3, first has gained .1.
    matrix = [[0.5, 0.0, 0.0], [0.9, 0.7, 0.0], [0.6, 0.7, 0.8]]
    assert forgetting(matrix, since="max") == pytest.approx((0.3 + 0.0) / 2)
    assert forgetting(matrix, since="first") == pytest.approx((-0.1 + 0.0) / 2)
    assert summarize(matrix, [1, 1, 1])["bwt"] == pytest.approx(0.05)


def test_equation_forward_transfer_by_hand():
    matrix = [[0.9, 0.6, 0.2], [0.9, 0.9, 0.7], [0.9, 0.9, 0.9]]
    # ((R[1,2] - b_2) + (R[2,3] - b_3)) / 2 = ((.6 - .5) + (.7 - .4)) / 2
    assert forward_transfer(matrix, [0.1, 0.5, 0.4]) == pytest.approx(0.2)
    assert summarize(matrix, [1, 1, 1], initial=[0.1, 0.5, 0.4])["fwt"] == pytest.approx(0.2)


def test_oracle_curve_equals_pooling_samples():
    rng = np.random.default_rng(0)
    counts = np.array([7, 3, 11, 5])
    right = [[rng.random(n) < 0.6 for n in counts] for _ in counts]
    matrix = np.array([[answers.mean() for answers in row] for row in right])
    pooled = [np.concatenate(right[t][: t + 1]).mean() for t in range(len(counts))]
    np.testing.assert_allclose(accuracy_curve(matrix, counts), pooled, rtol=1e-12)


@given(arrays(np.float64, (4, 4), elements=st.floats(0, 1)))
def test_property_max_forgetting_is_never_below_first_nor_negative(matrix):
    assert forgetting(matrix, since="max") >= max(0.0, forgetting(matrix, since="first")) - 1e-15


@given(arrays(np.float64, (4, 4), elements=st.floats(0, 1)), st.integers(1, 100))
def test_property_equal_counts_make_last_the_mean_over_tasks(matrix, count):
    metrics = summarize(matrix, [count] * 4)
    assert metrics["acc/last"] == pytest.approx(metrics["acc/last_task_mean"], abs=1e-12)


def test_property_nothing_but_fwt_reads_above_the_diagonal():
    unmeasured = np.where(np.tri(3, dtype=bool), MATRIX, np.nan)
    assert summarize(unmeasured, COUNTS) == summarize(MATRIX, COUNTS)
    with pytest.raises(ValueError, match="R\\[j-1, j\\]"):
        forward_transfer(unmeasured, [0.1, 0.1, 0.1])


def test_degenerate_one_task_forgets_nothing():
    assert summarize([[0.4]], [5], initial=[0.1]) == {
        "acc/last": 0.4,
        "acc/average": 0.4,
        "acc/last_task_mean": 0.4,
        "forgetting/max": 0.0,
        "forgetting/first": 0.0,
        "bwt": 0.0,
        "fwt": 0.0,
    }


@pytest.mark.parametrize(
    ("matrix", "counts", "words"),
    [
        ([[0.5, 0.5]], [1], "square"),
        (np.zeros((0, 0)), [], "square"),
        ([[0.5]], [1, 2], "one number per task"),
        ([[0.5]], [0], "needs test samples"),
        ([[np.nan]], [1], "below its diagonal"),
        ([[87.6]], [1], "Divide percentages by 100"),
        ([[-0.1]], [1], "fractions"),
    ],
)
def test_rejects_a_matrix_that_is_none(matrix, counts, words):
    with pytest.raises(ValueError, match=words):
        summarize(matrix, counts)


def test_rejects_initial_accuracies_of_other_tasks():
    with pytest.raises(ValueError, match="one accuracy per task"):
        forward_transfer(MATRIX, [0.1])


# The definitions of two other libraries, from their documentation, on right answers counted sample by sample.


@given(
    rights=arrays(np.int64, (4, 4), elements=st.integers(0, 30)),
    sizes=arrays(np.int64, 4, elements=st.integers(30, 40)),
)
def test_oracle_stream_accuracy_forgetting_and_bwt_as_avalanche_defines_them(rights, sizes):
    """StreamAccuracy pools the patterns of a whole stream's evaluation; StreamForgetting takes, for every experience
    but the one just trained on, the accuracy when it was first trained on less the one now, and averages; StreamBWT is
    its opposite."""
    rights = np.tril(rights)  # no answer exists for classes to come
    metrics = summarize(rights / sizes, sizes)
    patterns_right, patterns = 0, 0
    for experience in range(4):
        patterns_right += rights[-1, experience]
        patterns += sizes[experience]
    initial = {experience: rights[experience, experience] / sizes[experience] for experience in range(4)}
    last = {experience: rights[-1, experience] / sizes[experience] for experience in range(4)}
    stream_forgetting = sum(initial[e] - last[e] for e in range(3)) / 3
    assert metrics["acc/last"] == pytest.approx(patterns_right / patterns)
    assert metrics["forgetting/first"] == pytest.approx(stream_forgetting)
    assert metrics["bwt"] == pytest.approx(-stream_forgetting)


@given(
    rights=arrays(np.int64, (4, 4), elements=st.integers(0, 30)),
    sizes=arrays(np.int64, 4, elements=st.integers(30, 40)),
)
def test_oracle_curve_average_and_forgetting_as_lamda_pilot_defines_them(rights, sizes):
    """After each stage PILOT tests on all classes seen, whose share of right answers is a point of its top-1 curve; it
    reports the mean of the curve, and the mean over all groups but the last of their best accuracy at any stage less
    that at the last, from a table of groups by stages."""
    rights = np.tril(rights)
    curve = [rights[stage, : stage + 1].sum() / sizes[: stage + 1].sum() for stage in range(4)]
    table = (rights / sizes).T  # groups by stages
    forgot = np.mean((np.max(table, axis=1) - table[:, 3])[:3])
    metrics = summarize(rights / sizes, sizes)
    np.testing.assert_allclose(accuracy_curve(rights / sizes, sizes), curve)
    assert metrics["acc/average"] == pytest.approx(sum(curve) / len(curve))
    assert metrics["forgetting/max"] == pytest.approx(forgot)
