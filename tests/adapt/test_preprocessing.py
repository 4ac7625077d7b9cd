import csv
import hashlib
import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import (
    AutoImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    Wav2Vec2FeatureExtractor,
)

from headwater.adapt.preprocessing import Preprocessing, audit, write_audit
from headwater.adapt.preprocessing_advice import check_images, check_sound
from headwater.core.claim import load_claim
from headwater.core.recipe import DataRef, RecipeError
from headwater.core.run import execute
from headwater.core.stats import paired_bootstrap
from headwater.modalities.features import extract_features
from headwater.modalities.speech.audio import resample
from headwater.modalities.vision.labelled import decode_image, open_labelled_images
from headwater.modalities.vision.transform import PretrainingTransform, image_tensor

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PROCESSOR = ViTImageProcessorPil(size={"height": 16, "width": 16})
TRANSFORM = PretrainingTransform.from_processor(PROCESSOR)
COLOURS = np.array([(70, 80, 150), (70, 140, 80), (150, 80, 70)])


def pictures(per_class=10, seed=0, edge=8, noise=60):
    """Arrays ``(n, 3, edge, edge)`` of three colours under noise, and their classes."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(3), per_class))
    pixels = rng.normal(COLOURS[labels][..., None, None], noise, (len(labels), 3, edge, edge))
    pixels += rng.normal(0, noise / 2, (len(labels), 1, 1, 1))
    return np.clip(pixels, 0, 255).round().astype(np.uint8), labels


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


@pytest.fixture(scope="module")
def vit():
    return seeded(lambda: ViTModel(ViTConfig(image_size=16, patch_size=4, **SIZES)))


def colour_means(pixels):
    return pixels.mean((2, 3))


# The audit.


def test_oracle_probes_equal_scikit_learns_on_features_of_the_image_processor(vit):
    X, y = pictures()
    new, truth = pictures(20, seed=1)
    table = audit(vit, X, y, transform=TRANSFORM, sizes=(16,), norms=("pretraining",), held_out=(new, truth))

    def features(images):
        files = [Image.fromarray(image.transpose(1, 2, 0)) for image in images]
        return extract_features(vit, files, processor=PROCESSOR, modality="image").X

    train, test = features(X), features(new)
    want = {
        "knn": KNeighborsClassifier(5).fit(train, y).score(test, truth),
        "linear": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train, y).score(test, truth),
    }
    # Pillow's rounding moves a feature by a thousandth: an image or two at a border may change sides.
    assert {row.probe: row.accuracy for row in table.rows} == pytest.approx(want, abs=2.01 / 60)
    assert min(want.values()) > 0.5


def test_oracle_cross_validation_equals_scikit_learns_over_the_images_in_order():
    X, y = pictures()
    table = audit(colour_means, X, y, transform=TRANSFORM, sizes=(8,), norms=("divide",), probes=("knn",))
    # The order of images is that of their hashes, which the folds are cut from.
    order = sorted(range(len(X)), key=lambda i: hashlib.sha256(X[i].astype(np.float32).tobytes()).hexdigest())
    means, y = X[order].mean((2, 3)) / 255, y[order]
    right = np.zeros(len(y))
    for fit, score in StratifiedKFold(5).split(means, y):
        right[score] = KNeighborsClassifier(5).fit(means[fit], y[fit]).predict(means[score]) == y[score]
    np.testing.assert_array_equal(table.items(8, "divide", "knn"), right)
    assert table.rows[0].accuracy == right.mean()


@pytest.mark.parametrize("held", [False, True])
def test_property_the_order_of_rows_does_not_matter(vit, held):
    X, y = pictures()
    new, truth = pictures(6, seed=1)
    tables = []
    for rows, new_rows in [(np.arange(30), np.arange(18)), (np.arange(30)[::-1], np.roll(np.arange(18), 5))]:
        held_out = (new[new_rows], truth[new_rows]) if held else None
        tables.append(audit(vit, X[rows], y[rows], transform=TRANSFORM, held_out=held_out))
    assert [(r.size, r.norm, r.probe, r.accuracy) for r in tables[0].rows] == [
        (r.size, r.norm, r.probe, r.accuracy) for r in tables[1].rows
    ]
    np.testing.assert_array_equal(tables[0].hits, tables[1].hits)


def test_equation_normalisations_by_hand():
    X = np.array([[[[0, 50]], [[10, 20]], [[100, 200]]]] * 4, dtype=np.uint8)
    X[2:] += 20
    y = np.array([0, 1, 0, 1])
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    seen = []

    def spy(pixels):
        seen.append(pixels.clone())
        return pixels.flatten(1)

    transform = PretrainingTransform.from_processor(processor)
    table = audit(spy, X, y, transform=transform, sizes=(1,), k=2, probes=("knn",))
    got = {row.norm: pixels[:, 0, 0] for row, pixels in zip(table.rows, seen, strict=True)}
    # Images are resized to 1 x 1: the mean of the two pixels of a row. First channel: 25, 25, 45, 45 of 0, 50, 20, 70.
    values = sorted([25.0, 25.0, 45.0, 45.0])
    pixels = np.array([0, 50, 0, 50, 20, 70, 20, 70])
    want = {
        "pretraining": [(v / 255 - 0.5) / 0.25 for v in values],
        "divide": [v / 255 for v in values],
        "standardise": [(v - pixels.mean()) / pixels.std() for v in values],
        "minmax": [v / 70 for v in values],
    }
    for norm, expected in want.items():
        np.testing.assert_allclose(np.sort(got[norm].flatten().numpy()), expected, rtol=1e-5, atol=1e-6)


def test_property_auto_sizes_are_the_own_the_pretraining_and_one_between(vit):
    X, y = pictures()
    table = audit(vit, X, y, transform=TRANSFORM, probes=("knn",))
    assert (table.native, table.pretraining) == (8, 16)
    assert [row.size for row in table.rows] == [16] * 4 + [11] * 4 + [8] * 4  # 11.3 is the geometric mean
    assert [row.norm for row in table.rows[:4]] == ["pretraining", "standardise", "divide", "minmax"]


@pytest.mark.parametrize(
    "build",
    [
        lambda: ViTModel(ViTConfig(image_size=16, patch_size=4, **SIZES)),
        lambda: CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=4, **SIZES)),
        lambda: Dinov2Model(Dinov2Config(image_size=16, patch_size=4, **SIZES)),
    ],
)
def test_property_position_embeddings_are_interpolated_at_other_sizes(build):
    X, y = pictures()
    table = audit(seeded(build), X, y, transform=TRANSFORM, sizes=(16, 24), norms=("pretraining",))
    assert all(row.note == "" and row.accuracy > 0.4 for row in table.rows)


def test_fault_a_size_that_the_encoder_cannot_take_is_a_row_that_says_so(tmp_path):
    def only_16(pixels):
        if pixels.shape[-1] != 16:
            raise ValueError("16 px or nothing\nand more")
        return colour_means(pixels)

    X, y = pictures()
    table = audit(only_16, X, y, transform=TRANSFORM, norms=("pretraining", "divide"), probes=("knn",))
    skipped = [row for row in table.rows if row.size != 16]
    assert len(skipped) == 4
    assert all(math.isnan(row.accuracy) and row.note == "skipped: 16 px or nothing" for row in skipped)
    assert table.best().size == 16
    assert table.default_penalty() is None
    write_audit(tmp_path / "audit.csv", {"mine": table})
    rows = list(csv.DictReader(io.StringIO((tmp_path / "audit.csv").read_text())))
    assert [row["note"] for row in rows].count("skipped: 16 px or nothing") == 4
    with pytest.raises(ValueError, match=r"takes none of the sizes \[8\]: skipped: 16 px or nothing"):
        audit(only_16, X, y, transform=TRANSFORM, sizes=(8,))


def test_oracle_default_penalty_is_best_minus_naive_over_the_same_images(vit):
    X, y = pictures(20)
    table = audit(vit, X, y, transform=TRANSFORM)
    best = table.best()
    assert best.accuracy == max(row.accuracy for row in table.rows)
    penalty = table.default_penalty()
    naive = next(r for r in table.rows if (r.size, r.norm, r.probe) == (8, "divide", best.probe))
    assert penalty.mean == pytest.approx(best.accuracy - naive.accuracy)
    want = paired_bootstrap(table.items(best.size, best.norm, best.probe), table.items(8, "divide", best.probe))
    assert (penalty.low, penalty.high, penalty.n) == (want.low, want.high, 60)
    assert table.best("knn").probe == "knn"


def test_property_the_encoder_keeps_its_mode_and_gets_no_gradient():
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(3 * 8 * 8, 4))
    X, y = pictures()
    options = {"transform": TRANSFORM, "sizes": (8,), "norms": ("divide",)}
    first, second = (audit(net, X, y, **options) for _ in range(2))
    assert net.training
    np.testing.assert_array_equal(first.hits, second.hits)  # dropout was off
    assert net[2].weight.grad is None


def test_property_images_of_mixed_sizes_and_kinds_are_audited():
    X, y = pictures()
    mixed = [Image.fromarray(image.transpose(1, 2, 0)) for image in X]
    mixed[0] = mixed[0].resize((20, 13))
    table = audit(colour_means, mixed, y, transform=TRANSFORM, norms=("divide",), probes=("knn",))
    assert table.native == 8  # the median of the shorter edges
    assert table.best().accuracy > 0.6


def test_property_one_channel_for_three_is_recorded():
    X, y = pictures()
    table = audit(colour_means, X[:, :1], y, transform=TRANSFORM, sizes=(8,), probes=("knn",))
    assert {row.note for row in table.rows} == {"one channel, repeated for 3"}


def test_property_other_channels_are_audited_with_their_own_statistics():
    X, y = pictures()
    bands = np.concatenate((X, X[:, :2] // 2), axis=1).astype(np.float32) * 30
    transform = PretrainingTransform.from_processor(PROCESSOR, channels=5, value_range=(0, 10_000))
    table = audit(colour_means, bands, y, transform=transform, sizes=(8,), probes=("knn",))
    assert all(len(pipeline.std) == 5 for pipeline in table.pipelines.values())
    standard = table.pipelines[8, "standardise"](torch.from_numpy(bands))
    np.testing.assert_allclose(standard.mean((0, 2, 3)), np.zeros(5), atol=1e-5)
    np.testing.assert_allclose(standard.std((0, 2, 3), correction=0), np.ones(5), rtol=1e-5)


def test_degenerate_two_images_of_each_class():
    X, y = pictures(2)
    table = audit(colour_means, X, y, transform=TRANSFORM, sizes=(8,), norms=("divide",), k=1)
    assert table.hits.shape == (2, 6)


def test_rejects_what_no_audit_can_come_of():
    X, y = pictures()
    dark = X.copy()
    dark[:, 1] = 7
    shared = {"transform": TRANSFORM, "sizes": (8,)}
    for options, words in [
        ({"labels": y[:-1]}, "30 images have 29 labels"),
        ({"images": X[:0], "labels": y[:0]}, "no images to audit"),
        ({"labels": np.r_[y[:-1], 9]}, "class 9 has one image"),
        ({"k": 25}, "25 neighbours need as many images to fit to; there are 24"),
        ({"images": dark}, "deviation of channel 1 must be positive; got 0.0"),
        ({"images": X[:, :2]}, "images have 2 channels and the statistics 3"),
        ({"encoder": lambda pixels: pixels}, r"one vector for each image, \(batch, D\); got \(30, 3, 8, 8\)"),
    ]:
        with pytest.raises(ValueError, match=words):
            audit(**{"encoder": colour_means, "images": X, "labels": y, **shared, **options})


def test_learns_the_size_that_an_encoder_was_made_for():
    """Stripes of one pixel are all that tells the classes apart, and at half the size they are gone."""

    def edges(pixels):
        inner = pixels[..., 2:-2]  # at the border the filter is cut off, and some of the stripes remains
        return (inner[..., ::2] - inner[..., 1::2]).abs().mean((2, 3))

    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 20)
    X = rng.integers(100, 150, (40, 3, 16, 16))
    X[y == 1, :, :, ::2] += 60
    X[y == 1, :, :, 1::2] -= 60
    table = audit(edges, X.astype(np.uint8), y, transform=TRANSFORM, sizes=(8, 16), norms=("divide",))
    accuracy = {(row.size, row.probe): row.accuracy for row in table.rows}
    assert min(accuracy[16, "knn"], accuracy[16, "linear"]) == 1
    assert max(accuracy[8, "knn"], accuracy[8, "linear"]) < 0.7


# The recipe.


@pytest.fixture(scope="module")
def run(image_fields, tmp_path_factory):
    directory = tmp_path_factory.mktemp("preprocessing") / "run"
    return directory, execute(Preprocessing(**image_fields), directory)


def test_property_the_audit_lists_every_pipeline_and_what_needs_no_pretraining(run):
    directory, _ = run
    rows = list(csv.DictReader(io.StringIO((directory / "audit.csv").read_text())))
    counts = {name: sum(row["features"] == name for row in rows) for name in {row["features"] for row in rows}}
    assert counts == {"pretrained": 24, "random weights": 4, "image statistics": 2, "random convolutions": 2}
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)
    random = {float(row["accuracy"]) for row in rows if row["features"] == "random weights"}
    pretrained = {float(row["accuracy"]) for row in rows if row["features"] == "pretrained"}
    assert random != pretrained


@pytest.mark.parametrize("probe", ["knn", "linear"])
def test_oracle_saved_probe_predicts_what_was_measured_without_us(image_fields, tmp_path, probe):
    result = execute(Preprocessing(**image_fields, probes=(probe,), sizes=(16, 24), k=3), tmp_path / "run")
    model = tmp_path / "run" / "model"
    processor = AutoImageProcessor.from_pretrained(model)
    encoder = ViTModel.from_pretrained(image_fields["model"]).eval()
    saved = load_file(model / "head.safetensors")
    images, names = open_labelled_images(DataRef(name=image_fields["test"]), role="test")
    pixels = processor([decode_image(image) for image in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = encoder(pixels, interpolate_pos_encoding=True).pooler_output
    if probe == "linear":
        answers = (features @ saved["weight"].T + saved["bias"]).argmax(1)
    else:
        nearest = torch.cdist(features, saved["features"]).topk(3, largest=False).indices
        answers = saved["labels"][nearest].mode(1).values
    truth = torch.tensor([sorted(set(names)).index(name) for name in names])
    accuracy = float((answers == truth).float().mean())
    # Pillow's rounding against ours: an image or so at a border of 18.
    assert accuracy == pytest.approx(result.metrics["id/accuracy"], abs=1.01 / 18)
    assert result.metrics["cost/trainable"] == sum(t.numel() for t in saved.values() if t.is_floating_point())
    readme = (model / "README.md").read_text()
    assert "0. blue\n1. green\n2. red" in readme


def test_property_the_winning_pipeline_is_the_best_row_and_is_saved(run):
    directory, result = run
    rows = [
        row
        for row in csv.DictReader(io.StringIO((directory / "audit.csv").read_text()))
        if row["features"] == "pretrained"
    ]
    best = max(rows, key=lambda row: float(row["accuracy"]))
    assert result.notes["pipeline"] == f"{best['size']} px, {best['norm']}, {best['probe']}"
    said = json.loads((directory / "model" / "preprocessor_config.json").read_text())
    assert said["size"] == {"height": int(best["size"]), "width": int(best["size"])}
    if best["norm"] == "divide":
        assert said["image_std"] == [1.0] * 3
    assert "default_penalty" in result.notes


def test_property_only_training_labels_are_looked_at(run, image_fields):
    _, result = run
    assert result.cost["labels"] == 3 * image_fields["shots"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modality": "text"}, "modality"),
        ({"sizes": (0,)}, "greater than 0"),
        ({"norms": ()}, "norms"),
        ({"norms": ("whiten",)}, "norms"),
        ({"probes": ("svm",)}, "probes"),
        ({"k": 0}, "greater than 0"),
        ({"train": "headwater:docstrings", "test": None}, "holds texts"),
    ],
)
def test_rejects_fields_that_cannot_be_honoured(image_fields, changes, words):
    with pytest.raises(RecipeError, match=words):
        Preprocessing(**{**image_fields, **changes})


# The claim.


def test_property_the_claim_runs_and_lists_what_needs_no_pretraining(tmp_path):
    claim = load_claim("preprocessing")
    measured = claim.measure("smoke", 100, tmp_path)
    arms = {part.treatment for part in claim.parts} | {part.baseline for part in claim.parts}
    assert set(measured.arms) == arms
    assert {len(items["accuracy"]) for items in measured.items.values()} == {400}
    for name in ("raw pixels", "random weights", "image statistics", "random convolutions"):
        assert "px" in measured.notes[f"{name}/seed-100"]


# Advice without labels.


IMAGENET = PretrainingTransform.from_processor(
    ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.485, 0.456, 0.406], image_std=[0.23] * 3)
)


def photographs():
    return torch.stack([image_tensor(image) for image in pictures(8, edge=16)[0]])


def test_property_what_the_pipeline_gives_is_not_complained_of():
    assert check_images(IMAGENET(photographs()), IMAGENET) == []


@pytest.mark.parametrize(
    ("spoil", "problems"),
    [
        (lambda x: x, ["pixels not rescaled"]),
        (lambda x: x * 39, ["pixels not rescaled"]),  # 0 to 10,000
        (lambda x: (x - 0.45) / 0.23, ["pixels not rescaled"]),
        (lambda x: IMAGENET(x / 255), ["pixels rescaled twice"]),
        (lambda x: x / 255 / 255, ["pixels rescaled twice"]),
        (lambda x: x / 255, ["pixels not normalised"]),
        (lambda x: (IMAGENET(x) - 0.45) / 0.23, ["values that no pixel gives"]),
        (lambda x: IMAGENET(x)[..., :8, :8], ["another size"]),
        (lambda x: x[..., :8, :8], ["another size", "pixels not rescaled"]),
        (lambda x: IMAGENET(0.1 * x + 200), ["images unlike those of pretraining"]),
    ],
)
def test_property_each_mistake_is_named(spoil, problems):
    found = check_images(spoil(photographs()), IMAGENET)
    assert [advice.problem for advice in found] == problems
    assert all(advice.got in advice.to_text() and advice.remedy in advice.to_text() for advice in found)


def test_rejects_inputs_of_another_shape():
    with pytest.raises(ValueError, match="Put the channels first"):
        check_images(photographs().movedim(1, -1), IMAGENET)
    with pytest.raises(ValueError, match="not empty"):
        check_images(photographs()[:0], IMAGENET)


# Sounds: the rate and the scale.


def sound(rate, seconds=1.0):
    """Noise with as much in every octave up to half the rate, within [-1, 1]."""
    samples = np.random.default_rng(0).standard_normal(int(rate * seconds))
    return (0.2 * samples).clip(-1, 1).astype(np.float32)


EXTRACTOR = Wav2Vec2FeatureExtractor(sampling_rate=16_000, do_normalize=False)


def test_property_a_sound_at_the_right_rate_is_not_complained_of():
    assert check_sound(sound(16_000), 16_000, EXTRACTOR) == []


def test_property_another_rate_is_named_with_the_factor():
    (advice,) = check_sound(sound(8_000), 8_000, EXTRACTOR)
    assert (advice.problem, advice.got, advice.expected) == ("another sampling rate", "8000 Hz", "16000 Hz")
    assert "2 times too fast" in advice.remedy


def test_property_a_sound_that_was_upsampled_is_recognised():
    (advice,) = check_sound(resample(sound(8_000), 8_000, 16_000), 16_000, EXTRACTOR)
    assert advice.problem == "an empty upper half of the spectrum"
    assert "above 5000 Hz" in advice.got
    assert "8000 Hz" in advice.remedy


def test_property_integer_samples_are_named_where_the_extractor_does_not_normalise():
    loud = sound(16_000) * 32768
    (advice,) = check_sound(loud, 16_000, EXTRACTOR)
    assert advice.problem == "samples not scaled"
    assert check_sound(loud, 16_000, Wav2Vec2FeatureExtractor(sampling_rate=16_000, do_normalize=True)) == []


def test_rejects_what_is_no_sound():
    with pytest.raises(ValueError, match="not empty"):
        check_sound(np.zeros((2, 100)), 16_000, EXTRACTOR)
