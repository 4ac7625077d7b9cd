"""The recipe of 1.5-Pints: what it keeps, when it stops for a person, which tokenizer and how much of what it reads."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import sentences
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.run import Run, execute
from headwater.corpora.context import CorpusContext
from headwater.corpora.reading import Reader
from headwater.corpora.vocabulary import extend_tokenizer
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.quality import QualityClassifier
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.tokenizers import train_bpe

Fields = dict[str, Any]


def write(path: Path, texts: list[str]) -> str:
    path.write_text(
        "".join(json.dumps({"id": f"{path.stem}-{i}", "text": text}) + "\n" for i, text in enumerate(texts))
    )
    return str(path)


@pytest.fixture(scope="module")
def fields(corpora_fields: Fields, tmp_path_factory: pytest.TempPathFactory) -> Fields:
    """Two sources in which every third text is of the wanted kind."""
    root = tmp_path_factory.mktemp("pints")

    def mixed(seed: int) -> list[str]:
        wanted, other = (sentences(kind, 140, seed=seed, words=40) for kind in ("domain", "general"))
        return [wanted[i] if i % 3 == 0 else other[i] for i in range(140)]

    return {
        **corpora_fields,
        "method": "pints",
        "sources": {name: write(root / f"{name}.jsonl", mixed(seed)) for seed, name in enumerate(("books", "web"))},
        "evals": {},
        "positives": write(root / "positives.jsonl", sentences("domain", 60, seed=9, words=40)),
        "review": "skip",
        "eval_at": [1.0],
    }


def judge(directory: Path, **words: str) -> Path:
    """Fill the sheet of a run in, one word for each source."""
    sheet = directory / "review.csv"
    rows = list(csv.DictReader(sheet.open(newline="")))
    with sheet.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "verdict": words[row["source"]]} for row in rows)
    return sheet


def plan_of(directory: Path) -> dict[str, dict[str, str]]:
    return {row["name"]: row for row in csv.DictReader((directory / "plan.csv").open())}


# -- what is read


def test_oracle_the_best_share_of_each_source_is_read(fields: Fields, tmp_path: Path) -> None:
    recipe: Any = load_recipe(fields)
    with Run(tmp_path / "run", recipe) as opened:
        ctx, _ = CorpusContext.open(recipe, opened)
        corpus = recipe.build(ctx)
        scorer = QualityClassifier.load(tmp_path / "run" / "expository")
        for name, table in corpus.tables.items():
            train = list(ctx.sources[name].train)
            scores = scorer([document.text for document in train])
            best = np.argsort(-scores)[: len(table)]
            assert {document.id for document in table} == {train[i].id for i in best}
            assert len(table) / len(train) == pytest.approx(0.3, abs=0.02)
            assert all(int(document.id.split("-")[1]) % 3 == 0 for document in table), "texts of the wanted kind"
        labels = next(Reader(ctx, corpus).phases()).stream.batch(0)["labels"]
        assert (labels[:, 0] == -100).all(), "a row begins with the last token of another, which is predicted there"
        assert (labels[:, 1:] != -100).all()


def test_property_a_threshold_keeps_what_reaches_it(fields: Fields, tmp_path: Path) -> None:
    kept = []
    for name, keep in (("half", {"share": 0.5}), ("all that is as good as half of these", None)):
        if keep is None:
            scores = sorted(document.meta["expository"] for table in kept[0].values() for document in table)
            least = round(scores[len(scores) // 2], 4)
            keep = {"score": least}
        recipe: Any = load_recipe({**fields, "keep": keep})
        with Run(tmp_path / name, recipe) as opened:
            ctx, _ = CorpusContext.open(recipe, opened)
            kept.append(recipe.build(ctx).tables)
    for name, table in kept[1].items():
        good = [document.id for document in kept[0][name] if document.meta["expository"] >= least]
        assert [document.id for document in table] == good
        assert 0 < len(good) < len(kept[0][name])


def test_oracle_tokens_of_each_source_are_as_planned(fields: Fields, tmp_path: Path) -> None:
    mixture = {"books": {"weight": 3, "epochs_cap": 0.5}, "web": {"weight": 1}}
    result = execute(load_recipe({**fields, "mixture": mixture, "keep": {"share": 0.9}}), tmp_path / "run")
    plan = plan_of(tmp_path / "run")
    assert [float(row["weight"]) for row in plan.values()] == [0.75, 0.25]
    assert sum(float(row["tokens"]) for row in plan.values()) == pytest.approx(2560)
    books = plan["books"]
    available = float(books["available"])
    assert float(books["tokens"]) == pytest.approx(min(0.75 * 2560, 0.5 * available))
    assert result.metrics["epochs"] <= 0.5 * 1.2, "rows are whole, so a source may be read a row further"
    logged = json.loads((tmp_path / "run" / "corpus.json").read_text())["phases"][0]
    assert logged["tables"] == ["books", "web"]
    assert logged["weights"] == [pytest.approx(float(row["tokens"])) for row in plan.values()]


def test_property_a_source_without_weight_is_not_read(fields: Fields, tmp_path: Path) -> None:
    mixture = {"books": {"weight": 1}, "web": {"weight": 0}}
    execute(load_recipe({**fields, "mixture": mixture}), tmp_path / "run")
    assert list(json.loads((tmp_path / "run" / "corpus.json").read_text())["documents"]) == ["books"]
    assert plan_of(tmp_path / "run")["web"]["tokens"] == "0.0"


def test_rejects_caps_that_leave_too_little_before_training(fields: Fields, tmp_path: Path) -> None:
    mixture = {name: {"weight": 1, "epochs_cap": 0.01} for name in ("books", "web")}
    with pytest.raises(ValueError, match=r"at their caps the sources give .* less than the 2,560 asked for; raise"):
        execute(load_recipe({**fields, "mixture": mixture}), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


# -- the review


def test_property_a_required_review_stops_and_goes_on_from_its_sheet(fields: Fields, tmp_path: Path) -> None:
    recipe = load_recipe({**fields, "review": "require", "review_documents": 20})
    directory = tmp_path / "run"
    with pytest.raises(CorpusError, match=r"the review waits for you: read .*review.html, write accept, clean or"):
        execute(recipe, directory)
    with pytest.raises(CorpusError, match="40 of 40 verdicts are blank, in rows 1, 2,"):
        execute(recipe, directory, resume=True)
    sheet = judge(directory, books="accept", web="reject")
    filled = sheet.read_text()
    result = execute(recipe, directory, resume=True)
    assert sheet.read_text() == filled
    assert list(json.loads((directory / "corpus.json").read_text())["documents"]) == ["books"]
    found = json.loads((directory / "review.json").read_text())
    assert {name: verdict["decision"] for name, verdict in found.items()} == {"books": "accept", "web": "reject"}
    assert "0 of 20 reviewed documents of 'web' were accepted (0% to 16%)" in result.notes["warning/review/web"]
    # The same sheet serves another seed, and one whose score was clean names the cure.
    judge(directory, books="accept", web="clean")
    other = execute(load_recipe({**fields, "review": str(sheet), "review_documents": 20, "seed": 5}), tmp_path / "b")
    assert "clean it (`headwater curate`)" in other.notes["warning/review/web"]
    judge(directory, books="reject", web="reject")
    with pytest.raises(CorpusError, match="the review let no source pass"):
        execute(load_recipe({**fields, "review": str(sheet), "review_documents": 20}), tmp_path / "c")


# -- tokenizer and model


def test_oracle_the_tokenizer_that_compresses_best_is_chosen_and_saved(fields: Fields, tmp_path: Path) -> None:
    texts = [*sentences("domain", 60, seed=3), *sentences("general", 60, seed=3)]
    for name, size in (("coarse", 280), ("fine", 600)):
        train_bpe(texts, size).save_pretrained(tmp_path / name)
        tiny_llama(8, 16, 1, 2, 32, 64, generator_seed=0).config.save_pretrained(tmp_path / name)
    candidates = [str(tmp_path / "coarse"), str(tmp_path / "fine")]
    execute(load_recipe({**fields, "tokenizer_candidates": candidates}), tmp_path / "run")
    table = list(csv.DictReader((tmp_path / "run" / "tokenizers.csv").open()))
    assert [(row["tokenizer"], row["source"]) for row in table] == [
        (name, source) for name in candidates for source in ("books", "web")
    ]
    assert float(table[2]["bytes_per_token"]) > float(table[0]["bytes_per_token"])
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert saved.get_vocab() == extend_tokenizer(AutoTokenizer.from_pretrained(candidates[1])).get_vocab()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == len(saved)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (saved.eos_token_id, saved.pad_token_id)


def test_property_an_extended_tokenizer_changes_neither_itself_nor_the_weights(fields: Fields, tmp_path: Path) -> None:
    extended = extend_tokenizer(AutoTokenizer.from_pretrained(fields["model"]))
    tiny_llama(extended, 16, 1, 2, 32, 64, generator_seed=0).save_pretrained(tmp_path / "model")
    extended.save_pretrained(tmp_path / "model")
    weights = []
    shared = {"model": str(tmp_path / "model")}
    raw = {name: fields[name] for name in fields if name not in ("method", "positives", "review")}
    for given in ({**fields, **shared}, {**raw, **shared, "method": "raw"}):
        recipe: Any = load_recipe(given)
        with Run(tmp_path / given["method"], recipe) as opened:
            ctx, _ = CorpusContext.open(recipe, opened)
            recipe.build(ctx)
            weights.append({name: value.clone() for name, value in ctx.model.state_dict().items()})
            assert ctx.tokenizer.get_vocab() == extended.get_vocab()
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_property_a_pretrained_model_keeps_its_rows(fields: Fields, tmp_path: Path) -> None:
    recipe: Any = load_recipe({**fields, "from_scratch": False})
    with Run(tmp_path / "run", recipe) as opened:
        ctx, _ = CorpusContext.open(recipe, opened)
        recipe.build(ctx)
        rows = ctx.model.get_input_embeddings().weight
    before = AutoModelForCausalLM.from_pretrained(fields["model"]).get_input_embeddings().weight
    assert torch.equal(rows[: len(before)], before)
    assert torch.allclose(rows[len(before) :], before.mean(0), atol=1e-7)


# -- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mixture": {"books": {"weight": 1}}}, "mixture must name every source, and only these; 'web'"),
        ({"mixture": {"books": {"weight": -1}, "web": {"weight": 1}}}, "mixture.books.weight"),
        ({"mixture": {"books": {"weight": 0}, "web": {"weight": 0}}}, "one of the weights must be above 0"),
        ({"keep": {"share": 1.0}}, "keep"),
        ({"keep": {"share": 0.3, "score": 0.5}}, "keep"),
        ({"chat_templates": ["vicuna"]}, "chat_templates"),
        ({"from_scratch": False, "tokenizer_candidates": ["gpt2"]}, "reads with its own tokenizer"),
        (
            {
                "mixture": {"books": {"weight": 1, "epochs_cap": 2}, "web": {"weight": 1}},
                "budget": {"seconds": 10},
            },
            "epochs_cap needs a budget in tokens or steps; got one in seconds",
        ),
    ],
)
def test_rejects_when_built(fields: Fields, changes: Fields, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe({**fields, **changes})


def test_rejects_a_sheet_that_is_not_there(fields: Fields, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"review: no file .*no.csv; .*review: require"):
        execute(load_recipe({**fields, "review": str(tmp_path / "no.csv")}), tmp_path / "run")


# -- what follows, and learning


def test_property_instruction_tuning_is_the_next_step_of_a_pipeline(
    fields: Fields, text_to_text_fields: Fields, tmp_path: Path
) -> None:
    tuned = {**text_to_text_fields, "method": "text_finetuning", "model": "previous"}
    result = execute(load_recipe({"method": "pipeline", "steps": [fields, tuned]}), tmp_path / "run")
    assert any(name.startswith("01-text_finetuning/") for name in result.metrics)
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "01-text_finetuning" / "model")
    assert saved.convert_tokens_to_ids("<|im_end|>") is not None
    assert len(saved) % 64 == 0


def test_learns_the_wanted_kind_sooner_than_from_everything(fields: Fields, tmp_path: Path) -> None:
    held = {"wanted": write(tmp_path / "wanted.jsonl", sentences("domain", 30, seed=77, words=40))}
    extended = extend_tokenizer(AutoTokenizer.from_pretrained(fields["model"]))
    tiny_llama(extended, 32, 1, 2, 64, 64, generator_seed=0).save_pretrained(tmp_path / "model")
    extended.save_pretrained(tmp_path / "model")
    shared = {"evals": held, "model": str(tmp_path / "model"), "budget": {"steps": 60}, "batch_tokens": 512}
    raw = {name: fields[name] for name in fields if name not in ("method", "positives", "review")}
    curated = execute(load_recipe({**fields, **shared}), tmp_path / "curated").metrics
    whole = execute(load_recipe({**raw, **shared, "method": "raw", "packing": "concat"}), tmp_path / "raw").metrics
    assert curated["tokens_trained"] == whole["tokens_trained"]
    assert curated["eval/wanted/bpb"] < whole["eval/wanted/bpb"] - 0.1
