"""A pretrainer's guide, the recipe: what variants hold, that they are trained and scored alike, what is left behind."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.conftest import sentences
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.report import write_report
from headwater.core.run import Run, execute
from headwater.corpora.ablation import make_variants
from headwater.corpora.context import CorpusContext
from headwater.corpora.curation import CurationSpec
from headwater.corpora.temporal import temporal_degradation
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.document_store import DocumentStore
from headwater.modalities.text.score import bits_per_byte

Fields = dict[str, Any]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def fields(corpora_fields: Fields, tmp_path_factory: pytest.TempPathFactory) -> Fields:
    """Two sources: dated documents of two kinds of text, one of which is wanted."""
    root = tmp_path_factory.mktemp("guide")
    wanted, other = (sentences(kind, 180, words=60) for kind in ("domain", "general"))
    rows = [
        {"id": f"d{i}", "text": wanted[i] if i % 3 == 0 else other[i], "date": f"{2010 + i % 4}-06-01"}
        for i in range(180)
    ]
    words = root / "words.txt"
    words.write_text("graph\nnode\n", encoding="utf-8")
    return {
        **corpora_fields,
        "method": "pretrainers_guide",
        "held_out": 0.2,
        "sources": {"books": write(root / "books.jsonl", rows[:90]), "web": write(root / "web.jsonl", rows[90:])},
        "date_field": "date",
        "eval_at": [1.0],
        "curation": {
            "steps": [
                {"kind": "quality", "positives": write(root / "good.jsonl", _texts(sentences("domain", 40, seed=9)))},
                {"kind": "lexicon", "words": str(words)},
            ],
            "shard_documents": 30,
        },
        "axes": [
            {"kind": "quality", "values": [0.6, 1.0]},
            {"kind": "quality", "values": [0.6], "inverse": True},
            {"kind": "toxicity", "values": [0.05]},
            {"kind": "age", "values": [2011, [2012, 2013]]},
            {"kind": "domain", "values": ["web"]},
            {
                "kind": "steps",
                "values": [
                    [{"kind": "sample", "rate": 0.5}],
                    [{"kind": "best", "fraction": 0.5}, {"kind": "keep", "when": "year in [2011]"}],
                ],
            },
        ],
    }


def _texts(texts: list[str]) -> list[dict[str, Any]]:
    return [{"id": str(i), "text": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def built(fields: Fields, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A finished run of all axes."""
    directory = tmp_path_factory.mktemp("built") / "run"
    return directory, execute(load_recipe({**fields, "max_epochs": 50}), directory)


def ids(directory: Path, name: str) -> list[str]:
    return (directory / "variants" / name / "ids.txt").read_text(encoding="utf-8").splitlines()


def stored(directory: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "variants" / name / "result.json").read_text(encoding="utf-8"))
    return found


# -- what variants hold


def test_property_variants_part_the_base(built: tuple[Path, Any]) -> None:
    directory, _ = built
    base = ids(directory, "base")
    good, bad = ids(directory, "quality-0.6"), ids(directory, "quality-0.6-inverse")
    assert not set(good) & set(bad)
    assert sorted(good + bad) == sorted(base)
    assert all(int(i.split("/d")[1]) % 3 == 0 for i in good), "texts like the positives"
    assert all(int(i.split("/d")[1]) % 4 == 1 for i in ids(directory, "age-2011"))
    assert all(int(i.split("/d")[1]) % 4 in (2, 3) for i in ids(directory, "age-2012-2013"))
    assert {i.split("/")[0] for i in ids(directory, "without-web")} == {"books"}
    assert 0.25 * len(base) < len(ids(directory, "steps-sample")) < 0.75 * len(base)


def test_oracle_a_variant_is_what_its_steps_leave_when_run_whole(
    built: tuple[Path, Any], fields: Fields, tmp_path: Path
) -> None:
    directory, _ = built
    recipe: Any = load_recipe({**fields, "max_epochs": 50})
    base = DocumentStore(directory / "base.arrow")
    variants = make_variants(recipe.curation.steps, recipe.axes)
    for name, shard in (("quality-0.6", 17), ("toxicity-0.05", 1_000), ("steps-sample", 40), ("steps-best-keep", 9)):
        spec = CurationSpec(steps=variants[name], shard_documents=shard)
        whole = spec.run(base, tmp_path / name, seed=recipe.seed, warn=lambda topic, words: None)
        assert whole.documents.ids() == ids(directory, name)


def test_property_documents_are_scored_once_for_all_variants(built: tuple[Path, Any]) -> None:
    directory, _ = built
    steps = json.loads((directory / "curation" / "steps.json").read_text())
    scored = [step for step in steps if step["name"].startswith("score")]
    assert [step["docs_in"] for step in scored] == [len(ids(directory, "base"))] * 2
    again = [path.parent.parent.name for path in (directory / "variants").rglob("steps.json")]
    assert sorted(again) == ["steps-best-keep", "steps-sample"], "the variants that are more than a condition"
    (own,) = json.loads((directory / "variants" / "steps-sample" / "curation" / "steps.json").read_text())
    assert own["name"] == "sample 0.5"


# -- trained and scored alike


def test_property_threshold_one_is_the_base(built: tuple[Path, Any]) -> None:
    directory, _ = built
    assert ids(directory, "quality-1") == ids(directory, "base")
    same, base = stored(directory, "quality-1"), stored(directory, "base")
    assert same["items"] == base["items"]
    assert same["metrics"] == base["metrics"]


def test_oracle_the_base_is_the_runs_own_model_and_the_table_its_difference(built: tuple[Path, Any]) -> None:
    directory, result = built
    # quality-1 was trained as a throw-away copy, and base is what the run itself trained.
    for metric in ("eval/held_out/bpb", "eval/other/bpb", "valid/bpb"):
        assert result.metrics[f"variants/quality-1/{metric}"] == result.metrics[metric]
        assert result.metrics[f"variants/base/{metric}"] == result.metrics[metric]
    table = pd.read_csv(directory / "ablation.csv").set_index(["variant", "metric"])
    assert len(table) == 9 * 2
    for name in ("quality-0.6", "without-web"):
        row = table.loc[(name, "eval/other/bpb")]
        difference = result.metrics[f"variants/{name}/eval/other/bpb"] - result.metrics["eval/other/bpb"]
        assert row["difference"] == pytest.approx(difference)
        assert row["low"] <= difference <= row["high"]
    assert (table.loc["quality-1"][["difference", "low", "high"]] == 0).all(axis=None)
    assert result.metrics["variants/quality-0.6/eval/other/bpb"] < result.metrics["eval/other/bpb"], (
        "what is wanted is what 'other' holds"
    )


def test_property_the_run_leaves_its_profile_and_page_and_no_weights(built: tuple[Path, Any]) -> None:
    directory, _ = built
    assert not list((directory / "variants").rglob("*.safetensors"))
    rows = list(csv.DictReader((directory / "profile.csv").open()))
    assert [row["domain"] for row in rows] == ["books", "web"]
    assert sum(int(row["documents"]) for row in rows) == len(ids(directory, "base"))
    assert all(0 <= float(row["quality_q0.5"]) <= 1 for row in rows)
    assert "score quality" in write_report(directory / "curation").read_text(encoding="utf-8")
    assert not (directory / "temporal.json").exists()


def test_property_best_reads_what_predicts_validation_text_best(fields: Fields, tmp_path: Path) -> None:
    axes = [{"kind": "domain", "values": ["web"]}, {"kind": "quality", "values": [0.6], "inverse": True}]
    less = {**fields, "axes": axes, "read": "best", "keep_models": True, "max_epochs": 50}
    directory = tmp_path / "run"
    result = execute(load_recipe(less), directory)
    valid = {name: stored(directory, name)["valid"] for name in ("base", "without-web", "quality-0.6-inverse")}
    best = min(valid, key=lambda name: valid[name])
    assert result.notes["variant read"] == best
    assert result.metrics["valid/bpb"] == pytest.approx(valid[best], abs=1e-9)
    # Every variant's model opens as any other, and is the one whose figures were taken.
    recipe: Any = load_recipe(less)
    with Run(tmp_path / "other", recipe) as opened:
        ctx, _ = CorpusContext.open(recipe, opened)
        for name, bits in valid.items():
            place = directory / "variants" / name / "model"
            model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
            assert bits_per_byte(model, tokenizer, ctx.valid, window=64).bits_per_byte == pytest.approx(bits, abs=1e-6)


# -- after finetuning, over the years


@pytest.fixture(scope="module")
def asked(fields: Fields, tmp_path_factory: pytest.TempPathFactory) -> Fields:
    """Questions of two years, the answers to which are learned only in finetuning."""
    root = tmp_path_factory.mktemp("asked")
    data, questions = {}, {}
    for year, answer in ((2011, "graph"), (2013, "axis")):
        rows = [{"text": f"sum {i} of {year}", "label": answer} for i in range(20)]
        data[f"y{year}"], questions[f"y{year}"] = (
            write(root / f"{side}{year}.jsonl", part) for side, part in (("learn", rows[:10]), ("ask", rows[10:]))
        )
    return {
        **fields,
        "curation": None,
        "axes": [{"kind": "age", "values": [2010, 2011, 2013]}],
        "questions": questions,
        "eval_years": {"y2011": 2011, "y2013": 2013, "other": 2012},
        "finetune": {"data": data, "tokens": 256 * 40, "lr": 2e-2},
        "max_answer": 4,
        "max_epochs": 50,
    }


def test_learns_in_finetuning_what_is_asked_after_it_alone(asked: Fields, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    metrics = execute(load_recipe(asked), directory).metrics
    assert metrics["eval/y2011/exact"] == 0, "the run's own model is not finetuned"
    for name in ("base", "age-2010", "age-2013"):
        for of in ("y2011", "y2013"):
            assert metrics[f"variants/{name}/eval/{of}/exact"] > 0.9, "each set after the finetuning of its name"
    assert metrics["variants/base/eval/other/bpb"] == metrics["eval/other/bpb"], "texts are scored before it"
    # The degradation is that of the stored items.
    years = [2010, 2011, 2013]
    items = [-np.array([stored(directory, f"age-{y}")["items"]["eval/other/bpb"]["values"] for y in years])]
    scores = np.stack([own.mean(axis=1) for own in items], axis=1)
    found = temporal_degradation(scores, years, [2012], items=items)
    written = json.loads((directory / "temporal.json").read_text())
    assert written["bpb"]["slope"] == metrics["temporal/bpb/slope"] == found.slope
    assert tuple(written["bpb"]["ci"]) == found.ci
    assert set(written) == {"bpb", "exact"}


def test_rejects_a_finetuning_that_holds_a_question(asked: Fields, tmp_path: Path) -> None:
    leaky = {**asked, "finetune": {**asked["finetune"], "data": {"y2011": asked["questions"]["y2011"]}}}
    with pytest.raises(CorpusError, match=r"table 'finetune.data.y2011' holds a question of 'y2011'"):
        execute(load_recipe(leaky), tmp_path / "run")


def test_property_what_variants_write_is_scored(fields: Fields, tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", _texts(["sum", "graph"]))
    words = tmp_path / "words.txt"
    words.write_text("graph\n", encoding="utf-8")
    generation = {"prompts": prompts, "scorer": {"kind": "lexicon", "words": str(words)}, "n": 3, "max_tokens": 4}
    less = {**fields, "curation": None, "axes": [{"kind": "domain", "values": ["web"]}], "generation": generation}
    metrics = execute(load_recipe(less), tmp_path / "run").metrics
    for name in ("base", "without-web"):
        items = stored(tmp_path / "run", name)["items"]
        worst, mean = (np.array(items[f"generation/{of}"]["values"]) for of in ("worst", "mean"))
        assert len(worst) == 2
        assert (mean >= 0).all()
        assert (mean <= worst).all()
        assert metrics[f"variants/{name}/generation/worst"] == worst.mean()


# -- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"read": "age-1999"}, "there is no variant 'age-1999'; there are best, base, quality-0.6"),
        ({"budget": {"seconds": 5}}, "give the budget in tokens or steps, or variant_tokens"),
        ({"eval_years": {"nothing": 2011}}, "'nothing' is neither among evals nor questions"),
        ({"finetune": {"data": {"x": "x.jsonl"}, "tokens": 9, "lr": 0.1}}, "'x' is no set of questions"),
        ({"axes": []}, "axes"),
        ({"axes": [{"kind": "age", "values": [1, 1]}]}, "two variants are called 'age-1'"),
    ],
)
def test_rejects_when_built(fields: Fields, changes: Fields, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe({**fields, **changes})


def test_rejects_documents_without_dates_and_never_takes_them_for_new(fields: Fields, tmp_path: Path) -> None:
    rows = [{"id": f"u{i}", "text": text, "date": "2011"} for i, text in enumerate(sentences("general", 200, words=40))]
    less = {**fields, "curation": None, "axes": [{"kind": "age", "values": [2011]}], "evals": {}}
    for broken, words in ((8, True), (1, False)):
        for row in rows:
            row["date"] = "unknown" if int(row["id"][1:]) < broken else "2011"
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        recipe: Any = load_recipe({**less, "sources": {"text": write(tmp_path / f"{broken}.jsonl", rows)}})
        with Run(tmp_path / "run", recipe) as opened:
            ctx, _ = CorpusContext.open(recipe, opened)
            train = list(ctx.sources["text"].train)
            undated = [d.id for d in train if d.meta["date"] == "unknown"]
            if words:
                said = rf"{len(undated)} of {len(train)} documents \(.*%\) have no date in 'date', e.g. {undated[0]}"
                with pytest.raises(CorpusError, match=said):
                    recipe.build(ctx)
            else:
                recipe.build(ctx)
                assert undated == ["u0"]
                assert "u0" not in ids(tmp_path / "run", "age-2011")
                assert "u0" in ids(tmp_path / "run", "base")


def test_rejects_a_domain_that_is_not_there_and_a_score_that_none_has(fields: Fields, tmp_path: Path) -> None:
    absent = {**fields, "axes": [{"kind": "domain", "values": ["wiki"]}], "curation": None}
    with pytest.raises(CorpusError, match="there is no domain 'wiki'; there are books, web"):
        execute(load_recipe(absent), tmp_path / "a")
    unscored = {**fields, "axes": [{"kind": "toxicity", "values": [0.5]}], "curation": None}
    with pytest.raises(CorpusError, match=r"looks at 'toxicity', which .* documents have not; add \{kind: lexicon"):
        execute(load_recipe(unscored), tmp_path / "b")


def test_rejects_a_threshold_that_keeps_too_little_and_says_which_would_do(fields: Fields, tmp_path: Path) -> None:
    less = {**fields, "budget": {"tokens": 40_000}, "axes": [{"kind": "quality", "values": [0.01]}], "max_epochs": 4.0}
    recipe: Any = load_recipe(less)
    with Run(tmp_path / "run", recipe) as opened:
        ctx, _ = CorpusContext.open(recipe, opened)
        with pytest.raises(CorpusError, match=r"variant 'quality-0.01' keeps .* the smallest threshold that") as error:
            recipe.build(ctx)
        assert not (tmp_path / "run" / "variants" / "quality-0.01" / "checkpoints").exists()
        found = re.search(r"would do is ([\d.]*\d)", str(error.value))
        assert found
        threshold = float(found[1])
        base = recipe._base(ctx)
        for value, enough in ((threshold, True), (threshold - 2e-4, False)):
            again: Any = load_recipe({**less, "axes": [{"kind": "quality", "values": [value]}]})
            if enough:
                assert len(again._variants(ctx, base)[f"quality-{value:g}"]) > 0
            else:
                with pytest.raises(CorpusError, match="the smallest threshold"):
                    again._variants(ctx, base)


def test_degenerate_two_sources_may_share_ids(fields: Fields, tmp_path: Path) -> None:
    same = [Document(str(i), text) for i, text in enumerate(sentences("general", 180, words=40))]
    paths = {
        name: write(tmp_path / f"{name}.jsonl", [{"id": str(i), "text": d.text} for i, d in enumerate(same[half])])
        for name, half in (("a", slice(0, 180, 2)), ("b", slice(1, 180, 2)))
    }
    less = {**fields, "curation": None, "sources": paths, "axes": [{"kind": "domain", "values": ["a"]}]}
    recipe: Any = load_recipe(less)
    with Run(tmp_path / "run", recipe) as opened:
        ctx, _ = CorpusContext.open(recipe, opened)
        recipe.build(ctx)
    found = ids(tmp_path / "run", "base")
    assert len(set(found)) == len(found)
    assert all(i.startswith("b/") for i in ids(tmp_path / "run", "without-a"))
