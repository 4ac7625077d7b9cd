"""Scores of texts, a batch at a time: like which texts is this one, how often does it use certain words, and so on.

A scorer is called with texts and gives one number each. ``QualityClassifier`` is the fast one: a linear model over
hashed words and pairs of neighbouring words, whose weights are looked up for a whole batch of texts at once.

    x = counts of n-grams / sqrt(number of n-grams)        a text, as 2^bits features
    p(good | x) = 1 / (1 + exp(-(w x + b)))

A word is a run of letters, digits and characters outside ASCII of the lower-cased text.

Source: Brown et al., "Language Models are Few-Shot Learners", arXiv:2005.14165, appendix A (a linear classifier of
    hashed features between curated text and web text); Weinberger et al., "Feature Hashing for Large Scale Multitask
    Learning", arXiv:0902.2206.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import SGDClassifier
from sklearn.utils.validation import check_is_fitted

from headwater.core.cache import atomic_path, atomic_write_text
from headwater.core.recipe import ModelRef

__all__ = ["HFScorer", "LexiconScorer", "QualityClassifier", "TextScorer", "hashed_ngrams"]

_PRIME = np.uint64(0x100000001B3)  # odd, so it has an inverse modulo 2^64
_INVERSE = np.uint64(pow(int(_PRIME), -1, 2**64))
_MIX = np.uint64(0x9E3779B97F4A7C15)
_CHUNK = 1 << 20  # characters that are hashed together: the arrays stay in the cache
_FORMAT = 1


class TextScorer(Protocol):
    """One number for each text."""

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes a score."""
        ...

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Score texts, ``(n,)``; a text's score does not depend on its company."""
        ...


@lru_cache(maxsize=4)
def _powers(base: int, count: int) -> NDArray[np.uint64]:
    found = np.full(count, base, dtype=np.uint64)
    found[0] = 1
    return np.cumprod(found)


def _is_word() -> NDArray[np.bool_]:
    table = np.zeros(256, dtype=np.bool_)
    table[128:] = True
    table[[*range(ord("0"), ord("9") + 1), *range(ord("a"), ord("z") + 1)]] = True
    return table


_WORD_BYTES = _is_word()


def hashed_ngrams(texts: Sequence[str], bits: int = 18) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Words and pairs of neighbouring words of texts as hashes.

    Args:
        texts: any.
        bits: of a hash.

    Returns:
        Which text each n-gram stands in, and its hash, both ``(n-grams,)``.
    """
    owners, hashes, begin = [], [], 0
    while begin < len(texts):
        end, size = begin + 1, len(texts[begin])
        while end < len(texts) and size + len(texts[end]) < _CHUNK:
            size += len(texts[end])
            end += 1
        owner, hashed = _hashed(texts[begin:end], bits)
        owners.append(owner + begin)
        hashes.append(hashed)
        begin = end
    empty = np.empty(0, dtype=np.int64)
    return np.concatenate([empty, *owners]), np.concatenate([empty, *hashes])


def _hashed(texts: Sequence[str], bits: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    encoded = [text.lower().encode("utf-8", "surrogatepass") for text in texts]
    # A separator after every text ends its last word and keeps pairs apart.
    data = np.frombuffer(b"\n".join(encoded) + b"\n", dtype=np.uint8)
    ends_of_texts = np.cumsum([len(text) + 1 for text in encoded])
    inside = _WORD_BYTES[data]
    borders = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    starts, ends = (borders[1::2], borders[2::2]) if inside[0] else (borders[0::2], borders[1::2])
    if inside[0]:
        starts, ends = np.concatenate([[0], starts]), np.concatenate([borders[:1], ends])
    owner = np.searchsorted(ends_of_texts, starts, side="right")
    # The polynomial sum(byte_i p^i) over a word is a difference of prefix sums, shifted to begin at p^0.
    size = 1 << int(len(data) - 1).bit_length()  # so that few tables of powers are made
    prefix = np.zeros(len(data) + 1, dtype=np.uint64)
    np.cumsum(data.astype(np.uint64) * _powers(int(_PRIME), size)[: len(data)], out=prefix[1:])
    words = (prefix[ends] - prefix[starts]) * _powers(int(_INVERSE), size)[starts]
    words = (words ^ (words >> np.uint64(29))) * _MIX
    pairs = words[:-1] * _PRIME + words[1:]
    pairs = (pairs ^ (pairs >> np.uint64(31))) * _MIX
    together = owner[:-1] == owner[1:]
    hashed = np.concatenate([words, pairs[together]]) >> np.uint64(64 - bits)
    return np.concatenate([owner, owner[:-1][together]]).astype(np.int64), hashed.astype(np.int64)


class QualityClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no annotations
    """Tells texts of one kind from texts of another, fast; a ``TextScorer`` of the second class's probability.

    Args:
        bits: the number of features is 2 to this power.
        alpha: L2 penalty of scikit-learn's ``SGDClassifier``, which does the fitting.
        epochs: passes of ``fit``.
        random_state: of the order of the examples.

    Example:
        >>> prose = ["The rain fell on the hills and the river rose.", "She walked to the market in the morning."]
        >>> tables = ["0x1f 0x2e 0x3d 0x4c", "| a | b | c | 1 | 2 |"]
        >>> model = QualityClassifier().fit(prose + tables, [1, 1, 0, 0])
        >>> bool(model(["The river ran to the sea."])[0] > 0.5 > model(["0x1f | 0x2e | 1"])[0])
        True
    """

    def __init__(self, bits: int = 18, alpha: float = 1e-4, epochs: int = 10, random_state: int = 0) -> None:
        self.bits, self.alpha, self.epochs, self.random_state = bits, alpha, epochs, random_state

    def fit(self, X: Sequence[str], y: ArrayLike) -> Self:
        """Learn from texts and their two labels.

        Raises:
            ValueError: labels of one kind or of more than two, or another number of labels than texts.
        """
        self._begin()
        self._model.set_params(max_iter=self.epochs, tol=None)
        self._model.fit(self._features(X), self._labels(X, y))
        return self._taken()

    def partial_fit(self, X: Sequence[str], y: ArrayLike, classes: ArrayLike | None = None) -> Self:
        """Learn from further texts, once; ``classes`` names both labels at the first call.

        Raises:
            ValueError: it was loaded, without what learning would go on from.
        """
        if not hasattr(self, "_model"):
            if hasattr(self, "coef_"):
                raise ValueError("a classifier that was loaded scores and does not learn on; fit a new one.")
            self._begin()
        self._model.partial_fit(self._features(X), np.asarray(y), classes=classes)
        return self._taken()

    def _begin(self) -> None:
        self._model = SGDClassifier(loss="log_loss", alpha=self.alpha, random_state=self.random_state, average=True)

    def _taken(self) -> Self:
        self.classes_ = self._model.classes_
        self.coef_, self.intercept_ = self._model.coef_[0].copy(), float(self._model.intercept_[0])
        return self

    def _labels(self, texts: Sequence[str], y: ArrayLike) -> NDArray[Any]:
        labels = np.asarray(y)
        if len(labels) != len(texts):
            raise ValueError(f"every text needs a label; got {len(texts)} and {len(labels)}.")
        if len(found := np.unique(labels)) != 2:
            raise ValueError(f"two kinds of texts are told apart; the labels are {found.tolist()[:5]}.")
        return labels

    def _features(self, texts: Sequence[str]) -> sparse.csr_matrix:
        owner, hashed = hashed_ngrams(texts, self.bits)
        count = np.bincount(owner, minlength=len(texts))
        values = 1 / np.sqrt(np.maximum(count, 1))[owner]
        return sparse.coo_matrix((values, (owner, hashed)), shape=(len(texts), 1 << self.bits)).tocsr()

    def decision_function(self, X: Sequence[str]) -> NDArray[np.float64]:
        """Log-odds of the second class, ``(n,)``."""
        check_is_fitted(self, "coef_")
        owner, hashed = hashed_ngrams(X, self.bits)
        sums = np.bincount(owner, weights=self.coef_[hashed], minlength=len(X))
        count = np.bincount(owner, minlength=len(X))
        found: NDArray[np.float64] = sums / np.sqrt(np.maximum(count, 1)) + self.intercept_
        return found

    def predict_proba(self, X: Sequence[str]) -> NDArray[np.float64]:
        """Probabilities of both classes, ``(n, 2)``."""
        second = self(X)
        return np.stack([1 - second, second], axis=1)

    def predict(self, X: Sequence[str]) -> NDArray[Any]:
        """The likelier label of each text, ``(n,)``."""
        found: NDArray[Any] = self.classes_[(self.decision_function(X) > 0).astype(np.int64)]
        return found

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Probability of the second class of each text, ``(n,)``."""
        found: NDArray[np.float64] = 1 / (1 + np.exp(-self.decision_function(texts)))
        return found

    @property
    def fingerprint(self) -> str:
        """Of the weights."""
        check_is_fitted(self, "coef_")
        weights = self.coef_.tobytes() + np.float64(self.intercept_).tobytes()
        return hashlib.blake2b(weights + bytes([self.bits]), digest_size=16).hexdigest()

    def save(self, directory: Path) -> None:
        """Write ``quality.safetensors`` and ``quality.json``."""
        from safetensors.numpy import save_file

        check_is_fitted(self, "coef_")
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_path(directory / "quality.safetensors") as path:
            save_file({"coef": self.coef_, "intercept": np.array([self.intercept_])}, path)
        about = {"format": _FORMAT, **self.get_params(), "classes": self.classes_.tolist()}
        atomic_write_text(directory / "quality.json", json.dumps(about, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read what ``save`` wrote; it scores, and learning goes on only with a new ``fit``.

        Raises:
            ValueError: written by a later version.
        """
        from safetensors.numpy import load_file

        about = json.loads((directory / "quality.json").read_text(encoding="utf-8"))
        if about.pop("format") != _FORMAT:
            raise ValueError(f"{directory}: written by a later version of Headwater; update to read it.")
        classes = np.asarray(about.pop("classes"))
        model, tensors = cls(**about), load_file(directory / "quality.safetensors")
        model.classes_, model.coef_, model.intercept_ = classes, tensors["coef"], float(tensors["intercept"][0])
        return model


class LexiconScorer:
    """Share of a text's words that are in a list, such as one of toxic words; 0 for a text without a word.

    Args:
        words: single words, in any case.

    Raises:
        ValueError: no word, or one that is more than one.
    """

    def __init__(self, words: Iterable[str]) -> None:
        listed = {word.strip().lower() for word in words if word.strip()}
        if not listed:
            raise ValueError("the list of words is empty.")
        if many := sorted(word for word in listed if len(re.findall(r"\w+", word)) != 1):
            raise ValueError(f"the list holds what is not one word: {many[0]!r}.")
        self.words = frozenset(listed)

    @property
    def fingerprint(self) -> str:
        """Of the words."""
        return hashlib.blake2b("\n".join(sorted(self.words)).encode(), digest_size=16).hexdigest()

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Score texts; see ``TextScorer``."""
        found = np.zeros(len(texts))
        for place, text in enumerate(texts):
            words = re.findall(r"\w+", text.lower())
            found[place] = sum(word in self.words for word in words) / len(words) if words else 0.0
        return found


class HFScorer:
    """Probability of one label under a sequence classifier of Hugging Face.

    Args:
        model: the classifier.
        label: as the model's ``id2label`` has it.
        max_tokens: a longer text is cut.
        batch_size: texts per forward pass.

    Raises:
        ValueError: the model has no such label.
    """

    def __init__(self, model: ModelRef, label: str, *, max_tokens: int = 512, batch_size: int = 32) -> None:
        self.model, self.label, self.max_tokens, self.batch_size = model, label, max_tokens, batch_size
        self._opened: tuple[Any, Any, int] | None = None
        self.fingerprint = hashlib.sha256(f"{model.model_dump_json()} {label} {max_tokens}".encode()).hexdigest()[:32]

    def _open(self) -> tuple[Any, Any, int]:  # Any: transformers decides
        if self._opened is None:
            from transformers import AutoModelForSequenceClassification

            from headwater.modalities.models import load_tokenizer, model_directory

            model = AutoModelForSequenceClassification.from_pretrained(
                model_directory(self.model),
                revision=self.model.revision,
                trust_remote_code=self.model.trust_remote_code,
                use_safetensors=True,
            ).eval()
            labels = {str(name): int(place) for place, name in model.config.id2label.items()}
            if self.label not in labels:
                raise ValueError(f"{self.model.name!r} has no label {self.label!r}; its labels are {sorted(labels)}.")
            self._opened = model, load_tokenizer(self.model), labels[self.label]
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # every worker opens the model itself

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Score texts; see ``TextScorer``."""
        import torch

        model, tokenizer, place = self._open()
        found = np.zeros(len(texts))
        order = np.argsort([len(text) for text in texts], kind="stable")
        for begin in range(0, len(texts), self.batch_size):
            rows = order[begin : begin + self.batch_size]
            batch = tokenizer(
                [texts[row] for row in rows],
                truncation=True,
                max_length=self.max_tokens,
                padding=True,
                return_tensors="pt",
            ).to(model.device)
            with torch.no_grad():
                found[rows] = model(**batch).logits.float().softmax(-1)[:, place].cpu().numpy()
        return found
