import copy
import logging

import numpy as np
import pytest
import torch
from torch import nn

from headwater.continual.alignment import ClassGaussians, align_classifier, normalized_logits
from headwater.continual.heads import GrowingLinear
from headwater.core.moments import ClassMoments
from headwater.core.rng import torch_generator

DIM = 4


def covariance_of(seed, dim=DIM):
    root = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(dim, dtype=torch.float64)


def moments_of(means, covariances, count=50, first=0, kind="per_class"):
    """Moments as if ``count`` samples had been seen of each class."""
    moments = ClassMoments(means.shape[1], scatter=kind)
    moments.classes = torch.arange(first, first + len(means))
    moments.counts = torch.full((len(means),), count)
    moments.means, moments.scatter = means.double(), covariances * (count - 1)
    return moments


def two_classes(rank=None, **settings):
    means = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 4.0, -1.0, 0.0]])
    covariances = torch.stack([covariance_of(0), covariance_of(1)])
    return ClassGaussians(rank=rank, **settings).add(moments_of(means, covariances)), means, covariances


def draws(gaussians, count=100_000, **settings):
    samples, labels = gaussians.sample(count, torch.Generator().manual_seed(0), **settings)
    assert labels.tolist() == [label for label in gaussians.classes.tolist() for _ in range(count)]
    return samples.view(len(gaussians), count, -1).double()


# Gaussians.


def test_oracle_samples_have_the_means_times_their_scale_and_the_covariance():
    gaussians, means, covariances = two_classes(jitter=1e-4)
    scale, count = torch.tensor([0.95, 1.0]), 100_000
    for found, mean, covariance in zip(
        draws(gaussians, mean_scale=scale), scale[:, None] * means, covariances, strict=True
    ):
        covariance = covariance + 1e-4 * torch.eye(DIM)
        spread = covariance.diagonal()
        assert ((found.mean(0) - mean).abs() < 4 * (spread / count).sqrt()).all()
        # Of an entry of a sample covariance: (S_ij^2 + S_ii S_jj) / n.
        error = ((covariance.square() + spread[:, None] * spread) / count).sqrt()
        assert ((torch.cov(found.T) - covariance).abs() < 4 * error).all()


def test_oracle_full_factors_are_those_of_the_sample_covariance():
    features = torch.randn(30, DIM, generator=torch.Generator().manual_seed(1))
    moments = ClassMoments(DIM, scatter="per_class").update(features, torch.zeros(30, dtype=torch.int64))
    gaussians = ClassGaussians(jitter=1e-3).add(moments)
    expected = np.cov(features.numpy(), rowvar=False) + 1e-3 * np.eye(DIM)
    np.testing.assert_allclose(gaussians.factors[0] @ gaussians.factors[0].T, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gaussians.means[0], features.mean(0), rtol=1e-5)
    assert gaussians.deviations.shape == (1, 0)


@pytest.mark.parametrize("rank", [1, 2, 4, 9])
def test_property_low_rank_keeps_all_variances_and_the_largest_directions(rank):
    gaussians, _, covariances = two_classes(rank=rank)
    kept = min(rank, DIM)
    assert gaussians.factors.shape == (2, DIM, kept)
    for factor, deviation, covariance in zip(gaussians.factors, gaussians.deviations, covariances, strict=True):
        rebuilt = (factor @ factor.T + deviation.square().diag()).double()
        torch.testing.assert_close(
            rebuilt.diagonal(), covariance.diagonal() + 1e-4, rtol=1e-5, atol=1e-5, check_dtype=False
        )
        largest = torch.linalg.eigvalsh(covariance)[-kept:]
        own = torch.linalg.eigvalsh((factor @ factor.T).double())[-kept:]
        torch.testing.assert_close(own, largest, rtol=1e-4, atol=1e-4)
    found = torch.cov(draws(gaussians)[0].T)
    torch.testing.assert_close(found.diagonal(), covariances[0].diagonal(), rtol=0.03, atol=0.01)


def test_equation_rank_zero_is_the_variances_alone():
    features = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]])
    moments = ClassMoments(2, scatter="diag").update(features, torch.zeros(3, dtype=torch.int64))
    gaussians = ClassGaussians(rank=0, jitter=0.1).add(moments)
    # Variances (4 + 0 + 4) / 2 = 4 and (1 + 1 + 4) / 2 = 3.
    torch.testing.assert_close(gaussians.deviations, torch.tensor([[4.1, 3.1]]).sqrt())
    assert gaussians.factors.shape == (1, 2, 0)
    assert torch.cov(draws(gaussians, 50_000)[0].T)[0, 1].abs() < 0.1


@pytest.mark.parametrize("rank", [None, 0, 2])
def test_property_classes_added_one_at_a_time_are_those_added_together(rank):
    kind = "diag" if rank == 0 else "per_class"
    rng = np.random.default_rng(0)
    X, y = torch.from_numpy(rng.normal(size=(60, DIM))), torch.arange(60) % 3
    together = ClassGaussians(rank=rank).add(ClassMoments(DIM, scatter=kind).update(X, y))
    apart = ClassGaussians(rank=rank)
    for label in range(3):
        apart.add(ClassMoments(DIM, scatter=kind).update(X[y == label], y[y == label]))
    for name, tensor in together.state().items():
        torch.testing.assert_close(apart.state()[name], tensor)


def test_property_a_class_that_returns_is_replaced():
    gaussians, means, covariances = two_classes()
    gaussians.add(moments_of(means[:1] + 1, 4 * covariances[:1]))
    assert gaussians.classes.tolist() == [1, 0]
    torch.testing.assert_close(gaussians.means, torch.stack((means[1], means[0] + 1)))
    rebuilt = gaussians.factors[1] @ gaussians.factors[1].T
    torch.testing.assert_close(rebuilt.double(), 4 * covariances[0], rtol=1e-3, atol=1e-3)


def test_property_numpy_moments_do_as_well():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(20, DIM)), np.arange(20) % 2
    ours, theirs = (
        ClassGaussians().add(ClassMoments(DIM, scatter="per_class").update(*data))
        for data in ((X, y), (torch.from_numpy(X), torch.from_numpy(y)))
    )
    torch.testing.assert_close(ours.factors, theirs.factors)


def test_degenerate_a_class_of_one_sample_takes_the_covariance_of_the_others(caplog):
    X = torch.randn(21, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([0] * 10 + [1] * 10 + [2])
    with caplog.at_level(logging.WARNING):
        gaussians = ClassGaussians().add(ClassMoments(DIM, scatter="per_class").update(X, y))
    assert "classes [2] have one sample each" in caplog.text
    pooled = (torch.cov(X[:10].T) + torch.cov(X[10:20].T)) / 2 + 1e-4 * torch.eye(DIM)
    factor = gaussians.factors[2].double()
    torch.testing.assert_close(factor @ factor.T, pooled, rtol=1e-4, atol=1e-5)


def test_degenerate_fewer_samples_than_features_still_factor():
    X = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    moments = ClassMoments(20, scatter="per_class").update(X, torch.zeros(3, dtype=torch.int64))
    factor = ClassGaussians().add(moments).factors[0]
    torch.testing.assert_close(factor @ factor.T, torch.cov(X.T) + 1e-4 * torch.eye(20), rtol=1e-3, atol=1e-4)


def test_property_jitter_is_doubled_as_far_as_needed():
    # Least eigenvalue -0.003: 1e-4 * 2^5 = 0.0032 is the first jitter that makes it positive.
    covariance = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.003], dtype=torch.float64))
    gaussians = ClassGaussians().add(moments_of(torch.zeros(1, DIM), covariance[None]))
    assert float(gaussians.factors[0, 3, 3]) == pytest.approx((0.0032 - 0.003) ** 0.5, rel=1e-4)


def test_rejects_what_cannot_be_a_gaussian():
    with pytest.raises(ValueError, match=r"rank must be at least 0, or None .*; got -1"):
        ClassGaussians(rank=-1)
    with pytest.raises(ValueError, match=r"jitter must be in \(0, 0.1\]; got 0.5"):
        ClassGaussians(jitter=0.5)
    bad = torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"covariance of class 7 is not positive definite, even with 0\.1"):
        ClassGaussians().add(moments_of(torch.zeros(1, DIM), bad[None], first=7))
    with pytest.raises(ValueError, match="rank 0 needs moments with scatter='diag'; got 'per_class'"):
        ClassGaussians(rank=0).add(ClassMoments(DIM, scatter="per_class"))
    lone = ClassMoments(DIM, scatter="per_class").update(torch.eye(DIM), torch.arange(DIM))
    with pytest.raises(ValueError, match=r"none of the 4 classes has two samples.*epochs: 0"):
        ClassGaussians().add(lone)
    with pytest.raises(ValueError, match="are of 4 features; got 3"):
        two_classes()[0].add(moments_of(torch.zeros(1, 3), covariance_of(0, 3)[None]))


# Logits.


def test_equation_logits_over_the_mean_length_of_the_tasks():
    logits = torch.tensor([[3.0, 4.0, 0.0, 1.0]])
    # Tasks (3, 4) of length 5 and (0, 1) of length 1: mean 3, times 0.1.
    expected = logits / 0.3
    torch.testing.assert_close(normalized_logits(logits, torch.tensor([0, 0, 1, 1]), 0.1), expected)
    # Interleaved: (3, 0) of length 3 and (4, 1) of length 17 ** .5.
    expected = logits / (0.1 * (3 + 17**0.5) / 2)
    torch.testing.assert_close(normalized_logits(logits, torch.tensor([2, 5, 2, 5]), 0.1), expected)


def test_property_the_scale_of_logits_is_lost():
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    tasks = torch.tensor([0, 0, 1, 1, 2, 2])
    for scale in (1e-3, 7.0, 1e4):
        torch.testing.assert_close(
            normalized_logits(scale * logits, tasks, 0.1), normalized_logits(logits, tasks, 0.1), rtol=1e-4, atol=1e-5
        )


def test_degenerate_zero_logits_have_a_finite_gradient():
    logits = torch.zeros(2, 3, requires_grad=True)
    found = normalized_logits(logits, torch.tensor([0, 0, 1]), 0.1)
    found.sum().backward()
    assert not found.any()
    assert torch.isfinite(logits.grad).all()


# Alignment.


def head_of(blocks=(2, 2)):
    head = GrowingLinear(DIM)
    for number, size in enumerate(blocks):
        head.grow(size, torch_generator(0, "block", number))
    return head


def four_classes(rank=None):
    means = 3 * torch.randn(4, DIM, generator=torch.Generator().manual_seed(3))
    kind = "diag" if rank == 0 else "per_class"
    spread = torch.ones(4, DIM).double() if rank == 0 else torch.eye(DIM).double().expand(4, DIM, DIM)
    return ClassGaussians(rank=rank).add(moments_of(means, spread, kind=kind))


def test_oracle_without_normalisation_and_decay_it_is_softmax_training_on_the_samples():
    gaussians, head = four_classes(), head_of()
    ours = align_classifier(
        head, gaussians, [0, 0, 0, 0], epochs=3, per_class=8, batch_size=8, temperature=None, seed=5
    )
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    generator = torch_generator(5, "alignment")
    speed = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for epoch in range(3):
        lr = 0.01 * 0.5 * (1 + np.cos(np.pi * epoch / 3))
        samples, labels = gaussians.sample(8, generator)
        order = torch.randperm(32, generator=generator)
        for rows in order.split(8):
            wrong = torch.softmax(samples[rows] @ weight.T + bias, 1) - nn.functional.one_hot(labels[rows], 4)
            slopes = [wrong.T @ samples[rows] / 8 + 5e-4 * weight, wrong.mean(0)]
            for value, moved, slope in zip((weight, bias), speed, slopes, strict=True):
                moved.mul_(0.9).add_(slope)
                value -= lr * moved
    torch.testing.assert_close(ours.weight, weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.bias, bias, rtol=1e-4, atol=1e-6)


def test_property_the_older_a_class_the_nearer_its_samples_are_to_the_origin(monkeypatch):
    gaussians, seen = four_classes(), []
    sample = ClassGaussians.sample

    def noted(self, per_class, generator, *, mean_scale=None):
        seen.append(mean_scale)
        return sample(self, per_class, generator, mean_scale=mean_scale)

    monkeypatch.setattr(ClassGaussians, "sample", noted)
    align_classifier(head_of(), gaussians, [0, 0, 1, 3], epochs=1, per_class=2)
    # .9 + .1 (t_c + 1) / (t + 1) with t = 3.
    torch.testing.assert_close(seen[0], torch.tensor([0.925, 0.925, 0.95, 1.0]))
    align_classifier(head_of(), gaussians, [0, 0, 1, 3], epochs=1, per_class=2, mean_decay=False)
    assert seen[1] is None


def test_property_the_head_that_was_given_stays_as_it_is_and_the_copy_is_no_longer_trained():
    head = head_of()
    head.weights[0].requires_grad_(False)
    before = copy.deepcopy(head.state_dict())
    aligned = align_classifier(head, four_classes(), [0, 0, 1, 1], epochs=1, per_class=16, batch_size=4)
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert not torch.equal(aligned.state_dict()[name], tensor), "frozen blocks are aligned too"
    assert [p.requires_grad for p in head.parameters()] == [False, True, True, True]
    assert not any(p.requires_grad for p in aligned.parameters())


def test_property_any_head_will_do_and_the_seed_decides():
    head = nn.Linear(DIM, 4)
    first, second, other = (
        align_classifier(head, four_classes(rank=0), [0, 0, 1, 1], epochs=1, per_class=16, seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)


def test_property_little_memory_draws_an_epoch_in_parts():
    calls = []

    class Counting(ClassGaussians):
        def sample(self, per_class, generator, *, mean_scale=None):
            calls.append(per_class)
            return super().sample(per_class, generator, mean_scale=mean_scale)

    gaussians = Counting()
    gaussians.load_state(four_classes().state())
    align_classifier(head_of(), gaussians, [0, 0, 1, 1], epochs=1, per_class=10, memory_bytes=4 * (4 * DIM * 4) + 1)
    assert calls == [4, 4, 2]
    calls.clear()
    align_classifier(head_of(), gaussians, [0, 0, 1, 1], epochs=2, per_class=10)
    assert calls == [10, 10]


def test_rejects_classes_that_do_not_fit_together():
    with pytest.raises(ValueError, match="the head has 3 classes, the Gaussians 4 and task_of_class 4"):
        align_classifier(nn.Linear(DIM, 3), four_classes(), [0, 0, 1, 1])
    with pytest.raises(ValueError, match="the head has 4 classes, the Gaussians 4 and task_of_class 3"):
        align_classifier(nn.Linear(DIM, 4), four_classes(), [0, 0, 1])


def test_learns_to_compare_heads_that_were_trained_apart():
    """The second block's logits are five times too large: without alignment it answers for the first's classes too."""
    gaussians = four_classes()
    head = head_of()
    with torch.no_grad():
        for block, scale in ((0, 0.05), (1, 0.25)):
            rows = slice(2 * block, 2 * block + 2)
            centred = gaussians.means[rows] - gaussians.means[rows].mean(0)
            head.weights[block].copy_(scale * centred)
    samples, labels = gaussians.sample(200, torch.Generator().manual_seed(9))
    aligned = align_classifier(head, gaussians, [0, 0, 1, 1])
    before, after = ((h(samples).argmax(1) == labels).float().mean() for h in (head, aligned))
    assert before < 0.8
    assert after > 0.9
