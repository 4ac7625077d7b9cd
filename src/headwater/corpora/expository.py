"""What makes a text read like a textbook, in figures that can be looked at; needs the extra ``curate``.

The score that decides is a classifier's (``train_quality``: texts that you call expository against the rest). Beside
it each document gets figures that say why it may have got it.
"""

from __future__ import annotations

import re
from typing import Any

try:
    from datatrove.data import DocumentsPipeline
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise ImportError("curation stands on datatrove: pip install 'headwater[curate]'.") from error

__all__ = ["Describe", "expository_features"]

_WORD = re.compile(r"\w+")
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")
_DEFINITION = re.compile(
    r"\b(?:(?:is|are) (?:a|an|the)|means|refers? to|(?:is|are) (?:called|known as|defined as)|denotes?|defines?)\b",
    re.I,
)
_LIST = re.compile(r"(?:[-*+•]|\d+[.)]|\|)\s|.*\S(?:\t|  +)\S")
_CODE = re.compile(r">>>|\.\.\. |(?:def|class|import|from|return|for|if|while)\b.*[:=(]|.*[{};]$|\w[\w.]*\s*=[^=]|@\w")
_SECOND = frozenset({"you", "your", "yours", "yourself", "yourselves"})
_VERSION = 1


def expository_features(text: str) -> dict[str, float]:
    """Figures of a text's form; 0 where there is nothing to count.

    Args:
        text: any.

    Returns:
        ``sentence_rate``: sentence ends for each hundred words; ``sentence_words``: mean words of a sentence;
        ``definition_rate``: phrases that define, for each sentence; ``list_share``: of lines that are items of a list
        or rows of a table; ``code_share``: of lines that look like code; ``second_person_share``: of words. A line is
        counted as one kind at most, code first.

    Example:
        >>> found = expository_features("A graph is a set of nodes. You add edges.")
        >>> found["sentence_words"], found["definition_rate"], found["second_person_share"]
        (5.0, 0.5, 0.1)
    """
    words = [word.lower() for word in _WORD.findall(text)]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    sentences = max(1, len(_SENTENCE_END.findall(text)))
    code = [bool(_CODE.match(line)) for line in lines]
    listed = sum(bool(_LIST.match(line)) for line, is_code in zip(lines, code, strict=True) if not is_code)
    return {
        "sentence_rate": 100 * len(_SENTENCE_END.findall(text)) / max(1, len(words)),
        "sentence_words": len(words) / sentences,
        "definition_rate": len(_DEFINITION.findall(text)) / sentences,
        "list_share": listed / max(1, len(lines)),
        "code_share": sum(code) / max(1, len(lines)),
        "second_person_share": sum(word in _SECOND for word in words) / max(1, len(words)),
    }


class Describe(PipelineStep):  # type: ignore[misc]  # datatrove has no annotations
    """Write ``expository_features`` to each document's metadata."""

    type = "headwater"
    name = "describe"

    @property
    def about(self) -> dict[str, Any]:  # Any: JSON data
        """What decides the figures."""
        return {"features": _VERSION}

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Describe documents, in order."""
        for document in data:
            with self.track_time():
                document.metadata.update(expository_features(document.text))
            yield document
