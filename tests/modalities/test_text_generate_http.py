"""The client of OpenAI-compatible servers, against a real server that misbehaves."""

from __future__ import annotations

import email.utils
import importlib.util
import itertools
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from headwater.modalities.text.generate import (
    Generator,
    GeneratorError,
    HTTPSpec,
    Message,
    Reply,
    Request,
    open_generator,
)
from headwater.modalities.text.generate_http import HTTPGenerator, RequestRefused, Retrying, sliding_window

SECRET = "sk-this-is-never-shown"


@dataclass
class Answer:
    """What the server sends; ``drop`` closes the connection instead, ``hang`` never answers."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    hang: bool = False


def completion(text: str | None, finish: str = "stop", **changes: Any) -> Answer:
    """A proper answer, with changes; ``None`` leaves a field out."""
    body: dict[str, Any] = {
        "model": "served",
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3},
        **changes,
    }
    return Answer({name: value for name, value in body.items() if value is not None})


class Server(ThreadingHTTPServer):
    """Answers by a function of the body and of how often this body came before."""

    daemon_threads = True

    def __init__(self, script: Callable[[dict[str, Any], int], Answer]) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.over, self.lock = threading.Event(), threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    """One connection of ``Server``."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            before = self.server.bodies.count(body)
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers))
        assert self.path == "/v1/chat/completions"
        answer = self.server.script(body, before)
        if answer.hang:
            self.server.over.wait(30)
        if answer.drop or answer.hang:
            self.close_connection = True
            return
        data = answer.body.encode() if isinstance(answer.body, str) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(data)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


Serve = Callable[[Callable[[dict[str, Any], int], Answer]], Server]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts servers; stops them at the end."""
    monkeypatch.setenv("HEADWATER_TEST_KEY", SECRET)
    servers: list[Server] = []

    def start(script: Callable[[dict[str, Any], int], Answer]) -> Server:
        servers.append(Server(script))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.over.set()
        server.shutdown()
        server.server_close()


def ask(text: str = "hello", **fields: Any) -> Request:
    """A request of one turn."""
    return Request((Message("user", text),), **fields)


def echo(body: dict[str, Any], before: int) -> Answer:
    """Says again what the user said."""
    return completion("re: " + body["messages"][-1]["content"])


class Client:
    """A client with retries that notes its waits and does not wait."""

    def __init__(self, server: Server, retries: int = 6, timeout: float = 20, concurrency: int = 4) -> None:
        self.waits: list[float] = []
        backend = HTTPGenerator(server.url, "asked", "HEADWATER_TEST_KEY", concurrency, timeout)
        self.generator = Retrying(backend, retries, self.waits.append)

    def __call__(self, *requests: Request) -> list[Reply]:
        """The replies."""
        return list(self.generator.generate(requests))


def test_equation_a_request_on_the_wire(serve: Serve) -> None:
    server = serve(lambda body, before: completion("ok", "length"))
    messages = (Message("system", "be brief"), Message("user", "ä?"))
    client = Client(server)
    (reply,) = client(Request(messages, 9, 0.0, 0.5, ("\n",), seed=4, tag="unseen"))
    assert server.bodies == [
        {
            "model": "asked",
            "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "ä?"}],
            "max_tokens": 9,
            "temperature": 0.0,
            "top_p": 0.5,
            "stop": ["\n"],
            "seed": 4,
        }
    ]
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"
    assert reply == Reply("ok", "length", 7, 3, None, False, "served")
    client(ask())
    assert not {"stop", "seed", "response_format"} & set(server.bodies[1])


def test_property_samples_of_one_seed_differ_on_the_wire(serve: Serve) -> None:
    server = serve(echo)
    Client(server)(*(ask(seed=5, sample=number) for number in range(10)), ask(seed=2**40))
    seeds = {body["seed"] for body in server.bodies}
    assert len(seeds) == 11
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert 5 in seeds


def test_property_no_key_sends_no_header(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADWATER_TEST_KEY")
    server = serve(echo)
    Client(server)(ask())
    assert "Authorization" not in server.headers[0]


def test_property_order_is_that_of_the_requests(serve: Serve) -> None:
    server = serve(lambda body, before: echo(body, before) if before or int(body["seed"]) % 3 else Answer("", 503))
    replies = Client(server)(*(ask(str(number), seed=number) for number in range(40)))
    assert [reply.text for reply in replies] == [f"re: {number}" for number in range(40)]


# What goes wrong.


def test_property_a_busy_server_is_given_the_time_it_asks_for(serve: Serve) -> None:
    server = serve(lambda body, before: echo(body, before) if before else Answer("", 429, {"Retry-After": "17"}))
    client = Client(server)
    assert [reply.finish for reply in client(ask())] == ["stop"]
    assert client.waits == [17.0]


def test_property_the_time_may_be_asked_for_as_a_date(serve: Serve) -> None:
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    server = serve(lambda body, before: echo(body, before) if before else Answer("", 429, {"Retry-After": date}))
    client = Client(server)
    client(ask())
    assert 90 < client.waits[0] <= 100


def test_property_a_server_that_asks_for_too_much_is_down(serve: Serve) -> None:
    server = serve(lambda body, before: Answer({"error": "closed"}, 503, {"Retry-After": "86400"}))
    client = Client(server)
    assert [reply.error for reply in client(ask())] == ["HTTP 503: closed"]
    assert client.waits == []


@pytest.mark.parametrize(
    "trouble",
    [
        *(Answer({"error": {"message": "later"}}, status) for status in (408, 409, 429, 500, 502, 503, 504, 529)),
        Answer("<html>a proxy</html>"),
        Answer("not json", headers={"Content-Type": "application/json"}),
        Answer(drop=True),
    ],
    ids=lambda answer: str(answer.status) if answer.status != 200 else "dropped" if answer.drop else answer.body[:4],
)
def test_property_what_fails_twice_is_sent_three_times(serve: Serve, trouble: Answer) -> None:
    server = serve(lambda body, before: echo(body, before) if before >= 2 else trouble)
    client = Client(server)
    assert [reply.text for reply in client(ask())] == ["re: hello"]
    assert len(server.bodies) == 3
    assert len(client.waits) == 2
    assert 0 <= client.waits[0] <= 1
    assert 0 <= client.waits[1] <= 2


def test_property_a_slow_server_is_left_and_asked_again(serve: Serve) -> None:
    server = serve(lambda body, before: echo(body, before) if before else Answer(hang=True))
    assert [reply.text for reply in Client(server, timeout=0.2)(ask())] == ["re: hello"]


def test_property_after_the_last_retry_the_reply_is_an_error(serve: Serve) -> None:
    server = serve(lambda body, before: Answer({"error": {"message": "overloaded"}}, 500))
    client = Client(server, retries=9)
    (reply,) = client(ask())
    assert (reply.finish, reply.text, reply.error) == ("error", "", "HTTP 500: overloaded")
    assert len(server.bodies) == 10
    bounds = [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert all(0 <= wait <= bound for wait, bound in zip(client.waits, bounds, strict=True))
    assert len(set(client.waits)) == 9  # jitter


def test_property_a_timeout_says_so(serve: Serve) -> None:
    server = serve(lambda body, before: Answer(hang=True))
    (reply,) = Client(server, retries=0, timeout=0.2)(ask())
    assert reply.error == "no answer within 0.2 s"


def test_property_a_server_that_is_not_there_is_an_error() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    (reply,) = Retrying(HTTPGenerator(url, "m", None), 1, lambda seconds: None).generate([ask()])
    assert reply.finish == "error"
    assert reply.error is not None
    assert "ConnectError" in reply.error


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 413, 422])
def test_rejects_what_the_server_refuses_in_its_words(serve: Serve, status: int) -> None:
    headers = {"Location": "http://127.0.0.1:1/"} if status == 301 else {}
    server = serve(lambda body, before: Answer({"error": {"message": f"no, {SECRET}!"}}, status, headers))
    client = Client(server)
    with pytest.raises(RequestRefused, match=rf"the server refuses with HTTP {status}: no, \[key\]!") as refused:
        client(ask())
    assert refused.value.status == status
    assert len(server.bodies) == 1
    assert client.waits == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"detail": "bad field"}, "bad field"),
        ({"detail": [{"loc": ["x"]}]}, '[{"loc": ["x"]}]'),
        ({"error": "just text"}, "just text"),
        ("plain", "plain"),
        (["odd"], '["odd"]'),
    ],
)
def test_property_errors_are_found_where_servers_put_them(serve: Serve, body: Any, words: str) -> None:
    server = serve(lambda _, before: Answer(body, 400))
    with pytest.raises(RequestRefused) as refused:
        Client(server)(ask())
    assert str(refused.value) == f"the server refuses with HTTP 400: {words}"


def test_property_the_key_is_shown_nowhere(serve: Serve, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    def script(body: dict[str, Any], before: int) -> Answer:
        said = body["messages"][0]["content"]
        if said == "refused":
            return Answer(f"bad key {SECRET}", 401)
        return Answer(f"try later, {SECRET}", 500) if said == "broken" else Answer({"choices": SECRET})

    caplog.set_level(logging.DEBUG)
    server = serve(script)
    spec = HTTPSpec(
        base_url=server.url, model="m", api_key_env="HEADWATER_TEST_KEY", retries=0, cache=tmp_path / "c.sqlite"
    )
    shown = [spec.model_dump_json()]
    with open_generator(spec) as generator:
        shown += [str(reply) for reply in generator.generate([ask("broken"), ask("odd")])]
        try:
            list(generator.generate([ask("refused")]))
        except RequestRefused:
            shown.append(traceback.format_exc())
        backend = generator.inner.inner.backend  # type: ignore[attr-defined]
        for part in (generator, generator.inner, backend, backend._client):
            shown += [repr(part), str(vars(part)), part.id if isinstance(part, Generator) else ""]
        shown += [file.read_bytes().decode(errors="replace") for file in tmp_path.iterdir()]
    shown.append(caplog.text)
    assert all(header["Authorization"].endswith(SECRET) for header in server.headers)
    assert len(server.headers) == 3
    assert SECRET not in "\n".join(shown)
    assert "HTTP 401: bad key [key]" in shown[3]


def test_rejects_a_key_that_no_header_can_hold_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("sk-secret\nX", "sk-secrét"):
        monkeypatch.setenv("HEADWATER_TEST_KEY", key)
        with pytest.raises(GeneratorError, match=r"the key in \$HEADWATER_TEST_KEY holds characters") as refused:
            HTTPGenerator("http://h", "m", "HEADWATER_TEST_KEY")
        assert "secr" not in str(refused.value)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (completion("x", choices=[]), "choices: List should have at least 1 item"),
        (completion("x", choices=2 * [{"message": {"content": "x"}}]), "choices: List should have at most 1 item"),
        (completion("x", choices=[{"text": "x"}]), "choices.0.message: Field required"),
        (Answer(["x"]), "the answer is no completion: body"),
        (completion(None), "no text in the answer; finish_reason is 'stop'"),
        (completion("half", "content_filter"), "no text in the answer; finish_reason is 'content_filter'"),
    ],
)
def test_property_an_answer_that_is_no_completion_is_an_error_at_once(serve: Serve, answer: Answer, error: str) -> None:
    server = serve(lambda body, before: answer)
    (reply,) = Client(server)(ask())
    assert (reply.finish, reply.text) == ("error", "")
    assert error in (reply.error or "")
    assert len(server.bodies) == 1


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": 4}, "many", {"prompt_tokens": -1, "completion_tokens": 2}])
def test_property_tokens_are_estimated_where_the_server_does_not_count(serve: Serve, usage: Any) -> None:
    server = serve(lambda body, before: completion("12345678", usage=usage))
    client = Client(server)
    (reply,) = client(ask("x" * 40))
    expected, most = client.generator.count_prompt(ask("x" * 40))
    assert (reply.text, reply.estimated, reply.prompt_tokens, reply.completion_tokens) == (
        "12345678",
        True,
        expected,
        2,
    )
    assert 10 < expected < 40 < most


def test_property_a_server_without_schemas_is_asked_once(serve: Serve) -> None:
    def script(body: dict[str, Any], before: int) -> Answer:
        if "response_format" in body:
            return Answer({"error": {"message": "unknown field response_format"}}, 400)
        return echo(body, before)

    server = serve(script)
    client = Client(server, concurrency=1)
    schema = {"type": "object"}
    replies = client(ask("a", schema=schema), ask("b", schema=schema), ask("c", schema=schema))
    assert [reply.text for reply in replies] == ["re: a", "re: b", "re: c"]
    assert ["response_format" in body for body in server.bodies] == [True, False, False, False]
    assert server.bodies[0]["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema},
    }


def test_rejects_what_is_wrong_beside_the_schema(serve: Serve) -> None:
    server = serve(lambda body, before: Answer({"error": "context too long"}, 400))
    with pytest.raises(RequestRefused, match="context too long"):
        Client(server)(ask(schema={"type": "object"}))
    assert len(server.bodies) == 1


def test_property_what_was_under_way_when_the_server_refuses_is_kept(serve: Serve, tmp_path: Path) -> None:
    # The others answer only after the refusal was sent.
    refused = threading.Event()

    def script(body: dict[str, Any], before: int) -> Answer:
        if body["messages"][0]["content"] == "1":
            refused.set()
            return Answer({"error": "no"}, 403)
        refused.wait(20)
        return echo(body, before)

    server = serve(script)
    spec = HTTPSpec(base_url=server.url, model="m", concurrency=4, cache=tmp_path / "c.sqlite")
    with open_generator(spec) as generator:
        with pytest.raises(RequestRefused):
            list(generator.generate([ask(str(number)) for number in range(4)]))
        assert len(generator.store) == 3


def test_property_stopping_to_read_ends_the_waits(serve: Serve) -> None:
    server = serve(
        lambda body, before: (
            echo(body, before) if body["messages"][0]["content"] == "0" else Answer("", 500, {"Retry-After": "500"})
        )
    )
    generator = Retrying(HTTPGenerator(server.url, "m", None, concurrency=2), 20)
    replies = generator.generate(ask(str(min(number, 1))) for number in itertools.count())
    assert next(replies).text == "re: 0"
    while len(server.bodies) < 2:
        time.sleep(0.01)
    time.sleep(0.3)  # for the other request to begin its wait of 500 s
    replies.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 20
    while any(thread.name.startswith("headwater-generate") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a thread goes on retrying"
        time.sleep(0.01)


# The window.


def plain(complete: Callable[[Request], Reply], count: int, **sizes: int) -> list[int]:
    """Positions in the order in which they finish."""
    requests = iter([ask(str(number)) for number in range(count)])
    flow = sliding_window(lambda request, _: complete(request), requests, **sizes)
    return [finished[0] for finished in flow if finished is not None]


def test_property_a_slow_request_does_not_hold_up_the_others() -> None:
    # The first ends only when the twentieth does: waiting for whole batches would never end.
    twentieth = threading.Event()

    def complete(request: Request) -> Reply:
        number = int(request.messages[0].content)
        if number == 19:
            twentieth.set()
        assert number or twentieth.wait(20), "the twentieth never began"
        return Reply("", "stop", 0, 0, None, False, "m")

    order = plain(complete, 30, concurrency=3, window=100)
    assert sorted(order) == list(range(30))
    assert order.index(0) >= 17


def test_property_nothing_begins_a_window_past_the_oldest() -> None:
    released = threading.Event()
    begun: list[int] = []

    def complete(request: Request, _: threading.Event) -> Reply:
        assert request.messages[0].content != "0" or released.wait(20)
        return Reply("", "stop", 0, 0, None, False, "m")

    def requests() -> Iterator[Request]:
        for number in range(30):
            begun.append(number)
            yield ask(str(number))

    flow = sliding_window(complete, requests(), concurrency=3, window=8)
    first = [next(flow) for _ in range(7)]  # free slots are filled before a reply is given
    assert len(begun) == 8
    released.set()
    assert sorted(done[0] for done in [*first, *flow] if done is not None) == list(range(30))


def test_property_every_slot_is_used_and_no_more() -> None:
    # A barrier of as many calls as there are slots passes only if all run at once.
    barrier, lock = threading.Barrier(16), threading.Lock()
    running: set[str] = set()
    most = 0

    def complete(request: Request) -> Reply:
        nonlocal most
        with lock:
            running.add(request.messages[0].content)
            most = max(most, len(running))
        barrier.wait(20)
        with lock:
            running.remove(request.messages[0].content)
        return Reply("", "stop", 0, 0, None, False, "m")

    assert len(plain(complete, 64, concurrency=16, window=256)) == 64
    assert most == 16


def test_degenerate_no_requests(serve: Serve) -> None:
    assert Client(serve(echo))() == []


# A server of an open model family.

MISSING = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(
    bool(MISSING), reason=f"transformers serve needs {', '.join(MISSING)}: pip install transformers[serving]"
)
def test_oracle_transformers_serve_gives_what_the_local_backend_gives(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from headwater.modalities.text.generate_hf import HFGenerator
    from headwater.modalities.text.tiny import tiny_llama
    from headwater.modalities.text.tokenizers import train_bpe

    tokenizer = train_bpe(["a few words to learn some merges from, and some more words"], 300)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    model = tiny_llama(tokenizer, 16, 1, 2, 32, context=256, tie=False, generator_seed=0)
    with torch.no_grad():  # fresh weights are so small that the model only repeats itself
        model.lm_head.weight.mul_(50)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(tmp_path), "--device", "cpu"]
    with (tmp_path / "server.log").open("w") as log:
        child = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log, env={**os.environ}
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            assert child.poll() is None, (tmp_path / "server.log").read_text()
            assert time.monotonic() < deadline, "the server does not come up"
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        requests = [
            ask(f"word {number}", max_tokens=12, temperature=0, schema={"type": "object"}) for number in range(6)
        ]
        with HTTPGenerator(f"{address}/v1", str(tmp_path), None, concurrency=3) as server:
            served = list(Retrying(server, 1).generate(requests))
        local = HFGenerator(AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path))
        written = list(local.generate(requests))
    finally:
        child.terminate()
        child.wait(20)
    assert [(r.text, r.prompt_tokens, r.completion_tokens) for r in served] == [
        (r.text, r.prompt_tokens, r.completion_tokens) for r in written
    ]
    assert len({reply.text for reply in written}) > 1
