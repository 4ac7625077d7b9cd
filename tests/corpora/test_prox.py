"""ProX: the language and its executor, chunks, both programmers, the step and the recipe."""

from __future__ import annotations

import copy
import json
import pickle
import random
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.chat_server import chat_server
from tests.conftest import prox_annotations
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from headwater.claims.prox import Rules, tuned_rules
from headwater.core.recipe import CorpusRef, RecipeError, load_recipe
from headwater.core.run import Result, execute
from headwater.corpora.prox_generator import ProgramGenerator, annotate_seed, sft_dataset
from headwater.corpora.prox_lines import LineProgrammer
from headwater.corpora.prox_programs import (
    DropDoc,
    KeepChunk,
    KeepDoc,
    Limits,
    Normalize,
    Program,
    RemoveLines,
    Written,
    chunk_lines,
    number_lines,
    parse_program,
    removed_lines,
    render_program,
    run_program,
)
from headwater.corpora.prox_step import RunPrograms, WrongLanguage
from headwater.modalities.text.curate import curate
from headwater.modalities.text.debris import ANNOTATED, Dirty, debris_line, plant
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.docstrings import docstring_corpus
from headwater.modalities.text.document_store import write_documents
from headwater.modalities.text.generate import HTTPSpec, Message, ScriptedGenerator
from headwater.modalities.text.sources import open_corpus

Fields = dict[str, Any]
LINES = [f"this is line number {i} of the text" for i in range(6)]
TEXT = "\n".join(LINES)
ANY = Limits(min_keep_words=0)


def numbered(*places: int) -> str:
    return "\n".join(LINES[place] for place in places)


# -- the language


@pytest.mark.parametrize(
    ("line", "op"),
    [
        ("remove_lines(line_start=1, line_end=3)", RemoveLines(1, 3)),
        ("remove_lines(1, 3)", RemoveLines(1, 3)),
        ("remove_lines(start=1, end=3)", RemoveLines(1, 3)),
        ("remove_lines(line_end=012, line_start=003)", RemoveLines(3, 12)),
        ("remove_lines(line_start=000, line_end=100)", RemoveLines(0, 100)),
        ('normalize(source_str="a, b (c) \\"d\\"", target_str="x=1")', Normalize('a, b (c) "d"', "x=1")),
        ("normalize('one\\ntwo', '')", Normalize("one\ntwo", "")),
        ('normalize(source="007")', Normalize("007")),
        ("  keep_chunk()", KeepChunk()),
        ("drop_doc()", DropDoc()),
        ("keep_doc()", KeepDoc()),
    ],
)
def test_equation_one_operation_a_line(line: str, op: object) -> None:
    assert parse_program(f"```python\n{line}\n\n```") == ((op,), 0)


@pytest.mark.parametrize(
    "line",
    [
        "remove_lines(line_start=1)",
        "remove_lines(line_start=-1, line_end=3)",
        "remove_lines(line_start=True, line_end=3)",
        "remove_lines(line_start=1, line_end=2, line_end=3)",
        "remove_lines(1, start=1)",
        "remove_lines(1, 2, 3)",
        "remove_lines(all=True)",
        "remove_lines(*[1, 2])",
        "remove_lines(**{'start': 1, 'end': 2})",
        "normalize(target_str='x')",
        "normalize(source_str=f'{1}', target_str='')",
        "normalize(source_str=open('x'), target_str='')",
        "keep_chunk(1)",
        "keep_chunk",
        "keep_chunk().run()",
        "keep_chunk(); drop_doc()",
        "__import__('os').system('true')",
        "normalize('" + "a" * 30_000 + "')",
        "remove_lines(" + "(" * 5_000 + "1",
        "remove_lines(" + "-" * 9_000 + "1, 2)",
        "normalize('\0')",
        "Sure! Here is the program:",
    ],
)
def test_rejects_what_is_no_operation(line: str) -> None:
    assert parse_program(line) == ((), 1)


_OPS = st.one_of(
    st.builds(RemoveLines, st.integers(0, 2000), st.integers(0, 2000)),
    st.builds(Normalize, st.text(max_size=20), st.text(max_size=20)),
    st.builds(Normalize, st.text(st.characters(categories=["Cs", "Cc", "Zl", "Zp"]), max_size=5), st.just('"\\')),
    st.sampled_from([DropDoc(), KeepDoc(), KeepChunk()]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(_OPS, max_size=6).map(tuple))
def test_property_a_rendered_program_reads_back(program: Program) -> None:
    assert parse_program(render_program(program)) == (program, 0)


# -- running


@pytest.mark.parametrize(
    ("program", "text", "status", "errors"),
    [
        ((RemoveLines(0, 0), RemoveLines(4, 5)), numbered(1, 2, 3), "refined", 0),
        ((RemoveLines(3, 4), RemoveLines(1, 3)), numbered(0, 5), "refined", 0),
        ((RemoveLines(1, 4), RemoveLines(2, 3)), numbered(0, 5), "refined", 0),
        ((RemoveLines(4, 9),), numbered(0, 1, 2, 3), "refined", 1),
        ((RemoveLines(6, 9),), TEXT, "kept", 1),
        ((RemoveLines(4, 2),), TEXT, "kept", 1),
        ((RemoveLines(0, 0), RemoveLines(6, 9), RemoveLines(5, 9)), TEXT, "rejected", 2),
        ((RemoveLines(0, 5),), "", "dropped", 0),
        ((RemoveLines(0, 0), RemoveLines(0, 0), DropDoc()), "", "dropped", 0),
        ((KeepDoc(),), TEXT, "kept", 0),
        ((Normalize("", "x"),), TEXT, "kept", 1),
        ((Normalize(" ", ""),), TEXT, "kept", 1),
        ((Normalize("absent", "x"),), TEXT, "kept", 0),
    ],
)
def test_equation_lines_are_those_that_were_shown(program: Program, text: str, status: str, errors: int) -> None:
    found = run_program(TEXT, program, ANY)
    assert (found.text, found.status, found.errors) == (text, status, errors)


def test_equation_replacements_come_after_removal_and_shift_no_number() -> None:
    # Line 0 becomes two lines; line 1 is still the second one that was shown.
    program = (Normalize("number 0", "number\n0"), RemoveLines(1, 1), Normalize("this is", "here:"))
    found = run_program(TEXT, program)
    wanted = [LINES[0].replace("number 0", "number\n0"), *LINES[2:]]
    assert found.text == "\n".join(wanted).replace("this is", "here:")
    assert (found.removed_lines, found.replacements) == (1, 6)


def test_equation_a_removed_line_is_not_replaced_in() -> None:
    found = run_program(TEXT, (RemoveLines(0, 0), Normalize("number", "nr")))
    assert found.replacements == 5


def test_equation_the_order_of_the_limits() -> None:
    words = " ".join(f"w{i}" for i in range(20))
    text = f"{words}\n" * 2 + words  # W = 60
    one = (Normalize(f"{words}\n" * 2, ""), Normalize(words[len("w0 w1 w2") :], ""))  # W' = 3 <= 0.05 * 60
    strict = Limits(min_keep_words=0)
    assert run_program(text, one, strict).status == "dropped"
    two = (*one[:1], Normalize(words[len("w0 w1 w2 w3") :], ""))  # W' = 4 > 3
    assert run_program(text, two, strict).text == "w0 w1 w2 w3"
    assert run_program(text, one, strict, errors=2).status == "rejected"  # not trusted, so not dropped
    assert run_program(text, one, errors=2).status == "dropped"  # but a short one is, whoever asked
    ten, eleven = " ".join("abcdefghij"), " ".join("abcdefghijk")
    assert [run_program(t, (KeepChunk(),)).status for t in (ten, eleven)] == ["dropped", "kept"]
    assert run_program(ten, (KeepDoc(),)).status == "kept"  # the document level has no limit


@pytest.mark.parametrize("text", [TEXT, TEXT + "\n", "\n\n" + TEXT, TEXT.replace("\n", "\r\n"), "\u2028".join(LINES)])
@pytest.mark.parametrize("program", [(), (KeepChunk(),)])
def test_property_nothing_to_do_is_the_identity(text: str, program: Program) -> None:
    assert run_program(text, program).text == text
    assert run_program(text, program).status == "kept"


def test_property_windows_line_ends_are_kept() -> None:
    windows = TEXT.replace("\n", "\r\n")
    program = (RemoveLines(5, 5), Normalize(f"{LINES[0]}\n", "first\n"))
    found = run_program(windows, program)
    assert found.text == run_program(TEXT, program).text.replace("\n", "\r\n")
    assert found.text.startswith("first\r\n")
    assert not found.text.endswith("\r\n")
    mixed = TEXT.replace("\n", "\r\n", 2)
    assert run_program(mixed, (RemoveLines(5, 5),)).text == mixed.rpartition("\n")[0]


def test_rejects_growth_at_once_or_by_steps() -> None:
    assert run_program(TEXT, (Normalize("0", "1234567890"),)).status == "refined"
    assert run_program(TEXT, (Normalize("0", "12345678901"),)).text == TEXT
    grow = tuple(Normalize("t", "tttttttt") for _ in range(40))
    assert run_program(TEXT, grow).status == "rejected"
    assert run_program(TEXT, grow).text == TEXT


@pytest.mark.parametrize("text", ["", " \n \n", "\r\n"])
def test_degenerate_a_blank_document_is_dropped(text: str) -> None:
    assert run_program(text, (), ANY).status == "dropped"


def reference(text: str, program: Program) -> str:
    """The authors' order: replace in the whole text, then remove lines."""
    gone = {i for op in program if isinstance(op, RemoveLines) for i in range(op.start, op.end + 1)}
    for op in program:
        if isinstance(op, Normalize):
            text = text.replace(op.source, op.target)
    return "\n".join(line for i, line in enumerate(text.split("\n")) if i not in gone)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_oracle_agrees_with_the_authors_order_where_no_newline_is_replaced(data: st.DataObject) -> None:
    lines = data.draw(st.lists(st.text("abc é", max_size=12), min_size=1, max_size=12))
    ranges = st.tuples(st.integers(0, len(lines) - 1), st.integers(0, len(lines) - 1)).map(sorted)
    removal = st.builds(lambda pair: RemoveLines(*pair), ranges)
    source = st.text("abc é", min_size=1, max_size=3).filter(lambda s: s != " ")
    ops = data.draw(st.lists(st.one_of(removal, st.builds(Normalize, source, st.text("xyz", max_size=3))), max_size=5))
    text, limits = "\n".join(lines), Limits(min_keep_words=0, max_growth=100.0)
    wanted = reference(text, tuple(ops))
    found = run_program(text, tuple(ops), limits)
    if found.status == "dropped":
        assert len(wanted.split()) <= 0.05 * len(text.split()) + 1e-9
    else:
        assert found.text == wanted
        assert found.removed_lines == (removed_lines(tuple(ops), len(lines)).sum() if found.status == "refined" else 0)


def test_oracle_the_true_programs_of_planted_debris_give_the_clean_text() -> None:
    documents = [Document(str(i), "\n".join(LINES[: 2 + i % 5])) for i in range(40)]
    for dirty in plant(documents, np.random.default_rng(0)):
        program, errors = parse_program(dirty.program)
        assert errors == 0
        assert run_program(dirty.text, program, ANY).text == dirty.clean


def test_oracle_the_builtin_annotations_are_true() -> None:
    documents = list(open_corpus(CorpusRef(name="headwater:debris"), role="annotations"))
    clean = {d.id: d.text for d in docstring_corpus(ANNOTATED)}
    assert len(documents) == 300
    for document in documents:
        program, errors = parse_program(document.meta["program"])
        assert errors == 0
        assert run_program(document.text, program, ANY).text == clean.get(document.id, "")


# -- chunks


@pytest.fixture(scope="module")
def tokenizer(tiny_causal: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_causal)


@pytest.mark.parametrize("limit", [1, 20, 45, 10_000])
def test_property_chunks_joined_are_the_document_and_numbers_run_on(
    tokenizer: PreTrainedTokenizerBase, limit: int
) -> None:
    text = f"\n{TEXT}\n\n{'long ' * 60}\nend"
    chunks = chunk_lines(text, tokenizer, limit)
    assert "\n".join(chunk.text for chunk in chunks) == text
    assert "\n".join(number_lines(chunk.text, chunk.first) for chunk in chunks) == number_lines(text)
    assert [chunk.first for chunk in chunks[1:]] == [chunk.last + 1 for chunk in chunks[:-1]]
    for chunk, after in pairwise(chunks):
        size = sum(tokens(tokenizer, line) for line in number_lines(chunk.text, chunk.first).split("\n"))
        following = tokens(tokenizer, number_lines(after.text, after.first).split("\n")[0])
        assert size <= limit or chunk.first == chunk.last
        assert size + following > limit


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_equation_numbers_have_three_digits_or_more() -> None:
    assert number_lines("a\nb", first=999) == "[999]a\n[1000]b"
    assert number_lines("") == "[000]"


# -- programmers


def learned() -> tuple[LineProgrammer, list[Dirty], list[Dirty]]:
    rng = np.random.default_rng(1)
    verbs = ["returns", "computes", "keeps", "takes", "gives"]
    documents = []
    for i in range(90):
        lines = [
            f"{'    ' * int(rng.integers(2))}the method {rng.choice(verbs)} array {rng.integers(99)} of the input,"
            for _ in range(int(rng.integers(4, 12)))
        ]
        documents.append(Document(str(i), "\n".join(lines)))
    dirty = plant(documents, rng)
    model = LineProgrammer().fit([d.text for d in dirty[:60]], [parse_program(d.program)[0] for d in dirty[:60]])
    return model, dirty[:60], dirty[60:]


@pytest.fixture(scope="module")
def lines() -> tuple[LineProgrammer, list[Dirty], list[Dirty]]:
    return learned()


def test_learns_to_remove_lines_that_it_has_not_seen(lines: tuple[LineProgrammer, list[Dirty], list[Dirty]]) -> None:
    model, _, unseen = lines
    truth = [d.gone for d in unseen]
    found = [removed_lines(p, len(t)) for p, t in zip(model.predict([d.text for d in unseen]), truth, strict=True)]
    right = np.concatenate(truth) == np.concatenate(found)
    assert right.mean() > 0.97  # the commoner answer is right for about two thirds


def test_oracle_scores_are_those_of_the_features_that_were_fitted(
    lines: tuple[LineProgrammer, list[Dirty], list[Dirty]],
) -> None:
    model, seen, _ = lines
    texts = [seen[0].text, "", "\n", "é\n\nü §", seen[1].text.replace("\n", "\r\n"), "x", "\ud800"]
    sparse = model._features(texts) @ model.coef_.astype(np.float64) + model.intercept_
    np.testing.assert_allclose(model.decision_function(texts), sparse, atol=1e-4)
    # n-grams by hand: each line between newlines, all digits alike.
    joined = [f"\n{line}\n" for line in seen[0].text.split("\n")]
    counts = [sum(max(len(line) - n + 1, 0) for n in (2, 3, 4)) for line in joined]
    rows = np.diff(model._features([seen[0].text])[:, : 1 << model.bits].tocsr().indptr)
    distinct = [
        len({re.sub("[0-9]", "0", line[i : i + n]) for n in (2, 3, 4) for i in range(len(line) - n + 1)})
        for line in joined
    ]
    assert (rows <= distinct).all()
    assert (rows >= np.array(distinct) - 3).all()  # fewer only where two hashes meet
    assert np.allclose(model._features([seen[0].text])[:, : 1 << model.bits].sum(axis=1).A1, np.sqrt(counts), rtol=1e-5)


def test_property_a_program_does_not_depend_on_the_company(
    lines: tuple[LineProgrammer, list[Dirty], list[Dirty]],
) -> None:
    model, _, unseen = lines
    texts = [d.text for d in unseen]
    assert model.predict(texts) == [model.predict([text])[0] for text in texts]
    windows = [text.replace("\n", "\r\n") for text in texts]
    assert model.predict(windows) == model.predict(texts)


def test_property_a_saved_programmer_is_the_same(
    lines: tuple[LineProgrammer, list[Dirty], list[Dirty]], tmp_path: Path
) -> None:
    model, _, unseen = lines
    model.save(tmp_path)
    loaded = LineProgrammer.load(tmp_path)
    texts = [d.text for d in unseen]
    assert loaded.fingerprint == model.fingerprint
    assert np.array_equal(loaded.decision_function(texts), model.decision_function(texts))
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    (tmp_path / "lines.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match="later version"):
        LineProgrammer.load(tmp_path)


def test_degenerate_no_document_and_threshold(lines: tuple[LineProgrammer, list[Dirty], list[Dirty]]) -> None:
    model, _, unseen = lines
    assert model.predict([]) == []
    assert len(model.decision_function([])) == 0
    strict = copy.deepcopy(model).set_params(threshold=1 - 1e-9)
    assert not any(strict.predict([d.text for d in unseen[:5]]))
    assert strict.fingerprint != model.fingerprint


def test_rejects_what_nothing_is_learned_from() -> None:
    with pytest.raises(ValueError, match="every document needs a program; got 2 and 1"):
        LineProgrammer().fit(["a", "b"], [()])
    with pytest.raises(ValueError, match="remove 0 of 2 lines"):
        LineProgrammer().fit(["a\nb"], [()])


def scripted(
    doc: str = "keep_doc()", chunk: str | None = None, score: str = "education: 4\nformat: 3"
) -> ScriptedGenerator:
    """Drops lines that say "debris", told by the numbers in the prompt."""

    def clean(messages: Sequence[Message], rng: random.Random) -> str:
        found = re.findall(r"^\[(\d+)\].*debris", messages[-1].content, flags=re.MULTILINE)
        return "\n".join(f"remove_lines(line_start={n}, line_end={n})" for n in found) or "keep_chunk()"

    return ScriptedGenerator(
        {
            "doc": lambda m, rng: "drop_doc()" if "ADVERT" in m[-1].content else doc,
            "chunk": clean if chunk is None else lambda m, rng: chunk,
            "score": lambda m, rng: score,
        }
    )


def dirty_text(lines: int = 12) -> str:
    return "\n".join(f"debris {i}" if i % 3 == 0 else f"good line {i} with some words" for i in range(lines))


@pytest.mark.parametrize("limit", [12, 40, 1500])
def test_oracle_chunks_are_cleaned_one_by_one_and_run_once(tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
    programmer = ProgramGenerator(scripted(), tokenizer, max_chunk_tokens=limit)
    (written,) = programmer.programs([dirty_text()])
    assert written.errors == 0
    assert [op for op in written.program if op != KeepChunk()] == [RemoveLines(n, n) for n in (0, 3, 6, 9)]
    result = run_program(dirty_text(), written.program)
    assert result.text == "\n".join(line for line in dirty_text().split("\n") if "debris" not in line)
    assert written.prompt_tokens > 0 < written.completion_tokens


def test_property_a_dropped_document_is_not_asked_about_again(tokenizer: PreTrainedTokenizerBase) -> None:
    generator = scripted()
    seen: list[str] = []
    inner = generator.handlers["chunk"]
    generator.handlers["chunk"] = lambda m, rng: seen.append(m[-1].content) or inner(m, rng)  # type: ignore[func-returns-value]
    written = ProgramGenerator(generator, tokenizer).programs(["ADVERT " + TEXT, TEXT, "an ADVERT"])
    assert [DropDoc() in found.program for found in written] == [True, False, True]
    assert len(seen) == 1
    assert number_lines(TEXT) in seen[0]


def test_equation_operations_outside_their_chunk_or_level_are_errors(tokenizer: PreTrainedTokenizerBase) -> None:
    wrote = "remove_lines(line_start=1, line_end=2)\ndrop_doc()"
    programmer = ProgramGenerator(scripted(chunk=wrote), tokenizer, levels=("chunk",), max_chunk_tokens=1)
    (written,) = programmer.programs(["\n".join(LINES[:3])])
    # Chunks are lines 0, 1 and 2. The range misses the first and is cut in the others; drop_doc is wrong in all.
    assert written.program == (RemoveLines(1, 1), RemoveLines(2, 2))
    assert written.errors == 6
    back = ProgramGenerator(scripted(chunk="remove_lines(2, 1)"), tokenizer, levels=("chunk",))
    assert [(found.program, found.errors) for found in back.programs([TEXT])] == [((), 1)]
    (doc,) = ProgramGenerator(scripted(doc="keep_chunk()"), tokenizer, levels=("doc",)).programs([TEXT])
    assert (doc.program, doc.errors) == ((), 1)


def test_property_long_documents_are_cut_for_the_model_only(tokenizer: PreTrainedTokenizerBase) -> None:
    sizes: list[int] = []
    generator = scripted()
    generator.handlers["doc"] = lambda m, rng: sizes.append(tokens(tokenizer, m[-1].content)) or "keep_doc()"  # type: ignore[func-returns-value]
    programmer = ProgramGenerator(generator, tokenizer, levels=("doc",), max_doc_tokens=50, instruct=False)
    programmer.programs([TEXT, TEXT * 10])
    assert max(sizes) <= 51


def test_property_a_programmer_travels_and_its_settings_show(tokenizer: PreTrainedTokenizerBase) -> None:
    spec = HTTPSpec(base_url="http://localhost:1/v1", model="m")
    programmer = ProgramGenerator(spec, tokenizer)
    assert pickle.loads(pickle.dumps(programmer)).fingerprint == programmer.fingerprint
    assert ProgramGenerator(spec, tokenizer, levels=("doc",)).fingerprint != programmer.fingerprint
    assert ProgramGenerator(spec, tokenizer, instruct=False).fingerprint != programmer.fingerprint
    with pytest.raises(ValueError, match="levels must be of 'doc' and 'chunk'"):
        ProgramGenerator(spec, tokenizer, levels=())


def test_oracle_seed_annotations_become_conversations(tokenizer: PreTrainedTokenizerBase) -> None:
    documents = [Document("a", dirty_text()), Document("b", TEXT), Document("blank", " ")]
    annotated = annotate_seed(scripted(), documents, tokenizer)
    assert annotated["id"] == ["a", "b"]
    assert annotated["education"] == [4, 4]
    assert parse_program(annotated["program"][0]) == (tuple(RemoveLines(n, n) for n in (0, 3, 6, 9)), 0)
    rows = sft_dataset(annotated, tokenizer, max_chunk_tokens=60)
    answers = [m[-1]["content"] for m in rows["messages"]]
    assert answers.count("keep_doc()") == 2
    shown = [m[1]["content"] for m, level in zip(rows["messages"], rows["level"], strict=True) if level == "chunk"]
    for text, answer in zip(shown, [a for a in answers if a != "keep_doc()"], strict=True):
        numbers = [int(n) for n in re.findall(r"^\[(\d+)\]debris", text, flags=re.MULTILINE)]
        assert parse_program(answer)[0] == (tuple(RemoveLines(n, n) for n in numbers) or (KeepChunk(),))
    low = annotate_seed(scripted(score="Education - 1\nformat: 5"), documents[:1], tokenizer)
    assert low["program"] == ["drop_doc()"]
    assert sft_dataset(low, tokenizer)["messages"][0][-1]["content"] == "drop_doc()"
    assert len(annotate_seed(scripted(score="I cannot say"), documents, tokenizer)) == 0
    assert len(annotate_seed(scripted(chunk="no program"), documents, tokenizer)) == 0


# -- step and recipe


class Constant:
    """Writes one text for every document."""

    fingerprint = "constant"

    def __init__(self, text: str) -> None:
        self.text = text

    def programs(self, texts: Sequence[str]) -> list[Written]:
        assert all(text.strip() for text in texts)
        return [Written(self.text, *parse_program(self.text)) for _ in texts]


def test_property_the_step_says_what_became_of_every_document(tmp_path: Path) -> None:
    from datatrove.data import Document as Row

    rows = [Row(TEXT, "a"), Row("short", "b"), Row(" ", "c")]
    step = RunPrograms(Constant("remove_lines(0, 0)\nnormalize('line', 'row')"))
    kept = list(step.run(iter(rows)))
    assert [row.id for row in kept] == ["a"]
    assert kept[0].text == numbered(1, 2, 3, 4, 5).replace("line", "row")
    assert [row.metadata["program_status"] for row in rows] == ["refined", "dropped", "dropped"]
    assert rows[1].text == "short"
    assert step.filter(Row(" ", "c")) == (False, "empty")


@pytest.mark.parametrize("count", [99, 150])
def test_rejects_a_programmer_that_does_not_speak_the_language(tmp_path: Path, count: int) -> None:
    documents = write_documents([Document(str(i), f"{i} {TEXT}") for i in range(count)], tmp_path / "docs.arrow")
    step = RunPrograms(Constant("Sure!\nI removed it."))
    if count < 100:
        assert curate(documents, [step], tmp_path / "out", max_errors=0).steps[0].docs_out == count
        return
    with pytest.raises(RuntimeError, match="does not speak the language: 100 of 100") as raised:
        curate(documents, [step], tmp_path / "out", max_errors=0)
    assert isinstance(raised.value.__cause__, WrongLanguage)
    assert str(raised.value.__cause__).count("Sure!") == 5


@pytest.fixture(scope="module")
def finished(prox_fields: Fields, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    directory = tmp_path_factory.mktemp("prox") / "run"
    recipe = load_recipe({"method": "prox", **prox_fields, "sample_report": 2, "shard_documents": 100})
    return directory, execute(recipe, directory)


def test_oracle_the_table_of_programs_is_what_was_run(finished: tuple[Path, Result], prox_fields: Fields) -> None:
    directory, result = finished
    table = pq.read_table(directory / "programs.parquet").to_pylist()
    given = {
        row["id"]: row["text"] for row in map(json.loads, Path(prox_fields["sources"]["text"]).read_text().splitlines())
    }
    kept = {row["id"]: row for row in table if row["status"] in ("refined", "kept")}
    assert len(table) == result.metrics["docs_in"]
    assert len(kept) == result.metrics["docs_out"]
    texts = {i: run_program(given[i], parse_program(row["program"])[0]).text for i, row in kept.items()}
    assert sum(len(text.encode()) for text in texts.values()) == result.metrics["bytes_out"]
    assert not any("log in" in text for text in texts.values())
    ops = sum(len(parse_program(row["program"])[0]) for row in table)
    assert result.metrics["programs/remove_lines"] == pytest.approx(ops / len(table))
    assert sum(result.metrics[f"programs/{s}"] for s in ("refined", "kept", "dropped", "rejected")) == pytest.approx(1)
    assert result.metrics["programs/error_rate"] == 0


def test_property_the_report_shows_before_and_after(finished: tuple[Path, Result]) -> None:
    page = (finished[0] / "curation" / "report.html").read_text()
    assert "became" in page
    assert page.count("log in") >= 2
    assert "headwater curate" not in page
    assert LineProgrammer.load(finished[0] / "programmer").fingerprint


def test_oracle_a_generator_cleans_in_the_recipe(prox_fields: Fields, tmp_path: Path) -> None:
    def programs(messages: list[dict[str, str]]) -> str:
        shown = messages[-1]["content"]
        if "drop_doc" in messages[0]["content"]:
            return "keep_doc()"
        found = re.findall(r"^\[(\d+)\].*log in", shown, flags=re.MULTILINE)
        return "\n".join(f"remove_lines({int(n)}, {int(n)})" for n in found) or "keep_chunk()"

    with chat_server(programs) as server:
        fields = {"method": "prox", **prox_fields, "programmer": {"kind": "generator", "generator": server.spec}}
        metrics = execute(load_recipe(fields), tmp_path / "run").metrics
    assert metrics["programs/refined"] == 1
    assert metrics["generator_prompt_tokens"] == 100 * len(server.asked)
    assert metrics["bytes_out"] < metrics["bytes_in"]


@pytest.mark.parametrize(
    ("program", "words"),
    [(None, "no column 'program'"), ("remove it", "cannot be read"), ("keep_chunk()", "remove 0 of")],
)
def test_rejects_annotations_that_teach_nothing(
    prox_fields: Fields, tmp_path: Path, program: str | None, words: str
) -> None:
    rows = [{"id": str(i), "text": f"{i} {TEXT}"} | ({} if program is None else {"program": program}) for i in range(3)]
    path = tmp_path / "annotations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {**prox_fields, "programmer": {"kind": "lines", "annotations": str(path)}}
    with pytest.raises(CorpusError, match=words):
        execute(load_recipe({"method": "prox", **fields}), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"programmer": {"kind": "lines"}}, "annotations"),
        ({"programmer": {"kind": "poet"}}, "programmer"),
        ({"limits": {"max_errors": 0}}, "max_errors"),
        ({"limits": {"drop_ratio": 1.5}}, "drop_ratio"),
    ],
)
def test_rejects_when_built(prox_fields: Fields, changes: Fields, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe({"method": "prox", **prox_fields, **changes})


def test_rejects_levels_out_of_order(prox_fields: Fields) -> None:
    server = {"kind": "http", "base_url": "http://localhost:1/v1", "model": "m"}
    written = {"kind": "generator", "generator": server, "levels": ["chunk", "doc"]}
    with pytest.raises(RecipeError, match=r"levels must be \[doc\], \[chunk\] or \[doc, chunk\]"):
        load_recipe({"method": "prox", **prox_fields, "programmer": written})


# -- the claim's debris and rules


def test_property_half_of_the_debris_passes_rules_tuned_against_it() -> None:
    rng = np.random.default_rng(0)
    clean = [
        Document(str(i), "\n".join(f"the value of that is {i + j} and more of it," for j in range(9)))
        for i in range(60)
    ]
    rules = tuned_rules(plant(clean, rng))
    debris = [debris_line(rng) for _ in range(2000)]
    phrases = [line for line in debris if re.fullmatch(r"[A-Za-z ,]+[.!]", line)]
    kept = [line for line in phrases if rules.apply([f"{clean[0].text}\n{line}"])[0].count("\n") == 9]
    assert 0.45 < len(phrases) / len(debris) < 0.55
    assert len(kept) > 0.95 * len(phrases)


def test_oracle_vectorised_rules_are_the_rules_line_by_line() -> None:
    rules = Rules(True, 3, 0.7, 12, 4, 0.5, (3.0, 10.0), 1)
    keep = "this line stays and has the words."
    texts = [f"{keep}\nno end\nab cd.\n\nuse cookies of the site.\n%%% ### 123 456.\nsupercalifragilistic of it all."]
    assert rules.apply(texts) == [f"{keep}\n"]
    assert rules.apply([*texts, "x y z", keep])[1:] == ["", keep]


def test_oracle_annotations_of_the_fixture_are_true() -> None:
    for row in prox_annotations(20):
        assert "log in" not in run_program(row["text"], parse_program(row["program"])[0]).text
