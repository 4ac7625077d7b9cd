"""Low rank plus fixed sparse: the layer beside autograd, its cost on paper and executed, supports, saving, resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig

from headwater.core.budget import count_flops
from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.rng import torch_generator
from headwater.core.run import execute, read_result
from headwater.core.surgery import LinearView, save_factored, to_dense
from headwater.efficient.linears import ComposedLinear, draw_support, load_composed, rank_of
from headwater.efficient.memory import activation_bytes
from headwater.efficient.sltrain import SLTrain, apply_sltrain, memory_table, sltrain_param_count
from headwater.modalities.text.tiny import tiny_bert, tiny_llama

Fields = dict[str, Any]
PARTS = ("left", "right", "values", "bias")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(in_features: int = 96, out_features: int = 64, **changes: Any) -> ComposedLinear:
    """A layer with every part away from zero."""
    made = ComposedLinear(
        in_features, out_features, **{"rank": 8, "nnz": 307, "scale": 2.0, "bias": True, "seed": 0, **changes}
    )
    with torch.no_grad():
        for seed, name in enumerate(PARTS):
            parameter = getattr(made, name)
            if parameter is not None:
                parameter.copy_(normal(*parameter.shape, seed=seed) / 4)
    return made


def reference(made: ComposedLinear, x: Tensor) -> Tensor:
    """The definition, under autograd, with a dense scatter."""
    sparse = torch.zeros(made.out_features * made.in_features, dtype=made.values.dtype)
    sparse = sparse.scatter(0, made.index.long(), made.values).view(made.out_features, made.in_features)
    return F.linear(x, made.scale * made.left @ made.right + sparse, made.bias)


def llama_config(hidden: int, mlp: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=False,
    )


SEVEN_B = llama_config(4096, 11008, 32, 32)


def recipe_of(fields: Fields, **changes: Any) -> SLTrain:
    recipe = load_recipe({"method": "sltrain", **fields, **changes})
    assert isinstance(recipe, SLTrain)
    return recipe


# -- the layer


def test_equation_a_layer_by_hand() -> None:
    made = ComposedLinear(2, 2, rank=1, nnz=1, scale=0.5, seed=0)
    with torch.no_grad():
        made.left.copy_(torch.tensor([[2.0], [4.0]]))
        made.right.copy_(torch.tensor([[1.0, 3.0]]))
        made.index.fill_(2)  # row 1, column 0
        made.values.fill_(10.0)
    # 0.5 * [[2, 6], [4, 12]] + [[0, 0], [10, 0]] = [[1, 3], [12, 6]];  x = (1, -1): (1 - 3, 12 - 6)
    assert made.weight.tolist() == [[1, 3], [12, 6]]
    x = torch.tensor([[1.0, -1.0]], requires_grad=True)
    y = made(x)
    assert y.tolist() == [[-2, 6]]
    y.backward(torch.tensor([[1.0, 2.0]]))
    # G = g^T x = [[1, -1], [2, -2]];  dB = s G A^T = 0.5 (1 - 3, 2 - 6);  dA = s B^T G = 0.5 (2 + 8, -2 - 8)
    assert made.left.grad.tolist() == [[-1], [-2]]  # type: ignore[union-attr]
    assert made.right.grad.tolist() == [[5, -5]]  # type: ignore[union-attr]
    assert made.values.grad.tolist() == [2]  # type: ignore[union-attr]  # G[1, 0]
    assert x.grad.tolist() == [[1 + 24, 3 + 12]]  # type: ignore[union-attr]  # g W


def test_oracle_gradcheck_in_double_precision() -> None:
    made = layer().double()
    x = normal(3, 2, 96, dtype=torch.float64).requires_grad_()
    inputs = (x, *(getattr(made, name) for name in PARTS))

    def call(x: Tensor, *parts: Tensor) -> Tensor:
        return torch.func.functional_call(made, dict(zip(PARTS, parts, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"rank": 0}, {"nnz": 0}, {"nnz": 96 * 64}])
def test_oracle_output_and_gradients_are_autograds(changes: Fields) -> None:
    made, x = layer(**changes), normal(4, 5, 96).requires_grad_()
    present = [getattr(made, name) for name in PARTS if getattr(made, name) is not None]
    inputs = [x, *(p for p in present if p.requires_grad)]
    weight = normal(4, 5, 64, seed=9)
    expected = torch.autograd.grad((reference(made, x) * weight).sum(), inputs)
    found = torch.autograd.grad((made(x) * weight).sum(), inputs)
    # float32 over sums of at most 96 terms, in another order
    assert torch.allclose(made(x), reference(made, x), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    assert torch.allclose(F.linear(x, made.weight, made.bias), made(x), rtol=1e-5, atol=1e-5)


def test_property_nothing_is_kept_for_the_backward_pass_but_the_input() -> None:
    made, x = layer(512, 512, rank=8, nnz=100, bias=False), normal(16, 512).requires_grad_()
    known = {"x": x}
    assert activation_bytes(lambda: made(x), [made], known) == 0
    # What autograd keeps by itself: one dense W of 512 x 512 float32.
    assert activation_bytes(lambda: reference(made, x), [made], known) >= 512 * 512 * 4


def test_equation_flops_are_those_on_the_page() -> None:
    made = layer(512, 512, rank=128, nnz=int(0.03 * 512 * 512), bias=False)
    x = normal(256, 512).requires_grad_()
    executed, on_paper = made.step_flops(256)
    # Dense 6 T d^2 = 402.7 M; composing twice and two products for L and R: 8 r d^2 = 268.4 M.
    assert executed == 6 * 256 * 512**2 + 8 * 128 * 512**2 == 671_088_640
    assert count_flops(lambda: made(x).sum().backward()) == executed
    # 6 T (r (in + out) + nnz)
    assert on_paper == 6 * 256 * (128 * 1024 + 7864)
    thin = layer(512, 512, rank=128, nnz=0, bias=False)
    assert count_flops(lambda: thin(x).sum().backward()) == thin.step_flops(256)[0] == thin.step_flops(256)[1]


def test_oracle_to_linear_holds_the_composed_weight() -> None:
    made, x = layer(), normal(3, 96)
    linear = made.to_linear()
    assert type(linear) is nn.Linear
    assert torch.equal(linear.weight, made.weight)
    assert torch.equal(linear(x), made(x))


def test_property_autocast_computes_in_bfloat16_and_keeps_float32_gradients() -> None:
    made, x = layer(), normal(8, 96).requires_grad_()
    exact = torch.autograd.grad(made(x).square().sum(), [made.left, made.values, x])
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    rounded = torch.autograd.grad(y.float().square().sum(), [made.left, made.values, x])
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.03 * theirs.norm()  # eight bits of mantissa


def test_learns_under_compile_in_bfloat16() -> None:
    made = layer().bfloat16()
    target, x = normal(256, 64, seed=5).bfloat16(), normal(256, 96, seed=6).bfloat16()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(compiled(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert made.values.dtype == torch.bfloat16
    assert made.index.dtype == torch.int32


def test_learns_what_low_rank_alone_cannot() -> None:
    goal = layer(64, 64, rank=4, nnz=400, scale=1.0, bias=False, seed=3)
    x = normal(512, 64)
    y = goal(x).detach()
    losses = {}
    # 4 * 128 + 400 = 912 numbers, and 7 * 128 = 896
    for name, made in (
        ("both", ComposedLinear(64, 64, rank=4, nnz=400, seed=3)),
        ("low rank", ComposedLinear(64, 64, rank=7, seed=3)),
    ):
        optimizer = torch.optim.Adam(made.parameters(), lr=2e-2)
        for _ in range(300):
            optimizer.zero_grad()
            loss = F.mse_loss(made(x), y)
            loss.backward()
            optimizer.step()
        losses[name] = loss.item() / y.square().mean().item()
    assert losses["both"] < 0.01
    assert losses["low rank"] > 10 * losses["both"]


# -- the support


@pytest.mark.parametrize(("numel", "count"), [(10, 0), (10, 10), (1000, 1), (1000, 30), (1000, 999), (10**6, 500_000)])
def test_property_supports_have_their_size_and_no_place_twice(numel: int, count: int) -> None:
    drawn = draw_support(numel, count, torch.Generator().manual_seed(1))
    assert len(drawn) == count
    assert torch.equal(drawn, drawn.unique())
    assert count == 0 or 0 <= int(drawn[0]) <= int(drawn[-1]) < numel


def test_property_every_place_is_equally_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = torch.zeros(20)
    for _ in range(4000):
        hits[draw_support(20, 7, generator)] += 1
    # Binomial with 4000 draws of 0.35: a standard deviation of 30; five of them
    assert (hits - 4000 * 7 / 20).abs().max() < 150


def test_property_supports_follow_from_seed_and_name() -> None:
    def index(**changes: Any) -> Tensor:
        return ComposedLinear(40, 30, rank=2, nnz=100, **{"seed": 0, "name": "a", **changes}).index

    assert torch.equal(index(), index())
    assert not torch.equal(index(), index(seed=1))
    assert not torch.equal(index(), index(name="b"))
    assert index().dtype == torch.int32


@pytest.mark.parametrize("delta", [0.03, 0.05, 0.5])
def test_equation_the_sparse_part_holds_the_floor_of_its_share(delta: float) -> None:
    model = tiny_llama(40, hidden=32, layers=1, heads=2, mlp=72, generator_seed=0)
    replacement, _ = apply_sltrain(model, 2, delta, seed=0)
    for name, (out, width) in replacement.replaced.items():
        assert model.get_submodule(name).nnz == int(delta * out * width)  # type: ignore[operator]


def test_equation_fresh_parts_have_the_papers_ranges() -> None:
    made = ComposedLinear(100, 50, rank=20, nnz=2000, seed=0)
    assert not made.left.any()
    for part in (made.right, made.values):  # uniform within 1 / sqrt(100) = 0.1
        assert 0.099 < float(part.detach().abs().max()) <= 0.1
        assert float(part.detach().std()) == pytest.approx(0.1 / 3**0.5, rel=0.05)


# -- whole models


@pytest.mark.parametrize(
    ("shape", "rank", "delta", "full", "lean"),
    [
        ((512, 1376, 8, 8), 128, 0.03, 58_073_600, 43_529_832),
        ((768, 2048, 12, 12), 256, 0.03, 134_105_856, 96_545_796),
        ((1024, 2736, 24, 16), 256, 0.03, 367_969_280, 194_293_544),
        ((2048, 5461, 24, 32), 512, 0.03, 1_339_082_752, 645_547_960),
        ((4096, 11008, 32, 32), 1024, 0.05, 6_738_415_616, 3_144_735_808),
    ],
    ids=["60M", "130M", "350M", "1B", "7B"],
)
def test_equation_parameter_counts(
    shape: tuple[int, int, int, int], rank: int, delta: float, full: int, lean: int
) -> None:
    config = llama_config(*shape)
    with torch.device("meta"):
        assert sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) == full
    assert sltrain_param_count(config, rank, delta) == lean


def test_equation_memory_of_seven_billion() -> None:
    # bf16: weights 2 P, gradients 2 P, moments 4 P for full rank; with P' = 3.145e9 weights 2 P', moments
    # 2 (1 + 4/256) P', one gradient of 32000 x 4096, and 4 bytes an index.
    table = memory_table(SEVEN_B, 1024, 0.05)
    full, lean = table["full"]["adam"], table["sltrain"]["8bit per layer"]
    assert full.total / 1e9 == pytest.approx(53.91, abs=0.01)
    assert [round(x / 1e9, 2) for x in (lean.weights, lean.states, lean.index, lean.gradients)] == [
        6.29,
        6.39,
        1.3,
        0.26,
    ]
    assert 1 - lean.total / full.total == pytest.approx(0.736, abs=1e-3)
    wide = memory_table(SEVEN_B, 1024, 0.05, index_dtype=torch.int64)["sltrain"]["8bit per layer"]
    assert 1 - wide.total / full.total == pytest.approx(0.712, abs=1e-3)
    # What the optimizer alone saves, so that it is not credited to the re-parameterisation:
    assert table["full"]["8bit per layer"].total / 1e9 == pytest.approx(27.43, abs=0.01)
    # The paper's own column at 60M: weights and Adam in bf16 and int64 indices, no gradients: 0.27 GB
    small = memory_table(llama_config(512, 1376, 8, 8), 128, 0.03, index_dtype=torch.int64)["sltrain"]["adam"]
    assert (small.weights + small.states + small.index) / 1e9 == pytest.approx(0.27, abs=0.005)


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40, n_positions=16, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng(devices=[]):
        return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(
    "build",
    [
        gpt2,
        lambda: tiny_llama(40, hidden=32, layers=1, heads=2, mlp=72, generator_seed=0),
        lambda: tiny_bert(40, hidden=32, layers=1, heads=2, mlp=64, generator_seed=0),
    ],
    ids=["gpt2", "llama", "bert"],
)
@pytest.mark.parametrize("init", ["paper", "balanced"])
def test_oracle_dense_and_factored_forms_give_the_same_logits(build: Any, init: Any, tmp_path: Path) -> None:
    model = build()
    apply_sltrain(model, 0.25, 0.05, seed=0, init=init)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("left"):
                parameter.add_(0.1 * normal(*parameter.shape))
        before = model(input_ids=ids).logits
        save_factored(model, tmp_path / "factored", method="sltrain")
        opened = load_composed(tmp_path / "factored")
        assert all(torch.equal(t, model.state_dict()[name]) for name, t in opened.state_dict().items())
        assert torch.equal(opened(input_ids=ids).logits, before)
        to_dense(model).save_pretrained(tmp_path / "dense")
        plain = type(model).from_pretrained(tmp_path / "dense")
        assert torch.allclose(plain(input_ids=ids).logits, before, atol=1e-5)


def test_oracle_balanced_starts_at_the_singular_vectors_with_the_same_norm() -> None:
    weight = normal(24, 40)
    made = ComposedLinear.like(LinearView(weight, None), rank=6, nnz=10, seed=0)
    made.balance(weight)
    product = (made.left @ made.right).detach()
    u, s, vh = torch.linalg.svd(weight)
    best = (u[:, :6] * s[:6]) @ vh[:6]
    assert torch.allclose(product, best * weight.norm() / best.norm(), atol=1e-4)
    assert torch.allclose(made.left.norm(), made.right.norm(), rtol=1e-4), "balanced: both factors have one size"


def test_oracle_approximation_is_exact_where_it_can_be() -> None:
    weight = normal(24, 40)
    whole = ComposedLinear.like(LinearView(weight, None), rank=2, nnz=24 * 40, scale=3.0, seed=0)
    assert whole.approximate(weight) < 1e-6
    part = ComposedLinear.like(LinearView(weight, None), rank=6, nnz=96, scale=3.0, seed=0)
    error = part.approximate(weight)
    assert error == pytest.approx(float((part.weight - weight).norm() / weight.norm()), rel=1e-5)
    tail = float(torch.linalg.svdvals(weight)[6:].norm() / weight.norm())
    assert 0 < error < tail, "the sparse part takes away from what the singular vectors leave"


# -- the recipe


def test_fault_the_support_is_kept_across_resume(
    efficient_fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(efficient_fields)
    execute(recipe, tmp_path / "whole")
    from headwater.core.loop import Loop

    with monkeypatch.context() as patch:
        step = Loop._step

        def stopping(self: Loop, *args: Any) -> Any:
            if self.progress.step == 4:
                raise KeyboardInterrupt
            return step(self, *args)

        patch.setattr(Loop, "_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            execute(recipe, tmp_path / "cut")
    # A resumed process that drew another support would show: its draws are changed, the checkpoint's must win.
    monkeypatch.setattr("headwater.efficient.linears.draw_support", lambda numel, count, _: torch.arange(count))
    execute(recipe, tmp_path / "cut", resume=True)
    whole, resumed = (load_file(tmp_path / name / "factored" / "model.safetensors") for name in ("whole", "cut"))
    assert any(name.endswith("index") for name in whole)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_oracle_what_is_saved_opens_in_both_forms(efficient_fields: Fields, tmp_path: Path) -> None:
    result = execute(recipe_of(efficient_fields), tmp_path / "run")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    factored = load_composed(tmp_path / "run" / "factored")
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.allclose(dense(input_ids=ids).logits, factored(input_ids=ids).logits, atol=1e-5)
    assert sum(p.numel() for p in factored.parameters()) == result.metrics["params_total"]
    assert sum(p.numel() for p in dense.parameters()) > result.metrics["params_total"]
    spectra = json.loads((tmp_path / "run" / "spectrum.json").read_text())
    assert len(spectra) == 3
    ranks = [sum(value > 1e-6 for value in found["low_rank"]) for found in spectra.values()]
    assert ranks == [4, 4, 4], "a quarter of 16"


def test_equation_flops_of_a_run_executed_and_on_paper(efficient_fields: Fields, tmp_path: Path) -> None:
    full = execute(load_recipe({"method": "full_rank", **efficient_fields}), tmp_path / "full").metrics
    lean = execute(recipe_of(efficient_fields, delta=0.125), tmp_path / "lean").metrics
    # Rank 4; four layers of 16 x 16, three of 16 x 32; six steps of 256 tokens.
    composing = 6 * 8 * 4 * (4 * 256 + 3 * 512)
    assert lean["flops_executed"] == full["flops_executed"] + composing
    dense = 6 * 6 * 256 * (4 * 256 + 3 * 512)
    parts = 6 * 6 * 256 * (4 * (4 * 32 + 32) + 3 * (4 * 48 + 64))
    assert lean["flops_ideal"] == full["flops_executed"] - dense + parts
    assert full["flops_ideal"] == full["flops_executed"]


def test_property_a_checkpoint_is_approximated_with_its_error(efficient_fields: Fields, tmp_path: Path) -> None:
    recipe = recipe_of(efficient_fields, from_config=False, approximate=True, budget={"steps": 1}, eval_at=[])
    notes = execute(recipe, tmp_path / "a").notes
    warned = [words for topic, words in notes.items() if topic.startswith("warning/approximate/")]
    assert len(warned) == 7
    assert all("relative Frobenius norm" in words for words in warned)


def test_property_a_high_learning_rate_warns(efficient_fields: Fields, tmp_path: Path) -> None:
    result = execute(recipe_of(efficient_fields, optim={"lr": 2e-2}, budget={"steps": 1}), tmp_path / "a")
    assert "above 0.01" in result.notes["warning/lr"]
    usual = execute(recipe_of(efficient_fields, budget={"steps": 1}), tmp_path / "b")
    assert "warning/lr" not in usual.notes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"delta": 0.0}, "delta"),
        ({"delta": 0.6}, "delta"),
        ({"rank": 0}, "rank"),
        ({"rank": 1.5}, "rank"),
        ({"init": "balanced", "alpha": 16.0}, "the scale is 1, so leave it out"),
        ({"from_config": False}, "pretrains from scratch"),
        ({"approximate": True}, "the other way round"),
    ],
)
def test_rejects_when_built(efficient_fields: Fields, changes: Fields, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe_of(efficient_fields, **changes)


def test_rejects_sizes_that_do_not_fit_by_layer(efficient_fields: Fields, tmp_path: Path) -> None:
    def refused(words: str, **changes: Any) -> None:
        directory = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        with pytest.raises(ValueError, match=words):
            execute(recipe_of(efficient_fields, **changes), directory)
        assert read_result(directory).status == "failed"

    refused(
        r"rank 8 and delta 0.5 make the layers larger than dense: 3,\d+ numbers instead of 2,560", rank=8, delta=0.5
    )
    refused(r"mlp.down_proj' is 16 x 32: rank 16 is not below 16", rank=16)
    refused(r"delta 0.001 leaves layer 'model.layers.0.mlp.down_proj' .16 x 32. without a sparse value", delta=0.001)
    refused("the nearest are", targets=["model.layer.*"])


def test_rejects_empty_layers_and_impossible_sizes() -> None:
    with pytest.raises(ValueError, match="would be empty"):
        ComposedLinear(8, 8, seed=0)
    with pytest.raises(ValueError, match="rank must be within 8"):
        ComposedLinear(8, 9, rank=10, seed=0)
    with pytest.raises(ValueError, match="nnz within 64"):
        ComposedLinear(8, 8, nnz=65, seed=0)
    with pytest.raises(ValueError, match=r"delta must be in"):
        apply_sltrain(nn.Sequential(nn.Linear(8, 8)), 2, 0.0, seed=0)
    with pytest.raises(ValueError, match="between 0 and 4"):
        draw_support(4, 5, torch_generator(0))
    view = LinearView(torch.zeros(8, 12), None)
    assert rank_of(0.25, view, "a") == 2
    assert rank_of(0.01, view, "a") == 1
    with pytest.raises(ValueError, match="rank 8 is not below 8"):
        rank_of(8, view, "a")


def test_property_layers_that_are_left_out_stay_plain() -> None:
    model = tiny_llama(40, hidden=32, layers=2, heads=2, mlp=72, generator_seed=0)
    replacement, _ = apply_sltrain(model, 4, 0.05, seed=0, targets=["*.mlp.*"], exclude=["*.0.*"])
    assert sorted(replacement.replaced) == [f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")]
    composed = [name for name, module in model.named_modules() if isinstance(module, ComposedLinear)]
    assert sorted(composed) == sorted(replacement.replaced)
