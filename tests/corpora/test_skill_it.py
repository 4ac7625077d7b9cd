"""Skill-it: weights in closed form, graphs from known losses, rounds in a recipe and in a Trainer, what it refuses."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import sentences
from transformers import Trainer, TrainingArguments

from headwater.claims.skill_it import ARMS, SIZES, SKILLS, make_world
from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.run import Run, execute
from headwater.corpora.context import CorpusContext
from headwater.corpora.probe import CorpusProbe
from headwater.corpora.skill_graph import SkillGraph, learn_skill_graph
from headwater.corpora.skill_it import SkillIt, skill_it_exponents, skill_it_weights
from headwater.corpora.skill_mixture import MixtureCallback, SkillMixture
from headwater.corpora.skills import by_skill, watched
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.instruct import AnswerFormatter, answered
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.tokenizers import train_bpe, word_tokenizer

Fields = dict[str, Any]
CHAIN = SkillGraph(np.array([[1, 0.5, 0], [0, 1, 0.25], [0, 0, 1]]), ("a", "b", "c"), ("a", "b", "c"))


@pytest.fixture(scope="module")
def fields(corpora_fields: Fields) -> Fields:
    given = {"skill_field": "source", "rounds": 3, "graph": {"steps": 2}, "budget": {"steps": 9}}
    return {"method": "skill_it", **corpora_fields, **given}


@pytest.fixture(scope="module")
def finished(fields: Fields, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("skill_it") / "run"
    return directory, execute(load_recipe(fields), directory)


# -- weights


def test_equation_weights_by_hand() -> None:
    # Row sums 1.5, 1.25, 1 times 0.2; then rows of A times the losses (2, 1, 4): 2.5, 2, 4.
    first = np.exp([0.3, 0.25, 0.2])
    assert skill_it_weights(CHAIN.adjacency, [], 0.2, 1) == pytest.approx(first / first.sum(), rel=1e-12)
    second = np.exp([0.5, 0.4, 0.8])
    history = [[9.0, 9.0, 9.0], [2.0, 1.0, 4.0]]
    assert skill_it_weights(CHAIN.adjacency, history, 0.2, 1) == pytest.approx(second / second.sum(), rel=1e-12)


def test_equation_the_window_sums_the_last_rounds() -> None:
    history = np.array([[100.0, 0, 0], [1, 2, 3], [3, 2, 1]])
    assert skill_it_exponents(np.eye(3), history, 0.5, 2).tolist() == [2.0, 2.0, 2.0]
    assert skill_it_exponents(np.eye(3), history, 0.5, 2, "mean").tolist() == [1.0, 1.0, 1.0]
    assert skill_it_exponents(np.eye(3), history[:1], 0.5, 2).tolist() == [50.0, 0, 0], "missing rounds are absent"


def test_property_closed_forms() -> None:
    rng = np.random.default_rng(0)
    losses = rng.random((4, 3))
    assert skill_it_weights(np.eye(3), np.full((2, 3), 0.7), 0.5, 3) == pytest.approx(np.full(3, 1 / 3))
    assert skill_it_weights([[1.0]], [[5.0]], 0.5, 3).tolist() == [1.0]
    shifted = skill_it_weights(np.eye(3), losses + 2.0, 0.5, 3)
    assert shifted == pytest.approx(skill_it_weights(np.eye(3), losses, 0.5, 3), rel=1e-12)
    # A target is a column: zero columns elsewhere say the same as leaving them out.
    masked = CHAIN.adjacency * [0, 0, 1]
    rectangular = skill_it_weights(CHAIN.towards(["c"]).adjacency, losses[:, 2:], 0.5, 3)
    assert skill_it_weights(masked, losses, 0.5, 3) == pytest.approx(rectangular, rel=1e-12)


def test_degenerate_exponents_beyond_floats_and_a_prior() -> None:
    huge = skill_it_weights(np.eye(2), [[1e6, 1e6 - 1]], 1.0, 1)
    assert huge == pytest.approx(np.exp([0, -1]) / np.exp([0, -1]).sum())
    assert skill_it_weights(np.eye(2), [[1.0, 1.0]], 1.0, 1, prior=[3, 1]) == pytest.approx([0.75, 0.25])
    assert skill_it_weights(np.eye(2), [], 1.0, 1, prior=[0, 1]).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((np.eye(2), [[1.0, np.nan]], 0.5, 3), "the loss of column 1 is nan in round 1"),
        ((np.eye(2), [[1.0]], 0.5, 3), r"history must be \(t, 2\)"),
        ((np.eye(2), [], 0.0, 3), "eta must be > 0"),
        ((np.eye(2), [], 0.5, 0), "window >= 1"),
        ((np.ones(2), [], 0.5, 1), r"adjacency must be \(k, m\)"),
        ((np.eye(2), [], 0.5, 1, [0, 0]), "prior must be"),
    ],
)
def test_rejects_weights_of_nothing(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        skill_it_weights(*arguments)


# -- the controller


def test_property_a_restored_controller_goes_on_alike() -> None:
    rng = np.random.default_rng(1)
    controller = SkillIt(CHAIN, window=2)
    for losses in rng.random((4, 3)).tolist():
        controller.update(dict(zip("abc", losses, strict=True)))
    other = SkillIt(CHAIN, window=2)
    other.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    for losses in rng.random((3, 3)).tolist():
        assert other.weights() == controller.weights()
        for one in (controller, other):
            one.update(dict(zip("abc", losses, strict=True)))
    assert other.weights() != SkillIt(CHAIN, window=2).weights()


def test_rejects_losses_that_are_missing_or_nan() -> None:
    controller = SkillIt(CHAIN)
    with pytest.raises(ValueError, match="the loss of 'b' is nan"):
        controller.update({"a": 1.0, "b": float("nan"), "c": 1.0})
    with pytest.raises(ValueError, match="no loss of 'c' was given"):
        controller.update({"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="the state is of the skills"):
        controller.load_state_dict(SkillIt(CHAIN.towards(["c"])).state_dict())
    with pytest.raises(ValueError, match="eta must be > 0"):
        SkillIt(CHAIN, eta=-1.0)


# -- the graph


def lookup(shares: Mapping[str, float], steps: int) -> dict[str, float]:
    """Losses of a made-up model: b needs a, c is alone, and what is read lowers its own loss."""
    amount = {name: share * steps for name, share in shares.items()}
    known = {name: 0.99 ** amount.get(name, 0) for name in "abc"}
    return {"a": known["a"], "b": known["b"] * (0.5 if "a" in amount and "b" in amount else 1.0), "c": known["c"]}


def test_oracle_pairwise_finds_a_prerequisite_that_single_cannot() -> None:
    pairwise = learn_skill_graph(lookup, "abc", steps=10)
    assert pairwise.adjacency.tolist() == [[1, 0.5, 0], [0, 1, 0], [0, 0, 1]]
    relative = learn_skill_graph(lookup, "abc", steps=10, weight="relative")
    assert relative.adjacency[0, 1] == pytest.approx(0.5)  # (L - L/2) / L, with as many steps on b in both
    assert learn_skill_graph(lookup, "abc", steps=10, mode="single").density == 0.0
    assert learn_skill_graph(lookup, "abc", steps=10, tau=0.6).density == 0.0


def test_equation_single_is_the_decrease_from_the_start() -> None:
    def probe(shares: Mapping[str, float], steps: int) -> dict[str, float]:
        return {"x": 2.0} if not steps else {"x": {"a": 1.5, "b": 1.99}[next(iter(shares))]}

    graph = learn_skill_graph(probe, "ab", ["x"], weight="relative")
    assert graph.adjacency.tolist() == [[0.25], [0.0]]  # 0.5 / 2, and 0.005 is below tau


def test_property_pairwise_trains_each_pair_once_with_as_much_of_either() -> None:
    runs: list[tuple[dict[str, float], int]] = []

    def probe(shares: Mapping[str, float], steps: int) -> dict[str, float]:
        runs.append((dict(shares), steps))
        return lookup(shares, steps)

    learn_skill_graph(probe, "abc", steps=7)
    assert runs[:3] == [({"a": 1.0}, 7), ({"b": 1.0}, 7), ({"c": 1.0}, 7)]
    assert runs[3:] == [(dict.fromkeys(pair, 0.5), 14) for pair in ("ab", "ac", "bc")]
    runs.clear()
    learn_skill_graph(probe, "abc", ["a"], steps=7)
    assert [set(shares) for shares, _ in runs] == [{"a"}, {"a", "b"}, {"a", "c"}]
    runs.clear()
    learn_skill_graph(lambda s, n: probe(s, n) | dict.fromkeys("defghi", 1.0), "abcdefghi", steps=7)
    assert len(runs) == 10, "above eight skills: the start, and one run for each"


def test_property_a_graph_is_read_as_it_was_written(tmp_path: Path) -> None:
    CHAIN.towards(["c", "b"]).save(tmp_path / "graph.npz")
    read = SkillGraph.load(tmp_path / "graph.npz")
    assert read.adjacency.tolist() == [[0, 0.5], [0.25, 1], [1, 0]]
    assert (read.train_skills, read.eval_skills) == (("a", "b", "c"), ("c", "b"))
    np.savez(tmp_path / "other.npz", adjacency=np.eye(2))
    with pytest.raises(ValueError, match="is no skill graph: 'names' is missing"):
        SkillGraph.load(tmp_path / "other.npz")


def test_property_networkx_has_the_edges_between_skills() -> None:
    graph = CHAIN.to_networkx()
    assert dict(graph.edges) == {("a", "b"): {"weight": 0.5}, ("b", "c"): {"weight": 0.25}}
    assert CHAIN.towards(["c"]).to_networkx().nodes["a"] == {"trained": True, "evaluated": False}
    assert CHAIN.density == pytest.approx(2 / 6)
    assert SkillGraph.identity("ab").density == 0.0


@pytest.mark.parametrize(
    ("adjacency", "train", "evaluated", "words"),
    [
        (np.eye(2), "ab", "abc", r"adjacency must be \(2, 3\)"),
        (np.eye(2), "aa", "ab", "training skills, each once"),
        (np.zeros((2, 0)), "ab", "", "evaluation skills"),
        ([[1, -1], [0, 1]], "ab", "ab", "finite and >= 0"),
        ([[1, np.inf], [0, 1]], "ab", "ab", "finite and >= 0"),
        ([[1, 0], [0, 0.5]], "ab", "ab", "a skill helps itself with weight 1; 'b' has 0.5"),
    ],
)
def test_rejects_what_is_no_graph(adjacency: Any, train: str, evaluated: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SkillGraph(np.array(adjacency), tuple(train), tuple(evaluated))


def test_rejects_graphs_that_cannot_be_learned() -> None:
    with pytest.raises(ValueError, match="'x' is not trained on; use single"):
        learn_skill_graph(lookup, "abc", ["x"], mode="pairwise")
    with pytest.raises(ValueError, match="the loss of 'c' is nan after training on c"):
        learn_skill_graph(lambda s, n: {**lookup(s, n), "c": float("nan")}, "abc")
    with pytest.raises(ValueError, match="tau in"):
        learn_skill_graph(lookup, "abc", tau=1.0)
    with pytest.raises(ValueError, match="no evaluation skill 'x'"):
        CHAIN.towards(["x"])


# -- grouping


def test_property_documents_are_grouped_by_column_or_by_source(fields: Fields, tmp_path: Path) -> None:
    recipe: Any = load_recipe(fields)
    with Run(tmp_path / "run", recipe) as opened:
        ctx, _ = CorpusContext.open(recipe, opened)
    train = ctx.sources["text"].train
    grouped = by_skill({"x": train}, "source")
    assert list(grouped) == ["s0", "s1"]
    assert {d.meta["source"] for d in grouped["s1"]} == {"s1"}
    assert sum(map(len, grouped.values())) == len(train)
    both = by_skill({"x": train[:5], "y": train[5:9]}, "source")
    assert sum(map(len, both.values())) == 9, "a skill of two sources"
    assert list(by_skill({"y": train[:3], "x": train[3:5]}, None)) == ["x", "y"]
    with pytest.raises(CorpusError, match=r"9 of 9 documents have no 'topic', e.g. general-\d+"):
        by_skill({"x": train[:9]}, "topic")


# -- the recipe


def test_oracle_the_mixture_follows_from_graph_and_losses(finished: tuple[Path, Any], fields: Fields) -> None:
    directory, result = finished
    graph = SkillGraph.load(directory / "graph.npz")
    told = [phase["losses"] for phase in json.loads((directory / "corpus.json").read_text())["phases"]]
    rows = list(csv.DictReader((directory / "mixture.csv").open()))
    weights = [phase["weights"] for phase in json.loads((directory / "corpus.json").read_text())["phases"]]
    assert [row["round"] for row in rows] == ["1", "2", "3"]
    for t, row in enumerate(rows):
        # The losses before the first round are of the start, and no round's.
        history = [[losses[name] for name in graph.eval_skills] for losses in told[1 : t + 1]]
        expected = skill_it_weights(graph.adjacency, history, 0.5, 3)
        assert [float(row[name]) for name in graph.train_skills] == pytest.approx(expected.tolist(), rel=1e-12)
        assert list(weights[t].values()) == pytest.approx(expected.tolist(), rel=1e-12)
    assert result.metrics["skill_mean/nll"] == pytest.approx(
        (result.metrics["skill/s0/nll"] + result.metrics["skill/s1/nll"]) / 2
    )
    assert result.metrics["skill_mean/nll"] < np.mean(list(told[0].values()))


def test_property_probes_are_charged_and_leave_no_model(finished: tuple[Path, Any]) -> None:
    directory, result = finished
    probes = json.loads((directory / "probes.json").read_text())
    assert [sum(name in key for name in ("s0", "s1")) for key in probes] == [1, 1, 2]
    assert [probe["cost"]["steps"] for probe in probes.values()] == [2, 2, 4]
    assert result.cost["steps"] == 8 + 9
    assert not list(directory.glob("probe-*"))


def test_oracle_a_probe_is_a_run_of_its_own(fields: Fields, tmp_path: Path) -> None:
    recipe: Any = load_recipe(fields)
    with Run(tmp_path / "run", recipe) as opened:
        ctx, _ = CorpusContext.open(recipe, opened)
        before = {name: tensor.clone() for name, tensor in ctx.model.state_dict().items()}
        tables = by_skill({"text": ctx.sources["text"].train}, "source")
        held = watched(by_skill({"text": ctx.sources["text"].valid}, "source"))
        probe = CorpusProbe(ctx, tables, held, AnswerFormatter(ctx.tokenizer))
        start = probe({}, 0)
        found = probe({"s0": 1.0}, 6)
        other = probe({"s1": 1.0}, 6)
        assert probe({"s0": 1.0}, 6) == found
        again = CorpusProbe(ctx, tables, held, AnswerFormatter(ctx.tokenizer))
        (tmp_path / "run" / "probes.json").unlink()
        fresh = CorpusProbe(ctx, tables, held, AnswerFormatter(ctx.tokenizer))
        assert again({"s0": 1.0}, 6) == found, "known from the file"
        assert fresh({"s0": 1.0}, 6) == found, "trained once more after another skill"
        assert all(torch.equal(before[name], tensor) for name, tensor in ctx.model.state_dict().items())
    assert found["s0"] < start["s0"]
    assert found != other


def test_property_a_graph_of_another_run_is_taken(finished: tuple[Path, Any], fields: Fields, tmp_path: Path) -> None:
    directory, result = finished
    given = {**fields, "graph": str(directory / "graph.npz")}
    other = execute(load_recipe(given), tmp_path / "given")
    assert other.metrics["skill_mean/nll"] == result.metrics["skill_mean/nll"]
    assert other.cost["steps"] == 9
    with pytest.raises(CorpusError, match=r"other skills than the data \(only in the graph: s0, s1; only in the data"):
        execute(load_recipe({**given, "skill_field": "id2", "sources": {"x": str(renamed(tmp_path))}}), tmp_path / "x")


def renamed(directory: Path) -> Path:
    path = directory / "renamed.jsonl"
    lines = [{"id": f"d{i}", "text": text, "id2": f"t{i % 3}"} for i, text in enumerate(sentences("general", 260))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_property_targets_are_the_columns(fields: Fields, tmp_path: Path) -> None:
    result = execute(load_recipe({**fields, "target": ["s1"], "graph": "identity"}), tmp_path / "a")
    assert SkillGraph.load(tmp_path / "a" / "graph.npz").adjacency.tolist() == [[0.0], [1.0]]
    assert "no skill helps another" in result.notes["warning/graph"]
    rows = list(csv.DictReader((tmp_path / "a" / "mixture.csv").open()))
    assert all(float(row["s1"]) > float(row["s0"]) for row in rows)
    assert "skill/s0/nll" not in result.metrics


def test_property_a_large_eta_is_warned_of(fields: Fields, tmp_path: Path) -> None:
    given = {**fields, "target": ["s1"], "graph": "identity", "eta": 40.0}
    notes = execute(load_recipe(given), tmp_path / "a").notes
    assert "lower eta (now 40)" in notes["warning/exponents"]
    assert "skill 's0' had a share below 0.0001 for two rounds" in notes["warning/neglected"]
    about = json.loads((tmp_path / "a" / "corpus.json").read_text())["phases"]
    assert about[-1]["weights"] == {"s0": 0.0, "s1": pytest.approx(1.0)}


def test_property_validation_of_ones_own_steers(fields: Fields, tmp_path: Path) -> None:
    path = tmp_path / "valid.jsonl"
    texts = [*sentences("music", 4, words=30), sentences("general", 1)[0]]
    lines = [{"id": f"v{i}", "text": text, "source": f"new{i % 2}"} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = execute(load_recipe({**fields, "validation": str(path)}), tmp_path / "a")
    graph = SkillGraph.load(tmp_path / "a" / "graph.npz")
    assert (graph.train_skills, graph.eval_skills) == (("s0", "s1"), ("new0", "new1"))
    assert "validation" in result.data
    assert set(json.loads((tmp_path / "a" / "corpus.json").read_text())["phases"][0]["losses"]) == {"new0", "new1"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"eta": 0}, "eta"), ({"rounds": 0}, "rounds"), ({"graph": {"tau": 2}}, "tau"), ({"target": []}, "target")],
)
def test_rejects_when_built(fields: Fields, changes: Fields, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe({**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"skill_field": None}, "all documents are of one skill, 'text'"),
        ({"target": ["s7"]}, "skill 's7' has no validation document"),
        ({"method": "stratified", "skills": ["s7"]}, "there is no skill 's7'"),
    ],
)
def test_rejects_documents_that_cannot_be_weighed(fields: Fields, tmp_path: Path, changes: Fields, words: str) -> None:
    own = ("rounds", "graph") if changes.get("method") else ()
    with pytest.raises(CorpusError, match=words):
        execute(load_recipe({k: v for k, v in {**fields, **changes}.items() if k not in own}), tmp_path / "a")


def test_oracle_stratified_reads_as_much_of_each(fields: Fields, tmp_path: Path) -> None:
    plain = {name: value for name, value in fields.items() if name not in ("rounds", "graph")}
    result = execute(load_recipe({**plain, "method": "stratified"}), tmp_path / "a")
    assert json.loads((tmp_path / "a" / "corpus.json").read_text())["phases"][0]["weights"] == [1.0, 1.0]
    only = execute(load_recipe({**plain, "method": "stratified", "skills": ["s1"]}), tmp_path / "b")
    assert list(json.loads((tmp_path / "b" / "corpus.json").read_text())["documents"]) == ["s1"]
    assert only.metrics["docs_out"] < result.metrics["docs_out"]
    assert set(only.metrics) == set(result.metrics) >= {"skill/s0/nll", "skill/s1/nll"}


# -- learning


def test_learns_that_a_prerequisite_helps(tmp_path: Path) -> None:
    """On a small lookup world the graph has an edge from the prerequisite into its dependent."""
    rng = np.random.default_rng(0)
    classes = rng.integers(3, size=60)
    made = {
        "first": [answered(f"f{w}", f"first w{w}", f"a{classes[w]}") for w in range(60)],
        "second": [answered(f"s{w}", f"second w{w}", f"b{classes[w]}") for w in range(12)],
    }
    held = {
        "first": made["first"][12:],
        "second": [answered(f"v{w}", f"second w{w}", f"b{classes[w]}") for w in range(12, 60)],
    }
    tokenizer = word_tokenizer(d.text for documents in (*made.values(), *held.values()) for d in documents)
    tiny_llama(tokenizer, 32, 2, 2, 64, 16, generator_seed=0).save_pretrained(tmp_path / "arch")
    tokenizer.save_pretrained(tmp_path / "arch")
    files = {}
    for name, documents in {"read": made, "held": held}.items():
        files[name] = tmp_path / f"{name}.jsonl"
        lines = [{"id": d.id, "text": d.text, **d.meta, "skill": s} for s, own in documents.items() for d in own]
        files[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = load_recipe(
        {
            "method": "skill_it", "sources": {"world": str(files["read"])}, "model": str(tmp_path / "arch"),
            "validation": str(files["held"]), "skill_field": "skill", "held_out": 0.3, "seq_len": 10,
            "batch_tokens": 160, "budget": {"steps": 6}, "rounds": 2, "eta": 0.1, "eval_at": [1.0],
            "optim": {"lr": 4e-3, "schedule": "constant"}, "fit": {"precision": "fp32"},
            "graph": {"steps": 100, "weight": "relative"},
        }
    )  # fmt: skip
    execute(recipe, tmp_path / "run")
    graph = SkillGraph.load(tmp_path / "run" / "graph.npz")
    assert graph.train_skills == ("first", "second")
    assert graph.adjacency[0, 1] > 0.2


# -- transformers.Trainer

TEXTS = {kind: sentences(kind, 40, words=8) for kind in ("domain", "general")}
TOKENIZER = train_bpe([*TEXTS["domain"], *TEXTS["general"]], 320)
DOCS = {kind: [Document(f"{kind}{i}", text) for i, text in enumerate(own)] for kind, own in TEXTS.items()}
STEPS, ROWS, ROUNDS = 12, 4, 3
HELPS = SkillGraph(np.array([[1, 0.5], [0, 1]]), ("domain", "general"), ("domain", "general"))


def mixture(**changes: Any) -> SkillMixture:
    held = {kind: own[:6] for kind, own in DOCS.items()}
    controller = changes.pop("controller", None) or SkillIt(HELPS, eta=1.0, window=2)
    settings = {"seq_len": 64, "steps": STEPS, "rows": ROWS, "rounds": ROUNDS, **changes}
    return SkillMixture(DOCS, held, controller, AnswerFormatter(TOKENIZER), **settings)


class Seen(Trainer):
    """Keeps what it was given."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.seen = [*getattr(self, "seen", []), *inputs["input_ids"].tolist()]
        return super().training_step(model, inputs, num_items_in_batch)


def trainer(directory: Path, dataset: SkillMixture, **changes: Any) -> Seen:
    arguments = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 1,
        "train_sampling_strategy": "sequential", "learning_rate": 1e-2, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "save_total_limit": 20,
    } | changes  # fmt: skip
    model = tiny_llama(TOKENIZER, 16, 1, 2, 32, 64, generator_seed=0)
    return Seen(
        model=model, args=TrainingArguments(str(directory), **arguments), train_dataset=dataset,
        callbacks=[MixtureCallback(dataset)],
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    directory = tmp_path_factory.mktemp("trainer")
    whole = trainer(directory, mixture())
    whole.train()
    return directory, whole


def test_oracle_the_trainer_reads_in_the_controllers_shares(trained: tuple[Path, Seen]) -> None:
    _, whole = trained
    dataset: Any = whole.train_dataset
    told = [entry for entry in whole.state.log_history if "skill_loss/domain" in entry]
    assert [entry["step"] for entry in told] == [3, 7], "one step before a round ends"
    history = [[entry["skill_loss/domain"], entry["skill_loss/general"]] for entry in told]
    for t, shares in enumerate(dataset.shares):
        expected = skill_it_weights(HELPS.adjacency, history[:t], 1.0, 2)
        assert list(shares.values()) == pytest.approx(expected.tolist(), rel=1e-12)
    assert dataset.shares[0] != dataset.shares[1] != dataset.shares[2]
    # Realised counts are within one row of the shares in every round: no sampling noise.
    words = {kind: {w.strip(".") for text in own for w in text.split()} for kind, own in TEXTS.items()}
    kinds = [
        "domain" if set(TOKENIZER.decode(ids, skip_special_tokens=True).replace(".", " ").split()) & words["domain"]
        else "general" for ids in whole.seen
    ]  # fmt: skip
    assert len(kinds) == STEPS * ROWS
    size = STEPS * ROWS // ROUNDS
    for t, shares in enumerate(dataset.shares):
        assert abs(kinds[t * size : (t + 1) * size].count("domain") - shares["domain"] * size) < 1


@pytest.mark.parametrize("stopped", [3, 9])
def test_fault_a_resumed_trainer_goes_on_with_the_same_shares(trained: tuple[Path, Seen], stopped: int) -> None:
    directory, whole = trained
    resumed = trainer(directory, mixture())
    resumed.train(resume_from_checkpoint=str(directory / f"checkpoint-{stopped}"))
    assert resumed.train_dataset.shares == whole.train_dataset.shares
    assert resumed.seen == whole.seen[stopped * ROWS :]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_sampling_strategy": "random"}, "would shuffle the rounds; set train_sampling_strategy"),
        ({"dataloader_num_workers": 1}, "would read rounds before they begin"),
        ({"max_steps": 14}, "takes 14 steps of 4 rows and the data set is made for 12 of 4"),
        ({"use_cache": True}, "attention ignores position_ids that start anew"),
    ],
)
def test_rejects_trainers_that_would_break_the_rounds(tmp_path: Path, changes: Fields, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, mixture(), **changes).train()


def test_rejects_mixtures_that_cannot_be_read() -> None:
    with pytest.raises(RuntimeError, match="step 0 is of round 1, which has not begun"):
        mixture()[0]
    with pytest.raises(IndexError, match="position 48 is outside"):
        mixture()[STEPS * ROWS]
    with pytest.raises(ValueError, match="5 steps for 3 rounds"):
        mixture(steps=5)
    with pytest.raises(CorpusError, match="only in the graph: a, b, c"):
        mixture(controller=SkillIt(CHAIN))
    begun = mixture()
    begun.begin()
    assert begun[ROWS * 4 - 1]["input_ids"].shape == (64,)
    with pytest.raises(RuntimeError, match="step 4 is of round 2"):
        begun[ROWS * 4]


# -- the claim's world


def test_property_the_claims_questions_need_the_prerequisite(tmp_path: Path) -> None:
    size = SIZES["small"]
    world = make_world(size, 7, tmp_path)
    read, steering = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (world.documents, world.validation)
    )
    assert len(read) == 1000 + 7 * 60
    words = {s: {d["prompt"].split()[1] for d in read if d["skill"] == s} for s in SKILLS}
    assert len(words[SKILLS[0]]) == 1000
    assert not any(words[s] & {*world.asked, *world.valid} for s in SKILLS[1:])
    assert not {*world.asked} & {d["prompt"].split()[1] for d in steering}
    assert len(world.asked) == 740
    # Words of one class have one answer in every skill, and classes have different ones.
    rows = {tuple(row) for row in world.answers.tolist()}
    assert len(rows) == 8
    assert all(len(set(column)) == 8 for column in zip(*rows, strict=True))
    assert set(ARMS) == {"skill-it", "stratified", "random"}
