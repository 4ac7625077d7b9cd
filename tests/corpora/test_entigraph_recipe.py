"""The recipe EntiGraph: what it generates, reads and leaves, how it resumes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.chat_server import ChatServer, chat_server
from tests.conftest import write_corpus

from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.run import Run, execute
from headwater.corpora.context import CorpusContext
from headwater.corpora.entigraph import read_entities
from headwater.modalities.text.docs import CorpusError, read_documents
from headwater.modalities.text.generate import GeneratorError

Fields = dict[str, Any]


@pytest.fixture(scope="module")
def fields(entigraph_fields: Fields) -> Fields:
    return {"method": "entigraph", **entigraph_fields}


@pytest.fixture(scope="module")
def finished(fields: Fields, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("entigraph") / "run"
    return directory, execute(load_recipe(fields), directory)


def written(messages: list[dict[str, str]]) -> str:
    """The words of three letters in what is shown, or a text about the names that are given."""
    system, shown = (message["content"] for message in messages[:2])
    if '"entities"' in system:
        words = sorted({word for word in shown.split() if len(word) == 3})
        return json.dumps({"summary": "Words.", "entities": words[:3]})
    names = [line[2:] for line in shown.split("Names:")[1].splitlines() if line.startswith("- ")]
    return f"{' and '.join(names)} occur together in this text."


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server(written) as server:
        yield server


@pytest.fixture
def served(fields: Fields, server: ChatServer, tmp_path: Path) -> Fields:
    """Fields of a recipe whose entities are asked for; 1 USD for a thousand tokens."""
    generator = {**server.spec, "price": [1e3, 1e3]}
    known = {name: value for name, value in fields.items() if name != "entities"}
    return {**known, "generator": {**generator, "cache": str(tmp_path / "replies.sqlite")}, "target_tokens": 400}


def texts(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted((directory / "synthetic").iterdir()) for line in path.open()]


def test_property_what_is_read_is_synthetic_and_a_tenth_general(fields: Fields, finished: tuple[Path, Any]) -> None:
    directory, result = finished
    written = texts(directory)
    recipe: Any = load_recipe(fields)
    with Run(directory.with_name("again"), recipe) as opened:
        ctx, tests = CorpusContext.open(recipe, opened)
        corpus = recipe.build(ctx)
        train = {d.id: d.text for d in ctx.sources["text"].train}
    (reading,) = corpus.phases
    assert (reading.tables, reading.weights) == (("synthetic", "replay"), (0.9, 0.1))
    assert [d.text for d in corpus.tables["synthetic"]] == [row["text"] for row in written]
    assert all(d.id.startswith("music") for d in corpus.tables["replay"])
    assert {row["source_id"] for row in written} <= set(train), "held-out documents are not written about"
    assert not {d.id for d in tests["held_out"]} & {row["source_id"] for row in written}
    assert all(set(row["entities"]) <= {"sum", "mean", "axis"} for row in written)
    metrics = result.metrics
    assert metrics["synthetic_texts"] == len(written) == metrics["generator_requests"] - metrics["refused"]
    assert 1_500 <= metrics["synthetic_tokens"] == sum(row["completion_tokens"] for row in written) < 1_500 + 24
    assert metrics["generator_prompt_tokens"] > sum(len(train[row["source_id"]].split()) for row in written)
    assert metrics["generator_usd"] == 0
    assert metrics["entities"] == 3 * len(train)
    assert "`synthetic`" in (directory / "model" / "README.md").read_text()


def test_property_the_budget_covers_many_documents(finished: tuple[Path, Any]) -> None:
    written = texts(finished[0])
    assert len({row["source_id"] for row in written}) == len(written), "first one of every document"


def test_oracle_entities_and_texts_come_from_the_server(served: Fields, server: ChatServer, tmp_path: Path) -> None:
    result = execute(load_recipe(served), tmp_path / "run")
    metrics = result.metrics
    lists = [json.loads(line) for line in (tmp_path / "run" / "entities.jsonl").open()]
    extracted = [m for m in server.asked if '"entities"' in m[0]["content"]]
    assert len(extracted) == len(lists) == metrics["docs_in"]
    assert {row["summary"] for row in lists} == {"Words."}
    assert metrics["generator_requests"] == len(server.asked)
    assert metrics["generator_prompt_tokens"] == 100 * len(server.asked)
    completion = metrics["generator_completion_tokens"]
    assert metrics["generator_usd"] == pytest.approx((100 * len(server.asked) + completion) / 1e3)
    written = texts(tmp_path / "run")
    assert completion > metrics["synthetic_tokens"] == sum(len(row["text"].split()) for row in written)
    by_id = {row["source_id"]: row["entities"] for row in lists}
    for row in written:
        assert set(row["entities"]) <= set(by_id[row["source_id"]])
        assert row["text"].startswith(" and ".join(row["entities"]))
        assert row["model"] == "served"


def test_fault_a_run_stopped_in_the_synthesis_pays_nothing_twice(
    served: Fields, server: ChatServer, tmp_path: Path
) -> None:
    whole = execute(load_recipe(served), tmp_path / "whole")
    asked = len(server.asked)
    fresh = {**served, "generator": {**served["generator"], "cache": str(tmp_path / "other.sqlite")}}
    strict = {**fresh, "generator": {**fresh["generator"], "max_requests": asked - 10}}
    with pytest.raises(GeneratorError, match="the next request could pass max_requests"):
        execute(load_recipe(strict), tmp_path / "run")
    assert 0 < len(texts(tmp_path / "run")) < len(texts(tmp_path / "whole"))
    before = len(server.asked)
    resumed = execute(load_recipe(strict), tmp_path / "run", resume=True)
    assert len(server.asked) - before == 10, "what has a reply is not asked for again"
    shared = [name for name in whole.metrics if not any(w in name for w in ("seconds", "bytes"))]
    assert {n: resumed.metrics[n] for n in shared} == pytest.approx({n: whole.metrics[n] for n in shared})
    assert texts(tmp_path / "run") == texts(tmp_path / "whole")


def test_fault_a_run_stopped_in_training_needs_no_generator(fields: Fields, tmp_path: Path) -> None:
    shutil.copytree(fields["generator"]["model"], tmp_path / "writer")
    own = {**fields, "generator": {"kind": "hf", "model": str(tmp_path / "writer")}}
    first = execute(load_recipe(own), tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "writer" / "config.json").unlink()
    again = execute(load_recipe(own), tmp_path / "run", resume=True)
    assert again.metrics["eval/held_out/bpb"] == first.metrics["eval/held_out/bpb"]
    assert again.metrics["generator_requests"] == first.metrics["generator_requests"]


def test_property_texts_of_another_run_need_no_generator(
    fields: Fields, finished: tuple[Path, Any], tmp_path: Path
) -> None:
    directory, result = finished
    given = {name: value for name, value in fields.items() if name not in ("generator", "entities", "target_tokens")}
    made = execute(load_recipe({**given, "synthetic": str(directory / "synthetic")}), tmp_path / "run")
    assert made.metrics["eval/held_out/bpb"] == result.metrics["eval/held_out/bpb"]
    assert made.metrics["docs_out"] == result.metrics["docs_out"]
    assert "generator_requests" not in made.metrics
    assert next(read_documents(directory / "synthetic")).meta["kind"] == "pair"


def test_property_entities_of_another_run_are_not_asked_for_again(
    served: Fields, server: ChatServer, tmp_path: Path
) -> None:
    execute(load_recipe(served), tmp_path / "first")
    asked = len(server.asked)
    given = {**served, "entities": str(tmp_path / "first" / "entities.jsonl"), "order": "reference"}
    second = execute(load_recipe(given), tmp_path / "second")
    assert not [m for m in server.asked[asked:] if '"entities"' in m[0]["content"]]
    lists = [(tmp_path / name / "entities.jsonl").read_text() for name in ("first", "second")]
    assert lists[0] == lists[1]
    assert second.metrics["generator_requests"] == second.metrics["synthetic_texts"]


def test_property_several_sources_keep_their_documents_apart(
    served: Fields, server: ChatServer, tmp_path: Path
) -> None:
    other = write_corpus(tmp_path / "music.jsonl", "music", 60)
    rows = [{**json.loads(line), "id": f"general-{i}"} for i, line in enumerate(other.open())]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {**served, "sources": {**served["sources"], "other": str(other)}, "replay": None}
    result = execute(load_recipe(given), tmp_path / "run")
    ids = set(read_entities(tmp_path / "run" / "entities.jsonl"))
    assert {i.split("/")[0] for i in ids} == {"text", "other"}
    assert len(ids) == result.metrics["docs_in"]
    assert "expect the model to forget" in result.notes["warning/replay"]


def test_property_what_could_not_be_done_is_told(fields: Fields, tmp_path: Path) -> None:
    lines = Path(fields["entities"]).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows[::2]:
        row["entities"] = ["sum"]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"entities": str(tmp_path / "few.jsonl"), "target_tokens": 10**6, "triples": 0, "reply_tokens": 8}
    result = execute(load_recipe({**fields, **changes, "pairs": 1, "document_tokens": 100}), tmp_path / "run")
    notes, metrics = result.notes, result.metrics
    assert (
        f"{int(metrics['documents_skipped'])} documents have fewer than two entities: general-"
        in notes["warning/skipped"]
    )
    planned = int(metrics["docs_in"] - metrics["documents_skipped"])
    gave = int(metrics["synthetic_tokens"])
    assert f"all {planned} pairs and triples gave {gave} tokens, not 1000000" in notes["warning/target"]
    assert f"{planned} documents are longer than document_tokens" in notes["warning/split"]
    skipped = {row["source_id"] for row in rows[::2]}
    assert not skipped & {row["source_id"] for row in texts(tmp_path / "run")}


def test_property_entities_may_hold_any_character(tmp_path: Path) -> None:
    path = tmp_path / "entities.jsonl"
    rows = [{"source_id": "a", "entities": ["x\u2028y", "z"]}, {"source_id": "b", "entities": [], "error": "none"}]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert {i: row["entities"] for i, row in read_entities(path).items()} == {"a": ["x\u2028y", "z"]}


# -- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"synthetic": "x.jsonl"}, "give one of `generator`"),
        ({"generator": None}, "give one of `generator`"),
        ({"target_tokens": None}, "`generator` needs `target_tokens`"),
        ({"generator": None, "synthetic": "x.jsonl"}, "`synthetic` has none"),
        ({"replay_rate": 1.0}, "replay_rate"),
        ({"pairs": -1}, "pairs"),
        ({"triples": "some"}, "triples"),
        ({"max_entities": 1}, "max_entities"),
        ({"order": "random"}, "order"),
    ],
)
def test_rejects_when_built(fields: Fields, changes: Fields, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe({**fields, **changes})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", r"entities.jsonl:2 is no row like"),
        ('{"source_id": "a"}', r"entities.jsonl:2 is no row like"),
        ('{"source_id": "a", "entities": "sum"}', r"entities.jsonl:2 is no row like"),
        ('{"source_id": 3, "entities": ["sum"]}', r"entities.jsonl:2 is no row like"),
        ("[1]", r"entities.jsonl:2 is no row like"),
        (None, "names none of the documents, e.g. 'general-"),
    ],
)
def test_rejects_entities_that_are_none(fields: Fields, line: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "entities.jsonl"
    path.write_text('{"source_id": "elsewhere", "entities": ["sum", "mean"]}\n' + (f"{line}\n" if line else ""))
    with pytest.raises(CorpusError, match=words):
        execute(load_recipe({**fields, "entities": str(path)}), tmp_path / "run")


def test_rejects_what_cannot_give_a_corpus(fields: Fields, served: Fields, server: ChatServer, tmp_path: Path) -> None:
    def refused(error: type[Exception], words: str, **changes: Any) -> None:
        with pytest.raises(error, match=words):
            execute(load_recipe({**fields, **changes}), tmp_path / f"run-{len(list(tmp_path.iterdir()))}")

    refused(CorpusError, r"prompts: .*gone.toml cannot be used", prompts=str(tmp_path / "gone.toml"))
    refused(CorpusError, "entities: .* cannot be read", entities=str(tmp_path / "gone.jsonl"))
    one = [{**json.loads(line), "entities": ["sum"]} for line in Path(fields["entities"]).read_text().splitlines()]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in one))
    refused(CorpusError, r"none of \d+ documents has two entities", entities=str(tmp_path / "one.jsonl"))
    twice = [json.loads(line) for line in Path(fields["sources"]["text"]).read_text().splitlines()]
    trained = _trained(fields, tmp_path)
    copied = next(row for row in twice if row["id"] in trained)
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*twice, {**copied, "text": "new"}]))
    refused(CorpusError, "two documents have one id", sources={"text": str(tmp_path / "twice.jsonl")})
    refused(CorpusError, "replay: all .* documents repeat held-out ones", replay=fields["evals"]["other"])
    server.reply = lambda messages: "I'm sorry, I can't."
    no_entities = {"generator": served["generator"], "entities": None}
    refused(GeneratorError, r"20 of 20 lists of entities cannot be used.*\n.*no whole JSON", **no_entities)
    refused(GeneratorError, r"of \d+ texts cannot be used.*\n.*refused: \"I'm sorry", generator=served["generator"])


def _trained(fields: Fields, tmp_path: Path) -> set[str]:
    recipe: Any = load_recipe(fields)
    with Run(tmp_path / "look", recipe) as opened:
        return set(CorpusContext.open(recipe, opened)[0].sources["text"].train.ids())
