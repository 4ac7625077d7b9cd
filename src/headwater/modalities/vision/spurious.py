"""Images with a mark whose place says the label most of the time: what a model may learn instead of the digit."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from headwater.core.rng import numpy_generator

__all__ = ["plant_marks"]


def plant_marks(
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    classes: int,
    strength: float,
    kind: Literal["pixel", "stripe"],
    seed: int,
) -> NDArray[np.float32]:
    """Add a mark to each image, at the place of its label with probability ``strength``, else at a place by chance.

    Args:
        images: ``(n, H, W)`` in [0, 1].
        labels: ``(n,)``, below ``classes``.
        classes: number of places.
        strength: 1 ties the mark to the label; 0 makes it independent, as a test out of distribution should.
        kind: ``pixel`` sets one of the first ``classes`` border pixels, clockwise from the top left, to 1; ``stripe``
            raises a whole row (classes below H) or column by a half.
        seed: of the draws; one for each image.

    Raises:
        ValueError: more classes than places, or a strength outside [0, 1].
    """
    _, height, width = images.shape
    border = [(0, x) for x in range(width)] + [(y, width - 1) for y in range(1, height)]
    border += [(height - 1, x) for x in range(width - 2, -1, -1)] + [(y, 0) for y in range(height - 2, 0, -1)]
    places = len(border) if kind == "pixel" else height + width
    if classes > places:
        raise ValueError(f"{classes} classes need as many places; images of {height} x {width} have {places}.")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1]; got {strength}.")
    rng = numpy_generator(seed, "spurious marks", kind)
    tied, other = rng.random(len(labels)) < strength, rng.integers(classes, size=len(labels))
    marked = images.copy()
    for number, place in enumerate(np.where(tied, labels, other).tolist()):
        if kind == "pixel":
            marked[(number, *border[place])] = 1.0
        elif place < height:
            marked[number, place] = np.minimum(marked[number, place] + 0.5, 1.0)
        else:
            marked[number, :, place - height] = np.minimum(marked[number, :, place - height] + 0.5, 1.0)
    return marked
