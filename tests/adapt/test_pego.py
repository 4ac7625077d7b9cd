import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    ViTConfig,
    ViTModel,
)

from headwater.adapt.orthogonal import OrthogonalGroupLoss, group_figures, group_terms, projections, sum_abs_product
from headwater.adapt.pego import PegoObjective, from_pretrained_pego, merge, pego_model
from headwater.core.objective import Loss

SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {"image_size": 8, "patch_size": 4}


def seeded(make, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def bert():
    return seeded(lambda: BertModel(BertConfig(vocab_size=50, max_position_embeddings=16, **SIZES)))


def gpt2():
    return seeded(lambda: GPT2Model(GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=2)))


def llama():
    config = LlamaConfig(vocab_size=50, max_position_embeddings=16, num_key_value_heads=1, **SIZES)
    return seeded(lambda: LlamaModel(config))


def vit():
    return seeded(lambda: ViTModel(ViTConfig(**IMAGES, **SIZES)))


def clip():
    return seeded(lambda: CLIPVisionModel(CLIPVisionConfig(**IMAGES, **SIZES)))


def classifier(directory):
    """A saved encoder, reopened with a head that is new each time but drawn from one seed."""
    if not (directory / "config.json").exists():
        bert().save_pretrained(directory)
    return seeded(lambda: AutoModelForSequenceClassification.from_pretrained(directory, num_labels=3), 1)


def outputs(model):
    main = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        if main.main_input_name == "pixel_values":
            return model(pixel_values=torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)).last_hidden_state
        answer = model(input_ids=torch.arange(16).reshape(2, 8))
        return answer.logits if hasattr(answer, "logits") else answer.last_hidden_state


def disturb(model, seed=3):
    """Give what is trained weights that are far from their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def group_of(model, **changes):
    return pego_model(model, **{"r": 2, "n": 3, "seed": 5, **changes})


def draw(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def drawn_factors(n=3, out=7, width=9, r=2):
    return [(draw(10 + i, out, r), draw(20 + i, r, width)) for i in range(n)]


# The regulariser.


def test_equation_one_entry_each():
    # W = 2 e1 e1^T, D_1 = 3 e1 e1^T, D_2 = -5 e2 e1^T (2 x 2).  W D_1^T = 6 e1 e1^T and W D_2^T = -10 e1 e2^T: the sum
    # of absolute entries is 16, that of squares 36 + 100.  D_1 D_2^T = -15 e1 e2^T: 15 and 225.
    e1, e2 = torch.eye(2, dtype=torch.float64)
    weight = 2 * torch.outer(e1, e1)
    factors = [(3 * e1[:, None], e1[None]), (-5 * e2[:, None], e1[None])]
    assert [float(term) for term in group_terms(weight, factors)] == [16, 15]
    assert [float(term) for term in group_terms(weight, factors, "fro2")] == [136, 225]


def test_equation_updates_on_other_inputs_cost_nothing():
    e1, e2, e3 = torch.eye(3)
    factors = [(e1[:, None], e2[None]), (e1[:, None], e3[None])]  # rows read inputs 2 and 3; W reads input 1
    assert [float(term) for term in group_terms(torch.outer(e1, e1), factors)] == [0, 0]


@pytest.mark.parametrize("norm", ["l1", "fro2"])
def test_oracle_terms_equal_the_double_loop_over_full_matrices(norm):
    weight, factors = draw(0, 7, 9), drawn_factors()
    full = [up @ down for up, down in factors]
    size = (lambda m: m.abs().sum()) if norm == "l1" else (lambda m: (m * m).sum())
    preserve = sum(size(weight @ delta.T) for delta in full)
    diversify = sum(size(full[i] @ full[j].T) for i in range(3) for j in range(i + 1, 3))
    found = group_terms(weight, factors, norm)
    torch.testing.assert_close(torch.stack(found), torch.stack([preserve, diversify]), rtol=1e-10, atol=0)


def test_oracle_gradient_equals_that_of_full_matrices():
    weight = draw(0, 7, 9).requires_grad_()
    factors = [(up.requires_grad_(), down.requires_grad_()) for up, down in drawn_factors()]
    leaves = [part for pair in factors for part in pair]
    full = [up @ down for up, down in factors]
    slow = sum((weight.detach() @ delta.T).abs().sum() for delta in full)
    slow = slow + 2 * sum((full[i] @ full[j].T).abs().sum() for i in range(3) for j in range(i))
    expected = torch.autograd.grad(slow, leaves)
    preserve, diversify = group_terms(weight, factors)
    (preserve + 2 * diversify).backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-9, atol=1e-12)
    assert weight.grad is None


@pytest.mark.parametrize("block", [1, 11, 10**6])
def test_property_blocks_change_neither_value_nor_gradient(block):
    left, right = draw(1, 8, 3).requires_grad_(), draw(2, 5, 3).requires_grad_()
    value = sum_abs_product(left, right, block=block)
    expected = (left @ right.T).abs().sum()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(*(torch.autograd.grad(v, (left, right)) for v in (value, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_property_the_largest_tensor_is_one_block():
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    left, right = torch.randn(400, 4, requires_grad=True), torch.randn(300, 4, requires_grad=True)
    with Watch():
        sum_abs_product(left, right, block=3000).backward()
    assert max(largest) <= 3000


def test_property_autocast_does_not_round_the_regulariser():
    model = disturb(group_of(bert()))
    penalty = OrthogonalGroupLoss(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = penalty()
    assert inside.dtype == torch.float32
    assert torch.equal(inside, penalty())


def test_degenerate_one_update_has_nothing_to_differ_from():
    preserve, diversify = group_terms(draw(0, 7, 9), drawn_factors(1))
    assert float(preserve) > 0
    assert float(diversify) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(7, 8), drawn_factors()), r"a weight \(7, 8\) is B \(out, r\) times A"),
        ((draw(0, 7, 9), drawn_factors(), "l2"), "norm must be 'l1' or 'fro2'; got 'l2'"),
    ],
)
def test_rejects_terms_of_other_shapes_or_norms(arguments, words):
    with pytest.raises(ValueError, match=words):
        group_terms(*arguments)


def test_rejects_a_model_without_adapters():
    with pytest.raises(ValueError, match="no layer of this model bears a LoRA adapter"):
        OrthogonalGroupLoss(bert())


# The group on a model.


@pytest.mark.parametrize(("make", "sites"), [(bert, 4), (gpt2, 4), (llama, 4), (vit, 4), (clip, 4)])
def test_property_a_new_group_changes_nothing_and_costs_nothing(make, sites):
    before = outputs(make())
    model = group_of(make())
    assert torch.equal(outputs(model), before)
    penalty = OrthogonalGroupLoss(model)
    assert len(penalty.projections) == sites  # query and value of two layers
    loss = penalty()
    assert float(loss) == 0
    loss.backward()
    assert all(not p.grad.any() for name, p in model.named_parameters() if p.requires_grad)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }


@pytest.mark.parametrize("make", [bert, gpt2, llama])
def test_oracle_penalty_equals_peft_delta_weights_against_the_layers_weights(make):
    model = disturb(group_of(make()))
    expected = 0.0
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and layer.lora_A:
            # PEFT gives the update in the layer's own orientation, (in, out) for GPT-2.
            transposed = name.endswith("c_attn")
            weight, *deltas = (
                (m.T if transposed else m).detach()
                for m in (layer.get_base_layer().weight, *(layer.get_delta_weight(f"pego_{i}") for i in range(3)))
            )
            for rows in (slice(0, 24), slice(48, 72)) if transposed else (slice(None),):
                own = [delta[rows] for delta in deltas]
                expected += sum(float((weight[rows] @ delta.T).abs().sum()) for delta in own)
                expected += sum(float((own[i] @ own[j].T).abs().sum()) for i in range(3) for j in range(i))
    assert float(OrthogonalGroupLoss(model)()) == pytest.approx(expected, rel=1e-5)


def test_property_the_key_of_a_fused_layer_stays_as_it_was():
    model = group_of(gpt2())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=torch.arange(16).reshape(2, 8)).last_hidden_state[..., 0].square().sum().backward()
        optimizer.step()
    [first, *_] = [layer for layer in model.modules() if hasattr(layer, "lora_A") and layer.lora_A]
    moved = first.lora_B["pego_1"].weight.any(1)
    assert moved.tolist() == [True] * 24 + [False] * 24 + [True] * 24


def test_oracle_a_group_is_a_lora_of_the_ranks_sum():
    group = disturb(group_of(bert()))
    config = LoraConfig(r=6, lora_alpha=6, target_modules=["query", "value"])
    single = get_peft_model(bert(), config)
    pairs = zip(projections(group), projections(single), strict=True)
    with torch.no_grad():
        for ours, theirs in pairs:
            factors = ours.factors()
            theirs.layer.lora_A["default"].weight.copy_(torch.cat([down for _, down in factors]))
            theirs.layer.lora_B["default"].weight.copy_(torch.cat([up for up, _ in factors], 1))
    torch.testing.assert_close(outputs(single), outputs(group), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 3])
def test_property_a_merged_group_opens_as_one_lora_in_peft(tmp_path, n):
    group = disturb(group_of(classifier(tmp_path / "base"), n=n, whole=["classifier"]))
    before = outputs(group)
    state = torch.random.get_rng_state()
    merged = merge(group)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(outputs(merged), before, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path / "saved")
    opened = PeftModel.from_pretrained(classifier(tmp_path / "base"), tmp_path / "saved")
    assert (opened.peft_config["default"].r, list(opened.peft_config)) == (2 * n, ["default"])
    torch.testing.assert_close(outputs(opened), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs(opened.merge_and_unload()), before, rtol=1e-4, atol=1e-5)


def test_property_a_merged_group_of_a_fused_layer_answers_alike():
    group = group_of(gpt2())
    group_disturbed = disturb(group)
    before = outputs(group_disturbed)
    torch.testing.assert_close(outputs(merge(group_disturbed)), before, rtol=1e-5, atol=1e-5)


def test_property_a_saved_group_opens_with_every_adapter_on_and_trained(tmp_path):
    group = disturb(group_of(classifier(tmp_path / "base"), whole=["classifier"]))
    trained = {name for name, p in group.named_parameters() if p.requires_grad}
    group.save_pretrained(tmp_path / "saved")
    opened = from_pretrained_pego(classifier(tmp_path / "base"), tmp_path / "saved")
    assert torch.equal(outputs(opened), outputs(group))
    assert {name for name, p in opened.named_parameters() if p.requires_grad} == trained
    with pytest.raises(FileNotFoundError, match="there is no folder pego_0"):
        from_pretrained_pego(bert(), tmp_path)


def test_property_seed_draws_the_group_and_leaves_the_global_generator():
    state = torch.random.get_rng_state()
    downs = [next(p for n, p in group_of(bert(), seed=s).named_parameters() if "lora_A" in n) for s in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(downs[0], downs[1])
    assert not torch.equal(downs[0], downs[2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n": 0}, "at least 1; got r=2, n=0"),
        ({"target_modules": ["q_proj"]}, r"names of linear layers, dense, key, query, value; got \['q_proj'\]"),
        ({"target_modules": "query"}, "must be names of linear layers"),
    ],
)
def test_rejects_a_group_that_cannot_be_made(changes, words):
    with pytest.raises(ValueError, match=words):
        group_of(bert(), **changes)


def test_rejects_unknown_architectures_and_quantised_weights():
    with pytest.raises(ValueError, match=r"no query and value projections .* Linear layers: 0"):
        group_of(nn.Sequential(nn.Linear(2, 2)))
    model = bert()
    model.quantization_method = "bitsandbytes"
    with pytest.raises(ValueError, match=r"call `model.dequantize\(\)` first"):
        group_of(model)


# What is measured, and what is minimised.


def test_equation_figures_of_known_updates():
    # Two orthogonal updates of norms 3 and 4 on a layer whose weight they do not meet: singular values 3 and 4 have
    # shares 3/7 and 4/7, so the effective rank is exp(-3/7 ln 3/7 - 4/7 ln 4/7); the size is 5 / ||W||.
    model = group_of(bert(), r=1, n=2)
    sites = projections(model)
    with torch.no_grad():
        for site in sites:
            site.layer.get_base_layer().weight.copy_(torch.diag(torch.tensor([10.0] + 23 * [0.0])))
            for number, size in enumerate((3.0, 4.0)):
                site.layer.lora_A[f"pego_{number}"].weight.copy_(torch.eye(24)[number + 1][None])
                site.layer.lora_B[f"pego_{number}"].weight.copy_(size * torch.eye(24)[number][:, None])
    figures = group_figures(model)
    assert figures["preserve"] == figures["diversify"] == 0
    assert figures["effective_rank"] == pytest.approx(np.exp(-3 / 7 * np.log(3 / 7) - 4 / 7 * np.log(4 / 7)), rel=1e-5)
    assert figures["size"] == pytest.approx(0.5, rel=1e-6)
    with torch.no_grad():
        for site in sites:  # now the first update reads what W reads: ||W D^T||_1 = 30 of at most 24 * 10 * 3
            site.layer.lora_A["pego_0"].weight.copy_(torch.eye(24)[0][None])
    assert group_figures(model)["preserve"] == pytest.approx((1 / 24 + 0) / 2, rel=1e-6)


def test_property_figures_do_not_depend_on_scale_and_are_shares():
    model = disturb(group_of(bert()))
    before = group_figures(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(7)
    after = group_figures(model)
    for name in ("preserve", "diversify"):
        assert 0 < before[name] < 1
        assert after[name] == pytest.approx(before[name], rel=1e-4)
    assert after["size"] == pytest.approx(7 * before["size"], rel=1e-4)


def test_degenerate_a_new_group_has_no_rank():
    assert group_figures(group_of(bert())) == {"preserve": 0, "diversify": 0, "effective_rank": 0, "size": 0}


class Squares:
    unit = "squares"

    def __call__(self, model, batch):
        answers = model(input_ids=batch["input_ids"]).last_hidden_state[:, 0]
        return Loss(answers.square().sum(), len(answers), {})


@pytest.mark.parametrize("lam", [0.0, 0.01])
def test_property_micro_batches_add_up_to_the_whole_batch(lam):
    model = disturb(group_of(bert()))
    objective = PegoObjective(Squares(), OrthogonalGroupLoss(model), lam)
    ids = torch.arange(24).reshape(6, 4)
    parameters = [p for p in model.parameters() if p.requires_grad]
    whole = objective(model, {"input_ids": ids})
    expected = torch.autograd.grad(whole.total / whole.count, parameters)
    parts = [objective(model, {"input_ids": ids[rows]}) for rows in (slice(0, 1), slice(1, 6))]
    found = torch.autograd.grad(sum(p.total for p in parts) / sum(p.count for p in parts), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert float(whole.total) == pytest.approx(
        float(Squares()(model, {"input_ids": ids}).total) + 6 * lam * float(OrthogonalGroupLoss(model)()), rel=1e-5
    )


def test_rejects_a_negative_weight():
    with pytest.raises(ValueError, match="lam must be at least 0; got -1"):
        PegoObjective(Squares(), OrthogonalGroupLoss(group_of(bert())), -1.0)


def test_learns_to_read_what_the_weights_do_not():
    # The task is met by reading input 1, which the weight reads, as well as by input 2, which it does not.
    def trained(lam):
        layer = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.diag(torch.tensor([1.0, 0, 0, 0])))
        model = pego_model(nn.ModuleDict({"query": layer, "value": nn.Linear(4, 4)}), r=1, n=2)
        query = model.base_model.model["query"]
        penalty = OrthogonalGroupLoss(model)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        x = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
        for _ in range(200):
            optimizer.zero_grad()
            miss = (query(x)[0, 1] - 1).square()
            (miss + lam * penalty()).backward()
            optimizer.step()
        return float(miss.detach()), group_figures(model)["preserve"]

    (plain_miss, plain), (held_miss, held) = trained(0.0), trained(0.05)
    assert max(plain_miss, held_miss) < 0.05
    assert held < 0.5 * plain
