"""A small formant synthesiser: phones in, a waveform and the exact place of every phone out.

    source (glottal pulses at f0, or noise)  ->  resonators at the formants  ->  sum

Each phone is a set of targets: formant frequencies, how much of it is voiced, the band and strength of its noise.
Formants move linearly from phone to phone; a stop is a closure and a burst. A speaker has a pitch, a formant scale
(the length of the vocal tract), a rate and a level of background noise. It does not sound like a person, but what tells
phones apart, and what varies between speakers, is what does so in speech.

Source: Klatt, "Software for a cascade/parallel formant synthesizer", JASA 67(3), 1980: resonators as digital filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.signal import lfilter, sosfilt

from headwater.core.rng import derive_seed, hash_normal, hash_uniform

__all__ = ["PHONES", "RATE", "SILENCE", "Phone", "Speaker", "Spoken", "frame_labels", "speaker", "synthesise"]

RATE = 16_000
SILENCE = "_"
_FRAME = RATE // 100  # 10 ms: formants and levels are constant within one
_BANDWIDTHS = (80.0, 110.0, 160.0)


@dataclass(frozen=True)
class Phone:
    """Targets of one phone.

    Attributes:
        kind: how it is made; ``silence`` is a pause.
        formants: in Hz, for a formant scale of 1.
        voicing: level of the glottal source, 0 to 1.
        noise: level, centre and bandwidth in Hz of its friction or burst.
        seconds: how long it lasts at rate 1.
    """

    kind: Literal["vowel", "nasal", "approximant", "fricative", "stop", "silence"]
    formants: tuple[float, float, float]
    voicing: float
    noise: tuple[float, float, float] = (0.0, 1500.0, 1000.0)
    seconds: float = 0.08


def _vowel(*formants: float) -> Phone:
    return Phone("vowel", (formants[0], formants[1], formants[2]), 1.0, seconds=0.11)


PHONES: dict[str, Phone] = {
    SILENCE: Phone("silence", (500, 1500, 2500), 0.0, seconds=0.1),
    "i": _vowel(280, 2250, 2900),
    "e": _vowel(400, 2050, 2650),
    "E": _vowel(560, 1800, 2500),
    "a": _vowel(740, 1300, 2450),
    "o": _vowel(450, 850, 2400),
    "O": _vowel(600, 950, 2450),
    "u": _vowel(310, 750, 2300),
    "y": _vowel(270, 1850, 2200),
    "2": _vowel(400, 1550, 2250),
    "1": _vowel(320, 1400, 2300),
    "m": Phone("nasal", (250, 1050, 2200), 0.45),
    "n": Phone("nasal", (250, 1550, 2500), 0.45),
    "N": Phone("nasal", (250, 2000, 2800), 0.45),
    "l": Phone("approximant", (360, 1150, 2800), 0.6),
    "r": Phone("approximant", (430, 1250, 1650), 0.6),
    "w": Phone("approximant", (300, 650, 2200), 0.6),
    "j": Phone("approximant", (280, 2200, 3000), 0.6),
    "s": Phone("fricative", (350, 1600, 2600), 0.0, (0.5, 6200, 1800), 0.1),
    "S": Phone("fricative", (350, 1800, 2500), 0.0, (0.5, 3300, 1300), 0.1),
    "f": Phone("fricative", (350, 1100, 2300), 0.0, (0.18, 4500, 5000), 0.09),
    "x": Phone("fricative", (350, 1500, 2400), 0.0, (0.35, 1700, 700), 0.09),
    "z": Phone("fricative", (350, 1600, 2600), 0.3, (0.3, 6200, 1800), 0.08),
    "Z": Phone("fricative", (350, 1800, 2500), 0.3, (0.3, 3300, 1300), 0.08),
    "v": Phone("fricative", (350, 1100, 2300), 0.35, (0.1, 4500, 5000), 0.07),
    "p": Phone("stop", (400, 800, 2200), 0.0, (0.5, 900, 800), 0.09),
    "t": Phone("stop", (400, 1700, 2600), 0.0, (0.7, 4300, 1800), 0.09),
    "k": Phone("stop", (400, 1900, 2300), 0.0, (0.6, 2000, 700), 0.09),
    "b": Phone("stop", (300, 800, 2200), 0.25, (0.3, 900, 800), 0.07),
    "d": Phone("stop", (300, 1700, 2600), 0.25, (0.4, 4300, 1800), 0.07),
    "g": Phone("stop", (300, 1900, 2300), 0.25, (0.35, 2000, 700), 0.07),
}
"""The inventory, by a symbol like SAMPA's. Formants are rounded averages of an adult's."""


@dataclass(frozen=True)
class Speaker:
    """Who speaks.

    Attributes:
        pitch: fundamental frequency in Hz.
        formant_scale: factor on all formants; above 1 for a shorter vocal tract.
        rate: factor on speed.
        snr: signal to background noise in dB.
    """

    pitch: float
    formant_scale: float
    rate: float
    snr: float


def speaker(seed: int, number: int) -> Speaker:
    """Speaker ``number`` of an endless population: 90 to 240 Hz, formants and rate within 15 %, 20 to 40 dB."""
    pitch, scale, rate, snr = hash_uniform(derive_seed(seed, "speaker"), [number], 4)[0]
    high = 90 * (240 / 90) ** pitch
    # Shorter tracts go with higher voices; the draw of its own keeps the two apart.
    return Speaker(float(high), float(0.85 + 0.2 * scale + 0.1 * pitch), float(0.85 + 0.3 * rate), float(20 + 20 * snr))


@dataclass(frozen=True)
class Spoken:
    """A waveform and what is said in it.

    Attributes:
        audio: ``(samples,)`` float32 at 16 kHz, within [-1, 1].
        phones: symbol of each segment.
        ends: sample at which each segment ends, ``(segments,)`` int64; the first begins at 0.
    """

    audio: NDArray[np.float32]
    phones: tuple[str, ...]
    ends: NDArray[np.int64]


def synthesise(phones: Sequence[str], voice: Speaker, *, seed: int) -> Spoken:
    """Speak a sequence of phones.

    Args:
        phones: symbols of ``PHONES``.
        voice: who speaks.
        seed: of durations, pitch and noise; the same seed gives the same samples.

    Raises:
        ValueError: no phone, an unknown one, or a voice with a number that is not positive.
    """
    if not phones:
        raise ValueError("nothing to say: phones is empty.")
    if unknown := [phone for phone in phones if phone not in PHONES]:
        raise ValueError(f"no phone {unknown[0]!r}; there are {' '.join(PHONES)}.")
    if min(voice.pitch, voice.formant_scale, voice.rate) <= 0:
        raise ValueError(f"pitch, formant_scale and rate must be positive; got {voice}.")
    targets = [PHONES[phone] for phone in phones]
    stretch = 0.8 + 0.4 * hash_uniform(derive_seed(seed, "durations"), np.arange(len(phones)), 1)[:, 0]
    frames = np.maximum(3, np.round([t.seconds / voice.rate / 0.01 for t in targets] * stretch)).astype(np.int64)
    ends = np.cumsum(frames)
    which = np.repeat(np.arange(len(phones)), frames)
    voicing, friction = _levels(targets, frames)
    noise = hash_normal(derive_seed(seed, "noise"), [0, 1], int(ends[-1]) * _FRAME)
    voiced = _resonate(
        _glottal(voicing, voice.pitch, seed), _tracks(targets, ends, which) * voice.formant_scale, _BANDWIDTHS
    )
    bands = np.array([[t.noise[1] * voice.formant_scale] for t in targets])[which]
    widths = np.array([[t.noise[2]] for t in targets])[which]
    hiss = _resonate(noise[0] * np.repeat(friction, _FRAME), bands, widths)
    audio = voiced / (np.abs(voiced).max() + 1e-9) + hiss / 6
    audio += noise[1] * np.sqrt(np.mean(audio**2)) * 10 ** (-voice.snr / 20)
    return Spoken((0.7 * audio / np.abs(audio).max()).astype(np.float32), tuple(phones), ends * _FRAME)


def _levels(targets: Sequence[Phone], frames: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Levels of voicing and of noise in each 10 ms frame; a stop's noise is a burst in its last 20 ms."""
    voicing, friction = [], []
    for target, count in zip(targets, frames, strict=True):
        open_frames = np.zeros(count)
        open_frames[-2 if target.kind == "stop" else 0 :] = 1.0
        voicing.append(np.full(count, target.voicing))
        friction.append(target.noise[0] * open_frames)
    smooth = np.ones(3) / 3  # 30 ms from one level to the next: a step would click
    return np.convolve(np.concatenate(voicing), smooth, "same"), np.convolve(np.concatenate(friction), smooth, "same")


def _tracks(targets: Sequence[Phone], ends: NDArray[np.int64], which: NDArray[np.int64]) -> NDArray[np.float64]:
    """Formants in each frame, ``(frames, 3)``: on target in a phone's middle half, linear between."""
    starts = ends - np.bincount(which)
    quarter = (ends - starts) / 4
    knots = np.stack([starts + quarter, ends - quarter], axis=1).ravel()
    formants = np.repeat(np.array([t.formants for t in targets], dtype=np.float64), 2, axis=0)
    return np.stack([np.interp(np.arange(len(which)), knots, formants[:, i]) for i in range(3)], axis=1)


def _glottal(level: NDArray[np.float64], pitch: float, seed: int) -> NDArray[np.float64]:
    """Pulses at a pitch that falls and wobbles, softened to fall off by 12 dB an octave; by level of each frame."""
    drift = hash_normal(derive_seed(seed, "pitch"), [0], len(level))[0]
    wobble = lfilter([0.05], [1, -0.95], drift)
    f0 = pitch * (1.1 - 0.2 * np.linspace(0, 1, len(level)) + 0.25 * wobble)
    phase = np.cumsum(np.repeat(f0, _FRAME)) / RATE
    pulses = np.diff(np.floor(phase), prepend=0.0)
    soft: NDArray[np.float64] = lfilter([1.0], [1.0, -1.8, 0.81], pulses)
    return np.diff(soft, prepend=0.0) * np.repeat(level, _FRAME)  # lips radiate the derivative


def _resonate(
    source: NDArray[np.float64], frequencies: NDArray[np.float64], bandwidths: ArrayLike
) -> NDArray[np.float64]:
    """Pass a source through resonators in cascade whose frequencies change from frame to frame.

    Args:
        source: ``(frames * 160,)``.
        frequencies: Hz, ``(frames, resonators)``.
        bandwidths: Hz, broadcast to the same shape.
    """
    radius = np.exp(-np.pi * np.broadcast_to(np.asarray(bandwidths, dtype=np.float64), frequencies.shape) / RATE)
    angle = 2 * np.pi * np.minimum(frequencies, 0.47 * RATE) / RATE
    b, c = 2 * radius * np.cos(angle), -(radius**2)
    sections = np.zeros((*frequencies.shape, 6))
    # Unit gain at 0 Hz, as in Klatt's cascade: levels then follow from the formants.
    sections[..., 0], sections[..., 3], sections[..., 4], sections[..., 5] = 1 - b - c, 1.0, -b, -c
    state = np.zeros((frequencies.shape[1], 2))
    out = np.empty_like(source)
    changes = np.flatnonzero((sections[1:] != sections[:-1]).any(axis=(1, 2))) + 1
    edges = [0, *changes.tolist(), len(sections)]
    for begin, end in pairwise(edges):  # frames with the same resonators are filtered in one go
        part = slice(begin * _FRAME, end * _FRAME)
        out[part], state = sosfilt(sections[begin], source[part], zi=state)
    return out


def frame_labels(spoken: Spoken, frames: int, *, stride: int, receptive: int) -> NDArray[np.int64]:
    """The phone at the centre of each frame of a convolutional front end, as a position in ``PHONES``.

    Args:
        spoken: from ``synthesise``.
        frames: how many.
        stride: samples from frame to frame.
        receptive: samples that a frame sees.

    Returns:
        ``(frames,)`` int64.
    """
    centres = np.arange(frames) * stride + receptive // 2
    segment = np.minimum(np.searchsorted(spoken.ends, centres, side="right"), len(spoken.phones) - 1)
    ids = {phone: number for number, phone in enumerate(PHONES)}
    return np.array([ids[phone] for phone in spoken.phones], dtype=np.int64)[segment]
