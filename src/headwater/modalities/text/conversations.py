"""Conversations: what a model is asked, in tokens, and documents of which only the assistant's turns are learned.

    with a chat template   one example in the template's own words; each answer is learned up to its end token
    without one            lines ``role: content``; an example for each answer, all turns before it unlearned

Both are how ``HFGenerator`` asks, so a model that learned from them is asked in the words it knows. The last token of
an example is EOS, and it is learned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.examples import NOTHING, Example, example_pieces, start_token_id
from headwater.modalities.text.generate import Message
from headwater.modalities.text.prepared import tokenizer_fingerprint

__all__ = ["ConversationFormatter", "conversation", "conversation_lines", "messages_of", "prompt_ids"]


def conversation(identity: str, messages: Sequence[Message], **meta: Any) -> Document:
    """A document of a conversation, in the form of rows that TRL reads: a column ``messages``.

    Args:
        identity: the document's id.
        messages: the turns.
        meta: JSON values to keep with the document.
    """
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return Document(identity, conversation_lines(messages).rstrip("\n"), {**meta, "messages": turns})


def conversation_lines(messages: Sequence[Message]) -> str:
    """Turns as lines ``role: content``, each closed."""
    return "".join(f"{message.role}: {message.content}\n" for message in messages)


def messages_of(document: Document) -> tuple[Message, ...]:
    """The turns of a document; none where it is no conversation.

    Raises:
        CorpusError: ``messages`` holds anything but turns of a system, a user and an assistant.
    """
    rows = document.meta.get("messages") or ()
    turns = tuple(_turn(row) for row in rows) if isinstance(rows, (list, tuple)) else (None,)
    found = tuple(turn for turn in turns if turn is not None)
    if len(found) < len(turns):
        raise CorpusError(
            f"document {document.id!r}: messages must be a list of objects with a role (system, user or assistant) "
            f"and a content; got {str(rows)[:80]}."
        )
    return found


def _turn(row: object) -> Message | None:
    if not isinstance(row, Mapping) or not isinstance(row.get("content"), str):
        return None
    role = row.get("role")
    return Message(role, row["content"]) if role in ("system", "user", "assistant") else None


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Tokens of a conversation up to where the assistant begins to answer."""
    encoded: Any  # Any: transformers declares a union of all that it may return
    if tokenizer.chat_template:
        encoded = tokenizer.apply_chat_template(_rows(messages), add_generation_prompt=True, return_dict=True)
    else:
        encoded = tokenizer(conversation_lines(messages) + "assistant:")
    ids: list[int] = encoded["input_ids"]
    return ids


def _rows(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


class ConversationFormatter:
    """A document with ``meta["messages"]``: its assistant's turns are learned; one without is learned whole.

    Args:
        tokenizer: the model's.

    Raises:
        ValueError: the tokenizer has no EOS; when called, a conversation in which nobody answers, one that is longer
            than ``room``, or a chat template that writes a turn differently once another follows.
    """

    reads: tuple[str, ...] = ("messages",)

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.start = tokenizer, start_token_id(tokenizer)
        self.eos_token_id: int = tokenizer.eos_token_id

    @property
    def about(self) -> Mapping[str, Any]:  # Any: JSON data
        """The tokenizer and its chat template."""
        template = hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()
        return {"format": "conversation", "tokenizer": tokenizer_fingerprint(self.tokenizer), "template": template}

    def __call__(self, documents: Sequence[Document], room: int | None = None) -> list[list[Example]]:
        """Format documents; see ``Formatter``."""
        return [self._examples(document, room) for document in documents]

    def longest(self, document: Document) -> int:
        """Tokens of a conversation's longest example; 0 for another document, which is cut where it must be."""
        messages = messages_of(document)
        return max(len(example.input_ids) for example in self._turns(document.id, messages)) if messages else 0

    def _examples(self, document: Document, room: int | None) -> list[Example]:
        messages = messages_of(document)
        if not messages:
            ids = self._ids(document.text)
            return example_pieces(NOTHING, ids, room=room, start=self.start, eos=self.eos_token_id)
        examples = self._turns(document.id, messages)
        longest = max(len(example.input_ids) for example in examples)
        if room is not None and longest > room:
            raise ValueError(
                f"conversation {document.id!r} has {longest} tokens for {room}; leave it out or give longer rows."
            )
        return examples

    def _turns(self, identity: str, messages: Sequence[Message]) -> list[Example]:
        places = [place for place, message in enumerate(messages) if message.role == "assistant"]
        if not places:
            raise ValueError(f"conversation {identity!r} has no turn of the assistant, so nothing to learn.")
        if self.tokenizer.chat_template:
            return [self._templated(identity, messages, places)]
        found = []
        for place in places:
            head = prompt_ids(self.tokenizer, messages[:place])
            body = [*self._ids(f" {messages[place].content}"), self.eos_token_id]
            found.append(_example([(head, False), (body, True)]))
        return found

    def _templated(self, identity: str, messages: Sequence[Message], places: Sequence[int]) -> Example:
        parts: list[tuple[list[int], bool]] = []
        rest: list[int] = []  # what the template writes between the end token and the next turn
        done = ""
        for place in places:
            asked, said = self._render(messages[:place], True), self._render(messages[: place + 1], False)
            if not asked.startswith(done) or not said.startswith(asked):
                raise ValueError(
                    f"the chat template writes turn {place} of conversation {identity!r} differently when it is asked "
                    "for and when it was said; split the conversation into one per answer, or mend the template."
                )
            answer = self._ids(said[len(asked) :])
            ends = [at for at, token in enumerate(answer, start=1) if token == self.eos_token_id]
            end = ends[-1] if ends else len(answer)
            parts += [([*rest, *self._ids(asked[len(done) :])], False), (answer[:end], True)]
            rest, done = answer[end:], said
        if parts[-1][0][-1:] != [self.eos_token_id]:
            parts.append(([self.eos_token_id], True))
        return _example(parts)

    def _render(self, messages: Sequence[Message], asked: bool) -> str:
        return str(self.tokenizer.apply_chat_template(_rows(messages), tokenize=False, add_generation_prompt=asked))

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found


def _example(parts: Sequence[tuple[list[int], bool]]) -> Example:
    ids = np.array([token for part, _ in parts for token in part], dtype=np.int32)
    return Example(ids, np.repeat([learned for _, learned in parts], [len(part) for part, _ in parts]))
