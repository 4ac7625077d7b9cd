"""Labels that are distributions, under the name they had before: ``modalities/text/soft_labels.py``."""

from __future__ import annotations

from headwater.modalities.text.soft_labels import (
    SoftCrossEntropy,
    TargetLoss,
    check_distributions,
    soft_cross_entropy,
)

__all__ = ["SoftCrossEntropy", "TargetLoss", "check_distributions", "soft_cross_entropy"]
