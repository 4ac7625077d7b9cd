"""Curation, one decision at a time: the variants of a corpus that differ from it in exactly one, and what they changed.

    age       keep the documents of a year, or of several
    quality   keep score < T, where the score is 1 - P(like curated text)
    toxicity  keep score < T
    domain    leave a domain, or several, out
    steps     do some further steps

Of the first four the inverse keeps what else were dropped. All are conditions over metadata, so what scores a document
runs once, in the base, and a threshold costs a look at its number.

Source: Longpre et al., "A Pretrainer's Guide to Training Data: Measuring the Effects of Data Age, Domain Coverage,
    Quality & Toxicity", arXiv:2305.13169, section 3.
Differs: a score that equals T is kept, so that T = 1 keeps everything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from email.utils import parsedate
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field, model_validator

from headwater.core.recipe import Spec
from headwater.core.stats import paired_bootstrap
from headwater.corpora.curation import FieldName, KeepSpec, StepSpec

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["BASE", "AblationAxis", "ablation_table", "make_variants", "year_of"]

BASE = "base"
FIELDS = {"age": "year", "quality": "quality", "toxicity": "toxicity", "domain": "domain"}

Value = float | str | tuple[float, float] | tuple[str, ...] | tuple[StepSpec, ...]
Steps = tuple[StepSpec, ...]


class AblationAxis(Spec):
    """One decision of curation, and the ways to take it that are tried."""

    kind: Literal["age", "quality", "toxicity", "domain", "steps"] = Field(description="which decision")
    values: tuple[Value, ...] = Field(
        min_length=1,
        description="one variant for each: years, or [from, to]; thresholds in (0, 1], below which a score is kept; "
        "domains to leave out, or lists of such; lists of steps",
    )
    inverse: bool = Field(default=False, description="keep instead what else were dropped")
    field: FieldName | None = Field(
        default=None, description="metadata that are looked at; null: year, quality, toxicity or domain"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind == "steps" and (self.inverse or self.field):
            raise ValueError("steps have neither an inverse nor a field")
        for value in self.values:
            self._check(value)
        return self

    def _check(self, value: Value) -> None:
        texts = [value] if isinstance(value, str) else value if isinstance(value, tuple) else []
        match self.kind:
            case "age":
                years = [year for year in _tuple(value) if isinstance(year, float)]
                whole = len(years) == len(_tuple(value)) > 0 and all(year.is_integer() for year in years)
                if not whole or years != sorted(years):
                    raise ValueError(f"age: a year, or [first, last]; got {_said(value)}")
            case "quality" | "toxicity":
                if not isinstance(value, float) or not 0 < value <= 1:
                    raise ValueError(f"{self.kind}: a threshold must be in (0, 1]; got {_said(value)}")
                if value == 1 and self.inverse:
                    raise ValueError(f"{self.kind}: 1 keeps everything, so its inverse keeps nothing; lower it")
            case "domain":
                if not texts or not all(isinstance(text, str) for text in texts):
                    raise ValueError(f"domain: a domain's name, or a list of such; got {_said(value)}")
            case "steps":
                if not isinstance(value, tuple) or not all(isinstance(step, Spec) for step in value):
                    raise ValueError(f"steps: a list of steps such as [{{kind: dedup}}]; got {_said(value)}")

    @property
    def looked_at(self) -> str:
        """Name of the metadata that decide."""
        return self.field or FIELDS[self.kind]

    def score(self, metadata: Mapping[str, Any]) -> float:  # Any: what documents' metadata hold
        """The number that a threshold is compared with; 1 is worst."""
        value = float(metadata[self.looked_at])
        return 1 - value if self.kind == "quality" else value

    def domains(self) -> set[str]:
        """All that are named; none for other kinds."""
        named = [(value,) if isinstance(value, str) else value for value in self.values]
        return {str(name) for value in named for name in _tuple(value)} if self.kind == "domain" else set()

    def ages(self) -> dict[str, tuple[int, int]]:
        """First and last year of each variant by its name; none for other kinds."""
        if self.kind != "age":
            return {}
        return {self._variant(value)[0]: (int(_tuple(value)[0]), int(_tuple(value)[-1])) for value in self.values}

    def named(self) -> dict[str, Steps]:
        """What each variant does after the base, by its name."""
        found: dict[str, Steps] = {}
        for value in self.values:
            name, steps = self._variant(value)
            if name in found:
                raise ValueError(f"two variants are called {name!r}; give each value once")
            found[name] = steps
        return found

    def _variant(self, value: Value) -> tuple[str, Steps]:
        if self.kind == "steps":
            steps: Any = value  # Any: the validator saw that they are steps
            return "steps-" + "-".join(getattr(step, "use", step.kind).rpartition(":")[2] for step in steps), steps
        field = self.looked_at
        if self.kind == "age":
            first, last = int(_tuple(value)[0]), int(_tuple(value)[-1])
            name = f"age-{first}" if first == last else f"age-{first}-{last}"
            when = f"{field} in {list(range(first, last + 1))}"
        elif self.kind == "domain":
            names = [str(domain) for domain in _tuple(value)]
            name = ("only-" if self.inverse else "without-") + "-".join(names)
            when = f"{field} not in {names!r}"
        else:
            threshold = float(_tuple(value)[0])
            name = f"{self.kind}-{threshold:g}"
            # 1 - T in the decimals that T was written in.
            when = f"{field} >= {round(1 - threshold, 12)!r}" if self.kind == "quality" else f"{field} <= {threshold!r}"
        if self.inverse:
            name, when = (name if self.kind == "domain" else f"{name}-inverse"), f"not ({when})"
        return re.sub(r"[^A-Za-z0-9_.-]+", "_", name), (KeepSpec(kind="keep", when=when),)


def _tuple(value: Value) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _said(value: Value) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)


def make_variants(base: Sequence[StepSpec], axes: Sequence[AblationAxis], cross: bool = False) -> dict[str, Steps]:
    """Steps of every variant by name: ``"base"``, and the base with one decision changed.

    Each is a whole curation: ``CurationSpec(steps=...)`` runs it, though ``PretrainersGuide`` shares the base's work.

    Args:
        base: what is done in all of them, what scores documents included.
        axes: decisions.
        cross: also every combination of one value from each of several axes.

    Raises:
        ValueError: two variants have one name.

    Example:
        >>> axis = AblationAxis(kind="quality", values=[0.9, 0.7])
        >>> variants = make_variants([], [axis])
        >>> {name: [step.when for step in steps] for name, steps in variants.items()}
        {'base': [], 'quality-0.9': ['quality >= 0.1'], 'quality-0.7': ['quality >= 0.3']}
    """
    choices = [list(axis.named().items()) for axis in axes]
    if cross:
        combined = [
            [chosen for chosen in combination if chosen is not None]
            for combination in product(*([None, *choice] for choice in choices))
        ]
    else:
        combined = [[], *([chosen] for choice in choices for chosen in choice)]
    found: dict[str, Steps] = {}
    for combination in combined:
        name = "+".join(name for name, _ in combination) or BASE
        if name in found:
            raise ValueError(f"two variants are called {name!r}; give each value once")
        found[name] = (*base, *(step for _, steps in combination for step in steps))
    return found


def year_of(value: Any) -> int | None:  # Any: what documents' metadata hold
    """The year of a date; None for what is no date.

    Args:
        value: a whole number or its digits, a date in ISO 8601, or one that names its month in English, as in e-mail.

    Example:
        >>> year_of(2019), year_of("2019-05-01T10:00:00Z"), year_of("13-Jun-2000"), year_of("May"), year_of(None)
        (2019, 2019, 2000, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if not isinstance(value, str):
        return int(value) if float(value).is_integer() else None
    text = value.strip()
    if re.fullmatch(r"\d{1,4}", text):
        return int(text)
    if re.fullmatch(r"\d{4}-\d{2}", text):  # a month, which datetime does not read
        text += "-01"
    try:
        return datetime.fromisoformat(text).year
    except ValueError:
        named = re.sub(r"(?<=\d)-(?=[A-Za-z])|(?<=[A-Za-z])-(?=\d)", " ", text)
        found = parsedate(named) or parsedate(f"{named} 00:00:00")  # a date without a time is none to parsedate
        return found[0] if found else None


def ablation_table(results: Mapping[str, Mapping[str, ArrayLike]]) -> pd.DataFrame:
    """What each variant changed, with paired 95 % intervals over the evaluation items.

    Args:
        results: variant -> metric -> one value for each item, the same items in every variant; ``"base"`` is among
            them.

    Returns:
        One row for each other variant and metric: ``variant``, ``metric``, ``value``, ``base``, ``difference`` (variant
        minus base), ``low``, ``high``, ``items``. The interval speaks of other items, not of other seeds.

    Raises:
        ValueError: there is no base, or a variant has a metric or number of items that the base has not.
    """
    import pandas as pd

    if BASE not in results:
        raise ValueError(f"results need {BASE!r} to compare with; got {sorted(results)}.")
    rows = []
    for variant, metrics in results.items():
        for metric, given in metrics.items() if variant != BASE else ():
            if metric not in results[BASE]:
                raise ValueError(f"variant {variant!r} has {metric!r} and the base has {sorted(results[BASE])}.")
            values, base = np.asarray(given, dtype=np.float64), np.asarray(results[BASE][metric], dtype=np.float64)
            found = paired_bootstrap(values, base)
            rows.append((variant, metric, values.mean(), base.mean(), found.mean, found.low, found.high, found.n))
    columns = ["variant", "metric", "value", "base", "difference", "low", "high", "items"]
    return pd.DataFrame(rows, columns=columns)
