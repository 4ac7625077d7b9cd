"""What training a model takes in memory: computed from its shapes, and measured on one of its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from headwater.core.objective import Objective
from headwater.core.optim8 import BLOCK

__all__ = ["Memory", "States", "activation_bytes", "measured_memory", "memory_plan"]

States = Literal["same", "8bit"]
"""Adam's two moments: in the weights' dtype, as torch keeps them, or in blocks of bytes (``core.optim8``)."""

_STEP_BYTES = 4  # the optimizer's step counter, one for each parameter


@dataclass(frozen=True)
class Memory:
    """Bytes that training holds besides activations.

    Attributes:
        weights: parameters, trainable or not.
        gradients: that are there at once.
        states: of the optimizer.
        index: integer buffers: where sparse values stand.
    """

    weights: int
    gradients: int
    states: int
    index: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.weights + self.gradients + self.states + self.index

    def to_dict(self) -> dict[str, int]:
        """As JSON has it."""
        return {**asdict(self), "total": self.total}

    def __str__(self) -> str:
        lines = [f"{name:<10} {value / 1e9:9.3f} GB" for name, value in self.to_dict().items()]
        return "\n".join(lines)


def memory_plan(model: nn.Module, *, states: States = "same", per_layer: bool = False, min_size: int = 4096) -> Memory:
    """Compute what training with AdamW takes, from shapes alone: the model may lie on the meta device.

    Args:
        model: with the layers that will be trained.
        states: how the optimizer keeps its moments.
        per_layer: each gradient is used and freed inside the backward pass, so that one lives at a time.
        min_size: with ``8bit``, smaller parameters keep float32 moments.
    """
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    gradients = [_bytes(p) for p in trained]
    return Memory(
        weights=sum(map(_bytes, parameters)),
        gradients=max(gradients, default=0) if per_layer else sum(gradients),
        states=sum(_state_bytes(p, states, min_size) + _STEP_BYTES for p in trained),
        index=_index_bytes(model),
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _state_bytes(parameter: Tensor, states: States, min_size: int) -> int:
    if states == "same":
        return 2 * _bytes(parameter)
    count = parameter.numel()
    return 2 * 4 * count if count < min_size else 2 * (count + 4 * -(-count // BLOCK))


def _index_bytes(model: nn.Module) -> int:
    return sum(_bytes(buffer) for name, buffer in model.named_buffers() if name.rpartition(".")[2] == "index")


def measured_memory(
    model: nn.Module,
    objective: Objective,
    batch: Mapping[str, Tensor],
    make_optimizer: Callable[[Sequence[nn.Module]], torch.optim.Optimizer],
) -> tuple[Memory, int]:
    """Run two steps at a learning rate of 0 and count what is there; the weights stay as they are, to the bit.

    Args:
        model: in its training form; its gradients are dropped.
        objective: what it is trained on.
        batch: of the size that one forward pass gets in training, on the model's device.
        make_optimizer: gives the optimizer for the modules that hold weights.

    Returns:
        The bytes, and those of the activations that the backward pass needs.
    """
    modules = [model, objective] if isinstance(objective, nn.Module) else [model]
    optimizer = make_optimizer(modules)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    training = model.training
    model.train()
    activations = gradients = 0
    for _ in range(2):
        activations = activation_bytes(lambda: _pass(model, objective, batch), modules, batch)
        gradients = sum(_bytes(p.grad) for module in modules for p in module.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.train(training)
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    weights = {id(p): _bytes(p) for module in modules for p in module.parameters()}
    memory = Memory(
        weights=sum(weights.values()),
        gradients=gradients,
        states=sum(map(_bytes, states)),
        index=sum(map(_index_bytes, modules)),
    )
    return memory, activations


def _pass(model: nn.Module, objective: Objective, batch: Mapping[str, Tensor]) -> None:
    objective(model, batch).total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped


def activation_bytes(step: Callable[[], object], modules: Iterable[nn.Module], batch: Mapping[str, Tensor]) -> int:
    """Bytes that autograd keeps from the forward pass for the backward pass, each storage once.

    Storages of parameters, buffers and the batch are not counted: they are there anyway.

    Args:
        step: a forward pass, with or without its backward pass.
        modules: whose storages are left out.
        batch: whose storages are left out.
    """
    own = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    known = {t.untyped_storage().data_ptr() for t in (*own, *batch.values())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())
