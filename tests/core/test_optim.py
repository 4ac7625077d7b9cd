from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from headwater.core.optim import (
    AdamWSpec,
    OptimChoice,
    OptimSpec,
    SgdSpec,
    build_optimizer,
    lr_factor,
    parameter_groups,
)
from headwater.core.recipe import RecipeError, Spec, validate

SCHEDULES = ("cosine", "linear", "constant", "inverse_sqrt", "triangle")


@pytest.mark.parametrize(
    ("schedule", "progress", "factor"),
    [
        ("cosine", 0.1, 0.5),  # half-way through a warmup of 0.2
        ("cosine", 0.2, 1.0),
        ("cosine", 0.6, 0.55),  # half-way down from 1 to 0.1
        ("cosine", 1.0, 0.1),
        ("linear", 0.4, 0.1 + 0.9 * 0.75),
        ("constant", 1.0, 1.0),
        ("inverse_sqrt", 0.8, math.sqrt(0.2 / 0.8)),
        ("triangle", 0.25, 0.5),
        ("triangle", 0.5, 1.0),
        ("triangle", 0.75, 0.1 + 0.9 * 0.5),
    ],
)
def test_equation_schedules(schedule, progress, factor):
    assert lr_factor(OptimSpec(schedule=schedule, warmup=0.2, final_lr=0.1), progress) == pytest.approx(factor)


@given(st.sampled_from(SCHEDULES), st.floats(-1, 2), st.floats(0.01, 0.9), st.floats(0, 1))
def test_property_the_factor_is_between_zero_and_one(schedule, progress, warmup, final):
    assert 0 <= lr_factor(OptimSpec(schedule=schedule, warmup=warmup, final_lr=final), progress) <= 1 + 1e-12


@given(st.sampled_from(SCHEDULES), st.floats(0, 1), st.floats(0.05, 0.9))
def test_property_schedules_have_no_jumps(schedule, progress, warmup):
    spec = OptimSpec(schedule=schedule, warmup=warmup)
    slope = 25  # the steepest is the warmup of 0.05: 20 per unit
    assert abs(lr_factor(spec, progress + 1e-6) - lr_factor(spec, progress)) <= slope * 1e-6 + 1e-12


def test_property_matrices_decay_vectors_do_not_and_shared_ones_stand_once():
    model = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 5))
    model[2].weight = model[0].weight
    frozen = nn.Linear(3, 3).requires_grad_(False)
    head = nn.Linear(3, 2)
    groups = parameter_groups([model, frozen, head], OptimSpec(weight_decay=0.3))
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]
    assert [tuple(p.shape) for p in groups[0]["params"]] == [(5, 3), (2, 3)]
    assert [tuple(p.shape) for p in groups[1]["params"]] == [(3,), (3,), (5,), (2,)]


def test_property_each_module_has_its_own_rate_and_shared_parameters_the_first_ones():
    backbone, head = nn.Linear(5, 3), nn.Linear(3, 2)
    groups = parameter_groups([backbone, head, backbone], SgdSpec(lr=0.2, weight_decay=0.3), rates=(0.01, 1.0, 1.0))
    assert [(g["lr"], g["rate"], g["weight_decay"], tuple(g["params"][0].shape)) for g in groups] == [
        (0.002, 0.01, 0.3, (3, 5)),
        (0.002, 0.01, 0.0, (3,)),
        (0.2, 1.0, 0.3, (2, 3)),
        (0.2, 1.0, 0.0, (2,)),
    ]
    alike = parameter_groups([backbone, head], SgdSpec(lr=0.2))
    assert [[tuple(p.shape) for p in g["params"]] for g in alike] == [[(3, 5), (2, 3)], [(3,), (2,)]]
    with pytest.raises(ValueError, match="zip"):
        parameter_groups([backbone, head], SgdSpec(), rates=(1.0,))


@pytest.mark.parametrize("spec", [SgdSpec(lr=0.1), OptimSpec(lr=0.1), OptimSpec(lr=0.1, states="8bit")])
def test_equation_a_rate_scales_the_step(spec):
    steps = []
    for rate in (1.0, 0.25):
        layer = nn.Linear(3, 2, bias=False)
        nn.init.constant_(layer.weight, 2.0)
        optimizer = build_optimizer([layer], spec, rates=(rate,))
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        steps.append(2.0 - layer.weight.detach())
    torch.testing.assert_close(steps[1], 0.25 * steps[0], rtol=1e-3, atol=1e-6)


def test_oracle_the_first_step_is_adamw_by_hand():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 2.0)
    optimizer = build_optimizer(layer, OptimSpec(lr=0.1, weight_decay=0.5))
    layer(torch.ones(1, 1)).backward()
    optimizer.step()
    # decay 2 * (1 - 0.1 * 0.5) = 1.9; the first bias-corrected step is lr * g / (|g| + eps) = 0.1
    assert layer.weight.item() == pytest.approx(1.8, abs=1e-6)


def test_oracle_two_steps_of_sgd_with_momentum_by_hand():
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, 2.0)
    nn.init.constant_(layer.bias, 2.0)
    optimizer = build_optimizer(layer, SgdSpec(lr=0.1, momentum=0.5, weight_decay=0.5))
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.ones(1, 1)).backward()
        optimizer.step()
    # weight: g = 1 + 0.5 * 2 = 2, 2 - 0.2 = 1.8; then 0.5 * 2 + (1 + 0.5 * 1.8) = 2.9, 1.8 - 0.29 = 1.51
    assert layer.weight.item() == pytest.approx(1.51, abs=1e-6)
    # bias, not decayed: 2 - 0.1 = 1.9; then 0.5 * 1 + 1 = 1.5, 1.9 - 0.15 = 1.75
    assert layer.bias.item() == pytest.approx(1.75, abs=1e-6)


class Chosen(Spec):
    """A recipe's corner where the optimizer is chosen."""

    optim: OptimChoice = SgdSpec()


def test_property_the_choice_of_optimizer_is_by_kind_and_sgd_without_one():
    assert validate(Chosen, {"optim": {"lr": 0.5}}, where="x").optim == SgdSpec(lr=0.5)
    assert validate(Chosen, {"optim": {"kind": "adamw", "lr": 0.5}}, where="x").optim == AdamWSpec(lr=0.5)
    assert isinstance(AdamWSpec(), OptimSpec)


@pytest.mark.parametrize(
    ("optim", "words"),
    [
        ({"kind": "lion"}, "'lion' .* 'sgd', 'adamw'"),
        ({"momentun": 0.5}, "'optim.sgd.momentun'. Did you mean 'momentum'"),
        ({"kind": "adamw", "bettas": [0, 0]}, "'optim.adamw.bettas'. Did you mean 'betas'"),
        ({"kind": "adamw", "momentum": 0.9}, "'optim.adamw.momentum'. Fields here: betas, "),
    ],
)
def test_rejects_a_choice_with_the_names_of_what_was_chosen(optim, words):
    with pytest.raises(RecipeError, match=words):
        validate(Chosen, {"optim": optim}, where="x")


def test_rejects_a_model_without_anything_to_train():
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimSpec())


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", 0), ("lr", math.inf), ("betas", (0.9, 1.0)), ("eps", 0), ("weight_decay", -1), ("warmup", 1),
     ("schedule", "cosin"),
     ("final_lr", 2), ("clip", 0), ("momentum", 0.9)],
)  # fmt: skip
def test_rejects_values_outside_their_range(field, value):
    with pytest.raises(ValidationError, match=field):
        OptimSpec.model_validate({field: value})


def test_rejects_inverse_sqrt_without_warmup():
    with pytest.raises(ValidationError, match="warmup must be above 0"):
        OptimSpec(schedule="inverse_sqrt", warmup=0)


def test_property_every_field_is_described():
    assert all(field.description for field in OptimSpec.model_fields.values())
