"""Experiment of ``levi``: spurious features on both sides, and a test where neither helps.

Digits of 8 x 8. A small vision transformer is pretrained to tell them apart on images whose row or column stripe says
the digit nine times in ten, so its features rely on the stripe. The task's images have a border pixel that says the
digit nine times in ten, and a stripe that says nothing. Out of distribution neither says anything. Every arm gets the
same images, steps and learning rates, chosen on validation images like the task's.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from headwater.compose.layerwise import LayerwiseEnsemble, LayerwiseObjective, OutputEnsemble, SmallImages
from headwater.core.budget import Budget
from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.fit import FitSettings, Phase, fit
from headwater.core.optim import OptimSpec
from headwater.core.order import VirtualIndex
from headwater.core.rng import derive_seed
from headwater.modalities.vision.digits import digits
from headwater.modalities.vision.spurious import plant_marks

__all__ = ["CLAIM"]

SIZE, CLASSES = 8, 10
TIED = 0.9
RATES = (1e-3, 3e-3)
RELIES = 0.05  # by which accuracy must fall where a mark says nothing, for the mark to have been learned


@dataclass(frozen=True)
class _Setting:
    pretrain: int  # steps
    steps: int  # of every arm
    hidden: int = 48
    layers: int = 3
    rows: int = 64


_SETTINGS: Mapping[Scale, _Setting] = {
    "smoke": _Setting(pretrain=2, steps=2, hidden=16, layers=2),
    "small": _Setting(pretrain=400, steps=300),
}


class _Images:
    """Labelled images in an order of their own."""

    tokens_per_row = 1

    def __init__(self, images: NDArray[np.float32], labels: NDArray[np.int64], rows: int, seed: int) -> None:
        self.images, self.labels, self.rows = torch.from_numpy(images)[:, None], torch.from_numpy(labels), rows
        self._order = VirtualIndex(len(labels), derive_seed(seed, "images"))
        content = images.tobytes() + labels.tobytes()
        self.fingerprint = hashlib.blake2b(content + f"{rows} {seed}".encode(), digest_size=16).hexdigest()

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        items = torch.from_numpy(self._order(step * self.rows + np.arange(self.rows)[start:stop])[1])
        return {"pixel_values": self.images[items], "labels": self.labels[items]}


def _marked(part: str, stripe: float, pixel: float | None, seed: int, rows: int = 64) -> _Images:
    """Images of one part with a stripe and, unless None, a pixel, each tied to the label so strongly."""
    data = digits(part, ("rot0",))  # type: ignore[arg-type]  # one of the parts
    images, labels = data.images.reshape(-1, SIZE, SIZE), data.labels
    mark = derive_seed(seed, "marks", part)
    images = plant_marks(images, labels, classes=CLASSES, strength=stripe, kind="stripe", seed=mark)
    if pixel is not None:
        images = plant_marks(images, labels, classes=CLASSES, strength=pixel, kind="pixel", seed=mark)
    return _Images(images, labels, rows, seed)


def _seeded(make: Callable[[], nn.Module], seed: int, *what: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, *what))
        return make()


class _Experiment:
    def __init__(self, scale: Scale, seed: int, directory: Path) -> None:
        self.setting, self.seed, self.directory = _SETTINGS[scale], seed, directory
        self.train = _marked("train", 0.0, TIED, seed, self.setting.rows)
        self.sides = {
            "valid": _marked("validation", 0.0, TIED, seed),
            "id": _marked("test", 0.0, TIED, derive_seed(seed, "id")),
            "ood": _marked("test", 0.0, 0.0, derive_seed(seed, "ood")),
        }
        self.encoder, self.stripe_gain = self._pretrained()

    def _pretrained(self) -> tuple[nn.Module, float]:
        """The encoder, and how much better it tells digits apart where the stripe says them."""
        setting = self.setting
        config = ViTConfig(
            image_size=SIZE,
            patch_size=2,
            num_channels=1,
            hidden_size=setting.hidden,
            num_hidden_layers=setting.layers,
            num_attention_heads=4,
            intermediate_size=2 * setting.hidden,
        )

        def classifier() -> nn.Module:
            encoder = ViTModel(config, add_pooling_layer=False)
            return LayerwiseEnsemble(encoder, None, CLASSES, layers=1, adapter_hidden=0, train_pretrained=True)

        model = _seeded(classifier, self.seed, "pretrained")
        self._fit(model, _marked("pretrain", TIED, None, self.seed, setting.rows), 2e-3, setting.pretrain, "pretrain")
        tied, free = (_marked("test", strength, None, derive_seed(self.seed, "probe")) for strength in (TIED, 0.0))
        encoder = model.pretrained
        assert isinstance(encoder, nn.Module)
        return encoder, float(_right(model, tied).mean() - _right(model, free).mean())

    def _fit(self, model: nn.Module, stream: _Images, lr: float, steps: int, name: str) -> None:
        fit(
            Phase(name, model, stream, LayerwiseObjective()),
            budget=Budget(steps=steps),
            optim=OptimSpec(lr=lr, warmup=0.06, weight_decay=0.01, betas=(0.9, 0.999)),
            seed=self.seed,
            directory=self.directory,
            settings=FitSettings(precision="fp32", log_every=1000),
        )

    def arm(self, name: str, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """An arm at its better learning rate, by validation."""

        @cache
        def tried(lr: float) -> nn.Module:
            # The same new weights at either rate: what differs is the rate.
            model = _seeded(lambda: make(copy.deepcopy(self.encoder).requires_grad_(True)), self.seed, "arm")
            self._fit(model, self.train, lr, self.setting.steps, f"{name}-{lr:g}")
            return model.eval()

        return tried(max(RATES, key=lambda lr: float(_right(tried(lr), self.sides["valid"]).mean())))


def _right(model: nn.Module, images: _Images) -> NDArray[np.float64]:
    model.eval()
    with torch.no_grad():
        found: NDArray[np.float64] = (
            (model(pixel_values=images.images).logits.argmax(-1) == images.labels).double().numpy()
        )
    return found


_ARMS: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "levi": lambda encoder: LayerwiseEnsemble(encoder, SmallImages(), CLASSES, layers=3, adapter_hidden=64),
    "output_ensemble": lambda encoder: OutputEnsemble(encoder, SmallImages(), CLASSES),
    "fine_tune": lambda encoder: LayerwiseEnsemble(
        encoder, None, CLASSES, layers=1, adapter_hidden=0, train_pretrained=True
    ),
    "linear_probe": lambda encoder: LayerwiseEnsemble(encoder, None, CLASSES, layers=1, adapter_hidden=0),
}


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Pretrain once, train every arm, test on both distributions."""
    run = _Experiment(scale, seed, directory)
    arms: dict[str, dict[str, float]] = {}
    items: dict[str, dict[str, list[float]]] = {}
    notes = {f"seed-{seed}/stripe": f"accuracy falls by {run.stripe_gain:.3f} where the stripe says nothing"}
    for name, make in _ARMS.items():
        if name == "levi" and run.setting.layers < 3:
            make = _two_layers
        model = run.arm(name, make)
        right = {side: _right(model, run.sides[side]) for side in ("id", "ood")}
        arms[name] = {side: float(own.mean()) for side, own in right.items()}
        items[name] = {side: own.tolist() for side, own in right.items()}
        notes[f"seed-{seed}/{name} trains"] = str(sum(p.numel() for p in model.parameters() if p.requires_grad))
    unmet = []
    if run.stripe_gain < RELIES:
        unmet.append(f"seed {seed}: the pretrained model's accuracy falls by {run.stripe_gain:.3f}; needed {RELIES}")
    if (fall := arms["fine_tune"]["id"] - arms["fine_tune"]["ood"]) < RELIES:
        unmet.append(f"seed {seed}: fine-tuned, accuracy falls by {fall:.3f} out of distribution; needed {RELIES}")
    return Measured(arms, items, run.train.fingerprint, unmet, notes)


def _two_layers(encoder: nn.Module) -> nn.Module:
    return LayerwiseEnsemble(encoder, SmallImages(), CLASSES, layers=2, adapter_hidden=16)


def _better_than(baseline: str, words: str) -> Part:
    return Part(
        f"Out of distribution it is right 0.01 more often than {words}.", "ood", "levi", baseline, "higher", 0.01
    )


CLAIM = Claim(
    id="levi",
    statement="Where pretraining and the task's data each have a spurious feature of their own, joining a frozen "
    "pretrained model with a small one at several layers is right more often out of distribution than fine-tuning, a "
    "linear probe, or an ensemble of the two models' answers, and not less often in distribution.",
    source="Roh et al., arXiv:2402.04644: LEVI improves out-of-distribution results of fine-tuning on recommendation "
    "with T5 and on image sets with ViT, and keeps those in distribution.",
    parts=(
        _better_than("output_ensemble", "an ensemble of a fine-tuned and a small model"),
        _better_than("fine_tune", "the fine-tuned model"),
        _better_than("linear_probe", "a linear probe of the pretrained model"),
        Part(
            "In distribution it is right at most 0.01 less often than the fine-tuned model.",
            "id",
            "levi",
            "fine_tune",
            "higher",
            -0.01,
        ),
        Part(
            "In distribution it is right at most 0.01 less often than the ensemble of answers.",
            "id",
            "levi",
            "output_ensemble",
            "higher",
            -0.01,
            decides=False,
        ),
    ),
    rival="output_ensemble",
    preconditions=(
        f"the pretrained model's accuracy falls by {RELIES} or more where its stripe says nothing",
        f"the fine-tuned model's accuracy falls by {RELIES} or more out of distribution",
    ),
    seeds={"smoke": (0,), "small": (100, 101, 102, 103, 104)},
    measure=measure,
)
