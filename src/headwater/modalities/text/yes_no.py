r"""Questions about texts that are answered with yes or no, by any model that can be asked one.

    score(q, x) = logit(yes) - logit(no),   p(yes | q, x) = sigmoid(score)

    causal       "q \n x \n answer:" is read; the answer is the next token
    seq2seq      the encoder reads "q \n x"; the answer is the first token that the decoder writes
    classifier   the pair (q, x) is read; one logit is the score, of two the second is yes

Of a language model's output layer only the rows of the two words are multiplied, at one place of each text: neither
time nor memory depends on the size of the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from headwater.core.recipe import ModelRef
from headwater.modalities.models import ModelError, head_of, load_model, load_tokenizer, model_directory
from headwater.modalities.text.class_inputs import length_batches, padded_inputs
from headwater.modalities.text.classes import open_class_model, unwrapped
from headwater.modalities.text.prompts import Template, Verbaliser
from headwater.modalities.text.score import scoring

__all__ = ["YesNoScorer", "answer_kind", "normalised", "open_yes_no", "two_row_logits"]

Kind = Literal["causal", "seq2seq", "classifier"]
TAIL = "\nanswer:"
_MANY = 1 << 20  # the model's own number of positions then decides
_PAIRS = (("yes", "no"), ("true", "false"), ("right", "wrong"), ("good", "bad"), ("a", "b"), ("1", "0"))
_CONTEXT: Mapping[Kind, Template] = {
    "causal": Template("{text_a}\n{text_b}" + TAIL + " {mask}"),
    "seq2seq": Template("{mask} {text_a} {text_b}"),
}


def normalised(text: str) -> str:
    """Lower case, without white space and quotation marks around it.

    Example:
        >>> normalised(' "A fine Plot." ')
        'a fine plot.'
    """
    return text.strip().strip("\"'\u201c\u201d\u2018\u2019").strip().lower()


def answer_kind(model: nn.Module) -> Kind:
    """How a model is asked.

    Raises:
        ModelError: it is neither a sequence classifier nor a causal or encoder-decoder language model.
    """
    inner = unwrapped(model)
    name = type(inner).__name__
    if "SequenceClassification" in name:
        return "classifier"
    if inner.config.is_encoder_decoder:
        return "seq2seq"
    if "CausalLM" in name or "LMHead" in name:
        return "causal"
    raise ModelError(
        f"{name} cannot be asked for yes or no; open the checkpoint with AutoModelForCausalLM, AutoModelForSeq2SeqLM "
        "or AutoModelForSequenceClassification."
    )


class _Rows(nn.Module):
    """Some rows of an output layer, which stays the owner of its weights."""

    def __init__(self, layer: nn.Module, rows: Sequence[int]) -> None:
        super().__init__()
        self._layer, self._rows = (layer,), list(rows)  # in a tuple, so that it is no submodule

    def forward(self, hidden: Tensor) -> Tensor:
        layer: Any = self._layer[0]  # Any: nn.Linear, or one of its like
        bias = None if layer.bias is None else layer.bias[self._rows]
        return F.linear(hidden, layer.weight[self._rows], bias)


@contextmanager
def _answering(model: Any, rows: Sequence[int], places: Tensor | None) -> Iterator[None]:  # Any: a Hugging Face model
    """Inside, the model's logits are those of ``rows`` alone, and those at ``places`` where they are given."""
    layer, hook = model.get_output_embeddings(), None

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:  # Any: what Hugging Face models take and give
        hidden = output["last_hidden_state"]
        output["last_hidden_state"] = hidden[torch.arange(len(hidden), device=hidden.device), places, None]

    if places is not None:
        hook = model.base_model.register_forward_hook(keep)
    model.set_output_embeddings(_Rows(layer, rows))
    try:
        yield
    finally:
        model.set_output_embeddings(layer)
        if hook is not None:
            hook.remove()


def two_row_logits(model: nn.Module, batch: Mapping[str, Tensor], answers: Sequence[int]) -> Tensor:
    """Logits of the tokens ``answers`` as the first that a language model writes, ``(batch, len(answers))``.

    Args:
        model: a causal or encoder-decoder language model of Hugging Face, in PEFT or DDP if need be.
        batch: ``input_ids`` and ``attention_mask`` ``(batch, time)``, padded on either side.
        answers: ids of tokens.

    Raises:
        ModelError: the output layer is not linear with rows of its own, or is not apart from the model's body.
    """
    inner = unwrapped(model)
    layer = inner.get_output_embeddings()
    if not hasattr(layer, "weight") or getattr(inner, "final_logits_bias", None) is not None:
        raise ModelError(
            f"{type(inner).__name__} adds to its logits after its output layer, or has none with rows of its own, so "
            "two answers cannot be computed alone; take a Llama-, GPT- or T5-like model."
        )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    places = None
    if inner.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.new_full((len(ids), 1), inner.config.decoder_start_token_id)
    else:
        if inner.base_model is inner:
            raise ModelError(f"{type(inner).__name__} has no backbone apart from its output layer.")
        places = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        if "position_ids" in inspect.signature(inner.forward).parameters:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)  # the same wherever the padding stands
    with _answering(inner, answers, places):
        logits: Tensor = model(**inputs).logits
    return logits[:, 0]


@dataclass(eq=False)
class YesNoScorer:
    """A model that answers questions about texts with yes or no.

    Questions and texts are put in lower case, quotation marks around them left out. What is too long loses the end of
    its text; a question is never cut.

    Attributes:
        model: a causal or encoder-decoder language model, or a sequence classifier with one or two logits.
        tokenizer: its own.
        yes, no: the two words, one token each; a classifier does not read them.
        max_tokens: of question, text and what stands between them; fewer where the model has fewer positions.

    Raises:
        ModelError: another kind of model, a classifier with more logits, or a word that is not one token of its own.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    yes: str = "yes"
    no: str = "no"
    max_tokens: int = 128
    kind: Kind = field(init=False)
    answers: tuple[int, int] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.kind = answer_kind(self.model)
        config = unwrapped(self.model).config
        if self.kind != "classifier":
            self.answers = _answer_ids(self.yes, self.no, self.tokenizer, self.kind)
        elif config.num_labels not in (1, 2):
            raise ModelError(f"a yes/no classifier has one logit or two; this one has {config.num_labels}.")
        # T5 and its like have no limit; RoBERTa has two positions fewer than its configuration says.
        positions = getattr(config, "max_position_embeddings", None) or self.max_tokens
        self.max_tokens = min(self.max_tokens, positions, self.tokenizer.model_max_length)

    def encode(self, texts: Sequence[str], questions: Sequence[str]) -> list[list[int]]:
        """Token ids of each text with its question.

        Raises:
            ValueError: texts and questions differ in number.
            ModelError: a question that leaves no room for text.
        """
        if len(texts) != len(questions):
            raise ValueError(f"every text needs a question; got {len(texts)} texts and {len(questions)} questions.")
        asked, read = [normalised(question) for question in questions], [normalised(text) for text in texts]
        opened = [f"{question}\n" for question in asked]
        sizes = [len(ids) + self._around for ids in self._pieces(opened if self.kind == "causal" else asked)]
        if sizes and max(sizes) >= self.max_tokens:
            longest = questions[int(np.argmax(sizes))]
            raise ModelError(
                f"question {longest!r:.80} leaves no room for text in {self.max_tokens} tokens; shorten it."
            )
        if not asked:
            return []
        if self.kind == "causal":
            start = [] if self.tokenizer.bos_token_id is None else [int(self.tokenizer.bos_token_id)]
            tail = self._pieces([TAIL])[0]
            pieces = zip(self._pieces(opened), self._pieces(read), sizes, strict=True)
            return [[*start, *question, *text[: self.max_tokens - size], *tail] for question, text, size in pieces]
        if self.kind == "seq2seq":
            joined = [f"{question}\n{text}" for question, text in zip(asked, read, strict=True)]
            found: list[list[int]] = self.tokenizer(joined, truncation=True, max_length=self.max_tokens)["input_ids"]
            return found
        found = self.tokenizer(asked, read, truncation="only_second", max_length=self.max_tokens)["input_ids"]
        return found

    @cached_property
    def _around(self) -> int:
        """Tokens beside question and text."""
        if self.kind == "causal":
            return len(self._pieces([TAIL])[0]) + (self.tokenizer.bos_token_id is not None)
        return int(self.tokenizer.num_special_tokens_to_add(pair=self.kind == "classifier"))

    def _pieces(self, texts: list[str]) -> list[list[int]]:
        different = list(dict.fromkeys(texts))
        found = self.tokenizer(different, add_special_tokens=False, verbose=False)["input_ids"] if different else []
        ids = dict(zip(different, found, strict=True))
        return [ids[text] for text in texts]

    def logits(self, batch: Mapping[str, Tensor], model: nn.Module | None = None) -> Tensor:
        """Logits of no and yes, ``(batch, 2)``; a classifier with one logit has 0 for no.

        Args:
            batch: ``input_ids`` and ``attention_mask`` ``(batch, time)``, as ``encode`` gives them, padded.
            model: stands for ``self.model``, as one wrapped for training does.
        """
        model = self.model if model is None else model
        if self.answers is not None:
            return two_row_logits(model, batch, self.answers)
        ids = batch["input_ids"]
        inputs = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
        separator = self.tokenizer.sep_token_id
        if separator is not None and "token_type_ids" in self.tokenizer.model_input_names:
            ends = (ids == separator).long()
            inputs["token_type_ids"] = ((ends.cumsum(1) - ends) > 0).long() * batch["attention_mask"]
        found: Tensor = model(**inputs).logits
        return torch.cat([torch.zeros_like(found), found], 1) if found.shape[1] == 1 else found

    def score(self, texts: Sequence[str], questions: Sequence[str], *, batch_size: int = 64) -> NDArray[np.float64]:
        """``logit(yes) - logit(no)`` of each text with its question, ``(n,)``; above 0 means yes.

        Args:
            texts: none is fine.
            questions: one for each text.
            batch_size: texts per forward pass, of similar length.

        Raises:
            ValueError, ModelError: see ``encode``.
        """
        rows = self.encode(texts, questions)
        found = np.zeros(len(rows))
        with scoring(self.model) as device:
            for chosen in length_batches([len(row) for row in rows], batch_size) if rows else []:
                batch = padded_inputs(rows, chosen, int(self.tokenizer.pad_token_id))
                logits = self.logits({name: tensor.to(device) for name, tensor in batch.items()}).double()
                found[chosen] = (logits[:, 1] - logits[:, 0]).cpu().numpy()
        return found


def _answer_ids(yes: str, no: str, tokenizer: PreTrainedTokenizerBase, kind: Kind) -> tuple[int, int]:
    """The tokens of no and yes where they will stand."""

    def ids(pair: tuple[str, str]) -> tuple[tuple[int, ...], ...]:
        words = dict(zip(("yes", "no"), pair, strict=True))
        return Verbaliser.of(words, ("no", "yes"), tokenizer, _CONTEXT[kind], multi_token="mean").ids

    def fits(pair: tuple[str, str]) -> bool:
        try:
            return all(len(own) == 1 for own in ids(pair))
        except ModelError:  # a word that this tokenizer does not know
            return False

    found = ids((yes, no))
    if any(len(own) != 1 for own in found):
        shown = " and ".join(
            f"{word!r} is {len(own)} ({tokenizer.convert_ids_to_tokens(list(own))})"
            for word, own in zip((no, yes), found, strict=True)
        )
        others = ", ".join(f"{a!r} and {b!r}" for a, b in _PAIRS if fits((a, b)))
        raise ModelError(
            f"yes and no must be one token each; {shown}. "
            + (f"This tokenizer has one each for {others}." if others else "Choose words from its vocabulary.")
        )
    return found[0][0], found[1][0]


def open_yes_no(
    ref: ModelRef, *, yes: str = "yes", no: str = "no", max_tokens: int | None = 128, seed: int = 0
) -> YesNoScorer:
    """A fresh copy of a model that is asked for yes or no.

    Args:
        ref: a causal or encoder-decoder language model; a classifier of one or two logits, such as a cross-encoder; or
            an encoder, which gets a new head of two.
        yes: the word for it; see ``YesNoScorer``.
        no: likewise.
        max_tokens: of question and text; ``None`` for as many as the model has positions for.
        seed: of a new head.

    Raises:
        ModelError: see ``YesNoScorer`` and ``load_model``.
    """
    limit = max_tokens or _MANY
    directory = model_directory(ref)
    config: Any = AutoConfig.from_pretrained(  # Any: each model has its own
        directory, revision=ref.revision, trust_remote_code=ref.trust_remote_code
    )
    names = " ".join(config.architectures or [])
    if "SequenceClassification" in names:
        model: Any = AutoModelForSequenceClassification.from_pretrained(  # Any: a Hugging Face model
            directory, revision=ref.revision, trust_remote_code=ref.trust_remote_code, use_safetensors=True
        )
        return YesNoScorer(model.eval(), load_tokenizer(ref), yes, no, limit)
    if config.is_encoder_decoder or "CausalLM" in names or "LMHead" in names:
        return YesNoScorer(load_model(ref, head_of(ref)), load_tokenizer(ref), yes, no, limit)
    opened = open_class_model(ref, ("no", "yes"), max_tokens=limit, seed=seed)
    tokenizer = opened.tokenizer
    assert tokenizer is not None, "open_class_model opens one"
    return YesNoScorer(opened.model, tokenizer, yes, no, limit)
