"""Searching for a mask: the user's objective, as a function of one score for every parameter that may be grafted.

    topk   theta = where(top_s(S), theta_ft, theta_pre)           dL/dS := dL/dtheta (theta_ft - theta_pre)
    flip   theta = gamma theta_ft + (1 - gamma) theta_pre         gamma =
                                                       gamma_0 (1 - sigmoid(S)) + (1 - gamma_0) sigmoid(S)

The model is called with grafted weights and never holds them.

Source: `flip` is the relaxation of Panigrahi et al., arXiv:2302.06600, section 2. `topk` is ours, with the
straight-through gradient of Bengio et al., arXiv:1308.3432, section 4.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from headwater.compose.graft import top_entries
from headwater.core.objective import Loss, Objective
from headwater.core.optim import AnyOptim, OptimSpec, SgdSpec
from headwater.core.rng import torch_generator
from headwater.core.surgery import EXCLUDED

__all__ = ["FlipSearch", "RepeatedBatches", "Search", "TopSearch", "check_pair", "frozen_view", "left_out_of"]

BIAS = 10.0
"""Subtracted from uniform scores at the start of ``flip``; whether the paper's is the same could not be checked."""
FURTHEST = 6.0
"""Scores of ``topk`` start within so much of the threshold's 0, or no gradient would bring an entry across it."""

LENGTH = 1e-6
"""That gradients of scores are cut to: a loss that could fall by a nat has entries far smaller than 1."""


def check_pair(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> None:
    """Refuse models whose parameters cannot be exchanged: other names or shapes, integers, NaN."""
    if base.keys() != tuned.keys():
        sides = [sorted(a.keys() - b.keys())[:10] for a, b in ((base, tuned), (tuned, base))]
        raise ValueError(f"the models have other parameters: only the base has {sides[0]}, only the tuned {sides[1]}.")
    for name, values in base.items():
        if values.shape != tuned[name].shape:
            raise ValueError(
                f"{name!r} is {tuple(values.shape)} in the base and {tuple(tuned[name].shape)} in the tuned."
            )
        for which, model in (("base", base), ("tuned model", tuned)):
            if not model[name].is_floating_point():
                raise ValueError(f"{name!r} of the {which} is {model[name].dtype}: load it without quantisation.")
            if not torch.isfinite(model[name]).all():
                raise ValueError(f"{name!r} of the {which} holds NaN or infinity.")


def left_out_of(model: nn.Module, exclude: Sequence[str]) -> set[int]:
    """Ids of the parameters that ``exclude`` names; one that is tied to such a parameter is that parameter."""
    named = dict(model.named_parameters(remove_duplicate=False))
    found: set[int] = set()
    for what in exclude:
        own: list[nn.Parameter] = []
        if what == "embeddings":
            own += [p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()]
            own += [p for name, p in named.items() if fnmatchcase(name, EXCLUDED[0])]
        elif what == "head":
            head = getattr(model, "get_output_embeddings", lambda: None)()
            own += [] if head is None else list(head.parameters())
            own += [p for name, p in named.items() if any(fnmatchcase(name, f"{glob}.*") for glob in EXCLUDED[1:])]
        else:
            own += [p for name, p in named.items() if fnmatchcase(name, what)]
            if not own:
                raise ValueError(
                    f"exclude names {what!r}, which no parameter is called; e.g. {next(iter(named), '')!r}."
                )
        found |= {id(p) for p in own}
    return found


def frozen_view(model: nn.Module) -> nn.Module:
    """A copy that shares the weights' memory, and that may go to a device without the user's model going along."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): b.detach().clone() for b in model.buffers()}
    return copy.deepcopy(model, memo)


class Search(nn.Module):
    """An objective whose weights are scores; the model that it is given is the frozen base.

    Args:
        tuned: parameters of the tuned model that may be grafted, by name, in the base's order.
        start: scores at the start, float32, by the same names.
        count: how many entries are wanted.
        objective: the user's.
    """

    def __init__(
        self, tuned: Mapping[str, Tensor], start: Mapping[str, Tensor], count: int, objective: Objective
    ) -> None:
        super().__init__()
        self.names, self.count, self.unit = tuple(tuned), count, objective.unit
        self.objective = objective  # where it is a module, it goes to the device with this one
        self.tuned = nn.ParameterList([nn.Parameter(tuned[name], requires_grad=False) for name in self.names])
        self.scores = nn.ParameterList([nn.Parameter(start[name]) for name in self.names])

    @abstractmethod
    def optim(self, lr: float) -> AnyOptim:
        """How scores are moved."""

    @abstractmethod
    def marked(self) -> dict[str, Tensor]:
        """The mask as it now is, bool, by name."""

    @abstractmethod
    def grafted(self, base: Sequence[Tensor]) -> Iterator[Tensor]:
        """The parameters of the graft, from those of the base."""

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """The objective of the graft."""
        model.eval()  # the loop has put it into training mode; a graft is found as it will run
        own = dict(model.named_parameters())
        grafted = self.grafted([own[name] for name in self.names])
        weights = {f"model.{name}": values for name, values in zip(self.names, grafted, strict=True)}
        loss: Loss = functional_call(_Whole(model, self.objective), weights, (batch,))
        return loss


class _Whole(nn.Module):
    """Model and objective as one call, within which the model has grafted weights."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self._objective = (objective,)  # in a tuple: it may be a module, and is not a part of this one

    def forward(self, batch: Mapping[str, Tensor]) -> Loss:
        return self._objective[0](self.model, batch)


class TopSearch(Search):
    """Exactly ``count`` entries at every step, those of the highest scores."""

    def __init__(
        self, tuned: Mapping[str, Tensor], movement: Mapping[str, Tensor], count: int, objective: Objective
    ) -> None:
        marked = top_entries(movement, count)
        least = min(float(movement[name][chosen].min()) for name, chosen in marked.items() if chosen.any())
        least = max(least, torch.finfo(torch.float32).tiny)  # where more are asked for than moved
        start = {name: (m / least).log().clamp(-FURTHEST, FURTHEST) for name, m in movement.items()}
        super().__init__(tuned, start, count, objective)

    def optim(self, lr: float) -> AnyOptim:
        """Steps along the gradient, of a length that depends on neither its size nor the number of scores.

        Clipped far below its own, every gradient has the same length. Adam with an epsilon of 1 then moves in
        proportion to it: divided by their own sizes, the many small entries would outweigh the few that matter. Of unit
        length, entries are of the order of one over the root of their number, which the rate makes up for: ``lr`` is
        about what a score moves in a step.
        """
        size = sum(scores.numel() for scores in self.scores)
        rate = lr * math.sqrt(size) / LENGTH
        return OptimSpec(lr=rate, eps=1.0, weight_decay=0.0, warmup=0.0, schedule="cosine", final_lr=0.0, clip=LENGTH)

    def marked(self) -> dict[str, Tensor]:
        """The ``count`` highest scores."""
        return top_entries(dict(zip(self.names, self.scores, strict=True)), self.count)

    def grafted(self, base: Sequence[Tensor]) -> Iterator[Tensor]:
        """The tuned values where the mask is, the base's elsewhere, bit for bit."""
        for own, tuned, scores, chosen in zip(base, self.tuned, self.scores, self.marked().values(), strict=True):
            yield _StraightThrough.apply(scores, chosen, own, tuned)  # type: ignore[no-untyped-call]  # torch's


class _StraightThrough(torch.autograd.Function):
    """A choice between base and tuned; backwards, as if it were its score."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, chosen: Tensor, base: Tensor, tuned: Tensor) -> Tensor:  # Any: torch's
        ctx.save_for_backward(base, tuned)
        return torch.where(chosen, tuned.to(base.dtype), base)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:  # Any: torch's context
        base, tuned = ctx.saved_tensors
        return gradients[0].float() * (tuned.float() - base.float()), None, None, None


class FlipSearch(Search):
    """The published relaxation: scores flip entries of the movement mask. Nothing holds their number."""

    def __init__(
        self, tuned: Mapping[str, Tensor], movement: Mapping[str, Tensor], count: int, objective: Objective, seed: int
    ) -> None:
        generator = torch_generator(seed, "flip scores")
        start = {name: torch.rand(m.shape, generator=generator).to(m.device) - BIAS for name, m in movement.items()}
        super().__init__(tuned, start, count, objective)
        for number, chosen in enumerate(top_entries(movement, count).values()):
            self.register_buffer(f"kept_{number}", chosen, persistent=False)

    def optim(self, lr: float) -> AnyOptim:
        """Plain gradient steps, as published."""
        return SgdSpec(lr=lr, momentum=0.0, weight_decay=0.0, schedule="constant")

    def gammas(self) -> Iterator[Tensor]:
        """Share of the tuned value in each entry, float32 in (0, 1)."""
        for number, scores in enumerate(self.scores):
            flipped = torch.sigmoid(scores)
            yield torch.where(self.get_buffer(f"kept_{number}"), 1 - flipped, flipped)

    def marked(self) -> dict[str, Tensor]:
        """Rounded."""
        return {name: gamma >= 0.5 for name, gamma in zip(self.names, self.gammas(), strict=True)}

    def grafted(self, base: Sequence[Tensor]) -> Iterator[Tensor]:
        """Between base and tuned."""
        for own, tuned, gamma in zip(base, self.tuned, self.gammas(), strict=True):
            yield (gamma * tuned + (1 - gamma) * own).to(own.dtype)


class RepeatedBatches:
    """Batches that can be iterated over again and again, as a stream that is reached by number.

    Args:
        source: such as a ``DataLoader``; read from the start again when it ends.

    Attributes:
        fingerprint: says nothing of the data, which cannot be read ahead of time.
        rows: of the first batch; others may have fewer.
        tokens_per_row: of the first batch's longest tensor, 1 where it has rows only.

    Raises:
        ValueError: an iterator, which can be read only once, or nothing in it.
    """

    fingerprint = "batches that are iterated over"

    def __init__(self, source: Iterable[Mapping[str, Tensor]]) -> None:
        if iter(source) is source:
            raise ValueError("the batches can be read only once; give a list, a DataLoader, or a BatchStream.")
        self._source, self._next = source, 0
        self._running = iter(source)
        first = self.batch(0)
        self.rows = max(len(values) for values in first.values())
        self.tokens_per_row = max(values.shape[1] if values.ndim > 1 else 1 for values in first.values())

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Rows ``[start, stop)`` of batch ``step``; cheap for the same step again and for the one after it."""
        if step < self._next - 1:
            self._running, self._next = iter(self._source), 0
        while self._next <= step:
            self._current = self._following()
            self._next += 1
        return {name: values[start:stop] for name, values in self._current.items()}

    def _following(self) -> Mapping[str, Tensor]:
        found = next(self._running, None)
        if found is None:
            self._running = iter(self._source)
            found = next(self._running, None)
        if found is None:
            raise ValueError("there is no batch to read; give at least one.")
        return found
