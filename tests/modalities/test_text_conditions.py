"""Conditions over metadata: read by a parser, never run."""

from __future__ import annotations

import pytest

from headwater.modalities.text.conditions import condition

META = {"quality": 0.7, "year": 2010, "genre": "news", "doctest": True}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("quality > 0.5", True),
        ("0.6 < quality <= 0.7", True),
        ("quality > 0.5 and year >= 2011", False),
        ("quality > 0.9 or genre == 'news'", True),
        ("not doctest", False),
        ("genre in ['fiction', 'news']", True),
        ("genre not in ('fiction', 'lore')", True),
        ("quality > -1", True),
        ("doctest", True),
    ],
)
def test_oracle_conditions_say_what_python_says(text: str, expected: bool) -> None:
    assert bool(condition(text)(META)) is expected is bool(eval(text, {}, dict(META)))


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "quality.real > 0",
        "[x for x in genre]",
        "quality + 1 > 1",
        "lambda: 1",
        "f'{year}'",
    ],
)
def test_rejects_what_is_no_condition(text: str) -> None:
    with pytest.raises(ValueError, match="it may hold names, numbers"):
        condition(text)


def test_rejects_names_and_values_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="cannot read the condition 'quality >'"):
        condition("quality >")
    with pytest.raises(ValueError, match=r"names 'score'; a document has \['doctest', 'genre', 'quality', 'year'\]"):
        condition("score > 1")(META)
    with pytest.raises(ValueError, match="compares \\['news', 3\\]"):
        condition("genre > 3")(META)
