"""Steps of curation as blocks of datatrove, for any of its pipelines; needs the extra ``curate``.

    Score        writes a number of each document to its metadata, a batch at a time, and keeps every document
    Keep         drops by an expression over the metadata, so a threshold can change without scoring again
    KeepBest     drops all but the best share, by a threshold that is learned from all documents before it
    ParetoKeep   keeps by chance, the more likely the better the score
    Sample       keeps by chance
    Decontaminate drops what repeats a run of words of texts that must stay unseen

Chance is a function of (seed, step, id of the document): neither order, nor shard, nor number of workers matters.

Source: Brown et al., "Language Models are Few-Shot Learners", arXiv:2005.14165, appendices A (Pareto rule) and C
    (overlap of 13-grams).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.core.rng import hash_uniform
from headwater.modalities.text.conditions import condition
from headwater.modalities.text.quality import TextScorer

try:
    from datatrove.data import Document, DocumentsPipeline
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.filters.base_filter import BaseFilter
    from datatrove.pipeline.writers.disk_base import DiskWriter
except ImportError as error:
    raise ImportError("curation stands on datatrove: pip install 'headwater[curate]'.") from error

__all__ = ["Decontaminate", "Keep", "KeepBest", "ParetoKeep", "Sample", "Score"]

BATCH = 256

Meta = Mapping[str, Any]  # Any: what documents' metadata hold


class Score(PipelineStep):  # type: ignore[misc]  # datatrove has no annotations
    """Write a scorer's number to ``metadata[field]``.

    Args:
        field: where to.
        scorer: gives one number for each text.
        batch_size: texts per call.
    """

    type = "headwater"

    def __init__(self, field: str, scorer: TextScorer, batch_size: int = BATCH) -> None:
        super().__init__()
        self.name = f"score {field}"
        self.field, self.scorer, self.batch_size = field, scorer, batch_size

    @property
    def about(self) -> dict[str, Any]:  # Any: JSON data
        """What decides the scores."""
        return {"field": self.field, "scorer": self.scorer.fingerprint}

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Score documents, in order."""
        for batch in _batches(data, self.batch_size):
            with self.track_time("batch"):
                scores = self.scorer([document.text for document in batch])
            for document, score in zip(batch, scores.tolist(), strict=True):
                document.metadata[self.field] = score
                yield document


def _batches(data: Iterable[Document], size: int) -> Iterator[list[Document]]:
    documents = iter(data)
    while batch := list(islice(documents, size)):
        yield batch


class Keep(BaseFilter):  # type: ignore[misc]
    """Keep the documents of which an expression over their metadata is true.

    Args:
        when: such as ``quality > 0.7 and year >= 2010``; see ``condition``.
        exclusion_writer: where dropped documents go, as for every filter of datatrove.

    Raises:
        ValueError: the expression cannot be read, or, when a document is met, names what its metadata lack.
    """

    def __init__(self, when: str, exclusion_writer: DiskWriter | None = None) -> None:
        super().__init__(exclusion_writer)
        self.name = f"keep {when}"
        self.when = when
        condition(when)

    @property
    def about(self) -> dict[str, Any]:  # Any: JSON data
        """The expression."""
        return {"when": self.when}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_test"}

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether to keep the document; if not, for which reason."""
        if "_test" not in self.__dict__:
            self._test = condition(self.when)
        return bool(self._test(doc.metadata)) or (False, f"not {self.when}")


class KeepBest(BaseFilter):  # type: ignore[misc]
    """Keep the documents whose score is among the best, by share of documents.

    ``learn`` must see the metadata of all documents before any is filtered; ``curate`` does so.

    Args:
        field: the score, in the metadata.
        fraction: to keep, in (0, 1).
        exclusion_writer: as for ``Keep``.
    """

    def __init__(self, field: str, fraction: float, exclusion_writer: DiskWriter | None = None) -> None:
        super().__init__(exclusion_writer)
        if not 0 < fraction < 1:
            raise ValueError(f"fraction to keep must be in (0, 1); got {fraction}.")
        self.name = f"best {fraction:g} by {field}"
        self.field, self.fraction = field, fraction
        self.threshold: float | None = None

    @property
    def about(self) -> dict[str, Any]:  # Any: JSON data
        """Field and share."""
        return {"field": self.field, "fraction": self.fraction}

    def learn(self, metadata: Iterable[Meta]) -> None:
        """Find the threshold: the score of the last document that is kept. Equal scores are kept together."""
        scores = np.array([_number(meta, self.field, self.name) for meta in metadata])
        if len(scores):
            kept = max(1, round(self.fraction * len(scores)))
            self.threshold = float(np.partition(scores, len(scores) - kept)[len(scores) - kept])

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether to keep the document; if not, for which reason."""
        if self.threshold is None:
            raise ValueError(f"{self.name!r} has seen no scores; call learn, or run it with curate.")
        score = _number(doc.metadata, self.field, self.name)
        return score >= self.threshold or (False, f"{self.field} below {self.threshold:.6g}")


class ParetoKeep(BaseFilter):  # type: ignore[misc]
    """Keep a document if ``pareto(alpha) > 1 - score``: with probability ``(2 - score)^-alpha``.

    Args:
        field: the score, in [0, 1], 1 for certainly good.
        alpha: of the Pareto (Lomax) distribution; 9 in GPT-3.
        seed: of the draws.
        exclusion_writer: as for ``Keep``.
    """

    def __init__(
        self, field: str, alpha: float = 9.0, seed: int = 0, exclusion_writer: DiskWriter | None = None
    ) -> None:
        super().__init__(exclusion_writer)
        if alpha <= 0:
            raise ValueError(f"alpha must be positive; got {alpha}.")
        self.name = f"pareto {alpha:g} by {field}"
        self.field, self.alpha, self.seed = field, alpha, seed

    @property
    def about(self) -> dict[str, Any]:  # Any: JSON data
        """Field, alpha and seed."""
        return {"field": self.field, "alpha": self.alpha, "seed": self.seed}

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether to keep the document; if not, for which reason."""
        score = _number(doc.metadata, self.field, self.name)
        # The inverse of the survival function (1 + x)^-alpha.
        drawn = draw(self.seed, "pareto", doc.id) ** (-1 / self.alpha) - 1
        return drawn > 1 - score or (False, f"drawn against {self.field}")


class Sample(BaseFilter):  # type: ignore[misc]
    """Keep a share of the documents, by chance.

    Args:
        rate: probability of each, in [0, 1].
        seed: of the draws.
        exclusion_writer: as for ``Keep``.
    """

    def __init__(self, rate: float, seed: int = 0, exclusion_writer: DiskWriter | None = None) -> None:
        super().__init__(exclusion_writer)
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must be in [0, 1]; got {rate}.")
        self.name = f"sample {rate:g}"
        self.rate, self.seed = rate, seed

    @property
    def about(self) -> dict[str, Any]:  # Any: JSON data
        """Rate and seed."""
        return {"rate": self.rate, "seed": self.seed}

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether to keep the document; if not, for which reason."""
        return draw(self.seed, "sample", doc.id) < self.rate or (False, "not drawn")


def draw(seed: int, step: str, identity: str) -> float:
    """A uniform number in (0, 1) that depends on nothing else."""
    row = int.from_bytes(hashlib.blake2b(f"{step}\0{identity}".encode(), digest_size=7).digest(), "little")
    return float(np.clip(hash_uniform(seed, np.array([row]), 1)[0, 0], 1e-12, 1 - 1e-12))


class Decontaminate(BaseFilter):  # type: ignore[misc]
    """Drop documents that share a run of words with texts that must stay unseen.

    Words are compared lower-cased and without punctuation. A held-out text shorter than a run counts whole.

    Args:
        held_out: the texts by the name of their set.
        ngram: words of a run.
        exclusion_writer: as for ``Keep``.

    Raises:
        ValueError: a run of fewer than one word.
    """

    def __init__(
        self, held_out: Mapping[str, Iterable[str]], ngram: int = 13, exclusion_writer: DiskWriter | None = None
    ) -> None:
        super().__init__(exclusion_writer)
        if ngram < 1:
            raise ValueError(f"a run has at least one word; got ngram={ngram}.")
        self.name = f"decontaminate {ngram}"
        self.ngram = ngram
        found: dict[int, dict[int, str]] = {}
        for name, texts in held_out.items():
            for text in texts:
                words = _words(text)
                if size := min(ngram, len(words)):
                    found.setdefault(size, {}).update(dict.fromkeys(_runs(words, size).tolist(), name))
        self._names = {size: [runs[run] for run in sorted(runs)] for size, runs in found.items()}
        self._known = {size: np.array(sorted(runs), dtype=np.uint64) for size, runs in found.items()}

    @property
    def about(self) -> dict[str, Any]:  # Any: JSON data
        """The runs, as a hash."""
        digest = hashlib.blake2b(digest_size=16)
        for size in sorted(self._known):
            digest.update(f"{size} {self._names[size]}".encode() + self._known[size].tobytes())
        return {"ngram": self.ngram, "runs": digest.hexdigest()}

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether to keep the document; if not, for which reason."""
        words = _words(doc.text)
        for size, known in self._known.items():
            if len(words) >= size:
                runs = _runs(words, size)
                places = np.minimum(np.searchsorted(known, runs), len(known) - 1)
                if len(hits := places[known[places] == runs]):
                    return False, f"repeats {self._names[size][int(hits[0])]}"
        return True


def _words(text: str) -> NDArray[np.uint64]:
    return np.array([_word_hash(word) for word in re.findall(r"\w+", text.lower())], dtype=np.uint64)


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _runs(words: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """A hash of every run of ``size`` words, ``(len(words) - size + 1,)``."""
    code = np.zeros(len(words) - size + 1, dtype=np.uint64)
    for i in range(size):
        code = code * np.uint64(0x9E3779B97F4A7C15) + words[i : len(words) - size + 1 + i]
    return code


def _number(meta: Meta, field: str, step: str) -> float:
    value = meta.get(field)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"step {step!r} reads {field!r}, which is {value!r}; a document has {sorted(meta)}.")
    return float(value)
