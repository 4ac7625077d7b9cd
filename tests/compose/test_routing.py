from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from peft import ArrowConfig, LoraConfig, PeftModel, create_arrow_model, get_peft_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from tests.compose.emulated import VOCABULARY, absolute_model, model, prompts
from torch import Tensor, nn

from headwater.compose.gates import arrow_prototypes
from headwater.compose.phatgoose import route
from headwater.compose.routing import (
    LowRank,
    RoutedExperts,
    RoutedLinear,
    dense_experts,
    grouped_experts,
    routing_scores,
    standardised,
    top_experts,
)
from headwater.compose.routing_files import read_experts
from headwater.modalities.models import ModelError


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(inputs: int, outputs: int, rank: int, seed: int) -> LowRank:
    return LowRank(drawn(rank, inputs, seed=seed), drawn(outputs, rank, seed=seed + 100))


def saved_adapter(base: nn.Module, directory: Path, seed: int, **config: object) -> Path:
    """An adapter with weights of its own, made and saved by PEFT alone."""
    settings = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", **config}
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(**settings))
    with torch.no_grad():
        for number, (name, parameter) in enumerate(adapted.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.2 * drawn(*parameter.shape, seed=1000 * seed + number))
    adapted.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return model("llama", 0)


@pytest.fixture(scope="module")
def adapters(base: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: saved_adapter(base, root / name, seed) for seed, name in enumerate(("a", "b", "c"))}


def vectors_of(experts: dict[str, dict[str, LowRank]]) -> dict[str, dict[str, Tensor]]:
    return {
        name: {layer: drawn(e.down.shape[1], seed=17 * n + m) for m, (layer, e) in enumerate(own.items())}
        for n, (name, own) in enumerate(experts.items())
    }


# -- the equation


def test_equation_of_scores_of_width_three():
    # u = (1, 2, 3): less 2, over sqrt(2/3): (-1, 0, 1) * sqrt(3/2). v = (0, 0, 3): less 1, over sqrt(2):
    # (-1, -1, 2) / sqrt(2). Their product: 3 * sqrt(3/2) / sqrt(2) = 3 sqrt(3) / 2; over sqrt(3): 3 / 2.
    u, v = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 0.0, 3.0]])
    assert routing_scores(u, standardised(v)).item() == pytest.approx(1.5)
    assert routing_scores(u, -v, "magnitude").item() == pytest.approx(9.0)


def test_equation_of_two_of_three_experts():
    # the best are log 6 and log 2: weights 6/8 and 2/8; at temperature 2: sqrt 6 and sqrt 2
    scores = torch.tensor([[math.log(2), -1.0, math.log(6)]])
    weights, experts = top_experts(scores, 2)
    assert experts.tolist() == [[2, 0]]
    assert weights.tolist()[0] == pytest.approx([0.75, 0.25])
    halved, _ = top_experts(scores, 2, temperature=2.0)
    assert halved[0, 0].item() == pytest.approx(math.sqrt(6) / (math.sqrt(6) + math.sqrt(2)))


# -- other routes to the same answer


@pytest.mark.parametrize("dispatch", [dense_experts, grouped_experts])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_oracle_one_token_and_expert_at_a_time(dispatch, dtype):
    inputs, down, up = drawn(50, 12), drawn(5, 3, 12, seed=1), drawn(5, 7, 3, seed=2)
    weights, experts = top_experts(drawn(50, 5, seed=3), 2)
    expected = torch.stack(
        [
            sum(weights[t, i] * up[e] @ (down[e] @ inputs[t]) for i, e in enumerate(experts[t].tolist()))
            for t in range(50)
        ]
    )
    found = dispatch(inputs.to(dtype), down.to(dtype), up.to(dtype), weights, experts)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.float(),
        expected,
        **({"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.3, "rtol": 0.03}),
    )


def test_oracle_layer_of_experts_of_many_ranks_and_one_that_is_not_there():
    # 3 ranks too many for the dense way; the second expert has nothing here
    experts = [low_rank(12, 7, 300, 0), None, low_rank(12, 7, 5, 1), low_rank(12, 7, 2, 2)]
    vectors, inputs = drawn(4, 12, seed=9), drawn(40, 12)
    layer = RoutedLinear(experts, vectors, k=2)
    scores = standardised(inputs) @ standardised(vectors).T / math.sqrt(12)
    scores[:, 1] = -math.inf
    expected = torch.zeros(40, 7)
    for t in range(40):
        best = scores[t].topk(2)
        for w, e in zip(best.values.softmax(0), best.indices.tolist(), strict=True):
            expected[t] += w * experts[e].up @ (experts[e].down @ inputs[t])
    torch.testing.assert_close(layer(inputs), expected, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(layer(inputs.view(4, 10, 12)), expected.view(4, 10, 7), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_oracle_one_expert_is_its_peft_model_whatever_its_gate(kind, tmp_path):
    inner = model("llama", 0) if kind == "llama" else absolute_model(0)
    directory = saved_adapter(
        inner, tmp_path / "a", 5, use_rslora=True, rank_pattern={"q_proj|c_fc": 3}, alpha_pattern={"o_proj": 7}
    )
    ids, mask = prompts()
    with torch.no_grad():
        expected = PeftModel.from_pretrained(copy.deepcopy(inner), directory).eval()(ids, attention_mask=mask).logits
        plain = inner(ids, attention_mask=mask).logits
        experts = read_experts(inner, {"a": directory})
        routed = RoutedExperts(inner, experts, vectors_of(experts), k=1)
        found = routed(ids, attention_mask=mask).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
        assert (found - plain).abs().max() > 0.01
        assert torch.equal(routed.detach()(ids, attention_mask=mask).logits, plain)


def test_oracle_equal_gates_and_all_experts_give_the_mean_of_the_merged_changes(base, adapters):
    ids, _ = prompts()
    experts = read_experts(base, adapters)
    merged = copy.deepcopy(base)
    modules = dict(merged.named_modules())
    with torch.no_grad():
        for layer in experts["a"]:
            modules[layer].weight += sum(own[layer].up @ own[layer].down for own in experts.values()) / 3
        expected = merged(ids).logits
        one = vectors_of({"a": experts["a"]})["a"]
        for vectors, rule in ((dict.fromkeys(experts, one), "standardised"), (None, "uniform")):
            routed = RoutedExperts(base, experts, vectors, k=3, rule=rule)
            torch.testing.assert_close(routed(ids).logits, expected, atol=2e-4, rtol=1e-4)
            routed.detach()


def test_oracle_arrow_is_pefts(base, adapters):
    ids, _ = prompts()
    arrow = create_arrow_model(
        copy.deepcopy(base), [str(path) for path in adapters.values()], ArrowConfig(top_k=2, rng_seed=3)
    ).eval()
    with torch.no_grad():
        expected = arrow(ids).logits
        routed = route(base, adapters, gates="arrow", k=2, seed=3)
        torch.testing.assert_close(routed(ids).logits, expected, atol=1e-3, rtol=1e-4)
    routed.detach()


def test_oracle_dispatch_by_magnitude_is_pefts_given_the_same_prototypes():
    experts = {name: {"layer": low_rank(12, 7, 3, n)} for n, name in enumerate("abcd")}
    prototypes = arrow_prototypes(experts, seed=1)
    config = ArrowConfig(top_k=3, router_temperature=0.7)
    config.task_adapter_names = list(experts)
    peers = ArrowLoraLinearLayer(12, config)
    peers.register_buffer("prototypes", torch.stack([prototypes[name]["layer"] for name in experts]))
    factors = [{}, {}]
    for name, own in experts.items():
        for factor, weight in zip(factors, own["layer"], strict=True):
            factor[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            factor[name].weight = nn.Parameter(weight)
    inputs = drawn(20, 12)
    expected = peers(inputs[None], *factors, nn.Identity(), dict.fromkeys(experts, 1.0))[0]
    layer = RoutedLinear(
        [own["layer"] for own in experts.values()], peers.prototypes, k=3, rule="magnitude", temperature=0.7
    )
    torch.testing.assert_close(layer(inputs), expected, atol=1e-4, rtol=1e-4)


# -- properties


def test_property_routing_does_not_see_scale_and_shift_of_inputs():
    layer = RoutedLinear([low_rank(16, 4, 2, n) for n in range(6)], drawn(6, 16), k=2)
    inputs = drawn(30, 16, seed=4)
    weights, experts = layer.choose(inputs)
    for scale, shift in ((7.0, 3.0), (1e-3, 0.0), (0.5, -20.0)):
        moved_weights, moved = layer.choose(scale * inputs + shift)
        assert torch.equal(moved, experts)
        torch.testing.assert_close(moved_weights, weights, atol=1e-3, rtol=1e-3)


def test_property_a_token_does_not_see_its_batch(base, adapters):
    experts = read_experts(base, adapters)
    routed = RoutedExperts(base, experts, vectors_of(experts), k=2)
    ids = torch.randint(VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = routed(ids).logits
        for row in range(4):
            torch.testing.assert_close(routed(ids[row : row + 1]).logits, together[row : row + 1], atol=1e-4, rtol=1e-4)
    routed.detach()


def test_property_generation_with_caches_is_that_without(base, adapters):
    experts = read_experts(base, adapters)
    routed = RoutedExperts(base, experts, vectors_of(experts), k=2)
    ids, mask = prompts()
    cached, whole = (
        routed.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=use, pad_token_id=0)
        for use in (True, False)
    )
    assert torch.equal(cached, whole)
    unrouted = routed.detach().generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert not torch.equal(cached, unrouted)


def test_property_the_record_leaves_padding_out_and_adds_up(base, adapters):
    experts = read_experts(base, adapters)
    routed = RoutedExperts(base, experts, vectors_of(experts), k=2)
    ids, mask = prompts()
    with torch.no_grad(), routed.routing() as record:
        routed(ids, attention_mask=mask)
    with torch.no_grad(), routed.routing() as alone:
        routed(ids[1:2])  # the row without padding
    routed.detach()
    assert set(record.choices) == set(experts["a"])
    assert {len(choices) for choices in record.choices.values()} == {int(mask.sum())}
    first = int(mask[0].sum())
    layer = "model.layers.0.self_attn.q_proj"
    assert torch.equal(record.choices[layer][first : first + ids.shape[1]], alone.choices[layer])
    usage = record.usage()
    assert usage[["a", "b", "c"]].sum(axis=1).tolist() == pytest.approx([1.0] * len(usage))
    assert 0 <= usage["entropy"].min() <= usage["entropy"].max() <= math.log2(3) + 1e-6
    counted = [(record.weights[layer][record.choices[layer] == e]).sum().item() / int(mask.sum()) for e in range(3)]
    assert usage.set_index("layer").loc[layer, ["a", "b", "c"]].tolist() == pytest.approx(counted)
    same = [
        float((record.choices[x][:, 0] == record.choices[y][:, 0]).float().mean())
        for i, x in enumerate(record.choices)
        for y in list(record.choices)[i + 1 :]
    ]
    assert record.agreement() == pytest.approx(sum(same) / len(same))


def test_property_bfloat16_base_keeps_its_dtype(adapters):
    inner = model("llama", 0).to(torch.bfloat16)
    experts = read_experts(inner, adapters)
    routed = RoutedExperts(inner, experts, vectors_of(experts), k=2)
    assert {linear.down.dtype for linear in routed.routed} == {torch.bfloat16}
    assert {linear.vectors.dtype for linear in routed.routed} == {torch.float32}
    assert routed(prompts()[0]).logits.dtype == torch.bfloat16


def test_property_a_copy_routes_by_itself(base, adapters):
    experts = read_experts(base, adapters)
    routed = RoutedExperts(base, experts, vectors_of(experts), k=2)
    ids, _ = prompts()
    with torch.no_grad():
        before = routed(ids).logits
        twin = copy.deepcopy(routed)
        routed.detach()
        assert torch.equal(twin(ids).logits, before)


def test_degenerate_no_token():
    for count in (2, 400):  # the dense and the grouped way
        layer = RoutedLinear([low_rank(6, 4, 2, n) for n in range(count)], drawn(count, 6), k=2)
        assert layer(torch.zeros(0, 6)).shape == (0, 4)


def test_degenerate_constant_input_is_routed_without_nan():
    layer = RoutedLinear([low_rank(6, 4, 2, n) for n in range(3)], drawn(3, 6), k=2)
    weights, _ = layer.choose(torch.full((1, 6), 2.5))
    assert weights.tolist()[0] == pytest.approx([0.5, 0.5])


# -- what is refused


def test_rejects_what_cannot_be_routed(base, adapters):
    experts = read_experts(base, adapters)
    vectors = vectors_of(experts)
    with pytest.raises(ModelError, match="got k=4 and 3 experts"):
        RoutedExperts(base, experts, vectors, k=4)
    with pytest.raises(ModelError, match="temperature must be above 0"):
        RoutedExperts(base, experts, vectors, temperature=0.0)
    with pytest.raises(ModelError, match="needs routing vectors"):
        RoutedExperts(base, experts, None)
    layer = "model.layers.1.mlp.up_proj"
    untrained = {**vectors, "b": {**vectors["b"], layer: torch.zeros(16)}}
    with pytest.raises(ModelError, match=f"gate of b untrained: at {layer}"):
        RoutedExperts(base, experts, untrained)
    with pytest.raises(ModelError, match="NaN"):
        RoutedExperts(base, experts, {**vectors, "b": {**vectors["b"], layer: torch.full((16,), math.nan)}})
    with pytest.raises(ModelError, match=f"c needs a gate of width 16 at {layer}; found none"):
        RoutedExperts(base, experts, {**vectors, "c": {n: v for n, v in vectors["c"].items() if n != layer}})
    assert not any(module._forward_hooks for module in base.modules())


def test_rejects_experts_of_other_layers_under_strict_and_passes_them_over_otherwise(base, adapters, tmp_path):
    attention = saved_adapter(base, tmp_path / "attention", 7, target_modules=["q_proj", "v_proj"])
    experts = read_experts(base, {**adapters, "attention": attention})
    vectors = vectors_of(experts)
    with pytest.raises(ModelError, match="a and attention adapt different layers"):
        RoutedExperts(base, experts, vectors, strict=True)
    routed = RoutedExperts(base, experts, vectors, k=3)
    with torch.no_grad(), routed.routing() as record:
        routed(prompts()[0])
    routed.detach()
    usage = record.usage().set_index("layer")["attention"]
    assert usage["model.layers.0.mlp.up_proj"] == 0
    assert usage["model.layers.0.self_attn.q_proj"] > 0


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True, "target_modules": ["c_fc"]}, "biases"),
        ({"bias": "lora_only"}, "biases"),
    ],
)
def test_rejects_adapters_that_are_no_plain_lora(config, words, tmp_path):
    inner = absolute_model(0)
    directory = saved_adapter(inner, tmp_path / "a", 0, **config)
    with pytest.raises(ModelError, match=rf"expert: .*{words}"):
        read_experts(inner, {"expert": directory})


def test_rejects_adapters_of_another_model(base, adapters, tmp_path):
    wide = saved_adapter(model("llama", 0, hidden=32), tmp_path / "wide", 0)
    with pytest.raises(ModelError, match=r"wide: .*shape"):
        read_experts(base, {**adapters, "wide": wide})
    other = saved_adapter(base, tmp_path / "other", 0)
    config = other / "adapter_config.json"
    config.write_text(config.read_text().replace('"base_model_name_or_path": ""', '"base_model_name_or_path": "x/y"'))
    if '"x/y"' not in config.read_text():
        config.write_text(
            config.read_text().replace('"base_model_name_or_path": null', '"base_model_name_or_path": "x/y"')
        )
    with pytest.raises(ModelError, match="other on 'x/y'; experts must share their base"):
        read_experts(base, {**adapters, "other": other})


def test_rejects_a_base_with_adapters_on_it(base, adapters):
    wrapped = PeftModel.from_pretrained(copy.deepcopy(base), adapters["a"])
    with pytest.raises(ModelError, match="has adapters on it already"):
        read_experts(wrapped, adapters)
