"""What every method of the stage is compared with: no training, training from nothing, plain training, and averaging.

``plain`` with ``replay`` is the strong and cheap baseline; no method of the stage is worth its name without beating it.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import ClassVar

import torch
from pydantic import Field

from headwater.core.fit import Phase, Trained
from headwater.domain.adaptation import Adaptation
from headwater.domain.base import Adapted, ContinuedPretraining

__all__ = ["Frozen", "Interpolated", "Plain", "Scratch", "plain_phase"]


def plain_phase(ctx: Adaptation, *, random: bool = False) -> Phase:
    """One phase over the whole domain, mixed with the recipe's share of general text."""
    replay = ctx.recipe.replay
    ctx.domain_epochs(ctx.domain.train, 1 - replay)
    return Phase("train", ctx.start(random=random), ctx.with_replay(ctx.domain.train, replay), ctx.objective)


class Plain(ContinuedPretraining):
    """Plain continued pretraining: the same objective, on the domain, with a share of general text replayed.

    Source: Gururangan et al., "Don't Stop Pretraining", arXiv:2004.10964; replay with re-warming and re-decaying:
    Ibrahim et al., "Simple and Scalable Strategies to Continually Pre-train Large Language Models", arXiv:2403.08763.
    """

    id: ClassVar[str] = "plain"

    def phases(self, ctx: Adaptation) -> Generator[Phase, Trained, Adapted]:
        """One phase."""
        trained = yield plain_phase(ctx)
        return Adapted(trained.model)


class Frozen(ContinuedPretraining):
    """The starting model as it is: what nothing costs.

    Source: the definition of gain and forgetting, both 0 here.
    """

    id: ClassVar[str] = "frozen"

    def phases(self, ctx: Adaptation) -> Generator[Phase, Trained, Adapted]:
        """No phase."""
        yield from ()
        return Adapted(ctx.start(lora=False))


class Scratch(ContinuedPretraining):
    """The same architecture and tokenizer from random weights, on the same text and budget: what the start is worth.

    Source: the control of Gu et al., "Domain-Specific Language Model Pretraining for Biomedical NLP", arXiv:2007.15779.
    """

    id: ClassVar[str] = "scratch"

    def phases(self, ctx: Adaptation) -> Generator[Phase, Trained, Adapted]:
        """One phase from new weights."""
        trained = yield plain_phase(ctx, random=True)
        return Adapted(trained.model)


class Interpolated(ContinuedPretraining):
    """Plain continued pretraining, then the average of its weights with the starting weights.

        theta = (1 - alpha) theta_start + alpha theta_trained

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT), arXiv:2109.01903, equation 1.
    """

    id: ClassVar[str] = "interpolated"

    alpha: float = Field(default=0.5, ge=0, le=1, description="weight of the trained model; 0 is the start, 1 is plain")

    def phases(self, ctx: Adaptation) -> Generator[Phase, Trained, Adapted]:
        """One phase, then the average."""
        trained = yield plain_phase(ctx)
        model = trained.model.merge_and_unload() if self.lora is not None else trained.model  # type: ignore[operator]  # a PEFT model
        start = ctx.start(lora=False).to(next(model.parameters()).device)
        with torch.no_grad():
            for mine, before in zip(model.parameters(), start.parameters(), strict=True):
                mine.copy_(torch.lerp(before.float(), mine.float(), self.alpha))
        return Adapted(model)
