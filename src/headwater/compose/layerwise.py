"""Two views of an input, joined at several layers: a large pretrained model's and a small model's of its own.

    o_j = a_j([f_{l_j}(x); g(x)]),  j = 1..m          logits = (1/m) sum_j o_j

f_{l_j} is a layer of the pretrained model, pooled over its positions; g is the small model; a_j is linear, norm,
activation, linear. Where the pretrained model is frozen its layers are computed once (``cache_views``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from headwater.core.cache import atomic_path
from headwater.core.objective import Loss

__all__ = [
    "EnsembleOutput",
    "LayerwiseEnsemble",
    "LayerwiseObjective",
    "OutputEnsemble",
    "Pool",
    "Pooled",
    "SmallImages",
    "cache_views",
    "pool_positions",
    "small_text",
    "spread_layers",
    "view_report",
]

Pool: TypeAlias = Literal["auto", "first", "last", "mean"]


@dataclass(frozen=True, eq=False)
class EnsembleOutput:
    """What an ensemble answers.

    Attributes:
        logits: ``(batch, classes)``, the mean of its members'.
        per_layer: ``(members, batch, classes)``.
    """

    logits: Tensor
    per_layer: Tensor


def spread_layers(depth: int, layers: int | Sequence[int]) -> tuple[int, ...]:
    """Which layers are joined, counted from 1; the last is among those that are chosen by number.

    Args:
        depth: layers of the pretrained model.
        layers: how many, evenly spaced; or which.

    Raises:
        ValueError: out of range, or one twice.

    Example:
        >>> spread_layers(12, 4)
        (3, 6, 9, 12)
    """
    if isinstance(layers, int):
        if not 1 <= layers <= depth:
            raise ValueError(f"layers must be between 1 and the model's {depth}; got {layers}.")
        return tuple(round(j * depth / layers) for j in range(1, layers + 1))
    chosen = tuple(layers)
    if not chosen or len(set(chosen)) < len(chosen) or not all(1 <= layer <= depth for layer in chosen):
        raise ValueError(f"layers must be different numbers from 1 to {depth}, the model's depth; got {list(chosen)}.")
    return chosen


def pool_positions(states: Tensor, mask: Tensor | None, pool: Literal["first", "last", "mean"]) -> Tensor:
    """One vector for each input.

    Args:
        states: ``(batch, positions, width)``.
        mask: ``(batch, positions)``, 0 for padding on either side; None where there is none.
        pool: the first position that is no padding, the last such, or the mean of all such.
    """
    if mask is None:
        return {"first": states[:, 0], "last": states[:, -1], "mean": states.mean(1)}[pool]
    mask = mask.to(states.device)
    if pool == "mean":
        weights = mask[..., None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
    places = torch.arange(mask.shape[1], device=mask.device)
    at = (mask * (places + 1)).argmax(1) if pool == "last" else mask.argmax(1)
    return states[torch.arange(len(states), device=states.device), at]


def _pool_of(model: nn.Module) -> Literal["first", "last", "mean"]:
    """Where an architecture keeps what it knows of the whole input."""
    config = getattr(model, "config", None)
    if config is None:
        return "mean"
    causal = (
        type(config) in AutoModelForCausalLM._model_mapping and type(config) not in AutoModelForMaskedLM._model_mapping
    )
    if causal:
        return "last"
    return "first" if any(name.endswith("cls_token") for name, _ in model.named_parameters()) else "mean"


def _depth_and_width(model: nn.Module) -> tuple[int, int]:
    config: Any = getattr(model, "config", None)  # Any: transformers ships no types
    if config is None or not hasattr(config, "hidden_size"):
        raise ValueError(
            f"{type(model).__name__} must be a model of transformers, which says how many layers it has and how wide."
        )
    text = config.get_text_config()
    return int(text.num_hidden_layers), int(text.hidden_size)


class Pooled(nn.Module):
    """An encoder whose last hidden states are pooled to one vector: ``(batch, width)``.

    Args:
        encoder: a model of transformers without a head.
        pool: see ``pool_positions``; ``auto`` takes the last position of a decoder, the class token where there is one,
            else the mean.

    Attributes:
        width: of the vector.
    """

    def __init__(self, encoder: nn.Module, pool: Pool = "auto") -> None:
        super().__init__()
        self.encoder, self.width = encoder, _depth_and_width(encoder)[1]
        self.pool = _pool_of(encoder) if pool == "auto" else pool

    def forward(self, **inputs: Tensor) -> Tensor:
        """Of the encoder's own inputs."""
        return pool_positions(self.encoder(**inputs).last_hidden_state, inputs.get("attention_mask"), self.pool)


def small_text(vocab_size: int, *, width: int = 64, layers: int = 2, positions: int = 512, pad: int = 0) -> Pooled:
    """A small bidirectional transformer with random weights, drawn from torch's global generator."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        intermediate_size=2 * width,
        max_position_embeddings=positions,
        pad_token_id=pad,
    )
    return Pooled(BertModel(config, add_pooling_layer=False), "mean")


class SmallImages(nn.Module):
    """A small convolutional network with random weights: ``pixel_values`` ``(batch, channels, H, W)`` to a vector.

    Attributes:
        width: of the vector.
    """

    def __init__(self, channels: int = 1, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width // 2, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, padding=1, stride=2),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * width, width),
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``(batch, width)``."""
        found: Tensor = self.layers(pixel_values)
        return found


class LayerwiseEnsemble(nn.Module):
    """Adapters that each join one layer of a pretrained model with a small model, and the mean of their answers.

    Args:
        pretrained: a model of transformers without a head; a PEFT model of one trains its adapters.
        small: from ``inputs`` to ``(batch, width)``; has an attribute ``width``. None: the adapters see the pretrained
            model alone.
        num_outputs: classes.
        layers: see ``spread_layers``.
        adapter_hidden: width inside an adapter; 0: a linear layer and nothing else.
        pool: see ``Pooled``.
        train_pretrained: move the pretrained model's weights as well (those that want a gradient).

    Attributes:
        layers: which are joined.
        width: of a view.

    Raises:
        ValueError: see ``spread_layers``; a ``pretrained`` of another kind.

    Example:
        ``LayerwiseEnsemble(vit, SmallImages(3), 10)(pixel_values=images).logits``
    """

    def __init__(
        self,
        pretrained: nn.Module,
        small: nn.Module | None,
        num_outputs: int,
        *,
        layers: int | Sequence[int] = 4,
        adapter_hidden: int = 256,
        pool: Pool = "auto",
        train_pretrained: bool = False,
    ) -> None:
        super().__init__()
        depth, self.width = _depth_and_width(pretrained)
        self.layers = spread_layers(depth, layers)
        self.pretrained, self.small, self.frozen = pretrained, small, not train_pretrained
        self.pool = _pool_of(pretrained) if pool == "auto" else pool
        if self.frozen:
            pretrained.requires_grad_(False)
        inputs = self.width + (int(small.width) if small is not None else 0)  # type: ignore[arg-type]  # torch's typing

        def adapter() -> nn.Module:
            if adapter_hidden == 0:
                return nn.Linear(inputs, num_outputs)
            return nn.Sequential(
                nn.Linear(inputs, adapter_hidden),
                nn.LayerNorm(adapter_hidden),
                nn.GELU(),
                nn.Linear(adapter_hidden, num_outputs),
            )

        self.adapters = nn.ModuleList([adapter() for _ in self.layers])

    def train(self, mode: bool = True) -> LayerwiseEnsemble:
        """As any module's; a frozen model stays in ``eval()``, its dropout off and its statistics as they are."""
        super().train(mode)
        if self.frozen:
            self.pretrained.eval()
        return self

    def views(self, **inputs: Tensor) -> Tensor:
        """The joined layers of the pretrained model, pooled: ``(batch, m, width)``."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            states = self.pretrained(**inputs, output_hidden_states=True).hidden_states
            mask = inputs.get("attention_mask")
            return torch.stack([pool_positions(states[layer], mask, self.pool) for layer in self.layers], dim=1)

    def forward(
        self, views: Tensor | None = None, small_inputs: Mapping[str, Tensor] | None = None, **inputs: Tensor
    ) -> EnsembleOutput:
        """Answer.

        Args:
            views: what ``views`` gave for these inputs, where that is known.
            small_inputs: what the small model reads; by default what the pretrained one does.
            inputs: of the pretrained model.
        """
        views = self.views(**inputs) if views is None else views
        features = [views[:, j].to(next(self.adapters.parameters()).dtype) for j in range(len(self.layers))]
        if self.small is not None:
            own = self.small(**(inputs if small_inputs is None else small_inputs))
            features = [torch.cat([view, own], dim=-1) for view in features]
        per_layer = torch.stack([adapter(x) for adapter, x in zip(self.adapters, features, strict=True)])
        return EnsembleOutput(per_layer.mean(0), per_layer)


class OutputEnsemble(nn.Module):
    """The strongest simple rival: a fine-tuned model and a small one, each with a head, that meet in their logits only.

    Args:
        pretrained: as for ``LayerwiseEnsemble``; all its weights are trained.
        small: from inputs to ``(batch, width)``.
        num_outputs: classes.
        pool: see ``Pooled``.
    """

    def __init__(self, pretrained: nn.Module, small: nn.Module, num_outputs: int, *, pool: Pool = "auto") -> None:
        super().__init__()
        self.members = nn.ModuleList([Pooled(pretrained, pool), small])
        widths = [int(member.width) for member in self.members]  # type: ignore[arg-type]  # torch's typing
        self.heads = nn.ModuleList([nn.Linear(width, num_outputs) for width in widths])

    def forward(self, **inputs: Tensor) -> EnsembleOutput:
        """Answer; the members are the two models."""
        pairs = zip(self.members, self.heads, strict=True)
        per_layer = torch.stack([head(member(**inputs)) for member, head in pairs])
        return EnsembleOutput(per_layer.mean(0), per_layer)


class LayerwiseObjective:
    """Every member learns for itself: the mean over members of its cross-entropy, and not that of the mean.

    Batches hold the model's inputs, ``labels`` ``(batch,)`` and, where they are cached, ``views``.

    Args:
        averaged: weight of the loss of the averaged answer, added to it; 0 in the default. Whether the paper adds it
            could not be checked.
    """

    unit = "nats/example"

    def __init__(self, averaged: float = 0.0) -> None:
        self.averaged = averaged

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """Summed over the batch."""
        inputs = {name: values for name, values in batch.items() if name not in ("labels", "row")}
        labels, found = batch["labels"], model(**inputs)
        members = [nn.functional.cross_entropy(own.float(), labels, reduction="sum") for own in found.per_layer]
        total = torch.stack(members).mean()
        if self.averaged:
            total = total + self.averaged * nn.functional.cross_entropy(found.logits.float(), labels, reduction="sum")
        right = (found.logits.argmax(-1) == labels).float().mean().detach()
        return Loss(total, len(labels), {"accuracy": right})


def cache_views(
    model: LayerwiseEnsemble, batches: Iterable[Mapping[str, Tensor]], rows: int, path: Path
) -> NDArray[Any]:
    """Compute a frozen model's views once, into one file that is mapped into memory.

    Args:
        model: its pretrained part is frozen.
        batches: inputs of the pretrained model, ``rows`` in all, in order.
        rows: how many inputs.
        path: of the ``.npy`` file; whole or not there.

    Returns:
        ``(rows, m, width)`` float32, memory-mapped.

    Raises:
        ValueError: the pretrained model is trained, so that views change; or another number of inputs.
    """
    if not model.frozen:
        raise ValueError("the pretrained model is trained here, so its views change; they cannot be cached.")
    device = next(model.parameters()).device
    shape, done = (rows, len(model.layers), model.width), 0
    model.eval()
    with atomic_path(path) as temporary:
        stored = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
        for batch in batches:
            with torch.no_grad():
                views = model.views(**{name: values.to(device) for name, values in batch.items()}).float().cpu().numpy()
            if done + len(views) > rows:
                raise ValueError(f"there are more than {rows} inputs.")
            stored[done : done + len(views)] = views
            done += len(views)
        if done < rows:
            raise ValueError(f"there are {done} inputs and not {rows}.")
        stored.flush()
        del stored
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]  # numpy's typing


def view_report(model: LayerwiseEnsemble, batches: Iterable[Mapping[str, Tensor]]) -> pd.DataFrame:
    """What each joined layer contributes.

    Args:
        model: in any mode; given back in it.
        batches: inputs with ``labels``.

    Returns:
        One row per layer: ``layer``, ``accuracy`` of its adapter alone, ``agreement`` with the averaged answer, and
        ``cka`` in [0, 1], the linear similarity of its view with the small model's (NaN without one): views that are
        alike have little to tell each other.

    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", arXiv:1905.00414, equation 2.
    """
    training = model.training
    model.eval()
    answers, whole, truth, views, own = [], [], [], [], []
    with torch.no_grad():
        for batch in batches:
            inputs = {name: values for name, values in batch.items() if name not in ("labels", "row")}
            views.append(inputs["views"] if "views" in inputs else model.views(**inputs))
            found = model(**{**inputs, "views": views[-1]})
            answers.append(found.per_layer.argmax(-1))
            whole.append(found.logits.argmax(-1))
            truth.append(batch["labels"])
            if model.small is not None:
                own.append(model.small(**{name: values for name, values in inputs.items() if name != "views"}))
    model.train(training)
    each, averaged, labels = torch.cat(answers, dim=1), torch.cat(whole), torch.cat(truth)
    stacked = torch.cat(views)
    rows = [
        {
            "layer": layer,
            "accuracy": float((each[j] == labels).float().mean()),
            "agreement": float((each[j] == averaged).float().mean()),
            "cka": _cka(stacked[:, j].double(), torch.cat(own).double()) if own else float("nan"),
        }
        for j, layer in enumerate(model.layers)
    ]
    return pd.DataFrame(rows)


def _cka(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(0), b - b.mean(0)
    return float((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()))
