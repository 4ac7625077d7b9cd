"""From a budget to a model: how many parameters and tokens so many dollars buy, by plain arithmetic.

    FLOPs = tokens * (6 parameters + 12 layers width context)         hours = FLOPs / (peak * utilisation * 3600)

The second term is attention's; it is left out where the shape is not known. Any one of budget, parameters and tokens
follows from the other two.

Sources: Kaplan et al., "Scaling Laws for Neural Language Models", arXiv:2001.08361, section 2.1 (6 N D); Narayanan et
al., arXiv:2104.04473, section 5.1 (attention); Mukherjee and Hellendoorn, arXiv:2306.03268 (about 250 tokens for each
parameter of SOBertBase).
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from pydantic import Field

from headwater.core.recipe import Spec

__all__ = ["GPUS", "LEAST_RATIO", "Gpu", "PlanSpec", "Shape", "TrainingPlan"]

LEAST_RATIO = 5.0
"""Tokens for each parameter below which a plan is refused; from 20 on a model is worth its parameters."""


@dataclass(frozen=True)
class Gpu:
    """Peak dense FLOPs a second, and the price of an hour in dollars."""

    flops: float
    dollars_per_hour: float


def _table() -> dict[str, Gpu]:
    text = resources.files("headwater.domain").joinpath("gpus.toml").read_text(encoding="utf-8")
    return {name: Gpu(**row) for name, row in tomllib.loads(text).items()}


GPUS = _table()
"""By name, from ``gpus.toml``, which is dated and there to be edited."""


@dataclass(frozen=True)
class Shape:
    """What attention costs depends on.

    Attributes:
        layers: of the model.
        width: of its hidden states.
        seq_len: tokens that attend to each other.
    """

    layers: int
    width: int
    seq_len: int

    @property
    def flops_per_token(self) -> float:
        """Of attention, forward and backward."""
        return 12.0 * self.layers * self.width * self.seq_len


@dataclass(frozen=True)
class TrainingPlan:
    """What is trained on what, and what that takes.

    Attributes:
        params: of the model.
        tokens: read, repetitions counted.
        flops: forward and backward.
        hours: on one accelerator.
        dollars: for these.
        batch_tokens: per step.
        steps: of the optimizer.
    """

    params: float
    tokens: float
    flops: float
    hours: float
    dollars: float
    batch_tokens: int
    steps: int

    @property
    def ratio(self) -> float:
        """Tokens for each parameter."""
        return self.tokens / self.params

    @classmethod
    def from_budget(
        cls,
        *,
        gpu: str | Gpu,
        dollars: float | None = None,
        hours: float | None = None,
        flops: float | None = None,
        params: float | None = None,
        tokens: float | None = None,
        shape: Shape | None = None,
        mfu: float = 0.4,
        batch_tokens: int = 524_288,
    ) -> TrainingPlan:
        """Give two of budget, parameters and tokens; the third follows.

        Args:
            gpu: a name in ``GPUS``, or one's own figures.
            dollars: to be spent; or
            hours: of one accelerator; or
            flops: forward and backward.
            params: of the model.
            tokens: to be read.
            shape: counts attention as well.
            mfu: share of the peak that training reaches, in (0, 1].
            batch_tokens: per step; 0.5 M as published.

        Raises:
            ValueError: an unknown accelerator; not exactly one unknown (names them); more than one budget; a number
                that is not positive; fewer than five tokens for each parameter (says how large a model fits).
        """
        card = _card(gpu)
        budgets = {"dollars": dollars, "hours": hours, "flops": flops}
        given = [name for name, value in budgets.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"one budget is enough; got {' and '.join(given)}.")
        numbers = {**budgets, "params": params, "tokens": tokens, "mfu": mfu, "batch_tokens": float(batch_tokens)}
        if wrong := [name for name, value in numbers.items() if value is not None and value <= 0]:
            raise ValueError(f"{wrong[0]} must be positive; got {numbers[wrong[0]]}.")
        unknown = [
            name for name, known in (("budget", given), ("params", params), ("tokens", tokens)) if known in (None, [])
        ]
        if len(unknown) != 1:
            named = " and ".join(unknown) or "nothing"
            raise ValueError(f"exactly one of budget, params and tokens must be left open; {named} is.")
        per_hour = card.flops * mfu * 3600
        total = flops
        if hours is not None:
            total = hours * per_hour
        if dollars is not None:
            total = dollars / card.dollars_per_hour * per_hour
        attention = 0.0 if shape is None else shape.flops_per_token
        if total is None and params is not None and tokens is not None:
            total = tokens * (6 * params + attention)
        elif total is not None and params is not None:
            tokens = total / (6 * params + attention)
        elif total is not None and tokens is not None:
            params = (total / tokens - attention) / 6
            if params <= 0:
                raise ValueError(
                    f"attention over {tokens:.3g} tokens alone takes more than {total:.3g} FLOPs; read fewer tokens."
                )
        assert total is not None
        assert params is not None
        assert tokens is not None
        if tokens / params < LEAST_RATIO:
            # tokens = LEAST_RATIO params:  LEAST_RATIO n (6 n + attention) = total
            largest = (-attention + (attention**2 + 24 * total / LEAST_RATIO) ** 0.5) / 12
            raise ValueError(
                f"{tokens:.3g} tokens for {params:.3g} parameters are {tokens / params:.2g} for each, fewer than "
                f"{LEAST_RATIO:g}: too few to train them. The largest model that this budget trains has {largest:.3g}."
            )
        hours = total / per_hour
        steps = max(1, round(tokens / batch_tokens))
        return cls(params, tokens, total, hours, hours * card.dollars_per_hour, batch_tokens, steps)


def _card(gpu: str | Gpu) -> Gpu:
    if isinstance(gpu, Gpu):
        return gpu
    if gpu not in GPUS:
        raise ValueError(f"no accelerator {gpu!r}; there are {', '.join(GPUS)}. Give Gpu(flops, dollars_per_hour).")
    return GPUS[gpu]


class PlanSpec(Spec):
    """What a run is planned and priced on."""

    gpu: Literal["H200", "H100", "A100", "L40S", "L4", "V100", "T4"] = Field(
        default="A100", description="accelerator, of gpus.toml"
    )
    mfu: float = Field(default=0.4, gt=0, le=1, description="share of its peak that training reaches")
