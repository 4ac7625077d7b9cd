"""Reading merge configurations written for mergekit: the part of its YAML that names one merge of whole models.

Read are ``merge_method`` (linear, task_arithmetic, ties, dare_linear, slerp), ``models``, ``base_model``,
``parameters`` (``weight``, ``density``, ``normalize``, ``lambda``, ``t``), ``dtype`` and ``out_dtype``. Any other key
changes the result in a way that is not read here, and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headwater.core.recipe import RecipeError
from headwater.core.yamlio import read_yaml

__all__ = ["read_mergekit"]

_METHODS = {
    "linear": "linear",
    "task_arithmetic": "task_arithmetic",
    "ties": "ties",
    "dare_linear": "dare",
    "slerp": "slerp",
}
_DTYPES = ("float32", "bfloat16", "float16")


def read_mergekit(path: Path) -> dict[str, Any]:  # Any: fields of a recipe, as YAML gives them
    """Fields of an ``instruction_vector`` recipe that does what a mergekit configuration says; add ``suites``.

    Models are named ``base``, ``part0``, ``part1``... in the order of the file. Arithmetic is always in float32 or
    wider, so ``dtype`` says only what is written.

    Raises:
        RecipeError: a key, method or value that is not read here, or a model without a weight.
        YamlError: the file is not plain YAML.
        FileNotFoundError: no such file.
    """
    data = read_yaml(path)
    top = _only(data, {"merge_method", "models", "base_model", "parameters", "dtype", "out_dtype"}, str(path))
    name = top.get("merge_method")
    if name not in _METHODS:
        raise RecipeError(f"{path}: merge_method must be one of {', '.join(_METHODS)}; got {name!r}.")
    method = _METHODS[name]
    known = {"t"} if method == "slerp" else {"weight", "density", "normalize", "lambda"}
    shared = _only(top.get("parameters") or {}, known, f"{path}: parameters")
    entries = [_entry(entry, f"{path}: models.{i}") for i, entry in enumerate(top.get("models") or [])]
    base = top.get("base_model") or (entries[0][0] if entries and method == "linear" else None)
    if not isinstance(base, str) or not entries:
        raise RecipeError(f"{path}: `models` and `base_model` are needed.")
    if method == "slerp":
        return _slerp(path, base, [model for model, _ in entries], shared) | _dtype(path, top)
    if method != "linear":
        # There the base stands in the list by custom, and its difference from itself is zero.
        entries = [(model, own) for model, own in entries if model != base]
    models, weights, density = {"base": base}, {}, {}
    for model, own in entries:
        role = "base" if model == base else f"part{len(models) - 1}"
        models[role] = model
        weights[role] = _number({**shared, **own}, "weight", None, f"{path}: {model}")
        density[role] = _number({**shared, **own}, "density", 1.0, f"{path}: {model}")
    if len(weights) < len(entries):
        raise RecipeError(f"{path}: a model is listed twice.")
    normalize = shared.get("normalize", method in ("linear", "ties"))
    if not isinstance(normalize, bool):
        raise RecipeError(f"{path}: parameters.normalize must be true or false; got {normalize!r}.")
    fields = {"models": models, "weights": weights, "merge": method, "density": density, "normalize": normalize}
    return fields | {"scale": _number(shared, "lambda", 1.0, f"{path}: parameters")} | _dtype(path, top)


def _only(data: Any, known: set[str], where: str) -> dict[str, Any]:  # Any: YAML data
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: expected a mapping; got {type(data).__name__}.")
    if unknown := sorted(set(map(str, data)) - known):
        raise RecipeError(f"{where}: {unknown[0]!r} is not read here; read are {', '.join(sorted(known))}.")
    return dict(data)


def _entry(entry: Any, where: str) -> tuple[str, dict[str, Any]]:  # Any: YAML data
    found = _only(entry, {"model", "parameters"}, where)
    if not isinstance(found.get("model"), str):
        raise RecipeError(f"{where}: `model` must be a name or a path; got {found.get('model')!r}.")
    return found["model"], _only(found.get("parameters") or {}, {"weight", "density"}, f"{where}.parameters")


def _number(parameters: Mapping[str, Any], key: str, default: float | None, where: str) -> float:
    value = parameters.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RecipeError(f"{where}: {key} must be one number (values by layer are not read here); got {value!r}.")
    return float(value)


def _slerp(path: Path, base: str, models: list[str], shared: Mapping[str, Any]) -> dict[str, Any]:
    others = [model for model in models if model != base]
    if len(models) > 2 or len(others) != 1:
        raise RecipeError(f"{path}: slerp goes from base_model to one other model; got {', '.join(models)}.")
    t = _number(shared, "t", None, f"{path}: parameters")
    if not 0 <= t <= 1:
        raise RecipeError(f"{path}: parameters.t must be in [0, 1]; got {t}.")
    return {"models": {"base": base, "part0": others[0]}, "weights": {"base": 1 - t, "part0": t}, "merge": "slerp"}


def _dtype(path: Path, top: Mapping[str, Any]) -> dict[str, str]:
    dtype = top.get("out_dtype") or top.get("dtype")
    if dtype is not None and dtype not in _DTYPES:
        raise RecipeError(f"{path}: dtype must be one of {', '.join(_DTYPES)}; got {dtype!r}.")
    return {} if dtype is None else {"out_dtype": dtype}
