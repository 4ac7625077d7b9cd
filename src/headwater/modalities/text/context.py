"""Whether a model uses its context: loss by position, and prompts whose answer stands far back.

    key-value recall    . . [3 5] . [7 0] . . . . [1 4] . . .  3 5  7 0       (dots: filler; [3 5]: one token)
    passkey             filler .. "The pass key is 40718." .. filler .. "The pass key is" -> " 40718."

In key-value recall a pair of key and value is one token, so that a small model learns the task in a hundred steps, and
the value that stood with a key follows where the key is asked for. Everything is a function of (seed, row).

Source: passkeys as in Mohtashami, Jaggi, "Landmark Attention", arXiv:2305.16300, section 4.2; recall of key-value pairs
    as in Arora et al., "Zoology", arXiv:2312.04927, section 3.1, with filler and fused pairs of our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwater.core.rng import derive_seed, hash_integers, hash_uniform

__all__ = [
    "Passkey",
    "RecallStream",
    "RecallTask",
    "context_loss",
    "key_value_recall",
    "passkey",
    "passkey_accuracy",
    "recall_hits",
]

IGNORED = -100
CHUNK = 2048
"""Positions whose logits are in memory at a time."""


# -- loss by position


def context_loss(model: PreTrainedModel, sequences: ArrayLike, lengths: Sequence[int]) -> pd.DataFrame:
    """Mean loss of the tokens that are predicted from more and more context, each sequence alone.

    Sequences are read in pieces of 2,048 tokens with the keys and values of what precedes, so that neither logits nor
    attention grow with the square of the length.

    Args:
        model: causal; run in evaluation mode and given back in its own.
        sequences: token ids ``(sequences, time)``.
        lengths: upper ends of the bins, ascending, at most ``time``; a token with p tokens before it belongs to the
            first length above p.

    Returns:
        One row per bin: ``after`` (the least context), ``length``, ``context`` (its mean), ``tokens``, ``nats``.

    Raises:
        ValueError: no sequence, or lengths that are not ascending within 2 and ``time``.
    """
    ids = np.asarray(sequences, dtype=np.int64)
    ends = list(lengths)
    if ids.ndim != 2 or not len(ids):
        raise ValueError(f"sequences must be (at least 1, time); got shape {ids.shape}.")
    if not ends or ends != sorted(set(ends)) or ends[0] < 2 or ends[-1] > ids.shape[1]:
        raise ValueError(f"lengths must rise within 2 to {ids.shape[1]}, the sequences' length; got {ends}.")
    losses = np.zeros(ends[-1] - 1)  # [p - 1]: of the tokens with p tokens before them
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for sequence in ids[:, : ends[-1]]:
                losses += _token_losses(model, torch.from_numpy(sequence).to(model.device))
    finally:
        model.train(training)
    begins = [1, *ends[:-1]]
    bins = [slice(begin - 1, end - 1) for begin, end in zip(begins, ends, strict=True)]
    return pd.DataFrame(
        {
            "after": begins,
            "length": ends,
            "context": [(begin + end - 1) / 2 for begin, end in zip(begins, ends, strict=True)],
            "tokens": [len(ids) * (end - begin) for begin, end in zip(begins, ends, strict=True)],
            "nats": [losses[within].mean() / len(ids) for within in bins],
        }
    )


def _token_losses(model: PreTrainedModel, sequence: Tensor) -> NDArray[np.float64]:
    """Nats of every token but the first, ``(time - 1,)``."""
    found, cache = [], None
    inputs, targets = sequence[:-1], sequence[1:]
    for begin in range(0, len(inputs), CHUNK):
        here = slice(begin, begin + CHUNK)
        output = model(input_ids=inputs[None, here], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(F.cross_entropy(output.logits[0].float(), targets[here], reduction="none").double().cpu())
    return torch.cat(found).numpy()


# -- key-value recall


@dataclass(frozen=True)
class RecallTask:
    """The shape of key-value recall; see the module.

    Attributes:
        pairs: in every sequence, each with another key.
        keys, values, fillers: how many of each there are.
        queries: at the end, of keys drawn independently.
    """

    pairs: int = 4
    keys: int = 16
    values: int = 8
    fillers: int = 8
    queries: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.pairs <= self.keys or min(self.queries, self.values, self.fillers) < 1:
            raise ValueError(f"need 0 < pairs <= keys, and queries, values and fillers; got {self}.")

    @property
    def vocab(self) -> int:
        """Token ids, in order: fillers, pairs by key and value, keys that are asked for, values that answer."""
        return self.fillers + self.keys * self.values + self.keys + self.values

    @property
    def shortest(self) -> int:
        """Tokens of a sequence without filler."""
        return self.pairs + 2 * self.queries


def key_value_recall(
    task: RecallTask, rows: ArrayLike, length: int, *, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sequences of scattered key-value pairs among filler, with queries at the end.

    Args:
        task: their shape.
        rows: ``(B,)`` integers, the names of the sequences; a row is the same in any batch.
        length: tokens, T.
        seed: any integer.

    Returns:
        (input_ids, labels) ``(B, T)``. Labels stand on their own token, the values that answer queries; -100 elsewhere.

    Raises:
        ValueError: ``length`` has no room for the pairs and queries.
    """
    if length < task.shortest:
        raise ValueError(f"length must be at least {task.shortest} for {task}; got {length}.")
    names = np.asarray(rows, dtype=np.int64)
    each, body = np.arange(len(names))[:, None], length - 2 * task.queries

    def drawn(what: str, n: int, high: int) -> NDArray[np.int64]:
        return hash_integers(derive_seed(seed, "recall", what), names, n, 0, high)

    def chosen(what: str, out_of: int) -> NDArray[np.int64]:
        """A different one of ``out_of`` for every pair, in random order."""
        draws = hash_uniform(derive_seed(seed, "recall", what), names, out_of)
        return np.argsort(draws, axis=1)[:, : task.pairs]

    keys, values = chosen("keys", task.keys), drawn("values", task.pairs, task.values)
    asked = drawn("queries", task.queries, task.pairs)
    keyed = task.fillers + task.keys * task.values

    ids = drawn("filler", length, task.fillers)
    labels = np.full_like(ids, IGNORED)
    ids[each, chosen("places", body)] = task.fillers + keys * task.values + values
    ids[:, body::2] = keyed + keys[each, asked]
    ids[:, body + 1 :: 2] = labels[:, body + 1 :: 2] = keyed + task.keys + values[each, asked]
    return ids, labels


class RecallStream:
    """Endless batches of key-value recall, all of one length, some rows of which hold short sequences instead.

    Args:
        task: the shape of a sequence.
        length: tokens of a row.
        rows: rows of a batch.
        seed: any integer.
        short: length of the short sequences, a divisor of ``length``; None for none.
        short_every: every so many-th row holds ``length / short`` short sequences, which do not see each other.

    Attributes:
        fingerprint: changes with every argument.
        tokens_per_row: ``length``.
    """

    def __init__(
        self, task: RecallTask, length: int, rows: int, *, seed: int, short: int | None = None, short_every: int = 2
    ) -> None:
        if short is not None and length % short:
            raise ValueError(f"short sequences must fill a row of {length}; got {short}.")
        self.task, self.rows, self.tokens_per_row, self.seed = task, rows, length, seed
        self.short, self.short_every = short or length, short_every
        self.fingerprint = f"recall/{task}/{length}/{rows}/{seed}/{short}/{short_every}"

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Rows ``[start, stop)`` of batch ``step``, for ``PackedObjective``: all columns ``(B, T)``, and ``row``."""
        names = np.arange(step * self.rows + start, step * self.rows + (self.rows if stop is None else stop))
        length, count = self.tokens_per_row, self.tokens_per_row // self.short
        packed = names % self.short_every == 0
        ids, labels = key_value_recall(self.task, names, length, seed=self.seed)
        if count > 1 and packed.any():
            inner = (names[packed][:, None] * count + np.arange(count)).ravel()
            short = key_value_recall(self.task, inner, self.short, seed=derive_seed(self.seed, "short"))
            ids[packed], labels[packed] = (part.reshape(-1, length) for part in short)
        places = np.arange(length)
        documents = np.where(packed[:, None], places // self.short, 0)
        columns = {
            "input_ids": ids,
            "labels": labels,
            "document_ids": documents,
            "position_ids": places - documents * self.short,
            "row": names,
        }
        return {name: torch.from_numpy(values) for name, values in columns.items()}


def recall_hits(
    model: PreTrainedModel, task: RecallTask, rows: ArrayLike, length: int, *, seed: int, batch_tokens: int = 16_384
) -> NDArray[np.float64]:
    """Share of the queries of each sequence that the likeliest token answers, ``(rows,)``.

    Args:
        model: causal; run in evaluation mode and given back in its own.
        task: see ``key_value_recall``, as for the next three.
        rows: the names of the sequences.
        length: tokens of each.
        seed: any integer.
        batch_tokens: per forward pass.
    """
    names, found = np.asarray(rows, dtype=np.int64), []
    training, step, first = model.training, max(1, batch_tokens // length), length - 2 * task.queries
    model.eval()
    with torch.inference_mode():
        for begin in range(0, len(names), step):
            ids, _ = key_value_recall(task, names[begin : begin + step], length, seed=seed)
            inputs = torch.from_numpy(ids).to(model.device)
            logits = model(input_ids=inputs, use_cache=False).logits[:, first::2]
            found.append((logits.argmax(dim=-1) == inputs[:, first + 1 :: 2]).double().mean(dim=1).cpu().numpy())
    model.train(training)
    return np.concatenate(found) if found else np.empty(0)


# -- passkey

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE, QUESTION = "The pass key is {key}. Remember it. {key} is the pass key.", "What is the pass key? The pass key is"


@dataclass(frozen=True, eq=False)
class Passkey:
    """A prompt with a number hidden in it.

    Attributes:
        input_ids: the prompt's tokens, ``(length,)``.
        answer: tokens of the number, with the space before it.
        key: the number, as text.
    """

    input_ids: NDArray[np.int64]
    answer: NDArray[np.int64]
    key: str


def passkey(tokenizer: PreTrainedTokenizerBase, length: int, depth: float, seed: int) -> Passkey:
    """A prompt of exactly ``length`` tokens whose filler hides a number of five digits.

    Args:
        tokenizer: the model's; its BOS goes first where it has one.
        length: tokens of the prompt, without the answer.
        depth: where the number stands, 0 at the beginning and 1 just before the question.
        seed: of the number.

    Raises:
        ValueError: ``length`` is too short, or ``depth`` outside [0, 1].
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be in [0, 1]; got {depth}.")
    key = str(int(hash_integers(derive_seed(seed, "passkey"), [0], 1, 10_000, 100_000)[0, 0]))

    def encoded(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    filler, needle = encoded(" " + FILLER), encoded(" " + NEEDLE.format(key=key))
    question, answer = encoded(" " + QUESTION), encoded(" " + key)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = length - len(start) - len(needle) - len(question)
    if room < 0:
        raise ValueError(f"length must be at least {length - room} tokens to hold the number; got {length}.")
    before = round(depth * room)
    around = (filler * (room // len(filler) + 1))[:room]
    ids = [*start, *around[:before], *needle, *around[before:], *question]
    return Passkey(np.array(ids, dtype=np.int64), np.array(answer, dtype=np.int64), key)


def passkey_accuracy(model: PreTrainedModel, prompts: Sequence[Passkey]) -> float:
    """Share of the prompts after which greedy decoding gives the number; NaN without a prompt.

    Args:
        model: causal; run in evaluation mode and given back in its own.
        prompts: see ``passkey``.
    """
    training, hits = model.training, []
    model.eval()
    with torch.inference_mode():
        for prompt in prompts:
            whole = torch.from_numpy(np.concatenate([prompt.input_ids, prompt.answer])).to(model.device)
            # Greedy decoding gives the answer just where each of its tokens is the likeliest after those before it.
            cache = model(input_ids=whole[None, : len(prompt.input_ids) - 1], use_cache=True).past_key_values
            after = model(input_ids=whole[None, len(prompt.input_ids) - 1 : -1], past_key_values=cache).logits[0]
            hits.append(bool((after.argmax(dim=-1).cpu().numpy() == prompt.answer).all()))
    model.train(training)
    return float(np.mean(hits)) if hits else float("nan")
