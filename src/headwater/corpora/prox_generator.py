"""Programs from a language model, seed annotations from a strong one, and what a small one is tuned on.

    document level   document, cut to 2000 tokens                       -> drop_doc() or keep_doc()
    chunk level      numbered lines of what is left, 1500 tokens each   -> remove_lines, normalize, keep_chunk

    strong model -> annotate_seed -> sft_dataset -> any recipe for instruction tuning -> the small model that refines

Source: Zhou et al., "Programming Every Example", arXiv:2409.17115, sections 2 and 3; forms as the authors' code has
    them.
Differs: the prompts are ours (``instruct``); without them a model is asked as the authors' refiners are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedTokenizerBase

from headwater.corpora.prox_programs import (
    Chunk,
    DropDoc,
    KeepChunk,
    KeepDoc,
    Normalize,
    Op,
    Program,
    RemoveLines,
    Written,
    chunk_lines,
    number_lines,
    parse_program,
    render_program,
    unix_lines,
)
from headwater.modalities.text.docs import Document
from headwater.modalities.text.generate import (
    Generator,
    HFSpec,
    HTTPSpec,
    Message,
    Reply,
    Request,
    open_generator,
)
from headwater.modalities.text.prepared import tokenizer_fingerprint

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Level", "ProgramGenerator", "annotate_seed", "sft_dataset"]

Level = Literal["doc", "chunk"]

SYSTEM = "You are a helpful, respectful and honest assistant."
DOC_TASK = """Decide whether the document below is worth reading for a language model in training. Drop what teaches \
nothing: advertisements, lists of links, broken or garbled text. Answer with one line and nothing else, either
drop_doc()
or
keep_doc()"""
CHUNK_TASK = """Below is a part of a document, each line with its number in brackets. Write a program that cleans it, \
one call a line and nothing else:
remove_lines(line_start=A, line_end=B)  removes lines A to B, both included: navigation, links, advertisements, garbage
normalize(source_str="...", target_str="...")  replaces a string that is noise inside lines worth keeping
keep_chunk()  if there is nothing to clean"""
SCORE_TASK = """Score the document below from 0 to 5, once for its educational value (0: none, 5: a good textbook) \
and once for its format (0: mostly noise such as menus, links and garbled text, 5: clean and well-formed). Answer with \
two lines and nothing else:
education: N
format: N"""


class ProgramGenerator:
    """Asks a generator for programs, greedily: a ``Programmer``.

    Args:
        generator: that writes; a spec is opened at the first use, in every worker of a curation anew.
        tokenizer: counts tokens, to cut documents and chunks.
        levels: which are asked; a document that the first drops is not shown to the second.
        max_doc_tokens: of a document at the document level; the rest is not shown.
        max_chunk_tokens: of a chunk, line numbers included.
        max_tokens: of a program.
        instruct: say what is wanted, as a model needs that was not tuned for it.

    Raises:
        ValueError: no level, or one that does not exist.
    """

    def __init__(
        self,
        generator: Generator | HFSpec | HTTPSpec,
        tokenizer: PreTrainedTokenizerBase,
        *,
        levels: Sequence[Level] = ("doc", "chunk"),
        max_doc_tokens: int = 2000,
        max_chunk_tokens: int = 1500,
        max_tokens: int = 256,
        instruct: bool = True,
    ) -> None:
        if not levels or set(levels) - {"doc", "chunk"}:
            raise ValueError(f"levels must be of 'doc' and 'chunk', at least one; got {list(levels)}.")
        self._generator, self.tokenizer, self.levels = generator, tokenizer, tuple(levels)
        self.max_doc_tokens, self.max_chunk_tokens, self.max_tokens = max_doc_tokens, max_chunk_tokens, max_tokens
        self.instruct = instruct
        self._opened: Generator | None = generator if isinstance(generator, Generator) else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": self._opened if isinstance(self._generator, Generator) else None}

    @property
    def fingerprint(self) -> str:
        """Of the generator, the tokenizer and the settings."""
        who = self._generator.id if isinstance(self._generator, Generator) else self._generator.model_dump_json()
        sizes = [self.max_doc_tokens, self.max_chunk_tokens, self.max_tokens, self.instruct, DOC_TASK, CHUNK_TASK]
        about = [who, tokenizer_fingerprint(self.tokenizer), self.levels, *sizes]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]

    def programs(self, texts: Sequence[str]) -> list[Written]:
        """See ``Programmer``; a request that failed counts as one error.

        Raises:
            GeneratorError: the generator cannot go on.
        """
        written = [Written("", ()) for _ in texts]
        if "doc" in self.levels:
            shown = [cut_tokens(unix_lines(text), self.tokenizer, self.max_doc_tokens) for text in texts]
            requests = [self._request("doc", text) for text in shown]
            written = [_read_document(reply) for reply in self._replies(requests)]
        if "chunk" in self.levels:
            open_ = [place for place, found in enumerate(written) if DropDoc() not in found.program]
            chunks = [chunk_lines(unix_lines(texts[place]), self.tokenizer, self.max_chunk_tokens) for place in open_]
            requests = [self._request("chunk", self._shown(chunk)) for parts in chunks for chunk in parts]
            replies = self._replies(requests)
            for place, parts in zip(open_, chunks, strict=True):
                found = [_read_chunk(next(replies), chunk) for chunk in parts]
                written[place] = _joined([written[place], *found])
        return written

    def _replies(self, requests: Sequence[Request]) -> Iterator[Reply]:
        if self._opened is None:
            assert not isinstance(self._generator, Generator)
            self._opened = open_generator(self._generator)
        return self._opened.generate(requests)

    def _shown(self, chunk: Chunk) -> str:
        return cut_tokens(number_lines(chunk.text, chunk.first), self.tokenizer, self.max_chunk_tokens)

    def _request(self, level: Level, text: str) -> Request:
        task = {"doc": DOC_TASK, "chunk": CHUNK_TASK}[level] if self.instruct else ""
        return Request(_messages(level, text, task), max_tokens=self.max_tokens, temperature=0.0, tag=level)


def _messages(level: Level, text: str, task: str = "") -> tuple[Message, ...]:
    content = f"[doc]\n{text}\n[/doc]" if level == "chunk" or task else text
    return Message("system", SYSTEM), Message("user", f"{task}\n\n{content}" if task else content)


def cut_tokens(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    """The text, or its first ``max_tokens`` tokens as the tokenizer writes them."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= max_tokens else str(tokenizer.decode(ids[:max_tokens]))


def _read_document(reply: Reply) -> Written:
    program, errors = parse_program(reply.text)
    kept = tuple(op for op in program if isinstance(op, DropDoc | KeepDoc))
    errors += len(program) - len(kept) + (reply.finish == "error")
    return Written(reply.text, kept, errors, reply.prompt_tokens, reply.completion_tokens)


def _read_chunk(reply: Reply, chunk: Chunk) -> Written:
    """Only what belongs to the chunk: a line of another one is an error, and a range is cut at the chunk's end."""
    program, errors = parse_program(reply.text)
    errors += reply.finish == "error"
    kept: list[Op] = []
    for op in program:
        if isinstance(op, RemoveLines):
            inside = RemoveLines(max(op.start, chunk.first), min(op.end, chunk.last))
            errors += inside != op or op.start > op.end
            if inside.start <= inside.end:
                kept.append(inside)
        elif isinstance(op, Normalize | KeepChunk):
            kept.append(op)
        else:
            errors += 1
    return Written(reply.text, tuple(kept), errors, reply.prompt_tokens, reply.completion_tokens)


def _joined(parts: Sequence[Written]) -> Written:
    return Written(
        "\n".join(part.text for part in parts if part.text),
        tuple(op for part in parts for op in part.program if not isinstance(op, KeepDoc)),
        sum(part.errors for part in parts),
        sum(part.prompt_tokens for part in parts),
        sum(part.completion_tokens for part in parts),
    )


_SCORES = {name: re.compile(rf"{name}\w*\W*([0-5])\b", re.IGNORECASE) for name in ("education", "format")}


def annotate_seed(
    generator: Generator,
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    min_education: int = 2,
    min_format: int = 2,
    max_doc_tokens: int = 2000,
    max_chunk_tokens: int = 1500,
) -> Dataset:
    """Let a strong model write programs for seed documents.

    A document whose scores are both high enough is cleaned chunk by chunk; another is dropped. Documents whose reply
    cannot be read, or whose program holds an error, are left out.

    Args:
        generator: the strong model.
        documents: seeds, held in memory.
        tokenizer: counts tokens.
        min_education: score, 0 to 5, from which on a document is kept; the paper's is unverified.
        min_format: likewise.
        max_doc_tokens: of a document that are shown when it is scored.
        max_chunk_tokens: of a chunk.

    Returns:
        Columns ``id``, ``text``, ``program``, ``education`` and ``format``; its ``to_json`` writes a source for the
        recipe's ``annotations``.
    """
    from datasets import Dataset

    seeds = [document for document in documents if document.text.strip()]
    shown = [cut_tokens(unix_lines(document.text), tokenizer, max_doc_tokens) for document in seeds]
    requests = [
        Request(_messages("doc", text, SCORE_TASK), max_tokens=64, temperature=0.0, tag="score") for text in shown
    ]
    rows: list[dict[str, Any]] = []  # Any: strings and scores
    with closing(generator.generate(requests)) as replies:  # type: ignore[type-var]  # an iterator that can be closed
        for document, reply in zip(seeds, replies, strict=True):
            found = {name: pattern.search(reply.text) for name, pattern in _SCORES.items()}
            scores = {name: int(match[1]) for name, match in found.items() if match}
            if len(scores) == len(_SCORES):
                rows.append({"id": document.id, "text": document.text, **scores})
    good = [row for row in rows if row["education"] >= min_education and row["format"] >= min_format]
    programmer = ProgramGenerator(generator, tokenizer, levels=("chunk",), max_chunk_tokens=max_chunk_tokens)
    for row, written in zip(good, programmer.programs([row["text"] for row in good]), strict=True):
        row["program"] = render_program(written.program) if not written.errors else None
    for row in rows:
        row.setdefault("program", render_program((DropDoc(),)))
    columns = ("id", "text", "program", "education", "format")
    kept = [row for row in rows if row["program"] is not None]
    return Dataset.from_dict({name: [row[name] for row in kept] for name in columns})


def sft_dataset(
    annotated: Iterable[Mapping[str, Any]],  # Any: rows of a data set
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_doc_tokens: int = 2000,
    max_chunk_tokens: int = 1500,
) -> Dataset:
    """Conversations that teach a small model to write programs, for any recipe that takes ``messages``.

    One of the document level for each document, and for those that are kept one for each chunk, asked as
    ``ProgramGenerator(instruct=False)`` asks.

    Args:
        annotated: rows with ``text`` and ``program``, such as ``annotate_seed`` gives.
        tokenizer: of the small model.
        max_doc_tokens: of a document that are shown at the document level.
        max_chunk_tokens: of a chunk.

    Returns:
        Columns ``messages`` and ``level``.

    Raises:
        ValueError: a program that cannot be read.
    """
    from datasets import Dataset

    rows: list[tuple[str, tuple[Message, ...], Program]] = []
    for row in annotated:
        text = unix_lines(row["text"])
        program, errors = parse_program(row["program"])
        if errors:
            raise ValueError(f"{errors} lines of a program cannot be read: {row['program'][:200]!r}.")
        dropped = any(isinstance(op, DropDoc) for op in program)
        answer: Program = (DropDoc(),) if dropped else (KeepDoc(),)
        rows.append(("doc", _messages("doc", cut_tokens(text, tokenizer, max_doc_tokens)), answer))
        for chunk in [] if dropped else chunk_lines(text, tokenizer, max_chunk_tokens):
            shown = cut_tokens(number_lines(chunk.text, chunk.first), tokenizer, max_chunk_tokens)
            rows.append(("chunk", _messages("chunk", shown), _part(program, chunk) or (KeepChunk(),)))
    conversations = [
        [
            *({"role": m.role, "content": m.content} for m in asked),
            {"role": "assistant", "content": render_program(said)},
        ]
        for _, asked, said in rows
    ]
    return Dataset.from_dict({"messages": conversations, "level": [level for level, _, _ in rows]})


def _part(program: Program, chunk: Chunk) -> Program:
    """What of a document's program touches a chunk."""
    found: list[Op] = []
    for op in program:
        if isinstance(op, RemoveLines) and op.start <= chunk.last and op.end >= chunk.first:
            found.append(RemoveLines(max(op.start, chunk.first), min(op.end, chunk.last)))
        elif isinstance(op, Normalize) and op.source in chunk.text:
            found.append(op)
    return tuple(found)
