"""Small trainable modules that PEFT lacks, put into a frozen model by hooks: the model itself is not rebuilt.

    adapter   y = f(h) + s W_up relu(W_down h)    beside a module f: each block's feed-forward part, or any layer named
    prompts   [h; p_l]                            p_l: vectors added to the tokens that block l of a ViT reads

At the start W_up is zero, so an adapter changes nothing; prompts do. A learned factor may multiply what an adapter
gives (``CalibrationScale``), and a second set of modules may stand at the same sites (``PetModel.add_adapter``).

Sources: Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", arXiv:2205.13535
(adapter in parallel, s = 0.1); Jia et al., "Visual Prompt Tuning", arXiv:2203.12119 (prompts, deep and shallow);
Gao et al., "A Unified Continual Learning Framework with General Parameter-Efficient Tuning", arXiv:2303.10070 (factor).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from headwater.core.cache import atomic_path, atomic_write_text
from headwater.core.recipe import Spec
from headwater.core.rng import torch_generator

__all__ = [
    "AdapterSpec",
    "CalibrationScale",
    "Hook",
    "ParallelAdapter",
    "PetModel",
    "Prompts",
    "VptSpec",
    "add_adapters",
    "add_prompts",
    "attentions",
    "blocks",
]

Hook = Callable[..., Any]  # Any: what torch's hooks take and give

_FEED_FORWARD = ("mlp", "ffn", "feed_forward")
_KEY_VALUE = (("key", "value"), ("k_proj", "v_proj"), ("k_lin", "v_lin"), ("k", "v"))
_PLAIN_VITS = ("vit", "deit", "vit_msn", "dinov2", "dinov2_with_registers", "clip_vision_model", "siglip_vision_model")


class AdapterSpec(Spec):
    """Bottleneck adapters in parallel."""

    kind: Literal["adapter"] = Field(default="adapter", description="bottleneck adapters beside frozen modules")
    width: int = Field(default=64, gt=0, description="units of each bottleneck")
    scale: float = Field(default=0.1, gt=0, description="what an adapter's output is multiplied by")
    targets: tuple[str, ...] = Field(
        default=(),
        description="globs over module names that get adapters; by default the feed-forward part of each block (the "
        "whole block where that is not one module), or every linear layer of a model without blocks",
    )


class VptSpec(Spec):
    """Visual prompts."""

    kind: Literal["vpt"] = Field(default="vpt", description="prompt vectors among the tokens of a vision transformer")
    num: int = Field(default=5, gt=0, description="prompt vectors in each place")
    deep: bool = Field(default=True, description="new ones before every block, or only before the first")


class CalibrationScale(nn.Module):
    """A learned factor, 1 at the start: how fast what it multiplies adapts is learned, too.

    Shapes:
        input and output of any shape.
    """

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(()))

    def forward(self, output: Tensor) -> Tensor:
        """The product."""
        return self.value.to(output.dtype) * output


class ParallelAdapter(nn.Module):
    """The bottleneck beside a module.

    Args:
        in_features: width of what the module reads.
        width: of the bottleneck.
        out_features: width of what the module gives; ``in_features`` by default.
        scale: s of the equation.
        generator: draws the weights.
        calibrated: learn a factor of the output.

    Shapes:
        input ``(..., in_features)``; output ``(..., out_features)``, zero at the start.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        out_features: int | None = None,
        scale: float = 0.1,
        generator: torch.Generator | None = None,
        *,
        calibrated: bool = False,
    ) -> None:
        super().__init__()
        # A layer's own initialisation would draw from the global generator.
        self.down: nn.Linear = nn.utils.skip_init(nn.Linear, in_features, width)  # type: ignore[no-untyped-call]
        self.up: nn.Linear = nn.utils.skip_init(nn.Linear, width, out_features or in_features)  # type: ignore[no-untyped-call]
        self.scale = scale
        self.calibration: nn.Module = CalibrationScale() if calibrated else nn.Identity()
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5, generator=generator)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """What is added to the module's output."""
        output: Tensor = self.up(nn.functional.relu(self.down(hidden_states.to(self.down.weight.dtype))))
        calibrated: Tensor = self.calibration(output)
        return self.scale * calibrated


class Prompts(nn.Module):
    """Vectors that stand among the tokens of a block.

    Args:
        num: how many.
        dim: width of the tokens.
        generator: draws them.
    """

    def __init__(self, num: int, dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(num, dim))
        nn.init.xavier_uniform_(self.vectors, generator=generator)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``(batch, tokens, dim)`` -> ``(batch, tokens + num, dim)``."""
        vectors = self.vectors.to(hidden_states.dtype).expand(len(hidden_states), -1, -1)
        return torch.cat((hidden_states, vectors), dim=1)


class PetModel(nn.Module):
    """A frozen model and the modules that its hooks run; behaves as PEFT's models do.

    Args:
        model: frozen in place; calling it directly takes the modules in, too.
        pets: the trainable modules, by the name of the module of ``model`` at which each stands.
        about: JSON data that says what they are, for ``save_pretrained``.
    """

    def __init__(self, model: nn.Module, pets: Mapping[str, nn.Module], about: Mapping[str, Any]) -> None:  # Any: JSON
        super().__init__()
        self.model = model.requires_grad_(False)
        self.sites = tuple(pets)
        pets_at_sites = nn.ModuleList(pets.values()).to(next(model.parameters()).device)
        self.sets = nn.ModuleDict({"default": pets_at_sites})  # PEFT's name for the first one
        self.active_adapter = "default"
        self.about = dict(about)
        self.enabled = True

    @property
    def pets(self) -> nn.ModuleList:
        """The modules in use, one for each of ``sites``."""
        pets = self.sets[self.active_adapter]
        assert isinstance(pets, nn.ModuleList)
        return pets

    def add_adapter(self, name: str) -> None:
        """Keep a second set of modules, frozen, at first equal to those in use."""
        self.sets[name] = copy.deepcopy(self.pets).requires_grad_(False)

    def set_adapter(self, name: str) -> None:
        """Use another set; unlike PEFT's, this leaves alone what requires a gradient."""
        if name not in self.sets:
            raise ValueError(f"no set of modules {name!r}; there is {', '.join(self.sets)}.")
        self.active_adapter = name

    def get_base_model(self) -> nn.Module:
        """The model without the wrapper."""
        return self.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # Any: the model's own
        """Run the model, with its modules unless they are switched off."""
        return self.model(*args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Switch the modules off: inside, the model is bit for bit the one it was."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def save_pretrained(self, directory: Path | str) -> None:
        """Write ``pet.safetensors``, tensors named ``SITE.PARAMETER``, and ``pet.json``; another set to ``NAME/``."""
        said = {"format": 1, **self.about, "sites": list(self.sites)}
        for name, pets in self.sets.items():
            home = Path(directory) / ("" if name == "default" else name)
            assert isinstance(pets, nn.ModuleList)
            tensors = {
                f"{site}.{part}": tensor.detach().cpu().contiguous()
                for site, pet in zip(self.sites, pets, strict=True)
                for part, tensor in pet.named_parameters()
            }
            with atomic_path(home / "pet.safetensors") as path:
                save_file(tensors, path)
            atomic_write_text(home / "pet.json", json.dumps(said, indent=2) + "\n")


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a model by name, first to last; empty where it has none.

    Those are the modules of its one ``nn.ModuleList`` that holds as many of one class as the configuration says there
    are layers; without a configuration, of the longest one.

    Raises:
        ValueError: several lists fit, as in a model with two towers.
    """
    lists = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(block) for block in module}) == 1
    }
    config = getattr(model, "config", None)
    layers = getattr(config, "num_hidden_layers", None) or max(map(len, lists.values()), default=0)
    fitting = [name for name, members in lists.items() if len(members) == layers]
    outermost = [name for name in fitting if not any(name.startswith(f"{other}.") for other in fitting)]
    if len(outermost) > 1:
        raise ValueError(
            f"cannot tell which blocks are meant: {', '.join(outermost)} have {layers} each. Name modules in targets."
        )
    return {f"{name}.{i}": block for name in outermost for i, block in enumerate(lists[name])}


def attentions(model: nn.Module, first: int) -> dict[str, tuple[str, str]]:
    """Where the first blocks project to keys and to values, by linear layers of their own.

    Args:
        model: any; without blocks, or with projections that are fused, it has no such place.
        first: how many blocks to look at; fewer where there are fewer.

    Returns:
        Name of each module that holds both projections, to the names of the two layers in it.
    """
    found = {}
    for block, module in list(blocks(model).items())[:first]:
        for name, part in module.named_modules():
            for pair in _KEY_VALUE:
                if all(isinstance(getattr(part, layer, None), nn.Linear) for layer in pair):
                    found[f"{block}.{name}" if name else block] = pair
    return found


def add_adapters(model: nn.Module, spec: AdapterSpec, *, seed: int, calibrated: bool = False) -> PetModel:
    """Put a bottleneck adapter beside each target; at first nothing changes.

    Args:
        model: frozen in place.
        spec: the adapters.
        seed: of their weights.
        calibrated: learn a factor of each one's output.

    Raises:
        ValueError: no module matches ``targets``, or the width of one cannot be told.
    """
    chosen = _targets(model, spec.targets)
    pets: dict[str, nn.Module] = {}
    for name, module in chosen.items():
        generator = torch_generator(seed, "adapter", name)
        widths = _widths(model, name, module, spec.width)
        pets[name] = ParallelAdapter(*widths, spec.scale, generator, calibrated=calibrated)
    wrapped = PetModel(model, pets, {"kind": "adapter", "scale": spec.scale})
    for index, module in enumerate(chosen.values()):
        module.register_forward_hook(_beside(wrapped, index), with_kwargs=True)
    return wrapped


def _targets(model: nn.Module, globs: Sequence[str]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    linears: dict[str, nn.Module] = {n: m for n, m in modules.items() if n and isinstance(m, nn.Linear)}
    if globs:
        chosen = {n: m for n, m in modules.items() if n and any(fnmatchcase(n, glob) for glob in globs)}
        if not chosen:
            raise ValueError(f"no module matches targets {list(globs)}; linear layers: {', '.join(linears)[:300]}.")
        return chosen
    chosen = {}
    for name, block in blocks(model).items():
        part = next((part for part in _FEED_FORWARD if isinstance(getattr(block, part, None), nn.Module)), None)
        chosen[name if part is None else f"{name}.{part}"] = block if part is None else getattr(block, part)
    chosen = chosen or linears
    if not chosen:
        raise ValueError("the model has neither blocks nor linear layers that an adapter could stand beside.")
    return chosen


def _widths(model: nn.Module, name: str, module: nn.Module, width: int) -> tuple[int, int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, width, module.out_features
    hidden = getattr(getattr(model, "config", None), "hidden_size", None)
    if not isinstance(hidden, int):
        raise ValueError(f"cannot tell the width of {name!r} ({type(module).__name__}); name linear layers in targets.")
    return hidden, width, hidden


def _beside(wrapped: PetModel, index: int) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not wrapped.enabled:
            return None
        added = wrapped.pets[index](args[0] if args else next(iter(kwargs.values())))
        if isinstance(output, Tensor):
            return output + added.to(output.dtype)
        return (output[0] + added.to(output[0].dtype), *output[1:])

    return hook


def add_prompts(model: nn.Module, spec: VptSpec, *, seed: int) -> PetModel:
    """Let prompt vectors stand behind the tokens of each block, or of the first; they never leave the last one.

    Where they stand among the tokens makes no difference: position embeddings were added before.

    Args:
        model: a plain vision transformer, frozen in place.
        spec: the prompts.
        seed: of the vectors.

    Raises:
        ValueError: the model is of another kind.
    """
    config: Any = getattr(model, "config", None)  # Any: each model has its own
    if getattr(config, "model_type", None) not in _PLAIN_VITS:
        raise ValueError(
            f"visual prompts need a plain vision transformer ({', '.join(_PLAIN_VITS)}); got "
            f"{getattr(config, 'model_type', type(model).__name__)!r}. Use lora or adapter here."
        )
    found = blocks(model)
    names = list(found) if spec.deep else list(found)[:1]
    pets = {name: Prompts(spec.num, config.hidden_size, torch_generator(seed, "prompts", name)) for name in names}
    ends = names if spec.deep else list(found)[-1:]
    wrapped = PetModel(model, pets, {"kind": "vpt", "num": spec.num, "ends": ends})
    for index, name in enumerate(names):
        found[name].register_forward_pre_hook(_among(wrapped, index), with_kwargs=True)
    for name in ends:
        found[name].register_forward_hook(_without(wrapped, spec.num))
    return wrapped


def _among(wrapped: PetModel, index: int) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not wrapped.enabled:
            return None
        prompts = wrapped.pets[index]
        if args:
            return (prompts(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": prompts(kwargs["hidden_states"])}

    return hook


def _without(wrapped: PetModel, num: int) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not wrapped.enabled:
            return None
        return output[:, :-num] if isinstance(output, Tensor) else (output[0][:, :-num], *output[1:])

    return hook
