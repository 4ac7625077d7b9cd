"""Parameter-efficient modules in an encoder, and a second set of the same at the same places, in one model.

    kv_lora    W' = W + s (alpha / r) B A     on the projections to keys and to values of the first blocks, through PEFT
    adapter    y = f(h) + s W_up relu(W_down h)    beside the attention of the first blocks (``pet``)
    prefix     a V + s (b / lambda) P_v            in the attention of the first blocks (``prefix``)

s is learned and 1 at the start (``pet.CalibrationScale``). Saved LoRA has s multiplied into B, so PEFT opens it and
merges it into the model as it does any other.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from headwater.continual.pet import AdapterSpec, CalibrationScale, PetModel, add_adapters, attentions, blocks
from headwater.continual.prefix import add_prefixes
from headwater.core.lora import LoraSpec, add_lora
from headwater.core.recipe import Spec

__all__ = ["BesideAttention", "KvLora", "PetChoice", "PrefixSpec", "TwoSets"]

logger = logging.getLogger(__name__)

_FIRST, _SECOND = "default", "offline"
_FACTOR = "parametrizations.weight.0.value"


class KvLora(Spec):
    """LoRA on keys and values, through PEFT."""

    kind: Literal["lora"] = Field(default="lora", description="low-rank adapters on the keys and values")
    r: int = Field(default=5, gt=0, description="rank of each adapter; alpha is the same")
    blocks: int = Field(default=5, gt=0, description="the first so many blocks have them")


class BesideAttention(Spec):
    """Bottleneck adapters beside the attention."""

    kind: Literal["adapter"] = Field(default="adapter", description="bottleneck adapters beside the attention")
    width: int = Field(default=5, gt=0, description="units of each bottleneck")
    blocks: int = Field(default=5, gt=0, description="the first so many blocks have one")


class PrefixSpec(Spec):
    """Keys and values before those of the tokens."""

    kind: Literal["prefix"] = Field(default="prefix", description="prefixes in the attention, weighed by themselves")
    num: int = Field(default=10, gt=0, description="keys, and values, in each block")
    blocks: int = Field(default=5, gt=0, description="the first so many blocks have them")


PetChoice = Annotated[KvLora | BesideAttention | PrefixSpec, Field(discriminator="kind")]


class TwoSets:
    """One model, a set of modules that is trained, and on demand a second one of the same shapes that is not.

    Args:
        model: frozen in place.
        spec: the modules.
        seed: of their weights.

    Attributes:
        adapter: PEFT's model, or a ``PetModel``.
        first: the parameters of the first set, by name.
        second: those of the second, by the names of the first's; empty without one.

    Raises:
        ValueError: the model has no place for them.
    """

    def __init__(self, model: nn.Module, spec: KvLora | BesideAttention | PrefixSpec, *, seed: int) -> None:
        there = len(blocks(model))
        if 0 < there < spec.blocks:
            logger.info(
                "the model has %d blocks, fewer than the %d asked for: all of them are used.", there, spec.blocks
            )
        self.adapter: Any  # Any: PEFT is untyped
        if isinstance(spec, KvLora):
            self.adapter = add_lora(
                model, LoraSpec(r=spec.r, alpha=spec.r, target_modules=_projections(model, spec)), seed=seed
            )
            _calibrate(self.adapter, _FIRST)
        elif isinstance(spec, BesideAttention):
            bottleneck = AdapterSpec(width=spec.width, scale=1.0, targets=_beside(model, spec.blocks))
            self.adapter = add_adapters(model, bottleneck, seed=seed, calibrated=True)
        else:
            self.adapter = add_prefixes(model, num=spec.num, blocks=spec.blocks, seed=seed)
        self.kind = spec.kind
        self.first = {name: p for name, p in self.adapter.named_parameters() if p.requires_grad}
        self.second: dict[str, nn.Parameter] = {}

    def add_second(self) -> None:
        """Put the second set in, equal to the first and frozen."""
        wanted = [parameter.requires_grad for parameter in self.first.values()]
        if isinstance(self.adapter, PetModel):
            self.adapter.add_adapter(_SECOND)
        else:
            with torch.random.fork_rng():  # PEFT draws weights, which are then replaced
                self.adapter.add_adapter(_SECOND, copy.deepcopy(self.adapter.peft_config[_FIRST]))
            _calibrate(self.adapter, _SECOND)
        every = dict(self.adapter.named_parameters())
        self.second = {name: every[name.replace(f".{_FIRST}.", f".{_SECOND}.")] for name in self.first}
        self.write([parameter.detach() for parameter in self.first.values()])
        _require(self.second.values(), [False] * len(wanted))
        _require(self.first.values(), wanted)

    @torch.no_grad()
    def write(self, values: Sequence[Tensor]) -> None:
        """Set the second set's parameters, in the order of ``second``."""
        for parameter, value in zip(self.second.values(), values, strict=True):
            parameter.copy_(value)

    @contextmanager
    def using_second(self) -> Iterator[None]:
        """Inside, the model runs with the second set. What requires a gradient is as before afterwards."""
        every = [*self.first.values(), *self.second.values()]
        wanted = [parameter.requires_grad for parameter in every]
        self.adapter.set_adapter(_SECOND)  # PEFT's has the side effect that is undone below
        try:
            yield
        finally:
            self.adapter.set_adapter(_FIRST)
            _require(every, wanted)

    def save(self, directory: Path) -> None:
        """Write the first set as PEFT or ``PetModel`` write it, the second to ``offline/`` in it."""
        if isinstance(self.adapter, PetModel):
            self.adapter.save_pretrained(directory)
        else:
            self.adapter.save_pretrained(directory, state_dict=_folded(self.adapter.state_dict()))


def _require(parameters: Any, wanted: Sequence[bool]) -> None:  # Any: an iterable of parameters
    for parameter, flag in zip(parameters, wanted, strict=True):
        parameter.requires_grad_(flag)


def _projections(model: nn.Module, spec: KvLora) -> tuple[str, ...]:
    names = tuple(f"{name}.{layer}" for name, pair in attentions(model, spec.blocks).items() for layer in pair)
    if not names:
        raise ValueError(
            f"LoRA on keys and values needs layers of their own for these; {type(model).__name__} has none (or one "
            "layer for queries, keys and values together). Use adapter here."
        )
    return names


def _beside(model: nn.Module, first: int) -> tuple[str, ...]:
    """The attention of the first blocks; without one the blocks; without blocks the first linear layers."""
    found = attentions(model, first)
    if found:
        return tuple(found)
    names = list(blocks(model)) or [n for n, m in model.named_modules() if n and isinstance(m, nn.Linear)]
    return tuple(names[:first])


def _calibrate(adapter: nn.Module, name: str) -> None:
    """Let each LoRA have its factor: s (B A) = (s B) A, so PEFT's own merging takes it in."""
    from peft.tuners.lora import LoraLayer

    for layer in [module for module in adapter.modules() if isinstance(module, LoraLayer)]:
        up = layer.lora_B[name]
        scale = CalibrationScale().to(up.weight.device)
        parametrize.register_parametrization(up, "weight", scale)


def _folded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a PEFT model with each factor multiplied into its matrix."""
    plain = {}
    for name, tensor in state.items():
        if name.endswith(".parametrizations.weight.original"):
            layer = name.removesuffix("parametrizations.weight.original")
            plain[f"{layer}weight"] = tensor * state[f"{layer}{_FACTOR}"]
        elif not name.endswith(_FACTOR):
            plain[name] = tensor
    return plain
