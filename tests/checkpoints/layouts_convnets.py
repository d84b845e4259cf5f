"""Residual networks in the layouts of other projects: their attribute names re-declared, saved as they save."""

import argparse
import copy

import torch
from layouts import Case, Network, Tree, exclude_bias_and_norm, layout, mlp, optimizer, other, put, trained
from torch import nn


def fresh(**options):
    return Network(**options)


@layout("facebookresearch/moco v1", "`encoder_q`; its one linear `fc` is the projector", "query, not key")
def moco_v1(tmp_path):
    net = fresh(fc=nn.Linear(32, 12))
    state = put("module.encoder_q.", net.state_dict()) | put("module.encoder_k.", other(net.state_dict()))
    state |= {"module.queue": torch.ones(12, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    tree = {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": optimizer()}
    return Case(tree, net.features, "state_dict.encoder_q", net.fc)


@layout("facebookresearch/moco v2", "`encoder_q`; its `fc.0, fc.2` is the projector", "query, not key")
def moco_v2(tmp_path):
    net = fresh(fc=mlp(32, 32, 12), bottleneck=True, widths=(8, 8, 8, 8))
    state = put("module.encoder_q.", net.state_dict()) | put("module.encoder_k.", other(net.state_dict()))
    state |= {"module.queue": torch.ones(12, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    tree = {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": optimizer()}
    return Case(tree, net.features, "state_dict.encoder_q", net.fc)


def directclr(projector):
    net = fresh()
    parts = {"backbone": net, "online_head": nn.Linear(32, 10)} | ({"projector": projector} if projector else {})
    tree = {"epoch": 1, "model": put("module.", Tree(**parts).state_dict()),
            "optimizer": optimizer(exclude_bias_and_norm, exclude_bias_and_norm)}  # fmt: skip
    return Case(tree, net.features, "model.backbone", projector)


@layout("facebookresearch/directclr, mode simclr", "`backbone`, `projector.{0,1,3,4}`; not `online_head`")
def directclr_simclr(tmp_path):
    return directclr(mlp(32, 32, 12, bias=False, last_bias=False, norm=True, last_norm=True))


@layout("facebookresearch/directclr, mode single", "`backbone`, `projector` (one matrix)")
def directclr_single(tmp_path):
    return directclr(nn.Linear(32, 12, bias=False))


class First(nn.Module):
    def forward(self, r):
        return r[:, :9]


@layout("facebookresearch/directclr, modes directclr, group, baseline", "`backbone`", flags="`--dim 360` makes the "
        "sub-vector that the loss saw the projector")  # fmt: skip
def directclr_directclr(tmp_path):
    case = directclr(None)
    case.known, case.projector = {"dim": 9}, First()
    return case


@layout("facebookresearch/directclr, final file", "`backbone`; `head` is the online classifier, `projector` if there")
def directclr_final(tmp_path):
    net, projector = fresh(), mlp(32, 32, 12, bias=False, last_bias=False, norm=True, last_norm=True)
    tree = {"backbone": net.state_dict(), "projector": projector.state_dict(), "head": nn.Linear(32, 10).state_dict()}
    return Case(tree, net.features, "backbone", projector)


@layout("sthalles/SimCLR", "`backbone`; its `fc.0, fc.2` is the projector", flags="`--resize --crop` (96 or 32)")
def sthalles(tmp_path):
    net = fresh(fc=mlp(32, 32, 12))
    tree = {"epoch": 9, "arch": "resnet18", "state_dict": Tree(backbone=net).state_dict(), "optimizer": optimizer()}
    return Case(tree, net.features, "state_dict.backbone", net.fc, pixels={"mean": None, "std": None})


def sequence(net, maxpool=True):
    """torchvision's children without fc, as list(net.children())[:-1] gives them."""
    kept = [net.conv1, net.bn1, net.relu, *([net.maxpool] if maxpool else [])]
    return nn.Sequential(*kept, net.layer1, net.layer2, net.layer3, net.layer4, net.avgpool)


@layout("sthalles/SimCLR before 2020-07", "`features` (a sequence); `l1, l2` is the projector",
        flags="`--resize --crop`")  # fmt: skip
def sthalles_old(tmp_path):
    net, l1, l2 = fresh(), nn.Linear(32, 32), nn.Linear(32, 12)
    state = Tree(features=sequence(net), l1=l1, l2=l2).state_dict()
    return Case(state, net.features, "features", nn.Sequential(l1, nn.ReLU(), l2), pixels={"mean": None})


@layout("facebookresearch/simsiam", "`encoder`; its `fc.{0,1,3,4,6,7}` is the projector; not `predictor`")
def simsiam(tmp_path):
    net = fresh(fc=mlp(32, 32, 32, 32, bias=False, norm=True, last_norm=False))
    predictor = mlp(32, 8, 32, bias=False, norm=True)
    state = put("module.", Tree(encoder=net, predictor=predictor).state_dict())
    tree = {"epoch": 100, "arch": "resnet50", "state_dict": state, "optimizer": optimizer()}
    return Case(tree, net.features, "state_dict.encoder", net.fc)


@layout("facebookresearch/barlowtwins, checkpoint.pth", "`backbone`, `projector`; not the loss's `bn`")
def barlowtwins(tmp_path):
    net, projector = fresh(), mlp(32, 48, 48, 48, bias=False, last_bias=False, norm=True)
    parts = Tree(backbone=net, projector=projector, bn=nn.BatchNorm1d(48, affine=False))
    tree = {"epoch": 1, "model": put("module.", parts.state_dict()), "optimizer": optimizer(exclude_bias_and_norm)}
    return Case(tree, net.features, "model.backbone", projector)


@layout("facebookresearch/vicreg, model.pth", "`backbone`, `projector`")
def vicreg(tmp_path):
    net, projector = fresh(), mlp(32, 48, 48, 48, last_bias=False, norm=True)
    tree = {"epoch": 1, "model": put("module.", Tree(backbone=net, projector=projector).state_dict()),
            "optimizer": optimizer(exclude_bias_and_norm)}  # fmt: skip
    return Case(tree, net.features, "model.backbone", projector)


@layout("facebookresearch/vicreg, resnet50.pth, resnet50x2.pth; barlowtwins, resnet50.pth", "all, any width")
def vicreg_wide(tmp_path):
    net = fresh(bottleneck=True, widths=(16, 32, 48, 64))
    return Case(net.state_dict(), net.features, "(top)")


@layout("facebookresearch/swav, deepclusterv2, selav2", "all; `projection_head` is the projector; not `prototypes`")
def swav(tmp_path):
    net, head = fresh(), mlp(32, 32, 12, norm=True)
    extra = Tree(projection_head=head, prototypes=nn.Linear(12, 30, bias=False))
    state = put("module.", net.state_dict() | extra.state_dict())
    return Case(state, net.features, "(top)", head, pixels={"std": (0.228, 0.224, 0.225)})


@layout("facebookresearch/swav, multi-prototypes", "all; `projection_head` is the projector")
def swav_multi(tmp_path):
    net, head = fresh(), nn.Linear(32, 12)
    protos = Tree(prototypes0=nn.Linear(12, 30, bias=False), prototypes1=nn.Linear(12, 30, bias=False))
    state = put("module.", net.state_dict() | Tree(projection_head=head, prototypes=protos).state_dict())
    tree = {"epoch": 1, "state_dict": state, "optimizer": optimizer(), "amp": {"x": torch.ones(1)}}
    return Case(tree, net.features, "state_dict", head, pixels={"std": (0.228, 0.224, 0.225)})


@layout("leftthomas/SimCLR", "`f` (a sequence; index 3 shows that it has no max-pool), `g` is the projector")
def leftthomas(tmp_path):
    net, g = fresh(stem=3), mlp(32, 32, 12, bias=False, norm=True)
    state = Tree(f=sequence(net, maxpool=False), g=g).state_dict()
    state |= {"f.total_ops": torch.zeros(1), "f.3.0.total_params": torch.zeros(1), "total_ops": torch.zeros(1)}
    return Case(state, net.features, "f", g, size=32, pixels={"mean": (0.4914, 0.4822, 0.4465), "crop": 32})


@layout("Spijkervet/SimCLR", "`encoder`, `projector.{0,2}`", flags="`--no-normalize`")
def spijkervet(tmp_path):
    net, projector = fresh(), mlp(32, 32, 12, bias=False, last_bias=False)
    state = Tree(encoder=net, projector=projector).state_dict()
    return Case(state, net.features, "encoder", projector, {"no_normalize": True}, pixels={"mean": None})


@layout("Spijkervet/SimCLR, Lightning", "`model.encoder` (`encoder` is the same tensors), `model.projector`",
        flags="`--no-normalize`")  # fmt: skip
def spijkervet_lightning(tmp_path):
    net, projector = fresh(), mlp(32, 32, 12, bias=False, last_bias=False)
    inner = Tree(encoder=net, projector=projector)
    tree = {"state_dict": Tree(encoder=net, model=inner).state_dict(), "epoch": 3, "loops": {"a": torch.ones(1)}}
    return Case(tree, net.features, "state_dict.model.encoder", projector)


def patrickhua_projector(last):
    block = lambda i, o, act: nn.Sequential(nn.Linear(i, o), nn.BatchNorm1d(o), *([nn.ReLU()] if act else []))
    return trained(Tree(layer1=block(32, 24, True), layer2=block(24, 24, True), layer3=block(24, last, False)))


@layout("PatrickHua/SimSiam", "`backbone` (`encoder.0` is the same tensors), `projector.layer1..3`",
        flags="`--projector-layers 2` for its CIFAR runs, which leave layer2 out")  # fmt: skip
def patrickhua(tmp_path):
    net, parts = fresh(stem=3), patrickhua_projector(24)
    whole = Tree(backbone=net, projector=parts, encoder=nn.Sequential(net, parts), predictor=mlp(24, 8, 24, norm=True))
    chain = nn.Sequential(parts.layer1, parts.layer3)
    return Case({"epoch": 1, "state_dict": put("module.", whole.state_dict())}, net.features, "state_dict.backbone",
                chain, {"projector_layers": 2}, size=32, pixels={"interpolation": "bicubic"})  # fmt: skip


@layout("PatrickHua/SimSiam, byol", "`backbone` (`online_encoder.0`), `projector`", "online, not target")
def patrickhua_byol(tmp_path):
    net, parts = fresh(stem=3), patrickhua_projector(24)
    online = nn.Sequential(net, parts)
    target = nn.Sequential(fresh(stem=3), patrickhua_projector(24))
    whole = Tree(backbone=net, projector=parts, online_encoder=online, target_encoder=target,
                 online_predictor=mlp(24, 8, 24, norm=True))  # fmt: skip
    chain = nn.Sequential(parts.layer1, parts.layer2, parts.layer3)
    return Case({"epoch": 1, "state_dict": whole.state_dict()}, net.features, "state_dict.backbone", chain, size=32)


class SimClrV2(nn.Module):
    """Separius/SimCLRv2-Pytorch's module tree, with or without selective kernels."""

    def __init__(self, selective, depths=(1, 2), width=8):
        super().__init__()
        bn_relu = lambda c, relu=True: nn.Sequential(nn.BatchNorm2d(c), nn.ReLU() if relu else nn.Identity())
        conv = lambda i, o, k=1, s=1: nn.Conv2d(i, o, k, s, (k - 1) // 2, bias=False)
        half = width // 2
        stem = [conv(3, half, 3, 2), bn_relu(half), conv(half, half, 3), bn_relu(half), conv(half, width, 3)]
        first = nn.Sequential(*(stem if selective else [conv(3, width, 7, 2)]), bn_relu(width), nn.MaxPool2d(3, 2, 1))
        stages, inputs = [first], width
        for stage in range(4):
            out, blocks = width * 2**stage, []
            for index in range(depths[stage % 2]):
                stride = 2 if stage and not index else 1
                block = Tree()
                if not index:
                    short = conv(inputs, out * 4, 1, stride)
                    if selective:
                        short = nn.Sequential(
                            nn.ZeroPad2d((0, 1, 0, 1)), nn.AvgPool2d(2, stride), conv(inputs, out * 4)
                        )
                    block.projection = Tree(shortcut=short, bn=bn_relu(out * 4, False))
                middle = [conv(out, out, 3, stride), bn_relu(out)]
                if selective:
                    mixing = nn.Sequential(conv(out, 32), bn_relu(32), conv(32, 2 * out))
                    middle = [Tree(main_conv=nn.Sequential(conv(out, 2 * out, 3, stride), bn_relu(2 * out)),
                                   mixing_conv=mixing)]  # fmt: skip
                block.net = nn.Sequential(conv(inputs, out), bn_relu(out), *middle, conv(out, out * 4),
                                          bn_relu(out * 4, False))  # fmt: skip
                blocks.append(block)
                inputs = out * 4
            stages.append(Tree(blocks=nn.Sequential(*blocks)))
        self.net, self.fc = nn.Sequential(*stages), nn.Linear(inputs, 10)

    def forward(self, x):
        x = self.net[0](x)
        for stage in self.net[1:]:
            for block in stage.blocks:
                short = x
                if hasattr(block, "projection"):
                    short = block.projection.bn(block.projection.shortcut(x))
                for layer in block.net:
                    x = layer(x) if not hasattr(layer, "mixing_conv") else self.mixed(layer, x)
                x = torch.relu(short + x)
        return x.mean((2, 3))

    @staticmethod
    def mixed(layer, x):
        both = torch.stack(layer.main_conv(x).chunk(2, 1))
        weights = torch.stack(layer.mixing_conv(both.sum(0).mean((2, 3), keepdim=True)).chunk(2, 1))
        return (both * weights.softmax(0)).sum(0)


def simclrv2(selective):
    net, head = (
        trained(SimClrV2(selective)),
        mlp(256, 256, 256, 12, bias=False, last_bias=False, norm=True, last_norm=True),
    )
    tree = {"resnet": net.state_dict(), "head": put("layers.", head.state_dict())}
    return Case(tree, net, "resnet", head, pixels={"mean": None, "std": None})


@layout("Separius/SimCLRv2-Pytorch, sk0", "`resnet`, `head`; not the supervised `fc`")
def simclrv2_plain(tmp_path):
    return simclrv2(False)


@layout("Separius/SimCLRv2-Pytorch, sk1", "`resnet` with selective kernels, `head`")
def simclrv2_selective(tmp_path):
    return simclrv2(True)


def shortcut(state):
    return {key.replace("downsample", "shortcut"): value for key, value in state.items()}


@layout("HobbitLong/SupContrast", "`encoder`, `head`; mean and std from its `opt`")
def supcontrast(tmp_path):
    net, head = fresh(stem=3), mlp(32, 32, 12)
    opt = argparse.Namespace(model="resnet50", dataset="cifar100", mean=None, std=None)
    state = put("encoder.module.", shortcut(net.state_dict())) | put("head.", head.state_dict())
    tree = {"opt": opt, "model": state, "optimizer": optimizer(), "epoch": 1}
    return Case(tree, net.features, "model.encoder", head, size=32, pixels={"mean": (0.5071, 0.4867, 0.4408)})


@layout(
    "HobbitLong/PyContrast",
    "`encoder`, `head`",
    flags="`--branch` if it has an EMA copy; CMC's Lab encoders are refused",
)
def pycontrast(tmp_path):
    net, head = fresh(), mlp(32, 32, 12)
    tree = {"model": put("module.", Tree(encoder=net, head=head).state_dict()), "contrast": {"memory": torch.ones(9)},
            "model_ema": put("module.", other(Tree(encoder=net, head=head).state_dict())), "epoch": 1}  # fmt: skip
    return Case(tree, net.features, "model.encoder", head, {"branch": "model.encoder"})


@layout("akamaster/pytorch_resnet_cifar10", "all but the classifier `linear`; shortcuts without weights (option A)")
def akamaster(tmp_path):
    from collapse.models.resnet import ResNet, ResNetShape

    net = trained(ResNet(ResNetShape((1, 1, 1), (16, 32, 64), stem=3, stem_planes=16, pad_shortcut=True)))
    state = {key: value for key, value in net.state_dict().items() if "num_batches" not in key}
    state = put("module.", state | put("linear.", nn.Linear(64, 10).state_dict()))
    path = tmp_path / "resnet.th"
    torch.save({"state_dict": state, "best_prec1": 91.7}, path, _use_new_zipfile_serialization=False)
    return Case(path, net, "state_dict", size=32, pixels={"crop": 32, "mean": (0.485, 0.456, 0.406)})


@layout("lightly-ai/lightly, examples", "`backbone` (a sequence), `projection_head.layers`", "online, not momentum")
def lightly_examples(tmp_path):
    net = fresh()
    head = mlp(32, 32, 12, bias=False, last_bias=False, norm=True, last_norm=True)
    parts = Tree(backbone=sequence(net), projection_head=Tree(layers=head), prediction_head=mlp(12, 8, 12),
                 backbone_momentum=copy.deepcopy(sequence(fresh())), criterion=Tree())  # fmt: skip
    tree = {"state_dict": parts.state_dict() | {"criterion.memory_bank.bank": torch.ones(3, 3)}, "epoch": 1}
    return Case(tree, net.features, "state_dict.backbone", head)


@layout("lightly-ai/lightly, benchmarks (MoCo, BYOL)", "`backbone`, `projection_head`", "online, not `key_backbone`; "
        "`backbone` with `student_` or `query_backbone` alone is ambiguous: its meaning changed between versions",
        "`--branch` where ambiguous")  # fmt: skip
def lightly_benchmarks(tmp_path):
    net, head = fresh(), mlp(32, 32, 12, norm=True)
    parts = Tree(backbone=net, projection_head=Tree(layers=head), key_backbone=fresh(), online_classifier=mlp(32, 5),
                 key_projection_head=Tree(layers=mlp(32, 32, 12, norm=True)))  # fmt: skip
    hyper = {"batch_size_per_device": 8, "num_classes": 5}
    return Case(
        {"state_dict": parts.state_dict(), "hyper_parameters": hyper}, net.features, "state_dict.backbone", head
    )


@layout("lightly-ai/lightly, old CLI", "`model.backbone`, `model.projection_head`; shortcuts called `shortcut`")
def lightly_old(tmp_path):
    net, head = fresh(stem=3), mlp(32, 32, 12)
    state = put("model.backbone.", shortcut(sequence(net, False).state_dict()))
    state |= put("model.projection_head.", head.state_dict())
    return Case({"state_dict": state}, net.features, "state_dict.model.backbone", head, size=32)


@layout("lightly-ai/lightly-train, .ckpt", "`embedding_model`, `projection_head`; mean and std from the file",
        "teacher for DINO; student for distillation")  # fmt: skip
def lightly_train(tmp_path):
    net, head = fresh(), mlp(32, 32, 12, bias=False, norm=True)
    parts = Tree(embedding_model=Tree(wrapped_model=Tree(_features=net)), projection_head=Tree(layers=head))
    normalize = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    tree = {"state_dict": parts.state_dict(), "lightly_train": {"models": {}, "normalize_args": normalize}, "epoch": 1}
    return Case(tree, net.features, "state_dict.embedding_model.wrapped_model._features", head,
                pixels={"mean": (0.1, 0.2, 0.3)})  # fmt: skip


@layout("lightly-ai/lightly-train, distillation", "`student_embedding_model`", "student, not the foundation model")
def lightly_train_distilled(tmp_path):
    net, teacher = fresh(), fresh()
    parts = Tree(student_embedding_model=Tree(wrapped_model=Tree(_features=net)),
                 teacher_embedding_model=Tree(wrapped_model=Tree(_features=teacher)),
                 student_projection_head=nn.Linear(32, 32))  # fmt: skip
    state = parts.state_dict() | {"teacher_queue": torch.ones(4, 32)}
    branch = "state_dict.student_embedding_model.wrapped_model._features"
    return Case({"state_dict": state}, net.features, branch, parts.student_projection_head)


@layout("lightly-ai/lightly-train, exported_last.pt", "all; not the random `fc`")
def lightly_train_exported(tmp_path):
    net = fresh(fc=nn.Linear(32, 1000))
    return Case(net.state_dict(), net.features, "(top)")


@layout("vturrisi/solo-learn", "`backbone`, `projector`; with its args.json beside it the 3 x 3 stem pads by 2",
        "online, not momentum", "`--stem-padding 2` for CIFAR without args.json")  # fmt: skip
def solo_learn(tmp_path):
    net, projector = fresh(stem=3, padding=2), mlp(32, 32, 12, norm=True)
    parts = Tree(backbone=net, projector=projector, momentum_backbone=fresh(stem=3), classifier=nn.Linear(32, 10),
                 momentum_projector=mlp(32, 32, 12, norm=True), predictor=mlp(12, 8, 12))  # fmt: skip
    return Case({"state_dict": parts.state_dict(), "epoch": 1}, net.features, "state_dict.backbone", projector, size=32,
                pixels={"std": (0.247, 0.243, 0.261)},
                neighbours={"args.json": '{"backbone": "resnet18", "dataset": "cifar10"}'})  # fmt: skip


@layout("facebookresearch/vissl", "`trunk`, `heads`", "base_model; DINO's momentum teacher makes it ambiguous")
def vissl(tmp_path):
    net, head = fresh(), mlp(32, 32, 12)
    trunk, heads = put("_feature_blocks.", net.state_dict()), put("0.clf.", head.state_dict())
    tree = {"iteration": 1, "phase_idx": 0, "classy_state_dict": {
        "base_model": {"model": {"trunk": trunk, "heads": heads}, "meta": {}}, "loss": {"center": torch.ones(1, 3)},
        "meters": [{"x": 1}], "optimizer": optimizer()}}  # fmt: skip
    return Case(tree, net.features, "classy_state_dict.base_model.model.trunk", head)


@layout("open-mmlab/mmselfsup, mmpretrain", "`backbone`, `neck`; averaged weights are in `state_dict`", "online")
def openmmlab(tmp_path):
    net = fresh()
    fc0, bn0, fc1, bn1 = nn.Linear(32, 24), nn.BatchNorm1d(24), nn.Linear(24, 12, bias=False), nn.BatchNorm1d(12)
    neck = trained(Tree(fc0=fc0, bn0=bn0, fc1=fc1, bn1=bn1))
    parts = Tree(
        backbone=net, neck=neck, head=Tree(predictor=mlp(12, 8, 12)), encoder_k=Tree(module=nn.Sequential(fresh()))
    )
    state = parts.state_dict() | {"encoder_k.steps": torch.zeros(()), "queue": torch.ones(12, 4)}
    tree = {"meta": {"epoch": 1}, "state_dict": state, "message_hub": {"log_scalars": {"a": exclude_bias_and_norm}},
            "ema_state_dict": put("module.", other(state)), "optimizer": optimizer()}  # fmt: skip
    return Case(tree, net.features, "state_dict.backbone", nn.Sequential(fc0, bn0, nn.ReLU(), fc1, bn1))


@layout("rbalestr-lab/stable-pretraining", "`backbone`, `projector`; not the probes in `callbacks_modules`",
        "teacher of a TeacherStudentWrapper")  # fmt: skip
def stable_pretraining(tmp_path):
    net, projector = fresh(stem=3), mlp(32, 32, 12, norm=True)
    pair = lambda student, teacher: Tree(student=student, teacher=teacher)
    parts = Tree(backbone=pair(fresh(stem=3), net), projector=pair(mlp(32, 32, 12, norm=True), projector),
                 predictor=mlp(12, 8, 12), callbacks_modules=Tree(linear_probe=nn.Linear(32, 10)))  # fmt: skip
    state = parts.state_dict() | {"backbone.ema_coefficient": torch.tensor(0.9), "callbacks_metrics.x": torch.zeros(1)}
    tree = {"state_dict": state, "hyper_parameters": {"system.working_dir": "/w"}, "epoch": 1}
    return Case(tree, net.features, "state_dict.backbone.teacher", projector, size=32)


@layout("lightning-bolts, SimCLR", "`encoder`, `projection.model`; `maxpool1` from its hyper-parameters")
def bolts_simclr(tmp_path):
    net, projection = fresh(stem=3, maxpool=True), mlp(32, 32, 12, last_bias=False, norm=True)
    tree = {
        "state_dict": Tree(encoder=net, projection=Tree(model=projection)).state_dict(),
        "hyper_parameters": {"arch": "resnet18", "first_conv": False, "maxpool1": True, "dataset": "cifar10"},
    }
    return Case(tree, net.features, "state_dict.encoder", projection, size=32)


@layout("lightning-bolts, BYOL, SimSiam", "`online_network.encoder`, `online_network.projector`", "online, not target")
def bolts_byol(tmp_path):
    net, projector = fresh(), mlp(32, 32, 12, norm=True)
    online = Tree(encoder=net, projector=projector, predictor=mlp(12, 8, 12, norm=True))
    target = Tree(encoder=fresh(), projector=mlp(32, 32, 12, norm=True))
    tree = {"state_dict": Tree(online_network=online, target_network=target).state_dict()}
    return Case(tree, net.features, "state_dict.online_network.encoder", projector)


@layout("tonylins/simclr-converter", "all, widths 1, 2 and 4", flags="`--no-normalize --resize 256 --crop 224`")
def tonylins(tmp_path):
    net = fresh(bottleneck=True, widths=(16, 32, 48, 64), fc=nn.Linear(256, 1000))
    known = {"no_normalize": True, "resize": 256, "crop": 224}
    return Case({"state_dict": net.state_dict()}, net.features, "state_dict", None, known, pixels={"mean": None})


@layout(
    "nn.DataParallel, DDP, torch.compile, FSDP", "`module`, `_orig_mod`, `_fsdp_wrapped_module` are dropped anywhere"
)
def wrapped(tmp_path):
    net = fresh()
    state = put("module._orig_mod.backbone._fsdp_wrapped_module.", net.state_dict())
    return Case({"model": state}, net.features, "model.backbone")


@layout("a whole pickled nn.Module", "its parameters and buffers; the class is not imported")
def whole_module(tmp_path):
    net = fresh(fc=nn.Linear(32, 5))
    return Case({"model": net, "epoch": 1}, net.features, "model")


@layout("torch.distributed.checkpoint (FSDP2, DCP folder)", "the tensors of all its parts")
def dcp(tmp_path):
    import torch.distributed.checkpoint as distributed

    net = fresh()
    path = tmp_path / "dcp"
    distributed.save({"model": put("backbone.", net.state_dict()), "epoch": 3}, checkpoint_id=path)
    return Case(path, net.features, "model.backbone")
