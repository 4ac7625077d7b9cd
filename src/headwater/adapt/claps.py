"""CLAPS: a sequence-to-sequence model also learns to tell its target from one that is slightly, but fatally, moved.

M are the encoder's states, H the decoder's as they enter the output embedding, H~ and H^ their perturbations
(``adapt.perturbations``: a negative close by, a positive far away), xi a linear map and a ReLU::

    z_x = mean_s xi(M_s)      z_y, z~, z^ = mean_t xi(H_t), xi(H~_t), xi(H^_t)      sim = cos / tau
    L_1 = - log ( exp sim(z_x, z_y) / [ sum_j exp sim(z_x, z_y_j) + exp sim(z_x, z~) ] )
    L_2 = L_1 with z^ in the place of the example's own z_y
    L   = L_NLL + alpha (L_1 + L_2) / 2

Gradients reach H and M through z_x and z_y; through z~ and z^ they reach xi only.

Source: Lee, Lee and Hwang, "Contrastive Learning with Adversarial Perturbations for Conditional Text Generation",
arXiv:2012.07280.
Differs: L_2 is divided by tau as well, and equal targets in a batch are not held against each other;
``official_compat`` does in both as the authors' code. Perturbing leaves no gradients on parameters, where that code's
inner backward passes do. AdamW for Adafactor. Targets to contrast with are those of the micro-batch and the process:
the likelihood accumulates exactly, the contrast is one of what is seen together. Warm starting by likelihood is a
share of the budget. What the paper's tables used of it was not at hand to check.
Needs: an encoder-decoder language model whose output embedding reads states as wide as the encoder's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from headwater.adapt.perturbations import (
    contrast_loss,
    cosines,
    masked_mean,
    perturb_negative,
    perturb_positive,
    pull_back,
    push_away,
)
from headwater.adapt.text_to_text import TextTask, TextToText, Written
from headwater.core.cache import atomic_path
from headwater.core.fit import Phase, Trained
from headwater.core.objective import Loss
from headwater.core.rng import derive_seed
from headwater.modalities.models import ModelError
from headwater.modalities.text.objectives import IGNORED, TokenObjective
from headwater.modalities.text.pairs import PairModel, Pairs
from headwater.modalities.text.score import scoring

__all__ = ["CLAPSObjective", "Claps", "Seen", "examine", "output_head", "watched"]

logger = logging.getLogger(__name__)
PROJECTION_FILE = "claps_projection.safetensors"
EXAMINED_PAIRS = 256
"""Training pairs on which the perturbations are measured at the end."""


@dataclass
class Seen:
    """What one forward pass let through.

    Attributes:
        hidden: H, ``(batch, target time, dim)``.
        encoded: M, ``(batch, source time, dim)``.
        logits: ``(batch, target time, vocabulary)``.
    """

    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    encoded: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def output_head(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The output embedding of a Hugging Face model, BART's bias included: ``(..., dim)`` to float32 logits."""
    inner: Any = getattr(model, "module", model)  # module: under DDP; Any: declared on each model, not on nn.Module
    embedding, bias = inner.get_output_embeddings(), getattr(inner, "final_logits_bias", None)

    def head(states: Tensor) -> Tensor:
        logits: Tensor = embedding(states.to(embedding.weight.dtype))
        return (logits if bias is None else logits + bias.to(logits.dtype).squeeze(0)).float()

    return head


@contextmanager
def watched(model: nn.Module) -> Iterator[Seen]:
    """Keep what the model's next pass computes: whatever the family, H is what its output embedding is given."""
    inner: Any = getattr(model, "module", model)
    seen = Seen()

    def entering(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.hidden = args[0]

    def leaving(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        seen.encoded, seen.logits = output.encoder_last_hidden_state, output.logits

    hooks = (inner.get_output_embeddings().register_forward_pre_hook(entering), model.register_forward_hook(leaving))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class CLAPSObjective(nn.Module):
    """Likelihood and contrast; an ``Objective`` that owns xi, and not the model.

    Totals are sums over target tokens: of the likelihood, and of the micro-batch's mean contrast once for each token.
    On a whole batch, ``total / count`` is the paper's L.

    Args:
        model: any ``AutoModelForSeq2SeqLM``, in PEFT as well; read for its width, not kept.
        tau: divides cosines.
        eps_pos: length of both steps of the positive.
        eps_neg: length of the negative's step. H has length near 1 in a T5 with tied embeddings and about the root of
            its width in others, such as BART, where larger steps may be wanted.
        alpha: weight of the contrast.
        projection_dim: width of z; ``None`` for the model's.
        official_compat: see the module.
        seed: of xi.

    Raises:
        ModelError: the model has no encoder, or no output embedding.
        ValueError: tau is not positive, or a step or weight is negative.
    """

    unit = "nats/token"

    def __init__(
        self,
        model: nn.Module,
        tau: float = 0.1,
        eps_pos: float = 3.0,
        eps_neg: float = 1.0,
        alpha: float = 1.0,
        projection_dim: int | None = None,
        official_compat: bool = False,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if tau <= 0 or min(eps_pos, eps_neg, alpha) < 0:
            raise ValueError(
                f"tau must be above 0, eps_pos, eps_neg and alpha at least 0; got {tau}, {eps_pos}, {eps_neg}, {alpha}."
            )
        inner: Any = getattr(model, "module", model)
        if not inner.config.is_encoder_decoder or inner.get_output_embeddings() is None:
            raise ModelError(
                f"{type(inner).__name__} does not write targets from an encoder's states; give an "
                "AutoModelForSeq2SeqLM, such as T5ForConditionalGeneration or BartForConditionalGeneration."
            )
        width = inner.get_output_embeddings().weight.shape[1]
        self.tau, self.eps_pos, self.eps_neg, self.alpha = tau, eps_pos, eps_neg, alpha
        self.official_compat = official_compat
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.projection = nn.Linear(width, projection_dim or width)

    def project(self, states: Tensor) -> Tensor:
        """Apply xi: ``(..., dim)`` to ``(..., projected)``."""
        projected: Tensor = self.projection(states)
        return projected.relu()

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """Batch: ``input_ids``, ``attention_mask`` ``(batch, source time)``, ``labels`` ``(batch, target time)``.

        Raises:
            ValueError: a target without a token, or states of encoder and decoder that differ in width.
        """
        with watched(model) as seen:
            nll = TokenObjective()(model, batch)
        # Small gradients do not survive half precision.
        with torch.autocast(batch["labels"].device.type, enabled=False):
            loss, metrics = self.contrast(model, seen, batch)
        loss, count = loss.mean(), torch.as_tensor(nll.count)
        metrics |= {"nll": nll.total.detach() / count, "contrast": loss.detach()}
        return Loss(nll.total + self.alpha * count * loss, count, metrics)

    def contrast(self, model: nn.Module, seen: Seen, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(L_1 + L_2) / 2 of each example, ``(batch,)``, and mean cosines of a source and its own three targets."""
        hidden, source, target, real, excluded = self.pooled(seen, batch)
        head, compat = output_head(model), self.official_compat
        negative = perturb_negative(hidden, batch["labels"], head, self.eps_neg)
        positive = perturb_positive(
            hidden, real, source, self.project, head, self.eps_pos, tau=self.tau, excluded=excluded
        )
        similarity = cosines(source, target)
        wrong, right = (self.own_cosine(source, states, real) for states in (negative, positive))
        diagonal = torch.eye(len(right), dtype=torch.bool, device=right.device)
        swapped = torch.where(diagonal, right.unsqueeze(1), similarity)
        first = contrast_loss(similarity, self.tau, negative=wrong, excluded=excluded)
        second = contrast_loss(swapped, 1.0 if compat else self.tau, negative=wrong, excluded=excluded)
        cosine = {"target": similarity.diagonal(), "negative": wrong, "positive": right}
        return (first + second) / 2, {f"sim/{name}": value.detach().mean() for name, value in cosine.items()}

    def pooled(self, seen: Seen, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """H in float32, z_x, z_y, where targets have tokens, and which pairs of examples have the same target."""
        hidden, encoded, labels = seen.hidden.float(), seen.encoded.float(), batch["labels"]
        if encoded.shape[-1] != hidden.shape[-1]:
            raise ValueError(
                f"one projection reads both states, but the encoder's have {encoded.shape[-1]} features and the "
                f"decoder's {hidden.shape[-1]}; give a model of one width."
            )
        real = labels != IGNORED
        if empty := (~real.any(1)).nonzero().flatten().tolist():
            raise ValueError(f"row {empty[0]} of the batch has a target without a token; leave it out.")
        source = masked_mean(self.project(encoded), batch["attention_mask"] != 0)
        excluded = None if self.official_compat else _equal_targets(labels)
        return hidden, source, masked_mean(self.project(hidden), real), real, excluded

    def own_cosine(self, source: Tensor, states: Tensor, real: Tensor) -> Tensor:
        """Cosine of each source with its own target's states, ``(batch,)``."""
        return torch.cosine_similarity(source, masked_mean(self.project(states), real), dim=-1)


def _equal_targets(labels: Tensor) -> Tensor:
    """True for two examples with the same labels, ``(batch, batch)``; false on the diagonal."""
    equal = (labels.unsqueeze(1) == labels.unsqueeze(0)).all(-1)
    return equal & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)


@torch.no_grad()
def examine(objective: CLAPSObjective, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the perturbations do to each example of a batch, ``(batch,)`` each; put the model in ``eval()`` first.

    Returns:
        ``nll`` and ``nll/negative``: nats per token of the target from H and H~; ``kl/away`` and ``kl/positive``: nats
        per token between predictions from H and from H' and H^; ``sim/target``, ``sim/negative``, ``sim/positive``:
        cosines with the source.
    """
    with watched(model) as seen:
        TokenObjective()(model, batch)
    labels, head = batch["labels"], output_head(model)
    hidden, source, _, real, excluded = objective.pooled(seen, batch)
    negative = perturb_negative(hidden, labels, head, objective.eps_neg)
    away = push_away(hidden, real, source, objective.project, objective.eps_pos, tau=objective.tau, excluded=excluded)
    positive = pull_back(away, hidden, real, head, objective.eps_pos)
    log_p = {
        name: head(states).log_softmax(-1)
        for name, states in (("nll", hidden), ("nll/negative", negative), ("kl/away", away), ("kl/positive", positive))
    }
    said, found = log_p["nll"], {}
    for name, value in log_p.items():
        nats = -value.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        of_tokens = nats if name.startswith("nll") else (said.exp() * (said - value)).sum(-1)
        found[name] = masked_mean(of_tokens.unsqueeze(-1), real).squeeze(-1)
    for name, states in (("target", hidden), ("negative", negative), ("positive", positive)):
        found[f"sim/{name}"] = objective.own_cosine(source, states, real)
    return found


class Claps(TextToText):
    """Fine-tuning of an encoder-decoder by likelihood and by contrast with perturbed targets."""

    id: ClassVar[str] = "claps"

    num_beams: int = Field(default=4, gt=0, description="beams when answering; 1 is greedy")
    tau: float = Field(default=0.1, gt=0, description="divides cosines in the contrast")
    eps_pos: float = Field(default=3.0, ge=0, description="length of the positive's steps, in units of the states")
    eps_neg: float = Field(  # 1 for question generation, 3 for translation
        default=1.0, ge=0, description="length of the negative's step, in units of the states"
    )
    alpha: float = Field(default=1.0, ge=0, description="weight of the contrast beside the likelihood")
    projection_dim: int | None = Field(
        default=None, gt=0, description="width in which states are compared; null for the model's"
    )
    official_compat: bool = Field(
        default=False, description="as the authors' code: no tau in the second contrast, equal targets are negatives"
    )
    warm_start: float = Field(
        default=0.0, ge=0, lt=1, description="share of the budget for training by likelihood alone, before"
    )

    @model_validator(mode="after")
    def _states_in_reach(self) -> Self:
        if self.fit.compile:
            raise ValueError("the contrast reads states from inside the model; leave fit.compile off.")
        return self

    def phases(self, task: TextTask) -> Generator[Phase, Trained, Written]:
        """Likelihood alone for a while, then both."""
        from safetensors.torch import save_file

        model = task.open()
        objective = CLAPSObjective(
            model.model,
            self.tau,
            self.eps_pos,
            self.eps_neg,
            self.alpha,
            self.projection_dim,
            self.official_compat,
            seed=derive_seed(self.seed, "projection"),
        )
        _check_head(model, task.train)
        stream = model.stream(task.train, rows=self.batch_size, seed=self.seed)
        if min(stream.rows, self.fit.micro_rows or stream.rows) == 1:
            logger.warning("one pair at a time has no other targets to contrast with; raise batch_size or micro_rows.")
        if self.warm_start > 0:
            yield task.phase("likelihood", model, share=self.warm_start)
        yield Phase("contrast", model.model, stream, objective, 1 - self.warm_start)
        if task.run.is_main_process:
            with atomic_path(task.run.path(PROJECTION_FILE)) as path:
                save_file({name: weight.cpu() for name, weight in objective.state_dict().items()}, path)
        with task.meter.timed():
            metrics = _examined(objective, model, task.train, self.batch_size)
        beside = f"`{PROJECTION_FILE}`, weights of the `CLAPSObjective` to go on training with"
        return Written(model, files=(beside,), metrics=metrics)


def _examined(objective: CLAPSObjective, model: PairModel, pairs: Pairs, rows: int) -> dict[str, float]:
    """Means of ``examine`` over some training pairs."""
    some = Pairs(pairs.sources[:EXAMINED_PAIRS], pairs.targets[:EXAMINED_PAIRS])
    stream = model.stream(some, rows=rows, seed=0)
    device = next(model.model.parameters()).device
    objective.to(device)
    model.model.eval()
    parts = [
        examine(objective, model.model, {k: v.to(device) for k, v in stream.batch(step).items()})
        for step in range(len(some) // stream.rows)
    ]
    return {f"claps/{name}": float(torch.cat([part[name] for part in parts]).mean()) for name in parts[0]}


def _check_head(model: PairModel, pairs: Pairs) -> None:
    """Refuse a model that does more to its logits than apply the output embedding."""
    batch = model.stream(Pairs(pairs.sources[:1], pairs.targets[:1]), rows=1, seed=0).batch(0)
    with scoring(model.model) as device, watched(model.model) as seen:
        TokenObjective()(model.model, {name: tensor.to(device) for name, tensor in batch.items()})
        again = output_head(model.model)(seen.hidden)
    tolerance = 1e-4 if seen.hidden.dtype == torch.float32 else 3e-2
    if not torch.allclose(again, seen.logits.float(), rtol=tolerance, atol=tolerance):
        raise ModelError(
            f"{type(model.model).__name__} changes its logits after the output embedding (by up to "
            f"{float((again - seen.logits).abs().max()):.3g}), which perturbations would not see; give another model."
        )
