"""What a method of the stage ``compose`` works with: the parts, their weights, the suites."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwater.compose.merge import open_part
from headwater.compose.suites import Score, Suite, retention
from headwater.core.budget import Meter, count_flops
from headwater.core.cache import atomic_write_text, cache_dir, cached_json
from headwater.core.recipe import Metrics
from headwater.core.weights import MergeReport, WeightSource
from headwater.modalities.models import (
    ModelError,
    head_of,
    load_model,
    load_tokenizer,
    local_directory,
    parameter_fingerprint,
)
from headwater.modalities.text.docs import Document, fingerprint
from headwater.modalities.text.ledger import ledger, ledger_metrics
from headwater.modalities.text.prepared import tokenizer_fingerprint

if TYPE_CHECKING:
    from headwater.compose.base import Composition
    from headwater.core.run import Run

__all__ = ["CompositionContext"]

FORWARD_TOKENS = 64


@dataclass
class CompositionContext:
    """What a method of the stage works with. In the hook the suites' test sides are sealed.

    Attributes:
        recipe: the recipe that runs.
        run: its directory.
        suites: by name, their test sides sealed.
        meter: charged with the time of ``compose``, and with what ``charge`` is told.
        moved: bytes of weights read and written.
    """

    recipe: Composition
    run: Run
    suites: Mapping[str, Suite]
    meter: Meter = field(default_factory=Meter)
    moved: dict[str, float] = field(default_factory=lambda: {"bytes_read": 0.0, "bytes_written": 0.0})

    @classmethod
    def open(cls, recipe: Composition, run: Run, suites: Mapping[str, Suite]) -> CompositionContext:
        """Open what the recipe names and refuse parts that do not fit, before any weight is read.

        Raises:
            ModelError: a part that is no causal model, or differs in what the method needs to be shared.
        """
        for name, suite in suites.items():
            run.record_data(f"suite/{name}", suite.fingerprint)
        ctx = cls(recipe, run, {name: suite.sealed(name) for name, suite in suites.items()})
        ctx._check_heads()
        _check_vocabularies({role: ctx.tokenizer_of(role) for role in recipe.models if not ctx.is_adapter(role)})
        if recipe.shared == "architecture":
            _check_architectures({role: ctx.directory(role) for role in recipe.models if not ctx.is_adapter(role)})
        run.notes["unit"] = "retention"
        return ctx

    @property
    def out(self) -> Path:
        """Directory for the composed model; not there yet."""
        return self.run.model

    @cached_property
    def _directories(self) -> dict[str, Path]:
        return {role: local_directory(ref) for role, ref in self.recipe.models.items()}

    def directory(self, role: str) -> Path:
        """The local directory of a part; from the Hub's cache where it is a Hub name."""
        return self._directories[role]

    def is_adapter(self, role: str) -> bool:
        """Whether a part is a LoRA adapter."""
        return (self.directory(role) / "adapter_config.json").exists()

    def source(self, role: str) -> WeightSource:
        """The weights of a part, lazily; those of an adapter as the change it makes to its base."""
        directory = self.directory(role)
        return open_part(directory, self._base) if self.is_adapter(role) else WeightSource.open(directory)

    @cached_property
    def _base(self) -> WeightSource:
        return WeightSource.open(self.directory(self.recipe.adapters_on))

    def model(self, role: str) -> nn.Module:
        """A fresh copy of a part; an adapter is put on its base, whatever it calls its base itself, and merged."""
        ref = self.recipe.models[role]
        if not self.is_adapter(role):
            return load_model(ref, head_of(ref))
        from peft import PeftModel

        base = self.model(self.recipe.adapters_on)
        merged: nn.Module = PeftModel.from_pretrained(base, self.directory(role)).merge_and_unload()
        return merged.eval()

    def tokenizer_of(self, role: str) -> PreTrainedTokenizerBase:
        """A part's own tokenizer; that of its base for an adapter."""
        return load_tokenizer(self.recipe.models[self.recipe.adapters_on if self.is_adapter(role) else role])

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The whole's tokenizer."""
        return self.tokenizer_of(self.recipe.tokenizer_from)

    def streaming(self) -> dict[str, Any]:  # Any: keyword arguments of stream_map
        """What the recipe says about how weights are written."""
        recipe = self.recipe
        return {
            "out_dtype": recipe.out_dtype,
            "max_memory": int(recipe.max_memory),
            "max_shard_size": int(recipe.max_shard_size),
        }

    def charge(self, report: MergeReport) -> None:
        """Count the bytes that a merge moved."""
        self.moved["bytes_read"] += report.bytes_read
        self.moved["bytes_written"] += report.bytes_written

    def warn(self, topic: str, message: str) -> None:
        """Log a warning and keep it with the result."""
        self.run.warn(topic, message)

    def score(
        self, model: nn.Module, side: Literal["valid", "test"] = "valid", role: str | None = None
    ) -> dict[str, Score]:
        """A model on one side of every suite; ``role`` says whose tokenizer it reads with, the whole's by default."""
        tokenizer = self.tokenizer if role is None else self.tokenizer_of(role)
        # cast: what is called is only config, device and logits, which composed models have as well
        return {
            name: getattr(suite, side)(cast(PreTrainedModel, model), tokenizer) for name, suite in self.suites.items()
        }

    def scores(self, side: Literal["valid", "test"] = "valid") -> dict[str, dict[str, Score]]:
        """Every part on one side of every suite, kept in the user cache: every contestant asks for them."""
        return {role: self._part_score(role, side) for role in self.recipe.models}

    def _part_score(self, role: str, side: Literal["valid", "test"]) -> dict[str, Score]:
        model = self.model(role)
        prints = [
            parameter_fingerprint(model),
            *(f"{n}={s.fingerprint}" for n, s in sorted(self.suites.items())),
            side,
            "1",
        ]
        path = cache_dir("suite-scores") / f"{_digest(prints)}.json"
        if not path.exists():
            scored = {name: score.to_dict() for name, score in self.score(model, side, role).items()}
            atomic_write_text(path, json.dumps(scored))
        return {name: Score.from_dict(data) for name, data in json.loads(path.read_text(encoding="utf-8")).items()}

    def ledger(self, whole: nn.Module) -> Metrics:
        """The forgetting ledger of the whole beside that of the model it stands for, the first of the roles.

        General text is that of a suite called ``general``, if it is one of bits per byte.
        """
        role = (*self.recipe.roles, self.recipe.tokenizer_from)[0]
        suite = self.suites.get("general")
        texts = () if suite is None else cast(Sequence[Document], suite.texts)
        start = self.model(role)
        about = {
            "model": parameter_fingerprint(start),
            "texts": fingerprint(texts),
            "tokenizer": tokenizer_fingerprint(self.tokenizer_of(role)),
            "version": 1,
        }
        before = cached_json(
            "ledger", about, lambda: ledger(cast(PreTrainedModel, start), self.tokenizer_of(role), texts)
        )
        return ledger_metrics(before, ledger(cast(PreTrainedModel, whole), self.tokenizer, texts))

    def retention(self, scores: Mapping[str, Mapping[str, Score]], whole: str = "composed") -> dict[str, float]:
        """By suite, what ``scores[whole]`` keeps of the best other part.

        Raises:
            ModelError: no part can do anything on a suite, so there is nothing to keep.
        """
        kept = {}
        for name, suite in self.suites.items():
            values = [scores[role][name].value for role in self.recipe.models]
            best = max(values) if suite.direction == "higher" else min(values)
            if best <= 0 and suite.direction == "higher":
                raise ModelError(
                    f"suite {name}: every part scores 0, so there is nothing to keep; measure it by cross-entropy"
                )
            kept[name] = retention(scores[whole][name].value, best, suite.direction)
        return kept

    def inference(self, model: nn.Module) -> Metrics:
        """What a forward pass over ``FORWARD_TOKENS`` tokens costs, beside the largest part's."""
        flops, seconds = _forward_cost(model)
        largest = max((self.model(role) for role in self.recipe.models), key=_num_parameters)
        return {
            "inference/flops_per_token": flops,
            "inference/flops_ratio": flops / _forward_cost(largest)[0],
            "inference/seconds_per_token": seconds,
            "inference/params_resident": float(_num_parameters(model)),
        }

    def _check_heads(self) -> None:
        for role, ref in self.recipe.models.items():
            if self.is_adapter(role) and self.recipe.adapters_on not in self.recipe.models:
                raise ModelError(
                    f"{role}: {ref.name!r} is an adapter, and there is no model {self.recipe.adapters_on!r} to put it "
                    f"on; set adapters_on to one of {', '.join(self.recipe.models)}"
                )
            if not self.is_adapter(role) and (head := head_of(ref)) != "causal":
                raise ModelError(
                    f"{role}: {ref.name!r} is a {head} model; the suites of this stage score causal language models"
                )


def _check_vocabularies(tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> None:
    (first, reference), *others = ((role, tokenizer.get_vocab()) for role, tokenizer in tokenizers.items())
    for role, vocabulary in others:
        # Tokens that only one side has are left to the method: a chat model often adds some.
        differing = sorted(
            token for token in reference.keys() & vocabulary.keys() if reference[token] != vocabulary[token]
        )
        alien = min(len(reference), len(vocabulary)) - len(reference.keys() & vocabulary.keys())
        if differing or alien:
            shown = ", ".join(f"{t!r} is {reference[t]} and {vocabulary[t]}" for t in differing[:5])
            raise ModelError(
                f"{first} and {role} have different vocabularies: a token means one thing to one, another to the other"
                f" ({len(differing)} ids differ{': ' + shown if shown else ''}; {alien} tokens only on one side)."
            )


def _check_architectures(directories: Mapping[str, Path]) -> None:
    keys = (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
    )
    configs = {role: json.loads((path / "config.json").read_text("utf-8")) for role, path in directories.items()}
    (first, reference), *others = configs.items()
    for role, config in others:
        wrong = [
            f"{key} {reference.get(key)} and {config.get(key)}" for key in keys if reference.get(key) != config.get(key)
        ]
        if wrong:
            raise ModelError(
                f"{first} and {role} are not of one architecture: {'; '.join(wrong)}. Their weights cannot be combined."
            )


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _forward_cost(model: nn.Module) -> tuple[float, float]:
    """FLOPs and seconds (median of three) per token of one forward pass."""
    device = next(model.parameters()).device
    tokens = torch.zeros((1, FORWARD_TOKENS), dtype=torch.long, device=device)
    seconds = []
    with torch.no_grad():
        flops = count_flops(lambda: model(input_ids=tokens))
        for _ in range(3):
            begin = time.perf_counter()
            model(input_ids=tokens)
            seconds.append(time.perf_counter() - begin)
    return flops / FORWARD_TOKENS, statistics.median(seconds) / FORWARD_TOKENS


def _digest(parts: list[str]) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()
