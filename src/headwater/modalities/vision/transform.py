"""The preprocessing that an image encoder was pretrained with, as one module over batches of tensors.

With u the pixels resized, and cropped where the processor crops::

    y_c = (r u_c - mean_c) / std_c          r: the rescale factor

Resizing is ``F.interpolate`` with antialiasing, whose bilinear and bicubic filters are those of Pillow; what remains is
Pillow's rounding to whole grey levels, after each axis.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from headwater.core.cache import atomic_write_text
from headwater.modalities.vision.labelled import decode_image

__all__ = ["Interpolation", "PretrainingTransform", "image_tensor"]

Interpolation = Literal["nearest", "bilinear", "bicubic"]

_RESAMPLE: dict[int, Interpolation] = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_CHANNEL_COUNTS = (1, 3, 4)
_SHORT = 64  # pixels of an axis up to which a product with all of them beats picking neighbours
_CONVNEXT_WARPS_FROM = 384  # at and above this size, processors with crop_pct resize to a square and crop nothing


def image_tensor(image: Any) -> Tensor:  # Any: see Args
    """One image as a float32 tensor ``(channels, height, width)`` in its own range.

    Args:
        image: an encoded file, which becomes RGB from 0 to 255; a Pillow image; or an array or tensor of two axes, or
            of three with the channels first.

    Raises:
        ValueError: the channels come last.
    """
    if isinstance(image, bytes):
        image = decode_image(image)
    if hasattr(image, "getbands"):
        pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        return pixels.view(image.height, image.width, 3).permute(2, 0, 1).float()
    tensor = torch.as_tensor(image).float()
    tensor = tensor[None] if tensor.ndim == 2 else tensor
    _check_channels_first(tensor)
    return tensor


def _check_channels_first(images: Tensor) -> None:
    if images.ndim < 3:
        raise ValueError(f"images must have the axes (channels, height, width); got shape {tuple(images.shape)}.")
    if images.shape[-1] in _CHANNEL_COUNTS and images.shape[-3] not in _CHANNEL_COUNTS:
        raise ValueError(
            f"images of shape {tuple(images.shape)} look like (height, width, channels); put the channels first: "
            "images.movedim(-1, -3)."
        )


def _check_batch(images: Tensor) -> None:
    if images.ndim != 4:
        raise ValueError(f"a batch must be (batch, channels, height, width); got shape {tuple(images.shape)}.")
    _check_channels_first(images)


class PretrainingTransform(nn.Module):
    """What an image processor does, on float tensors.

    Args:
        size: height and width to resize to; or one number for the shorter edge, keeping the aspect; or ``None``.
        crop: height and width of the centre that is kept; ``None`` keeps all. Smaller images are padded with zeros.
        rescale: factor that the pixels are multiplied with first.
        mean, std: for each channel, in rescaled units.
        interpolation: filter of the resize.
        antialias: widen the filter where images shrink, as Pillow does.
        value_range: least and greatest pixel that can occur; bicubic overshoot is clipped to it.

    Shapes:
        ``(batch, channels, height, width)`` of any numeric dtype, or a list of such images without the batch axis, of
        any sizes, to ``(batch, channels, height, width)`` float32. Images of one channel are repeated for all.

    Raises:
        ValueError: a deviation is not positive, named by its channel; means and deviations of different lengths; at a
            call: channels last, another number of channels, or images that come out in different sizes.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        size: tuple[int, int] | int | None,
        *,
        crop: tuple[int, int] | None = None,
        rescale: float = 1 / 255,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        interpolation: Interpolation = "bilinear",
        antialias: bool = True,
        value_range: tuple[float, float] = (0.0, 255.0),
    ) -> None:
        super().__init__()
        self.resize_to, self.crop_to = size, crop
        self.rescale, self.interpolation, self.antialias = rescale, interpolation, antialias
        self.value_range = value_range
        self._set_statistics(mean, std)

    def _set_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != len(std):
            raise ValueError(f"mean and std must have one value for each channel; got {len(mean)} and {len(std)}.")
        for channel, value in enumerate(std):
            if not value > 0:
                raise ValueError(f"the deviation of channel {channel} must be positive; got {value}. Leave it out.")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    @classmethod
    def from_processor(
        cls,
        processor: Any,  # Any: image processors have no common type
        *,
        channels: int | None = None,
        value_range: tuple[float, float] | None = None,
        interpolation: Interpolation | None = None,
    ) -> Self:
        """Read a Hugging Face image processor.

        Args:
            processor: the processor, one that holds it, or where it lies: a directory or Hub name.
            channels: of the images. Where the processor has statistics for another number, each channel is given the
                mean of those; ``with_statistics`` sets its own. ``None``: as many as the processor says.
            value_range: of the images, where it is not 0 to 255; it takes the place of that.
            interpolation: instead of the processor's.

        Raises:
            ValueError: something that this module does not do, such as padding, or a filter other than nearest,
                bilinear and bicubic.
        """
        if isinstance(processor, (str, Path)):
            from transformers import AutoImageProcessor

            processor = AutoImageProcessor.from_pretrained(processor)
        said: dict[str, Any] = getattr(processor, "image_processor", processor).to_dict()  # Any: JSON data
        if said.get("do_pad"):
            raise ValueError(
                f"{said.get('image_processor_type')} pads images, which is not supported; set do_pad=False."
            )
        size, crop = _geometry(said)
        if interpolation is None:
            code = int(said.get("resample", 2))
            if size is not None and code not in _RESAMPLE:
                raise ValueError(
                    f"resample {code} is none of nearest (0), bilinear (2) and bicubic (3); give interpolation."
                )
            interpolation = _RESAMPLE.get(code, "bilinear")
        rescale = float(said.get("rescale_factor", 1 / 255)) if said.get("do_rescale", True) else 1.0
        mean, std = [0.0] * 3, [1.0] * 3
        if said.get("do_normalize", True) and said.get("image_mean") is not None:
            mean, std = list(said["image_mean"]), list(said["image_std"])
        if channels is not None and channels != len(mean):
            mean, std = ([sum(values) / len(values)] * channels for values in (mean, std))
        low, high = value_range or (0.0, 255.0)
        if not high > low:
            raise ValueError(f"value_range must be (least, greatest); got ({low}, {high}).")
        if value_range is not None:
            rescale *= 255 / (high - low)
            mean = [value + low * rescale for value in mean]
        return cls(
            size, crop=crop, rescale=rescale, mean=mean, std=std, interpolation=interpolation, value_range=(low, high)
        )

    @property
    def output_size(self) -> tuple[int, int] | None:
        """Height and width that every image comes out with; ``None`` where that depends on the image."""
        if self.crop_to is not None:
            return self.crop_to
        return self.resize_to if isinstance(self.resize_to, tuple) else None

    def at(self, size: int | None) -> Self:
        """The same for another size: images are resized whole to ``size`` x ``size``; ``None`` leaves their size."""
        other = copy.deepcopy(self)
        other.resize_to, other.crop_to = None if size is None else (size, size), None
        return other

    def with_statistics(self, mean: Sequence[float], std: Sequence[float], *, rescale: float | None = None) -> Self:
        """The same with another mean and deviation for each channel, as many as are given.

        Args:
            mean: in rescaled units.
            std: likewise.
            rescale: the factor; ``None`` keeps it.
        """
        other = copy.deepcopy(self)
        other.rescale = self.rescale if rescale is None else rescale
        other._set_statistics(mean, std)
        return other

    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Resize, crop, rescale and normalise."""
        if not isinstance(images, Tensor) or self.crop_to is not None:  # padding is black before it is normalised
            return self.normalize(self.resize(images))
        _check_batch(images)
        # An affine map commutes with a filter whose weights sum to 1: it is applied where there are fewer pixels.
        images = images.float()
        low, high = (self.normalize(bound) for bound in self._bounds(images))
        return self._resized(self.normalize(images), low, high)

    def resize(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """The first half: pixels of the output's size, still in their own range, float32."""
        if isinstance(images, Tensor):
            _check_batch(images)
            images = images.float()
            made = self._resized(images, *self._bounds(images))
            return made if self.crop_to is None else _centre(made, self.crop_to)
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) == 1:
            return self.resize(torch.stack(list(images)))
        made_each = [self.resize(image[None]) for image in images]
        if len(sizes := {tuple(image.shape[1:]) for image in made_each}) > 1:
            raise ValueError(
                f"images come out in different shapes, such as {sorted(sizes)[:3]}; this processor keeps their aspect. "
                "Use at(size), which makes them square."
            )
        return torch.cat(made_each)

    def normalize(self, pixels: Tensor) -> Tensor:
        """The second half, ``(batch, channels, height, width)``: rescaled, mean and deviation applied."""
        wanted = len(self.mean)
        if pixels.shape[1] not in (1, wanted):
            raise ValueError(
                f"images have {pixels.shape[1]} channels and the statistics {wanted}. Give channels={pixels.shape[1]} "
                "to from_processor, or with_statistics of your own."
            )
        scale, shift = self.rescale / self.std, -self.mean / self.std
        return torch.addcmul(shift[:, None, None], pixels, scale[:, None, None])

    def _bounds(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What bicubic overshoot is clipped to, ``(batch, 1, 1, 1)``: pixels of an image beyond the range are kept."""
        low, high = self.value_range
        if len(images) == 0:
            return images.new_full((0, 1, 1, 1), low), images.new_full((0, 1, 1, 1), high)
        axes = (1, 2, 3)
        return images.amin(axes, keepdim=True).clamp(max=low), images.amax(axes, keepdim=True).clamp(min=high)

    def _resized(self, images: Tensor, low: Tensor, high: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        target = self.resize_to
        if target is None:
            return images
        if isinstance(target, int):
            longer = int(target * max(height, width) / min(height, width))
            target = (longer, target) if width <= height else (target, longer)
        # Pillow clips after each axis: the width first, unless the height shrinks clearly more (as Pillow 13 was seen
        # to do; the border is not known exactly).
        height_first = target[0] < height and 1.05 * target[0] * width < target[1] * height
        for axis in (-2, -1) if height_first else (-1, -2):
            if images.shape[axis] != target[axis]:
                images = self._along(images, axis, target[axis])
                if self.interpolation == "bicubic":
                    images = images.clamp_(low, high)
        return images

    def _along(self, images: Tensor, axis: int, size: int) -> Tensor:
        """Resize one axis; a short one by the filter as a matrix, which is faster and the same."""
        length = images.shape[axis]
        mode: dict[str, Any] = {"mode": self.interpolation, "antialias": self.antialias}  # Any: options
        if self.interpolation == "nearest":
            mode = {"mode": "nearest-exact"}
        if length > _SHORT:
            sides = (size, images.shape[-1]) if axis == -2 else (images.shape[-2], size)
            return nn.functional.interpolate(images, sides, **mode)
        identity = torch.eye(length, device=images.device)[None, None]
        weights = nn.functional.interpolate(identity, (size, length), **mode)[0, 0]
        return weights @ images if axis == -2 else images @ weights.T

    def save_pretrained(self, directory: Path) -> None:
        """Write ``preprocessor_config.json``, which ``AutoImageProcessor.from_pretrained(directory)`` opens."""
        resize = self.resize_to
        said: dict[str, Any] = {  # Any: JSON data
            # Of all processors this one has every switch that is needed.
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": len(self.mean) == 3,
            "do_resize": resize is not None,
            "size": _sides(resize) if isinstance(resize, tuple) else {"shortest_edge": resize or 224},
            "resample": {name: code for code, name in _RESAMPLE.items()}[self.interpolation],
            "do_center_crop": self.crop_to is not None,
            "crop_size": _sides(self.crop_to or (224, 224)),
            "do_rescale": True,
            "rescale_factor": self.rescale,
            "do_normalize": True,
            "image_mean": self.mean.tolist(),
            "image_std": self.std.tolist(),
        }
        atomic_write_text(directory / "preprocessor_config.json", json.dumps(said, indent=2) + "\n")


def _geometry(said: Mapping[str, Any]) -> tuple[tuple[int, int] | int | None, tuple[int, int] | None]:  # Any: JSON
    """Size to resize to and crop, of a processor's fields."""
    size: tuple[int, int] | int | None = None
    crop: tuple[int, int] | None = None
    if said.get("do_resize", True):
        sides = {name: int(value) for name, value in dict(said["size"]).items() if value is not None}
        if set(sides) == {"height", "width"}:
            size = (sides["height"], sides["width"])
        elif set(sides) == {"shortest_edge"}:
            size = sides["shortest_edge"]
        else:
            raise ValueError(f"a size of {sides} is neither height and width nor a shortest edge.")
        if isinstance(size, int) and said.get("crop_pct") is not None:
            if size >= _CONVNEXT_WARPS_FROM:
                size = (size, size)
            else:
                size, crop = int(size / said["crop_pct"]), (size, size)
    if said.get("do_center_crop"):
        crop = (int(said["crop_size"]["height"]), int(said["crop_size"]["width"]))
    return size, crop


def _centre(images: Tensor, crop: tuple[int, int]) -> Tensor:
    height, width = images.shape[-2:]
    if (missing := (max(0, crop[0] - height), max(0, crop[1] - width))) != (0, 0):
        top, left = (missing[0] + 1) // 2, (missing[1] + 1) // 2
        images = nn.functional.pad(images, (left, missing[1] - left, top, missing[0] - top))
        height, width = images.shape[-2:]
    top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
    return images[..., top : top + crop[0], left : left + crop[1]]


def _sides(size: tuple[int, int]) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}
