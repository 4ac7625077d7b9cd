"""Attention masks that say exactly who sees whom, in the form each Hugging Face attention accepts.

    allowed[b, q, k] = (kind lets q see k) and (same document) and (k is not padding), or q = k

Under ``sdpa`` a four-dimensional mask is boolean; under ``eager`` it is *added* to the scores, so a boolean one would
let every position see every other (transformers 5.23 does not object). Hence the two forms. Give ``position_ids`` as
well: models cannot infer them from a four-dimensional mask.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["attention_mask_for", "keeps_documents_apart", "packed_inputs", "position_ids_for"]

Kind = Literal["causal", "prefix", "bidirectional"]


def attention_mask_for(
    model: PreTrainedModel,
    kind: Kind,
    prefix_lengths: Tensor | None = None,
    document_ids: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """Return a mask to pass as ``attention_mask`` to ``model``.

    Args:
        model: decides the form, by its attention implementation and dtype.
        kind: ``causal``: a position sees itself and what precedes it. ``prefix``: it also sees the first
            ``prefix_lengths`` positions of its row. ``bidirectional``: it sees all.
        prefix_lengths: ``(B,)`` integers, for ``kind="prefix"`` only.
        document_ids: ``(B, T)`` integers; positions of different documents do not see each other.
        padding: ``(B, T)``, 1 at real tokens and 0 at padding, which nobody else sees. One of ``document_ids`` and
            ``padding`` is needed for the shape; pass ``torch.ones_like(input_ids)`` where there is neither.

    Returns:
        ``(B, 1, T, T)``, query by key: bool (True = may see) for sdpa; for eager 0 or the lowest number of the model's
        dtype. Every position sees itself, so no row is empty and padding gives no NaN.

    Raises:
        ValueError: an unknown kind, a missing or superfluous argument, shapes that differ, or a model whose attention
            cannot honour the mask (flash or flex attention, sliding or chunked windows, ALiBi).
    """
    form = _form(model)
    given = document_ids if document_ids is not None else padding
    if given is None:
        raise ValueError("the mask's shape is unknown: pass padding=torch.ones_like(input_ids) or document_ids.")
    if document_ids is not None and padding is not None and document_ids.shape != padding.shape:
        raise ValueError(
            f"document_ids {tuple(document_ids.shape)} and padding {tuple(padding.shape)} differ in shape."
        )
    batch, length = given.shape
    place = torch.arange(length, device=given.device)
    causal = place[None, :] <= place[:, None]
    if (kind == "prefix") != (prefix_lengths is not None):
        raise ValueError(f"prefix_lengths belongs to kind='prefix' and to no other; got kind={kind!r}.")
    if kind == "causal":
        allowed = causal.expand(batch, length, length)
    elif kind == "prefix" and prefix_lengths is not None:
        if prefix_lengths.shape != (batch,):
            raise ValueError(f"prefix_lengths must have shape ({batch},); got {tuple(prefix_lengths.shape)}.")
        allowed = causal | (place < prefix_lengths.to(place.device)[:, None])[:, None, :]
    elif kind == "bidirectional":
        allowed = torch.ones(batch, length, length, dtype=torch.bool, device=given.device)
    else:
        raise ValueError(f"kind must be 'causal', 'prefix' or 'bidirectional'; got {kind!r}.")
    if document_ids is not None:
        allowed = allowed & (document_ids[:, :, None] == document_ids[:, None, :])
    if padding is not None:
        allowed = allowed & padding.bool()[:, None, :]
    allowed = (allowed | torch.eye(length, dtype=torch.bool, device=given.device))[:, None]
    if form == "sdpa":
        return allowed
    lowest = torch.finfo(model.dtype).min
    return torch.zeros_like(allowed, dtype=model.dtype).masked_fill(~allowed, lowest)


def _form(model: PreTrainedModel) -> str:
    config = model.config.get_text_config()
    implementation = str(model.config._attn_implementation)
    if implementation not in {"eager", "sdpa"}:
        raise ValueError(
            f"attention {implementation!r} does not take a mask of who sees whom; "
            "load the model with attn_implementation='sdpa'."
        )
    layers = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    if layers - {"full_attention"} or (window and not layers):
        raise ValueError(f"{config.model_type} attends in windows, which a full mask would switch off unnoticed.")
    if config.model_type in {"bloom", "mpt"} or getattr(config, "alibi", False):
        raise ValueError(f"{config.model_type} uses ALiBi, whose biases are built from a two-dimensional mask only.")
    return implementation


def position_ids_for(document_ids: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
    """Return positions that start at 0 in every document, and skip padding; ``(B, T)`` int64.

    Args:
        document_ids: ``(B, T)`` integers, each document in one piece.
        padding: ``(B, T)``, 1 at real tokens; padding gets position 0.

    Raises:
        ValueError: neither is given.
    """
    given = document_ids if document_ids is not None else padding
    if given is None:
        raise ValueError("position_ids_for needs document_ids or padding.")
    real = torch.ones_like(given, dtype=torch.long) if padding is None else (padding != 0).long()
    count = real.cumsum(dim=1) - real  # real tokens before each position
    if document_ids is not None:
        first = torch.ones_like(given, dtype=torch.bool)
        first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        count = count - torch.where(first, count, 0).cummax(dim=1).values
    return count * real


def packed_inputs(
    model: PreTrainedModel, input_ids: Tensor, document_ids: Tensor, position_ids: Tensor
) -> dict[str, Tensor]:
    """What to call a causal model with so that documents packed into rows do not see each other.

    Under sdpa and eager that is a four-dimensional mask. Flash attention takes none: there all rows become one, and
    transformers finds the borders where ``position_ids`` start anew.

    Args:
        model: decides which of the two.
        input_ids: ``(B, T)``.
        document_ids: ``(B, T)`` integers, each document in one piece.
        position_ids: ``(B, T)``, from 0 in every document or, except under flash attention, through the row.

    Returns:
        ``input_ids`` and ``position_ids`` ``(B, T)`` and the mask; under flash attention ``(1, B T)`` without a mask.

    Raises:
        ValueError: see ``attention_mask_for``.
    """
    if "flash" in str(model.config._attn_implementation):
        return {"input_ids": input_ids.reshape(1, -1), "position_ids": position_ids.reshape(1, -1)}
    mask = attention_mask_for(model, "causal", document_ids=document_ids)
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}


def keeps_documents_apart(model: PreTrainedModel, rows: int = 1) -> bool:
    """Whether ``position_ids`` that start anew, and nothing else, keep attention inside the documents of a row.

    Found by trying: transformers reads borders off the positions for most architectures where the model is called
    without a cache (``model.config.use_cache = False``, as its Trainer sets it), for sdpa and eager in any batch and
    for flash attention in batches of one row. Elsewhere it ignores them without a word.

    Args:
        model: causal; run in evaluation mode and given back in its own.
        rows: of a batch.
    """
    length, training = 4, model.training
    vocabulary = model.config.get_text_config().vocab_size
    documents = torch.arange(2 * length, device=model.device).view(2, length) % vocabulary
    packed, positions = documents.view(1, -1).repeat(rows, 1), torch.arange(length, device=model.device).repeat(rows, 2)
    model.eval()
    with torch.no_grad():
        together = model(input_ids=packed, position_ids=positions).logits
        alone = model(input_ids=documents).logits
    model.train(training)
    expected = alone.flatten(0, 1).float().expand(rows, -1, -1)
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    return bool((together.float() - expected).abs().max() <= tolerance * expected.abs().max())
