"""Labelled tasks within the family of continued pretraining: few labels, and much text of the same kind without.

What methods that learn from labels share is here: labelled texts in three parts, unlabelled text that is clean of the
held-out ones, pseudo-labels on disk, a classification head beside the language model, and the accuracy before and
after. A method fills in ``learn``. The language model stays one, so domain and general text are scored as for every
method of the stage.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator

from headwater.core.cache import atomic_write_text, cache_dir
from headwater.core.fit import Phase, Trained
from headwater.core.leak import Sealed
from headwater.core.recipe import CorpusRef, DataRef, Metrics
from headwater.core.rng import derive_seed
from headwater.domain.adaptation import Adaptation
from headwater.domain.base import Adapted, ContinuedPretraining
from headwater.modalities.text.class_inputs import ClassStream, Inputs, input_lengths
from headwater.modalities.text.docs import Document, fingerprint
from headwater.modalities.text.document_store import DocumentStore, stored_corpus, write_documents
from headwater.modalities.text.heads import HeadedModel, put_head
from headwater.modalities.text.labelled_split import LabelledSplit, LabelledTexts, read_labelled
from headwater.modalities.text.prepared import SplitCorpus, drop_repeats

if TYPE_CHECKING:
    from torch import nn

    from headwater.core.objective import Objective
    from headwater.core.run import Run
    from headwater.modalities.text.classes import ClassModel

__all__ = [
    "Answering",
    "FineTuned",
    "LabelTask",
    "LabelledPretraining",
    "LabelledSplit",
    "LabelledTexts",
    "clean_unlabelled",
    "read_labelled",
]

TASK = "labelled"
Role = Literal["start", "end"]


def clean_unlabelled(store: DocumentStore, held_out: Sequence[str]) -> tuple[DocumentStore, int]:
    """Unlabelled documents without those that repeat, exactly or nearly, a held-out labelled text; and how many left.

    Raises:
        CorpusError: none is left.
    """
    held = [Document(str(place), text) for place, text in enumerate(held_out)]
    written = write_documents(held, cache_dir("documents") / f"{fingerprint(held)}.labelled.arrow")
    nothing = store.select([])
    split = SplitCorpus(store, nothing, nothing, store.fingerprint, (1.0, 0.0, 0.0))
    clean, dropped = drop_repeats({"unlabelled": split}, {"labelled": written})
    return clean["unlabelled"].train, dropped


class Answering(Protocol):
    """A language model that is trained to answer with classes: through a head beside it, or in words of its own."""

    @property
    def model(self) -> nn.Module:
        """The language model, in adapters where there are any."""
        ...

    @property
    def classes(self) -> ClassModel:
        """It as a classifier."""
        ...

    @property
    def objective(self) -> Objective:
        """What ``fit`` minimises."""
        ...

    def whole(self) -> ClassModel:
        """The classifier as it can be saved, adapters merged."""
        ...


class LabelTask:
    """What a method of the narrower family works with.

    Attributes:
        recipe: what runs.
        labels: the classes by name, in order.
        train: labelled texts to learn from; each label is counted.
        valid: labelled texts to choose by; may be empty.
        unlabelled: documents on disk.
        test: sealed; touching it raises ``TestLeak``.
    """

    def __init__(
        self, recipe: LabelledPretraining, ctx: Adaptation, split: LabelledSplit, unlabelled: DocumentStore, exam: _Exam
    ) -> None:
        self.recipe, self.labels, self.unlabelled = recipe, split.labels, unlabelled
        self.train, self.valid, self.test = split.train, split.valid, Sealed("the labelled test set")
        self._ctx, self._exam = ctx, exam

    def headed(self) -> HeadedModel:
        """A fresh copy of the starting model with a new head beside it; the same weights at every call."""
        ctx, recipe = self._ctx, self.recipe
        return put_head(
            ctx.start(lora=False),
            recipe.model,
            self.labels,
            max_tokens=ctx.seq_len,
            seed=recipe.seed,
            lora=recipe.lora,
        )

    def phase(self, name: str, headed: Answering, inputs: Inputs, targets: ArrayLike, *, share: float) -> Phase:
        """Training of model and head on ``targets``, distributions ``(n, classes)``, for a share of the budget."""
        rows = max(1, int(self.recipe.batch_tokens / max(1.0, float(input_lengths(inputs).mean()))))
        seed = derive_seed(self.recipe.seed, name)
        stream = ClassStream(inputs, targets, rows=rows, seed=seed, pad=headed.classes.pad)
        return Phase(name, headed.model, stream, headed.objective, share)

    def fine_tuning(self, name: str, headed: Answering, *, share: float) -> Phase:
        """Training on the true labels."""
        inputs = headed.classes.encode(self.train.texts)
        return self.phase(name, headed, inputs, self.train.one_hot(len(self.labels)), share=share)

    def validated(self, classes: ClassModel) -> float | None:
        """Accuracy on the validation texts; ``None`` where there are none."""
        if not len(self.valid):
            return None
        return float((classes.probabilities(self.valid.texts).argmax(1) == self.valid.classes).mean())

    def hand_in(self, role: Role, headed: Answering) -> None:
        """Give a finished classifier to the evaluator, which saves it and examines it on the test.

        Args:
            role: ``start`` for what fine-tuning alone gives, ``end`` for the method's result.
            headed: after its training.
        """
        self._exam.take(role, headed)


class _Exam:
    """Holds the labelled test, which no hook sees."""

    def __init__(self, split: LabelledSplit, run: Run, start: str) -> None:
        self._split, self._run, self._start = split, run, start
        self.taken: dict[Role, NDArray[np.bool_]] = {}
        self._confusion: dict[str, list[list[int]]] = {}
        self._valid: dict[Role, float] = {}

    def take(self, role: Role, headed: Answering) -> None:
        split, classes = self._split, headed.classes
        self.taken[role] = classes.probabilities(split.test.texts).argmax(1) == split.test.classes
        if len(split.valid):
            answers = classes.probabilities(split.valid.texts).argmax(1)
            self._valid[role] = float((answers == split.valid.classes).mean())
            table = np.zeros((len(split.labels),) * 2, dtype=np.int64)
            np.add.at(table, (split.valid.classes, answers), 1)
            self._confusion[role] = table.tolist()
        home = self._run.path(_FOLDERS[role])
        whole = headed.whole()
        whole.save_pretrained(home)
        about = (_FOLDERS[role], self._start, ", ".join(split.labels), whole.opening)
        atomic_write_text(home / "README.md", _README.format(*about))

    def metrics(self) -> Metrics:
        """Accuracies on the test, by the family's names; ``labelled.json`` holds each text's, and the confusions."""
        found = {role: float(right.mean()) for role, right in self.taken.items()}
        metrics: Metrics = {f"downstream/{TASK}/accuracy": found["end"]}
        if "start" in found:
            metrics[f"downstream/{TASK}/accuracy_start"] = found["start"]
            metrics[f"downstream/{TASK}/gain"] = found["end"] - found["start"]
        if "end" in self._valid:
            metrics[f"valid/{TASK}_accuracy"] = self._valid["end"]
        about = {
            "labels": list(self._split.labels),
            "right": {role: right.tolist() for role, right in self.taken.items()},
            "validation_confusion": {"rows": "true class", "columns": "answer", **self._confusion},
        }
        self._run.write_json("labelled.json", about)
        return metrics


_FOLDERS: Mapping[Role, str] = {"start": "teacher", "end": "classifier"}
_README = """# {}

Fine-tuned from `{}`; answers with one of {}.

```python
{}
```
"""


class LabelledPretraining(ContinuedPretraining):
    """Family within ``domain``: methods that learn from a few labels and many texts; one hook, ``learn``.

    The classifier is scored on held-out labels as the task ``labelled``: ``downstream/labelled/accuracy`` at the end,
    ``accuracy_start`` for fine-tuning alone where the method does that first, and their difference, ``gain``.
    """

    batch_tokens: int = Field(default=4096, gt=0, description="tokens per optimizer step: so many texts of mean length")
    labelled: DataRef = Field(description="texts and their labels, to learn from")
    labelled_test: DataRef | None = Field(
        default=None, description="texts and labels for the figures; by default a share of `labelled`"
    )
    labelled_held_out: float = Field(
        default=0.2, gt=0, lt=0.5, description="share of `labelled` kept for the test, without `labelled_test`"
    )
    labelled_valid: float = Field(
        default=0.1, ge=0, lt=0.5, description="share of `labelled` kept to choose by; 0 learns from all"
    )
    unlabelled: CorpusRef | None = Field(
        default=None, description="texts of the same kind without labels; by default the domain's training texts"
    )

    @model_validator(mode="after")
    def _one_task_of_that_name(self) -> LabelledPretraining:
        if any(task.name == TASK for task in self.downstream):
            raise ValueError(f"a downstream task cannot be called {TASK!r} here; that is the task of the labels")
        return self

    @abstractmethod
    def learn(self, ctx: Adaptation, task: LabelTask) -> Generator[Phase, Trained, Adapted]:
        """Yield each training phase and hand in the classifiers; a pure function, as ``phases``."""

    def phases(self, ctx: Adaptation) -> Generator[Phase, Trained, Adapted]:
        """Read and clean the labelled and unlabelled texts, learn, examine."""
        split = read_labelled(
            self.labelled, self.labelled_test, held_out=self.labelled_held_out, validation=self.labelled_valid
        )
        ctx.run.record_data(TASK, split.fingerprint)
        store = ctx.domain.train
        if self.unlabelled is not None:
            store = stored_corpus(self.unlabelled, role="unlabelled")
            ctx.run.record_data("unlabelled", store.fingerprint)
        clean, dropped = clean_unlabelled(store, [*split.valid.texts, *split.test.texts])
        exam = _Exam(split, ctx.run, self.model.name)
        ctx.meter.add(labels=len(split.train))
        adapted = yield from self.learn(ctx, LabelTask(self, ctx, split, clean, exam))
        facts = {
            "data/labels": float(len(split.train)),
            "data/unlabelled": float(len(clean)),
            "data/dropped_labelled": float(split.dropped),
            "data/dropped_unlabelled": float(dropped),
        }
        files = ("labelled.json", *(folder for role, folder in _FOLDERS.items() if role in exam.taken))
        return replace(adapted, files=(*adapted.files, *files), metrics={**adapted.metrics, **exam.metrics(), **facts})


class FineTuned(LabelledPretraining):
    """The labels alone: the whole budget goes into fine-tuning on them.

    Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", arXiv:1810.04805, section 3.2.
    """

    id: ClassVar[str] = "fine_tuned"

    def learn(self, ctx: Adaptation, task: LabelTask) -> Generator[Phase, Trained, Adapted]:
        """One phase."""
        headed = task.headed()
        yield task.fine_tuning("finetune", headed, share=1.0)
        task.hand_in("end", headed)
        return Adapted(headed.model)
