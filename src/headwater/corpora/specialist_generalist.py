"""Specialist or generalist: many broad instructions first, then the few examples of the task that matters.

    specialist only      n target examples, read again until the budget is spent
    sequential           generalist instructions for a share r of the budget, then the target examples
    mixed                both in every batch, r : 1 - r
    generalist only      r = 1, no target example

All arms read the same number of tokens, so the generalist's are taken from the specialist's. ``coverage`` says how
broad a target is; ``gain_table`` compares runs over n and coverage, and ``crossing_point`` names the n from which the
generalist data gains nothing.

Source: Shi et al., "Specialist or Generalist? Instruction Tuning for Specific NLP Tasks", arXiv:2310.15326. That the
    sequential order is the paper's main one, and its learning rate of 2e-5, 3 epochs and batches of 128, could not be
    verified.
Differs: the budget counts all tokens, where the paper's generalist tokens come on top; for its setting give the budget
    of both and the share that is the generalist's. One run is one n, one target, one order; ``gain_table`` takes the
    results of several. Targets and generalist sets are encoded by one template, the one of natural_instructions, so
    none can differ in it. A causal model, since the stage trains causal models.
Needs: examples of a target task or tasks; for the generalist arm, tasks with instructions or prompts with answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from headwater.core.optim import OptimSpec
from headwater.core.recipe import DataRef, Metrics
from headwater.core.rng import numpy_generator
from headwater.core.stats import paired_bootstrap
from headwater.corpora.context import CorpusContext
from headwater.corpora.instructed import (
    README,
    Division,
    InstructedRecipe,
    Pool,
    answers_of,
    as_pairs,
    divide,
    leave_answers,
    shown_apart,
    usage_of,
)
from headwater.corpora.plan import Corpus, Reading
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.examples import Formatter
from headwater.modalities.text.instruct import AnswerFormatter
from headwater.modalities.text.instructions import Instance, Instruction, read_tasks, tasks_fingerprint
from headwater.modalities.text.pairs import Pairs, source_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Cell",
    "Gain",
    "SpecialistGeneralist",
    "SpecialistPlan",
    "coverage",
    "crossing_point",
    "factuality_split",
    "gain_table",
    "quoted",
]

NGRAM = 13
"""Words that a generalist instance must share in a row with a question to count as quoting it."""

MAX_QUOTED = 0.01
"""Share of generalist instances that may quote questions; they are left out. Beyond it the sets are not apart."""


def coverage(tasks: Iterable[str], catalogue: Mapping[str, str]) -> float:
    """How broad a target is: its categories, as a share of all there are.

    Args:
        tasks: names of the target's tasks.
        catalogue: task -> category, of all tasks.

    Raises:
        ValueError: no task, or one that the catalogue lacks.

    Example:
        >>> coverage(["qa"], {"qa": "reading", "nli": "reasoning", "fill": "reading"})
        0.5
    """
    named = list(tasks)
    if not named:
        raise ValueError("coverage of no task is not defined; name the target's tasks.")
    if unknown := sorted(set(named) - set(catalogue)):
        raise ValueError(f"the catalogue has no task {unknown[0]!r}.")
    return len({catalogue[name] for name in named}) / len(set(catalogue.values()))


@dataclass(frozen=True)
class SpecialistPlan:
    """In what order and proportion a target's examples and generalist instructions are read.

    Attributes:
        share: of the budget, or of every batch, that generalist instructions have, in [0, 1].
        order: ``sequential``, generalist first; or ``mixed``.
        replay: share of generalist rows in the specialist phase of a sequential plan, in [0, 1).
    """

    share: float
    order: Literal["sequential", "mixed"] = "sequential"
    replay: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or not 0 <= self.replay < 1:
            raise ValueError(f"share must be in [0, 1] and replay in [0, 1); got {self.share} and {self.replay}.")
        if self.replay and (self.order == "mixed" or self.share in (0, 1)):
            raise ValueError("replay goes into the specialist phase behind a generalist one; set it to 0.")

    def readings(self, formatter: Formatter, optim: OptimSpec) -> tuple[Reading, ...]:
        """Phases of a ``Corpus`` with the tables ``specialist`` and ``generalist``, as far as they are read.

        Args:
            formatter: of both tables.
            optim: the second phase of a sequential plan starts afresh with it, as fine-tuning a tuned model does.
        """
        if self.share in (0, 1):
            name = "generalist" if self.share else "specialist"
            return (Reading(name, 1.0, (name,), format=formatter),)
        if self.order == "mixed":
            weights = (self.share, 1 - self.share)
            return (Reading("mixed", 1.0, ("generalist", "specialist"), weights, format=formatter),)
        first = Reading("generalist", self.share, ("generalist",), format=formatter)
        rest = 1 - self.share
        if not self.replay:
            return first, Reading("specialist", rest, ("specialist",), format=formatter, optim=optim)
        both = (self.replay, 1 - self.replay)
        return first, Reading("specialist", rest, ("generalist", "specialist"), both, formatter, optim)


def quoted(tasks: Sequence[Instruction], asked: Pool) -> list[set[int]]:
    """Which instances quote a question: the same input and output, or thirteen words of them in a row.

    Args:
        tasks: that are read.
        asked: that must not be.

    Returns:
        Places in ``instances``, one set for each task.
    """
    tested = [instance for _, instances in asked for instance in instances]
    whole = {source_digest(_words(instance)) for instance in tested}
    grams = set().union(*(_grams(_words(instance)) for instance in tested)) if tested else set()
    found = []
    for task in tasks:
        texts = [_words(instance) for instance in task.instances]
        found.append({i for i, text in enumerate(texts) if source_digest(text) in whole or grams & _grams(text)})
    return found


def _words(instance: Instance) -> str:
    return f"{instance.input} {instance.references[0]}"


def _grams(text: str) -> set[tuple[str, ...]]:
    words = text.casefold().split()
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


class Cell(NamedTuple):
    """One seed of one comparison: what the target's score is with and without the generalist data."""

    coverage: float
    n: int
    seed: int
    specialist: float
    both: float


class Gain(NamedTuple):
    """Mean gain of the generalist data for one coverage and n, with its 95 % interval over seeds."""

    coverage: float
    n: int
    gain: float
    low: float
    high: float


def gain_table(results: Iterable[Cell]) -> list[Gain]:
    """Gain by coverage and n, the broadest target first, then by n.

    Raises:
        ValueError: a seed stands twice in a cell.

    Example:
        >>> rows = [Cell(1.0, 100, seed, 0.5, 0.7) for seed in range(3)]
        >>> [(row.n, round(row.gain, 3)) for row in gain_table(rows)]
        [(100, 0.2)]
    """
    groups: dict[tuple[float, int], dict[int, Cell]] = {}
    for cell in results:
        seeds = groups.setdefault((cell.coverage, cell.n), {})
        if cell.seed in seeds:
            raise ValueError(f"seed {cell.seed} stands twice at coverage {cell.coverage:g} and n {cell.n}.")
        seeds[cell.seed] = cell
    rows = []
    for (breadth, n), seeds in sorted(groups.items(), key=lambda item: (-item[0][0], item[0][1])):
        cells = list(seeds.values())
        found = paired_bootstrap([cell.both for cell in cells], [cell.specialist for cell in cells])
        rows.append(Gain(breadth, n, found.mean, found.low, found.high))
    return rows


def crossing_point(rows: Sequence[Gain]) -> float | None:
    """The smallest n from which the interval of the gain reaches zero, between measured n by the logarithm of n.

    The lower ends are made to fall with n first: each is at most the least before it.

    Args:
        rows: of one coverage, any order.

    Returns:
        n, or None where every interval is above zero.

    Raises:
        ValueError: no row, or rows of several coverages.

    Example:
        >>> crossing_point([Gain(1.0, 10, 0.4, 0.2, 0.6), Gain(1.0, 1000, 0.0, -0.2, 0.2)])
        100.0
    """
    if len({row.coverage for row in rows}) != 1:
        raise ValueError("crossing_point takes the rows of one coverage, at least one.")
    ordered = sorted(rows, key=lambda row: row.n)
    lows = np.minimum.accumulate([row.low for row in ordered])
    for place, (row, low) in enumerate(zip(ordered, lows, strict=True)):
        if low > 0:
            continue
        if place == 0 or not math.isfinite(low):
            return float(row.n)
        before, above = ordered[place - 1].n, float(lows[place - 1])
        part = above / (above - float(low))
        return round(math.exp(math.log(before) + part * (math.log(row.n) - math.log(before))), 6)
    return None


def factuality_split(tasks: Sequence[Instruction], by: Mapping[str, str]) -> dict[str, list[Instruction]]:
    """Tasks by the skill that they need, such as understanding, reasoning or facts.

    Args:
        tasks: with categories.
        by: category -> skill.

    Raises:
        ValueError: a task whose category has no skill.
    """
    found: dict[str, list[Instruction]] = {}
    for task in tasks:
        if task.category not in by:
            raise ValueError(
                f"category {task.category!r} of task {task.name!r} has no skill; there are {', '.join(by)}."
            )
        found.setdefault(by[task.category], []).append(task)
    return found


class SpecialistGeneralist(InstructedRecipe):
    """A target's examples, with broad instructions before or among them."""

    id: ClassVar[str] = "specialist_generalist"

    optim: OptimSpec = Field(
        default=OptimSpec(lr=2e-5), description="how weights are moved; a specialist phase behind another starts afresh"
    )
    specialist: DataRef = Field(
        description="the target: a folder of task files, or rows with task_name, definition, input and output"
    )
    generalist: DataRef | None = Field(
        default=None,
        description="broad instructions: likewise, or rows of prompts and answers alone; null: specialist only",
    )
    n_specialist: int = Field(default=1000, gt=0, description="examples of the target, drawn over all its tasks")
    order: Literal["sequential", "mixed"] = Field(
        default="sequential", description="generalist first, or both together"
    )
    generalist_share: float = Field(
        default=0.5, gt=0, le=1, description="of the budget, or of every batch; 1 reads no target example"
    )
    replay: float = Field(
        default=0.0, ge=0, lt=1, description="share of generalist rows in the specialist phase, where there are two"
    )
    generalist_per_task: int = Field(default=1000, gt=0, description="instances of a generalist task read at most")
    asked_per_task: int = Field(default=100, gt=0, description="instances of each task that are asked and never read")

    @model_validator(mode="after")
    def _plan_is_sound(self) -> Self:
        _ = self.plan
        if "generalist" in self.questions or "generalist" in self.evals:
            raise ValueError("'generalist' names questions on the generalist tasks; choose another name")
        return self

    @property
    def plan(self) -> SpecialistPlan:
        """Order and proportion; without a generalist set, the specialist alone."""
        share = 0.0 if self.generalist is None else self.generalist_share
        return SpecialistPlan(share, self.order, self.replay)

    def build(self, ctx: CorpusContext) -> Corpus:
        """Draw n examples of the target, leave out what quotes a question, and read by the plan."""
        target, plan = read_tasks(self.specialist), self.plan
        ctx.run.record_data("specialist", tasks_fingerprint(target))
        sides, counts = self._sides(target), {"quoted": 0, "too long": 0}
        pools: dict[str, Pool] = {}
        if plan.share < 1:
            pools["specialist"] = self._drawn(sides)
        if self.generalist is not None:
            broad = read_tasks(self.generalist)
            ctx.run.record_data("generalist", tasks_fingerprint(broad))
            pools["generalist"], counts["quoted"] = self._apart(target, broad, sides)
        tables = {}
        for name, pool in pools.items():
            tables[name], long = self.read_of(pool, ctx.tokenizer)
            counts["too long"] += long
        if counts["too long"]:
            ctx.warn("long", f"{counts['too long']} instances are longer than max_input_tokens or seq_len and left out")
        examples = {name: len(table) for name, table in tables.items()}
        ctx.run.write_json("plan.json", {"examples": examples, "left_out": counts})
        return Corpus(
            plan.readings(AnswerFormatter(ctx.tokenizer), self.optim),
            tables,
            examine=lambda model: self._examine(model, ctx, counts),
            usage=usage_of(self),
            readme=README,
            files=("plan.json", "answers.jsonl", "by_category.csv"),
        )

    def asked(self) -> dict[str, Pairs]:
        """``held_out`` and ``valid`` on the target, and ``generalist``: what else the model can do."""
        from headwater.modalities.models import load_tokenizer

        tokenizer = load_tokenizer(self.model)
        sides = self._sides(read_tasks(self.specialist))
        pools = {"held_out": sides.asked, "valid": sides.valid}
        if self.generalist is not None:
            pools["generalist"] = self._broad_sides(read_tasks(self.generalist), sides).valid
        own = {name: as_pairs(self.asked_of(pool, tokenizer)) for name, pool in pools.items()}
        if empty := [name for name, pairs in own.items() if not len(pairs)]:
            raise CorpusError(f"every {empty[0]} question is longer than max_input_tokens; raise it.")
        return super().asked() | own

    def _sides(self, target: Sequence[Instruction]) -> Division:
        """The target's instances: asked, asked for choosing, and those that examples are drawn from."""
        return divide(target, [(task, shown_apart(task)[: self.asked_per_task]) for task in target])

    def _drawn(self, sides: Division) -> Pool:
        """So many examples over all tasks, in an order of the seed: a smaller n is the beginning of a larger one."""
        flat = [(place, instance) for place, (_, instances) in enumerate(sides.read) for instance in instances]
        if self.n_specialist > len(flat):
            raise CorpusError(
                f"n_specialist is {self.n_specialist} and the target has {len(flat)} examples to read, questions "
                "apart; lower it. Examples are not repeated to fill a number."
            )
        order = numpy_generator(self.seed, "specialist").permutation(len(flat))[: self.n_specialist]
        chosen = [flat[i] for i in order]
        return [(task, [found for at, found in chosen if at == place]) for place, (task, _) in enumerate(sides.read)]

    def _broad_sides(self, broad: Sequence[Instruction], sides: Division) -> Division:
        """Generalist instances with other inputs than the target is asked about."""
        return divide(broad, [*sides.asked, *sides.valid], self.generalist_per_task)

    def _apart(self, target: Sequence[Instruction], broad: Sequence[Instruction], sides: Division) -> tuple[Pool, int]:
        """Generalist instances that are read, and how many were left out because they quote a question."""
        if tasks_fingerprint(target) == tasks_fingerprint(broad):
            raise CorpusError("specialist and generalist are the same tasks; give other tasks, or generalist: null.")
        found = quoted(broad, [*sides.asked, *sides.valid])
        count, total = sum(map(len, found)), sum(len(task.instances) for task in broad)
        if count > MAX_QUOTED * total:
            raise CorpusError(
                f"generalist: {count} of {total} instances quote questions on the target; at most {MAX_QUOTED:.0%} are "
                "left out in silence. Take the target's tasks out of the generalist set."
            )
        kept = [
            task.model_copy(update={"instances": tuple(i for p, i in enumerate(task.instances) if p not in places)})
            for task, places in zip(broad, found, strict=True)
        ]
        return self._broad_sides(kept, sides).read, count

    def _examine(self, model: PreTrainedModel, ctx: CorpusContext, counts: Mapping[str, int]) -> Metrics:
        """Answers on the target, judged by all references."""
        from headwater.corpora.evaluation import pair_reader

        asked = self.asked_of(self._sides(read_tasks(self.specialist)).asked, ctx.tokenizer)
        metrics = leave_answers(ctx.run, answers_of(pair_reader(ctx, model), asked))
        return metrics | {f"data/{name.replace(' ', '_')}": float(count) for name, count in counts.items()}
