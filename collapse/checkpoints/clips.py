"""Encoders of clips: V-JEPA 2 and VideoMAE, a folder of transformers, built by transformers from its config.json.

The vector of a clip is the mean over its patches; of VideoMAE with mean pooling and a norm behind it, that norm's.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from collapse.checkpoints.huggingface import (
    checked_on_meta,
    config_of,
    filled,
    outermost,
    refuse_choices,
    state_of,
    taking,
)
from collapse.checkpoints.keys import Weights
from collapse.checkpoints.plan import Clues, Plan
from collapse.checkpoints.preprocessing import at_size
from collapse.checkpoints.settings import side, whole_number
from collapse.data.clips import Frames
from collapse.data.preprocessing import Preprocessing

LENGTHS = {"videomae": "num_frames", "vjepa2": "frames_per_clip"}
SIZES = {"videomae": "image_size", "vjepa2": "crop_size"}
HEADS = r"(vjepa2\.)?predictor|decoder|encoder_to_decoder|mask_token|position_embeddings|classifier|pooler"
MOST = 1024  # frames


class Watcher(nn.Module):
    """A network of transformers with the vector that it gives of a clip: (n, frames, 3, h, w) -> (n, d)."""

    def __init__(self, net: nn.Module, norm: int) -> None:
        super().__init__()
        self.net, self.norm = net, nn.LayerNorm(norm) if norm else nn.Identity()
        self.main_blocks = outermost(self)

    def forward(self, clips: Tensor) -> Tensor:
        """(n, frames, 3, h, w) -> (n, d). Raises InputError for clips of a size that it does not take."""
        with taking(f"clips of {' x '.join(map(str, clips.shape[1:]))}"):
            hidden = self.net(clips).last_hidden_state
        return self.norm(self.summary(hidden))

    def summary(self, hidden: Tensor) -> Tensor:
        """(n, t, d) -> (n, d)."""
        return hidden.mean(1)


def kind(clues: Clues) -> str | None:
    """The kind of encoder of clips that a config.json gives; None for others."""
    name = clues.model_type
    return name if name in LENGTHS and clues.given.arch is None else None


def plan(name: str, tensors: Mapping[str, Tensor], clues: Clues) -> tuple[str, Plan]:
    """(root, plan) of the encoder that a folder describes; every tensor that transformers takes for it is loaded.

    Raises InputError: a config far larger than the weights, or a flag that such an encoder lacks.
    """
    refuse_choices(clues, "clips", ("dim", "pool", "projector"))
    values = clues.configs["config.json"]
    config, model = config_of(name, len(tensors), values)
    length = whole_number(f"config.json: {LENGTHS[name]}", getattr(config, LENGTHS[name]), 1, MOST) or 1
    size = side(f"config.json: {SIZES[name]}", getattr(config, SIZES[name])) or 224
    norm = "fc_norm.weight" in tensors and getattr(config, "use_mean_pooling", False)
    create = partial(_made, model, config, name, config.hidden_size if norm else 0)
    checked_on_meta(create, name, tensors)
    net, used = filled(model, config, {}, tensors, clues.notes)
    if name == "vjepa2":
        net, used = net.encoder, tuple(key for key in used if key.startswith(("encoder.", "vjepa2.encoder.")))
    root, weights = state_of(net, used)
    if norm:
        last = {
            f"norm.{leaf}": tensors[f"fc_norm.{leaf}"] for leaf in ("weight", "bias") if f"fc_norm.{leaf}" in tensors
        }
        weights = Weights({**weights.tensors, **last}, {**weights.keys, **{key: (f"fc_{key}",) for key in last}})
    pixels = Frames(at_size(Preprocessing(), size), length)
    return root, Plan(f"transformers {name}", create, weights, config.hidden_size, pixels, "tokens", heads=HEADS)


def _made(model: Any, config: Any, name: str, norm: int) -> Watcher:
    net = model(config)
    return Watcher(net.encoder if name == "vjepa2" else net, norm)
