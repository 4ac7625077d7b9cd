"""What every composition is compared with: one part alone, and the plain average of all parts' weights."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from headwater.compose.base import Composed, Composition, CompositionContext, WeightsOnDisk
from headwater.compose.merge import merge
from headwater.core.recipe import RecipeError
from headwater.core.weights import MergeReport

__all__ = ["Average", "SinglePart"]


class SinglePart(Composition):
    """One of the parts, as it is: what is lost by composing nothing.

    Source: the definition of retention.
    """

    id: ClassVar[str] = "single_part"
    roles: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[Literal["architecture", "vocabulary"]] = "vocabulary"

    part: str | None = Field(
        default=None, description="role of the part; by default the one whose weakest suite is best on validation"
    )

    def compose(self, ctx: CompositionContext) -> Composed:
        """Choose a part and write it, an adapter merged into the base."""
        role = self.part or self._best(ctx)
        if role not in self.models:
            raise RecipeError(f"part {role!r} is no role of models: {', '.join(self.models)}")
        ctx.run.notes["part"] = role
        source, base = ctx.source(role), ctx.source(self.adapters_on if ctx.is_adapter(role) else role)
        parts = {role: (source, 1.0)} if source.is_delta else {"base": (source, 1.0)}
        ctx.charge(merge(base, parts, ctx.out, method="linear", **ctx.streaming()))
        return WeightsOnDisk(ctx.out)

    def _best(self, ctx: CompositionContext) -> str:
        scores = ctx.scores()
        return max(scores, key=lambda role: min(ctx.retention(scores, role).values()))


class Average(Composition):
    """The mean of the weights of all parts, the base left out: the merge that needs no thought.

    Source: Wortsman et al., "Model soups", arXiv:2203.05482, the uniform soup.
    """

    id: ClassVar[str] = "average"

    def compose(self, ctx: CompositionContext) -> Composed:
        """One streamed merge with equal weights."""
        parts = {role: (ctx.source(role), 1.0) for role in self.models if role != "base"}
        if not parts:
            raise RecipeError("average needs a model besides `base`")
        report: MergeReport = merge(ctx.source("base"), parts, ctx.out, method="linear", **ctx.streaming())
        ctx.charge(report)
        return WeightsOnDisk(ctx.out)
