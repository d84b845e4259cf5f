"""Reference spectra: each is what the command wrote, holds what its page says, and is a scale for other numbers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import collapse
from collapse import cli
from collapse.spectra.scale import ABOUT, FOLDER, headline, placed, references, share, verdict

PAGE = Path(__file__).parents[2] / "docs/references.md"


@pytest.mark.parametrize("name", sorted(ABOUT))
def test_each_reference_is_a_result_whose_numbers_follow_from_its_spectrum(name):
    document = json.loads((FOLDER / f"{name}.json").read_text())
    found = references(name)[name]
    assert found.dim == document["dim"] == len(document["singular_values"])
    for metric, value in document["metrics"].items():
        assert found.metrics()[metric] == pytest.approx(value, rel=1e-9, nan_ok=True), metric
    assert found.n == 4096 >= 2 * found.dim
    assert name == "resemblyzer-voices" or document["images"]["count"] == 4096  # its rows were embedded elsewhere
    assert found.l2_normalized
    assert found.singular_values.sum() == pytest.approx(1 - found.mean_cosine, rel=1e-3)  # trace, of unit rows
    assert {"dimensional-collapse", "numpy", "torch"} <= document["versions"].keys()


def test_a_reference_for_every_file_and_a_command_for_every_reference():
    assert {path.stem for path in FOLDER.iterdir()} == ABOUT.keys() == collapse.references().keys()
    page = re.sub(r"\\\n\s*", "", PAGE.read_text())
    for name, found in references().items():
        assert f"| `{name}` |" in page
        (line,) = (line for line in page.splitlines() if line.endswith(f"--out {name}.json"))
        wanted = [word for word in line.split()[1:] if word not in found.command]
        assert wanted == [], name  # the command on the page is the one that was run, but for --workers
        assert not re.search(r"/(home|tmp|work|root)\b", found.to_json())


def test_the_thirty_names_are_timms():
    import timm

    named = re.findall(r"`([\w.]+)`", PAGE.read_text().partition("## Thirty")[2])
    assert len(set(named) - {"timm"}) == 30
    assert set(named) <= set(timm.list_pretrained())


def flat(d=8, n=4000, alive=None, seed=0):
    rows = np.random.default_rng(seed).standard_normal((n, d))
    rows[:, alive or d :] = 0
    return collapse.spectrum(rows)


def test_where_a_number_lies_among_others():
    known = {"low": flat(20, alive=4), "mid": flat(20, alive=10), "high": flat(20)}
    shares = {name: share(s) for name, s in known.items()}
    assert shares["low"] == pytest.approx(0.2, abs=0.01)
    assert shares["high"] == pytest.approx(1, abs=0.01)
    assert placed(flat(8, alive=2), known) == (  # 2 of 8: between 4 and 10 of 20
        f"The effective rank is 25.0% of the width, between low ({shares['low']:.1%}) and mid ({shares['mid']:.1%}) of "
        "those given."
    )
    assert "below low (20.0%), the lowest of" in placed(flat(20, alive=3), known)
    assert f"at or above high ({shares['high']:.1%}), the highest of" in placed(known["high"], known)
    assert placed(flat(8)).endswith("of `collapse references`.")


def test_nothing_is_said_where_it_would_say_nothing():
    rows = np.random.default_rng(0).standard_normal((100, 8))
    assert placed(collapse.spectrum(rows[:8])) == ""  # 8 rows bound the rank
    assert placed(collapse.spectrum(rows, normalize=False)) == ""
    assert placed(collapse.spectrum(np.ones((100, 8)))) == ""
    assert placed(flat(), {"raw": collapse.spectrum(rows, normalize=False)}) == ""


def exactly(variances, n=400):
    """A spectrum of n rows whose covariance is diagonal with the variances given."""
    z = np.random.default_rng(0).standard_normal((n, len(variances)))
    z = np.linalg.qr(z - z.mean(0))[0] * np.sqrt(n - 1)
    return collapse.spectrum(z * np.sqrt(variances), normalize=False)


@pytest.mark.parametrize(
    ("variances", "colour", "words"),
    [
        (np.ones(20), "green", "No dimensional collapse: 0 of 20 lie below 1e-06"),
        ([1] * 19 + [1e-9], "amber", "Some dimensions are collapsed: 1 of 20"),
        ([1] * 10 + [1e-9] * 10, "amber", "Some dimensions are collapsed: 10 of 20"),
        ([1] * 9 + [1e-9] * 11, "red", "Dimensional collapse: 11 of 20"),
        ([1, 1] + [1e-9] * 18, "red", "Dimensional collapse: 18 of 20"),
        ([1, 0.5] + [1e-9] * 18, "red", "Complete collapse: effective rank 1.9 of 20"),
        ([1, 1, 1] + [1e-4] * 37, "amber", "No dimension is collapsed, but few carry the variance: 0 of 40"),
        ([1, 1, 1, 1] + [1e-4] * 36, "green", "No dimensional collapse: 0 of 40"),
    ],
)
def test_the_headline_has_its_lines_at_two_a_half_and_a_tenth(variances, colour, words):
    found = headline(exactly(np.array(variances)))
    assert found.colour == colour
    assert found.text.startswith(words)


def test_few_rows_are_said_in_the_verdict():
    few = "90 rows are few for 10 dimensions"
    for n, said in ((99, True), (100, False), (11, True)):
        assert ("are few for 10 dimensions" in verdict(exactly(np.ones(10), n))) == said, n
    assert few in verdict(exactly(np.ones(10), 90))
    assert headline(exactly(np.ones(10), 10)).text == "Cannot tell: 10 rows can show at most 9 of 10 directions."


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("z.npy", np.random.default_rng(0).standard_normal((500, 12)).astype(np.float32))
    return tmp_path


def test_the_command_compares_with_names_files_and_folders(here, capsys):
    assert cli.main(["spectrum", "z.npy", "--against", "resnet20-cifar10"]) == 0
    out, err = capsys.readouterr()
    known = references("resnet20-cifar10")["resnet20-cifar10"]
    assert f"at or above resnet20-cifar10 ({share(known):.1%})," in " ".join(out.split())
    line = next(line.split() for line in reversed(out.splitlines()) if line.startswith("resnet20-cifar10 "))
    assert line[1:4] == ["4096", "64", f"{known.effective_rank:.2f}"]
    assert "different numbers of rows" in err
    (here / "kept").mkdir()
    for name in ("one", "two"):
        assert cli.main(["spectrum", "z.npy", "--out", f"kept/{name}.json"]) == 0
    capsys.readouterr()
    assert cli.main(["spectrum", "z.npy", "--against", "kept", "kept/one.json", "--plot", "all.png"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[-4:]] == ["this", "one", "two", "z.npy"]
    assert (here / "all.png").stat().st_size > 1000


def test_the_command_lists_references_lowest_first(here, capsys):
    assert cli.main(["references"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    rows = [line.split() for line in out.splitlines()[1 : len(ABOUT) + 1]]
    assert sorted(ABOUT) == sorted(row[0] for row in rows)
    shares = [float(row[4].removesuffix("%")) for row in rows]
    assert shares == sorted(shares)
    assert cli.main(["references", "resnet20-cifar10", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["effective_rank"] == references("resnet20-cifar10")["resnet20-cifar10"].effective_rank


def test_what_is_no_reference_is_refused_with_what_there_is(here, capsys):
    (here / "empty").mkdir()
    (here / "other.json").write_text("{}")
    (here / "resnet20-cifar10").mkdir()
    for place, words in (
        ("resnet", "no reference and no result; there are all-minilm"),
        ("empty", "holds no result"),
        ("other.json", "schema"),
        ("resnet20-cifar10", "is a reference and a file here; give ./resnet20-cifar10"),
    ):
        assert cli.main(["spectrum", "z.npy", "--against", place]) == 2
        err = capsys.readouterr().err
        assert words in err
        assert len(err.splitlines()) == 1
    with pytest.raises(collapse.InputError, match="got a int"):
        references(3)
