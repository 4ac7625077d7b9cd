from __future__ import annotations

import pytest

from headwater.domain.training_plan import GPUS, Gpu, Shape, TrainingPlan

CARD = Gpu(flops=1e14, dollars_per_hour=2.0)


def test_equation_of_the_published_model():
    plan = TrainingPlan.from_budget(gpu=CARD, params=109e6, tokens=27e9)
    assert plan.flops == pytest.approx(1.766e19, rel=1e-3)  # 6 N D
    assert plan.hours == pytest.approx(plan.flops / (1e14 * 0.4 * 3600))
    assert plan.dollars == pytest.approx(2 * plan.hours)
    assert plan.ratio == pytest.approx(247.7, abs=0.1)
    assert plan.steps == round(27e9 / 524_288)
    attention = Shape(layers=12, width=768, seq_len=2048)
    longer = TrainingPlan.from_budget(gpu=CARD, params=109e6, tokens=27e9, shape=attention)
    assert longer.flops - plan.flops == pytest.approx(27e9 * 12 * 12 * 768 * 2048)


@pytest.mark.parametrize("shape", [None, Shape(12, 768, 2048)])
def test_property_any_unknown_follows_from_the_others(shape):
    known = TrainingPlan.from_budget(gpu=CARD, params=1e8, tokens=2e10, shape=shape)
    for budget in ({"flops": known.flops}, {"hours": known.hours}, {"dollars": known.dollars}):
        more = TrainingPlan.from_budget(gpu=CARD, params=1e8, shape=shape, **budget)
        larger = TrainingPlan.from_budget(gpu=CARD, tokens=2e10, shape=shape, **budget)
        assert more.tokens == pytest.approx(2e10, rel=1e-9)
        assert larger.params == pytest.approx(1e8, rel=1e-9)


def test_property_more_money_buys_more_tokens():
    tokens = [TrainingPlan.from_budget(gpu="A100", dollars=d, params=1e8).tokens for d in (100, 200, 400)]
    assert tokens[0] < tokens[1] < tokens[2]
    assert all(card.flops > 1e13 and card.dollars_per_hour > 0 for card in GPUS.values())


def test_rejects_plans_that_do_not_determine_anything():
    with pytest.raises(ValueError, match="must be left open; params and tokens is"):
        TrainingPlan.from_budget(gpu=CARD, flops=1e18)
    with pytest.raises(ValueError, match="nothing is"):
        TrainingPlan.from_budget(gpu=CARD, flops=1e18, params=1e8, tokens=1e9)
    with pytest.raises(ValueError, match="one budget is enough; got dollars and hours"):
        TrainingPlan.from_budget(gpu=CARD, dollars=1, hours=1, params=1e8)
    with pytest.raises(ValueError, match="no accelerator 'B52'; there are H200"):
        TrainingPlan.from_budget(gpu="B52", dollars=1, params=1e8)
    with pytest.raises(ValueError, match="mfu must be positive"):
        TrainingPlan.from_budget(gpu=CARD, dollars=1, params=1e8, mfu=0)
    with pytest.raises(ValueError, match="attention over"):
        TrainingPlan.from_budget(gpu=CARD, flops=1e15, tokens=1e12, shape=Shape(12, 768, 2048))


@pytest.mark.parametrize("shape", [None, Shape(12, 768, 2048)])
def test_rejects_a_starved_model_and_says_what_fits(shape):
    with pytest.raises(ValueError, match="The largest model that this budget trains has") as error:
        TrainingPlan.from_budget(gpu=CARD, flops=1e18, params=1e9, shape=shape)
    largest = float(str(error.value).rsplit(" ", 1)[1].rstrip("."))
    plan = TrainingPlan.from_budget(gpu=CARD, flops=1e18, params=largest * 0.99, shape=shape)
    assert 5 <= plan.ratio < 5.2
