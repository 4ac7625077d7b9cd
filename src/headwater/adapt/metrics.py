"""What a classifier's answers are judged by: one implementation for every method of the stage.

    accuracy   share of examples whose largest score is their label's
    macro_f1   F1 of each class that occurs among labels or answers, averaged
    nll        - mean log p(label)                                        (nats)
    ece        sum_b n_b / n |accuracy_b - confidence_b| over 15 equal-width bins of the confidence

Source: Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599, eq. 3 (ece).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score

from headwater.adapt.arrays import log_softmax
from headwater.core.stats import calibration_error

__all__ = ["BINS", "evaluate"]

BINS = 15


def evaluate(scores: NDArray[Any], labels: NDArray[np.int64]) -> dict[str, float]:  # Any: float32 or float64
    """Return ``accuracy``, ``macro_f1``, ``nll`` and ``ece``.

    Args:
        scores: logits or log-probabilities, ``(n, classes)``, n > 0.
        labels: class indices, ``(n,)``.
    """
    log_probabilities = log_softmax(np.asarray(scores, dtype=np.float64))
    answers = log_probabilities.argmax(1)
    correct = answers == labels
    return {
        "accuracy": float(correct.mean()),
        "macro_f1": float(f1_score(labels, answers, average="macro")),
        "nll": float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        "ece": calibration_error(np.exp(log_probabilities.max(1)), correct, BINS),
    }
