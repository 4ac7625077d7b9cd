"""Adversarial perturbations of a decoder's states, and the contrast that they sharpen.

H are the states ``(T, d)`` that enter the output embedding, M the encoder's ``(S, d)``, xi a projection. With sim the
cosine over tau, and g, f the gradients of each time step::

    H~ = H  - eps g / |g|     g = grad_H  log p(y | H)                              less likely: a negative
    H' = H  + eps g / |g|     g = grad_H  sum_i -log softmax_j sim(z_x_i, z_y_j)    far from its source
    H^ = H' - eps f / |f|     f = grad_H' KL(p(. | H) || p(. | H'))                 as likely again: a positive

All is computed on detached states through the output embedding alone, never through the model, by
``torch.autograd.grad``: no parameter receives a gradient.

Source: Lee, Lee and Hwang, "Contrastive Learning with Adversarial Perturbations for Conditional Text Generation",
arXiv:2012.07280, section 3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from headwater.modalities.text.objectives import IGNORED

__all__ = ["contrast_loss", "cosines", "masked_mean", "perturb_negative", "perturb_positive", "pull_back", "push_away"]

Head = Callable[[Tensor], Tensor]
"""From states ``(n, d)`` to logits ``(n, vocabulary)``."""

_TOKENS = 4096  # whose logits are held at once


def masked_mean(states: Tensor, real: Tensor) -> Tensor:
    """Mean over the time steps that are real.

    Args:
        states: ``(batch, time, dim)``.
        real: ``(batch, time)``, true where there is a token.

    Returns:
        ``(batch, dim)``; zeros for a row without a real token.
    """
    weights = real.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1).clamp_min(1)


def cosines(source: Tensor, target: Tensor) -> Tensor:
    """Cosine of every source with every target, ``(sources, targets)``; 0 for a vector of zeros.

    Args:
        source: ``(sources, dim)``.
        target: ``(targets, dim)``.
    """
    return F.normalize(source, dim=-1) @ F.normalize(target, dim=-1).T


def contrast_loss(
    similarity: Tensor, tau: float, *, negative: Tensor | None = None, excluded: Tensor | None = None
) -> Tensor:
    """Cross-entropy of picking each source's own target among those of the batch, in nats, ``(batch,)``.

    Args:
        similarity: of source i and target j, ``(batch, batch)``.
        tau: divides similarities; > 0.
        negative: similarity of each source and one more wrong target of its own, ``(batch,)``.
        excluded: ``(batch, batch)``, true for targets that are no wrong ones; the diagonal must be false.
    """
    logits = similarity / tau
    if excluded is not None:
        logits = logits.masked_fill(excluded, -torch.inf)
    if negative is not None:
        logits = torch.cat((logits, negative.unsqueeze(1) / tau), dim=1)
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device), reduction="none")


def perturb_negative(hidden: Tensor, labels: Tensor, head: Head, eps: float) -> Tensor:
    """Move each real time step by ``eps`` to where its token is less likely.

    Args:
        hidden: H, ``(batch, time, dim)``.
        labels: ``(batch, time)``; -100 marks padding, which is not moved.
        head: the output embedding.
        eps: length of the step; 0 leaves H as it is.

    Returns:
        H~, detached, as ``hidden``.
    """
    targets = labels.flatten()

    def nats(states: Tensor, part: slice) -> Tensor:
        return F.cross_entropy(head(states), targets[part], ignore_index=IGNORED, reduction="sum")

    return hidden.detach() + eps * _steps(_gradients(hidden, nats), labels != IGNORED)


def push_away(
    hidden: Tensor,
    real: Tensor,
    source: Tensor,
    project: Head,
    eps: float,
    *,
    tau: float = 0.1,
    excluded: Tensor | None = None,
) -> Tensor:
    """Move each real time step by ``eps`` to where the batch's contrast is worse: away from its source.

    Args:
        hidden: H, ``(batch, time, dim)``.
        real: ``(batch, time)``, false at padding, which is not moved.
        source: z_x, ``(batch, projected)``.
        project: xi, from states to ``(batch, time, projected)``.
        eps: length of the step.
        tau: see ``contrast_loss``.
        excluded: see ``contrast_loss``.

    Returns:
        H', detached. In a batch of one there is no contrast, and H' is H.
    """
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        similarity = cosines(source.detach(), masked_mean(project(_inner(leaf)), real))
        (gradient,) = torch.autograd.grad(contrast_loss(similarity, tau, excluded=excluded).sum(), leaf)
    return leaf.detach() + eps * _steps(gradient, real)


def pull_back(away: Tensor, hidden: Tensor, real: Tensor, head: Head, eps: float) -> Tensor:
    """Move each real time step by ``eps`` to where it predicts more like the state that it came from.

    The direction is that of steepest descent, the length fixed: where predictions had hardly changed, it goes too far.

    Args:
        away: H', ``(batch, time, dim)``.
        hidden: H, as ``away``. Where both are equal nothing is moved: the gradient there is rounding.
        real: ``(batch, time)``, false at padding.
        head: the output embedding.
        eps: length of the step.

    Returns:
        H^, detached.
    """
    before = hidden.detach().flatten(0, 1)

    def divergence(states: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            wanted = head(before[part]).log_softmax(-1)
        return F.kl_div(head(states).log_softmax(-1), wanted, log_target=True, reduction="sum")

    moved = real & (away != hidden).any(-1)
    return away.detach() - eps * _steps(_gradients(away, divergence), moved)


def perturb_positive(
    hidden: Tensor,
    real: Tensor,
    source: Tensor,
    project: Head,
    head: Head,
    eps: float,
    *,
    tau: float = 0.1,
    excluded: Tensor | None = None,
) -> Tensor:
    """``push_away``, then ``pull_back``: H^, detached; arguments as theirs."""
    away = push_away(hidden, real, source, project, eps, tau=tau, excluded=excluded)
    return pull_back(away, hidden, real, head, eps)


def _gradients(hidden: Tensor, loss: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Gradient of a sum over time steps, as ``hidden``: of some at a time, since logits are the largest tensors."""
    flat = hidden.detach().flatten(0, 1)
    found: list[Tensor] = []
    with torch.enable_grad():
        for begin in range(0, max(1, len(flat)), _TOKENS):
            part = slice(begin, begin + _TOKENS)
            leaf = flat[part].clone().requires_grad_()
            found += torch.autograd.grad(loss(_inner(leaf), part), leaf)
    return torch.cat(found).view_as(hidden)


def _inner(leaf: Tensor) -> Tensor:
    """The same, not a leaf: hooks on modules, as torch's FLOP counter sets them, fail on one in ``autograd.grad``."""
    return leaf.view_as(leaf)


def _steps(gradient: Tensor, real: Tensor) -> Tensor:
    """Unit vectors along the gradient of each time step; zeros where it is 0 or nothing is real."""
    largest = gradient.abs().amax(-1, keepdim=True)
    # Divided by its largest entry first, or squares of small gradients vanish.
    scaled = gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
    return F.normalize(scaled, dim=-1) * real.unsqueeze(-1)
