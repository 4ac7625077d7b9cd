"""Images and a small vision transformer for the learners of the stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.continual.toy import picture
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a ViT of 16 x 2 with random weights and its image processor."""
    directory = tmp_path_factory.mktemp("models") / "vit"
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTModel(config).save_pretrained(directory)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train`` and ``test``: folders of noisy pictures in four colours."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    colours = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200), "grey": (120, 120, 120)}
    for part, count in (("train", 8), ("test", 5)):
        for name, colour in colours.items():
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                picture(rng, colour).save(root / part / name / f"{number}.png")
    return root
