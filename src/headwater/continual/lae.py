"""LAE: a module that learns each new task, a copy of it that follows slowly, and the surer of the two at inference.

    learning       theta, W <- minimise CE(softmax over the current task's classes of W f_theta(x));
                   after the first task theta stands still at first, until the new rows of W have settled
    accumulation   theta' <- a theta' + (1 - a) theta      after each step; theta' = theta when the second task begins
    ensemble       score_c(x) = max(softmax(W f_theta(x))_c, softmax(W f_theta'(x))_c)     over all classes so far

theta are the parameters of LoRA, bottleneck adapters or prefixes in the first blocks of a frozen encoder, calibrated to
adapt equally fast (``two_sets``); W is one linear head, trained with theta and shared with theta'.

Source: Gao et al., "A Unified Continual Learning Framework with General Parameter-Efficient Tuning", arXiv:2303.10070.
Differs: theta' follows in all steps, also those in which theta stands still; a may be given as a half-life in tasks,
since .9999 never moves in short streams; an adapter stands beside the module that projects to keys and values, which in
BERT's kind of block comes before the output projection; no augmentation.
Needs: a pretrained encoder of texts or images, or (adapters) any module over arrays; labelled inputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from accelerate import PartialState
from numpy.typing import NDArray
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from headwater.continual.base import Batch, ContinualRecipe, StreamInfo
from headwater.continual.heads import GrowingLinear
from headwater.continual.lae_card import write_card
from headwater.continual.offline import CurrentClasses, OfflineCopy, decay_per_step
from headwater.continual.streams import StreamError, TaskData
from headwater.continual.training import TaskBatches, Trainee, batch_norms, digest_of_inputs
from headwater.continual.two_sets import BesideAttention, KvLora, PetChoice, PrefixSpec, TwoSets
from headwater.core.budget import Budget
from headwater.core.cache import atomic_path, atomic_write_text
from headwater.core.fit import FitSettings, Phase, fit
from headwater.core.optim import OptimSpec
from headwater.core.order import VirtualIndex
from headwater.core.rng import derive_seed, torch_generator
from headwater.modalities.features import ArrayEncoder, Encoder

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["LAE", "LAELearner", "Voice"]

_HALF_LIFE = r"^task:(0*[1-9]\d*(\.\d+)?|0*\.\d*[1-9]\d*)$"  # a number above 0

Ensemble = Literal["max", "mean", "online", "offline"]

_STILL = 0.01  # of the way to the online module in a whole task: an offline copy that moves less is as good as frozen
_KEPT_BYTES = 1 << 26  # of probabilities that are kept until the next task, so that no test input is encoded again


@dataclass(frozen=True)
class Voice:
    """One of the two models by itself, for the evaluator.

    Attributes:
        learner: what it is part of.
        name: ``online`` or ``offline``.
    """

    learner: LAELearner
    name: Literal["online", "offline"]

    def scores(self, batch: Batch) -> Tensor:
        """Its probabilities, ``(batch, n_seen)``."""
        return self.learner.votes(batch.inputs)[0 if self.name == "online" else -1]


class LAELearner:
    """Learning, accumulation, ensemble.

    Args:
        encoder: from raw inputs to features; its weights are frozen in place.
        pet: the modules put into it.
        lr: of Adam, constant.
        epochs: passes over each task.
        train_batch_size: samples per step.
        freeze: fraction of a later task's training in which the modules stand still; 0 to below 1.
        decay: see ``decay_per_step``.
        ensemble: ``max`` or ``mean`` of both models' probabilities, or one model's alone; with ``online`` there is no
            offline copy, which is fine-tuning task by task.
        batch_size: inputs per forward pass without training.
        fit: how the training loop runs.
        seed: of modules, head and order.

    Raises:
        ValueError: ``freeze`` is not in [0, 1), or the encoder has no place for the modules.
    """

    def __init__(
        self,
        encoder: Encoder | ArrayEncoder,
        *,
        pet: KvLora | BesideAttention | PrefixSpec,
        lr: float = 0.03 * 24 / 256,
        epochs: int = 5,
        train_batch_size: int = 24,
        freeze: float = 0.6,
        decay: float | str = 0.9999,
        ensemble: Ensemble = "max",
        batch_size: int = 256,
        fit: FitSettings | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= freeze < 1:
            raise ValueError(f"freeze must be in [0, 1); got {freeze}. At 1 the modules would never be trained.")
        self.encoder = encoder.requires_grad_(False)
        self.sets = TwoSets(encoder.model, pet, seed=derive_seed(seed, "pet"))
        self.lr, self.epochs, self.train_batch_size = lr, epochs, train_batch_size
        self.freeze, self.decay, self.ensemble = freeze, decay, ensemble
        self.batch_size, self.fit, self.seed = batch_size, fit or FitSettings(), seed
        self.head: GrowingLinear | None = None
        self.offline: OfflineCopy | None = None
        self.tasks = 0
        self._kept: dict[str, Tensor] = {}

    @property
    def voices(self) -> dict[str, Voice]:
        """Both models by themselves; none where there is one only."""
        if self.ensemble == "online":
            return {}
        return {"online": Voice(self, "online"), "offline": Voice(self, "offline")}

    def observe(self, task: TaskData, run: Run) -> None:
        """Train on the task: at first the head alone, then the modules with it; the copy follows."""
        self._kept.clear()
        if len(task.classes) < 2:
            run.warn("one_class", "a task of one class leaves cross-entropy over its own classes nothing to learn.")
        if not self.tasks and (norms := batch_norms(self.encoder)):
            run.warn("batch_norm", f"{len(norms)} batch normalisations (first: {norms[0]}) keep their statistics.")
        head = self._grown(task)
        rows = self.epochs * len(task.train)
        still = int(self.freeze * rows) if self.tasks else 0
        if self.tasks and self.ensemble != "online":
            self._follow(sum(math.ceil(part / self.train_batch_size) for part in (still, rows - still)), run)
        objective = CurrentClasses(head, task.classes, self.offline)
        trainee = Trainee(self.encoder, self.sets.adapter)
        settled = None
        if still:
            self._move_modules(False)
            settled = self._train(f"task-{task.index}-head", task, trainee, objective, (0, still), None, run)
        self._move_modules(True)
        self._train(f"task-{task.index}", task, trainee, objective, (still, rows), settled, run)
        self._move_modules(False)
        self.tasks += 1
        run.cost["trainable"] = sum(p.numel() for p in [*self.sets.first.values(), *head.parameters()])
        self._settle()

    def _grown(self, task: TaskData) -> GrowingLinear:
        """The head with rows for the task's classes; only those are trained."""
        if self.head is None:
            width = self._features(task.train.inputs[:1]).shape[1]
            self.head = GrowingLinear(width)
        arrived = max(task.classes) + 1 - self.head.out_features
        if arrived > 0:
            self.head.grow(arrived, torch_generator(self.seed, "head", task.index))
        begin = 0
        for weight, bias in zip(self.head.weights, self.head.biases, strict=True):
            competes = any(begin <= label < begin + len(bias) for label in task.classes)
            weight.requires_grad_(competes)
            bias.requires_grad_(competes)
            begin += len(bias)
        return self.head

    def _follow(self, steps: int, run: Run) -> None:
        """Make the copy if there is none, and set its pace for a task of so many steps."""
        decay = decay_per_step(self.decay, steps)
        if self.offline is None:
            self.offline = OfflineCopy(self.sets.first.values(), decay)
            self.sets.add_second()
        self.offline.decay = decay
        half_life = math.log(0.5) / math.log(decay) / steps if 0 < decay < 1 else math.inf if decay else 0.0
        run.notes["offline"] = f"decay {decay:.6g} per step, half-life {half_life:.3g} tasks of {steps} steps"
        if (1 - decay) * steps < _STILL:
            run.warn(
                "offline",
                f"the offline copy will not move: decay {decay:.6g} leaves it where it is in the {steps} steps of a "
                "task. Give a half-life in tasks, decay 'task:1' for example.",
            )

    def _move_modules(self, move: bool) -> None:
        for parameter in self.sets.first.values():
            parameter.requires_grad_(move)

    def _train(
        self,
        name: str,
        task: TaskData,
        trainee: Trainee,
        objective: CurrentClasses,
        rows: tuple[int, int],
        before: Phase | None,
        run: Run,
    ) -> Phase:
        order = VirtualIndex(len(task.train), derive_seed(self.seed, "task", task.index), begin=rows[0])
        stream = TaskBatches(task.train, self.encoder, order, self.train_batch_size)
        phase = Phase(name, trainee, stream, objective, continues=before)
        fit(
            phase,
            budget=Budget(tokens=rows[1] - rows[0]),  # a sample counts as one token: see TaskBatches
            optim=OptimSpec(
                lr=self.lr, betas=(0.9, 0.999), weight_decay=0.0, warmup=0.0, schedule="constant", clip=None
            ),
            seed=derive_seed(self.seed, "forward"),
            directory=run.directory,
            settings=self.fit,
            on_metrics=partial(run.log, phase=phase.name),
        )
        if self.offline is not None:
            self.offline.update()  # the last step's
        return phase

    def _settle(self) -> None:
        """Put everything where it is used; a run that is continued after training has moved nothing itself."""
        device = PartialState().device
        self.encoder.to(device)
        self.sets.adapter.to(device)
        if self.head is not None:
            self.head.to(device)
        if self.offline is not None:
            self.offline.to(device)
            self.sets.write(self.offline.values)

    @torch.no_grad()
    def _features(self, inputs: NDArray[Any]) -> Tensor:  # Any: raw inputs
        self.encoder.eval()  # at every call: dropout that someone switched on would make features random
        features: Tensor = self.encoder(self.encoder.prepare(inputs))
        return features

    @torch.no_grad()
    def votes(self, inputs: NDArray[Any]) -> Tensor:  # Any: raw inputs
        """Probabilities of all classes so far by the online and, from the second task on, the offline model.

        Returns:
            ``(1 or 2, n, n_seen)``, float32 on the CPU; of inputs that were asked for since the last task, those kept.
        """
        key = digest_of_inputs(inputs)
        if key not in self._kept:
            made = [self._probabilities(inputs)]
            if self.offline is not None:
                with self.sets.using_second():
                    made.append(self._probabilities(inputs))
            votes = torch.stack(made).cpu()
            if sum(kept.nbytes for kept in self._kept.values()) + votes.nbytes > _KEPT_BYTES:
                return votes
            self._kept[key] = votes
        return self._kept[key]

    def _probabilities(self, inputs: NDArray[Any]) -> Tensor:  # Any: raw inputs
        if self.head is None:
            raise StreamError("no task has been observed yet, so there is no class to score.")
        pieces = range(0, len(inputs), self.batch_size)
        parts = [self.head(self._features(inputs[i : i + self.batch_size])).float().softmax(1) for i in pieces]
        return torch.cat(parts) if parts else torch.zeros(0, self.head.out_features)

    def scores(self, batch: Batch) -> Tensor:
        """The ensemble's scores, ``(batch, n_seen)``."""
        votes = self.votes(batch.inputs)
        if self.ensemble == "mean":
            return votes.mean(0)
        if self.ensemble == "max":
            return votes.amax(0)
        return votes[0 if self.ensemble == "online" else -1]

    def state(self) -> dict[str, Tensor]:
        """Head, modules and copy; the frozen weights are read again from where they came."""
        assert self.head is not None, "asked for after a task"
        state = {f"head/{name}": tensor.detach() for name, tensor in self.head.state_dict().items()}
        state |= {f"online/{name}": parameter.detach() for name, parameter in self.sets.first.items()}
        if self.offline is not None:
            state |= {f"offline/{name}": v for name, v in zip(self.sets.first, self.offline.values, strict=True)}
        return state | {"tasks": torch.tensor(self.tasks)}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what ``state`` gave.

        Raises:
            StreamError: the state is of another encoder or another kind of module.
        """
        parts: dict[str, dict[str, Tensor]] = {"head": {}, "online": {}, "offline": {}}
        for name, tensor in state.items():
            group, _, rest = name.partition("/")
            if rest:
                parts[group][rest] = tensor
        ours = {name: parameter.shape for name, parameter in self.sets.first.items()}
        for group in ("online", "offline"):
            if parts[group] and ours != {name: tensor.shape for name, tensor in parts[group].items()}:
                raise StreamError(
                    f"the state holds {len(parts[group])} {group} tensors that do not fit the {len(ours)} of this "
                    f"encoder and pet {self.sets.kind!r}."
                )
        for name, parameter in self.sets.first.items():
            parameter.copy_(parts["online"][name])
        self.head = GrowingLinear(parts["head"]["weights.0"].shape[1])
        self.head.restore(parts["head"])
        if parts["offline"]:
            self.offline = OfflineCopy(self.sets.first.values(), 1.0)
            for value, name in zip(self.offline.values, self.sets.first, strict=True):
                value.copy_(parts["offline"][name])
            self.sets.add_second()
        self.tasks = int(state["tasks"])
        self._settle()

    def save(self, directory: Path, label_names: Sequence[str]) -> None:
        """Write head, modules, and a ``README.md`` whose code predicts without Headwater."""
        assert self.head is not None, "called after the last task"
        weight, bias = torch.cat(list(self.head.weights)), torch.cat(list(self.head.biases))
        with atomic_path(directory / "head.safetensors") as path:
            save_file({"weight": weight.detach().cpu(), "bias": bias.detach().cpu()}, path)
        atomic_write_text(directory / "classes.json", json.dumps({"label_names": list(label_names)}, indent=2) + "\n")
        self.sets.save(directory / "adapter")
        write_card(directory, self.encoder, kind=self.sets.kind, ensemble=self.ensemble, two=self.offline is not None)


class LAE(ContinualRecipe):
    """Recipe: an online module, an offline copy, and the surer of the two."""

    id: ClassVar[str] = "lae"
    reads: ClassVar[Literal["features", "inputs"]] = "inputs"

    pet: PetChoice = Field(default=BesideAttention(), description="what is trained: adapter, lora or prefix")
    lr: float = Field(
        default=0.03 * 24 / 256, gt=0, description="learning rate of Adam, constant; on ImageNet-R .005 * 24 / 256"
    )
    epochs: int = Field(default=5, gt=0, description="passes over each task's training data")  # CIFAR-100; else 50
    train_batch_size: int = Field(default=24, gt=0, description="samples per step")
    freeze: float = Field(
        default=0.6, ge=0, lt=1, description="fraction of each later task in which the head is trained alone"
    )
    decay: Annotated[float, Field(ge=0, le=1)] | Annotated[str, Field(pattern=_HALF_LIFE)] = Field(
        default=0.9999, description="what the offline copy keeps of itself in a step; `task:h` halves it in h tasks"
    )
    ensemble: Ensemble = Field(
        default="max", description="of both models' probabilities, or one alone; `online` is plain fine-tuning"
    )
    fit: FitSettings = Field(
        default=FitSettings(), description="how the training loop runs: precision, micro-batches, checkpoints"
    )

    def learner(self, info: StreamInfo) -> LAELearner:
        """A frozen encoder with fresh modules, no class seen yet."""
        return LAELearner(
            self.encoder(info),
            pet=self.pet,
            lr=self.lr,
            epochs=self.epochs,
            train_batch_size=self.train_batch_size,
            freeze=self.freeze,
            decay=self.decay,
            ensemble=self.ensemble,
            batch_size=self.batch_size,
            fit=self.fit,
            seed=self.seed,
        )
