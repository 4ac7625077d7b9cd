"""The D-CPT law: from a few small runs, the losses of any mixture of domain and general text, and so the best mixture.

    L(N, D, r) = E + A / N^alpha + B r^eta / D^beta + C / (r + eps)^gamma

N parameters, D tokens of continued pretraining, r the share of them that is like the text on which L is measured: the
law is fitted twice, to the domain loss with r = r_d and to the general loss with r = 1 - r_d. All nine parameters are
positive, so L falls with N and D, and at a fixed r it is Chinchilla's law. It falls with r as well only where
B eta r^(eta - 1) / D^beta < C gamma / (r + eps)^(gamma + 1), which a fit may violate.

Source: Que et al., "D-CPT Law: Domain-specific Continual Pre-Training Scaling Law for Large Language Models",
    arXiv:2406.01375, section 3.
Differs: a weak prior on the logarithms of the parameters, without which sizes are extrapolated badly from two of them.
    How the paper keeps L falling with r is unverified; here it is checked, and enforced on demand. Unseen domains are
    in `dcpt_domains`.
Needs: at least 12 evaluations at 3 mixtures and 3 lengths; 3 sizes to extrapolate to another one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from headwater.core.budget import Cost
from headwater.core.curves import NormalPrior, RobustFit, bootstrap_fit, draw_starts, fit_robust, huber
from headwater.core.recipe import Spec, load_recipe
from headwater.core.rng import numpy_generator
from headwater.core.run import execute
from headwater.diagnose.base import Diagnose, Diagnosis, Question
from headwater.diagnose.mixture_choice import (
    Choice,
    Validation,
    choose_ratio,
    choose_ratio_scarce,
    predict_table,
    r_squared,
    validation,
)
from headwater.diagnose.mixture_table import COLUMNS, RunPlan, TableError, Target, check_table, from_runs, read_table

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = [
    "WEAK",
    "Allocation",
    "DCPTLaw",
    "LawDraws",
    "LawFit",
    "LawPrior",
    "LawProblem",
    "MixtureRatio",
    "Scarce",
    "TradeOff",
    "bootstrap_law",
    "choose_compute",
    "choose_ratio",
    "choose_ratio_scarce",
    "cross_validate",
    "fit_law",
    "from_runs",
]

Floats = NDArray[np.float64]
Form = Literal["full", "additive"]
Monotone = Literal["check"] | bool

NAMES = ("E", "A", "alpha", "B", "eta", "beta", "C", "gamma", "eps")
TRUSTED_FACTOR = 4.0
"""How far beyond the largest N or D of its table a law is believed without a warning."""
FEWEST_AGREEING = 8

# Of the law with N, D and the loss divided by their geometric means.
_SCALE, _EXPONENT = (1e-6, 20.0), (0.02, 3.0)
_BOUNDS = {"E": (1e-4, 2.0), "A": _SCALE, "alpha": _EXPONENT, "B": _SCALE, "eta": (0.05, 10.0), "beta": _EXPONENT}
_BOUNDS |= {"C": _SCALE, "gamma": (0.02, 8.0), "eps": (1e-3, 5.0)}


@dataclass(frozen=True)
class LawPrior:
    """Independent normals on the logarithms of the parameters, of the law in geometric means of N, D and loss.

    Attributes:
        centre: median of each parameter.
        sd: of its logarithm.
        weight: in the unit of a squared log residual.
    """

    centre: Mapping[str, float]
    sd: Mapping[str, float]
    weight: float


WEAK = LawPrior(
    centre={"E": 0.5, "A": 0.2, "alpha": 0.34, "B": 0.2, "eta": 1.0, "beta": 0.34, "C": 0.2, "gamma": 1.0, "eps": 0.3},
    sd={"E": 3, "A": 3, "alpha": 0.5, "B": 3, "eta": 1, "beta": 0.5, "C": 3, "gamma": 1, "eps": 1.5},
    weight=1e-5,  # a misfit of 0.3 % in one row outweighs a parameter one sd from its median
)
"""Exponents near Chinchilla's 0.34 (Hoffmann et al., arXiv:2203.15556), everything else within a factor of some ten."""


# -- the law


@dataclass(frozen=True)
class DCPTLaw:
    """The law with its nine parameters, for N in parameters, D in tokens and losses in the unit of its table.

    A = 0 leaves the size out; eta = 0 makes the law additive, without interaction of mixture and length.
    """

    E: float
    A: float
    alpha: float
    B: float
    eta: float
    beta: float
    C: float
    gamma: float
    eps: float

    def __post_init__(self) -> None:
        wrong = {name: value for name, value in asdict(self).items() if not (value >= 0 and math.isfinite(value))}
        if wrong or self.eps == 0:
            raise ValueError(f"parameters must be finite and >= 0, eps > 0; got {wrong or {'eps': self.eps}}.")

    def predict(self, N: ArrayLike, D: ArrayLike, r: ArrayLike) -> Floats:
        """Loss at ``N`` parameters, ``D`` tokens and a share ``r`` of the target's own text; shapes broadcast.

        Raises:
            ValueError: N or D is not positive, or r is outside [0, 1].
        """
        loss: Floats = _terms(np.array(astuple(self)), *_inputs(N, D, r)).sum(axis=0)
        return loss

    def grad(self, N: ArrayLike, D: ArrayLike, r: ArrayLike) -> Floats:
        """Derivatives by the logarithms of the nine parameters, in the order of the fields; shape ``(..., 9)``."""
        parameters, inputs = np.array(astuple(self)), _inputs(N, D, r)
        return _log_gradient(parameters, _terms(parameters, *inputs), *inputs)

    def slope(self, D: ArrayLike, r: ArrayLike) -> Floats:
        """dL/dr; infinite at r = 0 where 0 < eta < 1."""
        _, tokens, share = _inputs(1.0, D, r)
        with np.errstate(divide="ignore"):
            rise = self.B * self.eta * np.power(share, self.eta - 1) if self.B * self.eta else np.zeros_like(share)
        fall: Floats = self.C * self.gamma * np.power(share + self.eps, -self.gamma - 1)
        return rise * np.power(tokens, -self.beta) - fall

    def monotone(self, D_min: float) -> bool:
        """Whether the loss falls with r on all of [0, 1] from ``D_min`` tokens on.

        The rise is strongest at the fewest tokens; for eta >= 1 it grows with r while the fall weakens, so r = 1 is the
        worst place; for 0 < eta < 1 it is infinite at r = 0.
        """
        return self.B * self.eta == 0 or (self.eta >= 1 and float(self.slope(D_min, 1.0)) < 0)

    def to_json(self) -> str:
        """The parameters as a JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of ``to_json``."""
        return cls(**json.loads(text))


def _inputs(N: ArrayLike, D: ArrayLike, r: ArrayLike) -> tuple[Floats, Floats, Floats]:
    size, tokens, share = np.broadcast_arrays(*(np.asarray(value, dtype=np.float64) for value in (N, D, r)))
    if not ((size > 0).all() and (tokens > 0).all() and ((share >= 0) & (share <= 1)).all()):
        raise ValueError("N and D must be > 0 and r in [0, 1].")
    return size, tokens, share


def _terms(parameters: Floats, N: Floats, D: Floats, r: Floats) -> Floats:
    """The four terms, ``(4, ...)``."""
    E, A, alpha, B, eta, beta, C, gamma, eps = parameters
    terms = np.empty((4, *r.shape))
    terms[0], terms[1], terms[2], terms[3] = E, A * N**-alpha, B * r**eta * D**-beta, C * (r + eps) ** -gamma
    return terms


def _log_gradient(parameters: Floats, terms: Floats, N: Floats, D: Floats, r: Floats) -> Floats:
    """Derivatives of the loss by the logarithms of the parameters, ``(..., 9)``."""
    _, _, alpha, _, eta, beta, _, gamma, eps = parameters
    constant, of_size, of_tokens, of_share = terms
    log_r = np.log(np.where(r > 0, r, 1.0))  # at r = 0 the term is 0 and so is its derivative
    gradient = np.empty((9, *r.shape))
    gradient[0] = constant
    gradient[1] = of_size
    gradient[2] = -alpha * np.log(N) * of_size
    gradient[3] = of_tokens
    gradient[4] = eta * log_r * of_tokens
    gradient[5] = -beta * np.log(D) * of_tokens
    gradient[6] = of_share
    gradient[7] = -gamma * np.log(r + eps) * of_share
    gradient[8] = -gamma * eps / (r + eps) * of_share
    return np.moveaxis(gradient, 0, -1)


# -- fitting


@dataclass(frozen=True, eq=False)
class LawProblem:
    """A table prepared for fitting: N, D and loss by their geometric means, and what is fitted how."""

    N: Floats
    D: Floats
    r: Floats
    log_loss: Floats
    unit: tuple[float, float, float]
    runs: NDArray[Any]  # Any: numbers or names
    free: tuple[str, ...]
    delta: float
    prior: LawPrior | None
    monotone: bool

    @classmethod
    def of(
        cls, table: pd.DataFrame, target: Target, form: Form, delta: float, prior: LawPrior | None, monotone: bool
    ) -> LawProblem:
        """Prepare a checked table; parameters that it cannot speak of are left out."""
        N, D, loss = (table[name].to_numpy(np.float64) for name in ("N", "D", f"loss_{target}"))
        r = table["r_d"].to_numpy(np.float64)
        unit = tuple(float(np.exp(np.log(values).mean())) for values in (N, D, loss))
        left_out = {"A", "alpha"} if len(np.unique(N)) == 1 else set()
        left_out |= {"eta"} if form == "additive" else set()
        return cls(
            N / unit[0],
            D / unit[1],
            r if target == "domain" else 1 - r,
            np.log(loss / unit[2]),
            (unit[0], unit[1], unit[2]),
            table["run"].to_numpy(),
            tuple(name for name in NAMES if name not in left_out),
            delta,
            prior,
            monotone,
        )

    @property
    def columns(self) -> list[int]:
        """Positions of the free parameters among the nine."""
        return [NAMES.index(name) for name in self.free]

    @property
    def bounds(self) -> Floats:
        """Of the logarithms of the free parameters, ``(free, 2)``."""
        bounds = {**_BOUNDS, "eta": (1.0, _BOUNDS["eta"][1])} if self.monotone else _BOUNDS
        logs: Floats = np.log([bounds[name] for name in self.free])
        return logs

    def parameters(self, theta: Floats) -> Floats:
        """The nine, 0 where left out, from the logarithms of the free ones."""
        full = np.zeros(len(NAMES))
        full[self.columns] = np.exp(theta)
        return full

    def predict(self, theta: Floats) -> tuple[Floats, Floats]:
        """Losses ``(rows,)`` and their derivatives by ``theta``."""
        parameters = self.parameters(theta)
        terms = _terms(parameters, self.N, self.D, self.r)
        gradient = _log_gradient(parameters, terms, self.N, self.D, self.r)
        return terms.sum(axis=0), gradient[:, self.columns]

    def residuals(self, theta: Floats) -> tuple[Floats, Floats]:
        """Log residuals ``(rows,)`` and their derivatives by ``theta``."""
        loss, gradient = self.predict(theta)
        return np.log(loss) - self.log_loss, gradient / loss[:, None]

    def fit(self, starts: Floats, weights: Floats | None = None) -> RobustFit:
        """Descend from ``starts (s, free)``, rows weighted by ``weights``."""
        penalties: list[Any] = []  # Any: penalties of several kinds
        if self.prior is not None:
            centre, sd = (np.array([of[name] for name in self.free]) for of in (self.prior.centre, self.prior.sd))
            penalties.append(NormalPrior(np.log(centre), sd, self.prior.weight))
        if self.monotone and "eta" in self.free:
            penalties.append(self.rising)
        return fit_robust(self.residuals, self.bounds, starts, delta=self.delta, penalties=penalties, weights=weights)

    def rising(self, theta: Floats) -> tuple[float, Floats]:
        """Penalty on log(rise / fall) of the loss with r above -0.01 at its worst place, r = 1 at the fewest tokens."""
        weight, margin = 100.0, 0.01
        _, _, _, B, eta, beta, C, gamma, eps = self.parameters(theta)
        log_d = math.log(self.D.min())
        rise, fall = math.log(B * eta) - beta * log_d, math.log(C * gamma) - (gamma + 1) * math.log1p(eps)
        excess = max(0.0, rise - fall + margin)
        by_name = {"B": 1.0, "eta": 1.0, "beta": -beta * log_d, "C": -1.0}
        by_name |= {"gamma": gamma * math.log1p(eps) - 1, "eps": (gamma + 1) * eps / (1 + eps)}
        slope = np.array([by_name.get(name, 0.0) for name in self.free])
        return 0.5 * weight * excess**2, weight * excess * slope

    def law(self, theta: Floats) -> DCPTLaw:
        """The law in the table's units."""
        E, A, alpha, B, eta, beta, C, gamma, eps = self.parameters(theta).tolist()
        size, tokens, loss = self.unit
        return DCPTLaw(
            E * loss, A * loss * size**alpha, alpha, B * loss * tokens**beta, eta, beta, C * loss, gamma, eps
        )


@dataclass(frozen=True, eq=False)
class LawFit:
    """A fitted law and how far to trust it.

    Attributes:
        law: the best of all descents.
        target: which loss it predicts.
        r2: share of the losses' variance that it explains, in the table.
        huber: mean Huber loss of the log residuals.
        residuals: ``(rows,)``, log of predicted over measured loss.
        converged_starts: descents that ended within 1 % of the best objective.
        monotone_on_hull: whether the loss falls with r everywhere between the table's smallest and largest r and D.
        identifiability: standard error of each fitted parameter's logarithm; infinite where the data say nothing.
        sizes: the values of N in the table.
        most_tokens: its largest D.
        warnings: in words.
    """

    law: DCPTLaw
    target: Target
    r2: float
    huber: float
    residuals: Floats
    converged_starts: int
    monotone_on_hull: bool
    identifiability: Mapping[str, float]
    sizes: tuple[float, ...]
    most_tokens: float
    warnings: tuple[str, ...]
    _problem: LawProblem = field(repr=False)
    _theta: Floats = field(repr=False)

    def predict(self, N: ArrayLike, D: ArrayLike, r: ArrayLike) -> Floats:
        """As the law's, but a law of a single size refuses every other one.

        Raises:
            ValueError: see above.
        """
        if len(self.sizes) == 1 and not np.allclose(N, self.sizes[0], rtol=0.01):
            raise ValueError(
                f"this law was fitted to one model size, N = {self.sizes[0]:g}, and knows of no other; add runs of two "
                "more sizes to its table."
            )
        return self.law.predict(N, D, r)

    def beyond(self, N: float, D: float) -> tuple[str, ...]:
        """What is doubtful about a prediction at N and D, in words."""
        found = []
        for name, value, largest in (("N", N, max(self.sizes)), ("D", D, self.most_tokens)):
            if value > TRUSTED_FACTOR * largest:
                found.append(
                    f"{name} = {value:g} is {value / largest:.1f} times the largest {name} in the table; the law is "
                    f"extrapolated beyond {TRUSTED_FACTOR:g} times"
                )
        if len(self.sizes) == 2 and not any(math.isclose(N, size, rel_tol=0.01) for size in self.sizes):
            found.append("the loss at another size rests on two sizes and on the prior; add a run at the size wanted")
        return tuple(found)


def fit_law(
    table: pd.DataFrame,
    target: Target = "domain",
    *,
    starts: int = 64,
    delta: float = 1e-3,
    prior: LawPrior | None = WEAK,
    monotone: Monotone = "check",
    form: Form = "full",
    seed: int = 0,
) -> LawFit:
    """Fit the law to a table of runs (see `mixture_table`).

    Args:
        table: of one domain.
        target: which of the two losses.
        starts: descents; more of them never give a worse fit.
        delta: of Huber's loss of the log residuals.
        prior: None for none.
        monotone: ``"check"`` warns where the loss rises with r; True fits under the condition that it does not, which
            costs fit and chose shares that were too low in our trials; False says nothing.
        form: ``"additive"`` is the rival with eta = 0.
        seed: of the starts.

    Raises:
        TableError: see ``check_table``; several domains; or two sizes without a prior.
        ValueError: ``starts`` is below 1.
    """
    checked = check_table(table)
    if "domain" in checked and checked["domain"].nunique() > 1:
        raise TableError(
            f"the table has {checked['domain'].nunique()} domains; a law is of one. Fit one at a time, or use "
            "CrossDomainLaw."
        )
    sizes = tuple(np.unique(checked["N"]).tolist())
    if len(sizes) == 2 and prior is None:
        raise TableError("two model sizes cannot fix E, A and alpha; give a third size, or prior=WEAK.")
    if starts < 1:
        raise ValueError(f"starts must be at least 1; got {starts}.")
    problem = LawProblem.of(checked, target, form, delta, prior, monotone is True)
    found = problem.fit(draw_starts(problem.bounds, starts, seed))
    law, (residuals, jacobian) = problem.law(found.parameters), problem.residuals(found.parameters)
    falls = _falls_on_hull(law, problem)
    warnings = []
    if starts >= FEWEST_AGREEING > found.agreeing:
        warnings.append(
            f"only {found.agreeing} of {starts} descents agree on the {target} law within 1 %; the fit depends on its "
            "starts. Give more starts, or more varied runs"
        )
    if monotone == "check" and not falls:
        warnings.append(f"the {target} law rises with its own text's share somewhere between the measured mixtures")
    if len(sizes) == 1:
        warnings.append("one model size: the term in N is left out, and other sizes are refused")
    return LawFit(
        law,
        target,
        r_squared(np.exp(problem.log_loss + residuals), np.exp(problem.log_loss)),
        float(huber(residuals, delta).mean()),
        residuals,
        found.agreeing,
        falls,
        dict(zip(problem.free, _log_errors(residuals, jacobian), strict=True)),
        sizes,
        float(checked["D"].max()),
        tuple(warnings),
        problem,
        found.parameters,
    )


def _falls_on_hull(law: DCPTLaw, problem: LawProblem) -> bool:
    # The rise weakens with D, so the fewest tokens decide; r = 0 itself is left out, where eta < 1 always rises.
    shares = np.linspace(problem.r.min(), problem.r.max(), 101)[1:]
    return bool((law.slope(problem.D.min() * problem.unit[1], shares) < 0).all())


def _log_errors(residuals: Floats, jacobian: Floats) -> list[float]:
    """Standard errors of least squares; infinite for a parameter with a part in a direction that moves no residual."""
    spread = float(residuals @ residuals) / max(1, len(residuals) - jacobian.shape[1])
    _, singular, directions = np.linalg.svd(jacobian, full_matrices=False)
    blind = singular <= 1e-9 * singular[0]
    variance = ((directions[~blind] / singular[~blind, None]) ** 2).sum(axis=0) * spread
    variance[(np.abs(directions[blind]) > 1e-6).any(axis=0)] = math.inf
    errors: list[float] = np.sqrt(variance).tolist()
    return errors


@dataclass(frozen=True)
class LawDraws:
    """Laws fitted to resampled runs."""

    laws: tuple[DCPTLaw, ...]

    def predict(self, N: ArrayLike, D: ArrayLike, r: ArrayLike) -> Floats:
        """Losses under every law, ``(draws, ...)``."""
        return np.stack([law.predict(N, D, r) for law in self.laws])

    def interval(self, N: ArrayLike, D: ArrayLike, r: ArrayLike, confidence: float = 0.95) -> tuple[Floats, Floats]:
        """Percentile interval of the loss, low and high in the shape of the inputs."""
        low, high = np.quantile(self.predict(N, D, r), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
        return low, high


def bootstrap_law(fit: LawFit, n: int = 200, by: Literal["run", "point"] = "run", seed: int = 0) -> LawDraws:
    """Refit to resampled runs: the evaluations of one run share its luck, so points alone would look too certain.

    Both laws of a table, under one seed, are refitted to the same draws, so quantities of both are paired.

    Args:
        fit: the law; each refit starts from it and from four places around it.
        n: resamples.
        by: what is resampled.
        seed: of the resamples.

    Raises:
        ValueError: a single run, or ``n`` below 1.
    """
    problem = fit._problem
    nearby = fit._theta + 0.3 * numpy_generator(seed, "nearby starts").standard_normal((4, len(fit._theta)))
    starts = np.vstack([fit._theta, nearby])
    groups = problem.runs if by == "run" else np.arange(len(problem.runs))
    drawn = bootstrap_fit(lambda weights: problem.fit(starts, weights).parameters, groups, n, seed)
    return LawDraws(tuple(problem.law(theta) for theta in drawn))


def cross_validate(
    table: pd.DataFrame, target: Target = "domain", *, by: Literal["N", "D", "r"], **options: Any
) -> Validation:
    """Fit without a part of the table and predict it: every size, every ratio in turn, or the last third of D.

    Args:
        table: as in ``fit_law``.
        target: which loss.
        by: what is left out.
        options: Any: of ``fit_law``, passed on.

    Raises:
        TableError: what is left is too little; for ``by="N"`` there must be three sizes.
    """
    checked = check_table(table)
    column = "r_d" if by == "r" else by
    levels = np.unique(checked[column])
    if by == "N" and len(levels) < 3:
        raise TableError(f"leaving a size out needs at least 3 sizes; the table has {len(levels)}.")
    folds = [levels[-math.ceil(len(levels) / 3) :]] if by == "D" else [levels[i : i + 1] for i in range(len(levels))]
    pairs = []
    for fold in folds:
        out = checked[column].isin(fold)
        fit = fit_law(checked[~out], target, **options)
        pairs.append(predict_table(fit, checked[out], target))
    predicted, measured = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    return validation(predicted, measured)


@dataclass(frozen=True)
class Allocation:
    """How to spend an amount of computation: a size, a length, and the domain loss predicted there."""

    N: float
    D: float
    loss: float
    warnings: tuple[str, ...]


def choose_compute(domain: LawFit, r: float, flops: float) -> Allocation:
    """Return the size and length with the lowest loss at ``6 N D = flops`` and a share ``r``.

    In closed form, from dL/dN = 0: ``N^(alpha + beta) = alpha A / (beta B r^eta) (flops / 6)^beta``.

    Args:
        domain: a law of at least two sizes.
        r: share of the target's own text, in (0, 1].
        flops: of the whole training.

    Raises:
        ValueError: ``r`` or ``flops`` is out of range, or the law is of one size.
    """
    law = domain.law
    if not (0 < r <= 1 and flops > 0):
        raise ValueError(f"r must be in (0, 1] and flops > 0; got r={r}, flops={flops}.")
    if law.A == 0:
        raise ValueError("this law was fitted to one model size and cannot choose another; add runs of two more sizes.")
    ratio = law.alpha * law.A / (law.beta * law.B * r**law.eta)
    N = float((ratio * (flops / 6) ** law.beta) ** (1 / (law.alpha + law.beta)))
    D = flops / (6 * N)
    return Allocation(N, D, float(law.predict(N, D, r)), domain.beyond(N, D))


# -- the recipe


class TradeOff(Spec):
    """The lowest domain loss while general text suffers within bounds."""

    tolerance: float = Field(
        default=0.03,  # section 4.4
        gt=-1,
        description="how much higher than without domain text the general loss may be, as a fraction",
    )
    N: float | None = Field(default=None, gt=0, description="parameters; the table's largest by default")
    D: float | None = Field(default=None, gt=0, description="tokens; the table's largest by default")


class Scarce(Spec):
    """The lowest domain loss from a limited amount of domain text."""

    D_domain: float = Field(gt=0, description="domain tokens there are")
    N: float | None = Field(default=None, gt=0, description="parameters; the table's largest by default")


class MixtureRatio(Diagnose):
    """Which share of domain text to continue pretraining with."""

    id: ClassVar[str] = "dcpt_law"
    question: ClassVar[Question] = "mixture"

    runs: Path | RunPlan = Field(
        description="a table (.csv, .parquet) with columns N, D, r_d, loss_domain, loss_general; or runs to make"
    )
    goal: TradeOff | Scarce = Field(default=TradeOff(), description="what the share is to be best for")
    starts: int = Field(default=64, ge=8, description="descents of each fit")
    monotone: Literal["check"] | bool = Field(
        default="check", description="whether the loss must fall with its own text's share: warn, enforce, or ignore"
    )
    bootstrap: int = Field(default=200, ge=0, description="resampled fits behind an interval, at least 100; 0: none")

    def diagnose(self, run: Run) -> Diagnosis:
        """Fit both laws, choose the share."""
        raw, cost = self._table(run)
        table = check_table(raw)
        run.record_data("table", _fingerprint(table))
        laws: dict[Target, LawFit] = {
            target: fit_law(table, target, starts=self.starts, monotone=self.monotone, seed=self.seed)
            for target in ("domain", "general")
        }
        draws = {t: bootstrap_law(fit, self.bootstrap, seed=self.seed) for t, fit in laws.items() if self.bootstrap}
        choice, N = self._choice(laws, draws, table)
        return Diagnosis(
            score=choice.r,
            unit="share of domain tokens",
            better="none",
            interval=choice.interval,
            rows=_rows(table, laws),
            curve=self._curve(laws, draws, table, N),
            advice=self._advice(choice),
            warnings=tuple(dict.fromkeys((*laws["domain"].warnings, *laws["general"].warnings, *choice.warnings))),
            metrics=_figures(laws, choice),
            artefacts={
                **{f"law_{target}": asdict(fit.law) for target, fit in laws.items()},
                "choice": asdict(choice),
            },
            usage=_USAGE,
            cost=cost,
        )

    def _table(self, run: Run) -> tuple[pd.DataFrame, Cost]:
        if isinstance(self.runs, Path):
            return read_table(self.runs), Cost()
        recipes = self.runs.recipes(self.seed)
        results = [execute(load_recipe(data), run.path(name), resume=True) for name, data in recipes.items()]
        cost = sum((Cost.from_dict(result.cost) for result in results), Cost())
        return from_runs([run.path(name) for name in recipes], self.runs.domain.name), cost

    def _choice(
        self, laws: Mapping[Target, LawFit], draws: Mapping[Target, LawDraws], table: pd.DataFrame
    ) -> tuple[Choice, float]:
        N, D = self.goal.N or float(table["N"].max()), float(table["D"].max())
        if isinstance(self.goal, Scarce):
            drawn = draws["domain"].laws if draws else None
            return choose_ratio_scarce(
                laws["domain"], N, self.goal.D_domain, draws=drawn, confidence=self.confidence
            ), N
        both = (draws["general"].laws, draws["domain"].laws) if draws else None
        tokens = self.goal.D or D
        return choose_ratio(
            laws["general"], laws["domain"], N, tokens, self.goal.tolerance, draws=both, confidence=self.confidence
        ), N

    def _curve(
        self, laws: Mapping[Target, LawFit], draws: Mapping[Target, LawDraws], table: pd.DataFrame, N: float
    ) -> dict[str, list[float]]:
        """Domain loss against the share."""
        if isinstance(self.goal, Scarce):
            r = np.linspace(0.01, 1, 100)
            D = self.goal.D_domain / r
        else:
            r = np.linspace(0, 1, 101)
            D = np.full_like(r, self.goal.D or float(table["D"].max()))
        curve = {"x": r.tolist(), "y": laws["domain"].predict(N, D, r).tolist()}
        if draws:
            low, high = draws["domain"].interval(N, D, r, self.confidence)
            curve |= {"lo": low.tolist(), "hi": high.tolist()}
        return curve

    def _advice(self, choice: Choice) -> list[str]:
        spread = "" if choice.interval is None else f" ({choice.interval[0]:.2f} to {choice.interval[1]:.2f})"
        if not choice.feasible:
            return [f"No mixture keeps the general loss at or below {choice.limit:.4g} nats; raise the tolerance."]
        sentence = f"Take {choice.r:.2f}{spread} of the tokens from the domain: predicted loss {choice.loss_domain:.4g}"
        if choice.loss_general is None:
            return [f"{sentence} nats there."]
        return [f"{sentence} nats there and {choice.loss_general:.4g} on general text (limit {choice.limit:.4g})."]


_USAGE = """`law_domain.json` and `law_general.json` hold the parameters of

    L(N, D, r) = E + A / N^alpha + B r^eta / D^beta + C / (r + eps)^gamma

N parameters, D tokens, L in nats; r is the share of domain tokens for the domain loss, one minus it for the general.
"""


def _figures(laws: Mapping[Target, LawFit], choice: Choice) -> dict[str, float]:
    figures = {"loss_domain": choice.loss_domain, "feasible": float(choice.feasible)}
    if choice.loss_general is not None:
        figures["loss_general"] = choice.loss_general
    for target, fit in laws.items():
        figures[f"r2/{target}"] = fit.r2
        figures[f"agreeing_starts/{target}"] = float(fit.converged_starts)
    return figures


def _rows(table: pd.DataFrame, laws: Mapping[Target, LawFit]) -> list[dict[str, Any]]:  # Any: JSON data
    shown = table[["run", "N", "D", "r_d", "loss_domain", "loss_general"]].copy()
    for target, fit in laws.items():
        shown[f"predicted_{target}"] = predict_table(fit, table, target)[0]
    return [dict(zip(shown.columns, row, strict=True)) for row in shown.itertuples(index=False, name=None)]


def _fingerprint(table: pd.DataFrame) -> str:
    return hashlib.sha256(table[list(COLUMNS)].to_csv(index=False).encode()).hexdigest()[:32]
