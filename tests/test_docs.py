"""What the documentation shows runs, and what it says of the catalogue is so."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from headwater.core.catalogue import Catalogue

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPETS = [
    (page, number, code)
    for page in PAGES
    if "methods" not in page.parts
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]
EXAMPLES = [
    ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
    for path in sorted((ROOT / "src").rglob("*.py"))
    if re.search(r"^ +>>> ", path.read_text(encoding="utf-8"), re.MULTILINE)
]


@pytest.mark.parametrize(("page", "number", "code"), SNIPPETS, ids=[f"{p.stem}-{n}" for p, n, _ in SNIPPETS])
def test_property_every_snippet_runs(page: Path, number: int, code: str) -> None:
    exec(compile(code, f"{page.name}, snippet {number}", "exec"), {"__name__": "snippet"})  # our own documentation


@pytest.mark.parametrize("module", EXAMPLES)
def test_property_every_example_in_a_docstring_runs(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted > 0
    assert found.failed == 0


def test_property_the_readme_lists_the_catalogue() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_property_every_dependency_is_justified() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    for requirement in project["dependencies"]:
        assert re.split(r"[\[>=<]", requirement)[0].lower() in text.lower(), f"{requirement} has no line"
    for extra in project["optional-dependencies"]:
        assert f"`{extra}`" in text or extra in ("all", "tables"), f"extra {extra} has no line"


def test_property_every_link_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http", "mailto")) and "methods" not in page.parts and "methods/" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_property_published_verdicts_are_of_methods_and_current_fields() -> None:
    import json

    for path in (ROOT / "evidence").glob("*.json"):
        id, scale, _ = path.name.split(".")
        verdict = json.loads(path.read_text(encoding="utf-8"))
        assert (verdict["id"], verdict["scale"]) == (id, scale)
        assert Catalogue.load()[id].kind == "method"
        assert verdict["verdict"] in ("holds", "does not hold", "inconclusive")
