import copy
import io
import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
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
    picture,
    read_me,
)
from torch import nn
from transformers import AutoModel, AutoTokenizer, CLIPConfig, CLIPModel, ViTImageProcessorPil, ViTModel

from headwater.claims.adam_cil import CLAIM
from headwater.continual.adam_cil import ADAM, ADAMLearner, DualEncoder, FirstTask, FullSpec, Ia3Spec, LoraChoice
from headwater.continual.base import Batch, Evaluator
from headwater.continual.data import StreamSpec, load_stream_data
from headwater.continual.nmc import NMC, NearestMeanClassifier
from headwater.continual.pet import AdapterSpec
from headwater.continual.streams import ClassStream, Samples, StreamData, StreamError
from headwater.core.claim import judge
from headwater.core.fit import FitSettings
from headwater.core.optim import SgdSpec
from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.run import Run, execute
from headwater.modalities.features import ArrayEncoder, Encoder
from headwater.modalities.text.tiny import tiny_llama, tiny_t5

PEFTS = [LoraChoice(r=2, alpha=4), Ia3Spec(), AdapterSpec(width=3), FullSpec()]
by_kind = pytest.mark.parametrize("peft", PEFTS, ids=lambda peft: peft.kind)


class OnMlp(ADAM):
    """The recipe on a module of one's own."""

    def encoder(self, info):
        return ArrayEncoder(mlp())


def recipe(cls=OnMlp, **fields):
    settings = {"first_task": FirstTask(epochs=2, batch_size=8, optim=SgdSpec(lr=0.05)), "fit": FIT, **fields}
    return cls(model="none", **settings)


def learner(encoder=None, **fields):
    settings = {"peft": LoraChoice(r=2), "first_task": FirstTask(epochs=2, batch_size=8), "fit": FIT, **fields}
    return ADAMLearner(encoder or ArrayEncoder(mlp()), **settings)


def learn(made, stream, directory, tasks=None):
    """Show a learner the tasks of a stream."""
    with Run(directory, recipe()) as run:
        for index in range(tasks or len(stream)):
            made.observe(stream.task(index), run)
    return made, run


# The equations.


def linear(weight):
    layer = nn.Linear(2, len(weight), bias=False)
    layer.weight.data = torch.tensor(weight)
    return layer


def test_equation_class_means_of_both_branches_by_hand(tmp_path):
    made = learner(ArrayEncoder(linear([[1.0, 0.0], [0.0, 1.0]])), adapt_on="none")
    # phi(x) = x and phi*(x) = 2 (x_2, x_1).
    made.dual = DualEncoder(made.encoder, ArrayEncoder(linear([[0.0, 2.0], [2.0, 0.0]])))
    x, labels = np.array([[1, 0], [3, 0], [0, 1], [-1, 0]], dtype=np.float32), np.array([0, 0, 1, 2])
    data = StreamData(Samples(x, labels), Samples(x, labels))
    learn(made, ClassStream(data, increments=3, class_order=[0, 1, 2]), tmp_path / "run")
    # Class 0: mean of (1, 0, 0, 2) and (3, 0, 0, 6); class 1: (0, 1, 2, 0); class 2: (-1, 0, 0, -2).
    np.testing.assert_array_equal(made.head.head.centroids_, [[2, 0, 0, 4], [0, 1, 2, 0], [-1, 0, 0, -2]])
    # (2, 1) becomes (2, 1, 2, 4), of length 5.
    expected = [(4 + 16) / (20**0.5 * 5), (1 + 4) / (5**0.5 * 5), (-2 - 8) / (5**0.5 * 5)]
    scores = made.scores(Batch(np.array([[2.0, 1.0]], dtype=np.float32)))
    np.testing.assert_allclose(scores.numpy(), [expected], rtol=1e-6)


def test_equation_unit_branches_weigh_alike():
    made = learner(ArrayEncoder(linear([[1.0, 0.0], [0.0, 1.0]])), adapt_on="none", branch_norm="l2")
    made.dual = DualEncoder(made.encoder, ArrayEncoder(linear([[0.0, 100.0], [100.0, 0.0], [0.0, 0.0]])))
    features = made._features(np.array([[3.0, 4.0]], dtype=np.float32))
    np.testing.assert_allclose(features, [[0.6, 0.8, 0.8, 0.6, 0.0]], rtol=1e-6)
    made.branches = "adapted"
    np.testing.assert_allclose(made._features(np.array([[3.0, 4.0]], dtype=np.float32)), [[0.8, 0.6, 0]], rtol=1e-6)


def test_property_branches_may_differ_in_width():
    dual = DualEncoder(mlp(out=3), mlp(out=5))
    frozen, adapted = dual.branches(torch.ones(2, DIM))
    assert (frozen.shape, adapted.shape) == ((2, 3), (2, 5))
    torch.testing.assert_close(dual(torch.ones(2, DIM)), torch.cat((frozen, adapted), 1))


# Against SimpleCIL.


@by_kind
def test_oracle_zero_epochs_is_simple_cil(peft, tmp_path):
    follow(recipe(peft=peft, first_task=FirstTask(epochs=0)), make_stream(), tmp_path / "zero")
    follow(recipe(adapt_on="none"), make_stream(), tmp_path / "none")
    np.testing.assert_array_equal(matrix(tmp_path / "zero"), matrix(tmp_path / "none"))
    zero, _ = learn(learner(peft=peft, first_task=FirstTask(epochs=0)), make_stream(), tmp_path / "a")
    none, _ = learn(learner(adapt_on="none"), make_stream(), tmp_path / "b")
    batch = Batch(make_data().test.inputs)
    # Equal halves: both dot product and product of lengths double.
    torch.testing.assert_close(zero.scores(batch), none.scores(batch), rtol=0, atol=1e-6)
    assert zero.head.head.n_features_in_ == 2 * none.head.head.n_features_in_


def test_oracle_without_adaptation_it_is_the_nearest_mean_by_cosine(tmp_path):
    data = make_data()
    with torch.no_grad():
        parts = [Samples(mlp()(torch.from_numpy(p.inputs)).numpy(), p.labels) for p in (data.train, data.test)]
    features = StreamData(*parts, None, data.label_names, "features")
    ours = follow(recipe(adapt_on="none"), make_stream(), tmp_path / "ours")
    theirs = follow(NMC(model="none", metric="cosine"), make_stream(features), tmp_path / "nmc")
    np.testing.assert_array_equal(matrix(tmp_path / "ours"), matrix(tmp_path / "nmc"))
    assert ours["acc/last"] == theirs["acc/last"]
    means = [load_file(tmp_path / name / "model/centroids.safetensors")["centroids"] for name in ("ours", "nmc")]
    # The same products of matrices, in batches of another size: they round differently.
    torch.testing.assert_close(*means, rtol=1e-5, atol=1e-6)


def test_oracle_texts_without_adaptation_equal_the_reference_of_the_family(tmp_path, continual_fields):
    shared = {**continual_fields, "seed": 3}
    for name, fields in (
        ("ours", {"method": "adam_cil", "adapt_on": "none"}),
        ("nmc", {"method": "nmc", "metric": "cosine"}),
    ):
        execute(load_recipe({**shared, **fields}), tmp_path / name)
    np.testing.assert_array_equal(matrix(tmp_path / "ours"), matrix(tmp_path / "nmc"))


# What may and may not happen on the way.


@by_kind
def test_oracle_class_means_task_by_task_are_those_of_all_samples_at_once(peft, tmp_path):
    stream = make_stream()
    made, _ = learn(learner(peft=peft, batch_size=7), stream, tmp_path / "run")
    train = stream.data.train
    batch = NearestMeanClassifier("cosine").fit(made._features(train.inputs), train.labels)
    np.testing.assert_allclose(made.head.head.centroids_, batch.centroids_, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(made.head.head.counts_, batch.counts_)


@by_kind
def test_property_the_frozen_branch_stays_bit_identical_and_the_adapted_one_moves(peft, tmp_path):
    made = learner(peft=peft, first_task=FirstTask(epochs=3, batch_size=8, optim=SgdSpec(lr=0.1)))
    inputs = made.encoder.prepare(make_data().test.inputs)
    with torch.no_grad():
        before = made.encoder(inputs)
    learn(made, make_stream(), tmp_path / "run")
    frozen, adapted = made.dual.branches(inputs)
    assert torch.equal(frozen, before)
    assert (adapted - before).abs().max() > 1e-3
    weights = {name.replace(".base_layer", ""): p for name, p in made.encoder.model.named_parameters()}
    for name, original in mlp().named_parameters():
        assert torch.equal(weights[name], original)


def test_property_after_the_first_task_nothing_is_trained(tmp_path):
    made = learner()
    stream = make_stream()
    with Run(tmp_path / "run", recipe()) as run:
        made.observe(stream.task(0), run)
        after_first = {name: tensor.clone() for name, tensor in made.state().items() if "adapter/" in name}
        made.observe(stream.task(1), run)
    assert after_first
    for name, tensor in after_first.items():
        assert torch.equal(made.state()[name], tensor)


def test_property_a_row_depends_on_the_tasks_up_to_it_only(tmp_path):
    follow(recipe(), make_stream(), tmp_path / "whole")
    follow(recipe(), make_stream(tasks=2), tmp_path / "short")
    np.testing.assert_array_equal(matrix(tmp_path / "short"), matrix(tmp_path / "whole")[:2, :2])
    data = make_data()
    late = np.isin(data.train.labels, make_stream().class_order[4:])
    other = Samples(np.where(late[:, None], -data.train.inputs, data.train.inputs), data.train.labels)
    follow(recipe(), make_stream(StreamData(other, data.test, None, data.label_names, "other")), tmp_path / "other")
    np.testing.assert_array_equal(matrix(tmp_path / "other")[:2], matrix(tmp_path / "whole")[:2])
    assert (matrix(tmp_path / "other")[2] != matrix(tmp_path / "whole")[2]).any()


class Counting(ArrayEncoder):
    """Counts the rows that pass through it."""

    rows = 0

    def forward(self, batch):
        self.rows += len(batch["inputs"])
        return super().forward(batch)


@pytest.mark.parametrize(("cache_bytes", "again"), [(1 << 20, 0), (0, 2)])
def test_property_test_features_are_computed_once_as_far_as_memory_allows(cache_bytes, again, tmp_path):
    encoder, stream = Counting(mlp()), make_stream()
    made = learner(encoder, cache_bytes=cache_bytes)
    evaluator = Evaluator(stream, batch_size=16)
    with Run(tmp_path / "run", recipe()) as run:
        made.observe(stream.task(0), run)
        first = evaluator(made, 0)
        encoder.rows = 0
        made.observe(stream.task(1), run)
        assert encoder.rows == 2 * len(stream.task(1).train), "two branches, and no pass over older tasks"
        encoder.rows = 0
        second = evaluator(made, 1)
    tests = [len(stream.test(0)), len(stream.test(1))]
    assert encoder.rows == 2 * tests[1] + again * tests[0]
    assert first.accuracy[0] >= second.accuracy[0]
    assert sum(kept.nbytes for kept in made._kept.values()) <= cache_bytes


def test_property_the_cache_never_holds_more_than_it_may():
    made = learner(adapt_on="none", cache_bytes=3 * 10 * HIDDEN * 4)
    made.head.head.partial_fit(np.ones((1, HIDDEN), np.float32), [0])
    inputs = np.random.default_rng(0).normal(size=(5, 10, DIM)).astype(np.float32)
    for part in (*inputs, *inputs):
        made.scores(Batch(part))
    assert len(made._kept) == 3


def test_property_one_backbone_serves_both_branches_unless_it_is_trained_in_full(tmp_path):
    for peft, copies in ((LoraChoice(), 1), (FullSpec(), 2)):
        made, _ = learn(learner(peft=peft), make_stream(), tmp_path / peft.kind)
        backbone = sum(p.numel() for p in mlp().parameters())
        held = sum(p.numel() for p in made.dual.parameters()) - (
            0 if copies == 2 else sum(p.numel() for p in made._trained.values())
        )
        assert held == copies * backbone


# Resume.


@by_kind
@pytest.mark.parametrize("stop_at", [1, 2])
def test_fault_resumed_between_tasks_equals_uninterrupted(peft, stop_at, tmp_path):
    class Stopped(OnMlp):
        def learner(self, info):
            made = super().learner(info)
            observe = made.observe

            def stop(task, run):
                if task.index == stop_at:
                    raise KeyboardInterrupt
                observe(task, run)

            made.observe = stop
            return made

    whole = follow(recipe(peft=peft), make_stream(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        follow(recipe(Stopped, peft=peft), make_stream(), tmp_path / "cut")
    assert follow(recipe(peft=peft), make_stream(), tmp_path / "cut", resume=True) == whole
    for path in (tmp_path / "whole/model").rglob("*"):
        if path.is_file():
            assert (tmp_path / "cut/model" / path.relative_to(tmp_path / "whole/model")).read_bytes() == (
                path.read_bytes()
            ), path


def test_fault_resumed_inside_the_first_task_equals_uninterrupted(tmp_path, monkeypatch):
    made = recipe(fit=FitSettings(precision="fp32", checkpoint_every=2, log_every=1))
    whole = follow(made, make_stream(), tmp_path / "whole")
    steps, log = [], Run.log

    def failing(self, metrics, **where):
        if "phase" in where:
            steps.append(metrics["step"])
            if len(steps) == 5:
                raise OSError("no space left on device")
        log(self, metrics, **where)

    monkeypatch.setattr(Run, "log", failing)
    with pytest.raises(OSError, match="no space"):
        follow(made, make_stream(), tmp_path / "cut")
    assert follow(made, make_stream(), tmp_path / "cut", resume=True) == whole
    assert steps[:6] == [1, 2, 3, 4, 5, 5], "goes on after the checkpoint of step 4"


def test_property_the_state_holds_no_frozen_weight(tmp_path):
    made, _ = learn(learner(peft=LoraChoice(r=2)), make_stream(), tmp_path / "run")
    # Rank 2 on layers 12 -> 16 and 16 -> 8.
    lora = sum(tensor.numel() for name, tensor in made.state().items() if name.startswith("adapter/"))
    assert lora == 2 * (12 + 16) + 2 * (16 + 8)
    others = {name for name in made.state() if not name.startswith("adapter/")}
    assert others == {"centroids", "counts", "classes", "first_samples"}


def test_rejects_a_state_of_another_adapter(tmp_path):
    made, _ = learn(learner(peft=LoraChoice(r=2)), make_stream(), tmp_path / "run")
    with pytest.raises(StreamError, match=r"4 adapted tensors that do not fit the 4 .* peft 'lora'"):
        learner(peft=LoraChoice(r=3)).load_state(made.state())


# Bad input and difficult encoders.


def test_degenerate_a_first_task_of_one_class_goes_on_as_simple_cil(tmp_path):
    stream = make_stream(increments=2, init=1)
    made, run = learn(learner(), stream, tmp_path / "run")
    assert made.dual is None
    assert "one class" in run.notes["warning/simple_cil"]
    simple, run = learn(learner(adapt_on="none"), stream, tmp_path / "simple")
    batch = Batch(stream.data.test.inputs)
    assert torch.equal(made.scores(batch), simple.scores(batch))
    assert not run.notes
    again = learner()
    again.load_state(made.state())
    assert torch.equal(again.scores(batch), made.scores(batch))


def test_property_a_small_first_task_is_pointed_out_with_the_numbers(tmp_path):
    _, run = learn(learner(), make_stream(increments=[2, 4]), tmp_path / "even")
    assert "warning/first_task" not in run.notes, "twice as many is not many more"
    few = make_data()
    keep = ~np.isin(few.train.labels, make_stream().class_order[:2]) | (np.arange(len(few.train)) % 3 == 0)
    data = StreamData(few.train.take(keep), few.test, None, few.label_names, "few")
    stream = make_stream(data)
    sizes = [len(stream.task(t).train) for t in range(2)]
    assert sizes[1] > 2 * sizes[0]
    _, run = learn(learner(), stream, tmp_path / "few")
    assert f"has {sizes[1]} training samples" in run.notes["warning/first_task"]
    assert f"had {sizes[0]}" in run.notes["warning/first_task"]


def test_property_dropout_that_was_left_on_is_off_while_features_are_taken(tmp_path):
    net = nn.Sequential(mlp(), nn.Dropout(0.5))
    made, _ = learn(learner(ArrayEncoder(net), cache_bytes=0), make_stream(), tmp_path / "run")
    batch = Batch(make_data().test.inputs)
    quiet = made.scores(batch)
    net.train()
    assert torch.equal(made.scores(batch), quiet)
    simple, _ = learn(learner(ArrayEncoder(net), adapt_on="none", cache_bytes=0), make_stream(), tmp_path / "simple")
    net.train()
    assert torch.equal(simple.scores(batch), simple.scores(batch))


@pytest.mark.parametrize("peft", [LoraChoice(), FullSpec()], ids=lambda peft: peft.kind)
def test_property_running_statistics_stay_and_a_warning_says_so(peft, tmp_path):
    net = nn.Sequential(nn.Linear(DIM, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, HIDDEN))
    before = copy.deepcopy(net[1].state_dict())
    made, run = learn(learner(ArrayEncoder(net), peft=peft), make_stream(), tmp_path / "run")
    assert "1 batch normalisations (first: model.1)" in run.notes["warning/batch_norm"]
    norm = next(m for m in made.dual.adapted.modules() if isinstance(m, nn.BatchNorm1d))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(norm.state_dict()[name], before[name])


def test_rejects_an_encoder_that_gives_no_vectors(tmp_path):
    net = nn.Sequential(nn.Linear(DIM, 8), nn.Unflatten(1, (2, 4)))
    with pytest.raises(ValueError, match=r"\(batch, D\); got \(40, 2, 4\)"):
        learn(learner(ArrayEncoder(net), adapt_on="none"), make_stream(), tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft": {"kind": "prefix"}}, "'lora', 'ia3', 'adapter', 'vpt', 'full'"),
        ({"peft": {"kind": "vpt", "numb": 3}}, "Did you mean 'num'"),
        ({"first_task": {"epochs": -1}}, r"first_task.epochs.*greater than or equal to 0; got -1"),
        ({"first_task": {"optim": {"kind": "adamw", "momentum": 0.9}}}, "unknown field 'first_task.optim.adamw.mom"),
        ({"branch_norm": "l1"}, "branch_norm"),
        ({"stream": {"modality": "image"}}, "holds texts; name labelled images"),
    ],
)
def test_rejects_a_recipe_that_cannot_be_honoured(fields, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe({"method": "adam_cil", "model": "none", **fields})


def test_property_a_learning_rate_alone_means_sgd():
    made = load_recipe({"method": "adam_cil", "model": "none", "first_task": {"optim": {"lr": 0.5}}})
    assert made.first_task.optim == SgdSpec(lr=0.5)


# Texts, images, and what is left on disk.


def fields_for(kind, request):
    if kind == "text":
        return dict(request.getfixturevalue("continual_fields"))
    root = request.getfixturevalue("pictures")
    stream = {"modality": "image", "data": str(root / "train"), "test": str(root / "test"), "increment": 2}
    return {"model": str(request.getfixturevalue("tiny_vit")), "stream": stream}


ADAPTED = [
    ("text", {"kind": "lora", "r": 2}, {}, 1.0),
    ("text", {"kind": "ia3"}, {"branches": "adapted"}, 1.0),
    ("text", {"kind": "adapter", "width": 4}, {}, 1.0),
    ("text", {"kind": "full"}, {"branch_norm": "l2"}, 0.03),
    ("image", {"kind": "lora", "r": 2}, {"branch_norm": "l2"}, 1.0),
    ("image", {"kind": "adapter", "width": 4}, {}, 1.0),
    ("image", {"kind": "vpt", "num": 2}, {}, 1.0),
    ("image", {"kind": "vpt", "num": 2, "deep": False}, {}, 1.0),
    ("image", {"kind": "full"}, {"branches": "adapted"}, 0.03),
    ("image", {"kind": "lora"}, {"adapt_on": "none"}, 1.0),
]


@pytest.mark.parametrize(
    ("modality", "peft", "fields", "lr"), ADAPTED, ids=[f"{m}-{p['kind']}-{i}" for i, (m, p, *_) in enumerate(ADAPTED)]
)
def test_oracle_the_readme_makes_the_features_and_predictions_of_the_run(
    modality, peft, fields, lr, request, tmp_path, monkeypatch
):
    shared = {**fields_for(modality, request), **fields}
    check_readme(tmp_path / "run", modality, shared, peft, lr, monkeypatch)
    if not fields:
        frozen, adapted = load_file("centroids.safetensors")["centroids"].chunk(2, dim=1)
        assert (frozen - adapted).abs().max() > 0.002, "the adapted branch is another one"


def check_readme(directory, modality, fields, peft, lr, monkeypatch):
    """Run, then make features and predictions of the same inputs by the code of the README alone."""
    first = {"epochs": 4, "batch_size": 8, "optim": {"lr": lr}}
    made = {"method": "adam_cil", **fields, "peft": peft, "first_task": first, "fit": {"precision": "fp32"}}
    execute(load_recipe(made), directory)
    right = json.loads((directory / "items.json").read_text())["acc/last"]["values"]

    names = read_me(directory / "model", monkeypatch)
    inputs, labels = held_out(modality, fields["stream"]["test"])
    assert [float(a == b) for a, b in zip(names["predict"](inputs), labels, strict=True)] == right
    inputs, labels = held_out(modality, fields["stream"]["data"])
    features, means = names["encode"](inputs), load_file("centroids.safetensors")["centroids"]
    for name, mean in zip(names["names"], means, strict=True):
        own = features[[label == name for label in labels]].mean(0)
        torch.testing.assert_close(own, mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "llama", "clip", "vit-without-pooler"])
def test_oracle_the_readme_fits_other_architectures(kind, request, tmp_path, monkeypatch, tiny_encoder, tiny_vit):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    directory = tmp_path / "base"
    if kind == "clip":
        vision = {**sizes, "image_size": 16, "patch_size": 8}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            CLIPModel(
                CLIPConfig(text_config={**sizes, "vocab_size": 16}, vision_config=vision, projection_dim=8)
            ).save_pretrained(directory)
        ViTImageProcessorPil.from_pretrained(tiny_vit).save_pretrained(directory)
    elif kind == "vit-without-pooler":
        ViTModel.from_pretrained(tiny_vit, add_pooling_layer=False).save_pretrained(directory)
        ViTImageProcessorPil.from_pretrained(tiny_vit).save_pretrained(directory)
    else:
        tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
        build = tiny_t5 if kind == "t5" else tiny_llama
        build(tokenizer, hidden=16, layers=1, heads=2, mlp=16, generator_seed=0).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    modality = "text" if kind in ("t5", "llama") else "image"
    fields = {**fields_for(modality, request), "model": str(directory)}
    check_readme(tmp_path / "run", modality, fields, {"kind": "lora", "r": 2}, 0.3, monkeypatch)


@pytest.mark.parametrize("peft", [LoraChoice(r=2), AdapterSpec(width=3), FullSpec()], ids=lambda peft: peft.kind)
def test_oracle_the_readme_of_a_module_of_ones_own_predicts_too(peft, tmp_path, monkeypatch):
    stream = make_stream()
    made, _ = learn(learner(peft=peft), stream, tmp_path / "run")
    made.save(tmp_path / "model", stream.data.label_names)
    names = read_me(tmp_path / "model", monkeypatch, base=mlp())
    inputs = stream.data.test.inputs
    np.testing.assert_allclose(names["encode"](torch.from_numpy(inputs)), made._features(inputs), rtol=1e-5, atol=1e-6)
    ours = made.scores(Batch(stream.data.test.inputs)).argmax(1).tolist()
    theirs = names["predict"](torch.from_numpy(stream.data.test.inputs))
    assert theirs == [stream.data.label_names[label] for label in ours]


def test_oracle_the_adapter_opens_in_peft_and_gives_the_adapted_branch(tmp_path, continual_fields, tiny_encoder):
    first = {"epochs": 4, "batch_size": 8, "optim": {"lr": 1.0}}
    made = {"peft": {"kind": "lora"}, "first_task": first, "fit": {"precision": "fp32"}}
    execute(load_recipe({"method": "adam_cil", **continual_fields, **made}), tmp_path / "run")
    opened = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_encoder), tmp_path / "run/model/adapter").eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        adapted = opened(input_ids=ids).last_hidden_state
        with opened.disable_adapter():
            frozen = opened(input_ids=ids).last_hidden_state
        plain = AutoModel.from_pretrained(tiny_encoder)(input_ids=ids).last_hidden_state
    torch.testing.assert_close(frozen, plain)
    assert (adapted - frozen).abs().max() > 0.01
    config = json.loads((tmp_path / "run/model/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_encoder)


def test_oracle_images_without_adaptation_equal_the_reference_of_the_family(tmp_path, request):
    shared = fields_for("image", request)
    execute(load_recipe({"method": "adam_cil", **shared, "adapt_on": "none"}), tmp_path / "ours")
    execute(load_recipe({"method": "nmc", **shared, "metric": "cosine"}), tmp_path / "nmc")
    np.testing.assert_array_equal(matrix(tmp_path / "ours"), matrix(tmp_path / "nmc"))


def test_property_pictures_have_a_fingerprint_of_their_contents(pictures):
    def fingerprint(train, test):
        spec = StreamSpec(modality="image", data=str(pictures / train), test=str(pictures / test))
        return load_stream_data(spec, None).fingerprint

    changed = pictures.parent / f"{pictures.name}-changed"
    shutil.copytree(pictures / "train", changed)
    first, second = sorted((changed / "red").glob("*.png"))[:2]
    first.write_bytes(second.read_bytes())
    assert fingerprint("train", "test") == fingerprint("train", "test")
    assert fingerprint("train", "test") != fingerprint(changed, "test")


@pytest.mark.parametrize("kind", ["pixels", "tokens"])
def test_oracle_arrays_are_taken_for_the_models_own_tensors(kind, tmp_path, tiny_vit, tiny_encoder):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 6)
    if kind == "pixels":
        inputs = rng.normal(size=(24, 3, 16, 16)).astype(np.float32)
        fields = {"model": str(tiny_vit), "stream": StreamSpec(modality="image", data="x", test="x", increment=2)}
        with torch.no_grad():
            expected = AutoModel.from_pretrained(tiny_vit)(torch.from_numpy(inputs)).pooler_output
    else:
        inputs = rng.integers(5, 300, size=(24, 6))
        inputs[:, 4:] = 0  # the padding token
        fields = {"model": str(tiny_encoder), "stream": StreamSpec(increment=2)}
        with torch.no_grad():
            expected = AutoModel.from_pretrained(tiny_encoder)(torch.from_numpy(inputs[:, :4])).last_hidden_state.mean(
                1
            )
    data = StreamData(Samples(inputs, labels), Samples(inputs, labels), None, tuple("abcd"), kind)
    made = ADAM(peft=LoraChoice(r=2), first_task=FirstTask(epochs=0), fit=FIT, **fields)
    follow(made, made.stream.cut(data, seed=0), tmp_path / "run")
    means = load_file(tmp_path / "run/model/centroids.safetensors")["centroids"]
    names = json.loads((tmp_path / "run/model/classes.json").read_text())["label_names"]
    for name, mean in zip(names, means, strict=True):
        own = expected[labels == "abcd".index(name)].mean(0)
        torch.testing.assert_close(mean, torch.cat((own, own)), rtol=1e-4, atol=1e-5)


def test_rejects_visual_prompts_for_texts(tmp_path, continual_fields):
    made = load_recipe({"method": "adam_cil", **continual_fields, "peft": {"kind": "vpt"}})
    with pytest.raises(ValueError, match=r"plain vision transformer .*; got 'bert'. Use lora or adapter"):
        execute(made, tmp_path / "run")


def test_property_encoded_images_reach_the_encoder_as_their_pixels(tiny_vit):
    shown = picture(np.random.default_rng(1), (200, 60, 60))
    file = io.BytesIO()
    shown.save(file, "png")
    encoder = Encoder(ViTModel.from_pretrained(tiny_vit), ViTImageProcessorPil.from_pretrained(tiny_vit), "image")
    assert torch.equal(encoder.prepare([file.getvalue()])["pixel_values"], encoder.prepare([shown])["pixel_values"])


# Whether it does what it is for.


def test_learns_what_the_frozen_encoder_hardly_sees(tmp_path):
    """Classes differ in four directions that the encoder shrinks to a tenth; in eight others there is only noise."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(CLASSES, 4))

    def samples(count):
        labels = np.repeat(np.arange(CLASSES), count)
        told = 3 * means[labels] + rng.normal(size=(len(labels), 4))
        return Samples(np.concatenate((rng.normal(size=(len(labels), 8)), told), 1).astype(np.float32), labels)

    data = StreamData(samples(60), samples(60), None, tuple("abcdef"), "hidden")

    class OnNet(ADAM):
        def encoder(self, info):
            net = nn.Sequential(nn.Linear(DIM, DIM, bias=False))
            net[0].weight.data = torch.diag(torch.tensor([1.0] * 8 + [0.1] * 4))
            return ArrayEncoder(net)

    stream = make_stream(data, increments=[4, 2])
    last = {}
    for name, fields in {
        "simple": {"adapt_on": "none"},
        "adam": {"peft": FullSpec(), "first_task": FirstTask(epochs=30, optim=SgdSpec(lr=0.03))},
    }.items():
        last[name] = follow(OnNet(model="none", fit=FIT, **fields), stream, tmp_path / name)["acc/last"]
    assert last["adam"] > last["simple"] + 0.1


def test_learns_claim_runs_at_smoke_scale(tmp_path):
    measured = CLAIM.measure("smoke", 100, tmp_path / "claim")
    verdict = judge(CLAIM, "smoke", {100: measured})
    assert verdict["verdict"] == "inconclusive"
    assert measured.arms["simple-cil-no-gap"]["acc/average"] > measured.arms["simple-cil"]["acc/average"]
    gain = measured.arms["adam"]["acc/average"] - measured.arms["simple-cil"]["acc/average"]
    assert measured.arms["gap"]["gain"] == pytest.approx(gain)
    for arm, items in measured.items.items():
        assert np.mean(items["acc/last"]) == pytest.approx(measured.arms[arm]["acc/last"])
