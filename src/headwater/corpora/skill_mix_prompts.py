"""What a generator is told: to show skills in a short text, to improve it, and to grade such a text."""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field, model_validator

from headwater.corpora.skill_mix_skills import Combination, Skill
from headwater.corpora.wording import Wording
from headwater.modalities.text.generate import Message

__all__ = ["SkillMixPrompts"]

_WRITE = """\
Write a short text about this topic: {topic}
Let it show every one of these skills, and call none of them by its name:
{skills}
It has room for {sentences}, so one sentence has to show several skills at once where there are more. It must make \
sense to a reader who knows nothing of the task. Answer with the text and nothing else."""

_IMPROVE = """\
Read your text again. Does it show every skill in the list, call none by its name, stay with the topic, make sense, \
and keep to {sentences}? Mend what falls short, make it as good as you can, and answer with the text alone."""

_GRADE = """\
Somebody was asked for a text about this topic: {topic}
It was to show these {k} skills, in at most {sentences}:
{skills}

This is the text:
{text}

Be strict: a skill counts only where you could point to the words that show it as it is defined here.
Answer with one JSON object and nothing else:
{"skills": [true or false for each of the {k} skills, in the order above], "topic": is it about the topic, \
"length": does it keep to {sentences}, "sense": does it make sense as a whole}"""

_PLACES = ("skills", "names", "topic", "sentences", "k", "text")
_PLACE = re.compile("{(" + "|".join(_PLACES) + ")}")


class SkillMixPrompts(Wording):
    """Messages with places in braces. ``SkillMixPrompts.read`` takes another wording from a TOML file.

    ``{skills}`` is a numbered list with definitions and examples, ``{names}`` the names alone, ``{topic}`` the topic,
    ``{k}`` the number of skills, ``{sentences}`` how many sentences there may be, with that word, and ``{text}`` what
    is graded. Other braces stay as they are.
    """

    write: str = Field(default=_WRITE, description="asks for a text; holds {topic}, and {skills} or {names}")
    improve: str = Field(default=_IMPROVE, description="the second turn: asks to check that text and to improve it")
    grade: str = Field(default=_GRADE, description="asks for grades as JSON; holds {text}, {topic} and {skills}")

    @model_validator(mode="after")
    def _has_its_places(self) -> Self:
        wanted = {"write": (("topic",), ("skills", "names")), "grade": (("text",), ("topic",), ("skills", "names"))}
        for field, groups in wanted.items():
            held = set(_PLACE.findall(getattr(self, field)))
            for group in groups:
                if not held & set(group):
                    raise ValueError(f"{field} must hold {' or '.join(f'{{{place}}}' for place in group)}")
        for field in ("write", "improve"):
            if "text" in _PLACE.findall(getattr(self, field)):
                raise ValueError(f"{field} must not hold {{text}}: there is none yet, or it stands before")
        return self

    def message(self, task: str, combination: Combination, text: str = "") -> Message:
        """A user's turn: ``write``, ``improve`` or ``grade``, the last about a text."""
        k, sentences = len(combination.skills), combination.sentences
        values = {
            "skills": "\n".join(_described(n, skill) for n, skill in enumerate(combination.skills, start=1)),
            "names": ", ".join(skill.name for skill in combination.skills),
            "topic": combination.topic,
            "k": str(k),
            "sentences": f"{sentences} sentence{'s' if sentences > 1 else ''}",
            "text": text,
        }
        return Message("user", _PLACE.sub(lambda match: values[match[1]], getattr(self, task)))


def _described(number: int, skill: Skill) -> str:
    parts = [f"{number}. {skill.name}"]
    if skill.definition:
        parts.append(f": {skill.definition}")
    if skill.example:
        parts.append(f" For example: {skill.example}")
    return "".join(parts)
