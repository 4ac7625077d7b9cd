"""A sequence of domains: its order, its phases, the rows of its matrix, and what it saves."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.conftest import write_corpus
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater.core.optim import lr_factor
from headwater.core.recipe import ModelRef, RecipeError, load_recipe
from headwater.core.run import Result, Run, execute
from headwater.domain import domain_stream
from headwater.domain.corpus import prepare_each
from headwater.domain.domain_stream import DomainStream, domain_embeddings, order_domains
from headwater.domain.evaluation import Evaluation
from headwater.domain.transfer import TransferMatrix
from headwater.modalities.features import extract_features
from headwater.modalities.models import ModelError, load_encoder, load_tokenizer
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.prepared import held_out_sample
from headwater.modalities.text.score import bits_per_byte

Fields = dict[str, Any]
ORDER = ["music", "graphs", "garden"]
KEPT = {"order": ORDER, "keep_checkpoints": "all", "eval_chars": 24_000}


def recipe_of(fields: Fields, **changes: Any) -> DomainStream:
    recipe = load_recipe({"method": "domain_stream", **fields, **changes})
    assert isinstance(recipe, DomainStream)
    return recipe


@pytest.fixture(scope="module")
def whole(stream_fields: Fields, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A finished run in a given order that kept every model."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    return directory, execute(recipe_of(stream_fields, **KEPT), directory)


def weights(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / "model.safetensors")


# -- the order


def arc(*degrees: float) -> dict[str, list[float]]:
    return {
        name: [float(np.cos(np.radians(d))), float(np.sin(np.radians(d)))]
        for name, d in zip("abcd", degrees, strict=True)
    }


def test_equation_chains_through_four_points_on_an_arc() -> None:
    points = arc(0, 50, 20, 90)
    assert order_domains(points, start=[1, -0.1]) == ["a", "c", "b", "d"]
    # From the nearest to the start, a, to the farthest, d at 90; from there a is gone, so c at 70 away, then b.
    assert order_domains(points, start=[1, -0.1], how="dissimilar") == ["a", "d", "c", "b"]
    # The mean of the four unit vectors lies at about 40 degrees.
    assert order_domains(points) == ["b", "c", "a", "d"]


def test_property_lengths_of_vectors_do_not_matter_and_ties_go_to_the_earlier_name() -> None:
    longer = {name: [100 * x for x in vector] if name == "d" else vector for name, vector in arc(0, 50, 20, 90).items()}
    assert order_domains(longer) == order_domains(arc(0, 50, 20, 90))
    assert order_domains({"b": [1, 0], "a": [2, 0], "c": [0, 1]}, start=[1, 0]) == ["b", "a", "c"]


def test_property_random_orders_are_permutations_by_seed() -> None:
    names = {f"n{i}": [1.0] for i in range(6)}
    orders = [order_domains(names, how="random", seed=seed) for seed in range(5)]
    assert all(sorted(order) == sorted(names) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert orders[0] == order_domains(names, how="random", seed=0)


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (["a", "b"], "leaves out c, d; give each of a, b, c, d once"),
        (["a", "b", "c", "d", "e"], "names the unknown e"),
        (["a", "b", "c", "d", "a"], "names twice a"),
    ],
)
def test_rejects_orders_that_are_not_the_names(order: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        order_domains(arc(0, 1, 2, 3), how=order)


def test_rejects_a_vector_without_direction() -> None:
    with pytest.raises(ValueError, match="the embedding of 'b' is zero and has no direction"):
        order_domains({"a": [1, 0], "b": [0, 0]})


# -- embeddings


def test_property_tfidf_puts_texts_of_shared_words_together() -> None:
    texts = {"a": ["node edge path", " "], "b": ["edge node flow"], "c": ["leaf root moss"]}
    vectors, made_by = domain_embeddings(texts, "tfidf")
    assert "TF-IDF" in made_by
    a, b, c = (vectors[name] / np.linalg.norm(vectors[name]) for name in "abc")
    assert a @ b > a @ c + 0.2
    without = domain_embeddings(texts | {"a": ["node edge path"]}, "tfidf")[0]
    assert np.allclose(vectors["a"], without["a"]), "a blank text is left out"


def test_oracle_an_encoders_embedding_is_the_mean_of_unit_features(tiny_encoder: Path) -> None:
    ref = ModelRef(name=str(tiny_encoder))
    texts = {"a": ["node edge", "path"], "b": ["sum mean row"]}
    vectors, made_by = domain_embeddings(texts, ref)
    assert made_by == str(tiny_encoder)
    features = extract_features(
        load_encoder(ref), ["node edge", "path"], processor=load_tokenizer(ref), modality="text", normalize=True
    )
    assert np.allclose(vectors["a"], features.X.mean(axis=0), atol=1e-6)


def test_rejects_a_domain_without_text_to_embed() -> None:
    with pytest.raises(CorpusError, match="no text to embed in 'b'"):
        domain_embeddings({"a": ["x"], "b": ["", " "]}, "tfidf")


# -- the run


def test_oracle_the_first_stage_and_every_model_alone_are_plain_training_bit_for_bit(
    stream_fields: Fields, whole: tuple[Path, Result], tmp_path: Path
) -> None:
    directory, _ = whole
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    shared = {name: value for name, value in stream_fields.items() if name not in ("domains", "embedding")}
    for phase, name in (("01-music", "music"), ("alone-garden", "garden")):
        steps = max(line["step"] for line in lines if line["phase"] == phase)
        fields = {**shared, "domain": stream_fields["domains"][name], "budget": {"steps": int(steps)}}
        # The default optimizer of this method is another than the family's; the fixture gives its own rate.
        optim = recipe_of(stream_fields).optim.model_dump(mode="json")
        execute(load_recipe({"method": "plain", **fields, "optim": optim}), tmp_path / name)
        ours, plain = weights(directory / "models" / phase), weights(tmp_path / name / "model")
        assert ours.keys() == plain.keys()
        assert all(np.array_equal(ours[key], plain[key]) for key in ours), phase


def test_oracle_rows_are_the_scores_of_the_saved_models(stream_fields: Fields, whole: tuple[Path, Result]) -> None:
    directory, result = whole
    matrix = TransferMatrix.load(directory / "matrix.npz")
    assert list(matrix.domains) == ORDER
    recipe = recipe_of(stream_fields, **KEPT)
    prepared = prepare_each({f"domains.{n}": ref for n, ref in recipe.domains.items()}, recipe.general, held_out=0.1)
    tests = [held_out_sample(prepared[f"domains.{n}"].domain_test, recipe.eval_chars, at_least=20) for n in ORDER]
    tokenizer = AutoTokenizer.from_pretrained(stream_fields["model"])

    def scored(model: Path) -> list[float]:
        opened = AutoModelForCausalLM.from_pretrained(model)
        return [bits_per_byte(opened, tokenizer, documents, window=64).bits_per_byte for documents in tests]

    assert matrix.bpb[0] == pytest.approx(scored(Path(stream_fields["model"])), abs=1e-6)
    assert matrix.bpb[2] == pytest.approx(scored(directory / "models" / "02-graphs"), abs=1e-6)
    assert matrix.last == pytest.approx(scored(directory / "model"), abs=1e-6)
    assert matrix.dapt is not None
    assert matrix.dapt[0] == matrix.cpt[0], "nothing comes before the first"
    assert matrix.dapt[2] == pytest.approx(scored(directory / "models" / "alone-garden")[2], abs=1e-6)
    assert result.metrics["domain/bpb"] == pytest.approx(matrix.last.mean(), abs=1e-9)
    assert result.metrics["domain/bpb_start"] == pytest.approx(matrix.zero_shot.mean(), abs=1e-9)
    assert result.metrics["stream/specialisation"] == pytest.approx((matrix.dapt - matrix.cpt)[1:].mean())


def test_property_items_average_to_the_mean_over_domains(whole: tuple[Path, Result]) -> None:
    directory, result = whole
    items = json.loads((directory / "items.json").read_text())
    for name in ("domain/gain", "general/forgetting"):
        assert np.mean(items[name]["values"]) == pytest.approx(result.metrics[name], abs=1e-12)
    gain = result.metrics["domain/bpb_start"] - result.metrics["domain/bpb"]
    assert result.metrics["domain/gain"] == pytest.approx(gain, abs=1e-9)
    ids = items["domain/gain"]["ids"]
    assert len(set(ids)) == len(ids)
    counts = Counter(id.split("/")[0] for id in ids)
    assert len(set(counts.values())) > 1, "domains with different numbers of documents count alike"


def test_property_the_run_leaves_order_heat_map_and_models(whole: tuple[Path, Result]) -> None:
    directory, result = whole
    order = json.loads((directory / "order.json").read_text())
    assert order["order"] == ORDER
    assert order["how"] == "given"
    assert "TF-IDF" in order["embedding"]
    assert np.allclose(np.diag(order["similarity"]), 1)
    assert len(order["similarity_to_general"]) == 3
    assert {path.name for path in (directory / "models").iterdir()} == {
        "01-music", "02-graphs", "03-garden", "alone-graphs", "alone-garden",
    }  # fmt: skip
    text = (directory / "heat-map.svg").read_text()
    drawn = [node.text for node in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
    matrix = TransferMatrix.load(directory / "matrix.npz")
    for value in (matrix.bpb[0] - matrix.bpb[1:]).flatten():
        assert any(word is not None and word.replace("\u2212", "-") == f"{value:.3f}" for word in drawn)
    assert {"after music", "garden"} <= set(drawn)
    assert "var(" not in text
    assert result.notes["order"] == "music, graphs, garden"


def test_property_training_alone_is_charged_apart(whole: tuple[Path, Result]) -> None:
    directory, result = whole
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    tokens: dict[str, float] = {}
    for line in lines:
        tokens[line["phase"]] = max(tokens.get(line["phase"], 0), line["tokens"])
    alone = sum(count for phase, count in tokens.items() if phase.startswith("alone-"))
    assert result.cost["tokens"] == sum(tokens.values()) - alone
    assert result.cost["tokens"] <= 9 * 256
    assert result.metrics["cost/dapt_tokens"] == alone > 0


def test_fault_a_resumed_run_scores_only_what_is_missing(
    stream_fields: Fields, whole: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, directory = recipe_of(stream_fields, **KEPT), tmp_path / "run"
    scored: list[str] = []
    score, write = Evaluation.score_test, domain_stream.atomic_write_text

    def counted(self: Evaluation, model: Any, role: str) -> Any:
        scored.append(role)
        return score(self, model, role)

    def full(path: Path, data: str) -> None:
        if path.name == "03-garden.json":
            raise OSError(28, "no space left on device")
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(domain_stream, "atomic_write_text", full)
        with pytest.raises(OSError, match="no space"):
            execute(recipe, directory)
    monkeypatch.setattr(Evaluation, "score_test", counted)
    resumed = execute(recipe, directory, resume=True)
    # The third row, and the two models trained alone; the first two rows and the start stand.
    assert scored == [
        "domains.graphs", "domains.music", "domains.garden", "general", "domains.graphs", "domains.garden",
    ]  # fmt: skip
    clock = ("cost/dapt_seconds",)
    before, after = ({k: v for k, v in r.metrics.items() if k not in clock} for r in (whole[1], resumed))
    assert after == before
    scored.clear()
    (directory / "result.json").unlink()
    execute(recipe, directory, resume=True)
    assert scored == []


def test_property_replay_draws_from_domains_seen_before_in_proportion(stream_fields: Fields, tmp_path: Path) -> None:
    recipe = recipe_of(stream_fields, order=ORDER, replay=0.25, replay_seen=0.5)
    with Run(tmp_path / "a", recipe) as run:
        stream = domain_stream._Stream.open(recipe, run)
        mixed = stream._mixed("garden", seen=["music", "graphs"])
        batches = [mixed.batch(step) for step in range(250)]
        first = stream._mixed("music").batch(0)
        tokens = {n: int(ctx.num_tokens(ctx.domain.train).sum()) for n, ctx in stream.contexts.items()}
    counts = np.bincount(np.concatenate([batch["part"].numpy() for batch in batches])) / 1000
    seen = tokens["music"] + tokens["graphs"]
    expected = [0.25, 0.25, 0.5 * tokens["music"] / seen, 0.5 * tokens["graphs"] / seen]
    assert counts == pytest.approx(expected, abs=0.002)  # less than one row of a thousand, and rounding
    assert stream.shares == pytest.approx({n: t / sum(tokens.values()) for n, t in tokens.items()})
    assert first["part"].max() <= 1, "nothing was seen before the first"


def test_equation_one_schedule_over_the_stream_or_one_for_each(stream_fields: Fields, tmp_path: Path) -> None:
    fields = {**stream_fields, "budget": {"steps": 30}, "dapt": False, "order": ORDER, "eval_at": []}
    fields |= {"optim": {"lr": 1e-3, "schedule": "linear", "warmup": 0.0, "final_lr": 0.0}}
    fields |= {"fit": {"precision": "fp32", "log_every": 1}}
    last: dict[bool, list[float]] = {}
    for each in (True, False):
        execute(recipe_of(fields, warmup_each=each), tmp_path / str(each))
        lines = [json.loads(line) for line in (tmp_path / str(each) / "metrics.jsonl").read_text().splitlines()]
        last[each] = list({line["phase"]: line["lr"] for line in lines}.values())
    assert last[True] == pytest.approx([0, 0, 0], abs=1e-12)
    recipe = recipe_of(fields)
    with Run(tmp_path / "b", recipe) as run:
        shares = domain_stream._Stream.open(recipe, run).shares
    ends = np.cumsum([shares[name] for name in ORDER])
    assert last[False] == pytest.approx([1e-3 * lr_factor(recipe.optim, end) for end in ends], abs=1e-9)


def test_property_moments_are_kept_where_the_optimizer_does_not_restart(stream_fields: Fields, tmp_path: Path) -> None:
    fields = {**stream_fields, "dapt": False, "order": ORDER, "keep_checkpoints": "diagonal", "eval_at": []}
    for restart in (True, False):
        execute(recipe_of(fields, restart_optimizer=restart), tmp_path / str(restart))
    same, other = (
        [weights(tmp_path / str(restart) / "models" / stage) for restart in (True, False)]
        for stage in ("01-music", "02-graphs")
    )
    assert all(np.array_equal(same[0][key], same[1][key]) for key in same[0])
    assert any(not np.array_equal(other[0][key], other[1][key]) for key in other[0])


def test_learns_each_domain_and_forgets_less_with_replay(stream_fields: Fields, tmp_path: Path) -> None:
    longer = {**stream_fields, "budget": {"steps": 90}, "optim": {"lr": 1e-2}, "order": ORDER, "eval_at": []}
    longer |= {"dapt": False}
    plain = execute(recipe_of(longer), tmp_path / "plain")
    replay = execute(recipe_of(longer, replay_seen=0.5), tmp_path / "replay")
    matrix = TransferMatrix.load(tmp_path / "plain" / "matrix.npz")
    assert (matrix.learned > 0.5).all(), "each stage learns a language of seven words"
    assert plain.metrics["stream/forgetting"] > replay.metrics["stream/forgetting"] + 0.1


def test_degenerate_without_general_text_forgetting_is_not_measured(
    stream_fields: Fields, tmp_path: Path, tiny_masked: Path
) -> None:
    fields = {**stream_fields, "model": str(tiny_masked), "general": None, "order": "similar", "dapt": False}
    result = execute(recipe_of(fields), tmp_path / "a")
    assert not [name for name in result.metrics if name.startswith("general/")]
    assert result.notes["unit"] == "bits/masked token"
    assert json.loads((tmp_path / "a" / "order.json").read_text())["similarity_to_general"] is None
    assert {path.name for path in (tmp_path / "a").iterdir()} & {"models"} == set()


def test_property_what_one_domain_holds_out_leaves_the_training_of_all(stream_fields: Fields, tmp_path: Path) -> None:
    recipe = recipe_of(stream_fields)
    refs = {f"domains.{name}": ref for name, ref in recipe.domains.items()}
    held = prepare_each(refs, None, held_out=0.1)["domains.music"].domain_test
    path = write_corpus(tmp_path / "graphs.jsonl", "domain")
    copies = "".join(json.dumps({"id": f"copy-{i}", "text": d.text}) + "\n" for i, d in enumerate(held))
    path.write_text(path.read_text() + copies)
    refs["domains.graphs"] = recipe_of({**stream_fields, "domains": {**stream_fields["domains"], "graphs": str(path)}}
    ).domains["graphs"]  # fmt: skip
    prepared = prepare_each(refs, None, held_out=0.1)
    assert prepared["domains.graphs"].dropped > 0
    assert not {d.text for d in held} & {d.text for d in prepared["domains.graphs"].domain.train}


def test_property_domains_that_share_documents_are_named_in_a_warning(stream_fields: Fields, tmp_path: Path) -> None:
    music, graphs = (Path(stream_fields["domains"][name]).read_text().splitlines() for name in ("music", "graphs"))
    path = tmp_path / "graphs.jsonl"
    path.write_text("\n".join([*graphs, *music[:30]]) + "\n")
    recipe = recipe_of(stream_fields, domains={**stream_fields["domains"], "graphs": str(path)})
    with Run(tmp_path / "a", recipe) as run:
        domain_stream._Stream.open(recipe, run)
    # 30 of 290 and 30 of 210; nothing is said of the garden.
    assert "10% of the documents of domain 'graphs' stand in 'music' too" in run.notes["warning/shared/graphs/music"]
    assert "14% of the documents of domain 'music' stand in 'graphs' too" in run.notes["warning/shared/music/graphs"]
    assert sum(name.startswith("warning/shared") for name in run.notes) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"order": ["music", "graphs"]}, "leaves out garden"),
        ({"replay": 0.5, "replay_seen": 0.5}, "leave nothing of a batch to the domain"),
        ({"domains": {"a": "x.jsonl", "b": "y.jsonl"}}, "domains"),
        ({"domains": {"a/b": "x.jsonl", "b": "y.jsonl", "c": "z.jsonl"}}, "domains"),
        ({"keep_checkpoints": "some"}, "keep_checkpoints"),
        ({"domain": "x.jsonl"}, "unknown field 'domain'. Did you mean 'domains'"),
    ],
)
def test_rejects_when_built(stream_fields: Fields, changes: Fields, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe_of(stream_fields, **changes)


def test_rejects_small_domains_and_small_budgets(stream_fields: Fields, tmp_path: Path) -> None:
    few = write_corpus(tmp_path / "few.jsonl", "music", 60)
    with pytest.raises(CorpusError, match=r"domains.music: the held-out test set has \d+ documents"):
        execute(recipe_of(stream_fields, domains={**stream_fields["domains"], "music": str(few)}), tmp_path / "a")
    with pytest.raises(ModelError, match=r"gives \d+ tokens to domain '\w+', less than one step of 256"):
        execute(recipe_of(stream_fields, budget={"tokens": 600}), tmp_path / "b")
