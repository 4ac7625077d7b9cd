"""MeCo: two phases with disjoint documents, sources in front of the first, and what it refuses."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import sentences
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from headwater.claims.meco import SIZES, SOURCES, WORDINGS, make_world
from headwater.core.optim import lr_factor
from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.run import Run, execute
from headwater.corpora.context import CorpusContext
from headwater.corpora.meco import (
    MeCo,
    MeCoCallback,
    MetadataFormatter,
    TwoPhases,
    condition,
    cooldown_plan,
    transform_url,
)
from headwater.corpora.reading import Reader
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.score import bits_per_byte
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.tokenizers import train_bpe

Fields = dict[str, Any]


@pytest.fixture(scope="module")
def fields(corpora_fields: Fields) -> Fields:
    return {"method": "meco", **corpora_fields, "metadata_field": "source"}


@pytest.fixture(scope="module")
def finished(fields: Fields, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("meco") / "run"
    logged = {"precision": "fp32", "log_every": 1, "checkpoint_every": 1, "keep_checkpoints": 50}
    recipe = load_recipe({**fields, "fit": logged, "conditional_evals": ["s1", "nowhere"]})
    return directory, execute(recipe, directory)


def rows(directory: Path, count: int, sources: int = 3, **changes: Any) -> Path:
    """A corpus whose documents come from several hosts in turn."""
    path = directory / f"docs-{len(list(directory.iterdir()))}.jsonl"
    lines = [
        {"id": f"d{i}", "text": text, "url": f"https://host{i % sources}.org/p/{i}", **changes}
        for i, text in enumerate(sentences("general", count))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# -- the two phases


def test_property_the_phases_read_disjoint_documents(fields: Fields, tmp_path: Path) -> None:
    recipe: Any = load_recipe({**fields, "cooldown": 0.3})
    with Run(tmp_path / "run", recipe) as opened:
        ctx, _ = CorpusContext.open(recipe, opened)
        corpus = recipe.build(ctx)
        first, last = (corpus.tables[reading.tables[0]] for reading in corpus.phases)
        train = ctx.sources["text"].train
    assert [reading.share for reading in corpus.phases] == [0.7, 0.3]
    assert not {d.text for d in first} & {d.text for d in last}
    assert {d.id for d in first} | {d.id for d in last} == set(train.ids())
    assert len(last) / len(train) == pytest.approx(0.3, abs=0.1)


def test_property_equal_texts_are_on_one_side_whatever_their_order() -> None:
    texts = [f"text {i}" for i in range(4_000)]
    chosen = cooldown_plan(texts, 0.1)
    assert chosen.mean() == pytest.approx(0.1, abs=0.02)  # four standard deviations
    assert np.array_equal(cooldown_plan(texts[::-1], 0.1)[::-1], chosen)
    assert not (chosen & ~cooldown_plan(texts, 0.2)).any()
    assert not cooldown_plan(texts, 0.0).any()
    assert cooldown_plan([], 0.5).shape == (0,)


def test_oracle_only_the_first_phase_has_sources(fields: Fields, tmp_path: Path) -> None:
    recipe: Any = load_recipe(fields)
    with Run(tmp_path / "run", recipe) as opened:
        ctx, _ = CorpusContext.open(recipe, opened)
        reader = Reader(ctx, recipe.build(ctx))
        phases = reader.phases()
        first = next(phases)
        second = phases.send(type("Trained", (), {"tokens": 9 * 256}))  # type: ignore[arg-type]
        shown = [ctx.tokenizer.decode(p.stream.batch(0)["input_ids"][0]) for p in (first, second)]
    assert "URL: s0\n\n" in shown[0] or "URL: s1\n\n" in shown[0]
    assert "URL" not in shown[1]


def test_equation_the_rate_and_the_moments_cross_the_border(finished: tuple[Path, Any]) -> None:
    directory, _ = finished
    recipe: Any = load_recipe(directory / "recipe.yaml")
    logged = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    rates = [(line["phase"], line["lr"]) for line in logged if "lr" in line]
    assert [phase for phase, _ in rates] == ["conditioned"] * 9 + ["cooldown"]
    expected = [recipe.optim.lr * lr_factor(recipe.optim, (step + 1) / 10) for step in range(10)]
    assert [rate for _, rate in rates] == pytest.approx(expected, rel=1e-6)

    def moments(phase: str, step: int) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(directory / "checkpoints" / phase / f"step-{step:08d}" / "optimizer.safetensors")

    before, after = moments("conditioned", 9), moments("cooldown", 1)
    assert {float(v) for k, v in before.items() if k.endswith("/step")} == {9.0}
    assert {float(v) for k, v in after.items() if k.endswith("/step")} == {10.0}
    squares = [k for k in before if k.endswith("exp_avg_sq")]
    # beta2 is 0.95: one step from zeros would leave a twentieth of one squared gradient, not 0.95 of the average.
    assert all(bool((after[k] >= 0.949 * before[k]).all()) for k in squares)


# -- what it leaves


def test_oracle_sources_are_counted_by_hand(finished: tuple[Path, Any]) -> None:
    directory, _ = finished
    recipe: Any = load_recipe(directory / "recipe.yaml")
    table = {row["value"]: row for row in csv.DictReader((directory / "sources.csv").open())}
    assert set(table) == {"s0", "s1"}
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    with Run(directory.with_name("again"), recipe) as opened:
        ctx, _ = CorpusContext.open(recipe, opened)
        first = next(iter(recipe.build(ctx).tables.values()))
    for value, row in table.items():
        texts = [d.text for d in first if d.meta["source"] == value]
        tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
        assert (int(row["documents"]), int(row["tokens"])) == (len(texts), tokens)
    assert sum(int(row["documents"]) for row in table.values()) == len(first)


def test_oracle_conditional_scores_are_of_the_prompt_in_front(finished: tuple[Path, Any]) -> None:
    directory, result = finished
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    usage = json.loads((directory / "model" / "corpus.json").read_text())
    items = json.loads((directory / "items.json").read_text())
    lines = Path(load_recipe(directory / "recipe.yaml").evals["other"].name).read_text().splitlines()  # type: ignore[attr-defined]
    rows = {row["id"]: row for row in map(json.loads, lines)}
    documents = [rows[i] for i in items["eval/other/bpb"]["ids"]]
    for name, values in {
        "own": [row["source"] for row in documents],
        "given/nowhere": ["nowhere"] * len(documents),
    }.items():
        heads = [tokenizer(usage["template"].format(value=value))["input_ids"] for value in values]
        found = bits_per_byte(model, tokenizer, [row["text"] for row in documents], heads=heads, window=64)
        assert result.metrics[f"eval/other/{name}/bpb"] == pytest.approx(found.bits_per_byte, rel=1e-6)
    assert result.metrics["eval/other/given/s1/bpb"] != result.metrics["eval/other/bpb"]


def test_property_the_readme_says_how_to_call_it(finished: tuple[Path, Any]) -> None:
    directory, _ = finished
    readme = (directory / "model" / "README.md").read_text()
    assert "`URL: {value}\\n\\n`" in readme
    assert "`<eos>`" in readme
    assert json.loads((directory / "model" / "corpus.json").read_text()) == {
        "template": "URL: {value}\n\n",
        "transform": "domain",
        "start_token": "<eos>",
    }


def test_oracle_without_template_and_cooldown_it_is_plain_training(fields: Fields, tmp_path: Path) -> None:
    same = {"packing": "concat", "budget": {"tokens": 2_560}}
    bare = execute(load_recipe({**fields, **same, "template": "", "cooldown": 0.0}), tmp_path / "meco")
    plain = {k: v for k, v in fields.items() if k != "metadata_field"}
    raw = execute(load_recipe({**plain, **same, "method": "raw"}), tmp_path / "raw")
    # Tables have other names, so rows come in another order: equal budgets, other batches.
    assert bare.metrics["tokens_loss"] == raw.metrics["tokens_loss"]
    assert bare.metrics["docs_out"] == raw.metrics["docs_out"]
    assert not (tmp_path / "meco" / "sources.csv").exists()


# -- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"template": "URL: value"}, r"template must hold \{value\} once"),
        ({"cooldown": 0.6}, "cooldown"),
        ({"metadata_dropout": -0.1}, "metadata_dropout"),
        ({"transform": "host"}, "transform"),
        ({"missing": "skip"}, "missing"),
        ({"metadata_field": ""}, "metadata_field"),
    ],
)
def test_rejects_when_built(fields: Fields, changes: Fields, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe({**fields, **changes})


def test_rejects_documents_without_sources(fields: Fields, tmp_path: Path) -> None:
    half = rows(tmp_path, 260)
    lines = [json.loads(line) for line in half.read_text().splitlines()]
    for line in lines[::2]:
        del line["url"]
    half.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {**fields, "metadata_field": "url", "sources": {"text": str(half)}}
    with pytest.raises(
        CorpusError, match=r"\d+ of \d+ documents \(\d\d\.\d%\) have no 'url', e.g. d\d+, d\d+, d\d+; set"
    ):
        execute(load_recipe(given), tmp_path / "a")
    plain = execute(load_recipe({**given, "missing": "plain"}), tmp_path / "b")
    unknown = execute(load_recipe({**given, "missing": "unknown"}), tmp_path / "c")
    found = [{row["value"] for row in csv.DictReader((tmp_path / name / "sources.csv").open())} for name in ("b", "c")]
    assert found[0] - found[1] == {""}
    assert found[1] - found[0] == {"unknown"}
    assert "eval/held_out/own/bpb" not in plain.metrics, "documents without a source have none of their own"
    assert plain.metrics["tokens_loss"] > unknown.metrics["tokens_loss"], "sources take room"


def test_rejects_sources_that_tell_nothing_apart(fields: Fields, tmp_path: Path) -> None:
    given = {**fields, "metadata_field": "url"}
    with pytest.raises(CorpusError, match=r"every document has the source 'host0.org', so there is nothing"):
        execute(load_recipe({**given, "sources": {"text": str(rows(tmp_path, 260, 1))}}), tmp_path / "one")


def test_property_sources_that_are_unique_or_long_are_warned_of(fields: Fields, tmp_path: Path) -> None:
    given = {**fields, "metadata_field": "url", "transform": "full", "sources": {"text": str(rows(tmp_path, 260))}}
    notes = execute(load_recipe(given), tmp_path / "a").notes
    assert "metadata is nearly unique" in notes["warning/sources"]
    assert "use transform=domain" in notes["warning/sources"]
    assert "documents is longer than 16 tokens and is cut" in notes["warning/cut"]


def test_property_no_cooldown_is_allowed_and_warned_of(fields: Fields, tmp_path: Path) -> None:
    result = execute(load_recipe({**fields, "cooldown": 0.0}), tmp_path / "a")
    assert "damaged where it is used without a source" in result.notes["warning/cooldown"]
    assert [p.name for p in (tmp_path / "a" / "checkpoints").iterdir()] == ["conditioned"]


# -- learning


def test_learns_to_keep_contradicting_sources_apart(tmp_path: Path) -> None:
    path = tmp_path / "world.jsonl"
    rng = np.random.default_rng(0)
    keys, values = [f"k{i}" for i in range(12)], [f"v{i}" for i in range(8)]
    stated = {s: rng.integers(8, size=12) for s in ("left", "right")}
    stated["right"] = (stated["left"] + 1 + rng.integers(7, size=12)) % 8
    documents = [
        {"id": f"{k}-{s}-{w}", "text": f"{w} {w} {key} {values[stated[s][k]]}", "source": s}
        for k, key in enumerate(keys)
        for s in stated
        for w in (
            "so",
            "now",
            "then",
            "yes",
            "well",
            "oh",
            "ah",
            "but",
            "and",
            "or",
            "if",
            "as",
            "at",
            "by",
            "in",
            "up",
        )
    ]
    path.write_text("".join(json.dumps(d) + "\n" for d in documents))
    tokenizer = train_bpe([d["text"] for d in documents] + ["URL: left right"], 420)
    tiny_llama(tokenizer, 48, 2, 4, 96, 64, tie=False, generator_seed=0).save_pretrained(tmp_path / "arch")
    tokenizer.save_pretrained(tmp_path / "arch")
    recipe = MeCo(
        sources={"world": {"name": str(path)}}, model={"name": str(tmp_path / "arch")}, seq_len=64, batch_tokens=1024,
        budget={"tokens": 1024 * 150}, optim={"lr": 8e-3, "warmup": 0.05}, held_out=0.1, eval_at=(1.0,),
        metadata_field="source", transform="identity", fit={"precision": "fp32"},
    )  # fmt: skip
    execute(recipe, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    right = {}
    for source in stated:
        answers = []
        for key in keys:
            ids = [tokenizer.eos_token_id, *tokenizer(condition(f"so so {key}", source))["input_ids"]]
            out = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0)
            answers.append(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip())
        for asked in stated:
            right[source, asked] = np.mean([a == values[v] for a, v in zip(answers, stated[asked], strict=True)])
    assert right["left", "left"] > right["left", "right"] + 0.3
    assert right["right", "right"] > right["right", "left"] + 0.3


# -- transformers.Trainer


TEXTS = [*sentences("domain", 60, words=8), *sentences("general", 60, words=8)]
TOKENIZER = train_bpe(TEXTS, 320)
DOCS = [Document(str(i), text, {"url": f"http://h{i % 2}.org"}) for i, text in enumerate(TEXTS)]
STEPS, ROWS = 10, 4


def two_phases(**changes: Any) -> TwoPhases:
    kept = cooldown_plan((d.text for d in DOCS), 0.3)
    first, last = ([d for d, k in zip(DOCS, kept, strict=True) if bool(k) is side] for side in (False, True))
    form = MetadataFormatter(TOKENIZER, "url", max_tokens=20)
    return TwoPhases(first, last, form, seq_len=64, **{"steps": STEPS, "rows": ROWS, "fraction": 0.3, **changes})


class Seen(Trainer):
    """Keeps what it was given."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.seen = [*getattr(self, "seen", []), *inputs["input_ids"].tolist()]
        self.rates = [*getattr(self, "rates", []), self.lr_scheduler.get_last_lr()[0]]
        return super().training_step(model, inputs, num_items_in_batch)


def trainer(directory: Path, dataset: TwoPhases, **changes: Any) -> Seen:
    arguments = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 1,
        "train_sampling_strategy": "sequential", "lr_scheduler_type": "linear", "learning_rate": 1e-2,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_total_limit": 20,
    } | changes  # fmt: skip
    model = tiny_llama(TOKENIZER, 16, 1, 2, 32, 64, generator_seed=0)
    return Seen(
        model=model, args=TrainingArguments(str(directory), **arguments), train_dataset=dataset,
        callbacks=[MeCoCallback(dataset)],
    )  # fmt: skip


def test_property_the_trainer_changes_phase_and_keeps_its_optimizer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = two_phases()
    whole = trainer(tmp_path / "a", dataset)
    with caplog.at_level(logging.INFO, logger="headwater"):
        whole.train()
    shown = [TOKENIZER.decode(ids) for ids in whole.seen]
    assert len(shown) == STEPS * ROWS
    assert [("URL: h" in text) for text in shown] == [True] * 7 * ROWS + [False] * 3 * ROWS
    assert caplog.text.count("step 7: the cooldown begins") == 1
    assert whole.rates[:: ROWS // 2] == pytest.approx([1e-2 * (1 - step / STEPS) for step in range(STEPS)])
    states = whole.optimizer.state.values()
    assert {float(state["step"]) for state in states} == {10.0}


@pytest.mark.parametrize("stopped", [4, 8])
def test_fault_a_resumed_trainer_reads_on_in_either_phase(tmp_path: Path, stopped: int) -> None:
    whole = trainer(tmp_path / "a", two_phases())
    whole.train()
    resumed = trainer(tmp_path / "a", two_phases())
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stopped}"))
    assert resumed.seen == whole.seen[stopped * ROWS :]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_sampling_strategy": "random"}, "would shuffle the two phases; set train_sampling_strategy"),
        ({"max_steps": 12}, "takes 12 steps of 4 rows and the data set is made for 10 of 4"),
        ({"gradient_accumulation_steps": 1}, "takes 10 steps of 2 rows"),
        ({"use_cache": True}, "attention ignores position_ids that start anew"),
    ],
)
def test_rejects_trainers_that_would_break_the_phases(tmp_path: Path, changes: Fields, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, two_phases(), **changes).train()


def test_rejects_documents_in_both_phases() -> None:
    form = MetadataFormatter(TOKENIZER, "url", max_tokens=20)
    with pytest.raises(CorpusError, match=r"2 documents of the cooldown are in the first phase too, e.g. '3'"):
        TwoPhases(DOCS[:5], DOCS[3:9], form, seq_len=64, steps=10, rows=2)
    with pytest.raises(ValueError, match=r"1 steps with a cooldown of 0.1 leave no step for the first phase"):
        TwoPhases(DOCS[:5], DOCS[5:9], form, seq_len=64, steps=1, rows=2)
    with pytest.raises(IndexError, match="position 40 is outside"):
        two_phases()[STEPS * ROWS]


# -- the claim's world


def test_property_the_claims_sources_contradict_each_other_and_leave_no_trace(tmp_path: Path) -> None:
    size = SIZES["small"]
    world = make_world(size, 7, tmp_path)
    documents = [json.loads(line) for line in world.path.read_text().splitlines()]
    assert len(documents) == size.keys * len(SOURCES) * len(WORDINGS)
    assert len({d["text"] for d in documents}) == len(documents)
    by_source = {s: [d["text"] for d in documents if d["source"] == s] for s in SOURCES}
    assert {len(texts) for texts in by_source.values()} == {size.keys * len(WORDINGS)}
    assert all(len(set(row)) == len(SOURCES) for row in world.stated.tolist())
    assert not [d for d in documents if any(part in d["text"] for s in SOURCES for part in s.split("."))]
    stripped = [{text.rpartition(" ")[0] for text in texts} for texts in by_source.values()]
    assert all(one == stripped[0] for one in stripped), "but for the value, all sources write the same"
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    assert len({len(tokenizer(f"say {key}")["input_ids"]) for key in world.keys}) == 1
    split = [*tokenizer(condition("", SOURCES[0]))["input_ids"], *tokenizer("the old")["input_ids"]]
    assert tokenizer(condition("the old", SOURCES[0]))["input_ids"] == split
    assert transform_url(SOURCES[0], "identity") == SOURCES[0]
