r"""Meta-tuning: one yes/no question about a text after another, so that a model answers questions it has never seen.

    input = q \n x,   p(yes | q, x) = softmax over the logits of "yes" and "no" alone
    loss  = - log p(answer | q, x)                                  over questions of many labelled data sets

A label of a new task is then a question, and its texts are classified without an example: the label is judged by the
mean of p(yes) over its questions, and the likeliest label is the answer. Each question is judged by its AUC, for which
no threshold is needed.

Source: Zhong, Lee, Zhang and Klein, "Adapting Language Models for Zero-shot Learning by Meta-tuning on Dataset and
Prompt Collections", arXiv:2104.04670.
Differs: the number of texts per label was not to be found and is 1000; yes and no are equally frequent for every label;
causal models, with "answer:" after the text, and classifiers are asked as well as encoder-decoders.
Needs: a pretrained language model or cross-encoder; labelled data sets whose labels are described by questions, none of
them on a task like the one to come.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, model_validator
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from headwater.adapt.base import Adapted, AdaptTask, SetName
from headwater.adapt.data import Examples, text_key
from headwater.adapt.meta_data import LabelDescription, Labelled, build_meta_dataset, check_groups, group_split
from headwater.adapt.tuned import TunedRecipe
from headwater.core.cache import atomic_write_text, cache_key
from headwater.core.fit import Phase, Trained
from headwater.core.objective import Loss
from headwater.core.optim import OptimSpec
from headwater.core.recipe import DataRef, Metrics, Name, Spec
from headwater.modalities.text.class_inputs import ClassStream
from headwater.modalities.text.sources import open_labelled
from headwater.modalities.text.yes_no import YesNoScorer, open_yes_no

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["MetaSet", "MetaTuned", "MetaTuning", "MetaTuningObjective", "ZeroShotClassifier", "description_auc"]

_SMALLEST = np.finfo(np.float64).tiny


class MetaTuningObjective:
    """``- log p(answer)`` summed over questions, from the logits of the two answers alone.

    Args:
        scorer: reads the batch.
    """

    unit = "nats/question"

    def __init__(self, scorer: YesNoScorer) -> None:
        self.scorer = scorer

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """Batch: ``input_ids``, ``attention_mask``, and ``soft_label`` ``(batch, 2)``: no, yes."""
        logits = self.scorer.logits(batch, model).float()
        answers = batch["soft_label"].argmax(1)
        agrees = (logits.argmax(1) == answers).float().mean().detach()
        return Loss(F.cross_entropy(logits, answers, reduction="sum"), len(answers), {"agrees": agrees})


class ZeroShotClassifier:
    """Classes described by questions; nothing is fitted.

    Args:
        scorer: answers them.
        questions: class -> its questions, of which the mean of p(yes) is taken.

    Attributes:
        classes_: in the order of ``questions``.

    Raises:
        ValueError: no class, or a class without a question.
    """

    def __init__(self, scorer: YesNoScorer, questions: Mapping[str, Sequence[str]]) -> None:
        if bare := [name for name, own in questions.items() if not own]:
            raise ValueError(f"class {bare[0]!r} has no question; describe it with one at least.")
        if not questions:
            raise ValueError("there is no class; give a question for each.")
        self.scorer, self.questions = scorer, {name: tuple(own) for name, own in questions.items()}
        self.classes_ = np.array(list(questions))

    def question_scores(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """``logit(yes) - logit(no)`` of every question in order, ``(n, questions)``."""
        columns = [
            self.scorer.score(texts, [question] * len(texts)) for own in self.questions.values() for question in own
        ]
        return np.stack(columns, axis=1)

    def predict_proba(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """p(yes) of each class by itself, ``(n, classes)``; rows need not sum to 1."""
        probabilities = 1 / (1 + np.exp(-self.question_scores(texts)))
        borders = np.cumsum([len(own) for own in self.questions.values()])[:-1]
        return np.stack([part.mean(1) for part in np.split(probabilities, borders, axis=1)], axis=1)

    def predict(self, texts: Sequence[str]) -> NDArray[Any]:  # Any: a string dtype
        """The likeliest class, ``(n,)``."""
        found: NDArray[Any] = self.classes_[self.predict_proba(texts).argmax(1)]
        return found


def description_auc(scores: NDArray[np.float64], answers: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Area under the ROC curve of each question, ``(questions,)``; NaN where only one answer occurs.

    Args:
        scores: ``(n, questions)``.
        answers: whether yes is right, same shape.
    """
    return np.array(
        [
            roc_auc_score(own, column) if 0 < own.sum() < len(own) else np.nan
            for column, own in zip(scores.T, answers.T, strict=True)
        ]
    )


class MetaSet(Spec):
    """A labelled data set and what its labels mean."""

    data: DataRef = Field(description="texts and labels")
    questions: dict[Name, tuple[Name, ...]] = Field(
        min_length=1, description="label -> questions that are true of its texts; other labels answer no"
    )
    group: Name = Field(description="what kind of task it is; alike data sets share one")


@dataclass(frozen=True, eq=False)
class MetaTuned:
    """A model that answers questions, and those that describe the task.

    Attributes:
        classifier: the classes of the task.
        start: the checkpoint that it was trained from.
        trainable_parameters: numbers that were trained.
        held: held-out data sets, texts and labels by name.
        counts: figures about the data.
    """

    classifier: ZeroShotClassifier
    start: str
    trainable_parameters: int
    held: Mapping[str, Labelled]
    counts: Metrics

    def predict_scores(self, inputs: NDArray[Any]) -> NDArray[np.float64]:  # Any: texts
        """Logarithms of p(yes), ``(n, classes)``."""
        found: NDArray[np.float64] = np.log(np.maximum(self.classifier.predict_proba(list(inputs)), _SMALLEST))
        return found

    def save_pretrained(self, directory: Path) -> None:
        """Write the model as transformers opens it, and a ``README.md`` that says how to ask it."""
        scorer = self.classifier.scorer
        scorer.model.save_pretrained(directory)  # type: ignore[operator]  # a Hugging Face model
        scorer.tokenizer.save_pretrained(directory)
        kind, code = _OPENING[scorer.kind]
        asked = "\n".join(f"- {name}: {' / '.join(own)}" for name, own in self.classifier.questions.items())
        ids = list(scorer.answers or ())
        about = _README.format(
            start=self.start, yes=scorer.yes, no=scorer.no, kind=kind, code=code.format(ids=ids), asked=asked
        )
        atomic_write_text(directory / "README.md", about)


class MetaTuning(TunedRecipe):
    """Train on the questions of many data sets, and answer those of a task that none of them is like.

    The task's training texts give the names of its labels and nothing else.
    """

    id: ClassVar[str] = "meta_tuning"

    datasets: dict[SetName, MetaSet] = Field(min_length=1, description="what is trained on, by name")
    group: Name = Field(default="target", description="the task's own group, which must not be trained on")
    holdout: tuple[Name, ...] = Field(
        default=(), description="groups of `datasets` that are not trained on; their questions are measured as well"
    )
    questions: dict[Name, Annotated[tuple[Name, ...], Field(min_length=2)]] = Field(
        default={}, description="several questions for a label of the task, in place of the one in `label_texts`"
    )
    per_label: int = Field(default=1000, gt=1, description="at most so many texts of each label")
    yes: Name = Field(default="yes", description="the word for yes, one token; a classifier does not read it")
    no: Name = Field(default="no", description="the word for no, one token")
    optim: OptimSpec = Field(
        # The paper's: 1e-5, 100 of 5,000 steps of 32 to warm up, a linear decay.
        default=OptimSpec(lr=1e-5, betas=(0.9, 0.999), warmup=0.02, schedule="linear", final_lr=0.0),
        description="how weights are moved",
    )

    @model_validator(mode="after")
    def _groups_apart(self) -> Self:
        if "task" in self.datasets:
            raise ValueError("datasets: 'task' means the task itself in the figures; give that data set another name.")
        train, _ = group_split(self._descriptions(), self.holdout)
        check_groups({description.dataset: description.group for description in train}, [self.group])
        return self

    def _descriptions(self) -> list[LabelDescription]:
        return [
            LabelDescription(name, label, question, own.group)
            for name, own in self.datasets.items()
            for label, questions in own.questions.items()
            for question in questions
        ]

    def open(self) -> YesNoScorer:
        """A fresh copy of ``model``."""
        return open_yes_no(self.model, yes=self.yes, no=self.no, max_tokens=self.max_tokens, seed=self.seed)

    def _asked(self, names: Sequence[str], texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
        if unknown := sorted(set(self.questions) - set(names)):
            raise ValueError(f"questions: the task has no label {unknown[0]!r}; there are {', '.join(names)}.")
        return {name: self.questions.get(name, (text,)) for name, text in zip(names, texts, strict=True)}

    def phases(self, task: AdaptTask, run: Run) -> Generator[Phase, Trained, MetaTuned]:
        """One phase, on the questions of all data sets that are not held out."""
        asked = self._asked(task.label_names, task.label_texts)
        read = {name: open_labelled(own.data, role=f"datasets.{name}") for name, own in self.datasets.items()}
        run.record_data("meta", cache_key(read))
        train, _ = group_split(self._descriptions(), self.holdout)
        names = {description.dataset for description in train}
        held = {name: part for name, part in read.items() if name not in names}
        unseen = {text_key(text) for texts, _ in held.values() for text in texts}
        seen = {name: _without(task, unseen, read[name]) for name in sorted(names)}
        labels = sum(len(texts) for texts, _ in seen.values())
        task.learn_elsewhere(labels)
        dropped = sum(len(read[name][0]) for name in names) - labels
        meta = build_meta_dataset(seen, train, per_label=self.per_label, seed=self.seed)
        scorer = self.open()
        inputs = scorer.encode(meta["text"][:], meta["question"][:])
        targets = np.eye(2, dtype=np.float32)[meta["answer"][:]]
        pad = int(scorer.tokenizer.pad_token_id)
        stream = ClassStream(inputs, targets, rows=self.batch_size, seed=self.seed, pad=pad)
        trained = yield Phase("meta_tuning", scorer.model, stream, MetaTuningObjective(scorer))
        classifier = ZeroShotClassifier(scorer, asked)
        counts = {"data/meta_dropped_overlap": float(dropped), "data/meta_questions": float(len(inputs))}
        return MetaTuned(classifier, self.model.name, trained.cost.trainable, held, counts)

    def further(self, adapted: Adapted, test: Examples, run: Run) -> Metrics:
        """AUC of every question, before and after training: those of the task and of held-out groups.

        Leaves ``auc_per_description.csv``; a question that only one answer occurs for has no AUC and is not averaged.
        """
        assert isinstance(adapted, MetaTuned), "phases returns one"
        after, before = adapted.classifier.scorer, self.open()
        names = list(adapted.classifier.questions)
        sets = {"task": (list(test.inputs), [names[label] for label in test.labels])} | dict(adapted.held)
        rows: list[list[Any]] = []  # Any: texts and figures
        for name, (texts, labels) in sets.items():
            own = adapted.classifier.questions if name == "task" else self.datasets[name].questions
            group = self.group if name == "task" else self.datasets[name].group
            asked = [(label, question) for label, questions in own.items() for question in questions]
            truth = np.array([[found == label for label, _ in asked] for found in labels])
            sides = [
                description_auc(ZeroShotClassifier(scorer, own).question_scores(texts), truth)
                for scorer in (before, after)
            ]
            for (label, question), yes, start, tuned in zip(asked, truth.sum(0), *sides, strict=True):
                rows.append([name, group, label, question, int(yes), len(texts) - int(yes), start, tuned])
        atomic_write_text(run.directory / "auc_per_description.csv", _table(rows))
        known = [row for row in rows if np.isfinite(row[-1])]
        metrics = {"auc/undefined": float(len(rows) - len(known)), **adapted.counts}
        of = {"": known} | {f"{name}/": [row for row in known if row[0] == name] for name in sets}
        for name, part in of.items():
            if part:
                start, tuned = np.array([row[-2:] for row in part], dtype=np.float64).T
                metrics[f"auc/{name}mean"] = float(tuned.mean())
                metrics[f"auc/{name}start"] = float(start.mean())
        if known:
            metrics["auc/improved"] = float(np.mean([row[-1] > row[-2] for row in known]))
        return metrics


def _without(task: AdaptTask, unseen: set[str], part: Labelled) -> Labelled:
    """Texts that stand neither in a test set of the task nor in a held-out data set."""
    texts, labels = part
    kept = [
        row
        for row, repeated in enumerate(task.repeats_held_out(texts))
        if not repeated and text_key(texts[row]) not in unseen
    ]
    return [texts[row] for row in kept], [labels[row] for row in kept]


def _table(rows: Sequence[Sequence[Any]]) -> str:  # Any: texts and figures
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["set", "group", "label", "question", "positives", "negatives", "auc_start", "auc"])
    writer.writerows([["" if value != value else value for value in row] for row in rows])  # NaN differs from itself
    return stream.getvalue()


_README = """# Meta-tuned from `{start}`

Answers questions about texts with {yes} or {no}; both in lower case.

```python
import torch
from transformers import {kind}, AutoTokenizer

model = {kind}.from_pretrained(DIR)
tokenizer = AutoTokenizer.from_pretrained(DIR)
{code}
```

The questions of its task:

{asked}
"""
_OPENING = {
    "causal": (
        "AutoModelForCausalLM",
        "start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]\n"
        'asked = [f"{{question}}\\n", text, "\\nanswer:"]\n'
        "ids = start + [i for part in asked for i in tokenizer(part, add_special_tokens=False).input_ids]\n"
        "logits = model(torch.tensor([ids])).logits[0, -1]\n"
        "p_yes = logits[{ids}].softmax(-1)[1]",
    ),
    "seq2seq": (
        "AutoModelForSeq2SeqLM",
        'inputs = tokenizer(f"{{question}}\\n{{text}}", return_tensors="pt")\n'
        "start = torch.tensor([[model.config.decoder_start_token_id]])\n"
        "logits = model(**inputs, decoder_input_ids=start).logits[0, 0]\n"
        "p_yes = logits[{ids}].softmax(-1)[1]",
    ),
    "classifier": (
        "AutoModelForSequenceClassification",
        'logits = model(**tokenizer(question, text, return_tensors="pt")).logits[0]\n'
        "p_yes = logits.softmax(-1)[1] if len(logits) == 2 else logits.sigmoid()[0]",
    ),
}
