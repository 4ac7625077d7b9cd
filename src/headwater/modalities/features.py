"""Features of any Hugging Face encoder, computed once, kept in a memory-mapped file, found again by fingerprint.

One vector for each text, image or sound. How a model's hidden states become one vector follows the kind of model
(``pooling="auto"``):

    text     the pooling that the checkpoint ships; else the last token that is not padding for decoder-only models;
             else the mean over tokens that are not padding
    image    ``pooler_output``; else the class token; else the mean over patches or positions
    audio    the mean over frames that are not padding
    dual     the projected features of the tower that the data call for

Texts and sounds are sorted by length within a shard, so that a batch holds little padding; rows come back in order.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoProcessor, PreTrainedModel

from headwater.core.cache import atomic_write_text, cache_dir
from headwater.core.rng import numpy_generator
from headwater.modalities.models import parameter_fingerprint
from headwater.modalities.vision.labelled import decode_image

__all__ = [
    "ArrayEncoder",
    "Encoder",
    "FeatureStore",
    "Modality",
    "Pooling",
    "cached_features",
    "extract_features",
    "zero_shot_weights",
]

Modality = Literal["text", "image", "audio"]
Pooling = Literal["auto", "mean", "last", "cls", "pooler"]

_Labels = tuple[NDArray[np.int64] | None, tuple[str, ...]]

_SHARD = 4096  # rows that are lost at most when an extraction is interrupted
_MAIN_INPUT: dict[str, Modality] = {
    "input_ids": "text",
    "pixel_values": "image",
    "input_values": "audio",
    "input_features": "audio",
}
_PART = {"text": "tokenizer", "image": "image_processor", "audio": "feature_extractor"}


@dataclass(frozen=True)
class FeatureStore:
    """Features of a data set, with what belongs to each row.

    Attributes:
        base: all features, ``(M, D)``, in memory or memory-mapped.
        rows: the rows of ``base`` that this store is a view of, in its order; ``None`` for all of them.
        base_labels: class index of each row of ``base``, ``(M,)`` int64; ``None`` without labels.
        base_ids: a name for each row of ``base``.
        label_names: name of each class index.
        fingerprint: of model, processor, options and data.
    """

    base: NDArray[Any]  # Any: the dtype that was asked for
    rows: NDArray[np.int64] | None
    base_labels: NDArray[np.int64] | None
    base_ids: tuple[str, ...]
    label_names: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.base) if self.rows is None else len(self.rows)

    @property
    def X(self) -> NDArray[Any]:
        """Features, ``(N, D)``. Of a subset this is a copy in memory: ``batches`` reads it piece by piece."""
        return self.base if self.rows is None else self.base[self.rows]

    @property
    def y(self) -> NDArray[np.int64] | None:
        """Class indices, ``(N,)``."""
        return self.base_labels if self.rows is None or self.base_labels is None else self.base_labels[self.rows]

    @property
    def ids(self) -> tuple[str, ...]:
        """Names of the rows."""
        return self.base_ids if self.rows is None else tuple(self.base_ids[i] for i in self.rows)

    def subset(self, index: Sequence[int] | NDArray[Any]) -> FeatureStore:
        """Return a view of some rows, by position or boolean mask; no features are read."""
        chosen = np.asarray(index)
        rows = np.arange(len(self.base)) if self.rows is None else self.rows
        return replace(self, rows=rows[chosen if chosen.size else chosen.astype(np.int64)])

    def batches(
        self, batch_size: int, shuffle: bool = False, seed: int = 0
    ) -> Iterator[tuple[NDArray[Any], NDArray[np.int64] | None]]:
        """Yield ``(X, y)`` of ``batch_size`` rows, fewer at the end; ``shuffle`` puts them in the order of ``seed``."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        order = np.arange(len(self)) if self.rows is None else self.rows
        if shuffle:
            order = numpy_generator(seed, "feature batches").permutation(order)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            # A contiguous run of a memory-mapped file is read as a slice, not row by row.
            X = self.base[start : start + batch_size] if self.rows is None and not shuffle else self.base[rows]
            yield X, None if self.base_labels is None else self.base_labels[rows]


def extract_features(
    model: nn.Module,
    data: Any,  # Any: a sequence of inputs, a mapping of columns, or a datasets.Dataset
    *,
    processor: Any = None,  # Any: tokenizers, image processors and feature extractors have no common type
    modality: Modality | Literal["auto"] = "auto",
    layer: int = -1,
    pooling: Pooling = "auto",
    transform: Callable[[Any], Any] | None = None,
    batch_size: int = 64,
    max_length: int | None = None,
    normalize: bool = False,
    dtype: Literal["float32", "float16"] = "float32",
    out: str | Path | None = None,
    device: str | torch.device | None = None,
) -> FeatureStore:
    """Compute one vector for each input with a frozen encoder, in evaluation mode.

    Args:
        model: any Hugging Face text, image or audio encoder or language model, or a dual encoder (CLIP and its like).
        data: a sequence of inputs, or columns: ``"text"``, ``"image"`` or ``"audio"``, and optionally ``"label"``
            (integers or strings) and ``"id"``. Texts are strings, images what the processor takes, sounds
            ``(samples,)`` arrays at the processor's rate or mappings with ``"array"`` and ``"sampling_rate"``.
        processor: tokenizer, image processor, feature extractor, or a processor that holds them. ``None`` opens the
            one that lies beside the checkpoint.
        modality: ``"auto"`` goes by the column, else by the model's input.
        layer: index into the hidden states; -1 is the model's output. Dual encoders have their projected output only.
        pooling: see the module; ``"cls"`` is the first position.
        transform: applied to each input before the processor. With ``out`` it must have a name or a ``repr`` that says
            what it does, since it is part of the fingerprint.
        batch_size: inputs in one forward pass.
        max_length: tokens kept of a text; ``None`` keeps what the model can read.
        normalize: scale each vector to unit length.
        dtype: of the stored features.
        out: directory to keep them in; a second call with the same fingerprint reads, and an interrupted one goes on
            at the last complete shard of 4096 rows. ``None`` keeps them in memory.
        device: where to compute; ``None`` is where the model is. The model is moved back afterwards.

    Raises:
        ValueError: an empty text or sound, or a feature that is not finite, named by its row; no data; ``out`` holds
            other features; or an option that this model cannot honour.
        TypeError: inputs of another kind than the modality's, named by row.
    """
    inputs, (codes, label_names), ids, column = _columns(data)
    kind = _modality(model, modality, column, inputs)
    processor = _part(processor if processor is not None else _open_processor(model), kind)
    if transform is not None:
        inputs = [transform(item) for item in inputs]
    inputs = [_checked(item, kind, row, processor) for row, item in enumerate(inputs)]
    encoder = Encoder(model, processor, kind, layer=layer, pooling=pooling, max_length=max_length, normalize=normalize)
    options = [kind, layer, encoder.pooling, encoder.max_length, normalize, np.dtype(dtype).name]
    fingerprint = _fingerprint(model, processor, options, transform, inputs, codes, named=out is not None)

    def store(X: NDArray[Any]) -> FeatureStore:
        return FeatureStore(X, None, codes, ids, label_names, fingerprint)

    def shard(start: int) -> NDArray[Any]:
        part = inputs[start : start + _SHARD]
        order = sorted(range(len(part)), key=lambda i: -len(part[i])) if kind != "image" else list(range(len(part)))
        X: NDArray[Any] | None = None
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            with torch.no_grad():
                features = encoder(encoder.prepare([part[i] for i in rows])).cpu().numpy().astype(dtype)
            if not np.isfinite(features).all():
                bad = start + rows[int((~np.isfinite(features)).any(axis=1).argmax())]
                raise ValueError(f"the feature of row {bad} is not finite.")
            X = np.empty((len(part), features.shape[1]), features.dtype) if X is None else X
            X[rows] = features
        assert X is not None
        return X

    if out is not None and (found := _read(Path(out), fingerprint)) is not None:
        return store(found)
    home, training = next(model.parameters()).device, model.training
    model.eval().to(device or home)
    try:
        starts = range(0, len(inputs), _SHARD)
        if out is None:
            return store(np.concatenate([shard(start) for start in starts]))
        return store(_write(Path(out), fingerprint, len(inputs), starts, shard))
    finally:
        model.train(training).to(home)


def cached_features(
    key: str,
    model: nn.Module,
    data: Sequence[Any] | NDArray[Any],
    **options: Any,  # Any: inputs; options
) -> tuple[FeatureStore, float]:
    """``extract_features`` in the user cache: computed once a machine, also when several processes ask at a time.

    Args:
        key: one plain name that differs where weights, inputs or options do.
        model: as there, like all that follow.
        data: a sequence of inputs.
        options: passed on.

    Returns:
        The features, and the seconds that computing them took, now or then.
    """
    home = cache_dir("features", key)
    with (home / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits and then reads
        begin, computed = time.monotonic(), not (home / "manifest.json").exists()
        store = extract_features(model, list(data), out=home, **options)
        cost = home / "cost.json"
        if computed or not cost.exists():
            atomic_write_text(cost, json.dumps({"seconds": time.monotonic() - begin}))
    return store, float(json.loads(cost.read_text(encoding="utf-8"))["seconds"])


def zero_shot_weights(
    model: nn.Module, tokenizer: Any, templates: Sequence[str], label_texts: Sequence[str], **options: Any
) -> NDArray[np.float32]:
    """Turn class descriptions into a linear classifier over unit-norm features of the same model.

    The vector of a class is the mean of its unit-norm text vectors over the templates, scaled to unit length.

    Args:
        model: dual encoder or text encoder.
        tokenizer: its tokenizer or processor.
        templates: each with one ``{}`` for the description, such as ``"a photo of a {}."``.
        label_texts: a description for each class, C of them.
        options: passed to ``extract_features``.

    Returns:
        ``(C, D)``, unit norm.

    Raises:
        ValueError: there is no template, or one has no ``{}``.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv:2103.00020,
        3.1.4.
    """
    if not templates or any("{}" not in template for template in templates):
        raise ValueError(f"every template needs a {{}} for the description; got {list(templates)}.")
    texts = [template.replace("{}", text) for text in label_texts for template in templates]
    store = extract_features(model, texts, processor=tokenizer, modality="text", normalize=True, **options)
    mean = store.X.reshape(len(label_texts), len(templates), -1).astype(np.float64).mean(axis=1)
    unit: NDArray[np.float32] = (mean / np.linalg.norm(mean, axis=1, keepdims=True)).astype(np.float32)
    return unit


class Encoder(nn.Module):
    """A Hugging Face encoder from a batch of inputs to one vector each, differentiable: for training as well.

    ``prepare`` makes tensors of inputs, the call makes features of those. The model itself is used, not copied: what
    is put into it in place, such as adapters, takes part. Whether it is in evaluation mode is the caller's affair.

    Args:
        model: as in ``extract_features``; the head of one that has a head is passed by.
        processor: tokenizer, image processor, feature extractor, or a processor that holds them. ``None``: inputs are
            the model's own tensors as arrays, token ids ``(tokens,)`` or pixels ``(channels, height, width)``.
        modality: of the inputs.
        layer: index into the hidden states.
        pooling: see the module.
        max_length: tokens kept of a text; ``None`` keeps what the model can read.
        normalize: scale each vector to unit length.

    Attributes:
        model: what is called: the given one without wrapper and head.
        of_two: whether that is the encoder of an encoder-decoder.
        dual: whether it is a tower of a dual encoder.
        resolved: what pooling ``"auto"`` came to; ``None`` before the first call that tells.

    Shapes:
        ``prepare`` gives tensors ``(batch, ...)`` on the CPU; the call gives ``(batch, D)`` float32 where the model is.

    Raises:
        ValueError: ``layer`` or ``pooling`` for a dual encoder, which has its projected features only; or texts for a
            model that reads images alone.
    """

    model: Any  # Any: the forward signature differs from model to model

    def __init__(
        self,
        model: nn.Module,
        processor: Any,  # Any: tokenizers, image processors and feature extractors have no common type
        modality: Modality,
        *,
        layer: int = -1,
        pooling: Pooling = "auto",
        max_length: int | None = None,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        given: Any = model  # Any: PEFT is untyped
        bare = given.get_base_model() if hasattr(given, "get_base_model") else given
        self.dual = hasattr(bare, f"get_{modality}_features")
        if self.dual and (layer != -1 or pooling != "auto"):
            raise ValueError("a dual encoder gives its projected features; leave layer and pooling at their defaults.")
        self.of_two = False
        if not self.dual and isinstance(bare, PreTrainedModel):
            bare = bare.base_model  # without a head, whose logits nobody would read
            if modality == "text" and bare.main_input_name == "pixel_values":
                raise ValueError(f"{type(bare).__name__} reads images and no texts; a dual encoder such as CLIP does.")
            self.of_two = bool(bare.config.is_encoder_decoder)
            if self.of_two:
                bare = bare.get_encoder()
        if pooling == "auto" and modality == "text" and not self.dual:
            pooling = _text_pooling(bare)
        if modality == "text":
            max_length = _max_length(bare, processor, max_length)
        self.model = bare
        self.processor = _part(processor, modality)
        self.modality, self.layer, self.pooling = modality, layer, pooling
        self.max_length, self.normalize = max_length, normalize
        self.resolved: Pooling | None = None if pooling == "auto" else pooling

    def prepare(self, items: Sequence[Any] | NDArray[Any]) -> dict[str, Tensor]:  # Any: inputs of the modality
        """Tensors of some inputs, padded to the longest; images may be encoded files (``bytes``)."""
        if self.processor is None:
            return self._own_tensors(torch.from_numpy(np.stack(list(items))))
        items = list(items)
        if self.modality == "text":
            encoded = self.processor(
                items, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            )
        elif self.modality == "image":
            encoded = self.processor(
                [decode_image(item) if isinstance(item, bytes) else item for item in items], return_tensors="pt"
            )
        else:
            rate = getattr(self.processor, "sampling_rate", None)
            encoded = self.processor(
                items, sampling_rate=rate, padding=True, return_attention_mask=True, return_tensors="pt"
            )
        return dict(encoded)

    def _own_tensors(self, values: Tensor) -> dict[str, Tensor]:
        batch = {getattr(self.model, "main_input_name", "input_ids"): values}
        pad = getattr(self.model.config, "pad_token_id", None)
        if self.modality == "text" and pad is not None:
            batch["attention_mask"] = (values != pad).long()
        return batch

    def forward(self, batch: Mapping[str, Tensor], **options: Any) -> Tensor:  # Any: the model's own switches
        """Features of what ``prepare`` gave; ``options`` go to the model."""
        parameter = next(self.model.parameters())
        # Integers keep their dtype; pixels and waves take that of the weights.
        batch = {
            name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
            for name, value in batch.items()
        }
        if self.dual:
            output = getattr(self.model, f"get_{self.modality}_features")(**batch, **options)
            pooled = output if isinstance(output, Tensor) else output.pooler_output
        else:
            output = self.model(**batch, **options, output_hidden_states=self.layer != -1)
            pooled = self._pool(output, batch.get("attention_mask"))
        pooled = pooled.float()
        return nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled

    def _pool(self, output: Any, mask: Tensor | None) -> Tensor:
        hidden: Tensor = output.last_hidden_state if self.layer == -1 else output.hidden_states[self.layer]
        pooler: Tensor | None = getattr(output, "pooler_output", None) if self.layer == -1 else None
        pooling = self.pooling
        if pooling == "auto":
            pooling = "mean"
            if (
                self.modality == "image"
                and hidden.ndim == 3
                and any("cls_token" in n for n, _ in self.model.named_parameters())
            ):
                pooling = "cls"
            if self.modality == "image" and pooler is not None:
                pooling = "pooler"
        self.resolved = pooling
        if pooling == "pooler":
            if pooler is None:
                raise ValueError(f"{type(self.model).__name__} gives no pooler_output at layer {self.layer}.")
            return pooler.flatten(1)  # convolutional backbones leave two axes of length 1
        if hidden.ndim == 4:
            return hidden.mean(dim=(2, 3))
        if pooling == "cls":
            return hidden[:, 0]
        if mask is None or self.modality == "image":
            mask = torch.ones(hidden.shape[:2], device=hidden.device)
        elif mask.shape[1] != hidden.shape[1]:
            # Sounds: the mask counts samples, the hidden states frames.
            if not hasattr(self.model, "_get_feature_vector_attention_mask"):
                mask = torch.ones(hidden.shape[:2], device=hidden.device)
            else:
                mask = self.model._get_feature_vector_attention_mask(hidden.shape[1], mask)
        if pooling == "last":
            last = hidden.shape[1] - 1 - mask.flip(1).to(torch.int64).argmax(dim=1)
            return hidden[torch.arange(len(hidden), device=hidden.device), last]
        weight = mask.to(torch.float32)[..., None]
        return (hidden.float() * weight).sum(dim=1) / weight.sum(dim=1)


class ArrayEncoder(nn.Module):
    """Any module over arrays, behind the two calls of ``Encoder``.

    Args:
        module: from ``(batch, ...)`` float32 to features ``(batch, D)``.
    """

    model: Any  # Any: the user's own class

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.model = module

    def prepare(self, items: Sequence[Any] | NDArray[Any]) -> dict[str, Tensor]:  # Any: numbers
        """The inputs as one float32 tensor."""
        return {"inputs": torch.from_numpy(np.asarray(items, dtype=np.float32))}

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Features, ``(batch, D)``.

        Raises:
            ValueError: the module gives another shape.
        """
        parameter = next(self.model.parameters())
        features: Tensor = self.model(batch["inputs"].to(parameter.device, parameter.dtype))
        if features.ndim != 2:
            raise ValueError(f"an encoder gives one vector for each input, (batch, D); got {tuple(features.shape)}.")
        return features.float()


def _text_pooling(model: Any) -> Pooling:
    shipped = Path(str(getattr(model.config, "_name_or_path", ""))) / "1_Pooling" / "config.json"
    if shipped.is_file():
        modes: dict[str, Pooling] = {
            "pooling_mode_mean_tokens": "mean",
            "pooling_mode_cls_token": "cls",
            "pooling_mode_lasttoken": "last",
        }
        config = json.loads(shipped.read_text(encoding="utf-8"))
        wanted = [name for name, on in config.items() if name.startswith("pooling_mode_") and on is True]
        if len(wanted) == 1 and wanted[0] in modes:
            return modes[wanted[0]]
        raise ValueError(f"{shipped} asks for {wanted}, which is not one of {sorted(modes)}; give pooling.")
    config_type = type(model.config)
    decoder_only = config_type in MODEL_FOR_CAUSAL_LM_MAPPING and config_type not in MODEL_FOR_MASKED_LM_MAPPING
    return "last" if decoder_only else "mean"


def _max_length(model: Any, tokenizer: Any, asked: int | None) -> int | None:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limits = [getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None), asked]
    # Tokenizers without a limit say 1e30.
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < 1 << 40]
    return min(known, default=None)


def _columns(data: Any) -> tuple[list[Any], _Labels, tuple[str, ...], str | None]:
    """Split data into inputs, labels, names of rows and the name of the input column."""
    labels: _Labels = (None, ())
    ids: list[Any] | None = None
    column: str | None = None
    columns = getattr(data, "column_names", None) or (list(data) if isinstance(data, Mapping) else None)
    if columns is None:
        inputs = list(data)
    else:
        found = [name for name in _PART if name in columns]
        if len(found) != 1:
            raise ValueError(f"data must have one of the columns {list(_PART)}; got {list(columns)}.")
        column = found[0]
        inputs = list(data[column])
        ids = list(data["id"]) if "id" in columns else None
        declared = getattr(getattr(data, "features", {}).get("label"), "names", None)
        labels = _label_codes(list(data["label"]), declared) if "label" in columns else (None, ())
    if not inputs:
        raise ValueError("no data to extract features of.")
    if labels[0] is not None and len(labels[0]) != len(inputs):
        raise ValueError(f"{len(inputs)} inputs have {len(labels[0])} labels.")
    return inputs, labels, tuple(map(str, ids if ids is not None else range(len(inputs)))), column


def _label_codes(labels: list[Any], declared: Sequence[str] | None) -> _Labels:
    classes, codes = np.unique(np.asarray(labels), return_inverse=True)
    if classes.dtype.kind not in "iu":
        return codes.astype(np.int64), tuple(map(str, classes))
    names = declared if declared is not None else range(int(classes.max()) + 1)
    return np.asarray(labels, dtype=np.int64), tuple(map(str, names))


def _modality(model: Any, asked: str, column: str | None, inputs: list[Any]) -> Modality:
    name = asked if asked != "auto" else column
    if name is None:
        dual = hasattr(model, "get_text_features")
        first = "text" if isinstance(inputs[0], str) else "image"
        name = first if dual else _MAIN_INPUT.get(getattr(model, "main_input_name", ""), "")
    if name not in _PART:
        raise ValueError(f"cannot tell what kind of data this is ({name!r}); give modality='text', 'image' or 'audio'.")
    kind: Modality = name  # type: ignore[assignment]  # checked on the line above
    return kind


def _open_processor(model: Any) -> Any:
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise ValueError(
            "this model was not opened from a checkpoint, so there is no processor beside it; give processor."
        )
    return AutoProcessor.from_pretrained(name)


def _part(processor: Any, kind: Modality) -> Any:
    return getattr(processor, _PART[kind], None) or processor


def _checked(item: Any, kind: Modality, row: int, processor: Any) -> Any:
    if kind == "text":
        if not isinstance(item, str):
            raise TypeError(f"row {row} must be a string; got {type(item).__name__}.")
        if not item.strip():
            raise ValueError(f"row {row} is an empty text.")
    elif kind == "audio":
        if isinstance(item, Mapping):
            rate, wanted = item["sampling_rate"], getattr(processor, "sampling_rate", None)
            if wanted is not None and rate != wanted:
                raise ValueError(f"row {row} is sampled at {rate} Hz and the model reads {wanted} Hz; resample it.")
            item = item["array"]
        item = np.asarray(item, dtype=np.float32)
        if item.ndim != 1 or item.size == 0:
            raise ValueError(f"row {row} must be a sound of shape (samples,); got {item.shape}.")
    elif isinstance(item, (np.ndarray, Tensor)) and (item.ndim not in (2, 3) or 0 in item.shape):
        raise ValueError(f"row {row} must be an image of two or three axes; got shape {tuple(item.shape)}.")
    return item


def _fingerprint(
    model: nn.Module, processor: Any, options: list[Any], transform: Any, inputs: list[Any], codes: Any, *, named: bool
) -> str:
    said = [*options, type(model).__name__, _describe(processor), "" if transform is None else _name(transform, named)]
    digest = hashlib.blake2b(json.dumps([parameter_fingerprint(model), *said]).encode(), digest_size=16)
    for item in inputs:
        array = np.frombuffer(item.encode(), np.uint8) if isinstance(item, str) else np.ascontiguousarray(item)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.tobytes())
    digest.update(b"" if codes is None else codes.tobytes())
    return digest.hexdigest()


def _describe(processor: Any) -> str:
    if (backend := getattr(processor, "backend_tokenizer", None)) is not None:
        # Padding and truncation are left there by whichever call came last.
        said = json.loads(backend.to_str())
        return json.dumps([said | {"padding": None, "truncation": None}, processor.special_tokens_map], default=str)
    return str(processor.to_json_string()) if hasattr(processor, "to_json_string") else repr(processor)


def _name(transform: Any, must_be_lasting: bool) -> str:
    named = getattr(transform, "__qualname__", None)
    name = repr(transform) if named is None else f"{getattr(transform, '__module__', '')}.{named}"
    if must_be_lasting and ("<lambda>" in name or " at 0x" in name):
        raise ValueError(f"transform {name} cannot be told from others when features are kept; use a named function.")
    return name


def _read(home: Path, fingerprint: str) -> NDArray[Any] | None:
    manifest = home / "manifest.json"
    if not manifest.is_file():
        return None
    found = json.loads(manifest.read_text(encoding="utf-8"))["fingerprint"]
    if found != fingerprint:
        raise ValueError(
            f"{home} holds features of another model, other options or other data; give another directory."
        )
    X: NDArray[Any] = np.load(home / "X.npy", mmap_mode="r")
    return X


def _write(
    home: Path, fingerprint: str, rows: int, starts: range, shard: Callable[[int], NDArray[Any]]
) -> NDArray[Any]:
    home.mkdir(parents=True, exist_ok=True)
    progress, partial = home / "progress.json", home / "X.partial.npy"
    done = 0
    if progress.is_file() and partial.is_file():
        state = json.loads(progress.read_text(encoding="utf-8"))
        done = state["shards"] if state["fingerprint"] == fingerprint else 0
    X = np.lib.format.open_memmap(partial, mode="r+") if done else None
    for number, start in enumerate(starts):
        if number < done:
            continue
        features = shard(start)
        if X is None:
            X = np.lib.format.open_memmap(partial, mode="w+", dtype=features.dtype, shape=(rows, features.shape[1]))
        X[start : start + len(features)] = features
        X.flush()
        # Written after the rows are on disk: a shard that is counted is complete.
        atomic_write_text(progress, json.dumps({"fingerprint": fingerprint, "shards": number + 1}))
    del X
    partial.replace(home / "X.npy")
    atomic_write_text(home / "manifest.json", json.dumps({"fingerprint": fingerprint, "rows": rows}))
    progress.unlink()
    found = _read(home, fingerprint)
    assert found is not None
    return found
