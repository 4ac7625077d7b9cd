"""What training changes, as named tensors: the part of a run that a checkpoint must hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from headwater.core.checkpoint import CheckpointError

__all__ = ["load_moments", "load_tensors", "training_tensors"]

_GROUPS = ("model", "objective")


def _stored(module: nn.Module) -> dict[str, Tensor]:
    """Trainable weights, each once, and persistent buffers. Frozen weights are read again from where they came."""
    state = module.state_dict(keep_vars=True)
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    buffers = {name: b for name, b in module.named_buffers() if name in state}
    return {**weights, **buffers}


def training_tensors(modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and the optimizer's state by the names of the parameters."""
    tensors: dict[str, Tensor] = {}
    for group, module in zip(_GROUPS, modules, strict=False):
        for name, tensor in _stored(module).items():
            tensors[f"{group}/{name}"] = tensor
            for key, value in optimizer.state.get(tensor, {}).items():
                tensors[f"optimizer/{group}.{name}/{key}"] = value
    return tensors


def load_tensors(modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """The inverse of `training_tensors`, in place.

    Raises:
        CheckpointError: names or shapes are not those of the model.
    """
    weights = {name for name in saved if not name.startswith("optimizer/")}
    targets = _targets(modules)
    wrong = weights.symmetric_difference(targets) or {n for n in weights if saved[n].shape != targets[n].shape}
    if wrong:
        raise CheckpointError(
            f"the checkpoint is of another model: {len(wrong)} tensors differ, among them {min(wrong)!r}."
        )
    with torch.no_grad():
        for full_name, target in targets.items():
            target.copy_(saved[full_name])
    load_moments(modules, optimizer, saved)


def load_moments(modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Only the optimizer's part of `load_tensors`; a parameter that has none there keeps what it has."""
    moments: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in saved.items():
        if full_name.startswith("optimizer/"):
            name, _, key = full_name.removeprefix("optimizer/").rpartition("/")
            moments.setdefault(name, {})[key] = tensor
    # AdamW reads its step counter on the CPU, except where it is fused.
    fused = bool(optimizer.defaults.get("fused"))
    for full_name, target in _targets(modules).items():
        state = moments.get(full_name.replace("/", ".", 1))
        if state is not None:
            optimizer.state[target] = {k: v.to(target.device) if fused or k != "step" else v for k, v in state.items()}


def _targets(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    return {f"{g}/{n}": t for g, m in zip(_GROUPS, modules, strict=False) for n, t in _stored(m).items()}
