"""A language model that answers with demonstrations, each read apart and then summed out.

    sequence   p(y | x) = sum_k p(z_k | x) prod_t p(y_t | y_<t, x, z_k)
    token      p(y | x) = prod_t sum_k p(z_k | x) p(y_t | y_<t, x, z_k)
    concat     p(y | x) = prod_t p(y_t | y_<t, z_K .. z_1, x)

A demonstration stands before the question. Where both do not fit, its beginning is cut and never the question.

Source: Lewis et al., "Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks", arXiv:2005.11401, section 2.1,
with demonstrations for documents. Answers in sequence mode are its "thorough decoding".
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from headwater.adapt.demonstrations import Shown
from headwater.core.objective import Loss
from headwater.core.order import VirtualIndex
from headwater.core.rng import derive_seed
from headwater.modalities.text.class_inputs import length_batches
from headwater.modalities.text.classes import keeps_logits
from headwater.modalities.text.objectives import IGNORED
from headwater.modalities.text.pairs import Encoded, Kind, PairModel, Pairs, pad_pairs
from headwater.modalities.text.score import scoring

__all__ = [
    "DemonstrationStream",
    "MarginalObjective",
    "MarginalisedLM",
    "MixDemonstrations",
    "Mode",
    "demonstration_batch",
    "marginal_log_likelihood",
    "target_log_probs",
]

Mode = Literal["sequence", "token", "concat"]


def target_log_probs(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token after each demonstration.

    Args:
        model: a causal or encoder-decoder language model, without soft prompts before its tokens.
        batch: ``input_ids`` and ``attention_mask`` ``(batch, K, time)``; ``labels`` of that shape under a causal model,
            ``(batch, target time)`` for an encoder-decoder.

    Returns:
        ``(batch, K, target time)``, and which tokens there are, ``(batch, target time)`` bool.
    """
    rows, K, time = batch["input_ids"].shape
    inputs = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
    if batch["labels"].dim() == 3:
        labels = batch["labels"].flatten(0, 1)
        there = labels != IGNORED
        begin, longest = there.int().argmax(1), int(there.sum(1).max())
        places = begin[:, None] + torch.arange(longest, device=labels.device)
        own = torch.arange(len(labels), device=labels.device)[:, None]
        beyond = places >= time
        places = places.clamp(max=time - 1)
        labels = labels[own, places].masked_fill(beyond, IGNORED)
        if keeps_logits(model):
            # Scores over the vocabulary are the largest tensor: none is computed where no row has a target.
            kept, before = torch.unique(places - 1, return_inverse=True)
            logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits[own, before]
        else:
            logits = model(**inputs, use_cache=False).logits[own, places - 1]
    else:
        shared = batch["labels"]
        labels = shared[:, None].expand(-1, K, -1).flatten(0, 1)
        inner = getattr(model, "module", model)  # module: under DDP
        decoder: Any = inner.prepare_decoder_input_ids_from_labels  # Any: not declared on nn.Module
        logits = model(**inputs, decoder_input_ids=decoder(labels=labels)).logits
    nats = nn.functional.cross_entropy(
        logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
    ).view(rows, K, -1)
    return -nats, (labels != IGNORED).view(rows, K, -1)[:, 0]


def marginal_log_likelihood(log_probs: Tensor, mask: Tensor, log_weights: Tensor, mode: Mode = "sequence") -> Tensor:
    """Log p(y | x) over demonstrations.

    Args:
        log_probs: log p(y_t | y_<t, x, z_k), ``(batch, K, target time)``.
        mask: which tokens count, ``(batch, target time)``.
        log_weights: log p(z_k | x), ``(batch, K)``.
        mode: ``concat`` has K = 1, where all modes are one.

    Returns:
        ``(batch,)``, in nats.
    """
    counted = log_probs * mask[:, None]
    if mode == "token":
        return ((log_weights[:, :, None] + counted).logsumexp(1) * mask).sum(1)
    return (log_weights + counted.sum(2)).logsumexp(1)


@dataclass(frozen=True)
class MarginalObjective:
    """Minus the log-likelihood of targets, demonstrations summed out.

    Attributes:
        mode: how.
    """

    mode: Mode = "sequence"
    unit: str = "nats/token"

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """Batch: as ``target_log_probs`` takes it, and ``log_weights`` ``(batch, K)``."""
        log_probs, mask = target_log_probs(model, batch)
        return Loss(-marginal_log_likelihood(log_probs, mask, batch["log_weights"], self.mode).sum(), mask.sum())


def demonstration_batch(
    sources: Sequence[Sequence[Sequence[int]]],
    targets: Sequence[Sequence[int]],
    log_weights: NDArray[np.float32],
    kind: Kind,
    pad: int,
) -> dict[str, Tensor]:
    """What ``MarginalObjective`` reads, of sources in tokens ``(batch, K)`` and one target each."""
    K = log_weights.shape[1]
    flat = [Encoded(list(row), list(target)) for rows, target in zip(sources, targets, strict=True) for row in rows]
    batch = {name: tensor.view(len(sources), K, -1) for name, tensor in pad_pairs(flat, kind, pad).items()}
    if kind == "seq2seq":
        batch["labels"] = batch["labels"][:, 0]
    return {**batch, "log_weights": torch.from_numpy(log_weights)}


class DemonstrationStream:
    """Batches of questions, each with its K demonstrations, which were found before; a ``BatchStream``.

    Args:
        sources: in tokens, one with each demonstration, ``(n, K)``.
        targets: in tokens, ``(n,)``.
        log_weights: ``(n, K)``.
        kind: of the model that reads them.
        rows: questions per batch; fewer where there are fewer.
        seed: of the order.
        pad: padding token.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Sequence[int]]],
        targets: Sequence[Sequence[int]],
        log_weights: NDArray[np.float32],
        kind: Kind,
        *,
        rows: int,
        seed: int,
        pad: int,
    ) -> None:
        if not len(sources):
            raise ValueError("there is no pair to learn from.")
        self.sources, self.targets, self.log_weights = sources, targets, log_weights
        self.kind, self.rows, self._pad = kind, min(rows, len(sources)), pad
        self.order = VirtualIndex(len(sources), derive_seed(seed, "order"))
        tokens = sum(len(row) + len(target) for shown, target in zip(sources, targets, strict=True) for row in shown)
        self.tokens_per_row = math.ceil(tokens / len(sources))
        digest = hashlib.sha256(repr([kind, self.rows, seed, list(sources), list(targets)]).encode())
        digest.update(log_weights.tobytes())
        self.fingerprint = digest.hexdigest()

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Rows [start, stop) of batch ``step``, and ``row`` ``(batch,)``."""
        _, items = self.order(step * self.rows + np.arange(start, self.rows if stop is None else stop))
        batch = demonstration_batch(
            [self.sources[item] for item in items],
            [self.targets[item] for item in items],
            self.log_weights[items],
            self.kind,
            self._pad,
        )
        return {**batch, "row": torch.from_numpy(items)}


class MixDemonstrations(LogitsProcessor):  # type: ignore[misc]  # transformers is followed by no type checker here
    """Gives the K rows of a question, beam by beam, the mixture of their next tokens' probabilities.

    Args:
        log_weights: ``(questions, K)``; the rows of a question stand together.
    """

    def __init__(self, log_weights: Tensor) -> None:
        self.log_weights = log_weights

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits ``(questions * K * beams, vocabulary)`` to log-probabilities."""
        questions, K = self.log_weights.shape
        log_probs = scores.float().log_softmax(-1).view(questions, K, -1, scores.shape[-1])
        mixed = (self.log_weights[:, :, None, None] + log_probs).logsumexp(1, keepdim=True)
        return mixed.expand_as(log_probs).reshape(scores.shape)


@dataclass(frozen=True, eq=False)
class MarginalisedLM:
    """A reader that sees each demonstration apart, or all of them in a row.

    Attributes:
        reader: any causal or encoder-decoder language model; ``max_source`` holds demonstration and question.
        mode: see the module.
    """

    reader: PairModel
    mode: Mode = "sequence"

    @property
    def objective(self) -> MarginalObjective:
        """What training minimises."""
        return MarginalObjective(self.mode)

    def encode(self, sources: Sequence[str], shown: Shown) -> tuple[list[list[list[int]]], NDArray[np.float32]]:
        """Tokens of each question with each demonstration, ``(n, K)``, and the logs of their weights.

        With ``concat`` K is 1, and the best demonstration stands next to the question.
        """
        reader = self.reader
        questions, before = reader.encode_sources(sources), _leading(reader.tokenizer, reader.kind)
        known: dict[str, list[int]] = {"": []}
        new = sorted({text for texts in shown.texts for text in texts} - set(known))
        if new:
            ids = reader.tokenizer(new, add_special_tokens=False, verbose=False)["input_ids"]
            known |= dict(zip(new, ids, strict=True))
        demonstrations = [[known[text] for text in texts] for texts in shown.texts]
        weights = shown.log_weights
        if self.mode == "concat":
            demonstrations = [[[token for ids in reversed(each) for token in ids]] for each in demonstrations]
            weights = np.zeros((len(questions), 1), np.float32)
        rows = []
        for question, each in zip(questions, demonstrations, strict=True):
            room = reader.max_source - len(question)
            rows.append([question[:before] + ids[max(0, len(ids) - room) :] + question[before:] for ids in each])
        if any(map(any, demonstrations)) and all(len(question) >= reader.max_source for question in questions):
            raise ValueError(
                f"questions fill all {reader.max_source} tokens of max_source, so no demonstration is ever read; raise "
                "max_source, or shorten the questions."
            )
        return rows, weights

    def stream(self, pairs: Pairs, shown: Shown, *, rows: int, seed: int) -> DemonstrationStream:
        """Batches of pairs to learn from."""
        sources, weights = self.encode(pairs.sources, shown)
        targets = self.reader.encode_targets(pairs.targets)
        return DemonstrationStream(
            sources, targets, weights, self.reader.kind, rows=rows, seed=seed, pad=self.reader.pad
        )

    def nats(self, pairs: Pairs, shown: Shown, *, batch_rows: int = 64) -> NDArray[np.float64]:
        """Negative log-likelihood of each target per token of it, EOS included, ``(n,)``."""
        sources, weights = self.encode(pairs.sources, shown)
        targets = self.reader.encode_targets(pairs.targets)
        total = self._log_likelihood(sources, targets, weights, batch_rows)
        found: NDArray[np.float64] = -total / np.array([len(target) for target in targets])
        return found

    def _log_likelihood(
        self,
        sources: Sequence[Sequence[Sequence[int]]],
        targets: Sequence[Sequence[int]],
        weights: NDArray[np.float32],
        batch_rows: int,
    ) -> NDArray[np.float64]:
        found = np.zeros(len(sources))
        lengths = [max(map(len, each)) for each in sources]
        with scoring(self.reader.model) as device:
            for chosen in length_batches(lengths, max(1, batch_rows // weights.shape[1])) if lengths else []:
                batch = demonstration_batch(
                    [sources[row] for row in chosen],
                    [targets[row] for row in chosen],
                    weights[chosen],
                    self.reader.kind,
                    self.reader.pad,
                )
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                log_probs, mask = target_log_probs(self.reader.model, batch)
                marginal = marginal_log_likelihood(log_probs, mask, batch["log_weights"], self.mode)
                found[chosen] = marginal.double().cpu().numpy()
        return found

    def answers(self, sources: Sequence[str], shown: Shown, *, num_beams: int = 1, batch_rows: int = 64) -> list[str]:
        """What is written to each question.

        Sequence mode writes one answer after each demonstration, and gives the one that is likeliest over all. Token
        mode mixes the demonstrations at every token.

        Args:
            sources: none is fine.
            shown: their demonstrations.
            num_beams: 1 is greedy.
            batch_rows: rows in one forward pass, a question with a demonstration each.
        """
        encoded, weights = self.encode(sources, shown)
        if self.mode == "token":
            return self._mixed(encoded, weights, num_beams, batch_rows)
        flat = [
            (n, row) for n, each in enumerate(encoded) for row, w in zip(each, weights[n], strict=True) if w > -np.inf
        ]
        written = self.reader.written([row for _, row in flat], num_beams=num_beams, batch_size=batch_rows)
        candidates: list[dict[str, None]] = [{} for _ in encoded]  # in the order of the demonstrations
        for (question, _), text in zip(flat, written, strict=True):
            candidates[question][text] = None
        open_ = [(n, text) for n, texts in enumerate(candidates) if len(texts) > 1 for text in texts]
        likelihood = self._log_likelihood(
            [encoded[n] for n, _ in open_],
            self.reader.encode_targets([text for _, text in open_]),
            weights[[n for n, _ in open_]],
            batch_rows,
        )
        best: dict[int, tuple[float, str]] = {}
        for (question, text), value in zip(open_, likelihood, strict=True):
            if question not in best or value > best[question][0]:
                best[question] = (float(value), text)
        return [best[n][1] if n in best else next(iter(texts)) for n, texts in enumerate(candidates)]

    def _mixed(
        self,
        encoded: Sequence[Sequence[Sequence[int]]],
        weights: NDArray[np.float32],
        num_beams: int,
        batch_rows: int,
    ) -> list[str]:
        reader, K = self.reader, weights.shape[1]
        model: Any = reader.model  # Any: generate is not declared on nn.Module
        written = [""] * len(encoded)
        lengths = [max(map(len, each)) for each in encoded]
        with scoring(model) as device:
            for chosen in length_batches(lengths, max(1, batch_rows // K)) if lengths else []:
                # On the left, so that all rows write at the same place.
                ids, mask = _left_padded([row for n in chosen for row in encoded[n]], reader.pad)
                output = model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=reader.max_target,
                    num_beams=num_beams,
                    do_sample=False,
                    pad_token_id=reader.pad,
                    eos_token_id=reader.tokenizer.eos_token_id,
                    logits_processor=LogitsProcessorList(
                        [MixDemonstrations(torch.from_numpy(weights[chosen]).to(device))]
                    ),
                )
                begin = ids.shape[1] if reader.kind == "causal" else 0
                texts = reader.tokenizer.batch_decode(output[::K, begin:], skip_special_tokens=True)
                for n, text in zip(chosen, texts, strict=True):
                    written[n] = text.strip()
        return written


def _leading(tokenizer: PreTrainedTokenizerBase, kind: Kind) -> int:
    """Special tokens that stand before a source."""
    if kind == "causal":
        return 1
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return int(tokenizer("a")["input_ids"].index(plain[0]))


def _left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)
