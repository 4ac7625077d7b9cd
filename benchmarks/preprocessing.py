"""How fast is a batch of small images made ready for an encoder: ``PretrainingTransform`` against the image processor?

    python -m benchmarks.preprocessing

256 images of 8 x 8 pixels to 224, bicubic, rescaled and normalised. The peer is transformers' processor on Pillow, the
one that works without torchvision. It rounds to whole grey levels after each axis, so both agree to two of 255.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ViTImageProcessorPil

from benchmarks.harness import Bound, alternate, report
from headwater.modalities.vision.transform import PretrainingTransform

EDGE, TARGET, LEVELS = 8, 224, 2


def images(count: int) -> Tensor:
    """Noise, smoothed: bicubic overshoots at hard edges, where clipping to grey levels would be all there is to see."""
    rng = np.random.default_rng(0)
    noise = rng.normal(128, 60, (count, 3, EDGE + 1, EDGE + 1))
    smooth = (noise[..., 1:, 1:] + noise[..., :-1, 1:] + noise[..., 1:, :-1] + noise[..., :-1, :-1]) / 4
    return torch.from_numpy(smooth.clip(0, 255).astype(np.uint8))


def check(ours: Tensor, theirs: Tensor, transform: PretrainingTransform) -> str:
    assert ours.shape == theirs.shape
    levels = 255 * float(((ours - theirs).abs() * transform.std[:, None, None]).max())
    assert levels <= LEVELS + 1e-3, f"pixels differ by {levels:.2f} grey levels"
    return f"pixels agree to {levels:.2f} of 255 grey levels"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=256)
    count = parser.parse_args().images
    torch.set_num_threads(1)
    batch = images(count)
    files = [Image.fromarray(image.movedim(0, -1).numpy()) for image in batch]
    processor = ViTImageProcessorPil(size={"height": TARGET, "width": TARGET}, resample=3)
    transform = PretrainingTransform.from_processor(processor)
    checked = check(transform(batch), processor(files, return_tensors="pt")["pixel_values"], transform)
    seconds = alternate(
        {
            "batch": lambda: transform(batch),
            "processor": lambda: processor(files, return_tensors="pt")["pixel_values"],
        }
    )
    report(
        "How fast is a batch of small images resized and normalised, against the image processor?",
        {"processor over batch": (seconds["processor"] / seconds["batch"], Bound("higher", floor=3))},
        seconds=seconds,
        checked=checked,
        notes={"images": count, "from": EDGE, "to": TARGET, "time": "processor seconds, one thread"},
    )


if __name__ == "__main__":
    main()
