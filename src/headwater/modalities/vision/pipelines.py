"""Features of the same images under several ways of preprocessing, decoded once and resized once for each size."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from headwater.modalities.features import Encoder
from headwater.modalities.vision.transform import PretrainingTransform, image_tensor

__all__ = ["Features", "Images", "PipelineFeatures", "PixelEncoder", "features_under"]

Features = NDArray[np.float32]
Images = Sequence[Any] | NDArray[Any] | Tensor  # Any: what image_tensor takes
Norm = TypeVar("Norm", bound=Hashable)

_BATCH = 64


class PixelEncoder:
    """An encoder as a function of ready pixels, in evaluation mode and without gradients.

    Args:
        encoder: a Hugging Face image encoder; or anything from ``(batch, channels, height, width)`` to ``(batch, D)``.
        size: that it was pretrained with. At another one, fixed position embeddings are interpolated where the model
            can do that.

    Raises:
        ValueError: at a call: the encoder gives another shape.
    """

    def __init__(self, encoder: nn.Module | Callable[[Tensor], Tensor], size: int) -> None:
        self.size = size
        self._given = encoder
        self._encoder: Encoder | None = None
        self._options: dict[str, bool] = {}
        if isinstance(encoder, PreTrainedModel):
            self._encoder = Encoder(encoder, None, "image")
            bare = self._encoder.model
            called = bare.get_image_features if self._encoder.dual else bare.forward
            if "interpolate_pos_encoding" in inspect.signature(called).parameters:
                self._options = {"interpolate_pos_encoding": True}

    def __call__(self, pixels: Tensor) -> Features:
        """Features ``(batch, D)`` of pixels ``(batch, channels, height, width)``."""
        with torch.no_grad():
            given = self._given
            made = self._evaluated(given, pixels) if isinstance(given, nn.Module) else given(pixels)
        if made.ndim != 2:
            raise ValueError(f"an encoder gives one vector for each image, (batch, D); got {tuple(made.shape)}.")
        features: Features = made.float().cpu().numpy()
        return features

    def _evaluated(self, module: nn.Module, pixels: Tensor) -> Tensor:
        training = module.training
        module.eval()
        try:
            if self._encoder is not None:
                options = {} if min(pixels.shape[2:]) == self.size else self._options
                features: Tensor = self._encoder({"pixel_values": pixels}, **options)
                return features
            where = next(module.parameters(), pixels)
            made: Tensor = module(pixels.to(where.device, where.dtype))
            return made
        finally:
            module.train(training)


@dataclass(frozen=True)
class PipelineFeatures:
    """What one pipeline gave.

    Attributes:
        X: features, ``(images, D)``; ``None`` where the encoder cannot take the pixels.
        seconds: that resizing, scaling and encoding took.
        trouble: why there are no features; "" otherwise.
    """

    X: Features | None
    seconds: float
    trouble: str


def features_under(
    encoder: PixelEncoder, images: Sequence[Any], pipelines: Mapping[tuple[int, Norm], PretrainingTransform]
) -> dict[tuple[int, Norm], PipelineFeatures]:
    """Features of images under every pipeline; only features are kept in memory.

    Args:
        encoder: what makes them.
        images: what ``image_tensor`` takes.
        pipelines: by size and normalisation; those of one size resize alike.
    """
    made: dict[tuple[int, Norm], list[Features]] = {key: [] for key in pipelines}
    seconds, trouble = dict.fromkeys(pipelines, 0.0), dict.fromkeys(pipelines, "")
    for start in range(0, len(images), _BATCH):
        batch = [image_tensor(image) for image in images[start : start + _BATCH]]
        resized: dict[int, Tensor] = {}
        for key, pipeline in pipelines.items():
            if trouble[key]:
                continue
            begin = time.perf_counter()
            if key[0] not in resized:
                resized = {key[0]: pipeline.resize(batch)}  # one size at a time in memory
            ready = pipeline.normalize(resized[key[0]])
            try:
                made[key].append(encoder(ready))
            except (RuntimeError, ValueError) as error:
                if start:  # what took one batch takes the next
                    raise
                trouble[key] = f"skipped: {str(error).splitlines()[0][:160]}"
            seconds[key] += time.perf_counter() - begin
    return {
        key: PipelineFeatures(None if trouble[key] else np.concatenate(made[key]), seconds[key], trouble[key])
        for key in pipelines
    }
