"""Where routing vectors between LoRA experts come from: gates trained afterwards, mean inputs, Arrow's prototypes.

Gate training, everything frozen but v, which starts at 0:

    y = W u + sigmoid(v . u) B A u        on the expert's own data and loss

Gates multiply the LoRA branch through forward hooks on PEFT's own layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwater.compose.routing import LowRank
from headwater.core.budget import Budget, Meter
from headwater.core.fit import BatchStream, FitSettings, Phase, fit
from headwater.core.objective import Loss, Objective
from headwater.core.optim import OptimSpec
from headwater.core.rng import torch_generator
from headwater.modalities.models import ModelError

__all__ = [
    "GATE_BUDGET",
    "GATE_OPTIM",
    "GatedLora",
    "arrow_prototypes",
    "average_activations",
    "random_vectors",
    "train_gates",
]

GATE_BUDGET = Budget(steps=100)
"""The paper's: a tenth of the steps that its experts were trained for."""
GATE_OPTIM = OptimSpec(lr=5e-3, weight_decay=0.0, schedule="constant", warmup=0.06)
"""The paper's; its betas and clipping are not known, so they are this project's."""
ACTIVATION_BATCHES = 20


class GatedLora(nn.Module):
    """An objective under which each adapted linear layer gates its LoRA: ``y = W u + sigmoid(v . u) B A u``.

    Everything but the gates is frozen while it is ``attached``, and the adapter's dropout is off.

    Args:
        model: with the adapter on it, unmerged.
        adapter: its name in ``model``.
        objective: what the gates should minimise.

    Attributes:
        layers: names in the base model, one for each of ``vectors``.
        vectors: v, ``(n,)`` float32, from 0.

    Raises:
        ModelError: ``model`` has no such adapter on a linear layer, or it is merged, or of a kind other than plain
            LoRA.
    """

    def __init__(self, model: nn.Module, adapter: str, objective: Objective) -> None:
        super().__init__()
        found = _lora_layers(model, adapter)
        self.unit, self.objective, self.adapter = objective.unit, objective, adapter
        self.layers = tuple(found)
        # Not registered: the weights are the model's, not this objective's.
        self._model, self._lora = (model,), tuple(found.values())
        self.vectors = nn.ParameterList(
            nn.Parameter(torch.zeros(layer.in_features, device=layer.lora_A[adapter].weight.device))
            for layer in self._lora
        )

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """The objective's loss of the gated model."""
        return self.objective(model, batch)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Gates on, all else frozen; as it was afterwards."""
        frozen = [parameter for parameter in self._model[0].parameters() if parameter.requires_grad]
        dropouts = [layer.lora_dropout[self.adapter] for layer in self._lora]

        def hook(number: int) -> Any:  # Any: a forward hook
            def gate(down: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                # B is linear: a factor on A's output is one on the whole branch, and cheaper there.
                opened = torch.sigmoid(inputs[0].float() @ self.vectors[number])
                return output * opened[..., None].to(output.dtype)

            return gate

        hooks = [
            layer.lora_A[self.adapter].register_forward_hook(hook(number)) for number, layer in enumerate(self._lora)
        ]
        for parameter in frozen:
            parameter.requires_grad_(False)
        for layer in self._lora:
            layer.lora_dropout[self.adapter] = nn.Identity()
        try:
            yield
        finally:
            for hooked in hooks:
                hooked.remove()
            for layer, dropout in zip(self._lora, dropouts, strict=True):
                layer.lora_dropout[self.adapter] = dropout
            for parameter in frozen:
                parameter.requires_grad_(True)


def _lora_layers(model: nn.Module, adapter: str) -> dict[str, Any]:  # Any: PEFT's layers, which have no types
    from peft.tuners.lora import LoraLayer

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    found = {}
    for name, module in inner.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A and isinstance(module.lora_A[adapter], nn.Linear):
            if module.merged:
                raise ModelError(f"an adapter is merged into {name}; unmerge it (unmerge_adapter), or load it afresh.")
            if adapter in module.lora_variant or module.lora_bias.get(adapter):
                raise ModelError(f"adapter {adapter!r} is no plain LoRA at {name}; gates are defined for B A u alone.")
            if adapter not in module.active_adapters:
                raise ModelError(f"adapter {adapter!r} is not active; call set_adapter({adapter!r}).")
            found[name] = module
    if not found:
        raise ModelError(f"the model has no adapter {adapter!r} on a linear layer.")
    return found


def train_gates(
    model: nn.Module,
    adapter: str,
    batches: BatchStream,
    objective: Objective,
    *,
    directory: Path,
    budget: Budget = GATE_BUDGET,
    optim: OptimSpec = GATE_OPTIM,
    seed: int = 0,
    name: str = "gates",
    settings: FitSettings | None = None,
    meter: Meter | None = None,
) -> dict[str, Tensor]:
    """Train one gate for each adapted linear layer; the model is left as it was.

    Args:
        model: a PEFT model with the adapter active.
        adapter: its name in ``model``.
        batches: the expert's own data.
        objective: the expert's own loss.
        directory: of the run, for checkpoints; an interrupted training continues from there.
        budget: of the training.
        optim: how gates are moved.
        seed: of draws in the forward pass.
        name: of the phase.
        settings: how the loop runs.
        meter: is charged with the cost.

    Returns:
        By layer of the base model, ``(n,)`` float32 on the CPU.

    Raises:
        ModelError: see ``GatedLora``.
    """
    gated = GatedLora(model, adapter, objective)
    with gated.attached():
        fit(
            Phase(name, model, batches, gated),
            budget=budget,
            optim=optim,
            seed=seed,
            directory=directory,
            settings=settings,
            meter=meter,
        )
    return {layer: v.detach().cpu().clone() for layer, v in zip(gated.layers, gated.vectors, strict=True)}


def average_activations(
    model: nn.Module, adapter: str, batches: BatchStream, objective: Objective, *, steps: int = ACTIVATION_BATCHES
) -> dict[str, Tensor]:
    """The mean input of each adapted linear layer on an expert's data: a routing vector without training.

    Args:
        model: a PEFT model with the adapter active.
        adapter: its name in ``model``.
        batches: the expert's own data.
        objective: how the model is called; its loss is not used.
        steps: how many batches.

    Returns:
        By layer of the base model, ``(n,)`` float32 on the CPU.
    """
    layers = _lora_layers(model, adapter)
    sums = {name: torch.zeros(layer.in_features, dtype=torch.float64) for name, layer in layers.items()}
    counts = dict.fromkeys(layers, 0)

    def hook(name: str) -> Any:  # Any: a forward pre-hook
        def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            flat = inputs[0].detach().flatten(0, -2)
            sums[name] += flat.sum(0, dtype=torch.float64).cpu()
            counts[name] += len(flat)

        return add

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad():
            for step in range(steps):
                objective(model, {key: value.to(device) for key, value in batches.batch(step).items()})
    finally:
        for hooked in hooks:
            hooked.remove()
        model.train(training)
    return {name: (sums[name] / counts[name]).float() for name in layers}


def arrow_prototypes(experts: Mapping[str, Mapping[str, LowRank]], *, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Arrow's routing vectors as PEFT computes them: each expert's strongest input direction, by power iteration.

    Args:
        experts: by expert and layer.
        seed: of the iteration's start.

    Returns:
        By expert and layer, unit vectors ``(n,)``; their sign means nothing.

    Source: Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs", arXiv:2405.11157.
    """
    from peft import ArrowConfig
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer

    found: dict[str, dict[str, Tensor]] = {name: {} for name in experts}
    for layer in sorted({layer for own in experts.values() for layer in own}):
        there = {name: own[layer] for name, own in experts.items() if layer in own}
        config = ArrowConfig(top_k=1, rng_seed=seed)
        config.task_adapter_names = list(there)  # which PEFT sets after construction as well
        arrow = ArrowLoraLinearLayer(next(iter(there.values())).down.shape[1], config)
        arrow.build_prototypes(
            {name: _Weight(expert.down) for name, expert in there.items()},
            {name: _Weight(expert.up) for name, expert in there.items()},
        )
        for name, prototype in zip(there, arrow.prototypes, strict=True):
            found[name][layer] = prototype
    return found


class _Weight:
    """What PEFT reads of a linear layer."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight


def random_vectors(experts: Mapping[str, Mapping[str, LowRank]], *, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Routing vectors drawn from a normal distribution, which know nothing: by expert and layer, ``(n,)``."""
    return {
        name: {
            layer: torch.randn(expert.down.shape[1], generator=torch_generator(seed, "routing", name, layer))
            for layer, expert in own.items()
        }
        for name, own in experts.items()
    }
