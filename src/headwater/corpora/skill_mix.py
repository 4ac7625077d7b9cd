"""Skill-Mix: learn to show a few named skills in one short text, and be asked for more of them, and for others.

    read    k skills of the training categories and a topic, k = 1, 2, 3   ->   a text with full marks
    asked   k = 2 ... 5 skills, of those categories and of the held-out ones, on other topics

A generator writes the texts and improves them in a second turn; a grader gives a point for each skill shown, and one
each for topic, length and sense; what has full marks is kept, and the conversations are learned, answers only. In the
end the trained model writes for combinations that no text was for, and the same grader says what they are worth.

Source: Zhao et al., "Can Models Learn Skill Composition from Examples?", arXiv:2409.19808; the evaluation is of Yu et
    al., "Skill-Mix", arXiv:2310.17567. Unverified: how many texts and steps (here 5000 for each k; ``budget``), the
    learning rate of 2e-5, one sentence for k = 1, which categories are learned, and the temperature of 0.7.
Differs: the wording of all prompts is ours, and replies are the text alone, without an explanation. Skills and topics
    are the user's; no list is shipped. A combination that is asked is never written for. What all skills together are
    worth is not asked, only each side. A twentieth of the texts is kept for validation. Without a chat template a
    conversation is lines ``role: content``, one example for each answer. ``replay_rate`` is ours.
Needs: skills in categories, topics; a generator that follows instructions, or texts of another run; a grader, another
    model than the one that is trained; general text or conversations, to see what is forgotten.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from headwater.core.cache import atomic_write_text
from headwater.core.launch import wait_for_launched
from headwater.core.optim import OptimSpec
from headwater.core.recipe import CorpusRef, Metrics, ModelRef, Name
from headwater.core.rng import numpy_generator
from headwater.corpora.base import CorpusRecipe, TableName
from headwater.corpora.context import CorpusContext
from headwater.corpora.instructed import csv_table
from headwater.corpora.plan import Corpus, Reading
from headwater.corpora.reading import watcher
from headwater.corpora.skill_mix_grades import Grade, Grader, Judge, PerCombo, RuleGrader, RuleSpec, skill_mix_scores
from headwater.corpora.skill_mix_prompts import SkillMixPrompts
from headwater.corpora.skill_mix_skills import (
    Combination,
    Skill,
    SkillSet,
    combination_key,
    draw_combinations,
    normalised,
)
from headwater.corpora.skill_mix_texts import (
    Keep,
    SkillText,
    build_dataset,
    grade_texts,
    kept,
    score_texts,
    write_table,
    write_texts,
)
from headwater.corpora.skill_mix_world import SkillWorld, drawn
from headwater.modalities.text.conversations import ConversationFormatter
from headwater.modalities.text.docs import CorpusError, split_sides
from headwater.modalities.text.document_store import DocumentStore
from headwater.modalities.text.generate import GeneratorSpec, HFSpec, HTTPSpec, open_generator
from headwater.modalities.text.generate_store import Usage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Combination",
    "Grade",
    "Grader",
    "RuleGrader",
    "RuleSpec",
    "Skill",
    "SkillMix",
    "SkillMixPrompts",
    "SkillSet",
    "build_dataset",
    "draw_combinations",
    "grade_texts",
    "score_texts",
    "skill_mix_scores",
    "write_texts",
]

VALID = 0.05
"""Share of the texts that is kept for validation, by their ids."""


class SkillMix(CorpusRecipe):
    """Training on texts that show a few skills at once, asked for more and for others."""

    id: ClassVar[str] = "skill_mix"

    sources: dict[TableName, CorpusRef] = Field(
        min_length=1,
        description="name -> general texts, or conversations (rows with `messages`); their held-out part shows what "
        "is forgotten, and `replay_rate` of every batch is read of the others",
    )
    skills: Path = Field(
        description="JSON lines, JSON or YAML: a list of objects with name, category, definition and example"
    )
    topics: Path = Field(description="topics: a text file with one in a line, or a list in JSON lines, JSON or YAML")
    train_categories: tuple[Name, ...] = Field(
        default=("literary", "rhetorical"), min_length=1, description="skills to learn; those of others are held out"
    )
    train_topics: float = Field(
        default=0.5, gt=0, le=1, description="share of topics to learn on, others are asked; 1 shares all of them"
    )
    split_seed: int = Field(
        default=0, ge=0, lt=2**63, description="draws topics and what is asked, the same for all seeds"
    )
    generator: GeneratorSpec | None = Field(default=None, description="what writes the texts")
    texts: CorpusRef | None = Field(
        default=None,
        description="in place of a generator: conversations written before, e.g. `skillmix/train.parquet` of another "
        "run, or any rows with `text` and `messages`",
    )
    grader: Annotated[HFSpec | HTTPSpec | RuleSpec, Field(discriminator="kind")] = Field(
        description="what grades texts: a generator, or {kind: rules, use: MODULE:NAME}"
    )
    allow_self_grading: bool = Field(default=False, description="let a model grade what it becomes")
    prompts: Path | None = Field(default=None, description="TOML file with other words: write, improve, grade")
    k_train: tuple[Annotated[int, Field(ge=1, le=100)], ...] = Field(
        default=(1, 2, 3), min_length=1, description="skills in a text that is written to be learned"
    )
    n_per_k: int = Field(default=5000, gt=0, description="combinations to write for, for each k; fewer if there are")
    keep: Keep = Field(default="full_marks", description="which texts are learned")
    second_turn: bool = Field(default=True, description="ask to check and improve each text")
    reply_tokens: int = Field(default=256, gt=0, description="tokens of a text, at most")
    temperature: float = Field(default=0.7, ge=0, description="of drawing texts, also when asked; 0 is greedy")
    k_eval: tuple[Annotated[int, Field(ge=1, le=100)], ...] = Field(
        default=(2, 3, 4, 5), min_length=1, description="skills in a text that the trained model is asked for"
    )
    eval_samples: int = Field(default=100, gt=0, description="combinations that are asked, for each k and side")
    generations_per_combo: int = Field(default=3, gt=0, le=1000, description="texts for each combination that is asked")
    per_combo: PerCombo = Field(default="max", description="what counts of them: the best, or their mean")
    replay_rate: float = Field(default=0.0, ge=0, lt=1, description="share of the sources in every batch")
    from_scratch: bool = Field(default=False, description="draw new weights; false continues from the model's own")
    optim: OptimSpec = Field(default=OptimSpec(lr=2e-5, weight_decay=0.0), description="how weights are moved")

    @field_validator("k_train", "k_eval")
    @classmethod
    def _each_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"every k is meant once; got {list(value)}")
        return value

    @model_validator(mode="after")
    def _texts_come_from_somewhere(self) -> Self:
        if (self.generator is None) == (self.texts is None):
            raise ValueError("give one of `generator`, which writes the texts, and `texts`, written before")
        if self.temperature == 0 and self.generations_per_combo > 1:
            raise ValueError("at temperature 0 all texts for a combination are equal; set generations_per_combo to 1")
        return self

    @model_validator(mode="after")
    def _another_grades(self) -> Self:
        if self.grader.kind == "rules" or self.allow_self_grading or not isinstance(self.model, ModelRef):
            return self
        if _place(self.grader.model) == _place(self.model):
            raise ValueError(
                f"grader is {str(self.model)!r}, the model that is trained, which would judge its own kind; give "
                "another, or set allow_self_grading"
            )
        return self

    def build(self, ctx: CorpusContext) -> Corpus:
        """One table of conversations, and what is replayed; the trained model is asked in ``examine``."""
        world = self._world()
        ctx.run.record_data("skills", world.fingerprint)
        directory = ctx.run.nested("skillmix")
        for k in world.too_many:
            ctx.warn("k_eval", f"k = {k} is not asked of held-out skills, of which there are {len(world.held_out)}")
        written: Metrics = {}
        ref = self.texts
        if ref is None:
            if ctx.run.is_main_process and not (directory / "synthesis.json").exists():
                self._write(world, directory)
            wait_for_launched()
            written = self._written(ctx, directory)
            ref = CorpusRef(name=str(directory / "train.parquet"))
        formatter = ConversationFormatter(ctx.tokenizer)
        found, left_out = self._usable(ctx, world, ctx.read(ref, "texts"), formatter)
        sides = split_sides(found.ids(), (1 - VALID, VALID, 0.0))
        train, valid = (found.select([i for i, side in enumerate(sides) if side == s]) for s in (0, 1))
        if not train:  # of a handful of texts all may fall on the other side
            train, valid = valid, train
        watched = {"texts": valid} if valid else {}
        losses = watcher(ctx, watched, formatter)

        def midway(model: PreTrainedModel) -> Metrics:
            return {f"valid/{name}_nll": loss for name, loss in losses(model).items()}

        replay = {f"replay-{n}": s.train for n, s in ctx.sources.items()} if self.replay_rate else {}
        total = sum(map(len, replay.values()))
        weights = (1 - self.replay_rate, *(self.replay_rate * len(table) / total for table in replay.values()))
        return Corpus(
            (Reading("train", 1.0, ("texts", *replay), weights, formatter),),
            {"texts": train, **replay},
            midway=midway,
            examine=partial(self._examine, ctx, world, {**written, **left_out}),
            usage=self._usage(ctx),
            readme=_README,
            files=("skillmix",),
        )

    def _world(self) -> SkillWorld:
        if isinstance(self.grader, RuleSpec) and (lacking := self.grader.open().unknown(SkillSet.load(self.skills))):
            raise CorpusError(f"grader: {self.grader.use!r} has no rule for the skill {lacking[0]!r}.")
        return SkillWorld.open(
            self.skills,
            self.topics,
            train_categories=self.train_categories,
            train_topics=self.train_topics,
            k_eval=self.k_eval,
            eval_samples=self.eval_samples,
            seed=self.split_seed,
        )

    def _usable(
        self, ctx: CorpusContext, world: SkillWorld, texts: DocumentStore, formatter: ConversationFormatter
    ) -> tuple[DocumentStore, Metrics]:
        """Texts that show no held-out skill, are not asked for, and fit into a row; and how many are not."""
        asked = {combination.key for of in world.asked.values() for combination in of}
        held = {normalised(skill.name) for skill in world.held_out}
        chosen, repeated, too_long = [], 0, 0
        for place, document in enumerate(texts):
            names = [str(name) for name in document.meta.get("skills") or ()]
            if shown := sorted(held & set(map(normalised, names))):
                raise CorpusError(f"texts: document {document.id!r} is about the held-out skill {shown[0]!r}.")
            if not document.meta.get("messages"):
                raise CorpusError(f"texts: document {document.id!r} has no `messages`, so nothing is its answer.")
            if combination_key(names, str(document.meta.get("topic"))) in asked:
                repeated += 1
            elif ctx.room is not None and formatter.longest(document) > ctx.room:
                too_long += 1
            else:
                chosen.append(place)
        if repeated:
            ctx.warn("asked", f"{repeated} texts are for combinations that will be asked, and were left out")
        if too_long:
            ctx.warn("long", f"{too_long} conversations are longer than seq_len and were left out")
        if not chosen:
            raise CorpusError(
                f"texts: of {len(texts)} conversations {too_long} are longer than seq_len ({self.seq_len}) and "
                f"{repeated} will be asked, so nothing is left to learn from."
            )
        return texts.select(chosen), {"data/asked": float(repeated), "data/too_long": float(too_long)}

    # -- writing

    def _write(self, world: SkillWorld, directory: Path) -> None:
        """Have the texts written and graded. A stopped run asks again and is answered from the generator's cache."""
        assert self.generator is not None, "checked when the recipe was made"
        begin = time.monotonic()
        avoided = [combination for of in world.asked.values() for combination in of]
        combinations: list[Combination] = []
        for k in sorted(self.k_train):
            rng = numpy_generator(self.seed, "combinations", k)
            combinations += drawn(world.train, world.topics, k, self.n_per_k, rng, avoided)
        if not combinations:
            raise CorpusError(
                f"every combination of {sorted(self.k_train)} skills and a topic will be asked, so there is none to "
                "write for; lower eval_samples or train_topics."
            )
        prompts = SkillMixPrompts.read(self.prompts)
        with open_generator(self.generator) as generator:
            texts = write_texts(
                generator,
                combinations,
                prompts,
                second_turn=self.second_turn,
                reply_tokens=self.reply_tokens,
                temperature=self.temperature,
            )
        with self._judge() as (judge, grading):
            texts = grade_texts(judge, texts)
        usages = [(self.generator, generator.usage), (self.grader, grading)]
        costs = _costs([(spec, usage) for spec, usage in usages if usage is not None])
        write_table(texts, directory / "written.parquet")
        learned = kept(texts, self.keep)
        write_table(learned, directory / "train.parquet")
        if "generator_usd" in costs:
            costs["usd_per_text"] = costs["generator_usd"] / len(learned)
        figures = {
            "texts_written": len(texts),
            "texts_kept": len(learned),
            "texts_failed": sum(text.error is not None for text in texts),
            "texts_ungraded": sum(text.ungraded is not None for text in texts),
            **costs,
            "generator_seconds": time.monotonic() - begin,
        }
        atomic_write_text(directory / "synthesis.json", json.dumps(figures, indent=2) + "\n")

    def _written(self, ctx: CorpusContext, directory: Path) -> Metrics:
        """What was written, and warnings about what was not; a function of the files of the run."""
        figures = json.loads((directory / "synthesis.json").read_text(encoding="utf-8"))
        planned = self.n_per_k * len(self.k_train)
        if figures["texts_written"] < planned:
            ctx.warn(
                "clipped",
                f"{figures['texts_written']} texts were written, not {planned}, as for some k there are fewer "
                "combinations of skills and topics than n_per_k",
            )
        if lost := figures["texts_failed"] + figures["texts_ungraded"]:
            ctx.warn("lost", f"{lost} of {figures['texts_written']} texts were not written, or got no grade")
        return {name: float(value) for name, value in figures.items()}

    @contextmanager
    def _judge(self) -> Iterator[tuple[Judge, Usage | None]]:
        if isinstance(self.grader, RuleSpec):
            yield self.grader.open(), None
            return
        with open_generator(self.grader) as generator:
            yield Grader(generator, SkillMixPrompts.read(self.prompts)), generator.usage

    # -- asking

    def _examine(self, ctx: CorpusContext, world: SkillWorld, before: Metrics, model: PreTrainedModel) -> Metrics:
        """Have the trained model write for what is asked, and grade it."""
        from headwater.modalities.text.generate_hf import HFGenerator

        generator, prompts = HFGenerator(model, ctx.tokenizer), SkillMixPrompts.read(self.prompts)
        texts: list[SkillText] = []
        metrics, rows = dict(before), []
        with self._judge() as (judge, usage):
            for (pool, k), combinations in world.asked.items():
                own = write_texts(
                    generator,
                    combinations,
                    prompts,
                    second_turn=self.second_turn,
                    samples=self.generations_per_combo,
                    reply_tokens=self.reply_tokens,
                    temperature=self.temperature,
                )
                own = grade_texts(judge, own)
                scores = score_texts(own, self.per_combo)
                lost = sum(text.grade is None for text in own)
                metrics |= {f"skillmix/k{k}/{pool}/{name}": value for name, value in scores.items()}
                rows.append((pool, k, len(combinations), len(own), lost, *scores.values()))
                texts += own
        lost = sum(text.grade is None for text in texts)
        if lost:
            ctx.warn("ungraded", f"{lost} of {len(texts)} texts that were asked for got no grade and do not count")
        if usage is not None:
            metrics |= {f"eval_{name}": value for name, value in _costs([(self.grader, usage)]).items()}
        header = ("pool", "k", "combinations", "texts", "ungraded", "full_marks", "all_skills", "skill_fraction")
        directory = ctx.run.path("skillmix")
        write_table(texts, directory / "eval.parquet")
        atomic_write_text(directory / "curves.csv", csv_table(header, rows))
        return metrics | {"skillmix/ungraded": float(lost)}

    def _usage(self, ctx: CorpusContext) -> Mapping[str, object]:
        prompts = SkillMixPrompts.read(self.prompts)
        return {
            "form": "chat template" if ctx.tokenizer.chat_template else "lines `role: content`, then `assistant:`",
            "write": prompts.write,
            "improve": prompts.improve if self.second_turn else None,
        }


_README = """Ask it as it was taught: `corpus.json` has the words of the first turn and of the second, with places in
braces, and whether the tokenizer's chat template writes the turns or lines `role: content` do. Each answer ends with
the end token. `skillmix/eval.parquet` beside this directory has examples with their grades, `curves.csv` the scores."""


def _place(model: object) -> str:
    path = Path(str(model)).expanduser()
    return str(path.resolve()) if path.exists() else str(model)


def _costs(used: Sequence[tuple[Any, Usage]]) -> Metrics:  # Any: specs of generators
    """Requests, tokens and, where a price is known for all, USD."""
    costs = {
        "generator_requests": float(sum(usage.requests for _, usage in used)),
        "generator_prompt_tokens": float(sum(usage.prompt_tokens for _, usage in used)),
        "generator_completion_tokens": float(sum(usage.completion_tokens for _, usage in used)),
    }
    if all(spec.kind == "hf" or spec.price is not None for spec, _ in used):
        costs["generator_usd"] = sum(usage.usd_total for _, usage in used)
    return costs
