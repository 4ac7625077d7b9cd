"""Weak-to-strong generalisation: a strong pretrained model learns from the labels of a weaker one.

    1. a weak model is fine-tuned on true labels, of one half of the data
    2. what it believes of the other half, f_w, becomes that half's labels
    3. the strong model, f, is fine-tuned on them:
           L = (1 - alpha) CE(f, f_w) + alpha CE(f, fhat),      fhat = one-hot of f hardened at a threshold t
       with t such that the hardened answers of a batch are as balanced as its weak labels, and alpha rising from 0 to
       alpha_max over the first part of training: as the student grows sure, it may overrule its supervisor
    4. a ceiling is fine-tuned on the true labels of the other half, and
           PGR = (student - weak) / (ceiling - weak)

Cross-entropy is linear in its target, so the two terms are one cross-entropy against (1 - alpha) f_w + alpha fhat. No
gradient flows through fhat.

Source: Burns et al., "Weak-to-Strong Generalization: Eliciting Strong Capabilities With Weak Supervision",
arXiv:2312.09390; product loss and warmup="official" as in the authors' released code.
Differs: the code's ramp jumps to its end at warmup_frac; ours is the paper's linear one. More than two classes are our
    extension: see `ConfidenceLoss`.
Needs: labelled texts, a weak and a strong pretrained model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from headwater.align.base import Aligned, ClassAlignment, ClassTask
from headwater.align.classes import ClassModel, class_probabilities
from headwater.align.pgr import Agreement, UndefinedGap, agreement, pgr, pgr_ci
from headwater.align.soft_labels import SoftCrossEntropy, TargetLoss, check_distributions, soft_cross_entropy
from headwater.core.budget import Budget
from headwater.core.fit import Phase
from headwater.core.objective import Objective
from headwater.core.recipe import ModelRef, Spec
from headwater.core.rng import derive_seed
from headwater.modalities.models import ModelError, head_of, load_model, load_tokenizer
from headwater.modalities.text.docs import Document
from headwater.modalities.text.objectives import CausalObjective, TokenObjective
from headwater.modalities.text.packing import MaskedStream, PackedStream, tokenize_documents

if TYPE_CHECKING:
    import datasets

__all__ = [
    "Agreement",
    "ConfidenceLoss",
    "ProductLoss",
    "UndefinedGap",
    "WeakToStrong",
    "agreement",
    "bootstrap",
    "hard_labels",
    "pgr",
    "pgr_ci",
    "weak_labels",
]

Balance = Literal["quantile", "fixed", "sinkhorn"]
SWEEPS = 10
FEW_ROWS = 16


def hardening_boundary(logits: Tensor, weak_probs: Tensor, balance: Balance) -> Tensor:
    """Where answers are hardened, decided by a whole batch.

    Args:
        logits: of the student, ``(batch, classes)``.
        weak_probs: same shape.
        balance: see ``ConfidenceLoss``.

    Returns:
        With two classes the threshold t, a scalar: class 0 where its probability is t or more. With more, offsets b
        ``(classes,)``: the class where log f + b is largest. Float32, without gradient.
    """
    logits, share = logits.detach().float(), weak_probs.detach().float().mean(0)
    classes = logits.shape[1]
    if classes == 2:
        likely = logits.softmax(1)[:, 0]
        # Rounding may leave a mean of probabilities a little outside [0, 1].
        return likely.new_tensor(0.5) if balance == "fixed" else torch.quantile(likely, share[1].clamp(0, 1))
    offsets = logits.new_zeros(classes)
    if balance == "sinkhorn":
        scores = logits.log_softmax(1)
        for _ in range(SWEEPS):
            for c in range(classes):
                rivals = (scores + offsets).index_fill(1, torch.tensor([c], device=scores.device), -torch.inf)
                # The row at this quantile needs so much to be given to class c.
                offsets[c] = torch.quantile(rivals.amax(1) - scores[:, c], share[c].clamp(0, 1))
    return offsets


def harden(logits: Tensor, boundary: Tensor) -> Tensor:
    """One-hot answers at a boundary of ``hardening_boundary``, ``(batch, classes)`` float32, without gradient."""
    logits = logits.detach().float()
    if logits.shape[1] == 2:
        answers = (logits.softmax(1)[:, 0] < boundary).long()
    else:
        answers = (logits.log_softmax(1) + boundary).argmax(1)
    return nn.functional.one_hot(answers, logits.shape[1]).float()


@dataclass(frozen=True)
class ConfidenceLoss:
    """The auxiliary confidence loss: weak labels, mixed with the student's own hardened answers.

    The paper and its code know two classes. With more, each class is given an offset such that it is the answer as
    often as the weak labels say: ten sweeps over the classes, each of which sets one offset exactly, the limit of
    Sinkhorn's iteration at temperature 0. With two classes that is the paper's rule.

    Args:
        alpha_max: final weight of the student's own answers, in [0, 1]. 0.75 for the paper's largest students, 0.5 for
            the others.
        warmup_frac: fraction of training over which alpha rises, in [0, 1].
        balance: ``quantile``: the share of class 0 among hardened answers is the weak labels' (two classes).
            ``sinkhorn``: so for any number of classes. ``fixed``: the likelier class, whatever the balance.
        warmup: ``linear``: alpha_max * step_frac / warmup_frac. ``official``: alpha_max * step_frac, and from
            warmup_frac on alpha_max, as in the released code.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> loss = ConfidenceLoss(alpha_max=0.5, warmup_frac=0.2)
        >>> [round(loss.alpha(at), 2) for at in (0.0, 0.1, 0.2, 1.0)]
        [0.0, 0.25, 0.5, 0.5]
    """

    alpha_max: float = 0.75
    warmup_frac: float = 0.2
    balance: Balance = "quantile"
    warmup: Literal["linear", "official"] = "linear"

    def __post_init__(self) -> None:
        for name in ("alpha_max", "warmup_frac"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1]; got {getattr(self, name)}.")

    @property
    def whole_batch(self) -> bool:
        """Whether rows of a batch depend on each other."""
        return self.balance != "fixed"

    def alpha(self, step_frac: float) -> float:
        """Weight of the student's own answers after a fraction of training."""
        if step_frac > self.warmup_frac or self.warmup_frac == 0:
            return self.alpha_max
        return self.alpha_max * (step_frac / self.warmup_frac if self.warmup == "linear" else step_frac)

    def boundary(self, logits: Tensor, weak_probs: Tensor) -> Tensor:
        """See ``hardening_boundary``.

        Raises:
            ValueError: more than two classes with ``balance="quantile"``.
        """
        if self.balance == "quantile" and logits.shape[1] > 2:
            raise ValueError(
                f"balance='quantile' is for two classes; got {logits.shape[1]}. Use 'sinkhorn', which is the same rule "
                "for any number, or 'fixed'."
            )
        return hardening_boundary(logits, weak_probs, self.balance)

    def targets(self, logits: Tensor, weak_probs: Tensor, step_frac: float, boundary: Tensor | None = None) -> Tensor:
        """(1 - alpha) weak_probs + alpha fhat, ``(batch, classes)``.

        Args:
            logits: of the student, ``(batch, classes)``.
            weak_probs: same shape.
            step_frac: fraction of training that is over, in [0, 1].
            boundary: of the whole batch, where these rows are a part of it; by default they are all of it.
        """
        weak_probs = weak_probs.detach().float()
        if boundary is None:
            boundary = self.boundary(logits, weak_probs)
        alpha = self.alpha(step_frac)
        return (1 - alpha) * weak_probs + alpha * harden(logits, boundary)

    def __call__(self, logits: Tensor, weak_probs: Tensor, step_frac: float) -> Tensor:
        """Mean loss of a whole batch, a scalar in nats.

        Args:
            logits: ``(batch, classes)``, batch > 0.
            weak_probs: distributions, same shape.
            step_frac: fraction of training that is over, in [0, 1].

        Raises:
            ValueError: shapes differ, rows that are no distributions, or see ``boundary``.
        """
        return _mean_loss(self, logits, weak_probs, step_frac)


@dataclass(frozen=True)
class ProductLoss:
    """Targets proportional to f_w^alpha f^beta: both must believe in a class.

    Args:
        alpha: power of the weak label, >= 0.
        beta: power of the student's own answer, >= 0; 0 leaves the weak labels.

    Raises:
        ValueError: a power is negative.
    """

    alpha: float = 1.0
    beta: float = 1.0
    whole_batch: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.beta < 0:
            raise ValueError(f"alpha and beta must be >= 0; got {self.alpha} and {self.beta}.")

    def boundary(self, logits: Tensor, weak_probs: Tensor) -> None:
        """Nothing: rows are independent."""

    def targets(
        self, logits: Tensor, weak_probs: Tensor, step_frac: float = 0.0, boundary: Tensor | None = None
    ) -> Tensor:
        """Normalised products, ``(batch, classes)``; ``step_frac`` and ``boundary`` are not used."""
        own = self.beta * logits.detach().float().log_softmax(-1)
        # In logarithms, so that hard labels and sure answers do not underflow; 0^0 is 1.
        return (own + (self.alpha * weak_probs.detach().float().log() if self.alpha else 0)).softmax(-1)

    def __call__(self, logits: Tensor, weak_probs: Tensor, step_frac: float = 0.0) -> Tensor:
        """Mean loss, a scalar in nats; arguments as ``ConfidenceLoss``."""
        return _mean_loss(self, logits, weak_probs, step_frac)


def _mean_loss(loss: TargetLoss, logits: Tensor, weak_probs: Tensor, step_frac: float) -> Tensor:
    check_distributions("weak_probs", weak_probs.detach().float().cpu().numpy())
    if logits.shape != weak_probs.shape:
        raise ValueError(
            f"weak_probs must have the logits' shape {tuple(logits.shape)}; got {tuple(weak_probs.shape)}."
        )
    return soft_cross_entropy(logits, loss.targets(logits, weak_probs, step_frac)).mean()


def hard_labels(probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    """The likeliest class alone, one-hot ``(n, classes)``; of equal ones the first."""
    one_hot: NDArray[np.float32] = np.eye(probabilities.shape[1], dtype=np.float32)[probabilities.argmax(1)]
    return one_hot


def weak_labels(
    model: nn.Module,
    dataset: datasets.Dataset,
    hard: bool = False,
    *,
    label_ids: Sequence[int] | None = None,
    pad: int = 0,
    batch_size: int = 64,
) -> datasets.Dataset:
    """The data set with what a weak model believes of each row, in the column ``soft_label``, float32 ``(classes,)``.

    Args:
        model: a sequence classifier, a causal language model (with ``label_ids``) or a module over features.
        dataset: has ``input_ids`` (ragged, without padding), or ``features``. Its other columns stay.
        hard: the likeliest class alone, one-hot.
        label_ids: the token that says each class, of a language model.
        pad: padding token.
        batch_size: rows per forward pass.

    Raises:
        ValueError: the data set has neither column, or no row.
    """
    from datasets import List, Value

    if "features" in dataset.column_names:
        inputs: Any = torch.tensor(np.array(dataset["features"]), dtype=torch.float32)
    elif "input_ids" in dataset.column_names:
        inputs = list(dataset["input_ids"])
    else:
        raise ValueError(f"dataset needs a column input_ids or features; it has {', '.join(dataset.column_names)}.")
    found = class_probabilities(model, inputs, label_ids, pad=pad, batch_size=batch_size)
    found = hard_labels(found) if hard else found
    return dataset.add_column("soft_label", list(found), feature=List(Value("float32"), length=found.shape[1]))


Start = TypeVar("Start")
Learned = TypeVar("Learned")


def bootstrap(
    models: Sequence[Start],
    labels: NDArray[np.float32],
    train: Callable[[Start, NDArray[np.float32]], Learned],
    label: Callable[[Learned], NDArray[np.float32]],
) -> list[Learned]:
    """Carry labels from model to model, each a little stronger: every one learns what the one before it believes.

    Args:
        models: from weaker to stronger; the last is the student.
        labels: the weak supervisor's, ``(n, classes)``.
        train: trains a model on labels ``(n, classes)`` and gives what has learned.
        label: what that believes of the same examples.

    Returns:
        The trained models, in order.
    """
    trained: list[Learned] = []
    for model in models:
        trained.append(train(model, label(trained[-1]) if trained else labels))
    return trained


class Xent(Spec):
    """Cross-entropy against the weak labels as they are: the naive student."""

    kind: Literal["xent"] = Field(default="xent", description="the labels as they are")

    def build(self) -> TargetLoss:
        """The loss."""
        return SoftCrossEntropy()


class Confidence(Spec):
    """The auxiliary confidence loss."""

    kind: Literal["confidence"] = Field(default="confidence", description="the student may overrule its labels")
    alpha_max: float = Field(
        default=0.75, ge=0, le=1, description="final weight of the student's own answers; 0.5 for small students"
    )  # paper: 0.75
    warmup_frac: float = Field(
        default=0.2, ge=0, le=1, description="fraction of training over which that weight rises"
    )  # paper: 0.2; code: 0.1
    balance: Balance = Field(
        default="quantile",
        description="how hardened answers keep the classes' shares; `sinkhorn` for more than two classes",
    )
    warmup: Literal["linear", "official"] = Field(
        default="linear", description="how the weight rises; `official` jumps as the released code does"
    )

    def build(self) -> TargetLoss:
        """The loss."""
        return ConfidenceLoss(self.alpha_max, self.warmup_frac, self.balance, self.warmup)


class Product(Spec):
    """The product loss of the released code."""

    kind: Literal["product"] = Field(default="product", description="both must believe in a class")
    alpha: float = Field(default=1.0, ge=0, description="power of the weak label")
    beta: float = Field(default=1.0, ge=0, description="power of the student's own answer")

    def build(self) -> TargetLoss:
        """The loss."""
        return ProductLoss(self.alpha, self.beta)


def _by_kind(value: Any) -> Any:  # Any: whatever the user wrote
    return {"kind": value} if isinstance(value, str) else value


LossChoice = Annotated[Xent | Confidence | Product, Field(discriminator="kind"), BeforeValidator(_by_kind)]
"""A loss by its name alone, or with its fields: ``loss: xent``, ``loss: {kind: confidence, alpha_max: 0.5}``."""


class WeakToStrong(ClassAlignment):
    """Fine-tune the strong model on a weak model's labels."""

    id: ClassVar[str] = "weak_to_strong"

    loss: LossChoice = Field(
        default=Confidence(), description="what the student minimises: xent, confidence or product, or its fields"
    )
    hard_labels: bool = Field(default=False, description="keep the likeliest class of each weak label, not its odds")
    through: tuple[ModelRef, ...] = Field(
        default=(), description="models between weak and strong that pass the labels on, each trained by the one before"
    )
    generative_finetune_steps: int = Field(
        default=0,
        ge=0,
        description="steps of language modelling on the unlabelled texts before the student sees a label",
    )

    def align(self, task: ClassTask) -> Aligned:
        """Train the supervisor, let it label, train the student on its labels."""
        texts, loss = task.unlabelled, self._loss(len(task.labels))
        if loss.whole_batch and self.batch_size < FEW_ROWS:
            task.warn(
                "batch_size",
                f"in batches of {self.batch_size} the balance of answers is noise; use {FEW_ROWS} or more, or "
                "balance: fixed",
            )
        weak = task.supervisor()
        labels = self._labels(weak, texts)
        task.keep_labels(labels)
        chain: list[tuple[str, ModelRef, TargetLoss]] = [
            *((f"through-{place}", ref, SoftCrossEntropy()) for place, ref in enumerate(self.through)),
            ("student", self._student(task), loss),
        ]
        trained = bootstrap(
            chain,
            labels,
            lambda start, targets: task.train(*start[:2], texts, targets, start[2], watch=start[0] == "student"),
            lambda model: self._labels(model, texts),
        )
        return Aligned(trained[-1], {"weak": weak}, ("labels.parquet",))

    def _labels(self, model: ClassModel, texts: Sequence[str]) -> NDArray[np.float32]:
        found = model.probabilities(texts)
        return hard_labels(found) if self.hard_labels else found

    def _loss(self, classes: int) -> TargetLoss:
        loss = self.loss.build()
        # What cannot be asked of so many classes is refused before anything is trained.
        loss.boundary(torch.zeros(1, classes), torch.full((1, classes), 1 / classes))
        return loss

    def _student(self, task: ClassTask) -> ModelRef:
        """The strong model; after language modelling on the unlabelled texts, if that is asked for."""
        if not self.generative_finetune_steps:
            return self.model
        head = head_of(self.model)
        if head not in ("causal", "masked"):
            raise ModelError(
                f"generative_finetune_steps needs a causal or masked model; {self.model.name!r} is neither"
            )
        model, tokenizer = load_model(self.model, head), load_tokenizer(self.model)
        documents = [Document(str(number), text) for number, text in enumerate(task.unlabelled)]
        store = tokenize_documents(documents, tokenizer)
        positions = getattr(model.config, "max_position_embeddings", None) or self.max_tokens
        length = min(self.max_tokens, int(positions), len(store.tokens))
        stream: Any = PackedStream(store, length, self.batch_size, derive_seed(self.seed, "generative"))
        objective: Any = CausalObjective()
        if head == "masked":
            stream, objective = MaskedStream(stream, tokenizer, seed=self.seed), TokenObjective()
        chosen: Objective = objective
        task.training.fit(Phase("generative", model, stream, chosen), Budget(steps=self.generative_finetune_steps))
        home = task.run.path("generative")
        model.save_pretrained(home)  # type: ignore[operator]  # every Hugging Face model has it
        tokenizer.save_pretrained(home)
        return ModelRef(name=str(home), dtype=self.model.dtype)
