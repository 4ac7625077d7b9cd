import json
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSeq2SeqLM, BartConfig, MT5Config, T5Config

from headwater.adapt import perturbations
from headwater.adapt.claps import Claps, CLAPSObjective, _check_head, examine, output_head, watched
from headwater.adapt.perturbations import (
    contrast_loss,
    cosines,
    masked_mean,
    perturb_negative,
    perturb_positive,
    pull_back,
    push_away,
)
from headwater.adapt.text_to_text import PairData
from headwater.claims.claps import CLAIM, SYMBOLS, Rules, transduced
from headwater.core.budget import Budget
from headwater.core.claim import judge
from headwater.core.fit import FitSettings, Phase, fit
from headwater.core.lora import LoraSpec
from headwater.core.optim import OptimSpec
from headwater.core.recipe import DataRef, ModelRef
from headwater.core.run import Run
from headwater.modalities.models import ModelError
from headwater.modalities.text.objectives import TokenObjective
from headwater.modalities.text.pairs import PairModel, Pairs
from headwater.modalities.text.tiny import tiny_llama, tiny_t5
from headwater.modalities.text.tokenizers import word_tokenizer

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h"]
PAIRS = Pairs(["a b c", "d", "e f g h a", "b h", "c c"], ["h g", "e e e", "a", "h g", "f b"])
FAMILIES = ("t5", "t5 untied", "mt5", "bart")
BATCH, TIME, WIDTH, VOCABULARY = 3, 4, 6, 9


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer([" ".join(WORDS)])


def fresh(family, tokenizer):
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "vocab_size": len(tokenizer)}
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    config = {
        "t5": lambda: T5Config(**t5, **special),
        "t5 untied": lambda: T5Config(**t5, **special, tie_word_embeddings=False),
        "mt5": lambda: MT5Config(**t5, **special),
        "bart": lambda: BartConfig(
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=24,
            dropout=0.0,
            forced_eos_token_id=None,
            bos_token_id=1,
            **special,
        ),
    }[family]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSeq2SeqLM.from_config(config)
        if family == "bart":
            model.final_logits_bias.normal_()
    return PairModel(model.eval(), tokenizer, "seq2seq", 16, 4)


@pytest.fixture
def t5(tokenizer):
    return fresh("t5", tokenizer)


@pytest.fixture
def batch(t5):
    return t5.stream(PAIRS, rows=len(PAIRS), seed=0).batch(0)


@pytest.fixture
def toy():
    """States, labels with padding, an output embedding, a projection and pooled sources; float64."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    head, project = nn.Linear(WIDTH, VOCABULARY).double(), nn.Linear(WIDTH, 5).double()
    for parameter in (*head.parameters(), *project.parameters()):
        parameter.data = drawn(*parameter.shape)
    labels = torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100], [7, 8, 0, -100]])
    return drawn(BATCH, TIME, WIDTH), labels, head, lambda states: project(states).tanh(), drawn(BATCH, 5), project


# -- perturbations


def test_equation_the_contrast_is_a_choice_among_targets():
    similarity = torch.tensor([[0.2, 0.1], [0.0, 0.3]])
    plain = contrast_loss(similarity, 0.1)
    assert plain.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(1 + math.exp(-3))], rel=1e-5)
    # The own wrong target has similarity 0.2: as likely as the right one in row 0, a tenth of e less in row 1.
    sharper = contrast_loss(similarity, 0.1, negative=torch.tensor([0.2, 0.2]))
    expected = [math.log(2 + math.exp(-1)), math.log(1 + math.exp(-3) + math.exp(-1))]
    assert sharper.tolist() == pytest.approx(expected, rel=1e-5)
    excluded = torch.tensor([[False, True], [False, False]])
    assert contrast_loss(similarity, 0.1, excluded=excluded)[0] == 0


def test_property_tau_scales_similarities():
    similarity = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(contrast_loss(similarity, 0.1), contrast_loss(3 * similarity, 0.3))


def test_oracle_the_negative_is_a_step_along_the_softmax_residual(toy):
    hidden, labels, head, *_ = toy
    moved = perturb_negative(hidden, labels, head, 0.7)
    for row in range(BATCH):
        for time in range(TIME):
            expected = hidden[row, time].clone()
            if labels[row, time] >= 0:
                residual = head(expected).softmax(-1).detach()
                residual[labels[row, time]] -= 1
                gradient = residual @ head.weight.detach()
                expected += 0.7 * gradient / gradient.norm()
            torch.testing.assert_close(moved[row, time], expected)


def test_oracle_pushing_away_follows_the_numerical_gradient(toy):
    hidden, labels, _, project, source, _ = toy
    real = labels >= 0

    def loss(states):
        pooled = torch.stack([project(states[i][real[i]]).mean(0) for i in range(BATCH)])
        logits = F.cosine_similarity(source[:, None], pooled[None], dim=-1) / 0.5
        return F.cross_entropy(logits, torch.arange(BATCH), reduction="sum")

    step = perturbations.push_away(hidden, real, source, project, 2.0, tau=0.5) - hidden
    with torch.no_grad():
        for row, time in ((0, 0), (0, 3), (1, 1), (2, 2)):
            gradient = torch.zeros(WIDTH, dtype=torch.float64)
            for at in range(WIDTH):
                shift = torch.zeros_like(hidden)
                shift[row, time, at] = 1e-6
                gradient[at] = (loss(hidden + shift) - loss(hidden - shift)) / 2e-6
            torch.testing.assert_close(step[row, time], 2 * gradient / gradient.norm(), rtol=1e-5, atol=1e-6)


def test_oracle_pulling_back_follows_the_difference_of_predictions(toy):
    hidden, labels, head, *_ = toy
    real = labels >= 0
    away = hidden + 0.5
    back = pull_back(away, hidden, real, head, 0.3)
    difference = (head(away).softmax(-1) - head(hidden).softmax(-1)).detach()
    expected = away - 0.3 * F.normalize(difference @ head.weight.detach(), dim=-1) * real[..., None]
    torch.testing.assert_close(back, expected)


def test_property_pulling_back_restores_predictions_unless_the_step_is_too_long(toy):
    hidden, labels, head, *_ = toy
    away = hidden + 0.5

    def divergence(states):
        log_p, log_q = head(hidden).log_softmax(-1), head(states).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)[labels >= 0].detach()

    assert (divergence(pull_back(away, hidden, labels >= 0, head, 1e-2)) < divergence(away)).all()
    assert not (divergence(pull_back(away, hidden, labels >= 0, head, 10.0)) < divergence(away)).any()


def test_property_every_real_step_has_the_length_asked_for(toy):
    hidden, labels, head, project, source, _ = toy
    real = labels >= 0
    for moved in (
        perturb_negative(hidden, labels, head, 1.5) - hidden,
        push_away(hidden, real, source, project, 1.5) - hidden,
    ):
        torch.testing.assert_close(moved.norm(dim=-1), 1.5 * real.double())
    both = perturb_positive(hidden, real, source, project, head, 1.5)
    assert torch.equal(both[~real], hidden[~real])


def test_property_no_step_no_move(toy):
    hidden, labels, head, project, source, _ = toy
    assert torch.equal(perturb_negative(hidden, labels, head, 0.0), hidden)
    assert torch.equal(perturb_positive(hidden, labels >= 0, source, project, head, 0.0), hidden)


def test_property_perturbing_leaves_no_gradient_behind(toy):
    hidden, labels, head, project, source, layer = toy
    hidden.requires_grad_()
    with torch.no_grad():  # and works where none is kept
        found = [
            perturb_negative(hidden, labels, head, 1.0),
            perturb_positive(hidden, labels >= 0, source, project, head, 1.0),
        ]
    assert all(p.grad is None for p in (hidden, *head.parameters(), *layer.parameters()))
    assert not any(states.requires_grad for states in found)


def test_property_tokens_are_taken_some_at_a_time(toy, monkeypatch):
    hidden, labels, head, project, source, _ = toy

    def found():
        return (
            perturb_negative(hidden, labels, head, 1.0),
            perturb_positive(hidden, labels >= 0, source, project, head, 1.0),
        )

    whole = found()
    monkeypatch.setattr(perturbations, "_TOKENS", 5)
    for one, other in zip(whole, found(), strict=True):
        torch.testing.assert_close(one, other)


def test_property_the_negative_raises_the_loss_at_the_rate_of_its_gradient(t5, batch):
    with watched(t5.model) as seen:
        TokenObjective()(t5.model, batch)
    head, labels, hidden = output_head(t5.model), batch["labels"], seen.hidden.detach().requires_grad_()

    def nats(states):
        return F.cross_entropy(head(states).double().flatten(0, 1), labels.flatten(), reduction="sum")

    (gradient,) = torch.autograd.grad(nats(hidden), hidden)
    moved = perturb_negative(hidden, labels, head, 1e-2)
    rise = (nats(moved) - nats(hidden)).item()
    assert rise == pytest.approx(1e-2 * gradient.norm(dim=-1).sum().item(), rel=0.02)


def test_degenerate_small_gradients_still_give_a_direction():
    faint = perturbations._steps(torch.tensor([[[3e-30, 4e-30]]]), torch.tensor([[True]]))
    assert faint.flatten().tolist() == pytest.approx([0.6, 0.8])
    assert not perturbations._steps(torch.zeros(1, 1, 2), torch.tensor([[True]])).any()


def test_degenerate_a_batch_of_one_has_nothing_to_be_pushed_from(toy):
    hidden, labels, head, project, source, _ = toy
    one = slice(0, 1)
    same = perturb_positive(hidden[one], labels[one] >= 0, source[one], project, head, 3.0)
    assert torch.equal(same, hidden[one])


# -- objective


@pytest.mark.parametrize("family", FAMILIES)
def test_oracle_the_states_seen_give_the_models_logits(family, tokenizer):
    asked = fresh(family, tokenizer)
    batch = asked.stream(PAIRS, rows=5, seed=0).batch(0)
    with watched(asked.model) as seen:
        TokenObjective()(asked.model, batch)
    own = asked.model(**{name: value for name, value in batch.items() if name != "row"})
    torch.testing.assert_close(output_head(asked.model)(seen.hidden), own.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.encoded, own.encoder_last_hidden_state)
    assert not asked.model._forward_hooks
    assert not asked.model.get_output_embeddings()._forward_pre_hooks
    _check_head(asked, PAIRS)


@pytest.mark.parametrize("family", FAMILIES)
def test_property_without_contrast_the_gradient_is_the_likelihoods(family, tokenizer):
    asked = fresh(family, tokenizer)
    batch = asked.stream(PAIRS, rows=5, seed=0).batch(0)
    gradients = []
    for objective in (TokenObjective(), CLAPSObjective(asked.model, alpha=0.0)):
        asked.model.zero_grad()
        objective(asked.model, batch).total.backward()
        gradients.append({name: p.grad.clone() for name, p in asked.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def by_hand(objective, model, batch, *, compat=False):
    """L of a batch from the definition, and z_y."""
    with watched(model) as seen:
        nll = TokenObjective()(model, batch)
    hidden, real, head = seen.hidden, batch["labels"] >= 0, output_head(model)
    same = torch.zeros(len(real), len(real), dtype=torch.bool)
    for i in range(len(real)):
        for j in range(len(real)):
            same[i, j] = not compat and i != j and torch.equal(batch["labels"][i], batch["labels"][j])
    source = masked_mean(objective.project(seen.encoded), batch["attention_mask"] == 1)
    wrong = perturb_negative(hidden, batch["labels"], head, objective.eps_neg)
    away = push_away(hidden, real, source, objective.project, objective.eps_pos, tau=objective.tau, excluded=same)
    right = pull_back(away, hidden, real, head, objective.eps_pos)
    z_y, z_wrong, z_right = (masked_mean(objective.project(states), real) for states in (hidden, wrong, right))
    total = 0.0
    for i in range(len(real)):
        for number, own in enumerate((z_y, z_right)):
            tau = 1.0 if compat and number else objective.tau
            others = [F.cosine_similarity(source[i], z_y[j], dim=0) / tau for j in range(len(real)) if j != i]
            kept = [value for j, value in zip([j for j in range(len(real)) if j != i], others, strict=True)
                    if not same[i, j]]  # fmt: skip
            mine = F.cosine_similarity(source[i], own[i], dim=0) / tau
            bad = F.cosine_similarity(source[i], z_wrong[i], dim=0) / tau
            total = total + torch.logsumexp(torch.stack([mine, bad, *kept]), 0) - mine
    return nll.total / nll.count + objective.alpha * total / (2 * len(real))


@pytest.mark.parametrize("compat", [False, True])
def test_oracle_the_loss_is_the_papers(compat, t5, batch):
    objective = CLAPSObjective(t5.model, alpha=0.7, official_compat=compat)
    loss = objective(t5.model, batch)
    assert int(loss.count) == int((batch["labels"] >= 0).sum())
    expected = by_hand(objective, t5.model, batch, compat=compat)
    torch.testing.assert_close(loss.total / loss.count, expected, rtol=1e-4, atol=1e-5)
    parts = loss.metrics["nll"] + 0.7 * loss.metrics["contrast"]
    torch.testing.assert_close(parts, (loss.total / loss.count).detach())
    torch.testing.assert_close(
        torch.autograd.grad(loss.total / loss.count, t5.model.shared.weight)[0],
        torch.autograd.grad(by_hand(objective, t5.model, batch, compat=compat), t5.model.shared.weight)[0],
        rtol=1e-3,
        atol=1e-5,
    )


def test_equation_steps_of_length_zero_double_the_right_target(t5, batch):
    objective = CLAPSObjective(t5.model, eps_pos=0.0, eps_neg=0.0, official_compat=True)
    with watched(t5.model) as seen:
        TokenObjective()(t5.model, batch)
    _, source, target, *_ = objective.pooled(seen, batch)
    similarity = cosines(source, target)
    first = torch.logsumexp(torch.cat((similarity, similarity.diagonal()[:, None]), 1) / objective.tau, 1)
    first = first - similarity.diagonal() / objective.tau
    second = torch.logsumexp(torch.cat((similarity, similarity.diagonal()[:, None]), 1), 1) - similarity.diagonal()
    torch.testing.assert_close(objective.contrast(t5.model, seen, batch)[0], (first + second) / 2)


def test_property_the_likelihood_accumulates_exactly(t5, batch):
    objective = CLAPSObjective(t5.model)
    whole = objective(t5.model, batch)
    parts = [objective(t5.model, {k: v[i : i + 2] for k, v in batch.items()}) for i in (0, 2, 4)]
    assert sum(int(part.count) for part in parts) == int(whole.count)
    nll = sum(part.metrics["nll"] * part.count for part in parts)
    torch.testing.assert_close(nll, whole.metrics["nll"] * whole.count)


def test_property_the_projection_follows_from_the_seed_alone(t5):
    state = torch.random.get_rng_state()
    one, same, other = (CLAPSObjective(t5.model, seed=seed, projection_dim=3) for seed in (1, 1, 2))
    assert torch.equal(one.projection.weight, same.projection.weight)
    assert not torch.equal(one.projection.weight, other.projection.weight)
    assert one.projection.weight.shape == (3, 16)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_property_bfloat16_weights_and_autocast(t5, batch):
    objective = CLAPSObjective(t5.model)
    with torch.autocast("cpu", torch.bfloat16):
        cast = objective(t5.model, batch).total
    exact = objective(t5.model, batch).total
    torch.testing.assert_close(cast, exact, rtol=0.1, atol=0.0)
    half = t5.model.to(torch.bfloat16)
    loss = objective(half, batch)
    loss.total.backward()
    torch.testing.assert_close(loss.total, exact, rtol=0.1, atol=0.0)
    assert objective.projection.weight.grad.dtype == torch.float32


def test_rejects_what_has_no_targets_from_an_encoder(tokenizer):
    llama = tiny_llama(tokenizer, hidden=16, layers=1, heads=2, mlp=16, generator_seed=0)
    with pytest.raises(ModelError, match="AutoModelForSeq2SeqLM, such as T5ForConditionalGeneration"):
        CLAPSObjective(llama)


def test_rejects_values_out_of_range(t5, batch):
    with pytest.raises(ValueError, match=r"tau must be above 0.*got 0\.0"):
        CLAPSObjective(t5.model, tau=0.0)
    with pytest.raises(ValueError, match="at least 0"):
        CLAPSObjective(t5.model, eps_neg=-1.0)
    batch["labels"][2] = -100
    with pytest.raises(ValueError, match="row 2 of the batch has a target without a token"):
        CLAPSObjective(t5.model)(t5.model, batch)


def test_rejects_states_of_two_widths(t5, batch):
    objective = CLAPSObjective(t5.model)
    with watched(t5.model) as seen:
        TokenObjective()(t5.model, batch)
    seen.encoded = seen.encoded[..., :8]
    with pytest.raises(ValueError, match="the encoder's have 8 features and the decoder's 16"):
        objective.contrast(t5.model, seen, batch)


def test_rejects_logits_that_are_changed_after_the_embedding(t5):
    def capped(module, args, output):
        output.logits = output.logits.tanh()
        return output

    t5.model.register_forward_hook(capped)
    with pytest.raises(ModelError, match="changes its logits after the output embedding"):
        _check_head(t5, PAIRS)


# -- recipe


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("t5")
    fresh("t5", tokenizer).model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def recipe(directory, steps=4, **fields):
    settings = {"max_target": 4, "batch_size": 4, "num_beams": 1, "fit": FitSettings(precision="fp32"), **fields}
    return Claps(
        model=ModelRef(name=str(directory)),
        train=DataRef(name="unused"),
        test=DataRef(name="unused"),
        budget=Budget(steps=steps),
        optim=OptimSpec(lr=1e-2),
        **settings,
    )


def run_on(chosen, directory):
    with Run(directory, chosen) as run:
        return chosen.run_on(PairData(PAIRS, PAIRS), run)


def test_property_it_leaves_a_plain_model_and_the_projection_beside(saved, tmp_path):
    metrics = run_on(recipe(saved, projection_dim=8, warm_start=0.5), tmp_path / "run")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "model")
    assert model.state_dict().keys() == AutoModelForSeq2SeqLM.from_pretrained(saved).state_dict().keys()
    objective = CLAPSObjective(model, projection_dim=8)
    objective.load_state_dict(load_file(tmp_path / "run" / "claps_projection.safetensors"))
    assert not torch.equal(objective.projection.weight, CLAPSObjective(model, projection_dim=8).projection.weight)
    assert "claps_projection.safetensors" in (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")
    assert metrics["claps/nll/negative"] > metrics["claps/nll"]
    assert {"claps/kl/away", "claps/kl/positive", "claps/sim/negative"} <= metrics.keys()
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["phase"]: line["step"] for line in logged} == {"likelihood": 2, "contrast": 2}


def test_property_adapters_are_trained_by_it_too(saved, tmp_path):
    metrics = run_on(recipe(saved, lora=LoraSpec(r=2)), tmp_path / "run")
    base = AutoModelForSeq2SeqLM.from_pretrained(saved)
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "model")
    assert any(p.abs().max() > 0 for name, p in adapted.named_parameters() if "lora_B" in name)
    assert metrics["claps/nll/negative"] > metrics["claps/nll"]


def test_property_one_pair_at_a_time_is_warned_of(saved, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run_on(recipe(saved, steps=1, fit=FitSettings(precision="fp32", micro_rows=1)), tmp_path / "run")
    assert "no other targets to contrast with" in caplog.text


def test_rejects_fields_and_models_that_do_not_fit(saved, tiny_causal, tmp_path):
    with pytest.raises(ValueError, match=r"leave fit\.compile off"):
        recipe(saved, fit=FitSettings(compile=True))
    for fields in ({"tau": 0.0}, {"eps_neg": -1.0}, {"warm_start": 1.0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            recipe(saved, **fields)
    with pytest.raises(ModelError, match="AutoModelForSeq2SeqLM, such as"):
        run_on(recipe(tiny_causal), tmp_path / "run")


def test_learns_to_tell_its_target_from_a_perturbed_one(tokenizer, tmp_path):
    model = PairModel(tiny_t5(tokenizer, 16, 1, 2, 32, generator_seed=0), tokenizer, "seq2seq", 16, 4)
    objective = CLAPSObjective(model.model)
    stream = model.stream(PAIRS, rows=5, seed=0)

    def told_apart():
        found = examine(objective, model.model.eval(), stream.batch(0))
        return float((found["sim/target"] - found["sim/negative"]).mean())

    before = told_apart()
    fit(
        Phase("contrast", model.model, stream, objective),
        budget=Budget(steps=60),
        optim=OptimSpec(lr=1e-2),
        seed=0,
        directory=tmp_path,
        settings=FitSettings(precision="fp32"),
    )
    assert told_apart() > before + 0.1


# -- claim


def test_equation_the_rules_of_the_claim():
    rules = Rules([5, 6, 7], [0, 1, 0], [(" e1", ""), ("", " e2 e3"), (" e0", " e4")])
    # 0 stands first, after class 0; 1 after 0, of class 0; 2 after 1, of class 1.
    assert rules.write([0, 1, 2]) == "t5 e1 t6 t7 e4"
    assert rules.write([1, 0]) == "t6 t5"


def test_property_the_claims_pairs():
    rules = Rules.draw(3)
    assert sorted(rules.letters) == list(range(SYMBOLS))
    assert sum(rules.classes) == SYMBOLS // 2
    pairs = transduced(rules, 3, "test", 100)
    assert not set(pairs.sources) & set(transduced(rules, 3, "train", 100).sources)
    for source, target in zip(pairs.sources, pairs.targets, strict=True):
        symbols = [int(word[1:]) for word in source.split()]
        assert len(set(symbols)) == len(symbols) in range(5, 9)
        assert rules.write(symbols) == target
        assert [word for word in target.split() if word[0] == "t"] == [f"t{rules.letters[s]}" for s in symbols]


def test_learns_claim_runs_at_smoke_scale(tmp_path):
    measured = CLAIM.measure("smoke", 100, tmp_path / "claim")
    verdict = judge(CLAIM, "smoke", {100: measured})
    assert verdict["verdict"] == "inconclusive"
    assert {part.treatment for part in CLAIM.parts} | {part.baseline for part in CLAIM.parts} <= set(measured.arms)
    for arm in measured.items:
        for metric, values in measured.items[arm].items():
            assert measured.arms[arm][metric] == pytest.approx(sum(values) / len(values))
    assert measured.arms["claps"]["negative raises the loss"] == 1
