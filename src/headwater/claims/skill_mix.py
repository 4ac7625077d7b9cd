"""Does a model that learned to write texts with up to three skills write texts with four?

Small scale, with skills whose presence is exact: a text shows skill s on topic t if one of its clauses, joined by
``and``, is the two words of s around t. There are twelve skills, eight to learn and four held out, and ten topics,
which both phases share. Phase 1, the same for both arms: all twelve skills, one at a time, so every word is known.
Phase 2, for equal steps and tokens and with a quarter of phase 1 replayed: the treatment reads texts with one, two and
three of the eight skills, the baseline texts with one of them. The generator is a script that reads the prompt and
writes the clauses; the grader is a ``RuleGrader``; a text with more clauses than skills is too long. Then both are
asked greedily, for 2 to 5 skills. Combinations that are asked are never read. Every arm chooses its learning rate from
the same three on a seed of its own, in runs of half the length, by the mean skill fraction at k = 2 to 5 of the
learned skills.

Positions are rotary and every example is seen alone, counted from 0, as it is when the model is asked.

Looked at beforehand, on seed 0 and at the middle rate: after phase 1 every skill is shown at k = 1; at k = 4 the
treatment shows 78 % of the learned skills and the baseline 19 %, so neither is at chance or at its ceiling. Nothing was
changed after that but the length of the runs that choose the rate, for time.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from headwater.core.cache import atomic_write_text
from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.recipe import load_recipe
from headwater.core.rng import numpy_generator
from headwater.core.run import Result, execute
from headwater.corpora.skill_mix import (
    RuleGrader,
    Skill,
    SkillMixPrompts,
    SkillSet,
    draw_combinations,
    grade_texts,
    score_texts,
    write_texts,
)
from headwater.corpora.skill_mix_texts import SkillText, kept, write_table
from headwater.modalities.text.conversations import conversation
from headwater.modalities.text.docs import split_sides
from headwater.modalities.text.generate import Message, ScriptedGenerator
from headwater.modalities.text.prepared import split_shares
from headwater.modalities.text.tiny import Size as Shape
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.tokenizers import word_tokenizer

__all__ = ["CLAIM", "RULES", "SKILLS", "TOPICS", "scripted"]

TUNING_SEED = 1000
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
BASE_RATE = 2e-3
KNOWN = 0.95
HELD_OUT = 0.1
ARMS = {"up to three": (1, 2, 3), "one": (1,)}
ASKED = (2, 3, 4, 5)

SKILLS = SkillSet(tuple(Skill(f"s{n}", "learned" if n <= 8 else "held") for n in range(1, 13)))
TOPICS = tuple(f"t{n}" for n in range(1, 11))
PROMPTS = SkillMixPrompts(write="{names} on {topic} text :")


def _words(skill: str) -> tuple[str, str]:
    """The private words of a skill."""
    return f"a{skill[1:]}", f"b{skill[1:]}"


def _clauses(text: str) -> list[list[str]]:
    return [clause.split() for clause in re.split(r"\band\b", text)]


def _shows(skill: str) -> Any:
    words = set(_words(skill))
    return lambda text, topic: any(len(c) == 3 and c[1] == topic and {c[0], c[2]} == words for c in _clauses(text))


RULES = RuleGrader(
    {skill.name: _shows(skill.name) for skill in SKILLS}, length=lambda text, k: len(_clauses(text)) <= k
)
"""Whether a clause is the two words of a skill around the topic, and whether there are at most k clauses."""


def scripted() -> ScriptedGenerator:
    """A generator that knows the words of every skill, and is told nothing but the prompt."""

    def write(messages: Sequence[Message], rng: random.Random) -> str:
        names, topic = re.fullmatch(r"(.+) on (\w+) text :", messages[-1].content).groups()  # type: ignore[union-attr]
        return " and ".join(f"{a} {topic} {b}" for a, b in map(_words, names.split(", ")))

    return ScriptedGenerator({"write": write}, id="lexicon world")


@dataclass(frozen=True)
class Size:
    """How large an experiment is.

    Attributes:
        shape: of the model.
        base, arm, tuning: optimizer steps, of phase 1, of phase 2, and of phase 2 where a learning rate is chosen.
        asked: combinations for each k and side.
    """

    shape: Shape
    base: int
    arm: int
    tuning: int
    asked: int


SIZES: dict[Scale, Size] = {
    "smoke": Size(Shape(hidden=16, layers=1, heads=2, mlp=32), base=10, arm=5, tuning=5, asked=4),
    "small": Size(Shape(hidden=64, layers=2, heads=4, mlp=172), base=200, arm=1500, tuning=750, asked=100),
}


def make_world(size: Size, seed: int, directory: Path) -> None:
    """Write skills, topics, prompts, texts of both arms and of phase 1, and a model whose tokens are the words."""
    rows = [{"name": skill.name, "category": skill.category} for skill in SKILLS]
    _write_rows(rows, directory / "skills.jsonl")
    atomic_write_text(directory / "topics.txt", "\n".join(TOPICS) + "\n")
    atomic_write_text(directory / "prompts.toml", f'write = "{PROMPTS.write}"\n')
    learned, _ = SKILLS.split(["learned"])
    first = _texts(SKILLS, (1,), seed)
    write_table(first, directory / "base.parquet")
    for arm, ks in ARMS.items():
        write_table(_texts(learned, ks, seed), directory / f"{arm}.parquet")
    rng = numpy_generator(seed, "apart")
    vocabulary = ["and", *TOPICS, *(word for skill in SKILLS for word in _words(skill.name))]
    apart = [" ".join(rng.choice(vocabulary, 9)) for _ in range(30)]
    write_replay(first, apart, directory / "replay.jsonl")
    names = " , ".join(skill.name for skill in SKILLS)
    tokenizer = word_tokenizer([f"user assistant : {names} on text", " ".join(vocabulary)])
    model = tiny_llama(tokenizer, **size.shape, context=64, tie=False, generator_seed=0)
    model.save_pretrained(directory / "architecture")
    tokenizer.save_pretrained(directory / "architecture")


def _texts(skills: SkillSet, ks: Sequence[int], seed: int) -> list[SkillText]:
    """A text for every combination."""
    drawn = [
        combination
        for k in ks
        for combination in draw_combinations(skills, TOPICS, k, 10**6, numpy_generator(seed, "combinations", k))
    ]
    texts = write_texts(scripted(), drawn, PROMPTS, second_turn=False)
    return kept(grade_texts(RULES, texts))


def write_replay(texts: Sequence[SkillText], apart: Iterable[str], path: Path) -> None:
    """Write what is replayed, and further lines that the family keeps apart, under ids that its split sends there."""
    shares, numbers = split_shares(HELD_OUT), count()

    def placed(side: int) -> str:
        return next(i for i in map(str, numbers) if split_sides([i], shares)[0] == side)

    documents = [conversation(placed(0), text.messages) for text in texts]
    rows = [{"id": d.id, "text": d.text, **d.meta} for d in documents]
    rows += [{"id": placed(2 if n % 6 else 1), "text": text} for n, text in enumerate(apart)]
    _write_rows(rows, path)


def _write_rows(rows: Iterable[dict[str, Any]], path: Path) -> None:  # Any: JSON data
    atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


# -- the experiment


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Train the base and both arms, and have them write for what is asked."""
    size = SIZES[scale]
    make_world(size, seed, directory)
    known = _base(size, seed, directory)
    notes: dict[str, str] = {}
    arms: dict[str, dict[str, float]] = {}
    items: dict[str, dict[str, list[float]]] = {}
    for arm in ARMS:
        lr = LEARNING_RATES[1] if scale == "smoke" else _tuned(arm, scale, directory, notes)
        notes[f"learning rate, {arm}"] = f"{lr:g}"
        result = _trained(size, arm, lr, seed, directory, size.arm)
        arms[arm] = {
            f"{name}, k = {k}, {pool}": result.metrics[f"skillmix/k{k}/{pool}/{name}"]
            for pool in ("train", "held_out")
            for k in (ASKED if pool == "train" else ASKED[:-1])
            for name in ("skill_fraction", "all_skills", "full_marks")
        }
        items[arm] = {"skill_fraction, k = 4, train": _fractions(directory / f"{arm}-{lr:g}", 4, "learned")}
    return Measured(
        arms=arms | {"base": {"skill_fraction, k = 1": known}},
        items=items,
        data_fingerprint=result.data["sources.first"],
        unmet=[] if known >= KNOWN else [f"after phase 1 the skill fraction at k = 1 is {known:.2f} over all skills"],
        notes=notes,
    )


def _shared(seed: int, directory: Path) -> dict[str, Any]:  # Any: recipe fields
    return {
        "method": "skill_mix",
        "sources": {"first": str(directory / "replay.jsonl")},
        "skills": str(directory / "skills.jsonl"),
        "topics": str(directory / "topics.txt"),
        "prompts": str(directory / "prompts.toml"),
        "train_topics": 1.0,
        "split_seed": seed,
        "grader": {"kind": "rules", "use": "headwater.claims.skill_mix:RULES"},
        "second_turn": False,
        "reply_tokens": 24,
        "temperature": 0.0,
        "generations_per_combo": 1,
        "seq_len": 40,
        "batch_tokens": 1_280,
        "held_out": HELD_OUT,
        "eval_at": [1.0],
        "eval_chars": 2_000,
        "fit": {"precision": "fp32"},
        "seed": seed,
    }


def _base(size: Size, seed: int, directory: Path) -> float:
    """Phase 1; the skill fraction at k = 1 over all skills and topics."""
    from headwater.core.recipe import ModelRef
    from headwater.modalities.models import load_model, load_tokenizer
    from headwater.modalities.text.generate_hf import HFGenerator

    fields = {
        **_shared(seed, directory),
        "model": str(directory / "architecture"),
        "from_scratch": True,
        "texts": str(directory / "base.parquet"),
        "train_categories": ["learned", "held"],
        "k_eval": [2],
        "eval_samples": 4,
        "budget": {"steps": size.base},
        "optim": {"lr": BASE_RATE, "warmup": 0.05},
    }
    execute(load_recipe(fields), directory / "base", resume=True)
    ref = ModelRef(name=str(directory / "base" / "model"))
    model: Any = load_model(ref, "causal")  # Any: declared as a plain module
    asked = draw_combinations(SKILLS, TOPICS, 1, 10**6, numpy_generator(seed, "known"))
    generator = HFGenerator(model, load_tokenizer(ref))
    texts = write_texts(generator, asked, PROMPTS, second_turn=False, reply_tokens=24, temperature=0.0)
    return score_texts(grade_texts(RULES, texts))["skill_fraction"]


def _trained(size: Size, arm: str, lr: float, seed: int, directory: Path, steps: int) -> Result:
    fields = {
        **_shared(seed, directory),
        "model": str(directory / "base" / "model"),
        "texts": str(directory / f"{arm}.parquet"),
        "train_categories": ["learned"],
        "replay_rate": 0.25,
        "k_eval": list(ASKED),
        "eval_samples": size.asked,
        "budget": {"steps": steps},
        "optim": {"lr": lr, "warmup": 0.05},
    }
    return execute(load_recipe(fields), directory / f"{arm}-{lr:g}", resume=True)


def _fractions(run: Path, k: int, category: str) -> list[float]:
    """Skill fraction of each combination of k skills of a category, in the order in which they were asked."""
    import pyarrow.parquet as pq

    of = {skill.name: skill.category for skill in SKILLS}
    rows = pq.read_table(run / "skillmix" / "eval.parquet").to_pylist()
    return [
        sum(row["shown"]) / k * (row["on_topic"] and row["short_enough"] and row["makes_sense"])
        for row in rows
        if row["k"] == k and {of[name] for name in row["skills"]} == {category}
    ]


def _tuned(arm: str, scale: Scale, directory: Path, notes: dict[str, str]) -> float:
    """The learning rate with the highest mean skill fraction on a seed of its own; run once per claim."""
    size, place = SIZES[scale], directory.parents[1] / f"{scale}-tuning" / directory.name
    make_world(size, TUNING_SEED, place)
    _base(size, TUNING_SEED, place)
    found = {}
    for lr in LEARNING_RATES:
        metrics = _trained(size, arm, lr, TUNING_SEED, place, size.tuning).metrics
        found[lr] = sum(metrics[f"skillmix/k{k}/train/skill_fraction"] for k in ASKED) / len(ASKED)
    notes[f"tuning, {arm}"] = ", ".join(f"{lr:g}: {score:.3f}" for lr, score in found.items())
    return max(found, key=found.__getitem__)


CLAIM = Claim(
    id="skill_mix",
    statement="A model that learned texts with up to three skills shows more of four skills in one text than a model "
    "that learned them one at a time, at equal steps and tokens.",
    source="Zhao et al., arXiv:2409.19808: training on texts with k = 2 and 3 skills raises full marks at k = 4 and 5, "
    "which it never saw, and on held-out skills.",
    parts=(
        Part(
            "At k = 4, which no text showed, it shows at least 30 points more of the learned skills",
            "skill_fraction, k = 4, train",
            "up to three",
            "one",
            "higher",
            0.30,
            units="seeds and combinations",
        ),
        Part(
            "At k = 2 it shows at least 30 points more of held-out skills, which were never combined",
            "skill_fraction, k = 2, held_out",
            "up to three",
            "one",
            "higher",
            0.30,
            decides=False,
        ),
    ),
    rival="one",
    preconditions=(f"after phase 1 the skill fraction at k = 1 is at least {KNOWN} over all skills",),
    seeds={"smoke": (100,), "small": (100, 101, 102)},
    measure=measure,
)
