"""A classifier on a language model's own modules: what it computes, what it shares, and what is saved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.domain.test_architectures import CAUSAL, MASKED, saved
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from headwater.core.lora import LoraSpec
from headwater.core.recipe import ModelRef
from headwater.modalities.models import ModelError, load_model
from headwater.modalities.text.class_inputs import ClassStream, length_batches
from headwater.modalities.text.classes import class_logits
from headwater.modalities.text.heads import graft, put_head

LABELS = ("a", "b", "c")
TEXTS = ["graph node", "edge path tree flow cut graph node edge", "sum"]


def headed(home, head="causal", **changes):
    ref = ModelRef(name=str(home))
    return put_head(load_model(ref, head), ref, LABELS, max_tokens=64, seed=3, **changes)


def padded(classes, texts=TEXTS):
    ids = [torch.tensor(row) for row in classes.encode(texts)]
    batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=classes.pad)
    mask = torch.arange(batch.shape[1]) < torch.tensor([len(row) for row in ids])[:, None]
    return {"input_ids": batch, "attention_mask": mask.long()}


def test_oracle_a_decoder_is_read_at_its_last_real_token(tiny_causal):
    made = headed(tiny_causal)
    found = class_logits(made.classes.model, padded(made.classes))
    for row, ids in zip(found, made.classes.encode(TEXTS), strict=True):
        with torch.no_grad():
            hidden = made.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        torch.testing.assert_close(row, made.classes.model.score.weight @ hidden, atol=1e-6, rtol=0)


def test_oracle_an_encoder_is_read_at_its_first_token(tiny_masked):
    made = headed(tiny_masked, "masked")
    found = class_logits(made.classes.model, padded(made.classes))
    pooler, out = made.classes.model.bert.pooler.dense, made.classes.model.classifier
    for row, ids in zip(found, made.classes.encode(TEXTS), strict=True):
        with torch.no_grad():
            first = made.model.bert(input_ids=torch.tensor([ids])).last_hidden_state[0, 0]
        torch.testing.assert_close(row, out(torch.tanh(pooler(first))), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [*CAUSAL, *MASKED])
def test_oracle_what_is_saved_opens_as_the_architectures_own_classifier(name, tiny_causal, tiny_masked, tmp_path):
    kind = "causal" if name in CAUSAL else "masked"
    config, cls, home = (
        (CAUSAL[name], AutoModelForCausalLM, tiny_causal)
        if kind == "causal"
        else (MASKED[name], AutoModelForMaskedLM, tiny_masked)
    )
    made = headed(saved(config, cls, home, tmp_path / "start"), kind)
    with torch.no_grad():  # as training would, through the language model and the head
        for number, parameter in enumerate([*made.model.parameters(), *made.objective.parameters()]):
            generator = torch.Generator().manual_seed(number)
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    made.whole().save_pretrained(tmp_path / "out")
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    batch = padded(made.classes)
    assert opened.config.id2label == dict(enumerate(LABELS))
    with torch.no_grad():
        torch.testing.assert_close(
            opened(**batch).logits, class_logits(made.classes.model, batch), atol=1e-6, rtol=1e-6
        )


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_property_the_language_model_stays_one_and_the_head_owns_the_rest(kind, tiny_causal, tiny_masked):
    home = {"causal": tiny_causal, "masked": tiny_masked}[kind]
    made, before = headed(home, kind), load_model(ModelRef(name=str(home)), kind)
    assert made.model.state_dict().keys() == before.state_dict().keys()
    model, own = ({id(p) for p in module.parameters()} for module in (made.model, made.objective))
    whole = {id(p) for p in made.classes.model.parameters()}
    assert not model & own
    assert own < whole <= model | own
    backbone = {id(p) for p in made.model.base_model.parameters()}
    assert backbone <= whole


def test_property_what_the_classifier_does_not_read_is_frozen_until_it_is_thawed(tiny_masked):
    made = headed(tiny_masked, "masked")
    frozen = {name for name, p in made.model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(name.startswith("cls.") for name in frozen)
    made.thaw()
    assert all(p.requires_grad for p in made.model.parameters())


def test_oracle_adapters_are_merged_in_what_is_saved(tiny_causal, tmp_path):
    made = headed(tiny_causal, lora=LoraSpec(r=2))
    trained = [p for p in made.model.parameters() if p.requires_grad]
    assert all("lora" in name for name, p in made.model.named_parameters() if p.requires_grad)
    assert all(p.requires_grad for p in made.objective.parameters())
    with torch.no_grad():
        for number, parameter in enumerate([*trained, *made.objective.parameters()]):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    batch = padded(made.classes)
    found = class_logits(made.classes.model, batch)
    made.whole().save_pretrained(tmp_path / "out")
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(opened(**batch).logits, found, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(class_logits(made.classes.model, batch), found)  # the live one is not merged
    before = headed(tiny_causal).classes
    assert (class_logits(before.model, batch) - found).abs().max() > 1e-2


def test_property_one_seed_one_head_and_dropout_follows_the_model(tiny_masked):
    one, two = headed(tiny_masked, "masked"), headed(tiny_masked, "masked")
    for a, b in zip(one.objective.parameters(), two.objective.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    stream = ClassStream(one.classes.encode(TEXTS), np.eye(3), rows=3, pad=one.classes.pad)
    one.model.train()
    one.objective(one.model, stream.batch(0))
    assert one.classes.model.dropout.training
    one.model.eval()
    one.objective(one.model, stream.batch(0))
    assert not one.classes.model.dropout.training


def test_rejects_models_that_do_not_belong_together(tiny_causal, tiny_masked, tmp_path):
    other = saved(CAUSAL["opt"], AutoModelForCausalLM, tiny_causal, tmp_path / "opt")
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_causal, num_labels=3)
    wider = AutoModelForCausalLM.from_pretrained(tiny_causal)
    wider.resize_token_embeddings(400)
    with pytest.raises(ModelError, match=r"model.embed_tokens of the classifier has .*\(320, 16\).*\(400, 16\)"):
        graft(classifier, wider)
    with pytest.raises(ModelError, match="share no backbone"):
        graft(torch.nn.Linear(2, 2), AutoModelForCausalLM.from_pretrained(other))


def test_rejects_an_architecture_without_a_classifier(tiny_causal, tmp_path):
    from transformers import BlenderbotSmallConfig, BlenderbotSmallForCausalLM

    config = BlenderbotSmallConfig(
        d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=320
    )
    BlenderbotSmallForCausalLM(config).save_pretrained(tmp_path / "b")
    AutoTokenizer.from_pretrained(tiny_causal).save_pretrained(tmp_path / "b")
    ref = ModelRef(name=str(tmp_path / "b"))
    with pytest.raises(ModelError, match="has no sequence classifier in transformers"):
        put_head(load_model(ref, "causal"), ref, LABELS, max_tokens=8, seed=0)


def test_property_similar_lengths_together_pad_far_less_than_file_order():
    lengths = np.random.default_rng(0).lognormal(4.0, 1.0, 5_000).clip(1, 2_000).astype(int)

    def padding(batches):
        return sum(len(batch) * lengths[batch].max() for batch in batches)

    batches = length_batches(lengths, batch_tokens=8_000)
    assert sorted(np.concatenate(batches)) == list(range(5_000))
    assert all(len(batch) * lengths[batch].max() <= 8_000 for batch in batches)
    in_order = np.split(np.arange(5_000), range(64, 5_000, 64))
    assert padding(in_order) > 2.5 * padding(batches)
