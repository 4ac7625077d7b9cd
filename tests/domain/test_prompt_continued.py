"""Prompt-based continued pretraining: the steps in order, from the right weights, on the right words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from headwater.claims.prompt_continued import ARMS, CLAIM
from headwater.core.claim import judge
from headwater.core.fit import Phase, fit
from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.run import Run, execute
from headwater.domain.adaptation import Adaptation
from headwater.domain.labelling import LabelTask, _Exam, read_labelled
from headwater.domain.prompt_continued import PromptContinued
from headwater.modalities.models import ModelError, load_tokenizer
from headwater.modalities.text.docs import CorpusError

Fields = dict[str, Any]
WORDS = {"graph": "a", "node": "b", "edge": "c", "path": "d", "tree": "e", "flow": "f"}
PROMPT = {"verbaliser": WORDS, "template": "{text} :{mask}"}


@pytest.fixture(params=["causal", "masked"])
def fields(request: pytest.FixtureRequest, labelled_domain_fields: Fields) -> Fields:
    home = request.getfixturevalue(f"tiny_{request.param}")
    return {**labelled_domain_fields, **PROMPT, "model": str(home)}


def recipe_of(fields: Fields, **changes: Any) -> PromptContinued:
    shares = {"shares": [0.25, 0.5, 0.25]}
    recipe = load_recipe({"method": "prompt_continued", **fields, **shares, **changes})
    assert isinstance(recipe, PromptContinued)
    return recipe


@pytest.fixture
def causal(labelled_domain_fields: Fields) -> Fields:
    return {**labelled_domain_fields, **PROMPT}


def phases_of(recipe: PromptContinued, run: Run) -> Iterator[tuple[Phase, LabelTask]]:
    """Each phase before it is trained; it is trained when the next is asked for."""
    ctx = Adaptation.open(recipe, run)
    split = read_labelled(recipe.labelled, recipe.labelled_test, held_out=0.2, validation=0.1)
    task = LabelTask(recipe, ctx, split, ctx.domain.train, _Exam(split, run, "start"))
    steps, trained = recipe.learn(ctx, task), None
    while True:
        try:
            phase = next(steps) if trained is None else steps.send(trained)
        except StopIteration:
            return
        yield phase, task
        trained = fit(
            phase, budget=recipe.budget, optim=recipe.optim, seed=0, directory=run.directory, settings=recipe.fit
        )


def copied(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_property_pretraining_starts_from_the_starting_model_and_fine_tuning_from_the_pretrained(
    fields: Fields, tmp_path: Path
) -> None:
    recipe = recipe_of(fields)
    before, models = {}, {}
    with Run(tmp_path / "a", recipe) as run:
        for phase, _ in phases_of(recipe, run):
            before[phase.name], models[phase.name] = copied(phase.model), phase.model
    assert list(before) == ["teacher", "pretrain", "finetune"]
    assert same(before["teacher"], before["pretrain"])
    assert not same(before["teacher"], copied(models["teacher"]))
    assert not same(before["pretrain"], before["finetune"])
    assert models["pretrain"] is models["finetune"]
    execute(recipe, tmp_path / "whole")
    opened = AutoModelForMaskedLM if "masked" in str(recipe.model) else AutoModelForCausalLM
    saved = {name: opened.from_pretrained(tmp_path / "whole" / name) for name in ("model", "classifier")}
    assert same(copied(saved["model"]), before["finetune"]), "model/ is what pretraining left"
    assert same(copied(saved["classifier"]), copied(models["finetune"]))


def test_oracle_the_pretraining_reads_true_words_and_the_teachers(fields: Fields, tmp_path: Path) -> None:
    # Steps enough for a teacher that tells some texts apart.
    recipe = recipe_of(fields, budget={"steps": 320}, optim={"lr": 1e-2})
    with Run(tmp_path / "a", recipe) as run:
        phase, task = next(found for found in phases_of(recipe, run) if found[0].name == "pretrain")
        pseudo = [json.loads(line) for line in _pseudo(run)]
        labelled = len(task.train)
        texts = [*task.train.texts, *(document.text for document in task.unlabelled)]
        assert [row["text"] for row in pseudo] == texts[labelled:]
        assert len({row["label"] for row in pseudo}) > 1
        classes = [*task.train.classes.tolist(), *(row["label"] for row in pseudo)]
        read, seen = load_tokenizer(recipe.model), 0
        for step in range(40):
            batch = phase.stream.batch(step)
            for row in range(len(batch["row"])):
                item, size = int(batch["row"][row]), int(batch["attention_mask"][row].sum())
                labels = batch["labels"][row, :size]
                ids = torch.where(labels == -100, batch["input_ids"][row, :size], labels)
                shown, word = read.decode(ids).rsplit(" :", 1)
                assert texts[item].startswith(shown)
                assert word == WORDS[task.labels[classes[item]]]
                seen += item < labelled
    assert seen > 0, "labelled texts are among them"


def _pseudo(run: Run) -> list[str]:
    import datasets

    (path,) = run.path("pseudo").glob("*.arrow")
    return [json.dumps(row) for row in datasets.Dataset.from_file(str(path))]


def test_property_without_pseudo_labels_the_teachers_share_is_pretrainings(causal: Fields, tmp_path: Path) -> None:
    steps = {}
    for use in ("pseudo", "random", "none"):
        result = execute(recipe_of(causal, use_labels=use), tmp_path / use)
        steps[use] = result.cost["steps"]
        names = sorted(path.name for path in (tmp_path / use / "checkpoints").iterdir())
        assert names == (["finetune", "pretrain", "teacher"] if use == "pseudo" else ["finetune", "pretrain"])
        assert ("downstream/labelled/accuracy_start" in result.metrics) == (use == "pseudo")
        said = json.loads((tmp_path / use / "prompts.json").read_text())["per_class"]
        assert sum(said.values()) == (0 if use == "none" else result.metrics["data/unlabelled"])
        if use == "random":
            share = np.array(list(said.values())) / sum(said.values())
            assert np.abs(share - 1 / 6).max() < 0.1
    assert steps["pseudo"] == steps["random"] == steps["none"] == 8


def test_property_without_words_there_is_no_template_either(causal: Fields, tmp_path: Path) -> None:
    recipe = recipe_of(causal, use_labels="none")
    with Run(tmp_path / "a", recipe) as run:
        phase, task = next(iter(phases_of(recipe, run)))
        texts = [*task.train.texts, *(document.text for document in task.unlabelled)]
        batch = phase.stream.batch(0)
        for row, item in enumerate(batch["row"].tolist()):
            ids = batch["input_ids"][row, : int(batch["attention_mask"][row].sum())]
            assert texts[item].startswith(load_tokenizer(recipe.model).decode(ids))


def toy(tmp_path: Path) -> Fields:
    """Texts of two words, each said by another letter; unlabelled ones know their label."""
    rng = np.random.default_rng(0)
    paths = {}
    for name, per_class in (("few", 4), ("test", 20), ("many", 160)):
        rows = []
        for number in range(2 * per_class):
            label = ("node", "sum")[number % 2]
            noise = " ".join(str(word) for word in rng.choice(["path", "tree", "row", "axis", "cut"], size=3))
            rows.append({"id": f"{name}-{number}", "text": f"{label} {label} {noise} {label}", "label": label})
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("\n".join(map(json.dumps, rows)))
    return {
        "labelled": str(paths["few"]),
        "labelled_test": str(paths["test"]),
        "labelled_valid": 0.0,
        "unlabelled": str(paths["many"]),
        "verbaliser": {"node": "a", "sum": "b"},
    }


def test_learns_true_words_in_a_language_of_two_words(
    labelled_domain_fields: Fields, tiny_masked: Path, tmp_path: Path
) -> None:
    fields = {
        **labelled_domain_fields,
        **toy(tmp_path),
        "model": str(tiny_masked),
        "template": "={mask} {text}",
        "use_labels": "true",
        "always_mask_label": True,
        "budget": {"steps": 250},
        "optim": {"lr": 1e-2},
        "shares": [0.1, 0.85, 0.05],
    }
    recipe = load_recipe({"method": "prompt_continued", **fields})
    result = execute(recipe, tmp_path / "a")
    assert result.metrics["downstream/labelled/accuracy"] == 1.0
    assert result.cost["labels"] == result.metrics["data/labels"] + result.metrics["data/unlabelled"]
    about = json.loads((tmp_path / "a" / "classifier" / "prompt.json").read_text())
    assert about["words"] == {"node": "a", "sum": "b"}
    assert about["answer"] == "the mask token"


def test_property_adapters_leave_the_language_model_as_it_was_and_a_whole_classifier(
    fields: Fields, tmp_path: Path
) -> None:
    execute(recipe_of(fields, lora={"r": 2}), tmp_path / "a")
    assert (tmp_path / "a" / "model" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "a" / "classifier" / "adapter_model.safetensors").exists()
    assert (tmp_path / "a" / "classifier" / "model.safetensors").exists()


def test_property_the_pretraining_may_have_a_learning_rate_of_its_own(causal: Fields, tmp_path: Path) -> None:
    recipe = recipe_of(causal, continued_lr=1e-4)
    with Run(tmp_path / "a", recipe) as run:
        rates = {phase.name: (phase.optim or recipe.optim).lr for phase, _ in phases_of(recipe, run)}
    assert rates == {"teacher": 3e-3, "pretrain": 1e-4, "finetune": 3e-3}


def test_property_a_teacher_that_tells_nothing_apart_is_warned_of(causal: Fields, tmp_path: Path) -> None:
    result = execute(recipe_of(causal, optim={"lr": 1e-9}, template="{text} ={mask}"), tmp_path / "a")
    said = json.loads((tmp_path / "a" / "prompts.json").read_text())["per_class"]
    collapsed = max(said.values()) == sum(said.values())
    assert ("tells nothing apart" in result.notes.get("warning/teacher", "")) == collapsed
    assert collapsed, "a model with random weights and no training says one thing"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"template": "{text} It was"}, r"exactly one \{mask\}"),
        ({"template": "{text_a} {mask} {text_b}"}, "takes pairs, but labelled texts are single"),
        ({"verbaliser": {**WORDS, "node": " a"}}, "gives two labels the same word"),
        ({"shares": [0.5, 0.5, 0.5]}, "shares must be > 0 and sum to at most 1"),
        ({"replay": 0.2}, "reads prompts and not running text; set replay: 0"),
        ({"use_labels": "guess"}, "use_labels"),
    ],
)
def test_rejects_what_cannot_be_honoured(changes: Fields, words: str, causal: Fields) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe_of(causal, **changes)


def test_rejects_a_label_without_a_word_and_true_words_that_nobody_knows(causal: Fields, tmp_path: Path) -> None:
    fewer = {label: word for label, word in WORDS.items() if label != "flow"}
    with pytest.raises(ModelError, match="no word for label 'flow'"):
        execute(recipe_of(causal, verbaliser=fewer), tmp_path / "a")
    with pytest.raises(CorpusError, match="an unlabelled text has 'None' in the column 'label'"):
        execute(recipe_of(causal, use_labels="true"), tmp_path / "b")


# -- the claim


def test_learns_claim_runs_at_smoke_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import headwater.claims.prompt_continued as claim
    from headwater.modalities.text.bases import Base

    small = Base(corpus="headwater:networkx", kind="masked", hidden=16, layers=1, heads=2, mlp=32, steps=2)
    monkeypatch.setitem(claim.BASES, "smoke", small)
    monkeypatch.setitem(claim.TOKENS, "smoke", 15_000)
    for made in (claim._prompt, claim._base):
        made.cache_clear()
    try:
        measured = CLAIM.measure("smoke", 100, tmp_path / "seed")
    finally:
        for made in (claim._prompt, claim._base):
            made.cache_clear()
    assert judge(CLAIM, "smoke", {100: measured})["verdict"] == "inconclusive"
    for arm in ARMS:
        assert np.mean(measured.items[arm]["accuracy"]) == pytest.approx(measured.arms[arm]["accuracy"])
    assert "pseudo-labels right/seed-100" in measured.notes
