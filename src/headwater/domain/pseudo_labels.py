"""Pseudo-labels: what a classifier believes of texts that nobody labelled, written to disk as it is found.

Source: Lee, "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method", ICML workshop 2013.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.core.cache import atomic_path, atomic_write_text, cache_dir, cache_key
from headwater.modalities.models import ModelError, parameter_fingerprint
from headwater.modalities.text.class_inputs import StoredInputs
from headwater.modalities.text.classes import ClassModel, class_probabilities
from headwater.modalities.text.docs import Document
from headwater.modalities.text.packing import Sequences, TokenStore, write_store
from headwater.modalities.text.prepared import fingerprint_of, tokenizer_fingerprint

if TYPE_CHECKING:
    import datasets

__all__ = ["PseudoLabelError", "agreement", "class_inputs", "confident", "pseudo_label"]

SHARD = 8192
"""Texts that are labelled and written at a time: what a stopped run repeats at most, and what memory holds."""
TOKENISED = 1024
LEAST_KEPT = 0.01


class PseudoLabelError(ValueError):
    """Pseudo-labels from which nothing can be learned."""


def class_inputs(documents: Sequence[Document], classes: ClassModel) -> StoredInputs:
    """Documents as a classifier reads them, memory-mapped from the user cache, where they are written once.

    Args:
        documents: they may exceed memory.
        classes: its ``tokenise`` decides.

    Raises:
        ModelError: a document without a token, or a classifier without a tokenizer.
    """
    tokenizer = classes.tokenizer
    if tokenizer is None:
        raise ModelError("texts are stored for classifiers with a tokenizer; this one has none.")
    about = [fingerprint_of(documents), tokenizer_fingerprint(tokenizer), classes.max_tokens, classes.reads]
    target = cache_dir("tokens") / cache_key(about)

    def batches() -> Iterator[Sequences]:
        stream = iter(documents)
        while batch := list(islice(stream, TOKENISED)):
            found = classes.tokenise([document.text for document in batch])
            for document, ids in zip(batch, found, strict=True):
                if not ids:
                    raise ModelError(f"document {document.id!r} has no token and cannot be judged; leave it out.")
            yield Sequences([len(ids) for ids in found], np.concatenate(found).astype(np.int32))

    if not (target / "store.json").exists():
        working = target.with_name(f"{target.name}.{os.getpid()}.partial")
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        write_store(batches(), end, working)
        try:
            working.rename(target)
        except OSError:  # another process was first; its tokens are the same
            shutil.rmtree(working)
    return StoredInputs(TokenStore.open(target))


def pseudo_label(
    classes: ClassModel,
    documents: Sequence[Document],
    directory: Path,
    *,
    batch_tokens: int = 16_384,
    soft: bool = False,
) -> datasets.Dataset:
    """Label texts with what a classifier believes, in order, and write that to Arrow files.

    Texts go through the model in batches of similar length. A shard is written whole or not at all; called again, the
    function goes on after the last one.

    Args:
        classes: the classifier; it is run in ``eval()``.
        documents: read a shard at a time.
        directory: for the shards, of this classifier and these documents only.
        batch_tokens: tokens per forward pass, padding included.
        soft: keep all probabilities of a text, not the largest alone.

    Returns:
        Memory-mapped: ``id``, ``text``, ``label`` (a class index that knows its name), ``confidence`` (the label's
        probability, float32) and, with ``soft``, ``probs`` ``(classes,)``.

    Raises:
        ValueError: the directory holds labels of another classifier or of other documents; or no document.
    """
    import datasets
    from datasets.arrow_writer import ArrowWriter

    inputs = class_inputs(documents, classes)
    features = {
        "id": datasets.Value("string"),
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=list(classes.labels)),
        "confidence": datasets.Value("float32"),
    }
    if soft:
        features["probs"] = datasets.List(datasets.Value("float32"), length=len(classes.labels))
    about = {
        "model": parameter_fingerprint(classes.model),
        "documents": inputs.store.fingerprint,
        "labels": list(classes.labels),
        "soft": soft,
    }
    _claim(directory, about)
    parts = []
    stream = iter(documents)
    for number, begin in enumerate(range(0, len(inputs), SHARD)):
        path = directory / f"part-{number:05d}.arrow"
        shard = list(islice(stream, SHARD))
        if not path.exists():
            probs = class_probabilities(
                classes.model, inputs[begin : begin + SHARD], pad=classes.pad, batch_tokens=batch_tokens
            )
            columns: dict[str, Any] = {  # Any: columns of several types
                "id": [document.id for document in shard],
                "text": [document.text for document in shard],
                "label": probs.argmax(1),
                "confidence": probs.max(1),
            }
            with atomic_path(path) as temporary:
                writer = ArrowWriter(path=str(temporary), features=datasets.Features(features))
                writer.write_batch({**columns, "probs": list(probs)} if soft else columns)
                writer.finalize()
        parts.append(datasets.Dataset.from_file(str(path)))
    return datasets.concatenate_datasets(parts)


def _claim(directory: Path, about: dict[str, Any]) -> None:  # Any: JSON data
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "about.json"
    if not path.exists():
        atomic_write_text(path, json.dumps(about) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name, value in about.items() if before.get(name) != value]
    if changed:
        raise ValueError(
            f"{directory} holds pseudo-labels with other {' and '.join(changed)}. Give another directory, or remove it."
        )


def confident(
    labels: ArrayLike, confidence: ArrayLike, classes: Sequence[str], *, threshold: float = 0.0, balance: bool = False
) -> NDArray[np.int64]:
    """Which pseudo-labels to learn from, in order.

    Args:
        labels: class indices, ``(n,)``.
        confidence: ``(n,)``, in [0, 1].
        classes: their names.
        threshold: labels of less confidence are left out; 0 keeps all.
        balance: then no class keeps more than an equal share of what is left; its most confident ones stay.

    Returns:
        Positions ``(kept,)`` int64, rising.

    Raises:
        PseudoLabelError: less than 1 % is left, or all that is left is of one class.

    Example:
        >>> confident([0, 0, 0, 1], [0.9, 0.5, 0.8, 0.6], ["a", "b"], balance=True).tolist()
        [0, 2, 3]
    """
    code, sure = np.asarray(labels, dtype=np.int64), np.asarray(confidence, dtype=np.float64)
    kept = np.flatnonzero(sure >= threshold)
    if not len(kept) or len(kept) < LEAST_KEPT * len(code):
        quantiles = np.quantile(sure, (0.5, 0.9, 0.99, 1.0)) if len(sure) else np.zeros(4)
        shown = ", ".join(f"{value:.3f}" for value in quantiles)
        raise PseudoLabelError(
            f"threshold {threshold} leaves {len(kept)} of {len(code)} pseudo-labels; their confidence has the "
            f"quantiles {shown} at 0.5, 0.9, 0.99 and 1. Lower the threshold."
        )
    if balance:
        most = -(-len(kept) // len(classes))
        chosen = []
        for index in range(len(classes)):
            own = kept[code[kept] == index]
            chosen.append(own[np.argsort(-sure[own], kind="stable")[:most]])
        kept = np.sort(np.concatenate(chosen))
    found = np.unique(code[kept])
    if len(found) < 2:
        raise PseudoLabelError(
            f"every pseudo-label is {classes[int(found[0])]!r}: the teacher tells nothing apart. Give it more labels "
            "or a larger share of the budget."
        )
    return kept


def agreement(a: ClassModel, b: ClassModel, texts: Sequence[str]) -> float:
    """Share of texts that two classifiers of the same labels answer alike.

    Raises:
        ValueError: their labels differ, or there is no text.
    """
    if a.labels != b.labels:
        raise ValueError(f"the classifiers answer with different labels: {a.labels} and {b.labels}.")
    return float((a.probabilities(texts).argmax(1) == b.probabilities(texts).argmax(1)).mean())
