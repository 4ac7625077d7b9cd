"""(e) How fast is a closed-form head fitted, and in how much memory, against scikit-learn?

    python -m benchmarks.heads

In memory, 200,000 x 384 with 100 classes. Linear discriminant analysis is the same classifier as
``covariance="empirical"`` with the classes' own prior, so predictions must agree before anything is timed. The other
yardstick is the one product that any covariance takes, ``X.T @ X`` in float64, the precision that the head accumulates
in (scikit-learn stays in the float32 of the features). Logistic regression needs hundreds of passes; ten of them are
timed once, as a lower bound. Naive Bayes is held against ``GaussianNB`` on 29 classes of a tenth of the rows, which has
variances for each class and is timed with its predictions; and against the sums of the columns and of their squares.

From a file, 1,000,000 x 768, in chunks of 10,000 rows through ``partial_fit``: each side once, alone in a process, with
the resident memory above that at the start. Discriminant analysis has no ``partial_fit``; it is given the mapped file,
whose pages count as its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from threadpoolctl import threadpool_limits

from benchmarks.harness import Bound, alternate, own_peak_bytes, peak_of, report
from headwater.adapt.gda import GDAClassifier
from headwater.adapt.naive_bayes import PooledGaussianNB

FEATURES, CLASSES, HELD_OUT = 384, 100, 20_000
FEW_CLASSES = 29
WIDE, CHUNK = 768, 10_000
AGREE = 0.999  # of the predictions: rows at a border may fall either way between float32 and float64
ITERATIONS = 10
GIB = 1 << 30
STREAMS: dict[str, Callable[[], Any]] = {
    "gda": GDAClassifier,
    "naive bayes": PooledGaussianNB,
    "gaussian nb": GaussianNB,
    "lda": lambda: lda(),
}


def features(rows: int, classes: int = CLASSES) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Classes of one covariance whose spectrum falls by a factor of 100, with overlap."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, classes, rows)
    turn = np.linalg.qr(rng.normal(size=(FEATURES, FEATURES)))[0].astype(np.float32)
    X = rng.standard_normal((rows, FEATURES), dtype=np.float32) * np.geomspace(1, 0.1, FEATURES, dtype=np.float32)
    X += 0.05 * rng.standard_normal((classes, FEATURES), dtype=np.float32)[y]
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


def check_naive_bayes(X: NDArray[np.float32], y: NDArray[np.int64]) -> str:
    """The same predictions as scikit-learn's, once its variances are pooled."""
    theirs = GaussianNB().fit(X, y)
    theirs.var_ = np.tile((theirs.class_prior_[:, None] * theirs.var_).sum(0), (len(theirs.classes_), 1))
    agreement = float((theirs.predict(X) == PooledGaussianNB().fit(X, y).predict(X)).mean())
    assert agreement >= AGREE, f"only {agreement:.2%} of the predictions of naive Bayes agree"
    return f"{agreement:.3%} of {len(X):,} of naive Bayes equal GaussianNB's with pooled variances"


def column_sums(X: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums of columns and of their squares, in blocks: the squares of all rows would be timed by their page faults."""
    blocks = (X[start : start + CHUNK] for start in range(0, len(X), CHUNK))
    return np.sum([block.sum(0) + (block * block).sum(0) for block in blocks], axis=0)


def logistic_seconds(X: NDArray[np.float32], y: NDArray[np.int64]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        begin = time.process_time()
        LogisticRegression(max_iter=ITERATIONS).fit(X, y)
    return time.process_time() - begin


def write_features(home: Path, rows: int) -> None:
    """``X.npy`` and ``y.npy``, the last chunk for predictions; written chunk by chunk."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, CLASSES, rows + CHUNK)
    np.save(home / "y.npy", y)
    means = 0.15 * rng.standard_normal((CLASSES, WIDE), dtype=np.float32)
    X = np.lib.format.open_memmap(home / "X.npy", mode="w+", dtype=np.float32, shape=(len(y), WIDE))
    for start in range(0, len(y), CHUNK):
        labels = y[start : start + CHUNK]
        X[start : start + CHUNK] = means[labels] + rng.standard_normal((len(labels), WIDE), dtype=np.float32)
    X.flush()


def stream(side: str, home: Path) -> None:
    """Fit one side from the file, predict the last chunk, and print what that took."""

    def read(start: int, stop: int) -> NDArray[np.float32]:
        # Mapped anew each time, so that pages read before do not stay in this process.
        return np.load(home / "X.npy", mmap_mode="r")[start:stop]

    y = np.load(home / "y.npy")
    rows, head = len(y) - CHUNK, STREAMS[side]()
    before, begin = own_peak_bytes(), time.process_time()
    with threadpool_limits(1):
        if hasattr(head, "partial_fit"):
            for start in range(0, rows, CHUNK):
                head.partial_fit(read(start, start + CHUNK), y[start : start + CHUNK], classes=np.arange(CLASSES))
        else:
            head.fit(read(0, rows), y[:rows])
        answers = head.predict(read(rows, rows + CHUNK))
    seconds = time.process_time() - begin
    accuracy = float((answers == y[rows:]).mean())
    print(json.dumps({"peak_bytes": own_peak_bytes() - before, "seconds": seconds, "accuracy": accuracy}))


def streamed(rows: int) -> dict[str, dict[str, float]]:
    """What each side took, by its name."""
    with tempfile.TemporaryDirectory() as home:
        write_features(Path(home), rows)
        return {side: json.loads(peak_of("benchmarks.heads", "--side", side, "--home", home)[1]) for side in STREAMS}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--file-rows", type=int, default=1_000_000, help="3 KB of disk each")
    parser.add_argument("--side", choices=STREAMS, help="used by the script itself, with --home")
    parser.add_argument("--home", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.side:
        stream(arguments.side, arguments.home)
        return
    rows = arguments.rows
    X, y = features(rows + HELD_OUT)
    X, new, y, truth = X[:rows], X[rows:], y[:rows], y[rows:]
    wide = X.astype(np.float64)
    few, few_y = features(rows // 10, FEW_CLASSES)
    with threadpool_limits(1):
        checked = f"{check(X, y, new, truth)}; {check_naive_bayes(few, few_y)}"
        seconds = alternate(
            {
                "gda": lambda: GDAClassifier().fit(X, y),
                "gda as lda": lambda: same_as_lda().fit(X, y),
                "lda": lambda: lda().fit(X, y),
                "gram": lambda: wide.T @ wide,
                "naive bayes": lambda: PooledGaussianNB().fit(wide, y),
                "column sums": lambda: column_sums(wide),
                "naive bayes, predicting": lambda: PooledGaussianNB().fit(few, few_y).predict(few),
                "gaussian nb, predicting": lambda: GaussianNB().fit(few, few_y).predict(few),
            }
        )
        logistic = logistic_seconds(X, y)
    found = streamed(arguments.file_rows)
    took = {side: said["seconds"] for side, said in found.items()}
    report(
        "How fast is a closed-form head fitted, and in how much memory, against scikit-learn?",
        {
            "lda over gda": (seconds["lda"] / seconds["gda as lda"], Bound("higher", floor=1.2)),
            "gda over gram": (seconds["gda"] / seconds["gram"], Bound("lower", None, 1.15)),
            "gaussian nb over naive bayes, predictions too": (
                seconds["gaussian nb, predicting"] / seconds["naive bayes, predicting"],
                Bound("higher", floor=5.0),
            ),
            "naive bayes over column sums": (seconds["naive bayes"] / seconds["column sums"], Bound("lower", 2.0)),
            "from a file, lda over gda": (took["lda"] / took["gda"], Bound("higher", None)),
            "from a file, gaussian nb over naive bayes": (
                took["gaussian nb"] / took["naive bayes"],
                Bound("higher", None),
            ),
            "memory of gda, GiB": (found["gda"]["peak_bytes"] / GIB, Bound("lower", 1.0)),
            "memory of naive bayes, GiB": (found["naive bayes"]["peak_bytes"] / GIB, Bound("lower", 1.0)),
        },
        seconds=seconds | {f"{side}, from a file": value for side, value in took.items()},
        checked=checked,
        notes={
            "shape": [rows, FEATURES],
            "shape of the file": [arguments.file_rows, WIDE],
            "classes": CLASSES,
            f"logistic regression, {ITERATIONS} iterations over gda, at least": round(logistic / seconds["gda"], 1),
            "memory from a file, MiB": {side: round(said["peak_bytes"] / (1 << 20)) for side, said in found.items()},
            "accuracy from a file": {side: round(said["accuracy"], 4) for side, said in found.items()},
            "time": "processor seconds, one thread",
        },
    )


if __name__ == "__main__":
    main()
