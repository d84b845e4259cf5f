"""A gate: metrics against bounds, in Python and as exit code 3; and the mean cosine, against all pairs."""

import json

import numpy as np
import pytest

import collapse
from collapse import cli, metrics


@pytest.fixture
def rows(tmp_path):
    z = np.random.default_rng(0).standard_normal((300, 12)) + 0.5
    np.save(tmp_path / "z.npy", z)
    return tmp_path / "z.npy"


def all_pairs(z):
    unit = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-300)
    products = unit @ unit.T
    return (products.sum() - np.trace(products)) / (len(z) * (len(z) - 1))


@pytest.mark.parametrize("method", ["covariance", "qr"])
@pytest.mark.parametrize("shift", [0.0, 0.5, 30.0])
def test_the_mean_cosine_is_that_of_all_pairs(method, shift):
    z = np.random.default_rng(1).standard_normal((257, 9)) + shift
    z[3] = 0
    with pytest.warns(collapse.CollapseWarning, match="1 of 257 rows are zero"):
        found = collapse.spectrum(z, method=method)
    assert found.mean_cosine == pytest.approx(all_pairs(z), abs=1e-13)


def test_the_mean_cosine_reaches_both_ends():
    assert collapse.spectrum(np.ones((50, 4))).mean_cosine == pytest.approx(1, abs=1e-12)
    simplex = np.vstack([np.eye(4) - 0.25])  # unit rows as far apart as four can be
    assert metrics.mean_cosine(**_traces(simplex)) == pytest.approx(-1 / 3, abs=1e-12)


def _traces(z):
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    matrices = {"of_covariance": np.cov(unit.T), "moments": unit.T @ unit / len(z)}
    return {name: np.linalg.eigvalsh(matrix).clip(0) for name, matrix in matrices.items()}


def test_it_is_undefined_for_rows_of_any_length(rows):
    assert np.isnan(collapse.spectrum(rows, normalize=False).mean_cosine)


def test_a_gate_raises_where_a_metric_lies_beyond(rows):
    found = collapse.spectrum(rows)
    rank = found.effective_rank
    assert found.gate({"effective_rank": rank}, {"effective_rank": rank}) is None
    for under, over in [({"effective_rank": rank + 1e-9}, {}), ({}, {"effective_rank": rank - 1e-9})]:
        with pytest.raises(collapse.GateError, match="effective_rank = "):
            found.gate(under, over)
    with pytest.raises(collapse.GateError, match="alpha is undefined"):
        found.gate({"alpha": -1e9})
    with pytest.raises(collapse.InputError, match="no metric 'efective_rank'; did you mean effective_rank"):
        found.gate({"efective_rank": 1})


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_command_ends_with_3_and_one_line_once_all_is_written(rows, tmp_path, capsys):
    call = ["spectrum", str(rows), "--json", "--out", str(tmp_path / "z.json"), "--plot", str(tmp_path / "z.png")]
    gates = ["--fail-under", "effective_rank=11.9", "--fail-over", "mean_cosine=0.01", "--fail-under", "rankme=1"]
    assert cli.main([*call, *gates]) == 3
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((tmp_path / "z.json").read_text())
    assert (tmp_path / "z.png").exists()
    *wrote, line = (line for line in err.splitlines() if not line.startswith("warning"))
    assert wrote == [f"wrote {tmp_path / name}" for name in ("z.json", "z.png")]
    assert line.startswith("collapse: z.npy: not passed: effective_rank = ")
    assert "mean_cosine = 0." in line
    assert "rankme" not in line
    assert cli.main(["spectrum", str(rows), "--fail-under", "effective_rank=2", "--fail-over", "mean_cosine=0.95"]) == 0


@pytest.mark.parametrize(
    ("gate", "message"),
    [("efective_rank=1", "did you mean effective_rank?"), ("rankme", "'rankme' is not NAME=VALUE"),
     ("rankme=much", "is not NAME=VALUE"), ("rankme=nan", "is not NAME=VALUE"), ("=1", "no metric ''; there are")],
)  # fmt: skip
def test_a_gate_that_is_none_is_one_line(rows, capsys, gate, message):
    assert cli.main(["spectrum", str(rows), "--fail-over", gate]) == 2
    assert message in capsys.readouterr().err
