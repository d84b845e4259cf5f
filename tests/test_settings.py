"""Values of configs and flags, which may be anything: used if they can be, else refused by file, key and value."""

import argparse
import json

import pytest
import torch
from layouts import Network
from layouts_transformers import SMALL, vit

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
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} is ") as caught:
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
    torch.save(
        {"state_dict": {f"backbone.{k}": v for k, v in Network(stem=3).state_dict().items()}}, tmp_path / "x.ckpt"
    )
    (tmp_path / "args.json").write_text(json.dumps({"method": "byol", "data": {"dataset": "cifar10"}}))
    assert collapse.load(tmp_path / "x.ckpt").report["preprocessing"]["std"] == (0.247, 0.243, 0.261)


def test_a_tree_of_a_stranger_is_not_walked_for_its_arguments(tmp_path):
    node: dict = {"dataset": "cifar10"}
    for _ in range(40):
        node = {"a": node, "b": node}
    opt = argparse.Namespace(**node)
    torch.save({"opt": opt, "model": Network().state_dict()}, tmp_path / "x.pth")
    assert collapse.load(tmp_path / "x.pth").report["preprocessing"]["mean"] == (0.485, 0.456, 0.406)
