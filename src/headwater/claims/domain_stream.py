"""Does a sequence of domains help each one, and do small models both learn and forget the most?

Small scale: two Llamas of different width, trained on the same tokens of the standard library's docstrings, continue on
docstrings of five packages in the order of their similarity, about 25 thousand tokens each, and on each package alone.
Documents are cut at 1,000 characters, so that twenty of them are not long to score. The learning rate of each width is
the best of three for training *alone*, on two packages and a seed of its own, so that the rival is the one that was
tuned. The bases' loss on the domains before any of it is reported as ``start``: a wider base that is worse there has
learned less of what it could, and the comparison of widths would then be one of training. Reported beside: two random
orders of the narrower model against the similar one; with five domains this is far from the paper's 159.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headwater.core.cache import atomic_write_text
from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.recipe import load_recipe
from headwater.core.rng import derive_seed
from headwater.core.run import Result, execute
from headwater.domain.order import order_domains
from headwater.domain.transfer import TransferMatrix
from headwater.modalities.text.bases import HELD_OUT, Base, trained_base
from headwater.modalities.text.docs import fingerprint
from headwater.modalities.text.docstrings import docstring_corpus

__all__ = ["CLAIM"]

TUNING_SEED = 1000
LEARNING_RATES = (1e-3, 2.5e-3, 5e-3)
GENERAL = "stdlib"
CHARS, DOCUMENT_CHARS = 250_000, 1_000
RANDOM_ORDERS = 2
LEARNED = 0.05
"""Bits per byte that a stage must gain on its own domain, on average, for there to be something to forget."""


@dataclass(frozen=True)
class Setting:
    """One scale of the experiment.

    Attributes:
        packages: the domains.
        bases: the starting models by size.
        tokens: of each domain, about.
        fields: of every recipe.
    """

    packages: tuple[str, ...]
    bases: Mapping[str, Base]
    tokens: int
    fields: Mapping[str, Any]  # Any: recipe fields


def _base(hidden: int, lr: float, **changes: Any) -> Base:  # Any: fields of Base
    shape = {"layers": 2, "vocab": 1024, "context": 128, "rows": 16, "steps": 150, **changes}
    return Base(corpus=f"headwater:{GENERAL}", hidden=hidden, mlp=43 * hidden // 16, lr=lr, **shape)


PACKAGES = ("numpy", "pandas", "sklearn", "scipy", "networkx")
TINY = {"layers": 1, "vocab": 512, "context": 64, "rows": 8, "steps": 4}
SETTINGS: Mapping[Scale, Setting] = {
    "smoke": Setting(
        PACKAGES[-3:],
        {"small": _base(16, 5e-3, **TINY), "large": _base(32, 5e-3, **TINY)},
        tokens=1_024,
        fields={"batch_tokens": 512, "eval_chars": 4_000},
    ),
    "small": Setting(
        PACKAGES,
        {"small": _base(64, 5e-3), "large": _base(128, 3e-3)},
        tokens=25_600,
        fields={"batch_tokens": 1_024, "eval_chars": 15_000},
    ),
    "full": Setting(
        (*PACKAGES, "sympy", "statsmodels", "matplotlib"),
        {"small": _base(128, 3e-3, steps=600), "large": _base(384, 1e-3, steps=600, layers=4)},
        tokens=102_400,
        fields={"batch_tokens": 4_096},
    ),
}


@dataclass(frozen=True)
class Texts:
    """Paths of the corpora by package, and what is in them."""

    paths: Mapping[str, Path]
    fingerprint: str


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Run the sequence at both sizes, and random orders of the small one."""
    setting = SETTINGS[scale]
    texts = _texts(setting, directory.parents[1] / f"{scale}-corpora" / directory.name)
    arms: dict[str, dict[str, float]] = {}
    notes: dict[str, str] = {}
    shared: dict[str, dict[str, Any]] = {}  # Any: recipe fields
    for size, base in setting.bases.items():
        model = trained_base(base)
        lr = LEARNING_RATES[0] if scale == "smoke" else _tuned(setting, texts, size, model, scale, directory)
        shared[size] = {"model": str(model), "optim": {"lr": lr, "schedule": "constant", "warmup": 0.1}}
        result, matrix = _stream(setting, texts, shared[size], seed, directory / size, order="similar", dapt=True)
        arms[size] = _figures(matrix)
        notes |= {f"learning rate, {size}": str(lr), "similar order": result.notes["order"]}
    names = {name: [1.0] for name in setting.packages}
    lasts = []
    for number in range(RANDOM_ORDERS):
        order = order_domains(names, how="random", seed=derive_seed(seed, "order", number))
        place = directory / f"random-{number}"
        _, matrix = _stream(setting, texts, shared["small"], seed, place, order=order, dapt=False)
        lasts.append(matrix.summary()["stream/last"])
    for arm, name in (("stream", "own stage"), ("alone", "alone")):
        arms[arm] = {"own domain": float(np.mean([arms[size][name] for size in setting.bases]))}
    arms["random"] = {"last": float(np.mean(lasts))}
    return Measured(arms, data_fingerprint=texts.fingerprint, unmet=_unmet(arms), notes=notes)


def _figures(matrix: TransferMatrix) -> dict[str, float]:
    assert matrix.dapt is not None  # asked for above
    found = {name.removeprefix("stream/"): value for name, value in matrix.summary().items()}
    return {
        "start": found["zero_shot"],
        "last": found["last"],
        "moved": float(np.abs(matrix.learned).mean()),
        "learned": found["learned"],
        "forgetting": found["forgetting"],
        "backward": found["backward"],
        "forward": found["forward"],
        "own stage": float(matrix.cpt[1:].mean()),
        "alone": float(matrix.dapt[1:].mean()),
    }


def _unmet(arms: Mapping[str, Mapping[str, float]]) -> list[str]:
    unmet = []
    start = {size: arms[size]["start"] for size in ("small", "large")}
    if start["large"] > start["small"]:
        unmet.append(
            f"the large base starts at {start['large']:.3f} bits per byte, the small one at {start['small']:.3f}"
        )
    unmet += [
        f"a stage of the {size} model gains {arms[size]['learned']:.3f} bits per byte on its own domain"
        for size in start
        if arms[size]["learned"] < LEARNED
    ]
    return unmet


def _texts(setting: Setting, directory: Path) -> Texts:
    """Write the packages' docstrings, and those the bases were trained on, with the same ids as there."""
    paths, prints = {}, []
    for package in (*setting.packages, GENERAL):
        documents = docstring_corpus((package,), max_chars=DOCUMENT_CHARS, limit_chars=CHARS)
        paths[package] = directory / f"{package}.jsonl"
        prints.append(fingerprint(documents))
        if not paths[package].exists():
            lines = [json.dumps({"id": document.id, "text": document.text}) + "\n" for document in documents]
            atomic_write_text(paths[package], "".join(lines))
    return Texts(paths, "+".join(found[:16] for found in prints))


def _shared_fields(setting: Setting, texts: Texts, seed: int) -> dict[str, Any]:  # Any: recipe fields
    context = next(iter(setting.bases.values())).context
    return {
        **setting.fields,
        "general": str(texts.paths[GENERAL]),
        "held_out": HELD_OUT,  # as the bases', so that general test documents are new to them
        "seq_len": context,
        "eval_at": [],
        "fit": {"precision": "fp32"},
        "seed": seed,
    }


def _stream(
    setting: Setting,
    texts: Texts,
    fields: Mapping[str, Any],  # Any: recipe fields
    seed: int,
    directory: Path,
    *,
    order: str | Sequence[str],
    dapt: bool,
) -> tuple[Result, TransferMatrix]:
    own = {
        "method": "domain_stream",
        "domains": {package: str(texts.paths[package]) for package in setting.packages},
        "budget": {"tokens": setting.tokens * len(setting.packages)},
        "order": order,
        "embedding": "tfidf",  # the same wherever this runs
        "dapt": dapt,
    }
    result = execute(load_recipe({**own, **fields, **_shared_fields(setting, texts, seed)}), directory, resume=True)
    return result, TransferMatrix.load(directory / "matrix.npz")


def _tuned(setting: Setting, texts: Texts, size: str, model: Path, scale: Scale, directory: Path) -> float:
    """The rate at which training alone is best on validation text of two packages; trials run once per claim."""
    trials = directory.parents[1] / f"{scale}-tuning" / directory.name / size
    losses = {}
    for lr in LEARNING_RATES:
        found = []
        for package in setting.packages[:2]:
            fields = {
                "method": "plain",
                "model": str(model),
                "domain": str(texts.paths[package]),
                "budget": {"tokens": setting.tokens},
                "optim": {"lr": lr, "schedule": "constant", "warmup": 0.1},
                **_shared_fields(setting, texts, TUNING_SEED),
            }
            trial = execute(load_recipe(fields), trials / f"{package}-lr-{lr:g}", resume=True)
            found.append(trial.metrics["valid/domain_bpb"])
        losses[lr] = float(np.mean(found))
    return min(losses, key=losses.__getitem__)


CLAIM = Claim(
    id="domain_stream",
    statement="In a sequence of similar domains each is learned better than alone, and the smaller model both moves "
    "more on a domain in its own stage and forgets more of it afterwards.",
    source="Yıldız et al., arXiv:2402.17400: with similar domains in a row, models are better on the current domain "
    "than when trained on it alone; the smallest model has the highest rates of both learning and forgetting; random "
    "orders leave the better final model.",
    parts=(
        Part(
            "Right after its stage, a domain takes fewer bits per byte than when the start is trained on it alone: the "
            "mean over both sizes and all domains but the first, whose stage is training alone",
            "own domain",
            "stream",
            "alone",
            "lower",
            0.0,
        ),
        Part(
            "A stage changes the small model's bits per byte on its own domain by more than the large one's",
            "moved",
            "small",
            "large",
            "higher",
            0.0,
        ),
        Part(
            "The small model loses more of the best that it ever had on a domain than the large one",
            "forgetting",
            "small",
            "large",
            "higher",
            0.0,
        ),
        Part(
            "The small model ends better on all domains after random orders than after the similar one",
            "last",
            "random",
            "small",
            "lower",
            0.0,
            decides=False,
        ),
    ),
    rival="alone",
    preconditions=(
        "before any domain the large base predicts them no worse than the small one, both trained on the same tokens",
        f"a stage gains at least {LEARNED} bits per byte on its own domain, mean over domains, at both sizes",
    ),
    seeds={"smoke": (100,), "small": (100, 101, 102), "full": (100, 101, 102, 103, 104)},
    measure=measure,
)
