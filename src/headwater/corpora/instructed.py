"""What methods on instructions share: tasks as documents to read, as questions to ask, and what was answered."""

from __future__ import annotations

import csv
import io
import json
from abc import ABC
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from headwater.core.cache import atomic_write_text
from headwater.core.optim import OptimSpec
from headwater.core.recipe import CorpusRef, Metrics, ModelRef
from headwater.corpora.base import CorpusRecipe, TableName
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.instruct import answered, exact_match, rouge_l
from headwater.modalities.text.instruction_inputs import EncodedInstruction, InstructionEncoder
from headwater.modalities.text.instructions import PARTS, Instance, Instruction, InstructionPart
from headwater.modalities.text.pairs import PairModel, Pairs, source_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from headwater.core.run import Run

__all__ = [
    "README",
    "Answer",
    "Division",
    "InstructedRecipe",
    "Pool",
    "Question",
    "answers_of",
    "as_pairs",
    "csv_table",
    "divide",
    "leave_answers",
    "shown_apart",
    "usage_of",
]

README = """Ask it as it was taught: the lines of the task's instruction, then `input: ... output:`, and it writes a
space, the output and its end token. `corpus.json` says which parts of an instruction it read; `answers.jsonl` beside
this directory has examples. `headwater.modalities.text.instruction_inputs.encode_instruction` writes such a prompt."""

MAX_VALIDATION = 500
"""Inputs that are kept for validation; one in twenty where that is fewer."""

Pool = Sequence[tuple[Instruction, Sequence[Instance]]]
"""Tasks, each with the instances of it that are meant."""


@dataclass(frozen=True)
class Question:
    """An instance that is asked.

    Attributes:
        task: its name.
        category: of the task.
        prompt: what the model is given.
        references: all right answers; the first is the one that losses are of.
    """

    task: str
    category: str
    prompt: str
    references: tuple[str, ...]


class Answer(NamedTuple):
    """What was written for a question, and its worth against all references."""

    question: Question
    text: str
    exact: float
    rouge_l: float


def as_pairs(questions: Iterable[Question]) -> Pairs:
    """Questions with their first right answer."""
    found = list(questions)
    return Pairs([question.prompt for question in found], [question.references[0] for question in found])


def answers_of(reader: PairModel, questions: Sequence[Question]) -> list[Answer]:
    """Greedy answers, judged by the best of all references."""
    written = reader.answers([question.prompt for question in questions])
    return [
        Answer(question, text, exact_match(text, question.references), rouge_l(text, question.references))
        for question, text in zip(questions, written, strict=True)
    ]


def leave_answers(run: Run, answers: Sequence[Answer]) -> Metrics:
    """Write ``answers.jsonl`` and ``by_category.csv``, and return the figures of all.

    Returns:
        ``eval/held_out/exact_any`` and ``eval/held_out/rouge_l_any``, by the best of all references.
    """
    lines = [
        {"task": a.question.task, "prompt": a.question.prompt, "answer": a.text, "right": a.question.references}
        for a in answers
    ]
    atomic_write_text(run.path("answers.jsonl"), "".join(json.dumps(line) + "\n" for line in lines))
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.question.category, []).append(answer)
    rows = [
        (name, len({a.question.task for a in found}), len(found), *_figures(found))
        for name, found in [*sorted(groups.items()), ("all", list(answers))]
    ]
    table = csv_table(("category", "tasks", "questions", "exact", "rouge_l"), rows)
    atomic_write_text(run.path("by_category.csv"), table)
    exact, rouge = _figures(answers)
    return {"eval/held_out/exact_any": exact, "eval/held_out/rouge_l_any": rouge}


def _figures(answers: Sequence[Answer]) -> tuple[float, float]:
    return float(np.mean([a.exact for a in answers])), float(np.mean([a.rouge_l for a in answers]))


def csv_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:  # Any: texts and figures
    """Rows under a header, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def shown_apart(task: Instruction) -> list[Instance]:
    """The task's instances whose input none of its examples shows, in an order that follows a hash of the input."""
    shown = {source_digest(e.input) for e in (*task.positive_examples, *task.negative_examples)}
    digests = [source_digest(instance.input) for instance in task.instances]
    order = sorted(range(len(digests)), key=digests.__getitem__)
    return [task.instances[place] for place in order if digests[place] not in shown]


@dataclass(frozen=True)
class Division:
    """Which instances are read, which are asked for choosing, and which for the figure; and what was left out."""

    read: Pool
    valid: Pool
    asked: Pool
    counts: dict[str, int]


def divide(tasks: Sequence[Instruction], asked: Pool, limit: int | None = None) -> Division:
    """Give every input one side: it is asked, or it is asked for choosing, or it is read; whatever the task.

    Args:
        tasks: that are read.
        asked: what is asked for the figure, of these tasks or of others.
        limit: instances of a task that are read at most.

    Raises:
        CorpusError: nothing is left to read, or to ask.
    """
    known = {source_digest(instance.input) for _, instances in asked for instance in instances}
    usable: list[tuple[Instruction, list[tuple[str, Instance]]]] = []
    counts = {"shown": 0, "asked elsewhere": 0}
    for task in tasks:
        apart = [(source_digest(instance.input), instance) for instance in shown_apart(task)]
        usable.append((task, [pair for pair in apart if pair[0] not in known]))
        counts["shown"] += len(task.instances) - len(apart)
        counts["asked elsewhere"] += len(apart) - len(usable[-1][1])
    inputs = sorted({digest for _, pairs in usable for digest, _ in pairs})
    kept = set(inputs[: min(MAX_VALIDATION, max(1, len(inputs) // 20))])
    valid = [(task, [instance for digest, instance in pairs if digest in kept]) for task, pairs in usable]
    read = [(task, [instance for digest, instance in pairs if digest not in kept][:limit]) for task, pairs in usable]
    if not any(instances for _, instances in asked) or not any(instances for _, instances in read):
        raise CorpusError("tasks: no instance is left to learn from or to ask, apart from what the examples show.")
    return Division(read, valid, asked, counts)


class InstructedRecipe(CorpusRecipe, ABC):
    """A method of the stage whose documents are instances of tasks behind the tasks' instructions."""

    sources: dict[TableName, CorpusRef] = Field(default={}, max_length=0, description="none; what is read are tasks")
    model: ModelRef = Field(description="causal model and tokenizer: Hub name or local directory")
    from_scratch: bool = Field(default=False, description="draw new weights for the model's architecture")
    seq_len: int = Field(default=1152, ge=8, le=131_072, description="tokens per row: an input and its output")
    optim: OptimSpec = Field(default=OptimSpec(lr=5e-5), description="how weights are moved")
    parts: tuple[InstructionPart, ...] = Field(
        default=PARTS, description="what is read of an instruction, always in this order; none for inputs alone"
    )
    n_positive: int = Field(default=2, ge=0, le=100, description="right examples in an input, as many as fit")
    n_negative: int = Field(default=2, ge=0, le=100, description="wrong examples in an input, as many as fit")
    max_input_tokens: int = Field(
        default=1024,
        gt=0,
        description="tokens of an input; examples, then fields leave a longer one, and an instance that alone is "
        "longer is left out",
    )  # section 6.1: BART reads 1024

    @model_validator(mode="after")
    def _room_for_answers(self) -> Self:
        if (room := self.seq_len - self.max_answer - 1) < self.max_input_tokens:
            raise ValueError(
                f"max_input_tokens ({self.max_input_tokens}) and max_answer ({self.max_answer}) exceed seq_len "
                f"({self.seq_len}); lower max_input_tokens to {room}, or raise seq_len"
            )
        return self

    def encoded(
        self, pool: Pool, tokenizer: PreTrainedTokenizerBase, parts: Sequence[InstructionPart] | None = None
    ) -> Iterator[tuple[Instruction, Instance, EncodedInstruction | None]]:
        """Every instance behind its instruction; None where it alone is too long."""
        read = self.parts if parts is None else parts
        for task, instances in pool:
            encoder = InstructionEncoder(task, tokenizer, read, self.max_input_tokens, self.n_positive, self.n_negative)
            inputs = [instance.input for instance in instances]
            yield from ((task, *found) for found in zip(instances, encoder(inputs), strict=True))

    def asked_of(
        self, pool: Pool, tokenizer: PreTrainedTokenizerBase, parts: Sequence[InstructionPart] | None = None
    ) -> list[Question]:
        """Questions on the instances of a pool; those that are too long are left out."""
        return [
            Question(task.name, task.category, encoded.text, instance.references)
            for task, instance, encoded in self.encoded(pool, tokenizer, parts)
            if encoded is not None
        ]

    def read_of(self, pool: Pool, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Document], int]:
        """Documents of a pool, and how many instances were too long for an input or, with their output, for a row."""
        found = list(self.encoded(pool, tokenizer))
        outputs = [self.join + instance.references[0] for _, instance, _ in found]
        ids = tokenizer(outputs, add_special_tokens=False, verbose=False)["input_ids"] if outputs else []
        documents: list[Document] = []
        counts: dict[str, int] = {}
        for (task, instance, encoded), output in zip(found, ids, strict=True):
            # Before the input stands a start token, and EOS follows the output.
            if encoded is None or len(encoded.input_ids) + len(output) + 2 > self.seq_len:
                continue
            number = counts[task.name] = counts.get(task.name, -1) + 1
            documents.append(
                answered(
                    f"{task.name}/{number}",
                    encoded.text,
                    instance.references[0],
                    join=self.join,
                    task=task.name,
                    category=task.category,
                )
            )
        return documents, len(found) - len(documents)


def usage_of(recipe: InstructedRecipe) -> Mapping[str, object]:
    """How the trained model is asked, as JSON data."""
    return {
        "parts": list(recipe.parts),
        "n_positive": recipe.n_positive,
        "n_negative": recipe.n_negative,
        "max_input_tokens": recipe.max_input_tokens,
        "join": recipe.join,
    }
