"""Audio in whatever form: what is read, converted, dropped and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headwater.modalities.speech.audio import (
    AudioRef,
    cut,
    decode_audio,
    fingerprint,
    open_speech,
    resample,
    usable,
)
from headwater.modalities.text.docs import CorpusError

soundfile = pytest.importorskip("soundfile")


def tone(seconds: float = 0.5, rate: int = 16_000, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def opened(path: Path, **fields: Any) -> Any:
    return open_speech(AudioRef(name=str(path), **fields), role="audio")


def test_property_every_form_of_a_recording_gives_the_same_samples(tmp_path: Path) -> None:
    for suffix in ("wav", "flac"):
        soundfile.write(tmp_path / f"a.{suffix}", tone(), 16_000, subtype="PCM_16")
    data = (tmp_path / "a.wav").read_bytes()
    forms = [
        str(tmp_path / "a.wav"),
        tmp_path / "a.flac",
        data,
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(tmp_path / "a.wav")},
        {"array": tone().tolist(), "sampling_rate": 16_000},
    ]
    for form in forms:
        samples, rate = decode_audio(form)
        assert rate == 16_000
        assert samples.shape == (8000,)
        assert np.abs(samples - tone()).max() < 2 / 32768


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_oracle_a_tone_stays_the_same_tone_at_the_models_rate(rate: int) -> None:
    found, expected = resample(tone(rate=rate), rate, 16_000), tone()
    assert len(found) == len(expected)
    middle = slice(800, -800)  # the filter rings at the edges
    assert np.abs(found[middle] - expected[middle]).max() < 0.01


def test_property_stereo_is_averaged_and_both_conversions_are_counted(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.stack([tone(rate=8000), 0 * tone(rate=8000)], axis=1), 8_000)
    soundfile.write(tmp_path / "b.wav", tone(), 16_000)
    speech = opened(tmp_path)
    assert speech.counts == {"stereo": 1, "resampled": 1}
    first, second = (clip.waveform() for clip in speech.clips)
    assert len(first) == len(second) == 8000
    assert np.abs(first[800:-800] - second[800:-800] / 2).max() < 0.01
    channels_first = {"array": np.stack([tone(), tone()]), "sampling_rate": 16_000}
    assert decode_audio(channels_first)[0].shape == (8000, 2)


def test_property_loud_floats_survive_being_kept_in_sixteen_bits(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", 4 * tone(), 16_000, subtype="FLOAT")
    assert np.abs(opened(tmp_path).clips[0].waveform() - 4 * tone()).max() < 4 / 32768


def test_property_silence_is_dropped_and_counted(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", 1e-5 * tone(), 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "b.wav", tone(), 16_000)
    speech = opened(tmp_path)
    assert [clip.id for clip in speech.clips] == ["b"]
    assert speech.counts == {"silent": 1}
    (tmp_path / "b.wav").unlink()
    with pytest.raises(CorpusError, match=r"audio: no audio that can be used .* \(1 silent"):
        opened(tmp_path)


def test_property_a_folder_may_hold_texts_beside_its_files_or_in_a_table(tmp_path: Path) -> None:
    beside, table = tmp_path / "beside", tmp_path / "table"
    for folder in (beside, table):
        folder.mkdir()
        soundfile.write(folder / "a.wav", tone(), 16_000)
    (beside / "a.txt").write_text("one two")
    (table / "metadata.csv").write_text("file_name,text\na.wav,one two\n")
    for folder in (beside, table):
        assert [clip.text for clip in opened(folder).clips] == ["one two"]
    assert opened(table, label_field="translation").clips[0].text is None


def test_property_parquet_as_datasets_writes_it(tmp_path: Path) -> None:
    import pandas as pd

    soundfile.write(tmp_path / "a.wav", tone(), 16_000)
    rows = [{"audio": {"bytes": (tmp_path / "a.wav").read_bytes(), "path": f"{i}.wav"}, "text": str(i)} for i in (1, 2)]
    pd.DataFrame(rows).to_parquet(tmp_path / "set.parquet")
    clips = opened(tmp_path / "set.parquet").clips
    assert [(clip.id, clip.text, clip.samples) for clip in clips] == [("1.wav", "1", 8000), ("2.wav", "2", 8000)]
    assert len(opened(tmp_path / "set.parquet", limit=1).clips) == 1


def test_property_a_changed_file_is_read_again_and_an_unchanged_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import headwater.modalities.speech.audio as module

    soundfile.write(tmp_path / "a.wav", tone(), 16_000)
    first = opened(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "decode_audio", None)  # nothing may be decoded again
        assert opened(tmp_path) == first
    soundfile.write(tmp_path / "a.wav", tone(0.7), 16_000)
    second = opened(tmp_path)
    assert second.clips[0].samples == 11_200
    assert first.clips[0].samples == len(first.clips[0].waveform()) == 8000
    assert fingerprint(first.clips) != fingerprint(second.clips)


def test_property_long_recordings_are_cut_and_nothing_is_lost(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(2.5), 16_000)
    whole = opened(tmp_path).clips
    pieces = cut(whole, 16_000)
    assert [piece.samples for piece in pieces] == [13_333, 13_333, 13_334]
    assert {piece.recording for piece in pieces} == {"a"}
    assert len({piece.id for piece in pieces}) == 3
    joined = np.concatenate([piece.waveform() for piece in pieces])
    assert np.array_equal(joined, whole[0].waveform())
    assert cut(whole, 40_000) == list(whole)


def test_rejects_what_is_no_audio(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"RIFF nonsense")
    with pytest.raises(CorpusError, match=r"a.wav: cannot be decoded .* Convert it to wav or flac"):
        opened(tmp_path)
    with pytest.raises(CorpusError, match="no such file or folder"):
        opened(tmp_path / "nowhere.jsonl")
    with pytest.raises(CorpusError, match="holds int; expected audio"):
        decode_audio(3)
    with pytest.raises(CorpusError, match="not finite"):
        decode_audio({"array": [0.0, float("nan")], "sampling_rate": 16_000})
    with pytest.raises(CorpusError, match="no file"):
        decode_audio(str(tmp_path / "gone.wav"))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"sound": "a.wav"}) + "\n")
    with pytest.raises(CorpusError, match="no column 'audio'; available: sound"):
        opened(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="must be positive"):
        resample(tone(), 0, 16_000)


def test_rejects_a_name_that_leads_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "secret.wav", tone(), 16_000)
    (tmp_path / "in" / "metadata.jsonl").write_text(json.dumps({"file_name": "../secret.wav"}) + "\n")
    with pytest.raises(CorpusError, match="leads out of"):
        opened(tmp_path / "in")


def test_rejects_clips_that_are_all_too_short(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(0.1), 16_000)
    clips = opened(tmp_path).clips
    assert usable(clips, 1600, role="audio") == list(clips)
    with pytest.raises(CorpusError, match=r"all of 1 clips are shorter than the 1601 samples.* the longest has 1600"):
        usable(clips, 1601, role="audio")
