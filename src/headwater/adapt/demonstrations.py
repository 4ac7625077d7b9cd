"""Labelled examples that a reader is shown with a question: the bank they are found in, and what weight each has.

    p(z_k | x) = softmax_k( score(x, z_k) / temperature )

over the K best of the bank. What is stored stands under its question and answer, what is searched for is a question.

Source: Mueller et al., "Meta-training with Demonstration Retrieval for Efficient Few-shot Learning", arXiv:2307.00119.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headwater.core.rng import numpy_generator
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.pairs import Pairs, source_digest
from headwater.modalities.text.retrieval import Found, Retriever

__all__ = ["DemonstrationBank", "Shown", "majority_answers", "retrieval_log_weights"]

logger = logging.getLogger(__name__)
_ONE_HOT, _NEARLY_ALL = 0.999, 0.95


def retrieval_log_weights(scores: NDArray[np.floating], temperature: float = 1.0) -> NDArray[np.float32]:
    """Log p(z_k | x).

    Args:
        scores: ``(n, K)``; minus infinity for a demonstration that is not there, but not for a whole row.
        temperature: divides the scores; > 0.

    Returns:
        ``(n, K)``; minus infinity where the score is.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive; got {temperature}.")
    scaled = np.asarray(scores, np.float64) / temperature
    scaled = scaled - scaled.max(1, keepdims=True, initial=-np.inf)
    found: NDArray[np.float32] = (scaled - np.log(np.exp(scaled).sum(1, keepdims=True))).astype(np.float32)
    if found.shape[1] > 1 and len(found) and (found.max(1) > math.log(_ONE_HOT)).mean() > _NEARLY_ALL:
        logger.warning(
            "nearly every question gives one demonstration a weight above %g: raise the temperature (now %g).",
            _ONE_HOT,
            temperature,
        )
    return found


@dataclass(frozen=True, eq=False)
class Shown:
    """What is shown with each of n questions.

    Attributes:
        texts: K demonstrations each, the best first; an empty one is none.
        targets: their answers.
        log_weights: log p(z_k | x), ``(n, K)``; minus infinity for none, except where there is no other.
    """

    texts: Sequence[Sequence[str]]
    targets: Sequence[Sequence[str]]
    log_weights: NDArray[np.float32]

    @classmethod
    def nothing(cls, n: int) -> Shown:
        """No demonstration to any of n questions."""
        return cls([[""]] * n, [[""]] * n, np.zeros((n, 1), np.float32))


def majority_answers(shown: Shown) -> list[str]:
    """The most frequent answer among the demonstrations of each question; of equal ones that of the largest weight."""
    answers = []
    for targets, log_weights in zip(shown.targets, shown.log_weights, strict=True):
        counts, mass = Counter[str](), defaultdict[str, float](float)
        for target, log_weight in zip(targets, log_weights, strict=True):
            if log_weight > -np.inf:
                counts[target] += 1
                mass[target] += math.exp(log_weight)
        answers.append(max(counts, key=lambda target, n=counts, w=mass: (n[target], w[target])))  # type: ignore[misc]
    return answers


class DemonstrationBank:
    """Labelled examples in a retriever: each stands under its question and answer, and is found by a question.

    Args:
        retriever: empty, or one that a bank was saved in.
    """

    def __init__(self, retriever: Retriever) -> None:
        self.retriever = retriever
        self._ids_of: dict[str, list[str]] = {}
        for entry in retriever.entries:
            self._ids_of.setdefault(source_digest(entry.meta["source"]), []).append(entry.id)

    def __len__(self) -> int:
        return len(self.retriever)

    def add(self, pairs: Pairs, ids: Sequence[str] | None = None, *, groups: Sequence[str] | None = None) -> None:
        """Store pairs; see ``Retriever.add``."""
        start = len(self)
        self.retriever.add(
            [_demonstration(source, target) for source, target in zip(pairs.sources, pairs.targets, strict=True)],
            ids,
            groups=groups,
            meta=[{"source": s, "target": t} for s, t in zip(pairs.sources, pairs.targets, strict=True)],
        )
        for entry in self.retriever.entries[start:]:
            self._ids_of.setdefault(source_digest(entry.meta["source"]), []).append(entry.id)

    def check_apart(self, sources: Sequence[str], ids: Sequence[str] = ()) -> None:
        """Refuse a bank that holds what it is to be tested on.

        Raises:
            CorpusError: an entry has one of these ids, or the text of one of these sources, case and space aside.
        """
        own = {entry.id for entry in self.retriever.entries}
        leaked = [name for name in ids if name in own]
        leaked += [source[:80] for source in sources if source_digest(source) in self._ids_of]
        if leaked:
            raise CorpusError(
                f"the bank holds {len(leaked)} of the examples it is tested on, the first being {leaked[0]!r}. Leave "
                "them out of the bank."
            )

    def show(
        self,
        sources: Sequence[str],
        k: int,
        *,
        temperature: float = 1.0,
        at_random: int | None = None,
        groups: Sequence[str] | None = None,
    ) -> Shown:
        """The k demonstrations for each question; never the question itself, nor one of its group.

        Args:
            sources: questions.
            k: how many; fewer where the bank has no more.
            temperature: of the weights.
            at_random: a seed: any k of the bank with equal weights, in place of the best ones.
            groups: of the questions.
        """
        own = [self._ids_of.get(source_digest(source), []) for source in sources]
        apart = None if groups is None else [[group] for group in groups]
        if at_random is None:
            found = self.retriever.search(sources, k, exclude_ids=own, exclude_groups=apart)
        else:
            found = self._drawn(sources, k, at_random, own, apart)
        return self.shown(found, temperature)

    def shown(self, found: Found, temperature: float = 1.0) -> Shown:
        """The demonstrations of these rows, with weights from their scores."""
        scores = found.scores.copy()
        scores[np.isneginf(scores).all(1), 0] = 0.0  # the question stands alone
        metas = [[self.retriever.entries[row].meta if row >= 0 else None for row in rows] for rows in found.rows]
        return Shown(
            [[_demonstration(m["source"], m["target"]) + "\n\n" if m else "" for m in row] for row in metas],
            [[m["target"] if m else "" for m in row] for row in metas],
            retrieval_log_weights(scores, temperature),
        )

    def _drawn(
        self,
        sources: Sequence[str],
        k: int,
        seed: int,
        own: Sequence[Sequence[str]],
        groups: Sequence[Sequence[str]] | None,
    ) -> Found:
        entries = self.retriever.entries
        k = min(k, len(entries))
        rows = np.full((len(sources), k), -1, np.int64)
        for place, source in enumerate(sources):
            order = numpy_generator(seed, "demonstrations", source).permutation(len(entries))
            gone, apart = set(own[place]), set(groups[place]) if groups is not None else set()
            taken = (row for row in order if entries[row].id not in gone and entries[row].group not in apart)
            for column, row in zip(range(k), taken, strict=False):
                rows[place, column] = row
        return Found(rows, np.where(rows < 0, -np.inf, 0).astype(np.float32))

    def save(self, directory: Path) -> None:
        """See ``Retriever.save``; load the retriever and make a bank of it again."""
        self.retriever.save(directory)


def _demonstration(source: str, target: str) -> str:
    return f"{source} {target}"
