"""What may import what, and what the light commands must not import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import headwater
from headwater.core.catalogue import STAGES

ROOT = Path(headwater.__file__).parent
LAYERS = {"core": 0, "modalities": 1, **dict.fromkeys(STAGES, 2), "claims": 3, "cli": 4, "__main__": 5}
HEAVY = ("torch", "transformers", "sklearn", "accelerate", "pandas", "scipy", "matplotlib")


def imports_of(path: Path) -> set[str]:
    """Modules of headwater that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in found if name.startswith("headwater.")}


def layer(module: str) -> int:
    """Where a module stands; higher may import lower."""
    return LAYERS[module.split(".")[1]]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_property_imports_run_one_way(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts == ("__init__",):
        assert not imports_of(path)
        return
    own = layer("headwater." + parts[0])
    upward = sorted(name for name in imports_of(path) if layer(name) > own)
    assert not upward, f"{path.relative_to(ROOT)} imports from above: {upward}"


def test_property_methods_import_only_methods_they_build_on() -> None:
    # A method may use its own stage; another stage only where its paper builds on that stage's method.
    allowed: set[tuple[str, str]] = set()
    for path in ROOT.rglob("*.py"):
        stage = path.relative_to(ROOT).parts[0]
        if stage in STAGES:
            for name in imports_of(path):
                other = name.split(".")[1]
                assert other not in STAGES or other == stage or (stage, name) in allowed, f"{path} imports {name}"


@pytest.mark.parametrize(
    "code",
    [
        "import headwater",
        "import headwater.cli",
        "from headwater.core.catalogue import Catalogue; [e.to_dict() for e in Catalogue.load().values()]",
        "from typer.testing import CliRunner; from headwater.cli import app; "
        "assert CliRunner().invoke(app, ['methods']).exit_code == 0",
        "import headwater.core.recipe, headwater.core.run, headwater.core.budget, headwater.core.compare",
    ],
)
def test_property_light_code_imports_nothing_heavy(code: str) -> None:
    heavy = HEAVY if "compare" not in code else ("torch", "transformers", "sklearn", "accelerate")
    check = f"import sys; {code}; loaded = [m for m in {heavy!r} if m in sys.modules]; assert not loaded, loaded"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "unused"),
    [
        ("--help", ("pydantic", "importlib.metadata", "tomllib")),
        ("methods", ("pydantic", "importlib.metadata")),
    ],
)
def test_property_the_command_line_answers_without_what_it_does_not_use(words: str, unused: tuple[str, ...]) -> None:
    # -I and -S: what this environment itself imports at start does not count.
    paths = [str(ROOT.parent), *(path for path in sys.path if path)]
    check = (
        f"import sys; sys.path[:0] = {paths!r}; sys.argv = ['headwater', {words!r}]\n"
        "from headwater.cli import app\n"
        "try:\n    app()\nexcept SystemExit as done:\n    assert done.code == 0\n"
        f"loaded = [m for m in {unused!r} if m in sys.modules]; assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_property_no_pickle_and_no_global_seeding() -> None:
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        assert not imported & {"pickle", "joblib", "dill", "marshal", "shelve"}, f"{path} imports {imported}"
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not called & {"np.random.seed", "numpy.random.seed", "random.seed", "torch.load"}, (
            f"{path} calls {called}"
        )
