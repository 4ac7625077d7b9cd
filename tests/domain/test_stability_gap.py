"""Subset, epochs, quality, mixture: the oracles of the stability-gap recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.run import Run, execute
from headwater.domain.adaptation import Adaptation
from headwater.domain.stability_gap import StabilityGap
from headwater.modalities.text.docs import CorpusError

Fields = dict[str, Any]


def recipe_of(fields: Fields, **changes: Any) -> StabilityGap:
    recipe = load_recipe({"method": "stability_gap", **fields, **changes})
    assert isinstance(recipe, StabilityGap)
    return recipe


def selection(directory: Path) -> Fields:
    return json.loads((directory / "selection.json").read_text())


def test_oracle_one_epoch_of_everything_is_plain_training_bit_for_bit(domain_fields: Fields, tmp_path: Path) -> None:
    execute(recipe_of(domain_fields, epochs=1, quality="none", replay=0.0), tmp_path / "subset")
    execute(load_recipe({"method": "plain", **domain_fields}), tmp_path / "plain")
    ours, plain = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("subset", "plain"))
    assert ours.keys() == plain.keys()
    assert all(np.array_equal(ours[name], plain[name]) for name in ours)


def test_equation_subset_tokens_are_the_domain_share_of_the_budget_over_epochs(
    domain_fields: Fields, tmp_path: Path
) -> None:
    # 60 steps x 256 tokens = 15360; x (1 - 0.2) / 4 = 3072 tokens, up to one document more.
    recipe = recipe_of(domain_fields, budget={"steps": 60}, epochs=4, quality="none", eval_at=[])
    execute(recipe, tmp_path / "a")
    chosen = selection(tmp_path / "a")
    with Run(tmp_path / "b", recipe) as run:
        ctx = Adaptation.open(recipe, run)
        longest = int(ctx.num_tokens(ctx.domain.train).max())
    assert 3072 <= chosen["tokens"] < 3072 + longest


def test_property_each_block_of_the_subset_is_read_epochs_times(domain_fields: Fields, tmp_path: Path) -> None:
    recipe = recipe_of(domain_fields, budget={"steps": 60}, epochs=4, quality="none")
    with Run(tmp_path / "a", recipe) as run:
        ctx = Adaptation.open(recipe, run)
        subset = recipe._subset(ctx, ctx.domain.train)
        stream = ctx.mix([(subset, 0.8), (ctx.general.train, 0.2)])  # type: ignore[union-attr]
        rows = [row for step in range(60) for row in _rows(stream.batch(step), part=0)]
    counts = np.array(list({row: rows.count(row) for row in set(rows)}.values()))
    assert np.all((counts >= 3) & (counts <= 4)), "four epochs, the last of which may end a document early"


def _rows(batch: Fields, *, part: int) -> list[bytes]:
    return [row.numpy().tobytes() for row, of in zip(batch["input_ids"], batch["part"], strict=True) if int(of) == part]


def test_property_the_ngram_score_prefers_text_like_the_reference(domain_fields: Fields, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [json.loads(line) for line in Path(domain_fields["domain"]).read_text().splitlines()]
    for i, line in enumerate(lines):
        if i % 2:  # planted: every second document has its letters shuffled
            line["text"] = "".join(rng.permutation(list(line["text"])))
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    recipe = recipe_of(
        domain_fields,
        domain=str(path),
        reference=domain_fields["domain"],
        keep_fraction=0.15,  # of tokens: shuffled letters take more of them
        budget={"steps": 1},
        eval_at=[],
    )
    execute(recipe, tmp_path / "a")
    good = [int(id.split("-")[1]) % 2 == 0 for id in selection(tmp_path / "a")["ids"]]
    assert np.mean(good) > 0.95


def test_property_selection_grows_with_the_fraction(domain_fields: Fields, tmp_path: Path) -> None:
    kept = []
    for fraction in (0.2, 0.5):
        recipe = recipe_of(domain_fields, keep_fraction=fraction, quality="none", budget={"steps": 1}, eval_at=[])
        execute(recipe, tmp_path / str(fraction))
        kept.append(set(selection(tmp_path / str(fraction))["ids"]))
    assert kept[0] < kept[1]


def test_degenerate_a_subset_larger_than_the_corpus_is_the_corpus(domain_fields: Fields, tmp_path: Path) -> None:
    recipe = recipe_of(domain_fields, budget={"tokens": 1_500_000}, epochs=1)
    with Run(tmp_path / "a", recipe) as run:
        ctx = Adaptation.open(recipe, run)
        assert recipe._subset(ctx, ctx.domain.train).ids() == ctx.domain.train.ids()


def test_property_scores_from_a_file_and_the_models_own_are_used(domain_fields: Fields, tmp_path: Path) -> None:
    ids = [json.loads(line)["id"] for line in Path(domain_fields["domain"]).read_text().splitlines()]
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({id: float(int(id.split("-")[1])) for id in ids}))
    recipe = recipe_of(domain_fields, quality=str(path), keep_fraction=0.2, budget={"steps": 1}, eval_at=[])
    execute(recipe, tmp_path / "a")
    found = [int(id.split("-")[1]) for id in selection(tmp_path / "a")["ids"]]
    assert max(found) < len(ids) / 2
    result = execute(
        recipe_of(domain_fields, quality="model", keep_fraction=0.2, budget={"flops": 3e9}), tmp_path / "b"
    )
    assert result.cost["flops"] <= 3e9 * 1.02, "scoring is charged to the budget"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 0.5}, "epochs"),
        ({"keep_fraction": 1.5}, "keep_fraction"),
        ({"general": None, "replay": 0.0}, "needs text to compare with"),
        ({"mixture": {}}, "mixture shares"),
    ],
)
def test_rejects_when_built(domain_fields: Fields, changes: Fields, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe_of(domain_fields, **changes)


def test_rejects_bad_scores_and_sources(domain_fields: Fields, tmp_path: Path) -> None:
    few, nan = tmp_path / "few.json", tmp_path / "nan.json"
    few.write_text(json.dumps({"domain-1": 1.0}))
    ids = [json.loads(line)["id"] for line in Path(domain_fields["domain"]).read_text().splitlines()]
    nan.write_text(json.dumps({id: float("nan") for id in ids}))
    with pytest.raises(CorpusError, match=r"1 scores for \d+ training documents"):
        execute(recipe_of(domain_fields, quality=str(few), keep_fraction=0.5), tmp_path / "a")
    with pytest.raises(ValueError, match="NaN"):
        execute(recipe_of(domain_fields, quality=str(nan), keep_fraction=0.5), tmp_path / "b")
    with pytest.raises(CorpusError, match="no general document has source 'web'; there are s0, s1"):
        execute(recipe_of(domain_fields, mixture={"web": 1.0}), tmp_path / "c")
    with pytest.raises(ValueError, match="give keep_fraction"):
        execute(recipe_of(domain_fields, budget={"seconds": 1.0}), tmp_path / "d")


def test_property_mixture_draws_sources_in_proportion(domain_fields: Fields, tmp_path: Path) -> None:
    recipe = recipe_of(domain_fields, mixture={"s0": 3.0, "s1": 1.0}, replay=0.4)
    with Run(tmp_path / "a", recipe) as run:
        ctx = Adaptation.open(recipe, run)
        parts = recipe._replayed(ctx)
    assert [share for _, share in parts] == pytest.approx([0.3, 0.1])
    assert {d.meta["source"] for d in parts[0][0]} == {"s0"}
