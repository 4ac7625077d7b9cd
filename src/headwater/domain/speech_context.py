"""What continued speech pretraining works with: the starting model and its front end, and the sets of clips."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
    Wav2Vec2Processor,
)

from headwater.core.rng import derive_seed
from headwater.modalities.models import ModelError, model_directory
from headwater.modalities.speech.audio import AudioRef, Clip, cut, fingerprint, open_speech, usable
from headwater.modalities.speech.ctc import character_vocab, ctc_processor, encode
from headwater.modalities.speech.masking import receptive_field
from headwater.modalities.speech.stream import Frames
from headwater.modalities.text.docs import CorpusError, split_sides
from headwater.modalities.text.prepared import split_shares

if TYPE_CHECKING:
    from headwater.core.run import Run
    from headwater.domain.speech_continued import SpeechContinued

__all__ = ["Sets", "SpeechContext"]

logger = logging.getLogger(__name__)

MIN_HELD_OUT = 8
"""Clips below which a held-out set measures nothing."""
SHARED_LIMIT = 0.3


@dataclass
class Sets:
    """Clips of one role, by what they are for."""

    train: list[Clip] = field(default_factory=list)
    valid: list[Clip] = field(default_factory=list)
    test: list[Clip] = field(default_factory=list)


class SpeechContext:
    """Opens what a recipe names and refuses what cannot work, before anything is trained.

    Attributes:
        frames: the model's front end.
        attention_mask: whether the model is told what is padding: checkpoints normalised by layer are, those normalised
            by group are not.
        audio, general, labelled: the clips; ``general`` has no training part, ``labelled`` holds related languages too.
        labels: ids of the transcripts of ``labelled.train``.
        facts: about the data, under ``data/``.

    Raises:
        CorpusError: sets that are empty, too small to measure, or the same given twice.
        ModelError: no wav2vec 2.0 model, or one without what its pretraining needs.
    """

    def __init__(self, recipe: SpeechContinued, run: Run) -> None:
        self.recipe, self.run = recipe, run
        self.directory = model_directory(recipe.model)
        self.config: Any = AutoConfig.from_pretrained(self.directory, revision=recipe.model.revision)
        if self.config.model_type != "wav2vec2":
            raise ModelError(
                f"model {recipe.model.name!r} is of type {self.config.model_type!r}; this continues wav2vec2 models"
            )
        extractor = self._extractor()
        self.attention_mask = bool(extractor.return_attention_mask)
        self.frames = Frames(tuple(self.config.conv_kernel), tuple(self.config.conv_stride), extractor)
        self.facts: dict[str, float] = {}
        longest = int(recipe.max_seconds * extractor.sampling_rate)
        shares = split_shares(recipe.held_out)
        audio = self._split(self._long_enough(cut(self._read("audio", recipe.audio), longest), "audio"), shares)
        general = Sets()
        if recipe.general is not None:
            clips = self._long_enough(cut(self._read("general", recipe.general), longest), "general")
            general = self._split(clips, (0.0, 0.5, 0.5))
        self.audio, self.general, self.labelled = audio, general, self._labelled(longest, shares)
        self._drop_overlap()
        # Here, so that a transcript that does not fit is refused before hours of pretraining.
        train = self.labelled.train
        self.labels = encode(train, self.processor, self.frames, role="labelled") if train else []
        roles = (("audio", self.audio), ("general", self.general), ("labelled", self.labelled))
        for role, sets in roles:
            for side in (sets.train, sets.valid, sets.test):
                if side:
                    self.facts[f"data/{role}_clips"] = self.facts.get(f"data/{role}_clips", 0.0) + len(side)
            if sets.test and len(sets.test) < MIN_HELD_OUT:
                raise CorpusError(
                    f"{role}: the held-out test set has {len(sets.test)} clips; at least {MIN_HELD_OUT} are needed for "
                    f"a figure that means something. Give more, or raise held_out (now {recipe.held_out})."
                )
            if role != "general" and getattr(recipe, role) is not None and not (sets.train and sets.test):
                raise CorpusError(
                    f"{role}: {len(sets.train)} clips to train on and {len(sets.test)} to test on; give more."
                )

    def _extractor(self) -> Wav2Vec2FeatureExtractor:
        try:
            found: Wav2Vec2FeatureExtractor = Wav2Vec2FeatureExtractor.from_pretrained(
                self.directory, revision=self.recipe.model.revision
            )
        except OSError:
            by_layer = self.config.feat_extract_norm == "layer"
            self.warn(
                "extractor",
                "the model has no preprocessor_config.json; its audio is normalised, "
                + ("with" if by_layer else "without")
                + " an attention mask, as the norm of its convolutions asks",
            )
            return Wav2Vec2FeatureExtractor(return_attention_mask=by_layer, do_normalize=True)
        return found

    def _read(self, role: str, ref: AudioRef) -> list[Clip]:
        speech = open_speech(ref, role=role, rate=self.frames.extractor.sampling_rate)
        self.run.record_data(role, fingerprint(speech.clips))
        for what, number in speech.counts.items():
            self.facts[f"data/{role}_{what}"] = float(number)
            self.warn(f"{role}/{what}", f"{role}: {number} of {len(speech.clips)} recordings were {what}")
        return list(speech.clips)

    @cached_property
    def _shortest(self) -> int:
        """Samples of as many frames as a masked span has."""
        return receptive_field(self.frames.kernels, self.frames.strides, self.recipe.mask_length)[0]

    def _long_enough(self, clips: Sequence[Clip], role: str) -> list[Clip]:
        kept = usable(clips, self._shortest, role=role)
        if len(kept) < len(clips):
            self.facts[f"data/{role}_too_short"] = float(len(clips) - len(kept))
            self.warn(f"{role}/too_short", f"{role}: {len(clips) - len(kept)} clips are shorter than a masked span")
        return kept

    def _split(self, clips: Sequence[Clip], shares: tuple[float, float, float]) -> Sets:
        """By the recording: no recording has pieces on two sides."""
        sides = split_sides([clip.recording for clip in clips], shares)
        parts = [[clip for clip, side in zip(clips, sides, strict=True) if side == wanted] for wanted in range(3)]
        return Sets(*parts)

    def _labelled(self, longest: int, shares: tuple[float, float, float]) -> Sets:
        recipe = self.recipe
        if recipe.labelled is None:
            return Sets()
        own = self._transcribed("labelled", recipe.labelled, longest)
        if recipe.labelled_test is None:
            sets = self._split(own, shares)
        else:
            sets = self._split(own, (shares[0] + shares[2], shares[1], 0.0))
            sets.test = self._transcribed("labelled_test", recipe.labelled_test, longest)
        for number, ref in enumerate(recipe.related):
            sets.train += self._transcribed(f"related.{number}", ref, longest)
        return sets

    def _transcribed(self, role: str, ref: AudioRef, longest: int) -> list[Clip]:
        """Clips that CTC can use: with a transcript, and whole, since a transcript cannot be cut."""
        clips = self._read(role, ref)
        if not any(clip.text is not None for clip in clips):
            raise CorpusError(f"{role}: no transcripts in {ref.name}. Name their column in label_field.")
        kept = [clip for clip in clips if (clip.text or "").strip() and clip.samples <= longest]
        for what, number in (
            ("without_text", sum(not (clip.text or "").strip() for clip in clips)),
            ("too_long", sum(clip.samples > longest for clip in clips)),
        ):
            if number:
                self.facts[f"data/{role}_{what}"] = float(number)
                self.warn(f"{role}/{what}", f"{role}: {number} recordings are left out ({what.replace('_', ' ')})")
        return self._long_enough(kept, role)

    def _drop_overlap(self) -> None:
        """Nothing that is measured on is trained on, whatever set it came in by."""
        domain = {clip.digest for side in (self.audio.train, self.audio.valid, self.audio.test) for clip in side}
        general = {clip.digest for side in (self.general.valid, self.general.test) for clip in side}
        if general and len(domain & general) > SHARED_LIMIT * len(domain):
            raise CorpusError(
                f"{len(domain & general) / len(domain):.0%} of the audio stands in the general set too. They must be "
                "different recordings, or forgetting cannot be told from learning."
            )
        held = {clip.digest for sets in (self.audio, self.general, self.labelled) for clip in (*sets.valid, *sets.test)}
        before = len(self.audio.train) + len(self.labelled.train)
        self.audio.train = [clip for clip in self.audio.train if clip.digest not in held]
        self.labelled.train = [clip for clip in self.labelled.train if clip.digest not in held]
        self.facts["data/dropped_overlap"] = float(before - len(self.audio.train) - len(self.labelled.train))

    def warn(self, topic: str, message: str) -> None:
        """Log a warning and keep it with the result."""
        self.run.warn(topic, message)

    # -- models

    def start(self) -> Wav2Vec2ForPreTraining:
        """A fresh copy of the starting model, with the recipe's masking in its configuration.

        Raises:
            ModelError: the checkpoint has no quantiser, so its pretraining cannot be continued.
        """
        recipe = self.recipe
        dtype = recipe.model.dtype
        model, found = Wav2Vec2ForPreTraining.from_pretrained(
            self.directory,
            revision=recipe.model.revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            # The mask is always given; with a probability of 0 the model would have no vector to put in its place.
            mask_time_prob=recipe.mask_prob * recipe.mask_length,
            mask_time_length=recipe.mask_length,
            mask_feature_prob=0.0,
            apply_spec_augment=True,
            diversity_loss_weight=recipe.diversity,
            num_negatives=recipe.negatives,
            layerdrop=0.0,
        )
        if missing := sorted(name for name in found["missing_keys"] if "masked_spec_embed" not in name):
            raise ModelError(
                f"model {recipe.model.name!r} lacks {len(missing)} weights of wav2vec 2.0's pretraining, among them "
                f"{missing[0]!r}: it was probably saved after fine-tuning. Give the pretrained checkpoint."
            )
        return model

    @cached_property
    def processor(self) -> Wav2Vec2Processor:
        """Characters of the transcripts that are trained on, and the model's feature extractor."""
        vocab = character_vocab(clip.text or "" for clip in self.labelled.train)
        return ctc_processor(vocab, self.frames.extractor)

    def recogniser(self, pretrained: Wav2Vec2ForPreTraining) -> Wav2Vec2ForCTC:
        """A CTC model on a copy of a pretrained encoder; its head is drawn from the recipe's seed."""
        tokenizer = self.processor.tokenizer
        config = copy.deepcopy(pretrained.config)
        config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
        config.ctc_loss_reduction = "sum"
        config.mask_time_prob = self.recipe.ctc_mask_prob * self.recipe.mask_length or config.mask_time_prob
        config.bos_token_id = config.eos_token_id = None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.recipe.seed, "ctc head"))
            model = Wav2Vec2ForCTC(config)
        model.wav2vec2.load_state_dict(pretrained.wav2vec2.state_dict())
        model.freeze_feature_encoder()  # or its graph would be built for a gradient of the input
        return model.to(next(pretrained.parameters()).dtype).eval()


def parameters(model: nn.Module) -> int:
    """How many weights are trained."""
    return int(np.sum([p.numel() for p in model.parameters() if p.requires_grad]))
