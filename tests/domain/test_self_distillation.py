"""The distance from the teacher, what is compared, and the recipe's restarts: the oracles of self-distillation."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from headwater.core.budget import Budget, Cost, count_flops
from headwater.core.fit import FitSettings, Phase, Trained, fit
from headwater.core.objective import Loss
from headwater.core.optim import OptimSpec
from headwater.core.recipe import load_recipe
from headwater.core.run import Result, Run, execute
from headwater.core.training_state import training_tensors
from headwater.domain.adaptation import Adaptation
from headwater.domain.base import Adapted
from headwater.domain.self_distillation import (
    ImageReconstruction,
    SelfDistillation,
    SelfDistilled,
    cache_teacher,
    distance_from,
    encoder_features,
    labels_per_row,
    squared_distance,
    unmasked,
)
from headwater.modalities.text.objectives import TokenObjective
from headwater.modalities.text.packing import mask_tokens
from headwater.modalities.text.tiny import tiny_bert, tiny_llama

Fields = dict[str, Any]
Batch = Mapping[str, Tensor]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TINY = {"hidden": 16, "layers": 1, "heads": 2, "mlp": 32, "context": 64}
IMAGE = {"image_size": 8, "patch_size": 2, "num_channels": 1}


def recipe_of(fields: Fields, **changes: Any) -> SelfDistilled:
    recipe = load_recipe({"method": "self_distillation", **fields, **changes})
    assert isinstance(recipe, SelfDistilled)
    return recipe


def weights(directory: Path) -> dict[str, Any]:
    return load_file(directory / "model" / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def tiny_mae(seed: int = 0) -> ViTMAEForPreTraining:
    decoder = {f"decoder_{name}": size for name, size in {**SHAPE, "num_hidden_layers": 1}.items()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ViTMAEForPreTraining(ViTMAEConfig(**SHAPE, **IMAGE, **decoder, norm_pix_loss=True)).eval()
        # transformers leaves the positions of a new one at zero, and the order of patches would not matter.
        for positions in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            positions.data.normal_()
    return model


def pixels(rows: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(0))}


def masked_batch(rows: int = 6, length: int = 12) -> dict[str, Tensor]:
    """Every row with another number of targets, the first with none."""
    ids = torch.randint(5, 50, (rows, length), generator=torch.Generator().manual_seed(0))
    target = torch.arange(length)[None, :] < torch.arange(rows)[:, None]
    return {"input_ids": torch.where(target, 4, ids), "labels": torch.where(target, ids, -100)}


# -- the distance


def test_equation_the_distance_sums_over_hidden_and_averages_over_real_positions() -> None:
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert squared_distance(student, teacher).tolist() == [1 + 4, 9 + 16]
    # One row of three positions, the last of which is padding: (5 + 25) / 2.
    three = torch.stack([student[0], student[1], torch.tensor([9.0, 9.0])])[None]
    zeros = torch.stack([teacher[0], teacher[1], torch.zeros(2)])[None]
    assert squared_distance(three, zeros, torch.tensor([[1, 1, 0]])).tolist() == [15]
    assert squared_distance(three, zeros, torch.tensor([[0, 0, 0]])).tolist() == [0]


def test_equation_the_mean_is_the_tasks_plus_weight_times_the_rows_mean_distance() -> None:
    batch, model, teacher = (
        masked_batch(),
        tiny_bert(50, **TINY, generator_seed=0),
        tiny_bert(50, **TINY, generator_seed=1),
    )
    loss = SelfDistillation(teacher, TokenObjective(), weight=3.0)(model, batch)
    task, whole = TokenObjective()(model, batch), {"input_ids": unmasked(batch)["input_ids"]}
    ours, theirs = (m.bert(**whole).last_hidden_state[:, 0] for m in (model, teacher))
    expected = task.total / task.count + 3.0 * (ours - theirs).square().sum() / 6
    torch.testing.assert_close(loss.total / loss.count, expected)
    torch.testing.assert_close(loss.metrics["distance"], (ours - theirs).square().sum() / 6)


class Table(nn.Module):
    """A model whose features are its weights, one row for each row of a batch."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)


class NoTask:
    """Counts seven targets a row and wants nothing of them."""

    unit = "nothing"

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        return Loss(0 * next(model.parameters()).sum(), 7 * len(batch["row"]))


def test_oracle_the_gradient_is_twice_the_difference_over_the_batch_and_none_reaches_the_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    model, teacher = (Table(torch.randn(5, 3, generator=generator)) for _ in range(2))
    objective = SelfDistillation(teacher, NoTask(), weight=0.5, features=lambda m, batch, tokens: m.values)
    loss = objective(model, {"row": torch.arange(5)})
    (loss.total / loss.count).backward()
    torch.testing.assert_close(model.values.grad, 0.5 * 2 * (model.values - teacher.values).detach() / 5)
    assert teacher.values.grad is None
    assert not teacher.values.requires_grad


def test_degenerate_a_student_that_is_its_teacher_has_distance_zero() -> None:
    batch, model = masked_batch(), tiny_bert(50, **TINY, generator_seed=0)
    teacher = tiny_bert(50, **TINY, generator_seed=0)
    loss = SelfDistillation(teacher, TokenObjective())(model, batch)
    assert float(loss.metrics["distance"]) == 0
    assert torch.equal(loss.total, TokenObjective()(model, batch).total)


def test_degenerate_weight_zero_is_the_task_and_asks_no_teacher() -> None:
    batch, model = masked_batch(), tiny_bert(50, **TINY, generator_seed=0)
    loss = SelfDistillation(None, TokenObjective(), weight=0.0)(model, batch)
    assert torch.equal(loss.total, TokenObjective()(model, batch).total)


def test_property_the_teacher_is_frozen_unsaved_and_never_in_training_mode() -> None:
    teacher, model = tiny_bert(50, **TINY, generator_seed=1).train(), tiny_bert(50, **TINY, generator_seed=0)
    objective = SelfDistillation(teacher, TokenObjective())
    objective.train()
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert objective.state_dict() == {}
    stored = training_tensors([model, objective], torch.optim.AdamW(model.parameters()))
    assert stored
    assert all(name.startswith("model/") for name in stored)


# -- what is compared


def test_oracle_unmasking_gives_back_every_token(tiny_masked: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_masked)
    ids = np.random.default_rng(0).integers(0, len(tokenizer), (50, 40))
    masked, labels = mask_tokens(ids, np.arange(50), tokenizer, seed=0, probability=0.5)
    assert (masked != ids).mean() > 0.3
    batch = {"input_ids": torch.from_numpy(masked), "labels": torch.from_numpy(labels)}
    assert np.array_equal(unmasked(batch)["input_ids"].numpy(), ids)
    assert labels_per_row(batch).tolist() == (labels != -100).sum(1).tolist()


def test_oracle_unmasked_features_of_a_vit_mae_are_those_of_a_vit_with_its_weights() -> None:
    mae, vit = tiny_mae(), ViTModel(ViTConfig(**SHAPE, **IMAGE), add_pooling_layer=False).eval()
    vit.load_state_dict(mae.vit.state_dict())
    expected = vit(**pixels(3)).last_hidden_state
    torch.testing.assert_close(encoder_features(mae, pixels(3), "all"), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder_features(mae, pixels(3)), expected[:, 0], atol=1e-5, rtol=0)
    assert mae.config.mask_ratio == 0.75
    assert mae(**pixels(3)).mask.sum(1).tolist() == [12, 12, 12], "and it masks again afterwards"


@pytest.mark.parametrize("side", ["right", "left"])
def test_property_the_last_token_is_the_last_real_one(side: str) -> None:
    model, ids = tiny_llama(50, **TINY, generator_seed=0), torch.tensor([[7, 8, 9]])
    alone = encoder_features(model, {"input_ids": ids}, "last")
    pad, ones = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 3, dtype=torch.long)
    parts = ([ids, pad], [ones, pad]) if side == "right" else ([pad, ids], [pad, ones])
    padded = dict(zip(("input_ids", "attention_mask"), (torch.cat(part, 1) for part in parts), strict=True))
    if side == "left":
        padded["position_ids"] = torch.tensor([[0, 0, 0, 1, 2]])
    torch.testing.assert_close(encoder_features(model, padded, "last"), alone, atol=1e-5, rtol=0)


def test_oracle_features_are_the_hidden_states_after_the_last_norm() -> None:
    ids = torch.tensor([[7, 8, 9, 10]])
    llama, bert = tiny_llama(50, **TINY, generator_seed=0), tiny_bert(50, **TINY, generator_seed=0)
    for model in (llama, bert):
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(encoder_features(model, {"input_ids": ids}, "all"), hidden)
    assert torch.equal(encoder_features(bert, {"input_ids": ids}), hidden[:, 0])


@pytest.mark.parametrize("tokens", ["cls", "all"])
def test_oracle_cached_features_train_as_the_teacher_does(tokens: Any) -> None:
    student, teacher = tiny_mae(0), tiny_mae(1).train()
    kept = cache_teacher(teacher, pixels(5), tokens, batch_size=2)
    assert teacher.training, "and leaves the teacher as it was"
    gradients = []
    for objective, more in (
        (SelfDistillation(teacher, ImageReconstruction(), tokens=tokens), {}),
        (SelfDistillation(None, ImageReconstruction(), tokens=tokens), {"teacher_features": kept}),
    ):
        student.zero_grad()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            objective(student, {**pixels(5), **more}).total.backward()  # type: ignore[no-untyped-call]
        gradients.append(student.vit.embeddings.cls_token.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-5)


def test_property_the_teachers_pass_is_counted_and_the_cache_saves_it() -> None:
    student, teacher = tiny_mae(0), tiny_mae(1)
    kept = cache_teacher(teacher, pixels(4))
    objective = SelfDistillation(teacher, ImageReconstruction())
    naive = count_flops(lambda: objective(student, pixels(4)).total.backward())
    cached = count_flops(lambda: objective(student, {**pixels(4), "teacher_features": kept}).total.backward())
    assert naive - cached == count_flops(lambda: cache_teacher(teacher, pixels(4))) > 0


def test_oracle_image_reconstruction_is_the_models_own_loss() -> None:
    model, losses = tiny_mae(), []
    with torch.random.fork_rng():
        for _ in range(2):
            torch.manual_seed(0)
            losses.append(model(**pixels(4)).loss if losses else ImageReconstruction()(model, pixels(4)))
    assert int(losses[0].count) == 4 * 12
    torch.testing.assert_close(losses[0].total / losses[0].count, losses[1])


class SameImages:
    """Four images, the same in every step."""

    fingerprint, rows, tokens_per_row = "four", 4, 1

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        return {name: column[start:stop] for name, column in pixels(4).items()}


def test_learns_to_be_near_its_teacher_in_a_bare_loop_over_images(tmp_path: Path) -> None:
    apart = []
    for weight in (0.0, 1.0):
        student, teacher = tiny_mae(0), tiny_mae(1)
        before = squared_distance(encoder_features(student, pixels(4)), encoder_features(teacher, pixels(4))).mean()
        fit(
            Phase("student", student, SameImages(), SelfDistillation(teacher, ImageReconstruction(), weight=weight)),
            budget=Budget(steps=30),
            optim=OptimSpec(lr=1e-2),
            seed=0,
            directory=tmp_path / str(weight),
            settings=FitSettings(precision="fp32"),
        )
        after = squared_distance(encoder_features(student, pixels(4)), encoder_features(teacher, pixels(4))).mean()
        apart.append((after / before).item())
    assert apart[1] < 0.2 < 0.5 < apart[0]


# -- the recipe


def test_oracle_no_round_and_no_weight_are_plain_training_bit_for_bit(domain_fields: Fields, tmp_path: Path) -> None:
    fields = {**domain_fields, "eval_at": [], "replay": 0.25}
    execute(load_recipe({"method": "plain", **fields}), tmp_path / "plain")
    execute(recipe_of(fields, rounds=0), tmp_path / "no-round")
    execute(recipe_of(fields, weight=0.0, budget={"steps": 12}), tmp_path / "no-weight")  # 6 of them the student's
    execute(recipe_of(fields, budget={"steps": 12}), tmp_path / "distilled")
    assert same_weights(tmp_path / "plain", tmp_path / "no-round")
    assert same_weights(tmp_path / "plain", tmp_path / "no-weight")
    assert not same_weights(tmp_path / "plain", tmp_path / "distilled")


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        (1, {"teacher-0": 0.4, "train": 0.6}),
        (2, {"teacher-0": 0.4, "teacher-1": 0.3, "train": 0.3}),
    ],
)
def test_property_every_round_starts_where_the_teacher_started(
    domain_fields: Fields, tmp_path: Path, rounds: int, expected: dict[str, float]
) -> None:
    recipe = recipe_of(domain_fields, rounds=rounds, teacher_share=0.4)
    with Run(tmp_path / "a", recipe) as run:
        ctx = Adaptation.open(recipe, run)
        start, shares, moved = ctx.start(), {}, 0.0

        def train(phases: Generator[Phase, Trained, Adapted]) -> Adapted:
            """Every weight goes up by as many ones as there were phases before, and one."""
            nonlocal moved
            phase = next(phases)
            while True:
                assert distance_from(start, phase.model) == 0
                shares[phase.name] = pytest.approx(phase.share)
                with torch.no_grad():
                    for weight in phase.model.parameters():
                        weight += len(shares)
                moved = distance_from(start, phase.model)
                try:
                    phase = phases.send(Trained(phase.model, 1, 1, 0.0, [], [], Cost(), {}))
                except StopIteration as stop:
                    return stop.value

        left = train(recipe.phases(ctx))
    assert shares == expected
    assert distance_from(start, left.model) == moved
    distances = json.loads((tmp_path / "a" / "distance.json").read_text())
    assert distances == {name: pytest.approx(moved * (i + 1) / (rounds + 1)) for i, name in enumerate(expected)}


def run_masked(fields: Fields, tiny_masked: Path, directory: Path, **changes: Any) -> Result:
    return execute(recipe_of({**fields, "model": str(tiny_masked), **changes}), directory)


def test_property_micro_batches_give_the_gradient_of_the_whole_batch(
    domain_fields: Fields, tiny_masked: Path, tmp_path: Path
) -> None:
    for rows in (8, 3):
        settings = {"precision": "fp32", "micro_rows": rows}
        run_masked(domain_fields, tiny_masked, tmp_path / str(rows), weight=5.0, fit=settings, eval_at=[])
    one, other = weights(tmp_path / "8"), weights(tmp_path / "3")
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=2e-5, err_msg=name)


def test_learns_with_a_masked_model_and_with_adapters(domain_fields: Fields, tiny_masked: Path, tmp_path: Path) -> None:
    trained = {"budget": {"steps": 50}, "optim": {"lr": 1e-2}, "eval_at": []}
    masked = run_masked(domain_fields, tiny_masked, tmp_path / "masked", tokens="all", **trained)
    assert masked.metrics["domain/gain"] > 0.3
    fields = {**domain_fields, **trained, "optim": {"lr": 3e-2}}
    adapted = execute(recipe_of(fields, lora={"r": 4}), tmp_path / "lora")
    assert adapted.metrics["domain/gain"] > 0
    assert "last token of each block" in adapted.notes["features"]
    assert (tmp_path / "lora" / "model" / "adapter_config.json").exists()


def test_property_a_budget_in_flops_pays_for_the_teachers_passes(domain_fields: Fields, tmp_path: Path) -> None:
    fields = {**domain_fields, "budget": {"flops": 1e9}, "eval_at": []}
    plain = execute(load_recipe({"method": "plain", **fields}), tmp_path / "plain").cost
    ours = execute(recipe_of(fields), tmp_path / "ours").cost
    assert 0.9e9 < ours["flops"] <= 1.02e9
    # A student's step is its own pass, and another forward and backward plus the teacher's forward without a head.
    assert 0.5 < ours["steps"] / plain["steps"] < 0.9


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: SelfDistillation(None, TokenObjective(), weight=-1.0), r"weight must be >= 0; got -1"),
        (
            lambda: encoder_features(tiny_llama(50, **TINY, generator_seed=0), {"input_ids": torch.ones(1, 2).long()}),
            "in a causal model",
        ),
        (
            lambda: SelfDistillation(tiny_bert(50, **{**TINY, "hidden": 32}, generator_seed=0), TokenObjective())(
                tiny_bert(50, **TINY, generator_seed=0), masked_batch()
            ),
            r"got \(6, 16\) and \(6, 32\). Take a teacher of the student's hidden size",
        ),
        (
            lambda: SelfDistillation(None, TokenObjective())(tiny_bert(50, **TINY, generator_seed=0), masked_batch()),
            "no teacher and the batch has no teacher_features",
        ),
        (
            lambda: distance_from(tiny_mae(), tiny_bert(50, **TINY, generator_seed=0)),
            "is not in the start",
        ),
    ],
)
def test_rejects(build: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


def test_rejects_shares_and_weights_in_the_recipe(domain_fields: Fields) -> None:
    for name, value in (("weight", -0.1), ("rounds", -1), ("teacher_share", 1.0), ("tokens", "last")):
        with pytest.raises(ValueError, match=name):
            recipe_of(domain_fields, **{name: value})
