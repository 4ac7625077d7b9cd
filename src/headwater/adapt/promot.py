"""Fine-tuning in two stages: a soft prompt takes on the task's form, then the model learns the rest behind it.

    stage 1    P*     = argmin over P       sum over (x, y) of  - log p(y | [P; x]; theta_0)
    stage 2    theta* = argmin over theta   sum over (x, y) of  - log p(y | [P*; x]; theta)

P are ``prompt_tokens`` vectors in front of the source's embeddings. The task is answered by theta* behind P*, all else
by theta* without it. What the answers look like is learned first and fastest; once it is in P*, the gradients of stage
2 have no reason to put it into theta, which then has no answers of the task to give where P* is missing.

Source: Wang et al., "Two-stage LLM Fine-tuning with Less Specialization and More Generalization", arXiv:2211.00635,
section 4 (first version: "Preserving In-Context Learning Ability in Large Language Model Fine-tuning"). The prompt:
Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv:2104.08691.
Differs: AdamW for Adafactor; ``prompt_lr`` is therefore in units of the root mean square of the model's embeddings, by
which Adafactor scales its steps. Stage 1 takes a share of the budget instead of steps of its own, so that runs compare
at equal budgets. The prompt begins as tokens drawn from the vocabulary, or a text. Stage 2 may train LoRA adapters,
merged at its end. No mixture of tasks with a prompt each. The paper's prompt length, rates and steps were not at hand
to check.
Needs: a causal or encoder-decoder language model; sources and targets of one task.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from headwater.adapt.text_to_text import TextTask, TextToText, Written
from headwater.core.cache import atomic_write_text
from headwater.core.fit import Phase, Trained
from headwater.core.objective import Loss
from headwater.core.optim import OptimSpec
from headwater.core.rng import derive_seed
from headwater.modalities.models import ModelError
from headwater.modalities.text.objectives import IGNORED, token_loss
from headwater.modalities.text.pairs import PairModel, Pairs

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["ProMoT", "PromptedObjective", "add_prompt", "embedding_rms", "promot_stage", "save_prompt"]

logger = logging.getLogger(__name__)
COMPARED_PAIRS = 256
"""Training pairs on which the prompt is held against none."""


def add_prompt(
    model: nn.Module, kind: Literal["causal", "seq2seq"], tokens: int, *, seed: int, text_ids: Sequence[int] = ()
) -> PeftModel:
    """Put a soft prompt before everything that ``model`` reads, by PEFT's prompt tuning; stage 1 is set.

    The model itself stays as it was, at ``get_base_model()``, and works without the prompt.

    Args:
        model: of Hugging Face; LoRA layers in it are fine.
        kind: in an encoder-decoder the prompt stands before the encoder's tokens only.
        tokens: vectors in the prompt.
        seed: of the vocabulary entries whose embeddings it begins as.
        text_ids: tokens whose embeddings it begins as instead, repeated or cut to length.

    Returns:
        ``(batch, tokens + time, vocabulary)`` logits for ``(batch, time)`` tokens of a causal model.
    """
    from peft import PeftModelForCausalLM, PeftModelForSeq2SeqLM, PromptTuningConfig

    causal = kind == "causal"
    config = PromptTuningConfig(
        task_type="CAUSAL_LM" if causal else "SEQ_2_SEQ_LM",
        num_virtual_tokens=tokens,
        num_transformer_submodules=1,
        prompt_tuning_init="SAMPLE_VOCAB",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Not get_peft_model, which warns of a second adapter where there is LoRA.
        prompted: Any = (PeftModelForCausalLM if causal else PeftModelForSeq2SeqLM)(model, config)
    if text_ids:
        ids = torch.arange(tokens) % len(text_ids)
        chosen = torch.tensor(text_ids)[ids].to(prompted.device)
        with torch.no_grad():
            prompted.prompt_encoder["default"].embedding.weight.copy_(prompted.word_embeddings(chosen))
    promot_stage(prompted, 1)
    return prompted


def promot_stage(model: PeftModel, stage: Literal[1, 2]) -> None:
    """Make trainable what a stage trains, and nothing else: 1, the prompt; 2, the model, or LoRA layers it has."""
    inner = list(model.get_base_model().named_parameters())
    adapters = any("lora_" in name for name, _ in inner)
    for name, parameter in inner:
        parameter.requires_grad_(stage == 2 and ("lora_" in name or not adapters))
    model.prompt_encoder.requires_grad_(stage == 1)


def embedding_rms(model: nn.Module) -> float:
    """Root mean square of a Hugging Face model's token embeddings."""
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]  # every Hugging Face model has it
    return float(weight.detach().float().pow(2).mean().sqrt())


def save_prompt(model: PeftModel, directory: Path, opening: str) -> None:
    """Write the prompt as PEFT opens it on the model saved in ``../model``, and ``opening`` into its README."""
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path = "../model"  # not the one that training began with: the prompt is of no use there
    model.save_pretrained(str(directory), save_embedding_layers=False)  # "auto" would ask the Hub
    atomic_write_text(directory / "README.md", f"# A soft prompt for the model in `../model`\n\n{opening}\n")


@dataclass(frozen=True)
class PromptedObjective:
    """Next-token prediction behind a soft prompt, whose own positions are not predicted."""

    unit: str = "nats/token"

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """Batch: ``input_ids``, ``attention_mask``, ``labels`` ``(batch, time)``, padded on the right."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        following = F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
        return token_loss(logits[:, -following.shape[1] :], following)


class ProMoT(TextToText):
    """Prompt tuning, then fine-tuning behind the prompt; the model is kept without it, the prompt beside it.

    A budget in tokens is charged for the prompt's as well: they pass through the model.
    """

    id: ClassVar[str] = "promot"

    prompt_tokens: int = Field(default=50, gt=0, le=512, description="vectors in the soft prompt")
    prompt_text: str | None = Field(
        default=None,
        min_length=1,
        description="what the prompt begins as, repeated or cut to length; null for tokens drawn from the vocabulary",
    )
    prompt_steps: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="share of the budget for the prompt; 0 leaves it as it begins, 1 is prompt tuning alone",
    )
    prompt_lr: float = Field(  # 0.3 under Adafactor, which scales by the root mean square of what it moves
        default=0.3,
        gt=0,
        description="learning rate of the prompt, in units of the root mean square of the model's embeddings",
    )

    def phases(self, task: TextTask) -> Generator[Phase, Trained, Written]:
        """The prompt, then the model behind it."""
        opened = task.open()
        base: Any = opened.model.get_base_model() if self.lora is not None else opened.model  # type: ignore[operator]
        plain = replace(opened, model=base)
        prompted = self._prompted(plain)
        model: Any = prompted.model
        metrics: dict[str, float] = {}
        if self.prompt_steps > 0:
            optim = self.optim.model_copy(update={"lr": self.prompt_lr * embedding_rms(base)})
            yield self._phase("prompt", prompted, task, self.prompt_steps, optim)
            with task.meter.timed():
                metrics = _offloaded(prompted, plain, task.train)
        if self.prompt_steps < 1:
            promot_stage(model, 2)
            yield self._phase("model", prompted, task, 1 - self.prompt_steps)
        if self.lora is not None:
            opened.model.merge_and_unload()  # type: ignore[operator]  # a PEFT model around LoRA
        opening = _OPENING.format("CausalLM" if plain.kind == "causal" else "Seq2SeqLM")
        if task.run.is_main_process:
            save_prompt(model, task.run.directory / "prompt", f"```python\n{opening}\n```")
        return Written(plain, prompted, files=("`prompt/`, the soft prompt",), opening=opening, metrics=metrics)

    def _prompted(self, plain: PairModel) -> PairModel:
        """The same model behind a new prompt, with sources cut so that both fit its positions."""
        positions = getattr(plain.model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]  # a Hugging Face model
        longest = plain.max_source
        if positions is not None:
            longest = min(longest, positions - self.prompt_tokens - (plain.max_target if plain.kind == "causal" else 0))
        if longest < 2:
            raise ModelError(
                f"model {self.model.name!r} has {positions} positions, which a prompt of {self.prompt_tokens} tokens "
                f"and targets of {plain.max_target} leave no room in; lower prompt_tokens or max_target."
            )
        text: list[int] = []
        if self.prompt_text is not None:
            text = plain.tokenizer(self.prompt_text, add_special_tokens=False)["input_ids"]
            if len(text) > self.prompt_tokens:
                logger.warning("prompt_text is cut from %d to %d tokens.", len(text), self.prompt_tokens)
        seed = derive_seed(self.seed, "prompt")
        model = add_prompt(plain.model, plain.kind, self.prompt_tokens, seed=seed, text_ids=text)
        return replace(plain, model=model, max_source=longest)

    def _phase(
        self, name: str, prompted: PairModel, task: TextTask, share: float, optim: OptimSpec | None = None
    ) -> Phase:
        stream = prompted.stream(task.train, rows=self.batch_size, seed=self.seed)
        stream.tokens_per_row += self.prompt_tokens  # they pass through the model as well
        objective = PromptedObjective() if prompted.kind == "causal" else prompted.objective
        return Phase(name, prompted.model, stream, objective, share, optim)


def _offloaded(prompted: PairModel, plain: PairModel, pairs: Pairs) -> dict[str, float]:
    """How far the prompt alone has come, in nats per target token of some training pairs; warns where nowhere."""
    some = Pairs(pairs.sources[:COMPARED_PAIRS], pairs.targets[:COMPARED_PAIRS])
    behind, without = (float(model.nats(some).mean()) for model in (prompted, plain))
    if behind >= without:
        logger.warning(
            "the prompt took nothing on: %.3f nats per target token behind it, %.3f without. Stage 2 will put the "
            "task's form into the model; give stage 1 more steps or another prompt_lr.",
            behind,
            without,
        )
    return {"prompt/nats": behind, "prompt/nats_without": without}


_OPENING = """from peft import PeftModel
from transformers import AutoModelFor{0}, AutoTokenizer

model = AutoModelFor{0}.from_pretrained(DIR)  # for everything but the task
tokenizer = AutoTokenizer.from_pretrained(DIR)
task_model = PeftModel.from_pretrained(model, DIR + "/../prompt")  # for the task"""
