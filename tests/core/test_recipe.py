"""Recipes as data: reading, refusing, overriding, hashing, pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.core.recipe import (
    CorpusRef,
    ModelRef,
    Pipeline,
    RecipeError,
    apply_overrides,
    load_recipe,
    recipe_data,
    validate,
)
from headwater.core.yamlio import YamlError, dump_yaml, load_yaml, read_yaml

PLAIN: dict[str, Any] = {
    "method": "plain",
    "model": "org/base",
    "domain": "texts.jsonl",
    "budget": {"tokens": 1_000_000},
}

plain_data = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3),
    max_leaves=10,
)


@given(plain_data)
def test_property_yaml_reads_back_what_it_wrote(data: Any) -> None:
    assert load_yaml(dump_yaml({"data": data})) == {"data": data}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2e6", 2e6),
        ("-1.5E+3", -1500.0),
        ("2_000", 2000),
        ("no", "no"),
        ("2020-01-01", "2020-01-01"),
        ("true", True),
        (".5", 0.5),
    ],
)
def test_equation_yaml_scalars_mean_what_a_reader_thinks(text: str, value: Any) -> None:
    found = load_yaml(f"x: {text}")["x"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!custom {}"])
def test_rejects_yaml_tags_that_construct_objects(tag: str) -> None:
    with pytest.raises(YamlError, match="Only plain data is read"):
        load_yaml(f"x: {tag}")


def test_rejects_a_key_given_twice() -> None:
    with pytest.raises(YamlError, match="'a' is given twice"):
        load_yaml("a: 1\nb: 2\na: 3")


def test_rejects_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="headwater init ID"):
        read_yaml(tmp_path / "none.yaml")


def test_property_numbers_in_yaml_reach_their_types() -> None:
    recipe = load_recipe({**PLAIN, "budget": load_yaml("{tokens: 2e6}"), "optim": load_yaml("{lr: 1e-3}")})
    assert recipe.budget.tokens == 2_000_000  # type: ignore[attr-defined]
    assert recipe.optim.lr == 1e-3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "plane"}, "no method 'plane'. Did you mean 'plain'"),
        ({"method": None}, "`method` is missing"),
        ({"modle": "x"}, "unknown field 'modle'. Did you mean 'model'"),
        ({"optim": {"learning_rat": 1}}, r"unknown field 'optim.learning_rat'"),
        ({"budget": {"tokens": 5, "steps": 5}}, "exactly one of steps, tokens, flops, seconds"),
        ({"seed": "0"}, "field 'seed': .*valid integer; got '0'"),
        ({"seed": -1}, "field 'seed': .*greater than or equal to 0; got -1"),
        ({"held_out": True}, "field 'held_out': .*valid number; got True"),
        ({"lora": {"r": 0}}, "field 'lora.r': .*greater than 0; got 0"),
    ],
)
def test_rejects_with_the_path_and_what_was_found(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_recipe({**PLAIN, **changes})


def test_rejects_in_python_with_the_same_words() -> None:
    with pytest.raises(RecipeError, match=r"unknown field 'revison'. Did you mean 'revision'"):
        ModelRef(name="a", revison="b")
    with pytest.raises(RecipeError, match="field 'name' is required"):
        CorpusRef()


def test_property_recipes_are_frozen_and_hash_by_content() -> None:
    recipe = load_recipe(PLAIN)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3
    assert load_recipe({**PLAIN, "seed": 0}).hash() == recipe.hash()
    assert load_recipe({**PLAIN, "model": {"name": "org/base"}}).hash() == recipe.hash()
    assert load_recipe({**PLAIN, "seed": 1}).hash() != recipe.hash()
    assert load_recipe({**PLAIN, "method": "frozen"}).hash() != recipe.hash()


def test_property_overrides_reach_nested_fields_and_lists() -> None:
    data = {"optim": {"lr": 1}, "steps": [{"seed": 1}], "model": "a"}
    changed = apply_overrides(data, ["optim.lr=1e-3", "steps.0.seed=5", "model.revision=main", "new.deep=[1, 2]"])
    assert changed == {
        "optim": {"lr": 1e-3},
        "steps": [{"seed": 5}],
        "model": {"name": "a", "revision": "main"},
        "new": {"deep": [1, 2]},
    }
    assert data["optim"] == {"lr": 1}


@pytest.mark.parametrize("override", ["noequals", "=3", "steps.9.seed=1", "steps.x=1", "seed.deep=1"])
def test_rejects_overrides_that_lead_nowhere(override: str) -> None:
    with pytest.raises(RecipeError, match="override"):
        apply_overrides({"steps": [{}], "seed": 3}, [override])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("headwater:demo-base", "builtin"),
        ("org/model", "hub"),
        ("./local", "local"),
        ("/abs/path", "local"),
        ("previous", "previous"),
        ("steps.2/model", "previous"),
    ],
)
def test_property_references_know_where_they_point(name: str, kind: str) -> None:
    assert ModelRef(name=name).kind == kind


@pytest.mark.parametrize("name", ["headwater:", "headwater:../x", "headwater:a/../b", "headwater:a b"])
def test_rejects_builtin_names_that_are_paths(name: str) -> None:
    with pytest.raises(RecipeError, match="is no builtin name"):
        ModelRef(name=name)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".ckpt"])
def test_rejects_pickles_offered_as_models(suffix: str) -> None:
    with pytest.raises(RecipeError, match="is a pickle"):
        ModelRef(name=f"model{suffix}")


def test_property_a_pipeline_starts_each_step_from_the_one_before(
    domain_fields: dict[str, Any], tmp_path: Path
) -> None:
    from headwater.core.run import execute

    short = {**domain_fields, "budget": {"steps": 4}}
    pipeline = load_recipe(
        {
            "method": "pipeline",
            "steps": [
                {"method": "plain", **short},
                {"method": "plain", **short, "model": "previous", "seed": 1},
                {"method": "plain", **short, "model": "steps.0", "seed": 2},
            ],
        }
    )
    result = execute(pipeline, tmp_path / "run")
    first, second, third = (
        json.loads((tmp_path / "run" / f"0{i}-plain" / "result.json").read_text())["metrics"] for i in range(3)
    )
    assert second["domain/bpb_start"] == pytest.approx(first["domain/bpb"], rel=1e-6)
    assert third["domain/bpb_start"] == second["domain/bpb_start"]
    assert result.metrics["01-plain/domain/bpb"] == second["domain/bpb"]
    assert isinstance(pipeline, Pipeline)
    assert load_recipe(load_yaml(pipeline.to_yaml())) == pipeline


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([], "steps"),
        ([{"method": "plain", "model": "previous"}], r"steps.0"),
        ([{"method": "pipeline", "steps": []}], "steps"),
        ([{**PLAIN, "model": "previous"}], "nothing comes before the first step"),
        ([PLAIN, {**PLAIN, "model": "steps.1"}], r"steps.1: steps.1 does not come before it"),
        ([{**PLAIN, "model": "steps.0/model"}], r"steps.0: steps.0 does not come before it"),
    ],
)
def test_rejects_pipelines_that_cannot_run(steps: list[Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe({"method": "pipeline", "steps": steps})


def test_rejects_a_pipeline_path_out_of_the_previous_run(domain_fields: dict[str, Any], tmp_path: Path) -> None:
    from headwater.core.recipe import _with_directories

    for word in ("previous", "steps.0"):
        with pytest.raises(RecipeError, match="leads out of the run directory"):
            _with_directories({"domain": f"{word}/../../secrets"}, [tmp_path])


def test_oracle_the_json_schema_accepts_what_the_recipe_accepts() -> None:
    schema = type(load_recipe(PLAIN)).model_json_schema()
    assert schema["additionalProperties"] is False
    assert set(recipe_data(load_recipe(PLAIN))) - {"method"} == set(schema["properties"])


def test_rejects_data_that_is_not_plain() -> None:
    with pytest.raises(RecipeError, match="not plain data"):
        validate(ModelRef, {"name": object()}, where="here")
