"""Several causal language models that read the same tokens, each with its own cache of keys and values.

What a method makes of their logits is the method's; this is how they are run: one call feeds all of them, and one cache
object holds all their states, so that ``generate`` reorders, repeats and crops them together.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

__all__ = ["SideBySide", "SideBySideCache"]


class SideBySideCache(Cache):  # type: ignore[misc]  # transformers ships no types
    """The caches of several models as one: its layers are all their layers.

    Reordering beams, cropping, repeating and resetting therefore act on every model at once; its length is the first
    model's.

    Args:
        parts: one cache for each model, by name.
    """

    def __init__(self, parts: Mapping[str, Cache]) -> None:
        super().__init__(layers=[layer for part in parts.values() for layer in part.layers])
        self.parts = dict(parts)

    def keep(self, length: int, names: Iterable[str] | None = None) -> None:
        """Forget what comes after the first ``length`` tokens, in the models ``names`` (all by default).

        Sliding windows must have been recorded (``activate_past_recording``) to be taken back.
        """
        for name in self.parts if names is None else names:
            surplus = self.parts[name].get_seq_length() - length
            if surplus > 0:
                # Negative: how many to remove. The meaning of a positive number changed in transformers 5.
                self.parts[name].crop(-surplus)


class SideBySide(nn.Module):
    """Causal language models that are fed together.

    Args:
        models: by name, the first one leading: the shared cache reports its length. A model may stand on a device of
            its own, may be quantised, and may be a ``peft`` model.

    Raises:
        ValueError: a model that is no decoder-only language model, or whose state is no cache of keys and values.
    """

    models: Any  # Any: an nn.ModuleDict of PreTrainedModel, which transformers does not type

    def __init__(self, models: Mapping[str, PreTrainedModel]) -> None:
        super().__init__()
        for name, model in models.items():
            _check(name, model)
        self.models = nn.ModuleDict(models)
        signatures = {name: inspect.signature(_inner(model).forward) for name, model in models.items()}
        self._accepts = {name: set(signature.parameters) for name, signature in signatures.items()}

    def fresh_cache(self) -> SideBySideCache:
        """An empty cache, its layers as each model's configuration wants them (full or sliding attention)."""
        return SideBySideCache({name: DynamicCache(config=model.config) for name, model in self.models.items()})

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cache: SideBySideCache | None = None,
        logits_to_keep: int = 0,
        names: Iterable[str] | None = None,
    ) -> dict[str, Tensor]:
        """Run the models one after another.

        Args:
            input_ids: ``(batch, time)``; with a cache, the tokens that it does not hold yet.
            attention_mask: ``(batch, cached + time)``, 0 for padding.
            position_ids: ``(batch, time)``; handed to the models that take them.
            cache: from ``fresh_cache``; extended in place.
            logits_to_keep: only so many last positions; 0 keeps all.
            names: which models; all by default.

        Returns:
            By name, ``(batch, kept, vocabulary)`` in the model's own dtype and on its own device.

        Raises:
            RuntimeError: a model did not store what it read, so that its cache is not worth anything.
        """
        found = {}
        for name in self.models if names is None else names:
            model, accepts = self.models[name], self._accepts[name]
            device = next(model.parameters()).device
            optional = {"attention_mask": attention_mask, "position_ids": position_ids}
            arguments: dict[str, Tensor | int] = {
                key: value.to(device) for key, value in optional.items() if value is not None and key in accepts
            }
            if logits_to_keep and "logits_to_keep" in accepts:
                arguments["logits_to_keep"] = logits_to_keep
            part = None if cache is None else cache.parts[name]
            before = 0 if part is None else part.get_seq_length()
            logits = model(
                input_ids=input_ids.to(device), past_key_values=part, use_cache=part is not None, **arguments
            ).logits
            if part is not None and part.get_seq_length() != before + input_ids.shape[1]:
                raise RuntimeError(
                    f"{name} read {input_ids.shape[1]} tokens and its cache went from {before} to "
                    f"{part.get_seq_length()}; run it with use_cache=False."
                )
            found[name] = logits[:, -logits_to_keep:] if logits_to_keep else logits
        return found


def _inner(model: PreTrainedModel) -> PreTrainedModel:
    """The model inside a ``peft`` model, whose own ``forward`` names no argument."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check(name: str, model: PreTrainedModel) -> None:
    inner = _inner(model)
    config = getattr(inner, "config", None)
    if config is None or not hasattr(inner, "generate"):
        raise ValueError(f"{name} must be a causal language model of transformers; got {type(inner).__name__}.")
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder ({type(inner).__name__}); a decoder-only model is needed.")
    if not inner._supports_default_dynamic_cache():
        raise ValueError(
            f"{name} ({type(inner).__name__}) keeps its state in a form of its own, not in a cache of keys and values."
        )
