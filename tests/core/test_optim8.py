"""Eight-bit moments: the codes, rounding, and steps beside float32's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headwater.core.optim8 import BLOCK, AdamW8bit, dequantize, dynamic_codes, quantize


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(optimizer_class: type[torch.optim.Optimizer], steps: int = 30, **settings: object) -> nn.Parameter:
    """A least-squares problem of 128 x 64 with gradients of very different sizes by row."""
    weight = nn.Parameter(normal(128, 64))
    target, sizes = normal(128, 64, seed=1), torch.logspace(-3, 0, 128)[:, None]
    optimizer = optimizer_class([weight], **settings)  # type: ignore[arg-type]
    for _ in range(steps):
        optimizer.zero_grad()
        (sizes * (weight - target)).square().sum().backward()
        optimizer.step()
    return weight


@pytest.mark.parametrize("signed", [True, False])
def test_equation_the_codes_are_256_decades_on_decades(signed: bool) -> None:
    codes = dynamic_codes(signed)
    assert len(codes) == len(codes.unique()) == 256
    assert codes[-1] == 1
    assert (codes == 0).sum() == 1
    assert torch.equal(codes, codes.sort().values)
    # The top decade [0.1, 1] has 64 middles a sign, or 128 without one; the first is half a step above 0.1.
    top = codes[(codes > 0.1) & (codes < 1)]
    assert len(top) == (64 if signed else 128)
    assert top[0].item() == pytest.approx(0.1 + 0.9 / (128 if signed else 256), rel=1e-6)
    # The lowest decade has one code (two without a sign): the middle of [1e-7, 1e-6].
    assert codes[codes > 0][0].item() == pytest.approx(5.5e-7 if signed else 3.25e-7, rel=1e-5)


@pytest.mark.parametrize("signed", [True, False])
def test_oracle_rounding_is_to_the_nearest_code(signed: bool) -> None:
    values = normal(3, 200) if signed else normal(3, 200).square() + 1e-4  # far from what is kept from 0
    codes, largest = quantize(values, signed=signed)
    table = dynamic_codes(signed)
    for block in range(-(-values.numel() // BLOCK)):
        part = values.flatten()[block * BLOCK : (block + 1) * BLOCK]
        assert largest[block] == part.abs().max()
        scaled = part / largest[block]
        off = (table[codes[block * BLOCK : (block + 1) * BLOCK].long()] - scaled).abs()
        least = (scaled[:, None] - table[None]).abs().min(1).values
        assert torch.allclose(off, least, rtol=0, atol=1e-7), "a tie may go either way"


def test_property_rounding_twice_is_rounding_once() -> None:
    once = dequantize(*quantize(normal(1000), signed=True), torch.Size([1000]), signed=True)
    twice = dequantize(*quantize(once, signed=True), torch.Size([1000]), signed=True)
    assert torch.equal(once, twice)


def test_property_a_positive_second_moment_is_never_stored_as_zero() -> None:
    values = torch.tensor([1.0, 1e-12, 0.0])
    back = dequantize(*quantize(values, signed=False), values.shape, signed=False)
    assert back[1] > 0
    assert back[2] == 0
    # An embedding row that was seen once, beside rows that are seen often: without the guard it flies off.
    weight = nn.Parameter(torch.zeros(4096))
    optimizer = AdamW8bit([weight], lr=1e-3, weight_decay=0)
    for step in range(5):
        weight.grad = torch.ones(4096)
        weight.grad[0] = 1e-5 if step == 0 else 0.0
        optimizer.step()
    assert weight.abs().max() < 0.01, "five steps of at most about the learning rate each"


def test_oracle_steps_stay_near_float32s() -> None:
    settings = {"lr": 0.05, "weight_decay": 0.01}
    exact, near = trained(torch.optim.AdamW, **settings), trained(AdamW8bit, **settings)
    moved = (exact - normal(128, 64)).norm()
    assert (near - exact).norm() < 0.05 * moved, "the codes are 1 % wide where most of the moments are"


def test_oracle_small_parameters_follow_torchs_adamw() -> None:
    settings = {"lr": 0.05, "weight_decay": 0.1, "betas": (0.8, 0.95)}
    exact, same = trained(torch.optim.AdamW, **settings), trained(AdamW8bit, **settings, min_size=10**6)
    assert torch.allclose(exact, same, rtol=1e-5, atol=1e-6)


def test_equation_one_byte_and_a_sixty_fourth_a_number_and_moment() -> None:
    weight = nn.Parameter(normal(128, 64))
    weight.grad = torch.ones_like(weight)
    optimizer = AdamW8bit([weight])
    optimizer.step()
    state = optimizer.state[weight]
    size = sum(t.numel() * t.element_size() for name, t in state.items() if name != "step")
    assert size == 2 * (8192 + 4 * 8192 // 256)


def test_fault_a_restored_state_goes_on_bit_for_bit() -> None:
    def step(weight: nn.Parameter, optimizer: AdamW8bit, number: int) -> None:
        weight.grad = normal(80, 80, seed=number)
        optimizer.step()

    first = nn.Parameter(normal(80, 80))
    one = AdamW8bit([first])
    for number in range(3):
        step(first, one, number)
    second = nn.Parameter(first.detach().clone())
    two = AdamW8bit([second])
    two.load_state_dict(one.state_dict())
    assert two.state[second]["first_codes"].dtype == torch.uint8
    for number in range(3, 6):
        step(first, one, number)
        step(second, two, number)
    assert torch.equal(first, second)


def test_degenerate_parameters_without_a_gradient_or_with_zero_stay() -> None:
    idle, still = nn.Parameter(normal(70, 70)), nn.Parameter(normal(70, 70))
    still.grad = torch.zeros_like(still)
    before = still.detach().clone()
    optimizer = AdamW8bit([idle, still], weight_decay=0)
    optimizer.step()
    optimizer.step()
    assert not optimizer.state[idle]
    assert torch.equal(still, before)


def test_property_bfloat16_weights_move_in_bfloat16() -> None:
    weight = nn.Parameter(normal(80, 80).bfloat16())
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    AdamW8bit([weight], lr=0.1).step()
    assert weight.dtype == torch.bfloat16
    assert not torch.equal(weight, before)


@pytest.mark.parametrize(
    "wrong", [{"lr": -1}, {"betas": (0.9, 1.0)}, {"eps": 0}, {"weight_decay": -1}, {"min_size": -1}]
)
def test_rejects_settings_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="need lr >= 0"):
        AdamW8bit([nn.Parameter(torch.zeros(2))], **wrong)  # type: ignore[arg-type]


def test_rejects_sparse_gradients() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="takes dense gradients"):
        AdamW8bit(table.parameters()).step()
