"""LARS against a step by hand under the paper's exclusions, the groups, and the schedule."""

import copy

import numpy as np
import pytest
import torch
from timm.optim import Lars
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from collapse.recipes.config import make_config
from collapse.training.network import Network
from collapse.training.optim import LARS, learning_rate, make_optimizer, parameter_groups, target_momentum


def by_hand(p, g, m, lr, decay, momentum, eta, adapt):
    if adapt:
        g = g + decay * p
        norms = np.sqrt((p**2).sum()), np.sqrt((g**2).sum())
        g = g * (eta * norms[0] / norms[1] if min(norms) > 0 else 1.0)
    m = momentum * m + g
    return p - lr * m, m


def test_lars_is_three_steps_by_hand():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    nn.init.zeros_(net[2].weight)  # a norm of zero: the step is not scaled
    values = {name: (p.detach().numpy().copy(), np.zeros(p.shape)) for name, p in net.named_parameters()}
    optimizer = make_optimizer("lars", parameter_groups(net, 1e-2), 0.9, 1e-3)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 + step
        for name, p in net.named_parameters():
            p.grad = torch.randn(p.shape, dtype=p.dtype)
            adapts = name in ("0.weight", "2.weight")
            values[name] = by_hand(
                *values[name][:1], p.grad.numpy().copy(), values[name][1], 0.5 + step, 1e-2, 0.9, 1e-3, adapts
            )
        optimizer.step()
        for name, p in net.named_parameters():
            np.testing.assert_allclose(p.detach().numpy(), values[name][0], rtol=1e-12, err_msg=name)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_lars_is_timms_without_decay_in_a_tenth_of_the_operations():
    torch.manual_seed(0)
    ours = nn.Sequential(*(nn.Linear(5, 5) for _ in range(20))).double()
    theirs = copy.deepcopy(ours)
    steps = [
        (ours, LARS(parameter_groups(ours, 0.0), lr=0.3, momentum=0.9, eta=0.01)),
        (theirs, Lars(theirs.parameters(), lr=0.3, momentum=0.9, trust_coeff=0.01, eps=0, always_adapt=True)),
    ]
    for group in steps[0][1].param_groups:
        group["adapt"] = True  # timm adapts all or, by decay, some
    for seed in range(3):
        counts = []
        for net, optimizer in steps:
            torch.manual_seed(seed)
            for p in net.parameters():
                p.grad = torch.randn_like(p)
            with Operations() as operations:
                optimizer.step()
            counts.append(operations.count)
        assert counts[1] > 10 * counts[0] or seed == 0  # the first step makes the momenta
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


def test_lars_leaves_parameters_without_gradient_alone():
    p = nn.Parameter(torch.ones(2, 2))
    LARS([p], lr=1.0).step()
    assert torch.equal(p.detach(), torch.ones(2, 2))


def test_groups_hold_every_trained_parameter_once():
    net = Network(make_config("imagenet", arch="resnet18", head="orthogonal"), 10)
    groups = parameter_groups(net.backbone, 1e-6) + parameter_groups(net.projector, 1e-6)
    matrices, vectors = groups
    assert all(p.ndim > 1 for p in matrices["params"])
    assert all(p.ndim == 1 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(net.backbone.parameters()))
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (1e-6, 0.0)
    assert (matrices["adapt"], vectors["adapt"]) == (True, False)


def test_the_learning_rate_warms_up_and_falls_to_the_last():
    rates = [learning_rate(step, 100, 10, 0.5, 0.1) for step in range(101)]
    np.testing.assert_allclose(rates[:10], 0.05 * np.arange(1, 11))
    assert rates[10] == 0.5
    assert rates[55] == pytest.approx(0.3)
    assert rates[100] == pytest.approx(0.1)
    assert rates == sorted(rates[:11]) + sorted(rates[11:], reverse=True)
    assert learning_rate(3120, 31200, 3120, 4.8, 0.0048) == 4.8
    assert learning_rate(0, 2, 0, 1.0) == 1.0
    assert learning_rate(1, 2, 0, 1.0) == pytest.approx(0.5)
    assert learning_rate(3, 3, 3, 1.0) == 1.0  # all is warm-up


def test_the_targets_momentum_rises_along_half_a_cosine():
    shares = [target_momentum(step, 6, 0.9) for step in (0, 2, 3, 4, 6)]
    np.testing.assert_allclose(shares, [0.9, 0.925, 0.95, 0.975, 1.0])


def test_sgd_is_two_steps_by_hand():
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    groups = [{"params": [p], "weight_decay": 0.1, "adapt": True}]
    optimizer = make_optimizer("sgd", groups, 0.9, 1e-3)
    assert optimizer.param_groups[0]["lr"] == 0
    optimizer.param_groups[0]["lr"] = 0.5
    value, m = np.array([1.0, -2.0]), np.zeros(2)
    for _ in range(2):
        p.grad = torch.ones(2)
        optimizer.step()
        value, m = by_hand(value, np.ones(2) + 0.1 * value, m, 0.5, 0.1, 0.9, 1.0, False)
        np.testing.assert_allclose(p.detach(), value, rtol=1e-6)


def test_lars_without_options_is_that_of_its_paper():
    value, g, m = np.array([[3.0, 1.0], [-2.0, 5.0]]), np.ones((2, 2)), np.zeros((2, 2))
    p = nn.Parameter(torch.tensor(value))
    optimizer = LARS([p], lr=2.0)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
        value, m = by_hand(value, g, m, 2.0, 0.0, 0.9, 1e-3, True)
        np.testing.assert_allclose(p.detach(), value, rtol=1e-12)


@pytest.mark.parametrize("name", ["lars", "sgd"])
def test_an_optimiser_moves_nothing_before_its_rate_is_set(name):
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = make_optimizer(name, parameter_groups(nn.ParameterList([p]), 0.1), 0.9, 1e-3)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(2, 2))
