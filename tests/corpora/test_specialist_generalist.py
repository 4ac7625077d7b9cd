"""Specialist or generalist: the plan, the draw of examples, what is kept apart, and what a gain is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headwater.claims.specialist_generalist import ARMS, CELLS, CLAIM, SIZES, make_targets
from headwater.core.claim import judge
from headwater.core.optim import OptimSpec
from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.run import Run, execute
from headwater.core.stats import paired_bootstrap
from headwater.corpora.context import CorpusContext
from headwater.corpora.reading import Reader
from headwater.corpora.specialist_generalist import (
    Cell,
    Gain,
    SpecialistGeneralist,
    SpecialistPlan,
    coverage,
    crossing_point,
    factuality_split,
    gain_table,
    quoted,
)
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.instruct import AnswerFormatter, answered
from headwater.modalities.text.instructions import Instance, Instruction
from headwater.modalities.text.pairs import source_digest
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.tokenizers import train_bpe

Fields = dict[str, Any]


@pytest.fixture(scope="module")
def fields(specialist_fields: Fields) -> Fields:
    return {"method": "specialist_generalist", **specialist_fields}


def made(name: str, inputs: Sequence[str], category: str = "c", answer: str = "{name} {text}") -> Instruction:
    return Instruction(
        name=name,
        definition=f"do {name}",
        categories=(category,),
        instances=tuple(Instance(input=text, output=answer.format(name=name, text=text)) for text in inputs),
    )


def written(tasks: Sequence[Instruction], folder: Path) -> str:
    folder.mkdir(parents=True)
    for task in tasks:
        (folder / f"{task.name}.json").write_text(json.dumps(task.to_ni_v1()))
    return str(folder)


def opened(fields: Fields, directory: Path, **changes: Any) -> tuple[SpecialistGeneralist, Any, Any]:
    """The recipe, its corpus, and what it asks."""
    recipe: Any = load_recipe({**fields, **changes})
    with Run(directory, recipe) as run:
        ctx, _ = CorpusContext.open(recipe, run)
        return recipe, recipe.build(ctx), recipe.asked()


# -- the plan


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (SpecialistPlan(0.0), [("specialist", 1.0, ("specialist",), None, False)]),
        (SpecialistPlan(1.0), [("generalist", 1.0, ("generalist",), None, False)]),
        (
            SpecialistPlan(0.75),
            [("generalist", 0.75, ("generalist",), None, False), ("specialist", 0.25, ("specialist",), None, True)],
        ),
        (
            SpecialistPlan(0.75, replay=0.2),
            [
                ("generalist", 0.75, ("generalist",), None, False),
                ("specialist", 0.25, ("generalist", "specialist"), (0.2, 0.8), True),
            ],
        ),
        (SpecialistPlan(0.75, "mixed"), [("mixed", 1.0, ("generalist", "specialist"), (0.75, 0.25), False)]),
    ],
)
def test_equation_phases_share_the_budget(plan: SpecialistPlan, expected: list[Any]) -> None:
    formatter = AnswerFormatter(train_bpe(["a b"], 300))
    readings = plan.readings(formatter, OptimSpec())
    assert [(r.name, r.share, r.tables, r.weights, r.optim is not None) for r in readings] == expected
    assert all(reading.format is formatter for reading in readings)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1.5,), "share must be in"),
        ((0.5, "sequential", 1.0), "replay in"),
        ((0.5, "mixed", 0.1), "behind a generalist one; set it to 0"),
        ((0.0, "sequential", 0.1), "behind a generalist one"),
    ],
)
def test_rejects_plans_that_cannot_be(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SpecialistPlan(*arguments)


def test_oracle_the_phases_spend_the_budget_exactly(fields: Fields, tmp_path: Path) -> None:
    logged = {"precision": "fp32", "log_every": 1}
    execute(load_recipe({**fields, "generalist_share": 0.6, "fit": logged}), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["phase"] for line in lines if "lr" in line]
    assert [steps.count(name) for name in ("generalist", "specialist")] == [6, 4]
    assert len(steps) * 256 == 2560


def test_oracle_a_mixture_keeps_its_ratio_at_every_prefix(fields: Fields, tmp_path: Path) -> None:
    recipe = load_recipe({**fields, "order": "mixed", "generalist_share": 0.7})
    with Run(tmp_path / "run", recipe) as run:
        ctx, _ = CorpusContext.open(recipe, run)  # type: ignore[arg-type]
        corpus = recipe.build(ctx)  # type: ignore[attr-defined]
        stream = next(Reader(ctx, corpus).phases()).stream
        part = np.concatenate([stream.batch(step)["part"].numpy() for step in range(50)])
    assert corpus.phases[0].tables[0] == "generalist"
    counts = np.cumsum(part == 0)
    assert np.all(np.abs(counts - 0.7 * np.arange(1, len(part) + 1)) < 1)


def test_oracle_an_example_costs_the_same_alone_and_packed() -> None:
    from headwater.modalities.text.examples import PackedExamples, formatted
    from headwater.modalities.text.objectives import PackedObjective

    texts = [(f"input: graph {i} output:", " ".join(["path"] * (1 + i % 5))) for i in range(60)]
    tokenizer = train_bpe([f"{p} {a}" for p, a in texts], 300)
    model = tiny_llama(tokenizer, hidden=16, layers=2, heads=2, mlp=32, context=128, generator_seed=0)
    documents = [answered(str(i), prompt, answer) for i, (prompt, answer) in enumerate(texts)]
    formatter, objective = AnswerFormatter(tokenizer), PackedObjective(restart_positions=True)
    rows = PackedExamples(formatted(documents, formatter, 128), 128, pad_token_id=0)
    assert rows.padding < 0.1, "short examples share rows"
    batch = {name: torch.from_numpy(value) for name, value in rows.columns(np.arange(len(rows))).items()}
    with torch.no_grad():
        packed = float(objective(model, batch).total)
        alone = 0.0
        for document in documents:
            ((example,),) = formatter([document], 128)
            ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
            logp = model(input_ids=ids).logits[0].log_softmax(-1)
            learned = np.flatnonzero(example.trained)
            alone -= sum(float(logp[i - 1, ids[0, i]]) for i in learned)
    assert packed == pytest.approx(alone, rel=1e-4)


# -- the examples


def test_property_fewer_examples_are_the_beginning_of_more(fields: Fields, tmp_path: Path) -> None:
    texts = []
    for n in (5, 12, 30):
        table = opened(fields, tmp_path / str(n), n_specialist=n)[1].tables["specialist"]
        assert len(table) == n
        texts.append({document.text for document in table})
    assert texts[0] < texts[1] < texts[2]
    other = opened(fields, tmp_path / "other", n_specialist=5, seed=1)[1].tables["specialist"]
    assert {document.text for document in other} != texts[0]


@pytest.mark.parametrize("parts", [[], ["definition"]])
def test_property_nothing_that_is_asked_is_read(fields: Fields, tmp_path: Path, parts: list[str]) -> None:
    _, corpus, asked = opened(fields, tmp_path / "run", parts=parts)
    assert set(asked) == {"held_out", "valid", "generalist"}
    read = {source_digest(d.meta["prompt"]) for table in corpus.tables.values() for d in table}
    for pairs in asked.values():
        assert not read & {source_digest(source) for source in pairs.sources}


def test_property_inputs_that_the_target_is_asked_are_read_in_no_task(fields: Fields, tmp_path: Path) -> None:
    inputs = [f"graph {i}" for i in range(40)]
    target, broad = made("target", inputs), made("broad", [*inputs, *(f"sum {i}" for i in range(40))])
    sides = {"specialist": written([target], tmp_path / "t"), "generalist": written([broad], tmp_path / "b")}
    _, corpus, asked = opened({**fields, **sides}, tmp_path / "run", parts=[])
    read = {d.meta["prompt"] for table in corpus.tables.values() for d in table}
    assert not read & {*asked["held_out"].sources, *asked["valid"].sources}
    assert "input: graph 1 output:" in {*read, *asked["held_out"].sources, *asked["valid"].sources}


def test_property_both_arms_read_and_are_asked_the_same_of_the_target(fields: Fields, tmp_path: Path) -> None:
    _, both, asked_both = opened(fields, tmp_path / "both")
    _, alone, asked_alone = opened(fields, tmp_path / "alone", generalist=None)
    assert [d.text for d in both.tables["specialist"]] == [d.text for d in alone.tables["specialist"]]
    for name in ("held_out", "valid"):
        assert asked_both[name].fingerprint == asked_alone[name].fingerprint
    assert set(alone.tables) == {"specialist"}
    _, broad, _ = opened(fields, tmp_path / "broad", generalist_share=1.0)
    assert set(broad.tables) == {"generalist"}


def test_equation_quotes_are_the_same_pair_or_thirteen_words() -> None:
    words = [f"w{i}" for i in range(14)]
    asked = [made("t", ["what is it"], answer="this"), made("u", [" ".join(words)], answer="end")]
    pool = [(task, task.instances) for task in asked]
    cases = {
        "What is  it": ("this", True),  # the same pair, case and white space aside
        "what is it": ("that", False),  # the same input with another answer is another task
        f"x {' '.join(words[:13])} y": ("z", True),
        f"x {' '.join(words[:12])} y": ("z", False),
    }
    for text, (answer, expected) in cases.items():
        (found,) = quoted([made("g", ["other", text], answer=answer)], pool)
        assert found == ({1} if expected else set()), text
    assert quoted([made("g", ["other"])], []) == [set()]


def test_property_a_few_quotes_are_left_out_and_counted(fields: Fields, tmp_path: Path) -> None:
    target = made("target", [f"graph {i}" for i in range(40)], answer="t {text}")
    # One instance in 201 gives away an answer on the target.
    recipe, _, asked = opened(
        {**fields, "specialist": written([target], tmp_path / "target"), "generalist": None}, tmp_path / "a"
    )
    told = asked["held_out"].targets[0]
    spill = Instance(input=told.removeprefix("t "), output=told)
    broad = made("broad", [f"sum {i}" for i in range(200)])
    broad = broad.model_copy(update={"instances": (*broad.instances, spill)})
    sides = {"specialist": str(recipe.specialist), "generalist": written([broad], tmp_path / "broad")}
    _, corpus, _ = opened({**fields, **sides}, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "plan.json").read_text())["left_out"]["quoted"] == 1
    assert all(told not in document.text for document in corpus.tables["generalist"])
    few = broad.model_copy(update={"instances": broad.instances[-60:]})
    sides["generalist"] = written([few], tmp_path / "few")
    with pytest.raises(CorpusError, match=r"1 of 60 instances quote questions on the target; at most 1%"):
        opened({**fields, **sides}, tmp_path / "c")


def test_property_prompts_and_answers_alone_are_a_generalist_set(fields: Fields, tmp_path: Path) -> None:
    rows = [{"text": f"say sum {i}", "label": f"sum {i}"} for i in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, corpus, _ = opened(fields, tmp_path / "run", generalist=str(path))
    prompts = {document.meta["prompt"] for document in corpus.tables["generalist"]}
    assert len(prompts) == 57, "one in twenty is asked"
    assert prompts <= {f"input: {row['text']} output:" for row in rows}


def test_rejects_recipes_that_cannot_work(fields: Fields, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"n_specialist is 500 and the target has \d+ examples to read"):
        opened(fields, tmp_path / "a", n_specialist=500)
    with pytest.raises(CorpusError, match="are the same tasks"):
        opened(fields, tmp_path / "b", generalist=fields["specialist"])
    with pytest.raises(RecipeError, match="replay goes into the specialist phase"):
        load_recipe({**fields, "replay": 0.1, "order": "mixed"})
    with pytest.raises(RecipeError, match="'generalist' names questions on the generalist tasks"):
        load_recipe({**fields, "evals": {"generalist": fields["evals"]["other"]}})


# -- what it was worth


def test_equation_coverage_is_a_share_of_categories() -> None:
    catalogue = {"a": "qa", "b": "qa", "c": "nli", "d": "fill", "e": "sum"}
    assert coverage(catalogue, catalogue) == 1.0
    assert coverage(["a", "b"], catalogue) == 1 / 4
    assert coverage(["a", "c"], catalogue) == 2 / 4
    with pytest.raises(ValueError, match="no task 'z'"):
        coverage(["z"], catalogue)
    with pytest.raises(ValueError, match="coverage of no task"):
        coverage([], catalogue)


def test_degenerate_an_arm_gains_nothing_on_itself() -> None:
    scores = [0.2, 0.5, 0.9]
    (row,) = gain_table([Cell(1.0, 100, seed, score, score) for seed, score in enumerate(scores)])
    assert row == Gain(1.0, 100, 0.0, 0.0, 0.0)
    assert crossing_point([row]) == 100.0


def test_oracle_gains_are_paired_by_seed() -> None:
    rng = np.random.default_rng(0)
    cells = [Cell(breadth, n, seed, *rng.random(2)) for breadth in (0.1, 1.0) for n in (100, 10) for seed in range(4)]
    rows = gain_table([cells[i] for i in rng.permutation(len(cells))])
    assert [(row.coverage, row.n) for row in rows] == [(1.0, 10), (1.0, 100), (0.1, 10), (0.1, 100)]
    mine = sorted((c for c in cells if c.coverage == 0.1 and c.n == 10), key=lambda c: c.seed)
    found = paired_bootstrap([c.both for c in mine], [c.specialist for c in mine])
    assert rows[2].gain == pytest.approx(found.mean)
    assert (rows[2].low, rows[2].high) == pytest.approx((found.low, found.high))
    with pytest.raises(ValueError, match="seed 0 stands twice at coverage 1 and n 10"):
        gain_table([Cell(1.0, 10, 0, 0.1, 0.2)] * 2)


def test_equation_the_crossing_lies_between_measured_n_by_their_logarithm() -> None:
    def rows(*lows: float) -> list[Gain]:
        return [Gain(1.0, 10 ** (1 + i), low + 0.1, low, low + 0.2) for i, low in enumerate(lows)]

    # From 0.3 at n = 10 to -0.1 at n = 100, zero lies at three quarters of the way: 10 ** 1.75.
    assert crossing_point(rows(0.3, -0.1)) == pytest.approx(10**1.75)
    assert crossing_point(rows(0.3, -0.1)[::-1]) == pytest.approx(10**1.75)
    assert crossing_point(rows(-0.1, 0.3)) == 10.0
    assert crossing_point(rows(0.3, 0.2, 0.1)) is None
    # A low end that rises again does not count: 0.1, then 0.1 and not 0.5, then -0.1.
    assert crossing_point(rows(0.1, 0.5, -0.1)) == pytest.approx(10**2.5)
    with pytest.raises(ValueError, match="rows of one coverage"):
        crossing_point([])


def test_property_every_task_has_one_skill() -> None:
    tasks = [made("a", ["x"], "nli"), made("b", ["x"], "trivia"), made("c", ["x"], "nli")]
    found = factuality_split(tasks, {"nli": "reasoning", "trivia": "facts"})
    assert {skill: [task.name for task in of] for skill, of in found.items()} == {
        "reasoning": ["a", "c"],
        "facts": ["b"],
    }
    with pytest.raises(ValueError, match="category 'trivia' of task 'b' has no skill"):
        factuality_split(tasks, {"nli": "reasoning"})


# -- the claim


def test_property_the_targets_are_tasks_that_the_generalist_set_lacks(tmp_path: Path) -> None:
    targets = make_targets(SIZES["smoke"], 0, tmp_path)
    names = {side: {p.stem for p in getattr(targets, side).iterdir()} for side in ("generalist", "broad", "narrow")}
    assert {side: len(of) for side, of in names.items()} == {"generalist": 48, "broad": 12, "narrow": 1}
    assert len(set().union(*names.values())) == 61
    assert targets.coverage == {"broad": 12 / 64, "narrow": 1 / 64}


def test_property_the_claim_runs_at_smoke_scale(tmp_path: Path) -> None:
    measured = CLAIM.measure("smoke", 100, tmp_path / "claim" / "seed" / "hash")
    verdict = judge(CLAIM, "smoke", {100: measured})
    assert verdict["verdict"] == "inconclusive"
    assert verdict["unmet"], "eight steps teach no task"
    assert set(measured.arms) == {*ARMS, *CELLS}
    for cell in CELLS:
        both, alone = (np.mean(measured.items[arm][cell]) for arm in ("both", "specialist"))
        assert measured.arms[cell]["gain"] == pytest.approx(both - alone)
        assert len(measured.items["both"][cell]) == 12
