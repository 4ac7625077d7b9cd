"""The catalogue: entries, search, other packages, staleness."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from headwater.core import catalogue as module
from headwater.core.advise import advise
from headwater.core.catalogue import Catalogue, CatalogueError, parse_entry

ENTRY: dict[str, Any] = {
    "stage": "domain", "title": "T", "short": "S", "summary": "Does it.", "modality": ["text"], "needs": ["labels"],
    "gives": ["model"], "cost": "minutes", "module": "pkg.domain.x", "recipe": "X",
}  # fmt: skip


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("forgetting continued pretraining subset epochs", "stability_gap"),
        ("merge instruction tuned model without instructions", "instruction_vector"),
        ("nearest mean class incremental", "nmc"),
    ],
)
def test_property_search_ranks_the_method_that_is_meant_first(query: str, first: str) -> None:
    assert next(e.id for e in Catalogue.load().search(query) if e.kind == "method") == first


def test_degenerate_searches() -> None:
    assert Catalogue.load().search("zzzzqq") == []
    with pytest.raises(CatalogueError, match="nothing to search for"):
        Catalogue.load().search("!!")


@pytest.mark.parametrize(
    ("id", "changes", "words"),
    [
        ("Bad-Id", {}, "must be lower-case"),
        ("../up", {}, "must be lower-case"),
        ("x", {"stage": "nowhere"}, "stage must be one of corpora"),
        ("x", {"cost": "cheap"}, "cost must be one of"),
        ("x", {"colour": "red"}, "unknown field 'colour'"),
    ],
)
def test_rejects_malformed_entries(id: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CatalogueError, match=words):
        parse_entry(id, {**ENTRY, **changes})


def test_rejects_a_missing_field_and_an_unknown_id() -> None:
    with pytest.raises(CatalogueError, match="'title'"):
        parse_entry("x", {k: v for k, v in ENTRY.items() if k != "title"})
    with pytest.raises(CatalogueError, match="Did you mean 'plain'"):
        Catalogue.load()["plian"]


def test_property_another_package_adds_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "othermethods"
    package.mkdir()
    (package / "__init__.py").write_text("")
    lines = "\n".join(f"{k} = {json.dumps(v)}" for k, v in ENTRY.items())
    (package / "catalogue.toml").write_text(f"[theirs]\n{lines}\n")
    info = tmp_path / "othermethods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: othermethods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[headwater.catalogue]\nmine = othermethods\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    Catalogue.load.cache_clear()
    try:
        assert Catalogue.load()["theirs"].module == "pkg.domain.x"
        (package / "catalogue.toml").write_text(f"[plain]\n{lines}\n")
        Catalogue.load.cache_clear()
        with pytest.raises(CatalogueError, match="'plain' is taken"):
            Catalogue.load()
    finally:
        Catalogue.load.cache_clear()


@pytest.mark.parametrize("name", ["p-1.0.dist-info", "p.egg-info", "EGG-INFO", "archive.zip", "finder", "nothing"])
def test_oracle_packages_are_announced_wherever_importlib_would_find_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "p.egg" if name == "EGG-INFO" else tmp_path
    text = "[headwater.catalogue]\nmine = othermethods\n"
    if name == "archive.zip":
        place = tmp_path / name
        with ZipFile(place, "w") as archive:
            archive.writestr("p-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: p\nVersion: 1.0\n")
            archive.writestr("p-1.0.dist-info/entry_points.txt", text)
    elif name == "finder":
        monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Elsewhere()])
    else:
        info = place / name
        info.mkdir(parents=True)
        (info / ("METADATA" if "dist" in name else "PKG-INFO")).write_text("Name: p\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(text if name != "nothing" else "[console_scripts]\nx = y:z\n")
    monkeypatch.setattr(sys, "path", [str(place)])
    found = [point.value for point in metadata.entry_points(group="headwater.catalogue")]
    assert found == ([] if name == "nothing" else ["othermethods"])
    assert module._other_packages() == found


class Elsewhere:
    """An importer with distributions of its own, as importlib.metadata allows."""

    def find_spec(self, *_: object) -> None:
        return None

    def find_distributions(self, _: object) -> list[metadata.Distribution]:
        class Distribution(metadata.Distribution):
            def read_text(self, filename: str) -> str | None:
                texts = {
                    "METADATA": "Name: p\nVersion: 1.0\n",
                    "entry_points.txt": "[headwater.catalogue]\nmine = othermethods\n",
                }
                return texts.get(filename)

            def locate_file(self, path: object) -> Path:
                return Path(str(path))

        return [Distribution()]


def test_property_evidence_goes_stale_with_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Catalogue.load()["stability_gap"]
    monkeypatch.setattr(module, "_evidence_directories", lambda: [tmp_path])
    verdict = {"scale": "small", "verdict": "holds", "code_hash": entry.code_hash(), "statement": "s"}
    (tmp_path / "stability_gap.small.json").write_text(json.dumps(verdict))
    assert [e.stale for e in entry.evidence()] == [False]
    (tmp_path / "stability_gap.small.json").write_text(json.dumps({**verdict, "code_hash": "0" * 16}))
    assert [e.stale for e in entry.evidence()] == [True]


def test_property_advice_needs_only_what_is_there() -> None:
    catalogue = Catalogue.load()
    have = ["base model", "domain text", "general text"]
    found = advise(catalogue, have)
    assert "stability_gap" in {item.id for item in found}
    assert all(set(item.needs) <= set(have) for item in found)
    assert advise(catalogue, []) == []
    with pytest.raises(ValueError, match="Did you mean 'domain text'"):
        advise(catalogue, ["domain texts"])
