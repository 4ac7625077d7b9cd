"""Replacing the linear layers of a model, saving it as it then is, and turning it back into plain layers.

What a replacement is made of is the caller's: this module finds the layers, shows each one the same way round, keeps
dtype, device and mode, and sees to it that a model with foreign layers is not saved as if it had none.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast, runtime_checkable

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from headwater.core.cache import atomic_write_text

__all__ = [
    "EXCLUDED",
    "LinearView",
    "NothingToDo",
    "Replaceable",
    "Replacement",
    "load_factored",
    "replace_modules",
    "save_factored",
    "to_dense",
]

EXCLUDED = ("*embed*", "lm_head", "*cls*", "*classifier*", "*score*")
"""Names of what is left alone by default: embeddings and heads."""

_RECORD = "_headwater_surgery"
_FORMAT = 1


class NothingToDo(ValueError):
    """No layer is there to be replaced, or what could be replaced is the smaller part of the model."""


@dataclass(frozen=True)
class LinearView:
    """A linear layer, whichever way round its class stores the weight.

    Attributes:
        weight: ``(out_features, in_features)``; it shares the layer's memory, and may lie on the meta device.
        bias: ``(out_features,)`` or None.
    """

    weight: Tensor
    bias: Tensor | None

    @property
    def in_features(self) -> int:
        """Width of what goes in."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Width of what comes out."""
        return self.weight.shape[0]


@runtime_checkable
class Replaceable(Protocol):
    """What a replacement must be able to say of itself."""

    def to_linear(self) -> nn.Linear:
        """An ordinary layer that computes the same."""
        ...

    def arguments(self) -> Mapping[str, Any]:  # Any: JSON data
        """What ``load_factored`` hands to its ``make`` to build the same layer again, before its tensors are read."""
        ...


Make = Callable[[str, LinearView], nn.Module | None]


@dataclass(frozen=True)
class Replacement:
    """What ``replace_modules`` did.

    Attributes:
        replaced: name -> (out, in) of each layer that was replaced.
        skipped: name -> why a layer or parameter that ``targets`` names was left: ``excluded``, ``tied``,
            ``3-D parameter``, ``declined`` (by ``make``).
        share: parameters of the replaced layers as they were, as a fraction of all the model had.
    """

    replaced: dict[str, tuple[int, int]]
    skipped: dict[str, str]
    share: float


def replace_modules(
    model: nn.Module, make: Make, *, targets: Sequence[str] = ("*",), exclude: Sequence[str] = EXCLUDED
) -> Replacement:
    """Replace linear layers in place.

    Layers are visited in the order of their names. The new layer takes dtype, device and training mode of the old
    one; hooks on the old one are lost. ``model.save_pretrained`` refuses to run until ``to_dense``, which also undoes
    what was done when ``make`` raised half-way.

    Args:
        model: any module; a model on the meta device gets layers on the meta device.
        make: gets a layer's dotted name and its weights, and returns its replacement, or None to leave it.
        targets: globs over full dotted names; a layer is taken that any of them matches.
        exclude: globs over full dotted names that are left alone all the same.

    Raises:
        NothingToDo: no layer matches, or most of the model's weights lie in 3-D parameters (mixtures of experts),
            which are no layers.
        TypeError: a layer that matches is a subclass of ``nn.Linear``, quantised, or under an adapter.
        ValueError: layers were replaced in this model before.
    """
    if hasattr(model, _RECORD):
        raise ValueError("layers of this model were replaced before; call to_dense first.")
    modules = dict(model.named_modules())
    linears = sorted(name for name, module in modules.items() if isinstance(module, (nn.Linear, Conv1D)))
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    skipped = _refuse_three_dimensional(model, targets)
    chosen: list[str] = []
    for name in linears:
        module = modules[name]
        if not _matches(name, targets):
            continue
        if _matches(name, exclude):
            skipped[name] = "excluded"
            continue
        _refuse_foreign(name, modules)
        if owners[id(module.weight)] > 1:
            skipped[name] = "tied"
            continue
        chosen.append(name)
    total = sum(p.numel() for p in model.parameters())
    replaced: dict[str, tuple[int, int]] = {}
    classes: dict[str, type[nn.Module]] = {}
    taken = 0
    # Before the first layer goes: where `make` fails half-way, to_dense still knows the way back.
    _mark(model, classes)
    for name in chosen:
        old = modules[name]
        view = _view(old)
        new = make(name, view)
        if new is None:
            skipped[name] = "declined"
            continue
        weight = cast(Tensor, old.weight)
        new.to(device=weight.device, dtype=weight.dtype).train(old.training)
        if not weight.requires_grad:
            new.requires_grad_(False)
        model.set_submodule(name, new)
        replaced[name] = (view.out_features, view.in_features)
        classes[name] = type(old)
        taken += sum(p.numel() for p in old.parameters())
    if not replaced:
        _unmark(model)
        raise NothingToDo(_nothing_matched(targets, linears, skipped))
    return Replacement(replaced, skipped, taken / total)


def _mark(model: nn.Module, classes: dict[str, type[nn.Module]]) -> None:
    setattr(model, _RECORD, classes)
    if isinstance(model, PreTrainedModel):
        # On the instance: nobody shall write a directory that from_pretrained opens with fresh weights in these layers.
        model.save_pretrained = _refuse_saving


def _unmark(model: nn.Module) -> None:
    model.__dict__.pop(_RECORD, None)
    model.__dict__.pop("save_pretrained", None)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_three_dimensional(model: nn.Module, targets: Sequence[str]) -> dict[str, str]:
    """Parameters that hold stacks of matrices; they are skipped, unless they are most of the model."""
    stacks = {
        f"{prefix}.{name}".lstrip("."): p.numel()
        for prefix, module in model.named_modules()
        if not isinstance(module, nn.Conv1d)
        for name, p in module.named_parameters(recurse=False)
        if p.ndim == 3 and _matches(f"{prefix}.{name}".lstrip("."), targets)
    }
    total = sum(p.numel() for p in model.parameters())
    if sum(stacks.values()) > total / 2:
        biggest = sorted(stacks, key=stacks.__getitem__, reverse=True)[:3]
        raise NothingToDo(
            f"most of the model's weights ({sum(stacks.values()) / total:.0%}) are 3-D parameters, not linear layers, "
            f"and would be left: {', '.join(biggest)}. Mixtures of experts stored this way cannot be replaced."
        )
    return dict.fromkeys(stacks, "3-D parameter")


def _refuse_foreign(name: str, modules: Mapping[str, nn.Module]) -> None:
    """Exact types only: a subclass computes something else than its weight says."""
    parents = [".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)]
    adapted = next((parent for parent in parents if hasattr(modules[parent], "base_layer")), None)
    if adapted is not None:
        raise TypeError(f"{adapted} has an adapter on it; merge the adapter first (merge_and_unload).")
    if type(modules[name]) not in (nn.Linear, Conv1D):
        raise TypeError(
            f"{name} is a {type(modules[name]).__name__}; only a plain nn.Linear or Conv1D can be replaced. Merge the "
            "adapter first, load the model without quantisation, or leave the layer out with `exclude`."
        )


def _view(module: nn.Module) -> LinearView:
    weight = cast(nn.Parameter, module.weight).detach()
    bias = cast("nn.Parameter | None", module.bias)
    return LinearView(weight.T if isinstance(module, Conv1D) else weight, None if bias is None else bias.detach())


def _nothing_matched(targets: Sequence[str], linears: Sequence[str], skipped: Mapping[str, str]) -> str:
    if not linears:
        return "the model has no linear layer."
    reasons = sorted({f"{reason}: {name}" for name, reason in skipped.items()})[:3]
    if reasons:
        return f"no layer is left to replace ({'; '.join(reasons)})."
    close = [difflib.get_close_matches(target, linears, n=5, cutoff=0.0) for target in targets]
    nearest = list(dict.fromkeys(name for names in close for name in names))[:5]
    return f"no linear layer is named like {', '.join(targets)}; the nearest are {', '.join(nearest)}."


def _refuse_saving(*args: Any, **kwargs: Any) -> NoReturn:  # Any: whatever save_pretrained takes
    raise RuntimeError(
        "layers of this model were replaced, and transformers would open what it saves now with fresh weights in them. "
        "Call to_dense(model) before model.save_pretrained(DIR), or save_factored(model, DIR) instead."
    )


def to_dense(model: nn.Module) -> nn.Module:
    """Put ordinary layers of the original classes back, in place, and return the model.

    A model without replaced layers is returned as it is.
    """
    classes: dict[str, type[nn.Module]] = getattr(model, _RECORD, {})
    for name, original in classes.items():
        module = model.get_submodule(name)
        assert isinstance(module, Replaceable)
        linear = module.to_linear().train(module.training)
        model.set_submodule(name, _turned(linear) if original is Conv1D else linear)
    _unmark(model)
    return model


def _turned(linear: nn.Linear) -> nn.Module:
    turned: nn.Module = Conv1D(linear.out_features, linear.in_features).train(linear.training)
    turned.weight = nn.Parameter(linear.weight.detach().T.contiguous(), linear.weight.requires_grad)
    turned.bias = linear.bias if linear.bias is not None else nn.Parameter(linear.weight.new_zeros(linear.out_features))
    return turned


def save_factored(model: PreTrainedModel, directory: Path, *, method: str) -> None:
    """Save a model with its replaced layers as they are: safetensors, ``config.json`` and ``headwater.json``.

    Args:
        model: what ``replace_modules`` has worked on.
        directory: created if missing.
        method: who made the layers, for the reader of ``headwater.json``.

    Raises:
        ValueError: no layer was replaced.
    """
    from huggingface_hub import save_torch_model

    classes: dict[str, type[nn.Module]] = getattr(model, _RECORD, {})
    if not classes:
        raise ValueError("no layer of this model was replaced; use model.save_pretrained(DIR).")
    directory.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(directory)
    save_torch_model(model, directory)
    about = {
        "format": _FORMAT,
        "method": method,
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {name: metadata.version(name) for name in ("headwater", "torch", "transformers")},
        "layers": {name: dict(cast(Replaceable, model.get_submodule(name)).arguments()) for name in sorted(classes)},
    }
    # Last, so that its presence means the rest is there.
    atomic_write_text(directory / "headwater.json", json.dumps(about, indent=2) + "\n")


def load_factored(
    directory: Path,
    make: Callable[[str, LinearView, Mapping[str, Any]], nn.Module],  # Any: JSON data
) -> PreTrainedModel:
    """Open what ``save_factored`` wrote, bit for bit, in ``eval`` mode on the CPU.

    Args:
        directory: holds ``headwater.json``.
        make: builds a layer from its name, the layer it replaces and what ``arguments`` said of it.

    Raises:
        FileNotFoundError: the directory holds no complete factored model.
        ValueError: another format, an architecture that transformers does not have, or tensors that do not fit.
    """
    from safetensors.torch import load_file

    stored = directory / "headwater.json"
    if not stored.exists():
        raise FileNotFoundError(f"{directory} has no headwater.json: it is no factored model, or not a complete one.")
    about = json.loads(stored.read_text(encoding="utf-8"))
    if about["format"] != _FORMAT:
        raise ValueError(f"{stored} has format {about['format']}, this version reads {_FORMAT}.")
    cls = getattr(transformers, about["class"], None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise ValueError(f"{stored}: transformers has no model class {about['class']!r}.")
    config = transformers.AutoConfig.from_pretrained(directory)
    with torch.random.fork_rng(devices=[]):  # the skeleton draws weights that are overwritten below
        model: PreTrainedModel = cls(config).to(getattr(torch, about["dtype"]))
    layers: dict[str, dict[str, Any]] = about["layers"]
    replace_modules(model, lambda name, view: make(name, view, layers[name]), targets=tuple(layers), exclude=())
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    # Of tied tensors only one is stored; the others are the same memory and follow.
    own = model.state_dict(keep_vars=True)
    known = {own[name].data_ptr() for name in tensors if name in own}
    missing = [name for name, tensor in own.items() if name not in tensors and tensor.data_ptr() not in known]
    wrong = [name for name in tensors if name not in own or own[name].shape != tensors[name].shape]
    if missing or wrong:
        raise ValueError(f"{directory}: tensors do not fit the model: {', '.join([*missing, *wrong][:5])}.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return model.eval()
