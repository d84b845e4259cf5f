"""The authors' script run from outside, and what the noise of batches leaves of the direction that a bias kills."""

import sys

import numpy as np
import official
import torch

from collapse.theory import BiasedViews, GaussianViews, MeanField, sgd

SCRIPT = """
import sys
import torch
x = torch.randn(10000, 16)
net = torch.nn.Linear(16, 16).cuda()
if __name__ == "__main__":
    for i in (9, 19):
        print("\\n iteration:", i, net.cuda().weight.detach().numpy()[0], sys.argv[1:])
"""


def test_the_script_runs_without_a_device_from_the_layer_that_its_seed_gives(tmp_path):
    path = tmp_path / "case_1.py"
    path.write_text(SCRIPT.replace(", sys.argv[1:]", ""))
    before = sys.argv, torch.Tensor.cuda, torch.nn.Module.cuda
    start, iterations, spectra = official.run(str(path), 1.5, 3)
    assert (sys.argv, torch.Tensor.cuda, torch.nn.Module.cuda) == before
    assert iterations.tolist() == [10, 20]
    np.testing.assert_allclose(spectra, np.stack([start[0, :16]] * 2), atol=1e-6)
    assert not np.allclose(official.run(str(path), 1.5, 4)[0], start)


def test_the_spectrum_is_that_of_a_thousand_embeddings_of_clean_data():
    W = np.diag(np.geomspace(1, 1e-6, 16))[None]
    found = np.log(official.seen(W)[0])
    np.testing.assert_allclose(found, 2 * np.log(np.geomspace(1, 1e-6, 16)), atol=0.3)
    assert official.seen(W, floor=1.0)[0, -1] > 0.9


def test_noise_leaves_of_the_dead_direction_what_sgd_does(monkeypatch):
    """Fifteen living directions at their stationary size, and b along the last: 16 runs, whose ln scatters by 2.2."""
    noise = official.noise(1.5)
    m = 0.145 / np.where(noise > 0, 14.0, 1.0)
    W = np.concatenate([np.diag(np.sqrt(m)), np.zeros((16, 1))], 1)
    W[15, 15], W[15, 16] = 1e-3, 0.5
    field = MeanField(np.eye(16), np.diag(noise**2), points=512, bias=True)
    predicted = np.log(official.noise_floor(field, W, 1.5))
    views = BiasedViews(GaussianViews(np.ones(16), noise))
    at = list(range(1000, 2001, 50))
    runs = sgd([np.repeat(W[None], 8, 0)], views, list(range(8)), official.Descent(steps=2000), at)[0]
    left = 2 * np.log(np.linalg.svd(runs[..., :16], compute_uv=False)[..., -1])
    assert abs(left.mean() - predicted) < 1
    assert predicted < np.log(m[15]) - 4
