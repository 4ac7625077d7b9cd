from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.compose.emulated import model, prompts
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater.claims.phatgoose import routed_mixture
from headwater.compose.gates import GATE_OPTIM, GatedLora, average_activations, train_gates
from headwater.compose.phatgoose import Phatgoose, load_routed, route
from headwater.compose.references import Average
from headwater.compose.routing_files import adapters_in, has_gates, load_gates, save_gates
from headwater.core.budget import Budget
from headwater.core.fit import FitSettings
from headwater.core.objective import Loss
from headwater.core.optim import lr_factor
from headwater.core.recipe import CorpusRef, RecipeError, load_recipe
from headwater.core.run import Result, execute
from headwater.modalities.models import ModelError
from headwater.modalities.text.docs import fingerprint, split_documents
from headwater.modalities.text.objectives import CausalObjective
from headwater.modalities.text.sources import open_corpus

Fields = dict[str, Any]


class Blocks:
    """Random tokens, in batches by number."""

    fingerprint, rows, tokens_per_row = "blocks", 4, 8

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        ids = torch.randint(64, (4, 8), generator=torch.Generator().manual_seed(step))[start:stop]
        return {"input_ids": ids, "labels": ids}


def adapted(dropout: float = 0.0, seed: int = 0) -> PeftModel:
    wrapped = get_peft_model(
        model("llama", 0), LoraConfig(r=2, lora_alpha=4, lora_dropout=dropout, target_modules="all-linear")
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def settled(fields: Fields, adapters: dict[str, Path], root: Path, **more: Any) -> Fields:
    """The fields with adapters of this test's own."""
    models = {"base": fields["models"]["base"]}
    for name, path in adapters.items():
        models[name] = str(shutil.copytree(path, root / name))
    return {"method": "phatgoose", **fields, "models": models, **more}


def metrics_of(result: Result) -> dict[str, float]:
    return {name: value for name, value in result.metrics.items() if "seconds" not in name}


# -- gate training


def test_equation_an_untrained_gate_is_half_open():
    whole, ids = adapted(), prompts()[0]
    half = copy.deepcopy(whole)
    for module in half.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] /= 2
    gated = GatedLora(whole, "default", CausalObjective())
    with torch.no_grad(), gated.attached():
        torch.testing.assert_close(whole(ids).logits, half(ids).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(whole(ids).logits, half(ids).logits, atol=1e-2)


def test_oracle_gate_training_of_one_layer_by_hand(tmp_path):
    torch.manual_seed(0)
    wrapped = get_peft_model(nn.Sequential(nn.Linear(6, 4)), LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    layer = wrapped.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    weight, bias, down, up = (
        p.detach().clone()
        for p in (
            layer.base_layer.weight,
            layer.base_layer.bias,
            layer.lora_A["default"].weight,
            layer.lora_B["default"].weight,
        )
    )
    inputs, targets = torch.randn(10, 3, 5, 6), torch.randn(10, 3, 5, 4)

    class Stream:
        fingerprint, rows, tokens_per_row = "x", 3, 5

        def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
            return {"x": inputs[step, start:stop], "y": targets[step, start:stop]}

    class Error:
        unit = "error"

        def __call__(self, model: nn.Module, batch: Any) -> Loss:
            return Loss((model(batch["x"]) - batch["y"]).square().sum(), batch["y"].numel())

    found = train_gates(
        wrapped,
        "default",
        Stream(),
        Error(),
        directory=tmp_path,
        budget=Budget(steps=10),
        settings=FitSettings(precision="fp32"),
    )

    v = torch.zeros(6, requires_grad=True)
    optimizer = torch.optim.AdamW([v], lr=1.0, betas=GATE_OPTIM.betas, eps=GATE_OPTIM.eps, weight_decay=0.0)
    for step in range(10):
        x = inputs[step]
        y = x @ weight.T + bias + torch.sigmoid(x @ v)[..., None] * 3 * (x @ down.T @ up.T)  # 3: alpha 6 over rank 2
        optimizer.zero_grad()
        (y - targets[step]).square().mean().backward()
        optimizer.param_groups[0]["lr"] = 5e-3 * lr_factor(GATE_OPTIM, (step + 1) / 10)
        torch.nn.utils.clip_grad_norm_([v], GATE_OPTIM.clip)
        optimizer.step()
    torch.testing.assert_close(found["0"], v.detach(), atol=1e-6, rtol=1e-4)
    assert found["0"].abs().min() > 1e-3


def test_property_gate_training_leaves_the_model_as_it_was(tmp_path):
    wrapped = adapted(dropout=0.5)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in wrapped.named_parameters()}
    settings = {"budget": Budget(steps=3), "settings": FitSettings(precision="fp32")}
    first = train_gates(wrapped, "default", Blocks(), CausalObjective(), directory=tmp_path / "a", **settings)
    again = train_gates(wrapped, "default", Blocks(), CausalObjective(), directory=tmp_path / "b", seed=9, **settings)
    assert all(torch.equal(first[layer], again[layer]) for layer in first), "the adapter's dropout was on"
    assert all(first[layer].abs().max() > 0 for layer in first)
    for name, parameter in wrapped.named_parameters():
        assert torch.equal(parameter, before[name][0]), name
        assert parameter.requires_grad == before[name][1], name
    assert {m.p for m in wrapped.modules() if isinstance(m, nn.Dropout)} == {0.5}
    assert not any(module._forward_hooks for module in wrapped.modules())


def test_oracle_mean_activations():
    wrapped = adapted()
    found = average_activations(wrapped, "default", Blocks(), CausalObjective(), steps=2)
    ids = torch.cat([Blocks().batch(step)["input_ids"] for step in range(2)])
    with torch.no_grad():
        # what the first layer's projections read
        inner = wrapped.get_base_model().model
        expected = inner.layers[0].input_layernorm(inner.embed_tokens(ids)).mean((0, 1))
    torch.testing.assert_close(found["model.layers.0.self_attn.q_proj"], expected, atol=1e-5, rtol=1e-4)


def test_rejects_an_adapter_that_cannot_be_gated():
    wrapped = adapted()
    with pytest.raises(ModelError, match="no adapter 'other'"):
        GatedLora(wrapped, "other", CausalObjective())
    wrapped.merge_adapter()
    with pytest.raises(ModelError, match=r"merged into .*unmerge"):
        GatedLora(wrapped, "default", CausalObjective())


# -- gates on disk


def test_property_peft_opens_an_adapter_with_gates_beside_it(lora_experts, tiny_causal, tmp_path):
    directory = shutil.copytree(lora_experts["domain"], tmp_path / "a")
    ids = torch.tensor([[5, 6, 7]])

    def logits() -> Tensor:
        with torch.no_grad():
            return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_causal), directory)(ids).logits

    before = logits()
    gates = {"model.layers.0.self_attn.q_proj": torch.arange(16.0)}
    save_gates(gates, directory, adapter=directory, seed=3)
    assert torch.equal(logits(), before)
    found = load_gates(directory, adapter=directory)
    assert found.keys() == gates.keys()
    assert torch.equal(found["model.layers.0.self_attn.q_proj"], torch.arange(16.0))
    assert json.loads((directory / "gate_config.json").read_text())["seed"] == 3


def test_rejects_gates_that_are_missing_damaged_or_of_other_weights(lora_experts, tmp_path):
    directory = shutil.copytree(lora_experts["domain"], tmp_path / "a")
    with pytest.raises(ModelError, match="holds no gates"):
        load_gates(directory, adapter=directory)
    save_gates({"x": torch.ones(3)}, directory, adapter=directory)
    with pytest.raises(ModelError, match="trained for other weights"):
        load_gates(directory, adapter=lora_experts["general"])
    (directory / "adapter_gates.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="is damaged"):
        load_gates(directory, adapter=directory)


def test_rejects_a_directory_without_adapters(lora_experts, tmp_path):
    root = next(iter(lora_experts.values())).parent
    assert adapters_in(root) == lora_experts
    with pytest.raises(ModelError, match="holds no experts"):
        adapters_in(tmp_path)


# -- the mechanism


def test_learns_to_route_a_mixture_of_linear_tasks(tmp_path):
    found = routed_mixture(7, tmp_path)
    assert found.accuracy >= 0.95
    assert found.loss <= 1.05 * found.oracle
    assert found.average > 2 * found.oracle


# -- the recipe


@pytest.fixture(scope="module")
def trained_experts(tiny_causal: Path, corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters as someone else would train them: a plain loop, PEFT, save_pretrained."""
    root = tmp_path_factory.mktemp("trained")
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    for number, name in enumerate(("domain", "general")):
        torch.manual_seed(number)
        wrapped = get_peft_model(
            AutoModelForCausalLM.from_pretrained(tiny_causal),
            LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
        )
        optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.02)
        texts = [json.loads(line)["text"] for line in corpora[name].read_text().splitlines()[:40]]
        for step in range(15):
            ids = tokenizer(texts[step % 40], return_tensors="pt", truncation=True, max_length=64)["input_ids"]
            wrapped(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        wrapped.save_pretrained(root / name)
    return root


def test_property_gates_are_trained_once_and_found_beside_the_adapters(routed_fields, trained_experts, tmp_path):
    fields = settled(routed_fields, adapters_in(trained_experts), tmp_path, gates_in="adapter")
    fields["expert_data"] = {name: routed_fields["expert_data"][name] for name in ("domain", "general")}
    first = execute(load_recipe(fields), tmp_path / "first")
    assert first.cost["steps"] == 12
    for name in ("domain", "general"):
        assert has_gates(tmp_path / name)
        assert PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(fields["models"]["base"]), tmp_path / name
        )
    assert not (tmp_path / "first" / "model" / "gates").exists()
    second = execute(load_recipe({**fields, "expert_data": {}}), tmp_path / "second")
    assert second.cost["steps"] == 0
    assert metrics_of(second) == metrics_of(first)
    routed = route(
        AutoModelForCausalLM.from_pretrained(fields["models"]["base"]), {n: tmp_path / n for n in ("domain", "general")}
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(routed(ids).logits, load_routed(tmp_path / "first" / "model")(ids).logits)


def test_property_adapters_that_cannot_be_written_to_have_their_gates_in_the_run(
    routed_fields, lora_experts, tmp_path, monkeypatch
):
    fields = settled(routed_fields, lora_experts, tmp_path, gates_in="adapter")
    locked, allowed = str(tmp_path / "general"), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != locked and allowed(path, mode))
    result = execute(load_recipe(fields), tmp_path / "run")
    left = tmp_path / "run" / "model"
    assert "cannot be written to" in result.notes["warning/gates/general"]
    assert not has_gates(tmp_path / "general")
    assert has_gates(tmp_path / "domain")
    assert has_gates(left / "gates" / "general")
    assert "| `./gates/general` |" in (left / "README.md").read_text()
    assert "| `beside the adapter` |" in (left / "README.md").read_text()
    moved = shutil.copytree(left, tmp_path / "moved")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(load_routed(moved)(ids).logits, load_routed(left)(ids).logits)


@pytest.mark.parametrize("routing", ["gates", "average_activation", "arrow", "random", "average"])
def test_oracle_the_code_of_the_readme_decodes_what_the_loaded_model_does(routed_fields, tmp_path, routing):
    execute(load_recipe({"method": "phatgoose", **routed_fields, "routing": routing}), tmp_path / "run")
    left = tmp_path / "run" / "model"
    routed, tokenizer = load_routed(left), AutoTokenizer.from_pretrained(left)
    code = re.search(r"## Without\n\n```python\n(.*?)```", (left / "README.md").read_text(), re.S)
    assert code
    names: Fields = {}
    with contextlib.chdir(left):
        exec(code[1], names)
    ids = tokenizer("Why?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for length in range(ids.shape[1], names["ids"].shape[1]):
            ids = torch.cat([ids, routed(names["ids"][:, :length]).logits[:, -1:].argmax(-1)], dim=1)
        log_p = routed(names["ids"][:, :-1]).logits[:, -1].log_softmax(-1)
    assert torch.equal(ids, names["ids"])
    torch.testing.assert_close(log_p, names["log_p"], atol=1e-4, rtol=1e-4)


def test_oracle_averaging_is_the_familys_merge(routed_fields, tmp_path):
    execute(load_recipe({"method": "phatgoose", **routed_fields, "routing": "average"}), tmp_path / "routed")
    recipe = Average(models=Phatgoose(**routed_fields).models, suites=Phatgoose(**routed_fields).suites)
    execute(recipe, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = merged(ids).logits
        torch.testing.assert_close(
            load_routed(tmp_path / "routed" / "model")(ids).logits, expected, atol=1e-5, rtol=1e-4
        )


def test_property_no_document_that_is_tested_on_is_read(routed_fields, corpora, tmp_path):
    suites = {"text": {"kind": "bits_per_byte", "corpus": str(corpora["domain"]), "held_out": 0.3}}
    result = execute(load_recipe({"method": "phatgoose", **routed_fields, "suites": suites}), tmp_path / "run")
    documents = list(open_corpus(CorpusRef(name=str(corpora["domain"])), role="x"))
    tested = set(json.loads((tmp_path / "run" / "items.json").read_text())["suite/text/composed"]["ids"])
    train = split_documents(documents, (0.85, 0.05, 0.1)).train
    assert tested & {d.id for d in train}, "the suite's split is wider"
    assert result.data["expert_data/domain"] == fingerprint(d for d in train if d.id not in tested)


def test_property_the_usage_table_has_a_row_for_each_suite_and_layer(routed_fields, lora_experts, tmp_path):
    execute(load_recipe({"method": "phatgoose", **routed_fields}), tmp_path / "run")
    table = pd.read_csv(tmp_path / "run" / "usage.csv")
    assert len(table) == 2 * 7  # two suites, seven linear layers
    assert table[list(lora_experts)].sum(axis=1).tolist() == pytest.approx([1.0] * 14)
    assert table["entropy"].between(0, 1.5850).all()


def test_rejects_fields_that_do_not_fit_together(routed_fields):
    for change, words in (
        ({"k": 4}, "k is 4 and there are 3 experts"),
        ({"models": {"base": "x"}}, "no expert besides"),
        ({"expert_data": {"base": "x"}}, "expert_data names 'base'"),
        ({"tokenizer_from": "domain"}, "`base` here"),
        ({"out_dtype": "float16"}, "no weights are written"),
    ):
        with pytest.raises(RecipeError, match=words):
            Phatgoose(**{**routed_fields, **change})


def test_rejects_an_expert_that_is_no_adapter_or_has_neither_gates_nor_data(routed_fields, tmp_path):
    models = {**routed_fields["models"], "domain": routed_fields["models"]["base"]}
    with pytest.raises(ModelError, match=r"domain: .* is no LoRA adapter"):
        execute(load_recipe({"method": "phatgoose", **routed_fields, "models": models}), tmp_path / "a")
    with pytest.raises(ModelError, match=r"domain has no gates in .*expert_data"):
        execute(load_recipe({"method": "phatgoose", **routed_fields, "expert_data": {}}), tmp_path / "b")
    with pytest.raises(ModelError, match=r"no router\.json"):
        load_routed(tmp_path)
