"""The shape of the package: imports go one way, importing is quick, result files are whole or absent."""

import ast
import importlib
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import collapse
from collapse import InputError
from collapse.diagnosis import Block
from collapse.metrics.attribution import Attribution
from collapse.models.encoder import Module
from collapse.moved import MOVED, RENAMED
from collapse.results import change_scores, change_text, load_result, r_squared, save_result, save_text, strict, to_json
from collapse.results.outputs import atomic_write

PACKAGE = Path(collapse.__file__).parent
ROOT = Path(__file__).parents[2]

# A module may import those of the layers before its own, and others of its own only within a package, without circles;
# imports inside functions and for type checkers count.  Only the package itself names what it loads on first use.
LAYERS = (
    {"collapse.errors", "collapse.moved"},
    {"collapse"},
    {"collapse.arguments"},
    {"collapse.files", "collapse.metrics"},
    {"collapse.results"},
    {"collapse.data", "collapse.plots", "collapse.theory"},
    {"collapse.experiment", "collapse.models", "collapse.recipes"},
    {"collapse.checkpoints"},
    {"collapse.encoders"},
    {"collapse.spectra"},
    {"collapse.diagnosis"},
    {"collapse.monitor", "collapse.training"},
    {"collapse.lightning", "collapse.probes"},
    {"collapse.commands"},
    {"collapse.cli"},
    {"collapse.__main__"},
)  # fmt: skip

# What works on embeddings needs no checkpoint, not even through the modules that it imports.
WITHOUT_CHECKPOINTS = (
    *(f"collapse.diagnosis.{name}" for name in ("layers", "page", "result", "views", "wording")),
    "collapse.encoders.passes",
    "collapse.recipes.views",
    "collapse.spectra.covariance",
)


def imports(path):
    """The modules of this package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "collapse":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                file = PACKAGE.joinpath(*name.split(".")[1:])
                yield name if file.with_suffix(".py").exists() or (file / "__init__.py").exists() else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "collapse")


def layer(module):
    top = ".".join(module.split(".")[:2])
    found = [index for index, names in enumerate(LAYERS) if top in names]
    assert found, f"{module} has no layer yet"
    return found[0]


@pytest.fixture(scope="module")
def edges():
    """The modules that each module imports; the package itself, none."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(["collapse", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
        found[module] = {name for name in imports(path) if name != module and module != "collapse"}
    return found


def test_imports_go_one_way(edges):
    for module, names in edges.items():
        for name in names:
            inside = layer(name) == layer(module) and module.split(".")[1] == name.split(".")[1]
            assert inside or layer(name) < layer(module), f"{module} imports {name}"
    inner = {m: {n for n in names if n in edges} for m, names in edges.items() if m.count(".") > 1}
    while inner:  # no circle: there is always a module that imports none of the rest
        free = [module for module, names in inner.items() if not names & inner.keys()]
        assert free, f"circle among {sorted(inner)}"
        for module in free:
            del inner[module]


def reached(edges, module):
    """The rooms of the modules that a module imports, and of those that they import."""
    seen, ahead = set(), [module]
    while ahead:
        new = edges[ahead.pop()] - seen
        seen |= new
        ahead += new
    return {".".join(name.split(".")[:2]) for name in seen}


def test_what_works_on_embeddings_needs_no_checkpoint(edges):
    named = {name for module in edges if module.startswith("collapse.diagnosis") for name in edges[module]}
    assert not {name for name in named if name.startswith("collapse.checkpoints")}
    assert "collapse.checkpoints" in reached(edges, "collapse.diagnosis.measuring")  # a call that takes a path
    for module in WITHOUT_CHECKPOINTS:
        assert not reached(edges, module) & {"collapse.checkpoints", "collapse.training"}, module


def test_the_rooms_are_few():
    assert len([path for path in PACKAGE.iterdir() if path.suffix == ".py"]) <= 10


def test_old_names_of_modules_are_found_for_one_release():
    for name, homes in MOVED.items():
        sys.modules.pop(name, None)
        with pytest.warns(DeprecationWarning, match=homes[0]):
            old = importlib.import_module(name)
        today = [importlib.import_module(home) for home in homes]
        public = [
            n for n, value in vars(today[0]).items() if getattr(value, "__module__", "") == homes[0] and n[0] != "_"
        ]
        assert public
        assert all(getattr(old, n) is getattr(today[0], n) for n in public if name != "collapse.compare")
        for home in today:
            assert all(getattr(old, n) is getattr(home, new) for n, new in RENAMED.get(home.__name__, {}).items())


def test_old_names_of_functions_and_attributes_are_found_for_one_release():
    modules = [(module, old, new) for module, names in RENAMED.items() for old, new in names.items()]
    for name, old, new in modules:
        module = importlib.import_module(name)
        with pytest.warns(DeprecationWarning, match=f"{name}.{old} is {new} now"):
            assert getattr(module, old) is getattr(module, new)
        with pytest.raises(AttributeError, match="nothing"):
            _ = module.nothing
    attribution = Attribution(
        np.eye(2), np.array(["alive", "implicit"]), np.ones(2), np.ones(2), np.array([False, True])
    )
    diagnosis = collapse.Diagnosis([Block(None, attribution, np.ones(2), 1.0)], {"views": 2}, "")
    for thing, old, new in (
        (attribution, "thin", "undecided"),
        (diagnosis, "about", "provenance"),
        (diagnosis.blocks[0], "found", "attribution"),
        (collapse.Accuracy(4, 3, 2), "about", "provenance"),
        (Module(torch.nn.Linear(2, 2)).layer("representation"), "taps", "hooks"),
    ):
        with pytest.warns(DeprecationWarning, match=f"{type(thing).__name__}.{old} is {new} now"):
            assert getattr(thing, old) is getattr(thing, new)
    with pytest.warns(DeprecationWarning, match="judged is collapsed now"):
        assert attribution.judged().tolist() == [False, True]


def test_importing_the_package_loads_nothing_heavy():
    program = "import sys, collapse; heavy = {'torch', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules); print(heavy)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "set()"


def test_every_public_name_is_there_and_no_other():
    for name in collapse.__all__:
        assert getattr(collapse, name) is not None
        assert name in dir(collapse)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = collapse.nothing
    assert issubclass(InputError, ValueError)


def test_a_result_holds_how_it_was_made(tmp_path):
    path = tmp_path / "result.npz"
    save_result(path, {"config": {"seed": 3}}, a=np.arange(3.0))
    meta, arrays = load_result(str(path))
    assert meta["config"] == {"seed": 3}
    assert {"schema", "command", "versions"} <= meta.keys()
    assert "numpy" in meta["versions"]
    np.testing.assert_array_equal(arrays["a"], [0, 1, 2])
    with pytest.raises(InputError, match="no such result"):
        load_result(tmp_path / "absent.npz")


def _write_half(path, error):
    with atomic_write(path) as partial:
        partial.write_text("half")
        raise error


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    save_text(path, "old")
    for error, expected in ((RuntimeError(), RuntimeError), (OSError(28, "No space left on device"), InputError)):
        with pytest.raises(expected):
            _write_half(path, error)
        assert path.read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(InputError, match="folder"):
        save_text(path / "below/b.txt", "")


def test_json_is_strict():
    value = {"a": np.array([1.0, np.nan]), "b": (np.int64(3), float("inf")), 5: Path("x/y")}
    assert json.loads(to_json(value)) == {"a": [1.0, None], "b": [3, None], "5": "x/y"}
    assert strict(np.float32(2)) == 2.0


def test_r_squared_is_one_for_the_truth_and_zero_for_the_mean():
    x = np.exp(np.array([1.0, 2.0, 4.0]))
    assert r_squared(x, x) == 1
    assert r_squared(x, np.full(3, np.exp(7 / 3))) == pytest.approx(0, abs=1e-12)
    with pytest.raises(InputError, match="positive"):
        r_squared(x, np.zeros(3))


def test_the_change_of_a_prediction_is_scored_beside_the_noise_of_the_runs():
    rng = np.random.default_rng(0)
    change, noise = rng.normal(size=(200, 6)), 0.5 * rng.normal(size=(200, 4, 6))
    start = np.exp(5 * rng.normal(size=6))
    runs = np.exp(np.concatenate([np.zeros((1, 4, 6)), change[:, None] + noise])) * start
    truth = np.exp(np.concatenate([np.zeros((1, 6)), change])) * start
    found = change_scores(runs, truth)
    # Of the truth, what is left is the noise of the mean: 0.25 / 4; of a run, its own and that of the mean of three.
    assert found["change"] == pytest.approx(1 - 0.0625 / 1.0625, abs=0.01)
    assert found["rms"] == pytest.approx(0.25, rel=0.05)
    assert found["noise"] == pytest.approx(found["rms"], rel=0.05)
    assert found["ceiling"] == pytest.approx([1 - (0.25 + 0.25 / 3) / 1.25] * 4, abs=0.04)
    # What says that nothing moves explains nothing, however wide the start is spread.
    assert change_scores(runs, np.tile(start, (201, 1)))["change"] <= 0
    alone = change_scores(runs[:, :1], truth)
    assert (alone["ceiling"], alone["noise"]) == ([], None)
    assert change_text(alone).endswith("one run by the others not known")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of sdist and wheel, the wheel built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    call = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, PACKAGE.parent]
    result = subprocess.run(call, capture_output=True, text=True, cwd=folder, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_wheel_and_sdist_are_whole_and_the_index_would_take_them(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    call = [sys.executable, "-m", "twine", "check", "--strict", wheel, sdist]
    result = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout
    mine = {str(path.relative_to(PACKAGE.parent)) for path in PACKAGE.rglob("*")
            if path.is_file() and path.suffix != ".pyc"}  # fmt: skip
    assert {"collapse/py.typed", "collapse/plots/style.mplstyle", "collapse/recipes/presets/digits.json"} < mine
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == mine
    assert sdist.stat().st_size < 2 << 20  # figures and results stay in the repository
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert (
        mine | {"README.md", "LICENSE", "tests/package/test_api.py", "experiments/figure3.py", "docs/index.md"} < names
    )


def test_the_installed_package_runs_from_any_folder(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    np.save(tmp_path / "z.npy", np.random.default_rng(0).standard_normal((50, 4)))
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    run = lambda *words: subprocess.run([sys.executable, "-m", "collapse", *words], env=env, cwd=tmp_path,
                                        capture_output=True, text=True, timeout=120)  # fmt: skip
    assert run("--version").stdout == f"collapse {collapse.__version__}\n"
    assert run("spectrum", "z.npy", "--plot", "z.png").returncode == 0
    assert (tmp_path / "z.png").exists()
    assert "digits" in run("train", "--help").stdout


def test_what_mutants_are_tested_by_is_there():
    """A test that is renamed would end `make mutants` without a word of which."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    chosen = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutmut"]
    tests = [name.removeprefix("--deselect=") for key in chosen if key.startswith("pytest") for name in chosen[key]]
    assert all((ROOT / path).exists() for path in chosen["source_paths"])
    for name in tests:
        path, _, function = name.partition("::")
        assert not function or f"def {function}(" in (ROOT / path).read_text(), name
        assert (ROOT / path).exists(), name


def test_an_error_is_one_line_that_ends():
    text = str(InputError("a\nb\x00\x1b[31m: \u2028" + "c" * 20_000 + " the end"))
    assert len(text.splitlines()) == 1
    assert text.isprintable()
    assert text.startswith(r"a\nb\x00\x1b[31m: \u2028cc")
    assert text.endswith("c the end")
    assert len(text) <= 5000
    assert str(InputError("/a b/ü: no such file")) == "/a b/ü: no such file"
