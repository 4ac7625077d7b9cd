"""Does a new language's raw audio help a multilingual speech model more than the same steps on the ones it knows?

Small scale: a wav2vec 2.0 of 96 x 3 with frames of 40 ms is pretrained on three synthetic languages, 800 steps, once on
a machine. Half of the phonemes of a fourth language occur in none of them. Arms spend the same 225 steps: 150 of
contrastive pretraining on ten minutes of the fourth language, or of the three, then 75 of CTC on forty utterances; or
all on CTC. What the frames show is read off by a linear probe on exact phone labels, with speakers that nothing was
trained on, after pretraining: contrastive training moves it long before error rates, which are reported beside it.
No arm is tuned: the two that continue differ in nothing but what they hear.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Wav2Vec2ForCTC, Wav2Vec2ForPreTraining

from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.recipe import load_recipe
from headwater.core.run import execute
from headwater.modalities.speech.bases import SpeechBase, recordings, trained_speech_base
from headwater.modalities.speech.languages import Language, Utterance, language, utterance
from headwater.modalities.speech.probe import phone_probe
from headwater.modalities.speech.stream import Frames
from headwater.modalities.speech.tiny import tiny_feature_extractor, tiny_wav2vec2

__all__ = ["CLAIM"]

SEED = 32
PRETRAINING_TEACHES = 0.05
MARGIN = 0.02


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    base: SpeechBase
    heard: int  # utterances of each of the three languages that the base hears
    raw: int  # utterances to continue on
    general: int  # of each language, for forgetting
    labelled: int
    test: int
    probe: int  # utterances that the probe is fitted on
    pretraining: int  # steps
    ctc: int


SIZES: dict[Scale, Size] = {
    "smoke": Size(SpeechBase(16, 1, 2, 16, conv=8, codes=4, steps=2), 10, 90, 8, 12, 10, 10, 2, 2),
    "small": Size(SpeechBase(), 250, 600, 40, 40, 100, 60, 150, 75),
    "full": Size(
        SpeechBase(256, 6, 8, 1024, conv=128, codes=64, steps=10_000), 6000, 6000, 60, 120, 300, 200, 2000, 1000
    ),
}
ARMS = ("target language", "other languages", "no continuation")


def _languages() -> tuple[list[Language], Language]:
    a = language("A", seed=SEED)
    b = language("B", like=[a], share=0.8, seed=SEED)
    c = language("C", like=[a, b], share=1.0, seed=SEED)
    target = language("D", like=[a, b, c], share=0.5, vowels=4, consonants=8, seed=SEED)
    return [a, b, c], target


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Run the three arms on one seed: order of data, head and the forty labelled utterances follow it."""
    size, (known, target) = SIZES[scale], _languages()
    base = trained_speech_base(size.base, recordings(known, size.heard))
    heard = {
        "target language": recordings([target], size.raw),
        "other languages": recordings(known, size.raw // 3, first=1_000),
        "no continuation": recordings([target], size.raw),
    }
    shared = {
        "method": "speech_continued",
        "model": str(base),
        "general": str(recordings(known, size.general, first=10_000)),
        "labelled": str(recordings([target], size.labelled, first=50_000 + size.labelled * seed)),
        "labelled_test": str(recordings([target], size.test, first=30_000, first_speaker=1_000)),
        "mask_prob": size.base.mask_prob,
        "mask_length": size.base.mask_length,
        "negatives": size.base.negatives,
        "gumbel": {"start": 0.5, "end": 0.5},
        "batch_size": size.base.rows,
        "budget": {"steps": size.pretraining + size.ctc},
        "optim": {"lr": size.base.lr / 2, "warmup": 0.1},
        "ctc_optim": {"lr": size.base.lr / 2, "warmup": 0.1},
        "freeze_encoder": 0.0 if scale == "smoke" else 0.125,
        "eval_at": [0.0, 1.0],
        "fit": {"precision": "fp32"},
        "seed": seed,
    }
    train = [utterance(target, 20_000 + i) for i in range(size.probe)]
    test = [utterance(target, 30_000 + i, first_speaker=1_000) for i in range(size.test)]
    arms, items, fingerprint = {}, {}, ""
    continued = size.pretraining / (size.pretraining + size.ctc)
    for arm in ARMS:
        shares = [0.0, 1.0] if arm == "no continuation" else [continued, 1 - continued]
        folder = directory / arm.replace(" ", "-")
        result = execute(load_recipe({**shared, "audio": str(heard[arm]), "shares": shares}), folder, resume=True)
        fingerprint = fingerprint or result.data["audio"]
        arms[arm] = {
            **result.metrics,
            "probe/phones": _probe(Wav2Vec2ForPreTraining.from_pretrained(folder / "model"), train, test),
            "probe/after_ctc": _probe(Wav2Vec2ForCTC.from_pretrained(folder / "ctc"), train, test),
        }
        errors = json.loads((folder / "items.json").read_text(encoding="utf-8"))["downstream/ctc/cer"]
        items[arm] = {"downstream/ctc/cer": errors["values"]}
    fresh = tiny_wav2vec2(*_shape(size.base), conv=size.base.conv, codes=size.base.codes, generator_seed=SEED)
    untrained, start = _probe(fresh, train, test), arms["no continuation"]["probe/phones"]
    return Measured(
        arms=arms,
        items=items,
        data_fingerprint=fingerprint,
        unmet=[]
        if start - untrained >= PRETRAINING_TEACHES
        else [f"pretraining teaches little: the base shows {start:.3f} of the phones, fresh weights {untrained:.3f}"],
        notes={"probe of fresh weights": f"{untrained:.3f}", "base": base.name},
    )


def _shape(base: SpeechBase) -> tuple[int, int, int, int]:
    return base.hidden, base.layers, base.heads, base.mlp


def _probe(
    model: Wav2Vec2ForPreTraining | Wav2Vec2ForCTC, train: Sequence[Utterance], test: Sequence[Utterance]
) -> float:
    config: Any = model.config  # Any: transformers ships no types
    frames = Frames(tuple(config.conv_kernel), tuple(config.conv_stride), tiny_feature_extractor())
    return phone_probe(model.wav2vec2, train, test, frames, attention_mask=False)


CLAIM = Claim(
    id="speech_continued",
    statement="Continued pretraining on the raw audio of a new language makes its phones easier to read off the frames "
    "than the same steps on the languages the model knew, and than no continuation.",
    source="Nowakowski et al., arXiv:2301.07295, abstract: continued pretraining is the most effective way to adapt a "
    "multilingual wav2vec 2.0; XLSR-53 continued on 234 h of Ainu reaches CER 9.7 and WER 29.8 with 10 h of labels.",
    parts=(
        Part(
            "A linear probe finds at least 0.02 more of the phones than after the same steps on the known languages",
            "probe/phones",
            "target language",
            "other languages",
            "higher",
            MARGIN,
        ),
        Part(
            "A linear probe finds at least 0.02 more of the phones than without continuation",
            "probe/phones",
            "target language",
            "no continuation",
            "higher",
            MARGIN,
        ),
        *(
            Part(
                f"The character error rate after CTC is lower by at least 0.02 than with {rival}",
                "downstream/ctc/cer",
                "target language",
                rival,
                "lower",
                MARGIN,
                units="seeds and utterances",
                decides=False,
            )
            for rival in ("other languages", "no continuation")
        ),
        Part(
            "A linear probe on the recogniser's own frames finds more of the phones than where all steps went to CTC",
            "probe/after_ctc",
            "target language",
            "no continuation",
            "higher",
            0.0,
            decides=False,
        ),
        Part(
            "What is forgotten of the known languages' contrastive loss is no more than 0.1 nats per masked frame",
            "general/forgetting",
            "target language",
            "no continuation",
            "lower",
            -0.1,
            decides=False,
        ),
    ),
    rival="other languages",
    preconditions=(
        f"the base's frames show at least {PRETRAINING_TEACHES} more of the new language's phones than fresh weights",
    ),
    seeds={"smoke": (100,), "small": (100, 101, 102), "full": (100, 101, 102)},
    measure=measure,
)
