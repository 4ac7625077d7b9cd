"""Classifiers that are trained: fine-tuning of all weights and of adapters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from headwater.adapt.data import Examples, TaskData
from headwater.adapt.tuned import FineTuning, new_modules
from headwater.core.recipe import RecipeError
from headwater.core.run import Run
from headwater.modalities.text.labelled import text_array

Fields = dict[str, Any]


def keyword_task() -> TaskData:
    """The class is the one word that is no filler: 64 texts of four classes, 42 to learn from."""
    words, filler = ["graph", "node", "edge", "path"], ["sum", "row", "axis", "fill"]
    texts = [f"{one} {word} {other}" for word in words for one in filler for other in filler]
    labels = np.repeat(np.arange(4), 16)
    held = np.arange(64) % 3 == 0
    parts = [Examples(text_array(texts)[rows], labels[rows]) for rows in (~held, held)]
    return TaskData(parts[0], parts[1], None, tuple(words), tuple(words), "keyword")


@pytest.mark.parametrize(("lora", "least"), [(None, 0.9), ({"r": 4}, 0.4)])  # chance is .25; the base is random
def test_learns_and_what_it_saves_answers_alike(
    tuned_fields: Fields, tmp_path: Path, lora: dict[str, int] | None, least: float
) -> None:
    data = keyword_task()
    longer = {
        "batch_size": 16,
        "budget": {"steps": 300},
        "fit": {"precision": "fp32"},
    }
    optim = {"lr": 3e-3, "schedule": "constant"}
    recipe = FineTuning(**{**tuned_fields, "lora": lora, "optim": optim, **longer})
    with Run(tmp_path / "run", recipe) as run:
        metrics = recipe.run_on(data, run)
    assert metrics["id/accuracy"] > least
    home = tmp_path / "run" / "model"
    if lora is None:
        opened = AutoModelForSequenceClassification.from_pretrained(home)
    else:
        readme = (home / "README.md").read_text(encoding="utf-8")
        code = re.search(r"```python\n(.*?)```", readme, re.S)
        assert code
        names: dict[str, Any] = {"DIR": home}
        exec(code[1], names)
        opened = names["model"]
        assert isinstance(opened, PeftModel)
    tokenizer = AutoTokenizer.from_pretrained(home)
    batch = tokenizer(list(data.test.inputs), return_tensors="pt", padding=True)
    with torch.no_grad():
        answers = opened(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits.argmax(-1).numpy()
    assert (answers == data.test.labels).mean() == metrics["id/accuracy"]


def test_property_adapters_leave_the_weights_and_train_the_new_head(tuned_fields: Fields) -> None:
    recipe = FineTuning(**{**tuned_fields, "lora": {"r": 2}})
    classes = recipe.open(("a", "b"), recipe.model)
    assert "classifier" in new_modules(classes)
    trained = {name for name, p in classes.model.named_parameters() if p.requires_grad}
    assert any("classifier.modules_to_save" in name for name in trained)
    assert all("lora_" in name or "modules_to_save" in name for name in trained)


def test_rejects_images(tuned_fields: Fields) -> None:
    with pytest.raises(RecipeError, match="finetuning trains classifiers of texts"):
        FineTuning(**{**tuned_fields, "modality": "image"})


def test_property_cost_says_what_was_trained(tuned_fields: Fields, tmp_path: Path) -> None:
    whole = FineTuning(**tuned_fields)
    count = sum(p.numel() for p in whole.open(("a",) * 4, whole.model).model.parameters())
    with Run(tmp_path / "run", whole) as run:
        metrics = whole.run_on(keyword_task(), run)
        assert run.cost["steps"] == 6
    assert metrics["cost/trainable"] == count
    assert metrics["cost/labels"] == 42
