"""Looking at a corpus: some documents of every source, drawn evenly over their scores, judged by a person.

    write    review.html to read, review.csv to fill in: accept, clean or reject for each document
    apply    the sheet back, as a verdict on each source, with the interval that so few documents leave

Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jinja2 import Environment
from numpy.typing import NDArray
from scipy.stats import binomtest

from headwater.core.cache import atomic_write_text
from headwater.core.order import permutation
from headwater.core.rng import derive_seed
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.document_store import text_digest

__all__ = ["ReviewQueue", "Sampled", "Verdict"]

WORDS = ("accept", "clean", "reject")
COLUMNS = ("row", "source", "document", "decile", "score", "verdict", "comment")
SHOWN_CHARS = 4_000
_NAMED = 10  # rows of a sheet that an error names


class Sampled(NamedTuple):
    """A document that is to be looked at.

    Attributes:
        source: where it is from.
        decile: of its score among the source's, 1 the lowest.
        score: its own.
        document: itself.
    """

    source: str
    decile: int
    score: float
    document: Document

    @property
    def name(self) -> str:
        """Stands for the text in the sheet, and is no formula to any program that opens it."""
        return f"text-{text_digest(self.document.text).hex()[:12]}"


@dataclass(frozen=True)
class Verdict:
    """What a review found of a source.

    Attributes:
        decision: ``accept``: at least the asked share of it is acceptable; ``clean``: it would be after cleaning;
            ``reject``: neither; ``unsure``: too few documents to tell.
        reviewed, accepted, cleaned: documents.
        rate: share of accepted documents.
        low, high: its 95 % interval, by Wilson.
    """

    decision: Literal["accept", "clean", "reject", "unsure"]
    reviewed: int
    accepted: int
    cleaned: int
    rate: float
    low: float
    high: float


class ReviewQueue:
    """Documents to look at: of each source as many from each tenth of its scores.

    Args:
        tables: scored documents, by source.
        per_source: documents of each, or all where it has fewer.
        field: the score, in the documents' metadata.
        seed: of the draw; equal documents and seed give equal sheets.

    Attributes:
        rows: what was drawn.

    Raises:
        CorpusError: a document without a score.
        ValueError: fewer than one document of each source.
    """

    def __init__(
        self,
        tables: Mapping[str, Sequence[Document]],
        per_source: int = 50,
        *,
        field: str = "expository",
        seed: int = 0,
    ) -> None:
        if per_source < 1:
            raise ValueError(f"per_source must be at least 1; got {per_source}.")
        rows = []
        for source, documents in tables.items():
            scores = _scores(source, documents, field)
            for decile, places in enumerate(_drawn(scores, per_source, derive_seed(seed, "review", source)), start=1):
                rows += [Sampled(source, decile, float(scores[i]), documents[i]) for i in places]
        self.rows = tuple(rows)

    def write(self, directory: Path) -> tuple[Path, Path]:
        """Write ``review.html`` and ``review.csv``, the latter with blank verdicts, and return their paths."""
        sheet = io.StringIO()
        writer = csv.writer(sheet, lineterminator="\n")
        writer.writerow(COLUMNS)
        for number, row in enumerate(self.rows, start=1):
            writer.writerow((number, row.source, row.name, row.decile, f"{row.score:.4f}", "", ""))
        page, path = directory / "review.html", directory / "review.csv"
        template = Environment(autoescape=True).from_string(_PAGE)
        atomic_write_text(page, template.render(rows=self.rows, shown=SHOWN_CHARS))
        atomic_write_text(path, sheet.getvalue())
        return page, path

    def apply(self, sheet: Path, least: float = 0.5) -> dict[str, Verdict]:
        """Read a sheet that was filled in.

        Args:
            sheet: ``review.csv`` with ``accept``, ``clean`` or ``reject`` in every row.
            least: share of acceptable documents that a source must have, in (0, 1).

        Returns:
            The verdict on each source.

        Raises:
            CorpusError: not such a sheet, of other documents, of unknown sources, or not filled in; names the rows.
        """
        given = self._read(sheet)
        verdicts = {}
        for source in dict.fromkeys(row.source for row in self.rows):
            words = [word for row, word in zip(self.rows, given, strict=True) if row.source == source]
            verdicts[source] = _judge(words.count("accept"), words.count("clean"), len(words), least)
        return verdicts

    def _read(self, sheet: Path) -> list[str]:
        """The word in every row, in order."""
        with sheet.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            lines = list(reader)
            if missing := [name for name in COLUMNS[:-1] if name not in (reader.fieldnames or ())]:
                raise CorpusError(f"{sheet} has no column {missing[0]!r}; it is no sheet of a review.")
        known = {row.source for row in self.rows}
        if unknown := [line for line in lines if line["source"] not in known]:
            raise CorpusError(
                f"{sheet}: unknown source {unknown[0]['source']!r} in {_rows(unknown)}; there are {sorted(known)}."
            )
        found = {(line["source"], line["document"]): line for line in lines}
        if lacking := [row for row in self.rows if (row.source, row.name) not in found]:
            raise CorpusError(
                f"{sheet} is of other documents: {len(lacking)} of {len(self.rows)} are not in it, the first being "
                f"{lacking[0].name} of {lacking[0].source!r}. Review the present ones."
            )
        ordered = [found[row.source, row.name] for row in self.rows]
        words = [(line["verdict"] or "").strip().lower() for line in ordered]
        if blank := [line for line, word in zip(ordered, words, strict=True) if not word]:
            raise CorpusError(
                f"{sheet}: {len(blank)} of {len(ordered)} verdicts are blank, in {_rows(blank)}; write "
                f"{', '.join(WORDS[:-1])} or {WORDS[-1]} in each."
            )
        if wrong := [line for line, word in zip(ordered, words, strict=True) if word not in WORDS]:
            raise CorpusError(
                f"{sheet}: {wrong[0]['verdict']!r} in {_rows(wrong)} is no verdict; there are {', '.join(WORDS)}."
            )
        return words


def _scores(source: str, documents: Sequence[Document], field: str) -> NDArray[np.float64]:
    scores = np.empty(len(documents))
    for place, document in enumerate(documents):
        value = document.meta.get(field)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CorpusError(f"document {document.id!r} of {source!r} has no score {field!r}; score it first.")
        scores[place] = value
    return scores


def _drawn(scores: NDArray[np.float64], count: int, seed: int) -> list[list[int]]:
    """Places of what is drawn from each tenth; what does not divide by ten goes to the highest tenths."""
    tenths = np.array_split(np.argsort(scores, kind="stable"), 10)
    quotas = [count // 10 + (tenth >= 10 - count % 10) for tenth in range(10)]
    return [
        sorted(tenth[permutation(seed, number, len(tenth))[:quota]].tolist())
        for number, (tenth, quota) in enumerate(zip(tenths, quotas, strict=True))
    ]


def _judge(accepted: int, cleaned: int, reviewed: int, least: float) -> Verdict:
    interval = binomtest(accepted, reviewed).proportion_ci(method="wilson")
    decision: Literal["accept", "clean", "reject", "unsure"] = "unsure"
    if interval.low >= least:
        decision = "accept"
    elif interval.high < least:
        decision = "clean" if (accepted + cleaned) / reviewed >= least else "reject"
    return Verdict(
        decision, reviewed, accepted, cleaned, accepted / reviewed, float(interval.low), float(interval.high)
    )


def _rows(lines: Sequence[Mapping[str, str]]) -> str:
    numbers = [line["row"] for line in lines]
    return f"rows {', '.join(numbers[:_NAMED])}" + (" and others" if len(numbers) > _NAMED else "")


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Review</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: 1rem; }
td, th { text-align: left; padding-right: 1.5rem; }
</style>
<h1>Review</h1>
<p>Read each text and write <b>accept</b>, <b>clean</b> (good once cleaned) or <b>reject</b> into the same row of
<code>review.csv</code>. From each source come as many texts from each tenth of its scores.</p>
{% for row in rows %}
<h2>{{ loop.index }}</h2>
<table>
<tr><th>source<td>{{ row.source }}<th>score<td>{{ "%.4f"|format(row.score) }}<th>decile<td>{{ row.decile }}
<th>document<td>{{ row.document.id }}
</table>
<pre>{{ row.document.text[:shown] }}{% if row.document.text|length > shown %}
[{{ row.document.text|length - shown }} more characters]{% endif %}</pre>
{% endfor %}
</html>
"""
