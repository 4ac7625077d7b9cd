"""The interface, the limits and the cache of generators."""

from __future__ import annotations

import itertools
import json
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from headwater.core.recipe import RecipeError
from headwater.modalities.text.generate import (
    BudgetExceeded,
    Flow,
    Generator,
    GeneratorError,
    GeneratorSpec,
    HFSpec,
    HTTPSpec,
    Message,
    Reply,
    Request,
    ScriptedGenerator,
    TooManyErrors,
    cut_at_stop,
    open_generator,
    request_key,
)
from headwater.modalities.text.generate_store import Budgeted, Cached, ReplyStore


def ask(text: str, **fields: object) -> Request:
    """A request of one turn."""
    return Request((Message("user", text),), **fields)  # type: ignore[arg-type]


class Shuffling(Generator):
    """A backend that has up to ``slots`` requests under way and finishes them in any order; fails where told."""

    def __init__(self, slots: int = 5, seed: int = 0, fails: frozenset[str] = frozenset(), window: int = 12) -> None:
        self.id, self.window, self.slots, self.fails = "shuffling", window, slots, fails
        self.rng = random.Random(seed)
        self.sent: list[Request] = []

    def flow(self, requests: Iterator[Request | None]) -> Flow:
        """See the class."""
        under_way: list[tuple[int, Request]] = []
        begun, more = 0, True
        while True:
            oldest = min((position for position, _ in under_way), default=begun)
            while more and len(under_way) < self.slots and begun - oldest < self.window:
                request = next(requests, "end")
                more = request != "end"
                if not isinstance(request, Request):
                    break
                self.sent.append(request)
                under_way.append((begun, request))
                begun += 1
            if under_way:
                position, request = under_way.pop(self.rng.randrange(len(under_way)))
                yield position, self.reply(request)
            elif more:
                yield None
            else:
                return

    def reply(self, request: Request) -> Reply:
        """Ten tokens read, ten written."""
        text = request.messages[0].content
        if text in self.fails:
            return Reply("", "error", 0, 0, None, False, "m", f"no luck with {text}")
        return Reply(f"re: {text} {request.sample}", "stop", 10, 10, None, False, "m")

    def count_prompt(self, request: Request) -> tuple[int, int]:
        """Feared to be twice as long as it is."""
        return 10, 20


# The interface.


def test_property_the_key_follows_every_field_but_the_tag() -> None:
    base = ask("a", tag="x")
    others = [
        ask("b"),
        replace(base, messages=(Message("system", "a"),)),
        replace(base, messages=(Message("user", "a"), Message("user", ""))),
        replace(base, max_tokens=511),
        replace(base, temperature=0.5),
        replace(base, top_p=0.5),
        replace(base, stop=("x",)),
        replace(base, seed=0),
        replace(base, sample=1),
        replace(base, schema={}),
    ]
    keys = {request_key("g", request) for request in [base, *others]} | {request_key("h", base)}
    assert len(keys) == len(others) + 2
    assert request_key("g", base) == request_key("g", replace(base, tag="y", temperature=1))


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("a b c", (), ("a b c", False)),
        ("a b c", ("c", "b"), ("a ", True)),
        ("a b c", ("d",), ("a b c", False)),
        ("", ("d",), ("", False)),
    ],
)
def test_equation_text_is_cut_at_the_first_stop_string(
    text: str, stop: tuple[str, ...], expected: tuple[str, bool]
) -> None:
    assert cut_at_stop(text, stop) == expected


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": ()}, "at least one message"),
        ({"max_tokens": 0}, "max_tokens must be >= 1; got 0"),
        ({"temperature": -0.1}, "temperature must be finite and >= 0"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]; got 0.0"),
        ({"stop": ("",)}, "no empty string"),
        ({"sample": -1}, "sample must be >= 0"),
    ],
)
def test_rejects_a_request_out_of_range(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(ask("a"), **fields)  # type: ignore[arg-type]


def test_property_scripts_see_messages_and_draw_by_request() -> None:
    scripted = ScriptedGenerator({"dice": lambda messages, rng: f"{messages[0].content} {rng.randrange(10**9)}"})
    requests = [ask("a", tag="dice"), ask("a", tag="dice", sample=1), ask("a", tag="dice", seed=1)]
    first, again = list(scripted.generate(requests)), list(scripted.generate(requests[::-1]))[::-1]
    assert first == again
    assert len({reply.text for reply in first}) == 3
    assert first[0].text.startswith("a ")
    assert (first[0].prompt_tokens, first[0].completion_tokens, first[0].usd) == (1, 2, 0.0)


def test_equation_scripts_obey_stop_strings_and_the_limit() -> None:
    scripted = ScriptedGenerator({"": lambda messages, rng: "one two three. four"})
    cut, stopped = scripted.generate([ask("a b", max_tokens=2), ask("a b", max_tokens=3, stop=(".",))])
    assert (cut.text, cut.finish, cut.completion_tokens) == ("one two", "length", 2)
    assert (stopped.text, stopped.finish, stopped.completion_tokens) == ("one two three", "stop", 3)


def test_rejects_a_tag_without_a_script() -> None:
    with pytest.raises(ValueError, match="no handler for the tag 'b'; there are: a"):
        list(ScriptedGenerator({"a": lambda messages, rng: ""}).generate([ask("x", tag="b")]))


# Limits.


def test_oracle_limits_that_are_far_change_nothing() -> None:
    requests = [ask(str(number)) for number in range(50)]
    limited = Budgeted(Shuffling(), max_tokens=10**6, max_requests=10**6, max_usd=1.0, price=(1.0, 3.0))
    replies = list(limited.generate(requests))
    assert [reply.text for reply in replies] == [f"re: {number} 0" for number in range(50)]
    assert [reply.usd for reply in replies] == pytest.approx([(10 * 1.0 + 10 * 3.0) / 1e6] * 50)
    assert limited.spent == {"requests": 50, "tokens": 1000, "usd": pytest.approx(50 * 40e-6)}


@given(st.integers(1, 3000), st.integers(1, 8), st.integers(10, 60), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_property_no_limit_is_passed_nor_left_unused(limit: int, slots: int, max_tokens: int, seed: int) -> None:
    # A reply takes 20 tokens; 20 + max_tokens are feared.
    requests = [ask(str(number), max_tokens=max_tokens) for number in range(60)]
    limited = Budgeted(Shuffling(slots, seed), max_tokens=limit)
    worst = 20 + max_tokens
    affordable = 0 if limit < worst else min(60, (limit - worst) // 20 + 1)
    replies: list[Reply] = []
    with pytest.raises(BudgetExceeded) if affordable < 60 else nullcontext() as hit:
        replies.extend(limited.generate(requests))
    if hit is not None:
        assert (hit.value.what, hit.value.spent, hit.value.limit) == ("tokens", 20 * len(replies), limit)
        assert (hit.value.done, hit.value.remaining) == (len(replies), 60 - len(replies))
    assert limited.spent["tokens"] <= limit
    assert [reply.text for reply in replies] == [f"re: {number} 0" for number in range(affordable)]


def test_property_a_larger_budget_goes_on_from_the_cache(tmp_path: Path) -> None:
    requests = [ask(str(number)) for number in range(30)]
    backend = Shuffling()
    replies: list[Reply] = []
    with Cached(Budgeted(backend, max_requests=11), tmp_path / "c.sqlite") as generator:
        with pytest.raises(BudgetExceeded, match=r"=11; spent 11, with 11 requests done and 19 to go") as hit:
            replies.extend(generator.generate(requests))
        assert (hit.value.done, hit.value.remaining, len(replies)) == (11, 19, 11)
    with Cached(Budgeted(backend, max_requests=19), tmp_path / "c.sqlite") as generator:
        second = list(generator.generate(requests))
    assert [reply.cached for reply in second] == [True] * 11 + [False] * 19
    assert len(backend.sent) == 30


def test_property_hits_behind_a_spent_budget_are_given(tmp_path: Path) -> None:
    with Cached(Budgeted(Shuffling(), max_requests=2), tmp_path / "c.sqlite") as generator:
        list(generator.generate([ask("a"), ask("b")]))
        seen: list[Reply] = []
        with pytest.raises(BudgetExceeded) as hit:
            seen.extend(generator.generate(ask(text) for text in "abac"))
        assert [reply.text for reply in seen] == ["re: a 0", "re: b 0", "re: a 0"]
        assert (hit.value.done, hit.value.remaining) == (3, None)


def test_property_what_is_under_way_when_the_reader_leaves_counts_at_its_worst() -> None:
    limited = Budgeted(Shuffling(slots=4), max_tokens=10**6)
    replies = limited.generate([ask(str(number), max_tokens=30) for number in range(20)])
    next(replies)
    finished = limited.spent["tokens"] // 20
    replies.close()  # type: ignore[attr-defined]
    assert limited.spent["tokens"] == finished * 20 + 3 * 50
    assert not any(limited._reserved.values())


def test_rejects_a_limit_in_usd_without_a_price() -> None:
    with pytest.raises(ValueError, match="max_usd needs price"):
        Budgeted(Shuffling(), max_usd=1.0)
    with pytest.raises(RecipeError, match="max_usd needs `price`"):
        HTTPSpec(base_url="http://h", model="m", max_usd=1.0)


def test_property_more_than_half_of_a_hundred_failing_stops() -> None:
    numbers = [str(number) for number in range(300)]
    half = frozenset(numbers[1::2])
    assert len(list(Budgeted(Shuffling(1, fails=half)).generate(map(ask, numbers)))) == 300
    more = half | {"200"}
    replies: list[Reply] = []
    with pytest.raises(TooManyErrors, match="51 of the last 100 requests failed; the last error: no luck with 2"):
        replies.extend(Budgeted(Shuffling(1, fails=more)).generate(map(ask, numbers)))
    assert len(replies) == 201


def test_property_a_dead_backend_stops_after_51_requests() -> None:
    numbers = [str(number) for number in range(300)]
    backend = Shuffling(1, fails=frozenset(numbers))
    with pytest.raises(TooManyErrors, match="51 of the last 51"):
        list(Budgeted(backend).generate(map(ask, numbers)))
    assert len(backend.sent) == 51


# The cache.


@given(
    texts=st.lists(st.sampled_from("abcdefghijklmnopqrst"), max_size=80),
    slots=st.integers(1, 6),
    seed=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_property_each_distinct_request_is_sent_once_and_order_is_kept(
    texts: list[str], slots: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cache") / "c.sqlite"
    backend = Shuffling(slots, seed, window=7)
    with Cached(Budgeted(backend, price=(0.0, 1e6 / 10)), path) as generator:
        replies = list(generator.generate(map(ask, texts)))
        usage = generator.usage
    assert [reply.text for reply in replies] == [f"re: {text} 0" for text in texts]
    assert sorted(request.messages[0].content for request in backend.sent) == sorted(set(texts))
    assert sum(not reply.cached for reply in replies) == len(set(texts))
    assert (usage.requests, usage.cached) == (len(texts), len(texts) - len(set(texts)))
    assert usage.usd_spent == usage.usd_total == pytest.approx(len(set(texts)))
    assert usage.prompt_tokens == usage.completion_tokens == 10 * len(set(texts))
    with Cached(Budgeted(backend), path) as generator:
        again = list(generator.generate(map(ask, texts)))
        usage = generator.usage
    assert again == [replace(reply, cached=True) for reply in replies]
    assert (usage.usd_spent, usage.usd_total) == (0.0, pytest.approx(len(set(texts))))
    assert usage.completion_tokens == 10 * len(set(texts))


def test_property_another_seed_or_sample_is_sent_and_another_tag_is_not(tmp_path: Path) -> None:
    backend = Shuffling()
    with Cached(backend, tmp_path / "c.sqlite") as generator:
        list(generator.generate([ask("a"), ask("a", seed=1), ask("a", sample=1), ask("a", tag="t"), ask("a")]))
    assert len(backend.sent) == 3


def test_property_errors_are_not_kept_and_cut_texts_are(tmp_path: Path) -> None:
    failing = Shuffling(fails=frozenset("a"))
    with Cached(failing, tmp_path / "c.sqlite") as generator:
        assert [reply.error for reply in generator.generate([ask("a"), ask("a")])] == ["no luck with a"] * 2
        assert (generator.usage.errors, len(failing.sent), len(generator.store)) == (2, 1, 0)
    cutting = ScriptedGenerator({"": lambda messages, rng: "one two"})
    with Cached(cutting, tmp_path / "c.sqlite") as generator:
        list(generator.generate([ask("a", max_tokens=1)]))
        (reply,) = generator.generate([ask("a", max_tokens=1)])
    assert (reply.text, reply.finish, reply.cached) == ("one", "length", True)


@pytest.mark.parametrize("hits", [False, True])
def test_property_requests_are_read_a_window_ahead(tmp_path: Path, hits: bool) -> None:
    backend = Shuffling(window=20)
    read = 0

    def requests() -> Iterator[Request]:
        nonlocal read
        for number in range(100_000):
            read += 1
            yield ask("the same" if hits else str(number))

    with Cached(Budgeted(backend), tmp_path / "c.sqlite") as generator:
        list(generator.generate([ask("the same")]))
        replies = generator.generate(requests())
        given = list(itertools.islice(replies, 500))
        assert len(given) == 500
        assert read <= 500 + 2 * backend.window


def test_property_a_reply_is_kept_although_the_one_before_it_is_not_there(tmp_path: Path) -> None:
    class Stuck(Shuffling):
        def flow(self, requests: Iterator[Request | None]) -> Flow:
            first, second = next(requests), next(requests)
            assert first is not None
            assert second is not None
            yield 1, self.reply(second)
            raise GeneratorError("the power is gone")

    with Cached(Stuck(), tmp_path / "c.sqlite") as generator:
        with pytest.raises(GeneratorError, match="power"):
            list(generator.generate([ask("a"), ask("b")]))
        assert generator.store.get(request_key("shuffling", ask("b"))) is not None


def test_property_a_dry_run_sends_nothing_and_says_what_is_left(tmp_path: Path) -> None:
    backend = Shuffling()
    with Cached(Budgeted(backend, max_usd=1, price=(1e6, 2e6)), tmp_path / "c.sqlite") as generator:
        requests = [ask(text, max_tokens=5) for text in "abcaab"]
        estimate = generator.dry_run(iter(requests))
        assert not backend.sent
        assert (estimate.requests, estimate.to_send) == (6, 3)
        assert (estimate.prompt_tokens, estimate.completion_tokens, estimate.usd) == (30, 15, 30 * 1 + 15 * 2)
    with Cached(Budgeted(backend), tmp_path / "c.sqlite") as generator:
        list(generator.generate(requests[:2]))
        estimate = generator.dry_run(requests)
    assert (estimate.to_send, estimate.prompt_tokens, estimate.usd) == (1, 10, None)


WRITER = """
import sys
from headwater.modalities.text.generate import Message, Request, ScriptedGenerator
from headwater.modalities.text.generate_store import Cached
with Cached(ScriptedGenerator({"": lambda messages, rng: str(rng.random())}), sys.argv[1]) as generator:
    requests = [Request((Message("user", str(number % 300)),)) for number in range(600)]
    print("".join(reply.text for reply in generator.generate(requests)))
"""


def test_property_processes_share_one_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "c.sqlite"
    command = [sys.executable, "-c", WRITER, str(path)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {child.communicate(timeout=120)[0] for child in children}
    assert [child.returncode for child in children] == [0, 0, 0]
    assert len(printed) == 1
    assert len(ReplyStore(path)) == 300
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_property_the_first_of_two_replies_stays(tmp_path: Path) -> None:
    one, two = ReplyStore(tmp_path / "c.sqlite"), ReplyStore(tmp_path / "c.sqlite")
    one.put("k", "g", Reply("first", "stop", 1, 1, None, False, "m", estimated=True))
    two.put("k", "g", Reply("second", "stop", 1, 1, None, False, "m"))
    assert two.get("k") == one.get("k") == Reply("first", "stop", 1, 1, None, True, "m", estimated=True)
    assert one.get("other") is None


def test_rejects_a_file_that_is_no_cache(tmp_path: Path) -> None:
    text, newer = tmp_path / "text", tmp_path / "newer"
    text.write_text("this is not a database" * 100)
    database = sqlite3.connect(newer)
    database.execute("PRAGMA user_version=7")
    database.close()
    with pytest.raises(GeneratorError, match="is no cache of replies"):
        ReplyStore(text)
    with pytest.raises(GeneratorError, match="has format 7, this version reads 1"):
        ReplyStore(newer)


# As data.


def test_property_specs_go_through_yaml_and_python_alike(tiny_causal: Path) -> None:
    adapter = TypeAdapter(GeneratorSpec)
    for data in (
        {"kind": "hf", "model": str(tiny_causal), "max_tokens": 1000},
        {"kind": "http", "base_url": "http://localhost:8000/v1/", "model": "m", "price": [0.5, 1.5], "max_usd": 3},
    ):
        spec = adapter.validate_python(data)
        assert adapter.validate_json(json.dumps(spec.model_dump(mode="json"))) == spec
    assert spec == HTTPSpec(base_url="http://localhost:8000/v1", model="m", price=(0.5, 1.5), max_usd=3)


@pytest.mark.parametrize("secret", ["sk-very-secret-1", "sk very"])
def test_rejects_a_key_in_the_place_of_its_name_without_showing_it(secret: str) -> None:
    for fields in (
        {"base_url": "http://h/v1", "api_key_env": secret},
        {"base_url": f"https://user:{secret}@h/v1"},
        {"base_url": f"https://h/v1?key={secret}"},
        {"base_url": f"ftp://{secret}/v1"},
        {"base_url": "http://h/v1", "api_key": secret},
    ):
        for build in (lambda data: HTTPSpec(**data), HTTPSpec.model_validate):
            with pytest.raises(ValueError, match=r"environment variable|base_url must|api_key") as refused:
                build({"model": "m", **fields})
            assert secret not in str(refused.value)


def test_property_a_recipe_opens_a_local_model_with_cache_and_limits(tiny_causal: Path, tmp_path: Path) -> None:
    spec = HFSpec(model=str(tiny_causal), cache=tmp_path / "c.sqlite", max_requests=3)
    requests = [ask(text, max_tokens=4) for text in ("graph", "node", "edge")]
    with open_generator(spec) as generator:
        first = list(generator.generate(requests))
    with open_generator(spec) as generator:
        second = list(generator.generate(requests))
    assert [reply.cached for reply in first + second] == [False] * 3 + [True] * 3
    assert [reply.text for reply in first] == [reply.text for reply in second]
    assert {reply.usd for reply in first} == {0.0}
