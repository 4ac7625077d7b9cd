"""ARTE: a teacher learns by preference optimisation which training data help this student, and then writes them.

    elicit    seed questions -> the teacher's question drafts -> rationales of each
    score     s(q, r) = accuracy of the untrained student on preference questions, shown (q, r) as its only example
    pairs     of questions of one seed, of rationales of one question: better and worse by s
    align     loss = -log sigmoid(beta [(log pi(c) - log ref(c)) - (log pi(r) - log ref(r))]),  beta = 0.1
    tailor    the aligned teacher writes questions and rationales; the student learns the rationales

Source: Liu et al., "Aligning Teacher with Student Preferences for Tailored Training Data Generation",
    arXiv:2406.19227. Which prompts, how many drafts and which rates the authors used is not known to us: the
    prompts are ours, and the numbers are fields.
Differs: one round; for another, merge the adapter and name the result as ``teacher``. Pairs of rationales that were
    asked for in several styles are learned under the first style, which also writes the tailored set. Preference
    questions are chosen by p (1 - p), or by a two-parameter model. ``mode: select`` is another method: the best of the
    unaligned teacher's drafts, for teachers behind an endpoint. As a student writes before it answers, the family's
    ``exact`` says little here; ``eval/held_out/answer`` is the share of rationales that end in the right answer.
Needs: a teacher that follows instructions, local for ``align``; a small pretrained student; seed questions; further
    questions with answers for preferences and validation, and for the figure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from transformers import PreTrainedModel

from headwater.core.budget import Cost
from headwater.core.cache import atomic_path, atomic_write_text
from headwater.core.launch import wait_for_launched
from headwater.core.optim import OptimSpec
from headwater.core.recipe import CorpusRef, DataRef, Metrics, ModelRef, Name
from headwater.core.rng import derive_seed
from headwater.corpora.arte_drafts import (
    Draft,
    Elicited,
    Form,
    TeacherPrompts,
    Unseen,
    elicit,
    parse_rationale,
    read_drafts,
    tailor,
    write_drafts,
)
from headwater.corpora.arte_scores import (
    Metric,
    NoPreference,
    draft_pairs,
    icl_score,
    icl_scores,
    preference_pairs,
    select_discriminative,
)
from headwater.corpora.arte_teacher import DPOSpec, align_teacher
from headwater.corpora.base import CorpusRecipe, TableName
from headwater.corpora.context import CorpusContext
from headwater.corpora.evaluation import pair_reader
from headwater.corpora.plan import Corpus, Reading
from headwater.modalities.models import load_model, load_tokenizer, local_directory
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.generate import GeneratorSpec, HFSpec, open_generator
from headwater.modalities.text.instruct import AnswerFormatter, exact_match
from headwater.modalities.text.pairs import Pairs, source_digest
from headwater.modalities.text.preference import Preference, dpo_loss
from headwater.modalities.text.sources import open_labelled

__all__ = [
    "Arte",
    "Draft",
    "Form",
    "NoPreference",
    "TeacherPrompts",
    "align_teacher",
    "dpo_loss",
    "draft_pairs",
    "elicit",
    "icl_score",
    "icl_scores",
    "preference_pairs",
    "select_discriminative",
    "tailor",
]


class Arte(CorpusRecipe):
    """Distillation on a training set that was tailored to the student, which is ``model``."""

    id: ClassVar[str] = "arte"

    sources: dict[TableName, CorpusRef] = Field(default={}, max_length=0, description="none; the teacher writes")
    model: ModelRef = Field(description="the student: causal model and tokenizer, Hub name or local directory")
    from_scratch: bool = Field(default=False, description="draw new weights; false continues from the model's own")
    teacher: GeneratorSpec = Field(description="what writes; a model on this machine, unless `mode` is select")
    mode: Literal["align", "select"] = Field(
        default="align",
        description="align: the teacher learns the student's preferences, then writes; select: the best of its drafts "
        "are read, which is another method than the paper's",
    )
    seeds: CorpusRef = Field(description="questions of the task, one a document")
    validation: DataRef = Field(
        description="questions (`input_field`) and answers (`label_field`): preferences, and what is chosen by"
    )
    test: DataRef = Field(description="further ones, for the figure; nothing that repeats them is read")
    n_questions: int = Field(default=4, gt=0, le=1000, description="question drafts for each seed")
    n_rationales: int = Field(default=4, gt=1, le=1000, description="rationales for each question draft")
    n_pref: int = Field(
        default=40, gt=0, description="validation questions that drafts are scored by, those that tell them apart best"
    )  # as in the paper
    discrimination: Literal["variance", "2pl"] = Field(
        default="variance", description="how these are found: p (1 - p), or the information in a two-parameter model"
    )
    score: Metric = Field(
        default="accuracy",
        description="accuracy of the student's own rationale; nll: likelihood of the right answer at once",
    )
    score_device: Name | None = Field(
        default=None, description="where the student is scored, such as `cuda:0`; by default the CPU"
    )
    margin: float = Field(default=0.05, gt=0, description="by which a draft must be better, in the unit of the score")
    pairs_per_group: int | None = Field(
        default=None, gt=0, description="pairs of one seed or one question at most, those that differ most; null: all"
    )
    dpo: DPOSpec = Field(default=DPOSpec(), description="how the teacher is aligned")
    n_final: int = Field(default=1000, gt=0, description="examples of the tailored set")
    prompts: TeacherPrompts = Field(default=TeacherPrompts(), description="what the teacher is asked")
    marker: str = Field(default="The answer is", min_length=1, description="words before an answer in a rationale")
    ask: str = Field(
        default="Question: {question}\nAnswer:", pattern=r"\{question\}", description="how the student is asked"
    )
    between: str = Field(default="\n\n", description="stands between an example and the question after it")
    reply_tokens: int = Field(default=512, gt=0, description="tokens of a question or a rationale, at most")
    temperature: float = Field(default=1.0, ge=0, description="of drawing drafts; 0 is greedy")
    max_answer: int = Field(default=256, gt=0, description="tokens of a rationale that the student writes")
    optim: OptimSpec = Field(default=OptimSpec(lr=2e-5, warmup=0.05), description="how the student's weights are moved")

    @model_validator(mode="after")
    def _teacher_can_be_aligned(self) -> Self:
        if self.mode == "align" and not isinstance(self.teacher, HFSpec):
            raise ValueError(
                "mode 'align' tunes the teacher, which must be a model on this machine (kind: hf); give mode: select "
                "for an endpoint, which takes the best of its drafts instead"
            )
        return self

    @property
    def form(self) -> Form:
        """How the student is asked and shown an example."""
        return Form(self.ask, self.join, self.between, self.marker)

    def asked(self) -> dict[str, Pairs]:
        """The test questions and those for choosing, as the student is asked them, beside the recipe's own."""
        own = {"held_out": self._labelled("test"), "valid": self._labelled("validation")}
        return super().asked() | {
            name: Pairs(
                [self.form.prompt(question) for question in pairs.sources],
                [f"{self.marker} {answer}" for answer in pairs.targets],
            )
            for name, pairs in own.items()
        }

    def _labelled(self, role: Literal["test", "validation"]) -> Pairs:
        return Pairs(*open_labelled(getattr(self, role), role=role))

    def build(self, ctx: CorpusContext) -> Corpus:
        """Elicit, score, pair, align and tailor; each step leaves a file, by which a resumed run does not repeat it."""
        validation, test = self._labelled("validation"), self._labelled("test")
        for role, pairs in (("validation", validation), ("test", test)):
            ctx.run.record_data(role, pairs.fingerprint)
        if same := {source_digest(s) for s in validation.sources} & {source_digest(s) for s in test.sources}:
            raise CorpusError(f"validation and test share {len(same)} questions; what is asked must not be chosen by.")
        # What the teacher writes may repeat no question of any set; the answers are not looked at.
        further = [source for pairs in super().asked().values() for source in pairs.sources]
        unseen = Unseen([*validation.sources, *test.sources, *further])
        seeds = self._seeds(ctx, unseen)
        directory = ctx.run.directory
        if ctx.run.is_main_process and not (directory / "drafts.parquet").exists():
            self._elicit(ctx, seeds, unseen)
        if ctx.run.is_main_process and not (directory / "scores.npz").exists():
            self._score(ctx, validation)
        if ctx.run.is_main_process and not (directory / "tailored.parquet").exists() and self.mode == "select":
            self._select(ctx)
        wait_for_launched()
        if self.mode == "align":
            self._align(ctx, seeds)
            if ctx.run.is_main_process and not (directory / "tailored.parquet").exists():
                self._tailor(ctx, seeds, unseen)
            wait_for_launched()
        drafts = read_drafts(directory / "tailored.parquet")
        figures = self._figures(ctx, validation, drafts)
        made = ("scores.npz", "drafts.parquet", "tailored.parquet", "answers.jsonl")
        return Corpus(
            (Reading("train", 1.0, ("tailored",), format=AnswerFormatter(ctx.tokenizer)),),
            {"tailored": [self.form.document(draft, str(number)) for number, draft in enumerate(drafts)]},
            examine=lambda model: figures | self._answers(ctx, model, {"eval/held_out": test, "valid": validation}),
            usage={"ask": self.ask, "join": self.join, "marker": self.marker},
            readme=f"Asked `{self.ask}` it writes a rationale that ends in `{self.marker}` and the answer.",
            files=(*made, "pairs.jsonl", "teacher") if self.mode == "align" else made,
        )

    def _seeds(self, ctx: CorpusContext, unseen: Unseen) -> list[str]:
        given = [document.text.strip() for document in ctx.read(self.seeds, "seeds")]
        kept = [text for text in given if not unseen.repeats(text)]
        if not kept:
            raise CorpusError(f"seeds: all {len(given)} questions repeat validation or test questions; give others.")
        if len(kept) < len(given):
            ctx.warn("seeds", f"{len(given) - len(kept)} of {len(given)} seeds repeat questions that are asked")
        return kept

    def _written(self, ctx: CorpusContext, found: Elicited, name: str, file: str, room: int) -> None:
        """Keep the drafts that fit the student, after what they cost: that the drafts are there means that both are."""
        texts = [self.form.shot(draft) for draft in found.drafts]
        lengths = [len(ids) for ids in ctx.tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []
        kept = [draft for draft, length in zip(found.drafts, lengths, strict=True) if length <= room]
        counts = dict(found.counts) | {"too_long": len(found.drafts) - len(kept)}
        if not kept:
            raise CorpusError(
                f"the teacher wrote no draft that can be used: {json.dumps(counts)}. A rationale must hold the marker "
                f"{self.marker!r} and an answer; change the prompts or the teacher."
            )
        ctx.run.write_json(name, {"counts": counts, "usd": found.usd})
        write_drafts(kept, ctx.run.path(file))

    def _elicit(self, ctx: CorpusContext, seeds: Sequence[str], unseen: Unseen) -> None:
        prompts = [self.form.prompt(question) for question in self._labelled("validation").sources]
        longest = max(len(ids) for ids in ctx.tokenizer(prompts, add_special_tokens=False)["input_ids"])
        if (room := self.seq_len - self.max_answer - longest - 1) < 1:
            raise CorpusError(
                f"a validation question of {longest} tokens and max_answer ({self.max_answer}) leave no room for an "
                f"example in seq_len {self.seq_len}; raise it, or lower max_answer."
            )
        with open_generator(self.teacher) as generator:
            found = elicit(
                generator, seeds, self.n_questions, self.n_rationales, self.prompts, **self._drawing(unseen, "drafts")
            )
        self._written(ctx, found, "elicitation.json", "drafts.parquet", room)

    def _drawing(self, unseen: Unseen, name: str) -> dict[str, Any]:  # Any: keywords of several types
        return {
            "marker": self.marker,
            "unseen": unseen,
            "reply_tokens": self.reply_tokens,
            "temperature": self.temperature,
            "seed": derive_seed(self.seed, name) % 2**31,  # what servers take
        }

    def _score(self, ctx: CorpusContext, validation: Pairs) -> None:
        drafts = read_drafts(ctx.run.path("drafts.parquet"))
        if self.score_device is not None:
            ctx.model.to(self.score_device)
        matrix = icl_scores(
            ctx.model, ctx.tokenizer, drafts, validation, self.score, form=self.form, max_answer=self.max_answer
        )
        chosen = select_discriminative(matrix, self.n_pref, self.discrimination)
        with atomic_path(ctx.run.path("scores.npz")) as place, place.open("wb") as file:
            np.savez(file, scores=matrix, chosen=chosen)

    def _scores(self, ctx: CorpusContext) -> NDArray[np.float64]:
        """Of each draft, by the preference questions."""
        with np.load(ctx.run.nested("scores.npz"), allow_pickle=False) as stored:
            found: NDArray[np.float64] = stored["scores"][:, stored["chosen"]].mean(axis=1)
        return found

    def _select(self, ctx: CorpusContext) -> None:
        """The best rationale of each question, the best ``n_final`` of these."""
        drafts, scores = read_drafts(ctx.run.path("drafts.parquet")), self._scores(ctx)
        if np.ptp(scores) < self.margin:
            raise NoPreference(
                f"scores of {len(drafts)} drafts are all within {np.ptp(scores):.3g}, less than margin {self.margin}. "
                "Give harder preference questions, or more rationales, or score by 'nll'."
            )
        best: dict[str, int] = {}
        for row in np.argsort(-scores, kind="stable").tolist():
            best.setdefault(drafts[row].question, row)
        write_drafts([drafts[row] for row in list(best.values())[: self.n_final]], ctx.run.path("tailored.parquet"))

    def _align(self, ctx: CorpusContext, seeds: Sequence[str]) -> None:
        """Make pairs and train the teacher; every process takes part. What it cost is charged either way."""
        assert isinstance(self.teacher, HFSpec), "checked when the recipe was made"
        record, directory = ctx.run.nested("alignment.json"), ctx.run.nested("teacher")
        if not record.exists():
            drafts = read_drafts(ctx.run.nested("drafts.parquet"))
            pairs = draft_pairs(
                drafts, self._scores(ctx), seeds, self.prompts, margin=self.margin, per_group=self.pairs_per_group
            )
            if (local_directory(self.teacher.model) / "adapter_config.json").exists():
                raise CorpusError("teacher: an adapter cannot be aligned by another; merge it first.")
            model: Any = load_model(self.teacher.model, "causal")  # Any: declared as a plain module
            tokenizer = load_tokenizer(self.teacher.model)
            place = ctx.run.nested("alignment")
            trained = align_teacher(model, tokenizer, pairs, self.dpo, seed=self.seed, directory=place)
            if ctx.run.is_main_process:
                lines = "".join(json.dumps(asdict(pair)) + "\n" for pair in pairs)
                atomic_write_text(ctx.run.path("pairs.jsonl"), lines)
                trained.model.save_pretrained(directory)  # type: ignore[operator]  # a Hugging Face or PEFT model
                tokenizer.save_pretrained(directory)
                name = "peft.AutoPeftModelForCausalLM" if self.dpo.lora else "transformers.AutoModelForCausalLM"
                atomic_write_text(
                    directory / "README.md",
                    f"# Teacher\n\n`{self.teacher.model.name}`, aligned with the preferences of `{self.model.name}`. "
                    f"`{name}.from_pretrained(DIR)` opens it.\n",
                )
                ctx.run.write_json("alignment.json", trained.cost.to_dict())
            wait_for_launched()
        ctx.meter.add(Cost.from_dict(json.loads(record.read_text(encoding="utf-8"))))

    def _tailor(self, ctx: CorpusContext, seeds: Sequence[str], unseen: Unseen) -> None:
        assert isinstance(self.teacher, HFSpec), "checked when the recipe was made"
        aligned = self.teacher.model.model_copy(update={"name": str(ctx.run.nested("teacher")), "revision": None})
        with open_generator(self.teacher.model_copy(update={"model": aligned})) as generator:
            found = tailor(generator, seeds, self.n_final, self.prompts, **self._drawing(unseen, "tailored"))
        self._written(ctx, found, "tailoring.json", "tailored.parquet", self.seq_len - 2)  # start token and EOS

    def _figures(self, ctx: CorpusContext, validation: Pairs, tailored: Sequence[Draft]) -> Metrics:
        """What was written and preferred, and warnings; a function of the files of the run."""
        scores = self._scores(ctx)
        figures = {"drafts": float(len(scores)), "tailored": float(len(tailored))}
        figures |= {"draft_score": float(scores.mean()), "draft_score_best": float(scores.max())}
        if self.n_pref > len(validation):
            ctx.warn(
                "n_pref", f"n_pref is {self.n_pref} and there are {len(validation)} validation questions; all serve"
            )
        if len(tailored) < self.n_final:
            ctx.warn("n_final", f"{len(tailored)} examples could be used, not the {self.n_final} of n_final")
        kinds = ("requests", "prompt_tokens", "completion_tokens")
        steps = ["elicitation.json", "tailoring.json"] if self.mode == "align" else ["elicitation.json"]
        records = [json.loads(ctx.run.nested(step).read_text(encoding="utf-8")) for step in steps]
        total = {kind: sum(record["counts"].get(kind, 0) for record in records) for kind in kinds}
        figures |= {f"generator_{kind}": float(count) for kind, count in total.items()}
        if all(record["usd"] is not None for record in records):
            figures["generator_usd"] = float(sum(record["usd"] for record in records))
        for reason in ("failed", "empty", "unparsed", "leaked", "too_long"):
            figures[f"drafts_{reason}"] = float(sum(record["counts"].get(reason, 0) for record in records))
        if self.mode == "align":
            lines = ctx.run.nested("pairs.jsonl").read_text(encoding="utf-8").splitlines()
            pairs = [Preference(**json.loads(line)) for line in lines]
            for kind in ("question", "rationale"):
                figures[f"pairs_{kind}"] = float(sum(pair.kind == kind for pair in pairs))
        return figures

    def _answers(self, ctx: CorpusContext, model: PreTrainedModel, sets: Mapping[str, Pairs]) -> Metrics:
        """The share of questions of each set whose rationale ends in the right answer; writes ``answers.jsonl``."""
        metrics: Metrics = {}
        lines = []
        reader = pair_reader(ctx, model)
        for place, pairs in sets.items():
            written = reader.answers([self.form.prompt(question) for question in pairs.sources])
            parsed = [parse_rationale(text, self.marker) for text in written]
            right = [
                exact_match(found[1], answer) if found else 0.0
                for found, answer in zip(parsed, pairs.targets, strict=True)
            ]
            metrics[f"{place}/answer"] = float(np.mean(right))
            rows = zip(pairs.sources, written, pairs.targets, right, strict=True)
            lines += [
                json.dumps({"set": place, "question": question, "written": text, "right": answer, "exact": exact})
                for question, text, answer, exact in rows
            ]
        atomic_write_text(ctx.run.path("answers.jsonl"), "".join(line + "\n" for line in lines))
        return metrics
