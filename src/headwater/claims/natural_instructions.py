"""The claim of Natural Instructions, as an experiment on a world of tasks with exact answers.

A task is a pair of an opening and a closing, eight of each, of two words. An input is a value of two words; its
answer is the opening of the task, the value, its closing. The definition names opening and closing in a sentence;
things to avoid and emphasis name others, to distract whoever reads them; two examples are solved. Sixteen tasks are
held out, two of every opening and of every closing: each is known from six other tasks, what is new is the pair.

The treatment reads the definition before the input, the baseline reads the input alone, and a third arm reads the two
solved examples. All have the same instances, the same number of input tokens, a model of two layers of 64 made anew,
and choose their learning rate from the same three on a seed of its own, by the bits per byte of answers on seen tasks.
Asked are inputs that no task was read with. Reported beside: what the most frequent answer would score, the accuracy on
seen tasks, and a fourth arm that reads the distracting fields behind the definition.

An input has two words, where the specification has one value of twenty: so that the sides of the split do not share
inputs, which the stage refuses where nothing but the input is read. Fixed by a pilot on seed 0, for time alone: 120
instances of a task and 10 questions on each that is held out, where 200 and 20 were written first, and a fourth arm of
the definition and two fields where all six parts were. The pilot showed that the model learns seen tasks from
definitions within the 400 steps, and not yet from solved examples, whose inputs are three times as long.

A first small run was stopped after its first seed, 100, since the precondition could no longer be met: three rates up
to 1.2e-2 all solved the world that they were chosen in, a difference of 1e-5 bits chose the highest, and with it the
model learned no task of seed 100. 1.2e-2 had failed in a pilot on seed 0 as well. The rates were halved, nothing else
was changed, and the claim is judged on seeds that the first run did not touch.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwater.core.cache import atomic_write_text
from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.recipe import Recipe, load_recipe
from headwater.core.rng import numpy_generator
from headwater.core.run import Result, execute
from headwater.modalities.text.instructions import PARTS, Instance, Instruction, InstructionPart, TaskExample
from headwater.modalities.text.tiny import Size as Shape
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.tokenizers import word_tokenizer

__all__ = ["CLAIM", "World", "make_world"]

TUNING_SEED = 1000
LEARNING_RATES = (1.5e-3, 3e-3, 6e-3)
LEARNED = 0.9
KINDS = 8
HELD_PER_OPENING = 2
ARMS: dict[str, tuple[InstructionPart, ...]] = {
    "definition": ("definition",),
    "none": (),
    "positive": ("positive",),
    "distracted": ("definition", "avoid", "emphasis"),
}


@dataclass(frozen=True)
class Size:
    """How large an experiment is.

    Attributes:
        words: that values are made of.
        instances: of a task.
        hidden, layers, heads: of the model.
        fields: of every recipe.
    """

    words: int
    instances: int
    hidden: int
    layers: int
    heads: int
    fields: dict[str, Any]  # Any: recipe fields


SIZES: dict[Scale, Size] = {
    "smoke": Size(
        words=12,
        instances=24,
        hidden=16,
        layers=1,
        heads=2,
        fields={"asked_per_task": 2, "batch_tokens": 512, "budget": {"steps": 8}},
    ),
    "small": Size(
        words=60,
        instances=120,
        hidden=64,
        layers=2,
        heads=4,
        fields={"asked_per_task": 10, "batch_tokens": 1_280, "budget": {"steps": 400}},
    ),
}


@dataclass(frozen=True)
class World:
    """Where a world is, and what its tasks are.

    Attributes:
        tasks: folder of one file per task, as Natural Instructions has them.
        model: directory of an architecture whose tokens are the world's words.
        held: names of the tasks that are held out.
        known: all tasks, by name.
    """

    tasks: Path
    model: Path
    held: tuple[str, ...]
    known: dict[str, Instruction]


def make_world(size: Size, seed: int, directory: Path) -> World:
    """Draw the words, write the tasks, a tokenizer and an architecture."""
    rng = numpy_generator(seed, "instruction world")
    syllables = [onset + vowel for onset in "bdfghklmnprstvz" for vowel in "aeiou"]
    drawn = rng.choice([a + b for a in syllables for b in syllables], size.words + 4 * KINDS, replace=False).tolist()
    frames = [(drawn[2 * i], drawn[2 * i + 1]) for i in range(2 * KINDS)]
    words = drawn[4 * KINDS :]
    names = [f"{letter}{number}" for letter in "uw" for number in range(KINDS)]
    lexicon = dict(zip(names, frames, strict=True))
    order = rng.permutation(KINDS)
    held = {(a, int(order[(a + shift) % KINDS])) for a in range(KINDS) for shift in range(HELD_PER_OPENING)}
    known = {}
    for a in range(KINDS):
        for b in range(KINDS):
            opening, closing = names[a], names[KINDS + b]
            shifts = 1 + rng.integers(KINDS - 1, size=2)
            others = (names[(a + shifts[0]) % KINDS], names[KINDS + (b + shifts[1]) % KINDS])
            places = rng.choice(size.words**2, size.instances + 2, replace=False).tolist()
            values = [f"{words[place // size.words]} {words[place % size.words]}" for place in places]
            task = _task(f"{opening}-{closing}", lexicon, (opening, closing), others, values)
            known[task.name] = task
    tasks, model = directory / "tasks", directory / "architecture"
    for name, task in known.items():
        atomic_write_text(tasks / f"{name}.json", json.dumps(task.to_ni_v1()))
    texts = [text for task in known.values() for _, text in task.blocks(PARTS)]
    tokenizer = word_tokenizer([*texts, " ".join(drawn), "input: output:"])
    shape = Shape(hidden=size.hidden, layers=size.layers, heads=size.heads, mlp=172 * size.hidden // 64)
    tiny_llama(tokenizer, **shape, context=256, tie=False, generator_seed=0).save_pretrained(model)
    tokenizer.save_pretrained(model)
    return World(tasks, model, tuple(f"{names[a]}-{names[KINDS + b]}" for a, b in sorted(held)), known)


def _task(
    name: str,
    lexicon: dict[str, tuple[str, str]],
    kinds: tuple[str, str],
    others: tuple[str, str],
    values: list[str],
) -> Instruction:
    def answer(value: str, opening: str, closing: str) -> str:
        return " ".join((*lexicon[opening], value, *lexicon[closing]))

    examples = [TaskExample(input=value, output=answer(value, *kinds)) for value in values[:2]]
    return Instruction(
        name=name,
        definition=f"write the opening {kinds[0]} then the value then the closing {kinds[1]}",
        things_to_avoid=f"not the opening {others[0]}",
        emphasis_and_caution=f"the closing {others[1]} is for others",
        positive_examples=tuple(examples),
        instances=tuple(Instance(input=value, output=(answer(value, *kinds),)) for value in values[2:]),
        categories=(kinds[0],),
        sources=("world",),
    )


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Train every arm on one world, each at the learning rate that its own trials chose."""
    size = SIZES[scale]
    world = make_world(size, seed, directory)
    results: dict[str, Result] = {}
    notes = {}
    for arm in ARMS:
        lr = LEARNING_RATES[0] if scale == "smoke" else _tuned(arm, scale, directory)
        notes[f"learning rate, {arm}"] = str(lr)
        results[arm] = execute(_recipe(size, arm, world, lr, seed), directory / _folder(arm), resume=True)
    arms = {
        arm: {
            "unseen tasks": result.metrics["eval/held_out/exact"],
            "unseen tasks, ROUGE-L": result.metrics["eval/held_out/rouge_l"],
            "seen tasks": result.metrics["valid/exact"],
            "epochs": result.metrics["epochs"],
        }
        for arm, result in results.items()
    }
    arms["majority answer"] = {"unseen tasks": _majority(world)}
    items = {arm: json.loads((directory / _folder(arm) / "items.json").read_text(encoding="utf-8")) for arm in results}
    seen = arms["definition"]["seen tasks"]
    return Measured(
        arms=arms,
        items={arm: {"unseen tasks": found["eval/held_out/exact"]["values"]} for arm, found in items.items()},
        data_fingerprint=results["definition"].data["tasks"],
        unmet=[] if seen >= LEARNED else [f"with the definition, {seen:.0%} of the answers on seen tasks are right"],
        notes=notes,
    )


def _majority(world: World) -> float:
    """What the most frequent answer of the seen tasks scores on the held-out ones."""
    seen: Counter[str] = Counter()
    for name, task in world.known.items():
        if name not in world.held:
            seen.update(instance.references[0] for instance in task.instances)
    most = seen.most_common(1)[0][0]
    asked = [i.references[0] for name in world.held for i in world.known[name].instances]
    return sum(answer == most for answer in asked) / len(asked)


def _recipe(size: Size, arm: str, world: World, lr: float, seed: int) -> Recipe:
    data = {"model": str(world.model), "tasks": str(world.tasks), "split": "task", "held": list(world.held)}
    fixed = {
        "method": "natural_instructions",
        "parts": list(ARMS[arm]),
        "from_scratch": True,
        "seq_len": 128,
        "max_answer": 12,
        "max_input_tokens": 110,
        "optim": {"lr": lr, "warmup": 0.05},
        "fit": {"precision": "fp32"},
        "eval_at": [1.0],
        "seed": seed,
    }
    return load_recipe({**fixed, **size.fields, **data})


def _folder(arm: str) -> str:
    return arm.replace(" ", "-")


def _tuned(arm: str, scale: Scale, directory: Path) -> float:
    """The learning rate with the lowest bits per byte on seen tasks, in a world of its own; run once per claim."""
    trials = directory.parents[1] / f"{scale}-tuning" / directory.name
    world = make_world(SIZES[scale], TUNING_SEED, trials)
    found = {}
    for lr in LEARNING_RATES:
        recipe = _recipe(SIZES[scale], arm, world, lr, TUNING_SEED)
        found[lr] = execute(recipe, trials / _folder(arm) / f"lr-{lr:g}", resume=True).metrics["valid/bpb"]
    return min(found, key=found.__getitem__)


CLAIM = Claim(
    id="natural_instructions",
    statement="A model that reads a task's definition before the input does tasks that it never saw, which a model "
    "trained on the same instances without instructions does not, at equal input tokens.",
    source="Mishra et al., arXiv:2104.08773: instructions raise the ROUGE-L of BART on unseen tasks by 19 % over no "
    "instruction; more seen tasks raise it further.",
    parts=(
        Part(
            "With the definition it answers at least 30 points more of the inputs of unseen tasks exactly than "
            "without instruction",
            "unseen tasks",
            "definition",
            "none",
            "higher",
            0.30,
            units="seeds and questions",
        ),
        Part(
            "Two solved examples do more than no instruction",
            "unseen tasks",
            "positive",
            "none",
            "higher",
            0.0,
            units="seeds and questions",
            decides=False,
        ),
        Part(
            "The definition does more than no instruction where other fields name other openings and closings as well",
            "unseen tasks",
            "distracted",
            "none",
            "higher",
            0.0,
            units="seeds and questions",
            decides=False,
        ),
    ),
    rival="none",
    preconditions=(f"with the definition, at least {LEARNED:.0%} of the answers on seen tasks are right",),
    seeds={"smoke": (100,), "small": (103, 104, 105)},
    measure=measure,
)
