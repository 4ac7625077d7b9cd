"""A small vision transformer that is trained here on digits, once per machine, and the digits it has not seen.

It tells the digits of one part of scikit-learn's images apart at 0, 90 and 180 degrees; what is asked of it afterwards,
``headwater:digits``, are other images, at 270 degrees and mirrored.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn

from headwater.core.cache import atomic_write_text, cache_dir, cache_key
from headwater.core.order import permutation
from headwater.core.rng import derive_seed
from headwater.modalities.vision.digits import SEEN, Gap, Part, digits

__all__ = ["DIGITS", "DIGITS_VIT", "digit_images", "digits_vit"]

DIGITS = "headwater:digits"
"""Twenty classes of labelled images, digits at 270 degrees and mirrored: ``headwater:digits/PART`` in a recipe."""
DIGITS_VIT = "headwater:digits-vit"
"""The vision transformer trained on other images, at other angles."""

SHAPE = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
SIZE, PATCH = 8, 2
EPOCHS, ROWS, LR, SEED = 40, 64, 2e-3, 0  # seconds on one core
FORMAT = 1


def digit_images(part: Part, gap: Gap = "none") -> tuple[list[bytes], list[str]]:
    """Images as PNG files and their labels, such as ``7 mirror``.

    Args:
        part: ``train``, ``validation`` or ``test``.
        gap: see ``digits``.
    """
    found = digits(part, ("rot270", "mirror"), gap)
    return list(_encoded(found.images)), [found.label_names[label] for label in found.labels]


def _encoded(images: NDArray[np.float32]) -> Iterator[bytes]:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images need Pillow: pip install 'headwater[vision]'.") from error
    for pixels in (images.reshape(-1, SIZE, SIZE).clip(0, 1) * 255).round().astype(np.uint8):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, format="PNG")
        yield stream.getvalue()


def digits_vit() -> Path:
    """Directory of the transformer and its image processor, trained now (in seconds) if it is not in the cache."""
    versions = [torch.__version__, transformers.__version__]
    about = {**SHAPE, "size": SIZE, "patch": PATCH, "epochs": EPOCHS, "rows": ROWS, "lr": LR, "versions": versions}
    target = cache_dir("models") / cache_key({**about, "format": FORMAT, "kind": "digits-vit"})
    if (target / "base.json").exists():
        return target
    with tempfile.TemporaryDirectory(dir=cache_dir("models")) as working:
        finished = Path(working) / "model"
        _trained().save_pretrained(finished)
        _processor().save_pretrained(finished)
        atomic_write_text(finished / "base.json", json.dumps(about, indent=2) + "\n")
        shutil.rmtree(target, ignore_errors=True)  # another process may have been faster: its weights are the same
        finished.rename(target)
    return target


def _processor() -> transformers.ViTImageProcessorPil:
    return transformers.ViTImageProcessorPil(  # the other one wants torchvision
        do_resize=True, size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def _trained() -> transformers.ViTModel:
    data = digits("pretrain", SEEN)
    pixels = torch.from_numpy(data.images).view(-1, 1, SIZE, SIZE).expand(-1, 3, -1, -1) * 2 - 1
    labels, classes = torch.from_numpy(data.labels), len(data.label_names)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        config = transformers.ViTConfig(image_size=SIZE, patch_size=PATCH, num_channels=3, **SHAPE)
        model, head = transformers.ViTModel(config), nn.Linear(SHAPE["hidden_size"], classes)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=LR, weight_decay=0.05)
    steps = EPOCHS * (len(labels) // ROWS)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps)
    for step in range(steps):
        epoch, batch = divmod(step, len(labels) // ROWS)
        order = permutation(derive_seed(SEED, "digits vit"), epoch, len(labels))
        rows = torch.from_numpy(order[batch * ROWS : (batch + 1) * ROWS])
        optimizer.zero_grad()
        # The pooler is what AutoModel gives as an image's vector, so it is trained too.
        loss = nn.functional.cross_entropy(head(model(pixel_values=pixels[rows]).pooler_output), labels[rows])
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        schedule.step()
    return model.eval()
