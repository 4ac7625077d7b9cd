"""What every method of the catalogue owes its users, whatever it does."""

from __future__ import annotations

import importlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from headwater.core.catalogue import Catalogue, Entry
from headwater.core.claim import Claim
from headwater.core.recipe import Recipe, RecipeError, load_recipe, recipe_data, validate
from headwater.core.run import Result, Run, execute
from headwater.core.yamlio import load_yaml
from tests.settings import setting

CATALOGUE = Catalogue.load()
every_recipe = pytest.mark.parametrize("entry", CATALOGUE.values(), ids=lambda entry: entry.id)
every_method = pytest.mark.parametrize("entry", CATALOGUE.methods, ids=lambda entry: entry.id)


def fields_of(entry: Entry, request: pytest.FixtureRequest) -> dict[str, Any]:
    chosen = setting(entry.stage, entry.id)
    return {"method": entry.id, **request.getfixturevalue(chosen.fixture), **chosen.extra.get(entry.id, {})}


def described_models(cls: type[BaseModel], seen: set[type[BaseModel]]) -> set[type[BaseModel]]:
    """A recipe class and every model that its fields lead to."""
    seen.add(cls)
    for field in cls.model_fields.values():
        for part in _types(field.annotation):
            if part not in seen:
                described_models(part, seen)
    return seen


def _types(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in getattr(annotation, "__args__", ()) for found in _types(argument)]


def comparable(result: Result) -> dict[str, float]:
    """The metrics without what a clock measured."""
    clock = ("seconds", "_ms", "bytes", "per_1k")
    return {name: value for name, value in result.metrics.items() if not any(word in name for word in clock)}


# -- what is written down


@every_recipe
def test_property_the_entry_and_the_recipe_agree(entry: Entry) -> None:
    cls = entry.recipe_class()
    assert issubclass(cls, Recipe)
    assert cls.id == entry.id
    assert not getattr(cls, "__abstractmethods__", None)
    assert entry.summary.endswith(".")
    assert entry.needs
    assert entry.gives
    assert entry.modality
    assert len(cls.__mro__) - len(Recipe.__mro__) <= 4, "at most Recipe -> stage -> family -> narrower one -> method"


@every_method
def test_property_the_method_names_its_source(entry: Entry) -> None:
    assert entry.number > 0
    assert entry.year >= 2015
    assert entry.arxiv or entry.doi
    assert "Source:" in entry.docstring, "the module docstring names the paper"
    assert entry.arxiv in entry.docstring or entry.doi in entry.docstring
    assert "Differs:" in entry.docstring, "and says where we differ, or that we do not"
    assert entry.bibtex().startswith("@misc{")


@every_recipe
def test_property_every_field_is_described_and_bounded(entry: Entry) -> None:
    for cls in described_models(entry.recipe_class(), set()):
        for name, field in cls.model_fields.items():
            assert field.description, f"{cls.__name__}.{name} has no description"
            numeric = field.annotation in (int, float, int | None, float | None)
            if numeric:
                bounds = [m for m in field.metadata if any(hasattr(m, b) for b in ("gt", "ge", "lt", "le"))]
                assert bounds or name in ("forgetting_limit",), f"{cls.__name__}.{name} has no bound"


@every_recipe
def test_oracle_round_trip_through_yaml_and_json(entry: Entry, request: pytest.FixtureRequest) -> None:
    recipe = load_recipe(fields_of(entry, request))
    assert load_recipe(load_yaml(recipe.to_yaml())) == recipe
    assert load_recipe(json.loads(json.dumps(recipe_data(recipe)))).hash() == recipe.hash()


@every_recipe
def test_rejects_an_unknown_field_with_the_nearest_name(entry: Entry, request: pytest.FixtureRequest) -> None:
    with pytest.raises(RecipeError, match=r"unknown field 'sede'. Did you mean 'seed'\?"):
        load_recipe({**fields_of(entry, request), "sede": 1})


@every_recipe
def test_rejects_a_mutated_value_in_every_field_by_its_path(entry: Entry, request: pytest.FixtureRequest) -> None:
    data = recipe_data(load_recipe(fields_of(entry, request)))
    for name in entry.recipe_class().model_fields:
        for wrong in ({"no such": ["deep"]}, [["nested"]]):
            with pytest.raises(RecipeError, match=name):
                load_recipe({**data, name: wrong})


@every_recipe
def test_property_the_explained_recipe_names_every_field(entry: Entry) -> None:
    from headwater.core.explain import explained_recipe

    cls = entry.recipe_class()
    parsed = load_yaml(explained_recipe(entry))
    assert parsed.pop("method") == entry.id
    assert set(parsed) == set(cls.model_fields)
    defaults = {name: value for name, value in parsed.items() if not cls.model_fields[name].is_required()}
    with pytest.raises(RecipeError, match=r"required|Value|field|needs|give") if _has_required(cls) else nullcontext():
        validate(cls, defaults, where="defaults")


def _has_required(cls: type[BaseModel]) -> bool:
    return any(field.is_required() for field in cls.model_fields.values())


@every_method
def test_property_the_claim_is_whole(entry: Entry) -> None:
    claim = importlib.import_module(entry.claim_module).CLAIM
    assert isinstance(claim, Claim)
    assert claim.id == entry.id
    assert {"smoke", "small"} <= set(claim.seeds)
    assert len(claim.seeds["small"]) >= 3
    assert claim.parts[0].decides
    assert claim.preconditions
    assert len(entry.source.read_text(encoding="utf-8").splitlines()) <= 700


# -- what it does


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Result]]:
    """Finished runs by method, made on first use and shared by the tests below."""
    return {}


def finished(entry: Entry, request: pytest.FixtureRequest) -> tuple[Path, Result]:
    runs: dict[str, tuple[Path, Result]] = request.getfixturevalue("uninterrupted")
    if entry.id not in runs:
        directory = request.getfixturevalue("tmp_path_factory").mktemp(entry.id) / "run"
        runs[entry.id] = directory, execute(load_recipe(fields_of(entry, request)), directory)
    return runs[entry.id]


@every_recipe
def test_property_another_seed_another_result(entry: Entry, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    _, first = finished(entry, request)
    other = execute(load_recipe({**fields_of(entry, request), "seed": 7}), tmp_path / "other")
    assert (comparable(other) != comparable(first)) == (entry.id not in setting(entry.stage, entry.id).unseeded)


@every_recipe
def test_fault_resume_equals_uninterrupted(
    entry: Entry, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run of the same seed, stopped and resumed, so it is also that the same seed gives the same result."""
    _, whole = finished(entry, request)
    recipe = load_recipe(fields_of(entry, request))
    for after in (2, 0):  # every run writes a file of its own; whether it writes a third depends on the method
        directory = tmp_path / f"run-{after}"
        with monkeypatch.context() as patch:
            _fail_after(patch, after)
            try:
                execute(recipe, directory)
            except OSError:
                break
    else:
        pytest.fail("no write failed")
    resumed = execute(recipe, directory, resume=True)
    assert comparable(resumed) == comparable(whole)


def _fail_after(patch: pytest.MonkeyPatch, writes: int) -> None:
    """Let the run's own files be written so many times, then run out of disk (``result.json`` included)."""
    left = [writes]

    def failing(original: Any) -> Any:
        def write(self: Run, *args: Any, **kwargs: Any) -> Any:
            if args[0] == "environment.json" or (left[0] <= 0 and args[0] == "result.json"):
                return original(self, *args, **kwargs)
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "no space left on device")
            return original(self, *args, **kwargs)

        return write

    patch.setattr(Run, "write_json", failing(Run.write_json))
    patch.setattr(Run, "log", failing(Run.log))


@every_recipe
def test_property_what_it_saves_opens_without_us(entry: Entry, request: pytest.FixtureRequest) -> None:
    directory, _ = finished(entry, request)
    model = directory / "model"
    assert (model / "README.md").read_text(encoding="utf-8").strip()
    assert not [path for path in directory.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pickle", ".joblib")]
    for path in model.rglob("*.json"):
        assert "headwater." not in path.read_text(encoding="utf-8").replace("headwater.json", ""), (
            f"{path} names our code"
        )
    setting(entry.stage, entry.id).opens(model)


@every_recipe
def test_property_the_run_directory_is_whole(entry: Entry, request: pytest.FixtureRequest) -> None:
    directory, result = finished(entry, request)
    for name in ("recipe.yaml", "environment.json", "result.json", "log.txt"):
        assert (directory / name).exists()
    assert load_recipe(directory / "recipe.yaml") == load_recipe(fields_of(entry, request))
    assert result.status == "done"
    assert all(np.isfinite(value) for value in result.metrics.values())
    assert result.data, "the data read are fingerprinted"
    environment = json.loads((directory / "environment.json").read_text(encoding="utf-8"))
    assert environment["data"] == result.data
    assert environment["packages"]["headwater"]
