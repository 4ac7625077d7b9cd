"""What a sequence of domains did to each of them: the transfer matrix and the figures read off it.

p[i, j] is the loss on domain j after stage i, lower is better. Row 0 is the starting model, stage j learns domain j
(both counted from 1), N is the last::

    zero-shot         ZS_j = p[0, j]
    continual        CPT_j = p[j, j]
    last              LC_j = p[N, j]
    specialisation         = DAPT_j - CPT_j             DAPT_j: the starting model trained on domain j alone
    backward after k stages = p[j, j] - p[j + k, j]
    forward                = p[0, j] - p[j - 1, j]
    learned                = p[j - 1, j] - p[j, j]
    forgetting             = p[N, j] - min_{i >= j} p[i, j]

In bits per byte, a difference is the logarithm of a ratio of perplexities. Every figure but the last is good where it
is positive.

Source: Yıldız et al., "Investigating Continual Pretraining in Large Language Models: Insights and Implications",
arXiv:2402.17400. ``learned`` and ``forgetting`` are ours; the latter compares with the best that was ever reached.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.core.cache import atomic_path, atomic_write_text
from headwater.core.stats import correlation

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TransferMatrix", "similarity_transfer_correlation"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TransferMatrix:
    """Losses on every domain after every stage.

    Attributes:
        bpb: p, ``(N + 1, N)``, columns in the order of the stages; finite.
        domains: their names, N of them.
        dapt: ``(N,)``, the starting model trained on each domain alone; None where that was not done.
    """

    bpb: Floats
    domains: tuple[str, ...]
    dapt: Floats | None = None

    def __post_init__(self) -> None:
        for name in ("bpb", "dapt"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        n = len(self.domains)
        if n == 0 or self.bpb.shape != (n + 1, n):
            raise ValueError(
                f"the matrix must have a row for the start and one for each stage, a column for each of {n} domains: "
                f"shape {(n + 1, n)}; got {self.bpb.shape}."
            )
        if self.dapt is not None and self.dapt.shape != (n,):
            raise ValueError(f"dapt must hold one loss for each of {n} domains; got shape {self.dapt.shape}.")
        for name, values in (("the matrix", self.bpb), ("dapt", self.dapt)):
            if values is not None and not np.isfinite(values).all():
                place = tuple(np.argwhere(~np.isfinite(values))[0].tolist())
                raise ValueError(f"{name} must be finite; got {values[place]} at {place}.")

    @property
    def zero_shot(self) -> Floats:
        """Of the starting model, ``(N,)``."""
        row: Floats = self.bpb[0]
        return row

    @property
    def cpt(self) -> Floats:
        """Of each domain right after it was learned, ``(N,)``."""
        own: Floats = np.diagonal(self.bpb, -1)
        return own

    @property
    def last(self) -> Floats:
        """Of the final model, ``(N,)``."""
        row: Floats = self.bpb[-1]
        return row

    @property
    def learned(self) -> Floats:
        """What each domain's own stage gained on it, ``(N,)``."""
        gained: Floats = np.diagonal(self.bpb) - self.cpt
        return gained

    @property
    def specialisation(self) -> Floats | None:
        """By how much each domain is better in its stage than alone, ``(N,)``; None without ``dapt``."""
        return None if self.dapt is None else self.dapt - self.cpt

    @property
    def forgetting(self) -> Floats:
        """What the final model lost against the best from the domain's own stage on, ``(N,)``, >= 0, the last 0."""
        best = [self.bpb[j + 1 :, j].min() for j in range(len(self.domains))]
        lost: Floats = self.last - np.array(best)
        return lost

    def backward(self, k: int) -> Floats:
        """By how much k further stages made each domain better, ``(N - k,)``.

        Raises:
            ValueError: ``k`` is outside [1, N - 1].
        """
        n = len(self.domains)
        if not 1 <= k < n:
            raise ValueError(f"k must be in [1, {n - 1}], the stages after a domain's own; got {k}.")
        gained: Floats = self.cpt[: n - k] - np.diagonal(self.bpb, -1 - k)
        return gained

    @property
    def backward_last(self) -> Floats:
        """By how much all later stages made each domain better, ``(N,)``; the last one's is 0."""
        return self.cpt - self.last

    def forward(self) -> Floats:
        """By how much the stages before its own made each domain better, ``(N,)``; the first one's is 0."""
        gained: Floats = self.zero_shot - np.diagonal(self.bpb)
        return gained

    def summary(self) -> dict[str, float]:
        """Means under fixed names, over those domains for which a figure can differ from 0.

        ``stream/zero_shot``, ``cpt``, ``last``, ``learned``; with two domains or more ``backward`` and ``forgetting``
        (without the last), ``forward`` and, with ``dapt``, ``specialisation`` (without the first, before which nothing
        was learned); ``dapt`` like it.
        """
        found = {
            "zero_shot": self.zero_shot,
            "cpt": self.cpt,
            "last": self.last,
            "learned": self.learned,
            "backward": self.backward_last[:-1],
            "forgetting": self.forgetting[:-1],
            "forward": self.forward()[1:],
        }
        if self.dapt is not None and self.specialisation is not None:
            found |= {"dapt": self.dapt, "specialisation": self.specialisation[1:]}
        return {f"stream/{name}": float(values.mean()) for name, values in found.items() if values.size}

    def to_frame(self) -> pd.DataFrame:
        """A table to read: a row for the start, each stage and, with ``dapt``, the models trained alone."""
        import pandas as pd

        rows = ["start", *(f"after {name}" for name in self.domains)]
        frame = pd.DataFrame(self.bpb, index=rows, columns=list(self.domains))
        if self.dapt is not None:
            frame.loc["alone"] = self.dapt
        return frame

    def to_dict(self) -> dict[str, Any]:  # Any: JSON data
        """Plain JSON data: ``domains``, ``bpb``, ``dapt`` and, by offset, the mean backward transfer."""
        return {
            "domains": list(self.domains),
            "bpb": self.bpb.tolist(),
            "dapt": None if self.dapt is None else self.dapt.tolist(),
            "backward": {str(k): float(self.backward(k).mean()) for k in range(1, len(self.domains))},
        }

    def save(self, directory: Path) -> None:
        """Write ``matrix.npz`` (``bpb``, ``domains`` and, if there is one, ``dapt``) and ``matrix.json``."""
        arrays = {"bpb": self.bpb, "domains": np.array(self.domains)} | (
            {} if self.dapt is None else {"dapt": self.dapt}
        )
        with atomic_path(directory / "matrix.npz") as path, path.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy takes its keywords for options
        atomic_write_text(directory / "matrix.json", json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a ``matrix.npz`` that ``save`` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            return cls(stored["bpb"], tuple(stored["domains"].tolist()), stored.get("dapt"))


def similarity_transfer_correlation(matrix: TransferMatrix, similarity: ArrayLike | Sequence[Sequence[float]]) -> float:
    """Rank correlation between how similar two domains are and what learning the one did to the other.

    Over all pairs of different domains (i, j): similarity[i, j] and p[i - 1, j] - p[i, j].

    Args:
        matrix: N domains.
        similarity: ``(N, N)``, in the order of the matrix; the diagonal is not read.

    Returns:
        Spearman's, in [-1, 1]; NaN where one side does not vary. Pairs share domains, so no interval is given.

    Raises:
        ValueError: the shapes do not fit, or there are fewer than two domains.
    """
    n = len(matrix.domains)
    alike = np.asarray(similarity, dtype=np.float64)
    if alike.shape != (n, n) or n < 2:
        raise ValueError(f"similarity must be square with a row for each of {n} domains, 2 or more; got {alike.shape}.")
    change = matrix.bpb[:-1] - matrix.bpb[1:]  # (stage, domain)
    others = ~np.eye(n, dtype=bool)
    return correlation(alike[others], change[others], "spearman", draws=100).estimate
