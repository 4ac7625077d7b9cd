"""Probes: the common ground on which objectives are compared, since their own losses cannot be.

    probe = - (1/n) sum over taken-out tokens of  log p(token | what is left, earlier taken-out tokens)

Each model is asked in the format it was trained on. ``adapted`` is the same figure after a fixed number of training
steps in that format on training text, the same for every model. Bits per byte of the tokens asked for compare across
tokenizers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from headwater.core.budget import Budget
from headwater.core.cache import cache_key
from headwater.core.fit import FitSettings, Phase, fit
from headwater.core.objective import Objective
from headwater.core.optim import OptimSpec
from headwater.core.recipe import Metrics, Name, Spec
from headwater.core.rng import derive_seed, hash_uniform
from headwater.modalities.text.corruption import Corruption
from headwater.modalities.text.packing import PackedBlocks

__all__ = ["Ask", "TextProbe", "TextProbes", "measured_loss", "probe_masks"]

PROBE_ROWS = 16
"""Windows per forward pass, and per step of adaptation."""


class TextProbe(Spec):
    """One question: which tokens of a held-out window are taken out."""

    name: Name = Field(pattern=r"^[a-z][a-z0-9_]*$", description="name in the metrics: probe/NAME, adapted/NAME")
    corruption: Corruption = Field(description="what is taken out")


class Ask(Protocol):
    """The format of a method: a batch whose labels are exactly the tokens that are taken out, -100 elsewhere."""

    def __call__(self, ids: NDArray[np.int64], mask: NDArray[np.bool_], corruption: Corruption) -> dict[str, Tensor]:
        """Make the batch from windows and masks, both ``(B, T)``."""
        ...


def measured_loss(
    model: nn.Module, objective: Objective, batches: Sequence[Mapping[str, Tensor]]
) -> tuple[float, float]:
    """Return the objective's total and count over batches, without gradient, in evaluation mode.

    Raises:
        ValueError: nothing was counted.
    """
    device = next(model.parameters()).device
    training, total, count = model.training, 0.0, 0.0
    model.eval()
    with torch.no_grad():
        for batch in batches:
            loss = objective(model, {name: tensor.to(device) for name, tensor in batch.items()})
            total, count = total + float(loss.total), count + float(loss.count)
    model.train(training)
    if count == 0:
        raise ValueError(f"{len(batches)} held-out batches hold nothing to predict; give more held-out data.")
    return total, count


@dataclass(frozen=True)
class TextProbes:
    """Asks one model all probes: ``probe/NAME`` and ``adapted/NAME`` in nats per token, ``..._bpb`` in bits per byte.

    Attributes:
        objective: whose total and count over a batch of ``ask`` are nats and tokens.
        ask: the format of the method.
        probes: the questions.
        train: windows that adaptation reads.
        test: held-out windows, ``(N, T)``.
        valid: held-out windows that hyperparameters may be chosen by: ``valid/NAME_bpb``, of the adapted model.
        tokenizer: tells how many bytes were asked for.
        steps: of adaptation.
        optim: of adaptation.
        settings: of adaptation.
        seed: of adaptation; what is asked does not depend on it.
        directory: for the checkpoints of adaptation.
    """

    objective: Objective
    ask: Ask
    probes: Sequence[TextProbe]
    train: PackedBlocks
    test: NDArray[np.int64]
    valid: NDArray[np.int64]
    tokenizer: PreTrainedTokenizerBase
    steps: int
    optim: OptimSpec
    settings: FitSettings
    seed: int
    directory: Path

    def __call__(self, model: nn.Module) -> Metrics:
        """Measure; ``model`` stays as it is."""
        metrics: Metrics = {}
        for probe in self.probes:
            nats, bpb = self._score(model, self.objective, probe, self.test)
            metrics |= {f"probe/{probe.name}": nats, f"probe/{probe.name}_bpb": bpb}
            adapted, objective = self._adapted(model, probe)
            nats, bpb = self._score(adapted, objective, probe, self.test)
            metrics |= {f"adapted/{probe.name}": nats, f"adapted/{probe.name}_bpb": bpb}
            metrics[f"valid/{probe.name}_bpb"] = self._score(adapted, objective, probe, self.valid)[1]
        return metrics

    def _score(
        self, model: nn.Module, objective: Objective, probe: TextProbe, windows: NDArray[np.int64]
    ) -> tuple[float, float]:
        """Nats per token and bits per byte of what the probe takes out of the windows."""
        masks = probe_masks(probe, -1 - np.arange(len(windows)), windows.shape[1], seed=0)
        batches = [
            self.ask(windows[i : i + PROBE_ROWS], masks[i : i + PROBE_ROWS], probe.corruption)
            for i in range(0, len(windows), PROBE_ROWS)
        ]
        total, count = measured_loss(model, objective, batches)
        asked = [ids[mask] for ids, mask in zip(windows, masks, strict=True)]
        texts = self.tokenizer.batch_decode(asked, skip_special_tokens=True)
        return total / count, total / math.log(2) / sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)

    def _adapted(self, model: nn.Module, probe: TextProbe) -> tuple[nn.Module, Objective]:
        model, objective = copy.deepcopy((model, self.objective))
        fit(
            Phase(f"probe-{probe.name}", model, _Asked(self, probe), objective),
            budget=Budget(steps=self.steps),
            optim=self.optim,
            seed=self.seed,
            directory=self.directory,
            settings=self.settings.model_copy(update={"checkpoint_every": None, "trackers": ()}),
        )
        return model, objective


class _Asked:
    """Training windows in a probe's format."""

    def __init__(self, probes: TextProbes, probe: TextProbe) -> None:
        self._probes, self._probe = probes, probe
        self.rows, self.tokens_per_row = PROBE_ROWS, probes.train.seq_len
        about = {"blocks": probes.train.fingerprint, "probe": probe.model_dump(mode="json"), "seed": probes.seed}
        self.fingerprint = cache_key(about)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        rows = np.arange(step * self.rows, (step + 1) * self.rows)[start:stop]
        masks = probe_masks(self._probe, rows, self.tokens_per_row, seed=self._probes.seed)
        return self._probes.ask(self._probes.train.tokens(rows), masks, self._probe.corruption)


def probe_masks(probe: TextProbe, rows: NDArray[np.int64], length: int, *, seed: int) -> NDArray[np.bool_]:
    """What the probe takes out of each row, ``(B, length)``: a function of (seed, probe, row) alone."""
    return probe.corruption.mask(hash_uniform(derive_seed(seed, "probe", probe.name), rows, length))
