"""Structured answers."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from headwater.modalities.text.generate import (
    BudgetExceeded,
    Flow,
    Generator,
    Message,
    Reply,
    Request,
    ScriptedGenerator,
)
from headwater.modalities.text.generate_json import Parsed, extract_json, generate_json
from headwater.modalities.text.generate_store import Budgeted, Cached


class Entities(BaseModel):
    """What is asked for."""

    summary: str
    entities: list[str] = Field(min_length=2)


def ask(text: str = "?", **fields: object) -> Request:
    """A request of one turn."""
    return Request((Message("user", text),), **fields)  # type: ignore[arg-type]


def turns(*answers: str) -> ScriptedGenerator:
    """Gives the n-th answer when it is asked for the n-th time; keeps the conversations it saw."""

    def handler(messages: Sequence[Message], rng: random.Random) -> str:
        seen.append(tuple(messages))
        return answers[sum(message.role == "assistant" for message in messages)]

    scripted, seen = ScriptedGenerator({"": handler}), []
    scripted.seen = seen  # type: ignore[attr-defined]
    return scripted


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1}', '{"a": 1}'),
        ('Sure!\n```json\n{"a": [1, {"b": 2}]}\n```\nAnything else?', '{"a": [1, {"b": 2}]}'),
        ('{"a": "} ] \\" {"} trailing }', '{"a": "} ] \\" {"}'),
        ("first [1, 2] then [3]", "[1, 2]"),
        ('{no} {"a": null}', '{"a": null}'),
        ("the set {1, 2} and {\n} ", "{\n}"),
        ("{" * 50 + '"a": 1' + "}", '{"a": 1}'),
        ("[" * 3 + "]" * 2, "[[]]"),
        ('{"a": NaN} [2]', "[2]"),
        ('{"ä": "☃"}', '{"ä": "☃"}'),
    ],
)
def test_equation_the_first_whole_value_is_found(text: str, found: str) -> None:
    assert extract_json(text) == found


@pytest.mark.parametrize("text", ["", "no", '{"a": 1', "{'a': 1}", "42", '"text"', "[" * 100_000, '{"a":' * 5000])
def test_rejects_text_without_a_whole_value(text: str) -> None:
    with pytest.raises(ValueError, match="no whole JSON object or array"):
        extract_json(text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(
    value=st.lists(VALUES, max_size=4) | st.dictionaries(st.text(), VALUES, max_size=4),
    before=st.text(st.characters(exclude_characters="{[")),
    after=st.text(),
    ascii_only=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_property_any_value_is_found_in_any_prose(value: object, before: str, after: str, ascii_only: bool) -> None:
    written = json.dumps(value, ensure_ascii=ascii_only)
    assert extract_json(before + written + after) == written


def test_equation_a_good_answer_is_asked_for_once() -> None:
    scripted = turns('Here: {"summary": "s", "entities": ["a", "b"]}')
    (answer,) = generate_json(scripted, [ask()], Entities)
    assert answer.value == Entities(summary="s", entities=["a", "b"])
    assert (answer.asked, answer.error) == (1, None)


def test_equation_a_bad_answer_is_asked_for_again_with_the_reason() -> None:
    scripted = turns('{"summary": 3, "entities": ["a"]}', "sorry", '{"summary": "s", "entities": ["a", "b"]}')
    (answer,) = generate_json(scripted, [ask("names?")], Entities)
    assert (answer.value, answer.asked) == (Entities(summary="s", entities=["a", "b"]), 3)
    first, second, third = scripted.seen  # type: ignore[attr-defined]
    assert first == (Message("user", "names?"),)
    assert second[:2] == (*first, Message("assistant", '{"summary": 3, "entities": ["a"]}'))
    assert "summary: Input should be a valid string; entities: List should have at least 2 items" in second[2].content
    assert '"minItems": 2' in second[2].content
    assert third[:4] == (*second, Message("assistant", "sorry"))
    assert "no whole JSON object or array" in third[4].content


@pytest.mark.parametrize("repair", [0, 1, 2])
def test_property_it_gives_up_after_the_repairs_and_counts(repair: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    scripted = turns(*["never"] * 3)
    answers = list(generate_json(scripted, [ask("a"), ask("b")], Entities, repair=repair))
    assert [(answer.value, answer.asked) for answer in answers] == [(None, repair + 1)] * 2
    assert all("no whole JSON" in (answer.error or "") for answer in answers)
    assert len(scripted.seen) == 2 * (repair + 1)  # type: ignore[attr-defined]
    assert "2 of 2 answers were dropped" in caplog.text


def test_property_plain_types_are_kinds_too() -> None:
    answers = generate_json(turns('{"a": [1]} '), [ask()], dict[str, list[int]])
    assert [answer.value for answer in answers] == [{"a": [1]}]


class Flaky(Generator):
    """Answers a question wrongly as often as its text says, a few at a time and out of order; ``error`` fails."""

    id = "flaky"

    def __init__(self, seed: int = 0) -> None:
        self.rng, self.window, self.schemas = random.Random(seed), 10, set[str]()

    def flow(self, requests: Iterator[Request | None]) -> Flow:
        """See the class."""
        under_way: list[tuple[int, Request]] = []
        begun, more = 0, True
        while more or under_way:
            while more and len(under_way) < 4:
                request = next(requests, "end")
                more = request != "end"
                if not isinstance(request, Request):
                    break
                under_way.append((begun, request))
                begun += 1
            if under_way:
                position, request = under_way.pop(self.rng.randrange(len(under_way)))
                yield position, self.reply(request)
            elif more:
                yield None

    def reply(self, request: Request) -> Reply:
        """A list of the question's number once it was asked often enough."""
        self.schemas.add(json.dumps(request.schema))
        number, wrong = request.messages[0].content.split()
        asked = sum(message.role == "assistant" for message in request.messages)
        if wrong == "error":
            return Reply("", "error", 0, 0, None, False, "m", "gone")
        text = f"[{number}]" if asked >= int(wrong) else "what?"
        return Reply(text, "stop", 1, 1, None, False, "m")


@given(st.lists(st.sampled_from(["0", "1", "2", "3", "error"]), max_size=60), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_property_answers_come_in_order_with_gaps_where_they_were_dropped(wrong: list[str], seed: int) -> None:
    flaky = Flaky(seed)
    requests = [ask(f"{number} {times}") for number, times in enumerate(wrong)]
    answers = list(generate_json(flaky, iter(requests), list[int]))
    expected = [None if times in {"3", "error"} else [number] for number, times in enumerate(wrong)]
    assert [answer.value for answer in answers] == expected
    assert [answer.asked for answer in answers] == [1 if t == "error" else min(3, int(t) + 1) for t in wrong]
    assert flaky.schemas <= {'{"items": {"type": "integer"}, "type": "array"}'}


def test_property_questions_are_read_a_window_ahead() -> None:
    read = 0

    def questions() -> Iterator[Request]:
        nonlocal read
        for number in range(100_000):
            read += 1
            yield ask(f"{number} {number % 3}")

    answers: list[Parsed[list[int]]] = list(islice(generate_json(Flaky(), questions(), list[int]), 300))
    assert [answer.value for answer in answers] == [[number] for number in range(300)]
    assert read <= 300 + 2 * Flaky().window


def test_property_repairs_are_cached_and_counted(tmp_path: Path) -> None:
    requests = [ask(f"{number} {number % 3}") for number in range(9)]
    with Cached(Budgeted(Flaky(), max_requests=12), tmp_path / "c.sqlite") as generator:
        answers: list[Parsed[list[int]]] = []
        with pytest.raises(BudgetExceeded, match="spent 12"):
            answers.extend(generate_json(generator, requests, list[int]))
        assert len(generator.store) == 12
    with Cached(Budgeted(Flaky(), max_requests=6), tmp_path / "c.sqlite") as generator:
        again = list(generate_json(generator, requests, list[int]))
        assert (generator.usage.requests, generator.usage.cached) == (18, 12)
    assert [answer.value for answer in again] == [[number] for number in range(9)]


def test_rejects_a_negative_number_of_repairs_at_once() -> None:
    with pytest.raises(ValueError, match="repair must be >= 0; got -1"):
        generate_json(turns(), [], Entities, repair=-1)


def test_degenerate_no_requests() -> None:
    assert list(generate_json(turns(), [], Entities)) == []
