"""The recipe Skill-Mix: what it has written, reads, asks and leaves, how it resumes, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from headwater.claims.skill_mix import PROMPTS as TERSE
from headwater.claims.skill_mix import RULES, SKILLS, scripted
from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.run import Run, execute
from headwater.corpora.context import CorpusContext
from headwater.corpora.skill_mix import Combination, SkillMixPrompts, draw_combinations, grade_texts, write_texts
from headwater.corpora.skill_mix_skills import combination_key
from headwater.corpora.skill_mix_texts import write_table
from headwater.modalities.text.conversations import ConversationFormatter, messages_of
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.generate import GeneratorError
from headwater.modalities.text.generate_hf import HFGenerator
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.tokenizers import word_tokenizer

Fields = dict[str, Any]


@pytest.fixture(scope="module")
def fields(skill_mix_fields: Fields) -> Fields:
    return {"method": "skill_mix", **skill_mix_fields}


@pytest.fixture(scope="module")
def finished(fields: Fields, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("skill_mix") / "run"
    return directory, execute(load_recipe(fields), directory)


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def plan(fields: Fields, directory: Path) -> tuple[CorpusContext, Any]:
    recipe: Any = load_recipe(fields)
    with Run(directory, recipe) as opened:
        ctx, _ = CorpusContext.open(recipe, opened)
        return ctx, recipe.build(ctx)


def test_property_held_out_skills_and_asked_combinations_are_never_read(
    fields: Fields, finished: tuple[Path, Any], tmp_path: Path
) -> None:
    directory, result = finished
    _, corpus = plan(fields, tmp_path / "again")
    category = {skill.name: skill.category for skill in SKILLS}
    asked = rows(directory / "skillmix" / "eval.parquet")
    keys = {combination_key(row["skills"], row["topic"]) for row in asked}
    read = corpus.tables["texts"]
    assert len(read) > 30
    for document in read:
        assert {category[name] for name in document.meta["skills"]} == {"learned"}
        assert combination_key(document.meta["skills"], document.meta["topic"]) not in keys
        words = {word for message in document.meta["messages"] for word in message["content"].split()}
        assert not words & {"s9", "s10", "s11", "s12"}
    assert {frozenset(category[name] for name in row["skills"]) for row in asked} == {
        frozenset({"learned"}),
        frozenset({"held"}),
    }
    assert not {row["topic"] for row in asked} & {d.meta["topic"] for d in read}, "half of the topics are asked"
    assert {row["k"] for row in asked} == {1, 2}
    assert {len(d.meta["skills"]) for d in read} == {1, 2, 3}
    assert result.metrics["texts_kept"] >= len(read)


def test_property_a_quarter_is_replayed_and_only_answers_are_learned_of_texts(fields: Fields, tmp_path: Path) -> None:
    ctx, corpus = plan(fields, tmp_path / "run")
    (reading,) = corpus.phases
    assert (reading.tables, reading.weights) == (("texts", "replay-text"), (0.75, 0.25))
    document = corpus.tables["texts"][0]
    turns = messages_of(document)
    assert [m.role for m in turns] == ["user", "assistant"] * 2
    examples = reading.format([document], 64)[0]
    learned = [ctx.tokenizer.decode(e.input_ids[e.trained]) for e in examples]
    assert learned == [f" {turn.content}{ctx.tokenizer.eos_token}" for turn in turns[1::2]]
    general = reading.format([corpus.tables["replay-text"][0]], 64)[0][0]
    assert general.trained[1:].all(), "general text is learned whole"
    without = plan({**fields, "replay_rate": 0.0}, tmp_path / "without")[1]
    assert set(without.tables) == {"texts"}


def test_oracle_the_curves_are_the_grades_of_what_the_saved_model_writes(
    fields: Fields, finished: tuple[Path, Any]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory, result = finished
    asked = rows(directory / "skillmix" / "eval.parquet")
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    by_name = {skill.name: skill for skill in SKILLS}
    chosen = [row for row in asked if row["k"] == 2 and row["sample"] == 0]
    combinations = [Combination(tuple(by_name[name] for name in row["skills"]), row["topic"]) for row in chosen]
    recipe: Any = load_recipe(fields)
    written = write_texts(
        HFGenerator(model, tokenizer), combinations, SkillMixPrompts.read(recipe.prompts), samples=2, reply_tokens=6
    )
    assert [t.text for t in written if t.sample == 0] == [row["answer"] for row in chosen]
    with (directory / "skillmix" / "curves.csv").open() as stream:
        curves = list(csv.DictReader(stream))
    assert [(row["pool"], row["k"]) for row in curves] == [(p, k) for p in ("train", "held_out") for k in "12"]
    for row in curves:
        for name in ("full_marks", "all_skills", "skill_fraction"):
            assert float(row[name]) == result.metrics[f"skillmix/k{row['k']}/{row['pool']}/{name}"]
        assert (row["combinations"], row["texts"], row["ungraded"]) == ("3", "6", "0")


def test_property_figures_files_and_warnings_say_what_was_written(finished: tuple[Path, Any]) -> None:
    directory, result = finished
    metrics = result.metrics
    written = rows(directory / "skillmix" / "written.parquet")
    assert metrics["texts_written"] == len(written)
    assert metrics["generator_requests"] == 2 * len(written), "two turns each"
    assert metrics["generator_usd"] == metrics["usd_per_text"] == 0
    assert metrics["generator_completion_tokens"] <= 6 * metrics["generator_requests"]
    # With 2 topics there are 16 texts of one skill, not 20.
    assert sum(row["k"] == 1 for row in written) == 16
    assert f"{len(written)} texts were written, not 60" in result.notes["warning/clipped"]
    trajectory = json.loads((directory / "trajectory.json").read_text())["series"]
    assert len(trajectory["valid/texts_nll"]) == 3
    readme = (directory / "model" / "README.md").read_text()
    assert "`skillmix`" in readme
    usage = json.loads((directory / "model" / "corpus.json").read_text())
    assert usage == {"form": "lines `role: content`, then `assistant:`", "write": "{names} {topic}", "improve": "go on"}


def test_fault_a_run_stopped_in_training_needs_no_generator(fields: Fields, tmp_path: Path) -> None:
    shutil.copytree(fields["generator"]["model"], tmp_path / "writer")
    own = {**fields, "generator": {**fields["generator"], "model": str(tmp_path / "writer")}}
    first = execute(load_recipe(own), tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "writer" / "config.json").unlink()
    again = execute(load_recipe(own), tmp_path / "run", resume=True)
    same = [name for name in first.metrics if "seconds" not in name and "bytes" not in name]
    assert {name: again.metrics[name] for name in same} == {name: first.metrics[name] for name in same}


def test_fault_a_run_stopped_in_writing_pays_nothing_twice(
    fields: Fields, finished: tuple[Path, Any], tmp_path: Path
) -> None:
    directory, whole = finished
    limit = int(whole.metrics["generator_requests"]) - 10
    strict = {**fields["generator"], "cache": str(tmp_path / "own.sqlite"), "max_requests": limit}
    recipe = load_recipe({**fields, "generator": strict})
    with pytest.raises(GeneratorError, match="the next request could pass max_requests"):
        execute(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "skillmix").exists()
    execute(recipe, tmp_path / "run", resume=True)
    tables = [rows(place / "skillmix" / "train.parquet") for place in (tmp_path / "run", directory)]
    assert tables[0] == tables[1]


def test_property_what_is_asked_is_not_written_where_topics_are_shared(fields: Fields, tmp_path: Path) -> None:
    changes = {**fields, "train_topics": 1.0, "k_train": [1], "k_eval": [1], "eval_samples": 20, "n_per_k": 99}
    plan(changes, tmp_path / "run")
    written = rows(tmp_path / "run" / "skillmix" / "written.parquet")
    assert len(written) == 8 * 4 - 20
    _, corpus = plan(changes, tmp_path / "again")
    assert len(corpus.tables["texts"]) >= 10, "none was left out"


def test_property_texts_of_another_run_need_no_generator(
    fields: Fields, finished: tuple[Path, Any], tmp_path: Path
) -> None:
    directory, result = finished
    given = {**fields, "generator": None, "texts": str(directory / "skillmix" / "train.parquet")}
    made = execute(load_recipe(given), tmp_path / "run")
    scores = [name for name in result.metrics if name.startswith(("skillmix/", "eval/"))]
    assert {name: made.metrics[name] for name in scores} == {name: result.metrics[name] for name in scores}
    assert "texts_written" not in made.metrics
    # Shared topics: what is asked now was written then.
    shared = execute(load_recipe({**given, "train_topics": 1.0, "eval_samples": 20}), tmp_path / "shared")
    assert shared.metrics["data/asked"] > 0
    assert f"{int(shared.metrics['data/asked'])} texts are for combinations" in shared.notes["warning/asked"]


def test_property_a_small_held_out_side_is_asked_for_as_many_as_it_has(fields: Fields, tmp_path: Path) -> None:
    made = execute(load_recipe({**fields, "k_eval": [2, 5], "eval_samples": 2}), tmp_path / "run")
    asked = {name.split("/")[1:3][0] + name.split("/")[2] for name in made.metrics if name.endswith("full_marks")}
    assert asked == {"k2train", "k5train", "k2held_out"}
    assert made.notes["warning/k_eval"] == "k = 5 is not asked of held-out skills, of which there are 4"
    every = {**fields, "train_categories": ["learned", "held"]}
    alone = execute(load_recipe({**every, "k_eval": [2], "eval_samples": 2}), tmp_path / "alone")
    assert not [name for name in alone.metrics if "held_out/skill" in name]


def test_property_a_model_may_grade(fields: Fields, tmp_path: Path) -> None:
    shutil.copytree(fields["generator"]["model"], tmp_path / "grader")
    grader = {"kind": "hf", "model": str(tmp_path / "grader"), "cache": str(tmp_path / "replies.sqlite")}
    # It writes noise, which is no grade; what it would have to be is asked for twice more.
    prompts = tmp_path / "prompts.toml"
    prompts.write_text('write = "{names} {topic}"\nimprove = "go on"\ngrade = "{names} {topic} {text}"\n')
    changes = {**fields, "grader": grader, "prompts": str(prompts), "n_per_k": 2, "k_train": [1]}
    with pytest.raises(CorpusError, match=r"none of \d+ texts has a grade: no grade: "):
        execute(load_recipe(changes), tmp_path / "run")
    figures = json.loads((tmp_path / "run" / "skillmix" / "synthesis.json").read_text())
    assert figures["texts_ungraded"] == figures["texts_written"] == 2
    assert figures["generator_requests"] >= 2 * 2 + 2


def test_property_chat_models_are_taught_in_their_own_words(fields: Fields, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(fields["model"], tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}>{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}a>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "chat")
    ctx, corpus = plan({**fields, "model": str(tmp_path / "chat")}, tmp_path / "run")
    document = corpus.tables["texts"][0]
    ((example,),) = corpus.phases[0].format([document], 64)
    turns = messages_of(document)
    whole = "".join(f"{m.role[0]}>{m.content}<eos>" for m in turns)
    assert ctx.tokenizer.decode(example.input_ids) == whole
    answers = "".join(f"{m.content}<eos>" for m in turns[1::2])
    assert ctx.tokenizer.decode(example.input_ids[example.trained]) == answers
    assert corpus.usage["form"] == "chat template"


def test_learns_to_show_two_skills_better_than_a_model_that_read_them_alone(fields: Fields, tmp_path: Path) -> None:
    pool = list(SKILLS)[:4]
    topics = ["t1", "t2", "t3"]
    (tmp_path / "skills.jsonl").write_text("".join(f'{{"name": "{s.name}", "category": "learned"}}\n' for s in pool))
    (tmp_path / "topics.txt").write_text("\n".join(topics))
    (tmp_path / "prompts.toml").write_text(f'write = "{TERSE.write}"\n')
    words = "user assistant : , on text and t1 t2 t3 a1 b1 a2 b2 a3 b3 a4 b4 s1 s2 s3 s4"
    tokenizer = word_tokenizer([words])
    tiny_llama(tokenizer, 32, 2, 2, 64, context=64, generator_seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, ks in (("both", (1, 2)), ("one", (1,))):
        drawn = [c for k in ks for c in draw_combinations(pool, topics, k, 99, np.random.default_rng(0))]
        texts = grade_texts(RULES, write_texts(scripted(), drawn, TERSE, second_turn=False))
        write_table(texts, tmp_path / f"{name}.parquet")
    shared = {
        **fields,
        "model": str(tmp_path / "model"),
        "from_scratch": True,
        "generator": None,
        "skills": str(tmp_path / "skills.jsonl"),
        "topics": str(tmp_path / "topics.txt"),
        "prompts": str(tmp_path / "prompts.toml"),
        "train_topics": 1.0,
        "second_turn": False,
        "temperature": 0.0,
        "generations_per_combo": 1,
        "reply_tokens": 10,
        "replay_rate": 0.0,
        "k_eval": [2],
        "eval_samples": 4,
        "eval_at": [1.0],
        "seq_len": 24,
        "batch_tokens": 384,
        "budget": {"steps": 80},
        "optim": {"lr": 1e-2},
    }
    scores = {}
    for name in ("both", "one"):
        made = execute(load_recipe({**shared, "texts": str(tmp_path / f"{name}.parquet")}), tmp_path / name)
        scores[name] = made.metrics["skillmix/k2/train/skill_fraction"]
    assert scores["both"] >= scores["one"] + 0.3


# -- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"texts": "x.parquet"}, "give one of `generator`"),
        ({"generator": None}, "give one of `generator`"),
        ({"sources": {}}, "sources"),
        ({"temperature": 0}, "set generations_per_combo to 1"),
        ({"k_train": [1, 1]}, r"every k is meant once; got \[1, 1\]"),
        ({"k_eval": []}, "k_eval"),
        ({"k_eval": [0]}, "k_eval"),
        ({"keep": "most"}, "keep"),
        ({"per_combo": "median"}, "per_combo"),
        ({"grader": {"kind": "rule", "use": "a:b"}}, "grader"),
        ({"train_topics": 0}, "train_topics"),
    ],
)
def test_rejects_when_built(fields: Fields, changes: Fields, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe({**fields, **changes})


def test_rejects_a_model_that_grades_itself(fields: Fields) -> None:
    own = {**fields, "grader": {"kind": "hf", "model": fields["model"]}}
    with pytest.raises(RecipeError, match="the model that is trained, which would judge its own kind"):
        load_recipe(own)
    again = {**fields, "grader": {"kind": "hf", "model": fields["model"] + "/../" + Path(fields["model"]).name}}
    with pytest.raises(RecipeError, match="set allow_self_grading"):
        load_recipe(again)
    served = {"kind": "http", "base_url": "http://localhost:1/v1", "model": "org/small"}
    with pytest.raises(RecipeError, match="'org/small', the model that is trained"):
        load_recipe({**fields, "model": "org/small", "grader": served})
    assert load_recipe({**own, "allow_self_grading": True})


def test_rejects_what_cannot_be_built(fields: Fields, finished: tuple[Path, Any], tmp_path: Path) -> None:
    def refused(words: str, **changes: Any) -> None:
        with pytest.raises(CorpusError, match=words):
            execute(load_recipe({**fields, **changes}), tmp_path / f"run-{len(list(tmp_path.iterdir()))}")

    refused("no skill is of the category 'literary'; there are learned, held", train_categories=["literary"])
    refused("k must be from 1 to 8, the skills in the pool; got 9", k_train=[9])
    refused("k must be from 1 to 8, the skills in the pool; got 9", k_eval=[9])
    refused("leaves one side of 4 topics empty", train_topics=0.01)
    shared = {"train_topics": 1.0, "k_train": [1], "k_eval": [1], "eval_samples": 99}
    refused(r"every combination of \[1\] skills and a topic will be asked", **shared)
    refused("SkillSet; give MODULE:NAME", grader={"kind": "rules", "use": "headwater.claims.skill_mix:SKILLS"})
    refused(r"none of \d+ texts can be kept.*\n.*  \d+ of \d+: it ", keep="full_marks")
    (tmp_path / "more.jsonl").write_text('{"name": "s1", "category": "learned"}\n{"name": "joy", "category": "held"}\n')
    refused("has no rule for the skill 'joy'", skills=str(tmp_path / "more.jsonl"))
    written = [*rows(finished[0] / "skillmix" / "train.parquet")][:30]
    table = {"generator": None, "texts": str(tmp_path / "texts.jsonl")}

    def texts(**changes: Any) -> None:
        (tmp_path / "texts.jsonl").write_text("".join(json.dumps({**row, **changes}) + "\n" for row in written))

    texts(skills=["s1", "S9"])
    refused("is about the held-out skill 's9'", **table)
    texts(messages=None)
    refused("has no `messages`, so nothing is its answer", **table)
    texts(messages=[{"role": "user", "content": "a b c " * 60}, {"role": "assistant", "content": "x"}])
    refused(r"of 30 conversations 30 are longer than seq_len \(64\)", **table)


def test_property_rows_that_are_too_long_are_left_out_and_told(
    fields: Fields, finished: tuple[Path, Any], tmp_path: Path
) -> None:
    written = rows(finished[0] / "skillmix" / "train.parquet")
    read = {document.id for document in plan(fields, tmp_path / "before")[1].tables["texts"]}
    longer = next(row for row in written if row["id"] in read)
    longer["messages"][1]["content"] = "word " * 60
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    ctx, corpus = plan({**fields, "generator": None, "texts": str(tmp_path / "texts.jsonl")}, tmp_path / "run")
    before = int(finished[1].metrics["data/too_long"])
    assert ctx.run.notes["warning/long"] == f"{before + 1} conversations are longer than seq_len and were left out"
    formatter = ConversationFormatter(ctx.tokenizer)
    documents: list[Document] = [*corpus.tables["texts"]]
    assert max(map(formatter.longest, documents)) <= 64
    assert longer["id"] not in {document.id for document in documents}
