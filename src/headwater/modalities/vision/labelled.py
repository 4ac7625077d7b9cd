"""Labelled images by reference, and what reads them: kept as encoded files, decoded batch by batch."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from headwater.core.recipe import DataRef, ModelRef
from headwater.modalities.text.docs import CorpusError

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

    from headwater.modalities.features import FeatureStore

__all__ = ["decode_image", "encode_images", "open_image_encoder", "open_labelled_images", "pixel_digest"]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")


def open_labelled_images(ref: DataRef, *, role: str) -> tuple[list[bytes], list[str]]:
    """Encoded images and their labels.

    Args:
        ref: a local folder with one folder of image files for each class; a Parquet file with a column of images, as
            ``datasets`` writes it or of plain bytes, and one of labels; a Hub data set; or the builtin
            ``headwater:digits/PART``, where PART is train, validation or test.
        role: what to call it in errors, e.g. ``stream.train``.

    Raises:
        CorpusError: nothing there, no such column, or a column that holds no images.
    """
    if ref.kind == "builtin":
        from headwater.modalities.vision.bases import DIGITS, digit_images
        from headwater.modalities.vision.digits import Part

        name, _, part = ref.name.rpartition("/")
        if name != DIGITS or part not in ("train", "validation", "test"):
            raise CorpusError(
                f"{role}: no builtin images {ref.name!r}; there are {DIGITS}/train, {DIGITS}/validation and "
                f"{DIGITS}/test."
            )
        rows: Iterable[tuple[bytes, str]] = zip(*digit_images(cast(Part, part)), strict=True)
    elif ref.kind == "local" and ref.path.is_dir():
        rows = _folder_rows(ref.path)
    elif ref.kind == "local":
        rows = _column_rows(_parquet(ref.path, role), ref, role)
    else:
        from datasets import load_dataset

        dataset = load_dataset(ref.name, ref.config, split=ref.split, revision=ref.revision, streaming=True)
        rows = _dataset_rows(dataset, ref, role)
    images: list[bytes] = []
    labels: list[str] = []
    for image, label in rows:
        if ref.limit is not None and len(images) == ref.limit:
            break
        images.append(image)
        labels.append(label)
    if not images:
        raise CorpusError(
            f"{role}: no image in {ref.name}. A folder needs one folder for each class with files that end in "
            f"{', '.join(_SUFFIXES)}."
        )
    return images, labels


def _folder_rows(root: Path) -> Iterator[tuple[bytes, str]]:
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in _SUFFIXES:
                yield path.read_bytes(), folder.name


def _parquet(path: Path, role: str) -> Iterator[Mapping[str, Any]]:  # Any: a row's values
    import pyarrow.parquet as pq

    if not path.is_file() or path.suffix != ".parquet":
        raise CorpusError(f"{role}: {path} is neither a folder of images nor a Parquet file.")
    for batch in pq.ParquetFile(path).iter_batches(batch_size=256):
        yield from batch.to_pylist()


def _dataset_rows(dataset: Any, ref: DataRef, role: str) -> Iterator[tuple[bytes, str]]:  # Any: a datasets.Dataset
    from datasets import ClassLabel, Image

    features = dataset.features or {}
    if isinstance(features.get(ref.input_field), Image):
        dataset = dataset.cast_column(ref.input_field, Image(decode=False))
    names = features[ref.label_field].names if isinstance(features.get(ref.label_field), ClassLabel) else None
    for image, label in _column_rows(dataset, ref, role):
        yield image, label if names is None else names[int(label)]


def _column_rows(rows: Iterable[Mapping[str, Any]], ref: DataRef, role: str) -> Iterator[tuple[bytes, str]]:
    for number, row in enumerate(rows):
        for column in (ref.input_field, ref.label_field):
            if column not in row:
                raise CorpusError(f"{role}: no column {column!r}; available: {', '.join(row)}.")
        image = row[ref.input_field]
        if isinstance(image, Mapping):  # as datasets stores images: the file's bytes, or where it lies
            image = image.get("bytes") or (Path(image["path"]).read_bytes() if image.get("path") else None)
        if not isinstance(image, bytes):
            raise CorpusError(
                f"{role}: row {number} of column {ref.input_field!r} holds {type(image).__name__}; expected an image. "
                "Name the column in input_field."
            )
        yield image, str(row[ref.label_field])


def decode_image(data: bytes) -> Image.Image:
    """An encoded image as RGB.

    Raises:
        ImportError: Pillow is not installed.
        UnidentifiedImageError: no image format that Pillow knows.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images need Pillow: pip install 'headwater[vision]'.") from error
    return Image.open(io.BytesIO(data)).convert("RGB")


def pixel_digest(data: bytes) -> str:
    """Hash of an encoded image's size and RGB pixels: the same for any file format that loses nothing.

    Raises:
        ImportError, UnidentifiedImageError: see ``decode_image``.
    """
    image = decode_image(data)
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def open_image_encoder(ref: ModelRef) -> tuple[nn.Module, Any]:  # Any: image processors have no common type
    """Model without a head, in evaluation mode, and its image processor.

    Raises:
        ModelError: see ``load_model``, or there is no image processor beside it.
    """
    from transformers import AutoImageProcessor

    from headwater.modalities.models import ModelError, load_encoder, model_directory

    directory = model_directory(ref)
    try:
        processor = AutoImageProcessor.from_pretrained(
            directory, revision=ref.revision, trust_remote_code=ref.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model {ref.name!r}: no image processor could be opened beside it ({str(error).splitlines()[0]})"
        ) from error
    return load_encoder(ref), processor


def encode_images(images: Iterable[bytes], encoder: ModelRef, *, normalize: bool = False) -> tuple[FeatureStore, float]:
    """Features of a frozen encoder, kept in the user cache under a hash of weights, processor, images and options.

    Args:
        images: encoded.
        encoder: an image model, or a dual encoder such as CLIP.
        normalize: scale each vector to unit length.

    Returns:
        One row per image, memory-mapped; and the seconds that computing them took, now or then.

    Raises:
        ValueError: see ``extract_features``.
        ModelError: see ``open_image_encoder``.
    """
    import transformers

    from headwater.modalities.features import cached_features
    from headwater.modalities.models import parameter_fingerprint

    model, processor = open_image_encoder(encoder)
    about = [parameter_fingerprint(model), processor.to_json_string(), normalize, transformers.__version__]
    digest, listed = hashlib.sha256(json.dumps(about).encode()), list(images)
    for image in listed:
        digest.update(hashlib.sha256(image).digest())
    key = digest.hexdigest()[:24]
    return cached_features(key, model, listed, processor=processor, modality="image", normalize=normalize)
