"""Skill localization: the few parameters whose fine-tuned values, grafted onto the base, carry the skill.

    theta(gamma) = gamma theta_ft + (1 - gamma) theta_pre       min over gamma in {0, 1}^d, |gamma| = s d, of the loss

    movement   gamma = top_s |theta_ft - theta_pre|
    topk       gamma = top_s(S), S starting at log(|theta_ft - theta_pre| / threshold); trained through the hard choice
               as if it were the identity:  dL/dS = dL/dtheta (theta_ft - theta_pre)
    flip       gamma = gamma_0 (1 - sigmoid(S)) + (1 - gamma_0) sigmoid(S), gamma_0 the movement mask; rounded after

Source: Panigrahi, Saunshi, Zhao, Arora, "Task-Specific Skill Localization in Fine-tuned Language Models",
arXiv:2302.06600, section 2; `flip` is its relaxation.
Differs: `topk`, the default, is ours: nothing in `flip` holds the number of entries, and rounded it can choose a fifth
of all parameters whatever size was asked for. The last mask is kept, not the best one. The sizes are shares of the
parameters that may be grafted.
Needs: a base and models fine-tuned from it, and text of each one's task; `movement` needs no text.
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import pandas as pd
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from headwater.compose.base import Composed, Composition, CompositionContext, WeightsOnDisk
from headwater.compose.graft import Mask, Patch, join_patches, merge_masks, overlap, readme, top_entries
from headwater.compose.graft_search import (
    FlipSearch,
    RepeatedBatches,
    Search,
    TopSearch,
    check_pair,
    frozen_view,
    left_out_of,
)
from headwater.compose.suites import BitsSuite
from headwater.core.budget import Budget
from headwater.core.cache import atomic_write_text
from headwater.core.fit import BatchStream, FitSettings, Phase, Trained, fit
from headwater.core.objective import Objective
from headwater.core.recipe import CorpusRef
from headwater.core.weights import WeightSource
from headwater.modalities.models import ModelError
from headwater.modalities.text.document_store import stored_corpus
from headwater.modalities.text.objectives import CausalObjective
from headwater.modalities.text.packing import PackedStream
from headwater.modalities.text.prepared import drop_repeats, split_corpus, split_shares, tokenized

__all__ = ["Graft", "Mask", "Patch", "SkillLocalization", "join_patches", "merge_masks", "overlap"]

logger = logging.getLogger(__name__)

STEPS = Budget(steps=60)
RATES: Mapping[str, float] = {"topk": 0.1, "flip": 1e7}  # flip: of the published code, for plain gradient steps

HELD_OUT = 0.1
ADAPTER = "the tuned model is an adapter: its change is dense, of low rank, and so in few parameters only by choice"

Method = Literal["topk", "flip"]
Batches = BatchStream | Iterable[Mapping[str, Tensor]]


class Graft:
    """A base and a model fine-tuned from it, and the search for the parameters that matter. Neither is changed.

    Parameters are paired by name; tied ones count once. Buffers, such as running statistics, are always the base's.

    Args:
        base: any module.
        tuned: of the same parameters; a PEFT model is merged into a copy first.
        exclude: what may not be grafted: ``embeddings``, ``head``, or globs over names of parameters.

    Attributes:
        base: as given.
        names: of the parameters that may be grafted, in the model's order.
        size: their elements.
        moved: how many of these differ.
        notices: what the user should know about this pair.
        trained_: how the last search went.

    Raises:
        ValueError: other names or shapes, the same values, values that are not finite, quantised weights, a glob that
            matches nothing, or nothing left to graft.
    """

    trained_: Trained

    def __init__(self, base: nn.Module, tuned: nn.Module, *, exclude: Sequence[str] = ("embeddings", "head")) -> None:
        self.base, self.notices = base, list[str]()
        if hasattr(tuned, "merge_and_unload"):
            tuned = cast(Any, copy.deepcopy(tuned)).merge_and_unload()  # Any: a PEFT model, which is not typed
            self.notices.append(ADAPTER)
        first, second = dict(base.named_parameters()), dict(tuned.named_parameters())
        check_pair(first, second)
        left_out = left_out_of(base, exclude)
        self._base = {name: p.detach() for name, p in first.items() if id(p) not in left_out}
        self._tuned = {name: second[name].detach().to(p.device) for name, p in self._base.items()}
        self.names = tuple(self._base)
        self.size = sum(p.numel() for p in self._base.values())
        if not self.size:
            raise ValueError(f"exclude={list(exclude)} leaves no parameter to graft.")
        self.moved = sum(int((self._tuned[name] != p).sum()) for name, p in self._base.items())
        if not self.moved:
            raise ValueError(
                "the tuned model equals the base in every parameter that may be grafted; give another one."
            )
        buffers = dict(tuned.named_buffers())
        differing = [
            name for name, b in base.named_buffers() if name not in buffers or not torch.equal(buffers[name].to(b), b)
        ]
        if differing:
            self.notices.append(
                f"{len(differing)} buffers of the tuned model differ, {differing[0]} among them; grafts have the base's"
            )
        for notice in self.notices:
            logger.warning("%s", notice)

    def count(self, sparsity: float) -> int:
        """How many parameters a share of all is.

        Raises:
            ValueError: outside (0, 1], or less than one parameter.
        """
        if not 0 < sparsity <= 1:
            raise ValueError(
                f"sparsity must be in (0, 1]; got {sparsity}. It is the share of parameters that is grafted."
            )
        found = math.floor(sparsity * self.size + 1e-9)
        if found < 1:
            raise ValueError(
                f"sparsity {sparsity:g} of {self.size} parameters is less than one; the least is {1 / self.size:.3g}."
            )
        return found

    def movement_mask(self, sparsity: float) -> Mask:
        """The parameters that fine-tuning moved most, exactly as many as asked for."""
        return Mask.of(top_entries(self._movement(), self.count(sparsity)))

    def fit(
        self,
        batches: Batches,
        objective: Objective,
        *,
        sparsity: float,
        budget: Budget = STEPS,
        lr: float | None = None,
        method: Method = "topk",
        seed: int = 0,
        directory: Path | None = None,
        name: str = "graft",
        settings: FitSettings | None = None,
        on_metrics: Callable[[dict[str, float]], None] | None = None,
    ) -> Mask:
        """Search for the mask whose graft has the least loss.

        Args:
            batches: a stream that is reached by number, or anything that can be iterated over again and again.
            objective: of the grafted model, which it gets as if it were the base; called with the base in ``eval()``.
            sparsity: share of the parameters, in (0, 1]. ``flip`` begins with that many and does not keep to it.
            budget: of the search.
            lr: for ``topk`` about what a score moves in a step, whatever the size of the model or of the loss; 0.1 by
                default. For ``flip`` the rate of plain gradient steps, 1e7 by default.
            method: see the module.
            seed: of ``flip``'s scores at the start.
            directory: where checkpoints are kept; a search that was stopped goes on from them, and a finished one is
                read. By default nothing is kept.
            name: of the checkpoints and the progress bar.
            settings: how it is executed.
            on_metrics: as in ``fit``.

        Returns:
            The mask of the last step.

        Raises:
            ValueError: a bad sparsity; an objective with trainable weights; settings that recompute or compile the
                model; batches that can be read only once; with ``directory``, batches that are no stream.
            Others: as ``headwater.core.fit.fit``.
        """
        settings = settings or FitSettings()
        if settings.gradient_checkpointing or settings.compile:
            # Recomputed in the backward pass, the model would have its own weights again, not the grafted ones.
            raise ValueError("a graft cannot be fitted with gradient_checkpointing or compile; switch them off.")
        if isinstance(objective, nn.Module) and any(p.requires_grad for p in objective.parameters()):
            raise ValueError("the objective has trainable weights; freeze them, as only the mask is fitted.")
        count = self.count(sparsity)
        if not hasattr(batches, "batch"):
            if directory is not None:
                raise ValueError("to continue in a directory, give batches that are reached by number (BatchStream).")
            batches = RepeatedBatches(batches)
        search: Search
        if method == "topk":
            search = TopSearch(self._tuned, self._movement(), count, objective)
        else:
            search = FlipSearch(self._tuned, self._movement(), count, objective, seed)
        kept = tempfile.TemporaryDirectory() if directory is None else nullcontext(str(directory))
        with kept as place:
            self.trained_ = fit(
                Phase(name, frozen_view(self.base), cast(BatchStream, batches), search),
                budget=budget,
                optim=search.optim(RATES[method] if lr is None else lr),
                seed=seed,
                directory=Path(place),
                settings=settings,
                on_metrics=on_metrics,
            )
        with torch.no_grad():
            return Mask.of(search.marked())

    def patch(self, mask: Mask, dtype: torch.dtype | None = None) -> Patch:
        """The mask with the tuned model's values, rounded to the base's dtype, or to ``dtype``."""
        return Patch.of(mask, self._base, self._tuned, dtype)

    def apply(self, mask: Mask) -> nn.Module:
        """A copy of the base with the tuned model's values where the mask is."""
        return self.patch(mask).apply(self.base)

    def evaluate(self, mask: Mask, batches: Iterable[Mapping[str, Tensor]], objective: Objective) -> float:
        """Mean loss of a graft, in ``eval()``.

        Args:
            mask: which graft.
            batches: read once, on the base's device.
            objective: its total over its count.

        Raises:
            ValueError: nothing was counted.
        """
        model, total, count = self.apply(mask).eval(), 0.0, 0.0
        with torch.no_grad():
            for batch in batches:
                loss = objective(model, batch)
                total, count = total + float(loss.total), count + float(loss.count)
        if not count:
            raise ValueError("the batches held nothing that the objective counts.")
        return total / count

    def _movement(self) -> dict[str, Tensor]:
        return {name: (self._tuned[name].float() - p.float()).abs() for name, p in self._base.items()}


class SkillLocalization(Composition):
    """Find, for each tuned model, the few parameters that carry its skill, and put all of them on the base.

    Every role but ``base`` is a tuned model, with a skill of its own.

    Source: Panigrahi et al., arXiv:2302.06600.
    """

    id: ClassVar[str] = "skill_localization"

    data: dict[str, CorpusRef] = Field(
        default={},
        description="texts of each tuned model's task, by role; their held-out part, and so what a suite over the same "
        "texts scores, is not read. `movement` needs none",
    )
    search: Literal["topk", "flip", "movement"] = Field(
        default="topk",
        description="`topk`: trained, exactly the size asked for; `flip`: the paper's relaxation, which does not hold "
        "the size; `movement`: what moved most, untrained",
    )
    sparsity: tuple[float, ...] = Field(
        default=(1e-4, 1e-3, 1e-2, 0.1),
        min_length=1,
        description="shares of the parameters that may be grafted, rising, each in (0, 1]: a patch for every one",
    )
    chosen: float | None = Field(
        default=None, gt=0, le=1, description="which of them `model/` is made with; by default the largest"
    )
    exclude: tuple[str, ...] = Field(
        default=("embeddings", "head"),
        description="what is not grafted: `embeddings`, `head`, or globs over names of parameters",
    )
    steps: int = Field(
        default=60, gt=0, description="steps of each search, where there is no `budget`, which is of all"
    )
    lr: float | None = Field(
        default=None, gt=0, description="of the scores; by default that of the search (see `Graft.fit`)"
    )
    seq_len: int = Field(default=128, gt=1, description="tokens per block of text")
    batch_tokens: int = Field(default=4096, gt=0, description="tokens per step")
    fit: FitSettings = Field(default=FitSettings(), description="how the loop runs: precision, micro-batches")

    @field_validator("sparsity")
    @classmethod
    def _rising_shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(set(value)) or value[0] <= 0 or value[-1] > 1:
            raise ValueError(f"shares must rise within (0, 1]; got {list(value)}")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> SkillLocalization:
        if len(self.models) < 2:
            raise ValueError("there must be a model besides `base`: one that was tuned from it")
        if unknown := sorted(set(self.data) - set(self.tuned)):
            raise ValueError(f"data names {unknown[0]!r}, which is no tuned model: {', '.join(self.tuned)}")
        if self.search != "movement" and (lacking := [role for role in self.tuned if role not in self.data]):
            raise ValueError(f"data has no texts for {lacking[0]!r}; give some, or search: movement")
        if self.chosen is not None and self.chosen not in self.sparsity:
            raise ValueError(f"chosen is {self.chosen}, which is not in sparsity: {list(self.sparsity)}")
        if self.batch_tokens < self.seq_len:
            raise ValueError(f"batch_tokens ({self.batch_tokens}) is less than one block of {self.seq_len}; raise it")
        return self

    @property
    def tuned(self) -> tuple[str, ...]:
        """The roles of the tuned models."""
        return tuple(role for role in self.models if role != "base")

    def compose(self, ctx: CompositionContext) -> Composed:
        """Find the masks, write the patches and the curve, and save the base with the chosen patches on it."""
        base = cast(PreTrainedModel, ctx.model("base"))
        dtype, streams = _stored_dtype(ctx.source("base")), self._streams(ctx, base)
        patches: dict[float, dict[str, Patch]] = {sparsity: {} for sparsity in self.sparsity}
        for role in self.tuned:
            graft = Graft(base, ctx.model(role), exclude=self.exclude)
            notices = [*graft.notices, *[ADAPTER] * ctx.is_adapter(role)]
            ctx.run.notes |= {f"warning/{role}-{number}": words for number, words in enumerate(notices)}
            for sparsity in self.sparsity:
                mask = self._mask(ctx, graft, role, sparsity, streams.get(role))
                patches[sparsity][role] = graft.patch(mask, dtype)
        self._write_patches(ctx, base, patches)
        joined = join_patches(list(patches[self.chosen or self.sparsity[-1]].values()))
        composed = cast(PreTrainedModel, joined.apply(base))
        dtype = dtype if self.out_dtype == "auto" else getattr(torch, self.out_dtype)
        composed.to(dtype).save_pretrained(ctx.out, max_shard_size=int(self.max_shard_size))
        ctx.tokenizer.save_pretrained(ctx.out)
        ctx.moved["bytes_read"] += sum(_weight_bytes(ctx.directory(role)) for role in self.models)
        ctx.moved["bytes_written"] += _weight_bytes(ctx.out) + _weight_bytes(ctx.run.path("patches"))
        return WeightsOnDisk(ctx.out)

    def _streams(self, ctx: CompositionContext, base: PreTrainedModel) -> dict[str, PackedStream]:
        """Training text by role, split as suites split theirs: what one over the same corpus scores is not in it."""
        if self.search == "movement":
            return {}
        limit = getattr(base.config, "max_position_embeddings", None)
        if limit is not None and self.seq_len > limit:
            raise ModelError(f"seq_len is {self.seq_len} but the base has {limit} positions; lower it")
        held = max((suite.held_out for suite in self.suites.values() if isinstance(suite, BitsSuite)), default=HELD_OUT)
        splits = {
            role: split_corpus(stored_corpus(ref, role=f"data {role}"), split_shares(held))
            for role, ref in self.data.items()
        }
        clean, _ = drop_repeats(splits)
        streams = {}
        for role, split in clean.items():
            store = tokenized(split.train, ctx.tokenizer_of("base"))
            streams[role] = PackedStream(store, self.seq_len, self.batch_tokens // self.seq_len, self.seed)
            ctx.run.record_data(f"data/{role}", streams[role].fingerprint)
        return streams

    def _mask(
        self, ctx: CompositionContext, graft: Graft, role: str, sparsity: float, stream: PackedStream | None
    ) -> Mask:
        if self.search == "movement" or stream is None:
            return graft.movement_mask(sparsity)
        searches = len(self.tuned) * len(self.sparsity)
        name = f"{role}-{sparsity:g}"
        mask = graft.fit(
            stream,
            CausalObjective(),
            sparsity=sparsity,
            budget=Budget(steps=self.steps) if self.budget.kind == "none" else self.budget.scaled(1 / searches),
            lr=self.lr,
            method=self.search,
            seed=self.seed,
            directory=ctx.run.directory,
            name=name,
            settings=self.fit,
            on_metrics=partial(ctx.run.log, phase=name),
        )
        ctx.meter.add(replace(graft.trained_.cost, seconds=0.0))  # the whole hook is timed
        if mask.count != graft.count(sparsity):
            ctx.warn(f"size/{name}", f"{name}: {mask.count} parameters were chosen, not {graft.count(sparsity)}")
        return mask

    def _write_patches(
        self, ctx: CompositionContext, base: PreTrainedModel, patches: Mapping[float, Mapping[str, Patch]]
    ) -> None:
        """``patches/``, ``curve.json``: validation figures by size, and ``overlap.csv`` where there are several."""
        directory, shared = ctx.run.path("patches"), []
        grafts: list[dict[str, Any]] = []  # Any: JSON data
        for sparsity, own in patches.items():
            for role, patch in own.items():
                path = directory / f"patch-{role}-{sparsity:g}.safetensors"
                patch.save(path)
                grafts.append(
                    {"sparsity": sparsity, "tuned": [role], "count": patch.mask.count, "bytes": path.stat().st_size}
                )
            if len(own) > 1:
                table = overlap({role: patch.mask for role, patch in own.items()})
                shared.append(table.rename_axis("tuned").reset_index().assign(sparsity=sparsity))
                grafts.append(
                    {"sparsity": sparsity, "tuned": list(own), "count": join_patches(list(own.values())).mask.count}
                )
        for row in grafts:
            model = join_patches([patches[row["sparsity"]][role] for role in row["tuned"]]).apply(base)
            row["valid"] = {name: score.value for name, score in ctx.score(model).items()}
        parts = {role: {name: score.value for name, score in scores.items()} for role, scores in ctx.scores().items()}
        ctx.run.write_json("curve.json", {"parts": parts, "grafts": grafts})
        if shared:
            atomic_write_text(ctx.run.path("overlap.csv"), pd.concat(shared).to_csv(index=False))
        example = f"patch-{self.tuned[0]}-{self.chosen or self.sparsity[-1]:g}.safetensors"
        where = self.models["base"].name if self.models["base"].kind == "hub" else str(ctx.directory("base").resolve())
        atomic_write_text(directory / "README.md", readme(where, str(base.dtype).removeprefix("torch."), example))


def _stored_dtype(source: WeightSource) -> torch.dtype:
    """The dtype that most of a checkpoint's numbers are stored in; what was loaded may be wider."""
    metas = [meta for meta in map(source.meta, source.names()) if meta.dtype.is_floating_point]
    elements: Counter[torch.dtype] = Counter()
    for meta in metas:
        elements[meta.dtype] += math.prod(meta.shape)
    return elements.most_common(1)[0][0]


def _weight_bytes(directory: Path) -> float:
    return float(sum(path.stat().st_size for path in directory.glob("*.safetensors")))
