"""The family of choosing what is read: plans, hygiene, what the figures mean, what is left behind."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pydantic import Field
from tests.conftest import sentences, write_corpus
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater.core.checkpoint import CheckpointStore
from headwater.core.leak import TestLeak
from headwater.core.optim import OptimSpec
from headwater.core.recipe import CorpusRef, RecipeError, load_recipe
from headwater.core.run import Run, execute
from headwater.corpora.base import CorpusRecipe
from headwater.corpora.context import CorpusContext
from headwater.corpora.plan import Corpus, Reading
from headwater.corpora.reading import Reader
from headwater.corpora.references import Raw
from headwater.modalities.models import ModelError
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.examples import PlainFormatter
from headwater.modalities.text.instruct import AnswerFormatter, answered
from headwater.modalities.text.pairs import Pairs
from headwater.modalities.text.score import bits_per_byte
from headwater.modalities.text.tiny import tiny_t5
from headwater.modalities.text.tokenizers import train_bpe

Fields = dict[str, Any]


def run(fields: Fields, directory: Path, **changes: Any) -> Any:
    return execute(load_recipe({"method": "raw", **fields, **changes}), directory)


class Planned(CorpusRecipe):
    """A method whose plan a test gives: two halves of the source, read in some order and proportion."""

    id: ClassVar[str] = "planned"
    readings: ClassVar[tuple[Reading, ...]] = ()

    def build(self, ctx: CorpusContext) -> Corpus:
        documents = ctx.sources["text"].train
        half = len(documents) // 2
        tables = {"a": documents[:half], "b": documents[half:]}
        read = {table for reading in self.readings for table in reading.tables}
        return Corpus(self.readings, {name: table for name, table in tables.items() if name in read})


def planned(*readings: Reading) -> type[Planned]:
    return type("Planned", (Planned,), {"readings": readings, "__doc__": "A plan."})


@pytest.fixture(scope="module")
def fields(corpora_fields: Fields) -> Fields:
    return {**corpora_fields, "sources": {"text": {"name": corpora_fields["sources"]["text"]}}}


# -- figures


def test_oracle_bits_and_loss_are_the_saved_models_own(corpora_fields: Fields, tmp_path: Path) -> None:
    metrics = run(corpora_fields, tmp_path / "a").metrics
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "model")
    items = json.loads((tmp_path / "a" / "items.json").read_text())["eval/other/bpb"]
    lines = Path(corpora_fields["evals"]["other"]).read_text().splitlines()
    texts = {row["id"]: row["text"] for row in map(json.loads, lines)}
    documents = [texts[i] for i in items["ids"]]
    nats = count = size = 0.0
    for text in documents:
        tokens = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        scored, begin = 1, 0
        while scored < len(tokens):
            end = min(begin + 64, len(tokens))
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([tokens[begin:end]])).logits[0].log_softmax(-1)
            nats -= sum(float(logp[i - 1 - begin, tokens[i]]) for i in range(scored, end))
            scored, begin = end, begin + 32
        count, size = count + len(tokens) - 1, size + len(text.encode())
    assert metrics["eval/other/bpb"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert metrics["eval/other/nll"] == pytest.approx(nats / count, rel=1e-5)
    assert np.mean(items["values"]) == pytest.approx(metrics["eval/other/bpb"], abs=1e-9)


@pytest.mark.parametrize("packing", ["concat", "document", "document, running positions"])
def test_oracle_tokens_are_what_the_batches_held(fields: Fields, tmp_path: Path, packing: str) -> None:
    readings = (Reading("one", 0.5, ("a", "b"), (1.0, 3.0)), Reading("two", 0.5, ("b",)))
    # Twice the source, so that rows are read again.
    recipe = planned(*readings)(**{**fields, "packing": packing, "budget": {"tokens": 256 * 400}})
    with Run(tmp_path / "run", recipe) as opened:
        ctx, _ = CorpusContext.open(recipe, opened)
        reader = Reader(ctx, recipe.build(ctx))
        phases = reader.phases()
        phase, seen, targets, padding = next(phases), [], 0, 0
        while True:
            for step in range(200):
                batch = phase.stream.batch(step)
                seen += [tuple(row) for row in batch["input_ids"].tolist()]
                targets += int((batch["labels"] != -100).sum())
                padding += int((batch["document_ids"] == 0).sum()) if "document_ids" in batch else 0
            trained: Any = type("Trained", (), {"tokens": 200 * 256})
            try:
                phase = phases.send(trained)
            except StopIteration:
                break
        metrics = reader.metrics()
    assert metrics["tokens_trained"] == 2 * 200 * 256 == len(seen) * 64
    assert metrics["tokens_loss"] == targets
    assert metrics["tokens_padding"] == padding
    assert metrics["tokens_unique"] == len(set(seen)) * 64
    assert metrics["epochs"] > 1


def test_property_a_table_is_read_on_and_not_again(fields: Fields, tmp_path: Path) -> None:
    thirds = [Reading(f"part{i}", 1 / 3, ("a",), optim=None if i != 1 else OptimSpec(lr=1e-3)) for i in range(3)]
    recipe = planned(*thirds)(**fields)
    with Run(tmp_path / "run", recipe) as opened:
        ctx, _ = CorpusContext.open(recipe, opened)
        whole = next(Reader(ctx, planned(Reading("all", 1.0, ("a",)))(**fields).build(ctx)).phases()).stream
        phases = Reader(ctx, recipe.build(ctx)).phases()
        phase, step, found = next(phases), 0, []
        for _ in range(3):
            found.append(phase)
            for i in range(5):
                assert torch.equal(phase.stream.batch(i)["input_ids"], whole.batch(step + i)["input_ids"])
            step += 5
            with suppress(StopIteration):
                phase = phases.send(type("Trained", (), {"tokens": 5 * 256}))  # type: ignore[arg-type]
    # A phase of its own rate starts afresh, and so does what follows it.
    assert [p.continues for p in found] == [None, None, None]
    assert [p.schedule_span for p in found] == [pytest.approx(1 / 3), None, pytest.approx(1 / 3)]
    assert found[2].schedule_start == pytest.approx(2 / 3)


def test_property_weights_decide_what_a_batch_holds(fields: Fields, tmp_path: Path) -> None:
    recipe = planned(Reading("mix", 1.0, ("a", "b"), (0.25, 0.75)))(**fields)
    with Run(tmp_path / "run", recipe) as opened:
        ctx, _ = CorpusContext.open(recipe, opened)
        phase = next(Reader(ctx, recipe.build(ctx)).phases())
        parts = [phase.stream.batch(step)["part"].tolist() for step in range(8)]
    assert all(sorted(part) == [0, 1, 1, 1] for part in parts)


def test_learns_and_more_of_the_right_text_is_better(corpora_fields: Fields, tmp_path: Path) -> None:
    more = {**corpora_fields, "budget": {"tokens": 256 * 60}, "optim": {"lr": 1e-2}}
    metrics = run(more, tmp_path / "a").metrics
    start = json.loads((tmp_path / "a" / "trajectory.json").read_text())["series"]["valid/bpb"][0]
    assert start[0] == 0
    assert metrics["valid/bpb"] < start[1] - 1.0, "a random model learns a language of seven words quickly"
    assert metrics["eval/held_out/bpb"] < metrics["eval/other/bpb"] - 0.3


# -- the plan becomes phases


def test_property_a_plan_of_two_phases_shares_schedule_and_moments(fields: Fields, tmp_path: Path) -> None:
    recipe = planned(Reading("one", 0.6, ("a",)), Reading("two", 0.4, ("b",)))(
        **{**fields, "fit": {"precision": "fp32", "log_every": 1, "checkpoint_every": 1, "keep_checkpoints": 50}}
    )
    directory = tmp_path / "run"
    execute(recipe, directory)
    logged = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in logged if "lr" in line]
    whole = [recipe.optim.lr * factor for factor in _factors(recipe.optim, len(rates))]
    assert len(rates) == 10
    assert rates == pytest.approx(whole, rel=1e-6)
    last = _moments(directory, "one", 6)
    first = _moments(directory, "two", 1)
    assert {float(v) for n, v in last.items() if n.endswith("/step")} == {6.0}
    assert {float(v) for n, v in first.items() if n.endswith("/step")} == {7.0}


def _factors(optim: OptimSpec, steps: int) -> list[float]:
    from headwater.core.optim import lr_factor

    return [lr_factor(optim, (step + 1) / steps) for step in range(steps)]


def _moments(directory: Path, phase: str, step: int) -> dict[str, torch.Tensor]:
    path = directory / "checkpoints" / phase / f"step-{step:08d}"
    fingerprint = json.loads((path / "manifest.json").read_text())["manifest"]["data"]
    tensors = CheckpointStore(path.parent, fingerprint=fingerprint)._read(path).tensors
    return {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer/")}


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda t: Corpus((Reading("p", 0.5, ("a",)),), {"a": t}), "share the whole budget; their shares sum to 0.5"),
        (lambda t: Corpus((Reading("p", 0.5, ("a",)),) * 2, {"a": t}), "two phases of a corpus have one name"),
        (lambda t: Corpus((Reading("p", 1.0, ("a",)),), {"b": t}), "'a' is not in both"),
        (lambda t: Corpus((Reading("p", 1.0, ("a",)),), {"a": t, "b": t}), "'b' is not in both"),
        (lambda t: Corpus((Reading("p", 1.0, ("a",)),), {"a": []}), "table 'a' of the corpus holds no document"),
        (lambda t: Reading("p", 1.0, ()), "must read tables, each once"),
        (lambda t: Reading("p", 1.0, ("a", "a")), "must read tables, each once"),
        (lambda t: Reading("p", 1.0, ("a",), (0.5, 0.5)), "has 2 weights for 1 tables"),
    ],
)
def test_rejects_plans_that_do_not_add_up(build: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build([Document("1", "text")])


# -- controllers


class Controlled(CorpusRecipe):
    """Three rounds over two tables, weighed by what a controller is told of two watched sets."""

    id: ClassVar[str] = "controlled"
    told: ClassVar[list[list[dict[str, float]]]] = []

    def build(self, ctx: CorpusContext) -> Corpus:
        documents = ctx.sources["text"].train
        held = [Document(d.id, " ".join(d.text.split()[:6])) for d in ctx.sources["text"].valid]
        half = len(documents) // 2

        def weigh(history: Any) -> tuple[float, float]:
            self.told.append([dict(losses) for losses in history])
            return (0.25, 0.75) if len(history) % 2 else (0.75, 0.25)

        rounds = tuple(Reading(f"round-{i}", share, ("a", "b"), weigh) for i, share in enumerate((0.4, 0.4, 0.2)))
        tables = {"a": documents[:half], "b": documents[half:]}
        return Corpus(rounds, tables, watched={"first": held[:2], "rest": held[2:]})


def test_oracle_a_controller_is_told_the_losses_of_the_model_as_it_is(fields: Fields, tmp_path: Path) -> None:
    Controlled.told.clear()
    execute(Controlled(**fields), tmp_path / "run")
    assert [len(history) for history in Controlled.told] == [1, 2, 3]
    assert Controlled.told[1] == Controlled.told[2][:2], "what was told once stays"
    about = json.loads((tmp_path / "run" / "corpus.json").read_text())["phases"]
    assert [phase["weights"] for phase in about] == [{"a": w, "b": 1 - w} for w in (0.25, 0.75, 0.25)]
    assert [phase["losses"] for phase in about] == Controlled.told[2]
    # The loss before the second round is that of the weights that the first one left, counted by hand.
    recipe = Controlled(**fields)
    with Run(tmp_path / "other", recipe) as opened:
        ctx, _ = CorpusContext.open(recipe, opened)
    path = tmp_path / "run" / "checkpoints" / "round-0" / "step-00000004"
    fingerprint = json.loads((path / "manifest.json").read_text())["manifest"]["data"]
    left = CheckpointStore(path.parent, fingerprint=fingerprint)._read(path).tensors
    model = ctx.model
    model.load_state_dict(
        {n.removeprefix("model/"): t for n, t in left.items() if n.startswith("model/")}, strict=False
    )
    nats = count = 0.0
    for document in recipe.build(ctx).watched["first"]:
        ids = [ctx.tokenizer.eos_token_id, *ctx.tokenizer(document.text)["input_ids"], ctx.tokenizer.eos_token_id]
        with torch.no_grad():
            logp = model.eval()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        nats -= sum(float(logp[i, token]) for i, token in enumerate(ids[1:]))
        count += len(ids) - 1
        assert len(ids) <= 64
    assert Controlled.told[2][1]["first"] == pytest.approx(nats / count, rel=1e-5)


def test_rejects_controllers_that_would_be_told_nothing() -> None:
    documents = [Document("1", "text")]
    with pytest.raises(ValueError, match="the corpus watches none"):
        Corpus((Reading("p", 1.0, ("a",), lambda history: (1.0,)),), {"a": documents})


# -- questions


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    path = tmp_path / "asked.jsonl"
    rows = [{"text": f"graph sum {i}", "label": word} for i, word in enumerate(("graph", "path", "node", "graph"))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_oracle_questions_are_answered_by_the_saved_model(fields: Fields, asked: Path, tmp_path: Path) -> None:
    metrics = run(fields, tmp_path / "run", questions={"facts": str(asked)}, max_answer=4).metrics
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    rows = [json.loads(line) for line in asked.read_text().splitlines()]
    bits = size = exact = 0.0
    for row in rows:
        source = [tokenizer.eos_token_id, *tokenizer(row["text"])["input_ids"]]
        target = [*tokenizer(" " + row["label"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([source + target])).logits[0].log_softmax(-1)
        bits -= sum(float(logp[len(source) + i - 1, t]) for i, t in enumerate(target)) / math.log(2)
        size += len(row["label"])
        ids = list(source)
        while len(ids) < len(source) + 4:
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        exact += tokenizer.decode(ids[len(source) :], skip_special_tokens=True).strip() == row["label"]
    assert metrics["eval/facts/bpb"] == pytest.approx(bits / size, rel=1e-5)
    assert metrics["eval/facts/exact"] == pytest.approx(exact / 4)
    items = json.loads((tmp_path / "run" / "items.json").read_text())["eval/facts/bpb"]["values"]
    assert sum(items) / 4 == pytest.approx(metrics["eval/facts/bpb"])


def test_rejects_a_table_that_holds_a_question(fields: Fields, asked: Path, tmp_path: Path) -> None:
    class Leaky(Raw):
        id: ClassVar[str] = "raw"

        def build(self, ctx: CorpusContext) -> Corpus:
            return Corpus((Reading("train", 1.0, ("t",)),), {"t": [answered("q", "Graph  sum 2", "node")]})

    recipe = Leaky(**{**fields, "questions": {"facts": str(asked)}})
    with pytest.raises(CorpusError, match=r"table 't' holds a question of 'facts' as the prompt of document 'q'"):
        execute(recipe, tmp_path / "run")


class MadeUp(CorpusRecipe):
    """A method that makes its documents and its questions."""

    id: ClassVar[str] = "made_up"
    sources: dict[str, CorpusRef] = Field(default={})
    holds_out: ClassVar[bool] = True

    def build(self, ctx: CorpusContext) -> Corpus:
        documents = [answered(str(i), f"graph sum {i}", "path") for i in range(200)]
        return Corpus((Reading("train", 1.0, ("t",), format=AnswerFormatter(ctx.tokenizer)),), {"t": documents})

    def asked(self) -> dict[str, Pairs]:
        held = {"held_out": Pairs([f"graph {i}" for i in range(4)], ["path"] * 4)}
        return super().asked() | held | ({"valid": Pairs(["sum sum"], ["path"])} if self.holds_out else {})


def test_learns_from_documents_and_questions_of_its_own(fields: Fields, tmp_path: Path) -> None:
    made = {**fields, "sources": {}, "evals": {}, "optim": {"lr": 1e-2}, "budget": {"tokens": 256 * 60}}
    metrics = execute(MadeUp(**made), tmp_path / "run").metrics
    assert metrics["eval/held_out/exact"] == metrics["valid/exact"] == metrics["eval/held_out/rouge_l"] == 1.0
    assert metrics["eval/held_out/bpb"] < 0.3
    with pytest.raises(CorpusError, match="nothing to choose by"):
        execute(type("Blind", (MadeUp,), {"holds_out": False, "__doc__": "One."})(**made), tmp_path / "b")


# -- hygiene


def test_property_near_copies_of_held_out_text_leave_every_source(corpora_fields: Fields, tmp_path: Path) -> None:
    own = write_corpus(tmp_path / "own.jsonl", "general")
    other = tmp_path / "other.jsonl"
    texts = [*sentences("general", 260), *sentences("domain", 260)]
    other.write_text("".join(json.dumps({"id": f"o{i}", "text": t.upper()}) + "\n" for i, t in enumerate(texts)))
    recipe = load_recipe({"method": "raw", **corpora_fields, "sources": {"own": str(own), "other": str(other)}})
    with Run(tmp_path / "run", recipe) as opened:
        ctx, tests = CorpusContext.open(recipe, opened)  # type: ignore[arg-type]
        read = {d.text.lower() for source in ctx.sources.values() for d in source.train}
    held = {d.text.lower() for name in ("held_out", "other") for d in tests[name]}
    assert ctx.dropped > 0
    assert len(held) > 5
    assert not held & read


def test_rejects_a_hook_that_reaches_for_the_test_set(corpora_fields: Fields, tmp_path: Path) -> None:
    class Cheat(Raw):
        id: ClassVar[str] = "raw"

        def build(self, ctx: CorpusContext) -> Corpus:
            tables = {"test": list(ctx.sources["text"].test)}
            return Corpus((Reading("train", 1.0, ("test",)),), tables)

    with pytest.raises(TestLeak, match="the test set"):
        execute(Cheat(**dict(load_recipe({"method": "raw", **corpora_fields}))), tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sources": {}}, "sources"),
        ({"sources": {"no/name": "x.jsonl"}}, "sources"),
        ({"evals": {"held_out": "x.jsonl"}}, "'held_out' names held-out parts of the sources"),
        ({"packing": "padded"}, "packing"),
        ({"eval_at": [0.5, 0.1]}, "must rise"),
        ({"budget": {}}, "give one of tokens"),
        ({"model": {"kind": "gru"}}, "model"),
    ],
)
def test_rejects_when_built(corpora_fields: Fields, changes: Fields, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe({"method": "raw", **corpora_fields, **changes})


def test_rejects_bad_models_and_sources(corpora_fields: Fields, tmp_path: Path) -> None:
    def refused(error: type[Exception], words: str, **changes: Any) -> None:
        with pytest.raises(error, match=words):
            run(corpora_fields, tmp_path / f"run-{len(list(tmp_path.iterdir()))}", **changes)

    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"text": t}) + "\n" for t in sentences("domain", 30)))
    refused(CorpusError, r"sources: \d held-out documents; at least 20", sources={"few": str(few)}, evals={})
    refused(CorpusError, "sources.few: every training document repeats a held-out one", sources={"few": str(few)})
    refused(CorpusError, "evals.same and sources.text hold the same", evals={"same": corpora_fields["sources"]["text"]})
    refused(CorpusError, r"sources.gone: no such file", sources={"gone": str(tmp_path / "gone.jsonl")})
    refused(ModelError, "batch_tokens .32. is less than one row of seq_len 64", batch_tokens=32)
    refused(ModelError, "seq_len is 128 but the model has 64 positions", seq_len=128)
    refused(ModelError, "trains causal language models", model={"kind": "t5", "hidden": 16, "layers": 1, "heads": 2})
    tokenizer = train_bpe(sentences("domain", 5), 320)
    tiny_t5(tokenizer, hidden=16, layers=1, heads=2, mlp=16, generator_seed=0).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    refused(ModelError, "trains causal language models", model=str(tmp_path / "t5"))


def test_fault_a_source_edited_under_a_run_is_refused(corpora_fields: Fields, tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "d.jsonl", "general")
    recipe = load_recipe({"method": "raw", **corpora_fields, "sources": {"text": str(path)}})
    execute(recipe, tmp_path / "a")
    (tmp_path / "a" / "result.json").unlink()
    path.write_text(path.read_text().replace("mean", "main"))
    with pytest.raises(RuntimeError, match=r"the data 'sources.text' changed since this run began"):
        execute(recipe, tmp_path / "a", resume=True)


# -- heads of scored documents


def test_oracle_a_head_is_read_and_not_scored(tiny_causal: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_causal)
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    text, head = sentences("domain", 1, words=30)[0], tokenizer("graph sum")["input_ids"]
    body = tokenizer(text)["input_ids"]
    found = bits_per_byte(model, tokenizer, [text], heads=[head], window=24).nats[0]
    front = [tokenizer.eos_token_id, *head]
    room, nats, scored, begin = 24 - len(front), 0.0, 0, 0
    while scored < len(body):
        end = min(begin + room, len(body))
        ids = [*front, *body[begin:end]]
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        nats -= sum(float(logp[len(front) + i - begin - 1, body[i]]) for i in range(scored, end))
        scored, begin = end, begin + room // 2
    assert len(body) > 2 * room
    assert found == pytest.approx(nats, rel=1e-5)
    plain = bits_per_byte(model, tokenizer, [text], heads=[[]], window=24).nats[0]
    assert plain == bits_per_byte(model, tokenizer, [text], window=24).nats[0] != found
    with pytest.raises(ValueError, match="one head for each document; got 1 for 2"):
        bits_per_byte(model, tokenizer, [text, text], heads=[head])
    with pytest.raises(ValueError, match="leaves no room for a document after a head of"):
        bits_per_byte(model, tokenizer, [text], heads=[[1] * 30], window=24)


def test_property_a_formatter_of_the_plan_is_used(fields: Fields, tmp_path: Path) -> None:
    class Backwards(PlainFormatter):
        @property
        def about(self) -> Any:
            return {**super().about, "format": "backwards"}

        def __call__(self, documents: Any, room: int | None = None) -> Any:
            turned = [Document(d.id, " ".join(reversed(d.text.split())), d.meta) for d in documents]
            return super().__call__(turned, room)

    recipe = planned(Reading("plain", 1.0, ("a",)))(**fields)
    with Run(tmp_path / "run", recipe) as opened:
        ctx, _ = CorpusContext.open(recipe, opened)
        corpus = recipe.build(ctx)
        plain = next(Reader(ctx, corpus).phases()).stream.batch(0)["input_ids"]
        turned = Corpus((Reading("turned", 1.0, ("a",), format=Backwards(ctx.tokenizer)),), corpus.tables)
        other = next(Reader(ctx, turned).phases()).stream.batch(0)["input_ids"]
    words = [sorted(ctx.tokenizer.decode(ids[0], skip_special_tokens=True).split()) for ids in (plain, other)]
    assert not torch.equal(plain, other)
    assert words[0]
    assert {w.strip(".") for w in words[1]} & {w.strip(".") for w in words[0]}
