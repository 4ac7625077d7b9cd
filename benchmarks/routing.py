"""(k) What does routing between LoRA experts cost beside one LoRA, and beside running the experts one after another?

    python -m benchmarks.routing

One linear layer of 512 to 512, 4 096 tokens, ranks of 16, float32 on one thread, no gradient. Beside one LoRA of PEFT
on the same layer: 8 experts of which each token takes 2. Beside what one would write with PEFT: all 32 experts in turn
by ``set_adapter``, their outputs blended by the routing weights; and, sharper, each expert on its own tokens only.
Routing itself is in our time and not in the peers', which are handed the weights. At several numbers of experts, the
two ways of dispatch side by side: where they cross is ``DENSE_RANKS``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.harness import Bound, alternate, report
from headwater.compose.routing import DENSE_RANKS, LowRank, RoutedLinear, dense_experts, grouped_experts

WIDTH, TOKENS, RANK, K = 512, 4096, 16, 2


def adapted(experts: int) -> tuple[nn.Module, RoutedLinear]:
    """A layer with so many LoRAs in PEFT, and the same experts as we run them."""
    torch.manual_seed(experts)
    wrapped = get_peft_model(
        nn.Sequential(nn.Linear(WIDTH, WIDTH)), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"]), "e0"
    )
    for number in range(1, experts):
        wrapped.add_adapter(f"e{number}", LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"]))
    layer = wrapped.base_model.model[0]
    for number in range(experts):
        nn.init.normal_(layer.lora_B[f"e{number}"].weight, std=0.02)
    own = [
        LowRank(layer.lora_A[f"e{e}"].weight.detach(), layer.lora_B[f"e{e}"].weight.detach()) for e in range(experts)
    ]
    return layer, RoutedLinear(own, torch.randn(experts, WIDTH), k=min(K, experts))


def by_set_adapter(layer: nn.Module, inputs: Tensor, share: Tensor) -> Tensor:
    """Every expert on every token, blended by ``share`` ``(tokens, experts)``."""
    total = torch.zeros(len(inputs), WIDTH)
    for expert in range(share.shape[1]):
        layer.set_adapter(f"e{expert}")
        total += layer(inputs) * share[:, expert, None]
    return total


def on_own_tokens(layer: nn.Module, inputs: Tensor, share: Tensor) -> Tensor:
    """Every expert, its base layer included, on the tokens that want it."""
    total = torch.zeros(len(inputs), WIDTH)
    for expert in range(share.shape[1]):
        layer.set_adapter(f"e{expert}")
        tokens = share[:, expert].nonzero()[:, 0]
        total.index_add_(0, tokens, layer(inputs[tokens]) * share[tokens, expert, None])
    return total


def check(name: str, found: Tensor, expected: Tensor) -> None:
    """Stop where two sides differ by more than rounding."""
    if not torch.allclose(found, expected, atol=1e-4, rtol=1e-4):
        raise SystemExit(f"{name} gives something else (by {float((found - expected).abs().max()):.2g})")


@torch.no_grad()
def main() -> None:
    """Ask."""
    torch.set_num_threads(1)
    inputs = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    ratios: dict[str, tuple[float, Bound]] = {}
    seconds: dict[str, float] = {}
    for experts, peers in ((8, ("one",)), (32, ("one", "loop", "own"))):
        layer, routed = adapted(experts)
        weights, chosen = routed.choose(inputs)
        share = torch.zeros(TOKENS, experts).scatter(1, chosen, weights)

        def ours(layer: nn.Module = layer, routed: RoutedLinear = routed) -> Tensor:
            return routed._add(layer, (inputs,), layer.base_layer(inputs))

        def one(layer: nn.Module = layer) -> Tensor:
            layer.set_adapter("e0")
            return layer(inputs)

        sides: dict[str, Callable[[], object]] = {"ours": ours, "one": one}
        if "loop" in peers:
            sides["loop"] = lambda layer=layer, share=share: by_set_adapter(layer, inputs, share)
            sides["own"] = lambda layer=layer, share=share: on_own_tokens(layer, inputs, share)
        check("the loop over experts", ours(), by_set_adapter(layer, inputs, share))
        check("each expert on its tokens", ours(), on_own_tokens(layer, inputs, share))
        least = alternate(sides, repeats=8, warmup=2)
        said = f"{experts} experts"
        ratios[f"{said}: routed over one LoRA"] = (
            least["ours"] / least["one"],
            Bound("lower", 1.5 if experts == 8 else None, 1.6 if experts > 8 else None),
        )
        if "loop" in peers:
            ratios[f"{said}: loop by set_adapter over routed"] = (least["loop"] / least["ours"], Bound("higher", 4.0))
            ratios[f"{said}: each expert on its own tokens over routed"] = (
                least["own"] / least["ours"],
                Bound("higher", None),
            )
        seconds |= {f"{said}: {name}": value for name, value in least.items()}
    for experts in (4, 8, 16, 32, 64):
        _, routed = adapted(experts)
        arguments = (inputs, routed.down, routed.up, *routed.choose(inputs))
        check("the grouped dispatch", grouped_experts(*arguments), dense_experts(*arguments))
        least = alternate(
            {
                "dense": lambda arguments=arguments: dense_experts(*arguments),
                "grouped": lambda arguments=arguments: grouped_experts(*arguments),
            },
            repeats=8,
        )
        ratios[f"{experts * RANK} ranks: grouped over dense"] = (
            least["grouped"] / least["dense"],
            Bound("higher", None),
        )
    report(
        "(k) routing 4 096 tokens to 2 of many LoRA experts of rank 16, one layer of 512 x 512",
        ratios,
        seconds=seconds,
        checked="all sides give the same output within 1e-4",
        notes={"dense up to so many ranks": DENSE_RANKS},
    )


if __name__ == "__main__":
    main()
