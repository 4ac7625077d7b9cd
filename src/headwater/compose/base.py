"""Composition: models that exist already -> one model that should do what each of them can.

Nothing, or little, is trained. The question is the same for every method: does the whole keep what each part could do,
on what it costs to run? What the methods share is here: the fields, the checks that the parts fit together, the
evaluation of every part and of the whole on every suite, and the cost of a forward pass. A method adds its fields and
``compose``.
"""

from __future__ import annotations

import shutil
from abc import abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import ByteSize, Field, model_validator
from torch import nn

from headwater.compose.context import CompositionContext
from headwater.compose.suites import SuiteRef
from headwater.core.budget import Budget
from headwater.core.cache import atomic_write_text
from headwater.core.family import Axis, Family
from headwater.core.recipe import Metrics, ModelRef, Recipe
from headwater.core.run import check_name
from headwater.core.stream_map import OutDtype
from headwater.modalities.models import head_of, load_model

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = [
    "FAMILY",
    "AdapterOnDisk",
    "CallableModel",
    "Composed",
    "Composition",
    "CompositionContext",
    "WeightsOnDisk",
]


class Composed(Protocol):
    """What a method leaves; one of ``WeightsOnDisk``, ``AdapterOnDisk``, ``CallableModel``."""

    def open(self, dtype: Literal["auto", "float32", "bfloat16", "float16"]) -> nn.Module:
        """The composed model, in ``eval()``, on the CPU."""


@dataclass(frozen=True)
class WeightsOnDisk:
    """A directory that transformers opens."""

    path: Path

    def open(self, dtype: Literal["auto", "float32", "bfloat16", "float16"]) -> nn.Module:
        """Load it."""
        ref = ModelRef(name=str(self.path), dtype=dtype)
        return load_model(ref, head_of(ref))


@dataclass(frozen=True)
class AdapterOnDisk:
    """A directory that peft opens on a base model.

    Attributes:
        path: of the adapter.
        base: the model it belongs on.
    """

    path: Path
    base: ModelRef

    def open(self, dtype: Literal["auto", "float32", "bfloat16", "float16"]) -> nn.Module:
        """Load the base and put the adapter on it, unmerged: as it would run."""
        from peft import PeftModel

        inner = load_model(self.base.model_copy(update={"dtype": dtype}), head_of(self.base))
        wrapped: nn.Module = PeftModel.from_pretrained(inner, self.path)
        return wrapped.eval()


@dataclass(frozen=True)
class CallableModel:
    """A module that answers as a language model does (``model(input_ids, attention_mask).logits``, ``generate``)."""

    model: nn.Module

    def open(self, dtype: Literal["auto", "float32", "bfloat16", "float16"]) -> nn.Module:
        """The module itself, in whatever dtype it is."""
        return self.model.eval()


class Composition(Recipe):
    """Family of the stage ``compose``: one hook, ``compose``."""

    roles: ClassVar[tuple[str, ...]] = ("base",)
    """Roles that ``models`` must hold; others may be added."""
    shared: ClassVar[Literal["architecture", "vocabulary"]] = "architecture"
    """What all models must have in common; ``architecture`` includes the vocabulary."""

    models: dict[str, ModelRef] = Field(
        description="the models to compose, by role; LoRA adapters of one of them are models too"
    )
    suites: dict[str, SuiteRef] = Field(
        min_length=1,
        description="what the whole should still be able to do, by name: one suite for each ability of a part",
    )
    out_dtype: OutDtype = Field(default="auto", description="dtype of the weights written; `auto` is that of the base")
    tokenizer_from: str = Field(default="base", description="role whose tokenizer and configuration the whole gets")
    adapters_on: str = Field(default="base", description="role of the model that LoRA adapters belong on")
    budget: Budget = Field(
        default=Budget.none(), description="of training gates, masks or adapters, where a method does so"
    )
    max_memory: ByteSize = Field(
        default=ByteSize(4 << 30), description="memory that weight arithmetic may take, e.g. 4GiB"
    )
    max_shard_size: ByteSize = Field(
        default=ByteSize(5_000_000_000), description="largest weight file written, e.g. 5GB"
    )

    @model_validator(mode="after")
    def _roles_are_there(self) -> Composition:
        if missing := [role for role in (*self.roles, self.tokenizer_from) if role not in self.models]:
            raise ValueError(f"models has no role {missing[0]!r}; it has {', '.join(self.models) or 'none'}")
        for name in (*self.models, *self.suites):
            check_name(name)
        if "composed" in self.models:
            raise ValueError("a role cannot be called 'composed', which is the name of the whole in the metrics")
        return self

    @abstractmethod
    def compose(self, ctx: CompositionContext) -> Composed:
        """Make one model out of ``ctx``'s. What is written goes to ``ctx.out``.

        Must be a pure function of ``ctx``: a resumed run calls it again.
        """

    def run(self, run: Run) -> Metrics:
        """Check that the parts fit, compose, score every part and the whole on every suite, and time a forward pass."""
        suites = {name: ref.open(name) for name, ref in self.suites.items()}
        ctx = CompositionContext.open(self, run, suites)
        shutil.rmtree(run.model, ignore_errors=True)  # of an attempt that ended after composing
        with ctx.meter.timed():
            composed = self.compose(ctx)
        run.cost = {**ctx.meter.cost.to_dict(), **ctx.moved}
        _write_readme(self, run)
        ctx = replace(ctx, suites=suites)  # the hook is over: now with their test sides
        model = composed.open(self.models[self.tokenizer_from].dtype)
        tests = {**ctx.scores("test"), "composed": ctx.score(model, "test")}
        valid = {**ctx.scores("valid"), "composed": ctx.score(model, "valid")}
        metrics: Metrics = {}
        for name in suites:
            for part, scores in tests.items():
                metrics[f"suite/{name}/{part}"] = scores[name].value
                metrics |= {f"suite/{name}/{part}/{what}": x for what, x in scores[name].details.items()}
        kept = ctx.retention(tests)
        metrics |= {f"retention/{name}": value for name, value in kept.items()}
        metrics |= {"retention/min": min(kept.values()), "valid/retention_min": min(ctx.retention(valid).values())}
        items = {
            f"suite/{name}/composed": {"ids": suite.ids, "values": tests["composed"][name].items.tolist()}
            for name, suite in suites.items()
        }
        run.write_json("items.json", items)
        return metrics | ctx.ledger(model) | ctx.inference(model)


def _write_readme(recipe: Composition, run: Run) -> None:
    if (run.model / "README.md").exists():  # a method that leaves no weights says itself how to call what it leaves
        return
    parts = "\n".join(f"- {role}: `{ref.name}`" for role, ref in recipe.models.items())
    adapter = (run.model / "adapter_config.json").exists()
    opening = "peft.AutoPeftModelForCausalLM" if adapter else "transformers.AutoModelForCausalLM"
    text = f"# {recipe.id}\n\nMade of\n\n{parts}\n\nOpen it with `{opening}.from_pretrained(DIR)`.\n"
    atomic_write_text(run.model / "README.md", text)


FAMILY = Family(
    stage="compose",
    gain=Axis("retention/min", "Kept of the best part, weakest suite", "higher"),
    price=Axis("inference/flops_per_token", "Forward pass", "lower", "FLOPs/token", ".3g"),
    columns=(
        Axis("inference/flops_ratio", "Forward pass, of the largest part's", "lower", "", ".2f"),
        Axis("inference/params_resident", "Parameters in memory", "lower", "", ".3g"),
    ),
    selection=Axis("valid/retention_min", "Validation, kept on the weakest suite", "higher"),
    selection_price=None,
    references={
        "single": {"method": "single_part"},
        "average": {"method": "average"},
    },
    baseline="single",
)
