"""AdamW and SGD with the settings that a recipe holds: parameter groups, schedules, and the optimizers themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from torch import nn

from headwater.core.optim8 import AdamW8bit

__all__ = [
    "AdamWSpec",
    "AnyOptim",
    "OptimChoice",
    "OptimSpec",
    "SgdSpec",
    "build_optimizer",
    "lr_factor",
    "parameter_groups",
]


class OptimSpec(BaseModel):
    """How weights are moved: AdamW, a schedule over the fraction of the budget spent, clipping by global norm.

    Sources: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101; inverse square root:
    Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, equation 3.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    lr: float = Field(default=1e-4, gt=0, description="Highest learning rate, reached at the end of warmup.")
    betas: tuple[float, float] = Field(
        default=(0.9, 0.95), description="Decay of AdamW's first and second moment, in [0, 1)."
    )
    eps: float = Field(default=1e-8, gt=0, description="Added to the root of the second moment.")
    weight_decay: float = Field(
        default=0.01, ge=0, description="Decoupled decay of matrices; vectors and scalars have none."
    )
    warmup: float = Field(
        default=0.03, ge=0, lt=1, description="Fraction of the budget over which the rate rises from 0."
    )
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt", "triangle"] = Field(
        default="cosine",
        description="Shape after warmup. 'triangle' ignores warmup: up to the middle of the budget, then down.",
    )
    final_lr: float = Field(
        default=0.1, ge=0, le=1, description="Rate at the end, as a fraction of lr; 'constant' ignores it."
    )
    clip: float | None = Field(default=1.0, gt=0, description="Largest global gradient norm; null for none.")
    states: Literal["fp32", "8bit"] = Field(
        default="fp32", description="How moments are kept: as the weights are, or in blocks of bytes with a scale each."
    )

    @model_validator(mode="after")
    def _consistent(self) -> OptimSpec:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1); got {self.betas}.")
        if self.schedule == "inverse_sqrt" and self.warmup == 0:
            raise ValueError("schedule 'inverse_sqrt' decays from the end of warmup, so warmup must be above 0; got 0.")
        return self


class SgdSpec(BaseModel):
    """How weights are moved: SGD with momentum, a schedule over the fraction of the budget spent, clipping."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["sgd"] = Field(default="sgd", description="SGD with momentum")
    lr: float = Field(default=0.01, gt=0, description="Highest learning rate, reached at the end of warmup.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Decay of the running sum of gradients.")
    weight_decay: float = Field(
        default=5e-4, ge=0, description="L2 penalty of matrices; vectors and scalars have none."
    )
    warmup: float = Field(
        default=0.0, ge=0, lt=1, description="Fraction of the budget over which the rate rises from 0."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="Shape after warmup.")
    final_lr: float = Field(
        default=0.0, ge=0, le=1, description="Rate at the end, as a fraction of lr; 'constant' ignores it."
    )
    clip: float | None = Field(default=None, gt=0, description="Largest global gradient norm; null for none.")


class AdamWSpec(OptimSpec):
    """``OptimSpec`` under a name, for recipes that offer a choice of optimizers."""

    kind: Literal["adamw"] = Field(default="adamw", description="AdamW")


AnyOptim = OptimSpec | SgdSpec
"""What ``fit`` takes."""


def _kind(value: Any) -> str:  # Any: what the user wrote, or a spec
    kind = value.get("kind", "sgd") if isinstance(value, dict) else getattr(value, "kind", "sgd")
    return str(kind)


OptimChoice = Annotated[
    Annotated[SgdSpec, Tag("sgd")] | Annotated[AdamWSpec, Tag("adamw")],
    # A function rather than the field's name, so that {lr: 0.03} alone, as a grid sets it, still means SGD.
    Discriminator(_kind),
]
"""What a recipe holds where the user chooses the optimizer: ``{lr: 0.01}``, or ``{kind: adamw, lr: 1e-4}``."""


def lr_factor(spec: AnyOptim, progress: float) -> float:
    """What to multiply ``spec.lr`` by when a fraction ``progress`` of the budget has been spent.

    Args:
        spec: its ``warmup``, ``schedule`` and ``final_lr`` are read.
        progress: in [0, 1]; values outside are clamped (the clock of a budget in seconds overruns).

    Returns:
        In [0, 1].
    """
    progress = min(max(progress, 0.0), 1.0)
    floor = spec.final_lr
    if spec.schedule == "triangle":
        return 2 * progress if progress <= 0.5 else floor + (1 - floor) * (2 - 2 * progress)
    if progress < spec.warmup:
        return progress / spec.warmup
    after = (progress - spec.warmup) / (1 - spec.warmup)
    if spec.schedule == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * after))
    if spec.schedule == "linear":
        return floor + (1 - floor) * (1 - after)
    if spec.schedule == "inverse_sqrt":
        return max(floor, math.sqrt(spec.warmup / progress))
    return 1.0


def _trainable(model: nn.Module | Sequence[nn.Module]) -> list[nn.Parameter]:
    modules = [model] if isinstance(model, nn.Module) else list(model)
    return list(dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad))


def parameter_groups(
    model: nn.Module | Sequence[nn.Module], spec: AnyOptim, rates: Sequence[float] | None = None
) -> list[dict[str, object]]:
    """Two groups for each rate: matrices (two dimensions or more) with weight decay, vectors and scalars without.

    Parameters that several modules share stand once, with the first one's rate, frozen ones not at all, and empty
    groups are left out.

    Args:
        model: one module or several.
        spec: its ``lr`` and ``weight_decay`` are read.
        rates: for each module, what its learning rate is multiplied by; kept in the group as ``rate``, for a schedule
            that sets ``lr`` anew at every step. 1 by default.

    Example:
        >>> backbone, head = nn.Linear(4, 3), nn.Linear(3, 2)
        >>> groups = parameter_groups([backbone, head], SgdSpec(lr=0.01), rates=(0.01, 1.0))
        >>> [group["lr"] for group in groups]
        [0.0001, 0.0001, 0.01, 0.01]
    """
    modules = [model] if isinstance(model, nn.Module) else list(model)
    rate_of: dict[nn.Parameter, float] = {}
    for module, rate in zip(modules, [1.0] * len(modules) if rates is None else rates, strict=True):
        for parameter in _trainable(module):
            rate_of.setdefault(parameter, rate)
    groups: list[dict[str, object]] = []
    for rate in dict.fromkeys(rate_of.values()):
        own = [p for p, its in rate_of.items() if its == rate]
        lr = {"lr": spec.lr * rate, "rate": rate}
        groups.append({"params": [p for p in own if p.ndim >= 2], "weight_decay": spec.weight_decay, **lr})
        groups.append({"params": [p for p in own if p.ndim < 2], "weight_decay": 0.0, **lr})
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module | Sequence[nn.Module], spec: AnyOptim, rates: Sequence[float] | None = None
) -> torch.optim.Optimizer:
    """AdamW or SGD over everything trainable in one module or several; one fused kernel on CPU and CUDA.

    Arguments as ``parameter_groups``.

    Raises:
        ValueError: nothing requires a gradient.
    """
    groups = parameter_groups(model, spec, rates)
    if not groups:
        raise ValueError("nothing to train: no parameter of the model or of the objective requires a gradient.")
    if isinstance(spec, OptimSpec) and spec.states == "8bit":
        return AdamW8bit(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay)
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in _trainable(model))
    if isinstance(spec, SgdSpec):
        return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay, fused=fused)
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=fused)
