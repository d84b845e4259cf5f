"""What a file holds beside the encoder: dropped if it is what its name says, else named; other forms are refused."""

import pytest
import torch
from layouts import Network, Tree, mlp, put
from layouts_transformers import vit
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

import collapse
from collapse import InputError
from collapse.checkpoints.plan import unusable

NORM = {f"bn.{key}": value for key, value in nn.BatchNorm1d(32).state_dict().items()}


def load(tmp_path, tree, **known):
    if "float8" in str({getattr(tensor, "dtype", None) for tensor in tree.values()}):
        save_file(tree, tmp_path / "x.pth")
    else:
        torch.save(tree, tmp_path / "x.pth")
    return collapse.load(tmp_path / "x.pth", **known)


def refused(tmp_path, tree, message, **known):
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path, tree, **known)
    text = str(caught.value).removeprefix(f"{tmp_path}/x.pth: ")
    assert len(text) < 330
    assert text.isprintable()
    return text


@pytest.mark.parametrize(
    ("beside", "first"),
    [
        (NORM, "bn.weight"),
        ({"bn.running_mean": torch.ones(32), "bn.running_var": torch.ones(32)}, "bn.running_mean"),
        ({"proj.weight": torch.ones(16, 32, 3, 3)}, "proj.weight"),
        ({"proj.weight": torch.ones(16, 24), "proj.bias": torch.ones(16)}, "proj.bias"),
        ({"neck.weight": torch.ones(32)}, "neck.weight"),
        ({"transformer.layers.0.linear.weight": torch.ones(32, 32)}, "transformer.layers.0"),
        ({"steps.weight": torch.ones(32, 32)}, "steps.weight"),
        ({"key_map.weight": torch.ones(32, 32), "query_map.weight": torch.ones(32, 32)}, "key_map.weight"),
    ],
)
def test_what_may_change_the_embedding_is_not_dropped(tmp_path, beside, first):
    assert first in refused(tmp_path, Network().state_dict() | beside, "belong to nothing known, first")
    notes = load(tmp_path, Network().state_dict() | beside, allow_unknown=True).report["warnings"]
    assert any(note.startswith("left out by allow_unknown=True") and first in note for note in notes)


def test_heads_on_top_are_dropped_and_those_that_do_not_fit_are_said(tmp_path):
    net = Network()
    fitting = load(tmp_path, net.state_dict() | put("fc.", nn.Linear(32, 5).state_dict())).report
    assert fitting["keys"]["dropped_by"] == {"classifier": 2}
    assert not any("left out" in note for note in fitting["warnings"])
    other = load(tmp_path, net.state_dict() | put("fc.", nn.Linear(512, 5).state_dict())).report
    assert "left out, though it may be near the embedding: fc" in other["warnings"]


def test_the_norm_of_barlow_twins_loss_is_known_by_its_size(tmp_path):
    parts = {"backbone": Network(), "projector": mlp(32, 48, norm=True)}
    for width, rule in ((48, {"loss": 3}), (32, None)):
        tree = Tree(**parts, bn=nn.BatchNorm1d(width, affine=False)).state_dict()
        if rule:
            assert load(tmp_path, tree).report["keys"]["dropped_by"] == rule
        else:
            refused(tmp_path, tree, "first 'bn.running_mean'; if the encoder is right without them")


def test_a_projector_that_is_not_taken_is_said(tmp_path):
    tree = Tree(backbone=Network(), projector=mlp(32, 16, 8), neck=mlp(24, 8)).state_dict()
    report = load(tmp_path, tree).report
    assert report["projector"]["prefix"] == "projector."
    assert "left out, though it may be near the embedding: neck.0" in report["warnings"]


@pytest.mark.parametrize("name", ["blocks.1.adapter.down.weight", "pos_norm.weight", "attn_pool.q.weight"])
def test_no_flag_is_offered_for_a_part_of_the_encoder(tmp_path, name):
    text = refused(tmp_path, vit().state_dict() | {name: torch.ones(64, 64)}, "may change what the encoder gives")
    assert "allow_unknown" not in text
    (note,) = [n for n in load(tmp_path, vit().state_dict() | {name: torch.ones(64, 64)},
                               allow_unknown=True).report["warnings"] if "allow_unknown" in n]  # fmt: skip
    assert name in note
    assert "may well change" in note


def altered(change):
    """A transformer whose attention's maps are changed."""
    net = vit()
    for block in net.blocks:
        change(block.attn.qkv)
    return net.state_dict()


def lora(name):
    state = {}
    for key, value in vit().state_dict().items():
        state[key.replace("qkv.", "qkv.base_layer.") if name == "peft" else key] = value
        if key.endswith("qkv.weight"):
            state[key.replace("weight", "lora_A.default.weight" if name == "peft" else "lora_A")] = torch.ones(4, 64)
            state[key.replace("weight", "lora_B.default.weight" if name == "peft" else "lora_B")] = torch.ones(192, 4)
    return state


def packed(*names):
    state = vit().state_dict()
    state = {key: value for key, value in state.items() if not key.endswith("qkv.weight")}
    for name in names:
        for block in range(2):
            state[f"blocks.{block}.attn.qkv.{name}"] = torch.ones(192, 8, dtype=torch.int32)
    return state


def eight(dtype):
    return {k: v.to(dtype) if k.endswith("mlp.fc1.weight") else v for k, v in vit().state_dict().items()}


def twice(state):
    return put("model.", state) | put("again.", {key: value.clone() for key, value in state.items()})


FORMS = {
    "peft": (lambda: put("base_model.model.", lora("peft")), "LoRA adapters .*base_layer.*merge them"),
    "loralib": (lambda: {"model": lora("loralib")}, "LoRA adapters .*lora_A.*merge them"),
    "GPTQ": (lambda: packed("qweight", "qzeros", "scales", "g_idx"), "quantised weights .*qkv.qweight.*dequantise"),
    "4 bits of bitsandbytes": (
        lambda: vit().state_dict() | packed("weight.absmax", "weight.quant_map"),
        "quantised weights .*absmax",
    ),
    "8 bits of bitsandbytes": (lambda: vit().state_dict() | packed("SCB"), "quantised weights .*SCB"),
    "pruned": (
        lambda: altered(lambda layer: prune.random_unstructured(layer, "weight", 0.3)),
        "pruned weights .*weight_orig.*prune.remove",
    ),
    "spectral norm": (
        lambda: altered(nn.utils.parametrizations.spectral_norm),
        "parametrised weights .*remove_parametrizations",
    ),
    "weight norm": (lambda: altered(nn.utils.parametrizations.weight_norm), "a weight norm .*weight_g"),
    "float8 e4m3": (lambda: eight(torch.float8_e4m3fn), "mlp.fc1.weight' is stored as float8_e4m3fn.*scale"),
    "float8 e5m2": (lambda: eight(torch.float8_e5m2), "mlp.fc1.weight' is stored as float8_e5m2.*scale"),
    "float8 e8m0": (lambda: eight(torch.float8_e8m0fnu), "mlp.fc1.weight' is stored as float8_e8m0fnu.*scale"),
    "int8": (lambda: eight(torch.int8), "mlp.fc1.weight' is stored as int8.*dequantise"),
    "complex": (lambda: eight(torch.complex64), "stored as complex64, expected floating-point"),
    "two copies in float8": (
        lambda: twice(eight(torch.float8_e5m2)),
        "is stored as float8_e5m2",
    ),
    "a negative variance": (
        lambda: Network().state_dict() | {"layer1.0.bn2.running_var": torch.linspace(-1, 1, 8)},
        "'layer1.0.bn2.running_var' is a variance and has negative numbers",
    ),
    "an infinite mean": (
        lambda: Network().state_dict() | {"bn1.running_mean": torch.full((8,), torch.inf)},
        "'bn1.running_mean' holds NaN or infinity",
    ),
    "larger than float32": (
        lambda: Network().state_dict() | {"bn1.weight": torch.full((8,), 1e300, dtype=torch.float64)},
        "'bn1.weight' holds .*too large for float32",
    ),
}


@pytest.mark.parametrize("case", FORMS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_weights_in_another_form_are_refused_by_name(tmp_path, case):
    make, message = FORMS[case]
    refused(tmp_path, make(), message)


@pytest.mark.filterwarnings("ignore")
def test_parts_of_tensors_are_refused_by_name(tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        state = Network().state_dict()
        halves = {key: distribute_tensor(t, mesh, [Shard(0)]) if "layer2" in key and t.ndim else t
                  for key, t in state.items()}  # fmt: skip
        refused(tmp_path, {"model": halves}, "of which each process keeps a part .*DTensor.*full_state_dict=True")
        with pytest.raises(InputError, match=r"'layer2.0.conv1.weight' is a DTensor"):
            collapse.load(halves)
    finally:
        distributed.destroy_process_group()


def test_a_projector_with_a_negative_variance_is_not_read(tmp_path):
    chain = mlp(32, 16, 8, norm=True)
    chain[1].running_var[3] = -1
    net = load(tmp_path, Tree(backbone=Network(), projector=chain).state_dict())
    assert net.projector is None
    assert any("is not read: 'running_var' is a variance" in note for note in net.report["warnings"])


NAMES = ["a\nb\x1b[31m", "x" * 1500, "(a+)+$", "../../etc", "%s{0}", "\ud800", "\u202eevil", "a[b", "\\1"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_may_be_anything(tmp_path, name):
    refused(tmp_path, Network().state_dict() | {f"{name}.weight": torch.ones(3)}, "1 tensors belong to nothing known")
    refused(tmp_path, {name: Network().state_dict(), "b": Network().state_dict()}, "holds 2 encoders")
    refused(tmp_path, {f"{name}.conv": torch.ones(3)}, "no known layout")
    net = load(tmp_path, {name: Network().state_dict() | put("projector.", mlp(32, 8).state_dict())})
    assert net.report["branch"].isprintable()
    refused(tmp_path, {name: Network().state_dict()}, "no encoder at", branch=f"{name}?")


def test_keys_that_are_no_names_are_only_said(tmp_path):
    tree = {"model": Network().state_dict(), (1, "a"): {"weight": torch.ones(3)}, 7: {"weight": torch.ones(3)}}
    from collapse.checkpoints.keys import clean

    assert {"<tuple>.weight", "7.weight"} < clean(tree, "x.pth").keys()


def test_what_a_trainer_keeps_beside_the_network_is_left(tmp_path):
    net = Network()
    monitor = collapse.Monitor(net, every=2, rows=4)
    net.train()
    for _ in range(3):
        net(torch.randn(4, 3, 64, 64))
        monitor.step()
    monitor.remove()
    beside = {"monitor": monitor.state_dict(), "rng_state": torch.get_rng_state(), "loss_history": torch.ones(9),
              "metrics": {"rank": torch.ones(2)}, "epoch": torch.tensor(3)}  # fmt: skip
    report = load(tmp_path, {"model": net.state_dict(), **beside}).report
    assert (report["branch"], report["keys"]["unknown"]) == ("model", 0)


def test_a_part_of_a_branchs_name_is_enough_where_one_has_it(tmp_path):
    tree = {name: Network().state_dict() for name in ("net_a.encoder", "net_b.encoder", "net_b.other")}
    assert load(tmp_path, tree, branch="net_a").report["branch"] == "net_a.encoder"
    assert load(tmp_path, tree, branch="net_b.other").report["branch"] == "net_b.other"
    refused(tmp_path, tree, "branch='net_b' is in the names of 2 encoders, net_b.encoder, net_b.other", branch="net_b")
    refused(tmp_path, tree, "no encoder at .ccc.; there are net_a.encoder, net_b.encoder, net_b.other", branch="c" * 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_number_that_is_none_is_found_wherever_it_stands(dtype):
    for shape in ((), (0,), (3,), (40, 70)):
        assert unusable("weight", torch.ones(shape, dtype=dtype)) is None
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 1234, 2799):
            tensor = torch.zeros(2800, dtype=dtype)
            tensor[place] = bad
            assert "NaN or infinity" in unusable("weight", tensor.view(40, 70).T)
    largest = torch.full((5,), torch.finfo(dtype).max, dtype=dtype)
    assert (unusable("weight", largest) is None) == (dtype != torch.float64)  # which float32 does not hold
