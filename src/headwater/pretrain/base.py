"""Pretraining: data + architecture + budget -> a model from scratch.

A method says what goes in, what is predicted and what is measured beside the loss, in one hook, ``parts``. Everything
else is here: the loop, validation, what is counted, what is saved. ``TextPretraining`` adds token streams and the
probes by which objectives are compared, since their own losses cannot be.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field, field_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from headwater.core.budget import GivenBudget, Meter
from headwater.core.cache import atomic_path, atomic_write_text
from headwater.core.family import Axis, Family
from headwater.core.fit import BatchStream, FitSettings, Phase, Trained, fit
from headwater.core.objective import Objective
from headwater.core.optim import OptimSpec
from headwater.core.phase import EvalAt
from headwater.core.recipe import CorpusRef, Metrics, Recipe
from headwater.modalities.text.corruption import SpanCorruption, SuffixCorruption
from headwater.modalities.text.fresh import Model
from headwater.pretrain.probes import TextProbe, measured_loss

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = [
    "FAMILY",
    "CollatedStream",
    "Collator",
    "PretrainParts",
    "Pretraining",
    "TextPretraining",
    "WithRows",
    "with_rows",
]

Probe = Callable[[nn.Module], Metrics]
"""Measures a model in ``eval()``, wherever it stands; leaves it as it was."""


class Collator(Protocol):
    """Features to a batch: a pure function of the features, whose draws are keyed by each feature's ``row``."""

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:  # Any: lists, arrays or tensors
        """Make one batch; every tensor has a first dimension of ``len(features)``."""
        ...


class MapStyle(Sized, Protocol):
    """A data set that is read by position."""

    def __getitem__(self, position: int, /) -> Mapping[str, Any]: ...  # Any: lists, arrays or tensors


class WithRows:
    """A map-style data set whose features carry ``row``; ``with_rows`` makes it."""

    def __init__(self, dataset: MapStyle, epochs: int) -> None:
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1; got {epochs}.")
        self._dataset, self._size, self._epochs = dataset, len(dataset), epochs

    def __len__(self) -> int:
        return self._size * self._epochs

    def __getitem__(self, position: int) -> dict[str, Any]:  # Any: whatever the features hold
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} is outside [0, {len(self)}).")
        return {**self._dataset[position % self._size], "row": position}


def with_rows(dataset: MapStyle, epochs: int = 1) -> WithRows:
    """Give every feature the number by which a collator draws, so that each epoch is corrupted anew.

    For ``transformers.Trainer``: pass ``with_rows(dataset, epochs)`` as the data set and train for one epoch, with
    ``remove_unused_columns=False`` (the Trainer would drop ``row`` before the collator sees it).

    Args:
        dataset: gives features by position.
        epochs: how often the data set is read; position i is item ``i % len(dataset)``.

    Example:
        >>> [feature["row"] for feature in with_rows([{"input_ids": [5, 6]}], epochs=3)]
        [0, 1, 2]
    """
    return WithRows(dataset, epochs)


class CollatedStream:
    """Batches of a map-style data set over an endless index, made by a collator.

    Args:
        dataset: ``dataset[i]`` for any i >= 0, a pure function of i.
        collator: makes the batch.
        rows: features per batch, >= 1.
        tokens_per_row: what one of them charges to a budget in tokens.
        fingerprint: of the data, their order, and of what the collator does to them.
    """

    def __init__(
        self, dataset: MapStyle, collator: Collator, *, rows: int, tokens_per_row: int, fingerprint: str
    ) -> None:
        if rows < 1:
            raise ValueError(f"rows must be at least 1; got {rows}.")
        self.dataset, self.collator = dataset, collator
        self.rows, self.tokens_per_row, self.fingerprint = rows, tokens_per_row, fingerprint

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Return rows [start, stop) of batch ``step``.

        Raises:
            ValueError: ``step`` is negative or the range is not inside the batch.
        """
        stop = self.rows if stop is None else stop
        if step < 0 or not 0 <= start <= stop <= self.rows:
            raise ValueError(f"need step >= 0 and 0 <= start <= stop <= {self.rows}; got {step}, {start}, {stop}.")
        return self.collator([self.dataset[i] for i in range(step * self.rows + start, step * self.rows + stop)])


@dataclass(frozen=True)
class PretrainParts:
    """What a method decides.

    Attributes:
        model: trained in place; saved by its own ``save_pretrained``.
        objective: what it is trained on; its own weights, if any, are saved beside the model.
        train: the batches it reads.
        valid: held-out batches, the same for every model of a comparison; the objective on them is ``val/loss``.
        processor: tokenizer or image processor, saved with the model.
        usage: how the model must be called, as JSON data: ``model/pretraining.json``.
        opening: the ``Auto`` class of transformers that opens ``model/``.
        probes: measured at every evaluation.
        final_probes: measured once, at the end.
        positions_per_row: token positions that pass through the network for one row, padding included.
        targets_per_row: positions of one row that carry loss, on average.
    """

    model: nn.Module
    objective: Objective
    train: BatchStream
    valid: Sequence[Mapping[str, Tensor]]
    processor: Any = None  # Any: tokenizers and image processors share no class
    usage: Mapping[str, Any] = field(default_factory=dict)  # Any: JSON data
    opening: str = "AutoModel"
    probes: tuple[Probe, ...] = ()
    final_probes: tuple[Probe, ...] = ()
    positions_per_row: float = 0.0
    targets_per_row: float = 0.0


class Pretraining(Recipe):
    """Family of the stage ``pretrain``, for any kind of data: one hook, ``parts``."""

    optim: OptimSpec = Field(
        default=OptimSpec(lr=1e-3, weight_decay=0.1, warmup=0.02), description="how weights are moved"
    )
    budget: GivenBudget = Field(description="what the training may spend: tokens, steps, flops or seconds")
    eval_at: EvalAt = Field(
        default=(0.0, 0.25, 0.5, 0.75, 1.0), description="fractions of the budget at which held-out loss is measured"
    )
    fit: FitSettings = Field(
        default=FitSettings(), description="how the loop runs: precision, micro-batches, checkpoints"
    )

    @abstractmethod
    def parts(self, run: Run) -> PretrainParts:
        """Model, objective, data and probes: a pure function of the recipe, called again when a run is resumed."""

    def run(self, run: Run) -> Metrics:
        """Train, measure, save."""
        parts = self.parts(run)
        meter = Meter()
        trained = fit(
            Phase("train", parts.model, parts.train, parts.objective),
            budget=self.budget,
            optim=self.optim,
            seed=self.seed,
            directory=run.directory,
            settings=self.fit,
            evaluate=partial(_measure, parts),
            eval_at=self.eval_at,
            meter=meter,
            on_metrics=partial(_log, run),
        )
        metrics = _measure(parts, trained.model) | _counts(parts, trained)
        _save(parts, run, self)
        for probe in parts.final_probes:
            metrics |= probe(trained.model)
        run.cost = meter.cost.to_dict()
        run.write_json("trajectory.json", {"x": "tokens", "series": _series(trained)})
        return metrics


def _measure(parts: PretrainParts, model: nn.Module) -> Metrics:
    """``val/loss`` on the held-out batches, and the method's probes."""
    total, count = measured_loss(model, parts.objective, parts.valid)
    metrics = {"val/loss": total / count}
    for probe in parts.probes:
        metrics |= probe(model)
    return metrics


def _counts(parts: PretrainParts, trained: Trained) -> Metrics:
    """What was read, what passed through the network, and what carried loss, in tokens."""
    rows = trained.tokens / parts.train.tokens_per_row
    return {
        "tokens_source": float(trained.tokens),
        "tokens_processed": rows * parts.positions_per_row,
        "tokens_target": rows * parts.targets_per_row,
    }


def _series(trained: Trained) -> dict[str, list[tuple[float, float]]]:
    names = {name for point in trained.trajectory for name in point if name.startswith("val/")}
    # Points of the budget that fall on one step share an evaluation.
    return {
        name: list({point["tokens"]: (point["tokens"], point[name]) for point in trained.trajectory}.values())
        for name in sorted(names)
    }


def _log(run: Run, values: dict[str, float]) -> None:
    run.log(values, phase="train")


def _save(parts: PretrainParts, run: Run, recipe: Recipe) -> None:
    parts.model.save_pretrained(run.model)  # type: ignore[operator]  # every Hugging Face model has it
    if parts.processor is not None:
        parts.processor.save_pretrained(run.model)
    own = parts.objective.state_dict() if isinstance(parts.objective, nn.Module) else {}
    if own:
        with atomic_path(run.path("heads.safetensors")) as path:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in own.items()}, path)
    atomic_write_text(run.model / "pretraining.json", json.dumps(dict(parts.usage), indent=2) + "\n")
    lines = [
        f"# {recipe.id}",
        "",
        "```python",
        f"from transformers import {parts.opening}",
        "",
        f"model = {parts.opening}.from_pretrained(DIR)",
        "```",
        "",
        "`pretraining.json` says what it was trained to predict and how its inputs look.",
        "",
    ]
    if own:
        lines += ["What the objective trained beside the model is in `../heads.safetensors`.", ""]
    atomic_write_text(run.model / "README.md", "\n".join(lines))


class TextPretraining(Pretraining):
    """Token streams: documents are split, cleaned of overlap, tokenised and packed; shared probes compare models."""

    model: Model = Field(
        description="architecture and tokenizer: Hub name, local directory, or a small one made here, "
        "e.g. {kind: t5, hidden: 64}"
    )
    from_scratch: bool = Field(default=True, description="draw new weights; false continues from the model's own")
    data: CorpusRef = Field(default=CorpusRef(name="headwater:general"), description="texts to read")
    held_out: float = Field(
        default=0.02,
        gt=0,
        lt=0.5,
        description="share of the documents kept for the final probes; half of it again goes to validation",
    )
    seq_length: int = Field(default=256, ge=8, le=32_768, description="source tokens per row")
    batch_tokens: int = Field(default=16_384, gt=0, description="source tokens per optimizer step")
    probes: tuple[TextProbe, ...] = Field(
        default=(
            TextProbe(name="continuation", corruption=SuffixCorruption(rate=0.5)),
            TextProbe(name="infill", corruption=SpanCorruption(mean_span=3, rate=0.15)),
        ),
        description="what held-out text is asked of every model, whatever it was trained on",
    )
    probe_steps: int = Field(
        default=60,
        gt=0,
        description="fine-tuning steps in each probe's format before adapted/NAME is measured, so that no model is "
        "punished for a format that it never saw",
    )

    @field_validator("probes")
    @classmethod
    def _probe_names_differ(cls, value: tuple[TextProbe, ...]) -> tuple[TextProbe, ...]:
        if len({probe.name for probe in value}) < len(value):
            raise ValueError("two probes have one name")
        return value


FAMILY = Family(
    stage="pretrain",
    gain=Axis("adapted/continuation_bpb", "Continuation, adapted", "lower", "bits/byte"),
    price=Axis("adapted/infill_bpb", "Infilling, adapted", "lower", "bits/byte"),
    columns=(
        Axis("probe/continuation_bpb", "Continuation, as trained", "lower", "bits/byte"),
        Axis("probe/infill_bpb", "Infilling, as trained", "lower", "bits/byte"),
        Axis("tokens_source", "Source tokens", "higher", "tokens", ".3g"),
    ),
    selection=Axis("valid/continuation_bpb", "Validation, continuation", "lower", "bits/byte"),
    selection_price="valid/infill_bpb",
    references={
        "prefix_lm": {
            "method": "ul2",
            "denoisers": [{"mode": "S", "corruption": {"kind": "suffix", "rate": 0.25, "jitter": True}}],
        },
        "span_corruption": {
            "method": "ul2",
            "denoisers": [{"mode": "R", "corruption": {"kind": "span", "mean_span": 3, "rate": 0.15}}],
        },
    },
    baseline="span_corruption",
)
