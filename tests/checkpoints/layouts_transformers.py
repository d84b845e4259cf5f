"""Transformers and pyramids in the layouts of other projects, written by timm, torchvision, transformers, open_clip."""

import argparse
import json
import re
import warnings
from functools import partial
from itertools import pairwise

import timm
import torch
import torch.nn.functional as F
from layouts import Case, Tree, layout, mlp, optimizer, other, put, trained
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def vit(**options):
    """timm's transformer, small: what DINO, MAE, I-JEPA and others copied their names and code from."""
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3, "num_classes": 0,
             "norm_layer": partial(nn.LayerNorm, eps=1e-6)}  # fmt: skip
    net = trained(VisionTransformer(**small | options))
    nn.init.normal_(net.pos_embed, std=0.5)
    return net


def normalized(chain):
    return nn.Sequential(*chain)


@layout("timm, bare state dict", "all but `head`", flags="`--heads` where a width has several")
def timm_bare(tmp_path):
    net = vit(num_classes=10)
    return Case(
        net.state_dict(), lambda x: net.forward_head(net.forward_features(x), pre_logits=True), "(top)", size=32
    )


@layout("timm, train.py", "`state_dict`; the network, mean and std of its `arch`", "`--branch` if it has an EMA copy")
def timm_saver(tmp_path):
    net = trained(timm.create_model("test_vit", num_classes=10))
    args = argparse.Namespace(model="test_vit", img_size=None)
    tree = {"epoch": 1, "arch": "test_vit", "state_dict": net.state_dict(), "args": args, "optimizer": optimizer()}
    features = lambda x: net.forward_head(net.forward_features(x), pre_logits=True)
    return Case(tree, features, "state_dict", size=160, pixels={"mean": (0.5, 0.5, 0.5)})


@layout("timm, Hugging Face hub folder", "the network, mean and std of its config.json")
def timm_hub(tmp_path):
    from timm.models import save_for_hf

    net = trained(timm.create_model("test_efficientnet", num_classes=10))
    save_for_hf(net, tmp_path / "hub")
    features = lambda x: net.forward_head(net.forward_features(x), pre_logits=True)
    return Case(tmp_path / "hub", features, "(top)", size=160, pixels={"crop": 160})


@layout("timm, torchvision: any other network", "all, found by names and shapes", flags="`--arch NAME` if several fit")
def timm_named(tmp_path):
    net = trained(timm.create_model("test_convnext", num_classes=0))
    state = {key.replace("conv_dw", "conv_dw"): value for key, value in net.state_dict().items()}
    return Case({"model": state}, net, "model", known={"arch": "test_convnext"}, size=64)


@layout("torchvision, ViT", "all but `heads`")
def torchvision_vit(tmp_path):
    from torchvision.models import VisionTransformer as Vit

    net = trained(Vit(image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=192, mlp_dim=256))
    nn.init.normal_(net.encoder.pos_embedding)
    state = net.state_dict()
    net.heads = nn.Identity()
    return Case(state, net, "(top)", size=32, pixels={"interpolation": "bilinear", "crop": 32})


def dino_head():
    head = mlp(192, 48, 48, 24, act=nn.GELU)
    last = nn.utils.parametrizations.weight_norm(nn.Linear(24, 30, bias=False))
    old = {"last_layer.weight_g": last.parametrizations.weight.original0.detach(),
           "last_layer.weight_v": last.parametrizations.weight.original1.detach()}  # fmt: skip
    return head, put("mlp.", head.state_dict()) | old


@layout("facebookresearch/dino, checkpoint.pth; bytedance/ibot", "`backbone`, `head.mlp` (GELU); not `last_layer`",
        "teacher")  # fmt: skip
def dino(tmp_path):
    net, (head, state) = vit(), dino_head()
    student = put("module.backbone.", other(net.state_dict())) | put("module.head.", other(state))
    tree = {"student": student, "teacher": put("backbone.", net.state_dict()) | put("head.", state), "epoch": 1,
            "args": argparse.Namespace(arch="vit_small"), "dino_loss": {"center": torch.ones(1, 30)},
            "optimizer": optimizer()}  # fmt: skip
    return Case(tree, net, "teacher.backbone", head, size=32, pixels={"interpolation": "bicubic"})


@layout("facebookresearch/dino, backbone only", "all")
def dino_backbone(tmp_path):
    net = vit(depth=3)
    return Case(net.state_dict(), net, "(top)", size=32)


class ConvStem(nn.Module):
    """MoCo-v3's convolutional stem, for timm's transformer."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim, **rest):
        super().__init__()
        layers, widths = [], [in_chans, *(embed_dim // 8 * 2**i for i in range(4))]
        for inputs, outputs in pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.proj = nn.Sequential(*layers, nn.Conv2d(widths[-1], embed_dim, 1))
        self.grid_size, self.num_patches = (2, 2), 4

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def moco_v3(net, head, reference, size, name="head"):
    wrong = other(net.state_dict()) | put(f"{name}.", other(head.state_dict()))
    state = put("module.base_encoder.", net.state_dict() | put(f"{name}.", head.state_dict()))
    state |= put("module.momentum_encoder.", wrong) | put("module.predictor.", mlp(12, 8, 12).state_dict())
    tree = {"epoch": 300, "arch": "vit_small", "state_dict": state, "scaler": {"scale": 1.0}, "optimizer": optimizer()}
    return Case(tree, reference, "state_dict.base_encoder", head, size=size)


@layout("facebookresearch/moco-v3, ViT", "`base_encoder`; its `head` is the projector; ViT-S has 12 heads",
        "base, not momentum", "`--heads 12` for a ViT-S converted to DeiT's format")  # fmt: skip
def moco_v3_vit(tmp_path):
    head = mlp(384, 48, 48, 12, bias=False, last_bias=False, norm=True, last_norm=False)
    net = vit(embed_dim=384, num_heads=12, depth=1)
    return moco_v3(net, head, net, 32)


@layout("facebookresearch/moco-v3, ViT with convolutional stem", "`base_encoder`", "base, not momentum")
def moco_v3_conv(tmp_path):
    head = mlp(192, 48, 48, 12, bias=False, last_bias=False, norm=True, last_norm=False)
    net = vit(patch_size=16, embed_layer=ConvStem)
    return moco_v3(net, head, net, 32)


@layout("facebookresearch/moco-v3, ResNet", "`base_encoder`; its `fc` is the projector", "base, not momentum")
def moco_v3_resnet(tmp_path):
    from layouts import Network

    net, head = Network(), mlp(32, 48, 12, bias=False, last_bias=False, norm=True, last_norm=False)
    return moco_v3(net, head, net.features, 64, "fc")


@layout("facebookresearch/mae, pre-training", "the encoder; not `decoder_*`; the class token", flags="`--pool mean`")
def mae(tmp_path):
    net = vit()
    decoder = {"mask_token": torch.ones(1, 1, 32), "decoder_pos_embed": torch.ones(1, 17, 32),
               "decoder_embed.weight": torch.ones(32, 192), "decoder_blocks.0.attn.qkv.weight": torch.ones(96, 32),
               "decoder_pred.weight": torch.ones(192, 32)}  # fmt: skip
    tree = {"model": net.state_dict() | decoder, "optimizer": optimizer(), "epoch": 1, "scaler": {},
            "args": argparse.Namespace(model="mae_vit_base_patch16")}  # fmt: skip
    return Case(tree, net, "model", size=32)


@layout("facebookresearch/mae, fine-tuned with global pooling", "mean of the patches, then `fc_norm`; not `head`")
def mae_tuned(tmp_path):
    net = vit(global_pool="avg", num_classes=7)
    features = lambda x: net.forward_head(net.forward_features(x), pre_logits=True)
    return Case({"model": net.state_dict()}, features, "model", size=32)


def dinov2_forward(net, x, offset):
    """DINOv2's own resampling of the positions, in timm's transformer."""
    tokens = net.patch_embed.proj(x)
    side, grid = tokens.shape[-1], net.patch_embed.grid_size[0]
    prefix = 0 if net.no_embed_class else 1
    positions = net.pos_embed[:, prefix:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    if offset:
        positions = F.interpolate(positions, scale_factor=((side + 0.1) / grid,) * 2, mode="bicubic", antialias=False)
    else:
        positions = F.interpolate(positions, size=(side, side), mode="bicubic", antialias=True)
    tokens = tokens.flatten(2).transpose(1, 2) + positions.flatten(2).transpose(1, 2)
    first = net.cls_token + (net.pos_embed[:, :1] if prefix else 0)
    parts = [
        first.expand(len(x), -1, -1),
        *([net.reg_token.expand(len(x), -1, -1)] if net.num_reg_tokens else []),
        tokens,
    ]
    return net.norm(net.blocks(torch.cat(parts, 1)))[:, 0]


def dinov2_state(net):
    """timm's state dict under the names of facebookresearch/dinov2."""
    state = {k.replace("reg_token", "register_tokens"): v for k, v in net.state_dict().items()}
    state = {
        k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3") if swiglu(net) else k: v for k, v in state.items()
    }
    if net.num_reg_tokens:
        cls = torch.ones(1, 1, 192) / 7
        state |= {"cls_token": net.cls_token - cls, "pos_embed": torch.cat([cls, net.pos_embed], 1)}
    return state | {"mask_token": torch.zeros(1, 192)}


def swiglu(net):
    return "gate" in str(type(net.blocks[0].mlp)).lower() or type(net.blocks[0].mlp).__name__ in (
        "GluMlp",
        "SwiGLUPacked",
    )


@layout("facebookresearch/dinov2, hub backbones", "all but `mask_token`; positions resampled from 37 x 37 as they do")
def dinov2_hub(tmp_path):
    net = vit(img_size=518, patch_size=14, init_values=0.1)
    return Case(dinov2_state(net), lambda x: dinov2_forward(net, x, True), "(top)", size=56, pixels={"crop": 224})


@layout("facebookresearch/dinov2 with registers", "all; the registers are not pooled; antialiased positions")
def dinov2_registers(tmp_path):
    net = vit(img_size=518, patch_size=14, init_values=0.1, reg_tokens=4, no_embed_class=True)
    return Case(dinov2_state(net), lambda x: dinov2_forward(net, x, False), "(top)", size=56, pixels={"crop": 224})


@layout("facebookresearch/dinov2, giant (SwiGLU)", "all")
def dinov2_giant(tmp_path):
    from timm.layers import SwiGLUPacked

    net = vit(patch_size=16, init_values=0.1, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, mlp_ratio=4)
    return Case(dinov2_state(net), net, "(top)", size=32)


@layout("facebookresearch/dinov2, teacher_checkpoint.pth", "`backbone`, `dino_head.mlp`; chunks of blocks are joined",
        "teacher")  # fmt: skip
def dinov2_training(tmp_path):
    net, (head, state) = vit(init_values=0.1), dino_head()
    chunked = {
        k.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): v
        for k, v in net.state_dict().items()
    }
    tree = {"teacher": put("backbone.", chunked) | put("dino_head.", state) | put("ibot_head.", other(state))}
    tree["teacher"]["backbone.mask_token"] = torch.zeros(1, 192)
    return Case(tree, net, "teacher.backbone", head, size=32)


@layout("facebookresearch/ijepa", "`target_encoder`, mean of the patches", "target encoder")
def ijepa(tmp_path):
    net = vit(class_token=False, global_pool="avg", fc_norm=False)
    predictor = {"predictor_embed.weight": torch.ones(3, 3), "mask_token": torch.ones(1, 1, 3)}
    tree = {"encoder": put("module.", other(net.state_dict())), "target_encoder": put("module.", net.state_dict()),
            "predictor": put("module.", predictor), "opt": optimizer(), "scaler": None, "epoch": 1}  # fmt: skip
    return Case(tree, net, "target_encoder", size=32)


@layout("facebookresearch/msn", "`target_encoder`; its `fc` is the projector (GELU)", "target encoder")
def msn(tmp_path):
    net = vit()
    fc = trained(Tree(fc1=nn.Linear(192, 48), bn1=nn.BatchNorm1d(48), fc2=nn.Linear(48, 48), bn2=nn.BatchNorm1d(48),
                      fc3=nn.Linear(48, 12)))  # fmt: skip
    state = net.state_dict() | put("fc.", fc.state_dict())
    tree = {"target_encoder": put("module.", state), "encoder": put("module.", other(state)), "opt": optimizer(),
            "prototypes": torch.ones(30, 12)}  # fmt: skip
    chain = nn.Sequential(fc.fc1, fc.bn1, nn.GELU(), fc.fc2, fc.bn2, nn.GELU(), fc.fc3)
    return Case(tree, net, "target_encoder", chain, size=32)


@layout("rbalestr-lab/lejepa", "`backbone` with its `head`, which is part of the embedding; `proj` is the projector")
def lejepa(tmp_path):
    from torchvision.ops import MLP

    net, proj = vit(num_classes=96), trained(MLP(96, [48, 48, 12], norm_layer=nn.BatchNorm1d))
    return Case(Tree(backbone=net, proj=proj).state_dict(), net, "backbone", proj, size=32, pixels={"crop": 32})


@layout("lightly-ai/lightly, MAE and I-JEPA with timm", "`backbone.vit`; not `mask_token`, `decoder`")
def lightly_vit(tmp_path):
    net = vit()
    parts = Tree(backbone=Tree(vit=net), decoder=Tree(decoder_embed=nn.Linear(192, 32)))
    state = parts.state_dict() | {
        "backbone.mask_token": torch.ones(1, 1, 192),
        "decoder.mask_token": torch.ones(1, 1, 32),
    }
    return Case({"state_dict": state}, net, "state_dict.backbone.vit", size=32)


@layout("open-mmlab/mmselfsup, mmpretrain, ViT", "`backbone`", flags="`--heads 12` for MoCo-v3 small")
def openmmlab_vit(tmp_path):
    net = vit()
    names = (("patch_embed.proj.", "patch_embed.projection."), ("blocks.", "layers."), (".norm1.", ".ln1."),
             (".norm2.", ".ln2."), ("mlp.fc1.", "ffn.layers.0.0."), ("mlp.fc2.", "ffn.layers.1."))  # fmt: skip
    state = {}
    for key, value in net.state_dict().items():
        for timm_name, mm_name in names:
            key = key.replace(timm_name, mm_name)
        state["ln1" + key[4:] if key.startswith("norm.") else key] = value
    return Case({"meta": {}, "state_dict": put("backbone.", state)}, net, "state_dict.backbone", size=32)


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 32,
         "patch_size": 8}  # fmt: skip


def huggingface(tmp_path, net, take=lambda out: out.last_hidden_state[:, 0], branch="(top)", size=32, **saving):
    trained(net)
    for name, parameter in net.named_parameters():
        if "position_embeddings" in name or "cls_token" in name:
            nn.init.normal_(parameter, std=0.5)
    net.save_pretrained(tmp_path / "hf", **saving)
    (tmp_path / "hf/preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.5], "size": {"height": 32, "width": 32}})
    )
    return Case(
        tmp_path / "hf", lambda x: take(net(x)), branch, size=size, pixels={"mean": (0.5, 0.4, 0.3), "crop": 32}
    )


@layout("transformers, ViT", "all but `pooler`; heads, epsilon, activation of config.json; preprocessor_config.json")
def huggingface_vit(tmp_path):
    from transformers import ViTConfig, ViTModel

    return huggingface(tmp_path, ViTModel(ViTConfig(**SMALL)))


@layout("transformers, shards with an index", "all shards, which must lie beside the index")
def huggingface_shards(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    net = ViTForImageClassification(ViTConfig(**SMALL))
    case = huggingface(tmp_path, net, branch="vit", max_shard_size="50KB")
    case.reference = lambda x: net.vit(x).last_hidden_state[:, 0]
    return case


@layout("transformers 5, torch.save of the state dict", "the same under its names in memory", flags="`--heads`")
def huggingface_memory(tmp_path):
    from transformers import ViTConfig, ViTModel

    net = trained(ViTModel(ViTConfig(**SMALL)))
    return Case(net.state_dict(), lambda x: net(x).last_hidden_state[:, 0], "(top)", known={"heads": 4}, size=32)


@layout("transformers, ViTMAE", "`vit`; not `decoder`")
def huggingface_mae(tmp_path):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(**SMALL, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
                          decoder_intermediate_size=32, mask_ratio=0.0)  # fmt: skip
    net = ViTMAEForPreTraining(config)
    case = huggingface(tmp_path, net, branch="vit")
    case.reference = lambda x: net.vit(x).last_hidden_state[:, 0]
    return case


@layout("transformers, ViTMSN", "all")
def huggingface_msn(tmp_path):
    from transformers import ViTMSNConfig, ViTMSNModel

    return huggingface(tmp_path, ViTMSNModel(ViTMSNConfig(**SMALL)))


@layout("transformers, I-JEPA", "all, mean of the patches")
def huggingface_ijepa(tmp_path):
    from transformers import IJepaConfig, IJepaModel

    return huggingface(tmp_path, IJepaModel(IJepaConfig(**SMALL)), lambda out: out.last_hidden_state.mean(1))


@layout("transformers, DINOv2", "all but `mask_token`; positions resampled as there")
def huggingface_dinov2(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    return huggingface(tmp_path, Dinov2Model(Dinov2Config(**SMALL, layerscale_value=0.3)), size=48)


@layout("transformers, DINOv2 with SwiGLU", "all but `mask_token`")
def huggingface_dinov2_giant(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    return huggingface(tmp_path, Dinov2Model(Dinov2Config(**SMALL, layerscale_value=0.3, use_swiglu_ffn=True)))


@layout("transformers, DINOv2 with registers", "all but `mask_token`; the registers are not pooled")
def huggingface_registers(tmp_path):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    net = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, num_register_tokens=4, layerscale_value=0.3))
    return huggingface(tmp_path, net)


@layout("transformers, CLIP", "`vision_model` and `visual_projection`: the image embedding; not the text tower")
def huggingface_clip(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 50,
    }
    net = CLIPModel(CLIPConfig(text_config=text, vision_config=SMALL, projection_dim=24))
    case = huggingface(tmp_path, net, branch="vision_model")
    case.reference = lambda x: net.visual_projection(net.vision_model(pixel_values=x).pooler_output)
    return case


@layout("transformers, ResNet", "all; `downsample_in_bottleneck` is refused")
def huggingface_resnet(tmp_path):
    from transformers import ResNetConfig, ResNetModel

    net = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[32, 48, 64, 96], depths=[1, 2, 1, 1]))
    return huggingface(tmp_path, net, lambda out: out.pooler_output.flatten(1), size=64)


@layout("transformers, ConvNeXt, ConvNeXt-V2", "all, mean of the map, then `layernorm`")
def huggingface_convnext(tmp_path):
    from transformers import ConvNextV2Config, ConvNextV2Model

    net = ConvNextV2Model(ConvNextV2Config(hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 1, 1]))
    return huggingface(tmp_path, net, lambda out: out.pooler_output, size=64)


@layout("transformers, Swin", "all, mean of the map after `layernorm`")
def huggingface_swin(tmp_path):
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(embed_dim=16, depths=[2, 2], num_heads=[1, 2], image_size=32, window_size=4)
    return huggingface(tmp_path, SwinModel(config), lambda out: out.pooler_output)


@layout("facebookresearch/ConvNeXt, timm's ConvNeXt", "all but `head`")
def convnext(tmp_path):
    from timm.models.convnext import ConvNeXt

    net = trained(ConvNeXt(depths=(1, 2, 1, 1), dims=(8, 16, 24, 32), num_classes=0))
    state = {}
    for key, value in net.state_dict().items():
        key = key.replace("stem.", "downsample_layers.0.").replace(".blocks.", ".").replace("conv_dw", "dwconv")
        key = key.replace("mlp.fc", "pwconv").replace("head.norm", "norm")
        for stage in (1, 2, 3):
            key = key.replace(f"stages.{stage}.downsample.", f"downsample_layers.{stage}.")
        state[key] = value
    return Case({"model": state | put("head.", nn.Linear(32, 5).state_dict())}, net, "model", size=64)


@layout("microsoft/Swin-Transformer, timm's Swin", "all but `head`; not the buffers that follow from its sizes")
def swin(tmp_path):
    from timm.models.swin_transformer import SwinTransformer

    net = SwinTransformer(img_size=32, patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4,
                          num_classes=0)  # fmt: skip
    trained(net)
    state = {
        key.replace("layers.1.downsample", "layers.0.downsample"): value for key, value in net.state_dict().items()
    }
    state |= {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.long)}
    return Case({"model": state | put("head.", nn.Linear(32, 5).state_dict())}, net, "model", size=32)


def clip(vision, quick):
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    text = CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=2, layers=1)
    net = trained(CLIP(24, CLIPVisionCfg(**vision), text, quick_gelu=quick))
    for name, parameter in net.visual.named_parameters():
        if "positional" in name or "class" in name:
            nn.init.normal_(parameter, std=0.5)
    return net


TOWER = {"layers": 2, "width": 192, "head_width": 64, "patch_size": 8, "image_size": 32}


@layout("openai/CLIP, ViT archive", "`visual` with its projection, QuickGELU; the archive's code is not run")
def openai_clip(tmp_path):
    net = clip(TOWER, True)

    class Visual(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = net.visual

        def forward(self, x):
            return self.visual(x)

    path = tmp_path / "ViT.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a tracer's
        torch.jit.trace(Visual().eval(), torch.randn(1, 3, 32, 32)).save(path)
    return Case(path, net.encode_image, "visual", size=32, pixels={"mean": (0.48145466, 0.4578275, 0.40821073)})


@layout("openai/CLIP, ResNet", "`visual`: what its attention pool gives")
def openai_clip_resnet(tmp_path):
    vision = {"layers": (1, 2, 1, 1), "width": 8, "head_width": 64, "image_size": 64}
    net = clip(vision, True)
    return Case(net.state_dict(), net.encode_image, "visual", size=64, pixels={"resize": 64, "crop": 64})


@layout("mlfoundations/open_clip, training checkpoint", "`visual`; GELU or QuickGELU by its `name`",
        flags="`--activation` for a bare state dict")  # fmt: skip
def open_clip_training(tmp_path):
    net = clip(TOWER, False)
    tree = {
        "epoch": 1,
        "name": "ViT-B-32-run",
        "state_dict": put("module.", net.state_dict()),
        "optimizer": optimizer(),
    }
    return Case(tree, net.encode_image, "state_dict.visual", size=32)


@layout("mlfoundations/open_clip, hub folder", "`visual`; activation, mean and std of open_clip_config.json")
def open_clip_hub(tmp_path):
    from safetensors.torch import save_file

    net, folder = clip(TOWER, True), tmp_path / "hub"
    folder.mkdir()
    save_file(
        {key: value.contiguous() for key, value in net.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    config = {"model_cfg": {"quick_gelu": True}, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.5, 0.5]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return Case(folder, net.encode_image, "visual", size=32, pixels={"mean": (0.5, 0.4, 0.3)})


@layout("mlfoundations/open_clip, timm tower", "`visual.trunk` and `visual.head.proj`", flags="`--heads`")
def open_clip_timm(tmp_path):
    net, proj = vit(), nn.Linear(192, 24, bias=False)
    state = put("visual.trunk.", net.state_dict()) | put("visual.head.proj.", proj.state_dict())
    state |= {"text.transformer.resblocks.0.ln_1.weight": torch.ones(3), "logit_scale": torch.ones(())}
    return Case(state, lambda x: proj(net(x)), "visual.trunk", size=32)


def siglip(tmp_path, net, branch):
    vision = net.vision_model if hasattr(net, "vision_model") else net
    return huggingface(tmp_path, net, branch=branch), lambda x: vision(pixel_values=x).pooler_output


@layout("transformers, SigLIP", "`vision_model`, pooled by its attention: the image embedding; not the text tower")
def huggingface_siglip(tmp_path):
    from transformers import SiglipConfig, SiglipModel

    text = {**SMALL, "num_hidden_layers": 1, "vocab_size": 50}
    net = SiglipModel(SiglipConfig(text_config=text, vision_config={**SMALL, "hidden_act": "gelu_pytorch_tanh"}))
    nn.init.normal_(net.vision_model.head.attention.in_proj_bias)
    case, case.reference = siglip(tmp_path, net, "vision_model")
    return case


@layout("timm and open_clip, SigLIP", "all, pooled by attention", flags="`--heads`")
def timm_siglip(tmp_path):
    net = vit(class_token=False, global_pool="map", act_layer="gelu_tanh")
    nn.init.normal_(net.attn_pool.q.bias)
    state = put("visual.trunk.", net.state_dict()) | {"logit_scale": torch.ones(1), "logit_bias": torch.ones(1)}
    return Case(state, net, "visual.trunk", size=32, pixels={"mean": (0.5, 0.5, 0.5)})


class SwinStem(nn.Module):
    """CTransPath's patch embedding."""

    def __init__(self):
        super().__init__()
        first = [nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
        second = [nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        self.proj, self.norm = nn.Sequential(*first, *second, nn.Conv2d(8, 32, 1)), nn.LayerNorm(32)

    def forward(self, x):
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


@layout("Xiyue-Wang/TransPath (CTransPath), hms-dbmi/CHIEF", "Swin behind convolutions; not the buffers")
def ctranspath(tmp_path):
    from timm.models.swin_transformer import SwinTransformer

    net = SwinTransformer(img_size=56, embed_dim=32, depths=(1, 2), num_heads=(1, 2), window_size=7, num_classes=0)
    net.patch_embed = SwinStem()
    trained(net)
    state = {key.replace("layers.1.downsample", "layers.0.downsample"): v for key, v in net.state_dict().items()}
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    return Case({"model": state}, net, "model", size=56)


def fcmae_names(net):
    """timm's ConvNeXt-V2 under its authors' names, without the last norm, which their pre-training lacks."""
    state = {}
    for key, value in net.state_dict().items():
        key = re.sub(r"^stem\.", "downsample_layers.0.", key)
        key = re.sub(r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1.", key)
        key = re.sub(r"^stages\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2.", key)
        key = key.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        if "mlp.grn" in key:
            key, value = key.replace("mlp.grn.weight", "grn.gamma").replace("mlp.grn.bias", "grn.beta"), value[None]
        if not key.startswith("head."):
            state[key] = value
    return state


def sparse(key, value):
    """A tensor as MinkowskiEngine's layers keep it: kernels (k^2, inputs, outputs), columns before rows."""
    if key.startswith("downsample_layers.0."):
        return key, value
    if value.ndim == 4:
        kernel = value.permute(3, 2, 1, 0).flatten(0, 1)
        return key.replace("weight", "kernel"), kernel[:, 0] if "dwconv" in key else kernel
    if "pwconv" in key:
        return re.sub(r"(pwconv\d)\.", r"\1.linear.", key), value
    if re.search(r"(norm|downsample_layers\.\d\.0)\.(weight|bias)$", key):
        return re.sub(r"\.(weight|bias)$", r".ln.\1", key), value
    return key, value[None] if key.endswith("bias") else value


def convnext_v2():
    from timm.models.convnext import ConvNeXt

    net = trained(ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=0, use_grn=True, ls_init_value=None))
    for name, parameter in net.named_parameters():
        if "grn" in name:
            nn.init.normal_(parameter)
    return net, lambda x: net.forward_features(x).mean((2, 3))


@layout("facebookresearch/ConvNeXt-V2, FCMAE's released encoders", "all, mean of the map: there is no last norm")
def fcmae(tmp_path):
    net, features = convnext_v2()
    return Case({"model": fcmae_names(net)}, features, "model")


@layout("facebookresearch/ConvNeXt-V2, FCMAE pre-training", "`encoder`, its sparse convolutions as usual ones")
def fcmae_training(tmp_path):
    net, features = convnext_v2()
    state = put("encoder.", dict(sparse(key, value) for key, value in fcmae_names(net).items()))
    state |= {"mask_token": torch.ones(1, 16, 1, 1), "decoder.0.dwconv.weight": torch.ones(16, 1, 7, 7),
              "pred.weight": torch.ones(48, 16, 1, 1), "proj.weight": torch.ones(16, 32, 1, 1)}  # fmt: skip
    return Case({"model": state, "epoch": 1}, features, "model.encoder")


def by_transformers(tmp_path, kind, take=lambda out: out.pooler_output.flatten(1), size=32, task=None, **config):
    """A folder of a kind that transformers builds; task: the class around the encoder that saved it."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    made = CONFIG_MAPPING[kind](**config)
    net = (getattr(transformers, task) if task else MODEL_MAPPING[type(made)])(made)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    branch = net.base_model_prefix if task else "(top)"
    case = huggingface(tmp_path, net, branch=branch, size=size)
    inner = getattr(net, branch) if task else net
    case.reference = lambda x: take(inner(x))
    return case


POOLER = "what its pooler gives"


@layout("transformers, DINOv3 ViT", POOLER)
def huggingface_dinov3(tmp_path):
    return by_transformers(tmp_path, "dinov3_vit", **SMALL, num_register_tokens=2)


@layout("transformers, DINOv3 ConvNeXt", POOLER)
def huggingface_dinov3_convnext(tmp_path):
    sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "image_size": 64}
    return by_transformers(tmp_path, "dinov3_convnext", size=64, **sizes)


@layout("transformers, BEiT", "what its pooler gives; without one the class token", flags="`--pool`")
def huggingface_beit(tmp_path):
    return by_transformers(tmp_path, "beit", task="BeitForImageClassification", **SMALL, num_labels=5)


@layout("transformers, data2vec-vision", "the class token; fine-tuned, what its pooler gives", flags="`--pool`")
def huggingface_data2vec(tmp_path):
    return by_transformers(tmp_path, "data2vec-vision", lambda out: out.last_hidden_state[:, 0], **SMALL)


@layout("transformers, Swin V2", POOLER)
def huggingface_swin_v2(tmp_path):
    sizes = {"embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2], "image_size": 32, "window_size": 4}
    return by_transformers(tmp_path, "swinv2", **sizes)


@layout("transformers, AIMv2", "its attention's pool")
def huggingface_aimv2(tmp_path):
    return by_transformers(tmp_path, "aimv2_vision_model", **SMALL)


@layout("transformers, Hiera", "what its pooler gives; without one the mean", flags="`--pool`")
def huggingface_hiera(tmp_path):
    sizes = {"embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8], "image_size": [64, 64]}
    return by_transformers(tmp_path, "hiera", size=64, **sizes)


@layout("transformers, SAM", "the vision encoder, mean of its map; not the prompts and masks")
def huggingface_sam(tmp_path):
    sizes = {**SMALL, "window_size": 2, "global_attn_indexes": [1], "output_channels": 16, "mlp_dim": 48}
    case = by_transformers(tmp_path, "sam_vision_model", lambda out: out.last_hidden_state.mean((2, 3)), **sizes)
    return case


@layout("facebookresearch/segment-anything", "the image encoder, mean of its map; not the prompts and masks")
def segment_anything(tmp_path):
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    net = ImageEncoderViT(
        img_size=64, patch_size=8, embed_dim=48, depth=3, num_heads=3, mlp_ratio=2.5, out_chans=20, qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True, window_size=3, global_attn_indexes=(1,),
    )  # fmt: skip
    decoder = MaskDecoder(transformer_dim=20, transformer=TwoWayTransformer(1, 20, 2, 24))
    sam = trained(Sam(net, PromptEncoder(20, (8, 8), (64, 64), 4), decoder))
    return Case(sam.state_dict(), lambda x: net(x).mean((2, 3)), "image_encoder", size=64)


@layout("transformers, RegNet, MobileNet, EfficientNet, LeViT, FocalNet, PVT-v2, BiT, DeiT", "what its pooler gives, "
        "the class token, or the mean, as its classifier takes it")  # fmt: skip
def huggingface_regnet(tmp_path):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "groups_width": 8}
    return by_transformers(tmp_path, "regnet", size=64, **sizes)


@layout("transformers, RADIO", "its summary: the class tokens that it names")
def huggingface_radio(tmp_path):
    sizes = {**SMALL, "mlp_ratio": 2.0, "patch_size": 8, "max_img_size": 64, "num_cls_tokens": 2, "num_registers": 2}
    case = by_transformers(tmp_path, "radio", lambda out: out.summary, **sizes, patch_dim=192)
    (tmp_path / "hf/preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "size": 32}))
    case.pixels = {"mean": None, "crop": 32}  # the network takes the mean off itself
    return case


@layout("transformers, SigLIP 2 with NaFlex", "the vision encoder, pooled by its attention, of square images")
def huggingface_naflex(tmp_path):
    from transformers import Siglip2Config
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches
    from transformers.models.siglip2.modeling_siglip2 import Siglip2Model

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    vision = {**sizes, "num_patches": 16, "patch_size": 8}
    texts = {**sizes, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "projection_size": 32}
    net = trained(Siglip2Model(Siglip2Config(vision_config=vision, text_config=texts)))
    case = huggingface(tmp_path, net, branch="vision_model", size=32)

    def reference(images):
        cut = torch.stack([convert_image_to_patches(image, 8) for image in images])
        grid = torch.tensor([[4, 4]] * len(images))
        ones = torch.ones(cut.shape[:2], dtype=torch.int32)
        return net.vision_model(cut, pixel_attention_mask=ones, spatial_shapes=grid).pooler_output

    case.reference = reference
    return case


@layout("mlfoundations/open_clip, CoCa", "`visual`, its attention's first query and projection; not `text_decoder`",
        flags="`--activation` for a bare state dict")  # fmt: skip
def open_clip_coca(tmp_path):
    from open_clip.coca_model import CoCa

    vision = {"image_size": 64, "layers": 2, "width": 64, "head_width": 16, "patch_size": 16, "attentional_pool": True,
              "attn_pooler_heads": 4, "output_tokens": True}  # fmt: skip
    text = {"context_length": 16, "vocab_size": 60, "width": 32, "heads": 2, "layers": 1}
    config = {
        "embed_dim": 32, "vision_cfg": vision, "text_cfg": {**text, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**text, "attn_pooler_heads": 2},
    }  # fmt: skip
    net = trained(CoCa(**config))
    (tmp_path / "hub").mkdir()
    torch.save(net.state_dict(), tmp_path / "hub/open_clip_pytorch_model.bin")
    (tmp_path / "hub/open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return Case(tmp_path / "hub", lambda x: net.encode_image(x, normalize=False), "visual", known={"heads": 4}, size=64)


class Conch(nn.Module):
    """CONCH's image tower, as conch/open_clip_custom/vision_tower.py declares it."""

    def __init__(self):
        super().__init__()
        from open_clip.transformer import AttentionalPooler

        self.trunk = VisionTransformer(
            img_size=64, patch_size=16, embed_dim=192, depth=2, num_heads=3, num_classes=0, global_pool="",
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )  # fmt: skip
        self.attn_pool_contrast = AttentionalPooler(64, 192, 8, 1, nn.LayerNorm)
        self.ln_contrast, self.proj_contrast = nn.LayerNorm(64), nn.Parameter(torch.randn(64, 64))
        self.attn_pool_caption = AttentionalPooler(48, 192, 8, 7, nn.LayerNorm)
        self.ln_caption = nn.LayerNorm(48)

    def forward(self, x):
        return self.ln_contrast(self.attn_pool_contrast(self.trunk(x))[:, 0])


@layout(
    "mahmoodlab/CONCH", "`visual.trunk`, `attn_pool_contrast`, `ln_contrast`; not `proj_contrast`, as evaluated there"
)
def conch(tmp_path):
    net = trained(Conch())
    state = put("visual.", net.state_dict())
    state |= {"text.ln_final.weight": torch.ones(8), "text_decoder.resblocks.0.ln_1.weight": torch.ones(8)}
    return Case({**state, "logit_scale": torch.tensor(1.0)}, net, "visual.trunk", size=64, pixels={"crop": 64})
