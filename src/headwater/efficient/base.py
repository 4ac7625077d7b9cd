"""Training for less: an architecture + text + budget -> a model that cost less memory, and what it is worth.

What every method of the stage shares is here: the fields, the data, the driving of phases, and the figures: loss on
held-out text, bytes by what holds them, FLOPs executed and on paper, time. A method adds its fields and ``build``.
"""

from __future__ import annotations

import math
import statistics
import time
from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from headwater.core.budget import GivenBudget
from headwater.core.cache import atomic_write_text
from headwater.core.calibrate import autocast
from headwater.core.family import Axis, Family
from headwater.core.fit import FitSettings, Phase, Trained, fit_phases
from headwater.core.optim import OptimSpec, build_optimizer
from headwater.core.phase import EvalAt
from headwater.core.recipe import CorpusRef, Metrics, ModelRef, Recipe
from headwater.core.surgery import EXCLUDED, Replaceable, save_factored, to_dense
from headwater.efficient.context import BuildContext
from headwater.efficient.linears import ComposedLinear
from headwater.efficient.memory import measured_memory, memory_plan
from headwater.modalities.text.docs import Document
from headwater.modalities.text.prepared import held_out_sample
from headwater.modalities.text.score import Scored, bits_per_byte, masked_bits

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["FAMILY", "EfficientRecipe", "Lean"]

MIDWAY_CHARS = 12_000
VALID_CHARS = 100_000
TIMED_PASSES = 5


@dataclass(frozen=True)
class Lean:
    """What a method leaves behind.

    Attributes:
        model: as it was trained; the family turns replaced layers back into plain ones before it saves ``model/``.
        files: further files of the run directory, by what they hold, named in the model's README.
        notes: facts for the reader of the result.
    """

    model: PreTrainedModel
    files: tuple[str, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()


class EfficientRecipe(Recipe):
    """Family of the stage ``efficient``: one hook, ``build``."""

    model: ModelRef = Field(description="architecture and tokenizer: Hub name, local directory or builtin")
    from_config: bool = Field(
        default=True, description="draw new weights for the architecture; false starts from the checkpoint's"
    )
    data: CorpusRef = Field(description="texts to train on")
    eval_data: CorpusRef | None = Field(
        default=None, description="texts to test on; without them a share of `data`, split off by document"
    )
    held_out: float = Field(default=0.1, gt=0, lt=0.5, description="share of the documents kept for the final test")
    eval_chars: int = Field(default=400_000, gt=0, description="characters of the test text that are scored")
    seq_len: int | None = Field(
        default=None, gt=1, description="tokens per packed block; by default the model's maximum, at most 1024"
    )
    batch_tokens: int = Field(default=32_768, gt=0, description="tokens per optimizer step")
    targets: tuple[str, ...] = Field(
        default=("*",), min_length=1, description="globs over full module names: the linear layers to touch"
    )
    exclude: tuple[str, ...] = Field(
        default=EXCLUDED, description="globs over full module names that are never touched"
    )
    optim: OptimSpec = Field(default=OptimSpec(), description="how weights are moved: AdamW, a schedule, clipping")
    budget: GivenBudget = Field(description="what the training may spend: tokens, steps, flops or seconds")
    eval_at: EvalAt = Field(
        default=(0.0, 0.1, 0.25, 0.5, 1.0), description="fractions of the budget at which validation text is scored"
    )
    save_as: Literal["dense", "factored", "both"] = Field(
        default="both",
        description="`dense` opens in transformers; `factored` keeps replaced layers as they were trained",
    )
    fit: FitSettings = Field(
        default=FitSettings(), description="how the loop runs: precision, micro-batches, checkpoints"
    )

    @abstractmethod
    def build(self, ctx: BuildContext) -> Generator[Phase, Trained, Lean]:
        """Yield each training phase, receive what it trained, return the model that is left.

        Must be a pure function of ``ctx``: a resumed run goes through it again, and finished phases come back
        from their checkpoints.
        """

    def run(self, run: Run) -> Metrics:
        """Split the text, train the phases, count what that took, save, and score the plain model."""
        ctx, test = BuildContext.open(self, run)
        evaluation = _Evaluation(self, ctx)
        lean, metrics = self._train(ctx, evaluation)
        metrics |= self._save(ctx, lean)
        metrics |= evaluation.final(lean.model, test)
        run.notes.update(lean.notes)
        run.cost = {**ctx.meter.cost.to_dict(), "trainable": int(metrics["params_trainable"])}
        return metrics

    def _train(self, ctx: BuildContext, evaluation: _Evaluation) -> tuple[Lean, Metrics]:
        done: list[tuple[Phase, Trained]] = []
        on_paper = 0.0

        def ended(phase: Phase, trained: Trained) -> None:
            nonlocal on_paper
            evaluation.add_trajectory(trained)
            on_paper += _flops_on_paper(trained)
            done.append((phase, trained))

        lean = fit_phases(
            self.build(ctx),
            budget=lambda: self.budget,
            optim=self.optim,
            seed=self.seed,
            directory=ctx.run.directory,
            settings=self.fit,
            evaluate=evaluation.midway,
            eval_at=self.eval_at,
            meter=ctx.meter,
            log=ctx.run.log,
            ended=ended,
        )
        cost = ctx.meter.cost
        metrics: Metrics = {"seconds": cost.seconds, "seconds_per_1k_tokens": 1000 * cost.seconds / cost.tokens}
        if math.isfinite(cost.flops):  # else an operation had no formula: unknown is not a figure
            metrics |= {"flops_executed": cost.flops, "flops_ideal": on_paper}
        return lean, metrics | self._sizes(ctx.run, lean.model, *done[-1])

    def _sizes(self, run: Run, model: PreTrainedModel, phase: Phase, trained: Trained) -> Metrics:
        """Bytes while training, measured on a step like the last phase's; ``memory.json`` sets the plan beside."""
        batch = phase.stream.batch(0, 0, min(trained.settings["micro_rows"], phase.stream.rows))
        with autocast(trained.settings["precision"], model.device):
            memory, activations = measured_memory(
                model,
                phase.objective,
                {name: tensor.to(model.device) for name, tensor in batch.items()},
                lambda modules: build_optimizer(modules, phase.optim or self.optim),
            )
        plan = memory_plan(model, states="8bit" if self.optim.states == "8bit" else "same")
        run.write_json("memory.json", {"measured": memory.to_dict(), "plan": plan.to_dict()})
        run.notes["peak_bytes"] = "the sum of weights, index, gradients, optimizer states and activations"
        run.notes["flops_ideal"] = "on paper: what hardware that skips zeros would execute"
        return {
            "params_total": float(sum(p.numel() for p in model.parameters())),
            "params_trainable": float(sum(p.numel() for p in model.parameters() if p.requires_grad)),
            "param_bytes": float(memory.weights),
            "index_bytes": float(memory.index),
            "grad_bytes_peak": float(memory.gradients),
            "optimizer_bytes": float(memory.states),
            "activation_bytes": float(activations),
            "peak_bytes": float(memory.total + activations),
        }

    def _save(self, ctx: BuildContext, lean: Lean) -> Metrics:
        """Write ``factored/`` and ``model/`` as asked; the model has plain layers afterwards."""
        run, model, written = ctx.run, lean.model, []
        replaced = any(isinstance(module, Replaceable) for module in model.modules())
        if replaced and self.save_as != "dense":
            save_factored(model, run.path("factored"), method=self.id)
            ctx.tokenizer.save_pretrained(run.path("factored"))
            written.append(run.path("factored"))
        to_dense(model)
        if self.save_as != "factored" or not replaced:
            model.save_pretrained(run.model)
            ctx.tokenizer.save_pretrained(run.model)
            files = (*lean.files, *(directory.name for directory in written))
            atomic_write_text(run.model / "README.md", _readme(self, ctx, files))
            written.append(run.model)
        return {"disk_bytes": float(min(_weight_bytes(directory) for directory in written))}


def _log(run: Run, phase: str, values: dict[str, float]) -> None:
    run.log(values, phase=phase)


def _flops_on_paper(trained: Trained) -> float:
    """A phase's FLOPs with every composed layer charged for its parts alone."""
    layers = [module for module in trained.model.modules() if isinstance(module, ComposedLinear)]
    tokens = trained.tokens / trained.steps
    saved = sum(executed - ideal for executed, ideal in (layer.step_flops(int(tokens)) for layer in layers))
    return trained.cost.flops - trained.steps * saved


def _weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _readme(recipe: EfficientRecipe, ctx: BuildContext, files: Sequence[str]) -> str:
    cls = "AutoModelForCausalLM" if ctx.head == "causal" else "AutoModelForMaskedLM"
    start = "from random weights" if recipe.from_config else "from its own weights"
    lines = [
        f"# {recipe.id}",
        "",
        f"The architecture of `{recipe.model.name}`, trained {start} on `{recipe.data.name}`.",
        "",
        "```python",
        f"from transformers import {cls}",
        "",
        f"model = {cls}.from_pretrained(DIR)",
        "```",
        "",
    ]
    if files:
        lines += ["Beside this directory: " + ", ".join(f"`{name}`" for name in files) + ".", ""]
    return "\n".join(lines)


class _Evaluation:
    """Scores on the way, on validation text, and at the end, on the test text."""

    def __init__(self, recipe: EfficientRecipe, ctx: BuildContext) -> None:
        self.recipe, self.ctx = recipe, ctx
        self.valid = held_out_sample(ctx.texts.valid or ctx.texts.train, VALID_CHARS)
        self.sub = held_out_sample([Document(d.id, d.text[:1000], d.meta) for d in self.valid], MIDWAY_CHARS)
        self.trajectory: list[tuple[float, float]] = []
        self._tokens_before = 0
        ctx.run.notes["unit"] = "bits/byte" if ctx.head == "causal" else "bits/masked token"

    def _score(self, model: nn.Module, documents: Sequence[Document]) -> Scored:
        score = bits_per_byte if self.ctx.head == "causal" else masked_bits
        return score(cast(PreTrainedModel, model), self.ctx.tokenizer, documents, window=self.ctx.seq_len)

    def midway(self, model: nn.Module) -> dict[str, float]:
        return {"eval_bits": self._score(model, self.sub).bits_per_unit}

    def add_trajectory(self, trained: Trained) -> None:
        for point in trained.trajectory:
            tokens = self._tokens_before + point["tokens"]
            if not self.trajectory or self.trajectory[-1][0] < tokens:  # two points may share a step
                self.trajectory.append((tokens, point["eval_bits"]))
        self._tokens_before += trained.tokens

    def final(self, model: PreTrainedModel, test: Sequence[Document]) -> Metrics:
        """Loss in nats per token, perplexity, bits per byte, and the time of one forward pass."""
        model.eval()
        documents = held_out_sample(test, self.recipe.eval_chars)
        scored = self._score(model, documents)
        tokens = scored.counts if self.ctx.head == "masked" else self._num_tokens(documents)
        loss = float(scored.nats.sum() / tokens.sum())
        ids = [document.id for document in documents]
        # Divided by the mean count, documents average to the figure of the whole text.
        items = {
            "eval_loss": {"ids": ids, "values": (scored.nats / tokens.mean()).tolist()},
            "eval_bits": {"ids": ids, "values": (scored.nats / math.log(2) / scored.counts.mean()).tolist()},
        }
        self.ctx.run.write_json("items.json", items)
        if self.trajectory:
            self.ctx.run.write_json("trajectory.json", {"x": "tokens", "series": {"eval_bits": self.trajectory}})
        return {
            "eval_loss": loss,
            "perplexity": math.exp(loss),
            "eval_bits": scored.bits_per_unit,
            "valid/eval_bits": self._score(model, self.valid).bits_per_unit,
            "infer_ms": self._infer_ms(model),
        }

    def _num_tokens(self, documents: Sequence[Document]) -> np.ndarray[Any, np.dtype[np.int64]]:
        encoded = self.ctx.tokenizer([d.text for d in documents], add_special_tokens=False)["input_ids"]
        return np.array([len(ids) for ids in encoded], dtype=np.int64)

    def _infer_ms(self, model: PreTrainedModel) -> float:
        """Median milliseconds of a forward pass over one block, after one to warm up."""
        ids = self.ctx.stream.batch(0, 0, 1)["input_ids"].to(model.device)
        passes = []
        with torch.inference_mode():
            for _ in range(TIMED_PASSES + 1):
                begin = time.perf_counter()
                model(input_ids=ids)
                if ids.device.type == "cuda":
                    torch.cuda.synchronize(ids.device)
                passes.append(1000 * (time.perf_counter() - begin))
        return statistics.median(passes[1:])


FAMILY = Family(
    stage="efficient",
    gain=Axis("eval_bits", "Held-out text", "lower", "bits/byte"),
    price=Axis("peak_bytes", "Training memory", "lower", "bytes", ",.0f"),
    columns=(
        Axis("params_total", "Parameters", "lower", "", ",.0f"),
        Axis("optimizer_bytes", "Optimizer states", "lower", "bytes", ",.0f"),
        Axis("flops_executed", "FLOPs, executed", "lower", "", ".3g"),
        Axis("flops_ideal", "FLOPs, on paper", "lower", "", ".3g"),
        Axis("infer_ms", "Forward pass", "lower", "ms", ".2f"),
    ),
    selection=Axis("valid/eval_bits", "Validation text", "lower", "bits/byte"),
    selection_price=None,
    references={"full-rank": {"method": "full_rank"}, "low-rank": {"method": "low_rank"}},
    baseline="full-rank",
    trajectories=(Axis("eval_bits", "Validation text", "lower", "bits/byte"),),
)
