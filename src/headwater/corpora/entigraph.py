"""EntiGraph: a small corpus becomes a large one of texts about pairs and triples of its entities, and is read as that.

    document -> entities E_1 ... E_n -> a text for each pair {E_i, E_j} and triple {E_i, E_j, E_k}
    batch    -> synthetic text with probability 1 - r, general text with probability r = 0.1

The document itself is not read. Its facts come back from many sides, in other words and other orders, as reading a
document once does not show them: what it says of A through B is also said of B through A.

Source: Yang et al., "Synthetic continued pretraining", arXiv:2409.07431, sections 2 to 4, and the authors' code for
    what they leave open (entities as JSON; pairs in order, then shuffled triples; blocks of 2048, 16 a batch).
Differs: documents take turns, so that a budget covers all of them, where the authors finish one after the other; pairs
    are shuffled too; the authors' questions about single entities, which the paper leaves out, are left out; a document
    in pieces shows a relation the piece that names most of it; replay is an exact share of the rows instead of a draw;
    ``budget`` says how long training goes on, 2 epochs in the paper, and the metric ``epochs`` what it came to.
    Whether a document quotes a question is not looked for here; ``Decontaminate`` does.
Needs: a generator that follows instructions; a small corpus whose documents have at least two entities; a pretrained
    model, and general text to replay.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, model_validator
from transformers import PreTrainedModel

from headwater.core.cache import atomic_write_text
from headwater.core.launch import wait_for_launched
from headwater.core.optim import OptimSpec
from headwater.core.recipe import CorpusRef, Metrics
from headwater.core.rng import derive_seed
from headwater.corpora.base import CorpusRecipe
from headwater.corpora.context import CorpusContext
from headwater.corpora.entigraph_prompts import Prompts
from headwater.corpora.entigraph_store import Synthesis, check_refusals, synthesize
from headwater.corpora.entigraph_texts import (
    EntityList,
    RelationPlan,
    Written,
    breadth_first,
    extract_entities,
    named,
    relate,
    rephrase,
)
from headwater.corpora.entigraph_toy import entigraph_toy, fit_mixture_of_exponentials
from headwater.corpora.plan import Corpus, Reading
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.generate import GeneratorSpec, open_generator
from headwater.modalities.text.generate_store import Cached

__all__ = [
    "EntiGraph",
    "EntityList",
    "Prompts",
    "RelationPlan",
    "ReplayMixture",
    "Synthesis",
    "Written",
    "breadth_first",
    "entigraph_toy",
    "extract_entities",
    "fit_mixture_of_exponentials",
    "read_entities",
    "relate",
    "rephrase",
    "synthesize",
    "write_entities",
]


@dataclass(frozen=True)
class ReplayMixture:
    """Synthetic text with a share of general text in every batch, against forgetting.

    Attributes:
        general: what is replayed; None for nothing.
        rate: its share, in [0, 1).
    """

    general: Sequence[Document] | None
    rate: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must be in [0, 1); got {self.rate}.")

    def corpus(self, synthetic: Sequence[Document]) -> Corpus:
        """One phase over both tables."""
        tables = {"synthetic": synthetic}
        if self.general is None or self.rate == 0:
            return Corpus((Reading("train", 1.0, ("synthetic",)),), tables)
        reading = Reading("train", 1.0, ("synthetic", "replay"), (1 - self.rate, self.rate))
        return Corpus((reading,), tables | {"replay": self.general})


def write_entities(lists: Sequence[EntityList], path: Path) -> None:
    """Write entity lists as JSON lines, which ``read_entities`` and a recipe's ``entities`` read."""
    atomic_write_text(path, "".join(json.dumps(asdict(entities)) + "\n" for entities in lists))


def read_entities(path: Path) -> dict[str, Mapping[str, Any]]:  # Any: JSON data
    """Rows with ``source_id`` and ``entities`` by document id; rows of documents without an answer are left out.

    Raises:
        CorpusError: no such file, or a line that is no such row.
    """
    found = {}
    try:
        lines = path.expanduser().read_text(encoding="utf-8").split("\n")  # other line breaks may stand in names
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"entities: {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            whole = isinstance(row["source_id"], str) and all(isinstance(name, str) for name in row["entities"])
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole or isinstance(row["entities"], str):
            raise CorpusError(
                f'entities: {path}:{number} is no row like {{"source_id": "document", "entities": ["A", "B"]}}.'
            )
        if not row.get("error"):
            found[row["source_id"]] = row
    return found


class EntiGraph(CorpusRecipe):
    """Synthetic continued pretraining on the sources, which are the small corpus."""

    id: ClassVar[str] = "entigraph"

    generator: GeneratorSpec | None = Field(default=None, description="what reads the documents and writes about them")
    target_tokens: int | None = Field(
        default=None, gt=0, description="tokens of synthetic text to write, as the generator counts; needs `generator`"
    )  # 455 million from 1.3 million in section 4
    synthetic: CorpusRef | None = Field(
        default=None, description="in place of a generator: texts written before, e.g. `synthetic/` of another run"
    )
    entities: Path | None = Field(
        default=None,
        description="JSON lines with `source_id` (a document's id) and `entities`: what is known is not asked for; "
        "`entities.jsonl` of another run will do",
    )
    max_entities: int = Field(default=40, ge=2, le=200, description="entities of a document, the first ones")
    pairs: NonNegativeInt | Literal["all"] = Field(default="all", description="pairs of a document's entities")
    triples: NonNegativeInt | Literal["all"] = Field(default="all", description="triples of a document's entities")
    order: Literal["shuffled", "reference"] = Field(
        default="shuffled", description="of pairs; reference: as the entities stand. Triples are always shuffled"
    )
    prompts: Path | None = Field(
        default=None, description="TOML file with other words: extract, relate, show, show_entities"
    )
    document_tokens: int = Field(
        default=8000, gt=0, description="a longer document is shown to the generator in pieces; it counts these tokens"
    )
    reply_tokens: int = Field(default=1024, gt=0, description="tokens of a text, at most")
    temperature: float = Field(default=1.0, ge=0, description="of drawing texts; 0 is greedy")  # section 4
    replay: CorpusRef | None = Field(default=None, description="general text that is read along, against forgetting")
    replay_rate: float = Field(default=0.1, ge=0, lt=1, description="share of general text in every batch")  # section 4
    from_scratch: bool = Field(default=False, description="draw new weights; false continues from the model's own")
    seq_len: int = Field(default=2048, ge=8, le=131_072, description="tokens per row")
    packing: Literal["concat", "document", "document, running positions"] = Field(
        default="concat",
        description="concat: documents end to end, cut anywhere, all seen; document: whole documents in a row, each "
        "seen alone, positions from 0; running positions: the same, counted through the row",
    )
    optim: OptimSpec = Field(
        default=OptimSpec(lr=5e-6, weight_decay=0.01, warmup=0.05, final_lr=0.0), description="how weights are moved"
    )  # section 4

    @model_validator(mode="after")
    def _texts_come_from_somewhere(self) -> Self:
        if (self.generator is None) == (self.synthetic is None):
            raise ValueError("give one of `generator`, which writes the texts, and `synthetic`, texts written before")
        if (self.generator is None) != (self.target_tokens is None):
            raise ValueError("`generator` needs `target_tokens`, which bounds what it writes; `synthetic` has none")
        return self

    def build(self, ctx: CorpusContext) -> Corpus:
        """Write the texts, or read those that are there, and mix them with general text."""
        general = None if self.replay is None else ctx.read(self.replay, "replay")
        if general is None:
            ctx.warn("replay", "no general text is replayed, so expect the model to forget; name some in `replay`")
        if self.synthetic is not None:
            return ReplayMixture(general, self.replay_rate).corpus(ctx.read(self.synthetic, "synthetic"))
        directory = ctx.run.nested("synthetic").parent
        if ctx.run.is_main_process and Synthesis.read(directory) is None:
            self._synthesize(ctx, directory)
        wait_for_launched()
        figures = self._figures(ctx, directory)
        texts = ctx.read(CorpusRef(name=str(directory / "synthetic")), "synthetic")

        def examine(model: PreTrainedModel) -> Metrics:
            return figures

        files = ("synthetic", "entities.jsonl", "synthesis.json")
        return replace(ReplayMixture(general, self.replay_rate).corpus(texts), examine=examine, files=files)

    def _synthesize(self, ctx: CorpusContext, directory: Path) -> None:
        documents, prompts = _documents(ctx), Prompts.read(self.prompts)
        assert self.generator is not None, "checked when the recipe was made"
        with open_generator(self.generator) as generator:
            lists = self._entities(ctx, generator, documents, prompts, directory)
            plans = [
                RelationPlan(
                    entities.entities if len(entities.entities) > 1 else (),
                    pairs=self.pairs,
                    triples=self.triples,
                    order=self.order,
                    seed=derive_seed(self.seed, "relations", document.id),
                )
                for document, entities in zip(documents, lists, strict=True)
            ]
            if not any(plans):
                raise CorpusError(
                    f"none of {len(documents)} documents has two entities to relate; name them in `entities`, or give "
                    "a generator that follows instructions"
                )
            synthesize(
                generator,
                documents,
                plans,
                directory,
                budget_tokens=self.target_tokens,
                prompts=prompts,
                document_tokens=self.document_tokens,
                reply_tokens=self.reply_tokens,
                temperature=self.temperature,
            )

    def _entities(
        self, ctx: CorpusContext, generator: Cached, documents: Sequence[Document], prompts: Prompts, directory: Path
    ) -> list[EntityList]:
        """Entities of every document: known, found by an earlier process of this run, or asked for now."""
        path = directory / "entities.jsonl"
        if path.exists():
            rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            return [EntityList(**row | {name: tuple(row[name]) for name in ("entities", "absent")}) for row in rows]
        known = {} if self.entities is None else read_entities(self.entities)
        unknown = [document for document in documents if document.id not in known]
        if self.entities is not None and len(unknown) == len(documents):
            raise CorpusError(f"entities: {self.entities} names none of the documents, e.g. {documents[0].id!r}.")
        found: dict[str, EntityList] = {}
        failed: list[str] = []
        asked = extract_entities(
            generator, unknown, max_entities=self.max_entities, prompts=prompts, document_tokens=self.document_tokens
        )
        for entities in asked:
            found[entities.source_id] = entities
            if entities.error is not None:
                failed.append(f"{entities.source_id}: {entities.error}")
            check_refusals(failed, len(failed), len(found), "lists of entities")
        for document in documents:
            if (row := known.get(document.id)) is not None:
                listed = named(document, row["entities"], str(row.get("summary") or ""), self.max_entities)
                found[document.id] = listed
        lists = [found[document.id] for document in documents]
        ctx.run.write_json("extraction.json", asdict(generator.usage))
        write_entities(lists, path)  # after its costs: that it is there means that both are
        return lists

    def _figures(self, ctx: CorpusContext, directory: Path) -> Metrics:
        """What was generated, and warnings about what was not; a function of the files of the run."""
        synthesis = Synthesis.read(directory)
        assert synthesis is not None, "written by the main process"
        usage = json.loads((directory / "extraction.json").read_text(encoding="utf-8"))
        lists = [json.loads(line) for line in (directory / "entities.jsonl").read_text(encoding="utf-8").splitlines()]
        if skipped := [row["source_id"] for row in lists if len(row["entities"]) < 2]:
            ctx.warn("skipped", f"{len(skipped)} documents have fewer than two entities: {', '.join(skipped[:10])}")
        if synthesis.split:
            ctx.warn("split", f"{synthesis.split} documents are longer than document_tokens and were shown in pieces")
        if synthesis.refused or synthesis.errors:
            ctx.warn(
                "refused", f"{synthesis.refused} replies were empty or refusals, {synthesis.errors} requests failed"
            )
        if self.target_tokens is not None and synthesis.tokens < self.target_tokens:
            ctx.warn(
                "target",
                f"all {synthesis.planned} pairs and triples gave {synthesis.tokens} tokens, not {self.target_tokens}; "
                "raise max_entities, pairs or triples",
            )
        costs = {} if synthesis.usd is None else {"generator_usd": synthesis.usd + usage["usd_total"]}
        return costs | {
            "generator_requests": float(usage["requests"] + synthesis.texts + synthesis.refused + synthesis.errors),
            "generator_prompt_tokens": float(usage["prompt_tokens"] + synthesis.prompt_tokens),
            "generator_completion_tokens": float(usage["completion_tokens"] + synthesis.completion_tokens),
            "synthetic_texts": float(synthesis.texts),
            "synthetic_tokens": float(synthesis.tokens),
            "entities": float(sum(len(row["entities"]) for row in lists)),
            "entities_absent": float(sum(len(row["absent"]) for row in lists)),
            "refused": float(synthesis.refused),
            "documents_skipped": float(len(skipped)),
        }


def _documents(ctx: CorpusContext) -> list[Document]:
    """Training documents of all sources, under ids that name the source where there are several."""
    several = len(ctx.sources) > 1
    documents = [
        replace(document, id=f"{name}/{document.id}") if several else document
        for name, source in ctx.sources.items()
        for document in source.train
    ]
    if len({document.id for document in documents}) < len(documents):
        raise CorpusError("sources: two documents have one id, so a text could not name its source; give them ids.")
    return documents
