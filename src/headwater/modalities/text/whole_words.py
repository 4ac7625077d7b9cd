"""Whole-word masking: all tokens of a word are masked together, or none.

Where words begin is looked up by token, in tables that are made once per vocabulary; nothing is tokenised again and no
text is needed. A word is what the tokenizer's pre-tokenizer makes one:

- WordPiece: a token without the continuation prefix (``##``) begins a word;
- SentencePiece: a token with ``▁`` in front does;
- byte-level BPE: a token that begins with a space does, and so does one whose first character is of another kind
  (letter, number, white space, other) than the last character of the token before it. White space is a word up to its
  last character, which begins the next one;
- a vocabulary of whole words: every token does.

Special tokens, the unknown one among them, are words of their own, and the first token of a row begins one. Byte-level
rules differ from the pre-tokenizer of GPT-2 at contractions only.

Source: the whole-word masking of the BERT release (2019), as in Gu et al., arXiv:2007.15779, section 3.2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from headwater.modalities.text.packing import mask_tokens

__all__ = ["WholeWordMasker", "WordBorders"]

_LETTER, _NUMBER, _OTHER, _SPACE, _GLUE, _SPECIAL = range(6)
_METASPACE = "▁"


class WordBorders:
    """Where words begin in rows of tokens of one vocabulary.

    Args:
        tokenizer: a fast one.

    Raises:
        ValueError: a tokenizer whose tokens do not show where words begin.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        vocabulary = tokenizer.get_vocab()
        size = max(vocabulary.values()) + 1
        # opens: begins a word whatever stands before it. first, last: kind of the token's outer characters.
        self._opens = np.zeros(size, dtype=np.bool_)
        self._first = np.zeros(size, dtype=np.int8)
        self._last = np.zeros(size, dtype=np.int8)
        self._lone = np.zeros(size, dtype=np.bool_)  # one character of white space
        form, mark = _form(tokenizer)
        for token, id in vocabulary.items():
            if form == "words":
                self._opens[id] = True
            elif form == "prefix":
                self._opens[id] = not token.startswith(mark)
            elif form == "metaspace":
                self._opens[id] = token.startswith(mark)
            else:
                text = tokenizer.convert_tokens_to_string([token])
                self._lone[id] = text.isspace() and len(text) == 1
                self._opens[id] = text.startswith(" ") and not text.isspace()
                self._first[id], self._last[id] = (_kind(text[:1]), _kind(text[-1:]))
                if text == " ":  # a space that stands alone belongs to the word after it
                    self._last[id] = _GLUE
        special = [id for id in tokenizer.all_special_ids if id < size]
        self._opens[special], self._last[special] = True, _SPECIAL

    def starts(self, input_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether a word begins at each token, ``(B, T)`` to ``(B, T)``; always at the first of a row."""
        starts = self._opens[input_ids]
        before, after = self._last[input_ids[:, :-1]], self._first[input_ids[:, 1:]]
        starts[:, 1:] |= (after != before) & (before != _GLUE)
        starts[:, :-1] |= self._lone[input_ids[:, :-1]] & (after != _SPACE)
        starts[:, :1] = True
        return starts

    def heads(self, input_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Column of the first token of the word that each token belongs to, ``(B, T)`` to ``(B, T)``."""
        columns = np.where(self.starts(input_ids), np.arange(input_ids.shape[1]), 0)
        heads: NDArray[np.int64] = np.maximum.accumulate(columns, axis=1)
        return heads


def _kind(character: str) -> int:
    # U+FFFD stands for bytes that are no character by themselves: mostly the pieces of letters beyond ASCII.
    if character.isalpha() or character in ("", "\ufffd"):
        return _LETTER
    if character.isnumeric():
        return _NUMBER
    return _SPACE if character.isspace() else _OTHER


def _form(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """How tokens show borders: ``words``, ``prefix``, ``metaspace`` or ``bytes``, and the mark that does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"whole words need a fast tokenizer, whose parts can be read; got {type(tokenizer).__name__}. "
            "Mask single tokens, or convert it."
        )
    about = json.loads(backend.to_str())
    model, steps = about["model"], json.dumps([about["normalizer"], about["pre_tokenizer"]], ensure_ascii=False)
    if model["type"] == "WordLevel":
        return "words", ""
    if model.get("continuing_subword_prefix"):
        return "prefix", model["continuing_subword_prefix"]
    if '"ByteLevel"' in steps:
        return "bytes", ""
    if _METASPACE in steps:
        return "metaspace", _METASPACE
    raise ValueError(
        f"cannot tell where words begin: tokens of this {model['type']} tokenizer carry neither a continuation prefix "
        f"nor a leading space. Mask single tokens instead."
    )


class WholeWordMasker:
    """Collator: rows of tokens become a batch for a masked language model, whole words masked.

    Each word is a target with ``probability``. Of these words 80 % become mask tokens, 10 % random tokens, 10 % stay.
    What is drawn for a row depends on (seed, row) alone. In ``transformers.Trainer`` set
    ``remove_unused_columns=False``, so that ``row`` arrives here.

    Args:
        tokenizer: fast, with a mask token.
        probability: in (0, 1); also the expected share of target tokens.
        seed: any integer.

    Raises:
        ValueError: see ``WordBorders`` and ``mask_tokens``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float = 0.15, seed: int = 0) -> None:
        self.tokenizer, self.probability, self.seed = tokenizer, probability, seed
        self.words = WordBorders(tokenizer)
        self._mask(np.zeros((0, 1), dtype=np.int64), np.zeros(0, dtype=np.int64))

    def _mask(
        self, input_ids: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return mask_tokens(
            input_ids, rows, self.tokenizer, seed=self.seed, probability=self.probability, words=self.words
        )

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:  # Any: arrays, tensors, lists
        """Collate ``{"input_ids": (T,), "row": int}``; shorter rows are padded on the right.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, ``(B, T)`` int64; labels are -100 off target.

        Raises:
            ValueError: a feature without ``row``, or rows of different lengths and no padding token.
        """
        if any("row" not in feature for feature in features):
            raise ValueError(
                "a feature has no 'row', by which its masks are drawn. Give each its number in the data set; in "
                "transformers.Trainer set remove_unused_columns=False."
            )
        arrays = [np.asarray(feature["input_ids"], dtype=np.int64) for feature in features]
        lengths = np.array([len(ids) for ids in arrays], dtype=np.int64)
        longest = int(lengths.max(initial=0))
        pad = self.tokenizer.pad_token_id
        if pad is None and (lengths < longest).any():
            raise ValueError("rows have different lengths and the tokenizer has no pad token; set tokenizer.pad_token.")
        real = np.arange(longest) < lengths[:, None]
        ids = np.full(real.shape, 0 if pad is None else pad, dtype=np.int64)
        if arrays:
            ids[real] = np.concatenate(arrays)
        masked, labels = self._mask(ids, np.array([int(feature["row"]) for feature in features], dtype=np.int64))
        return {
            "input_ids": torch.from_numpy(masked),
            "attention_mask": torch.from_numpy(real.astype(np.int64)),
            "labels": torch.from_numpy(labels),
        }
