"""Continued pretraining: starting model + domain corpus + general corpus + budget -> adapted model.

What every method of the stage shares is here: the fields, the data with its hygiene, the driving of phases, and the
four answers (gain in the domain, forgetting, the user's task, cost). A method adds its fields and ``phases``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator
from torch import nn

from headwater.core.budget import GivenBudget
from headwater.core.family import Axis, Family
from headwater.core.fit import FitSettings, Phase, Trained, fit_phases
from headwater.core.lora import LoraSpec
from headwater.core.optim import OptimSpec
from headwater.core.phase import EvalAt
from headwater.core.recipe import CorpusRef, DataRef, Metrics, ModelRef, Name, Recipe, Spec
from headwater.domain.adaptation import Adaptation
from headwater.domain.evaluation import Evaluation

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["FAMILY", "Adapted", "AnswerTask", "Continuation", "ContinuedPretraining", "ProbeTask"]


class ProbeTask(Spec):
    """A labelled task scored before and after by a linear probe on frozen features."""

    kind: Literal["probe"] = Field(default="probe", description="figure: accuracy of a probe on frozen features")
    name: Name = Field(description="name in the metrics: downstream/NAME/accuracy")
    data: DataRef = Field(description="texts and labels")
    num_labels: int = Field(default=200, gt=1, description="labelled texts that the probe is fitted on")
    draws: int = Field(default=5, gt=0, description="independent draws of those labels; the mean is reported")


class AnswerTask(Spec):
    """Prompts with one right answer out of those that occur, scored before and after as they stand."""

    kind: Literal["answers"] = Field(default="answers", description="figures: accuracy, exact, form, cross_entropy")
    name: Name = Field(description="name in the metrics: downstream/NAME/accuracy")
    data: DataRef = Field(
        description="held-out prompts (`input_field`) and answers (`label_field`); a space between them is the answer's"
    )


def _kind(task: Any) -> str:  # Any: a task or unread YAML
    return str(task.get("kind", "probe") if isinstance(task, dict) else getattr(task, "kind", "probe"))


DownstreamTask = Annotated[
    Annotated[ProbeTask, Tag("probe")] | Annotated[AnswerTask, Tag("answers")], Discriminator(_kind)
]
"""A task in a recipe; without a ``kind`` it is a probe."""


@dataclass(frozen=True)
class Adapted:
    """What a method leaves behind.

    Attributes:
        model: saved to ``model/``; a Hugging Face or PEFT model.
        files: further files of the run directory, by what they hold, named in the model's README.
        notes: facts for the reader of the result.
        metrics: figures beyond those that every method of the stage has.
    """

    model: nn.Module
    files: tuple[str, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


class Continuation(Recipe):
    """What every recipe of the stage shares, whether it adapts to one domain or to several.

    Attributes:
        longest_block: ``seq_len`` is at most this where the recipe leaves it open; None for the model's maximum.
    """

    longest_block: ClassVar[int | None] = 1024

    model: ModelRef = Field(description="the model to start from: Hub name, local directory or builtin")
    general: CorpusRef | None = Field(
        default=None, description="texts that must not be forgotten; without them forgetting is not measured"
    )
    downstream: tuple[DownstreamTask, ...] = Field(
        default=(), description="labelled tasks scored before and after: by a probe, or by the answers given"
    )
    objective: Literal["auto", "causal", "masked"] = Field(
        default="auto", description="what is predicted; `auto` reads it off the model's architecture"
    )
    seq_len: int | None = Field(
        default=None, gt=1, description="tokens per packed block; by default the model's maximum, at most 1024"
    )
    batch_tokens: int = Field(default=32_768, gt=0, description="tokens per optimizer step")
    optim: OptimSpec = Field(
        default=OptimSpec(), description="how weights are moved: AdamW, re-warmed, then decayed to a tenth"
    )
    replay: float = Field(default=0.0, ge=0, lt=1, description="fraction of every batch drawn from the general corpus")
    lora: LoraSpec | None = Field(default=None, description="train LoRA adapters instead of all weights")
    budget: GivenBudget = Field(description="what the training may spend: tokens, steps, flops or seconds")
    eval_at: EvalAt = Field(
        default=(0.0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0),
        description="fractions of the budget at which domain and general are measured; dense where a gap would show",
    )
    held_out: float = Field(default=0.1, gt=0, lt=0.5, description="share of the documents kept for the final test")
    eval_chars: int = Field(
        default=400_000,
        gt=0,
        description="characters of each test set that are scored, at least twenty whole documents",
    )
    prompts: tuple[str, ...] = Field(
        default=(), description="prompts to complete before and after, shown in the report"
    )
    fit: FitSettings = Field(
        default=FitSettings(), description="how the loop runs: precision, micro-batches, checkpoints"
    )

    @model_validator(mode="after")
    def _replay_has_source(self) -> Self:
        if self.replay > 0 and self.general is None:
            raise ValueError(
                f"replay is {self.replay} but there is no general corpus to replay; give `general`, or replay: 0"
            )
        return self


class ContinuedPretraining(Continuation):
    """Family of the stage ``domain``: one hook, ``phases``."""

    domain: CorpusRef = Field(description="texts to adapt to; split into train, validation and test by document")

    @abstractmethod
    def phases(self, ctx: Adaptation) -> Generator[Phase, Trained, Adapted]:
        """Yield each training phase, receive what it trained, return what the run leaves behind.

        Must be a pure function of ``ctx``: a resumed run goes through it again, and finished phases come back
        from their checkpoints.
        """

    def run(self, run: Run) -> Metrics:
        """Split and clean the data, measure, train the phases, measure again, save."""
        ctx = Adaptation.open(self, run)
        evaluation = Evaluation(self, ctx, run)
        evaluation.before()
        adapted = fit_phases(
            self.phases(ctx),
            budget=ctx.training_budget,
            optim=self.optim,
            seed=self.seed,
            directory=run.directory,
            settings=self.fit,
            evaluate=evaluation.midway,
            eval_at=self.eval_at,
            meter=ctx.meter,
            log=run.log,
            began=ctx.note_phase,
            ended=evaluation.add_trajectory,
        )
        metrics = evaluation.after(adapted.model)
        ctx.save(adapted.model, run, files=adapted.files)
        run.notes.update(adapted.notes)
        run.cost = {**ctx.meter.cost.to_dict(), "trainable": ctx.trainable}
        return {**metrics, **ctx.data_metrics(), **adapted.metrics}


FAMILY = Family(
    stage="domain",
    gain=Axis("domain/gain", "Domain gain", "higher", "bits/byte"),
    price=Axis("general/forgetting", "Forgetting", "lower", "bits/byte"),
    columns=(
        Axis("domain/bpb", "Domain", "lower", "bits/byte"),
        Axis("general/bpb", "General", "lower", "bits/byte"),
        Axis("general/worst", "Worst forgetting on the way", "lower", "bits/byte"),
    ),
    selection=Axis("valid/domain_bpb", "Validation, domain", "lower", "bits/byte"),
    selection_price="valid/general_forgetting",
    references={
        "frozen": {"method": "frozen", "tune": {}},
        "scratch": {"method": "scratch"},
        "plain": {"method": "plain"},
        "replay": {"method": "plain", "replay": 0.25},
    },
    baseline="replay",
    trajectories=(
        Axis("domain/bpb", "Domain", "lower", "bits/byte"),
        Axis("general/bpb", "General", "lower", "bits/byte"),
    ),
)
