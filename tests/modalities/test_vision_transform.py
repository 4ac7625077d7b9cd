import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    ViTImageProcessorPil,
)

from headwater.modalities.vision.baselines import ImageStatistics, RandomConvFeatures
from headwater.modalities.vision.transform import PretrainingTransform, image_tensor


def square(edge):
    return {"height": edge, "width": edge}


PROCESSORS = {
    "vit": ViTImageProcessorPil(size=square(32)),
    "vit-bicubic": ViTImageProcessorPil(size=square(32), resample=3),
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square(32)),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 36}, crop_size=square(32), resample=3),
    "convnext": ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.875),
    "convnext-warped": ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    "centre-only": CLIPImageProcessorPil(do_resize=False, crop_size={"height": 20, "width": 24}),
}


def image(height=23, width=31, seed=0, channels=3):
    """Uint8 pixels that differ smoothly and by noise, with edges."""
    rng = np.random.default_rng(seed)
    rows, columns, channel = np.mgrid[:height, :width, :channels]
    pixels = 120 + 90 * np.sin(rows / 5 + columns / (3 + channel)) + rng.normal(0, 25, (height, width, channels))
    pixels[: height // 3, : width // 2] = 255
    return np.clip(pixels, 0, 255).astype(np.uint8)


def theirs(processor, pixels):
    return processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]


# Against the processors of transformers.


@pytest.mark.parametrize("shape", [(23, 31), (64, 40), (9, 9)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_oracle_equals_the_image_processor(name, shape):
    processor = PROCESSORS[name]
    pixels = image(*shape)
    transform = PretrainingTransform.from_processor(processor)
    got = transform(image_tensor(Image.fromarray(pixels))[None])
    want = theirs(processor, pixels)
    assert got.shape == want.shape
    # Pillow rounds to whole grey levels after each of two axes: at most two levels of 255, before the deviation.
    difference = ((got - want).abs() * transform.std[:, None, None]).max()
    assert difference <= (2 + 1e-3) / 255


def test_oracle_without_a_resize_equals_exactly():
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[0.4, 0.5, 0.3], image_std=[0.2, 0.3, 0.25])
    pixels = image()
    got = PretrainingTransform.from_processor(processor)(torch.from_numpy(pixels).movedim(-1, 0)[None])
    # Two roundings in float32 of numbers of about 4.
    torch.testing.assert_close(got, theirs(processor, pixels), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", PROCESSORS)
def test_oracle_saved_pipeline_opens_in_transformers_and_does_the_same(name, tmp_path):
    transform = PretrainingTransform.from_processor(PROCESSORS[name])
    transform.save_pretrained(tmp_path)
    pixels = image()
    opened = AutoImageProcessor.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(opened, pixels), theirs(PROCESSORS[name], pixels), atol=2e-6, rtol=0)
    again = PretrainingTransform.from_processor(tmp_path)
    batch = image_tensor(Image.fromarray(pixels))[None]
    torch.testing.assert_close(again(batch), transform(batch), atol=2e-6, rtol=0)


def test_oracle_bilinear_without_antialiasing_by_hand():
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    small = PretrainingTransform((8, 4), rescale=1, mean=[0], std=[1], antialias=False)(ramp)
    # Output pixel j lies at 2 j + 0.5 of the input: the mean of two neighbours.
    torch.testing.assert_close(small[0, 0, 3], torch.tensor([0.5, 2.5, 4.5, 6.5]))


# What it is on its own.


def test_property_identity_size_and_statistics_are_the_identity():
    batch = torch.randn(2, 3, 8, 8) * 100
    assert torch.equal(PretrainingTransform((8, 8), rescale=1)(batch), batch)
    assert torch.equal(PretrainingTransform(None, rescale=1)(batch), batch)


def test_equation_rescale_mean_and_deviation_by_hand():
    batch = torch.tensor([51.0, 102.0, 255.0]).view(1, 3, 1, 1)
    got = PretrainingTransform(None, mean=[0.1, 0.5, 1.0], std=[0.5, 0.25, 2.0])(batch)
    # (51 / 255 - 0.1) / 0.5 = 0.2; (102 / 255 - 0.5) / 0.25 = -0.4; (1 - 1) / 2 = 0
    torch.testing.assert_close(got.flatten(), torch.tensor([0.2, -0.4, 0.0]))


def test_property_value_range_takes_the_place_of_0_to_255():
    processor = PROCESSORS["vit-bicubic"]
    plain = torch.from_numpy(image()).movedim(-1, 0)[None].float()
    stretched = 400 + plain * (10_000 - 400) / 255
    got = PretrainingTransform.from_processor(processor, value_range=(400, 10_000))(stretched)
    want = PretrainingTransform.from_processor(processor)(plain)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)  # float32 with numbers of 10,000


@pytest.mark.parametrize("name", PROCESSORS)
def test_property_both_halves_are_the_whole(name):
    transform = PretrainingTransform.from_processor(PROCESSORS[name])
    batch = torch.from_numpy(np.stack([image(seed=seed) for seed in range(3)])).movedim(-1, 1)
    # The one normalises before it resizes, the other after: float32 rounding.
    torch.testing.assert_close(transform(batch), transform.normalize(transform.resize(batch)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_oracle_a_short_axis_is_filtered_as_a_long_one_is(interpolation, monkeypatch):
    transform = PretrainingTransform((20, 48), rescale=1, interpolation=interpolation)
    batch = torch.from_numpy(image(37, 31)).movedim(-1, 0)[None]
    short = transform(batch)
    monkeypatch.setattr("headwater.modalities.vision.transform._SHORT", 0)
    torch.testing.assert_close(short, transform(batch), atol=1e-3, rtol=0)  # float32 sums of pixels to 255


def test_property_overshoot_is_clipped_but_pixels_beyond_the_range_are_kept():
    edge = torch.zeros(1, 1, 8, 8)
    edge[..., 4:] = 255
    bicubic = PretrainingTransform((24, 24), rescale=1, mean=[0], std=[1], interpolation="bicubic")
    assert (bicubic(edge).min(), bicubic(edge).max()) == (0, 255)
    edge[..., 4:] = 1000
    assert bicubic(edge).max() == 1000


def test_property_images_of_mixed_sizes_become_one_batch():
    shapes = [(9, 12), (20, 20), (9, 12)]
    images = [image_tensor(image(*shape, seed).transpose(2, 0, 1)) for seed, shape in enumerate(shapes)]
    transform = PretrainingTransform.from_processor(PROCESSORS["vit"])
    got = transform(images)
    assert got.shape == (3, 3, 32, 32)
    for row, one in enumerate(images):
        torch.testing.assert_close(got[row], transform(one[None])[0])


def test_property_one_channel_is_repeated():
    transform = PretrainingTransform.from_processor(PROCESSORS["vit"])
    grey = torch.rand(2, 1, 8, 8) * 255
    torch.testing.assert_close(transform(grey), transform(grey.repeat(1, 3, 1, 1)))


def test_property_other_channels_are_given_the_mean_statistics_where_asked():
    processor = ViTImageProcessorPil(size=square(8), image_mean=[0.1, 0.2, 0.6], image_std=[0.1, 0.2, 0.3])
    bands = torch.rand(1, 13, 8, 8)
    with pytest.raises(ValueError, match=r"13 channels and the statistics 3. Give channels=13"):
        PretrainingTransform.from_processor(processor)(bands)
    transform = PretrainingTransform.from_processor(processor, channels=13)
    np.testing.assert_allclose(transform.mean, [0.3] * 13, rtol=1e-6)
    np.testing.assert_allclose(transform.std, [0.2] * 13, rtol=1e-6)
    own = transform.with_statistics([0.5] * 13, list(np.arange(1, 14) / 10))
    torch.testing.assert_close(own(bands)[0, 12], (bands[0, 12] / 255 - 0.5) / 1.3)


def test_property_another_size_resizes_the_whole_image():
    transform = PretrainingTransform.from_processor(PROCESSORS["dinov2"])
    assert transform.output_size == (32, 32)
    other = transform.at(16)
    assert (other.output_size, other.crop_to, transform.output_size) == ((16, 16), None, (32, 32))
    assert transform.at(None)(torch.zeros(1, 3, 5, 7)).shape == (1, 3, 5, 7)


def test_property_bfloat16_and_integers_are_taken():
    transform = PretrainingTransform.from_processor(PROCESSORS["vit"])
    pixels = torch.from_numpy(image()).movedim(-1, 0)[None]
    assert torch.equal(transform(pixels), transform(pixels.float()))
    half = transform(pixels.bfloat16())
    assert half.dtype == torch.float32
    assert (half - transform(pixels.float())).abs().max() < 0.02  # whole numbers to 255 have 8 bits, as bfloat16 has


def test_degenerate_an_empty_batch_and_a_single_pixel():
    transform = PretrainingTransform.from_processor(PROCESSORS["vit"])
    assert torch.isfinite(transform(torch.zeros(1, 3, 1, 1))).all()
    assert PretrainingTransform(None)(torch.zeros(0, 3, 4, 4)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PretrainingTransform(8, std=(1.0, 0.0, 1.0)), "deviation of channel 1 must be positive; got 0.0"),
        (lambda: PretrainingTransform(8, mean=(0.0,)), "one value for each channel; got 1 and 3"),
        (lambda: PretrainingTransform((4, 4))(torch.zeros(2, 8, 8, 3)), r"look like \(height, width, channels\)"),
        (lambda: PretrainingTransform((4, 4))(torch.zeros(3, 8, 8)), "a batch must be"),
        (lambda: image_tensor(np.zeros((8, 9, 3))), r"look like \(height, width, channels\)"),
        (lambda: image_tensor(np.zeros(8)), "must have the axes"),
        (
            lambda: PretrainingTransform(8)([torch.zeros(3, 8, 8), torch.zeros(3, 8, 16)]),
            "come out in different shapes",
        ),
        (
            lambda: PretrainingTransform.from_processor(ViTImageProcessorPil(resample=1)),
            "resample 1 is none of nearest",
        ),
        (
            lambda: PretrainingTransform.from_processor(ViTImageProcessorPil(size={"longest_edge": 8})),
            "neither height and width nor a shortest edge",
        ),
        (
            lambda: PretrainingTransform.from_processor(PROCESSORS["vit"], value_range=(5, 5)),
            r"must be \(least, greatest\)",
        ),
    ],
)
def test_rejects_what_cannot_be_honoured(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_property_another_filter_can_stand_in_for_one_that_is_missing():
    processor = ViTImageProcessorPil(size=square(32), resample=1)
    assert PretrainingTransform.from_processor(processor, interpolation="bicubic").interpolation == "bicubic"


def test_property_the_saved_file_names_a_class_of_transformers(tmp_path):
    PretrainingTransform.from_processor(PROCESSORS["clip"]).at(48).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (said["image_processor_type"], said["size"]) == ("CLIPImageProcessor", square(48))
    assert said["do_center_crop"] is False


# Features without pretraining.


def test_oracle_image_statistics_equal_numpys():
    X = np.random.default_rng(0).integers(0, 256, (5, 3, 6, 7)).astype(np.float32)
    parts = [X.mean((2, 3)), X.std((2, 3)), X.max((2, 3)), X.min((2, 3))]
    np.testing.assert_allclose(ImageStatistics().fit_transform(X), np.concatenate(parts, 1), rtol=1e-6)
    assert ImageStatistics().fit_transform(X).shape == (5, 12)


@pytest.mark.parametrize("zca", [True, False])
def test_property_a_constant_image_answers_alike_at_every_position(zca):
    images = np.random.default_rng(0).random((20, 3, 8, 8), dtype=np.float32)
    features = RandomConvFeatures(64, zca=zca).fit(images)
    small, large = (features.transform(np.full((1, 3, edge, edge), 0.3, np.float32)) for edge in (3, 9))
    assert small.shape == (1, 64)
    np.testing.assert_allclose(small, large, atol=1e-5)  # zero variance: one position is the mean over 49


def test_oracle_random_features_are_convolutions_by_loops():
    images = np.random.default_rng(0).random((30, 2, 6, 6), dtype=np.float32)
    model = RandomConvFeatures(8, random_state=3).fit(images)
    weight, bias = model.weight_.numpy(), model.bias_.numpy()
    response = np.array(
        [
            [(weight[j] * images[0, :, r : r + 3, c : c + 3]).sum() + bias[j] for r in range(4) for c in range(4)]
            for j in range(4)
        ]
    )
    want = np.concatenate((np.maximum(response, 0).mean(1), np.maximum(-response, 0).mean(1)))
    np.testing.assert_allclose(model.transform(images[:1])[0], want, rtol=1e-4, atol=1e-6)


def test_oracle_whitened_patches_are_white():
    rng = np.random.default_rng(0)
    images = 50 + rng.normal(size=(300, 1, 8, 8)).cumsum(-1).astype(np.float32)  # neighbours are alike
    model = RandomConvFeatures(2 * 400, kernel=2, bias=0.0).fit(images)
    patches = np.stack([images[i, :, :2, 3:5].reshape(-1) for i in range(300)])
    response = patches @ model.weight_.numpy().reshape(400, -1).T + model.bias_.numpy()
    # q W (x - m) with unit q and white W (x - m): zero mean and unit variance for every patch, on the average.
    assert abs(response.mean()) < 0.2
    assert response.var(0).mean() == pytest.approx(1, abs=0.35)


def test_property_patches_follow_the_seed():
    images = np.random.default_rng(0).random((10, 3, 8, 8), dtype=np.float32)
    first, again, other = (RandomConvFeatures(16, random_state=seed).fit(images).weight_ for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_degenerate_constant_images_give_finite_features():
    flat = np.ones((4, 1, 5, 5), np.float32)
    assert np.isfinite(RandomConvFeatures(4).fit(flat).transform(flat)).all()


@pytest.mark.parametrize(
    ("options", "shape", "words"),
    [
        ({"n": 7}, (2, 1, 5, 5), "n must be even and positive"),
        ({"kernel": 9}, (2, 1, 5, 5), "smaller than a patch of 9"),
        ({}, (2, 5, 5), r"must be \(n, channels, height, width\)"),
    ],
)
def test_rejects_features_that_cannot_be_made(options, shape, words):
    with pytest.raises(ValueError, match=words):
        RandomConvFeatures(**options).fit(np.zeros(shape, np.float32))
