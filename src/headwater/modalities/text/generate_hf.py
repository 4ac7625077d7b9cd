"""A causal model on this machine as a generator.

    p = softmax(logits / temperature),  kept to the likeliest tokens that hold top_p
    token = first t with  sum_{s <= t} p_s > u * sum p,   u = hash(request, step)

``transformers`` writes: its ``generate`` keeps the cache of keys and values, pads and stops. A logits processor draws,
from uniforms that are a function of the request and the step, so that a request gives the same text whatever it shares
a batch with, as far as the arithmetic of differently padded batches agrees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from headwater.core.rng import hash_uniform
from headwater.modalities.models import load_model, load_tokenizer, parameter_fingerprint
from headwater.modalities.text.class_inputs import length_batches
from headwater.modalities.text.conversations import prompt_ids
from headwater.modalities.text.generate import Flow, Generator, HFSpec, Reply, Request, cut_at_stop, request_key
from headwater.modalities.text.score import scoring

__all__ = ["HFGenerator", "RowSampler", "RowStops"]

TAIL = 8  # tokens beside those a stop string can span, as decoding may treat the first ones differently


class HFGenerator(Generator):
    """Any ``AutoModelForCausalLM``; not for several threads at once.

    Messages are written by the tokenizer's chat template, or as lines ``role: content`` where it has none. Settings of
    the checkpoint's generation config other than the way of drawing, such as a repetition penalty, stay in force. A
    prompt that leaves no room in the context gives an error.

    Args:
        model: moved to ``device`` if one is given. Its weights enter ``id`` as they are now.
        tokenizer: the model's.
        batch_tokens: of a batch, padding and replies included; a longer request is alone.
        device: where it runs; ``None`` leaves it where it is.

    Raises:
        ValueError: ``batch_tokens`` is not positive.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_tokens: int = 8192,
        device: str | torch.device | None = None,
    ) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be >= 1; got {batch_tokens}.")
        self.model = model if device is None else model.to(device)
        self.tokenizer, self.batch_tokens = tokenizer, batch_tokens
        self.name = str(model.config.name_or_path or type(model).__name__)
        template = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:8]
        self.id = f"{parameter_fingerprint(model)} {template}"
        config = model.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        eos = getattr(model.generation_config, "eos_token_id", None)
        ends = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
        self.eos: list[int] = sorted(ends)
        pad = [tokenizer.pad_token_id, *self.eos, 0]
        self.pad: int = next(token for token in pad if token is not None)

    @classmethod
    def open(cls, spec: HFSpec) -> HFGenerator:
        """The model of a recipe.

        Raises:
            ModelError: it cannot be opened.
        """
        model: Any = load_model(spec.model, "causal")  # Any: declared as a plain module
        return cls(model, load_tokenizer(spec.model), spec.batch_tokens, spec.device)

    def flow(self, requests: Iterator[Request | None]) -> Flow:
        """Batches of similar length out of every ``window`` requests."""
        rows: list[_Row] = []
        position = 0
        for request in requests:
            if request is not None:
                rows.append(self._row(position, request))
                position += 1
            if rows and (request is None or len(rows) == self.window):
                yield from self._write(rows)
                rows = []
            elif request is None:
                yield None
        yield from self._write(rows)

    def count_prompt(self, request: Request) -> tuple[int, int]:
        """Tokens of the prompt as the model reads it."""
        count = len(self.encode(request))
        return count, count

    def encode(self, request: Request) -> list[int]:
        """Token ids of a prompt, up to where the reply begins."""
        return prompt_ids(self.tokenizer, request.messages)

    def _row(self, position: int, request: Request) -> _Row:
        ids = self.encode(request)
        room = request.max_tokens if self.context is None else min(request.max_tokens, self.context - len(ids))
        return _Row(position, request, ids, room, int(request_key(self.id, request)[:16], 16))

    def _write(self, rows: Sequence[_Row]) -> Iterator[tuple[int, Reply]]:
        fitting = [row for row in rows if row.room > 0 and row.ids]
        for row in rows:
            if row.room < 1 or not row.ids:
                error = f"a prompt of {len(row.ids)} tokens for a context of {self.context} leaves nothing to write"
                yield row.position, Reply("", "error", 0, 0, 0.0, False, self.name, error)
        if fitting:
            for chosen in length_batches([len(row.ids) + row.room for row in fitting], batch_tokens=self.batch_tokens):
                yield from self._batch([fitting[index] for index in chosen])

    def _batch(self, rows: Sequence[_Row]) -> list[tuple[int, Reply]]:
        width, limits = max(len(row.ids) for row in rows), [row.room for row in rows]
        ids = torch.full((len(rows), width), self.pad)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):  # on the left, so that all rows write at the same place
            ids[index, width - len(row.ids) :] = torch.tensor(row.ids)
            mask[index, width - len(row.ids) :] = 1
        stops = RowStops(self.tokenizer, width, limits, [row.request.stop for row in rows], self.eos)
        sampler = RowSampler([row.request for row in rows], [row.key for row in rows], width, max(limits))
        model: Any = self.model  # Any: generate is not declared where transformers ships no types
        with scoring(self.model) as device:
            output = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max(limits),
                do_sample=False,
                num_beams=1,
                pad_token_id=self.pad,
                eos_token_id=self.eos or None,
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([stops]),
            )
        written = output[:, width:].tolist()
        return [(row.position, self._reply(row, written[n][: stops.lengths[n]])) for n, row in enumerate(rows)]

    def _reply(self, row: _Row, ids: Sequence[int]) -> Reply:
        text, stopped = cut_at_stop(self.tokenizer.decode(ids, skip_special_tokens=True), row.request.stop)
        ended = stopped or (len(ids) > 0 and ids[-1] in self.eos)
        finish: Literal["stop", "length"] = "stop" if ended else "length"
        return Reply(text, finish, len(row.ids), len(ids), 0.0, False, self.name)


@dataclass(frozen=True)
class _Row:
    """A request in tokens; ``room``: it may write so many; ``key``: what its random numbers follow from."""

    position: int
    request: Request
    ids: list[int]
    room: int
    key: int


class RowSampler(LogitsProcessor):  # type: ignore[misc]  # transformers ships no types
    """Leaves each row with temperature above 0 only the token that it draws; greedy decoding then takes that.

    Args:
        requests: one for each row.
        keys: in [0, 2**64), one for each row: its uniforms follow from this and the step alone.
        begin: length of the padded prompts.
        steps: tokens that the longest row writes.
    """

    def __init__(self, requests: Sequence[Request], keys: Sequence[int], begin: int, steps: int) -> None:
        self.begin = begin
        self.rows = [row for row, request in enumerate(requests) if request.temperature > 0]
        drawn = [requests[row] for row in self.rows]
        self.temperature = torch.tensor([request.temperature for request in drawn], dtype=torch.float64)
        self.top_p = torch.tensor([request.top_p for request in drawn], dtype=torch.float64)
        ids = np.array([keys[row] for row in self.rows], dtype=np.uint64)
        self.uniform = torch.from_numpy(hash_uniform(0, ids, steps))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores, ``(batch, vocabulary)``, with -inf for all but the drawn token in the rows that draw."""
        if not self.rows:
            return scores
        u = self.uniform[:, input_ids.shape[1] - self.begin]
        # In double precision, as rounding would move tokens' borders; Apple's accelerators have none.
        place = "cpu" if scores.device.type == "mps" else scores.device
        logits = scores[self.rows].to(place).double()
        drawn = draw(logits, self.temperature.to(place), self.top_p.to(place), u.to(place)).to(scores.device)
        scores = scores.clone()
        scores[self.rows] = float("-inf")
        scores[self.rows, drawn] = 0.0
        return scores


def draw(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Tokens by inversion of the cumulative distribution.

    Args:
        logits: ``(rows, vocabulary)`` float64.
        temperature: ``(rows,)``, > 0.
        top_p: ``(rows,)``, in (0, 1].
        uniform: ``(rows,)``, in [0, 1).

    Returns:
        ``(rows,)`` int64.
    """
    probabilities = (logits / temperature[:, None]).softmax(-1)
    if bool((top_p < 1).any()):
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        outside = before >= top_p[:, None]
        probabilities = probabilities.masked_fill(outside.gather(-1, order.argsort(-1)), 0.0)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    goal = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, goal, right=True).squeeze(-1)


class RowStops(StoppingCriteria):  # type: ignore[misc]  # transformers ships no types
    """Ends each row at its own limit, stop strings or end of sequence, and remembers where.

    Unlike transformers' ``StopStringCriteria`` it has stop strings for each row and does not look into the prompt.

    Args:
        tokenizer: of the model.
        begin: length of the padded prompts.
        limits: tokens to write, one for each row.
        stop: stop strings, one tuple for each row.
        eos: ids that end a sequence.

    Attributes:
        lengths: tokens that each row wrote, the last one included; its limit while it is not over.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        begin: int,
        limits: Sequence[int],
        stop: Sequence[Sequence[str]],
        eos: Sequence[int],
    ) -> None:
        self.tokenizer, self.begin, self.stop, self.eos = tokenizer, begin, stop, frozenset(eos)
        self.lengths = list(limits)
        self.over = [False] * len(limits)
        # A token is at least one byte, so a stop string spans at most as many as it has bytes.
        self.tails = [max((len(string.encode()) for string in strings), default=0) + TAIL for strings in stop]

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """Which rows are over, ``(batch,)`` bool."""
        written = input_ids.shape[1] - self.begin
        deepest = min(written, max(self.tails))
        tails = input_ids[:, input_ids.shape[1] - deepest :].tolist()
        for row, over in enumerate(self.over):
            if not over and (
                tails[row][-1] in self.eos or written >= self.lengths[row] or self._stopped(row, tails[row])
            ):
                self.over[row], self.lengths[row] = True, written
        return torch.tensor(self.over, device=input_ids.device)

    def _stopped(self, row: int, tail: Sequence[int]) -> bool:
        if not self.stop[row]:
            return False
        text = self.tokenizer.decode(tail[-self.tails[row] :], skip_special_tokens=True)
        return any(string in text for string in self.stop[row])
