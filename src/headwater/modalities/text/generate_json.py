"""Structured answers of any generator: asked for, found in the text, validated, and asked for again a few times."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from headwater.modalities.text.generate import Generator, Message, Reply, Request

__all__ = ["Parsed", "extract_json", "generate_json"]

MOST_STARTS = 1000  # brackets at which a value is looked for
MOST_PROBLEMS = 5  # that a model is told about

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Parsed(Generic[T]):
    """An answer.

    Attributes:
        value: what it says; ``None`` where it was dropped.
        reply: the last one.
        asked: how often the question was asked, >= 1.
        error: why it was dropped.
    """

    value: T | None
    reply: Reply
    asked: int
    error: str | None = None


@dataclass
class _Open:
    """A question without an answer: its place in the order, what is asked next, and how often it was."""

    position: int
    request: Request
    asked: int = 0


def generate_json(
    generator: Generator, requests: Iterable[Request], kind: type[T], repair: int = 2
) -> Iterator[Parsed[T]]:
    """Answers that pydantic accepts as ``kind``, in the order of the requests.

    The prompt must say what is wanted; servers that can are also held to the JSON schema. An answer that does not fit
    is asked for again with the reason, then dropped: count those, or leave them out. A request that failed is dropped
    at once. Requests are read lazily, as in ``Generator.generate``.

    Args:
        generator: what writes.
        requests: the questions; their ``schema`` is set here.
        kind: a pydantic model, a dataclass, or any type of plain data, such as ``list[str]``.
        repair: how often one question is asked again.

    Raises:
        ValueError: ``repair`` is negative.
        BudgetExceeded: see ``Generator.generate``; so are the other errors.

    Example:
        >>> from headwater.modalities.text.generate import ScriptedGenerator
        >>> scripted = ScriptedGenerator({"": lambda messages, rng: "Sure: [1, 2]."})
        >>> [answer.value for answer in generate_json(scripted, [Request((Message("user", "?"),))], list[int])]
        [[1, 2]]
    """
    if repair < 0:
        raise ValueError(f"repair must be >= 0; got {repair}.")
    return _answers(generator, iter(requests), TypeAdapter(kind), repair)


def _answers(
    generator: Generator, requests: Iterator[Request], adapter: TypeAdapter[T], repair: int
) -> Iterator[Parsed[T]]:
    schema = adapter.json_schema()
    again: deque[_Open] = deque()
    under_way: dict[int, _Open] = {}
    ready: dict[int, Parsed[T]] = {}
    begun = given = dropped = sent = 0

    def feed() -> Iterator[Request | None]:
        nonlocal begun, sent
        while True:
            if again:
                question = again.popleft()
            elif (request := next(requests, None)) is not None:
                question = _Open(begun, replace(request, schema=schema))
                begun += 1
            elif under_way:
                yield None  # their answers may have to be asked for again
                continue
            else:
                return
            question.asked += 1
            under_way[sent] = question
            sent += 1
            yield question.request

    with closing(generator.flow(feed())) as flow:
        for finished in flow:
            if finished is None:
                continue
            question, reply = under_way.pop(finished[0]), finished[1]
            failed = reply.finish == "error"
            value: T | None
            value, error = (None, reply.error or "no reply") if failed else _parse(adapter, reply.text)
            if error is None or failed or question.asked > repair:
                ready[question.position] = Parsed(value, reply, question.asked, error)
            else:
                again.append(replace(question, request=_repaired(question.request, reply.text, error, schema)))
            while given in ready:
                answer = ready.pop(given)
                given += 1
                dropped += answer.error is not None
                yield answer
    if dropped:
        logger.warning("%d of %d answers were dropped: no usable JSON", dropped, given)


def _parse(adapter: TypeAdapter[T], text: str) -> tuple[T, None] | tuple[None, str]:
    """The value, or why there is none."""
    try:
        return adapter.validate_json(extract_json(text)), None
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'the value'}: {problem['msg']}"
            for problem in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        return None, "; ".join(problems[:MOST_PROBLEMS])
    except ValueError as error:
        return None, str(error)


def _repaired(request: Request, text: str, error: str, schema: dict[str, Any]) -> Request:  # Any: JSON data
    told = (
        f"That answer cannot be used: {error}\nAnswer again, with one JSON value that follows this JSON schema and "
        f"nothing else:\n{json.dumps(schema)}"
    )
    turns = (Message("assistant", text), Message("user", told))
    return replace(request, messages=request.messages + turns)


def extract_json(text: str) -> str:
    """The first object or array in a text that is whole, such as one inside a code block or after an introduction.

    Raises:
        ValueError: there is none.

    Example:
        >>> extract_json('Here {it} is: {"a": [1, 2]} and {"b": 3}')
        '{"a": [1, 2]}'
    """
    decoder = json.JSONDecoder(parse_constant=_refuse)
    starts = (place for place, character in enumerate(text) if character in "{[")
    for _, start in zip(range(MOST_STARTS), starts, strict=False):
        try:
            end = decoder.raw_decode(text, start)[1]
        except (ValueError, RecursionError):  # nested deeper than any answer is
            continue
        return text[start:end]
    raise ValueError("there is no whole JSON object or array in it")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
