"""The answers about an adapted speech model: gain and forgetting on fixed masks, and error rates of its recogniser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import Wav2Vec2ForCTC

from headwater.core.fit import Phase, Trained
from headwater.core.recipe import Metrics
from headwater.domain.gap import gap
from headwater.domain.speech_context import SpeechContext
from headwater.modalities.speech.audio import Clip
from headwater.modalities.speech.ctc import error_rates, transcribe
from headwater.modalities.speech.objectives import ContrastiveObjective
from headwater.modalities.speech.stream import Masking, collate

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["SpeechEvaluation", "contrastive_nats"]

MIDWAY_CLIPS = 24
MASK_SEED = 0


def contrastive_nats(
    model: nn.Module, clips: Sequence[Clip], ctx: SpeechContext
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The contrastive loss of each clip, on masks and negatives that depend on its place in the list only.

    Each clip is alone in its batch, so that neither padding nor neighbours bear on it.

    Args:
        model: a ``Wav2Vec2ForPreTraining``; its mode is put back.
        clips: to measure on.
        ctx: gives masking and front end.

    Returns:
        ``(clips, 2)`` nats and masked frames; and the perplexity of the codes in each clip, ``(clips,)``.
    """
    recipe, device, training = ctx.recipe, next(model.parameters()).device, model.training
    masking = Masking(recipe.mask_prob, recipe.mask_length, recipe.negatives)
    # No step in these batches, so the temperature, which an evaluated quantiser does not use, stays as it is.
    objective = ContrastiveObjective(1.0, 1.0, 1.0, attention_mask=ctx.attention_mask)
    found = []
    model.eval()
    for number, clip in enumerate(clips):
        batch = collate([clip], ctx.frames, rows=np.array([number]), masking=masking, seed=MASK_SEED)
        with torch.inference_mode():
            loss = objective(model, {name: tensor.to(device) for name, tensor in batch.items()})
        found.append(torch.stack([loss.metrics["contrastive"], loss.metrics["code_perplexity"]]).double())
        found[-1] = torch.cat([found[-1], torch.as_tensor([loss.count], device=device)])
    model.train(training)
    mean, perplexity, count = torch.stack(found).cpu().numpy().T
    return np.stack([mean * count, count], axis=1), perplexity


class SpeechEvaluation:
    """Scores the starting model, the model on its way, and what is left."""

    def __init__(self, ctx: SpeechContext, run: Run) -> None:
        self.ctx, self.run = ctx, run
        most = ctx.recipe.eval_clips
        self.test: dict[str, list[Clip]] = {"domain": ctx.audio.test[:most]}
        self.valid: dict[str, list[Clip]] = {"domain": (ctx.audio.valid or ctx.audio.train)[:most]}
        if ctx.general.test:
            self.test["general"] = ctx.general.test[:most]
            self.valid["general"] = (ctx.general.valid or ctx.general.test)[:most]
        self.items: dict[str, Any] = {}  # Any: JSON data
        self.trajectory: dict[str, list[tuple[float, float]]] = {}
        self._tokens_before = 0.0
        run.notes["unit"] = ContrastiveObjective.unit

    def before(self) -> None:
        """Score the starting model."""
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        self.start = self._score(self.ctx.start().to(device))

    def _score(self, model: nn.Module) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        sides = {"test": self.test, "valid": self.valid}
        return {
            f"{side}/{role}": contrastive_nats(model, clips, self.ctx)
            for side, sets in sides.items()
            for role, clips in sets.items()
        }

    def midway(self, model: nn.Module) -> dict[str, float]:
        """What ``fit`` measures at ``eval_at``: the loss of a pretrained model, the error rate of a recogniser."""
        if isinstance(model, Wav2Vec2ForCTC):
            clips = self.ctx.labelled.valid[:MIDWAY_CLIPS]
            return {"valid/ctc_cer": self._recognise(model, clips)[0]["cer"]} if clips else {}
        found = {}
        for role, clips in self.valid.items():
            nats, _ = contrastive_nats(model, clips[:MIDWAY_CLIPS], self.ctx)
            found[f"{role}/nats"] = float(nats[:, 0].sum() / nats[:, 1].sum())
        return found

    def add_trajectory(self, phase: Phase, trained: Trained) -> None:
        """Append a phase's trajectory, its tokens counted from the beginning of the run."""
        for point in trained.trajectory:
            tokens = self._tokens_before + point["tokens"]
            for name, value in point.items():
                series = self.trajectory.setdefault(name, []) if name.endswith(("/nats", "/ctc_cer")) else None
                if series is not None and (not series or series[-1][0] < tokens):  # two points may share a step
                    series.append((tokens, value))
        self._tokens_before += trained.tokens

    def after(self, model: nn.Module) -> Metrics:
        """Score the adapted model and compare it with the starting one."""
        end = self._score(model)
        metrics: Metrics = {}
        for role, clips in self.test.items():
            (first, codes_first), (last, codes_last) = self.start[f"test/{role}"], end[f"test/{role}"]
            size = first[:, 1].mean()
            metrics |= {
                f"{role}/nats_start": float(first[:, 0].mean() / size),
                f"{role}/nats": float(last[:, 0].mean() / size),
                f"{role}/code_perplexity_start": float(codes_first.mean()),
                f"{role}/code_perplexity": float(codes_last.mean()),
                f"valid/{role}_nats": _mean(end[f"valid/{role}"][0]),
            }
            name, better = ("domain/gain", 1.0) if role == "domain" else ("general/forgetting", -1.0)
            values = better * (first[:, 0] - last[:, 0]) / size
            metrics[name] = float(values.mean())
            self.items[name] = {"ids": [clip.id for clip in clips], "values": values.tolist()}
        if "general" in self.test:
            before = _mean(self.start["valid/general"][0])
            metrics["valid/general_forgetting"] = metrics["valid/general_nats"] - before
            if series := self.trajectory.get("general/nats"):
                found = gap([x for x, _ in series], [y for _, y in series])
                metrics |= {"general/worst": found.depth, "general/worst_at": found.at}
        return metrics

    def recognised(self, model: nn.Module, suffix: str = "") -> Metrics:
        """Error rates on the labelled test clips; the adapted model's, without suffix, go to a file by utterance."""
        clips = self.ctx.labelled.test
        rates, table = self._recognise(model, clips)
        if not suffix:
            self.run.write_json("errors.json", table)
            mean = np.mean([row["characters"] for row in table])
            values = [float(row["edits"] / mean) for row in table]
            self.items["downstream/ctc/cer"] = {"ids": [clip.id for clip in clips], "values": values}
            known = set(self.ctx.processor.tokenizer.get_vocab())
            text = "".join("".join((clip.text or "").split()) for clip in clips)
            self.ctx.facts["data/unknown_characters"] = float(sum(character not in known for character in text))
            if valid := self.ctx.labelled.valid:
                rates["valid_cer"] = self._recognise(model, valid)[0]["cer"]
        return {
            "valid/ctc_cer" if name == "valid_cer" else f"downstream/ctc/{name}{suffix}": value
            for name, value in rates.items()
        }

    def _recognise(
        self, model: nn.Module, clips: Sequence[Clip]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:  # Any: JSON data
        ctx = self.ctx
        said = [" ".join((clip.text or "").split()) for clip in clips]
        understood = transcribe(model, ctx.processor, clips, ctx.frames, attention_mask=ctx.attention_mask)
        rates = error_rates(said, understood)
        table = [
            {"id": clip.id, "reference": a, "hypothesis": b, "edits": int(edits), "characters": int(size)}
            for clip, a, b, (edits, size) in zip(clips, said, understood, rates.characters, strict=True)
        ]
        return {"cer": rates.cer, "wer": rates.wer}, table

    def write(self) -> None:
        """Write the run's files of figures."""
        self.run.write_json("items.json", self.items)
        if self.trajectory:
            self.run.write_json("trajectory.json", {"x": "tokens", "series": self.trajectory})


def _mean(nats: NDArray[np.float64]) -> float:
    return float(nats[:, 0].sum() / nats[:, 1].sum())
