from __future__ import annotations

import gzip
import json
import random
import re

import pytest

from headwater.modalities.text.docs import (
    CorpusError,
    Document,
    drop_overlap,
    fingerprint,
    near_duplicates,
    read_documents,
    split_documents,
)

WORDS = [f"word{i}" for i in range(200)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_docs(texts):
    return [Document(str(i), text) for i, text in enumerate(texts)]


def test_oracle_folder_is_read_recursively_in_sorted_order(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "b" / "c").mkdir(parents=True)
    write_jsonl(tmp_path / "a.jsonl", [{"id": "first", "text": "one", "year": 2001}, {"text": "two", "year": 2002}])
    with gzip.open(tmp_path / "b" / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"text": "three ☃"}\n\n{"text": "  "}\n')
    pq.write_table(pa.table({"text": ["four"], "lang": ["en"]}), tmp_path / "b" / "b.parquet")
    (tmp_path / "b" / "c" / "readme.md").write_text("# five", encoding="utf-8")
    (tmp_path / "z.rst").write_text("six", encoding="utf-8")
    (tmp_path / "z.txt").write_text("seven", encoding="utf-8")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "no.txt").write_text("hidden", encoding="utf-8")
    (tmp_path / "code.py").write_text("no", encoding="utf-8")

    docs = list(read_documents(tmp_path))

    assert [d.text for d in docs] == ["one", "two", "three ☃", "four", "# five", "six", "seven"]
    assert docs[0] == Document("first", "one", {"year": 2001})
    assert docs[3].meta == {"lang": "en"}
    assert [d.id for d in docs[4:]] == ["b/c/readme.md", "z.rst", "z.txt"]


@pytest.mark.parametrize("streaming", [False, True])
def test_oracle_datasets_in_memory_and_streaming(streaming):
    from datasets import Dataset

    data = Dataset.from_dict({"body": ["x y", "z"], "label": [0, 1]})
    data = data.to_iterable_dataset() if streaming else data
    docs = list(read_documents(data, text_field="body"))
    assert [(d.text, dict(d.meta)) for d in docs] == [("x y", {"label": 0}), ("z", {"label": 1})]


def test_property_row_ids_depend_on_the_text_only():
    alone = list(read_documents([{"text": "b"}]))
    later = list(read_documents([{"text": "a"}, {"text": "b", "n": 1}]))
    assert alone[0].id == later[1].id != later[0].id


def test_property_reading_is_lazy():
    def rows():
        yield {"text": "first"}
        raise AssertionError("read too far")

    assert next(read_documents(rows())).text == "first"
    assert [d.text for d in read_documents(rows(), limit_documents=1)] == ["first"]


def test_equation_limit_chars_stops_after_reaching_it():
    rows = [{"text": "abc"}, {"text": "defg"}, {"text": "h"}]
    assert [d.text for d in read_documents(rows, limit_chars=3)] == ["abc"]
    assert [d.text for d in read_documents(rows, limit_chars=4)] == ["abc", "defg"]


def test_rejects_what_cannot_be_read(tmp_path):
    expected = f"domain: 0 documents under {tmp_path} (looked for *.jsonl, *.jsonl.gz, *.parquet, *.txt, *.md, *.rst)."
    with pytest.raises(CorpusError, match=re.escape(expected)):
        list(read_documents(tmp_path, role="domain"))
    with pytest.raises(CorpusError, match=r"no such file or folder: \./nowhere"):
        list(read_documents("./nowhere"))
    with pytest.raises(CorpusError, match=r"no column 'text' in row 0 .*; available: body, label"):
        list(read_documents([{"body": "x", "label": 1}]))
    with pytest.raises(CorpusError, match=r"row 1 .* holds int; expected text"):
        list(read_documents([{"text": "x"}, {"text": 3}]))
    with pytest.raises(CorpusError, match=r"choose one split .*train, test"):
        list(read_documents({"train": [], "test": []}))
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{oops\n')
    with pytest.raises(CorpusError, match=r"a\.jsonl:2 is not JSON"):
        list(read_documents(tmp_path))
    (tmp_path / "a.jsonl").write_text("[1]\n")
    with pytest.raises(CorpusError, match=r"a\.jsonl:1 holds list"):
        list(read_documents(tmp_path))
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CorpusError, match=r"b\.txt is not UTF-8 \(byte 3\)"):
        list(read_documents(tmp_path))


def test_property_split_does_not_depend_on_order_or_company():
    docs = [Document(f"doc{i}", "x") for i in range(2000)]
    whole = split_documents(docs, (0.8, 0.1, 0.1))
    part = split_documents(docs[::-3], (0.8, 0.1, 0.1))
    for side, small in zip(whole, part, strict=True):
        assert {d.id for d in small} == {d.id for d in side} & {d.id for d in docs[::-3]}
    # Binomial(2000, 0.1): standard deviation 13.4; 5 of them is 67.
    assert abs(len(whole.test) - 200) < 67
    assert abs(len(whole.valid) - 200) < 67
    assert sum(map(len, whole)) == 2000


def test_property_more_validation_leaves_the_test_set_alone():
    docs = [Document(f"doc{i}", "x") for i in range(500)]
    assert split_documents(docs, (0.8, 0.1, 0.1)).test == split_documents(docs, (0.5, 0.4, 0.1)).test


def test_equation_split_is_pinned():
    # A changed hash would move documents between train and test of stored runs.
    split = split_documents([Document(f"doc{i}", "x") for i in range(12)], (0.5, 0.25, 0.25), salt="s")
    assert [[d.id[3:] for d in side] for side in split] == [
        ["0", "1", "2", "7", "8", "10"],
        ["3", "4", "5", "6"],
        ["9", "11"],
    ]


def test_rejects_fractions_that_do_not_sum_to_one():
    with pytest.raises(ValueError, match="sum to 1"):
        split_documents([], (0.5, 0.4, 0.2))


def test_property_fingerprint_sees_ids_texts_borders_and_order():
    base = [Document("a", "bc"), Document("d", "e")]
    others = [
        [Document("ab", "c"), Document("d", "e")],
        [Document("a", "bc"), Document("d", "f")],
        base[::-1],
        base[:1],
        [],
    ]
    assert len({fingerprint(docs) for docs in [base, *others]}) == 6
    assert fingerprint(base) == fingerprint(list(base))


def grams(text):
    words = re.findall(r"\w+", text.lower())
    n = min(5, len(words))
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} if words else set()


def brute_jaccard(a, b):
    a, b = grams(a), grams(b)
    return len(a & b) / len(a | b) if a | b else 0.0


def noisy_texts(seed):
    """Random texts, and copies of them with few or many words changed: similarities on both sides of 0.8."""
    rng = random.Random(seed)
    texts = []
    for _ in range(25):
        words = rng.choices(WORDS, k=rng.randint(3, 120))
        texts.append(" ".join(words))
        for _ in range(3):
            copy = list(words)
            for _ in range(rng.choice([0, 1, 1, 2, 4])):
                copy[rng.randrange(len(copy))] = rng.choice(WORDS)
            texts.append(" ".join(copy) + rng.choice(["", ".", " More words here."]))
    rng.shuffle(texts)
    return texts


@pytest.mark.parametrize("seed", [0, 1])
def test_oracle_near_duplicates_equal_brute_force(seed):
    texts = noisy_texts(seed)
    expected = []
    for i, text in enumerate(texts):
        kept = [j for j in range(i) if expected[j] == -1]
        expected.append(next((j for j in kept if brute_jaccard(text, texts[j]) > 0.8), -1))
    found = near_duplicates(make_docs(texts)).tolist()
    assert [f == -1 for f in found] == [e == -1 for e in expected]
    assert sum(f >= 0 for f in found) > 10  # the case is not empty
    assert all(brute_jaccard(texts[i], texts[f]) > 0.8 for i, f in enumerate(found) if f >= 0)


def test_oracle_drop_overlap_equals_brute_force():
    texts = noisy_texts(7)
    held_out, train = texts[:30], texts[30:]
    result = drop_overlap(make_docs(train), make_docs(held_out))
    expected = [t for t in train if all(brute_jaccard(t, h) <= 0.8 for h in held_out)]
    assert [d.text for d in result.kept] == expected
    words = {tuple(re.findall(r"\w+", h.lower())) for h in held_out}
    assert result.exact == sum(tuple(re.findall(r"\w+", t.lower())) in words for t in train)
    assert result.exact + result.near + len(result.kept) == len(train)
    assert result.near > 0


def test_degenerate_short_wordless_and_no_documents():
    docs = make_docs(["Hello, World", "hello world!", "...", "...", "---", "hello"])
    assert near_duplicates(docs).tolist() == [-1, 0, -1, 2, -1, -1]
    assert near_duplicates([]).shape == (0,)
    assert drop_overlap([], docs) == ([], 0, 0)
    assert drop_overlap(docs, []).kept == docs


def test_rejects_threshold():
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\)"):
        near_duplicates(make_docs(["a"]), threshold=1.0)
