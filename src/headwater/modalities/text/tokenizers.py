"""Small tokenizers, trained here, that behave as any other fast tokenizer of Hugging Face."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["character_tokenizer", "train_bpe", "word_tokenizer"]

PAD, EOS, UNK, MASK = "<pad>", "<eos>", "<unk>", "<mask>"


def train_bpe(texts: Iterable[str], vocab_size: int, *, extra_tokens: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: any text can be encoded, and decoding gives it back exactly.

    The same texts in any order give the same tokenizer.

    Args:
        texts: read once.
        vocab_size: at most so many tokens, special ones included (fewer where the texts hold fewer pairs).
        extra_tokens: further special tokens, such as sentinels; ``"<mask>"`` becomes the mask token.

    Returns:
        A tokenizer with ``<pad>`` (id 0) and ``<eos>`` (id 1) that adds no special token by itself.

    Raises:
        ValueError: ``vocab_size`` does not hold the 256 bytes and the special tokens.

    Example:
        >>> tokenizer = train_bpe(["low lower lowest"], 262)
        >>> tokenizer.decode(tokenizer("slow ☃")["input_ids"])
        'slow ☃'
    """
    special = [PAD, EOS, *extra_tokens]
    if vocab_size < 256 + len(special):
        raise ValueError(
            f"vocab_size must be at least {256 + len(special)}: 256 bytes and {special}; got {vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, extra_tokens)


def character_tokenizer(texts: Iterable[str], *, extra_tokens: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each character of ``texts``; others become ``<unk>``.

    Args:
        texts: read once.
        extra_tokens: as in ``train_bpe``.

    Raises:
        ValueError: the texts hold no character.
    """
    characters = sorted(set().union(*texts))
    if not characters:
        raise ValueError("character_tokenizer: the texts hold no character.")
    tokenizer = _closed_vocabulary(characters, extra_tokens)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer, extra_tokens, unk_token=UNK)


def word_tokenizer(
    texts: Iterable[str], vocab_size: int = 30_000, *, extra_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words and punctuation marks, the most frequent ones; others become ``<unk>``.

    White space is dropped; decoding joins tokens with single spaces.

    Args:
        texts: read once.
        vocab_size: at most so many tokens, special ones included.
        extra_tokens: as in ``train_bpe``.

    Raises:
        ValueError: ``vocab_size`` leaves no room for a word, or the texts hold none.
    """
    room = vocab_size - 3 - len(extra_tokens)
    if room < 1:
        raise ValueError(f"vocab_size must exceed the {3 + len(extra_tokens)} special tokens; got {vocab_size}.")
    splitter = pre_tokenizers.Whitespace()
    counts: dict[str, int] = {}
    for text in texts:
        for word, _ in splitter.pre_tokenize_str(text):
            counts[word] = counts.get(word, 0) + 1
    if not counts:
        raise ValueError("word_tokenizer: the texts hold no word.")
    tokenizer = _closed_vocabulary(sorted(counts, key=lambda w: (-counts[w], w))[:room], extra_tokens)
    tokenizer.pre_tokenizer = splitter
    return _wrap(tokenizer, extra_tokens, unk_token=UNK)


def _closed_vocabulary(tokens: Sequence[str], extra_tokens: Sequence[str]) -> Tokenizer:
    vocabulary = dict.fromkeys((PAD, EOS, UNK, *extra_tokens, *tokens))
    return Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNK))


def _wrap(tokenizer: Tokenizer, extra_tokens: Sequence[str], unk_token: str | None = None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=unk_token,
        mask_token=MASK if MASK in extra_tokens else None,
        additional_special_tokens=[token for token in extra_tokens if token != MASK],
        clean_up_tokenization_spaces=False,
    )
