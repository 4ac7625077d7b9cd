"""The network that NMTune puts between features and head, and one pass of its training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn

from headwater.adapt.nmtune_loss import NMTuneLoss

__all__ = ["USAGE", "NMTuneBlock", "Standardize", "tune"]

USAGE = """With PyTorch alone:

    import torch.nn.functional as F
    from safetensors.torch import load_file
    block, head = load_file("block.safetensors"), load_file("head.safetensors")
    x = f = (features - block["mean"]) / block["std"]
    for i in range(0, {last}, 3):
        norm = [block[f"mlp.{{i + 1}}.{{name}}"] for name in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(F.linear(x, block[f"mlp.{{i}}.weight"], block[f"mlp.{{i}}.bias"]), *norm).relu()
    z = f + block["scale"] * F.linear(x, block["mlp.{last}.weight"], block["mlp.{last}.bias"])
    F.linear(z, head["weight"], head["bias"]).softmax(-1)        # class probabilities
"""
"""What a README says of the saved arrays; ``last`` is the place of the last linear layer."""


class NMTuneBlock(nn.Module):
    """``z = f + scale * MLP(f)``, the MLP being ``layers`` times linear, batch norm, ReLU, and a linear layer.

    Args:
        dim: D.
        ratio: hidden width in units of D; at least one unit is kept.
        layers: hidden layers.
        generator: of the initial weights, which are distributed as PyTorch's own; ``None`` is PyTorch's global one.

    Shapes:
        input and output ``(B, D)``; in training mode B >= 2.
    """

    def __init__(
        self, dim: int, ratio: float = 4, layers: int = 1, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if dim < 1 or layers < 1 or not 0 < ratio < math.inf:
            raise ValueError(f"dim, ratio and layers must be positive; got {dim!r}, {ratio!r} and {layers!r}.")
        sizes = [dim, *[max(1, int(ratio * dim))] * layers]
        hidden = [
            part
            for before, after in pairwise(sizes)
            for part in (_linear(before, after, generator), nn.BatchNorm1d(after), nn.ReLU())
        ]
        self.mlp = nn.Sequential(*hidden, _linear(sizes[-1], dim, generator))
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, f: Tensor) -> Tensor:
        """Reshape features."""
        z: Tensor = f + self.scale * self.mlp(f)
        return z


def _linear(before: int, after: int, generator: torch.Generator | None) -> nn.Linear:
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, before, after)  # type: ignore[no-untyped-call]
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    nn.init.uniform_(layer.bias, -(before**-0.5), before**-0.5, generator=generator)
    return layer


class Standardize(nn.Module):
    """``(x - mean) / std``, not learned; both ``(D,)``."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        """Standardise features."""
        return (x - self.mean) / self.std


def tune(
    block: nn.Module,
    head: nn.Module,
    loss: NMTuneLoss,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    class_weight: Tensor | None = None,
) -> dict[str, float]:
    """Train on one pass over ``batches`` of ``(f, y)``; with ``nn.Identity()`` for a block this is a linear probe.

    Block and head are left in evaluation mode. Returns the mean over batches of the loss's terms; empty without any.
    """
    block.train()
    head.train()
    seen: list[dict[str, Tensor]] = []
    for f, y in batches:
        z = block(f)
        total, terms = loss(z, f, head(z), y, class_weight)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        seen.append(terms)
    block.eval()
    head.eval()
    return {name: float(torch.stack([terms[name] for terms in seen]).mean()) for name in (seen[0] if seen else ())}
