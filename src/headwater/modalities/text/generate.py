"""One generator interface: local Hugging Face models and any OpenAI-compatible endpoint.

A method takes a ``Generator`` and sends it ``Request`` after ``Request``; who writes is the recipe's business::

    with open_generator(recipe.generator) as generator:
        requests = (Request((Message("user", f"Rephrase: {d.text}"),), tag="rephrase") for d in documents)
        replies = generator.generate(requests)  # in order, read lazily

``open_generator`` composes ``Cached(Budgeted(Retrying(backend)))``; ``generate_json.py`` asks for structured answers.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from collections.abc import Generator as Coroutine
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, NonNegativeFloat, field_validator, model_validator

from headwater.core.recipe import ModelRef, Name, Spec

if TYPE_CHECKING:
    from headwater.modalities.text.generate_store import Cached

__all__ = [
    "BudgetExceeded",
    "Estimate",
    "Flow",
    "Generator",
    "GeneratorError",
    "GeneratorSpec",
    "HFSpec",
    "HTTPSpec",
    "Message",
    "Reply",
    "Request",
    "ScriptedGenerator",
    "TooManyErrors",
    "cut_at_stop",
    "open_generator",
    "request_key",
]

BYTES_PER_TOKEN = 4  # of English text in the usual vocabularies: an expectation, not a bound
TEMPLATE_TOKENS, SYSTEM_TOKENS = 8, 64  # a chat template adds to each message; and by itself, such as a system prompt
HIDDEN = "the value is not shown, as it may be a secret"


class GeneratorError(RuntimeError):
    """Text cannot be generated as asked."""


class TooManyErrors(GeneratorError):
    """More than half of the last hundred requests failed."""


class BudgetExceeded(GeneratorError):
    """The next request could pass a limit. Replies up to here were given and are kept in the cache.

    Attributes:
        what: ``requests``, ``tokens`` or ``usd``.
        spent: of that, since the generator was opened.
        limit: what it must not pass.
        done: requests of this call that have a reply.
        remaining: requests of this call that have none; ``None`` where the call was given no sized collection.
    """

    def __init__(self, what: str, spent: float, limit: float, done: int, remaining: int | None = None) -> None:
        super().__init__(what, spent, limit, done, remaining)
        self.what, self.spent, self.limit, self.done, self.remaining = what, spent, limit, done, remaining

    def __str__(self) -> str:
        done = f"{self.done} requests done" + ("" if self.remaining is None else f" and {self.remaining} to go")
        return (
            f"the next request could pass max_{self.what}={self.limit:g}; spent {self.spent:g}, with {done}. "
            f"Every reply so far is kept: run again with a larger max_{self.what} to go on from there."
        )


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Request:
    """What to write, and how to draw it. A field out of range is a ``ValueError``.

    Attributes:
        messages: the conversation so far, at least one turn.
        max_tokens: the reply is cut after so many, >= 1.
        temperature: 0 is greedy.
        top_p: draw from the likeliest tokens that hold this share, in (0, 1].
        stop: strings that end the reply; they are left out of it.
        seed: for servers that take one; a local model draws from all the fields here, so it repeats with any.
        sample: number of this draw, where the same prompt is drawn several times.
        schema: JSON schema of the answer, for servers that can hold a reply to one; set by ``generate_json``.
        tag: which handler of a ``ScriptedGenerator`` answers; nothing else reads it, nor does the cache.
    """

    messages: tuple[Message, ...]
    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    sample: int = 0
    schema: dict[str, Any] | None = field(default=None, hash=False)  # Any: JSON data
    tag: str = ""

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError("messages must hold at least one message; got none.")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1; got {self.max_tokens}.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be finite and >= 0 (0 is greedy); got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1]; got {self.top_p}. Use 1.0 to draw from every token.")
        if not all(self.stop):
            raise ValueError(f"stop must hold no empty string; got {self.stop!r}.")
        if self.sample < 0:
            raise ValueError(f"sample must be >= 0; got {self.sample}.")


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        text: without the stop string; empty for an error.
        finish: ``length`` where ``max_tokens`` cut it; ``error`` where there is no text, see ``error``.
        prompt_tokens, completion_tokens: read and written.
        usd: what it cost when it was written; ``None`` where no price is known.
        cached: found in the cache, or written for an equal request of the same call: nothing was spent on it now.
        model: that wrote it, in the server's words.
        error: why there is no text.
        estimated: the server did not count tokens; the counts are by the length of the text.
    """

    text: str
    finish: Literal["stop", "length", "error"]
    prompt_tokens: int
    completion_tokens: int
    usd: float | None
    cached: bool
    model: str
    error: str | None = None
    estimated: bool = False


@dataclass(frozen=True)
class Estimate:
    """What a call would take.

    Attributes:
        requests: how many there are.
        to_send: of them, neither in the cache nor equal to an earlier one.
        prompt_tokens: of those to send; counted for a local model, else by the length of the text.
        completion_tokens: likewise, at most.
        usd: for these tokens; ``None`` where no price is known.
    """

    requests: int
    to_send: int
    prompt_tokens: int
    completion_tokens: int
    usd: float | None


Flow: TypeAlias = Coroutine[tuple[int, Reply] | None, None, None]
"""Replies in the order they finish, each with the position of its request; see ``Generator.flow``."""


class Generator(ABC):
    """Writes replies to requests."""

    id: str
    """Everything the text depends on but the request: it enters the key of the cache."""
    window: int = 256
    """How far past its oldest unfinished request a generator reads on."""

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Replies in the order of the requests, which are read lazily, at most about ``window`` ahead.

        A request that failed for good gives a reply with ``finish="error"``: count it and leave it out.

        Raises:
            BudgetExceeded: after every reply that was under way has been given.
            TooManyErrors: the last error is named.
            GeneratorError: the server refuses.
        """
        ready: dict[int, Reply] = {}
        position = 0
        try:
            with closing(self.flow(iter(requests))) as flow:
                for done in flow:
                    if done is not None:
                        ready[done[0]] = done[1]
                    while position in ready:
                        position += 1
                        yield ready.pop(position - 1)
        except BudgetExceeded as error:
            error.done = position
            error.remaining = len(requests) - position if isinstance(requests, Sized) else None
            raise

    @abstractmethod
    def flow(self, requests: Iterator[Request | None]) -> Flow:
        """What a backend or a wrapper implements: ``generate`` in the order of finishing.

        ``None`` from ``requests`` means "nothing to send before something finishes". A generator that then has
        something under way finishes some of it; one that has not yields ``None``, so that the caller can go on.
        """

    def count_prompt(self, request: Request) -> tuple[int, int]:
        """Tokens of the prompt: expected, and at most (a token is at least one byte)."""
        size = sum(len(message.content.encode(errors="replace")) for message in request.messages)
        template = TEMPLATE_TOKENS * len(request.messages)
        return math.ceil(size / BYTES_PER_TOKEN) + template, size + template + SYSTEM_TOKENS

    def dry_run(self, requests: Iterable[Request]) -> Estimate:
        """What ``generate`` would take. Sends nothing."""
        count = prompt = completion = 0
        for request in requests:
            count += 1
            prompt += self.count_prompt(request)[0]
            completion += request.max_tokens
        return Estimate(count, count, prompt, completion, None)

    def close(self) -> None:  # noqa: B027  # most have nothing to give back
        """Give connections and files back. Closing twice is fine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def request_key(generator_id: str, request: Request) -> str:
    """Sixty-four hex digits over all that the reply depends on: the generator and every field but ``tag``."""
    messages = [[message.role, message.content] for message in request.messages]
    drawn = [request.max_tokens, float(request.temperature), float(request.top_p), list(request.stop)]
    about = [generator_id, messages, drawn, request.seed, request.sample, request.schema]
    return hashlib.sha256(json.dumps(about, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one.

    Example:
        >>> cut_at_stop("a b. c", ("c", "."))
        ('a b', True)
    """
    first = min((place for string in stop if (place := text.find(string)) >= 0), default=-1)
    return (text, False) if first < 0 else (text[:first], True)


class ScriptedGenerator(Generator):
    """Answers by pure functions of the messages, for claims and tests; costs nothing and repeats exactly; counts words.

    Args:
        handlers: ``Request.tag`` -> what writes the answer, told nothing but the messages. Its random numbers follow
            from the request, so that another ``sample`` or ``seed`` draws again.
        id: change it together with the handlers, so that a cache does not give the old answers.
    """

    def __init__(
        self, handlers: Mapping[str, Callable[[Sequence[Message], random.Random], str]], id: str = "scripted"
    ) -> None:
        self.handlers, self.id = dict(handlers), id

    def flow(self, requests: Iterator[Request | None]) -> Flow:
        """One after the other."""
        position = 0
        for request in requests:
            if request is None:
                yield None
            else:
                yield position, self._answer(request)
                position += 1

    def _answer(self, request: Request) -> Reply:
        if request.tag not in self.handlers:
            known = ", ".join(sorted(self.handlers)) or "none"
            raise ValueError(f"no handler for the tag {request.tag!r}; there are: {known}.")
        rng = random.Random(request_key(self.id, request))
        text, _ = cut_at_stop(self.handlers[request.tag](request.messages, rng), request.stop)
        words, read = text.split(), sum(len(message.content.split()) for message in request.messages)
        if len(words) <= request.max_tokens:
            return Reply(text, "stop", read, len(words), 0.0, False, self.id)
        return Reply(" ".join(words[: request.max_tokens]), "length", read, request.max_tokens, 0.0, False, self.id)


class _Limits(Spec):
    """What every kind of generator takes."""

    cache: Path | None = Field(
        default=None, description="SQLite file of earlier replies; by default one in the user cache for all runs"
    )
    max_usd: float | None = Field(default=None, gt=0, description="spend at most so much; needs `price`")
    max_tokens: int | None = Field(default=None, gt=0, description="read and write at most so many tokens")
    max_requests: int | None = Field(default=None, gt=0, description="send at most so many requests")
    price: tuple[NonNegativeFloat, NonNegativeFloat] | None = Field(
        default=None, description="USD for a million tokens, read and written"
    )

    @model_validator(mode="after")
    def _priced(self) -> Self:
        if self.max_usd is not None and self.price is None:
            raise ValueError("max_usd needs `price`: USD for a million tokens read and written, such as [0.5, 1.5]")
        return self


class HFSpec(_Limits):
    """A causal model on this machine."""

    kind: Literal["hf"] = Field(default="hf", description="a causal model that transformers opens")
    model: ModelRef = Field(description="the model that writes")
    batch_tokens: int = Field(default=8192, gt=0, description="tokens of a batch, padding and reply included")
    device: Name | None = Field(default=None, description="where it runs, such as `cuda:0`; by default the CPU")


class HTTPSpec(_Limits):
    """A server that speaks ``/chat/completions``: vLLM, Ollama, llama.cpp, transformers serve, a hosted API."""

    # A secret in the wrong field must not come back in the message about it.
    model_config = ConfigDict(hide_input_in_errors=True)

    kind: Literal["http"] = Field(default="http", description="an OpenAI-compatible server")
    base_url: Name = Field(description="up to and without `/chat/completions`, such as http://localhost:8000/v1")
    model: Name = Field(description="the server's name of the model")
    api_key_env: Name | None = Field(
        default="OPENAI_API_KEY", description="environment variable with the key, if set; never the key itself"
    )
    concurrency: int = Field(default=16, gt=0, le=1024, description="requests under way at once")
    timeout: float = Field(default=120, gt=0, description="seconds to wait for an answer")
    retries: int = Field(default=6, ge=0, le=20, description="times a request that failed in passing is sent again")

    @field_validator("base_url")
    @classmethod
    def _web_address(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError(f"base_url must start with http:// or https:// and name a host; {HIDDEN}")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ValueError(f"base_url must hold no user, password, query or fragment; {HIDDEN}")
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _variable(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError(f"api_key_env must be the name of an environment variable; {HIDDEN}")
        return value


GeneratorSpec = Annotated[HFSpec | HTTPSpec, Field(discriminator="kind")]
"""A generator as data: a field of this type in a recipe takes ``{kind: hf, ...}`` or ``{kind: http, ...}``."""


def open_generator(spec: HFSpec | HTTPSpec) -> Cached:
    """The generator of a recipe, with cache, limits and retries; close it, or use it as a context.

    Raises:
        ModelError: a local model that cannot be opened.
        GeneratorError: the cache is no file of ours, or the key is malformed.
    """
    from headwater.core.cache import cache_dir
    from headwater.modalities.text.generate_store import Budgeted, Cached

    backend: Generator
    if spec.kind == "hf":
        from headwater.modalities.text.generate_hf import HFGenerator

        backend = HFGenerator.open(spec)
    else:
        from headwater.modalities.text.generate_http import HTTPGenerator, Retrying

        server = HTTPGenerator(spec.base_url, spec.model, spec.api_key_env, spec.concurrency, spec.timeout)
        backend = Retrying(server, spec.retries)
    limited = Budgeted(
        backend, max_usd=spec.max_usd, max_tokens=spec.max_tokens, max_requests=spec.max_requests, price=spec.price
    )
    return Cached(limited, spec.cache or cache_dir("generations") / "replies.sqlite")
