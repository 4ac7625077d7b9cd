"""How well a language model predicts text, in units that compare, and what its features know.

    bits per byte = sum over documents of -log2 p(document) / sum of their UTF-8 bytes

Bytes do not depend on the tokenizer, so models with different vocabularies stand on one axis. Each document is scored
alone, after a start token, so that its first token is predicted too and every byte counts exactly once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwater.modalities.text.docs import Document
from headwater.modalities.text.packing import mask_tokens

__all__ = [
    "ChoiceScores",
    "Probe",
    "Scored",
    "bits_per_byte",
    "choice_scores",
    "linear_probe",
    "masked_bits",
    "position_limit",
    "scoring",
    "start_token",
]

IGNORED = -100


@dataclass(frozen=True, eq=False)
class Scored:
    """Negative log-likelihoods of documents.

    Attributes:
        nats: ``(documents,)`` float64, the whole document's.
        counts: ``(documents,)`` int64, how many units each is a sum over.
        unit: what ``counts`` counts.
    """

    nats: NDArray[np.float64]
    counts: NDArray[np.int64]
    unit: Literal["byte", "masked token"]

    @property
    def bits_per_unit(self) -> float:
        """Total bits by total units.

        Raises:
            ValueError: there is no unit at all.
        """
        total = int(self.counts.sum())
        if total == 0:
            raise ValueError(f"nothing was scored: {len(self.counts)} documents with 0 {self.unit}s.")
        return float(self.nats.sum()) / math.log(2) / total

    @property
    def bits_per_byte(self) -> float:
        """``bits_per_unit``, where the unit is the byte.

        Raises:
            ValueError: the unit is another one, which does not compare across tokenizers.
        """
        if self.unit != "byte":
            raise ValueError(
                f"these scores count {self.unit}s, not bytes; use bits_per_unit, within one tokenizer only."
            )
        return self.bits_per_unit


@dataclass(frozen=True)
class _Segment:
    """A piece of a document that fits the model: what goes in, and what is to be predicted at each place."""

    document: int
    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]  # same length; IGNORED where nothing is


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    docs: Iterable[Document | str],
    *,
    heads: Sequence[Sequence[int]] | None = None,
    window: int | None = None,
    batch_size: int = 16,
    device: str | torch.device | None = None,
) -> Scored:
    """Score documents under a causal model, each alone.

    A start token (BOS, else EOS) goes first. A document longer than ``window`` slides through it by half a window, and
    only the new half is scored, so a token sees at least ``window - window // 2 - 1`` tokens before it. A head, such as
    the source of the document, stands in front of every window, after the start token.

    Args:
        model: a causal language model; run in evaluation mode and given back in its own.
        tokenizer: the model's.
        docs: documents; an empty one scores 0 nats over 0 bytes.
        heads: tokens that are given before each document and not scored themselves; none by default.
        window: tokens the model sees at once, >= 2. None: the model's number of positions, or 1024 where it has none.
        batch_size: segments per forward pass; the sums do not depend on it (beyond rounding).
        device: where inputs go; None: where the model is.

    Returns:
        Scores in the order of ``docs``; the end-of-sequence token is not scored.

    Raises:
        ValueError: the tokenizer has neither BOS nor EOS, ``window`` is below 2 or too small for a head, or there are
            not as many heads as documents.
    """
    start = start_token(tokenizer)
    window = position_limit(model, window)
    texts = _texts(docs)
    given = [()] * len(texts) if heads is None else heads
    if len(given) != len(texts):
        raise ValueError(f"there must be one head for each document; got {len(given)} for {len(texts)}.")
    segments = [
        segment
        for document, (head, ids) in enumerate(zip(given, _encode(tokenizer, texts), strict=True))
        for segment in _causal_segments(
            document, np.concatenate([[start], head, ids]).astype(np.int64), window, kept=1 + len(head) if head else 0
        )
    ]
    nats, _ = _score(model, segments, len(texts), tokenizer, batch_size, device)
    return Scored(nats, np.array([len(text.encode()) for text in texts], dtype=np.int64), "byte")


def _causal_segments(document: int, ids: NDArray[np.int64], window: int, kept: int = 0) -> Iterator[_Segment]:
    """``ids[:kept]`` stand in front of every segment and are not scored."""
    room = window - kept
    if room < 2:
        raise ValueError(f"window {window} leaves no room for a document after a head of {kept} tokens.")
    scored = max(kept, 1)  # ids[:scored] need no score any more; the start token never does
    begin = kept
    while scored < len(ids):
        end = min(begin + room, len(ids))
        inputs = np.concatenate([ids[:kept], ids[begin:end]])
        targets = np.full(len(inputs), IGNORED, dtype=np.int64)
        targets[kept + scored - 1 - begin : -1] = ids[scored:end]  # the place before a token predicts it
        yield _Segment(document, inputs, targets)
        scored, begin = end, begin + room // 2


def masked_bits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    docs: Iterable[Document],
    seed: int = 0,
    *,
    window: int | None = None,
    batch_size: int = 16,
    probability: float = 0.15,
    device: str | torch.device | None = None,
) -> Scored:
    """Score documents under a masked model, on masks that are fixed by (seed, document id).

    Two models with one tokenizer thus predict the same tokens at the same places. Documents longer than ``window`` are
    cut into pieces; each piece stands between CLS and SEP where the tokenizer has them.

    Args:
        model: a masked language model.
        tokenizer: the model's.
        docs: documents.
        seed: of the masks.
        window: tokens the model sees at once. None: the model's number of positions, or 1024.
        batch_size: pieces per forward pass.
        probability: share of tokens that are predicted; 80 % of them masked, 10 % replaced, 10 % left.
        device: where inputs go; None: where the model is.

    Returns:
        Scores in the order of ``docs``, per masked token.

    Raises:
        ValueError: the tokenizer has no mask token, or ``window`` leaves no room between CLS and SEP.
    """
    window = position_limit(model, window)
    first, last = ([] if token is None else [token] for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    room = window - len(first) - len(last)
    if room < 1:
        raise ValueError(f"window must leave room between the special tokens; got {window}.")
    docs = list(docs)
    segments = []
    for document, (doc, ids) in enumerate(zip(docs, _encode(tokenizer, [d.text for d in docs]), strict=True)):
        key = int.from_bytes(hashlib.blake2b(doc.id.encode(), digest_size=8).digest(), "little", signed=True)
        inputs, labels = mask_tokens(ids[None], [key], tokenizer, seed=seed, probability=probability)
        for begin in range(0, len(ids), room):
            piece = slice(begin, begin + room)
            border = [IGNORED] * len(first), [IGNORED] * len(last)
            segments.append(
                _Segment(
                    document,
                    np.array([*first, *inputs[0, piece], *last], dtype=np.int64),
                    np.array([*border[0], *labels[0, piece], *border[1]], dtype=np.int64),
                )
            )
    nats, counts = _score(model, segments, len(docs), tokenizer, batch_size, device)
    return Scored(nats, counts, "masked token")


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a text is predicted from: BOS, else EOS.

    Raises:
        ValueError: the tokenizer has neither.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError("a bos or eos token is needed to predict a text's first token from.")
    return int(start)


def position_limit(model: PreTrainedModel, window: int | None = None) -> int:
    """How many tokens the model sees at once: ``window``, else its number of positions, else 1024.

    Raises:
        ValueError: fewer than 2.
    """
    if window is None:
        window = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1024)
    if window < 2:
        raise ValueError(f"window must be at least 2; got {window}.")
    return window


def _texts(docs: Iterable[Document | str]) -> list[str]:
    return [doc if isinstance(doc, str) else doc.text for doc in docs]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[NDArray[np.int64]]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [np.array(ids, dtype=np.int64) for ids in encoded]


def _score(
    model: PreTrainedModel,
    segments: Sequence[_Segment],
    documents: int,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    device: str | torch.device | None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return nats and number of targets per document."""
    nats, counts = np.zeros(documents), np.zeros(documents, dtype=np.int64)
    with scoring(model) as home:
        for batch, tensors in _batches(segments, tokenizer, batch_size, device or home):
            logits = model(**tensors).logits
            targets = _pad([s.targets for s in batch], IGNORED).to(logits.device)
            wanted = targets != IGNORED
            losses = F.cross_entropy(logits[wanted].float(), targets[wanted], reduction="none").double().cpu().numpy()
            owners = np.repeat([s.document for s in batch], wanted.sum(dim=1).cpu().numpy())
            np.add.at(nats, owners, losses)
            np.add.at(counts, owners, 1)
    return nats, counts


@contextmanager
def scoring(model: PreTrainedModel) -> Iterator[torch.device]:
    """Switch to evaluation mode without gradients, and back; yields the model's device."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield model.device
    finally:
        model.train(training)


def _batches(
    segments: Sequence[_Segment],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    device: str | torch.device,
) -> Iterator[tuple[list[_Segment], dict[str, Tensor]]]:
    """Yield segments of similar length together, padded on the right."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1; got {batch_size}.")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # masked out, so any id will do
    by_length = sorted(segments, key=lambda segment: -len(segment.inputs))  # longest first: running out shows at once
    for begin in range(0, len(by_length), batch_size):
        batch = by_length[begin : begin + batch_size]
        input_ids = _pad([s.inputs for s in batch], pad)
        attention_mask = _pad([np.ones(len(s.inputs), dtype=np.int64) for s in batch], 0)
        yield batch, {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}


def _pad(arrays: Sequence[NDArray[np.int64]], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(a) for a in arrays], batch_first=True, padding_value=value)


@dataclass(frozen=True, eq=False)
class Probe:
    """What a linear classifier reads off frozen features.

    Attributes:
        accuracy: ``(seeds,)``, on the texts that the seed did not train on.
        regularisation: ``(seeds,)``, the chosen C.
        test_items: for each seed, the indices of its test texts.
        correct: for each seed, whether each of them was right; for paired comparisons.
    """

    accuracy: NDArray[np.float64]
    regularisation: NDArray[np.float64]
    test_items: list[NDArray[np.int64]]
    correct: list[NDArray[np.bool_]]


def linear_probe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    labels: ArrayLike,
    n_train: int,
    seeds: Sequence[int],
    *,
    window: int | None = None,
    batch_size: int = 16,
    device: str | torch.device | None = None,
) -> Probe:
    """Classify texts by logistic regression on their mean-pooled last hidden state.

    For each seed, ``n_train`` texts are drawn in the proportion of the classes; features are standardised on them and C
    is chosen among 0.01, 0.1, 1, 10 by 3-fold cross-validation inside them. All other texts are the test.

    Args:
        model: causal, masked, or an encoder-decoder (its encoder is read).
        tokenizer: the model's.
        texts: one string each, cut to ``window`` tokens.
        labels: ``(texts,)``.
        n_train: labels used per seed.
        seeds: one draw of training texts each.
        window: None: the model's number of positions, or 1024.
        batch_size: texts per forward pass.
        device: where inputs go; None: where the model is.

    Raises:
        ValueError: lengths differ, or a class has too few texts for ``n_train`` to hold three of it.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold, train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    y = np.asarray(labels)
    if y.shape != (len(texts),):
        raise ValueError(f"labels must have shape ({len(texts)},); got {y.shape}.")
    features = _mean_pooled(model, tokenizer, texts, position_limit(model, window), batch_size, device)
    accuracy, chosen, test_items, correct = [], [], [], []
    for seed in seeds:
        train, test = train_test_split(np.arange(len(y)), train_size=n_train, stratify=y, random_state=seed)
        classes, sizes = np.unique(y[train], return_counts=True)
        if len(classes) < len(np.unique(y)) or sizes.min() < 3:
            raise ValueError(f"n_train={n_train} leaves a class with fewer than 3 texts; raise it or merge classes.")
        search = GridSearchCV(
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
            {"logisticregression__C": [0.01, 0.1, 1.0, 10.0]},
            cv=StratifiedKFold(3, shuffle=True, random_state=seed),
        ).fit(features[train], y[train])
        right = search.predict(features[test]) == y[test]
        accuracy.append(right.mean())
        chosen.append(search.best_params_["logisticregression__C"])
        test_items.append(test)
        correct.append(right)
    return Probe(np.array(accuracy), np.array(chosen), test_items, correct)


def _mean_pooled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    window: int,
    batch_size: int,
    device: str | torch.device | None,
) -> NDArray[np.float32]:
    """Mean over tokens, special ones included, of the last hidden state: ``(texts, hidden)`` float32."""
    reader: Any = (
        model.get_encoder() if model.config.is_encoder_decoder else model
    )  # Any: encoders have no common class
    encoded = tokenizer(list(texts), truncation=True, max_length=window, return_attention_mask=False)["input_ids"]
    empty = [i for i, ids in enumerate(encoded) if not ids]
    if empty:
        raise ValueError(f"text {empty[0]} has no token; leave empty texts out.")
    segments = [_Segment(i, np.array(ids, dtype=np.int64), np.empty(0, np.int64)) for i, ids in enumerate(encoded)]
    pooled: NDArray[np.float32] | None = None
    with scoring(model) as home:
        for batch, tensors in _batches(segments, tokenizer, batch_size, device or home):
            hidden = reader(**tensors, output_hidden_states=True).hidden_states[-1].float()
            weight = tensors["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            means = ((hidden * weight).sum(dim=1) / weight.sum(dim=1)).cpu().numpy()
            if pooled is None:
                pooled = np.empty((len(texts), means.shape[1]), dtype=np.float32)
            pooled[[s.document for s in batch]] = means
    if pooled is None:
        raise ValueError("linear_probe needs at least one text.")
    return pooled


@dataclass(frozen=True, eq=False)
class ChoiceScores:
    """How a model answers prompts that have one right label.

    Attributes:
        nats: ``(prompts, labels)`` float64, negative log-likelihood of each label after each prompt, its EOS included.
        greedy: ``(prompts, labels)``, whether greedy decoding gives exactly this label and then stops.
        form: ``(prompts,)``, whether the first token decoded greedily begins a label, right or wrong.
        tokens: ``(labels,)`` int64, tokens of each label, its EOS included.
        answers: ``(prompts,)`` int64, the right label of each prompt.
    """

    nats: NDArray[np.float64]
    greedy: NDArray[np.bool_]
    form: NDArray[np.bool_]
    tokens: NDArray[np.int64]
    answers: NDArray[np.int64]

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """``(prompts,)``: 1 where the right label is the likeliest of the labels."""
        right: NDArray[np.bool_] = self.nats.argmin(axis=1) == self.answers
        return right.astype(np.float64)

    @property
    def cross_entropy(self) -> NDArray[np.float64]:
        """``(prompts,)``: nats per token of the right label, among all texts and not among the labels only."""
        nats: NDArray[np.float64] = self.nats[np.arange(len(self.answers)), self.answers] / self.tokens[self.answers]
        return nats

    @property
    def exact(self) -> NDArray[np.float64]:
        """``(prompts,)``: 1 where greedy decoding gives the right label and stops."""
        return self.greedy[np.arange(len(self.answers)), self.answers].astype(np.float64)


def choice_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: ArrayLike,
    labels: Sequence[str],
    *,
    window: int | None = None,
    batch_size: int = 16,
    device: str | torch.device | None = None,
) -> ChoiceScores:
    """Score every label after every prompt under a causal model.

    A sequence is start token (BOS, else EOS), prompt, label, EOS. Prompt and label are tokenised apart: a space between
    them belongs to the label. A prompt that does not fit loses its beginning.

    Args:
        model: a causal language model; run in evaluation mode and given back in its own.
        tokenizer: the model's.
        prompts: one string each; none at all gives empty arrays.
        answers: ``(prompts,)``, index of the right label.
        labels: the texts to choose from, two or more.
        window: tokens the model sees at once. None: the model's number of positions, or 1024.
        batch_size: sequences per forward pass.
        device: where inputs go; None: where the model is.

    Raises:
        ValueError: fewer than two labels, one twice, one without a token or longer than the window; wrong ``answers``;
            no EOS token.
    """
    chosen = np.asarray(answers, dtype=np.int64).reshape(-1)
    if len(set(labels)) != len(labels) or len(labels) < 2:
        raise ValueError(f"labels must be two texts or more, each once; got {list(labels)}.")
    if chosen.shape != (len(prompts),) or (len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(labels)):
        raise ValueError(f"answers must hold one index below {len(labels)} for each of {len(prompts)} prompts.")
    if tokenizer.eos_token_id is None:
        raise ValueError("choice_scores needs an eos token, which ends an answer.")
    start = start_token(tokenizer)
    window = position_limit(model, window)
    endings = [np.append(ids, tokenizer.eos_token_id) for ids in _encode(tokenizer, list(labels))]
    for label, ending in zip(labels, endings, strict=True):
        if not 2 <= len(ending) < window:
            raise ValueError(f"label {label!r} has {len(ending) - 1} tokens; it needs 1 to {window - 2} to be scored.")
    segments = []
    for number, ids in enumerate(_encode(tokenizer, list(prompts))):
        for place, ending in enumerate(endings):
            whole = np.concatenate([[start], ids[max(0, len(ids) + len(ending) + 1 - window) :], ending])
            targets = np.full(len(whole), IGNORED, dtype=np.int64)
            targets[-len(ending) - 1 : -1] = ending
            segments.append(_Segment(number * len(labels) + place, whole.astype(np.int64), targets))
    nats, greedy = np.zeros(len(segments)), np.zeros(len(segments), dtype=np.bool_)
    first = np.zeros(len(segments), dtype=np.int64)
    with scoring(model) as home:
        for batch, tensors in _batches(segments, tokenizer, batch_size, device or home):
            logits = model(**tensors).logits
            for row, segment in enumerate(batch):
                wanted = torch.from_numpy(segment.targets != IGNORED).to(logits.device)
                answer = logits[row, : len(wanted)][wanted].float()
                right = torch.from_numpy(segment.targets).to(logits.device)[wanted]
                best = answer.argmax(dim=1)
                nats[segment.document] = float(F.cross_entropy(answer, right, reduction="sum"))
                greedy[segment.document] = bool((best == right).all())
                first[segment.document] = int(best[0])
    shape = (len(prompts), len(labels))
    opening = first.reshape(shape)[:, 0]  # the place before the label does not see the label
    form = np.isin(opening, [ending[0] for ending in endings])
    tokens = np.array([len(ending) for ending in endings], dtype=np.int64)
    return ChoiceScores(nats.reshape(shape), greedy.reshape(shape), form, tokens, chosen)
