from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from headwater.core.objective import Loss, Objective, ObjectiveTrainer
from headwater.modalities.text.objectives import CausalObjective, TokenObjective, token_loss


def llama(seed: int = 0) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=37,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
        )
        return LlamaForCausalLM(config)


def ragged(rows: int, length: int = 10) -> list[dict[str, torch.Tensor]]:
    """Rows of which between 2 and ``length`` tokens are labelled."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 37, (rows, length), generator=generator)
    lengths = torch.randint(2, length + 1, (rows,), generator=generator)
    labels = torch.where(torch.arange(length) < lengths[:, None], ids, -100)
    return [
        {"input_ids": i, "labels": k, "row": torch.tensor(n)} for n, (i, k) in enumerate(zip(ids, labels, strict=True))
    ]


def stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def test_equation_cross_entropy_of_even_odds():
    # two classes with equal logits: ln 2 per label; two of the three labels count
    loss = token_loss(torch.zeros(1, 3, 2), torch.tensor([[0, -100, 1]]))
    assert loss.total.item() == pytest.approx(2 * 0.6931472)
    assert int(loss.count) == 2


def test_oracle_causal_loss_is_that_of_hugging_face():
    model, batch = llama().eval(), stack(ragged(4))
    loss = CausalObjective()(model, batch)
    assert (loss.total / loss.count).item() == pytest.approx(
        model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item(), rel=1e-6
    )
    assert int(loss.count) == int((batch["labels"][:, 1:] != -100).sum())


def test_oracle_masked_loss_is_that_of_hugging_face():
    config = BertConfig(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model, batch = BertForMaskedLM(config).eval(), stack(ragged(4))
    loss = TokenObjective()(model, batch)
    assert (loss.total / loss.count).item() == pytest.approx(
        model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item(), rel=1e-6
    )


def test_oracle_encoder_decoder_loss_is_that_of_hugging_face():
    config = T5Config(vocab_size=37, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model, batch = T5ForConditionalGeneration(config).eval(), stack(ragged(4))
    loss = TokenObjective()(model, batch)
    assert (loss.total / loss.count).item() == pytest.approx(
        model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item(), rel=1e-6
    )


def test_property_bfloat16_logits_are_summed_in_float32():
    logits = torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.zeros(4, 64, dtype=torch.long)
    assert torch.equal(token_loss(logits, labels).total, token_loss(logits.float(), labels).total)


def test_degenerate_nothing_labelled_and_no_rows():
    model, rows = llama(), ragged(2)
    batch = stack(rows) | {"labels": torch.full((2, 10), -100)}
    loss = CausalObjective()(model, batch)
    assert (loss.total.item(), int(loss.count)) == (0.0, 0)
    empty = token_loss(torch.zeros(0, 3, 5), torch.zeros(0, 3, dtype=torch.long))
    assert (empty.total.item(), int(empty.count)) == (0.0, 0)


def test_rejects_labels_of_another_shape():
    with pytest.raises(ValueError, match="labels must be"):
        token_loss(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long))


def test_property_objectives_satisfy_the_protocol():
    assert isinstance(CausalObjective(), Objective)
    assert isinstance(TokenObjective(), Objective)
    assert not isinstance(nn.Linear(1, 1), Objective)


def arguments(directory: Path, **kwargs: object) -> TrainingArguments:
    options = {
        "max_steps": 3, "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "report_to": [],
        "use_cpu": True,
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "max_grad_norm": 0.5,
    }  # fmt: skip
    return TrainingArguments(str(directory), **{**options, **kwargs})


class InOrder(ObjectiveTrainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def run_trainer(directory: Path, objective=None, **kwargs: object) -> InOrder:
    trainer = InOrder(
        objective=objective or CausalObjective(),
        model=llama(),
        args=arguments(directory, **kwargs),
        train_dataset=ragged(24),
    )
    trainer.train()
    return trainer


def test_equation_one_batch_of_eight_is_four_of_two_in_trainer(tmp_path):
    whole = run_trainer(tmp_path, per_device_train_batch_size=8)
    parts = run_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    logged = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, parts)]
    assert logged[0] == pytest.approx(logged[1], abs=2e-4)  # the Trainer rounds what it logs
    loss = CausalObjective()(llama(), stack(ragged(24)[:8]))
    assert logged[0][0] == pytest.approx((loss.total / loss.count).item(), abs=2e-4)


class Told(CausalObjective):
    """Notes what it is told; asks for the whole batch where it comes in parts."""

    def begin_step(self, progress, over_batch):
        told.append(progress)
        if over_batch is not None:
            over_batch(lambda model, batch: batch["row"])


told: list[float] = []


def test_property_trainer_tells_how_far_training_is_and_refuses_what_it_cannot_show(tmp_path):
    told.clear()
    run_trainer(tmp_path, Told(), per_device_train_batch_size=8)
    assert told == pytest.approx([0.0, 1 / 3, 2 / 3])
    with pytest.raises(ValueError, match="gradient_accumulation_steps=1"):
        run_trainer(tmp_path, Told(), per_device_train_batch_size=2, gradient_accumulation_steps=4)


class Headed(nn.Module):
    """A loss with a weight of its own and a frozen teacher."""

    unit = "squared"

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 1, bias=False)
        self.teacher = nn.Linear(16, 1, bias=False).requires_grad_(False)

    def forward(self, model: nn.Module, batch) -> Loss:
        hidden = (
            model(input_ids=batch["input_ids"], output_hidden_states=True, use_cache=False).hidden_states[-1].mean(1)
        )
        error = (self.head(hidden) - self.teacher(hidden) - 1).square()
        return Loss(error.sum(), error.numel())


def test_property_a_head_is_trained_and_saved_beside_a_model_that_opens_without_us(tmp_path):
    objective = Headed()
    before = objective.head.weight.clone()
    trainer = run_trainer(tmp_path, objective, per_device_train_batch_size=4)
    assert not torch.equal(before, objective.head.weight)
    trainer.save_model(str(tmp_path / "model"))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), trainer.model.parameters(), strict=True))
    assert "teacher" not in json.dumps(sorted(opened.state_dict()))
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model/objective.safetensors")
    assert saved.keys() == {"head.weight"}
    assert torch.equal(saved["head.weight"], objective.head.weight)


def test_property_trainer_resumes_the_head_too(tmp_path):
    torch.manual_seed(0)
    start = {k: v.clone() for k, v in Headed().state_dict().items()}

    def objective() -> Headed:
        fresh = Headed()
        fresh.load_state_dict(start)
        return fresh

    whole = objective()
    run_trainer(tmp_path / "a", whole, per_device_train_batch_size=4, save_strategy="steps", save_steps=2)
    resumed = objective()
    trainer = InOrder(
        objective=resumed,
        model=llama(),
        args=arguments(tmp_path / "a", per_device_train_batch_size=4),
        train_dataset=ragged(24),
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert torch.equal(whole.head.weight, resumed.head.weight)


def test_oracle_evaluation_is_the_mean_of_the_objective(tmp_path):
    rows = ragged(4)
    trainer = ObjectiveTrainer(
        objective=CausalObjective(),
        model=llama(),
        args=arguments(tmp_path, per_device_eval_batch_size=4),
        eval_dataset=rows,
    )
    loss = CausalObjective()(trainer.model.eval(), stack(rows))
    assert trainer.evaluate()["eval_loss"] == pytest.approx((loss.total / loss.count).item(), rel=1e-5)


def test_rejects_sharded_training_in_trainer(tmp_path):
    args = arguments(tmp_path)
    args.deepspeed = "zero.json"
    with pytest.raises(ValueError, match="one device or under DDP"):
        ObjectiveTrainer(objective=CausalObjective(), model=llama(), args=args)
