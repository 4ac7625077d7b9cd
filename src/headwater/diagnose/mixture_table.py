"""Tables of continued-pretraining runs at several sizes, lengths and mixtures: planned, read, checked, interpolated.

A table is a DataFrame with a row for each evaluation:

    N              parameters of the model
    D              tokens of continued pretraining so far
    r_d            share of them from the domain, in [0, 1]; the rest is general text
    loss_domain    validation losses, in nats (per token or per byte, the same throughout)
    loss_general
    run            optional; rows of one run, whose errors go together. By default one run for each (domain, N, r_d)
    domain         optional; the domain's name, for tables of several
    unit           optional; of the losses
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, field_validator
from scipy.interpolate import RegularGridInterpolator

from headwater.core.recipe import CorpusRef, ModelRef, Spec
from headwater.core.run import read_result
from headwater.core.yamlio import read_yaml

__all__ = ["COLUMNS", "InterpolateGrid", "RunPlan", "TableError", "Target", "check_table", "from_runs", "read_table"]

Floats = NDArray[np.float64]
Target = Literal["domain", "general"]

COLUMNS = ("N", "D", "r_d", "loss_domain", "loss_general")
FEWEST_ROWS, FEWEST_RATIOS, FEWEST_LENGTHS = 12, 3, 3


class TableError(ValueError):
    """A table of runs that does not say what a law needs, or says something else."""


def check_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with float columns and a column ``run``, or refuse it.

    Raises:
        TableError: a missing column; a value that is not finite or out of range; losses in bits; ratios in percent or
            of the other corpus; fewer than 12 rows, 3 ratios or 3 lengths.
    """
    in_bits = [str(name) for name in table.columns if "bpb" in str(name) or "bits" in str(name)]
    if "unit" in table.columns:
        in_bits += sorted({str(unit) for unit in table["unit"] if "bit" in str(unit).lower()})
    if in_bits:
        raise TableError(f"losses are in bits ({', '.join(in_bits)}); give nats: multiply by ln 2 = {math.log(2):.6f}.")
    if missing := [name for name in COLUMNS if name not in table.columns]:
        raise TableError(f"the table has no column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}.")
    checked = table.astype(dict.fromkeys(COLUMNS, "float64")).reset_index(drop=True)
    for name in COLUMNS:
        values = checked[name].to_numpy()
        wrong = ~np.isfinite(values) | (values < 0 if name == "r_d" else values <= 0)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            bound = ">= 0" if name == "r_d" else "> 0"
            raise TableError(f"{name} must be finite and {bound}; got {values[row]} in row {row}.")
    if (top := checked["r_d"].max()) > 1:
        raise TableError(f"r_d is a share in [0, 1]; got {top:g}. If the ratios are in percent, divide by 100.")
    counts = {"rows": len(checked), "ratios": checked["r_d"].nunique(), "values of D": checked["D"].nunique()}
    for (what, count), fewest in zip(counts.items(), (FEWEST_ROWS, FEWEST_RATIOS, FEWEST_LENGTHS), strict=True):
        if count < fewest:
            raise TableError(f"the table has {count} {what}; a law needs at least {fewest}.")
    _refuse_swapped(checked)
    by = [name for name in ("domain", "N", "r_d") if name in checked.columns]
    if "run" not in checked.columns:
        checked["run"] = checked.groupby(by).ngroup().astype(str)
    return checked


def _refuse_swapped(table: pd.DataFrame) -> None:
    """Refuse a table whose domain loss rises with ``r_d``, which is most likely the general share."""
    by = [name for name in ("domain", "N", "D") if name in table.columns]
    ratio = table["r_d"] - table.groupby(by)["r_d"].transform("mean")
    log_loss = np.log(table["loss_domain"])
    if float((ratio * (log_loss - log_loss.groupby([table[name] for name in by]).transform("mean"))).sum()) > 0:
        raise TableError(
            "the domain loss rises with r_d. Is r_d the share of general text, or are the two losses swapped? r_d is "
            "the domain's share: give 1 - r_d."
        )


def read_table(path: Path) -> pd.DataFrame:
    """Read a table from ``.csv`` or ``.parquet``.

    Raises:
        FileNotFoundError: no such file.
        TableError: another suffix.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no table {path}. Give a .csv or .parquet file with columns {', '.join(COLUMNS)}.")
    if path.suffix not in (".csv", ".parquet"):
        raise TableError(f"{path}: a table is a .csv or .parquet file; got {path.suffix or 'no suffix'}.")
    return pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)


def from_runs(paths: Sequence[Path], domain: str | None = None) -> pd.DataFrame:
    """Read the evaluations along finished runs of plain continued pretraining.

    A run whose corpora stand the other way round (it adapts to the general text, and the domain is what must not be
    forgotten) is read from the other side: that is how a run without any domain text is made.

    Args:
        paths: run directories, each with a domain and a general corpus.
        domain: name of the corpus that is the domain; that of the first run by default.

    Returns:
        The table, losses in nats (per byte for causal models). Evaluations before the end of the learning rate's warmup
        are left out.

    Raises:
        TableError: no run, a run of another method, with LoRA, without a general corpus or without evaluations.
    """
    rows = []
    for path in paths:
        recipe = read_yaml(path / "recipe.yaml")
        _refuse_other_runs(path, recipe)
        names = [_name(recipe["domain"]), _name(recipe["general"])]
        domain = names[0] if domain is None else domain
        if domain not in names:
            raise TableError(f"{path}: neither corpus is {domain!r}; it has {' and '.join(names)}.")
        own, other = ("domain", "general") if names[0] == domain else ("general", "domain")
        result = read_result(path)
        series = _trajectory(path)
        last = max(tokens for tokens, _ in series[f"{own}/bpb"])
        warm = recipe["optim"]["warmup"] * last
        for (tokens, bits), (_, other_bits) in zip(series[f"{own}/bpb"], series[f"{other}/bpb"], strict=True):
            if tokens > warm:
                rows.append(
                    {
                        "N": result.cost["trainable"],
                        "D": tokens,
                        "r_d": 1 - recipe["replay"] if own == "domain" else recipe["replay"],
                        "loss_domain": bits * math.log(2),
                        "loss_general": other_bits * math.log(2),
                        "run": str(path),
                        "unit": result.notes["unit"].replace("bits", "nats"),
                    }
                )
    if not rows:
        raise TableError(f"{len(paths)} run(s) hold no evaluation after warmup; set eval_at in their recipes.")
    return pd.DataFrame(rows)


def _refuse_other_runs(path: Path, recipe: dict[str, Any]) -> None:  # Any: recipe fields
    if recipe["method"] != "plain":
        raise TableError(f"{path}: a run of {recipe['method']!r}; the law is of plain continued pretraining.")
    if recipe["lora"] is not None:
        raise TableError(f"{path}: trained LoRA adapters; the law is of training all parameters.")
    if recipe["general"] is None:
        raise TableError(f"{path}: has no general corpus, so its general loss is not known.")


def _name(corpus: Any) -> str:  # Any: a reference in a recipe, a name or a mapping
    return str(corpus["name"] if isinstance(corpus, dict) else corpus)


def _trajectory(path: Path) -> dict[str, list[list[float]]]:
    file = path / "trajectory.json"
    if not file.exists():
        raise TableError(f"{path}: has no trajectory.json; set eval_at in its recipe.")
    series: dict[str, list[list[float]]] = json.loads(file.read_text(encoding="utf-8"))["series"]
    return series


class InterpolateGrid:
    """The rival without a law: linear interpolation between runs, in log N, log D and the ratio.

    Args:
        table: with every combination of its sizes, lengths and ratios.
        target: which loss.

    Raises:
        TableError: a combination is missing or stands twice.
    """

    def __init__(self, table: pd.DataFrame, target: Target) -> None:
        cube = table.pivot_table(index=["N", "D", "r_d"], values=f"loss_{target}", aggfunc=["mean", "count"])
        self.target = target
        self.levels = [np.sort(table[name].unique()).astype(np.float64) for name in ("N", "D", "r_d")]
        shape = tuple(len(level) for level in self.levels)
        if len(cube) != math.prod(shape) or len(cube) != len(table):
            raise TableError(
                f"interpolation needs each of the {' x '.join(map(str, shape))} combinations of N, D and r_d once; the "
                f"table has {len(cube)} of them in {len(table)} rows."
            )
        axes = [np.log(self.levels[0]), np.log(self.levels[1]), self.levels[2]]
        # An axis with one level has nothing to interpolate along.
        self._used = [axis for axis, level in enumerate(axes) if len(level) > 1]
        self._fixed = {axis: float(level[0]) for axis, level in enumerate(axes) if len(level) == 1}
        values = cube["mean"].to_numpy().reshape([shape[axis] for axis in self._used])
        self._interpolator = RegularGridInterpolator([axes[axis] for axis in self._used], values, bounds_error=False)

    def predict(self, N: ArrayLike, D: ArrayLike, r: ArrayLike) -> Floats:
        """Loss at ``N`` parameters, ``D`` tokens and a share ``r`` of the target's own text; NaN outside the grid."""
        share = np.asarray(r, dtype=np.float64)
        r_d = (
            share if self.target == "domain" else np.round(1 - share, 12)
        )  # 1 - (1 - r) may miss the grid's last level
        points = np.broadcast_arrays(np.log(N), np.log(D), r_d)
        found = self._interpolator(np.stack([points[axis] for axis in self._used], axis=-1)).reshape(points[0].shape)
        on_grid = [np.isclose(points[axis], level) for axis, level in self._fixed.items()]
        return np.where(np.all(on_grid, axis=0), found, np.nan)


class RunPlan(Spec):
    """Runs to make: every base model on every mixture, by plain continued pretraining."""

    models: tuple[ModelRef, ...] = Field(min_length=1, description="one base model for each size, alike otherwise")
    domain: CorpusRef = Field(description="domain text")
    general: CorpusRef = Field(description="text like what the models were pretrained on")
    ratios: tuple[float, ...] = Field(
        default=(0, 0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 1),  # section 4.1
        description="shares of domain text, at least three, in [0, 1]",
    )
    tokens: int = Field(gt=0, description="length of every run")
    evaluations: int = Field(default=20, ge=3, description="evenly spaced along every run")
    lr: float = Field(default=1e-4, gt=0, description="learning rate after warmup, constant")
    warmup: float = Field(default=0.05, ge=0, lt=1, description="fraction of a run, not used for the fit")
    batch_tokens: int = Field(default=32_768, gt=0, description="tokens per step")
    seq_len: int | None = Field(default=None, gt=1, description="tokens per block; by default the models' own")

    @field_validator("ratios")
    @classmethod
    def _shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(value)) < 3 or min(value) < 0 or max(value) > 1:
            raise ValueError(f"at least three different shares in [0, 1], not percent; got {value}")
        return tuple(sorted(set(value)))

    def recipes(self, seed: int) -> dict[str, dict[str, Any]]:  # Any: recipe fields
        """The runs by name. Without domain text the corpora change places, so that the domain is still scored."""
        shared: dict[str, Any] = {
            "method": "plain",
            "budget": {"tokens": self.tokens},
            # Constant, so that every evaluation is what a run of its length would have reached.
            "optim": {"lr": self.lr, "warmup": self.warmup, "schedule": "constant"},
            "eval_chars": 20_000,  # the law reads the evaluations on the way
            "eval_at": [(i + 1) / self.evaluations for i in range(self.evaluations)],
            "batch_tokens": self.batch_tokens,
            "seq_len": self.seq_len,
            "seed": seed,
        }
        domain, general = (corpus.model_dump(mode="json") for corpus in (self.domain, self.general))
        return {
            f"model{size}-r{ratio:g}": {
                **shared,
                "model": model.model_dump(mode="json"),
                "domain": general if ratio == 0 else domain,
                "general": domain if ratio == 0 else general,
                "replay": 0.0 if ratio == 0 else 1 - ratio,
            }
            for size, model in enumerate(self.models)
            for ratio in self.ratios
        }
