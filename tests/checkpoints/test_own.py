"""A network of the user's own: FILE.py:NAME and PACKAGE.MODULE:NAME, with weights, in every command and from Python."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import collapse
from collapse import cli

CODE = """
import torch
from torch import nn
from layers import block

class Net(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.stem, self.norm = block(3, width), nn.BatchNorm2d(width)

    def forward(self, x):
        return self.norm(self.stem(x)).mean((2, 3))

class Tokens(Net):
    def forward(self, x):
        return self.norm(self.stem(x)).flatten(2).transpose(1, 2)

ready = Net(4)
number = 3
def build():
    return Net()
def broken():
    return undefined_name
def dictionary():
    return {}
"""
LAYERS = "from torch import nn\ndef block(a, b):\n    return nn.Conv2d(a, b, 3)\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's code, weights of the network within a larger state dict, and images."""
    for name in ("layers", "net", "inner", "inner.net"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "net.py").write_text(CODE)
    (tmp_path / "layers.py").write_text(LAYERS)
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for index in range(12):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / f"images/{index:02}.png")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("layers", "net", "inner", "inner.net"):
        sys.modules.pop(name, None)


@pytest.fixture
def net(folder):
    monkey = {}
    exec(compile(LAYERS.replace("from torch import nn", "from torch import nn"), "layers", "exec"), monkey)
    sys.modules["layers"] = type(sys)("layers")
    vars(sys.modules["layers"]).update(monkey)
    space = {}
    exec(compile(CODE, "net", "exec"), space)
    made = space["Net"]()
    with torch.no_grad():
        for tensor in made.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    state = {f"module.encoder.{name}": tensor for name, tensor in made.state_dict().items()}
    torch.save({"state_dict": {**state, "module.head.weight": torch.ones(2, 2)}, "epoch": 3}, folder / "w.pt")
    sys.modules.pop("layers")
    return made.eval()


def expected(net, folder):
    with torch.no_grad():
        pixels = [np.asarray(Image.open(path)) for path in sorted((folder / "images").iterdir())]
        return net(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255).numpy()


@pytest.mark.parametrize("source", ["net.py:build", "net.py:Net", "net:build", "inner.net:build"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_command_and_the_call_give_what_the_network_gives(folder, net, source, capsys):
    if source.startswith("inner"):
        (folder / "inner").mkdir()
        (folder / "inner/net.py").write_text(CODE)
    call = ["spectrum", source, "images", "--weights", "w.pt", "--json", "--workers", "0"]
    assert cli.main(call) == 0
    found = json.loads(capsys.readouterr().out)
    z = expected(net, folder)
    wanted = collapse.spectrum(z).singular_values
    np.testing.assert_allclose(found["singular_values"], wanted, rtol=1e-4, atol=1e-9)
    assert found["source"]["path"] == "w.pt"
    assert found["source"]["architecture"] == source
    assert found["source"]["branch"] == "state_dict.encoder"
    assert found["source"]["keys"]["loaded"] == 7
    assert found["source"]["keys"]["dropped"] == 1
    again = collapse.spectrum(source, "images", weights="w.pt", workers=0).to_dict()
    assert again["singular_values"].tolist() == found["singular_values"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_command_that_takes_a_checkpoint_takes_code(folder, net, capsys):
    code = ["net.py:build", "--weights", "w.pt"]
    assert cli.main(["inspect", *code, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["feature_dim"], document["sha256"] is None) == (6, False)
    assert cli.main(["embed", *code[:1], "images", *code[1:], "--out", "z.npy", "--workers", "0"]) == 0
    np.testing.assert_allclose(np.load("z.npy"), expected(net, folder), rtol=1e-4)
    assert cli.main(["spectrum", *code[:1], "images", *code[1:], "--layer", "all", "--workers", "0"]) == 0
    assert "stem" in capsys.readouterr().out
    assert cli.main(["diagnose", *code[:1], "images", *code[1:], "--workers", "0", "--views", "2", "--crop", "12"]) == 0


def test_a_module_without_weights_is_measured_with_a_warning(folder):
    with pytest.warns(collapse.CollapseWarning, match="no weights= are given"):
        net = collapse.load("net.py:ready")
    assert net.report["feature_dim"] == 4


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tokens_want_a_pool(folder):
    with pytest.raises(collapse.InputError, match="give pool=cls or pool=mean"):
        collapse.embed("net.py:Tokens", "images")
    mean, first = (collapse.embed("net.py:Tokens", "images", pool=pool).shape for pool in ("mean", "cls"))
    assert mean == first == (12, 6)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("net.py:nothing", "net.py has no nothing; it has .*build"),
        ("net.py:number", "is a int, expected a function"),
        ("net.py:dictionary", "gives a dict, expected a torch.nn.Module"),
        ("net.py:broken", "fails .NameError: name 'undefined_name' is not defined, at .*net.py:2"),
        ("gone.py:build", "gone.py: no such file"),
        ("bad.py:build", "bad.py:build: fails .SyntaxError"),
        ("leaves.py:build", "leaves.py:build: fails .SystemExit"),
        ("no.such.module:build", "no such file"),
    ],
)
def test_code_that_gives_no_network_is_one_line(folder, source, message):
    (folder / "bad.py").write_text("def build(:\n")
    (folder / "leaves.py").write_text("raise SystemExit(7)\n")
    with pytest.raises(collapse.InputError, match=message) as caught:
        collapse.load(source)
    assert "\n" not in str(caught.value)


def test_weights_fit_whole_or_not_at_all(folder, net):
    state = net.state_dict()
    cases = [
        ({**state, "stem.weight": torch.ones(6, 3, 5, 5)}, "1 of the network's 7 tensors are not there"),
        ({name: tensor for name, tensor in state.items() if name != "norm.bias"}, r"first norm.bias \(6,\)"),
        ({f"{at}.{n}": t + (at == "b") for at in "ab" for n, t in state.items()}, "2 networks in it fit, a, b"),
        ({"x": torch.ones(3)}, "7 of the network's 7"),
    ]
    for tree, message in cases:
        torch.save(tree, folder / "odd.pt")
        with pytest.raises(collapse.InputError, match=message):
            collapse.load("net.py:build", weights="odd.pt")
    torch.save(cases[2][0], folder / "odd.pt")
    b = collapse.load("net.py:build", weights="odd.pt", branch="b").state_dict()["backbone.norm.bias"]
    torch.testing.assert_close(b, state["norm.bias"] + 1)
    with pytest.raises(collapse.InputError, match="weights= are those of a network that"):
        collapse.load(folder / "w.pt", weights="odd.pt")
    with pytest.raises(collapse.InputError, match="heads= says how checkpoints of known layouts are read"):
        collapse.load("net.py:build", heads=3)


def test_a_file_with_such_a_name_is_a_file(folder):
    np.savez("net.npz", a=np.random.default_rng(0).standard_normal((50, 4)), b=np.ones(3))
    assert collapse.spectrum("net.npz:a").dim == 4
    torch.save(nn.Linear(2, 2).state_dict(), folder / "net.py:build")
    with pytest.raises(collapse.InputError, match="no known layout"):
        collapse.load("net.py:build")


def test_an_output_never_replaces_code_or_weights(folder, net, capsys):
    for name in ("net.py", "w.pt"):
        before = (folder / name).read_bytes()
        call = ["spectrum", "net.py:build", "images", "--weights", "w.pt", "--out", name, "--force"]
        assert cli.main(call) == 2
        assert "is the input" in capsys.readouterr().err
        assert (folder / name).read_bytes() == before
