"""Cleaning programs: a language of five operations, its parser, and the executor that keeps a text safe from them.

    drop_doc()                                          keep_doc()
    remove_lines(line_start=3, line_end=5)              inclusive, numbers from 0 over the whole document
    normalize(source_str="Read more", target_str="")    keep_chunk()

With W words before, W' after and E invalid operations, in this order:

    W' <= (1 - drop_ratio) W  and  E < max_errors    dropped
    W' <= min_keep_words                             dropped
    E < max_errors                                   refined
    otherwise                                        the text as it was

Source: Zhou et al., "Programming Every Example", arXiv:2409.17115, section 2 and the authors' executor.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from headwater.core.recipe import Spec

__all__ = [
    "Chunk",
    "DropDoc",
    "KeepChunk",
    "KeepDoc",
    "Limits",
    "Normalize",
    "Op",
    "Program",
    "Programmer",
    "RemoveLines",
    "Result",
    "Written",
    "chunk_lines",
    "number_lines",
    "parse_program",
    "removed_lines",
    "render_program",
    "run_program",
    "unix_lines",
]

MAX_LINE = 20_000
"""Characters of one line of a program; a longer one is an error and is not read."""


@dataclass(frozen=True)
class DropDoc:
    """The document goes."""


@dataclass(frozen=True)
class KeepDoc:
    """The document stays as it is."""


@dataclass(frozen=True)
class RemoveLines:
    """Lines ``start`` to ``end`` go, both included; the first line of the document is 0."""

    start: int
    end: int


@dataclass(frozen=True)
class Normalize:
    """Every ``source`` in the lines that stay becomes ``target``."""

    source: str
    target: str = ""


@dataclass(frozen=True)
class KeepChunk:
    """The chunk stays as it is."""


Op: TypeAlias = DropDoc | KeepDoc | RemoveLines | Normalize | KeepChunk
Program: TypeAlias = tuple[Op, ...]


@dataclass(frozen=True)
class Written:
    """What a programmer wrote for one document.

    Attributes:
        text: as it was written.
        program: what of it can be run.
        errors: operations that cannot.
        prompt_tokens, completion_tokens: that a generator read and wrote.
    """

    text: str
    program: Program
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Programmer(Protocol):
    """Writes a program for each document."""

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes a program."""
        ...

    def programs(self, texts: Sequence[str]) -> list[Written]:
        """One for each text, which is not blank; a program does not depend on the company."""
        ...


class Limits(Spec):
    """What a program may do to a text."""

    min_keep_words: int = Field(default=10, ge=0, description="a text left with so many words or fewer is dropped")
    drop_ratio: float = Field(default=0.95, gt=0, le=1, description="a text that loses this share of words is dropped")
    max_errors: int = Field(default=2, gt=0, description="invalid operations from which on a program is not run")
    max_longer: float = Field(
        default=10.0, ge=1, description="times that a replacement may be longer than what it replaces"
    )
    max_growth: float = Field(default=2.0, ge=1, description="times that replacements may make a text longer")


@dataclass(frozen=True)
class Result:
    """What a program did.

    Attributes:
        text: refined; as it was if kept or rejected; empty if dropped.
        status: ``kept`` where nothing changed; ``rejected`` where the program was not to be trusted.
        removed_lines: how many.
        replacements: how many.
        errors: operations that could not be read or run.
    """

    text: str
    status: Literal["refined", "dropped", "kept", "rejected"]
    removed_lines: int = 0
    replacements: int = 0
    errors: int = 0


# -- the language

_NAMES: dict[str, tuple[Callable[..., Op], tuple[tuple[str, ...], ...], type, int]] = {
    # name -> operation, the names of each argument, their type, how many are needed
    "drop_doc": (DropDoc, (), str, 0),
    "keep_doc": (KeepDoc, (), str, 0),
    "keep_chunk": (KeepChunk, (), str, 0),
    "remove_lines": (RemoveLines, (("line_start", "start"), ("line_end", "end")), int, 2),
    "normalize": (Normalize, (("source_str", "source"), ("target_str", "target")), str, 1),
}
_FENCE = re.compile(r"```\w*")


def parse_program(text: str) -> tuple[Program, int]:
    r"""Read a program, one operation a line; nothing is evaluated.

    Arguments are literals, named or in order. Blank lines and the fences of a code block are passed over.

    Args:
        text: whatever was written.

    Returns:
        The operations that could be read, and how many lines could not.

    Example:
        >>> parse_program('remove_lines(line_start=0, line_end=2)\nimport os')
        ((RemoveLines(start=0, end=2),), 1)
    """
    found: list[Op] = []
    errors = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python's parser, about escapes such as "\d"
        for line in text.split("\n"):
            line = line.strip()
            if line and not _FENCE.fullmatch(line):
                op = _read(line)
                if op is None:
                    errors += 1
                else:
                    found.append(op)
    return tuple(found), errors


def _read(line: str) -> Op | None:
    if len(line) > MAX_LINE or line.partition("(")[0].strip() not in _NAMES:
        return None
    if line.startswith("remove_lines"):
        line = re.sub(r"\b0+(?=\d)", "", line)  # as the numbers stand before the lines: 003
    try:
        call = ast.parse(line, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in _NAMES):
        return None
    make, names, kind, needed = _NAMES[call.func.id]
    given: dict[int, str | int] = {}
    for place, node in [*enumerate(call.args), *((_place(names, word.arg), word.value) for word in call.keywords)]:
        if place in given or not (0 <= place < len(names)):
            return None
        value = node.value if isinstance(node, ast.Constant) else None
        if not isinstance(value, str | int) or type(value) is not kind:  # a bool is an int to isinstance
            return None
        given[place] = value
    if len(given) < needed or (given and 0 not in given):
        return None
    return make(*(given[place] for place in sorted(given)))


def _place(names: tuple[tuple[str, ...], ...], name: str | None) -> int:
    return next((place for place, known in enumerate(names) if name in known), -1)


def render_program(program: Program) -> str:
    """The program as text that ``parse_program`` reads back."""
    return "\n".join(map(_render, program))


def _render(op: Op) -> str:
    match op:
        case DropDoc():
            return "drop_doc()"
        case KeepDoc():
            return "keep_doc()"
        case KeepChunk():
            return "keep_chunk()"
        case RemoveLines(start, end):
            return f"remove_lines(line_start={start}, line_end={end})"
        case Normalize(source, target):
            return f"normalize(source_str={_quoted(source)}, target_str={_quoted(target)})"


def _quoted(text: str) -> str:
    """In double quotes, as a literal of Python: JSON's escapes are, and lone surrogates must be escaped."""
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", json.dumps(text, ensure_ascii=False))


# -- running


def unix_lines(text: str) -> str:
    """The text with Windows line ends made into newlines, if it has no others: what lines are numbered in."""
    return text.replace("\r\n", "\n") if _is_windows(text) else text


def _is_windows(text: str) -> bool:
    return "\r\n" in text and text.count("\r\n") == text.count("\n")


def run_program(text: str, program: Program, limits: Limits = Limits(), errors: int = 0) -> Result:  # noqa: B008  # frozen
    """Run a program on a whole document.

    Line numbers are those of ``text``: lines are removed first, then replacements are made, one after another, in the
    lines that stay, so that none shifts a number. A range that passes the end is cut there and one beyond it ignored;
    both are errors, as are a range that ends before it begins and a replacement of nothing or of a space. Windows line
    ends are kept.

    Args:
        text: the document; a blank one is dropped.
        program: from ``parse_program``.
        limits: see ``Limits``.
        errors: lines of the program that could not be read.
    """
    ops: dict[type, list[Any]] = {}  # Any: operations of that type
    for op in program:
        ops.setdefault(type(op), []).append(op)
    if DropDoc in ops or not text or text.isspace():
        return Result("", "dropped", errors=errors)
    if list(ops) == [KeepDoc]:
        return Result(text, "kept", errors=errors)
    windows = _is_windows(text)
    before = text.replace("\r\n", "\n") if windows else text
    after, removed, wrong = _without_lines(before, ops.get(RemoveLines, []))
    errors += wrong
    replaced = 0
    for op in ops.get(Normalize, []):
        if op.source in ("", " "):
            errors += 1
        elif count := after.count(op.source):
            size = len(after) + count * (len(op.target) - len(op.source))
            longer = len(op.target) > limits.max_longer * len(op.source)
            if longer or size > limits.max_growth * len(before):
                return Result(text, "rejected", errors=errors)
            after, replaced = after.replace(op.source, op.target), replaced + count
    trusted = errors < limits.max_errors
    if (trusted and _mostly_gone(before, after, limits.drop_ratio)) or _is_short(after, limits.min_keep_words):
        return Result("", "dropped", removed, replaced, errors)
    if not trusted:
        return Result(text, "rejected", errors=errors)
    if after == before:
        return Result(text, "kept", errors=errors)
    return Result(after.replace("\n", "\r\n") if windows else after, "refined", removed, replaced, errors)


def _without_lines(text: str, ops: Sequence[RemoveLines]) -> tuple[str, int, int]:
    """The text without these lines, how many those were, and how many operations were wrong."""
    if not ops:
        return text, 0, 0
    lines = text.split("\n")
    spans, errors = _spans(ops, len(lines))
    kept: list[str] = []
    place = 0
    for start, end in spans:
        kept += lines[place:start]
        place = max(place, end)
    kept += lines[place:]
    return "\n".join(kept), len(lines) - len(kept), errors


def _spans(ops: Sequence[RemoveLines], count: int) -> tuple[list[tuple[int, int]], int]:
    """Where lines go, sorted, the ends not included; and how many operations were wrong."""
    spans, errors = [], 0
    for op in ops:
        start, end = op.start, op.end
        if not 0 <= start <= end or start >= count:
            errors += 1
        elif end >= count:
            errors += 1
            spans.append((start, count))
        else:
            spans.append((start, end + 1))
    spans.sort()
    return spans, errors


def removed_lines(program: Program, count: int) -> NDArray[np.bool_]:
    """Which of ``count`` lines a program removes, ``(count,)``; all of them where it drops the document."""
    gone = np.zeros(count, dtype=np.bool_)
    if any(isinstance(op, DropDoc) for op in program):
        return ~gone
    for start, end in _spans([op for op in program if isinstance(op, RemoveLines)], count)[0]:
        gone[start:end] = True
    return gone


def _mostly_gone(before: str, after: str, ratio: float) -> bool:
    """Whether the words left are at most ``1 - ratio`` of those before."""
    # Two characters make a word at least, so a few words of what is left settle most texts without counting all.
    most = (1 - ratio) * ((len(before) + 1) // 2)
    if len(after.split(None, int(most) + 1)) > most:
        return False
    return len(after.split()) <= (1 - ratio) * len(before.split())


def _is_short(text: str, words: int) -> bool:
    return len(text.split(None, words)) <= words


# -- what a model is shown


def number_lines(text: str, first: int = 0, digits: int = 3) -> str:
    """Every line with its number before it, ``[000]``, ``[001]``, ...; numbers grow where digits do not suffice.

    Args:
        text: lines, separated by newlines.
        first: number of the first.
        digits: of a number, at least.
    """
    return "\n".join(f"[{number:0{digits}d}]{line}" for number, line in enumerate(text.split("\n"), first))


@dataclass(frozen=True)
class Chunk:
    """Whole lines of a document.

    Attributes:
        text: the lines, without numbers.
        first, last: their numbers in the document.
    """

    text: str
    first: int
    last: int


def chunk_lines(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int = 1500) -> list[Chunk]:
    """Cut a document into chunks of whole lines, as few as the limit allows; joined by newlines they are the document.

    Args:
        text: the document.
        tokenizer: counts the tokens of each numbered line.
        max_tokens: of a chunk; a line that is longer is a chunk by itself.

    Raises:
        ValueError: ``max_tokens`` is not positive.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be positive; got {max_tokens}.")
    lines = text.split("\n")
    counts = [len(ids) for ids in tokenizer(number_lines(text).split("\n"), add_special_tokens=False)["input_ids"]]
    chunks: list[Chunk] = []
    first = size = 0
    for place, count in enumerate(counts):
        if place > first and size + count > max_tokens:
            chunks.append(Chunk("\n".join(lines[first:place]), first, place - 1))
            first, size = place, 0
        size += count
    return [*chunks, Chunk("\n".join(lines[first:]), first, len(lines) - 1)]
