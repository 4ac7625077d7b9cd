"""A cheap programmer: a linear model that reads every line of a batch at once and says which to remove.

    x(line) = [ counts of hashed character 2-, 3- and 4-grams / sqrt(their number) ;  place, length and shape ]
    p(remove | line) = 1 / (1 + exp(-(w x + b)))

Lines above a threshold become ``remove_lines``. It learns from documents with programs and needs no graphics card.

Source: stands in for the small language model of Zhou et al., arXiv:2409.17115; ours.
Differs: it removes lines and never replaces inside one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.utils.validation import check_is_fitted

from headwater.core.cache import atomic_path, atomic_write_text
from headwater.corpora.prox_programs import (
    Program,
    RemoveLines,
    Written,
    removed_lines,
    render_program,
    unix_lines,
)

__all__ = ["LineProgrammer"]

NGRAMS = (2, 3, 4)
_FORMAT = 1
_CHUNK = 1 << 19  # characters that are hashed together: the arrays stay in the cache
_PRIME, _MIX = np.uint32(0x01000193), np.uint32(0x9E3779B9)
_NEWLINE = 10


def _table(characters: bytes) -> NDArray[np.float32]:
    found = np.zeros(256, dtype=np.float32)
    found[list(characters)] = 1
    return found


_LOWER = _table(bytes(range(ord("a"), ord("z") + 1)) + bytes(range(128, 256)))
_UPPER = _table(bytes(range(ord("A"), ord("Z") + 1)))
_DIGIT = _table(b"0123456789")
_SPACE = _table(b" \t\r")
_FOLDED = np.arange(256, dtype=np.uint8)  # all digits are one to an n-gram
_FOLDED[list(b"123456789")] = ord("0")
_TERMINAL = _table(b".!?\"':")
NUM_SHAPES = 12


class LineProgrammer(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no annotations
    r"""Writes ``remove_lines`` for documents, by a logistic regression over their lines.

    Args:
        bits: the n-grams are hashed to 2 to this power.
        C: inverse strength of scikit-learn's L2 penalty.
        threshold: probability above which a line is removed.

    Example:
        >>> texts = ["We went to the sea.\nClick here to log in!", "Log in here!\nThe sea was calm that day."]
        >>> model = LineProgrammer().fit(texts * 5, [(RemoveLines(1, 1),), (RemoveLines(0, 0),)] * 5)
        >>> model.predict(["Click to log in!\nWe saw the sea that day."])
        [(RemoveLines(start=0, end=0),)]
    """

    def __init__(self, bits: int = 16, C: float = 10.0, threshold: float = 0.5) -> None:
        self.bits, self.C, self.threshold = bits, C, threshold

    def fit(self, X: Sequence[str], y: Sequence[Program]) -> Self:
        """Learn from documents and their programs, of which the removal of lines and documents counts.

        Raises:
            ValueError: another number of programs than documents, or programs that remove no line or every line.
        """
        if len(X) != len(y):
            raise ValueError(f"every document needs a program; got {len(X)} and {len(y)}.")
        counts = [text.count("\n") + 1 for text in X]
        gone = [removed_lines(program, count) for program, count in zip(y, counts, strict=True)]
        labels = np.concatenate([np.zeros(0, dtype=np.bool_), *gone])
        if labels.all() or not labels.any():
            raise ValueError(
                f"the programs remove {int(labels.sum())} of {len(labels)} lines; some must go and some stay."
            )
        features = sparse.vstack([self._features(batch) for batch in _batches(X)], format="csr")
        model = LogisticRegression(C=self.C, max_iter=500).fit(features, labels)
        self.coef_ = model.coef_[0].astype(np.float32)
        self.intercept_ = float(np.float32(model.intercept_[0]))
        return self

    def _features(self, texts: Sequence[str]) -> sparse.csr_matrix:
        lines = _Lines(texts)
        size = 1 << self.bits
        rows, columns, values = [], [], []
        for hashed, valid in lines.ngrams(self.bits):
            rows.append(lines.owners()[: len(hashed)][valid])
            columns.append(hashed[valid].astype(np.int64))
            values.append(lines.weights()[rows[-1]])
        place = (np.concatenate(rows), np.concatenate(columns))
        grams = sparse.coo_matrix((np.concatenate(values), place), shape=(lines.count, size)).tocsr()
        return sparse.hstack([grams, sparse.csr_matrix(lines.shapes())], format="csr")

    def decision_function(self, X: Sequence[str]) -> NDArray[np.float64]:
        """Log-odds of removal for every line of every document, ``(lines of all documents,)``."""
        check_is_fitted(self, "coef_")
        return np.concatenate([np.zeros(0), *(self._scores(batch) for batch in _batches(X))])

    def _scores(self, texts: Sequence[str]) -> NDArray[np.float64]:
        lines = _Lines(texts)
        table, rest = self.coef_[: 1 << self.bits], self.coef_[1 << self.bits :]
        # In double precision, so that a line's company does not show in the order of the sum.
        sums = np.zeros(lines.count)
        for hashed, valid in lines.ngrams(self.bits):
            found = table[hashed]
            found[~valid] = 0
            sums += np.add.reduceat(found, lines.starts, dtype=np.float64)
        shaped: NDArray[np.float64] = (lines.shapes() * rest.astype(np.float64)).sum(axis=1)
        return sums * lines.weights() + shaped + self.intercept_

    def predict(self, X: Sequence[str]) -> list[Program]:
        """A program for each document; an empty one leaves it as it is."""
        gone = self.decision_function(X) > np.log(self.threshold / (1 - self.threshold))
        counts = np.array([text.count("\n") + 1 for text in X], dtype=np.int64)
        begin = np.concatenate([[0], np.cumsum(counts)])
        first = np.zeros(len(gone) + 1, dtype=np.bool_)
        first[begin] = True  # a run of lines ends with its document
        starts = np.flatnonzero(gone & (first[:-1] | ~np.concatenate([[False], gone[:-1]])))
        ends = np.flatnonzero(gone & (first[1:] | ~np.concatenate([gone[1:], [False]])))
        owner = np.searchsorted(begin, starts, side="right") - 1
        programs: list[list[RemoveLines]] = [[] for _ in X]
        offsets = begin[owner]
        for place, start, end in zip(
            owner.tolist(), (starts - offsets).tolist(), (ends - offsets).tolist(), strict=True
        ):
            programs[place].append(RemoveLines(start, end))
        return [tuple(program) for program in programs]

    def programs(self, texts: Sequence[str]) -> list[Written]:
        """See ``Programmer``."""
        return [Written(render_program(program), program) for program in self.predict(texts)]

    @property
    def fingerprint(self) -> str:
        """Of the weights and the threshold."""
        check_is_fitted(self, "coef_")
        about = np.array([self.intercept_, self.threshold, self.bits])
        return hashlib.blake2b(self.coef_.tobytes() + about.tobytes(), digest_size=16).hexdigest()

    def save(self, directory: Path) -> None:
        """Write ``lines.safetensors`` and ``lines.json``."""
        from safetensors.numpy import save_file

        check_is_fitted(self, "coef_")
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_path(directory / "lines.safetensors") as path:
            save_file({"coef": self.coef_, "intercept": np.array([self.intercept_])}, path)
        atomic_write_text(
            directory / "lines.json", json.dumps({"format": _FORMAT, **self.get_params()}, indent=2) + "\n"
        )

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            ValueError: written by a later version.
        """
        from safetensors.numpy import load_file

        about = json.loads((directory / "lines.json").read_text(encoding="utf-8"))
        if about.pop("format") != _FORMAT:
            raise ValueError(f"{directory}: written by a later version of Headwater; update to read it.")
        model, tensors = cls(**about), load_file(directory / "lines.safetensors")
        model.coef_, model.intercept_ = tensors["coef"], float(tensors["intercept"][0])
        return model


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    begin = 0
    while begin < len(texts):
        end, size = begin + 1, len(texts[begin])
        while end < len(texts) and size + len(texts[end]) < _CHUNK:
            size += len(texts[end])
            end += 1
        yield texts[begin:end]
        begin = end


class _Lines:
    """The lines of several documents as one array of bytes, a newline before each line and at the end.

    Attributes:
        count: how many lines.
        starts: where the newline before each stands, ``(count,)``.
        sizes: bytes of each, ``(count,)``.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        joined = "\n".join(["", *map(unix_lines, texts), ""])
        self._data = np.frombuffer(joined.encode("utf-8", "surrogatepass"), dtype=np.uint8)
        newlines = np.flatnonzero(self._data == _NEWLINE)
        self.starts, self._ends = newlines[:-1], newlines[1:]
        self.sizes = self._ends - self.starts - 1
        self.count = len(self.starts)
        self._places = np.concatenate([np.arange(text.count("\n") + 1) for text in texts])
        self._totals = np.concatenate([np.full(n, n) for n in (text.count("\n") + 1 for text in texts)])

    def owners(self) -> NDArray[np.int64]:
        """The line that each byte belongs to; a newline to the line after it."""
        return np.repeat(np.arange(self.count), np.diff(np.append(self.starts, self._ends[-1])))

    def ngrams(self, bits: int) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.bool_]]]:
        """For each size: the hash of the n-gram at every byte, and whether it lies in one line and its newlines.

        The last newline begins none, so that ``owners`` and ``starts`` fit.
        """
        data = _FOLDED[self._data].astype(np.uint32)
        code = data
        shift = np.uint32(32 - bits)
        last = len(data) - 1
        for size in range(2, max(NGRAMS) + 1):
            code = code[:-1] * _PRIME + data[size - 1 :]
            if size in NGRAMS:
                hashed = np.zeros(last, dtype=np.uint32)
                hashed[: len(code)] = ((code ^ (code >> np.uint32(15))) * _MIX) >> shift
                valid = np.ones(last, dtype=np.bool_)
                for back in range(1, size - 1):
                    valid[np.maximum(self._ends - back, 0)] = False
                valid[len(code) :] = False
                yield hashed, valid

    def weights(self) -> NDArray[np.float32]:
        """One over the root of the number of n-grams of each line, ``(count,)``."""
        # A newline before an empty line is counted once more than it is valid; all such lines are alike.
        grams = sum(np.maximum(self.sizes + 3 - size, 0) for size in NGRAMS)
        found: NDArray[np.float32] = (1 / np.sqrt(np.maximum(grams, 1))).astype(np.float32)
        return found

    def shapes(self) -> NDArray[np.float32]:
        """Place, length and kinds of characters, ``(count, NUM_SHAPES)``, each in [0, 1] or of a logarithm."""
        size = np.maximum(self.sizes, 1).astype(np.float32)

        def share(table: NDArray[np.float32]) -> NDArray[np.float32]:
            found: NDArray[np.float32] = np.add.reduceat(table[self._data[: self._ends[-1]]], self.starts) / size
            return found

        lower, upper, digit, space = map(share, (_LOWER, _UPPER, _DIGIT, _SPACE))
        left = self._totals - 1 - self._places
        empty = self.sizes == 0
        columns = [
            self._places / np.maximum(self._totals - 1, 1),
            1 / (1 + self._places),
            1 / (1 + left),
            np.log1p(self._totals) / 5,
            np.log1p(self.sizes) / 5,
            empty,
            lower,
            upper,
            digit,
            space,
            np.where(empty, 0, 1 - lower - upper - digit - space),
            np.where(empty, 0, _TERMINAL[self._data[self._ends - 1]]),
        ]
        return np.stack(columns, axis=1).astype(np.float32)
