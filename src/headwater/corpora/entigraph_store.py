"""A synthetic corpus on disk, written text by text, so that a stopped synthesis goes on where it was.

synthetic/part-00000.jsonl  texts with their provenance; ``datasets`` and ``read_documents`` open the folder
refused.jsonl               replies that are no text
plan.json                   what is being written; another plan is refused here
synthesis.json              written last: totals
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from headwater.core.cache import atomic_write_text, cache_key
from headwater.corpora.entigraph_prompts import Prompts
from headwater.corpora.entigraph_texts import RelationPlan, Written, breadth_first, most_telling, pieces_of, relate
from headwater.modalities.text.docs import CorpusError, Document, fingerprint
from headwater.modalities.text.generate import Generator, GeneratorError

__all__ = ["Synthesis", "check_refusals", "synthesize"]

TEXTS_PER_FILE = 10_000
MOST_REFUSED, FEWEST_JUDGED = 0.2, 20


@dataclass(frozen=True)
class Synthesis:
    """What was written.

    Attributes:
        texts: in ``synthetic/``.
        refused: replies that were empty or refusals.
        errors: requests without a reply; they are sent again when the synthesis is run again.
        planned: pairs and triples that there are.
        split: documents that were shown in pieces.
        prompt_tokens, completion_tokens: of all replies, as the generator counts.
        tokens: of the texts alone.
        usd: what they cost when they were written; ``None`` where no price is known.
    """

    texts: int
    refused: int
    errors: int
    planned: int
    split: int
    prompt_tokens: int
    completion_tokens: int
    tokens: int
    usd: float | None

    @classmethod
    def read(cls, directory: Path) -> Synthesis | None:
        """The totals of a synthesis that is over; ``None`` where there is none."""
        path = directory / "synthesis.json"
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def synthesize(
    generator: Generator,
    documents: Sequence[Document],
    plans: Sequence[RelationPlan],
    directory: Path,
    *,
    budget_tokens: int | None = None,
    prompts: Prompts | None = None,
    document_tokens: int = 8000,
    reply_tokens: int = 1024,
    temperature: float = 1.0,
) -> Synthesis:
    """Write about the relations of documents, breadth-first, until the budget is reached; go on with what is there.

    No more is asked for than the budget has room for, so that nothing is paid for and thrown away. A larger budget
    goes on from a smaller one.

    Args:
        generator: what writes.
        documents: the small corpus.
        plans: of each document; an empty plan leaves it out.
        directory: see the head of the module; other files in it are left alone.
        budget_tokens: of the texts, as the generator counts; passed by at most one text. None: everything planned.
        prompts: other words than ours.
        document_tokens: of a longer document the piece that names most of a relation's entities is shown.
        reply_tokens: of a text, at most.
        temperature: of drawing.

    Raises:
        CorpusError: the directory holds texts of another plan.
        GeneratorError: more than a fifth of the replies are refusals, empty or errors; or see ``Generator.generate``.
        ValueError: not one plan for each document.
    """
    if len(documents) != len(plans):
        raise ValueError(f"every document needs a plan; got {len(documents)} and {len(plans)}.")
    words = prompts or Prompts()
    how = {"prompts": words.model_dump(), "shown": document_tokens, "reply": reply_tokens, "temperature": temperature}
    about = {"generator": generator.id, "documents": fingerprint(documents), "plans": [p.about for p in plans], **how}
    store = _Store(directory, cache_key(about))
    pieces = [
        pieces_of(generator, document, document_tokens) if plan else []
        for document, plan in zip(documents, plans, strict=True)
    ]
    errors: list[Written] = []
    todo = (item for item in enumerate(breadth_first(plans)) if item[0] not in store.done)
    while budget_tokens is None or store.totals["tokens"] < budget_tokens:
        room = generator.window
        if budget_tokens is not None:
            room = max(1, min(room, (budget_tokens - store.totals["tokens"]) // reply_tokens))
        batch = list(islice(todo, room))
        if not batch:
            break
        relations = [(most_telling(pieces[number], entities), entities) for _, (number, entities) in batch]
        replies = relate(generator, relations, prompts=words, reply_tokens=reply_tokens, temperature=temperature)
        for (index, _), written in zip(batch, replies, strict=True):
            if written.reply.finish == "error":
                errors.append(written)
            else:
                store.add(index, written)
        samples = [f"{w.error}: {w.document.text[:200]!r}" for w in [*store.refused, *errors]]
        unusable = store.totals["refused"] + len(errors)
        check_refusals(samples, unusable, unusable + store.totals["texts"], "texts")
    done = store.totals
    counts = {name: done[name] for name in ("texts", "refused", "prompt_tokens", "completion_tokens", "tokens")}
    split = sum(len(parts) > 1 for parts in pieces)
    synthesis = Synthesis(**counts, errors=len(errors), planned=sum(map(len, plans)), split=split, usd=store.usd)
    atomic_write_text(directory / "synthesis.json", json.dumps(asdict(synthesis), indent=2) + "\n")
    return synthesis


def check_refusals(samples: Sequence[str], unusable: int, total: int, what: str) -> None:
    """Stop a generator that does not do what it is asked.

    Args:
        samples: what it said, with the reasons; three are shown.
        unusable: replies that cannot be used.
        total: replies.
        what: was asked for, e.g. "texts".

    Raises:
        GeneratorError: more than a fifth of at least twenty cannot be used.
    """
    if total >= FEWEST_JUDGED and unusable > MOST_REFUSED * total:
        shown = "\n".join(f"  {sample}" for sample in samples[:3])
        raise GeneratorError(
            f"{unusable} of {total} {what} cannot be used. Change the prompts or the generator. The first:\n{shown}"
        )


class _Store:
    """The files of a synthesis under way, and the sums over them."""

    def __init__(self, directory: Path, key: str) -> None:
        self.directory, self.texts = directory, directory / "synthetic"
        self.done: set[int] = set()
        self.totals: Counter[str] = Counter()
        self.usd: float | None = 0.0
        self.refused: list[Written] = []
        self.texts.mkdir(parents=True, exist_ok=True)
        about = directory / "plan.json"
        if about.exists() and json.loads(about.read_text(encoding="utf-8"))["key"] != key:
            raise CorpusError(
                f"{directory} holds texts of another plan: other documents, entities, prompts or another generator. "
                "Give another directory, or delete it."
            )
        atomic_write_text(about, json.dumps({"key": key}) + "\n")
        (directory / "synthesis.json").unlink(missing_ok=True)
        for path in [*sorted(self.texts.glob("*.jsonl")), directory / "refused.jsonl"]:
            for row in _whole_rows(path):
                self._count(row)

    def add(self, index: int, written: Written) -> None:
        """Append a text, or a reply that is none, and flush it."""
        reply = written.reply
        row = {
            "index": index,
            "id": written.document.id,
            "text": written.document.text,
            **written.document.meta,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "usd": reply.usd,
        }
        if written.error is None:
            path = self.texts / f"part-{self.totals['texts'] // TEXTS_PER_FILE:05d}.jsonl"
        else:
            path, row["error"] = self.directory / "refused.jsonl", written.error
            self.refused = [*self.refused, written][:3]
        with path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        self._count(row)

    def _count(self, row: Mapping[str, Any]) -> None:  # Any: JSON data
        used = "error" not in row
        self.done.add(row["index"])
        self.totals["texts" if used else "refused"] += 1
        self.totals["tokens"] += row["completion_tokens"] if used else 0
        for name in ("prompt_tokens", "completion_tokens"):
            self.totals[name] += row[name]
        self.usd = None if self.usd is None or row["usd"] is None else self.usd + row["usd"]


def _whole_rows(path: Path) -> Iterator[dict[str, Any]]:  # Any: JSON data
    """The rows of a file; half a line, which a crash leaves at the end, is cut off."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("rb+") as file:
            file.truncate(whole)
    for line in data[:whole].splitlines():
        yield json.loads(line)
