"""The regulariser of ``pego``: low-rank updates orthogonal to the pretrained weight and to each other.

With W (out x in) the pretrained weight and D_i = B_i A_i the updates of a group, B_i (out x r), A_i (r x in)::

    L_o = sum over projections of [ sum_i ||W D_i^T||_1 + sum_{i<j} ||D_i D_j^T||_1 ]      ||M||_1 = sum_kl |M_kl|

Rows are compared by their inner products over the input dimension. No ``out x out`` product of full matrices is formed:

    W D_i^T = (W A_i^T) B_i^T        D_i D_j^T = (B_i A_i A_j^T) B_j^T              O(out^2 r) in place of O(out^3)

and the absolute values are summed over blocks of rows, with their gradient, so that memory holds one block.

Source: Hu et al., "Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain
    Generalization", arXiv:2407.15085.
Differs: whether the norm is the paper's could not be checked against its formulas; the sum of absolute values is what
    its code is known to use, and ``"fro2"``, the squared Frobenius norm, is there beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

__all__ = [
    "FUSED",
    "OrthogonalGroupLoss",
    "Projection",
    "group_figures",
    "group_terms",
    "projections",
    "sum_abs_product",
]

FUSED = ("c_attn", "qkv")
"""Names of linear layers whose rows are query, key and value, a third each; the query's and value's are adapted."""

_BLOCK = 1 << 22  # entries of a block: 16 MB of float32

Norm = Literal["l1", "fro2"]
Factors = Sequence[tuple[Tensor, Tensor]]
"""(B, A) of each update, ``(out, r)`` and ``(r, in)``."""


class _SumAbsProduct(torch.autograd.Function):
    """The gradient, sign(L R^T) R and sign(L R^T)^T L, is summed in the same pass over blocks as the value."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, block: int) -> Tensor:  # Any: autograd's context
        rows = max(1, block // max(1, len(right)))
        wanted = any(ctx.needs_input_grad)
        total = left.new_zeros(())
        grad_left, grad_right = torch.zeros_like(left), torch.zeros_like(right)
        for begin in range(0, len(left), rows):
            part = left[begin : begin + rows]
            product = part @ right.T
            if wanted:
                sign = product.sign()
                grad_left[begin : begin + rows] = sign @ right
                grad_right += sign.T @ part
            total += product.abs_().sum()
        ctx.save_for_backward(grad_left, grad_right)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # Any: autograd's context
        grad_left, grad_right = ctx.saved_tensors
        return grad * grad_left, grad * grad_right, None


def sum_abs_product(left: Tensor, right: Tensor, *, block: int = _BLOCK) -> Tensor:
    """``sum_kl |left @ right.T|_kl`` without holding the product; differentiable once, with sign(0) = 0.

    Args:
        left: ``(m, r)``.
        right: ``(n, r)``.
        block: entries of the product that are held at a time; at least one row.

    Returns:
        A scalar.
    """
    total: Tensor = _SumAbsProduct.apply(left, right, block)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return total


def _squared_product(left: Tensor, right: Tensor) -> Tensor:
    """``||left @ right.T||_F^2``, through ``(r, r)`` matrices."""
    return ((left.T @ left) * (right.T @ right)).sum()


def group_terms(weight: Tensor, factors: Factors, norm: Norm = "l1") -> tuple[Tensor, Tensor]:
    """Both sums of the regulariser for one projection.

    Args:
        weight: the pretrained W, ``(out, in)``; no gradient flows into it.
        factors: (B, A) of each update, ``(out, r)`` and ``(r, in)``.
        norm: ``"l1"``, the sum of absolute entries; ``"fro2"``, of squared ones.

    Returns:
        ``sum_i ||W D_i^T||`` and ``sum_{i<j} ||D_i D_j^T||``, scalars; the second is 0 for a single update.

    Raises:
        ValueError: shapes that do not fit, or an unknown norm.
    """
    if norm not in ("l1", "fro2"):
        raise ValueError(f"norm must be 'l1' or 'fro2'; got {norm!r}.")
    for up, down in factors:
        if (len(up), down.shape[1]) != tuple(weight.shape) or up.shape[1] != len(down):
            raise ValueError(
                f"an update of a weight {tuple(weight.shape)} is B (out, r) times A (r, in); "
                f"got {tuple(up.shape)} and {tuple(down.shape)}."
            )
    measure = sum_abs_product if norm == "l1" else _squared_product
    weight = weight.detach()
    preserve, diversify = weight.new_zeros(()), weight.new_zeros(())
    for number, (up, down) in enumerate(factors):
        preserve = preserve + measure(weight @ down.T, up)
        for other_up, other_down in factors[:number]:
            diversify = diversify + measure(other_up @ (other_down @ down.T), up)
    return preserve, diversify


@dataclass(frozen=True, eq=False)
class Projection:
    """Rows of a linear layer that bear LoRA adapters, and what the adapters add to them.

    Attributes:
        name: of the layer in its model.
        layer: PEFT's, around a ``Linear`` or a GPT-2 ``Conv1D``.
        rows: of the weight as ``(out, in)``; of a fused layer those of the query or of the value.
    """

    name: str
    layer: LoraLayer
    rows: slice

    def weight(self) -> Tensor:
        """The pretrained rows, ``(out, in)``, in float32 or wider, detached."""
        base = self.layer.get_base_layer()
        weight: Tensor = base.weight.detach()
        return _wide(weight.T if isinstance(base, Conv1D) else weight)[self.rows]

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """(B, A) of each active adapter, ``(out, r)`` and ``(r, in)``, its scaling in B."""
        return [
            (_wide(self.layer.lora_B[name].weight)[self.rows] * self.layer.scaling[name], _wide(down.weight))
            for name, down in self.layer.lora_A.items()
            if name in self.layer.active_adapters
        ]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def projections(model: nn.Module) -> list[Projection]:
    """Every adapted linear layer of a PEFT model; fused ones as their query and their value.

    Raises:
        ValueError: there is none, or a weight that is no floating-point matrix, such as a quantised one.
    """
    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and layer.lora_A:
            weight = getattr(layer.get_base_layer(), "weight", None)
            if weight is None or weight.ndim != 2 or not weight.is_floating_point():
                raise ValueError(f"{name}: its pretrained weight is no matrix of floats; dequantise the model first.")
            found += [Projection(name, layer, rows) for rows in adapted_rows(name, layer.out_features)]
    if not found:
        raise ValueError("no layer of this model bears a LoRA adapter; make it with `pego_model`, or with PEFT.")
    return found


def adapted_rows(name: str, out: int) -> Iterator[slice]:
    """The rows of a layer that are adapted: all, or query and value of a fused one."""
    if name.rpartition(".")[2] not in FUSED:
        yield slice(0, out)
        return
    if out % 3:
        raise ValueError(f"{name}: {out} rows are no query, key and value of one size; adapt unfused layers instead.")
    yield slice(0, out // 3)
    yield slice(2 * out // 3, out)


class OrthogonalGroupLoss:
    """The regulariser over all adapted projections of a model; it holds no weights of its own.

    Args:
        model: with LoRA adapters of PEFT; those active when it is called count.
        norm: see ``group_terms``.
        preserve: weight of the products with the pretrained weight.
        diversify: weight of the products of the updates with each other.

    Raises:
        ValueError: see ``projections``.
    """

    def __init__(self, model: nn.Module, norm: Norm = "l1", preserve: float = 1.0, diversify: float = 1.0) -> None:
        self.projections = projections(model)
        self.norm, self.preserve, self.diversify = norm, preserve, diversify

    def __call__(self) -> Tensor:
        """``preserve * sum ||W D_i^T|| + diversify * sum ||D_i D_j^T||``, a scalar, not below float32."""
        device = self.projections[0].weight().device
        total = torch.zeros((), device=device)
        with torch.autocast(device.type, enabled=False):  # a sum of 10^7 terms
            for projection in self.projections:
                preserve, diversify = group_terms(projection.weight(), projection.factors(), self.norm)
                total = total + self.preserve * preserve + self.diversify * diversify
        return total


@torch.no_grad()
def group_figures(model: nn.Module) -> dict[str, float]:
    """How orthogonal, how many-sided and how large the updates are, as means over projections.

    Returns:
        ``preserve``: ``||W D^T||_1 / (out ||W||_F ||D||_F)``, a number in [0, 1] that does not depend on the size of W
        or D, over updates. ``diversify``: likewise for pairs of updates; 0 where there is one. ``effective_rank``: of
        the sum of updates, the exponential of the entropy of its singular values (Roy and Vetterli, 2007), at most the
        ranks' sum. ``size``: ``||sum_i D_i||_F / ||W||_F``. An update of zeros counts as orthogonal, of rank 0.
    """
    preserve, diversify, ranks, sizes = [], [], [], []
    for projection in projections(model):
        weight, factors = projection.weight(), projection.factors()
        norms = [_norm(up, down) for up, down in factors]
        whole = float(weight.norm())
        for number, (up, down) in enumerate(factors):
            preserve.append(_share(weight @ down.T, up, whole * norms[number]))
            for before in range(number):
                other_up, other_down = factors[before]
                diversify.append(_share(other_up @ (other_down @ down.T), up, norms[before] * norms[number]))
        ups, downs = torch.cat([up for up, _ in factors], 1), torch.cat([down for _, down in factors], 0)
        values = torch.linalg.svdvals(torch.linalg.qr(ups).R @ torch.linalg.qr(downs.T).R.T)
        shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
        ranks.append(float(torch.special.entr(shares).sum().exp()) if float(values.sum()) > 0 else 0.0)
        sizes.append(float(values.norm()) / whole if whole else 0.0)
    names = ("preserve", "diversify", "effective_rank", "size")
    means = (sum(own) / len(own) if own else 0.0 for own in (preserve, diversify, ranks, sizes))
    return dict(zip(names, means, strict=True))


def _norm(up: Tensor, down: Tensor) -> float:
    """``||up @ down||_F``."""
    return float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt())


def _share(left: Tensor, right: Tensor, norms: float) -> float:
    return float(sum_abs_product(left, right)) / (len(left) * norms) if norms else 0.0
