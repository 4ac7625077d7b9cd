"""Handwritten digits that are always there, in several guises, and a small network that was trained on some of them.

scikit-learn's 1797 images of 8 x 8 pixels are split once, by image, into four parts: one that the backbone is
pretrained on, and training, validation and test images for what comes after. A class is a digit in a guise: turned by
0, 90, 180 or 270 degrees, or mirrored. No image is in two parts, whatever its guise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from headwater.core.order import permutation
from headwater.core.rng import derive_seed, hash_integers, hash_normal, hash_uniform, torch_generator

__all__ = ["SEEN", "Digits", "Gap", "Guise", "digits", "digits_backbone"]

Guise = Literal["rot0", "rot90", "rot180", "rot270", "mirror"]
Part = Literal["pretrain", "train", "validation", "test"]
Gap = Literal["none", "invert_noise"]

_SIZES: dict[Part, int] = {"pretrain": 600, "train": 600, "validation": 197, "test": 400}
SEEN: tuple[Guise, ...] = ("rot0", "rot90", "rot180")
NOISE = 0.25


@dataclass(frozen=True)
class Digits:
    """Images and their classes.

    Attributes:
        images: ``(n, 64)`` float32, ink from 0 to 1, rows of pixels one after another; with noise beyond that range.
        labels: ``(n,)`` int64, indices into ``label_names``.
        label_names: such as ``7 rot90``.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    label_names: tuple[str, ...]


def digits(part: Part, guises: Sequence[Guise], gap: Gap = "none") -> Digits:
    """Images of one part in every guise asked for; ten classes for each.

    Args:
        part: which images.
        guises: of the images; class ``10 g + d`` is digit d in guise number g.
        gap: ``invert_noise`` turns ink to paper and paper to ink and adds Gaussian noise of deviation 0.25, the same
            at every call: what a network trained without it has not seen.

    Raises:
        ValueError: no guise, or one twice.
    """
    from sklearn.datasets import load_digits

    if not guises or len(set(guises)) < len(guises):
        raise ValueError(f"guises must be at least one and all different; got {list(guises)}.")
    raw = load_digits()
    rows = _rows(part, len(raw.target))
    plain = (raw.images[rows] / 16).astype(np.float32)
    images = np.concatenate([_in_guise(plain, guise) for guise in guises]).reshape(-1, 64)
    if gap == "invert_noise":
        # Keyed by image and guise, so that a sample has its noise whatever else is asked for with it.
        noise = [hash_normal(derive_seed(0, "digit noise", guise), rows, 64) for guise in guises]
        images = (1 - images + NOISE * np.concatenate(noise)).astype(np.float32)
    labels = np.concatenate([10 * number + raw.target[rows] for number in range(len(guises))]).astype(np.int64)
    return Digits(images, labels, tuple(f"{digit} {guise}" for guise in guises for digit in range(10)))


def _rows(part: Part, count: int) -> NDArray[np.int64]:
    order = permutation(derive_seed(0, "digit parts"), 0, count)
    begin = 0
    for name, size in _SIZES.items():
        if name == part:
            return np.sort(order[begin : begin + size])
        begin += size
    raise ValueError(f"part must be one of {', '.join(_SIZES)}; got {part!r}.")


def _in_guise(images: NDArray[Any], guise: Guise) -> NDArray[Any]:  # Any: a float dtype
    if guise == "mirror":
        return images[:, :, ::-1]
    return np.rot90(images, int(guise.removeprefix("rot")) // 90, axes=(1, 2))


def digits_backbone(seed: int, *, epochs: int = 20, wrong_labels: float = 0.0) -> nn.Sequential:
    """Pretrain a multilayer perceptron 64-128-64 to tell digits at 0, 90 and 180 degrees apart, thirty classes.

    Args:
        seed: of weights and order; the global generator is neither read nor moved.
        epochs: passes over the 1800 images.
        wrong_labels: share of them, in expectation, that are given another class, any of the 29 alike; those wrong at
            a smaller share are the same and as wrong at a larger one.

    Returns:
        From ``(batch, 64)`` pixels to ``(batch, 64)`` features, in evaluation mode, on the CPU. Under a second.

    Raises:
        ValueError: ``wrong_labels`` is no share.
    """
    if not 0 <= wrong_labels <= 1:
        raise ValueError(f"wrong_labels must be in [0, 1]; got {wrong_labels}.")
    data = digits("pretrain", SEEN)
    generator = torch_generator(seed, "digits backbone")
    # A layer's own initialisation would draw from the global generator.
    sizes = ((64, 128), (128, 64), (64, len(data.label_names)))
    layers: list[nn.Linear] = [nn.utils.skip_init(nn.Linear, *size) for size in sizes]  # type: ignore[no-untyped-call]
    for layer in layers:
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(layer.bias)
    backbone, head = nn.Sequential(layers[0], nn.ReLU(), layers[1]), layers[2]
    which, classes, key = np.arange(len(data.labels)), len(data.label_names), derive_seed(seed, "wrong labels")
    wrong = hash_uniform(key, which, 1)[:, 0] < wrong_labels
    shift = hash_integers(key, which, 1, 1, classes, stream=1)[:, 0]
    images = torch.from_numpy(data.images)
    labels = torch.from_numpy(np.where(wrong, (data.labels + shift) % classes, data.labels))
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=2e-3)
    for epoch in range(epochs):
        order = torch.from_numpy(permutation(derive_seed(seed, "digits backbone"), epoch, len(labels)))
        for begin in range(0, len(order), 64):
            rows = order[begin : begin + 64]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(head(backbone(images[rows])), labels[rows])
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
    return backbone.eval()
