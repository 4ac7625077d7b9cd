"""AdamW whose moments take one byte each instead of four.

    q = nearest code of (x / max |x| of its block);   x' = code[q] * max |x| of its block

The codes lie densely near zero: each of seven decades has twice as many as the one below it. The first moment has a
sign, the second has none. One block is 256 numbers with one float32 maximum: 1 + 4/256 bytes a number and moment.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861, section 2; dynamic codes:
    Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", arXiv:1511.04561.
Differs: a second moment above zero is never stored as zero, where the next step would divide by epsilon alone; no
    fused kernel, so a step is slower than float32's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, overload

import torch
from torch import Tensor

__all__ = ["BLOCK", "AdamW8bit", "dequantize", "dynamic_codes", "quantize"]

BLOCK = 256
_DECADES = 7


@cache
def dynamic_codes(signed: bool) -> Tensor:
    """The 256 numbers that a byte stands for, ascending, ``(256,)`` float32 in [-1, 1] or [0, 1].

    In the decade that ends at ``10**-k`` the codes are the middles of equal steps; 0 and 1 come on top.
    """
    middles: list[float] = []
    for decade in range(_DECADES):
        edges = torch.linspace(0.1, 1.0, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float64)
        middles += ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - _DECADES + 1)).tolist()
    negative = [-m for m in middles] if signed else []
    return torch.tensor(sorted([*negative, 0.0, *middles, 1.0]), dtype=torch.float32)


def quantize(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Round a tensor to codes.

    Args:
        values: any shape, floating; without ``signed``, nothing below zero.
        signed: which codes.

    Returns:
        codes ``(numel,)`` uint8, and the blocks' largest magnitudes ``(ceil(numel / 256),)`` float32. Positive values
        without sign never become 0.
    """
    flat = values.detach().flatten().float()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = padded.abs().amax(dim=1)
    scaled = padded / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = dynamic_codes(signed).to(values.device)
    index = torch.bucketize(scaled, (codes[1:] + codes[:-1]) / 2)
    if not signed:
        index = torch.where(padded > 0, index.clamp(min=1), index)
    return index.flatten()[: len(flat)].to(torch.uint8), largest


def dequantize(codes: Tensor, largest: Tensor, shape: torch.Size, *, signed: bool) -> Tensor:
    """The inverse of ``quantize`` up to rounding, ``shape`` float32."""
    values = dynamic_codes(signed).to(codes.device)[codes.long()]
    return (values * largest.repeat_interleave(BLOCK)[: len(codes)]).view(shape)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with block-wise quantised moments. The state of a parameter is tensors only.

    One parameter's moments are unpacked at a time, so the extra memory of a step is that of the largest parameter.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of the moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        min_size: parameters with fewer numbers keep float32 moments.

    Raises:
        ValueError: a setting is out of its range, or a gradient is sparse.
    """

    def __init__(
        self,
        params: Iterable[Any],  # Any: parameters, or dictionaries as torch.optim has them
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        min_size: int = 4096,
    ) -> None:
        if lr < 0 or eps <= 0 or weight_decay < 0 or min_size < 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(
                f"need lr >= 0, eps > 0, weight_decay >= 0, min_size >= 0 and betas in [0, 1); got lr={lr}, eps={eps}, "
                f"weight_decay={weight_decay}, min_size={min_size}, betas={betas}."
            )
        self._min_size = min_size
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # Any: as torch has it
        """Restore a state bit for bit."""
        super().load_state_dict(state_dict)
        # torch casts what it loads to the parameter's dtype, which would make floats of the codes.
        for group, stored in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, number in zip(group["params"], stored["params"], strict=True):
                for name, value in state_dict["state"].get(number, {}).items():
                    device = "cpu" if name == "step" else parameter.device
                    self.state[parameter][name] = value.to(device, copy=True)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:  # Any: torch's groups
        gradient = parameter.grad
        assert gradient is not None
        if gradient.layout is not torch.strided:
            raise ValueError("AdamW8bit takes dense gradients; make the embedding's `sparse` false.")
        gradient, state = gradient.float(), self.state[parameter]
        packed = parameter.numel() >= self._min_size
        first, second = self._moments(parameter, packed)
        step = state["step"] = state.get("step", torch.zeros(())) + 1
        beta1, beta2 = group["betas"]
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        count = float(step)  # on the CPU: no device waits for it
        size = group["lr"] / (1 - beta1**count)
        root = (second / (1 - beta2**count)).sqrt_().add_(group["eps"])
        moved = parameter.float().mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(first, root, value=-size)
        parameter.copy_(moved)
        if packed:
            state["first_codes"], state["first_largest"] = quantize(first, signed=True)
            state["second_codes"], state["second_largest"] = quantize(second, signed=False)

    def _moments(self, parameter: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
        state, shape = self.state[parameter], parameter.shape
        if "step" not in state:
            zeros = [torch.zeros(shape, dtype=torch.float32, device=parameter.device) for _ in range(2)]
            if not packed:
                state["first"], state["second"] = zeros
            return zeros[0], zeros[1]
        if not packed:
            return state["first"], state["second"]
        return (
            dequantize(state["first_codes"], state["first_largest"], shape, signed=True),
            dequantize(state["second_codes"], state["second_largest"], shape, signed=False),
        )
