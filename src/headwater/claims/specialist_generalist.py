"""The claim of specialist or generalist, as an experiment in the instruction world of natural_instructions.

The generalist set are the 48 tasks that are seen there, behind their definitions; the broad target is a mixture of
twelve of the tasks that are held out, the narrow target one more of them. A specialist has n examples of its target and
reads them again until the budget is spent. The other arm spends four fifths of the same budget on the generalist tasks
first, and the rest on the same n examples. Asked are inputs of the target that were never read.

Three cells: broad and narrow as the claim names them, and the broad target with many examples, reported beside. In the
first two every arm chooses its learning rate from the same three on a seed of its own, by the bits per byte of
validation answers on the target; the third takes those of the broad cell. The generalist phase, 320 of 400 steps, is
as long as the tasks of that world took to be learned in a pilot of natural_instructions on seed 0. A pilot of the first
two cells on seed 0, at one learning rate, changed nothing.

The paper gives the generalist data on top of the specialist's budget. Equal budgets are harder for it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwater.claims.natural_instructions import Size as WorldSize
from headwater.claims.natural_instructions import make_world
from headwater.core.cache import atomic_write_text
from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.recipe import Recipe, load_recipe
from headwater.core.rng import derive_seed
from headwater.core.run import Result, execute
from headwater.corpora.specialist_generalist import Cell, coverage, gain_table

__all__ = ["CLAIM", "Targets", "make_targets"]

TUNING_SEED = 1000
LEARNING_RATES = (1.5e-3, 3e-3, 6e-3)
LEARNED = 0.9
BROAD = 12
ARMS: dict[str, dict[str, Any]] = {  # Any: recipe fields
    "both": {"generalist_share": 0.8},
    "specialist": {},
}
CELLS = {"broad, few": ("broad", "few"), "narrow, many": ("narrow", "many"), "broad, many": ("broad", "many")}
TUNED_AS = {"broad, many": "broad, few"}


@dataclass(frozen=True)
class Size:
    """How large an experiment is.

    Attributes:
        world: words and model; its instances are those of the narrow target.
        generalist, broad: instances of each task of the two.
        few, many: examples of a target.
        questions: on a target.
        fields: of every recipe.
    """

    world: WorldSize
    generalist: int
    broad: int
    few: int
    many: int
    questions: int
    fields: dict[str, Any]  # Any: recipe fields


SIZES: dict[Scale, Size] = {
    "smoke": Size(
        world=WorldSize(words=12, instances=60, hidden=16, layers=1, heads=2, fields={}),
        generalist=8,
        broad=12,
        few=12,
        many=24,
        questions=12,
        fields={"batch_tokens": 512, "budget": {"steps": 8}},
    ),
    "small": Size(
        world=WorldSize(words=60, instances=2_400, hidden=64, layers=2, heads=4, fields={}),
        generalist=120,
        broad=240,
        few=60,
        many=2_000,
        questions=120,
        fields={"batch_tokens": 1_280, "budget": {"steps": 400}},
    ),
}


@dataclass(frozen=True)
class Targets:
    """Folders of tasks, the architecture, and how broad each target is."""

    generalist: Path
    broad: Path
    narrow: Path
    model: Path
    coverage: dict[str, float]


def make_targets(size: Size, seed: int, directory: Path) -> Targets:
    """Draw a world and write its seen tasks, twelve of the held-out ones, and one more."""
    world = make_world(size.world, seed, directory / "world")
    start = derive_seed(seed, "targets") % len(world.held)
    held = [*world.held[start:], *world.held[:start]]
    names = {
        "generalist": [name for name in world.known if name not in world.held],
        "broad": held[:BROAD],
        "narrow": held[BROAD : BROAD + 1],
    }
    counts = {"generalist": size.generalist, "broad": size.broad, "narrow": size.world.instances}
    for folder, tasks in names.items():
        for name in tasks:
            task = world.known[name]
            cut = task.model_copy(update={"instances": task.instances[: counts[folder]]})
            atomic_write_text(directory / folder / f"{name}.json", json.dumps(cut.to_ni_v1()))
    catalogue = {name: name for name in world.known}
    broadness = {target: coverage(names[target], catalogue) for target in ("broad", "narrow")}
    return Targets(directory / "generalist", directory / "broad", directory / "narrow", world.model, broadness)


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Train both arms in every cell, on the same examples, and ask them about the target."""
    size = SIZES[scale]
    targets = make_targets(size, seed, directory)
    trials = directory.parents[1] / f"{scale}-tuning" / directory.name
    tried = targets if scale == "smoke" else make_targets(size, TUNING_SEED, trials)
    results: dict[tuple[str, str], Result] = {}
    items: dict[str, dict[str, list[float]]] = {arm: {} for arm in ARMS}
    arms: dict[str, dict[str, float]] = {arm: {} for arm in ARMS}
    notes = {}
    for cell in CELLS:
        for arm in ARMS:
            lr = LEARNING_RATES[0] if scale == "smoke" else _tuned(arm, TUNED_AS.get(cell, cell), size, tried, trials)
            notes[f"learning rate, {arm}, {cell}"] = str(lr)
            folder = directory / _folder(arm, cell)
            results[arm, cell] = execute(_recipe(size, arm, cell, targets, lr, seed), folder, resume=True)
            scored = json.loads((folder / "items.json").read_text(encoding="utf-8"))["eval/held_out/exact"]
            items[arm][cell] = scored["values"]
            arms[arm][cell] = results[arm, cell].metrics["eval/held_out/exact"]
    arms["both"] |= {
        f"generalist tasks, {cell}": results["both", cell].metrics["eval/generalist/exact"] for cell in CELLS
    }
    for cell, (target, n) in CELLS.items():
        at = targets.coverage[target]
        (row,) = gain_table([Cell(at, getattr(size, n), seed, arms["specialist"][cell], arms["both"][cell])])
        arms[cell] = {"gain": row.gain, "epochs": results["specialist", cell].metrics["epochs"]}
    learned = arms["specialist"]["narrow, many"]
    return Measured(
        arms=arms,
        items=items,
        data_fingerprint=results["both", "broad, few"].data["generalist"],
        unmet=[] if learned >= LEARNED else [f"with many examples the narrow specialist answers {learned:.0%}"],
        notes=notes,
    )


def _recipe(size: Size, arm: str, cell: str, targets: Targets, lr: float, seed: int) -> Recipe:
    target, n = CELLS[cell]
    data = {
        "model": str(targets.model),
        "specialist": str(targets.broad if target == "broad" else targets.narrow),
        "n_specialist": getattr(size, n),
        "asked_per_task": size.questions // (BROAD if target == "broad" else 1),
        **({"generalist": str(targets.generalist)} if arm == "both" else {}),
    }
    fixed = {
        "method": "specialist_generalist",
        "parts": ["definition"],
        "from_scratch": True,
        "seq_len": 64,
        "max_answer": 12,
        "max_input_tokens": 48,
        "optim": {"lr": lr, "warmup": 0.05},
        "fit": {"precision": "fp32"},
        "eval_at": [1.0],
        "seed": seed,
    }
    return load_recipe({**fixed, **size.fields, **data, **ARMS[arm]})


def _folder(arm: str, cell: str) -> str:
    return f"{arm}-{cell.replace(', ', '-')}"


def _tuned(arm: str, cell: str, size: Size, targets: Targets, trials: Path) -> float:
    """The learning rate with the lowest bits per byte of validation answers, in a world of its own; once per claim."""
    found = {}
    for lr in LEARNING_RATES:
        recipe = _recipe(size, arm, cell, targets, lr, TUNING_SEED)
        found[lr] = execute(recipe, trials / _folder(arm, cell) / f"lr-{lr:g}", resume=True).metrics["valid/bpb"]
    return min(found, key=found.__getitem__)


CLAIM = Claim(
    id="specialist_generalist",
    statement="Generalist instructions before a target's few examples raise its score at an equal budget where the "
    "target is broad, and raise it less where the target is narrow and has many examples.",
    source="Shi et al., arXiv:2310.15326: generalist instruction tuning helps a specialist when the target's coverage "
    "is broad, most of all with little data.",
    parts=(
        Part(
            "On a broad target with 60 examples it answers at least 10 points more exactly than the specialist alone",
            "broad, few",
            "both",
            "specialist",
            "higher",
            0.10,
            units="seeds and questions",
        ),
        Part(
            "That gain is larger than the gain on a narrow target with 2000 examples",
            "gain",
            "broad, few",
            "narrow, many",
            "higher",
            0.0,
        ),
        Part(
            "The gain on the broad target is larger with 60 examples than with 2000",
            "gain",
            "broad, few",
            "broad, many",
            "higher",
            0.0,
            decides=False,
        ),
        Part(
            "On the narrow target with 2000 examples it answers within 3 points of the specialist alone",
            "narrow, many",
            "both",
            "specialist",
            "higher",
            -0.03,
            units="seeds and questions",
            decides=False,
        ),
    ),
    rival="specialist",
    preconditions=(f"with 2000 examples the narrow specialist answers at least {LEARNED:.0%} exactly",),
    seeds={"smoke": (100,), "small": (100, 101, 102)},
    measure=measure,
)
