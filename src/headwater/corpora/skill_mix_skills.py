"""Named skills and topics, and the combinations of them that a text is to show.

A combination is k different skills and a topic; of S skills and T topics there are C(S, k) T.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from headwater.core.yamlio import YamlError, read_yaml
from headwater.modalities.text.docs import CorpusError

__all__ = ["Combination", "Skill", "SkillSet", "draw_combinations", "read_topics", "split_topics"]

LISTED = 200_000
"""Up to so many subsets are listed and shuffled; of more, random ones are drawn until they are new."""


def normalised(name: str) -> str:
    """What two names share that are the same but for case and white space."""
    return " ".join(name.split()).casefold()


@dataclass(frozen=True)
class Skill:
    """Something that a text can show.

    Attributes:
        name: of the skill; a text must not say it.
        category: by which skills are held out, such as "rhetorical".
        definition: what it is.
        example: a text that shows it.

    Raises:
        ValueError: the name is blank.
    """

    name: str
    category: str = ""
    definition: str = ""
    example: str = ""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("a skill must have a name; got a blank one.")


@dataclass(frozen=True)
class SkillSet:
    """Skills with different names, in order.

    Raises:
        ValueError: two names are the same but for case and white space.
    """

    skills: tuple[Skill, ...]

    def __post_init__(self) -> None:
        first: dict[str, Skill] = {}
        for skill in self.skills:
            other = first.setdefault(normalised(skill.name), skill)
            if other is not skill:
                raise ValueError(
                    f"two skills are named {skill.name!r}, of the categories {other.category!r} and "
                    f"{skill.category!r}; a skill can be on one side only, so keep one of them."
                )

    def __len__(self) -> int:
        return len(self.skills)

    def __iter__(self) -> Iterator[Skill]:
        return iter(self.skills)

    @property
    def categories(self) -> tuple[str, ...]:
        """In the order in which they come first."""
        return tuple(dict.fromkeys(skill.category for skill in self.skills))

    @classmethod
    def load(cls, path: str | Path) -> SkillSet:
        """Read a list of objects with ``name`` and, where given, ``category``, ``definition`` and ``example``.

        Args:
            path: a file of JSON lines (``.jsonl``), JSON (``.json``) or YAML (``.yaml``, ``.yml``).

        Raises:
            CorpusError: no such file, a broken one, no skill, an unknown or missing field, or equal names.
        """
        found = []
        for number, row in enumerate(_entries(Path(path), "skills"), start=1):
            known = isinstance(row, dict) and all(isinstance(value, str) for value in row.values())
            if not known or "name" not in row or set(row) - set(Skill.__dataclass_fields__):
                raise CorpusError(
                    f"skills: entry {number} of {path} must be an object of texts with name, category, definition and "
                    f"example, the name at least; got {str(row)[:80]}."
                )
            found.append(row)
        try:
            return cls(tuple(Skill(**row) for row in found))
        except ValueError as error:
            raise CorpusError(f"skills: {path}: {error}") from None

    def split(self, train: Collection[str]) -> tuple[SkillSet, SkillSet]:
        """The skills of some categories, which are learned, and all others, which are held out.

        Raises:
            ValueError: a category that there is not, or no skill to learn.
        """
        if unknown := sorted(set(train) - set(self.categories)):
            raise ValueError(f"no skill is of the category {unknown[0]!r}; there are {', '.join(self.categories)}.")
        sides = [tuple(s for s in self.skills if (s.category in train) == side) for side in (True, False)]
        if not sides[0]:
            raise ValueError(f"no category is learned; name some of {', '.join(self.categories)}.")
        return SkillSet(sides[0]), SkillSet(sides[1])


def read_topics(path: str | Path) -> tuple[str, ...]:
    """Topics from a text file with one in a line, or a list of texts in JSON lines, JSON or YAML.

    Raises:
        CorpusError: no such file, a broken one, no topic, or one that is blank or given twice.
    """
    found = list(_entries(Path(path), "topics"))
    if wrong := [topic for topic in found if not isinstance(topic, str) or not topic.strip()]:
        raise CorpusError(f"topics: every entry of {path} must be a text; got {str(wrong[0])[:80]!r}.")
    topics = tuple(" ".join(topic.split()) for topic in found)
    if len({normalised(topic) for topic in topics}) < len(topics):
        raise CorpusError(f"topics: {path} names a topic twice; keep one of them.")
    return topics


def _entries(path: Path, role: str) -> list[Any]:  # Any: whatever the user wrote
    try:
        if path.suffix in (".yaml", ".yml"):
            found = read_yaml(path.expanduser())
        else:
            text = path.expanduser().read_text(encoding="utf-8")
            lines = [line for line in text.split("\n") if line.strip()]
            if path.suffix == ".json":
                found = json.loads(text)
            elif path.suffix == ".jsonl":
                found = [json.loads(line) for line in lines]
            else:
                found = lines
    except (OSError, ValueError, YamlError) as error:  # not UTF-8 and not JSON are both a ValueError
        raise CorpusError(f"{role}: {path} cannot be read: {error}") from error
    if not isinstance(found, list) or not found:
        raise CorpusError(f"{role}: {path} must hold a list with at least one entry.")
    return found


def split_topics(topics: Sequence[str], share: float, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Topics to learn on and topics to be asked about, each in the order given; with a share of 1 both are all.

    Args:
        topics: all of them.
        share: of the first, in (0, 1].
        rng: of the draw.

    Raises:
        ValueError: the share is out of range, or a side would be empty.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1]; got {share}.")
    if share == 1:
        return list(topics), list(topics)
    count = round(share * len(topics))
    if not 0 < count < len(topics):
        raise ValueError(f"a share of {share:g} leaves one side of {len(topics)} topics empty; give more, or 1.")
    chosen = set(rng.permutation(len(topics))[:count].tolist())
    sides = ([t for i, t in enumerate(topics) if (i in chosen) == side] for side in (True, False))
    return next(sides), next(sides)


@dataclass(frozen=True)
class Combination:
    """What a text is to show, and about what.

    Attributes:
        skills: in the order in which they are asked for.
        topic: what the text is about.
    """

    skills: tuple[Skill, ...]
    topic: str

    @property
    def key(self) -> tuple[frozenset[str], str]:
        """Equal for equal skills in any order and an equal topic."""
        return combination_key((skill.name for skill in self.skills), self.topic)

    @property
    def sentences(self) -> int:
        """How many it may have, so that skills must share one: k - 1, and 1 for one skill."""
        return max(len(self.skills) - 1, 1)


def combination_key(skills: Iterable[str], topic: str) -> tuple[frozenset[str], str]:
    """What stands for skills by name, in any order, and a topic."""
    return frozenset(map(normalised, skills)), normalised(topic)


def draw_combinations(
    skills: Iterable[Skill],
    topics: Sequence[str],
    k: int,
    n: int,
    rng: np.random.Generator,
    exclude: Iterable[Combination] = (),
) -> list[Combination]:
    """Draw skills and topics uniformly, none twice, and every set of skills before one comes with another topic.

    Args:
        skills: the pool.
        topics: at least one.
        k: skills of a combination.
        n: how many; fewer where there are fewer.
        rng: of the draw.
        exclude: combinations that are left out, whatever their order of skills.

    Returns:
        At most ``n`` combinations, each with its skills in random order.

    Raises:
        ValueError: ``k`` is not between 1 and the size of the pool, ``n`` is negative, or there is no topic.

    Example:
        >>> pool = [Skill("irony"), Skill("metaphor"), Skill("litotes")]
        >>> drawn = draw_combinations(pool, ["bread"], 2, 9, np.random.default_rng(0))
        >>> sorted(sorted(skill.name for skill in one.skills) for one in drawn)
        [['irony', 'litotes'], ['irony', 'metaphor'], ['litotes', 'metaphor']]
    """
    pool = tuple(skills)
    if not 1 <= k <= len(pool):
        raise ValueError(f"k must be from 1 to {len(pool)}, the skills in the pool; got {k}.")
    if n < 0 or not topics:
        raise ValueError(f"n must be >= 0 and topics must not be empty; got {n} and {len(topics)} topics.")
    left_out = {combination.key for combination in exclude}
    order = rng.permutation(len(topics))
    offsets: dict[tuple[int, ...], int] = {}
    found: list[Combination] = []
    for turn in range(len(topics)):
        for chosen in _subsets(len(pool), k, rng):
            if len(found) == n:
                return found
            offset = offsets.setdefault(chosen, int(rng.integers(len(topics))))
            topic = topics[order[(offset + turn) % len(topics)]]
            drawn = Combination(tuple(pool[i] for i in rng.permutation(chosen)), topic)
            if drawn.key not in left_out:
                found.append(drawn)
    return found


def _subsets(size: int, k: int, rng: np.random.Generator) -> Iterator[tuple[int, ...]]:
    """All subsets of ``range(size)`` in random order."""
    total = comb(size, k)
    if total <= LISTED:
        listed = list(combinations(range(size), k))
        yield from (listed[i] for i in rng.permutation(total))
        return
    seen: set[tuple[int, ...]] = set()
    while len(seen) < total:
        chosen = tuple(sorted(rng.choice(size, k, replace=False).tolist()))
        if chosen not in seen:
            seen.add(chosen)
            yield chosen
