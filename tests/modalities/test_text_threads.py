from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.threads import docstring_posts, strip_code, thread_documents

POSTS = [
    {"id": "q", "parent": None, "text": "how do I sort", "score": 5, "tag": "py"},
    {"id": "a1", "parent": "q", "text": "use sorted of it", "score": 1, "tag": ""},
    {"id": "a2", "parent": "q", "text": "use sort", "score": 9, "tag": ""},
    {"id": "c", "parent": "a1", "text": "thanks", "score": 7, "tag": ""},
    {"id": "lost", "parent": "gone", "text": "me too", "score": 0, "tag": ""},
]


def words(texts):
    return [len(text.split()) for text in texts]


def threads(posts, max_tokens=100, **options):
    return thread_documents(posts, max_tokens=max_tokens, count_tokens=words, **options)


def test_equation_of_a_thread():
    found = threads(POSTS)
    first, second = found.documents
    assert first.text == "how do I sort\n\nuse sort\n\nuse sorted of it\n\nthanks"  # the better answer first
    assert first.meta == {"score": 5, "tag": "py", "posts": ["q", "a2", "a1", "c"]}
    assert (second.id, second.text) == ("lost", "me too")
    assert (found.dropped, found.orphans, found.long) == ([], 1, 0)
    in_order = threads(POSTS, score=None).documents[0]
    assert in_order.meta["posts"] == ["q", "a1", "c", "a2"]


def test_equation_of_what_does_not_fit():
    # 4 words asked; ranked: a2 (2 words), then c with its a1 (1 + 4), then a1.
    assert threads(POSTS, max_tokens=9).documents[0].meta["posts"] == ["q", "a2"]
    assert threads(POSTS, max_tokens=9).dropped == ["a1", "c"]
    assert threads(POSTS, max_tokens=10).dropped == ["c"]
    assert threads(POSTS, max_tokens=11).dropped == []
    alone = threads(POSTS, max_tokens=3)
    assert alone.documents[0].text == "how do I sort"
    assert alone.long == 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6), st.integers(-5, 5)), min_size=1, max_size=25), st.data()
)
def test_property_every_post_once_or_dropped_and_no_thread_too_long(drawn, data):
    posts = [
        {"id": n, "parent": None if up >= n else up, "text": " ".join(["w"] * size), "score": score}
        for n, (up, size, score) in enumerate(drawn)
    ]
    limit = data.draw(st.integers(1, 20))
    found = threads(posts, max_tokens=limit)
    members = [name for document in found.documents for name in document.meta["posts"]]
    assert sorted([*members, *found.dropped], key=int) == [str(n) for n in range(len(posts))]
    for document in found.documents:
        assert len(document.text.split()) <= limit or len(document.meta["posts"]) == 1
        for name in document.meta["posts"][1:]:  # what is replied to stands before the reply
            above = str(posts[int(name)]["parent"])
            assert document.meta["posts"].index(above) < document.meta["posts"].index(name)


def test_property_code_is_kept_to_the_byte_or_gone():
    block = "```python\nfor x in  y:\n\tprint(x)   # two  spaces\n```\n"
    posts = [{"id": 1, "parent": None, "text": f"do\n{block}so", "score": 0}]
    assert block in threads(posts).documents[0].text
    assert threads(posts, code="strip").documents[0].text == "do\nso"
    assert strip_code("see <pre><code>a < b</code></pre> there") == "see  there"
    assert strip_code("text\n>>> f(1)\n2\n\nmore") == "text\n\nmore"


def test_rejects_circles_twins_and_missing_columns():
    circle = [
        *POSTS,
        {"id": "x", "parent": "y", "text": "", "score": 0},
        {"id": "y", "parent": "x", "text": "", "score": 0},
    ]
    with pytest.raises(CorpusError, match="2 posts reply to each other in a circle, among them x, y"):
        threads(circle)
    with pytest.raises(CorpusError, match="two posts are called 'q'"):
        threads([*POSTS, POSTS[0]])
    with pytest.raises(CorpusError, match="no column 'votes'; available: id, parent, text, score, tag"):
        threads(POSTS, score="votes")
    with pytest.raises(CorpusError, match="no posts"):
        threads([])


def test_equation_of_docstrings_as_posts():
    def doc(name):
        return Document(f"m:{name}", name or "module", {"module": "m", "object": name})

    rows = docstring_posts([doc(""), doc("A"), doc("A.f"), doc("g"), doc("B.h")])
    assert [(row["id"], row["parent"]) for row in rows] == [
        ("m:", None),
        ("m:A", "m:"),
        ("m:A.f", "m:A"),
        ("m:g", "m:"),
        ("m:B.h", "m:"),  # B says nothing
    ]
    assert threads(rows).documents[0].meta["posts"] == ["m:", "m:A", "m:A.f", "m:g", "m:B.h"]
