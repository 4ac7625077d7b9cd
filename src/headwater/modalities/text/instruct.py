"""Questions with answers: documents of which only the answer is learned, and what a written answer is worth.

    document   prompt join answer        loss on the answer and EOS
    exact      share of answers that are the right one, surrounding space aside
    ROUGE-L    F1 of the longest common subsequence of words, the best over several right answers

Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", ACL 2004, section 3.1, with equal weight on
    precision and recall. Words are runs of ``a-z0-9`` of the lower-cased text, without stemming.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from headwater.modalities.text.docs import Document
from headwater.modalities.text.examples import Example, example_pieces, start_token_id
from headwater.modalities.text.prepared import tokenizer_fingerprint

__all__ = ["AnswerFormatter", "answered", "exact_match", "rouge_l"]

_WORD = re.compile(r"[a-z0-9]+")


def answered(identity: str, prompt: str, answer: str, *, join: str = " ", **meta: Any) -> Document:
    """A document of a prompt and its answer, of which ``AnswerFormatter`` takes the answer for what is learned.

    Args:
        identity: the document's id.
        prompt: what the model is given.
        answer: what it shall write.
        join: stands between the two, and belongs to the answer.
        meta: JSON values to keep with the document.
    """
    return Document(identity, f"{prompt}{join}{answer}", {**meta, "prompt": prompt})


class AnswerFormatter:
    """A document whose ``meta["prompt"]`` is read and not learned; one without is learned whole.

    Prompt and answer are tokenised apart, as they are when the model is asked.

    Args:
        tokenizer: the model's.

    Raises:
        ValueError: the tokenizer has no EOS; when called, a document that does not begin with its prompt, or a prompt
            that leaves no room for an answer.
    """

    reads: tuple[str, ...] = ("prompt",)

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.start = tokenizer, start_token_id(tokenizer)
        self.eos_token_id: int = tokenizer.eos_token_id

    @property
    def about(self) -> Mapping[str, Any]:  # Any: JSON data
        """The tokenizer."""
        return {"format": "answer", "tokenizer": tokenizer_fingerprint(self.tokenizer), "start": self.start}

    def __call__(self, documents: Sequence[Document], room: int | None = None) -> list[list[Example]]:
        """Format documents; see ``Formatter``."""
        prompts = [str(document.meta.get("prompt", "")) for document in documents]
        for document, prompt in zip(documents, prompts, strict=True):
            if not document.text.startswith(prompt):
                raise ValueError(f"document {document.id!r} does not begin with its prompt, {prompt[:60]!r}.")
        bodies = [document.text[len(prompt) :] for document, prompt in zip(documents, prompts, strict=True)]
        sides = zip(self._ids(prompts), self._ids(bodies), strict=True)
        return [
            example_pieces(
                Example(np.array(head, dtype=np.int32), np.zeros(len(head), np.bool_)),
                body,
                room=room,
                start=self.start,
                eos=self.eos_token_id,
            )
            for head, body in sides
        ]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return found


def exact_match(answer: str, references: str | Sequence[str]) -> float:
    """1.0 where the answer is one of the references, surrounding space aside, else 0.0."""
    right = [references] if isinstance(references, str) else references
    return float(answer.strip() in {reference.strip() for reference in right})


def rouge_l(answer: str, references: str | Sequence[str]) -> float:
    """ROUGE-L of an answer, in [0, 1]: the best over the references; 0 where there is no word.

    Example:
        >>> round(rouge_l("the cat sat", ["the cat sat", "a dog"]), 3)
        1.0
        >>> round(rouge_l("the black cat", "the cat"), 3)
        0.8
    """
    right = [references] if isinstance(references, str) else references
    words = _WORD.findall(answer.lower())
    return max((_f1(words, _WORD.findall(reference.lower())) for reference in right), default=0.0)


def _f1(written: list[str], right: list[str]) -> float:
    shared = _longest_common_subsequence(written, right)
    return 2 * shared / (len(written) + len(right)) if shared else 0.0


def _longest_common_subsequence(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for place, other in enumerate(b, start=1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]
