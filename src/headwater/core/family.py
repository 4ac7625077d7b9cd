"""What a stage tells ``compare`` about itself: which metrics matter, which way, and which references always run."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from headwater.core.catalogue import STAGES
from headwater.core.recipe import RecipeError

__all__ = ["Axis", "Family", "load_family"]


@dataclass(frozen=True)
class Axis:
    """A metric as a reader meets it.

    Attributes:
        metric: its name in ``result.json``.
        label: what a table or plot calls it.
        better: which way is good.
        unit: of its values; "" for fractions and other pure numbers.
        format: of its values, as ``format()`` takes it.
    """

    metric: str
    label: str
    better: Literal["higher", "lower"]
    unit: str = ""
    format: str = ".3f"

    @property
    def sign(self) -> float:
        """What turns a difference into an improvement."""
        return 1.0 if self.better == "higher" else -1.0


@dataclass(frozen=True)
class Family:
    """A stage's side of a comparison; ``<stage>/base.py`` holds one under the name ``FAMILY``.

    Attributes:
        stage: in the catalogue; every contestant's method belongs to it.
        gain: what the user wants more of.
        price: what that costs in abilities, lower is better; ``forgetting_limit`` bounds it.
        columns: further columns of the leaderboard.
        selection: validation metric by which ``tune`` picks.
        selection_price: validation metric that ``forgetting_limit`` bounds while tuning.
        references: name -> method and fields, as a contestant has them; ``tune: {}`` keeps one from being tuned.
        baseline: the reference that rows are tested against.
        tie: a loss below this on an axis counts as none when dominance is judged, in the axis' unit.
        trajectories: drawn against what the run consumed.
        on_the_way: says above them what they were measured on, and when.
    """

    stage: str
    gain: Axis
    price: Axis | None
    columns: tuple[Axis, ...]
    selection: Axis
    selection_price: str | None
    references: Mapping[str, Mapping[str, Any]]  # Any: recipe fields
    baseline: str
    tie: float = 0.005
    trajectories: tuple[Axis, ...] = ()
    on_the_way: str = "Measured on a validation sample while training"

    def __post_init__(self) -> None:
        if self.price is not None and self.price.better != "lower":
            raise ValueError(
                f"the price of family {self.stage!r} must be better when lower; it is what a limit bounds."
            )

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Gain and, where there is one, price."""
        return (self.gain,) if self.price is None else (self.gain, self.price)


def load_family(name: str) -> Family:
    """The family of a stage, ``domain``, or of another package, ``package.stage``.

    Raises:
        RecipeError: no such stage or package, or it declares no family.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        raise RecipeError(f"family: {name!r} is no stage; name one such as 'domain', or 'package.stage'.")
    module = f"{name}.base" if "." in name else f"headwater.{name}.base"
    # Looked up before it is imported: a missing dependency inside the family is another error than a wrong name.
    top = module.split(".")[0]
    if importlib.util.find_spec(top) is None or importlib.util.find_spec(module.removesuffix(".base")) is None:
        close = difflib.get_close_matches(name, STAGES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else f" Stages: {', '.join(STAGES)}."
        raise RecipeError(f"family: there is no stage {name!r}.{hint}")
    if importlib.util.find_spec(module) is None:
        raise RecipeError(f"family: stage {name!r} has no methods to compare yet.")
    family = getattr(importlib.import_module(module), "FAMILY", None)
    if not isinstance(family, Family):
        raise RecipeError(f"family: {module} declares no FAMILY, so its methods cannot be compared.")
    return family
