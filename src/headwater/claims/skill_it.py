"""Claim of Skill-it: where one skill is a prerequisite of the others, weighing by the skill graph beats equal shares.

A lookup world. Each of 1000 words is in one of eight classes. Skill 0 names a word's class; skills 1 to 7 name it in an
alphabet of their own, permuted, but documents of theirs exist for 6 % of the words only, the same for all of them, and
they are asked about other words: what these are can be learned from skill 0 alone. A document is skill, word and
answer, and the answer is what is learned. Both arms read 320 steps of 64 documents.

The graph is learned once, pairwise, on a world of another seed, by runs of 200 steps on a skill and 400 on a pair, with
edges weighed by what they gain, and is then given to every seed. Each arm chooses its learning rate from the same three
on that world too, by the answers about validation words; the questions are about words that are in no validation
document.

Fixed before the first run, by arithmetic: a document's targets are its answer and EOS, which costs nothing soon, so a
loss per target is half of what it is per answer, and eta is twice 0.05 for the same exponents; eight rounds of 40
steps, since six do not divide 320.

What was fixed by looking at short runs on a skill and a pair of skills: input and output embeddings are shared. Where
they were not, a dependent was learned by heart beside its prerequisite too, and there was no edge to find. On seed 0
the arms were seen once with a graph made by hand, .367 against .309 in favour of Skill-it; nothing was changed for it.

This is the second experiment. The first, on seeds 100 to 104, learned the graph by runs of 100 and 200 steps: too short
to master the prerequisite alone, so that every pair seemed to help it, and the mixture followed edges into it that are
not there. Skill-it gained -.017 [-.094, .061]. Now runs are twice as long, and no such edge is a precondition.

Reported beside: documents as they come, which here are 70 % of the prerequisite, because it has the most documents.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater.core.cache import atomic_write_text
from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.recipe import Recipe, load_recipe
from headwater.core.rng import numpy_generator
from headwater.core.run import Result, execute
from headwater.corpora.skill_graph import SkillGraph
from headwater.modalities.text.tiny import Size as Shape
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.tokenizers import word_tokenizer

__all__ = ["CLAIM", "World", "make_world"]

TUNING_SEED = 1000
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
CLASSES = 8
ROOT, *DEPENDENTS = SKILLS = tuple(f"skill{i}" for i in range(8))
ARMS: dict[str, dict[str, Any]] = {  # Any: recipe fields
    "skill-it": {"method": "skill_it", "eta": 0.1, "rounds": 8},
    "stratified": {"method": "stratified"},
    "random": {"method": "raw"},
}
NOT_AT_CHANCE, NOT_AT_CEILING = 0.2, 0.9


@dataclass(frozen=True)
class Size:
    """How large an experiment is.

    Attributes:
        words: all of them.
        shown: words that the dependent skills have documents of.
        validation: further words, whose documents steer and choose.
        hidden, layers, heads: of the model.
        steps: of each arm.
        graph_steps: of a run on one skill while the graph is learned.
        held_out: share of the documents that the family keeps for its own figures.
    """

    words: int
    shown: int
    validation: int
    hidden: int
    layers: int
    heads: int
    steps: int
    graph_steps: int
    held_out: float


SIZES: dict[Scale, Size] = {
    "smoke": Size(
        words=300, shown=60, validation=20, hidden=16, layers=1, heads=2, steps=8, graph_steps=2, held_out=0.1
    ),
    "small": Size(
        words=1000, shown=60, validation=200, hidden=64, layers=2, heads=4, steps=320, graph_steps=200, held_out=0.03
    ),
}


@dataclass(frozen=True)
class World:
    """Words and what they are.

    Attributes:
        documents: path of what there is to read, JSON lines with ``id``, ``text``, ``prompt`` and ``skill``.
        validation: the same of the validation words, in every skill.
        model: directory of an architecture whose tokens are the world's words.
        asked: words that are neither shown by dependents nor in ``validation``.
        answers: ``(words asked, skills)``, the word that each skill answers.
        valid, valid_answers: the same of validation words.
    """

    documents: Path
    validation: Path
    model: Path
    asked: list[str]
    answers: NDArray[np.str_]
    valid: list[str]
    valid_answers: NDArray[np.str_]


def make_world(size: Size, seed: int, directory: Path) -> World:
    """Draw classes and alphabets, and write the documents, a tokenizer of their words and an architecture."""
    rng = numpy_generator(seed, "lookup world")
    words = [f"w{i}" for i in range(size.words)]
    classes = rng.integers(CLASSES, size=size.words)
    letters = np.stack([rng.permutation(CLASSES) for _ in SKILLS])  # (skills, classes)
    answers = np.array([[f"a{s}n{letters[s, c]}" for s in range(len(SKILLS))] for c in classes])
    order = rng.permutation(size.words)
    shown, valid, asked = np.split(order, [size.shown, size.shown + size.validation])

    def document(word: int, s: int) -> dict[str, str]:
        prompt = f"{SKILLS[s]} {words[word]}"
        text = f"{prompt} {answers[word, s]}"
        return {"id": f"{SKILLS[s]}-{word}", "text": text, "prompt": prompt, "skill": SKILLS[s]}

    read = [document(word, 0) for word in range(size.words)]
    read += [document(word, s) for s in range(1, len(SKILLS)) for word in shown.tolist()]
    steering = [document(word, s) for s in range(len(SKILLS)) for word in valid.tolist()]
    files = {"documents": read, "validation": steering}
    for name, documents in files.items():
        atomic_write_text(directory / f"{name}.jsonl", "".join(json.dumps(d) + "\n" for d in documents))
    model = directory / "architecture"
    tokenizer = word_tokenizer(d["text"] for documents in files.values() for d in documents)
    shape = Shape(hidden=size.hidden, layers=size.layers, heads=size.heads, mlp=172 * size.hidden // 64)
    tiny_llama(tokenizer, **shape, context=16, generator_seed=0).save_pretrained(model)
    tokenizer.save_pretrained(model)
    return World(
        directory / "documents.jsonl",
        directory / "validation.jsonl",
        model,
        [words[i] for i in asked],
        answers[asked],
        [words[i] for i in valid],
        answers[valid],
    )


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Train the arms on one world, each at the learning rate that its own trials chose, and question them."""
    size = SIZES[scale]
    graph = _graph(scale, directory)
    world = make_world(size, seed, directory)
    results: dict[str, Result] = {}
    right: dict[str, NDArray[np.float64]] = {}
    notes = {}
    for arm in ARMS:
        lr = LEARNING_RATES[1] if scale == "smoke" else _tuned(arm, scale, graph, directory)
        notes[f"learning rate, {arm}"] = str(lr)
        results[arm] = execute(_recipe(size, arm, world, lr, seed, graph), directory / arm, resume=True)
        right[arm] = _right(directory / arm / "model", world.asked, world.answers)
    accuracy = {arm: float(values.mean()) for arm, values in right.items()}
    edges = SkillGraph.load(graph).adjacency
    notes["edges from the prerequisite"] = ", ".join(f"{weight:.2f}" for weight in edges[0, 1:])
    notes["mean edge into the prerequisite"] = f"{edges[1:, 0].mean():.2f}"
    notes["mean edge between dependents"] = f"{(edges[1:, 1:].sum() - 7) / 42:.2f}"
    unmet = []
    if scale != "smoke" and not (edges[0, 1:] > 0).all():
        unmet.append("the graph that was learned lacks an edge from the prerequisite to a dependent")
    if scale != "smoke" and (edges[1:, 0] > 0).any():
        unmet.append(f"the graph that was learned has {(edges[1:, 0] > 0).sum()} edges into the prerequisite")
    if not NOT_AT_CHANCE <= accuracy["stratified"] <= NOT_AT_CEILING:
        unmet.append(f"with equal shares {accuracy['stratified']:.0%} of the answers are right")
    return Measured(
        arms={
            arm: {
                "accuracy": accuracy[arm],
                "accuracy of the prerequisite": float(right[arm][:, 0].mean()),
                "accuracy of the dependents": float(right[arm][:, 1:].mean()),
                "epochs": results[arm].metrics["epochs"],
            }
            for arm in ARMS
        },
        items={arm: {"accuracy": values.ravel().tolist()} for arm, values in right.items()},
        data_fingerprint=results["stratified"].data["sources.world"],
        unmet=unmet,
        notes=notes,
    )


def _right(model: Path, words: list[str], answers: NDArray[np.str_]) -> NDArray[np.float64]:
    """Whether the greedy answer is the right one, ``(words, skills)``."""
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    found = np.empty(answers.shape)
    for s, skill in enumerate(SKILLS):
        ids = [[tokenizer.eos_token_id, *tokenizer(f"{skill} {word}")["input_ids"]] for word in words]
        with torch.inference_mode():
            answered = lm(input_ids=torch.tensor(ids)).logits[:, -1].argmax(dim=1).numpy()
        found[:, s] = answered == np.array(tokenizer.convert_tokens_to_ids(answers[:, s].tolist()))
    return found


def _recipe(size: Size, arm: str, world: World, lr: float, seed: int, graph: Path | dict[str, Any]) -> Recipe:
    fields: dict[str, Any] = {**ARMS[arm]}  # Any: recipe fields
    if fields["method"] != "raw":
        fields |= {"skill_field": "skill"}
    if fields["method"] == "skill_it":
        fields |= {"validation": str(world.validation), "graph": graph if isinstance(graph, dict) else str(graph)}
    return load_recipe(
        {
            **fields,
            "model": str(world.model),
            "sources": {"world": str(world.documents)},
            "held_out": size.held_out,
            "seq_len": 10,  # two documents of start, skill, word, answer, end
            "batch_tokens": 320,
            "budget": {"tokens": 320 * size.steps},
            "optim": {"lr": lr, "schedule": "constant"},
            "eval_at": [1.0],
            "fit": {"precision": "fp32"},
            "seed": seed,
        }
    )


def _trials(scale: Scale, directory: Path) -> Path:
    return directory.parents[1] / f"{scale}-tuning" / directory.name


def _graph(scale: Scale, directory: Path) -> Path:
    """The graph, learned once per claim on the tuning world."""
    size, trials = SIZES[scale], _trials(scale, directory)
    world = make_world(size, TUNING_SEED, trials)
    mode = "single" if scale == "smoke" else "pairwise"
    learned = {"steps": size.graph_steps, "mode": mode, "weight": "relative"}
    execute(_recipe(size, "skill-it", world, LEARNING_RATES[1], TUNING_SEED, learned), trials / "graph", resume=True)
    return trials / "graph" / "graph.npz"


def _tuned(arm: str, scale: Scale, graph: Path, directory: Path) -> float:
    """The learning rate whose answers about validation words are right most often; run once per claim."""
    size, trials = SIZES[scale], _trials(scale, directory)
    world = make_world(size, TUNING_SEED, trials)
    found = {}
    for lr in LEARNING_RATES:
        place = trials / arm / f"lr-{lr:g}"
        execute(_recipe(size, arm, world, lr, TUNING_SEED, graph), place, resume=True)
        found[lr] = float(_right(place / "model", world.valid, world.valid_answers).mean())
    return max(found, key=found.__getitem__)


CLAIM = Claim(
    id="skill_it",
    statement="Where one skill is a prerequisite of seven others, a mixture that follows the learned skill graph and "
    "the losses answers more questions than equal shares do, after the same number of documents.",
    source="Chen et al., arXiv:2307.14430: on LEGO 36.5 points of accuracy over random selection; on Natural "
    "Instructions a validation loss 13.6 % lower than with the target's data alone.",
    parts=(
        Part(
            "Over all eight skills at least 5 points more of the answers are right than with equal shares",
            "accuracy",
            "skill-it",
            "stratified",
            "higher",
            0.05,
            units="seeds and questions",
        ),
        Part(
            "More of the answers are right than with documents as they come",
            "accuracy",
            "skill-it",
            "random",
            "higher",
            0.0,
            units="seeds and questions",
            decides=False,
        ),
    ),
    rival="stratified",
    preconditions=(
        "the graph has an edge from the prerequisite to every dependent skill, and none into it",
        f"with equal shares between {NOT_AT_CHANCE:.0%} and {NOT_AT_CEILING:.0%} of the answers are right",
    ),
    seeds={"smoke": (200,), "small": (200, 201, 202, 203, 204)},
    measure=measure,
)
