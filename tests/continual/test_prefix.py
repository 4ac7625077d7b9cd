import pytest
import torch
from tests.continual.toy_models import IDS, PIXELS, SMALL, bert, hidden, seeded, vit
from torch import nn
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from headwater.continual.prefix import CompensatedPrefix, add_prefixes, compensated_attention

PADDED = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def llama(heads=2):
    sizes = {**SMALL, "num_key_value_heads": heads}
    return seeded(lambda: LlamaModel(LlamaConfig(vocab_size=16, max_position_embeddings=32, **sizes)))


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equation_one_query_by_hand():
    # d = 1, scaling 1, q = 1. Scores: tokens (0, 0), prefix (ln 2, ln 6), so the softmax is (1, 1, 2, 6) / 10.
    query = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    key, value = torch.zeros(1, 1, 2, 1, dtype=torch.float64), torch.tensor([[[[3.0], [5.0]]]], dtype=torch.float64)
    prefix_key = torch.tensor([[[2.0], [6.0]]], dtype=torch.float64).log()
    prefix_value = torch.tensor([[[8.0], [4.0]]], dtype=torch.float64)
    output = compensated_attention(query, key, value, prefix_key, prefix_value, scaling=1.0, calibration=0.5)
    # .1 * 3 + .1 * 5 for the tokens; .5 (.2 * 8 + .6 * 4) / .8 = 2.5 for the prefix.
    assert float(output) == pytest.approx(0.8 + 2.5)


def test_oracle_against_the_explicit_formula():
    query, key, value = (drawn(2, 3, 5, 4, seed=seed) for seed in range(3))
    prefix_key, prefix_value = drawn(3, 6, 4, seed=3), drawn(3, 6, 4, seed=4)
    mask = torch.tensor([True, True, True, False, True])
    output = compensated_attention(query, key, value, prefix_key, prefix_value, mask=mask, calibration=1.7)
    for b, h, t in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)):
        of_tokens = (key[b, h] @ query[b, h, t] / 2).exp() * mask
        of_prefix = (prefix_key[h] @ query[b, h, t] / 2).exp()
        whole = of_tokens.sum() + of_prefix.sum()
        share = of_prefix.sum() / whole  # lambda
        weights = of_prefix / whole / share
        torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64))
        expected = (of_tokens / whole) @ value[b, h] + 1.7 * weights @ prefix_value[h]
        torch.testing.assert_close(output[b, h, t], expected, rtol=1e-6, atol=1e-6)


def test_oracle_no_calibration_and_no_division_would_be_ordinary_prefix_tuning():
    """The two differ by lambda, and only in what the prefix adds."""
    query, key, value = (drawn(1, 2, 3, 4, seed=seed) for seed in range(3))
    prefix_key, prefix_value = drawn(2, 5, 4, seed=3), drawn(2, 5, 4, seed=4)
    ours = compensated_attention(query, key, value, prefix_key, prefix_value)
    whole = nn.functional.scaled_dot_product_attention(
        query, torch.cat((prefix_key[None], key), 2), torch.cat((prefix_value[None], value), 2)
    )
    of_tokens = compensated_attention(query, key, value, prefix_key, prefix_value, calibration=0.0)
    scores = torch.cat((query @ prefix_key.mT, query @ key.mT), -1) / 2
    share = scores.softmax(-1)[..., :5].sum(-1, keepdim=True)
    torch.testing.assert_close(share * (ours - of_tokens), whole - of_tokens, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_degenerate_a_prefix_of_length_zero_leaves_attention_as_it_is(dtype):
    query, key, value = (drawn(2, 2, 5, 4, seed=seed).to(dtype) for seed in range(3))
    none = torch.zeros(2, 0, 4, dtype=dtype)
    ours = compensated_attention(query, key, value, none, none)
    plain = nn.functional.scaled_dot_product_attention(query, key, value)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


def test_property_a_sure_token_leaves_the_prefix_its_gradient():
    query, key, value = torch.ones(1, 1, 1, 2), torch.full((1, 1, 1, 2), 30.0), torch.ones(1, 1, 1, 2)
    prefix = torch.zeros(1, 3, 2, requires_grad=True)
    compensated_attention(query, key, value, torch.zeros(1, 3, 2), prefix).sum().backward()
    torch.testing.assert_close(prefix.grad, torch.full((1, 3, 2), 1 / 3))  # lambda is e^-42 here


@pytest.mark.parametrize(
    ("build", "inputs", "site"),
    [
        (vit, {"pixel_values": PIXELS}, "layers.1.attention"),
        (bert, {"input_ids": IDS, "attention_mask": PADDED}, "encoder.layer.1.attention.self"),
        (llama, {"input_ids": IDS, "attention_mask": PADDED}, "layers.1.self_attn"),
    ],
)
def test_property_the_first_blocks_have_one_and_it_can_be_switched_off(build, inputs, site):
    model = build()
    plain = hidden(model, **inputs)
    wrapped = add_prefixes(model, num=4, blocks=2, seed=0)
    assert len(wrapped.sites) == 2
    assert wrapped.sites[1] == site
    assert set(dict(wrapped.named_parameters())) - {f"model.{n}" for n, _ in model.named_parameters()} == {
        f"sets.default.{i}.{part}" for i in range(2) for part in ("key", "value", "calibration.value")
    }
    assert (hidden(model, **inputs) - plain).abs().max() > 1e-3
    with wrapped.disable_adapter():
        assert torch.equal(hidden(model, **inputs), plain)


@pytest.mark.parametrize("build", [bert, llama])
def test_oracle_empty_prefixes_leave_a_model_with_padding_as_it_is(build):
    inputs = {"input_ids": IDS, "attention_mask": PADDED}
    plain = hidden(build(), **inputs)
    model = build()
    add_prefixes(model, num=1, blocks=3, seed=0)
    for module in model.modules():
        if hasattr(module, "compensated_prefix"):
            wrapped, index = module.compensated_prefix
            wrapped.sets["default"][index] = CompensatedPrefix(1, 16)
            wrapped.pets[index].key = nn.Parameter(torch.zeros(0, 16))
            wrapped.pets[index].value = nn.Parameter(torch.zeros(0, 16))
    shown = PADDED.bool()
    torch.testing.assert_close(hidden(model, **inputs)[shown], plain[shown], rtol=1e-5, atol=1e-5)
    whole = {"input_ids": IDS}  # without padding a causal model gets no mask
    torch.testing.assert_close(hidden(model, **whole), hidden(build(), **whole), rtol=1e-5, atol=1e-5)


def test_property_prefixes_are_trained_and_nothing_else():
    model = bert()
    wrapped = add_prefixes(model, num=2, blocks=5, seed=0)
    model(input_ids=IDS).last_hidden_state.square().sum().backward()
    moved = {name.split(".")[0] for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert moved == {"sets"}
    assert all(parameter.grad.abs().max() > 0 for parameter in wrapped.pets.parameters())


def gpt2():
    return seeded(lambda: GPT2Model(GPT2Config(vocab_size=16, n_positions=16, n_embd=16, n_layer=2, n_head=2)))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (gpt2, "GPT2Model is not one. Use adapter"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "Sequential is not one"),
        (lambda: llama(heads=1), "as many heads of keys"),
    ],
)
def test_rejects_models_whose_attention_cannot_be_reached(build, words):
    with pytest.raises(ValueError, match=words):
        add_prefixes(build(), num=2, blocks=2, seed=0)
