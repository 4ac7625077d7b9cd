"""Self-training: the four steps in order, from the right weights, and the scikit-learn part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.base import clone
from sklearn.neural_network import MLPClassifier
from sklearn.semi_supervised import SelfTrainingClassifier
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from headwater.claims.self_training import ARMS, CLAIM
from headwater.core.claim import judge
from headwater.core.fit import fit
from headwater.core.recipe import ModelRef, RecipeError, load_recipe
from headwater.core.rng import derive_seed
from headwater.core.run import Run, execute
from headwater.domain.adaptation import Adaptation
from headwater.domain.labelling import LabelTask, _Exam, read_labelled
from headwater.domain.pseudo_labels import PseudoLabelError
from headwater.domain.self_training import SelfTrainedClassifier, SelfTraining, TaskAndText, WithTexts
from headwater.modalities.models import load_model, load_tokenizer
from headwater.modalities.text.class_inputs import ClassStream
from headwater.modalities.text.heads import put_head

Fields = dict[str, Any]
LABELS = ("a", "b", "c")


def recipe_of(fields: Fields, **changes: Any) -> SelfTraining:
    recipe = load_recipe({"method": "self_training", **fields, "shares": [0.25, 0.5, 0.25], **changes})
    assert isinstance(recipe, SelfTraining)
    return recipe


def opened(recipe: SelfTraining, run: Run) -> tuple[Adaptation, LabelTask]:
    ctx = Adaptation.open(recipe, run)
    split = read_labelled(recipe.labelled, recipe.labelled_test, held_out=0.2, validation=0.1)
    return ctx, LabelTask(recipe, ctx, split, ctx.domain.train, _Exam(split, run, "start"))


def copied(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# -- the recipe


def test_property_pretraining_starts_from_the_starting_model_and_fine_tuning_from_the_pretrained(
    labelled_domain_fields: Fields, tmp_path: Path
) -> None:
    recipe = recipe_of(labelled_domain_fields)
    with Run(tmp_path / "a", recipe) as run:
        ctx, task = opened(recipe, run)
        steps = recipe.learn(ctx, task)
        phase, before, after = next(steps), {}, {}
        for name in ("teacher", "pretrain-1", "finetune-1"):
            assert phase.name == name
            before[name] = copied(phase.model), copied(phase.objective)  # type: ignore[arg-type]
            trained = fit(
                phase, budget=recipe.budget, optim=recipe.optim, seed=0, directory=run.directory, settings=recipe.fit
            )
            after[name] = copied(phase.model), copied(phase.objective)  # type: ignore[arg-type]
            if name != "finetune-1":
                phase = steps.send(trained)
        start = load_model(recipe.model, "causal").state_dict()
    assert all(torch.equal(before["teacher"][0][k], start[k]) for k in start)
    for part in (0, 1):
        first, fresh = before["teacher"][part], before["pretrain-1"][part]
        assert all(torch.equal(first[k], fresh[k]) for k in first), "pretraining starts from M0, its head too"
        assert any(not torch.equal(after["teacher"][part][k], fresh[k]) for k in fresh), "and not from the teacher"
        pretrained, tuned = after["pretrain-1"][part], before["finetune-1"][part]
        assert all(torch.equal(pretrained[k], tuned[k]) for k in tuned), "model and head are carried over"


def test_oracle_pretraining_and_fine_tuning_are_two_trainings_in_a_row_by_hand(
    labelled_domain_fields: Fields, tmp_path: Path
) -> None:
    # Plain AdamW without decay, clipping or schedule, so that a loop of a few lines is the same algorithm.
    optim = {"lr": 3e-3, "weight_decay": 0.0, "clip": None, "warmup": 0.0, "schedule": "constant"}
    recipe = recipe_of(labelled_domain_fields, optim=optim)
    execute(recipe, tmp_path / "run")
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(recipe.seed, "initialisation"))
        model = AutoModelForSequenceClassification.from_pretrained(recipe.model.name, num_labels=6)
    model.config.pad_token_id = load_tokenizer(recipe.model).pad_token_id
    with Run(tmp_path / "other", recipe) as run:
        ctx, task = opened(recipe, run)
        steps = recipe.learn(ctx, task)
        phases = [next(steps)]
        fit(phases[0], budget=recipe.budget, optim=recipe.optim, seed=0, directory=run.directory, settings=recipe.fit)
        for _ in range(2):
            phases.append(steps.send(None))  # type: ignore[arg-type]  # the hook does not look at it
    model.eval()
    for phase, count in zip(phases[1:], (4, 2), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
        for step in range(count):
            batch = phase.stream.batch(step)
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            F.cross_entropy(logits, batch["soft_label"].argmax(1)).backward()
            optimizer.step()
            optimizer.zero_grad()
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "classifier").state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-5)


def test_property_rounds_divide_the_budget_and_each_labels_anew(labelled_domain_fields: Fields, tmp_path: Path) -> None:
    result = execute(recipe_of(labelled_domain_fields, rounds=2, budget={"steps": 16}, soft=True), tmp_path / "a")
    phases = sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir())
    assert phases == ["finetune-1", "finetune-2", "pretrain-1", "pretrain-2", "teacher"]
    assert result.cost["steps"] == 4 + 2 * (4 + 2)
    report = json.loads((tmp_path / "a" / "pseudo.json").read_text())
    assert report["pseudo-1"]["labels"] == report["pseudo-1"]["kept"] == result.metrics["data/unlabelled"]
    assert sum(report["pseudo-2"]["confidence_histogram"]["counts"]) == report["pseudo-2"]["labels"]
    assert 0 <= report["student_agrees_with_teacher"] <= 1
    gain = result.metrics["downstream/labelled/accuracy"] - result.metrics["downstream/labelled/accuracy_start"]
    assert result.metrics["downstream/labelled/gain"] == pytest.approx(gain)


def test_property_labelling_is_charged_to_a_budget_in_flops(labelled_domain_fields: Fields, tmp_path: Path) -> None:
    result = execute(recipe_of(labelled_domain_fields, budget={"flops": 3e8}), tmp_path / "a")
    assert 0.8 * 3e8 < result.cost["flops"] <= 3e8 * 1.02
    inputs = json.loads((tmp_path / "a" / "pseudo.json").read_text())["pseudo-1"]["labels"]
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model").parameters())
    assert result.cost["flops"] > 2 * parameters * inputs * 32, "32 tokens a text are labelled, forward"


def test_property_adapters_leave_the_language_model_as_it_was_and_a_whole_classifier(
    labelled_domain_fields: Fields, tmp_path: Path
) -> None:
    execute(recipe_of(labelled_domain_fields, lora={"r": 2}), tmp_path / "a")
    assert (tmp_path / "a" / "model" / "adapter_model.safetensors").exists()
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a" / "classifier")
    assert not [name for name in classifier.state_dict() if "lora" in name]


def test_property_a_teacher_at_chance_is_warned_of(labelled_domain_fields: Fields, tmp_path: Path) -> None:
    # Labels drawn by lot cannot be learned; validation is a third of them.
    rng = np.random.default_rng(0)
    rows = [json.loads(line) for line in Path(labelled_domain_fields["labelled"]).read_text().splitlines()]
    path = tmp_path / "noise.jsonl"
    path.write_text("\n".join(json.dumps({**row, "label": "node" if rng.random() < 0.5 else "path"}) for row in rows))
    valid = {"labelled": str(path), "labelled_test": None, "labelled_valid": 0.3, "labelled_held_out": 0.3}
    found = [execute(recipe_of(labelled_domain_fields, **valid, seed=seed), tmp_path / str(seed)) for seed in range(3)]
    for result in found:
        notes = result.notes
        path = tmp_path / str(found.index(result)) / "labelled.json"
        table = np.array(json.loads(path.read_text())["validation_confusion"]["start"])
        assert ("warning/teacher" in notes) == (table.trace() <= table.sum() / 2)
    assert any("pseudo-labels are noise" in result.notes.get("warning/teacher", "") for result in found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shares": [0.5, 0.5, 0.5]}, "shares must be > 0 and sum to at most 1"),
        ({"shares": [0.0, 0.5, 0.5]}, "shares must be > 0"),
        ({"replay": 0.2}, "trains on labels and not on running text; set replay: 0"),
        ({"rounds": 0}, "greater than or equal to 1"),
        ({"threshold": 1.0}, "less than 1"),
    ],
)
def test_rejects_what_cannot_be_honoured(changes: Fields, words: str, labelled_domain_fields: Fields) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe_of(labelled_domain_fields, **changes)


def test_rejects_a_threshold_that_leaves_nothing(labelled_domain_fields: Fields, tmp_path: Path) -> None:
    with pytest.raises(PseudoLabelError, match=r"threshold 0.99 leaves 0 of .*Lower the threshold"):
        execute(recipe_of(labelled_domain_fields, threshold=0.99), tmp_path / "a")


# -- the language model's loss beside the task's


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_equation_the_two_losses_add_up_text_by_text(kind: str, tiny_causal: Path, tiny_masked: Path) -> None:
    home = {"causal": tiny_causal, "masked": tiny_masked}[kind]
    ref = ModelRef(name=str(home))
    made = put_head(load_model(ref, kind), ref, LABELS, max_tokens=20, seed=0)  # type: ignore[arg-type]
    tokenizer = made.classes.tokenizer
    assert tokenizer is not None
    texts = ["graph node edge path cut", "sum mean row axis sort fill cast " * 2, "tree flow node"]
    stream = ClassStream(made.classes.encode(texts), np.eye(3), rows=3, pad=made.classes.pad)
    joint = WithTexts(stream, tokenizer if kind == "masked" else None, seed=1)
    batch = joint.batch(0)
    objective = TaskAndText(made.objective, 0.7, causal=kind == "causal")
    found = objective(made.model, batch)
    expected = float(made.objective(made.model, batch).total)
    language = (AutoModelForCausalLM if kind == "causal" else AutoModelForMaskedLM).from_pretrained(home)
    for row in range(3):
        length = int(batch["attention_mask"][row].sum())
        labels = batch["text_labels"][row : row + 1, :length]
        assert (batch["text_labels"][row, length:] == -100).all(), "padding is not predicted"
        if (labels != -100).any():
            own = language(input_ids=batch["text_ids"][row : row + 1, :length], labels=labels)
            expected += 0.7 * float(own.loss)
    assert float(found.total) == pytest.approx(expected, rel=1e-5)
    assert found.count == 3
    parts = [objective(made.model, joint.batch(0, i, i + 1)) for i in range(3)]
    assert sum(float(part.total) for part in parts) == pytest.approx(float(found.total), rel=1e-5)


def test_property_masks_are_drawn_anew_in_every_epoch(tiny_masked: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_masked)
    ids = [list(range(10, 60))] * 4
    joint = WithTexts(ClassStream(ids, np.eye(4), rows=4), tokenizer, seed=0)
    first, again, second = joint.batch(0), joint.batch(0), joint.batch(1)
    assert torch.equal(first["text_labels"], again["text_labels"])
    assert not torch.equal(first["text_labels"], second["text_labels"])
    part = joint.batch(0, 2, 4)
    assert torch.equal(part["text_ids"], first["text_ids"][2:])


def test_property_the_language_loss_keeps_the_language_model(labelled_domain_fields: Fields, tmp_path: Path) -> None:
    fields = {**labelled_domain_fields, "budget": {"steps": 40}, "optim": {"lr": 1e-2}}
    plain = execute(recipe_of(fields), tmp_path / "plain")
    joint = execute(recipe_of(fields, language_loss=1.0), tmp_path / "joint")
    assert joint.metrics["domain/bpb"] < plain.metrics["domain/bpb"] - 0.2


# -- the scikit-learn part


def blobs(per_class: int = 60, shown: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(4, 6))
    y = np.repeat(np.arange(4), per_class) * 10  # labels that are not 0..3
    X = centres[y // 10] + 0.5 * rng.normal(size=(len(y), 6))
    known = np.where(np.arange(len(y)) % per_class < shown, y, -1)
    order = rng.permutation(len(y))
    return X[order], y[order], known[order]


def net(**changes: Any) -> MLPClassifier:
    return MLPClassifier((8,), **{"max_iter": 40, "random_state": 0, "learning_rate_init": 0.01, **changes})


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore:Got `batch_size`")
def test_oracle_the_scikit_learn_part_is_its_three_fits_by_hand() -> None:
    X, _, known = blobs()
    ours = SelfTrainedClassifier(net(), {"max_iter": 15}).fit(X, known)
    labelled, unlabelled = known >= 0, known < 0
    teacher = net().fit(X[labelled], known[labelled])
    pseudo = teacher.predict(X[unlabelled])
    student = net(max_iter=15, warm_start=True).fit(X[unlabelled], pseudo)
    np.testing.assert_array_equal(ours.pretrained_.coefs_[0], student.coefs_[0])
    student.set_params(max_iter=40).fit(X[labelled], known[labelled])
    np.testing.assert_array_equal(ours.pseudo_labels_, pseudo)
    for a, b in zip(ours.estimator_.coefs_, student.coefs_, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(ours.predict(X), student.predict(X))
    np.testing.assert_array_equal(ours.predict_proba(X), student.predict_proba(X))
    assert ours.classes_.tolist() == [0, 10, 20, 30]
    assert ours.estimator.warm_start is False, "the estimator that was given is left alone"


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore:Got `batch_size`")
def test_property_it_takes_what_scikit_learns_own_takes_and_differs_in_the_order() -> None:
    X, y, known = blobs()
    theirs = SelfTrainingClassifier(net(), threshold=0.0, max_iter=1).fit(X, known)
    ours = SelfTrainedClassifier(net()).fit(X, known)
    np.testing.assert_array_equal(theirs.transduction_[known < 0], ours.pseudo_labels_)  # the same teacher
    assert not np.allclose(theirs.estimator_.coefs_[0], ours.estimator_.coefs_[0])
    assert (ours.predict(X) == y).mean() > 0.8
    copy = clone(ours)
    assert copy.get_params()["estimator__hidden_layer_sizes"] == (8,)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore:Got `batch_size`")
def test_property_rounds_and_thresholds_of_the_scikit_learn_part() -> None:
    X, _, known = blobs()
    once = SelfTrainedClassifier(net()).fit(X, known)
    twice = SelfTrainedClassifier(net(), rounds=2).fit(X, known)
    np.testing.assert_array_equal(twice.pseudo_labels_, once.predict(X[known < 0]))
    picky = SelfTrainedClassifier(net(), threshold=0.45).fit(X, known)
    sure = picky.teacher_.predict_proba(X[known < 0]).max(1) >= 0.45
    np.testing.assert_array_equal(picky.kept_, np.flatnonzero(sure))
    assert 0 < len(picky.kept_) < len(sure)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(
    ("made", "change", "kind", "words"),
    [
        (lambda: SelfTrainedClassifier(), lambda y: y, TypeError, "warm_start; None has none"),
        (lambda: SelfTrainedClassifier(net(), rounds=0), lambda y: y, ValueError, "rounds must be at least 1; got 0"),
        (lambda: SelfTrainedClassifier(net(), threshold=1.0), lambda y: y, ValueError, r"in \[0, 1\); got 1.0"),
        (lambda: SelfTrainedClassifier(net()), lambda y: y * 0, ValueError, "0 unlabelled rows"),
        (lambda: SelfTrainedClassifier(net()), lambda y: np.minimum(y, 0), ValueError, r"classes \[0\]"),
        (lambda: SelfTrainedClassifier(net()), lambda y: y.astype(str), ValueError, "integers, -1 for unlabelled"),
    ],
)
def test_rejects_of_the_scikit_learn_part(made, change, kind, words) -> None:
    X, _, known = blobs()
    with pytest.raises(kind, match=words):
        made().fit(X, change(known))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore:Got `batch_size`")
def test_rejects_a_teacher_that_never_says_a_class() -> None:
    X, _, known = blobs()
    X[known < 0] = X[np.flatnonzero(known == 0)[0]] + 0.01 * X[known < 0]
    X[np.flatnonzero(known < 0)[:5]] = X[np.flatnonzero(known == 10)[0]]
    with pytest.raises(PseudoLabelError, match="no pseudo-label that is kept says 20"):
        SelfTrainedClassifier(net(max_iter=300)).fit(X, known)


# -- the claim


@pytest.mark.slow  # half a minute; the contract suite holds the claim's form
def test_learns_claim_runs_at_smoke_scale(tmp_path: Path) -> None:
    measured = CLAIM.measure("smoke", 100, tmp_path)
    verdict = judge(CLAIM, "smoke", {100: measured})
    assert verdict["verdict"] == "inconclusive"
    for amount in ("few", "some", "many"):
        for arm in ARMS:
            name = f"{arm}/{amount}"
            assert np.mean(measured.items[name]["accuracy"]) == pytest.approx(measured.arms[name]["accuracy"])
        gain = measured.arms[f"self-trained/{amount}"]["accuracy"] - measured.arms[f"fine-tuned/{amount}"]["accuracy"]
        assert measured.arms[f"gain/{amount}"]["gain"] == pytest.approx(gain)
