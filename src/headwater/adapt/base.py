"""Adaptation: a pretrained model and labelled examples of a task -> a classifier for that task.

What every method of the stage shares is here: the data, the few shots, the evaluation on the task's own and on shifted
test sets, the cost. A method adds its fields and one hook. The hook is given training and validation examples; test
sets stay with the base.

Every label costs: ``cost/labels`` counts the training examples, and the validation examples if the method looked at
them. Validation accuracy is measured by the base afterwards; ``cost/validation_labels`` are behind it, and belong to
the price of a method whose hyperparameters were chosen by it.
"""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, StringConstraints, model_validator
from safetensors.numpy import save_file

from headwater.adapt.data import Examples, InputKind, TaskData, docstring_task, encode_task, read_task, text_key
from headwater.adapt.metrics import evaluate
from headwater.core.cache import atomic_path, atomic_write_text
from headwater.core.family import Axis, Family
from headwater.core.leak import Sealed
from headwater.core.recipe import DataRef, Metrics, ModelRef, Name, Recipe
from headwater.core.sampling import sample_shots
from headwater.modalities.text.labelled import DOCSTRINGS, open_encoder
from headwater.modalities.vision.labelled import open_image_encoder

if TYPE_CHECKING:
    from torch import nn

    from headwater.core.run import Run

__all__ = [
    "FAMILY",
    "AdaptRecipe",
    "AdaptTask",
    "Adapted",
    "FittedHead",
    "Head",
    "HeadRecipe",
    "WrittenHead",
    "head_arrays",
    "head_files",
]

SetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class Adapted(Protocol):
    """What a method leaves behind."""

    @property
    def trainable_parameters(self) -> int:
        """Numbers that were set by looking at the training examples."""

    def predict_scores(self, inputs: NDArray[Any]) -> NDArray[Any]:  # Any: as in Examples
        """Logits or log-probabilities, ``(n, classes)``, columns in the order of the class indices."""

    def save_pretrained(self, directory: Path) -> None:
        """Leave what was learned in formats that others open, with a ``README.md`` that says how."""


class AdaptTask:
    """What a method may see of a task.

    Attributes:
        train: the training examples, few-shot where the recipe says so.
        label_names, label_texts: name and description of each class.
        test, ood: sealed; touching them raises ``TestLeak``.
        figures: what a method measured about what it learned, by the metric's name; they join the run's metrics.
    """

    def __init__(self, data: TaskData, train: Examples, recipe: AdaptRecipe) -> None:
        self.train = train
        self.label_names = data.label_names
        self.label_texts = data.label_texts
        self.test = Sealed("the test set")
        self.ood = Sealed("the shifted test sets")
        self.figures: dict[str, float] = {}
        self._validation = data.validation
        self._validation_seen = False
        self._elsewhere: int | None = None
        self._model, self._modality = recipe.model, recipe.modality

        def held_out() -> frozenset[str]:
            return frozenset(text_key(text) for role, part in data.parts() if role != "train" for text in part.inputs)

        self._held_out = held_out

    @property
    def validation(self) -> Examples:
        """The validation examples. Looking at them is counted in ``cost/labels``.

        Raises:
            ValueError: the recipe names none.
        """
        if self._validation is None:
            raise ValueError("this method looks at validation examples; name some in `validation`.")
        self._validation_seen = True
        return self._validation

    @property
    def labels(self) -> int:
        """Labels looked at so far."""
        seen = self._validation if self._validation_seen and self._validation is not None else ()
        return (len(self.train) if self._elsewhere is None else self._elsewhere) + len(seen)

    def learn_elsewhere(self, labels: int) -> None:
        """Count so many labels of other data in place of the training examples', which the method does not look at."""
        self._elsewhere = labels

    def repeats_held_out(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Which texts stand in a test or validation set, case and spacing aside, ``(n,)``.

        A method that brings data of its own leaves those out.
        """
        known = self._held_out()
        return np.array([text_key(text) in known for text in texts], dtype=bool)

    def encoder(self) -> tuple[nn.Module, Any]:  # Any: tokenizers and image processors have no common type
        """A fresh copy of the recipe's model without a head, in evaluation mode, and what makes its inputs.

        That is a tokenizer for texts, an image processor for images, and both in one for a dual encoder on images.

        Raises:
            ModelError: the model, or what makes its inputs, cannot be opened.
        """
        if self._modality == "text":
            return open_encoder(self._model)
        model, processor = open_image_encoder(self._model)
        if hasattr(model, "get_text_features"):
            from transformers import AutoProcessor

            from headwater.modalities.models import model_directory

            ref = self._model
            processor = AutoProcessor.from_pretrained(
                model_directory(ref), revision=ref.revision, trust_remote_code=ref.trust_remote_code
            )
        return model, processor


class AdaptRecipe(Recipe):
    """Family of the stage ``adapt``: one hook, ``adapt``."""

    modality: InputKind = Field(default="text", description="what the examples are")
    model: ModelRef = Field(description="the pretrained encoder: Hub name, local directory or builtin")
    train: DataRef = Field(
        default=DataRef(name=DOCSTRINGS),
        description="labelled training examples; the builtin brings its own validation and test",
    )
    test: DataRef | None = Field(
        default=None, description="labelled test examples; required unless `train` is the builtin"
    )
    validation: DataRef | None = Field(default=None, description="labelled examples for choosing hyperparameters")
    ood: dict[SetName, DataRef] = Field(
        default={}, description="shifted test sets with the same labels, by name: ood/NAME/accuracy"
    )
    label_texts: dict[Name, Name] = Field(
        default={}, description="a description of each label, for methods that read them; by default the label itself"
    )
    shots: int | None = Field(
        default=None, gt=0, description="training examples per class, drawn from the seed, nested; null for all"
    )
    max_tokens: int | None = Field(
        default=128, gt=0, description="tokens of each text that the model reads; null for as many as it can"
    )

    @model_validator(mode="after")
    def _test_given(self) -> Self:
        if self.train.name == DOCSTRINGS:
            if self.modality != "text":
                raise ValueError(f"{DOCSTRINGS!r} holds texts; name labelled images in `train` and `test`")
            given = [name for name in ("test", "validation", "ood", "label_texts") if getattr(self, name)]
            plain = DataRef(name=DOCSTRINGS)
            given += [f"train.{name}" for name, value in self.train if value != getattr(plain, name)]
            if given:
                raise ValueError(
                    f"{DOCSTRINGS!r} is a whole task with its own validation, test and descriptions; leave out "
                    + ", ".join(given)
                )
        elif self.test is None:
            raise ValueError(f"`test` is missing: name the labelled {self.modality}s that the method is evaluated on")
        return self

    @abstractmethod
    def adapt(self, task: AdaptTask, run: Run) -> Adapted:
        """Learn the task from ``task.train``; called once."""

    def further(self, adapted: Adapted, test: Examples, run: Run) -> Metrics:
        """Figures of a method's own on the test set, after it has learned; none by default."""
        return {}

    def run(self, run: Run) -> Metrics:
        """Read the data, as features if the method reads those, and ``run_on`` them."""
        return self.run_on(self.load(), run)

    def load(self) -> TaskData:
        """The data that the fields name."""
        if self.test is None:
            return docstring_task()
        return read_task(self.train, self.test, self.validation, self.ood, self.label_texts, modality=self.modality)

    def run_on(self, data: TaskData, run: Run) -> Metrics:
        """Adapt, evaluate, save; for data of your own as well.

        Raises:
            TestLeak: the method reached for a test set.
            ValueError: its scores have another shape than ``(n, classes)`` or are not finite, or a class has fewer
                examples than ``shots``.
        """
        run.record_data("task", data.fingerprint)
        train = data.train
        if self.shots is not None:
            train = train.take(sample_shots(train.labels, self.shots, self.seed))
        task = AdaptTask(data, train, self)
        begin = time.perf_counter()
        adapted = self.adapt(task, run)
        fit_seconds = time.perf_counter() - begin

        begin = time.perf_counter()
        scores = _scores(adapted, "test", data.test, len(data.label_names))
        predict_seconds = time.perf_counter() - begin
        metrics = {f"id/{name}": value for name, value in evaluate(scores, data.test.labels).items()}
        shifted = {name: _accuracy(adapted, f"ood.{name}", part, data) for name, part in data.ood.items()}
        metrics |= {f"ood/{name}/accuracy": value for name, value in shifted.items()}
        if shifted:
            metrics["ood/mean"] = sum(shifted.values()) / len(shifted)
        if data.validation is not None:
            metrics["validation/accuracy"] = _accuracy(adapted, "validation", data.validation, data)
        correct = (scores.argmax(1) == data.test.labels).astype(float).tolist()
        ids = [str(row) for row in range(len(correct))]
        run.write_json("items.json", {"id/accuracy": {"ids": ids, "values": correct}})
        metrics |= self.further(adapted, data.test, run)
        adapted.save_pretrained(run.model)

        labels, trainable = float(task.labels), float(adapted.trainable_parameters)
        run.cost |= {"seconds": fit_seconds, "labels": labels, "trainable": trainable}
        metrics |= task.figures
        return metrics | {
            "data/dropped_overlap": float(data.dropped_overlap),
            "cost/fit_seconds": fit_seconds,
            "cost/features_seconds": data.features_seconds,
            "cost/predict_ms_per_1k": 1e6 * predict_seconds / len(data.test),
            "cost/trainable": trainable,
            "cost/labels": labels,
            "cost/validation_labels": float(len(data.validation) if data.validation is not None else 0),
        }


def _scores(adapted: Adapted, role: str, part: Examples, classes: int) -> NDArray[Any]:  # Any: a float dtype
    scores = np.asarray(adapted.predict_scores(part.inputs))
    if scores.shape != (len(part), classes):
        raise ValueError(f"{role}: scores must have shape ({len(part)}, {classes}); got {scores.shape}.")
    # -inf is a probability of 0, which an nll of inf would report; a row of nothing else, or NaN, means nothing.
    if np.isnan(scores).any() or not np.isfinite(scores.max(1)).all():
        raise ValueError(f"{role}: scores are not finite; an answer over them would mean nothing.")
    return scores


def _accuracy(adapted: Adapted, role: str, part: Examples, data: TaskData) -> float:
    return float((_scores(adapted, role, part, len(data.label_names)).argmax(1) == part.labels).mean())


class Head(Protocol):
    """A fitted scikit-learn classifier; linear ones have ``coef_`` and ``intercept_``."""

    classes_: Any  # Any: class indices

    def predict_log_proba(self, X: NDArray[Any]) -> Any:  # Any: features; an array of log-probabilities
        """Log-probabilities, ``(n, classes)``."""


class WrittenHead(Head, Protocol):
    """A head that is more than one linear map: it says itself what it predicts by, and how."""

    def arrays(self) -> Mapping[str, Mapping[str, NDArray[Any]]]:  # Any: a float dtype
        """Named arrays for each file to write; ``head`` stands for ``head.safetensors``."""

    def usage(self) -> str:
        """How to predict by them without us: the last paragraphs of ``README.md``."""


class HeadRecipe(AdaptRecipe):
    """Family within ``adapt``: a classifier on features of the frozen model; one hook, ``head``.

    Every head is given the same features, computed once and kept in the user cache. With ``at_shots`` it leaves
    ``trajectory.json``, which the report of a comparison draws.
    """

    normalize: bool = Field(default=True, description="scale each feature vector to unit length")
    prior: Literal["uniform", "empirical"] = Field(
        default="uniform", description="of the classes: all alike, or as frequent as in the training examples"
    )
    at_shots: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        default=(),
        description="also fit and test the head with so many examples per class, those of `shots` first; for curves",
    )

    @model_validator(mode="after")
    def _at_shots_among_shots(self) -> Self:
        if self.shots is not None and self.at_shots and max(self.at_shots) > self.shots:
            raise ValueError(f"at_shots: {max(self.at_shots)} is more than shots, {self.shots}, whose labels are paid")
        return self

    @abstractmethod
    def head(self, task: AdaptTask, run: Run) -> Head:
        """A classifier fitted to ``task.train``, whose inputs are features ``(n, D)``."""

    def load(self) -> TaskData:
        """The data that the fields name, as features."""
        return encode_task(
            super().load(),
            self.model,
            modality=self.modality,
            max_tokens=self.max_tokens,
            normalize=self.normalize,
        )

    def run_on(self, data: TaskData, run: Run) -> Metrics:
        """As every adaptation; with ``at_shots``, accuracy, calibration error and seconds over shots besides."""
        if self.at_shots:  # first, so that what a head writes down is that of the run's own shots
            run.write_json("trajectory.json", {"x": "examples per class", "series": self._over_shots(data, run)})
        return super().run_on(data, run)

    def _over_shots(self, data: TaskData, run: Run) -> dict[str, list[tuple[int, float]]]:
        series: dict[str, list[tuple[int, float]]] = {axis.metric: [] for axis in FAMILY.trajectories}
        for shots in sorted(set(self.at_shots)):
            train = data.train.take(sample_shots(data.train.labels, shots, self.seed))
            begin = time.perf_counter()
            adapted = self.adapt(AdaptTask(data, train, self), run)
            seconds = time.perf_counter() - begin
            scores = _scores(adapted, "test", data.test, len(data.label_names))
            measured = {f"id/{name}": value for name, value in evaluate(scores, data.test.labels).items()}
            measured["cost/fit_seconds"] = seconds
            for metric, points in series.items():
                points.append((shots, measured[metric]))
        return series

    def adapt(self, task: AdaptTask, run: Run) -> FittedHead:
        """Fit the head."""
        if task.train.inputs.ndim != 2:
            raise ValueError(f"{self.id} reads features (n, D); got inputs of shape {task.train.inputs.shape}.")
        about = {
            "modality": self.modality,
            "model": str(self.model),
            "max_tokens": self.max_tokens,
            "unit_length": self.normalize,
            "labels": list(task.label_names),
        }
        return FittedHead(self.head(task, run), about)


@dataclass(frozen=True)
class FittedHead:
    """A head and how its features are made.

    Attributes:
        head: the fitted classifier.
        about: ``modality``, ``model``, ``max_tokens`` and ``unit_length`` of the features; ``labels``, the class names.
    """

    head: Head
    about: Mapping[str, Any]  # Any: JSON data

    @property
    def trainable_parameters(self) -> int:
        """Numbers that the head predicts by."""
        return sum(array.size for arrays in head_files(self.head).values() for array in arrays.values())

    def predict_scores(self, inputs: NDArray[Any]) -> NDArray[Any]:  # Any: features; a float dtype
        """Log-probabilities, ``(n, classes)``."""
        return np.asarray(self.head.predict_log_proba(inputs))

    def save_pretrained(self, directory: Path) -> None:
        """Write ``head.safetensors`` or what files the head asks for, ``head.json`` and ``README.md``."""
        files = head_files(self.head)
        for stem, arrays in files.items():
            with atomic_path(directory / f"{stem}.safetensors") as path:
                save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
        said = {"format": 1, "kind": type(self.head).__name__, **self.about}
        atomic_write_text(directory / "head.json", json.dumps(said, indent=2) + "\n")
        held = [
            f"`{stem}.safetensors` holds " + ", ".join(f"`{name}` {array.shape}" for name, array in arrays.items())
            for stem, arrays in files.items()
        ]
        tokens = "all tokens" if self.about["max_tokens"] is None else f"up to {self.about['max_tokens']} tokens"
        made = _OF_IMAGES if self.about["modality"] == "image" else _OF_TEXTS.format(tokens)
        atomic_write_text(
            directory / "README.md",
            _README.format(
                kind=said["kind"],
                classes=len(self.about["labels"]),
                held="; ".join(held),
                model=self.about["model"],
                made=made,
                length=", scaled to unit length" if self.about["unit_length"] else "",
                use=_usage(self.head, files),
            ),
        )


def head_files(head: Head) -> Mapping[str, Mapping[str, NDArray[Any]]]:  # Any: a float dtype
    """What a fitted head predicts by, for each file to write: a ``WrittenHead`` says it, others have ``head`` alone."""
    own = getattr(head, "arrays", None)
    return {"head": head_arrays(head)} if own is None else own()


def _usage(head: Any, files: Mapping[str, Mapping[str, NDArray[Any]]]) -> str:  # Any: with or without `usage`
    if hasattr(head, "usage"):
        return str(head.usage())
    weight = files["head"].get("weight")
    return _OTHER if weight is None else _LINEAR.format(weight.shape[1], weight.shape[0])


def head_arrays(head: Head) -> dict[str, NDArray[Any]]:  # Any: a float dtype
    """What a fitted head predicts by.

    Returns:
        ``weight`` ``(classes, D)`` and ``bias`` ``(classes,)`` of a linear head; otherwise its fitted float arrays by
        their scikit-learn names.
    """
    if not hasattr(head, "coef_"):
        fitted = {name: value for name, value in vars(head).items() if name.endswith("_") and name[0] != "_"}
        return {name: v for name, v in fitted.items() if isinstance(v, np.ndarray) and v.dtype.kind == "f"}
    weight, bias = np.asarray(head.coef_), np.atleast_1d(head.intercept_)  # type: ignore[attr-defined]  # checked above
    if len(weight) == 1:  # two classes: one row that speaks for the second
        weight, bias = np.concatenate((0 * weight, weight)), np.concatenate((0 * bias, bias))
    return {"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)}


_README = """# A head on frozen features

A {kind} for {classes} classes, which `head.json` names in the order of their indices. {held}.

Features: `{model}`, {made}{length}. `headwater.modalities.features.extract_features` makes them.

{use}"""
_OF_TEXTS = """{} of each text, one vector as the checkpoint pools them (else the mean over tokens, or
the last token of a decoder)"""
_OF_IMAGES = """each image as the checkpoint's image processor makes it, one vector: the projected features of a
dual encoder; else the pooled output; else the class token; else the mean over patches or positions"""
_LINEAR = """    import torch
    from safetensors.torch import load_file
    head = torch.nn.Linear({}, {})
    head.load_state_dict(load_file("head.safetensors"))
    head(features).softmax(-1)        # class probabilities
"""
_OTHER = "The arrays bear the names that scikit-learn gives them on the class named above.\n"


FAMILY = Family(
    stage="adapt",
    gain=Axis("id/accuracy", "Accuracy", "higher"),
    price=None,
    columns=(
        Axis("ood/mean", "Accuracy, shifted", "higher"),
        Axis("id/macro_f1", "Macro F1", "higher"),
        Axis("id/nll", "Log loss", "lower", "nats"),
        Axis("id/ece", "Calibration error", "lower"),
    ),
    selection=Axis("validation/accuracy", "Validation accuracy", "higher"),
    selection_price=None,
    references={
        "logistic-regression": {"method": "sklearn_head", "estimator": "logistic_regression", "tune": {}},
        "lda": {"method": "sklearn_head", "estimator": "lda", "tune": {}},
        "gaussian-nb": {"method": "sklearn_head", "estimator": "gaussian_nb", "tune": {}},
        "nearest-centroid": {"method": "sklearn_head", "estimator": "nearest_centroid", "tune": {}},
    },
    baseline="logistic-regression",
    trajectories=(
        Axis("id/accuracy", "Accuracy", "higher"),
        Axis("id/ece", "Calibration error", "lower"),
        Axis("cost/fit_seconds", "Fit", "lower", "s"),
    ),
    on_the_way="Measured on the test examples, after fits to the first of the training examples",
)
