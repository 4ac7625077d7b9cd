"""Audio by reference: read whatever form it has, at the model's rate, once; kept in the user cache as 16-bit samples.

A reference names a folder of sound files (with ``metadata.jsonl`` or ``metadata.csv`` beside them, as the Hub's audio
folders have it, or a ``.txt`` of the same name beside each), a jsonl, csv or Parquet file, or a Hub data set.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from headwater.core.cache import atomic_write_text, cache_dir, cache_key
from headwater.core.recipe import DataRef, Name
from headwater.modalities.text.docs import CorpusError

__all__ = [
    "AudioRef",
    "Clip",
    "Speech",
    "cut",
    "decode_audio",
    "fingerprint",
    "open_speech",
    "resample",
    "usable",
]

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
SILENT = 1e-4
"""Highest absolute sample, full scale being 1, below which a clip holds nothing."""
FORMAT = 1


class AudioRef(DataRef):
    """Recordings, with or without their transcripts."""

    input_field: Name = Field(default="audio", description="column with the audio; in a folder, the file's name")
    label_field: Name = Field(default="text", description="column with the transcript, if there is one")


@dataclass(frozen=True)
class Clip:
    """A stretch of one recording.

    Attributes:
        id: of the recording, and of the piece where it was cut.
        recording: id of the whole, by which sets are split.
        text: its transcript, or None.
        path: of the file of samples.
        offset, samples: where it lies in that file and how long it is.
        scale: what full scale of a stored sample stands for.
        digest: of the recording's samples: equal recordings, equal digest.
    """

    id: str
    recording: str
    text: str | None
    path: str
    offset: int
    samples: int
    scale: float
    digest: str

    def waveform(self) -> NDArray[np.float32]:
        """Its samples, ``(samples,)`` float32."""
        stored = _samples(self.path)[self.offset : self.offset + self.samples]
        return stored.astype(np.float32) * np.float32(self.scale / 32767)


@lru_cache(maxsize=16)
def _samples(path: str) -> NDArray[np.int16]:
    return np.memmap(path, dtype="<i2", mode="r")


@dataclass(frozen=True)
class Speech:
    """What a reference held.

    Attributes:
        clips: one for each recording, in the order in which they were read.
        counts: recordings by what was done with them: ``silent`` ones are dropped, ``resampled`` and ``stereo`` ones
            are converted.
    """

    clips: tuple[Clip, ...]
    counts: dict[str, int]


def open_speech(ref: AudioRef, *, role: str, rate: int = 16_000) -> Speech:
    """The recordings that ``ref`` names, decoded to one channel at ``rate``.

    Local files that have not changed (by size and time) and Hub data sets of a fixed revision are decoded once per
    machine, two bytes a sample; other sources are read again each time.

    Args:
        ref: where they are.
        role: what to call it in errors, such as ``labelled``.
        rate: in Hz.

    Raises:
        CorpusError: nothing there, no such column, or a file that cannot be decoded; it is named.
        ImportError: soundfile is not installed.
    """
    stamp = _stamp(ref)
    about = {"ref": ref.model_dump(mode="json"), "stamp": stamp, "rate": rate, "format": FORMAT}
    target = cache_dir("speech") / cache_key(about)
    if stamp is None or not (target / "index.json").exists():
        working = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.rmtree(working, ignore_errors=True)
        try:
            found = _write(ref, working, role, rate)
            if stamp is None:  # what was read names it, so that nobody's samples are replaced while they are in use
                target = cache_dir("speech") / cache_key([about, found])
            if not (target / "index.json").exists():
                shutil.rmtree(target, ignore_errors=True)
                working.rename(target)
        finally:
            shutil.rmtree(working, ignore_errors=True)
    index = json.loads((target / "index.json").read_text(encoding="utf-8"))
    path = str(target / "samples.i16")
    return Speech(tuple(Clip(**clip, path=path) for clip in index["clips"]), index["counts"])


def _write(ref: AudioRef, working: Path, role: str, rate: int) -> str:
    working.mkdir(parents=True)
    counts: Counter[str] = Counter()
    clips: list[dict[str, Any]] = []  # Any: JSON data
    seen: set[str] = set()
    offset = 0
    with (working / "samples.i16").open("wb") as stream:
        for number, (place, audio, id, text) in enumerate(_rows(ref, role)):
            if ref.limit is not None and number == ref.limit:
                break
            samples, found = decode_audio(audio, place=f"{role}: {place}")
            if samples.ndim == 2:
                counts["stereo"] += 1
                samples = samples.mean(axis=1)
            if found != rate:
                counts["resampled"] += 1
                samples = resample(samples, found, rate)
            peak = float(np.abs(samples).max(initial=0.0))
            if peak < SILENT:
                counts["silent"] += 1
                continue
            scale = max(1.0, peak)
            data = np.round(samples / scale * 32767).astype("<i2").tobytes()
            stream.write(data)
            if id in seen:
                id = f"{id}#{number}"
            seen.add(id)
            digest = hashlib.blake2b(data, digest_size=16).hexdigest()
            clip = Clip(id, id, text, "", offset, len(samples), scale, digest)
            clips.append({name: value for name, value in asdict(clip).items() if name != "path"})
            offset += len(samples)
        stream.flush()
        os.fsync(stream.fileno())
    if not clips:
        raise CorpusError(
            f"{role}: no audio that can be used in {ref.name} ({counts['silent']} silent recordings). A folder needs "
            f"files that end in {', '.join(SUFFIXES)}."
        )
    atomic_write_text(working / "index.json", json.dumps({"clips": clips, "counts": dict(counts)}))
    return cache_key(clips)


def decode_audio(value: Any, *, place: str = "audio") -> tuple[NDArray[np.float32], int]:  # Any: see Args
    """Samples and sampling rate of one recording.

    Args:
        value: a path; the bytes of a sound file; or a mapping, as `datasets` has it: ``array`` and ``sampling_rate``,
            or ``bytes`` or ``path``.
        place: what to call it in errors.

    Returns:
        ``(samples,)``, or ``(samples, channels)`` where there are several, float32; and Hz.

    Raises:
        CorpusError: no audio in it, no such file, or one that libsndfile cannot decode.
        ImportError: soundfile is not installed.
    """
    if isinstance(value, Mapping) and value.get("array") is not None:
        samples, rate = np.asarray(value["array"], dtype=np.float32), int(value["sampling_rate"])
        # Models' own tools put channels first; sound files put them last. There are always more samples than channels.
        samples = samples.T if samples.ndim == 2 and samples.shape[0] < samples.shape[1] else samples
    else:
        samples, rate = _decode(value, place)
    if samples.ndim == 2 and samples.shape[1] == 1:
        samples = samples[:, 0]
    if samples.ndim not in (1, 2) or rate <= 0:
        raise CorpusError(f"{place}: expected samples in one or two dimensions; got {samples.shape} at {rate} Hz.")
    if not np.isfinite(samples).all():
        raise CorpusError(f"{place}: holds samples that are not finite. Repair or remove the recording.")
    return samples, rate


def _decode(value: Any, place: str) -> tuple[NDArray[np.float32], int]:  # Any: see decode_audio
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("audio needs soundfile: pip install 'headwater[speech]'.") from error
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (str, Path)):
        if not Path(value).is_file():
            raise CorpusError(f"{place}: no file {value}.")
        source: Any = str(value)
    elif isinstance(value, bytes):
        source = io.BytesIO(value)
    else:
        raise CorpusError(
            f"{place}: holds {type(value).__name__}; expected audio (a path, bytes, or a mapping with array and "
            "sampling_rate). Name the column in input_field."
        )
    try:
        samples, rate = soundfile.read(source, dtype="float32")
    except soundfile.LibsndfileError as error:
        raise CorpusError(f"{place}: cannot be decoded ({error}). Convert it to wav or flac.") from error
    return samples, rate


def resample(samples: NDArray[np.float32], rate: int, wanted: int) -> NDArray[np.float32]:
    """Change the sampling rate by a polyphase filter; ``(samples,)`` float32, of length ceil(n wanted / rate).

    Raises:
        ValueError: a rate that is not positive.
    """
    if rate <= 0 or wanted <= 0:
        raise ValueError(f"sampling rates must be positive; got {rate} and {wanted}.")
    if rate == wanted or not len(samples):
        return samples
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    return np.asarray(resample_poly(samples, wanted // common, rate // common), dtype=np.float32)


# -- where recordings come from ----------------------------------------------------------------------------------------

_Row = tuple[str, Any, str, str | None]  # a place to name in errors, the audio, an id, the transcript


def _rows(ref: AudioRef, role: str) -> Iterator[_Row]:
    if ref.kind == "hub":
        yield from _table(_hub_rows(ref), ref, None)
        return
    if ref.kind != "local":
        raise CorpusError(f"{role}: there is no audio called {ref.name!r}; give a folder, a file or a Hub data set.")
    path = ref.path
    if not path.exists():
        raise CorpusError(f"{role}: no such file or folder: {path}.")
    if path.is_file():
        yield from _table(_file_rows(path, role), ref, path.parent)
        return
    for name in ("metadata.jsonl", "metadata.csv"):
        if (path / name).exists():
            yield from _table(_file_rows(path / name, role), ref, path)
            return
    for file in sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES):
        beside = file.with_suffix(".txt")
        text = beside.read_text(encoding="utf-8") if beside.exists() else None
        yield str(file), file, file.relative_to(path).with_suffix("").as_posix(), text


def _file_rows(path: Path, role: str) -> Iterator[Mapping[str, Any]]:
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as stream:
            yield from (json.loads(line) for line in stream if line.strip())
    elif path.suffix == ".csv":
        import csv

        with path.open(encoding="utf-8", newline="") as stream:
            yield from csv.DictReader(stream)
    elif path.suffix == ".parquet":
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(path).iter_batches(batch_size=64):
            yield from batch.to_pylist()
    elif path.suffix.lower() in SUFFIXES:
        yield {"audio": path.name, "file_name": path.name}
    else:
        raise CorpusError(f"{role}: {path} is neither a folder nor a jsonl, csv, Parquet or sound file.")


def _hub_rows(ref: AudioRef) -> Iterable[Mapping[str, Any]]:
    from datasets import Audio, load_dataset

    dataset = load_dataset(ref.name, ref.config, split=ref.split, revision=ref.revision, streaming=True)
    if isinstance((dataset.features or {}).get(ref.input_field), Audio):
        # Decoded here: datasets would want torchcodec for it.
        dataset = dataset.cast_column(ref.input_field, Audio(decode=False))
    rows: Iterable[Mapping[str, Any]] = dataset
    return rows


def _table(rows: Iterable[Mapping[str, Any]], ref: AudioRef, root: Path | None) -> Iterator[_Row]:
    for number, row in enumerate(rows):
        column = ref.input_field if ref.input_field in row else "file_name"
        if column not in row:
            raise CorpusError(
                f"row {number} of {ref.name}: no column {ref.input_field!r}; available: {', '.join(row)}."
            )
        audio, text = row[column], row.get(ref.label_field)
        if isinstance(audio, str) and root is not None:
            audio = _inside(root, audio, f"row {number} of {ref.name}")
        named = row.get("id") or row.get("file_name") or (audio.get("path") if isinstance(audio, Mapping) else None)
        yield f"row {number} of {ref.name}", audio, str(named or f"row-{number}"), None if text is None else str(text)


def _inside(root: Path, name: str, place: str) -> Path:
    """A path that data name: absolute as it stands, relative within the folder of the file that names it."""
    path = Path(name)
    if not path.is_absolute() and not (root / path).resolve().is_relative_to(root.resolve()):
        raise CorpusError(f"{place}: {name!r} leads out of {root}. Write the absolute path if that is meant.")
    return root / path


def _stamp(ref: AudioRef) -> list[list[Any]] | None:  # Any: JSON data
    """What changes when the source does; None where that is not known."""
    if ref.kind == "hub":
        return [[ref.revision]] if ref.revision is not None else None
    path = ref.path
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    if path.is_file() and path.suffix.lower() not in (".parquet", *SUFFIXES):
        return None  # it may name files anywhere
    return [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in files]


# -- sets of clips -----------------------------------------------------------------------------------------------------


def cut(clips: Iterable[Clip], longest: int) -> list[Clip]:
    """Clips of at most ``longest`` samples: longer ones in equal pieces, without a transcript.

    Raises:
        ValueError: ``longest`` is not positive.
    """
    if longest < 1:
        raise ValueError(f"longest must be >= 1 sample; got {longest}.")
    found = []
    for clip in clips:
        pieces = math.ceil(clip.samples / longest)
        if pieces == 1:
            found.append(clip)
            continue
        edges = [clip.samples * piece // pieces for piece in range(pieces + 1)]
        found += [
            replace(clip, id=f"{clip.id}@{begin}", text=None, offset=clip.offset + begin, samples=end - begin)
            for begin, end in itertools.pairwise(edges)
        ]
    return found


def usable(clips: Sequence[Clip], shortest: int, *, role: str) -> list[Clip]:
    """The clips of at least ``shortest`` samples.

    Raises:
        CorpusError: there is none.
    """
    kept = [clip for clip in clips if clip.samples >= shortest]
    if not kept:
        longest = max((clip.samples for clip in clips), default=0)
        raise CorpusError(
            f"{role}: all of {len(clips)} clips are shorter than the {shortest} samples that the model and the mask "
            f"need; the longest has {longest}. Give longer clips, or lower mask_length."
        )
    return kept


def fingerprint(clips: Iterable[Clip]) -> str:
    """Thirty-two hexadecimal digits that change with any sample, transcript or id, or the order."""
    digest = hashlib.blake2b(digest_size=16)
    for clip in clips:
        digest.update(json.dumps([clip.id, clip.text, clip.digest, clip.samples]).encode())
    return digest.hexdigest()
