from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from headwater.core.budget import Budget, Meter, UncountedFlops
from headwater.core.calibrate import faster_precision, rows_that_fit, untouched
from headwater.core.checkpoint import CheckpointError, CheckpointStore
from headwater.core.fit import FitSettings, Phase, fit
from headwater.core.objective import Loss
from headwater.core.optim import OptimSpec, SgdSpec, lr_factor

sys.path.insert(0, str(Path(__file__).parent))
from toy import LENGTH, Centred, Toy, ToyObjective, ToyStream, train  # tests are imported by path

FP32 = FitSettings(precision="fp32", log_every=1)
SGD_LIKE = OptimSpec(
    lr=1e-2, warmup=0, schedule="constant", eps=1.0, weight_decay=0
)  # a large eps: steps follow the gradient


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_close(one: nn.Module, other: nn.Module, atol: float) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


# -- exactness of the gradient -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 2, 4, 5])
def test_equation_micro_batches_of_ragged_rows_give_the_gradient_of_the_batch(tmp_path, micro):
    options = {"steps": 4, "optim": SGD_LIKE}
    whole = train(tmp_path / "whole", model=Toy(dropout=0), **options)
    parts = train(
        tmp_path / "parts", model=Toy(dropout=0), settings=FP32.model_copy(update={"micro_rows": micro}), **options
    )
    assert_close(whole.model, parts.model, atol=1e-6)


class Scaled(nn.Module):
    """An objective with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, model, batch):
        loss = ToyObjective()(model, batch)
        return Loss(self.factor.sum() * loss.total, loss.count)


def test_equation_the_models_rate_is_a_multiple_of_the_objectives(tmp_path):
    moved = {}
    for rate in (1.0, 0.25):
        phase = Phase("toy", Toy(dropout=0), ToyStream(), Scaled(), model_rate=rate)
        before = weights(phase.model)
        fit(phase, budget=Budget(steps=1), optim=SgdSpec(lr=0.1, schedule="constant", weight_decay=0), seed=0,
            directory=tmp_path / str(rate), settings=FP32)  # fmt: skip
        moved[rate] = [a - b for a, b in zip(weights(phase.model), before, strict=True)], phase.objective.factor - 1
    for slow, usual in zip(moved[0.25][0], moved[1.0][0], strict=True):
        torch.testing.assert_close(slow, 0.25 * usual, rtol=1e-4, atol=1e-7)
    assert torch.equal(moved[0.25][1], moved[1.0][1])
    assert moved[1.0][1]


def test_fault_a_checkpoint_of_another_rate_is_refused(tmp_path):
    def run(rate):
        phase = Phase("toy", Toy(), ToyStream(), ToyObjective(), model_rate=rate)
        return fit(phase, budget=Budget(steps=1), optim=SGD_LIKE, seed=0, directory=tmp_path, settings=FP32)

    run(0.5)
    with pytest.raises(CheckpointError, match=r"of another run: model_rate was 0\.5, is None"):
        run(1.0)


@pytest.mark.parametrize("micro", [1, 4, 5])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_equation_an_objective_sees_the_whole_batch_however_it_is_cut(tmp_path, micro, dropout):
    steep = SGD_LIKE.model_copy(update={"eps": 1e-3})  # so that another centre shows in the weights

    def weights_of(micro_rows, cls):
        settings, model = FP32.model_copy(update={"micro_rows": micro_rows}), Toy(dropout)
        phase = Phase("toy", model, ToyStream(), cls())
        fit(phase, budget=Budget(steps=4), optim=steep, seed=0, directory=tmp_path / f"{cls}{micro_rows}",
            settings=settings)  # fmt: skip
        return model

    class Blind(Centred):
        """Takes each micro-batch for the whole."""

        def begin_step(self, progress, over_batch):
            super().begin_step(progress, None)

    class Replayed(Centred):
        """The centre of the pass to come, found by looking at each micro-batch as it comes and starting over."""

        def begin_step(self, progress, over_batch):
            super().begin_step(progress, over_batch)
            seen = [over_batch(self.score) for _ in range(2)]
            assert torch.equal(*seen), "the draws are those of the pass to come"

    parts = weights_of(micro, Centred)
    assert parts.seen > 0
    if dropout == 0:
        assert_close(weights_of(6, Centred), parts, atol=1e-5)
        with pytest.raises(AssertionError):
            assert_close(parts, weights_of(micro, Blind), atol=1e-4)
    else:
        assert_close(parts, weights_of(micro, Replayed), atol=0)
    assert float(parts.seen) == 4 * 6, "looking leaves buffers as they were"


def test_property_an_objective_is_told_how_far_training_is_also_after_a_resume(tmp_path):
    def run(directory, on_metrics=None):
        objective = Centred()
        phase = Phase("toy", Toy(), ToyStream(), objective)
        settings = FP32.model_copy(update={"checkpoint_every": 2})
        fit(phase, budget=Budget(steps=5), optim=SGD_LIKE, seed=0, directory=directory, settings=settings,
            on_metrics=on_metrics)  # fmt: skip
        return objective.told, weights(phase.model)

    told, whole = run(tmp_path / "whole")
    assert told == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    with pytest.raises(Stop):
        run(tmp_path / "stopped", stopped_at(3))
    told, resumed = run(tmp_path / "stopped")
    assert told == pytest.approx([0.4, 0.6, 0.8])
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_oracle_the_loop_is_the_loop_one_would_write(tmp_path):
    model, stream = Toy(dropout=0), ToyStream()
    spec = OptimSpec(lr=1e-2, clip=0.1)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": spec.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=spec.betas,
    )
    losses, accuracies = [], []
    for step in range(6):
        loss = ToyObjective()(model, stream.batch(step))
        mean = loss.total / loss.count
        mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for group in optimizer.param_groups:
            group["lr"] = spec.lr * lr_factor(spec, (step + 1) / 6)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean.item())
        accuracies.append(loss.metrics["accuracy"].item())
    logged: list[dict[str, float]] = []
    trained = train(tmp_path, steps=6, model=Toy(dropout=0), optim=spec, settings=FP32, on_metrics=logged.append)
    assert_close(model, trained.model, atol=1e-6)  # float32: clipping and dividing in one factor rounds differently
    assert [entry["loss"] for entry in logged] == pytest.approx(losses, rel=1e-5)
    assert [point["loss"] for point in trained.loss_curve] == pytest.approx(losses, rel=1e-5)
    assert [entry["accuracy"] for entry in logged] == pytest.approx(accuracies)
    assert logged[-1]["lr"] == pytest.approx(spec.lr * spec.final_lr)


def test_degenerate_a_batch_without_labels_moves_nothing(tmp_path):
    class Silent(ToyObjective):
        def __call__(self, model, batch):
            return super().__call__(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})

    model = Toy()
    before = weights(model)
    phase = Phase("toy", model, ToyStream(), Silent())
    fit(phase, budget=Budget(steps=2), optim=SGD_LIKE, seed=0, directory=tmp_path, settings=FP32)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# -- budgets -----------------------------------------------------------------------------------------------------------


def test_equation_tokens_are_met_to_one_row(tmp_path):
    seen = []

    class Counting(ToyStream):
        def batch(self, step, start=0, stop=None):
            batch = super().batch(step, start, stop)
            seen.append((step, len(batch["ids"])))
            return batch

    meter = Meter()
    trained = train(tmp_path, budget=Budget(tokens=14 * LENGTH + 5), stream=Counting(), settings=FP32, meter=meter)
    assert seen[-3:] == [(0, 6), (1, 6), (2, 2)]
    assert (trained.steps, trained.tokens) == (3, 14 * LENGTH)
    assert (meter.cost.steps, meter.cost.tokens) == (3, 14 * LENGTH)
    assert meter.cost.trainable == sum(p.numel() for p in trained.model.parameters())


def test_equation_flops_are_measured_and_met(tmp_path):
    # Layers 16x16 and 16x32, three products each (forward, weights, input), 2 flops per multiply-add, 8 tokens a row.
    per_row = 2 * 3 * (16 * 16 + 16 * 32) * LENGTH
    trained = train(tmp_path, budget=Budget(flops=per_row * 15.5))
    assert trained.tokens == 15 * LENGTH
    assert trained.cost.flops == pytest.approx(15 * per_row)


@pytest.mark.parametrize(("micro", "passes"), [(6, 1), (3, 2), (4, 2), (1, 6)])
def test_equation_each_forward_pass_pays_its_fixed_flops_anew(tmp_path, micro, passes):
    class Composed(Toy):
        """The hidden weight is a product of two 16 x 16 ones, whose cost does not depend on the rows."""

        def __init__(self):
            super().__init__(dropout=0)
            self.left = nn.Parameter(torch.eye(16))

        def forward(self, ids):
            states = self.embed(ids).cumsum(1) / torch.arange(1, LENGTH + 1)[:, None]
            weight = self.left @ self.hidden.weight
            return self.out(torch.tanh(nn.functional.linear(states, weight, self.hidden.bias)))

    per_row = 2 * 3 * (16 * 16 + 16 * 32) * LENGTH
    fixed = 2 * 3 * 16**3  # forward, and the gradients of both factors
    settings = FP32.model_copy(update={"micro_rows": micro})
    trained = train(tmp_path, model=Composed(), settings=settings, budget=Budget(flops=6 * per_row + passes * fixed))
    assert trained.tokens == 6 * LENGTH
    assert trained.cost.flops == pytest.approx(6 * per_row + passes * fixed)


def test_equation_seconds_run_by_the_clock_without_evaluation(tmp_path, monkeypatch):
    now = 0.0

    class Slow(ToyStream):
        def batch(self, step, start=0, stop=None):
            nonlocal now
            now += 0.25
            return super().batch(step, start, stop)

    def slow(_: nn.Module) -> dict[str, float]:
        nonlocal now
        now += 5.0
        return {}

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    trained = train(tmp_path, budget=Budget(seconds=2), stream=Slow(), evaluate=slow, eval_at=(0, 0.5, 1))
    assert (trained.steps, trained.seconds) == (8, 2.0)
    assert [(point["at"], point["seconds"]) for point in trained.trajectory] == [(0, 0.0), (0.5, 1.0), (1, 2.0)]


def test_property_a_phase_spends_its_share(tmp_path):
    phase = Phase("half", Toy(), ToyStream(), ToyObjective(), share=0.5)
    assert fit(phase, budget=Budget(steps=7), optim=SGD_LIKE, seed=0, directory=tmp_path, settings=FP32).steps == 3


def test_property_phases_can_share_one_schedule(tmp_path):
    rates = []
    for start in (0.0, 0.5):
        phase = Phase(
            f"at{start}", Toy(), ToyStream(), ToyObjective(), share=0.5, schedule_span=0.5, schedule_start=start
        )
        fit(
            phase, budget=Budget(steps=10), optim=OptimSpec(), seed=0, directory=tmp_path, settings=FP32,
            on_metrics=lambda metrics: rates.append(metrics["lr"]),
        )  # fmt: skip
    train(tmp_path / "one", steps=10, optim=OptimSpec(), settings=FP32, on_metrics=lambda m: rates.append(m["lr"]))
    assert rates[:10] == pytest.approx(rates[10:])


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget.none(), "needs a budget"),
        (Budget(tokens=LENGTH - 1), "less than one row"),
        (Budget(flops=10), "less than one row"),
    ],
)
def test_rejects_budgets_that_buy_nothing(tmp_path, budget, words):
    with pytest.raises(ValueError, match=words):
        train(tmp_path, budget=budget)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.out = nn.Embedding(32, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 32)

    def forward(self, ids):
        return self.out(self.cell(self.embed(ids))[0])


def test_rejects_a_flop_budget_for_what_cannot_be_counted_and_reports_none_otherwise(tmp_path):
    with pytest.raises(UncountedFlops):
        train(tmp_path, budget=Budget(flops=1e9), model=Recurrent())
    assert math.isnan(train(tmp_path, steps=2, model=Recurrent()).cost.flops)


# -- resumption --------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stopped_at(step: int):
    def stop(metrics: dict[str, float]) -> None:
        if metrics["step"] == step:
            raise Stop

    return stop


@pytest.mark.parametrize("workers", [0, 2])
def test_oracle_resume_is_bit_equal_at_any_step_across_epochs(tmp_path, workers):
    # 6 rows of 40 a step: epochs end inside steps 6 and 13
    settings = FP32.model_copy(update={"checkpoint_every": 1, "workers": workers, "micro_rows": 4})
    evaluate = {"evaluate": lambda model: {"norm": model.out.weight.norm().item()}, "eval_at": (0, 0.3, 0.6, 1)}
    whole = train(tmp_path / "whole", steps=15, settings=settings, **evaluate)
    for step in (1, 6, 13) if not workers else (7,):
        directory = tmp_path / f"stopped{step}"
        with pytest.raises(Stop):
            train(directory, steps=15, settings=settings, on_metrics=stopped_at(step), **evaluate)
        resumed = train(directory, steps=15, settings=settings, **evaluate)
        assert all(
            torch.equal(a, b)
            for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True)
        )
        assert (resumed.steps, resumed.loss_curve) == (whole.steps, whole.loss_curve)
        timeless = [
            [{k: v for k, v in point.items() if k != "seconds"} for point in t.trajectory] for t in (whole, resumed)
        ]
        assert timeless[0] == timeless[1]


def test_oracle_resume_brings_the_momentum_of_sgd_back(tmp_path):
    settings = FP32.model_copy(update={"checkpoint_every": 1})
    options = {"steps": 6, "settings": settings, "optim": SgdSpec(lr=0.1)}
    whole = train(tmp_path / "whole", **options)
    with pytest.raises(Stop):
        train(tmp_path / "cut", on_metrics=stopped_at(3), **options)
    resumed = train(tmp_path / "cut", **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_property_workers_and_earlier_draws_change_nothing(tmp_path):
    inline = train(tmp_path / "a", steps=8)
    model = Toy()
    torch.rand(7)
    state = torch.get_rng_state()
    workers = train(tmp_path / "b", steps=8, workers=2, model=model)
    assert all(torch.equal(a, b) for a, b in zip(inline.model.parameters(), workers.model.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_property_seeds_change_dropout(tmp_path):
    one, other = train(tmp_path / "a", steps=3, seed=1), train(tmp_path / "b", steps=3, seed=2)
    assert not torch.equal(one.model.out.weight, other.model.out.weight)


def test_property_a_finished_phase_returns_at_once_with_its_cost(tmp_path):
    first, again = Meter(), Meter()
    trained = train(tmp_path, steps=4, meter=first)
    model = Toy()
    loaded = train(tmp_path, steps=4, model=model, meter=again, on_metrics=stopped_at(4))
    assert loaded.model is model
    assert torch.equal(model.out.weight, trained.model.out.weight)
    assert (loaded.cost, loaded.loss_curve) == (trained.cost, trained.loss_curve)
    assert again.cost.tokens == first.cost.tokens
    assert not model.training


@pytest.mark.parametrize("change", [{"seed": 4}, {"budget": Budget(steps=5)}, {"optim": OptimSpec(lr=1)}])
def test_rejects_resuming_another_run(tmp_path, change):
    train(tmp_path, steps=4)
    with pytest.raises(CheckpointError, match=f"is of another run: {next(iter(change))} was"):
        train(tmp_path, **{"steps": 4, **change})


def test_rejects_resuming_another_model(tmp_path):
    train(tmp_path, steps=4)
    with pytest.raises(CheckpointError, match="of another model"):
        train(tmp_path, steps=4, model=Recurrent())


def test_rejects_starting_anew_over_a_checkpoint(tmp_path):
    train(tmp_path, steps=2)
    with pytest.raises(FileExistsError, match="checkpoint of step 2"):
        train(tmp_path, steps=2, resume=False)


class Headed(nn.Module):
    """An objective with a weight to train and a frozen teacher."""

    unit = "squared"

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.head, self.teacher = nn.Linear(32, 1, bias=False), nn.Linear(32, 1, bias=False).requires_grad_(False)
        for layer in (self.head, self.teacher):
            nn.init.normal_(layer.weight, generator=generator)

    def forward(self, model, batch):
        states = model(batch["ids"])
        error = (self.head(states) - self.teacher(states)).square()
        return Loss(error.sum(), error.numel())


def test_property_frozen_weights_are_not_stored_and_an_objectives_own_are(tmp_path):
    def run(directory: Path, **kwargs: object) -> Headed:
        model, objective = Toy(), Headed()
        model.embed.requires_grad_(False)
        phase = Phase("toy", model, ToyStream(), objective)
        settings = FP32.model_copy(update={"checkpoint_every": 2})
        fit(
            phase,
            budget=Budget(steps=6),
            optim=OptimSpec(lr=1e-2),
            seed=0,
            directory=directory,
            settings=settings,
            **kwargs,
        )
        return objective

    whole = run(tmp_path / "whole")
    saved = CheckpointStore(tmp_path / "whole/checkpoints/toy", fingerprint="toy-40-6").latest().tensors
    assert "model/embed.weight" not in saved
    assert "objective/teacher.weight" not in saved
    assert {"objective/head.weight", "model/seen", "optimizer/model.out.weight/exp_avg"} <= saved.keys()
    with pytest.raises(Stop):
        run(tmp_path / "stopped", on_metrics=stopped_at(4))
    assert torch.equal(run(tmp_path / "stopped").head.weight, whole.head.weight)
    assert not torch.equal(whole.head.weight, Headed().head.weight)


# -- how it is executed ------------------------------------------------------------------------------------------------


def test_property_calibration_leaves_no_trace(tmp_path):
    model = Toy()
    with untouched([model]):
        ToyObjective()(model, ToyStream().batch(0)).total.backward()
        assert model.seen.item() == 6
    assert model.seen.item() == 0
    assert all(p.grad is None for p in model.parameters())
    assert train(tmp_path, steps=2, settings=FitSettings()).model.seen.item() == 12  # with every measurement


def test_property_a_hopeless_precision_is_not_tried_on_the_whole_batch():
    tried = []

    def step(rows, precision):
        tried.append((precision, rows))
        work = torch.ones(64, 64)
        for _ in range(rows * (200 if precision == "bf16" else 4)):
            work = work @ work.T / 64

    seconds = faster_precision(step, 64, torch.device("cpu"))
    assert seconds["bf16"] > 3 * seconds["fp32"]
    assert max(rows for _, rows in tried) == 2


def test_property_precision_auto_takes_one_and_says_which(tmp_path):
    assert train(tmp_path, steps=2, settings=FitSettings()).settings["precision"] in ("fp32", "bf16")


def test_property_bf16_keeps_float32_weights_and_learns(tmp_path):
    trained = train(tmp_path, steps=40, settings=FitSettings(precision="bf16", log_every=1))
    assert trained.settings["precision"] == "bf16"
    assert {p.dtype for p in trained.model.parameters()} == {torch.float32}
    assert trained.loss_curve[-1]["loss"] < trained.loss_curve[0]["loss"] - 0.3


def test_learns_what_can_be_learned(tmp_path):
    # ln 32 = 3.47 before; every second token follows from the one before it: at best half of that
    trained = train(tmp_path, steps=80, model=Toy(dropout=0), optim=OptimSpec(lr=3e-2))
    assert trained.loss_curve[0]["loss"] > 3.3
    assert trained.loss_curve[-1]["loss"] < 2.9


def test_property_micro_batches_are_halved_until_they_fit():
    tried = []

    def step(rows: int) -> None:
        tried.append(rows)
        if rows > 3:
            raise torch.OutOfMemoryError

    assert rows_that_fit(step, 20) == 3
    assert tried == [20, 10, 5, 3]
    with pytest.raises(torch.OutOfMemoryError):
        rows_that_fit(lambda rows: step(9), 4)


def test_property_gradient_checkpointing_changes_nothing_and_is_switched_off_again(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from headwater.modalities.text.objectives import CausalObjective

    class Stream(ToyStream):
        def batch(self, step, start=0, stop=None):
            batch = super().batch(step, start, stop)
            return {"input_ids": batch["ids"], "labels": batch["labels"]}

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    start = LlamaForCausalLM(config).state_dict()
    results = []
    for checkpointing in (False, True):
        model = LlamaForCausalLM(config)
        model.load_state_dict(start)
        settings = FP32.model_copy(update={"gradient_checkpointing": checkpointing})
        phase = Phase(f"c{checkpointing}", model, Stream(), CausalObjective())
        fit(phase, budget=Budget(steps=3), optim=SGD_LIKE, seed=0, directory=tmp_path, settings=settings)
        assert not model.is_gradient_checkpointing
        results.append(model)
    assert_close(*results, atol=1e-6)
    with pytest.raises(ValueError, match="Toy cannot checkpoint activations"):
        train(tmp_path / "toy", settings=FP32.model_copy(update={"gradient_checkpointing": True}))


def test_property_evaluation_sees_eval_mode_and_points_on_one_step_share_it(tmp_path):
    calls = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        calls.append(model.training)
        return {"x": float(len(calls))}

    trained = train(tmp_path, steps=4, evaluate=evaluate, eval_at=(0, 0.01, 0.02, 0.5, 1))
    assert calls == [False] * 4
    assert [(p["at"], p["step"], p["x"]) for p in trained.trajectory] == [
        (0, 0, 1),
        (0.01, 1, 2),
        (0.02, 1, 2),
        (0.5, 2, 3),
        (1, 4, 4),
    ]


def test_property_long_loss_curves_are_thinned(tmp_path):
    trained = train(tmp_path, steps=420, settings=FP32)
    assert len(trained.loss_curve) <= 400
    steps = [point["step"] for point in trained.loss_curve]
    assert steps == sorted(set(steps))
    assert steps[-1] == 420


def test_property_trackers_are_reached_by_name(tmp_path, monkeypatch):
    from accelerate import tracking

    logged = []

    class Tracker(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "notebook", False, None

        def __init__(self, run_name, **kwargs):
            super().__init__()
            self.run_name = run_name

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **kwargs):
            logged.append((self.run_name, step, values))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "notebook", Tracker)
    train(tmp_path, steps=2, settings=FP32.model_copy(update={"trackers": ("notebook",)}))
    assert [(name, step) for name, step, _ in logged] == [("toy", 1), ("toy", 2)]
    assert "toy/loss" in logged[0][2]


def test_rejects_trackers_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="notracker"):
        train(tmp_path, settings=FP32.model_copy(update={"trackers": ("notracker",)}))


@pytest.mark.parametrize("name", ["../up", "", "a/b", ".hidden", "-x"])
def test_rejects_phase_names_that_are_paths(name):
    with pytest.raises(ValueError, match="a phase's name"):
        Phase(name, Toy(), ToyStream(), ToyObjective())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"share": 0}, "share"),
        ({"share": 1.5}, "share"),
        ({"schedule_span": 0.6, "schedule_start": 0.5}, "must lie in"),
        ({"model_rate": 0}, "model_rate of phase 'p' must be positive; got 0. .* freeze it"),
    ],
)
def test_rejects_phases_outside_the_budget_or_schedule(fields, words):
    with pytest.raises(ValueError, match=words):
        Phase("p", Toy(), ToyStream(), ToyObjective(), **fields)


def test_rejects_objectives_that_return_means_per_row_or_detached_sums(tmp_path):
    class PerRow(ToyObjective):
        def __call__(self, model, batch):
            return Loss(model(batch["ids"]).sum((1, 2)), 1)

    class Detached(ToyObjective):
        def __call__(self, model, batch):
            return Loss(super().__call__(model, batch).total.detach(), 1)

    for objective, words in ((PerRow(), r"shape \(2,\)"), (Detached(), "requires_grad=False")):
        phase = Phase("toy", Toy(), ToyStream(), objective)
        with pytest.raises(ValueError, match=words):
            fit(phase, budget=Budget(steps=1), optim=SGD_LIKE, seed=0, directory=tmp_path, settings=FP32)


def test_rejects_half_precision_weights(tmp_path):
    with pytest.raises(ValueError, match="float16"):
        train(tmp_path, model=Toy().half())
