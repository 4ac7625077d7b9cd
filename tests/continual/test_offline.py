import pytest
import torch
from torch import nn

from headwater.continual.heads import GrowingLinear
from headwater.continual.offline import CurrentClasses, OfflineCopy, decay_per_step


def module(value=1.0):
    layer = nn.Linear(2, 2)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, value)
    return layer


def test_equation_from_zero_towards_one_in_k_steps():
    online = module(0.0)
    offline = OfflineCopy(online, decay=0.9)
    for parameter in online.parameters():
        parameter.data.fill_(1.0)
    for _ in range(7):
        offline.update()
    for value in offline.values:
        torch.testing.assert_close(value, torch.full_like(value, 1 - 0.9**7))


def test_degenerate_decay_one_never_moves_and_decay_zero_is_the_online_module():
    online = nn.Linear(3, 2)
    still, equal = OfflineCopy(online, decay=1.0), OfflineCopy(online, decay=0.0)
    before = [value.clone() for value in still.values]
    for parameter in online.parameters():
        parameter.data += 0.37
    still.update()
    equal.update()
    for value, was, now, parameter in zip(still.values, before, equal.values, online.parameters(), strict=True):
        assert torch.equal(value, was)
        assert torch.equal(now, parameter)


def test_property_the_copy_is_stored_with_what_trains_it_and_is_not_trained():
    offline = OfflineCopy(module().parameters(), decay=0.5)
    assert list(offline.parameters()) == []
    assert set(offline.state_dict()) == {"value_0", "value_1"}


def test_equation_half_lives_in_tasks():
    assert decay_per_step(0.97, 10) == 0.97
    assert decay_per_step("task:1", 25) ** 25 == pytest.approx(0.5)
    assert decay_per_step("task:.5", 4) == pytest.approx(0.5**0.5)


def head_of(sizes, dim=2):
    head = GrowingLinear(dim)
    for block, size in enumerate(sizes):
        head.grow(size, torch.Generator().manual_seed(block))
    return head


def read(batch):
    return batch["x"]


def batch(labels, dim=2):
    x = torch.randn(len(labels), dim, generator=torch.Generator().manual_seed(1))
    return {"x": x, "labels": torch.tensor(labels), "row": torch.arange(len(labels))}


def test_equation_only_classes_of_the_task_compete():
    head = head_of([1, 2], dim=1)
    for block, weights in enumerate([[5.0], [0.0, 1.0]]):
        head.weights[block].data = torch.tensor(weights)[:, None]
    loss = CurrentClasses(head, [1, 2])(read, {"x": torch.tensor([[2.0]]), "labels": torch.tensor([2])})
    # -ln(e^2 / (e^0 + e^2)); the first class's logit of 10 is left out.
    assert float(loss.total) == pytest.approx(0.126928, abs=1e-6)
    assert loss.count == 1
    assert float(loss.metrics["acc/train"]) == 1.0


def test_property_old_rows_get_no_gradient():
    head = head_of([3, 2])
    CurrentClasses(head, [3, 4])(read, batch([3, 4, 3])).total.backward()
    assert head.weights[0].grad.abs().max() == 0
    assert head.biases[0].grad.abs().max() == 0
    assert head.weights[1].grad.abs().max() > 0


def test_property_the_copy_moves_between_steps_and_not_before_the_first():
    online = module(0.0)
    offline = OfflineCopy(online, decay=0.5)
    objective = CurrentClasses(head_of([2]), [0, 1], offline)
    for parameter in online.parameters():
        parameter.data.fill_(1.0)
    objective.begin_step(0.0, None)
    assert float(offline.values[0].max()) == 0
    objective.begin_step(0.5, None)
    assert float(offline.values[0].min()) == 0.5
    CurrentClasses(head_of([2]), [0, 1]).begin_step(0.5, None)
