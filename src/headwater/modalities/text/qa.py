"""Any task as a question with a written answer, so that one reader can be trained on many.

    question: <question> options: (A) <option> (B) <option> context: <context> answer:

Options and context are left out where there are none. Of options the answer is the letter.

Source: the idea: Khashabi et al., "UnifiedQA: Crossing Format Boundaries With a Single QA System", arXiv:2005.00700;
the words: Mueller et al., arXiv:2307.00119.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from headwater.modalities.models import ModelError

__all__ = ["LETTERS", "QAFormat"]

LETTERS = string.ascii_uppercase
"""The letters of options."""


@dataclass(frozen=True)
class QAFormat:
    """The words between the parts of a question.

    Attributes:
        question, options, context, answer: what stands before each part.

    Example:
        >>> form = QAFormat()
        >>> form.source("Which is a graph?", ["a tree", "a matrix"])
        'question: Which is a graph? options: (A) a tree (B) a matrix answer:'
        >>> form.target(["a tree", "a matrix"], "a tree")
        'A'
    """

    question: str = "question:"
    options: str = "options:"
    context: str = "context:"
    answer: str = "answer:"

    def source(self, question: str, options: Sequence[str] = (), context: str = "") -> str:
        """What the reader is asked.

        Raises:
            ValueError: no question, a blank option, one option alone, or more options than letters.
        """
        if not question.strip():
            raise ValueError("a question must not be blank.")
        if len(options) == 1 or len(options) > len(LETTERS) or not all(option.strip() for option in options):
            raise ValueError(
                f"options are two to {len(LETTERS)} texts, none of them blank, or none at all; got {list(options)}."
            )
        parts = [self.question, question.strip()]
        if options:
            lettered = (f"({letter}) {option.strip()}" for letter, option in zip(LETTERS, options, strict=False))
            parts += [self.options, *lettered]
        if context.strip():
            parts += [self.context, context.strip()]
        return " ".join([*parts, self.answer])

    def target(self, options: Sequence[str], answer: str) -> str:
        """The letter of the right option, or the answer where there are no options.

        Raises:
            ValueError: ``answer`` is not one of the options.
        """
        if not options:
            return answer
        if answer not in options:
            raise ValueError(f"the answer {answer!r} is not one of the options {list(options)}.")
        return LETTERS[list(options).index(answer)]

    def check_letters(self, tokenizer: PreTrainedTokenizerBase, options: int, join: str = " ") -> None:
        """Refuse a tokenizer that does not tell the letters of so many options apart, each by one token of its own.

        Args:
            tokenizer: the reader's.
            options: how many letters are wanted.
            join: what stands before an answer; empty for an encoder-decoder.

        Raises:
            ModelError: a letter is unknown to the tokenizer, or more than one token.
        """
        for letter in LETTERS[:options]:
            ids = tokenizer(join + letter, add_special_tokens=False)["input_ids"]
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                raise ModelError(
                    f"the tokenizer has no token for the option {letter!r} (it gives {ids}); let answers be texts."
                )
