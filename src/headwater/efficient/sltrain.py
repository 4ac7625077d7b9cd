"""SLTrain: pretraining with every weight as low rank plus sparse, on a random support that never changes.

    W = (alpha / r) B A + S,    S = values on a support of floor(delta * out * in) places, drawn once

B, A and the values are trained, with everything that is not a linear layer. Weights, gradients and optimizer states
shrink together. Start: B = 0; A and the values uniform within 1 / sqrt(in).

Source: Han et al., "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
    arXiv:2406.02214, equation 1 and algorithm 1.
Differs: indices are int32 instead of int64 (half the bytes). `init: balanced` starts B A at the singular vectors of
    the ordinary start. One gradient at a time inside the backward pass, which the paper's 7B figure has, is in
    `memory_table` but not in the loop: there, gradients of all layers live until the step.
Needs: an architecture to train from scratch. It saves memory, not FLOPs: composing W adds 8 r / (6 T) to a layer's
    cost, T being the tokens of a forward pass.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from headwater.core.fit import Phase, Trained
from headwater.core.optim import OptimSpec
from headwater.core.rng import derive_seed
from headwater.core.surgery import EXCLUDED, LinearView, Replacement, replace_modules
from headwater.efficient.base import EfficientRecipe, Lean
from headwater.efficient.context import BuildContext
from headwater.efficient.linears import ComposedLinear, Rank, rank_of
from headwater.efficient.memory import Memory, memory_plan

__all__ = ["SLTrain", "apply_sltrain", "memory_table", "sltrain_param_count"]

PAPER_ALPHA = 32.0  # section 5.1, 60M; 16 at 130M and 350M, 8 at 1B and 7B
HIGH_LR = 1e-2
Init = Literal["paper", "balanced"]


def apply_sltrain(
    model: nn.Module,
    rank: int | float,
    delta: float,
    alpha: float = PAPER_ALPHA,
    *,
    seed: int,
    init: Init = "paper",
    approximate: bool = False,
    index_dtype: torch.dtype = torch.int32,
    targets: Sequence[str] = ("*",),
    exclude: Sequence[str] = EXCLUDED,
) -> tuple[Replacement, dict[str, float]]:
    """Replace linear layers by low rank plus sparse, in place.

    Args:
        model: with fresh weights, or on the meta device; with trained ones if ``approximate``.
        rank: of B A; a float is a fraction of the smaller side of each layer.
        delta: share of the places of W that S holds, in (0, 0.5].
        alpha: B A is multiplied by ``alpha / rank``; ignored by ``balanced``, whose factors have their size.
        seed: of supports and values.
        init: how B and A start.
        approximate: start near the model's present weights instead.
        index_dtype: of the supports, int32 or int64.
        targets: globs over full module names.
        exclude: globs that are left alone.

    Returns:
        What was replaced, and the relative Frobenius error of each layer if ``approximate``.

    Raises:
        ValueError: ``delta`` is out of its range or too small for a layer, a rank is not below a layer's smaller
            side, or the layers would be no smaller than they are. ``core.surgery.to_dense`` gives plain layers back.
    """
    if not 0 < delta <= 0.5:
        raise ValueError(f"delta must be in (0, 0.5]; got {delta}. Without a sparse part, use method low_rank.")
    counts = [0, 0]
    errors: dict[str, float] = {}

    def make(name: str, view: LinearView) -> ComposedLinear:
        numel = view.in_features * view.out_features
        nnz = int(delta * numel)
        if nnz < 1:
            raise ValueError(
                f"delta {delta} leaves layer {name!r} ({view.out_features} x {view.in_features}) without a sparse "
                f"value; raise it to {1 / numel:.2g}, or exclude the layer."
            )
        r = rank_of(rank, view, name)
        scale = 1.0 if init == "balanced" else alpha / r
        layer = ComposedLinear.like(view, rank=r, nnz=nnz, scale=scale, seed=seed, name=name, index_dtype=index_dtype)
        if not view.weight.is_meta:
            if approximate:
                errors[name] = layer.approximate(view.weight)
            elif init == "balanced":
                layer.balance(view.weight)
        counts[0] += r * (view.in_features + view.out_features) + nnz
        counts[1] += numel
        return layer

    replacement = replace_modules(model, make, targets=targets, exclude=exclude)
    if counts[0] >= counts[1]:
        raise ValueError(
            f"rank {rank} and delta {delta} make the layers larger than dense: {counts[0]:,} numbers instead of "
            f"{counts[1]:,}. Lower the rank."
        )
    return replacement, errors


def _on_meta(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def sltrain_param_count(config: PreTrainedConfig, rank: int | float, delta: float) -> int:
    """Trainable numbers of a causal model under SLTrain; nothing is allocated."""
    model = _on_meta(config)
    apply_sltrain(model, rank, delta, seed=0)
    return sum(p.numel() for p in model.parameters())


def memory_table(
    config: PreTrainedConfig,
    rank: int | float,
    delta: float,
    *,
    index_dtype: torch.dtype = torch.int32,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, dict[str, Memory]]:
    """What training a causal model takes, without activations; nothing is allocated.

    The four cells tell apart what the re-parameterisation saves and what the optimizer saves.

    Returns:
        By ``full`` and ``sltrain``, then by ``adam`` and ``8bit per layer`` (one-byte moments, one gradient at a time).
    """
    full, lean = _on_meta(config, dtype), _on_meta(config, dtype)
    apply_sltrain(lean, rank, delta, seed=0, index_dtype=index_dtype)
    return {
        name: {"adam": memory_plan(model), "8bit per layer": memory_plan(model, states="8bit", per_layer=True)}
        for name, model in (("full", full), ("sltrain", lean))
    }


class SLTrain(EfficientRecipe):
    """Pretraining with low rank plus fixed sparse weights."""

    id: ClassVar[str] = "sltrain"

    rank: Rank = Field(  # section 5.1: 128 of 512 at 60M, 1024 of 4096 at 7B
        default=0.25, description="of B A; a fraction is of the layer's smaller side"
    )
    delta: float = Field(  # section 5.1; 0.05 at 7B
        default=0.03, gt=0, le=0.5, description="share of a layer's places that the sparse part holds"
    )
    alpha: float | None = Field(
        default=None,
        gt=0,
        description="B A is multiplied by alpha / rank; 32 by default, and not for `init: balanced`",
    )
    init: Init = Field(
        default="paper",
        description="`paper`: B 0, A uniform; `balanced`: the leading singular vectors of the layer's own start",
    )
    index_dtype: Literal["int32", "int64"] = Field(
        default="int32", description="of the supports; a layer that is too large for int32 takes int64"
    )
    approximate: bool = Field(
        default=False, description="with `from_config: false`, start near the checkpoint's weights, at an error"
    )
    optim: OptimSpec = Field(  # section 5.1: Adam, 10 % warmup, cosine to a tenth
        default=OptimSpec(lr=3e-3, betas=(0.9, 0.999), weight_decay=0.0, warmup=0.1),
        description="how weights are moved: Adam, a schedule, clipping",
    )

    @model_validator(mode="after")
    def _consistent(self) -> SLTrain:
        if self.init == "balanced" and self.alpha is not None:
            raise ValueError("alpha scales the paper's factors; with init 'balanced' the scale is 1, so leave it out")
        if self.approximate == self.from_config:
            raise ValueError(
                "SLTrain pretrains from scratch: `from_config: false` needs `approximate: true`, which keeps the "
                "checkpoint's weights only nearly, and the other way round"
            )
        return self

    def build(self, ctx: BuildContext) -> Generator[Phase, Trained, Lean]:
        """Replace, then one phase."""
        if self.optim.lr > HIGH_LR:
            ctx.warn("lr", f"a learning rate of {self.optim.lr:g} is above {HIGH_LR:g}, where SLTrain tends to diverge")
        model = ctx.start()
        replacement, errors = apply_sltrain(
            model,
            self.rank,
            self.delta,
            self.alpha or PAPER_ALPHA,
            seed=derive_seed(self.seed, "sltrain"),
            init=self.init,
            approximate=self.approximate,
            index_dtype=getattr(torch, self.index_dtype),
            targets=self.targets,
            exclude=self.exclude,
        )
        for name, error in errors.items():
            ctx.warn(f"approximate/{name}", f"{name} starts {error:.1%} away from its weight (relative Frobenius norm)")
        trained = yield ctx.phase(model)
        ctx.run.write_json("spectrum.json", _spectra(trained.model, sorted(replacement.replaced)))
        return Lean(
            model,
            files=("memory.json", "spectrum.json"),
            notes=(("replaced", f"{len(replacement.replaced)} layers, {replacement.share:.1%} of the weights"),),
        )


@torch.no_grad()
def _spectra(model: nn.Module, names: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Singular values of (alpha / r) B A and of S, in the first, middle and last layer."""
    found = {}
    for name in dict.fromkeys((names[0], names[len(names) // 2], names[-1])):
        layer = model.get_submodule(name)
        assert isinstance(layer, ComposedLinear)
        product = layer.scale * (layer.left.float() @ layer.right.float())
        parts = {"low_rank": product, "sparse": layer.weight.float() - product}
        found[name] = {part: torch.linalg.svdvals(matrix).tolist() for part, matrix in parts.items()}
    return found
