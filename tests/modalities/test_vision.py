import io

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from headwater.core.recipe import DataRef, ModelRef
from headwater.modalities.features import extract_features
from headwater.modalities.models import ModelError
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.vision import bases
from headwater.modalities.vision.digits import NOISE, SEEN, digits, digits_backbone
from headwater.modalities.vision.labelled import decode_image, encode_images, open_image_encoder, open_labelled_images

PARTS = ("pretrain", "train", "validation", "test")

# Digits.


def test_property_every_image_is_in_exactly_one_part():
    seen = [digits(part, ("rot0",)).images for part in PARTS]
    assert [len(part) for part in seen] == [600, 600, 197, 400]
    whole = (load_digits().data / 16).astype(np.float32)
    assert sorted(map(tuple, np.concatenate(seen))) == sorted(map(tuple, whole))


def test_equation_guises_by_hand():
    plain = digits("test", ("rot0",)).images.reshape(-1, 8, 8)
    for guise, expected in {
        "rot90": plain.transpose(0, 2, 1)[:, ::-1],
        "rot180": plain[:, ::-1, ::-1],
        "rot270": plain.transpose(0, 2, 1)[:, :, ::-1],
        "mirror": plain[:, :, ::-1],
    }.items():
        np.testing.assert_array_equal(digits("test", (guise,)).images.reshape(-1, 8, 8), expected)


def test_property_classes_are_digit_and_guise():
    both = digits("train", ("rot270", "mirror"))
    assert both.label_names[:2] + both.label_names[-1:] == ("0 rot270", "1 rot270", "9 mirror")
    assert np.array_equal(both.labels[600:], both.labels[:600] + 10)
    assert set(both.labels.tolist()) == set(range(20))


def test_property_the_gap_inverts_and_adds_the_same_noise_at_every_call():
    plain, off = digits("train", ("rot270", "mirror")), digits("train", ("rot270", "mirror"), "invert_noise")
    noise = off.images - (1 - plain.images)
    assert noise.mean() == pytest.approx(0, abs=5 * NOISE / noise.size**0.5)
    assert noise.std() == pytest.approx(NOISE, rel=0.02)
    assert abs(np.corrcoef(noise[:600].ravel(), noise[600:].ravel())[0, 1]) < 0.03
    np.testing.assert_array_equal(digits("train", ("mirror",), "invert_noise").images, off.images[600:])
    np.testing.assert_array_equal(off.labels, plain.labels)


def test_property_the_backbone_follows_the_seed_and_leaves_the_global_generator():
    before = torch.random.get_rng_state()
    first, again, other = (digits_backbone(seed, epochs=1) for seed in (0, 0, 1))
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_property_wrong_labels_spoil_the_backbone_by_their_share_and_none_change_nothing():
    asked = digits("validation", SEEN)

    def told_apart(backbone):  # share of the features' variance that lies between the true classes
        with torch.no_grad():
            X = backbone(torch.from_numpy(asked.images)).numpy()
        means = np.stack([X[asked.labels == label].mean(0) for label in range(30)])[asked.labels]
        return ((means - X.mean(0)) ** 2).sum() / ((X - X.mean(0)) ** 2).sum()

    none, some, all_wrong = (digits_backbone(0, wrong_labels=share) for share in (0, 0.3, 1))
    assert torch.equal(none[0].weight, digits_backbone(0)[0].weight)
    assert torch.equal(some[0].weight, digits_backbone(0, wrong_labels=0.3)[0].weight)
    assert told_apart(none) > told_apart(some) + 0.1 > told_apart(all_wrong) + 0.2


def test_learns_to_tell_held_out_digits_apart():
    backbone, (train, test) = digits_backbone(0), (digits(part, SEEN) for part in ("pretrain", "validation"))
    with torch.no_grad():
        known, asked = (backbone(torch.from_numpy(part.images)) for part in (train, test))
    nearest = torch.cdist(asked, known).argmin(1)
    assert known.shape == (1800, 64)
    assert (train.labels[nearest.numpy()] == test.labels).mean() > 0.8  # thirty classes


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: digits("train", ()), "at least one and all different"),
        (lambda: digits("train", ("mirror", "mirror")), "all different"),
        (lambda: digits_backbone(0, wrong_labels=1.5), r"wrong_labels must be in \[0, 1\]; got 1.5"),
        (lambda: digits("dev", ("mirror",)), "one of pretrain, train, validation, test; got 'dev'"),
    ],
)
def test_rejects_digits_that_are_not_there(act, words):
    with pytest.raises(ValueError, match=words):
        act()


# Labelled images.


def encoded(value, size=(6, 4), mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size, value).save(file, "png")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    for name, value in (("cat", 10), ("dog", 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "images" / name / f"{number}.png").write_bytes(encoded((value, number, 0)))
    (tmp_path / "images" / "cat" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_property_a_folder_of_folders_is_read_in_order(folder):
    images, labels = open_labelled_images(DataRef(name=str(folder)), role="train")
    assert labels == ["cat"] * 3 + ["dog"] * 3
    assert [decode_image(image).getpixel((0, 0)) for image in images[2:4]] == [(10, 2, 0), (200, 0, 0)]
    limited, _ = open_labelled_images(DataRef(name=str(folder), limit=2), role="train")
    assert limited == images[:2]


@pytest.mark.parametrize("stored", ["bytes", "path", "plain"])
def test_property_a_parquet_column_is_read_as_datasets_writes_it(stored, folder, tmp_path):
    import pandas as pd

    source = folder / "dog" / "1.png"
    data = source.read_bytes()
    cell = {"bytes": {"bytes": data, "path": None}, "path": {"bytes": None, "path": str(source)}, "plain": data}[stored]
    pd.DataFrame({"picture": [cell], "kind": [7]}).to_parquet(tmp_path / "data.parquet")
    ref = DataRef(name=str(tmp_path / "data.parquet"), input_field="picture", label_field="kind")
    assert open_labelled_images(ref, role="train") == ([data], ["7"])


def test_property_a_hub_data_set_gives_files_and_names_of_classes(folder, tmp_path, monkeypatch):
    import datasets

    # `datasets` takes a folder for a data set; through the front door a path would be read by us.
    ref = DataRef(name="somebody/pictures", input_field="image")
    opened = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "hf"))
    asked = {}

    def load_dataset(name, config, **options):
        asked.update(name=name, **options)
        return opened.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    images, labels = open_labelled_images(ref, role="train")
    assert labels == ["cat"] * 3 + ["dog"] * 3
    assert decode_image(images[4]).getpixel((0, 0)) == (200, 1, 0)
    assert asked == {"name": "somebody/pictures", "split": "train", "revision": None, "streaming": True}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "nothing/"}, r"train: no image in .*one folder for each class"),
        ({"name": "missing.parquet"}, "neither a folder of images nor a Parquet file"),
        ({"name": "data.parquet", "input_field": "image"}, "no column 'image'; available: picture, kind"),
        ({"name": "data.parquet", "input_field": "kind", "label_field": "kind"}, "row 0 of column 'kind' holds int"),
    ],
)
def test_rejects_what_holds_no_images(change, words, tmp_path):
    import pandas as pd

    (tmp_path / "nothing").mkdir()
    pd.DataFrame({"picture": [b""], "kind": [7]}).to_parquet(tmp_path / "data.parquet")
    ref = DataRef(**{**change, "name": str(tmp_path / change["name"])})
    with pytest.raises(CorpusError, match=words):
        open_labelled_images(ref, role="train")


def test_property_images_are_decoded_to_rgb():
    assert decode_image(encoded(77, mode="L")).getpixel((0, 0)) == (77, 77, 77)
    assert decode_image(encoded((1, 2, 3, 0), mode="RGBA")).mode == "RGB"


@pytest.fixture(scope="module")
def vit_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vit")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(directory)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(directory)
    return directory


def test_oracle_features_of_files_are_those_of_their_pictures_and_are_kept(vit_directory, folder, monkeypatch):
    images, _ = open_labelled_images(DataRef(name=str(folder)), role="train")
    ref = ModelRef(name=str(vit_directory))
    store, seconds = encode_images(images, ref)
    model, processor = open_image_encoder(ref)
    direct = extract_features(model, [decode_image(image) for image in images], processor=processor)
    np.testing.assert_array_equal(store.X, direct.X)
    monkeypatch.setattr(ViTModel, "forward", None)  # a second call reads
    np.testing.assert_array_equal(encode_images(images, ref)[0].X, direct.X)
    again, then = encode_images(images, ref)
    assert (again.fingerprint, then) == (store.fingerprint, seconds)  # what it took, not what finding it took


def test_rejects_a_model_without_an_image_processor(vit_directory, tmp_path):
    ViTModel.from_pretrained(vit_directory).save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="no image processor could be opened beside it"):
        open_image_encoder(ModelRef(name=str(tmp_path / "bare")))


def test_oracle_builtin_digits_are_the_pixels_of_digits():
    images, labels = open_labelled_images(DataRef(name="headwater:digits/test", limit=3), role="test")
    found = digits("test", ("rot270", "mirror"))
    for place in range(3):
        pixels = np.asarray(decode_image(images[place]))[..., 0] / 255
        np.testing.assert_allclose(pixels.ravel(), found.images[place], atol=0.5 / 255 + 1e-6)
        assert labels[place] == found.label_names[found.labels[place]]
    with pytest.raises(CorpusError, match="no builtin images 'headwater:digits/all'; there are headwater:digits/train"):
        open_labelled_images(DataRef(name="headwater:digits/all"), role="test")


def test_property_the_builtin_transformer_is_made_once_and_opens_as_any_other(monkeypatch):
    monkeypatch.setattr(bases, "EPOCHS", 1)
    first = bases.digits_vit()
    written = (first / "model.safetensors").stat().st_mtime_ns
    model, _ = open_image_encoder(ModelRef(name=str(first)))
    assert bases.digits_vit() == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    images, labels = open_labelled_images(DataRef(name="headwater:digits/test", limit=20), role="test")
    features = encode_images(images, ModelRef(name="headwater:digits-vit"))[0].X
    assert features.shape == (len(labels), model.config.hidden_size)
