"""Sources before documents: what of a URL is shown, as which tokens, and which of them are learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.conftest import sentences

from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.examples import Example, PackedExamples, PlainFormatter, formatted
from headwater.modalities.text.metadata import MetadataFormatter, condition, transform_url
from headwater.modalities.text.packing import MixedStream, PackedBlocks
from headwater.modalities.text.tokenizers import train_bpe

TEXTS = [*sentences("domain", 30, words=8), *sentences("general", 10, words=60)]
HOSTS = ("en.wikipedia.org", "docs.python.org", "stories.example")
TOKENIZER = train_bpe([*TEXTS, *HOSTS], 330)
EOS = TOKENIZER.eos_token_id
DOCS = [Document(str(i), text, {"url": f"https://{HOSTS[i % 3]}/page/{i}"}) for i, text in enumerate(TEXTS)]
T = 64


def formatter(**changes: Any) -> MetadataFormatter:
    return MetadataFormatter(TOKENIZER, **{"max_tokens": 40, **changes})


def flat(pieces: list[list[Example]]) -> list[Example]:
    return [example for examples in pieces for example in examples]


# -- what of a URL is shown


@pytest.mark.parametrize(
    ("url", "kind", "shown"),
    [
        ("https://en.wikipedia.org/wiki/X?y", "domain", "en.wikipedia.org"),
        ("http://www.Example.COM:8080/a#b", "domain", "www.example.com"),
        ("user:secret@host.net/path", "domain", "host.net"),
        ("docs.python.org/3/library", "domain", "docs.python.org"),
        ("//cdn.site.io/x", "domain", "cdn.site.io"),
        ("http://[2001:db8::1]:80/", "domain", "2001:db8::1"),
        ("https://en.wikipedia.org/wiki/X?y", "suffix", "org"),
        (" https://a.b/c?d ", "full", "https://a.b/c?d"),
        ("Jane Doe, 1843", "identity", "Jane Doe, 1843"),
        ("sklearn.linear_model", "domain", "sklearn.linear_model"),
    ],
)
def test_equation_what_is_shown_of_a_url(url: str, kind: Any, shown: str) -> None:
    assert transform_url(url, kind) == shown


def test_property_hashes_stand_for_hosts_one_to_one() -> None:
    hosts = [f"site{i}.example{i % 7}.org" for i in range(5_000)]
    hashed = [transform_url(f"https://{host}/{i}", "hash") for i, host in enumerate(hosts)]
    assert len(set(hashed)) == len(set(hosts)) == 5_000
    assert all(len(h) == 16 and int(h, 16) >= 0 for h in hashed)
    assert transform_url(f"http://{hosts[3]}:1/other", "hash") == hashed[3]


@pytest.mark.parametrize(("value", "kind"), [("", "domain"), ("https:///path", "hash"), ("  ", "full")])
def test_rejects_urls_without_a_host(value: str, kind: Any) -> None:
    with pytest.raises(ValueError, match=r"no host in .*use transform 'identity'"):
        transform_url(value, kind)


# -- tokens and targets


@pytest.mark.parametrize("room", [None, T])
def test_oracle_targets_decode_to_the_document_and_eos(room: int | None) -> None:
    for document, pieces in zip(DOCS, formatter()(DOCS, room), strict=True):
        learned = np.concatenate([piece.input_ids[piece.trained] for piece in pieces])
        assert learned[-1] == EOS
        assert TOKENIZER.decode(learned[:-1]) == document.text
        source = condition("", transform_url(document.meta["url"]))
        for piece in pieces:
            unseen = piece.input_ids[~piece.trained]
            assert TOKENIZER.decode(unseen if room is None else unseen[1:]) == source
            assert room is None or (unseen[0] == EOS and len(piece.input_ids) <= room)


def test_oracle_targets_are_the_documents_at_every_place_of_a_pack() -> None:
    rows = PackedExamples(formatted(DOCS, formatter(), T), T, pad_token_id=0)
    columns = rows.columns(np.arange(len(rows)))
    found, places = [], set()
    for row in range(len(rows)):
        documents = columns["document_ids"][row]
        for number in range(1, documents.max() + 1):
            labels = columns["labels"][row, documents == number]
            text = TOKENIZER.decode(labels[labels != -100])
            found.append(text)
            places.add(number)
    whole = [document.text + "<eos>" for document in DOCS if len(formatter()([document], T)[0]) == 1]
    assert len(places) > 1
    assert set(whole) <= set(found)
    assert len([text for text in found if text.endswith("<eos>")]) == len(DOCS)


@pytest.mark.parametrize("room", [None, T])
def test_oracle_without_a_template_it_is_the_plain_stream_bit_for_bit(room: int | None) -> None:
    nothing = formatter(template="", mask_metadata=False)
    stores = [formatted(DOCS, form, room) for form in (nothing, PlainFormatter(TOKENIZER))]
    assert stores[0].fingerprint == stores[1].fingerprint
    rows = [PackedBlocks(s, T) if room is None else PackedExamples(s, T, pad_token_id=0) for s in stores]
    one, other = (MixedStream([(r, 1.0)], 2, seed=4).batch(3) for r in rows)
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in other)


def test_property_the_source_is_learned_only_where_asked() -> None:
    masked, learned = flat(formatter()(DOCS[:3], T)), flat(formatter(mask_metadata=False)(DOCS[:3], T))
    for one, other in zip(masked, learned, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert not other.trained[0]
        assert other.trained[1:].all()
        assert not one.trained.all()


def test_property_dropout_takes_the_source_from_the_same_documents() -> None:
    docs = [Document(f"doc{i}", "sum", {"url": HOSTS[0]}) for i in range(2_000)]
    bare = [len(e.input_ids) == len(PlainFormatter(TOKENIZER)(docs[:1], T)[0][0].input_ids) for e in
            flat(formatter(dropout=0.3)(docs, T))]  # fmt: skip
    assert np.mean(bare) == pytest.approx(0.3, abs=0.04)  # four standard deviations of 2000 draws
    again = flat(formatter(dropout=0.3)(docs[::-1], T))[::-1]
    assert [len(e.input_ids) for e in again] == [len(e.input_ids) for e in flat(formatter(dropout=0.3)(docs, T))]
    assert not any(not e.trained.all() and len(e.input_ids) > 5 for e in flat(formatter(dropout=1.0)(docs, T)))


def test_property_long_sources_lose_their_end_and_keep_the_template() -> None:
    form = formatter(transform="identity", max_tokens=12)
    head = form.head("x" * 200)
    assert len(head) <= 12
    assert TOKENIZER.decode(head).startswith("URL: x")
    assert TOKENIZER.decode(head).endswith("x\n\n")
    assert form.is_cut("x" * 200)
    assert not form.is_cut("y")
    assert TOKENIZER.decode(form.head("y")) == "URL: y\n\n"


def test_property_the_cache_tells_sources_apart() -> None:
    one = formatted(DOCS, formatter(), T)
    moved = [Document(d.id, d.text, {"url": HOSTS[0]}) for d in DOCS]
    assert formatted(moved, formatter(), T).fingerprint != one.fingerprint
    assert formatted(DOCS, formatter(), T).fingerprint == one.fingerprint
    assert formatted(moved, PlainFormatter(TOKENIZER), T).fingerprint == formatted(DOCS, PlainFormatter(TOKENIZER), T).fingerprint  # fmt: skip  # noqa: E501


# -- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"template": "URL: value"}, "template must hold {value} once, or be empty; got 'URL: value'"),
        ({"template": "{value}{value}"}, "template must hold {value} once"),
        ({"dropout": 1.5}, "dropout must be in"),
        ({"max_tokens": 3}, "alone takes 3 tokens"),
    ],
)
def test_rejects_when_built(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        formatter(**changes)


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({}, "document 'a' has no 'url'; set missing to 'plain' or 'unknown'"),
        ({"url": " "}, "document 'a' has no 'url'"),
        ({"url": ["x"]}, "'url' holds a list; a source is a text"),
        ({"url": "https:///x"}, "document 'a': there is no host"),
    ],
)
def test_rejects_documents_without_a_source(meta: dict[str, Any], words: str) -> None:
    with pytest.raises(CorpusError, match=words):
        formatter()([Document("a", "text", meta)], T)


def test_equation_what_stands_for_a_missing_source() -> None:
    bare = Document("a", "text")
    assert formatter(missing="plain").value(bare) is None
    assert formatter(missing="unknown").value(bare) == "unknown"
    assert formatter(missing="plain")([bare], T)[0][0].input_ids.tolist() == PlainFormatter(TOKENIZER)([bare], T)[0][0].input_ids.tolist()  # fmt: skip  # noqa: E501
    assert formatter(transform="identity").value(Document("a", "text", {"url": 1843})) == "1843"
