"""Language models that are trained, asked and saved with a prompt, and what they read before: prompts with answers."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from headwater.core.cache import atomic_write_text
from headwater.core.objective import Loss
from headwater.core.phase import BatchStream
from headwater.core.rng import derive_seed
from headwater.modalities.text.class_inputs import padded_inputs
from headwater.modalities.text.classes import ClassModel
from headwater.modalities.text.packing import IGNORED, mask_tokens
from headwater.modalities.text.prompts import Prompt
from headwater.modalities.text.soft_labels import soft_cross_entropy

__all__ = ["PromptClassifier", "PromptModel", "PromptObjective", "PromptTexts", "PromptedModel", "prompted"]


class PromptClassifier(nn.Module):
    """A language model that answers with labels, called as a sequence classifier is.

    Args:
        model: a masked or causal language model.
        prompt: in its tokens.
    """

    def __init__(self, model: nn.Module, prompt: Prompt) -> None:
        super().__init__()
        self.model, self.prompt = model, prompt

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """``logits`` ``(batch, classes)`` for questions of ``Prompt.encode``, padded on the right."""
        return SequenceClassifierOutput(logits=self.prompt.logits(self.model, input_ids, attention_mask))


class PromptObjective:
    """Cross-entropy over the label words alone; batches hold ``input_ids``, ``attention_mask`` and ``soft_label``.

    Args:
        prompt: in the model's tokens.
    """

    unit = "nats/example"

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """``agrees``: how often the answer is the label's."""
        logits, labels = self.prompt.logits(model, batch["input_ids"], batch["attention_mask"]), batch["soft_label"]
        agrees = (logits.argmax(1) == labels.argmax(1)).float().mean().detach()
        return Loss(soft_cross_entropy(logits, labels).sum(), len(labels), {"agrees": agrees})


@dataclass(eq=False)
class PromptModel(ClassModel):
    """A ``ClassModel`` that answers in a template; ``model`` is a ``PromptClassifier``."""

    def tokenise(self, texts: list[str]) -> list[list[int]]:
        """See ``Prompt.encode``."""
        return self._prompt.encode(texts)

    @property
    def _prompt(self) -> Prompt:
        assert isinstance(self.model, PromptClassifier)
        return self.model.prompt

    @property
    def reads(self) -> str:
        """The template and what it leaves room for."""
        prompt = self._prompt
        return f"prompt 1: {prompt.template.pattern} {prompt.causal} {max(map(len, prompt.verbaliser.ids))}"

    @property
    def opening(self) -> str:
        """Code that asks what ``save_pretrained`` wrote, in DIR, about TEXT."""
        return _OPENING["causal" if self._prompt.causal else "masked"]

    def save_pretrained(self, directory: Path) -> None:
        """The language model and its tokenizer; ``prompt.json`` says how it is asked."""
        prompt, model = self._prompt, self.model.model
        model.save_pretrained(directory)  # type: ignore[operator, union-attr]  # every Hugging Face and PEFT model has it
        prompt.tokenizer.save_pretrained(directory)
        words = prompt.verbaliser
        about = {
            "template": prompt.template.pattern,
            "answer": "the next token" if prompt.causal else "the mask token",
            "words": dict(zip(words.labels, words.words, strict=True)),
            "word_ids": {label: list(ids) for label, ids in zip(words.labels, words.ids, strict=True)},
            "score": "mean logit of a word's tokens, at the answer's place",
            "max_tokens": prompt.max_tokens,
        }
        atomic_write_text(directory / "prompt.json", json.dumps(about, indent=2) + "\n")


_OPENING = {
    kind: f"""import json
from pathlib import Path

import torch
from transformers import {cls}, AutoTokenizer

model = {cls}.from_pretrained(DIR)
tokenizer = AutoTokenizer.from_pretrained(DIR)
prompt = json.loads(Path(DIR, "prompt.json").read_text())
left, right = (part.replace("{{text}}", TEXT) for part in prompt["template"].split("{{mask}}"))
{asked}
with torch.no_grad():
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, at]
scores = {{label: logits[words].mean().item() for label, words in prompt["word_ids"].items()}}
answer = max(scores, key=scores.get)"""
    for kind, cls, asked in (
        (
            "masked",
            "AutoModelForMaskedLM",
            """ids = tokenizer(left.rstrip() + tokenizer.mask_token + right.rstrip(), return_tensors="pt")["input_ids"]
at = int((ids[0] == tokenizer.mask_token_id).nonzero())""",
        ),
        (
            "causal",
            "AutoModelForCausalLM",
            """ids = tokenizer(left.rstrip(), return_tensors="pt")["input_ids"]
at = -1""",
        ),
    )
}


@dataclass(eq=False)
class PromptedModel:
    """A language model and what trains and asks it in a template.

    Attributes:
        model: the language model, in adapters where there are any.
        classes: it as a classifier.
        objective: what ``fit`` minimises.
    """

    model: nn.Module
    classes: PromptModel
    objective: PromptObjective

    def whole(self) -> PromptModel:
        """The classifier as it can be saved: adapters, if there are any, are merged in a copy."""
        if not hasattr(self.model, "merge_and_unload"):
            return self.classes
        merged: Any = copy.deepcopy(self.model)  # Any: a PEFT model
        return prompted(merged.merge_and_unload(), self.objective.prompt).classes


def prompted(model: nn.Module, prompt: Prompt) -> PromptedModel:
    """Ask a language model in a template; it stays itself, and nothing is added to it."""
    words = prompt.verbaliser
    classes = PromptModel(PromptClassifier(model, prompt), prompt.tokenizer, words.labels, max_tokens=prompt.max_tokens)
    return PromptedModel(model, classes, PromptObjective(prompt))


class PromptTexts:
    """Texts for a language model to go on learning from: prompts in which the word of each row's label stands.

    Batches hold ``input_ids``, ``attention_mask`` and ``labels`` ``(batch, time)``: for a masked model with tokens
    masked anew in every epoch, for a causal one the text itself. Padding is not predicted.

    Args:
        stream: a ``ClassStream`` of questions of ``Prompt.encode``, or of texts, without a prompt.
        tokenizer: the model's.
        prompt: whose gap is filled; ``None`` takes texts as they are.
        causal: what kind of model reads it.
        seed: of the masks.
        always_mask_label: a masked model must always predict the word; otherwise it is a token like others.
        probability: share of tokens that are predicted, in [0, 1).
    """

    def __init__(
        self,
        stream: BatchStream,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt | None,
        *,
        causal: bool,
        seed: int,
        always_mask_label: bool = False,
        probability: float = 0.15,
    ) -> None:
        self._stream, self._tokenizer, self._prompt, self._causal = stream, tokenizer, prompt, causal
        self._seed, self._always, self._probability = derive_seed(seed, "prompt texts"), always_mask_label, probability
        words = prompt.verbaliser.ids if prompt is not None else ()
        self.rows = stream.rows
        self.tokens_per_row = (
            stream.tokens_per_row + max(map(len, words), default=0) - (0 if causal or not words else 1)
        )
        self.fingerprint = f"{stream.fingerprint}-{words}-{causal}-{seed}-{always_mask_label}-{probability}"

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Rows [start, stop) of batch ``step``."""
        found = self._stream.batch(step, start, stop)
        rows = [
            ids[:size].tolist() for ids, size in zip(found["input_ids"], found["attention_mask"].sum(1), strict=True)
        ]
        spans: list[tuple[int, int]] = [(0, 0)] * len(rows)
        if self._prompt is not None:
            classes, words = found["soft_label"].argmax(1).tolist(), self._prompt.verbaliser.ids
            filled = self._prompt.fill(rows, classes)
            rows = [ids for ids, _ in filled]
            spans = [(at, at + len(words[index])) for (_, at), index in zip(filled, classes, strict=True)]
        batch = padded_inputs(rows, np.arange(len(rows)), int(self._tokenizer.pad_token_id))
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        if not self._causal:
            batch["input_ids"], labels = self._masked(batch["input_ids"], labels, spans, step * self.rows + start)
        return {**batch, "labels": labels, "row": found["row"]}

    def _masked(
        self, ids: Tensor, texts: Tensor, spans: Sequence[tuple[int, int]], first: int
    ) -> tuple[Tensor, Tensor]:
        inputs, labels = ids.clone(), torch.full_like(ids, IGNORED)
        if self._probability > 0:
            keys = first + np.arange(len(ids))
            drawn = mask_tokens(ids.numpy(), keys, self._tokenizer, seed=self._seed, probability=self._probability)
            inputs, labels = (torch.from_numpy(array) for array in drawn)
            labels = labels.masked_fill(texts == IGNORED, IGNORED)
        if self._always:
            for row, (begin, end) in enumerate(spans):
                inputs[row, begin:end] = self._tokenizer.mask_token_id
                labels[row, begin:end] = texts[row, begin:end]
        return inputs, labels
