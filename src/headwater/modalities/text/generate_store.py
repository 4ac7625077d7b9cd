"""What stands between a method and a backend: limits of spending, and a cache of replies.

``Budgeted`` counts before it sends; ``Cached`` keeps every reply in one SQLite file, so that what was paid for once is
never paid for again.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from headwater.modalities.text.generate import (
    BudgetExceeded,
    Estimate,
    Flow,
    Generator,
    GeneratorError,
    Reply,
    Request,
    TooManyErrors,
    request_key,
)

__all__ = ["Budgeted", "Cached", "ReplyStore", "Usage"]

RECENT, MOST_ERRORS = 100, 50  # stop when more than half of the last hundred failed
FORMAT = 1  # of the file
BUSY_SECONDS = 60.0


class Budgeted(Generator):
    """Stops before a limit is passed: every request is counted at its worst until its reply says what it took.

    Requests that failed count as requests; tokens they may have cost on the server are not known and do not count.
    Those under way when the caller stops reading count at their worst.

    Args:
        inner: what writes.
        max_usd: spend at most so much; needs ``price``.
        max_tokens: read and write at most so many.
        max_requests: send at most so many.
        price: USD for a million tokens, read and written.

    Raises:
        ValueError: ``max_usd`` without ``price``.
    """

    def __init__(
        self,
        inner: Generator,
        *,
        max_usd: float | None = None,
        max_tokens: int | None = None,
        max_requests: int | None = None,
        price: tuple[float, float] | None = None,
    ) -> None:
        if max_usd is not None and price is None:
            raise ValueError("max_usd needs price=(USD per million tokens read, written); got none.")
        self.inner, self.price = inner, price
        self.id, self.window = inner.id, inner.window
        limits = {"requests": max_requests, "tokens": max_tokens, "usd": max_usd}
        self.limits: Mapping[str, float] = {what: limit for what, limit in limits.items() if limit is not None}
        self.spent: dict[str, float] = dict.fromkeys(limits, 0.0)
        self._reserved: dict[str, float] = dict.fromkeys(limits, 0.0)
        self._lock = threading.Lock()

    def flow(self, requests: Iterator[Request | None]) -> Flow:
        """Lets requests through while their worst case fits, and stops when nothing under way can make room.

        Raises:
            BudgetExceeded: see there.
            TooManyErrors: more than half of the last hundred failed.
        """
        under_way: dict[int, dict[str, float]] = {}
        refused: BudgetExceeded | None = None
        recent: deque[bool] = deque(maxlen=RECENT)
        done = begun = 0

        def affordable() -> Iterator[Request | None]:
            nonlocal refused, begun
            for request in requests:
                if request is None:
                    yield None
                    continue
                worst = self._worst(request)
                while (refused := self._reserve(worst, done)) is not None and under_way:
                    yield None  # what is under way may take less than feared
                if refused is not None:
                    return
                under_way[begun] = worst
                begun += 1
                yield request

        try:
            with closing(self.inner.flow(affordable())) as flow:
                for finished in flow:
                    if finished is None:
                        yield None
                        continue
                    position, reply = finished
                    reply = self._settle(under_way.pop(position), reply)
                    done += 1
                    recent.append(reply.finish == "error")
                    yield position, reply
                    if sum(recent) > MOST_ERRORS:
                        raise TooManyErrors(
                            f"{sum(recent)} of the last {len(recent)} requests failed; the last error: {reply.error}"
                        )
        except GeneratorExit:
            for worst in under_way.values():
                self._add(self.spent, worst)
            raise
        finally:
            for worst in under_way.values():
                self._add(self._reserved, worst, sign=-1)
        if refused is not None:
            raise refused

    def _worst(self, request: Request) -> dict[str, float]:
        if not {"tokens", "usd"} & set(self.limits):
            return {"requests": 1.0, "tokens": 0.0, "usd": 0.0}  # the prompt need not be counted
        prompt = self.inner.count_prompt(request)[1]
        usd = self._usd(prompt, request.max_tokens) or 0.0
        return {"requests": 1.0, "tokens": float(prompt + request.max_tokens), "usd": usd}

    def _usd(self, prompt: int, completion: int) -> float | None:
        return None if self.price is None else (prompt * self.price[0] + completion * self.price[1]) / 1e6

    def _reserve(self, worst: Mapping[str, float], done: int) -> BudgetExceeded | None:
        """Set ``worst`` aside, or say which limit is in the way."""
        with self._lock:
            for what, limit in self.limits.items():
                if self.spent[what] + self._reserved[what] + worst[what] > limit:
                    return BudgetExceeded(what, self.spent[what], limit, done)
        self._add(self._reserved, worst)
        return None

    def _settle(self, worst: Mapping[str, float], reply: Reply) -> Reply:
        usd = self._usd(reply.prompt_tokens, reply.completion_tokens)
        reply = reply if usd is None else replace(reply, usd=usd)
        tokens = float(reply.prompt_tokens + reply.completion_tokens)
        self._add(self._reserved, worst, sign=-1)
        self._add(self.spent, {"requests": 1.0, "tokens": tokens, "usd": reply.usd or 0.0})
        return reply

    def _add(self, to: dict[str, float], amounts: Mapping[str, float], sign: int = 1) -> None:
        with self._lock:
            for what, amount in amounts.items():
                to[what] += sign * amount

    def count_prompt(self, request: Request) -> tuple[int, int]:
        """As the backend."""
        return self.inner.count_prompt(request)

    def dry_run(self, requests: Iterable[Request]) -> Estimate:
        """That of the backend, with its price."""
        estimate = self.inner.dry_run(requests)
        usd = self._usd(estimate.prompt_tokens, estimate.completion_tokens)
        return estimate if usd is None else replace(estimate, usd=usd)

    def close(self) -> None:
        """Close the backend."""
        self.inner.close()


@dataclass
class Usage:
    """What a generator gave since it was opened.

    Attributes:
        requests: that got a reply.
        cached: of them, for which nothing was sent.
        errors: of them, without a text.
        prompt_tokens: read for these replies, now or when they were written, so a second run has the same count. Of
            equal requests one is counted.
        completion_tokens: written, likewise.
        usd_spent: now.
        usd_total: ever, for these replies.
    """

    requests: int = 0
    cached: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd_spent: float = 0.0
    usd_total: float = 0.0


class Cached(Generator):
    """Gives a reply it has, and sends what it has not; of equal requests under way it sends one.

    Errors are not kept. Replies are kept as they finish, whatever becomes of those before them.

    Args:
        inner: what writes.
        path: SQLite file, made if need be; any number of threads and processes may share one.

    Attributes:
        usage: see ``Usage``.

    Raises:
        GeneratorError: the file is none of ours.
    """

    def __init__(self, inner: Generator, path: str | Path) -> None:
        self.inner, self.store = inner, ReplyStore(path)
        self.id, self.window = inner.id, inner.window
        self.usage = Usage()
        self._counted: set[str] = set()
        self._lock = threading.Lock()

    def flow(self, requests: Iterator[Request | None]) -> Flow:
        """Hits at once, the rest as they finish."""
        waiting: dict[str, list[int]] = {}  # key -> positions of equal requests under way, the oldest first
        sent: dict[int, str] = {}  # the backend's position -> key
        hits: deque[tuple[int, Reply]] = deque()
        position = num_sent = 0

        def misses() -> Iterator[Request | None]:
            nonlocal position, num_sent
            for request in requests:
                if request is None:
                    yield None
                    continue
                key, place = request_key(self.id, request), position
                position += 1
                if key in waiting:
                    waiting[key].append(place)
                elif (reply := self.store.get(key)) is not None:
                    hits.append((place, self._count(key, reply)))
                else:
                    waiting[key], sent[num_sent] = [place], key
                    num_sent += 1
                    yield request
                # Not further: what is given out of turn waits in memory.
                while len(hits) >= self.window or (waiting and position - _oldest(waiting) >= self.window):
                    yield None

        try:
            with closing(self.inner.flow(misses())) as flow:
                for finished in flow:
                    while hits:
                        yield hits.popleft()
                    if finished is None:
                        yield None
                        continue
                    key, reply = sent.pop(finished[0]), finished[1]
                    if reply.finish != "error":
                        self.store.put(key, self.id, reply)
                    for number, place in enumerate(waiting.pop(key)):
                        yield place, self._count(key, replace(reply, cached=number > 0))
        except GeneratorError:
            yield from hits
            raise
        yield from hits

    def _count(self, key: str, reply: Reply) -> Reply:
        usage, usd = self.usage, reply.usd or 0.0
        with self._lock:
            usage.requests += 1
            usage.cached += reply.cached
            usage.errors += reply.finish == "error"
            usage.usd_spent += 0.0 if reply.cached else usd
            if not reply.cached or key not in self._counted:
                self._counted.add(key)
                usage.prompt_tokens += reply.prompt_tokens
                usage.completion_tokens += reply.completion_tokens
                usage.usd_total += usd
        return reply

    def count_prompt(self, request: Request) -> tuple[int, int]:
        """As the backend."""
        return self.inner.count_prompt(request)

    def dry_run(self, requests: Iterable[Request]) -> Estimate:
        """Only what is not in the cache would be sent."""
        total, seen = 0, set()

        def misses() -> Iterator[Request]:
            nonlocal total
            for request in requests:
                total += 1
                key = request_key(self.id, request)
                if key not in seen and self.store.get(key) is None:
                    seen.add(key)
                    yield request

        estimate = self.inner.dry_run(misses())
        return replace(estimate, requests=total)

    def close(self) -> None:
        """Close the backend and the file."""
        self.inner.close()
        self.store.close()


def _oldest(waiting: Mapping[str, list[int]]) -> int:
    return next(iter(waiting.values()))[0]


class ReplyStore:
    """Replies by key, in one SQLite file in write-ahead mode, so that readers and a writer do not wait for each other.

    Args:
        path: of the file, made if need be.

    Raises:
        GeneratorError: the file is no store, or one of another version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._lock = threading.Lock()
        self._open: tuple[int, sqlite3.Connection] | None = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._lock:
                db = self._connection()
                (version,) = db.execute("PRAGMA user_version").fetchone()
        except sqlite3.DatabaseError as error:
            self.close()
            raise GeneratorError(f"{self.path} is no cache of replies ({error}). Give another path.") from error
        if version != FORMAT:
            self.close()
            raise GeneratorError(f"{self.path} has format {version}, this version reads {FORMAT}. Give another path.")

    def _connection(self) -> sqlite3.Connection:
        # SQLite forbids to carry a connection over a fork.
        if self._open is None or self._open[0] != os.getpid():
            db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self._open = os.getpid(), db
            self._prepare(db)
        return self._open[1]

    def _prepare(self, db: sqlite3.Connection) -> None:
        if db.execute("PRAGMA user_version").fetchone()[0]:
            db.execute("PRAGMA synchronous=NORMAL")
            return
        self._write_ahead(db)
        db.execute("PRAGMA synchronous=NORMAL")  # a power cut may lose the last replies, never the file
        db.execute("BEGIN IMMEDIATE")
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            db.execute(
                "CREATE TABLE replies (key TEXT PRIMARY KEY, generator TEXT, seconds REAL, reply TEXT) WITHOUT ROWID"
            )
            db.execute(f"PRAGMA user_version={FORMAT}")
        db.execute("COMMIT")

    def _write_ahead(self, db: sqlite3.Connection) -> None:
        # Of processes that switch a new file at once, SQLite tells all but one that it is locked, without waiting.
        for _ in range(200):
            try:
                db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
                time.sleep(0.01)
        raise GeneratorError(f"{self.path} stays locked by another process. Stop it, or give another path.")

    def get(self, key: str) -> Reply | None:
        """The reply kept under a key, marked ``cached``."""
        with self._lock:
            row = self._connection().execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else Reply(**(json.loads(row[0]) | {"cached": True}))

    def put(self, key: str, generator: str, reply: Reply) -> None:
        """Keep a reply; of two for one key the first stays."""
        row = (key, generator, time.time(), json.dumps(asdict(reply)))
        with self._lock:
            self._connection().execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?)", row)

    def __len__(self) -> int:
        with self._lock:
            count: int = self._connection().execute("SELECT count(*) FROM replies").fetchone()[0]
        return count

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            if self._open is not None and self._open[0] == os.getpid():
                self._open[1].close()
            self._open = None
