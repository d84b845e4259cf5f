"""One rule for what a representation is: what the last linear map of a network's classifier takes, however it came."""

import pytest
import timm
import torch
from layouts import trained
from torch import nn
from torchvision.models import get_model

import collapse
from collapse.checkpoints import library
from collapse.models.backbones import make_backbone
from collapse.models.meta import on_meta
from collapse.recipes.config import make_config
from collapse.training.network import Network, save_encoder

TORCHVISION = ("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3",
               "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_large", "regnet_x_400mf", "resnet18", "resnext50_32x4d",
               "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vit_b_32")  # fmt: skip
TIMM = ("convnext_atto", "densenet121", "efficientnet_lite0", "mobilenetv3_small_050", "regnetx_002", "resnet18",
        "vit_tiny_patch16_224", "vgg11", "hardcorenas_a", "ghostnet_100", "efficientformer_l1", "levit_128s",
        "lcnet_050", "rexnet_100", "mixer_s32_224", "poolformer_s12", "dla46_c")  # fmt: skip
NAMES = [f"torchvision:{name}" for name in TORCHVISION] + [f"timm:{name}" for name in TIMM]


def whole(arch):
    """The library's own network, its classifier on it."""
    of, _, name = arch.partition(":")
    return timm.create_model(name) if of == "timm" else get_model(name, weights=None)


def taken(net, images):
    """What the last linear map of a network takes, or of SqueezeNet's convolution, averaged; of timm's, its word."""
    if hasattr(net, "forward_head"):
        return net.forward_head(net.forward_features(images), pre_logits=True)
    last = [m for m in net.modules() if isinstance(m, nn.Linear)] or [net.classifier[1]]
    seen = []
    hook = last[-1].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    net(images)
    hook.remove()
    return seen[0].mean((2, 3)) if seen[0].ndim == 4 else seen[0]


@pytest.mark.parametrize("arch", NAMES)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_network_has_one_width_trained_loaded_and_named(arch):
    full = on_meta(lambda: whole(arch)).eval().to("meta")
    side = 224 if "vit" in arch or "levit" in arch or "mixer" in arch or "former" in arch else 96
    images = torch.zeros(1, 3, side, side, device="meta")
    width = taken(full, images).shape
    for net in (on_meta(lambda: make_backbone(arch, side)), on_meta(lambda: library.make(arch.removeprefix("timm:")))):
        assert net.eval()(images).shape == width == (1, net.width)
        assert net.state_dict().keys() <= full.state_dict().keys()
    assert library.roots_of(arch.removeprefix("timm:"), full.state_dict()) == [""]


@pytest.mark.parametrize("arch", ["torchvision:mobilenet_v3_small", "torchvision:squeezenet1_1",
                                  "timm:mobilenetv3_small_050", "timm:convnext_atto"])  # fmt: skip
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_it_is_the_same_vector(tmp_path, monkeypatch, arch):
    torch.manual_seed(0)
    net, images = trained(whole(arch)), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = taken(net, images)
        torch.save(net.state_dict(), tmp_path / "theirs.pth")
        network = Network(make_config("digits", arch=arch, image_size=96, blocks=(), planes=(), head="none"), 2).eval()
        network.backbone.load_state_dict({k: net.state_dict()[k] for k in network.backbone.state_dict()})
        save_encoder(tmp_path / "ours.safetensors", network)
        monkeypatch.setattr(library, "_fetched", lambda *_: net)
        loaded = [collapse.load(tmp_path / "theirs.pth", arch=arch.removeprefix("timm:")),
                  collapse.load(tmp_path / "ours.safetensors"), collapse.load(arch), network.backbone]  # fmt: skip
        for encoder in loaded:
            torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-5)


def test_a_networks_own_change_of_pixels_is_in_the_preprocessing(tmp_path, monkeypatch):
    net = get_model("googlenet", weights=None, init_weights=False, transform_input=True).eval()
    monkeypatch.setattr(library, "_fetched", lambda *_: net)
    loaded, images = collapse.load("torchvision:googlenet"), torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        mine = loaded((images - torch.tensor(loaded.preprocess.mean)[:, None, None])
                      / torch.tensor(loaded.preprocess.std)[:, None, None])  # fmt: skip
        torch.testing.assert_close(mine, taken(net, (images - mean) / std), rtol=1e-4, atol=1e-5)
    torch.save(net.state_dict(), tmp_path / "x.pth")
    report = collapse.load(tmp_path / "x.pth").report
    assert report["keys"]["dropped_by"] == {"classifier": 2, "auxiliary classifier": 20}
