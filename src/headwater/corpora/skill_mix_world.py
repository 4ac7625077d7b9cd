"""The skills and topics of a run: what is learned, what is held out, and the combinations that are asked."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from headwater.core.cache import cache_key
from headwater.core.rng import numpy_generator
from headwater.corpora.skill_mix_skills import Combination, SkillSet, draw_combinations, read_topics, split_topics
from headwater.modalities.text.docs import CorpusError

__all__ = ["SkillPool", "SkillWorld", "drawn"]

SkillPool = Literal["train", "held_out"]


@dataclass(frozen=True)
class SkillWorld:
    """Skills and topics, split.

    Attributes:
        train, held_out: skills; none need be held out.
        topics: to write about.
        asked: what the trained model is asked, by the side that its skills are from and their number.
        too_many: numbers of skills that are not asked of the held-out side, as it has fewer.
        fingerprint: of the files and the split.
    """

    train: SkillSet
    held_out: SkillSet
    topics: Sequence[str]
    asked: Mapping[tuple[SkillPool, int], Sequence[Combination]]
    too_many: Sequence[int]
    fingerprint: str

    @classmethod
    def open(
        cls,
        skills: Path,
        topics: Path,
        *,
        train_categories: Collection[str],
        train_topics: float,
        k_eval: Sequence[int],
        eval_samples: int,
        seed: int,
    ) -> SkillWorld:
        """Read the files, split them, and draw what is asked.

        Raises:
            CorpusError: a broken file, no such category, a side without topics, or fewer skills to learn than are
                asked for at once.
        """
        every, named = SkillSet.load(skills), read_topics(topics)
        try:
            train, held_out = every.split(train_categories)
            chosen, rest = split_topics(named, train_topics, numpy_generator(seed, "topics"))
        except ValueError as error:
            raise CorpusError(f"{skills}, {topics}: {error}") from None
        too_many = [k for k in k_eval if len(held_out) and k > len(held_out)]
        pools: tuple[tuple[SkillPool, SkillSet], ...] = (("train", train), ("held_out", held_out))
        asked = {
            (pool, k): drawn(of, rest, k, eval_samples, numpy_generator(seed, "asked", pool, k))
            for pool, of in pools
            for k in sorted(k_eval)
            if pool == "train" or k <= len(of)
        }
        sides = [[[s.name, s.category, s.definition, s.example] for s in side] for side in (train, held_out)]
        return cls(train, held_out, chosen, asked, too_many, cache_key([sides, chosen, rest]))


def drawn(
    skills: SkillSet,
    topics: Sequence[str],
    k: int,
    n: int,
    rng: np.random.Generator,
    exclude: Iterable[Combination] = (),
) -> list[Combination]:
    """``draw_combinations`` of a user's skills.

    Raises:
        CorpusError: there are fewer than k.
    """
    try:
        return draw_combinations(skills, topics, k, n, rng, exclude)
    except ValueError as error:
        raise CorpusError(f"skills: {error}") from None
