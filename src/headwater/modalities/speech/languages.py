"""Synthetic languages: phonemes shared to a known degree, each with its own words, syllables and spelling.

A language is drawn from a seed and is otherwise a function: utterance number i is always the same words, spoken by the
same speaker. Writing is one character for each phoneme, except that some phonemes share a character, so a listener has
to learn the language's sounds to spell it and cannot copy another language's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headwater.core.order import permutation
from headwater.core.rng import derive_seed, hash_integers, hash_uniform
from headwater.modalities.speech.synthesis import PHONES, RATE, SILENCE, Spoken, speaker, synthesise

__all__ = ["Language", "Utterance", "language", "utterance", "write_corpus"]

_VOWELS = tuple(symbol for symbol, phone in PHONES.items() if phone.kind == "vowel")
_CONSONANTS = tuple(symbol for symbol, phone in PHONES.items() if phone.kind not in ("vowel", "silence"))
_SHAPES = ("CV", "CV", "CVC", "V", "CVC", "VC")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Language:
    """One synthetic language.

    Attributes:
        name: of the language.
        phonemes: symbols of ``PHONES``, vowels first.
        spelling: character of each phoneme; several may have one.
        words: the lexicon, each a tuple of phonemes, the commonest first.
    """

    name: str
    phonemes: tuple[str, ...]
    spelling: dict[str, str]
    words: tuple[tuple[str, ...], ...]

    def spell(self, word: Sequence[str]) -> str:
        """A word as it is written."""
        return "".join(self.spelling[phoneme] for phoneme in word)


@dataclass(frozen=True)
class Utterance:
    """Something said.

    Attributes:
        id: ``LANGUAGE-INDEX``.
        spoken: waveform and phones.
        text: its words, spelled, with spaces between.
        speaker: number of the speaker.
    """

    id: str
    spoken: Spoken
    text: str
    speaker: int


def language(
    name: str,
    *,
    like: Sequence[Language] = (),
    share: float = 1.0,
    vowels: int = 5,
    consonants: int = 9,
    merged: int = 2,
    words: int = 60,
    seed: int = 0,
) -> Language:
    """Draw a language.

    Args:
        name: its name, which also decides its draws.
        like: languages whose phonemes it shares; none: it draws freely.
        share: of its phonemes that stand in a language of ``like`` too, in [0, 1]; the others stand in none. Rounded to
            whole vowels and whole consonants.
        vowels: how many.
        consonants: how many.
        merged: how many phonemes are written with another one's character.
        words: size of the lexicon.
        seed: of all draws.

    Raises:
        ValueError: ``share`` outside [0, 1], or more phonemes wanted than there are.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1]; got {share}.")
    if vowels < 1 or consonants < 1 or words < 1 or not 0 <= merged < vowels + consonants:
        raise ValueError(
            f"a language needs vowels, consonants and words, and 0 <= merged < phonemes; got {vowels}, {consonants}, "
            f"{words} and merged={merged}."
        )
    own = derive_seed(seed, "language", name)
    known = {phoneme for other in like for phoneme in other.phonemes}
    phonemes = (
        *_draw(_VOWELS, vowels, known, share if like else None, derive_seed(own, "vowels")),
        *_draw(_CONSONANTS, consonants, known, share if like else None, derive_seed(own, "consonants")),
    )
    letters = [_LETTERS[i] for i in permutation(derive_seed(own, "letters"), 0, len(_LETTERS))]
    spelling = dict(zip(phonemes, letters, strict=False))
    for number in permutation(derive_seed(own, "merged"), 0, len(phonemes))[:merged]:
        spelling[phonemes[number]] = spelling[phonemes[(number + 1) % len(phonemes)]]
    return Language(name, phonemes, spelling, _lexicon(phonemes[:vowels], phonemes[vowels:], words, own))


def _draw(pool: Sequence[str], count: int, known: set[str], share: float | None, seed: int) -> list[str]:
    order = [pool[i] for i in permutation(seed, 0, len(pool))]
    if share is None:
        wanted = [(order, count)]
    else:
        shared = round(share * count)
        wanted = [([p for p in order if p in known], shared), ([p for p in order if p not in known], count - shared)]
    for found, number in wanted:
        if len(found) < number:
            raise ValueError(
                f"{number} phonemes are wanted from {len(found)} ({' '.join(found)}); lower the number of vowels or "
                "consonants, or change share."
            )
    return [phoneme for found, number in wanted for phoneme in found[:number]]


def _lexicon(vowels: Sequence[str], consonants: Sequence[str], count: int, seed: int) -> tuple[tuple[str, ...], ...]:
    """Words of one or two syllables, all different; which syllables there are, and which end a word, is the language's.

    The draws of word number i are columns of row i, so a longer lexicon begins as a shorter one does.
    """
    shapes = [_SHAPES[i] for i in permutation(derive_seed(seed, "shapes"), 0, len(_SHAPES))[:4]]
    codas = [consonants[i] for i in permutation(derive_seed(seed, "codas"), 0, len(consonants))[: len(consonants) // 2]]
    found: dict[tuple[str, ...], None] = {}
    for number in range(50 * count):
        draws = iter(hash_uniform(derive_seed(seed, "words"), [number], 16)[0])
        word: list[str] = []
        for _ in range(1 + int(2 * next(draws))):
            shape = shapes[int(len(shapes) * next(draws))]
            for position, kind in enumerate(shape):
                last = position == len(shape) - 1 and position > 0
                choice = vowels if kind == "V" else codas if last and codas else consonants
                word.append(choice[int(len(choice) * next(draws))])
        if len(word) > 1:
            found[tuple(word)] = None
        if len(found) == count:
            return tuple(found)
    raise ValueError(f"only {len(found)} different words could be drawn of {count}; give more phonemes or fewer words.")


def utterance(of: Language, index: int, *, words: int = 2, speakers: int = 40, first_speaker: int = 0) -> Utterance:
    """Utterance number ``index`` of a language: words drawn by Zipf's law, spoken by one of its speakers.

    Args:
        of: the language.
        index: >= 0; the same index is the same utterance, to the sample.
        words: in each utterance.
        speakers: how many there are.
        first_speaker: number of the first, so that two sets can have different ones.

    Raises:
        ValueError: ``index`` is negative, or ``words`` or ``speakers`` is not positive.
    """
    if index < 0 or words < 1 or speakers < 1:
        raise ValueError(f"index must be >= 0, words and speakers >= 1; got {index}, {words} and {speakers}.")
    seed = derive_seed(0, "utterance", of.name, index)
    weights = 1 / np.arange(5, len(of.words) + 5)
    places = np.searchsorted(np.cumsum(weights) / weights.sum(), hash_uniform(seed, [0], words)[0], side="right")
    chosen = [of.words[min(int(place), len(of.words) - 1)] for place in places]
    phones = [SILENCE]
    for word in chosen:
        phones += [*word, SILENCE]
    who = first_speaker + int(hash_integers(seed, [1], 1, 0, speakers)[0, 0])
    spoken = synthesise(phones, speaker(0, who), seed=derive_seed(seed, "speech"))
    return Utterance(f"{of.name}-{index}", spoken, " ".join(of.spell(word) for word in chosen), who)


def write_corpus(directory: Path, utterances: Sequence[Utterance]) -> Path:
    """Write 16-bit wav files and a ``metadata.jsonl`` with their texts: what `datasets` calls an audio folder.

    Returns:
        ``directory``.
    """
    import soundfile

    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for spoken in utterances:
        name = f"{spoken.id}.wav"
        soundfile.write(directory / name, spoken.spoken.audio, RATE, subtype="PCM_16")
        lines.append(json.dumps({"file_name": name, "id": spoken.id, "text": spoken.text, "speaker": spoken.speaker}))
    (directory / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory
