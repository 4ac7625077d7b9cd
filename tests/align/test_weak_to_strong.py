"""Weak-to-strong: the losses against the formula, balance over the whole batch, the recipe, the claim."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from headwater.align.classes import ClassObjective, ClassStream, class_probabilities
from headwater.align.soft_labels import SoftCrossEntropy, check_distributions
from headwater.align.weak_to_strong import (
    ConfidenceLoss,
    ProductLoss,
    UndefinedGap,
    WeakToStrong,
    agreement,
    bootstrap,
    hard_labels,
    harden,
    hardening_boundary,
    pgr,
    pgr_ci,
    weak_labels,
)
from headwater.claims.weak_to_strong import CLAIM
from headwater.core.budget import Budget
from headwater.core.claim import judge
from headwater.core.fit import FitSettings, Phase, fit
from headwater.core.objective import ObjectiveTrainer
from headwater.core.optim import OptimSpec
from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.run import execute
from headwater.modalities.models import ModelError

Fields = dict[str, Any]

# The batch and the labels at which the released code is compared.
LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.5], [-1.0, 1.0]])
LABELS = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8]])


def rows(batch: int, classes: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator)
    weak = (2 * torch.randn(batch, classes, generator=generator) + torch.randn(classes, generator=generator)).softmax(1)
    return logits, weak


def by_hand(logits: np.ndarray, labels: np.ndarray, coefficient: float) -> float:
    """The formula, row by row, with a quantile of our own: linear between the two nearest."""
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    ordered, place = np.sort(p[:, 0]), labels[:, 1].mean() * (len(p) - 1)
    low = math.floor(place)
    threshold = ordered[low] + (place - low) * (ordered[min(low + 1, len(p) - 1)] - ordered[low])
    losses = []
    for row, label in zip(p, labels, strict=True):
        own = (1.0, 0.0) if row[0] >= threshold else (0.0, 1.0)
        losses.append(-sum(((1 - coefficient) * label[c] + coefficient * own[c]) * math.log(row[c]) for c in (0, 1)))
    return float(np.mean(losses))


# -- the confidence loss


def test_oracle_the_released_codes_batch():
    # Mean weak label of class 1 is 0.55; p0 = .8808, .2689, .3775, .1192; the quantile lies at place 1.65 of 0..3:
    # .2689 + .65 (.3775 - .2689) = .3395. Rows 0 and 2 harden to class 0, rows 1 and 3 to class 1.
    boundary = hardening_boundary(LOGITS, LABELS, "quantile")
    assert boundary.item() == pytest.approx(0.3395, abs=1e-4)
    assert harden(LOGITS, boundary).tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    expected = by_hand(LOGITS.double().numpy(), LABELS.double().numpy(), 0.5)
    official = ConfidenceLoss(alpha_max=0.5, warmup_frac=0.1, warmup="official")
    assert official(LOGITS, LABELS, step_frac=0.5).item() == pytest.approx(expected, abs=1e-6)
    assert official(LOGITS, LABELS, step_frac=0.08).item() == pytest.approx(
        by_hand(LOGITS.double().numpy(), LABELS.double().numpy(), 0.08 * 0.5), abs=1e-6
    )


def test_equation_alpha_rises_linearly_or_as_the_released_code_has_it():
    linear, official = ConfidenceLoss(0.6, 0.25), ConfidenceLoss(0.6, 0.25, warmup="official")
    assert [linear.alpha(at) for at in (0, 0.125, 0.25, 0.26, 1)] == pytest.approx([0, 0.3, 0.6, 0.6, 0.6])
    assert [official.alpha(at) for at in (0, 0.125, 0.25, 0.26, 1)] == pytest.approx([0, 0.075, 0.15, 0.6, 0.6])
    assert ConfidenceLoss(0.6, 0.0).alpha(0.0) == 0.6


@pytest.mark.parametrize("seed", range(20))
def test_oracle_mixed_targets_are_the_two_terms(seed):
    logits, weak = rows(32, seed=seed)
    loss, alpha = ConfidenceLoss(0.75, 0.2), 0.75 * 0.1 / 0.2
    own = harden(logits, loss.boundary(logits, weak))
    two_terms = (1 - alpha) * F.cross_entropy(logits, weak) + alpha * F.cross_entropy(logits, own)
    assert loss(logits, weak, 0.1).item() == pytest.approx(two_terms.item(), abs=2e-7)  # float32: 2^-24 of about 1


def test_oracle_without_confidence_it_is_cross_entropy_with_soft_targets():
    logits, weak = rows(16, classes=4)
    for loss in (ConfidenceLoss(alpha_max=0.0, balance="sinkhorn"), ProductLoss(beta=0.0)):
        assert loss(logits, weak, 1.0).item() == pytest.approx(F.cross_entropy(logits, weak).item(), abs=2e-7)
    assert ConfidenceLoss(balance="sinkhorn")(logits, weak, 0.0).item() == pytest.approx(
        F.cross_entropy(logits, weak).item(), abs=2e-7
    )


@pytest.mark.parametrize("loss", [ConfidenceLoss(0.75, 0.0), ProductLoss(0.7, 1.3)])
def test_oracle_no_gradient_flows_through_the_targets(loss):
    logits, weak = (tensor.double() for tensor in rows(12))
    logits.requires_grad_(True)
    loss(logits, weak, 1.0).backward()
    targets = loss.targets(logits.detach(), weak, 1.0).double()
    numeric, step = torch.zeros_like(logits), 1e-6
    for place in np.ndindex(*logits.shape):
        for sign in (1, -1):
            moved = logits.detach().clone()
            moved[place] += sign * step
            numeric[place] += sign * -(targets * moved.log_softmax(1)).sum(1).mean() / (2 * step)
    torch.testing.assert_close(logits.grad, numeric, rtol=0, atol=1e-7)


@pytest.mark.parametrize("batch", [16, 32, 33, 257])
@pytest.mark.parametrize("seed", range(10))
def test_property_hardened_answers_keep_the_balance_of_the_labels(batch, seed):
    logits, weak = rows(batch, seed=seed)
    hardened = harden(logits, hardening_boundary(logits, weak, "quantile"))
    assert abs(hardened[:, 0].sum().item() - batch * weak[:, 0].mean().item()) <= 1 + 1e-4


@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize("seed", range(10))
def test_property_more_classes_keep_their_balance_too(classes, seed):
    logits, weak = rows(128, classes, seed)
    wanted = 128 * weak.mean(0)
    plain = harden(logits, hardening_boundary(logits, weak, "fixed")).sum(0)
    hardened = harden(logits, hardening_boundary(logits, weak, "sinkhorn")).sum(0)
    assert (hardened - wanted).abs().max() <= 3, "ten sweeps come within a few of 128 rows"
    assert (plain - wanted).abs().max() > 5, "and argmax alone does not"


def test_oracle_two_classes_by_sinkhorn_are_the_quantile_rule():
    for seed in range(20):
        logits, weak = rows(40, seed=seed)
        one, other = (ConfidenceLoss(0.5, 0.0, balance=balance) for balance in ("quantile", "sinkhorn"))
        torch.testing.assert_close(one.targets(logits, weak, 1.0), other.targets(logits, weak, 1.0), rtol=0, atol=0)


def test_property_the_order_of_classes_and_rows_does_not_matter():
    logits, weak = rows(64, classes=2)
    loss = ConfidenceLoss(0.5, 0.0)
    assert loss(logits.flip(0), weak.flip(0), 1.0).item() == pytest.approx(loss(logits, weak, 1.0).item(), abs=1e-6)
    shifted = loss(logits + torch.randn(64, 1), weak, 1.0).item()
    assert shifted == pytest.approx(loss(logits, weak, 1.0).item(), abs=1e-5), "only differences of logits count"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_degenerate_batches_are_finite(dtype):
    loss = ConfidenceLoss(0.75, 0.0)
    equal = torch.zeros(6, 2, dtype=dtype)
    soft = torch.full((6, 2), 0.5)
    assert harden(equal, loss.boundary(equal, soft)).tolist() == [[1, 0]] * 6, "all are at the threshold: class 0"
    logits = rows(6)[0].to(dtype)
    for label in ([1.0, 0.0], [0.0, 1.0]):
        one_class = torch.tensor([label] * 6)
        value = loss(logits.requires_grad_(True), one_class, 1.0)
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(logits.grad).all()
        # At its end the threshold is the smallest or the largest probability, which is class 0 itself.
        assert harden(logits, loss.boundary(logits, one_class))[:, 0].sum() == (6 if label[0] else 1)
        logits = logits.detach()
    assert torch.isfinite(loss(logits[:1], soft[:1], 1.0))
    sure = torch.tensor([[80.0, -80.0]])
    assert torch.isfinite(ProductLoss()(sure, torch.tensor([[0.0, 1.0]]), 1.0))


def test_rejects_what_is_no_label_and_no_setting():
    loss = ConfidenceLoss()
    with pytest.raises(ValueError, match=r"weak_probs must be probabilities; row 1 is \[0.5, 0.6"):
        loss(torch.zeros(2, 2), torch.tensor([[0.5, 0.5], [0.5, 0.6]]), 0.0)
    with pytest.raises(ValueError, match=r"logits' shape \(3, 2\); got \(2, 2\)"):
        loss(torch.zeros(3, 2), torch.full((2, 2), 0.5), 0.0)
    with pytest.raises(ValueError, match=r"'quantile' is for two classes; got 3\. Use 'sinkhorn'"):
        loss(torch.zeros(2, 3), torch.full((2, 3), 1 / 3), 0.0)
    with pytest.raises(ValueError, match=r"alpha_max must be in \[0, 1\]; got 1.5"):
        ConfidenceLoss(alpha_max=1.5)
    with pytest.raises(ValueError, match="alpha and beta must be >= 0; got -1"):
        ProductLoss(alpha=-1)
    with pytest.raises(ValueError, match=r"\(n, classes\), with two classes or more; got shape \(3,\)"):
        check_distributions("x", np.ones(3))
    check_distributions("x", np.array([[0.5, 0.5009]]))


def test_equation_product_of_beliefs():
    # f = (.8, .2), f_w = (.25, .75): products .2, .15, normalised 4/7, 3/7; with squares of f: .16, .03 -> 16/19, 3/19.
    logits, weak = torch.tensor([[math.log(0.8), math.log(0.2)]]), torch.tensor([[0.25, 0.75]])
    assert ProductLoss().targets(logits, weak).tolist()[0] == pytest.approx([4 / 7, 3 / 7], abs=1e-6)
    assert ProductLoss(beta=2).targets(logits, weak).tolist()[0] == pytest.approx([16 / 19, 3 / 19], abs=1e-6)
    assert ProductLoss(alpha=0).targets(logits, torch.tensor([[1.0, 0.0]])).tolist()[0] == pytest.approx([0.8, 0.2])


# -- the whole batch, however it is cut


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def features(n: int = 90, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 6, generator=generator)
    weak = torch.stack([X[:, 0], X[:, 1] - 1], 1).mul(2).softmax(1)
    return X, weak.numpy()


def trained(directory: Path, loss: Any, *, micro: int | None = None, blind: bool = False) -> nn.Module:
    class Blind(ClassObjective):
        def begin_step(self, progress, over_batch):
            super().begin_step(progress, None)

    X, weak = features()
    model = network()
    phase = Phase("student", model, ClassStream(X, weak, rows=32), (Blind if blind else ClassObjective)(loss))
    fit(
        phase,
        budget=Budget(steps=8),
        optim=OptimSpec(lr=1e-2, eps=1e-3, warmup=0),
        seed=0,
        directory=directory,
        settings=FitSettings(precision="fp32", micro_rows=micro, log_every=1),
    )
    return model


def furthest(one: nn.Module, other: nn.Module) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("micro", [1, 5, 16])
def test_oracle_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path, micro):
    loss = ConfidenceLoss(0.75, 0.2)
    whole = trained(tmp_path / "whole", loss)
    assert furthest(whole, trained(tmp_path / "parts", loss, micro=micro)) < 1e-6
    assert furthest(whole, trained(tmp_path / "blind", loss, micro=micro, blind=True)) > 1e-3, "a threshold per part"


def test_oracle_fit_is_the_loop_one_would_write(tmp_path):
    loss, spec = ConfidenceLoss(0.75, 0.5), OptimSpec(lr=1e-2, eps=1e-3, warmup=0)
    X, weak = features()
    stream, model = ClassStream(X, weak, rows=32), network()
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": spec.weight_decay},
         {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}],
        lr=spec.lr, betas=spec.betas, eps=spec.eps,
    )  # fmt: skip
    for step in range(8):
        batch = stream.batch(step)
        loss(model(batch["features"]), batch["soft_label"], step / 8).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step + 1) / 8)))
        optimizer.step()
        optimizer.zero_grad()
    assert furthest(model, trained(tmp_path, loss)) < 1e-6


def test_property_the_objective_runs_in_the_hugging_face_trainer(tmp_path):
    X, weak = features(64)

    def train(loss, **arguments):
        model = network()
        options = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, **arguments}
        trainer = ObjectiveTrainer(
            objective=ClassObjective(loss),
            model=model,
            args=TrainingArguments(str(tmp_path), max_steps=4, learning_rate=0.05, **options),
            train_dataset=[{"features": x, "soft_label": torch.tensor(w)} for x, w in zip(X, weak, strict=True)],
        )
        trainer.train()
        return model

    plain, confident = (train(loss, per_device_train_batch_size=32) for loss in (SoftCrossEntropy(), ConfidenceLoss()))
    assert furthest(plain, confident) > 1e-3
    with pytest.raises(ValueError, match="must see the whole batch"):
        train(ConfidenceLoss(), per_device_train_batch_size=8, gradient_accumulation_steps=4)
    train(SoftCrossEntropy(), per_device_train_batch_size=8, gradient_accumulation_steps=4)


# -- gap and agreement


def test_equation_pgr():
    assert pgr(0.6, 0.8, 0.9) == pytest.approx(2 / 3)
    assert pgr(0.6, 0.5, 0.9) == pytest.approx(-1 / 3)
    for ceiling in (0.6, 0.5, float("nan")):
        with pytest.raises(UndefinedGap, match=r"ceiling, .*is not above the supervisor, 0.6000"):
            pgr(0.6, 0.7, ceiling)


def test_oracle_pgr_over_seeds_is_the_ratio_of_means():
    weak, student, ceiling = [0.6, 0.62, 0.58, 0.61], [0.7, 0.71, 0.72, 0.69], [0.8, 0.83, 0.79, 0.81]
    found = pgr_ci(weak, student, ceiling, 2000)
    gained, gap = np.subtract(student, weak), np.subtract(ceiling, weak)
    assert found.estimate == pytest.approx(gained.sum() / gap.sum())
    assert (gained / gap).min() <= found.low < found.estimate < found.high <= (gained / gap).max()
    assert found == pgr_ci(weak, student, ceiling, 2000)
    assert pgr_ci([0.5, 0.6], [0.6, 0.7], [0.7, 0.8]).low == pytest.approx(0.5)


def test_rejects_a_gap_that_may_not_be_there():
    with pytest.raises(UndefinedGap, match=r"0.7000 in the mean, is not clearly above the supervisor, 0.6000"):
        pgr_ci([0.5, 0.7, 0.6], [0.6, 0.6, 0.6], [0.9, 0.5, 0.7])
    with pytest.raises(UndefinedGap):
        pgr_ci([0.5], [0.6], [0.7])
    with pytest.raises(ValueError, match="one figure for each seed"):
        pgr_ci([0.5, 0.5], [0.6], [0.7, 0.7])


def test_equation_agreement_splits_by_whether_the_supervisor_is_right():
    # The supervisor is right on 0, 1, 2 and wrong on 3, 4; the student agrees on 0, 1 and on 3.
    found = agreement(student=[0, 1, 1, 1, 0], weak=[0, 1, 0, 1, 1], truth=[0, 1, 0, 0, 0])
    assert (found.overall, found.weak_right, found.weak_wrong) == pytest.approx((3 / 5, 2 / 3, 1 / 2))
    assert math.isnan(agreement([0], [0], [0]).weak_wrong)
    with pytest.raises(ValueError, match="paired"):
        agreement([0, 1], [0], [0])


# -- labels


@pytest.mark.parametrize("hard", [False, True])
def test_oracle_weak_labels_of_a_module_over_features(hard):
    X, _ = features(70)
    model = network().train()
    labelled = weak_labels(
        model, Dataset.from_dict({"features": X.numpy(), "id": list(range(70))}), hard, batch_size=32
    )
    expected = model(X).softmax(1).detach()
    expected = F.one_hot(expected.argmax(1)).float() if hard else expected
    np.testing.assert_allclose(np.array(labelled["soft_label"]), expected.numpy(), atol=1e-6)
    assert labelled.features["soft_label"].feature.dtype == "float32"
    assert labelled["id"][69] == 69
    assert model.training, "given back in its own mode"


def test_rejects_a_data_set_that_no_model_reads():
    with pytest.raises(ValueError, match="a column input_ids or features; it has text"):
        weak_labels(network(), Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(ValueError, match="no input to judge"):
        class_probabilities(network(), torch.zeros(0, 6))
    with pytest.raises(ValueError, match="answer to input 1 is not finite"):
        class_probabilities(network(), torch.tensor([[0.0] * 6, [torch.nan] * 6]))


def test_oracle_bootstrap_passes_labels_on():
    def train(name, labels):
        return f"{name}({labels[0, 0]:g})"

    beliefs = {"mid(1)": 2.0, "large(2)": 3.0}
    learned = bootstrap(["mid", "large", "xl"], np.ones((1, 2)), train, lambda m: np.full((1, 2), beliefs[m]))
    assert learned == ["mid(1)", "large(2)", "xl(3)"]
    assert bootstrap([], np.ones((1, 2)), train, lambda m: np.ones((1, 2))) == []


def test_equation_hard_labels_are_the_likeliest():
    assert hard_labels(np.array([[0.2, 0.8], [0.5, 0.5]], dtype=np.float32)).tolist() == [[0, 1], [1, 0]]


def test_learns_to_overrule_noisy_labels(tmp_path):
    # Labels right in four of five; a linear task that the student can find behind them.
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(600, 6, generator=generator)
    truth = (X[:, 0] + X[:, 1] > 0).long()
    wrong = torch.rand(600, generator=generator) < 0.2
    taught = F.one_hot(torch.where(wrong, 1 - truth, truth)).float().numpy()
    model = network()
    stream = ClassStream(X, taught, rows=64)
    fit(
        Phase("student", model, stream, ClassObjective(ConfidenceLoss(0.5))),
        budget=Budget(steps=stream.steps(15)), optim=OptimSpec(lr=1e-2), seed=0, directory=tmp_path,
        settings=FitSettings(precision="fp32"),
    )  # fmt: skip
    answers = class_probabilities(model, X).argmax(1)
    supervisor, student = 1 - wrong.float().mean().item(), (answers == truth.numpy()).mean()
    assert student > supervisor + 0.1


# -- the recipe


def run(fields: Fields, directory: Path, **changes: Any) -> Any:
    return execute(load_recipe({"method": "weak_to_strong", **fields, **changes}), directory)


@pytest.fixture(scope="module")
def finished(align_fields: Fields, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("w2s") / "run"
    return directory, run(align_fields, directory, epochs=4.0)


def test_oracle_pgr_is_that_of_the_saved_models(finished, align_fields):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from headwater.align.base import read_data

    directory, result = finished
    recipe = load_recipe({"method": "weak_to_strong", **align_fields})
    data = read_data(recipe.data, None, held_out=0.2, validation=0.1)  # type: ignore[attr-defined]
    accuracy = {}
    for name, folder in (("weak", "weak"), ("student", "model"), ("ceiling", "ceiling")):
        model = AutoModelForSequenceClassification.from_pretrained(directory / folder)
        tokenizer = AutoTokenizer.from_pretrained(directory / folder)
        right = []
        for item in data.test:  # one at a time: no padding
            with torch.no_grad():
                answer = int(model(**tokenizer(item.prompt, return_tensors="pt")).logits.argmax())
            right.append(model.config.id2label[answer] == item.answer)
        accuracy[name] = np.mean(right)
    stored = json.loads((directory / "pgr.json").read_text())
    assert {name: stored[name] for name in accuracy} == pytest.approx(accuracy)
    assert result.metrics["test/accuracy"] == pytest.approx(accuracy["student"])
    assert result.metrics["weak/accuracy"] == pytest.approx(accuracy["weak"])
    if accuracy["ceiling"] > accuracy["weak"]:
        expected = (accuracy["student"] - accuracy["weak"]) / (accuracy["ceiling"] - accuracy["weak"])
        assert result.metrics["pgr"] == stored["pgr"] == pytest.approx(expected)
    items = json.loads((directory / "items.json").read_text())["test/accuracy"]["values"]
    assert np.mean(items) == pytest.approx(accuracy["student"])


def test_property_labels_stand_in_a_file_that_others_read(finished):
    directory, result = finished
    table = pq.read_table(directory / "labels.parquet").to_pydict()
    soft = np.array(table["soft_label"])
    np.testing.assert_allclose(soft.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(table["confidence"], soft.max(1))
    assert {"domain", "general"} >= set(table["label"])
    assert len(table["text"]) == result.metrics["data/unlabelled"]
    readme = (directory / "model" / "README.md").read_text()
    assert "labels.parquet" in readme


def test_property_only_the_supervisors_labels_are_charged(finished):
    metrics = finished[1].metrics
    assert metrics["cost/labels"] == metrics["data/supervised"] == finished[1].cost["labels"]
    assert metrics["cost/ceiling_labels"] == metrics["data/unlabelled"]


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "xent"},
        {"loss": {"kind": "product", "beta": 0.5}},
        {"loss": {"kind": "confidence", "balance": "fixed"}},
        {"loss": {"kind": "confidence", "warmup": "official"}},
        {"hard_labels": True},
        {"linear_probe_first": True},
        {"through": "weak_model"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_property_every_choice_changes_the_student_and_nothing_else(align_fields, tmp_path, finished, changes):
    if changes.get("through"):
        changes = {"through": [align_fields["weak_model"]]}
    directory = tmp_path / "run"
    metrics = run(align_fields, directory, epochs=4.0, ceiling=False, **changes).metrics
    reference = finished[1].metrics
    assert metrics["test/nll"] != reference["test/nll"]
    if "linear_probe_first" not in changes:
        assert metrics["weak/accuracy"] == reference["weak/accuracy"]
    assert "pgr" not in metrics
    assert not (directory / "ceiling").exists()


def test_property_language_modelling_comes_before_the_labels(align_fields, tiny_masked, tiny_causal, tmp_path):
    from transformers import AutoModel, AutoModelForMaskedLM

    fields = {**align_fields, "model": str(tiny_masked), "ceiling": False}
    plain, read = run(fields, tmp_path / "plain"), run(fields, tmp_path / "read", generative_finetune_steps=3)
    assert read.metrics["test/nll"] != plain.metrics["test/nll"]
    assert read.metrics["weak/accuracy"] == plain.metrics["weak/accuracy"]
    before = AutoModelForMaskedLM.from_pretrained(tiny_masked).state_dict()
    after = AutoModelForMaskedLM.from_pretrained(tmp_path / "read" / "generative").state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    # Trained for no step, the student is the language model's body.
    still = {**fields, "optim": {"lr": 1e-12}}
    run(still, tmp_path / "still", generative_finetune_steps=3, optim={"lr": 1e-12})
    body = AutoModel.from_pretrained(tmp_path / "still" / "model", add_pooling_layer=False).state_dict()
    torch.testing.assert_close(body, {n: before[f"bert.{n}"] for n in body}, rtol=0, atol=1e-6)
    causal = {**fields, "model": str(tiny_causal), "weak_model": str(tiny_causal)}
    assert run(causal, tmp_path / "causal", generative_finetune_steps=2).metrics["test/accuracy"] > 0


def test_property_a_student_of_true_labels_reaches_the_ceiling(align_fields, tmp_path, monkeypatch):
    from headwater.align.tasks import ClassTask

    monkeypatch.setattr(WeakToStrong, "_labels", lambda self, model, texts: task[0].one_hot(task[0]._hidden))
    task: list[ClassTask] = []
    original = ClassTask.__init__

    def init(self, *args):
        original(self, *args)
        task.append(self)

    monkeypatch.setattr(ClassTask, "__init__", init)
    metrics = run(align_fields, tmp_path / "run", epochs=4.0, loss="xent").metrics
    assert metrics["ceiling/accuracy"] > metrics["weak/accuracy"]
    assert metrics["pgr"] == 1.0, "same labels, same start, same order: the same model"
    assert metrics["weak/label_accuracy"] == 1.0


def test_property_a_ceiling_below_the_supervisor_gives_no_pgr(align_fields, tmp_path, monkeypatch):
    import headwater.align.tasks as tasks

    monkeypatch.setattr(tasks.Judged, "accuracy", lambda self, name: {"weak": 0.9, "ceiling": 0.8}.get(name, 0.85))
    result = run(align_fields, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "pgr.json").read_text())
    assert "pgr" not in result.metrics
    assert stored["pgr"] is None
    assert "0.8000, is not above the supervisor, 0.9000" in stored["undefined"]
    assert result.notes["warning/pgr"] == stored["undefined"]


def test_property_a_small_batch_is_warned_of(align_fields, tmp_path):
    small = {**align_fields, "batch_size": 8, "ceiling": False}
    assert "balance of answers is noise" in run(small, tmp_path / "a").notes["warning/batch_size"]
    assert "warning/batch_size" not in run(small, tmp_path / "b", loss="xent").notes
    assert "warning/batch_size" not in run(align_fields, tmp_path / "c", ceiling=False).notes


def test_rejects_language_modelling_with_what_is_no_language_model(align_fields, tmp_path, finished):
    classifier = str(finished[0] / "model")
    with pytest.raises(ModelError, match="cannot tell what language model"):
        run(align_fields, tmp_path / "run", model=classifier, generative_finetune_steps=2)


def test_rejects_an_unknown_loss(align_fields):
    with pytest.raises(RecipeError, match="loss"):
        load_recipe({"method": "weak_to_strong", **align_fields, "loss": "confidense"})
    with pytest.raises(RecipeError, match=r"loss.*alpha_max"):
        load_recipe({"method": "weak_to_strong", **align_fields, "loss": {"kind": "confidence", "alpha_max": 2.0}})


def test_learns_claim_runs_at_smoke_scale(tmp_path):
    measured = CLAIM.measure("smoke", 100, tmp_path / "claim")
    verdict = judge(CLAIM, "smoke", {100: measured})
    assert verdict["verdict"] == "inconclusive"
    assert not measured.unmet
    accuracy = {arm: metrics["accuracy"] for arm, metrics in measured.arms.items()}
    assert accuracy["weak"] + 0.03 < accuracy["ceiling"]
    assert measured.arms["naive"]["pgr"] == pytest.approx(pgr(accuracy["weak"], accuracy["naive"], accuracy["ceiling"]))
    again = CLAIM.measure("smoke", 100, tmp_path / "again")
    assert again.arms == measured.arms
