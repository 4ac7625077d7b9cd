"""The family of alignment: who sees what, what counts as a label, how classes are read off a model, what is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tests.conftest import SYLLABLES
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from headwater.align.base import FAMILY, AlignData, Aligned, ClassAlignment, ClassTask, read_data
from headwater.align.classes import (
    ClassModel,
    ClassObjective,
    ClassStream,
    class_logits,
    class_probabilities,
    label_token_ids,
    open_class_model,
)
from headwater.align.soft_labels import SoftCrossEntropy, soft_cross_entropy
from headwater.core.compare import Comparison, compare
from headwater.core.leak import TestLeak
from headwater.core.lora import LoraSpec
from headwater.core.recipe import DataRef, ModelRef, RecipeError, load_recipe
from headwater.core.run import Run, execute
from headwater.modalities.models import ModelError
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.verifiable import TASKS, Item, build_tokenizer, sample_items

Fields = dict[str, Any]


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows), encoding="utf-8")
    return path


def texts(count: int, seed: int = 0) -> list[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    words = [*SYLLABLES["domain"], *SYLLABLES["general"]]
    return [(" ".join(rng.choice(words, size=9)), "ab"[i % 2]) for i in range(count)]


def items(rows: list[tuple[str, str]]) -> tuple[Item, ...]:
    return tuple(Item(text, label, label, {}) for text, label in rows)


# -- data


def test_property_no_prompt_stands_on_two_sides_and_a_side_depends_on_the_prompt_alone(tmp_path):
    rows = texts(300)
    rows += [(text.upper(), "a") for text, _ in rows[:60]]  # the same words
    path = write(tmp_path / "all.jsonl", rows)
    data = read_data(DataRef(name=str(path)), None, held_out=0.2, validation=0.1)
    sides = {item.prompt: role for role in ("train", "validation", "test") for item in getattr(data, role)}
    assert len(sides) + data.dropped == len(rows)
    for text, _ in rows[:60]:
        assert sides.get(text) == sides.get(text.upper())
    fewer = read_data(DataRef(name=str(path), limit=100), None, held_out=0.2, validation=0.1)
    assert {item.prompt for item in fewer.test} <= {item.prompt for item in data.test}
    assert 0.1 < len(data.test) / len(rows) < 0.3
    assert data.fingerprint != fewer.fingerprint


def test_property_what_repeats_a_test_prompt_is_dropped_and_counted(tmp_path):
    rows = texts(60)
    long = " ".join(texts(20, seed=5)[i][0] for i in range(20))
    rows.append((long + " sum", "a"))
    train = write(tmp_path / "train.jsonl", rows)
    test = write(tmp_path / "test.jsonl", [*rows[:7], (long + " mean", "a"), *texts(20, seed=9)])
    data = read_data(DataRef(name=str(train)), DataRef(name=str(test)), held_out=0.2, validation=0.1)
    assert data.dropped == 8, "seven repeated, one nearly"
    assert len(data.test) == 28
    assert not {i.prompt for i in data.test} & {i.prompt for i in (*data.train, *data.validation)}


def test_property_generated_prompts_may_differ_by_a_number():
    data = read_data(DataRef(name="headwater:verifiable/parity", limit=600), None, held_out=0.2, validation=0.1)
    assert data.dropped == 0
    assert len(data.train) + len(data.validation) + len(data.test) == 600
    assert {item.answer for item in data.train} == {"true", "false"}


def test_rejects_data_that_cannot_be_used(tmp_path):
    one, other = items([("a b", "x")]), items([("c d", "y")])
    with pytest.raises(ValueError, match="'A  b' stands in two sets, test among them"):
        AlignData(one, other, items([("A  b", "x")]), "")
    with pytest.raises(ValueError, match="validation: no examples"):
        AlignData(one, (), other, "")
    with pytest.raises(CorpusError, match="data: no builtin prompts 'headwater:verifiable/none'"):
        read_data(DataRef(name="headwater:verifiable/none"), None, held_out=0.2, validation=0.1)


def test_rejects_halves_that_cannot_teach(align_fields, tmp_path):
    recipe = load_recipe({"method": "weak_supervisor", **align_fields})
    two, more = items([("a b", "x"), ("c d", "y")]), items([("e f", "x"), ("g h", "y")])
    with Run(tmp_path / "run", recipe) as run:

        def task(supervised, unlabelled):
            return ClassTask(recipe, supervised, unlabelled, more, run)  # type: ignore[arg-type]

        assert task(two, more).labels == ("x", "y")
        with pytest.raises(ValueError, match="the halves overlap: 1 prompts are in both, among them 'c d'"):
            task(two, items([("C D", "y"), ("e", "x")]))
        with pytest.raises(ValueError, match="two classes; found x"):
            task(two[:1], more[:1])
        with pytest.raises(ValueError, match="the unlabelled half has no example of 'y'"):
            task(two, more[:1])
        with pytest.raises(ValueError, match="no training example has the label 'z'"):
            task(two, more).codes(items([("q", "z")]))


# -- reading classes off a model


@pytest.fixture(scope="module")
def kit_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 32 x 2 over the kit's vocabulary, random weights."""
    target = tmp_path_factory.mktemp("kit") / "llama"
    tokenizer = build_tokenizer()
    tiny_llama(tokenizer, hidden=32, layers=2, heads=2, mlp=64, context=32, generator_seed=0).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


WORDS = {"true": "true", "false": "false"}


def prompts(count: int = 12) -> list[str]:
    return [item.prompt for item in sample_items(TASKS["parity"], count, 0)]


@pytest.mark.parametrize("keeps", [True, False])
def test_oracle_a_verbaliser_reads_the_token_after_the_prompt(kit_llama, monkeypatch, keeps):
    import headwater.modalities.text.classes as classes

    monkeypatch.setattr(classes, "keeps_logits", lambda model: keeps)
    opened = open_class_model(ModelRef(name=str(kit_llama)), ("false", "true"), verbaliser=WORDS)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(kit_llama), AutoTokenizer.from_pretrained(kit_llama)
    found = opened.probabilities(prompts(), batch_size=5)  # ragged, padded
    for prompt, row in zip(prompts(), found, strict=True):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]])
        with torch.no_grad():
            last = model(input_ids=ids).logits[0, -1]
        expected = last[[tokenizer.convert_tokens_to_ids(word) for word in ("false", "true")]].softmax(0)
        np.testing.assert_allclose(row, expected, atol=1e-6)


def test_property_a_model_without_logits_to_keep_reads_the_same(kit_llama):
    assert open_class_model(ModelRef(name=str(kit_llama)), ("a", "b"), verbaliser={"a": "true", "b": "false"})

    class Plain(nn.Module):
        """Takes no ``logits_to_keep``."""

        def __init__(self):
            super().__init__()
            self.inner = AutoModelForCausalLM.from_pretrained(kit_llama)

        def forward(self, input_ids, attention_mask, use_cache=False):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }
    plain = Plain()
    torch.testing.assert_close(class_logits(plain, batch, (3, 4)), class_logits(plain.inner, batch, (3, 4)))


def test_property_gpt2_answers_too(tmp_path):
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=24)
        GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    opened = open_class_model(ModelRef(name=str(tmp_path)), ("false", "true"), verbaliser=WORDS)
    one_by_one = np.concatenate([opened.probabilities([prompt]) for prompt in prompts()])
    np.testing.assert_allclose(opened.probabilities(prompts()), one_by_one, atol=1e-6)


@pytest.mark.parametrize("fixture", ["tiny_encoder", "tiny_causal"])
def test_property_a_head_ignores_padding_and_follows_its_seed(fixture, request):
    ref = ModelRef(name=str(request.getfixturevalue(fixture)))
    opened, again, other = (open_class_model(ref, ("a", "b", "c"), seed=seed) for seed in (0, 0, 1))
    some = ["sum mean", "graph node edge path tree", "row", "cast fill sort sum"]
    one_by_one = np.concatenate([opened.probabilities([text]) for text in some])
    np.testing.assert_allclose(opened.probabilities(some), one_by_one, atol=1e-6)
    np.testing.assert_array_equal(again.probabilities(some), opened.probabilities(some))
    assert not np.array_equal(other.probabilities(some), opened.probabilities(some))
    assert any("classifier" in name or "score" in name for name in opened.new)
    assert not any("layers" in name or "embeddings.word" in name for name in opened.new)


def test_property_a_long_text_keeps_what_the_answer_follows(kit_llama, tiny_encoder):
    asked = open_class_model(ModelRef(name=str(kit_llama)), ("false", "true"), verbaliser=WORDS, max_tokens=6)
    (ids,) = asked.encode(["parity 1 0 1 1 0 0 1 <sep>"])
    assert asked.tokenizer.decode(ids) == "<bos> 1 0 0 1 <sep>"
    headed = open_class_model(ModelRef(name=str(tiny_encoder)), ("a", "b"), max_tokens=4)
    assert len(headed.encode(["sum mean row axis sort fill cast"])[0]) == 4
    with pytest.raises(ModelError, match="a text without a token"):
        headed.encode([""])


@pytest.mark.parametrize(
    ("verbaliser", "words"),
    [
        ({"true": "true"}, "no text for label 'false'; it has 'true'"),
        ({"true": "true", "false": "false false"}, r"is 2 tokens, \['false', 'false'\]"),
        ({"true": "true", "false": "true"}, "two labels are said by one token"),
    ],
)
def test_rejects_verbalisers_that_do_not_say_each_label_in_one_token(kit_llama, verbaliser, words):
    with pytest.raises(ModelError, match=words):
        label_token_ids(AutoTokenizer.from_pretrained(kit_llama), verbaliser, ("true", "false"))


def test_rejects_models_that_cannot_be_asked_so(kit_llama, tiny_encoder, tiny_masked):
    with pytest.raises(ModelError, match="is no causal language model"):
        open_class_model(ModelRef(name=str(tiny_masked)), ("true", "false"), verbaliser=WORDS)
    with pytest.raises(ModelError, match="lora would freeze a new classification head"):
        open_class_model(ModelRef(name=str(tiny_encoder)), ("true", "false"), lora=LoraSpec())
    with pytest.raises(ModelError, match="reads features; it has no tokenizer"):
        ClassModel(nn.Linear(2, 2), None, ("a", "b")).encode(["x"])


# -- the stream and the objective


def test_property_a_stream_reads_each_row_once_an_epoch_in_any_cut():
    ids = [[n] * (n % 4 + 1) for n in range(10)]
    stream = ClassStream(ids, np.eye(10), rows=4, seed=1, pad=99)
    seen = [int(row) for step in range(5) for row in stream.batch(step)["row"]]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    whole = stream.batch(2)
    for row in range(4):
        part = stream.batch(2, row, row + 1)
        length = part["input_ids"].shape[1]
        assert part["input_ids"].tolist() == whole["input_ids"][row : row + 1, :length].tolist()
        assert (whole["input_ids"][row, length:] == 99).all()
        assert part["attention_mask"].sum() == whole["attention_mask"][row].sum() == length
        assert part["soft_label"].argmax() == part["row"]
    assert stream.steps(2.0) == 5
    assert stream.steps(0.01) == 1
    assert ClassStream(ids, np.eye(10), rows=64).rows == 10
    assert stream.tokens_per_row == 3  # mean of 1 2 3 4 1 2 3 4 1 2 is 2.3
    prints = {ClassStream(ids, np.eye(10), rows=r, seed=s).fingerprint for r, s in ((4, 1), (4, 2), (5, 1))}
    assert len(prints | {ClassStream(ids[::-1], np.eye(10), rows=4, seed=1).fingerprint}) == 4


def test_rejects_streams_without_labels():
    with pytest.raises(ValueError, match="got 2 inputs and 3 targets"):
        ClassStream([[1], [2]], np.eye(3), rows=1)
    with pytest.raises(ValueError, match=r"targets must be probabilities; row 0 is \[1.0, 1.0\]"):
        ClassStream([[1]], [[1, 1]], rows=1)
    with pytest.raises(ValueError, match="rows must be at least 1; got 0"):
        ClassStream([[1]], [[1, 0]], rows=0)
    with pytest.raises(ValueError, match="0 <= start <= stop <= 1"):
        ClassStream([[1]], [[1, 0]], rows=1).batch(0, 0, 2)


def test_equation_soft_cross_entropy():
    # Even logits: ln 2 whatever the target. Logits (ln 3, 0): p = (3/4, 1/4).
    losses = soft_cross_entropy(torch.tensor([[0.0, 0.0], [np.log(3), 0.0]]), torch.tensor([[0.3, 0.7], [0.5, 0.5]]))
    assert losses.tolist() == pytest.approx([np.log(2), -0.5 * np.log(0.75) - 0.5 * np.log(0.25)])
    assert soft_cross_entropy(torch.zeros(0, 2), torch.zeros(0, 2)).shape == (0,)
    with pytest.raises(ValueError, match="logits' shape"):
        soft_cross_entropy(torch.zeros(2, 2), torch.zeros(2, 3))
    loss = ClassObjective(SoftCrossEntropy())(nn.Identity(), {"features": torch.eye(2), "soft_label": torch.eye(2)})
    assert (loss.count, loss.metrics["agrees"].item()) == (2, 1.0)


def test_property_dropout_is_off_while_judging():
    model = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 2)).train()
    X = torch.randn(9, 3)
    np.testing.assert_array_equal(class_probabilities(model, X), class_probabilities(model, X, batch_size=9))
    assert model.training


# -- what a run does


class Peeking(ClassAlignment):
    id: ClassVar[str] = "weak_supervisor"

    def align(self, task: ClassTask) -> Aligned:
        assert len(task.test) > 0
        raise AssertionError


def test_fault_a_method_that_reaches_for_the_test_set_is_stopped(align_fields, tmp_path):
    with pytest.raises(TestLeak, match="the test set is out of reach"):
        execute(Peeking(**load_fields(align_fields)), tmp_path / "run")


def load_fields(fields: Fields) -> Fields:
    return dict(load_recipe({"method": "weak_supervisor", **fields}))


def test_property_references_charge_the_labels_they_look_at(align_fields, tmp_path):
    weak = execute(load_recipe({"method": "weak_supervisor", **align_fields, "ceiling": False}), tmp_path / "weak")
    top = execute(load_recipe({"method": "strong_ceiling", **align_fields, "ceiling": False}), tmp_path / "top")
    assert weak.metrics["cost/labels"] == weak.metrics["data/supervised"] == weak.cost["labels"]
    assert top.metrics["cost/labels"] == top.metrics["data/unlabelled"]
    assert weak.metrics["cost/validation_labels"] > 0
    assert weak.metrics["data/test"] == top.metrics["data/test"]
    assert weak.cost["steps"] == round(weak.metrics["data/supervised"] / 16)
    assert not (tmp_path / "weak" / "ceiling").exists()
    both = execute(load_recipe({"method": "weak_supervisor", **align_fields}), tmp_path / "both")
    assert both.metrics["ceiling/accuracy"] == top.metrics["test/accuracy"], "the same training under either name"
    assert both.metrics["cost/ceiling_labels"] == both.metrics["data/unlabelled"]


def test_property_seeds_draw_other_halves_of_the_same_training_set(align_fields, tmp_path):
    halves = []
    for seed in (0, 1):
        execute(load_recipe({"method": "weak_to_strong", **align_fields, "seed": seed, "ceiling": False,
                             "epochs": 0.1}), tmp_path / str(seed))  # fmt: skip
        import pyarrow.parquet as pq

        halves.append(set(pq.read_table(tmp_path / str(seed) / "labels.parquet")["text"].to_pylist()))
    assert halves[0] != halves[1]
    assert halves[0] & halves[1]


def test_property_a_new_head_is_trained_alone_first(align_fields, tmp_path):
    still = {**align_fields, "epochs": 4.0, "linear_probe_first": True, "ceiling": False}
    run = tmp_path / "run"
    result = execute(load_recipe({"method": "weak_supervisor", **still}), run)
    phases = {json.loads(line)["phase"] for line in (run / "metrics.jsonl").read_text().splitlines()}
    assert phases == {"weak-probe", "weak"}
    steps = round(4 * result.metrics["data/supervised"] / 16)
    assert result.cost["steps"] == steps, "the probe's steps are taken off"
    from safetensors.torch import load_file

    (probe,) = sorted((run / "checkpoints" / "weak-probe").iterdir())[-1:]
    moved = load_file(probe / "model.safetensors").keys()
    assert moved
    assert not any(".encoder." in name for name in moved), "the body stood still"


def kit_fields(kit_llama: Path) -> Fields:
    return {
        "model": str(kit_llama),
        "weak_model": str(kit_llama),
        "data": {"name": "headwater:verifiable/parity", "limit": 500},
        "verbaliser": WORDS,
        "optim": {"lr": 3e-3},
        "fit": {"precision": "fp32"},
    }


def test_property_a_llama_with_a_verbaliser_opens_without_us(kit_llama, tmp_path, monkeypatch):
    run = tmp_path / "run"
    figures = iter([0.1, 0.2])  # the kit's vocabulary cannot say what the ledger asks
    monkeypatch.setattr("headwater.align.tasks.ledger", lambda model, tokenizer: {"copy": next(figures)})
    result = execute(load_recipe({"method": "weak_to_strong", **kit_fields(kit_llama), "epochs": 1.0}), run)
    model, tokenizer = (cls.from_pretrained(run / "model") for cls in (AutoModelForCausalLM, AutoTokenizer))
    said = json.loads((run / "model" / "verbaliser.json").read_text())
    data = read_data(DataRef(name="headwater:verifiable/parity", limit=500), None, held_out=0.2, validation=0.1)
    right = []
    for item in data.test:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(item.prompt)["input_ids"]]])
        with torch.no_grad():
            last = model(input_ids=ids).logits[0, -1]
        answer = max(said, key=lambda label: float(last[tokenizer.convert_tokens_to_ids(said[label])]))
        right.append(answer == item.answer)
    assert result.metrics["test/accuracy"] == pytest.approx(np.mean(right))
    assert (result.metrics["ledger/copy_start"], result.metrics["ledger/copy"]) == (0.1, 0.2)
    assert "verbaliser.json" in (run / "model" / "README.md").read_text()


def test_property_adapters_open_in_peft(kit_llama, tmp_path):
    from peft import PeftModel

    run = tmp_path / "run"
    fields = {**kit_fields(kit_llama), "lora": {"r": 4}, "epochs": 1.0, "ceiling": False}
    result = execute(load_recipe({"method": "weak_to_strong", **fields}), run)
    assert (run / "model" / "adapter_model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(kit_llama)
    opened = PeftModel.from_pretrained(base, run / "model")
    judged = open_class_model(ModelRef(name=str(kit_llama)), ("false", "true"), verbaliser=WORDS)
    judged.model = opened
    data = read_data(DataRef(name="headwater:verifiable/parity", limit=500), None, held_out=0.2, validation=0.1)
    answers = judged.probabilities([item.prompt for item in data.test]).argmax(1)
    right = [judged.labels[a] == item.answer for a, item in zip(answers, data.test, strict=True)]
    assert result.metrics["test/accuracy"] == pytest.approx(np.mean(right))
    assert result.cost["trainable"] < sum(p.numel() for p in base.parameters())
    assert str(kit_llama) in (run / "model" / "README.md").read_text()


def test_learns_classes_of_words(align_fields, tmp_path):
    result = execute(load_recipe({"method": "strong_ceiling", **align_fields, "epochs": 12.0}), tmp_path / "run")
    assert result.metrics["test/accuracy"] > max(0.7, result.metrics["start/accuracy"] + 0.1)
    curve = json.loads((tmp_path / "run" / "trajectory.json").read_text())["series"]["validation/accuracy"]
    assert len(curve) == 3
    assert result.metrics["ceiling/accuracy"] == result.metrics["test/accuracy"]
    assert result.cost["steps"] == round(12 * result.metrics["data/unlabelled"] / 16), "it is trained once"
    assert curve[-1][1] == pytest.approx(result.metrics["validation/accuracy"])


def test_property_a_comparison_sets_the_student_between_supervisor_and_ceiling(align_fields, tmp_path):
    comparison = Comparison(
        family="align",
        shared={**align_fields, "ceiling": True},
        seeds=(0,),
        contestants={"confident": {"method": "weak_to_strong"}},
    )
    board = compare(comparison, tmp_path)
    assert {row.name for row in board.rows} == {"weak", "naive", "ceiling", "confident"}
    assert all(row.status == "done" for row in board.rows)
    assert board.baseline == FAMILY.baseline == "naive"
    assert (tmp_path / "report.html").exists()


def test_rejects_fields_of_another_kind(align_fields):
    for wrong in ({"unlabelled": 1.0}, {"epochs": 0}, {"held_out": 0.0}, {"batch_size": 0}):
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            load_recipe({"method": "weak_to_strong", **align_fields, **wrong})


def test_rejects_fields_that_cannot_be_honoured_together(align_fields):
    with pytest.raises(RecipeError, match="lora would freeze a new classification head"):
        load_recipe({"method": "weak_to_strong", **align_fields, "lora": {"r": 4}})
    with pytest.raises(RecipeError, match="a verbaliser has none"):
        load_recipe({"method": "weak_to_strong", **align_fields, "verbaliser": WORDS, "linear_probe_first": True})


def test_property_classes_have_names_in_the_saved_model(align_fields, tmp_path):
    execute(load_recipe({"method": "weak_supervisor", **align_fields, "ceiling": False}), tmp_path / "run")
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert opened.config.id2label == {0: "domain", 1: "general"}


def test_property_the_ceiling_is_no_cost_of_the_method(align_fields, tmp_path):
    costs = []
    for ceiling in (True, False):
        fields = {**align_fields, "method": "weak_supervisor", "ceiling": ceiling}
        costs.append(execute(load_recipe(fields), tmp_path / str(ceiling)).cost["steps"])
    assert costs[0] == costs[1]
