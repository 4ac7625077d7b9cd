import json
import logging

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.continual.toy_models import IDS, SMALL, bert, seeded
from torch import nn
from transformers import GPT2Config, GPT2Model, ViTConfig, ViTModel

from headwater.continual.pet import attentions
from headwater.continual.two_sets import BesideAttention, KvLora, PrefixSpec, TwoSets

SPECS = [KvLora(r=2), BesideAttention(width=3), PrefixSpec(num=2)]
by_kind = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)


def stirred(parameters, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data = torch.randn(parameter.shape, generator=generator) / 2


@torch.no_grad()
def hidden(model):
    return model(input_ids=IDS).last_hidden_state


@pytest.mark.parametrize("spec", SPECS[:2], ids=lambda spec: spec.kind)
def test_property_nothing_changes_at_first(spec):
    model = bert()
    plain = hidden(model)
    sets = TwoSets(model, spec, seed=0)
    assert torch.equal(hidden(model), plain)
    stirred(sets.first.values())
    assert (hidden(model) - plain).abs().max() > 1e-2


@by_kind
def test_property_only_the_modules_of_the_first_blocks_are_trained(spec):
    model = bert()
    sets = TwoSets(model, spec.model_copy(update={"blocks": 2}), seed=0)
    assert all(parameter.requires_grad for parameter in sets.first.values())
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    assert not frozen & {id(p) for p in sets.first.values()}
    count = sum(parameter.numel() for parameter in sets.first.values())
    # Per block: A, B and factor on keys and on values; two layers with biases and factor; keys, values and factor.
    assert (
        count == 2 * {"lora": 2 * (2 * 16 * 2 + 1), "adapter": 3 * 32 + 3 + 16 + 1, "prefix": 2 * 2 * 16 + 1}[spec.kind]
    )


@by_kind
def test_property_switching_shows_the_other_set_and_restores_what_requires_a_gradient(spec):
    model = bert()
    sets = TwoSets(model, spec, seed=0)
    stirred(sets.first.values())
    online = hidden(model)
    sets.add_second()
    assert len(sets.second) == len(sets.first)
    assert not any(p.requires_grad for p in sets.second.values())
    assert all(p.requires_grad for p in sets.first.values())
    with sets.using_second():
        torch.testing.assert_close(hidden(model), online)
    stirred(sets.second.values(), seed=4)
    assert torch.equal(hidden(model), online)
    next(iter(sets.first.values())).requires_grad_(False)
    wanted = [p.requires_grad for p in (*sets.first.values(), *sets.second.values())]
    with sets.using_second():
        assert (hidden(model) - online).abs().max() > 1e-2
    assert [p.requires_grad for p in (*sets.first.values(), *sets.second.values())] == wanted
    with pytest.raises(KeyError), sets.using_second():
        raise KeyError
    assert [p.requires_grad for p in (*sets.first.values(), *sets.second.values())] == wanted
    assert torch.equal(hidden(model), online)


@by_kind
def test_property_the_second_set_gets_no_gradient_and_no_weights_of_the_model_are_copied(spec):
    model = bert()
    weights = sum(p.numel() for p in model.parameters())
    sets = TwoSets(model, spec, seed=0)
    sets.add_second()
    stirred(sets.first.values())
    model(input_ids=IDS).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None for p in sets.first.values())
    assert all(p.grad is None for p in sets.second.values())
    both = 2 * sum(p.numel() for p in sets.first.values())
    assert sum(p.numel() for p in sets.adapter.parameters()) == weights + both


@by_kind
def test_property_the_seed_draws_the_weights_and_the_global_generator_stays(spec):
    before = torch.get_rng_state()
    drawn = []
    for seed in (0, 0, 1):
        sets = TwoSets(bert(), spec, seed=seed)
        sets.add_second()
        drawn.append(torch.cat([p.detach().flatten() for p in sets.first.values()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_oracle_saved_lora_opens_in_peft_with_its_factor_and_merges(tmp_path):
    model = bert()
    sets = TwoSets(model, KvLora(r=2), seed=0)
    stirred(sets.first.values())
    sets.add_second()
    stirred(sets.second.values(), seed=5)
    sets.save(tmp_path)
    with sets.using_second():
        offline = hidden(model)
    for folder, expected in (("", hidden(model)), ("offline", offline)):
        names = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert {name.rsplit(".", 2)[1] for name in names} == {"lora_A", "lora_B"}
        opened = PeftModel.from_pretrained(bert(), tmp_path / folder).eval()
        torch.testing.assert_close(hidden(opened), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(hidden(opened.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)


def test_equation_the_factor_multiplies_what_lora_adds():
    model = bert()
    layer = "encoder.layer.0.attention.self.value"
    plain = model.get_submodule(layer).weight.detach().clone()
    sets = TwoSets(model, KvLora(r=1), seed=0)
    lora = model.get_submodule(layer)
    part = {name.split(f"{layer}.")[1]: p for name, p in sets.first.items() if f"{layer}." in name}
    part["lora_A.default.weight"].data = torch.eye(1, 16)
    part["lora_B.default.parametrizations.weight.original"].data = torch.ones(16, 1)
    part["lora_B.default.parametrizations.weight.0.value"].data = torch.tensor(3.0)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    # alpha = r, so the update is 3 * (x_0, ..., x_0).
    with torch.no_grad():
        torch.testing.assert_close(lora(x) - x @ plain.T - lora.base_layer.bias, 3 * x[:, :1].expand(4, 16))


@pytest.mark.parametrize("spec", SPECS[1:], ids=lambda spec: spec.kind)
def test_property_other_modules_are_saved_by_site_in_both_folders(spec, tmp_path):
    sets = TwoSets(bert(), spec, seed=0)
    sets.add_second()
    stirred(sets.second.values())
    sets.save(tmp_path)
    first, second = (load_file(tmp_path / folder / "pet.safetensors") for folder in ("", "offline"))
    sites = [f"encoder.layer.{i}.attention.self" for i in range(3)]
    assert json.loads((tmp_path / "offline/pet.json").read_text())["sites"] == sites
    assert {name.rsplit(".", 2)[0] for name in first if "calibration" in name} == set(sites)
    for name, value in zip(first, second, strict=True):
        assert name == value
    assert [t.tolist() for t in second.values()] != [t.tolist() for t in first.values()]


def test_property_projections_are_found_by_name():
    assert attentions(bert(), 1) == {"encoder.layer.0.attention.self": ("key", "value")}
    vit = seeded(lambda: ViTModel(ViTConfig(image_size=8, patch_size=4, **SMALL)))
    assert list(attentions(vit, 2).values()) == [("k_proj", "v_proj")] * 2
    assert attentions(nn.Sequential(nn.Linear(2, 2)), 2) == {}


def gpt2():
    return seeded(lambda: GPT2Model(GPT2Config(vocab_size=16, n_positions=16, n_embd=16, n_layer=3, n_head=2)))


def test_degenerate_models_without_separate_projections_take_adapters_beside_their_blocks():
    sets = TwoSets(gpt2(), BesideAttention(blocks=2), seed=0)
    assert sets.adapter.sites == ("h.0", "h.1")
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert TwoSets(net, BesideAttention(blocks=1), seed=0).adapter.sites == ("0",)


def test_degenerate_fewer_blocks_than_asked_for_are_all_used_and_that_is_said(caplog):
    with caplog.at_level(logging.INFO, logger="headwater.continual.two_sets"):
        sets = TwoSets(bert(), BesideAttention(blocks=5), seed=0)
    assert len(sets.adapter.sites) == 3
    assert "the model has 3 blocks, fewer than the 5 asked for: all of them are used" in caplog.text


def test_rejects_lora_without_layers_for_keys_and_values():
    with pytest.raises(ValueError, match=r"GPT2Model has none \(or one layer for queries.*Use adapter"):
        TwoSets(gpt2(), KvLora(), seed=0)


def test_rejects_a_set_that_is_not_there():
    sets = TwoSets(bert(), BesideAttention(), seed=0)
    with pytest.raises(ValueError, match="no set of modules 'offline'; there is default"):
        sets.adapter.set_adapter("offline")
