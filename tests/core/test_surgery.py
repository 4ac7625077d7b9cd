"""Replacing linear layers: which ones, what stays, the way back, and saving."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from headwater.core.surgery import (
    LinearView,
    NothingToDo,
    load_factored,
    replace_modules,
    save_factored,
    to_dense,
)
from headwater.modalities.text.tiny import tiny_bert, tiny_llama


class Doubled(nn.Module):
    """Half the weight, applied twice: a replacement with one parameter and one buffer of its own."""

    def __init__(self, view: LinearView, note: str = "") -> None:
        super().__init__()
        self.part = nn.Parameter(view.weight.detach() / 2)
        self.bias = None if view.bias is None else nn.Parameter(view.bias.clone())
        self.register_buffer("count", torch.tensor([7], dtype=torch.int32, device=view.weight.device))
        self.note = note

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.part + self.part, self.bias)

    def to_linear(self) -> nn.Linear:
        out_features, in_features = self.part.shape
        linear = nn.Linear(in_features, out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(2 * self.part.detach())
        linear.bias = self.bias
        return linear

    def arguments(self) -> Mapping[str, Any]:
        return {"note": self.note}


def make(name: str, view: LinearView) -> Doubled:
    return Doubled(view, name)


def llama(**changes: Any) -> LlamaForCausalLM:
    return tiny_llama(40, hidden=16, layers=2, heads=2, mlp=24, context=16, **{"generator_seed": 0, **changes})


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng(devices=[]):
        return GPT2LMHeadModel(config).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(12)[None]).logits


@pytest.mark.parametrize("build", [llama, gpt2, lambda: tiny_bert(40, hidden=16, layers=1, heads=2, generator_seed=0)])
def test_oracle_there_and_back_is_the_same_model(build: Any) -> None:
    model = build()
    before, classes = logits(model), {name: type(module) for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    replacement = replace_modules(model, make)
    assert any(isinstance(module, Doubled) for module in model.modules())
    assert torch.equal(logits(model), before), "halving and doubling are exact"
    assert to_dense(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), before)
    assert replacement.replaced


def test_property_conv1d_is_shown_out_by_in() -> None:
    seen: dict[str, tuple[int, ...]] = {}

    def look(name: str, view: LinearView) -> Doubled:
        seen[name] = (*view.weight.shape, view.out_features, view.in_features)
        return Doubled(view)

    model = gpt2()
    assert isinstance(model.transformer.h[0].attn.c_attn, Conv1D)
    replacement = replace_modules(model, look)
    assert seen["transformer.h.0.attn.c_attn"] == (48, 16, 48, 16)
    assert replacement.replaced["transformer.h.0.attn.c_attn"] == (48, 16)


def test_property_embeddings_heads_and_tied_weights_stay() -> None:
    model = llama()  # its head is tied
    weight = model.lm_head.weight
    replacement = replace_modules(model, make, exclude=())
    assert replacement.skipped == {"lm_head": "tied"}
    assert model.lm_head.weight is weight is model.model.embed_tokens.weight
    assert len(replacement.replaced) == 14, "seven in each of two layers"
    untied = replace_modules(llama(tie=False), make)
    assert untied.skipped == {"lm_head": "excluded"}


def test_equation_share_counts_parameters() -> None:
    # A layer of this Llama has 4 x 16 x 16 + 3 x 16 x 24 = 2176 weights in linears and 2 x 16 in norms; the model
    # adds 40 x 16 of embeddings and a norm of 16.
    share = replace_modules(llama(), make).share
    assert share == pytest.approx(2 * 2176 / (2 * 2176 + 2 * 32 + 640 + 16), abs=1e-12)


def test_property_targets_and_exclude_match_full_names() -> None:
    replaced = replace_modules(llama(), make, targets=["*.mlp.*"], exclude=["*.1.*"]).replaced
    assert sorted(replaced) == [f"model.layers.0.mlp.{part}_proj" for part in ("down", "gate", "up")]


@pytest.mark.parametrize("training", [True, False])
def test_property_dtype_mode_and_requires_grad_are_kept(training: bool) -> None:
    model = llama().bfloat16().train(training)
    model.requires_grad_(False)
    replace_modules(model, lambda name, view: Doubled(view).float())  # a make that thinks of none of it
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, Doubled)
    assert layer.part.dtype == torch.bfloat16
    assert layer.count.dtype == torch.int32
    assert layer.training == training
    assert not layer.part.requires_grad


def test_property_layers_are_made_in_the_order_of_their_names() -> None:
    order: list[str] = []
    replace_modules(llama(), lambda name, view: order.append(name) or Doubled(view))
    assert order == sorted(order)


def test_property_the_meta_device_needs_no_values() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(llama().config)
    replace_modules(model, make)
    assert model.model.layers[1].self_attn.q_proj.part.is_meta


def test_degenerate_declined_layers_stay_and_none_is_an_error() -> None:
    model = llama()
    replacement = replace_modules(model, lambda name, view: Doubled(view) if "q_proj" in name else None)
    assert len(replacement.replaced) == 2
    assert replacement.skipped["model.layers.0.mlp.up_proj"] == "declined"
    with pytest.raises(NothingToDo, match="no layer is left to replace"):
        replace_modules(llama(), lambda name, view: None)
    assert to_dense(untouched := llama()) is untouched


def test_rejects_globs_that_match_nothing_with_the_nearest_names() -> None:
    with pytest.raises(
        NothingToDo, match=r"like model\.layer\.0\.mlp\.up; the nearest are model\.layers\.0\.mlp\.up_proj"
    ):
        replace_modules(llama(), make, targets=["model.layer.0.mlp.up"])
    with pytest.raises(NothingToDo, match="has no linear layer"):
        replace_modules(nn.Sequential(nn.ReLU()), make)


def test_rejects_subclasses_and_adapters_by_name() -> None:
    class Special(nn.Linear):
        pass

    with pytest.raises(TypeError, match="0 is a Special"):
        replace_modules(nn.Sequential(Special(4, 4)), make)
    assert replace_modules(nn.Sequential(Special(4, 4), nn.Linear(4, 4)), make, exclude=["0"]).replaced == {"1": (4, 4)}

    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        adapted = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"q_proj has an adapter on it; merge the adapter first"):
        replace_modules(adapted, make)


def test_rejects_a_model_that_is_mostly_stacked_experts() -> None:
    class Experts(nn.Module):
        def __init__(self, experts: int) -> None:
            super().__init__()
            self.gate_up = nn.Parameter(torch.zeros(experts, 8, 8))
            self.out = nn.Linear(8, 8)

    with pytest.raises(NothingToDo, match=r"3-D parameters, .* gate_up"):
        replace_modules(Experts(4), make)
    model = Experts(1)
    model.more, model.convolution = nn.Linear(8, 8), nn.Conv1d(8, 40, 3)
    assert replace_modules(model, make).skipped == {"gate_up": "3-D parameter"}


def test_rejects_a_second_replacement() -> None:
    model = llama()
    replace_modules(model, make)
    with pytest.raises(ValueError, match="replaced before; call to_dense first"):
        replace_modules(model, make)


def test_fault_a_make_that_fails_half_way_can_be_undone() -> None:
    def failing(name: str, view: LinearView) -> Doubled:
        if name.endswith("up_proj"):
            raise ArithmeticError("on purpose")
        return Doubled(view)

    model = llama()
    before = logits(model)
    with pytest.raises(ArithmeticError, match="on purpose"):
        replace_modules(model, failing)
    with pytest.raises(RuntimeError, match="layers of this model were replaced"):
        model.save_pretrained("nowhere")
    to_dense(model)
    assert not any(isinstance(module, Doubled) for module in model.modules())
    assert torch.equal(logits(model), before)


def test_rejects_saving_as_if_nothing_were_replaced(tmp_path: Path) -> None:
    model = llama()
    before = logits(model)
    replace_modules(model, make)
    with pytest.raises(RuntimeError, match=r"Call to_dense.model. before .* or save_factored"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    to_dense(model).save_pretrained(tmp_path / "a")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "a")), before)


@pytest.mark.parametrize("build", [llama, lambda: llama(tie=False).bfloat16(), gpt2])
def test_oracle_factored_models_come_back_bit_for_bit(build: Any, tmp_path: Path) -> None:
    model = build()
    replace_modules(model, make)
    save_factored(model, tmp_path, method="doubled")
    opened = load_factored(tmp_path, lambda name, view, arguments: Doubled(view, **arguments))
    assert opened.state_dict().keys() == model.state_dict().keys()
    for name, tensor in opened.state_dict().items():
        assert tensor.dtype == model.state_dict()[name].dtype
        assert torch.equal(tensor, model.state_dict()[name])
    assert torch.equal(logits(opened), logits(model))
    assert not opened.training
    layer = next(module for module in opened.modules() if isinstance(module, Doubled))
    assert layer.note, "the layer's arguments came back"
    assert type(to_dense(opened)) is type(model)


def test_rejects_factored_directories_that_are_not_whole(tmp_path: Path) -> None:
    model = llama()
    with pytest.raises(ValueError, match="no layer of this model was replaced"):
        save_factored(model, tmp_path / "a", method="doubled")
    with pytest.raises(FileNotFoundError, match=r"no headwater.json"):
        load_factored(tmp_path, lambda name, view, arguments: Doubled(view))
    replace_modules(model, make)
    save_factored(model, tmp_path / "b", method="doubled")
    about = tmp_path / "b" / "headwater.json"
    whole = about.read_text()
    about.write_text(whole.replace('"LlamaForCausalLM"', '"pipeline"'))
    with pytest.raises(ValueError, match="no model class 'pipeline'"):
        load_factored(tmp_path / "b", lambda name, view, arguments: Doubled(view))
    about.write_text(whole)
    (tmp_path / "b" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="tensors do not fit the model"):
        load_factored(tmp_path / "b", lambda name, view, arguments: Doubled(view))
