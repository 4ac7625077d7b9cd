"""Questions in one form."""

from __future__ import annotations

import pytest

from headwater.modalities.models import ModelError
from headwater.modalities.text.qa import QAFormat
from headwater.modalities.text.tokenizers import train_bpe, word_tokenizer


def test_equation_parts_in_order_and_left_out_where_there_are_none() -> None:
    form = QAFormat()
    whole = form.source("Which?", ["one", "two"], "Some text.")
    assert whole == "question: Which? options: (A) one (B) two context: Some text. answer:"
    assert form.source("Why?") == "question: Why? answer:"
    assert form.target(["one", "two"], "two") == "B"
    assert form.target([], "because") == "because"


@pytest.mark.parametrize("options", [["one"], ["one", " "], [str(i) for i in range(27)]])
def test_rejects_options_that_are_none(options: list[str]) -> None:
    with pytest.raises(ValueError, match="options are two to 26 texts"):
        QAFormat().source("Which?", options)


def test_rejects_a_blank_question_and_an_answer_that_is_no_option() -> None:
    with pytest.raises(ValueError, match="must not be blank"):
        QAFormat().source(" ")
    with pytest.raises(ValueError, match="'three' is not one of the options"):
        QAFormat().target(["one", "two"], "three")


def test_rejects_a_tokenizer_without_the_letters() -> None:
    known = word_tokenizer(["A B answers"])
    QAFormat().check_letters(known, 2)
    with pytest.raises(ModelError, match="no token for the option 'C'"):
        QAFormat().check_letters(known, 3)
    with pytest.raises(ModelError, match="no token for the option 'A'"):
        QAFormat().check_letters(train_bpe(["text without that"], 260), 1)  # a space and a letter are two tokens
