"""The recipe ARTE: what its steps leave, how a run goes on from them, the mode for endpoints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.run import Run, execute
from headwater.corpora.arte_drafts import read_drafts
from headwater.corpora.arte_scores import NoPreference
from headwater.corpora.context import CorpusContext
from headwater.modalities.text.docs import CorpusError

Fields = dict[str, Any]


@pytest.fixture(scope="module")
def fields(arte_fields: Fields) -> Fields:
    return {"method": "arte", **arte_fields}


@pytest.fixture(scope="module")
def finished(fields: Fields, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("arte") / "run"
    return directory, execute(load_recipe(fields), directory)


def rewrite(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_property_every_step_leaves_its_file(finished: tuple[Path, Any]) -> None:
    directory, result = finished
    metrics = result.metrics
    drafts = pq.read_table(directory / "drafts.parquet")
    assert drafts.column_names == ["question", "rationale", "answer", "seed", "style", "sample"]
    assert drafts.num_rows == metrics["drafts"] > 10
    with np.load(directory / "scores.npz", allow_pickle=False) as stored:
        assert stored["scores"].shape == (drafts.num_rows, 5)
        assert sorted(stored["chosen"].tolist()) == list(range(5))
        means = stored["scores"].mean(axis=1)
    assert metrics["draft_score"] == pytest.approx(means.mean())
    pairs = [json.loads(line) for line in (directory / "pairs.jsonl").read_text().splitlines()]
    kinds = [pair["kind"] for pair in pairs]
    assert kinds.count("rationale") == metrics["pairs_rationale"] > 0
    assert kinds.count("question") == metrics["pairs_question"] > 0
    worth = dict(
        zip(zip(*(drafts[name].to_pylist() for name in ("question", "rationale")), strict=True), means, strict=True)
    )
    for pair in pairs:
        if pair["kind"] == "rationale":
            question = pair["prompt"].removeprefix("solve ")
            assert worth[question, pair["chosen"]] > worth[question, pair["rejected"]]
    assert "n_pref is 40 and there are 5" in result.notes["warning/n_pref"]
    assert metrics["generator_requests"] >= 15 + metrics["drafts"] + 2 * metrics["tailored"]


def test_property_the_student_reads_the_tailored_set(fields: Fields, finished: tuple[Path, Any]) -> None:
    directory, result = finished
    recipe: Any = load_recipe(fields)
    with Run(directory, recipe, resume=True) as opened:
        ctx, _ = CorpusContext.open(recipe, opened)
        corpus = recipe.build(ctx)
    tailored = read_drafts(directory / "tailored.parquet")
    assert len(tailored) == result.metrics["tailored"] == result.metrics["docs_out"] <= 12
    documents = corpus.tables["tailored"]
    assert [d.text for d in documents] == [f"{draft.question} {draft.rationale}" for draft in tailored]
    assert [d.meta["prompt"] for d in documents] == [draft.question for draft in tailored]
    assert all(draft.rationale.endswith(f"so {draft.answer}") for draft in tailored)
    answers = [json.loads(line) for line in (directory / "answers.jsonl").read_text().splitlines()]
    held = [row["exact"] for row in answers if row["set"] == "eval/held_out"]
    assert len(held) == 5
    assert result.metrics["eval/held_out/answer"] == pytest.approx(np.mean(held))
    readme = (directory / "model" / "README.md").read_text()
    assert "`pairs.jsonl`" in readme
    assert "ends in `so` and the answer" in readme


def test_property_the_adapter_opens_on_the_teacher_without_us(fields: Fields, finished: tuple[Path, Any]) -> None:
    place = finished[0] / "teacher"
    assert "peft.AutoPeftModelForCausalLM" in (place / "README.md").read_text()
    opened = AutoPeftModelForCausalLM.from_pretrained(place)
    base = AutoModelForCausalLM.from_pretrained(fields["teacher"]["model"])
    ids = torch.tensor([[1, 3, 4]])
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        assert not torch.equal(opened(input_ids=ids).logits, plain)
        with opened.disable_adapter():
            assert torch.equal(opened(input_ids=ids).logits, plain)


def test_fault_finished_steps_are_not_repeated(fields: Fields, finished: tuple[Path, Any], tmp_path: Path) -> None:
    moved = Path(fields["teacher"]["model"]).rename(tmp_path / "gone")
    recipe: Any = load_recipe(fields)
    try:
        with Run(finished[0], recipe, resume=True) as opened:
            ctx, _ = CorpusContext.open(recipe, opened)
            before = {path: path.stat().st_mtime_ns for path in finished[0].glob("*.parquet")}
            assert len(recipe.build(ctx).tables["tailored"]) == finished[1].metrics["tailored"]
            assert {path: path.stat().st_mtime_ns for path in finished[0].glob("*.parquet")} == before
            assert ctx.meter.cost.steps > 0, "what the alignment cost is charged again"
    finally:
        moved.rename(fields["teacher"]["model"])


def test_oracle_select_takes_the_best_rationale_of_each_question(fields: Fields, tmp_path: Path) -> None:
    result = execute(load_recipe({**fields, "mode": "select", "n_final": 4}), tmp_path / "run")
    drafts, tailored = (read_drafts(tmp_path / "run" / f"{name}.parquet") for name in ("drafts", "tailored"))
    with np.load(tmp_path / "run" / "scores.npz", allow_pickle=False) as stored:
        scores = stored["scores"].mean(axis=1)
    best = {
        q: max(s for d, s in zip(drafts, scores, strict=True) if d.question == q) for q in {d.question for d in drafts}
    }
    worth = {(d.question, d.rationale): s for d, s in zip(drafts, scores, strict=True)}
    found = [worth[d.question, d.rationale] for d in tailored]
    assert found == sorted(best.values(), reverse=True)[:4]
    assert not (tmp_path / "run" / "teacher").exists()
    assert "pairs_rationale" not in result.metrics


def test_rejects_an_endpoint_that_would_be_tuned(fields: Fields) -> None:
    served = {"kind": "http", "base_url": "http://localhost:1/v1", "model": "m"}
    with pytest.raises(RecipeError, match="mode: select for an endpoint"):
        load_recipe({**fields, "teacher": served})
    load_recipe({**fields, "teacher": served, "mode": "select"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"marker": "nowhere"}, "no draft that can be used.*'nowhere'"),
        ({"max_answer": 60}, "leave no room for an example"),
        ({"validation": "TEST"}, "validation and test share 5 questions"),
        ({"seeds": "TEST"}, "all 5 questions repeat"),
    ],
)
def test_rejects_what_cannot_work(fields: Fields, tmp_path: Path, change: Fields, words: str) -> None:
    named = {key: fields["test"] if value == "TEST" else value for key, value in change.items()}
    with pytest.raises(CorpusError, match=words):
        execute(load_recipe({**fields, **named}), tmp_path / "run")


@pytest.mark.parametrize("mode", ["align", "select"])
def test_rejects_drafts_that_are_all_alike(fields: Fields, tmp_path: Path, mode: str) -> None:
    with pytest.raises(NoPreference, match="harder preference questions"):
        execute(load_recipe({**fields, "mode": mode, "margin": 100.0}), tmp_path / "run")


def test_property_seeds_that_are_asked_are_left_out(fields: Fields, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(fields["seeds"]).read_text().splitlines()]
    extra = rewrite(tmp_path / "seeds.jsonl", [*rows, {"text": "Tree number 3!", "label": "x"}])
    result = execute(load_recipe({**fields, "seeds": extra, "mode": "select"}), tmp_path / "run")
    assert "1 of 6 seeds repeat" in result.notes["warning/seeds"]
    assert {draft.meta["seed"] for draft in read_drafts(tmp_path / "run" / "drafts.parquet")} <= set(range(5))
