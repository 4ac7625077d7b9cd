"""What the tests of learners that move an encoder share: a small module, a stream for it, and the code of a README."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from headwater.continual.streams import ClassStream, Samples, StreamData
from headwater.core.fit import FitSettings
from headwater.core.run import Run

__all__ = [
    "CLASSES",
    "DIM",
    "FIT",
    "HIDDEN",
    "follow",
    "held_out",
    "make_data",
    "make_stream",
    "matrix",
    "mlp",
    "picture",
    "read_me",
]

CLASSES, DIM, HIDDEN = 6, 12, 8
FIT = FitSettings(precision="fp32")


def mlp(seed=0, out=HIDDEN):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(DIM, 16), nn.ReLU(), nn.Linear(16, out))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    return model.eval()


def make_data(per_class=20, seed=0):
    rng = np.random.default_rng(seed)
    means = 1.5 * rng.normal(size=(CLASSES, DIM))

    def samples(count):
        labels = rng.permutation(np.repeat(np.arange(CLASSES), count))
        return Samples((means[labels] + rng.normal(size=(len(labels), DIM))).astype(np.float32), labels)

    return StreamData(samples(per_class), samples(10), samples(5), tuple("abcdef"), f"data {seed}")


def make_stream(data=None, **settings):
    return ClassStream(data or make_data(), **{"increments": 2, "seed": 1, **settings})


def follow(made, stream, directory, resume=False):
    with Run(directory, made, resume=resume) as run:
        return made.follow(stream, run)


def matrix(directory):
    return np.array(json.loads((directory / "matrix.json").read_text())["matrix"])


def picture(rng, colour):
    pixels = np.clip(np.array(colour) + rng.normal(0, 40, size=(16, 16, 3)), 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def read_me(model: Path, monkeypatch: Any, **given: Any) -> dict[str, Any]:
    """What the code of a README defines."""
    code = re.search(r"```python\n(.*?)```", (model / "README.md").read_text(), re.DOTALL)[1]
    assert "headwater" not in code
    monkeypatch.chdir(model)
    exec(compile(code, "README.md", "exec"), given)
    return given


def held_out(modality: str, source: str) -> tuple[list[Any], list[str]]:
    """The inputs as a reader of the README would have them, and their labels."""
    if modality != "image":
        rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
        return [row["text"] for row in rows], [row["label"] for row in rows]
    paths = sorted(Path(source).rglob("*.png"))
    return [Image.open(path).convert("RGB") for path in paths], [path.parent.name for path in paths]
