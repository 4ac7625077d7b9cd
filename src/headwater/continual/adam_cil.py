"""SimpleCIL and ADAM: prototypes of a pretrained encoder, and of a copy that was adapted to the first task beside it.

    SimpleCIL   w_c = mean of phi(x) over class c                     score_c(x) = cos(phi(x), w_c)
    ADAM        task 1:     phi* = phi adapted by cross-entropy with a head that is then dropped
                all tasks:  w_c = mean of [phi(x), phi*(x)]           score_c(x) = cos([phi(x), phi*(x)], w_c)

After task 1 nothing is trained again: what phi knows stays general, what phi* learned is of the domain.

Source: Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity are
All You Need", arXiv:2303.07338.
Differs: weight decay spares biases and norms; scale-and-shift tuning is PEFT's IA3, which scales only; no augmentation,
in the first task either; the head of the first task is linear.
Needs: a pretrained encoder of texts or images, or any module over arrays; labelled inputs, the first task two classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from headwater.continual.base import Batch, ContinualRecipe, StreamInfo
from headwater.continual.cards import save_adapted, write_card
from headwater.continual.heads import GrowingLinear, HeadLearner
from headwater.continual.nmc import NearestMeanClassifier
from headwater.continual.pet import AdapterSpec, VptSpec, add_adapters, add_prompts
from headwater.continual.streams import StreamError, TaskData
from headwater.continual.training import TaskBatches, TaskCrossEntropy, Trainee, batch_norms, digest_of_inputs
from headwater.core.budget import Budget
from headwater.core.fit import FitSettings, Phase, fit
from headwater.core.lora import LoraSpec, add_lora
from headwater.core.optim import OptimChoice, SgdSpec
from headwater.core.order import VirtualIndex
from headwater.core.recipe import Spec
from headwater.core.rng import derive_seed, torch_generator
from headwater.modalities.features import ArrayEncoder, Encoder

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["ADAM", "ADAMLearner", "DualEncoder", "FirstTask", "FullSpec", "Ia3Spec", "LoraChoice", "PeftChoice"]

_MUCH_SMALLER = 2  # times the first task's samples: from there on a later task is said to be much larger


class DualEncoder(nn.Module):
    """Features of a frozen encoder and of an adapted one, side by side; always in evaluation mode, without gradient.

    Args:
        frozen: the frozen encoder; or, where the adapted one is the same encoder with adapters, the context manager
            that switches them off (``peft_model.disable_adapter``), so that no second copy of the weights is kept.
        adapted: maps inputs to features ``(batch, d)``.

    Shapes:
        output ``(batch, d_frozen + d_adapted)``; the two widths may differ.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules="all-linear"))
        >>> DualEncoder(model.disable_adapter, model)(torch.ones(2, 4)).shape
        torch.Size([2, 6])
    """

    def __init__(self, frozen: nn.Module | Callable[[], AbstractContextManager[Any]], adapted: nn.Module) -> None:
        super().__init__()
        self.frozen = frozen
        self.adapted = adapted

    def branches(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # Any: the encoder's inputs
        """Features of the frozen and of the adapted encoder."""
        if isinstance(self.frozen, nn.Module):
            return _evaluated(self.frozen, *args, **kwargs), _evaluated(self.adapted, *args, **kwargs)
        with self.frozen():
            frozen = _evaluated(self.adapted, *args, **kwargs)
        return frozen, _evaluated(self.adapted, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # Any: the encoder's inputs
        """Both, concatenated."""
        return torch.cat(self.branches(*args, **kwargs), dim=1)


@torch.no_grad()
def _evaluated(encoder: nn.Module, *args: Any, **kwargs: Any) -> Tensor:  # Any: the encoder's inputs
    encoder.eval()  # at every call: dropout that someone switched on would make features random
    features: Tensor = encoder(*args, **kwargs)
    return features


class LoraChoice(LoraSpec):
    """LoRA through PEFT."""

    kind: Literal["lora"] = Field(default="lora", description="low-rank adapters")


class Ia3Spec(Spec):
    """A learned factor for each output of the chosen layers (Liu et al., arXiv:2205.05638), through PEFT."""

    kind: Literal["ia3"] = Field(default="ia3", description="factors on the outputs of linear layers")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear", description="names of the layers whose outputs are scaled"
    )


class FullSpec(Spec):
    """All weights, in a second copy of the encoder."""

    kind: Literal["full"] = Field(default="full", description="fine-tune a copy; the paper: 6 epochs, weight decay .05")


PeftChoice = Annotated[LoraChoice | Ia3Spec | AdapterSpec | VptSpec | FullSpec, Field(discriminator="kind")]


class FirstTask(Spec):
    """How the encoder is adapted to the first task; the defaults are the paper's for adapters."""

    epochs: int = Field(default=20, ge=0, description="passes over the first task's training data")
    batch_size: int = Field(default=48, gt=0, description="samples per step")
    optim: OptimChoice = Field(
        default=SgdSpec(lr=0.01, weight_decay=5e-4),
        description="how weights are moved: {lr: ..} for SGD with momentum .9 and cosine decay, or {kind: adamw, ..}",
    )


class ADAMLearner:
    """The nearest class mean by cosine, on features of the encoder and of what the first task made of it.

    Args:
        encoder: from raw inputs to features; its weights are frozen in place.
        peft: what is trained on the first task.
        first_task: how.
        adapt_on: ``none`` never adapts, which is SimpleCIL.
        branches: ``adapted`` leaves the frozen branch out: adapting without merging.
        branch_norm: ``l2`` scales each branch to unit length; without it the longer one weighs more, as in the paper.
        batch_size: inputs per forward pass.
        cache_bytes: test features that are kept between evaluations, at most; nothing is dropped for others.
        fit: how the training loop runs.
        seed: of adapters, head and order.
    """

    def __init__(
        self,
        encoder: Encoder | ArrayEncoder,
        *,
        peft: LoraChoice | Ia3Spec | AdapterSpec | VptSpec | FullSpec,
        first_task: FirstTask | None = None,
        adapt_on: Literal["first", "none"] = "first",
        branches: Literal["both", "adapted"] = "both",
        branch_norm: Literal["none", "l2"] = "none",
        batch_size: int = 256,
        cache_bytes: int = 1 << 28,
        fit: FitSettings | None = None,
        seed: int = 0,
    ) -> None:
        self.encoder = encoder.requires_grad_(False)
        self.peft, self.first_task, self.adapt_on = peft, first_task or FirstTask(), adapt_on
        self.branches, self.branch_norm = branches, branch_norm
        self.batch_size, self.cache_bytes, self.fit, self.seed = batch_size, cache_bytes, fit or FitSettings(), seed
        self.head = HeadLearner(NearestMeanClassifier("cosine"))
        self.dual: DualEncoder | None = None
        self.first_samples = 0
        self._adapter: nn.Module | None = None
        self._trained: dict[str, nn.Parameter] = {}
        self._kept: dict[str, NDArray[np.float32]] = {}

    def observe(self, task: TaskData, run: Run) -> None:
        """Adapt if it is the first task; then add the task's samples to the class means."""
        if not self.first_samples:
            self.first_samples = len(task.train)
            self._first(task, run)
        elif self.dual is not None and len(task.train) > _MUCH_SMALLER * self.first_samples:
            run.warn(
                "first_task",
                f"task {task.index} has {len(task.train)} training samples and the first task, the only one that the "
                f"encoder is adapted to, had {self.first_samples}. A larger `init` would adapt it to more.",
            )
        run.cost["trainable"] = sum(parameter.numel() for parameter in self._trained.values())
        for begin in range(0, len(task.train), self.batch_size):
            rows = slice(begin, begin + self.batch_size)
            self.head.head.partial_fit(self._features(task.train.inputs[rows]), task.train.labels[rows])

    def _first(self, task: TaskData, run: Run) -> None:
        if self.adapt_on == "none":
            return
        if len(task.classes) < 2:
            run.warn(
                "simple_cil",
                "the first task has one class, which leaves cross-entropy nothing to learn; going on as SimpleCIL. "
                "Give it two or more (`init`) to adapt the encoder.",
            )
            return
        if norms := batch_norms(self.encoder):
            run.warn(
                "batch_norm",
                f"{len(norms)} batch normalisations (first: {norms[0]}) keep their running statistics while the "
                "encoder is adapted; statistics of the first task would not suit the others.",
            )
        adapter, dual = self._attach()
        if self.first_task.epochs:
            self._train(task, adapter, dual.adapted, run)
        self._freeze(adapter, dual)

    def _attach(self) -> tuple[nn.Module, DualEncoder]:
        """Put the adapters on; what requires a gradient afterwards is what is trained."""
        encoder, spec, seed = self.encoder, self.peft, derive_seed(self.seed, "adapter")
        adapter: Any  # Any: PEFT is untyped
        if isinstance(spec, FullSpec):
            adapted = copy.deepcopy(encoder).requires_grad_(True)
            adapter, dual = adapted.model, DualEncoder(encoder, adapted)
        else:
            if isinstance(spec, LoraSpec):
                adapter = add_lora(encoder.model, spec, seed=seed)
            elif isinstance(spec, Ia3Spec):
                adapter = _add_ia3(encoder.model, spec)
            elif isinstance(spec, AdapterSpec):
                adapter = add_adapters(encoder.model, spec, seed=seed)
            else:
                adapter = add_prompts(encoder.model, spec, seed=seed)
            dual = DualEncoder(adapter.disable_adapter, encoder)
        self._trained = {name: p for name, p in adapter.named_parameters() if p.requires_grad}
        return adapter, dual

    def _train(self, task: TaskData, adapter: nn.Module, adapted: nn.Module, run: Run) -> None:
        spec, samples = self.first_task, task.train
        width = _evaluated(adapted, self.encoder.prepare(samples.inputs[:1])).shape[1]
        head = GrowingLinear(width)
        head.grow(len(task.classes), torch_generator(self.seed, "first head"))
        order = VirtualIndex(len(samples), derive_seed(self.seed, "first task"))
        phase = Phase(
            "first_task",
            Trainee(adapted, adapter),
            TaskBatches(samples, self.encoder, order, spec.batch_size),
            TaskCrossEntropy(head),
        )
        fit(
            phase,
            budget=Budget(tokens=spec.epochs * len(samples)),  # a sample counts as one token: see TaskBatches
            optim=spec.optim,
            seed=derive_seed(self.seed, "first forward"),
            directory=run.directory,
            settings=self.fit,
            on_metrics=partial(run.log, phase=phase.name),
        )

    def _freeze(self, adapter: nn.Module, dual: DualEncoder) -> None:
        # Training may have moved one copy to a device; a run that is continued after it has moved none.
        device = PartialState().device
        self._adapter, self.dual = adapter.requires_grad_(False).to(device), dual.to(device)

    def _features(self, inputs: NDArray[Any]) -> NDArray[np.float32]:  # Any: raw inputs
        """What the class means are built on, ``(n, d)`` or ``(n, 2 d)``."""
        batch = self.encoder.prepare(inputs)
        if self.dual is None:
            parts = [_evaluated(self.encoder, batch)]
        elif self.branches == "adapted":
            parts = [_evaluated(self.dual.adapted, batch)]
        else:
            parts = list(self.dual.branches(batch))
        if self.branch_norm == "l2":
            parts = [nn.functional.normalize(part, dim=1) for part in parts]
        features: NDArray[np.float32] = torch.cat(parts, dim=1).float().cpu().numpy()
        return features

    def scores(self, batch: Batch) -> Tensor:
        """Cosine with each class mean, ``(batch, n_seen)``; of two classes, 0 and by how much the second's is larger.

        The encoders do not change after the first task, so features of inputs that were scored before are kept.
        """
        key = digest_of_inputs(batch.inputs)
        features = self._kept.get(key)
        if features is None:
            pieces = range(0, len(batch.inputs), self.batch_size)
            features = np.concatenate([self._features(batch.inputs[i : i + self.batch_size]) for i in pieces])
            if sum(kept.nbytes for kept in self._kept.values()) + features.nbytes <= self.cache_bytes:
                self._kept[key] = features
        return self.head.scores(Batch(features))

    def state(self) -> dict[str, Tensor]:
        """Class means and what was trained; the frozen weights are read again from where they came."""
        trained = {f"adapter/{name}": parameter.detach() for name, parameter in self._trained.items()}
        return {**self.head.state(), **trained, "first_samples": torch.tensor(self.first_samples)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what ``state`` gave.

        Raises:
            StreamError: the state is of another encoder or another kind of adapter.
        """
        trained = {name.removeprefix("adapter/"): t for name, t in state.items() if name.startswith("adapter/")}
        if trained:
            adapter, dual = self._attach()
            ours = {name: parameter.shape for name, parameter in self._trained.items()}
            if ours != {name: tensor.shape for name, tensor in trained.items()}:
                raise StreamError(
                    f"the state holds {len(trained)} adapted tensors that do not fit the {len(ours)} of this encoder "
                    f"and peft {self.peft.kind!r}."
                )
            with torch.no_grad():
                for name, parameter in self._trained.items():
                    parameter.copy_(trained[name])
            self._freeze(adapter, dual)
        self.first_samples = int(state["first_samples"])
        self.head.load_state({n: t for n, t in state.items() if n in ("centroids", "counts", "classes")})

    def save(self, directory: Path, label_names: Sequence[str]) -> None:
        """Write class means, adapter or adapted copy, and a ``README.md`` whose code predicts without Headwater."""
        self.head.save(directory, label_names)
        if self._adapter is not None:
            save_adapted(self._adapter, self.peft.kind, directory)
        write_card(
            directory,
            self.encoder if self.dual is None else self.dual.adapted,  # what ran, and so knows its pooling
            kind=None if self._adapter is None else self.peft.kind,
            branches=self.branches,
            unit_length=self.branch_norm == "l2",
        )


def _add_ia3(model: nn.Module, spec: Ia3Spec) -> nn.Module:
    from peft import IA3Config, get_peft_model

    targets = spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    wrapped: nn.Module = get_peft_model(model, IA3Config(target_modules=targets, feedforward_modules=[]))
    return wrapped


class ADAM(ContinualRecipe):
    """Recipe: adapt a copy of the encoder to the first task, then class means on both."""

    id: ClassVar[str] = "adam_cil"
    reads: ClassVar[Literal["features", "inputs"]] = "inputs"

    peft: PeftChoice = Field(
        default=AdapterSpec(), description="what is trained on the first task: lora, ia3, adapter, vpt or full"
    )
    first_task: FirstTask = Field(default=FirstTask(), description="how it is trained")
    adapt_on: Literal["first", "none"] = Field(
        default="first", description="`none` adapts to nothing and leaves SimpleCIL"
    )
    branches: Literal["both", "adapted"] = Field(
        default="both", description="features of both encoders, or of the adapted one alone: the paper's ablation"
    )
    branch_norm: Literal["none", "l2"] = Field(
        default="none",
        description="`l2` scales each encoder's features to unit length before they are put side by side",
    )
    cache_bytes: int = Field(
        default=1 << 28, ge=0, description="memory for test features kept from one evaluation to the next"
    )
    fit: FitSettings = Field(
        default=FitSettings(), description="how the training loop runs: precision, micro-batches, checkpoints"
    )

    def learner(self, info: StreamInfo) -> ADAMLearner:
        """A frozen encoder, no class seen yet."""
        return ADAMLearner(
            self.encoder(info),
            peft=self.peft,
            first_task=self.first_task,
            adapt_on=self.adapt_on,
            branches=self.branches,
            branch_norm=self.branch_norm,
            batch_size=self.batch_size,
            cache_bytes=self.cache_bytes,
            fit=self.fit,
            seed=self.seed,
        )
