"""Claim of ``preprocessing``: at the size and normalisation of its pretraining, a frozen encoder is another encoder.

A convolutional net is pretrained to tell digits at 0, 90 and 180 degrees apart, upsampled from 8 to 24 pixels and
standardised. Downstream, other images of digits at 270 degrees arrive at 8 pixels in another range; five nearest
neighbours among 300 labelled ones read its features. No arm has anything to tune. The best of the four other sizes is
chosen on the test images, seed by seed, which is in that rival's favour.

Pilots on seeds 0 to 3 changed the set-up twice. Pretraining on 600 images for 20 epochs left the net at .87 to .92 on
its own task, so it is given 797 images and 40 epochs (.93). Between nets of 16-32-64 and 32-32-64 channels, the wider
was taken because its rows with random weights are those that the design's first trial had (.86 at 8 px, .76 at 24 px);
with the narrower one, the pretraining pipeline was .05 to .08 above the naive one on three seeds, with the wider .07 to
.13 on four. Margins were set before and not changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headwater.adapt.preprocessing import NORMS, AuditTable, Norm, audit
from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.order import permutation
from headwater.core.rng import derive_seed, torch_generator
from headwater.core.sampling import sample_shots
from headwater.modalities.vision.baselines import ImageStatistics, RandomConvFeatures
from headwater.modalities.vision.digits import SEEN, Digits, digits
from headwater.modalities.vision.transform import PretrainingTransform

__all__ = ["CLAIM"]

SIZE, NATIVE, OTHERS = 24, 8, (8, 12, 16, 32)
SHOTS = 30  # of each of ten digits
WIDTHS = ((1, 32, 5), (32, 32, 3), (32, 64, 3))  # channels in and out, kernel; 28,448 weights
EPOCHS: Mapping[Scale, int] = {"small": 40, "smoke": 2}
LEAST_PRETRAINED = 0.8  # right of new images of the net's own 30 classes
LEAST_DOWNSTREAM = 0.5  # where chance is 0.1


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Pretrain, then audit the net and what needs no pretraining; the test images are the same for all seeds."""
    seen = _joined(digits("pretrain", SEEN), digits("validation", SEEN))
    ink = _pixels(seen) / 255
    transform = PretrainingTransform((SIZE, SIZE), mean=[float(ink.mean())], std=[float(ink.std())])
    start, net = _net(seed), _net(seed)
    own = _pretrain(net, seen, transform, seed, EPOCHS[scale])

    few, test = digits("train", ("rot270",)), digits("test", ("rot270",))
    rows = sample_shots(few.labels, SHOTS, seed)
    images, labels, held_out = _downstream(few)[rows], few.labels[rows], (_downstream(test), test.labels)

    def audited(encoder: Any, sizes: Sequence[int], norms: Sequence[Norm]) -> AuditTable:  # Any: as in audit
        options: dict[str, Any] = {"sizes": sizes, "norms": norms, "probes": ("knn",), "held_out": held_out}
        return audit(encoder, images, labels, transform=transform, **options)

    convolve = RandomConvFeatures(random_state=seed).fit(images / 255)
    untrained: dict[str, Callable[[Tensor], Tensor]] = {
        "raw pixels": lambda pixels: pixels.flatten(1),
        "image statistics": lambda pixels: torch.from_numpy(ImageStatistics().transform(pixels)),
        "random convolutions": lambda pixels: torch.from_numpy(convolve.transform(pixels)),
    }
    tables = {
        "pretrained": audited(net, (SIZE, *OTHERS), NORMS),
        "random weights": audited(start, (SIZE, *OTHERS), ("pretraining",)),
        **{name: audited(encoder, (NATIVE,), ("divide",)) for name, encoder in untrained.items()},
    }
    trained, random = tables["pretrained"], tables["random weights"]
    others = {size: trained.items(size, "pretraining", "knn") for size in OTHERS}
    items = {
        "pretraining-pipeline": trained.items(SIZE, "pretraining", "knn"),
        "naive": trained.items(NATIVE, "divide", "knn"),
        "best-other-size": max(others.values(), key=np.mean),
        "pretrained-native": others[NATIVE],
        "random-weights": random.items(SIZE, "pretraining", "knn"),
        "random-weights-native": random.items(NATIVE, "pretraining", "knn"),
    }
    notes = {f"{name}/seed-{seed}": _said(table) for name, table in tables.items()}
    notes[f"best size/seed-{seed}"] = str(max((row for row in trained.rows if row.norm == "pretraining"), key=_by).size)
    notes[f"own task/seed-{seed}"] = f"{own:.3f}"
    return Measured(
        {arm: {"accuracy": float(right.mean())} for arm, right in items.items()},
        {arm: {"accuracy": right.tolist()} for arm, right in items.items()},
        hashlib.sha256(b"".join(data.images.tobytes() for data in (seen, few, test))).hexdigest(),
        _unmet(seed, own, float(items["pretraining-pipeline"].mean())),
        notes,
    )


def _joined(first: Digits, second: Digits) -> Digits:
    images = np.concatenate((first.images, second.images))
    return Digits(images, np.concatenate((first.labels, second.labels)), first.label_names)


def _pixels(data: Digits) -> NDArray[np.float32]:
    return 255 * data.images.reshape(-1, 1, 8, 8)


def _downstream(data: Digits) -> NDArray[np.float32]:
    """Less contrast, and a paper that is not black: from 40 to 193 where pretraining had 0 to 255."""
    return 0.6 * _pixels(data) + 40


def _net(seed: int) -> nn.Sequential:
    """Three convolutions of stride 2 and a mean over positions, from ``(batch, 1, H, W)`` to ``(batch, 64)``."""
    generator = torch_generator(seed, "preprocessing net")
    layers: list[nn.Module] = []
    for inputs, outputs, kernel in WIDTHS:
        # A layer's own initialisation would draw from the global generator.
        layer = nn.utils.skip_init(nn.Conv2d, inputs, outputs, kernel, stride=2, padding=kernel // 2)  # type: ignore[no-untyped-call]
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def _pretrain(net: nn.Sequential, seen: Digits, transform: PretrainingTransform, seed: int, epochs: int) -> float:
    """Train in place on the classes of ``seen``; the accuracy on images of them that training did not see."""
    head = nn.utils.skip_init(nn.Linear, WIDTHS[-1][1], len(seen.label_names))  # type: ignore[no-untyped-call]
    nn.init.kaiming_uniform_(head.weight, generator=torch_generator(seed, "preprocessing head"))
    nn.init.zeros_(head.bias)
    images, labels = transform(torch.from_numpy(_pixels(seen))), torch.from_numpy(seen.labels)
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=2e-3)
    for epoch in range(epochs):
        order = torch.from_numpy(permutation(derive_seed(seed, "preprocessing net"), epoch, len(labels)))
        for rows in torch.split(order, 64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(net(images[rows])), labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    new = digits("train", SEEN)  # at 270 degrees these come back downstream; nothing here is chosen by them
    with torch.no_grad():
        answers = head(net(transform(torch.from_numpy(_pixels(new))))).argmax(1).numpy()
    return float((answers == new.labels).mean())


def _by(row: Any) -> float:  # Any: an AuditRow
    return float(row.accuracy)


def _said(table: AuditTable) -> str:
    return ", ".join(f"{row.size} px {row.norm} {row.accuracy:.3f}" for row in table.rows)


def _unmet(seed: int, own: float, downstream: float) -> list[str]:
    unmet = []
    if own < LEAST_PRETRAINED:
        unmet.append(f"seed {seed}: {own:.3f} of new images of the net's own task are right")
    if downstream < LEAST_DOWNSTREAM:
        unmet.append(f"seed {seed}: {downstream:.3f} of the downstream images are right under the pretraining pipeline")
    return unmet


def _part(statement: str, treatment: str, baseline: str, margin: float) -> Part:
    return Part(statement, "accuracy", treatment, baseline, "higher", margin)


CLAIM = Claim(
    id="preprocessing",
    statement=(
        "Neighbours on a frozen net's features gain more than 10 points when images get the size and normalisation of "
        "pretraining instead of their own size divided by 255; no other size is as good; and whether pretraining "
        "beats random weights at all depends on the size."
    ),
    source=(
        "Corley et al., arXiv:2305.13456: k-NN on EuroSAT with an ImageNet ResNet-50, standardised, rises from .823 at "
        "64 px to .917 at 256 px, with random weights from .558 to .717; up to 32 points on So2Sat."
    ),
    parts=(
        _part(
            "The pretraining pipeline is more than 10 points above the naive one.", "pretraining-pipeline", "naive", 0.1
        ),
        _part(
            "The pretraining size is above the best of four other sizes, chosen for each seed on the test images.",
            "pretraining-pipeline",
            "best-other-size",
            0.0,
        ),
        _part(
            "At the images' own size, random weights beat the pretrained ones.",
            "random-weights-native",
            "pretrained-native",
            0.0,
        ),
        _part(
            "At the pretraining size, the pretrained weights beat random ones.",
            "pretraining-pipeline",
            "random-weights",
            0.0,
        ),
    ),
    rival="random-weights-native",
    preconditions=(
        f"the pretrained net tells at least {LEAST_PRETRAINED:.0%} of new images of its own 30 classes",
        f"under the pretraining pipeline at least {LEAST_DOWNSTREAM:.0%} of the downstream images are right",
    ),
    seeds={"smoke": (100,), "small": (100, 101, 102, 103, 104)},
    measure=measure,
)
