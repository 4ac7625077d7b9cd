"""Instruction balance: new knowledge into a model that follows instructions, without instruction data.

    r = theta_instruct - theta_base            theta_base' = continue(theta_base, domain text)
    theta_instruct' = theta_base' + s r,       s = 1

Continuing the instruct model itself loses what instruction tuning gave it, the more the longer; so the *base* is
continued and the instruction residual r added back. The recipe runs that and the three ways it is compared with: to
continue the instruct model, to continue the base and stop there, and to continue the base and tune it on instructions
again, which is the ceiling that needs the data.

Source: Jindal et al., "Balancing Continuous Pre-Training and Instruction Fine-Tuning: Optimizing
Instruction-Following in LLMs", arXiv:2410.10739, section 3.
Differs: nothing; that residuals of models below about 1.5 B parameters carry less over is unverified. Rows of tokens
that only the instruct model knows have no residual and are taken from it.
Needs: a base, its instruct version, domain text.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from headwater.core.fit import Phase, Trained
from headwater.core.lora import add_lora
from headwater.core.recipe import DataRef, ModelRef
from headwater.core.rng import derive_seed
from headwater.core.weights import WeightDelta, WeightSource, adapter_deltas, delta, stream_map
from headwater.domain.adaptation import Adaptation
from headwater.domain.base import Adapted, AnswerTask, ContinuedPretraining
from headwater.domain.references import plain_phase
from headwater.modalities.models import ModelError, is_quantised, load_model, load_tokenizer, local_directory
from headwater.modalities.text.docs import Document
from headwater.modalities.text.document_store import text_digest
from headwater.modalities.text.sources import open_labelled

__all__ = ["InstructionBalance", "add_residual", "residual", "residual_size"]

FAR = 0.5
SHOWN = 5


def residual(instruct: WeightSource, base: WeightSource) -> WeightDelta:
    """What instruction tuning changed, ``theta_instruct - theta_base``: computed when read, saved by its ``save``.

    Args:
        instruct: the tuned model; or a LoRA adapter of ``base`` as ``core.weights.adapter_deltas`` opens it.
        base: what it was tuned from; same names and shapes.

    Raises:
        ValueError: names or shapes differ (a grown vocabulary too; ``add_residual`` takes those), or a tensor is
            quantised.
    """
    return instruct if isinstance(instruct, WeightDelta) else delta(instruct, base)


def add_residual(
    adapted: WeightSource, instruct: WeightSource, base: WeightSource, out: Path, *, scale: float = 1.0
) -> None:
    """Write ``adapted + scale * (instruct - base)`` with the instruct model's configuration, tokenizer and template.

    Streams tensor by tensor and rounds once.

    Args:
        adapted: the base, continued.
        instruct: the tuned model, which may have more rows of vocabulary: they are copied. A LoRA adapter as
            ``core.weights.adapter_deltas`` opens it has no files; the adapted model's are taken.
        base: the base as it was.
        out: the new directory.
        scale: of the residual.

    Raises:
        ValueError, FileExistsError, OSError: as ``stream_map``.
    """
    if isinstance(instruct, WeightDelta):
        instruct.apply(adapted, out, scale=scale)
        return

    def add(_: str, values: dict[str, Tensor]) -> Tensor:
        # The difference first: of two nearby values it is exact, the sum of the three in another order is not.
        return values["adapted"] + scale * (values["instruct"] - values["base"])

    add.elementwise = True  # type: ignore[attr-defined]  # functions take attributes; mypy has no type for that
    stream_map(
        {"adapted": adapted, "instruct": instruct, "base": base},
        add,
        out,
        base="adapted",
        files_from="instruct",
        accumulate=torch.float64,
        vocab="union",
        recipe={"add_residual": scale},
    )


def residual_size(instruct: WeightSource, base: WeightSource) -> tuple[float, int]:
    """Length of the residual in lengths of the base, and how many rows of vocabulary the instruct model has on top.

    Raises:
        ModelError: a tensor is missing or of another shape, other than by rows added to a vocabulary; names five.
    """
    wrong, change, size, added = [], 0.0, 0.0, 0
    for name in base.names():
        meta = base.meta(name)
        if isinstance(instruct, WeightDelta) and name not in instruct:
            size += float(base.get(name).double().square().sum())
            continue
        shape = instruct.meta(name).shape if name in instruct else None
        grown = shape is not None and len(shape) == 2 and shape[1:] == meta.shape[1:] and shape[0] > meta.shape[0]
        if shape is None or (shape != meta.shape and not grown):
            wrong.append(f"{name!r} is {list(meta.shape)} in the base and {list(shape) if shape else 'absent'}")
            continue
        if not meta.dtype.is_floating_point or wrong:
            continue
        before = base.get(name).double()
        after = instruct.slice(name, 0, meta.shape[0]).double() if meta.shape else instruct.get(name).double()
        added = max(added, shape[0] - meta.shape[0] if shape else 0)
        size += float(before.square().sum())
        change += float((after if instruct.is_delta else after - before).square().sum())
    if wrong:
        raise ModelError(
            f"the instruct model has not the shape of the base: {'; '.join(wrong[:SHOWN])}"
            f"{f' and {len(wrong) - SHOWN} more' if len(wrong) > SHOWN else ''}. Give the base that it was tuned from."
        )
    return math.sqrt(change / size), added


class InstructionBalance(ContinuedPretraining):
    """Continue the base, then add what instruction tuning had changed.

    Source: Jindal et al., arXiv:2410.10739.
    """

    id: ClassVar[str] = "instruction_balance"

    instruct: ModelRef = Field(description="the model that was tuned on instructions from `model`")
    arm: Literal["residual", "continue_instruct", "continue_base", "continue_then_tune"] = Field(
        default="residual",
        description="continue the base and add the residual; or what that is compared with: continue the instruct "
        "model; continue the base and stop; continue the base, then tune it on `instructions`",
    )
    scale: float = Field(default=1.0, gt=0, le=2, description="factor on the residual")  # 1 in the paper
    instructions: DataRef | None = Field(
        default=None, description="prompts and answers to tune on, for continue_then_tune only"
    )
    tune_share: float = Field(
        default=0.5, gt=0, lt=1, description="share of the budget that continue_then_tune spends on tuning"
    )

    @model_validator(mode="after")
    def _instructions_are_for_tuning(self) -> InstructionBalance:
        if (self.instructions is not None) != (self.arm == "continue_then_tune"):
            raise ValueError(
                f"arm {self.arm!r} {'needs' if self.instructions is None else 'does not use'} `instructions`"
            )
        return self

    def phases(self, ctx: Adaptation) -> Generator[Phase, Trained, Adapted]:
        """Train what the arm trains, and put together what it leaves."""
        if ctx.head != "causal":
            raise ModelError(f"model {self.model.name!r} is a {ctx.head} model; answers need a causal one")
        base = WeightSource.open(local_directory(self.model))
        directory = local_directory(self.instruct)
        adapter = (directory / "adapter_config.json").exists()
        instruct = adapter_deltas(directory, base) if adapter else WeightSource.open(directory)
        added = self._check(ctx, instruct, base)
        if self.arm == "continue_instruct":
            trained = yield self._continue_instruct(ctx, adapter)
            return Adapted(trained.model)
        phase = plain_phase(ctx)
        if self.arm == "continue_then_tune":
            trained = yield replace(phase, share=1 - self.tune_share)
            texts = self._instructions(ctx)
            trained = yield Phase("tune", trained.model, ctx.mix([(texts, 1.0)]), ctx.objective, share=self.tune_share)
            return Adapted(trained.model)
        trained = yield phase
        if self.arm == "continue_base":
            return Adapted(trained.model)
        model = trained.model if self.lora is None else trained.model.merge_and_unload()  # type: ignore[operator]  # a PEFT model
        ctx.save(model, ctx.run, to=ctx.run.path("base"))
        if not added:
            shutil.rmtree(ctx.run.path("residual"), ignore_errors=True)
            residual(instruct, base).save(ctx.run.path("residual"))
        summed = ctx.run.path("summed")
        shutil.rmtree(summed, ignore_errors=True)  # of an attempt that ended here
        add_residual(WeightSource.open(ctx.run.path("base")), instruct, base, summed, scale=self.scale)
        whole = load_model(ModelRef(name=str(summed)), "causal")
        shutil.rmtree(summed)  # the family writes it to model/
        if not adapter:
            ctx.adopt(load_tokenizer(self.instruct))
        return Adapted(whole, files=("base/",) if added else ("base/", "residual/"))

    def _continue_instruct(self, ctx: Adaptation, adapter: bool) -> Phase:
        if adapter:
            model = load_model(self.model, "causal")
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, local_directory(self.instruct)).merge_and_unload()
        else:
            model = load_model(self.instruct, "causal")
            ctx.adopt(load_tokenizer(self.instruct))
        if is_quantised(model):
            raise ModelError(f"instruct {self.instruct.name!r} is quantised, so its weights cannot be trained")
        if self.lora is not None:
            model = add_lora(model, self.lora, seed=derive_seed(self.seed, "lora"))
        return replace(plain_phase(ctx), model=model)

    def _check(self, ctx: Adaptation, instruct: WeightSource, base: WeightSource) -> int:
        """Refuse or warn of models that do not belong together; rows of vocabulary that only instruct has."""
        size, added = residual_size(instruct, base)
        if size == 0:
            raise ModelError(
                f"instruct {self.instruct.name!r} and model {self.model.name!r} are identical, so there is no residual"
            )
        if size > FAR:
            ctx.warn(
                "residual",
                f"the residual is {size:.2f} times as long as the base: was {self.instruct.name!r} tuned from it?",
            )
        if added:
            ctx.warn(
                "vocabulary",
                f"{added} tokens are in the instruct model only; their rows are copied",
            )
        ctx.run.notes["residual/size"] = f"{size:.4f} of the base's length"
        return added

    def _instructions(self, ctx: Adaptation) -> list[Document]:
        """Prompts with their answers, those left out that ``downstream`` asks."""
        assert self.instructions is not None  # the recipe asks for them
        prompts, answers = open_labelled(self.instructions, role="instructions")
        asked = {
            text_digest(prompt)
            for task in self.downstream
            if isinstance(task, AnswerTask)
            for prompt in open_labelled(task.data, role=f"downstream {task.name}")[0]
        }
        kept = [
            Document(f"instruction-{i}", prompt + answer)
            for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
            if text_digest(prompt) not in asked
        ]
        if len(kept) < len(prompts):
            ctx.warn("instructions", f"{len(prompts) - len(kept)} instructions are asked downstream and were left out")
        if not kept:
            raise ModelError("instructions: none is left that is not asked downstream; give others to tune on")
        return kept
