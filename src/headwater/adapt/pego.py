"""A group of small adapters that leaves alone what the pretrained weights know, and differs from each other.

Beside every query and value projection W stand N updates of rank r, all at once, and one regulariser holds them apart::

    h = W x + sum_{i<=N} B_i A_i x          loss = CE + lambda L_o        (L_o: see ``headwater.adapt.orthogonal``)

A is drawn as a linear layer's weight is, B is 0. Only the adapters and the new head are trained. Afterwards the group
is one update of rank N r and folds into W: no cost at inference. It is meant for domain generalisation: training texts
of several domains in equal numbers, a test on domains that were not seen.

Source: Hu et al., "Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain
    Generalization", arXiv:2407.15085.
Differs: texts instead of images, so the encoder is the user's own instead of CLIP's image tower; a batch is
    ``batch_size`` texts in all, dealt to the domains in turn, where the paper takes 32 of each domain (unverified). In
    a fused projection one A serves query and value.
Needs: labelled texts; a column that names their domain, for balanced batches and for holding one out.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from headwater.adapt.base import AdaptTask
from headwater.adapt.data import TaskData, read_task
from headwater.adapt.orthogonal import FUSED, OrthogonalGroupLoss, adapted_rows, group_figures
from headwater.adapt.tuned import TunedClassifier, TunedRecipe, class_stream, new_modules
from headwater.core.fit import Phase, Trained
from headwater.core.objective import Loss, Objective
from headwater.core.optim import OptimSpec
from headwater.core.recipe import Name
from headwater.core.rng import derive_seed
from headwater.modalities.models import is_quantised
from headwater.modalities.text.classes import ClassObjective, open_class_model
from headwater.modalities.text.labelled import DOCSTRINGS
from headwater.modalities.text.soft_labels import SoftCrossEntropy

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["Pego", "PegoObjective", "from_pretrained_pego", "merge", "pego_model"]

_AUTO = (  # BERT and ViT; CLIP, Llama and newer ViTs; DeBERTa; DistilBERT; T5; GPT-2; timm
    ("query", "value"),
    ("q_proj", "v_proj"),
    ("query_proj", "value_proj"),
    ("q_lin", "v_lin"),
    ("q", "v"),
    ("c_attn",),
    ("qkv",),
)
_COLLAPSED = 1e-3  # of the pretrained weight's norm


def pego_model(
    model: nn.Module,
    *,
    r: int = 4,
    n: int = 4,
    target_modules: Literal["auto"] | Sequence[str] = "auto",
    whole: Sequence[str] = (),
    seed: int = 0,
) -> PeftModel:
    """Wrap ``model`` in a PEFT model with ``n`` LoRA adapters ``pego_0``, ... that are active and trained together.

    Args:
        model: a Hugging Face model; its own weights are frozen in place.
        r: rank of each adapter.
        n: how many.
        target_modules: last parts of the names of the linear layers that bear them; ``"auto"``: the query and value
            projections by the names that usual architectures give them. Of fused ones (``c_attn``, ``qkv``) the key's
            rows stay as they were.
        whole: names of modules that are trained and saved whole, such as a new head; they belong to ``pego_0``.
        seed: of the adapters' initialisation; the global generator is left as it was.

    Raises:
        ValueError: ``r`` or ``n`` is not positive, no such linear layer (those there are, are named), or the model is
            quantised.
    """
    if r < 1 or n < 1:
        raise ValueError(f"r and n must be at least 1; got r={r}, n={n}.")
    if is_quantised(model):
        raise ValueError(
            "the regulariser reads the pretrained weights, and those of this model are quantised; call "
            "`model.dequantize()` first, or load it unquantised."
        )
    targets = _targets(model, target_modules)
    transposed = any(isinstance(m, Conv1D) for name, m in model.named_modules() if name.rpartition(".")[2] in targets)

    def config(saved: list[str] | None) -> LoraConfig:
        return LoraConfig(
            r=r, lora_alpha=r, target_modules=list(targets), modules_to_save=saved, fan_in_fan_out=transposed
        )

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        group: PeftModel = get_peft_model(model, config(list(whole) or None), adapter_name=_name(0))
        for number in range(1, n):
            group.add_adapter(_name(number), config(None))
    _activate(group)
    return group


def _name(number: int) -> str:
    return f"pego_{number}"


def _targets(model: nn.Module, asked: Literal["auto"] | Sequence[str]) -> tuple[str, ...]:
    linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    if asked == "auto":
        found = next((names for names in _AUTO if linear.issuperset(names)), None)
        if found is None:
            raise ValueError(
                "no query and value projections by a name that is known; name them in target_modules. Linear layers: "
                + ", ".join(sorted(linear))
            )
        return found
    if isinstance(asked, str) or not asked or not linear.issuperset(asked):
        raise ValueError(f"target_modules must be names of linear layers, {', '.join(sorted(linear))}; got {asked!r}.")
    return tuple(asked)


def _activate(group: PeftModel) -> None:
    """All adapters on and trained: PEFT turns one on at a time. The key's rows of fused layers get no gradient."""
    group.base_model.set_adapter(list(group.peft_config))
    for name, layer in group.named_modules():
        if isinstance(layer, LoraLayer) and name.rpartition(".")[2] in FUSED:
            mask = torch.zeros(layer.out_features, 1)
            for rows in adapted_rows(name, layer.out_features):
                mask[rows] = 1
            for up in layer.lora_B.values():
                up.weight.register_hook(lambda grad, mask=mask: grad * mask.to(grad))


def from_pretrained_pego(model: nn.Module, directory: str | Path) -> PeftModel:
    """Open a group that ``PeftModel.save_pretrained`` wrote, not merged, with all its adapters active and trainable.

    Args:
        model: a fresh copy of what the group was trained on; wrapped in place.
        directory: holds the folders ``pego_0``, ``pego_1``, ...

    Raises:
        FileNotFoundError: there is no folder ``pego_0``.
    """
    home = Path(directory)
    if not (home / _name(0)).is_dir():
        raise FileNotFoundError(
            f"no group of adapters in {home}: there is no folder {_name(0)}. A merged one opens with `PeftModel`."
        )
    group: PeftModel = PeftModel.from_pretrained(model, home / _name(0), adapter_name=_name(0), is_trainable=True)
    number = 1
    while (home / _name(number)).is_dir():
        group.load_adapter(home / _name(number), adapter_name=_name(number), is_trainable=True)
        number += 1
    _activate(group)
    return group


def merge(group: PeftModel) -> PeftModel:
    """Make one ordinary LoRA of rank N r of the group, in place; exact up to rounding.

    What ``save_pretrained`` then writes opens with ``PeftModel.from_pretrained``, and ``merge_and_unload`` leaves the
    plain model. Weights that were trained whole stay as they are.
    """
    names = list(group.peft_config)
    rank = sum(group.peft_config[name].r for name in names)
    with torch.random.fork_rng():
        group.add_adapter("default", replace(group.peft_config[names[0]], r=rank, lora_alpha=rank))
    with torch.no_grad():
        for module in group.modules():
            if isinstance(module, LoraLayer):
                up, down = module.lora_B["default"].weight, module.lora_A["default"].weight
                down.copy_(torch.cat([module.lora_A[name].weight for name in names]))
                up.copy_(torch.cat([module.scaling[name] * module.lora_B[name].weight for name in names], 1))
            elif isinstance(module, ModulesToSaveWrapper):
                module.modules_to_save["default"].load_state_dict(module.modules_to_save[names[0]].state_dict())
    group.set_adapter("default")
    for name in names:
        group.delete_adapter(name)
    return group


class PegoObjective:
    """The task's loss plus ``lam`` times the regulariser, exact under micro-batches and several processes.

    Args:
        task: the loss of a batch.
        penalty: built on the model that is trained.
        lam: >= 0; at 0 the regulariser is not computed.
    """

    def __init__(self, task: Objective, penalty: OrthogonalGroupLoss, lam: float = 1e-3) -> None:
        if lam < 0:
            raise ValueError(f"lam must be at least 0; got {lam}.")
        self.task, self.penalty, self.lam, self.unit = task, penalty, lam, task.unit

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """The task's sum, and the regulariser as often as there are examples; ``penalty``: ``L_o``."""
        loss = self.task(model, batch)
        if self.lam == 0:
            return loss
        penalty = self.penalty()
        total = loss.total + self.lam * loss.count * penalty
        return Loss(total, loss.count, {**loss.metrics, "penalty": penalty.detach()})


class Pego(TunedRecipe):
    """Recipe: train the group on all domains but one, merge it, measure on the one."""

    id: ClassVar[str] = "pego"

    r: int = Field(default=4, gt=0, description="rank of each adapter")
    n: int = Field(default=4, ge=1, le=16, description="adapters on each projection")
    lam: float = Field(default=1e-3, ge=0, description="weight of the orthogonal regulariser")
    target_modules: Literal["auto"] | tuple[Name, ...] = Field(
        default="auto", description="names of the adapted linear layers; `auto`: query and value projections"
    )
    domain_field: Name | None = Field(
        default=None, description="column of `train` that names each text's domain; batches are balanced over domains"
    )
    holdout: Name | None = Field(
        default=None, description="a domain that is not trained on but tested, as ood/NAME; null: all are trained on"
    )
    optim: OptimSpec = Field(
        default=OptimSpec(
            lr=5e-4, betas=(0.9, 0.999), weight_decay=0.0, warmup=0.0, schedule="constant", clip=None
        ),  # Adam
        description="how weights are moved",
    )

    @model_validator(mode="after")
    def _domains_are_named(self) -> Self:
        if self.holdout is not None and self.domain_field is None:
            raise ValueError(f"holdout: {self.holdout!r} is a domain; name the column of domains in `domain_field`")
        if self.domain_field is not None and self.train.name == DOCSTRINGS:
            raise ValueError(f"domain_field: {DOCSTRINGS!r} has no columns; give texts of your own in `train`")
        return self

    def load(self) -> TaskData:
        """The data that the fields name, with the texts' domains."""
        if self.domain_field is None or self.test is None:
            return super().load()
        return read_task(
            self.train,
            self.test,
            self.validation,
            self.ood,
            self.label_texts,
            group_field=self.domain_field,
            holdout=self.holdout,
        )

    def phases(self, task: AdaptTask, run: Run) -> Generator[Phase, Trained, TunedClassifier]:
        """One phase; then merge."""
        classes = open_class_model(
            self.model,
            task.label_names,
            max_tokens=self.max_tokens or 1 << 20,  # the model's own number of positions then decides
            seed=self.seed,
        )
        group = pego_model(
            classes.model,
            r=self.r,
            n=self.n,
            target_modules=self.target_modules,
            whole=new_modules(classes),
            seed=derive_seed(self.seed, "pego"),
        )
        classes.model = group
        if task.train.groups is not None and len(set(task.train.groups)) == 1:
            words = f"all training texts are of one domain, {task.train.groups[0]}: nothing is learned about others."
            _warn(run, "one-domain", words)
        stream = class_stream(classes, task, rows=self.batch_size, seed=self.seed)
        objective = PegoObjective(ClassObjective(SoftCrossEntropy()), OrthogonalGroupLoss(group), self.lam)
        trained = yield Phase("pego", group, stream, objective)
        figures = group_figures(group)
        task.figures |= {f"ortho/{name}": value for name, value in figures.items()}
        if self.lam > 0 and figures["size"] < _COLLAPSED:
            words = (
                f"the updates are {figures['size']:.1e} of the pretrained weights: the regulariser has all but undone "
                f"them; lower lam, now {self.lam:g}, or train for longer."
            )
            _warn(run, "collapsed", words)
        classes.model = merge(group)
        return TunedClassifier(classes, self.model.name, trained.cost.trainable)


def _warn(run: Run, name: str, words: str) -> None:
    run.logger.warning(words)
    run.notes[f"warning/{name}"] = words
