"""Classification in words: a text in a template with one gap, and a language model that fills the gap with a label.

    logits_c(x) = language-model logit of the word v(c), at the gap of T(x)

A masked model reads the template with its mask token in the gap; a causal one reads up to the gap, which must come
last, and its next token is the answer.

White space before a slot belongs to what fills it, since most tokenizers write it into the token that follows. The
mask token takes the place of it and of the word, so a text in which the word stands has the same tokens around it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from headwater.modalities.models import ModelError
from headwater.modalities.text.classes import unwrapped

__all__ = ["Prompt", "Template", "Verbaliser", "logits_at"]

Example = str | tuple[str, str]
"""A text, or a pair of them."""
_SLOT = re.compile(r"\{(\w*)\}")
_ALTERNATIVES = 5


class _Piece(NamedTuple):
    """Literal text, or a slot and the white space before it."""

    slot: str
    text: str


@dataclass(frozen=True)
class Template:
    """Where text and answer stand.

    Attributes:
        pattern: with ``{mask}`` and ``{text}``, or with ``{mask}``, ``{text_a}`` and ``{text_b}`` for pairs; each once.

    Raises:
        ValueError: slots are missing, unknown or there twice.

    Example:
        >>> Template("{text} It was {mask} .").show("Fine plot.", "great")
        'Fine plot. It was great .'
    """

    pattern: str

    def __post_init__(self) -> None:
        slots = _SLOT.findall(self.pattern)
        if slots.count("mask") != 1:
            raise ValueError(
                f"a template has exactly one {{mask}}; {self.pattern!r} has {slots.count('mask')}. "
                "An example: '{text} It was {mask} .'"
            )
        if sorted(slots) not in (["mask", "text"], ["mask", "text_a", "text_b"]):
            raise ValueError(
                f"beside {{mask}} a template has {{text}}, or {{text_a}} and {{text_b}}, each once; {self.pattern!r} "
                f"has {', '.join(f'{{{slot}}}' for slot in slots if slot != 'mask') or 'none'}."
            )

    @property
    def pair(self) -> bool:
        """Whether it takes two texts."""
        return "{text_a}" in self.pattern

    @cached_property
    def pieces(self) -> tuple[_Piece, ...]:
        """Literals, without the white space at their end, and slots, with it."""
        pieces, lead = [], ""
        for place, part in enumerate(_SLOT.split(self.pattern)):
            if place % 2:
                pieces.append(_Piece(part, lead))
                lead = ""
                continue
            if literal := part.rstrip():
                pieces.append(_Piece("", literal))
            lead = part[len(literal) :]
        return tuple(pieces)

    @property
    def before(self) -> str:
        """The literal that the gap follows; empty where it follows a text or nothing."""
        place = next(number for number, piece in enumerate(self.pieces) if piece.slot == "mask")
        found = self.pieces[place - 1] if place else _Piece("", "")
        return "" if found.slot else found.text

    @property
    def lead(self) -> str:
        """White space that goes with the word."""
        return next(piece.text for piece in self.pieces if piece.slot == "mask")

    def texts(self, example: Example) -> dict[str, str]:
        """What fills each slot.

        Raises:
            ValueError: a pair for one text, or the other way round.
        """
        if isinstance(example, str) == self.pair:
            wanted = "a pair of texts" if self.pair else "one text"
            raise ValueError(f"template {self.pattern!r} takes {wanted}; got {example!r:.60}.")
        return {"text": example} if isinstance(example, str) else dict(zip(("text_a", "text_b"), example, strict=True))

    def show(self, example: Example, word: str) -> str:
        """The prompt as a person reads it."""
        filled = {**self.texts(example), "mask": word}
        return _SLOT.sub(lambda slot: filled[slot[1]], self.pattern)


@dataclass(frozen=True)
class Verbaliser:
    """The word that says each label, as one tokenizer writes it in the gap of one template.

    Attributes:
        labels: the classes by name, in order.
        words: one for each.
        ids: the tokens of each word, one unless several were allowed.
    """

    labels: tuple[str, ...]
    words: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls,
        words: Mapping[str, str],
        labels: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        *,
        multi_token: Literal["refuse", "mean"] = "refuse",
    ) -> Verbaliser:
        """Look the words up.

        Args:
            words: label -> word; white space around it does not count, the template says how it is spaced.
            labels: in the order of the classes.
            tokenizer: the model's.
            template: words are tokenised where they will stand.
            multi_token: what to do with a word of several tokens; ``mean`` takes the mean of their logits.

        Raises:
            ModelError: a label without a word, a word that is empty, unknown, of several tokens (like ones of one token
                are named), or one that another label has too.
        """
        if missing := [label for label in labels if not words.get(label, "").strip()]:
            raise ModelError(f"verbaliser: no word for label {missing[0]!r}; it has {', '.join(map(repr, words))}.")
        chosen = tuple(words[label].strip() for label in labels)
        ids = tuple(_word_ids(word, tokenizer, template) for word in chosen)
        for label, word, own in zip(labels, chosen, ids, strict=True):
            if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in own:
                raise ModelError(f"verbaliser: the tokenizer does not know {word!r}, the word for label {label!r}.")
            if len(own) > 1 and multi_token == "refuse":
                alike = ", ".join(_alternatives(word, tokenizer, template))
                raise ModelError(
                    f"verbaliser: {word!r} for label {label!r} is {len(own)} tokens in this template, "
                    f"{tokenizer.convert_ids_to_tokens(list(own))}. "
                    f"{f'Words of one token that are like it: {alike}' if alike else 'No word of one token is like it'}"
                    "; or set multi_token: mean."
                )
        if len(set(ids)) < len(ids):
            raise ModelError(f"verbaliser: two labels have the same word: {dict(zip(labels, chosen, strict=True))}.")
        return cls(tuple(labels), chosen, ids)

    def scores(self, logits: Tensor) -> Tensor:
        """From ``(batch, vocabulary)`` to ``(batch, classes)``; the mean over a word's tokens."""
        if all(len(own) == 1 for own in self.ids):
            return logits[:, [own[0] for own in self.ids]]
        return torch.stack([logits[:, list(own)].mean(1) for own in self.ids], dim=1)


def _word_ids(word: str, tokenizer: PreTrainedTokenizerBase, template: Template) -> tuple[int, ...]:
    around = _plain_ids(tokenizer, template.before) if template.before else []
    both = _plain_ids(tokenizer, template.before + template.lead + word)
    if both[: len(around)] != around:
        raise ModelError(
            f"verbaliser: in {template.before + template.lead + word!r} the tokenizer joins the word to what stands "
            "before it; put a space before {mask}."
        )
    return tuple(both[len(around) :])


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _alternatives(word: str, tokenizer: PreTrainedTokenizerBase, template: Template) -> list[str]:
    known = {tokenizer.decode([index]).strip() for index in tokenizer.get_vocab().values()}
    found = difflib.get_close_matches(word, sorted(w for w in known if w.isalpha()), n=4 * _ALTERNATIVES, cutoff=0.4)
    return [near for near in found if len(_word_ids(near, tokenizer, template)) == 1][:_ALTERNATIVES]


@dataclass(frozen=True, eq=False)
class Prompt:
    """A template and its words in the tokens of one model.

    Attributes:
        template: where text and answer stand.
        verbaliser: the answers.
        tokenizer: the model's.
        causal: whether the answer is the next token, or the masked one.
        max_tokens: of a prompt with its word; what is too long loses the end of its text, or of the longer text.

    Raises:
        ModelError: a masked model's tokenizer without a mask token, a causal model's template that goes on after the
            gap, a template that holds the mask token, or one that leaves no room for text.
    """

    template: Template
    verbaliser: Verbaliser
    tokenizer: PreTrainedTokenizerBase
    causal: bool
    max_tokens: int

    def __post_init__(self) -> None:
        pattern, mask = self.template.pattern, self.tokenizer.mask_token_id
        if not self.causal and mask is None:
            raise ModelError("the model is masked, but its tokenizer has no mask token; set tokenizer.mask_token.")
        if self.causal and self.template.pieces[-1].slot != "mask":
            raise ModelError(
                f"a causal model answers with its next token, so {{mask}} must be the template's end; got {pattern!r}."
            )
        if mask is not None and any(mask in ids for ids in self._literals):
            raise ModelError(f"template {pattern!r} holds the mask token itself; write {{mask}} for the gap.")
        if self._room < (2 if self.template.pair else 1):
            raise ModelError(
                f"template {pattern!r} and its word fill all of {self.max_tokens} tokens; shorten it or allow more."
            )

    @cached_property
    def _literals(self) -> list[list[int]]:
        pieces = self.template.pieces
        return [[] if piece.slot else _plain_ids(self.tokenizer, piece.text) for piece in pieces]

    @cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        """Special tokens that open and close a text; none closes one that a causal model goes on with."""
        whole, inner = self.tokenizer("a")["input_ids"], _plain_ids(self.tokenizer, "a")
        at = next(place for place in range(len(whole)) if whole[place : place + len(inner)] == inner)
        return whole[:at], [] if self.causal else whole[at + len(inner) :]

    @cached_property
    def _room(self) -> int:
        longest = max(map(len, self.verbaliser.ids))
        return self.max_tokens - sum(map(len, (*self._literals, *self._ends))) - longest

    def encode(self, examples: Sequence[Example]) -> list[list[int]]:
        """Token ids of the questions: with the mask token in the gap, or up to the gap for a causal model."""
        filled = [self.template.texts(example) for example in examples]
        slots = [piece for piece in self.template.pieces if piece.slot not in ("", "mask")]
        columns: dict[str, list[list[int]]] = {}
        for slot, lead in slots:
            texts = [lead + self._escaped(texts[slot]) for texts in filled]
            columns[slot] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        first, last = self._ends
        rows = []
        for number in range(len(examples)):
            kept = _fit([len(columns[slot][number]) for slot, _ in slots], self._room)
            parts = {slot: columns[slot][number][:size] for (slot, _), size in zip(slots, kept, strict=True)}
            parts["mask"] = [] if self.causal else [int(self.tokenizer.mask_token_id)]
            row = [*first]
            for piece, literal in zip(self.template.pieces, self._literals, strict=True):
                row += parts[piece.slot] if piece.slot else literal
            rows.append([*row, *last])
        return rows

    def _escaped(self, text: str) -> str:
        """A text whose mask tokens are words like others."""
        mask = self.tokenizer.mask_token
        return text if mask is None else text.replace(mask, f"{mask[0]} {mask[1:]}")

    def fill(self, questions: Sequence[Sequence[int]], classes: Sequence[int]) -> list[tuple[list[int], int]]:
        """Questions with the word of a class in the gap, and where it begins."""
        rows = []
        for question, index in zip(questions, classes, strict=True):
            at = len(question) if self.causal else list(question).index(self.tokenizer.mask_token_id)
            rows.append(([*question[:at], *self.verbaliser.ids[index], *question[at + 1 :]], at))
        return rows

    def logits(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores of the labels, ``(batch, classes)``, for questions padded on the right."""
        if self.causal:
            places = attention_mask.sum(1) - 1
        else:
            places = (input_ids == self.tokenizer.mask_token_id).int().argmax(1)
        return self.verbaliser.scores(logits_at(model, input_ids, attention_mask, places))


def _fit(lengths: Sequence[int], room: int) -> list[int]:
    """How much of each text to keep: all of the shorter, as far as an equal share goes, and the longer's beginning."""
    kept = [0] * len(lengths)
    for rank, place in enumerate(sorted(range(len(lengths)), key=lengths.__getitem__)):
        kept[place] = min(lengths[place], room // (len(lengths) - rank))
        room -= kept[place]
    return kept


def logits_at(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, places: Tensor) -> Tensor:
    """Logits over the vocabulary at one place of each row, ``(batch, vocabulary)``.

    The output layer, the largest of a small model, is computed at those places only.

    Args:
        model: a Hugging Face masked or causal language model, in PEFT or DDP if need be.
        input_ids: ``(batch, time)``.
        attention_mask: same shape.
        places: ``(batch,)``.

    Raises:
        ModelError: the model has no backbone apart from its output layer.
    """
    with _reading_at(unwrapped(model), places):
        logits: Tensor = model(input_ids=input_ids, attention_mask=attention_mask).logits
    return logits[:, 0]


@contextmanager
def _reading_at(model: Any, places: Tensor) -> Iterator[None]:  # Any: a Hugging Face model
    body = model.base_model
    if body is model:
        raise ModelError(f"{type(model).__name__} has no backbone apart from its output layer; it cannot be asked so.")

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:  # Any: what Hugging Face models take and give
        hidden = output["last_hidden_state"]
        output["last_hidden_state"] = hidden[torch.arange(len(places), device=hidden.device), places, None]

    hook = body.register_forward_hook(keep)
    try:
        yield
    finally:
        hook.remove()
