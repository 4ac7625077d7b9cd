"""What every method of the stage is compared with: the sources as they are, and after steps that you name."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from headwater.corpora.base import CorpusRecipe
from headwater.corpora.context import CorpusContext
from headwater.corpora.curation import CurationSpec
from headwater.corpora.plan import Corpus, Reading

__all__ = ["Curated", "Raw"]


class Raw(CorpusRecipe):
    """All documents of all sources, shuffled, in one phase: no filter, no format, no order.

    Source: the definition of what a method of the stage changes.
    """

    id: ClassVar[str] = "raw"

    def build(self, ctx: CorpusContext) -> Corpus:
        """One phase over the sources, in proportion to their sizes."""
        tables = {name: source.train for name, source in ctx.sources.items()}
        return Corpus((Reading("train", 1.0, tuple(tables)),), tables)


class Curated(CorpusRecipe):
    """The sources after curation steps: rules of Gopher, C4 or FineWeb, a quality score, deduplication and the like.

    What was kept, what was removed and why lies in ``curation/NAME`` for every source.

    Source: the steps' own; see ``headwater curate``, which runs them alone.
    """

    id: ClassVar[str] = "curated"

    curation: CurationSpec = Field(description="the steps, and how they are run")

    def build(self, ctx: CorpusContext) -> Corpus:
        """One phase over what the steps leave of the sources, in proportion to their sizes."""
        tables = {}
        for name, source in ctx.sources.items():
            directory = ctx.run.path("curation") / name
            done = self.curation.run(source.train, directory, seed=self.seed, warn=ctx.warn, read=ctx.read)
            tables[name] = done.documents
        return Corpus((Reading("train", 1.0, tuple(tables)),), tables, files=("curation",))
