"""Recipes: a method as data. Written as YAML, overridden on the command line, hashed, run.

A recipe is a frozen pydantic model. Its YAML form is its fields plus ``method``, the id in the catalogue::

    method: plain
    model: Qwen/Qwen3-0.6B
    domain: ./handbook/
    budget: {tokens: 2_000_000}
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from headwater.core.yamlio import dump_yaml, load_yaml, read_yaml

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = [
    "CorpusRef",
    "DataRef",
    "Metrics",
    "ModelRef",
    "Name",
    "Pipeline",
    "Recipe",
    "RecipeError",
    "Spec",
    "apply_overrides",
    "load_recipe",
    "recipe_data",
    "validate",
]

_STEP = re.compile(r"steps\.(\d+)")  # an earlier step of a pipeline

T = TypeVar("T", bound=BaseModel)

Metrics = dict[str, float]
"""What a run measured: flat names such as ``domain/gain``, one float each."""

Name = Annotated[str, StringConstraints(min_length=1, max_length=4096, strip_whitespace=True)]

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


class RecipeError(ValueError):
    """A recipe, comparison or override that cannot be honoured; the message names the field by its path."""


class Spec(BaseModel):
    """Base of everything that is written down: frozen, and an unknown key is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    def __init__(self, **data: Any) -> None:  # Any: pydantic decides
        # The same words for a mistake in Python as for one in YAML.
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise RecipeError(_explain(error, type(self), type(self).__name__)) from None

    # Tells pydantic that validation need not pass through __init__, so that errors keep their path in a larger whole.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class _Named(Spec):
    """A reference that may be written as its name alone."""

    name: Name = Field(description="Hub name, local path, `headwater:NAME` for a builtin, or `previous` in a pipeline")
    revision: Name | None = Field(default=None, description="Hub revision (commit, tag or branch); Hub names only")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:  # Any: whatever the user wrote
        if isinstance(value, (str, Path)):
            return {"name": str(value)}
        return value

    @model_validator(mode="after")
    def _safe_builtin(self) -> Self:
        if self.kind == "builtin" and not re.fullmatch(
            r"headwater:[A-Za-z0-9][A-Za-z0-9_.+-]*(/[A-Za-z0-9][A-Za-z0-9_.+-]*)*", self.name
        ):
            raise ValueError(f"{self.name!r} is no builtin name; builtins look like 'headwater:demo-base'")
        return self

    @property
    def kind(self) -> Literal["hub", "local", "builtin", "previous"]:
        """Where the name points; a name that exists on disk or looks like a path is local."""
        if (word := self.name.partition("/")[0]) == "previous" or _STEP.fullmatch(word):
            return "previous"
        if self.name.startswith("headwater:"):
            return "builtin"
        path = Path(self.name).expanduser()
        looks_local = self.name.startswith((".", "/", "~")) or path.suffix in (
            ".jsonl",
            ".parquet",
            ".txt",
            ".gz",
            ".csv",
        )
        return "local" if looks_local or path.exists() else "hub"

    @property
    def path(self) -> Path:
        """The local path of a ``local`` reference."""
        return Path(self.name).expanduser()

    def __str__(self) -> str:
        return self.name


class ModelRef(_Named):
    """A pretrained model: a Hub name, a local directory that transformers opens, or a builtin."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="float32", description="dtype of the loaded weights; `auto` keeps the checkpoint's"
    )
    trust_remote_code: bool = Field(default=False, description="run modelling code that the checkpoint ships")

    @model_validator(mode="after")
    def _no_pickle(self) -> Self:
        if Path(self.name).suffix in PICKLE_SUFFIXES:
            raise ValueError(
                f"{self.name!r} is a pickle, which can run code when opened. Give a directory with safetensors; "
                "`AutoModel.from_pretrained(OLD).save_pretrained(NEW, safe_serialization=True)` converts one you trust"
            )
        return self


class CorpusRef(_Named):
    """Texts to read: a Hub data set, a local file or folder (jsonl, parquet, txt, md, rst), or a builtin corpus."""

    config: Name | None = Field(default=None, description="configuration name of a Hub data set")
    split: Name = Field(default="train", description="split of a Hub data set")
    text_field: Name = Field(default="text", description="column that holds the text")
    limit_documents: int | None = Field(default=None, gt=0, description="read at most so many documents")
    limit_chars: int | None = Field(default=None, gt=0, description="stop after so many characters")


class DataRef(_Named):
    """Labelled examples: a Hub data set, a local jsonl/parquet/csv file, or a builtin."""

    config: Name | None = Field(default=None, description="configuration name of a Hub data set")
    split: Name = Field(default="train", description="split to read")
    input_field: Name = Field(default="text", description="column with the input (text, image or audio)")
    label_field: Name = Field(default="label", description="column with the label")
    limit: int | None = Field(default=None, gt=0, description="read at most so many rows")


class Recipe(Spec, ABC):
    """A method as data. Subclasses are families (abstract) and methods (concrete, with a catalogue entry)."""

    id: ClassVar[str] = ""
    """The catalogue's id of the method; set by every concrete recipe."""

    seed: int = Field(default=0, ge=0, lt=2**63, description="seeds data order, initialisation and every draw")

    @abstractmethod
    def run(self, run: Run) -> Metrics:
        """Do the work inside ``run``'s directory and return what was measured."""

    def hash(self) -> str:
        """Sixteen hex digits over the method and every resolved field: equal recipes, equal hash."""
        canonical = json.dumps(recipe_data(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The recipe with every field resolved; ``load_recipe`` reads it back."""
        return dump_yaml(recipe_data(self))


class Pipeline(Recipe):
    """Recipes in a row; ``previous`` in a step's fields means the model the step before left.

    ``previous/NAME`` means the file or folder NAME in the run directory of the step before. ``steps.0`` and
    ``steps.0/NAME`` mean the same of the first step, ``steps.1`` of the second, and so on.
    """

    id: ClassVar[str] = "pipeline"

    steps: tuple[dict[str, Any], ...] = Field(  # Any: each is a recipe of a type named inside it
        min_length=1, description="recipes, each a mapping with `method` and that method's fields"
    )

    @model_validator(mode="after")
    def _steps_are_recipes(self) -> Self:
        for position, step in enumerate(self.steps):
            recipe = load_recipe(step, where=f"steps.{position}")
            if isinstance(recipe, Pipeline):
                raise ValueError(f"steps.{position}: a pipeline inside a pipeline; write its steps here instead")
            named = _first_words(step)
            if position == 0 and "previous" in named:
                raise ValueError("steps.0: nothing comes before the first step; name a model or data set")
            for word in sorted(named):
                if (earlier := _STEP.fullmatch(word)) and int(earlier[1]) >= position:
                    raise ValueError(f"steps.{position}: {word} does not come before it; name an earlier step")
        return self

    def run(self, run: Run) -> Metrics:
        """Run the steps in order; a finished step is not run again on resume. Metrics are prefixed by step."""
        from headwater.core.run import execute

        metrics: Metrics = {}
        done: list[Path] = []
        for position, step in enumerate(self.steps):
            recipe = load_recipe(_with_directories(step, done), where=f"steps.{position}")
            label = f"{position:02d}-{recipe.id}"
            done.append(run.nested(label))
            result = execute(recipe, done[-1], resume=True)
            metrics.update({f"{label}/{name}": value for name, value in result.metrics.items()})
        return metrics


def _first_words(data: Any) -> set[str]:  # Any: nested plain data
    """What every string in ``data`` begins with, up to its first slash."""
    if isinstance(data, str):
        return {data.split("/")[0]}
    values: Iterable[Any] = (
        data.values() if isinstance(data, Mapping) else data if isinstance(data, (list, tuple)) else ()
    )
    return set().union(*map(_first_words, values))


def _with_directories(data: Any, done: Sequence[Path]) -> Any:  # Any: nested plain data
    """``data`` with the names of earlier steps made paths; ``done``: their run directories."""
    if isinstance(data, str):
        word, _, rest = data.partition("/")
        earlier = _STEP.fullmatch(word)
        if not done or not (earlier or word == "previous"):
            return data
        directory = done[int(earlier[1])] if earlier else done[-1]
        target = (directory / (rest or "model")).resolve()
        if not target.is_relative_to(directory.resolve()):
            raise RecipeError(f"{data!r} leads out of the run directory of that step")
        return str(target) if rest else str(directory / "model")
    if isinstance(data, Mapping):
        return {key: _with_directories(value, done) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_with_directories(value, done) for value in data]
    return data


def recipe_data(recipe: Recipe) -> dict[str, Any]:  # Any: JSON data
    """The recipe as plain JSON data, ``method`` first, references that are only a name as that name."""
    return {"method": recipe.id, **cast(dict[str, Any], _shorten(recipe.model_dump(mode="json"), recipe))}


def _shorten(data: Any, value: Any) -> Any:  # Any: dumped data beside the value it came from
    if isinstance(value, _Named) and value == type(value)(name=value.name):
        return value.name
    if isinstance(value, BaseModel):
        return {key: _shorten(data[key], getattr(value, key)) for key in type(value).model_fields}
    if isinstance(value, (list, tuple)):
        return [_shorten(d, v) for d, v in zip(data, value, strict=True)]
    if isinstance(value, dict):
        return {key: _shorten(data[key], item) for key, item in value.items()}
    return data


def load_recipe(
    source: Path | str | Mapping[str, Any], overrides: Sequence[str] = (), *, where: str | None = None
) -> Recipe:
    """Build a recipe from a YAML file or a mapping.

    Args:
        source: path of a YAML file, or the mapping itself; must hold ``method``.
        overrides: ``field.subfield=value`` strings, values read as YAML.
        where: what to call the source in errors; the path by default.

    Raises:
        RecipeError: not a mapping, an unknown method or field (with the nearest name), or a refused value.
        YamlError: the file is not plain YAML.
        FileNotFoundError: no such file.
    """
    from headwater.core.catalogue import Catalogue

    if isinstance(source, (str, Path)):
        data: Any = read_yaml(Path(source))
        where = where or str(source)
    else:
        data = dict(source) if isinstance(source, Mapping) else source
    where = where or "recipe"
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: expected a mapping with `method` and its fields; got {type(data).__name__}")
    data = apply_overrides(data, overrides)
    method = data.pop("method", None)
    if method == Pipeline.id:
        return validate(Pipeline, data, where=where)
    if not isinstance(method, str):
        raise RecipeError(f"{where}: `method` is missing. Name one of the ids that `headwater methods` lists.")
    return validate(Catalogue.load().recipe_class(method), data, where=where)


def validate(cls: type[T], data: Mapping[str, Any], *, where: str) -> T:
    """Build ``cls`` from plain data, strictly: a string is no number, and each mistake names its field's path."""
    try:
        # JSON mode lets lists become tuples and text become paths while refusing "3" for 3 and true for 1.0.
        return cls.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise RecipeError(_explain(error, cls, where)) from None
    except TypeError as error:
        raise RecipeError(f"{where}: holds something that is not plain data: {error}") from None


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return ``data`` with ``a.b=value`` overrides applied; list items go by position (``steps.0.seed=1``)."""
    result: dict[str, Any] = json.loads(json.dumps(data))
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path.strip():
            raise RecipeError(f"cannot read override {text!r}; write field=value, e.g. optim.lr=1e-4")
        *parents, last = path.strip().split(".")
        node: Any = result
        for key in parents:
            if isinstance(node, list):
                node = node[_position(key, node, text)]
                continue
            if isinstance(node.get(key), str):
                node[key] = {"name": node[key]}  # a reference written as its name alone
            node = node.setdefault(key, {})
            if not isinstance(node, (dict, list)):
                raise RecipeError(f"override {text!r}: {key!r} holds {node!r}, which has no fields")
        parsed = load_yaml(value, source=f"override {text!r}")
        if isinstance(node, list):
            node[_position(last, node, text)] = parsed
        else:
            node[last] = parsed
    return result


def _position(key: str, items: list[Any], text: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise RecipeError(f"override {text!r}: {key!r} is not a position in a list of {len(items)}")
    return int(key)


def _explain(error: ValidationError, cls: type[BaseModel], where: str) -> str:
    """One line per mistake: the field's path, what is wrong, what was found, the nearest name for a wrong one."""
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _field_names(cls, problem["loc"][:-1])
            close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Fields here: {', '.join(known) or 'none'}."
            lines.append(f"{where}: unknown field {path!r}.{hint}")
        elif problem["type"] == "missing":
            lines.append(f"{where}: field {path!r} is required.")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            found = repr(problem["input"])
            found = found if len(found) <= 120 else found[:117] + "..."
            got = "" if problem["type"] == "value_error" else f"; got {found}"
            lines.append(f"{where}: field {path!r}: {message}{got}." if path else f"{where}: {message}.")
    return "\n".join(dict.fromkeys(lines))


def _field_names(cls: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Fields of the model that ``location`` leads to inside ``cls``; empty when it leads elsewhere."""
    models = [cls]
    for part in location:
        fields = [model.model_fields[part] for model in models if isinstance(part, str) and part in model.model_fields]
        if fields:
            models = [inner for field in fields for inner in _inner_models(field.annotation)]
        else:  # a position in a list, a key, or the tag that says which model of a choice is meant
            models = [model for model in models if _tag(model) == part] or models
    return sorted({name for model in models for name in model.model_fields})


def _tag(model: type[BaseModel]) -> Any:  # Any: a field's default
    return model.model_fields["kind"].default if "kind" in model.model_fields else None


def _inner_models(annotation: Any) -> list[type[BaseModel]]:  # Any: a typing construct
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in getattr(annotation, "__args__", ()) for found in _inner_models(argument)]
