"""Is a model fed what it was pretrained on? What its inputs say by themselves, without labels and without the model.

Images are turned back into pixels by the pipeline they should have come from::

    pixel = (y std + mean - least) / (greatest - least)        within [0, 1] where rescaled and normalised once

Sounds are compared with the feature extractor: sampling rate, what the spectrum still holds, normalisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from headwater.modalities.vision.transform import PretrainingTransform

__all__ = ["PreprocessingAdvice", "check_images", "check_sound"]

_RESCALED_TWICE = 0.02  # greatest pixel of 1; what is divided by 255 twice stays below 0.004
_NOT_RESCALED = 8.0  # pixels that are normalised twice stay below, those left at 0 to 255 do not
_OVERSHOOT = 0.5  # more than bicubic resizing does
_FAR_MEAN, _FAR_DEVIATION = 1.5, 4.0  # of a channel, against 0 and 1: more than content explains
_SILENT = 1e-4  # share of the energy in the upper 3/8 of the spectrum: of upsampled sounds less, of others more


@dataclass(frozen=True)
class PreprocessingAdvice:
    """One thing that is not as it was in pretraining.

    Attributes:
        problem: what is wrong, in a few words.
        got: what was seen.
        expected: what the pretraining pipeline gives.
        remedy: what to do.
    """

    problem: str
    got: str
    expected: str
    remedy: str

    def to_text(self) -> str:
        """One line."""
        return f"{self.problem}: got {self.got}; expected {self.expected}. {self.remedy}"


def check_images(inputs: Tensor, transform: PretrainingTransform) -> list[PreprocessingAdvice]:
    """Compare what a model is about to be given with what its pretraining pipeline gives.

    Args:
        inputs: after your own transform, ``(batch, channels, height, width)``; some dozens of images say enough.
        transform: the model's own.

    Returns:
        What is wrong: nothing, the size, the scale of the pixels, or both.

    Raises:
        ValueError: ``inputs`` is empty, has not four axes, or another number of channels than the model.
    """
    if inputs.ndim != 4 or inputs.numel() == 0:
        raise ValueError(f"inputs must be (batch, channels, height, width), not empty; got {tuple(inputs.shape)}.")
    channels = len(transform.mean)
    if inputs.shape[1] != channels:
        hint = " Put the channels first: inputs.movedim(-1, -3)." if inputs.shape[-1] == channels else ""
        raise ValueError(f"the model reads {channels} channels; inputs have shape {tuple(inputs.shape)}.{hint}")
    (height, width), wanted = inputs.shape[2:], transform.output_size
    found = _scale(inputs.float(), transform)
    if wanted is not None and (height, width) != wanted:
        expected = f"{wanted[0]} x {wanted[1]}"
        found.insert(
            0, PreprocessingAdvice("another size", f"{height} x {width}", expected, "Resize, small images too.")
        )
    return found


def _scale(inputs: Tensor, transform: PretrainingTransform) -> list[PreprocessingAdvice]:
    low, high = (transform.rescale * end for end in transform.value_range)
    back = (inputs * transform.std[:, None, None] + transform.mean[:, None, None] - low) / (high - low)
    least, greatest = float(inputs.min()), float(inputs.max())
    got = f"values from {least:.4g} to {greatest:.4g}"
    once = (
        f"pixels from {transform.value_range[0]:g} to {transform.value_range[1]:g} times {transform.rescale:.4g}, once"
    )
    mean, std = ([round(value, 3) for value in part.tolist()] for part in (transform.mean, transform.std))
    statistics = f"mean {mean} and deviation {std} applied once"
    if float(back.max()) < _RESCALED_TWICE or 0 <= least <= greatest < _RESCALED_TWICE:
        return [PreprocessingAdvice("pixels rescaled twice", got, once, "Leave the division to one of the two.")]
    if float(back.max()) > _NOT_RESCALED:
        return [PreprocessingAdvice("pixels not rescaled", got, once, "Divide by the greatest pixel there can be.")]
    if least >= 0 and greatest <= 1 and any(mean):
        return [PreprocessingAdvice("pixels not normalised", got, statistics, "Apply the pretraining statistics.")]
    if float(back.min()) < -_OVERSHOOT or float(back.max()) > 1 + _OVERSHOOT:
        remedy = "Normalise once, with the pretraining statistics."
        return [PreprocessingAdvice("values that no pixel gives", got, statistics, remedy)]
    means, deviations = inputs.mean((0, 2, 3)), inputs.std((0, 2, 3))
    far = (means.abs() > _FAR_MEAN) | (deviations > _FAR_DEVIATION) | (deviations < 1 / _FAR_DEVIATION)
    if bool(far.any()):
        channel = int(far.int().argmax())
        got = f"mean {float(means[channel]):.2f} and deviation {float(deviations[channel]):.2f} in channel {channel}"
        remedy = "If the images are not meant to be like that, try standardising them by their own statistics."
        return [PreprocessingAdvice("images unlike those of pretraining", got, "about 0 and 1", remedy)]
    return []


def check_sound(
    samples: NDArray[np.floating[Any]],
    sampling_rate: int,
    extractor: Any,  # Any: feature extractors have no common type
) -> list[PreprocessingAdvice]:
    """Compare a sound with what a speech model's feature extractor expects.

    Args:
        samples: as you would hand them to the extractor, ``(samples,)``; some seconds that are not silent.
        sampling_rate: of the samples, in Hz.
        extractor: a Hugging Face feature extractor.

    Returns:
        What is wrong: another rate; the right rate, but nothing in the upper half of the spectrum, as when a recording
        at half of it was upsampled; integers, or samples beyond [-1, 1], where the extractor does not normalise.

    Raises:
        ValueError: ``samples`` is empty or has more than one axis.
    """
    samples = np.asarray(samples)
    if samples.ndim != 1 or not len(samples):
        raise ValueError(f"a sound must have the shape (samples,), not empty; got {samples.shape}.")
    wanted, found = int(extractor.sampling_rate), []
    if sampling_rate != wanted:
        remedy = f"Resample it; read as if it were {wanted} Hz, it is {wanted / sampling_rate:g} times too fast."
        found.append(PreprocessingAdvice("another sampling rate", f"{sampling_rate} Hz", f"{wanted} Hz", remedy))
    else:
        energy = np.abs(np.fft.rfft(samples.astype(np.float64) - samples.mean())) ** 2
        share = energy[len(energy) * 5 // 8 :].sum() / max(energy.sum(), np.finfo(np.float64).tiny)
        if share < _SILENT:
            got = f"{share:.1e} of the energy above {wanted * 5 // 16} Hz"
            remedy = f"It was probably recorded at {wanted // 2} Hz; a model for that rate, or such data, fits better."
            found.append(PreprocessingAdvice("an empty upper half of the spectrum", got, "more than 1e-4", remedy))
    greatest = float(np.abs(samples).max())
    if greatest > 1 and not getattr(extractor, "do_normalize", False):
        remedy = "Divide 16-bit samples by 32768."
        found.append(PreprocessingAdvice("samples not scaled", f"up to {greatest:g}", "within [-1, 1]", remedy))
    return found
