"""Which skills help which: a weighted graph, learned from short runs.

    pairwise    r_ij = (L_j - L_j^{i+j}) / L_j        L_j: after H steps on j;  L_j^{i+j}: after 2H on both in halves
    single      r_ij = (L_j(0) - L_j^i) / L_j(0)        L_j(0): before training;  L_j^i: after H steps on i
    A_ij = 1 where i = j;  the edge's weight where r_ij > tau;  0 elsewhere

Source: Chen et al., "Skill-it! A Data-Driven Skills Framework for Understanding and Training Language Models",
    arXiv:2307.14430, section 3.
Differs: a run on i and j in halves answers for both directions, so that pairwise takes k + k (k - 1) / 2 runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from headwater.core.cache import atomic_path

__all__ = ["EDGE", "PAIRWISE_UP_TO", "Mode", "Probe", "SkillGraph", "Weight", "difference", "learn_skill_graph"]

Mode = Literal["pairwise", "single"]
Weight = Literal["binary", "relative"]

Probe = Callable[[Mapping[str, float], int], Mapping[str, float]]
"""From shares of training skills and a number of steps to the losses of all evaluation skills, in nats, of a model that
was trained so from the same start; 0 steps: of that start."""

EDGE = 0.5
"""Weight of an edge of a binary graph; the authors' code has it."""

PAIRWISE_UP_TO = 8
"""Training skills up to which a graph is learned pairwise unless asked otherwise."""


@dataclass(frozen=True, eq=False)
class SkillGraph:
    """What training on one skill does for another.

    Attributes:
        adjacency: ``(k, m)`` float64, >= 0; positive where training on the row's skill lowers the column's loss, 1
            where both are the same skill.
        train_skills: k names.
        eval_skills: m names; the same, some of them, or others.

    Raises:
        ValueError: see ``validate``.
    """

    adjacency: NDArray[np.float64]
    train_skills: tuple[str, ...]
    eval_skills: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "adjacency", np.array(self.adjacency, dtype=np.float64))
        object.__setattr__(self, "train_skills", tuple(self.train_skills))
        object.__setattr__(self, "eval_skills", tuple(self.eval_skills))
        self.validate()

    @classmethod
    def identity(cls, train_skills: Sequence[str], eval_skills: Sequence[str] | None = None) -> SkillGraph:
        """Every skill helps itself alone."""
        evaluated = train_skills if eval_skills is None else eval_skills
        return cls(_same(train_skills, evaluated).astype(np.float64), tuple(train_skills), tuple(evaluated))

    def validate(self) -> None:
        """Refuse what is no skill graph.

        Raises:
            ValueError: no skill, a name twice, another shape than the names', an entry that is negative or not finite,
                or a skill that does not help itself.
        """
        for role, names in (("training", self.train_skills), ("evaluation", self.eval_skills)):
            if not names or len(set(names)) < len(names):
                raise ValueError(f"a skill graph needs {role} skills, each once; got {list(names)}.")
        shape = (len(self.train_skills), len(self.eval_skills))
        if self.adjacency.shape != shape:
            raise ValueError(f"adjacency must be {shape}, training by evaluation skills; got {self.adjacency.shape}.")
        if not np.isfinite(self.adjacency).all() or (self.adjacency < 0).any():
            raise ValueError("adjacency must be finite and >= 0 everywhere.")
        if (wrong := np.argwhere(self._own & (self.adjacency != 1))).size:
            row, column = wrong[0]
            raise ValueError(
                f"a skill helps itself with weight 1; {self.train_skills[row]!r} has {self.adjacency[row, column]:g}."
            )

    @property
    def _own(self) -> NDArray[np.bool_]:
        return _same(self.train_skills, self.eval_skills)

    @property
    def density(self) -> float:
        """Share of the edges between different skills that are there; 0 where none is possible."""
        between = self.adjacency[~self._own]
        return float((between > 0).mean()) if between.size else 0.0

    def towards(self, eval_skills: Sequence[str]) -> SkillGraph:
        """The columns of these evaluation skills, in this order.

        Raises:
            ValueError: the graph has no such column.
        """
        if unknown := sorted(set(eval_skills) - set(self.eval_skills)):
            raise ValueError(f"the graph has no evaluation skill {unknown[0]!r}; it has {', '.join(self.eval_skills)}.")
        columns = [self.eval_skills.index(name) for name in eval_skills]
        return SkillGraph(self.adjacency[:, columns], self.train_skills, tuple(eval_skills))

    def to_networkx(self) -> Any:  # Any: networkx ships no types
        """A ``networkx.DiGraph``: an edge with its ``weight`` from each skill to every other that it helps.

        Nodes have ``trained`` and ``evaluated``. That a skill helps itself is left out.
        """
        import networkx as nx

        graph = nx.DiGraph()
        for name in dict.fromkeys((*self.train_skills, *self.eval_skills)):
            graph.add_node(name, trained=name in self.train_skills, evaluated=name in self.eval_skills)
        for row, column in np.argwhere((self.adjacency > 0) & ~self._own).tolist():
            weight = float(self.adjacency[row, column])
            graph.add_edge(self.train_skills[row], self.eval_skills[column], weight=weight)
        return graph

    def save(self, path: str | Path) -> None:
        """Write ``adjacency``, and ``names`` as JSON text, to one ``.npz`` file without pickle."""
        names = json.dumps({"train_skills": self.train_skills, "eval_skills": self.eval_skills})
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, adjacency=self.adjacency, names=np.array(names))

    @classmethod
    def load(cls, path: str | Path) -> SkillGraph:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else.
        """
        with np.load(Path(path), allow_pickle=False) as stored:
            if missing := sorted({"adjacency", "names"} - set(stored)):
                raise ValueError(f"{path} is no skill graph: {missing[0]!r} is missing. SkillGraph.save writes one.")
            names = json.loads(str(stored["names"]))
            return cls(stored["adjacency"], tuple(names["train_skills"]), tuple(names["eval_skills"]))


def _same(rows: Sequence[str], columns: Sequence[str]) -> NDArray[np.bool_]:
    return np.array([[row == column for column in columns] for row in rows], dtype=np.bool_).reshape(
        len(rows), len(columns)
    )


def difference(graph: Sequence[str], data: Sequence[str]) -> str:
    """What one list of names has and the other lacks, in words; empty where they have the same."""
    only = sorted(set(graph) - set(data)), sorted(set(data) - set(graph))
    said = [
        f"only in {where}: {', '.join(names)}" for where, names in zip(("the graph", "the data"), only, strict=True)
    ]
    return "; ".join(words for words, names in zip(said, only, strict=True) if names)


def learn_skill_graph(
    probe: Probe,
    skills: Sequence[str],
    eval_skills: Sequence[str] | None = None,
    *,
    steps: int = 200,
    mode: Mode | None = None,
    tau: float = 0.05,
    weight: Weight = "binary",
) -> SkillGraph:
    """Learn a graph from short runs.

    Pairwise asks whether i helps j beyond what j's own data do, and finds prerequisites whose answers are in other
    words than j's, which single cannot: where training on i alone never lowers the loss on j, single finds no edge.
    Single takes k runs, pairwise k + k (k - 1) / 2, of which most are twice as long.

    Args:
        probe: trains and measures.
        skills: k training skills.
        eval_skills: m evaluation skills; None: the same.
        steps: H, of a run on one skill.
        mode: None: pairwise up to 8 training skills that hold all evaluation skills, single otherwise.
        tau: relative decrease of the loss above which there is an edge, in [0, 1).
        weight: of an edge: 0.5 (binary), or the relative decrease itself.

    Raises:
        ValueError: ``steps`` or ``tau`` is out of range, a skill stands twice, pairwise for an evaluation skill that is
            not trained on, or a loss that is not finite, with the names.
    """
    evaluated = tuple(skills if eval_skills is None else eval_skills)
    if steps < 1 or not 0 <= tau < 1:
        raise ValueError(f"steps must be >= 1 and tau in [0, 1); got {steps} and {tau}.")
    graph = SkillGraph.identity(skills, evaluated)
    untrained = sorted(set(evaluated) - set(skills))
    if mode is None:
        mode = "single" if untrained or len(skills) > PAIRWISE_UP_TO else "pairwise"
    if mode == "pairwise" and untrained:
        raise ValueError(
            f"pairwise trains on every evaluation skill, and {untrained[0]!r} is not trained on; use single."
        )
    gains = (_pairwise if mode == "pairwise" else _single)(probe, graph, steps)
    edges = np.where(gains > tau, EDGE if weight == "binary" else gains, 0.0)
    return SkillGraph(np.where(graph.adjacency == 1, 1.0, edges), graph.train_skills, evaluated)


def _pairwise(probe: Probe, graph: SkillGraph, steps: int) -> NDArray[np.float64]:
    rows, columns = graph.train_skills, graph.eval_skills
    alone = {j: _loss(probe({j: 1.0}, steps), j, j) for j in columns}
    gains = np.zeros((len(rows), len(columns)))
    for pair in combinations(rows, 2):
        if not set(pair) & set(columns):
            continue
        losses = probe(dict.fromkeys(pair, 0.5), 2 * steps)
        for i, j in (pair, pair[::-1]):
            if j in columns:
                together = _loss(losses, j, " and ".join(pair))
                gains[rows.index(i), columns.index(j)] = _decrease(alone[j], together)
    return gains


def _single(probe: Probe, graph: SkillGraph, steps: int) -> NDArray[np.float64]:
    before = probe({}, 0)
    gains = np.zeros((len(graph.train_skills), len(graph.eval_skills)))
    for row, i in enumerate(graph.train_skills):
        after = probe({i: 1.0}, steps)
        for column, j in enumerate(graph.eval_skills):
            gains[row, column] = _decrease(_loss(before, j, "nothing"), _loss(after, j, i))
    return gains


def _decrease(before: float, after: float) -> float:
    return (before - after) / before if before > 0 else 0.0  # what is known already cannot be helped


def _loss(losses: Mapping[str, float], skill: str, trained: str) -> float:
    loss = float(losses[skill])
    if not np.isfinite(loss):
        raise ValueError(f"the loss of {skill!r} is {loss} after training on {trained}; lower the learning rate.")
    return loss
