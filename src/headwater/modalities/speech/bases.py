"""A small wav2vec 2.0 trained here on synthetic languages, and their recordings: made once, then in the cache."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import scipy
import torch
import transformers

from headwater.core.budget import Budget
from headwater.core.cache import atomic_write_text, cache_dir, cache_key
from headwater.core.fit import FitSettings, Phase, fit
from headwater.core.optim import OptimSpec
from headwater.modalities.speech.audio import AudioRef, open_speech
from headwater.modalities.speech.languages import Language, utterance, write_corpus
from headwater.modalities.speech.objectives import ContrastiveObjective
from headwater.modalities.speech.stream import Frames, Masking, SpeechStream
from headwater.modalities.speech.tiny import tiny_feature_extractor, tiny_wav2vec2

__all__ = ["SpeechBase", "recordings", "trained_speech_base"]

FORMAT = 3


@dataclass(frozen=True)
class SpeechBase:
    """How the small model is made.

    Attributes:
        hidden, layers, heads, mlp, conv, codes: see ``tiny_wav2vec2``.
        mask_prob, mask_length, negatives: of its pretraining.
        rows, steps, lr: clips per step, optimizer steps, peak learning rate.
        decay: of the Gumbel temperature, from 2 to 0.5.
        seed: of weights and order.
    """

    hidden: int = 96
    layers: int = 3
    heads: int = 4
    mlp: int = 192
    conv: int = 32
    codes: int = 32
    mask_prob: float = 0.13
    mask_length: int = 5
    negatives: int = 20
    rows: int = 16
    steps: int = 800
    lr: float = 2e-3
    decay: float = 0.998
    seed: int = 0


def recordings(
    of: Sequence[Language], count: int, *, first: int = 0, words: int = 2, speakers: int = 40, first_speaker: int = 0
) -> Path:
    """A folder with utterances ``first`` to ``first + count`` of some languages, as ``write_corpus`` has it; cached."""
    spoken = [asdict(one) for one in of]
    about = [spoken, count, first, words, speakers, first_speaker, FORMAT, np.__version__, scipy.__version__]
    target = cache_dir("speech-recordings") / cache_key(about)
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir("speech-recordings")) as working:
            said = [
                utterance(one, first + number, words=words, speakers=speakers, first_speaker=first_speaker)
                for one in of
                for number in range(count)
            ]
            write_corpus(Path(working) / "corpus", said)
            if not target.exists():  # another process may have been faster
                (Path(working) / "corpus").rename(target)
    return target


def trained_speech_base(base: SpeechBase, folder: Path) -> Path:
    """Directory of a wav2vec 2.0 trained from fresh weights on the recordings in a folder; cached."""
    clips = open_speech(AudioRef(name=str(folder)), role="base").clips
    versions = [torch.__version__, transformers.__version__]
    about = {**asdict(base), "clips": [clip.digest for clip in clips], "versions": versions, "format": FORMAT}
    target = cache_dir("models") / cache_key(about)
    if (target / "base.json").exists():
        return target
    model = tiny_wav2vec2(
        base.hidden,
        base.layers,
        base.heads,
        base.mlp,
        conv=base.conv,
        codes=base.codes,
        generator_seed=base.seed,
    )
    extractor = tiny_feature_extractor()
    frames = Frames(tuple(model.config.conv_kernel), tuple(model.config.conv_stride), extractor)
    masking = Masking(base.mask_prob, base.mask_length, base.negatives)
    stream = SpeechStream(clips, frames, rows=base.rows, masking=masking, seed=base.seed)
    objective = ContrastiveObjective(2.0, 0.5, base.decay, attention_mask=False)
    with tempfile.TemporaryDirectory(dir=cache_dir("models")) as working:
        fit(
            Phase("base", model, stream, objective),
            budget=Budget(steps=base.steps),
            optim=OptimSpec(lr=base.lr, warmup=0.1),
            seed=base.seed,
            directory=Path(working) / "run",
            settings=FitSettings(precision="fp32"),
        )
        finished = Path(working) / "model"
        model.save_pretrained(finished)
        extractor.save_pretrained(finished)
        atomic_write_text(finished / "base.json", json.dumps(about, indent=2) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        finished.rename(target)
    return target
