"""Put methods of one stage side by side: same model, data, budget, tuning and seeds.

    family: domain
    shared: {model: ./base, domain: ./handbook/, general: ./wiki/, budget: {tokens: 2_000_000}}
    seeds: [0, 1, 2]
    tune: {optim.lr: [3e-4, 1e-3]}
    contestants:
      subset: {method: stability_gap, epochs: 4, replay: 0.25}

The family's references run too. Each run has a directory named by the hash of its recipe, so that a finished one is
read, an interrupted one is continued, and a changed comparison starts only what changed.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from headwater.core.cache import atomic_write_text
from headwater.core.catalogue import Catalogue, CatalogueError
from headwater.core.family import Axis, Family, load_family
from headwater.core.leaderboard import Finished, Leaderboard, Trials, build_leaderboard
from headwater.core.recipe import Name, Recipe, RecipeError, Spec, apply_overrides, load_recipe, recipe_data, validate
from headwater.core.run import Result, check_name, read_result
from headwater.core.workers import Task, run_tasks
from headwater.core.yamlio import dump_yaml, load_yaml, read_yaml

__all__ = ["Axis", "Comparison", "ComparisonFailed", "Entrant", "Family", "compare"]

Fields = dict[str, Any]  # Any: recipe fields as YAML holds them


class ComparisonFailed(RuntimeError):
    """Not one contestant finished; the message says why each did not."""


@dataclass(frozen=True)
class Entrant:
    """A row of the comparison before it has run.

    Attributes:
        name: of the row.
        reference: whether the family added it.
        fields: the recipe's, ``method`` included, without the seed.
        grid: the points it is tuned over, each dotted field -> value; fewer than two cost no trial.
        untuned: why there is no grid where the others have one.
    """

    name: str
    reference: bool
    fields: Fields
    grid: tuple[Fields, ...]
    untuned: str = ""

    def recipe(self, seed: int, point: Mapping[str, Any] | None = None) -> Recipe:  # Any: field values
        """The recipe for one seed, at a point of the grid."""
        overrides = [f"{path}={json.dumps(value)}" for path, value in (point or {}).items()]
        where = f"{'reference' if self.reference else 'contestants'}.{self.name}"
        try:
            return load_recipe(apply_overrides({**self.fields, "seed": seed}, overrides), where=where)
        except CatalogueError as error:
            raise RecipeError(f"{where}: {error}") from None


class Comparison(Spec):
    """A comparison as it is written down."""

    family: Name = Field(description="stage whose methods are compared, e.g. domain; or package.stage")
    title: str = Field(default="", max_length=200, description="heads the report")
    shared: Fields = Field(default={}, description="fields that every contestant and reference gets")
    seeds: tuple[int, ...] = Field(min_length=1, description="every contestant runs on each; three give intervals")
    tune: dict[str, tuple[Any, ...]] = Field(  # Any: field values
        default={}, description="dotted field -> values; every contestant tries the whole grid, chosen on validation"
    )
    tune_seed: int = Field(default=1000, ge=0, lt=2**63, description="seed of the trials; none of `seeds`")
    forgetting_limit: float | None = Field(default=None, description="highest price that a recommended row may have")
    without: tuple[Name, ...] = Field(default=(), description="references that are switched off")
    baseline: Name | None = Field(
        default=None, description="row that others are tested against; the family's by default"
    )
    contestants: dict[str, Fields] = Field(
        min_length=1, description="name -> method and its fields; own `tune` allowed"
    )
    workers: int = Field(default=1, gt=0, description="runs at a time; they share the machine's cores evenly")

    @field_validator("contestants")
    @classmethod
    def _names_are_safe(cls, value: dict[str, Fields]) -> dict[str, Fields]:
        for name in value:
            check_name(name)
        return value

    @field_validator("tune")
    @classmethod
    def _tune_is_a_grid(cls, value: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:  # Any: field values
        _check_grid(value)
        return value

    @model_validator(mode="after")
    def _seeds_are_apart(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be different and not negative; got {list(self.seeds)}")
        if self.tune and self.tune_seed in self.seeds:
            raise ValueError(f"tune_seed {self.tune_seed} is one of the seeds; trials need a seed of their own")
        return self

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Comparison:
        """Read a YAML file, apply ``field=value`` overrides, and check everything that can be checked unrun.

        Raises:
            RecipeError: a mistake, with its field's path.
            YamlError: the file is not plain YAML.
            FileNotFoundError: no such file.
        """
        return cls._checked(read_yaml(path), overrides, str(path))

    @classmethod
    def parse(cls, text: str, overrides: Sequence[str] = (), *, source: str = "comparison") -> Comparison:
        """As ``load``, from the text of the file."""
        return cls._checked(load_yaml(text, source=source), overrides, source)

    @classmethod
    def _checked(cls, data: Any, overrides: Sequence[str], where: str) -> Comparison:  # Any: unread YAML
        if not isinstance(data, dict):
            raise RecipeError(
                f"{where}: expected a mapping with `family` and `contestants`; got {type(data).__name__}."
            )
        comparison = validate(cls, apply_overrides(data, overrides), where=where)
        comparison.entrants()
        return comparison

    def to_yaml(self) -> str:
        """Every field resolved; ``parse`` reads it back."""
        return dump_yaml(self.model_dump(mode="json"))

    def entrants(self) -> list[Entrant]:
        """References and contestants, every recipe of theirs checked: all seeds, all points of their grids.

        Raises:
            RecipeError: a recipe that cannot run, a method of another stage, unequal budgets or grids, or a name that
                is unknown or taken.
        """
        family = load_family(self.family)
        references = {name: fields for name, fields in family.references.items() if name not in self.without}
        for name in self.without:
            _known(name, family.references, "without", "reference")
        if taken := sorted(references.keys() & self.contestants.keys()):
            raise RecipeError(
                f"contestants.{taken[0]}: a reference has this name. Choose another, or say `without: [{taken[0]}]`."
            )
        _known(self.baseline or family.baseline, {**references, **self.contestants}, "baseline", "row")
        entrants = [self._entrant(name, fields, family, reference=True) for name, fields in references.items()]
        entrants += [self._entrant(name, fields, family, reference=False) for name, fields in self.contestants.items()]
        if self.tune and all(entrant.untuned for entrant in entrants):
            raise RecipeError(f"tune: {entrants[-1].untuned}")
        budgets = {entrant.name: budget for entrant in entrants if (budget := self._budget(entrant))}
        first = next(iter(budgets), "")
        for name, budget in budgets.items():
            if budget != budgets[first]:
                raise RecipeError(
                    f"{name} has budget {budget} and {first} has {budgets[first]}. "
                    "Give one budget to all, under `shared`."
                )
        return entrants

    def _entrant(
        self, name: str, fields: Mapping[str, Any], family: Family, *, reference: bool
    ) -> Entrant:  # Any: YAML
        where = f"{'reference' if reference else 'contestants'}.{name}"
        own = dict(fields)
        if "seed" in own or "seed" in self.shared:
            raise RecipeError(f"{where}: `seed` is set by the comparison; list them under `seeds`.")
        tune = own.pop("tune", None)
        entrant = Entrant(name, reference, _merge(self.shared, own), ())
        try:
            recipe = entrant.recipe(self.seeds[0])
        except RecipeError as error:
            hint = f" Switch this reference off with `without: [{name}]` if you can do without it." if reference else ""
            raise RecipeError(f"{error}{hint}") from None
        stage = Catalogue.load()[recipe.id].stage if recipe.id in Catalogue.load() else "a pipeline"
        if stage != family.stage:
            raise RecipeError(
                f"{where}: method {recipe.id!r} is of stage {stage}; this comparison is of {family.stage}."
            )
        entrant = self._with_grid(entrant, tune, recipe, where)
        for seed, point in itertools.product((*self.seeds, self.tune_seed), entrant.grid or ({},)):
            entrant.recipe(seed, point)
        return entrant

    def _with_grid(self, entrant: Entrant, tune: Any, recipe: Recipe, where: str) -> Entrant:  # Any: unchecked YAML
        if tune is not None and not (
            isinstance(tune, dict)
            and all(isinstance(path, str) and isinstance(v, (list, tuple)) for path, v in tune.items())
        ):
            raise RecipeError(f"{where}.tune: expected dotted fields with lists of values; got {tune!r}.")
        grid = self.tune if tune is None else tune
        try:
            _check_grid(grid)
        except ValueError as error:
            raise RecipeError(f"{where}.tune: {error}") from None
        paths = _paths(recipe_data(recipe))
        if missing := [path for path in grid if path not in paths]:
            close = difflib.get_close_matches(missing[0], paths, n=1)
            words = f"{recipe.id!r} has no field {missing[0]!r}" + (f"; did you mean {close[0]!r}?" if close else "")
            if tune is not None:
                raise RecipeError(f"{where}.tune: {words}")
            return Entrant(entrant.name, entrant.reference, entrant.fields, (), words)
        points, equal = _points(grid), _points(self.tune)
        if len(points) != len(equal) and not (entrant.reference and not points):
            raise RecipeError(
                f"{where}.tune: {len(points)} points, where the shared grid has {len(equal)}. "
                "Every contestant gets the same number of trials."
            )
        return Entrant(
            entrant.name, entrant.reference, entrant.fields, points, "" if points or not equal else "kept as it is"
        )

    def _budget(self, entrant: Entrant) -> Fields:
        budget = recipe_data(entrant.recipe(self.seeds[0])).get("budget")
        return (
            {kind: amount for kind, amount in budget.items() if amount is not None} if isinstance(budget, dict) else {}
        )


def compare(
    comparison: Comparison,
    out: Path,
    *,
    progress: Callable[[str], None] = lambda line: None,
    grace_seconds: float = 60.0,
) -> Leaderboard:
    """Tune, run and judge every contestant; write the leaderboard and the report.

    Args:
        comparison: what to compare.
        out: gets ``runs/``, ``comparison.yaml``, ``leaderboard.json``, ``leaderboard.csv`` and ``report.html``. What an
            earlier call finished there is read, what it left unfinished is continued, what failed is tried again.
        progress: is told one line per finished run.
        grace_seconds: how long runs may take to write their checkpoint when this call is interrupted.

    Raises:
        ComparisonFailed: no contestant finished.
        RecipeError: see ``Comparison.entrants``.
        RunError: a run directory was written by another version.
    """
    from headwater.core.report import write_report

    family, entrants = load_family(comparison.family), comparison.entrants()
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out / "comparison.yaml", comparison.to_yaml())

    tuned = {entrant.name: entrant.grid for entrant in entrants if len(entrant.grid) > 1}
    trials = {
        (entrant.name, position): _task(out, entrant, f"tune-{position}", entrant.recipe(comparison.tune_seed, point))
        for entrant in entrants
        for position, point in enumerate(tuned.get(entrant.name, ()))
    }
    results = _execute(trials.values(), comparison.workers, out, progress, grace_seconds)
    tuning = {
        entrant.name: Trials.choose(
            entrant.grid,
            [results[trials[entrant.name, i].directory] for i in range(len(tuned.get(entrant.name, ())))],
            family,
            comparison.forgetting_limit,
            entrant.untuned,
        )
        for entrant in entrants
    }

    finals = {
        (entrant.name, seed): _task(out, entrant, f"seed-{seed}", entrant.recipe(seed, tuning[entrant.name].chosen))
        for entrant in entrants
        if not tuning[entrant.name].error
        for seed in comparison.seeds
    }
    results = _execute(finals.values(), comparison.workers, out, progress, grace_seconds)
    finished = [
        Finished(
            entrant.name,
            str(entrant.fields["method"]),
            entrant.reference,
            tuning[entrant.name],
            {s: (finals[n, s].directory, results[finals[n, s].directory]) for n, s in finals if n == entrant.name},
        )
        for entrant in entrants
    ]
    leaderboard = build_leaderboard(
        family,
        finished,
        out,
        title=comparison.title,
        baseline=comparison.baseline or family.baseline,
        seeds=comparison.seeds,
        limit=comparison.forgetting_limit,
        budget=comparison.shared.get("budget"),
    )
    if all(row.status == "failed" for row in leaderboard.rows):
        raise ComparisonFailed(
            "no contestant finished:\n" + "\n".join(f"  {r.name}: {r.reason}" for r in leaderboard.rows)
        )
    atomic_write_text(out / "leaderboard.json", json.dumps(leaderboard.to_dict(), indent=2) + "\n")
    atomic_write_text(out / "leaderboard.csv", leaderboard.to_csv())
    write_report(out)
    return leaderboard


def _task(out: Path, entrant: Entrant, label: str, recipe: Recipe) -> Task:
    directory = out / "runs" / entrant.name / f"{label}-{recipe.hash()[:8]}"
    return Task(f"{entrant.name} {label}", recipe_data(recipe), directory)


def _execute(
    tasks: Iterable[Task], workers: int, out: Path, progress: Callable[[str], None], grace_seconds: float
) -> dict[Path, Result]:
    """Results by directory; those of finished runs are read from it."""
    results: dict[Path, Result] = {}
    todo = []
    for task in tasks:
        stored = task.directory / "result.json"
        if stored.exists():
            result = read_result(task.directory)
            if result.status == "done":
                results[task.directory] = result
                continue
            stored.unlink()  # so that what is read later is what this attempt wrote
        todo.append(task)
    total = len(results) + len(todo)
    if results:
        progress(f"{len(results)} of {total} runs were finished before")

    def done(task: Task, result: Result) -> None:
        results[task.directory] = result
        words = f"{result.seconds:.0f} s" if result.status == "done" else f"failed: {result.error}"
        progress(f"[{len(results)}/{total}] {task.name}: {words}")

    if todo:
        run_tasks(todo, workers=workers, log=out / "workers.log", done=done, grace_seconds=grace_seconds)
    return results


def _merge(shared: Mapping[str, Any], own: Mapping[str, Any]) -> Fields:  # Any: recipe fields
    """``own`` over ``shared``, mapping by mapping."""
    merged = dict(shared)
    for key, value in own.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _check_grid(grid: Mapping[str, Sequence[Any]]) -> None:  # Any: field values
    for path, values in grid.items():
        if path.split(".")[0] in ("seed", "budget", "method"):
            raise ValueError(f"{path!r} is the same for all; it cannot be tuned")
        if not values:
            raise ValueError(f"{path!r} has no values to try")


def _points(grid: Mapping[str, Sequence[Any]]) -> tuple[Fields, ...]:  # Any: field values
    if not grid:
        return ()
    return tuple(dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))


def _paths(data: Mapping[str, Any], prefix: str = "") -> list[str]:  # Any: recipe fields
    found = []
    for key, value in data.items():
        found.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            found += _paths(value, f"{prefix}{key}.")
    return found


def _known(name: str, among: Iterable[str], where: str, what: str) -> None:
    if name not in among:
        names = list(among)
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"There are {', '.join(names)}."
        raise RecipeError(f"{where}: no {what} {name!r}. {hint}")
