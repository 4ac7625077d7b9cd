"""Rotary positions of a longer reach: a raised base, or interpolated positions, in any model of transformers.

    theta_i = b^(-2 i / d),  i = 0 .. d/2 - 1        the angle by which pair i of a head of size d turns per position

Adjusted base frequency (``abf``) raises b, so that slow pairs turn slower still and fast ones stay; position
interpolation (``pi``) divides every angle by the same factor.

Source: Xiong et al., "Effective Long-Context Scaling of Foundation Models", arXiv:2309.16039, section 4.1;
    Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation", arXiv:2306.15595.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from headwater.modalities.models import ModelError

__all__ = ["RopeMethod", "auto_base", "extend_rope", "window_words", "windowed_layers"]

logger = logging.getLogger(__name__)

LEAST_FACTOR = 50.0  # section 2.1: 10,000 to 500,000
KEPT = ("partial_rotary_factor", "mrope_section")  # what a rope block says besides its base and scaling
RopeMethod = Literal["abf", "pi", "none"]


def auto_base(old: float, rotary_dim: int, max_length: int) -> float:
    """The smallest base at which the slowest pair turns at most half way round within the context, and >= 50 x the old.

    Args:
        old: the base now.
        rotary_dim: dimensions of a head that turn, d.
        max_length: the context wanted.

    Example:
        >>> auto_base(10_000.0, 128, 32_768)
        500000.0
    """
    if rotary_dim <= 2:  # one pair, whose angle is 1 whatever the base
        return LEAST_FACTOR * old
    # Wavelength of pair d/2 - 1: 2 pi b^((d - 2) / d) >= 2 max_length.
    slowest = math.pow(max_length / math.pi, rotary_dim / (rotary_dim - 2))
    return max(LEAST_FACTOR * old, slowest)


def extend_rope(
    model: PreTrainedModel, *, max_length: int, method: RopeMethod = "abf", base: float | Literal["auto"] = "auto"
) -> PreTrainedModel:
    """Make a model's rotary positions fit a longer context, in place.

    The configuration and the frequencies that the live model keeps are changed together, so what ``save_pretrained``
    writes gives the same logits when it is opened again. In models whose layers differ (Gemma 3), the layers that see
    a window only keep their positions.

    Args:
        model: any causal or masked model of transformers with rotary positions, or a PEFT model around one.
        max_length: positions it shall have, more than now.
        method: ``abf`` raises the base; ``pi`` divides angles by ``max_length`` / positions now; ``none`` leaves
            angles as they are and only raises the number of positions.
        base: for ``abf``; ``auto`` is ``auto_base``. A base that is given replaces a scaling that the model has.

    Returns:
        The same model.

    Raises:
        ModelError: positions are not rotary, or already scaled, or the rotary module does not follow its configuration;
            ``max_length`` or ``base`` is not above the present one.
    """
    config: Any = model.config.get_text_config()  # Any: configurations differ in their fields
    places = _rotary_places(model, config)
    old_length = int(config.max_position_embeddings)
    if max_length <= old_length:
        raise ModelError(
            f"the model has {old_length} positions already; max_length must be more, got {max_length}. "
            "Continue it with domain/plain instead."
        )
    windowed = windowed_layers(config, max_length)
    if windowed:
        logger.warning(window_words(windowed, max_length))
    if method == "none":
        config.max_position_embeddings = max_length
        return model
    changed = copy.deepcopy(config)
    changed.max_position_embeddings = max_length
    dims = {name: 2 * len(buffer) for _, module in places for name, buffer in _frequencies(module).items()}
    # A kind of layer that a small model does not have (Gemma 3: five windows to one full layer) keeps no frequencies.
    blocks = {key: block for key, block in _rope_blocks(changed).items() if _buffer(key) in dims}
    if not blocks:
        raise ModelError("every layer of the model attends within a window, so none could use a longer context.")
    for key, block in blocks.items():
        kept = {name: block[name] for name in KEPT if name in block}
        fresh_block = kept | _changed(block, dims[_buffer(key)], old_length, max_length, method, base)
        block.clear()
        block.update(fresh_block)
    rebuilt = [_rebuilt(module, changed) for _, module in places]
    # Nothing has been touched before this point, so a refusal leaves the model as it was.
    config.rope_parameters = changed.rope_parameters
    config.max_position_embeddings = max_length
    for (path, module), fresh in zip(places, rebuilt, strict=True):
        device = next(module.buffers()).device
        fresh.config = config
        model.set_submodule(path, fresh.to(device))
    return model


def _buffer(key: str) -> str:
    """The name of the frequencies of a kind of layer; "" is all layers."""
    return f"{key}_inv_freq" if key else "inv_freq"


def _frequencies(module: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that hold angles: ``inv_freq``, or one of them for each kind of layer."""
    return {
        name: buffer
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    }


def _rotary_places(model: nn.Module, config: Any) -> list[tuple[str, nn.Module]]:
    """The modules that turn positions into angles, by path."""
    places = [(path, module) for path, module in model.named_modules() if _frequencies(module)]
    if not places or not getattr(config, "rope_parameters", None):
        raise ModelError(
            f"only rotary positions can be extended this way; {config.model_type} has {_scheme(model, config)}."
        )
    return places


def _scheme(model: nn.Module, config: Any) -> str:
    if config.model_type in ("bloom", "mpt") or getattr(config, "alibi", False):
        return "ALiBi biases, which need no change to read further"
    tables = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe"))
    ]
    if tables:
        return f"learned positions (a table, {tables[0]})"
    return "no rotary module that keeps its frequencies (inv_freq) under rope_parameters"


def _rope_blocks(config: Any) -> dict[str, dict[str, Any]]:
    """Rope parameters by kind of layer, without those of windows; under "" where all layers share them."""
    parameters: dict[str, Any] = config.rope_parameters
    nested = {key: block for key, block in parameters.items() if isinstance(block, dict)}
    if not nested:
        return {"": parameters}
    return {key: block for key, block in nested.items() if not key.startswith(("sliding", "chunked"))}


def _changed(
    block: dict[str, Any], dim: int, old_length: int, max_length: int, method: RopeMethod, base: float | Literal["auto"]
) -> dict[str, Any]:
    kind, old = block.get("rope_type", "default"), float(block["rope_theta"])
    given = method == "abf" and base != "auto"
    if kind != "default" and not given:
        raise ModelError(
            f"the model's rotary positions are scaled already (rope_type {kind!r}, base {old:g}). Scaling them twice "
            "is not what either method was made for: give method 'abf' and a base to replace the scaling."
        )
    if kind != "default":
        logger.warning("the scaling %r of the rotary positions is replaced by base %g", kind, base)
    if method == "pi":
        return {"rope_type": "linear", "rope_theta": old, "factor": max_length / old_length}
    new = auto_base(old, dim, max_length) if base == "auto" else float(base)
    if new <= old:
        raise ModelError(f"base must be above the model's, {old:g}; got {new:g}. Lowering it shortens the context.")
    return {"rope_type": "default", "rope_theta": new}


def _rebuilt(module: nn.Module, config: Any) -> nn.Module:
    """The rotary module anew from a configuration, held to the equation."""
    fresh: nn.Module = cast(Callable[[Any], nn.Module], type(module))(config)
    blocks = {_buffer(key): block for key, block in _rope_blocks(config).items()}
    for name, found in _frequencies(fresh).items():
        block = blocks.get(name)
        if block is None:  # of layers that see a window
            continue
        dim = 2 * len(found)
        angles = float(block["rope_theta"]) ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        if not torch.allclose(found.double(), angles / block.get("factor", 1.0), rtol=1e-5, atol=0):
            raise ModelError(
                f"{type(module).__name__} does not compute its frequencies from rope_parameters as the equation has "
                "it, so this model cannot be extended this way."
            )
    return fresh


def windowed_layers(config: Any, max_length: int) -> list[int]:  # Any: a configuration of transformers
    """Which layers see a window shorter than ``max_length`` only, whatever their positions; from 0."""
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if window is None or window >= max_length or not getattr(config, "use_sliding_window", True):
        return []
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return list(range(config.num_hidden_layers))
    return [layer for layer, kind in enumerate(kinds) if kind.startswith(("sliding", "chunked"))]


def window_words(layers: Sequence[int], max_length: int) -> str:
    """What to tell the user about ``windowed_layers``."""
    return (
        f"layers {', '.join(map(str, layers))} attend within a window shorter than {max_length} tokens, and still "
        "will: only the others can use the longer context"
    )
