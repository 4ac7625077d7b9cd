"""The D-CPT law across domains: a new domain needs a short probe instead of a table of runs.

    L(N, D, r, K) = L(N, D, r) + F / K^mu,    K = 1 / k1 + w k2

k1 is the domain's loss before training, k2 how fast it falls at the beginning. A larger K is an easier domain.

Source: Que et al., "D-CPT Law: Domain-specific Continual Pre-Training Scaling Law for Large Language Models",
    arXiv:2406.01375, the cross-domain law.
Differs: the form of K is from a second-hand account and unverified. It has two weights there; the scale of both
    together is F's, so one is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from headwater.core.curves import NormalPrior, draw_starts, fit_robust
from headwater.diagnose.dcpt_law import WEAK, DCPTLaw, LawPrior, LawProblem
from headwater.diagnose.mixture_choice import r_squared
from headwater.diagnose.mixture_table import TableError, check_table

__all__ = ["CrossDomainLaw", "probe"]

Floats = NDArray[np.float64]


def probe(table: pd.DataFrame) -> tuple[float, float]:
    """What a short run says of a domain: its loss at the start and how fast it falls.

    Args:
        table: columns ``D`` (0 allowed) and ``loss_domain`` of one run, about 1 % as long as those that are predicted.

    Returns:
        k1 in nats, k2 in nats per million tokens, by least squares over the run.

    Raises:
        TableError: fewer than two values of D, or a loss that does not fall.
    """
    if table["D"].nunique() < 2:
        raise TableError(f"a probe needs losses at 2 or more values of D; got {table['D'].nunique()}.")
    ordered = table.sort_values("D")
    D, loss = ordered["D"].to_numpy(np.float64) / 1e6, ordered["loss_domain"].to_numpy(np.float64)
    slope, _ = np.polyfit(D, loss, 1)
    if slope >= 0:
        raise TableError(f"the domain loss does not fall along the probe ({loss[0]:.4g} to {loss[-1]:.4g} nats).")
    return float(loss[0]), -float(slope)


@dataclass(frozen=True)
class CrossDomainLaw:
    """One law of the domain loss for several domains.

    Attributes:
        law: what the domains share.
        F: scale of the domain's term.
        mu: its exponent.
        w: weight of the rate of decline against the initial loss.
        r2: share of the losses' variance that is explained in the table.
    """

    law: DCPTLaw
    F: float
    mu: float
    w: float
    r2: float

    @classmethod
    def fit(
        cls,
        table: pd.DataFrame,
        probes: Mapping[str, tuple[float, float]],
        *,
        starts: int = 64,
        delta: float = 1e-3,
        prior: LawPrior | None = WEAK,
        seed: int = 0,
    ) -> CrossDomainLaw:
        """Fit to a table with a column ``domain`` and the ``probe`` of each.

        Raises:
            TableError: see ``check_table``; fewer than three domains; or a domain without a probe.
        """
        if "domain" not in table.columns or table["domain"].nunique() < 3:
            raise TableError("a law across domains needs a column `domain` with at least 3 of them.")
        checked = check_table(table)
        if missing := sorted(set(checked["domain"]) - set(probes)):
            raise TableError(f"no probe of domain {', '.join(missing)}; run `probe` on a short run of each.")
        k = np.array([probes[name] for name in checked["domain"]])
        unit = np.exp(np.log(k).mean(axis=0))
        hardness, decline = unit[0] / k[:, 0], k[:, 1] / unit[1]
        problem = LawProblem.of(checked, "domain", "full", delta, prior, False)
        shared = len(problem.free)

        def residuals(theta: Floats) -> tuple[Floats, Floats]:
            loss, gradient = problem.predict(theta[:shared])
            F, mu, w = np.exp(theta[shared:])
            K = hardness + w * decline
            own = F * K**-mu
            loss = loss + own
            extra = np.stack([own, -mu * np.log(K) * own, -mu * w * decline / K * own], axis=-1)
            return np.log(loss) - problem.log_loss, np.hstack([gradient, extra]) / loss[:, None]

        bounds = np.vstack([problem.bounds, np.log([(1e-6, 20.0), (0.02, 8.0), (1e-3, 1e3)])])
        penalties = []
        if prior is not None:
            centre = np.log([*(prior.centre[name] for name in problem.free), 0.2, 1.0, 1.0])
            sd = np.array([*(prior.sd[name] for name in problem.free), 3.0, 1.0, 1.5])
            penalties.append(NormalPrior(centre, sd, prior.weight))
        found = fit_robust(residuals, bounds, draw_starts(bounds, starts, seed), delta=delta, penalties=penalties)
        F, mu, w = np.exp(found.parameters[shared:]).tolist()
        residual, _ = residuals(found.parameters)
        return cls(
            problem.law(found.parameters[:shared]),
            F * problem.unit[2] * float(unit[0]) ** -mu,
            mu,
            w / float(unit[0] * unit[1]),
            r_squared(np.exp(problem.log_loss + residual), np.exp(problem.log_loss)),
        )

    def predict(self, N: ArrayLike, D: ArrayLike, r: ArrayLike, k1: float, k2: float) -> Floats:
        """Domain loss of a domain with the probe ``k1, k2``."""
        return self.for_domain(k1, k2).predict(N, D, r)

    def for_domain(self, k1: float, k2: float) -> DCPTLaw:
        """The law of one domain, its own term added to E."""
        return replace(self.law, E=self.law.E + self.F * (1 / k1 + self.w * k2) ** -self.mu)
