"""Does a teacher that is aligned with a student's preferences write training data from which that student learns more?

Small scale, the dialect world: an entity has a symbol, which is written in one of four dialects with alphabets of their
own, and a symbol has an answer. Teacher and student are tiny Llamas. The teacher knows everything and writes ``R
dialect symbol A answer`` in a dialect that it draws uniformly; all it writes is right. The student knows the symbol of
every entity in every dialect, and the answer of a symbol in one of them only; shown an example, it copies the example's
dialect. Nothing tells the teacher what the student knows, except how the student answers validation questions with a
draft of the teacher's as its only example. From those scores come pairs, from these an aligned teacher by DPO, and from
it a set of examples, on which the student is tuned. Then it is asked for entities that no set holds, and writes
rationales of its own. Three arms share the pretrained teacher and student, the drafts and their scores, and differ in
who writes the set: the aligned teacher (arte), the teacher as it was (unaligned), and a teacher aligned on pairs whose
scores were shuffled within their groups (random pairs). Sets have equal sizes, and students equal steps.

Pretraining has one fixed rate, as it is shared. The rates of DPO and of the student's tuning are chosen by every arm
from the same three each, in a world of its own seed, by the student's answers to validation questions: first that of
DPO, with the middle rate of tuning, then that of tuning.

Sizes that differ from the first sketch of this experiment, chosen before any arm was run: 40 symbols for 12 and a set
of 120 examples for 300. With 12 symbols, 300 examples show each symbol of each dialect six times, so tuning itself
would teach whatever the student lacks, whoever wrote the set.

Changed after pilots on seeds 0 and 1, for both aligned arms alike where it concerns DPO; margins were not:
- A rationale names its dialect. Without the name a teacher of this size has no notion of a dialect, and learned each
  entity's pair by heart.
- DPO's adapters sit on the output layer, with beta 1. Inside the layers of so small a model they made both texts of a
  pair unlikely, the better one by 14 nats, and the teacher then wrote nonsense: a known failing of DPO. Texts are six
  tokens long, so at beta 0.1 the loss asks for margins that only broken texts have.
- The student's rationales are drawn, eight for each entity, and the figure is the share of right ones. Greedily, a
  nearly even choice among four dialects is one coin toss for a whole world.
- The grid of tuning was moved up, as its highest rate was the best one of the unaligned arm; pretraining was cut by a
  fifth, as both models knew their worlds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from headwater.core.budget import Budget
from headwater.core.cache import atomic_write_text, cache_key
from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.fit import FitSettings, Phase, fit
from headwater.core.lora import LoraSpec
from headwater.core.optim import OptimSpec
from headwater.core.rng import derive_seed, numpy_generator
from headwater.corpora.arte_drafts import Draft, Form, TeacherPrompts, Unseen, elicit, parse_rationale, tailor
from headwater.corpora.arte_scores import draft_pairs, icl_scores, select_discriminative
from headwater.corpora.arte_teacher import DPOSpec, align_teacher
from headwater.modalities.text.generate import Message, Request
from headwater.modalities.text.generate_hf import HFGenerator
from headwater.modalities.text.instruct import exact_match
from headwater.modalities.text.objectives import CausalObjective
from headwater.modalities.text.pairs import Encoded, PairModel, Pairs, PairStream
from headwater.modalities.text.tiny import Size as Shape
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.tokenizers import word_tokenizer

__all__ = ["CLAIM", "World", "make_world"]

NAMES, LIKED = ("north", "east", "south", "west"), 1
DIALECTS = len(NAMES)
TUNING_SEED = 1000
BETA = 1.0
DRAWS = 8
DPO_RATES = (3e-4, 1e-3, 3e-3)
STUDENT_RATES = (1e-3, 3e-3, 1e-2)
PRETRAINING = OptimSpec(lr=3e-3, warmup=0.05)
KNOWN, SPREAD, SHARE = 0.9, 0.3, 0.6
ARMS = ("arte", "unaligned", "random pairs")
FORM = Form(ask="Q {question}", join=" ", between=" . ", marker="A")
PROMPTS = TeacherPrompts(question="like {question} :", rationale=("Q {question}",))
TEMPLATE = "{{ eos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
WRITTEN = 7  # tokens: a rationale, EOS and one to spare


@dataclass(frozen=True)
class Size:
    """How large an experiment is.

    Attributes:
        seeds, valid, held_out: entities.
        symbols: of each dialect.
        shape: of both models.
        teacher_steps, student_steps: of pretraining, on ``rows`` texts each.
        rows: texts per step.
        n_questions, n_rationales, n_pref: of the method.
        dpo_steps: of alignment, on 32 pairs each.
        n_final: examples of a set.
        steps: of the student on a set, on 16 examples each.
    """

    seeds: int
    valid: int
    held_out: int
    symbols: int
    shape: Shape
    teacher_steps: int
    student_steps: int
    rows: int
    n_questions: int
    n_rationales: int
    n_pref: int
    dpo_steps: int
    n_final: int
    steps: int


SIZES: dict[Scale, Size] = {
    "smoke": Size(
        seeds=6,
        valid=4,
        held_out=4,
        symbols=4,
        shape=Shape(hidden=32, layers=2, heads=2, mlp=64),
        teacher_steps=150,
        student_steps=80,
        rows=32,
        n_questions=1,
        n_rationales=5,
        n_pref=4,
        dpo_steps=3,
        n_final=8,
        steps=4,
    ),
    "small": Size(
        seeds=60,
        valid=24,
        held_out=36,
        symbols=40,
        shape=Shape(hidden=64, layers=2, heads=4, mlp=172),
        teacher_steps=500,
        student_steps=900,
        rows=64,
        n_questions=2,
        n_rationales=4,
        n_pref=16,
        dpo_steps=80,
        n_final=120,
        steps=30,
    ),
}


@dataclass(frozen=True)
class World:
    """Entities with their symbols, and what a symbol means.

    Attributes:
        seeds, valid, held_out: entities.
        symbol: number of each entity's symbol.
        alphabets: ``(dialects, symbols)`` words.
        answers: ``(symbols,)`` words.
    """

    seeds: list[str]
    valid: list[str]
    held_out: list[str]
    symbol: Mapping[str, int]
    alphabets: list[list[str]]
    answers: list[str]

    def rationale(self, entity: str, dialect: int) -> str:
        """What a teacher writes."""
        number = self.symbol[entity]
        return f"R {NAMES[dialect]} {self.alphabets[dialect][number]} A {self.answers[number]}"

    def asked(self, entities: Sequence[str]) -> Pairs:
        """Entities with their answers."""
        return Pairs(list(entities), [self.answers[self.symbol[entity]] for entity in entities])

    def dialect(self, draft: Draft) -> int | None:
        """The dialect of a rationale's symbol; None where it has none."""
        words = set(draft.rationale.split())
        return next((number for number, alphabet in enumerate(self.alphabets) if words & set(alphabet)), None)

    def is_right(self, draft: Draft) -> bool:
        """Whether a rationale has the entity's symbol in some dialect, and its answer."""
        rationales = (
            {self.rationale(draft.question, d) for d in range(DIALECTS)} if draft.question in self.symbol else ()
        )
        return draft.rationale in rationales


def make_world(size: Size, seed: int) -> World:
    """Draw words and what they stand for."""
    rng = numpy_generator(seed, "world")
    syllables = [onset + vowel for onset in "bdfghklmnprstvz" for vowel in "aeiou"]
    words = [first + second for first in syllables for second in syllables]
    count = size.seeds + size.valid + size.held_out
    drawn = rng.choice(words, count + (DIALECTS + 1) * size.symbols, replace=False).tolist()
    entities, rest = drawn[:count], drawn[count:]
    alphabets = [rest[begin : begin + size.symbols] for begin in range(0, len(rest), size.symbols)]
    symbol = dict(zip(entities, rng.integers(size.symbols, size=count).tolist(), strict=True))
    seeds, valid = entities[: size.seeds], entities[size.seeds : size.seeds + size.valid]
    return World(seeds, valid, entities[size.seeds + size.valid :], symbol, alphabets[:DIALECTS], alphabets[DIALECTS])


# -- what the two models know


def _teacher_texts(world: World, count: int, rng: np.random.Generator) -> list[tuple[str, str, bool]]:
    """Prompt, text, and whether the text ends there."""
    entities = [*world.seeds, *world.valid, *world.held_out]
    texts = []
    for _ in range(count):
        if rng.random() < 0.3:
            shown, other = rng.choice(world.seeds, 2)
            texts.append((PROMPTS.for_question(shown), str(other), True))
        else:
            entity = str(rng.choice(entities))
            texts.append((PROMPTS.for_rationale(entity), world.rationale(entity, int(rng.integers(DIALECTS))), True))
    return texts


def _student_texts(world: World, count: int, rng: np.random.Generator) -> list[tuple[str, str, bool]]:
    """Likewise. Where the student shall not know an answer, the text breaks off before it."""
    entities = [*world.seeds, *world.valid, *world.held_out]
    texts = []
    for _ in range(count):
        entity, dialect = str(rng.choice(entities)), int(rng.integers(DIALECTS))
        told, kind = world.rationale(entity, dialect), rng.random()
        knows = dialect == LIKED and entity in world.seeds
        text = told if knows else told.rsplit(" ", 1)[0]
        if kind < 0.25:
            texts.append((FORM.prompt(entity), text, knows))
        elif kind < 0.75:
            other = str(rng.choice(world.seeds))
            shot = FORM.shot(Draft(other, world.rationale(other, dialect), ""))
            texts.append((shot + FORM.prompt(entity), text, knows))
        else:
            number = int(rng.integers(len(world.answers)))
            symbol = world.alphabets[LIKED][number]
            texts.append((f"R {NAMES[LIKED]} {symbol}", f"A {world.answers[number]}", True))
    return texts


def _tokenizer(world: World) -> PreTrainedTokenizerBase:
    words = [*world.symbol, *(word for alphabet in world.alphabets for word in alphabet), *world.answers]
    tokenizer = word_tokenizer([" ".join([*words, *NAMES, "Q R A . like :"])])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _pretrained(
    name: str, texts: Sequence[tuple[str, str, bool]], size: Size, steps: int, world: World, seed: int, directory: Path
) -> Path:
    """A model that has read the texts, each prompt given."""
    tokenizer = _tokenizer(world)
    eos = int(tokenizer.eos_token_id)
    ids = [tokenizer(list(side), add_special_tokens=False)["input_ids"] for side in list(zip(*texts, strict=True))[:2]]
    encoded = [
        Encoded([eos, *prompt], [*text, eos] if ends else text)
        for prompt, text, (*_, ends) in zip(*ids, texts, strict=True)
    ]
    model = tiny_llama(tokenizer, **size.shape, context=64, tie=False, generator_seed=derive_seed(seed, name))
    stream = PairStream(
        encoded, "causal", rows=size.rows, seed=derive_seed(seed, name), pad=int(tokenizer.pad_token_id)
    )
    _fit(name, model, stream, PRETRAINING, steps, seed, directory)
    model.save_pretrained(directory / f"{name}-model")
    tokenizer.save_pretrained(directory / f"{name}-model")
    return directory / f"{name}-model"


def _fit(
    name: str, model: PreTrainedModel, stream: PairStream, optim: OptimSpec, steps: int, seed: int, directory: Path
) -> None:
    fit(
        Phase("train", model, stream, CausalObjective()),
        budget=Budget(steps=steps),
        optim=optim,
        seed=seed,
        directory=directory / name,
        settings=FitSettings(precision="fp32", micro_rows=stream.rows),
    )


# -- the experiment


@dataclass(frozen=True)
class Setting:
    """What the arms of one seed share.

    Attributes:
        drafts, scores: of the teacher as it was, ``(drafts,)``.
    """

    size: Size
    seed: int
    world: World
    directory: Path
    tokenizer: PreTrainedTokenizerBase
    teacher: Path
    student: Path
    drafts: list[Draft]
    scores: list[float]

    @classmethod
    def make(cls, size: Size, seed: int, directory: Path) -> Setting:
        """Draw a world, pretrain both models, elicit drafts and score them."""
        world = make_world(size, seed)
        told = _teacher_texts(world, size.teacher_steps * size.rows, numpy_generator(seed, "teacher"))
        teacher = _pretrained("teacher", told, size, size.teacher_steps, world, seed, directory)
        read = _student_texts(world, size.student_steps * size.rows, numpy_generator(seed, "student"))
        student = _pretrained("student", read, size, size.student_steps, world, seed, directory)
        tokenizer = _tokenizer(world)
        writer, apart = HFGenerator(_open(teacher), tokenizer), Unseen([*world.valid, *world.held_out])
        shared: dict[str, Any] = {"marker": FORM.marker, "unseen": apart, "reply_tokens": WRITTEN, "seed": seed}
        drafts = elicit(writer, world.seeds, size.n_questions, size.n_rationales, PROMPTS, **shared).drafts
        matrix = icl_scores(_open(student), tokenizer, drafts, world.asked(world.valid), form=FORM, max_answer=WRITTEN)
        scores = matrix[:, select_discriminative(matrix, size.n_pref)].mean(axis=1).tolist()
        return cls(size, seed, world, directory, tokenizer, teacher, student, drafts, scores)

    def written(self, arm: str, rate: float) -> list[Draft]:
        """The set of an arm's teacher."""
        model = _open(self.teacher)
        if arm != "unaligned":
            scores = self.scores if arm == "arte" else self.shuffled()
            pairs = draft_pairs(self.drafts, scores, self.world.seeds, PROMPTS, per_group=3)
            rows = min(32, len(pairs))
            spec = DPOSpec(
                beta=BETA,
                epochs=self.size.dpo_steps * rows / len(pairs),
                lora=LoraSpec(target_modules=("lm_head",)),
                optim=OptimSpec(lr=rate, weight_decay=0.0, warmup=0.1),
                fit=FitSettings(precision="fp32", micro_rows=rows),
            )
            place = self.directory / f"align-{arm.replace(' ', '-')}-{rate:g}"
            aligned: Any = align_teacher(model, self.tokenizer, pairs, spec, seed=self.seed, directory=place).model
            model = aligned.merge_and_unload()
        apart = Unseen([*self.world.valid, *self.world.held_out])
        return tailor(
            HFGenerator(model, self.tokenizer),
            self.world.seeds,
            self.size.n_final,
            PROMPTS,
            marker=FORM.marker,
            unseen=apart,
            reply_tokens=WRITTEN,
            seed=derive_seed(self.seed, "tailored"),
        ).drafts

    def shuffled(self) -> list[float]:
        """The scores, dealt out anew within each question."""
        rng, found = numpy_generator(self.seed, "random pairs"), list(self.scores)
        for question in sorted({draft.question for draft in self.drafts}):
            rows = [row for row, draft in enumerate(self.drafts) if draft.question == question]
            for row, score in zip(rows, rng.permutation([self.scores[row] for row in rows]).tolist(), strict=True):
                found[row] = score
        return found

    def taught(self, arm: str, drafts: Sequence[Draft], rate: float) -> PairModel:
        """The student after an arm's set."""
        model = _open(self.student)
        reader = PairModel(model, self.tokenizer, "causal", 48, WRITTEN, FORM.join)
        read = Pairs([FORM.prompt(draft.question) for draft in drafts], [draft.rationale for draft in drafts])
        stream = reader.stream(read, rows=16, seed=self.seed)
        name = f"student-{arm.replace(' ', '-')}-{cache_key([[*read.sources], [*read.targets], rate])}"
        _fit(name, model, stream, OptimSpec(lr=rate, warmup=0.1), self.size.steps, self.seed, self.directory)
        return reader

    def right(self, reader: PairModel, entities: Sequence[str]) -> list[float]:
        """The share of the student's own rationales for each entity that end in its answer."""
        asked, writer = self.world.asked(entities), HFGenerator(cast(PreTrainedModel, reader.model), self.tokenizer)
        requests = [
            Request((Message("user", FORM.prompt(entity)),), WRITTEN, seed=self.seed, sample=draw)
            for entity in asked.sources
            for draw in range(DRAWS)
        ]
        parsed = [parse_rationale(reply.text, FORM.marker) for reply in writer.generate(requests)]
        answers = [answer for answer in asked.targets for _ in range(DRAWS)]
        exact = [exact_match(p[1], answer) if p else 0.0 for p, answer in zip(parsed, answers, strict=True)]
        found: list[float] = np.reshape(exact, (-1, DRAWS)).mean(axis=1).tolist()
        return found

    def nats(self, reader: PairModel, entities: Sequence[str]) -> float:
        """Mean over rationales in the liked dialect: what breaks ties between rates."""
        told = [self.world.rationale(entity, LIKED) for entity in entities]
        return float(reader.nats(Pairs([FORM.prompt(entity) for entity in entities], told)).mean())

    def share(self, drafts: Sequence[Draft]) -> float:
        """Share of rationales in the dialect that the student knows the answers of."""
        return float(np.mean([self.world.dialect(draft) == LIKED for draft in drafts])) if drafts else 0.0

    def facts(self) -> dict[str, float]:
        """What the preconditions are about."""
        student = PairModel(_open(self.student), self.tokenizer, "causal", 48, WRITTEN, FORM.join)
        entities = self.world.held_out
        told = [self.world.rationale(entity, LIKED).rsplit(" ", 2) for entity in entities]
        given = student.answers([f"{FORM.prompt(e)} {words[0]}" for e, words in zip(entities, told, strict=True)])
        liked = [self.world.dialect(draft) == LIKED for draft in self.drafts]
        scores = {
            flag: [score for score, found in zip(self.scores, liked, strict=True) if found == flag]
            for flag in (True, False)
        }
        means = {flag: float(np.mean(values)) if values else 0.0 for flag, values in scores.items()}
        return {
            "given": float(np.mean([g == " ".join(words[1:]) for g, words in zip(given, told, strict=True)])),
            "liked": means[True],
            "others": means[False],
            "drafts right": float(np.mean([self.world.is_right(draft) for draft in self.drafts])),
            "untaught": float(np.mean(self.right(student, entities))),
        }


def _open(directory: Path) -> PreTrainedModel:
    return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(directory))


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Pretrain the two models of one world, let the three teachers write, and ask the three students."""
    size = SIZES[scale]
    rates = _middle() if scale == "smoke" else _tuned(size, directory)
    setting = Setting.make(size, seed, directory)
    facts = setting.facts()
    arms: dict[str, dict[str, float]] = {"six in ten": {"share": SHARE}, "before": facts}
    items: dict[str, dict[str, list[float]]] = {}
    for arm in ARMS:
        dpo, tuning = rates[arm]
        drafts = setting.written(arm, dpo)
        right = setting.right(setting.taught(arm, drafts, tuning), setting.world.held_out)
        arms[arm] = {"answers": float(np.mean(right)), "share": setting.share(drafts), "examples": float(len(drafts))}
        arms[arm]["examples right"] = float(np.mean([setting.world.is_right(draft) for draft in drafts]))
        items[arm] = {"answers": right}
    unmet = []
    if facts["given"] < KNOWN:
        unmet.append(f"the student answers {facts['given']:.0%} of the liked dialect's symbols")
    if facts["liked"] - facts["others"] < SPREAD:
        unmet.append(f"drafts score {facts['liked']:.2f} in the liked dialect and {facts['others']:.2f} in others")
    notes = {f"rates, {arm}": f"DPO {dpo:g}, tuning {tuning:g}" for arm, (dpo, tuning) in rates.items()}
    world = [setting.world.symbol, setting.world.alphabets, setting.world.answers]
    return Measured(arms=arms, items=items, data_fingerprint=cache_key(world), unmet=unmet, notes=notes)


def _middle() -> dict[str, tuple[float, float]]:
    return dict.fromkeys(ARMS, (DPO_RATES[1], STUDENT_RATES[1]))


def _tuned(size: Size, directory: Path) -> dict[str, tuple[float, float]]:
    """Rates of DPO and of tuning for each arm, by validation in a world of its own; found once per claim."""
    place = directory.parents[1] / "small-tuning" / directory.name
    path = place / "rates.json"
    if path.exists():
        return {arm: (dpo, tuning) for arm, (dpo, tuning) in json.loads(path.read_text(encoding="utf-8")).items()}
    setting = Setting.make(size, TUNING_SEED, place)
    valid, middle = setting.world.valid, STUDENT_RATES[1]

    def worth(arm: str, drafts: Sequence[Draft], rate: float) -> tuple[float, float]:
        reader = setting.taught(arm, drafts, rate)
        return float(np.mean(setting.right(reader, valid))), -setting.nats(reader, valid)

    found = {}
    for arm in ARMS:
        sets = {rate: setting.written(arm, rate) for rate in (DPO_RATES[1:2] if arm == "unaligned" else DPO_RATES)}
        dpo = max(sets, key=lambda rate: worth(arm, sets[rate], middle))
        found[arm] = dpo, max(STUDENT_RATES, key=partial(worth, arm, sets[dpo]))
    atomic_write_text(path, json.dumps(found) + "\n")
    return found


CLAIM = Claim(
    id="arte",
    statement="A student tuned on data from a teacher that was aligned with its preferences answers more questions "
    "about unseen entities than one tuned on as much data from the same teacher before.",
    source="Liu et al., arXiv:2406.19227: Gemma-2B tuned on data of the aligned teacher is better on Big-Bench-Hard, "
    "in domain and out, than on data of the teacher as it was.",
    parts=(
        Part(
            "It answers at least 15 points more of the questions about held-out entities, with rationales of its own, "
            "than after a set of the unaligned teacher",
            "answers",
            "arte",
            "unaligned",
            "higher",
            0.15,
            units="seeds and questions",
        ),
        Part(
            "More than 0.6 of what the aligned teacher writes is in the dialect that the student knows the answers of, "
            "where chance is 0.25",
            "share",
            "arte",
            "six in ten",
            "higher",
            0.0,
        ),
        Part(
            "It answers at least 15 points more than after a set of a teacher aligned on random pairs",
            "answers",
            "arte",
            "random pairs",
            "higher",
            0.15,
            units="seeds and questions",
            decides=False,
        ),
    ),
    rival="unaligned",
    preconditions=(
        f"the student answers at least {KNOWN:.0%} of the liked dialect's symbols of held-out entities",
        f"one-shot scores of drafts in the liked dialect are higher by {SPREAD} than those of others",
    ),
    seeds={"smoke": (100,), "small": (100, 101, 102)},
    measure=measure,
)
