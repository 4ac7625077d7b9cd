"""Instructions whose following a program can check: no judge, one right reading each.

A prompt asks for something and for its form; only the form is checked. Strict: the response as it is. Loose: any of the
response without its first line, without its last, without both, and each of these without asterisks, since a model that
answers "Sure:" first has still followed.

Source: Zhou et al., "Instruction-Following Evaluation for Large Language Models" (IFEval), arXiv:2311.07911, for the
idea and for what is loose; the instructions and prompts are ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["CHECKERS", "PROMPTS", "Instruction", "followed"]

Checker = Callable[[str, str], bool]


def _max_words(response: str, argument: str) -> bool:
    return 0 < len(response.split()) <= int(argument)


def _must_contain(response: str, argument: str) -> bool:
    return argument.lower() in response.lower()


def _must_not_contain(response: str, argument: str) -> bool:
    return bool(response.strip()) and argument.lower() not in response.lower()


def _lowercase(response: str, argument: str) -> bool:
    return response == response.lower() and any(c.isalpha() for c in response)


def _uppercase(response: str, argument: str) -> bool:
    return response == response.upper() and any(c.isalpha() for c in response)


def _json(response: str, argument: str) -> bool:
    text = response.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        return isinstance(json.loads(text), dict | list)
    except json.JSONDecodeError:
        return False


def _ends_with(response: str, argument: str) -> bool:
    return response.rstrip().endswith(argument)


def _bullets(response: str, argument: str) -> bool:
    return sum(line.lstrip().startswith(("- ", "* ")) for line in response.splitlines()) == int(argument)


CHECKERS: Mapping[str, Checker] = {
    "max_words": _max_words,
    "must_contain": _must_contain,
    "must_not_contain": _must_not_contain,
    "lowercase": _lowercase,
    "uppercase": _uppercase,
    "json": _json,
    "ends_with": _ends_with,
    "bullets": _bullets,
}
"""``checker(response, argument)`` by name. A list must have exactly as many bullets as asked for."""


@dataclass(frozen=True)
class Instruction:
    """A prompt and how its response is checked.

    Attributes:
        prompt: what the user says.
        checker: a name of ``CHECKERS``.
        argument: the checker's: a number, a word, an ending; empty where it takes none.

    Raises:
        ValueError: there is no such checker.
    """

    prompt: str
    checker: str
    argument: str = ""

    def __post_init__(self) -> None:
        if self.checker not in CHECKERS:
            raise ValueError(f"no checker {self.checker!r}; there are {', '.join(CHECKERS)}.")


def followed(instruction: Instruction, response: str, *, loose: bool = False) -> bool:
    """Whether a response has the form that was asked for.

    Args:
        instruction: what was asked.
        response: the model's text, special tokens removed.
        loose: forgive an opening or closing line and asterisks; see the module.
    """
    check, argument = CHECKERS[instruction.checker], instruction.argument
    if check(response, argument):
        return True
    if not loose:
        return False
    lines = response.splitlines()
    variants = ["\n".join(kept).strip() for kept in (lines, lines[1:], lines[:-1], lines[1:-1])]
    return any(check(text, argument) for variant in variants for text in (variant, variant.replace("*", "")))


_SUBJECTS = ("the sea", "a bicycle", "the winter")
_FORMS = (
    ("Answer in at most 8 words.", "max_words", "8"),
    ("Use the word 'lantern'.", "must_contain", "lantern"),
    ("Do not use the word 'the'.", "must_not_contain", " the "),
    ("Use lowercase letters only.", "lowercase", ""),
    ("Use capital letters only.", "uppercase", ""),
    ("Answer with a JSON object only.", "json", ""),
    ("End your answer with the words: that is all", "ends_with", "that is all"),
    ("Answer with exactly 3 bullet points that begin with '- '.", "bullets", "3"),
)
PROMPTS: tuple[Instruction, ...] = tuple(
    Instruction(f"Say something about {subject}. {words}", checker, argument)
    for subject in _SUBJECTS
    for words, checker, argument in _FORMS
)
"""Twenty-four prompts, three of each form."""
