"""What a model answers to problems of arithmetic, and which answers are right: by carries, by digits, by column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwater.corpora.arithmetic_formats import ArithmeticFormat
from headwater.corpora.arithmetic_pairs import carries, lengths
from headwater.modalities.models import ModelError
from headwater.modalities.text.pairs import PairModel

__all__ = ["check_tokenizer", "completions", "confusion_by_column", "judged", "score_arithmetic"]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, fmt: ArithmeticFormat) -> None:
    """Refuse a tokenizer that has no token for a character, or merges digits.

    Raises:
        ModelError: says which, and how 128 is split.
    """
    numbers = [f"{number:03d}" for number in range(1000)]
    shown = [" ".join(number) for number in numbers] if fmt.spaced else numbers
    ids = tokenizer(shown, add_special_tokens=False)["input_ids"]
    texts = (tokenizer.decode([token]) for token in sorted({token for row in ids for token in row}))
    if any(sum(character.isdigit() for character in text) > 1 for text in texts):
        raise ModelError(
            f"the tokenizer merges digits: {shown[128]!r} is {tokenizer.convert_ids_to_tokens(ids[128])}. Set "
            "spaced: true, or take a tokenizer of characters."
        )
    unknown = [c for c in fmt.alphabet if tokenizer.unk_token_id in tokenizer(c, add_special_tokens=False)["input_ids"]]
    if tokenizer.unk_token_id is not None and unknown:
        raise ModelError(f"the tokenizer has no token for {unknown[0]!r}, which {fmt.style} problems of {fmt.op} have.")


def completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    fmt: ArithmeticFormat,
    pairs: ArrayLike,
    *,
    before: Sequence[str] | None = None,
    batch_size: int = 256,
) -> list[str]:
    """What the model writes after each prompt, greedily, with a cache; prompts of one length share a batch.

    Args:
        model: a causal language model.
        tokenizer: its own.
        fmt: how problems are written.
        pairs: ``(n, 2)``.
        before: examples to put before each prompt.
        batch_size: prompts together.
    """
    prompts, right = fmt.prompts(pairs), fmt.answers(pairs)
    if not prompts:
        return []
    longest = max(len(ids) for ids in tokenizer(right, add_special_tokens=False)["input_ids"])
    sources = prompts if before is None else [a + b for a, b in zip(before, prompts, strict=True)]
    limit = max(len(ids) for ids in tokenizer(sources, add_special_tokens=False)["input_ids"]) + 1
    reader = PairModel(model, tokenizer, "causal", limit, longest + 1, join="")  # and one that ends the answer
    return reader.answers(sources, batch_size=batch_size)


def judged(fmt: ArithmeticFormat, pairs: ArrayLike, written: Sequence[str]) -> dict[str, float]:
    """How many completions hold the right answer.

    Args:
        fmt: how problems are written.
        pairs: ``(n, 2)``, n above 0.
        written: ``(n,)``, what the model wrote after the prompts.

    Returns:
        ``accuracy``; ``invalid``, the share that cannot be read as an answer in this style; and the accuracy of each
        number of carries and length that there is, ``carries/1``, ``digits/3``. All in [0, 1].
    """
    rows = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    read = [fmt.parse(text) for text in written]
    right = np.array([answer == fmt.parse(own) for answer, own in zip(read, fmt.answers(rows), strict=True)])
    found = {"accuracy": float(right.mean()), "invalid": float(np.mean([answer is None for answer in read]))}
    for name, labels in (("carries", carries(fmt.op, rows)), ("digits", lengths(fmt.op, rows))):
        if len(kinds := np.unique(labels)) > 1:
            found |= {f"{name}/{kind}": float(right[labels == kind].mean()) for kind in kinds.tolist()}
    return found


def score_arithmetic(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    fmt: ArithmeticFormat,
    pairs: ArrayLike,
    *,
    before: Sequence[str] | None = None,
    batch_size: int = 256,
) -> dict[str, float]:
    """``judged`` of the model's ``completions``.

    Raises:
        ValueError: there is no pair.
    """
    if not len(np.asarray(pairs)):
        raise ValueError("there is no pair to score.")
    return judged(fmt, pairs, completions(model, tokenizer, fmt, pairs, before=before, batch_size=batch_size))


def confusion_by_column(
    fmt: ArithmeticFormat, pairs: ArrayLike, written: Sequence[str]
) -> dict[tuple[int, str, str], int]:
    """How often a digit was written for another: (column from the right, right digit, written digit) -> count.

    Columns that one of the two numbers lacks have "" there; answers that cannot be read are left out.
    """
    found: Counter[tuple[int, str, str]] = Counter()
    for text, own in zip(written, fmt.answers(pairs), strict=True):
        read, right = fmt.parse(text), fmt.parse(own)
        if read is None or right is None:
            continue
        # Decimals are compared at their last digit, as integers are.
        shown = [
            f"{abs(v):.{fmt.digits}f}"[::-1].replace(".", "") if isinstance(v, float) else str(abs(v))[::-1]
            for v in (right, read)
        ]
        for column in range(max(map(len, shown))):
            found[column, shown[0][column : column + 1], shown[1][column : column + 1]] += 1
    return dict(found)
