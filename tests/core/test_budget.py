from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from headwater.core.budget import Budget, Cost, Meter, UncountedFlops, analytic_flops, count_flops


def test_property_importing_budgets_imports_no_torch():
    code = (
        "import sys, headwater.core.budget; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, env={"PYTHONPATH": ":".join(sys.path)}).returncode
        == 0
    )


@pytest.mark.parametrize(
    ("given", "kind", "amount"),
    [
        ({"steps": 10}, "steps", 10),
        ({"tokens": "1_000_000"}, "tokens", 1_000_000),
        ({"tokens": "2e6"}, "tokens", 2_000_000),
        ({"flops": "1.5e15"}, "flops", 1.5e15),
        ({"seconds": 0.5}, "seconds", 0.5),
        ({}, "none", math.inf),
    ],
)
def test_equation_a_budget_reads_numbers_and_text(given, kind, amount):
    budget = Budget.model_validate(given)
    assert (budget.kind, budget.amount) == (kind, amount)
    assert Budget.model_validate_json(budget.model_dump_json()) == budget


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"steps": 1, "tokens": 5}, "exactly one of .* got steps and tokens"),
        ({"steps": 0}, "greater than 0"),
        ({"tokens": "many"}, "a number such as 2000000 or '2e6'; got 'many'"),
        ({"tokens": "1.5"}, "integer"),
        ({"steps": True}, "a budget is a number; got True"),
        ({"seconds": math.nan}, "finite"),
        ({"flops": "inf"}, "finite"),
        ({"hours": 2}, "hours"),
    ],
)
def test_rejects_a_budget_that_is_not_one_positive_amount(given, words):
    with pytest.raises(ValidationError, match=words):
        Budget.model_validate(given)


def test_equation_shares_round_down_and_survive_binary_fractions():
    assert Budget(tokens=100).scaled(0.29) == Budget(tokens=29)  # 100 * 0.29 is 28.999999999999996
    assert Budget(steps=10).scaled(0.55) == Budget(steps=5)
    assert Budget(flops=10.0).scaled(0.25) == Budget(flops=2.5)
    assert Budget.none().scaled(0.5) == Budget.none()


@pytest.mark.parametrize("share", [0.0, 1.1, -0.5])
def test_rejects_a_share_outside_the_unit_interval(share):
    with pytest.raises(ValueError, match="share must be in"):
        Budget(steps=10).scaled(share)


def test_rejects_a_part_of_less_than_one_step():
    with pytest.raises(ValueError, match=r"0\.1 of 5 steps is less than one"):
        Budget(steps=5).scaled(0.1)


def test_equation_costs_add_and_peaks_take_the_larger():
    total = Cost(steps=1, tokens=10, peak_bytes=5, trainable=7) + Cost(steps=2, flops=1.5, peak_bytes=3, trainable=9)
    assert total == Cost(steps=3, tokens=10, flops=1.5, peak_bytes=5, trainable=9)


def test_degenerate_unknown_flops_stay_unknown_and_become_null_in_json():
    total = Cost(flops=math.nan) + Cost(flops=5.0)
    assert math.isnan(total.flops)
    assert total.to_dict()["flops"] is None
    assert math.isnan(Cost.from_dict(total.to_dict()).flops)


def test_property_a_meter_charges_time_also_when_the_block_raises():
    meter = Meter()
    meter.add(tokens=3)
    meter.add(Cost(labels=2))
    with pytest.raises(KeyError), meter.timed():
        raise KeyError
    cost = meter.cost
    assert (cost.tokens, cost.labels) == (3, 2)
    assert cost.seconds > 0


def test_property_peak_bytes_see_an_allocation_and_forget_what_was_before():
    block = torch.ones(300_000_000, dtype=torch.uint8)
    with_block = Meter().cost.peak_bytes
    del block
    meter = Meter()  # the freed block is no longer in its peak
    assert meter.cost.peak_bytes < with_block - 200_000_000
    torch.ones(300_000_000, dtype=torch.uint8)
    assert meter.cost.peak_bytes > with_block - 100_000_000


def test_equation_a_linear_layer_forward_and_backward():
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    # forward 2*5*4*3, gradient of the weights the same; none for the input, which needs no gradient
    assert count_flops(lambda: layer(x).sum().backward()) == 2 * 120


def test_equation_attention_on_a_cpu_is_counted():
    q = torch.randn(2, 3, 8, 4, requires_grad=True)
    forward = 2 * (2 * 2 * 3 * 8 * 8 * 4)  # two products, 2 flops, batch 2, heads 3, 8 x 8 scores, 4 dimensions
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == forward
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward()) == 3 * forward


def test_equation_products_with_vectors_are_counted():
    matrix, vector = torch.randn(3, 4), torch.randn(4)
    assert count_flops(lambda: matrix @ vector) == 24
    assert count_flops(lambda: vector @ vector) == 8


def test_oracle_the_formula_agrees_with_the_count_of_a_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    model, ids = LlamaForCausalLM(config), torch.zeros(2, 16, dtype=torch.long)
    counted = count_flops(lambda: model(ids, use_cache=False).logits.sum().backward())
    formula = analytic_flops(sum(p.numel() for p in model.parameters()), ids.numel(), 2, 32, 16)
    assert counted == pytest.approx(formula, rel=0.02)  # norms are counted as parameters and are no products


def test_rejects_an_lstm_by_name():
    layer = nn.LSTM(4, 4)
    with pytest.raises(UncountedFlops, match=r"rnn_layer|lstm"):
        count_flops(lambda: layer(torch.randn(3, 2, 4))[0].sum().backward())


def test_rejects_a_sparse_product_by_name():
    sparse, weight = torch.eye(4).to_sparse(), torch.randn(4, 4, requires_grad=True)
    with pytest.raises(UncountedFlops, match="sparse"):
        count_flops(lambda: torch.sparse.mm(sparse, weight).sum().backward())


def test_degenerate_elementwise_work_counts_nothing():
    assert count_flops(lambda: torch.randn(3).exp().norm()) == 0
