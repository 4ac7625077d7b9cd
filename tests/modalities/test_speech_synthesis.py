"""Formants, labels and languages: what the synthetic speech promises."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.signal import find_peaks

from headwater.modalities.speech.languages import language, utterance, write_corpus
from headwater.modalities.speech.synthesis import (
    PHONES,
    RATE,
    SILENCE,
    Speaker,
    Spoken,
    _glottal,
    _resonate,
    frame_labels,
    speaker,
    synthesise,
)

VOICE = Speaker(pitch=110.0, formant_scale=1.0, rate=1.0, snr=60.0)


def spectrum(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    power = np.abs(np.fft.rfft(samples * np.hanning(len(samples)))) ** 2
    return np.fft.rfftfreq(len(samples), 1 / RATE), power


def middle_of(spoken: Spoken, number: int) -> np.ndarray:
    begin, end = ([0, *spoken.ends.tolist()])[number : number + 2]
    quarter = (end - begin) // 4
    return spoken.audio[begin + quarter : end - quarter]


def test_oracle_a_resonator_has_the_response_of_its_transfer_function() -> None:
    # H(z) = (1 - b - c) / (1 - b z^-1 - c z^-2), b = 2 r cos w, c = -r^2, r = exp(-pi B / rate).
    impulse = np.zeros(160 * 60)
    impulse[0] = 1.0
    found = np.abs(np.fft.rfft(_resonate(impulse, np.full((60, 1), 700.0), 90.0)))
    r, w = np.exp(-np.pi * 90 / RATE), 2 * np.pi * 700 / RATE
    b, c = 2 * r * np.cos(w), -(r**2)
    z = np.exp(-2j * np.pi * np.fft.rfftfreq(len(impulse), 1 / RATE) / RATE)
    assert np.allclose(found, np.abs((1 - b - c) / (1 - b * z - c * z**2)), rtol=1e-5)


def test_property_filtering_frame_by_frame_is_filtering_at_once() -> None:
    noise = np.random.default_rng(0).standard_normal(160 * 20)
    same = np.full((20, 1), 700.0)
    almost = same + 1e-9 * np.arange(20)[:, None]  # other resonators in every frame, and the same to nine digits
    assert np.allclose(_resonate(noise, same, 90.0), _resonate(noise, almost, 90.0), atol=1e-6)


@pytest.mark.parametrize("vowel", ["i", "a", "u", "E"])
def test_oracle_a_vowel_is_loudest_within_its_first_two_formants(vowel: str) -> None:
    spoken = synthesise([vowel] * 5, VOICE, seed=0)
    frequencies, power = spectrum(spoken.audio)
    first, second, _ = PHONES[vowel].formants
    near = (np.abs(frequencies - first) < 150) | (np.abs(frequencies - second) < 200)
    assert power[near].sum() > 0.8 * power[frequencies > 100].sum()


@pytest.mark.parametrize("pitch", [100.0, 200.0])
def test_oracle_the_pulses_come_at_the_speakers_pitch(pitch: float) -> None:
    source = _glottal(np.ones(200), pitch, seed=1)  # two seconds
    peaks, _ = find_peaks(source, height=0.5 * source.max(), distance=20)
    assert len(peaks) / 2 == pytest.approx(pitch, rel=0.1)  # it falls and wobbles
    begin, end = np.diff(peaks[:20]).mean(), np.diff(peaks[-20:]).mean()
    assert end > begin, "it falls"


def test_property_fricatives_hiss_where_their_noise_is_and_stops_are_silent_before_they_burst() -> None:
    spoken = synthesise(["a", "s", "a", "t", "a"], VOICE, seed=0)
    frequencies, power = spectrum(middle_of(spoken, 1))
    assert frequencies[power.argmax()] > 4000
    begin, end = spoken.ends[2], spoken.ends[3]
    stop = spoken.audio[begin:end]
    closure, burst = stop[len(stop) // 3 : len(stop) // 2], stop[-320:]
    assert np.abs(closure).mean() < 0.2 * np.abs(burst).mean()


def test_equation_frame_labels_take_the_phone_at_the_centre() -> None:
    # Frames of 400 samples every 320: centres 200, 520, 840, 1160. A phone ends before its end: 520 and 1000.
    spoken = Spoken(np.zeros(1500, np.float32), (SILENCE, "a", "s"), np.array([520, 1000, 1500]))
    order = list(PHONES)
    found = frame_labels(spoken, 4, stride=320, receptive=400)
    assert [order[i] for i in found] == [SILENCE, "a", "a", "s"]


def test_property_the_same_seed_says_the_same_and_others_do_not() -> None:
    first, again = (synthesise(["s", "a"], VOICE, seed=3).audio for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, synthesise(["s", "a"], VOICE, seed=4).audio[: len(first)])
    assert first.dtype == np.float32
    assert np.abs(first).max() <= 1


def test_property_rate_and_formant_scale_do_what_they_say() -> None:
    slow, fast = (len(synthesise(["a"] * 6, Speaker(110, 1, rate, 60), seed=0).audio) for rate in (0.8, 1.25))
    assert slow / fast == pytest.approx(1.25 / 0.8, rel=0.1)
    voices = [speaker(0, number) for number in range(200)]
    assert 90 <= min(v.pitch for v in voices) < max(v.pitch for v in voices) <= 240
    assert 0.85 <= min(v.formant_scale for v in voices) < max(v.formant_scale for v in voices) <= 1.15
    assert np.corrcoef([v.pitch for v in voices], [v.formant_scale for v in voices])[0, 1] > 0.2


def test_property_what_is_said_can_be_read_off_the_spectrum() -> None:
    """A linear probe on log spectra finds most phones of new speakers, or no model could."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    of = language("A", seed=1)
    sides = []
    for first in (0, 500):
        features, labels = [], []
        for index in range(25):
            said = utterance(of, first + index, first_speaker=first).spoken
            count = (len(said.audio) - 400) // 160 + 1
            windows = np.lib.stride_tricks.sliding_window_view(said.audio, 400)[::160][:count]
            power = np.abs(np.fft.rfft(windows * np.hanning(400)))[:, :200].reshape(count, 40, 5).mean(2)
            features.append(np.log(power + 1e-3))
            labels.append(frame_labels(said, count, stride=160, receptive=400))
        sides.append((np.concatenate(features), np.concatenate(labels)))
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(*sides[0])
    loud = sides[1][1] != list(PHONES).index(SILENCE)
    assert probe.score(sides[1][0][loud], sides[1][1][loud]) > 0.6


def test_property_languages_share_what_was_asked_for() -> None:
    a = language("A", seed=2)
    for share, vowels, consonants in ((0.0, 0, 0), (0.5, 2, 4), (1.0, 4, 8)):
        other = language("B", like=[a], share=share, vowels=4, consonants=8, seed=2)
        common = set(other.phonemes) & set(a.phonemes)
        kinds = [PHONES[phoneme].kind == "vowel" for phoneme in common]
        assert (sum(kinds), len(kinds) - sum(kinds)) == (vowels, consonants)
        assert len(set(other.phonemes)) == 12


def test_property_writing_is_one_character_a_phoneme_some_of_them_shared() -> None:
    for seed in range(5):
        of = language("A", merged=3, seed=seed)
        assert set(of.spelling) == set(of.phonemes)
        assert all(len(character) == 1 for character in of.spelling.values())
        shared = len(of.phonemes) - len(set(of.spelling.values()))
        assert 1 <= shared <= 3
        assert len(set(language("A", merged=0, seed=seed).spelling.values())) == len(of.phonemes)


def test_property_words_differ_and_a_longer_lexicon_begins_as_a_shorter_one() -> None:
    few, many = (language("A", words=words, seed=0).words for words in (10, 60))
    assert many[:10] == few
    assert len(set(many)) == 60
    lexicons = [set(language(name, seed=0).words) for name in "ABC"]
    assert all(len(a & b) < 10 for a, b in combinations(lexicons, 2))


def test_property_an_utterance_is_its_index_and_common_words_come_first() -> None:
    of = language("A", seed=0)
    again = utterance(of, 7)
    assert np.array_equal(utterance(of, 7).spoken.audio, again.spoken.audio)
    assert again.text.count(" ") == 1
    said = " ".join(utterance(of, i, words=6).text for i in range(25)).split()
    early = {of.spell(word) for word in of.words[:20]}
    assert np.mean([word in early for word in said]) > 0.45  # 20 of 60 words at weight 1 / (rank + 5): 0.58
    assert {utterance(of, i, speakers=3, first_speaker=10).speaker for i in range(25)} == {10, 11, 12}


def test_property_a_corpus_is_an_audio_folder(tmp_path: Path) -> None:
    import soundfile

    said = [utterance(language("A", seed=0), i, words=1) for i in range(3)]
    write_corpus(tmp_path, said)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [one.text for one in said]
    samples, rate = soundfile.read(tmp_path / rows[1]["file_name"])
    assert rate == RATE
    assert np.abs(samples - said[1].spoken.audio).max() < 2 / 32768


def test_rejects_what_cannot_be_said() -> None:
    with pytest.raises(ValueError, match="phones is empty"):
        synthesise([], VOICE, seed=0)
    with pytest.raises(ValueError, match="no phone 'Q'"):
        synthesise(["Q"], VOICE, seed=0)
    with pytest.raises(ValueError, match="must be positive"):
        synthesise(["a"], Speaker(0.0, 1.0, 1.0, 20.0), seed=0)
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\]; got 1.5"):
        language("A", share=1.5)
    with pytest.raises(ValueError, match="11 phonemes are wanted from 10"):
        language("A", vowels=11)
    with pytest.raises(ValueError, match="index must be >= 0"):
        utterance(language("A"), -1)
