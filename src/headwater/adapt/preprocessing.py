"""Which image size and which normalisation a frozen encoder should be fed, and how much a benchmark owes to them.

For every size s and normalisation n of a grid, on the same labelled images::

    accuracy(s, n) = mean over images of [probe(f(normalise_n(resize_s(u)))) == y]
    default penalty = max over s, n of accuracy(s, n)  -  accuracy(the images' own size, divide)

    pretraining    (r u - mean_c) / std_c           as the encoder's image processor says
    standardise    (u - mean_c) / std_c             of the images at hand
    divide         u / 255                          or what the greatest pixel can be
    minmax         (u - min_c) / (max_c - min_c)    of the images at hand

Source: Corley et al., "Revisiting pre-trained remote sensing model benchmarks: resizing and normalization matters",
    arXiv:2305.13456.
Differs: resizing is antialiased, as the image processors' own is; at the pretraining size the processor's crop is kept,
    at others images are resized whole; the linear probe reads standardised features, nearest neighbours read them as
    they are; the pipeline is chosen by cross-validation inside the training examples, the paper compares on test sets.
Needs: an image encoder; at least two labelled images of each class.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

from headwater.adapt.base import AdaptRecipe, AdaptTask
from headwater.adapt.preprocessing_probe import Preprocessed, Probe, fit_probe
from headwater.core.cache import atomic_write_text
from headwater.core.rng import derive_seed
from headwater.core.stats import PairedDifference, paired_bootstrap
from headwater.modalities.models import load_model
from headwater.modalities.vision.baselines import ImageStatistics, RandomConvFeatures
from headwater.modalities.vision.pipelines import Features, Images, PixelEncoder, features_under
from headwater.modalities.vision.transform import PretrainingTransform, image_tensor

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["NORMS", "AuditRow", "AuditTable", "Norm", "Preprocessing", "audit", "write_audit"]

Norm = Literal["pretraining", "standardise", "divide", "minmax"]

NORMS: tuple[Norm, ...] = ("pretraining", "standardise", "divide", "minmax")
_FOLDS = 5
_WHITENING_IMAGES = 1024  # that the patches of random convolutional features are drawn from


@dataclass(frozen=True)
class AuditRow:
    """One pipeline under one probe.

    Attributes:
        size: height and width in pixels that the encoder is given.
        norm: how pixels are scaled.
        probe: what reads the features.
        accuracy: NaN where the encoder cannot take the size.
        seconds: that the features of all images took, resizing included, decoding not.
        note: what else there is to say, such as why there is no accuracy.
    """

    size: int
    norm: Norm
    probe: Probe
    accuracy: float
    seconds: float
    note: str = ""


@dataclass(frozen=True, eq=False)
class AuditTable:
    """What an audit found; the pretraining pipeline comes first.

    Attributes:
        rows: one for each size, normalisation and probe.
        native: the images' own size; of images of several sizes, the median of their shorter edges.
        pretraining: the size that the image processor makes.
        hits: 1 where the answer was right, ``(rows, images)``, the images in an order that depends on them alone.
        pipelines: what each (size, norm) does.
    """

    rows: tuple[AuditRow, ...]
    native: int
    pretraining: int
    hits: NDArray[np.float64]
    pipelines: Mapping[tuple[int, Norm], PretrainingTransform]

    def best(self, probe: Probe | None = None) -> AuditRow:
        """The row of the highest accuracy, the earlier one of equals; of one probe, if given."""
        rows = [row for row in self.rows if probe in (None, row.probe) and not np.isnan(row.accuracy)]
        return max(rows, key=lambda row: row.accuracy)

    def items(self, size: int, norm: Norm, probe: Probe) -> NDArray[np.float64]:
        """1 for each image that this pipeline got right, ``(images,)``.

        Raises:
            KeyError: no such row, or the encoder cannot take the size.
        """
        for row, hits in zip(self.rows, self.hits, strict=True):
            if (row.size, row.norm, row.probe) == (size, norm, probe) and not np.isnan(row.accuracy):
                found: NDArray[np.float64] = hits
                return found
        raise KeyError(f"the audit has no accuracy at {size} px, {norm}, {probe}")

    def default_penalty(self) -> PairedDifference | None:
        """The best pipeline minus the naive one, images at their own size divided by 255, under the best's probe.

        The interval is a paired bootstrap over images; the best was chosen on these same images, which flatters it.
        ``None``: the encoder cannot take the images' own size, or ``divide`` was not among the normalisations.
        """
        best = self.best()
        try:
            naive = self.items(self.native, "divide", best.probe)
        except KeyError:
            return None
        return paired_bootstrap(self.items(best.size, best.norm, best.probe), naive)


def audit(
    encoder: nn.Module | Callable[[Tensor], Tensor],
    images: Images,
    labels: Sequence[Any] | NDArray[Any],  # Any: class indices or names
    *,
    transform: PretrainingTransform,
    sizes: Sequence[int] | Literal["auto"] = "auto",
    norms: Sequence[Norm] = NORMS,
    probes: Sequence[Probe] = ("knn", "linear"),
    k: int = 5,
    held_out: tuple[Images, Sequence[Any] | NDArray[Any]] | None = None,
) -> AuditTable:
    """Score a frozen encoder's features under a grid of sizes and normalisations.

    Images are decoded batch by batch and resized once for each size; only features are kept in memory.

    Args:
        encoder: a Hugging Face image encoder; or anything from ``(batch, channels, height, width)`` to ``(batch, D)``.
            It is used where its parameters are, in evaluation mode. Position embeddings are interpolated for other
            sizes where the model can do that.
        images: encoded files, Pillow images, or arrays with the channels first; of any sizes.
        labels: of each image.
        transform: the encoder's own preprocessing, ``PretrainingTransform.from_processor``.
        sizes: pixels of a side. ``auto``: the images' own size, the pretraining size, and their geometric mean.
        norms: see the module. Statistics are taken of ``images`` at their own size.
        probes: ``knn``, on features as they are; ``linear``, logistic regression on standardised features.
        k: neighbours.
        held_out: images and labels to score on. Without them every image is scored by probes fitted to the other
            folds, at most five, which do not depend on the order of the images.

    Raises:
        ValueError: a class of one image, fewer than ``k`` images to fit to, a channel that is the same in all images,
            or an encoder that takes none of the sizes.
    """
    found = _survey(images)
    pretraining = _pretraining_size(transform, found.native)
    if sizes == "auto":
        sizes = (found.native, pretraining, round((found.native * pretraining) ** 0.5))
    ordered = sorted(set(sizes), key=lambda size: (size != pretraining, -size))
    pipelines = {
        (size, norm): _pipeline(transform, found, size, pretraining, norm) for size in ordered for norm in norms
    }

    order = _order(images, labels)
    X_images, y = [images[row] for row in order], np.asarray(labels)[order]
    scored = len(y)
    if held_out is not None:
        order = _order(*held_out)
        X_images += [held_out[0][row] for row in order]
        y = np.concatenate((y, np.asarray(held_out[1])[order]))
    splits = _splits(y, scored, k)
    extracted = features_under(PixelEncoder(encoder, pretraining), X_images, pipelines)

    rows, hits = [], []
    repeated = f"one channel, repeated for {len(transform.mean)}" if found.channels < len(transform.mean) else ""
    for (size, norm), made in extracted.items():
        for probe in probes:
            right = np.zeros(len(y)) if made.X is None else _right(probe, made.X, y, splits, k)
            right = right[scored:] if held_out is not None else right
            accuracy = float("nan") if made.X is None else float(right.mean())
            rows.append(AuditRow(size, norm, probe, accuracy, made.seconds, made.trouble or repeated))
            hits.append(right)
    if all(np.isnan(row.accuracy) for row in rows):
        raise ValueError(f"the encoder takes none of the sizes {ordered}: {rows[0].note}")
    return AuditTable(tuple(rows), found.native, pretraining, np.stack(hits), pipelines)


def _pretraining_size(transform: PretrainingTransform, native: int) -> int:
    if transform.output_size is not None:
        return min(transform.output_size)
    return transform.resize_to if isinstance(transform.resize_to, int) else native


@dataclass(frozen=True)
class _Survey:
    native: int
    channels: int
    mean: Sequence[float]
    std: Sequence[float]
    least: Sequence[float]
    greatest: Sequence[float]


def _survey(images: Images) -> _Survey:
    """Size, and statistics of each channel in the pixels' own unit, of all images; one pass."""
    edges, count = [], 0
    total = square = least = greatest = torch.zeros(0)
    for number in range(len(images)):
        pixels = image_tensor(images[number])
        edges.append(min(pixels.shape[1:]))
        pixels = pixels.flatten(1).double()
        low, high = pixels.amin(1), pixels.amax(1)
        if not count:
            total, square, least, greatest = 0 * low, 0 * low, low, high
        elif len(low) != len(least):
            raise ValueError(f"image {number} has {len(low)} channels and those before it {len(least)}.")
        total, square, count = total + pixels.sum(1), square + (pixels**2).sum(1), count + pixels.shape[1]
        least, greatest = least.minimum(low), greatest.maximum(high)
    if not count:
        raise ValueError("no images to audit.")
    mean = total / count
    std = (square / count - mean**2).clamp(min=0).sqrt()
    std[least == greatest] = 0  # what rounding leaves of a constant channel
    parts = (part.tolist() for part in (mean, std, least, greatest))
    return _Survey(int(np.median(edges)), len(mean), *parts)


def _pipeline(
    transform: PretrainingTransform, found: _Survey, size: int, pretraining: int, norm: Norm
) -> PretrainingTransform:
    own = size == pretraining and transform.output_size is not None
    sized = transform if own else transform.at(size)
    channels = len(transform.mean)
    if found.channels not in (1, channels):
        sized.normalize(torch.zeros(1, found.channels, 1, 1))  # raises, in its words
    if norm == "pretraining":
        return sized
    constant = 1 / transform.value_range[1]
    mean, std = [0.0] * found.channels, [1.0] * found.channels
    if norm == "standardise":
        mean, std = ([constant * value for value in values] for values in (found.mean, found.std))
    elif norm == "minmax":
        mean = [constant * value for value in found.least]
        std = [constant * (high - low) for low, high in zip(found.least, found.greatest, strict=True)]
    repeats = channels // found.channels
    return sized.with_statistics(mean * repeats, std * repeats, rescale=constant)


def _order(images: Images, labels: Sequence[Any] | NDArray[Any]) -> list[int]:
    """Rows sorted by what the images are, so that folds and ties do not depend on the order they came in."""
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images have {len(labels)} labels.")

    def key(row: int) -> tuple[str, str]:
        image = images[row]
        data = image if isinstance(image, bytes) else image_tensor(image).numpy().tobytes()
        return hashlib.sha256(data).hexdigest(), str(labels[row])

    return sorted(range(len(images)), key=key)


def _splits(y: NDArray[Any], scored: int, k: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows to fit to and rows to score: the held-out ones, or folds of all."""
    if len(y) > scored:
        splits = [(np.arange(scored), np.arange(scored, len(y)))]
    else:
        names, counts = np.unique(y, return_counts=True)
        if counts.min() < 2:
            raise ValueError(f"class {names[counts.argmin()]} has one image; cross-validation needs two of each.")
        splits = list(StratifiedKFold(min(_FOLDS, int(counts.min()))).split(y, y))
    if (fewest := min(len(fit) for fit, _ in splits)) < k:
        raise ValueError(f"{k} neighbours need as many images to fit to; there are {fewest}. Lower k.")
    return splits


def _right(
    probe: Probe, X: Features, y: NDArray[Any], splits: Sequence[tuple[NDArray[Any], NDArray[Any]]], k: int
) -> NDArray[np.float64]:
    right = np.zeros(len(y))
    for fit, score in splits:
        right[score] = fit_probe(probe, X[fit], y[fit], k).predict(X[score]) == y[score]
    return right


def write_audit(path: Path, tables: Mapping[str, AuditTable]) -> None:
    """Write the rows of several audits as CSV, the first column naming the features."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["features", *(part.name for part in fields(AuditRow))])
    for name, table in tables.items():
        writer.writerows([name, *asdict(row).values()] for row in table.rows)
    atomic_write_text(path, text.getvalue())


class Preprocessing(AdaptRecipe):
    """Recipe: audit the preprocessing of a frozen image encoder, then probe it under the best pipeline.

    Leaves ``audit.csv``: every pipeline under every probe, and what needs no pretraining: the same architecture with
    random weights, image statistics, random convolutional features. ``model/preprocessor_config.json`` is the best.
    """

    id: ClassVar[str] = "preprocessing"

    modality: Literal["image"] = Field(default="image", description="what the examples are")
    sizes: tuple[Annotated[int, Field(gt=0)], ...] | Literal["auto"] = Field(
        default="auto", description="pixels of a side; auto: the images' own, the pretraining size, and one between"
    )
    norms: tuple[Norm, ...] = Field(default=NORMS, min_length=1, description="how pixels are scaled")
    probes: tuple[Probe, ...] = Field(
        default=("knn", "linear"), min_length=1, description="what reads the features: neighbours, logistic regression"
    )
    k: int = Field(default=5, gt=0, description="neighbours")

    def adapt(self, task: AdaptTask, run: Run) -> Preprocessed:
        """Audit by cross-validation inside the training examples; refit the best probe to all of them."""
        model, processor = task.encoder()
        transform = PretrainingTransform.from_processor(processor)
        images, y = task.train.inputs.tolist(), task.train.labels
        shared: dict[str, Any] = {"probes": self.probes, "k": self.k}  # Any: options
        table = audit(model, images, y, transform=transform, sizes=self.sizes, norms=self.norms, **shared)
        tables = {"pretrained": table, **self._untrained(images, y, table, transform, shared)}
        write_audit(run.path("audit.csv"), tables)

        best = table.best()
        pipeline = table.pipelines[best.size, best.norm]
        encoder = PixelEncoder(model, table.pretraining)

        def embed(images: Sequence[bytes]) -> Features:
            made = features_under(encoder, images, {(best.size, best.norm): pipeline})[best.size, best.norm]
            assert made.X is not None, made.trouble  # the audit went through it
            return made.X

        run.notes["pipeline"] = f"{best.size} px, {best.norm}, {best.probe}"
        if (penalty := table.default_penalty()) is not None:
            run.notes["default_penalty"] = f"{penalty.mean:+.3f} [{penalty.low:+.3f}, {penalty.high:+.3f}]"
        probe = fit_probe(best.probe, embed(images), y, self.k)
        return Preprocessed(probe, embed, pipeline, str(self.model), task.label_names)

    def _untrained(
        self,
        images: list[bytes],
        y: NDArray[np.int64],
        table: AuditTable,
        transform: PretrainingTransform,
        shared: Mapping[str, Any],  # Any: options
    ) -> dict[str, AuditTable]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, "random weights"))
            random = load_model(self.model, "none", random=True)
        ends = (table.native, table.pretraining)
        plain: dict[str, Any] = {"transform": transform, "sizes": (table.native,), "norms": ("divide",), **shared}
        pipeline = transform.at(table.native).with_statistics((0.0,) * 3, (1.0,) * 3)
        few = pipeline([image_tensor(image) for image in images[:_WHITENING_IMAGES]])
        convolve = RandomConvFeatures(random_state=derive_seed(self.seed, "patches") % 2**32).fit(few)
        return {
            "random weights": audit(
                random, images, y, transform=transform, sizes=ends, norms=("pretraining",), **shared
            ),
            "image statistics": audit(lambda x: torch.from_numpy(ImageStatistics().transform(x)), images, y, **plain),
            "random convolutions": audit(lambda x: torch.from_numpy(convolve.transform(x)), images, y, **plain),
        }
