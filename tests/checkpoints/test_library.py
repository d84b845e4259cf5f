"""Networks of timm and torchvision by their tensors alone: the same function, or refused by name; --arch decides."""

import pytest
import timm
import torch
from layouts import Tree, mlp, other, put, trained
from torch import nn
from torchvision.models import get_model

import collapse
from collapse import InputError
from collapse.checkpoints import library

IDENTIFIED = """
    convnext_atto convnextv2_atto crossvit_tiny_240 cspresnet50 deit_tiny_distilled_patch16_224 dla46_c
    edgenext_xx_small efficientformer_l1
    efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 gcvit_xxtiny ghostnetv2_100
    hardcorenas_a hgnetv2_b0 hiera_tiny_224 lcnet_050 levit_128s mambaout_femto mixer_s32_224 mnasnet_small
    mobilenetv1_100 mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small mobileone_s0 mobilevit_xxs
    mobilevitv2_050 pit_ti_224 pvt_v2_b0 regnetx_002 regnety_002 repghostnet_050 repvit_m0_9 resnet10t resnet18d
    rexnet_100 semnasnet_050 seresnet18 shvit_s1 spnasnet_100 starnet_s1 swiftformer_xs tinynet_e tiny_vit_5m_224
    vit_relpos_small_patch16_224 vit_tiny_patch16_224 test_byobnet test_convnext test_convnext2 test_convnext3
    test_efficientnet test_mambaout test_nfnet test_resnet test_vit
    torchvision:mnasnet0_5 torchvision:mobilenet_v2 torchvision:mobilenet_v3_small torchvision:regnet_y_400mf
    torchvision:resnet18 torchvision:shufflenet_v2_x0_5 torchvision:squeezenet1_1
""".split()  # noqa: SIM905
AMBIGUOUS = ["nest_tiny", "tf_efficientnet_lite0", "test_efficientnet_gn", "xcit_nano_12_p16_224"]


def written(tmp_path, name):
    """(a state dict of the library's own network, its images, and what its last linear map takes)."""
    torch.manual_seed(0)
    if name.startswith("torchvision:"):
        net = trained(get_model(name.partition(":")[2], weights=None))
        torch.save(net.state_dict(), tmp_path / "x.pth")
        net, side = library.make(name).eval(), 224
        state = torch.load(tmp_path / "x.pth")
        for key in state.keys() - net.state_dict().keys():
            del state[key]
        net.load_state_dict(state)
    else:
        net = trained(timm.create_model(name))
        torch.save(net.state_dict(), tmp_path / "x.pth")
        net.reset_classifier(0)
        side = net.pretrained_cfg["input_size"][-1]
    return net, torch.randn(1, 3, side, side)


def same(loaded, net, images):
    with torch.no_grad():
        expected = net(images)
        torch.testing.assert_close(loaded(images), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize("name", IDENTIFIED)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_bare_state_dict_is_the_same_function(tmp_path, name):
    net, images = written(tmp_path, name)
    same(collapse.load(tmp_path / "x.pth"), net, images)


@pytest.mark.parametrize("name", AMBIGUOUS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_what_has_the_tensors_of_several_is_asked_for(tmp_path, name):
    net, images = written(tmp_path, name)
    with pytest.raises(InputError, match=r"networks of timm and torchvision have its tensors, .*; give arch="):
        collapse.load(tmp_path / "x.pth")
    loaded = collapse.load(tmp_path / "x.pth", arch=name)
    same(loaded, net, images)
    assert loaded.report["architecture"] == name


def test_arch_decides_within_a_family_too(tmp_path):
    net = trained(timm.create_model("resnetblur18", num_classes=0))
    torch.save(net.state_dict(), tmp_path / "x.pth")
    images = torch.randn(2, 3, 64, 64)
    same(collapse.load(tmp_path / "x.pth", arch="resnetblur18"), net, images)
    assert collapse.load(tmp_path / "x.pth").report["architecture"] == "resnet18"


def test_flags_that_a_librarys_network_would_not_hear_are_refused(tmp_path):
    torch.save(library.make("test_vit").state_dict(), tmp_path / "x.pth")
    with pytest.raises(InputError, match="heads=: test_vit has its own"):
        collapse.load(tmp_path / "x.pth", arch="test_vit", heads=4)


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v3_small"])
def test_the_children_of_a_network_in_a_row(tmp_path, name):
    torch.manual_seed(0)
    row, head, images = nn.Sequential(*list(get_model(name).children())[:-1]), mlp(3, 4), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        width = trained(row)(images).flatten(1).shape[1]
    head = mlp(width, 8, 4)
    state = Tree(backbone=row, projection_head=Tree(layers=head)).state_dict()
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    for known in ({}, {"arch": f"torchvision:{name}"}):
        net = collapse.load(tmp_path / "x.ckpt", **known)
        same(net, lambda x: row(x).flatten(1), images)
        assert net.report["projector"]["dims"] == [width, 8, 4]


def test_children_that_give_a_map_are_refused(tmp_path):
    row = nn.Sequential(*list(get_model("mobilenet_v2").children())[:-1])
    torch.save(row.state_dict(), tmp_path / "x.pth")
    with pytest.raises(InputError, match="children in a row give a map and no vector"):
        collapse.load(tmp_path / "x.pth")


def test_mocos_projector_in_place_of_a_classifier(tmp_path):
    torch.manual_seed(0)
    net = trained(library.make("torchvision:mobilenet_v2"))
    head = mlp(1280, 16, 8)
    state = net.state_dict() | put("classifier.", head.state_dict())
    both = put("module.encoder_q.", state) | put("module.encoder_k.", other(state)) | {"module.queue": torch.ones(8, 4)}
    torch.save({"arch": "mobilenet_v2", "state_dict": both}, tmp_path / "x.pth.tar")
    loaded, images = collapse.load(tmp_path / "x.pth.tar"), torch.randn(2, 3, 64, 64)
    assert loaded.report["projector"] == {"dims": [1280, 16, 8], "prefix": "state_dict.encoder_q.classifier."}
    same(loaded.layer("projector"), lambda x: head(net(x)), images)
