"""Posts and their replies as whole documents: a question, its answers, their comments, in one sequence.

A reply follows what it replies to, the best first. What does not fit is dropped whole, the lowest ranked first, and
listed: no post is cut, so a block of code is there as it was written, or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from headwater.modalities.text.docs import CorpusError, Document

__all__ = ["Threads", "docstring_posts", "strip_code", "thread_documents"]

Code = Literal["keep", "strip"]
_FENCED = re.compile(r"^(```|~~~).*?^\1[^\n]*\n?", re.MULTILINE | re.DOTALL)
_MARKED_UP = re.compile(r"<(pre|code)\b[^>]*>.*?</\1>", re.IGNORECASE | re.DOTALL)
_DOCTEST = re.compile(r"^ *>>>.*\n(?:^ *(?:>>>|\.\.\.).*\n|^ *\S.*\n)*", re.MULTILINE)


@dataclass(frozen=True)
class Threads:
    """What ``thread_documents`` made.

    Attributes:
        documents: one for each thread, in the order of their first posts; the id is the first post's and ``posts`` in
            the meta lists the ids of all.
        dropped: ids of posts that did not fit.
        orphans: how many posts reply to one that is not there; each begins a thread of its own.
        long: how many threads are one post that alone is over the limit.
    """

    documents: list[Document]
    dropped: list[str]
    orphans: int
    long: int


def strip_code(text: str) -> str:
    """Without fenced blocks, ``<pre>`` and ``<code>`` elements and doctests."""
    for pattern in (_FENCED, _MARKED_UP, _DOCTEST):
        text = pattern.sub("", text)
    return text


def thread_documents(
    posts: Iterable[Mapping[str, Any]],  # Any: columns of a data set
    *,
    max_tokens: int,
    count_tokens: Callable[[Sequence[str]], Sequence[int]],
    id: str = "id",
    parent: str = "parent",
    text: str = "text",
    score: str | None = "score",
    separator: str = "\n\n",
    code: Code = "keep",
) -> Threads:
    """Join posts with the replies to them.

    Args:
        posts: rows, such as a ``datasets.Dataset``; held in memory.
        max_tokens: of a thread, separators not counted.
        count_tokens: tokens of each text.
        id: column of a post's name.
        parent: column of the name of what it replies to; empty or None begins a thread.
        text: column of what it says.
        score: column that ranks replies, the highest first; earlier rows first among equals. None: their order.
        separator: between posts.
        code: ``strip`` leaves ``strip_code`` of each text.

    Raises:
        CorpusError: no post, a column that is not there, a name used twice, or posts that reply to each other in a
            circle (names them).
    """
    rows = list(posts)
    if not rows:
        raise CorpusError("there are no posts to make threads of.")
    for column in (id, parent, text, *([score] if score else [])):
        if column not in rows[0]:
            raise CorpusError(f"posts have no column {column!r}; available: {', '.join(map(str, rows[0]))}.")
    names = [str(row[id]) for row in rows]
    place = {name: number for number, name in enumerate(names)}
    if len(place) < len(names):
        twice = next(name for number, name in enumerate(names) if place[name] != number)
        raise CorpusError(f"two posts are called {twice!r}; names must differ.")
    texts = [strip_code(str(row[text])) if code == "strip" else str(row[text]) for row in rows]
    sizes = list(count_tokens(texts))
    above = ["" if row[parent] is None else str(row[parent]) for row in rows]
    replies: dict[int, list[int]] = {}
    roots, orphans = [], 0
    for number, name in enumerate(above):
        if name in place:
            replies.setdefault(place[name], []).append(number)
        else:
            roots.append(number)
            orphans += bool(name)
    ranks = [-float(row[score] or 0) if score else 0.0 for row in rows]
    for own in replies.values():
        own.sort(key=lambda number: (ranks[number], number))
    _refuse_circles(names, roots, replies)
    documents, dropped, long = [], [], 0
    for root in roots:
        thread = _in_order(root, replies)
        kept, total = {root}, sizes[root]
        long += total > max_tokens
        # By rank over the whole thread; a reply to what was dropped goes with it.
        for number in sorted(thread[1:], key=lambda number: (ranks[number], number)):
            chain = _missing(number, place, above, kept)
            size = sum(sizes[link] for link in chain)
            if total + size <= max_tokens:
                kept.update(chain)
                total += size
        dropped += [names[number] for number in thread if number not in kept]
        members = [number for number in thread if number in kept]
        meta = {key: value for key, value in rows[root].items() if key not in (id, parent, text)}
        meta["posts"] = [names[number] for number in members]
        documents.append(Document(names[root], separator.join(texts[number] for number in members), meta))
    return Threads(documents, dropped, orphans, long)


def _in_order(root: int, replies: Mapping[int, Sequence[int]]) -> list[int]:
    """A thread from its root: every post before the replies to it, those in their order."""
    found, pending = [], [root]
    while pending:
        number = pending.pop()
        found.append(number)
        pending += reversed(replies.get(number, ()))
    return found


def _missing(number: int, place: Mapping[str, int], above: Sequence[str], kept: set[int]) -> list[int]:
    """The post and what it replies to, as far as that is not kept yet."""
    chain = []
    while number not in kept:
        chain.append(number)
        number = place[above[number]]
    return chain


def _refuse_circles(names: Sequence[str], roots: Sequence[int], replies: Mapping[int, Sequence[int]]) -> None:
    reached = {number for root in roots for number in _in_order(root, replies)}
    if len(reached) < len(names):
        circle = [name for number, name in enumerate(names) if number not in reached]
        raise CorpusError(f"{len(circle)} posts reply to each other in a circle, among them {', '.join(circle[:5])}.")


def docstring_posts(documents: Sequence[Document]) -> list[dict[str, Any]]:  # Any: columns of a data set
    """Docstrings of one package as posts: a module's, those of its classes and functions, those of their methods.

    Args:
        documents: from ``docstring_corpus``.

    Returns:
        Rows ``id, parent, text, score, module``. What has no documented parent replies to its module's first docstring;
        ``score`` falls in the order of the source, so that the last ones are dropped first.
    """
    first: dict[str, str] = {}
    for document in documents:
        first.setdefault(document.meta["module"], document.id)
    known = {document.id for document in documents}
    rows = []
    for number, document in enumerate(documents):
        module, name = document.meta["module"], document.meta["object"]
        above = f"{module}:{name.rpartition('.')[0]}" if "." in name else first[module]
        above = above if above in known else first[module]
        parent = None if document.id == first[module] else above
        rows.append({"id": document.id, "parent": parent, "text": document.text, "score": -number, "module": module})
    return rows
