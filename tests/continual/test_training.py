import numpy as np
import pytest
import torch
from torch import nn

from headwater.continual.streams import Samples
from headwater.continual.training import (
    TaskBatches,
    TaskCrossEntropy,
    Trainee,
    digest_of_inputs,
    features_of,
)
from headwater.core.order import VirtualIndex
from headwater.modalities.features import ArrayEncoder
from headwater.modalities.text.labelled import text_array


def batches(count=10, rows=4, seed=0, shift=0.0):
    inputs = np.arange(count, dtype=np.float32)[:, None] + shift
    samples = Samples(inputs, np.arange(count) % 3)
    return TaskBatches(samples, ArrayEncoder(nn.Linear(1, 2)), VirtualIndex(count, seed), rows)


def test_property_every_sample_stands_once_in_every_epoch():
    stream = batches()
    rows = torch.cat([stream.batch(step)["row"] for step in range(5)])  # 20 rows: two epochs
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()


def test_property_a_part_of_a_batch_is_that_part():
    whole, part = batches().batch(1), batches().batch(1, 1, 3)
    for name in ("inputs", "labels", "row"):
        assert torch.equal(part[name], whole[name][1:3])
    assert torch.equal(whole["inputs"][:, 0], whole["row"].float())
    assert torch.equal(whole["labels"], whole["row"] % 3)


def test_property_the_fingerprint_tells_data_order_and_size_apart():
    prints = {
        b.fingerprint for b in (batches(), batches(shift=1.0), batches(seed=1), batches(rows=5), batches(count=11))
    }
    assert len(prints) == 5
    assert batches().fingerprint == batches().fingerprint


def test_property_inputs_of_every_kind_have_a_digest_of_their_own():
    texts = [text_array(["ab", "c"]), text_array(["a", "bc"]), text_array([b"ab", b"c", b""])]
    numbers = [np.zeros(2), np.zeros(2, np.float32), np.zeros((2, 1)), np.ones(2)]
    assert len({digest_of_inputs(inputs) for inputs in (*texts, *numbers)}) == 7
    assert digest_of_inputs(np.arange(6).reshape(2, 3).T) == digest_of_inputs(np.array([[0, 3], [1, 4], [2, 5]]))


def test_equation_cross_entropy_is_a_sum_and_a_count():
    objective = TaskCrossEntropy(nn.Identity())
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    loss = objective(lambda batch: batch["x"], {"x": logits, "labels": torch.tensor([0, 1]), "row": torch.arange(2)})
    assert float(loss.total) == pytest.approx(-np.log(0.5) - np.log(0.1))
    assert loss.count == 2
    assert float(loss.metrics["acc/train"]) == 0.5


def test_property_batch_normalisation_stays_in_evaluation_mode_and_dropout_does_not():
    trainee = Trainee(nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()), nn.BatchNorm2d(2)).train()
    assert (trainee.encoder[0].training, trainee.encoder[1].training, trainee.adapter.training) == (False, True, False)
    assert not trainee.eval().encoder[1].training


def test_equation_classes_that_do_not_compete_have_no_share_and_no_gradient():
    head = nn.Linear(2, 4)
    objective = TaskCrossEntropy(head, torch.tensor([False, False, True, True]))
    features = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    loss = objective(lambda batch: batch["x"], {"x": features, "labels": torch.tensor([2, 3]), "row": torch.arange(2)})
    own = torch.log_softmax(head(features)[:, 2:], 1).detach()
    assert float(loss.total.detach()) == pytest.approx(-float(own[0, 0] + own[1, 1]), rel=1e-6)
    loss.total.backward()
    assert not head.weight.grad[:2].any()
    assert head.weight.grad[2:].any()
    assert not [name for name in objective.state_dict() if "competing" in name], "no part of a checkpoint"


def test_property_features_are_taken_in_evaluation_mode_in_pieces():
    encoder = ArrayEncoder(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.9))).train()
    inputs = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    features = features_of(encoder, inputs, 3)
    torch.testing.assert_close(features, encoder.model[0](torch.from_numpy(inputs)), rtol=1e-5, atol=1e-6)
    assert not features.requires_grad
