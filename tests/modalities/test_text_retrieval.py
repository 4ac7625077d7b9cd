"""Retrieval: exact by vectors and by words, in parts or at once, from disk, and never what was to be left out."""

from __future__ import annotations

import builtins
import logging
import math
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pytest
from numpy.typing import NDArray

from headwater.modalities.text.retrieval import DenseRetriever, Found, LexicalRetriever, Retriever

WORDS = ["graph", "node", "edge", "path", "tree", "sum", "mean", "row", "axis", "sort"]


def texts(count: int, seed: int = 0, words: int = 6) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=words)) + f" n{i}x{seed}" for i in range(count)]


def encode(of: list[str]) -> NDArray[np.float32]:
    """A vector for a text that depends on it alone."""
    rows = [np.random.default_rng([*text.encode()]).standard_normal(8) for text in of]
    return np.array(rows, dtype=np.float32).reshape(len(of), 8)


def stores() -> list[Retriever]:
    return [DenseRetriever(encode), DenseRetriever(encode, exact_rows=1), LexicalRetriever()]


every_store = pytest.mark.parametrize("store", stores(), ids=["dense", "faiss", "lexical"])


def fresh(store: Retriever) -> Retriever:
    return stores()[["dense", "faiss", "lexical"].index(kind(store))]


def kind(store: Retriever) -> str:
    if isinstance(store, LexicalRetriever):
        return "lexical"
    assert isinstance(store, DenseRetriever)
    return "faiss" if store.exact_rows == 1 else "dense"


def same(one: Found, other: Found) -> None:
    assert one.rows.tolist() == other.rows.tolist()
    np.testing.assert_allclose(one.scores, other.scores, rtol=1e-5, atol=1e-5)


def test_oracle_dense_search_is_an_argsort_of_all_inner_products() -> None:
    store, held, queries = DenseRetriever(encode), texts(200), texts(30, seed=1)
    store.add(held)
    products = encode(queries) @ encode(held).T
    expected = np.argsort(-products, axis=1, kind="stable")[:, :7]
    found = store.search(queries, 7)
    assert found.rows.tolist() == expected.tolist()
    np.testing.assert_array_equal(found.scores, np.take_along_axis(products, expected, 1))


def test_oracle_faiss_finds_what_numpy_finds_with_and_without_exclusions() -> None:
    plain, flat, held, queries = (
        DenseRetriever(encode),
        DenseRetriever(encode, exact_rows=150),
        texts(200),
        texts(20, 1),
    )
    groups = [f"g{row % 5}" for row in range(200)]
    for store in (plain, flat):
        store.add(held, groups=groups)
    same(flat.search(queries, 5), plain.search(queries, 5))
    apart = [[f"g{place % 5}", "g2"] for place in range(20)]
    same(flat.search(queries, 5, exclude_groups=apart), plain.search(queries, 5, exclude_groups=apart))
    np.testing.assert_array_equal(flat.vectors, plain.vectors)


def test_equation_bm25_by_hand() -> None:
    store = LexicalRetriever(k1=1.2, b=0.5)
    store.add(["node graph graph", "edge", "node edge"])
    # Three texts of 3, 1 and 2 words, 2 in the mean. "graph" is in one, twice; "node" in two.
    idf = {"graph": math.log(1 + (3 - 1 + 0.5) / 1.5), "node": math.log(1 + (3 - 2 + 0.5) / 2.5)}
    first = idf["graph"] * 2 / (2 + 1.2 * (0.5 + 0.5 * 3 / 2)) + idf["node"] * 1 / (1 + 1.2 * (0.5 + 0.5 * 3 / 2))
    third = idf["node"] * 1 / (1 + 1.2 * (0.5 + 0.5 * 2 / 2))
    found = store.search(["Graph node!"], 3)
    assert found.rows.tolist() == [[0, 2, 1]]
    np.testing.assert_allclose(found.scores, [[first, third, 0.0]], rtol=1e-5)


def test_oracle_lexical_scores_are_those_of_bm25s() -> None:
    store, held, queries = LexicalRetriever(), texts(60), texts(8, seed=1)
    store.add(held)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(held, stopwords=None, show_progress=False), show_progress=False)
    words = bm25s.tokenize(queries, stopwords=None, return_ids=False, show_progress=False)
    _, scores = index.retrieve(words, k=5, show_progress=False)
    np.testing.assert_allclose(store.search(queries, 5).scores, scores, rtol=1e-6)


@every_store
def test_property_adding_in_parts_is_adding_at_once(store: Retriever) -> None:
    whole, parts, held = fresh(store), fresh(store), texts(40)
    whole.add(held, groups=[str(row % 3) for row in range(40)])
    for begin in (0, 7, 30):
        part = list(range(begin, {0: 7, 7: 30, 30: 40}[begin]))
        parts.add([held[row] for row in part], groups=[str(row % 3) for row in part])
        parts.search(held[:2], 3)  # an index that was used before must follow
    same(parts.search(texts(9, 1), 6), whole.search(texts(9, 1), 6))
    assert parts.entries == whole.entries


@every_store
def test_property_what_was_saved_finds_the_same(store: Retriever, tmp_path: Path) -> None:
    saved = fresh(store)
    saved.add(texts(30), [f"id{row}" for row in range(30)], groups=["a", "b"] * 15, meta=[{"n": r} for r in range(30)])
    saved.save(tmp_path)

    def never(of: list[str]) -> NDArray[np.float32]:
        raise AssertionError("what is stored must not be encoded again")

    opened: Retriever
    if isinstance(saved, DenseRetriever):
        opened = DenseRetriever.load(tmp_path, never, encode)
    else:
        opened = LexicalRetriever.load(tmp_path)
    assert opened.entries == saved.entries
    apart = [["a"], ["b"]]
    same(
        opened.search(texts(2, 1), 4, exclude_groups=apart, exclude_ids=[["id1"], ["id4"]]),
        saved.search(texts(2, 1), 4, exclude_groups=apart, exclude_ids=[["id1"], ["id4"]]),
    )
    index = {"dense": ["vectors.safetensors"], "faiss": ["vectors.faiss"], "lexical": []}[kind(saved)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["entries.parquet", "retriever.json", *index])


@every_store
def test_property_a_query_never_finds_itself_or_its_group(store: Retriever) -> None:
    full, held = fresh(store), texts(24)
    groups = [f"g{row % 4}" for row in range(24)]
    full.add(held, groups=groups)
    if kind(full) == "lexical":  # without exclusions it finds itself first
        assert full.search(held, 1).rows[:, 0].tolist() == list(range(24))
    found = full.search(held, 24, exclude_ids=[[str(row)] for row in range(24)])
    assert all(row not in rows for row, rows in enumerate(found.rows.tolist()))
    found = full.search(held, 20, exclude_groups=[[group] for group in groups])
    assert all(r == -1 or groups[r] != groups[row] for row, rows in enumerate(found.rows) for r in rows)
    # 18 of 24 are in other groups: all of them come, and then nothing.
    assert (found.rows >= 0).sum(1).tolist() == [18] * 24
    assert np.isneginf(found.scores[:, 18:]).all()
    assert (found.rows[:, 18:] == -1).all()


def test_property_equal_scores_come_in_the_order_of_adding() -> None:
    store = DenseRetriever(lambda of: np.ones((len(of), 2), np.float32))
    store.add(texts(50))
    assert store.search(["any"], 4, exclude_ids=[["1"]]).rows.tolist() == [[0, 2, 3, 4]]


def test_property_two_encoders_for_stored_texts_and_queries() -> None:
    store = DenseRetriever(encode, lambda of: -encode(list(of)))
    store.add(texts(12))
    found = store.search(texts(3), 12)
    assert found.rows[:, -1].tolist() == [0, 1, 2]  # what is like the query comes last


@every_store
def test_degenerate_no_query_one_entry_and_no_new_text(store: Retriever) -> None:
    one = fresh(store)
    one.add(["graph node"])
    one.add([])
    assert len(one) == 1
    assert one.search([], 1).rows.shape == (0, 1)
    assert one.search(["graph"], 1).rows.tolist() == [[0]]
    assert one.search(["graph"], 1, exclude_ids=[["0"]]).rows.tolist() == [[-1]]


def test_degenerate_texts_and_queries_without_a_word_score_nothing() -> None:
    store = LexicalRetriever()
    store.add(["!", "?"])
    assert store.search(["graph", "."], 2).scores.tolist() == [[0, 0], [0, 0]]
    store.add(["graph"])
    assert store.search(["graph", "."], 1).rows.tolist() == [[2], [0]]


@every_store
def test_rejects_more_than_there_is_with_a_warning(store: Retriever, caplog: pytest.LogCaptureFixture) -> None:
    small = fresh(store)
    small.add(texts(3))
    with caplog.at_level(logging.WARNING):
        assert small.search(["graph"], 9).rows.shape == (1, 3)
    assert "9 entries were asked for and 3 are stored" in caplog.text


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: s.add(["a", "b"], ["1"]), "got 2 texts, 1 ids"),
        (lambda s: s.add(["a", " "]), "text 1 is blank"),
        (lambda s: s.add(["a b", "b c"], ["1", "1"]), "an entry '1' already"),
        (lambda s: s.search(["a"], 1), "nothing is stored"),
        (lambda s: (s.add(["ab"]), s.search(["a"], 0)), "k must be at least 1; got 0"),
        (lambda s: (s.add(["ab"]), s.search(["a"], 1, exclude_ids=[])), "exclude_ids needs one .* got 0 for 1"),
    ],
)
def test_rejects_what_cannot_be_stored_or_searched(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(LexicalRetriever())


def test_rejects_vectors_of_another_shape_and_parameters_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"must give \(2, D\) vectors; got shape \(1, 4\)"):
        DenseRetriever(lambda of: np.zeros((1, 4), np.float32)).add(["a", "b"])
    with pytest.raises(ValueError, match=r"b in \[0, 1\]; got k1=1.0 and b=2.0"):
        LexicalRetriever(1.0, 2.0)


def test_rejects_a_store_of_another_kind(tmp_path: Path) -> None:
    store = LexicalRetriever()
    store.add(texts(3))
    store.save(tmp_path)
    with pytest.raises(ValueError, match="holds a lexical store"):
        DenseRetriever.load(tmp_path, encode)


def test_rejects_a_large_store_without_faiss_naming_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "faiss":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"5 vectors are searched by faiss: pip install 'headwater\[retrieval\]'"):
        DenseRetriever(encode, exact_rows=5).add(texts(5))
