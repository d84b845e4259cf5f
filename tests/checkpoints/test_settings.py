"""Values of configs and flags, which may be anything: used if they can be, else refused by file, key and value."""

import argparse
import json

import pytest
import timm
import torch
from layouts import Network, put, trained
from layouts_transformers import SMALL, vit
from timm.layers import SwiGLUPacked

import collapse
from collapse import InputError

HUGE = 10**400
WRONG_STATISTICS = [0, [0.5, 0.5], [0.5, 0.5, "a"], [True, True, True], [0.5, 0.5, None], [0.5, 0.5, float("nan")],
                    [0.5, HUGE, 0.5], [0.5, 0.5, float("inf")], {"r": 1}, "half"]  # fmt: skip
WRONG_STDS = [*WRONG_STATISTICS, [0.2, 0, 0.2], [0.2, -0.2, 0.2], [58.4, 57.1, 57.4]]
WRONG_SIDES = [0, -1, 1 << 20, HUGE, 1.5, True, [224, 448], [1, 2, 3], {"height": 32, "width": 128}, {}, "224"]


@pytest.fixture
def folder(tmp_path):
    """A folder of a transformer; its configs are to be written."""
    torch.save(vit().state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"layer_norm_eps": 1e-6}))
    return tmp_path


def refused(folder, file, key, config, **known):
    (folder / file).write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        collapse.load(folder, **known)
    text = str(caught.value)
    assert file in text
    assert key in text
    assert len(text) < len(str(folder)) + 330
    assert text.isprintable()


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("image_mean", WRONG_STATISTICS),
        ("image_std", WRONG_STDS),
        ("size", WRONG_SIDES),
        ("crop_size", WRONG_SIDES),
        ("resample", [[], {}, -1, 6, "cubic", HUGE, True]),
        ("do_resize", [[], "yes", 2]),
        ("do_normalize", [{}, 0.5]),
        ("crop_pct", [0, -1, 2, "1"]),
    ],
)
def test_an_impossible_preprocessor_config_is_refused(folder, key, values):
    for value in values:
        refused(folder, "preprocessor_config.json", key, {key: value})


@pytest.mark.parametrize(
    ("key", "values"),
    [("mean", WRONG_STATISTICS), ("std", WRONG_STDS), ("crop_pct", [0, HUGE, []]), ("interpolation", [[], "cubic", 3]),
     ("input_size", [[3, 0, 0], [3, 32, 128], 0, "x"])],
)  # fmt: skip
def test_an_impossible_timm_config_is_refused(folder, key, values):
    for value in values:
        refused(folder, "config.json", key, {"pretrained_cfg": {key: value}})


@pytest.mark.parametrize(
    ("key", "value"),
    [("layer_norm_eps", 0), ("layer_norm_eps", HUGE), ("layer_norm_eps", []), ("num_attention_heads", 0),
     ("num_attention_heads", 2.5), ("num_attention_heads", HUGE), ("hidden_act", [])],
)  # fmt: skip
def test_an_impossible_architecture_is_refused(tmp_path, key, value):
    from transformers import ViTConfig, ViTModel

    ViTModel(ViTConfig(**SMALL)).save_pretrained(tmp_path / "hf")
    refused(tmp_path / "hf", "config.json", key, json.loads((tmp_path / "hf/config.json").read_text()) | {key: value})


def test_what_a_config_may_say_is_heard(folder):
    possible = {"image_mean": [0, 0, 0], "image_std": "(1, 0.5, 1)", "size": [40, 40], "resample": "bicubic",
                "crop_size": {"height": 32, "width": 32}, "do_resize": 1}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(possible))
    assert collapse.load(folder).report["preprocessing"] == {
        "mean": (0, 0, 0), "std": (1, 0.5, 1), "resize": 40, "crop": 32, "interpolation": "bicubic"}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps({"resample": 1, "image_mean": None}))
    report = collapse.load(folder).report
    assert "preprocessor_config.json: resample is lanczos; bicubic is used instead" in report["warnings"]
    assert report["preprocessing"]["mean"] == (0.485, 0.456, 0.406)


def test_a_flag_stands_for_what_the_config_has_wrong(folder):
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 32, "width": 128}, "image_std": [0]})
    )
    net = collapse.load(folder, resize=32, crop=32, std=(0.5, 0.5, 0.5))
    assert net.report["preprocessing"]["std"] == (0.5, 0.5, 0.5)
    assert collapse.load(folder, resize=32, crop=32, no_normalize=True).preprocess.std is None


@pytest.mark.parametrize(
    "known",
    [{"std": value} for value in WRONG_STDS] + [{"mean": value} for value in WRONG_STATISTICS]
    + [{"resize": 0}, {"crop": HUGE}, {"crop": True}, {"heads": -1}, {"heads": 2.0}, {"dim": "3"}, {"stem_padding": -1},
       {"interpolation": []}, {"branch": 3}, {"arch": ["resnet18"]}, {"allow_unknown": "yes"}, {"maxpool": 2}],
)  # fmt: skip
def test_an_impossible_flag_is_refused(folder, known):
    (name,) = known
    with pytest.raises(InputError, match=f"{name}= is |{name}= holds .* numbers|and {name}= . numbers") as caught:
        collapse.load(folder, **known)
    assert len(str(caught.value)) < 300


def test_arguments_in_the_file_are_used_or_said(tmp_path):
    for mean, std, seen in (
        ("(0.5, 0.4, 0.3)", "(0.2, 0.2, 0.2)", (0.5, 0.4, 0.3)),
        ("global", True, (0.485, 0.456, 0.406)),
    ):
        opt = argparse.Namespace(mean=mean, std=std, model={"a": 1}, dataset=["x"], name=7)
        torch.save({"opt": opt, "model": Network(stem=3).state_dict()}, tmp_path / "x.pth")
        report = collapse.load(tmp_path / "x.pth").report
        assert report["preprocessing"]["mean"] == seen
        assert any("opt: std is True, not 3 numbers" in note for note in report["warnings"]) == (std is True)
    torch.save({"opt": argparse.Namespace(mean=(0.5,) * 3, std=(0, 0, 0)), "model": Network(stem=3).state_dict()},
               tmp_path / "x.pth")  # fmt: skip
    with pytest.raises(InputError, match=r"the file's opt: std is 0, expected a number in 1e-06..10"):
        collapse.load(tmp_path / "x.pth")


def test_solo_learns_present_arguments_are_nested(tmp_path):
    torch.save({"state_dict": put("backbone.", Network(stem=3).state_dict())}, tmp_path / "x.ckpt")
    (tmp_path / "args.json").write_text(json.dumps({"method": "byol", "data": {"dataset": "cifar10"}}))
    assert collapse.load(tmp_path / "x.ckpt").report["preprocessing"]["std"] == (0.247, 0.243, 0.261)


def test_a_tree_of_a_stranger_is_not_walked_for_its_arguments(tmp_path):
    node: dict = {"dataset": "cifar10"}
    for _ in range(40):
        node = {"a": node, "b": node}
    opt = argparse.Namespace(**node)
    torch.save({"opt": opt, "model": Network().state_dict()}, tmp_path / "x.pth")
    assert collapse.load(tmp_path / "x.pth").report["preprocessing"]["mean"] == (0.485, 0.456, 0.406)


def hub(folder, model_args, **build):
    """A folder as timm's hub keeps it, and its network."""
    net = trained(timm.create_model("vit_tiny_patch16_224", **model_args, **build))
    folder.mkdir()
    torch.save(net.state_dict(), folder / "pytorch_model.bin")
    says = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": model_args, "pretrained_cfg": {}}
    (folder / "config.json").write_text(json.dumps(says))
    return net


FOLDERS = {
    "texts": ({"model_type": "bart"}, r"model_type 'bart' is none of the image encoders"),
    "sounds": ({"model_type": "encodec"}, r"model_type 'encodec' is none of the image encoders"),
    "clips": ({"model_type": "vivit"}, "takes clips; of such vjepa2 and videomae are read"),
    "quantised": ({"model_type": "dinov3_vit", "quantization_config": {"bits": 4}}, "weights are quantised"),
    "layers without end": ({"model_type": "dinov3_vit", "num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    "too wide": ({"model_type": "dinov3_vit", "hidden_size": 1 << 15, "intermediate_size": 1 << 15}, "far larger than"),
    "no number": ({"model_type": "dinov3_vit", "hidden_size": {"a": 1}}, "hidden_size is a dict, which no network has"),
    "other tensors": ({**SMALL, "model_type": "dinov3_vit"}, "missing or misshapen|not those of its config"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_of_transformers_that_is_not_read_says_why(tmp_path, case):
    config, message = FOLDERS[case]
    torch.save(vit().state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        collapse.load(tmp_path)


def test_a_config_of_transformers_names_no_code(tmp_path):
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(0)
    net, images = DINOv3ViTModel(DINOv3ViTConfig(**SMALL)).eval(), torch.randn(2, 3, 32, 32)
    net.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "a--b.C"}, "attn_implementation": "someone/kernels", "dtype": "float16",
               "_attn_implementation": "someone/kernels", "quantizer": 3, "architectures": ["os.system"]}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        loaded = collapse.load(tmp_path)
        torch.testing.assert_close(loaded(images), net(images).pooler_output)
        assert loaded.layer(loaded.blocks[0])(images).shape == (2, 64)
    assert loaded.report["keys"]["unknown"] == 0


TINY = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 96, "num_heads": 4, "num_classes": 0}
HUBS = {
    "layer scale": ({"init_values": 0.1}, {}, lambda y: y),
    "mean": ({"global_pool": "avg"}, {}, lambda y: y),
    "registers": ({"reg_tokens": 4, "no_embed_class": True, "dynamic_img_size": True}, {}, lambda y: y),
    "all tokens, SwiGLU": (
        {"global_pool": "", "mlp_ratio": 5.375},
        {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU},
        lambda y: y[:, 0],
    ),
}


@pytest.mark.parametrize("case", HUBS)
def test_the_arguments_of_a_hub_folder_are_heard(tmp_path, case):
    more, build, take = HUBS[case]
    net, images = hub(tmp_path / "hub", TINY | more, **build), torch.randn(2, 3, 32, 32)
    loaded = collapse.load(tmp_path / "hub")
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), take(net(images)))
    assert loaded.preprocess.crop == 32


def test_an_argument_that_is_not_known_is_refused(tmp_path):
    hub(tmp_path / "hub", TINY)
    for name, value in (("checkpoint_path", "/etc/passwd"), ("pretrained", True), ("depth", HUGE),
                        ("img_size", [32, 8]), ("global_pool", []), ("a\nb", 1)):  # fmt: skip
        says = {"architecture": "vit_tiny_patch16_224", "model_args": TINY | {name: value}}
        refused(tmp_path / "hub", "config.json", "model_args", says)


def test_the_branch_of_a_librarys_network_is_the_documented_one(tmp_path):
    from collapse.checkpoints import library

    net = trained(library.make("torchvision:mobilenet_v2"))
    state = put("encoder_k.", {key: value * 2 for key, value in net.state_dict().items()})
    state |= put("encoder_q.", net.state_dict())
    torch.save({"arch": "mobilenet_v2", "state_dict": state}, tmp_path / "x.pth")
    report = collapse.load(tmp_path / "x.pth").report
    assert (report["branch"], report["branches_left"]) == ("state_dict.encoder_q", ["state_dict.encoder_k"])
    assert report["keys"]["dropped_by"] == {"another branch": len(net.state_dict())}
    assert collapse.load(tmp_path / "x.pth", branch="encoder_k").report["branch"] == "state_dict.encoder_k"
