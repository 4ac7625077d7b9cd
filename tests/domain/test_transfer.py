"""The transfer matrix: its figures by hand, and against a model whose losses have a closed form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from headwater.domain.transfer import TransferMatrix, similarity_transfer_correlation

# Rows: the start and after a, b, c. Columns: a, b, c.
BPB = [[4.0, 5.0, 6.0], [2.0, 4.5, 6.5], [2.5, 3.0, 5.0], [2.25, 3.5, 4.0]]


def worked() -> TransferMatrix:
    return TransferMatrix(np.array(BPB), ("a", "b", "c"), np.array([2.0, 3.25, 3.5]))


def test_equation_figures_by_hand() -> None:
    matrix = worked()
    assert matrix.zero_shot.tolist() == [4, 5, 6]
    assert matrix.cpt.tolist() == [2, 3, 4]
    assert matrix.last.tolist() == [2.25, 3.5, 4]
    assert matrix.learned.tolist() == [4 - 2, 4.5 - 3, 5 - 4]
    assert matrix.specialisation is not None
    assert matrix.specialisation.tolist() == [0, 0.25, -0.5]
    assert matrix.forward().tolist() == [0, 5 - 4.5, 6 - 5]
    assert matrix.backward(1).tolist() == [2 - 2.5, 3 - 3.5]
    assert matrix.backward(2).tolist() == [2 - 2.25]
    assert matrix.backward_last.tolist() == [-0.25, -0.5, 0]
    assert matrix.forgetting.tolist() == [0.25, 0.5, 0]


def test_equation_the_summary_leaves_out_what_is_zero_by_definition() -> None:
    summary = worked().summary()
    assert summary["stream/forward"] == pytest.approx((0.5 + 1) / 2)
    assert summary["stream/specialisation"] == pytest.approx((0.25 - 0.5) / 2)
    assert summary["stream/backward"] == pytest.approx(-(0.25 + 0.5) / 2)
    assert summary["stream/forgetting"] == pytest.approx((0.25 + 0.5) / 2)
    assert summary["stream/last"] == pytest.approx((2.25 + 3.5 + 4) / 3)
    assert "stream/specialisation" not in TransferMatrix(np.array(BPB), ("a", "b", "c")).summary()


def test_equation_forgetting_is_against_the_best_since_the_domains_own_stage() -> None:
    better_later = np.array([[1.0, 9.0], [4.0, 9.0], [3.0, 2.0]])  # the start's 1.0 does not count
    assert TransferMatrix(better_later, ("a", "b")).forgetting.tolist() == [0, 0]


def test_oracle_a_model_of_counts_has_the_cross_entropy_of_mixtures() -> None:
    # Each domain is a source of single symbols. A model that counts what it has read predicts the mixture of the
    # sources so far, so every loss in the matrix is the cross-entropy of a source under a mixture.
    rng = np.random.default_rng(0)
    sources = rng.dirichlet(np.ones(5), size=4)
    start, sizes = np.full(5, 20.0), np.array([100.0, 50.0, 200.0, 10.0])

    def loss(counts: np.ndarray, source: np.ndarray) -> float:
        return float(-(source * np.log2(counts / counts.sum())).sum())

    states = [start]
    for source, size in zip(sources, sizes, strict=True):
        states.append(states[-1] + size * source)
    measured = TransferMatrix(
        np.array([[loss(state, source) for source in sources] for state in states]),
        ("a", "b", "c", "d"),
        np.array([loss(start + size * source, source) for source, size in zip(sources, sizes, strict=True)]),
    )
    for j in range(4):
        read = np.r_[100.0, sizes[: j + 1]]  # 100 symbols of the uniform start
        mixture = read @ np.vstack([np.full(5, 0.2), sources[: j + 1]]) / read.sum()
        assert measured.cpt[j] == pytest.approx(-(sources[j] @ np.log2(mixture)), abs=1e-9)
        alone = (100 * 0.2 + sizes[j] * sources[j]) / (100 + sizes[j])
        assert measured.specialisation is not None
        expected = sources[j] @ (np.log2(mixture) - np.log2(alone))
        assert measured.specialisation[j] == pytest.approx(expected, abs=1e-9)


def test_property_identical_domains_transfer_backward() -> None:
    source = np.array([0.7, 0.2, 0.1])
    states = [np.ones(3) + 10 * i * source for i in range(4)]
    losses = [[float(-(source @ np.log2(s / s.sum())))] * 3 for s in states]
    matrix = TransferMatrix(np.array(losses), ("a", "b", "c"))
    assert (matrix.backward(1) > 0).all()
    assert (matrix.forward()[1:] > 0).all()
    assert matrix.forgetting.tolist() == [0, 0, 0]


def test_oracle_files_and_frame_hold_the_matrix(tmp_path: Path) -> None:
    worked().save(tmp_path)
    with np.load(tmp_path / "matrix.npz", allow_pickle=False) as stored:
        assert stored["bpb"].tolist() == BPB
        assert stored["domains"].tolist() == ["a", "b", "c"]
    again = TransferMatrix.load(tmp_path / "matrix.npz")
    assert again.to_dict() == worked().to_dict() == json.loads((tmp_path / "matrix.json").read_text())
    assert worked().to_dict()["backward"] == {"1": -0.5, "2": -0.25}
    frame = worked().to_frame()
    assert frame.loc["after b", "c"] == 5.0
    assert frame.loc["alone"].tolist() == [2.0, 3.25, 3.5]
    TransferMatrix(np.array(BPB), ("a", "b", "c")).save(tmp_path / "without")
    assert TransferMatrix.load(tmp_path / "without" / "matrix.npz").dapt is None


def test_equation_similar_domains_that_help_each_other_correlate() -> None:
    # Learning a helps b most (.5 against -.5), b helps a less than c, c helps b less than a: gains off the diagonal are
    # (a,b) .5, (a,c) -.5, (b,a) -.5, (b,c) 1.5, (c,a) .25, (c,b) -.5.
    matrix, order = worked(), [[9, 4, 1], [2, 9, 6], [3, 1.5, 9]]
    from scipy.stats import spearmanr

    expected = spearmanr([4, 1, 2, 6, 3, 1.5], [0.5, -0.5, -0.5, 1.5, 0.25, -0.5]).statistic
    assert similarity_transfer_correlation(matrix, order) == pytest.approx(expected)
    assert np.isnan(similarity_transfer_correlation(matrix, np.ones((3, 3))))


def test_degenerate_one_domain() -> None:
    matrix = TransferMatrix(np.array([[2.0], [1.0]]), ("a",))
    assert matrix.learned.tolist() == [1.0]
    assert "stream/backward" not in matrix.summary()
    assert all(np.isfinite(value) for value in matrix.summary().values())


def test_rejects_what_is_no_matrix_of_stages() -> None:
    names = ("a", "b", "c")
    with pytest.raises(ValueError, match=r"shape \(4, 3\); got \(3, 3\)"):
        TransferMatrix(np.ones((3, 3)), names)
    with pytest.raises(ValueError, match=r"dapt must hold one loss for each of 3 domains; got shape \(2,\)"):
        TransferMatrix(np.ones((4, 3)), names, np.ones(2))
    with pytest.raises(ValueError, match=r"the matrix must be finite; got nan at \(0, 1\)"):
        TransferMatrix(np.array([[1, np.nan, 1], *[[1.0, 1, 1]] * 3]), names)
    with pytest.raises(ValueError, match=r"dapt must be finite; got inf at \(2,\)"):
        TransferMatrix(np.ones((4, 3)), names, np.array([1, 1, np.inf]))
    with pytest.raises(ValueError, match=r"k must be in \[1, 2\].*got 3"):
        worked().backward(3)
    with pytest.raises(ValueError, match=r"a row for each of 3 domains.*got \(2, 2\)"):
        similarity_transfer_correlation(worked(), np.ones((2, 2)))
