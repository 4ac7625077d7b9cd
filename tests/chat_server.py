"""A chat server on loopback whose replies a test writes; what it was asked stays to be looked at."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[list[dict[str, str]]], str]


class ChatServer(ThreadingHTTPServer):
    """Answers ``/v1/chat/completions``; every prompt counts 100 tokens, every word of a reply one."""

    daemon_threads = True

    def __init__(self, reply: Reply) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply = reply
        self.asked: list[list[dict[str, str]]] = []

    @property
    def spec(self) -> dict[str, Any]:
        """It as a ``generator`` of a recipe."""
        return {"kind": "http", "base_url": f"http://127.0.0.1:{self.server_address[1]}/v1", "model": "served"}


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        messages = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
        self.server.asked.append(messages)
        text = self.server.reply(messages)
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 100, "completion_tokens": len(text.split())}
        data = json.dumps({"model": "served", "choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def chat_server(reply: Reply) -> Iterator[ChatServer]:
    """A server that runs until the block ends."""
    server = ChatServer(reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
