"""The nouns of training: what is trained, on what, how, and what it leaves. `headwater.core.fit` does the training."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor, nn

from headwater.core.budget import Cost
from headwater.core.objective import Objective
from headwater.core.optim import AnyOptim

__all__ = ["BatchStream", "EvalAt", "FitSettings", "NonFiniteLoss", "Phase", "Trained"]


def _rising(value: tuple[float, ...]) -> tuple[float, ...]:
    if list(value) != sorted(set(value)) or (value and (value[0] < 0 or value[-1] > 1)):
        raise ValueError(f"fractions of the budget must rise within [0, 1]; got {value}")
    return value


EvalAt = Annotated[tuple[float, ...], AfterValidator(_rising)]
"""Fractions of the budget at which a recipe is measured."""


class BatchStream(Protocol):
    """Endless batches that are reached by number, never by replay."""

    @property
    def fingerprint(self) -> str:
        """Of the data and of how it is batched; a checkpoint of another one is refused."""
        ...

    @property
    def rows(self) -> int:
        """Rows in every batch."""
        ...

    @property
    def tokens_per_row(self) -> int:
        """What one row charges to a budget in tokens."""
        ...

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Rows ``[start, stop)`` of batch number ``step``: a pure function, each tensor ``(stop - start, ...)``.

        A column ``row``, if there is one, names the rows in error messages.
        """
        ...


class FitSettings(BaseModel):
    """How a phase is executed: nothing here changes what is learned, except by rounding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    micro_rows: int | None = Field(
        default=None, gt=0, description="Rows per forward pass; null: the whole batch, halved until it fits the device."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="'auto' times both on the first batch and takes the faster; weights stay as they are.",
    )
    gradient_checkpointing: bool = Field(default=False, description="Recompute activations instead of keeping them.")
    compile: bool = Field(default=False, description="Run the model through torch.compile.")
    workers: int = Field(
        default=0, ge=0, description="Processes that prepare batches ahead; 0: prepared in this process."
    )
    log_every: int = Field(
        default=10, gt=0, description="Steps between logged metrics, which are averages since the last."
    )
    checkpoint_every: int | None = Field(
        default=None, gt=0, description="Steps between checkpoints; null: only at the end and when interrupted."
    )
    keep_checkpoints: int = Field(default=2, gt=0, description="How many checkpoints stay on disk.")
    trackers: tuple[str, ...] = Field(
        default=(), description="Names of experiment trackers known to Accelerate, e.g. tensorboard."
    )


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    Attributes:
        name: directory and metric prefix; letters, digits, ``_ . -``.
        model: trained in place; frozen parameters stay as they are.
        stream: what it reads.
        objective: what it minimises; trained as well if it has parameters.
        share: of the budget, in (0, 1].
        optim: overrides the run's for this phase.
        schedule_span: how much of the whole learning-rate schedule this phase covers; ``None``: a full schedule of its
            own.
        schedule_start: where on that schedule it begins, the sum of the spans before it.
        continues: an earlier phase on the same model, finished in the same directory, whose optimizer's moments this
            one takes up: with spans that meet, other data from one step to the next and nothing else. ``None``: moments
            of its own, from zero.
        model_rate: the learning rate of the model's weights, as a multiple of that of the objective's.
    """

    name: str
    model: nn.Module
    stream: BatchStream
    objective: Objective
    share: float = 1.0
    optim: AnyOptim | None = None
    schedule_span: float | None = None
    schedule_start: float = 0.0
    continues: Phase | None = None
    model_rate: float = 1.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise ValueError(f"a phase's name is letters, digits, '_', '.' and '-'; got {self.name!r}.")
        if not 0 < self.share <= 1:
            raise ValueError(f"share of phase {self.name!r} must be in (0, 1]; got {self.share}.")
        if not 0 < self.model_rate < float("inf"):
            raise ValueError(
                f"model_rate of phase {self.name!r} must be positive; got {self.model_rate}. To keep the model as it "
                "is, freeze it: model.requires_grad_(False)."
            )
        end = self.schedule_start + (self.schedule_span or 0.0)
        if self.schedule_start < 0 or end > 1 + 1e-9:
            raise ValueError(
                f"phase {self.name!r} covers [{self.schedule_start}, {end}] of the schedule; it must lie in [0, 1]."
            )
        if self.continues is not None and self.continues.model is not self.model:
            raise ValueError(f"phase {self.name!r} continues {self.continues.name!r}, which trains another model.")


@dataclass(frozen=True)
class Trained:
    """What a phase leaves.

    Attributes:
        model: the phase's own, in ``eval()``.
        trajectory: one row per ``eval_at`` point: ``at`` (the fraction), ``step``, ``tokens``, ``seconds`` and the
            metrics.
        loss_curve: ``step`` and mean ``loss``, thinned to at most 400 points.
        cost: steps, tokens, FLOPs, seconds and trainable parameters of this phase, over all processes and restarts.
        settings: what was found out: ``precision``, ``micro_rows``.
    """

    model: nn.Module
    steps: int
    tokens: int
    seconds: float
    trajectory: list[dict[str, float]]
    loss_curve: list[dict[str, float]]
    cost: Cost
    settings: dict[str, Any]


class NonFiniteLoss(ArithmeticError):
    """The loss or the gradient was infinite or NaN; the optimizer has not moved.

    Attributes:
        phase, step: where; ``step`` counts finished steps.
        rows: the stream's numbers of the rows of the batch, as far as this process had them.
    """

    def __init__(self, phase: str, step: int, rows: list[int], loss: float, norm: float, last: str) -> None:
        shown = ", ".join(map(str, rows[:16])) + (", ..." if len(rows) > 16 else "")
        super().__init__(
            f"phase {phase!r}, step {step}: loss {loss:g}, gradient norm {norm:g}, on rows {shown}. "
            f"The optimizer has not moved; {last}. Look at these rows, or lower the learning rate, or train in fp32."
        )
        self.phase, self.step, self.rows = phase, step, rows
