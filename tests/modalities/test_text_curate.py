"""Curation: what is kept does not depend on how it is run, nothing is lost, and it goes on where it stopped."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.formatters.base import BaseFormatter

from headwater.modalities.text.curate import Checkpoint, Curated, CurationChanged, Dedup, Executor, curate
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.document_store import DocumentStore, write_documents
from headwater.modalities.text.steps import Keep, KeepBest, ParetoKeep, Sample, Score


class Words:
    """A scorer that counts its calls."""

    fingerprint = "words"
    texts: ClassVar[int] = 0

    def __call__(self, texts: Sequence[str]) -> Any:
        Words.texts += len(texts)
        return np.array([len(text.split()) for text in texts], dtype=float)


class Shout(BaseFormatter):
    """Upper case, except where it breaks."""

    name = "shout"

    def format(self, text: str) -> str:
        if text.startswith("break"):
            raise OSError("no voice")
        return text.upper()


class Picky(BaseFilter):
    """A filter that breaks on some documents."""

    name = "picky"

    def filter(self, doc: Any) -> Any:
        if "break" in doc.text:
            raise KeyError("unreadable")
        return len(doc.text) % 2 == 0 or (False, "odd")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DocumentStore:
    documents = [Document(f"d{i}", " ".join(f"w{i % 7}{k}" for k in range(1 + i % 9)), {"n": i}) for i in range(200)]
    return write_documents(documents, tmp_path_factory.mktemp("store") / "documents.arrow")


class Part:
    fingerprint = "part"

    def __call__(self, texts: Sequence[str]) -> Any:
        return np.array([len(text) % 10 / 10 for text in texts])


def steps() -> list[Any]:
    first = [Score("words", Words()), Score("part", Part()), Keep("words > 2"), Sample(0.8)]
    return [*first, ParetoKeep("part", alpha=1), KeepBest("words", 0.5)]


def rows(directory: Path, kind: str) -> Iterator[dict[str, Any]]:
    for path in sorted((directory / kind).rglob("*.jsonl.gz")):
        with gzip.open(path, "rt") as lines:
            yield from map(json.loads, lines)


def test_oracle_what_is_kept_is_what_the_steps_keep_one_by_one(store: DocumentStore, tmp_path: Path) -> None:
    done = curate(store, steps(), tmp_path / "c", shard_documents=60)
    from datatrove.data import Document as Row

    given: Any = [Row(text=d.text, id=d.id, metadata=dict(d.meta)) for d in store]
    for step in steps():
        given = list(given)
        if isinstance(step, KeepBest):
            step.learn(d.metadata for d in given)
        given = list(step.run(iter(given), 0, 1))
    assert [d.id for d in done.documents] == [d.id for d in given]
    assert 0 < len(given) < 100
    assert done.documents[0].meta["words"] == given[0].metadata["words"]


def test_property_nothing_is_lost(store: DocumentStore, tmp_path: Path) -> None:
    done = curate(store, steps(), tmp_path / "c", shard_documents=60)
    kept, removed = ([row["id"] for row in rows(tmp_path / "c", kind)] for kind in ("kept", "removed"))
    assert sorted(kept + removed) == sorted(d.id for d in store)
    reasons = {row["filter_reason"] for row in rows(tmp_path / "c", "removed")}
    assert {"not words > 2", "not drawn", "drawn against part"} <= reasons
    for step in done.steps:
        assert step.docs_in == step.docs_out + sum(step.removed.values())
    assert done.steps[-1].docs_out == len(kept)
    manifest = [json.loads(line) for line in (tmp_path / "c" / "manifest.jsonl").read_text().splitlines()]
    assert sum(line["docs_in"] for line in manifest if line["name"] == "score words") == 200
    assert len(manifest) == 6 * 4


def test_property_shards_and_processes_change_no_document(store: DocumentStore, tmp_path: Path) -> None:
    whole = curate(store, steps(), tmp_path / "a").documents
    shards = curate(store, steps(), tmp_path / "b", shard_documents=17).documents
    processes = curate(store, steps(), tmp_path / "c", shard_documents=60, executor=Executor(workers=2)).documents
    assert whole.fingerprint == shards.fingerprint == processes.fingerprint
    assert [d.meta for d in whole] == [d.meta for d in processes]


def test_property_ray_keeps_the_same_documents_byte_for_byte(store: DocumentStore, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    here = curate(store, steps()[:4], tmp_path / "a", shard_documents=100)
    try:
        there = curate(
            store,
            steps()[:4],
            tmp_path / "b",
            shard_documents=100,
            executor=Executor(kind="ray", workers=2, gigabytes=0.2),
        )
    finally:
        ray.shutdown()
    assert there.documents.fingerprint == here.documents.fingerprint
    for kind in ("kept", "removed"):
        assert list(rows(tmp_path / "a", kind)) == list(rows(tmp_path / "b", kind))


def test_property_scores_are_computed_once_for_many_thresholds(store: DocumentStore, tmp_path: Path) -> None:
    Words.texts = 0
    ids = []
    for limit in (2, 4, 6):
        plan = [Score("words", Words()), Checkpoint(), Keep(f"words > {limit}")]
        ids.append({d.id for d in curate(store, plan, tmp_path / "c", overwrite=True).documents})
    assert Words.texts == 200
    assert ids[0] > ids[1] > ids[2]


def test_fault_a_broken_document_is_kept_with_its_error(tmp_path: Path) -> None:
    texts = ["fine", "break it", "fine too", "break", "odd"]
    store = write_documents([Document(str(i), t, {}) for i, t in enumerate(texts)], tmp_path / "s.arrow")
    done = curate(store, [Picky(), Shout()], tmp_path / "c")
    assert [d.text for d in done.documents] == ["FINE", "FINE TOO"]
    broken = list(rows(tmp_path / "c", "errors"))
    assert [row["id"] for row in broken] == ["1", "3"]
    assert broken[0]["text"] == "break it"
    assert broken[0]["error"] == "KeyError('unreadable')"
    assert "in filter" in broken[0]["traceback"]
    assert [row["id"] for row in rows(tmp_path / "c", "removed")] == ["4"], "also after a restart of the step"
    assert (done.steps[0].errors, done.steps[0].removed, done.steps[1].changed) == (2, {"odd": 1}, 2)
    with pytest.raises(RuntimeError, match="step 'shout' broke on 2 documents of shard 0, more than max_errors=1"):
        curate(store, [Shout()], tmp_path / "d", max_errors=1)


class Choosy:
    """A scorer that breaks on a whole batch for one text of it."""

    fingerprint = "choosy"

    def __call__(self, texts: Sequence[str]) -> Any:
        if any("w03" in text for text in texts):
            raise ValueError("cannot score w03")
        return np.array([float(len(text)) for text in texts])


class Every(BaseFormatter):
    """Gives back every other document, and is no filter."""

    name = "every other"

    def format(self, text: str) -> str:
        return text

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        for number, document in enumerate(data):
            if number % 2:
                yield document


def test_fault_one_text_of_a_batch_breaks_a_scorer_and_the_others_are_scored(
    store: DocumentStore, tmp_path: Path
) -> None:
    done = curate(store, [Score("size", Choosy()), Keep("size > 0")], tmp_path / "c")
    bad = [d.id for d in store if "w03" in d.text]
    assert len(bad) > 3
    assert [row["id"] for row in rows(tmp_path / "c", "errors")] == bad
    assert [d.id for d in done.documents] == [d.id for d in store if d.id not in bad]
    assert [d.meta["size"] for d in done.documents] == [len(d.text) for d in done.documents]


def test_fault_an_error_before_a_batch_is_not_taken_for_the_batchs(store: DocumentStore, tmp_path: Path) -> None:
    class Late(Keep):
        def filter(self, doc: Any) -> Any:
            if int(doc.id[1:]) >= 150:
                raise OSError("the disk went away")
            return True

    with pytest.raises(RuntimeError, match="broke on 4 documents of shard 0"):
        curate(store, [Late("n >= 0"), Score("words", Words())], tmp_path / "c", max_errors=3)
    assert not list(rows(tmp_path / "c", "errors"))[4:]
    assert not (tmp_path / "c" / "stages" / "00" / "logs" / "completions" / "00000").exists()


def test_property_what_a_step_does_not_give_back_is_kept(store: DocumentStore, tmp_path: Path) -> None:
    done = curate(store, [Every(), Score("words", Words())], tmp_path / "c")
    assert [d.id for d in done.documents] == [d.id for d in store][1::2]
    removed = list(rows(tmp_path / "c", "removed"))
    assert [row["id"] for row in removed] == [d.id for d in store][::2]
    assert {row["filter_reason"] for row in removed} == {"not given back"}


def test_property_a_removed_document_is_as_it_came(tmp_path: Path) -> None:
    class Mangle(BaseFilter):
        name = "mangle"

        def filter(self, doc: Any) -> Any:
            doc.text = doc.text.upper()
            return doc.id != "1"

    documents = [Document(str(i), f"text {i}", {"text": "other", "n": i}) for i in range(3)]
    done = curate(write_documents(documents, tmp_path / "s.arrow"), [Mangle()], tmp_path / "c")
    assert [row["text"] for row in rows(tmp_path / "c", "removed")] == ["text 1"]
    assert [d.text for d in done.documents] == ["TEXT 0", "TEXT 2"]
    assert done.documents[0].meta["meta_text"] == "other"


def test_rejects_other_metadata_under_the_same_texts(tmp_path: Path) -> None:
    for year in (1, 2):
        documents = [Document(str(i), f"text {i}", {"year": i * year}) for i in range(4)]
        store = write_documents(documents, tmp_path / f"{year}.arrow")
        if year == 1:
            assert len(curate(store, [Keep("year > 2")], tmp_path / "c").documents) == 1
        else:
            with pytest.raises(CurationChanged, match="documents was"):
                curate(store, [Keep("year > 2")], tmp_path / "c")


def test_fault_an_interrupted_curation_goes_on(store: DocumentStore, tmp_path: Path) -> None:
    class Stop(Keep):
        def filter(self, doc: Any) -> Any:
            if doc.id == "d130" and not (tmp_path / "go").exists():
                raise KeyboardInterrupt
            return super().filter(doc)

    plan: list[Any] = [Score("words", Words()), Stop("words > 2")]
    Words.texts = 0
    with pytest.raises(KeyboardInterrupt):
        curate(store, plan, tmp_path / "c", shard_documents=60)
    seen = Words.texts
    (tmp_path / "go").touch()
    done = curate(store, plan, tmp_path / "c", shard_documents=60)
    assert Words.texts == seen + 100, "two shards of four were finished, and the third begins anew"
    whole = curate(store, [Score("words", Words()), Keep("words > 2")], tmp_path / "d")
    assert done.documents.fingerprint == whole.documents.fingerprint
    removed = [row["id"] for row in rows(tmp_path / "c", "removed")]
    assert len(removed) == len(set(removed))
    Words.texts = 0
    assert curate(store, plan, tmp_path / "c", shard_documents=60).steps == done.steps
    assert Words.texts == 0


def test_fault_a_truncated_output_is_made_again(store: DocumentStore, tmp_path: Path) -> None:
    plan = [Score("words", Words()), Keep("words > 2")]
    before = curate(store, plan, tmp_path / "c", shard_documents=60).documents.fingerprint
    path = tmp_path / "c" / "kept" / "00001.jsonl.gz"
    path.write_bytes(path.read_bytes()[:50])
    Words.texts = 0
    assert curate(store, plan, tmp_path / "c", shard_documents=60).documents.fingerprint == before
    assert Words.texts == 50, "the shards have 50 documents"


def test_rejects_results_of_other_settings(store: DocumentStore, tmp_path: Path) -> None:
    curate(store, [Score("words", Words()), Keep("words > 2")], tmp_path / "c")
    with pytest.raises(CurationChanged, match=r'step 2 of stage 1 was .*"words > 2".* and is .*"words > 3"'):
        curate(store, [Score("words", Words()), Keep("words > 3")], tmp_path / "c")
    with pytest.raises(CurationChanged, match=r"documents was .* and is"):
        curate(store.select(range(100)), [Score("words", Words()), Keep("words > 2")], tmp_path / "c")
    with pytest.raises(CurationChanged, match="step 3 of stage 1 was nothing and is"):
        curate(store, [Score("words", Words()), Keep("words > 2"), Sample(0.5)], tmp_path / "c")


def test_property_more_or_fewer_stages_are_made_where_they_differ(store: DocumentStore, tmp_path: Path) -> None:
    scored: list[Any] = [Score("words", Words())]
    for tail in (
        [Keep("words > 2")],
        [Keep("words > 2"), Checkpoint(), Sample(0.5)],
        [Checkpoint(), Keep("words > 2")],
    ):
        found = curate(store, [*scored, *tail], tmp_path / "one", overwrite=True).documents
        fresh = curate(store, [*scored, *tail], tmp_path / f"fresh{len(tail)}{type(tail[0]).__name__}").documents
        assert found.fingerprint == fresh.fingerprint


def test_learns_to_drop_all_but_one_of_near_duplicates(tmp_path: Path) -> None:
    letters = "abcdefghijk"  # since datatrove takes all numbers for one
    base = " ".join(f"{a}w{b}" for a in letters for b in letters)
    texts = [
        base,
        base + " more",
        "another text entirely " + " ".join(f"{b}x{a}" for a in letters for b in letters),
        base,
    ]
    store = write_documents([Document(str(i), t, {}) for i, t in enumerate(texts)], tmp_path / "s.arrow")
    done = curate(store, [Dedup(), Score("words", Words())], tmp_path / "c", shard_documents=2)
    kept = [d.id for d in done.documents]
    assert len(kept) == 2
    assert "2" in kept
    assert done.steps[0].name == "near-duplicates"
    assert done.steps[0].docs_in - done.steps[0].docs_out == 2
    assert len(list(rows(tmp_path / "c", "removed"))) == 2


def test_rejects_what_cannot_be_run(store: DocumentStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one step"):
        curate(store, [Checkpoint()], tmp_path / "a")
    limit = 3
    with pytest.raises(ValueError, match=r"holds filter_function=.*Give the step an attribute `about`"):
        curate(store, [LambdaFilter(lambda doc: len(doc.text) > limit)], tmp_path / "b")
    with pytest.raises(CorpusError, match=r"kept no document; step 'keep n < 0' dropped 200 of 200, for not n < 0"):
        assert curate(store, [Keep("n < 0")], tmp_path / "c").documents


def test_property_two_functions_of_one_name_are_told_apart(store: DocumentStore, tmp_path: Path) -> None:
    def build(flip: bool) -> Any:
        if flip:
            return LambdaFilter(lambda doc: len(doc.text) > 3)
        return LambdaFilter(lambda doc: len(doc.text) > 4)

    curate(store, [build(False)], tmp_path / "c")
    with pytest.raises(CurationChanged):
        curate(store, [build(True)], tmp_path / "c")


def test_property_samples_are_kept_only_when_asked_for(store: DocumentStore, tmp_path: Path) -> None:
    def shown(samples: int) -> Curated:
        return curate(store, [Keep("n > 20"), Shout()], tmp_path / str(samples), samples=samples)

    assert not any(step.samples for step in shown(0).steps)
    first, second = shown(2).steps
    assert [s["fate"] for s in first.samples] == ["removed", "removed", "kept", "kept"]
    assert first.samples[0]["note"] == "not n > 20"
    assert [s["note"] for s in second.samples] == [s["text"].upper() for s in second.samples]
