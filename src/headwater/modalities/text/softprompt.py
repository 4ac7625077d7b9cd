"""Soft tokens in the input of a text tower that is called with token ids.

    embeddings = [BOS, v_1, ..., v_n, word_1, ..., word_m, EOS]        v: n trained vectors in place of words

Where PEFT's prompt tuning fits (causal, sequence-to-sequence and classification models), use that. This is for towers
that refuse ``inputs_embeds``, such as the text towers of CLIP and SigLIP, and for sentence encoders, whose pooling must
count the soft tokens: ids that stand for them are put into the row, so that positions, mask and the place of EOS come
out as they do for words, and a hook gives these ids their vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

__all__ = ["AttachedPrompt", "SoftPrompt", "attach_soft_prompt"]

Position = Literal["bos", "start"]


class SoftPrompt(nn.Module):
    """Trainable vectors that stand where words could.

    Args:
        vectors: where they start, ``(tokens, dim)``; copied. No tokens are a prompt, too: one that changes nothing.

    Attributes:
        weight: the vectors.

    Raises:
        ValueError: another number of dimensions.
    """

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        if vectors.ndim != 2:
            raise ValueError(f"vectors must be (tokens, dim); got shape {tuple(vectors.shape)}.")
        self.weight = nn.Parameter(vectors.detach().clone())

    def __len__(self) -> int:
        return len(self.weight)

    @classmethod
    def normal(cls, tokens: int, dim: int, *, generator: torch.Generator, std: float = 0.02) -> SoftPrompt:
        """Draw vectors of ``dim`` numbers from a normal distribution; 0.02 is CoOp's deviation (arXiv:2109.01134)."""
        return cls(std * torch.randn(tokens, dim, generator=generator))

    @classmethod
    def from_vocabulary(cls, model: nn.Module, tokens: int, *, generator: torch.Generator) -> SoftPrompt:
        """Begin at the embeddings of words drawn from the model's vocabulary, each at most once."""
        table = _embedding(model).weight
        return cls(table[torch.randperm(len(table), generator=generator)[:tokens].to(table.device)])

    @classmethod
    def from_text(
        cls, model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str, tokens: int | None = None
    ) -> SoftPrompt:
        """Begin at the embeddings of a text's words.

        Args:
            model: whose embeddings.
            tokenizer: its own.
            text: the words.
            tokens: how many; the text is cut or repeated to that length. ``None``: as many as it has.

        Raises:
            ValueError: the text has no token.
        """
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"a prompt cannot begin at a text without a token; got {text!r}.")
        wanted = len(ids) if tokens is None else tokens
        return cls(_embedding(model).weight[[ids[i % len(ids)] for i in range(wanted)]])


def attach_soft_prompt(
    model: nn.Module, prompt: SoftPrompt, position: Position = "bos", *, max_length: int | None = None
) -> AttachedPrompt:
    """Let a prompt stand in every text that a tower reads.

    Args:
        model: a Hugging Face text encoder, or a dual encoder whose text tower is meant; not changed.
        prompt: as wide as the model's embeddings.
        position: ``bos`` puts it behind the first token; ``start`` before all, where a row has no first token of its
            own, as in SigLIP.
        max_length: tokens that the tower can read; by default as many as it has positions.

    Raises:
        ValueError: the prompt has another width than the embeddings.
    """
    return AttachedPrompt(model, prompt, position, max_length)


class AttachedPrompt(nn.Module):
    """A text tower with soft tokens; see ``attach_soft_prompt``.

    Calling it is calling the tower. Where something stands between, such as a projection or a pooling, do by hand what
    the call does: ``with attached.inserted(): model.get_text_features(**attached.extend(batch))``.
    """

    def __init__(self, model: nn.Module, prompt: SoftPrompt, position: Position, max_length: int | None) -> None:
        super().__init__()
        self.model, self.prompt, self.position = model, prompt, position
        self._table = (_embedding(model),)  # in a tuple: it is a part of the model already
        config: Any = model.config  # Any: configurations declare what they like
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.max_length = max_length or getattr(config, "max_position_embeddings", None)
        width = self._table[0].weight.shape[1]
        if prompt.weight.shape[1] != width:
            raise ValueError(f"the prompt is {prompt.weight.shape[1]} wide; the model's embeddings are {width}.")
        self._pad, self._eos = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
        # Not EOS, at whose place CLIP pools; not padding, which RoBERTa does not count as a position; and low, since
        # old CLIP checkpoints take the highest id for EOS.
        avoided = {self._pad, getattr(config, "bos_token_id", None)}
        avoided |= set(self._eos) if isinstance(self._eos, list) else {self._eos}
        self._placeholder = next(i for i in range(len(avoided) + 1) if i not in avoided)

    def forward(self, **batch: Tensor) -> Any:  # Any: what the tower returns
        """Call the tower on a batch, ``input_ids`` and what else the tokenizer gave."""
        with self.inserted():
            return self.model(**self.extend(batch))

    def extend(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows with room for the prompt.

        Args:
            batch: ``input_ids`` ``(batch, time)``, padded on the right; ``attention_mask`` and ``token_type_ids`` of
                the same shape.

        Returns:
            The same with ``time + tokens`` columns. Where the tower has fewer, columns of padding are left out.

        Raises:
            ValueError: a text does not fit behind the prompt, rows are padded on the left, or the batch numbers its
                own positions.
        """
        if "position_ids" in batch:
            raise ValueError("leave out position_ids: the tower numbers a row that holds a prompt itself.")
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if mask is not None and not bool(mask[:, :1].all()):
            raise ValueError("rows must be padded on the right; set padding_side='right' on the tokenizer.")
        added, width = len(self.prompt), ids.shape[1]
        if not added:
            return dict(batch)
        used = self._used(ids, mask)
        if self.max_length is not None and used + added > self.max_length:
            raise ValueError(
                f"a text of {used} tokens does not fit behind a prompt of {added}: the model reads {self.max_length}. "
                "Shorten the text or the prompt."
            )
        end = width if self.max_length is None else min(width, self.max_length - added)
        at = self._at
        extended = {}
        for name, values in batch.items():
            near = values[:, :1]  # mask and type of the row's first token
            fill = torch.full_like(near, self._placeholder) if name == "input_ids" else near
            extended[name] = torch.cat((values[:, :at], fill.expand(-1, added), values[:, at:end]), dim=1)
        return extended

    @contextmanager
    def inserted(self, vectors: Tensor | None = None) -> Iterator[None]:
        """Inside, the tower sees the prompt in extended rows.

        Args:
            vectors: used in place of the prompt's own, ``(tokens, dim)``; gradients flow into them.
        """
        chosen = self.prompt.weight if vectors is None else vectors
        if chosen.shape != self.prompt.weight.shape:
            raise ValueError(
                f"vectors must be {tuple(self.prompt.weight.shape)}, as the prompt; got {tuple(chosen.shape)}."
            )

        def overwrite(module: nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor:
            soft = chosen.to(embedded).expand(len(embedded), -1, -1)
            return torch.cat((embedded[:, : self._at], soft, embedded[:, self._at + len(chosen) :]), dim=1)

        handle = self._table[0].register_forward_hook(overwrite)
        try:
            yield
        finally:
            handle.remove()

    @property
    def _at(self) -> int:
        return 1 if self.position == "bos" else 0

    def _used(self, ids: Tensor, mask: Tensor | None) -> int:
        """Columns up to the last one that is not padding in every row."""
        if mask is not None and not bool(mask.all()):
            real = mask.bool()
        elif self._pad is None:
            return ids.shape[1]
        else:
            real = ids != self._pad
            if self._pad == self._eos:  # the first one after a word is the row's end
                real[:, 1:] |= real[:, :-1].clone()
        return int(real.any(0).nonzero().max()) + 1 if bool(real.any()) else 0


def _embedding(model: nn.Module) -> nn.Embedding:
    table: nn.Embedding = getattr(model, "text_model", model).get_input_embeddings()  # type: ignore[operator]  # HF's
    return table
