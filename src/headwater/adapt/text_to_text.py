"""Adaptation to tasks whose answers are written: a pretrained language model and sources with their targets.

What methods that fine-tune a generator share is here: sources and targets without overlap between the sides, the
answers on the task's own and on shifted test sets, what the model could do before and can do after, the cost. A method
adds its fields and ``phases``. The hook is given training and validation pairs; test sets stay with the base.

    id/accuracy    share of answers that are the target, surrounding space aside
    id/chrf        character n-gram F-score of the answers, 0 to 100
    id/nll         - log p(target | source) per token of the target             (nats)

What a method puts around its model answers the task; ``id/accuracy_alone`` is then the model's own share.

Abilities to be kept are named in ``retained``: sources and targets of other tasks, demonstrations included, answered by
the model before and after. ``format`` is the share of those answers that are targets of the task just learned: a model
that has taken on the task's form everywhere answers everything with it.

Source: Popovic, "chrF: character n-gram F-score for automatic MT evaluation", WMT 2015 (through sacrebleu).
"""

from __future__ import annotations

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from pydantic import Field

from headwater.adapt.base import SetName
from headwater.core.budget import GivenBudget, Meter
from headwater.core.cache import atomic_write_text
from headwater.core.fit import FitSettings, Phase, Trained, fit_phases
from headwater.core.leak import Sealed
from headwater.core.lora import LoraSpec
from headwater.core.optim import AnyOptim, OptimSpec
from headwater.core.recipe import DataRef, Metrics, ModelRef, Recipe
from headwater.modalities.text.docs import CorpusError, Document, drop_overlap
from headwater.modalities.text.ledger import ledger, ledger_metrics
from headwater.modalities.text.pairs import PairModel, Pairs, open_pair_model, source_digest
from headwater.modalities.text.sources import open_labelled

if TYPE_CHECKING:
    from torch import nn

    from headwater.core.run import Run

__all__ = ["Answerer", "PairData", "TextTask", "TextToText", "Written", "chrf", "format_share", "read_pairs"]

logger = logging.getLogger(__name__)
MAX_FORMAT_TARGETS = 50
"""Different targets up to which a task has a form of its own."""


def chrf(answers: Sequence[str], targets: Sequence[str]) -> float:
    """Corpus chrF2 of answers against one target each, 0 to 100."""
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF().corpus_score(list(answers), [list(targets)]).score)


def format_share(answers: Sequence[str], targets: Sequence[str]) -> float:
    """Share of answers that, case and surrounding space aside, are among ``targets``; 0 without an answer.

    Source: the measure of "format specialization" of Wang et al., "Two-stage LLM Fine-tuning with Less Specialization
    and More Generalization", arXiv:2211.00635, section 3.
    """
    known = {target.strip().casefold() for target in targets}
    return float(np.mean([answer.strip().casefold() in known for answer in answers])) if len(answers) else 0.0


@dataclass(frozen=True)
class PairData:
    """Everything a task has, test sets included; methods are given a ``TextTask`` instead.

    Attributes:
        train, test: what is learned from, and what the figures are taken on.
        validation: for choosing hyperparameters.
        ood: shifted test sets by name.
        retained: other abilities by name.
        dropped: training pairs left out because they repeat a held-out source.
    """

    train: Pairs
    test: Pairs
    validation: Pairs | None = None
    ood: Mapping[str, Pairs] = field(default_factory=dict)
    retained: Mapping[str, Pairs] = field(default_factory=dict)
    dropped: int = 0

    def __post_init__(self) -> None:
        for role, part in self.parts():
            if not len(part):
                raise CorpusError(f"{role}: there is no pair of source and target.")

    def parts(self) -> list[tuple[str, Pairs]]:
        """Every set with its name."""
        named = [("train", self.train), ("test", self.test)]
        named += [("validation", self.validation)] if self.validation is not None else []
        named += [(f"ood.{name}", part) for name, part in self.ood.items()]
        return named + [(f"retained.{name}", part) for name, part in self.retained.items()]

    @property
    def fingerprint(self) -> str:
        """Of all texts."""
        return hashlib.sha256(
            " ".join(f"{role} {part.fingerprint}" for role, part in self.parts()).encode()
        ).hexdigest()


def read_pairs(
    train: DataRef,
    test: DataRef,
    validation: DataRef | None = None,
    ood: Mapping[str, DataRef] | None = None,
    retained: Mapping[str, DataRef] | None = None,
) -> PairData:
    """Read sources (``input_field``) and targets (``label_field``).

    Training pairs whose source repeats a held-out one, exactly or nearly, are left out and counted.

    Raises:
        CorpusError: nothing there, no such column, or every training source repeats a held-out one.
    """

    def opened(ref: DataRef, role: str) -> Pairs:
        return Pairs(*open_labelled(ref, role=role))

    def opened_all(refs: Mapping[str, DataRef] | None, role: str) -> dict[str, Pairs]:
        return {name: opened(ref, f"{role}.{name}") for name, ref in (refs or {}).items()}

    learned, held = opened(train, "train"), opened(test, "test")
    valid = opened(validation, "validation") if validation is not None else None
    shifted = opened_all(ood, "ood")
    sides = [held, *([valid] if valid is not None else []), *shifted.values()]
    documents = [Document(str(place), source) for place, source in enumerate(learned.sources)]
    apart = [Document(str(place), source) for place, source in enumerate(s for side in sides for s in side.sources)]
    kept = [int(document.id) for document in drop_overlap(documents, apart).kept]
    if not kept:
        raise CorpusError("train: every source repeats one of a test or validation set.")
    clean = Pairs([learned.sources[row] for row in kept], [learned.targets[row] for row in kept])
    return PairData(clean, held, valid, shifted, opened_all(retained, "retained"), len(learned) - len(kept))


class Answerer(Protocol):
    """What answers sources: a ``PairModel``, or what a method puts around one."""

    def answers(self, sources: Sequence[str], *, num_beams: int = 1) -> list[str]:
        """One text for each source."""

    def nats(self, pairs: Pairs) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Negative log-likelihood of each target per token, ``(n,)``."""


@dataclass(frozen=True)
class Written:
    """What a method leaves behind.

    Attributes:
        model: saved to ``model/``, and what answers all but the task: ``retained`` and the ledger are measured on it.
        task: what answers the task; ``model`` where a method does not tell the two apart.
        trainable: numbers that were trained.
        files: further files in the run directory, by what they hold, named in the model's README.
        opening: code that opens ``model/`` as DIR and answers the task, for the README, where it is not the usual one.
        metrics: figures beyond those that every method has.
        examine: further figures on the test pairs, which the base takes; the method has not seen them.
    """

    model: PairModel
    task: Answerer | None = None
    trainable: int | None = None
    files: tuple[str, ...] = ()
    opening: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    examine: Callable[[Pairs], Mapping[str, float]] | None = None


class TextTask:
    """What a method may see of a task.

    Attributes:
        recipe, run: what runs, and where.
        train: pairs to learn from.
        meter: what happens outside ``fit`` is charged here.
        test, ood: sealed; touching them raises ``TestLeak``.
    """

    def __init__(self, data: PairData, recipe: TextToText, run: Run, meter: Meter) -> None:
        self.recipe, self.run, self.meter = recipe, run, meter
        self.train = data.train
        self.test = Sealed("the test set")
        self.ood = Sealed("the shifted test sets")
        self._validation, self._validation_seen = data.validation, False
        apart = [data.test, *([data.validation] if data.validation is not None else []), *data.ood.values()]
        self._held_out = {source_digest(source) for side in apart for source in side.sources}
        self._further = 0

    @property
    def validation(self) -> Pairs:
        """The validation pairs. Looking at them is counted in ``cost/labels``.

        Raises:
            ValueError: the recipe names none.
        """
        if self._validation is None:
            raise ValueError("this method looks at validation pairs; name some in `validation`.")
        self._validation_seen = True
        return self._validation

    @property
    def labels(self) -> int:
        """Targets looked at so far."""
        seen = self._validation if self._validation_seen and self._validation is not None else ()
        return len(self.train) + len(seen) + self._further

    def read(self, ref: DataRef, *, role: str) -> Pairs:
        """Further pairs that a method learns from or looks things up in; counted in ``cost/labels``.

        Raises:
            CorpusError: nothing there, no such column, or a source that is one of a held-out set.
        """
        pairs = Pairs(*open_labelled(ref, role=role))
        leaked = [source for source in pairs.sources if source_digest(source) in self._held_out]
        if leaked:
            raise CorpusError(
                f"{role}: {len(leaked)} of {len(pairs)} sources are in the test, validation or shifted test sets, "
                f"the first being {leaked[0][:80]!r}. Leave them out."
            )
        self.run.record_data(role, pairs.fingerprint)
        self._further += len(pairs)
        return pairs

    def open(self, *, lora: bool = True) -> PairModel:
        """A fresh copy of the recipe's model; in adapters where the recipe says so, unless ``lora`` is false."""
        return self.recipe.open(lora=lora)

    def phase(self, name: str, model: PairModel, *, share: float, optim: AnyOptim | None = None) -> Phase:
        """Training on the pairs by cross-entropy, for a share of the budget."""
        stream = model.stream(self.train, rows=self.recipe.batch_size, seed=self.recipe.seed)
        return Phase(name, model.model, stream, model.objective, share, optim)


class TextToText(Recipe):
    """Family within ``adapt`` for tasks whose answers are written; one hook, ``phases``."""

    model: ModelRef = Field(
        description="a causal or encoder-decoder language model: Hub name, local directory, builtin"
    )
    train: DataRef = Field(description="sources (`input_field`) and targets (`label_field`) to learn from")
    test: DataRef = Field(description="sources and targets for the figures")
    validation: DataRef | None = Field(default=None, description="sources and targets for choosing hyperparameters")
    ood: dict[SetName, DataRef] = Field(default={}, description="shifted test sets by name: ood/NAME/accuracy")
    retained: dict[SetName, DataRef] = Field(
        default={},
        description="other tasks that must not be forgotten, demonstrations in the source: retained/NAME/drop",
    )
    join: str = Field(default=" ", description="between source and target, under a causal model")
    max_source: int = Field(default=512, gt=1, description="tokens of a source; a longer one is cut")
    max_target: int = Field(default=64, gt=0, description="tokens of a target, and of an answer")
    num_beams: int = Field(default=1, gt=0, description="beams when answering; 1 is greedy")
    batch_size: int = Field(default=16, gt=0, description="pairs per optimizer step")
    optim: OptimSpec = Field(default=OptimSpec(), description="how weights are moved")
    lora: LoraSpec | None = Field(default=None, description="train LoRA adapters instead of all weights")
    budget: GivenBudget = Field(description="what the training may spend: steps, tokens, flops or seconds")
    fit: FitSettings = Field(
        default=FitSettings(), description="how the loop runs: precision, micro-batches, checkpoints"
    )

    @abstractmethod
    def phases(self, task: TextTask) -> Generator[Phase, Trained, Written]:
        """Yield each training phase, receive what it trained, return what the run leaves behind.

        Must be a pure function of ``task``: a resumed run goes through it again, and finished phases come back from
        their checkpoints.
        """

    def open(self, *, lora: bool = True) -> PairModel:
        """A fresh copy of ``model``."""
        return open_pair_model(
            self.model,
            max_source=self.max_source,
            max_target=self.max_target,
            join=self.join,
            lora=self.lora if lora else None,
            seed=self.seed,
        )

    def run(self, run: Run) -> Metrics:
        """Read the data and ``run_on`` them."""
        return self.run_on(read_pairs(self.train, self.test, self.validation, self.ood, self.retained), run)

    def run_on(self, data: PairData, run: Run) -> Metrics:
        """Measure, train the phases, measure again, save; for data of your own as well.

        Raises:
            TestLeak: the method reached for a test set.
        """
        run.record_data("pairs", data.fingerprint)
        start = self.open(lora=False)
        before = {name: start.answers(part.sources) for name, part in data.retained.items()}
        ledger_before = _ledger(start)
        meter = Meter()
        task = TextTask(data, self, run, meter)
        written = fit_phases(
            self.phases(task),
            budget=lambda: self.budget,
            optim=self.optim,
            seed=self.seed,
            directory=run.directory,
            settings=self.fit,
            evaluate=_nothing,
            eval_at=(),
            meter=meter,
            log=run.log,
        )
        metrics = self._examine(data, written.task or written.model, run)
        if written.task is not None:
            alone = written.model.answers(data.test.sources, num_beams=self.num_beams)
            metrics["id/accuracy_alone"] = float(np.mean(_right(alone, data.test)))
        for name, part in data.retained.items():
            metrics |= _kept(name, part, before[name], written.model.answers(part.sources), data.train.targets)
        metrics |= ledger_metrics(ledger_before, _ledger(written.model))
        metrics |= {f"cost/{name}": value for name, value in self._costs(data, task, written, run).items()}
        self._save(written, run)
        further = written.examine(data.test) if written.examine is not None else {}
        return {**metrics, "data/dropped_overlap": float(data.dropped), **written.metrics, **further}

    def _examine(self, data: PairData, answerer: Answerer, run: Run) -> Metrics:
        answers = answerer.answers(data.test.sources, num_beams=self.num_beams)
        right = _right(answers, data.test)
        run.write_json("items.json", {"id/accuracy": {"ids": [str(i) for i in range(len(right))], "values": right}})
        shown = zip(data.test.sources, data.test.targets, answers, strict=True)
        run.write_json("answers.json", [dict(zip(("source", "target", "answer"), row, strict=True)) for row in shown])
        metrics = {
            "id/accuracy": float(np.mean(right)),
            "id/chrf": chrf(answers, data.test.targets),
            "id/nll": float(answerer.nats(data.test).mean()),
        }
        for name, part in data.ood.items():
            metrics[f"ood/{name}/accuracy"] = float(
                np.mean(_right(answerer.answers(part.sources, num_beams=self.num_beams), part))
            )
        if data.ood:
            metrics["ood/mean"] = float(np.mean([metrics[f"ood/{name}/accuracy"] for name in data.ood]))
        if data.validation is not None:
            found = answerer.answers(data.validation.sources, num_beams=self.num_beams)
            metrics["validation/accuracy"] = float(np.mean(_right(found, data.validation)))
        return metrics

    def _costs(self, data: PairData, task: TextTask, written: Written, run: Run) -> dict[str, float]:
        trainable = written.trainable
        if trainable is None:
            trainable = task.meter.cost.trainable
        run.cost |= {**task.meter.cost.to_dict(), "labels": task.labels, "trainable": trainable}
        return {
            "trainable": float(trainable),
            "labels": float(task.labels),
            "validation_labels": float(len(data.validation) if data.validation is not None else 0),
        }

    def _save(self, written: Written, run: Run) -> None:
        if not run.is_main_process:
            return
        written.model.save_pretrained(run.model)
        kind = "CausalLM" if written.model.kind == "causal" else "Seq2SeqLM"
        if hasattr(written.model.model, "peft_config"):
            opening = _ADAPTER.format(kind, self.model.name)
        else:
            opening = _PLAIN.format(kind)
        beside = f"\nBeside it in the run directory: {', '.join(written.files)}.\n" if written.files else ""
        about = _README.format(self.id, self.model.name, written.opening or opening, beside)
        atomic_write_text(run.model / "README.md", about)


def _nothing(model: nn.Module) -> dict[str, float]:
    """Nothing is measured on the way."""
    return {}


def _ledger(model: PairModel) -> dict[str, float]:
    if model.kind != "causal":
        return {}
    return ledger(cast(Any, model.model), model.tokenizer)  # Any: a Hugging Face or PEFT model


def _right(answers: Sequence[str], pairs: Pairs) -> list[float]:
    return [float(a.strip() == t.strip()) for a, t in zip(answers, pairs.targets, strict=True)]


def _kept(
    name: str, pairs: Pairs, before: Sequence[str], after: Sequence[str], learned: Sequence[str]
) -> dict[str, float]:
    sides = {side: float(np.mean(_right(found, pairs))) for side, found in (("before", before), ("after", after))}
    metrics = {f"retained/{name}/{side}": value for side, value in sides.items()}
    metrics[f"retained/{name}/drop"] = sides["before"] - sides["after"]
    if len(set(learned)) <= MAX_FORMAT_TARGETS:
        metrics |= {
            f"retained/{name}/format_start": format_share(before, learned),
            f"retained/{name}/format": format_share(after, learned),
        }
    return metrics


_README = """# Fine-tuned by {} from `{}`

```python
{}
```
{}"""
_PLAIN = """from transformers import AutoModelFor{0}, AutoTokenizer

model = AutoModelFor{0}.from_pretrained(DIR)
tokenizer = AutoTokenizer.from_pretrained(DIR)"""
_ADAPTER = """from peft import PeftModel
from transformers import AutoModelFor{0}, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelFor{0}.from_pretrained({1!r}), DIR)
tokenizer = AutoTokenizer.from_pretrained(DIR)"""
