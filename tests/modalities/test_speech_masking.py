"""Masks, negatives, batches and objectives of speech, against transformers' own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2ForCTC
from transformers.models.wav2vec2 import modeling_wav2vec2 as theirs

from headwater.modalities.speech.audio import AudioRef, Clip, open_speech
from headwater.modalities.speech.masking import num_frames, receptive_field, sample_negatives, span_mask
from headwater.modalities.speech.objectives import ContrastiveObjective, CTCObjective, gumbel_temperature
from headwater.modalities.speech.stream import Frames, Masking, SpeechStream, collate
from headwater.modalities.speech.tiny import tiny_feature_extractor, tiny_wav2vec2

KERNELS, STRIDES = (10, 8, 8, 8, 4), (5, 4, 4, 4, 2)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    """Twenty clips of noise, 0.4 to 1.2 seconds."""
    import soundfile

    folder, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for i in range(20):
        length = 6_400 + 640 * ((7 * i) % 20)
        soundfile.write(folder / f"{i:02d}.wav", (0.1 * rng.standard_normal(length)).astype(np.float32), 16_000)
    return list(open_speech(AudioRef(name=str(folder)), role="audio").clips)


def front(norm: str = "group") -> Frames:
    return Frames(KERNELS, STRIDES, tiny_feature_extractor(norm))  # type: ignore[arg-type]


def test_oracle_frames_are_counted_as_transformers_counts_them() -> None:
    model = tiny_wav2vec2(16, 1, 2, 16, conv=8, codes=4, generator_seed=0)
    lengths = torch.arange(2_000, 20_000, 37)
    expected = model._get_feat_extract_output_lengths(lengths)
    assert np.array_equal(num_frames(lengths.numpy(), KERNELS, STRIDES), expected.numpy())
    assert num_frames(3, KERNELS, STRIDES) == 0


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_property_a_receptive_field_is_the_least_that_gives_its_frames(frames: int) -> None:
    samples, stride = receptive_field(KERNELS, STRIDES, frames)
    assert stride == 640
    assert num_frames(samples, KERNELS, STRIDES) == frames
    assert num_frames(samples - 1, KERNELS, STRIDES) == frames - 1


@pytest.mark.parametrize(("probability", "length"), [(0.065, 10), (0.13, 5)])
def test_equation_the_hidden_share_approaches_one_minus_the_chance_of_no_span(probability: float, length: int) -> None:
    mask = span_mask(np.arange(60), np.full(60, 2000), probability, length, width=2000, seed=0)
    assert mask[:, length:-length].mean() == pytest.approx(1 - (1 - probability) ** length, abs=0.01)


def test_oracle_spans_are_drawn_as_transformers_draws_them() -> None:
    # Its probability is of frames, ours of starts: a factor of the length. Three spans in 60 frames leave nothing to
    # round, which it does alike for a whole batch.
    ours = span_mask(np.arange(400), np.full(400, 60), 0.05, 5, width=60, seed=1)
    reference = theirs._compute_mask_indices((400, 60), 0.05 * 5, 5, min_masks=1)

    def runs(mask: np.ndarray) -> float:
        return float((np.diff(np.pad(mask, ((0, 0), (1, 0))).astype(int), axis=1) == 1).sum(axis=1).mean())

    assert ours.mean() == pytest.approx(reference.mean(), abs=0.01)
    assert runs(ours) == pytest.approx(runs(reference), abs=0.15)
    assert np.abs(ours.mean(axis=0) - reference.mean(axis=0)).max() < 0.15  # by place: edges are hidden less


def test_property_a_rows_mask_depends_on_neither_neighbours_nor_padding() -> None:
    rows, lengths = np.array([5, 9, 2]), np.array([30, 22, 40])
    together = span_mask(rows, lengths, 0.1, 4, width=40, seed=0)
    for row, name in enumerate(rows):
        alone = span_mask([name], [lengths[row]], 0.1, 4, width=lengths[row], seed=0)
        assert np.array_equal(together[row, : lengths[row]], alone[0])
        assert not together[row, lengths[row] :].any()
    assert not np.array_equal(together, span_mask(rows, lengths, 0.1, 4, width=40, seed=1))


def test_degenerate_masks() -> None:
    assert span_mask([0], [4], 0.01, 4, width=6, seed=0).tolist() == [[True] * 4 + [False] * 2]
    assert not span_mask([0], [4], 0.0, 4, width=6, seed=0).any()
    assert span_mask(np.empty(0, np.int64), [], 0.5, 2, width=6, seed=0).shape == (0, 6)
    with pytest.raises(ValueError, match="between 5"):
        span_mask([0], [4], 0.1, 5, width=6, seed=0)


def test_property_negatives_are_other_hidden_frames_of_the_row_and_all_of_them_alike() -> None:
    mask = span_mask(np.arange(6), np.full(6, 30), 0.1, 4, width=34, seed=3)
    found = sample_negatives(mask, np.arange(6), 500, seed=3)
    for row in range(6):
        hidden = np.flatnonzero(mask[row])
        for frame in hidden:
            places, counts = np.unique(found[row, frame], return_counts=True)
            assert places.tolist() == [place for place in hidden if place != frame]
            expected = 500 / (len(hidden) - 1)
            assert np.abs(counts - expected).max() < 6 * np.sqrt(expected)
        assert not found[row, ~mask[row]].any()


def test_oracle_negatives_have_the_form_that_transformers_wants() -> None:
    mask = span_mask(np.arange(4), np.full(4, 20), 0.1, 4, width=20, seed=0)
    reference = theirs._sample_negative_indices((4, 20), 7, mask)
    found = sample_negatives(mask, np.arange(4), 7, seed=0)
    assert found.shape == reference.shape
    for row in range(4):
        hidden = set(np.flatnonzero(mask[row]))
        assert set((reference[row][mask[row]] - 20 * row).ravel()) <= hidden
        assert set(found[row][mask[row]].ravel()) <= hidden


def test_property_negatives_do_not_depend_on_padding() -> None:
    mask = span_mask([4], [12], 0.2, 3, width=12, seed=0)
    wide = np.pad(mask, ((0, 0), (0, 9)))
    narrow = sample_negatives(mask, [4], 6, seed=0)
    assert np.array_equal(narrow, sample_negatives(wide, [4], 6, seed=0)[:, :12])
    with pytest.raises(ValueError, match="row 1 has one hidden frame"):
        sample_negatives(np.array([[True, True], [False, True]]), [0, 1], 3, seed=0)


# -- batches


def test_oracle_clips_are_normalised_and_padded_as_the_extractor_does_it(clips: list[Clip]) -> None:
    batch = collate(clips[:3], front(), rows=np.arange(3), masking=Masking(0.1, 3, 4), seed=0)
    waves = [clip.waveform() for clip in clips[:3]]
    expected = tiny_feature_extractor("layer")(waves, sampling_rate=16_000, padding=True, return_tensors="pt")
    assert torch.allclose(batch["input_values"], expected["input_values"], atol=1e-6)
    assert torch.equal(batch["attention_mask"], expected["attention_mask"].long())


def test_property_a_part_of_a_batch_is_that_part_of_the_whole(clips: list[Clip]) -> None:
    stream = SpeechStream(clips, front(), rows=6, masking=Masking(0.1, 3, 4), seed=0, labels=[[3] * 2] * 20)
    whole, part = stream.batch(11), stream.batch(11, 2, 5)
    assert all(torch.equal(whole[name][2:5], part[name]) for name in whole)
    assert whole["step"].tolist() == [11] * 6


def test_property_an_epoch_reads_each_clip_at_most_once_and_the_next_one_in_another_order(clips: list[Clip]) -> None:
    stream = SpeechStream(clips, front(), rows=6, masking=Masking(0.1, 3), seed=0)
    epochs = [stream._order(epoch) for epoch in range(3)]
    assert all(len(set(order.ravel().tolist())) == 18 == order.size for order in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert set(range(20)) == {int(item) for order in epochs for item in order.ravel()}


def test_property_batches_of_like_length_pad_little(clips: list[Clip]) -> None:
    sorted_by_length = SpeechStream(clips, front(), rows=4, masking=Masking(0.1, 3), seed=0)
    order = np.arange(20).reshape(5, 4)
    lengths = np.array([clip.samples for clip in clips])[order]
    assert sorted_by_length.padding < 0.1 < 1 - lengths.sum() / (4 * lengths.max(axis=1).sum())


def test_degenerate_more_rows_than_clips_and_a_changed_fingerprint(clips: list[Clip]) -> None:
    few = SpeechStream(clips[:3], front(), rows=8, masking=Masking(0.1, 3), seed=0)
    assert few.rows == 3
    assert len(few.batch(5)["row"]) == 3
    prints = {
        SpeechStream(some, front(norm), rows=rows, masking=Masking(p, 3), seed=seed).fingerprint
        for some, norm, rows, p, seed in (
            (clips, "group", 4, 0.1, 0),
            (clips[1:], "group", 4, 0.1, 0),
            (clips, "layer", 4, 0.1, 0),
            (clips, "group", 5, 0.1, 0),
            (clips, "group", 4, 0.2, 0),
            (clips, "group", 4, 0.1, 1),
        )
    }
    assert len(prints) == 6
    with pytest.raises(ValueError, match="at least one clip"):
        SpeechStream([], front(), rows=4, masking=Masking(0.1, 3), seed=0)


# -- objectives


@pytest.fixture(params=["group", "layer"])
def norm(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_equation_the_contrastive_loss_by_hand(clips: list[Clip], norm: str) -> None:
    model = tiny_wav2vec2(16, 1, 2, 16, conv=8, codes=4, norm=norm, generator_seed=0)  # type: ignore[arg-type]
    batch = collate(clips[:3], front(norm), rows=np.arange(3), masking=Masking(0.2, 3, 4), seed=0)
    loss = ContrastiveObjective(2.0, 0.5, 0.9, attention_mask=norm == "layer")(model, batch)
    mask = batch["mask_time_indices"]
    attention = batch["attention_mask"] if norm == "layer" else None
    with torch.no_grad():
        seen = model(batch["input_values"], attention_mask=attention, mask_time_indices=mask)
    total = 0.0
    for row, frame in mask.nonzero().tolist():
        c, q = seen.projected_states[row, frame], seen.projected_quantized_states[row]
        others = [q[i] for i in batch["sampled_negative_indices"][row, frame] if not torch.equal(q[i], q[frame])]
        cosines = torch.stack([torch.cosine_similarity(c, other, dim=0) for other in (q[frame], *others)])
        total -= float(torch.log_softmax(cosines / 0.1, dim=0)[0])
    count = int(mask.sum())
    perplexity = float(seen.codevector_perplexity)
    assert int(loss.count) == count
    assert float(loss.metrics["contrastive"]) == pytest.approx(total / count, rel=1e-4)
    assert loss.total.item() == pytest.approx(total + 0.1 * (8 - perplexity) / 8 * count, rel=1e-4)


def test_property_a_cut_batch_sums_to_the_whole(clips: list[Clip]) -> None:
    """But for the diversity term, which is of the micro-batch; negatives stay within their row."""
    model = tiny_wav2vec2(16, 1, 2, 16, conv=8, codes=4, norm="layer", generator_seed=0)
    model.config.diversity_loss_weight = 0.0
    batch = collate(clips[:4], front("layer"), rows=np.arange(4), masking=Masking(0.2, 3, 4), seed=0)
    objective = ContrastiveObjective(2.0, 0.5, 0.9, attention_mask=True)
    whole = objective(model, batch)
    parts = [objective(model, {name: value[i : i + 2] for name, value in batch.items()}) for i in (0, 2)]
    assert sum(float(part.total) for part in parts) == pytest.approx(float(whole.total), rel=1e-4)
    assert sum(int(part.count) for part in parts) == int(whole.count)


def test_property_layer_normed_models_do_not_see_padding_and_group_normed_ones_get_no_mask(clips: list[Clip]) -> None:
    class Recorder(torch.nn.Module):
        def forward(self, input_values: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
            self.given = given
            return given  # type: ignore[return-value]

    batch = collate(clips[:2], front(), rows=np.arange(2), masking=Masking(0.2, 3, 4), seed=0)
    for wanted in (False, True):
        recorder = Recorder()
        with pytest.raises(AttributeError):  # it returns no loss
            ContrastiveObjective(2.0, 0.5, 0.9, attention_mask=wanted)(recorder, batch)
        assert (recorder.given["attention_mask"] is not None) == wanted


def test_equation_the_temperature_is_a_function_of_the_step(clips: list[Clip]) -> None:
    # 2 * 0.5^0, ^1, ^2 = 2, 1, 0.5, then the floor of 0.3.
    steps = torch.tensor([0, 1, 2, 9])
    assert gumbel_temperature(steps, 2.0, 0.3, 0.5).tolist() == pytest.approx([2.0, 1.0, 0.5, 0.3])
    late = gumbel_temperature(torch.tensor(100_000), 2.0, 0.5, 0.999995)
    assert float(late) == pytest.approx(2.0 * 0.999995**100_000, rel=1e-6)
    model = tiny_wav2vec2(16, 1, 2, 16, conv=8, codes=4, generator_seed=0)
    stream = SpeechStream(clips, front(), rows=2, masking=Masking(0.2, 3, 4), seed=0)
    ContrastiveObjective(2.0, 0.3, 0.5, attention_mask=False)(model, stream.batch(1))
    assert float(model.quantizer.temperature) == 1.0


@pytest.mark.parametrize("attention", [False, True])
def test_oracle_ctc_is_transformers_own_loss(clips: list[Clip], attention: bool) -> None:
    norm = "layer" if attention else "group"
    pretrained = tiny_wav2vec2(16, 1, 2, 16, conv=8, codes=4, norm=norm, generator_seed=0)  # type: ignore[arg-type]
    config = pretrained.config
    config.vocab_size, config.pad_token_id, config.ctc_loss_reduction = 6, 0, "sum"
    with torch.random.fork_rng():
        model = Wav2Vec2ForCTC(config).eval()
    labels = [[3, 4, 3], [5], [3, 3]]
    # Of one length where there is no attention mask: transformers would else count padding as speech.
    some = clips[:3] if attention else [clips[0]] * 3
    batch = collate(some, front(norm), rows=np.arange(3), masking=Masking(0.0, 3), seed=0, labels=labels)
    loss = CTCObjective(KERNELS, STRIDES, blank=0, attention_mask=attention)(model, batch)
    reference = model(
        batch["input_values"], attention_mask=batch["attention_mask"] if attention else None, labels=batch["labels"]
    )
    assert float(loss.total) == pytest.approx(float(reference.loss), rel=1e-5)
    assert int(loss.count) == 6


def test_property_ctc_hides_what_it_was_told_in_training_and_nothing_in_evaluation(clips: list[Clip]) -> None:
    config = tiny_wav2vec2(16, 1, 2, 16, conv=8, codes=4, generator_seed=0).config
    config.vocab_size, config.pad_token_id = 6, 0
    with torch.random.fork_rng():
        model = Wav2Vec2ForCTC(config)
    objective = CTCObjective(KERNELS, STRIDES, blank=0, attention_mask=False)
    losses = {}
    for training in (True, False):
        for probability in (0.0, 0.3):
            masking = Masking(probability, 3)
            batch = collate(clips[:2], front(), rows=np.arange(2), masking=masking, seed=0, labels=[[3, 4], [5]])
            losses[training, probability] = float(objective(model.train(training), batch).total)
    assert losses[True, 0.0] == losses[False, 0.0] == losses[False, 0.3] != losses[True, 0.3]


def test_property_a_tiny_model_follows_its_seed_and_opens_again(tmp_path: Path) -> None:
    from transformers import Wav2Vec2ForPreTraining

    first, again, other = (tiny_wav2vec2(16, 1, 2, 16, conv=8, codes=4, generator_seed=seed) for seed in (0, 0, 1))
    before = torch.random.get_rng_state()
    tiny_wav2vec2(16, 1, 2, 16, conv=8, codes=4, generator_seed=5)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.project_q.weight, other.project_q.weight)
    first.save_pretrained(tmp_path)
    opened = Wav2Vec2ForPreTraining.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), opened.parameters(), strict=True))
    with pytest.raises(ValueError, match="hidden must be a multiple"):
        tiny_wav2vec2(hidden=18, generator_seed=0)
