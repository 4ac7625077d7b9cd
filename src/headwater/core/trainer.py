"""Any `Objective` in the Hugging Face `Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from headwater.core.objective import Objective, StepAware

__all__ = ["ObjectiveTrainer"]

_OBJECTIVE_FILE = "objective.safetensors"


class ObjectiveTrainer(Trainer):  # type: ignore[misc]  # transformers ships no types that mypy follows
    """`transformers.Trainer` that minimises an `Objective`, exactly so under accumulation and several processes.

    Gradients of sums are accumulated and divided once, before clipping, by the count over all micro-batches and
    processes, so that one batch of 8 equals four accumulated batches of 2 however many tokens each row holds. (The
    stock Trainer counts labels before the forward pass, which only token losses can be divided by.) The user's model is
    what ``save_model`` writes; weights that the objective trains stand beside it in ``objective.safetensors``.
    They are clipped by their own norm. ``eval_loss`` is averaged over rows, as the Trainer does it.

    Args:
        objective: called with the model, wrapped as the Trainer wraps it, and the batch with all its columns.
        **kwargs: those of `transformers.Trainer`; ``args.remove_unused_columns`` is switched off.

    Raises:
        ValueError: DeepSpeed, FSDP or DataParallel is configured, where the gradients are not ours to divide, or fp16,
            in which sums overflow.

    Example:
        ``ObjectiveTrainer(objective=CausalObjective(), model=model, args=TrainingArguments("out"),
        train_dataset=data).train()``
    """

    def __init__(self, *, objective: Objective, **kwargs: Any) -> None:  # Any: Trainer's own arguments
        args = kwargs.setdefault("args", TrainingArguments("tmp_trainer"))
        args.remove_unused_columns = False  # it would drop every column that model.forward does not name
        if args.deepspeed or args.fsdp or args.n_gpu > 1 or args.fp16:
            raise ValueError(
                "ObjectiveTrainer runs on one device or under DDP (torchrun), in float32 or bf16; "
                "got DeepSpeed, FSDP, DataParallel or fp16."
            )
        super().__init__(**kwargs)
        self.objective = objective
        if isinstance(objective, nn.Module):
            objective.to(args.device)
        self._sums: list[tuple[Tensor, Tensor]] = []

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with the objective's own weights as a further group."""
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        own = self._own_parameters()
        if fresh and own:
            optimizer.add_param_group({"params": own, "weight_decay": 0.0})
        return optimizer

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Accumulate the gradient of the sum; at the last micro-batch of a step divide it by the count of all.

        Returns:
            What the Trainer adds up for its log: 0 until the last micro-batch, then the mean loss of the step.
        """
        model.train()
        if not self._sums and isinstance(self.objective, nn.Module):
            self.objective.zero_grad()  # between steps the Trainer clears only the model
        if not self._sums and isinstance(self.objective, StepAware):
            whole = self.args.gradient_accumulation_steps == 1 and self.accelerator.num_processes == 1
            self.objective.begin_step(self.state.global_step / self.state.max_steps, None if whole else _unseen)
        batch = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.objective(model, batch)
        self.accelerator.backward(loss.total)
        count = torch.as_tensor(loss.count, dtype=torch.float32, device=loss.total.device)
        self._sums.append((loss.total.detach().float(), count))
        if not self.accelerator.sync_gradients:
            return loss.total.new_zeros(())
        total, count = (torch.stack(column).sum() for column in zip(*self._sums, strict=True))
        self._sums.clear()
        count = self.accelerator.reduce(count)
        world = self.accelerator.num_processes  # DDP has divided the model's gradients by it
        own = [p.grad for p in self._own_parameters() if p.grad is not None]
        if world > 1:
            for gradient in own:
                torch.distributed.all_reduce(gradient)
        divisor = count.clamp(min=torch.finfo(torch.float32).tiny)
        of_model = [p.grad for p in model.parameters() if p.grad is not None]
        for gradients, factor in ((of_model, world / divisor), (own, 1 / divisor)):
            if gradients:
                torch._foreach_mul_(gradients, factor)
        if own and self.args.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self._own_parameters(), self.args.max_grad_norm)
        mean: Tensor = total * world / divisor  # the Trainer averages over processes
        return mean

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """The mean over one batch; only evaluation calls this."""
        loss = self.objective(model, inputs)
        mean = loss.total / max(float(loss.count), torch.finfo(torch.float32).tiny)
        return (mean, {"loss": mean}) if return_outputs else mean

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The objective's mean on one batch; an objective has no predictions to return."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The user's model as itself, and beside it what the objective trained."""
        super().save_model(output_dir, _internal_call)
        own = self._own_state()
        if own and self.args.should_save:
            save_file(own, Path(output_dir or self.args.output_dir) / _OBJECTIVE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / _OBJECTIVE_FILE
        if isinstance(self.objective, nn.Module) and self._own_state():
            self.objective.load_state_dict(load_file(file), strict=False)

    def _own_parameters(self) -> list[nn.Parameter]:
        return (
            [p for p in self.objective.parameters() if p.requires_grad] if isinstance(self.objective, nn.Module) else []
        )

    def _own_state(self) -> dict[str, Tensor]:
        """Trained weights and buffers of the objective; frozen ones (a teacher) come back from where they came."""
        if not isinstance(self.objective, nn.Module):
            return {}
        frozen = {name for name, p in self.objective.named_parameters() if not p.requires_grad}
        return {k: v.detach().cpu().contiguous() for k, v in self.objective.state_dict().items() if k not in frozen}


def _unseen(measure: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]) -> Tensor:
    """An ``OverBatch`` that refuses: the Trainer hands over micro-batches one by one."""
    raise ValueError(
        "this objective must see the whole batch, and the Trainer hands over a part at a time. Set "
        "gradient_accumulation_steps=1 in one process, or train with headwater.core.fit, which cuts batches exactly."
    )
