"""Instruction vector: a domain model that follows instructions, without instructions of the domain.

    theta = theta_base + w_d (theta_domain - theta_base) + w_i (theta_instruct - theta_base),      w_d = w_i = 1

Both models come from one base: one continued on domain text, the other tuned on general instructions. The paper finds
the two differences nearly orthogonal, which is why their sum keeps both; ``vector_geometry`` measures that.

Source: Hirano and Imajo, "The Construction of Instruction-tuned LLMs for Finance without Instruction Data Using
Continual Pretraining and Model Merging", arXiv:2409.19854; task arithmetic as in Ilharco et al., arXiv:2212.04089.
Differs: nothing; the other merges of ``headwater.compose.merge`` can be chosen instead.
Needs: a base, a model continued from it on domain text, and one tuned from it on instructions; LoRA adapters will do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, Literal

import pandas as pd
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from headwater.compose.base import Composed, Composition, CompositionContext, WeightsOnDisk
from headwater.compose.merge import MergeMethod, MergeReport, blocks, merge
from headwater.compose.mergekit import read_mergekit
from headwater.core.cache import atomic_write_text
from headwater.core.weights import WeightSource

__all__ = [
    "InstructionVector",
    "MergeReport",
    "geometry_warnings",
    "merge",
    "read_mergekit",
    "sweep",
    "vector_geometry",
]

TOTAL = "total"
FAR = 0.5


def vector_geometry(base: WeightSource, parts: Mapping[str, WeightSource]) -> pd.DataFrame:
    """Lengths of the parts' differences from the base, and the angles between them, streamed and summed in float64.

    Args:
        base: the common base.
        parts: models of the same shapes, or changes of the base.

    Returns:
        One row per floating-point tensor and a last one, ``total``: ``tensor``, ``elements``, ``norm/base``,
        ``norm/PART`` (of the difference), ``cosine/base/PART`` (between the models themselves) and ``cosine/A/B``
        (between differences). NaN where a vector is zero.

    Raises:
        ValueError: a part has another shape than the base.
    """
    names, pairs = list(parts), list(itertools.combinations(parts, 2))
    sums: dict[str, Tensor] = {}
    for tensor in base.names():
        meta = base.meta(tensor)
        if not meta.dtype.is_floating_point:
            continue
        held = {name: part for name, part in parts.items() if tensor in part}
        for name, part in held.items():
            if part.meta(tensor).shape != meta.shape:
                raise ValueError(
                    f"{tensor!r} is {list(meta.shape)} in the base and {list(part.meta(tensor).shape)} in {name!r}."
                )
        gram = torch.zeros(len(names) + 1, len(names) + 1, dtype=torch.float64)
        for start, stop in blocks(meta):
            reference = base.slice(tensor, start, stop).double().flatten()
            rows = [reference]
            for name in names:
                values = torch.zeros_like(reference)
                if name in held:
                    values = held[name].slice(tensor, start, stop).double().flatten()
                    values = values if held[name].is_delta else values - reference
                rows.append(values)
            stacked = torch.stack(rows)
            gram += stacked @ stacked.T
        sums[tensor] = gram
    sums[TOTAL] = torch.stack(list(sums.values())).sum(dim=0)
    table = []
    for tensor, gram in sums.items():
        counted = base.names() if tensor == TOTAL else (tensor,)
        elements = sum(math.prod(base.meta(name).shape) for name in counted if name in sums)
        row: dict[str, str | int | float] = {
            "tensor": tensor,
            "elements": elements,
            "norm/base": float(gram[0, 0].sqrt()),
        }
        for i, name in enumerate(names, start=1):
            row[f"norm/{name}"] = float(gram[i, i].sqrt())
            tuned = gram[0, 0] + 2 * gram[0, i] + gram[i, i]
            row[f"cosine/base/{name}"] = _cosine(gram[0, 0] + gram[0, i], gram[0, 0], tuned)
        for a, b in pairs:
            i, j = names.index(a) + 1, names.index(b) + 1
            row[f"cosine/{a}/{b}"] = _cosine(gram[i, j], gram[i, i], gram[j, j])
        table.append(row)
    return pd.DataFrame(table)


def _cosine(dot: Tensor, first: Tensor, second: Tensor) -> float:
    return float(dot / (first.sqrt() * second.sqrt())) if first > 0 and second > 0 else math.nan


def geometry_warnings(geometry: pd.DataFrame, parts: Iterable[str]) -> list[str]:
    """What is odd about parts: equal to the base, or too far from it to have been tuned from it."""
    total = geometry.set_index("tensor").loc[TOTAL]
    found = []
    for name in parts:
        length, start, cosine = total[f"norm/{name}"], total["norm/base"], total[f"cosine/base/{name}"]
        if length == 0:
            found.append(f"{name} is identical to the base: its vector is zero")
        elif cosine < FAR or length > FAR * start:
            found.append(
                f"{name} does not look as if it came from this base (cosine {cosine:.2f}, change of "
                f"{length / start:.2f} times the base's length): differences from other bases do not add up"
            )
    return found


def sweep(
    model: nn.Module,
    deltas: Mapping[str, WeightSource],
    grid: Iterable[Mapping[str, float]],
    evaluate: Callable[[nn.Module], Mapping[str, float]],
) -> pd.DataFrame:
    """Evaluate ``base + sum_i w_i v_i`` for many weights without writing any of them to disk.

    Args:
        model: the base, loaded; it has its own weights again afterwards.
        deltas: changes of it, by name (``core.weights.delta`` or ``adapter_deltas``); held in memory in their dtype.
        grid: weights by name; a name left out has weight 0.
        evaluate: called with the model in ``eval()`` for every point.

    Returns:
        One row per point: ``weight/NAME`` and what ``evaluate`` gave.

    Raises:
        ValueError: a weight for an unknown name, or a change of a tensor that the model does not have.
    """
    held = {name: {tensor: delta.get(tensor) for tensor in delta.names()} for name, delta in deltas.items()}
    state = model.state_dict(keep_vars=True)
    changed = sorted({tensor for values in held.values() for tensor in values})
    if unknown := [tensor for tensor in changed if tensor not in state]:
        raise ValueError(f"the model has no tensor {unknown[0]!r}.")
    start = {tensor: state[tensor].detach().clone() for tensor in changed}
    rows = []
    model.eval()
    try:
        for weights in grid:
            if strange := sorted(set(weights) - set(held)):
                raise ValueError(f"no change is called {strange[0]!r}; there are {', '.join(held)}.")
            _set(state, start, held, weights)
            rows.append({**{f"weight/{n}": weights.get(n, 0.0) for n in held}, **evaluate(model)})
    finally:
        _set(state, start, held, {})
    return pd.DataFrame(rows)


def _set(
    state: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    held: Mapping[str, Mapping[str, Tensor]],
    weights: Mapping[str, float],
) -> None:
    """Always from the start: adding and subtracting in place would drift."""
    with torch.no_grad():
        for tensor, before in start.items():
            value = before
            for name, weight in weights.items():
                if tensor in held[name]:
                    value = value.float() + weight * held[name][tensor].to(value.device, torch.float32)
            state[tensor].copy_(value)


class InstructionVector(Composition):
    """Add the instruction vector and the domain vector to their base.

    Source: Hirano and Imajo, arXiv:2409.19854.
    """

    id: ClassVar[str] = "instruction_vector"

    weights: dict[str, float] = Field(
        default={"domain": 1.0, "instruct": 1.0},  # both scales are 1 in the paper
        min_length=1,
        description="weight of each part, by role; `base` may have one under `linear` and `slerp`",
    )
    merge: MergeMethod = Field(default="task_arithmetic", description="how the parts are combined; the paper adds")
    density: float | dict[str, float] = Field(
        default=1.0, description="share of each difference that is kept, in (0, 1], under `ties` and `dare`"
    )
    scale: float = Field(default=1.0, ge=-10, le=10, description="factor on the sum of differences (lambda)")
    normalize: bool | None = Field(
        default=None,
        description="divide by the sum of the weights; by default as published, so for `linear` and `ties`",
    )
    vocab: Literal["error", "base", "union"] = Field(
        default="error", description="when a part has more tokens: stop, keep the base's rows, or keep all"
    )

    @model_validator(mode="after")
    def _weights_have_models(self) -> InstructionVector:
        if unknown := sorted(set(self.weights) - set(self.models)):
            raise ValueError(f"weights names {unknown[0]!r}, which is no role of models: {', '.join(self.models)}")
        if idle := sorted(set(self.models) - set(self.weights) - {"base"}):
            raise ValueError(f"model {idle[0]!r} has no weight; weights names {', '.join(self.weights)}")
        return self

    def compose(self, ctx: CompositionContext) -> Composed:
        """Measure the vectors, write ``geometry.csv``, merge."""
        parts = {role: ctx.source(role) for role in self.weights}
        vectors = {role: source for role, source in parts.items() if role != "base"}
        if self.vocab == "error":  # with other vocabularies the differences are not vectors of one space
            geometry = vector_geometry(ctx.source("base"), vectors)
            atomic_write_text(ctx.run.path("geometry.csv"), geometry.to_csv(index=False))
            for number, message in enumerate(geometry_warnings(geometry, vectors)):
                ctx.warn(f"geometry-{number}", message)
        report = merge(
            ctx.source("base"),
            {role: (source, self.weights[role]) for role, source in parts.items()},
            ctx.out,
            method=self.merge,
            density=self.density,
            scale=self.scale,
            normalize=self.normalize,
            seed=self.seed,
            files_from=None if ctx.is_adapter(self.tokenizer_from) else self.tokenizer_from,
            vocab=self.vocab,
            **ctx.streaming(),
        )
        ctx.charge(report)
        for role, share in report.zero_share.items():
            ctx.run.notes[f"zero_share/{role}"] = f"{share:.3f} of its elements do not differ from the base"
        return WeightsOnDisk(ctx.out)
