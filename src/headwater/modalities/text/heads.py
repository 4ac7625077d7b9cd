"""A classification head that reads with a language model's own modules: one set of weights, two models.

The language model stays what it is and can be scored, continued and saved as such. The classifier is the
architecture's own class (``AutoModelForSequenceClassification``) whose backbone is made of the language model's
modules, so whatever is trained through one is there in the other, and it is saved in that class's own layout. Where it
reads, at the last token of a decoder or the first of an encoder, is that class's choice.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from headwater.core.lora import LoraSpec, add_lora
from headwater.core.objective import Loss
from headwater.core.recipe import ModelRef
from headwater.core.rng import derive_seed
from headwater.modalities.models import ModelError
from headwater.modalities.text.classes import ClassModel, ClassObjective, open_class_model
from headwater.modalities.text.soft_labels import SoftCrossEntropy

__all__ = ["HeadObjective", "HeadedModel", "graft", "put_head"]


def graft(classifier: nn.Module, model: nn.Module) -> dict[str, nn.Module]:
    """Make a classifier read with a language model's own modules.

    Each module of the classifier's backbone that the language model has too, under the same name and with tensors of
    the same names and shapes, gives way to the language model's.

    Args:
        classifier: a Hugging Face model whose backbone is of the language model's architecture.
        model: a Hugging Face language model, without PEFT around it.

    Returns:
        What stays the classifier's own, by name: the head, and a pooler where the language model has none.

    Raises:
        ModelError: the two have no backbone in common.
    """
    # Any: base_model is not declared on nn.Module
    mine, theirs = (getattr(m, "base_model", m) for m in (classifier, model))
    if mine is classifier or theirs is model:
        raise ModelError(f"{type(classifier).__name__} and {type(model).__name__} share no backbone.")
    own = {name: child for name, child in classifier.named_children() if child is not mine}
    _share(mine, theirs, f"{classifier.base_model_prefix}.", own)
    return own


def _share(mine: nn.Module, theirs: nn.Module, path: str, own: dict[str, nn.Module]) -> None:
    for name, parameter in theirs.named_parameters(recurse=False):
        setattr(mine, name, parameter)
    for name, child in list(mine.named_children()):
        other = getattr(theirs, name, None)
        if not isinstance(other, nn.Module):
            own[path + name] = child
        elif _shapes(child) == _shapes(other):
            setattr(mine, name, other)
        elif list(child.children()):
            _share(child, other, f"{path}{name}.", own)
        else:
            raise ModelError(
                f"{path}{name} of the classifier has {_shapes(child)}, and the language model's {_shapes(other)}; "
                "they are not of one architecture and size."
            )


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


class HeadObjective(nn.Module):
    """Cross-entropy of a classifier that shares a language model's backbone; owns what is the classifier's alone.

    Batches hold ``input_ids``, ``attention_mask`` and ``soft_label`` ``(batch, classes)``.

    Args:
        classifier: after ``graft``.
        own: what ``graft`` gave.
    """

    unit = "nats/example"

    def __init__(self, classifier: nn.Module, own: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.own = nn.ModuleDict({name.replace(".", "-"): module for name, module in own.items()})
        # In a tuple: the backbone is the language model's, which is trained and checkpointed as itself.
        self._classifier = (classifier,)
        self._measure = ClassObjective(SoftCrossEntropy())

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """See ``ClassObjective``; ``model`` is the language model that the classifier reads with."""
        classifier = self._classifier[0]
        if classifier.training != model.training:
            classifier.train(model.training)
        return self._measure(classifier, batch)


@dataclass(eq=False)
class HeadedModel:
    """A language model with a classification head beside it.

    Attributes:
        model: the language model, in adapters where there are any.
        classes: the classifier that reads with its modules.
        objective: what ``fit`` minimises.
        ref: where both came from.
        seed: of the head.
        frozen: weights of the language model that the classifier does not read.
    """

    model: nn.Module
    classes: ClassModel
    objective: HeadObjective
    ref: ModelRef
    seed: int
    frozen: tuple[nn.Parameter, ...] = ()

    def thaw(self) -> None:
        """Let go of what the classifier does not read, for an objective that trains it."""
        for parameter in self.frozen:
            parameter.requires_grad_(True)

    def whole(self) -> ClassModel:
        """The classifier as it can be saved: adapters, if there are any, are merged in a copy."""
        if not hasattr(self.model, "merge_and_unload"):
            return self.classes
        merged: Any = copy.deepcopy(self.model)  # Any: a PEFT model
        fresh = put_head(
            merged.merge_and_unload(), self.ref, self.classes.labels, max_tokens=self.classes.max_tokens, seed=self.seed
        )
        fresh.objective.load_state_dict(self.objective.state_dict())
        fresh.classes.model.eval()
        return fresh.classes


def put_head(
    model: nn.Module,
    ref: ModelRef,
    labels: Sequence[str],
    *,
    max_tokens: int,
    seed: int,
    lora: LoraSpec | None = None,
) -> HeadedModel:
    """Set a classification head beside a language model.

    Weights of the language model that the classifier does not read, such as an untied output layer, are frozen: nothing
    here would train them.

    Args:
        model: a language model of ``ref``'s architecture, without PEFT around it; it goes on being itself.
        ref: the checkpoint that says which class of classifier, and has the rest of it where it was one.
        labels: the classes.
        max_tokens: of a text.
        seed: of new weights.
        lora: adapters for the language model; the head is trained whole.

    Raises:
        ModelError: the architecture has no sequence classifier, or see ``open_class_model``.
    """
    try:
        classes = open_class_model(ref, labels, max_tokens=max_tokens, seed=seed)
    except ValueError as error:
        if "AutoModelForSequenceClassification" not in str(error):
            raise
        raise ModelError(
            f"the architecture of {ref.name!r} has no sequence classifier in transformers; choose another model."
        ) from error
    own = graft(classes.model, model)
    read = {id(parameter) for parameter in classes.model.parameters()}
    frozen = tuple(p for p in model.parameters() if p.requires_grad and id(p) not in read)
    for parameter in frozen:
        parameter.requires_grad_(False)
    objective = HeadObjective(classes.model, own)
    if lora is not None:
        model = add_lora(model, lora, seed=derive_seed(seed, "lora"))
    return HeadedModel(model, classes, objective, ref, seed, () if lora is not None else frozen)
