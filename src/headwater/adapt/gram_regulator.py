"""The function that rewrites gradients of a prompt, and the steps through which it and the prompt are learned.

The equations are in ``gram``.

Source: Li et al., "Gradient-Regulated Meta-Prompt Learning for Generalizable Vision-Language Models", arXiv:2303.06571.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from headwater.adapt.gram_model import Prompts
from headwater.modalities.text.softprompt import SoftPrompt

__all__ = ["GradientRegulator", "Kind", "RegulatedOptimizer", "Regulators", "adapted_prompts", "meta_prompt_step"]

Kind = Literal["gated", "diagonal", "identity"]
Batch = TypeVar("Batch")
Regulators = Mapping[str, nn.Module]
"""A regulator for each prompt, by its name."""


class GradientRegulator(nn.Module):
    """A learned function of a prompt's gradient, elementwise; at the start it changes nothing, bit for bit.

    Args:
        tokens, dim: shape of the prompt.
        kind: ``gated`` multiplies by factors in (0, 2) that a small network reads off each token and the direction of
            its gradient; ``diagonal`` by a free factor for each number (Meta-SGD, arXiv:1707.09835); ``identity`` by 1,
            which makes the whole MAML (arXiv:1703.03400).
        hidden: width of the network; by default an eighth of ``dim``.
        generator: of the network's first layer.

    Shapes:
        ``(tokens, dim)`` and ``(tokens, dim)`` give ``(tokens, dim)``.
    """

    def __init__(
        self,
        tokens: int,
        dim: int,
        kind: Kind = "gated",
        hidden: int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        if kind == "diagonal":
            self.factors = nn.Parameter(torch.ones(tokens, dim))
        elif kind == "gated":
            hidden = hidden or max(1, dim // 8)
            bound = 1 / math.sqrt(2 * dim)
            self.inner = nn.Parameter(torch.empty(hidden, 2 * dim).uniform_(-bound, bound, generator=generator))
            self.inner_bias = nn.Parameter(torch.zeros(hidden))
            self.outer = nn.Parameter(torch.zeros(dim, hidden))
            self.outer_bias = nn.Parameter(torch.zeros(dim))

    def forward(self, prompt: Tensor, gradient: Tensor) -> Tensor:
        """Rewrite the gradient of a prompt."""
        if self.kind == "identity":
            return gradient
        if self.kind == "diagonal":
            return self.factors * gradient
        seen = torch.cat((prompt, nn.functional.normalize(gradient, dim=-1)), dim=-1)
        hidden = nn.functional.relu(nn.functional.linear(seen, self.inner, self.inner_bias))
        return 2 * torch.sigmoid(nn.functional.linear(hidden, self.outer, self.outer_bias)) * gradient


def adapted_prompts(
    prompts: Prompts,
    regulators: Regulators,
    loss_fn: Callable[[Prompts, Batch], Tensor],
    support: Batch,
    inner_lr: float,
    inner_steps: int = 1,
    second_order: bool = True,
) -> dict[str, Tensor]:
    """Prompts after regulated steps on one task, attached to the graph of where they started.

    Args:
        prompts: where they start, by name.
        regulators: for each of them.
        loss_fn: mean loss of a batch under given prompts.
        support: the batch to learn from.
        inner_lr: step size.
        inner_steps: 0 leaves the prompts as they are.
        second_order: differentiate through the gradients as well; without it they are constants.
    """
    theta = dict(prompts)
    for _ in range(inner_steps):
        gradients = torch.autograd.grad(loss_fn(theta, support), list(theta.values()), create_graph=second_order)
        theta = {
            name: value - inner_lr * regulators[name](value, gradient)
            for (name, value), gradient in zip(theta.items(), gradients, strict=True)
        }
    return theta


def meta_prompt_step(
    prompts: Prompts,
    regulators: Regulators,
    loss_fn: Callable[[Prompts, Batch], Tensor],
    support: Batch,
    query: Batch,
    inner_lr: float,
    inner_steps: int = 1,
    second_order: bool = True,
) -> Tensor:
    """The outer loss of one task: call ``backward`` on it, then step an optimizer over prompts and regulators.

    Second order needs attention that can be differentiated twice: see ``use_eager_attention``.

    Args:
        prompts: where they start, by name.
        regulators: for each of them.
        loss_fn: mean loss of a batch under given prompts.
        support: the batch to learn from.
        query: the batch that the adapted prompts are judged by.
        inner_lr: see ``adapted_prompts``, as for the rest.
        inner_steps: 0 leaves no support: the loss is that of the query.
        second_order: differentiate through the gradients as well.
    """
    adapted = adapted_prompts(prompts, regulators, loss_fn, support, inner_lr, inner_steps, second_order)
    return loss_fn(adapted, query)


class RegulatedOptimizer:
    """Any torch optimizer over prompts, whose gradients pass through regulators before each step.

    Args:
        optimizer: over the prompts' parameters; a schedule goes around this one.
        prompts: by name.
        regulators: for each of them; not trained here.

    Example:
        >>> prompt, regulator = SoftPrompt(torch.ones(1, 2)), GradientRegulator(1, 2, "diagonal")
        >>> optimizer = torch.optim.SGD(prompt.parameters(), lr=0.5)
        >>> prompt.weight.sum().backward()
        >>> RegulatedOptimizer(optimizer, {"text": prompt}, {"text": regulator}).step()
        >>> prompt.weight.tolist()
        [[0.5, 0.5]]
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, prompts: Mapping[str, SoftPrompt], regulators: Regulators
    ) -> None:
        self.optimizer, self.prompts, self.regulators = optimizer, prompts, regulators

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        """Rewrite each prompt's gradient, then let the optimizer step."""
        for name, prompt in self.prompts.items():
            if prompt.weight.grad is not None:
                prompt.weight.grad = self.regulators[name](prompt.weight, prompt.weight.grad)
        self.optimizer.step()
