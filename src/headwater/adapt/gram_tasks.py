"""Few-shot tasks made of unlabelled pairs, in which a class is a cluster and its name is a caption.

    domains      clusters of the pairs by their captions' features
    classes      within a domain, clusters by the other side's features (images, or bodies of texts)
    name         of a class: the caption nearest to the mean of its captions, unless the domain has that name already
    task         classes of one domain: some members to learn from (support), others to answer (query); and classes of
                 another domain to answer (shifted)

Source: Li et al., "Gradient-Regulated Meta-Prompt Learning for Generalizable Vision-Language Models",
    arXiv:2303.06571, cross-modal hierarchical clustering.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans

from headwater.core.rng import derive_seed, numpy_generator

__all__ = ["Episode", "MetaClass", "MetaTask", "TaskSampler", "hierarchical_tasks"]

Floats = NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class MetaClass:
    """A cluster that serves as a class: its ``phrase``, and the ``rows`` of the pairs in it."""

    phrase: str
    rows: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Episode:
    """Examples of some classes.

    Attributes:
        rows: of the pairs, ``(n,)``.
        labels: of each row, an index into ``phrases``, ``(n,)``.
        phrases: names of the classes.
    """

    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    phrases: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class MetaTask:
    """One task: ``support`` and ``query`` share their classes, ``shifted`` has those of another domain."""

    support: Episode
    query: Episode
    shifted: Episode


@dataclass(frozen=True, eq=False)
class TaskSampler:
    """Draws tasks; the task of a step is a function of the seed and the step alone.

    Attributes:
        domains: the classes of each domain that has enough of them.
        ways: classes of a task.
        shots: support examples of a class.
        queries: other examples of each class, and of each class of the other domain.
        seed: of the draws.
        skipped: clusters and domains that could not be used, and why.
    """

    domains: tuple[tuple[MetaClass, ...], ...]
    ways: int
    shots: int
    queries: int
    seed: int
    skipped: tuple[str, ...] = ()

    def task(self, step: int) -> MetaTask:
        """The task of a step."""
        rng = numpy_generator(self.seed, "meta task", step)
        home, away = rng.choice(len(self.domains), 2, replace=False)
        own, other = (
            [self.domains[domain][i] for i in rng.choice(len(self.domains[domain]), self.ways, replace=False)]
            for domain in (home, away)
        )
        drawn = [rng.choice(c.rows, self.shots + self.queries, replace=False) for c in own]
        shifted = [rng.choice(c.rows, self.queries, replace=False) for c in other]
        return MetaTask(
            _episode([rows[: self.shots] for rows in drawn], own),
            _episode([rows[self.shots :] for rows in drawn], own),
            _episode(shifted, other),
        )


def _episode(rows: Sequence[NDArray[np.int64]], classes: Sequence[MetaClass]) -> Episode:
    labels = np.repeat(np.arange(len(classes)), [len(part) for part in rows])
    return Episode(np.concatenate(rows), labels, tuple(c.phrase for c in classes))


def hierarchical_tasks(
    text_features: Floats,
    image_features: Floats,
    captions: Sequence[str],
    domains: int = 8,
    classes: int = 16,
    *,
    ways: int = 5,
    shots: int = 4,
    queries: int = 4,
    seed: int = 0,
) -> TaskSampler:
    """Cluster pairs into domains, and domains into classes.

    Args:
        text_features: of the captions, ``(N, D)``, unit length.
        image_features: of the other sides, ``(N, E)``, unit length.
        captions: N of them.
        domains: clusters of captions.
        classes: clusters within each domain.
        ways: classes of a task.
        shots: support examples of a class.
        queries: other examples of each class.
        seed: of the clustering and of the tasks.

    Raises:
        ValueError: lengths differ, there are fewer distinct captions than domains, or fewer than two domains have
            ``ways`` classes of ``shots + queries`` members with names of their own. The counts are given.
    """
    if not len(text_features) == len(image_features) == len(captions):
        raise ValueError(
            f"{len(captions)} captions have {len(text_features)} and {len(image_features)} features; give one each."
        )
    distinct = Counter(map(_plain, captions))
    if len(distinct) < max(domains, 2 * ways):
        most, times = distinct.most_common(1)[0] if distinct else ("", 0)
        raise ValueError(
            f"{len(captions)} pairs have {len(distinct)} distinct captions, too few for {domains} domains and tasks of "
            f"two times {ways} classes; the most frequent, {most[:40]!r}, stands {times} times. Give pairs whose "
            "captions say what each one is, or ask for fewer domains and ways."
        )
    least, skipped, found = shots + queries, [], []
    home = _clusters(text_features, np.arange(len(captions)), domains, derive_seed(seed, "domains"))
    for number, rows in enumerate(home):
        own: list[MetaClass] = []
        for members in _clusters(image_features, rows, classes, derive_seed(seed, "classes", number)):
            phrase = _phrase(text_features, captions, members, {_plain(c.phrase) for c in own})
            if len(members) < least:
                skipped.append(f"domain {number}: a cluster of {len(members)} members; {least} are needed")
            elif phrase is None:
                skipped.append(f"domain {number}: a cluster of {len(members)} without a caption of its own")
            else:
                own.append(MetaClass(phrase, members))
        if len(own) >= ways:
            found.append(tuple(own))
        else:
            skipped.append(f"domain {number}: {len(own)} classes; {ways} are needed")
    if len(found) < 2:
        raise ValueError(
            f"{len(found)} of {domains} domains have {ways} classes of {least} members; two are needed. Of "
            f"{len(captions)} pairs, domains hold {[len(rows) for rows in home]}. Give more pairs, or ask for fewer "
            "domains, classes, ways, shots or queries."
        )
    return TaskSampler(tuple(found), ways, shots, queries, seed, tuple(skipped))


def _clusters(features: Floats, rows: NDArray[np.int64], count: int, seed: int) -> list[NDArray[np.int64]]:
    """Rows by cluster, those that are not empty; as many clusters as there are rows at most."""
    count = min(count, len(rows))
    model = MiniBatchKMeans(count, random_state=seed % 2**32, n_init=3)
    labels = model.fit_predict(np.asarray(features[rows], dtype=np.float64))
    parts = [rows[labels == cluster] for cluster in range(count)]
    return [part for part in parts if len(part)]


def _phrase(features: Floats, captions: Sequence[str], rows: NDArray[np.int64], taken: set[str]) -> str | None:
    """The caption nearest to the mean of a cluster's captions that no other class has."""
    own = np.asarray(features[rows], dtype=np.float64)
    distances = ((own - own.mean(0)) ** 2).sum(1)
    for row in rows[np.argsort(distances, kind="stable")]:
        if _plain(captions[row]) not in taken:
            return str(captions[row])
    return None


def _plain(caption: str) -> str:
    return " ".join(caption.lower().split())
