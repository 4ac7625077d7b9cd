"""Sparse patches: which few parameters of a model change, and to which values.

    gamma = top_s(scores), exactly s entries of all tensors together      theta = gamma theta_ft + (1 - gamma) theta_pre

A patch holds new values, not differences: applied, they are the fine-tuned model's own, bit for bit, and no rounding
depends on who adds. It therefore belongs on one base, whose digest it carries.

Source: the grafting of Panigrahi et al., arXiv:2302.06600, section 2.
Differs: the largest scores are found by counting, not by sorting; ties go to the earlier tensor, then the lower index.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from headwater.core.cache import atomic_path

__all__ = ["Mask", "Patch", "digest", "join_patches", "merge_masks", "overlap", "readme", "top_entries"]

_BLOCK = 1 << 20
_HALF = 1 << 15
_METADATA = "patch"


def top_entries(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Mark the ``count`` largest of all scores together: exactly so many, whatever ties there are.

    Floats order as their bits do, once those of negative ones are turned round. A first pass over the scores counts
    the upper halves of these keys, a second one the lower halves among those that share the threshold's upper half;
    then the threshold is known exactly. Nothing is sorted or concatenated.

    Args:
        scores: by tensor, any shapes, float32. 0 and -0 are equal.
        count: in [0, all entries].

    Returns:
        By tensor, bool in its shape. Of equal scores at the threshold those of earlier tensors are marked first, then
        those of lower index.

    Raises:
        TypeError: scores of another dtype.
        ValueError: ``count`` is out of range, or a score is NaN.
    """
    total = sum(values.numel() for values in scores.values())
    if not 0 <= count <= total:
        raise ValueError(f"count must be in [0, {total}], the number of scores; got {count}.")
    for name, values in scores.items():
        if values.dtype != torch.float32:
            raise TypeError(f"scores must be float32; {name!r} is {values.dtype}. Convert them with .float().")
    if count == 0:
        return {name: torch.zeros_like(values, dtype=torch.bool) for name, values in scores.items()}
    upper, above = _reached(scores, count, None)
    lower, above_too = _reached(scores, count - above, upper)
    threshold, left = (upper << 16) | lower, count - above - above_too
    marked = {}
    for name, values in scores.items():
        keys = _keys(values)
        chosen = keys > threshold
        if left:
            ties = (keys == threshold).nonzero().flatten()[:left]
            chosen[ties] = True
            left -= len(ties)
        marked[name] = chosen.view(values.shape)
    return marked


def _keys(values: Tensor) -> Tensor:
    """``(entries,)`` int32 in the order of the values."""
    bits = (values.detach().flatten() + 0.0).view(torch.int32)  # adding 0 makes -0 a 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _reached(scores: Mapping[str, Tensor], wanted: int, prefix: int | None) -> tuple[int, int]:
    """The half key at which ``wanted`` entries are reached from the top, and how many lie above it.

    Args:
        scores: as in ``top_entries``.
        wanted: at least 1.
        prefix: None to count upper halves, or the upper half among whose entries lower halves are counted.
    """
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    invalid = 0
    for values in scores.values():
        own = torch.zeros(1 << 16, dtype=torch.int64, device=values.device)
        bad = torch.zeros((), dtype=torch.bool, device=values.device)
        for block in torch.split(values.detach().flatten(), _BLOCK):
            keys = _keys(block)
            halves = (keys >> 16) + _HALF if prefix is None else (keys & 0xFFFF)[keys >> 16 == prefix]
            own += torch.bincount(halves, minlength=1 << 16)
            if prefix is None:
                bad |= block.isnan().any()
        counts += own.cpu()
        invalid += int(bad)
    if invalid:
        raise ValueError(f"{invalid} of {len(scores)} tensors of scores hold NaN, which has no place in an order.")
    reached = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, wanted))
    half = (1 << 16) - 1 - place
    return half - _HALF if prefix is None else half, int(reached[place - 1]) if place else 0


@dataclass(frozen=True, eq=False)
class Mask:
    """Some entries of a model's parameters.

    Attributes:
        indices: by tensor, into it flattened: ``(entries,)`` int64, rising. Tensors without an entry are left out.
        shapes: of every tensor that entries could be chosen from.
    """

    indices: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, marked: Mapping[str, Tensor]) -> Mask:
        """From bool tensors, as ``top_entries`` gives them."""
        found = {name: values.flatten().nonzero().flatten().cpu() for name, values in marked.items()}
        return cls(
            {name: places for name, places in found.items() if len(places)},
            {name: tuple(values.shape) for name, values in marked.items()},
        )

    @property
    def count(self) -> int:
        """Entries chosen."""
        return sum(len(places) for places in self.indices.values())

    @property
    def size(self) -> int:
        """Entries that could be chosen."""
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes.values())

    def dense(self, name: str) -> Tensor:
        """One tensor of the mask, bool."""
        marked = torch.zeros(self.shapes[name], dtype=torch.bool)
        if name in self.indices:
            marked.view(-1)[self.indices[name]] = True
        return marked


def merge_masks(masks: Sequence[Mask]) -> Mask:
    """The entries that are in any of the masks.

    Raises:
        ValueError: none, or they are over different tensors.
    """
    _check_same_tensors(masks)
    names = [name for name in masks[0].shapes if any(name in mask.indices for mask in masks)]
    joined = {name: torch.unique(torch.cat([m.indices[name] for m in masks if name in m.indices])) for name in names}
    return Mask(joined, masks[0].shapes)


def overlap(masks: Mapping[str, Mask]) -> pd.DataFrame:
    """How much two masks share, by name: ``|a and b| / min(|a|, |b|)``, 1 on the diagonal.

    Two independent masks of share s have an overlap of about s.

    Raises:
        ValueError: none, an empty one, or masks over different tensors.
    """
    _check_same_tensors(list(masks.values()))
    if empty := [name for name, mask in masks.items() if not mask.count]:
        raise ValueError(f"mask {empty[0]!r} is empty, so that it shares everything and nothing.")
    table = [[_shared(a, b) / min(a.count, b.count) for b in masks.values()] for a in masks.values()]
    return pd.DataFrame(table, index=list(masks), columns=list(masks))


def _shared(a: Mask, b: Mask) -> int:
    both = a.indices.keys() & b.indices.keys()
    return sum(int(torch.isin(a.indices[name], b.indices[name], assume_unique=True).sum()) for name in both)


def _check_same_tensors(masks: Sequence[Mask]) -> None:
    if not masks:
        raise ValueError("there are no masks; give at least one.")
    for mask in masks[1:]:
        if dict(mask.shapes) != dict(masks[0].shapes):
            differing = sorted(mask.shapes.items() ^ masks[0].shapes.items())
            raise ValueError(f"the masks are over different tensors, among them {differing[0][0]!r}; use one base.")


@dataclass(frozen=True, eq=False)
class Patch:
    """New values for some entries of one base's parameters. Made by ``Patch.of`` or ``Patch.open``.

    Attributes:
        mask: which entries.
        values: by tensor, as ``mask.indices``: ``(entries,)`` in the base's dtype.
        base: ``digest`` of the base's tensors that ``mask.shapes`` names.
    """

    mask: Mask
    values: Mapping[str, Tensor]
    base: str

    @classmethod
    def of(
        cls, mask: Mask, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> Patch:
        """Take the values of ``tuned`` where the mask is.

        Args:
            mask: over tensors of ``base``.
            base: parameters by name.
            tuned: those of the tuned model.
            dtype: that values are rounded to; the base's by default.
        """
        values = {
            name: tuned[name].detach().flatten()[places.to(tuned[name].device)].to(dtype or base[name].dtype).cpu()
            for name, places in mask.indices.items()
        }
        return cls(mask, values, digest({name: base[name] for name in mask.shapes}))

    def save(self, path: Path) -> None:
        """Write one safetensors file: ``indices/NAME`` (int32 where that is enough) and ``values/NAME``.

        Whole or not at all. Size: four bytes an entry and its value.
        """
        tensors = {}
        for name, places in self.mask.indices.items():
            narrow = np.prod(self.mask.shapes[name], dtype=np.int64) <= np.iinfo(np.int32).max
            tensors[f"indices/{name}"] = places.to(torch.int32) if narrow else places
            tensors[f"values/{name}"] = self.values[name].contiguous()
        about = {
            "base": self.base,
            "count": self.mask.count,
            "shapes": {n: list(s) for n, s in self.mask.shapes.items()},
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt", _METADATA: json.dumps(about)})

    @classmethod
    def open(cls, path: Path) -> Patch:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a safetensors file that is no patch, or one whose entries lie outside its tensors.
        """
        if not path.is_file():
            raise FileNotFoundError(f"no patch at {path}.")
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(_METADATA, "null"))
            if about is None:
                raise ValueError(f"{path} is no patch: its header does not say which base it is for.")
            names = [key.removeprefix("indices/") for key in file.keys() if key.startswith("indices/")]  # noqa: SIM118
            indices = {name: file.get_tensor(f"indices/{name}").long() for name in names}
            values = {name: file.get_tensor(f"values/{name}") for name in names}
        shapes = {name: tuple(shape) for name, shape in about["shapes"].items()}
        ordered = {name: indices[name] for name in shapes if name in indices}
        for name, places in ordered.items():
            size = int(np.prod(shapes[name], dtype=np.int64))
            if len(values[name]) != len(places) or int(places.min()) < 0 or int(places.max()) >= size:
                raise ValueError(f"{path}: the entries of {name!r} do not fit its shape {shapes[name]}; it is damaged.")
        return cls(Mask(ordered, shapes), values, about["base"])

    def apply(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` with the new values; ``model`` stays as it is.

        Raises:
            ValueError: ``model`` is not the base that the patch was made for, or its dtype cannot hold the values.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        shapes = {name: tuple(parameters[name].shape) for name in self.mask.shapes if name in parameters}
        if shapes != self.mask.shapes:
            wrong = next(name for name, shape in self.mask.shapes.items() if shapes.get(name) != shape)
            raise ValueError(
                f"the patch changes {wrong!r} of shape {self.mask.shapes[wrong]}; the model has "
                f"{shapes.get(wrong, 'no such parameter')}. Is it another architecture?"
            )
        found = digest({name: parameters[name] for name in self.mask.shapes})
        if found != self.base:
            raise ValueError(
                f"the patch belongs on a base with digest {self.base}; this model has {found}. Give the base that the "
                "patch was made for, untouched, in the dtype of its checkpoint or a wider one."
            )
        patched = copy.deepcopy(model)
        parameters = dict(patched.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, places in self.mask.indices.items():
                target, values = parameters[name], self.values[name]
                if not torch.equal(values.to(target.dtype).to(values.dtype), values):
                    raise ValueError(f"{target.dtype} cannot hold the new values of {name!r}; load the base wider.")
                target.put_(places.to(target.device), values.to(target))
        return patched


def join_patches(patches: Sequence[Patch]) -> Patch:
    """One patch of several for the same base. An entry that several change gets the mean of its new values.

    Raises:
        ValueError: none, or they are for different bases.
    """
    mask = merge_masks([patch.mask for patch in patches])
    if len({patch.base for patch in patches}) > 1:
        raise ValueError("the patches are for different bases; join those of one base only.")
    values = {}
    for name, places in mask.indices.items():
        own = [patch for patch in patches if name in patch.mask.indices]
        total, times = torch.zeros(len(places), dtype=torch.float64), torch.zeros(len(places), dtype=torch.float64)
        for patch in own:
            at = torch.searchsorted(places, patch.mask.indices[name])
            total[at] += patch.values[name].double()
            times[at] += 1
        values[name] = (total / times).to(own[0].values[name].dtype)
    return Patch(mask, values, patches[0].base)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """32 hex digits over names, shapes and values; a bfloat16 model and its float32 copy have the same."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        values = tensors[name].detach()
        found.update(f"{name}{tuple(values.shape)}".encode())
        for block in torch.split(values.flatten(), _BLOCK):
            wide = block.to("cpu", torch.promote_types(block.dtype, torch.float32)).contiguous()
            found.update(wide.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def readme(base: str, dtype: str, example: str) -> str:
    """What a directory of patches says of itself, with code that applies one without Headwater.

    Args:
        base: name or directory of the base.
        dtype: that the values have.
        example: file name of one of the patches.
    """
    return f"""# Patches

Each file holds new values for a few parameters of `{base}`: `indices/NAME` are places in the parameter NAME, flattened,
and `values/NAME` what stands there instead. The header names the base's digest.

## With Headwater, which refuses another base

```python
from pathlib import Path
from transformers import AutoModelForCausalLM
from headwater.compose.skill_localization import Patch

model = Patch.open(Path({example!r})).apply(AutoModelForCausalLM.from_pretrained({base!r}, dtype={dtype!r}))
```

## Without

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r}, dtype={dtype!r})
patch, weights = load_file({example!r}), dict(model.named_parameters())
with torch.no_grad():
    for key in patch:
        kind, name = key.split("/", 1)
        if kind == "indices":
            weights[name].view(-1)[patch[key].long()] = patch["values/" + name].to(weights[name].dtype)
```
"""
