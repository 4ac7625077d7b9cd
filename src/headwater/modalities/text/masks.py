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

__all__ = ["attention_mask_for", "position_ids_for"]

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
