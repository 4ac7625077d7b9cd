"""EntiGraph's parts: entities, relations, texts and their store, replay, and the toy model."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from datasets import load_dataset

from headwater.claims.entigraph import SIZES as CLAIM_SIZES
from headwater.claims.entigraph import SOURCE, Person, make_world, scripted
from headwater.corpora.entigraph import (
    Prompts,
    RelationPlan,
    ReplayMixture,
    Synthesis,
    breadth_first,
    entigraph_toy,
    extract_entities,
    fit_mixture_of_exponentials,
    relate,
    rephrase,
    synthesize,
)
from headwater.corpora.entigraph_prompts import split_document
from headwater.corpora.entigraph_texts import TOGETHER, most_telling
from headwater.corpora.entigraph_toy import source_relations
from headwater.modalities.text.docs import CorpusError, Document, read_documents
from headwater.modalities.text.examples import PackedExamples, PlainFormatter, formatted
from headwater.modalities.text.generate import Generator, GeneratorError, Message, Reply, Request, ScriptedGenerator
from headwater.modalities.text.packing import MixedStream
from headwater.modalities.text.tokenizers import word_tokenizer

DOCUMENTS = [
    Document(f"d{i}", f"Ada met Bob in Rome in {i}. Cy was not there.", {"title": f"Letter {i}"}) for i in range(6)
]
NAMES = ("Ada", "Bob", "Rome", "Cy")


def listing(*names: str) -> str:
    return json.dumps({"summary": "A meeting.", "entities": list(names)})


def writer(**handlers: Any) -> ScriptedGenerator:
    def relation(messages: Sequence[Message], rng: random.Random) -> str:
        return " ".join(f"w{rng.randrange(9)}" for _ in range(rng.randrange(4, 9)))

    return ScriptedGenerator({"extract": lambda m, r: listing(*NAMES), "relate": relation, **handlers})


class Recorded(Generator):
    """Keeps the requests that pass, and may fail after so many."""

    def __init__(self, inner: Generator, stop: int | None = None) -> None:
        self.inner, self.id, self.window, self.stop = inner, inner.id, 4, stop
        self.requests: list[Request] = []

    def flow(self, requests: Iterator[Request | None]) -> Any:
        def passing() -> Iterator[Request | None]:
            for request in requests:
                if request is not None:
                    if len(self.requests) == self.stop:
                        raise KeyboardInterrupt
                    self.requests.append(request)
                yield request

        yield from self.inner.flow(passing())


def plans(count: int = len(DOCUMENTS), **changes: Any) -> list[RelationPlan]:
    return [RelationPlan(NAMES, seed=i, **changes) for i in range(count)]


def rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted((directory / "synthetic").iterdir()) for line in path.open()]


# -- entities


def test_property_entities_are_asked_for_of_the_document_and_its_title() -> None:
    generator = Recorded(writer())
    found = list(extract_entities(generator, DOCUMENTS))
    assert [entities.source_id for entities in found] == [d.id for d in DOCUMENTS]
    assert {entities.entities for entities in found} == {NAMES}
    for request, document in zip(generator.requests, DOCUMENTS, strict=True):
        assert document.text in request.messages[-1].content
        assert document.meta["title"] in request.messages[-1].content
        assert '"entities"' in request.messages[0].content


def test_equation_equal_names_are_one_and_absent_ones_are_marked() -> None:
    generator = writer(extract=lambda m, r: listing("Ada", " ADA", "", "Bob  ", "new   york", "Letter 0", "Zoe", "Cy"))
    (found,) = extract_entities(generator, DOCUMENTS[:1], max_entities=5)
    assert found.entities == ("Ada", "Bob", "new york", "Letter 0", "Zoe")
    assert found.absent == ("new york", "Zoe"), "the title counts as text"
    assert found.summary == "A meeting."
    assert found.error is None


def test_property_a_long_document_is_asked_about_in_pieces_and_its_entities_are_merged() -> None:
    text = "\n\n".join(f"In part {i} comes Name{i}. " + "filler " * 30 for i in range(4))

    def first_name(messages: Sequence[Message], rng: random.Random) -> str:
        part = messages[-1].content.split("part ")[1][0]
        return listing(f"Name{part}", "filler", f"only in {part}")

    generator = Recorded(writer(extract=first_name))
    documents = [DOCUMENTS[0], Document("long", text), DOCUMENTS[1]]
    whole = writer(extract=lambda m, r: first_name(m, r) if "part" in m[-1].content else listing(*NAMES))
    generator.inner = whole
    found = list(extract_entities(generator, documents, document_tokens=80))
    assert [len(f.entities) for f in found] == [4, 9, 4]
    assert found[1].entities[:5] == ("Name0", "Name1", "Name2", "Name3", "filler"), "pieces take turns"
    assert len(generator.requests) == 1 + 4 + 1
    assert found[1].summary.count("A meeting.") == 4


def test_degenerate_answers_that_are_no_json_are_asked_for_again_and_then_told() -> None:
    generator = Recorded(writer(extract=lambda m, r: "no" if len(m) < 4 else listing("Ada", "Bob")))
    (found,) = extract_entities(generator, DOCUMENTS[:1])
    assert found.entities == ("Ada", "Bob")
    assert len(generator.requests) == 2
    (failed,) = extract_entities(writer(extract=lambda m, r: "never"), DOCUMENTS[:1])
    assert failed.entities == ()
    assert "no whole JSON" in str(failed.error)
    assert list(extract_entities(writer(), [])) == []
    with pytest.raises(ValueError, match="max_entities must be >= 2; got 1"):
        next(extract_entities(writer(), DOCUMENTS, max_entities=1))


@pytest.mark.parametrize("room", [3, 7, 20, 1000])
def test_property_pieces_fit_and_join_to_the_document(room: int) -> None:
    words = [f"w{i}" for i in range(40)]
    text = "\n\n".join([" ".join(words[:5]), " ".join(words[5:9]) + ". " + " ".join(words[9:30]), " ".join(words[30:])])
    pieces = split_document(Document("d", text, {"title": "t"}), room, lambda t: len(t.split()))
    assert [word for piece in pieces for word in piece.text.split()] == text.split()
    assert max(len(piece.text.split()) for piece in pieces) <= room
    assert {(piece.id, piece.meta["title"]) for piece in pieces} == {("d", "t")}
    if room == 1000:
        assert [piece.text for piece in pieces] == [text]


def test_degenerate_pieces_of_text_without_a_border() -> None:
    pieces = split_document(Document("d", "x" * 50), 8, len)
    assert "".join(piece.text for piece in pieces) == "x" * 50
    assert max(len(piece.text) for piece in pieces) <= 8
    assert len(split_document(Document("d", "x"), 1, lambda text: 5)) == 1, "a character cannot be halved"
    with pytest.raises(ValueError, match="room must be >= 1; got 0"):
        split_document(Document("d", "x"), 0, len)


def test_property_a_relation_is_shown_the_piece_that_names_most_of_it() -> None:
    pieces = [Document("d", text) for text in ("Ada alone", "BOB and Cy", "Ada, Bob and\nCy")]
    assert most_telling(pieces, ("Bob", "Cy")) is pieces[1]
    assert most_telling(pieces, ("Ada", "Bob")) is pieces[2]
    assert most_telling(pieces, ("Zoe", "Eve")) is pieces[0]


# -- the plan


@pytest.mark.parametrize("order", ["shuffled", "reference"])
def test_oracle_every_pair_and_triple_once(order: Any) -> None:
    names = [f"e{i}" for i in range(7)]
    plan = list(RelationPlan(names, order=order, seed=3))
    assert len(plan) == 21 + 35
    assert {frozenset(t) for t in plan} == {frozenset(c) for k in (2, 3) for c in itertools.combinations(names, k)}
    assert len({frozenset(t) for t in plan}) == len(plan)
    assert [len(t) for t in plan] == [2] * 21 + [3] * 35
    in_order = [tuple(c) for c in itertools.combinations(names, 2)]
    assert (plan[:21] == in_order) == (order == "reference")
    assert plan[21:] != [tuple(c) for c in itertools.combinations(names, 3)]


def test_property_a_plan_goes_on_from_any_index() -> None:
    plan = RelationPlan([f"e{i}" for i in range(9)], seed=1)
    whole = list(plan)
    for begin in (0, 1, 35, 36, 37, len(plan) - 1, len(plan)):
        assert plan[begin:] == whole[begin:]
    assert plan[-1] == whole[-1]
    assert list(RelationPlan([f"e{i}" for i in range(9)], seed=2)) != whole
    shorter = RelationPlan([f"e{i}" for i in range(9)], pairs=5, triples=4, seed=1)
    assert list(shorter) == whole[:5] + whole[36:40], "a smaller plan is a part of the larger one"
    with pytest.raises(IndexError, match="index 120 is outside a plan of 120"):
        plan[len(plan)]


def test_degenerate_plans_of_few_entities() -> None:
    assert list(RelationPlan([])) == list(RelationPlan(["a"])) == []
    assert list(RelationPlan(["a", "b"])) == [("a", "b")]
    assert list(RelationPlan(["a", "b", "c"], pairs=0, triples=9)) == [("a", "b", "c")]
    with pytest.raises(ValueError, match="entities must differ"):
        RelationPlan(["a", "a"])
    with pytest.raises(ValueError, match="pairs and triples must be >= 0"):
        RelationPlan(["a", "b"], pairs=-1)


def test_property_documents_take_turns() -> None:
    many = [RelationPlan([f"e{i}" for i in range(n)]) for n in (6, 0, 2, 5)]
    taken = list(breadth_first(many))
    assert [number for number, _ in taken[:3]] == [0, 2, 3], "every document comes before any comes again"
    assert [number for number, _ in taken[3 : 3 + 2 * TOGETHER]] == [0] * TOGETHER + [3] * TOGETHER
    for number, plan in enumerate(many):
        assert [entities for n, entities in taken if n == number] == list(plan)


# -- texts


def test_property_every_text_names_its_source_and_its_prompt_names_the_entities() -> None:
    generator = Recorded(writer())
    relations = [(d, t) for d in DOCUMENTS[:2] for t in RelationPlan(NAMES)]
    texts = list(relate(generator, relations, reply_tokens=77, temperature=0.5))
    assert [t.document.meta["source_id"] for t in texts] == [d.id for d, _ in relations]
    for (document, entities), text, request in zip(relations, texts, generator.requests, strict=True):
        assert text.document.meta["entities"] == list(entities)
        assert text.document.meta["kind"] == {2: "pair", 3: "triple"}[len(entities)]
        asked = request.messages[-1].content
        assert document.text in asked
        listed = asked.split(document.text)[1]
        assert all(f"- {name}" in listed for name in entities)
        assert (request.max_tokens, request.temperature) == (77, 0.5)
    assert len({t.document.id for t in texts}) == len(texts)
    shared = [r.messages[-1].content.split("Names:")[0] for r in generator.requests[:10]]
    assert len(set(shared)) == 1, "what a server can keep of a prompt comes first, pairs and triples alike"
    assert len({r.messages[0] for r in generator.requests}) == 1
    with pytest.raises(ValueError, match="a relation has two or three entities"):
        list(relate(generator, [(DOCUMENTS[0], ["Ada"])]))


def test_property_braces_in_documents_and_names_stay_as_they_are() -> None:
    document = Document("d", "A {entities} and {document} by {0}")
    shown = Prompts().messages("relate", document, ["{document}", "B"])[1].content
    assert shown.count("A {entities} and {document} by {0}") == 1
    assert "- {document}\n- B" in shown


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ("", "the reply is empty"),
        (" \n", "the reply is empty"),
        ("I'm sorry, but I can't help.", "the generator refused"),
        ("I cannot write about this.", "the generator refused"),
        ("Icarus met Ada.", None),
        ("I can't go on, Ada said. " * 20, None),
    ],
)
def test_equation_what_counts_as_a_refusal(reply: str, error: str | None) -> None:
    (text,) = relate(writer(relate=lambda m, r: reply), [(DOCUMENTS[0], NAMES[:2])])
    assert text.error == error


def test_property_retelling_draws_each_style_so_many_times() -> None:
    styles = {f"rephrase {s}": (lambda m, r, s=s: f"{s} {r.random()}") for s in ("easy", "medium", "hard")}
    generator = Recorded(writer(**styles))
    texts = list(rephrase(generator, DOCUMENTS[:2], styles=("easy", "hard"), samples=3))
    assert [t.document.text.split()[0] for t in texts] == (["easy"] * 3 + ["hard"] * 3) * 2
    assert len({t.document.text for t in texts}) == 12
    assert len({t.document.id for t in texts}) == 12
    assert all(d.text in r.messages[-1].content for d, r in zip(DOCUMENTS[:1] * 6, generator.requests, strict=False))


def test_rejects_prompts_without_a_place_for_what_they_show(tmp_path: Path) -> None:
    def written(text: str) -> Path:
        path = tmp_path / "prompts.toml"
        path.write_text(text)
        return path

    own = Prompts.read(written('relate = "Compare."\nshow_entities = "<{document}> {entities}"'))
    assert own.messages("relate", Document("d", "T"), ["A", "B"]) == (
        Message("system", "Compare."),
        Message("user", "<T> - A\n- B"),
    )
    assert own.extract == Prompts().extract
    for text, words in [
        ('show = "no place"', r"must hold \{document\} once"),
        ('show_entities = "{entities} {document}"', r"must hold \{entities\} once, after \{document\}"),
        ('relation = "x"', "relation"),
        ("relate = ", "cannot be used"),
    ]:
        with pytest.raises(CorpusError, match=words):
            Prompts.read(written(text))
    with pytest.raises(CorpusError, match=r"gone\.toml cannot be used"):
        Prompts.read(tmp_path / "gone.toml")


# -- the store


def test_oracle_the_texts_open_in_datasets_and_in_our_reader(tmp_path: Path) -> None:
    done = synthesize(writer(), DOCUMENTS, plans(), tmp_path)
    opened = load_dataset(
        "json", data_files=str(tmp_path / "synthetic" / "*.jsonl"), split="train", cache_dir=str(tmp_path / "c")
    )
    ours = list(read_documents(tmp_path / "synthetic"))
    assert opened["text"] == [d.text for d in ours]
    assert len(ours) == done.texts == done.planned == 6 * (6 + 4)
    assert Counter(d.meta["source_id"] for d in ours) == {d.id: 10 for d in DOCUMENTS}
    assert {tuple(d.meta["entities"]) for d in ours if d.meta["source_id"] == "d0"} == set(plans()[0])
    assert done.tokens == sum(len(d.text.split()) for d in ours)
    assert Synthesis.read(tmp_path) == done


@pytest.mark.parametrize("budget", [1, 40, 41, 199, 10_000])
def test_property_the_budget_is_met_within_a_text_and_nothing_is_thrown_away(tmp_path: Path, budget: int) -> None:
    generator = Recorded(writer())
    done = synthesize(generator, DOCUMENTS, plans(), tmp_path, budget_tokens=budget, reply_tokens=8)
    assert len(generator.requests) == done.texts
    if budget == 10_000:
        assert done.texts == done.planned
    else:
        last = rows(tmp_path)[-1]["completion_tokens"]
        assert done.tokens - last < budget <= done.tokens


@pytest.mark.parametrize("stop", [0, 1, 5, 17])
def test_fault_a_stopped_synthesis_goes_on_and_ends_the_same(tmp_path: Path, stop: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = synthesize(writer(), DOCUMENTS, plans(), whole, budget_tokens=150)
    with pytest.raises(KeyboardInterrupt):
        synthesize(Recorded(writer(), stop), DOCUMENTS, plans(), parts, budget_tokens=150)
    assert Synthesis.read(parts) is None
    written = len(rows(parts))
    rest = Recorded(writer())
    assert synthesize(rest, DOCUMENTS, plans(), parts, budget_tokens=150) == expected
    assert rows(parts) == rows(whole)
    assert len(rest.requests) == expected.texts - written, "what is there is not asked for again"


def test_fault_half_a_line_is_cut_off_and_written_again(tmp_path: Path) -> None:
    expected = synthesize(writer(), DOCUMENTS, plans(), tmp_path)
    before = rows(tmp_path)
    (part,) = (tmp_path / "synthetic").iterdir()
    part.write_bytes(part.read_bytes()[:-20])
    assert synthesize(writer(), DOCUMENTS, plans(), tmp_path) == expected
    assert rows(tmp_path) == before


def test_property_a_larger_budget_goes_on_from_a_smaller_one(tmp_path: Path) -> None:
    synthesize(writer(), DOCUMENTS, plans(), tmp_path / "a", budget_tokens=50)
    synthesize(writer(), DOCUMENTS, plans(), tmp_path / "a", budget_tokens=200)
    synthesize(writer(), DOCUMENTS, plans(), tmp_path / "b", budget_tokens=200)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_rejects_another_plan_in_the_same_place(tmp_path: Path) -> None:
    synthesize(writer(), DOCUMENTS, plans(), tmp_path, budget_tokens=20)
    for changed in (
        {"plans": plans(order="reference")},
        {"documents": [*DOCUMENTS[:-1], Document("d5", "other")]},
        {"generator": ScriptedGenerator(writer().handlers, id="other")},
        {"prompts": Prompts(relate="Compare.")},
    ):
        given: dict[str, Any] = {"generator": writer(), "documents": DOCUMENTS, "plans": plans(), **changed}
        with pytest.raises(CorpusError, match="holds texts of another plan"):
            synthesize(directory=tmp_path, **given)
    with pytest.raises(ValueError, match="every document needs a plan; got 6 and 2"):
        synthesize(writer(), DOCUMENTS, plans(2), tmp_path)


def test_rejects_a_generator_that_refuses_more_than_a_fifth(tmp_path: Path) -> None:
    def sometimes(share: float) -> ScriptedGenerator:
        return writer(relate=lambda m, r: "I'm sorry." if r.random() < share else "Ada and Bob.")

    fine = synthesize(sometimes(0.1), DOCUMENTS, plans(), tmp_path / "fine")
    assert 0 < fine.refused < 0.2 * fine.planned
    assert fine.texts + fine.refused == fine.planned
    refused = [json.loads(line) for line in (tmp_path / "fine" / "refused.jsonl").open()]
    assert [row["error"] for row in refused] == ["the generator refused"] * fine.refused
    words = (
        r"of \d+ texts cannot be used. Change the prompts or the generator. The first:\n  the generator refused: \"I"
    )
    with pytest.raises(GeneratorError, match=words) as raised:
        synthesize(sometimes(0.5), DOCUMENTS, plans(), tmp_path / "bad")
    assert str(raised.value).count("the generator refused") == 3
    assert Synthesis.read(tmp_path / "bad") is None


def test_fault_failed_requests_are_counted_and_sent_again(tmp_path: Path) -> None:
    class Failing(Recorded):
        def flow(self, requests: Iterator[Request | None]) -> Any:
            for position, reply in super().flow(requests):
                down = len(self.requests) % 9 == 0
                yield position, Reply("", "error", 0, 0, None, False, "m", "server down") if down else reply

    first = synthesize(Failing(writer()), DOCUMENTS, plans(), tmp_path)
    assert 0 < first.errors < 10
    assert first.texts == first.planned - first.errors
    again = synthesize(writer(), DOCUMENTS, plans(), tmp_path)
    assert (again.errors, again.texts) == (0, again.planned)


# -- replay


def test_property_replay_takes_its_share_of_the_rows() -> None:
    texts = [f"w{i} w{i + 1} w{i + 2}" for i in range(50)]
    form = PlainFormatter(word_tokenizer(texts))
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    corpus = ReplayMixture(documents[40:], 0.1).corpus(documents[:40])
    (reading,) = corpus.phases
    assert reading.tables == ("synthetic", "replay")
    assert isinstance(reading.weights, tuple)
    parts = [PackedExamples(formatted(corpus.tables[t], form, 8), 8, pad_token_id=0) for t in reading.tables]
    stream = MixedStream(list(zip(parts, reading.weights, strict=True)), 100)
    drawn = sum(int((stream.batch(step)["part"] == 1).sum()) for step in range(100))
    assert abs(drawn - 1000) <= 3 * (10_000 * 0.1 * 0.9) ** 0.5
    assert abs(drawn - 1000) <= 1, "and exactly, since it is not drawn"


def test_degenerate_nothing_to_replay() -> None:
    documents = [Document("a", "text")]
    for mixture in (ReplayMixture(None), ReplayMixture(documents, 0.0)):
        assert list(mixture.corpus(documents).tables) == ["synthetic"]
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\); got 1.0"):
        ReplayMixture(documents, 1.0)


# -- the toy model


@pytest.mark.parametrize(("size", "p"), [(12, 0.1), (25, 0.06), (40, 0.03)])
def test_oracle_the_toy_model_ends_at_what_the_documents_connect(size: int, p: float) -> None:
    accuracy = entigraph_toy(size, p, 60 * size * size, np.random.default_rng(5))
    known = source_relations(size, p, np.random.default_rng(5))
    closure = nx.transitive_closure(nx.from_numpy_array(known, create_using=nx.DiGraph), reflexive=None)
    reachable = sum(1 for x, y in closure.edges if x != y)
    pairs = size * (size - 1)
    assert accuracy[0] == known.sum() / pairs
    assert accuracy[-1] == reachable / pairs
    assert (np.diff(accuracy) >= 0).all()
    assert known.sum() < reachable < pairs


def unique_paths(graph: nx.DiGraph) -> bool:
    reached = ((x, y) for x in graph for y in nx.descendants(graph, x))
    return all(len(list(nx.all_shortest_paths(graph, x, y))) == 1 for x, y in reached)


def drawn_graph(seed: int) -> tuple[nx.DiGraph, np.random.Generator]:
    rng = np.random.default_rng(seed)
    return nx.from_numpy_array(source_relations(15, 0.1, rng), create_using=nx.DiGraph), rng


def test_oracle_a_step_writes_the_shortest_path() -> None:
    # Where there is one shortest path to everything, the curve follows from the definition alone.
    seeds = [s for s in range(150) if nx.number_of_edges(drawn_graph(s)[0]) > 14 and unique_paths(drawn_graph(s)[0])]
    assert len(seeds) >= 3
    for seed in seeds[:3]:
        graph, rng = drawn_graph(seed)
        known, steps = set(graph.edges), 60
        first = rng.integers(15, size=steps)
        other = (first + rng.integers(1, 15, size=steps)) % 15
        counts = [len(known)]
        for x, y in zip(first.tolist(), other.tolist(), strict=True):
            if nx.has_path(graph, x, y):
                known |= {(x, z) for z in nx.shortest_path(graph, x, y)[1:]}
            counts.append(len(known))
        accuracy = entigraph_toy(15, 0.1, steps, np.random.default_rng(seed))
        assert (accuracy * 15 * 14).round(6).tolist() == counts
        assert counts[-1] > counts[0]


def test_degenerate_toy_models() -> None:
    rng = np.random.default_rng(0)
    assert not entigraph_toy(20, 0.0, 50, rng).any()
    assert (entigraph_toy(20, 1.0, 50, rng) == 1).all()
    assert entigraph_toy(2, 0.5, 0, rng).shape == (1,)
    for arguments, words in [
        ((1, 0.5, 1), "num_entities must be >= 2"),
        ((5, 2.0, 1), "p must be in"),
        ((5, 0.5, -1), "steps must be"),
    ]:
        with pytest.raises(ValueError, match=words):
            entigraph_toy(*arguments, rng)


def test_property_the_toy_model_repeats_and_a_longer_run_begins_like_a_shorter() -> None:
    one, other = (entigraph_toy(30, 0.05, steps, np.random.default_rng(9)) for steps in (200, 200))
    assert np.array_equal(one, other)
    assert not np.array_equal(one, entigraph_toy(30, 0.05, 200, np.random.default_rng(8)))


def test_oracle_the_fit_finds_a_curve_of_its_own_form() -> None:
    t = np.concatenate([[0], np.geomspace(1, 1e4, 60)])
    true = 0.8 * (1 - 0.3 * np.exp(-0.1 * t) - 0.6 * np.exp(-0.001 * t))
    fit = fit_mixture_of_exponentials(t, true, k=2)
    assert fit.limit == pytest.approx(0.8, rel=1e-3)
    assert fit.rates == pytest.approx([0.1, 0.001], rel=1e-2)
    assert fit.shares == pytest.approx([0.3, 0.6], rel=1e-2)
    assert fit.error < 1e-5
    assert fit(t) == pytest.approx(true, abs=1e-4)


def test_learns_the_toy_models_curve_better_than_one_exponential() -> None:
    accuracy = entigraph_toy(100, 0.02, 60_000, np.random.default_rng(0))
    t = np.unique(np.concatenate([[0], np.geomspace(1, 60_000, 80).astype(int)]))
    three, one = (fit_mixture_of_exponentials(t, accuracy[t], k=k) for k in (3, 1))
    assert three.error < one.error / 2
    assert three.limit == pytest.approx(accuracy[-1], abs=0.05)
    assert (three.shares >= 0).all()
    assert three.shares.sum() <= 1 + 1e-9


def test_rejects_curves_that_cannot_be_fitted() -> None:
    for t, accuracy, words in [
        ([0, 1], [0, 1, 2], "must be"),
        ([0, 1, 2], [0, 0.1, 0.2], "7 parameters need k >= 1 and as many points; got k=3, 3 points"),
        ([-1, *range(9)], [0.1] * 10, "t must be >= 0 and differ"),
    ]:
        with pytest.raises(ValueError, match=words):
            fit_mixture_of_exponentials(t, accuracy)


# -- the claim's world


def test_property_the_claims_generator_knows_only_its_prompt(tmp_path: Path) -> None:
    size = CLAIM_SIZES["smoke"]
    world = make_world(size, 3, tmp_path)
    names = [name for p in (*world.general, *world.new) for name in (p.person, p.city, p.trade)]
    assert len(set(names)) == 3 * (size.general + size.new)
    general = (tmp_path / "general.jsonl").read_text()
    assert not [p for p in world.new if p.person in general or p.city in general or p.trade in general]
    person = Person("ano", "beburg", "cier")
    document = Document("x", person.say(SOURCE))
    (found,) = extract_entities(scripted(), [document])
    assert found.entities == ("ano", "beburg", "cier")
    texts = [t.document.text for t in relate(scripted(), [(document, p) for p in RelationPlan(found.entities)])]
    beginnings = {text.split()[0] for text in texts}
    assert beginnings <= {"ano", "beburg", "cier"}
    assert all(len(text.split(" . ")) == n for text, n in zip(texts, (2, 2, 2, 3), strict=True))
    retold = [t.document.text for t in rephrase(scripted(), [document], samples=4)]
    for text in retold:
        places = [text.index(name) for name in found.entities]
        assert places == sorted(places), "retellings keep the order of the document"
    assert len(set(retold)) > 2
