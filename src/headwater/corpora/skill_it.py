"""Skill-it: weigh groups of data by what they do for each other and by what the model does not know yet.

    p_1[i]      ~  exp(eta * sum_j A_ij)                                           before anything is measured
    p_(t+1)[i]  ~  exp(eta * sum over s = t-w+1 .. t of sum_j A_ij L_j(f_s))       after round t

A is the skill graph, k training skills by m evaluation skills; L_j(f_s) is the loss on skill j of the model after round
s, w the window. Training skills gain what they and the skills that they help still lose.

Source: Chen et al., "Skill-it! A Data-Driven Skills Framework for Understanding and Training Language Models",
    arXiv:2307.14430, algorithms 1 and 2; defaults as in the LEGO experiment: T = 6 rounds, eta 0.5, w 3.
Differs: the window is a sum over the last w rounds, as in the text; the authors' code counts evaluations, and takes
    their mean where there are target skills (divide eta by w for the same). Its normalised losses, decaying eta and
    edges, and fixed share for lone skills are left out. Losses are nats per target, EOS included. A run on a pair
    answers for both directions of its edge.
Needs: documents in groups, by a column or by source; validation documents of each; an architecture.

What eta does: it multiplies window * row sum of A * loss, so 0.5 means little on an identity and much on a dense graph.
On a small world of one prerequisite and three dependents eta 1 gave the prerequisite everything, since held-out losses
of the dependents stay high after it is mastered, and eta 0.2 did nothing. The range of the exponents is looked at in
every round, and a warning comes above 3. A dense graph with equal edges lost to equal shares there: weigh edges by what
they gain (``weight: relative``) or raise tau. A graph that is empty or complete promises nothing over equal shares.
Pairwise reads a pair for twice the steps, so a skill that H steps alone do not finish seems helped by every other:
raise H until its own loss is flat.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, field_validator
from scipy.special import softmax

from headwater.core.cache import atomic_write_text
from headwater.core.recipe import CorpusRef, Spec
from headwater.corpora.base import CorpusRecipe
from headwater.corpora.context import CorpusContext
from headwater.corpora.plan import Corpus, Reading
from headwater.corpora.probe import CorpusProbe
from headwater.corpora.skill_graph import Mode, SkillGraph, Weight, difference, learn_skill_graph
from headwater.corpora.skill_mixture import MixtureCallback, SkillMixture
from headwater.corpora.skills import by_skill, skill_figures, watched
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.document_store import stored_corpus, text_digest
from headwater.modalities.text.instruct import AnswerFormatter
from headwater.modalities.text.packing import MAX_PERIOD

__all__ = [
    "LearnedGraph",
    "MixtureCallback",
    "SkillGraph",
    "SkillIt",
    "SkillItRecipe",
    "SkillMixture",
    "learn_skill_graph",
    "skill_it_exponents",
    "skill_it_weights",
]

Reduce = Literal["sum", "mean"]

WIDE_EXPONENTS = 3.0
"""Above this range the least share is below a twentieth of the largest."""

NEGLECTED = 1e-4
"""A share that is as good as none."""

DENSE = 0.9


def skill_it_exponents(
    adjacency: ArrayLike, history: ArrayLike, eta: float, window: int, reduce: Reduce = "sum"
) -> NDArray[np.float64]:
    """What shares are the exponentials of, ``(k,)`` float64.

    Args:
        adjacency: ``(k, m)``, >= 0: what training on a row's skill does for a column's.
        history: ``(t, m)``, losses of the evaluation skills after each round, the latest last; empty before the first.
        eta: > 0.
        window: how many of the last rounds count; where there are fewer, those.
        reduce: sum over the window, or mean.

    Raises:
        ValueError: shapes that do not fit, a loss that is not finite, or ``eta`` or ``window`` out of range.
    """
    graph, losses = np.asarray(adjacency, dtype=np.float64), np.asarray(history, dtype=np.float64)
    if graph.ndim != 2:
        raise ValueError(f"adjacency must be (k, m); got shape {graph.shape}.")
    if not (np.isfinite(eta) and eta > 0) or window < 1:
        raise ValueError(f"eta must be > 0 and window >= 1; got {eta} and {window}.")
    if not len(losses):
        losses = np.ones((1, graph.shape[1]))
    if losses.ndim != 2 or losses.shape[1] != graph.shape[1]:
        raise ValueError(f"history must be (t, {graph.shape[1]}), a loss for each column; got shape {losses.shape}.")
    if (wrong := np.argwhere(~np.isfinite(losses))).size:
        raise ValueError(f"the loss of column {wrong[0, 1]} is {losses[tuple(wrong[0])]} in round {wrong[0, 0] + 1}.")
    recent = losses[-window:]
    found: NDArray[np.float64] = eta * graph @ (recent.sum(axis=0) if reduce == "sum" else recent.mean(axis=0))
    return found


def skill_it_weights(
    adjacency: ArrayLike,
    history: ArrayLike,
    eta: float,
    window: int,
    prior: ArrayLike | None = None,
    reduce: Reduce = "sum",
) -> NDArray[np.float64]:
    """Share of each training skill in the next round, ``(k,)`` float64, summing to 1, however large the exponents.

    Args:
        adjacency: this and what is not named below: see ``skill_it_exponents``.
        history: see there.
        eta: see there.
        window: see there.
        prior: ``(k,)``, >= 0, shares before anything is known; None: equal.
        reduce: see there.

    Raises:
        ValueError: see ``skill_it_exponents``; or a prior that is negative or zero everywhere.

    Example:
        >>> skill_it_weights([[1, 1], [0, 1]], [[0.0, 0.0]], eta=0.5, window=3).tolist()
        [0.5, 0.5]
        >>> skill_it_weights([[1, 1], [0, 1]], [], eta=0.5, window=3).round(3).tolist()
        [0.622, 0.378]
    """
    exponents = skill_it_exponents(adjacency, history, eta, window, reduce)
    if prior is not None:
        before = np.asarray(prior, dtype=np.float64)
        if before.shape != exponents.shape or not (np.isfinite(before) & (before >= 0)).all() or not before.any():
            raise ValueError(f"prior must be {exponents.shape}, finite, >= 0 and not all zero; got {before.tolist()}.")
        with np.errstate(divide="ignore"):
            exponents = exponents + np.log(before)
    shares: NDArray[np.float64] = softmax(exponents)
    return shares


class SkillIt:
    """The controller: told losses round by round, it says what to read next. For any model and any kind of data.

    Args:
        graph: which skills help which.
        eta: how sharply shares follow losses.
        window: rounds that count.
        reduce: sum over the window, or mean.

    Example:
        >>> controller = SkillIt(SkillGraph.identity(["sum", "sort"]), eta=1.0, window=1)
        >>> controller.update({"sum": 0.0, "sort": 1.0})
        >>> {name: round(share, 2) for name, share in controller.weights().items()}
        {'sum': 0.27, 'sort': 0.73}
    """

    def __init__(self, graph: SkillGraph, eta: float = 0.5, window: int = 3, *, reduce: Reduce = "sum") -> None:
        self.graph, self.eta, self.window, self._reduce = graph, eta, window, reduce
        self._history: list[list[float]] = []
        self.exponents()  # refuses what is out of range now and not after the first round

    def exponents(self) -> dict[str, float]:
        """What the shares are the exponentials of, by training skill."""
        found = skill_it_exponents(self.graph.adjacency, self._history, self.eta, self.window, self._reduce)
        return dict(zip(self.graph.train_skills, found.tolist(), strict=True))

    def weights(self) -> dict[str, float]:
        """Share of each training skill in the next round, summing to 1."""
        found = skill_it_weights(self.graph.adjacency, self._history, self.eta, self.window, reduce=self._reduce)
        return dict(zip(self.graph.train_skills, found.tolist(), strict=True))

    def update(self, losses: Mapping[str, float]) -> None:
        """Take the losses after a round.

        Raises:
            ValueError: a loss that is missing or not finite, with its name; other names are passed over.
        """
        if missing := [name for name in self.graph.eval_skills if name not in losses]:
            raise ValueError(f"no loss of {missing[0]!r} was given; got those of {', '.join(losses)}.")
        latest = [float(losses[name]) for name in self.graph.eval_skills]
        if wrong := [name for name, loss in zip(self.graph.eval_skills, latest, strict=True) if not np.isfinite(loss)]:
            raise ValueError(f"the loss of {wrong[0]!r} is {losses[wrong[0]]}; lower the learning rate.")
        self._history = [*self._history, latest][-self.window :]

    def state_dict(self) -> dict[str, Any]:  # Any: JSON data
        """The losses that count, as JSON data, with the names of their columns."""
        return {"eval_skills": list(self.graph.eval_skills), "history": [list(row) for row in self._history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # Any: JSON data
        """Go on where ``state_dict`` was taken.

        Raises:
            ValueError: the state is of other evaluation skills.
        """
        if tuple(state["eval_skills"]) != self.graph.eval_skills:
            raise ValueError(
                f"the state is of the skills {list(state['eval_skills'])} and the graph has "
                f"{list(self.graph.eval_skills)}."
            )
        self._history = [[float(loss) for loss in row] for row in state["history"]][-self.window :]


class LearnedGraph(Spec):
    """A graph that is learned by short runs of the recipe's model before it is trained."""

    steps: int = Field(default=200, gt=0, description="of a run on one skill; a pair is read for twice as many")
    mode: Mode | None = Field(
        default=None,
        description="pairwise: k (k + 1) / 2 runs, finds prerequisites in other words than the skill's own; single: k "
        "runs; null: pairwise up to 8 training skills that hold all evaluation skills, else single",
    )
    tau: float = Field(
        default=0.05, ge=0, lt=1, description="relative decrease of a skill's loss above which another helps it"
    )
    weight: Weight = Field(
        default="binary", description="of an edge: 0.5 (binary), or the relative decrease itself (relative)"
    )


class SkillItRecipe(CorpusRecipe):
    """Rounds whose mixture follows the skill graph and the losses."""

    id: ClassVar[str] = "skill_it"

    skill_field: str | None = Field(
        default=None, description="column of the documents that names their skill; null: each source is a skill"
    )
    graph: Literal["identity"] | Path | LearnedGraph = Field(
        default=LearnedGraph(),
        description="which skills help which: learned here ({steps, mode, tau, weight}), identity (each itself only), "
        "or the path of a graph.npz that another run left",
    )
    validation: CorpusRef | None = Field(
        default=None,
        description="documents by whose losses the mixture is steered, their skills in the column skill_field, or one "
        "skill without; null: the sources' own validation documents",
    )
    target: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="evaluation skills that count; null: all"
    )
    rounds: int = Field(default=6, gt=0, description="T, rounds of equal share, between which shares change")
    eta: float = Field(default=0.5, gt=0, description="how sharply shares follow losses; see the range of exponents")
    window: int = Field(default=3, gt=0, description="w, rounds whose losses count")

    @field_validator("graph", mode="before")
    @classmethod
    def _learn_by_name(cls, value: Any) -> Any:  # Any: whatever the user wrote
        return LearnedGraph() if value == "learn" else value

    def build(self, ctx: CorpusContext) -> Corpus:
        """Group documents by skill, find the graph, and plan rounds that the controller weighs."""
        tables = by_skill({name: source.train for name, source in ctx.sources.items()}, self.skill_field)
        if len(tables) < 2:
            raise CorpusError(
                f"all documents are of one skill, {next(iter(tables))!r}; name a skill_field, or more sources"
            )
        evaluated = self._evaluated(ctx, tables)
        formatter = AnswerFormatter(ctx.tokenizer)
        graph = self._graph(ctx, tables, evaluated, formatter)
        graph.save(ctx.run.path("graph.npz"))
        if graph.density > DENSE or not graph.density:
            which = "no skill helps another" if not graph.density else f"{graph.density:.0%} of all edges are there"
            ctx.warn("graph", f"in the skill graph {which}; expect no gain over equal shares")
        weigh = partial(self._weigh, ctx, graph)
        names = graph.train_skills
        rounds = (Reading(f"round-{t}", 1 / self.rounds, names, weigh, formatter) for t in range(1, self.rounds + 1))
        return Corpus(
            tuple(rounds),
            tables,
            watched=evaluated,
            examine=skill_figures(ctx, evaluated, formatter),
            files=("graph.npz", "mixture.csv"),
        )

    def _evaluated(self, ctx: CorpusContext, tables: Mapping[str, Sequence[Document]]) -> dict[str, list[Document]]:
        """Validation documents of every evaluation skill."""
        if self.validation is None:
            found = by_skill({name: source.valid for name, source in ctx.sources.items()}, self.skill_field)
            wanted = self.target or tuple(tables)
        else:
            store = stored_corpus(self.validation, role="validation")
            ctx.run.record_data("validation", store.fingerprint)
            found = by_skill({"validation": store}, self.skill_field)
            wanted = self.target or tuple(found)
        if missing := sorted(set(wanted) - set(found)):
            raise CorpusError(
                f"skill {missing[0]!r} has no validation document (there are some of {', '.join(found) or 'none'}); "
                "raise held_out, give validation, or choose other targets"
            )
        scored = watched({name: found[name] for name in wanted})
        if self.validation is not None:
            texts = {text_digest(document.text) for table in tables.values() for document in table}
            repeated = sum(text_digest(d.text) in texts for documents in scored.values() for d in documents)
            if repeated:
                ctx.warn("validation", f"{repeated} validation documents are read too: their losses show memory")
        return scored

    def _graph(
        self,
        ctx: CorpusContext,
        tables: Mapping[str, Sequence[Document]],
        evaluated: Mapping[str, Sequence[Document]],
        formatter: AnswerFormatter,
    ) -> SkillGraph:
        if self.graph == "identity":
            return SkillGraph.identity(tuple(tables), tuple(evaluated))
        if isinstance(self.graph, LearnedGraph):
            probe = CorpusProbe(ctx, tables, evaluated, formatter)
            return learn_skill_graph(probe, tuple(tables), tuple(evaluated), **dict(self.graph))
        path = Path(self.graph)
        graph = SkillGraph.load(path)
        ctx.run.record_data("graph", hashlib.sha256(path.read_bytes()).hexdigest())
        others = [difference(graph.train_skills, tuple(tables))]
        others += [difference(graph.eval_skills, tuple(evaluated))] if self.target is None else []
        if differs := [words for words in others if words]:
            raise CorpusError(f"{path}: the graph is of other skills than the data ({differs[0]})")
        return graph.towards(tuple(evaluated))

    def _weigh(
        self, ctx: CorpusContext, graph: SkillGraph, history: Sequence[Mapping[str, float]]
    ) -> tuple[float, ...]:
        """The shares of this round; ``mixture.csv`` holds those of all rounds so far, which follow from the losses."""
        controller = SkillIt(graph, self.eta, self.window)
        rows: list[dict[str, float]] = []
        for told in (None, *history[1:]):  # before the first round nothing was learned that a loss could show
            if told is not None:
                controller.update(told)
            shares, exponents = controller.weights(), controller.exponents()
            rows.append({"round": len(rows) + 1, **shares})
        text = io.StringIO()
        writer = csv.DictWriter(text, ["round", *graph.train_skills], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write_text(ctx.run.path("mixture.csv"), text.getvalue())
        spread = max(exponents.values()) - min(exponents.values())
        if spread > WIDE_EXPONENTS:
            ctx.warn(
                "exponents",
                f"round {len(rows)}: exponents range over {spread:.1f}, so the least share is {np.exp(-spread):.1g} of "
                f"the largest; lower eta (now {self.eta:g})",
            )
        if lost := [name for name in shares if len(rows) > 1 and max(r[name] for r in rows[-2:]) < NEGLECTED]:
            ctx.warn("neglected", f"skill {lost[0]!r} had a share below {NEGLECTED:g} for two rounds; lower eta")
        # A mixture cannot hold less than one row in so many.
        return tuple(share if share >= 1 / MAX_PERIOD else 0.0 for share in shares.values())
