"""Documents by skill: the groups that a mixture weighs, and those whose losses it watches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice

import numpy as np
from transformers import PreTrainedModel

from headwater.corpora.context import CorpusContext
from headwater.corpora.reading import watcher
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.document_store import DocumentStore
from headwater.modalities.text.examples import Formatter

__all__ = ["WATCHED_DOCUMENTS", "by_skill", "skill_figures", "watched"]

WATCHED_DOCUMENTS = 200
"""At most so many validation documents of a skill are scored, the first ones."""


def by_skill(sources: Mapping[str, DocumentStore], field: str | None) -> dict[str, Sequence[Document]]:
    """Documents grouped by skill, skills in alphabetical order.

    Args:
        sources: documents by source.
        field: column of the documents that names their skill; None: each source is a skill.

    Returns:
        Skill -> documents. They stay on disk where a skill is of one source, and are read where it is of several.

    Raises:
        CorpusError: documents have no such column; says how many, and names some.
    """
    if field is None:
        return {name: sources[name] for name in sorted(sources) if sources[name]}
    parts: dict[str, list[DocumentStore]] = {}
    lacking: list[str] = []
    for source in sources.values():
        places: dict[str, list[int]] = {}
        for place, document in enumerate(source):
            value = document.meta.get(field)
            if value is None or str(value) == "":
                lacking.append(document.id)
            else:
                places.setdefault(str(value), []).append(place)
        for skill, own in places.items():
            parts.setdefault(skill, []).append(source.select(np.array(own)))
    if lacking:
        total = sum(map(len, sources.values()))
        raise CorpusError(
            f"{len(lacking)} of {total} documents have no {field!r}, e.g. {', '.join(lacking[:3])}; name the column "
            "of their skill, or none to take each source for one"
        )
    return {
        skill: stores[0] if len(stores) == 1 else [d for store in stores for d in store]
        for skill, stores in sorted(parts.items())
    }


def watched(skills: Mapping[str, Sequence[Document]]) -> dict[str, list[Document]]:
    """The documents of each skill that are scored."""
    return {name: list(islice(documents, WATCHED_DOCUMENTS)) for name, documents in skills.items()}


def skill_figures(
    ctx: CorpusContext, documents: Mapping[str, Sequence[Document]], formatter: Formatter
) -> Callable[[PreTrainedModel], dict[str, float]]:
    """What gives the trained model's ``skill/NAME/nll``, nats per target, and their mean, ``skill_mean/nll``."""

    def figures(model: PreTrainedModel) -> dict[str, float]:
        losses = watcher(ctx, documents, formatter)(model)
        mean = sum(losses.values()) / len(losses)
        return {f"skill/{name}/nll": loss for name, loss in losses.items()} | {"skill_mean/nll": mean}

    return figures
