"""ProX: a programmer writes a tiny cleaning program for each document, and a safe executor runs it.

    document -> drop_doc() or keep_doc()
    what is kept, as numbered lines in chunks -> remove_lines(a, b), normalize("x", "y"), keep_chunk()
    the programs of a document's chunks together, run once, within limits -> text | nothing | the text as it was

The language and its executor are in ``prox_programs``, the step of curation in ``prox_step``. Programs come from a
language model (``prox_generator``, with the way to tune a small one) or a linear model over lines (``prox_lines``).

Source: Zhou et al., "Programming Every Example: Lifting Pre-training Data Quality like Experts at Scale",
    arXiv:2409.17115, section 2; limits as in the authors' code (0.95, two errors, ten words).
Differs: programs are parsed, so strings may hold commas, brackets and escaped quotes, and a line that is no operation
    is an error, which the authors pass over; ``remove_lines(all=True)`` is none of ours. Lines keep the numbers that
    they were shown with, even where a replacement holds a newline; overlapping ranges are counted one by one when
    they are errors. A range that leaves its chunk is cut and an error. Replacements that make a text much longer are
    refused. The authors' thresholds for seed annotations are not in their code and are ours.
Needs: text; documents with programs, or a language model that writes programs; datatrove.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from headwater.core.cache import atomic_path, atomic_write_text
from headwater.core.recipe import CorpusRef, Metrics, Spec
from headwater.core.report import write_report
from headwater.corpora.base import CorpusRecipe
from headwater.corpora.context import CorpusContext
from headwater.corpora.curation import ExecutorSpec
from headwater.corpora.plan import Corpus, Reading
from headwater.corpora.prox_generator import Level, ProgramGenerator, annotate_seed, sft_dataset
from headwater.corpora.prox_lines import LineProgrammer
from headwater.corpora.prox_programs import (
    Limits,
    Program,
    Programmer,
    chunk_lines,
    number_lines,
    parse_program,
    render_program,
    run_program,
)
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.document_store import DocumentStore
from headwater.modalities.text.generate import GeneratorSpec

__all__ = [
    "GeneratorProgrammer",
    "Limits",
    "LineProgrammer",
    "LinesProgrammer",
    "ProX",
    "ProgramGenerator",
    "annotate_seed",
    "chunk_lines",
    "number_lines",
    "parse_program",
    "render_program",
    "run_program",
    "sft_dataset",
]

OPERATIONS = {
    "DropDoc": "drop_doc",
    "KeepDoc": "keep_doc",
    "RemoveLines": "remove_lines",
    "Normalize": "normalize",
    "KeepChunk": "keep_chunk",
}
COLUMNS = ("source", "id", "program", "status", "errors", "prompt_tokens", "completion_tokens")


class LinesProgrammer(Spec):
    """A linear model over lines, fitted to documents with programs; needs no language model."""

    kind: Literal["lines"] = Field(description="a linear model over lines")
    annotations: CorpusRef = Field(description="documents with a column `program`: what is to be done to them")
    threshold: float = Field(default=0.5, gt=0, lt=1, description="probability above which a line is removed")

    def open(self, ctx: CorpusContext) -> Programmer:
        """Fit it, and write it to ``programmer`` in the run directory.

        Raises:
            CorpusError: documents without a program, or programs that cannot be read.
        """
        documents = ctx.read(self.annotations, "programmer.annotations")
        programs: list[Program] = []
        for document in documents:
            if "program" not in document.meta:
                raise CorpusError(
                    f"programmer.annotations: document {document.id!r} has no column 'program'; its columns are "
                    f"{sorted(document.meta)}."
                )
            program, errors = parse_program(str(document.meta["program"] or ""))
            if errors:
                raise CorpusError(
                    f"programmer.annotations: {errors} lines of the program of document {document.id!r} cannot be "
                    f"read: {document.meta['program'][:200]!r}"
                )
            programs.append(program)
        try:
            fitted = LineProgrammer(threshold=self.threshold).fit([d.text for d in documents], programs)
        except ValueError as error:
            raise CorpusError(f"programmer.annotations: {error}") from None
        fitted.save(ctx.run.path("programmer"))
        return fitted


class GeneratorProgrammer(Spec):
    """A language model that writes programs."""

    kind: Literal["generator"] = Field(description="a language model")
    generator: GeneratorSpec = Field(description="which")
    levels: tuple[Level, ...] = Field(default=("doc", "chunk"), min_length=1, description="what it is asked for")
    max_doc_tokens: int = Field(default=2000, gt=0, description="of a document that are shown at the document level")
    max_chunk_tokens: int = Field(default=1500, gt=0, description="of a chunk")
    instruct: bool = Field(
        default=True, description="say in the prompt what a program is; false for a model tuned to write them"
    )

    @field_validator("levels")
    @classmethod
    def _once_and_in_order(cls, value: tuple[Level, ...]) -> tuple[Level, ...]:
        if value not in (("doc",), ("chunk",), ("doc", "chunk")):
            raise ValueError(f"levels must be [doc], [chunk] or [doc, chunk]; got {list(value)}")
        return value

    def open(self, ctx: CorpusContext) -> Programmer:
        """The programmer, which opens the model when it is asked for the first time."""
        return ProgramGenerator(
            self.generator,
            ctx.tokenizer,
            levels=self.levels,
            max_doc_tokens=self.max_doc_tokens,
            max_chunk_tokens=self.max_chunk_tokens,
            instruct=self.instruct,
        )


class ProX(CorpusRecipe):
    """Programs for every document, then plain training on what they leave."""

    id: ClassVar[str] = "prox"

    programmer: Annotated[LinesProgrammer | GeneratorProgrammer, Field(discriminator="kind")] = Field(
        description="who writes the programs: {kind: lines, annotations: ...} or {kind: generator, generator: ...}"
    )
    limits: Limits = Field(default=Limits(), description="what a program may do to a text")
    executor: ExecutorSpec = Field(default=ExecutorSpec(), description="where shards are worked on")
    shard_documents: int = Field(default=50_000, gt=0, description="documents of a shard, the unit of resuming")
    sample_report: int = Field(
        default=0,
        ge=0,
        description="texts of each fate shown before and after in curation/report.html; they are yours, so none by "
        "default",
    )

    def build(self, ctx: CorpusContext) -> Corpus:
        """One phase over the refined sources, in proportion to their sizes."""
        from headwater.corpora.prox_step import RunPrograms, check_language
        from headwater.modalities.text.curate import Executor, curate

        programmer = self.programmer.open(ctx)
        tables: dict[str, DocumentStore] = {}
        steps: dict[str, Any] = {}  # Any: JSON data
        rows: list[dict[str, Any]] = []
        for name, source in ctx.sources.items():
            directory = ctx.run.path("curation") / name
            # A document that breaks the step would be lost, and a generator that cannot go on breaks all: stop.
            done = curate(
                source.train,
                [RunPrograms(programmer, self.limits)],
                directory,
                executor=Executor(**self.executor.model_dump()),
                shard_documents=self.shard_documents,
                max_errors=0,
                samples=self.sample_report,
            )
            steps[name] = [asdict(step) for step in done.steps]
            rows += _programs(name, directory)
            tables[name] = done.documents
        wrong = [row["program"] for row in rows if row["errors"] >= self.limits.max_errors]
        check_language(len(wrong), len(rows), wrong)
        atomic_write_text(ctx.run.path("curation") / "curated.json", json.dumps({"sources": steps}) + "\n")
        write_report(ctx.run.path("curation"))
        with atomic_path(ctx.run.path("programs.parquet")) as path:
            pq.write_table(pa.table({column: [row[column] for row in rows] for column in COLUMNS}), path)
        figures = _rates(rows)
        files = ("programs.parquet", "curation", *(("programmer",) if self.programmer.kind == "lines" else ()))
        return Corpus((Reading("train", 1.0, tuple(tables)),), tables, examine=lambda model: figures, files=files)


def _programs(source: str, directory: Path) -> Iterator[dict[str, Any]]:  # Any: strings and counts
    """What every document of a curation, kept or removed, says of its program."""
    for folder in (directory / "kept", directory / "removed"):
        for path in sorted(folder.rglob("*.jsonl.gz")):
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                for line in lines:
                    row = json.loads(line)
                    read, wrote = row["program_tokens"]
                    values = (source, row["id"], row["program"], row["program_status"], row["program_errors"])
                    yield dict(zip(COLUMNS, (*values, read, wrote), strict=True))


def _rates(rows: list[dict[str, Any]]) -> Metrics:
    """Operations for each document, the share of operations in error, and how documents fared."""
    operations, statuses = Counter[str](), Counter[str]()
    for row in rows:
        operations.update(OPERATIONS[type(op).__name__] for op in parse_program(row["program"])[0])
        statuses[row["status"]] += 1
    errors, total = sum(row["errors"] for row in rows), sum(operations.values())
    rates: Mapping[str, float] = {
        **{f"programs/{name}": operations[name] / len(rows) for name in OPERATIONS.values()},
        **{f"programs/{name}": statuses[name] / len(rows) for name in ("refined", "kept", "dropped", "rejected")},
        "programs/error_rate": errors / max(1, total + errors),
        "generator_prompt_tokens": float(sum(row["prompt_tokens"] for row in rows)),
        "generator_completion_tokens": float(sum(row["completion_tokens"] for row in rows)),
    }
    return dict(rates)
