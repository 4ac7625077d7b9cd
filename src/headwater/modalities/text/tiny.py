"""Small language models with fresh weights: the same architectures as the large ones, in a size for a laptop."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypedDict, TypeVar

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

__all__ = ["PRESETS", "Size", "tiny_bert", "tiny_llama", "tiny_t5"]


class Size(TypedDict):
    """The dimensions of a model; each ``tiny_*`` function takes them as keywords."""

    hidden: int
    layers: int
    heads: int
    mlp: int


PRESETS: Mapping[str, Size] = MappingProxyType(
    {
        "nano": Size(hidden=64, layers=2, heads=4, mlp=172),
        "micro": Size(hidden=96, layers=2, heads=4, mlp=256),
        "tiny": Size(hidden=128, layers=3, heads=4, mlp=344),
        "small": Size(hidden=256, layers=6, heads=8, mlp=688),
    }
)
"""Sizes by name: ``tiny_llama(tokenizer, **PRESETS["nano"], generator_seed=0)``."""


def tiny_llama(
    vocab: int | PreTrainedTokenizerBase,
    hidden: int = 128,
    layers: int = 3,
    heads: int = 4,
    mlp: int = 344,
    context: int = 128,
    tie: bool = True,
    *,
    generator_seed: int,
) -> LlamaForCausalLM:
    """Return a Llama with fresh weights.

    Args:
        vocab: number of tokens; or a tokenizer, whose special ids then stand in the config.
        hidden: width; a multiple of ``2 * heads`` (rotary positions pair the dimensions of a head).
        layers: number of layers.
        heads: number of attention heads.
        mlp: width of the gated MLP.
        context: ``max_position_embeddings``.
        tie: share input and output embeddings.
        generator_seed: the weights follow from this and the sizes; the global generator is neither read nor moved.

    Raises:
        ValueError: ``hidden`` does not suit ``heads``.
    """
    if hidden % (2 * heads):
        raise ValueError(f"hidden must be a multiple of 2 * heads; got hidden={hidden}, heads={heads}.")
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=mlp,
        max_position_embeddings=context,
        tie_word_embeddings=tie,
        **_vocabulary(vocab),
    )
    return _fresh(LlamaForCausalLM, config, generator_seed)


def tiny_bert(
    vocab: int | PreTrainedTokenizerBase,
    hidden: int = 128,
    layers: int = 3,
    heads: int = 4,
    mlp: int = 512,
    context: int = 128,
    *,
    generator_seed: int,
) -> BertForMaskedLM:
    """Return a BERT for masked language modelling, without dropout; arguments as ``tiny_llama``.

    Raises:
        ValueError: ``hidden`` is not a multiple of ``heads``.
    """
    if hidden % heads:
        raise ValueError(f"hidden must be a multiple of heads; got hidden={hidden}, heads={heads}.")
    config = BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
        max_position_embeddings=context,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **_vocabulary(vocab),
    )
    return _fresh(BertForMaskedLM, config, generator_seed)


def tiny_t5(
    vocab: int | PreTrainedTokenizerBase,
    hidden: int = 128,
    layers: int = 3,
    heads: int = 4,
    mlp: int = 344,
    *,
    generator_seed: int,
) -> T5ForConditionalGeneration:
    """Return a T5 with ``layers`` in each half and a gated MLP, without dropout; arguments as ``tiny_llama``.

    Its positions are relative, so it has no context length. Decoding starts from the pad token (0 without a tokenizer).

    Raises:
        ValueError: ``hidden`` is not a multiple of ``heads``.
    """
    if hidden % heads:
        raise ValueError(f"hidden must be a multiple of heads; got hidden={hidden}, heads={heads}.")
    ids = _vocabulary(vocab)
    pad = ids["pad_token_id"] or 0
    config = T5Config(
        d_model=hidden,
        d_kv=hidden // heads,
        d_ff=mlp,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        **ids | {"pad_token_id": pad, "decoder_start_token_id": pad},
    )
    return _fresh(T5ForConditionalGeneration, config, generator_seed)


def _vocabulary(vocab: int | PreTrainedTokenizerBase) -> dict[str, int | None]:
    if isinstance(vocab, int):
        return {"vocab_size": vocab, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {
        "vocab_size": len(vocab),
        "bos_token_id": vocab.bos_token_id,
        "eos_token_id": vocab.eos_token_id,
        "pad_token_id": vocab.pad_token_id,
    }


Model = TypeVar("Model", bound=PreTrainedModel)


def _fresh(kind: type[Model], config: object, seed: int) -> Model:
    # Models draw their weights from the global generator only; fork_rng puts it back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: Model = kind(config)
    model.eval()
    return model
