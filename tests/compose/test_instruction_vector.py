from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from headwater.compose.instruction_vector import geometry_warnings, merge, read_mergekit, sweep, vector_geometry
from headwater.compose.merge import MergeMethod, open_part
from headwater.core.recipe import RecipeError
from headwater.core.weights import WeightSource, delta
from headwater.modalities.text.tiny import tiny_llama

SHAPES = {"a.weight": (6, 5), "b.weight": (3, 4), "b.bias": (3,), "scale": ()}
State = dict[str, Tensor]


def random_state(seed: int, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def near(base: State, seed: int, by: float = 0.1) -> State:
    return {name: value + by * random_state(seed)[name].to(value.dtype) for name, value in base.items()}


def write(state: State, directory: Path, shards: int = 1) -> Path:
    """A checkpoint cut into ``shards`` files, dealt in turn."""
    directory.mkdir(parents=True)
    names = sorted(state)
    for i in range(min(shards, len(names))):
        save_file({n: state[n] for n in names[i::shards]}, directory / f"model-{i + 1:05d}-of-{shards:05d}.safetensors")
    index = {"weight_map": {n: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, n in enumerate(names)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def read(directory: Path) -> State:
    source = WeightSource.open(directory)
    return {name: source.get(name) for name in source.names()}


def merged(
    tmp_path: Path, parts: dict[str, tuple[State, float]], base: State, method: MergeMethod, **options: object
) -> State:
    merge(base, parts, tmp_path / "out", method=method, **options)
    return read(tmp_path / "out")


def one(value: list[float]) -> State:
    return {"x": torch.tensor(value)}


def test_equation_task_arithmetic(tmp_path):
    # base 1, differences +2 and -1, weights 1 and 0.5, lambda 2:  1 + 2 (2 - 0.5) = 4
    got = merged(tmp_path, {"d": (one([3.0]), 1.0), "i": (one([0.0]), 0.5)}, one([1.0]), "task_arithmetic", scale=2.0)
    assert got["x"].tolist() == [4.0]


def test_equation_linear_is_the_weighted_mean(tmp_path):
    # (3 * 4 + 1 * 8) / 4 = 5; the base plays no part
    got = merged(tmp_path, {"d": (one([4.0]), 3.0), "i": (one([8.0]), 1.0)}, one([100.0]), "linear")
    assert got["x"].tolist() == [5.0]


def test_equation_slerp_of_a_right_angle(tmp_path):
    # omega = 90 degrees, t = 1/3: sin 60 (1, 0) + sin 30 (0, 2) = (0.8660, 1)
    parts = {"a": (one([1.0, 0.0]), 2.0), "b": (one([0.0, 2.0]), 1.0)}
    got = merged(tmp_path, parts, one([0.0, 0.0]), "slerp")
    assert got["x"].tolist() == pytest.approx([math.sqrt(3) / 2, 1.0], abs=1e-6)


def test_degenerate_slerp_of_parallel_vectors_is_linear(tmp_path):
    parts = {"a": (one([1.0, 2.0]), 1.0), "b": (one([3.0, 6.0]), 3.0)}
    got = merged(tmp_path, parts, one([0.0, 0.0]), "slerp")
    assert got["x"].tolist() == pytest.approx([2.5, 5.0])


@pytest.mark.filterwarnings("error")  # 0 / 0 warns
def test_degenerate_slerp_with_a_zero_vector_is_linear(tmp_path):
    got = merged(tmp_path, {"a": (one([0.0, 0.0]), 1.0), "b": (one([2.0, 4.0]), 1.0)}, one([0.0, 0.0]), "slerp")
    assert got["x"].tolist() == [1.0, 2.0]


def test_equation_ties(tmp_path):
    # Differences, density 1/2 of four: the two largest stay.
    #   d: ( 5, -4,  1, 0.5) -> (5, -4, 0, 0)        i: (-2, -3, 0.5, 1) -> (-2, -3, 0, 0)
    # Signs of the sums: +, -. Means of those that agree: 5 (d alone), -3.5 (both), 0, 0.
    parts = {"d": (one([5.0, -4.0, 1.0, 0.5]), 1.0), "i": (one([-2.0, -3.0, 0.5, 1.0]), 1.0)}
    got = merged(tmp_path, parts, one([0.0] * 4), "ties", density=0.5)
    assert got["x"].tolist() == [5.0, -3.5, 0.0, 0.0]


def test_equation_ties_without_normalize_sums(tmp_path):
    parts = {"d": (one([5.0, -4.0]), 1.0), "i": (one([-2.0, -3.0]), 1.0)}
    got = merged(tmp_path, parts, one([0.0, 0.0]), "ties", normalize=False)
    assert got["x"].tolist() == [5.0, -7.0]


@pytest.mark.parametrize("density", [0.003, 0.2, 0.5, 0.99])
def test_oracle_ties_keeps_what_a_sort_would_keep(tmp_path, density):
    base, part = (
        {"x": torch.zeros(40, 50)},
        {"x": random_state(1)["scale"] + torch.randn(40, 50, generator=torch.Generator().manual_seed(1))},
    )
    got = merged(tmp_path, {"d": (part, 1.0)}, base, "ties", density=density)["x"]
    kept = math.ceil(density * 2000)
    threshold = part["x"].abs().flatten().sort(descending=True).values[kept - 1]
    expected = torch.where(part["x"].abs() >= threshold, part["x"], 0.0)
    assert int(got.count_nonzero()) == kept
    assert torch.equal(got, expected)


@pytest.mark.parametrize("method", ["ties", "slerp", "dare", "linear"])
def test_property_blocks_do_not_show_in_the_result(tmp_path, monkeypatch, method):
    base = random_state(0)
    parts = {"d": (near(base, 1), 0.5), "i": (near(base, 2), 0.5)}
    density = 0.4 if method in ("ties", "dare") else 1.0
    merge(base, parts, tmp_path / "whole", method=method, density=density)
    monkeypatch.setattr("headwater.compose.merge._BLOCK", 7)  # one or two rows at a time
    merge(base, parts, tmp_path / "blocks", method=method, density=density, max_memory=1000)
    whole, blocks = read(tmp_path / "whole"), read(tmp_path / "blocks")
    # slerp's angle is a sum in float64, whose order differs: far below one float32 rounding, which may still flip.
    assert all(torch.allclose(whole[n], blocks[n], rtol=2e-7 if method == "slerp" else 0, atol=0) for n in SHAPES)


def test_property_dare_is_unbiased(tmp_path):
    # Every element is delta / density with probability density: variance delta^2 (1 - density) / density. Here one row
    # repeated 2000 times stands for 2000 draws; three standard errors of the mean.
    values = torch.tensor([1.0, -2.0, 0.5])
    base, part = {"x": torch.zeros(2000, 3)}, {"x": values.repeat(2000, 1)}
    got = merged(tmp_path, {"d": (part, 1.0)}, base, "dare", density=0.3)["x"]
    error = 3 * values.abs() * math.sqrt(0.7 / 0.3 / 2000)
    assert ((got.mean(dim=0) - values).abs() < error).all()
    assert got[:, 0].unique().tolist() == pytest.approx([0.0, 1 / 0.3])


def test_property_dare_depends_on_seed_and_part_and_on_nothing_else(tmp_path):
    base, part = random_state(0), near(random_state(0), 1)
    outs = {}
    for name, role, seed, block in [
        ("a", "d", 0, 4 << 30),
        ("b", "d", 0, 500),
        ("c", "d", 1, 4 << 30),
        ("e", "i", 0, 4 << 30),
    ]:
        merge(base, {role: (part, 1.0)}, tmp_path / name, method="dare", density=0.5, seed=seed, max_memory=block)
        outs[name] = read(tmp_path / name)["a.weight"]
    assert torch.equal(outs["a"], outs["b"])  # in blocks of few rows, as at once
    assert not torch.equal(outs["a"], outs["c"])
    assert not torch.equal(outs["a"], outs["e"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_oracle_weights_one_and_zero_give_the_first_part_bitwise(tmp_path, dtype):
    # Differences 100 times the size of the base: a sum in float32 would lose the last digits of what is small.
    base = random_state(0, dtype)
    domain = {name: value * (100 if name == "a.weight" else 0.01) for name, value in random_state(1, dtype).items()}
    got = merged(tmp_path, {"domain": (domain, 1.0), "instruct": (near(base, 2), 0.0)}, base, "task_arithmetic")
    assert all(torch.equal(got[name], domain[name]) for name in SHAPES)


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_oracle_streamed_equals_in_memory_bitwise(tmp_path, shards):
    base = random_state(0, torch.bfloat16)
    domain, instruct = near(base, 1), near(base, 2)
    places = [write(base, tmp_path / "b", shards), write(domain, tmp_path / "d", 2), write(instruct, tmp_path / "i", 1)]
    merge(places[0], {"domain": (places[1], 0.7), "instruct": (places[2], 0.4)}, tmp_path / "out")
    got = read(tmp_path / "out")
    for name in SHAPES:
        b, d, i = (state[name].float() for state in (base, domain, instruct))
        total = torch.zeros_like(b).add_(d - b, alpha=0.7).add_(i - b, alpha=0.4)
        assert torch.equal(got[name], (b + total).bfloat16())


def test_oracle_exact_for_linear_models(tmp_path):
    # A linear model's output is linear in its weights: the merge answers with the sum of the two changes.
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    base = {"w": torch.randn(5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)}
    domain, instruct = ({"w": base["w"] + step} for step in (0.5, torch.arange(5.0, dtype=torch.float64)))
    got = merged(tmp_path, {"d": (domain, 1.0), "i": (instruct, 1.0)}, base, "task_arithmetic")["w"]
    assert torch.allclose(x @ got, x @ domain["w"] + x @ instruct["w"] - x @ base["w"], atol=1e-12)


@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "slerp", "ties"])
def test_oracle_a_lora_part_merges_as_the_merged_model_does(tmp_path, method):
    base, adapter = llama(tmp_path, seed=0), tmp_path / "adapter"
    wrapped = get_peft_model(open_llama(base), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    wrapped.save_pretrained(adapter)
    full = tmp_path / "full"
    wrapped.merge_and_unload().save_pretrained(full)
    other = llama(tmp_path, seed=0, moved=True)
    outs = []
    for name, part in (("from-adapter", adapter), ("from-model", full)):
        merge(base, {"domain": (part, 0.6), "instruct": (other, 0.4)}, tmp_path / name, method=method)
        outs.append(read(tmp_path / name))
    # The adapter's product is rounded in float32 once more or less: a few units in the last place of weights near 0.1.
    assert all(torch.allclose(outs[0][name], outs[1][name], atol=1e-6) for name in outs[0])
    assert isinstance(open_llama(tmp_path / "from-adapter"), LlamaForCausalLM)


def llama(tmp_path: Path, seed: int, moved: bool = False) -> Path:
    model = tiny_llama(32, hidden=16, layers=1, heads=2, mlp=16, context=16, generator_seed=seed)
    if moved:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)))
    directory = tmp_path / f"llama-{seed}{'-moved' * moved}"
    if not directory.exists():
        model.save_pretrained(directory)
    return directory


def open_llama(directory: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(directory)


def test_equation_geometry(tmp_path):
    # base (1, 0); differences (3, 4) and (0, 2): norms 5 and 2, dot 8, cosine 0.8
    geometry = vector_geometry(
        WeightSource.open(one([1.0, 0.0])),
        {"d": WeightSource.open(one([4.0, 4.0])), "i": WeightSource.open(one([1.0, 2.0]))},
    )
    assert geometry["tensor"].tolist() == ["x", "total"]
    total = geometry.iloc[-1]
    assert (total["norm/base"], total["norm/d"], total["norm/i"]) == (1.0, 5.0, 2.0)
    assert total["cosine/d/i"] == pytest.approx(0.8)
    assert total["cosine/base/d"] == pytest.approx(4 / math.sqrt(32))


def test_oracle_total_geometry_is_that_of_the_flat_vectors():
    base = random_state(0)
    parts = {"d": near(base, 1), "i": near(base, 2)}
    table = vector_geometry(WeightSource.open(base), {n: WeightSource.open(s) for n, s in parts.items()})
    flat = {n: torch.cat([(s[k] - base[k]).double().flatten() for k in SHAPES]).numpy() for n, s in parts.items()}
    expected = flat["d"] @ flat["i"] / np.linalg.norm(flat["d"]) / np.linalg.norm(flat["i"])
    assert table.iloc[-1]["cosine/d/i"] == pytest.approx(expected, abs=1e-12)
    assert table.iloc[-1]["elements"] == 6 * 5 + 3 * 4 + 3 + 1


def test_degenerate_geometry_names_zero_and_foreign_vectors():
    base = random_state(0)
    sources = {
        n: WeightSource.open(s) for n, s in {"same": base, "tuned": near(base, 1), "foreign": random_state(5)}.items()
    }
    words = geometry_warnings(vector_geometry(WeightSource.open(base), sources), sources)
    assert len(words) == 2
    assert "same is identical" in words[0]
    assert "foreign does not look" in words[1]


def test_oracle_sweep_evaluates_the_merged_weights_and_restores_the_model(tmp_path):
    base, domain = random_state(0), near(random_state(0), 1)
    model = nn.Linear(5, 6)
    start = {"weight": base["a.weight"], "bias": torch.zeros(6)}
    model.load_state_dict(start)
    change = delta(WeightSource.open({"weight": domain["a.weight"]}), WeightSource.open({"weight": base["a.weight"]}))
    grid = [{"d": scale} for scale in (0.0, 0.5, 1.0)] * 20
    table = sweep(model, {"d": change}, grid, lambda m: {"sum": float(m.weight.double().sum())})
    for weight, found in zip(table["weight/d"], table["sum"], strict=True):
        expected = (base["a.weight"] + weight * (domain["a.weight"] - base["a.weight"])).double().sum()
        assert found == pytest.approx(float(expected), abs=1e-5)
    assert table["sum"].groupby(table["weight/d"]).nunique().max() == 1  # no drift: a point gives the same figure again
    assert torch.equal(model.weight, base["a.weight"])


def test_fault_sweep_restores_the_model_when_the_evaluation_fails():
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    change = open_part({"weight": torch.ones(2, 2)}, WeightSource.open({"weight": before}))

    def fail(_: nn.Module) -> dict[str, float]:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        sweep(model, {"d": change}, [{"d": 1.0}], fail)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("method", "weights", "options", "words"),
    [
        ("ties", {"d": 1.0}, {"density": 1.5}, r"density must be in \(0, 1\]; got 1.5"),
        ("linear", {"d": 1.0}, {"density": 0.5}, "keeps every weight"),
        ("linear", {"d": 1.0, "i": -1.0}, {}, "sum to 0"),
        ("slerp", {"d": 1.0}, {}, "between two models"),
        ("task_arithmetic", {}, {}, "nothing to merge"),
        ("task_arithmetic", {"base": 1.0}, {}, "difference of zero"),
        ("dare", {"d": math.inf}, {}, "finite"),
    ],
)
def test_rejects_what_means_nothing(tmp_path, method, weights, options, words):
    state = random_state(0)
    with pytest.raises(ValueError, match=words):
        merge(
            state,
            {name: (state, weight) for name, weight in weights.items()},
            tmp_path / "out",
            method=method,
            **options,
        )


def test_rejects_an_output_inside_an_input(tmp_path):
    base = write(random_state(0), tmp_path / "b")
    with pytest.raises(ValueError, match="lies in an input"):
        merge(base, {"d": (write(random_state(1), tmp_path / "d"), 1.0)}, base / "out")


CONFIG = """
merge_method: {method}
base_model: ./base
models:
  - model: ./base
  - model: ./domain
    parameters: {{weight: 0.7}}
  - model: ./chat
    parameters: {{density: 0.4}}
parameters: {{weight: 0.5, normalize: false, lambda: 0.9}}
dtype: float32
out_dtype: bfloat16
"""


def test_equation_mergekit_yaml(tmp_path):
    path = tmp_path / "merge.yml"
    path.write_text(CONFIG.format(method="ties"))
    assert read_mergekit(path) == {
        "models": {"base": "./base", "part0": "./domain", "part1": "./chat"},
        "weights": {"part0": 0.7, "part1": 0.5},
        "merge": "ties",
        "density": {"part0": 1.0, "part1": 0.4},
        "normalize": False,
        "scale": 0.9,
        "out_dtype": "bfloat16",
    }


def test_equation_mergekit_slerp(tmp_path):
    path = tmp_path / "merge.yml"
    path.write_text("{merge_method: slerp, base_model: A, models: [{model: A}, {model: B}], parameters: {t: 0.25}}")
    fields = read_mergekit(path)
    assert fields == {"models": {"base": "A", "part0": "B"}, "weights": {"base": 0.75, "part0": 0.25}, "merge": "slerp"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("merge_method: breadcrumbs", "merge_method must be one of"),
        (CONFIG.format(method="ties") + "tokenizer_source: union", "'tokenizer_source' is not read here"),
        (CONFIG.format(method="ties").replace("density: 0.4", "gamma: 0.1"), "'gamma' is not read here"),
        (CONFIG.format(method="ties").replace("weight: 0.7", "weight: [0, 1]"), "by layer are not read"),
        (CONFIG.format(method="ties").replace("weight: 0.5, ", ""), "weight must be one number"),
        (
            "{merge_method: slerp, base_model: A, models: [{model: B}, {model: C}], parameters: {t: 1}}",
            "one other model",
        ),
    ],
)
def test_rejects_mergekit_yaml_that_would_be_read_wrongly(tmp_path, text, words):
    path = tmp_path / "merge.yml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words):
        read_mergekit(path)
