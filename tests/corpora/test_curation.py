"""Curation as data: steps in YAML, the reference recipe, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import sentences
from typer.testing import CliRunner

from headwater.cli import app
from headwater.core.recipe import CorpusRef, RecipeError, load_recipe
from headwater.core.run import execute
from headwater.corpora.curation import Curation, train_quality
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.document_store import stored_corpus

Fields = dict[str, Any]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Sentences of one language, and of another that is not wanted."""
    good, bad = sentences("general", 150), [t.upper() + " zz zz" for t in sentences("domain", 150)]
    path = tmp_path / "mixed.jsonl"
    rows = [
        {"id": f"{kind}{i}", "text": t} for kind, texts in (("good", good), ("bad", bad)) for i, t in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def wanted(tmp_path: Path) -> Path:
    path = tmp_path / "wanted.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in sentences("general", 400)[200:]))
    return path


def test_learns_what_is_wanted_and_keeps_it(mixed: Path, wanted: Path, tmp_path: Path) -> None:
    steps = [{"kind": "quality", "positives": str(wanted)}, {"kind": "best", "fraction": 0.4}]
    curation = Curation(sources={"all": str(mixed)}, steps=steps)
    done = curation.run_all(tmp_path / "out")["all"]
    kinds = [d.id[:3] for d in done.documents]
    assert len(kinds) == 120
    assert kinds.count("goo") > 110
    assert (tmp_path / "out" / "all" / "quality" / "quality.safetensors").exists()


def test_property_the_recipe_reads_what_the_steps_left(corpora_fields: Fields, tmp_path: Path) -> None:
    curation = {"steps": [{"kind": "sample", "rate": 0.5}]}
    result = execute(load_recipe({"method": "curated", **corpora_fields, "curation": curation}), tmp_path / "run")
    kept = stored_corpus(CorpusRef(name=str(tmp_path / "run" / "curation" / "text" / "kept")), role="kept")
    assert result.metrics["docs_out"] == len(kept)
    assert 0.3 < len(kept) / result.metrics["docs_in"] < 0.7


def test_rejects_positives_that_are_held_out(corpora_fields: Fields, tmp_path: Path) -> None:
    held = corpora_fields["evals"]["other"]
    fields = {**corpora_fields, "curation": {"steps": [{"kind": "quality", "positives": held}]}}
    with pytest.raises(CorpusError, match=r"positives: all \d+ documents repeat held-out ones"):
        execute(load_recipe({"method": "curated", **fields}), tmp_path / "run")


def test_property_a_score_that_is_noise_is_warned_of() -> None:
    texts = [Document(f"{side}{i}", f"graph sum {i}", {}) for side in "ab" for i in range(60)]
    warned: dict[str, str] = {}
    train_quality(texts[:60], [Document(d.id, d.text + " .", {}) for d in texts[60:]], seed=0, warn=warned.__setitem__)
    assert "close to noise: AUC 0." in warned["quality"]
    with pytest.raises(CorpusError, match="ten texts a side at least; got 3 and"):
        train_quality(texts[:3], texts[60:], seed=0, warn=warned.__setitem__)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"kind": "keep", "when": "quality >"}, "cannot read the condition"),
        ({"kind": "best", "fraction": 1.0}, "steps.0"),
        ({"kind": "wash"}, "steps.0"),
        ({"kind": "quality"}, "positives"),
    ],
)
def test_rejects_steps_that_make_no_sense(step: Fields, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Curation(sources={"a": "headwater:networkx"}, steps=[step])


@pytest.mark.parametrize(
    ("use", "args", "words"),
    [
        ("NoSuchFilter", {}, "no block 'NoSuchFilter' in datatrove.pipeline.filters or"),
        ("GopherQualityFilter", {"min_words": 3}, "unexpected keyword argument 'min_words'"),
        ("no.such.module:Filter", {}, "No module named 'no'"),
    ],
)
def test_rejects_blocks_that_are_not_there(mixed: Path, tmp_path: Path, use: str, args: Fields, words: str) -> None:
    curation = Curation(sources={"a": str(mixed)}, steps=[{"kind": "block", "use": use, "args": args}])
    with pytest.raises(CorpusError, match=words):
        curation.run_all(tmp_path / "out")


def test_property_the_command_curates_reports_and_refuses(mixed: Path, tmp_path: Path) -> None:
    plan = tmp_path / "curation.yaml"
    step = "{kind: block, use: 'datatrove.pipeline.filters:RegexFilter', args: {regex_exp: zz}}"
    plan.write_text(f"sources: {{mix: {mixed}}}\nsteps:\n  - {step}\n")
    run = ["curate", str(plan), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, run)
    assert result.exit_code == 0, result.output
    assert "mix: 150 of 300 documents kept" in result.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert "150 of 300 documents" in page
    assert "What it removed" in page
    assert "ZZ ZZ" not in page.upper().replace(" ZZ ZZ", "", 5), "five samples and no more"
    again = CliRunner().invoke(app, [*run, "--set", "steps.0.args.regex_exp=SUM"])
    assert "holds the results of other settings" in str(again.exception)
    written = CliRunner().invoke(
        app, ["curate", str(tmp_path / "out" / "curation.yaml"), "--out", str(tmp_path / "out")]
    )
    assert written.exit_code == 0, "what was resolved runs again"
