"""Choosing a tokenizer for a corpus by what it makes of it, and getting it ready before anything is trained.

What must be in a vocabulary before pretraining is added here: a padding token of its own, the tokens of chat templates,
and free places, up to a multiple that matrix products like. Old ids stay what they were.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwater.modalities.models import ModelError
from headwater.modalities.text.docs import CorpusError

__all__ = [
    "CHAT_TOKENS",
    "check_vocabulary",
    "compare_tokenizers",
    "extend_tokenizer",
    "resize_model",
    "vocabulary_size",
]

CHAT_TOKENS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "chatml": ("<|im_start|>", "<|im_end|>"),
        "llama2": ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
        "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "openchat": ("<|end_of_turn|>",),
        "zephyr": ("<|system|>", "<|user|>", "<|assistant|>"),
    }
)
"""The tokens that chat templates put between turns, by template."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_RESERVED = "<|reserved_{}|>"


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id."""
    largest: int = max(tokenizer.get_vocab().values())
    return 1 + largest


def compare_tokenizers(
    tokenizers: Mapping[str, PreTrainedTokenizerBase], texts: Mapping[str, Sequence[str]]
) -> pd.DataFrame:
    """How well tokenizers compress texts, and how fast.

    Args:
        tokenizers: by name.
        texts: by the name of their source.

    Returns:
        A row for each tokenizer and source: ``tokenizer``, ``source``, ``vocabulary``; ``bytes_per_token`` of UTF-8,
        without special tokens; ``tokens_per_word``, words being what white space separates; ``single_byte_share``, the
        tokens that stand for one byte; ``megabytes_per_second`` of processor time.

    Raises:
        CorpusError: a source without text.
    """
    rows = []
    for name, tokenizer in tokenizers.items():
        single = _single_bytes(tokenizer)
        for source, given in texts.items():
            size = sum(len(text.encode("utf-8", "surrogatepass")) for text in given)
            if not size:
                raise CorpusError(f"source {source!r} has no text to compare tokenizers on.")
            begin = time.process_time()
            encoded = tokenizer(list(given), add_special_tokens=False, return_attention_mask=False, verbose=False)
            seconds = time.process_time() - begin
            ids = np.fromiter((i for row in encoded["input_ids"] for i in row), dtype=np.int64)
            rows.append(
                {
                    "tokenizer": name,
                    "source": source,
                    "vocabulary": len(tokenizer),
                    "bytes_per_token": size / len(ids),
                    "tokens_per_word": len(ids) / max(1, sum(len(text.split()) for text in given)),
                    "single_byte_share": float(single[ids].mean()),
                    "megabytes_per_second": size / 1e6 / max(seconds, 1e-9),
                }
            )
    return pd.DataFrame(rows)


def _single_bytes(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.bool_]:
    """Which tokens stand for one byte, ``(vocabulary,)``."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    by_bytes = backend is not None and "ByteLevel" in str(backend.decoder)  # where every byte is written as a letter
    found = np.zeros(vocabulary_size(tokenizer), dtype=np.bool_)
    for token, i in tokenizer.get_vocab().items():
        found[i] = bool(_BYTE.fullmatch(token)) or (len(token) == 1 and (by_bytes or token.isascii()))
    return found


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    pad: str = "<|pad|>",
    chat_templates: Sequence[str] = tuple(CHAT_TOKENS),
    reserved: int = 0,
    multiple_of: int = 64,
) -> PreTrainedTokenizerBase:
    """A copy with a padding token, the tokens of chat templates, and free places up to a multiple.

    Every id stays, and text without the new tokens is encoded as before. A padding token that is there already and is
    not EOS stays. A tokenizer that has been extended is not changed again.

    Args:
        tokenizer: with an EOS.
        pad: the padding token to add.
        chat_templates: names in ``CHAT_TOKENS``.
        reserved: at least so many free places, ``<|reserved_0|>`` and so on.
        multiple_of: of which the number of tokens becomes a multiple.

    Raises:
        ValueError: no EOS, a padding token that is EOS, an unknown template, or a number out of range.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token to close documents; set tokenizer.eos_token.")
    if pad == tokenizer.eos_token:
        raise ValueError(
            f"the padding token {pad!r} is EOS, which is left out of the loss where it pads, so the model would never "
            "learn to stop; give another: extend_tokenizer(tokenizer, pad='<|pad|>')."
        )
    if unknown := sorted(set(chat_templates) - set(CHAT_TOKENS)):
        raise ValueError(f"no chat template {unknown[0]!r}; there are {', '.join(CHAT_TOKENS)}.")
    if reserved < 0 or multiple_of < 1:
        raise ValueError(f"need reserved >= 0 and multiple_of >= 1; got {reserved} and {multiple_of}.")
    extended = copy.deepcopy(tokenizer)
    if extended.pad_token_id in (None, extended.eos_token_id):
        extended.add_special_tokens({"pad_token": pad})
    _add(extended, [token for template in chat_templates for token in CHAT_TOKENS[template]])
    there = sum(_RESERVED.format(i) in extended.get_vocab() for i in range(vocabulary_size(extended)))
    free = max(0, reserved - there)
    free += -(vocabulary_size(extended) + free) % multiple_of
    _add(extended, [_RESERVED.format(i) for i in range(there, there + free)])
    return extended


def _add(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    new = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_tokens(new, special_tokens=True)


def resize_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int | None = None
) -> PreTrainedModel:
    """Give a model, in place, a row for every token, and its configuration the tokenizer's special ids.

    Args:
        model: with embeddings and, for a language model, an output layer.
        tokenizer: its tokenizer, extended.
        seed: None for a pretrained model: each new row, in and out, is the mean of the old ones, and no row goes. An
            integer for fresh weights: there are as many rows as tokens, and new ones are drawn as the model draws them.

    Returns:
        The same model.
    """
    rows, wanted = model.get_input_embeddings().num_embeddings, vocabulary_size(tokenizer)
    if wanted > rows or (seed is not None and wanted != rows):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed or 0)  # transformers draws from the global generator only
            model.resize_token_embeddings(wanted, mean_resizing=False)
        if seed is None:
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                if layer is not None:
                    _fill_by_mean(layer, rows)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (model.config, getattr(model, "generation_config", None)):
            if config is not None:
                setattr(config, name, getattr(tokenizer, name))
    return model


@torch.no_grad()
def _fill_by_mean(layer: nn.Module, rows: int) -> None:
    for name in ("weight", "bias"):
        values = getattr(layer, name, None)
        if values is not None:
            values[rows:] = values[:rows].float().mean(0).to(values.dtype)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer whose ids the model has no rows for, before the first step fails on one.

    Raises:
        ModelError: says which sizes, and what to do.
    """
    rows, wanted = model.get_input_embeddings().num_embeddings, vocabulary_size(tokenizer)
    if wanted > rows:
        raise ModelError(
            f"the tokenizer has ids up to {wanted - 1} and the model {rows} rows; call resize_model(model, tokenizer)."
        )
