from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from headwater.modalities.text.tiny import PRESETS, tiny_bert, tiny_llama, tiny_t5
from headwater.modalities.text.tokenizers import train_bpe

MAKERS = [tiny_llama, tiny_bert, tiny_t5]


@pytest.mark.parametrize("make", MAKERS)
def test_property_weights_follow_from_the_seed_alone(make):
    torch.manual_seed(1)
    first = make(50, **PRESETS["nano"], generator_seed=7).state_dict()
    torch.manual_seed(2)
    torch.rand(3)
    second = make(50, **PRESETS["nano"], generator_seed=7).state_dict()
    other = make(50, **PRESETS["nano"], generator_seed=8).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("make", MAKERS)
def test_property_the_global_generator_is_left_alone(make):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    make(50, **PRESETS["nano"], generator_seed=7)
    assert torch.equal(torch.get_rng_state(), before)


def test_equation_parameter_count_of_the_default():
    # Embeddings 2048*128 (tied); per layer 4*128*128 attention, 3*128*344 MLP, 2*128 norms; one last norm.
    expected = 2048 * 128 + 3 * (4 * 128 * 128 + 3 * 128 * 344 + 2 * 128) + 128
    assert tiny_llama(2048, generator_seed=0).num_parameters() == expected
    assert tiny_llama(2048, tie=False, generator_seed=0).num_parameters() == expected + 2048 * 128


def test_property_special_ids_come_from_the_tokenizer():
    tokenizer = train_bpe(["a b"], 260)
    model = tiny_llama(tokenizer, **PRESETS["nano"], generator_seed=0)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (1, 0)
    assert model.config.vocab_size == len(tokenizer)


def test_property_saved_model_opens_in_transformers(tmp_path):
    model = tiny_llama(40, **PRESETS["nano"], generator_seed=0)
    model.save_pretrained(tmp_path)
    ids = torch.arange(10)[None]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_property_masked_and_span_models_run():
    ids = torch.arange(10)[None]
    assert tiny_bert(40, **PRESETS["nano"], generator_seed=0)(ids).logits.shape == (1, 10, 40)
    assert tiny_t5(40, **PRESETS["nano"], generator_seed=0)(ids, labels=ids[:, :4]).logits.shape == (1, 4, 40)


def test_rejects_heads_that_do_not_divide():
    with pytest.raises(ValueError, match=r"multiple of 2 \* heads; got hidden=20, heads=4"):
        tiny_llama(10, hidden=20, heads=4, generator_seed=0)
    for make in (tiny_bert, tiny_t5):
        with pytest.raises(ValueError, match="multiple of heads"):
            make(10, hidden=18, heads=4, generator_seed=0)
