"""Several processes as one, and gradients that are made in pieces: against one process on the whole batch."""

import json
import math
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from processes import ended
from torch import nn

from collapse import InputError
from collapse.recipes.config import make_config
from collapse.training import parallel
from collapse.training.losses import contrastive_loss
from collapse.training.network import Network, backward, recompute_blocks

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def report():
    """What tests/training/ranks.py finds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-W", "error", str(ROOT / "tests/training/ranks.py"), str(free_port())]
    result = ended(call, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_processes_give_the_loss_gradients_and_statistics_of_one_on_the_whole_batch(report):
    # Whole runs in float32 with a small learning rate: 2e-7 a step, amplified by a few steps.
    assert len(report["logs"]) == 2 * 6
    assert max(map(max, report["logs"])) < 1e-4
    cases = {name: errors for name, errors in report.items() if name not in ("logs", "compiled")}
    assert len(cases) == 16
    for case, (loss, grads, buffers) in cases.items():
        # float64: sums of 16 rows in another order, through a few layers, lose less than 1e-12.
        assert loss < 1e-12, case
        assert grads < 1e-12, case
        assert buffers < 1e-12, case


def test_two_processes_compute_the_same_compiled_and_not(report):
    assert report["compiled"] == 0


@pytest.mark.parametrize("negatives", ["other", "all"])
def test_the_loss_is_the_mean_over_anchors_and_directions_of_the_papers_formula(negatives):
    z, z_prime = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    terms = []
    for a, b in ((z, z_prime), (z_prime, z)):
        for i in range(9):
            similar = lambda other, i=i, a=a: math.exp(float(torch.cosine_similarity(a[i], other, dim=0)) / 0.1)
            rest = [similar(b[j]) for j in range(9)]
            rest += [similar(a[j]) for j in range(9) if j != i] if negatives == "all" else []
            terms.append(-math.log(similar(b[i]) / sum(rest)))
    assert contrastive_loss(z, z_prime, 0.1, negatives).item() == pytest.approx(sum(terms) / len(terms), rel=1e-13)


def test_the_loss_is_float32_under_autocast_and_groups_are_averaged():
    z, z_prime = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)).unbind()
    plain = contrastive_loss(z, z_prime, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = contrastive_loss(z, z_prime, 0.1)
        half = contrastive_loss(z.bfloat16(), z_prime.bfloat16(), 0.1)
    assert torch.equal(inside, plain)
    assert half.dtype == torch.float32
    groups = contrastive_loss(z.unflatten(1, (2, 4)), z_prime.unflatten(1, (2, 4)), 0.1)
    assert groups == pytest.approx(
        (contrastive_loss(z[:, :4], z_prime[:, :4], 0.1) + contrastive_loss(z[:, 4:], z_prime[:, 4:], 0.1)) / 2
    )


def test_identical_far_apart_views_have_no_loss():
    z = torch.eye(6)
    assert contrastive_loss(z, z, 0.01).item() < 1e-6
    assert contrastive_loss(torch.ones(6, 3), torch.ones(6, 3), 0.1).item() == pytest.approx(math.log(6), abs=1e-6)
    with pytest.raises(InputError, match="negatives"):
        contrastive_loss(z, z, 0.1, "some")


def grads_of(config, change=lambda net: None, norms=True):
    """(loss, gradients, buffers) of one step in float64 on fixed views."""
    net = Network(config, 10).double().train()
    if not norms:
        net.backbone.layers = nn.Sequential(*(m for m in net.backbone.layers if not isinstance(m, nn.BatchNorm1d)))
    change(net)
    views = torch.randn(2, 12, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    loss = backward(net, net, views, torch.arange(12) % 10, "cpu")
    return loss, {k: p.grad for k, p in net.named_parameters() if p.grad is not None}, dict(net.named_buffers())


def test_checkpointing_changes_no_bit_of_gradients_and_batch_norm_statistics():
    config = make_config("digits", head="mlp")
    plain = grads_of(config)
    again = grads_of(config, lambda net: recompute_blocks(net.backbone))
    assert torch.equal(plain[0], again[0])
    for mine, theirs in zip(plain[1:], again[1:], strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    with pytest.raises(InputError, match="no residual blocks"):
        recompute_blocks(nn.Linear(2, 2))


def test_gradient_caching_is_exact_without_batch_norm_and_another_thing_with_it():
    config = make_config("digits", head="linear", arch="mlp", planes=(24, 16))
    loss, whole, _ = grads_of(config, norms=False)
    for chunks in (2, 3):
        part_loss, parts, _ = grads_of(replace(config, chunks=chunks), norms=False)
        assert part_loss == pytest.approx(loss.item(), rel=1e-12)
        for key, grad in whole.items():
            torch.testing.assert_close(parts[key], grad, rtol=1e-10, atol=1e-14)
    different = grads_of(replace(config, chunks=3))[1]["backbone.layers.1.weight"]
    assert (different - grads_of(config)[1]["backbone.layers.1.weight"]).norm() > 1e-3 * different.norm()


def test_batch_norm_of_ranks_is_torchs_own_in_a_world_of_one():
    x = torch.randn(7, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = nn.BatchNorm2d(3).double()
    ours = parallel.SyncBatchNorm(theirs).double()
    out = ours(x)
    torch.testing.assert_close(out, theirs(x), rtol=1e-12, atol=1e-12)
    for name, value in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)


def test_synchronised_batch_norms_keep_the_activations_that_timms_hold(monkeypatch):
    net = timm.create_model("mobilenetv3_small_050", num_classes=0)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    net.train()(x)  # statistics that are not those of the start
    names, before = list(net.state_dict()), net.eval()(x)
    monkeypatch.setattr(parallel, "world", lambda: 2)
    ours = parallel.synchronise(net, "cpu", False).eval()
    assert any(isinstance(module, parallel.SyncBatchNorm) for module in ours.modules())
    assert list(ours.state_dict()) == names
    torch.testing.assert_close(ours(x), before, rtol=0, atol=0)
