"""The recipe: arms, what is saved, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from headwater.compose.layerwise import LayerwiseEnsemble, OutputEnsemble
from headwater.compose.levi import Levi, _other_distribution, load_levi
from headwater.core.recipe import DataRef, RecipeError, load_recipe
from headwater.core.run import execute
from headwater.modalities.models import ModelError, load_encoder
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.labelled_split import LabelledTexts

Fields = dict[str, Any]


def recipe_of(fields: Fields, **changes: Any) -> Levi:
    recipe = load_recipe({"method": "levi", **fields, **changes})
    assert isinstance(recipe, Levi)
    return recipe


def texts_of(path: Any) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def accuracy(directory: Path, rows: list[dict[str, str]]) -> float:
    """Of what the run left, on labelled texts, one at a time."""
    model, tokenizer = load_levi(directory / "model"), AutoTokenizer.from_pretrained(directory / "model")
    labels = json.loads((directory / "model" / "levi.json").read_text())["labels"]
    right = []
    for row in rows:
        ids = tokenizer(row["text"], truncation=True, max_length=32, return_tensors="pt")
        with torch.no_grad():
            logits = model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).logits
        right.append(labels[int(logits.argmax())] == row["label"])
    return float(np.mean(right))


@pytest.mark.parametrize("arm", ["levi", "linear_probe", "fine_tune", "lora", "output_ensemble"])
def test_oracle_what_is_saved_answers_as_was_measured(levi_fields: Fields, tmp_path: Path, arm: str) -> None:
    found = execute(recipe_of(levi_fields, arm=arm), tmp_path / "run").metrics
    assert found["ood/accuracy"] == found["id/accuracy"]  # here the same texts
    assert accuracy(tmp_path / "run", texts_of(levi_fields["test"])) == pytest.approx(found["id/accuracy"])
    model = load_levi(tmp_path / "run" / "model")
    assert isinstance(model, OutputEnsemble if arm == "output_ensemble" else LayerwiseEnsemble)
    names = load_file(tmp_path / "run" / "model" / "ensemble.safetensors")
    pretrained = [name for name in names if name.startswith("pretrained.")]
    assert bool(pretrained) == (arm in ("fine_tune", "lora"))
    if arm == "lora":
        assert all("lora_" in name for name in pretrained)


def test_property_the_pretrained_model_is_left_alone_or_moved_by_lora(levi_fields: Fields, tmp_path: Path) -> None:
    execute(recipe_of(levi_fields), tmp_path / "frozen")
    execute(recipe_of(levi_fields, lora={"r": 2}), tmp_path / "lora")
    start = load_encoder(recipe_of(levi_fields).pretrained).state_dict()
    frozen = load_levi(tmp_path / "frozen" / "model").pretrained
    assert all(torch.equal(tensor, start[name]) for name, tensor in frozen.state_dict().items())  # type: ignore[union-attr, operator]
    adapters = load_file(tmp_path / "lora" / "model" / "ensemble.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in adapters.items() if "lora_B" in name)


def test_oracle_cached_views_train_to_the_same_weights(
    levi_fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(recipe_of(levi_fields), tmp_path / "cached")
    monkeypatch.setattr(Levi, "_views", lambda *_: None)
    execute(recipe_of(levi_fields), tmp_path / "computed")
    ours, theirs = (load_file(tmp_path / name / "model" / "ensemble.safetensors") for name in ("cached", "computed"))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


def test_learns_its_task(levi_fields: Fields, tmp_path: Path) -> None:
    found = execute(recipe_of(levi_fields, budget={"steps": 150}, optim={"lr": 5e-3}), tmp_path / "run")
    assert found.metrics["id/accuracy"] > 0.5  # of six classes
    table = pd.read_csv(tmp_path / "run" / "views.csv")
    assert table["layer"].tolist() == [1]
    assert found.cost["labels"] == found.metrics["data/train"]


def test_property_without_another_distribution_that_is_not_measured(levi_fields: Fields, tmp_path: Path) -> None:
    result = execute(recipe_of(levi_fields, ood=None), tmp_path / "run")
    assert "ood/accuracy" not in result.metrics
    assert result.notes["ood"].startswith("not measured")


def test_property_texts_that_are_learned_from_are_no_other_distribution(levi_fields: Fields, tmp_path: Path) -> None:
    rows = texts_of(levi_fields["task"])
    both = tmp_path / "both.jsonl"
    both.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *texts_of(levi_fields["test"])]))
    found = execute(recipe_of(levi_fields, ood=str(both)), tmp_path / "run").metrics
    assert found["data/ood"] == len(rows) + len(texts_of(levi_fields["test"])) - found["data/train"]


def test_rejects_bad_input(levi_fields: Fields, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="arm 'fine_tune' does not use lora"):
        recipe_of(levi_fields, arm="fine_tune", lora={"r": 2})
    with pytest.raises(RecipeError, match="multiple of 32; got 40"):
        recipe_of(levi_fields, small_width=40)
    with pytest.raises(ValueError, match="between 1 and the model's 1; got 3"):
        execute(recipe_of(levi_fields, layers=3), tmp_path / "a")
    strange = tmp_path / "strange.jsonl"
    strange.write_text(json.dumps({"text": "a text", "label": "no such label"}) + "\n")
    with pytest.raises(CorpusError, match="ood: label 'no such label' is none of the task's"):
        execute(recipe_of(levi_fields, ood=str(strange)), tmp_path / "b")
    strange.write_text(json.dumps({"text": "seen", "label": "a"}) + "\n")
    seen = LabelledTexts(["seen"], np.array([0]))
    with pytest.raises(CorpusError, match="every text is one that is learned from"):
        _other_distribution(DataRef(name=str(strange)), ["a", "b"], seen)
    with pytest.raises(ModelError, match=r"no levi.json"):
        load_levi(tmp_path)


def test_property_a_large_small_model_is_warned_of(levi_fields: Fields, tmp_path: Path) -> None:
    result = execute(recipe_of(levi_fields, small_width=64), tmp_path / "run")
    assert "it should have far fewer" in result.notes["warning/small"]
