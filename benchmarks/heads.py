"""(e) How fast is a closed-form head fitted: ``GDAClassifier`` against scikit-learn, at 200,000 x 384, 100 classes?

    python -m benchmarks.heads

Linear discriminant analysis is the same classifier as ``covariance="empirical"`` with the classes' own prior, so
predictions must agree before anything is timed. The other yardstick is the one product that any covariance takes,
``X.T @ X`` in float64, the precision that the head accumulates in (scikit-learn stays in the float32 of the features).
Logistic regression needs hundreds of passes; ten of them are timed once, as a lower bound.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from benchmarks.harness import Bound, alternate, report
from headwater.adapt.gda import GDAClassifier

FEATURES, CLASSES, HELD_OUT = 384, 100, 20_000
AGREE = 0.999  # of the predictions: rows at a border may fall either way between float32 and float64
ITERATIONS = 10


def features(rows: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Classes of one covariance whose spectrum falls by a factor of 100, with overlap."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, CLASSES, rows)
    turn = np.linalg.qr(rng.normal(size=(FEATURES, FEATURES)))[0].astype(np.float32)
    X = rng.standard_normal((rows, FEATURES), dtype=np.float32) * np.geomspace(1, 0.1, FEATURES, dtype=np.float32)
    X += 0.05 * rng.standard_normal((CLASSES, FEATURES), dtype=np.float32)[y]
    return X @ turn, y


def lda() -> Any:
    return LinearDiscriminantAnalysis(solver="lsqr")


def same_as_lda() -> GDAClassifier:
    return GDAClassifier(covariance="empirical", prior="empirical")


def check(X: NDArray[np.float32], y: NDArray[np.int64], new: NDArray[np.float32], truth: NDArray[np.int64]) -> str:
    """The same predictions as discriminant analysis; the paper's head is no worse."""
    theirs, ours, default = (head.fit(X, y).predict(new) for head in (lda(), same_as_lda(), GDAClassifier()))
    agreement = float((theirs == ours).mean())
    assert agreement >= AGREE, f"only {agreement:.2%} of the predictions agree"
    accuracy = {name: float((said == truth).mean()) for name, said in (("lda", theirs), ("default", default))}
    assert accuracy["default"] >= accuracy["lda"] - 0.002
    return (
        f"{agreement:.3%} of {len(new):,} predictions equal scikit-learn's; accuracy {accuracy['lda']:.4f}, "
        f"of the default head {accuracy['default']:.4f}"
    )


def logistic_seconds(X: NDArray[np.float32], y: NDArray[np.int64]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        begin = time.process_time()
        LogisticRegression(max_iter=ITERATIONS).fit(X, y)
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=200_000)
    rows = parser.parse_args().rows
    torch.set_num_threads(1)
    X, y = features(rows + HELD_OUT)
    X, new, y, truth = X[:rows], X[rows:], y[:rows], y[rows:]
    wide = X.astype(np.float64)
    with threadpool_limits(1):
        checked = check(X, y, new, truth)
        seconds = alternate(
            {
                "gda": lambda: GDAClassifier().fit(X, y),
                "gda as lda": lambda: same_as_lda().fit(X, y),
                "lda": lambda: lda().fit(X, y),
                "gram": lambda: wide.T @ wide,
            }
        )
        logistic = logistic_seconds(X, y)
    report(
        "How fast is a closed-form head fitted, against discriminant analysis and one Gram product?",
        {
            "lda over gda": (seconds["lda"] / seconds["gda as lda"], Bound("higher", floor=1.2)),
            "gda over gram": (seconds["gda"] / seconds["gram"], Bound("lower", None, 1.15)),
        },
        seconds=seconds,
        checked=checked,
        notes={
            "shape": [rows, FEATURES],
            "classes": CLASSES,
            f"logistic regression, {ITERATIONS} iterations over gda, at least": round(logistic / seconds["gda"], 1),
            "time": "processor seconds, one thread",
        },
    )


if __name__ == "__main__":
    main()
