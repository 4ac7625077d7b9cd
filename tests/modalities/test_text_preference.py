"""Preference optimisation: the loss by hand, log-probabilities, the reference without a second copy, batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from headwater.core.lora import LoraSpec, add_lora
from headwater.modalities.text.preference import (
    DPOObjective,
    EncodedPreference,
    PreferenceStream,
    dpo_loss,
    reference_logps,
    sequence_logps,
)
from headwater.modalities.text.tiny import tiny_llama

PAIRS = [
    EncodedPreference([1, 5, 6], [7, 8, 1], [9, 1]),
    EncodedPreference([1, 4], [3, 1], [3, 3, 3, 1]),
    EncodedPreference([1, 9, 9, 9, 2], [6, 1], [5, 1]),
]


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama(12, 16, 2, 2, 32, context=32, generator_seed=0)


def test_equation_loss_of_one_pair() -> None:
    # 0.5 * [(-1 - -2) - (-4 - -3)] = 0.5 * 2 = 1; -log sigmoid(1) = log(1 + e^-1)
    loss = dpo_loss(torch.tensor([-1.0]), torch.tensor([-4.0]), torch.tensor([-2.0]), torch.tensor([-3.0]), 0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)))


def test_equation_the_reference_itself_loses_log_two() -> None:
    logp = torch.tensor([-3.0, -0.5])
    assert dpo_loss(logp, logp - 1, logp, logp - 1, 0.3).tolist() == pytest.approx([math.log(2)] * 2)


def test_property_the_gradient_raises_the_better_and_lowers_the_other() -> None:
    chosen, rejected = torch.tensor([-2.0], requires_grad=True), torch.tensor([-2.0], requires_grad=True)
    dpo_loss(chosen, rejected, torch.tensor([-2.0]), torch.tensor([-2.0]), 0.1).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    # beta * sigmoid(0) = 0.05
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-0.05, 0.05))


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_rejects_a_beta_that_is_not_positive(beta: float) -> None:
    with pytest.raises(ValueError, match="beta must be > 0"):
        dpo_loss(*[torch.zeros(1)] * 4, beta=beta)


def test_rejects_other_shapes() -> None:
    with pytest.raises(ValueError, match="one shape"):
        dpo_loss(torch.zeros(2), torch.zeros(1), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="batch, time"):
        sequence_logps(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_oracle_log_probabilities_token_by_token(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.tensor([[-100, -100, 3, 1], [2, 0, -100, -100]])
    table = logits.double().log_softmax(-1)
    # The first column has nothing before it, so it counts for nothing.
    expected = [table[0, 1, 3] + table[0, 2, 1], table[1, 0, 0]]
    assert sequence_logps(logits, labels).tolist() == pytest.approx([float(e) for e in expected], rel=1e-5)


def test_degenerate_nothing_labelled_is_zero() -> None:
    assert sequence_logps(torch.randn(1, 3, 5), torch.full((1, 3), -100)).tolist() == [0.0]


def alone(model: LlamaForCausalLM, prompt: list[int], text: list[int]) -> float:
    with torch.no_grad():
        table = model(input_ids=torch.tensor([[*prompt, *text]])).logits[0].log_softmax(-1)
    return sum(float(table[len(prompt) - 1 + place, token]) for place, token in enumerate(text))


def test_oracle_reference_of_each_text_alone(model: LlamaForCausalLM) -> None:
    expected = [[alone(model, p.prompt, p.chosen), alone(model, p.prompt, p.rejected)] for p in PAIRS]
    assert np.allclose(reference_logps(model, PAIRS, 0, batch_size=4), expected, atol=1e-5)


def test_property_adapters_do_not_enter_the_reference(model: LlamaForCausalLM) -> None:
    before = reference_logps(model, PAIRS, 0)
    adapted = add_lora(model, LoraSpec(r=2), seed=0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    assert np.array_equal(reference_logps(adapted, PAIRS, 0), before)
    stream = PreferenceStream(PAIRS, before, rows=3, seed=0, pad=0)
    assert DPOObjective()(adapted, stream.batch(0)).total.item() != pytest.approx(3 * math.log(2), abs=1e-3)


def test_degenerate_no_pair_has_an_empty_reference(model: LlamaForCausalLM) -> None:
    assert reference_logps(model, [], 0).shape == (0, 2)


def test_oracle_the_untrained_policy_loses_log_two_a_pair(model: LlamaForCausalLM) -> None:
    stream = PreferenceStream(PAIRS, reference_logps(model, PAIRS, 0), rows=3, seed=0, pad=0)
    loss = DPOObjective()(model, stream.batch(0))
    assert (loss.total.item(), loss.count) == (pytest.approx(3 * math.log(2), abs=1e-4), 3)


def test_property_parts_add_up_to_the_gradient_of_the_batch(model: LlamaForCausalLM) -> None:
    shifted = reference_logps(model, PAIRS, 0) + np.array([0.5, -1.0], dtype=np.float32)
    stream = PreferenceStream(PAIRS, shifted, rows=3, seed=0, pad=0)

    def gradient(*parts: tuple[int, int]) -> Tensor:
        model.zero_grad()
        for start, stop in parts:
            DPOObjective(0.5)(model, stream.batch(0, start, stop)).total.backward()
        grad = model.lm_head.weight.grad
        assert grad is not None
        return grad.clone()

    whole = gradient((0, 3))
    assert whole.abs().max() > 1e-3
    assert torch.allclose(whole, gradient((0, 1), (1, 3)), atol=1e-6)


def test_property_batches_hold_the_better_text_first() -> None:
    reference = np.arange(6, dtype=np.float32).reshape(3, 2)
    batch = PreferenceStream(PAIRS, reference, rows=3, seed=1, pad=0).batch(0)
    for place, row in enumerate(batch["row"].tolist()):
        for side, text in enumerate((PAIRS[row].chosen, PAIRS[row].rejected)):
            ids, labels = batch["input_ids"][place, side], batch["labels"][place, side]
            assert ids[: len(PAIRS[row].prompt) + len(text)].tolist() == [*PAIRS[row].prompt, *text]
            assert labels[labels != -100].tolist() == text
        assert batch["reference"][place].tolist() == reference[row].tolist()


def test_rejects_streams_of_nothing() -> None:
    nothing = np.zeros((0, 2), dtype=np.float32)
    with pytest.raises(ValueError, match="no pair"):
        PreferenceStream([], nothing, rows=2, seed=0, pad=0)
    with pytest.raises(ValueError, match=r"must be \(3, 2\)"):
        PreferenceStream(PAIRS, nothing, rows=2, seed=0, pad=0)
    with pytest.raises(ValueError, match="without a token"):
        PreferenceStream([EncodedPreference([1], [], [2])], np.zeros((1, 2), np.float32), rows=2, seed=0, pad=0)
