"""Emulated fine-tuning: decode as the large model would after the fine-tuning that only a small model had.

    log pi(y_t | y_<t) = log p_large(y_t | y_<t)
                         + scale * sum_k w_k [ log p_tuned_k(y_t | y_<t) - log p_small(y_t | y_<t) ] - log Z_t

``small`` is what every ``tuned_k`` was tuned from. With one tuned model and scale 1 this is up-scaling; with a large
tuned pair beside a small base, down-scaling; several w_k interpolate between behaviours at test time. Nothing is
trained and no weight is touched: what is left is a model that can be called.

With ``top_p`` the bracket is 0 outside the smallest set of tokens that holds that much probability, so that noise in
the tail of two small models moves nothing there.

Source: Mitchell et al., "An Emulator for Fine-Tuning Large Language Models using Small Language Models",
arXiv:2310.12962.
Differs: the set of ``top_p`` can also be taken from the mixture; the paper's tables use one small pair, here there may
be several tuned models of one small base.
Needs: a large base, a small base and its tuned version, all of one vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from headwater.compose.base import CallableModel, Composed, Composition, CompositionContext
from headwater.compose.emulated_files import ComposedFile, PartFile, read_composed, write_composed
from headwater.compose.side_by_side import SideBySide, SideBySideCache
from headwater.core.recipe import ModelRef, Spec
from headwater.modalities.models import ModelError, head_of, load_model
from headwater.modalities.text.objectives import token_loss

__all__ = [
    "EmulatedFinetuning",
    "EmulatedModel",
    "check_vocabularies",
    "emulated_log_probs",
    "load_emulated",
    "score",
]

Tuned: TypeAlias = PreTrainedModel | Mapping[str, tuple[PreTrainedModel, float]]
FilterBy: TypeAlias = Literal["tuned", "mixture"]


def emulated_log_probs(
    large: Tensor,
    small: Tensor,
    tuned: Tensor | Sequence[tuple[Tensor, float]],
    *,
    scale: float = 1.0,
    top_p: float | None = None,
    filter_by: FilterBy = "tuned",
) -> Tensor:
    """The composed distribution, from the logits of its parts.

    A constant added to all logits of a part cancels in Z, so that nothing but the result is normalised (but with
    ``top_p``, where a bracket of 0 must mean what it says).

    Args:
        large: ``(..., V)``, any floating dtype; computed with in float32.
        small: ``(..., V)``; its last dimension may be longer or shorter, as heads are padded differently. Ids beyond
            the shortest head have probability 0.
        tuned: as ``small``; or several with their weights.
        scale: of the whole correction; 0 gives the large model.
        top_p: in (0, 1]; the correction is 0 outside the smallest set that holds so much probability.
        filter_by: whose probability that is: each tuned model's, or the mixture's before filtering.

    Returns:
        ``(..., V of large)`` float32 log-probabilities, on the device of ``large``.

    Raises:
        ValueError: ``top_p`` outside (0, 1], or leading dimensions that differ.

    Example:
        >>> large, small, tuned = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 5.0, 2.0]]).log()
        >>> emulated_log_probs(large, small, tuned).exp()  # (2, 1, 1) * (1, 5, 2), normalised
        tensor([0.2222, 0.5556, 0.2222])
    """
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1]; got {top_p}. Use None to keep the whole correction.")
    pairs = [(tuned, 1.0)] if isinstance(tuned, Tensor) else list(tuned)
    if strange := [logits.shape for logits in (small, *(t for t, _ in pairs)) if logits.shape[:-1] != large.shape[:-1]]:
        raise ValueError(
            f"all parts must score the same places; large has logits {tuple(large.shape)}, another {tuple(strange[0])}."
        )
    width = min(large.shape[-1], small.shape[-1], *(logits.shape[-1] for logits, _ in pairs))
    start, reference = (_float(logits, width, large.device) for logits in (large, small))
    total = start
    for logits, weight in pairs:
        own = _float(logits, width, large.device)
        # The difference first: two equal small models then leave the large one exactly as it is.
        bracket = own - reference
        if top_p is not None:
            bracket += reference.logsumexp(-1, keepdim=True) - own.logsumexp(-1, keepdim=True)
            if filter_by == "tuned":
                bracket.masked_fill_(~_nucleus(own, top_p), 0.0)
        total = total.add(bracket, alpha=scale * weight)
    if top_p is not None and filter_by == "mixture":
        total = torch.where(_nucleus(total, top_p), total, start)
    found = total.log_softmax(-1)
    return F.pad(found, (0, large.shape[-1] - width), value=-torch.inf)


def _float(logits: Tensor, width: int, device: torch.device) -> Tensor:
    return logits[..., :width].to(device, torch.float32)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Whether each token is in the smallest set of probability ``top_p``; the likeliest token always is."""
    ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before < top_p)


def check_vocabularies(tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> None:
    """Refuse models whose tokens are not the same: their probabilities are then not of the same things.

    Args:
        tokenizers: by the name of the model; all are compared with the first.

    Raises:
        ModelError: they differ; names how many ids differ, how many tokens each side has alone, and five of them.
    """
    (first, reference), *others = ((name, tokenizer.get_vocab()) for name, tokenizer in tokenizers.items())
    for name, vocabulary in others:
        moved = sorted(token for token in reference.keys() & vocabulary.keys() if reference[token] != vocabulary[token])
        alone = {
            first: sorted(reference.keys() - vocabulary.keys(), key=reference.__getitem__),
            name: sorted(vocabulary.keys() - reference.keys(), key=vocabulary.__getitem__),
        }
        shown = [f"{token!r} is {reference[token]} in {first} and {vocabulary[token]} in {name}" for token in moved]
        for owner, tokens in alone.items():
            ids = reference if owner == first else vocabulary
            shown += [f"{token!r} ({ids[token]}) is in {owner} only" for token in tokens]
        if shown:
            raise ModelError(
                f"{first} and {name} have different vocabularies of {len(reference)} and {len(vocabulary)} tokens: "
                f"{len(moved)} have another id, {len(alone[first])} are in {first} only and {len(alone[name])} in "
                f"{name} only: {'; '.join(shown[:5])}. Emulated fine-tuning adds probabilities of the same token: take "
                "models of one family."
            )


class EmulatedModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers ships no types
    """The large model as if it had been tuned: a causal language model whose logits are log-probabilities.

    Works with ``generate`` (greedy, sampling, beams, left padding, assisted), ``pipeline``, and wherever a model is
    scored. Every part keeps its keys and values; beams reorder all of them. Generation ends at any token at which the
    large or a tuned model would end. All parts are put in the large model's mode, training or evaluation.

    Args:
        large: the model to decode from.
        small: the base of the tuned models.
        tuned: a tuned version of ``small``; or several, by name, with their weights. May be ``small``'s own ``peft``
            model with another copy of the base.
        scale: of the correction.
        top_p: see ``emulated_log_probs``.
        filter_by: see ``emulated_log_probs``.

    Attributes:
        width: ids from here on have probability 0, as one of the parts has none for them.

    Raises:
        ValueError: a part that is no decoder-only language model, a ``top_p`` outside (0, 1], or no tuned model.

    Example:
        ``EmulatedModel(large, small, tuned).eval().generate(**tokenizer("Why?", return_tensors="pt"))``
    """

    def __init__(
        self,
        large: PreTrainedModel,
        small: PreTrainedModel,
        tuned: Tuned,
        *,
        scale: float = 1.0,
        top_p: float | None = None,
        filter_by: FilterBy = "tuned",
    ) -> None:
        named: dict[str, tuple[PreTrainedModel, float]]
        named = dict(tuned) if isinstance(tuned, Mapping) else {"tuned": (tuned, 1.0)}
        if not named or {"large", "small"} & named.keys():
            raise ValueError(f"tuned models need names other than 'large' and 'small'; got {list(named) or 'none'}.")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1]; got {top_p}. Use None to keep the whole correction.")
        parts = SideBySide({"large": large, "small": small, **{name: model for name, (model, _) in named.items()}})
        super().__init__(_config(parts))
        self.parts = parts
        self.weights = {name: weight for name, (_, weight) in named.items()}
        self.width = min(part.config.get_text_config().vocab_size for part in parts.models.values())
        self.scale, self.top_p, self.filter_by = scale, top_p, filter_by
        self.generation_config = copy.deepcopy(large.generation_config)
        self.generation_config.eos_token_id = _ends([large, *(model for model, _ in named.values())])
        self.train(large.training)

    def combine(self, logits: Mapping[str, Tensor]) -> Tensor:
        """``emulated_log_probs`` of the parts' logits, by name."""
        tuned = [(logits[name], weight) for name, weight in self.weights.items()]
        return emulated_log_probs(
            logits["large"], logits["small"], tuned, scale=self.scale, top_p=self.top_p, filter_by=self.filter_by
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """As any causal model of transformers.

        Args:
            input_ids: ``(batch, time)``.
            attention_mask: ``(batch, cached + time)``, 0 for padding.
            position_ids: ``(batch, time)``.
            past_key_values: of an earlier call.
            labels: ``(batch, time)``, not shifted; -100 is left out. Needs all logits.
            use_cache: keep keys and values; by default as the large model does, and not in training.
            logits_to_keep: only so many last positions; 0 keeps all.
            return_dict: must not be False; for ``generate``.

        Returns:
            ``logits`` ``(batch, kept, V)`` float32 log-probabilities; ``past_key_values``; ``loss``, the mean in nats.

        Raises:
            TypeError: ``past_key_values`` is a cache that three models cannot share.
            ValueError: ``return_dict`` is False, or labels without all logits.
        """
        if return_dict is False:
            raise ValueError("return_dict=False is not supported; read the fields of the output.")
        if use_cache is None:
            use_cache = not self.training and bool(getattr(self.config, "use_cache", True))
        cache = self._cache(past_key_values, use_cache)
        logits = self.parts(input_ids, attention_mask, position_ids, cache=cache, logits_to_keep=logits_to_keep)
        found = self.combine(logits)
        loss = None
        if labels is not None:
            summed = token_loss(found[:, :-1], labels[:, 1:].to(found.device))
            loss = summed.total / summed.count
        return CausalLMOutputWithPast(loss=loss, logits=found, past_key_values=cache)

    def _cache(self, given: Cache | None, wanted: bool) -> SideBySideCache | None:
        if given is not None and not isinstance(given, SideBySideCache):
            raise TypeError(
                f"past_key_values must be the cache that an earlier call returned; got a {type(given).__name__}, which "
                "belongs to one model. Static, quantised and offloaded caches are not supported."
            )
        return self.parts.fresh_cache() if given is None and wanted else given

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],  # Any: the arguments of forward
        *args: Any,  # Any: the rest of a signature that is transformers' own
        **kwargs: Any,
    ) -> None:
        """Called by ``generate``, which would make a cache for one model of the large model's configuration."""
        wanted = generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None
        if wanted and generation_config.cache_implementation in (None, "dynamic"):
            model_kwargs["past_key_values"] = self.parts.fresh_cache()
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def save_pretrained(self, *_: object, **__: object) -> None:
        """Refused: there is nothing to save that the parts do not hold.

        Raises:
            NotImplementedError: always; names what to do.
        """
        raise NotImplementedError(
            "an EmulatedModel has no weights of its own. Save its parts where they are not saved yet, and name them "
            "with headwater.compose.emulated_files.write_composed; load_emulated opens what it writes."
        )


def _config(parts: SideBySide) -> Any:  # Any: transformers ships no types
    """The large model's, with the shortest context of all."""
    configs = [model.config.get_text_config() for model in parts.models.values()]
    config = copy.deepcopy(parts.models["large"].config)
    config._attn_implementation = "eager"  # the wrapper attends to nothing; its parts keep their own
    limits = [limit for c in configs if (limit := getattr(c, "max_position_embeddings", None))]
    if limits:
        config.get_text_config().max_position_embeddings = min(limits)
    return config


def _ends(models: Sequence[PreTrainedModel]) -> list[int] | None:
    """All end tokens: a chat model often ends with another one than its base."""
    found: dict[int, None] = {}
    for model in models:
        ends = model.generation_config.eos_token_id
        found |= dict.fromkeys([] if ends is None else [ends] if isinstance(ends, int) else ends)
    return list(found) or None


def score(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """How surprised a model is by each token.

    Args:
        model: an ``EmulatedModel``, or any causal language model.
        input_ids: ``(batch, time)``.
        attention_mask: ``(batch, time)``, 0 for padding.

    Returns:
        ``(batch, time)`` nats, float32; 0 at the first token, which nothing predicts, at padding and right after it.
    """
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    following = input_ids[:, 1:].to(logits.device)
    nats = F.cross_entropy(logits.float().transpose(1, 2), following, reduction="none")
    if attention_mask is not None:
        nats = nats.masked_fill((attention_mask[:, 1:] * attention_mask[:, :-1]).to(nats.device) == 0, 0.0)
    return F.pad(nats, (1, 0))


def load_emulated(directory: str | Path, *, trust_remote_code: bool = False) -> EmulatedModel:
    """Open what the recipe (or ``write_composed``) left.

    Args:
        directory: holds ``composed.json``; names in it that begin with ``./`` are looked for beside it.
        trust_remote_code: run modelling code that a part ships.

    Returns:
        The composed model, in ``eval()``, on the CPU; ``.to(device)`` moves all parts.

    Raises:
        ModelError: no ``composed.json`` there, or one that this version does not read; a part that cannot be opened.
    """
    composed = read_composed(Path(directory))
    refs = {
        role: ModelRef(name=part.name, revision=part.revision, dtype=part.dtype, trust_remote_code=trust_remote_code)
        for role, part in composed.models.items()
    }
    models = {}
    for role, part in composed.models.items():
        on = refs[part.adapter_on or role]
        models[role] = load_model(on, head_of(on))
        if part.adapter_on is not None:
            from peft import PeftModel

            models[role] = PeftModel.from_pretrained(models[role], part.name).merge_and_unload()
    model: EmulatedModel = EmulatedModel(
        models["large"],
        models["small"],
        {role: (models[role], weight) for role, weight in composed.tuned.items()},
        scale=composed.scale,
        top_p=composed.top_p,
        filter_by=composed.filter_by,
    ).eval()
    return model


class TopP(Spec):
    """Where the correction is kept."""

    p: float = Field(default=0.95, gt=0, le=1, description="probability that the kept tokens hold")  # section 5
    by: FilterBy = Field(
        default="tuned", description="whose probability: each tuned model's, or the mixture's before filtering"
    )


class EmulatedFinetuning(Composition):
    """The large model with the difference that tuning made to a small one.

    Source: Mitchell et al., arXiv:2310.12962.
    """

    id: ClassVar[str] = "emulated_finetuning"
    roles: ClassVar[tuple[str, ...]] = ("large", "small")
    shared: ClassVar[Literal["architecture", "vocabulary"]] = "vocabulary"

    tuned: dict[str, float] = Field(
        default={"small_tuned": 1.0},
        min_length=1,
        description="weight of each tuned version of `small`, by role; several interpolate between behaviours",
    )
    scale: float = Field(
        default=1.0,  # 1 throughout the paper's up-scaling
        ge=-10,
        le=10,
        description="factor on the correction; 0 is the large model, 1 full emulation",
    )
    filter: TopP | None = Field(
        default=None, description="drop the correction of unlikely tokens; null keeps all of it"
    )
    tokenizer_from: str = Field(
        default="small_tuned",
        description="role whose tokenizer and chat template the whole gets; the vocabularies are the same",
    )
    adapters_on: str = Field(default="small", description="role of the model that LoRA adapters belong on")

    @model_validator(mode="after")
    def _tuned_are_models(self) -> EmulatedFinetuning:
        if unknown := sorted(set(self.tuned) - set(self.models)):
            raise ValueError(f"tuned names {unknown[0]!r}, which is no role of models: {', '.join(self.models)}")
        if taken := sorted(set(self.tuned) & set(self.roles)):
            raise ValueError(f"tuned names {taken[0]!r}, which is no tuned model")
        if idle := sorted(set(self.models) - set(self.tuned) - set(self.roles)):
            raise ValueError(f"model {idle[0]!r} has no weight; tuned names {', '.join(self.tuned)}")
        if self.out_dtype != "auto":
            raise ValueError(
                f"out_dtype is {self.out_dtype!r}, but no weights are written; set the dtype of each model"
            )
        return self

    def compose(self, ctx: CompositionContext) -> Composed:
        """Open the parts beside each other; write which they are and how they are combined."""
        for role in self.roles:
            if ctx.is_adapter(role):
                raise ModelError(f"{role}: {self.models[role].name!r} is an adapter; give the model that it makes.")
        check_vocabularies({role: ctx.tokenizer_of(role) for role in self.models})
        models = {role: ctx.model(role) for role in self.models}
        top_p = None if self.filter is None else self.filter.p
        filter_by: FilterBy = "tuned" if self.filter is None else self.filter.by
        composed = EmulatedModel(
            models["large"],
            models["small"],
            {role: (models[role], weight) for role, weight in self.tuned.items()},
            scale=self.scale,
            top_p=top_p,
            filter_by=filter_by,
        )
        self._note(ctx, models)
        ctx.out.mkdir(parents=True, exist_ok=True)
        ctx.tokenizer.save_pretrained(ctx.out)
        composed.generation_config.save_pretrained(ctx.out)
        parts = {
            role: PartFile.of(ref, ctx.directory(role), self.adapters_on if ctx.is_adapter(role) else None)
            for role, ref in self.models.items()
        }
        write_composed(
            ctx.out,
            ComposedFile(models=parts, tuned=self.tuned, scale=self.scale, top_p=top_p, filter_by=filter_by),
        )
        return CallableModel(composed)

    def _note(self, ctx: CompositionContext, models: Mapping[str, nn.Module]) -> None:
        """What is unusual but allowed."""
        configs = {role: model.config.get_text_config() for role, model in models.items()}  # type: ignore[operator, union-attr]
        widths = {role: config.vocab_size for role, config in configs.items()}
        if len(set(widths.values())) > 1:
            said = ", ".join(f"{width} in {role}" for role, width in widths.items())
            ctx.run.notes["vocabulary"] = f"heads of different width ({said}): ids from {min(widths.values())} on get 0"
        for role in self.tuned:
            if configs[role].hidden_size != configs["small"].hidden_size or type(configs[role]) is not type(
                configs["small"]
            ):
                ctx.warn(f"shape/{role}", f"{role} has not the shape of small, so it was not tuned from it")
