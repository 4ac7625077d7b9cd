from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater.compose import skill_localization
from headwater.compose.graft import Patch, digest, join_patches
from headwater.compose.graft_search import FlipSearch, RepeatedBatches, TopSearch
from headwater.compose.skill_localization import Graft, SkillLocalization
from headwater.core.budget import Budget
from headwater.core.fit import FitSettings
from headwater.core.objective import Loss
from headwater.core.recipe import RecipeError
from headwater.core.run import execute
from headwater.modalities.models import ModelError
from headwater.modalities.text.docs import split_documents
from headwater.modalities.text.sources import open_corpus
from headwater.modalities.text.tiny import tiny_llama

FP32 = FitSettings(precision="fp32")


class Squares:
    """Half the squared error of ``model(x)``."""

    unit = "squares/row"

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        return Loss(0.5 * (model(batch["x"]) - batch["y"]).square().sum(), len(batch["x"]))


def tuned_from(base: nn.Module, seed: int = 0, by: float = 0.1) -> nn.Module:
    tuned, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return tuned


def perceptron(seed: int = 0) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2))
    return tuned_from(model, seed, by=1.0)


def some_batches(count: int = 3, rows: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        {"x": torch.randn(rows, 6, generator=generator), "y": torch.randn(rows, 2, generator=generator)}
        for _ in range(count)
    ]


def llama(tie: bool, seed: int = 0) -> nn.Module:
    return tiny_llama(40, hidden=16, layers=1, heads=2, mlp=16, tie=tie, generator_seed=seed)


def same(a: nn.Module, b: nn.Module) -> bool:
    return digest(dict(a.named_parameters())) == digest(dict(b.named_parameters()))


# -- grafts


@pytest.mark.parametrize("tie", [True, False])
def test_property_grafting_everything_gives_the_tuned_model_bit_for_bit(tie):
    base = llama(tie)
    tuned = tuned_from(base)
    graft = Graft(base, tuned, exclude=())
    assert graft.size == sum(p.numel() for p in base.parameters())  # tied weights once
    whole = graft.apply(graft.movement_mask(1.0))
    assert same(whole, tuned)
    assert (whole.lm_head.weight is whole.model.embed_tokens.weight) == tie


@pytest.mark.parametrize("tie", [True, False])
def test_property_embeddings_and_head_are_left_alone_by_default(tie):
    base = llama(tie)
    graft = Graft(base, tuned_from(base))
    grafted = graft.apply(graft.movement_mask(1.0))
    assert torch.equal(grafted.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert torch.equal(grafted.lm_head.weight, base.lm_head.weight)
    assert not torch.equal(grafted.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)
    assert "model.norm.weight" in graft.names


def test_property_embeddings_of_another_name_are_found_by_their_class():
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    names = Graft(base, tuned_from(base)).names
    assert not [name for name in names if "wte" in name or "wpe" in name]
    assert "transformer.h.0.mlp.c_fc.weight" in names


def test_oracle_movement_mask_is_that_of_argpartition():
    base = perceptron()
    tuned = tuned_from(base)
    moved = np.concatenate(
        [(t - b).abs().detach().flatten() for b, t in zip(base.parameters(), tuned.parameters(), strict=True)]
    )
    graft = Graft(base, tuned, exclude=())
    for sparsity in (0.02, 0.1, 0.7):
        count = int(sparsity * len(moved))
        expected = np.sort(np.argpartition(-moved, count - 1)[:count])
        mask = graft.movement_mask(sparsity)
        marked = np.concatenate([mask.dense(name).flatten() for name in graft.names])
        np.testing.assert_array_equal(np.flatnonzero(marked), expected)


def test_oracle_evaluate_is_the_mean_loss_of_the_graft():
    base, batches = perceptron(), some_batches()
    graft = Graft(base, tuned_from(base), exclude=())
    mask = graft.movement_mask(0.3)
    model = graft.apply(mask).eval()
    errors = [0.5 * (model(b["x"]) - b["y"]).square().sum(1) for b in batches]
    assert graft.evaluate(mask, batches, Squares()) == pytest.approx(float(torch.cat(errors).mean().detach()), rel=1e-5)


# -- the search


def linear(weights: list[float]) -> nn.Linear:
    layer = nn.Linear(len(weights), 1, bias=False)
    layer.weight = nn.Parameter(torch.tensor([weights]))
    return layer


def test_equation_straight_through_gradient():
    # base (1, 2), tuned (4, 4): differences 3 and 2. One entry of two: the first moved most, so the graft is (4, 2).
    # x = (1, 10), y = 0: error 24, dL/dtheta = 24 x = (24, 240). dL/dS = (24 * 3, 240 * 2)
    base, tuned = linear([1.0, 2.0]), linear([4.0, 4.0])
    graft = Graft(base, tuned, exclude=())
    search = TopSearch({"weight": tuned.weight.detach()}, graft._movement(), 1, Squares())
    loss = search(copy.deepcopy(base), {"x": torch.tensor([[1.0, 10.0]]), "y": torch.zeros(1, 1)})
    loss.total.backward()
    assert float(loss.total) == 0.5 * 24**2
    assert search.scores[0].grad.tolist() == [[72.0, 480.0]]
    # log(3 / 3) and log(2 / 3): the least of the chosen is the threshold
    assert search.scores[0].flatten().tolist() == pytest.approx([0.0, np.log(2 / 3)])


def test_oracle_flip_gradient_is_the_published_one():
    base = perceptron().double()
    tuned = tuned_from(base)
    own = {name: p.detach() for name, p in base.named_parameters()}
    ends = {name: p.detach() for name, p in tuned.named_parameters()}
    movement = {name: (ends[name] - own[name]).abs().float() for name in own}
    search = FlipSearch(ends, movement, 20, Squares(), seed=3)
    batch = {name: value.double() for name, value in some_batches(1)[0].items()}
    with torch.no_grad():
        for scores in search.scores:  # away from the flat end of the sigmoid, so that all terms count
            scores.add_(9.0)
    search(copy.deepcopy(base), batch).total.backward()

    kept = {name: search.get_buffer(f"kept_{i}").double() for i, name in enumerate(own)}
    sigma = {name: torch.sigmoid(s.detach().double()) for name, s in zip(own, search.scores, strict=True)}
    gamma = {name: kept[name] * (1 - sigma[name]) + (1 - kept[name]) * sigma[name] for name in own}
    mixed = {name: (gamma[name] * ends[name] + (1 - gamma[name]) * own[name]).requires_grad_() for name in own}
    error = torch.func.functional_call(base.eval(), mixed, (batch["x"],)) - batch["y"]
    slopes = torch.autograd.grad(0.5 * error.square().sum(), list(mixed.values()))
    for scores, name, slope in zip(search.scores, own, slopes, strict=True):
        slope_of_sigma = sigma[name] * (1 - sigma[name])
        expected = (1 - 2 * kept[name]) * slope * (ends[name] - own[name]) * slope_of_sigma
        torch.testing.assert_close(scores.grad, expected.float(), rtol=1e-5, atol=1e-6)


def planted(seed: int = 0) -> tuple[nn.Linear, nn.Linear, list[dict[str, Tensor]], set[int]]:
    """A regression whose truth differs from the base in ten weights of 200; the tuned model has these, and 40 others
    that moved twice as far and are wrong."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(200)
    order = rng.permutation(200)
    truth, tuned = base.copy(), base + 0.01 * rng.standard_normal(200)
    truth[order[:10]] += rng.choice([-1.0, 1.0], 10)
    tuned[order[:10]] = truth[order[:10]]
    tuned[order[10:50]] += 2 * rng.choice([-1.0, 1.0], 40)
    batches = []
    for _ in range(4):
        x = rng.standard_normal((128, 200))
        batches.append({"x": torch.tensor(x).float(), "y": torch.tensor(x @ truth[:, None]).float()})
    return linear(base.tolist()), linear(tuned.tolist()), batches, set(order[:10].tolist())


def test_learns_a_planted_support_that_movement_misses():
    base, tuned, batches, support = planted()
    graft = Graft(base, tuned, exclude=())
    moved = set(graft.movement_mask(0.05).indices["weight"].tolist())
    found = graft.fit(batches, Squares(), sparsity=0.05, budget=Budget(steps=100), settings=FP32)
    assert not moved & support
    assert set(found.indices["weight"].tolist()) == support


def test_property_the_size_is_exact_and_the_users_models_stay():
    base = perceptron().train()
    tuned = tuned_from(base)
    kept = copy.deepcopy(base), copy.deepcopy(tuned)
    modes = []

    class Watching(Squares):
        def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
            modes.append(model.training)
            return super().__call__(model, batch)

    graft = Graft(base, tuned, exclude=())
    mask = graft.fit(some_batches(), Watching(), sparsity=0.1, budget=Budget(steps=7), settings=FP32)
    assert mask.count == graft.count(0.1) == 7
    assert same(base, kept[0])
    assert same(tuned, kept[1])
    assert base.training
    assert all(p.requires_grad and p.grad is None for p in (*base.parameters(), *tuned.parameters()))
    assert modes
    assert not any(modes), "dropout is off while a mask is sought"


def test_property_micro_batches_give_the_mask_of_whole_ones():
    base = perceptron()
    graft = Graft(base, tuned_from(base), exclude=())
    masks = [
        graft.fit(
            some_batches(),
            Squares(),
            sparsity=0.2,
            budget=Budget(steps=9),
            settings=FitSettings(precision="fp32", micro_rows=rows),
        )
        for rows in (8, 3)
    ]
    assert all(torch.equal(masks[0].dense(name), masks[1].dense(name)) for name in graft.names)
    assert any(not torch.equal(masks[0].dense(n), graft.movement_mask(0.2).dense(n)) for n in graft.names)


def test_property_flip_begins_with_the_movement_mask():
    base = perceptron()
    graft = Graft(base, tuned_from(base), exclude=())
    mask = graft.fit(
        some_batches(), Squares(), sparsity=0.2, method="flip", lr=1e-9, budget=Budget(steps=1), settings=FP32
    )
    assert all(torch.equal(mask.dense(name), graft.movement_mask(0.2).dense(name)) for name in graft.names)


def test_learns_flip_lowers_the_loss_and_does_not_hold_the_size():
    base, tuned, batches, _ = planted()
    graft = Graft(base, tuned, exclude=())
    mask = graft.fit(
        batches, Squares(), sparsity=0.1, method="flip", lr=1000.0, budget=Budget(steps=300), settings=FP32
    )
    before = graft.evaluate(graft.movement_mask(0.1), batches, Squares())
    assert graft.evaluate(mask, batches, Squares()) < 0.5 * before
    assert mask.count != graft.count(0.1)


def test_property_the_search_does_not_depend_on_the_unit_of_the_loss():
    base, tuned, batches, support = planted()

    class Small(Squares):
        def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
            loss = super().__call__(model, batch)
            return Loss(loss.total * 2.0**-12, loss.count)

    graft = Graft(base, tuned, exclude=())
    found = [
        graft.fit(batches, objective, sparsity=0.05, budget=Budget(steps=8), settings=FP32)
        for objective in (Squares(), Small())
    ]
    assert torch.equal(found[0].dense("weight"), found[1].dense("weight"))
    assert set(found[0].indices["weight"].tolist()) & support, "and it moved"


def test_fault_a_finished_search_is_read_and_batches_without_number_are_refused(tmp_path):
    base, batches = perceptron(), some_batches()
    graft = Graft(base, tuned_from(base), exclude=())
    stream = RepeatedBatches(batches)
    options = {"sparsity": 0.2, "budget": Budget(steps=5), "settings": FP32, "directory": tmp_path}
    first = graft.fit(stream, Squares(), **options)
    seen = []

    class Counting(Squares):
        def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
            seen.append(model)
            return super().__call__(model, batch)

    again = graft.fit(stream, Counting(), **options)
    assert not seen
    assert all(torch.equal(first.dense(name), again.dense(name)) for name in graft.names)
    with pytest.raises(ValueError, match="reached by number"):
        graft.fit(batches, Squares(), **options)


def test_property_repeated_batches_are_those_of_the_source_in_order():
    batches = some_batches()
    stream = RepeatedBatches(batches)
    assert (stream.rows, stream.tokens_per_row) == (8, 6)
    for step in (0, 0, 1, 5, 2, 3):
        assert torch.equal(stream.batch(step, 2, 5)["x"], batches[step % 3]["x"][2:5])


def test_rejects_batches_that_end():
    with pytest.raises(ValueError, match="read only once"):
        RepeatedBatches(iter(some_batches()))
    with pytest.raises(ValueError, match="no batch to read"):
        RepeatedBatches([])


# -- pairs that do not fit


def test_rejects_models_that_are_no_pair():
    base = perceptron()
    with pytest.raises(ValueError, match="equals the base"):
        Graft(base, copy.deepcopy(base), exclude=())
    with pytest.raises(ValueError, match=r"only the base has \['3.bias', '3.weight'\], only the tuned \['1.bias'"):
        Graft(base, nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)), exclude=())
    with pytest.raises(ValueError, match=r"'0.weight' is \(8, 6\) in the base and \(8, 5\)"):
        Graft(base, nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 2)), exclude=())
    broken = tuned_from(base)
    with torch.no_grad():
        broken[3].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'3\.weight' of the tuned model holds NaN"):
        Graft(base, broken, exclude=())


def test_rejects_weights_that_are_quantised():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)

    with pytest.raises(ValueError, match=r"torch.int8: load it without quantisation"):
        Graft(Packed(), Packed(), exclude=())


def test_rejects_sizes_and_settings_that_mean_nothing():
    base = perceptron()
    graft = Graft(base, tuned_from(base), exclude=())
    with pytest.raises(ValueError, match=r"0.01 of 74 parameters is less than one; the least is 0.0135"):
        graft.movement_mask(0.01)
    assert graft.movement_mask(1 / 74).count == 1
    for sparsity in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"sparsity must be in \(0, 1\]"):
            graft.count(sparsity)
    with pytest.raises(ValueError, match="'nothing', which no parameter is called"):
        Graft(base, tuned_from(base), exclude=("nothing",))
    with pytest.raises(ValueError, match="leaves no parameter"):
        Graft(base, tuned_from(base), exclude=("*",))
    for changed in ({"gradient_checkpointing": True}, {"compile": True}):
        with pytest.raises(ValueError, match="gradient_checkpointing or compile"):
            graft.fit(some_batches(), Squares(), sparsity=0.1, settings=FitSettings(**changed))

    class Trained(nn.Linear):
        unit = "x"

    with pytest.raises(ValueError, match="trainable weights"):
        graft.fit(some_batches(), Trained(2, 2), sparsity=0.1)


def test_property_buffers_are_the_bases_and_that_is_said():
    base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    tuned = tuned_from(base)
    tuned(torch.randn(10, 3))  # moves the running statistics
    graft = Graft(base, tuned, exclude=())
    assert "3 buffers of the tuned model differ, 1.running_mean among them" in graft.notices[0]
    assert torch.equal(graft.apply(graft.movement_mask(1.0))[1].running_mean, base[1].running_mean)


def adapter_of(base: nn.Module) -> nn.Module:
    wrapped = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    return wrapped


def test_property_an_adapter_is_the_model_it_makes():
    base = llama(tie=True)
    wrapped = adapter_of(base)
    graft = Graft(base, wrapped)
    assert "low rank" in graft.notices[0]
    assert hasattr(wrapped, "merge_and_unload"), "the user's adapter is still one"
    grafted = graft.apply(graft.movement_mask(1.0))
    assert same(grafted, wrapped.merge_and_unload())


# -- the recipe


def run(fields: dict[str, object], directory: Path, **changes: object):
    return execute(SkillLocalization(**{**fields, **changes}), directory)


@pytest.fixture(scope="module")
def finished(localization_fields, tmp_path_factory):
    directory = tmp_path_factory.mktemp("localization") / "run"
    return directory, run(localization_fields, directory)


def test_property_the_run_leaves_patches_that_make_its_model(finished, localization_fields):
    directory, result = finished
    roles = ("domain", "instruct")
    patches = [Patch.open(directory / "patches" / f"patch-{role}-0.1.safetensors") for role in roles]
    base = AutoModelForCausalLM.from_pretrained(localization_fields["models"]["base"])
    left = AutoModelForCausalLM.from_pretrained(directory / "model")
    assert same(left, join_patches(patches).apply(base))
    curve = json.loads((directory / "curve.json").read_text())
    assert [(row["sparsity"], row["tuned"]) for row in curve["grafts"]] == [
        (sparsity, tuned) for sparsity in (0.01, 0.1) for tuned in (["domain"], ["instruct"], list(roles))
    ]
    size = sum(p.numel() for name, p in base.named_parameters() if "embed" not in name and "lm_head" not in name)
    assert [row["count"] for row in curve["grafts"] if len(row["tuned"]) == 1] == [
        int(s * size) for s in (0.01, 0.01, 0.1, 0.1)
    ]
    assert curve["parts"].keys() == {"base", *roles}
    last = curve["grafts"][-1]["valid"]
    best = {suite: min(part[suite] for part in curve["parts"].values()) for suite in last}
    kept = min(best[suite] / value for suite, value in last.items())
    assert result.metrics["valid/retention_min"] == pytest.approx(kept, rel=1e-5)
    assert result.cost["steps"] == 4 * 3
    table = pd.read_csv(directory / "overlap.csv")
    assert set(table.columns) == {"tuned", *roles, "sparsity"}
    assert table.loc[table["tuned"] == "domain", "domain"].tolist() == [1.0, 1.0]


def test_property_the_patch_applies_by_the_code_of_its_readme(finished, localization_fields, monkeypatch):
    directory, _ = finished
    text = (directory / "patches" / "README.md").read_text(encoding="utf-8")
    without, with_us = (
        re.search(rf"## {title}.*?```python\n(.*?)```", text, re.S)[1] for title in ("Without", "With Headwater")
    )
    assert "headwater" not in without
    assert len(without.splitlines()) <= 11
    monkeypatch.chdir(directory / "patches")
    names: dict[str, object] = {}
    exec(without, names)
    ours: dict[str, object] = {}
    exec(with_us, ours)
    assert same(names["model"], ours["model"])
    base = AutoModelForCausalLM.from_pretrained(localization_fields["models"]["base"])
    assert not same(names["model"], base)


def test_property_held_out_text_of_a_suite_is_not_trained_on(localization_fields, tmp_path, monkeypatch):
    read = []

    def watched(documents, tokenizer):
        read.append([document.id for document in documents])
        return tokenized(documents, tokenizer)

    tokenized = skill_localization.tokenized
    monkeypatch.setattr(skill_localization, "tokenized", watched)
    recipe = SkillLocalization(**localization_fields, **{})
    suites = {"text": {**localization_fields["suites"]["text"], "held_out": 0.3}}
    run(localization_fields, tmp_path / "run", suites=suites, sparsity=[0.1], steps=1)
    documents = list(open_corpus(recipe.data["domain"], role="data"))
    split = split_documents(documents, (1 - 0.45, 0.15, 0.3))
    assert sorted(read[0]) == sorted(document.id for document in split.train)
    assert not set(read[0]) & {document.id for document in (*split.valid, *split.test)}


def test_property_movement_needs_no_text_and_a_narrow_checkpoint_stays_narrow(localization_fields, tmp_path):
    models = {}
    for role, path in localization_fields["models"].items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / role)
        AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / role)
        models[role] = str(tmp_path / role)
    result = run(
        localization_fields,
        tmp_path / "run",
        models=models,
        data={},
        search="movement",
        sparsity=[0.05, 0.5],
        chosen=0.05,
    )
    assert result.cost["steps"] == 0
    assert {v.dtype for v in load_file(tmp_path / "run" / "model" / "model.safetensors").values()} == {torch.bfloat16}
    read = load_file(tmp_path / "run" / "patches" / "patch-domain-0.05.safetensors")
    assert {value.dtype for name, value in read.items() if name.startswith("values/")} == {torch.bfloat16}
    patches = [
        Patch.open(tmp_path / "run" / "patches" / f"patch-{role}-0.05.safetensors") for role in ("domain", "instruct")
    ]
    base = AutoModelForCausalLM.from_pretrained(models["base"], dtype=torch.bfloat16)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model"), join_patches(patches).apply(base))


def test_property_an_adapter_may_be_a_tuned_model(localization_fields, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(localization_fields["models"]["base"])
    adapter_of(base).save_pretrained(tmp_path / "adapter")
    models = {"base": localization_fields["models"]["base"], "tuned": str(tmp_path / "adapter")}
    result = run(localization_fields, tmp_path / "run", models=models, data={}, search="movement", sparsity=[0.01, 1.0])
    assert "low rank" in result.notes["warning/tuned-0"]
    assert result.metrics["suite/text/composed"] == pytest.approx(result.metrics["suite/text/tuned"], rel=1e-5)
    assert not (tmp_path / "run" / "overlap.csv").exists()


def test_property_a_budget_is_of_all_searches_together(localization_fields, tmp_path):
    result = run(localization_fields, tmp_path / "run", budget={"steps": 9})
    assert result.cost["steps"] == 4 * 2  # nine steps, two sizes, two models


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {}}, "no texts for 'domain'"),
        ({"data": {"other": "x"}}, "'other', which is no tuned model"),
        ({"models": {"base": "a"}}, "a model besides `base`"),
        ({"sparsity": [0.1, 0.01]}, "must rise"),
        ({"sparsity": [0.0, 0.1]}, "must rise"),
        ({"sparsity": [0.1, 2.0]}, "must rise"),
        ({"chosen": 0.5}, "not in sparsity"),
        ({"batch_tokens": 16}, "less than one block of 32"),
        ({"search": "best"}, "search"),
    ],
)
def test_rejects_recipes_that_do_not_fit(localization_fields, changes, words):
    with pytest.raises(RecipeError, match=words):
        SkillLocalization(**{**localization_fields, **changes})


def test_rejects_blocks_longer_than_the_model_reads(localization_fields, tmp_path):
    with pytest.raises(ModelError, match="seq_len is 128 but the base has 64 positions"):
        run(localization_fields, tmp_path / "run", seq_len=128)
