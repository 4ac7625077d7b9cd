"""Models that judge classes: a classification head, a language model that answers in one token, or any module.

    head         logits = head(x)
    verbaliser   logits_c = language-model logit of the token that says class c, at the last position of x
    features     logits = module(features)

Everything here takes texts as token ids, ragged, or features ``(n, D)``; a batch is padded on the right.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from headwater.core.lora import LoraSpec, add_lora
from headwater.core.objective import Loss, OverBatch
from headwater.core.recipe import ModelRef
from headwater.core.rng import derive_seed
from headwater.modalities.models import ModelError, head_of, is_quantised, load_model, load_tokenizer, model_directory
from headwater.modalities.text.class_inputs import Inputs, input_lengths, length_batches, padded_inputs
from headwater.modalities.text.soft_labels import TargetLoss, soft_cross_entropy

__all__ = [
    "ClassModel",
    "ClassObjective",
    "class_logits",
    "class_probabilities",
    "keeps_logits",
    "label_token_ids",
    "open_class_model",
    "unwrapped",
]


def class_logits(model: nn.Module, batch: Mapping[str, Tensor], label_ids: Sequence[int] | None = None) -> Tensor:
    """Scores of the classes, ``(batch, classes)``.

    Args:
        model: a sequence classifier; a causal language model, with ``label_ids``; or any module over features.
        batch: ``input_ids`` and ``attention_mask`` ``(batch, time)``, padded on the right; or ``features``
            ``(batch, D)``.
        label_ids: the token that says each class.
    """
    if "features" in batch:
        answer: Any = model(batch["features"])  # Any: a tensor, or what a Hugging Face model wraps it in
        logits: Tensor = getattr(answer, "logits", answer)
        return logits
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if label_ids is None:
        logits = model(**inputs).logits
        return logits
    last = batch["attention_mask"].sum(1) - 1
    if keeps_logits(model):
        # Scores over the vocabulary are the largest tensor: only the positions at which some row ends are computed.
        kept, place = torch.unique(last, return_inverse=True)
        scores = model(**inputs, use_cache=False, logits_to_keep=kept).logits
    else:
        place, scores = last, model(**inputs, use_cache=False).logits
    logits = scores[torch.arange(len(last), device=last.device), place][:, list(label_ids)]
    return logits


def keeps_logits(model: nn.Module) -> bool:
    """Whether a language model computes the logits of some positions only, where it is told which."""
    return "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters


def unwrapped(model: nn.Module) -> Any:  # Any: a Hugging Face model, whose attributes nn.Module does not declare
    """The Hugging Face model inside DDP, ``torch.compile`` and PEFT."""
    inner: Any = getattr(model, "module", model)  # Any: whatever stands around a model; module: under DDP
    inner = getattr(inner, "_orig_mod", inner)  # compiled
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # PEFT


def label_token_ids(
    tokenizer: PreTrainedTokenizerBase, verbaliser: Mapping[str, str], labels: Sequence[str]
) -> list[int]:
    """The one token that says each label.

    Args:
        tokenizer: the model's.
        verbaliser: label -> text, with the leading space that the tokenizer wants.
        labels: in the order of the classes.

    Raises:
        ModelError: a label without a text, a text of several tokens (they are shown), or one token for two labels.
    """
    ids = []
    for label in labels:
        if label not in verbaliser:
            raise ModelError(f"verbaliser: no text for label {label!r}; it has {', '.join(map(repr, verbaliser))}.")
        found = tokenizer(verbaliser[label], add_special_tokens=False)["input_ids"]
        if len(found) != 1:
            shown = tokenizer.convert_ids_to_tokens(found)
            raise ModelError(
                f"verbaliser: {verbaliser[label]!r} for label {label!r} is {len(found)} tokens, {shown}; choose a text "
                "that is one token of this tokenizer (often with a space in front)."
            )
        ids.append(found[0])
    if len(set(ids)) < len(ids):
        raise ModelError(f"verbaliser: two labels are said by one token: {dict(zip(labels, ids, strict=True))}.")
    return ids


@dataclass(eq=False)
class ClassModel:
    """A model with what it takes to ask it for classes.

    Attributes:
        model: its weights.
        tokenizer: ``None`` for a module over features.
        labels: the classes by name, in order.
        label_ids: the token that says each class; ``None`` where the model has a head of its own.
        max_tokens: what it reads of a text.
        verbaliser: label -> text, where ``label_ids`` are given.
        new: names of weights that were drawn afresh, such as the head's.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    labels: tuple[str, ...]
    label_ids: tuple[int, ...] | None = None
    max_tokens: int = 0
    verbaliser: Mapping[str, str] | None = None
    new: frozenset[str] = frozenset()
    _encoded: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; every text is tokenised once. One that is too long loses its end, or, under a
        verbaliser, its beginning, since the answer follows the end.

        Raises:
            ModelError: a text without a token.
        """
        fresh = [text for text in dict.fromkeys(texts) if text not in self._encoded]
        found = self.tokenise(fresh) if fresh else []
        for text, ids in zip(fresh, found, strict=True):
            if not ids:
                raise ModelError(f"a text without a token cannot be judged: {text[:40]!r}; leave it out.")
            self._encoded[text] = ids
        return [self._encoded[text] for text in texts]

    def tokenise(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts as the model reads them; nothing is kept."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise ModelError("this model reads features; it has no tokenizer for texts.")
        if self.label_ids is None:
            found: list[list[int]] = tokenizer(texts, truncation=True, max_length=self.max_tokens)["input_ids"]
            return found
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [[*start, *row[max(0, len(row) + len(start) - self.max_tokens) :]] for row in rows]

    @property
    def reads(self) -> str:
        """What ``tokenise`` does with a text, beside the tokenizer's part: it goes into the names of cached tokens."""
        return "class inputs 1" if self.label_ids is None else "class inputs, before a word"

    @property
    def opening(self) -> str:
        """Code that opens what ``save_pretrained`` wrote, in DIR."""
        kind = "SequenceClassification" if self.label_ids is None else "CausalLM"
        return (
            f"from transformers import AutoModelFor{kind}, AutoTokenizer\n\n"
            f"model = AutoModelFor{kind}.from_pretrained(DIR)\n"
            "tokenizer = AutoTokenizer.from_pretrained(DIR)"
        )

    @property
    def pad(self) -> int:
        """The padding token; it is masked out."""
        return 0 if self.tokenizer is None else int(self.tokenizer.pad_token_id)

    def probabilities(self, texts: Sequence[str], batch_size: int = 64) -> NDArray[np.float32]:
        """``(texts, classes)``; see ``class_probabilities``."""
        return class_probabilities(self.model, self.encode(texts), self.label_ids, pad=self.pad, batch_size=batch_size)

    def save_pretrained(self, directory: Path) -> None:
        """Weights and tokenizer as transformers and PEFT open them."""
        self.model.save_pretrained(directory)  # type: ignore[operator]  # every Hugging Face and PEFT model has it
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)


def open_class_model(
    ref: ModelRef,
    labels: Sequence[str],
    *,
    verbaliser: Mapping[str, str] | None = None,
    max_tokens: int = 256,
    lora: LoraSpec | None = None,
    seed: int = 0,
) -> ClassModel:
    """A fresh copy of a model that answers with one of ``labels``.

    Args:
        ref: an encoder or decoder, which gets a classification head; under a verbaliser, a causal language model.
        labels: the classes.
        verbaliser: label -> text of one token; ``None`` for a head.
        max_tokens: of a text; fewer where the model has fewer positions.
        lora: train adapters instead of all weights, with a verbaliser only: a new head must be trained whole.
        seed: of new weights; the global generator is left as it was.

    Raises:
        ModelError: the model cannot be opened so; see ``label_token_ids`` and ``load_model``.
    """
    if lora is not None and verbaliser is None:
        raise ModelError("lora would freeze a new classification head; give a verbaliser, or leave lora out.")
    if ref.dtype == "float16":
        ref = ref.model_copy(update={"dtype": "bfloat16"})  # float16 weights overflow when they are trained
    tokenizer = load_tokenizer(ref)
    new: frozenset[str] = frozenset()
    label_ids = None
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "initialisation"))
        if verbaliser is None:
            model, new = _with_head(ref, labels, tokenizer)
        else:
            if head_of(ref) != "causal":
                raise ModelError(f"model {ref.name!r} is no causal language model, which a verbaliser needs.")
            model = load_model(ref, "causal")
            label_ids = tuple(label_token_ids(tokenizer, verbaliser, labels))
    if is_quantised(model) and lora is None:
        raise ModelError(f"model {ref.name!r} is quantised, so its weights cannot be trained; set `lora`")
    if lora is not None:
        model = add_lora(model, lora, seed=derive_seed(seed, "lora"))
    # RoBERTa has two positions fewer than its configuration says; its tokenizer knows.
    positions = getattr(model.config, "max_position_embeddings", None) or max_tokens
    limit = min(max_tokens, positions, tokenizer.model_max_length)
    return ClassModel(model, tokenizer, tuple(labels), label_ids, limit, verbaliser, new)


def _with_head(
    ref: ModelRef, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[nn.Module, frozenset[str]]:
    directory = model_directory(ref)
    if (Path(directory) / "adapter_config.json").exists():
        raise ModelError(f"model {ref.name!r} is a LoRA adapter; merge it into its base before it gets a head.")
    shared: dict[str, Any] = {"revision": ref.revision, "trust_remote_code": ref.trust_remote_code}
    model, info = AutoModelForSequenceClassification.from_pretrained(
        directory,
        dtype=ref.dtype if ref.dtype == "auto" else getattr(torch, ref.dtype),
        use_safetensors=True,
        output_loading_info=True,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        # A head of other classes, from an earlier task, gives way to a new one.
        ignore_mismatched_sizes=True,
        **shared,
    )
    # Decoders find the last token of a text by its padding.
    model.config.pad_token_id = tokenizer.pad_token_id
    mismatched = {entry[0] if isinstance(entry, (tuple, list)) else entry for entry in info["mismatched_keys"]}
    opened: nn.Module = model.eval()
    return opened, frozenset(set(info["missing_keys"]) | mismatched)


def class_probabilities(
    model: nn.Module,
    inputs: Inputs,
    label_ids: Sequence[int] | None = None,
    *,
    pad: int = 0,
    batch_size: int = 64,
    batch_tokens: int | None = None,
) -> NDArray[np.float32]:
    """What a model believes of each input, ``(n, classes)``; it is run in ``eval()`` and given back in its own mode.

    Args:
        model: see ``class_logits``; it stays on its device.
        inputs: token ids of each text, or features ``(n, D)``.
        label_ids: the token that says each class, of a language model.
        pad: padding token.
        batch_size: inputs per forward pass, of similar length.
        batch_tokens: tokens per forward pass, padding included, in place of ``batch_size``.

    Raises:
        ValueError: no input, or a probability that is not finite.
    """
    if not len(inputs):
        raise ValueError("there is no input to judge.")
    device, training = next(model.parameters()).device, model.training
    model.eval()
    found = []
    with torch.inference_mode():
        batches = length_batches(input_lengths(inputs), batch_size, batch_tokens)
        for rows in batches:
            batch = {name: tensor.to(device) for name, tensor in padded_inputs(inputs, rows, pad).items()}
            found.append(class_logits(model, batch, label_ids).float().softmax(-1).cpu())
    model.train(training)
    answers = np.empty((len(inputs), found[0].shape[1]), dtype=np.float32)
    answers[np.concatenate(batches)] = torch.cat(found).numpy()
    if not np.isfinite(answers).all():
        row = int((~np.isfinite(answers).all(1)).argmax())
        raise ValueError(f"the model's answer to input {row} is not finite.")
    return answers


class ClassObjective:
    """A ``TargetLoss`` for ``fit`` and ``ObjectiveTrainer``, exact under micro-batches and several processes.

    Batches hold the model's inputs and ``soft_label`` ``(batch, classes)``.

    Args:
        loss: mixes the targets.
        label_ids: the token that says each class, of a language model.
    """

    unit = "nats/example"

    def __init__(self, loss: TargetLoss, label_ids: Sequence[int] | None = None) -> None:
        self.loss, self.label_ids = loss, label_ids
        self.step_frac = 0.0
        self._boundary: Tensor | None = None

    def begin_step(self, progress: float, over_batch: OverBatch | None) -> None:
        """Note how far training is and, where the batch comes in parts, what it decides as a whole."""
        self.step_frac, self._boundary = progress, None
        if over_batch is not None and self.loss.whole_batch:
            both = over_batch(self._scores_and_labels)
            logits, labels = both.chunk(2, dim=1)
            self._boundary = self.loss.boundary(logits, labels)

    def _scores_and_labels(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([class_logits(model, batch, self.label_ids).float(), batch["soft_label"].float()], dim=1)

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """Summed cross-entropy against the mixed targets; ``agrees``: how often the answer is the label's."""
        logits, labels = class_logits(model, batch, self.label_ids).float(), batch["soft_label"]
        targets = self.loss.targets(logits, labels, self.step_frac, self._boundary)
        agrees = (logits.argmax(1) == labels.argmax(1)).float().mean().detach()
        return Loss(soft_cross_entropy(logits, targets).sum(), len(labels), {"agrees": agrees})
