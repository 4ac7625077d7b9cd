import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    ConvNextConfig,
    ConvNextImageProcessorPil,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from headwater.adapt.base import AdaptTask
from headwater.adapt.data import encode_task, read_task
from headwater.adapt.gda import GDA, ZeroShot
from headwater.adapt.gram import Gram
from headwater.adapt.references import SklearnHead
from headwater.core.recipe import DataRef, ModelRef, RecipeError
from headwater.core.run import Run, execute
from headwater.modalities.features import extract_features, zero_shot_weights
from headwater.modalities.models import ModelError
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.tokenizers import train_bpe
from headwater.modalities.vision.labelled import decode_image, encode_images

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PATCHES = {"image_size": 16, "patch_size": 8}


def picture(colour, seed, form="PNG"):
    pixels = np.clip(np.array(COLOURS[colour]) + np.random.default_rng(seed).normal(0, 25, (16, 16, 3)), 0, 255)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, form)
    return file.getvalue()


def write_folder(root, per_class, seed):
    for number, colour in enumerate(COLOURS):
        (root / colour).mkdir(parents=True)
        for i in range(per_class):
            (root / colour / f"{i}.png").write_bytes(picture(colour, [seed, number, i]))
    return DataRef(name=str(root))


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
    counts = {"train": 8, "test": 6, "validation": 2, "shifted": 3}
    return {name: write_folder(tmp_path / name, count, seed) for seed, (name, count) in enumerate(counts.items())}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Directories of small encoders with random weights, each with its image processor; of CLIP, a tokenizer too."""
    root = tmp_path_factory.mktemp("encoders")
    tokenizer = train_bpe([f"a {name} picture" for name in COLOURS] * 5, 300)
    square = ViTImageProcessorPil(size={"height": 16, "width": 16})
    text = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    clip = CLIPConfig(text_config=text, vision_config={**SIZES, **PATCHES}, projection_dim=8)
    convolutional = ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1])
    cropped = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = {
            "vit": (ViTModel(ViTConfig(**SIZES, **PATCHES)), square),
            "dinov2": (Dinov2Model(Dinov2Config(**SIZES, **PATCHES)), square),
            "clip": (CLIPModel(clip), cropped),
            "convnext": (ConvNextModel(convolutional), ConvNextImageProcessorPil(size={"shortest_edge": 16})),
        }
    for name, (model, processor) in made.items():
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    tokenizer.save_pretrained(root / "clip")
    return {name: ModelRef(name=str(root / name)) for name in made}


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip", "convnext"])
def test_learns_a_folder_of_images_with_any_encoder(tmp_path, pictures, encoders, name):
    recipe = SklearnHead(
        modality="image",
        model=encoders[name],
        train=pictures["train"],
        test=pictures["test"],
        validation=pictures["validation"],
        ood={"shifted": pictures["shifted"]},
        shots=5,
    )
    result = execute(recipe, tmp_path / "run")
    assert result.metrics["id/accuracy"] > 0.8  # chance is 1/3
    assert result.metrics["ood/shifted/accuracy"] > 0.8
    assert result.cost["labels"] == 15
    assert result.metrics["cost/features_seconds"] > 0
    head = json.loads((tmp_path / "run" / "model" / "head.json").read_text())
    assert (head["labels"], head["modality"]) == (sorted(COLOURS), "image")
    readme = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "each image as the checkpoint's image processor makes it" in readme
    assert "token of a decoder" not in readme


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_oracle_features_are_those_of_the_encoder(pictures, encoders, name):
    data = read_task(pictures["train"], pictures["test"], modality="image")
    encoded = encode_task(data, encoders[name], modality="image")
    recipe = SklearnHead(modality="image", model=encoders[name], train=pictures["train"], test=pictures["test"])
    model, processor = AdaptTask(data, data.train, recipe).encoder()
    direct = extract_features(model, [decode_image(i) for i in data.test.inputs], processor=processor, modality="image")
    unit = direct.X / np.linalg.norm(direct.X, axis=1, keepdims=True)
    np.testing.assert_allclose(encoded.test.inputs, unit, atol=1e-5)
    np.testing.assert_array_equal(encoded.test.labels, data.test.labels)
    plain = encode_task(data, encoders[name], modality="image", normalize=False)
    np.testing.assert_allclose(plain.test.inputs, direct.X, atol=1e-5)
    assert len({data.fingerprint, encoded.fingerprint, plain.fingerprint}) == 3


def test_oracle_parquet_of_datasets_reads_as_the_folder(tmp_path, pictures):
    folder = read_task(pictures["train"], pictures["test"], modality="image")
    rows = [(path.read_bytes(), path.parent.name) for path in sorted((tmp_path / "train").rglob("*.png"))]
    features = Features({"picture": ImageFeature(), "kind": ClassLabel(names=sorted(COLOURS))})
    columns = {"picture": [{"bytes": data, "path": None} for data, _ in rows], "kind": [kind for _, kind in rows]}
    file = tmp_path / "train.parquet"
    Dataset.from_dict(columns, features=features).to_parquet(file)
    # A Parquet file read by itself has class numbers, so the test set is given the same way.
    ref = DataRef(name=str(file), input_field="picture", label_field="kind")
    held = [(picture(name, [9, code]), str(code)) for code, name in enumerate(sorted(COLOURS))]
    test = tmp_path / "test.parquet"
    Dataset.from_dict({"picture": [x for x, _ in held], "kind": [y for _, y in held]}).to_parquet(test)
    got = read_task(ref, ref.model_copy(update={"name": str(test)}), modality="image")
    assert got.train.inputs.tolist() == folder.train.inputs.tolist()
    np.testing.assert_array_equal(got.train.labels, folder.train.labels)


def test_property_a_training_image_with_the_pixels_of_a_held_out_one_is_dropped_and_counted(tmp_path, pictures):
    held = decode_image((tmp_path / "test" / "red" / "0.png").read_bytes())
    held.save(tmp_path / "train" / "red" / "again.bmp")  # another file, the same picture
    held.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "train" / "red" / "turned.png")
    data = read_task(pictures["train"], pictures["test"], modality="image")
    assert (data.dropped_overlap, len(data.train)) == (1, 3 * 8 + 1)
    assert held.tobytes() not in [decode_image(image).tobytes() for image in data.train.inputs]
    before = read_task(pictures["train"], pictures["shifted"], modality="image")
    assert before.dropped_overlap == 0


def test_oracle_descriptions_classify_images_through_a_dual_encoder(tmp_path, pictures, encoders):
    shared = {"modality": "image", "model": encoders["clip"], "train": pictures["train"], "test": pictures["test"]}
    described = {name: f"{name} picture" for name in COLOURS}
    recipe = GDA(**shared, label_texts=described, zero_shot=ZeroShot(alpha=0.0))
    result = execute(recipe, tmp_path / "run")
    data = read_task(pictures["train"], pictures["test"], label_texts=described, modality="image")
    model, processor = AdaptTask(data, data.train, recipe).encoder()
    weights = zero_shot_weights(model, processor.tokenizer, ["{}"], data.label_texts)
    images = [decode_image(image) for image in data.test.inputs]
    features = extract_features(model, images, processor=processor.image_processor, modality="image", normalize=True)
    answers = (features.X @ weights.T).argmax(1)
    assert result.metrics["id/accuracy"] == (answers == data.test.labels).mean()
    assert len({tuple(row) for row in weights.round(6).tolist()}) == 3


def test_learns_gaussian_discriminant_analysis_on_images(tmp_path, pictures, encoders):
    shared = {"modality": "image", "model": encoders["vit"], "train": pictures["train"], "test": pictures["test"]}
    assert execute(GDA(**shared), tmp_path / "run").metrics["id/accuracy"] > 0.8
    assert load_file(tmp_path / "run" / "model" / "head.safetensors")["weight"].shape == (3, 16)


def test_rejects_descriptions_where_the_model_reads_no_text(tmp_path, pictures, encoders):
    shared = {"modality": "image", "model": encoders["vit"], "train": pictures["train"], "test": pictures["test"]}
    with pytest.raises(ValueError, match="ViTModel reads images and no texts"):
        execute(GDA(**shared, zero_shot=ZeroShot()), tmp_path / "run")


def test_rejects_images_whose_label_training_does_not_have(tmp_path, pictures):
    (tmp_path / "test" / "black").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "test" / "black" / "0.png")
    with pytest.raises(CorpusError, match="test: no training image has the label 'black'"):
        read_task(pictures["train"], pictures["test"], modality="image")


def test_rejects_the_builtin_texts_as_images():
    with pytest.raises(RecipeError, match="holds texts; name labelled images in `train` and `test`"):
        SklearnHead(modality="image", model=ModelRef(name="m"))
    with pytest.raises(RecipeError, match="name the labelled images that the method is evaluated on"):
        SklearnHead(modality="image", model=ModelRef(name="m"), train=DataRef(name="./pictures"))


def test_property_another_seed_draws_other_shots(tmp_path, pictures, encoders):
    shared = {"modality": "image", "model": encoders["vit"], "train": pictures["train"], "test": pictures["test"]}
    losses = [
        execute(SklearnHead(**shared, shots=2, seed=seed), tmp_path / str(i)).metrics["id/nll"]
        for i, seed in enumerate((0, 0, 1))
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.fixture
def captioned(tmp_path):
    """Pictures with a caption each, as a Parquet file; the first three are pictures of the test set."""
    held = [picture(colour, [1, number, 0]) for number, colour in enumerate(COLOURS)]
    forms = ("a {0} picture", "{0} {0} {0} {0} {0}")  # two domains
    others = [(picture(c, [9, i]), forms[i % 2].format(c)) for i in range(16) for c in COLOURS]
    images = [*held, *(image for image, _ in others)]
    captions = [*(f"a {colour} picture" for colour in COLOURS), *(caption for _, caption in others)]
    pq.write_table(pa.table({"image": images, "caption": captions}), tmp_path / "pairs.parquet")
    return {"name": str(tmp_path / "pairs.parquet"), "input_field": "image", "label_field": "caption"}


def test_property_gram_learns_its_prompt_from_captioned_images(tmp_path, pictures, encoders, captioned):
    fields = {"modality": "image", "train": pictures["train"], "test": pictures["test"], "pairs": captioned}
    meta = {"steps": 2, "ways": 2, "shots": 2, "queries": 1, "domains": 2, "classes": 2}
    recipe = Gram(model=encoders["clip"], meta=meta, steps=2, **fields)
    with Run(tmp_path / "run", recipe) as run:
        metrics = recipe.run(run)
    assert metrics["data/dropped_pairs"] == len(COLOURS)
    weight = load_file(tmp_path / "run" / "model" / "classes.safetensors")["weight"]
    features = encode_images([picture("red", 0)], encoders["clip"], normalize=True)[0].X
    assert weight.shape == (len(COLOURS), features.shape[1])
    assert json.loads((tmp_path / "run" / "model" / "prompt.json").read_text())["modality"] == "image"


def test_rejects_gram_on_an_encoder_that_reads_no_words(tmp_path, pictures, encoders, captioned):
    fields = {"modality": "image", "train": pictures["train"], "test": pictures["test"], "pairs": captioned}
    recipe = Gram(model=encoders["vit"], **fields)
    with pytest.raises(ModelError, match="reads images but no class phrases"), Run(tmp_path / "run", recipe) as run:
        recipe.run(run)
