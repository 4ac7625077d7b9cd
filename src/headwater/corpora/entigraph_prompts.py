"""What a generator is told: to list a document's entities, to write about some of them, to retell the document.

The document comes before the entities, and both kinds of relation have one system message, so that a server with a
cache of prompts reads a document once for all its relations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from pydantic import Field, field_validator

from headwater.corpora.wording import Wording
from headwater.modalities.text.docs import Document
from headwater.modalities.text.generate import Message

__all__ = ["Prompts", "split_document"]

_EXTRACT = """\
You read a document and list what it is about: its people, places, organisations, objects, works and events, and the
ideas that its argument rests on. Leave nothing out that one could ask a question about. Give every name once and as
the document spells it, the most important ones first.
Answer with one JSON object and nothing else:
{"summary": "what the document says, in a paragraph", "entities": ["a name", "another name"]}"""

_RELATE = """\
You are given a document and the names of two or three things that occur in it. Write about the document through them:
1. For each of them in turn, retell what the document says with that one at the centre.
2. Then explain how they bear on each other in this document, and what follows from that.
Say nothing that the document does not support. Call everything by its full name, say the document's title where it has
one, and write for a reader who has never seen the document."""

_RETELL = (
    "You are given a document. Write it anew, in other words and with everything it says. {} Do not comment on it."
)


class Prompts(Wording):
    """System messages, and how a document is shown. ``Prompts.read`` takes another wording from a TOML file."""

    extract: str = Field(default=_EXTRACT, description="system message that asks for JSON with summary and entities")
    relate: str = Field(default=_RELATE, description="system message that asks for a text about two or three entities")
    easy: str = Field(
        default=_RETELL.format("Use short sentences and words that a child knows."), description="to retell simply"
    )
    medium: str = Field(
        default=_RETELL.format("Use the clear prose of an encyclopedia."), description="to retell in plain prose"
    )
    hard: str = Field(
        default=_RETELL.format("Use dense sentences and the terms of a scholar."), description="to retell for a scholar"
    )
    show: str = Field(default="Document:\n{document}", description="the document alone; holds {document} once")
    show_entities: str = Field(
        default="Document:\n{document}\n\nNames:\n{entities}",
        description="the document and the entities; holds {document} and then {entities} once",
    )

    @field_validator("show", "show_entities")
    @classmethod
    def _has_its_places(cls, value: str) -> str:
        if value.count("{document}") != 1:
            raise ValueError(f"must hold {{document}} once; got {value!r}")
        return value

    @field_validator("show_entities")
    @classmethod
    def _names_come_last(cls, value: str) -> str:
        if value.count("{entities}") != 1 or value.index("{entities}") < value.index("{document}"):
            raise ValueError(f"must hold {{entities}} once, after {{document}}; got {value!r}")
        return value

    def messages(self, task: str, document: Document, entities: Sequence[str] = ()) -> tuple[Message, ...]:
        """A question about a document.

        Args:
            task: ``extract``, ``relate``, ``easy``, ``medium`` or ``hard``: the system message.
            document: its ``meta["title"]``, where it has one, stands above its text.
            entities: for ``relate``.
        """
        title = str(document.meta.get("title") or "")
        shown = f"{title}\n\n{document.text}" if title else document.text
        before, after = (self.show_entities if entities else self.show).split("{document}")
        after = after.replace("{entities}", "\n".join(f"- {name}" for name in entities))
        return Message("system", getattr(self, task)), Message("user", before + shown + after)


_BOUNDARIES = tuple(map(re.compile, (r"\n\s*\n", r"(?<=[.!?])\s+", r"\s+")))


def split_document(document: Document, room: int, count: Callable[[str], int]) -> list[Document]:
    """A document in pieces of at most ``room`` tokens, halved until they fit, between paragraphs where it can be.

    Args:
        document: pieces have its id and meta.
        room: >= 1.
        count: tokens of a text.

    Returns:
        At least one piece. Joined they are the document, but for white space at the borders.

    Raises:
        ValueError: ``room`` is not positive.
    """
    if room < 1:
        raise ValueError(f"room must be >= 1; got {room}.")
    return [Document(document.id, text, document.meta) for text in _halved(document.text, room, count)]


def _halved(text: str, room: int, count: Callable[[str], int]) -> list[str]:
    text = text.strip()
    if len(text) < 2 or count(text) <= room:
        return [text]
    middle = len(text) / 2
    for boundary in _BOUNDARIES:
        if places := [match.end() for match in boundary.finditer(text)]:
            place = min(places, key=lambda at: abs(at - middle))
            break
    else:
        place = len(text) // 2
    return _halved(text[:place], room, count) + _halved(text[place:], room, count)
