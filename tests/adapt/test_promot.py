import json
import logging

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from headwater.adapt.promot import (
    ProMoT,
    PromptedObjective,
    _offloaded,
    add_prompt,
    embedding_rms,
    promot_stage,
)
from headwater.adapt.text_to_text import PairData
from headwater.claims.promot import CLAIM, FAMILIES, asked, majority, shown
from headwater.core.budget import Budget
from headwater.core.claim import judge
from headwater.core.fit import FitSettings
from headwater.core.lora import LoraSpec
from headwater.core.optim import OptimSpec
from headwater.core.recipe import DataRef, ModelRef
from headwater.core.run import Run
from headwater.modalities.models import ModelError
from headwater.modalities.text.pairs import PairModel, Pairs
from headwater.modalities.text.tiny import tiny_llama, tiny_t5
from headwater.modalities.text.tokenizers import word_tokenizer

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h"]
PAIRS = Pairs(["a b c", "d", "e f g h a", "b h"], ["yes", "no", "yes", "no"])
TOKENS = 5


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer([" ".join([*WORDS, "yes no"])])


def fresh(kind, tokenizer, seed=0):
    if kind == "causal":
        return tiny_llama(tokenizer, hidden=32, layers=2, heads=2, mlp=48, context=32, generator_seed=seed)
    return tiny_t5(tokenizer, hidden=32, layers=1, heads=2, mlp=48, generator_seed=seed)


def pair_model(model, tokenizer, kind, target=4):
    return PairModel(model, tokenizer, kind, 16, target)


def in_front(model, ids):
    """Embeddings of the prompt and of ``ids``, ``(1, TOKENS + time, dim)``, put together by hand."""
    prompt = model.prompt_encoder["default"].embedding.weight
    return torch.cat((prompt, model.get_base_model().get_input_embeddings()(ids)))[None]


@pytest.fixture(scope="module", params=["causal", "seq2seq"])
def saved(request, tokenizer, tmp_path_factory):
    """A model's kind and the directory that it lies in."""
    directory = tmp_path_factory.mktemp(request.param)
    fresh(request.param, tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return request.param, directory


@pytest.fixture(scope="module")
def causal(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    fresh("causal", tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def recipe(directory, steps=4, **fields):
    settings = {"max_target": 2, "batch_size": 4, "prompt_tokens": TOKENS, "prompt_steps": 0.5, **fields}
    return ProMoT(
        model=ModelRef(name=str(directory)),
        train=DataRef(name="unused"),
        test=DataRef(name="unused"),
        budget=Budget(steps=steps),
        fit=FitSettings(precision="fp32", log_every=1),
        **{"optim": OptimSpec(lr=1e-2), **settings},
    )


def run_on(chosen, directory, pairs=PAIRS):
    with Run(directory, chosen) as run:
        return chosen.run_on(PairData(pairs, pairs, retained={"other": Pairs(["a a"], ["a"])}), run)


def opened(directory, kind="causal"):
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForSeq2SeqLM
    return auto.from_pretrained(directory / "model")


def prompt_of(directory):
    return load_file(directory / "prompt" / "adapter_model.safetensors")["prompt_embeddings"]


# -- parts


def test_equation_the_loss_is_that_of_the_embeddings_put_in_front(tokenizer):
    model = add_prompt(fresh("causal", tokenizer), "causal", TOKENS, seed=1).eval()
    asked = pair_model(model, tokenizer, "causal")
    loss = PromptedObjective()(model, asked.stream(PAIRS, rows=4, seed=0).batch(0))
    expected, count = 0.0, 0
    for pair in asked.encode(PAIRS):  # each alone, without padding
        ids = torch.tensor(pair.source + pair.target)
        log_p = model.get_base_model()(inputs_embeds=in_front(model, ids)).logits[0].log_softmax(-1)
        for place in range(len(pair.source), len(ids)):
            expected -= log_p[TOKENS + place - 1, ids[place]]
            count += 1
    assert int(loss.count) == count == 8  # "yes" or "no", and the EOS
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-5)


def test_equation_the_encoders_loss_too(tokenizer):
    model = add_prompt(fresh("seq2seq", tokenizer), "seq2seq", TOKENS, seed=1).eval()
    asked = pair_model(model, tokenizer, "seq2seq")
    loss = asked.objective(model, asked.stream(PAIRS, rows=4, seed=0).batch(0))
    expected = 0.0
    for pair in asked.encode(PAIRS):
        embeddings = in_front(model, torch.tensor(pair.source))
        target = torch.tensor([pair.target])
        expected += model.get_base_model()(inputs_embeds=embeddings, labels=target).loss * target.numel()
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_oracle_answers_are_greedy_behind_the_prompt(kind, tokenizer):
    base = fresh(kind, tokenizer, seed=3)
    with torch.no_grad():  # large weights, so that answers depend on what is read
        for parameter in base.parameters():
            parameter.mul_(3.0)
    model = add_prompt(base, kind, TOKENS, seed=1).eval()
    asked = pair_model(model, tokenizer, kind, target=6)
    found = asked.answers(PAIRS.sources)
    assert found != pair_model(base, tokenizer, kind, target=6).answers(PAIRS.sources)
    for source, answer in zip(asked.encode_sources(PAIRS.sources), found, strict=True):
        ids, written = list(source), []
        while len(written) < 6:
            if kind == "causal":
                logits = base(inputs_embeds=in_front(model, torch.tensor(ids + written))).logits
            else:
                begun = torch.tensor([[base.config.decoder_start_token_id, *written]])
                logits = base(inputs_embeds=in_front(model, torch.tensor(ids)), decoder_input_ids=begun).logits
            written.append(int(logits[0, -1].argmax()))
            if written[-1] == tokenizer.eos_token_id:
                break
        assert tokenizer.decode(written, skip_special_tokens=True).strip() == answer


def test_property_a_stage_trains_its_own_part_only(tokenizer):
    model = add_prompt(fresh("causal", tokenizer), "causal", TOKENS, seed=1)
    batch = pair_model(model, tokenizer, "causal").stream(PAIRS, rows=4, seed=0).batch(0)
    prompt = [p for name, p in model.named_parameters() if "prompt_encoder" in name]
    base = [p for name, p in model.named_parameters() if "prompt_encoder" not in name]
    for stage, trained, frozen in ((1, prompt, base), (2, base, prompt)):
        promot_stage(model, stage)
        model.zero_grad(set_to_none=True)
        PromptedObjective()(model, batch).total.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
        assert all(p.grad is None for p in frozen)


def test_property_the_prompt_begins_as_words_of_the_vocabulary(tokenizer):
    base = fresh("causal", tokenizer)
    table = base.get_input_embeddings().weight.detach()
    before = torch.random.get_rng_state()
    drawn, again, other = (
        add_prompt(base, "causal", TOKENS, seed=seed).prompt_encoder["default"].embedding.weight.detach()
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)
    assert all((table == row).all(1).any() for row in drawn)
    assert embedding_rms(base) == pytest.approx(float((table**2).mean() ** 0.5))


def test_property_the_prompt_begins_as_a_text_repeated_or_cut(tokenizer):
    base = fresh("causal", tokenizer)
    table = base.get_input_embeddings().weight.detach()
    for text, expected in (([7, 9], [7, 9, 7, 9, 7]), ([3, 4, 5, 6, 7, 8], [3, 4, 5, 6, 7])):
        model = add_prompt(base, "causal", TOKENS, seed=1, text_ids=text)
        assert torch.equal(model.prompt_encoder["default"].embedding.weight.detach(), table[expected])


# -- recipe


def test_property_stage_1_leaves_the_model_bit_for_bit(saved, tmp_path):
    _kind, start = saved
    metrics = run_on(recipe(start, prompt_steps=1.0), tmp_path)
    before, after = load_file(start / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert metrics["cost/trainable"] == TOKENS * 32
    assert metrics["retained/other/drop"] == 0
    assert not (tmp_path / "checkpoints" / "model").exists()


def test_property_stage_2_leaves_the_prompt_bit_for_bit(saved, tmp_path):
    _kind, start = saved
    run_on(recipe(start), tmp_path)
    name = "prompt_encoder.default.embedding.weight"
    files = [load_file(path) for path in (tmp_path / "checkpoints" / "prompt").glob("*/model.safetensors")]
    (stage_1,) = [tensors[name] for tensors in files if name in tensors]
    assert torch.equal(prompt_of(tmp_path), stage_1)
    before, after = load_file(start / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_oracle_what_is_saved_answers_as_what_was_measured(saved, tokenizer, tmp_path):
    kind, start = saved
    metrics = run_on(recipe(start, steps=40, optim=OptimSpec(lr=3e-3)), tmp_path)
    plain = opened(tmp_path, kind)
    alone = pair_model(plain, tokenizer, kind, target=2).answers(PAIRS.sources)
    right = [a == t for a, t in zip(alone, PAIRS.targets, strict=True)]
    assert metrics["id/accuracy_alone"] == sum(right) / len(right)
    behind = pair_model(PeftModel.from_pretrained(plain, tmp_path / "prompt"), tokenizer, kind, target=2)
    measured = json.loads((tmp_path / "answers.json").read_text())
    assert behind.answers(PAIRS.sources) == [row["answer"] for row in measured]
    assert metrics["id/nll"] == pytest.approx(behind.nats(PAIRS).mean(), rel=1e-5)


def test_oracle_the_plain_model_is_the_base_with_the_prompt_off(tokenizer, tmp_path):
    model = add_prompt(fresh("causal", tokenizer), "causal", TOKENS, seed=1).eval()
    model.get_base_model().save_pretrained(tmp_path / "model")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad(), model.disable_adapter():
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(opened(tmp_path)(input_ids=ids).logits, expected, rtol=0, atol=1e-6)


def test_oracle_no_prompt_steps_is_fine_tuning_behind_a_random_prompt(causal, tokenizer, tmp_path):
    chosen = recipe(causal, steps=2, prompt_steps=0.0, optim=OptimSpec(lr=1e-2, warmup=0, schedule="constant"))
    run_on(chosen, tmp_path)
    table = load_file(causal / "model.safetensors")["model.embed_tokens.weight"]
    assert all((table == row).all(1).any() for row in prompt_of(tmp_path))
    # The same in plain PyTorch: all four pairs are one batch, in whatever order.
    base = AutoModelForCausalLM.from_pretrained(causal)
    prompt = prompt_of(tmp_path)
    matrices = [p for p in base.parameters() if p.ndim > 1]
    vectors = [p for p in base.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    encoded = pair_model(base, tokenizer, "causal", target=2).encode(PAIRS)
    for _ in range(2):
        total = 0.0
        for pair in encoded:
            ids = torch.tensor(pair.source + pair.target)
            logits = base(inputs_embeds=torch.cat((prompt, base.get_input_embeddings()(ids)))[None]).logits[0]
            first = TOKENS + len(pair.source) - 1
            total += torch.nn.functional.cross_entropy(logits[first:-1], ids[len(pair.source) :], reduction="sum")
        (total / 8).backward()
        torch.nn.utils.clip_grad_norm_(base.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    trained = opened(tmp_path)
    for name, parameter in base.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), parameter, rtol=1e-3, atol=1e-4, msg=name)


def test_property_lora_is_merged_into_the_model(causal, tmp_path):
    metrics = run_on(recipe(causal, lora=LoraSpec(r=2)), tmp_path)
    before, after = load_file(causal / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "proj" in name}
    behind = PeftModel.from_pretrained(opened(tmp_path), tmp_path / "prompt")
    assert behind.peft_config["default"].num_virtual_tokens == TOKENS
    assert metrics["cost/trainable"] < sum(tensor.numel() for tensor in before.values())


def test_property_the_prompts_tokens_are_charged(causal, tmp_path):
    spent = []
    for tokens in (TOKENS, TOKENS + 3):
        chosen = recipe(causal, prompt_steps=0.0, prompt_tokens=tokens)
        with Run(tmp_path / str(tokens), chosen) as run:
            chosen.run_on(PairData(PAIRS, PAIRS), run)
        spent.append(run.cost["tokens"])
    # 4 steps of 4 rows; a pair has 2.5 words, the start token, its target and EOS on average, rounded up.
    assert spent == [16 * (6 + TOKENS), 16 * (6 + TOKENS + 3)]


def test_property_stage_1_computes_no_gradient_of_frozen_weights(causal, tmp_path):
    spent = {}
    for share in (0.0, 1.0):
        chosen = recipe(causal, prompt_steps=share)
        with Run(tmp_path / str(share), chosen) as run:
            chosen.run_on(PairData(PAIRS, PAIRS), run)
        spent[share] = run.cost["flops"]
    # Forward, and of the two products backward only the one for activations: two thirds.
    assert 0.6 < spent[1.0] / spent[0.0] < 0.75


def test_learns_the_answers_form_in_the_prompt(causal, tmp_path, caplog):
    metrics = run_on(recipe(causal, steps=60, prompt_steps=1.0), tmp_path)
    assert "took nothing on" not in caplog.text
    assert metrics["prompt/nats"] < metrics["prompt/nats_without"] - 0.1


def test_degenerate_a_prompt_that_took_nothing_on_is_warned_of(tokenizer, caplog):
    plain = pair_model(fresh("causal", tokenizer), tokenizer, "causal")
    with caplog.at_level(logging.WARNING, logger="headwater.adapt.promot"):
        found = _offloaded(plain, plain, PAIRS)
    assert found["prompt/nats"] == found["prompt/nats_without"] == pytest.approx(plain.nats(PAIRS).mean())
    assert "took nothing on" in caplog.text


def test_degenerate_a_long_prompt_text_is_cut_with_a_warning(causal, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="headwater.adapt.promot"):
        run_on(recipe(causal, prompt_steps=0.0, prompt_text="a b c d e f g"), tmp_path)
    assert "cut from 7 to 5 tokens" in caplog.text


def test_property_sources_are_cut_to_leave_room_for_the_prompt(causal, tokenizer, tmp_path):
    # 32 positions, 24 of the prompt, 2 of the target: 6 are left for the source, its start token included.
    long = Pairs(["a b c d e f g h a b c d"], ["yes"])
    metrics = run_on(recipe(causal, steps=2, prompt_tokens=24), tmp_path, long)
    behind = PairModel(PeftModel.from_pretrained(opened(tmp_path), tmp_path / "prompt"), tokenizer, "causal", 6, 2)
    assert metrics["id/nll"] == pytest.approx(behind.nats(long).mean(), rel=1e-5)


def test_rejects_a_prompt_that_leaves_no_room(causal, tmp_path):
    with pytest.raises(ModelError, match="32 positions, which a prompt of 30 tokens and targets of 2 leave no room"):
        run_on(recipe(causal, prompt_tokens=30), tmp_path)


@pytest.mark.parametrize("fields", [{"prompt_tokens": 0}, {"prompt_steps": 1.1}, {"prompt_lr": 0.0}])
def test_rejects_fields_out_of_range(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        recipe("unused", **fields)


# -- claim


def test_equation_the_families_of_the_claim():
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert all(answer == f"c{given[1:]}" for given, answer in asked("copy", rng, 3))
        assert all(answer == f"s{(int(given[1:]) + 1) % 10}" for given, answer in asked("next", rng, 3))
        assert len({answer for _, answer in asked("same", rng, 3)}) == 1
        for family, expected in (("max", lambda a, b: f"m{max(a, b)}"), ("less", lambda a, b: "TF"[a >= b])):
            for given, answer in asked(family, rng, 3):
                assert answer == expected(*(int(word[1:]) for word in given.split()))


def test_property_the_claims_prompts():
    task = majority("test", 3, 200)
    low = [sum(int(word[1:]) < 5 for word in source.split()[:5]) for source in task.sources]
    assert task.targets == ["T" if count > 2 else "F" for count in low]
    assert majority("train", 3, 200).sources != task.sources
    for family in FAMILIES:
        prompts = shown(family, 3, 50)
        assert all(source.count(">") == 5 and source.endswith(">") for source in prompts.sources)
        assert not {"T", "F"} & set(prompts.targets)


def test_learns_claim_runs_at_smoke_scale(tmp_path):
    measured = CLAIM.measure("smoke", 100, tmp_path / "claim")
    verdict = judge(CLAIM, "smoke", {100: measured})
    assert verdict["verdict"] == "inconclusive"
    assert set(measured.arms) == {"fine-tuning", "fewer steps", "random prompt", "promot"}
    for arm, metrics in measured.arms.items():
        assert np.mean(measured.items[arm]["id/accuracy"]) == metrics["id/accuracy"]
        after = [metrics[f"retained/{family}/after"] for family in FAMILIES]
        assert metrics["in_context/accuracy"] == np.mean(after)
