"""Several LoRA experts on one model, each token through the few that suit it, at every adapted layer anew.

    alpha_e = v_bar_e . u_bar / sqrt(n),   w = softmax of the k largest alphas,   y = W u + sum_e w_e B_e A_e u

u is a layer's input of width n, v_e expert e's routing vector there, and a bar means: less its mean, over its standard
deviation. Where the vectors come from is the method's; this is how tokens get to experts. No expert ever runs on all
tokens through its full width: either one product takes all tokens down to all ranks at once and unchosen ranks are set
to zero, or, where there are many ranks, tokens are gathered by expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from headwater.modalities.models import ModelError

__all__ = [
    "LowRank",
    "RoutedExperts",
    "RoutedLinear",
    "RoutingRecord",
    "Rule",
    "dense_experts",
    "grouped_experts",
    "routing_scores",
    "top_experts",
]

Rule: TypeAlias = Literal["standardised", "magnitude", "uniform"]
"""How tokens are scored: both sides standardised, as in the equation; ``|v . u|``; or all experts alike."""

DENSE_RANKS = 192
"""Up to so many ranks, of all experts together, one product over all of them is the faster way (benchmarks/routing)."""


class LowRank(NamedTuple):
    """What an expert adds to one linear layer: ``up @ down @ u``.

    Attributes:
        down: A, ``(r, n)``.
        up: B with the adapter's scaling in it, ``(m, r)``.
    """

    down: Tensor
    up: Tensor


def standardised(vectors: Tensor) -> Tensor:
    """Less their mean, over their standard deviation, along the last dimension, float32; constant vectors give 0."""
    # The floor is far below the variance of any activation, so that scaling u changes nothing.
    return F.layer_norm(vectors.float(), vectors.shape[-1:], eps=1e-12)


def routing_scores(inputs: Tensor, vectors: Tensor, rule: Rule = "standardised") -> Tensor:
    """How well each expert suits each token.

    Args:
        inputs: ``(tokens, n)``, any floating dtype.
        vectors: ``(experts, n)``; under ``standardised`` already so.
        rule: see ``Rule``.

    Returns:
        ``(tokens, experts)`` float32.

    Example:
        >>> routing_scores(torch.tensor([[1.0, 3.0]]), standardised(torch.tensor([[0.0, 2.0], [2.0, 0.0]])))
        tensor([[ 1.4142, -1.4142]])
    """
    if rule == "uniform":
        return inputs.new_zeros(len(inputs), len(vectors), dtype=torch.float32)
    if rule == "magnitude":
        return (inputs.float() @ vectors.float().T).abs()
    scores: Tensor = standardised(inputs) @ vectors.T / vectors.shape[-1] ** 0.5
    return scores


def top_experts(scores: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The ``k`` best experts of each token and their weights.

    Args:
        scores: ``(tokens, experts)``; -inf where an expert has nothing at this layer.
        k: how many; at most all.
        temperature: divides the scores; > 0.

    Returns:
        (weights, experts), both ``(tokens, k)``, best first; the weights sum to 1. An expert at -inf weighs 0.
    """
    best, experts = scores.topk(k, dim=-1)
    return (best / temperature).softmax(-1), experts


def dense_experts(inputs: Tensor, down: Tensor, up: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """The chosen experts' outputs, weighted and summed: all tokens go down to all ranks, unchosen ones become zero.

    Args:
        inputs: ``(tokens, n)``.
        down: ``(E, r, n)``, in the dtype of ``inputs``.
        up: ``(E, m, r)``.
        weights: ``(tokens, k)``.
        experts: ``(tokens, k)``, in [0, E).

    Returns:
        ``(tokens, m)``. Takes ``tokens * E * r`` numbers on the way.
    """
    count, rank, _ = down.shape
    share = inputs.new_zeros(len(inputs), count).scatter_(1, experts, weights.to(inputs.dtype))
    inner = (inputs @ down.flatten(0, 1).T).view(-1, count, rank) * share[..., None]
    return inner.flatten(1) @ up.transpose(1, 2).flatten(0, 1)


def grouped_experts(inputs: Tensor, down: Tensor, up: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """What ``dense_experts`` gives, each expert running on its own tokens only.

    Takes ``tokens * k`` numbers on the way and, for one expert at a time, copies of its tokens. Reads the group sizes
    on the host once.
    """
    count, k = len(down), experts.shape[1]
    order = experts.flatten().argsort(stable=True)
    ends = experts.flatten().bincount(minlength=count).cumsum(0).tolist()
    weights = weights.to(inputs.dtype).flatten()
    total = inputs.new_zeros(len(inputs), up.shape[1])
    for expert, (begin, end) in enumerate(pairwise([0, *ends])):
        if end > begin:
            places = order[begin:end]
            tokens = places // k
            inner = inputs[tokens] @ down[expert].T * weights[places, None]
            total.index_add_(0, tokens, inner @ up[expert].T)
    return total


class RoutedLinear(nn.Module):
    """The experts of one linear layer.

    Args:
        experts: what each adds, in one dtype and on one device; None for one that leaves this layer alone.
        vectors: routing vectors, ``(E, n)``; None under ``uniform``.
        k: experts per token.
        rule: see ``Rule``.
        temperature: of the softmax over the chosen.
    """

    def __init__(
        self,
        experts: Sequence[LowRank | None],
        vectors: Tensor | None,
        *,
        k: int,
        rule: Rule = "standardised",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        there = [expert for expert in experts if expert is not None]
        rank, (outputs, _), inputs = max(len(e.down) for e in there), there[0].up.shape, there[0].down.shape[1]
        down, up = (there[0].down.new_zeros(len(experts), *shape) for shape in ((rank, inputs), (outputs, rank)))
        for number, expert in enumerate(experts):
            if expert is not None:  # shorter ranks are filled with zeros, which add nothing
                down[number, : len(expert.down)], up[number, :, : len(expert.down)] = expert.down, expert.up
        if vectors is None:
            vectors = torch.zeros(len(experts), 0, device=down.device)
        elif rule == "standardised":
            vectors = standardised(vectors)
        self.down, self.up, self.vectors = (
            nn.Parameter(tensor, requires_grad=False) for tensor in (down, up, vectors.to(down.device, torch.float32))
        )
        missing = torch.tensor([expert is None for expert in experts], device=down.device)
        self.missing: Tensor | None
        self.register_buffer("missing", missing if missing.any() else None)
        self.k, self.rule, self.temperature = k, rule, temperature
        self.record: list[tuple[Tensor, Tensor]] | None = None

    def choose(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts, ``(tokens, k)``, of ``inputs`` ``(tokens, n)``."""
        scores = routing_scores(inputs, self.vectors, self.rule)
        if self.missing is not None:
            scores = scores.masked_fill(self.missing, -torch.inf)
        return top_experts(scores, self.k, self.temperature)

    def forward(self, inputs: Tensor) -> Tensor:
        """What the experts add to the layer's output.

        Args:
            inputs: of the layer, ``(..., n)``.

        Returns:
            ``(..., m)``, in the experts' dtype.
        """
        flat = inputs.flatten(0, -2)
        weights, experts = self.choose(flat)
        if self.record is not None:
            self.record.append((weights.detach().cpu(), experts.to("cpu", torch.int16)))
        # Where every expert is chosen, gathering tokens by expert only copies them.
        dense = self.k == len(self.down) or len(self.down) * self.down.shape[1] <= DENSE_RANKS
        run = dense_experts if dense else grouped_experts
        added = run(flat.to(self.down.dtype), self.down, self.up, weights, experts)
        return added.view(*inputs.shape[:-1], added.shape[-1])

    def _add(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """As a forward hook of the layer."""
        added: Tensor = self(inputs[0])
        return output + added.to(output.dtype)


@dataclass
class RoutingRecord:
    """Which experts tokens went to.

    Attributes:
        experts: the experts' names.
        weights: by layer, ``(tokens, k)`` float32.
        choices: by layer, ``(tokens, k)`` int16, numbers of ``experts``, best first.
    """

    experts: tuple[str, ...]
    weights: dict[str, Tensor] = field(default_factory=dict)
    choices: dict[str, Tensor] = field(default_factory=dict)

    def usage(self) -> pd.DataFrame:
        """One row per layer: ``layer``, each expert's mean weight over tokens, and the ``entropy`` of those in bits."""
        rows = []
        for layer, choices in self.choices.items():
            summed = torch.zeros(len(self.experts), dtype=torch.float64)
            summed.index_add_(0, choices.flatten().long(), self.weights[layer].flatten().double())
            share = summed / max(len(choices), 1)
            entropy = float(torch.special.entr(share).sum() / torch.log(torch.tensor(2.0)))
            rows.append({"layer": layer, **dict(zip(self.experts, share.tolist(), strict=True)), "entropy": entropy})
        return pd.DataFrame(rows, columns=["layer", *self.experts, "entropy"])

    def agreement(self) -> float:
        """How often two layers send a token to the same best expert, over pairs of layers that saw the same tokens.

        NaN where there is no such pair.
        """
        best = [choices[:, 0] for choices in self.choices.values() if len(choices)]
        shares = [float((a == b).double().mean()) for a, b in combinations(best, 2) if len(a) == len(b)]
        return sum(shares) / len(shares) if shares else float("nan")


class RoutedExperts(nn.Module):
    """A model whose adapted linear layers send each token to a few of several experts.

    The experts hang on the model's layers as forward hooks: ``model`` is the user's own, with its own names and weights
    (quantised or not), and is called, generated with and scored as before; ``detach`` takes the experts off again.
    ``model`` may be used in this object's place where a library wants a ``PreTrainedModel``.

    Args:
        model: the base; changed by hooks only.
        experts: by expert and layer (a name in ``model.named_modules()``), what it adds. One expert on all layers is
            that LoRA alone.
        vectors: by expert and layer, routing vectors ``(n,)``; None under ``uniform``.
        k: experts per token and layer.
        rule: see ``Rule``; ``uniform`` with ``k`` all experts is the mean of the experts' outputs, and so that of
            their weight changes.
        temperature: of the softmax over the chosen; > 0.
        strict: refuse experts that adapt other layers than the first; otherwise an expert is not chosen where it
            adapts nothing.

    Raises:
        ModelError: more experts per token than experts; a layer that the model does not have, or in another width;
            differing layers under ``strict``; a routing vector that is missing, constant or not finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        experts: Mapping[str, Mapping[str, LowRank]],
        vectors: Mapping[str, Mapping[str, Tensor]] | None,
        *,
        k: int = 2,
        rule: Rule = "standardised",
        temperature: float = 1.0,
        strict: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= k <= len(experts):
            raise ModelError(f"k must be between 1 and the number of experts; got k={k} and {len(experts)} experts.")
        if temperature <= 0:
            raise ModelError(f"temperature must be above 0; got {temperature}.")
        if (vectors is None) != (rule == "uniform"):
            raise ModelError(f"rule {rule!r} {'needs' if vectors is None else 'takes no'} routing vectors.")
        _check_layers(model, experts, strict)
        if vectors is not None:
            _check_vectors(experts, vectors)
        modules = dict(model.named_modules())
        self.model, self.experts, self.k = model, tuple(experts), k
        self.layers = tuple(sorted({layer for own in experts.values() for layer in own}))
        routed = []
        for layer in self.layers:
            weight = modules[layer].weight
            # A quantised weight has no dtype to compute in; the adapter's own is used then.
            dtype = weight.dtype if weight.is_floating_point() else None
            own = [found.get(layer) for found in experts.values()]
            cast = [
                None if e is None else LowRank(*(part.detach().to(device=weight.device, dtype=dtype) for part in e))
                for e in own
            ]
            stacked = None
            if vectors is not None:
                width = next(e.down.shape[1] for e in own if e is not None)
                none = torch.zeros(width)
                stacked = torch.stack([vectors[name].get(layer, none).detach().float().cpu() for name in experts])
            routed.append(RoutedLinear(cast, stacked, k=k, rule=rule, temperature=temperature))
        self.routed = nn.ModuleList(routed)
        self._hooks = [
            modules[layer].register_forward_hook(linear._add) for layer, linear in zip(self.layers, routed, strict=True)
        ]
        self.train(model.training)

    @property
    def config(self) -> Any:  # Any: transformers ships no types
        """The model's."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """The model's."""
        found: torch.device = self.model.device
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # Any: whatever the model takes and gives
        """As the model's."""
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:  # Any: whatever the model takes and gives
        """As the model's."""
        return self.model.generate(*args, **kwargs)

    def detach(self) -> PreTrainedModel:
        """Take the experts off; the model, as it was."""
        for hook in self._hooks:
            hook.remove()
        return self.model

    @contextmanager
    def routing(self) -> Iterator[RoutingRecord]:
        """Record where tokens go while the block runs; the record is filled when the block ends.

        Padding is left out where the model is called with an ``attention_mask`` ``(batch, time)``.
        """
        record = RoutingRecord(self.experts)
        kept: list[Tensor | None] = []

        def note_mask(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # Any: its arguments
            ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
            if isinstance(ids, Tensor) and isinstance(mask, Tensor) and mask.dim() == 2:
                # With cached keys the mask is longer than what is read now.
                kept.append(mask[:, -ids.shape[1] :].flatten().bool().cpu())
            else:
                kept.append(None)

        watch = self.model.register_forward_pre_hook(note_mask, with_kwargs=True)
        for linear in self.routed:
            linear.record = []  # type: ignore[assignment]  # torch types attributes of modules as tensors or modules
        try:
            yield record
        finally:
            watch.remove()
            for layer, linear in zip(self.layers, self.routed, strict=True):
                calls: Any = linear.record  # Any: see above
                linear.record = None  # type: ignore[assignment]
                masks = kept if len(kept) == len(calls) else [None] * len(calls)
                none = [torch.zeros(0, self.k)]
                for target, part in ((record.weights, 0), (record.choices, 1)):
                    rows = [
                        c[part] if m is None or len(m) != len(c[part]) else c[part][m]
                        for c, m in zip(calls, masks, strict=True)
                    ]
                    target[layer] = torch.cat(rows or none)


def _check_layers(model: nn.Module, experts: Mapping[str, Mapping[str, LowRank]], strict: bool) -> None:
    modules = dict(model.named_modules())
    first, reference = next(iter(experts.items()))
    shapes: dict[str, tuple[str, int, int]] = {}
    for name, own in experts.items():
        if not own:
            raise ModelError(f"{name} adapts no linear layer, so there is nothing to route to.")
        if strict and (differing := sorted(reference.keys() ^ own.keys())):
            raise ModelError(
                f"{first} and {name} adapt different layers ({len(differing)}, e.g. {differing[0]}). "
                "Without `strict` an expert is passed over where it adapts nothing."
            )
        for layer, expert in own.items():
            if layer not in modules:
                raise ModelError(f"{name} adapts {layer!r}, which the base does not have: was it trained on another?")
            found = expert.down.shape[1], expert.up.shape[0]
            other, *expected = shapes.setdefault(layer, (name, *found))
            if tuple(expected) != found:
                raise ModelError(
                    f"{layer} has {found[0]} inputs and {found[1]} outputs in {name}, {expected[0]} and {expected[1]} "
                    f"in {other}: they were trained on different models."
                )


def _check_vectors(experts: Mapping[str, Mapping[str, LowRank]], vectors: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, own in experts.items():
        for layer, expert in own.items():
            vector = vectors.get(name, {}).get(layer)
            if vector is None or vector.shape != expert.down.shape[1:]:
                found = "none" if vector is None else f"one of shape {tuple(vector.shape)}"
                raise ModelError(
                    f"{name} needs a gate of width {expert.down.shape[1]} at {layer}; found {found}. Train its gates."
                )
            if not vector.isfinite().all():
                raise ModelError(f"the gate of {name} at {layer} holds NaN or infinity; train its gates anew.")
            if (vector == vector[0]).all():  # standardised it would be 0 and suit every token alike
                raise ModelError(f"gate of {name} untrained: at {layer} all of its elements are {float(vector[0]):g}.")
