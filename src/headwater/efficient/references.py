"""What every method of the stage is compared with: all weights trained, and low-rank factors alone.

Full rank is what the memory is saved against; low rank is the same saving without the method's idea.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import ClassVar, Literal

from pydantic import Field

from headwater.core.fit import Phase, Trained
from headwater.core.rng import derive_seed
from headwater.core.surgery import LinearView, replace_modules
from headwater.efficient.base import EfficientRecipe, Lean
from headwater.efficient.context import BuildContext
from headwater.efficient.linears import ComposedLinear, Rank, rank_of

__all__ = ["FullRank", "LowRank"]

PAPER_ALPHA = 32.0  # the scale that SLTrain gives its own low-rank part at the smallest size, so that the two compare


class FullRank(EfficientRecipe):
    """Ordinary training of every weight.

    Source: the reference of Han et al., "SLTrain", arXiv:2406.02214, table 2.
    """

    id: ClassVar[str] = "full_rank"

    def build(self, ctx: BuildContext) -> Generator[Phase, Trained, Lean]:
        """One phase."""
        model = ctx.start()
        yield ctx.phase(model)
        return Lean(model)


class LowRank(EfficientRecipe):
    """Every linear layer as a product of two thin ones, trained from the start.

        W = scale * L R

    Source: Kamalakara et al., "Exploring Low Rank Training of Deep Neural Networks", arXiv:2209.13569; as the
    reference of Han et al., arXiv:2406.02214, table 2.
    """

    id: ClassVar[str] = "low_rank"

    rank: Rank = Field(default=0.25, description="of the factors; a fraction is of the layer's smaller side")
    init: Literal["paper", "balanced"] = Field(
        default="balanced",
        description="`paper`: L 0, R uniform; `balanced`: the leading singular vectors of the layer's own start",
    )

    def build(self, ctx: BuildContext) -> Generator[Phase, Trained, Lean]:
        """Replace, then one phase."""
        model = ctx.start()
        seed = derive_seed(self.seed, "low_rank")

        def make(name: str, view: LinearView) -> ComposedLinear:
            rank = rank_of(self.rank, view, name)
            scale = PAPER_ALPHA / rank if self.init == "paper" else 1.0
            layer = ComposedLinear.like(view, rank=rank, scale=scale, seed=seed, name=name)
            if self.init == "balanced":
                layer.balance(view.weight)
            return layer

        replace_modules(model, make, targets=self.targets, exclude=self.exclude)
        yield ctx.phase(model)
        return Lean(model)
