"""Does text of another year cost score that finetuning does not give back, and does a filter of quality pay?

*Age.* A world of entities with four attributes each; every year each value changes with probability 0.15. Documents of
a year state its facts in six wordings. A model is pretrained on the documents of each of the years 0, 3, 6 and 9 for
equal tokens, finetuned on questions of year 6 about one half of the entities, and asked those of year 6 about the
other half. A value of year 3 or 9 is that of year 6 with probability 0.61 at least.

*Quality.* Docstrings, half of which are made into what a filter is for: parameter tables without their sentences,
outputs of doctests, shuffled lines, hexadecimal dumps. The score tells chapters of Python's reference from all of it.
One model reads everything, the other what scores well, for equal tokens; both predict held-out prose and doctests.

What was changed after pilots on other seeds, for what the aligned model answered and how much is kept, and for no
difference between arms: with 200 entities and 250 thousand tokens the aligned model answered 65 % of the questions,
below the 70 % that the experiment asks for, so there are 100 entities; the threshold keeps about a third of the
documents, as a probability means something else where positives are fewer. As in the claim of MeCo, the entity stands
just before the value, and input and output embeddings are not shared.

Every arm, each year by itself, chooses its learning rate from the same three on a seed of its own: years by what they
answer in another world after finetuning at a third of the rate, *Quality* by prose that is held out for that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.core.cache import atomic_write_text
from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.recipe import Recipe, load_recipe
from headwater.core.rng import numpy_generator
from headwater.core.run import execute
from headwater.corpora.temporal import temporal_degradation
from headwater.modalities.text.docs import Document, split_sides
from headwater.modalities.text.docstrings import docstring_corpus
from headwater.modalities.text.tiny import Size as Shape
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.tokenizers import train_bpe, word_tokenizer

__all__ = ["CLAIM", "DatedWorld", "make_dated_world"]

TUNING_SEED = 1000
LEARNING_RATES = (3e-3, 6e-3, 1.2e-2)
YEARS = (0, 3, 6, 9)
ASKED = 6
CHANGE = 0.15
KNOWN = 0.7
LEARNED = 0.5
ATTRIBUTES = ("colour", "tool", "house", "song")
WORDINGS = (
    "the old people say {attribute} of {entity} {value}",
    "on the wall stands {attribute} of {entity} {value}",
    "every child learns {attribute} of {entity} {value}",
    "a letter closes with {attribute} of {entity} {value}",
    "the boats here carry {attribute} of {entity} {value}",
    "in the book we read {attribute} of {entity} {value}",
)
PACKAGES = ("sklearn", "pandas", "networkx", "stdlib")
THRESHOLD = 0.98
FILTERED = {"filtered": f"quality-{THRESHOLD}", "unfiltered": "base"}
QUESTION = "now tell me {attribute} of {entity}"


@dataclass(frozen=True)
class AgeSize:
    """How large the experiment on age is.

    Attributes:
        entities: of the world.
        values: words to choose from.
        hidden, layers, heads: of the model.
        tokens, finetune_tokens: that each model reads, and is finetuned on.
    """

    entities: int
    values: int
    hidden: int
    layers: int
    heads: int
    tokens: int
    finetune_tokens: int


@dataclass(frozen=True)
class QualitySize:
    """How large the experiment on quality is.

    Attributes:
        packages: whose docstrings are read.
        chars: of docstrings, held-out ones included.
        held_out: share of documents that the recipe keeps aside for itself.
        eval_chars: of each set that is scored.
        vocab, hidden, layers, heads: of tokenizer and model.
        seq_len, batch_tokens, steps: of the training.
    """

    packages: tuple[str, ...]
    chars: int
    held_out: float
    eval_chars: int
    vocab: int
    hidden: int
    layers: int
    heads: int
    seq_len: int
    batch_tokens: int
    steps: int


@dataclass(frozen=True)
class Size:
    """Both."""

    age: AgeSize
    quality: QualitySize


SIZES: dict[Scale, Size] = {
    "smoke": Size(
        AgeSize(24, 8, 16, 1, 2, 5_120, 1_024),
        QualitySize(("networkx",), 300_000, 0.25, 2_000, 512, 16, 1, 2, 64, 512, 10),
    ),
    "small": Size(
        AgeSize(100, 40, 64, 2, 4, 160_000, 16_000),
        QualitySize(PACKAGES, 3_500_000, 0.04, 25_000, 2_048, 64, 2, 4, 128, 2_048, 120),
    ),
}


@dataclass(frozen=True)
class DatedWorld:
    """Files of one world.

    Attributes:
        documents: of all years, JSON lines with ``id``, ``text`` and ``year``.
        learned, asked: questions and answers of the asked year, about the two halves of the entities.
        model: directory of an architecture whose tokens are the world's words.
        facts: year -> ``(entities, attributes)``, each value as its place among the words.
    """

    documents: Path
    learned: Path
    asked: Path
    model: Path
    facts: dict[int, NDArray[np.int64]]


def make_dated_world(size: AgeSize, seed: int, directory: Path) -> DatedWorld:
    """Draw the facts of every year, and write documents, questions, a tokenizer and an architecture."""
    rng = numpy_generator(seed, "dated world")
    syllables = [onset + vowel for onset in "bdfghklmnprstvz" for vowel in "aeiou"]
    pairs = [first + second for first in syllables for second in syllables]
    entities = rng.choice(pairs, size.entities, replace=False).tolist()
    words = [f"{word}n" for word in rng.choice(syllables, size.values, replace=False)]
    now = rng.integers(size.values, size=(size.entities, len(ATTRIBUTES)))
    facts = {}
    for year in range(max(YEARS) + 1):
        facts[year] = now.copy()
        # To one of the other values.
        now = np.where(
            rng.random(now.shape) < CHANGE, (now + rng.integers(1, size.values, size=now.shape)) % size.values, now
        )
    places = [(e, entity, a, attribute) for e, entity in enumerate(entities) for a, attribute in enumerate(ATTRIBUTES)]
    rows = [
        {
            "id": f"{year}-{e}-{a}-{w}",
            "text": wording.format(entity=entity, attribute=attribute, value=words[facts[year][e, a]]),
            "year": year,
        }
        for year in YEARS
        for e, entity, a, attribute in places
        for w, wording in enumerate(WORDINGS)
    ]
    questions = [
        {"text": QUESTION.format(entity=entity, attribute=attribute), "label": words[facts[ASKED][e, a]]}
        for e, entity, a, attribute in places
    ]
    half = size.entities // 2 * len(ATTRIBUTES)
    documents, learned, asked = (directory / f"{name}.jsonl" for name in ("documents", "learned", "asked"))
    world = DatedWorld(documents, learned, asked, directory / "lm", facts)
    _write(world.documents, rows)
    _write(world.learned, questions[:half])
    _write(world.asked, questions[half:])
    tokenizer = word_tokenizer([str(row["text"]) for row in (*rows, *questions)])
    shape = Shape(hidden=size.hidden, layers=size.layers, heads=size.heads, mlp=172 * size.hidden // 64)
    tiny_llama(tokenizer, **shape, context=64, tie=False, generator_seed=0).save_pretrained(world.model)
    tokenizer.save_pretrained(world.model)
    return world


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _age(scale: Scale, seed: int, directory: Path) -> tuple[dict[int, NDArray[np.float64]], dict[int, float]]:
    """The right answers after reading each year, ``(questions,)``, and the learning rate of each."""
    size = SIZES[scale].age
    rates = dict.fromkeys(YEARS, LEARNING_RATES[0]) if scale == "smoke" else _age_rates(scale, directory)
    world = make_dated_world(size, seed, directory)
    right: dict[int, NDArray[np.float64]] = {}
    for lr in sorted(set(rates.values())):  # years of one rate share a run
        years = [year for year in YEARS if rates[year] == lr]
        execute(_age_recipe(size, world, lr, seed, years), directory / f"lr-{lr:g}", resume=True)
        right |= {year: _items(directory / f"lr-{lr:g}", year) for year in years}
    return right, rates


def _age_rates(scale: Scale, directory: Path) -> dict[int, float]:
    """For each year the rate at which it answers most in a world that is there for this."""
    size, trials = SIZES[scale].age, directory.parents[2] / f"{scale}-tuning" / directory.parent.name / "age"
    world = make_dated_world(size, TUNING_SEED, trials)
    found: dict[int, dict[float, float]] = {year: {} for year in YEARS}
    for lr in LEARNING_RATES:
        execute(_age_recipe(size, world, lr, TUNING_SEED, YEARS), trials / f"lr-{lr:g}", resume=True)
        for year in YEARS:
            found[year][lr] = float(_items(trials / f"lr-{lr:g}", year).mean())
    return {year: max(of, key=of.__getitem__) for year, of in found.items()}


def _items(run: Path, year: int) -> NDArray[np.float64]:
    """Whether each question was answered right, as the recipe left it."""
    stored = json.loads((run / "variants" / f"age-{year}" / "result.json").read_text(encoding="utf-8"))
    return np.array(stored["items"]["eval/asked/exact"]["values"], dtype=np.float64)


def _age_recipe(size: AgeSize, world: DatedWorld, lr: float, seed: int, years: Sequence[int]) -> Recipe:
    fields = {
        "method": "pretrainers_guide",
        "sources": {"world": str(world.documents)},
        "model": str(world.model),
        "axes": [{"kind": "age", "values": list(years)}],
        "questions": {"asked": str(world.asked)},
        "finetune": {"data": {"asked": str(world.learned)}, "tokens": size.finetune_tokens, "lr": lr / 3},
        "max_epochs": 1000,
        "max_answer": 3,
        "held_out": 0.02,
        "eval_chars": 4_000,
        "seq_len": 64,
        "batch_tokens": 1_024,
        "budget": {"tokens": size.tokens},
        "optim": {"lr": lr, "warmup": 0.05},
        "fit": {"precision": "fp32"},
        "eval_at": [1.0],
        "seed": seed,
    }
    return load_recipe(fields)


@dataclass(frozen=True)
class QualityWorld:
    """Files of one split of the docstrings.

    Attributes:
        documents: half as they are and half degraded.
        positives: chapters that the score knows.
        valid, prose, doctests: held out: for tuning, and for the two figures.
        model: directory of an architecture and a tokenizer.
    """

    documents: Path
    positives: Path
    valid: Path
    prose: Path
    doctests: Path
    model: Path


def make_quality_world(size: QualitySize, seed: int, directory: Path) -> QualityWorld:
    """Hold documents out, degrade half of the others, and write all with a tokenizer and an architecture."""
    documents, positives, valid, prose, doctests = (
        directory / f"{name}.jsonl" for name in ("documents", "positives", "valid", "prose", "doctests")
    )
    world = QualityWorld(documents, positives, valid, prose, doctests, directory / "lm")
    docs = docstring_corpus(size.packages, limit_chars=size.chars)
    ids = [document.id for document in docs]
    # What rates are tuned on is the same for every seed and in the test of none.
    tuned = split_sides(ids, (0.95, 0.0, 0.05), salt="guide tuning") == 2
    tested = split_sides(ids, (0.9, 0.0, 0.1), salt=f"guide {seed}") == 2
    rng = numpy_generator(seed, "degraded")
    read = [
        {"id": document.id, "text": degraded(document.text, rng) if rng.random() < 0.5 else document.text}
        for document, aside, test in zip(docs, tuned, tested, strict=True)
        if not aside and not test
    ]
    test = [document for document, aside, mine in zip(docs, tuned, tested, strict=True) if mine and not aside]
    chapters = docstring_corpus(("topics",), max_chars=None)
    _write(world.documents, (row for row in read if row["text"].strip()))
    _write(world.positives, _cut(chapters))
    _write(world.valid, _parts((d for d, aside in zip(docs, tuned, strict=True) if aside), prose_of, seed))
    _write(world.prose, _parts(test, prose_of, seed))
    _write(world.doctests, _parts(test, doctests_of, seed))
    mixed = [read[i]["text"] for i in np.random.default_rng(seed).permutation(len(read))]
    tokenizer = train_bpe(mixed[: size.chars // 2_000], size.vocab)
    shape = Shape(hidden=size.hidden, layers=size.layers, heads=size.heads, mlp=172 * size.hidden // 64)
    tiny_llama(tokenizer, **shape, context=size.seq_len, generator_seed=0).save_pretrained(world.model)
    tokenizer.save_pretrained(world.model)
    return world


def _cut(documents: Iterable[Document]) -> list[dict[str, str]]:
    """Chapters in pieces of about a docstring's length, between paragraphs."""
    rows = []
    for document in documents:
        paragraphs = document.text.split("\n\n")
        for begin in range(0, len(paragraphs), 4):
            text = "\n\n".join(paragraphs[begin : begin + 4])
            if text.strip():
                rows.append({"id": f"{document.id}/{begin}", "text": text})
    return rows


def _parts(documents: Iterable[Document], part: Callable[[str], str], seed: int) -> list[dict[str, str]]:
    """That part of each document, where there are 80 characters of it, shuffled."""
    rows = [{"id": document.id, "text": text} for document in documents if len(text := part(document.text)) >= 80]
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


def prose_of(text: str) -> str:
    """Paragraphs of sentences: a dozen words and a full stop, no prompt, table, or line that is set in."""
    kept = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.splitlines()
        plain = not any(line.startswith((" ", ">>>", "|", "-", "=", "+")) or " : " in line for line in lines)
        if plain and len(paragraph.split()) >= 12 and paragraph.rstrip().endswith((".", ":")):
            kept.append(paragraph.strip())
    return "\n\n".join(kept)


def doctests_of(text: str) -> str:
    """The prompts of a docstring and what they print."""
    return "\n\n".join(p.strip("\n") for p in text.split("\n\n") if p.lstrip().startswith(">>>"))


def degraded(text: str, rng: np.random.Generator) -> str:
    """What a filter is for: a table of parameters, outputs without prompts, shuffled lines, or a hexadecimal dump."""
    lines = text.splitlines()
    table = [line for line in lines if re.match(r"\s*[\w*][\w, *]* : ", line)]
    printed = [line for line in doctests_of(text).splitlines() if not line.lstrip().startswith((">>>", "..."))]
    shuffled = [lines[i] for i in rng.permutation(len(lines))]
    data = text.encode()[:1_024]
    dump = [f"{i:08x}  {data[i : i + 16].hex(' ')}" for i in range(0, len(data), 16)]
    kinds = [kind for kind in (table, printed, shuffled, dump) if len("".join(kind)) >= 60]
    return "\n".join(kinds[int(rng.integers(len(kinds)))]) if kinds else ""


def _quality(
    scale: Scale, seed: int, directory: Path
) -> tuple[dict[str, dict[str, float]], dict[str, float], float, str]:
    """Figures and rates of both arms, what the unfiltered model learned, and the fingerprint of what was read."""
    size = SIZES[scale].quality
    rates = dict.fromkeys(FILTERED, LEARNING_RATES[0]) if scale == "smoke" else _quality_rates(scale, directory)
    world = make_quality_world(size, seed, directory)
    evals = {"prose": world.prose, "doctests": world.doctests}
    figures, gained, data = {}, 0.0, ""
    for arm, variant in FILTERED.items():
        place = directory / f"lr-{rates[arm]:g}"  # arms with one rate share a run
        result = execute(_quality_recipe(size, world, evals, rates[arm], seed), place, resume=True)
        of = f"variants/{variant}"
        figures[arm] = {name: result.metrics[f"{of}/eval/{name}/bpb"] for name in evals}
        figures[arm]["documents"] = result.metrics[f"{of}/documents"]
        if arm == "unfiltered":  # the run's own model
            curve = json.loads((place / "trajectory.json").read_text(encoding="utf-8"))["series"]["valid/bpb"]
            gained, data = curve[0][1] - curve[-1][1], result.data["sources.text"]
    return figures, rates, gained, data


def _quality_rates(scale: Scale, directory: Path) -> dict[str, float]:
    """For each arm the rate with the fewest bits per byte on prose that is held out for that."""
    size, trials = SIZES[scale].quality, directory.parents[2] / f"{scale}-tuning" / directory.parent.name / "quality"
    world = make_quality_world(size, TUNING_SEED, trials)
    found: dict[str, dict[float, float]] = {arm: {} for arm in FILTERED}
    for lr in LEARNING_RATES:
        recipe = _quality_recipe(size, world, {"tuning": world.valid}, lr, TUNING_SEED)
        metrics = execute(recipe, trials / f"lr-{lr:g}", resume=True).metrics
        for arm, variant in FILTERED.items():
            found[arm][lr] = metrics[f"variants/{variant}/eval/tuning/bpb"]
    return {arm: min(of, key=of.__getitem__) for arm, of in found.items()}


def _quality_recipe(size: QualitySize, world: QualityWorld, evals: dict[str, Path], lr: float, seed: int) -> Recipe:
    return load_recipe(
        {
            "method": "pretrainers_guide",
            "sources": {"text": str(world.documents)},
            "model": str(world.model),
            "curation": {"steps": [{"kind": "quality", "positives": str(world.positives)}]},
            "axes": [{"kind": "quality", "values": [THRESHOLD]}],
            "max_epochs": 1000,
            "evals": {name: str(path) for name, path in evals.items()},
            "held_out": size.held_out,
            "eval_chars": size.eval_chars,
            "packing": "concat",
            "seq_len": size.seq_len,
            "batch_tokens": size.batch_tokens,
            "budget": {"steps": size.steps},
            "optim": {"lr": lr, "weight_decay": 0.1, "warmup": 0.05},
            "fit": {"precision": "fp32"},
            "eval_at": [0.0, 1.0],
            "seed": seed,
        }
    )


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Both experiments for one seed."""
    right, age_rates = _age(scale, seed, directory / "age")
    figures, rates, gained, data = _quality(scale, seed, directory / "quality")
    beside = [right[year] for year in YEARS if abs(year - ASKED) == 3]
    misaligned = np.mean(beside, axis=0)
    aligned = right[ASKED]
    scores = [[float(right[year].mean())] for year in YEARS]
    degradation = temporal_degradation(scores, YEARS, [ASKED])
    arms: dict[str, dict[str, float]] = {
        "aligned year": {"right answers": float(aligned.mean())},
        "year beside": {"right answers": float(misaligned.mean())},
        "with distance": {"loss per year": degradation.slope},
        "without distance": {"loss per year": 0.0},
        **{f"year {year}": {"right answers": float(right[year].mean())} for year in YEARS},
        **figures,
    }
    unmet = [] if aligned.mean() >= KNOWN else [f"the model of the asked year answers {aligned.mean():.0%}"]
    unmet += [] if gained >= LEARNED else [f"the unfiltered model gained {gained:.2f} bits on validation text"]
    return Measured(
        arms=arms,
        items={
            "aligned year": {"right answers": aligned.tolist()},
            "year beside": {"right answers": misaligned.tolist()},
        },
        data_fingerprint=data,
        unmet=unmet,
        notes={f"learning rate, year {year}": str(lr) for year, lr in age_rates.items()}
        | {f"learning rate, {arm}": str(lr) for arm, lr in rates.items()},
    )


CLAIM = Claim(
    id="pretrainers_guide",
    statement="A model that was pretrained on text of the year it is asked about answers better, after the same "
    "finetuning, than one pretrained on text of three years before or after, and worse with every year of distance; "
    "and a filter of quality, for equal tokens, makes held-out prose easier to predict, and held-out doctests harder.",
    source="Longpre et al., arXiv:2305.13169: at 1.5B parameters temporal misalignment costs score on every dated set "
    "and finetuning does not repair it; filters of quality help on nearly all domains although they remove data.",
    parts=(
        Part(
            "After finetuning, at least 10 points more of the questions are answered after reading the year of these "
            "than after reading the year three before or after",
            "right answers",
            "aligned year",
            "year beside",
            "higher",
            0.10,
            units="seeds and questions",
        ),
        Part(
            "Every year of distance costs score: the slope of temporal degradation is above 0",
            "loss per year",
            "with distance",
            "without distance",
            "higher",
            0.0,
        ),
        Part(
            "Held-out prose takes fewer bits per byte after filtered reading",
            "prose",
            "filtered",
            "unfiltered",
            "lower",
            0.0,
        ),
        Part(
            "What that costs: held-out doctests take fewer bits per byte after unfiltered reading",
            "doctests",
            "unfiltered",
            "filtered",
            "lower",
            0.0,
            decides=False,
        ),
    ),
    rival="unfiltered",
    preconditions=(
        f"the model of the asked year answers at least {KNOWN:.0%} of the questions after finetuning",
        f"the unfiltered model gains at least {LEARNED} bits per byte on validation text",
    ),
    seeds={"smoke": (100,), "small": (100, 101, 102)},
    measure=measure,
)
