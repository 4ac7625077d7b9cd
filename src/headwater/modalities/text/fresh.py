"""The model that a recipe trains: a pretrained one by reference, or a small one made here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from headwater.core.recipe import ModelRef, Spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["FreshModel", "Model", "open_fresh"]

LLAMA_CONTEXT = 32_768  # rotary positions take no memory, so the small decoder may be as long as a row


class FreshModel(Spec):
    """A small architecture made here, with a byte-level BPE trained on the training text."""

    kind: Literal["t5", "llama"] = Field(description="encoder-decoder (t5) or decoder (llama)")
    hidden: int = Field(default=128, gt=0, description="width")
    layers: int = Field(default=3, gt=0, description="layers, of each half in an encoder-decoder")
    heads: int = Field(default=4, gt=0, description="attention heads")
    mlp: int = Field(default=344, gt=0, description="width of the gated MLP")
    vocab: int = Field(default=2048, gt=257, description="tokens of the BPE, before those that the method adds")


def _model_kind(value: Any) -> Literal["fresh", "reference"]:  # Any: whatever the user wrote
    return "fresh" if isinstance(value, FreshModel) or (isinstance(value, dict) and "kind" in value) else "reference"


Model = Annotated[
    Annotated[ModelRef, Tag("reference")] | Annotated[FreshModel, Tag("fresh")], Discriminator(_model_kind)
]
"""A field that takes either; a mapping with ``kind`` is a fresh model."""


def open_fresh(
    spec: ModelRef | FreshModel, texts: Iterable[str], *, random: bool, seed: int
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, Literal["causal", "seq2seq"]]:
    """Tokenizer, model in ``eval`` mode, and what kind of language model it is.

    Args:
        spec: what the recipe names.
        texts: what a fresh model's tokenizer is trained on; read once, and not at all for a reference.
        random: draw new weights for a reference too; a fresh model always has new ones.
        seed: of new weights.

    Raises:
        ModelError: a masked language model, or see ``load_model``.
    """
    # Imported here, so that a recipe can be read and checked without torch.
    import torch

    from headwater.modalities.models import ModelError, head_of, load_model, load_tokenizer
    from headwater.modalities.text.tiny import Size, tiny_llama, tiny_t5
    from headwater.modalities.text.tokenizers import train_bpe

    if isinstance(spec, FreshModel):
        tokenizer = train_bpe(texts, spec.vocab)
        size = Size(hidden=spec.hidden, layers=spec.layers, heads=spec.heads, mlp=spec.mlp)
        if spec.kind == "t5":
            return tokenizer, tiny_t5(tokenizer, **size, generator_seed=seed), "seq2seq"
        return tokenizer, tiny_llama(tokenizer, **size, context=LLAMA_CONTEXT, generator_seed=seed), "causal"
    head = head_of(spec)
    if head not in ("causal", "seq2seq"):
        raise ModelError(f"model {spec.name!r} is a {head} language model; give a decoder or an encoder-decoder")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # transformers draws new weights from the global generator only
        model: Any = load_model(spec, head, random=random)  # Any: declared as nn.Module
    return load_tokenizer(spec), model, head
