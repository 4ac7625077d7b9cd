"""The family of training for less: what its figures mean, what it refuses, what it leaves behind."""

from __future__ import annotations

import json
import math
from collections.abc import Generator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tests.conftest import sentences, write_corpus
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from headwater.core.fit import Phase, Trained
from headwater.core.leak import TestLeak
from headwater.core.optim import OptimSpec, build_optimizer
from headwater.core.optim8 import AdamW8bit
from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.run import execute
from headwater.core.surgery import replace_modules
from headwater.efficient.base import Lean
from headwater.efficient.context import BuildContext, read_texts
from headwater.efficient.linears import ComposedLinear
from headwater.efficient.memory import Memory, activation_bytes, measured_memory, memory_plan
from headwater.efficient.references import FullRank
from headwater.modalities.models import ModelError
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.objectives import CausalObjective
from headwater.modalities.text.tiny import tiny_llama, tiny_t5

Fields = dict[str, Any]


def run(fields: Fields, directory: Path, **changes: Any) -> Any:
    return execute(load_recipe({"method": "full_rank", **fields, **changes}), directory)


def test_oracle_the_loss_is_the_saved_models_own(efficient_fields: Fields, tmp_path: Path) -> None:
    metrics = run(efficient_fields, tmp_path / "a").metrics
    recipe = load_recipe({"method": "full_rank", **efficient_fields})
    documents = read_texts(recipe.data, None, 0.1)[1]  # type: ignore[attr-defined]
    ids = json.loads((tmp_path / "a" / "items.json").read_text())["eval_loss"]["ids"]
    assert [d.id for d in documents][: len(ids)] == ids
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "model")
    # Token by token with the window's rule: a context of at least half the window of 32, and EOS first.
    nats = count = size = 0.0
    for document in documents[: len(ids)]:
        tokens = [tokenizer.eos_token_id, *tokenizer(document.text, add_special_tokens=False)["input_ids"]]
        scored, begin = 1, 0
        while scored < len(tokens):
            end = min(begin + 32, len(tokens))
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([tokens[begin:end]])).logits[0].log_softmax(-1)
            nats -= sum(float(logp[i - 1 - begin, tokens[i]]) for i in range(scored, end))
            scored, begin = end, begin + 16
        count += len(tokens) - 1
        size += len(document.text.encode())
    assert metrics["eval_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert metrics["eval_bits"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert metrics["perplexity"] == math.exp(metrics["eval_loss"])


def test_property_items_average_to_the_metrics(efficient_fields: Fields, tmp_path: Path) -> None:
    metrics = run(efficient_fields, tmp_path / "a").metrics
    items = json.loads((tmp_path / "a" / "items.json").read_text())
    for name in ("eval_loss", "eval_bits"):
        assert np.mean(items[name]["values"]) == pytest.approx(metrics[name], abs=1e-12)


@pytest.mark.parametrize("method", ["full_rank", "low_rank", "sltrain"])
def test_oracle_measured_bytes_are_the_planned_ones(efficient_fields: Fields, tmp_path: Path, method: str) -> None:
    metrics = run(efficient_fields, tmp_path / "a", method=method).metrics
    stored = json.loads((tmp_path / "a" / "memory.json").read_text())
    assert stored["measured"] == stored["plan"], "shapes decide, so not a byte is off"
    parts = ("param_bytes", "index_bytes", "grad_bytes_peak", "optimizer_bytes")
    assert sum(metrics[name] for name in parts) == stored["plan"]["total"]
    assert metrics["peak_bytes"] == stored["plan"]["total"] + metrics["activation_bytes"]


def test_equation_the_plan_by_hand() -> None:
    layer = ComposedLinear(10, 6, rank=2, nnz=5, bias=True, seed=0)
    count = 2 * 16 + 5 + 6  # four parameters
    plan = memory_plan(layer)
    assert plan == Memory(weights=4 * count, gradients=4 * count, states=8 * count + 4 * 4, index=4 * 5)
    assert plan.total == 16 * count + 16 + 20
    # One gradient at a time: the largest, 10 x 2. Blocks of 256 bytes and a float32 a moment, if nothing is too small.
    lean = memory_plan(layer, states="8bit", per_layer=True, min_size=0)
    assert lean.gradients == 4 * 20
    assert lean.states == 2 * (count + 4 * 4) + 4 * 4
    layer.right.requires_grad_(False)
    assert memory_plan(layer).gradients == 4 * (count - 20)
    assert "total" in str(plan)


@pytest.mark.parametrize("states", ["same", "8bit"])
def test_oracle_the_plan_is_what_two_real_steps_hold(states: Any) -> None:
    model = tiny_llama(200, hidden=32, layers=1, heads=2, mlp=144, generator_seed=0)  # embeddings and MLP above 4096
    replace_modules(model, lambda name, view: ComposedLinear.like(view, rank=4, nnz=50, seed=0, name=name))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(64).view(2, 32)
    batch = {"input_ids": ids, "labels": ids}

    def optimizer(modules: Any) -> torch.optim.Optimizer:
        if states == "8bit":
            return AdamW8bit([p for m in modules for p in m.parameters() if p.requires_grad])
        return build_optimizer(modules, OptimSpec())

    measured, activations = measured_memory(model, CausalObjective(), batch, optimizer)
    assert measured == memory_plan(model, states=states)
    assert activations > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "weights stay"
    assert all(p.grad is None for p in model.parameters())


def test_equation_activations_of_a_known_graph() -> None:
    weight, x = torch.nn.Parameter(torch.ones(8, 4)), torch.ones(3, 4)
    module = torch.nn.ParameterDict({"weight": weight})
    # tanh keeps its output of 3 x 8; the product keeps x and the weight, which are there anyway.
    assert activation_bytes(lambda: torch.tanh(x @ weight.T), [module], {"x": x}) == 3 * 8 * 4
    assert activation_bytes(lambda: x @ weight.T, [module], {"x": x}) == 0


def test_learns_the_text(efficient_fields: Fields, tmp_path: Path) -> None:
    longer = {**efficient_fields, "budget": {"steps": 60}, "optim": {"lr": 1e-2}}
    for method in ("full_rank", "low_rank", "sltrain"):
        run(longer, tmp_path / method, method=method)
        curve = json.loads((tmp_path / method / "trajectory.json").read_text())["series"]["eval_bits"]
        assert curve[0][1] - curve[-1][1] > 0.8, "a random model learns a language of seven words quickly"


def test_property_new_weights_follow_the_seed_and_not_the_checkpoint(efficient_fields: Fields, tmp_path: Path) -> None:
    def first(**changes: Any) -> float:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        run({**efficient_fields, "eval_at": [0.0]}, directory, **changes)
        points = json.loads((directory / "trajectory.json").read_text())["series"]["eval_bits"]
        return float(points[0][1])

    fresh, again, other = first(), first(), first(seed=3)
    kept, kept_too = first(from_config=False), first(from_config=False, seed=3)
    assert fresh == again != other
    assert kept == kept_too != fresh


def test_property_save_as_decides_what_is_there(efficient_fields: Fields, tmp_path: Path) -> None:
    sizes = {}
    for form in ("dense", "factored", "both"):
        result = run(efficient_fields, tmp_path / form, method="sltrain", save_as=form)
        sizes[form] = result.metrics["disk_bytes"]
        assert (tmp_path / form / "model" / "model.safetensors").exists() == (form != "factored")
        assert (tmp_path / form / "factored" / "headwater.json").exists() == (form != "dense")
    assert sizes["factored"] == sizes["both"] < sizes["dense"]
    run(efficient_fields, tmp_path / "plain", save_as="factored")
    assert (tmp_path / "plain" / "model" / "model.safetensors").exists(), "without replaced layers there is one form"


def test_property_targets_limit_what_is_replaced(efficient_fields: Fields, tmp_path: Path) -> None:
    some = run(efficient_fields, tmp_path / "a", method="low_rank", targets=["*.mlp.*"]).metrics
    every = run(efficient_fields, tmp_path / "b", method="low_rank").metrics
    full = run(efficient_fields, tmp_path / "c").metrics
    # Rank 4: each of four 16 x 16 becomes 4 x 32, each of three 16 x 32 becomes 4 x 48.
    assert full["params_total"] - some["params_total"] == 3 * (512 - 192)
    assert some["params_total"] - every["params_total"] == 4 * (256 - 128)


def test_property_low_rank_starts_as_it_is_told(efficient_fields: Fields, tmp_path: Path) -> None:
    results = {
        init: run(efficient_fields, tmp_path / init, method="low_rank", init=init).metrics["eval_bits"]
        for init in ("paper", "balanced")
    }
    assert results["paper"] != results["balanced"]


def test_oracle_masked_models_train_and_open(efficient_fields: Fields, tiny_masked: Path, tmp_path: Path) -> None:
    result = run(efficient_fields, tmp_path / "a", method="sltrain", model=str(tiny_masked))
    assert result.notes["unit"] == "bits/masked token"
    assert result.metrics["eval_loss"] == pytest.approx(result.metrics["eval_bits"] * math.log(2), rel=1e-9)
    AutoModelForMaskedLM.from_pretrained(tmp_path / "a" / "model")


def test_property_pure_bfloat16_weights_halve_the_bytes(efficient_fields: Fields, tmp_path: Path) -> None:
    wide = run(efficient_fields, tmp_path / "a", method="sltrain").metrics
    model = {"name": efficient_fields["model"], "dtype": "bfloat16"}
    half = run(efficient_fields, tmp_path / "b", method="sltrain", model=model).metrics
    assert half["param_bytes"] == wide["param_bytes"] / 2
    assert half["index_bytes"] == wide["index_bytes"]


def test_property_near_copies_of_test_text_leave_training(tmp_path: Path, efficient_fields: Fields) -> None:
    path = write_corpus(tmp_path / "d.jsonl", "domain")
    recipe = load_recipe({"method": "full_rank", **efficient_fields, "data": str(path)})
    held = read_texts(recipe.data, None, 0.1)[1]  # type: ignore[attr-defined]
    with path.open("a") as stream:
        for i, document in enumerate(held):
            stream.write(json.dumps({"id": f"copy-{i}", "text": document.text.replace(".", " !")}) + "\n")
    texts, test, dropped = read_texts(recipe.data, None, 0.1)  # type: ignore[attr-defined]
    held_now = {d.text.rstrip(" .!") for d in (*test, *texts.valid)}
    assert dropped > 0
    assert not held_now & {d.text.rstrip(" .!") for d in texts.train}


def test_property_other_eval_data_is_what_is_scored(
    efficient_fields: Fields, corpora: dict[str, Path], tmp_path: Path
) -> None:
    run(efficient_fields, tmp_path / "a", eval_data=str(corpora["general"]))
    ids = json.loads((tmp_path / "a" / "items.json").read_text())["eval_bits"]["ids"]
    assert all(name.startswith("general-") for name in ids)


def test_rejects_a_hook_that_reaches_for_the_test_set(efficient_fields: Fields, tmp_path: Path) -> None:
    class Cheat(FullRank):
        id: ClassVar[str] = "full_rank"

        def build(self, ctx: BuildContext) -> Generator[Phase, Trained, Lean]:
            list(ctx.texts.test)
            yield ctx.phase(ctx.start())
            raise AssertionError("unreachable")

    fields = dict(load_recipe({"method": "full_rank", **efficient_fields}))
    with pytest.raises(TestLeak, match="test set"):
        execute(Cheat(**fields), tmp_path / "a")


def test_rejects_phases_that_overspend(efficient_fields: Fields, tmp_path: Path) -> None:
    class Greedy(FullRank):
        id: ClassVar[str] = "full_rank"

        def build(self, ctx: BuildContext) -> Generator[Phase, Trained, Lean]:
            model = ctx.start()
            yield ctx.phase(model)
            yield ctx.phase(model, name="more", share=0.5)
            raise AssertionError("unreachable")

    fields = dict(load_recipe({"method": "full_rank", **efficient_fields}))
    with pytest.raises(ValueError, match=r"take 1.500 of the budget; at most 1"):
        execute(Greedy(**fields), tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": {}}, "give one of tokens, steps, flops, seconds"),
        ({"eval_at": [0.5, 0.1]}, "must rise"),
        ({"targets": []}, "targets"),
        ({"save_as": "pickle"}, "save_as"),
        ({"held_out": 0.5}, "held_out"),
        ({"method": "low_rank", "rank": 0}, "rank"),
    ],
)
def test_rejects_when_built(efficient_fields: Fields, changes: Fields, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe({"method": "full_rank", **efficient_fields, **changes})


def test_rejects_bad_models_and_texts(efficient_fields: Fields, tmp_path: Path) -> None:
    def refused(error: type[Exception], words: str, **changes: Any) -> None:
        with pytest.raises(error, match=words):
            run(efficient_fields, tmp_path / f"run-{len(list(tmp_path.iterdir()))}", **changes)

    few, copies = tmp_path / "few.jsonl", tmp_path / "copies.jsonl"
    few.write_text("".join(json.dumps({"text": t}) + "\n" for t in sentences("domain", 30)))
    copies.write_text(
        "".join(json.dumps({"id": f"c{i}", "text": sentences("domain", 1)[0]}) + "\n" for i in range(400))
    )
    refused(CorpusError, "data and eval_data hold the same documents", eval_data=efficient_fields["data"])
    refused(CorpusError, r"\d documents to test on and \d+ to train on; at least 20", data=str(few))
    refused(CorpusError, "every training document repeats a held-out one", data=str(copies))
    refused(ModelError, "seq_len is 128 but model .* has 64 positions", seq_len=128)
    refused(ModelError, "batch_tokens .16. is less than one block", batch_tokens=16)
    refused(ModelError, "no such directory", model=str(tmp_path / "nowhere"))
    tiny_t5(40, hidden=16, layers=1, heads=2, mlp=16, generator_seed=0).save_pretrained(tmp_path / "t5")
    refused(ModelError, "neither a causal nor a masked", model=str(tmp_path / "t5"))


def test_fault_text_edited_under_a_run_is_refused(efficient_fields: Fields, tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "d.jsonl", "domain")
    recipe = load_recipe({"method": "sltrain", **efficient_fields, "data": str(path)})
    execute(recipe, tmp_path / "a")
    (tmp_path / "a" / "result.json").unlink()
    path.write_text(path.read_text().replace("graph", "grape"))
    with pytest.raises(RuntimeError, match="the data 'train' changed since this run began"):
        execute(recipe, tmp_path / "a", resume=True)
