"""How busy are a server's slots, what does a hit in the cache cost, and how fast does a local model write in batches?

    python -m benchmarks.generate

Three peers: the same calls one after the other; sending again instead of looking up; ``model.generate`` for one prompt
at a time. The server, a process of its own, answers after 0.2 s, so the first question is about waiting, in wall time.
A slot is busy while the server has a request in it; the ideal time is 0.2 s x requests / slots. Prompts of the model
are of unequal length, as are its limits.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import ROOT, Bound, alternate, report
from headwater.modalities.text.generate import Message, Reply, Request, ScriptedGenerator
from headwater.modalities.text.generate_hf import HFGenerator
from headwater.modalities.text.generate_http import HTTPGenerator, Retrying
from headwater.modalities.text.generate_store import Cached
from headwater.modalities.text.tiny import PRESETS, tiny_llama
from headwater.modalities.text.tokenizers import train_bpe

LATENCY, SLOTS, CALLS = 0.2, 16, 320
HITS = 5_000
PROMPTS = 32


class Slow(BaseHTTPRequestHandler):
    """Says the user's words again, later."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else head and body of an answer wait 40 ms for each other

    server: Server

    def do_POST(self) -> None:
        begin = time.perf_counter()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(LATENCY)
        message = {"role": "assistant", "content": body["messages"][0]["content"]}
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        data = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}).encode()
        self.answer(data)
        with self.server.lock:
            self.server.busy += time.perf_counter() - begin

    def do_GET(self) -> None:
        """Seconds that all requests took here since the last time this was asked."""
        with self.server.lock:
            busy, self.server.busy = self.server.busy, 0.0
        self.answer(json.dumps(busy).encode())

    def answer(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        self.busy, self.lock = 0.0, threading.Lock()
        super().__init__(("127.0.0.1", 0), Slow)


def asked(texts: Sequence[str], **fields: int | float) -> list[Request]:
    return [Request((Message("user", text),), **fields) for text in texts]


def texts_of(replies: Sequence[Reply]) -> list[str]:
    return [reply.text for reply in replies]


def waiting() -> tuple[dict[str, float], float]:
    """Wall seconds of ``CALLS`` calls through the slots and of a single call, and the share of slots that was busy."""
    command = [sys.executable, "-m", "benchmarks.generate", "--serve"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout is not None
    url = f"http://127.0.0.1:{int(child.stdout.readline())}/v1"
    requests, shares = asked([str(number) for number in range(CALLS)]), []
    try:
        with HTTPGenerator(url, "m", None, SLOTS) as client, HTTPGenerator(url, "m", None, 1) as one:
            ours = Retrying(client)

            def through_the_window() -> None:
                begin = time.perf_counter()
                assert texts_of(list(ours.generate(requests))) == [str(number) for number in range(CALLS)]
                wall = time.perf_counter() - begin
                shares.append(json.load(urllib.request.urlopen(url)) / (SLOTS * wall))

            sides = {"window": through_the_window, "one call": lambda: list(one.generate(asked(["7"])))}
            return alternate(sides, clock=time.perf_counter), max(shares)
    finally:
        child.terminate()
        child.wait()


def looking_up(directory: Path) -> float:
    """Processor seconds of ``HITS`` replies out of the cache."""
    requests = asked([f"prompt {number} " + "word " * 200 for number in range(HITS)])
    scripted = ScriptedGenerator({"": lambda messages, rng: messages[0].content.upper()})
    with Cached(scripted, directory / "replies.sqlite") as cached:
        written = texts_of(list(cached.generate(requests)))
        again = list(cached.generate(requests))
        assert texts_of(again) == written
        assert all(reply.cached for reply in again)
        return alternate({"hits": lambda: list(cached.generate(requests))})["hits"]


def writing() -> tuple[dict[str, float], int]:
    """Processor seconds of both sides, and the tokens each writes."""
    rng = np.random.default_rng(0)
    tokenizer = train_bpe(["some words to learn a few merges from, and some more of them"], 300)
    model = tiny_llama(tokenizer, **PRESETS["tiny"], context=512, generator_seed=0)
    texts = ["some words " * int(count) for count in rng.integers(1, 20, PROMPTS)]
    requests = [
        request
        for text, limit in zip(texts, rng.integers(16, 49, PROMPTS), strict=True)
        for request in asked([text], temperature=0, max_tokens=int(limit))
    ]
    generator = HFGenerator(model, tokenizer)

    def one_by_one() -> list[str]:
        found = []
        for request in requests:
            ids = torch.tensor([generator.encode(request)])
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=request.max_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            found.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
        return found

    replies = list(generator.generate(requests))
    assert texts_of(replies) == one_by_one()
    sampled = [Request(request.messages, request.max_tokens) for request in requests]
    seconds = alternate(
        {
            "batches": lambda: list(generator.generate(requests)),
            "sampled": lambda: list(generator.generate(sampled)),
            "one by one": one_by_one,
        }
    )
    return seconds, sum(reply.completion_tokens for reply in replies)


def main() -> None:
    if "--serve" in sys.argv:
        server = Server()
        print(server.server_address[1], flush=True)
        server.serve_forever()
    torch.set_num_threads(1)
    waited, busy = waiting()
    window, one = waited["window"], waited["one call"]
    with tempfile.TemporaryDirectory() as name:
        hits = looking_up(Path(name))
    written, tokens = writing()
    report(
        "How much sooner are replies there than when asked for one after the other?",
        {
            "slots busy": (busy, Bound("higher", 0.9, 0.97)),
            "ideal time over time": (LATENCY * CALLS / SLOTS / window, Bound("higher", None, 0.9)),
            "window over one by one": (one * CALLS / window, Bound("higher", 14)),
            "hits over calls of 0.2 s": (LATENCY * HITS / SLOTS / hits, Bound("higher", 50)),
            "batches over one by one": (written["one by one"] / written["batches"], Bound("higher", 3, 8)),
            "sampled over greedy, seconds": (written["sampled"] / written["batches"], Bound("lower", None, 1.3)),
        },
        seconds={**waited, "hits": hits, **written},
        checked="every text is the one asked for, in order; hits equal what was written; batches write the tokens that "
        "generate writes for one prompt",
        notes={
            "hits_per_second": round(HITS / hits),
            "tokens_per_second": {side: round(tokens / taken) for side, taken in written.items()},
            "work": f"{CALLS} calls, {SLOTS} slots; {HITS} hits of 1 KB; {PROMPTS} prompts, {tokens} tokens to write",
            "time": "wall seconds for the server, processor seconds for the rest",
        },
    )


if __name__ == "__main__":
    main()
