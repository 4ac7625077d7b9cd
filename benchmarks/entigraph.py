"""(p) What does the toy model of EntiGraph cost, with a tree of shortest paths kept for each entity?

    python -m benchmarks.entigraph

1000 entities, three known relations each, 100 000 steps. The peer is the definition: ``networkx.shortest_path`` at
every step, and a set of what is known.
"""

from __future__ import annotations

import networkx as nx
import numpy as np

from benchmarks.harness import Bound, alternate, report
from headwater.corpora.entigraph_toy import entigraph_toy, source_relations

ENTITIES, P, STEPS = 1000, 0.003, 100_000
RATIO = 20.0


def peer() -> np.ndarray:
    """The accuracy after each step, by a search in every step."""
    rng = np.random.default_rng(0)
    graph = nx.from_numpy_array(source_relations(ENTITIES, P, rng), create_using=nx.DiGraph)
    known = set(graph.edges)
    counts = [len(known)]
    first = rng.integers(ENTITIES, size=STEPS)
    other = (first + rng.integers(1, ENTITIES, size=STEPS)) % ENTITIES
    for x, y in zip(first.tolist(), other.tolist(), strict=True):
        try:
            path = nx.shortest_path(graph, x, y)
        except nx.NetworkXNoPath:
            path = [x]
        known |= {(x, z) for z in path[1:]}
        counts.append(len(known))
    return np.array(counts) / (ENTITIES * (ENTITIES - 1))


def ours() -> np.ndarray:
    return entigraph_toy(ENTITIES, P, STEPS, np.random.default_rng(0))


def check() -> str:
    """Of several shortest paths the two may take another, so curves agree but for what those share."""
    one, other = ours(), peer()
    assert one[0] == other[0]
    gap = float(np.abs(one - other).max() / (other[-1] - other[0]))
    assert gap < 0.02, f"the curves differ by {gap:.3f} of what they rise"
    return f"both curves begin alike and differ by at most {gap:.2%} of their rise over all steps"


def main() -> None:
    """Print one JSON line."""
    checked = check()
    least = alternate({"ours": ours, "networkx": peer})
    report(
        f"{STEPS} steps of the toy model with {ENTITIES} entities",
        {"networkx": (least["networkx"] / least["ours"], Bound("higher", RATIO))},
        seconds=least,
        checked=checked,
    )


if __name__ == "__main__":
    main()
