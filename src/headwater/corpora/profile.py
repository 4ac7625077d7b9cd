"""What a corpus is like, domain by domain: size, length, variety, personal data, and the scores it was given.

Source: Longpre et al., arXiv:2305.13169, section 3, whose features these are.
Differs: personal data are e-mail addresses, IPv4 addresses and telephone numbers, found by regular expressions that
    miss some and take some other runs of digits for one; the paper used a classifier of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from headwater.modalities.text.docs import Document

__all__ = ["PERSONAL", "corpus_profile"]

TYPE_WORDS = 100_000
"""Words of a domain in which different ones are counted: their share falls with length, so it is taken at one."""

PERSONAL = re.compile(
    r"\b[\w.+-]+@[\w-]+\.[\w.-]*\w"  # an e-mail address
    r"|(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.])"  # IPv4
    r"|(?<![\w.])(?:\+\d{1,3}[ .-]?)?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}(?!\w)"  # a telephone number
)
"""E-mail addresses, IPv4 addresses, and telephone numbers of three, three and four digits."""


@dataclass
class _Domain:
    """Sums over a domain's documents."""

    documents: int = 0
    size: int = 0
    characters: int = 0
    foreign: int = 0
    personal: int = 0
    counted: int = 0
    types: set[str] = field(default_factory=set)
    scores: dict[str, list[float]] = field(default_factory=dict)


def corpus_profile(
    documents: Iterable[Document],
    *,
    domain_field: str = "domain",
    scores: Sequence[str] = ("quality", "toxicity"),
    quantiles: Sequence[float] = (0.1, 0.5, 0.9),
) -> pd.DataFrame:
    """Features of a corpus by domain; documents are read once and not kept.

    Args:
        documents: with their metadata.
        domain_field: column that names a document's domain; those without it are of the domain "".
        scores: columns whose quantiles are taken, where a domain has them.
        quantiles: in [0, 1].

    Returns:
        One row for each domain, indexed by its name and sorted: ``documents``, ``bytes``, ``mean_length`` (characters),
        ``type_token_ratio`` (different words among the first 100 000), ``non_ascii`` (share of characters),
        ``personal`` (share of documents that match ``PERSONAL``), and ``SCORE_qQ`` for each score and quantile, NaN
        where no document of the domain has it.
    """
    found: dict[str, _Domain] = {}
    for document in documents:
        own = found.setdefault(str(document.meta.get(domain_field, "")), _Domain())
        own.documents += 1
        own.size += len(document.text.encode("utf-8", "surrogatepass"))
        own.characters += len(document.text)
        own.foreign += sum(not character.isascii() for character in document.text)
        own.personal += PERSONAL.search(document.text) is not None
        if own.counted < TYPE_WORDS:
            words = re.findall(r"\w+", document.text.lower())[: TYPE_WORDS - own.counted]
            own.types.update(words)
            own.counted += len(words)
        for name in scores:
            if isinstance(value := document.meta.get(name), (int, float)):
                own.scores.setdefault(name, []).append(value)
    rows = {
        name: {
            "documents": own.documents,
            "bytes": own.size,
            "mean_length": own.characters / own.documents,
            "type_token_ratio": len(own.types) / max(1, own.counted),
            "non_ascii": own.foreign / max(1, own.characters),
            "personal": own.personal / own.documents,
        }
        | {
            f"{score}_q{q:g}": float(np.quantile(own.scores[score], q)) if score in own.scores else np.nan
            for score in scores
            for q in quantiles
        }
        for name, own in sorted(found.items())
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("domain")
