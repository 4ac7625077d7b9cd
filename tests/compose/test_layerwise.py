"""Views, pooling and adapters of the layer-wise ensemble."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model, ViTConfig, ViTModel

from headwater.compose.layerwise import (
    LayerwiseEnsemble,
    LayerwiseObjective,
    OutputEnsemble,
    Pooled,
    SmallImages,
    cache_views,
    pool_positions,
    small_text,
    spread_layers,
    view_report,
)

SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {
    "bert": lambda: BertModel(BertConfig(vocab_size=40, **SIZES), add_pooling_layer=False),
    "llama": lambda: LlamaModel(LlamaConfig(vocab_size=40, **SIZES)),
    "qwen2": lambda: Qwen2Model(Qwen2Config(vocab_size=40, num_key_value_heads=1, **SIZES)),
}


def made(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def vit():
    return ViTModel(ViTConfig(image_size=8, patch_size=2, num_channels=1, **SIZES), add_pooling_layer=False)


def texts(rows=3, time=6):
    ids = torch.randint(1, 40, (rows, time), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:], ids[1, 4:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def ensemble(make, **options):
    small = options.pop("small", small_text(40, width=32, layers=1, positions=32))
    return made(lambda: LayerwiseEnsemble(make(), small, 5, adapter_hidden=8, **options))


def test_equation_of_the_layers_that_are_joined():
    assert spread_layers(12, 4) == (3, 6, 9, 12)
    assert spread_layers(4, 1) == (4,)
    assert spread_layers(5, 2) == (2, 5)
    assert spread_layers(4, [4, 1]) == (4, 1)
    with pytest.raises(ValueError, match="between 1 and the model's 4; got 5"):
        spread_layers(4, 5)
    for wrong in ([], [0], [5], [2, 2]):
        with pytest.raises(ValueError, match="different numbers from 1 to 4"):
            spread_layers(4, wrong)


def test_equation_of_pooling_on_either_side():
    states = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])  # padded on the right, and on the left
    assert pool_positions(states, mask, "first").tolist() == [[0, 1], [8, 9]]
    assert pool_positions(states, mask, "last").tolist() == [[2, 3], [10, 11]]
    assert pool_positions(states, mask, "mean").tolist() == [[1, 2], [9, 10]]
    assert pool_positions(states, None, "last").tolist() == [[4, 5], [10, 11]]


@pytest.mark.parametrize("kind", TEXT)
def test_property_padding_changes_nothing(kind):
    model = ensemble(TEXT[kind], layers=2)
    assert model.pool == ("mean" if kind == "bert" else "last")
    batch = texts()
    wider = {name: nn.functional.pad(values, (0, 3)) for name, values in batch.items()}
    with torch.no_grad():
        found, padded = model(**batch), model(**wider)
        alone = model(**{name: values[1:2, :4] for name, values in batch.items()})
    assert torch.allclose(found.logits, padded.logits, atol=1e-5)
    assert torch.allclose(found.logits[1], alone.logits[0], atol=1e-5)


def test_property_a_vision_transformer_is_read_at_its_class_token():
    model = ensemble(vit, layers=[4], small=SmallImages(1, 8))
    pixels = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert model.pool == "first"
    with torch.no_grad():
        expected = model.pretrained(pixel_values=pixels, output_hidden_states=True).hidden_states[4][:, 0]
        assert torch.equal(model.views(pixel_values=pixels)[:, 0], expected)


@pytest.mark.parametrize("kind", TEXT)
def test_degenerate_one_layer_and_no_small_model_is_a_head(kind):
    model = made(lambda: LayerwiseEnsemble(TEXT[kind](), None, 5, layers=1, adapter_hidden=0))
    batch = texts()
    with torch.no_grad():
        pooled = Pooled(model.pretrained)(**batch)
        assert torch.allclose(model(**batch).logits, model.adapters[0](pooled), atol=1e-6)


def test_equation_of_answers_and_loss():
    model = ensemble(TEXT["bert"], layers=2)
    batch = {**texts(), "labels": torch.tensor([0, 4, 2])}
    found = model(**texts())
    assert torch.allclose(found.logits, found.per_layer.mean(0))
    assert found.per_layer.shape == (2, 3, 5)
    losses = [nn.functional.cross_entropy(own, batch["labels"]) for own in found.per_layer]
    loss = LayerwiseObjective()(model, batch)
    assert float(loss.total / loss.count) == pytest.approx(float(sum(losses) / 2), rel=1e-6)
    both = LayerwiseObjective(averaged=0.5)(model, batch)
    whole = nn.functional.cross_entropy(found.logits, batch["labels"])
    assert float(both.total / 3) == pytest.approx(float(sum(losses) / 2 + 0.5 * whole), rel=1e-6)


def test_property_a_frozen_model_is_neither_moved_nor_put_into_training():
    model = made(lambda: LayerwiseEnsemble(_dropping(), small_text(40, width=32, layers=1, positions=32), 5, layers=2))
    before = {name: tensor.clone() for name, tensor in model.pretrained.state_dict().items()}
    model.train()
    assert not model.pretrained.training
    assert model.adapters.training
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = LayerwiseObjective()(model, {**texts(), "labels": torch.tensor([0, 4, 2])})
    loss.total.backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.pretrained.state_dict().items())
    for part in (model.small, model.adapters):
        used = [p.grad for name, p in part.named_parameters() if "position" not in name and "token_type" not in name]
        assert all(grad is not None and grad.abs().sum() > 0 for grad in used)


def _dropping():
    config = BertConfig(vocab_size=40, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5, **SIZES)
    return BertModel(config, add_pooling_layer=False)


def test_property_a_model_that_is_trained_gets_gradients():
    model = ensemble(TEXT["bert"], layers=2, train_pretrained=True).train()
    LayerwiseObjective()(model, {**texts(), "labels": torch.tensor([0, 4, 2])}).total.backward()
    assert model.pretrained.training
    assert model.pretrained.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_oracle_cached_views_are_those_computed(tmp_path: Path):
    model = ensemble(TEXT["llama"], layers=2).train()
    batch = texts()
    halves = [{name: values[rows] for name, values in batch.items()} for rows in (slice(0, 2), slice(2, 3))]
    stored = cache_views(model, halves, 3, tmp_path / "views.npy")
    assert isinstance(stored, np.memmap)
    with torch.no_grad():
        known = model(views=torch.from_numpy(np.array(stored)), **batch)
        model.eval()
        assert torch.allclose(known.logits, model(**batch).logits, atol=1e-6)
    with pytest.raises(ValueError, match="there are 3 inputs and not 4"):
        cache_views(model, halves, 4, tmp_path / "other.npy")
    with pytest.raises(ValueError, match="more than 2 inputs"):
        cache_views(model, halves, 2, tmp_path / "other.npy")
    assert not (tmp_path / "other.npy").exists()
    with pytest.raises(ValueError, match="cannot be cached"):
        cache_views(ensemble(TEXT["llama"], train_pretrained=True), halves, 3, tmp_path / "other.npy")


def test_equation_of_the_output_ensemble():
    model = made(lambda: OutputEnsemble(vit(), SmallImages(1, 8), 3))
    pixels = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        found = model(pixel_values=pixels)
        large = model.heads[0](model.members[0](pixel_values=pixels))
        small = model.heads[1](model.members[1](pixel_values=pixels))
    assert torch.allclose(found.logits, (large + small) / 2, atol=1e-6)


def test_oracle_the_report_on_views():
    model = ensemble(TEXT["bert"], layers=2)
    batch = {**texts(12), "labels": torch.arange(12) % 5}
    table = view_report(model, [batch])
    assert table["layer"].tolist() == [2, 4]
    with torch.no_grad():
        found = model(**texts(12))
        views, own = model.views(**texts(12)), model.small(**texts(12))
    for j, row in table.iterrows():
        assert row["accuracy"] == pytest.approx(
            float((found.per_layer[j].argmax(-1) == batch["labels"]).float().mean())
        )
        # The same figure by its other form, over inputs: <K, L> / |K| |L| of the centred Gram matrices.
        k, m = (x.double() - x.double().mean(0) for x in (views[:, j], own))
        K, L = k @ k.T, m @ m.T
        assert row["cka"] == pytest.approx(float((K * L).sum() / (K.norm() * L.norm())), rel=1e-6)
    same = made(lambda: LayerwiseEnsemble(TEXT["bert"](), None, 5, layers=2))
    assert view_report(same, [batch])["cka"].isna().all()


def test_rejects_what_is_no_model_of_transformers():
    with pytest.raises(ValueError, match="Linear must be a model of transformers"):
        LayerwiseEnsemble(nn.Linear(2, 2), None, 2)
