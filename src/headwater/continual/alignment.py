"""A classifier re-balanced on samples of Gaussians that stand for classes whose data are gone.

    class c, arrived with task t_c:   mean mu_c,   covariance S_c = L_c L_c^T,   of its features when it arrived
    sample after task t:              x = (.9 + .1 (t_c + 1) / (t + 1)) mu_c + L_c z,   z ~ N(0, I)
    logits z = W x + b, in blocks z_1 .. z_t of the classes of each task:
    loss                              cross-entropy of z / (tau mean_s ||z_s||)

Both functions work on any classifier head and any features: they can follow whatever trained them.

Source: Zhang et al., "SLCA: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained Model",
arXiv:2303.05118, section 3.3. The decay of the means is that of the authors' code.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from headwater.core.moments import ClassMoments
from headwater.core.optim import SgdSpec, build_optimizer, lr_factor
from headwater.core.rng import torch_generator

__all__ = ["ClassGaussians", "align_classifier", "normalized_logits"]

logger = logging.getLogger(__name__)

Head = TypeVar("Head", bound=nn.Module)

_MOST_JITTER = 0.1


class ClassGaussians:
    """A Gaussian for each class, ready to be sampled from: covariances are factored once, when they are added.

    Memory for C classes of D features: C D^2 numbers at full rank, C D (rank + 1) below it.

    Args:
        rank: ``None`` keeps each covariance whole. A number keeps its so many largest directions and, beside them, the
            variance of every feature; 0 keeps the variances alone.
        jitter: added to every variance; doubled where a covariance is not positive definite, up to 0.1.

    Attributes:
        classes: labels, ``(C,)`` int64, in the order in which they were added.
        means: ``(C, D)`` float32.
        factors: ``(C, D, D)`` lower triangular at full rank, else ``(C, D, rank)``; float32.
        deviations: of what the factors leave out, independent for each feature: ``(C, D)`` float32, ``(C, 0)`` at full
            rank.

    Raises:
        ValueError: ``rank`` is negative, or ``jitter`` is not in (0, 0.1].

    Example:
        >>> features, labels = torch.randn(100, 3), torch.arange(2).repeat(50)
        >>> gaussians = ClassGaussians().add(ClassMoments(3, scatter="per_class").update(features, labels))
        >>> samples, drawn = gaussians.sample(5, torch.Generator().manual_seed(0))
        >>> samples.shape, drawn.tolist()
        (torch.Size([10, 3]), [0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    """

    def __init__(self, *, rank: int | None = None, jitter: float = 1e-4) -> None:
        if rank is not None and rank < 0:
            raise ValueError(f"rank must be at least 0, or None for whole covariances; got {rank}.")
        if not 0 < jitter <= _MOST_JITTER:
            raise ValueError(f"jitter must be in (0, {_MOST_JITTER}]; got {jitter}.")
        self.rank = rank
        self.jitter = jitter
        self.classes = torch.empty(0, dtype=torch.int64)
        self.means = torch.empty(0, 0)
        self.factors = torch.empty(0, 0, 0)
        self.deviations = torch.empty(0, 0)

    def __len__(self) -> int:
        return len(self.classes)

    def add(self, moments: ClassMoments) -> Self:
        """Add the classes of ``moments``; one that was there before is replaced.

        A class with one sample, which has no covariance, takes the mean covariance of the others in ``moments``.

        Args:
            moments: with scatter ``"per_class"``, or ``"diag"`` where the rank is 0.

        Raises:
            ValueError: the scatter is of another sort, the number of features another, no class has two samples, or a
                covariance (named by its class) is not positive definite.
        """
        wanted = "diag" if self.rank == 0 else "per_class"
        if moments.kind != wanted:
            raise ValueError(f"rank {self.rank} needs moments with scatter={wanted!r}; got {moments.kind!r}.")
        if len(self) and moments.n_features != self.means.shape[1]:
            raise ValueError(f"these Gaussians are of {self.means.shape[1]} features; got {moments.n_features}.")
        classes, counts, means, scatter = (
            torch.as_tensor(part) for part in (moments.classes, moments.counts, moments.means, moments.scatter)
        )
        freedom = (counts - 1).tolist()
        if not any(freedom):
            raise ValueError(
                f"none of the {len(classes)} classes has two samples, so there is no covariance to take. Give more "
                "samples of a class, or leave alignment out (epochs: 0)."
            )
        alone = classes[counts < 2].tolist()
        if alone:
            logger.warning("classes %s have one sample each and take the mean covariance of the others.", alone)
        pooled = scatter.sum(0) / sum(freedom)
        factors, deviations = [], []
        for label, own, free in zip(classes.tolist(), scatter, freedom, strict=True):
            factor, deviation = self._factored(own / free if free else pooled, label)
            factors.append(factor.float())
            deviations.append(deviation.float())
        self._put(classes, means.float(), torch.stack(factors), torch.stack(deviations))
        return self

    def _factored(self, covariance: Tensor, label: int) -> tuple[Tensor, Tensor]:
        """Factor ``(D, rank)`` and deviations of the rest."""
        if self.rank == 0:  # variances alone
            return covariance.new_empty(len(covariance), 0), (covariance + self.jitter).sqrt()
        if self.rank is None:
            jitter, identity = self.jitter, torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
            while jitter <= _MOST_JITTER:
                factor, failed = torch.linalg.cholesky_ex(covariance + jitter * identity)
                if not failed:
                    return factor, covariance.new_empty(0)
                jitter *= 2
            raise ValueError(
                f"the covariance of class {label} is not positive definite, even with {_MOST_JITTER} added to each "
                "variance. Are its features finite and of moderate size? A rank below the number of features needs no "
                "such thing."
            )
        values, vectors = torch.linalg.eigh(covariance)
        factor = vectors[:, -self.rank :] * values[-self.rank :].clamp_min(0).sqrt()
        rest = (covariance.diagonal() - factor.square().sum(1)).clamp_min(0)
        return factor, (rest + self.jitter).sqrt()

    def _put(self, *found: Tensor) -> None:
        classes, *new = (part.to(self.means.device) for part in found)
        kept = ~torch.isin(self.classes, classes)
        if kept.any():
            held = (self.means[kept], self.factors[kept], self.deviations[kept])
            new = [torch.cat(pair) for pair in zip(held, new, strict=True)]
        self.classes = torch.cat((self.classes[kept], classes))
        self.means, self.factors, self.deviations = new

    def sample(
        self, per_class: int, generator: torch.Generator, *, mean_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw from every class.

        Args:
            per_class: samples of each class.
            generator: on the device of the Gaussians.
            mean_scale: multiplies the means, ``(C,)``; 1 by default.

        Returns:
            ``(C * per_class, D)`` float32, class after class, and their labels ``(C * per_class,)``.
        """
        means = self.means if mean_scale is None else self.means * mean_scale.to(self.means)[:, None]
        shape = (len(self), per_class, means.shape[1])
        draws = means[:, None].expand(shape)
        like = {"generator": generator, "device": means.device}
        if self.factors.shape[2]:
            noise = torch.randn(*shape[:2], self.factors.shape[2], **like)  # type: ignore[call-overload]  # the mapping
            draws = torch.baddbmm(draws, noise, self.factors.mT)
        if self.deviations.shape[1]:
            draws = draws + self.deviations[:, None] * torch.randn(shape, **like)  # type: ignore[call-overload]  # same
        return draws.flatten(0, 1), self.classes.repeat_interleave(per_class)

    def to(self, device: torch.device | str) -> Self:
        """Move to ``device``, in place."""
        for name, tensor in self.state().items():
            setattr(self, name, tensor.to(device))
        return self

    def state(self) -> dict[str, Tensor]:
        """All tensors, by the names of the attributes."""
        return {name: getattr(self, name) for name in ("classes", "means", "factors", "deviations")}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what ``state`` gave."""
        for name in self.state():
            setattr(self, name, state[name])


def normalized_logits(logits: Tensor, task_of_class: Tensor, temperature: float) -> Tensor:
    """Logits over their mean length, where each task's classes make one vector; what scale they had is lost.

    Args:
        logits: ``(batch, classes)``.
        task_of_class: the task of each class, ``(classes,)``, integers.
        temperature: divides the result; > 0.

    Returns:
        ``(batch, classes)``; zeros stay zeros.
    """
    tasks, number = torch.unique(task_of_class, return_inverse=True)
    member = nn.functional.one_hot(number, len(tasks)).to(logits)
    # Clamped, because the root's gradient at 0 is infinite; 1e-7 is the length that the authors add.
    lengths = (logits.square() @ member).clamp_min(1e-14).sqrt()
    return logits / (temperature * lengths.mean(1, keepdim=True))


def align_classifier(
    head: Head,
    gaussians: ClassGaussians,
    task_of_class: Tensor | Sequence[int],
    *,
    epochs: int = 5,
    per_class: int = 256,
    batch_size: int = 256,
    temperature: float | None = 0.1,
    mean_decay: bool = True,
    lr: float = 0.01,
    weight_decay: float = 5e-4,
    seed: int = 0,
    memory_bytes: int = 1 << 30,
) -> Head:
    """Train a copy of a classifier on samples of all its classes, in equal numbers.

    With weights that are normalised in the head's own ``forward``, such as a cosine classifier, give
    ``temperature=None``: the logits have a scale of their own, which normalising them again would take away.

    Args:
        head: from features ``(batch, D)`` to logits ``(batch, C)``, column i for class i; left as it is.
        gaussians: of the classes 0 .. C - 1, on the head's device.
        task_of_class: the task with which each class arrived, ``(C,)``, counted from 0.
        epochs: rounds of ``per_class`` samples of every class.
        per_class: samples of each class in an epoch.
        batch_size: samples in a step.
        temperature: of normalised logits, see ``normalized_logits``; ``None`` takes the logits as they are.
        mean_decay: scale means as in the module's equation: the older the class, the nearer to the origin.
        lr: of SGD with momentum .9 in the first epoch; it falls along a cosine from one epoch to the next.
        weight_decay: L2 penalty of matrices.
        seed: of samples and order.
        memory_bytes: of samples that are held at a time; an epoch that needs more is drawn in several parts.

    Returns:
        The copy, in evaluation mode, without gradient.

    Raises:
        ValueError: the head's classes, those of ``gaussians`` and those of ``task_of_class`` are not the same.
    """
    aligned, optim = copy.deepcopy(head).requires_grad_(True).train(), SgdSpec(lr=lr, weight_decay=weight_decay)
    device = gaussians.means.device
    task_of_class = torch.as_tensor(task_of_class, device=device)
    with torch.no_grad():
        outputs = aligned(gaussians.means).shape[1]
    if sorted(gaussians.classes.tolist()) != list(range(outputs)) or len(task_of_class) != outputs:
        raise ValueError(
            f"the head has {outputs} classes, the Gaussians {len(gaussians)} and task_of_class {len(task_of_class)}; "
            "all three must be of the same ones, 0, 1, ..."
        )
    arrived = task_of_class[gaussians.classes]
    scale = 0.9 + 0.1 * (arrived + 1) / (task_of_class.max() + 1) if mean_decay else None
    optimizer = build_optimizer(aligned, optim)
    generator = torch_generator(seed, "alignment", device=device)
    sample_bytes = outputs * gaussians.means.shape[1] * gaussians.means.element_size()
    at_once = max(1, min(per_class, memory_bytes // sample_bytes))
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * lr_factor(optim, epoch / epochs)
        for begin in range(0, per_class, at_once):
            features, labels = gaussians.sample(min(at_once, per_class - begin), generator, mean_scale=scale)
            order = torch.randperm(len(labels), generator=generator, device=device)
            for first in range(0, len(order), batch_size):
                rows = order[first : first + batch_size]
                logits = aligned(features[rows])
                if temperature is not None:
                    logits = normalized_logits(logits, task_of_class, temperature)
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(logits, labels[rows])
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                optimizer.step()
    return aligned.requires_grad_(False).eval()
