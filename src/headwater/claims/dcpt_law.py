"""Does the law predict mixtures that were not run, and does it choose a better mixture for a larger model than copying?

Small scale: character-level Llamas of three widths are pretrained on docstrings of five packages, then each continues
on five mixtures with networkx, all at a constant learning rate, and is scored six times on held-out text of both.
Absolute losses of an unseen larger size, and beating interpolation between dense ratios, are not claimed: neither is so
at this scale. A run costs the same whoever uses it, so copying from the middle size is the rival at equal cost.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwater.core.budget import Budget
from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.fit import BatchStream, FitSettings, Phase, Trained, fit
from headwater.core.optim import OptimSpec
from headwater.core.rng import derive_seed
from headwater.diagnose.dcpt_law import Form, choose_ratio, fit_law
from headwater.diagnose.mixture_choice import Predictor, copy_ratio, score_law
from headwater.diagnose.mixture_table import InterpolateGrid, Target
from headwater.modalities.text.docs import Document, drop_overlap, fingerprint, split_documents
from headwater.modalities.text.docstrings import docstring_corpus
from headwater.modalities.text.objectives import CausalObjective
from headwater.modalities.text.packing import MixedStream, PackedBlocks, TokenStore, tokenize_documents
from headwater.modalities.text.score import bits_per_byte
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.tokenizers import character_tokenizer

__all__ = ["CLAIM"]

RATIOS, HELD_OUT_RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0), (0.25, 0.75)
TOLERANCES = (0.01, 0.02, 0.03)
EXCESS_PRICE = 10.0
"""What a nat of general loss above the limit counts, in nats of domain loss."""
EVALUATIONS = 6
HELD_OUT_CHARS = 500
TARGETS: tuple[Target, ...] = ("domain", "general")


@dataclass(frozen=True)
class Setting:
    """One scale of the experiment."""

    general: tuple[str, ...]
    widths: tuple[int, ...]
    rows: int
    seq_len: int
    base_steps: int
    base_lr: float
    steps: int
    lr: float
    chars: float
    held_out: int = 12  # excerpts of 500 characters from each corpus
    starts: int = 64


PACKAGES = ("scipy", "pandas", "numpy", "sklearn", "matplotlib")
SETTINGS: Mapping[Scale, Setting] = {
    "smoke": Setting(
        ("click", "rich"),
        (8, 16, 24),
        4,
        32,
        base_steps=6,
        base_lr=1e-2,
        steps=12,
        lr=1e-2,
        chars=2e5,
        held_out=3,
        starts=8,
    ),
    "small": Setting(PACKAGES, (24, 40, 64), 16, 128, base_steps=200, base_lr=3e-3, steps=60, lr=1.5e-3, chars=3e6),
    "full": Setting(PACKAGES, (64, 128, 256), 32, 256, base_steps=4000, base_lr=3e-3, steps=1000, lr=1e-3, chars=3e7),
}


@dataclass(frozen=True)
class Texts:
    """Both corpora as tokens, and what is held out of them."""

    tokenizer: PreTrainedTokenizerBase
    train: Mapping[Target, TokenStore]
    held_out: Mapping[Target, list[Document]]
    fingerprint: str


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Train every size on every mixture for one seed, then predict unseen mixtures and choose for the largest size."""
    setting = SETTINGS[scale]
    texts = _texts(setting)
    table = pd.concat(
        [_runs(setting, texts, width, seed, directory / f"width-{width}") for width in setting.widths],
        ignore_index=True,
    )
    arms: dict[str, dict[str, float]] = {arm: {} for arm in ("mean", "law", "additive", "interpolation", "copy")}
    unseen = table["r_d"].isin(HELD_OUT_RATIOS)
    for target in TARGETS:
        predictors: dict[str, Predictor] = {
            "law": fit_law(table[~unseen], target, starts=setting.starts),
            "additive": fit_law(table[~unseen], target, starts=setting.starts, form="additive"),
            "interpolation": InterpolateGrid(table[~unseen], target),
        }
        arms["mean"][f"r2/{target}"] = 0.0  # by the definition of R2
        for arm, predictor in predictors.items():
            arms[arm][f"r2/{target}"] = score_law(predictor, table[unseen], target).r2
    _, middle, large = np.unique(table["N"]).tolist()
    truth = _Truth(table[table["N"] == large], large, float(table["D"].max()))
    forms: dict[str, Form] = {"law": "full", "additive": "additive"}
    for arm, form in forms.items():
        fits = {
            target: fit_law(table[table["N"] <= middle], target, starts=setting.starts, form=form) for target in TARGETS
        }
        chosen = {T: choose_ratio(fits["general"], fits["domain"], large, truth.D, T).r for T in TOLERANCES}
        arms[arm]["regret"] = truth.regret(chosen)
    arms["copy"]["regret"] = truth.regret({T: copy_ratio(table, middle, truth.D, T) for T in TOLERANCES})
    return Measured(arms, data_fingerprint=texts.fingerprint, unmet=truth.unmet())


class _Truth:
    """What the runs of the largest size say of every mixture, by linear interpolation between them."""

    def __init__(self, runs: pd.DataFrame, N: float, D: float) -> None:
        self.domain, self.general = (InterpolateGrid(runs, target) for target in TARGETS)
        self.N, self.D = N, D

    def regret(self, chosen: Mapping[float, float]) -> float:
        """Mean over the tolerances of the domain loss lost to the best mixture, and of what the excess costs."""
        regrets = []
        for tolerance, r in chosen.items():
            best = choose_ratio(self.general, self.domain, self.N, self.D, tolerance).loss_domain
            general, without = (float(self.general.predict(self.N, self.D, share)) for share in (1 - r, 1.0))
            excess = max(0.0, general - (1 + tolerance) * without)
            regrets.append(float(self.domain.predict(self.N, self.D, r)) - best + EXCESS_PRICE * excess)
        return float(np.mean(regrets))

    def unmet(self) -> list[str]:
        """Preconditions that these runs do not meet."""
        without, alone = (float(self.general.predict(self.N, self.D, share)) for share in (1.0, 0.0))
        rise = alone / without - 1
        if rise >= max(TOLERANCES):
            return []
        return [f"without general text the general loss is only {rise:.1%} higher, so no tolerance binds"]


@cache  # reading and comparing the texts takes longer than a seed's fits, and is the same for every seed
def _texts(setting: Setting) -> Texts:
    held_out: dict[Target, list[Document]] = {}
    train: dict[Target, list[Document]] = {}
    packages: dict[Target, tuple[str, ...]] = {"domain": ("networkx",), "general": setting.general}
    for target in TARGETS:
        split = split_documents(docstring_corpus(packages[target], limit_chars=int(setting.chars)))
        stride = max(1, len(split.test) // setting.held_out)
        whole = split.test[::stride][: setting.held_out]
        held_out[target] = [Document(d.id, d.text[:HELD_OUT_CHARS], d.meta) for d in whole]
        train[target] = drop_overlap(split.train, whole).kept
    read = [document for documents in (*train.values(), *held_out.values()) for document in documents]
    tokenizer = character_tokenizer(document.text for document in read)
    stores = {target: tokenize_documents(documents, tokenizer) for target, documents in train.items()}
    return Texts(tokenizer, stores, held_out, fingerprint(read))


def _runs(setting: Setting, texts: Texts, width: int, seed: int, directory: Path) -> pd.DataFrame:
    """Train one size's base, continue it on every mixture, and return the table of all evaluations."""
    base = tiny_llama(
        texts.tokenizer,
        hidden=width,
        layers=2,
        heads=4,
        mlp=4 * round(2 * width / 3),  # 8/3 of the width, as in Llama
        context=setting.seq_len,
        generator_seed=seed,
    )
    general = _stream(setting, texts, 0.0, derive_seed(seed, "base"))
    _train(base, general, setting.base_steps, setting.base_lr, seed, directory / "base", None)
    rows = []
    for ratio in RATIOS:
        model = copy.deepcopy(base)
        stream = _stream(setting, texts, ratio, seed)
        score = partial(_score, texts=texts)
        trained = _train(model, stream, setting.steps, setting.lr, seed, directory / f"ratio-{ratio:g}", score)
        size = sum(parameter.numel() for parameter in model.parameters())
        rows += [
            {"N": size, "D": at["tokens"], "r_d": ratio, **{f"loss_{target}": at[target] for target in TARGETS}}
            for at in trained.trajectory
        ]
    return pd.DataFrame(rows)


def _stream(setting: Setting, texts: Texts, ratio: float, seed: int) -> BatchStream:
    shares = {"domain": ratio, "general": 1 - ratio}
    parts = [
        (PackedBlocks(texts.train[target], setting.seq_len, seed), shares[target])
        for target in TARGETS
        if shares[target] > 0
    ]
    return MixedStream(parts, setting.rows, seed)


def _train(
    model: nn.Module,
    stream: BatchStream,
    steps: int,
    lr: float,
    seed: int,
    directory: Path,
    evaluate: Callable[[nn.Module], dict[str, float]] | None,
) -> Trained:
    return fit(
        Phase("train", model, stream, CausalObjective()),
        budget=Budget(steps=steps),
        # Constant, so that an evaluation on the way is what a run of that length would have reached.
        optim=OptimSpec(lr=lr, schedule="constant"),
        seed=seed,
        directory=directory,
        settings=FitSettings(precision="fp32"),
        evaluate=evaluate,
        eval_at=[] if evaluate is None else [(i + 1) / EVALUATIONS for i in range(EVALUATIONS)],
    )


def _score(model: nn.Module, texts: Texts) -> dict[str, float]:
    """Nats per byte on what is held out of both corpora."""
    language_model = cast(PreTrainedModel, model)
    return {
        target: bits_per_byte(language_model, texts.tokenizer, documents).bits_per_byte * math.log(2)
        for target, documents in texts.held_out.items()
    }


CLAIM = Claim(
    id="dcpt_law",
    statement="The law predicts the losses of mixtures that were not run, and, fitted to two sizes, chooses a mixture "
    "for a third, larger one that is better than the one copied from the middle size.",
    source="Que et al., arXiv:2406.01375: six domains, Qwen1.5 0.5B to 4B, nine mixtures; R2 0.9967 on general and "
    "0.9796 on domain losses, and 0.9717 on mixtures not fitted (these figures second-hand).",
    parts=(
        Part(
            "On the domain losses of two mixtures that were not run, R2 is above 0.95",
            "r2/domain",
            "law",
            "mean",
            "higher",
            0.95,
        ),
        Part(
            "On their general losses, R2 is above 0.95",
            "r2/general",
            "law",
            "mean",
            "higher",
            0.95,
        ),
        Part(
            "For the largest size, the law's mixtures cost less than those copied from the middle size, over "
            "tolerances of 1, 2 and 3 %",
            "regret",
            "law",
            "copy",
            "lower",
            0.0,
        ),
        Part(
            "Without interaction of mixture and length, the law chooses worse",
            "regret",
            "law",
            "additive",
            "lower",
            0.0,
            decides=False,
        ),
        Part(
            "Without the interaction, it predicts domain losses worse",
            "r2/domain",
            "law",
            "additive",
            "higher",
            0.0,
            decides=False,
        ),
        Part(
            "Linear interpolation between the three mixtures fitted predicts domain losses worse",
            "r2/domain",
            "law",
            "interpolation",
            "higher",
            0.0,
            decides=False,
        ),
    ),
    rival="copy",
    preconditions=(
        f"training the largest size without general text raises its general loss by at least {max(TOLERANCES):.0%}",
    ),
    seeds={"smoke": (100,), "small": (100, 101, 102, 103, 104), "full": (100, 101, 102, 103, 104)},
    measure=measure,
)
