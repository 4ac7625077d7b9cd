"""Any server that speaks OpenAI's ``/chat/completions``, and retries.

The client is httpx2, which huggingface_hub already brings; no vendor's package is needed. The key of the server is read
from the environment, goes into one header, and is cut out of every message that could repeat it.
"""

from __future__ import annotations

import email.utils
import json
import math
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Literal

import httpx2
from pydantic import (
    BaseModel,
    Field,
    NonNegativeInt,
    SecretStr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from headwater.core.rng import derive_seed
from headwater.modalities.text.generate import (
    BYTES_PER_TOKEN,
    Flow,
    Generator,
    GeneratorError,
    HTTPSpec,
    Reply,
    Request,
)

__all__ = ["HTTPGenerator", "PassingError", "RequestRefused", "Retrying", "sliding_window"]

PASSING = frozenset({408, 409, 429})  # and 5xx: the same request may succeed later
BASE_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds
LONGEST_ASKED_WAIT = 600.0  # a server that asks for more is as good as down
SHOWN = 500  # characters of a server's message
WINDOW = 16  # times concurrency: one reply sixteen times as long as the others does not hold them up


class PassingError(GeneratorError):
    """The same request may succeed later; ``retry_after``: seconds the server asks to wait."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestRefused(GeneratorError):
    """The server will never take this request; ``status``: its HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Tokens(BaseModel):
    prompt_tokens: NonNegativeInt
    completion_tokens: NonNegativeInt


class _Completion(BaseModel):
    """What is read of an answer."""

    choices: list[_Choice] = Field(min_length=1, max_length=1)
    model: str | None = None
    usage: _Tokens | None = None

    @field_validator("usage", mode="wrap")
    @classmethod
    def _or_none(cls, value: object, handler: ValidatorFunctionWrapHandler) -> object:
        # A text is worth having whatever the server says of its length.
        try:
            return handler(value)
        except ValidationError:
            return None


class HTTPGenerator(Generator):
    """One model of a server.

    Args:
        base_url: up to and without ``/chat/completions``.
        model: the server's name of it.
        api_key_env: environment variable that holds the key; unset or ``None`` sends none.
        concurrency: requests under way at once.
        timeout: seconds to wait for an answer.

    Raises:
        RecipeError: an argument is out of range, or ``base_url`` is no address of a web server.
        GeneratorError: the key holds characters that no key has.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_env: str | None = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout: float = 120,
    ) -> None:
        spec = HTTPSpec(
            base_url=base_url, model=model, api_key_env=api_key_env, concurrency=concurrency, timeout=timeout
        )
        self.model, self.concurrency, self.timeout = spec.model, spec.concurrency, spec.timeout
        self.id = f"{spec.base_url} {spec.model}"
        self.window = WINDOW * concurrency
        key = (os.environ.get(spec.api_key_env) or "").strip() if spec.api_key_env else ""
        if not (key.isascii() and key.isprintable()):
            # Said here without the key: the HTTP client would quote it.
            raise GeneratorError(f"the key in ${spec.api_key_env} holds characters that no header may; set it anew.")
        self._key = SecretStr(key)
        self._url = f"{spec.base_url}/chat/completions"
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout, pool=None),
            limits=httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )
        self._takes_schema = True

    def flow(self, requests: Iterator[Request | None]) -> Flow:
        """Without retries: the first error ends it."""
        return sliding_window(
            lambda request, _: self.complete(request), requests, concurrency=self.concurrency, window=self.window
        )

    def complete(self, request: Request) -> Reply:
        """One call of the server; may be made from several threads.

        Raises:
            PassingError: a time-out, a lost connection, status 408, 409, 429 or 5xx, or a body that is not JSON.
            RequestRefused: any other status, with the server's words.
        """
        with_schema = self._takes_schema and request.schema is not None
        try:
            response = self._client.post(self._url, json=self._body(request, with_schema))
        except httpx2.TimeoutException:
            raise PassingError(f"no answer within {self.timeout:g} s") from None
        except httpx2.RequestError as error:
            raise PassingError(self._clean(f"{type(error).__name__}: {error}")) from None
        status = response.status_code
        if status in PASSING or status >= 500:
            raise PassingError(f"HTTP {status}: {self._words(response)}", _retry_after(response))
        if status in {400, 422} and with_schema and _names_the_schema(response.text):
            # 400 is OpenAI's; servers built on FastAPI say 422 of an unknown field.
            self._takes_schema = False
            return self.complete(request)
        if status != 200:
            raise RequestRefused(f"the server refuses with HTTP {status}: {self._words(response)}", status)
        try:
            answer = response.json()
        except ValueError:
            raise PassingError(f"an answer that is not JSON: {self._clean(response.text)!r}") from None
        return self._reply(request, answer)

    def _body(self, request: Request, with_schema: bool) -> dict[str, Any]:  # Any: JSON data
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": message.role, "content": message.content} for message in request.messages],
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
        }
        if request.stop:
            body["stop"] = list(request.stop)
        if request.seed is not None:
            # Some servers take 32 bits. Sample 0 keeps the user's own number.
            seed = derive_seed(request.seed, "sample", request.sample) if request.sample else request.seed
            body["seed"] = seed % 2**31
        if with_schema:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": request.schema},
            }
        return body

    def _reply(self, request: Request, answer: object) -> Reply:
        # JSON that is no completion is an error at once: asking again would cost the same again.
        try:
            completion = _Completion.model_validate(answer)
        except ValidationError as problem:
            first = problem.errors(include_url=False)[0]
            error = f"the answer is no completion: {'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}"
            return Reply("", "error", 0, 0, None, False, self.model, self._clean(error))
        (choice,), usage = completion.choices, completion.usage
        text, reason = choice.message.content, choice.finish_reason
        if usage is None:
            expected = math.ceil(len((text or "").encode(errors="replace")) / BYTES_PER_TOKEN)
            tokens = (self.count_prompt(request)[0], expected)
        else:
            tokens = (usage.prompt_tokens, usage.completion_tokens)
        name, estimated = completion.model or self.model, usage is None
        if text is None or reason == "content_filter":
            error = f"no text in the answer; finish_reason is {self._clean(str(reason))!r}"
            return Reply("", "error", *tokens, None, False, name, error, estimated)
        finish: Literal["stop", "length"] = "length" if reason == "length" else "stop"
        return Reply(text, finish, *tokens, None, False, name, None, estimated)

    def _words(self, response: httpx2.Response) -> str:
        """The message of an error, in whichever of the usual places it stands."""
        try:
            body = response.json()
        except ValueError:
            return self._clean(response.text)
        said = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
        said = said.get("message", said) if isinstance(said, dict) else said
        return self._clean(said if isinstance(said, str) else json.dumps(said))

    def _clean(self, text: str) -> str:
        key = self._key.get_secret_value()
        return (text.replace(key, "[key]") if key else text)[:SHOWN]

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


class Retrying(Generator):
    """Sends again what failed in passing: exponential waits with full jitter, or as long as the server asks.

    After the last retry the reply is an error.

    Args:
        backend: the server.
        retries: times a request is sent again.
        sleep: waits so many seconds; by default one that ends when the caller stops reading.
    """

    def __init__(
        self, backend: HTTPGenerator, retries: int = 6, sleep: Callable[[float], object] | None = None
    ) -> None:
        self.backend, self.retries, self.sleep = backend, retries, sleep
        self.id, self.window = backend.id, backend.window
        self._random = random.Random()  # waits need not repeat; no reply depends on them

    def flow(self, requests: Iterator[Request | None]) -> Flow:
        """A sliding window over the server's slots."""
        backend = self.backend
        return sliding_window(self._complete, requests, concurrency=backend.concurrency, window=backend.window)

    def _complete(self, request: Request, stop: threading.Event) -> Reply:
        attempt = 0
        while True:
            try:
                return self.backend.complete(request)
            except PassingError as error:
                if attempt == self.retries or stop.is_set() or error.retry_after > LONGEST_ASKED_WAIT:
                    return Reply("", "error", 0, 0, None, False, self.backend.model, str(error))
                jitter = self._random.uniform(0, min(LONGEST_WAIT, BASE_WAIT * 2**attempt))
                (self.sleep or stop.wait)(max(jitter, error.retry_after))
                attempt += 1

    def count_prompt(self, request: Request) -> tuple[int, int]:
        """As the backend."""
        return self.backend.count_prompt(request)

    def close(self) -> None:
        """Close the backend."""
        self.backend.close()


def sliding_window(
    complete: Callable[[Request, threading.Event], Reply],
    requests: Iterator[Request | None],
    *,
    concurrency: int,
    window: int,
) -> Flow:
    """Call ``complete`` in ``concurrency`` threads; a slot takes the next request when it is free.

    Args:
        complete: makes one reply; its event is set once nobody waits for it any more.
        requests: see ``Generator.flow``; read in the caller's thread.
        concurrency: calls at once.
        window: no request is begun so far past the oldest unfinished one, which bounds what waits for its turn.

    Raises:
        Exception: the first that ``complete`` raised, after the calls under way were finished and given.
    """
    stop = threading.Event()
    running: dict[Future[Reply], int] = {}
    finished: deque[tuple[int, Reply]] = deque()
    failure: BaseException | None = None
    begun, more = 0, True
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="headwater-generate")
    try:
        while True:
            oldest = min(running.values(), default=begun)
            while more and failure is None and len(running) < concurrency and begun - oldest < window:
                try:
                    request = next(requests)
                except StopIteration:
                    more = False
                    break
                if request is None:
                    break
                running[pool.submit(complete, request, stop)] = begun
                begun += 1
            if finished:
                yield finished.popleft()  # after the free slots were filled: the reader may take its time
            elif running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    position, error = running.pop(future), future.exception()
                    if error is None:
                        finished.append((position, future.result()))
                    failure = failure or error
            elif failure is not None:
                raise failure
            elif more:
                yield None
            else:
                return
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _retry_after(response: httpx2.Response) -> float:
    """Seconds the server asks to wait, given as a number or a date; 0 where it does not."""
    said = response.headers.get("Retry-After", "")
    try:
        seconds = float(said)
    except ValueError:
        date = email.utils.parsedate_tz(said)
        seconds = email.utils.mktime_tz(date) - time.time() if date else 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _names_the_schema(text: str) -> bool:
    return any(word in text for word in ("response_format", "json_schema"))
