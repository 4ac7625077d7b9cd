"""Texts that are to show skills: written in a conversation, graded, kept, and as a table.

turn 1   user: show these skills on this topic   assistant: a text
turn 2   user: check it and improve it           assistant: the text that counts
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from headwater.core.cache import atomic_path
from headwater.corpora.skill_mix_grades import (
    Grade,
    Graded,
    Judge,
    PerCombo,
    rejections,
    skill_mix_scores,
)
from headwater.corpora.skill_mix_prompts import SkillMixPrompts
from headwater.corpora.skill_mix_skills import Combination
from headwater.modalities.text.conversations import conversation
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.generate import Generator, Message, Request

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["SkillText", "build_dataset", "grade_texts", "kept", "score_texts", "write_table", "write_texts"]

Keep = Literal["full_marks", "all"]

REASONS = 5


@dataclass(frozen=True)
class SkillText:
    """A text that was written for a combination.

    Attributes:
        combination: what it is to show.
        messages: the conversation; the last turn is the text, where there is one.
        sample: number of the draw.
        error: why there is no text.
        grade: its points; None before it is graded, and where that failed.
        ungraded: why it has none.
    """

    combination: Combination
    messages: tuple[Message, ...]
    sample: int = 0
    error: str | None = None
    grade: Grade | None = None
    ungraded: str | None = None

    @property
    def text(self) -> str:
        """What counts; empty where there is an error."""
        return "" if self.error else self.messages[-1].content

    @property
    def id(self) -> str:
        """The same for the same combination and draw."""
        names = ", ".join(skill.name for skill in self.combination.skills)
        return f"{names} on {self.combination.topic} {self.sample}"


def write_texts(
    generator: Generator,
    combinations: Iterable[Combination],
    prompts: SkillMixPrompts | None = None,
    *,
    second_turn: bool = True,
    samples: int = 1,
    reply_tokens: int = 256,
    temperature: float = 0.7,
) -> list[SkillText]:
    """Have texts written, all first turns before all second ones, so that a generator is always busy.

    Args:
        generator: what writes.
        combinations: what the texts are to show.
        prompts: other words than ours.
        second_turn: ask to check and improve each text; False: the first one counts.
        samples: texts for each combination.
        reply_tokens: of a reply, at most.
        temperature: of drawing; 0 is greedy.

    Returns:
        ``samples`` texts of each combination, one after another; ``error`` says where a request failed.

    Raises:
        GeneratorError: see ``Generator.generate``.
    """
    words = prompts or SkillMixPrompts()

    def answered(tag: str, texts: Sequence[SkillText]) -> Iterator[SkillText]:
        open_ones = [text for text in texts if text.error is None]
        requests = [Request(t.messages, reply_tokens, temperature, sample=t.sample, tag=tag) for t in open_ones]
        replies = iter(list(generator.generate(requests)))
        for text in texts:
            if text.error is not None:
                yield text
                continue
            reply = next(replies)
            if reply.finish == "error":
                yield replace(text, error=reply.error or "no reply")
            else:
                yield replace(text, messages=(*text.messages, Message("assistant", reply.text.strip())))

    drafts = [
        SkillText(combination, (words.message("write", combination),), sample)
        for combination in combinations
        for sample in range(samples)
    ]
    texts = list(answered("write", drafts))
    if second_turn:
        again = [
            t if t.error else replace(t, messages=(*t.messages, words.message("improve", t.combination))) for t in texts
        ]
        texts = list(answered("improve", again))
    return texts


def grade_texts(judge: Judge, texts: Sequence[SkillText]) -> list[SkillText]:
    """The same texts with their grades: an empty one gets no point, and one that was not written no grade."""
    written = [text for text in texts if text.text]
    grades = judge.grade((text.combination, text.text) for text in written)
    results = iter([replace(text, grade=g.grade, ungraded=g.error) for text, g in zip(written, grades, strict=True)])

    def graded(text: SkillText) -> SkillText:
        if text.text:
            return next(results)
        nothing = Grade((False,) * len(text.combination.skills), False, False, False)
        return text if text.error is not None else replace(text, grade=nothing)

    return [graded(text) for text in texts]


def kept(texts: Sequence[SkillText], keep: Keep = "full_marks") -> list[SkillText]:
    """The texts with full marks; with ``keep="all"`` all that were written.

    Raises:
        CorpusError: none is left; the most frequent reasons are named.
    """
    found = [t for t in texts if t.text and (keep == "all" or (t.grade is not None and t.grade.full))]
    if not found:
        reasons = rejections(
            (text.combination, text.text, Graded(text.grade, text.error or text.ungraded)) for text in texts
        )
        shown = "\n".join(f"  {count} of {len(texts)}: {reason}" for reason, count in reasons.most_common(REASONS))
        raise CorpusError(
            f"none of {len(texts)} texts can be kept. Give another generator or grader, other prompts, or keep 'all'. "
            f"The reasons:\n{shown}"
        )
    return found


def score_texts(texts: Sequence[SkillText], per_combo: PerCombo = "max") -> dict[str, float]:
    """``skill_mix_scores`` of texts; those without a grade are left out.

    Raises:
        CorpusError: none has a grade.
    """
    grades: dict[object, list[Grade]] = {}
    for text in texts:
        if text.grade is not None:
            grades.setdefault(text.combination.key, []).append(text.grade)
    if not grades:
        error = next((text.error or text.ungraded for text in texts), "there are none")
        raise CorpusError(f"none of {len(texts)} texts has a grade: {error}.")
    return skill_mix_scores(list(grades.values()), per_combo)


def build_dataset(texts: Sequence[SkillText]) -> Dataset:
    """Texts as a data set in the form that TRL and chat templates take: a column ``messages``.

    Args:
        texts: at least one.

    Returns:
        Columns ``id``, ``text`` (the conversation), ``messages``, ``answer``, ``skills`` (names), ``topic``, ``k``,
        ``sample``, and the points: ``shown`` (for each skill), ``on_topic``, ``short_enough``, ``makes_sense``, None
        where there is no grade; ``error``.

    Raises:
        ValueError: there is no text.
    """
    from datasets import Dataset, Features, List, Value

    if not texts:
        raise ValueError("there is no text to make a data set of.")
    rows = []
    for text in texts:
        document = conversation(text.id, text.messages)
        grade = text.grade
        rows.append(
            {
                "id": document.id,
                "text": document.text,
                "messages": document.meta["messages"],
                "answer": text.text,
                "skills": [skill.name for skill in text.combination.skills],
                "topic": text.combination.topic,
                "k": len(text.combination.skills),
                "sample": text.sample,
                "shown": None if grade is None else list(grade.skills),
                "on_topic": None if grade is None else grade.topic,
                "short_enough": None if grade is None else grade.length,
                "makes_sense": None if grade is None else grade.sense,
                "error": text.error or text.ungraded,
            }
        )
    word, truth = Value("string"), Value("bool")
    features = Features(
        {
            **dict.fromkeys(("id", "text", "answer", "topic", "error"), word),
            "messages": List({"role": word, "content": word}),
            "skills": List(word),
            "k": Value("int64"),
            "sample": Value("int64"),
            "shown": List(truth),
            **dict.fromkeys(("on_topic", "short_enough", "makes_sense"), truth),
        }
    )
    return Dataset.from_list(rows, features=features)


def write_table(texts: Sequence[SkillText], path: Path) -> None:
    """Write ``build_dataset`` as a Parquet file, whole or not at all."""
    import pyarrow.parquet as pq

    with atomic_path(path) as temporary:
        pq.write_table(build_dataset(texts).with_format("arrow")[:], temporary)
