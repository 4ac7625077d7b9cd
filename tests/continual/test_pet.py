import json

import pytest
import torch
from safetensors.torch import load_file
from tests.continual.toy_models import PIXELS, SMALL, bert, hidden, seeded, vit
from torch import nn
from transformers import CLIPConfig, CLIPModel

from headwater.continual.pet import AdapterSpec, ParallelAdapter, Prompts, VptSpec, add_adapters, add_prompts, blocks


def clip():
    return seeded(
        lambda: CLIPModel(
            CLIPConfig(
                text_config={**SMALL, "vocab_size": 16, "max_position_embeddings": 8},
                vision_config={**SMALL, "image_size": 8, "patch_size": 4},
            )
        )
    )


def stirred(wrapped):
    """Weights as training might leave them: an adapter's output is no longer zero."""
    generator = torch.Generator().manual_seed(3)
    for parameter in wrapped.pets.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return wrapped


def test_equation_adapter_by_hand():
    adapter = ParallelAdapter(2, 2, out_features=1, scale=0.5)
    adapter.down.weight.data, adapter.down.bias.data = torch.eye(2), torch.tensor([0.0, -5.0])
    adapter.up.weight.data, adapter.up.bias.data = torch.tensor([[2.0, 3.0]]), torch.tensor([1.0])
    # relu(3, 4 - 5) = (3, 0);  0.5 (2 * 3 + 3 * 0 + 1) = 3.5
    assert adapter(torch.tensor([[3.0, 4.0]])).tolist() == [[3.5]]


def test_equation_adapter_stands_beside_a_linear_layer():
    layer = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        before = layer(torch.ones(1, 3))
        wrapped = stirred(add_adapters(layer, AdapterSpec(width=4, scale=2.0), seed=0))
        torch.testing.assert_close(wrapped(torch.ones(1, 3)), before + wrapped.pets[0](torch.ones(1, 3)))
    assert wrapped.sites == ("0",)
    assert wrapped.get_base_model() is layer


@pytest.mark.parametrize(
    ("build", "inputs", "site"),
    [
        (vit, {"pixel_values": PIXELS}, "layers.0.mlp"),
        (bert, {"input_ids": torch.arange(10).reshape(2, 5)}, "encoder.layer.0"),
    ],
)
def test_property_adapters_change_nothing_at_first_and_can_be_switched_off(build, inputs, site):
    model = build()
    plain = hidden(model, **inputs)
    wrapped = add_adapters(model, AdapterSpec(width=4), seed=0)
    assert len(wrapped.sites) == SMALL["num_hidden_layers"]
    assert wrapped.sites[0] == site
    assert torch.equal(hidden(model, **inputs), plain)
    stirred(wrapped)
    assert (hidden(model, **inputs) - plain).abs().max() > 0.01
    with wrapped.disable_adapter():
        assert torch.equal(hidden(model, **inputs), plain)
    assert (hidden(wrapped, **inputs) - plain).abs().max() > 0.01


def test_oracle_adapter_beside_the_feed_forward_part_of_a_block():
    model = vit()
    wrapped = stirred(add_adapters(model, AdapterSpec(width=4), seed=0))
    block, x = blocks(model)["layers.1"], torch.linspace(-1, 1, 2 * 5 * 16).reshape(2, 5, 16)
    with torch.no_grad(), wrapped.disable_adapter():
        attended = x + block.attention(block.layernorm_before(x))[0]
        normed = block.layernorm_after(attended)
        expected = attended + block.mlp(normed) + wrapped.pets[1](normed)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("deep", [True, False])
def test_oracle_prompts_equal_tokens_put_in_by_hand(deep):
    model = vit()
    found = list(blocks(model).values())
    with torch.no_grad():
        state = model.embeddings(PIXELS)
        wrapped = add_prompts(model, VptSpec(num=2, deep=deep), seed=0)
        vectors = [prompts.vectors.expand(2, -1, -1) for prompts in wrapped.pets]
        with wrapped.disable_adapter():
            for number, block in enumerate(found):
                if deep or number == 0:
                    state = torch.cat((state, vectors[number]), dim=1)
                state = block(state)
                if deep or number == len(found) - 1:
                    state = state[:, :-2]
            expected = model.layernorm(state)
    assert len(vectors) == (3 if deep else 1)
    torch.testing.assert_close(hidden(model, pixel_values=PIXELS), expected)


def test_property_prompts_can_be_switched_off():
    model = vit()
    plain = hidden(model, pixel_values=PIXELS)
    wrapped = add_prompts(model, VptSpec(), seed=0)
    assert (hidden(model, pixel_values=PIXELS) - plain).abs().max() > 1e-3
    with wrapped.disable_adapter():
        assert torch.equal(hidden(model, pixel_values=PIXELS), plain)


def test_property_only_the_new_modules_are_trained_and_the_switch_is_put_back_after_an_error():
    wrapped = add_prompts(vit(), VptSpec(), seed=0)
    wrapped(pixel_values=PIXELS).last_hidden_state.sum().backward()
    moved = {name for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert moved == {f"sets.default.{i}.vectors" for i in range(3)}
    with pytest.raises(KeyError), wrapped.disable_adapter():
        raise KeyError
    assert wrapped.enabled


def test_property_the_seed_draws_the_weights_and_the_global_generator_stays():
    def weights(seed):
        return add_adapters(vit(), AdapterSpec(width=4), seed=seed).pets[0].down.weight

    before = torch.random.get_rng_state()
    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    pets = add_adapters(vit(), AdapterSpec(width=4), seed=1).pets
    assert not torch.equal(pets[0].down.weight, pets[1].down.weight)


def test_property_low_precision_models_keep_their_dtype():
    model = bert().to(torch.bfloat16)
    stirred(add_adapters(model, AdapterSpec(width=4), seed=0))
    assert hidden(model, input_ids=torch.arange(5)[None]).dtype == torch.bfloat16
    assert Prompts(1, 4)(torch.zeros(1, 2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_property_saved_tensors_are_named_by_site(tmp_path):
    wrapped = stirred(add_adapters(vit(), AdapterSpec(width=4, scale=0.3, targets=("layers.[02].mlp.fc1",)), seed=0))
    wrapped.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "pet.json").read_text())
    assert about == {
        "format": 1,
        "kind": "adapter",
        "scale": 0.3,
        "sites": ["layers.0.mlp.fc1", "layers.2.mlp.fc1"],
    }
    tensors = load_file(tmp_path / "pet.safetensors")
    assert tensors["layers.2.mlp.fc1.up.weight"].shape == (24, 4)
    assert torch.equal(tensors["layers.2.mlp.fc1.down.weight"], wrapped.pets[1].down.weight)


def test_property_blocks_are_found_by_the_number_of_layers():
    assert list(blocks(bert())) == [f"encoder.layer.{i}" for i in range(3)]
    assert blocks(nn.Linear(2, 2)) == {}
    nested = nn.Module()
    nested.layers = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.ReLU(), nn.ReLU()])}) for _ in "ab"])
    assert list(blocks(nested)) == ["layers.0", "layers.1"]


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: blocks(clip()), r"text_model\S+, vision_model\S+ have 3 each. Name modules in targets"),
        (
            lambda: add_adapters(vit(), AdapterSpec(targets=("q_proj",)), seed=0),
            r"no module matches targets \['q_proj'\]",
        ),
        (lambda: add_adapters(nn.ReLU(), AdapterSpec(), seed=0), "neither blocks nor linear layers"),
        (
            lambda: add_adapters(nn.Sequential(nn.Tanh()), AdapterSpec(targets=("0",)), seed=0),
            r"width of '0' \(Tanh\); name linear layers",
        ),
        (lambda: add_prompts(bert(), VptSpec(), seed=0), "got 'bert'. Use lora or adapter"),
        (lambda: add_prompts(nn.Linear(2, 2), VptSpec(), seed=0), "got 'Linear'"),
    ],
)
def test_rejects_what_cannot_be_placed(act, words):
    with pytest.raises(ValueError, match=words):
        act()
