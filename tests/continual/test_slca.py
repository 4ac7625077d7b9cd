import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.continual.toy import (
    CLASSES,
    DIM,
    FIT,
    HIDDEN,
    follow,
    held_out,
    make_data,
    make_stream,
    matrix,
    mlp,
    read_me,
)
from torch import nn
from transformers import AutoModel, AutoTokenizer

from headwater.claims.slca import CLAIM
from headwater.continual.alignment import align_classifier
from headwater.continual.base import Batch
from headwater.continual.finetuning import FinetuningLearner
from headwater.continual.references import SequentialFinetuning
from headwater.continual.slca import SLCA, Alignment, SLCALearner
from headwater.continual.streams import ClassStream, Samples, StreamData, StreamError
from headwater.core.claim import judge
from headwater.core.fit import FitSettings
from headwater.core.leak import TestLeak
from headwater.core.optim import AdamWSpec, SgdSpec
from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.rng import derive_seed
from headwater.core.run import Run, execute
from headwater.modalities.features import ArrayEncoder
from headwater.modalities.text.tiny import tiny_t5

SHORT = Alignment(epochs=1, per_class=32)


class OnMlp(SLCA):
    """The recipe on a module of one's own."""

    def encoder(self, info):
        return ArrayEncoder(mlp())


class Plain(SequentialFinetuning):
    """The reference on the same module."""

    def encoder(self, info):
        return ArrayEncoder(mlp())


def recipe(cls=OnMlp, **fields):
    settings = {"epochs": 2, "train_batch_size": 8, "optim": SgdSpec(lr=0.05), "fit": FIT, **fields}
    return cls(model="none", **settings)


def tuner(encoder=None, **fields):
    settings = {"epochs": 2, "train_batch_size": 8, "optim": SgdSpec(lr=0.05), "fit": FIT, **fields}
    return FinetuningLearner(encoder or ArrayEncoder(mlp()), **settings)


def slca(alignment=SHORT, **fields):
    return SLCALearner(tuner(**{"backbone_scale": 0.01, **fields}), alignment)


def learn(made, stream, directory, tasks=None):
    """Show a learner the tasks of a stream."""
    with Run(directory, recipe()) as run:
        for index in range(len(stream) if tasks is None else tasks):
            made.observe(stream.task(index), run)
    return made, run


def copied(state):
    return {name: tensor.clone() for name, tensor in state.items()}


# The slow learner.


def test_equation_one_step_moves_encoder_and_head_by_their_own_rates(tmp_path):
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0.5], [-0.5, 2.0]])
    x, labels = np.array([[1.0, 2.0], [3.0, -1.0]], dtype=np.float32), np.array([0, 1])
    stream = ClassStream(StreamData(Samples(x, labels), Samples(x, labels)), increments=2, class_order=[0, 1])
    optim = SgdSpec(lr=0.5, weight_decay=0.0, schedule="constant")
    made = tuner(ArrayEncoder(layer), backbone_scale=0.01, epochs=1, optim=optim)
    made._grown(stream.task(0))
    weight, encoder = made.head.weight.detach().clone(), layer.weight.detach().clone()
    learn(made, stream, tmp_path / "run")
    inputs = torch.from_numpy(x)
    features = inputs @ encoder.T
    wrong = (torch.softmax(features @ weight.T, 1) - torch.eye(2)) / 2
    torch.testing.assert_close(made.head.weight.detach(), weight - 0.5 * wrong.T @ features)
    torch.testing.assert_close(made.head.bias.detach(), -0.5 * wrong.sum(0))
    torch.testing.assert_close(layer.weight.detach(), encoder - 0.005 * (wrong @ weight).T @ inputs)


@pytest.mark.parametrize("softmax", ["local", "global"])
def test_property_outputs_of_earlier_tasks_stay_with_a_local_softmax_only(softmax, tmp_path):
    made, stream = tuner(softmax=softmax), make_stream()
    with Run(tmp_path / "run", recipe()) as run:
        made.observe(stream.task(0), run)
        before = copied(made.head.state_dict())
        made.observe(stream.task(1), run)
    after = made.head.state_dict()
    same = [torch.equal(after[name], tensor) for name, tensor in before.items()]
    assert all(same) if softmax == "local" else not any(same)
    assert made.head.out_features == 4


def test_property_a_frozen_backbone_is_bit_identical_and_no_part_of_the_state(tmp_path):
    made, _ = learn(slca(backbone_scale=0.0), make_stream(), tmp_path / "frozen")
    for ours, original in zip(made.slow.encoder.model.parameters(), mlp().parameters(), strict=True):
        assert torch.equal(ours, original)
    assert not [name for name in made.state() if "encoder/" in name]
    moved, _ = learn(slca(), make_stream(), tmp_path / "slow")
    fast, _ = learn(slca(backbone_scale=1.0), make_stream(), tmp_path / "fast")
    change = [(m.slow.encoder.model[0].weight - mlp()[0].weight).abs().max() for m in (moved, fast)]
    assert 0 < 10 * change[0] < change[1]


def test_property_the_reference_is_the_same_learner_at_one_rate_without_alignment(tmp_path):
    follow(recipe(Plain), make_stream(), tmp_path / "reference")
    follow(recipe(backbone_scale=1.0, alignment=Alignment(epochs=0)), make_stream(), tmp_path / "slca")
    np.testing.assert_array_equal(matrix(tmp_path / "reference"), matrix(tmp_path / "slca"))
    ours, theirs = (load_file(tmp_path / name / "model/head.safetensors") for name in ("slca", "reference"))
    assert torch.equal(ours["weight"], theirs["weight"])
    follow(recipe(Plain, softmax="global"), make_stream(), tmp_path / "global")
    assert (matrix(tmp_path / "global") != matrix(tmp_path / "reference")).any()


# Alignment, and what it leaves alone.


def test_property_the_next_task_goes_on_with_the_head_as_it_was_before_alignment(tmp_path):
    aligned, plain = slca(), slca(Alignment(epochs=0))
    stream = make_stream()
    for made, name in ((aligned, "aligned"), (plain, "plain")):
        with Run(tmp_path / name, recipe()) as run:
            made.states = []
            for index in range(3):
                made.observe(stream.task(index), run)
                made.states.append(copied(made.slow.state()))
    for ours, theirs in zip(aligned.states, plain.states, strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), "alignment is after the fact: learning never sees it"
    assert not torch.equal(aligned.aligned.weight, aligned.slow.head.weight)


def test_property_after_the_first_task_the_head_itself_answers(tmp_path):
    made, _ = learn(slca(), make_stream(), tmp_path / "run", tasks=1)
    assert made.aligned is None
    batch = Batch(make_data().test.inputs)
    assert torch.equal(made.scores(batch), made.slow.scores(batch))


def test_oracle_what_answers_is_the_public_alignment_of_gaussians_of_each_tasks_own_features(tmp_path):
    made, stream = SLCALearner(tuner(backbone_scale=0.01), SHORT, seed=5), make_stream()
    means = []
    with Run(tmp_path / "run", recipe()) as run:
        for index in range(3):
            task = stream.task(index)
            inputs, labels = task.train.inputs, torch.from_numpy(task.train.labels)
            made.observe(task, run)
            features = made.slow.features(inputs)
            means += [features[labels == label].mean(0) for label in task.classes]
    torch.testing.assert_close(made.gaussians.means, torch.stack(means), rtol=1e-5, atol=1e-5)
    assert made.gaussians.classes.tolist() == list(range(6))
    # Tasks 0 and 1 were learned with another encoder than the one of now.
    assert (made.slow.features(stream.data.train.inputs[stream.data.train.labels == 0]).mean(0) - means[0]).any()
    again = align_classifier(
        made.slow.head, made.gaussians, [0, 0, 1, 1, 2, 2], epochs=1, per_class=32, seed=derive_seed(5, "task", 2)
    )
    assert torch.equal(again.weight, made.aligned.weight)
    batch = Batch(stream.data.test.inputs)
    torch.testing.assert_close(made.scores(batch), again(made.slow.features(batch.inputs)))


def test_property_data_of_tasks_that_are_over_are_never_read(tmp_path):
    made, stream, over = slca(), make_stream(), []
    with Run(tmp_path / "run", recipe()) as run:
        for index in range(3):
            task = stream.task(index)
            made.observe(task, run)
            task.close()
            over.append(task)
    with pytest.raises(TestLeak, match="training set of task 0, which is over"):
        len(over[0].train)
    assert made.scores(Batch(stream.data.test.inputs)).shape == (60, 6)


def test_property_a_row_depends_on_the_tasks_up_to_it_only(tmp_path):
    follow(recipe(alignment=SHORT), make_stream(), tmp_path / "whole")
    follow(recipe(alignment=SHORT), make_stream(tasks=2), tmp_path / "short")
    np.testing.assert_array_equal(matrix(tmp_path / "short"), matrix(tmp_path / "whole")[:2, :2])


@pytest.mark.parametrize("rank", [None, 2, 0])
def test_property_memory_is_that_of_the_covariances(rank, tmp_path):
    made, _ = learn(slca(SHORT.model_copy(update={"rank": rank})), make_stream(), tmp_path / "run")
    numbers = sum(t.numel() for n, t in made.state().items() if n.startswith("gaussians/"))
    per_class = {None: HIDDEN + HIDDEN**2, 2: HIDDEN + 3 * HIDDEN, 0: HIDDEN + HIDDEN}[rank]
    assert numbers == CLASSES * (per_class + 1)  # and its label


# Resume.


@pytest.mark.parametrize("alignment", [SHORT, Alignment(epochs=0)], ids=["aligned", "plain"])
@pytest.mark.parametrize("tasks", [1, 3])
def test_property_a_learner_restored_from_its_state_gives_the_same_scores(alignment, tasks, tmp_path):
    made, _ = learn(slca(alignment), make_stream(), tmp_path / "run", tasks=tasks)
    again = slca(alignment)
    again.load_state(made.state())
    batch = Batch(make_data().test.inputs)
    assert torch.equal(again.scores(batch), made.scores(batch))
    assert again.state().keys() == made.state().keys()


@pytest.mark.parametrize("stop_at", [1, 2])
@pytest.mark.parametrize("cls", [OnMlp, Plain])
def test_fault_resumed_between_tasks_equals_uninterrupted(cls, stop_at, tmp_path):
    class Stopped(cls):
        def learner(self, info):
            made = super().learner(info)
            observe = made.observe

            def stop(task, run):
                if task.index == stop_at:
                    raise KeyboardInterrupt
                observe(task, run)

            made.observe = stop
            return made

    fields = {"alignment": SHORT} if cls is OnMlp else {"softmax": "global"}
    whole = follow(recipe(cls, **fields), make_stream(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        follow(recipe(Stopped, **fields), make_stream(), tmp_path / "cut")
    assert follow(recipe(cls, **fields), make_stream(), tmp_path / "cut", resume=True) == whole
    for path in (tmp_path / "whole/model").rglob("*"):
        if path.is_file():
            assert (tmp_path / "cut/model" / path.relative_to(tmp_path / "whole/model")).read_bytes() == (
                path.read_bytes()
            ), path


def test_fault_resumed_inside_a_later_task_equals_uninterrupted(tmp_path, monkeypatch):
    made = recipe(alignment=SHORT, fit=FitSettings(precision="fp32", checkpoint_every=2, log_every=1))
    whole = follow(made, make_stream(), tmp_path / "whole")
    steps, log = [], Run.log

    def failing(self, metrics, **where):
        if where.get("phase") == "task_1":
            steps.append(metrics["step"])
            if len(steps) == 5:
                raise OSError("no space left on device")
        log(self, metrics, **where)

    monkeypatch.setattr(Run, "log", failing)
    with pytest.raises(OSError, match="no space"):
        follow(made, make_stream(), tmp_path / "cut")
    assert follow(made, make_stream(), tmp_path / "cut", resume=True) == whole
    assert steps[:6] == [1, 2, 3, 4, 5, 5], "goes on after the checkpoint of step 4"


def test_property_checkpoints_of_tasks_that_are_over_are_dropped(tmp_path):
    follow(recipe(alignment=SHORT), make_stream(), tmp_path / "run")
    left = {path.name for path in (tmp_path / "run/checkpoints").glob("task_*")}
    assert left == {"task_2"}


def test_rejects_a_state_of_another_encoder(tmp_path):
    made, _ = learn(tuner(), make_stream(), tmp_path / "run", tasks=1)
    other = tuner(ArrayEncoder(nn.Linear(DIM, HIDDEN)))
    with pytest.raises(StreamError, match="4 trained tensors that do not fit the 2 of this encoder"):
        other.load_state(made.state())


# Bad input.


def test_degenerate_tasks_of_one_class_are_passed_over_and_a_warning_says_so(tmp_path):
    made, run = learn(slca(), make_stream(increments=1), tmp_path / "run")
    assert "only one class competes in the loss on task 5" in run.notes["warning/one_class"]
    for ours, original in zip(made.slow.encoder.model.parameters(), mlp().parameters(), strict=True):
        assert torch.equal(ours, original)
    assert made.scores(Batch(make_data().test.inputs)).shape == (60, 6)
    _, run = learn(tuner(softmax="global"), make_stream(increments=1), tmp_path / "global", tasks=2)
    assert "on task 0," in run.notes["warning/one_class"], "from the second task on there are two to tell apart"


def test_property_running_statistics_stay_and_a_warning_says_so(tmp_path):
    net = nn.Sequential(nn.Linear(DIM, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, HIDDEN))
    before = copy.deepcopy(net[1].state_dict())
    _, run = learn(tuner(ArrayEncoder(net)), make_stream(), tmp_path / "run")
    assert "1 batch normalisations (first: model.1)" in run.notes["warning/batch_norm"]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(net[1].state_dict()[name], before[name])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"backbone_scale": 2}, r"backbone_scale.*less than or equal to 1; got 2"),
        ({"alignment": {"epocs": 5}}, "Did you mean 'epochs'"),
        ({"alignment": {"temperature": 0}}, r"alignment.temperature.*greater than 0; got 0"),
        ({"alignment": {"rank": -1}}, r"alignment.rank.*greater than or equal to 0; got -1"),
        ({"softmax": "local"}, "unknown field 'softmax'"),
    ],
)
def test_rejects_a_recipe_that_cannot_be_honoured(fields, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe({"method": "slca", "model": "none", **fields})


# Texts, images, and what is left on disk.


@pytest.mark.parametrize("kind", ["text", "image", "t5"])
@pytest.mark.parametrize("method", ["slca", "sequential_finetuning"])
def test_oracle_the_readme_makes_the_predictions_of_the_run(kind, method, request, tmp_path, monkeypatch):
    if kind == "image":
        root = request.getfixturevalue("pictures")
        stream = {"modality": "image", "data": str(root / "train"), "test": str(root / "test"), "increment": 2}
        fields = {"model": str(request.getfixturevalue("tiny_vit")), "stream": stream}
    else:
        fields = dict(request.getfixturevalue("continual_fields"))
        if kind == "t5":
            tokenizer = AutoTokenizer.from_pretrained(fields["model"])
            tiny_t5(tokenizer, hidden=16, layers=1, heads=2, mlp=16, generator_seed=0).save_pretrained(tmp_path / "t5")
            tokenizer.save_pretrained(tmp_path / "t5")
            fields["model"] = str(tmp_path / "t5")
    made = {"epochs": 2, "train_batch_size": 8, "optim": {"lr": 0.3}, "fit": {"precision": "fp32"}}
    if method == "slca":
        made |= {"backbone_scale": 0.1, "alignment": {"epochs": 1, "per_class": 32}}
    execute(load_recipe({"method": method, **fields, **made}), tmp_path / "run")
    right = json.loads((tmp_path / "run/items.json").read_text())["acc/last"]["values"]
    names = read_me(tmp_path / "run/model", monkeypatch)
    inputs, labels = held_out(kind, fields["stream"]["test"])
    assert [float(a == b) for a, b in zip(names["predict"](inputs), labels, strict=True)] == right
    if kind != "t5":
        original = AutoModel.from_pretrained(fields["model"]).state_dict()
        moved = [name for name, tensor in names["base"].state_dict().items() if not torch.equal(tensor, original[name])]
        assert moved, "the encoder that was trained is the one that was saved"
        assert names["BASE"] == "adapted"


def test_oracle_the_readme_of_a_module_of_ones_own_predicts_too(tmp_path, monkeypatch):
    stream = make_stream()
    made, _ = learn(slca(), stream, tmp_path / "run")
    made.save(tmp_path / "model", stream.data.label_names)
    names = read_me(tmp_path / "model", monkeypatch, base=mlp(seed=9))
    inputs = stream.data.test.inputs
    torch.testing.assert_close(names["logits"](torch.from_numpy(inputs)), made.scores(Batch(inputs)))
    theirs = names["predict"](torch.from_numpy(inputs))
    assert theirs == [stream.data.label_names[label] for label in made.scores(Batch(inputs)).argmax(1)]


def test_property_adamw_learns_slowly_too(tmp_path):
    made, _ = learn(slca(optim=AdamWSpec(lr=0.01, weight_decay=0, clip=None)), make_stream(), tmp_path / "run")
    moved = (made.slow.encoder.model[0].weight - mlp()[0].weight).abs().max()
    # Each of 3 x 10 steps of AdamW is about the learning rate, here 1e-4.
    assert 1e-4 < moved < 6e-3


# Whether it does what it is for.


def test_learns_what_sequential_finetuning_forgets(tmp_path):
    data = make_data(per_class=60)
    last = {
        name: follow(made, make_stream(data), tmp_path / name)["acc/last"]
        for name, made in {
            "global": recipe(Plain, softmax="global", epochs=5),
            "local": recipe(Plain, softmax="local", epochs=5),
            "slca": recipe(epochs=5),
        }.items()
    }
    assert last["slca"] > max(last["global"], last["local"]) + 0.1


@pytest.mark.slow  # the contract suite holds the claim's form
def test_learns_claim_runs_at_smoke_scale(tmp_path):
    measured = CLAIM.measure("smoke", 100, tmp_path / "claim")
    verdict = judge(CLAIM, "smoke", {100: measured})
    assert verdict["verdict"] == "inconclusive"
    assert measured.arms["finetuning"] in (measured.arms["finetuning-local"], measured.arms["finetuning-global"])
    for arm, items in measured.items.items():
        assert np.mean(items["acc/last"]) == pytest.approx(measured.arms[arm]["acc/last"])
    assert len({note for note in measured.notes if "/lr/" in note}) == 6
