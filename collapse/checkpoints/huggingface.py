"""Image encoders that transformers builds itself, of a folder whose config.json names their kind.

Its own loading gives the tensors their names (from_pretrained with a state dict: nothing is fetched, and a config
names no code); what it misses is an error.  The kinds that other rules read (families.py) are not here.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from collapse import InputError
from collapse.checkpoints.keys import Weights
from collapse.checkpoints.plan import Clues, Plan, unusable
from collapse.checkpoints.preprocessing import BICUBIC, HALVES, at_size
from collapse.checkpoints.settings import shown, side
from collapse.files.containers import first_line
from collapse.models.meta import on_meta

# Kind -> the vector of an image: the model's own pooled output, its class token, the mean over positions, or summary.
POOLED = {
    "aimv2_vision_model": "pooler", "beit": "pooler", "bit": "pooler", "data2vec-vision": "pooler", "deit": "class",
    "dinov3_convnext": "pooler", "dinov3_vit": "pooler", "efficientnet": "pooler", "focalnet": "pooler",
    "hiera": "pooler", "levit": "pooler", "mobilenet_v1": "pooler", "mobilenet_v2": "pooler", "pvt_v2": "mean",
    "radio": "summary", "regnet": "pooler", "sam": "mean", "sam_vision_model": "mean", "siglip2": "pooler",
    "siglip2_vision_model": "pooler", "swinv2": "pooler",
}  # fmt: skip
FLAT = ("aimv2_vision_model", "swinv2", "hiera", "siglip2", "siglip2_vision_model")  # tokens, and no class token
CHOICE = ("beit", "data2vec-vision", "hiera", "deit")  # whose pooling layer may be left out
CLIPS = ("timesformer", "vivit")
ELSEWHERE = ("clip", "clip_vision_model", "convnext", "convnextv2", "dinov2", "dinov2_with_registers", "ijepa",
             "resnet", "siglip", "siglip_vision_model", "swin", "vit", "vit_mae", "vit_msn")  # fmt: skip
# RADIO takes the mean off itself; NaFlex is SigLIP's.
HABITS = {"radio": replace(BICUBIC, mean=None, std=None), "siglip2": HALVES, "siglip2_vision_model": HALVES}
LIST_LIMIT, NUMBER_LIMIT, LARGE_LIMIT = 128, 1 << 16, 1 << 24
LARGE = re.compile(r"vocab_size|_token_id|position|rope|rotary|window")
ROTARY = re.compile(r"^(rope|rotary|partial_rotary|global_rope|local_rope|global_attn)_\w+$")  # renamed by version
LEFT = r"^_|backbone|implementation|kernels"


def kind(clues: Clues) -> str | None:
    """The kind that a config.json gives, if this module is to build it.

    Raises InputError, by name, for a kind that is not read: of clips, of texts, of sounds.
    """
    config = clues.configs.get("config.json", {})
    name = clues.model_type
    if name is None or name in ELSEWHERE or clues.given.arch is not None:
        return None
    if "quantization_config" in config:
        raise InputError("config.json: its weights are quantised; dequantise them and save float32")
    if name in CLIPS:
        raise InputError(f"config.json: a {name}, which takes clips; of such vjepa2 and videomae are read")
    if name not in POOLED:
        raise InputError(
            f"config.json: model_type {shown(name)} is none of the image encoders that are read, of transformers "
            f"{', '.join(sorted((*POOLED, *ELSEWHERE)))}; of any other give the array of its embeddings"
        )
    return name


class Model(nn.Module):
    """A model of transformers with the vector that it gives of an image: (n, 3, h, w) -> (n, d)."""

    def __init__(self, net: nn.Module, pooling: str, prefix: int, patch: int = 0) -> None:
        super().__init__()
        self.net, self.pooling, self.num_prefix_tokens, self.patch = net, pooling, prefix, patch
        self.global_pool = "token" if prefix and pooling != "mean" else "avg"
        self.main_blocks = innermost(self)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, d). Raises InputError for images of a size that it does not take."""
        with taking(f"images of {x.shape[-2]} x {x.shape[-1]} pixels"):
            given = self.net(**(patches(x, self.patch) if self.patch else {"pixel_values": x}))
        if self.pooling == "pooler":
            return given.pooler_output.flatten(1)
        if self.pooling == "summary":
            return given.summary
        hidden = given.last_hidden_state
        if self.pooling == "class":
            return hidden[:, 0]
        return hidden.mean((2, 3)) if hidden.ndim == 4 else hidden[:, self.num_prefix_tokens :].mean(1)


def patches(x: Tensor, side: int) -> dict[str, Tensor]:
    """Images (n, 3, h, w) as SigLIP 2 with NaFlex takes them: patches in rows, each its pixels by row, and their grid.

    Raises InputError: sides that are no multiples of the patch's.
    """
    n, _, height, width = x.shape
    if height % side or width % side:
        raise InputError(f"images of {height} x {width} pixels for patches of {side}: expected multiples")
    grid = torch.tensor([[height // side, width // side]] * n, device=x.device)
    cut = x.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 3, 5, 1)
    rows = cut.flatten(3).flatten(1, 2)
    ones = torch.ones(rows.shape[:2], dtype=torch.int32, device=x.device)
    return {"pixel_values": rows, "pixel_attention_mask": ones, "spatial_shapes": grid}


def innermost(net: nn.Module) -> list[str]:
    """The names of the entries of lists of modules that hold no further list."""
    lists = {name: part for name, part in net.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    last = [name for name in lists if not any(other.startswith(f"{name}.") for other in lists)]
    return [f"{name}.{entry}" for name in last for entry, _ in lists[name].named_children()]


def outermost(net: nn.Module) -> list[str]:
    """The names of the entries of lists of modules that lie in no other such list."""
    lists = {name: part for name, part in net.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    first = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return [f"{name}.{entry}" for name in first for entry, _ in lists[name].named_children()]


def plan(name: str, tensors: Mapping[str, Tensor], clues: Clues) -> tuple[str, Plan]:
    """(root, plan) of the encoder that config.json describes, with the tensors that transformers takes for it.

    Raises InputError: a config far larger than the weights, or tensors that are missing or of another shape.
    """
    create, size, pooling = _network(name, tensors, clues)
    light = checked_on_meta(create, name, tensors)
    net, used = filled(create.args[0], create.args[1], create.args[2], tensors, clues.notes)
    root, weights = state_of(net, used)
    pixels = at_size(HABITS.get(name, BICUBIC), size)
    model = Model(net.eval(), pooling, light.num_prefix_tokens, light.patch)
    with torch.inference_mode():
        width = model(torch.zeros(1, 3, size, size)).shape[1]
    axes = "tokens" if light.num_prefix_tokens or name in FLAT else "nchw"
    return root, Plan(f"transformers {name}", create, weights, width, pixels, axes)


def config_of(name: str, tensors: int, values: Mapping[str, Any], model: Any = None) -> tuple[Any, Any]:
    """(config, class) of a kind, by the values of a config that are checked; `model`, where it is not the usual class.

    tensors: how many a file has: no network of it has more layers.

    Raises InputError: transformers is missing, or the values are of no such network.
    """
    try:
        from transformers import PretrainedConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_MAPPING
    except ImportError as error:
        raise InputError(f"a {name} is built by transformers, which is not here; pip install transformers") from error
    kind = CONFIG_MAPPING[name]
    fields = kind().to_dict().keys() - PretrainedConfig().to_dict().keys()  # none that names code, kernels or devices
    mine = checked(values, fields, tensors)
    try:
        config = kind.from_dict(mine)
        return config, model or MODEL_MAPPING[type(config)]
    except Exception as error:  # its checks raise in many ways, all the config's fault
        raise InputError(f"config.json: no {name} can be of these values ({first_line(error)})") from error


def _network(name: str, tensors: Mapping[str, Tensor], clues: Clues) -> tuple[partial[Model], int, str]:
    """(what builds it, pixels a side, how it pools), of a checked config."""
    values: Any = clues.configs["config.json"]
    inner = {"sam": "sam_vision_model", "siglip2": "siglip2_vision_model"}
    settings, kind = values.get("vision_config") if name in inner else values, inner.get(name, name)
    config, model = config_of(kind, len(tensors), settings if isinstance(settings, Mapping) else {}, _class(name))
    pooling, more = _pooling(name, tensors, clues)
    size = side("config.json: image_size", getattr(config, "image_size", 224)) or 224
    registers = getattr(config, "num_register_tokens", 0)
    prefix = {"deit": 2, "beit": 1, "data2vec-vision": 1, "dinov3_vit": 1 + registers}.get(name, 0)
    if name == "radio":
        prefix = config.num_cls_tokens + config.num_registers
    patch = config.patch_size if name.startswith("siglip2") else 0
    if patch:
        size = isqrt(config.num_patches) * patch
        clues.notes.append(f"NaFlex takes images in their own shape; here they are squares of {size} pixels, see crop=")
    return partial(_made, model, config, more, pooling, prefix, patch), size, pooling


def _class(name: str) -> Any:
    """The class of transformers where it is not the kind's usual one."""
    try:
        if name.startswith("sam"):
            from transformers.models.sam.modeling_sam import SamVisionModel

            return SamVisionModel
        if name.startswith("siglip2"):
            from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionModel

            return Siglip2VisionModel
    except ImportError:
        return None  # config_of says so
    return None


def _made(model: type[nn.Module], config: Any, more: Mapping[str, Any], pooling: str, prefix: int, patch: int) -> Model:
    return Model(model(config, **more), pooling, prefix, patch)


def _pooling(name: str, tensors: Mapping[str, Tensor], clues: Clues) -> tuple[str, dict[str, Any]]:
    """(how it pools, the argument that makes its pooling layer): the caller's word, else by the tensors."""
    has = any("pooler" in key.split(".") for key in tensors)
    if clues.given.pool is not None:
        if name not in CHOICE or (name == "hiera" and clues.given.pool == "cls"):
            raise InputError(f"pool={clues.given.pool}: a {name} pools in one way; leave it out")
        return "mean" if clues.given.pool == "mean" else "class", {"add_pooling_layer": False}
    if name not in CHOICE or name == "deit":
        return POOLED[name], {"add_pooling_layer": False} if name == "deit" else {}
    if has:
        return "pooler", {"add_pooling_layer": True}
    what = "the mean of its positions" if name == "hiera" else "the class token"
    clues.notes.append(f"has no pooling layer, as pre-training leaves it: {what} is taken; see pool=")
    return "mean" if name == "hiera" else "class", {"add_pooling_layer": False}


def checked(values: Mapping[str, Any], fields: Collection[str], tensors: int) -> dict[str, Any]:
    """The values of a config that shape a network. Raises InputError: one is of a kind or size that no network has."""
    mine = {name for name in values if isinstance(name, str) and (name in fields or ROTARY.search(name))}
    settings = {name: value for name, value in values.items() if name in mine and not re.search(LEFT, name)}
    for name, value in settings.items():
        _check(name, value, tensors)
    return settings


def _check(name: str, value: Any, tensors: int, depth: int = 0) -> None:
    nests = isinstance(value, (list, tuple)) or (isinstance(value, Mapping) and (depth or ROTARY.search(name)))
    if nests and len(value) <= LIST_LIMIT and depth < 4:
        for entry in value.items() if isinstance(value, Mapping) else value:
            _check(name, entry, tensors, depth + 1)
        return
    limit = tensors if "layers" in name or "depth" in name else NUMBER_LIMIT
    limit = LARGE_LIMIT if LARGE.search(name) else limit
    simple = value is None or isinstance(value, (bool, str)) or (isinstance(value, float) and abs(value) < 1e12)
    if not simple and not (isinstance(value, int) and abs(value) <= limit):
        raise InputError(f"config.json: {name} is {shown(value)}, which no network has")


def refuse_choices(clues: Clues, kind: str, names: Sequence[str]) -> None:
    """Raise InputError if the caller gives one of these, of which an encoder of this kind has none."""
    name = next((name for name in names if getattr(clues.given, name) is not None), None)
    if name is not None:
        raise InputError(f"{name}=: an encoder of {kind} has none to choose; leave it out")


@contextmanager
def taking(given: str) -> Iterator[None]:
    """Raise InputError, which says what was given, where a network's own code fails on it."""
    try:
        yield
    except (IndexError, RuntimeError, ValueError) as error:
        if isinstance(error, (InputError, torch.OutOfMemoryError)):
            raise
        raise InputError(f"the network takes no {given} ({first_line(error)})") from error


def checked_on_meta(create: Callable[[], nn.Module], name: str, tensors: Mapping[str, Tensor]) -> Any:
    """The network of a checked config without its weights, which says what it is.

    Raises InputError: values that no such network has, or one that is far larger than the file's tensors.
    """
    try:
        light = on_meta(create)
    except Exception as error:  # its code fails in its own ways, all the config's fault
        raise InputError(f"config.json: no {name} can be of these values ({first_line(error)})") from error
    count = sum(tensor.numel() for tensor in tensors.values())
    if sum(parameter.numel() for parameter in light.parameters()) > 2 * count + (1 << 20):
        raise InputError(f"config.json: a {name} that is far larger than the weights; is the file whole?")
    return light


def filled(
    model: Any, config: Any, more: Mapping[str, Any], tensors: Mapping[str, Tensor], notes: list[str]
) -> tuple[Any, tuple[str, ...]]:
    """(the model with its weights, the keys that it takes), by transformers' own names and renamings.

    Raises InputError: a tensor that is missing, misshapen or no number; `notes` is told of 16 bits.
    """
    for key, tensor in tensors.items():
        if tensor.ndim and (problem := unusable(key, tensor)) and tensor.is_floating_point():
            raise InputError(f"{shown(key)} {problem}")
    net, unused = _filled(model, config, more, tensors)
    used = tuple(key for key in tensors if key not in unused)
    if any(tensors[key].dtype in (torch.float16, torch.bfloat16) for key in used):
        notes.append("weights are stored in 16 bits; computed in float32")
    return net.eval(), used


def state_of(net: Any, used: Sequence[str]) -> tuple[str, Weights]:
    """(root, weights) of a filled model that is to be the part `net` of another; used: a file's keys in it."""
    state = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    weights = Weights(state, dict.fromkeys(list(state)[:1], tuple(used)))  # transformers says which, not what became
    prefix = getattr(net, "base_model_prefix", "")
    root = f"{prefix}." if prefix else ""
    return root if root and all(key.startswith(root) for key in used) else "", weights


def _filled(model: Any, config: Any, more: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Any, set[str]]:
    """(the model with its weights, the keys that it has no place for), by transformers' own names and renamings."""
    from transformers.utils import logging

    floats = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        net, info = model.from_pretrained(
            None, config=config, state_dict=floats, output_loading_info=True, dtype=torch.float32, **more
        )
    except Exception as error:  # shapes that do not fit, renamings that fail: all the file's fault
        raise InputError(f"its tensors are not those of its config.json ({first_line(error)})") from error
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
    missing = sorted(key for key in info["missing_keys"] if not re.search("mask_token|masked_spec_embed", key))
    if missing or info["mismatched_keys"]:
        first = (missing or [str(next(iter(info["mismatched_keys"])))])[0]
        raise InputError(
            f"{len(missing) or 'some'} tensors of its network are missing or misshapen, first {shown(first)}"
        )
    return net, set(info["unexpected_keys"])
