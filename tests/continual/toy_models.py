"""Small transformers with random weights, and inputs for them, for the tests of modules that are put into a model."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

__all__ = ["IDS", "PIXELS", "SMALL", "bert", "hidden", "seeded", "vit"]

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
PIXELS = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
IDS = torch.arange(10).reshape(2, 5)


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def vit():
    return seeded(lambda: ViTModel(ViTConfig(image_size=8, patch_size=4, **SMALL)))


def bert():
    return seeded(lambda: BertModel(BertConfig(vocab_size=16, max_position_embeddings=32, **SMALL)))


@torch.no_grad()
def hidden(model, **inputs):
    return model(**inputs).last_hidden_state
