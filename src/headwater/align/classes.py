"""Models that judge classes, under the name they had before other stages used them: ``modalities/text/classes.py``."""

from __future__ import annotations

from headwater.modalities.text.class_inputs import ClassStream
from headwater.modalities.text.classes import (
    ClassModel,
    ClassObjective,
    class_logits,
    class_probabilities,
    label_token_ids,
    open_class_model,
)

__all__ = [
    "ClassModel",
    "ClassObjective",
    "ClassStream",
    "class_logits",
    "class_probabilities",
    "label_token_ids",
    "open_class_model",
]
