"""Prefixes in attention that are weighed among themselves: Prefix-Tuning that adapts as fast as an adapter does.

    a, b       = softmax over [q K' / sqrt(d), q P_k' / sqrt(d)]        a: tokens, b: prefix;  lambda = sum of b
    Prefix     = a V + b P_v
    here       = a V + s (b / lambda) P_v

lambda is small where attention is sure of itself, and so is then the gradient of an ordinary prefix; divided by it, the
weights of the prefix sum to 1, and P_v learns as an adapter's output would. s is learned (``CalibrationScale``).

Source: Gao et al., "A Unified Continual Learning Framework with General Parameter-Efficient Tuning", arXiv:2303.10070,
section 3.3; prefixes: Li and Liang, "Prefix-Tuning", arXiv:2101.00190.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headwater.continual.pet import CalibrationScale, PetModel, attentions
from headwater.core.rng import torch_generator

__all__ = ["CompensatedPrefix", "add_prefixes", "compensated_attention"]

_NAME = "headwater_compensated_prefix"


def compensated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    mask: Tensor | None = None,
    scaling: float | None = None,
    calibration: Tensor | float = 1.0,
    dropout: float = 0.0,
) -> Tensor:
    """Attend to tokens and to a prefix.

    Args:
        query: ``(batch, heads, queries, d)``.
        key: ``(batch, heads, tokens, d)``.
        value: ``(batch, heads, tokens, d)``.
        prefix_key: ``(heads, prefix, d)``; a prefix of length zero leaves ordinary attention.
        prefix_value: ``(heads, prefix, d)``.
        mask: added to the scores of the tokens, or True where a token may be seen; broadcasts to
            ``(batch, heads, queries, tokens)``.
        scaling: of the scores; 1 / sqrt(d) by default.
        calibration: s.
        dropout: probability with which a token's weight is dropped.

    Returns:
        ``(batch, heads, queries, d)``.
    """
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores, of_prefix = query @ key.transpose(-1, -2), query @ prefix_key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    num = prefix_key.shape[-2]
    joint = torch.cat((of_prefix, scores), dim=-1).softmax(dim=-1, dtype=torch.float32)
    tokens = nn.functional.dropout(joint[..., num:].to(value.dtype), dropout)
    # b / lambda is the softmax over the prefix alone: exact where lambda underflows, too.
    own = of_prefix.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return tokens @ value + calibration * (own @ prefix_value)


class CompensatedPrefix(nn.Module):
    """Keys and values that stand before those of one attention module.

    Args:
        num: how many of each.
        features: width of all heads together.
        generator: draws them.

    Shapes:
        call as ``compensated_attention`` without its prefix; ``features`` is heads times d.
    """

    def __init__(self, num: int, features: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.empty(num, features))
        self.value = nn.Parameter(torch.empty(num, features))
        self.calibration = CalibrationScale()
        for vectors in (self.key, self.value):
            nn.init.xavier_uniform_(vectors, generator=generator)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:  # Any: see the function
        """What the attention module gives, ``(batch, heads, queries, d)``."""
        _, heads, _, width = query.shape
        prefix_key, prefix_value = (
            vectors.to(query.dtype).view(len(vectors), heads, width).transpose(0, 1)
            for vectors in (self.key, self.value)
        )
        calibration = self.calibration.value.to(query.dtype)
        return compensated_attention(query, key, value, prefix_key, prefix_value, calibration=calibration, **options)


def add_prefixes(model: nn.Module, *, num: int, blocks: int, seed: int) -> PetModel:
    """Put a prefix into the attention of the first blocks.

    Args:
        model: an encoder whose attention goes through transformers' ``AttentionInterface``; frozen in place.
        num: keys, and values, in each block.
        blocks: how many blocks.
        seed: of the prefixes.

    Raises:
        ValueError: the attention of the model cannot be reached, or its keys have fewer heads than its queries.
    """
    sites: dict[str, nn.Module] = {}
    for name, (key, _) in attentions(model, blocks).items():
        module = model.get_submodule(name)
        if getattr(module, "num_key_value_groups", 1) != 1:
            raise ValueError("a prefix needs as many heads of keys as of queries; use adapter or lora here.")
        width = module.get_submodule(key).out_features
        assert isinstance(width, int)
        sites[name] = CompensatedPrefix(num, width, torch_generator(seed, "prefix", name))
    settable = getattr(model, "_can_set_attn_implementation", lambda: False)
    if not sites or not settable():
        raise ValueError(
            f"a prefix needs a transformers encoder with projections to keys and to values of their own, whose "
            f"attention can be replaced; {type(model).__name__} is not one. Use adapter here."
        )
    wrapped = PetModel(model, sites, {"kind": "prefix", "num": num})
    _replace_attention(model)
    for index, name in enumerate(wrapped.sites):
        # A tuple, so that the module does not take the wrapper for a part of itself.
        model.get_submodule(name).compensated_prefix = (wrapped, index)  # type: ignore[assignment]
    return wrapped


def _replace_attention(model: Any) -> None:  # Any: transformers' own
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)


def _attend(
    module: Any,  # Any: transformers' attention modules have no common type
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    wrapped, index = getattr(module, "compensated_prefix", (None, 0))
    if wrapped is None or not wrapped.enabled:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    if attention_mask is None and getattr(module, "is_causal", False):
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    output = wrapped.pets[index](query, key, value, mask=attention_mask, scaling=scaling, dropout=dropout)
    return output.transpose(1, 2).contiguous(), None
