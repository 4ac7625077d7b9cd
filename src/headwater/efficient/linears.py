"""A linear layer whose weight is composed of a low-rank product and a sparse part on a fixed support.

    W = scale * L R + S,    S[support] = values

    with g = dloss/dy and G = g^T x:   dx = g W,   dL = scale G R^T,   dR = scale L^T G,   dvalues = G[support]

The dense W exists while the layer computes and is composed again in the backward pass, so between the two nothing is
kept that a plain layer would not keep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from headwater.core.rng import torch_generator
from headwater.core.surgery import LinearView, load_factored

__all__ = ["ComposedLinear", "Rank", "compose", "draw_support", "load_composed", "rank_of"]

_INT32_LIMIT = 2**31

Rank = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)]
"""A rank as a recipe has it: a number, or a fraction of the smaller side of each layer."""


def rank_of(rank: int | float, view: LinearView, name: str) -> int:
    """The rank of one layer, at least 1.

    Raises:
        ValueError: it is not below the smaller side of the layer.
    """
    side = min(view.in_features, view.out_features)
    resolved = rank if isinstance(rank, int) else max(1, int(rank * side))
    if not 1 <= resolved < side:
        raise ValueError(
            f"layer {name!r} is {view.out_features} x {view.in_features}: rank {rank} is not below {side}."
        )
    return resolved


def draw_support(numel: int, count: int, generator: torch.Generator) -> Tensor:
    """Positions drawn uniformly without replacement, ``(count,)`` int64, ascending.

    Rejection instead of a permutation of everything: a matrix of a large model has 45 million places.

    Raises:
        ValueError: ``count`` is not in [0, ``numel``].
    """
    if not 0 <= count <= numel:
        raise ValueError(f"the support must hold between 0 and {numel} places; got {count}.")
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < count:
        # So many draws hit `count` different places on average; a tenth of the matrix is always enough to go on with.
        missing = (count - len(drawn)) / max(numel - len(drawn), 1)
        draws = math.ceil(-numel * math.log1p(-min(missing, 0.9)) * 1.02) + 16
        drawn = torch.unique(torch.cat([drawn, torch.randint(numel, (draws,), generator=generator)]))
    surplus = len(drawn) - count
    if not surplus:
        return drawn
    keep = torch.ones(len(drawn), dtype=torch.bool)
    keep[torch.randperm(len(drawn), generator=generator)[:surplus]] = False
    return drawn[keep]


def compose(left: Tensor, right: Tensor, values: Tensor, index: Tensor, scale: float) -> Tensor:
    """The dense weight ``scale * left @ right + S``, ``(out, in)``.

    Args:
        left: ``(out, rank)``; a rank of 0 gives zeros.
        right: ``(rank, in)``.
        values: ``(nnz,)``.
        index: ``(nnz,)`` int32 or int64, places in the flattened weight, each once.
        scale: of the product.
    """
    weight = torch.mm(left, right).mul_(scale) if left.shape[1] else left.new_zeros(left.shape[0], right.shape[1])
    weight.view(-1).index_add_(0, index, values)
    return weight


class _ComposedProduct(torch.autograd.Function):
    """``F.linear(x, compose(...), bias)`` that keeps x and the parts, not the weight."""

    @staticmethod
    def forward(
        ctx: Any,  # Any: torch's context object
        x: Tensor,
        left: Tensor,
        right: Tensor,
        values: Tensor,
        index: Tensor,
        bias: Tensor | None,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # the casts are ours, once, as autocast would do them
            inputs = x.to(dtype)
            ctx.save_for_backward(inputs, left, right, values, index)
            ctx.scale, ctx.dtypes = scale, (x.dtype, dtype, None if bias is None else bias.dtype)
            weight = compose(left, right, values, index, scale).to(dtype)
            return F.linear(inputs, weight, None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # Any: torch's context object
        inputs, left, right, values, index = ctx.saved_tensors
        x_dtype, dtype, bias_dtype = ctx.dtypes
        need_x, need_left, need_right, need_values, _, need_bias, *_ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        dx = dleft = dright = dvalues = dbias = None
        with torch.autocast(grad.device.type, enabled=False):
            if need_x:
                dx = (grad @ compose(left, right, values, index, ctx.scale).to(dtype)).to(x_dtype)
            if need_left or need_right or need_values:
                dense = torch.mm(rows.T, inputs.reshape(-1, inputs.shape[-1])).to(left.dtype)
                if need_values:
                    dvalues = dense.view(-1).index_select(0, index)
                if left.shape[1]:
                    dleft = torch.mm(dense, right.T).mul_(ctx.scale) if need_left else None
                    dright = torch.mm(left.T, dense).mul_(ctx.scale) if need_right else None
            if need_bias:
                dbias = rows.sum(0).to(bias_dtype)
        return dx, dleft, dright, dvalues, None, dbias, None, None


class ComposedLinear(nn.Module):
    """Linear layer of a low-rank and a sparse part; without the sparse part, of two thin layers.

    Fresh values: ``left`` 0, ``right`` and ``values`` uniform within ``1 / sqrt(in_features)``.

    Args:
        in_features: width of what goes in.
        out_features: width of what comes out.
        rank: columns of ``left``; 0 for a sparse layer.
        nnz: numbers on the support; 0 for a low-rank layer.
        scale: of the low-rank product.
        bias: whether there is one; it starts at 0.
        seed: of support and values.
        name: of the layer: layers of one model and seed differ by it.
        index_dtype: of the support; int64 is taken where int32 is too small.
        device: of the parameters; nothing is drawn on the meta device.
        dtype: of the parameters.

    Raises:
        ValueError: neither part is there, or one is larger than the weight.
    """

    left: nn.Parameter
    right: nn.Parameter
    values: nn.Parameter
    index: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 0,
        nnz: int = 0,
        scale: float = 1.0,
        bias: bool = False,
        seed: int,
        name: str = "",
        index_dtype: torch.dtype = torch.int32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        numel = in_features * out_features
        if rank == 0 and nnz == 0:
            raise ValueError(f"layer {name!r} would be empty: give a rank or a number of sparse values above 0.")
        if not 0 <= rank <= min(in_features, out_features) or not 0 <= nnz <= numel:
            raise ValueError(
                f"layer {name!r} is {out_features} x {in_features}: rank must be within "
                f"{min(in_features, out_features)} and nnz within {numel}; got {rank} and {nnz}."
            )
        self.in_features, self.out_features, self.rank, self.nnz = in_features, out_features, rank, nnz
        self.scale = scale
        on = {"device": device, "dtype": dtype}
        # A part that is absent is empty and frozen: DDP and optimizers need not know of it.
        self.left = nn.Parameter(torch.zeros(out_features, rank, **cast(Any, on)), rank > 0)
        self.right = nn.Parameter(torch.empty(rank, in_features, **cast(Any, on)), rank > 0)
        self.values = nn.Parameter(torch.empty(nnz, **cast(Any, on)), nnz > 0)
        self.bias = nn.Parameter(torch.zeros(out_features, **cast(Any, on))) if bias else None
        index_dtype = index_dtype if numel < _INT32_LIMIT else torch.int64
        # A persistent buffer: it is saved, checkpointed and moved with the values that it places.
        self.register_buffer("index", torch.empty(nnz, dtype=index_dtype, device=self.values.device))
        if self.index.is_meta:
            return
        bound = 1 / math.sqrt(in_features)
        with torch.no_grad():
            self.index.copy_(draw_support(numel, nnz, torch_generator(seed, "support", name)))
            for part in ("right", "values"):
                parameter: Tensor = getattr(self, part)
                drawn = torch.rand(parameter.shape, generator=torch_generator(seed, part, name))
                parameter.copy_((2 * drawn - 1) * bound)

    @classmethod
    def like(cls, view: LinearView, **arguments: Any) -> Self:  # Any: the keyword arguments of the class
        """A fresh layer of the shape, device and dtype of an existing one, with its bias."""
        layer = cls(
            view.in_features,
            view.out_features,
            bias=view.bias is not None,
            device=view.weight.device,
            dtype=view.weight.dtype,
            **arguments,
        )
        if view.bias is not None and layer.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(view.bias)
        return layer

    @torch.no_grad()
    def approximate(self, weight: Tensor) -> float:
        """Come near a given weight ``(out, in)``: its truncated SVD, and what that leaves on the support.

        Returns:
            Relative Frobenius error of the composed weight.
        """
        target = weight.float()
        product = self._truncate(target)
        self.values.copy_((target - product).flatten().index_select(0, self.index))
        return float(torch.linalg.vector_norm(target - self.weight.float()) / torch.linalg.vector_norm(target))

    @torch.no_grad()
    def balance(self, weight: Tensor) -> None:
        """Start the low-rank part at the truncated SVD of a given weight ``(out, in)``, stretched to its norm."""
        target = weight.float()
        product = self._truncate(target)
        stretch = (torch.linalg.vector_norm(target) / torch.linalg.vector_norm(product)).sqrt()
        self.left.mul_(stretch)
        self.right.mul_(stretch)

    def _truncate(self, target: Tensor) -> Tensor:
        u, s, vh = torch.linalg.svd(target, full_matrices=False)
        root = (s[: self.rank] / self.scale).sqrt()
        self.left.copy_(u[:, : self.rank] * root)
        self.right.copy_(root[:, None] * vh[: self.rank])
        return self.scale * (self.left.float() @ self.right.float())

    @property
    def weight(self) -> Tensor:
        """The composed weight ``(out, in)``, detached."""
        with torch.no_grad():
            return compose(self.left, self.right, self.values, self.index, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` -> ``(..., out)``."""
        if not self.nnz:
            return F.linear(F.linear(x, self.right) * self.scale, self.left, self.bias)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        product: Tensor = _ComposedProduct.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            x, self.left, self.right, self.values, self.index, self.bias, self.scale, dtype
        )
        return product

    def to_linear(self) -> nn.Linear:
        """An ordinary layer with the composed weight."""
        bias, weight = self.bias, self.weight
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, any(p.requires_grad for p in (self.left, self.right, self.values)))
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        return linear

    def arguments(self) -> Mapping[str, Any]:  # Any: JSON data
        """What ``ComposedLinear.like`` needs to make the same layer before its tensors are read."""
        return {
            "rank": self.rank,
            "nnz": self.nnz,
            "scale": self.scale,
            "index_dtype": str(self.index.dtype).removeprefix("torch."),
        }

    def step_flops(self, tokens: int) -> tuple[float, float]:
        """FLOPs of one forward and backward pass over ``tokens``: executed here, and on paper.

        Executed are dense products with the composed weight, and composing it twice. On paper the parts multiply
        the activations themselves: what hardware that skips zeros would do.
        """
        thin = 6.0 * tokens * self.rank * (self.in_features + self.out_features)
        if not self.nnz:
            return thin, thin
        dense = self.in_features * self.out_features
        return 6.0 * tokens * dense + 8.0 * self.rank * dense, thin + 6.0 * tokens * self.nnz

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, nnz={self.nnz}, scale={self.scale:g}"


def load_composed(directory: Path) -> PreTrainedModel:
    """Open the ``factored/`` directory of a run whose layers are composed, bit for bit, supports included.

    Raises:
        FileNotFoundError: it holds no complete factored model.
    """

    def make(name: str, view: LinearView, arguments: Mapping[str, Any]) -> ComposedLinear:  # Any: JSON data
        known = {**arguments, "index_dtype": getattr(torch, arguments["index_dtype"])}
        return ComposedLinear.like(view, seed=0, name=name, **known)  # what the seed draws is overwritten

    return load_factored(directory, make)
