"""Checkpoints of torchvision and in the layouts of other projects: strictly loaded, or refused with a reason."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models as tv

import collapse
from collapse import InputError
from collapse.checkpoints import load
from collapse.models.resnet import ResNet, ResNetShape


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def representation(net, images):
    net.fc = nn.Identity()
    with torch.no_grad():
        return net.eval()(images)


def trained(name, seed=0):
    torch.manual_seed(seed)
    net = tv.get_model(name, weights=None)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "wide_resnet50_2", "resnext50_32x4d"])
def test_torchvisions_networks_give_torchvisions_features(tmp_path, images, name):
    net = trained(name)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    loaded = collapse.load(tmp_path / "net.pth")
    assert not loaded.training
    assert loaded.report["architecture"] == name
    assert loaded.report["keys"]["unknown"] == 0
    assert loaded.report["keys"]["dropped_by"] == {"classifier": 2}
    assert loaded.report["keys"]["loaded"] == len(net.state_dict()) - 2
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), representation(net, images), rtol=1e-5, atol=1e-6)


def layouts(tensors):
    """The same resnet18 as other projects keep it; (tree, branch, architecture's other tensors)."""
    two = {key: value + 1 for key, value in tensors.items()}
    put = lambda prefix, state: {prefix + key: value for key, value in state.items()}
    training = {"optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}}, "epoch": 3, "arch": "resnet18"}
    mlp = {"0.weight": torch.randn(512, 512), "2.weight": torch.randn(128, 512), "2.bias": torch.randn(128)}
    return {
        "moco": (
            {
                "state_dict": put("module.encoder_q.", tensors | put("fc.", mlp))
                | put("module.encoder_k.", two | put("fc.", mlp))
                | {"module.queue": torch.ones(128, 4), "module.queue_ptr": torch.ones(1)},
                **training,
            },
            "state_dict.encoder_q",
        ),
        "dino": ({"student": put("module.backbone.", two), "teacher": put("backbone.", tensors)}, "teacher.backbone"),
        "compiled": ({"model": put("_orig_mod.", tensors) | {"_orig_mod.fc.bias": torch.ones(5)}}, "model"),
        "solo-learn": (
            {
                "state_dict": put("backbone.", tensors)
                | put("projector.", mlp)
                | {"classifier.weight": torch.ones(3, 2)}
            },
            "state_dict.backbone",
        ),
        "byol": (
            {
                "online_network.encoder": tensors,
                "target_network.encoder": two,
                "predictor": {"0.weight": torch.ones(2)},
            },
            "online_network.encoder",
        ),
    }


@pytest.mark.parametrize("layout", ["moco", "dino", "compiled", "solo-learn", "byol"])
def test_the_branch_that_its_authors_evaluate_is_taken(tmp_path, images, layout):
    net = trained("resnet18")
    tensors = {key: value for key, value in net.state_dict().items() if not key.startswith("fc.")}
    tree, branch = layouts(tensors)[layout]
    torch.save(tree, tmp_path / "x.pth.tar")
    loaded = load(tmp_path / "x.pth.tar")
    assert loaded.report["branch"] == branch
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), representation(net, images), rtol=1e-5, atol=1e-6)
    if layout in ("moco", "solo-learn"):
        assert loaded.report["projector"]["dims"] == [512, 512, 128]
        with torch.no_grad():
            assert loaded.layer("projector")(images).shape == (2, 128)
    else:
        with pytest.raises(InputError, match="no projector"):
            loaded.layer("projector")


def test_two_encoders_that_nothing_tells_apart_are_an_error_that_lists_them(tmp_path):
    tensors = trained("resnet18").state_dict()
    torch.save({"a": tensors, "b": {key: value + 1 for key, value in tensors.items()}}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"2 encoders, a, b; choose one with branch="):
        load(tmp_path / "x.pth")
    assert load(tmp_path / "x.pth", branch="b").report["branches_left"] == ["a"]
    with pytest.raises(InputError, match="no encoder at 'c'"):
        load(tmp_path / "x.pth", branch="c")


def damaged(tensors):
    """(what the message says, the damaged state dict)"""
    without = lambda *keys: {k: v for k, v in tensors.items() if not k.startswith(keys)}
    yield "missing, first 'layer3.1.conv2.weight'", without("layer3.1.conv2.weight")
    yield "without a gap", without("layer3.")
    yield "is the file whole", without("layer4.")
    yield "first 'bn1.running_mean'", without("bn1.running_mean")
    yield "'layer2.0.conv2.weight' is", {**tensors, "layer2.0.conv2.weight": torch.zeros(128, 128, 1, 1)}
    yield "first 'surprise.weight'", {**tensors, "surprise.weight": torch.zeros(2)}
    yield "NaN", {**tensors, "bn1.weight": torch.full((64,), float("nan"))}
    yield "no known layout", {"encoder.w": torch.zeros(3), "b": torch.zeros(2)}
    yield "no known layout: no tensors", {"epoch": 3}
    yield "5 x 5", {**tensors, "conv1.weight": torch.zeros(64, 3, 5, 5)}
    yield "larger than what the file stores", {**tensors, "bn1.bias": torch.zeros(1).expand(1 << 40)}


def test_a_partly_fitting_file_is_never_partly_loaded(tmp_path):
    tensors = trained("resnet18").state_dict()
    for message, state in damaged(tensors):
        torch.save(state, tmp_path / "x.pth")
        with pytest.raises(InputError, match=message) as caught:
            load(tmp_path / "x.pth")
        assert "x.pth" in str(caught.value)
        assert "\n" not in str(caught.value)
    torch.save({**tensors, "surprise.weight": torch.zeros(2)}, tmp_path / "x.pth")
    assert load(tmp_path / "x.pth", allow_unknown=True).report["keys"]["unknown"] == 1


def test_an_architecture_that_the_file_is_not_is_refused(tmp_path, resnet18):
    with pytest.raises(InputError, match="holds resnet18, not resnet50"):
        load(resnet18, arch="resnet50")
    assert load(resnet18, arch="resnet18").report["architecture"] == "resnet18"


def test_preprocessing_comes_from_the_caller_else_the_file_else_the_stem(tmp_path, resnet18):
    assert load(resnet18).report["preprocessing"]["crop"] == 224
    own = load(resnet18, resize=40, crop=32, mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0), interpolation="bicubic")
    assert own.report["preprocessing"] == {
        "resize": 40,
        "crop": 32,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (1.0, 1.0, 1.0),
    }
    assert load(resnet18, no_normalize=True).preprocess.mean is None
    assert any("assumed" in note for note in load(resnet18).report["warnings"])


def test_untrained_statistics_are_said(tmp_path, resnet18):
    torch.save(tv.resnet18().state_dict(), tmp_path / "new.pth")
    assert any("untrained" in note for note in load(tmp_path / "new.pth").report["warnings"])
    assert not any("untrained" in note for note in load(resnet18).report["warnings"])


def test_layers_are_found_by_name(tmp_path, resnet18, images):
    net = load(resnet18)
    with torch.no_grad():
        last = net.layer("layer4")(images)
        torch.testing.assert_close(last, net(images))
        assert net.layer("layer2.0")(images).shape == (2, 128)
    with pytest.raises(InputError, match="no 'layer9'; there are representation"):
        net.layer("layer9")


def test_option_a_shortcuts_have_no_weights(tmp_path, images):
    shape = ResNetShape((3, 3, 3), (16, 32, 64), stem=3, stem_planes=16, pad_shortcut=True)
    torch.manual_seed(0)
    net = ResNet(shape)
    state = {f"module.{key}": value for key, value in net.state_dict().items() if "num_batches" not in key}
    torch.save({"state_dict": state | {"module.linear.weight": torch.ones(10, 64)}}, tmp_path / "x.th")
    loaded = load(tmp_path / "x.th")
    assert loaded.report["architecture"] == "resnet20, 3x3 stem"
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), net.eval()(images))


def test_a_real_cifar_network_classifies_cifar(shared):
    """Published: 91.7 and 92.6 % on lossless images. These are strongly compressed JPEGs, which cost 12 points (as they
    do with an independent implementation); three standard deviations on 1,000 images are 4 points."""
    from collapse.data.batches import pixel_batches
    from collapse.data.images import Images
    from collapse.encoders.passes import embed
    from collapse.files.containers import read

    images = Images(shared / "data/cifar10.zip/cifar10/val")
    images = images.some(range(0, len(images), 10))
    classes = sorted({name.split("/")[-2] for name in images.names})
    labels = np.array([classes.index(name.split("/")[-2]) for name in images.names])
    for name in ("resnet20-12fca82f.th", "resnet32-d509ac18.th"):
        path = shared / "checkpoints" / name
        net = load(path)
        r = torch.cat(list(embed(net, pixel_batches(images, net.preprocess, 250), net.preprocess)))
        state = read(path).tree["state_dict"]
        scores = r @ state["module.linear.weight"].T + state["module.linear.bias"]
        assert np.mean(scores.argmax(1).numpy() == labels) > 0.75


def test_the_report_is_plain_data(resnet18):
    report = load(resnet18).report
    assert json.loads(json.dumps(report))["feature_dim"] == 512
    assert len(report["sha256"]) == 64
