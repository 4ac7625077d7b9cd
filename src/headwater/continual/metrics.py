"""What a stream of tasks is judged by: one implementation for every method and for matrices of others.

Input is R, ``(tasks, tasks)``: R[t, j] is the accuracy on the test set of task j after learning task t, and n_j the
size of that test set. With T the last task (tasks counted from 1 in the equations, from 0 in the code)::

    a_t              = sum_{j<=t} n_j R[t, j] / sum_{j<=t} n_j
    acc/last         = a_T
    acc/average      = mean_t a_t
    acc/last_task_mean = mean_j R[T, j]
    forgetting/max   = mean_{j<T} (max_t R[t, j] - R[T, j])
    forgetting/first = mean_{j<T} (R[j, j] - R[T, j]),    bwt = -forgetting/first
    fwt              = mean_{j>=2} (R[j-1, j] - b_j),      b_j: accuracy on task j before anything was learned

Source: Lopez-Paz, Ranzato, "Gradient Episodic Memory for Continual Learning", arXiv:1706.08840 (R, bwt, fwt);
Chaudhry et al., "Riemannian Walk for Incremental Learning", arXiv:1801.10112 (forgetting/max).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Scenario", "accuracy_curve", "forgetting", "forward_transfer", "summarize"]

Scenario = Literal["class", "task", "domain", "class_blurry"]


def accuracy_curve(matrix: ArrayLike, counts: ArrayLike) -> NDArray[np.float64]:
    """Return a_t, ``(tasks,)``: the accuracy on all test samples of the tasks seen so far, pooled.

    Args:
        matrix: R, ``(tasks, tasks)``, fractions in [0, 1]; above the diagonal NaN is allowed (not measured).
        counts: test samples per task, ``(tasks,)``, all positive.

    Raises:
        ValueError: no square matrix, a value outside [0, 1] or missing, or counts that do not fit.
    """
    matrix, counts = _checked(matrix, counts)
    weights = np.tril(np.broadcast_to(counts, matrix.shape))
    curve: NDArray[np.float64] = (weights * np.nan_to_num(matrix)).sum(1) / weights.sum(1)
    return curve


def forgetting(matrix: ArrayLike, *, since: Literal["max", "first"] = "max") -> float:
    """Return the mean loss of accuracy on earlier tasks after the last one.

    Args:
        matrix: as in ``accuracy_curve``.
        since: ``max`` compares with the best accuracy the task ever had, ``first`` with that right after learning it.

    Returns:
        In [-1, 1]; at ``max`` never negative. 0 with a single task, which leaves nothing to forget.

    Raises:
        ValueError: as ``accuracy_curve``.
    """
    matrix, _ = _checked(matrix, np.ones(len(np.asarray(matrix))))
    if len(matrix) == 1:
        return 0.0
    before = np.nanmax(matrix, axis=0) if since == "max" else np.diag(matrix)
    return float((before - matrix[-1])[:-1].mean())


def forward_transfer(matrix: ArrayLike, initial: ArrayLike) -> float:
    """Return the mean gain on a task not yet learned over the model before the stream; 0 with a single task.

    Args:
        matrix: as in ``accuracy_curve``, with the first diagonal above the main one measured.
        initial: b_j, ``(tasks,)``: accuracy on each task's test set before anything was learned.

    Raises:
        ValueError: as ``accuracy_curve``, or ``initial`` has another length, or R[j-1, j] is missing.
    """
    matrix, initial = _checked(matrix, np.ones(len(np.asarray(matrix))))[0], np.asarray(initial, dtype=np.float64)
    if initial.shape != matrix[0].shape:
        raise ValueError(f"initial must hold one accuracy per task, shape {matrix[0].shape}; got {initial.shape}.")
    if len(matrix) == 1:
        return 0.0
    ahead = np.diag(matrix, k=1)
    if np.isnan(ahead).any():
        raise ValueError("forward transfer needs R[j-1, j] for every task; the matrix holds NaN there.")
    return float((ahead - initial[1:]).mean())


def summarize(
    matrix: ArrayLike, counts: ArrayLike, *, local: ArrayLike | None = None, initial: ArrayLike | None = None
) -> dict[str, float]:
    """Return the metrics of this module under their fixed names.

    Args:
        matrix: R, as in ``accuracy_curve``.
        counts: test samples per task.
        local: ``(tasks,)``: accuracy on each task after the last one when only that task's classes may be answered;
            gives ``local/mean``.
        initial: b_j as in ``forward_transfer``; gives ``fwt``. Leave it out where classes arrive over time: no answer
            exists for a class before its task, so the figure would be 0 whatever was learned.

    Raises:
        ValueError: as the functions above.
    """
    curve, first = accuracy_curve(matrix, counts), forgetting(matrix, since="first")
    metrics = {
        "acc/last": float(curve[-1]),
        "acc/average": float(curve.mean()),
        "acc/last_task_mean": float(np.asarray(matrix, dtype=np.float64)[-1].mean()),
        "forgetting/max": forgetting(matrix, since="max"),
        "forgetting/first": first,
        "bwt": 0.0 - first,
    }
    if local is not None:
        metrics["local/mean"] = float(np.asarray(local, dtype=np.float64).mean())
    if initial is not None:
        metrics["fwt"] = forward_transfer(matrix, initial)
    return metrics


def _checked(matrix: ArrayLike, counts: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    matrix, counts = np.asarray(matrix, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"the accuracy matrix must be square, tasks by tasks; got shape {matrix.shape}.")
    if counts.shape != matrix[0].shape:
        raise ValueError(f"counts must hold one number per task, shape {matrix[0].shape}; got {counts.shape}.")
    if not (counts > 0).all():
        raise ValueError(f"every task needs test samples; got counts {counts.tolist()}.")
    if np.isnan(matrix[np.tril_indices_from(matrix)]).any():
        raise ValueError("the accuracy matrix lacks values on or below its diagonal; every task seen must be measured.")
    if np.nanmin(matrix) < 0 or np.nanmax(matrix) > 1:
        raise ValueError(
            f"accuracies are fractions in [0, 1]; got values from {np.nanmin(matrix)} to {np.nanmax(matrix)}. "
            "Divide percentages by 100."
        )
    return matrix, counts
