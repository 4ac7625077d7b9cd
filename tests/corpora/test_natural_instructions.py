"""Natural Instructions: splits by task, what is read and asked, and the tables that are left."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from headwater.claims.natural_instructions import ARMS, CLAIM, SIZES, make_world
from headwater.core.claim import judge
from headwater.core.recipe import DataRef, ModelRef, RecipeError, load_recipe
from headwater.core.run import Run, execute
from headwater.corpora.context import CorpusContext
from headwater.corpora.instructed import Question, answers_of, as_pairs
from headwater.corpora.natural_instructions import NaturalInstructions, gain_by_part, task_split
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.instruct import rouge_l
from headwater.modalities.text.instructions import Instance, Instruction, TaskExample, read_tasks
from headwater.modalities.text.pairs import open_pair_model, source_digest

Fields = dict[str, Any]


@pytest.fixture(scope="module")
def fields(instructed_fields: Fields) -> Fields:
    return {"method": "natural_instructions", **instructed_fields}


def made(
    name: str, category: str = "c", sources: Sequence[str] = ("s",), inputs: Sequence[str] = ("x",)
) -> Instruction:
    return Instruction(
        name=name,
        definition=f"do {name}",
        categories=(category,),
        sources=tuple(sources),
        instances=tuple(Instance(input=text, output=f"{name} {text}") for text in inputs),
    )


def written(tasks: Sequence[Instruction], folder: Path) -> str:
    folder.mkdir(parents=True)
    for task in tasks:
        (folder / f"{task.name}.json").write_text(json.dumps(task.to_ni_v1()))
    return str(folder)


def opened(fields: Fields, directory: Path, **changes: Any) -> tuple[NaturalInstructions, Any, Any]:
    """The recipe, its corpus, and what it asks."""
    recipe: Any = load_recipe({**fields, **changes})
    with Run(directory, recipe) as run:
        ctx, _ = CorpusContext.open(recipe, run)
        return recipe, recipe.build(ctx), recipe.asked()


# -- splits

TASKS = [made(f"t{i}", category=f"c{i % 3}", sources=(f"s{i % 4}",)) for i in range(12)]


@pytest.mark.parametrize(
    ("by", "held", "out"),
    [
        ("category", ("c1",), [1, 4, 7, 10]),
        ("source", ("s0", "s3"), [0, 3, 4, 7, 8, 11]),
        ("task", ("t5",), [5]),
    ],
)
def test_equation_what_is_named_is_held_out(by: Any, held: tuple[str, ...], out: list[int]) -> None:
    seen, kept = task_split(TASKS, by, held)
    assert kept == [TASKS[i] for i in out]
    assert seen == [task for task in TASKS if task not in kept]


@pytest.mark.parametrize(("by", "held"), [("random", 5), ("category", 2), ("source", 1)])
def test_property_no_task_and_no_group_is_on_both_sides(by: Any, held: int) -> None:
    found = {tuple(task.name for task in task_split(TASKS, by, held, seed)[1]) for seed in range(20)}
    assert len(found) > 1, "another seed, another split"
    for seed in range(20):
        seen, kept = task_split(TASKS, by, held, seed)
        assert task_split(TASKS, by, held, seed) == (seen, kept)
        assert sorted(t.name for t in [*seen, *kept]) == sorted(t.name for t in TASKS)
        groups = {
            "random": lambda side: {t.name for t in side},
            "category": lambda side: {t.category for t in side},
            "source": lambda side: {name for t in side for name in t.source_names},
        }[by]
        assert len(groups(kept)) == held
        assert not groups(seen) & groups(kept)


@pytest.mark.parametrize(
    ("by", "held", "words"),
    [
        ("random", ("t1",), "takes the number of tasks to hold out"),
        ("task", 3, "takes names; got 3"),
        ("random", 12, "held must be from 1 to 11, since there are 12; got 12"),
        ("random", 0, "held must be from 1 to 11"),
        ("category", ("c9",), "no task has the category 'c9'; there are c0, c1, c2"),
        ("source", ("zz",), "no task has the data set 'zz'"),
        ("category", ("c0", "c1", "c2"), "leaves 0 tasks to learn from and 12 held out"),
        ("category", (), "leaves 12 tasks to learn from and 0 held out"),
    ],
)
def test_rejects_splits_that_cannot_be(by: Any, held: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        task_split(TASKS, by, held)


def test_rejects_a_data_set_on_both_sides_and_tasks_without_one() -> None:
    two = made("two", sources=("s0", "other"))
    with pytest.raises(ValueError, match="data set 'other' is on both sides"):
        task_split([*TASKS, two, made("three", sources=("other",))], "source", ("s0",))
    with pytest.raises(ValueError, match="task 'none' names no data set"):
        task_split([*TASKS, made("none", sources=())], "source", ("s0",))


# -- what is read and asked


def test_property_nothing_that_is_asked_is_read(fields: Fields, tmp_path: Path) -> None:
    for number, parts in enumerate(([], ["definition"], ["definition", "positive"])):
        recipe, corpus, asked = opened(fields, tmp_path / str(number), parts=parts, max_input_tokens=47)
        prompts = {source_digest(document.meta["prompt"]) for document in corpus.tables["seen"]}
        for pairs in asked.values():
            assert not prompts & {source_digest(source) for source in pairs.sources}
        split = json.loads((tmp_path / str(number) / "split.json").read_text())
        assert len(split["held_out"]) == 2
        assert {document.meta["task"] for document in corpus.tables["seen"]} == set(split["seen"])
        assert len(asked["held_out"]) == 2 * recipe.asked_per_task
    tasks = {task.name: task for task in read_tasks(recipe.tasks)}
    right = {i.references[0] for name in split["held_out"] for i in tasks[name].instances}
    assert set(asked["held_out"].targets) <= right
    seen = {i.references[0] for name in split["seen"] for i in tasks[name].instances}
    assert set(asked["valid"].targets) <= seen


def test_property_inputs_shared_with_a_held_out_task_and_shown_ones_are_not_read(
    fields: Fields, tmp_path: Path
) -> None:
    inputs = [f"graph {i}" for i in range(40)]
    shown = made("a", inputs=inputs).model_copy(
        update={"positive_examples": (TaskExample(input="Graph  7", output="o"),)}
    )
    tasks = written([shown, made("b", inputs=inputs), made("c", inputs=inputs[:4])], tmp_path / "tasks")
    _, corpus, asked = opened(
        fields, tmp_path / "run", tasks=tasks, split="task", held=["c"], parts=[], asked_per_task=100
    )
    read = [(document.meta["task"], document.meta["prompt"]) for document in corpus.tables["seen"]]
    prompts = {prompt for _, prompt in read}
    assert len(asked["held_out"]) == 4
    assert not prompts & {f"input: {text} output:" for text in inputs[:4]}
    assert ("a", "input: graph 7 output:") not in read
    left = json.loads((tmp_path / "run" / "split.json").read_text())["left_out"]
    assert left == {"shown": 1, "asked elsewhere": 8, "too long": 0}
    # One input in twenty of the 36 that remain is kept for both tasks.
    assert len(asked["valid"]) == 2 or set(asked["valid"].sources) == {"input: graph 7 output:"}
    assert not prompts & set(asked["valid"].sources)


def test_property_long_instances_are_left_out_and_counted(fields: Fields, tmp_path: Path) -> None:
    inputs = [*(f"path {i}" for i in range(30)), "edge " * 60]
    long = made("a", inputs=inputs).model_copy(
        update={"instances": (*made("a", inputs=inputs).instances, Instance(input="short", output="row " * 80))}
    )
    tasks = written([long, made("b", inputs=[f"tree {i}" for i in range(5)])], tmp_path / "tasks")
    _, corpus, _ = opened(fields, tmp_path / "run", tasks=tasks, split="task", held=["b"])
    prompts = [document.meta["prompt"] for document in corpus.tables["seen"]]
    assert all("edge" not in prompt for prompt in prompts)
    assert all("short" not in prompt for prompt in prompts)
    assert json.loads((tmp_path / "run" / "split.json").read_text())["left_out"]["too long"] == 2


def test_property_so_many_instances_of_a_task_at_most(fields: Fields, tmp_path: Path) -> None:
    few = opened(fields, tmp_path / "few", instances_per_task=5)[1].tables["seen"]
    more = opened(fields, tmp_path / "more", instances_per_task=9)[1].tables["seen"]
    counts = [sum(d.meta["task"] == name for d in few) for name in {d.meta["task"] for d in few}]
    assert counts == [5] * 4
    assert {d.text for d in few} < {d.text for d in more}


# -- what is left


@pytest.fixture(scope="module")
def finished(fields: Fields, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("instructed") / "run"
    many = {"budget": {"tokens": 256 * 120}, "optim": {"lr": 1e-2}, "parts": ["definition", "emphasis"]}
    return directory, execute(load_recipe({**fields, **many}), directory)


def test_oracle_tables_follow_from_the_answers(finished: tuple[Path, Any], task_files: Path) -> None:
    directory, result = finished
    answers = [json.loads(line) for line in (directory / "answers.jsonl").read_text().splitlines()]
    categories = {task.name: task.category for task in read_tasks(DataRef(name=str(task_files)))}
    with (directory / "by_category.csv").open() as stream:
        rows = {row["category"]: row for row in csv.DictReader(stream)}
    assert set(rows) == {"all"} | {categories[a["task"]] for a in answers}
    for name, row in rows.items():
        mine = [a for a in answers if name in ("all", categories[a["task"]])]
        assert int(row["questions"]) == len(mine)
        assert float(row["exact"]) == pytest.approx(sum(a["answer"] in a["right"] for a in mine) / len(mine))
        assert float(row["rouge_l"]) == pytest.approx(sum(rouge_l(a["answer"], a["right"]) for a in mine) / len(mine))
    assert result.metrics["eval/held_out/rouge_l_any"] == pytest.approx(float(rows["all"]["rouge_l"]))
    with (directory / "by_part.csv").open() as stream:
        parts = {row["encoding"]: row for row in csv.DictReader(stream)}
    assert set(parts) == {"all", "without definition", "without emphasis", "none"}
    for row in parts.values():
        assert float(row["gain"]) == pytest.approx(float(parts["all"]["score"]) - float(row["score"]))


def test_property_all_references_count(tiny_causal: Path) -> None:
    reader = open_pair_model(ModelRef(name=str(tiny_causal)), max_target=8)
    (text,) = reader.answers(["graph path"])
    assert rouge_l(text, text) == 1.0, "it writes a word"
    wrong, right = (Question("t", "c", "graph path", references) for references in (("zzz",), ("zzz", text)))
    answers = answers_of(reader, [wrong, right])
    assert [(answer.text, answer.exact, answer.rouge_l) for answer in answers] == [(text, 0, 0), (text, 1, 1)]
    assert as_pairs([right]).targets == ["zzz"], "losses are of the first"


def test_equation_gains_are_the_reference_minus_the_encoding() -> None:
    results = {"all": {"a": 0.6, "b": 0.8, "c": 1.0}, "none": {"a": 0.1, "b": 0.3, "c": 0.5}}
    every, none = gain_by_part(results, "all")
    assert (every.gain, every.low, every.high) == (0.0, 0.0, 0.0)
    assert none.score == pytest.approx(0.3)
    assert (none.gain, none.low, none.high) == pytest.approx((0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="no results of 'full'; there are all, none"):
        gain_by_part(results, "full")
    with pytest.raises(ValueError, match="'none' has scores on other tasks than 'all'"):
        gain_by_part({**results, "none": {"a": 0.1}}, "all")


def test_rejects_recipes_that_cannot_work(fields: Fields, task_files: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"exceed seq_len \(64\); lower max_input_tokens to 47, or raise seq_len"):
        load_recipe({**fields, "max_input_tokens": 48})
    with pytest.raises(RecipeError, match="sources"):
        load_recipe({**fields, "sources": {"text": str(task_files)}})
    with pytest.raises(RecipeError, match="parts"):
        load_recipe({**fields, "parts": ["title"]})
    with pytest.raises(CorpusError, match="tasks: held must be from 1 to 5"):
        execute(load_recipe({**fields, "held": 6}), tmp_path / "a")
    tasks = written([made("a"), made("b")], tmp_path / "tasks")
    with pytest.raises(CorpusError, match="no instance is left"):
        execute(load_recipe({**fields, "tasks": tasks, "split": "task", "held": ["b"]}), tmp_path / "b")


# -- the claim's world


def test_property_every_opening_and_closing_of_the_world_is_seen(tmp_path: Path) -> None:
    world = make_world(SIZES["smoke"], 0, tmp_path)
    assert len(world.known) == 64
    assert len(world.held) == 16
    seen = [name.split("-") for name in world.known if name not in world.held]
    for side in (0, 1):
        counts = [sum(pair[side] == kind for pair in seen) for kind in {pair[side] for pair in seen}]
        assert counts == [6] * 8
    task = world.known[world.held[0]]
    opening, closing = world.held[0].split("-")
    words = task.instances[0].references[0].split()
    assert words[2:4] == task.instances[0].input.split()
    for name, other in world.known.items():
        mine = other.instances[0].references[0].split()
        assert (mine[:2] == words[:2]) == name.startswith(f"{opening}-")
        assert (mine[4:] == words[4:]) == name.endswith(f"-{closing}")
    assert opening in str(task.definition).split()
    assert opening not in str(task.things_to_avoid).split()
    assert make_world(SIZES["smoke"], 0, tmp_path / "again").known == world.known


def test_property_the_claim_runs_at_smoke_scale(tmp_path: Path) -> None:
    measured = CLAIM.measure("smoke", 100, tmp_path / "claim" / "seed" / "hash")
    verdict = judge(CLAIM, "smoke", {100: measured})
    assert verdict["verdict"] == "inconclusive"
    assert verdict["unmet"], "eight steps teach no task"
    assert set(measured.arms) == {*ARMS, "majority answer"}
    assert measured.arms["majority answer"]["unseen tasks"] == 0.0, "no answer of a seen task is one of an unseen task"
    assert all(len(found["unseen tasks"]) == 16 * 2 for found in measured.items.values())


def test_learns_tasks_it_never_saw_from_their_definitions(tmp_path: Path) -> None:
    # Two openings and two closings in nine words; the fourth pair is asked.
    words = [f"w{i}" for i in range(6)]
    values = [f"{a} {b}" for a in words for b in words]

    def task(opening: str, closing: str) -> Instruction:
        instances = [Instance(input=v, output=f"open{opening} {v} close{closing}") for v in values]
        return Instruction(name=f"{opening}{closing}", definition=f"{opening} {closing}", instances=tuple(instances))

    from headwater.modalities.text.tiny import tiny_llama
    from headwater.modalities.text.tokenizers import word_tokenizer

    tasks = [task(a, b) for a in "abc" for b in "xyz"]
    tokenizer = word_tokenizer(
        ["Definition: input: output:", *words, *(i.references[0] for t in tasks for i in t.instances), "a b c x y z"]
    )
    model = tiny_llama(tokenizer, 32, 2, 4, 64, context=64, tie=False, generator_seed=0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    base = {
        "method": "natural_instructions",
        "model": str(tmp_path / "model"),
        "tasks": written(tasks, tmp_path / "tasks"),
        "split": "task",
        "held": ["az", "cy"],
        "asked_per_task": 10,
        "seq_len": 32,
        "max_answer": 8,
        "max_input_tokens": 20,
        "batch_tokens": 512,
        "budget": {"steps": 150},
        "optim": {"lr": 1e-2},
        "fit": {"precision": "fp32"},
        "eval_at": [1.0],
    }
    exact = {
        name: execute(load_recipe({**base, "parts": parts}), tmp_path / name).metrics["eval/held_out/exact"]
        for name, parts in (("definition", ["definition"]), ("none", []))
    }
    assert exact["definition"] > exact["none"] + 0.5
