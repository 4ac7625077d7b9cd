"""The instruction residual: exact arithmetic, the four arms, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.run import execute
from headwater.core.weights import WeightDelta, WeightSource, adapter_deltas
from headwater.domain.instruction_balance import InstructionBalance, add_residual, residual, residual_size
from headwater.modalities.models import ModelError
from headwater.modalities.text.score import choice_scores

Fields = dict[str, Any]


def recipe_of(fields: Fields, **changes: Any) -> InstructionBalance:
    recipe = load_recipe({"method": "instruction_balance", **fields, **changes})
    assert isinstance(recipe, InstructionBalance)
    return recipe


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def noisy(source: Path, target: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """A model near ``source``."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.to(dtype).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


def opened(*directories: Path) -> list[WeightSource]:
    return [WeightSource.open(directory) for directory in directories]


# -- the arithmetic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_oracle_the_residual_on_its_own_base_is_the_instruct_model(
    tiny_causal: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    base, instruct = (noisy(tiny_causal, tmp_path / name, seed, dtype) for seed, name in enumerate(("b", "i")))
    b, i = opened(base, instruct)
    add_residual(b, i, b, tmp_path / "whole")
    found, expected = weights(tmp_path / "whole"), weights(instruct)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name])  # bit for bit: one sum in float64, rounded once


def test_equation_of_the_sum(tiny_causal: Path, tmp_path: Path) -> None:
    base, instruct, adapted = (noisy(tiny_causal, tmp_path / str(seed), seed) for seed in range(3))
    b, i, a = opened(base, instruct, adapted)
    add_residual(a, i, b, tmp_path / "half", scale=0.5)
    add_residual(a, i, b, tmp_path / "none", scale=0.0)
    add_residual(WeightSource.open(tmp_path / "half"), i, b, tmp_path / "twice-half", scale=0.5)
    add_residual(a, i, b, tmp_path / "one")
    wb, wi, wa = map(weights, (base, instruct, adapted))
    for name in wb:
        assert torch.allclose(weights(tmp_path / "half")[name], wa[name] + 0.5 * (wi[name] - wb[name]), atol=1e-7)
        assert torch.equal(weights(tmp_path / "none")[name], wa[name])
        assert torch.allclose(weights(tmp_path / "twice-half")[name], weights(tmp_path / "one")[name], atol=1e-6)


def test_oracle_a_saved_residual_is_the_difference(tiny_causal: Path, tmp_path: Path) -> None:
    base, instruct = (noisy(tiny_causal, tmp_path / str(seed), seed) for seed in range(2))
    b, i = opened(base, instruct)
    residual(i, b).save(tmp_path / "residual")
    saved = WeightDelta.open(tmp_path / "residual")
    for name in saved.names():
        assert torch.equal(saved.get(name), weights(instruct)[name] - weights(base)[name])


def test_oracle_a_lora_adapter_is_a_residual(tiny_causal: Path, tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_causal),
        LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    base = WeightSource.open(tiny_causal)
    adapter = adapter_deltas(tmp_path / "adapter", base)
    assert residual(adapter, base) is adapter
    add_residual(base, adapter, base, tmp_path / "whole")
    merged = model.merge_and_unload().state_dict()
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.allclose(tensor, merged[name], atol=1e-6)
    size, added = residual_size(adapter, base)
    changes = [
        (merged[name] - tensor).double().square().sum() for name, tensor in weights(Path(str(tiny_causal))).items()
    ]
    length = sum(tensor.double().square().sum() for tensor in weights(Path(str(tiny_causal))).values())
    assert size == pytest.approx(float((sum(changes) / length) ** 0.5), rel=1e-4)
    assert added == 0


def test_property_rows_of_a_grown_vocabulary_are_copied(tiny_causal: Path, tmp_path: Path) -> None:
    grown = AutoModelForCausalLM.from_pretrained(noisy(tiny_causal, tmp_path / "near", 1))
    rows = grown.config.vocab_size
    grown.resize_token_embeddings(rows + 3, mean_resizing=False)
    grown.save_pretrained(tmp_path / "grown")
    AutoTokenizer.from_pretrained(tiny_causal).save_pretrained(tmp_path / "grown")
    adapted = noisy(tiny_causal, tmp_path / "adapted", 2)
    b, i, a = opened(Path(str(tiny_causal)), tmp_path / "grown", adapted)
    assert residual_size(i, b)[1] == 3
    add_residual(a, i, b, tmp_path / "whole")
    name = "model.embed_tokens.weight"
    found, instruct = weights(tmp_path / "whole")[name], weights(tmp_path / "grown")[name]
    assert torch.equal(found[rows:], instruct[rows:])
    expected = weights(adapted)[name] + instruct[:rows] - weights(Path(str(tiny_causal)))[name]
    assert torch.allclose(found[:rows], expected, atol=1e-7)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole").config.vocab_size == rows + 3


# -- the arms


def test_oracle_the_recipe_leaves_the_continued_base_and_the_sum(
    instruction_balance_fields: Fields, tmp_path: Path
) -> None:
    execute(recipe_of(instruction_balance_fields, scale=0.7), tmp_path / "run")
    execute(load_recipe({"method": "plain", **_plain(instruction_balance_fields)}), tmp_path / "plain")
    base, instruct = Path(instruction_balance_fields["model"]), Path(instruction_balance_fields["instruct"])
    continued, plain = weights(tmp_path / "run" / "base"), weights(tmp_path / "plain" / "model")
    for name, tensor in weights(tmp_path / "run" / "model").items():
        assert torch.equal(continued[name], plain[name])
        expected = continued[name] + 0.7 * (weights(instruct)[name] - weights(base)[name])
        assert torch.allclose(tensor, expected, atol=1e-6)
    assert WeightDelta.open(tmp_path / "run" / "residual").names()
    assert "base/" in (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "run" / "summed").exists()


def _plain(fields: Fields) -> Fields:
    return {name: value for name, value in fields.items() if name != "instruct"}


@pytest.mark.parametrize(("arm", "start"), [("continue_base", "model"), ("continue_instruct", "instruct")])
def test_degenerate_the_other_arms_are_plain_training(
    instruction_balance_fields: Fields, tmp_path: Path, arm: str, start: str
) -> None:
    execute(recipe_of(instruction_balance_fields, arm=arm), tmp_path / "run")
    fields = {**_plain(instruction_balance_fields), "model": instruction_balance_fields[start]}
    execute(load_recipe({"method": "plain", **fields}), tmp_path / "plain")
    ours, plain = weights(tmp_path / "run" / "model"), weights(tmp_path / "plain" / "model")
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_learns_answers_when_tuned_on_them(
    instruction_balance_fields: Fields, labelled: dict[str, Path], tmp_path: Path
) -> None:
    fields = {
        **instruction_balance_fields,
        "budget": {"steps": 60},
        "optim": {"lr": 1e-2},
        "eval_at": [],
        "instructions": {"name": str(labelled["train"])},
    }
    found = execute(recipe_of(fields, arm="continue_then_tune", tune_share=0.5), tmp_path / "run").metrics
    alone = execute(recipe_of({**fields, "instructions": None}, arm="continue_base"), tmp_path / "base").metrics
    assert found["downstream/words/cross_entropy"] < alone["downstream/words/cross_entropy"] - 0.3
    assert found["downstream/words/cross_entropy_start"] == alone["downstream/words/cross_entropy_start"]


def test_oracle_answers_are_scored_as_they_stand(
    instruction_balance_fields: Fields, labelled: dict[str, Path], tmp_path: Path
) -> None:
    found = execute(recipe_of(instruction_balance_fields), tmp_path / "run").metrics
    rows = [json.loads(line) for line in labelled["test"].read_text().splitlines()]
    labels = sorted({row["label"] for row in rows})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    answers = [labels.index(row["label"]) for row in rows]
    scored = choice_scores(model, tokenizer, [row["text"] for row in rows], answers, labels, window=32)
    for name in ("accuracy", "exact", "form", "cross_entropy"):
        assert found[f"downstream/words/{name}"] == pytest.approx(float(getattr(scored, name).mean()), abs=1e-6)


def test_property_an_adapter_in_the_instruct_role_and_lora_training(
    instruction_balance_fields: Fields, tmp_path: Path
) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(instruction_balance_fields["model"]),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    changes = {"instruct": str(tmp_path / "adapter"), "lora": {"r": 2}}
    execute(recipe_of(instruction_balance_fields, **changes), tmp_path / "run")
    base = weights(Path(instruction_balance_fields["model"]))
    merged = model.merge_and_unload().state_dict()
    continued, whole = weights(tmp_path / "run" / "base"), weights(tmp_path / "run" / "model")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(continued[name], base[name])
    assert torch.allclose(whole[name], continued[name] + merged[name] - base[name], atol=1e-6)


def test_property_questions_are_not_tuned_on(
    instruction_balance_fields: Fields, labelled: dict[str, Path], tmp_path: Path
) -> None:
    both = tmp_path / "both.jsonl"
    both.write_text(labelled["train"].read_text() + labelled["test"].read_text())
    changes = {"arm": "continue_then_tune", "instructions": str(both)}
    result = execute(recipe_of(instruction_balance_fields, **changes), tmp_path / "run")
    asked = len(labelled["test"].read_text().splitlines())
    assert result.notes["warning/instructions"].startswith(f"{asked} instructions are asked downstream")
    with pytest.raises(ModelError, match="none is left"):
        execute(
            recipe_of(instruction_balance_fields, **{**changes, "instructions": str(labelled["test"])}), tmp_path / "x"
        )


# -- bad input


def test_rejects_models_that_do_not_belong_together(
    instruction_balance_fields: Fields, tiny_masked: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="are identical, so there is no residual"):
        execute(recipe_of(instruction_balance_fields, instruct=instruction_balance_fields["model"]), tmp_path / "a")
    other = AutoModelForCausalLM.from_pretrained(instruction_balance_fields["model"])
    other.config.intermediate_size = 48
    type(other)(other.config).save_pretrained(tmp_path / "other")
    shutil.copy(Path(instruction_balance_fields["model"]) / "tokenizer.json", tmp_path / "other")
    with pytest.raises(ModelError, match=r"mlp.down_proj.weight' is \[16, 32\] in the base and \[16, 48\]"):
        execute(recipe_of(instruction_balance_fields, instruct=str(tmp_path / "other")), tmp_path / "b")
    changes = {"model": str(tiny_masked), "instruct": str(tiny_masked), "downstream": []}
    with pytest.raises(ModelError, match="is a masked model"):
        execute(recipe_of(instruction_balance_fields, **changes), tmp_path / "c")
    with pytest.raises(ModelError, match="downstream words: answers are asked of a causal model"):
        execute(
            load_recipe({"method": "plain", **_plain(instruction_balance_fields), "model": str(tiny_masked)}),
            tmp_path / "d",
        )


def test_rejects_instructions_where_they_have_no_use(instruction_balance_fields: Fields) -> None:
    with pytest.raises(RecipeError, match="'residual' does not use `instructions`"):
        recipe_of(instruction_balance_fields, instructions="texts.jsonl")
    with pytest.raises(RecipeError, match="'continue_then_tune' needs `instructions`"):
        recipe_of(instruction_balance_fields, arm="continue_then_tune")


def test_property_a_model_from_elsewhere_is_warned_of(instruction_balance_fields: Fields, tmp_path: Path) -> None:
    far = AutoModelForCausalLM.from_pretrained(instruction_balance_fields["model"])
    with torch.no_grad():
        for parameter in far.parameters():
            parameter.mul_(2.5)
    far.save_pretrained(tmp_path / "far")
    AutoTokenizer.from_pretrained(instruction_balance_fields["model"]).save_pretrained(tmp_path / "far")
    result = execute(recipe_of(instruction_balance_fields, instruct=str(tmp_path / "far")), tmp_path / "run")
    assert "1.50 times as long as the base" in result.notes["warning/residual"]
