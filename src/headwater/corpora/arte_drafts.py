"""Questions and rationales from a teacher: how they are asked for, read, and kept apart from what is asked later.

    seed question -> question drafts;  each question -> rationales that end in "The answer is X"

Source: Liu et al., arXiv:2406.19227. The prompts are ours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from headwater.core.cache import atomic_path
from headwater.core.recipe import Spec
from headwater.modalities.text.docs import Document
from headwater.modalities.text.generate import Generator, Message, Reply, Request
from headwater.modalities.text.instruct import answered

__all__ = [
    "Draft",
    "Elicited",
    "Form",
    "TeacherPrompts",
    "Unseen",
    "elicit",
    "parse_rationale",
    "read_drafts",
    "tailor",
    "write_drafts",
]

PASSES = 4
"""How often the seeds are gone through for a tailored set, where replies cannot be used."""


class TeacherPrompts(Spec):
    """What the teacher is asked; ``{question}`` stands for a question."""

    question: str = Field(
        default="Here is a question of some task:\n\n{question}\n\nWrite another question of the same task, of the "
        "same form and about as hard. Write the question and nothing else.",
        description="asks for a question like a seed",
    )
    rationale: tuple[str, ...] = Field(
        min_length=1,
        default=(
            "{question}\n\nThink step by step. End with a line of its own: The answer is X",
            "{question}\n\nFirst make a plan, then carry it out. End with a line of its own: The answer is X",
            "{question}\n\nSolve it in as few steps as you can. End with a line of its own: The answer is X",
            "{question}\n\nRecall what one must know, then solve it. End with a line of its own: The answer is X",
        ),
        description="styles in which a rationale is asked for, in turn; the first is the one that is learned and used "
        "for the tailored set",
    )

    @model_validator(mode="after")
    def _hold_a_question(self) -> Self:
        for template in (self.question, *self.rationale):
            if "{question}" not in template:
                raise ValueError(f"a prompt must contain {{question}}; got {template[:80]!r}")
        return self

    def for_question(self, seed: str) -> str:
        """Asks for a question like ``seed``."""
        return self.question.replace("{question}", seed)

    def for_rationale(self, question: str, style: int = 0) -> str:
        """Asks for a rationale."""
        return self.rationale[style].replace("{question}", question)


@dataclass(frozen=True)
class Draft:
    """A question with a solution.

    Attributes:
        question: what is asked.
        rationale: the solution, up to and with its answer: what a student learns to write.
        answer: what the rationale comes to.
        meta: ``seed`` (number of the seed question), ``style`` and ``sample``.
    """

    question: str
    rationale: str
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict)  # Any: JSON data


@dataclass(frozen=True)
class Form:
    """How a student is asked, and shown an example.

    Attributes:
        ask: with ``{question}``.
        join: stands between that and a rationale.
        between: stands between an example and what is asked after it.
        marker: words before an answer.
    """

    ask: str = "Question: {question}\nAnswer:"
    join: str = " "
    between: str = "\n\n"
    marker: str = "The answer is"

    def prompt(self, question: str) -> str:
        """What a student is given."""
        return self.ask.replace("{question}", question)

    def document(self, draft: Draft, identity: str) -> Document:
        """What a student reads, and of which it learns the rationale."""
        return answered(identity, self.prompt(draft.question), draft.rationale, join=self.join, **draft.meta)

    def shot(self, draft: Draft) -> str:
        """A draft as the example before a question."""
        return f"{self.prompt(draft.question)}{self.join}{draft.rationale}{self.between}"


def parse_rationale(text: str, marker: str) -> tuple[str, str] | None:
    r"""The solution up to its answer, and the answer: what follows the last ``marker`` on its line.

    Returns:
        None where the marker or an answer is missing.

    Example:
        >>> parse_rationale("2 + 2 makes 4.\nThe answer is 4.\nAnything else?", "The answer is")
        ('2 + 2 makes 4.\nThe answer is 4', '4')
    """
    found = list(re.finditer(rf"(?<!\w){re.escape(marker)}(?!\w):?", text))
    if not found:
        return None
    lines = text[found[-1].end() :].strip().splitlines()
    answer = lines[0].strip().removesuffix(".").strip() if lines else ""
    return (f"{text[: found[-1].end()].strip()} {answer}", answer) if answer else None


class Unseen:
    """Texts that must not be learned from: a text repeats one where they share a run of words.

    Words are compared lower-cased and without punctuation; a text shorter than a run counts whole. The rule is that of
    ``Decontaminate``, on texts in memory.

    Args:
        texts: to be kept apart.
        ngram: words of a run, >= 1.
    """

    def __init__(self, texts: Iterable[str], ngram: int = 13) -> None:
        self._runs: dict[int, set[tuple[str, ...]]] = {}
        for text in texts:
            words = _words(text)
            if size := min(ngram, len(words)):
                self._runs.setdefault(size, set()).update(_runs(words, size))

    def repeats(self, text: str) -> bool:
        """Whether the text shares a run with one of them."""
        words = _words(text)
        return any(not known.isdisjoint(_runs(words, size)) for size, known in self._runs.items())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(words: Sequence[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[begin : begin + size]) for begin in range(len(words) - size + 1)}


@dataclass
class Elicited:
    """What a teacher wrote.

    Attributes:
        drafts: that can be used.
        counts: ``requests``, ``prompt_tokens``, ``completion_tokens``; and of what was left out: ``failed`` requests,
            ``empty`` questions, ``unparsed`` rationales without an answer, ``leaked`` drafts that repeat what is asked.
        usd: what it cost when it was written; ``None`` where no price is known.
        drawn: how often each prompt was sent.
    """

    drafts: list[Draft] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    usd: float | None = 0.0
    drawn: Counter[str] = field(default_factory=Counter)

    def book(self, reply: Reply) -> bool:
        """Count a reply; whether it came at all."""
        self.counts["requests"] += 1
        self.counts["prompt_tokens"] += reply.prompt_tokens
        self.counts["completion_tokens"] += reply.completion_tokens
        self.counts["failed"] += reply.finish == "error"
        self.usd = None if self.usd is None or reply.usd is None else self.usd + reply.usd
        return reply.finish != "error"


def elicit(
    generator: Generator,
    seeds: Sequence[str],
    n_questions: int = 4,
    n_rationales: int = 4,
    prompts: TeacherPrompts | None = None,
    *,
    marker: str = "The answer is",
    unseen: Unseen | None = None,
    reply_tokens: int = 512,
    temperature: float = 1.0,
    seed: int = 0,
    into: Elicited | None = None,
) -> Elicited:
    """Let a teacher write questions like the seeds, and rationales for each.

    Args:
        generator: the teacher.
        seeds: questions of the task.
        n_questions: for each seed.
        n_rationales: for each question, in the styles of ``prompts`` in turn.
        prompts: other words than ours.
        marker: words before an answer; a rationale without is left out.
        unseen: what is kept apart.
        reply_tokens: of a question or a rationale, at most; a rationale that is cut in its answer is left out.
        temperature: of drawing.
        seed: of the draws. The same prompt is drawn anew each time.
        into: what was elicited before, which this adds to and whose draws it does not repeat.

    Raises:
        GeneratorError: see ``Generator.generate``.
    """
    words, found, hidden = prompts or TeacherPrompts(), into or Elicited(), unseen or Unseen(())

    def request(prompt: str, tag: str) -> Request:
        found.drawn[prompt] += 1
        message = (Message("user", prompt),)
        return Request(message, reply_tokens, temperature, seed=seed, sample=found.drawn[prompt] - 1, tag=tag)

    places = [place for _ in range(n_questions) for place in range(len(seeds))]
    wanted = [request(words.for_question(seeds[place]), "question") for place in places]
    questions: list[tuple[int, str]] = []
    for place, reply in zip(places, generator.generate(wanted), strict=True):
        if not found.book(reply):
            continue
        question = reply.text.strip()
        if not question or hidden.repeats(question):
            found.counts["leaked" if question else "empty"] += 1
        else:
            questions.append((place, question))
    styles = [style % len(words.rationale) for style in range(n_rationales)]
    asked = [
        (place, question, style, request(words.for_rationale(question, style), "rationale"))
        for place, question in questions
        for style in styles
    ]
    for (place, question, style, ask), reply in zip(asked, generator.generate([a[-1] for a in asked]), strict=True):
        if not found.book(reply):
            continue
        parsed = parse_rationale(reply.text, marker)
        if parsed is None or (reply.finish == "length" and reply.text.rstrip(". ").endswith(parsed[1])):
            found.counts["unparsed"] += 1
        elif hidden.repeats(parsed[0]):
            found.counts["leaked"] += 1
        else:
            found.drafts.append(Draft(question, *parsed, {"seed": place, "style": style, "sample": ask.sample}))
    return found


def tailor(
    generator: Generator,
    seeds: Sequence[str],
    n_final: int,
    prompts: TeacherPrompts | None = None,
    *,
    marker: str = "The answer is",
    unseen: Unseen | None = None,
    reply_tokens: int = 512,
    temperature: float = 1.0,
    seed: int = 0,
) -> Elicited:
    """Let a teacher write the training set: questions like the seeds, in turn, one rationale each, in the first style.

    What cannot be used is asked for again, in at most ``PASSES`` passes; so fewer than ``n_final`` may come.

    Args:
        generator: the teacher.
        seeds: questions of the task, at least one.
        n_final: drafts to write.
        prompts: other words than ours.
        marker: see ``elicit``, as for all that follow.
        unseen: what is kept apart.
        reply_tokens: of a question or a rationale, at most.
        temperature: of drawing.
        seed: of the draws.
    """
    words, found = prompts or TeacherPrompts(), Elicited()
    first = words.model_copy(update={"rationale": words.rationale[:1]})
    for _ in range(PASSES):
        missing = n_final - len(found.drafts)
        if missing <= 0:
            break
        for shown, each in ((seeds, missing // len(seeds)), (seeds[: missing % len(seeds)], 1)):
            if shown and each:
                elicit(
                    generator,
                    shown,
                    each,
                    1,
                    first,
                    marker=marker,
                    unseen=unseen,
                    reply_tokens=reply_tokens,
                    temperature=temperature,
                    seed=seed,
                    into=found,
                )
    return found


# -- on disk

_COLUMNS = ("question", "rationale", "answer", "seed", "style", "sample")


def write_drafts(drafts: Sequence[Draft], path: Path) -> None:
    """Write drafts as Parquet, with columns question, rationale, answer, seed, style and sample."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{**vars(draft), **draft.meta} for draft in drafts]
    kinds = [pa.string()] * 3 + [pa.int64()] * 3
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in zip(_COLUMNS, kinds, strict=True)}
    with atomic_path(path) as place:
        pq.write_table(pa.table(columns), place)


def read_drafts(path: Path) -> list[Draft]:
    """Read what ``write_drafts`` wrote."""
    import pyarrow.parquet as pq

    rows = pq.read_table(path).to_pylist()
    kept = _COLUMNS[3:]
    return [Draft(r["question"], r["rationale"], r["answer"], {name: r[name] for name in kept}) for r in rows]
