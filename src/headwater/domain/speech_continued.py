"""Continued pretraining of a multilingual speech model on a new language's raw audio, then CTC on what is transcribed.

    phase 1   wav2vec 2.0's contrastive loss, from the checkpoint, on untranscribed audio of the new language
    phase 2   CTC over characters, on the little that is transcribed, together with that of related languages

Gain and forgetting are differences of the contrastive loss on fixed masks. It falls too where a model uses fewer codes,
so ``code_perplexity`` stands beside it.

Source: Nowakowski et al., "Adapting Multilingual Speech Representation Model for a New, Underresourced Language through
    Multilingual Fine-tuning and Continued Pretraining", arXiv:2301.07295; the objective: Baevski et al., "wav2vec 2.0",
    arXiv:2006.11477.
Differs: spans of time are masked in phase 2, channels are not. Layer drop is off, so that every process trains every
    weight. The front end's gradients are not scaled by 0.1. The encoder's freezing, 10 k of 80 k steps in the paper
    (unverified), is a share of phase 2. Decoding is greedy, without a language model.
Needs: a pretrained wav2vec 2.0 model with its quantiser; audio; transcripts for phase 2.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar, cast

from pydantic import Field, model_validator
from torch import nn
from transformers import Wav2Vec2ForPreTraining

from headwater.core.budget import GivenBudget, Meter
from headwater.core.cache import atomic_write_text
from headwater.core.fit import FitSettings, Phase, Trained, fit_phases
from headwater.core.optim import OptimSpec
from headwater.core.phase import EvalAt
from headwater.core.recipe import Metrics, ModelRef, Recipe, Spec
from headwater.core.rng import derive_seed
from headwater.domain.speech_context import SpeechContext, parameters
from headwater.domain.speech_evaluation import SpeechEvaluation
from headwater.modalities.speech.audio import AudioRef
from headwater.modalities.speech.objectives import ContrastiveObjective, CTCObjective
from headwater.modalities.speech.stream import Masking, SpeechStream

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["Gumbel", "SpeechContinued"]


Left = TypeVar("Left")


class Gumbel(Spec):
    """Temperature of the draw of codes: ``max(start * decay ** step, end)``."""

    start: float = Field(default=2.0, gt=0, description="at the first step")
    end: float = Field(default=0.5, gt=0, description="lowest")
    decay: float = Field(default=0.999995, gt=0, le=1, description="factor from step to step")


@dataclass(frozen=True)
class _Left:
    pretrained: Wav2Vec2ForPreTraining
    recogniser: nn.Module | None


class SpeechContinued(Recipe):
    """Continued wav2vec 2.0 pretraining, then CTC fine-tuning.

    Source: Nowakowski et al., arXiv:2301.07295.
    """

    id: ClassVar[str] = "speech_continued"

    model: ModelRef = Field(description="the wav2vec 2.0 model to start from, as pretrained: Hub name or directory")
    audio: AudioRef = Field(description="recordings of the new language; transcripts are not read")
    general: AudioRef | None = Field(
        default=None, description="recordings of languages the model knew; without them forgetting is not measured"
    )
    labelled: AudioRef | None = Field(
        default=None, description="transcribed recordings of the new language; without them there is no CTC phase"
    )
    labelled_test: AudioRef | None = Field(
        default=None, description="transcribed recordings to test on; by default a part of `labelled` is held out"
    )
    related: tuple[AudioRef, ...] = Field(
        default=(), description="transcribed recordings of related languages, trained on together with `labelled`"
    )
    mask_prob: float = Field(default=0.065, gt=0, le=1, description="share of frames at which a masked span starts")
    mask_length: int = Field(default=10, ge=2, description="frames of a masked span")
    negatives: int = Field(default=100, gt=0, description="masked frames that each one is told apart from")
    diversity: float = Field(default=0.1, ge=0, description="weight of the term that keeps all codes in use")
    gumbel: Gumbel = Field(default=Gumbel(), description="temperature of the draw of codes, by step")
    ctc_mask_prob: float = Field(
        default=0.065, ge=0, le=1, description="share of frames at which a masked span starts in the CTC phase"
    )
    max_seconds: float = Field(
        default=15.0, gt=0, description="longer recordings are cut for pretraining and left out of CTC"
    )
    batch_size: int = Field(default=32, gt=0, description="clips per optimizer step")
    shares: tuple[float, float] = Field(
        default=(0.7, 0.3),
        description="of the budget for pretraining and for CTC; without transcripts all of it goes to the former",
    )
    freeze_encoder: float = Field(  # 10 k of 80 k steps, unverified
        default=0.125, ge=0, lt=1, description="first part of the CTC phase, in which only the new head is trained"
    )
    compare_start: bool = Field(
        default=False,
        description="also fine-tune the starting model, for what continuing was worth; once more the CTC phase's cost, "
        "outside the budget",
    )
    optim: OptimSpec = Field(default=OptimSpec(), description="how weights are moved in pretraining")
    ctc_optim: OptimSpec = Field(
        default=OptimSpec(warmup=0.1), description="how weights are moved in the CTC phase, over both of its parts"
    )
    budget: GivenBudget = Field(description="what the training may spend: steps, tokens (frames) or seconds")
    eval_at: EvalAt = Field(
        default=(0.0, 0.04, 0.16, 0.64, 1.0), description="fractions of each phase at which the model is measured"
    )
    held_out: float = Field(default=0.1, gt=0, lt=0.5, description="share of the recordings kept for the final test")
    eval_clips: int = Field(default=100, gt=0, description="clips of each test set on which the loss is measured")
    fit: FitSettings = Field(
        default=FitSettings(), description="how the loop runs: precision, micro-batches, checkpoints"
    )

    @model_validator(mode="after")
    def _shares_make_sense(self) -> SpeechContinued:
        pretraining, ctc = self.shares
        if min(self.shares) < 0 or not 0 < pretraining + ctc <= 1 + 1e-9:
            raise ValueError(f"shares must be >= 0 and sum to more than 0, at most 1; got {list(self.shares)}")
        if self.labelled is None and (self.labelled_test is not None or self.related or self.compare_start):
            raise ValueError("labelled_test, related and compare_start need `labelled`, which is not given")
        if self.labelled is not None and ctc == 0:
            raise ValueError("shares leaves nothing for CTC; raise its second number, or leave `labelled` out")
        if self.budget.flops is not None and self.labelled is not None:
            raise ValueError(
                "CTC's recursion has no count of FLOPs; give the budget in steps, tokens or seconds, or leave "
                "`labelled` out"
            )
        return self

    def run(self, run: Run) -> Metrics:
        """Open the data, measure, pretrain, fine-tune, measure again, save."""
        ctx, meter = SpeechContext(self, run), Meter()
        evaluation = SpeechEvaluation(ctx, run)
        evaluation.before()
        trainable = [0]
        left = self._fit(
            self.phases(ctx), run, meter, evaluation, began=lambda phase: trainable.append(parameters(phase.model))
        )
        meter.add(labels=len(ctx.labelled.train) + len(ctx.labelled.valid))
        metrics = evaluation.after(left.pretrained)
        if left.recogniser is not None:
            metrics |= evaluation.recognised(left.recogniser)
            if self.compare_start:
                extra = Meter()
                start = self._fit(self._ctc_phases(ctx, ctx.start(), "start-"), run, extra, None)
                metrics |= evaluation.recognised(start, "_start")
                metrics["cost/start_seconds"] = extra.cost.seconds
        evaluation.write()
        self._save(ctx, run, left)
        run.cost = {**meter.cost.to_dict(), "trainable": max(trainable)}
        return metrics | ctx.facts

    def _fit(
        self,
        phases: Generator[Phase, Trained, Left],
        run: Run,
        meter: Meter,
        evaluation: SpeechEvaluation | None,
        began: Callable[[Phase], None] = lambda phase: None,
    ) -> Left:
        return fit_phases(
            phases,
            budget=lambda: self.budget,
            optim=self.optim,
            seed=self.seed,
            directory=run.directory,
            settings=self.fit,
            evaluate=evaluation.midway if evaluation else lambda model: {},
            eval_at=self.eval_at if evaluation else (),
            meter=meter,
            log=run.log,
            began=began,
            ended=evaluation.add_trajectory if evaluation else lambda phase, trained: None,
        )

    def phases(self, ctx: SpeechContext) -> Generator[Phase, Trained, _Left]:
        """Pretraining on the new language, then CTC; either is left out where its share is 0."""
        model = ctx.start()
        share = self.shares[0] if self.labelled is not None else 1.0
        if share > 0:
            stream = SpeechStream(
                ctx.audio.train,
                ctx.frames,
                rows=self.batch_size,
                masking=Masking(self.mask_prob, self.mask_length, self.negatives),
                seed=derive_seed(self.seed, "pretraining"),
            )
            gumbel = self.gumbel
            objective = ContrastiveObjective(gumbel.start, gumbel.end, gumbel.decay, attention_mask=ctx.attention_mask)
            trained = yield Phase("pretraining", model, stream, objective, share=share)
            model = cast(Wav2Vec2ForPreTraining, trained.model)
        if self.labelled is None:
            return _Left(model, None)
        recogniser = yield from self._ctc_phases(ctx, model)
        return _Left(model, recogniser)

    def _ctc_phases(
        self, ctx: SpeechContext, pretrained: Wav2Vec2ForPreTraining, prefix: str = ""
    ) -> Generator[Phase, Trained, nn.Module]:
        """The head alone, then all but the convolutions, on one schedule."""
        model: nn.Module = ctx.recogniser(pretrained)
        clips = ctx.labelled.train
        objective = CTCObjective(
            ctx.frames.kernels,
            ctx.frames.strides,
            blank=ctx.processor.tokenizer.pad_token_id,
            attention_mask=ctx.attention_mask,
        )
        parts = (("ctc-head", 0.0, self.freeze_encoder), ("ctc", self.freeze_encoder, 1 - self.freeze_encoder))
        for name, begin, length in parts:
            if length == 0:
                continue
            model.get_submodule("wav2vec2").requires_grad_(name == "ctc")
            model.get_submodule("wav2vec2.feature_extractor").requires_grad_(False)  # throughout, as in the paper
            stream = SpeechStream(
                clips,
                ctx.frames,
                rows=self.batch_size,
                masking=Masking(self.ctc_mask_prob, self.mask_length),
                seed=derive_seed(self.seed, name),
                labels=ctx.labels,
            )
            yield Phase(
                prefix + name,
                model,
                stream,
                objective,
                share=self.shares[1] * length,
                optim=self.ctc_optim,
                schedule_start=begin,
                schedule_span=length,
            )
        return model

    def _save(self, ctx: SpeechContext, run: Run, left: _Left) -> None:
        """``model/``: the adapted model; ``ctc/``: the recogniser and its processor."""
        left.pretrained.save_pretrained(run.model)
        ctx.frames.extractor.save_pretrained(run.model)
        mask = "an" if ctx.attention_mask else "no"
        lines = [
            f"# {self.id}",
            "",
            f"`{self.model.name}`, continued on `{self.audio.name}`. Give it {mask} attention mask.",
            "",
            "```python",
            "from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForPreTraining",
            "",
            "model = Wav2Vec2ForPreTraining.from_pretrained(DIR)",
            "extractor = Wav2Vec2FeatureExtractor.from_pretrained(DIR)",
            "```",
            "",
        ]
        if left.recogniser is not None:
            target = run.path("ctc")
            left.recogniser.save_pretrained(target)  # type: ignore[operator]  # a Wav2Vec2ForCTC
            ctx.processor.save_pretrained(target)
            lines += [
                "Beside this directory: `ctc`, a recogniser of speech, and `errors.json`, what it got wrong.",
                "",
                "```python",
                "from transformers import Wav2Vec2ForCTC, Wav2Vec2Processor",
                "",
                "model = Wav2Vec2ForCTC.from_pretrained('ctc')",
                "processor = Wav2Vec2Processor.from_pretrained('ctc')",
                "inputs = processor(samples, sampling_rate=16_000, return_tensors='pt')",
                "text = processor.batch_decode(model(**inputs).logits.argmax(-1))[0]",
                "```",
                "",
            ]
        atomic_write_text(run.model / "README.md", "\n".join(lines))
