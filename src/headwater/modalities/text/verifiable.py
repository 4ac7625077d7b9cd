"""Tasks whose answers can be checked exactly: a closed vocabulary, generators, verifiers.

    sym_chain    7 + 5 - 3 <sep>                                     7 + 5 = 12 ; 12 - 3 = 9 ; answer 9 <eos>
    word_chain   ann has 7 . ann buys 5 . bob loses 3 . ann ? <sep>  7 + 5 = 12 ; answer 12 <eos>
    chain_true   7 + 5 = 12 ; 12 - 3 = 8 ; true ? <sep>              answer false <eos>
    parity       parity 1 0 1 <sep>                                  answer true <eos>     (an even number of ones)
    list_rev     rev 3 1 2 <sep>                                     answer 2 1 3 <eos>    (list_sort, list_copy alike)

Numbers are 0 to 20, one token each, and no running total leaves that range. A verifier accepts any order of true steps.
What it gives for a response of k steps to a problem of n, of which g are right and ``correct`` is 0 or 1:

    quality = floor(9 (correct / 2 + g / (2 max(k, n))))

A step is right where its arithmetic is true, it goes on from the value before it, and it uses an event of the right
person that no step before has used. So a lucky answer after wrong steps is correct with a quality below 9. Tasks
without steps have quality 9 or 0.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from headwater.core.rng import numpy_generator

if TYPE_CHECKING:
    import datasets

__all__ = ["TASKS", "Check", "Item", "Task", "build_tokenizer", "read_builtin", "sample_items", "to_dataset"]

NAMES = ("ann", "bob", "cat", "dan", "eve", "fay", "gus", "hal")
GAINS = ("finds", "buys", "gets")
LOSES = ("loses", "sells", "gives")
LARGEST = 20
# `fact`, `grade`, the styles and the grades are for tasks to come: a model keeps its ids when they arrive.
WORDS = (
    *(".", "?", ";", "=", "+", "-", "answer", "fact", "rev", "copy", "sort", "parity", "grade", "true", "false"),
    *("style_a", "style_b", "has", *NAMES, *GAINS, *LOSES),
    *(str(number) for number in range(LARGEST + 1)),
    *(f"g{grade}" for grade in range(10)),
)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<sep>")
DEFAULT_ITEMS = 1200

Range = int | tuple[int, int]
"""One number, or the smallest and the largest of those that are drawn evenly."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the kit, split at white space, padded on the left; nothing is added to a text.

    The vocabulary is closed: another word is an error of the tokenizers library, not an unknown token.

    Example:
        >>> tokenizer = build_tokenizer()
        >>> tokenizer.decode(tokenizer("7 + 5 <sep>")["input_ids"])
        '7 + 5 <sep>'
    """
    vocabulary = {word: place for place, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        sep_token="<sep>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Item:
    """A prompt whose answer is known.

    Attributes:
        prompt: what a model is given.
        gold: a full right response, ``<eos>`` included where the task has one.
        answer: what counts.
        meta: facts of the task: ``steps``, ``distractors``, ``start``, ``trace`` of (operation, number) pairs; JSON.
    """

    prompt: str
    gold: str
    answer: int | str
    meta: Mapping[str, Any] = field(default_factory=dict)  # Any: JSON data


@dataclass(frozen=True)
class Check:
    """What a verifier says of a response.

    Attributes:
        correct: well formed, and the answer is the right one.
        parsed: the answer that was read; ``None`` where the form is broken.
        format_ok: one ``answer`` with a value after it, then one ``<eos>``, which is the end.
        quality: 0 to 9; see the module.
    """

    correct: bool
    parsed: int | str | None
    format_ok: bool
    quality: int


class Task(Protocol):
    """A generator with its verifier."""

    @property
    def name(self) -> str:
        """Of the task."""
        ...

    @property
    def sample(self) -> Callable[..., Item]:
        """``sample(rng, **difficulty)`` draws an item; each task says what difficulty it knows."""
        ...

    def verify(self, item: Item, response: str) -> Check:
        """Judge a response to an item of this task, exactly."""
        ...


def _draw(rng: np.random.Generator, span: Range, least: int) -> int:
    low, high = (span, span) if isinstance(span, int) else span
    if not least <= low <= high:
        raise ValueError(f"a range must rise and begin at {least} or more; got {span}.")
    return int(rng.integers(low, high + 1))


def _parse(response: str, values: frozenset[str], many: bool) -> tuple[list[str], list[str] | None]:
    """The words before ``answer``, and those of the answer; ``None`` where the form is broken."""
    words = response.split()
    if words.count("<eos>") != 1 or words[-1] != "<eos>" or words.count("answer") != 1:
        return [], None
    place = words.index("answer")
    answer = words[place + 1 : -1]
    if not answer or not values.issuperset(answer) or (len(answer) > 1 and not many):
        return [], None
    return words[:place], answer


NUMBERS = frozenset(str(number) for number in range(LARGEST + 1))
TRUTH = frozenset({"true", "false"})


def _plain(item: Item, response: str, values: frozenset[str], many: bool = False) -> Check:
    """A verifier of tasks without steps: nothing but the answer may stand there."""
    before, answer = _parse(response, values, many)
    if answer is None or before:
        return Check(False, None, False, 0)
    parsed = " ".join(answer)
    correct = parsed == item.answer
    return Check(correct, parsed, True, 9 if correct else 0)


# -- chains ------------------------------------------------------------------------------------------------------------


def _trace(rng: np.random.Generator, steps: int) -> tuple[int, list[tuple[str, int]]]:
    """A start and ``steps`` operations that keep the total within 0 to 20."""
    start = total = int(rng.integers(LARGEST + 1))
    trace = []
    for _ in range(steps):
        up = bool(rng.integers(2)) if 0 < total < LARGEST else total == 0
        number = int(rng.integers(1, (LARGEST - total if up else total) + 1))
        total += number if up else -number
        trace.append(("+" if up else "-", number))
    return start, trace


def _chain(start: int, trace: Sequence[tuple[str, int]]) -> tuple[list[str], int]:
    lines, total = [], start
    for operation, number in trace:
        after = total + number if operation == "+" else total - number
        lines.append(f"{total} {operation} {number} = {after} ;")
        total = after
    return lines, total


def _verify_chain(item: Item, response: str) -> Check:
    before, answer = _parse(response, NUMBERS, many=False)
    if answer is None:
        return Check(False, None, False, 0)
    parsed = int(answer[0])
    lines = " ".join(before).split(";")
    if lines[-1].strip():  # a step that no semicolon ends
        lines.append("")
    written = [line.split() for line in lines[:-1]]
    left, total = Counter((str(op), int(number)) for op, number in item.meta["trace"]), int(item.meta["start"])
    good = 0
    for words in written:
        match words:
            case [first, ("+" | "-") as operation, number, "=", after] if NUMBERS.issuperset((first, number, after)):
                event = (operation, int(number))
                true = int(first) + (event[1] if operation == "+" else -event[1]) == int(after)
                if true and int(first) == total and left[event] > 0:
                    left[event] -= 1
                    good += 1
                total = int(after)
            case _:
                pass
    needed = max(len(written), len(item.meta["trace"]))
    correct = parsed == item.answer
    return Check(correct, parsed, True, 9 * (int(correct) * needed + good) // (2 * needed))


@dataclass(frozen=True)
class SymChain:
    """A sum and its steps. ``steps``: terms after the first, 1 to 4."""

    name: str = "sym_chain"

    def sample(self, rng: np.random.Generator, *, steps: Range = (1, 4)) -> Item:
        """Draw an item."""
        start, trace = _trace(rng, _draw(rng, steps, 1))
        lines, total = _chain(start, trace)
        terms = " ".join(f"{operation} {number}" for operation, number in trace)
        meta = {"steps": len(trace), "start": start, "trace": [list(event) for event in trace]}
        return Item(f"{start} {terms} <sep>", f"{' '.join(lines)} answer {total} <eos>", total, meta)

    def verify(self, item: Item, response: str) -> Check:
        """Judge a response."""
        return _verify_chain(item, response)


@dataclass(frozen=True)
class WordChain:
    """Who has how many in the end. ``steps``: events of the person asked for; ``distractors``: of somebody else."""

    name: str = "word_chain"

    def sample(self, rng: np.random.Generator, *, steps: Range = (1, 3), distractors: Range = (0, 2)) -> Item:
        """Draw an item; of gains and losses the gold response takes the order of the story."""
        start, trace = _trace(rng, _draw(rng, steps, 1))
        others = _draw(rng, distractors, 0)
        asked, other = (NAMES[place] for place in rng.choice(len(NAMES), 2, replace=False))
        story = [(asked, operation, number) for operation, number in trace]
        for _ in range(others):
            event = (other, "+-"[int(rng.integers(2))], int(rng.integers(1, LARGEST // 2 + 1)))
            story.insert(int(rng.integers(len(story) + 1)), event)
        told = [
            f"{name} {(GAINS if operation == '+' else LOSES)[int(rng.integers(3))]} {number} ."
            for name, operation, number in story
        ]
        lines, total = _chain(start, trace)
        meta = {
            "steps": len(trace),
            "distractors": others,
            "names": [asked, other],
            "start": start,
            "trace": [list(event) for event in trace],
        }
        prompt = f"{asked} has {start} . {' '.join(told)} {asked} ? <sep>"
        return Item(prompt, f"{' '.join(lines)} answer {total} <eos>", total, meta)

    def verify(self, item: Item, response: str) -> Check:
        """Judge a response."""
        return _verify_chain(item, response)


@dataclass(frozen=True)
class ChainTrue:
    """Whether every step of a chain is true and goes on from the one before; half of them have one wrong number."""

    name: str = "chain_true"

    def sample(self, rng: np.random.Generator, *, steps: Range = (1, 3)) -> Item:
        """Draw an item."""
        start, trace = _trace(rng, _draw(rng, steps, 1))
        words = " ".join(_chain(start, trace)[0]).split()
        true = bool(rng.integers(2))
        if not true:
            places = [place for place, word in enumerate(words) if word in NUMBERS]
            place = places[int(rng.integers(len(places)))]
            # Another number anywhere breaks its step: the other two numbers determine it.
            words[place] = str((int(words[place]) + int(rng.integers(1, LARGEST + 1))) % (LARGEST + 1))
        answer = str(true).lower()
        meta = {"steps": len(trace), "start": start, "trace": [list(event) for event in trace]}
        return Item(f"{' '.join(words)} true ? <sep>", f"answer {answer} <eos>", answer, meta)

    def verify(self, item: Item, response: str) -> Check:
        """Judge a response."""
        return _plain(item, response, TRUTH)


# -- without steps -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parity:
    """Whether the number of ones is even. ``length``: bits."""

    name: str = "parity"

    def sample(self, rng: np.random.Generator, *, length: Range = (4, 10)) -> Item:
        """Draw an item."""
        bits = rng.integers(2, size=_draw(rng, length, 1))
        answer = "false" if bits.sum() % 2 else "true"
        return Item(f"parity {' '.join(map(str, bits))} <sep>", f"answer {answer} <eos>", answer, {"steps": len(bits)})

    def verify(self, item: Item, response: str) -> Check:
        """Judge a response."""
        return _plain(item, response, TRUTH)


@dataclass(frozen=True)
class ListTask:
    """A list of numbers, as it is, backwards or in order. ``length``: of the list."""

    name: str
    word: str

    def sample(self, rng: np.random.Generator, *, length: Range = (3, 6)) -> Item:
        """Draw an item."""
        numbers = rng.integers(LARGEST + 1, size=_draw(rng, length, 1)).tolist()
        wanted = {"copy": numbers, "rev": numbers[::-1], "sort": sorted(numbers)}[self.word]
        answer = " ".join(map(str, wanted))
        prompt = f"{self.word} {' '.join(map(str, numbers))} <sep>"
        return Item(prompt, f"answer {answer} <eos>", answer, {"steps": len(numbers)})

    def verify(self, item: Item, response: str) -> Check:
        """Judge a response."""
        return _plain(item, response, NUMBERS, many=True)


_ALL: tuple[Task, ...] = (
    SymChain(),
    WordChain(),
    ChainTrue(),
    Parity(),
    *(ListTask(f"list_{word}", word) for word in ("copy", "rev", "sort")),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}
"""Every task by name."""


def _distinct(task: Task, n: int, rng: np.random.Generator, difficulty: Mapping[str, Range]) -> Iterator[Item]:
    seen: set[str] = set()
    idle = 0
    while len(seen) < n:
        item = task.sample(rng, **difficulty)
        if item.prompt in seen:
            idle += 1
            if idle > 100 * n + 1000:
                raise ValueError(
                    f"{task.name}: after {len(seen)} of {n} prompts hardly a new one is left; ask for fewer, or for "
                    "longer ones."
                )
            continue
        seen.add(item.prompt)
        yield item


def sample_items(task: Task, n: int, seed: int, **difficulty: Range) -> list[Item]:
    """``n`` items, no prompt twice.

    Args:
        task: one of ``TASKS``, or your own.
        n: how many, >= 0.
        seed: same seed, same items.
        difficulty: what the task's ``sample`` takes.

    Raises:
        ValueError: the task has not so many prompts, or a range is empty.
    """
    return list(_distinct(task, n, numpy_generator(seed, "verifiable", task.name), difficulty))


def to_dataset(task: Task, n: int, seed: int, **difficulty: Range) -> datasets.Dataset:
    """``sample_items`` as a data set with the columns ``prompt``, ``gold``, ``answer`` (text) and ``meta`` (JSON)."""
    from datasets import Dataset

    rows = [
        {"prompt": item.prompt, "gold": item.gold, "answer": str(item.answer), "meta": json.dumps(dict(item.meta))}
        for item in sample_items(task, n, seed, **difficulty)
    ]
    return Dataset.from_list(rows)


def read_builtin(name: str, limit: int | None = None) -> list[Item]:
    """Items of ``verifiable/TASK``, the same for everybody.

    Args:
        name: without ``headwater:``.
        limit: how many; 1,200 by default.

    Raises:
        ValueError: there is no such task, or it has not so many prompts.
    """
    kit, slash, task = name.partition("/")
    if kit != "verifiable" or not slash or task not in TASKS:
        known = ", ".join(f"headwater:verifiable/{name}" for name in TASKS)
        raise ValueError(f"no builtin prompts 'headwater:{name}'; there are {known}")
    return sample_items(TASKS[task], limit or DEFAULT_ITEMS, 0)
