"""The forgetting ledger: what a language model can do besides what it was changed for, before and after.

    general      bits per byte of general text                                             lower is better
    copy         share of right tokens: repeat a list, after two examples                  higher
    pattern      share of right tokens: go on with a sequence that repeats itself          higher
    calibration  expected calibration error of the next token on general text              lower
    instruction  share of checkable instructions followed, where there is a chat template  higher

Every recipe that changes a language model reports these under the same names, ``ledger/NAME_start`` and
``ledger/NAME``; what could not be measured is absent and never 0. Copying and patterns need no knowledge, only what is
in the prompt, and are right or wrong without a judge; tokens are judged after the right ones before them, so that a
list counts as a whole exactly if greedy decoding gives it.

Sources: Olsson et al., "In-context Learning and Induction Heads", arXiv:2209.11895 (copying as the measure of learning
in context); Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599, equation 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwater.core.rng import numpy_generator
from headwater.core.stats import calibration_error
from headwater.modalities.text.checks import PROMPTS, followed
from headwater.modalities.text.docs import Document
from headwater.modalities.text.score import bits_per_byte, position_limit, scoring, start_token

__all__ = ["NAMES", "Shown", "copy_tasks", "ledger", "ledger_metrics", "pattern_tasks"]

NAMES = ("general", "copy", "pattern", "calibration", "instruction")
BINS = 15  # Guo et al., section 5
LARGEST = 99
INSTRUCTION_TOKENS = 64
CALIBRATION_CHARS = 20_000


@dataclass(frozen=True)
class Shown:
    """A prompt and the one right continuation, both text."""

    prompt: str
    answer: str


def copy_tasks(n: int, seed: int) -> list[Shown]:
    """Two lists repeated, and a third to repeat: ``4 17 -> 4 17``; lists of three to six numbers below 100."""
    rng = numpy_generator(seed, "ledger", "copy")
    tasks = []
    for _ in range(n):
        lists = [rng.integers(LARGEST + 1, size=rng.integers(3, 7)).tolist() for _ in range(3)]
        *shots, asked = (" ".join(map(str, numbers)) for numbers in lists)
        shown = "".join(f"{shot} -> {shot}\n" for shot in shots)
        tasks.append(Shown(f"{shown}{asked} ->", f" {asked}"))
    return tasks


def pattern_tasks(n: int, seed: int) -> list[Shown]:
    """Two to four different numbers, three times over, of which the last time is to be written."""
    rng = numpy_generator(seed, "ledger", "pattern")
    tasks = []
    for _ in range(n):
        period = rng.choice(LARGEST + 1, size=rng.integers(2, 5), replace=False)
        words = " ".join(map(str, period))
        tasks.append(Shown(f"{words} {words}", f" {words}"))
    return tasks


def ledger(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    general: Sequence[Document] = (),
    *,
    window: int | None = None,
    tasks: int = 64,
    batch_size: int = 16,
) -> dict[str, float]:
    """Measure one causal language model.

    Args:
        model: run in evaluation mode and given back in its own.
        tokenizer: the model's.
        general: held-out general text; without, ``general`` and ``calibration`` are absent. Calibration reads the
            beginning of each document, 20,000 characters in all.
        window: tokens the model sees at once; None: its number of positions, or 1024. A task that does not fit, or
            that the vocabulary cannot spell, is left out, and where that is most of a kind, so is its figure.
        tasks: how many lists and how many patterns, the same for every model.
        batch_size: sequences per forward pass.

    Returns:
        Figures by the names of the module's table; only those that could be measured.
    """
    window = position_limit(model, window)
    found: dict[str, float] = {}
    if general:
        found["general"] = bits_per_byte(model, tokenizer, general, window=window, batch_size=batch_size).bits_per_byte
    for name, make in (("copy", copy_tasks), ("pattern", pattern_tasks)):
        right = _answered(model, tokenizer, make(tasks, 0), window, batch_size)
        if 2 * len(right) >= tasks:
            found[name] = float(np.mean([each.mean() for each in right]))
    if general:
        confidence, correct = _next_tokens(model, tokenizer, _beginnings(general), window, batch_size)
        found["calibration"] = calibration_error(confidence, correct, BINS)
    if tokenizer.chat_template is not None:
        found["instruction"] = _instructions(model, tokenizer, window)
    return found


def ledger_metrics(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """The two sides as metrics, ``ledger/NAME_start`` and ``ledger/NAME``, of what both have."""
    both = [name for name in NAMES if name in before and name in after]
    return {f"ledger/{name}_start": before[name] for name in both} | {f"ledger/{name}": after[name] for name in both}


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    scored: int  # of the last tokens


def _answered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Shown], window: int, batch_size: int
) -> list[NDArray[np.bool_]]:
    """For each task that fits, whether each token of its answer would be chosen."""
    start = start_token(tokenizer)
    rows = []
    for task in tasks:
        prompt, answer = (_spelled(tokenizer, text) for text in (task.prompt, task.answer))
        if prompt is not None and answer is not None and 1 + len(prompt) + len(answer) <= window:
            rows.append(_Row([start, *prompt, *answer], len(answer)))
    return [correct for _, correct in _judge(model, tokenizer, rows, batch_size)]


def _spelled(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int] | None:
    """Tokens of a text; None where the vocabulary cannot say it: unknown tokens would be repeated with no merit."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # A vocabulary of whole words may have no unknown token, and then refuses to encode.
    if type(getattr(backend, "model", None)).__name__ == "WordLevel":
        known = tokenizer.get_vocab()
        if any(word not in known for word in text.split()):
            return None
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return None if tokenizer.unk_token_id in ids else ids


def _next_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    window: int,
    batch_size: int,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Confidence in the likeliest token at each place, and whether it is the right one."""
    start = start_token(tokenizer)
    encoded = tokenizer([d.text for d in documents], add_special_tokens=False, verbose=False)["input_ids"]
    rows = [_Row([start, *ids[: window - 1]], min(len(ids), window - 1)) for ids in encoded if ids]
    judged = _judge(model, tokenizer, rows, batch_size)
    return np.concatenate([c for c, _ in judged]), np.concatenate([r for _, r in judged])


def _judge(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[_Row], batch_size: int
) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Confidence and rightness at the scored tokens of each row."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # masked out, so any id will do
    judged = []
    with scoring(model) as device:
        for begin in range(0, len(rows), batch_size):
            batch = rows[begin : begin + batch_size]
            width = max(len(row.ids) for row in batch)
            ids = torch.tensor([row.ids + [pad] * (width - len(row.ids)) for row in batch], device=device)
            mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in batch], device=device)
            logits = model(input_ids=ids, attention_mask=mask).logits
            for place, row in enumerate(batch):
                last = slice(len(row.ids) - row.scored - 1, len(row.ids) - 1)
                confidence, likeliest = logits[place, last].float().softmax(-1).max(-1)
                right = likeliest.cpu().numpy() == np.array(row.ids[len(row.ids) - row.scored :])
                judged.append((confidence.double().cpu().numpy(), right))
    return judged


def _beginnings(documents: Sequence[Document]) -> list[Document]:
    chosen, left = [], CALIBRATION_CHARS
    for document in documents:
        if left <= 0:
            break
        chosen.append(document)
        left -= len(document.text)
    return chosen


def _instructions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, window: int) -> float:
    """Share of the checkable prompts that greedy answers follow, strictly."""
    generator: Any = model  # generate is not declared where transformers ships no types
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    kept = []
    with scoring(model) as device:
        for instruction in PROMPTS:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": instruction.prompt}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )["input_ids"].to(device)
            room = min(INSTRUCTION_TOKENS, window - ids.shape[1])
            if room < 1:
                kept.append(False)
                continue
            output = generator.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                do_sample=False,
                pad_token_id=pad,
            )
            response = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            kept.append(followed(instruction, response))
    return float(np.mean(kept))
