"""What a continual recipe reads: labelled texts or images, as they are or as features of a frozen encoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from headwater.continual.streams import ClassStream, Samples, StreamData
from headwater.core.order import permutation
from headwater.core.recipe import DataRef, ModelRef, Spec
from headwater.core.rng import derive_seed
from headwater.modalities.text import labelled
from headwater.modalities.text.labelled import DOCSTRINGS, MINILM, text_array
from headwater.modalities.vision.digits import Gap, digits
from headwater.modalities.vision.labelled import encode_images, open_labelled_images

if TYPE_CHECKING:
    from headwater.modalities.features import FeatureStore

__all__ = [
    "DOCSTRINGS",
    "MINILM",
    "StreamSpec",
    "digits_data",
    "docstring_data",
    "encode_texts",
    "load_stream_data",
    "per_class_subset",
]


class StreamSpec(Spec):
    """What arrives, in which order, in how many tasks."""

    modality: Literal["text", "image"] = Field(default="text", description="what the samples are")
    data: DataRef = Field(
        default=DataRef(name=DOCSTRINGS),
        description="labelled training samples; the builtin brings its own test and validation",
    )
    test: DataRef | None = Field(
        default=None, description="labelled test samples; required unless `data` is the builtin"
    )
    validation: DataRef | None = Field(default=None, description="labelled samples for choosing hyperparameters")
    increment: int = Field(default=4, gt=0, description="classes per task; the last task takes what remains")
    init: int | None = Field(default=None, gt=0, description="classes of the first task; `increment` by default")
    tasks: int | None = Field(default=None, gt=0, description="keep only the first so many tasks")
    order: Literal["seed", "pilot", "sorted"] = Field(
        default="seed",
        description="order of classes: drawn from the recipe's seed; LAMDA-PILOT's for it (usually 1993); by name",
    )
    scenario: Literal["class", "task"] = Field(
        default="class", description="`task` tells the task at inference and lets only its classes compete"
    )
    per_class: int | None = Field(
        default=None,
        gt=0,
        description="keep at most so many training samples of each class, drawn from the recipe's seed",
    )

    @model_validator(mode="after")
    def _test_given(self) -> Self:
        if self.data.name == DOCSTRINGS:
            if self.modality != "text":
                raise ValueError(f"{DOCSTRINGS!r} holds texts; name labelled images in `data` and `test`")
            if self.test is not None or self.validation is not None:
                raise ValueError(
                    f"{DOCSTRINGS!r} brings its own test and validation texts; leave `test` and `validation` out"
                )
        elif self.test is None and self.data.kind == "builtin":
            raise ValueError(
                f"{self.data.name!r} has no test of its own; there is {DOCSTRINGS!r}, which has, or name a `test`"
            )
        elif self.test is None:
            raise ValueError("`test` is missing: name the labelled samples that the stream is evaluated on")
        return self

    def cut(self, data: StreamData, *, seed: int) -> ClassStream:
        """The stream of this spec.

        Raises:
            StreamError: see ``ClassStream``.
        """
        order: Sequence[int] | None = None
        if self.order == "pilot":
            order = ClassStream.from_pilot(data, 0, self.increment, seed=seed).class_order
        elif self.order == "sorted":
            order = range(len(data.label_names))
        if self.per_class is not None:
            data = replace(data, train=per_class_subset(data.train, self.per_class, seed))
        return ClassStream(
            data,
            increments=self.increment,
            init=self.init,
            class_order=order,
            tasks=self.tasks,
            scenario=self.scenario,
            seed=seed,
        )


def per_class_subset(samples: Samples, count: int, seed: int) -> Samples:
    """At most ``count`` samples of each class, in their old order; a smaller count takes a subset of a larger one's."""
    drawn = permutation(derive_seed(seed, "per class"), 0, len(samples))
    by_class = drawn[np.argsort(samples.labels[drawn], kind="stable")]
    _, starts, sizes = np.unique(samples.labels[by_class], return_index=True, return_counts=True)
    rank = np.arange(len(by_class)) - np.repeat(starts, sizes)
    return samples.take(np.sort(by_class[rank < count]))


def load_stream_data(spec: StreamSpec, encoder: ModelRef | None, *, max_tokens: int | None = 128) -> StreamData:
    """Read the labelled samples; with an encoder, as its features, computed once and cached.

    Args:
        spec: what to read.
        encoder: a frozen encoder; without one the inputs are the texts, or images as encoded files.
        max_tokens: tokens of each text that the encoder reads; ``None`` for as many as it can.

    Raises:
        StreamError: a test or validation label that no training sample has.
        CorpusError: nothing there to read.
    """
    samples = docstring_data() if spec.data.name == DOCSTRINGS else _labelled(spec)
    if encoder is None:
        return samples
    if spec.modality == "image":
        return _encoded(samples, lambda images: encode_images(images, encoder)[0])
    return encode_texts(samples, encoder, max_tokens=max_tokens)


def docstring_data(packages: Sequence[str] | None = None, *, per_class: int = 200) -> StreamData:
    """Docstrings labelled with their package, its name masked; one split for every seed, so features are cached once.

    Args:
        packages: the classes; ``None`` takes those of a fixed list that are installed, about 30.
        per_class: docstrings of each, of which 60 % are for training and 10 % for validation.

    Raises:
        CorpusError: see ``docstring_dataset``.
    """
    from headwater.modalities.text.docstrings import docstring_dataset

    dataset = docstring_dataset("package", packages, per_class=per_class)
    parts = [Samples(text_array(side.texts), side.labels) for side in (dataset.train, dataset.test, dataset.validation)]
    return StreamData(parts[0], parts[1], parts[2], tuple(dataset.label_names), _fingerprint(parts))


def _labelled(spec: StreamSpec) -> StreamData:
    from headwater.modalities.text.sources import open_labelled

    read = {}
    for role, ref in (("train", spec.data), ("test", spec.test), ("validation", spec.validation)):
        if ref is not None:
            opened = open_labelled_images if spec.modality == "image" else open_labelled
            inputs, labels = opened(ref, role=f"stream.{role}")
            read[role] = (text_array(inputs), labels)
    data = StreamData.from_labels(read["train"], read["test"], read.get("validation"))
    parts = [data.train, data.test, *([data.validation] if data.validation is not None else [])]
    return replace(data, fingerprint=_fingerprint(parts))


def _fingerprint(parts: Sequence[Samples]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        inputs = [i if isinstance(i, str) else hashlib.sha256(i).hexdigest() for i in part.inputs.tolist()]
        digest.update(json.dumps([inputs, part.labels.tolist()]).encode())
    return digest.hexdigest()


def encode_texts(data: StreamData, encoder: ModelRef, *, max_tokens: int | None = 128) -> StreamData:
    """The same samples with features of a frozen encoder as inputs, computed once and kept in the user cache.

    Args:
        data: inputs are texts.
        encoder: a text model, or ``headwater:minilm``.
        max_tokens: tokens of each text that it reads; ``None`` for as many as it can.

    Raises:
        ValueError: see ``extract_features``.
    """
    return _encoded(data, lambda texts: labelled.encode_texts(texts, encoder, max_tokens=max_tokens).store)


def _encoded(data: StreamData, encode: Callable[[list[Any]], FeatureStore]) -> StreamData:  # Any: texts or images
    parts = [part for part in (data.train, data.test, data.validation) if part is not None]
    store = encode([item for part in parts for item in part.inputs])
    borders = np.cumsum([len(part) for part in parts])[:-1]
    features = [np.asarray(piece) for piece in np.split(store.X, borders)]
    train, test, *validation = [replace(part, inputs=piece) for part, piece in zip(parts, features, strict=True)]
    fingerprint = hashlib.sha256(f"{data.fingerprint} {store.fingerprint}".encode()).hexdigest()
    return StreamData(train, test, validation[0] if validation else None, data.label_names, fingerprint)


def digits_data(gap: Gap = "none") -> StreamData:
    """Twenty classes of 8 x 8 images, ``(n, 64)`` float32: scikit-learn's digits turned by 270 degrees, and mirrored.

    ``modalities.vision.digits.digits_backbone`` has seen other images of them, at 0, 90 and 180 degrees.

    Args:
        gap: ``invert_noise`` puts the images further from those: ink and paper exchanged, Gaussian noise added.
    """
    read = {part: digits(part, ("rot270", "mirror"), gap) for part in ("train", "test", "validation")}
    train, test, validation = (Samples(part.images, part.labels) for part in read.values())
    return StreamData(train, test, validation, read["train"].label_names, _array_fingerprint([train, test, validation]))


def _array_fingerprint(parts: Sequence[Samples]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.inputs.tobytes() + part.labels.tobytes())
    return digest.hexdigest()
