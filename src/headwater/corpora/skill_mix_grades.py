"""Which skills a text shows, by a language model or by rules, and what the grades of many texts come to.

    s_i  skills shown by text i, of k;   o_i  of the points for topic, length and sense, of 3

    full marks      mean [s_i = k and o_i = 3]
    all skills      mean [s_i = k]
    skill fraction  mean [s_i / k] [o_i = 3]

Of several texts for one combination each figure takes the best, or their mean. A skill that the text names is not
shown.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import Field, create_model

from headwater.core.recipe import Name, Spec
from headwater.corpora.skill_mix_prompts import SkillMixPrompts
from headwater.corpora.skill_mix_skills import Combination, Skill, normalised
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.generate import Generator, Request
from headwater.modalities.text.generate_json import generate_json

__all__ = [
    "Grade",
    "Graded",
    "Grader",
    "Judge",
    "RuleGrader",
    "RuleSpec",
    "names_skill",
    "rejections",
    "skill_mix_scores",
]

PerCombo = Literal["max", "mean"]

_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?:\s+|$)")


@dataclass(frozen=True)
class Grade:
    """The ``k + 3`` points of a text.

    Attributes:
        skills: which are shown, in the order of the combination.
        topic: it is about the topic.
        length: it has no more sentences than it may.
        sense: it makes sense.
    """

    skills: tuple[bool, ...]
    topic: bool
    length: bool
    sense: bool

    @property
    def sound(self) -> bool:
        """The three points beside the skills."""
        return self.topic and self.length and self.sense

    @property
    def full(self) -> bool:
        """Full marks."""
        return self.sound and all(self.skills)

    @property
    def points(self) -> int:
        """Of ``k + 3``."""
        return sum(self.skills) + self.topic + self.length + self.sense


@dataclass(frozen=True)
class Graded:
    """A grade, or why there is none; a text without one is left out, never given points."""

    grade: Grade | None
    error: str | None = None


class Judge(Protocol):
    """What grades texts."""

    def grade(self, texts: Iterable[tuple[Combination, str]]) -> Iterator[Graded]:
        """Grade texts, in order, each against what it was to show."""
        ...


class Grader:
    """A language model as the judge.

    Args:
        generator: what reads the texts.
        prompts: other words than ours.
        repair: how often an answer of another form, such as with the wrong number of skills, is asked for again.
        reply_tokens: of an answer, at most.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: SkillMixPrompts | None = None,
        *,
        repair: int = 2,
        reply_tokens: int = 256,
    ) -> None:
        self.generator, self.prompts = generator, prompts or SkillMixPrompts()
        self.repair, self.reply_tokens = repair, reply_tokens

    def grade(self, texts: Iterable[tuple[Combination, str]]) -> Iterator[Graded]:
        """See ``Judge``; texts are read lazily.

        Raises:
            GeneratorError: see ``Generator.generate``.
        """
        # One form of answer for each number of skills, so texts that ask for equally many should stand together.
        for k, group in groupby(texts, key=lambda item: len(item[0].skills)):
            yield from self._grade(k, group)

    def _grade(self, k: int, texts: Iterable[tuple[Combination, str]]) -> Iterator[Graded]:
        shown: Any = Annotated[list[bool], Field(min_length=k, max_length=k)]  # Any: a type made here
        kind: Any = create_model(
            "Points", skills=(shown, ...), topic=(bool, ...), length=(bool, ...), sense=(bool, ...)
        )
        waiting: deque[tuple[Combination, str]] = deque()

        def requests() -> Iterator[Request]:
            for combination, text in texts:
                waiting.append((combination, text))
                message = self.prompts.message("grade", combination, text)
                yield Request((message,), self.reply_tokens, temperature=0.0, tag="grade")

        for answer in generate_json(self.generator, requests(), kind, self.repair):
            combination, text = waiting.popleft()
            if answer.value is None:
                yield Graded(None, f"no grade: {answer.error}")
                continue
            value: Any = answer.value  # Any: of the type made here
            grade = Grade(tuple(value.skills), value.topic, value.length, value.sense)
            yield Graded(_without_named(grade, combination, text))


class RuleGrader:
    """Exact rules as the judge, for skills that can be decided.

    Args:
        checks: skill -> whether a text, about a topic, shows it.
        topic: whether a text is about a topic; by default, whether it holds the topic's words.
        length: whether a text that was to show k skills is short enough; by default, ``max(k - 1, 1)`` sentences.
        sense: whether a text makes sense; by default, whether it holds a word.

    Example:
        >>> rules = RuleGrader({"doubt": lambda text, topic: "perhaps" in text})
        >>> asked = Combination((Skill("doubt"),), "bread")
        >>> next(rules.grade([(asked, "Perhaps bread. perhaps not.")])).grade
        Grade(skills=(True,), topic=True, length=False, sense=True)
    """

    def __init__(
        self,
        checks: Mapping[str, Callable[[str, str], bool]],
        *,
        topic: Callable[[str, str], bool] | None = None,
        length: Callable[[str, int], bool] | None = None,
        sense: Callable[[str], bool] | None = None,
    ) -> None:
        self.checks = {normalised(name): check for name, check in checks.items()}
        self.topic, self.length, self.sense = topic or holds_topic, length or _short, sense or _has_word

    def unknown(self, skills: Iterable[Skill]) -> list[str]:
        """Names of skills without a rule."""
        return [skill.name for skill in skills if normalised(skill.name) not in self.checks]

    def grade(self, texts: Iterable[tuple[Combination, str]]) -> Iterator[Graded]:
        """See ``Judge``.

        Raises:
            ValueError: a skill without a rule.
        """
        for combination, text in texts:
            if unknown := self.unknown(combination.skills):
                raise ValueError(f"there is no rule for the skill {unknown[0]!r}; add one to checks.")
            topic = combination.topic
            grade = Grade(
                tuple(bool(self.checks[normalised(skill.name)](text, topic)) for skill in combination.skills),
                bool(self.topic(text, topic)),
                bool(self.length(text, len(combination.skills))),
                bool(self.sense(text)),
            )
            yield Graded(_without_named(grade, combination, text))


class RuleSpec(Spec):
    """Exact rules in place of a model."""

    kind: Literal["rules"] = Field(default="rules", description="skills that rules can decide")
    use: Name = Field(description="a RuleGrader, as MODULE:NAME")

    def open(self) -> RuleGrader:
        """Import it.

        Raises:
            CorpusError: there is no such object, or it is something else.
        """
        module, _, name = self.use.partition(":")
        try:
            found = getattr(importlib.import_module(module), name, None)
        except (ModuleNotFoundError, ValueError) as error:
            raise CorpusError(f"grader: {self.use!r} cannot be imported: {error}") from error
        if not isinstance(found, RuleGrader):
            raise CorpusError(f"grader: {self.use!r} is {type(found).__name__}; give MODULE:NAME of a RuleGrader.")
        return found


def holds_topic(text: str, topic: str) -> bool:
    """Whether the topic's words stand in the text one after another."""
    return _says(text, topic)


def _short(text: str, k: int) -> bool:
    return len([part for part in _SENTENCE_END.split(text) if part.strip()]) <= max(k - 1, 1)


def _has_word(text: str) -> bool:
    return re.search(r"\w", text) is not None


def names_skill(text: str, name: str) -> bool:
    """Whether a text calls a skill by its name, case and white space aside, as whole words.

    Example:
        >>> names_skill("Such IRONY!", "irony"), names_skill("It is ironyclad.", "irony")
        (True, False)
    """
    return _says(text, name)


def _says(text: str, words: str) -> bool:
    pattern = r"\s+".join(re.escape(word) for word in normalised(words).split())
    return re.search(rf"(?<!\w){pattern}(?!\w)", text.casefold()) is not None


def _without_named(grade: Grade, combination: Combination, text: str) -> Grade:
    kept = (
        shown and not names_skill(text, skill.name)
        for shown, skill in zip(grade.skills, combination.skills, strict=True)
    )
    return replace(grade, skills=tuple(kept))


def rejections(graded: Iterable[tuple[Combination, str, Graded]]) -> Counter[str]:
    """Why texts have less than full marks, each reason counted once for a text."""
    found: Counter[str] = Counter()
    for combination, text, result in graded:
        if (grade := result.grade) is None:
            found[result.error or "no grade"] += 1
            continue
        for shown, skill in zip(grade.skills, combination.skills, strict=True):
            if not shown:
                found[f"it {'names' if names_skill(text, skill.name) else 'does not show'} {skill.name!r}"] += 1
        points = {"it is off the topic": grade.topic, "it is too long": grade.length, "it makes no sense": grade.sense}
        found.update(reason for reason, point in points.items() if not point)
    return found


def skill_mix_scores(grades: Sequence[Sequence[Grade]], per_combo: PerCombo = "max") -> dict[str, float]:
    """``full_marks``, ``all_skills`` and ``skill_fraction``, each in [0, 1].

    Args:
        grades: of each combination, those of the texts that were written for it.
        per_combo: ``max``: the best of them, for each figure by itself; ``mean``: their mean.

    Raises:
        ValueError: no combination, or one without a grade.

    Example:
        >>> shown = [(True, True), (True, False)]
        >>> skill_mix_scores([[Grade(skills, True, True, True)] for skills in shown])
        {'full_marks': 0.5, 'all_skills': 0.5, 'skill_fraction': 0.75}
    """
    if not grades or not all(grades):
        raise ValueError("every combination must have a grade, and there must be a combination.")
    pooled = np.max if per_combo == "max" else np.mean
    best = np.array([pooled([_figures(grade) for grade in of], axis=0) for of in grades]).mean(axis=0)
    return dict(zip(("full_marks", "all_skills", "skill_fraction"), best.tolist(), strict=True))


def _figures(grade: Grade) -> tuple[float, float, float]:
    fraction = sum(grade.skills) / len(grade.skills)
    return float(grade.full), float(all(grade.skills)), fraction * grade.sound
