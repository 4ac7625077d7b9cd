"""Natural Instructions: learn to follow the instructions of some tasks, and be asked others.

    read     instruction of a seen task, input: x output: y      loss on y alone
    asked    instruction of a task never seen, input: x output:

The instruction is the one that crowd workers were given, in one schema for all tasks: prompt, definition, things to
avoid, emphasis, negative and positive examples. What is held out is whole tasks: some at random, all of a category, all
that were made from one data set, or those that are named.

Source: Mishra et al., "Cross-Task Generalization via Natural Language Crowdsourcing Instructions", arXiv:2104.08773,
    sections 4 to 6: inputs of 1024 tokens, 12 of 61 tasks held out. The learning rate of 5e-5 and 3 epochs for
    BART-base could not be verified.
Differs: a causal model is trained where the paper trains an encoder-decoder, since the stage trains causal models;
    ``InstructionCollator`` encodes for either. ROUGE-L is without stemming. Inputs that a held-out task is asked about
    are read in no seen task, so that the arm without instructions can be compared. One run trains on one encoding, so
    ``by_part.csv`` says what the trained model loses without each part in what it is asked; ``gain_by_part`` takes the
    scores of several trained models as well. The whole data set (61 tasks) is not shipped.
Needs: tasks with instructions; a causal language model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field

from headwater.core.cache import atomic_write_text
from headwater.core.recipe import DataRef, Metrics
from headwater.core.rng import numpy_generator
from headwater.core.stats import paired_bootstrap
from headwater.corpora.context import CorpusContext
from headwater.corpora.instructed import (
    README,
    Answer,
    Division,
    InstructedRecipe,
    Pool,
    answers_of,
    as_pairs,
    csv_table,
    divide,
    leave_answers,
    shown_apart,
    usage_of,
)
from headwater.corpora.plan import Corpus, Reading
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.instruct import AnswerFormatter, rouge_l
from headwater.modalities.text.instruction_inputs import InstructionCollator, InstructionEncoder, encode_instruction
from headwater.modalities.text.instructions import (
    Instruction,
    InstructionPart,
    read_tasks,
    tasks_fingerprint,
)
from headwater.modalities.text.pairs import Pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Instruction",
    "InstructionCollator",
    "InstructionEncoder",
    "NaturalInstructions",
    "PartGain",
    "encode_instruction",
    "gain_by_part",
    "rouge_l",
    "task_split",
]

By = Literal["random", "category", "source", "task"]

MAX_WITHOUT = 200
"""Questions that are asked again without each part."""


def task_split(
    tasks: Sequence[Instruction], by: By, held: int | Sequence[str], seed: int = 0
) -> tuple[list[Instruction], list[Instruction]]:
    """Split by task.

    Args:
        tasks: all of them.
        by: ``random`` holds out tasks; ``category`` and ``source`` hold out all tasks of a category or data set;
            ``task`` holds out the tasks that are named.
        held: how many, drawn by ``seed``, or which. A number and ``task``, or names and ``random``, do not go together.
        seed: of the draw.

    Returns:
        The seen and the held-out tasks, each in the order of ``tasks``.

    Raises:
        ValueError: names where a number is meant or the reverse, an unknown name, a side that would be empty, or, by
            source, a data set on both sides.
    """
    counted = isinstance(held, int)
    if by == "random" and not counted:
        raise ValueError("a random split takes the number of tasks to hold out; split by 'task' to name them.")
    if by == "task" and counted:
        raise ValueError(f"a split by task takes names; got {held}. Split by 'random' to hold out so many.")
    groups = [_groups(task, by) for task in tasks]
    known = list(dict.fromkeys(name for of in groups for name in of))
    if isinstance(held, int):
        if not 0 < held < len(known):
            raise ValueError(f"held must be from 1 to {len(known) - 1}, since there are {len(known)}; got {held}.")
        chosen = set(np.array(known)[numpy_generator(seed, "task split").permutation(len(known))[:held]].tolist())
    else:
        chosen = set(held)
        if unknown := sorted(chosen - set(known)):
            raise ValueError(f"no task has the {_word(by)} {unknown[0]!r}; there are {', '.join(known)}.")
    sides = [bool(chosen & set(of)) for of in groups]
    seen = [task for task, out in zip(tasks, sides, strict=True) if not out]
    kept = [task for task, out in zip(tasks, sides, strict=True) if out]
    if not seen or not kept:
        raise ValueError(f"the split leaves {len(seen)} tasks to learn from and {len(kept)} held out; change held.")
    if by == "source":
        both = {n for task in seen for n in task.source_names} & {n for task in kept for n in task.source_names}
        if both:
            raise ValueError(
                f"data set {min(both)!r} is on both sides of the split, since a task has two; hold both of them out."
            )
    return seen, kept


def _groups(task: Instruction, by: By) -> tuple[str, ...]:
    if by in ("random", "task"):
        return (task.name,)
    found = task.source_names if by == "source" else task.categories[:1]
    if not found:
        raise ValueError(f"task {task.name!r} names no {_word(by)}; split otherwise, or write it in the task.")
    return found


def _word(by: By) -> str:
    return {"source": "data set"}.get(by, by)


class PartGain(NamedTuple):
    """What an encoding scores, and what the reference scores above it, with a 95 % interval over tasks."""

    encoding: str
    score: float
    gain: float
    low: float
    high: float


def gain_by_part(results: Mapping[str, Mapping[str, float]], reference: str) -> list[PartGain]:
    """Compare encodings by their scores on the same tasks.

    Args:
        results: encoding -> task -> score.
        reference: the encoding that the others are compared with.

    Returns:
        One row per encoding, in order. The interval of a single task is infinite.

    Raises:
        ValueError: no such encoding, or scores on other tasks than the reference's.

    Example:
        >>> rows = gain_by_part({"all": {"a": 0.5, "b": 0.7}, "none": {"a": 0.1, "b": 0.3}}, "all")
        >>> [(row.encoding, round(row.gain, 3)) for row in rows]
        [('all', 0.0), ('none', 0.4)]
    """
    if reference not in results:
        raise ValueError(f"no results of {reference!r}; there are {', '.join(results)}.")
    tasks = list(results[reference])
    rows = []
    for encoding, scores in results.items():
        if set(scores) != set(tasks):
            raise ValueError(f"{encoding!r} has scores on other tasks than {reference!r}; score the same ones.")
        mine, best = [scores[task] for task in tasks], [results[reference][task] for task in tasks]
        found = paired_bootstrap(best, mine)
        rows.append(PartGain(encoding, float(np.mean(mine)), found.mean, found.low, found.high))
    return rows


class NaturalInstructions(InstructedRecipe):
    """Instruction tuning on some tasks, asked about others."""

    id: ClassVar[str] = "natural_instructions"

    tasks: DataRef = Field(
        description="tasks with instructions: a folder of Natural Instructions files (v1 or v2, .json), or rows with "
        "task_name, definition, input and output on disk or the Hub"
    )
    split: By = Field(
        default="random",
        description="what is held out: tasks at random, all of a category, all from one data set, or named tasks",
    )
    held: int | tuple[str, ...] = Field(
        default=12, description="how many of them, drawn by `split_seed`, or their names"
    )  # section 5.1
    split_seed: int = Field(default=0, ge=0, lt=2**63, description="draws what is held out, the same for all seeds")
    instances_per_task: int = Field(default=1000, gt=0, description="instances of a seen task that are read at most")
    asked_per_task: int = Field(default=100, gt=0, description="instances of a held-out task that are asked at most")

    def build(self, ctx: CorpusContext) -> Corpus:
        """One table: instances of the seen tasks, each behind its task's instruction."""
        tasks = read_tasks(self.tasks)
        ctx.run.record_data("tasks", tasks_fingerprint(tasks))
        seen, held = self._split(tasks)
        division = self._divided(seen, held)
        documents, too_long = self.read_of(division.read, ctx.tokenizer)
        if too_long:
            ctx.warn("long", f"{too_long} instances are longer than max_input_tokens or seq_len and were left out")
        left_out = {**division.counts, "too long": too_long}
        ctx.run.write_json(
            "split.json",
            {"seen": [t.name for t in seen], "held_out": [t.name for t in held], "left_out": left_out},
        )
        return Corpus(
            (Reading("train", 1.0, ("seen",), format=AnswerFormatter(ctx.tokenizer)),),
            {"seen": documents},
            examine=lambda model: self._examine(model, ctx, left_out),
            usage=usage_of(self),
            readme=README,
            files=("split.json", "answers.jsonl", "by_category.csv", "by_part.csv"),
        )

    def asked(self) -> dict[str, Pairs]:
        """``held_out``: tasks that were not seen; ``valid``: instances of seen tasks that were not read."""
        from headwater.modalities.models import load_tokenizer

        tokenizer = load_tokenizer(self.model)
        division = self._divided(*self._split(read_tasks(self.tasks)))
        pools = {"held_out": division.asked, "valid": division.valid}
        own = {name: as_pairs(self.asked_of(pool, tokenizer)) for name, pool in pools.items()}
        if empty := [name for name, pairs in own.items() if not len(pairs)]:
            raise CorpusError(f"tasks: every {empty[0]} question is longer than max_input_tokens; raise it.")
        return super().asked() | own

    def _split(self, tasks: Sequence[Instruction]) -> tuple[list[Instruction], list[Instruction]]:
        try:
            return task_split(tasks, self.split, self.held, self.split_seed)
        except ValueError as error:
            raise CorpusError(f"tasks: {error}") from None

    def _divided(self, seen: Sequence[Instruction], held: Sequence[Instruction]) -> Division:
        asked = [(task, shown_apart(task)[: self.asked_per_task]) for task in held]
        return divide(seen, asked, self.instances_per_task)

    def _examine(self, model: PreTrainedModel, ctx: CorpusContext, left_out: Mapping[str, int]) -> Metrics:
        """Ask the held-out tasks, judge by all references, and ask again without each part."""
        from headwater.corpora.evaluation import pair_reader

        reader = pair_reader(ctx, model)
        pool = self._divided(*self._split(read_tasks(self.tasks))).asked

        def ask(pool: Pool, parts: Sequence[InstructionPart]) -> list[Answer]:
            return answers_of(reader, self.asked_of(pool, ctx.tokenizer, parts))

        metrics = leave_answers(ctx.run, ask(pool, self.parts))
        atomic_write_text(ctx.run.path("by_part.csv"), csv_table(PartGain._fields, self._without(pool, ask)))
        return {
            **metrics,
            **{f"data/{name.replace(' ', '_')}": float(count) for name, count in left_out.items()},
        }

    def _without(self, pool: Pool, ask: Callable[[Pool, Sequence[InstructionPart]], list[Answer]]) -> list[PartGain]:
        """ROUGE-L by task with all parts, without each, and without any."""
        some = [(task, instances[: max(1, MAX_WITHOUT // len(pool))]) for task, instances in pool]
        encodings: dict[str, tuple[InstructionPart, ...]] = {"all": self.parts}
        encodings |= {f"without {part}": tuple(p for p in self.parts if p != part) for part in self.parts}
        if len(self.parts) > 1:
            encodings["none"] = ()
        return gain_by_part({name: _by_task(ask(some, parts)) for name, parts in encodings.items()}, "all")


def _by_task(answers: Sequence[Answer]) -> dict[str, float]:
    scores: dict[str, list[float]] = {}
    for answer in answers:
        scores.setdefault(answer.question.task, []).append(answer.rouge_l)
    return {task: float(np.mean(values)) for task, values in scores.items()}
