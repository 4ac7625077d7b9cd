"""LoRA by recipe: the fields, and putting adapters on a model through PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from headwater.core.recipe import Spec

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LoraSpec", "add_lora"]


class LoraSpec(Spec):
    """Low-rank adapters in PEFT's terms (Hu et al., arXiv:2106.09685)."""

    r: int = Field(default=8, gt=0, description="rank of each adapter")
    alpha: float = Field(default=16.0, gt=0, description="the adapter's output is scaled by alpha / r")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear", description="names of the modules that get adapters; `all-linear` leaves the head out"
    )


def add_lora(model: nn.Module, spec: LoraSpec, *, seed: int, whole: Sequence[str] = ()) -> nn.Module:
    """Wrap ``model`` in a PEFT model whose only trainable weights are new adapters, and modules trained whole.

    Args:
        model: a Hugging Face model; its own weights are frozen in place.
        spec: the adapters.
        seed: of the adapters' initialisation; the global generator is left as it was.
        whole: names of modules that are trained and saved whole, such as a new head.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    targets = spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
        modules_to_save=list(whole) or None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped: nn.Module = get_peft_model(model, config)
    return wrapped
