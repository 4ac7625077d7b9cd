"""What every method of the stage is compared with: the sources as they are."""

from __future__ import annotations

from typing import ClassVar

from headwater.corpora.base import CorpusRecipe
from headwater.corpora.context import CorpusContext
from headwater.corpora.plan import Corpus, Reading

__all__ = ["Raw"]


class Raw(CorpusRecipe):
    """All documents of all sources, shuffled, in one phase: no filter, no format, no order.

    Source: the definition of what a method of the stage changes.
    """

    id: ClassVar[str] = "raw"

    def build(self, ctx: CorpusContext) -> Corpus:
        """One phase over the sources, in proportion to their sizes."""
        tables = {name: source.train for name, source in ctx.sources.items()}
        return Corpus((Reading("train", 1.0, tuple(tables)),), tables)
