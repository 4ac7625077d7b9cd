from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater.compose.base import (
    FAMILY,
    AdapterOnDisk,
    CallableModel,
    Composed,
    Composition,
    CompositionContext,
)
from headwater.compose.instruction_vector import InstructionVector
from headwater.compose.references import Average, SinglePart
from headwater.compose.suites import BitsSuite, ChoiceSuite, retention
from headwater.core.leak import TestLeak
from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.run import Result, execute
from headwater.core.weights import WeightSource
from headwater.modalities.models import ModelError
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.score import choice_scores
from headwater.modalities.text.tiny import tiny_bert, tiny_llama
from headwater.modalities.text.tokenizers import train_bpe

WORDS = ["graph", "edge", "node", "path", "tree", "cycle", "walk", "degree", "color", "flow", "cut", "sort", "heap"]


def sentence(i: int) -> str:
    return " ".join(WORDS[(i * k + k * k) % len(WORDS)] for k in range(1, 12)) + f" {i}"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Path]:
    """A base and two models near it, with one tokenizer, an adapter, texts and prompts."""
    root = tmp_path_factory.mktemp("world")
    texts = [sentence(i) for i in range(120)]
    tokenizer = train_bpe(texts, 300)
    paths = {"root": root, "texts": root / "texts.jsonl", "prompts": root / "prompts.jsonl"}
    paths["texts"].write_text("".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))
    rows = [{"text": text, "label": (" yes", " no")[i % 2]} for i, text in enumerate(texts[:60])]
    paths["prompts"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, role in enumerate(("base", "domain", "instruct")):
        model = tiny_llama(tokenizer, hidden=16, layers=1, heads=2, mlp=16, context=64, generator_seed=0)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter.add_(noise, alpha=0.02 * min(number, 1))
        paths[role] = root / role
        model.save_pretrained(paths[role])
        tokenizer.save_pretrained(paths[role])
    wrapped = get_peft_model(
        AutoModelForCausalLM.from_pretrained(paths["base"]), LoraConfig(r=2, target_modules=["q_proj"])
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    paths["adapter"] = root / "adapter"
    wrapped.save_pretrained(paths["adapter"])
    return paths


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))


def fields(world: dict[str, Path], **changes: object) -> dict[str, object]:
    return {
        "models": {role: str(world[role]) for role in ("base", "domain", "instruct")},
        "suites": {
            "text": {"kind": "bits_per_byte", "corpus": str(world["texts"]), "held_out": 0.3},
            "answers": {"kind": "choice", "data": str(world["prompts"]), "metric": "cross_entropy"},
        },
    } | changes


def run(
    world: dict[str, Path], directory: Path, cls: type[Composition] = InstructionVector, **changes: object
) -> Result:
    return execute(cls(**fields(world, **changes)), directory)


def test_oracle_metrics_follow_from_the_suites(world, tmp_path):
    metrics = run(world, tmp_path / "run").metrics
    for name in ("text", "answers"):
        best = min(metrics[f"suite/{name}/{role}"] for role in ("base", "domain", "instruct"))
        assert metrics[f"retention/{name}"] == pytest.approx(best / metrics[f"suite/{name}/composed"])
    assert metrics["retention/min"] == min(metrics["retention/text"], metrics["retention/answers"])
    assert metrics["inference/flops_ratio"] == 1.0
    assert metrics["inference/params_resident"] == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(world["base"]).parameters()
    )
    items = json.loads((tmp_path / "run" / "items.json").read_text())["suite/text/composed"]
    assert sum(items["values"]) / len(items["ids"]) == pytest.approx(metrics["suite/text/composed"])


def test_oracle_family_names_metrics_that_a_run_has(world, tmp_path):
    metrics = run(world, tmp_path / "run").metrics
    for axis in (FAMILY.gain, FAMILY.price, *FAMILY.columns, FAMILY.selection):
        assert axis.metric in metrics
    assert FAMILY.baseline in FAMILY.references


def test_property_the_whole_opens_without_headwater(world, tmp_path):
    result = run(world, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert model(**tokenizer("graph edge", return_tensors="pt")).logits.shape[-1] == len(tokenizer)
    assert (tmp_path / "run" / "geometry.csv").read_text().startswith("tensor,elements,norm/base")
    written = (tmp_path / "run" / "model" / "model.safetensors").stat().st_size
    assert result.cost["bytes_written"] == written
    assert result.cost["bytes_read"] == 3 * sum(parameter.nbytes for parameter in model.parameters())


def test_property_recipe_round_trip(world):
    recipe = InstructionVector(
        **fields(world, max_memory="1GiB", density={"domain": 0.5, "instruct": 0.5}, merge="ties")
    )
    import yaml

    again = load_recipe(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe
    assert again.hash() == recipe.hash()
    assert again.max_memory == 1 << 30


def test_fault_a_run_that_stopped_after_composing_is_done_again(world, tmp_path, monkeypatch):
    def stop(*_: object) -> dict[str, float]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CompositionContext, "inference", stop)
        with pytest.raises(KeyboardInterrupt):
            run(world, tmp_path / "run")
    assert (tmp_path / "run" / "model").is_dir()
    resumed = execute(InstructionVector(**fields(world)), tmp_path / "run", resume=True).metrics
    direct = run(world, tmp_path / "direct").metrics
    timing = "inference/seconds_per_token"
    assert resumed | {timing: 0} == direct | {timing: 0}


def test_property_an_adapter_counts_as_the_model_it_makes(world, tmp_path):
    models = {"base": str(world["base"]), "domain": str(world["adapter"]), "instruct": str(world["instruct"])}
    metrics = run(world, tmp_path / "run", models=models).metrics
    merged = get_merged(world, tmp_path / "merged")
    models["domain"] = str(merged)
    expected = run(world, tmp_path / "expected", models=models).metrics
    for name in ("suite/text/domain", "suite/text/composed", "suite/answers/composed"):
        assert metrics[name] == pytest.approx(expected[name], abs=1e-5)
    assert metrics["suite/text/domain"] != metrics["suite/text/base"]


def get_merged(world: dict[str, Path], directory: Path) -> Path:
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world["base"]), world["adapter"])
    model.merge_and_unload().save_pretrained(directory)
    AutoTokenizer.from_pretrained(world["base"]).save_pretrained(directory)
    return directory


def test_oracle_average_is_the_mean_of_the_parts(world, tmp_path):
    run(world, tmp_path / "run", Average)
    got = WeightSource.open(tmp_path / "run" / "model")
    domain, instruct = WeightSource.open(world["domain"]), WeightSource.open(world["instruct"])
    for name in got.names():
        mean = ((domain.get(name).double() + instruct.get(name).double()) / 2).float()
        assert torch.equal(got.get(name), mean)


@pytest.mark.parametrize("part", [None, "instruct"])
def test_oracle_single_part_is_that_part(world, tmp_path, part):
    result = run(world, tmp_path / "run", SinglePart, part=part)
    chosen = result.notes["part"]
    metrics = result.metrics
    assert all(metrics[f"suite/{name}/composed"] == metrics[f"suite/{name}/{chosen}"] for name in ("text", "answers"))
    if part is None:
        others = [
            run(world, tmp_path / role, SinglePart, part=role).metrics["valid/retention_min"]
            for role in ("base", "domain", "instruct")
        ]
        assert metrics["valid/retention_min"] == max(others)


class Doubled(nn.Module):
    """A part whose forward pass is done twice: costs two, answers as one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config
        self.device = next(inner.parameters()).device

    def forward(self, input_ids, attention_mask=None):
        self.inner(input_ids=input_ids)
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


class Twice(Composition):
    id: ClassVar[str] = "twice"

    def compose(self, ctx: CompositionContext) -> Composed:
        return CallableModel(Doubled(ctx.model("domain")))


class OnBase(Composition):
    id: ClassVar[str] = "on_base"
    shared: ClassVar[str] = "vocabulary"

    def compose(self, ctx: CompositionContext) -> Composed:
        return AdapterOnDisk(ctx.directory("adapter"), self.models["base"])


class Peeking(Composition):
    id: ClassVar[str] = "peeking"

    def compose(self, ctx: CompositionContext) -> Composed:
        ctx.score(ctx.model("base"), "test")
        raise AssertionError("the test side was open")


def test_property_a_callable_model_is_scored_and_charged_as_it_runs(world, tmp_path):
    metrics = run(world, tmp_path / "run", Twice).metrics
    assert metrics["suite/text/composed"] == pytest.approx(metrics["suite/text/domain"])
    assert metrics["inference/flops_ratio"] == pytest.approx(2.0)


def test_property_an_adapter_on_disk_runs_on_its_base(world, tmp_path):
    models = {"base": str(world["base"]), "adapter": str(world["adapter"])}
    metrics = run(world, tmp_path / "run", OnBase, models=models).metrics
    assert metrics["suite/text/composed"] == pytest.approx(metrics["suite/text/adapter"], abs=1e-5)
    assert metrics["inference/flops_ratio"] > 1


def test_rejects_a_hook_that_reaches_for_test_items(world, tmp_path):
    with pytest.raises(TestLeak, match="test side of suite 'text'"):
        run(world, tmp_path / "run", Peeking)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": {"base": "a", "domain": "b"}}, "'instruct', which is no role"),
        ({"models": {"domain": "b", "instruct": "c"}}, "no role 'base'"),
        ({"models": {"base": "a", "domain": "b", "instruct": "c", "extra": "d"}}, "'extra' has no weight"),
        ({"models": {"base": "a", "domain": "b", "instruct": "c", "composed": "d"}}, "cannot be called 'composed'"),
        ({"tokenizer_from": "chat"}, "no role 'chat'"),
        ({"suites": {}}, "suites"),
        ({"max_memory": "much"}, "max_memory"),
    ],
)
def test_rejects_recipes_whose_roles_do_not_fit(world, changes, words):
    with pytest.raises(RecipeError, match=words):
        InstructionVector(**fields(world, **changes))


def test_rejects_another_vocabulary_with_the_ids_that_differ(world, tmp_path):
    other = train_bpe([sentence(i)[::-1] for i in range(50)], 300)
    tiny_llama(other, hidden=16, layers=1, heads=2, mlp=16, context=64, generator_seed=0).save_pretrained(
        tmp_path / "m"
    )
    other.save_pretrained(tmp_path / "m")
    models = {"base": str(world["base"]), "domain": str(tmp_path / "m"), "instruct": str(world["instruct"])}
    with pytest.raises(ModelError, match=r"base and domain have different vocabularies.* tokens only on one side"):
        run(world, tmp_path / "run", models=models)


def test_rejects_another_architecture_with_what_differs(world, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(world["base"])
    tiny_llama(tokenizer, hidden=8, layers=2, heads=2, mlp=16, generator_seed=0).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    models = {"base": str(world["base"]), "domain": str(tmp_path / "m"), "instruct": str(world["instruct"])}
    with pytest.raises(ModelError, match="hidden_size 16 and 8; num_hidden_layers 1 and 2"):
        run(world, tmp_path / "run", models=models)


def test_rejects_a_masked_model(world, tmp_path):
    tokenizer = train_bpe([sentence(i) for i in range(50)], 300, extra_tokens=("<mask>",))
    tiny_bert(tokenizer, hidden=16, layers=1, heads=2, mlp=16, generator_seed=0).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    models = {"base": str(tmp_path / "m"), "domain": str(world["domain"]), "instruct": str(world["instruct"])}
    with pytest.raises(ModelError, match="masked model"):
        run(world, tmp_path / "run", models=models)


def test_rejects_suites_that_hold_too_little(world, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"text": sentence(i), "label": " a"}) + "\n" for i in range(10)))
    with pytest.raises(CorpusError, match="at least 10 and 20 are needed"):
        BitsSuite(corpus=str(few)).open("text")
    with pytest.raises(CorpusError, match="answers must differ"):
        ChoiceSuite(data=str(few)).open("answers")


def test_equation_retention():
    assert retention(0.6, 0.8, "higher") == pytest.approx(0.75)  # a score: composed / best
    assert retention(4.0, 3.0, "lower") == 0.75  # a loss: best / composed
    with pytest.raises(ValueError, match="positive figures"):
        retention(0.5, 0.0, "higher")


@pytest.fixture(scope="module")
def answering(world):
    """A model and the labels; the third is what it decodes greedily after the first prompt."""
    tokenizer = AutoTokenizer.from_pretrained(world["domain"])
    return AutoModelForCausalLM.from_pretrained(world["domain"]).eval(), tokenizer


def test_oracle_choice_scores_are_the_models_own_loss(answering):
    model, tokenizer = answering
    labels, prompts = [" tree", " sort heap queue"], [sentence(1), sentence(2) + " " + sentence(3)]
    scored = choice_scores(model, tokenizer, prompts, [0, 1], labels, batch_size=3)
    for i, prompt in enumerate(prompts):
        for j, label in enumerate(labels):
            ids = [
                tokenizer.bos_token_id or tokenizer.eos_token_id,
                *tokenizer.encode(prompt, add_special_tokens=False),
            ]
            answer = [*tokenizer.encode(label, add_special_tokens=False), tokenizer.eos_token_id]
            target = torch.tensor([[-100] * len(ids) + answer])
            loss = float(model(torch.tensor([ids + answer]), labels=target).loss.detach()) * len(answer)
            assert scored.nats[i, j] == pytest.approx(loss, rel=1e-5)
    assert scored.cross_entropy[1] == pytest.approx(scored.nats[1, 1] / scored.tokens[1])
    assert scored.accuracy.tolist() == [float(scored.nats[i].argmin() == i) for i in range(2)]


def test_learns_exact_is_what_generate_gives(world):
    # Overfitted on two prompts, the model answers them; on others it need not. generate() is the other route.
    tokenizer = AutoTokenizer.from_pretrained(world["base"])
    model = AutoModelForCausalLM.from_pretrained(world["base"])
    prompts, labels, answers = [sentence(i) for i in range(6)], [" yes", " no"], [0, 1, 0, 1, 0, 1]
    start = tokenizer.bos_token_id or tokenizer.eos_token_id
    encoded = [[start, *tokenizer.encode(p, add_special_tokens=False)] for p in prompts]
    endings = [[*tokenizer.encode(label, add_special_tokens=False), tokenizer.eos_token_id] for label in labels]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for step in range(60):
        ids, ending = encoded[step % 2], endings[answers[step % 2]]
        model(torch.tensor([ids + ending]), labels=torch.tensor([[-100] * len(ids) + ending])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    scored = choice_scores(model, tokenizer, prompts, answers, labels)
    for i, ids in enumerate(encoded):
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=8,
            do_sample=False,
        )[0, len(ids) :].tolist()
        assert scored.exact[i] == float(out[: len(endings[answers[i]])] == endings[answers[i]])
        assert scored.form[i] == (out[0] in {ending[0] for ending in endings})
    assert scored.exact[:2].tolist() == [1.0, 1.0]


def test_degenerate_choice_scores(answering):
    model, tokenizer = answering
    empty = choice_scores(model, tokenizer, [], [], [" a", " b"])
    assert empty.nats.shape == (0, 2)
    assert empty.exact.shape == (0,)
    long = choice_scores(model, tokenizer, [" ".join(map(sentence, range(40)))], [0], [" a", " b"])
    window = choice_scores(model, tokenizer, [" ".join(map(sentence, range(40)))[-300:]], [0], [" a", " b"])
    assert long.nats == pytest.approx(window.nats, abs=1e-5)  # what stands before the model's window plays no part


def test_rejects_choices_that_are_none(answering):
    model, tokenizer = answering
    for labels, answers, words in (
        ([" a"], [0], "two texts"),
        ([" a", " b"], [2], "index below 2"),
        ([" a", ""], [0], "0 tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            choice_scores(model, tokenizer, ["x"], answers, labels)
