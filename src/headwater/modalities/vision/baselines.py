"""Features of images that no pretraining has touched: what any encoder must beat. scikit-learn transformers.

With w_j random patches, ``*`` the convolution without padding, and the mean over positions::

    RandomConvFeatures    mean relu(w_j * x + b),  mean relu(-(w_j * x + b))
    ImageStatistics       mean, deviation, maximum and minimum of each channel

Source: Rolf et al., "A generalizable and accessible approach to machine learning with global satellite imagery",
    Nature Communications 12:4392 (2021), for random convolutional features.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from headwater.core.rng import numpy_generator

__all__ = ["ImageStatistics", "RandomConvFeatures"]

_PATCHES = 10_000  # drawn to learn the whitening from
_ZCA_FLOOR = 1e-3  # of the patches' mean variance: directions that natural images hardly use are not blown up
_IMAGES = 64  # convolved at a time

Images = NDArray[Any] | Tensor


class ImageStatistics(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no annotations
    """Mean, deviation, maximum and minimum of each channel; nothing is learned."""

    def fit(self, X: Images, y: object = None) -> Self:
        """Nothing to do."""
        _checked(X)
        return self

    def transform(self, X: Images) -> NDArray[np.float32]:
        """Statistics, ``(n, 4 channels)``: all means, then deviations (divided by n), maxima, minima.

        Args:
            X: ``(n, channels, height, width)``.
        """
        flat = _checked(X).flatten(2).double()
        parts = (flat.mean(2), flat.std(2, correction=0), flat.amax(2), flat.amin(2))
        statistics: NDArray[np.float32] = torch.cat(parts, dim=1).float().numpy()
        return statistics


class RandomConvFeatures(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no annotations
    """Responses to random patches, of either sign, averaged over the image.

    Args:
        n: features, even: two of each patch.
        kernel: height and width of a patch.
        bias: b.
        zca: draw the patches from the images given to ``fit`` and whiten them; otherwise they are Gaussian.
        random_state: of the draw.

    Attributes:
        weight_: ``(n / 2, channels, kernel, kernel)`` float32.
        bias_: ``(n / 2,)`` float32.

    Raises:
        ValueError: at ``fit``: ``n`` is odd or not positive, or an image is smaller than a patch.
    """

    def __init__(
        self, n: int = 512, kernel: int = 3, bias: float = -1.0, zca: bool = True, random_state: int = 0
    ) -> None:
        self.n = n
        self.kernel = kernel
        self.bias = bias
        self.zca = zca
        self.random_state = random_state

    def fit(self, X: Images, y: object = None) -> Self:
        """Draw the patches; with ``zca``, from images ``(n, channels, height, width)``."""
        images = _checked(X)
        if self.n < 2 or self.n % 2:
            raise ValueError(f"n must be even and positive, two features of each patch; got {self.n}.")
        if min(images.shape[-2:]) < self.kernel:
            raise ValueError(f"images of shape {tuple(images.shape[1:])} are smaller than a patch of {self.kernel}.")
        rng = numpy_generator(self.random_state, "random convolutional features")
        shape = (self.n // 2, images.shape[1], self.kernel, self.kernel)
        if self.zca:
            weight, shift = _whitened_patches(images, shape, rng)
        else:
            weight, shift = rng.standard_normal(shape), np.zeros(shape[0])
        self.weight_ = torch.from_numpy(weight.astype(np.float32))
        self.bias_ = torch.from_numpy((self.bias + shift).astype(np.float32))
        return self

    def transform(self, X: Images) -> NDArray[np.float32]:
        """Features, ``(n_images, n)``."""
        check_is_fitted(self, "weight_")
        made = []
        for batch in torch.split(_checked(X), _IMAGES):
            response = nn.functional.conv2d(batch, self.weight_, self.bias_)
            made.append(torch.cat((response.relu().mean((2, 3)), (-response).relu().mean((2, 3))), dim=1))
        features: NDArray[np.float32] = torch.cat(made).numpy()
        return features


def _whitened_patches(
    images: Tensor, shape: tuple[int, int, int, int], rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Filters that answer to whitened patches with whitened patches, and what their means add to the bias.

    With m and W the patches' mean and whitening, and q a whitened patch of unit length: ``q W (x - m)``.
    """
    kernel, (height, width) = shape[-1], images.shape[-2:]
    count = max(_PATCHES, shape[0])
    rows = rng.integers(len(images), size=count)
    tops, lefts = rng.integers(height - kernel + 1, size=count), rng.integers(width - kernel + 1, size=count)
    drawn = [
        images[row, :, top : top + kernel, left : left + kernel].reshape(-1)
        for row, top, left in zip(rows, tops, lefts, strict=True)
    ]
    patches = torch.stack(drawn).double().numpy()
    mean = patches.mean(0)
    values, vectors = np.linalg.eigh(np.cov(patches - mean, rowvar=False))
    floor = max(_ZCA_FLOOR * values.mean(), np.finfo(np.float64).tiny)  # constant images have no variance at all
    whitening = (vectors / np.sqrt(values.clip(0) + floor)) @ vectors.T
    chosen = (patches[: shape[0]] - mean) @ whitening
    chosen /= np.linalg.norm(chosen, axis=1, keepdims=True).clip(1e-12)
    filters = chosen @ whitening
    return filters.reshape(shape), -filters @ mean


def _checked(X: Images) -> Tensor:
    images = torch.as_tensor(X)
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images must be (n, channels, height, width), none of them 0; got {tuple(images.shape)}.")
    return images.float()
