"""Self-training: a fine-tuned model labels new text, a fresh copy is pretrained on that, then fine-tuned on the truth.

    1. teacher      T = finetune(M0, L)
    2. pseudo-label y~(x) = argmax T(x)                     for every x in U
    3. pretrain     P = train(M0, {(x, y~(x))})             task loss, from the starting model and a new head
    4. fine-tune    S = finetune(P, L)                      head carried over; real labels last, never mixed with U

L are few labelled texts and U many without. S may be the next teacher (``rounds``). Inference uses S alone.

Source: Guo, "Predictions For Pre-training Language Models", arXiv:2011.09031.
Differs: the paper pretrains with the task's loss and the language model's together; the latter is off here by default
    (``language_loss``), so that what is tested is the pseudo-labels. All pseudo-labels are kept by default; whether the
    paper leaves some out is unverified. ``threshold``, ``balance``, ``soft`` and ``rounds`` are additions.
Needs: a base model, labelled texts, more texts of the same kind.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from headwater.core.fit import BatchStream, Phase, Trained
from headwater.core.objective import Loss
from headwater.core.rng import derive_seed
from headwater.domain.adaptation import Adaptation
from headwater.domain.base import Adapted
from headwater.domain.labelling import LabelledPretraining, LabelTask
from headwater.domain.pseudo_labels import PseudoLabelError, agreement, class_inputs, confident, pseudo_label
from headwater.modalities.text.class_inputs import StoredInputs
from headwater.modalities.text.heads import HeadedModel, HeadObjective
from headwater.modalities.text.packing import IGNORED, mask_tokens

if TYPE_CHECKING:
    import datasets

__all__ = ["PseudoLabelError", "SelfTrainedClassifier", "SelfTraining", "agreement", "confident", "pseudo_label"]

AGREEMENT_TEXTS = 512
UNLABELLED = -1


class SelfTrainedClassifier(
    MetaEstimatorMixin,  # type: ignore[misc]  # scikit-learn ships no types
    ClassifierMixin,  # type: ignore[misc]
    BaseEstimator,  # type: ignore[misc]
):
    """Self-training around any scikit-learn classifier that goes on from where it is (``warm_start``).

    Takes the data that ``sklearn.semi_supervised.SelfTrainingClassifier`` takes. That one grows the labelled set and
    fits on both together; this one fits on the pseudo-labels first and on the true labels last. The estimator should be
    one whose weights remember where they came from, such as a network trained for a number of epochs: one that is
    trained to its optimum forgets the pseudo-labels.

    Args:
        estimator: a classifier with a parameter ``warm_start``; it is cloned.
        pretraining: parameters of the estimator for the fit on pseudo-labels, such as ``{"max_iter": 5}``.
        threshold: pseudo-labels of less confidence are left out; above 0 needs ``predict_proba``.
        balance: no class has more than an equal share of the pseudo-labels; needs ``predict_proba``.
        rounds: how often a student becomes the next teacher, >= 1.

    Attributes:
        teacher_: fitted on the true labels alone.
        pretrained_: fitted on pseudo-labels alone, in the last round.
        estimator_: the student.
        pseudo_labels_: of the unlabelled rows, in order, in the last round; ``(unlabelled,)``.
        kept_: which of them were learned from, positions in ``pseudo_labels_``.
        classes_: labels, sorted.

    Example:
        >>> from sklearn.neural_network import MLPClassifier
        >>> X, y = [[0.0], [0.1], [1.0], [0.9]], [0, -1, 1, -1]
        >>> net = MLPClassifier((4,), solver="lbfgs", random_state=0)
        >>> SelfTrainedClassifier(net).fit(X, y).pseudo_labels_.tolist()
        [0, 1]
    """

    def __init__(
        self,
        estimator: Any = None,
        pretraining: Mapping[str, Any] | None = None,
        threshold: float = 0.0,
        balance: bool = False,
        rounds: int = 1,
    ) -> None:
        self.estimator = estimator
        self.pretraining = pretraining
        self.threshold = threshold
        self.balance = balance
        self.rounds = rounds

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Teach, label, pretrain, fine-tune.

        Args:
            X: ``(samples, features)``, whatever the estimator takes that can be indexed by rows; sparse too.
            y: ``(samples,)`` integers; -1 is unlabelled.

        Raises:
            TypeError: the estimator has no ``warm_start``, or no ``predict_proba`` where that is needed.
            ValueError: no labelled or no unlabelled row, one class alone, or a value out of range.
            PseudoLabelError: see ``confident``; or the teacher never predicts some class.
        """
        from sklearn.utils import _safe_indexing

        rows, labels = X if hasattr(X, "shape") else np.asarray(X), np.asarray(y)
        self._check(labels)
        known = np.flatnonzero(labels != UNLABELLED)
        unknown = np.flatnonzero(labels == UNLABELLED)
        self.classes_ = np.unique(labels[known])
        if len(self.classes_) < 2 or not len(unknown):
            raise ValueError(
                f"y needs two classes and unlabelled rows (-1); got the classes {self.classes_.tolist()} and "
                f"{len(unknown)} unlabelled rows."
            )
        labelled, unlabelled = _safe_indexing(rows, known), _safe_indexing(rows, unknown)
        self.teacher_ = self.estimator_ = clone(self.estimator).fit(labelled, labels[known])
        for _ in range(self.rounds):
            self.pseudo_labels_, self.kept_ = self._label(self.estimator_, unlabelled)
            student = clone(self.estimator).set_params(warm_start=True, **(self.pretraining or {}))
            student.fit(_safe_indexing(unlabelled, self.kept_), self.pseudo_labels_[self.kept_])
            self.pretrained_ = copy.deepcopy(student)
            usual = self.estimator.get_params(deep=False)
            student.set_params(**{name: usual[name] for name in self.pretraining or {}})
            self.estimator_ = student.fit(labelled, labels[known])
        return self

    def _check(self, labels: NDArray[Any]) -> None:  # Any: whatever y holds
        if self.estimator is None or "warm_start" not in self.estimator.get_params(deep=False):
            raise TypeError(
                f"estimator must go on from an earlier fit, by its parameter warm_start; {self.estimator!r} has none. "
                "MLPClassifier and SGDClassifier have it."
            )
        if (self.threshold or self.balance) and not hasattr(self.estimator, "predict_proba"):
            raise TypeError(f"threshold and balance need predict_proba, which {self.estimator!r} has not.")
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError(f"y must be (samples,) integers, -1 for unlabelled; got {labels.dtype} {labels.shape}.")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be in [0, 1); got {self.threshold}.")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1; got {self.rounds}.")

    def _label(self, teacher: Any, X: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
        pseudo = teacher.predict(X)
        sure = teacher.predict_proba(X).max(1) if self.threshold or self.balance else np.ones(len(pseudo))
        code = np.searchsorted(self.classes_, pseudo)
        kept = confident(
            code, sure, [str(label) for label in self.classes_], threshold=self.threshold, balance=self.balance
        )
        absent = np.setdiff1d(self.classes_, pseudo[kept])
        if len(absent):
            raise PseudoLabelError(
                f"no pseudo-label that is kept says {absent[0]}, so the student's classes would not be the teacher's. "
                "Give more labels, or lower the threshold."
            )
        return pseudo, kept

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The student's labels, ``(samples,)``."""
        check_is_fitted(self, "estimator_")
        answers: NDArray[Any] = self.estimator_.predict(X)
        return answers

    @available_if(lambda self: hasattr(self.estimator, "predict_proba"))  # type: ignore[untyped-decorator]
    def predict_proba(self, X: ArrayLike) -> NDArray[Any]:
        """The student's probabilities, ``(samples, classes)``."""
        check_is_fitted(self, "estimator_")
        answers: NDArray[Any] = self.estimator_.predict_proba(X)
        return answers


class WithTexts:
    """A stream of labelled texts whose batches also say what the language model is to predict in them.

    Adds ``text_ids`` and ``text_labels`` ``(batch, time)``: the text itself for a causal model; with tokens masked anew
    in every epoch for a masked one. Padding is not predicted.

    Args:
        stream: batches with ``input_ids`` and ``attention_mask``.
        tokenizer: gives the mask token, for a masked model; ``None`` for a causal one.
        seed: of the masks.
    """

    def __init__(self, stream: BatchStream, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> None:
        self._stream, self._tokenizer, self._seed = stream, tokenizer, seed
        self.rows, self.tokens_per_row = stream.rows, stream.tokens_per_row
        self.fingerprint = f"{stream.fingerprint}-{'causal' if tokenizer is None else 'masked'}"

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """The stream's batch, with texts."""
        batch = self._stream.batch(step, start, stop)
        ids = labels = batch["input_ids"]
        if self._tokenizer is not None:
            keys = step * self.rows + start + np.arange(len(ids))
            found = mask_tokens(ids.numpy(), keys, self._tokenizer, seed=self._seed)
            ids, labels = torch.from_numpy(found[0]), torch.from_numpy(found[1])
        return {**batch, "text_ids": ids, "text_labels": labels.masked_fill(batch["attention_mask"] == 0, IGNORED)}


class TaskAndText(nn.Module):
    """The task's loss plus the language model's on the same texts: ``CE(y~, x) + weight * mean_t NLL_t(x)`` per text.

    Args:
        task: the classifier's objective.
        weight: of the language model's part.
        causal: whether the language model predicts the next token, or the masked ones.
    """

    unit = "nats/example"

    def __init__(self, task: HeadObjective, weight: float, *, causal: bool) -> None:
        super().__init__()
        self.task, self.weight, self.causal = task, weight, causal

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """Batches are those of ``WithTexts``."""
        judged = self.task(model, batch)
        labels = batch["text_labels"]
        if self.causal:
            labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        logits = model(input_ids=batch["text_ids"], attention_mask=batch["attention_mask"]).logits
        nats = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
        spoken = nats.view_as(labels).sum(1) / (labels != IGNORED).sum(1).clamp(min=1)
        metrics = {**judged.metrics, "language_loss": spoken.mean().detach()}
        return Loss(judged.total + self.weight * spoken.sum(), judged.count, metrics)


class SelfTraining(LabelledPretraining):
    """Pretraining on the predictions of a fine-tuned model, between two fine-tunings."""

    id: ClassVar[str] = "self_training"

    threshold: float = Field(
        default=0.0, ge=0, lt=1, description="pseudo-labels of less confidence are left out; 0 keeps all"
    )
    balance: bool = Field(default=False, description="no class has more than an equal share of the pseudo-labels")
    soft: bool = Field(default=False, description="learn from the teacher's probabilities, not its answers")
    rounds: int = Field(default=1, ge=1, description="how often a student becomes the next teacher")
    shares: tuple[float, float, float] = Field(
        default=(0.15, 0.7, 0.15),
        description="of the budget, for teacher, pretraining and fine-tuning; rounds divide the last two equally",
    )
    language_loss: float = Field(
        default=0.0, ge=0, description="weight of the language model's loss beside the task's in pretraining"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if min(self.shares) <= 0 or sum(self.shares) > 1 + 1e-9:
            raise ValueError(f"shares must be > 0 and sum to at most 1; got {self.shares}")
        if self.replay > 0:
            raise ValueError(
                f"replay is {self.replay}, but this method trains on labels and not on running text; set replay: 0 "
                "(`general` is still measured)"
            )
        return self

    def learn(self, ctx: Adaptation, task: LabelTask) -> Generator[Phase, Trained, Adapted]:
        """Teacher; then, each round, pseudo-labels, pretraining from the start, fine-tuning."""
        first, pretraining, last = self.shares
        teacher = task.headed()
        yield task.fine_tuning("teacher", teacher, share=first)
        task.hand_in("start", teacher)
        self._warn_of_chance(ctx, task, teacher)
        report: dict[str, Any] = {}  # Any: JSON data
        student = teacher
        for number in range(1, self.rounds + 1):
            inputs, targets = self._pseudo_labels(ctx, task, student, number, report)
            student = task.headed()
            phase = task.phase(f"pretrain-{number}", student, inputs, targets, share=pretraining / self.rounds)
            yield self._with_texts(ctx, phase, student)
            yield task.fine_tuning(f"finetune-{number}", student, share=last / self.rounds)
        task.hand_in("end", student)
        texts = [document.text for document in task.unlabelled[:AGREEMENT_TEXTS]]
        report["student_agrees_with_teacher"] = agreement(teacher.classes, student.classes, texts)
        ctx.run.write_json("pseudo.json", report)
        folders = tuple(f"pseudo-{number}" for number in range(1, self.rounds + 1))
        metrics = {"pseudo/kept": report[folders[-1]]["kept"], "pseudo/labels": report[folders[-1]]["labels"]}
        return Adapted(student.model, files=("pseudo.json", *folders), metrics=metrics)

    def _pseudo_labels(
        self, ctx: Adaptation, task: LabelTask, teacher: HeadedModel, number: int, report: dict[str, Any]
    ) -> tuple[StoredInputs, NDArray[np.float32]]:
        """What the teacher says of the unlabelled texts, as inputs and targets of the pretraining."""
        name = f"pseudo-{number}"
        found = pseudo_label(teacher.classes, task.unlabelled, ctx.run.path(name), soft=self.soft)
        inputs = class_inputs(task.unlabelled, teacher.classes)
        ctx.charge_forward(teacher.model, int(inputs.lengths.sum()))
        code, sure = (found.with_format("numpy")[column][:] for column in ("label", "confidence"))
        kept = confident(code, sure, task.labels, threshold=self.threshold, balance=self.balance)
        report[name] = _facts(code, sure, kept, task.labels)
        return StoredInputs(inputs.store, inputs.rows[kept]), self._targets(found, kept, len(task.labels))

    def _targets(self, found: datasets.Dataset, kept: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
        column = found.select(kept).with_format("numpy")["probs" if self.soft else "label"][:]
        if self.soft:
            return np.asarray(column, dtype=np.float32)
        one_hot: NDArray[np.float32] = np.eye(classes, dtype=np.float32)[column]
        return one_hot

    def _with_texts(self, ctx: Adaptation, phase: Phase, headed: HeadedModel) -> Phase:
        if self.language_loss == 0:
            return phase
        headed.thaw()
        causal = ctx.head == "causal"
        stream = WithTexts(phase.stream, None if causal else ctx.tokenizer, derive_seed(self.seed, phase.name, "masks"))
        objective = TaskAndText(headed.objective, self.language_loss, causal=causal)
        return Phase(phase.name, phase.model, stream, objective, phase.share)

    def _warn_of_chance(self, ctx: Adaptation, task: LabelTask, teacher: HeadedModel) -> None:
        accuracy, chance = task.validated(teacher.classes), 1 / len(task.labels)
        if accuracy is not None and accuracy <= chance:
            ctx.warn(
                "teacher",
                f"the teacher is right on {accuracy:.1%} of {len(task.valid)} validation texts, where chance is "
                f"{chance:.1%}: its pseudo-labels are noise. Give it more labels or a larger share of the budget.",
            )


def _facts(
    code: NDArray[np.int64], sure: NDArray[np.float32], kept: NDArray[np.int64], labels: tuple[str, ...]
) -> dict[str, Any]:  # Any: JSON data
    counts, edges = np.histogram(sure, bins=20, range=(0.0, 1.0))
    return {
        "labels": len(code),
        "kept": len(kept),
        "per_class": dict(zip(labels, np.bincount(code[kept], minlength=len(labels)).tolist(), strict=True)),
        "confidence_histogram": {"edges": edges.round(3).tolist(), "counts": counts.tolist()},
    }
