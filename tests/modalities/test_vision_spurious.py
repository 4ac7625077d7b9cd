from __future__ import annotations

import numpy as np
import pytest

from headwater.modalities.vision.spurious import plant_marks

IMAGES = np.zeros((4000, 8, 8), dtype=np.float32)
LABELS = np.arange(4000) % 10


def places(marked: np.ndarray, kind: str) -> np.ndarray:
    """Where each image has its mark."""
    if kind == "pixel":
        corner = [(0, x) for x in range(8)] + [(1, 7), (2, 7)]
        return np.array([next(i for i, at in enumerate(corner) if image[at] == 1) for image in marked])
    rows, columns = marked.min(axis=2) > 0, marked.min(axis=1) > 0
    return np.concatenate([rows, columns], axis=1).argmax(axis=1)


@pytest.mark.parametrize("kind", ["pixel", "stripe"])
def test_property_the_mark_says_the_label_as_often_as_asked(kind):
    for strength in (0.0, 0.5, 1.0):
        marked = plant_marks(IMAGES, LABELS, classes=10, strength=strength, kind=kind, seed=0)
        expected = strength + (1 - strength) / 10
        share = (places(marked, kind) == LABELS).mean()
        assert abs(share - expected) <= 3.3 * (expected * (1 - expected) / len(LABELS)) ** 0.5  # 99.9 %
    assert IMAGES.max() == 0, "the images given are left as they are"


def test_property_the_same_seed_marks_the_same():
    first, again, other = (
        plant_marks(IMAGES[:50], LABELS[:50], classes=10, strength=0.5, kind="pixel", seed=seed) for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_rejects_more_classes_than_places():
    with pytest.raises(ValueError, match="have 28"):
        plant_marks(IMAGES[:1], LABELS[:1], classes=29, strength=0.5, kind="pixel", seed=0)
    with pytest.raises(ValueError, match="strength must be in"):
        plant_marks(IMAGES[:1], LABELS[:1], classes=10, strength=1.5, kind="stripe", seed=0)
