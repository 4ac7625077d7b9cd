from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from headwater.modalities import features
from headwater.modalities.features import ArrayEncoder, Encoder, FeatureStore, extract_features, zero_shot_weights

TEXTS = ["a b", "c", "a b c d e f g", "b b b", "g f e d", "a"]
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<eos>", *"abcdefg"])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


@pytest.fixture
def bert():
    return seeded(lambda: BertModel(BertConfig(vocab_size=16, max_position_embeddings=32, **SMALL)))


@pytest.fixture
def vit():
    return seeded(lambda: ViTModel(ViTConfig(image_size=8, patch_size=4, **SMALL)))


@pytest.fixture
def vit_processor():
    return ViTImageProcessor(size={"height": 8, "width": 8})


@pytest.fixture
def clip():
    text = {**SMALL, "vocab_size": 16, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**SMALL, "image_size": 8, "patch_size": 4}
    return seeded(lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)))


def images(n):
    return list(np.random.default_rng(0).integers(0, 255, (n, 12, 10, 3), dtype=np.uint8))


@pytest.mark.parametrize("layer", [-1, 1])
def test_oracle_bert_is_the_mean_over_each_text_by_itself(bert, tokenizer, layer):
    store = extract_features(bert, TEXTS, processor=tokenizer, batch_size=4, layer=layer)
    with torch.no_grad():
        alone = [
            bert(**tokenizer(t, return_tensors="pt"), output_hidden_states=True).hidden_states[layer] for t in TEXTS
        ]
    # One text at a time there is no padding; float32 attention over padded rows differs in the last digits.
    np.testing.assert_allclose(store.X, torch.cat([h.mean(1) for h in alone]).numpy(), atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_oracle_decoder_only_models_give_the_last_token_that_is_not_padding(tokenizer, side):
    llama = seeded(lambda: LlamaForCausalLM(LlamaConfig(vocab_size=16, num_key_value_heads=2, **SMALL)))
    tokenizer.padding_side = side
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    store = extract_features(llama, TEXTS, processor=tokenizer, batch_size=3)
    with torch.no_grad():
        alone = [llama.model(tokenizer(t, return_tensors="pt").input_ids).last_hidden_state[0, -1] for t in TEXTS]
    np.testing.assert_allclose(store.X, torch.stack(alone).numpy(), atol=1e-5)


def test_oracle_vit_gives_its_pooler_output_and_without_one_its_class_token(vit, vit_processor):
    pixels = vit_processor(images(5), return_tensors="pt").pixel_values
    with torch.no_grad():
        output = vit(pixels)
    pooled = extract_features(vit, images(5), processor=vit_processor, batch_size=2)
    np.testing.assert_allclose(pooled.X, output.pooler_output.numpy(), atol=1e-5)
    vit.pooler = None
    token = extract_features(vit, images(5), processor=vit_processor, batch_size=2)
    np.testing.assert_allclose(token.X, output.last_hidden_state[:, 0].numpy(), atol=1e-5)
    mean = extract_features(vit, images(5), processor=vit_processor, pooling="mean")
    np.testing.assert_allclose(mean.X, output.last_hidden_state.mean(1).numpy(), atol=1e-5)


def test_oracle_clip_gives_the_projected_features_of_the_tower_that_the_data_call_for(clip, tokenizer, vit_processor):
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    texts = [f"{t} <eos>" for t in TEXTS]
    ours = extract_features(clip, texts, processor=tokenizer, normalize=True)
    with torch.no_grad():
        alone = [clip.get_text_features(**tokenizer(t, return_tensors="pt")).pooler_output for t in texts]
    expected = torch.nn.functional.normalize(torch.cat(alone), dim=-1)
    np.testing.assert_allclose(ours.X, expected.numpy(), atol=1e-5)
    vision = extract_features(clip, {"image": images(3)}, processor=vit_processor)
    with torch.no_grad():
        expected = clip.get_image_features(vit_processor(images(3), return_tensors="pt").pixel_values).pooler_output
    np.testing.assert_allclose(vision.X, expected.numpy(), atol=1e-5)


def test_oracle_wav2vec2_is_the_mean_over_the_frames_of_each_sound_by_itself():
    conv = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    config = Wav2Vec2Config(
        **SMALL, **conv, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, feat_extract_norm="layer"
    )
    model = seeded(lambda: Wav2Vec2Model(config))
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=False)
    rng = np.random.default_rng(0)
    sounds = [rng.normal(size=n).astype(np.float32) for n in (800, 400, 1200)]
    store = extract_features(model, sounds, processor=extractor, batch_size=3)
    with torch.no_grad():
        alone = [model(torch.from_numpy(s)[None]).last_hidden_state.mean(1) for s in sounds]
    np.testing.assert_allclose(store.X, torch.cat(alone).numpy(), atol=1e-4)
    with pytest.raises(ValueError, match="row 0 is sampled at 8000 Hz and the model reads 16000 Hz"):
        extract_features(model, [{"array": sounds[0], "sampling_rate": 8000}], processor=extractor)


def test_oracle_the_pooling_that_a_checkpoint_ships_is_used(bert, tokenizer, tmp_path):
    bert.save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    shipped = BertModel.from_pretrained(tmp_path)
    ours = extract_features(shipped, TEXTS, processor=tokenizer)
    np.testing.assert_array_equal(ours.X, extract_features(bert, TEXTS, processor=tokenizer, pooling="cls").X)


def test_equation_zero_shot_weights_average_unit_vectors_over_templates(bert, tokenizer):
    weights = zero_shot_weights(bert, tokenizer, ["a {}", "{} b b"], ["c", "d e"])
    parts = extract_features(bert, ["a c", "c b b", "a d e", "d e b b"], processor=tokenizer, normalize=True).X
    expected = np.stack([parts[:2].mean(0), parts[2:].mean(0)])
    np.testing.assert_allclose(weights, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(ValueError, match=r"every template needs a \{\}"):
        zero_shot_weights(bert, tokenizer, ["no place"], ["c"])


def test_property_batch_size_changes_nothing_and_the_model_is_left_as_it_was(bert, tokenizer):
    bert.train()
    one = extract_features(bert, TEXTS, processor=tokenizer, batch_size=1)
    all_at_once = extract_features(bert, TEXTS, processor=tokenizer, batch_size=64)
    assert bert.training
    np.testing.assert_allclose(one.X, all_at_once.X, atol=1e-5)
    assert one.fingerprint == all_at_once.fingerprint


def test_property_a_store_keeps_labels_ids_and_views_in_step(bert, tokenizer):
    data = {"text": TEXTS, "label": list("yxyxyz"), "id": list("abcdef")}
    store = extract_features(bert, data, processor=tokenizer)
    assert store.label_names == ("x", "y", "z")
    assert store.y.tolist() == [1, 0, 1, 0, 1, 2]
    view = store.subset(store.y == 1).subset([2, 0])
    assert view.ids == ("e", "a")
    assert view.base is store.base
    np.testing.assert_array_equal(view.X, store.X[[4, 0]])
    for shuffle in (False, True):
        batches = list(store.batches(4, shuffle=shuffle, seed=1))
        assert [len(X) for X, _ in batches] == [4, 2]
        rows = [int(np.flatnonzero((x == store.X).all(1))[0]) for X, _ in batches for x in X]
        assert sorted(rows) == list(range(6))
        assert np.concatenate([y for _, y in batches]).tolist() == store.y[rows].tolist()
        assert (rows == list(range(6))) is not shuffle


def test_property_kept_features_are_read_again_without_computing(bert, tokenizer, tmp_path, monkeypatch):
    first = extract_features(bert, TEXTS, processor=tokenizer, out=tmp_path / "f")
    assert isinstance(first.base, np.memmap)
    calls = []
    handle = bert.register_forward_hook(lambda *_: calls.append(1))
    again = extract_features(bert, TEXTS, processor=tokenizer, out=tmp_path / "f")
    handle.remove()
    assert calls == []
    np.testing.assert_array_equal(first.X, again.X)
    with pytest.raises(ValueError, match="holds features of another model, other options or other data"):
        extract_features(bert, TEXTS[:-1], processor=tokenizer, out=tmp_path / "f")


def test_fault_an_interrupted_extraction_goes_on_at_the_last_complete_shard(bert, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_SHARD", 2)
    whole = extract_features(bert, TEXTS, processor=tokenizer)
    calls = []

    def stop_in_the_third(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = bert.register_forward_hook(stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        extract_features(bert, TEXTS, processor=tokenizer, out=tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    resumed = extract_features(bert, TEXTS, processor=tokenizer, out=tmp_path)
    handle.remove()
    assert len(calls) == 4  # the third shard alone was computed again
    np.testing.assert_array_equal(resumed.X, whole.X)


@pytest.mark.parametrize("change", ["weights", "layer", "texts", "labels", "tokenizer"])
def test_property_the_fingerprint_tells_everything_apart_that_changes_features(bert, tokenizer, change):
    data, options = {"text": list(TEXTS), "label": [0] * 6}, {}
    before = extract_features(bert, data, processor=tokenizer).fingerprint
    if change == "weights":
        bert.pooler.dense.bias.data += 1
    elif change == "layer":
        options["layer"] = 1
    elif change == "texts":
        data["text"][:2] = ["a", "b c"]
    elif change == "labels":
        data["label"][3] = 1
    else:
        tokenizer.add_tokens(["h"])
        bert.resize_token_embeddings(16)
    assert extract_features(bert, data, processor=tokenizer, **options).fingerprint != before


def test_property_a_dataset_brings_its_label_names(bert, tokenizer):
    from datasets import ClassLabel, Dataset, Features, Value

    schema = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes", "never seen"])})
    data = Dataset.from_dict({"text": TEXTS, "label": [1, 0, 1, 0, 1, 0]}, features=schema)
    store = extract_features(bert, data, processor=tokenizer, transform=str.upper)
    assert store.label_names == ("no", "yes", "never seen")
    np.testing.assert_array_equal(store.X, extract_features(bert, [t.upper() for t in TEXTS], processor=tokenizer).X)


def test_degenerate_one_short_text(bert, tokenizer):
    store = extract_features(bert, ["a"], processor=tokenizer, dtype="float16")
    assert (store.X.shape, store.X.dtype, store.y) == ((1, 16), np.float16, None)
    assert isinstance(store, FeatureStore)


def test_rejects_bad_rows_by_their_index(bert, vit, tokenizer, vit_processor, tmp_path):
    with pytest.raises(ValueError, match="row 2 is an empty text"):
        extract_features(bert, ["a", "b", " "], processor=tokenizer)
    with pytest.raises(TypeError, match="row 1 must be a string; got int"):
        extract_features(bert, ["a", 3], processor=tokenizer)
    with pytest.raises(ValueError, match=r"row 1 must be an image of two or three axes; got shape \(4,\)"):
        extract_features(vit, [images(1)[0], np.zeros(4)], processor=vit_processor)
    with torch.no_grad():
        bert.embeddings.word_embeddings.weight[5] = torch.nan  # "c"
    with pytest.raises(ValueError, match="the feature of row 1 is not finite"):
        extract_features(bert, ["a", "c", "b"], processor=tokenizer)


def test_rejects_what_it_cannot_honour(bert, clip, vit, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no data"):
        extract_features(bert, [], processor=tokenizer)
    with pytest.raises(ValueError, match=r"one of the columns .* got \['words'\]"):
        extract_features(bert, {"words": TEXTS}, processor=tokenizer)
    with pytest.raises(ValueError, match="leave layer and pooling at their defaults"):
        extract_features(clip, TEXTS, processor=tokenizer, pooling="mean")
    with pytest.raises(ValueError, match="give processor"):
        extract_features(bert, TEXTS)
    with pytest.raises(ValueError, match="use a named function"):
        extract_features(bert, TEXTS, processor=tokenizer, transform=lambda t: t, out=tmp_path)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        next(extract_features(bert, TEXTS, processor=tokenizer).batches(0))


# The encoder by itself.


def test_property_an_encoder_passes_gradients_to_the_model_itself(bert, tokenizer):
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    encoder = Encoder(bert, tokenizer, "text")
    encoder(encoder.prepare(TEXTS)).sum().backward()
    assert bert.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0
    expected = extract_features(bert, TEXTS, processor=tokenizer)
    with torch.no_grad():
        np.testing.assert_allclose(encoder(encoder.prepare(TEXTS)).numpy(), expected.X, atol=1e-5)
    assert encoder.resolved == "mean"


def test_property_an_encoder_tells_how_an_image_became_a_vector(vit, vit_processor):
    encoder = Encoder(vit, vit_processor, "image")
    assert encoder.resolved is None
    encoder(encoder.prepare(images(2)))
    assert encoder.resolved == "pooler"
    vit.pooler = None
    encoder(encoder.prepare(images(2)))
    assert encoder.resolved == "cls"


def test_oracle_without_a_processor_inputs_are_the_models_own_tensors(vit, bert):
    pixels = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    encoder = Encoder(vit, None, "image")
    with torch.no_grad():
        torch.testing.assert_close(encoder(encoder.prepare(pixels)), vit(torch.from_numpy(pixels)).pooler_output)
        encoder = Encoder(bert, None, "text")
        short = bert(torch.tensor([[5, 6, 7]])).last_hidden_state.mean(1)
        torch.testing.assert_close(encoder(encoder.prepare([np.array([5, 6, 7, 0, 0])])), short)


def test_property_any_module_over_arrays_is_an_encoder():
    module = torch.nn.Linear(3, 2)
    encoder = ArrayEncoder(module)
    x = np.ones((4, 3))
    torch.testing.assert_close(encoder(encoder.prepare(x)), module(torch.ones(4, 3)))
    with pytest.raises(ValueError, match=r"\(batch, D\); got \(2,\)"):
        encoder(encoder.prepare(np.ones(3)))
