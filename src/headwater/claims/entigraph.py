"""Does a model answer from every side what one document says from one side, if it reads texts about its entities?

Small scale: every person has a city and a trade of their own. Of 40 general people the base model has read
everything: documents, retellings, relations in all six directions, and questions with answers. Of each of 20 new people
there is one document, "P lives in C and works as J". Three arms go on from the base, for equal tokens and with 10 % of
general text: the documents themselves (raw), retellings of them that name the three in the same order (rephrase), and
what EntiGraph's own functions make of them (entigraph). The generator is a script that is told nothing but the prompt:
it finds the document and the names in it, as a language model would have to. Then all three are asked, closed book, for
each of the three things given each of the others. Every arm chooses its learning rate from the same three in a world of
its own seed, by the answers to that world's questions, which no verdict reads.

Texts that the family keeps apart, and which choose nothing here, are documents of further people.

The forms in which arms read are all known to the base from general people, so none is new to one arm alone.

Looked at beforehand, on seed 0 and at the middle rate: the base answers all questions about general people, and the
arms 78 % (entigraph), 23 % (raw) and 32 % (rephrase) of those about new ones. Nothing was changed after that.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count, permutations
from pathlib import Path
from typing import Any

from headwater.core.cache import atomic_write_text
from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.recipe import load_recipe
from headwater.core.rng import derive_seed, numpy_generator
from headwater.core.run import Result, execute
from headwater.corpora.entigraph import RelationPlan, extract_entities, rephrase, synthesize
from headwater.modalities.text.docs import Document, split_sides
from headwater.modalities.text.generate import Message, ScriptedGenerator
from headwater.modalities.text.prepared import split_shares
from headwater.modalities.text.tiny import Size as Shape
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.tokenizers import word_tokenizer

__all__ = ["CLAIM", "Person", "World", "make_world", "scripted"]

TUNING_SEED = 1000
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
BASE_RATE = 3e-3
KNOWN = 0.8
HELD_OUT = 0.1
ARMS = ("entigraph", "raw", "rephrase")

SOURCE = "{person} lives in {city} and works as {trade}"
RETOLD = (
    "{person} has a house in {city} and is {trade} by trade",
    "{person} settled in {city} long ago and serves as {trade}",
    "we know {person} from {city} and as a good {trade}",
    "they say {person} stays in {city} and earns money as {trade}",
)
RELATIONS = {
    ("person", "city"): "{person} lives in {city}",
    ("city", "person"): "{city} is the home of {person}",
    ("person", "trade"): "{person} works as {trade}",
    ("trade", "person"): "{trade} is the work of {person}",
    ("city", "trade"): "{city} is served by its {trade}",
    ("trade", "city"): "{trade} is what they do in {city}",
}
QUESTION = "ask for the {asked} of {given} :"


@dataclass(frozen=True)
class Person:
    """Somebody, and what is true of them."""

    person: str
    city: str
    trade: str

    def say(self, template: str) -> str:
        """A sentence about them."""
        return template.format(person=self.person, city=self.city, trade=self.trade)

    def questions(self) -> list[tuple[str, str]]:
        """Question and answer for each direction, in the order of ``RELATIONS``."""
        return [(QUESTION.format(asked=b, given=getattr(self, a)), getattr(self, b)) for a, b in RELATIONS]


@dataclass(frozen=True)
class Size:
    """How large an experiment is.

    Attributes:
        general, new, apart: people.
        shape: of the model.
        base, arm: fields of the recipes.
    """

    general: int
    new: int
    apart: int
    shape: Shape
    base: dict[str, Any]  # Any: recipe fields
    arm: dict[str, Any]


_ROWS = {"seq_len": 48, "batch_tokens": 1_152, "packing": "document", "max_answer": 4, "held_out": HELD_OUT}
SIZES: dict[Scale, Size] = {
    "smoke": Size(
        general=6,
        new=4,
        apart=30,
        shape=Shape(hidden=16, layers=1, heads=2, mlp=32),
        base={**_ROWS, "budget": {"tokens": 11_520}},
        arm={**_ROWS, "budget": {"tokens": 5_760}},
    ),
    "small": Size(
        general=40,
        new=20,
        apart=30,
        shape=Shape(hidden=64, layers=2, heads=4, mlp=172),
        base={**_ROWS, "budget": {"tokens": 1_036_800}},
        arm={**_ROWS, "budget": {"tokens": 172_800}},
    ),
}


@dataclass(frozen=True)
class World:
    """People, and the files about them.

    Attributes:
        general, new: people.
        directory: ``general.jsonl``, ``new.jsonl`` with texts; ``ask-general.jsonl``, ``ask-new.jsonl`` with questions;
            ``architecture`` of a model whose tokens are the world's words.
    """

    general: list[Person]
    new: list[Person]
    directory: Path


def make_world(size: Size, seed: int, directory: Path) -> World:
    """Draw people and write the files."""
    rng = numpy_generator(seed, "people")
    syllables = [onset + vowel for onset in "bdfghklmnprstvz" for vowel in "aeiou"]
    words = [first + second for first in syllables for second in syllables]
    total = size.general + size.new + size.apart
    drawn = rng.choice(words, 3 * total, replace=False).tolist()
    people = [Person(f"{p}o", f"{c}burg", f"{t}er") for p, c, t in zip(*[iter(drawn)] * 3, strict=True)]
    general, new = people[: size.general], people[size.general : size.general + size.new]
    apart = [person.say(SOURCE) for person in people[size.general + size.new :]]
    told = [text for person in general for text in _everything(person, seed)]
    write_texts(told, apart, directory / "general.jsonl")
    write_texts([person.say(SOURCE) for person in new], apart, directory / "new.jsonl")
    for name, asked in (("general", general), ("new", new)):
        rows = [{"text": question, "label": answer} for p in asked for question, answer in p.questions()]
        _write_rows(rows, directory / f"ask-{name}.jsonl")
    tokenizer = word_tokenizer([text for person in people for text in _everything(person, seed)])
    model = tiny_llama(tokenizer, **size.shape, context=64, tie=False, generator_seed=0)
    model.save_pretrained(directory / "architecture")
    tokenizer.save_pretrained(directory / "architecture")
    return World(general, new, directory)


def _everything(person: Person, seed: int) -> list[str]:
    """All that can be read of somebody: each form that an arm reads, and questions with answers."""
    names = [(kind, getattr(person, kind)) for kind in ("person", "city", "trade")]
    rng = random.Random(derive_seed(seed, "told", person.person))
    relations = [_related(person, list(kinds)) for size in (2, 3) for kinds in permutations(dict(names), size)]
    rng.shuffle(relations)
    retold = [person.say(template) for template in (SOURCE, *RETOLD)]
    return [*retold, *relations, *(f"{question} {answer}" for question, answer in person.questions())]


def _related(person: Person, kinds: Sequence[str]) -> str:
    """A text that takes each of two or three things in turn and says what it has to do with the next."""
    following = [*kinds[1:], kinds[0]]
    return " . ".join(person.say(RELATIONS[pair]) for pair in zip(kinds, following, strict=True))


def write_texts(read: Iterable[str], apart: Iterable[str], path: Path) -> None:
    """Write texts to be read, and some to be kept apart, under ids that the family's split sends there."""
    shares = split_shares(HELD_OUT)
    numbers = count()

    def placed(sides: Sequence[int]) -> str:
        return next(i for i in map(str, numbers) if split_sides([i], shares)[0] in sides)

    rows = [{"id": placed((0,)), "text": text} for text in read]
    rows += [{"id": placed((2,) if n % 6 else (1,)), "text": text} for n, text in enumerate(apart)]
    _write_rows(rows, path)


def _write_rows(rows: Iterable[dict[str, str]], path: Path) -> None:
    atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


# -- the generator


def scripted() -> ScriptedGenerator:
    """A generator that reads its prompt: it knows English sentences of this world, and nobody in it."""
    styles = {f"rephrase {style}": _retell for style in ("easy", "medium", "hard")}
    return ScriptedGenerator({"extract": _extract, "relate": _relate, **styles}, id="fact world")


def _person(messages: Sequence[Message]) -> Person:
    """Whom the document in a prompt is about."""
    pattern = re.compile(SOURCE.format(person=r"(\w+)", city=r"(\w+)", trade=r"(\w+)"))
    found = pattern.search(messages[-1].content)
    assert found, "the prompt shows the document"
    return Person(*found.groups())


def _extract(messages: Sequence[Message], rng: random.Random) -> str:
    person = _person(messages)
    return json.dumps({"summary": person.say(SOURCE), "entities": [person.person, person.city, person.trade]})


def _relate(messages: Sequence[Message], rng: random.Random) -> str:
    person = _person(messages)
    kinds = {person.person: "person", person.city: "city", person.trade: "trade"}
    chosen = [kinds[name] for name in re.findall(r"^- (\w+)$", messages[-1].content, re.M)]
    rng.shuffle(chosen)
    return _related(person, chosen)


def _retell(messages: Sequence[Message], rng: random.Random) -> str:
    return _person(messages).say(rng.choice(RETOLD))


def _write_arm(arm: str, world: World, seed: int) -> Path:
    """What an arm reads of the new people."""
    directory = world.directory / f"texts-{arm}"
    documents = [Document(person.person, person.say(SOURCE)) for person in world.new]
    generator = scripted()
    if arm == "entigraph":
        lists = extract_entities(generator, documents)
        plans = [RelationPlan(found.entities, seed=seed) for found in lists]
        synthesize(generator, documents, plans, directory)
        return directory / "synthetic"
    texts = [w.document for w in rephrase(generator, documents, samples=4)] if arm == "rephrase" else documents
    _write_rows([{"id": text.id, "text": text.text} for text in texts], directory / "texts.jsonl")
    return directory


# -- the experiment


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Train the base and the three arms in one world, and ask for the new people."""
    size = SIZES[scale]
    world = make_world(size, seed, directory)
    base = _base(size, world, seed)
    notes: dict[str, str] = {}
    results: dict[str, Result] = {}
    right: dict[str, list[float]] = {}
    for arm in ARMS:
        lr = LEARNING_RATES[1] if scale == "smoke" else _tuned(arm, scale, directory)
        notes[f"learning rate, {arm}"] = str(lr)
        results[arm], right[arm] = _trained(size, arm, world, lr, seed)
    known = base.metrics["eval/general/exact"]
    better = max(("raw", "rephrase"), key=lambda arm: sum(right[arm]))
    notes[f"better baseline, seed {seed}"] = better
    right["better baseline"] = right[better]
    arms = {arm: _by_direction(values) for arm, values in right.items()}
    for arm, result in results.items():
        arms[arm] |= {"general": result.metrics["eval/general/exact"], "epochs": result.metrics["epochs"]}
    return Measured(
        arms=arms | {"base": {"general": known}},
        items={arm: {"answers": values} for arm, values in right.items()},
        data_fingerprint=results["raw"].data["sources.new"],
        unmet=[] if known >= KNOWN else [f"the base answers {known:.0%} of the questions about general people"],
        notes=notes,
    )


def _base(size: Size, world: World, seed: int) -> Result:
    fields = {
        "method": "raw",
        "model": str(world.directory / "architecture"),
        "sources": {"general": str(world.directory / "general.jsonl")},
        "questions": {"general": str(world.directory / "ask-general.jsonl")},
        "optim": {"lr": BASE_RATE, "warmup": 0.05},
    }
    return execute(load_recipe({**_shared(seed), **size.base, **fields}), world.directory / "base", resume=True)


def _shared(seed: int) -> dict[str, Any]:  # Any: recipe fields
    return {"fit": {"precision": "fp32"}, "eval_at": [1.0], "eval_chars": 2_000, "seed": seed}


def _trained(size: Size, arm: str, world: World, lr: float, seed: int) -> tuple[Result, list[float]]:
    """An arm's run, and for each question about new people, person by person, whether it was answered."""
    fields = {
        "method": "entigraph",
        "model": str(world.directory / "base" / "model"),
        "sources": {"new": str(world.directory / "new.jsonl")},
        "synthetic": str(_write_arm(arm, world, seed)),
        "replay": str(world.directory / "general.jsonl"),
        "questions": {name: str(world.directory / f"ask-{name}.jsonl") for name in ("general", "new")},
        "optim": {"lr": lr, "warmup": 0.05},
    }
    recipe = load_recipe({**_shared(seed), **size.arm, **fields})
    directory = world.directory / f"{arm}-{lr:g}"
    result = execute(recipe, directory, resume=True)
    items = json.loads((directory / "items.json").read_text(encoding="utf-8"))
    return result, items["eval/new/exact"]["values"]


def _by_direction(right: Sequence[float]) -> dict[str, float]:
    """Shares of right answers: of all, and for each direction."""
    found = {"answers": sum(right) / len(right)}
    for number, (given, asked) in enumerate(RELATIONS):
        own = right[number :: len(RELATIONS)]
        found[f"{given} to {asked}"] = sum(own) / len(own)
    return found


def _tuned(arm: str, scale: Scale, directory: Path) -> float:
    """The learning rate with the most right answers in a world of its own; run once per claim."""
    size, place = SIZES[scale], directory.parents[1] / f"{scale}-tuning" / directory.name
    world = make_world(size, TUNING_SEED, place)
    _base(size, world, TUNING_SEED)
    found = {}
    for lr in LEARNING_RATES:
        result, _ = _trained(size, arm, world, lr, TUNING_SEED)
        found[lr] = result.metrics["eval/new/exact"], -result.metrics["eval/new/bpb"]
    return max(found, key=found.__getitem__)


CLAIM = Claim(
    id="entigraph",
    statement="A model that reads texts about the pairs and triples of a document's entities answers, closed book, "
    "more questions about it than one that reads the document or retellings of it, at equal tokens.",
    source="Yang et al., arXiv:2409.07431: closed-book accuracy on QuALITY rises from 39.5 % to 56.2 % with 455 "
    "million synthetic tokens, beyond raw documents and paraphrases of them.",
    parts=(
        Part(
            "Over all six directions it answers at least 20 points more of the questions about new people than reading "
            "the documents or retellings of them, whichever is better",
            "answers",
            "entigraph",
            "better baseline",
            "higher",
            0.20,
            units="seeds and questions",
        ),
        Part(
            "Given the city it names the person more often by 20 points than after reading the documents",
            "city to person",
            "entigraph",
            "raw",
            "higher",
            0.20,
            decides=False,
        ),
        Part(
            "Given the person it names the city at most 10 points less often than after reading the documents",
            "person to city",
            "entigraph",
            "raw",
            "higher",
            -0.10,
            decides=False,
        ),
        Part(
            "With 10 % of general text it answers at most 5 points fewer of the questions about general people than "
            "the base did",
            "general",
            "entigraph",
            "base",
            "higher",
            -0.05,
            decides=False,
        ),
    ),
    rival="better baseline",
    preconditions=(f"the base answers at least {KNOWN:.0%} of the questions about general people",),
    seeds={"smoke": (100,), "small": (100, 101, 102)},
    measure=measure,
)
