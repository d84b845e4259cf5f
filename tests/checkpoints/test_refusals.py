"""What no layout can decide or what is not read: one line that says why and what to do."""

import json
import shutil
import zipfile

import layouts_convnets as convnets
import layouts_transformers as transformers
import pytest
import timm
import torch
from layouts import Network, Tree, mlp, other, put
from torch import nn

import collapse
from collapse import InputError


def vit_state(**options):
    return transformers.vit(**options).state_dict()


def refuse(tmp_path, tree, message, **known):
    path = tree if hasattr(tree, "exists") else tmp_path / "checkpoint.pth"
    if path is not tree:
        torch.save(tree, path)
    with pytest.raises(InputError, match=message) as caught:
        collapse.load(path, **known)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def mm_teacher():
    tree = convnets.vissl(None).tree
    trunk = tree["classy_state_dict"]["base_model"]["model"]["trunk"]
    tree["classy_state_dict"]["loss"] = {"momentum_teacher": {"trunk": other(trunk)}}
    return tree


def sliced_trunk():
    tree = convnets.vissl(None).tree
    tree["classy_state_dict"]["base_model"]["model"]["trunk"] = {"_feature_blocks.conv1.weight": "shard0.torch"}
    return tree


AMBIGUOUS = {
    "lightly's DINO and old BYOL benchmarks": (
        lambda: put("backbone.", Network().state_dict()) | put("student_backbone.", Network().state_dict()),
        "2 encoders, backbone, student_backbone; choose one with branch=",
    ),
    "lightly's old MoCo benchmark": (
        lambda: put("backbone.", Network().state_dict()) | put("query_backbone.", Network().state_dict()),
        "2 encoders, backbone, query_backbone; choose one with branch=",
    ),
    "timm with an EMA copy": (
        lambda: {"state_dict": Network().state_dict(), "state_dict_ema": Network().state_dict()},
        "2 encoders, state_dict, state_dict_ema; choose one with branch=",
    ),
    "VISSL's DINO": (mm_teacher, "2 encoders, .*momentum_teacher.trunk; choose one with branch="),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_several_encoders_are_listed(tmp_path, case):
    make, message = AMBIGUOUS[case]
    refuse(tmp_path, make(), message)


def rotary():
    return vit_state() | {"rope_embed.periods": torch.ones(16), "storage_tokens": torch.ones(1, 4, 192)}


def cmc():
    tree = {}
    for name, channels in (("encoder1", 1), ("encoder2", 2)):
        state = Network().state_dict()
        state["conv1.weight"] = state["conv1.weight"][:, :channels].clone()
        tree |= put(f"module.{name}.", state)
    return {"model": tree}


def flat_shards():
    return {"model": {f"student.backbone._flat_param_{i}": torch.ones(1000) for i in range(3)}}


def clip_state():
    return transformers.clip(transformers.TOWER, False).state_dict()


def sam():
    """An encoder of SAM whose grid is no square."""
    state = {k: v for k, v in vit_state().items() if k not in ("cls_token", "pos_embed")}
    tables = {f"{key.partition('.attn')[0]}.attn.rel_pos_h": torch.ones(7, 64) for key in state if ".attn." in key}
    return put("image_encoder.", {"pos_embed": torch.ones(1, 4, 5, 192), **state, **tables})


def oblong(tmp_path):
    """Positions of images of 32 x 128 pixels, which a square of as many positions would fit."""
    from transformers import ViTConfig, ViTModel

    ViTModel(ViTConfig(**transformers.SMALL | {"image_size": [32, 128]})).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_an_oblong_grid_is_refused_where_a_config_says_so_else_said(tmp_path):
    refuse(tmp_path, oblong(tmp_path), r"config.json: image_size is \[32, 128\]")
    torch.save(vit_state(), tmp_path / "x.pth")
    assert "the 16 positions are taken as a square grid, 4 x 4" in collapse.load(tmp_path / "x.pth").report["warnings"]


def test_a_siglip_has_one_activation(tmp_path):
    tree = vit_state(class_token=False, global_pool="map")
    refuse(tmp_path, tree, "leave activation= and pool= out", activation="gelu")
    assert any("gelu_tanh assumed" in note for note in collapse.load(tmp_path / "checkpoint.pth").report["warnings"])


NOT_READ = {
    "SAM": (sam, r"a grid of 4 x 5, windows of \[\], heads of 64: no encoder of SAM"),
    "DINOv3's rotary positions": (rotary, "rotary positions"),
    "PyContrast's CMC": (cmc, "no tensor is a convolution of 3 channels"),
    "DINOv2's rank files from several GPUs": (flat_shards, "no known layout"),
    "VISSL's sliced trunk": (sliced_trunk, "no known layout"),
    "CLIP without a word on its activation": (clip_state, 'give activation="quick_gelu"'),
    "a width without a usual number of heads": (
        lambda: vit_state(embed_dim=48),
        "nothing says how many heads.*heads=",
    ),
    "a width of 64 with 4 heads": (lambda: vit_state(embed_dim=64, num_heads=4), "nothing says how many heads.*64"),
    "a width of 512": (lambda: vit_state(embed_dim=512, num_heads=4), "nothing says how many heads.*heads="),
    "positions that are no square": (
        lambda: vit_state() | {"pos_embed": torch.ones(1, 18, 192)},
        "18 positions, which are no square grid",
    ),
    "a transformer with a block cut out": (
        lambda: {k: v for k, v in vit_state(depth=3).items() if not k.startswith("blocks.1.")},
        "missing, first 'blocks.1.norm1.weight'",
    ),
    "a transformer with a tensor too many": (
        lambda: vit_state() | {"blocks.1.mlp.fc3.weight": torch.ones(3)},
        "1 tensors belong to nothing known, first 'blocks.1.mlp.fc3.weight'",
    ),
    "a block number that would fill the memory": (
        lambda: vit_state() | {"blocks.999999999.norm1.weight": torch.ones(192)},
        "a block 999999999 among",
    ),
    "half a projection of the attention": (
        lambda: vit_state() | {"blocks.1.attn.qkv.weight": torch.ones(128, 192)},
        r"'blocks.1.attn.qkv.weight' is \(128, 192\), expected \(576, 192\)",
    ),
}


@pytest.mark.parametrize("case", NOT_READ)
def test_what_is_not_read_says_why(tmp_path, case):
    make, message = NOT_READ[case]
    refuse(tmp_path, make(), message)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"pool": "max"}, "pool= is 'max', expected cls or mean"),
        ({"activation": "tanh"}, "activation= is 'tanh'"),
        ({"heads": 5}, "5 heads do not divide a width of 192"),
        ({"arch": "no_such_network"}, "neither timm nor torchvision has it"),
        ({"arch": "vit_tiny_patch16_224"}, "not those of vit_tiny_patch16_224"),
        ({"projector": "neck"}, "no projector at 'neck'"),
        ({"dim": 193}, "dim=193: the representation has 192 entries"),
        ({"mean": (0.5,)}, r"mean= holds 1 and std= 3 numbers; give both"),
        ({"branch": "teacher"}, r"no encoder at 'teacher'; there are \(top\)"),
    ],
)
def test_a_flag_that_does_not_fit_is_an_error(tmp_path, known, message):
    path = tmp_path / "checkpoint.pth"
    torch.save(vit_state(), path)
    with pytest.raises(InputError, match=message):
        collapse.load(path, **known)


def test_flags_that_no_tensor_shows_change_the_network(tmp_path):
    path, images = tmp_path / "checkpoint.pth", torch.randn(2, 3, 32, 32)
    net = transformers.vit(num_heads=4)
    torch.save(net.state_dict(), path)
    assert any("3 assumed" in note for note in collapse.load(path).report["warnings"])
    with torch.no_grad():
        torch.testing.assert_close(collapse.load(path, heads=4)(images), net(images))
        assert not torch.allclose(collapse.load(path)(images), net(images), rtol=1e-3)
        mean = collapse.load(path, heads=4, pool="mean")(images)
        torch.testing.assert_close(mean, net.forward_features(images)[:, 1:].mean(1))
    small = Network(stem=3, padding=2, maxpool=True)
    torch.save(small.state_dict(), path)
    with torch.no_grad():
        loaded = collapse.load(path, stem_padding=2, maxpool=True)
        torch.testing.assert_close(loaded(images), small.features(images))
        assert not torch.allclose(collapse.load(path)(images), small.features(images), rtol=1e-3)


def test_two_projectors_are_listed_and_one_can_be_chosen(tmp_path):
    net, first, second = Network(), mlp(32, 16, 8), mlp(32, 24, 8)
    torch.save(Tree(backbone=net, projector=first, projection_head=second).state_dict(), tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"2 projectors, projector, projection_head; choose one with projector="):
        collapse.load(tmp_path / "x.pth")
    assert collapse.load(tmp_path / "x.pth", projector="projection_head").report["projector"]["dims"] == [32, 24, 8]
    assert collapse.load(tmp_path / "x.pth", projector="none").projector is None


def test_a_projector_that_cannot_be_read_is_said_and_the_encoder_is_loaded(tmp_path):
    from byol_pytorch import BYOL
    from torchvision.models import resnet18

    learner = BYOL(resnet18(), image_size=32, hidden_layer="avgpool", projection_size=16, projection_hidden_size=32)
    torch.save(learner.state_dict(), tmp_path / "learner.pth")
    net = collapse.load(tmp_path / "learner.pth")
    assert net.report["branch"] == "online_encoder.net"
    assert net.report["keys"]["dropped_by"]["projector that cannot be read"] > 0
    with pytest.raises(InputError, match=r"not read: .*softmax"):
        net.layer("projector")
    net.layer("representation")


def test_a_wrong_layer_lists_the_names(tmp_path):
    torch.save(vit_state(), tmp_path / "x.pth")
    net = collapse.load(tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"no 'blocks.2'; there are representation, projector, .*blocks.0, blocks.1"):
        net.layer("blocks.2")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(net.layer("norm")(images), net(images))
        assert net.layer("blocks.0.mlp.fc1")(images).shape == (2, 768)
        assert net.layer("patch_embed")(images).shape == (2, 192)
    with pytest.raises(InputError, match=r"33 x 33 pixels for patches of 8"):
        net(torch.randn(1, 3, 33, 33))


@pytest.fixture
def shards(tmp_path):
    return transformers.huggingface_shards(tmp_path).tree


def rewrite(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.filterwarnings("ignore")
def test_an_index_never_leaves_its_folder(shards, tmp_path):
    for name in ("../outside.safetensors", "/etc/passwd", "a/b", "..", ""):
        rewrite(shards, lambda index, name=name: index.update({sorted(index)[0]: name}))
        refuse(tmp_path, shards, "outside its folder")
    link = shards / "link.safetensors"
    outside = tmp_path / "outside.safetensors"
    shutil.copy(next(iter(sorted(shards.glob("*.safetensors")))), outside)
    link.symlink_to(outside)
    rewrite(shards, lambda index: index.update({sorted(index)[0]: "link.safetensors"}))
    refuse(tmp_path, shards, "link that leaves the folder")


@pytest.mark.filterwarnings("ignore")
def test_an_index_and_its_shards_must_agree(shards, tmp_path):
    saved = (shards / "model.safetensors.index.json").read_text()
    rewrite(shards, lambda index: index.update({"ghost.weight": sorted(index.values())[0]}))
    refuse(tmp_path, shards, "1 tensors of the index are missing")
    (shards / "model.safetensors.index.json").write_text(saved)
    rewrite(shards, lambda index: index.pop(sorted(index)[0]))
    refuse(tmp_path, shards, "in the shards but not in the index")
    (shards / "model.safetensors.index.json").write_text('{"weight_map": []}')
    refuse(tmp_path, shards, "no weight_map")
    (shards / "model.safetensors.index.json").write_text("[" * 100000)
    refuse(tmp_path, shards, "not readable as JSON")
    (shards / "model.safetensors.index.json").write_text(saved)
    sorted(shards.glob("*.safetensors"))[0].unlink()
    refuse(tmp_path, shards, "no such file")


@pytest.mark.filterwarnings("ignore")
def test_a_distributed_folder_is_whole_or_refused(tmp_path):
    folder = convnets.dcp(tmp_path).tree
    part = next(folder.glob("*.distcp"))
    whole, metadata = part.read_bytes(), (folder / ".metadata").read_bytes()
    name = part.name.encode()
    for evil in (b"../" + name[3:], b"/" + name[1:]):
        (folder / ".metadata").write_bytes(metadata.replace(name, evil))
        refuse(tmp_path, folder, "outside its folder")
    (folder / ".metadata").write_bytes(metadata)
    part.write_bytes(whole[: len(whole) // 2])
    refuse(tmp_path, folder, "truncated")
    (folder / ".metadata").write_bytes(metadata[: len(metadata) // 2])
    refuse(tmp_path, folder, "not the index of a distributed checkpoint")
    (folder / ".metadata").write_bytes(metadata)
    part.unlink()
    refuse(tmp_path, folder, "no such file")


def test_other_folders_are_named(tmp_path):
    empty, deepspeed = tmp_path / "empty", tmp_path / "deepspeed"
    empty.mkdir()
    deepspeed.mkdir()
    (deepspeed / "latest").write_text("global_step1")
    refuse(tmp_path, empty, "a folder without a checkpoint")
    refuse(tmp_path, deepspeed, "zero_to_fp32")


def test_a_config_that_changes_the_network_is_obeyed_or_refused(tmp_path):
    case = transformers.huggingface_resnet(tmp_path)
    config = json.loads((case.tree / "config.json").read_text())
    (case.tree / "config.json").write_text(json.dumps(config | {"downsample_in_bottleneck": True}))
    refuse(tmp_path, case.tree, "downsample_in_bottleneck")
    (case.tree / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    refuse(tmp_path, case.tree, "relu is known")


def test_the_code_in_an_archive_is_not_even_parsed(tmp_path):
    case = transformers.openai_clip(tmp_path)
    with zipfile.ZipFile(case.tree) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    code = [name for name in records if name.endswith(".py")]
    assert code
    with zipfile.ZipFile(case.tree, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, b"import os; os.abort()" if name in code else data)
    net, images = collapse.load(case.tree), torch.randn(2, 3, 32, 32)
    assert net.report["container"] == "TorchScript archive"
    with torch.no_grad():
        torch.testing.assert_close(net(images), case.reference(images))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("resnet26d", "resnet26d"),
        ("torchvision:mobilenet_v2", "torchvision:mobilenet_v2"),
        ("densenet121", "densenet121"),
    ],
)
def test_a_network_of_a_library_is_found_by_its_tensors(tmp_path, name, found):
    from collapse.checkpoints import library

    torch.manual_seed(0)
    net, head = library.make(name).eval(), nn.Linear(3, 2)
    state = put("module.backbone.", net.state_dict() | put("fc.", head.state_dict()))
    torch.save({"state_dict": state | put("module.predictor.", head.state_dict())}, tmp_path / "x.pth")
    loaded, images = collapse.load(tmp_path / "x.pth"), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), net(images))
    assert loaded.report["architecture"] == found
    assert loaded.report["branch"] == "state_dict.backbone"
    assert f"identified as {found} by its tensors alone" in loaded.report["warnings"]


def test_networks_with_the_same_tensors_are_listed(tmp_path):
    net = timm.create_model("xcit_nano_12_p16_224", num_classes=0)
    refuse(tmp_path, net.state_dict(), "xcit_nano_12_p16_224, xcit_nano_12_p16_384; give arch=")
    assert collapse.load(tmp_path / "checkpoint.pth", arch="xcit_nano_12_p16_224").report["warnings"]
    smaller = {key: t[:5] if key.endswith("cls_token") else t for key, t in net.state_dict().items()}
    smaller["norm.weight"] = torch.ones(5)
    refuse(tmp_path, smaller, r"not xcit_nano_12_p16_224: 'norm.weight' is \(5,\)", arch="xcit_nano_12_p16_224")


def test_a_file_that_only_names_a_huge_network_takes_no_memory(tmp_path):
    huge = "vit_giant_patch14_dinov2"
    with torch.device("meta"):
        names = list(timm.create_model(huge, num_classes=0).state_dict())
    torch.save({name: torch.ones(1) for name in names}, tmp_path / "x.pth")
    with pytest.raises(InputError, match="not vit_giant_patch14_dinov2"):
        collapse.load(tmp_path / "x.pth", arch=huge)


def test_trees_without_end_are_refused(tmp_path):
    node: dict = {"w": torch.ones(1)}
    for _ in range(40):
        node = {"a": node, "b": node}
    refuse(tmp_path, {"model": node}, "nested without end|more than 100000 tensors")
    loop: dict = {}
    loop["again"] = loop
    refuse(tmp_path, {"model": loop}, "nested without end")


def test_libraries_networks_need_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source, message in (
        ("timm:no_such_net", "timm:no_such_net: no such network in timm"),
        ("torchvision:resnet19", "no such network in torchvision; there are .*resnet18"),
        ("timm:resnet18d.nothing", "timm:resnet18d.nothing: "),
    ):
        with pytest.raises(InputError, match=message) as caught:
            collapse.load(source)
        assert "\n" not in str(caught.value)

    def offline(*args, **kwargs):
        raise OSError("[Errno -2] Name or service not known\nretry later")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"timm:resnet18: neither cached nor fetched \(.*not known\)$"):
        collapse.load("timm:resnet18")


def test_a_librarys_network_is_loaded_from_its_cache(monkeypatch):
    create = timm.create_model
    torch.manual_seed(0)
    net = create("resnet18", num_classes=10).eval()
    monkeypatch.setattr(timm, "create_model", lambda *a, pretrained, **k: net if pretrained else create(*a, **k))
    loaded = collapse.load("timm:resnet18")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), net.forward_head(net.forward_features(images), pre_logits=True))
    assert loaded.report["container"].startswith("timm ")
    assert loaded.preprocess.crop == 224


def test_half_precision_is_computed_in_single(tmp_path):
    net = transformers.vit()
    torch.save({k: v.half() for k, v in net.state_dict().items()}, tmp_path / "x.pth")
    loaded = collapse.load(tmp_path / "x.pth")
    assert loaded(torch.randn(1, 3, 32, 32)).dtype == torch.float32
    assert any("float16" in note for note in loaded.report["warnings"])
